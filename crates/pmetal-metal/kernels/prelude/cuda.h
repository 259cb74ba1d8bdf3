// The dialect, for CUDA C++ through NVRTC. What each word means stands in metal.h; the typedef of T follows. No header is included: where
// kernels are compiled there may be none. GPUs from compute capability 8.0 on.

typedef unsigned int uint;
typedef unsigned char uchar;
typedef unsigned long long ulong;

#define KERNEL(name) extern "C" __global__ void name
#define READ(type, name, place) const type* __restrict__ name
#define WRITE(type, name, place) type* __restrict__ name
#define UPDATE(type, name, place) type* __restrict__ name
#define READ_ROWS(type, name, place) READ(type, name, place)
#define WRITE_ROWS(type, name, place) WRITE(type, name, place)
#define UPDATE_ROWS(type, name, place) UPDATE(type, name, place)
#define PARAMS(type, place) const type params

#define GROUP_X blockIdx.x
#define GROUP_Y blockIdx.y
#define GROUP_Z blockIdx.z
#define GROUPS_X gridDim.x
#define THREAD threadIdx.x
#define THREADS blockDim.x
#define LANE (threadIdx.x & 31u)
#define SIMD (threadIdx.x >> 5)
#define SIMDS (blockDim.x >> 5)
#define THREAD_IN_GRID (GROUP_X * THREADS + THREAD)
#define GRID_THREADS (GROUPS_X * THREADS)

#define THREADGROUP(type, name, size) __shared__ type name[size]
#define THREADGROUP_PTR(type) type*
#define DEVICE_PTR(type) type*
#define THREAD_REF(type) type&
#define FUNCTION __device__ __forceinline__

struct half {
    unsigned short bits;
    half() = default;
    explicit FUNCTION half(float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
    explicit FUNCTION operator float() const {
        float x;
        asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
        return x;
    }
};
struct bfloat {
    unsigned short bits;
    bfloat() = default;
    explicit FUNCTION bfloat(float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
    explicit FUNCTION operator float() const { return __uint_as_float(uint(bits) << 16); }
};

#define BARRIER() __syncthreads()
#define BARRIER_DEVICE() __syncthreads()
#define SIMD_BARRIER() __syncwarp()

#define as_uint(x) __float_as_uint(x)
#define as_float(x) __uint_as_float(x)

FUNCTION float quick_exp(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
    return y;
}
FUNCTION float quick_reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

FUNCTION float simd_shuffle(float x, uint lane) { return __shfl_sync(0xffffffffu, x, lane); }
FUNCTION uint simd_shuffle(uint x, uint lane) { return __shfl_sync(0xffffffffu, x, lane); }
FUNCTION float simd_shuffle_xor(float x, uint mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
FUNCTION uint simd_shuffle_xor(uint x, uint mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
FUNCTION float simd_shuffle_down(float x, uint by) { return __shfl_down_sync(0xffffffffu, x, by); }
FUNCTION uint simd_shuffle_down(uint x, uint by) { return __shfl_down_sync(0xffffffffu, x, by); }
FUNCTION float simd_broadcast(float x, uint lane) { return __shfl_sync(0xffffffffu, x, lane); }
FUNCTION uint simd_broadcast(uint x, uint lane) { return __shfl_sync(0xffffffffu, x, lane); }
FUNCTION float simd_sum(float x) {
    for (uint mask = 16; mask > 0; mask >>= 1) x += simd_shuffle_xor(x, mask);
    return x;
}
FUNCTION uint simd_sum(uint x) { return __reduce_add_sync(0xffffffffu, x); }
FUNCTION float simd_max(float x) {
    for (uint mask = 16; mask > 0; mask >>= 1) x = fmaxf(x, simd_shuffle_xor(x, mask));
    return x;
}
FUNCTION uint simd_max(uint x) { return __reduce_max_sync(0xffffffffu, x); }
FUNCTION float simd_min(float x) {
    for (uint mask = 16; mask > 0; mask >>= 1) x = fminf(x, simd_shuffle_xor(x, mask));
    return x;
}
FUNCTION uint simd_min(uint x) { return __reduce_min_sync(0xffffffffu, x); }

FUNCTION float4 load4(const float* p, ulong i) { return *reinterpret_cast<const float4*>(p + i); }
FUNCTION void store4(float* p, ulong i, float4 v) { *reinterpret_cast<float4*>(p + i) = v; }
struct Octet { float4 low, high; };
FUNCTION Octet load8(const float* p, ulong i) { return {load4(p, i), load4(p, i + 4)}; }
FUNCTION void store8(float* p, ulong i, Octet v) {
    store4(p, i, v.low);
    store4(p, i + 4, v.high);
}
FUNCTION float2 unpack(uint raw, half) {
    float2 v;
    asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(v.x), "=f"(v.y) : "r"(raw));
    return v;
}
FUNCTION float2 unpack(uint raw, bfloat) { return make_float2(__uint_as_float(raw << 16), __uint_as_float(raw & 0xffff0000u)); }
FUNCTION uint pack(float x, float y, half) {
    uint raw;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(raw) : "f"(y), "f"(x));
    return raw;
}
FUNCTION uint pack(float x, float y, bfloat) {
    uint raw;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(raw) : "f"(y), "f"(x));
    return raw;
}
template <typename E>
FUNCTION float4 load4(const E* p, ulong i) {
    const uint2 raw = *reinterpret_cast<const uint2*>(p + i);
    const float2 a = unpack(raw.x, E()), b = unpack(raw.y, E());
    return make_float4(a.x, a.y, b.x, b.y);
}
template <typename E>
FUNCTION void store4(E* p, ulong i, float4 v) {
    *reinterpret_cast<uint2*>(p + i) = make_uint2(pack(v.x, v.y, E()), pack(v.z, v.w, E()));
}
template <typename E>
FUNCTION Octet load8(const E* p, ulong i) {
    const uint4 raw = *reinterpret_cast<const uint4*>(p + i);
    const float2 a = unpack(raw.x, E()), b = unpack(raw.y, E()), c = unpack(raw.z, E()), d = unpack(raw.w, E());
    return {make_float4(a.x, a.y, b.x, b.y), make_float4(c.x, c.y, d.x, d.y)};
}
template <typename E>
FUNCTION void store8(E* p, ulong i, Octet v) {
    *reinterpret_cast<uint4*>(p + i) = make_uint4(pack(v.low.x, v.low.y, E()), pack(v.low.z, v.low.w, E()),
                                                  pack(v.high.x, v.high.y, E()), pack(v.high.z, v.high.w, E()));
}
