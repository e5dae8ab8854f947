// AdamW over all parameters in one launch. Compiled without contraction, so its bits are those of the CPU. See adamw.rs.
#include "prelude.cuh"

struct Parameter {
    E* weight;
    // The low halves of the masters of bf16 weights; null for f32.
    short* rest;
    const float* gradient;
    float* m;
    float* v;
    i64 length;
    // 1 if the weight decays, else 0.
    i64 decays;
    i64 unused;
};

__device__ __forceinline__ float join(bf16 weight, short rest) { return __uint_as_float(((u32)weight.bits << 16) + (u32)(int)rest); }
__device__ __forceinline__ float join(float weight, short) { return weight; }
__device__ __forceinline__ void split(float master, bf16& weight, short& rest) {
    u32 bits = __float_as_uint(master);
    weight = bf16{(u16)((bits + 0x8000) >> 16)};
    rest = (short)(u16)bits;
}
__device__ __forceinline__ void split(float master, float& weight, short&) { weight = master; }

struct Factors {
    float scale, keep, beta1, beta2, rest1, rest2, step_size, root_correction2, eps;
};

// N elements from `i` on.
template <int N> __device__ __forceinline__ void update(const Parameter& p, i64 i, const Factors& f) {
    Pack<E, N> weight = load<E, N>(p.weight + i);
    Pack<short, N> rest = {};
    if (p.rest) rest = load<short, N>(p.rest + i);
    Pack<float, N> gradient = load<float, N>(p.gradient + i), m = load<float, N>(p.m + i), v = load<float, N>(p.v + i);
#pragma unroll
    for (int j = 0; j < N; j++) {
        float g = gradient.at[j] * f.scale;
        m.at[j] = f.beta1 * m.at[j] + f.rest1 * g;
        v.at[j] = f.beta2 * v.at[j] + f.rest2 * g * g;
        float master = join(weight.at[j], rest.at[j]) * f.keep - f.step_size * m.at[j] / (sqrtf(v.at[j]) / f.root_correction2 + f.eps);
        split(master, weight.at[j], rest.at[j]);
    }
    store<E, N>(p.weight + i, weight);
    if (p.rest) store<short, N>(p.rest + i, rest);
    store<float, N>(p.m + i, m);
    store<float, N>(p.v + i, v);
}

// A block is a piece: (parameter, first element). Nothing is done if `total`, the sum of the gradients' squares, is not finite.
extern "C" __global__ void adamw(const Parameter* parameters, const i64* pieces, int piece_length, const double* total, const float* gradient_scale,
    float decay, float beta1, float beta2, float rest1, float rest2, float step_size, float root_correction2, float eps) {
    if (total && !(*total <= 1.7976931348623157e308)) return;
    Parameter p = parameters[pieces[2 * (i64)blockIdx.x]];
    i64 first = pieces[2 * (i64)blockIdx.x + 1], end = min(p.length, first + piece_length);
    Factors f = {gradient_scale ? *gradient_scale : 1.0f, p.decays ? decay : 1.0f, beta1, beta2, rest1, rest2, step_size, root_correction2, eps};
    bool aligned = is_aligned(p.weight) && is_aligned(p.rest) && is_aligned(p.gradient) && is_aligned(p.m) && is_aligned(p.v);
    i64 wide = aligned ? end - (end - first) % 4 : first;
    for (i64 i = first + threadIdx.x * 4; i < wide; i += blockDim.x * 4) update<4>(p, i, f);
    for (i64 i = wide + threadIdx.x; i < end; i += blockDim.x) update<1>(p, i, f);
}
