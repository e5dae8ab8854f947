// Elements one by one, rows put at their places, columns taken out and put back. Compiled without contraction, so the bits are
// those of the CPU. See elements.rs.
#include "prelude.cuh"

#define EACH(i, count) for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < (count); i += (i64)gridDim.x * blockDim.x)

extern "C" __global__ void widen(const E* from, float* to, i64 count) {
    EACH(i, count) to[i] = to_float(from[i]);
}

extern "C" __global__ void narrow(const float* from, E* to, i64 count) {
    EACH(i, count) to[i] = from_float<E>(from[i]);
}

extern "C" __global__ void add(E* sum, const E* x, i64 count) {
    EACH(i, count) sum[i] = from_float<E>(to_float(sum[i]) + to_float(x[i]));
}

// Row rows[b] of `to` (+)= row b of `from`. A block is a row; no two name the same.
extern "C" __global__ void put_rows(const E* from, const int* rows, E* to, int to_rows, int width, int add) {
    int row = rows[blockIdx.x];
    if (row < 0 || row >= to_rows) __trap();
    from += (i64)blockIdx.x * width, to += (i64)row * width;
    for (int c = threadIdx.x; c < width; c += blockDim.x) to[c] = add ? from_float<E>(to_float(to[c]) + to_float(from[c])) : from[c];
}

// Where element `i` of a part of some columns lies in the whole; all columns need no division.
__device__ __forceinline__ i64 in_whole(i64 i, int width, int first, int columns) {
    return columns == width ? i : i / columns * width + first + i % columns;
}

// y[:, first..first + columns] += scale * delta.
extern "C" __global__ void add_columns(E* y, int width, int first, int columns, const float* delta, float scale, i64 count) {
    EACH(i, count) {
        E* at = y + in_whole(i, width, first, columns);
        *at = from_float<E>(to_float(*at) + scale * delta[i]);
    }
}

// out = scale * dy[:, first..first + columns].
extern "C" __global__ void take_columns(const E* dy, int width, int first, int columns, float scale, E* out, i64 count) {
    EACH(i, count) out[i] = from_float<E>(to_float(dy[in_whole(i, width, first, columns)]) * scale);
}
