// The cross-entropy of rows of logits, what surrounds it, and its gradient.
//
// A row is read by one threadgroup with a running maximum and the sum of exponentials relative to it (Milakov and Gimelshein, "Online
// normalizer calculation for softmax", 2018), so that the loss reads it once and the gradient twice. Statistics are float.

// Below every logit, and finite: the difference of two such is 0, not NaN.
#define LOWEST -3.0e38f

struct CrossEntropyParams { uint vocab; uint first; float grad_scale; };
struct CappedCrossEntropyParams { uint vocab; uint first; float grad_scale; float cap; };
struct ScatterParams { uint width; };
struct SumParams { uint n; float scale; };

FUNCTION float group_sum(float x, THREADGROUP_PTR(float) partial, uint lane, uint simd, uint simds)
{
    x = simd_sum(x);
    if (lane == 0) partial[simd] = x;
    BARRIER();
    x = simd_sum(lane < simds ? partial[lane] : 0.0f);
    BARRIER();
    return x;
}

FUNCTION float group_max(float x, THREADGROUP_PTR(float) partial, uint lane, uint simd, uint simds)
{
    x = simd_max(x);
    if (lane == 0) partial[simd] = x;
    BARRIER();
    x = simd_max(lane < simds ? partial[lane] : LOWEST);
    BARRIER();
    return x;
}

// A threadgroup's share of the work: this thread's place in it.
struct Crew { uint id; uint threads; uint lane; uint simd; uint simds; };
#define CREW {THREAD, THREADS, LANE, SIMD, SIMDS}

// A row of `n` logits. Those of an index that is none are not counted.
struct Row { ulong start; uint n; uint label; float cap; };

struct Softmax { float top; float sum; };

// Logits as they lie there.
struct Plain {
    static FUNCTION float logit(float x, float) { return x; }
    static FUNCTION float4 four(float4 x, float) { return x; }
    static FUNCTION float share(float x, float, Softmax row, float factor) { return factor * exp(x - row.top); }
    static FUNCTION float slope(float, float) { return 1.0f; }
};

// Logits behind a cap: `cap * tanh(x / cap)`. Gradients are those of `x`.
struct Capped {
    // Metal's tanh of large numbers is none
    static FUNCTION float tangent(float x) { return x > 15.0f ? 1.0f : x < -15.0f ? -1.0f : tanh(x); }
    static FUNCTION float logit(float x, float cap) { return cap * tangent(x / cap); }
    static FUNCTION float4 four(float4 x, float cap)
    {
        return make_float4(logit(x.x, cap), logit(x.y, cap), logit(x.z, cap), logit(x.w, cap));
    }
    static FUNCTION float share(float x, float cap, Softmax row, float factor)
    {
        const float t = tangent(x / cap);
        return factor * exp(cap * t - row.top) * (1.0f - t * t);
    }
    static FUNCTION float slope(float x, float cap)
    {
        const float t = tangent(x / cap);
        return 1.0f - t * t;
    }
};

FUNCTION float max4(float4 x) { return fmax(fmax(x.x, x.y), fmax(x.z, x.w)); }

FUNCTION float exp_sum(float4 x, float top) { return (exp(x.x - top) + exp(x.y - top)) + (exp(x.z - top) + exp(x.w - top)); }

FUNCTION void rise(float to, THREAD_REF(float) top, THREAD_REF(float) sum)
{
    if (to > top) {
        sum *= exp(top - to);
        top = to;
    }
}

// Elements of a row of `n` from `start` on before the first that is aligned: to 64, as SIMD groups that share a cache line cost a third more.
FUNCTION uint ahead(ulong start, uint n) { return min(uint((64 - start % 64) % 64), n); }

// This thread's maximum and sum of exponentials of a row.
template <typename L>
FUNCTION void statistics(DEVICE_PTR(const T) logits, Row row, Crew crew, THREAD_REF(float) top, THREAD_REF(float) sum)
{
    const uint lead = ahead(row.start, row.n), threads = crew.threads;
    const uint quads = (row.n - lead) / 4;
    const ulong start = row.start + lead;
    uint i = crew.id;
    for (; i + 3 * threads < quads; i += 4 * threads) {
        const float4 a = L::four(load4(logits, start + 4 * ulong(i)), row.cap);
        const float4 b = L::four(load4(logits, start + 4 * ulong(i + threads)), row.cap);
        const float4 c = L::four(load4(logits, start + 4 * ulong(i + 2 * threads)), row.cap);
        const float4 d = L::four(load4(logits, start + 4 * ulong(i + 3 * threads)), row.cap);
        rise(fmax(fmax(max4(a), max4(b)), fmax(max4(c), max4(d))), top, sum);
        sum += (exp_sum(a, top) + exp_sum(b, top)) + (exp_sum(c, top) + exp_sum(d, top));
    }
    for (; i < quads; i += threads) {
        const float4 a = L::four(load4(logits, start + 4 * ulong(i)), row.cap);
        rise(max4(a), top, sum);
        sum += exp_sum(a, top);
    }
    for (uint edge = crew.id; edge < row.n - 4 * quads; edge += threads) {
        const float x = L::logit(float(logits[row.start + (edge < lead ? edge : edge + 4 * quads)]), row.cap);
        rise(x, top, sum);
        sum += exp(x - top);
    }
}

template <typename L>
FUNCTION Softmax softmax_of(DEVICE_PTR(const T) logits, Row row, Crew crew, THREADGROUP_PTR(float) partial)
{
    float own = LOWEST, sum = 0.0f;
    statistics<L>(logits, row, crew, own, sum);
    const float top = group_max(own, partial, crew.lane, crew.simd, crew.simds);
    sum = group_sum(sum * exp(own - top), partial, crew.lane, crew.simd, crew.simds);
    return {top, sum};
}

template <typename L>
FUNCTION float4 four_shares(float4 x, float cap, Softmax all, float factor)
{
    return make_float4(L::share(x.x, cap, all, factor), L::share(x.y, cap, all, factor), L::share(x.z, cap, all, factor),
                       L::share(x.w, cap, all, factor));
}

// Turns this thread's part of a row into its shares of `factor`.
template <typename L>
FUNCTION void shares(DEVICE_PTR(T) logits, Row row, Crew crew, Softmax all, float factor)
{
    const uint lead = ahead(row.start, row.n), threads = crew.threads;
    const uint quads = (row.n - lead) / 4;
    const float cap = row.cap;
    uint i = crew.id;
    for (; i + threads < quads; i += 2 * threads) {
        const ulong at = row.start + lead + 4 * ulong(i);
        const ulong next = at + 4 * ulong(threads);
        const float4 a = load4(logits, at);
        const float4 b = load4(logits, next);
        store4(logits, at, four_shares<L>(a, cap, all, factor));
        store4(logits, next, four_shares<L>(b, cap, all, factor));
    }
    if (i < quads) {
        const ulong at = row.start + lead + 4 * ulong(i);
        store4(logits, at, four_shares<L>(load4(logits, at), cap, all, factor));
    }
    for (uint edge = crew.id; edge < row.n - 4 * quads; edge += threads) {
        const ulong at = row.start + (edge < lead ? edge : edge + 4 * quads);
        logits[at] = T(L::share(float(logits[at]), cap, all, factor));
    }
}

// The loss of a row goes to `loss`, its gradient into its place.
template <typename L>
FUNCTION void row_gradient(DEVICE_PTR(T) logits, Row row, Crew crew, float scale, DEVICE_PTR(float) loss,
                           THREADGROUP_PTR(float) partial)
{
    if (row.label >= row.n) {
        for (uint i = crew.id; i < row.n; i += crew.threads) logits[row.start + i] = T(0.0f);
        if (crew.id == 0) loss[0] = 0.0f;
        return;
    }
    const float raw = float(logits[row.start + row.label]);
    const float target = L::logit(raw, row.cap);
    const Softmax all = softmax_of<L>(logits, row, crew, partial);
    BARRIER_DEVICE();
    shares<L>(logits, row, crew, all, scale / all.sum);
    BARRIER_DEVICE();
    if (crew.id == 0) {
        logits[row.start + row.label] = T(scale * (exp(target - all.top) / all.sum - 1.0f) * L::slope(raw, row.cap));
        loss[0] = log(all.sum) + (all.top - target);
    }
}

template <typename L>
FUNCTION void row_loss(DEVICE_PTR(const T) logits, Row row, Crew crew, DEVICE_PTR(float) loss, THREADGROUP_PTR(float) partial)
{
    if (row.label >= row.n) {
        if (crew.id == 0) loss[0] = 0.0f;
        return;
    }
    const Softmax all = softmax_of<L>(logits, row, crew, partial);
    if (crew.id == 0) loss[0] = log(all.sum) + (all.top - L::logit(float(logits[row.start + row.label]), row.cap));
}

/// The loss of each row of `logits [n, vocab]` goes to `losses[first + row]`, and `grad_scale * (softmax - onehot)` into its place.
/// A label that is not below `vocab` is not counted: loss and gradient 0. One threadgroup a row.
KERNEL(cross_entropy_gradient)(UPDATE(T, logits, 0), READ(uint, labels, 1), UPDATE(float, losses, 2), PARAMS(CrossEntropyParams, 3))
{
    THREADGROUP(float, partial, 32);
    const Row row = {GROUP_X * ulong(params.vocab), params.vocab, labels[GROUP_X], 0.0f};
    row_gradient<Plain>(logits, row, CREW, params.grad_scale, losses + params.first + GROUP_X, partial);
}

/// The loss of each row of `logits [n, vocab]`, to `losses[first + row]`; 0 where the label is not below `vocab`. One threadgroup a row.
KERNEL(cross_entropy_loss)(READ(T, logits, 0), READ(uint, labels, 1), UPDATE(float, losses, 2), PARAMS(CrossEntropyParams, 3))
{
    THREADGROUP(float, partial, 32);
    const Row row = {GROUP_X * ulong(params.vocab), params.vocab, labels[GROUP_X], 0.0f};
    row_loss<Plain>(logits, row, CREW, losses + params.first + GROUP_X, partial);
}

/// [`cross_entropy_gradient`] of `cap * tanh(logits / cap)`; the gradient is that of `logits`.
KERNEL(capped_cross_entropy_gradient)(UPDATE(T, logits, 0), READ(uint, labels, 1), UPDATE(float, losses, 2),
                                      PARAMS(CappedCrossEntropyParams, 3))
{
    THREADGROUP(float, partial, 32);
    const Row row = {GROUP_X * ulong(params.vocab), params.vocab, labels[GROUP_X], params.cap};
    row_gradient<Capped>(logits, row, CREW, params.grad_scale, losses + params.first + GROUP_X, partial);
}

/// [`cross_entropy_loss`] of `cap * tanh(logits / cap)`.
KERNEL(capped_cross_entropy_loss)(READ(T, logits, 0), READ(uint, labels, 1), UPDATE(float, losses, 2),
                                  PARAMS(CappedCrossEntropyParams, 3))
{
    THREADGROUP(float, partial, 32);
    const Row row = {GROUP_X * ulong(params.vocab), params.vocab, labels[GROUP_X], params.cap};
    row_loss<Capped>(logits, row, CREW, losses + params.first + GROUP_X, partial);
}

/// `y[places[i]] = x[i]`: rows of `width`, one threadgroup each; the places differ from one another.
KERNEL(scatter_rows)(READ(T, x, 0), READ(uint, places, 1), UPDATE(T, y, 2), PARAMS(ScatterParams, 3))
{
    const ulong from = GROUP_X * ulong(params.width), to = places[GROUP_X] * ulong(params.width);
    if (params.width % 4 == 0) {
        for (uint i = 4 * THREAD; i < params.width; i += 4 * THREADS) store4(y, to + i, load4(x, from + i));
    } else {
        for (uint i = THREAD; i < params.width; i += THREADS) y[to + i] = x[from + i];
    }
}

/// `y[0] = scale * sum(x)`, `x [n]`, always in the same order. One threadgroup.
KERNEL(sum_scaled)(READ(float, x, 0), WRITE(float, y, 1), PARAMS(SumParams, 2))
{
    THREADGROUP(float, partial, 32);
    float sum = 0.0f;
    for (uint i = THREAD; i < params.n; i += THREADS) sum += x[i];
    sum = group_sum(sum, partial, LANE, SIMD, SIMDS);
    if (THREAD == 0) y[0] = params.scale * sum;
}
