// What the norm of a row is made of, for rms_norm.cu and for products that normalise their rows themselves (product_few.cu): the same
// bits, if the same elements meet in the same order.
#pragma once
#include "prelude.cuh"

template <int N> __device__ __forceinline__ void add_squares(float& squares, const Pack<E, N>& pack) {
#pragma unroll
    for (int i = 0; i < N; i++) squares += to_float(pack.at[i]) * to_float(pack.at[i]);
}

// What a row is multiplied by, from the sum of its squares.
__device__ __forceinline__ float inverse_rms(float squares, float eps, int hidden) { return 1.0f / sqrtf(squares / (float)hidden + eps); }

template <int N> __device__ __forceinline__ void normalise(Pack<E, N>& pack, const Pack<E, N>& weight, float scale) {
#pragma unroll
    for (int i = 0; i < N; i++) pack.at[i] = from_float<E>(to_float(weight.at[i]) * rounded<E>(to_float(pack.at[i]) * scale));
}
