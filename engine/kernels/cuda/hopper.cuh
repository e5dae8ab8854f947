// Hopper's asynchronous products of a warpgroup (wgmma), its bulk copies and their barriers behind functions. Operands lie in
// shared memory in lines of 128 bytes with the 128-byte swizzle (product_tile.cuh), which is how bulk copies write them.
// With EMULATED the functions are those of tests/emulator/shim.h.
// Source: PTX ISA, asynchronous warpgroup level matrix instructions; mbarrier; cp.async.bulk; cp.async.bulk.tensor.
#pragma once
#include "prelude.cuh"

// A matrix in device memory that tiles are copied from: the driver's CUtensorMap, which tensor_map.rs makes.
struct alignas(64) TensorMap {
    u64 words[16];
};

#ifdef EMULATED
__device__ __forceinline__ void barrier_init(u64* barrier, u32 arrivals) { emu_barrier_init(barrier, arrivals); }
__device__ __forceinline__ void barrier_fence() {}
__device__ __forceinline__ bool elected() { return lane_id() == 0; }
__device__ __forceinline__ void barrier_arrive(u64* barrier) { emu_barrier_arrive(barrier, 0); }
__device__ __forceinline__ void barrier_expect(u64* barrier, u32 bytes) { emu_barrier_arrive(barrier, bytes); }
__device__ __forceinline__ void barrier_wait(u64* barrier, u32 parity) { emu_barrier_wait(barrier, parity); }
__device__ __forceinline__ void copy_tile(void* to, const TensorMap& map, u64* barrier, int x, int y, int z) { emu_copy_tile(to, &map, barrier, x, y, z); }
__device__ __forceinline__ void copy_bulk(void* to, const void* from, u32 bytes, u64* barrier) { emu_copy_bulk(to, from, barrier, bytes); }
template <int REGISTERS> __device__ __forceinline__ void give_registers() {}
template <int REGISTERS> __device__ __forceinline__ void take_registers() {}
__device__ __forceinline__ u32 shared_address(const void* p) { return emu_shared_offset(p); }
__device__ __forceinline__ void fence_async_proxy() {}
__device__ __forceinline__ void wgmma_fence() {}
__device__ __forceinline__ void wgmma_commit() { emu_wgmma_commit(); }
template <int LEFT> __device__ __forceinline__ void wgmma_wait() { emu_wgmma_wait(LEFT); }
template <int N, int A_TRANSPOSED, int B_TRANSPOSED> __device__ __forceinline__ void wgmma(float (&d)[N / 2], u64 a, u64 b, int add) {
    emu_wgmma(d, N, a, b, add, A_TRANSPOSED, B_TRANSPOSED);
}
template <int N, int B_TRANSPOSED> __device__ __forceinline__ void wgmma_registers(float (&d)[N / 8][4], const u32 (&a)[4], u64 b, int add) {
    emu_wgmma_registers(&d[0][0], N, a, b, add, B_TRANSPOSED);
}
#else
// A barrier in shared memory whose phases have so many arrivals each; phases have parity 0, 1, 0 ...
__device__ __forceinline__ void barrier_init(u64* barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Before the barrier of the block after which others use what was initialised.
__device__ __forceinline__ void barrier_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Whether this is the one thread of a warp, all of which asks, that speaks for it: of such a one the compiler knows that it is one.
__device__ __forceinline__ bool elected() {
    u32 is;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}\n" : "=r"(is));
    return is != 0;
}
// Arrives; the phase ends when so many bytes have been copied too.
__device__ __forceinline__ void barrier_expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Waits for the end of the phase of this parity; of a new barrier the phase before the first, of parity 1, has ended.
__device__ __forceinline__ void barrier_wait(u64* barrier, u32 parity) {
    asm volatile("{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra.uni done;\nbra.uni again;\ndone:\n}\n" ::"r"(
                     shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}
// Copies the map's box at element x of row y of matrix z, zeros where there is none. By one thread; lands in the barrier's phase.
__device__ __forceinline__ void copy_tile(void* to, const TensorMap& map, u64* barrier, int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
                 "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
                 : "memory");
}
// Copies so many bytes; they and both addresses are whole 16. By one thread; lands in the barrier's phase.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, u32 bytes, u64* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}
// A warpgroup that needs few registers leaves them to those that need many.
template <int REGISTERS> __device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }
template <int REGISTERS> __device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }

// What was written to shared memory the ordinary way is seen by wgmma after this and a barrier.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }

#define EIGHT(d, i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])

#define REGISTERS_0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define REGISTERS_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define REGISTERS_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define REGISTERS_96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define REGISTERS_112 ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define THIRTY_TWO_FROM(i) EIGHT(d, i), EIGHT(d, i + 8), EIGHT(d, i + 16), EIGHT(d, i + 24)
#define SIXTEEN_FROM(i) EIGHT(d, i), EIGHT(d, i + 8)

// d (+)= a b: 64 x 16 times 16 x N, by the 128 threads of a warpgroup. The registers of d are free again when it is waited for. The
// numbers are those of the operands behind the registers of d: a, b, add and whether a and b are transposed.
template <int N, int A_TRANSPOSED, int B_TRANSPOSED> struct Wgmma;
#define WGMMA(N, REGISTERS, A, B, ADD, A_T, B_T, ...) \
    template <int A_TRANSPOSED, int B_TRANSPOSED> struct Wgmma<N, A_TRANSPOSED, B_TRANSPOSED> { \
        static __device__ __forceinline__ void run(float (&d)[N / 2], u64 a, u64 b, int add) { \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ADD ", 0;\n" \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGISTERS "}, %" #A ", %" #B ", p, 1, 1, %" #A_T ", %" #B_T ";\n}\n" \
                         : __VA_ARGS__ \
                         : "l"(a), "l"(b), "r"(add), "n"(A_TRANSPOSED), "n"(B_TRANSPOSED)); \
        } \
    };
WGMMA(64, REGISTERS_0, 32, 33, 34, 35, 36, THIRTY_TWO_FROM(0))
WGMMA(128, REGISTERS_0 REGISTERS_32, 64, 65, 66, 67, 68, THIRTY_TWO_FROM(0), THIRTY_TWO_FROM(32))
WGMMA(192, REGISTERS_0 REGISTERS_32 REGISTERS_64, 96, 97, 98, 99, 100, THIRTY_TWO_FROM(0), THIRTY_TWO_FROM(32), THIRTY_TWO_FROM(64))
WGMMA(224, REGISTERS_0 REGISTERS_32 REGISTERS_64 REGISTERS_96, 112, 113, 114, 115, 116, THIRTY_TWO_FROM(0), THIRTY_TWO_FROM(32),
    THIRTY_TWO_FROM(64), SIXTEEN_FROM(96))
WGMMA(256, REGISTERS_0 REGISTERS_32 REGISTERS_64 REGISTERS_96 REGISTERS_112, 128, 129, 130, 131, 132, THIRTY_TWO_FROM(0), THIRTY_TWO_FROM(32),
    THIRTY_TWO_FROM(64), THIRTY_TWO_FROM(96))
template <int N, int A_TRANSPOSED, int B_TRANSPOSED> __device__ __forceinline__ void wgmma(float (&d)[N / 2], u64 a, u64 b, int add) {
    Wgmma<N, A_TRANSPOSED, B_TRANSPOSED>::run(d, a, b, add);
}

#define FOUR(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])

template <int N, int B_TRANSPOSED> struct WgmmaRegisters;
template <int B_TRANSPOSED> struct WgmmaRegisters<64, B_TRANSPOSED> {
    static __device__ __forceinline__ void run(float (&d)[8][4], const u32 (&a)[4], u64 b, int add) {
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
                     "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
                     "}, {%32,%33,%34,%35}, %36, p, 1, 1, %38;\n}\n"
                     : FOUR(d[0]), FOUR(d[1]), FOUR(d[2]), FOUR(d[3]), FOUR(d[4]), FOUR(d[5]), FOUR(d[6]), FOUR(d[7])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(B_TRANSPOSED));
    }
};
template <int B_TRANSPOSED> struct WgmmaRegisters<128, B_TRANSPOSED> {
    static __device__ __forceinline__ void run(float (&d)[16][4], const u32 (&a)[4], u64 b, int add) {
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
                     "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
                     "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
                     "}, {%64,%65,%66,%67}, %68, p, 1, 1, %70;\n}\n"
                     : FOUR(d[0]), FOUR(d[1]), FOUR(d[2]), FOUR(d[3]), FOUR(d[4]), FOUR(d[5]), FOUR(d[6]), FOUR(d[7]), FOUR(d[8]), FOUR(d[9]), FOUR(d[10]), FOUR(d[11]), FOUR(d[12]), FOUR(d[13]), FOUR(d[14]), FOUR(d[15])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(B_TRANSPOSED));
    }
};
// The same with the left operand in registers, as mma has them: warp w of the warpgroup holds rows 16 w and on.
template <int N, int B_TRANSPOSED> __device__ __forceinline__ void wgmma_registers(float (&d)[N / 8][4], const u32 (&a)[4], u64 b, int add) {
    WgmmaRegisters<N, B_TRANSPOSED>::run(d, a, b, add);
}
#endif

// Keeps the compiler from moving sums or what is done with them past this place. Without it before and after products it may find that
// their registers are in use between them, and lets each wait for the one before.
template <int N> __device__ __forceinline__ void wgmma_hold(float (&d)[N]) {
#ifndef EMULATED
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
#endif
}
template <int N> __device__ __forceinline__ void wgmma_hold(float (&d)[N][4]) {
#ifndef EMULATED
#pragma unroll
    for (int j = 0; j < N; j++) asm volatile("" : FOUR(d[j])::"memory");
#endif
}

// Names an operand: its place, the distance of its blocks of 64 rows (if strided) and of its groups of 8 lines, in bytes.
__device__ __forceinline__ u64 operand_descriptor(const void* place, u32 block_bytes, u32 group_bytes) {
    return (u64)((shared_address(place) & 0x3ffff) >> 4) | (u64)(block_bytes >> 4) << 16 | (u64)(group_bytes >> 4) << 32 | (u64)1 << 62;
}

// 16 steps of the sum from `step` on, rows from `row` on, of an operand in lines. Not strided: a line is a row and 64 steps.
// Strided: a line is a step and 64 rows, and 64 lines are a block.
template <bool STRIDED> __device__ __forceinline__ u64 describe(const bf16* tile, int row, int step) {
    if (STRIDED) return operand_descriptor(tile + row / 64 * BLOCK_ELEMENTS + step * LINE, BLOCK_ELEMENTS * 2, 8 * LINE * 2);
    return operand_descriptor(tile + row * LINE + step, 16, 8 * LINE * 2);
}

// What attention's derivative needs besides: products of 64 columns that start a sum or whose operands both lie in rows in shared
// memory, barriers of some warpgroups, copies of single numbers. A product that starts a sum does not name what its registers held:
// zeros written there while another product is in flight would make the assembler let the products run one by one.
#ifdef EMULATED
template <bool STARTS> __device__ __forceinline__ void wgmma_rows(float (&d)[8][4], u64 a, u64 b) { emu_wgmma(&d[0][0], 64, a, b, !STARTS, 0, 0); }
template <bool STARTS> __device__ __forceinline__ void wgmma_registers_rows(float (&d)[8][4], const u32 (&a)[4], u64 b) {
    emu_wgmma_registers(&d[0][0], 64, a, b, !STARTS, 0);
}
__device__ __forceinline__ void barrier(int id, int threads) { emu_barrier(id, threads); }
__device__ __forceinline__ void copy_async4(void* to, const void* from) { emu_copy_async(to, from, 4, 0); }
#else
#define FOUR_NEW(d) "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
#define THIRTY_TWO(d) FOUR(d[0]), FOUR(d[1]), FOUR(d[2]), FOUR(d[3]), FOUR(d[4]), FOUR(d[5]), FOUR(d[6]), FOUR(d[7])
#define THIRTY_TWO_NEW(d) \
    FOUR_NEW(d[0]), FOUR_NEW(d[1]), FOUR_NEW(d[2]), FOUR_NEW(d[3]), FOUR_NEW(d[4]), FOUR_NEW(d[5]), FOUR_NEW(d[6]), FOUR_NEW(d[7])
#define WGMMA_64 \
    "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "

// d = a b, or d += a b: 64 x 16 times 16 x 64.
template <bool STARTS> __device__ __forceinline__ void wgmma_rows(float (&d)[8][4], u64 a, u64 b) {
    if (STARTS) {
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n" WGMMA_64 "%32, %33, p, 1, 1, 0, 0;\n}\n" : THIRTY_TWO_NEW(d) : "l"(a), "l"(b));
    } else {
        asm volatile("{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n" WGMMA_64 "%32, %33, p, 1, 1, 0, 0;\n}\n" : THIRTY_TWO(d) : "l"(a), "l"(b));
    }
}
template <bool STARTS> __device__ __forceinline__ void wgmma_registers_rows(float (&d)[8][4], const u32 (&a)[4], u64 b) {
    if (STARTS) {
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n" WGMMA_64 "{%32,%33,%34,%35}, %36, p, 1, 1, 0;\n}\n"
                     : THIRTY_TWO_NEW(d)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    } else {
        asm volatile("{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n" WGMMA_64 "{%32,%33,%34,%35}, %36, p, 1, 1, 0;\n}\n"
                     : THIRTY_TWO(d)
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    }
}
// Barrier `id`, 1 to 15, of so many threads: whole warps.
__device__ __forceinline__ void barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
// 4 bytes to shared memory, as copy_async16.
__device__ __forceinline__ void copy_async4(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
#endif
// An operand that lies so many elements, whole 16 bytes, further on: an addition, where describe would compute it anew.
__device__ __forceinline__ u64 further(u64 descriptor, int elements) {
    return (descriptor >> 32 << 32) | ((u32)descriptor + (u32)(elements / 8));
}
