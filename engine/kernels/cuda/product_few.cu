// A product of up to 8 rows with a weight whose share of each multiprocessor fits its shared memory, as decoding has them: the sums of
// product.cu, bit for bit. An element is one chain of mma as long as the sum is, so all else stands aside: a block has few columns, all
// of them are asked for at once by bulk copies, before the rows are there, and a warp multiplies what has come without waiting for
// another. The rows may be normalised here, as rms_norm.cu does it, and gates may meet what they gate. See product_few.rs.
// From compute capability 9.0 on.
//
// Macros: OUT_F32: the element of out and residual. NORM_WARPS: if not 0, rows are normalised first, and rms_norm.cu has so many warps for
// it. GATED: b has n columns that are gates, then n that they gate, and out = silu(gate) * up. MULTIPLIERS: warps that multiply, 8 columns each.
#include "product_tile.cuh"
#include "rms_norm.cuh"
#include "hopper.cuh"

constexpr int WARPS = 4, THREADS = 32 * WARPS;
// Lines of the weight that a warp multiplies: those of its columns, and if they are gates, after them those of what they gate.
constexpr int LINES = GATED ? 16 : 8, ALL_LINES = LINES * MULTIPLIERS;
// Steps of the sum whose operands are loaded ahead, of which a warp holds two lots; steps that are waited for at once.
constexpr int LOT = 64, GROUP = 2 * LOT, SLAB = 512;

// The operands of LOT steps: 16 lines of the weight, 8 rows.
struct Fragments {
    u32 lines[LOT / 16][4], rows[LOT / 32][4];
};

#if NORM_WARPS > 0
// Normalises row `warp` and every fourth after it, in registers, to shared memory. A warp stands for all warps of rms_norm.cu, since the
// shape of the sum follows from them.
struct Norm {
    // Elements that rms_norm.cu takes at once; if it ever takes more than these of a row, it has all warps that it may have.
    static constexpr int STRIDE = NORM_WARPS * 256;
    static constexpr bool IS_LONG = NORM_WARPS == 16;
    // Whether there is room for the next row while this one is normalised.
    static constexpr bool LOOKS_AHEAD = NORM_WARPS <= 8;
    // Words, since the compiler keeps each 16 bits in a register of their own.
    typedef Pack<u32, 4> Row[NORM_WARPS];

    int depth;
    Row weights;

    __device__ __forceinline__ Norm(const bf16* norm, int m, int depth) : depth(depth) { take(weights, norm, warp_id() < m); }

    // An element of a thread of warp w of rms_norm.cu, the first of its first eight.
    static __device__ __forceinline__ int place(int w) { return (32 * w + lane_id()) * 8; }
    __device__ __forceinline__ void take(Row& to, const bf16* row, bool exists) const {
#pragma unroll
        for (int w = 0; w < NORM_WARPS; w++) {
            to[w] = {};
            if (exists && place(w) < depth) to[w] = load<u32, 4>((const u32*)(row + place(w)));
        }
    }
    static __device__ __forceinline__ Pack<bf16, 8> elements(const Pack<u32, 4>& words) {
        Pack<bf16, 8> pack;
#pragma unroll
        for (int i = 0; i < 8; i++) pack.at[i].bits = (u16)(words.at[i / 2] >> (i % 2 * 16));
        return pack;
    }
    __device__ __forceinline__ void run(bf16* rows, int line_elements, const bf16* x, const bf16* norm, float eps, int m) const {
        Row next;
        if (LOOKS_AHEAD) take(next, x + (i64)warp_id() * depth, warp_id() < m);
#pragma unroll 1
        for (int r = warp_id(); r < m; r += WARPS) {
            const bf16* row = x + (i64)r * depth;
            bf16* to = rows + r * line_elements;
            Row values;
#pragma unroll
            for (int w = 0; w < NORM_WARPS && LOOKS_AHEAD; w++) values[w] = next[w];
            take(LOOKS_AHEAD ? next : values, row + (i64)(LOOKS_AHEAD ? WARPS * depth : 0), !LOOKS_AHEAD || r + WARPS < m);
            // Of 16 warps, of which those that do not exist add nothing.
            float parts[16] = {};
#pragma unroll
            for (int w = 0; w < NORM_WARPS; w++) {
                add_squares(parts[w], elements(values[w]));
#pragma unroll 1
                for (int c = place(w) + STRIDE; IS_LONG && c < depth; c += STRIDE) add_squares(parts[w], load<bf16, 8>(row + c));
            }
#pragma unroll
            for (int by = 16; by > 0; by /= 2)
#pragma unroll
                for (int w = 0; w < NORM_WARPS; w++) parts[w] += __shfl_xor_sync(~0u, parts[w], by);
#pragma unroll
            for (int by = 8; by > 0; by /= 2)
#pragma unroll
                for (int w = 0; w < 8; w++)
                    if (w < by) parts[w] += parts[w + by];
            float scale = inverse_rms(parts[0], eps, depth);
#pragma unroll
            for (int w = 0; w < NORM_WARPS; w++) {
                if (place(w) >= depth) continue;
                Pack<bf16, 8> pack = elements(values[w]);
                normalise(pack, elements(weights[w]), scale);
                store<bf16, 8>(to + place(w), pack);
#pragma unroll 1
                for (int c = place(w) + STRIDE; IS_LONG && c < depth; c += STRIDE) {
                    Pack<bf16, 8> pack = load<bf16, 8>(row + c);
                    normalise(pack, load<bf16, 8>(norm + c), scale);
                    store<bf16, 8>(to + c, pack);
                }
            }
        }
    }
};
#endif

extern "C" __global__ void __launch_bounds__(THREADS) product_few(const bf16* x, const bf16* norm, float eps, const bf16* b, Out* out,
    const Out* residual, const bf16* bias, int m, int n, int depth) {
    DYNAMIC_SHARED(memory);
    // Lines lie an odd number of 16-byte chunks apart, so that eight of them meet different banks; what is beyond `depth` is zero.
    int groups = (depth + GROUP - 1) / GROUP, line_elements = groups * GROUP + 8, slabs = (depth + SLAB - 1) / SLAB;
    u64* barriers = (u64*)memory;
    bf16* columns = (bf16*)(memory + (slabs + 1) / 2 * 16);
    bf16* rows = columns + ALL_LINES * line_elements;
    int left = blockIdx.x * 8 * MULTIPLIERS, warp = __shfl_sync(~0u, warp_id(), 0), lane = lane_id();

    // A phase of each, which ends when all warps have said what they copy and all of it is there.
    if (warp == 0 && elected()) {
#pragma unroll 1
        for (int slab = 0; slab < slabs; slab++) barrier_init(&barriers[slab], WARPS);
        barrier_fence();
    }
    __syncwarp();
    int beyond = depth + lane * 8;
#pragma unroll 1
    for (int line = warp; beyond < groups * GROUP && line < ALL_LINES + m; line += WARPS)
        store<bf16, 8>(columns + line * line_elements + beyond, Pack<bf16, 8>{});
    __syncthreads();
    // A warp copies every fourth line, the first slab of them all first. Lines beyond the last column are not read for any other.
    if (elected()) {
        const bf16* from[ALL_LINES / WARPS];
        bool exists[ALL_LINES / WARPS];
        int lines = 0;
#pragma unroll
        for (int i = 0; i < ALL_LINES / WARPS; i++) {
            int line = i * WARPS + warp, column = left + line / LINES * 8 + line % 8;
            from[i] = b + (i64)(column + (line % LINES < 8 ? 0 : n)) * depth;
            exists[i] = column < n;
            lines += exists[i];
        }
        bf16* to = columns + warp * line_elements;
#pragma unroll 1
        for (int slab = 0; slab < slabs; slab++) {
            int bytes = min(SLAB, depth - slab * SLAB) * 2;
            barrier_expect(&barriers[slab], lines * bytes);
#pragma unroll
            for (int i = 0; i < ALL_LINES / WARPS; i++) {
                if (exists[i]) copy_bulk(to + i * WARPS * line_elements, from[i], bytes, &barriers[slab]);
                from[i] += SLAB;
            }
            to += SLAB;
        }
    }
    __syncwarp();
    // This thread's sums: a column, two rows of it, and the same of what it gates.
    int column = left + warp * 8 + lane / 4, row = 2 * (lane % 4);
    bool writes[2];
#pragma unroll
    for (int e = 0; e < 2; e++) writes[e] = warp < MULTIPLIERS && column < n && row + e < m;
    // Widened at the end: until then nobody waits for them.
    bf16 shift = {};
    Out old[2] = {};
    if (!GATED && bias && writes[0]) shift = bias[column];

#if NORM_WARPS > 0
    Norm norms(norm, m, depth);
    wait_for_earlier();
    norms.run(rows, line_elements, x, norm, eps, m);
#else
    wait_for_earlier();
#pragma unroll 1
    for (int r = 0; r < m; r++) {
        constexpr int AT_ONCE = 4, HOP = THREADS * 8;
#pragma unroll 1
        for (int first = threadIdx.x * 8; first < depth; first += AT_ONCE * HOP) {
            bf16* to = rows + r * line_elements + first;
            const bf16* from = x + (i64)r * depth + first;
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                if (first + i * HOP < depth) copy_async16(to + i * HOP, from + i * HOP, true);
        }
    }
    copy_async_commit();
#endif
#pragma unroll
    for (int e = 0; e < 2; e++)
        if (!GATED && residual && writes[e]) old[e] = residual[(i64)(row + e) * n + column];
    if (NORM_WARPS == 0) copy_async_wait<0>();
    __syncthreads();
    if (warp >= MULTIPLIERS) return;

    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    // The lines are the left operand, twice the same where there are 8 of them; the rows the right one, where those that do not exist are
    // any. An element is made of its own line and row alone.
    int of_eight = lane % 8, matrix = lane / 8;
    const bf16* line_at = columns + (warp * LINES + (GATED ? matrix % 2 * 8 : 0) + of_eight) * line_elements + matrix / 2 * 8;
    const bf16* row_at = rows + min(of_eight, m - 1) * line_elements + matrix * 8;
    auto fetch = [&](Fragments& to, int step) {
#pragma unroll
        for (int i = 0; i < LOT / 32; i++) {
            ldmatrix4(to.rows[i], row_at + step + 32 * i);
            ldmatrix4(to.lines[2 * i], line_at + step + 32 * i);
            ldmatrix4(to.lines[2 * i + 1], line_at + step + 32 * i + 16);
        }
    };
    auto multiply = [&](const Fragments& by) {
#pragma unroll
        for (int i = 0; i < LOT / 16; i++) {
            u32 right_operand[2] = {by.rows[i / 2][i % 2 * 2], by.rows[i / 2][i % 2 * 2 + 1]};
            mma_bf16(sums, by.lines[i], right_operand);
        }
    };
    Fragments even, odd;
    barrier_wait(&barriers[0], 0);
    fetch(even, 0);
#pragma unroll 1
    for (int group = 1; group < groups; group++) {
        fetch(odd, LOT);
        multiply(even);
        if (group % (SLAB / GROUP) == 0) barrier_wait(&barriers[group / (SLAB / GROUP)], 0);
        line_at += GROUP, row_at += GROUP;
        fetch(even, 0);
        multiply(odd);
    }
    fetch(odd, LOT);
    multiply(even);
    multiply(odd);

#pragma unroll
    for (int e = 0; e < 2; e++) {
        if (!writes[e]) continue;
        i64 at = (i64)(row + e) * n + column;
        float value = sums[e];
        if (bias) value += to_float(shift);
        if (residual) value += to_float(old[e]);
        out[at] = GATED ? gated(from_float<Out>(sums[e]), from_float<Out>(sums[2 + e])) : from_float<Out>(value);
    }
}
