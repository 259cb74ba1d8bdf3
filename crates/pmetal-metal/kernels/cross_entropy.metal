// The cross-entropy of rows of logits, what surrounds it, and its gradient.
//
// A row is read by one threadgroup with a running maximum and the sum of exponentials relative to it (Milakov and Gimelshein, "Online
// normalizer calculation for softmax", 2018), so that the loss reads it once and the gradient twice. Statistics are float.

// Below every logit, and finite: the difference of two such is 0, not NaN.
#define LOWEST -3.0e38f

struct CrossEntropyParams { uint vocab; uint first; float grad_scale; };
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
FUNCTION void statistics(DEVICE_PTR(const T) logits, ulong start, uint n, uint id, uint threads, THREAD_REF(float) top,
                         THREAD_REF(float) sum)
{
    const uint lead = ahead(start, n);
    const uint quads = (n - lead) / 4;
    uint i = id;
    for (; i + 3 * threads < quads; i += 4 * threads) {
        const float4 a = load4(logits, start + lead + 4 * ulong(i));
        const float4 b = load4(logits, start + lead + 4 * ulong(i + threads));
        const float4 c = load4(logits, start + lead + 4 * ulong(i + 2 * threads));
        const float4 d = load4(logits, start + lead + 4 * ulong(i + 3 * threads));
        rise(fmax(fmax(max4(a), max4(b)), fmax(max4(c), max4(d))), top, sum);
        sum += (exp_sum(a, top) + exp_sum(b, top)) + (exp_sum(c, top) + exp_sum(d, top));
    }
    for (; i < quads; i += threads) {
        const float4 a = load4(logits, start + lead + 4 * ulong(i));
        rise(max4(a), top, sum);
        sum += exp_sum(a, top);
    }
    for (uint edge = id; edge < n - 4 * quads; edge += threads) {
        const float x = float(logits[start + (edge < lead ? edge : edge + 4 * quads)]);
        rise(x, top, sum);
        sum += exp(x - top);
    }
}

FUNCTION float4 scaled_exp(float4 x, float top, float factor)
{
    return make_float4(factor * exp(x.x - top), factor * exp(x.y - top), factor * exp(x.z - top), factor * exp(x.w - top));
}

// Turns this thread's share of a row into `factor * exp(x - top)`.
FUNCTION void exponentials(DEVICE_PTR(T) logits, ulong start, uint n, uint id, uint threads, float top, float factor)
{
    const uint lead = ahead(start, n);
    const uint quads = (n - lead) / 4;
    uint i = id;
    for (; i + threads < quads; i += 2 * threads) {
        const ulong at = start + lead + 4 * ulong(i);
        const ulong next = at + 4 * ulong(threads);
        const float4 a = load4(logits, at);
        const float4 b = load4(logits, next);
        store4(logits, at, scaled_exp(a, top, factor));
        store4(logits, next, scaled_exp(b, top, factor));
    }
    if (i < quads) {
        const ulong at = start + lead + 4 * ulong(i);
        store4(logits, at, scaled_exp(load4(logits, at), top, factor));
    }
    for (uint edge = id; edge < n - 4 * quads; edge += threads) {
        const ulong at = start + (edge < lead ? edge : edge + 4 * quads);
        logits[at] = T(factor * exp(float(logits[at]) - top));
    }
}

/// The loss of each row of `logits [n, vocab]` goes to `losses[first + row]`, and `grad_scale * (softmax - onehot)` into its place.
/// A label that is not below `vocab` is not counted: loss and gradient 0. One threadgroup a row.
KERNEL(cross_entropy_gradient)(UPDATE(T, logits, 0), READ(uint, labels, 1), UPDATE(float, losses, 2), PARAMS(CrossEntropyParams, 3))
{
    THREADGROUP(float, partial, 32);
    const ulong start = ulong(GROUP_X) * params.vocab;
    const uint label = labels[GROUP_X];
    if (label >= params.vocab) {
        for (uint i = THREAD; i < params.vocab; i += THREADS) logits[start + i] = T(0.0f);
        if (THREAD == 0) losses[params.first + GROUP_X] = 0.0f;
        return;
    }
    const float target = float(logits[start + label]);
    float own = LOWEST, sum = 0.0f;
    statistics(logits, start, params.vocab, THREAD, THREADS, own, sum);
    const float top = group_max(own, partial, LANE, SIMD, SIMDS);
    sum = group_sum(sum * exp(own - top), partial, LANE, SIMD, SIMDS);
    BARRIER_DEVICE();
    exponentials(logits, start, params.vocab, THREAD, THREADS, top, params.grad_scale / sum);
    BARRIER_DEVICE();
    if (THREAD == 0) {
        logits[start + label] = T(params.grad_scale * (exp(target - top) / sum - 1.0f));
        losses[params.first + GROUP_X] = log(sum) + (top - target);
    }
}

/// The loss of each row of `logits [n, vocab]`, to `losses[first + row]`; 0 where the label is not below `vocab`. One threadgroup a row.
KERNEL(cross_entropy_loss)(READ(T, logits, 0), READ(uint, labels, 1), UPDATE(float, losses, 2), PARAMS(CrossEntropyParams, 3))
{
    THREADGROUP(float, partial, 32);
    const ulong start = ulong(GROUP_X) * params.vocab;
    const uint label = labels[GROUP_X];
    if (label >= params.vocab) {
        if (THREAD == 0) losses[params.first + GROUP_X] = 0.0f;
        return;
    }
    float own = LOWEST, sum = 0.0f;
    statistics(logits, start, params.vocab, THREAD, THREADS, own, sum);
    const float top = group_max(own, partial, LANE, SIMD, SIMDS);
    sum = group_sum(sum * exp(own - top), partial, LANE, SIMD, SIMDS);
    if (THREAD == 0) losses[params.first + GROUP_X] = log(sum) + (top - float(logits[start + label]));
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
