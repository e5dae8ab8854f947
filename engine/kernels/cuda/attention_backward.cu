// The derivative of attention.cu: probabilities are computed again from the log-sum-exp, one tile at a time. Queries' gradients in
// one kernel, those of keys and values in another, so that every sum has one owner and one order and nothing is added atomically.
// See attention_backward.rs. Source: Dao, arXiv 2307.08691, algorithm 2.
// Macros: HEAD_DIM.
#include "attention_core.cuh"

constexpr int WARPS = 4, THREADS = 32 * WARPS;

// deltas[row][head] = d_o . o. A warp is a head of a row.
extern "C" __global__ void attention_deltas(const bf16* d_o, const bf16* o, float* deltas, int count) {
    int item = blockIdx.x * WARPS + warp_id();
    float sum = 0.0f;
    if (item < count) {
        i64 at = (i64)item * HEAD_DIM;
        for (int c = lane_id(); c < HEAD_DIM; c += 32) sum += to_float(d_o[at + c]) * to_float(o[at + c]);
    }
    sum = warp_sum(sum);
    if (item < count && lane_id() == 0) deltas[item] = sum;
}

// out[8][4] = 16 rows of `left` times the 64 rows of `right`, over DIM.
__device__ __forceinline__ void score_tile(float (&out)[8][4], const bf16* left, int row, const bf16* right) {
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) out[j][e] = 0.0f;
#pragma unroll
    for (int step = 0; step < DIM_STEPS; step++) {
        u32 operand[4];
        left_operand(operand, left, row, 16 * step);
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            u32 four[4];
            right_operands(four, right, 8 * j, 16 * step);
            u32 one[2] = {four[0], four[1]}, other[2] = {four[2], four[3]};
            mma_bf16(out[j], operand, one);
            mma_bf16(out[j + 1], operand, other);
        }
    }
}

// sums += weights (16 x 64, rounded) times the 64 rows of `tile`.
__device__ __forceinline__ void add_weighted(float (&sums)[DIM_ATOMS][4], const float (&weights)[8][4], const bf16* tile) {
#pragma unroll
    for (int step = 0; step < BLOCK / 16; step++) {
        u32 operand[4];
        round_to_operand(operand, weights, step);
#pragma unroll
        for (int j = 0; j < DIM_ATOMS; j += 2) {
            u32 four[4];
            right_operands_trans(four, tile, 16 * step, 8 * j);
            u32 one[2] = {four[0], four[1]}, other[2] = {four[2], four[3]};
            mma_bf16(sums[j], operand, one);
            mma_bf16(sums[j + 1], operand, other);
        }
    }
}

__device__ __forceinline__ void write_rows(bf16* to, i64 stride, int first, int length, const float (&sums)[DIM_ATOMS][4], float by) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = first + 8 * half + lane_id() / 4;
        if (row >= length) continue;
#pragma unroll
        for (int j = 0; j < DIM_ATOMS; j++) {
            int column = 8 * j + 2 * (lane_id() % 4);
            if (column < HEAD_DIM) *(u32*)(to + row * stride + column) = pack_bf16(sums[j][2 * half] * by, sums[j][2 * half + 1] * by);
        }
    }
}

// tiles: [blocks.x][4] as in attention.cu, of 64 queries. blocks.y: heads.
extern "C" __global__ void __launch_bounds__(THREADS) attention_backward_queries(const bf16* d_o, const bf16* qkv, const float* lse, const float* deltas,
    bf16* dqkv, const int* tiles, int heads, int kv_heads, float scale, int window) {
    DYNAMIC_SHARED(memory);
    bf16* q_tile = (bf16*)memory;
    bf16* d_tile = q_tile + TILE_ELEMENTS;
    bf16* k_tiles = d_tile + TILE_ELEMENTS;
    bf16* v_tiles = k_tiles + 2 * TILE_ELEMENTS;

    const int* tile = tiles + 4 * blockIdx.x;
    int document = tile[0], length = tile[1], first = tile[2], head = blockIdx.y, kv_head = head / (heads / kv_heads);
    i64 width = (i64)(heads + 2 * kv_heads) * HEAD_DIM, d_width = (i64)heads * HEAD_DIM;
    const bf16* q = qkv + document * width + head * HEAD_DIM;
    const bf16* k = qkv + document * width + (heads + kv_head) * HEAD_DIM;
    const bf16* v = k + (i64)kv_heads * HEAD_DIM;
    const bf16* d = d_o + document * d_width + head * HEAD_DIM;
    bool aligned = HEAD_DIM % 8 == 0 && is_aligned(qkv) && is_aligned(d_o);

    int last = min(first + BLOCK, length) - 1, begin = max(first - window + 1, 0) / BLOCK, end = last / BLOCK + 1;
    auto load_tile = [&](bf16* tile, const bf16* base, i64 stride, int start) {
        load_rows<BLOCK, THREADS>(tile, base + start * stride, stride, length - start, aligned);
    };
    load_tile(q_tile, q, width, first);
    load_tile(d_tile, d, d_width, first);
    load_tile(k_tiles, k, width, begin * BLOCK);
    load_tile(v_tiles, v, width, begin * BLOCK);
    copy_async_commit();

    int warp_row = 16 * warp_id();
    float row_lse[2], row_delta[2], sums[DIM_ATOMS][4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int position = first + warp_row + 8 * half + lane_id() / 4;
        i64 at = (i64)(document + min(position, length - 1)) * heads + head;
        row_lse[half] = lse[at] * LOG2_E, row_delta[half] = deltas[at];
    }
#pragma unroll
    for (int j = 0; j < DIM_ATOMS; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) sums[j][e] = 0.0f;

    for (int block = begin; block < end; block++) {
        copy_async_wait<0>();
        __syncthreads();
        int now = (block - begin) % 2 * TILE_ELEMENTS, next = TILE_ELEMENTS - now;
        if (block + 1 < end) {
            load_tile(k_tiles + next, k, width, (block + 1) * BLOCK);
            load_tile(v_tiles + next, v, width, (block + 1) * BLOCK);
        }
        copy_async_commit();
        float scores[8][4], d_scores[8][4];
        score_tile(scores, q_tile, warp_row, k_tiles + now);
        score_tile(d_scores, d_tile, warp_row, v_tiles + now);
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float p = fast_exp2(scores[j][e] * (scale * LOG2_E) - row_lse[e / 2]);
                d_scores[j][e] = p * (d_scores[j][e] - row_delta[e / 2]);
            }
        // Whether some query of the tile does not see the whole block, or does not exist.
        int first_key = block * BLOCK;
        if (first_key + BLOCK > first + 1 || first_key < last - window + 1 || first + BLOCK > length) {
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    int position = first + warp_row + e / 2 * 8 + lane_id() / 4, key = first_key + 8 * j + 2 * (lane_id() % 4) + e % 2;
                    bool seen = key <= position && key > position - window && position < length;
                    if (!seen) d_scores[j][e] = 0.0f;
                }
        }
        add_weighted(sums, d_scores, k_tiles + now);
    }
    copy_async_wait<0>();
    write_rows(dqkv + document * width + head * HEAD_DIM, width, first + warp_row, length, sums, scale);
}

// tiles: [blocks.x][4], of 64 keys. blocks.y: key heads. The heads of the group come in their order, each with its queries from the
// first on.
extern "C" __global__ void __launch_bounds__(THREADS) attention_backward_keys(const bf16* d_o, const bf16* qkv, const float* lse, const float* deltas,
    bf16* dqkv, const int* tiles, int heads, int kv_heads, float scale, int window) {
    DYNAMIC_SHARED(memory);
    bf16* k_tile = (bf16*)memory;
    bf16* v_tile = k_tile + TILE_ELEMENTS;
    bf16* q_tiles = v_tile + TILE_ELEMENTS;
    bf16* d_tiles = q_tiles + 2 * TILE_ELEMENTS;
    float* lse_tiles = (float*)(d_tiles + 2 * TILE_ELEMENTS);
    float* delta_tiles = lse_tiles + 2 * BLOCK;

    const int* tile = tiles + 4 * blockIdx.x;
    int document = tile[0], length = tile[1], first = tile[2], kv_head = blockIdx.y, group = heads / kv_heads;
    i64 width = (i64)(heads + 2 * kv_heads) * HEAD_DIM, d_width = (i64)heads * HEAD_DIM;
    const bf16* k = qkv + document * width + (heads + kv_head) * HEAD_DIM;
    const bf16* v = k + (i64)kv_heads * HEAD_DIM;
    bool aligned = HEAD_DIM % 8 == 0 && is_aligned(qkv) && is_aligned(d_o);

    // The last query that sees the tile's last key; a sum in 64 bits, since a window may be as large as an int.
    int last_key = min(first + BLOCK, length) - 1;
    int last = (int)min((i64)last_key + window - 1, (i64)length - 1);
    int begin = first / BLOCK, blocks = last / BLOCK + 1 - begin, steps = blocks * group;
    auto load_tile = [&](bf16* tile, const bf16* base, i64 stride, int start) {
        load_rows<BLOCK, THREADS>(tile, base + start * stride, stride, length - start, aligned);
    };
    auto load_step = [&](int step) {
        int head = kv_head * group + step / blocks, start = (begin + step % blocks) * BLOCK, place = step % 2;
        load_tile(q_tiles + place * TILE_ELEMENTS, qkv + document * width + head * HEAD_DIM, width, start);
        load_tile(d_tiles + place * TILE_ELEMENTS, d_o + document * d_width + head * HEAD_DIM, d_width, start);
        if (threadIdx.x < BLOCK) {
            i64 at = (i64)(document + min(start + (int)threadIdx.x, length - 1)) * heads + head;
            lse_tiles[place * BLOCK + threadIdx.x] = lse[at] * LOG2_E;
            delta_tiles[place * BLOCK + threadIdx.x] = deltas[at];
        }
    };
    load_tile(k_tile, k, width, first);
    load_tile(v_tile, v, width, first);
    load_step(0);
    copy_async_commit();

    int warp_row = 16 * warp_id();
    float dk[DIM_ATOMS][4], dv[DIM_ATOMS][4];
#pragma unroll
    for (int j = 0; j < DIM_ATOMS; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) dk[j][e] = dv[j][e] = 0.0f;

    for (int step = 0; step < steps; step++) {
        copy_async_wait<0>();
        __syncthreads();
        if (step + 1 < steps) load_step(step + 1);
        copy_async_commit();
        int place = step % 2, start = (begin + step % blocks) * BLOCK;
        const bf16 *q_tile = q_tiles + place * TILE_ELEMENTS, *d_tile = d_tiles + place * TILE_ELEMENTS;
        // Rows are keys, columns are queries.
        float scores[8][4], d_scores[8][4];
        score_tile(scores, k_tile, warp_row, q_tile);
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int column = 8 * j + 2 * (lane_id() % 4) + e % 2;
                scores[j][e] = fast_exp2(scores[j][e] * (scale * LOG2_E) - lse_tiles[place * BLOCK + column]);
            }
        // Whether some query does not see all keys of the tile, or does not exist. Keys that do not exist have rows of their own.
        if (first + BLOCK > start + 1 || first < start + BLOCK - window || start + BLOCK > length) {
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    int key = first + warp_row + e / 2 * 8 + lane_id() / 4, position = start + 8 * j + 2 * (lane_id() % 4) + e % 2;
                    bool seen = key <= position && key > position - window && position < length;
                    if (!seen) scores[j][e] = 0.0f;
                }
        }
        add_weighted(dv, scores, d_tile);
        score_tile(d_scores, v_tile, warp_row, d_tile);
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int column = 8 * j + 2 * (lane_id() % 4) + e % 2;
                d_scores[j][e] = scores[j][e] * (d_scores[j][e] - delta_tiles[place * BLOCK + column]);
            }
        add_weighted(dk, d_scores, q_tile);
    }
    copy_async_wait<0>();
    bf16* to = dqkv + document * width + (heads + kv_head) * HEAD_DIM;
    write_rows(to, width, first + warp_row, length, dk, scale);
    write_rows(to + (i64)kv_heads * HEAD_DIM, width, first + warp_row, length, dv, 1.0f);
}
