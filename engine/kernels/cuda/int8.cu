// Products with weights of 8 bits, to the bit those of the CPU (kernels/cpu/int8.rs): each row of activations is rounded to 16 bits of
// its largest magnitude, two planes of bytes, and integers are multiplied, whose sums are exact in any order. Rows of weights and of
// planes are padded with zeros to whole 16 bytes. Compiled without contraction. See int8.rs.
//
// Macros: OUT_F32: the element of out and residual. ROWS, COLUMNS: of activations, and of the weight for each warp, that a block
// multiplies together.
#include "prelude.cuh"

#if OUT_F32
typedef float Out;
#else
typedef E Out;
#endif

constexpr int WARPS = 8;

#ifdef EMULATED
// sum + the products of four unsigned bytes with four signed ones.
__device__ __forceinline__ int dot4(u32 a, u32 b, int sum) {
    for (int i = 0; i < 4; i++) sum += (int)(a >> 8 * i & 255) * (int)(signed char)(b >> 8 * i & 255);
    return sum;
}
#else
__device__ __forceinline__ int dot4(u32 a, u32 b, int sum) {
    int out;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(sum));
    return out;
}
#endif
__device__ __forceinline__ int dot16(uint4 a, uint4 b, int sum) { return dot4(a.w, b.w, dot4(a.z, b.z, dot4(a.y, b.y, dot4(a.x, b.x, sum)))); }

// Rounds row b of `from` to 127 steps of its largest magnitude. A block is a row.
extern "C" __global__ void quantize(const float* from, signed char* values, float* scales, int* sums, int inputs, int stride) {
    from += (i64)blockIdx.x * inputs, values += (i64)blockIdx.x * stride;
    float largest = 0.0f;
    for (int c = threadIdx.x; c < inputs; c += blockDim.x) {
        float magnitude = fabsf(from[c]);
        if (magnitude > largest) largest = magnitude;
    }
    largest = block_max(largest);
    float factor = largest > 0.0f ? 127.0f / largest : 0.0f;
    int sum = 0;
    for (int c = threadIdx.x; c < inputs; c += blockDim.x) {
        int value = (int)fminf(fmaxf(roundf(from[c] * factor), -127.0f), 127.0f);
        values[c] = (signed char)value;
        sum += value;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) scales[blockIdx.x] = largest / 127.0f, sums[blockIdx.x] = sum;
}

// Rounds row b of `x` to two planes, the upper bytes first, and says what its integers are multiplied by. A block is a row.
extern "C" __global__ void round_rows(const E* x, unsigned char* planes, float* scales, int inputs, int stride) {
    __shared__ u32 parts[32];
    x += (i64)blockIdx.x * inputs, planes += (i64)blockIdx.x * 2 * stride;
    // By their bits: infinity is more than every number, and NaN more than that.
    u32 bits = 0;
    for (int c = threadIdx.x; c < inputs; c += blockDim.x) bits = max(bits, __float_as_uint(to_float(x[c])) & 0x7fffffffu);
#pragma unroll
    for (int by = 16; by > 0; by /= 2) bits = max(bits, __shfl_xor_sync(~0u, bits, by));
    if (lane_id() == 0) parts[warp_id()] = bits;
    __syncthreads();
    for (int warp = 0; warp < (int)(blockDim.x / 32); warp++) bits = max(bits, parts[warp]);
    float largest = __uint_as_float(bits), factor = 32767.0f / largest, scale = largest / 32767.0f;
    if (bits >= 0x7f800000u) factor = 0.0f, scale = __uint_as_float(0x7fc00000u);
    if (__float_as_uint(factor) == 0x7f800000u) factor = 0.0f, scale = 0.0f;
    for (int c = threadIdx.x; c < stride; c += blockDim.x) {
        // A whole number plus this has the number's two's complement in its lowest bits; past the inputs the weights are zero.
        u32 word = c < inputs ? __float_as_uint(to_float(x[c]) * factor + (12582912.0f + 32768.0f)) : 0;
        planes[c] = (unsigned char)(word >> 8);
        planes[stride + c] = (unsigned char)word;
    }
    if (threadIdx.x == 0) scales[blockIdx.x] = scale;
}

// out[t] = row ids[t] of the weight. A block is a token.
extern "C" __global__ void embed_int8(const signed char* values, const float* scales, const int* ids, E* out, int vocab, int inputs, int stride) {
    int id = ids[blockIdx.x];
    if (id < 0 || id >= vocab) __trap();
    for (int c = threadIdx.x; c < inputs; c += blockDim.x) out[(i64)blockIdx.x * inputs + c] = from_float<E>((float)values[(i64)id * stride + c] * scales[id]);
}

// y = x W^T + bias + residual. A warp is some columns, a block some rows of a group; the rows of group z are offsets[z]..offsets[z + 1].
extern "C" __global__ void __launch_bounds__(WARPS * 32) multiply(const unsigned char* planes, const float* row_scales, const signed char* values,
    const float* scales, const int* sums, const E* bias, const Out* residual, Out* y, int m, int n, int stride, const int* offsets) {
    i64 base = 0;
    if (offsets) {
        base = offsets[blockIdx.z];
        m = offsets[blockIdx.z + 1] - offsets[blockIdx.z];
        values += (i64)blockIdx.z * n * stride, scales += (i64)blockIdx.z * n, sums += (i64)blockIdx.z * n;
    }
    int top = blockIdx.y * ROWS, column = (blockIdx.x * WARPS + warp_id()) * COLUMNS;
    if (top >= m || column >= n) return;
    planes += (base + top) * 2 * stride;
    int rows = min(ROWS, m - top);
    int upper[ROWS][COLUMNS], lower[ROWS][COLUMNS];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) upper[r][j] = lower[r][j] = 0;
    for (int at = lane_id() * 16; at < stride; at += 32 * 16) {
        uint4 weights[COLUMNS];
#pragma unroll
        for (int j = 0; j < COLUMNS; j++)
            weights[j] = column + j < n ? *(const uint4*)(values + (i64)(column + j) * stride + at) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (r >= rows) continue;
            uint4 high = *(const uint4*)(planes + (i64)(2 * r) * stride + at), low = *(const uint4*)(planes + (i64)(2 * r + 1) * stride + at);
#pragma unroll
            for (int j = 0; j < COLUMNS; j++) upper[r][j] = dot16(high, weights[j], upper[r][j]), lower[r][j] = dot16(low, weights[j], lower[r][j]);
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int j = 0; j < COLUMNS; j++) {
            int high = warp_sum(upper[r][j]), low = warp_sum(lower[r][j]), c = column + j;
            if (lane_id() != 0 || r >= rows || c >= n) continue;
            i64 row = base + top + r;
            double sum = (double)high * 256.0 + (double)low - (double)sums[c] * 32768.0;
            float value = (float)(sum * ((double)row_scales[row] * (double)scales[c]));
            if (bias) value += to_float(bias[c]);
            if (residual) value += to_float(residual[row * n + c]);
            y[row * n + c] = from_float<Out>(value);
        }
}
