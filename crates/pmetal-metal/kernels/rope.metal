// Rotary position embedding, alone and behind the norm of each head; its gradients.
//
// Where all of a head turns, in half-split pairs, a threadgroup has a token, and `2^lanes_log2` lanes of a SIMD group have a head, of which four pairs to a thread stay in registers.
// `aligned`: four elements can be moved at once, in every half of a head. `share` is what an element is of a head.

struct RopeParams {
    uint heads;
    uint pairs;
    uint known;
    uint lanes_log2;
    uint aligned;
    uint dy_pitch;
    uint x_pitch;
    uint y_pitch;
    float share;
    float eps;
    float sign;
    float offset;
};

// Four pairs: their first elements and their second.
struct RopePairs { float4 first, second; };

// How four pairs turn: `first = first * a + second * b`, `second = first * c + second * d`.
struct RopeTurn { float4 a, b, c, d; };

template <typename E>
FUNCTION float4 rope_four(DEVICE_PTR(const E) x, ulong from, uint pair, uint pairs) {
    return make_float4(pair < pairs ? float(x[from + pair]) : 0.0f, pair + 1 < pairs ? float(x[from + pair + 1]) : 0.0f,
                       pair + 2 < pairs ? float(x[from + pair + 2]) : 0.0f, pair + 3 < pairs ? float(x[from + pair + 3]) : 0.0f);
}

template <bool ALIGNED, typename E>
FUNCTION float4 rope_load_half(DEVICE_PTR(const E) x, ulong from, uint pair, uint pairs) {
    if (!ALIGNED) return rope_four<E>(x, from, pair, pairs);
    return pair < pairs ? load4(x, from + pair) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}

// Pairs from `pair` on whose first elements begin at `first` and whose second ones at `second`; zeros from `pairs` on.
template <bool ALIGNED, typename E>
FUNCTION RopePairs rope_load(DEVICE_PTR(const E) x, ulong first, ulong second, uint pair, uint pairs) {
    const RopePairs v = {rope_load_half<ALIGNED, E>(x, first, pair, pairs), rope_load_half<ALIGNED, E>(x, second, pair, pairs)};
    return v;
}

template <bool ALIGNED>
FUNCTION void rope_store_half(DEVICE_PTR(T) y, ulong to, uint pair, uint pairs, float4 v) {
    if (ALIGNED) {
        if (pair < pairs) store4(y, to + pair, v);
        return;
    }
    if (pair < pairs) y[to + pair] = T(v.x);
    if (pair + 1 < pairs) y[to + pair + 1] = T(v.y);
    if (pair + 2 < pairs) y[to + pair + 2] = T(v.z);
    if (pair + 3 < pairs) y[to + pair + 3] = T(v.w);
}

template <bool ALIGNED>
FUNCTION void rope_store(DEVICE_PTR(T) y, ulong head, uint pair, uint pairs, RopePairs v) {
    rope_store_half<ALIGNED>(y, head, pair, pairs, v.first);
    rope_store_half<ALIGNED>(y, head + pairs, pair, pairs, v.second);
}

// A thread's token, the first of its heads and the first of its SIMD group's, `step` between one and the next, and its pairs of them.
struct RopeThread { uint token; uint head; uint first; uint step; uint pair; };

FUNCTION RopeThread rope_thread(uint token, uint lane, uint simd, uint simds, uint lanes_log2) {
    const uint each = 32 >> lanes_log2;
    const RopeThread t = {token, simd * each + (lane >> lanes_log2), simd * each, simds * each, 4 * (lane & ((1u << lanes_log2) - 1))};
    return t;
}

// The thread after its SIMD group's next heads.
FUNCTION RopeThread rope_next(RopeThread t) {
    t.head += t.step;
    t.first += t.step;
    return t;
}

// The pairs that are a thread's: none of a head beyond the last.
FUNCTION uint rope_pair(RopeThread t, RopeParams p) { return t.head < p.heads ? t.pair : p.pairs; }

// A thread's pairs of its head.
template <bool ALIGNED>
FUNCTION RopePairs rope_head(DEVICE_PTR(const T) x, uint pitch, RopeParams p, RopeThread t) {
    const ulong from = ulong(t.token) * pitch + ulong(t.head) * 2 * p.pairs;
    return rope_load<ALIGNED, T>(x, from, from + p.pairs, rope_pair(t, p), p.pairs);
}

template <bool ALIGNED>
FUNCTION void rope_store_head(DEVICE_PTR(T) y, uint pitch, RopePairs v, RopeParams p, RopeThread t) {
    rope_store<ALIGNED>(y, ulong(t.token) * pitch + ulong(t.head) * 2 * p.pairs, rope_pair(t, p), p.pairs, v);
}

FUNCTION float4 rope_product(float4 a, float4 b) { return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w); }

FUNCTION float4 rope_scaled(float4 x, float scale) { return make_float4(x.x * scale, x.y * scale, x.z * scale, x.w * scale); }

FUNCTION float4 rope_raised(float4 x, float by) { return make_float4(x.x + by, x.y + by, x.z + by, x.w + by); }

// `a * b + c * d`.
FUNCTION float4 rope_mix(float4 a, float4 b, float4 c, float4 d) {
    return make_float4(a.x * b.x + c.x * d.x, a.y * b.y + c.y * d.y, a.z * b.z + c.z * d.z, a.w * b.w + c.w * d.w);
}

FUNCTION RopePairs rope_turned(RopePairs v, RopeTurn turn) {
    const RopePairs y = {rope_mix(v.first, turn.a, v.second, turn.b), rope_mix(v.first, turn.c, v.second, turn.d)};
    return y;
}

// Cosines and sines of a thread's pairs, the sines times `sign`.
template <bool ALIGNED>
FUNCTION RopePairs rope_angles(DEVICE_PTR(const float) angles, DEVICE_PTR(const uint) positions, float sign, RopeParams p, RopeThread t) {
    const ulong cosines = ulong(positions[t.token]) * p.pairs;
    RopePairs v = rope_load<ALIGNED, float>(angles, cosines, cosines + ulong(p.known) * p.pairs, t.pair, p.pairs);
    v.second = rope_scaled(v.second, sign);
    return v;
}

template <bool ALIGNED>
FUNCTION void rope_heads(DEVICE_PTR(const T) x, DEVICE_PTR(const float) angles, DEVICE_PTR(const uint) positions, DEVICE_PTR(T) y,
                         RopeParams p, RopeThread t) {
    RopePairs v = rope_head<ALIGNED>(x, p.x_pitch, p, t);
    const RopePairs at = rope_angles<ALIGNED>(angles, positions, p.sign, p, t);
    const RopeTurn turn = {at.first, rope_scaled(at.second, -1.0f), at.second, at.first};
    while (t.first < p.heads) {
        rope_store_head<ALIGNED>(y, p.y_pitch, rope_turned(v, turn), p, t);
        t = rope_next(t);
        v = rope_head<ALIGNED>(x, p.x_pitch, p, t);
    }
}

/// Turns the pairs `(i, i + pairs)` of every head by the angle of its token's position, or back with `sign` -1: `x`,
/// `y [tokens, heads * 2 * pairs]`, `angles [2, known, pairs]` cosines and sines by position, `positions [tokens]`.
KERNEL(rope)(READ_ROWS(T, x, 0), READ(float, angles, 1), READ(uint, positions, 2), WRITE_ROWS(T, y, 3), PARAMS(RopeParams, 4))
{
    const RopeThread t = rope_thread(GROUP_X, LANE, SIMD, SIMDS, params.lanes_log2);
    if (params.aligned) rope_heads<true>(x, angles, positions, y, params, t);
    else rope_heads<false>(x, angles, positions, y, params, t);
}

// The sum over the lanes of a head, of which there are at most 32.
FUNCTION float rope_total(float x, uint lanes_log2) {
    for (uint step = 0; step < 5; ++step) {
        if (step < lanes_log2) x += simd_shuffle_xor(x, 1u << step);
    }
    return x;
}

FUNCTION float rope_dot_four(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }

FUNCTION float rope_dot(RopePairs a, RopePairs b) { return rope_dot_four(a.first, b.first) + rope_dot_four(a.second, b.second); }

// A thread's pairs of the weight, with what the norm adds to it.
template <bool ALIGNED>
FUNCTION RopePairs rope_weight(DEVICE_PTR(const T) weight, RopeParams p, RopeThread t) {
    RopePairs w = rope_load<ALIGNED, T>(weight, 0, p.pairs, t.pair, p.pairs);
    w.first = rope_raised(w.first, p.offset);
    w.second = rope_raised(w.second, p.offset);
    return w;
}

template <bool ALIGNED>
FUNCTION void norm_rope_heads(DEVICE_PTR(const T) x, DEVICE_PTR(const T) weight, DEVICE_PTR(const float) angles,
                              DEVICE_PTR(const uint) positions, DEVICE_PTR(T) y, DEVICE_PTR(float) rstd, RopeParams p, RopeThread t) {
    RopePairs v = rope_head<ALIGNED>(x, p.x_pitch, p, t);
    const RopePairs at = rope_angles<ALIGNED>(angles, positions, 1.0f, p, t);
    const RopePairs w = rope_weight<ALIGNED>(weight, p, t);
    const RopeTurn turn = {rope_product(w.first, at.first), rope_scaled(rope_product(w.second, at.second), -1.0f),
                           rope_product(w.first, at.second), rope_product(w.second, at.first)};
    while (t.first < p.heads) {
        const float scale = rsqrt(rope_total(rope_dot(v, v), p.lanes_log2) * p.share + p.eps);
        if (rope_pair(t, p) == 0) rstd[ulong(t.token) * p.heads + t.head] = scale;
        const RopePairs n = {rope_scaled(v.first, scale), rope_scaled(v.second, scale)};
        rope_store_head<ALIGNED>(y, p.y_pitch, rope_turned(n, turn), p, t);
        t = rope_next(t);
        v = rope_head<ALIGNED>(x, p.x_pitch, p, t);
    }
}

/// `y = rope(x * rstd * (offset + weight))`, `rstd = 1 / sqrt(mean(x²) + eps)` of each head: `weight [2 * pairs]`, `rstd [tokens, heads]`, the rest as
/// in `rope`.
KERNEL(norm_rope)(READ_ROWS(T, x, 0), READ(T, weight, 1), READ(float, angles, 2), READ(uint, positions, 3), WRITE_ROWS(T, y, 4),
                  WRITE(float, rstd, 5), PARAMS(RopeParams, 6))
{
    const RopeThread t = rope_thread(GROUP_X, LANE, SIMD, SIMDS, params.lanes_log2);
    if (params.aligned) norm_rope_heads<true>(x, weight, angles, positions, y, rstd, params, t);
    else norm_rope_heads<false>(x, weight, angles, positions, y, rstd, params, t);
}

template <bool ALIGNED>
FUNCTION void norm_rope_heads_backward(DEVICE_PTR(const T) dy, DEVICE_PTR(const T) x, DEVICE_PTR(const T) weight,
                                       DEVICE_PTR(const float) angles, DEVICE_PTR(const uint) positions, DEVICE_PTR(const float) rstd,
                                       DEVICE_PTR(T) dx, RopeParams p, RopeThread t) {
    RopePairs d = rope_head<ALIGNED>(dy, p.dy_pitch, p, t), v = rope_head<ALIGNED>(x, p.x_pitch, p, t);
    float scale = t.head < p.heads ? rstd[ulong(t.token) * p.heads + t.head] : 0.0f;
    const RopePairs at = rope_angles<ALIGNED>(angles, positions, 1.0f, p, t);
    const RopePairs w = rope_weight<ALIGNED>(weight, p, t);
    const RopeTurn back = {rope_product(w.first, at.first), rope_product(w.first, at.second),
                           rope_scaled(rope_product(w.second, at.second), -1.0f), rope_product(w.second, at.first)};
    while (t.first < p.heads) {
        const RopePairs g = rope_turned(d, back);
        const float factor = -rope_total(rope_dot(g, v), p.lanes_log2) * p.share * scale * scale * scale;
        const float4 scales = make_float4(scale, scale, scale, scale), factors = make_float4(factor, factor, factor, factor);
        const RopePairs y = {rope_mix(g.first, scales, v.first, factors), rope_mix(g.second, scales, v.second, factors)};
        rope_store_head<ALIGNED>(dx, p.y_pitch, y, p, t);
        t = rope_next(t);
        d = rope_head<ALIGNED>(dy, p.dy_pitch, p, t);
        v = rope_head<ALIGNED>(x, p.x_pitch, p, t);
        scale = t.head < p.heads ? rstd[ulong(t.token) * p.heads + t.head] : 0.0f;
    }
}

/// The gradient of `norm_rope` in `x`: `dx = rstd * (g - n * mean(g * n))` with `n = x * rstd` and `g` the product of `offset + weight`
/// and of `dy` turned back; its rows are `y_pitch` apart.
KERNEL(norm_rope_backward)(READ_ROWS(T, dy, 0), READ_ROWS(T, x, 1), READ(T, weight, 2), READ(float, angles, 3),
                           READ(uint, positions, 4), READ(float, rstd, 5), WRITE_ROWS(T, dx, 6), PARAMS(RopeParams, 7))
{
    const RopeThread t = rope_thread(GROUP_X, LANE, SIMD, SIMDS, params.lanes_log2);
    if (params.aligned) norm_rope_heads_backward<true>(dy, x, weight, angles, positions, rstd, dx, params, t);
    else norm_rope_heads_backward<false>(dy, x, weight, angles, positions, rstd, dx, params, t);
}

struct RopePartParams {
    uint heads;
    uint head_dim;
    uint start;
    uint pairs;
    uint interleaved;
    uint known;
    uint x_pitch;
    uint y_pitch;
    float sign;
};

/// As `rope`, of heads of which not all turns: pair `i` is columns `start + i` and `start + pairs + i`, or `start + 2 i` and the next where
/// `interleaved`; the others are copied. A threadgroup has a token, a SIMD group a head at a time: `x`, `y [tokens, heads * head_dim]`.
KERNEL(rope_part)(READ_ROWS(T, x, 0), READ(float, angles, 1), READ(uint, positions, 2), WRITE_ROWS(T, y, 3), PARAMS(RopePartParams, 4))
{
    const RopePartParams p = params;
    const ulong cosines = ulong(positions[GROUP_X]) * p.pairs, sines = cosines + ulong(p.known) * p.pairs;
    const uint each = p.interleaved ? 2 : 1, second = p.interleaved ? 1 : p.pairs;
    for (uint head = SIMD; head < p.heads; head += SIMDS) {
        const ulong from = ulong(GROUP_X) * p.x_pitch + ulong(head) * p.head_dim, to = ulong(GROUP_X) * p.y_pitch + ulong(head) * p.head_dim;
        for (uint pair = LANE; pair < p.pairs; pair += 32) {
            const uint a = p.start + each * pair, b = a + second;
            const float cosine = angles[cosines + pair], sine = angles[sines + pair] * p.sign;
            const float low = float(x[from + a]), high = float(x[from + b]);
            y[to + a] = T(low * cosine - high * sine);
            y[to + b] = T(high * cosine + low * sine);
        }
        for (uint c = LANE; c < p.head_dim - 2 * p.pairs; c += 32) {
            const uint beside = c < p.start ? c : c + 2 * p.pairs;
            y[to + beside] = x[from + beside];
        }
    }
}
