// Rows of a table by number, and the gradient of the table. See embedding.rs.
#include "prelude.cuh"

template <int N> __device__ void copy_row(const E* from, E* to, int hidden) {
    for (int c = threadIdx.x * N; c < hidden; c += blockDim.x * N) store<E, N>(to + c, load<E, N>(from + c));
}

// out[t] = table[:, ids[t]], of a table [rows, vocab]. A block is a token.
extern "C" __global__ void take_columns_of(const E* table, const int* ids, E* out, int vocab, int rows) {
    int id = ids[blockIdx.x];
    if (id < 0 || id >= vocab) __trap();
    for (int r = threadIdx.x; r < rows; r += blockDim.x) out[(i64)blockIdx.x * rows + r] = table[(i64)r * vocab + id];
}

// out[t] = weight[ids[t]]. A block is a token.
extern "C" __global__ void embed(const E* weight, const int* ids, E* out, int vocab, int hidden) {
    wait_for_earlier();
    int id = ids[blockIdx.x];
    if (id < 0 || id >= vocab) __trap();
    const E* from = weight + (i64)id * hidden;
    E* to = out + (i64)blockIdx.x * hidden;
    if (hidden % WIDE == 0 && is_aligned(weight) && is_aligned(out)) {
        copy_row<WIDE>(from, to, hidden);
    } else {
        copy_row<1>(from, to, hidden);
    }
}

// d_weight[ids[t]] += d_out[t], tokens in their order; element c of row v lies at v * row_stride + c * column_stride. A block is a
// token; the one that is the first of its id adds for all of them, so no two blocks write one row and the order is fixed.
extern "C" __global__ void embed_backward(const E* d_out, const int* ids, float* d_weight, int tokens, int vocab, int hidden, i64 row_stride,
    i64 column_stride) {
    __shared__ u32 found[32];
    int own = blockIdx.x, id = ids[own];
    if (id < 0 || id >= vocab) __trap();
    float* row = d_weight + id * row_stride;
    int threads = blockDim.x, warps = threads / 32;
    for (int start = 0; start < own; start += threads) {
        int t = start + threadIdx.x;
        u32 mask = __ballot_sync(~0u, t < own && ids[t] == id);
        if (lane_id() == 0) found[warp_id()] = mask;
        __syncthreads();
        bool earlier = false;
        for (int w = 0; w < warps; w++) earlier |= found[w] != 0;
        __syncthreads();
        if (earlier) return;
    }
    for (int start = own; start < tokens; start += threads) {
        int t = start + threadIdx.x;
        u32 mask = __ballot_sync(~0u, t < tokens && ids[t] == id);
        if (lane_id() == 0) found[warp_id()] = mask;
        __syncthreads();
        for (int w = 0; w < warps; w++) {
            for (u32 left = found[w]; left != 0; left &= left - 1) {
                const E* d = d_out + (i64)(start + 32 * w + __ffs(left) - 1) * hidden;
                for (int c = threadIdx.x; c < hidden; c += threads) row[c * column_stride] += to_float(d[c]);
            }
        }
        __syncthreads();
    }
}
