// AdamW over all parameters in one launch. Compiled without contraction, so its bits are those of the CPU. See adamw.rs.
#include "prelude.cuh"

struct Parameter {
    E* weight;
    // The low halves of the masters of bf16 weights; null for f32.
    short* rest;
    const float* gradient;
    // The moments, of type float or bf16.
    void* m;
    void* v;
    i64 length;
    // 1 if the weight decays, else 0.
    i64 decays;
    // 1 if the moments are bf16, else 0.
    i64 bf16_moments;
};

__device__ __forceinline__ void split(float master, bf16& weight, short& rest) {
    u32 bits = __float_as_uint(master);
    weight = bf16{(u16)((bits + 0x8000) >> 16)};
    rest = (short)(u16)bits;
}
__device__ __forceinline__ void split(float master, float& weight, short&) { weight = master; }

__device__ __forceinline__ u32 mix(u32 x) {
    x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
    x = (x ^ (x >> 13)) * 0xC2B2AE35u;
    return x ^ (x >> 16);
}
// A moment as it is kept: a bf16 is one of the two neighbours, chosen by the low half of `dither`.
__device__ __forceinline__ void keep(float value, u32, float& kept) { kept = value; }
__device__ __forceinline__ void keep(float value, u32 dither, bf16& kept) {
    kept = bf16{(u16)((__float_as_uint(value) + (dither & 0xFFFF)) >> 16)};
}

struct Factors {
    float scale, keep, beta1, beta2, rest1, rest2, step_size, root_correction2, eps;
    u32 salt;
};

// N elements from `i` on, whose moments are of type M.
template <int N, class M> __device__ __forceinline__ void update(const Parameter& p, i64 i, const Factors& f) {
    Pack<E, N> weight = load<E, N>(p.weight + i);
    Pack<short, N> rest = {};
    if (p.rest) rest = load<short, N>(p.rest + i);
    Pack<float, N> gradient = load<float, N>(p.gradient + i);
    Pack<M, N> m = load<M, N>((M*)p.m + i), v = load<M, N>((M*)p.v + i);
#pragma unroll
    for (int j = 0; j < N; j++) {
        float g = gradient.at[j] * f.scale;
        float new_m = f.beta1 * to_float(m.at[j]) + f.rest1 * g;
        float new_v = f.beta2 * to_float(v.at[j]) + f.rest2 * g * g;
        u32 v_bits = __float_as_uint(new_v), dither = mix(__float_as_uint(new_m) ^ (v_bits << 16 | v_bits >> 16) ^ f.salt);
        keep(new_m, dither, m.at[j]);
        keep(new_v, dither >> 16, v.at[j]);
        float master = join(weight.at[j], rest.at[j]) * f.keep - f.step_size * new_m / (sqrtf(new_v) / f.root_correction2 + f.eps);
        split(master, weight.at[j], rest.at[j]);
    }
    store<E, N>(p.weight + i, weight);
    if (p.rest) store<short, N>(p.rest + i, rest);
    store<M, N>((M*)p.m + i, m);
    store<M, N>((M*)p.v + i, v);
}

// A piece from `first` to `end` of one parameter.
template <class M> __device__ void update_piece(const Parameter& p, i64 first, i64 end, const Factors& f) {
    bool aligned = is_aligned(p.weight) && is_aligned(p.rest) && is_aligned(p.gradient) && is_aligned(p.m) && is_aligned(p.v);
    i64 wide = aligned ? end - (end - first) % 4 : first;
    for (i64 i = first + threadIdx.x * 4; i < wide; i += blockDim.x * 4) update<4, M>(p, i, f);
    for (i64 i = wide + threadIdx.x; i < end; i += blockDim.x) update<1, M>(p, i, f);
}

// A block is a piece: (parameter, first element). Nothing is done if `total`, the sum of the gradients' squares, is not finite.
extern "C" __global__ void adamw(const Parameter* parameters, const i64* pieces, int piece_length, const double* total, const float* gradient_scale,
    float decay, float beta1, float beta2, float rest1, float rest2, float step_size, float root_correction2, float eps, int salt) {
    if (total && !(*total <= 1.7976931348623157e308)) return;
    Parameter p = parameters[pieces[2 * (i64)blockIdx.x]];
    i64 first = pieces[2 * (i64)blockIdx.x + 1], end = min(p.length, first + piece_length);
    Factors f = {gradient_scale ? *gradient_scale : 1.0f, p.decays ? decay : 1.0f, beta1, beta2, rest1, rest2, step_size, root_correction2, eps, (u32)salt};
    if (p.bf16_moments)
        update_piece<bf16>(p, first, end, f);
    else
        update_piece<float>(p, first, end, f);
}
