// A product of up to 8 rows with a weight whose share of each multiprocessor fits its shared memory, as decoding has them: the sums of
// product.cu, bit for bit. An element is one chain of mma as long as the sum is, so all else stands aside: a block has 8 columns, all
// of them are asked for at once, before the rows are there, and one warp multiplies what has come without waiting for another. The
// rows may be normalised here, as rms_norm.cu does it, and gates may meet what they gate. See product_few.rs.
//
// Macros: OUT_F32: the element of out and residual. NORMED: rows are normalised first. GATED: b has n columns that are gates, then n that
// they gate, and out = silu(gate) * up.
#include "product_tile.cuh"
#include "rms_norm.cuh"

constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr int CHAINS = GATED ? 2 : 1, LINES = 8 * CHAINS;
// Steps of the sum between two loads of operands, and between two waits at the least: a warp's copy of a line.
constexpr int STEP = 32, SLAB = 256;
// Groups of copies that are waited for one after the other.
constexpr int GROUPS = 8;

// The operands of STEP steps.
struct Fragments {
    u32 rows[4], columns[CHAINS][4];
};

extern "C" __global__ void __launch_bounds__(THREADS) product_few(const bf16* x, const bf16* norm, float eps, int norm_threads, const bf16* b, Out* out,
    const Out* residual, const bf16* bias, int m, int n, int depth) {
    DYNAMIC_SHARED(memory);
    // Lines lie an odd number of 16-byte chunks apart, so that eight of them meet different banks; what is beyond `depth` is zero.
    int steps = (depth + STEP - 1) / STEP, chunks = steps * (STEP / 8), line_elements = (chunks | 1) * 8;
    bf16* columns = (bf16*)memory;
    bf16* rows = columns + LINES * line_elements;
    bf16* norm_row = rows + m * line_elements;
    // What rows that do not exist are read from.
    bf16* zeros = NORMED ? norm_row + line_elements : norm_row;
    int left = blockIdx.x * 8, warp = warp_id(), lane = lane_id();
    int slabs = (depth + SLAB - 1) / SLAB, slabs_of_group = (slabs + GROUPS - 1) / GROUPS;

    if (warp == 0) {
        for (int group = 0; group < GROUPS; group++) {
            int end = min((group + 1) * slabs_of_group, slabs);
            for (int slab = group * slabs_of_group; slab < end; slab++) {
                int chunk = slab * (SLAB / 8) + lane;
                if (chunk >= chunks) continue;
                const bf16* from = b + (i64)left * depth + chunk * 8;
                bf16* to = columns + chunk * 8;
#pragma unroll
                for (int line = 0; line < LINES; line++) {
                    bool exists = chunk * 8 < depth && left + line % 8 < n;
                    const bf16* at = from + (i64)(line % 8 + (line < 8 ? 0 : n)) * depth;
                    copy_async16(to + line * line_elements, exists ? at : b, exists);
                }
            }
            copy_async_commit();
        }
    } else if (NORMED) {
        for (int c = (threadIdx.x - 32) * 8; c < depth; c += (THREADS - 32) * 8) store<bf16, 8>(norm_row + c, load<bf16, 8>(norm + c));
    }
    if (threadIdx.x < 4) ((u32*)zeros)[threadIdx.x] = 0;
    int row = lane / 4, column = left + 2 * (lane % 4);
    bool writes = warp == 0 && row < m && column < n;
    float shift[2] = {0.0f, 0.0f};
    if (bias && writes) shift[0] = to_float(bias[column]), shift[1] = to_float(bias[column + 1]);

    wait_for_earlier();
    // All that a thread takes of the rows is asked for before the first of it is used.
    for (int r = 0, i = threadIdx.x; r < m;) {
        constexpr int AHEAD = 8;
        Pack<bf16, 8> ahead[AHEAD];
        int to[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            while (i >= chunks) i -= chunks, r++;
            to[j] = r < m ? r * line_elements + i * 8 : -1;
            ahead[j] = {};
            if (r < m && i * 8 < depth) ahead[j] = load<bf16, 8>(x + (i64)r * depth + i * 8);
            i += THREADS;
        }
#pragma unroll
        for (int j = 0; j < AHEAD; j++)
            if (to[j] >= 0) store<bf16, 8>(rows + to[j], ahead[j]);
        while (i >= chunks) i -= chunks, r++;
    }
    Pack<Out, 2> old = {};
    if (residual && writes) old = load<Out, 2>(residual + (i64)row * n + column);
    __syncthreads();
#if NORMED
    // A warp takes a row and stands for as many threads as rms_norm.cu has, since the shape of the sum follows from them.
    for (int r = WARPS - 1 - warp; r < m; r += WARPS) {
        bf16* values = rows + r * line_elements;
        float parts = 0.0f;
#pragma unroll 4
        for (int w = 0; w < norm_threads / 32; w++) {
            float squares = 0.0f;
            for (int c = (32 * w + lane) * 8; c < depth; c += norm_threads * 8) add_squares(squares, load<bf16, 8>(values + c));
            squares = warp_sum(squares);
            if (lane == w) parts = squares;
        }
        float scale = inverse_rms(warp_sum(parts), eps, depth);
#pragma unroll 4
        for (int c = lane * 8; c < depth; c += 256) {
            Pack<bf16, 8> pack = load<bf16, 8>(values + c);
            normalise(pack, load<bf16, 8>(norm_row + c), scale);
            store<bf16, 8>(values + c, pack);
        }
    }
    __syncthreads();
#endif
    if (warp > 0) return;

    float sums[CHAINS][4];
#pragma unroll
    for (int chain = 0; chain < CHAINS; chain++)
#pragma unroll
        for (int e = 0; e < 4; e++) sums[chain][e] = 0.0f;
    int line = lane % 8, matrix = lane / 8;
    const bf16* column_line = columns + line * line_elements + matrix * 8;
    const bf16* row_line = line < m ? rows + line * line_elements + matrix * 8 : zeros;
    int hop = line < m ? STEP : 0;
    auto fetch = [&](Fragments& to, int step) {
        ldmatrix4(to.rows, row_line + step * hop);
#pragma unroll
        for (int chain = 0; chain < CHAINS; chain++) ldmatrix4(to.columns[chain], column_line + chain * 8 * line_elements + step * STEP);
    };
    // Rows of 32 steps: 8 that exist, or may, and 8 that never do.
    auto multiply = [&](const Fragments& by) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 left_operand[4] = {by.rows[2 * half], 0, by.rows[2 * half + 1], 0};
#pragma unroll
            for (int chain = 0; chain < CHAINS; chain++) {
                u32 right_operand[2] = {by.columns[chain][2 * half], by.columns[chain][2 * half + 1]};
                mma_bf16(sums[chain], left_operand, right_operand);
            }
        }
    };
    // Operands are loaded a step ahead of their products, across groups, too.
    Fragments now, next;
    copy_async_wait<GROUPS - 1>();
    __syncwarp();
    fetch(now, 0);
    int step = 0;
    auto run = [&](int group) {
        int end = min((group + 1) * slabs_of_group * (SLAB / STEP), steps);
#pragma unroll 4
        for (; step + 1 < end; step++) {
            fetch(next, step + 1);
            multiply(now);
            now = next;
        }
    };
    auto cross = [&] {
        __syncwarp();
        if (step + 1 >= steps) return;
        fetch(next, step + 1);
        multiply(now);
        now = next;
        step++;
    };
    run(0), copy_async_wait<6>(), cross();
    run(1), copy_async_wait<5>(), cross();
    run(2), copy_async_wait<4>(), cross();
    run(3), copy_async_wait<3>(), cross();
    run(4), copy_async_wait<2>(), cross();
    run(5), copy_async_wait<1>(), cross();
    run(6), copy_async_wait<0>(), cross();
    run(7);
    multiply(now);
    static_assert(GROUPS == 8, "as many waits as groups");

    if (!writes) return;
    Pack<Out, 2> pack;
#pragma unroll
    for (int e = 0; e < 2; e++) {
#if GATED
        pack.at[e] = gated(from_float<Out>(sums[0][e]), from_float<Out>(sums[1][e]));
#else
        float value = sums[0][e];
        if (bias) value += shift[e];
        if (residual) value += to_float(old.at[e]);
        pack.at[e] = from_float<Out>(value);
#endif
    }
    store<Out, 2>(out + (i64)row * n + column, pack);
}
