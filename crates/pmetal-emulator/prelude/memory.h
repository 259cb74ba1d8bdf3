// Memory that knows its bounds, who has written each element, and who has touched it since.

namespace emulator {

// An element's history, in numbers of threadgroups and of barriers. Group 0 is nobody.
struct History {
    uint write_group, write_barriers, write_simd_barriers, write_thread;
    // The readers since the last barrier: a thread, or several of one SIMD group, or several SIMD groups.
    uint read_group, read_barriers, read_simd_barriers;
    uint16_t read_simd, read_thread;
    uint other_read_group;
};
constexpr uint16_t SEVERAL = 0xffff;

struct Memory {
    const char* name;
    void* data;
    ulong size, misalignment, width, pitch;
    History* history;
    Access access;
};

struct Threadgroup {
    static constexpr const char* NAME = "threadgroup";
    static uint barriers() { return machine.barriers; }
    static uint simd_barriers() { return machine.simd_barriers[machine.me->ids.simd]; }
};
struct Device {
    static constexpr const char* NAME = "device";
    static uint barriers() { return machine.device_barriers; }
    // A SIMD barrier orders threadgroup memory only.
    static uint simd_barriers() { return 0; }
};

inline void check_bounds(const Memory& memory, ulong i, const char* what) {
    if (i >= memory.size) {
        fail("%s %s[%lld], which has %llu elements", what, memory.name, static_cast<long long>(i), memory.size);
    }
    if (memory.width != memory.pitch && i % memory.pitch >= memory.width) {
        fail("%s %s[%llu], which lies between its rows of %llu elements", what, memory.name, i, memory.width);
    }
}

// Whether what `thread` did between the same two barriers could come before or after what this thread does now.
template <class Space> bool unordered(uint group, uint barriers, uint simd_barriers, uint thread) {
    const Ids& me = machine.me->ids;
    if (group != machine.group || thread == me.thread || barriers != Space::barriers()) return false;
    return thread / LANES != me.simd || simd_barriers == Space::simd_barriers();
}

template <class Space> void check_written(const Memory& memory, ulong i, const char* what) {
    const History& h = memory.history[i];
    if (unordered<Space>(h.write_group, h.write_barriers, h.write_simd_barriers, h.write_thread)) {
        fail("race: it %s %s memory %s[%llu], which thread %u wrote with no barrier in between", what, Space::NAME, memory.name, i,
             h.write_thread);
    }
    if (memory.access != Access::Threadgroup && h.write_group && h.write_group != machine.group) {
        fail("race: it %s %s[%llu], which another threadgroup (number %u) wrote", what, memory.name, i,
             h.write_group - machine.first_group - 1);
    }
}

template <class Space> void note_read(const Memory& memory, ulong i) {
    check_bounds(memory, i, "reads");
    if (memory.access == Access::Read) return;
    History& h = memory.history[i];
    const bool written = memory.access == Access::Threadgroup ? h.write_group == machine.group : h.write_group != 0;
    if (!written && memory.access != Access::Update) fail("reads %s[%llu], which nothing has written", memory.name, i);
    check_written<Space>(memory, i, "reads");
    const Ids& me = machine.me->ids;
    const uint simd_barriers = Space::simd_barriers();
    if (h.read_group != machine.group || h.read_barriers != Space::barriers()) {
        if (h.read_group && h.read_group != machine.group) h.other_read_group = h.read_group;
        h.read_group = machine.group;
        h.read_barriers = Space::barriers();
        h.read_simd = static_cast<uint16_t>(me.simd);
    } else if (h.read_simd != me.simd) {
        h.read_simd = SEVERAL;
        return;
    } else if (h.read_simd_barriers == simd_barriers) {
        if (h.read_thread != me.thread) h.read_thread = SEVERAL;
        return;
    }
    h.read_simd_barriers = simd_barriers;
    h.read_thread = static_cast<uint16_t>(me.thread);
}

template <class Space> void note_write(const Memory& memory, ulong i) {
    check_bounds(memory, i, "writes");
    History& h = memory.history[i];
    check_written<Space>(memory, i, "writes");
    const Ids& me = machine.me->ids;
    if (h.read_group == machine.group && h.read_barriers == Space::barriers()) {
        const bool others = h.read_simd == SEVERAL || h.read_thread == SEVERAL || h.read_thread != me.thread;
        const bool ordered = h.read_simd == me.simd && h.read_simd_barriers != Space::simd_barriers();
        if (others && !ordered) {
            fail("race: it writes %s memory %s[%llu], which another thread read with no barrier in between", Space::NAME, memory.name, i);
        }
    }
    const uint elsewhere = h.read_group != machine.group ? h.read_group : h.other_read_group;
    if (memory.access != Access::Threadgroup && elsewhere) {
        fail("race: it writes %s[%llu], which another threadgroup (number %u) read", memory.name, i, elsewhere - machine.first_group - 1);
    }
    h.write_group = machine.group;
    h.write_barriers = Space::barriers();
    h.write_simd_barriers = Space::simd_barriers();
    h.write_thread = me.thread;
}

// An element that can be written. It lives as long as the expression it is made in.
template <class E, class Space> class Reference {
    const Memory& memory;
    ulong i;

  public:
    Reference(const Memory& memory, ulong i) : memory(memory), i(i) {}
    Reference(const Reference&) = delete;
    E get() const {
        note_read<Space>(memory, i);
        return static_cast<const E*>(memory.data)[i];
    }
    void set(E value) const {
        note_write<Space>(memory, i);
        static_cast<E*>(memory.data)[i] = value;
    }
    operator E() && { return get(); }
    template <class F, class = decltype(static_cast<F>(std::declval<E>()))> explicit operator F() && { return static_cast<F>(get()); }
    void operator=(E value) && { set(value); }
    void operator=(Reference&& other) && { set(other.get()); }
    void operator+=(E value) && { set(get() + value); }
    void operator-=(E value) && { set(get() - value); }
    void operator*=(E value) && { set(get() * value); }
    void operator/=(E value) && { set(get() / value); }
    void operator|=(E value) && { set(get() | value); }
    void operator&=(E value) && { set(get() & value); }
    void operator^=(E value) && { set(get() ^ value); }
};

// A pointer into an address space. It comes from a buffer or a THREADGROUP declaration and from nowhere else.
template <class E, class Space> class Pointer {
  public:
    const Memory* memory;
    ulong start;

    Pointer(const Memory* memory, ulong start) : memory(memory), start(start) {}
    operator Pointer<const E, Space>() const { return {memory, start}; }
    Reference<E, Space> operator[](ulong i) const { return {*memory, start + i}; }
    Reference<E, Space> operator*() const { return {*memory, start}; }
    Pointer operator+(ulong n) const { return {memory, start + n}; }
    Pointer operator-(ulong n) const { return {memory, start - n}; }
    Pointer& operator+=(ulong n) { return start += n, *this; }
};

template <class E, class Space> class Pointer<const E, Space> {
  public:
    const Memory* memory;
    ulong start;

    Pointer(const Memory* memory, ulong start) : memory(memory), start(start) {}
    E operator[](ulong i) const { return Reference<E, Space>(*memory, start + i).get(); }
    E operator*() const { return (*this)[0]; }
    Pointer operator+(ulong n) const { return {memory, start + n}; }
    Pointer operator-(ulong n) const { return {memory, start - n}; }
    Pointer& operator+=(ulong n) { return start += n, *this; }
};

// The memory behind a THREADGROUP declaration, kept from one threadgroup to the next: the history tells that it is another's.
template <class E, ulong SIZE> class ThreadgroupMemory {
    E data[SIZE];
    History history[SIZE];
    Memory memory;
    uint launch;

  public:
    explicit ThreadgroupMemory(const char* name) : memory{name, data, SIZE, 0, SIZE, SIZE, history, Access::Threadgroup} {}
    Pointer<E, Threadgroup> enter() {
        if (launch != machine.launch) {
            launch = machine.launch;
            machine.threadgroup_bytes += sizeof data;
            if (machine.threadgroup_bytes > 32 << 10) {
                fail("%u bytes of threadgroup memory with %s, more than 32 KiB", machine.threadgroup_bytes, memory.name);
            }
        }
        return {&memory, 0};
    }
};

}  // namespace emulator
