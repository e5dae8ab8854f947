// Sums over columns and over whole sets of tensors. See norm.rs.
#include "prelude.cuh"

// parts[p] = sum over the rows of part p, rows in their order. A thread is a column.
extern "C" __global__ void column_parts(const E* x, float* parts, int rows, int columns, int part_rows) {
    wait_for_earlier();
    int column = blockIdx.x * blockDim.x + threadIdx.x, part = blockIdx.y;
    if (column >= columns) return;
    int first = part * part_rows, end = min(rows, first + part_rows);
    float sum = 0.0f;
    for (int row = first; row < end; row++) sum += to_float(x[(i64)row * columns + column]);
    parts[(i64)part * columns + column] = sum;
}

// Columns of a block of add_parts, and segments of the parts, whose sums are added in their order.
constexpr int COLUMNS = 32, SEGMENTS = 16;

// sums (+)= the parts. A thread is a column of a segment.
extern "C" __global__ void __launch_bounds__(COLUMNS * SEGMENTS) add_parts(const float* parts, float* sums, int count, int columns, int add) {
    wait_for_earlier();
    __shared__ float segments[SEGMENTS][COLUMNS];
    int within = threadIdx.x % COLUMNS, segment = threadIdx.x / COLUMNS, column = blockIdx.x * COLUMNS + within;
    int length = (count + SEGMENTS - 1) / SEGMENTS, first = segment * length, end = min(count, first + length);
    float sum = 0.0f;
    if (column < columns) {
#pragma unroll 4
        for (int part = first; part < end; part++) sum += parts[(i64)part * columns + column];
    }
    segments[segment][within] = sum;
    __syncthreads();
    if (segment > 0 || column >= columns) return;
    sum = add ? sums[column] : 0.0f;
#pragma unroll
    for (int i = 0; i < SEGMENTS; i++) sum += segments[i][within];
    sums[column] = sum;
}

struct Tensor {
    const E* values;
    i64 length;
};

// sums[b] = the sum of squares of piece b of the tensors, in f64. A block is a piece: (tensor, first element).
extern "C" __global__ void squares(const Tensor* tensors, const i64* pieces, int piece_length, double* sums) {
    Tensor tensor = tensors[pieces[2 * (i64)blockIdx.x]];
    i64 first = pieces[2 * (i64)blockIdx.x + 1], end = min(tensor.length, first + piece_length);
    double sum = 0.0;
    for (i64 i = first + threadIdx.x; i < end; i += blockDim.x) {
        double value = to_float(tensor.values[i]);
        sum += value * value;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// total = the sum of the sums; factor = what brings the norm down to norm_max (1 if it is below), as train/optimizer.rs has it. One block.
extern "C" __global__ void finish_norm(const double* sums, int count, double norm_max, double* total, float* factor) {
    double sum = 0.0;
    for (int i = threadIdx.x; i < count; i += blockDim.x) sum += sums[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
        double norm = sqrt(sum);
        *total = sum;
        double wanted = norm_max / (norm + 1e-6);
        *factor = wanted < 1.0 ? (float)wanted : 1.0f;
    }
}
