// Decoding: one query a sequence against keys and values in blocks, bf16. A block is a span of SPAN keys of one sequence and one
// key head; its rows are the query heads that share it. A second kernel merges the spans. The arithmetic is that of attention.cu
// (attention_core.cuh), so a decoded token has the bits of the same token in training. See paged.rs.
// Macros: HEAD_DIM.
#include "attention_decode.cuh"

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
    int sequence = blockIdx.z, length = lengths[sequence];
    int begin = max(max(length - window, 0) / BLOCK, span * (SPAN / BLOCK)), end = min((length + BLOCK - 1) / BLOCK, (span + 1) * (SPAN / BLOCK));
    if (begin >= end) {
        if (!o) return;
        write_nothing(o, lse, (i64)sequence * heads + first_head, head_count);
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

    Sums sums;
    sums.clear();
    for (int block = begin; block < end; block++) {
        copy_async_wait<0>();
        __syncthreads();
        bf16* k_tile = k_tiles + (block - begin) % 2 * TILE_ELEMENTS;
        load_keys(v_tile, v_cache, block);
        copy_async_commit();
        if (block + 1 < end) load_keys(k_tiles + (block + 1 - begin) % 2 * TILE_ELEMENTS, k_cache, block + 1);
        copy_async_commit();

        score_keys(q_tile, k_tile, score_tile);
        copy_async_wait<1>();
        __syncthreads();

        sums.add_block(score_tile, v_tile, block * BLOCK, length, window, scale);
    }
    copy_async_wait<0>();

    sums.write(parts, maxima, part_sums, o, lse, (i64)sequence * heads + first_head, head_count, spans, span);
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
