// Attention without matrix units: for decoding, and for any dtype and head's width up to 256.
//
// q, out [tokens, heads, d]; k, v [kv_tokens, kv_heads, d]; rows [rows, 4]: first query, queries, first key, keys. Query i of a row sees its
// keys 0 ..= keys - queries + i. The running softmax is that of Dao et al., "FlashAttention", 2022.
//
// A threadgroup of at most 256 threads has one query (or one key, in attention_plain_dkv) of one head. Its SIMD groups share the keys (or
// the queries); lane l holds the elements 4 l .. 4 l + 4 and 128 + 4 l .. 128 + 4 l + 4 of a head. The grid is `[longest row, heads, rows]`.

#define LOWEST -3.0e38f

struct AttentionParams { uint heads; uint kv_heads; uint d; float scale; };
struct SplitParams { uint tokens; uint splits; uint heads; uint kv_heads; uint d; float scale; };
struct MergeParams { uint places; uint d; uint splits; };

// A lane's share of a head.
struct Share { float4 low; float4 high; };

FUNCTION float4 zeros() { return make_float4(0.0f, 0.0f, 0.0f, 0.0f); }

// Four elements of a head at `start`, from `i` on; zero beyond its width.
FUNCTION float4 load_four(DEVICE_PTR(const T) x, ulong start, uint i, uint d)
{
    if (i >= d) return zeros();
    if (d % 4 == 0) return load4(x, start + i);
    return make_float4(float(x[start + i]), i + 1 < d ? float(x[start + i + 1]) : 0.0f, i + 2 < d ? float(x[start + i + 2]) : 0.0f,
                       i + 3 < d ? float(x[start + i + 3]) : 0.0f);
}

FUNCTION Share load_share(DEVICE_PTR(const T) x, ulong head, uint d, uint lane)
{
    Share share;
    share.low = load_four(x, head * d, 4 * lane, d);
    share.high = d > 128 ? load_four(x, head * d, 128 + 4 * lane, d) : zeros();
    return share;
}

FUNCTION float dot4(float4 a, float4 b) { return fma(a.x, b.x, fma(a.y, b.y, fma(a.z, b.z, a.w * b.w))); }

FUNCTION float dot_share(Share a, Share b, uint d) { return dot4(a.low, b.low) + (d > 128 ? dot4(a.high, b.high) : 0.0f); }

// `sum * keep + x * factor`.
FUNCTION float4 blend4(float4 sum, float keep, float4 x, float factor)
{
    return make_float4(fma(x.x, factor, sum.x * keep), fma(x.y, factor, sum.y * keep), fma(x.z, factor, sum.z * keep),
                       fma(x.w, factor, sum.w * keep));
}

FUNCTION void blend(THREAD_REF(Share) sum, float keep, Share x, float factor, uint d)
{
    sum.low = blend4(sum.low, keep, x.low, factor);
    if (d > 128) sum.high = blend4(sum.high, keep, x.high, factor);
}

// Puts a lane's share into its SIMD group's 256 places.
FUNCTION void put(Share x, THREADGROUP_PTR(float) shares, uint lane, uint simd, uint d)
{
    const uint low = 256 * simd + 4 * lane, high = low + 128;
    shares[low] = x.low.x;
    shares[low + 1] = x.low.y;
    shares[low + 2] = x.low.z;
    shares[low + 3] = x.low.w;
    if (d > 128) {
        shares[high] = x.high.x;
        shares[high + 1] = x.high.y;
        shares[high + 2] = x.high.z;
        shares[high + 3] = x.high.w;
    }
}

FUNCTION float sum_shares(THREADGROUP_PTR(const float) shares, uint i, uint simds)
{
    float sum = 0.0f;
    for (uint s = 0; s < simds; ++s) sum += shares[256 * s + i];
    return sum;
}

// What a SIMD group knows of a softmax: its greatest score, the sum of exponentials relative to it, the values so weighted.
struct Softmax { float top; float sum; Share value; };

FUNCTION void add_key(THREAD_REF(Softmax) state, float top, float score, Share value, uint d)
{
    const float weight = exp(score - top);
    state.sum += weight;
    blend(state.value, 1.0f, value, weight, d);
}

// The softmax of a SIMD group's keys: `first + simd`, `first + simd + simds` and so on, below `end`.
FUNCTION Softmax attend(Share q, DEVICE_PTR(const T) k, DEVICE_PTR(const T) v, ulong start, uint stride, uint first, uint end, float scale,
                        uint d, uint lane, uint simd, uint simds)
{
    Softmax state;
    state.top = LOWEST;
    state.sum = 0.0f;
    state.value.low = zeros();
    state.value.high = zeros();
    uint key = first + simd;
    for (; key + 3 * simds < end; key += 4 * simds) {
        const ulong a = start + ulong(key) * stride, hop = ulong(simds) * stride;
        const Share k0 = load_share(k, a, d, lane), k1 = load_share(k, a + hop, d, lane);
        const Share k2 = load_share(k, a + 2 * hop, d, lane), k3 = load_share(k, a + 3 * hop, d, lane);
        const Share v0 = load_share(v, a, d, lane), v1 = load_share(v, a + hop, d, lane);
        const Share v2 = load_share(v, a + 2 * hop, d, lane), v3 = load_share(v, a + 3 * hop, d, lane);
        const float s0 = scale * simd_sum(dot_share(q, k0, d)), s1 = scale * simd_sum(dot_share(q, k1, d));
        const float s2 = scale * simd_sum(dot_share(q, k2, d)), s3 = scale * simd_sum(dot_share(q, k3, d));
        const float top = fmax(state.top, fmax(fmax(s0, s1), fmax(s2, s3)));
        const float keep = exp(state.top - top);
        state.top = top;
        state.sum *= keep;
        blend(state.value, keep, v0, 0.0f, d);
        add_key(state, top, s0, v0, d);
        add_key(state, top, s1, v1, d);
        add_key(state, top, s2, v2, d);
        add_key(state, top, s3, v3, d);
    }
    for (; key < end; key += simds) {
        const ulong a = start + ulong(key) * stride;
        const Share value = load_share(v, a, d, lane);
        const float score = scale * simd_sum(dot_share(q, load_share(k, a, d, lane), d));
        const float top = fmax(state.top, score);
        const float keep = exp(state.top - top);
        state.top = top;
        state.sum *= keep;
        blend(state.value, keep, value, 0.0f, d);
        add_key(state, top, score, value, d);
    }
    return state;
}

// Shares the softmax of each SIMD group with the threadgroup: values, then greatest score and sum.
FUNCTION void share_softmax(Softmax state, THREADGROUP_PTR(float) shares, THREADGROUP_PTR(float) tops, THREADGROUP_PTR(float) sums, uint lane,
                            uint simd, uint d)
{
    put(state.value, shares, lane, simd, d);
    if (lane == 0) {
        tops[simd] = state.top;
        sums[simd] = state.sum;
    }
    BARRIER();
}

// The threadgroup's greatest score, and its sum of exponentials relative to that.
FUNCTION void merged(THREADGROUP_PTR(const float) tops, THREADGROUP_PTR(const float) sums, uint simds, THREAD_REF(float) top,
                     THREAD_REF(float) sum)
{
    top = LOWEST;
    sum = 0.0f;
    for (uint s = 0; s < simds; ++s) top = fmax(top, tops[s]);
    for (uint s = 0; s < simds; ++s) sum += sums[s] * exp(tops[s] - top);
}

FUNCTION float merged_value(THREADGROUP_PTR(const float) shares, THREADGROUP_PTR(const float) tops, uint simds, float top, uint i)
{
    float value = 0.0f;
    for (uint s = 0; s < simds; ++s) value += shares[256 * s + i] * exp(tops[s] - top);
    return value;
}

/// Attention, and the log-sum-exp of its scores `lse [tokens, heads]`. Grid `[longest row's queries, heads, rows]`, at most 256 threads.
KERNEL(attention_plain)(READ(T, q, 0), READ(T, k, 1), READ(T, v, 2), READ(uint, rows, 3), WRITE(T, out, 4), WRITE(float, lse, 5),
                        PARAMS(AttentionParams, 6))
{
    THREADGROUP(float, shares, 2048);
    THREADGROUP(float, tops, 8);
    THREADGROUP(float, sums, 8);
    const uint queries = rows[4 * GROUP_Z + 1], keys = rows[4 * GROUP_Z + 3], d = params.d;
    if (GROUP_X >= queries) return;
    const ulong place = ulong(rows[4 * GROUP_Z] + GROUP_X) * params.heads + GROUP_Y;
    const uint kv_head = GROUP_Y / (params.heads / params.kv_heads);
    const ulong start = ulong(rows[4 * GROUP_Z + 2]) * params.kv_heads + kv_head;
    const uint visible = keys - queries + GROUP_X + 1;
    const Share query = load_share(q, place, d, LANE);
    const Softmax state = attend(query, k, v, start, params.kv_heads, 0, visible, params.scale, d, LANE, SIMD, SIMDS);
    share_softmax(state, shares, tops, sums, LANE, SIMD, d);
    float top, sum;
    merged(tops, sums, SIMDS, top, sum);
    for (uint i = THREAD; i < d; i += THREADS) out[place * d + i] = T(merged_value(shares, tops, SIMDS, top, i) / sum);
    if (THREAD == 0) lse[place] = top + log(sum);
}

/// [`attention_plain`] of one of `splits` parts of each query's keys, for long caches: `partial [splits, tokens, heads, d]` and
/// `partial_lse [splits, tokens, heads]` go to [`attention_plain_merge`]. Grid `[longest row's queries * splits, heads, rows]`.
KERNEL(attention_plain_split)(READ(T, q, 0), READ(T, k, 1), READ(T, v, 2), READ(uint, rows, 3), WRITE(float, partial, 4),
                              WRITE(float, partial_lse, 5), PARAMS(SplitParams, 6))
{
    THREADGROUP(float, shares, 2048);
    THREADGROUP(float, tops, 8);
    THREADGROUP(float, sums, 8);
    const uint queries = rows[4 * GROUP_Z + 1], keys = rows[4 * GROUP_Z + 3], d = params.d;
    const uint query = GROUP_X / params.splits, split = GROUP_X % params.splits;
    if (query >= queries) return;
    const ulong place = ulong(rows[4 * GROUP_Z] + query) * params.heads + GROUP_Y;
    const uint kv_head = GROUP_Y / (params.heads / params.kv_heads);
    const ulong start = ulong(rows[4 * GROUP_Z + 2]) * params.kv_heads + kv_head;
    const uint visible = keys - queries + query + 1;
    const uint part = (visible + params.splits - 1) / params.splits;
    const uint first = min(part * split, visible), end = min(first + part, visible);
    const Share own = load_share(q, place, d, LANE);
    const Softmax state = attend(own, k, v, start, params.kv_heads, first, end, params.scale, d, LANE, SIMD, SIMDS);
    share_softmax(state, shares, tops, sums, LANE, SIMD, d);
    float top, sum;
    merged(tops, sums, SIMDS, top, sum);
    // a part without keys weighs nothing
    const float factor = first < end ? 1.0f / sum : 0.0f;
    const ulong to = split * ulong(params.tokens) * params.heads + place;
    for (uint i = THREAD; i < d; i += THREADS) partial[to * d + i] = factor * merged_value(shares, tops, SIMDS, top, i);
    if (THREAD == 0) partial_lse[to] = first < end ? top + log(sum) : LOWEST;
}

/// Merges what [`attention_plain_split`] wrote into `out` and `lse`. One threadgroup for each of the `places` (tokens times heads).
KERNEL(attention_plain_merge)(READ(float, partial, 0), READ(float, partial_lse, 1), WRITE(T, out, 2), WRITE(float, lse, 3),
                              PARAMS(MergeParams, 4))
{
    float top = LOWEST, sum = 0.0f;
    for (uint s = 0; s < params.splits; ++s) top = fmax(top, partial_lse[ulong(s) * params.places + GROUP_X]);
    for (uint s = 0; s < params.splits; ++s) sum += exp(partial_lse[ulong(s) * params.places + GROUP_X] - top);
    for (uint i = THREAD; i < params.d; i += THREADS) {
        float value = 0.0f;
        for (uint s = 0; s < params.splits; ++s) {
            const ulong from = ulong(s) * params.places + GROUP_X;
            value += partial[from * params.d + i] * exp(partial_lse[from] - top);
        }
        out[ulong(GROUP_X) * params.d + i] = T(value / sum);
    }
    if (THREAD == 0) lse[GROUP_X] = top + log(sum);
}

/// The gradient of the queries, and `delta [tokens, heads]`, the sums of `dout * out` that [`attention_plain_dkv`] needs. Grid and threads as
/// of [`attention_plain`].
KERNEL(attention_plain_dq)(READ(T, dout, 0), READ(T, q, 1), READ(T, k, 2), READ(T, v, 3), READ(T, out, 4), READ(float, lse, 5),
                           READ(uint, rows, 6), WRITE(T, dq, 7), WRITE(float, delta, 8), PARAMS(AttentionParams, 9))
{
    THREADGROUP(float, shares, 2048);
    const uint queries = rows[4 * GROUP_Z + 1], keys = rows[4 * GROUP_Z + 3], d = params.d;
    if (GROUP_X >= queries) return;
    const ulong place = ulong(rows[4 * GROUP_Z] + GROUP_X) * params.heads + GROUP_Y;
    const uint kv_head = GROUP_Y / (params.heads / params.kv_heads);
    const ulong start = ulong(rows[4 * GROUP_Z + 2]) * params.kv_heads + kv_head;
    const uint visible = keys - queries + GROUP_X + 1;
    const Share query = load_share(q, place, d, LANE), upstream = load_share(dout, place, d, LANE);
    const float own_delta = simd_sum(dot_share(upstream, load_share(out, place, d, LANE), d));
    const float own_lse = lse[place];
    Share sum;
    sum.low = zeros();
    sum.high = zeros();
    for (uint key = SIMD; key < visible; key += SIMDS) {
        const ulong at = start + ulong(key) * params.kv_heads;
        const Share own_key = load_share(k, at, d, LANE);
        const float weight = exp(params.scale * simd_sum(dot_share(query, own_key, d)) - own_lse);
        const float dweight = simd_sum(dot_share(upstream, load_share(v, at, d, LANE), d));
        blend(sum, 1.0f, own_key, params.scale * weight * (dweight - own_delta), d);
    }
    put(sum, shares, LANE, SIMD, d);
    BARRIER();
    for (uint i = THREAD; i < d; i += THREADS) dq[place * d + i] = T(sum_shares(shares, i, SIMDS));
    if (THREAD == 0) delta[place] = own_delta;
}

/// The gradients of keys and values; places that belong to no row are left as they are. Grid `[longest row's keys, kv_heads, rows]`, at most
/// 256 threads.
KERNEL(attention_plain_dkv)(READ(T, dout, 0), READ(T, q, 1), READ(T, k, 2), READ(T, v, 3), READ(float, lse, 4), READ(float, delta, 5),
                            READ(uint, rows, 6), UPDATE(T, dk, 7), UPDATE(T, dv, 8), PARAMS(AttentionParams, 9))
{
    THREADGROUP(float, shares, 2048);
    const uint queries = rows[4 * GROUP_Z + 1], keys = rows[4 * GROUP_Z + 3], d = params.d;
    if (GROUP_X >= keys) return;
    const ulong own = ulong(rows[4 * GROUP_Z + 2] + GROUP_X) * params.kv_heads + GROUP_Y;
    const uint group = params.heads / params.kv_heads;
    const uint before = keys - queries;
    const uint first = GROUP_X > before ? GROUP_X - before : 0;
    const Share key = load_share(k, own, d, LANE), value = load_share(v, own, d, LANE);
    Share dkey, dvalue;
    dkey.low = zeros();
    dkey.high = zeros();
    dvalue = dkey;
    for (uint i = first * group + SIMD; i < queries * group; i += SIMDS) {
        const ulong place = ulong(rows[4 * GROUP_Z] + i / group) * params.heads + GROUP_Y * group + i % group;
        const Share query = load_share(q, place, d, LANE), upstream = load_share(dout, place, d, LANE);
        const float weight = exp(params.scale * simd_sum(dot_share(query, key, d)) - lse[place]);
        const float dweight = simd_sum(dot_share(upstream, value, d));
        blend(dvalue, 1.0f, upstream, weight, d);
        blend(dkey, 1.0f, query, params.scale * weight * (dweight - delta[place]), d);
    }
    put(dkey, shares, LANE, SIMD, d);
    BARRIER();
    for (uint i = THREAD; i < d; i += THREADS) dk[own * d + i] = T(sum_shares(shares, i, SIMDS));
    BARRIER();
    put(dvalue, shares, LANE, SIMD, d);
    BARRIER();
    for (uint i = THREAD; i < d; i += THREADS) dv[own * d + i] = T(sum_shares(shares, i, SIMDS));
}
