// A mixture of experts without its products: routing, the choices sorted by expert, and the experts' outputs back to their tokens.
// Compiled without contraction. See route.rs.
#include "prelude.cuh"

// Softmax over the experts of a token, the best k (of equal ones the lower index) and their weights. A warp is a token.
extern "C" __global__ void route(const float* logits, int tokens, int experts, int k, int renormalise, float* probs, int* chosen, float* weights) {
    int token = blockIdx.x * (blockDim.x / 32) + warp_id();
    if (token >= tokens) return;
    logits += (i64)token * experts, probs += (i64)token * experts, chosen += (i64)token * k, weights += (i64)token * k;
    float largest = -INFINITE, sum = 0.0f;
    for (int e = lane_id(); e < experts; e += 32) largest = logits[e] > largest ? logits[e] : largest;
    largest = warp_max(largest);
    for (int e = lane_id(); e < experts; e += 32) sum += expf(logits[e] - largest);
    sum = warp_sum(sum);
    for (int e = lane_id(); e < experts; e += 32) probs[e] = expf(logits[e] - largest) / sum;
    __syncwarp();
    // Each round takes the best of those that come after the last one in the order of (probability down, index up). NaN comes last.
    float last = INFINITE, total = 0.0f;
    int last_index = -1;
    for (int round = 0; round < k; round++) {
        float best = -2.0f;
        int best_index = experts;
        for (int e = lane_id(); e < experts; e += 32) {
            float p = probs[e] == probs[e] ? probs[e] : -1.0f;
            bool left = p < last || (p == last && e > last_index);
            if (left && (p > best || (p == best && e < best_index))) best = p, best_index = e;
        }
#pragma unroll
        for (int by = 16; by > 0; by /= 2) {
            float p = __shfl_xor_sync(~0u, best, by);
            int e = __shfl_xor_sync(~0u, best_index, by);
            if (p > best || (p == best && e < best_index)) best = p, best_index = e;
        }
        last = best, last_index = best_index;
        float weight = probs[best_index];
        total += weight;
        if (lane_id() == 0) chosen[round] = best_index, weights[round] = weight;
    }
    if (renormalise && lane_id() == 0) {
        for (int round = 0; round < k; round++) weights[round] /= total;
    }
}

// The way back: through the weights, the renormalisation and the softmax. d_probs may be null. A warp is a token.
extern "C" __global__ void route_backward(const float* probs, const int* chosen, int tokens, int experts, int k, int renormalise, const float* d_weights,
    const float* d_probs, float* d_logits) {
    int token = blockIdx.x * (blockDim.x / 32) + warp_id();
    if (token >= tokens) return;
    i64 all = (i64)token * experts, few = (i64)token * k;
    float sum = 1.0f, mean = 0.0f;
    if (renormalise) {
        sum = 0.0f;
        for (int i = 0; i < k; i++) sum += probs[all + chosen[few + i]];
        for (int i = 0; i < k; i++) mean += probs[all + chosen[few + i]] * d_weights[few + i];
        mean /= sum;
    }
    float dot = 0.0f;
    for (int e = lane_id(); e < experts; e += 32) {
        float d = d_probs ? d_probs[all + e] : 0.0f;
        for (int i = 0; i < k; i++) {
            if (chosen[few + i] == e) d += (d_weights[few + i] - mean) / sum;
        }
        d_logits[all + e] = d;
        dot += d * probs[all + e];
    }
    dot = warp_sum(dot);
    for (int e = lane_id(); e < experts; e += 32) d_logits[all + e] = probs[all + e] * (d_logits[all + e] - dot);
}

// counts[e] = choices of expert e. A block is an expert.
extern "C" __global__ void count_choices(const int* chosen, int count, int* counts) {
    int found = 0;
    for (int i = threadIdx.x; i < count; i += blockDim.x) found += chosen[i] == (int)blockIdx.x;
    found = block_sum(found);
    if (threadIdx.x == 0) counts[blockIdx.x] = found;
}

// offsets[e] = choices of the experts before e; offsets[experts] = all. One thread adds; experts are few.
extern "C" __global__ void sum_counts(const int* counts, int experts, int* offsets) {
    if (threadIdx.x != 0) return;
    int sum = 0;
    for (int e = 0; e < experts; e++) {
        offsets[e] = sum;
        sum += counts[e];
    }
    offsets[experts] = sum;
}

// Writes each expert's choices in their order: rows (tokens), slots (choices), places (the inverse). A block is an expert.
extern "C" __global__ void place_choices(const int* chosen, int count, int k, const int* offsets, int* rows, int* slots, int* places) {
    __shared__ int found[32];
    int next = offsets[blockIdx.x], warps = blockDim.x / 32;
    for (int start = 0; start < count; start += blockDim.x) {
        int choice = start + threadIdx.x;
        bool own = choice < count && chosen[choice] == (int)blockIdx.x;
        u32 mask = __ballot_sync(~0u, own);
        if (lane_id() == 0) found[warp_id()] = __popc(mask);
        __syncthreads();
        int before = __popc(mask & ((1u << lane_id()) - 1)), all = 0;
        for (int w = 0; w < warps; w++) {
            if (w < warp_id()) before += found[w];
            all += found[w];
        }
        if (own) {
            int row = next + before;
            rows[row] = choice / k;
            slots[row] = choice;
            places[choice] = row;
        }
        next += all;
        __syncthreads();
    }
}

// y[token] (+)= sum over its slots, in their order, of weight * expert_out[place]. A block is a token.
extern "C" __global__ void combine(const E* expert_out, const int* places, const float* weights, int k, int hidden, E* y, int add) {
    i64 token = blockIdx.x;
    places += token * k, weights += token * k, y += token * hidden;
    for (int c = threadIdx.x; c < hidden; c += blockDim.x) {
        float sum = 0.0f;
        for (int i = 0; i < k; i++) sum += weights[i] * to_float(expert_out[(i64)places[i] * hidden + c]);
        y[c] = from_float<E>(add ? to_float(y[c]) + sum : sum);
    }
}

// d_expert_out[place] = weight * dy[token]; d_weights[choice] = dy[token] . expert_out[place]. A block is a choice.
extern "C" __global__ void combine_backward(const E* expert_out, const int* places, const float* weights, int k, int hidden, const E* dy, E* d_expert_out,
    float* d_weights) {
    i64 choice = blockIdx.x, token = choice / k, at = (i64)places[choice] * hidden;
    float weight = weights[choice], sum = 0.0f;
    dy += token * hidden;
    for (int c = threadIdx.x; c < hidden; c += blockDim.x) {
        float d = to_float(dy[c]);
        sum += d * to_float(expert_out[at + c]);
        d_expert_out[at + c] = from_float<E>(weight * d);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) d_weights[choice] = sum;
}

// y[token] += sigmoid(gate[token]) * shared[token]. A block is a token.
extern "C" __global__ void add_gated(const float* gate, const E* shared, E* y, int hidden) {
    i64 start = (i64)blockIdx.x * hidden;
    float open = sigmoid(gate[blockIdx.x]);
    for (int c = threadIdx.x; c < hidden; c += blockDim.x) y[start + c] = from_float<E>(to_float(y[start + c]) + open * to_float(shared[start + c]));
}

// d_shared = sigmoid(gate) * dy; d_gate = (dy . shared) s (1 - s). A block is a token.
extern "C" __global__ void add_gated_backward(const float* gate, const E* shared, const E* dy, float* d_gate, E* d_shared, int hidden) {
    i64 start = (i64)blockIdx.x * hidden;
    float open = sigmoid(gate[blockIdx.x]), sum = 0.0f;
    for (int c = threadIdx.x; c < hidden; c += blockDim.x) {
        float d = to_float(dy[start + c]);
        sum += d * to_float(shared[start + c]);
        d_shared[start + c] = from_float<E>(open * d);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) d_gate[blockIdx.x] = sum * open * (1.0f - open);
}

// visits[e] (+)= grouped rows of expert e. Exact below 2^24 rows. A thread is an expert.
extern "C" __global__ void count_visits(const int* offsets, int experts, float* visits, int add) {
    int e = blockIdx.x * blockDim.x + threadIdx.x;
    if (e < experts) visits[e] = (add ? visits[e] : 0.0f) + (float)(offsets[e + 1] - offsets[e]);
}

// loss = experts * sum of visits[e] / rows * prob_sums[e] / rows, in f64. One thread adds; experts are few.
extern "C" __global__ void balance(const float* visits, const float* prob_sums, int experts, double rows, float* loss) {
    if (threadIdx.x != 0) return;
    double dot = 0.0;
    for (int e = 0; e < experts; e++) dot += (double)visits[e] / rows * ((double)prob_sums[e] / rows);
    *loss = (float)((double)experts * dot);
}

// d_probs[t, e] = by * visits[e].
extern "C" __global__ void balance_backward(const float* visits, int experts, double by, float* d_probs, i64 count) {
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) {
        d_probs[i] = (float)(by * (double)visits[i % experts]);
    }
}
