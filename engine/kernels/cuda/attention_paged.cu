// Decoding: one query a sequence against keys and values in blocks, bf16. A block is a span of SPAN keys of one sequence and one
// key head; its rows are the query heads that share it. A second kernel merges the spans. The arithmetic is that of attention.cu
// (attention_core.cuh), so a decoded token has the bits of the same token in training. See paged.rs.
// Macros: HEAD_DIM.
#include "attention_core.cuh"

constexpr int WARPS = 4, THREADS = 32 * WARPS;
// Each warp computes the scores of 16 keys and the sums of every fourth pair of 8 columns.
constexpr int PAIRS = (DIM_STEPS + WARPS - 1) / WARPS;
constexpr int SCORE_ROW = BLOCK + 4;

// Queries are rows of qkv, one a sequence. parts: [sequences][heads][spans][DIM], maxima and part_sums: [sequences][heads][spans]. Where
// one span is all, the results go to o and lse instead, as decode_merge gives them; these are null otherwise.
extern "C" __global__ void __launch_bounds__(THREADS) decode_spans(const bf16* qkv, const bf16* k_cache, const bf16* v_cache, const int* block_table,
    int table_width, const int* lengths, float* parts, float* maxima, float* part_sums, int heads, int kv_heads, float scale, int window,
    bf16* o, float* lse) {
    wait_for_earlier();
    DYNAMIC_SHARED(memory);
    bf16* q_tile = (bf16*)memory;
    bf16* k_tiles = q_tile + 16 * ROW;
    bf16* v_tile = k_tiles + 2 * TILE_ELEMENTS;
    float* score_tile = (float*)(v_tile + TILE_ELEMENTS);

    int span = blockIdx.x, spans = gridDim.x, group = heads / kv_heads, groups = (group + 15) / 16;
    int kv_head = blockIdx.y / groups, first_head = kv_head * group + blockIdx.y % groups * 16;
    int head_count = min((kv_head + 1) * group - first_head, 16);
    int sequence = blockIdx.z, length = lengths[sequence], position = length - 1;
    int begin = max(max(length - window, 0) / BLOCK, span * (SPAN / BLOCK)), end = min((length + BLOCK - 1) / BLOCK, (span + 1) * (SPAN / BLOCK));
    if (begin >= end) {
        if (!o) return;
        i64 first = (i64)sequence * heads + first_head;
        for (int i = threadIdx.x; i < head_count * HEAD_DIM; i += THREADS) o[first * HEAD_DIM + i] = from_float<bf16>(0.0f);
        for (int i = threadIdx.x; i < head_count; i += THREADS) lse[first + i] = 0.0f;
        return;
    }
    i64 width = (i64)(heads + 2 * kv_heads) * HEAD_DIM, key_width = (i64)kv_heads * HEAD_DIM;
    const bf16* q = qkv + sequence * width + first_head * HEAD_DIM;
    block_table += (i64)sequence * table_width;
    bool aligned = HEAD_DIM % 8 == 0 && is_aligned(qkv) && is_aligned(k_cache) && is_aligned(v_cache);
    scale *= LOG2_E;

    auto load_keys = [&](bf16* tile, const bf16* base, int block) {
        const bf16* start = base + (i64)block_table[block] * BLOCK * key_width + kv_head * HEAD_DIM;
        load_rows<BLOCK, THREADS>(tile, start, key_width, length - block * BLOCK, aligned);
    };
    load_rows<16, THREADS>(q_tile, q, HEAD_DIM, head_count, aligned);
    load_keys(k_tiles, k_cache, begin);
    copy_async_commit();

    int warp = warp_id();
    float sums[PAIRS][2][4], maximum[2] = {-INFINITE, -INFINITE}, sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int p = 0; p < PAIRS; p++)
#pragma unroll
        for (int e = 0; e < 8; e++) sums[p][e / 4][e % 4] = 0.0f;

    for (int block = begin; block < end; block++) {
        copy_async_wait<0>();
        __syncthreads();
        bf16* k_tile = k_tiles + (block - begin) % 2 * TILE_ELEMENTS;
        load_keys(v_tile, v_cache, block);
        copy_async_commit();
        if (block + 1 < end) load_keys(k_tiles + (block + 1 - begin) % 2 * TILE_ELEMENTS, k_cache, block + 1);
        copy_async_commit();

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
        copy_async_wait<1>();
        __syncthreads();

        float scores[8][4], factor[2];
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) scores[j][e] = score_tile[(line + e / 2 * 8) * SCORE_ROW + 8 * j + column + e % 2];
        int first_key = block * BLOCK;
        int from[2] = {position - window + 1 - first_key, position - window + 1 - first_key}, to[2] = {length - first_key, length - first_key};
        softmax_block(scores, from, to, true, scale, maximum, sum, factor);
#pragma unroll
        for (int p = 0; p < PAIRS; p++)
#pragma unroll
            for (int e = 0; e < 8; e++) sums[p][e / 4][e % 4] = __fmul_rn(sums[p][e / 4][e % 4], factor[e % 4 / 2]);
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
                mma_bf16(sums[p][0], left, one);
                mma_bf16(sums[p][1], left, other);
            }
        }
    }
    copy_async_wait<0>();

#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = 8 * half + lane_id() / 4;
        float total = row_sum(sum[half]);
        if (row >= head_count) continue;
        i64 head = (i64)sequence * heads + first_head + row, place = head * spans + span;
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
                    if (column < HEAD_DIM) o[head * HEAD_DIM + column] = from_float<bf16>(sums[p][e / 2][2 * half + e % 2] * by);
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
                for (int e = 0; e < 2; e++) parts[place * DIM + 16 * pair + 8 * j + 2 * (lane_id() % 4) + e] = sums[p][j][2 * half + e];
        }
    }
}

// o: [sequences][heads][HEAD_DIM]; lse: [sequences][heads]. A block is a head of a sequence; one without keys gives zeros.
extern "C" __global__ void decode_merge(const float* parts, const float* maxima, const float* part_sums, const int* lengths, bf16* o, float* lse,
    int heads, int spans, int window) {
    wait_for_earlier();
    int sequence = blockIdx.x / heads, length = lengths[sequence];
    int begin = max(length - window, 0) / BLOCK / (SPAN / BLOCK), end = (length + SPAN - 1) / SPAN;
    i64 place = (i64)blockIdx.x * spans;
    for (int column = threadIdx.x; column < HEAD_DIM; column += blockDim.x) {
        if (length == 0) {
            o[(i64)blockIdx.x * HEAD_DIM + column] = from_float<bf16>(0.0f);
            if (column == 0) lse[blockIdx.x] = 0.0f;
            continue;
        }
        float maximum = maxima[place + begin], sum = part_sums[place + begin], value = parts[(place + begin) * DIM + column];
        for (int span = begin + 1; span < end; span++) {
            float f, g;
            maximum = merge_factors(maximum, maxima[place + span], f, g);
            sum = merge(sum, part_sums[place + span], f, g);
            value = merge(value, parts[(place + span) * DIM + column], f, g);
        }
        float by = 1.0f / sum;
        o[(i64)blockIdx.x * HEAD_DIM + column] = from_float<bf16>(value * by);
        if (column == 0) lse[blockIdx.x] = (maximum + log2f(sum)) * LN_2;
    }
}
