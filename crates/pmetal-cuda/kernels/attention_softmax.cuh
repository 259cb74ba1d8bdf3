// What attention's kernels share beside products: rows, reaches, masks, caps, the running softmax. Stands behind attention_tiles.cuh. The
// host defines LIMITED and CAPPED, each 0 or 1: whether queries see but some of the keys up to their own, and whether scores have a cap.

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

// Zero where nothing is limited, in a word that the compiler folds first: such kernels are then compiled as if there were no limits.
#define IF_LIMITED(x) (LIMITED ? (x) : 0)

// Where queries are LIMITED, they see of the keys up to their own the last `window`, and of these those of their own chunk of `chunk` keys.
// A query's position is its own key's.
struct Reach {
    int window, chunk;
    // The first key that is seen from a position.
    __device__ __forceinline__ int first(int position) const {
        return IF_LIMITED(max(max(position + 1 - window, position / chunk * chunk), 0));
    }
    // How many keys are seen from a position; a query that does not see its own key sees none.
    __device__ __forceinline__ int seen(int position) const { return max(position + 1 - first(position), 0); }
    // From how many positions a key is seen, its own the first.
    __device__ __forceinline__ int times(int key) const { return min(window, chunk - key % chunk); }
    // Of a row's queries those up to the last that sees a key.
    __device__ __forceinline__ int queries(const Row& row, int key) const {
        return LIMITED ? min(row.queries, key + times(key) - row.offset) : row.queries;
    }
    // Tiles of keys that are not seen from a position on, and those that are not seen whole from all positions up to one.
    template <int TILE> __device__ __forceinline__ int skipped(int position) const { return first(position) / TILE; }
    template <int TILE> __device__ __forceinline__ int cut(int position) const { return (first(position) + TILE - 1) / TILE; }
};

// Elements from one row of each tensor to the next.
struct Pitches { uint q, k, v, out, dout, dq, dk, dv; };

// Puts `with` where a column is not among what the row sees: up to `last`, which counts from this thread's first and is one more from row
// to row, and of this thread's two rows no more than `seen`.
template <int TILE> __device__ __forceinline__ void mask(float (&s)[TILE / 2], int last, const int (&seen)[2], float with) {
#pragma unroll
    for (int e = 0; e < TILE / 2; e++) {
        const int column = e / 4 * 8 + e % 2, row = e / 2 % 2, end = last + row * 8;
        if (LIMITED ? (uint)(end - column) >= seen[row] : column > end) s[e] = with;
    }
}

// How products become scores and these weights, in powers of 2: score = scale · product, or where they are CAPPED
// cap · tanh(scale · product / cap).
struct Scores {
    float scale2, inner;
    __device__ __forceinline__ Scores(float scale, float cap)
        : scale2((CAPPED ? cap : scale) * 1.44269504f), inner(2 * 1.44269504f * scale / cap) {}
    // What `scale2` makes a score: right to a part of 2^-22 of the cap.
    __device__ __forceinline__ float unscaled(float product) const {
        if (!CAPPED) return product;
        float share;
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(share) : "f"(1 + exp2_fast(product * inner)));
        return 1 - 2 * share;
    }
    template <int N> __device__ __forceinline__ void unscale(float (&s)[N]) const {
        if constexpr (CAPPED) {
#pragma unroll
            for (int e = 0; e < N; e++) s[e] = unscaled(s[e]);
        }
    }
    // The weight 2^(score - base) and, in `slope`, what a cap makes of the score's slope.
    __device__ __forceinline__ float weight(float product, float base, float& slope) const {
        const float x = unscaled(product);
        slope = CAPPED ? 1 - x * x : 1;
        return exp2_fast(x * scale2 - base);
    }
};

// Of a tile's floats, the two of this thread's columns 8 i and next.
__device__ __forceinline__ float2 two_of(uint floats, int i) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(floats + i * 32 + lane() % 4 * 8) : "memory");
    return x;
}

// Products of keys by queries, whose statistics are at `base`, become weights: packed in `p`, and in `s` times the slopes of their scores.
// A key counts from the column on that is the first to see it, `from` as of this thread's first, and of its two keys for `times` columns.
template <int TILE>
__device__ __forceinline__ void weigh_transposed(float (&s)[TILE / 2], uint (&p)[TILE / 4], const Scores& scores, uint base, bool masked,
                                                 int from, const int (&times)[2]) {
    auto unseen = [&](int e) {
        const int column = e / 4 * 8 + e % 2, row = e / 2 % 2, begin = from + row * 8;
        return LIMITED ? (uint)(column - begin) >= times[row] : column < begin;
    };
#pragma unroll
    for (int i = 0; i < TILE / 8; i++) {
        const float2 b = two_of(base, i);
#pragma unroll
        for (int e = 4 * i; e < 4 * i + 4; e += 2) {
            float slopes[2];
            s[e] = scores.weight(s[e], b.x, slopes[0]);
            s[e + 1] = scores.weight(s[e + 1], b.y, slopes[1]);
            if (!CAPPED) continue;
            // There are no registers for the slopes until `p` is packed.
            if (masked && unseen(e)) s[e] = 0;
            if (masked && unseen(e + 1)) s[e + 1] = 0;
            p[e / 2] = pack(s[e], s[e + 1]);
            s[e] *= slopes[0];
            s[e + 1] *= slopes[1];
        }
    }
    if constexpr (!CAPPED) {
        if (masked) {
#pragma unroll
            for (int e = 0; e < TILE / 2; e++)
                if (unseen(e)) s[e] = 0;
        }
        pack(p, s);
    }
}

// One step of the running softmax: scores of a tile become exponentials relative to the largest score so far, `largest` and `sum` (of this
// thread's columns) follow, and `shrink` is what earlier results must be multiplied with.
template <int N>
__device__ __forceinline__ void softmax(float (&s)[N / 2], float (&largest)[2], float (&sum)[2], float (&shrink)[2], float scale2) {
    // Two chains a row: a warp has few others to hide behind.
    float most[2][2] = {{largest[0], -INF}, {largest[1], -INF}}, total[2][2] = {}, base[2];
#pragma unroll
    for (int e = 0; e < N / 2; e += 2) most[e / 2 % 2][e / 4 % 2] = fmaxf(most[e / 2 % 2][e / 4 % 2], fmaxf(s[e], s[e + 1]));
#pragma unroll
    for (int r = 0; r < 2; r++) most[r][0] = fmaxf(most[r][0], most[r][1]);
#pragma unroll
    for (int lanes = 1; lanes <= 2; lanes *= 2)
#pragma unroll
        for (int r = 0; r < 2; r++) most[r][0] = fmaxf(most[r][0], __shfl_xor_sync(~0u, most[r][0], lanes));
#pragma unroll
    for (int r = 0; r < 2; r++) {
        base[r] = most[r][0] == -INF ? 0 : most[r][0] * scale2;
        shrink[r] = exp2_fast(largest[r] * scale2 - base[r]);
        largest[r] = most[r][0];
    }
#pragma unroll
    for (int e = 0; e < N / 2; e += 2) {
        s[e] = exp2_fast(s[e] * scale2 - base[e / 2 % 2]);
        s[e + 1] = exp2_fast(s[e + 1] * scale2 - base[e / 2 % 2]);
        total[e / 2 % 2][e / 4 % 2] += s[e] + s[e + 1];
    }
#pragma unroll
    for (int r = 0; r < 2; r++) sum[r] = sum[r] * shrink[r] + (total[r][0] + total[r][1]);
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

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

// Two groups take turns at starting products: one is at its softmax while the other has the tensor cores. Group 0 is first.
template <int GROUPS> __device__ __forceinline__ void await_turn() {
    if (GROUPS == 2) asm volatile("bar.sync %0, 256;" ::"r"(3 + group()) : "memory");
}
template <int GROUPS> __device__ __forceinline__ void pass_turn() {
    if (GROUPS == 2) asm volatile("bar.arrive %0, 256;" ::"r"(4 - group()) : "memory");
}
