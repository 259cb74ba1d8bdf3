// Rotary position embedding on half-split pairs, alone and behind the norm of each head; its gradients.
//
// A SIMD group has a token and `ROPE_HEADS * 32 / lanes` of its heads: `lanes`, a power of two, have a head of at most eight pairs to a thread,
// which stay in registers. `chunks` SIMD groups share a token. `aligned`: eight elements can be moved at once, in every half of a head.

#define ROPE_HEADS 2

struct RopeParams {
    uint tokens;
    uint heads;
    uint pairs;
    uint known;
    uint lanes;
    uint chunks;
    uint aligned;
    uint dy_pitch;
    uint x_pitch;
    uint y_pitch;
    float eps;
    float sign;
};

// Eight pairs: their first elements and their second.
struct RopePairs { Octet first, second; };

// How eight pairs turn: `first = first * a + second * b`, `second = first * c + second * d`.
struct RopeTurn { Octet a, b, c, d; };

template <typename E>
FUNCTION float4 rope_four(DEVICE_PTR(const E) x, ulong from, uint pair, uint pairs) {
    return make_float4(pair < pairs ? float(x[from + pair]) : 0.0f, pair + 1 < pairs ? float(x[from + pair + 1]) : 0.0f,
                       pair + 2 < pairs ? float(x[from + pair + 2]) : 0.0f, pair + 3 < pairs ? float(x[from + pair + 3]) : 0.0f);
}

template <bool ALIGNED, typename E>
FUNCTION Octet rope_load_half(DEVICE_PTR(const E) x, ulong from, uint pair, uint pairs) {
    Octet v;
    v.low = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    v.high = v.low;
    if (ALIGNED) {
        if (pair < pairs) v = load8(x, from + pair);
    } else {
        v.low = rope_four<E>(x, from, pair, pairs);
        v.high = rope_four<E>(x, from, pair + 4, pairs);
    }
    return v;
}

// Pairs from `pair` on whose first elements begin at `first` and whose second ones at `second`; zeros from `pairs` on.
template <bool ALIGNED, typename E>
FUNCTION RopePairs rope_load(DEVICE_PTR(const E) x, ulong first, ulong second, uint pair, uint pairs) {
    RopePairs v;
    v.first = rope_load_half<ALIGNED, E>(x, first, pair, pairs);
    v.second = rope_load_half<ALIGNED, E>(x, second, pair, pairs);
    return v;
}

FUNCTION void rope_store_four(DEVICE_PTR(T) y, ulong to, uint pair, uint pairs, float4 v) {
    if (pair < pairs) y[to + pair] = T(v.x);
    if (pair + 1 < pairs) y[to + pair + 1] = T(v.y);
    if (pair + 2 < pairs) y[to + pair + 2] = T(v.z);
    if (pair + 3 < pairs) y[to + pair + 3] = T(v.w);
}

template <bool ALIGNED>
FUNCTION void rope_store_half(DEVICE_PTR(T) y, ulong to, uint pair, uint pairs, Octet v) {
    if (ALIGNED) {
        if (pair < pairs) store8(y, to + pair, v);
    } else {
        rope_store_four(y, to, pair, pairs, v.low);
        rope_store_four(y, to, pair + 4, pairs, v.high);
    }
}

template <bool ALIGNED>
FUNCTION void rope_store(DEVICE_PTR(T) y, ulong head, uint pair, uint pairs, RopePairs v) {
    rope_store_half<ALIGNED>(y, head, pair, pairs, v.first);
    rope_store_half<ALIGNED>(y, head + pairs, pair, pairs, v.second);
}

// Which token is a thread's, the first of its heads, `each` apart, and its pairs of them.
struct RopeThread { uint token; uint head; uint each; uint pair; };

FUNCTION RopeThread rope_thread(uint item, uint lane, uint lanes, uint chunks) {
    const uint each = 32 / lanes;
    const RopeThread t = {item / chunks, ROPE_HEADS * each * (item % chunks) + lane / lanes, each, 8 * (lane % lanes)};
    return t;
}

// The pairs of head `k` that are a thread's: none of a head beyond the last.
FUNCTION uint rope_pair(RopeThread t, uint k, RopeParams p) { return t.head + k * t.each < p.heads ? t.pair : p.pairs; }

FUNCTION float4 rope_times(float4 a, float4 b) { return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w); }

FUNCTION Octet rope_product(Octet a, Octet b) {
    const Octet y = {rope_times(a.low, b.low), rope_times(a.high, b.high)};
    return y;
}

FUNCTION float4 rope_scaled_four(float4 x, float scale) { return make_float4(x.x * scale, x.y * scale, x.z * scale, x.w * scale); }

FUNCTION Octet rope_scaled(Octet x, float scale) {
    const Octet y = {rope_scaled_four(x.low, scale), rope_scaled_four(x.high, scale)};
    return y;
}

FUNCTION float4 rope_mix_four(float4 a, float4 b, float4 c, float4 d) {
    return make_float4(a.x * b.x + c.x * d.x, a.y * b.y + c.y * d.y, a.z * b.z + c.z * d.z, a.w * b.w + c.w * d.w);
}

// `a * b + c * d`.
FUNCTION Octet rope_mix(Octet a, Octet b, Octet c, Octet d) {
    const Octet y = {rope_mix_four(a.low, b.low, c.low, d.low), rope_mix_four(a.high, b.high, c.high, d.high)};
    return y;
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
    RopePairs v[ROPE_HEADS];
#pragma unroll
    for (uint k = 0; k < ROPE_HEADS; ++k) {
        const ulong from = ulong(t.token) * p.x_pitch + ulong(t.head + k * t.each) * 2 * p.pairs;
        v[k] = rope_load<ALIGNED, T>(x, from, from + p.pairs, rope_pair(t, k, p), p.pairs);
    }
    const RopePairs at = rope_angles<ALIGNED>(angles, positions, p.sign, p, t);
    const RopeTurn turn = {at.first, rope_scaled(at.second, -1.0f), at.second, at.first};
#pragma unroll
    for (uint k = 0; k < ROPE_HEADS; ++k) {
        const ulong to = ulong(t.token) * p.y_pitch + ulong(t.head + k * t.each) * 2 * p.pairs;
        rope_store<ALIGNED>(y, to, rope_pair(t, k, p), p.pairs, rope_turned(v[k], turn));
    }
}

/// Turns the pairs `(i, i + pairs)` of every head by the angle of its token's position, or back with `sign` -1: `x`,
/// `y [tokens, heads * 2 * pairs]`, `angles [2, known, pairs]` cosines and sines by position, `positions [tokens]`.
KERNEL(rope)(READ_ROWS(T, x, 0), READ(float, angles, 1), READ(uint, positions, 2), WRITE_ROWS(T, y, 3), PARAMS(RopeParams, 4))
{
    const RopeThread t = rope_thread(GROUP_X * SIMDS + SIMD, LANE, params.lanes, params.chunks);
    if (t.token >= params.tokens) return;
    if (params.aligned) rope_heads<true>(x, angles, positions, y, params, t);
    else rope_heads<false>(x, angles, positions, y, params, t);
}

// The sum over the lanes of a head.
FUNCTION float rope_total(float x, uint lanes) {
    for (uint mask = lanes / 2; mask > 0; mask /= 2) x += simd_shuffle_xor(x, mask);
    return x;
}

FUNCTION float rope_dot_four(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }

FUNCTION float rope_dot(RopePairs a, RopePairs b) {
    return (rope_dot_four(a.first.low, b.first.low) + rope_dot_four(a.first.high, b.first.high)) +
           (rope_dot_four(a.second.low, b.second.low) + rope_dot_four(a.second.high, b.second.high));
}

template <bool ALIGNED>
FUNCTION void norm_rope_heads(DEVICE_PTR(const T) x, DEVICE_PTR(const T) weight, DEVICE_PTR(const float) angles,
                              DEVICE_PTR(const uint) positions, DEVICE_PTR(T) y, DEVICE_PTR(float) rstd, RopeParams p, RopeThread t) {
    RopePairs v[ROPE_HEADS];
#pragma unroll
    for (uint k = 0; k < ROPE_HEADS; ++k) {
        const ulong from = ulong(t.token) * p.x_pitch + ulong(t.head + k * t.each) * 2 * p.pairs;
        v[k] = rope_load<ALIGNED, T>(x, from, from + p.pairs, rope_pair(t, k, p), p.pairs);
    }
    const RopePairs at = rope_angles<ALIGNED>(angles, positions, 1.0f, p, t);
    const RopePairs w = rope_load<ALIGNED, T>(weight, 0, p.pairs, t.pair, p.pairs);
    const RopeTurn turn = {rope_product(w.first, at.first), rope_scaled(rope_product(w.second, at.second), -1.0f),
                           rope_product(w.first, at.second), rope_product(w.second, at.first)};
#pragma unroll
    for (uint k = 0; k < ROPE_HEADS; ++k) {
        const float scale = rsqrt(rope_total(rope_dot(v[k], v[k]), p.lanes) / float(2 * p.pairs) + p.eps);
        const ulong head = ulong(t.token) * p.heads + t.head + k * t.each;
        if (rope_pair(t, k, p) == 0) rstd[head] = scale;
        const RopePairs n = {rope_scaled(v[k].first, scale), rope_scaled(v[k].second, scale)};
        rope_store<ALIGNED>(y, head * 2 * p.pairs, rope_pair(t, k, p), p.pairs, rope_turned(n, turn));
    }
}

/// `y = rope(x * rstd * weight)`, `rstd = 1 / sqrt(mean(x²) + eps)` of each head: `weight [2 * pairs]`, `rstd [tokens, heads]`, the rest as in
/// `rope`.
KERNEL(norm_rope)(READ_ROWS(T, x, 0), READ(T, weight, 1), READ(float, angles, 2), READ(uint, positions, 3), WRITE(T, y, 4),
                  WRITE(float, rstd, 5), PARAMS(RopeParams, 6))
{
    const RopeThread t = rope_thread(GROUP_X * SIMDS + SIMD, LANE, params.lanes, params.chunks);
    if (t.token >= params.tokens) return;
    if (params.aligned) norm_rope_heads<true>(x, weight, angles, positions, y, rstd, params, t);
    else norm_rope_heads<false>(x, weight, angles, positions, y, rstd, params, t);
}

template <bool ALIGNED>
FUNCTION void norm_rope_heads_backward(DEVICE_PTR(const T) dy, DEVICE_PTR(const T) x, DEVICE_PTR(const T) weight,
                                       DEVICE_PTR(const float) angles, DEVICE_PTR(const uint) positions, DEVICE_PTR(const float) rstd,
                                       DEVICE_PTR(T) dx, RopeParams p, RopeThread t) {
    RopePairs d[ROPE_HEADS], v[ROPE_HEADS];
#pragma unroll
    for (uint k = 0; k < ROPE_HEADS; ++k) {
        const ulong head = ulong(t.head + k * t.each) * 2 * p.pairs;
        const ulong from = ulong(t.token) * p.dy_pitch + head, at = ulong(t.token) * p.x_pitch + head;
        d[k] = rope_load<ALIGNED, T>(dy, from, from + p.pairs, rope_pair(t, k, p), p.pairs);
        v[k] = rope_load<ALIGNED, T>(x, at, at + p.pairs, rope_pair(t, k, p), p.pairs);
    }
    const RopePairs at = rope_angles<ALIGNED>(angles, positions, 1.0f, p, t);
    const RopePairs w = rope_load<ALIGNED, T>(weight, 0, p.pairs, t.pair, p.pairs);
    const RopeTurn back = {rope_product(w.first, at.first), rope_product(w.first, at.second),
                           rope_scaled(rope_product(w.second, at.second), -1.0f), rope_product(w.second, at.first)};
#pragma unroll
    for (uint k = 0; k < ROPE_HEADS; ++k) {
        const uint pair = rope_pair(t, k, p), head = t.head + k * t.each;
        const float scale = pair < p.pairs ? rstd[ulong(t.token) * p.heads + head] : 0.0f;
        const RopePairs g = rope_turned(d[k], back);
        const float factor = -rope_total(rope_dot(g, v[k]), p.lanes) / float(2 * p.pairs) * scale * scale * scale;
        const Octet scales = {make_float4(scale, scale, scale, scale), make_float4(scale, scale, scale, scale)};
        const Octet factors = {make_float4(factor, factor, factor, factor), make_float4(factor, factor, factor, factor)};
        const RopePairs y = {rope_mix(g.first, scales, v[k].first, factors), rope_mix(g.second, scales, v[k].second, factors)};
        rope_store<ALIGNED>(dx, ulong(t.token) * p.y_pitch + ulong(head) * 2 * p.pairs, pair, p.pairs, y);
    }
}

/// The gradient of `norm_rope` in `x`: `dx = rstd * (g - n * mean(g * n))` with `n = x * rstd` and `g` the product of `weight` and of `dy` turned
/// back; its rows are `y_pitch` apart.
KERNEL(norm_rope_backward)(READ_ROWS(T, dy, 0), READ_ROWS(T, x, 1), READ(T, weight, 2), READ(float, angles, 3),
                           READ(uint, positions, 4), READ(float, rstd, 5), WRITE_ROWS(T, dx, 6), PARAMS(RopeParams, 7))
{
    const RopeThread t = rope_thread(GROUP_X * SIMDS + SIMD, LANE, params.lanes, params.chunks);
    if (t.token >= params.tokens) return;
    if (params.aligned) norm_rope_heads_backward<true>(dy, x, weight, angles, positions, rstd, dx, params, t);
    else norm_rope_heads_backward<false>(dy, x, weight, angles, positions, rstd, dx, params, t);
}
