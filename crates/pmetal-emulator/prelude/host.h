// The dialect, for C++ on the host, strictly: what Metal or CUDA would refuse does not compile, and what they would let pass is caught
// as it runs. What each word means stands in pmetal-metal's metal.h. T is defined before.

namespace dialect {

typedef unsigned int uint;
typedef unsigned char uchar;
typedef unsigned long long ulong;

// Address spaces are types. Nothing converts between them, nor from a thread's own pointers.
template <class E> using device_ptr = emulator::Pointer<E, emulator::Device>;
template <class E> using threadgroup_ptr = emulator::Pointer<E, emulator::Threadgroup>;

#define KERNEL(name) static void name
#define READ(type, name, place) device_ptr<const type> name
#define WRITE(type, name, place) device_ptr<type> name
#define UPDATE(type, name, place) device_ptr<type> name
#define READ_ROWS(type, name, place) READ(type, name, place)
#define WRITE_ROWS(type, name, place) WRITE(type, name, place)
#define UPDATE_ROWS(type, name, place) UPDATE(type, name, place)
#define PARAMS(type, place) const type &params, const emulator::Ids &ids_of_thread

#define GROUP_X ids_of_thread.group_x
#define GROUP_Y ids_of_thread.group_y
#define GROUP_Z ids_of_thread.group_z
#define GROUPS_X ids_of_thread.groups_x
#define THREAD ids_of_thread.thread
#define THREADS ids_of_thread.threads
#define LANE ids_of_thread.lane
#define SIMD ids_of_thread.simd
#define SIMDS ids_of_thread.simds
#define THREAD_IN_GRID (GROUP_X * THREADS + THREAD)
#define GRID_THREADS (GROUPS_X * THREADS)

#define THREADGROUP(type, name, size)                                    \
    static emulator::ThreadgroupMemory<type, size> name##_memory(#name); \
    const threadgroup_ptr<type> name = name##_memory.enter()
#define THREADGROUP_PTR(type) threadgroup_ptr<type>
#define DEVICE_PTR(type) device_ptr<type>
#define THREAD_REF(type) type&
#define FUNCTION inline

#define BARRIER() emulator::barrier("BARRIER", false, __LINE__)
#define BARRIER_DEVICE() emulator::barrier("BARRIER_DEVICE", true, __LINE__)
#define SIMD_BARRIER() emulator::simd_barrier(__LINE__)

// The bits of one type as another.
template <class To, class From> inline To bits(From x) {
    static_assert(sizeof(To) == sizeof(From), "as many bits");
    To y;
    __builtin_memcpy(&y, &x, sizeof y);
    return y;
}
inline uint as_uint(float x) { return bits<uint>(x); }
inline float as_float(uint x) { return bits<float>(x); }

// Sixteen bits with EXPONENT bits of exponent and FRACTION of fraction. It converts in words only and computes nothing.
template <int EXPONENT, int FRACTION> class Small {
    uint16_t raw;
    static constexpr uint INFINITE = ((1u << EXPONENT) - 1) << FRACTION;
    static constexpr int BIAS = (1 << (EXPONENT - 1)) - 1;
    // 2^n, n from -126 on.
    static float power(int n) { return as_float(uint(n + 127) << 23); }

    // The step between neighbours of x is a power of two; the division by it is exact and the sum with 1.5 * 2^23 rounds, ties to even.
    static uint round(float magnitude) {
        const int exponent = int(as_uint(magnitude) >> 23) - 127;
        const int smallest = 1 - BIAS;
        if (exponent < smallest) return steps(magnitude, smallest);
        return (uint(exponent + BIAS) << FRACTION) + steps(magnitude - power(exponent), exponent);
    }
    // x, less than 2^(n + 1), in units of 2^(n - FRACTION). Two factors, as each must be a float.
    static uint steps(float x, int n) {
        const float scaled = x * power(-n / 2) * power(-n + n / 2) * float(1u << FRACTION);
        const float magic = 12582912.0f;
        volatile const float sum = scaled + magic;
        return uint(sum - magic);
    }

  public:
    Small() = default;
    Small(const Small&) = default;
    Small& operator=(const Small&) & = default;
    explicit Small(float x) {
        const uint sign = (as_uint(x) >> 31) << 15;
        const float magnitude = as_float(as_uint(x) & 0x7fffffffu);
        uint result = INFINITE | 1u << (FRACTION - 1) | ((as_uint(x) & 0x7fffffu) >> (23 - FRACTION));
        if (magnitude == magnitude) {
            const bool infinite = magnitude >= power(BIAS) * 2.0f;
            result = infinite ? INFINITE : round(magnitude);
        }
        raw = uint16_t(sign | result);
    }
    explicit operator float() const {
        const uint exponent = (raw & INFINITE) >> FRACTION, fraction = raw & ((1u << FRACTION) - 1);
        const uint sign = uint(raw >> 15) << 31;
        if (exponent == INFINITE >> FRACTION) return as_float(sign | 0x7f800000u | fraction << (23 - FRACTION));
        const float unit = power((exponent ? int(exponent) : 1) - BIAS);
        const float magnitude = unit * (float(fraction) / float(1u << FRACTION) + (exponent ? 1.0f : 0.0f));
        return as_float(sign | as_uint(magnitude));
    }
};
typedef Small<5, 10> half;
typedef Small<8, 7> bfloat;

struct float4 {
    float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Four elements at once, at a multiple of four.
inline void check_quad(const emulator::Memory& memory, ulong i, const char* what) {
    if ((memory.misalignment + i) % 4) {
        emulator::fail("%s four elements at %s[%llu], which is not aligned to four", what, memory.name, i);
    }
}
template <class E> inline float4 load4(device_ptr<const E> p, ulong i) {
    check_quad(*p.memory, p.start + i, "reads");
    return {float(p[i]), float(p[i + 1]), float(p[i + 2]), float(p[i + 3])};
}
template <class E> inline float4 load4(device_ptr<E> p, ulong i) { return load4(device_ptr<const E>(p), i); }
template <class E> inline void store4(device_ptr<E> p, ulong i, float4 v) {
    check_quad(*p.memory, p.start + i, "writes");
    p[i] = E(v.x);
    p[i + 1] = E(v.y);
    p[i + 2] = E(v.z);
    p[i + 3] = E(v.w);
}

// Eight elements at once, at a multiple of eight.
struct Octet {
    float4 low, high;
};
inline void check_octet(const emulator::Memory& memory, ulong i, const char* what) {
    if ((memory.misalignment + i) % 8) {
        emulator::fail("%s eight elements at %s[%llu], which is not aligned to eight", what, memory.name, i);
    }
}
template <class E> inline Octet load8(device_ptr<const E> p, ulong i) {
    check_octet(*p.memory, p.start + i, "reads");
    return {load4(p, i), load4(p, i + 4)};
}
template <class E> inline Octet load8(device_ptr<E> p, ulong i) { return load8(device_ptr<const E>(p), i); }
template <class E> inline void store8(device_ptr<E> p, ulong i, Octet v) {
    check_octet(*p.memory, p.start + i, "writes");
    store4(p, i, v.low);
    store4(p, i + 4, v.high);
}

inline float exp(float x) { return __builtin_expf(x); }
inline float quick_exp(float x) { return exp(x); }
inline float quick_reciprocal(float x) { return 1.0f / x; }
inline float log(float x) { return __builtin_logf(x); }
inline float sqrt(float x) { return __builtin_sqrtf(x); }
inline float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
inline float fabs(float x) { return __builtin_fabsf(x); }
inline float fmax(float x, float y) { return __builtin_fmaxf(x, y); }
inline float fmin(float x, float y) { return __builtin_fminf(x, y); }
inline float fma(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
inline float floor(float x) { return __builtin_floorf(x); }
inline float tanh(float x) { return __builtin_tanhf(x); }
inline uint min(uint x, uint y) { return x < y ? x : y; }
inline uint max(uint x, uint y) { return x > y ? x : y; }
float min(float, float) = delete;
float max(float, float) = delete;
int min(int, int) = delete;
int max(int, int) = delete;
ulong min(ulong, ulong) = delete;
ulong max(ulong, ulong) = delete;

// What a lane brings to a SIMD group's function, and takes away.
template <class E> struct Lane {
    E value;
    uint argument;
};

template <class E> inline E simd_shuffle(E x, uint lane, int line = __builtin_LINE()) {
    if (lane >= emulator::LANES) emulator::fail("simd_shuffle from lane %u in line %d", lane, line);
    Lane<E> mine{x, lane};
    emulator::meet<Lane<E>>("simd_shuffle", line, mine, [](Lane<E>* const* lanes) {
        E values[emulator::LANES];
        for (uint i = 0; i < emulator::LANES; ++i) values[i] = lanes[i]->value;
        for (uint i = 0; i < emulator::LANES; ++i) lanes[i]->value = values[lanes[i]->argument];
    });
    return mine.value;
}
inline uint own_lane() { return emulator::machine.me->ids.lane; }
template <class E> inline E simd_shuffle_xor(E x, uint mask, int line = __builtin_LINE()) {
    return simd_shuffle(x, own_lane() ^ mask, line);
}
// Beyond the last lane there is nothing to take: all bits are set, a NaN in a float.
template <class E> inline E simd_shuffle_down(E x, uint by, int line = __builtin_LINE()) {
    const uint from = own_lane() + by;
    const E y = simd_shuffle(x, from < emulator::LANES ? from : own_lane(), line);
    return from < emulator::LANES ? y : bits<E>(0xffffffffu);
}
template <class E> inline E simd_broadcast(E x, uint lane, int line = __builtin_LINE()) { return simd_shuffle(x, lane, line); }

// Combines by halves, as the SIMD units do, so that sums have their order.
template <class E, class F> inline E simd_reduce(const char* name, E x, F, int line) {
    Lane<E> mine{x, 0};
    emulator::meet<Lane<E>>(name, line, mine, [](Lane<E>* const* lanes) {
        E values[emulator::LANES];
        for (uint i = 0; i < emulator::LANES; ++i) values[i] = lanes[i]->value;
        for (uint mask = emulator::LANES / 2; mask > 0; mask /= 2) {
            for (uint i = 0; i < mask; ++i) values[i] = F::of(values[i], values[i + mask]);
        }
        for (uint i = 0; i < emulator::LANES; ++i) lanes[i]->value = values[0];
    });
    return mine.value;
}
struct Sum {
    template <class E> static E of(E x, E y) { return x + y; }
};
struct Max {
    static float of(float x, float y) { return fmax(x, y); }
    static uint of(uint x, uint y) { return max(x, y); }
};
struct Min {
    static float of(float x, float y) { return fmin(x, y); }
    static uint of(uint x, uint y) { return min(x, y); }
};
#define SIMD_REDUCTION(name, how)                                                                          \
    inline float name(float x, int line = __builtin_LINE()) { return simd_reduce(#name, x, how{}, line); } \
    inline uint name(uint x, int line = __builtin_LINE()) { return simd_reduce(#name, x, how{}, line); }
SIMD_REDUCTION(simd_sum, Sum)
SIMD_REDUCTION(simd_max, Max)
SIMD_REDUCTION(simd_min, Min)

}  // namespace dialect
