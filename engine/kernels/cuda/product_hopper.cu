// Products of bf16 matrices by Hopper's wgmma: as product.cu, for many rows. The sum of an element is the same chain of 16 products
// at a time. One warp copies tiles ahead by bulk copies, two warpgroups multiply, 64 rows each; blocks stay and take one tile after
// the other, so that copies for the next tile go on while the last one is written. See product.rs.
//
// Macros: as product.cu, with TILE_ROWS 128 and TILE_COLUMNS 64 to 256.
#include "product_tile.cuh"
#include "hopper.cuh"

constexpr int MULTIPLIERS = 2, THREADS = 128 * (1 + MULTIPLIERS);
constexpr int A_ELEMENTS = tile_elements<TILE_ROWS, A_STRIDED>, B_ELEMENTS = tile_elements<TILE_COLUMNS, B_STRIDED>;
constexpr int STAGE_ELEMENTS = A_ELEMENTS + B_ELEMENTS;
// As many as fit; the launcher counts them alike.
constexpr int STAGES = 224 * 1024 / (2 * STAGE_ELEMENTS);
// Stages that the second warpgroup stays behind the first.
constexpr int LAG = 2;

// The tiles of a block, one after the other: `blocks` apart, groups in their order.
struct Tiles {
    const int* offsets;
    int m, n, depth, groups;
    // The next tile's number among all, of which `before` are of groups before this one.
    int next, before;
    // The tile's group, its first row among all rows, its rows and its steps of the sum.
    int group, base, rows, steps, top, left;

    __device__ __forceinline__ Tiles(const int* offsets, int m, int n, int depth, int groups)
        : offsets(offsets), m(m), n(n), depth(depth), groups(groups), next(blockIdx.x), before(0), group(0) {
        enter_group();
    }
    __device__ __forceinline__ void enter_group() {
        base = 0, rows = m, steps = depth;
        if (GROUPED != 0 && group < groups) {
            base = offsets[group];
            (GROUPED == 1 ? rows : steps) = offsets[group + 1] - base;
        }
    }
    // Moves to the block's next tile, or says that there is none.
    __device__ __forceinline__ bool advance() {
        int columns = (n + TILE_COLUMNS - 1) / TILE_COLUMNS, tiles;
        while (next - before >= (tiles = (rows + TILE_ROWS - 1) / TILE_ROWS * columns)) {
            if (++group >= groups) return false;
            before += tiles;
            enter_group();
        }
        // Blocks that run together take 8 rows of tiles and few columns, which the cache holds.
        int place = next - before, first = place / (8 * columns) * 8, height = min((rows + TILE_ROWS - 1) / TILE_ROWS - first, 8);
        int within = place - first * columns;
        top = (first + within % height) * TILE_ROWS, left = within / height * TILE_COLUMNS;
        next += gridDim.x;
        return true;
    }
    __device__ __forceinline__ int stages() const { return (steps + DEPTH - 1) / DEPTH; }
};

// Transposes words among four neighbouring lanes: word i of lane q becomes word q of lane i.
__device__ __forceinline__ void exchange(u32 (&w)[4]) {
    int q = lane_id() % 4;
#pragma unroll
    for (int by = 1; by <= 2; by *= 2) {
        bool upper = q & by;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & by) continue;
            u32 sent = upper ? w[i] : w[i + by], got = __shfl_xor_sync(~0u, sent, by);
            if (upper) {
                w[i] = got;
            } else {
                w[i + by] = got;
            }
        }
    }
}

// Writes rows of sums in whole chunks of 16 bytes. bf16: of four chunks of 8 columns each lane of four writes one; f32: of two it writes half
// of one. What is added is asked for before it is needed.
template <bool HAS_RESIDUAL> __device__ __forceinline__ void write_chunks(const float (&sums)[TILE_COLUMNS / 2], Out* out, const Out* residual, int row, int m, int n, int left) {
    constexpr int WORDS = sizeof(Out) / 2, TOGETHER = 4 / WORDS, GROUPS = TILE_COLUMNS / 8 / TOGETHER;
    constexpr int BATCH = GROUPS % 8 == 0 ? 8 : GROUPS % 7 == 0 ? 7 : GROUPS % 6 == 0 ? 6 : GROUPS;
    int quad = lane_id() % 4;
    left += WORDS == 1 ? 8 * quad : quad % 2 * 8 + quad / 2 * 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        i64 at = (i64)(row + 8 * half) * n + left;
        // Columns of the row that exist from there on.
        int whole = row + 8 * half < m ? n - left : 0;
#pragma unroll
        for (int batch = 0; batch < GROUPS; batch += BATCH) {
            u32 old[BATCH][4];
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                int column = 8 * TOGETHER * (batch + i);
                uint4 four = make_uint4(0, 0, 0, 0);
                if (HAS_RESIDUAL && column < whole) four = *(const uint4*)(residual + at + column);
                old[i][0] = four.x, old[i][1] = four.y, old[i][2] = four.z, old[i][3] = four.w;
            }
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                int group = batch + i, column = 8 * TOGETHER * group;
                u32 words[4];
                if (WORDS == 1) {
                    if (HAS_RESIDUAL) exchange(old[i]);
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        int sum = 4 * (TOGETHER * group + j % TOGETHER) + 2 * half;
                        float x = sums[sum], y = sums[sum + 1];
                        if (HAS_RESIDUAL) x += __uint_as_float(old[i][j] << 16), y += __uint_as_float(old[i][j] & 0xffff0000u);
                        words[j] = pack_bf16(x, y);
                    }
                    exchange(words);
                } else {
                    int sum = 4 * TOGETHER * group + 2 * half, next = sum + 4 * (TOGETHER - 1);
                    bool odd = quad & 1;
                    float low = __shfl_xor_sync(~0u, odd ? sums[sum] : sums[next], 1);
                    float high = __shfl_xor_sync(~0u, odd ? sums[sum + 1] : sums[next + 1], 1);
                    float four[4] = {odd ? low : sums[sum], odd ? high : sums[sum + 1], odd ? sums[next] : low, odd ? sums[next + 1] : high};
#pragma unroll
                    for (int j = 0; j < 4; j++) words[j] = __float_as_uint(HAS_RESIDUAL ? four[j] + __uint_as_float(old[i][j]) : four[j]);
                }
                if (column < whole) *(uint4*)(out + at + column) = make_uint4(words[0], words[1], words[2], words[3]);
            }
        }
    }
}

// Writes a thread's sums: of rows `row` and `row + 8`, two columns in eight.
__device__ __forceinline__ void write_sums(float (&sums)[TILE_COLUMNS / 2], Out* out, const Out* residual, const bf16* bias, int row, int m, int n, int left) {
    int quad = lane_id() % 4;
    if (n % (16 / (int)sizeof(Out)) == 0 && n % 2 == 0 && is_aligned(out) && is_aligned(residual) && (u64)bias % 4 == 0) {
        if (bias) {
#pragma unroll
            for (int j = 0; j < TILE_COLUMNS / 8; j++) {
                int column = left + 8 * j + 2 * quad;
                u32 pair = column < n ? *(const u32*)(bias + column) : 0;
                float low = __uint_as_float(pair << 16), high = __uint_as_float(pair & 0xffff0000u);
                sums[4 * j] += low, sums[4 * j + 1] += high, sums[4 * j + 2] += low, sums[4 * j + 3] += high;
            }
        }
        if (residual) {
            write_chunks<true>(sums, out, residual, row, m, n, left);
        } else {
            write_chunks<false>(sums, out, residual, row, m, n, left);
        }
        return;
    }
    bool paired = n % 2 == 0 && (u64)out % (2 * sizeof(Out)) == 0 && (u64)residual % (2 * sizeof(Out)) == 0;
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int j = 0; j < TILE_COLUMNS / 8; j++) {
            int column = left + 8 * j + 2 * quad, at = row + 8 * half;
            if (at < m && column < n)
                write_pair(out, residual, bias, (i64)at * n + column, column, n, sums[4 * j + 2 * half], sums[4 * j + 2 * half + 1], paired);
        }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) product(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, Out* out,
    const Out* residual, const bf16* bias, int m, int n, int depth, const int* offsets, int groups, i64 out_group) {
    DYNAMIC_SHARED(memory);
    bf16* stages = (bf16*)memory;
    u64* filled = (u64*)(stages + STAGES * STAGE_ELEMENTS);
    u64* emptied = filled + STAGES;
    if (threadIdx.x == 0) {
#pragma unroll
        for (int stage = 0; stage < STAGES; stage++) {
            barrier_init(filled + stage, 1);
            barrier_init(emptied + stage, 4 * MULTIPLIERS);
        }
        barrier_fence();
    }
    __syncthreads();

    wait_for_earlier();
    Tiles tiles(offsets, m, n, depth, groups);
    // The stage that is next, and the parity of its phase.
    int stage = 0;
    u32 parity = 0;
    auto step_on = [&] {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    };
    if (threadIdx.x >= 128 * MULTIPLIERS) {
        give_registers<40>();
        if (threadIdx.x != 128 * MULTIPLIERS) return;
        while (tiles.advance()) {
            int a_row = (GROUPED == 1 ? tiles.base : 0) + tiles.top, first = GROUPED == 2 ? tiles.base : 0;
            int layer = GROUPED == 1 ? tiles.group : 0;
            for (int step = 0; step < tiles.stages(); step++) {
                int k = first + step * DEPTH;
                bf16* a_tile = stages + stage * STAGE_ELEMENTS;
                bf16* b_tile = a_tile + A_ELEMENTS;
                barrier_wait(emptied + stage, parity ^ 1);
                barrier_expect(filled + stage, STAGE_ELEMENTS * 2);
                if (A_STRIDED) {
#pragma unroll
                    for (int block = 0; block < TILE_ROWS / 64; block++)
                        copy_tile(a_tile + block * BLOCK_ELEMENTS, a, filled + stage, a_row + 64 * block, k, 0);
                } else {
                    copy_tile(a_tile, a, filled + stage, k, a_row, 0);
                }
                if (B_STRIDED) {
#pragma unroll
                    for (int block = 0; block < (TILE_COLUMNS + 63) / 64; block++)
                        copy_tile(b_tile + block * BLOCK_ELEMENTS, b, filled + stage, tiles.left + 64 * block, k, layer);
                } else {
                    copy_tile(b_tile, b, filled + stage, k, tiles.left, layer);
                }
                step_on();
            }
        }
        return;
    }
    take_registers<232>();
    int group_row = threadIdx.x / 128 * 64;
    bool is_late = group_row > 0;
    while (tiles.advance()) {
        // The second warpgroup stays some stages behind the first, and multiplies while that one writes.
        if (is_late && tiles.stages() > LAG) barrier_wait(filled + LAG, 0);
        is_late = false;
        float sums[TILE_COLUMNS / 2];
#pragma unroll
        for (int i = 0; i < TILE_COLUMNS / 2; i++) sums[i] = 0.0f;
        wgmma_hold(sums);
        int last = -1;
        for (int step = 0; step < tiles.stages(); step++) {
            bf16* a_tile = stages + stage * STAGE_ELEMENTS;
            bf16* b_tile = a_tile + A_ELEMENTS;
            barrier_wait(filled + stage, parity);
#if GROUPED == 2
            // Steps beyond the group's last are those of the next one.
            int lines = tiles.steps - step * DEPTH;
            if (lines < DEPTH) {
                int chunks = STAGE_ELEMENTS / 8;
                for (int i = threadIdx.x; i < chunks; i += 128 * MULTIPLIERS) {
                    if (i / 8 % 64 >= lines) *(uint4*)(a_tile + i * 8) = make_uint4(0, 0, 0, 0);
                }
                fence_async_proxy();
                barrier(1, 128 * MULTIPLIERS);
            }
#endif
            wgmma_hold(sums);
            wgmma_fence();
#pragma unroll
            for (int r = 0; r < DEPTH; r += 16)
                wgmma<TILE_COLUMNS, A_STRIDED, B_STRIDED>(sums, describe<A_STRIDED>(a_tile, group_row, r), describe<B_STRIDED>(b_tile, 0, r), 1);
            wgmma_commit();
            // The products of the step before are done, and its stage may be filled again.
            wgmma_wait<1>();
            if (last >= 0 && lane_id() == 0) barrier_arrive(emptied + last);
            last = stage;
            step_on();
        }
        wgmma_wait<0>();
        wgmma_hold(sums);
        if (last >= 0 && lane_id() == 0) barrier_arrive(emptied + last);
        i64 base = GROUPED == 1 ? (i64)tiles.base * n : GROUPED == 2 ? tiles.group * out_group : 0;
        const bf16* own_bias = bias ? bias + (GROUPED == 1 ? (i64)tiles.group * n : 0) : bias;
        int row = tiles.top + group_row + warp_id() % 4 * 16 + lane_id() / 4;
        write_sums(sums, out + base, residual ? residual + base : residual, own_bias, row, tiles.rows, n, tiles.left);
        __syncwarp();
    }
}
