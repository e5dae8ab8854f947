// Rotary position embedding: tables of angles, the turn of queries and keys in place, and the turn on their way to the cache of
// generation. See rope.rs and paged.rs.
#include "prelude.cuh"

// A thread is an angle: cos and sin of inv_freq[i] * positions[t], times scaling, rounded to E.
extern "C" __global__ void rope_tables(const float* inv_freq, float scaling, const int* positions, float* cosines, float* sines, i64 count, int half) {
    wait_for_earlier();
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) {
        float angle = inv_freq[i % half] * (float)positions[i / half];
        cosines[i] = rounded<E>(cosf(angle) * scaling);
        sines[i] = rounded<E>(sinf(angle) * scaling);
    }
}

template <int N> __device__ __forceinline__ void turn(Pack<E, N>& a, Pack<E, N>& b, const float* cosines, const float* sines, float direction) {
#pragma unroll
    for (int j = 0; j < N; j++) {
        float x = to_float(a.at[j]), y = to_float(b.at[j]), c = cosines[j], s = sines[j] * direction;
        a.at[j] = from_float<E>(x * c - y * s);
        b.at[j] = from_float<E>(y * c + x * s);
    }
}

template <int N> __device__ void turn_row(E* row, const float* cosines, const float* sines, float direction, int heads, int half) {
    int packs = half / N;
    for (int item = threadIdx.x; item < heads * packs; item += blockDim.x) {
        int head = item / packs, i = item % packs * N;
        E* low = row + head * 2 * half + i;
        Pack<E, N> a = load<E, N>(low), b = load<E, N>(low + half);
        turn(a, b, cosines + i, sines + i, direction);
        store<E, N>(low, a);
        store<E, N>(low + half, b);
    }
}

// Turns the first `heads` heads of each row of `width` elements. A block is a row. direction: 1, or -1 for gradients.
extern "C" __global__ void rope(E* qkv, const float* cosines, const float* sines, float direction, int width, int heads, int half) {
    wait_for_earlier();
    E* row = qkv + (i64)blockIdx.x * width;
    cosines += (i64)blockIdx.x * half, sines += (i64)blockIdx.x * half;
    if (half % WIDE == 0 && width % WIDE == 0) {
        turn_row<WIDE>(row, cosines, sines, direction, heads, half);
    } else {
        turn_row<1>(row, cosines, sines, direction, heads, half);
    }
}

template <int N> __device__ void append_row(const E* row, const float* cosines, const float* sines, E* turned, E* keys, E* values, int heads, int kv_heads, int half) {
    int packs = half / N, turned_heads = keys ? heads + kv_heads : heads;
    for (int item = threadIdx.x; item < turned_heads * packs; item += blockDim.x) {
        int head = item / packs, i = item % packs * N;
        const E* low = row + head * 2 * half + i;
        E* to = (head < heads ? turned + head * 2 * half : keys + (head - heads) * 2 * half) + i;
        Pack<E, N> a = load<E, N>(low), b = load<E, N>(low + half);
        turn(a, b, cosines + i, sines + i, 1.0f);
        store<E, N>(to, a);
        store<E, N>(to + half, b);
    }
    if (!values) return;
    const E* from = row + (heads + kv_heads) * 2 * half;
    for (int item = threadIdx.x; item < kv_heads * 2 * packs; item += blockDim.x) store<E, N>(values + item * N, load<E, N>(from + item * N));
}

// Turns queries and keys of each row of qkv: queries go to the same places of `turned`, keys, and values as they are, to place slots[row]
// (block * 64 + place in the block) of the caches; a negative one is no place. A block is a row.
extern "C" __global__ void append(const E* qkv, const float* cosines, const float* sines, const int* slots, E* turned, E* k_cache, E* v_cache, int heads,
    int kv_heads, int half) {
    wait_for_earlier();
    i64 start = (i64)blockIdx.x * (heads + 2 * kv_heads) * 2 * half, slot = slots[blockIdx.x], place = slot * kv_heads * 2 * half;
    cosines += (i64)blockIdx.x * half, sines += (i64)blockIdx.x * half;
    E* keys = slot < 0 ? nullptr : k_cache + place;
    E* values = slot < 0 ? nullptr : v_cache + place;
    if (half % WIDE == 0) {
        append_row<WIDE>(qkv + start, cosines, sines, turned + start, keys, values, heads, kv_heads, half);
    } else {
        append_row<1>(qkv + start, cosines, sines, turned + start, keys, values, heads, kv_heads, half);
    }
}
