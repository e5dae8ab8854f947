// Causal attention in bf16 over packed documents, forward, on the tensor cores; scores never leave the registers.
// A block is a tile of queries of one head; its warps share keys and values. See attention.rs and paged.rs.
// Source: Dao, arXiv 2307.08691.
// Macros: HEAD_DIM. ATOMS: groups of 16 queries of a warp; each key and value that it reads serves all of them. PAGED: 1 if keys and values lie in blocks of 64 rows, [blocks][64][kv_heads][HEAD_DIM], that a table names.
#include "attention_core.cuh"

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int QUERIES = 16 * ATOMS * WARPS;

// tiles: [blocks.x][4]: the row of the document's position 0, the keys it has, the position of the first query, and which line of
// block_table is the document's. Rows before a document's first query are never read, so the first number may be negative.
extern "C" __global__ void __launch_bounds__(THREADS) attention(const bf16* qkv, bf16* o, float* lse, const int* tiles, int heads, int kv_heads,
    float scale, int window, const bf16* k_cache, const bf16* v_cache, const int* block_table, int table_width) {
    wait_for_earlier();
    DYNAMIC_SHARED(memory);
    bf16* q_tile = (bf16*)memory;
    bf16* k_tiles = q_tile + QUERIES * ROW;
    bf16* v_tile = k_tiles + 2 * TILE_ELEMENTS;

    const int* tile = tiles + 4 * blockIdx.x;
    int document = tile[0], length = tile[1], first = tile[2], head = blockIdx.y, kv_head = head / (heads / kv_heads);
    i64 width = (i64)(heads + 2 * kv_heads) * HEAD_DIM;
    const bf16* q = qkv + document * width + head * HEAD_DIM;
#if PAGED
    i64 key_width = (i64)kv_heads * HEAD_DIM;
    const bf16* k = k_cache + kv_head * HEAD_DIM;
    const bf16* v = v_cache + kv_head * HEAD_DIM;
    block_table += (i64)tile[3] * table_width;
    bool aligned = HEAD_DIM % 8 == 0 && is_aligned(qkv) && is_aligned(k_cache) && is_aligned(v_cache);
#else
    i64 key_width = width;
    const bf16* k = qkv + document * width + (heads + kv_head) * HEAD_DIM;
    const bf16* v = qkv + document * width + (heads + kv_heads + kv_head) * HEAD_DIM;
    bool aligned = HEAD_DIM % 8 == 0 && is_aligned(qkv);
#endif
    scale *= LOG2_E;

    int last = min(first + QUERIES, length) - 1;
    int begin = max(first - window + 1, 0) / BLOCK, end = last / BLOCK + 1;
    auto load_keys = [&](bf16* tile, const bf16* base, int block) {
#if PAGED
        const bf16* start = base + (i64)block_table[block] * BLOCK * key_width;
#else
        const bf16* start = base + (i64)block * BLOCK * key_width;
#endif
        load_rows<BLOCK, THREADS>(tile, start, key_width, length - block * BLOCK, aligned);
    };
    load_rows<QUERIES, THREADS>(q_tile, q + first * width, width, length - first, aligned);
    load_keys(k_tiles, k, begin);
    copy_async_commit();

    int warp_row = warp_id() * 16 * ATOMS;
    float sums[ATOMS][DIM_ATOMS][4], maximum[ATOMS][2], sum[ATOMS][2];
    // Sums of the spans before, if there are any.
    // They are touched once in SPAN keys, so they are kept out of the registers: the compiler must not know what `earlier` is.
    float earlier_memory[ATOMS * DIM_ATOMS * 4];
    float* earlier = hidden(earlier_memory);
    float earlier_maximum[ATOMS][2], earlier_sum[ATOMS][2];
    bool has_earlier = false;
    auto clear = [&] {
#pragma unroll
        for (int a = 0; a < ATOMS; a++) {
            maximum[a][0] = maximum[a][1] = -INFINITE;
            sum[a][0] = sum[a][1] = 0.0f;
#pragma unroll
            for (int j = 0; j < DIM_ATOMS; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) sums[a][j][e] = 0.0f;
        }
    };
    // Ends a span: what it summed joins what came before.
    auto close_span = [&] {
#pragma unroll
        for (int a = 0; a < ATOMS; a++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                sum[a][half] = row_sum(sum[a][half]);
                if (!has_earlier) continue;
                float f, g;
                maximum[a][half] = merge_factors(earlier_maximum[a][half], maximum[a][half], f, g);
                sum[a][half] = merge(earlier_sum[a][half], sum[a][half], f, g);
#pragma unroll
                for (int j = 0; j < DIM_ATOMS; j++)
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; e++) sums[a][j][e] = merge(earlier[(a * DIM_ATOMS + j) * 4 + e], sums[a][j][e], f, g);
            }
    };
    clear();

    for (int block = begin; block < end; block++) {
        copy_async_wait<0>();
        __syncthreads();
        bf16* k_tile = k_tiles + (block - begin) % 2 * TILE_ELEMENTS;
        load_keys(v_tile, v, block);
        copy_async_commit();
        if (block + 1 < end) load_keys(k_tiles + (block + 1 - begin) % 2 * TILE_ELEMENTS, k, block + 1);
        copy_async_commit();

        if (block != begin && block % (SPAN / BLOCK) == 0) {
            close_span();
#pragma unroll
            for (int a = 0; a < ATOMS; a++) {
#pragma unroll
                for (int half = 0; half < 2; half++) earlier_maximum[a][half] = maximum[a][half], earlier_sum[a][half] = sum[a][half];
#pragma unroll
                for (int j = 0; j < DIM_ATOMS; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++) earlier[(a * DIM_ATOMS + j) * 4 + e] = sums[a][j][e];
            }
            has_earlier = true;
            clear();
        }

        float scores[ATOMS][8][4];
#pragma unroll
        for (int a = 0; a < ATOMS; a++)
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) scores[a][j][e] = 0.0f;
#pragma unroll
        for (int step = 0; step < DIM_STEPS; step++) {
            u32 lefts[ATOMS][4];
#pragma unroll
            for (int a = 0; a < ATOMS; a++) left_operand(lefts[a], q_tile, warp_row + 16 * a, 16 * step);
#pragma unroll
            for (int j = 0; j < 8; j += 2) {
                u32 four[4];
                right_operands(four, k_tile, 8 * j, 16 * step);
                u32 one[2] = {four[0], four[1]}, other[2] = {four[2], four[3]};
#pragma unroll
                for (int a = 0; a < ATOMS; a++) {
                    mma_bf16(scores[a][j], lefts[a], one);
                    mma_bf16(scores[a][j + 1], lefts[a], other);
                }
            }
        }

        int first_key = block * BLOCK;
        // Whether some row of the tile does not see the whole block.
        bool masked = first_key + BLOCK > first + 1 || first_key < last - window + 1;
#pragma unroll
        for (int a = 0; a < ATOMS; a++) {
            int from[2], to[2];
            float factor[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int position = first + warp_row + 16 * a + 8 * half + lane_id() / 4;
                from[half] = position - window + 1 - first_key;
                to[half] = min(position + 1, length) - first_key;
            }
            softmax_block(scores[a], from, to, masked, scale, maximum[a], sum[a], factor);
#pragma unroll
            for (int j = 0; j < DIM_ATOMS; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) sums[a][j][e] = __fmul_rn(sums[a][j][e], factor[e / 2]);
        }

        copy_async_wait<1>();
        __syncthreads();
#pragma unroll
        for (int step = 0; step < BLOCK / 16; step++) {
            u32 lefts[ATOMS][4];
#pragma unroll
            for (int a = 0; a < ATOMS; a++) round_to_operand(lefts[a], scores[a], step);
#pragma unroll
            for (int j = 0; j < DIM_ATOMS; j += 2) {
                u32 four[4];
                right_operands_trans(four, v_tile, 16 * step, 8 * j);
                u32 one[2] = {four[0], four[1]}, other[2] = {four[2], four[3]};
#pragma unroll
                for (int a = 0; a < ATOMS; a++) {
                    mma_bf16(sums[a][j], lefts[a], one);
                    mma_bf16(sums[a][j + 1], lefts[a], other);
                }
            }
        }
    }
    close_span();
    copy_async_wait<0>();

#pragma unroll
    for (int a = 0; a < ATOMS; a++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int position = first + warp_row + 16 * a + 8 * half + lane_id() / 4;
            if (position >= length) continue;
            i64 row = document + position;
            float by = 1.0f / sum[a][half];
            if (lane_id() % 4 == 0) lse[row * heads + head] = (maximum[a][half] + log2f(sum[a][half])) * LN_2;
            bf16* to = o + (row * heads + head) * HEAD_DIM;
#pragma unroll
            for (int j = 0; j < DIM_ATOMS; j++) {
                int column = 8 * j + 2 * (lane_id() % 4);
                // HEAD_DIM is even, so pairs are inside or outside.
                if (column < HEAD_DIM) *(u32*)(to + column) = pack_bf16(sums[a][j][2 * half] * by, sums[a][j][2 * half + 1] * by);
            }
        }
}
