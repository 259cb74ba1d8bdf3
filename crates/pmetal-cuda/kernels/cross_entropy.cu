// The gradient of the cross-entropy of rows of logits, in their place, where a cluster of thread blocks holds a row in its registers: each
// logit is read once. From compute capability 9.0 on.
//
// This text stands behind the shared prelude, T is half or bfloat. The host defines BLOCKS, the thread blocks of a cluster, ROW_THREADS,
// the threads of each, OCTETS, how many times eight logits a thread holds, and CAPPED: 1 where logits go through `cap * tanh(x / cap)`, else
// 0. Exponents are of two.

#define LOG2E 1.4426950408889634f
// Below every logit, and finite: the difference of two such is 0, not NaN.
#define LOWEST -1.0e38f

#if CAPPED
struct RowParams { uint vocab; uint first; float grad_scale; float cap; };
#else
struct RowParams { uint vocab; uint first; float grad_scale; };
#endif
struct Pair { float top, sum; };

FUNCTION float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

FUNCTION uint largest(uint a, uint b, half) {
    uint c;
    asm("max.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}
FUNCTION uint largest(uint a, uint b, bfloat) {
    uint c;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}
// Twice minus infinity.
FUNCTION uint nothing(half) { return 0xfc00fc00u; }
FUNCTION uint nothing(bfloat) { return 0xff80ff80u; }

#if CAPPED
// 1 - 2 / (e^2y + 1), which is right for all y.
FUNCTION float tangent(float x, RowParams p) {
    return 1.0f - __fdividef(2.0f, power_of_two(x * (2.0f * LOG2E / p.cap)) + 1.0f);
}
FUNCTION float logit(float x, RowParams p) { return p.cap * tangent(x, p); }
FUNCTION float share(float x, float top, RowParams p) {
    const float t = tangent(x, p);
    return power_of_two(fmaf(p.cap * t, LOG2E, -top)) * (1.0f - t * t);
}
FUNCTION float slope(float x, RowParams p) {
    const float t = tangent(x, p);
    return 1.0f - t * t;
}
#else
FUNCTION float logit(float x, RowParams) { return x; }
FUNCTION float share(float x, float top, RowParams) { return power_of_two(fmaf(x, LOG2E, -top)); }
FUNCTION float slope(float, RowParams) { return 1.0f; }
#endif

FUNCTION float exponentials(uint raw, float top, RowParams p) {
    const float2 v = unpack(raw, T());
    return power_of_two(fmaf(logit(v.x, p), LOG2E, -top)) + power_of_two(fmaf(logit(v.y, p), LOG2E, -top));
}
FUNCTION uint scaled(uint raw, float top, float factor, RowParams p) {
    const float2 v = unpack(raw, T());
    return pack(factor * share(v.x, top, p), factor * share(v.y, top, p), T());
}

FUNCTION Pair merged(Pair a, Pair b) {
    const float top = fmaxf(a.top, b.top);
    return {top, a.sum * power_of_two(a.top - top) + b.sum * power_of_two(b.top - top)};
}
FUNCTION Pair merged_lanes(Pair a) {
    const float top = simd_max(a.top);
    return {top, simd_sum(a.sum * power_of_two(a.top - top))};
}

FUNCTION void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
FUNCTION void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// The pair of the whole row from those of its threads. The first arrival at the cluster's barrier lies behind: until all blocks have
// started, there is no writing to their memory.
FUNCTION Pair of_row(Pair own, Pair* simds, Pair* blocks, uint rank) {
    own = merged_lanes(own);
    if (LANE == 0) simds[SIMD] = own;
    __syncthreads();
    own = merged_lanes(LANE < ROW_THREADS / 32 ? simds[LANE] : Pair{LOWEST, 0.0f});
    cluster_wait();
    if (THREAD < BLOCKS) {
        uint to;
        const uint slot = uint(__cvta_generic_to_shared(blocks + rank));
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(slot), "r"(THREAD));
        asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(own.top), "f"(own.sum) : "memory");
    }
    cluster_arrive();
    cluster_wait();
    Pair row = blocks[0];
#pragma unroll
    for (uint i = 1; i < BLOCKS; i++) row = merged(row, blocks[i]);
    return row;
}

// As the shared text's `cross_entropy_gradient`, or `capped_cross_entropy_gradient`, for rows of a multiple of eight logits that begin at aligned places. A cluster has a row.
extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(ROW_THREADS, 1024 / ROW_THREADS)
    cross_entropy_gradient_cluster(T* __restrict__ logits, const uint* __restrict__ labels, float* __restrict__ losses,
                                   const RowParams params) {
    __shared__ Pair simds[32], blocks[BLOCKS];
    const uint row = GROUP_X / BLOCKS, rank = GROUP_X % BLOCKS, octets = params.vocab / 8, label = labels[row];
    const uint first = rank * ROW_THREADS + THREAD;
    uint4* const from = reinterpret_cast<uint4*>(logits + ulong(row) * params.vocab);
    if (label >= params.vocab) {
        for (uint i = first; i < octets; i += BLOCKS * ROW_THREADS) from[i] = make_uint4(0, 0, 0, 0);
        if (first == 0) losses[params.first + row] = 0.0f;
        return;
    }
    cluster_arrive();
    const uint none = nothing(T());
    uint4 held[OCTETS];
#pragma unroll
    for (uint k = 0; k < OCTETS; k++) {
        const uint i = first + k * BLOCKS * ROW_THREADS;
        held[k] = i < octets ? __ldcs(from + i) : make_uint4(none, none, none, none);
    }
    // who holds the label's logit writes the loss: nobody has changed it yet
    const bool owner = label / 8 % (BLOCKS * ROW_THREADS) == first;
    const float raw = owner ? float(logits[ulong(row) * params.vocab + label]) : 0.0f;
    const float target = logit(raw, params);
    uint most = none;
#pragma unroll
    for (uint k = 0; k < OCTETS; k++)
        most = largest(most, largest(largest(held[k].x, held[k].y, T()), largest(held[k].z, held[k].w, T()), T()), T());
    const float2 two = unpack(most, T());
    Pair own = {fmaxf(logit(fmaxf(two.x, two.y), params) * LOG2E, LOWEST), 0.0f};
#pragma unroll
    for (uint k = 0; k < OCTETS; k++)
        // minus infinity behind the row's end has no exponential, but a cap makes it a number
        if (!CAPPED || first + k * BLOCKS * ROW_THREADS < octets)
            own.sum += (exponentials(held[k].x, own.top, params) + exponentials(held[k].y, own.top, params)) +
                       (exponentials(held[k].z, own.top, params) + exponentials(held[k].w, own.top, params));
    const Pair all = of_row(own, simds, blocks, rank);
    const float factor = params.grad_scale / all.sum;
#pragma unroll
    for (uint k = 0; k < OCTETS; k++) {
        const uint i = first + k * BLOCKS * ROW_THREADS;
        if (i < octets)
            __stcs(from + i, make_uint4(scaled(held[k].x, all.top, factor, params), scaled(held[k].y, all.top, factor, params),
                                        scaled(held[k].z, all.top, factor, params), scaled(held[k].w, all.top, factor, params)));
    }
    if (owner) {
        const float probability = power_of_two(fmaf(target, LOG2E, -all.top)) / all.sum;
        logits[ulong(row) * params.vocab + label] = T(params.grad_scale * (probability - 1.0f) * slope(raw, params));
        losses[params.first + row] = logf(all.sum) + (all.top / LOG2E - target);
    }
}
