// What the kernels of decoding share (attention_paged.cu, attention_step.cu): the sums of up to 16 query heads over blocks of 64 keys, by four
// warps. The arithmetic is that of attention.cu (attention_core.cuh), so a decoded token has the bits of the same token in training.
#pragma once
#include "attention_core.cuh"

constexpr int WARPS = 4, THREADS = 32 * WARPS;
// Each warp computes the scores of 16 keys and the sums of every fourth pair of 8 columns.
constexpr int PAIRS = (DIM_STEPS + WARPS - 1) / WARPS;
constexpr int SCORE_ROW = BLOCK + 4;

// The scores of 16 queries with a block of keys.
__device__ __forceinline__ void score_keys(const bf16* q_tile, const bf16* k_tile, float* score_tile) {
    int warp = warp_id();
    float own[2][4] = {};
#pragma unroll
    for (int step = 0; step < DIM_STEPS; step++) {
        u32 left[4], four[4];
        left_operand(left, q_tile, 0, 16 * step);
        right_operands(four, k_tile, 16 * warp, 16 * step);
        u32 one[2] = {four[0], four[1]}, other[2] = {four[2], four[3]};
        mma_bf16(own[0], left, one);
        mma_bf16(own[1], left, other);
    }
    int line = lane_id() / 4, column = 2 * (lane_id() % 4);
#pragma unroll
    for (int j = 0; j < 2; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) score_tile[(line + e / 2 * 8) * SCORE_ROW + 16 * warp + 8 * j + column + e % 2] = own[j][e];
}

struct Sums {
    float values[PAIRS][2][4], maximum[2], sum[2];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int p = 0; p < PAIRS; p++)
#pragma unroll
            for (int e = 0; e < 8; e++) values[p][e / 4][e % 4] = 0.0f;
#pragma unroll
        for (int half = 0; half < 2; half++) maximum[half] = -INFINITE, sum[half] = 0.0f;
    }

    // Adds a block of keys, of which the text of `length` keys has the first at `first_key`.
    __device__ __forceinline__ void add_block(const float* score_tile, const bf16* v_tile, int first_key, int length, int window, float scale) {
        int warp = warp_id(), line = lane_id() / 4, column = 2 * (lane_id() % 4);
        float scores[8][4], factor[2];
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) scores[j][e] = score_tile[(line + e / 2 * 8) * SCORE_ROW + 8 * j + column + e % 2];
        int from[2] = {length - window - first_key, length - window - first_key}, to[2] = {length - first_key, length - first_key};
        softmax_block(scores, from, to, true, scale, maximum, sum, factor);
#pragma unroll
        for (int p = 0; p < PAIRS; p++)
#pragma unroll
            for (int e = 0; e < 8; e++) values[p][e / 4][e % 4] = __fmul_rn(values[p][e / 4][e % 4], factor[e % 4 / 2]);
#pragma unroll
        for (int step = 0; step < BLOCK / 16; step++) {
            u32 left[4];
            round_to_operand(left, scores, step);
#pragma unroll
            for (int p = 0; p < PAIRS; p++) {
                int pair = p * WARPS + warp;
                if (pair >= DIM_STEPS) continue;
                u32 four[4];
                right_operands_trans(four, v_tile, 16 * step, 16 * pair);
                u32 one[2] = {four[0], four[1]}, other[2] = {four[2], four[3]};
                mma_bf16(values[p][0], left, one);
                mma_bf16(values[p][1], left, other);
            }
        }
    }

    // The results, as decode_merge gives them, if there is but one span; else those of the span.
    __device__ __forceinline__ void write(float* parts, float* maxima, float* part_sums, bf16* o, float* lse, i64 first_head, int head_count, int spans, int span) {
        int warp = warp_id();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = 8 * half + lane_id() / 4;
            float total = row_sum(sum[half]);
            if (row >= head_count) continue;
            i64 head = first_head + row, place = head * spans + span;
            if (o) {
                float by = 1.0f / total;
                if (warp == 0 && lane_id() % 4 == 0) lse[head] = (maximum[half] + log2f(total)) * LN_2;
#pragma unroll
                for (int p = 0; p < PAIRS; p++) {
                    int pair = p * WARPS + warp;
                    if (pair >= DIM_STEPS) continue;
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        int column = 16 * pair + 8 * (e / 2) + 2 * (lane_id() % 4) + e % 2;
                        if (column < HEAD_DIM) o[head * HEAD_DIM + column] = from_float<bf16>(values[p][e / 2][2 * half + e % 2] * by);
                    }
                }
                continue;
            }
            if (warp == 0 && lane_id() % 4 == 0) maxima[place] = maximum[half], part_sums[place] = total;
#pragma unroll
            for (int p = 0; p < PAIRS; p++) {
                int pair = p * WARPS + warp;
                if (pair >= DIM_STEPS) continue;
#pragma unroll
                for (int j = 0; j < 2; j++)
#pragma unroll
                    for (int e = 0; e < 2; e++) parts[place * DIM + 16 * pair + 8 * j + 2 * (lane_id() % 4) + e] = values[p][j][2 * half + e];
            }
        }
    }
};

// The results of a text without keys.
__device__ __forceinline__ void write_nothing(bf16* o, float* lse, i64 first_head, int head_count) {
    for (int i = threadIdx.x; i < head_count * HEAD_DIM; i += THREADS) o[first_head * HEAD_DIM + i] = from_float<bf16>(0.0f);
    for (int i = threadIdx.x; i < head_count; i += THREADS) lse[first_head + i] = 0.0f;
}
