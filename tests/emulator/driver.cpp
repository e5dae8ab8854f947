// The CUDA driver of the emulator: as much of libcuda as the engine calls, on the CPU. A launch runs its blocks one after the
// other and a block's threads as fibers, which give way at barriers and warp functions only. It is strict where a GPU is not:
// - a stream does what it was asked for when somebody waits for it (the host, or by an event another stream that somebody waits
//   for), and not before: what lacks an event comes too early or too late, and memory of the host that changes meanwhile shows;
// - each allocation ends at a page that nobody may touch, is filled with NaN, and is unmapped when freed;
// - shared memory is filled with NaN before each block;
// - an asynchronous copy lands when its group is waited for, not before;
// - a product of a warpgroup reads its operands when its group is waited for, not before;
// - a bulk copy lands when its barrier is waited for if threads run in ascending order, and at once if in descending order;
// - a kernel that may begin before the one in front has ended must wait for that in each thread, and what it copies before must not be
//   written by its graph;
// - while a stream is captured its work is kept, not done, and what a driver refuses then is refused: waiting for the stream, asking
//   for memory or freeing it (unless the thread's mode is relaxed), loading a module, copies of pageable host memory;
// - threads that can never meet end the launch with an error that says where they stand;
// - with EMULATOR_LOSES=launch:N or copy:N in the environment the device is lost at the N-th launch of a kernel, or copy to or from the
//   host, with file:PATH at the first of both when there is such a file: waiting for it says so, and all calls after that;
// - threads run in ascending or in descending order (emulator_set_order), so that a missing barrier shows.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <dlfcn.h>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

typedef int Result;
enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500, ILLEGAL_ADDRESS = 700, LAUNCH_FAILED = 719,
    CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, CAPTURE_UNMATCHED = 903, CAPTURE_ISOLATION = 905, CAPTURE_WRONG_THREAD = 908 };

static const size_t SHARED_BYTES = 227 * 1024, STACK_BYTES = 64 * 1024, PAGE = 4096;

struct Triple { unsigned x, y, z; };
struct Place { Triple thread, block, block_size, grid_size; };
struct Copy { void* to; const void* from; unsigned bytes, zeros; };
// `rows`: the left operand's rows lane / 4 and lane / 4 + 8, if it came in registers.
struct Product { float* d; int columns; unsigned long long a, b; int add, a_transposed, b_transposed, in_registers; float rows[2][16]; };
// A barrier of Hopper in 8 bytes of shared memory: arrivals of a phase, those that lack, bytes that lack times two, and the phase's parity.
struct Barrier { short count, pending; int bytes_and_phase; };
struct BulkCopy { Barrier* barrier; std::function<void()> land; int bytes; };
// What a CUtensorMap holds: where a tensor of 2-byte elements lies, its sizes and strides, innermost first, and the box that is copied.
struct TensorMap { unsigned long long address, dims[3], strides[2]; unsigned box[3]; };
enum State { READY, AT_BLOCK, AT_WARP, AT_BARRIER, AT_NAMED, DONE };
struct Fiber {
    void* sp;
    unsigned char* stack;
    Place place;
    State state;
    unsigned exchanges;
    // What it waits for: a barrier's phase of this parity, or a barrier with a number, of so many threads.
    Barrier* barrier;
    unsigned parity;
    int name, name_count;
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> groups;
    std::vector<Product> open_products;
    std::vector<std::vector<Product>> product_groups;
    // Whether it has waited for the kernel in front of its own.
    bool waited;
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
// What the kernels of a graph read before they waited for those in front of them, of those that need not wait: place and size.
typedef std::map<const void*, unsigned> Early;
static Early* early;
static std::atomic<bool> descending;
// Of the block that runs: bulk copies that have not landed, and whether they land at once.
static std::vector<BulkCopy> bulk_copies;
static bool lands_at_once;
static std::atomic<unsigned long long> launches, graph_launches;
// Times that this thread had to wait for a stream.
static thread_local unsigned long long waits;

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

extern "C" [[noreturn]] void emu_trap(const char* why);

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

static bool has_passed(const Barrier* barrier, unsigned parity) { return (barrier->bytes_and_phase & 1) != (int)parity; }
// Begins a barrier's next phase if nothing lacks in this one.
static void complete(Barrier* barrier) {
    if (barrier->pending != 0 || barrier->bytes_and_phase >> 1 != 0) return;
    barrier->pending = barrier->count;
    barrier->bytes_and_phase ^= 1;
}
// Lets the bulk copies of a barrier land.
static void land(Barrier* barrier) {
    for (size_t i = 0; i < bulk_copies.size();) {
        if (bulk_copies[i].barrier != barrier) {
            i++;
            continue;
        }
        bulk_copies[i].land();
        barrier->bytes_and_phase -= 2 * bulk_copies[i].bytes;
        bulk_copies.erase(bulk_copies.begin() + i);
        complete(barrier);
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
    fiber.waited = false;
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
void emu_copy_async(void* to, const void* from, unsigned bytes, unsigned zeros) {
    current->open.push_back({to, from, bytes, zeros});
    if (early && !current->waited && bytes > 0) (*early)[from] = bytes;
}
void emu_wait_for_earlier() { current->waited = true; }
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
void emu_barrier_init(Barrier* barrier, unsigned count) { *barrier = {(short)count, (short)count, 0}; }
void emu_barrier_arrive(Barrier* barrier, unsigned bytes) {
    if (barrier->pending <= 0) emu_trap("a barrier with more arrivals than it counts");
    barrier->pending--;
    barrier->bytes_and_phase += 2 * (int)bytes;
    complete(barrier);
}
void emu_barrier_wait(Barrier* barrier, unsigned parity) {
    land(barrier);
    if (has_passed(barrier, parity)) return;
    current->barrier = barrier;
    current->parity = parity;
    yield(AT_BARRIER);
}
void emu_barrier(int name, int count) {
    if (name < 1 || name > 15 || count % 32 != 0) emu_trap("a barrier of no such number or threads");
    current->name = name;
    current->name_count = count;
    yield(AT_NAMED);
}
void emu_copy_tile(void* to, const void* map, Barrier* barrier, int x, int y, int z) {
    const TensorMap& tensor = *(const TensorMap*)map;
    if ((size_t)to % 1024 != 0) emu_trap("a bulk copy to a place that is not aligned to 1024 bytes");
    auto copy = [=, tensor = tensor] {
        for (unsigned line = 0; line < tensor.box[1]; line++)
            for (unsigned i = 0; i < tensor.box[0]; i++) {
                long column = x + (long)i, row = y + (long)line;
                bool exists = column >= 0 && row >= 0 && z >= 0 && column < (long)tensor.dims[0] && row < (long)tensor.dims[1] && z < (long)tensor.dims[2];
                unsigned short value = 0;
                if (exists) memcpy(&value, (const char*)tensor.address + z * tensor.strides[1] + row * tensor.strides[0] + column * 2, 2);
                memcpy((char*)to + line * 128 + (i / 8 ^ line % 8) * 16 + i % 8 * 2, &value, 2);
            }
    };
    bulk_copies.push_back({barrier, copy, (int)(tensor.box[0] * tensor.box[1] * 2)});
    if (lands_at_once) land(barrier);
}
void emu_copy_bulk(void* to, const void* from, Barrier* barrier, unsigned bytes) {
    if ((size_t)to % 16 != 0 || (size_t)from % 16 != 0 || bytes % 16 != 0 || bytes == 0) emu_trap("a bulk copy of what is not whole 16 bytes");
    if (early && !current->waited) (*early)[from] = bytes;
    bulk_copies.push_back({barrier, [=] { memcpy(to, from, bytes); }, (int)bytes});
    if (lands_at_once) land(barrier);
}
void emu_trap(const char* why) {
    trouble = why;
    yield(DONE);
    abort();
}
// Test code's: the order in which threads run, and how many launches there were, of kernels and of graphs.
void emulator_set_order(int is_descending) { descending = is_descending; }
unsigned long long emulator_launches() { return launches; }
unsigned long long emulator_graph_launches() { return graph_launches; }
// Test code's too: how often the calling thread waited for work that was not done.
unsigned long long emulator_waits() { return waits; }
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
    for (unsigned i = 0; i < count; i++) {
        Fiber& fiber = fibers[i];
        if (fiber.state == AT_BARRIER) {
            land(fiber.barrier);
            if (has_passed(fiber.barrier, fiber.parity)) fiber.state = READY, any = true;
        } else if (fiber.state == AT_NAMED) {
            int waiting = 0;
            for (unsigned j = 0; j < count; j++) waiting += fibers[j].state == AT_NAMED && fibers[j].name == fiber.name;
            if (waiting < fiber.name_count) continue;
            for (unsigned j = 0; j < count; j++) {
                if (fibers[j].state == AT_NAMED && fibers[j].name == fiber.name) fibers[j].state = READY, any = true;
            }
        }
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
    bulk_copies.clear();
    lands_at_once = from_the_end;
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
        if (done && !bulk_copies.empty()) {
            trouble = "a block that ends before its bulk copies have landed";
            return LAUNCH_FAILED;
        }
        if (done) return SUCCESS;
        if (!release(count) && !ran) {
            unsigned at[DONE + 1] = {};
            for (unsigned i = 0; i < count; i++) at[fibers[i].state]++;
            trouble = "threads that never meet: " + std::to_string(at[AT_BLOCK]) + " wait for the block, " + std::to_string(at[AT_WARP]) +
                " for their warp, " + std::to_string(at[AT_BARRIER] + at[AT_NAMED]) + " for barriers of their own, " + std::to_string(at[DONE]) + " have ended";
            return LAUNCH_FAILED;
        }
    }
}

struct Module { void* library; };
struct Function { void (*entry)(void**); int (*keep)(void**, unsigned char*); std::string name; };
// What was captured, in order: each does its work.
typedef std::vector<std::function<Result()>> Graph;
struct Executable {
    std::shared_ptr<Graph> graph;
    // From the launch before.
    std::shared_ptr<Early> early;
};
struct Stream {
    bool capturing = false, invalid = false;
    int mode = 0;
    Graph captured;
    // What was asked for and is not done yet, how much was done before it, and what went wrong in that.
    std::deque<std::function<Result()>> queue;
    unsigned long long done = 0;
    Result failed = SUCCESS;
    unsigned long long asked() const { return done + queue.size(); }
};
// A place in the work of a stream; passed while it was never recorded.
struct Event { Stream* stream; unsigned long long place; };
static std::set<Stream*> streams;
enum { GLOBAL = 0, THREAD_LOCAL = 1, RELAXED = 2 };
// The capture that this thread has begun, and the mode that it has set for its own calls.
static thread_local Stream* own_capture;
static thread_local int thread_mode = GLOBAL;

// For calls that a capture of this thread forbids: whether they are refused, which spoils the capture.
static bool is_refused() {
    if (!own_capture || own_capture->mode == RELAXED || thread_mode == RELAXED) return false;
    own_capture->invalid = true;
    return true;
}

// What every call answers once the device is lost.
static std::atomic<Result> lost;

// Counts an event, and loses the device at the one that the environment names. Whether it is lost.
static bool is_lost_at(const char* event, Result reason) {
    static const char* setting = getenv("EMULATOR_LOSES");
    static std::atomic<long> counts[2];
    size_t length = strlen(event);
    if (setting && strncmp(setting, "file:", 5) == 0) {
        if (access(setting + 5, F_OK) == 0) lost = reason;
        return lost != SUCCESS;
    }
    if (!setting || strncmp(setting, event, length) != 0 || setting[length] != ':') return false;
    if (++counts[event[0] == 'c'] == atol(setting + length + 1)) lost = reason;
    return lost != SUCCESS;
}

// Keeps work of a stream until somebody waits for it, or for a graph.
static Result on_stream(void* handle, std::function<Result()> work) {
    std::lock_guard guard(mutex);
    Stream* stream = (Stream*)handle;
    if (lost != SUCCESS) return lost;
    if (stream->failed != SUCCESS) return stream->failed;
    if (!stream->capturing) {
        stream->queue.push_back(std::move(work));
        return SUCCESS;
    }
    if (stream->invalid) return CAPTURE_INVALIDATED;
    stream->captured.push_back(std::move(work));
    return SUCCESS;
}

// Does the work of a stream up to a place.
static Result work_up_to(Stream* stream, unsigned long long place) {
    while (stream->done < place && stream->failed == SUCCESS && lost == SUCCESS) {
        auto work = std::move(stream->queue.front());
        stream->queue.pop_front();
        stream->done++;
        if (Result result = work(); result != SUCCESS) stream->failed = result;
    }
    return lost != SUCCESS ? (Result)lost : stream->failed;
}

// Lets the host wait for a stream.
static Result wait_for(Stream* stream, unsigned long long place) {
    std::lock_guard guard(mutex);
    waits += stream->done < place;
    return work_up_to(stream, place);
}

// Lets the host wait for the whole device, as freeing memory does.
static void wait_for_all() {
    for (Stream* stream : streams) {
        if (!stream->capturing) wait_for(stream, stream->asked());
    }
}

// Host memory that is pinned, by its address.
static std::map<const void*, size_t> pinned;
static bool is_pinned(const void* memory) {
    std::lock_guard guard(mutex);
    auto after = pinned.upper_bound(memory);
    if (after == pinned.begin()) return false;
    --after;
    return (const char*)memory < (const char*)after->first + after->second;
}
static Result copy(void* stream, void* to, const void* from, size_t bytes, const void* host) {
    Stream* on = (Stream*)stream;
    if (on->capturing && host && !is_pinned(host)) {
        on->invalid = true;
        return CAPTURE_UNSUPPORTED;
    }
    Result result = on_stream(stream, [=] {
        if (!host || !is_lost_at("copy", ILLEGAL_ADDRESS)) memcpy(to, from, bytes);
        return (Result)SUCCESS;
    });
    // Of pageable memory the driver takes a copy, or it waits.
    return result != SUCCESS || !host || is_pinned(host) ? result : wait_for(on, on->asked());
}
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
Result cuStreamCreate(Stream** stream, unsigned) {
    std::lock_guard guard(mutex);
    *stream = new Stream;
    streams.insert(*stream);
    return SUCCESS;
}
Result cuStreamSynchronize(Stream* stream) {
    if (!stream->capturing) return wait_for(stream, stream->asked());
    stream->invalid = true;
    return CAPTURE_UNSUPPORTED;
}
Result cuStreamWaitEvent(Stream* stream, Event* event, unsigned) {
    if (stream->capturing || (event->stream && event->stream->capturing)) return CAPTURE_ISOLATION;
    Event now = *event;
    return on_stream(stream, [now] { return now.stream ? work_up_to(now.stream, now.place) : (Result)SUCCESS; });
}
Result cuStreamDestroy_v2(Stream* stream) {
    std::lock_guard guard(mutex);
    work_up_to(stream, stream->asked());
    streams.erase(stream);
    delete stream;
    return SUCCESS;
}
Result cuStreamBeginCapture_v2(Stream* stream, int mode) {
    if (stream->capturing) return INVALID_VALUE;
    stream->capturing = true;
    stream->invalid = false;
    stream->mode = mode;
    stream->captured.clear();
    own_capture = stream;
    return SUCCESS;
}
Result cuStreamEndCapture(Stream* stream, Graph** graph) {
    *graph = nullptr;
    if (!stream->capturing) return CAPTURE_UNMATCHED;
    if (stream != own_capture) return CAPTURE_WRONG_THREAD;
    stream->capturing = false;
    own_capture = nullptr;
    if (stream->invalid) return CAPTURE_INVALIDATED;
    *graph = new Graph(std::move(stream->captured));
    return SUCCESS;
}
Result cuThreadExchangeStreamCaptureMode(int* mode) {
    std::swap(*mode, thread_mode);
    return SUCCESS;
}
Result cuGraphInstantiateWithFlags(Executable** executable, Graph* graph, unsigned long long) {
    *executable = new Executable{std::make_shared<Graph>(*graph), std::make_shared<Early>()};
    return SUCCESS;
}
Result cuGraphLaunch(Executable* executable, Stream* stream) {
    if (stream->capturing) return CAPTURE_UNSUPPORTED;
    graph_launches++;
    return on_stream(stream, [graph = executable->graph, known = executable->early] {
        // What kernels read before they wait must be the same from the beginning of the graph to its end; as a rule they read in the same
        // places at each launch.
        std::map<const void*, std::string> before;
        for (auto& [from, count] : *known) before[from] = std::string((const char*)from, count);
        Early found;
        early = &found;
        for (auto& work : *graph) {
            Result result = work();
            if (result != SUCCESS) {
                early = nullptr;
                return result;
            }
        }
        early = nullptr;
        for (auto& [from, count] : found) {
            auto same = before.find(from);
            if (same == before.end() || memcmp(from, same->second.data(), std::min<size_t>(count, same->second.size())) == 0) continue;
            fprintf(stderr, "emulator: a kernel of a graph reads what the graph writes before it has waited for that\n");
            return (Result)LAUNCH_FAILED;
        }
        *known = found;
        return (Result)SUCCESS;
    });
}
Result cuGraphExecDestroy(Executable* executable) { delete executable; return SUCCESS; }
Result cuGraphDestroy(Graph* graph) { delete graph; return SUCCESS; }
Result cuEventCreate(Event** event, unsigned) { *event = new Event{nullptr, 0}; return SUCCESS; }
Result cuEventRecord(Event* event, Stream* stream) {
    std::lock_guard guard(mutex);
    if (lost != SUCCESS) return lost;
    // An event of a capture is part of its graph.
    if (!stream->capturing) *event = {stream, stream->asked()};
    return stream->failed;
}
Result cuEventSynchronize(Event* event) {
    if (is_refused()) return CAPTURE_UNSUPPORTED;
    if (!event->stream) return lost;
    return wait_for(event->stream, event->place);
}
Result cuEventDestroy_v2(Event* event) { delete event; return SUCCESS; }
Result cuEventElapsedTime(float* ms, void*, void*) { *ms = 1; return SUCCESS; }
Result cuEventElapsedTime_v2(float* ms, void*, void*) { *ms = 1; return SUCCESS; }

// The end of the allocation, rounded up to 16 bytes, is the end of its last page; the next page belongs to nobody.
Result cuMemAlloc_v2(uint64_t* address, size_t bytes) {
    if (lost != SUCCESS) return lost;
    if (is_refused()) return CAPTURE_UNSUPPORTED;
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
    if (is_refused()) return CAPTURE_UNSUPPORTED;
    std::lock_guard guard(mutex);
    wait_for_all();
    auto found = mappings.find(address);
    if (found == mappings.end()) return INVALID_VALUE;
    munmap(found->second.start, found->second.bytes);
    mappings.erase(found);
    return SUCCESS;
}
Result cuMemAllocHost_v2(void** memory, size_t bytes) {
    if (is_refused()) return CAPTURE_UNSUPPORTED;
    std::lock_guard guard(mutex);
    *memory = malloc(bytes);
    if (!*memory) return OUT_OF_MEMORY;
    pinned[*memory] = bytes;
    return SUCCESS;
}
Result cuMemFreeHost(void* memory) {
    std::lock_guard guard(mutex);
    wait_for_all();
    pinned.erase(memory);
    free(memory);
    return SUCCESS;
}
Result cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) { return copy(stream, (void*)to, from, bytes, from); }
Result cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream) { return copy(stream, to, (void*)from, bytes, to); }
Result cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream) { return copy(stream, (void*)to, (void*)from, bytes, nullptr); }
Result cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, void* stream) {
    return on_stream(stream, [=] {
        memset((void*)to, value, bytes);
        return (Result)SUCCESS;
    });
}

Result cuModuleLoadData(Module** module, const void* image) {
    if (lost != SUCCESS) return lost;
    if (is_refused()) return CAPTURE_UNSUPPORTED;
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
    auto keep = (int (*)(void**, unsigned char*))dlsym(module->library, (std::string("emu_keep_") + name).c_str());
    if (!found || !keep) return NOT_FOUND;
    *function = new Function{found, keep, name};
    return SUCCESS;
}
Result cuFuncGetAttribute(int* value, int, Function*) { *value = 0; return SUCCESS; }
Result cuFuncSetAttribute(Function*, int, int value) { return value <= (int)SHARED_BYTES ? SUCCESS : INVALID_VALUE; }

// Only what the engine asks for: bf16, three dimensions, the 128-byte swizzle, zeros beyond the tensor.
Result cuTensorMapEncodeTiled(TensorMap* map, int type, unsigned rank, void* address, const uint64_t* dims, const uint64_t* strides, const unsigned* box,
    const unsigned* steps, int interleave, int swizzle, int, int fill) {
    bool is_known = type == 9 && rank == 3 && interleave == 0 && swizzle == 3 && fill == 0 && (uint64_t)map % 64 == 0 && (uint64_t)address % 16 == 0;
    bool fits = strides[0] % 16 == 0 && strides[1] % 16 == 0 && strides[0] < 1ull << 40 && strides[1] < 1ull << 40 && box[0] * 2 <= 128 && box[2] == 1;
    for (int i = 0; i < 3; i++) fits &= steps[i] == 1 && box[i] >= 1 && box[i] <= 256 && dims[i] >= 1 && dims[i] <= 1ull << 32;
    if (!is_known || !fits) return INVALID_VALUE;
    *map = {(uint64_t)address, {dims[0], dims[1], dims[2]}, {strides[0], strides[1]}, {box[0], box[1], box[2]}};
    return SUCCESS;
}

// An argument of a kernel that is captured or waits.
struct alignas(128) Slot { unsigned char bytes[128]; };
// `overlaps`: the kernel may begin before the one in front has ended, so each of its threads must wait for that one.
static Result launch(Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, void** arguments, bool overlaps) {
    std::lock_guard guard(mutex);
    Early* of_graph = early;
    if (!overlaps) early = nullptr;
    struct Restore {
        Early* before;
        ~Restore() { early = before; }
    } restore{of_graph};
    if (is_lost_at("launch", LAUNCH_FAILED)) return SUCCESS;
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
                Result ran = run_block(bx, from_the_end);
                for (unsigned t = 0; t < bx && overlaps && ran == SUCCESS; t++) {
                    if (!fibers[t].waited) trouble = "thread " + std::to_string(t) + " never waits for the kernel in front", ran = LAUNCH_FAILED;
                }
                if (ran != SUCCESS) {
                    fprintf(stderr, "emulator: kernel %s, block (%u, %u, %u): %s\n", kernel_name.c_str(), x, y, z, trouble.c_str());
                    return LAUNCH_FAILED;
                }
            }
    return SUCCESS;
}

static Result ask(Function* function, const unsigned (&grid)[3], const unsigned (&block)[3], unsigned shared, Stream* stream, void** arguments, bool overlaps) {
    auto [gx, gy, gz] = grid;
    auto [bx, by, bz] = block;
    if (by != 1 || bz != 1 || bx == 0 || bx > 1024 || bx % 32 != 0 || shared > SHARED_BYTES || gx == 0 || gy == 0 || gz == 0)
        return INVALID_VALUE;
    auto places = std::make_shared<std::vector<Slot>>(64);
    int count = function->keep(arguments, places->data()->bytes);
    places->resize(count);
    return on_stream(stream, [=, gx = gx, gy = gy, gz = gz, bx = bx] {
        std::vector<void*> kept;
        for (int i = 0; i < count; i++) kept.push_back((*places)[i].bytes);
        return launch(function, gx, gy, gz, bx, kept.data(), overlaps);
    });
}
Result cuLaunchKernel(Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
    Stream* stream, void** arguments, void**) {
    return ask(function, {gx, gy, gz}, {bx, by, bz}, shared, stream, arguments, false);
}
struct Attribute { unsigned id; char pad[4]; union { int on; char bytes[64]; }; };
struct Config { unsigned grid[3], block[3], shared; Stream* stream; const Attribute* attributes; unsigned count; };
Result cuLaunchKernelEx(const Config* config, Function* function, void** arguments, void**) {
    bool overlaps = false;
    for (unsigned i = 0; i < config->count; i++) {
        if (config->attributes[i].id != 6) return INVALID_VALUE;  // programmatic stream serialization
        overlaps |= config->attributes[i].on != 0;
    }
    return ask(function, config->grid, config->block, config->shared, config->stream, arguments, overlaps);
}
}
