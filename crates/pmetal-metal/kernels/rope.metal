// Rotary position embedding on half-split pairs, alone and behind the norm of each head; its gradients.
//
// A SIMD group has a token and `2 * 32 / lanes` of its heads: `lanes`, a power of two, have a head of at most eight pairs to a thread, which stay
// in registers. `chunks` SIMD groups share a token. `aligned`: eight elements can be moved at once, in every half of a head.

struct RopeParams {
    uint tokens;
    uint heads;
    uint pairs;
    uint known;
    uint lanes;
    uint chunks;
    uint aligned;
    uint x_pitch;
    uint y_pitch;
    float sign;
};

// Eight pairs: their first elements and their second, or their cosines and sines.
struct RopePairs { Octet first, second; };

FUNCTION float4 rope_zero() { return make_float4(0.0f, 0.0f, 0.0f, 0.0f); }

template <typename E>
FUNCTION float4 rope_four(DEVICE_PTR(const E) x, ulong from, uint pair, uint pairs) {
    return make_float4(pair < pairs ? float(x[from + pair]) : 0.0f, pair + 1 < pairs ? float(x[from + pair + 1]) : 0.0f,
                       pair + 2 < pairs ? float(x[from + pair + 2]) : 0.0f, pair + 3 < pairs ? float(x[from + pair + 3]) : 0.0f);
}

template <typename E>
FUNCTION Octet rope_load_half(DEVICE_PTR(const E) x, ulong from, uint pair, uint pairs, uint aligned) {
    Octet v;
    v.low = rope_zero();
    v.high = rope_zero();
    if (pair < pairs && aligned) v = load8(x, from + pair);
    if (pair < pairs && !aligned) {
        v.low = rope_four<E>(x, from, pair, pairs);
        v.high = rope_four<E>(x, from, pair + 4, pairs);
    }
    return v;
}

// Pairs from `pair` on whose first elements begin at `first` and whose second ones at `second`; zeros from `pairs` on.
template <typename E>
FUNCTION RopePairs rope_load(DEVICE_PTR(const E) x, ulong first, ulong second, uint pair, uint pairs, uint aligned) {
    RopePairs v;
    v.first = rope_load_half<E>(x, first, pair, pairs, aligned);
    v.second = rope_load_half<E>(x, second, pair, pairs, aligned);
    return v;
}

FUNCTION void rope_store_four(DEVICE_PTR(T) y, ulong to, uint pair, uint pairs, float4 v) {
    if (pair < pairs) y[to + pair] = T(v.x);
    if (pair + 1 < pairs) y[to + pair + 1] = T(v.y);
    if (pair + 2 < pairs) y[to + pair + 2] = T(v.z);
    if (pair + 3 < pairs) y[to + pair + 3] = T(v.w);
}

FUNCTION void rope_store_half(DEVICE_PTR(T) y, ulong to, uint pair, uint pairs, uint aligned, Octet v) {
    if (aligned) return store8(y, to + pair, v);
    rope_store_four(y, to, pair, pairs, v.low);
    rope_store_four(y, to, pair + 4, pairs, v.high);
}

FUNCTION void rope_store(DEVICE_PTR(T) y, ulong head, uint pair, uint pairs, uint aligned, RopePairs v) {
    if (pair >= pairs) return;
    rope_store_half(y, head, pair, pairs, aligned, v.first);
    rope_store_half(y, head + pairs, pair, pairs, aligned, v.second);
}

// `a * b + sign * c * d`.
FUNCTION float4 rope_mix(float4 a, float4 b, float sign, float4 c, float4 d) {
    return make_float4(a.x * b.x + sign * c.x * d.x, a.y * b.y + sign * c.y * d.y, a.z * b.z + sign * c.z * d.z,
                       a.w * b.w + sign * c.w * d.w);
}

// Pairs turned by their angles, or back with `sign` -1.
FUNCTION RopePairs rope_turned(RopePairs v, RopePairs angles, float sign) {
    RopePairs y;
    y.first.low = rope_mix(v.first.low, angles.first.low, -sign, v.second.low, angles.second.low);
    y.first.high = rope_mix(v.first.high, angles.first.high, -sign, v.second.high, angles.second.high);
    y.second.low = rope_mix(v.second.low, angles.first.low, sign, v.first.low, angles.second.low);
    y.second.high = rope_mix(v.second.high, angles.first.high, sign, v.first.high, angles.second.high);
    return y;
}

/// Turns the pairs `(i, i + pairs)` of every head by the angle of its token's position, or back with `sign` -1: `x`,
/// `y [tokens, heads * 2 * pairs]`, `angles [2, known, pairs]` cosines and sines by position, `positions [tokens]`.
KERNEL(rope)(READ_ROWS(T, x, 0), READ(float, angles, 1), READ(uint, positions, 2), WRITE_ROWS(T, y, 3), PARAMS(RopeParams, 4))
{
    const uint item = GROUP_X * SIMDS + SIMD, token = item / params.chunks;
    if (token >= params.tokens) return;
    const uint pairs = params.pairs, aligned = params.aligned, pair = 8 * (LANE % params.lanes);
    const uint each = 32 / params.lanes, head = 2 * each * (item % params.chunks) + LANE / params.lanes;
    const ulong cosines = ulong(positions[token]) * pairs, sines = cosines + ulong(params.known) * pairs;
    RopePairs v[2];
#pragma unroll
    for (uint k = 0; k < 2; ++k) {
        const ulong from = ulong(token) * params.x_pitch + ulong(head + k * each) * 2 * pairs;
        v[k] = rope_load<T>(x, from, from + pairs, head + k * each < params.heads ? pair : pairs, pairs, aligned);
    }
    const RopePairs turn = rope_load<float>(angles, cosines, sines, pair, pairs, aligned);
#pragma unroll
    for (uint k = 0; k < 2; ++k) {
        const ulong to = ulong(token) * params.y_pitch + ulong(head + k * each) * 2 * pairs;
        rope_store(y, to, head + k * each < params.heads ? pair : pairs, pairs, aligned, rope_turned(v[k], turn, params.sign));
    }
}

struct NormRopeParams {
    uint tokens;
    uint heads;
    uint pairs;
    uint known;
    uint lanes;
    uint chunks;
    uint aligned;
    uint x_pitch;
    float eps;
};

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

FUNCTION float4 rope_normed_four(float4 x, float scale, float4 weight) {
    return make_float4(float(T(x.x * scale)) * weight.x, float(T(x.y * scale)) * weight.y, float(T(x.z * scale)) * weight.z,
                       float(T(x.w * scale)) * weight.w);
}

FUNCTION RopePairs rope_normed(RopePairs x, float scale, RopePairs weight) {
    RopePairs y;
    y.first.low = rope_normed_four(x.first.low, scale, weight.first.low);
    y.first.high = rope_normed_four(x.first.high, scale, weight.first.high);
    y.second.low = rope_normed_four(x.second.low, scale, weight.second.low);
    y.second.high = rope_normed_four(x.second.high, scale, weight.second.high);
    return y;
}

/// `y = rope(round(x * rstd) * weight)`, `rstd = 1 / sqrt(mean(x²) + eps)` of each head: `weight [2 * pairs]`, `rstd [tokens, heads]`, the rest
/// as in `rope`.
KERNEL(norm_rope)(READ_ROWS(T, x, 0), READ(T, weight, 1), READ(float, angles, 2), READ(uint, positions, 3), WRITE(T, y, 4),
                  WRITE(float, rstd, 5), PARAMS(NormRopeParams, 6))
{
    const uint item = GROUP_X * SIMDS + SIMD, token = item / params.chunks;
    if (token >= params.tokens) return;
    const uint pairs = params.pairs, aligned = params.aligned, pair = 8 * (LANE % params.lanes);
    const uint each = 32 / params.lanes, head = 2 * each * (item % params.chunks) + LANE / params.lanes;
    const ulong cosines = ulong(positions[token]) * pairs, sines = cosines + ulong(params.known) * pairs;
    RopePairs v[2];
#pragma unroll
    for (uint k = 0; k < 2; ++k) {
        const ulong from = ulong(token) * params.x_pitch + ulong(head + k * each) * 2 * pairs;
        v[k] = rope_load<T>(x, from, from + pairs, head + k * each < params.heads ? pair : pairs, pairs, aligned);
    }
    const RopePairs turn = rope_load<float>(angles, cosines, sines, pair, pairs, aligned);
    const RopePairs w = rope_load<T>(weight, 0, pairs, pair, pairs, aligned);
#pragma unroll
    for (uint k = 0; k < 2; ++k) {
        const float squares = rope_total(rope_dot(v[k], v[k]), params.lanes);
        const float scale = rsqrt(squares / float(2 * pairs) + params.eps);
        const uint own = head + k * each < params.heads ? pair : pairs;
        if (own == 0) rstd[ulong(token) * params.heads + head + k * each] = scale;
        const ulong to = (ulong(token) * params.heads + head + k * each) * 2 * pairs;
        rope_store(y, to, own, pairs, aligned, rope_turned(rope_normed(v[k], scale, w), turn, 1.0f));
    }
}

struct NormRopeBackwardParams {
    uint tokens;
    uint heads;
    uint pairs;
    uint known;
    uint lanes;
    uint chunks;
    uint aligned;
    uint dy_pitch;
    uint x_pitch;
    uint dx_pitch;
};

FUNCTION float4 rope_product_four(float4 a, float4 b) { return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w); }

FUNCTION RopePairs rope_product(RopePairs a, RopePairs b) {
    RopePairs y;
    y.first.low = rope_product_four(a.first.low, b.first.low);
    y.first.high = rope_product_four(a.first.high, b.first.high);
    y.second.low = rope_product_four(a.second.low, b.second.low);
    y.second.high = rope_product_four(a.second.high, b.second.high);
    return y;
}

FUNCTION float4 rope_dx_four(float4 g, float scale, float4 x, float factor) {
    return make_float4(g.x * scale - x.x * factor, g.y * scale - x.y * factor, g.z * scale - x.z * factor, g.w * scale - x.w * factor);
}

// `g * scale - x * factor`.
FUNCTION RopePairs rope_dx(RopePairs g, float scale, RopePairs x, float factor) {
    RopePairs y;
    y.first.low = rope_dx_four(g.first.low, scale, x.first.low, factor);
    y.first.high = rope_dx_four(g.first.high, scale, x.first.high, factor);
    y.second.low = rope_dx_four(g.second.low, scale, x.second.low, factor);
    y.second.high = rope_dx_four(g.second.high, scale, x.second.high, factor);
    return y;
}

/// The gradient of `norm_rope` in `x`: `dx = rstd * (g - n * mean(g * n))` with `n = x * rstd` and `g` the product of `weight` and of `dy` turned
/// back.
KERNEL(norm_rope_backward)(READ_ROWS(T, dy, 0), READ_ROWS(T, x, 1), READ(T, weight, 2), READ(float, angles, 3),
                           READ(uint, positions, 4), READ(float, rstd, 5), WRITE_ROWS(T, dx, 6), PARAMS(NormRopeBackwardParams, 7))
{
    const uint item = GROUP_X * SIMDS + SIMD, token = item / params.chunks;
    if (token >= params.tokens) return;
    const uint pairs = params.pairs, aligned = params.aligned, pair = 8 * (LANE % params.lanes);
    const uint each = 32 / params.lanes, head = 2 * each * (item % params.chunks) + LANE / params.lanes;
    const ulong cosines = ulong(positions[token]) * pairs, sines = cosines + ulong(params.known) * pairs;
    RopePairs g[2], v[2];
#pragma unroll
    for (uint k = 0; k < 2; ++k) {
        const ulong place = ulong(head + k * each) * 2 * pairs;
        const ulong from = ulong(token) * params.dy_pitch + place, at = ulong(token) * params.x_pitch + place;
        const uint own = head + k * each < params.heads ? pair : pairs;
        g[k] = rope_load<T>(dy, from, from + pairs, own, pairs, aligned);
        v[k] = rope_load<T>(x, at, at + pairs, own, pairs, aligned);
    }
    const RopePairs turn = rope_load<float>(angles, cosines, sines, pair, pairs, aligned);
    const RopePairs w = rope_load<T>(weight, 0, pairs, pair, pairs, aligned);
#pragma unroll
    for (uint k = 0; k < 2; ++k) {
        g[k] = rope_product(rope_turned(g[k], turn, -1.0f), w);
        const float dot = rope_total(rope_dot(g[k], v[k]), params.lanes);
        const uint own = head + k * each < params.heads ? pair : pairs;
        const float scale = own < pairs ? rstd[ulong(token) * params.heads + head + k * each] : 0.0f;
        const float factor = dot / float(2 * pairs) * scale * scale * scale;
        const ulong to = ulong(token) * params.dx_pitch + ulong(head + k * each) * 2 * pairs;
        rope_store(dx, to, own, pairs, aligned, rope_dx(g[k], scale, v[k], factor));
    }
}
