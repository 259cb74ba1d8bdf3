// Tiles in shared memory and their products on tensor cores, for attention's kernels, which stand behind this text: with wgmma on sm_90a,
// with mma.sync elsewhere. The host defines BF16 or F16 and D, the width of a head: a multiple of 8, at most 128.

typedef unsigned short T;
typedef unsigned int uint;
typedef unsigned long long u64;

constexpr int PANELS = (D + 63) / 64;
constexpr int WIDTH = PANELS * 64;
#define INF __int_as_float(0x7f800000)

#ifdef BF16
#define DTYPE "bf16"
#else
#define DTYPE "f16"
#endif

// ---- Tiles ----
// A tile of n rows lies in shared memory as panels of 64 columns, n · 128 bytes each; the 16-byte chunk c of row r of a panel is at
// c ^ (r & 7): rows and columns are then read without bank conflicts, and it is the 128-byte swizzle that wgmma knows.

template <int TILE> constexpr int TILE_BYTES = TILE * WIDTH * 2;

template <int TILE> __device__ __forceinline__ uint place(uint tile, int row, int chunk) {
    return tile + (chunk / 8) * TILE * 128 + row * 128 + ((chunk ^ row) & 7) * 16;
}

// Where tiles may begin: swizzles want 1024 bytes.
__device__ __forceinline__ uint first_tile() {
    extern __shared__ unsigned char memory[];
    return ((uint)__cvta_generic_to_shared(memory) + 1023) & ~1023u;
}

// Starts copying a tile, with THREADS threads of which this is number `thread`; rows from `count` on and columns from D on become zeros.
template <int TILE, int THREADS> __device__ __forceinline__ void load(uint tile, const T* source, uint pitch, int count, int thread) {
    // A thread keeps its chunk, and its place in the swizzle: rows go on by a multiple of 8.
    constexpr int CHUNKS = PANELS * 8, AT_ONCE = THREADS / CHUNKS;
    static_assert(AT_ONCE % 8 == 0 && TILE % AT_ONCE == 0, "whole rows of threads");
    const int row = thread / CHUNKS, chunk = thread % CHUNKS;
    const uint to = place<TILE>(tile, row, chunk);
    const T* from = source + (u64)row * pitch + chunk * 8;
    if (chunk * 8 >= D) count = 0;
#pragma unroll
    for (int step = 0; step < TILE / AT_ONCE; step++) {
        const int bytes = row + step * AT_ONCE < count ? 16 : 0;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to + step * AT_ONCE * 128), "l"(from), "r"(bytes));
        from += (u64)AT_ONCE * pitch;
    }
}

// Starts copying `n` floats, of which there are no more than threads; those from `count` on become zeros.
__device__ __forceinline__ void load_floats(uint to, const float* source, int n, int count, int thread) {
    if (thread < n)
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to + thread * 4), "l"(source + thread), "r"(thread < count ? 4 : 0));
}

__device__ __forceinline__ void end_of_load() { asm volatile("cp.async.commit_group;"); }

// Waits for all copies of all threads; behind it all threads are also done with what they read before.
__device__ __forceinline__ void await_loads() {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
    __syncthreads();
}

// ---- Products ----
// Both run on a group of four warps and have one accumulator layout: warp w has rows 16 w .. 16 w + 16; of the two rows lane / 4 and
// lane / 4 + 8 a lane has columns 8 j + 2 (lane % 4) and the next, for every j, in elements 4 j, 4 j + 1 and 4 j + 2, 4 j + 3.
// Two neighbours packed into a word are the same layout's left operand.

__device__ __forceinline__ int group() { return threadIdx.x / 128; }
// A number that is the same in all lanes, for the compiler to see: addresses of matrices are to lie in registers of the whole warp.
__device__ __forceinline__ uint uniform(uint x) { return __shfl_sync(~0u, x, 0); }
__device__ __forceinline__ uint4 uniform(uint4 x) { return make_uint4(uniform(x.x), uniform(x.y), uniform(x.z), uniform(x.w)); }
// Where the group's 64 rows of a tile begin.
__device__ __forceinline__ uint own_rows(uint tile) { return uniform(tile + group() * 8192); }
__device__ __forceinline__ int lane() { return threadIdx.x % 32; }
// First of the two rows of this thread in its block.
__device__ __forceinline__ int own_row() { return threadIdx.x / 32 * 16 + lane() / 4; }

__device__ __forceinline__ uint pack(float low, float high) {
    uint both;
    asm("cvt.rn." DTYPE "x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

__device__ __forceinline__ float2 unpack(uint both) {
#ifdef BF16
    return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u));
#else
    float2 x;
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(x.x), "=f"(x.y) : "r"(both));
    return x;
#endif
}

template <int N> __device__ __forceinline__ void pack(uint (&to)[N], const float (&from)[2 * N]) {
#pragma unroll
    for (int i = 0; i < N; i++) to[i] = pack(from[2 * i], from[2 * i + 1]);
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

#define F8(IO, d, i) IO(d[i]), IO(d[i + 1]), IO(d[i + 2]), IO(d[i + 3]), IO(d[i + 4]), IO(d[i + 5]), IO(d[i + 6]), IO(d[i + 7])
#define F32(IO, d, i) F8(IO, d, i), F8(IO, d, i + 8), F8(IO, d, i + 16), F8(IO, d, i + 24)
#define N32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define N64                                                                                                                       \
    N32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61" \
        ",%62,%63"
#define WGMMA(n) "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." DTYPE "." DTYPE " "

// A matrix in shared memory as wgmma reads it, `further` bytes behind `at`: swizzled by 128 bytes, eight rows every 1024 bytes, panels
// `panel` bytes apart.
__device__ __forceinline__ u64 matrix(uint at, uint panel, uint further) {
    return (u64)((at >> 4 | (panel >> 4) << 16) + (further >> 4)) | (u64)(1024 >> 4) << 32 | 1ull << 62;
}

// c = a bᵀ where nothing is read of c, and c += a bᵀ.
#define WGMMA_TRANSPOSED(name, IO, add)                                                                                      \
    __device__ __forceinline__ void name(float (&c)[32], u64 a, u64 b) {                                                     \
        asm volatile(WGMMA("64") "{" N32 "}, %32, %33, " add ", 1, 1, 0, 0;" : F32(IO, c, 0) : "l"(a), "l"(b));               \
    }                                                                                                                        \
    __device__ __forceinline__ void name(float (&c)[64], u64 a, u64 b) {                                                     \
        asm volatile(WGMMA("128") "{" N64 "}, %64, %65, " add ", 1, 1, 0, 0;" : F32(IO, c, 0), F32(IO, c, 32) : "l"(a), "l"(b)); \
    }
WGMMA_TRANSPOSED(wgmma_transposed_first, "=f", "0")
WGMMA_TRANSPOSED(wgmma_transposed_next, "+f", "1")

// c += a b with a in registers.
__device__ __forceinline__ void wgmma(float (&c)[32], const uint* a, u64 b) {
    asm volatile(WGMMA("64") "{" N32 "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
                 : F32("+f", c, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void wgmma(float (&c)[64], const uint* a, u64 b) {
    asm volatile(WGMMA("128") "{" N64 "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
                 : F32("+f", c, 0), F32("+f", c, 32) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// c [64, 64] = a bᵀ, or c += a bᵀ, with a in registers.
#define WGMMA_LEFT_TRANSPOSED(name, IO, add)                                                            \
    __device__ __forceinline__ void name(float (&c)[32], const uint* a, u64 b) {                        \
        asm volatile(WGMMA("64") "{" N32 "}, {%32,%33,%34,%35}, %36, " add ", 1, 1, 0;"                 \
                     : F32(IO, c, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));             \
    }
WGMMA_LEFT_TRANSPOSED(wgmma_left_first, "=f", "0")
WGMMA_LEFT_TRANSPOSED(wgmma_left_next, "+f", "1")

// Keeps the compiler from moving uses of registers over this place: products run on while the threads do something else.
template <int N> __device__ __forceinline__ void hold(float (&c)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(c[i])::"memory");
}
template <int N> __device__ __forceinline__ void hold(uint (&c)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(c[i])::"memory");
}

// Waits for all products but the last `PENDING`.
template <int PENDING> __device__ __forceinline__ void await_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Starts c [64, N] = a bᵀ: 64 rows, from `a` on, of a tile of ROWS rows with tile `b` of N rows.
template <int N, int ROWS> __device__ __forceinline__ void multiply_transposed(float (&c)[N / 2], uint a, uint b) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < (D + 15) / 16; k++) {
        const u64 left = matrix(a, 16, k / 4 * ROWS * 128 + k % 4 * 32);
        const u64 right = matrix(b, 16, k / 4 * N * 128 + k % 4 * 32);
        if (k == 0) wgmma_transposed_first(c, left, right);
        else wgmma_transposed_next(c, left, right);
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// The same with the group's 64 rows of `a` in registers.
template <int N> __device__ __forceinline__ void multiply_left_transposed(float (&c)[N / 2], uint (&a)[WIDTH / 4], uint b) {
    hold(a);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < (D + 15) / 16; k++) {
        const u64 right = matrix(b, 16, k / 4 * N * 128 + k % 4 * 32);
        if (k == 0) wgmma_left_first(c, a, right);
        else wgmma_left_next(c, a + 4 * k, right);
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Starts c [64, WIDTH] += a b: the group's packed `a` [64, K] with tile `b` of K rows.
template <int K> __device__ __forceinline__ void multiply_add(float (&c)[WIDTH / 2], uint (&a)[K / 4], uint b) {
    hold(c);
    hold(a);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < K / 16; k++) wgmma(c, a + 4 * k, matrix(b, K * 128, k * 2048));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    hold(c);
}

#else

// The same with mma.sync, which every chip since sm_80 has: each warp on its own, done when the function returns.

template <int N> __device__ __forceinline__ void hold(float (&)[N]) {}
template <int N> __device__ __forceinline__ void hold(uint (&)[N]) {}
template <int PENDING> __device__ __forceinline__ void await_products() {}

// Four 8x8 matrices; lane 8 i + j gives the address of row j of matrix i.
#define LDMATRIX(KIND, to, at) \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" KIND ".shared.b16 {%0,%1,%2,%3}, [%4];"                \
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at))

__device__ __forceinline__ void mma(float* c, const uint* a, uint b0, uint b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." DTYPE "." DTYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <int N, int ROWS> __device__ __forceinline__ void multiply_transposed(float (&c)[N / 2], uint a, uint b) {
    const int i = lane() / 8, j = lane() % 8;
#pragma unroll
    for (int e = 0; e < N / 2; e++) c[e] = 0;
#pragma unroll
    for (int k = 0; k < (D + 15) / 16; k++) {
        uint left[4], right[4];
        LDMATRIX("", left, place<ROWS>(a, threadIdx.x / 32 % 4 * 16 + i % 2 * 8 + j, 2 * k + i / 2));
#pragma unroll
        for (int n = 0; n < N / 16; n++) {
            LDMATRIX("", right, place<N>(b, n * 16 + i / 2 * 8 + j, 2 * k + i % 2));
            mma(c + 8 * n, left, right[0], right[1]);
            mma(c + 8 * n + 4, left, right[2], right[3]);
        }
    }
}

template <int K> __device__ __forceinline__ void multiply_add(float (&c)[WIDTH / 2], uint (&a)[K / 4], uint b) {
    const int i = lane() / 8, j = lane() % 8;
#pragma unroll
    for (int k = 0; k < K / 16; k++) {
#pragma unroll
        for (int n = 0; n < WIDTH / 16; n++) {
            uint right[4];
            LDMATRIX(".trans", right, place<K>(b, k * 16 + i % 2 * 8 + j, 2 * n + i / 2));
            mma(c + 8 * n, a + 4 * k, right[0], right[1]);
            mma(c + 8 * n + 4, a + 4 * k, right[2], right[3]);
        }
    }
}

#endif
