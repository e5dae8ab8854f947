// Products of bf16 matrices by Hopper's wgmma: as product.cu, for many rows. The sum of an element is the same chain of 16 products
// at a time. Two warpgroups share a tile of 128 rows; what is copied next never is what a product in flight still reads.
// See product.rs.
//
// Macros: as product.cu, with TILE_ROWS 128 and TILE_COLUMNS 128 or 256.
#include "product_tile.cuh"
#include "hopper.cuh"

constexpr int THREADS = 256;
constexpr int STAGES = 4;
typedef Operand<TILE_ROWS, A_STRIDED, THREADS> A;
typedef Operand<TILE_COLUMNS, B_STRIDED, THREADS> B;
constexpr int A_ELEMENTS = TILE_ROWS * DEPTH, B_ELEMENTS = TILE_COLUMNS * DEPTH;

extern "C" __global__ void __launch_bounds__(THREADS, 1) product(const bf16* a, const bf16* b, Out* out, const Out* residual,
    const bf16* bias, int m, int n, int depth, i64 a_stride, i64 b_stride, const int* offsets, i64 b_group, i64 out_group) {
    DYNAMIC_SHARED(memory);
    bf16* a_tiles = (bf16*)memory;
    bf16* b_tiles = a_tiles + STAGES * A_ELEMENTS;

#if GROUPED == 1
    int base = offsets[blockIdx.z];
    m = offsets[blockIdx.z + 1] - base;
    a += (i64)base * a_stride;
    out += (i64)base * n;
    if (residual) residual += (i64)base * n;
    b += blockIdx.z * b_group;
    if (bias) bias += blockIdx.z * n;
#elif GROUPED == 2
    int base = offsets[blockIdx.z];
    depth = offsets[blockIdx.z + 1] - base;
    a += (i64)base * a_stride;
    b += (i64)base * b_stride;
    out += blockIdx.z * out_group;
    if (residual) residual += blockIdx.z * out_group;
#endif

    TilePlace place(m, n, TILE_ROWS, TILE_COLUMNS);
    if (!place.inside) return;
    A a_operand(a, a_stride, place.top, m, depth);
    B b_operand(b, b_stride, place.left, n, depth);
    int group_row = threadIdx.x / 128 * 64;
    int steps = (depth + DEPTH - 1) / DEPTH;

    float sums[TILE_COLUMNS / 2];
#pragma unroll
    for (int i = 0; i < TILE_COLUMNS / 2; i++) sums[i] = 0.0f;

#pragma unroll
    for (int stage = 0; stage < STAGES - 2; stage++) {
        if (stage < steps) {
            a_operand.load(a_tiles + stage * A_ELEMENTS);
            b_operand.load(b_tiles + stage * B_ELEMENTS);
        }
        copy_async_commit();
    }
    for (int step = 0; step < steps; step++) {
        copy_async_wait<STAGES - 3>();
        fence_async_proxy();
        // After this all threads see the stage, and the products of the stage before the last are done.
        __syncthreads();
        const bf16* a_tile = a_tiles + step % STAGES * A_ELEMENTS;
        const bf16* b_tile = b_tiles + step % STAGES * B_ELEMENTS;
        wgmma_fence();
#pragma unroll
        for (int r = 0; r < DEPTH; r += 16)
            wgmma<TILE_COLUMNS, A_STRIDED, B_STRIDED>(sums, describe<A_STRIDED>(a_tile, group_row, r), describe<B_STRIDED>(b_tile, 0, r), 1);
        wgmma_commit();
        int next = step + STAGES - 2;
        if (next < steps) {
            a_operand.load(a_tiles + next % STAGES * A_ELEMENTS);
            b_operand.load(b_tiles + next % STAGES * B_ELEMENTS);
        }
        copy_async_commit();
        wgmma_wait<1>();
    }
    wgmma_wait<0>();

    bool paired = n % 2 == 0 && (u64)out % (2 * sizeof(Out)) == 0 && (u64)residual % (2 * sizeof(Out)) == 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = place.top + group_row + warp_id() % 4 * 16 + 8 * half + lane_id() / 4;
        if (row >= m) continue;
#pragma unroll
        for (int j = 0; j < TILE_COLUMNS / 8; j++) {
            int column = place.left + 8 * j + 2 * (lane_id() % 4);
            if (column < n)
                write_pair(out, residual, bias, (i64)row * n + column, column, n, sums[4 * j + 2 * half], sums[4 * j + 2 * half + 1], paired);
        }
    }
}
