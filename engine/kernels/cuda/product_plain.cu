// Products of f32 matrices: out[row][column] = sum over r of a(row, r) b(column, r), one chain of fused products from r = 0 on for
// each element, whatever the tile. Same signature and macros as product.cu; the tile is 64 x 64. See product.rs.
#include "prelude.cuh"

typedef float Out;
constexpr int TILE = 64, DEPTH = 16, THREADS = 256;

// tile[r][i] = operand(i, r), zero outside.
template <bool STRIDED> __device__ __forceinline__ void load_tile(float (&tile)[DEPTH][TILE + 4], const float* from, i64 stride, int count, int left) {
#pragma unroll
    for (int step = 0; step < TILE * DEPTH / THREADS; step++) {
        int item = threadIdx.x + step * THREADS;
        int i = STRIDED ? item % TILE : item / DEPTH, r = STRIDED ? item / TILE : item % DEPTH;
        bool inside = i < count && r < left;
        tile[r][i] = inside ? from[STRIDED ? r * stride + i : i * stride + r] : 0.0f;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) product(const float* a, const float* b, Out* out, const Out* residual, const float* bias, int m, int n,
    int depth, i64 a_stride, i64 b_stride, const int* offsets, i64 b_group, i64 out_group) {
    wait_for_earlier();
    __shared__ float a_tile[DEPTH][TILE + 4], b_tile[DEPTH][TILE + 4];
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
    int columns = (n + TILE - 1) / TILE;
    int top = blockIdx.x / columns * TILE, left = blockIdx.x % columns * TILE;
    if (top >= m) return;
    const float* a_base = A_STRIDED ? a + top : a + top * a_stride;
    const float* b_base = B_STRIDED ? b + left : b + left * b_stride;
    int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
    float sums[4][4] = {};
    for (int r = 0; r < depth; r += DEPTH) {
        load_tile<A_STRIDED>(a_tile, A_STRIDED ? a_base + r * a_stride : a_base + r, a_stride, m - top, depth - r);
        load_tile<B_STRIDED>(b_tile, B_STRIDED ? b_base + r * b_stride : b_base + r, b_stride, n - left, depth - r);
        __syncthreads();
#pragma unroll
        for (int s = 0; s < DEPTH; s++) {
            float4 x = *(float4*)&a_tile[s][row], y = *(float4*)&b_tile[s][column];
            float xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) sums[i][j] = __fmaf_rn(xs[i], ys[j], sums[i][j]);
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int y = top + row + i, x = left + column + j;
            if (y >= m || x >= n) continue;
            i64 at = (i64)y * n + x;
            float value = sums[i][j];
            if (bias) value += bias[x];
            if (residual) value += residual[at];
            out[at] = value;
        }
}
