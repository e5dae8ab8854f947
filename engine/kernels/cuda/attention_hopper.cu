// Causal attention in bf16 over packed documents, forward, by Hopper's wgmma: as attention.cu, for head widths of 64 and 128. While
// the tensor cores sum the values of one block of keys, the probabilities of the next are computed.
// The bits are those of attention.cu. See attention.rs. Source: Shah et al., arXiv 2407.08608, section 3.2.
// Macros: HEAD_DIM, PAGED as in attention.cu.
#include "attention_core.cuh"
#include "hopper.cuh"

constexpr int THREADS = 256, QUERIES = 128;
// Blocks of keys and values in shared memory: two on their way, and two that products in flight read.
constexpr int STAGES = 4;
constexpr int DIM_BLOCKS = DIM / 64;
constexpr int STAGE_ELEMENTS = DIM_BLOCKS * BLOCK_ELEMENTS;

// Copies 64 rows of DIM elements to lines: block d / 64 of lines holds columns d; rows from `count` on become zero.
__device__ __forceinline__ void load_lines(bf16* tile, const bf16* base, i64 stride, int count) {
    int line = threadIdx.x / 8, chunk = threadIdx.x % 8;
    const bf16* from = base + line * stride + chunk * 8;
    bf16* to = tile + line * LINE + (chunk ^ (line & 7)) * 8;
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int block = 0; block < DIM_BLOCKS; block++) {
            // What does not exist is not read, wherever it would be.
            copy_async16(to + block * BLOCK_ELEMENTS + half * 32 * LINE, from + half * 32 * stride + block * 64, line + 32 * half < count);
        }
}

extern "C" __global__ void __launch_bounds__(THREADS, HEAD_DIM == 64 ? 2 : 1) attention(const bf16* qkv, bf16* o, float* lse, const int* tiles, int heads, int kv_heads,
    float scale, int window, const bf16* k_cache, const bf16* v_cache, const int* block_table, int table_width) {
    wait_for_earlier();
    DYNAMIC_SHARED(memory);
    bf16* q_tiles = (bf16*)memory;
    bf16* k_tiles = q_tiles + 2 * STAGE_ELEMENTS;
    bf16* v_tiles = k_tiles + STAGES * STAGE_ELEMENTS;

    const int* tile = tiles + 4 * blockIdx.x;
    int document = tile[0], length = tile[1], first = tile[2], head = blockIdx.y, kv_head = head / (heads / kv_heads);
    i64 width = (i64)(heads + 2 * kv_heads) * HEAD_DIM;
    const bf16* q = qkv + document * width + head * HEAD_DIM;
#if PAGED
    i64 key_width = (i64)kv_heads * HEAD_DIM;
    const bf16* k = k_cache + kv_head * HEAD_DIM;
    const bf16* v = v_cache + kv_head * HEAD_DIM;
    block_table += (i64)tile[3] * table_width;
#else
    i64 key_width = width;
    const bf16* k = qkv + document * width + (heads + kv_head) * HEAD_DIM;
    const bf16* v = qkv + document * width + (heads + kv_heads + kv_head) * HEAD_DIM;
#endif
    scale *= LOG2_E;

    int last = min(first + QUERIES, length) - 1;
    int begin = max(first - window + 1, 0) / BLOCK, end = last / BLOCK + 1;
    auto load_block = [&](int block) {
        if (block < end) {
#if PAGED
            i64 start = (i64)block_table[block] * BLOCK * key_width;
#else
            i64 start = (i64)block * BLOCK * key_width;
#endif
            int place = (block - begin) % STAGES * STAGE_ELEMENTS;
            load_lines(k_tiles + place, k + start, key_width, length - block * BLOCK);
            load_lines(v_tiles + place, v + start, key_width, length - block * BLOCK);
        }
        copy_async_commit();
    };
    load_lines(q_tiles, q + first * width, width, length - first);
    load_lines(q_tiles + STAGE_ELEMENTS, q + (first + 64) * width, width, length - first - 64);
    load_block(begin);
    load_block(begin + 1);
    load_block(begin + 2);
    copy_async_wait<2>();
    fence_async_proxy();
    __syncthreads();

    int group = threadIdx.x / 128, warp_row = warp_id() % 4 * 16;
    u32 queries[DIM_STEPS][4];
#pragma unroll
    for (int step = 0; step < DIM_STEPS; step++) {
        int matrix = lane_id() / 8, row = warp_row + (matrix & 1) * 8 + lane_id() % 8, chunk = step % 4 * 2 + (matrix >> 1);
        ldmatrix4(queries[step], q_tiles + group * STAGE_ELEMENTS + step / 4 * BLOCK_ELEMENTS + row * LINE + (chunk ^ (row & 7)) * 8);
    }

    float sums[DIM_ATOMS][4], maximum[2] = {-INFINITE, -INFINITE}, sum[2] = {0.0f, 0.0f};
    // Sums of the spans before, if there are any; see attention.cu.
    float earlier_memory[DIM_ATOMS * 4];
    float* earlier = hidden(earlier_memory);
    float earlier_maximum[2], earlier_sum[2];
    bool has_earlier = false;
#pragma unroll
    for (int j = 0; j < DIM_ATOMS; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) sums[j][e] = 0.0f;
    // Ends a span with these maxima and this thread's share of its sums.
    auto close_span = [&](float (&top)[2], float (&total)[2]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            total[half] = row_sum(total[half]);
            if (!has_earlier) continue;
            float f, g;
            top[half] = merge_factors(earlier_maximum[half], top[half], f, g);
            total[half] = merge(earlier_sum[half], total[half], f, g);
#pragma unroll
            for (int j = 0; j < DIM_ATOMS; j++)
#pragma unroll
                for (int e = 2 * half; e < 2 * half + 2; e++) sums[j][e] = merge(earlier[j * 4 + e], sums[j][e], f, g);
        }
    };

    float scores[8][4], factor[2];
    u32 weights[BLOCK / 16][4];
    auto start_scores = [&](int block) {
        const bf16* k_tile = k_tiles + (block - begin) % STAGES * STAGE_ELEMENTS;
        u64 keys = describe<false>(k_tile, 0, 0);
        wgmma_fence();
        wgmma_registers_rows<true>(scores, queries[0], keys);
#pragma unroll
        for (int step = 1; step < DIM_STEPS; step++)
            wgmma_registers_rows<false>(scores, queries[step], further(keys, step / 4 * BLOCK_ELEMENTS + step % 4 * 16));
        wgmma_commit();
    };
    auto start_sums = [&](int block) {
        const bf16* v_tile = v_tiles + (block - begin) % STAGES * STAGE_ELEMENTS;
        u64 values = describe<true>(v_tile, 0, 0);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < BLOCK / 16; step++) wgmma_registers<DIM, 1>(sums, weights[step], further(values, 16 * step * LINE), 1);
        wgmma_commit();
    };
    auto softmax = [&](int block) {
        int first_key = block * BLOCK, from[2], to[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int position = first + group * 64 + warp_row + 8 * half + lane_id() / 4;
            from[half] = position - window + 1 - first_key;
            to[half] = min(position + 1, length) - first_key;
        }
        softmax_block(scores, from, to, first_key + BLOCK > first + 1 || first_key < last - window + 1, scale, maximum, sum, factor);
    };
    // Only when no product is in flight: these are registers that products read.
    auto round_weights = [&] {
#pragma unroll
        for (int step = 0; step < BLOCK / 16; step++) round_to_operand(weights[step], scores, step);
    };

    start_scores(begin);
    wgmma_wait<0>();
    softmax(begin);
    round_weights();
    for (int block = begin; block + 1 < end; block++) {
        copy_async_wait<1>();
        fence_async_proxy();
        // After this all see the next block, and no product reads the block before this one any more.
        __syncthreads();
        load_block(block + 3);
        start_scores(block + 1);
        start_sums(block);
        wgmma_wait<1>();
        bool is_new_span = (block + 1) % (SPAN / BLOCK) == 0;
        float top[2] = {maximum[0], maximum[1]}, total[2] = {sum[0], sum[1]};
        if (is_new_span) maximum[0] = maximum[1] = -INFINITE, sum[0] = sum[1] = 0.0f;
        softmax(block + 1);
        wgmma_wait<0>();
        if (is_new_span) {
            close_span(top, total);
#pragma unroll
            for (int half = 0; half < 2; half++) earlier_maximum[half] = top[half], earlier_sum[half] = total[half];
#pragma unroll
            for (int j = 0; j < DIM_ATOMS; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) earlier[j * 4 + e] = sums[j][e], sums[j][e] = 0.0f;
            has_earlier = true;
        }
        // Maxima seldom change, and a factor of 1 changes no bit.
        if (__ballot_sync(~0u, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
            for (int j = 0; j < DIM_ATOMS; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) sums[j][e] = __fmul_rn(sums[j][e], factor[e / 2]);
        }
        round_weights();
    }
    start_sums(end - 1);
    wgmma_wait<0>();
    close_span(maximum, sum);
    copy_async_wait<0>();

#pragma unroll
    for (int half = 0; half < 2; half++) {
        int position = first + group * 64 + warp_row + 8 * half + lane_id() / 4;
        if (position >= length) continue;
        i64 row = document + position;
        float by = 1.0f / sum[half];
        if (lane_id() % 4 == 0) lse[row * heads + head] = (maximum[half] + log2f(sum[half])) * LN_2;
        bf16* to = o + (row * heads + head) * HEAD_DIM;
#pragma unroll
        for (int j = 0; j < DIM_ATOMS; j++) *(u32*)(to + 8 * j + 2 * (lane_id() % 4)) = pack_bf16(sums[j][2 * half] * by, sums[j][2 * half + 1] * by);
    }
}
