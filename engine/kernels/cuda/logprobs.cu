// Log-probabilities of labels and entropies of rows of logits, and their gradient. See logprobs.rs.
#include "prelude.cuh"

// Logits of a slice of a row, which a block of THREADS threads walks over: a decoded token has one row, and needs many blocks.
constexpr int SLICE = 8192, THREADS = 256;
// Logits that a thread asks for before it uses the first.
constexpr int AHEAD = 16;

// What is known of a slice: its largest logit; the sums of p = e^(logit - largest) and of p (logit - largest).
struct Part {
    double largest, sum, bend;
};

// parts: [rows][slices]. Rows with a negative label have none.
extern "C" __global__ void __launch_bounds__(THREADS) logprobs_parts(const float* logits, int vocab, const int* labels, Part* parts) {
    int row = blockIdx.y, label = labels[row], begin = blockIdx.x * SLICE, end = min(begin + SLICE, vocab);
    if (label >= vocab) __trap();
    if (label < 0) return;
    logits += (i64)row * vocab;
    // Each thread keeps its own maximum, so that the slice is read once.
    float largest = -INFINITE, sum = 0.0f, weighted = 0.0f;
    for (int first = begin + threadIdx.x; first < end; first += AHEAD * THREADS) {
        float ahead[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            int i = first + j * THREADS;
            ahead[j] = i < end ? logits[i] : -INFINITE;
        }
        // One change of the maximum for all of them.
        float highest = largest;
#pragma unroll
        for (int j = 0; j < AHEAD; j++) highest = fmaxf(highest, ahead[j]);
        if (highest > largest) {
            float factor = expf(largest - highest);
            if (sum > 0.0f) weighted = factor * (weighted + sum * (largest - highest));
            sum *= factor;
            largest = highest;
        }
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            // What is not a number makes the sum none, and the row's results must show it.
            float below = ahead[j] - largest, power = ahead[j] == -INFINITE ? 0.0f : expf(below);
            sum += power;
            if (power > 0.0f) weighted += power * below;
        }
    }
    float top = block_max(largest);
    float factor = sum > 0.0f ? expf(largest - top) : 0.0f;
    double sums = block_sum(sum == sum ? (double)(factor * sum) : (double)sum);
    double bend = block_sum(sum > 0.0f ? (double)factor * ((double)weighted + (double)sum * (double)(largest - top)) : 0.0);
    if (threadIdx.x == 0) parts[(i64)row * gridDim.x + blockIdx.x] = Part{(double)top, sums, bend};
}

// lse, log-probability of the label and (if wanted) entropy of each row; rows with a negative label give 0. A warp is a row, slices in
// their order.
extern "C" __global__ void __launch_bounds__(32) logprobs(const float* logits, int vocab, const int* labels, const Part* parts, int slices, float* logsumexp,
    float* logprobs, float* entropy) {
    int row = blockIdx.x, label = labels[row];
    if (label < 0) {
        if (threadIdx.x == 0) {
            logsumexp[row] = 0.0f, logprobs[row] = 0.0f;
            if (entropy) entropy[row] = 0.0f;
        }
        return;
    }
    parts += (i64)row * slices;
    float own = -INFINITE;
    for (int i = threadIdx.x; i < slices; i += 32) own = max(own, (float)parts[i].largest);
    double top = (double)warp_max(own), sums = 0.0, bends = 0.0;
    for (int i = threadIdx.x; i < slices; i += 32) {
        Part part = parts[i];
        if (part.sum > 0.0) {
            double below = part.largest - top, factor = exp(below);
            sums += factor * part.sum;
            bends += factor * (part.bend + part.sum * below);
        } else if (part.sum != part.sum) {
            sums = part.sum;
        }
    }
    sums = warp_sum(sums), bends = warp_sum(bends);
    if (threadIdx.x == 0) {
        double log_sum = log(sums);
        logsumexp[row] = (float)(top + log_sum);
        logprobs[row] = (float)((double)logits[(i64)row * vocab + label] - top - log_sum);
        if (entropy) entropy[row] = (float)(log_sum - bends / sums);
    }
}

// What one row's gradient needs.
struct Row {
    int label;
    float lse, coefficient, bend, mean;

    __device__ __forceinline__ float gradient(float logit, int i) const {
        if (label < 0) return 0.0f;
        float logprob = logit - lse, p = expf(logprob);
        float value = i == label ? coefficient * expm1f(logprob) : coefficient * p;
        return bend != 0.0f && p > 0.0f ? value - bend * (p * (logprob + mean)) : value;
    }
};

template <int N> __device__ __forceinline__ void gradient_row(const float* logits, int vocab, const Row& row, E* out) {
#pragma unroll 2
    for (int i = threadIdx.x * N; i < vocab; i += blockDim.x * N) {
        Pack<float, N> values = load<float, N>(logits + i);
        Pack<E, N> gradients;
#pragma unroll
        for (int j = 0; j < N; j++) gradients.at[j] = from_float<E>(row.gradient(values.at[j], i + j));
        store<E, N>(out + i, gradients);
    }
}

// The loss's gradient in the logits: coefficient * (softmax - onehot(label)) - entropy_coefficient * p (ln p + entropy), to `out`
// in its element type. `out` may be the logits themselves when that type is f32. The entropy's three arguments are null together.
extern "C" __global__ void logprobs_gradient(const float* logits, int vocab, const int* labels, const float* logsumexp, const float* coefficients,
    const float* entropy, const float* entropy_coefficients, E* out) {
    int at = blockIdx.x;
    Row row{labels[at], logsumexp[at], coefficients[at], entropy ? entropy_coefficients[at] : 0.0f, entropy ? entropy[at] : 0.0f};
    if (row.label >= vocab) __trap();
    logits += (i64)at * vocab, out += (i64)at * vocab;
    if (is_aligned(logits) && (u64)out % (4 * sizeof(E)) == 0 && vocab % 4 == 0) {
        gradient_row<4>(logits, vocab, row, out);
    } else {
        gradient_row<1>(logits, vocab, row, out);
    }
}
