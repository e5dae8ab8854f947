// How the operands of a bf16 product reach shared memory, for product.cu and product_hopper.cu alike.
// A tile is made of lines of 64 elements (128 bytes). If the sum runs along memory, a line is a row of the operand and 64 steps of
// the sum; if not, a line is one step of the sum and 64 rows, and 64 lines make a block. The eight 16-byte chunks of line q are
// permuted by q mod 8, which is what Hopper calls the 128-byte swizzle, and lets eight lines be read without bank conflicts.
#pragma once
#include "prelude.cuh"

constexpr int DEPTH = 64;

// Elements of a tile of TILE rows.
template <int TILE, bool STRIDED> constexpr int tile_elements = STRIDED ? (TILE + 63) / 64 * BLOCK_ELEMENTS : TILE * LINE;

template <int TILE, bool STRIDED, int THREADS> struct Operand {
    // Lines that all threads copy at once, eight threads a line; a multiple of 8, so that a thread's permutation is one number.
    static constexpr int STEP = THREADS / 8;
    static constexpr int LINES = tile_elements<TILE, STRIDED> / LINE;
    static constexpr int PASSES = (LINES + STEP - 1) / STEP;

    // The thread's first chunk of the next stage.
    const bf16* from;
    i64 stride;
    // Rows of the operand from the tile's first on, and steps of the sum that are left.
    int count, left;
    bool aligned;

    // `base`: the operand's row `top`, step 0. `length`: extent along memory, which must be whole chunks to be copied as such.
    __device__ __forceinline__ Operand(const bf16* origin, i64 stride, int top, int rows, int depth)
        : stride(stride), count(rows - top), left(depth) {
        aligned = stride % 8 == 0 && is_aligned(origin) && (STRIDED ? rows : depth) % 8 == 0;
        int line = threadIdx.x / 8, chunk = threadIdx.x % 8;
        from = origin + (STRIDED ? line * stride + top + chunk * 8 : (top + line) * stride + chunk * 8);
    }

    // Copies the next stage.
    __device__ __forceinline__ void load(bf16* tile) {
        int line = threadIdx.x / 8, chunk = threadIdx.x % 8;
        bf16* to = tile + line * LINE + (chunk ^ (line & 7)) * 8;
        i64 hop = STEP * stride;
        const bf16* at = from;
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) {
            int q = line + pass * STEP;
            if (LINES % STEP == 0 || q < LINES) {
                int block = STRIDED ? pass * STEP / 64 : 0;
                // Elements of the chunk that exist.
                int whole = STRIDED ? (line + pass * STEP % 64 < left ? count - block * 64 - chunk * 8 : 0) : (q < count ? left - chunk * 8 : 0);
                if (aligned) {
                    copy_async16(to, whole > 0 ? at : (const bf16*)from, whole > 0);
                } else {
                    u32 words[4];
#pragma unroll
                    for (int w = 0; w < 4; w++) {
                        u32 low = 2 * w < whole ? at[2 * w].bits : 0, high = 2 * w + 1 < whole ? at[2 * w + 1].bits : 0;
                        words[w] = low | high << 16;
                    }
                    *(uint4*)to = make_uint4(words[0], words[1], words[2], words[3]);
                }
            }
            to += STEP * LINE;
            // The next block lies 64 rows further and begins again at the first step.
            if (STRIDED && (pass + 1) * STEP % 64 == 0) {
                at = from + ((pass + 1) * STEP / 64) * 64;
            } else {
                at += hop;
            }
        }
        from += STRIDED ? DEPTH * stride : (i64)DEPTH;
        left -= DEPTH;
    }

    // Where the 8 elements lie that belong to (row, step..step + 7), or to (row..row + 7, step) if strided.
    static __device__ __forceinline__ const bf16* chunk_at(const bf16* tile, int row, int step) {
        if (STRIDED) return tile + row / 64 * BLOCK_ELEMENTS + step * LINE + ((row % 64 / 8) ^ (step & 7)) * 8;
        return tile + row * LINE + ((step / 8) ^ (row & 7)) * 8;
    }
    // The registers of 16 rows, 16 steps, as the left operand of mma.
    static __device__ __forceinline__ void left_operand(u32 (&out)[4], const bf16* tile, int row, int step) {
        int matrix = lane_id() / 8, line = lane_id() % 8;
        if (STRIDED) {
            ldmatrix4_trans(out, chunk_at(tile, row + (matrix & 1) * 8, step + (matrix >> 1) * 8 + line));
        } else {
            ldmatrix4(out, chunk_at(tile, row + (matrix & 1) * 8 + line, step + (matrix >> 1) * 8));
        }
    }
    // The same as two right operands, of 8 rows each.
    static __device__ __forceinline__ void right_operands(u32 (&out)[4], const bf16* tile, int row, int step) {
        int matrix = lane_id() / 8, line = lane_id() % 8;
        if (STRIDED) {
            ldmatrix4_trans(out, chunk_at(tile, row + (matrix >> 1) * 8, step + (matrix & 1) * 8 + line));
        } else {
            ldmatrix4(out, chunk_at(tile, row + (matrix >> 1) * 8 + line, step + (matrix & 1) * 8));
        }
    }
};

// A place in the grid of tiles. Blocks that run together take 8 rows of tiles and few columns, which the cache holds.
struct TilePlace {
    int top, left;
    bool inside;

    __device__ __forceinline__ TilePlace(int m, int n, int tile_rows, int tile_columns) {
        int columns = (n + tile_columns - 1) / tile_columns, rows = (m + tile_rows - 1) / tile_rows;
        int band = blockIdx.x / (8 * columns), first = band * 8, height = min(rows - first, 8), within = blockIdx.x - band * 8 * columns;
        inside = height > 0 && within < height * columns;
        top = inside ? (first + within % height) * tile_rows : 0;
        left = inside ? within / height * tile_columns : 0;
    }
};

#if OUT_F32
typedef float Out;
#else
typedef bf16 Out;
#endif

// Writes two elements side by side of row `at / n`.
__device__ __forceinline__ void write_pair(Out* out, const Out* residual, const bf16* bias, i64 at, int column, int n, float x, float y, bool paired) {
    if (bias) {
        x += to_float(bias[column]);
        if (column + 1 < n) y += to_float(bias[column + 1]);
    }
    if (paired) {
        if (residual) {
            Pack<Out, 2> old = load<Out, 2>(residual + at);
            x += to_float(old.at[0]), y += to_float(old.at[1]);
        }
        Pack<Out, 2> pack;
        pack.at[0] = from_float<Out>(x), pack.at[1] = from_float<Out>(y);
        store<Out, 2>(out + at, pack);
        return;
    }
    out[at] = from_float<Out>(residual ? x + to_float(residual[at]) : x);
    if (column + 1 < n) out[at + 1] = from_float<Out>(residual ? y + to_float(residual[at + 1]) : y);
}
