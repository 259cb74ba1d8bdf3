// The dialect, for Metal. A kernel text is compiled with T defined as float, half or bfloat.
//
//   struct ScaleParams { uint n; float factor; };
//
//   /// One line of what it does: becomes the launcher's doc comment.
//   KERNEL(scale)(READ(T, x, 0), WRITE(T, y, 1), PARAMS(ScaleParams, 2))
//   {
//       for (uint i = THREAD_IN_GRID; i < params.n; i += GRID_THREADS) y[i] = T(float(x[i]) * params.factor);
//   }
//
// - READ, WRITE (every element is written, none is read) and UPDATE take type, name and place. PARAMS comes last. READ_ROWS, WRITE_ROWS and
//   UPDATE_ROWS: it may be a column range of a wider matrix; a parameter says how far its rows lie apart, what lies between is another's.
//   Element types of buffers: T, float, uint, uchar. Fields of parameters: uint, int, float, ulong; one a line or a `;`.
// - GROUP_X, GROUP_Y, GROUP_Z: this threadgroup; GROUPS_X: threadgroups in x. THREAD: this thread of the threadgroup, THREADS: how many
//   there are (a multiple of 32). LANE: this thread of the SIMD group of 32; SIMD: this SIMD group, SIMDS: how many.
// - THREADGROUP(float, name, 64) declares threadgroup memory, at the top of a kernel; BARRIER() waits for the threadgroup and makes its
//   threadgroup memory seen, BARRIER_DEVICE() device memory too; SIMD_BARRIER() the same for the SIMD group.
// - Pointers to pass on: DEVICE_PTR(const T), THREADGROUP_PTR(float). References to a thread's own: THREAD_REF(float). An address space is a
//   type: nothing converts.
// - half, bfloat and T convert to and from float only in words: float(x), T(f). Arithmetic is in float.
// - load4(pointer, i) and store4(pointer, i, float4) move four elements from i on, i a multiple of 4, at an aligned buffer.
//   load8 and store8 move an Octet, two float4 named low and high, from an i that is a multiple of 8, at a buffer aligned to 8 elements.
//   float4 has x, y, z, w and no arithmetic; make_float4 makes one.
// - simd_sum, simd_max, simd_min, simd_shuffle, simd_shuffle_xor, simd_shuffle_down, simd_broadcast: all 32 lanes take part.
// - exp, log, sqrt, rsqrt, fabs, fmax, fmin, fma, floor, tanh: of float. min, max: of uint. as_uint, as_float: bits.
//   quick_exp, quick_reciprocal: right to about 20 bits.
// - Places in large buffers are ulong.

#include <metal_stdlib>
using namespace metal;

#define KERNEL(name) kernel void name
#define READ(type, name, place) device const type* name [[buffer(place)]]
#define WRITE(type, name, place) device type* name [[buffer(place)]]
#define UPDATE(type, name, place) device type* name [[buffer(place)]]
#define READ_ROWS(type, name, place) READ(type, name, place)
#define WRITE_ROWS(type, name, place) WRITE(type, name, place)
#define UPDATE_ROWS(type, name, place) UPDATE(type, name, place)
#define PARAMS(type, place)                                                                                                     \
    constant type& params [[buffer(place)]], uint3 group_in_grid [[threadgroup_position_in_grid]],                              \
        uint3 grid_groups [[threadgroups_per_grid]], uint thread_in_group [[thread_index_in_threadgroup]],                      \
        uint3 group_threads [[threads_per_threadgroup]], uint lane_in_simd [[thread_index_in_simdgroup]],                       \
        uint simd_in_group [[simdgroup_index_in_threadgroup]]

#define GROUP_X group_in_grid.x
#define GROUP_Y group_in_grid.y
#define GROUP_Z group_in_grid.z
#define GROUPS_X grid_groups.x
#define THREAD thread_in_group
#define THREADS group_threads.x
#define LANE lane_in_simd
#define SIMD simd_in_group
#define SIMDS (group_threads.x / 32)
#define THREAD_IN_GRID (GROUP_X * THREADS + THREAD)
#define GRID_THREADS (GROUPS_X * THREADS)

#define THREADGROUP(type, name, size) threadgroup type name[size]
#define THREADGROUP_PTR(type) threadgroup type*
#define DEVICE_PTR(type) device type*
#define THREAD_REF(type) thread type&
#define FUNCTION inline

#define BARRIER() threadgroup_barrier(mem_flags::mem_threadgroup)
#define BARRIER_DEVICE() threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device)
#define SIMD_BARRIER() simdgroup_barrier(mem_flags::mem_threadgroup)

#define quick_exp(x) fast::exp(x)
#define quick_reciprocal(x) fast::divide(1.0f, x)
#define make_float4(x, y, z, w) float4(x, y, z, w)
#define as_uint(x) as_type<uint>(x)
#define as_float(x) as_type<float>(x)

template <typename E>
FUNCTION float4 load4(device const E* p, ulong i) { return float4(*reinterpret_cast<device const vec<E, 4>*>(p + i)); }
template <typename E>
FUNCTION void store4(device E* p, ulong i, float4 v) { *reinterpret_cast<device vec<E, 4>*>(p + i) = vec<E, 4>(v); }

struct Octet { float4 low, high; };
template <typename E>
FUNCTION Octet load8(device const E* p, ulong i) { return {load4(p, i), load4(p, i + 4)}; }
template <typename E>
FUNCTION void store8(device E* p, ulong i, Octet v) {
    store4(p, i, v.low);
    store4(p, i + 4, v.high);
}
