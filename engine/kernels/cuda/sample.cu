// The next token of rows of logits: the most likely one, or a draw by weight, with the bits of kernels/cpu/likelihood.rs and the order
// of infer/sampler.rs, so that it does not matter where a token is drawn; or the tokens that filters may keep. A row is cut into blocks
// of BLOCK tokens. See sample.rs.
#include "prelude.cuh"

// Weights that are summed in f32 before f64 takes over, as in kernels/cpu/likelihood.rs.
constexpr int BLOCK = 1024;

// As in sample.rs. A temperature of 0 takes the most likely token.
struct Draw {
    double uniform;
    float temperature;
    int row;
};

// kernels/cpu/exp.rs, of numbers up to 0. Nothing is contracted in this program.
__device__ __forceinline__ float exp_as_host(float x) {
    const float rounder = 12582912.0f;
    x = x < -104.0f ? -104.0f : x;
    float shifted = x * LOG2_E + rounder;
    float power = shifted - rounder;
    float rest = (x - power * 0.693145751953125f) - power * 1.4286068e-6f;
    float tail = 0.0013933734f;
    tail = tail * rest + 0.008363236f;
    tail = tail * rest + 0.041666463f;
    tail = tail * rest + 0.16666576f;
    tail = tail * rest + 0.5f;
    float mantissa = (rest * rest) * tail + rest + 1.0f;
    int exponent = (int)(__float_as_uint(shifted) - __float_as_uint(rounder)), half = exponent >> 1;
    return (mantissa * __uint_as_float((u32)(half + 127) << 23)) * __uint_as_float((u32)(exponent - half + 127) << 23);
}

__device__ __forceinline__ float weight_of(float logit, float largest, float temperature) { return exp_as_host((logit - largest) / temperature); }

// The largest logit of a row from those of its blocks, in each thread; not a number if one of them is not.
__device__ __forceinline__ float largest_of(const float* maxima, int blocks) {
    float largest = -INFINITE;
    int bad = 0;
    for (int i = threadIdx.x; i < blocks; i += blockDim.x) {
        float maximum = maxima[i];
        bad |= maximum != maximum;
        largest = maximum > largest ? maximum : largest;
    }
    bad = block_sum(bad);
    largest = block_max(largest);
    return bad ? __uint_as_float(0x7fc00000u) : largest;
}

// The least of all threads' numbers, each below 2^24, in each thread.
__device__ __forceinline__ int block_least(int value) { return -(int)block_max((float)-value); }

// The largest logit of each block of each draw's row; not a number if a logit is not one, or is infinite. stride: logits of a row,
// of which the first `vocab` may be chosen.
extern "C" __global__ void survey(const float* logits, int stride, int vocab, const Draw* draws, float* maxima) {
    int first = blockIdx.x * BLOCK, end = min(first + BLOCK, vocab);
    logits += (i64)draws[blockIdx.y].row * stride;
    float largest = -INFINITE;
    int bad = 0;
    for (int i = first + threadIdx.x; i < end; i += blockDim.x) {
        float logit = logits[i];
        bad |= !(logit < INFINITE);
        largest = logit > largest ? logit : largest;
    }
    bad = block_sum(bad);
    largest = block_max(largest);
    if (threadIdx.x == 0) maxima[(i64)blockIdx.y * gridDim.x + blockIdx.x] = bad ? __uint_as_float(0x7fc00000u) : largest;
}

// The sum of the weights of each block. A warp is a block; its lanes are those of kernels/cpu/lanes.rs.
extern "C" __global__ void __launch_bounds__(32) weigh(const float* logits, int stride, int vocab, const Draw* draws, const float* maxima, double* sums) {
    Draw draw = draws[blockIdx.y];
    if (draw.temperature == 0.0f) return;
    int first = blockIdx.x * BLOCK, end = min(first + BLOCK, vocab);
    i64 place = (i64)blockIdx.y * gridDim.x;
    float largest = largest_of(maxima + place, gridDim.x);
    logits += (i64)draw.row * stride;
    float sum = 0.0f;
#pragma unroll 8
    for (int i = first + threadIdx.x; i < end; i += 32) sum += weight_of(logits[i], largest, draw.temperature);
    sum = warp_sum(sum);
    if (threadIdx.x == 0) sums[place + blockIdx.x] = (double)sum;
}

// tokens[draw]: the choice; -1 if a logit is not a number or is infinite, or if all are minus infinity.
extern "C" __global__ void __launch_bounds__(256) choose(const float* logits, int stride, int vocab, const Draw* draws, const float* maxima, const double* sums,
    int blocks, int* tokens) {
    __shared__ float weights[BLOCK];
    __shared__ double begun;
    __shared__ int chosen_block;
    Draw draw = draws[blockIdx.x];
    logits += (i64)draw.row * stride, maxima += (i64)blockIdx.x * blocks, sums += (i64)blockIdx.x * blocks;
    float largest = largest_of(maxima, blocks);
    if (!(largest > -INFINITE)) {
        if (threadIdx.x == 0) tokens[blockIdx.x] = -1;
        return;
    }

    // The first of the most likely tokens.
    int block = blocks;
    for (int i = threadIdx.x; i < blocks && block == blocks; i += blockDim.x) {
        if (maxima[i] == largest) block = i;
    }
    block = block_least(block);
    int first = vocab;
    for (int i = block * BLOCK + threadIdx.x; i < min((block + 1) * BLOCK, vocab) && first == vocab; i += blockDim.x) {
        if (logits[i] == largest) first = i;
    }
    first = block_least(first);
    if (draw.temperature == 0.0f) {
        if (threadIdx.x == 0) tokens[blockIdx.x] = first;
        return;
    }

    // The block at which the sum of weights passes the target, then the token in it; additions one after the other, as the host's.
    double target = 0.0;
    if (threadIdx.x == 0) {
        double total = 0.0, below = 0.0;
        for (int i = 0; i < blocks; i++) total += sums[i];
        target = draw.uniform * total;
        int i = 0;
        while (i < blocks && below + sums[i] <= target) below += sums[i++];
        begun = below, chosen_block = i;
    }
    __syncthreads();
    int begin = chosen_block * BLOCK, end = min(begin + BLOCK, vocab);
    for (int i = begin + threadIdx.x; i < end; i += blockDim.x) weights[i - begin] = weight_of(logits[i], largest, draw.temperature);
    __syncthreads();
    if (threadIdx.x != 0) return;
    double within = begun;
    int token = first;
    for (int i = begin; i < end; i++) {
        float weight = weights[i - begin];
        if (!(weight > 0.0f)) continue;
        within += (double)weight;
        token = i;
        if (within > target) break;
    }
    tokens[blockIdx.x] = token;
}

// As in sample.rs.
struct Change {
    double bias, repetition, presence, frequency;
    int id, row, kinds, unused;
};

// Changes logits of single tokens, no two of them the same, each step rounded to f32 as the host does it.
extern "C" __global__ void change(float* logits, int stride, const Change* changes, int count) {
    int index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= count) return;
    Change by = changes[index];
    float* place = logits + (i64)by.row * stride + by.id;
    float logit = *place;
    if (by.kinds & 1) logit = (float)((double)logit + by.bias);
    if (by.kinds & 2) logit = (float)(logit > 0.0f ? (double)logit / by.repetition : (double)logit * by.repetition);
    if (by.kinds & 4) logit = (float)((double)logit - by.presence - by.frequency);
    *place = logit;
}

// Weights by size: bin b has those from 2^-b on that no bin before has, the last all others above 0.
constexpr int BINS = 32;
// Most likely tokens that a draw may have.
constexpr int LIKELY = 2048;
// Words of a draw's result: bin, count and total, then ids, then weights.
constexpr int WORDS = 4 + 2 * LIKELY;

__device__ __forceinline__ int bin_of(float weight) {
    int bin = 127 - (int)(__float_as_uint(weight) >> 23);
    return bin < BINS - 1 ? bin : BINS - 1;
}

// bins[draw][block][bin]: how many weights of a block are in each bin. A warp is a block, each lane counts by itself.
extern "C" __global__ void __launch_bounds__(32) sort_in(const float* logits, int stride, int vocab, const Draw* draws, const float* maxima, int* bins) {
    __shared__ int counts[BINS][32];
    Draw draw = draws[blockIdx.y];
    int begin = blockIdx.x * BLOCK, end = min(begin + BLOCK, vocab), lane = threadIdx.x;
    i64 place = (i64)blockIdx.y * gridDim.x;
    float largest = largest_of(maxima + place, gridDim.x);
    logits += (i64)draw.row * stride;
    for (int bin = 0; bin < BINS; bin++) counts[bin][lane] = 0;
    for (int i = begin + lane; i < end; i += 32) {
        float weight = weight_of(logits[i], largest, draw.temperature);
        if (weight > 0.0f) counts[bin_of(weight)][lane]++;
    }
    __syncthreads();
    int sum = 0;
    for (int other = 0; other < 32; other++) sum += counts[lane][other];
    bins[(place + blockIdx.x) * BINS + lane] = sum;
}

// The last bin up to which a draw's weights fit, where each block's begin, and the sum of all weights; no bin if the first has too many
// already, or if the logits allow no choice. One warp a draw.
extern "C" __global__ void __launch_bounds__(32) pick_bin(const float* maxima, const double* sums, const int* bins, int blocks, int* starts, int* found) {
    __shared__ int counts[BINS];
    __shared__ int last;
    i64 place = (i64)blockIdx.x * blocks;
    maxima += place, sums += place, bins += place * BINS, starts += place, found += (i64)blockIdx.x * WORDS;
    float largest = largest_of(maxima, blocks);
    int lane = threadIdx.x, count = 0;
    for (int block = 0; block < blocks; block++) count += bins[(i64)block * BINS + lane];
    counts[lane] = count;
    __syncthreads();
    if (lane == 0) {
        int bin = -1, all = 0;
        while (largest > -INFINITE && bin + 1 < BINS && all + counts[bin + 1] <= LIKELY) all += counts[++bin];
        double total = 0.0;
        for (int block = 0; block < blocks; block++) total += sums[block];
        found[0] = bin, found[1] = bin < 0 ? 0 : all;
        *(double*)(found + 2) = total;
        last = bin;
    }
    __syncthreads();
    for (int block = lane; block < blocks; block += 32) {
        int own = 0;
        for (int bin = 0; bin <= last; bin++) own += bins[(i64)block * BINS + bin];
        starts[block] = own;
    }
    __syncthreads();
    if (lane != 0) return;
    int before = 0;
    for (int block = 0; block < blocks; block++) {
        int own = starts[block];
        starts[block] = before;
        before += own;
    }
}

// Ids and weights of the tokens in the picked bins, by rising id. A warp is a block, a lane has BLOCK / 32 neighbours.
extern "C" __global__ void __launch_bounds__(32) gather(const float* logits, int stride, int vocab, const Draw* draws, const float* maxima, const int* starts,
    int* found) {
    Draw draw = draws[blockIdx.y];
    i64 place = (i64)blockIdx.y * gridDim.x;
    found += (i64)blockIdx.y * WORDS;
    int last = found[0], lane = threadIdx.x;
    float largest = largest_of(maxima + place, gridDim.x);
    if (last < 0) return;
    logits += (i64)draw.row * stride;
    int begin = blockIdx.x * BLOCK + lane * (BLOCK / 32), end = min(begin + BLOCK / 32, vocab), count = 0;
    for (int i = begin; i < end; i++) {
        float weight = weight_of(logits[i], largest, draw.temperature);
        count += weight > 0.0f && bin_of(weight) <= last;
    }
    int at = count;
    for (int by = 1; by < 32; by *= 2) {
        int other = __shfl_up_sync(~0u, at, by);
        if (lane >= by) at += other;
    }
    at += starts[place + blockIdx.x] - count;
    for (int i = begin; i < end; i++) {
        float weight = weight_of(logits[i], largest, draw.temperature);
        if (!(weight > 0.0f) || bin_of(weight) > last) continue;
        found[4 + at] = i;
        found[4 + LIKELY + at] = (int)__float_as_uint(weight);
        at++;
    }
}
