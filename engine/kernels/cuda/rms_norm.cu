// RMS normalisation of rows, with the sum of the residual stream before it. A block is a row, and how many threads it has
// depends on the row's length alone. See rms_norm.rs.
#include "rms_norm.cuh"

template <int N>
__device__ void forward_row(const E* x, const E* residual, E* sum, const E* weight, float eps, E* y, float* inv_rms, int hidden) {
    float squares = 0.0f;
    for (int c = threadIdx.x * N; c < hidden; c += blockDim.x * N) {
        Pack<E, N> pack = load<E, N>(x + c);
        if (residual) {
            Pack<E, N> other = load<E, N>(residual + c);
#pragma unroll
            for (int i = 0; i < N; i++) pack.at[i] = from_float<E>(to_float(pack.at[i]) + to_float(other.at[i]));
            store<E, N>(sum + c, pack);
        }
        add_squares(squares, pack);
    }
    squares = block_sum(squares);
    float scale = inverse_rms(squares, eps, hidden);
    if (threadIdx.x == 0) *inv_rms = scale;
    // A thread reads only what it wrote.
    const E* source = residual ? sum : x;
    for (int c = threadIdx.x * N; c < hidden; c += blockDim.x * N) {
        Pack<E, N> pack = load<E, N>(source + c), w = load<E, N>(weight + c);
        normalise(pack, w, scale);
        store<E, N>(y + c, pack);
    }
}

// sum = x + residual if there is one; y = norm(sum or x) * weight.
extern "C" __global__ void rms_norm(const E* x, const E* residual, E* sum, const E* weight, float eps, E* y, float* inv_rms, int hidden) {
    wait_for_earlier();
    i64 start = (i64)blockIdx.x * hidden;
    x += start, y += start, inv_rms += blockIdx.x;
    if (residual) residual += start, sum += start;
    if (hidden % WIDE == 0) {
        forward_row<WIDE>(x, residual, sum, weight, eps, y, inv_rms, hidden);
    } else {
        forward_row<1>(x, residual, sum, weight, eps, y, inv_rms, hidden);
    }
}

template <int N> __device__ void backward_row(const E* x, const E* weight, float inv_rms, const E* dy, E* dx, int add, int hidden) {
    float dot = 0.0f;
    for (int c = threadIdx.x * N; c < hidden; c += blockDim.x * N) {
        Pack<E, N> xs = load<E, N>(x + c), ws = load<E, N>(weight + c), ds = load<E, N>(dy + c);
#pragma unroll
        for (int i = 0; i < N; i++) dot += to_float(ds.at[i]) * to_float(ws.at[i]) * to_float(xs.at[i]);
    }
    float pull = block_sum(dot) * inv_rms * inv_rms / (float)hidden;
    for (int c = threadIdx.x * N; c < hidden; c += blockDim.x * N) {
        Pack<E, N> xs = load<E, N>(x + c), ws = load<E, N>(weight + c), ds = load<E, N>(dy + c), old, out;
        if (add) old = load<E, N>(dx + c);
#pragma unroll
        for (int i = 0; i < N; i++) {
            float own = inv_rms * (to_float(ds.at[i]) * to_float(ws.at[i]) - to_float(xs.at[i]) * pull);
            out.at[i] = from_float<E>(add ? to_float(old.at[i]) + own : own);
        }
        store<E, N>(dx + c, out);
    }
}

// dx (+)= inv_rms * (dy * weight - x * mean(dy * weight * x) * inv_rms^2).
extern "C" __global__ void rms_norm_backward(const E* x, const E* weight, const float* inv_rms, const E* dy, E* dx, int add, int hidden) {
    wait_for_earlier();
    i64 start = (i64)blockIdx.x * hidden;
    float scale = inv_rms[blockIdx.x];
    if (hidden % WIDE == 0) {
        backward_row<WIDE>(x + start, weight, scale, dy + start, dx + start, add, hidden);
    } else {
        backward_row<1>(x + start, weight, scale, dy + start, dx + start, add, hidden);
    }
}

// parts[p] = sum over the rows of part p of dy * u, rows in their order. A thread is a column.
extern "C" __global__ void rms_norm_weight_parts(const E* x, const float* inv_rms, const E* dy, float* parts, int tokens, int hidden, int part_rows) {
    wait_for_earlier();
    int column = blockIdx.x * blockDim.x + threadIdx.x, part = blockIdx.y;
    if (column >= hidden) return;
    int first = part * part_rows, end = min(tokens, first + part_rows);
    float sum = 0.0f;
    for (int row = first; row < end; row++) {
        i64 at = (i64)row * hidden + column;
        sum += to_float(dy[at]) * rounded<E>(to_float(x[at]) * inv_rms[row]);
    }
    parts[(i64)part * hidden + column] = sum;
}
