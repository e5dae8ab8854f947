// What training and decoding share of attention in bf16, so that a query's bits do not depend on which of them computes it:
// the softmax of one block of 64 keys, the products with 16 rows of fragments, and how the sums of spans of SPAN keys meet.
// A span's sums start from nothing at a multiple of SPAN keys of the document; spans are merged in ascending order.
#pragma once
#include "prelude.cuh"

constexpr int BLOCK = 64;
constexpr int SPAN = 512;
// head_dim in whole steps of mma; columns from HEAD_DIM on are zero.
constexpr int DIM = (HEAD_DIM + 15) / 16 * 16;
// Rows of a tile in shared memory lie 16 bytes further apart than they are long, so that 8 of them meet different banks.
constexpr int ROW = DIM + 8;
constexpr int TILE_ELEMENTS = BLOCK * ROW;
constexpr int DIM_ATOMS = DIM / 8, DIM_STEPS = DIM / 16;

// Copies 8 elements of a row, of which `whole` exist.
__device__ __forceinline__ void load_chunk(bf16* to, const bf16* from, int whole, const bf16* anything, bool aligned) {
    if (aligned) {
        copy_async16(to, whole > 0 ? from : anything, whole > 0);
        return;
    }
    u32 words[4];
#pragma unroll
    for (int w = 0; w < 4; w++) {
        u32 low = 2 * w < whole ? from[2 * w].bits : 0, high = 2 * w + 1 < whole ? from[2 * w + 1].bits : 0;
        words[w] = low | high << 16;
    }
    *(uint4*)to = make_uint4(words[0], words[1], words[2], words[3]);
}

// Copies rows 0..COUNT that lie `stride` apart; those from `count` on, and columns from HEAD_DIM on, become zero.
template <int COUNT, int THREADS> __device__ __forceinline__ void load_rows(bf16* tile, const bf16* base, i64 stride, int count, bool aligned) {
    constexpr int CHUNKS = DIM / 8;
    if (THREADS % CHUNKS == 0) {
        // A thread stays in its column, so that addresses are sums.
        constexpr int STEP = THREADS / CHUNKS;
        int line = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
        const bf16* from = base + line * stride + chunk * 8;
        bf16* to = tile + line * ROW + chunk * 8;
#pragma unroll
        for (int start = 0; start < COUNT; start += STEP) {
            int row = start + line;
            if (COUNT % STEP == 0 || row < COUNT) load_chunk(to, from, row < count ? HEAD_DIM - chunk * 8 : 0, base, aligned);
            from += STEP * stride;
            to += STEP * ROW;
        }
    } else {
        for (int i = threadIdx.x; i < COUNT * CHUNKS; i += THREADS) {
            int row = i / CHUNKS, chunk = i % CHUNKS;
            load_chunk(tile + row * ROW + chunk * 8, base + row * stride + chunk * 8, row < count ? HEAD_DIM - chunk * 8 : 0, base, aligned);
        }
    }
}

// Left operand: 16 rows from `row`, 16 columns from `column`.
__device__ __forceinline__ void left_operand(u32 (&out)[4], const bf16* tile, int row, int column) {
    int matrix = lane_id() / 8, line = lane_id() % 8;
    ldmatrix4(out, tile + (row + (matrix & 1) * 8 + line) * ROW + column + (matrix >> 1) * 8);
}
// Two right operands: 16 rows of the tile are 16 columns of the product, 16 columns are what is summed over.
__device__ __forceinline__ void right_operands(u32 (&out)[4], const bf16* tile, int row, int column) {
    int matrix = lane_id() / 8, line = lane_id() % 8;
    ldmatrix4(out, tile + (row + (matrix >> 1) * 8 + line) * ROW + column + (matrix & 1) * 8);
}
// Two right operands: 16 rows of the tile are what is summed over, 16 columns are columns of the product.
__device__ __forceinline__ void right_operands_trans(u32 (&out)[4], const bf16* tile, int row, int column) {
    int matrix = lane_id() / 8, line = lane_id() % 8;
    ldmatrix4_trans(out, tile + (row + (matrix & 1) * 8 + line) * ROW + column + (matrix >> 1) * 8);
}

// The four left operands that 16 x 64 sums make, rounded to bf16.
__device__ __forceinline__ void round_to_operand(u32 (&out)[4], const float (&sums)[8][4], int step) {
    out[0] = pack_bf16(sums[2 * step][0], sums[2 * step][1]);
    out[1] = pack_bf16(sums[2 * step][2], sums[2 * step][3]);
    out[2] = pack_bf16(sums[2 * step + 1][0], sums[2 * step + 1][1]);
    out[3] = pack_bf16(sums[2 * step + 1][2], sums[2 * step + 1][3]);
}

// The keys that a row sees are from..to of the block. Scores become probabilities relative to the row's maximum so far (in
// units of log2), whose sum is this thread's share; `factor` is what earlier sums must be multiplied by.
// Rows are lane / 4 and lane / 4 + 8; columns 8 j + 2 (lane % 4) + {0, 1}.
__device__ __forceinline__ void softmax_block(float (&scores)[8][4], const int (&from)[2], const int (&to)[2], bool masked, float scale,
    float (&maximum)[2], float (&sum)[2], float (&factor)[2]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (masked) {
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    int key = 8 * j + 2 * (lane_id() % 4) + e;
                    if (key < from[half] || key >= to[half]) scores[j][2 * half + e] = -INFINITE;
                }
        }
        float top = -INFINITE;
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) top = fmaxf(top, scores[j][2 * half + e]);
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        top = fmaxf(top * scale, maximum[half]);
        bool empty = top == -INFINITE;
        float base = empty ? 0.0f : top;
        factor[half] = empty ? 1.0f : fast_exp2(maximum[half] - base);
        float total = __fmul_rn(sum[half], factor[half]);
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float& score = scores[j][2 * half + e];
                score = fast_exp2(__fmaf_rn(score, scale, -base));
                total = __fadd_rn(total, score);
            }
        sum[half] = total;
        maximum[half] = top;
    }
}

// The sum over the four threads of a row.
__device__ __forceinline__ float row_sum(float v) {
    v = __fadd_rn(v, __shfl_xor_sync(~0u, v, 1));
    return __fadd_rn(v, __shfl_xor_sync(~0u, v, 2));
}

// Factors by which earlier spans and the next one enter, and their common maximum.
__device__ __forceinline__ float merge_factors(float earlier, float next, float& earlier_factor, float& next_factor) {
    float top = earlier > next ? earlier : next;
    earlier_factor = earlier == -INFINITE ? 0.0f : fast_exp2(earlier - top);
    next_factor = next == -INFINITE ? 0.0f : fast_exp2(next - top);
    return top;
}
__device__ __forceinline__ float merge(float earlier, float next, float earlier_factor, float next_factor) {
    return __fadd_rn(__fmul_rn(earlier, earlier_factor), __fmul_rn(next, next_factor));
}
