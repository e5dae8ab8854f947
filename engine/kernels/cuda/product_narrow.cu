// A product of up to 8 rows with a weight of few rows, as decoding has them: the sums of product.cu, bit for bit, in tiles of 8
// columns, so that there is a tile for each multiprocessor. An element is one chain of mma as long as the sum is, whatever else is
// done: one warp does nothing but that, and three fetch far ahead of it. See product.rs.
//
// Macros: OUT_F32: the element of out and residual.
#include "product_tile.cuh"

constexpr int ROWS = 8, COLUMNS = 8, FETCHERS = 3;
// Steps of the sum that are fetched together: a line of 32 chunks of 16 bytes, permuted by the line's number mod 8.
constexpr int SLAB = 256;
constexpr int STAGES = 8;
constexpr int STAGE_ELEMENTS = (COLUMNS + ROWS) * SLAB;

// Fetches slab `slab` of the columns, then of the rows.
__device__ __forceinline__ void fetch(bf16* stage, const bf16* a, const bf16* b, int m, int n, int depth, int left, int slab, bool aligned) {
    int chunk = lane_id(), start = slab * SLAB + chunk * 8;
    for (int line = warp_id() - 1; line < COLUMNS + m; line += FETCHERS) {
        bool is_column = line < COLUMNS;
        // Elements of the chunk that exist.
        int whole = is_column && left + line >= n ? 0 : depth - start;
        const bf16* from = (is_column ? b + (i64)(left + line) * depth : a + (i64)(line - COLUMNS) * depth) + start;
        bf16* to = stage + line * SLAB + (chunk ^ (line & 7)) * 8;
        if (aligned) {
            copy_async16(to, whole > 0 ? from : a, whole > 0);
        } else {
            u32 words[4];
#pragma unroll
            for (int w = 0; w < 4; w++) {
                u32 low = 2 * w < whole ? from[2 * w].bits : 0, high = 2 * w + 1 < whole ? from[2 * w + 1].bits : 0;
                words[w] = low | high << 16;
            }
            *(uint4*)to = make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
    copy_async_commit();
}

extern "C" __global__ void __launch_bounds__(32 * (1 + FETCHERS)) product(const bf16* a, const bf16* b, Out* out, const Out* residual,
    const bf16* bias, int m, int n, int depth, i64, i64, const int*, i64, i64) {
    wait_for_earlier();
    DYNAMIC_SHARED(memory);
    bf16* stages = (bf16*)memory;
    // What rows that do not exist are read from.
    u32* zeros = (u32*)(stages + STAGES * STAGE_ELEMENTS);
    if (threadIdx.x < 4) zeros[threadIdx.x] = 0;

    int left = blockIdx.x * COLUMNS, slabs = (depth + SLAB - 1) / SLAB;
    bool aligned = depth % 8 == 0 && is_aligned(a) && is_aligned(b), fetches = warp_id() > 0;
    if (fetches)
        for (int slab = 0; slab < STAGES - 1; slab++) {
            if (slab < slabs) {
                fetch(stages + slab * STAGE_ELEMENTS, a, b, m, n, depth, left, slab, aligned);
            } else {
                copy_async_commit();
            }
        }

    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    int line = lane_id() % 8, matrix = lane_id() / 8;
    for (int slab = 0; slab < slabs; slab++) {
        if (fetches) copy_async_wait<STAGES - 2>();
        __syncthreads();
        if (fetches) {
            int next = slab + STAGES - 1;
            if (next < slabs) {
                fetch(stages + next % STAGES * STAGE_ELEMENTS, a, b, m, n, depth, left, next, aligned);
            } else {
                copy_async_commit();
            }
        } else {
            const bf16* column = stages + slab % STAGES * STAGE_ELEMENTS + line * SLAB;
            const bf16* row = column + COLUMNS * SLAB;
            int steps = min(SLAB, depth - slab * SLAB);
#pragma unroll
            for (int r = 0; r < SLAB; r += 32) {
                if (r >= steps) break;
                // The rows of 32 steps: 8 rows that exist, or may, and 8 that never do.
                u32 rows[4], columns[4];
                int at = ((r / 8 + matrix) ^ line) * 8;
                ldmatrix4(rows, line < m ? (const void*)(row + at) : zeros);
                ldmatrix4(columns, column + at);
                u32 first[4] = {rows[0], 0, rows[1], 0}, second[4] = {rows[2], 0, rows[3], 0};
                u32 first_columns[2] = {columns[0], columns[1]}, second_columns[2] = {columns[2], columns[3]};
                mma_bf16(sums, first, first_columns);
                mma_bf16(sums, second, second_columns);
            }
        }
    }

    int row = lane_id() / 4, column = left + 2 * (lane_id() % 4);
    if (fetches || row >= m || column >= n) return;
    bool paired = n % 2 == 0 && (u64)out % (2 * sizeof(Out)) == 0 && (u64)residual % (2 * sizeof(Out)) == 0;
    write_pair(out, residual, bias, (i64)row * n + column, column, n, sums[0], sums[1], paired);
}
