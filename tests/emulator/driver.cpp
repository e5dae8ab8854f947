// The CUDA driver of the emulator: as much of libcuda as the engine calls, on the CPU. A launch runs its blocks one after the
// other and a block's threads as fibers, which give way at barriers and warp functions only. It is strict where a GPU is not:
// - each allocation ends at a page that nobody may touch, is filled with NaN, and is unmapped when freed;
// - shared memory is filled with NaN before each block;
// - an asynchronous copy lands when its group is waited for, not before;
// - a product of a warpgroup reads its operands when its group is waited for, not before;
// - threads that can never meet end the launch with an error that says where they stand;
// - threads run in ascending or in descending order (emulator_set_order), so that a missing barrier shows.
#include <atomic>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <map>
#include <mutex>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

typedef int Result;
enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500, ILLEGAL_ADDRESS = 700, LAUNCH_FAILED = 719 };

static const size_t SHARED_BYTES = 227 * 1024, STACK_BYTES = 64 * 1024, PAGE = 4096;

struct Triple { unsigned x, y, z; };
struct Place { Triple thread, block, block_size, grid_size; };
struct Copy { void* to; const void* from; unsigned bytes, zeros; };
// `rows`: the left operand's rows lane / 4 and lane / 4 + 8, if it came in registers.
struct Product { float* d; int columns; unsigned long long a, b; int add, a_transposed, b_transposed, in_registers; float rows[2][16]; };
enum State { READY, AT_BLOCK, AT_WARP, DONE };
struct Fiber {
    void* sp;
    unsigned char* stack;
    Place place;
    State state;
    unsigned exchanges;
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> groups;
    std::vector<Product> open_products;
    std::vector<std::vector<Product>> product_groups;
};

static std::recursive_mutex mutex;
static std::vector<Fiber> fibers;
static Fiber* current;
static void* scheduler_sp;
static std::vector<unsigned char> exchange;  // [warps][2][32][64]
static unsigned char* shared_memory;
static void (*entry)(void**);
static void** entry_arguments;
static std::string kernel_name, trouble;
static std::atomic<bool> descending;
static unsigned long long launches;

#if defined(__x86_64__)
extern "C" void emu_switch(void** save, void* load);
asm(R"(
.text
.globl emu_switch
.type emu_switch, @function
emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emu_switch, .-emu_switch
)");
#else
#error "the emulator switches fibers by hand on x86-64 only"
#endif

static void yield(State state) {
    current->state = state;
    emu_switch(&current->sp, scheduler_sp);
}

static void fiber_main() {
    entry(entry_arguments);
    yield(DONE);
    abort();
}

// An element of an operand of wgmma in shared memory, with the 128-byte swizzle. Source: PTX ISA, matrix descriptors; the canonical
// layouts as CUTLASS states them (mma_sm90_desc.hpp).
static float operand_element(unsigned long long descriptor, bool transposed, int row, int step) {
    if (descriptor >> 62 != 1) return NAN;
    unsigned place = (descriptor & 0x3fff) << 4, block = (descriptor >> 16 & 0x3fff) << 4, group = (descriptor >> 32 & 0x3fff) << 4;
    unsigned at = transposed ? place + row / 64 * block + row % 64 * 2 + step % 8 * 128 + step / 8 * group
                             : place + row / 8 * group + row % 8 * 128 + step * 2;
    at ^= (at >> 7 & 7) << 4;
    unsigned short bits;
    memcpy(&bits, shared_memory + at, 2);
    unsigned wide = (unsigned)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

// The thread's elements of d: rows 16 warp + lane / 4 (+ 8), columns 8 j + 2 (lane % 4) (+ 1).
static void multiply(const Product& p) {
    unsigned thread = current->place.thread.x % 128, lane = thread % 32;
    for (int i = 0; i < p.columns / 2; i++) {
        int row = thread / 32 * 16 + lane / 4 + (i % 4 >= 2 ? 8 : 0), column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        float sum = p.add ? p.d[i] : 0.0f;
        for (int step = 0; step < 16; step++)
            sum += (p.in_registers ? p.rows[i % 4 / 2][step] : operand_element(p.a, p.a_transposed, row, step)) *
                operand_element(p.b, p.b_transposed, column, step);
        p.d[i] = sum;
    }
}

static void start(Fiber& fiber) {
    void** top = (void**)(fiber.stack + STACK_BYTES);
    *--top = nullptr;                // keeps the stack aligned as after a call
    *--top = (void*)fiber_main;
    for (int i = 0; i < 6; i++) *--top = nullptr;
    fiber.sp = top;
    fiber.state = READY;
    fiber.exchanges = 0;
    fiber.open.clear();
    fiber.groups.clear();
    fiber.open_products.clear();
    fiber.product_groups.clear();
}

extern "C" {
Place* emu_place() { return &current->place; }
void emu_syncthreads() { yield(AT_BLOCK); }
void emu_syncwarp() { yield(AT_WARP); }
void* emu_dynamic_shared() { return shared_memory; }
const unsigned char* emu_warp_exchange(const void* own, size_t bytes) {
    unsigned thread = current->place.thread.x;
    unsigned char* half = exchange.data() + ((size_t)(thread / 32) * 2 + current->exchanges % 2) * 32 * 64;
    memcpy(half + 64 * (thread % 32), own, bytes);
    current->exchanges++;
    yield(AT_WARP);
    return half;
}
void emu_copy_async(void* to, const void* from, unsigned bytes, unsigned zeros) { current->open.push_back({to, from, bytes, zeros}); }
void emu_copy_commit() {
    current->groups.push_back(current->open);
    current->open.clear();
}
void emu_copy_wait(int left) {
    while ((int)current->groups.size() > left) {
        for (auto& copy : current->groups.front()) {
            memcpy(copy.to, copy.from, copy.bytes);
            memset((char*)copy.to + copy.bytes, 0, copy.zeros);
        }
        current->groups.erase(current->groups.begin());
    }
}
unsigned emu_shared_offset(const void* p) { return (const unsigned char*)p - shared_memory; }
void emu_wgmma(float* d, int columns, unsigned long long a, unsigned long long b, int add, int a_transposed, int b_transposed) {
    current->open_products.push_back({d, columns, a, b, add, a_transposed, b_transposed, 0, {}});
}
void emu_wgmma_registers(float* d, int columns, const unsigned* a, unsigned long long b, int add, int b_transposed) {
    Product product = {d, columns, 0, b, add, 0, b_transposed, 1, {}};
    const unsigned char* all = emu_warp_exchange(a, 16);
    for (int half = 0; half < 2; half++)
        for (int step = 0; step < 16; step++) {
            int lane = current->place.thread.x % 32 / 4 * 4 + step % 8 / 2, place = half + 2 * (step >= 8);
            unsigned short bits;
            memcpy(&bits, all + 64 * lane + 4 * place + 2 * (step % 2), 2);
            unsigned wide = (unsigned)bits << 16;
            memcpy(&product.rows[half][step], &wide, 4);
        }
    current->open_products.push_back(product);
}
void emu_wgmma_commit() {
    current->product_groups.push_back(current->open_products);
    current->open_products.clear();
}
void emu_wgmma_wait(int left) {
    while ((int)current->product_groups.size() > left) {
        for (auto& product : current->product_groups.front()) multiply(product);
        current->product_groups.erase(current->product_groups.begin());
    }
}
void emu_trap(const char* why) {
    trouble = why;
    yield(DONE);
    abort();
}
// Test code's: the order in which threads run, and how many launches there were.
void emulator_set_order(int is_descending) { descending = is_descending; }
unsigned long long emulator_launches() { return launches; }
}

static void on_fault(int, siginfo_t* info, void*) {
    char text[512];
    Place p = current ? current->place : Place{};
    int length = snprintf(text, sizeof text, "emulator: kernel %s, block (%u, %u, %u), thread %u touches %p, which is not its own\n",
        kernel_name.c_str(), p.block.x, p.block.y, p.block.z, p.thread.x, info->si_addr);
    if (write(2, text, length) < 0) _exit(3);
    _exit(3);
}

// Lets everyone go on who waits at a barrier that all have reached. Whether anyone could.
static bool release(unsigned count) {
    bool any = false, all_at_block = true;
    for (unsigned i = 0; i < count; i++) all_at_block &= fibers[i].state == AT_BLOCK || fibers[i].state == DONE;
    for (unsigned i = 0; i < count && all_at_block; i++) {
        if (fibers[i].state == AT_BLOCK) fibers[i].state = READY, any = true;
    }
    for (unsigned warp = 0; warp < count / 32; warp++) {
        bool all = true;
        for (unsigned lane = 0; lane < 32; lane++) all &= fibers[warp * 32 + lane].state == AT_WARP;
        for (unsigned lane = 0; lane < 32 && all; lane++) fibers[warp * 32 + lane].state = READY, any = true;
    }
    return any;
}

static Result run_block(unsigned count, bool from_the_end) {
    memset(shared_memory, 0xff, SHARED_BYTES);
    for (unsigned i = 0; i < count; i++) start(fibers[i]);
    while (true) {
        bool ran = false, done = true;
        for (unsigned i = 0; i < count; i++) {
            Fiber& fiber = fibers[from_the_end ? count - 1 - i : i];
            if (fiber.state == READY) {
                current = &fiber;
                emu_switch(&scheduler_sp, fiber.sp);
                current = nullptr;
                ran = true;
                if (!trouble.empty()) return LAUNCH_FAILED;
            }
            done &= fiber.state == DONE;
        }
        if (done) return SUCCESS;
        if (!release(count) && !ran) {
            unsigned at[4] = {};
            for (unsigned i = 0; i < count; i++) at[fibers[i].state]++;
            trouble = "threads that never meet: " + std::to_string(at[AT_BLOCK]) + " wait for the block, " + std::to_string(at[AT_WARP]) +
                " for their warp, " + std::to_string(at[DONE]) + " have ended";
            return LAUNCH_FAILED;
        }
    }
}

struct Module { void* library; };
struct Function { void (*entry)(void**); std::string name; };
struct Mapping { unsigned char* start; size_t bytes; };
static std::map<uint64_t, Mapping> mappings;

extern "C" {
Result cuInit(unsigned) {
    static bool once = [] {
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO;
        sigaction(SIGSEGV, &action, nullptr);
        sigaction(SIGBUS, &action, nullptr);
        return true;
    }();
    return once ? SUCCESS : INVALID_VALUE;
}
Result cuDriverGetVersion(int* version) { *version = 13000; return SUCCESS; }
Result cuDeviceGetCount(int* count) { *count = 1; return SUCCESS; }
Result cuDeviceGet(int* device, int ordinal) { *device = ordinal; return ordinal == 0 ? SUCCESS : INVALID_VALUE; }
Result cuDeviceGetName(char* name, int length, int) { snprintf(name, length, "CUDA emulator"); return SUCCESS; }
Result cuDeviceTotalMem_v2(size_t* bytes, int) { *bytes = (size_t)1 << 32; return SUCCESS; }
Result cuDeviceGetAttribute(int* value, int which, int) {
    switch (which) {
        case 16: *value = 4; return SUCCESS;              // multiprocessors
        case 75: *value = 9; return SUCCESS;              // compute capability
        case 76: *value = 0; return SUCCESS;
        case 97: *value = SHARED_BYTES; return SUCCESS;   // shared memory of a block
        default: return INVALID_VALUE;
    }
}
Result cuDevicePrimaryCtxRetain(void** context, int) { *context = (void*)1; return SUCCESS; }
Result cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
Result cuCtxSetCurrent(void*) { return SUCCESS; }
Result cuStreamCreate(void** stream, unsigned) { *stream = (void*)1; return SUCCESS; }
Result cuStreamSynchronize(void*) { return SUCCESS; }
Result cuStreamDestroy_v2(void*) { return SUCCESS; }
Result cuEventCreate(void** event, unsigned) { *event = (void*)1; return SUCCESS; }
Result cuEventRecord(void*, void*) { return SUCCESS; }
Result cuEventSynchronize(void*) { return SUCCESS; }
Result cuEventDestroy_v2(void*) { return SUCCESS; }
Result cuEventElapsedTime(float* ms, void*, void*) { *ms = 1; return SUCCESS; }
Result cuEventElapsedTime_v2(float* ms, void*, void*) { *ms = 1; return SUCCESS; }

// The end of the allocation, rounded up to 16 bytes, is the end of its last page; the next page belongs to nobody.
Result cuMemAlloc_v2(uint64_t* address, size_t bytes) {
    std::lock_guard guard(mutex);
    size_t rounded = (bytes + 15) / 16 * 16, pages = (rounded + PAGE - 1) / PAGE * PAGE;
    auto start = (unsigned char*)mmap(nullptr, pages + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) return OUT_OF_MEMORY;
    mprotect(start + pages, PAGE, PROT_NONE);
    memset(start, 0xff, pages);
    *address = (uint64_t)(start + pages - rounded);
    mappings[*address] = {start, pages + PAGE};
    return SUCCESS;
}
Result cuMemGetInfo_v2(size_t* free, size_t* total) {
    *free = *total = (size_t)1 << 32;
    return SUCCESS;
}
Result cuMemFree_v2(uint64_t address) {
    std::lock_guard guard(mutex);
    auto found = mappings.find(address);
    if (found == mappings.end()) return INVALID_VALUE;
    munmap(found->second.start, found->second.bytes);
    mappings.erase(found);
    return SUCCESS;
}
Result cuMemAllocHost_v2(void** memory, size_t bytes) { *memory = malloc(bytes); return *memory ? SUCCESS : OUT_OF_MEMORY; }
Result cuMemFreeHost(void* memory) { free(memory); return SUCCESS; }
Result cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void*) { memcpy((void*)to, from, bytes); return SUCCESS; }
Result cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void*) { memcpy(to, (void*)from, bytes); return SUCCESS; }
Result cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void*) { memcpy((void*)to, (void*)from, bytes); return SUCCESS; }
Result cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, void*) { memset((void*)to, value, bytes); return SUCCESS; }

Result cuModuleLoadData(Module** module, const void* image) {
    void* library = dlopen((const char*)image, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        fprintf(stderr, "emulator: %s\n", dlerror());
        return INVALID_VALUE;
    }
    *module = new Module{library};
    return SUCCESS;
}
Result cuModuleUnload(Module* module) { delete module; return SUCCESS; }
Result cuModuleGetFunction(Function** function, Module* module, const char* name) {
    auto found = (void (*)(void**))dlsym(module->library, (std::string("emu_entry_") + name).c_str());
    if (!found) return NOT_FOUND;
    *function = new Function{found, name};
    return SUCCESS;
}
Result cuFuncGetAttribute(int* value, int, Function*) { *value = 0; return SUCCESS; }
Result cuFuncSetAttribute(Function*, int, int value) { return value <= (int)SHARED_BYTES ? SUCCESS : INVALID_VALUE; }

Result cuLaunchKernel(Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
    void*, void** arguments, void**) {
    std::lock_guard guard(mutex);
    if (by != 1 || bz != 1 || bx == 0 || bx > 1024 || bx % 32 != 0 || shared > SHARED_BYTES || gx == 0 || gy == 0 || gz == 0)
        return INVALID_VALUE;
    if (!shared_memory) shared_memory = (unsigned char*)aligned_alloc(1024, 256 * 1024);
    while (fibers.size() < bx) {
        fibers.emplace_back();
        fibers.back().stack = (unsigned char*)mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    }
    exchange.resize((size_t)bx / 32 * 2 * 32 * 64);
    entry = function->entry;
    entry_arguments = arguments;
    kernel_name = function->name;
    trouble.clear();
    launches++;
    // Once for the whole launch: another test may change it meanwhile.
    bool from_the_end = descending;
    for (unsigned z = 0; z < gz; z++)
        for (unsigned y = 0; y < gy; y++)
            for (unsigned x = 0; x < gx; x++) {
                for (unsigned t = 0; t < bx; t++) fibers[t].place = {{t, 0, 0}, {x, y, z}, {bx, 1, 1}, {gx, gy, gz}};
                if (run_block(bx, from_the_end) != SUCCESS) {
                    fprintf(stderr, "emulator: kernel %s, block (%u, %u, %u): %s\n", kernel_name.c_str(), x, y, z, trouble.c_str());
                    return LAUNCH_FAILED;
                }
            }
    return SUCCESS;
}
}
