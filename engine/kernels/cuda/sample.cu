// The next token of each row of logits, on the device: penalty, temperature, top-k, top-p, min-p, then a choice by a given uniform
// number, in the order and with the ties of infer/sampler.rs. Weights and their sums are f64. A block is a row. See sample.rs.
#include "prelude.cuh"

constexpr int THREADS = 512;

// As infer/sampler.rs has them, and the row's random number.
struct Rules {
    double temperature, top_p, min_p, uniform, repetition_penalty;
    i64 top_k;
};

// The order of floats as an order of integers.
__device__ __forceinline__ u32 key_of(float v) {
    // Minus zero and zero are equal.
    u32 bits = __float_as_uint(v + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Divides or multiplies the logits of the tokens seen before, each once. previous: [rows][width], -1 where there is none.
extern "C" __global__ void penalise(float* logits, int vocab, const int* previous, int width, const Rules* rules) {
    float* row = logits + (i64)blockIdx.x * vocab;
    previous += (i64)blockIdx.x * width;
    float penalty = (float)rules[blockIdx.x].repetition_penalty;
    if (penalty == 1.0f) return;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        int id = previous[i];
        bool first = id >= 0 && id < vocab;
        for (int j = 0; j < i && first; j++) first = previous[j] != id;
        if (first) row[id] = row[id] > 0.0f ? row[id] / penalty : row[id] * penalty;
    }
}

// Sum of `value(i)` over the row's elements, in an order that depends on vocab alone.
template <class T, class Value> __device__ __forceinline__ T sum_over(int vocab, Value value) {
    T sum = 0;
    for (int i = threadIdx.x; i < vocab; i += THREADS) sum += value(i);
    return block_sum(sum);
}

// Visits the tokens begin..end that stay, until a visit says that it is enough. See `border` and `ties` below; `rank` is how many
// ties come before `begin`.
template <class Visit>
__device__ __forceinline__ void walk(const float* logits, const double* weights, int begin, int end, u32 border, int ties, int rank, double min_p, Visit visit) {
    for (int i = begin; i < end; i++) {
        u32 key = key_of(logits[i]);
        bool stays = key > border || (key == border && rank++ < ties);
        if (stays && weights[i] >= min_p && visit(i)) return;
    }
}

// tokens[row]: the choice; -1 if a logit is not a number or infinite, or if all are ruled out. weights: [rows][vocab], scratch.
extern "C" __global__ void __launch_bounds__(THREADS) sample(const float* logits, int vocab, const Rules* all_rules, double* weights, int* tokens) {
    __shared__ double shares[THREADS];
    __shared__ int tie_counts[THREADS];
    int row = blockIdx.x;
    Rules rules = all_rules[row];
    logits += (i64)row * vocab, weights += (i64)row * vocab;

    // The first of the highest logits.
    float highest = -INFINITE;
    int bad = 0;
    for (int i = threadIdx.x; i < vocab; i += THREADS) {
        float logit = logits[i];
        bad |= logit != logit || logit == INFINITE;
        highest = logit > highest ? logit : highest;
    }
    bad = block_sum(bad);
    highest = block_max(highest);
    if (bad || highest == -INFINITE) {
        if (threadIdx.x == 0) tokens[row] = -1;
        return;
    }
    if (rules.temperature == 0.0) {
        int first = vocab;
        for (int i = threadIdx.x; i < vocab; i += THREADS) {
            if (logits[i] == highest) {
                first = i;
                break;
            }
        }
        first = -(int)block_max((float)-first);
        if (threadIdx.x == 0) tokens[row] = first;
        return;
    }

    for (int i = threadIdx.x; i < vocab; i += THREADS) weights[i] = exp(((double)logits[i] - (double)highest) / rules.temperature);
    __syncthreads();

    // Keys below `least` are out. Both searches go bit by bit from the top.
    u32 least = key_of(-INFINITE) + 1;
    if (rules.top_k > 0 && rules.top_k < vocab) {
        u32 found = 0;
        for (int bit = 31; bit >= 0; bit--) {
            u32 tried = found | 1u << bit;
            if (sum_over<int>(vocab, [&](int i) { return (int)(key_of(logits[i]) >= tried); }) >= rules.top_k) found = tried;
        }
        least = found > least ? found : least;
    }
    // Of the keys that equal `border`, the first `ties` stay; those above stay, those below go.
    u32 border = least;
    int ties = vocab;
    if (rules.top_p < 1.0) {
        double total = sum_over<double>(vocab, [&](int i) { return key_of(logits[i]) >= least ? weights[i] : 0.0; });
        double wanted = rules.top_p * total;
        // The highest key such that it and those above it reach what is wanted, searched as a distance from `least`, which does.
        u32 offset = 0;
        for (int bit = 31; bit >= 0; bit--) {
            u32 tried = offset | 1u << bit;
            if (tried > ~0u - least) continue;
            if (sum_over<double>(vocab, [&](int i) { return key_of(logits[i]) >= least + tried ? weights[i] : 0.0; }) >= wanted) offset = tried;
        }
        border = least + offset;
        double above = sum_over<double>(vocab, [&](int i) { return key_of(logits[i]) > border ? weights[i] : 0.0; });
        double tied = sum_over<double>(vocab, [&](int i) { return key_of(logits[i]) == border ? weights[i] : 0.0; });
        int count = sum_over<int>(vocab, [&](int i) { return (int)(key_of(logits[i]) == border); });
        double each = count > 0 ? tied / count : 0.0;
        ties = 0;
        while (ties < count && (ties == 0 || above + ties * each < wanted)) ties++;
    }

    // Each thread owns a stretch of ids, so that places among the ties and the choice follow the order of ids.
    int stretch = (vocab + THREADS - 1) / THREADS, begin = min((int)threadIdx.x * stretch, vocab), end = min(begin + stretch, vocab);
    int own_ties = 0;
    for (int i = begin; i < end; i++) own_ties += key_of(logits[i]) == border;
    tie_counts[threadIdx.x] = own_ties;
    __syncthreads();
    int before = 0;
    for (int t = 0; t < (int)threadIdx.x; t++) before += tie_counts[t];
    double share = 0.0;
    walk(logits, weights, begin, end, border, ties, before, rules.min_p, [&](int i) {
        share += weights[i];
        return false;
    });
    shares[threadIdx.x] = share;
    __syncthreads();
    double total = 0.0, sum = 0.0;
    for (int t = 0; t < THREADS; t++) {
        if (t == (int)threadIdx.x) sum = total;
        total += shares[t];
    }
    // The first token at which the sum passes the target is the choice; the last that stays, if rounding lets none do so.
    double target = rules.uniform * total;
    int last_owner = -1, owner = -1;
    double passed = 0.0;
    for (int t = 0; t < THREADS; t++) {
        passed += shares[t];
        if (shares[t] > 0.0) last_owner = t;
        if (owner < 0 && shares[t] > 0.0 && passed > target) owner = t;
    }
    if (owner < 0) owner = last_owner;
    if (owner != (int)threadIdx.x) return;
    int choice = -1;
    walk(logits, weights, begin, end, border, ties, before, rules.min_p, [&](int i) {
        choice = i;
        sum += weights[i];
        return sum > target;
    });
    tokens[row] = choice;
}
