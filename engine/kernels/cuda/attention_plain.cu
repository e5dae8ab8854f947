// Causal attention in f32, forward, backward and for decoding: one warp a query (a key, for keys' gradients), without tensor
// cores. Simple rather than fast: f32 is for checking. Keys come in groups of 32 from the document's start, so a query's bits
// depend on its position alone, cached or not. See attention.rs.
// Macros: HEAD_DIM. PAGED as in attention.cu.
#include "prelude.cuh"

constexpr int WARPS = 4;
// Elements of a row that one lane holds.
constexpr int SHARE = (HEAD_DIM + 31) / 32;

__device__ __forceinline__ float dot(const float* a, const float* b) {
    float sum = 0.0f;
    for (int c = 0; c < HEAD_DIM; c++) sum = __fmaf_rn(a[c], b[c], sum);
    return sum;
}
// sums += sum over the lanes, in their order, of weight * its row; a null row counts as zeros.
__device__ __forceinline__ void add_rows(float (&sums)[SHARE], float weight, const float* row) {
    u64 address = (u64)row;
    for (int lane = 0; lane < 32; lane++) {
        float w = __shfl_sync(~0u, weight, lane);
        const float* from = (const float*)__shfl_sync(~0u, address, lane);
        if (!from) continue;
#pragma unroll
        for (int s = 0; s < SHARE; s++) {
            int c = lane_id() + 32 * s;
            if (c < HEAD_DIM) sums[s] = __fmaf_rn(w, from[c], sums[s]);
        }
    }
}
__device__ __forceinline__ void write(float* to, const float (&sums)[SHARE], float by) {
#pragma unroll
    for (int s = 0; s < SHARE; s++) {
        int c = lane_id() + 32 * s;
        if (c < HEAD_DIM) to[c] = sums[s] * by;
    }
}

// spans: [rows][4]: the row of the document's position 0, its keys, the row's position, its line of block_table.
extern "C" __global__ void attention(const float* qkv, float* o, float* lse, const int* spans, int count, int heads, int kv_heads, float scale, int window,
    const float* k_cache, const float* v_cache, const int* block_table, int table_width) {
    wait_for_earlier();
    int item = blockIdx.x * WARPS + warp_id();
    if (item >= count) return;
    int row = item / heads, head = item % heads, kv_head = head / (heads / kv_heads);
    const int* span = spans + 4 * (i64)row;
    int document = span[0], position = span[2];
    i64 width = (i64)(heads + 2 * kv_heads) * HEAD_DIM;
    const float* q = qkv + (i64)row * width + head * HEAD_DIM;
    auto key_row = [&](int key, bool value) {
#if PAGED
        i64 place = (i64)block_table[(i64)span[3] * table_width + key / 64] * 64 + key % 64;
        return (value ? v_cache : k_cache) + (place * kv_heads + kv_head) * HEAD_DIM;
#else
        return qkv + (document + key) * width + (heads + kv_head + (value ? kv_heads : 0)) * HEAD_DIM;
#endif
    };
    float sums[SHARE] = {}, maximum = -INFINITE, total = 0.0f;
    int begin = max(position - window + 1, 0);
    for (int start = begin / 32 * 32; start <= position; start += 32) {
        int key = start + lane_id();
        bool seen = key >= begin && key <= position;
        float score = seen ? dot(q, key_row(key, false)) * scale : -INFINITE;
        float top = warp_max(score);
        top = maximum > top ? maximum : top;
        float factor = expf(maximum - top), p = seen ? expf(score - top) : 0.0f;
        total = total * factor + warp_sum(p);
#pragma unroll
        for (int s = 0; s < SHARE; s++) sums[s] *= factor;
        add_rows(sums, p, seen ? key_row(key, true) : nullptr);
        maximum = top;
    }
    write(o + ((i64)row * heads + head) * HEAD_DIM, sums, 1.0f / total);
    if (lane_id() == 0) lse[(i64)row * heads + head] = maximum + logf(total);
}

// A warp is a head of a row. deltas[row][head] = d_o . o is written for the keys' kernel.
extern "C" __global__ void attention_backward_queries(const float* d_o, const float* qkv, const float* o, const float* lse, float* deltas, float* dqkv,
    const int* spans, int count, int heads, int kv_heads, float scale, int window) {
    int item = blockIdx.x * WARPS + warp_id();
    if (item >= count) return;
    int row = item / heads, head = item % heads, kv_head = head / (heads / kv_heads);
    const int* span = spans + 4 * (i64)row;
    int document = span[0], position = span[2];
    i64 width = (i64)(heads + 2 * kv_heads) * HEAD_DIM, at = ((i64)row * heads + head) * HEAD_DIM;
    const float *q = qkv + (i64)row * width + head * HEAD_DIM, *d = d_o + at;
    float delta = dot(d, o + at), row_lse = lse[item];
    if (lane_id() == 0) deltas[item] = delta;
    float sums[SHARE] = {};
    int begin = max(position - window + 1, 0);
    for (int start = begin / 32 * 32; start <= position; start += 32) {
        int key = start + lane_id();
        bool seen = key >= begin && key <= position;
        const float* k = qkv + (document + key) * width + (heads + kv_head) * HEAD_DIM;
        float d_score = 0.0f;
        if (seen) d_score = expf(dot(q, k) * scale - row_lse) * (dot(d, k + (i64)kv_heads * HEAD_DIM) - delta);
        add_rows(sums, d_score, seen ? k : nullptr);
    }
    write(dqkv + (i64)row * width + head * HEAD_DIM, sums, scale);
}

// A warp is a key head of a row; the heads of the group come in their order, each with its queries from the key's own on.
extern "C" __global__ void attention_backward_keys(const float* d_o, const float* qkv, const float* lse, const float* deltas, float* dqkv, const int* spans,
    int count, int heads, int kv_heads, float scale, int window) {
    int item = blockIdx.x * WARPS + warp_id();
    if (item >= count) return;
    int row = item / kv_heads, kv_head = item % kv_heads, group = heads / kv_heads;
    const int* span = spans + 4 * (i64)row;
    int document = span[0], length = span[1], key = span[2];
    i64 width = (i64)(heads + 2 * kv_heads) * HEAD_DIM;
    const float *k = qkv + (i64)row * width + (heads + kv_head) * HEAD_DIM, *v = k + (i64)kv_heads * HEAD_DIM;
    int end = (int)min((i64)key + window, (i64)length);
    float dk[SHARE] = {}, dv[SHARE] = {};
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
        for (int start = key; start < end; start += 32) {
            int position = start + lane_id();
            bool seen = position < end;
            i64 place = (i64)(document + position) * heads + head;
            const float *q = qkv + (document + position) * width + head * HEAD_DIM, *d = d_o + place * HEAD_DIM;
            float p = 0.0f, d_score = 0.0f;
            if (seen) {
                p = expf(dot(q, k) * scale - lse[place]);
                d_score = p * (dot(d, v) - deltas[place]);
            }
            add_rows(dv, p, seen ? d : nullptr);
            add_rows(dk, d_score, seen ? q : nullptr);
        }
    }
    float* to = dqkv + (i64)row * width + (heads + kv_head) * HEAD_DIM;
    write(to, dk, scale);
    write(to + (i64)kv_heads * HEAD_DIM, dv, 1.0f);
}
