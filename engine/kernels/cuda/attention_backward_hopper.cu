// The derivative of attention in bf16 by Hopper's wgmma: as attention_backward.cu, for head widths of 64 and 128, with the deltas
// computed where the queries' gradients are. A step is 64 queries by 64 keys of one warpgroup. Warpgroups that share what is
// copied meet once a step; while one computes probabilities, the tensor cores multiply for the others.
// See attention_backward.rs. Source: Shah et al., arXiv 2407.08608, section 3.
// Macros: HEAD_DIM. QUERY_GROUPS: warpgroups of a block of queries, 64 queries each. QUERY_BLOCKS: such blocks of a multiprocessor.
// KEY_GROUPS: warpgroups with 64 keys each that share the queries of their steps; KEY_SPLITS: how many times over, each with a part
// of the steps.
#include "attention_core.cuh"
#include "hopper.cuh"

constexpr int DIM_BLOCKS = DIM / 64;
// Elements of 64 rows.
constexpr int TILE = DIM_BLOCKS * BLOCK_ELEMENTS;
// Pairs of tiles on their way: one that products in flight may read, one in use, one that is copied.
constexpr int STAGES = 3;
static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "rows are one or two lines");

// Copies 64 rows of DIM elements to lines: block d / 64 of lines holds columns d; rows from `count` on become zero
// and are not read, wherever that would be.
template <int THREADS> __device__ __forceinline__ void load_lines(bf16* tile, const bf16* base, i64 stride, int count, int thread) {
    constexpr int STEP = THREADS / 8;
    int line = thread / 8, chunk = thread % 8;
    const bf16* from = base + line * stride + chunk * 8;
    bf16* to = tile + line * LINE + (chunk ^ (line & 7)) * 8;
#pragma unroll
    for (int start = 0; start < 64; start += STEP) {
        bool exists = start + line < count;
#pragma unroll
        for (int block = 0; block < DIM_BLOCKS; block++)
            if (64 % STEP == 0 || start + line < 64) copy_async16(to + block * BLOCK_ELEMENTS + start * LINE, from + block * 64, exists);
        from += STEP * stride;
    }
}

// The same in all threads of a warp, which the compiler then knows.
__device__ __forceinline__ int uniform(int v) { return __shfl_sync(~0u, v, 0); }

// The left operand's registers: 16 rows from `row`, 16 columns from 16 * step.
__device__ __forceinline__ void left_lines(u32 (&out)[4], const bf16* tile, int row, int step) {
    int matrix = lane_id() / 8, line = row + (matrix & 1) * 8 + lane_id() % 8, chunk = step % 4 * 2 + (matrix >> 1);
    ldmatrix4(out, tile + step / 4 * BLOCK_ELEMENTS + line * LINE + (chunk ^ (line & 7)) * 8);
}

// sums = the 64 rows of `left` times those of `right`, over DIM.
__device__ __forceinline__ void multiply(float (&sums)[8][4], const bf16* left, const bf16* right) {
    u64 rows = describe<false>(left, 0, 0), columns = describe<false>(right, 0, 0);
    wgmma_rows<true>(sums, rows, columns);
#pragma unroll
    for (int step = 1; step < DIM_STEPS; step++) {
        int by = step / 4 * BLOCK_ELEMENTS + step % 4 * 16;
        wgmma_rows<false>(sums, further(rows, by), further(columns, by));
    }
}

// sums += weights (64 x 64) times the 64 rows of `tile`.
__device__ __forceinline__ void add_weighted(float (&sums)[DIM_ATOMS][4], const u32 (&weights)[4][4], const bf16* tile) {
    u64 rows = describe<true>(tile, 0, 0);
#pragma unroll
    for (int step = 0; step < 4; step++) wgmma_registers<DIM, 1>(sums, weights[step], further(rows, 16 * step * LINE), 1);
}

// Columns outside from..to of each of the thread's rows become zero.
__device__ __forceinline__ void hide(float (&weights)[8][4], const int (&from)[2], const int (&to)[2]) {
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int column = 8 * j + 2 * (lane_id() % 4) + e % 2;
            if (column < from[e / 2] || column >= to[e / 2]) weights[j][e] = 0.0f;
        }
}

__device__ __forceinline__ void write_rows(bf16* to, i64 stride, int first, int length, const float (&sums)[DIM_ATOMS][4], float by) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = first + 8 * half + lane_id() / 4;
        if (row >= length) continue;
#pragma unroll
        for (int j = 0; j < DIM_ATOMS; j++)
            *(u32*)(to + row * stride + 8 * j + 2 * (lane_id() % 4)) = pack_bf16(sums[j][2 * half] * by, sums[j][2 * half + 1] * by);
    }
}

constexpr int QUERY_THREADS = 128 * QUERY_GROUPS;
static_assert(QUERY_GROUPS <= 2 * (STAGES - 1), "the outputs lie where keys and values come later");

// tiles: [..][4] as in attention.cu, of 64 * QUERY_GROUPS queries; a block for each head of each.
extern "C" __global__ void __launch_bounds__(QUERY_THREADS, QUERY_BLOCKS) attention_backward_queries(const bf16* d_o, const bf16* qkv, const bf16* o,
    const float* lse, float* deltas, bf16* dqkv, const int* tiles, int heads, int kv_heads, float scale, int window) {
    wait_for_earlier();
    DYNAMIC_SHARED(memory);
    bf16* q_tiles = (bf16*)memory;
    bf16* d_tiles = q_tiles + QUERY_GROUPS * TILE;
    bf16* stages = d_tiles + QUERY_GROUPS * TILE;

    const int* tile = tiles + 4 * (blockIdx.x / heads);
    int document = tile[0], length = tile[1], top = tile[2], head = blockIdx.x % heads, kv_head = head / (heads / kv_heads);
    int group = uniform(threadIdx.x / 128), first = top + 64 * group;
    i64 width = (i64)(heads + 2 * kv_heads) * HEAD_DIM, d_width = (i64)heads * HEAD_DIM;
    const bf16* k = qkv + document * width + (heads + kv_head) * HEAD_DIM;
    const bf16* v = k + (i64)kv_heads * HEAD_DIM;

    // Keys that some query of the block sees.
    int begin = max(top - window + 1, 0) / BLOCK, end = (min(top + 64 * QUERY_GROUPS, length) - 1) / BLOCK + 1;
    auto load_block = [&](int block) {
        bf16* stage = stages + (block - begin) % STAGES * 2 * TILE;
        load_lines<QUERY_THREADS>(stage, k + (i64)block * BLOCK * width, width, length - block * BLOCK, threadIdx.x);
        load_lines<QUERY_THREADS>(stage + TILE, v + (i64)block * BLOCK * width, width, length - block * BLOCK, threadIdx.x);
    };
    bf16 *q_tile = q_tiles + group * TILE, *d_tile = d_tiles + group * TILE, *o_tile = stages + (2 + group) * TILE;
    i64 d_start = (document + first) * d_width + head * HEAD_DIM;
    // Where no query of the warpgroup exists its addresses are only computed.
    load_lines<128>(d_tile, d_o + d_start, d_width, length - first, threadIdx.x % 128);
    load_lines<128>(o_tile, o + d_start, d_width, length - first, threadIdx.x % 128);
    load_lines<128>(q_tile, qkv + (document + first) * width + head * HEAD_DIM, width, length - first, threadIdx.x % 128);
    load_block(begin);
    copy_async_commit();
    copy_async_wait<0>();
    fence_async_proxy();
    __syncthreads();

    int warp_row = warp_id() % 4 * 16;
    float row_lse[2], row_delta[2] = {0.0f, 0.0f};
#pragma unroll
    for (int step = 0; step < DIM_STEPS; step++) {
        u32 left[4], right[4];
        left_lines(left, d_tile, warp_row, step);
        left_lines(right, o_tile, warp_row, step);
#pragma unroll
        for (int part = 0; part < 4; part++) {
            float low = __uint_as_float(left[part] << 16) * __uint_as_float(right[part] << 16);
            row_delta[part % 2] += low + __uint_as_float(left[part] & 0xffff0000u) * __uint_as_float(right[part] & 0xffff0000u);
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int position = first + warp_row + 8 * half + lane_id() / 4;
        i64 at = (i64)(document + min(position, length - 1)) * heads + head;
        row_lse[half] = lse[at] * LOG2_E;
        row_delta[half] = row_sum(row_delta[half]);
        if (position < length && lane_id() % 4 == 0) deltas[at] = row_delta[half];
    }

    float sums[DIM_ATOMS][4];
#pragma unroll
    for (int j = 0; j < DIM_ATOMS; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) sums[j][e] = 0.0f;
    int last = min(first + 64, length) - 1;
    // A loop that might have no step would make the assembler let products run one by one.
    int block = begin;
    do {
        copy_async_wait<0>();
        fence_async_proxy();
        // After this all see the block, and no product reads the block before the last any more.
        __syncthreads();
        if (block + 1 < end) load_block(block + 1);
        copy_async_commit();
        const bf16 *k_tile = stages + (block - begin) % STAGES * 2 * TILE, *v_tile = k_tile + TILE;
        int first_key = block * BLOCK;
        if (first >= length || first_key >= first + 64 || first_key + BLOCK <= first - window + 1) {
            // The warpgroup's queries see nothing of it.
            continue;
        }
        float scores[8][4], d_scores[8][4];
        wgmma_fence();
        multiply(scores, q_tile, k_tile);
        wgmma_commit();
        multiply(d_scores, d_tile, v_tile);
        wgmma_commit();
        wgmma_wait<1>();
        wgmma_hold(scores);
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) scores[j][e] = fast_exp2(scores[j][e] * (scale * LOG2_E) - row_lse[e / 2]);
        // Whether some query of the warpgroup does not see the whole block, or does not exist.
        if (first_key + BLOCK > first + 1 || first_key < last - window + 1 || first + 64 > length) {
            int position = first + warp_row + lane_id() / 4 - first_key;
            int from[2] = {position - window + 1, position + 8 - window + 1}, to[2] = {position + 1, position + 9};
#pragma unroll
            for (int half = 0; half < 2; half++)
                if (first_key + position + 8 * half >= length) to[half] = 0;
            hide(scores, from, to);
        }
        wgmma_wait<0>();
        wgmma_hold(d_scores);
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) d_scores[j][e] = scores[j][e] * (d_scores[j][e] - row_delta[e / 2]);
        u32 weights[4][4];
#pragma unroll
        for (int step = 0; step < 4; step++) round_to_operand(weights[step], d_scores, step);
        wgmma_fence();
        add_weighted(sums, weights, k_tile);
        wgmma_commit();
        // Not later: the assembler gives registers that a product in flight reads to the next step.
        wgmma_wait<0>();
    } while (++block < end);
    wgmma_hold(sums);
    copy_async_wait<0>();
    write_rows(dqkv + document * width + head * HEAD_DIM, width, first + warp_row, length, sums, scale);
}

constexpr int TEAM = 128 * KEY_GROUPS, KEY_THREADS = TEAM * KEY_SPLITS;
static_assert((KEY_SPLITS - 1) * TEAM * DIM * 4 <= KEY_SPLITS * STAGES * 2 * TILE * 2, "sums of teams meet where queries were");

// tiles: [..][4], of 64 * KEY_GROUPS keys; a block for each key head of each. Its steps are the heads of the group in their order, each
// with its queries from the first on. Team t takes steps t, t + KEY_SPLITS and so on, and the teams' sums are added in order.
extern "C" __global__ void __launch_bounds__(KEY_THREADS, 1) attention_backward_keys(const bf16* d_o, const bf16* qkv, const float* lse,
    const float* deltas, bf16* dqkv, const int* tiles, int heads, int kv_heads, float scale, int window) {
    wait_for_earlier();
    DYNAMIC_SHARED(memory);
    int team = uniform(threadIdx.x / TEAM), thread = threadIdx.x % TEAM, group = uniform(thread / 128);
    bf16* k_tiles = (bf16*)memory;
    bf16* v_tiles = k_tiles + KEY_GROUPS * TILE;
    bf16* all_stages = v_tiles + KEY_GROUPS * TILE;
    bf16* stages = all_stages + team * STAGES * 2 * TILE;
    // For each stage lse and delta of its queries.
    float* numbers = (float*)(all_stages + KEY_SPLITS * STAGES * 2 * TILE) + team * STAGES * 128;

    const int* tile = tiles + 4 * (blockIdx.x / kv_heads);
    int document = tile[0], length = tile[1], top = tile[2], kv_head = blockIdx.x % kv_heads, in_group = heads / kv_heads;
    int first = top + 64 * group;
    i64 width = (i64)(heads + 2 * kv_heads) * HEAD_DIM, d_width = (i64)heads * HEAD_DIM;
    const bf16* k = qkv + document * width + (heads + kv_head) * HEAD_DIM;
    const bf16* v = k + (i64)kv_heads * HEAD_DIM;

    // The last query that sees the tile's last key; a sum in 64 bits, since a window may be as large as an int.
    int last_key = min(top + 64 * KEY_GROUPS, length) - 1;
    int last = (int)min((i64)last_key + window - 1, (i64)length - 1);
    int begin = top / BLOCK, blocks = last / BLOCK + 1 - begin, steps = blocks * in_group;
    // A team that has no step takes the first, of which it sees nothing: see below.
    bool idle = team >= steps;
    int count = idle ? 1 : (steps - team - 1) / KEY_SPLITS + 1, queries = idle ? 0 : length;
    // The step that is copied next: its head of the group and its block of queries.
    int next_head = idle ? 0 : team / blocks, next_block = idle ? 0 : team % blocks;
    auto load_step = [&](int place) {
        int head = kv_head * in_group + next_head, start = (begin + next_block) * BLOCK;
        bf16* stage = stages + place * 2 * TILE;
        i64 row = document + start;
        load_lines<TEAM>(stage, qkv + row * width + head * HEAD_DIM, width, length - start, thread);
        load_lines<TEAM>(stage + TILE, d_o + row * d_width + head * HEAD_DIM, d_width, length - start, thread);
        if (thread < 128) {
            i64 at = (document + min(start + thread % 64, length - 1)) * (i64)heads + head;
            copy_async4(numbers + place * 128 + thread, (thread < 64 ? lse : deltas) + at);
        }
    };
#pragma unroll
    for (int g = 0; g < KEY_GROUPS; g++) {
        i64 start = (top + 64 * g) * width;
        load_lines<KEY_THREADS>(k_tiles + g * TILE, k + start, width, length - top - 64 * g, threadIdx.x);
        load_lines<KEY_THREADS>(v_tiles + g * TILE, v + start, width, length - top - 64 * g, threadIdx.x);
    }
    load_step(0);
    copy_async_commit();
    copy_async_wait<0>();
    fence_async_proxy();
    __syncthreads();

    int warp_row = warp_id() % 4 * 16;
    const bf16 *k_tile = k_tiles + group * TILE, *v_tile = v_tiles + group * TILE;
    float dk[DIM_ATOMS][4], dv[DIM_ATOMS][4];
#pragma unroll
    for (int j = 0; j < DIM_ATOMS; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) dk[j][e] = dv[j][e] = 0.0f;

    // A loop that might have no step would make the assembler let products run one by one.
    int i = 0;
    do {
        int start = (begin + next_block) * BLOCK, place = i % STAGES;
        copy_async_wait<0>();
        fence_async_proxy();
        // After this the team sees the step's queries, and no product reads those of the step before the last any more.
        barrier(1 + team, TEAM);
        next_block += KEY_SPLITS;
        while (next_block >= blocks) next_block -= blocks, next_head++;
        if (i + 1 < count) load_step((i + 1) % STAGES);
        copy_async_commit();
        const bf16 *q_tile = stages + place * 2 * TILE, *d_tile = q_tile + TILE;
        const float *step_lse = numbers + place * 128, *step_deltas = step_lse + 64;
        if (KEY_GROUPS > 1 && (first >= length || start + BLOCK <= first || start - window >= first + 63)) {
            // They see nothing of the warpgroup's keys.
            continue;
        }
        // Rows are keys, columns are queries.
        float scores[8][4], d_scores[8][4];
        wgmma_fence();
        multiply(scores, k_tile, q_tile);
        wgmma_commit();
        multiply(d_scores, v_tile, d_tile);
        wgmma_commit();
        wgmma_wait<1>();
        wgmma_hold(scores);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            Pack<float, 2> own = load<float, 2>(step_lse + 8 * j + 2 * (lane_id() % 4));
#pragma unroll
            for (int e = 0; e < 4; e++) scores[j][e] = fast_exp2(scores[j][e] * (scale * LOG2_E) - own.at[e % 2] * LOG2_E);
        }
        // Whether some query does not see all keys of the warpgroup, or does not exist. Keys that do not exist have rows of their own.
        if (first + BLOCK > start + 1 || first < start + BLOCK - window || start + BLOCK > queries) {
            int key = first + warp_row + lane_id() / 4 - start, left = queries - start;
            int from[2] = {key, key + 8}, to[2] = {min(key + window, left), min(key + 8 + window, left)};
            hide(scores, from, to);
        }
        u32 weights[4][4], d_weights[4][4];
#pragma unroll
        for (int step = 0; step < 4; step++) round_to_operand(weights[step], scores, step);
        wgmma_fence();
        add_weighted(dv, weights, d_tile);
        wgmma_commit();
        wgmma_wait<1>();
        wgmma_hold(d_scores);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            Pack<float, 2> own = load<float, 2>(step_deltas + 8 * j + 2 * (lane_id() % 4));
#pragma unroll
            for (int e = 0; e < 4; e++) d_scores[j][e] = scores[j][e] * (d_scores[j][e] - own.at[e % 2]);
        }
#pragma unroll
        for (int step = 0; step < 4; step++) round_to_operand(d_weights[step], d_scores, step);
        wgmma_fence();
        add_weighted(dk, d_weights, q_tile);
        wgmma_commit();
        // Not later, as above.
        wgmma_wait<0>();
    } while (++i < count);
    wgmma_hold(dk);
    wgmma_hold(dv);
    copy_async_wait<0>();

    if (KEY_SPLITS > 1) {
        float* parts = (float*)all_stages;
        __syncthreads();
#pragma unroll
        for (int j = 0; j < DIM_ATOMS; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float* at = parts + ((team - 1) * 2 * DIM_ATOMS * 4 + j * 4 + e) * TEAM + thread;
                if (team > 0) at[0] = dk[j][e], at[DIM_ATOMS * 4 * TEAM] = dv[j][e];
            }
        __syncthreads();
        if (team > 0) return;
#pragma unroll
        for (int other = 0; other < KEY_SPLITS - 1; other++)
#pragma unroll
            for (int j = 0; j < DIM_ATOMS; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float* at = parts + (other * 2 * DIM_ATOMS * 4 + j * 4 + e) * TEAM + thread;
                    dk[j][e] += at[0], dv[j][e] += at[DIM_ATOMS * 4 * TEAM];
                }
    }
    bf16* to = dqkv + document * width + (heads + kv_head) * HEAD_DIM;
    write_rows(to, width, first + warp_row, length, dk, scale);
    write_rows(to + (i64)kv_heads * HEAD_DIM, width, first + warp_row, length, dv, 1.0f);
}
