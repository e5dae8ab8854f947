// What a kernel's source means on the emulator: the words of CUDA C++ that the kernels use, for a C++ compiler. A CUDA thread
// is a fiber; the functions emu_* are the driver's (driver.cpp). The warp instructions that prelude.cuh wraps are here as well.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstring>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __shared__ static
#define __constant__ static const
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

struct uint3_ { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

extern "C" {
struct EmuPlace { uint3_ thread, block, block_size, grid_size; };
EmuPlace* emu_place();
void emu_syncthreads();
// bar.sync: waits until `threads` threads wait at barrier `id`.
void emu_barrier(int id, int threads);
// Gives `bytes` (at most 64) of this lane to its warp and waits for the others; the answer holds 64 bytes of each lane.
const unsigned char* emu_warp_exchange(const void* own, size_t bytes);
void emu_syncwarp();
void* emu_dynamic_shared();
void emu_copy_async(void* to, const void* from, unsigned bytes, unsigned zeros);
void emu_copy_commit();
void emu_copy_wait(int groups_left);
void emu_wait_for_earlier();
unsigned emu_shared_offset(const void* p);
void emu_wgmma(float* d, int columns, unsigned long long a, unsigned long long b, int add, int a_transposed, int b_transposed);
void emu_wgmma_registers(float* d, int columns, const unsigned* a, unsigned long long b, int add, int b_transposed);
void emu_wgmma_commit();
void emu_wgmma_wait(int groups_left);
void emu_barrier_init(void* barrier, unsigned count);
void emu_barrier_arrive(void* barrier, unsigned bytes);
void emu_barrier_wait(void* barrier, unsigned parity);
void emu_copy_tile(void* to, const void* map, void* barrier, int x, int y, int z);
void emu_copy_bulk(void* to, const void* from, void* barrier, unsigned bytes);
[[noreturn]] void emu_trap(const char* why);
}

#define threadIdx (emu_place()->thread)
#define blockIdx (emu_place()->block)
#define blockDim (emu_place()->block_size)
#define gridDim (emu_place()->grid_size)
#define DYNAMIC_SHARED(name) unsigned char* name = (unsigned char*)emu_dynamic_shared()

static inline void __syncthreads() { emu_syncthreads(); }
static inline void __syncwarp(unsigned = ~0u) { emu_syncwarp(); }
static inline void __trap() { emu_trap("__trap"); }
static inline void __threadfence() {}

static inline unsigned emu_lane() { return threadIdx.x % 32; }

template <class T> static inline T emu_shuffle(T value, unsigned from) {
    static_assert(sizeof(T) <= 8, "shuffles move 8 bytes at most");
    const unsigned char* all = emu_warp_exchange(&value, sizeof(T));
    T out;
    std::memcpy(&out, all + 64 * (from & 31), sizeof(T));
    return out;
}
static inline void emu_full(unsigned mask) { if (mask != ~0u) emu_trap("a warp function with a partial mask"); }
template <class T> static inline T __shfl_xor_sync(unsigned mask, T value, int by) { emu_full(mask); return emu_shuffle(value, emu_lane() ^ by); }
template <class T> static inline T __shfl_sync(unsigned mask, T value, int from) { emu_full(mask); return emu_shuffle(value, from); }
template <class T> static inline T __shfl_up_sync(unsigned mask, T value, int by) {
    emu_full(mask);
    return emu_shuffle(value, (int)emu_lane() >= by ? emu_lane() - by : emu_lane());
}
static inline unsigned __ballot_sync(unsigned mask, int predicate) {
    emu_full(mask);
    const unsigned char* all = emu_warp_exchange(&predicate, 4);
    unsigned out = 0;
    for (int lane = 0; lane < 32; lane++) {
        int other;
        std::memcpy(&other, all + 64 * lane, 4);
        out |= (other != 0 ? 1u : 0u) << lane;
    }
    return out;
}
static inline int __popc(unsigned v) { return __builtin_popcount(v); }
static inline int __ffs(unsigned v) { return __builtin_ffs((int)v); }

static inline unsigned __float_as_uint(float v) { unsigned out; std::memcpy(&out, &v, 4); return out; }
static inline float __uint_as_float(unsigned v) { float out; std::memcpy(&out, &v, 4); return out; }
static inline unsigned long long __double_as_longlong(double v) { unsigned long long out; std::memcpy(&out, &v, 8); return out; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }
template <class T> static inline T min(T a, T b) { return b < a ? b : a; }
template <class T> static inline T max(T a, T b) { return a < b ? b : a; }

static inline unsigned short emu_to_bf16(float value) {
    unsigned bits = __float_as_uint(value);
    if (value != value) return (unsigned short)((bits >> 16) | 0x40);
    return (unsigned short)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
static inline float emu_from_bf16(unsigned short bits) { return __uint_as_float((unsigned)bits << 16); }

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32: each lane gives its 4 + 2 registers and computes its 4 elements.
// Source: PTX ISA, matrix fragments for mma.m16n8k16.
static inline void emu_mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    unsigned own[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    const unsigned char* all = emu_warp_exchange(own, sizeof own);
    auto half_of = [&](int lane, int reg, int half) {
        unsigned short bits;
        std::memcpy(&bits, all + 64 * lane + 4 * reg + 2 * half, 2);
        return emu_from_bf16(bits);
    };
    int lane = emu_lane();
    for (int i = 0; i < 4; i++) {
        int row = lane / 4 + (i >= 2 ? 8 : 0), column = 2 * (lane % 4) + i % 2;
        float sum = d[i];
        for (int k = 0; k < 16; k++) {
            float left = half_of(row % 8 * 4 + k % 8 / 2, (row >= 8) + 2 * (k >= 8), k % 2);
            float right = half_of(column * 4 + k % 8 / 2, 4 + (k >= 8), k % 2);
            sum += left * right;
        }
        d[i] = sum;
    }
}

// ldmatrix.sync.aligned.m8n8.x4[.trans].shared.b16: lane 8 i + r names row r of matrix i.
static inline void emu_ldmatrix4(unsigned (&out)[4], const void* row, bool transposed) {
    if ((size_t)row % 16 != 0) emu_trap("ldmatrix: a row that is not aligned to 16 bytes");
    const unsigned char* all = emu_warp_exchange(&row, sizeof row);
    int lane = emu_lane();
    for (int matrix = 0; matrix < 4; matrix++) {
        unsigned word = 0;
        for (int half = 0; half < 2; half++) {
            int r = transposed ? 2 * (lane % 4) + half : lane / 4, c = transposed ? lane / 4 : 2 * (lane % 4) + half;
            const unsigned short* values;
            std::memcpy(&values, all + 64 * (8 * matrix + r), sizeof values);
            word |= (unsigned)values[c] << (16 * half);
        }
        out[matrix] = word;
    }
    // The instruction has read its rows before any lane goes on.
    emu_syncwarp();
}

// Calls a kernel with the pointers that a launch holds.
template <class... A, size_t... I> static inline void emu_apply(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*(std::remove_reference_t<A>*)arguments[I]...);
}
template <class... A> static inline void emu_call(void (*kernel)(A...), void** arguments) {
    emu_apply(kernel, arguments, std::index_sequence_for<A...>{});
}
// Copies the arguments of a launch that is captured, as many bytes of each as it has, to places of 128 bytes. How many they are.
template <class... A> static inline int emu_keep(void (*)(A...), void** arguments, unsigned char* places) {
    int count = 0;
    ((std::memcpy(places + 128 * count, arguments[count], sizeof(A)), count++), ...);
    static_assert(((sizeof(A) <= 128) && ...), "arguments of kernels have 128 bytes at most");
    return count;
}
