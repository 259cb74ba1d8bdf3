// Attention without matrix units: for decoding, and for any dtype and head's width up to 256.
//
// q, out [tokens, heads * d]; k, v [kv_tokens, kv_heads * d], each with a pitch, a multiple of 4 where d is one; rows [rows, 4]: first query,
// queries, first key, keys. Query i of a row sees its keys 0 ..= keys - queries + i, of these the last `window` and those of its own chunk of
// `chunk` keys; where `cap` is not zero, scores become cap * tanh(score / cap). The running softmax is that of Dao et al., "FlashAttention",
// 2022.
//
// A threadgroup of at most 256 threads has one query (or one key, in attention_plain_dkv) of one head. Teams of 8, 16 or 32 lanes share the
// keys (or the queries): the smallest team whose lanes hold a head with eight elements each, 4 l .. 4 l + 4 and as many behind those of all
// lanes. Fewer lanes to a key are fewer shuffles for its score. The grid is `[longest row, heads, rows]`.

#define LOWEST -3.0e38f

struct AttentionParams {
    uint heads; uint kv_heads; uint d; float scale;
    uint window; uint chunk; float cap;
    uint q_pitch; uint k_pitch; uint v_pitch; uint out_pitch;
    uint dout_pitch; uint dq_pitch; uint dk_pitch; uint dv_pitch;
};
struct SplitParams {
    uint tokens; uint splits; uint heads; uint kv_heads; uint d; float scale;
    uint window; uint chunk; float cap;
    uint q_pitch; uint k_pitch; uint v_pitch;
};
struct MergeParams { uint places; uint heads; uint d; uint splits; uint out_pitch; };

// A lane's place in its team, and its team's among those of the threadgroup.
struct Team { uint lanes; uint lane; uint team; uint teams; };

FUNCTION Team team_of(uint d, uint lane, uint simd, uint simds)
{
    Team t;
    t.lanes = d <= 64 ? 8 : d <= 128 ? 16 : 32;
    t.lane = lane % t.lanes;
    t.team = (32 * simd + lane) / t.lanes;
    t.teams = 32 * simds / t.lanes;
    return t;
}

FUNCTION float team_sum(float x, Team t)
{
    x += simd_shuffle_xor(x, 1);
    x += simd_shuffle_xor(x, 2);
    x += simd_shuffle_xor(x, 4);
    if (t.lanes > 8) x += simd_shuffle_xor(x, 8);
    if (t.lanes > 16) x += simd_shuffle_xor(x, 16);
    return x;
}

// The first key that the query at `position` of its row sees.
FUNCTION uint first_seen(uint position, uint window, uint chunk)
{
    return max(position + 1 - min(position + 1, window), position / chunk * chunk);
}

// From how many positions a key is seen, its own the first.
FUNCTION uint times_seen(uint key, uint window, uint chunk) { return min(window, chunk - key % chunk); }

// A product of a query and a key as a score. Beyond 16 the tangent is 1, and quick versions of it overflow.
template <bool CAPPED>
FUNCTION float score_of(float product, float scale, float cap)
{
    return CAPPED ? cap * tanh(fmin(fmax(scale * product / cap, -16.0f), 16.0f)) : scale * product;
}

// How far a score moves with its product.
template <bool CAPPED>
FUNCTION float slope_of(float score, float scale, float cap)
{
    return CAPPED ? scale * (1.0f - score / cap * (score / cap)) : scale;
}

// Where a token's head begins.
FUNCTION ulong start_of(uint token, uint pitch, uint head, uint d) { return ulong(token) * pitch + head * d; }

// The keys and values of a row's head: where they begin, and how far they lie apart.
struct Keys { ulong k; ulong v; uint k_pitch; uint v_pitch; };

FUNCTION Keys keys_of(uint token, uint k_pitch, uint v_pitch, uint head, uint d)
{
    Keys keys;
    keys.k = start_of(token, k_pitch, head, d);
    keys.v = start_of(token, v_pitch, head, d);
    keys.k_pitch = k_pitch;
    keys.v_pitch = v_pitch;
    return keys;
}

// A lane's share of a head.
struct Share { float4 low; float4 high; };

FUNCTION float4 zeros() { return make_float4(0.0f, 0.0f, 0.0f, 0.0f); }

FUNCTION Share no_share()
{
    Share share;
    share.low = zeros();
    share.high = zeros();
    return share;
}

// Four elements of a head from `i` on; zero beyond its width.
FUNCTION float4 load_within(DEVICE_PTR(const T) x, ulong start, uint i, uint d)
{
    return make_float4(i < d ? float(x[start + i]) : 0.0f, i + 1 < d ? float(x[start + i + 1]) : 0.0f,
                       i + 2 < d ? float(x[start + i + 2]) : 0.0f, i + 3 < d ? float(x[start + i + 3]) : 0.0f);
}

// The threadgroup's own query or key: zero beyond the head's width.
FUNCTION Share load_own(DEVICE_PTR(const T) x, ulong start, uint d, Team t)
{
    Share share;
    share.low = load_within(x, start, 4 * t.lane, d);
    share.high = load_within(x, start, 4 * (t.lanes + t.lane), d);
    return share;
}

// One of those that it meets: without a branch where the width is a multiple of 4 (`quads`), so that several loads are on their way at once.
// What a lane beyond the width then holds meets zeros only, or is never stored.
FUNCTION Share load_other(DEVICE_PTR(const T) x, ulong start, uint d, Team t, bool quads)
{
    if (!quads) return load_own(x, start, d, t);
    Share share;
    share.low = load4(x, start + min(4 * t.lane, d - 4));
    share.high = load4(x, start + min(4 * (t.lanes + t.lane), d - 4));
    return share;
}

FUNCTION float dot4(float4 a, float4 b) { return fma(a.x, b.x, fma(a.y, b.y, fma(a.z, b.z, a.w * b.w))); }

FUNCTION float team_dot(Share a, Share b, Team t) { return team_sum(dot4(a.low, b.low) + dot4(a.high, b.high), t); }

FUNCTION float4 add4(float4 sum, float factor, float4 x)
{
    return make_float4(fma(x.x, factor, sum.x), fma(x.y, factor, sum.y), fma(x.z, factor, sum.z), fma(x.w, factor, sum.w));
}

FUNCTION void add(THREAD_REF(Share) sum, float factor, Share x)
{
    sum.low = add4(sum.low, factor, x.low);
    sum.high = add4(sum.high, factor, x.high);
}

FUNCTION void put4(float4 x, THREADGROUP_PTR(float) shares, uint at)
{
    shares[at] = x.x;
    shares[at + 1] = x.y;
    shares[at + 2] = x.z;
    shares[at + 3] = x.w;
}

// Puts a lane's share into its SIMD group's 256 places.
FUNCTION void put(Share x, THREADGROUP_PTR(float) shares, uint lane, uint simd)
{
    put4(x.low, shares, 256 * simd + 4 * lane);
    put4(x.high, shares, 256 * simd + 128 + 4 * lane);
}

// Element `i` of what a team has put.
FUNCTION float taken(THREADGROUP_PTR(const float) shares, uint i, uint team, uint lanes)
{
    const uint simd = team * lanes / 32, first = 4 * (team * lanes % 32);
    return shares[256 * simd + first + (i < 4 * lanes ? i : 128 + i - 4 * lanes)];
}

FUNCTION float sum_taken(THREADGROUP_PTR(const float) shares, uint i, Team t)
{
    float sum = 0.0f;
    for (uint team = 0; team < t.teams; ++team) sum += taken(shares, i, team, t.lanes);
    return sum;
}

// What a team knows of a softmax: its greatest score, the sum of exponentials relative to it, the values so weighted.
struct Softmax { float top; float sum; Share value; };

// How scores come of products: a factor, and a cap where it is not zero.
struct Scores { float scale; float cap; };

// The softmax of a team's keys: `first + team`, `first + team + teams` and so on, below `end`; four at a time.
template <bool QUADS, bool CAPPED>
FUNCTION Softmax attend_as(Share q, DEVICE_PTR(const T) k, DEVICE_PTR(const T) v, Keys keys, uint first, uint end, Scores scores, uint d,
                           Team t)
{
    Softmax state;
    state.top = LOWEST;
    state.sum = 0.0f;
    state.value = no_share();
    for (uint base = first; base < end; base += 4 * t.teams) {
        const uint key = base + t.team, last = end - 1;
        const ulong a = min(key, last), b = min(key + t.teams, last), c = min(key + 2 * t.teams, last), e = min(key + 3 * t.teams, last);
        const Share k0 = load_other(k, keys.k + a * keys.k_pitch, d, t, QUADS), k1 = load_other(k, keys.k + b * keys.k_pitch, d, t, QUADS);
        const Share k2 = load_other(k, keys.k + c * keys.k_pitch, d, t, QUADS), k3 = load_other(k, keys.k + e * keys.k_pitch, d, t, QUADS);
        const Share v0 = load_other(v, keys.v + a * keys.v_pitch, d, t, QUADS), v1 = load_other(v, keys.v + b * keys.v_pitch, d, t, QUADS);
        const Share v2 = load_other(v, keys.v + c * keys.v_pitch, d, t, QUADS), v3 = load_other(v, keys.v + e * keys.v_pitch, d, t, QUADS);
        // a key that is not there repeats the last one, with no weight
        const float s0 = score_of<CAPPED>(team_dot(q, k0, t), scores.scale, scores.cap), s1 = score_of<CAPPED>(team_dot(q, k1, t), scores.scale, scores.cap);
        const float s2 = score_of<CAPPED>(team_dot(q, k2, t), scores.scale, scores.cap), s3 = score_of<CAPPED>(team_dot(q, k3, t), scores.scale, scores.cap);
        const float top = fmax(state.top, fmax(fmax(s0, s1), fmax(s2, s3)));
        const float keep = exp(state.top - top);
        const float w0 = key < end ? exp(s0 - top) : 0.0f, w1 = key + t.teams < end ? exp(s1 - top) : 0.0f;
        const float w2 = key + 2 * t.teams < end ? exp(s2 - top) : 0.0f, w3 = key + 3 * t.teams < end ? exp(s3 - top) : 0.0f;
        state.top = top;
        state.sum = fma(state.sum, keep, (w0 + w1) + (w2 + w3));
        Share value = no_share();
        add(value, keep, state.value);
        add(value, w0, v0);
        add(value, w1, v1);
        add(value, w2, v2);
        add(value, w3, v3);
        state.value = value;
    }
    return state;
}

FUNCTION Softmax attend(Share q, DEVICE_PTR(const T) k, DEVICE_PTR(const T) v, Keys keys, uint first, uint end, Scores scores, uint d, Team t)
{
    if (scores.cap > 0.0f) {
        return d % 4 == 0 ? attend_as<true, true>(q, k, v, keys, first, end, scores, d, t)
                          : attend_as<false, true>(q, k, v, keys, first, end, scores, d, t);
    }
    return d % 4 == 0 ? attend_as<true, false>(q, k, v, keys, first, end, scores, d, t)
                      : attend_as<false, false>(q, k, v, keys, first, end, scores, d, t);
}

// Shares the softmax of each team with the threadgroup: values, then greatest score and sum.
FUNCTION void share_softmax(Softmax state, THREADGROUP_PTR(float) shares, THREADGROUP_PTR(float) tops, THREADGROUP_PTR(float) sums, Team t,
                            uint lane, uint simd)
{
    put(state.value, shares, lane, simd);
    if (t.lane == 0) {
        tops[t.team] = state.top;
        sums[t.team] = state.sum;
    }
    BARRIER();
}

// The threadgroup's greatest score, and its sum of exponentials relative to that.
FUNCTION void merged(THREADGROUP_PTR(const float) tops, THREADGROUP_PTR(const float) sums, uint teams, THREAD_REF(float) top,
                     THREAD_REF(float) sum)
{
    top = LOWEST;
    sum = 0.0f;
    for (uint team = 0; team < teams; ++team) top = fmax(top, tops[team]);
    for (uint team = 0; team < teams; ++team) sum += sums[team] * exp(tops[team] - top);
}

FUNCTION float merged_value(THREADGROUP_PTR(const float) shares, THREADGROUP_PTR(const float) tops, Team t, float top, uint i)
{
    float value = 0.0f;
    for (uint team = 0; team < t.teams; ++team) value += taken(shares, i, team, t.lanes) * exp(tops[team] - top);
    return value;
}

/// Attention, and the log-sum-exp of its scores `lse [tokens, heads]`. Grid `[longest row's queries, heads, rows]`, at most 256 threads.
KERNEL(attention_plain)(READ_ROWS(T, q, 0), READ_ROWS(T, k, 1), READ_ROWS(T, v, 2), READ(uint, rows, 3), WRITE_ROWS(T, out, 4),
                        WRITE(float, lse, 5), PARAMS(AttentionParams, 6))
{
    THREADGROUP(float, shares, 2048);
    THREADGROUP(float, tops, 32);
    THREADGROUP(float, sums, 32);
    const uint queries = rows[4 * GROUP_Z + 1], keys = rows[4 * GROUP_Z + 3], d = params.d;
    if (GROUP_X >= queries) return;
    const uint token = rows[4 * GROUP_Z] + GROUP_X, kv_head = GROUP_Y / (params.heads / params.kv_heads);
    const Keys others = keys_of(rows[4 * GROUP_Z + 2], params.k_pitch, params.v_pitch, kv_head, d);
    const uint visible = keys - queries + GROUP_X + 1;
    const Team t = team_of(d, LANE, SIMD, SIMDS);
    const Share query = load_own(q, start_of(token, params.q_pitch, GROUP_Y, d), d, t);
    const Scores scores = {params.scale, params.cap};
    const uint first = first_seen(visible - 1, params.window, params.chunk);
    const Softmax state = attend(query, k, v, others, first, visible, scores, d, t);
    share_softmax(state, shares, tops, sums, t, LANE, SIMD);
    float top, sum;
    merged(tops, sums, t.teams, top, sum);
    const ulong start = start_of(token, params.out_pitch, GROUP_Y, d);
    for (uint i = THREAD; i < d; i += THREADS) out[start + i] = T(merged_value(shares, tops, t, top, i) / sum);
    if (THREAD == 0) lse[ulong(token) * params.heads + GROUP_Y] = top + log(sum);
}

/// `attention_plain` of one of `splits` parts of each query's keys, for long caches: `partial [splits, tokens, heads, d]` and
/// `partial_lse [splits, tokens, heads]` go to `attention_plain_merge`. Grid `[longest row's queries * splits, heads, rows]`.
KERNEL(attention_plain_split)(READ_ROWS(T, q, 0), READ_ROWS(T, k, 1), READ_ROWS(T, v, 2), READ(uint, rows, 3), WRITE(float, partial, 4),
                              WRITE(float, partial_lse, 5), PARAMS(SplitParams, 6))
{
    THREADGROUP(float, shares, 2048);
    THREADGROUP(float, tops, 32);
    THREADGROUP(float, sums, 32);
    const uint queries = rows[4 * GROUP_Z + 1], keys = rows[4 * GROUP_Z + 3], d = params.d;
    const uint query = GROUP_X / params.splits, split = GROUP_X % params.splits;
    if (query >= queries) return;
    const uint token = rows[4 * GROUP_Z] + query, kv_head = GROUP_Y / (params.heads / params.kv_heads);
    const Keys others = keys_of(rows[4 * GROUP_Z + 2], params.k_pitch, params.v_pitch, kv_head, d);
    const uint visible = keys - queries + query + 1;
    const uint seen = first_seen(visible - 1, params.window, params.chunk), part = (visible - seen + params.splits - 1) / params.splits;
    const uint first = min(seen + part * split, visible), end = min(first + part, visible);
    const Team t = team_of(d, LANE, SIMD, SIMDS);
    const Share own = load_own(q, start_of(token, params.q_pitch, GROUP_Y, d), d, t);
    const Scores scores = {params.scale, params.cap};
    const Softmax state = attend(own, k, v, others, first, end, scores, d, t);
    share_softmax(state, shares, tops, sums, t, LANE, SIMD);
    float top, sum;
    merged(tops, sums, t.teams, top, sum);
    // a part without keys weighs nothing
    const float factor = first < end ? 1.0f / sum : 0.0f;
    const ulong to = (split * ulong(params.tokens) + token) * params.heads + GROUP_Y;
    for (uint i = THREAD; i < d; i += THREADS) partial[to * d + i] = factor * merged_value(shares, tops, t, top, i);
    if (THREAD == 0) partial_lse[to] = first < end ? top + log(sum) : LOWEST;
}

/// Merges what `attention_plain_split` wrote into `out` and `lse`. One threadgroup for each of the `places` (tokens times heads).
KERNEL(attention_plain_merge)(READ(float, partial, 0), READ(float, partial_lse, 1), WRITE_ROWS(T, out, 2), WRITE(float, lse, 3),
                              PARAMS(MergeParams, 4))
{
    float top = LOWEST, sum = 0.0f;
    for (uint s = 0; s < params.splits; ++s) top = fmax(top, partial_lse[ulong(s) * params.places + GROUP_X]);
    for (uint s = 0; s < params.splits; ++s) sum += exp(partial_lse[ulong(s) * params.places + GROUP_X] - top);
    const ulong start = start_of(GROUP_X / params.heads, params.out_pitch, GROUP_X % params.heads, params.d);
    for (uint i = THREAD; i < params.d; i += THREADS) {
        float value = 0.0f;
        for (uint s = 0; s < params.splits; ++s) {
            const ulong from = ulong(s) * params.places + GROUP_X;
            value += partial[from * params.d + i] * exp(partial_lse[from] - top);
        }
        out[start + i] = T(value / sum);
    }
    if (THREAD == 0) lse[GROUP_X] = top + log(sum);
}

// A query with what the backward knows of it.
struct Query { Share query; Share upstream; float lse; float delta; };

// A team's part of the gradient of a query that sees the keys from `first` on, below `end`.
template <bool CAPPED>
FUNCTION Share to_query(Query own, DEVICE_PTR(const T) k, DEVICE_PTR(const T) v, Keys keys, uint first, uint end, Scores scores, uint d, Team t)
{
    Share sum = no_share();
    for (uint base = first; base < end; base += t.teams) {
        const uint key = base + t.team;
        const ulong at = min(key, end - 1);
        const Share other = load_other(k, keys.k + at * keys.k_pitch, d, t, d % 4 == 0);
        const float score = score_of<CAPPED>(team_dot(own.query, other, t), scores.scale, scores.cap);
        const float dweight = team_dot(own.upstream, load_other(v, keys.v + at * keys.v_pitch, d, t, d % 4 == 0), t);
        const float slope = slope_of<CAPPED>(score, scores.scale, scores.cap);
        if (key < end) add(sum, slope * exp(score - own.lse) * (dweight - own.delta), other);
    }
    return sum;
}

/// The gradient of the queries, and `delta [tokens, heads]`, the sums of `dout * out` that `attention_plain_dkv` needs. Grid and threads as
/// of `attention_plain`.
KERNEL(attention_plain_dq)(READ_ROWS(T, dout, 0), READ_ROWS(T, q, 1), READ_ROWS(T, k, 2), READ_ROWS(T, v, 3), READ_ROWS(T, out, 4),
                           READ(float, lse, 5), READ(uint, rows, 6), WRITE_ROWS(T, dq, 7), WRITE(float, delta, 8),
                           PARAMS(AttentionParams, 9))
{
    THREADGROUP(float, shares, 2048);
    const uint queries = rows[4 * GROUP_Z + 1], keys = rows[4 * GROUP_Z + 3], d = params.d;
    if (GROUP_X >= queries) return;
    const uint token = rows[4 * GROUP_Z] + GROUP_X, kv_head = GROUP_Y / (params.heads / params.kv_heads);
    const ulong place = ulong(token) * params.heads + GROUP_Y;
    const Keys others = keys_of(rows[4 * GROUP_Z + 2], params.k_pitch, params.v_pitch, kv_head, d);
    const uint visible = keys - queries + GROUP_X + 1;
    const Team t = team_of(d, LANE, SIMD, SIMDS);
    Query own;
    own.query = load_own(q, start_of(token, params.q_pitch, GROUP_Y, d), d, t);
    own.upstream = load_own(dout, start_of(token, params.dout_pitch, GROUP_Y, d), d, t);
    own.delta = team_dot(own.upstream, load_own(out, start_of(token, params.out_pitch, GROUP_Y, d), d, t), t);
    own.lse = lse[place];
    const Scores scores = {params.scale, params.cap};
    const uint first = first_seen(visible - 1, params.window, params.chunk);
    const Share sum = params.cap > 0.0f ? to_query<true>(own, k, v, others, first, visible, scores, d, t)
                                        : to_query<false>(own, k, v, others, first, visible, scores, d, t);
    put(sum, shares, LANE, SIMD);
    BARRIER();
    const ulong start = start_of(token, params.dq_pitch, GROUP_Y, d);
    for (uint i = THREAD; i < d; i += THREADS) dq[start + i] = T(sum_taken(shares, i, t));
    if (THREAD == 0) delta[place] = own.delta;
}

// A key with its value, and a team's part of their gradients.
struct Pair { Share key; Share value; };

// What the queries of a row give to the gradients of a key: those from `first` on, below `end`, each with all heads that share the key.
template <bool CAPPED>
FUNCTION Pair to_key(Pair own, DEVICE_PTR(const T) dout, DEVICE_PTR(const T) q, DEVICE_PTR(const float) lse, DEVICE_PTR(const float) delta,
                     uint first_query, uint first, uint end, uint kv_head, AttentionParams params, Team t)
{
    const uint d = params.d, group = params.heads / params.kv_heads;
    Pair sum;
    sum.key = no_share();
    sum.value = no_share();
    for (uint base = first * group; base < end * group; base += t.teams) {
        const uint i = base + t.team, there = min(i, end * group - 1);
        const uint other = first_query + there / group, head = kv_head * group + there % group;
        const ulong place = ulong(other) * params.heads + head;
        const Share query = load_other(q, start_of(other, params.q_pitch, head, d), d, t, d % 4 == 0);
        const Share upstream = load_other(dout, start_of(other, params.dout_pitch, head, d), d, t, d % 4 == 0);
        const float score = score_of<CAPPED>(team_dot(query, own.key, t), params.scale, params.cap);
        const float weight = exp(score - lse[place]);
        const float dweight = team_dot(upstream, own.value, t);
        if (i < end * group) {
            add(sum.value, weight, upstream);
            add(sum.key, slope_of<CAPPED>(score, params.scale, params.cap) * weight * (dweight - delta[place]), query);
        }
    }
    return sum;
}

/// The gradients of keys and values; places that belong to no row are left as they are. Grid `[longest row's keys, kv_heads, rows]`, at most
/// 256 threads.
KERNEL(attention_plain_dkv)(READ_ROWS(T, dout, 0), READ_ROWS(T, q, 1), READ_ROWS(T, k, 2), READ_ROWS(T, v, 3), READ(float, lse, 4),
                            READ(float, delta, 5), READ(uint, rows, 6), UPDATE_ROWS(T, dk, 7), UPDATE_ROWS(T, dv, 8),
                            PARAMS(AttentionParams, 9))
{
    THREADGROUP(float, shares, 2048);
    const uint queries = rows[4 * GROUP_Z + 1], keys = rows[4 * GROUP_Z + 3], d = params.d;
    if (GROUP_X >= keys) return;
    const uint token = rows[4 * GROUP_Z + 2] + GROUP_X;
    const uint before = keys - queries, beyond = GROUP_X + min(times_seen(GROUP_X, params.window, params.chunk), keys - GROUP_X);
    const uint first = GROUP_X > before ? GROUP_X - before : 0, end = beyond > before ? beyond - before : 0;
    const Team t = team_of(d, LANE, SIMD, SIMDS);
    Pair own;
    own.key = load_own(k, start_of(token, params.k_pitch, GROUP_Y, d), d, t);
    own.value = load_own(v, start_of(token, params.v_pitch, GROUP_Y, d), d, t);
    const uint first_query = rows[4 * GROUP_Z];
    const Pair sum = params.cap > 0.0f ? to_key<true>(own, dout, q, lse, delta, first_query, first, end, GROUP_Y, params, t)
                                       : to_key<false>(own, dout, q, lse, delta, first_query, first, end, GROUP_Y, params, t);
    put(sum.key, shares, LANE, SIMD);
    BARRIER();
    const ulong dk_start = start_of(token, params.dk_pitch, GROUP_Y, d), dv_start = start_of(token, params.dv_pitch, GROUP_Y, d);
    for (uint i = THREAD; i < d; i += THREADS) dk[dk_start + i] = T(sum_taken(shares, i, t));
    BARRIER();
    put(sum.value, shares, LANE, SIMD);
    BARRIER();
    for (uint i = THREAD; i < d; i += THREADS) dv[dv_start + i] = T(sum_taken(shares, i, t));
}
