// The norm of a gradient and the steps that follow from it, over whole arenas.

struct NormParams { ulong n; };
struct FinishParams { uint partials; float max_grad_norm; };
struct AdamWParams {
    ulong n;
    float decay;
    float weight1;
    float beta2;
    float weight2;
    float step_size;
    float correction2;
    float eps;
    float grad_scale;
};

FUNCTION float group_sum(float x, THREADGROUP_PTR(float) partial, uint lane, uint simd, uint simds)
{
    x = simd_sum(x);
    if (lane == 0) partial[simd] = x;
    BARRIER();
    return simd_sum(lane < simds ? partial[lane] : 0.0f);
}

FUNCTION bool is_finite(float x) { return (as_uint(x) & 0x7f800000u) != 0x7f800000u; }

FUNCTION void add_squares(float4 x, THREAD_REF(float4) sums)
{
    sums = make_float4(fma(x.x, x.x, sums.x), fma(x.y, x.y, sums.y), fma(x.z, x.z, sums.z), fma(x.w, x.w, sums.w));
}

FUNCTION float sum4(float4 x) { return (x.x + x.y) + (x.z + x.w); }

/// Sums of squares of `grads [n]`, one for each threadgroup. The bits depend on the grid: keep it the same from step to step.
KERNEL(grad_norm_partials)(READ(float, grads, 0), WRITE(float, partials, 1), PARAMS(NormParams, 2))
{
    THREADGROUP(float, partial, 32);
    const ulong quads = params.n / 4, stride = GRID_THREADS;
    // sixteen sums a thread: each stays short, for a billion values too
    float4 a = make_float4(0.0f, 0.0f, 0.0f, 0.0f), b = a, c = a, d = a;
    ulong i = THREAD_IN_GRID;
    for (; i + 3 * stride < quads; i += 4 * stride) {
        const float4 w = load4(grads, 4 * i);
        const float4 x = load4(grads, 4 * (i + stride));
        const float4 y = load4(grads, 4 * (i + 2 * stride));
        const float4 z = load4(grads, 4 * (i + 3 * stride));
        add_squares(w, a);
        add_squares(x, b);
        add_squares(y, c);
        add_squares(z, d);
    }
    for (; i < quads; i += stride) add_squares(load4(grads, 4 * i), a);
    float sum = (sum4(a) + sum4(b)) + (sum4(c) + sum4(d));
    const ulong tail = 4 * quads + THREAD_IN_GRID;
    if (tail < params.n) sum = fma(grads[tail], grads[tail], sum);
    sum = group_sum(sum, partial, LANE, SIMD, SIMDS);
    if (THREAD == 0) partials[GROUP_X] = sum;
}

/// `outcome [4]` of a step: the norm of its gradient, the factor that clips it to `max_grad_norm` (0: never) as torch's clip_grad_norm_
/// does, 1 where norm and loss are finite and 0 otherwise, the loss `[1]`. One threadgroup.
KERNEL(grad_norm_finish)(READ(float, partials, 0), READ(float, loss, 1), WRITE(float, outcome, 2), PARAMS(FinishParams, 3))
{
    THREADGROUP(float, partial, 32);
    float sum = 0.0f;
    for (uint i = THREAD; i < params.partials; i += THREADS) sum += partials[i];
    const float norm = sqrt(group_sum(sum, partial, LANE, SIMD, SIMDS));
    if (THREAD == 0) {
        const float clip = params.max_grad_norm / (norm + 1e-6f);
        outcome[0] = norm;
        outcome[1] = params.max_grad_norm > 0.0f && clip < 1.0f ? clip : 1.0f;
        outcome[2] = is_finite(norm) && is_finite(loss[0]) ? 1.0f : 0.0f;
        outcome[3] = loss[0];
    }
}

// One value's step, in torch's order: both moments, then the move. Returns the new value.
FUNCTION float moved(float p, THREAD_REF(float) m, THREAD_REF(float) v, float g, AdamWParams f)
{
    m += f.weight1 * (g - m);
    v = v * f.beta2 + f.weight2 * g * g;
    const float root = sqrt(v) / f.correction2 + f.eps;
    return p * f.decay - f.step_size * (m / root);
}

FUNCTION float4 moved_four(float4 p, THREAD_REF(float4) m, THREAD_REF(float4) v, float4 g, float scale, AdamWParams f)
{
    float m0 = m.x, m1 = m.y, m2 = m.z, m3 = m.w, v0 = v.x, v1 = v.y, v2 = v.z, v3 = v.w;
    p = make_float4(moved(p.x, m0, v0, g.x * scale, f), moved(p.y, m1, v1, g.y * scale, f), moved(p.z, m2, v2, g.z * scale, f),
                    moved(p.w, m3, v3, g.w * scale, f));
    m = make_float4(m0, m1, m2, m3);
    v = make_float4(v0, v1, v2, v3);
    return p;
}

/// One step of AdamW on `state [3, n]` (values, first moments, second moments) from `grads [n]` times `grad_scale` and the clipping
/// factor in `outcome [4]`, of `grad_norm_finish`; nothing where that says that a number was not finite.
KERNEL(adamw)(READ(float, grads, 0), READ(float, outcome, 1), UPDATE(float, state, 2), PARAMS(AdamWParams, 3))
{
    if (outcome[2] == 0.0f) return;
    const float scale = outcome[1] * params.grad_scale;
    const ulong n = params.n;
    // the rows of the state are aligned where n is a multiple of 4
    const ulong quads = n % 4 == 0 ? n / 4 : 0;
    for (ulong i = THREAD_IN_GRID; i < quads; i += GRID_THREADS) {
        const float4 g = load4(grads, 4 * i), p = load4(state, 4 * i);
        float4 m = load4(state, n + 4 * i), v = load4(state, 2 * n + 4 * i);
        store4(state, 4 * i, moved_four(p, m, v, g, scale, params));
        store4(state, n + 4 * i, m);
        store4(state, 2 * n + 4 * i, v);
    }
    for (ulong i = 4 * quads + THREAD_IN_GRID; i < n; i += GRID_THREADS) {
        float m = state[n + i], v = state[2 * n + i];
        state[i] = moved(state[i], m, v, grads[i] * scale, params);
        state[n + i] = m;
        state[2 * n + i] = v;
    }
}

/// `adamw` that also writes the new values, rounded, to `copy [n]`.
KERNEL(adamw_with_copy)(READ(float, grads, 0), READ(float, outcome, 1), UPDATE(float, state, 2), UPDATE(T, copy, 3),
                        PARAMS(AdamWParams, 4))
{
    if (outcome[2] == 0.0f) return;
    const float scale = outcome[1] * params.grad_scale;
    const ulong n = params.n;
    const ulong quads = n % 4 == 0 ? n / 4 : 0;
    for (ulong i = THREAD_IN_GRID; i < quads; i += GRID_THREADS) {
        const float4 g = load4(grads, 4 * i);
        float4 m = load4(state, n + 4 * i), v = load4(state, 2 * n + 4 * i);
        const float4 p = moved_four(load4(state, 4 * i), m, v, g, scale, params);
        store4(state, 4 * i, p);
        store4(state, n + 4 * i, m);
        store4(state, 2 * n + 4 * i, v);
        store4(copy, 4 * i, p);
    }
    for (ulong i = 4 * quads + THREAD_IN_GRID; i < n; i += GRID_THREADS) {
        float m = state[n + i], v = state[2 * n + i];
        const float p = moved(state[i], m, v, grads[i] * scale, params);
        state[i] = p;
        state[n + i] = m;
        state[2 * n + i] = v;
        copy[i] = T(p);
    }
}
