// Products of bf16 matrices on the tensor cores by mma.sync: out[row][column] = sum over r of a(row, r) b(column, r), in f32.
// Each element is one chain of 16 products at a time from r = 0 on, in one accumulator, whatever the tile: so tiles of 16
// rows (decoding) and of 128 (training) give the same bits. See product.rs.
//
// Macros: A_STRIDED, B_STRIDED: 0 if r runs along memory, 1 if rows (columns) do. OUT_F32: the element of out and residual.
// GROUPED: 0; 1: group z has rows offsets[z]..offsets[z + 1] and its own b; 2: group z sums over those r and has its own out.
// TILE_ROWS: 128, 64 or 16.
#include "prelude.cuh"

#if OUT_F32
typedef float Out;
#else
typedef bf16 Out;
#endif

constexpr int DEPTH = 64;
constexpr int TILE_COLUMNS = TILE_ROWS == 128 ? 128 : 64;
constexpr int STAGES = TILE_ROWS == 128 ? 3 : TILE_ROWS == 64 ? 4 : 6;
constexpr int THREADS = 128;
// Warps side by side: 2 x 2 tiles of a quarter, or 1 x 4 where there are 16 rows.
constexpr int WARP_ROWS = TILE_ROWS == 16 ? 16 : TILE_ROWS / 2;
constexpr int WARP_COLUMNS = TILE_ROWS == 16 ? TILE_COLUMNS / 4 : TILE_COLUMNS / 2;
constexpr int ROW_ATOMS = WARP_ROWS / 16, COLUMN_ATOMS = WARP_COLUMNS / 8;
constexpr int A_ELEMENTS = TILE_ROWS * DEPTH, B_ELEMENTS = TILE_COLUMNS * DEPTH;

// A tile lies in rows of WIDTH elements; the 8-element chunks of a row are permuted so that 8 rows meet different banks.
template <int WIDTH> __device__ __forceinline__ bf16* chunk_at(bf16* tile, int row, int chunk) {
    constexpr int CHUNKS = WIDTH / 8;
    constexpr int MASK = CHUNKS < 8 ? CHUNKS - 1 : 7;
    return tile + row * WIDTH + (chunk ^ (row & MASK)) * 8;
}

// Copies ROWS x WIDTH elements from `from` (rows `stride` apart), zero from row `rows` and column `columns` on.
template <int ROWS, int WIDTH>
__device__ __forceinline__ void load_tile(bf16* tile, const bf16* from, i64 stride, int rows, int columns, bool aligned) {
    constexpr int CHUNKS = WIDTH / 8;
#pragma unroll 4
    for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
        int row = i / CHUNKS, chunk = i % CHUNKS, count = row < rows ? columns - chunk * 8 : 0;
        bf16* to = chunk_at<WIDTH>(tile, row, chunk);
        const bf16* at = from + row * stride + chunk * 8;
        if (aligned) {
            copy_async16(to, count > 0 ? at : from, count > 0);
        } else {
            u32 words[4];
#pragma unroll
            for (int w = 0; w < 4; w++) {
                u32 low = 2 * w < count ? at[2 * w].bits : 0, high = 2 * w + 1 < count ? at[2 * w + 1].bits : 0;
                words[w] = low | high << 16;
            }
            *(uint4*)to = make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
}

// One operand: where it lies and how a stage of it is loaded and read.
template <int TILE, bool STRIDED> struct Operand {
    const bf16* base;
    i64 stride;
    int count;
    bool aligned;

    // Stage r..r + DEPTH; `depth` is where the sum ends.
    __device__ __forceinline__ void load(bf16* tile, int r, int depth) const {
        if (STRIDED) {
            load_tile<DEPTH, TILE>(tile, base + (i64)r * stride, stride, depth - r, count, aligned);
        } else {
            load_tile<TILE, DEPTH>(tile, base + r, stride, count, depth - r, aligned);
        }
    }
    // The registers of 16 rows from `row` on, 16 r from `r` on, as the left operand of mma.
    __device__ __forceinline__ void left(u32 (&out)[4], bf16* tile, int row, int r) const {
        int matrix = lane_id() / 8, line = lane_id() % 8;
        if (STRIDED) {
            ldmatrix4_trans(out, chunk_at<TILE>(tile, r + (matrix >> 1) * 8 + line, row / 8 + (matrix & 1)));
        } else {
            ldmatrix4(out, chunk_at<DEPTH>(tile, row + (matrix & 1) * 8 + line, r / 8 + (matrix >> 1)));
        }
    }
    // The same of 16 columns as two right operands.
    __device__ __forceinline__ void right(u32 (&out)[4], bf16* tile, int column, int r) const {
        int matrix = lane_id() / 8, line = lane_id() % 8;
        if (STRIDED) {
            ldmatrix4_trans(out, chunk_at<TILE>(tile, r + (matrix & 1) * 8 + line, column / 8 + (matrix >> 1)));
        } else {
            ldmatrix4(out, chunk_at<DEPTH>(tile, column + (matrix >> 1) * 8 + line, r / 8 + (matrix & 1)));
        }
    }
};

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

extern "C" __global__ void __launch_bounds__(THREADS, TILE_ROWS == 16 ? 3 : 2) product(const bf16* a, const bf16* b, Out* out, const Out* residual,
    const bf16* bias, int m, int n, int depth, i64 a_stride, i64 b_stride, const int* offsets, i64 b_group, i64 out_group) {
    DYNAMIC_SHARED(memory);
    bf16* a_tiles = (bf16*)memory;
    bf16* b_tiles = a_tiles + STAGES * A_ELEMENTS;

#if GROUPED == 1
    int base = offsets[blockIdx.z];
    m = offsets[blockIdx.z + 1] - base;
    a += (i64)base * a_stride;
    out += (i64)base * n;
    if (residual) residual += (i64)base * n;
    b += blockIdx.z * b_group;
    if (bias) bias += blockIdx.z * n;
#elif GROUPED == 2
    int base = offsets[blockIdx.z];
    depth = offsets[blockIdx.z + 1] - base;
    a += (i64)base * a_stride;
    b += (i64)base * b_stride;
    out += blockIdx.z * out_group;
    if (residual) residual += blockIdx.z * out_group;
#endif

    // Blocks that run together take 8 rows of tiles and few columns, which the cache holds.
    int columns = (n + TILE_COLUMNS - 1) / TILE_COLUMNS, rows = (m + TILE_ROWS - 1) / TILE_ROWS;
    int band = blockIdx.x / (8 * columns), first = band * 8;
    if (first >= rows) return;
    int height = min(rows - first, 8), within = blockIdx.x - band * 8 * columns;
    if (within >= height * columns) return;
    int top = (first + within % height) * TILE_ROWS, left = within / height * TILE_COLUMNS;

    Operand<TILE_ROWS, A_STRIDED> a_operand = {A_STRIDED ? a + top : a + top * a_stride, a_stride, m - top, a_stride % 8 == 0 && is_aligned(a)};
    Operand<TILE_COLUMNS, B_STRIDED> b_operand = {B_STRIDED ? b + left : b + left * b_stride, b_stride, n - left, b_stride % 8 == 0 && is_aligned(b)};
    // A stretch along memory that is no multiple of 8 would be cut inside a chunk.
    a_operand.aligned &= (A_STRIDED ? m : depth) % 8 == 0;
    b_operand.aligned &= (B_STRIDED ? n : depth) % 8 == 0;

    float sums[ROW_ATOMS][COLUMN_ATOMS][4];
#pragma unroll
    for (int i = 0; i < ROW_ATOMS; i++)
#pragma unroll
        for (int j = 0; j < COLUMN_ATOMS; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) sums[i][j][e] = 0.0f;

    int warp = warp_id();
    int warp_row = TILE_ROWS == 16 ? 0 : warp / 2 * WARP_ROWS, warp_column = (TILE_ROWS == 16 ? warp : warp % 2) * WARP_COLUMNS;
    int steps = (depth + DEPTH - 1) / DEPTH;
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) {
        if (stage < steps) {
            a_operand.load(a_tiles + stage * A_ELEMENTS, stage * DEPTH, depth);
            b_operand.load(b_tiles + stage * B_ELEMENTS, stage * DEPTH, depth);
        }
        copy_async_commit();
    }
    for (int step = 0; step < steps; step++) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();
        int next = step + STAGES - 1;
        if (next < steps) {
            a_operand.load(a_tiles + next % STAGES * A_ELEMENTS, next * DEPTH, depth);
            b_operand.load(b_tiles + next % STAGES * B_ELEMENTS, next * DEPTH, depth);
        }
        copy_async_commit();
        bf16* a_tile = a_tiles + step % STAGES * A_ELEMENTS;
        bf16* b_tile = b_tiles + step % STAGES * B_ELEMENTS;
#pragma unroll
        for (int r = 0; r < DEPTH; r += 16) {
            u32 lefts[ROW_ATOMS][4], rights[COLUMN_ATOMS][2];
#pragma unroll
            for (int i = 0; i < ROW_ATOMS; i++) a_operand.left(lefts[i], a_tile, warp_row + 16 * i, r);
#pragma unroll
            for (int j = 0; j < COLUMN_ATOMS; j += 2) {
                u32 four[4];
                b_operand.right(four, b_tile, warp_column + 8 * j, r);
                rights[j][0] = four[0], rights[j][1] = four[1], rights[j + 1][0] = four[2], rights[j + 1][1] = four[3];
            }
#pragma unroll
            for (int i = 0; i < ROW_ATOMS; i++)
#pragma unroll
                for (int j = 0; j < COLUMN_ATOMS; j++) mma_bf16(sums[i][j], lefts[i], rights[j]);
        }
    }

    bool paired = n % 2 == 0 && (u64)out % (2 * sizeof(Out)) == 0 && (u64)residual % (2 * sizeof(Out)) == 0;
#pragma unroll
    for (int i = 0; i < ROW_ATOMS; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = top + warp_row + 16 * i + 8 * half + lane_id() / 4;
            if (row >= m) continue;
#pragma unroll
            for (int j = 0; j < COLUMN_ATOMS; j++) {
                int column = left + warp_column + 8 * j + 2 * (lane_id() % 4);
                if (column < n)
                    write_pair(out, residual, bias, (i64)row * n + column, column, n, sums[i][j][2 * half], sums[i][j][2 * half + 1], paired);
            }
        }
}
