// Decoding of few texts in a captured step, bf16: as decode_spans of attention_paged.cu, and what is before it. A block turns the queries of
// its heads and the new key by their position's angles, as rope.cu does it, writes the key and its value to the cache, and attends.
// Earlier keys and values come before the kernel in front has ended, as many blocks of 64 as there is room for: they were written by
// earlier steps. See attention_step.rs.
// Macros: HEAD_DIM.
#include "attention_decode.cuh"

// Blocks of keys and of values in shared memory.
constexpr int RING = DIM <= 64 ? 8 : DIM <= 128 ? 5 : 3;
// Neighbours that a thread turns.
constexpr int N = HEAD_DIM % 16 == 0 ? 8 : 1, HALF = HEAD_DIM / 2, PACKS = HALF / N;

// Turns `low` and the element half a head further; nothing is contracted, as in rope.cu.
__device__ __forceinline__ void turn(const bf16* low, const float* cosines, const float* sines, Pack<bf16, N>& a, Pack<bf16, N>& b) {
    a = load<bf16, N>(low), b = load<bf16, N>(low + HALF);
#pragma unroll
    for (int j = 0; j < N; j++) {
        float x = to_float(a.at[j]), y = to_float(b.at[j]), c = cosines[j], s = sines[j];
        a.at[j] = from_float<bf16>(__fadd_rn(__fmul_rn(x, c), -__fmul_rn(y, s)));
        b.at[j] = from_float<bf16>(__fadd_rn(__fmul_rn(y, c), __fmul_rn(x, s)));
    }
}

// Rows of qkv are as the product gave them, one a sequence; slots as in `append` of rope.cu; the others as in decode_spans. The new key is the
// last of a sequence's.
extern "C" __global__ void __launch_bounds__(THREADS) decode_step(const bf16* qkv, const float* cosines, const float* sines, const int* slots, bf16* k_cache,
    bf16* v_cache, const int* block_table, int table_width, const int* lengths, float* parts, float* maxima, float* part_sums, int heads,
    int kv_heads, float scale, int window, bf16* o, float* lse) {
    DYNAMIC_SHARED(memory);
    bf16* q_tile = (bf16*)memory;
    bf16* k_tiles = q_tile + 16 * ROW;
    bf16* v_tiles = k_tiles + RING * TILE_ELEMENTS;
    // The new key and its value.
    bf16* fresh = v_tiles + RING * TILE_ELEMENTS;
    float* score_tiles = (float*)(fresh + 2 * ROW);

    int span = blockIdx.x, spans = gridDim.x, group = heads / kv_heads, groups = (group + 15) / 16;
    int kv_head = blockIdx.y / groups, first_head = kv_head * group + blockIdx.y % groups * 16;
    int head_count = min((kv_head + 1) * group - first_head, 16);
    int sequence = blockIdx.z, length = lengths[sequence], newest = (length - 1) / BLOCK;
    int begin = max(max(length - window, 0) / BLOCK, span * (SPAN / BLOCK)), end = min((length + BLOCK - 1) / BLOCK, (span + 1) * (SPAN / BLOCK));
    if (begin >= end) {
        wait_for_earlier();
        if (o) write_nothing(o, lse, (i64)sequence * heads + first_head, head_count);
        return;
    }
    i64 width = (i64)(heads + 2 * kv_heads) * HEAD_DIM, key_width = (i64)kv_heads * HEAD_DIM;
    block_table += (i64)sequence * table_width;
    bool aligned = HEAD_DIM % 8 == 0 && is_aligned(k_cache) && is_aligned(v_cache);
    scale *= LOG2_E;

    // Without the new key, which is not in the cache.
    auto load_block = [&](int block) {
        if (block < end) {
            int place = (block - begin) % RING * TILE_ELEMENTS, count = length - 1 - block * BLOCK;
            i64 start = (i64)block_table[block] * BLOCK * key_width + kv_head * HEAD_DIM;
            load_rows<BLOCK, THREADS>(k_tiles + place, k_cache + start, key_width, count, aligned);
            load_rows<BLOCK, THREADS>(v_tiles + place, v_cache + start, key_width, count, aligned);
        }
        copy_async_commit();
    };
#pragma unroll 1
    for (int i = 0; i < RING; i++) load_block(begin + i);
    for (int i = threadIdx.x; i < 16 * ROW; i += THREADS) q_tile[i] = from_float<bf16>(0.0f);
    for (int i = threadIdx.x; i < 2 * ROW; i += THREADS) fresh[i] = from_float<bf16>(0.0f);
    int slot = slots[sequence];
    __syncthreads();

    wait_for_earlier();
    qkv += sequence * width, cosines += (i64)sequence * HALF, sines += (i64)sequence * HALF;
    bool has_newest = begin <= newest && newest < end, keeps = has_newest && slot >= 0 && blockIdx.y % groups == 0;
    i64 kept = (i64)slot * key_width + kv_head * HEAD_DIM;
    const bf16* queries = qkv + (i64)first_head * HEAD_DIM;
    const bf16* key = qkv + (i64)(heads + kv_head) * HEAD_DIM;
    const bf16* value = key + key_width;
    int turned = (head_count + (has_newest ? 1 : 0)) * PACKS, items = turned + (has_newest ? 2 * PACKS : 0);
    for (int item = threadIdx.x; item < items; item += THREADS) {
        if (item >= turned) {
            int i = (item - turned) * N;
            Pack<bf16, N> pack = load<bf16, N>(value + i);
            store<bf16, N>(fresh + ROW + i, pack);
            if (keeps) store<bf16, N>(v_cache + kept + i, pack);
            continue;
        }
        int head = item / PACKS, i = item % PACKS * N;
        bool is_key = head == head_count;
        Pack<bf16, N> a, b;
        turn((is_key ? key : queries + head * HEAD_DIM) + i, cosines + i, sines + i, a, b);
        bf16* to = (is_key ? fresh : q_tile + head * ROW) + i;
        store<bf16, N>(to, a), store<bf16, N>(to + HALF, b);
        if (is_key && keeps) store<bf16, N>(k_cache + kept + i, a), store<bf16, N>(k_cache + kept + i + HALF, b);
    }

    auto place = [&](int block) { return (block - begin) % RING * TILE_ELEMENTS; };
    auto scores = [&](int block) { return score_tiles + (block - begin) % 2 * 16 * SCORE_ROW; };
    // After a wait for the block's copies: lets all threads see them, and what was written before.
    auto meet = [&](int block) {
        __syncthreads();
        if (block != newest) return;
        bf16* k_row = k_tiles + place(block) + (length - 1) % BLOCK * ROW;
        bf16* v_row = v_tiles + place(block) + (length - 1) % BLOCK * ROW;
        for (int i = threadIdx.x; i < DIM; i += THREADS) k_row[i] = fresh[i], v_row[i] = fresh[ROW + i];
        __syncthreads();
    };
    Sums sums;
    sums.clear();
    copy_async_wait<RING - 1>();
    meet(begin);
    score_keys(q_tile, k_tiles + place(begin), scores(begin));
    // The scores of a block are computed while those of the one before it are used.
    for (int block = begin; block < end; block++) {
        bool has_next = block + 1 < end;
        copy_async_wait<RING - 2>();
        meet(has_next ? block + 1 : -1);
        sums.add_block(scores(block), v_tiles + place(block), block * BLOCK, length, window, scale);
        if (has_next) score_keys(q_tile, k_tiles + place(block + 1), scores(block + 1));
        if (block + RING < end) __syncthreads();
        load_block(block + RING);
    }
    copy_async_wait<0>();
    sums.write(parts, maxima, part_sums, o, lse, (i64)sequence * heads + first_head, head_count, spans, span);
}
