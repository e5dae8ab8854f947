// What all kernels share: element types, packs of 16 bytes, sums over a warp and a block, and the few instructions that C++ has
// no word for, each behind a function. With EMULATED the functions are those of tests/emulator/shim.h.
#pragma once

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct bf16 {
    u16 bits;
};

#if ELEMENT_BF16
typedef bf16 E;
#else
typedef float E;
#endif

#define INFINITE __uint_as_float(0x7f800000u)
constexpr float LOG2_E = 1.44269504088896340736f;
constexpr float LN_2 = 0.69314718055994530942f;

#ifdef EMULATED
__device__ __forceinline__ u32 pack_bf16(float low, float high) { return emu_to_bf16(low) | (u32)emu_to_bf16(high) << 16; }
__device__ __forceinline__ float fast_exp2(float v) { return exp2f(v); }
__device__ __forceinline__ void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { emu_mma_bf16(d, a, b); }
__device__ __forceinline__ void ldmatrix4(u32 (&out)[4], const void* row) { emu_ldmatrix4(out, row, false); }
__device__ __forceinline__ void ldmatrix4_trans(u32 (&out)[4], const void* row) { emu_ldmatrix4(out, row, true); }
__device__ __forceinline__ void copy_async16(void* to, const void* from, bool valid) { emu_copy_async(to, from, valid ? 16 : 0, valid ? 0 : 16); }
__device__ __forceinline__ void copy_async_commit() { emu_copy_commit(); }
template <int LEFT> __device__ __forceinline__ void copy_async_wait() { emu_copy_wait(LEFT); }
__device__ __forceinline__ void wait_for_earlier() { emu_wait_for_earlier(); }
#else
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

// Two floats rounded to nearest even, the first in the low half.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}
// 2^v to 2 units in the last place; 0 for minus infinity.
__device__ __forceinline__ float fast_exp2(float v) {
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
    return out;
}
// d += a b on the tensor cores: 16 x 16 times 16 x 8, f32 sums.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
// Four 8 x 8 matrices; lane 8 i + r names row r of matrix i, in shared memory, aligned to 16 bytes.
__device__ __forceinline__ void ldmatrix4(u32 (&out)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ __forceinline__ void ldmatrix4_trans(u32 (&out)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
}
// 16 bytes to shared memory, or 16 zero bytes without reading; lands when its group is waited for.
__device__ __forceinline__ void copy_async16(void* to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void copy_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }
// A kernel that is launched so may begin while the one before it still runs (launch.rs). Until it has called this, in each thread, it
// touches nothing; in a captured step of decoding it may read weights and what the step was given. Then the next one may begin, while
// this one runs: so never more than two do. Without a kernel in front that still runs it does nothing.
__device__ __forceinline__ void wait_for_earlier() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
#endif

// The same pointer, of which the compiler knows nothing.
__device__ __forceinline__ float* hidden(float* p) {
#ifndef EMULATED
    asm volatile("" : "+l"(p)::"memory");
#endif
    return p;
}

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(bf16 v) { return __uint_as_float((u32)v.bits << 16); }
template <class T> __device__ __forceinline__ T from_float(float v);
template <> __device__ __forceinline__ float from_float<float>(float v) { return v; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float v) { return bf16{(u16)pack_bf16(v, 0.0f)}; }
// v rounded to T and widened again.
template <class T> __device__ __forceinline__ float rounded(float v) { return to_float(from_float<T>(v)); }
// The f32 master of a weight, of which a bf16 one lacks `rest` (kernels/cpu/adamw.rs).
__device__ __forceinline__ float join(bf16 weight, short rest) { return __uint_as_float(((u32)weight.bits << 16) + (u32)(int)rest); }
__device__ __forceinline__ float join(float weight, short) { return weight; }

// N elements that are read and written at once.
template <class T, int N> struct alignas(sizeof(T) * N) Pack {
    T at[N];
};
template <class T, int N> __device__ __forceinline__ Pack<T, N> load(const T* from) { return *(const Pack<T, N>*)from; }
template <class T, int N> __device__ __forceinline__ void store(T* to, const Pack<T, N>& pack) { *(Pack<T, N>*)to = pack; }
// Elements of 16 bytes.
constexpr int WIDE = 16 / sizeof(E);

// Operands of products lie in shared memory in lines of 128 bytes, whose 16-byte chunks are permuted by the line's number mod 8; 64
// lines are a block.
constexpr int LINE = 64;
constexpr int BLOCK_ELEMENTS = 64 * LINE;

__device__ __forceinline__ bool is_aligned(const void* p) { return (u64)p % 16 == 0; }

__device__ __forceinline__ int lane_id() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_id() { return threadIdx.x / 32; }

template <class T> __device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
    for (int by = 16; by > 0; by /= 2) v += __shfl_xor_sync(~0u, v, by);
    return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
    for (int by = 16; by > 0; by /= 2) {
        float other = __shfl_xor_sync(~0u, v, by);
        v = v > other ? v : other;
    }
    return v;
}
// The sum over the block, in each thread; a tree whose shape depends on the number of threads alone.
template <class T> __device__ __forceinline__ T block_sum(T v) {
    __shared__ T parts[32];
    v = warp_sum(v);
    if (lane_id() == 0) parts[warp_id()] = v;
    __syncthreads();
    v = lane_id() < (int)(blockDim.x / 32) ? parts[lane_id()] : (T)0;
    v = warp_sum(v);
    __syncthreads();
    return v;
}
__device__ __forceinline__ float block_max(float v) {
    __shared__ float parts[32];
    v = warp_max(v);
    if (lane_id() == 0) parts[warp_id()] = v;
    __syncthreads();
    v = lane_id() < (int)(blockDim.x / 32) ? parts[lane_id()] : -INFINITE;
    v = warp_max(v);
    __syncthreads();
    return v;
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
// The gated activation, in f32, rounded once.
template <class T> __device__ __forceinline__ T gated(T gate, T up) {
    float g = to_float(gate);
    return from_float<T>(g * sigmoid(g) * to_float(up));
}
