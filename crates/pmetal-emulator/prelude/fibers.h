// The threads of a threadgroup as fibers of one thread of the host, with barriers and meetings of SIMD groups that cannot hang.

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <utility>

namespace emulator {

using uint = unsigned int;
using ulong = unsigned long long;

constexpr uint LANES = 32, MAX_THREADS = 1024;
constexpr size_t STACK_BYTES = 256 << 10;

enum class Access : uint { Read, Write, Update, Threadgroup };

// What the Rust side passes.
struct Buffer {
    const char* name;
    void* data;
    ulong size, misalignment;  // in elements; the second from a multiple of 16 bytes of 16-bit elements
    ulong width, pitch;        // of a row what belongs to it, and from one row to the next
    uint element_bytes;
    Access access;
};
struct Request {
    const Buffer* buffers;
    const void* params;
    uint buffer_count, params_bytes;
    uint groups[3], threads;
    char* message;
    uint message_bytes;
};

// What Metal hands to a kernel as arguments, so that a FUNCTION has none of it.
struct Ids {
    uint group_x, group_y, group_z, groups_x, thread, threads, lane, simd, simds;
};

enum class State : uint { Ready, AtBarrier, InSimd, Ended };

struct Fiber {
    void* stack_pointer;
    State state;
    const char* waits_in;
    int line;
    void* payload;
    Ids ids;
};

struct Machine {
    const char* kernel;
    const Request* request;
    void (*body)(const Ids&);
    // The running threadgroup's number, counted over all launches, and the first of this launch.
    uint group, first_group, launch;
    // Barriers passed so far by this threadgroup, those that order device memory, and those of each SIMD group.
    uint barriers, device_barriers, simd_barriers[MAX_THREADS / LANES];
    uint at_barrier, in_simd[MAX_THREADS / LANES];
    uint threadgroup_bytes;
    Fiber fibers[MAX_THREADS];
    Fiber* me;
    char* stacks;
    void* scheduler;
    bool failed;
};
static Machine machine;

// Stores the registers that a call keeps and the stack pointer, and continues where `to` was stored.
extern "C" void emulator_switch(void** from, void* to) __asm__("emulator_switch");
#if defined(__x86_64__)
__asm__(R"(
.text
emulator_switch:
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
)");
constexpr uint SAVED_WORDS = 8, RETURN_WORD = 6;
#elif defined(__aarch64__)
__asm__(R"(
.text
.balign 4
emulator_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
constexpr uint SAVED_WORDS = 20, RETURN_WORD = 11;
#else
#error "the emulator switches fibers on x86-64 and aarch64 only"
#endif

inline void back_to_scheduler() { emulator_switch(&machine.me->stack_pointer, machine.scheduler); }

// Ends the launch with a message. Called by a fiber it does not return; its stack is simply left.
__attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
    const Request& request = *machine.request;
    uint used = (uint)snprintf(request.message, request.message_bytes, "kernel %s: ", machine.kernel);
    if (machine.me) {
        const Ids& ids = machine.me->ids;
        used += (uint)snprintf(request.message + used, request.message_bytes - used, "threadgroup (%u, %u, %u), thread %u: ",
                               ids.group_x, ids.group_y, ids.group_z, ids.thread);
    }
    va_list values;
    va_start(values, format);
    vsnprintf(request.message + used, request.message_bytes - used, format, values);
    va_end(values);
    machine.failed = true;
    if (machine.me) back_to_scheduler();
}

inline void barrier(const char* name, bool device, int line) {
    Fiber& me = *machine.me;
    me = Fiber{me.stack_pointer, State::AtBarrier, name, line, nullptr, me.ids};
    if (++machine.at_barrier < me.ids.threads) return back_to_scheduler();
    for (uint i = 0; i < me.ids.threads; ++i) {
        const Fiber& other = machine.fibers[i];
        if (other.line != line) {
            return fail("barrier divergence: it waits in line %d, thread %u in line %d", line, i, other.line);
        }
    }
    machine.at_barrier = 0;
    ++machine.barriers;
    machine.device_barriers += device;
    for (uint i = 0; i < me.ids.threads; ++i) machine.fibers[i].state = State::Ready;
}

// Waits until all lanes of the SIMD group are here; the last one runs `resolve` on what they brought, in the order of lanes.
template <class Payload> void meet(const char* name, int line, Payload& payload, void (*resolve)(Payload* const*)) {
    Fiber& me = *machine.me;
    const uint simd = me.ids.simd;
    Fiber* lanes = &machine.fibers[simd * LANES];
    me = Fiber{me.stack_pointer, State::InSimd, name, line, &payload, me.ids};
    if (++machine.in_simd[simd] < LANES) return back_to_scheduler();
    Payload* brought[LANES];
    for (uint i = 0; i < LANES; ++i) {
        if (lanes[i].line != line || lanes[i].waits_in != name) {
            return fail("SIMD divergence: it is in %s in line %d, lane %u in %s in line %d", name, line, i, lanes[i].waits_in,
                        lanes[i].line);
        }
        brought[i] = static_cast<Payload*>(lanes[i].payload);
    }
    machine.in_simd[simd] = 0;
    resolve(brought);
    for (uint i = 0; i < LANES; ++i) lanes[i].state = State::Ready;
}

inline void simd_barrier(int line) {
    Fiber& me = *machine.me;
    meet<Fiber>("SIMD_BARRIER", line, me, [](Fiber* const* lanes) { ++machine.simd_barriers[lanes[0]->ids.simd]; });
}

inline void fiber_main() {
    machine.body(machine.me->ids);
    machine.me->state = State::Ended;
    back_to_scheduler();
}

// Says who waits where, as ranges of threads.
inline void report_divergence(uint threads) {
    char text[512];
    uint used = 0;
    auto same = [](const Fiber& a, const Fiber& b) { return a.state == b.state && (a.state == State::Ended || a.line == b.line); };
    for (uint first = 0, i = 1; i <= threads && used < sizeof text; ++i) {
        const Fiber& fiber = machine.fibers[first];
        if (i < threads && same(fiber, machine.fibers[i])) continue;
        used += (uint)snprintf(text + used, sizeof text - used, "%sthreads %u to %u ", first ? ", " : "", first, i - 1);
        if (used < sizeof text && fiber.state == State::Ended) {
            used += (uint)snprintf(text + used, sizeof text - used, "have ended");
        } else if (used < sizeof text) {
            used += (uint)snprintf(text + used, sizeof text - used, "wait in %s in line %d", fiber.waits_in, fiber.line);
        }
        first = i;
    }
    fail("divergence: %s", text);
}

// Runs a threadgroup. The order of its threads is another in each threadgroup, so that what depends on it shows.
inline void run_group(Ids ids, uint number) {
    ++machine.group;
    machine.barriers = machine.device_barriers = machine.at_barrier = 0;
    for (uint i = 0; i < MAX_THREADS / LANES; ++i) machine.simd_barriers[i] = machine.in_simd[i] = 0;
    uint order[MAX_THREADS];
    uint random = 2654435769u * (number + 1);
    for (uint i = 0; i < ids.threads; ++i) {
        ids.thread = i;
        ids.lane = i % LANES;
        ids.simd = i / LANES;
        void** top = reinterpret_cast<void**>(machine.stacks + (i + 1) * STACK_BYTES) - SAVED_WORDS;
        top[RETURN_WORD] = reinterpret_cast<void*>(&fiber_main);
        machine.fibers[i] = Fiber{top, State::Ready, nullptr, 0, nullptr, ids};
        random ^= random << 13, random ^= random >> 17, random ^= random << 5;
        const uint j = random % (i + 1);
        order[i] = order[j];
        order[j] = i;
    }
    for (bool ran = true; ran && !machine.failed;) {
        ran = false;
        for (uint i = 0; i < ids.threads && !machine.failed; ++i) {
            Fiber& fiber = machine.fibers[order[i]];
            if (fiber.state != State::Ready) continue;
            ran = true;
            machine.me = &fiber;
            emulator_switch(&machine.scheduler, fiber.stack_pointer);
            machine.me = nullptr;
        }
    }
    for (uint i = 0; i < ids.threads && !machine.failed; ++i) {
        if (machine.fibers[i].state != State::Ended) report_divergence(ids.threads);
    }
}

}  // namespace emulator
