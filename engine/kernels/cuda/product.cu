// Products of bf16 matrices on the tensor cores by mma.sync: out[row][column] = sum over r of a(row, r) b(column, r), in f32.
// Each element is one chain of 16 products at a time from r = 0 on, in one accumulator, whatever the tile: so tiles of 16
// rows (decoding) and of 128 (training) give the same bits. See product.rs.
//
// Macros: A_STRIDED, B_STRIDED: 0 if r runs along memory, 1 if rows (columns) do. OUT_F32: the element of out and residual.
// GROUPED: 0; 1: group z has rows offsets[z]..offsets[z + 1] and its own b; 2: group z sums over those r and has its own out.
// TILE_ROWS, TILE_COLUMNS: 128 x 128, 64 x 64, 16 x 64 or 16 x 32.
#include "product_tile.cuh"

constexpr int STAGES = TILE_ROWS == 128 ? 3 : TILE_ROWS == 64 ? 4 : TILE_COLUMNS == 64 ? 6 : 8;
// Warps side by side: 2 x 2 tiles of a quarter; where there are 16 rows, a row of warps with 16 columns each.
constexpr int THREADS = TILE_ROWS == 16 ? TILE_COLUMNS * 2 : 128;
constexpr int WARP_ROWS = TILE_ROWS == 16 ? 16 : TILE_ROWS / 2;
constexpr int WARP_COLUMNS = TILE_ROWS == 16 ? 16 : TILE_COLUMNS / 2;
constexpr int ROW_ATOMS = WARP_ROWS / 16, COLUMN_ATOMS = WARP_COLUMNS / 8;
typedef Operand<TILE_ROWS, A_STRIDED, THREADS> A;
typedef Operand<TILE_COLUMNS, B_STRIDED, THREADS> B;
constexpr int A_ELEMENTS = tile_elements<TILE_ROWS, A_STRIDED>, B_ELEMENTS = tile_elements<TILE_COLUMNS, B_STRIDED>;

extern "C" __global__ void __launch_bounds__(THREADS, TILE_ROWS == 16 ? 3 : 2) product(const bf16* a, const bf16* b, Out* out, const Out* residual,
    const bf16* bias, int m, int n, int depth, i64 a_stride, i64 b_stride, const int* offsets, i64 b_group, i64 out_group) {
    wait_for_earlier();
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

    float sums[ROW_ATOMS][COLUMN_ATOMS][4];
#pragma unroll
    for (int i = 0; i < ROW_ATOMS; i++)
#pragma unroll
        for (int j = 0; j < COLUMN_ATOMS; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) sums[i][j][e] = 0.0f;

    int warp = warp_id();
    int warp_row = TILE_ROWS == 16 ? 0 : warp / 2 * WARP_ROWS, warp_column = (TILE_ROWS == 16 ? warp : warp % 2) * WARP_COLUMNS;
    int steps = (depth + DEPTH - 1) / DEPTH;
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) {
        if (stage < steps) {
            a_operand.load(a_tiles + stage * A_ELEMENTS);
            b_operand.load(b_tiles + stage * B_ELEMENTS);
        }
        copy_async_commit();
    }
    for (int step = 0; step < steps; step++) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();
        int next = step + STAGES - 1;
        if (next < steps) {
            a_operand.load(a_tiles + next % STAGES * A_ELEMENTS);
            b_operand.load(b_tiles + next % STAGES * B_ELEMENTS);
        }
        copy_async_commit();
        bf16* a_tile = a_tiles + step % STAGES * A_ELEMENTS;
        bf16* b_tile = b_tiles + step % STAGES * B_ELEMENTS;
#pragma unroll
        for (int r = 0; r < DEPTH; r += 16) {
            u32 lefts[ROW_ATOMS][4], rights[COLUMN_ATOMS][2];
#pragma unroll
            for (int i = 0; i < ROW_ATOMS; i++) A::left_operand(lefts[i], a_tile, warp_row + 16 * i, r);
#pragma unroll
            for (int j = 0; j < COLUMN_ATOMS; j += 2) {
                u32 four[4];
                B::right_operands(four, b_tile, warp_column + 8 * j, r);
                rights[j][0] = four[0], rights[j][1] = four[1], rights[j + 1][0] = four[2], rights[j + 1][1] = four[3];
            }
#pragma unroll
            for (int i = 0; i < ROW_ATOMS; i++)
#pragma unroll
                for (int j = 0; j < COLUMN_ATOMS; j++) mma_bf16(sums[i][j], lefts[i], rights[j]);
        }
    }

    bool paired = n % 2 == 0 && (u64)out % (2 * sizeof(Out)) == 0 && (u64)residual % (2 * sizeof(Out)) == 0;
#pragma unroll
    for (int i = 0; i < ROW_ATOMS; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = place.top + warp_row + 16 * i + 8 * half + lane_id() / 4;
            if (row >= m) continue;
#pragma unroll
            for (int j = 0; j < COLUMN_ATOMS; j++) {
                int column = place.left + warp_column + 8 * j + 2 * (lane_id() % 4);
                if (column < n)
                    write_pair(out, residual, bias, (i64)row * n + column, column, n, sums[i][j][2 * half], sums[i][j][2 * half + 1], paired);
            }
        }
}
