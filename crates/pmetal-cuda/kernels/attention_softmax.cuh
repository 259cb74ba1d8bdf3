// What attention's kernels share beside products: rows, masks, the running softmax. Stands behind attention_tiles.cuh.

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

// Elements from one row of each tensor to the next.
struct Pitches { uint q, k, v, out, dout, dq, dk, dv; };

// Puts `with` where a column (`last` counts from this thread's first) is beyond what the row sees: one key more from row to row.
template <int TILE> __device__ __forceinline__ void mask(float (&s)[TILE / 2], int last, float with) {
#pragma unroll
    for (int e = 0; e < TILE / 2; e++)
        if (e / 4 * 8 + e % 2 > last + e / 2 % 2 * 8) s[e] = with;
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
