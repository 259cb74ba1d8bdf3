// Rotary position embedding on half-split pairs.

struct RopeParams { uint tokens; uint heads; uint pairs; uint aligned; float sign; };

/// Turns the pairs `(i, i + pairs)` of every head by the angle of its token, or back with `sign` -1: `x`, `y [tokens, heads, 2 * pairs]`,
/// `angles [2, tokens, pairs]` cosines and sines. A threadgroup has a token.
KERNEL(rope)(READ(T, x, 0), READ(float, angles, 1), WRITE(T, y, 2), PARAMS(RopeParams, 3))
{
    const uint token = GROUP_X, pairs = params.pairs;
    const ulong row = ulong(token) * params.heads * 2 * pairs;
    const ulong cosines = ulong(token) * pairs, sines = ulong(params.tokens + token) * pairs;
    if (params.aligned) {
        const uint quads = pairs / 4;
        for (uint i = THREAD; i < params.heads * quads; i += THREADS) {
            const uint pair = 4 * (i % quads);
            const ulong low = row + i / quads * 2 * pairs + pair;
            const float4 a = load4(x, low), b = load4(x, low + pairs), c = load4(angles, cosines + pair);
            float4 s = load4(angles, sines + pair);
            s = make_float4(s.x * params.sign, s.y * params.sign, s.z * params.sign, s.w * params.sign);
            store4(y, low, make_float4(a.x * c.x - b.x * s.x, a.y * c.y - b.y * s.y, a.z * c.z - b.z * s.z, a.w * c.w - b.w * s.w));
            store4(y, low + pairs,
                   make_float4(b.x * c.x + a.x * s.x, b.y * c.y + a.y * s.y, b.z * c.z + a.z * s.z, b.w * c.w + a.w * s.w));
        }
    } else {
        for (uint i = THREAD; i < params.heads * pairs; i += THREADS) {
            const uint pair = i % pairs;
            const ulong low = row + i / pairs * 2 * pairs + pair;
            const float a = float(x[low]), b = float(x[low + pairs]);
            const float c = angles[cosines + pair], s = angles[sines + pair] * params.sign;
            y[low] = T(a * c - b * s);
            y[low + pairs] = T(b * c + a * s);
        }
    }
}
