// Attention over packed rows on tensor cores, forward and backward: softmax(scale · Q Kᵀ) V, where query i of a row sees keys
// 0 ..= keys - queries + i. Tiled with a running softmax as in FlashAttention-2 (Dao 2023, arXiv:2307.08691): f32 scores, softmax
// and sums; probabilities are rounded to the inputs' dtype before they meet another matrix. No atomics: the same bits every time.
//
// All three kernels have one shape. A block owns 64 rows for each of its groups of four warps and keeps them in shared memory; tiles of the
// other side stream past, copied while the tile before is worked on. Queries own the forward and dQ, keys own dK and dV.
//
// q, out, dout, dq: [tokens, heads, D]; k, v, dk, dv: [kv_tokens, kv_heads, D]; rows: first query, queries, first key, keys of each;
// stats, delta: [heads, tokens], the log2-sum-exp2 of a query's scores and the dot product of its dout and out.
//
// The host defines BF16 or F16, D (a multiple of 8, at most 128) and how each kernel's work is cut: FORWARD_GROUPS, FORWARD_TILE (rows of
// a streamed tile, 64 or 128), the same of DQ and DKV, and DQ_STAGES and DKV_STAGES (tiles in shared memory at a time).

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

// Starts copying a tile; rows from `count` on and columns from D on become zeros.
template <int TILE, int GROUPS> __device__ __forceinline__ void load(uint tile, const T* source, uint stride, int count) {
    constexpr int CHUNKS = PANELS * 8, STEPS = (TILE * CHUNKS + GROUPS * 128 - 1) / (GROUPS * 128);
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        const int i = step * GROUPS * 128 + threadIdx.x, row = i / CHUNKS, chunk = i % CHUNKS;
        if (TILE * CHUNKS % (GROUPS * 128) != 0 && i >= TILE * CHUNKS) break;
        const int bytes = row < count && chunk * 8 < D ? 16 : 0;
        const T* from = source + (row * stride + chunk * 8);
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place<TILE>(tile, row, chunk)), "l"(from), "r"(bytes));
    }
}

// Starts copying `n` floats; those from `count` on become zeros.
__device__ __forceinline__ void load_floats(uint to, const float* source, int n, int count) {
    const int i = threadIdx.x;
    if (i < n) asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to + i * 4), "l"(i < count ? source + i : source), "r"(i < count ? 4 : 0));
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
#define N64 N32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define WGMMA(n) "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." DTYPE "." DTYPE " "

// A matrix in shared memory as wgmma reads it: swizzled by 128 bytes, eight rows every 1024 bytes, panels `panel` bytes apart.
__device__ __forceinline__ u64 matrix(uint at, uint panel) {
    return (u64)(at >> 4) | (u64)(panel >> 4) << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
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
    asm volatile(WGMMA("64") "{" N32 "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 1;" : F32("+f", c, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void wgmma(float (&c)[64], const uint* a, u64 b) {
    asm volatile(WGMMA("128") "{" N64 "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
                 : F32("+f", c, 0), F32("+f", c, 32) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

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
template <int PENDING> __device__ __forceinline__ void await_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }

// Starts c [64, N] = a bᵀ: the group's 64 rows of tile `a` of ROWS rows with tile `b` of N rows.
template <int N, int ROWS> __device__ __forceinline__ void multiply_transposed(float (&c)[N / 2], uint a, uint b) {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < (D + 15) / 16; k++) {
        const u64 left = matrix(a + group() * 8192 + k / 4 * ROWS * 128 + k % 4 * 32, 16), right = matrix(b + k / 4 * N * 128 + k % 4 * 32, 16);
        if (k == 0) wgmma_transposed_first(c, left, right);
        else wgmma_transposed_next(c, left, right);
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Starts c [64, WIDTH] += a b: the group's packed `a` [64, K] with tile `b` of K rows.
template <int K> __device__ __forceinline__ void multiply_add(float (&c)[WIDTH / 2], uint (&a)[K / 4], uint b) {
    hold(c);
    hold(a);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < K / 16; k++) wgmma(c, a + 4 * k, matrix(b + k * 2048, K * 128));
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
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" KIND ".shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at))

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
        LDMATRIX("", left, place<ROWS>(a, threadIdx.x / 32 * 16 + i % 2 * 8 + j, 2 * k + i / 2));
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

// ---- Softmax and results ----

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// A row's queries and keys, and how much its queries see beyond the key of their own number.
struct Row {
    int first_query, queries, first_key, keys, offset;
    __device__ __forceinline__ Row(uint4 r) : first_query(r.x), queries(r.y), first_key(r.z), keys(r.w), offset((int)r.w - (int)r.y) {}
};

// Puts `with` where a column (`last` counts from this thread's first) is beyond what the row sees: one key more from row to row.
template <int TILE> __device__ __forceinline__ void mask(float (&s)[TILE / 2], int last, float with) {
#pragma unroll
    for (int e = 0; e < TILE / 2; e++)
        if (e / 4 * 8 + e % 2 > last + e / 2 % 2 * 8) s[e] = with;
}

// One step of the running softmax: scores of a tile become exponentials relative to the largest score so far, `largest` and `sum` (of this
// thread's columns) follow, and `shrink` is what earlier results must be multiplied with.
template <int N> __device__ __forceinline__ void softmax(float (&s)[N / 2], float (&largest)[2], float (&sum)[2], float (&shrink)[2], float scale2) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float most = largest[r];
#pragma unroll
        for (int e = 2 * r; e < N / 2; e += 4) most = fmaxf(most, fmaxf(s[e], s[e + 1]));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
        const float base = most == -INF ? 0 : most * scale2;
        shrink[r] = exp2_fast(largest[r] * scale2 - base);
        largest[r] = most;
        float total = 0;
#pragma unroll
        for (int e = 2 * r; e < N / 2; e += 4) {
            s[e] = exp2_fast(s[e] * scale2 - base);
            s[e + 1] = exp2_fast(s[e + 1] * scale2 - base);
            total += s[e] + s[e + 1];
        }
        sum[r] = sum[r] * shrink[r] + total;
    }
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// Writes the group's 64 rows, each times its factor, through its part of a tile that it has done with; `count` rows of the block exist.
template <int ROWS> __device__ __forceinline__ void store(const float (&c)[WIDTH / 2], float factor0, float factor1, uint tile, T* out, u64 stride, int count) {
    asm volatile("bar.sync %0, 128;" ::"r"(group() + 1) : "memory");
#pragma unroll
    for (int j = 0; j < WIDTH / 8; j++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float factor = r ? factor1 : factor0;
            asm volatile("st.shared.b32 [%0], %1;" ::"r"(place<ROWS>(tile, own_row() + 8 * r, j) + lane() % 4 * 4),
                         "r"(pack(c[4 * j + 2 * r] * factor, c[4 * j + 2 * r + 1] * factor)) : "memory");
        }
    __syncwarp();
    const int warp_row = threadIdx.x / 32 * 16;
#pragma unroll
    for (int i = lane(); i < 16 * PANELS * 8; i += 32) {
        const int row = warp_row + i / (PANELS * 8), chunk = i % (PANELS * 8);
        uint4 x;
        asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(place<ROWS>(tile, row, chunk)) : "memory");
        if (row < count && chunk * 8 < D) *(uint4*)(out + row * stride + chunk * 8) = x;
    }
}

// ---- Forward ----
// Grid: heads, rows, blocks of queries of the longest row. The last queries see most and go first.

extern "C" __global__ void __launch_bounds__(FORWARD_GROUPS * 128)
attention_forward(const T* q, const T* k, const T* v, T* out, float* stats, const uint4* rows, int tokens, int heads, int kv_heads, float scale) {
    constexpr int GROUPS = FORWARD_GROUPS, ROWS = GROUPS * 64, TILE = FORWARD_TILE;
    const Row row(rows[blockIdx.y]);
    const int first = (gridDim.z - 1 - blockIdx.z) * ROWS, head = blockIdx.x;
    if (first >= row.queries) return;
    const int count = min(row.queries - first, ROWS);
    const uint q_stride = heads * D, k_stride = kv_heads * D;
    const u64 q_at = (u64)(row.first_query + first) * q_stride + head * D;
    const u64 k_at = (u64)row.first_key * k_stride + head / (heads / kv_heads) * D;
    k += k_at, v += k_at;
    const uint q_tile = first_tile(), k_tiles = q_tile + TILE_BYTES<ROWS>, v_tiles = k_tiles + 2 * TILE_BYTES<TILE>;
    const int seen = max(row.offset + first + count, 0), tiles = (seen + TILE - 1) / TILE;
    const int limit = row.offset + first + own_row(), open = max(row.offset + first + 1, 0) / TILE;
    const float scale2 = scale * 1.44269504f;

    float o[WIDTH / 2] = {}, s[TILE / 2], largest[2] = {-INF, -INF}, sum[2] = {}, shrink[2];
    uint p[TILE / 4] = {};
    auto tile_of = [&](uint tiles_at, int j) { return tiles_at + j % 2 * TILE_BYTES<TILE>; };
    auto load_keys = [&](int j) { load<TILE, GROUPS>(tile_of(k_tiles, j), k + (u64)j * TILE * k_stride, k_stride, row.keys - j * TILE); };
    auto load_values = [&](int j) { load<TILE, GROUPS>(tile_of(v_tiles, j), v + (u64)j * TILE * k_stride, k_stride, row.keys - j * TILE); };
    // The scores of tile j become weights.
    auto weigh = [&](int j, bool masked) {
        hold(s);
        // A thread's columns of the tile start at 2 (lane % 4).
        if (masked) mask<TILE>(s, limit - j * TILE - lane() % 4 * 2, -INF);
        softmax<TILE>(s, largest, sum, shrink, scale2);
        hold(s);
    };
    // The scores of a tile are multiplied ahead of the values of the tile before, whose product then runs under the softmax.
    auto step = [&](int j, bool masked) {
        await_loads();
        multiply_transposed<TILE, ROWS>(s, q_tile, tile_of(k_tiles, j));
        multiply_add<TILE>(o, p, tile_of(v_tiles, j + 1));
        load_keys(max(j - 1, 0));
        load_values(j);
        end_of_load();
        await_products<1>();
        weigh(j, masked);
        // The sums are never negative: they are asked so that the branch, over which the assembler moves no wait, stands behind the weights.
        if (__any_sync(~0u, shrink[0] != 1 || shrink[1] != 1 || sum[0] + sum[1] < 0)) {
            await_products<0>();
            hold(o);
#pragma unroll
            for (int e = 0; e < WIDTH / 2; e++) o[e] *= shrink[e / 2 % 2];
        }
        await_products<0>();
        hold(o);
        hold(p);
        pack(p, s);
    };

    if (tiles > 0) {
        int j = tiles - 1;
        load<ROWS, GROUPS>(q_tile, q + q_at, q_stride, count);
        load_keys(j);
        end_of_load();
        await_loads();
        multiply_transposed<TILE, ROWS>(s, q_tile, tile_of(k_tiles, j));
        load_keys(max(j - 1, 0));
        load_values(j);
        end_of_load();
        await_products<0>();
        weigh(j, true);
        pack(p, s);
        hold(o);
#pragma unroll 1
        for (j--; j >= open; j--) step(j, true);
#pragma unroll 1
        for (; j >= 0; j--) step(j, false);
        await_loads();
        multiply_add<TILE>(o, p, tile_of(v_tiles, 0));
        await_products<0>();
        hold(o);
    }

    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float total = quad_sum(sum[r]);
        factor[r] = total > 0 ? 1 / total : 0;
        const int i = own_row() + 8 * r;
        // Infinite where a query sees no key: the backward then finds probabilities of 0.
        if (lane() % 4 == 0 && i < count) stats[(u64)head * tokens + row.first_query + first + i] = total > 0 ? largest[r] * scale2 + log2f(total) : INF;
    }
    store<ROWS>(o, factor[0], factor[1], q_tile, out + q_at, q_stride, count);
}

// ---- Backward ----
// With P = exp(scale S - lse) and dP = dO Vᵀ: dV = Pᵀ dO, dS = P (dP - delta), dQ = scale dS K, dK = scale dSᵀ Q.

// The dot product of eight numbers with eight.
__device__ __forceinline__ float dot(uint4 x, uint4 y) {
    const uint a[4] = {x.x, x.y, x.z, x.w}, b[4] = {y.x, y.y, y.z, y.w};
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 u = unpack(a[i]), v = unpack(b[i]);
        sum += u.x * v.x + u.y * v.y;
    }
    return sum;
}

// Grid as of the forward. Writes delta as well: it goes before the kernel of keys.
extern "C" __global__ void __launch_bounds__(DQ_GROUPS * 128)
attention_dq(const T* q, const T* k, const T* v, const T* dout, const T* out, const float* stats, float* delta, T* dq, const uint4* rows,
             int tokens, int heads, int kv_heads, float scale) {
    constexpr int GROUPS = DQ_GROUPS, ROWS = GROUPS * 64, TILE = DQ_TILE, STAGES = DQ_STAGES;
    const Row row(rows[blockIdx.y]);
    const int first = (gridDim.z - 1 - blockIdx.z) * ROWS, head = blockIdx.x;
    if (first >= row.queries) return;
    const int count = min(row.queries - first, ROWS);
    const uint q_stride = heads * D, k_stride = kv_heads * D;
    const u64 q_at = (u64)(row.first_query + first) * q_stride + head * D;
    const u64 k_at = (u64)row.first_key * k_stride + head / (heads / kv_heads) * D;
    k += k_at, v += k_at;
    const uint q_tile = first_tile(), dout_tile = q_tile + TILE_BYTES<ROWS>, streamed = dout_tile + TILE_BYTES<ROWS>;
    const int seen = max(row.offset + first + count, 0), tiles = (seen + TILE - 1) / TILE;
    const int limit = row.offset + first + own_row(), open = max(row.offset + first + 1, 0) / TILE;
    const float scale2 = scale * 1.44269504f;

    float c[WIDTH / 2] = {}, s[TILE / 2], dp[TILE / 2];
    uint ds[TILE / 4] = {};
    float base[2], shift[2] = {};
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int i = own_row() + 8 * r;
        const u64 number = (u64)head * tokens + row.first_query + first + i, from = q_at + (u64)i * q_stride;
        base[r] = i < count ? stats[number] : INF;
        for (int d = lane() % 4 * 8; d < D && i < count; d += 32) shift[r] += dot(*(const uint4*)(dout + from + d), *(const uint4*)(out + from + d));
        shift[r] = quad_sum(shift[r]);
        if (lane() % 4 == 0 && i < count) delta[number] = shift[r];
    }
    constexpr int STAGE = 2 * TILE_BYTES<TILE>;
    uint at = streamed;
    auto after = [&](uint tile) { return tile + STAGE == streamed + STAGES * STAGE ? streamed : tile + STAGE; };
    auto load_tile = [&](int j, uint to) {
        load<TILE, GROUPS>(to, k + (u64)j * TILE * k_stride, k_stride, row.keys - j * TILE);
        load<TILE, GROUPS>(to + TILE_BYTES<TILE>, v + (u64)j * TILE * k_stride, k_stride, row.keys - j * TILE);
        end_of_load();
    };
    auto step = [&](int j, bool masked) {
        await_loads();
        multiply_transposed<TILE, ROWS>(s, q_tile, at);
        multiply_transposed<TILE, ROWS>(dp, dout_tile, at + TILE_BYTES<TILE>);
        load_tile(max(j - 1, 0), after(at));
        await_products<1>();
        hold(s);
        hold(c);
        hold(ds);
#pragma unroll
        for (int e = 0; e < TILE / 2; e++) s[e] = exp2_fast(s[e] * scale2 - base[e / 2 % 2]);
        if (masked) mask<TILE>(s, limit - j * TILE - lane() % 4 * 2, 0);
        await_products<0>();
        hold(dp);
#pragma unroll
        for (int e = 0; e < TILE / 2; e++) s[e] *= dp[e] - shift[e / 2 % 2];
        pack(ds, s);
        multiply_add<TILE>(c, ds, at);
        if (STAGES == 2) await_products<0>();
        at = after(at);
    };

    load<ROWS, GROUPS>(q_tile, q + q_at, q_stride, count);
    load<ROWS, GROUPS>(dout_tile, dout + q_at, q_stride, count);
    load_tile(max(tiles - 1, 0), at);
    hold(c);
    int j = tiles - 1;
#pragma unroll 1
    for (; j >= open; j--) step(j, true);
#pragma unroll 1
    for (; j >= 0; j--) step(j, false);
    await_loads();
    await_products<0>();
    hold(c);
    store<ROWS>(c, scale, scale, q_tile, dq + q_at, q_stride, count);
}

// Grid: key heads, rows, blocks of keys of the longest row. The first keys are seen most and go first. A block goes over all query heads
// of its key head; scores stand transposed, keys by queries.
extern "C" __global__ void __launch_bounds__(DKV_GROUPS * 128)
attention_dkv(const T* q, const T* k, const T* v, const T* dout, const float* stats, const float* delta, T* dk, T* dv, const uint4* rows,
              int tokens, int heads, int kv_heads, float scale) {
    constexpr int GROUPS = DKV_GROUPS, ROWS = GROUPS * 64, TILE = DKV_TILE, STAGES = DKV_STAGES, STAGE = 2 * TILE_BYTES<TILE> + 1024;
    const Row row(rows[blockIdx.y]);
    const int first = blockIdx.z * ROWS, kv_head = blockIdx.x, shared_by = heads / kv_heads;
    if (first >= row.keys) return;
    const int count = min(row.keys - first, ROWS);
    const uint q_stride = heads * D, k_stride = kv_heads * D;
    const u64 k_at = (u64)(row.first_key + first) * k_stride + kv_head * D;
    const uint k_tile = first_tile(), v_tile = k_tile + TILE_BYTES<ROWS>, streamed = v_tile + TILE_BYTES<ROWS>;
    // Tiles of queries that see none of the block's keys are left out.
    const int all = (row.queries + TILE - 1) / TILE, skipped = max(first - row.offset, 0) / TILE;
    const float scale2 = scale * 1.44269504f;

    float dk_sum[WIDTH / 2] = {}, dv_sum[WIDTH / 2] = {}, s[TILE / 2], dp[TILE / 2];
    uint p[TILE / 4] = {}, ds[TILE / 4] = {};
    uint at = streamed;
    auto after = [&](uint tile) { return tile + STAGE == streamed + STAGES * STAGE ? streamed : tile + STAGE; };
    // The head and tile at hand; beyond the last head there are only zeros.
    const int end = (kv_head + 1) * shared_by;
    int head = skipped < all ? kv_head * shared_by : end, tile = skipped;
    auto load_tile = [&](uint to) {
        const int start = tile * TILE, left = head < end ? row.queries - start : 0;
        const u64 from = (u64)(row.first_query + start) * q_stride + head * D, number = (u64)head * tokens + row.first_query + start;
        load<TILE, GROUPS>(to, q + from, q_stride, left);
        load<TILE, GROUPS>(to + TILE_BYTES<TILE>, dout + from, q_stride, left);
        // Queries beyond the row are zeros in all four, which adds nothing to any sum.
        load_floats(to + 2 * TILE_BYTES<TILE>, stats + number, TILE, left);
        load_floats(to + 2 * TILE_BYTES<TILE> + 512, delta + number, TILE, left);
        end_of_load();
    };
    // Of a tile's floats, the two of this thread's columns 8 i and next.
    auto two_of = [&](uint floats, int i) {
        float2 x;
        asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(floats + i * 32 + lane() % 4 * 8) : "memory");
        return x;
    };


    load<ROWS, GROUPS>(k_tile, k + k_at, k_stride, count);
    load<ROWS, GROUPS>(v_tile, v + k_at, k_stride, count);
    load_tile(at);
    hold(dk_sum);
    hold(dv_sum);
#pragma unroll 1
    while (head < end) {
        const int start = row.offset + tile * TILE;
        if (++tile == all) tile = skipped, head++;
        const uint q_tile = at, dout_tile = q_tile + TILE_BYTES<TILE>, base = dout_tile + TILE_BYTES<TILE>, shift = base + 512;
        await_loads();
        multiply_transposed<TILE, ROWS>(s, k_tile, q_tile);
        multiply_transposed<TILE, ROWS>(dp, v_tile, dout_tile);
        load_tile(after(at));
        await_products<1>();
        hold(s);
        hold(p);
        hold(ds);
#pragma unroll
        for (int i = 0; i < TILE / 8; i++) {
            const float2 b = two_of(base, i);
#pragma unroll
            for (int e = 4 * i; e < 4 * i + 4; e++) s[e] = exp2_fast(s[e] * scale2 - (e % 2 ? b.y : b.x));
        }
        if (start < first + ROWS - 1) {
            // A key counts from the query on that is the first to see it.
            const int from = first + own_row() - start - lane() % 4 * 2;
#pragma unroll
            for (int e = 0; e < TILE / 2; e++)
                if (e / 4 * 8 + e % 2 < from + e / 2 % 2 * 8) s[e] = 0;
        }
        pack(p, s);
        multiply_add<TILE>(dv_sum, p, dout_tile);
        await_products<1>();
        hold(dp);
#pragma unroll
        for (int i = 0; i < TILE / 8; i++) {
            const float2 b = two_of(shift, i);
#pragma unroll
            for (int e = 4 * i; e < 4 * i + 4; e++) s[e] *= dp[e] - (e % 2 ? b.y : b.x);
        }
        pack(ds, s);
        multiply_add<TILE>(dk_sum, ds, q_tile);
        if (STAGES == 2) await_products<0>();
        at = after(at);
    }
    // Without queries nobody has waited for the copies yet.
    await_loads();
    await_products<0>();
    hold(dk_sum);
    hold(dv_sum);
    store<ROWS>(dk_sum, scale, scale, k_tile, dk + k_at, k_stride, count);
    store<ROWS>(dv_sum, 1, 1, v_tile, dv + k_at, k_stride, count);
}
