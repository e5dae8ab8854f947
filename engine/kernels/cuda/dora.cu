// The lengths of the rows of weights with low-rank parts, and the scaling of products by lengths that are learnt. Compiled without
// contraction, so that what does not sum has the bits of the CPU. See dora.rs.
// `groups` weights lie one after the other: an element's weight follows from its row's place between `offsets`, which are null for one.
#include "prelude.cuh"

#if OUT_F32
typedef float Out;
#else
typedef E Out;
#endif

constexpr int THREADS = 256;
// Rows that a block computes at once, and terms of the rank that it holds.
constexpr int ROWS = 8, RANKS = 64;

// The f32 master of a weight; `rest` is null where it has no remainders.
__device__ __forceinline__ float master(const E* values, const short* rest, i64 i) { return join(values[i], rest ? rest[i] : (short)0); }

// A length by another; rows of zeros stay so.
__device__ __forceinline__ float ratio(float length, float norm) { return norm > 0.0f ? length / norm : 0.0f; }

// The group of row `row`.
__device__ __forceinline__ int group_of(const int* offsets, int groups, int row) {
    int group = 0;
    if (offsets)
        while (group + 1 < groups && row >= offsets[group + 1]) group++;
    return group;
}

// norms[g][r] = |W[g][first + r] + scale * B[g][r] A[g]|, squares in f64; W is [groups, width, inputs], A [groups, rank, inputs] and
// B [groups, rows, rank]. A block is some rows of a group.
extern "C" __global__ void __launch_bounds__(THREADS) row_norms(const E* weight, const short* weight_rest, const E* a, const short* a_rest, const E* b,
    const short* b_rest, float* norms, int width, int first, int rows, int rank, int inputs, float scale) {
    __shared__ float factors[ROWS][RANKS];
    int top = blockIdx.x * ROWS;
    i64 weight_row = (i64)blockIdx.y * width + first + top, row = (i64)blockIdx.y * rows + top, a_row = (i64)blockIdx.y * rank;
    double squares[ROWS] = {};
    for (int left = 0; left < inputs; left += THREADS) {
        int column = left + threadIdx.x;
        float sums[ROWS] = {};
        for (int start = 0; start < rank; start += RANKS) {
            __syncthreads();
            for (int i = threadIdx.x; i < ROWS * RANKS; i += THREADS) {
                int r = i / RANKS, k = start + i % RANKS;
                factors[r][i % RANKS] = top + r < rows && k < rank ? master(b, b_rest, (row + r) * rank + k) : 0.0f;
            }
            __syncthreads();
            if (column >= inputs) continue;
            for (int k = 0; k < min(RANKS, rank - start); k++) {
                float x = master(a, a_rest, (a_row + start + k) * inputs + column);
#pragma unroll
                for (int r = 0; r < ROWS; r++) sums[r] += factors[r][k] * x;
            }
        }
        if (column >= inputs) continue;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (top + r >= rows) continue;
            float value = master(weight, weight_rest, (weight_row + r) * inputs + column) + scale * sums[r];
            squares[r] += (double)value * value;
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        double sum = block_sum(squares[r]);
        if (threadIdx.x == 0 && top + r < rows) norms[row + r] = (float)sqrt(sum);
    }
}

// gains[g][first + r] = lengths[g][r] / norms[g][r]; with `fresh` all other columns become 1. A thread is a column.
extern "C" __global__ void gains(const E* lengths, const short* rest, const float* norms, float* gains, int width, int first, int rows, int fresh) {
    int column = blockIdx.x * blockDim.x + threadIdx.x, r = column - first;
    if (column >= width) return;
    i64 row = (i64)blockIdx.y * rows + r;
    if (r >= 0 && r < rows) {
        gains[(i64)blockIdx.y * width + column] = ratio(master(lengths, rest, row), norms[row]);
    } else if (fresh) {
        gains[(i64)blockIdx.y * width + column] = 1.0f;
    }
}

// y = gains * sums + bias + residual. A block is a row.
extern "C" __global__ void scale_sums(const float* sums, const float* gains, const E* bias, const Out* residual, Out* y, int width, const int* offsets, int groups) {
    i64 row = (i64)blockIdx.x * width;
    gains += (i64)group_of(offsets, groups, blockIdx.x) * width;
    for (int c = threadIdx.x; c < width; c += blockDim.x) {
        float value = sums[row + c] * gains[c];
        if (bias) value += to_float(bias[c]);
        if (residual) value += to_float(residual[row + c]);
        y[row + c] = from_float<Out>(value);
    }
}

// d_sums = gains * dy; products = sums * dy, if there are some. A block is a row.
extern "C" __global__ void scale_back(const E* dy, const float* gains, const E* sums, E* d_sums, float* products, int width, const int* offsets, int groups) {
    i64 row = (i64)blockIdx.x * width;
    gains += (i64)group_of(offsets, groups, blockIdx.x) * width;
    for (int c = threadIdx.x; c < width; c += blockDim.x) {
        float d = to_float(dy[row + c]);
        d_sums[row + c] = from_float<E>(d * gains[c]);
        if (products) products[row + c] = d * to_float(sums[row + c]);
    }
}

// gradient[g][r] (+)= sums[g][first + r] / norms[g][r]. A thread is a row of a group.
extern "C" __global__ void length_gradient(const float* sums, const float* norms, float* gradient, int width, int first, int rows, int add) {
    int r = blockIdx.x * blockDim.x + threadIdx.x;
    if (r >= rows) return;
    i64 row = (i64)blockIdx.y * rows + r;
    gradient[row] = (add ? gradient[row] : 0.0f) + ratio(sums[(i64)blockIdx.y * width + first + r], norms[row]);
}
