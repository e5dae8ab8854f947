// Rotary position embedding: tables of angles and the turn of queries and keys in place. See rope.rs.
#include "prelude.cuh"

// A thread is an angle: cos and sin of inv_freq[i] * positions[t], times scaling, rounded to E.
extern "C" __global__ void rope_tables(const float* inv_freq, float scaling, const int* positions, float* cosines, float* sines, i64 count, int half) {
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) {
        float angle = inv_freq[i % half] * (float)positions[i / half];
        cosines[i] = rounded<E>(cosf(angle) * scaling);
        sines[i] = rounded<E>(sinf(angle) * scaling);
    }
}

template <int N> __device__ void turn_row(E* row, const float* cosines, const float* sines, float direction, int heads, int half) {
    int packs = half / N;
    for (int item = threadIdx.x; item < heads * packs; item += blockDim.x) {
        int head = item / packs, i = item % packs * N;
        E* low = row + head * 2 * half + i;
        Pack<E, N> a = load<E, N>(low), b = load<E, N>(low + half);
#pragma unroll
        for (int j = 0; j < N; j++) {
            float x = to_float(a.at[j]), y = to_float(b.at[j]), c = cosines[i + j], s = sines[i + j] * direction;
            a.at[j] = from_float<E>(x * c - y * s);
            b.at[j] = from_float<E>(y * c + x * s);
        }
        store<E, N>(low, a);
        store<E, N>(low + half, b);
    }
}

// Turns the first `heads` heads of each row of `width` elements. A block is a row. direction: 1, or -1 for gradients.
extern "C" __global__ void rope(E* qkv, const float* cosines, const float* sines, float direction, int width, int heads, int half) {
    E* row = qkv + (i64)blockIdx.x * width;
    cosines += (i64)blockIdx.x * half, sines += (i64)blockIdx.x * half;
    if (half % WIDE == 0 && width % WIDE == 0) {
        turn_row<WIDE>(row, cosines, sines, direction, heads, half);
    } else {
        turn_row<1>(row, cosines, sines, direction, heads, half);
    }
}
