// Unpacks a launch's arguments by a kernel's signature and runs its threadgroups one after another.

namespace emulator {

constexpr uint MAX_BUFFERS = 30;
static Memory memories[MAX_BUFFERS];

template <class A> struct Argument;
template <class E> struct Argument<Pointer<E, Device>> {
    static constexpr bool IS_BUFFER = true;
    static bool fits(const Request&, const Buffer& b) { return b.access != Access::Read && b.element_bytes == sizeof(E); }
    static Pointer<E, Device> get(uint i, const Ids&) { return {&memories[i], 0}; }
};
template <class E> struct Argument<Pointer<const E, Device>> {
    static constexpr bool IS_BUFFER = true;
    static bool fits(const Request&, const Buffer& b) { return b.access == Access::Read && b.element_bytes == sizeof(E); }
    static Pointer<const E, Device> get(uint i, const Ids&) { return {&memories[i], 0}; }
};
template <class P> struct Argument<const P&> {
    static constexpr bool IS_BUFFER = false;
    static bool fits(const Request& request, const Buffer&) { return request.params_bytes == sizeof(P); }
    static const P& get(uint, const Ids&) { return *static_cast<const P*>(machine.request->params); }
};
template <> struct Argument<const Ids&> {
    static constexpr bool IS_BUFFER = false;
    static bool fits(const Request&, const Buffer&) { return true; }
    static const Ids& get(uint, const Ids& ids) { return ids; }
};

// A kernel whose function is a constant, called by each fiber.
template <auto function, class Signature> struct Thunk;
template <auto function, class... A> struct Thunk<function, void (*)(A...)> {
    template <size_t... I> static void unpack(const Ids& ids, std::index_sequence<I...>) { function(Argument<A>::get(I, ids)...); }
    static void body(const Ids& ids) { unpack(ids, std::index_sequence_for<A...>{}); }
    template <size_t... I> static bool fit(const Request& request, std::index_sequence<I...>) {
        constexpr uint buffers = (0u + ... + uint(Argument<A>::IS_BUFFER));
        return request.buffer_count == buffers && (true && ... && Argument<A>::fits(request, request.buffers[I < buffers ? I : 0]));
    }
    static bool fits(const Request& request) { return fit(request, std::index_sequence_for<A...>{}); }
};

inline void open_memories(const Request& request) {
    for (uint i = 0; i < request.buffer_count; ++i) {
        const Buffer& b = request.buffers[i];
        void* history = b.access == Access::Read ? nullptr : calloc(b.size + 1, sizeof(History));
        memories[i] = Memory{b.name, b.data, b.size, b.misalignment, b.width, b.pitch, static_cast<History*>(history), b.access};
        if (b.access != Access::Read && !history) fail("no memory for the history of %s", b.name);
    }
}

inline void close_memories(const Request& request) {
    for (uint i = 0; i < request.buffer_count; ++i) {
        const Memory& m = memories[i];
        for (ulong at = 0; m.access == Access::Write && at < m.size && !machine.failed; ++at) {
            if (at % m.pitch < m.width && !m.history[at].write_group) fail("it never writes %s[%llu] of %llu elements", m.name, at, m.size);
        }
        free(m.history);
    }
}

// Returns 0, or 1 with a message.
template <auto function> int launch(const char* name, const Request& request) {
    machine.kernel = name;
    machine.request = &request;
    machine.me = nullptr;
    machine.failed = false;
    machine.first_group = machine.group;
    machine.threadgroup_bytes = 0;
    ++machine.launch;
    using Kernel = Thunk<function, decltype(function)>;
    machine.body = &Kernel::body;
    if (request.threads == 0 || request.threads > MAX_THREADS || request.threads % LANES) {
        fail("%u threads in a threadgroup", request.threads);
    } else if (!Kernel::fits(request)) {
        fail("the call does not fit the kernel's signature");
    }
    if (!machine.stacks && !machine.failed) {
        const int kind = MAP_PRIVATE | MAP_ANON | MAP_NORESERVE;
        void* stacks = mmap(nullptr, MAX_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE, kind, -1, 0);
        if (stacks == MAP_FAILED) {
            fail("no memory for stacks");
        } else {
            machine.stacks = static_cast<char*>(stacks);
        }
    }
    if (machine.failed) return 1;
    open_memories(request);
    uint number = 0;
    const uint *groups = request.groups, simds = request.threads / LANES;
    for (uint z = 0; z < groups[2] && !machine.failed; ++z) {
        for (uint y = 0; y < groups[1] && !machine.failed; ++y) {
            for (uint x = 0; x < groups[0] && !machine.failed; ++x) {
                run_group(Ids{x, y, z, groups[0], 0, request.threads, 0, 0, simds}, number++);
            }
        }
    }
    close_memories(request);
    return machine.failed;
}

}  // namespace emulator

#define EXPORT(name)                                                                                        \
    extern "C" __attribute__((visibility("default"))) int launch_##name(const emulator::Request* request) { \
        return emulator::launch<&dialect::name>(#name, *request);                                           \
    }
