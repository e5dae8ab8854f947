// The loops of Muon around its products: momentum, scaling, turning, and the move of the weights. Compiled without contraction, so the
// bits of the momentum are those of the CPU. See muon.rs.
#include "prelude.cuh"

#define EACH(i, count) for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < (count); i += (i64)gridDim.x * blockDim.x)

__device__ __forceinline__ bool is_finite(double total) { return total <= 1.7976931348623157e308; }

__device__ __forceinline__ u32 mix(u32 x) {
    x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
    x = (x ^ (x >> 13)) * 0xC2B2AE35u;
    return x ^ (x >> 16);
}

// m = keep m + rest g, where g is the gradient times the clipping factor, and update = keep m + rest g. A momentum is a float, or a bf16 that is one
// of the two neighbours. Nothing is done if `total`, the sum of the gradients' squares, is not finite.
extern "C" __global__ void momentum(const float* gradient, void* m, int bf16_m, float* update, i64 count, const double* total, const float* scale,
    float keep, float rest, int salt) {
    if (!is_finite(*total)) return;
    EACH(i, count) {
        float part = rest * (gradient[i] * *scale);
        float new_m = keep * (bf16_m ? to_float(((bf16*)m)[i]) : ((float*)m)[i]) + part;
        if (bf16_m)
            ((bf16*)m)[i] = bf16{(u16)((__float_as_uint(new_m) + (mix(__float_as_uint(new_m) ^ (u32)salt) & 0xFFFF)) >> 16)};
        else
            ((float*)m)[i] = new_m;
        update[i] = keep * new_m + part;
    }
}

// parts[b] = the sum of the squares that block b meets, in f64.
extern "C" __global__ void squares_of(const float* values, i64 count, double* parts) {
    double sum = 0.0;
    EACH(i, count) sum += (double)values[i] * (double)values[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// x = values over their norm, [rows, columns], or turned to [columns, rows].
extern "C" __global__ void normalise(const float* values, const double* parts, int parts_count, double eps, float* x, int rows, int columns, int turned) {
    double sum = 0.0;
    for (int part = 0; part < parts_count; part++) sum += parts[part];
    float inverse = (float)(1.0 / (sqrt(sum) + eps));
    i64 count = (i64)rows * columns;
    EACH(i, count) {
        i64 from = turned ? i % rows * columns + i / rows : i;
        x[i] = values[from] * inverse;
    }
}

// square = a I + b g + c square, all [n, n].
extern "C" __global__ void combine(float* square, const float* g, int n, float a, float b, float c) {
    i64 count = (i64)n * n;
    EACH(i, count) {
        float value = b * g[i] + c * square[i];
        square[i] = i / n == i % n ? value + a : value;
    }
}

// to = scale * from.
extern "C" __global__ void scaled(const float* from, float scale, float* to, i64 count) {
    EACH(i, count) to[i] = scale * from[i];
}

// to [columns, rows] = from [rows, columns], turned.
extern "C" __global__ void turn(const float* from, float* to, int rows, int columns) {
    i64 count = (i64)rows * columns;
    EACH(i, count) to[i] = from[i % rows * columns + i / rows];
}

__device__ __forceinline__ void split(float master, bf16& weight, short& rest) {
    u32 bits = __float_as_uint(master);
    weight = bf16{(u16)((bits + 0x8000) >> 16)};
    rest = (short)(u16)bits;
}

// Masters times `keep` plus `delta`. `rest` has the low halves of the masters of bf16 weights. Nothing is done if `total` is not finite.
extern "C" __global__ void move(E* weight, short* rest, const float* delta, float keep, const double* total, i64 count) {
    if (!is_finite(*total)) return;
    EACH(i, count) {
#if ELEMENT_BF16
        split(join(weight[i], rest[i]) * keep + delta[i], weight[i], rest[i]);
#else
        weight[i] = weight[i] * keep + delta[i];
#endif
    }
}
