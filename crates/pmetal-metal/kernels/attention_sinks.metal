// Attention sinks: one logit more in the softmax of each query of a head, whose share is dropped.
//
// They need no kernel of attention's own. With lse the statistics without sinks and lse' = log(exp(lse) + exp(sink)) those with them, the
// result is exp(lse - lse') times that without, the probabilities of the backward are exp(score - lse'), and the gradient of a sink is the
// sum over its head's queries of -exp(sink - lse') * rowsum(dout * out).
// Source: Xiao et al., "Efficient streaming language models with attention sinks", 2024.

struct SinkParams {
    uint places; uint heads; uint d; uint out_pitch;
    uint token_step; uint head_step; float unit;
};
struct SinkGradientParams { uint tokens; uint part; uint heads; uint d; uint dout_pitch; uint out_pitch; };

/// Takes `out [tokens, heads * d]` and `stats` to those with `sinks [heads]`, and writes the sinks' `shares [tokens, heads]` of each softmax.
/// A statistic lies at `token * token_step + head * head_step`, and is natural when it is multiplied by `unit`. A SIMD group for each of the
/// `places` (tokens times heads).
KERNEL(attention_sinks)(READ(float, sinks, 0), UPDATE_ROWS(T, out, 1), UPDATE(float, stats, 2), WRITE(float, shares, 3),
                        PARAMS(SinkParams, 4))
{
    const uint place = GROUP_X * SIMDS + SIMD;
    if (place >= params.places) return;
    const uint token = place / params.heads, head = place % params.heads;
    const ulong at = ulong(token) * params.token_step + ulong(head) * params.head_step;
    // read by the lane that writes it again
    const float own = LANE == 0 ? stats[at] * params.unit : 0.0f;
    const float lse = simd_broadcast(own, 0), sink = sinks[head];
    const float both = fmax(lse, sink) + log(1.0f + exp(-fabs(lse - sink)));
    const float factor = exp(lse - both);
    const ulong start = ulong(token) * params.out_pitch + head * params.d;
    for (uint i = LANE; i < params.d; i += 32) out[start + i] = T(float(out[start + i]) * factor);
    if (LANE == 0) {
        stats[at] = both / params.unit;
        shares[place] = exp(sink - both);
    }
}

/// Each `part` of the tokens' share of the sinks' gradient, `partial [parts, heads]`. Grid `[parts, heads]`.
KERNEL(attention_sinks_gradient)(READ_ROWS(T, dout, 0), READ_ROWS(T, out, 1), READ(float, shares, 2), WRITE(float, partial, 3),
                                 PARAMS(SinkGradientParams, 4))
{
    THREADGROUP(float, sums, 32);
    const uint first = GROUP_X * params.part, end = min(first + params.part, params.tokens);
    float sum = 0.0f;
    for (uint token = first + SIMD; token < end; token += SIMDS) {
        const ulong dout_start = ulong(token) * params.dout_pitch + GROUP_Y * params.d;
        const ulong out_start = ulong(token) * params.out_pitch + GROUP_Y * params.d;
        float delta = 0.0f;
        for (uint i = LANE; i < params.d; i += 32) delta = fma(float(dout[dout_start + i]), float(out[out_start + i]), delta);
        sum = fma(shares[ulong(token) * params.heads + GROUP_Y], delta, sum);
    }
    const float own = simd_sum(sum);
    if (LANE == 0) sums[SIMD] = own;
    BARRIER();
    if (THREAD > 0) return;
    float total = 0.0f;
    for (uint simd = 0; simd < SIMDS; ++simd) total += sums[simd];
    partial[ulong(GROUP_X) * params.heads + GROUP_Y] = -total;
}
