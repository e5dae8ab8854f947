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

__device__ __forceinline__ float read_master(const Parameter& p, i64 i) {
#if ELEMENT_BF16
    return __uint_as_float(((u32)p.weight[i].bits << 16) + (u32)(int)p.rest[i]);
#else
    return p.weight[i];
#endif
}
__device__ __forceinline__ void write_master(const Parameter& p, i64 i, float master) {
#if ELEMENT_BF16
    u32 bits = __float_as_uint(master);
    p.weight[i] = bf16{(u16)((bits + 0x8000) >> 16)};
    p.rest[i] = (short)(u16)bits;
#else
    p.weight[i] = master;
#endif
}

// A block is a piece: (parameter, first element). Nothing is done if `total`, the sum of the gradients' squares, is not finite.
extern "C" __global__ void adamw(const Parameter* parameters, const i64* pieces, int piece_length, const double* total, const float* gradient_scale,
    float decay, float beta1, float beta2, float rest1, float rest2, float step_size, float root_correction2, float eps) {
    if (total && !(*total < 1e308 * 10.0)) return;
    Parameter p = parameters[pieces[2 * (i64)blockIdx.x]];
    i64 first = pieces[2 * (i64)blockIdx.x + 1], end = min(p.length, first + piece_length);
    float scale = gradient_scale ? *gradient_scale : 1.0f;
    float keep = p.decays ? decay : 1.0f;
    for (i64 i = first + threadIdx.x; i < end; i += blockDim.x) {
        float gradient = p.gradient[i] * scale;
        float m = beta1 * p.m[i] + rest1 * gradient;
        float v = beta2 * p.v[i] + rest2 * gradient * gradient;
        p.m[i] = m;
        p.v[i] = v;
        write_master(p, i, read_master(p, i) * keep - step_size * m / (sqrtf(v) / root_correction2 + eps));
    }
}
