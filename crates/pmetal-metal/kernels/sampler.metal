// The next token out of logits: repetition penalty, temperature, top-k, top-p, min-p and the draw, in one launch of one threadgroup.
//
// A token is as far as its scaled logit is below the greatest; the bits of a float that is not negative have its order. So "the k nearest" and
// "those who reach p" are bisections over bits of the distance, and nothing is sorted. Lists hold distances and ids in the order of ids, behind
// them distances that are FAR up to a multiple of 4; each SIMD group has a stretch of a list.

#define FAR 3.0e38f
#define NONE 0xffffffffu

struct SamplerParams {
    uint vocab;
    uint news;
    uint top_k;
    float inverse_temperature;
    float top_p;
    float min_p_distance;
    float repetition_penalty;
    float likelihood;
};

FUNCTION float group_sum(float x, THREADGROUP_PTR(float) partial, uint lane, uint simd, uint simds)
{
    x = simd_sum(x);
    if (lane == 0) partial[simd] = x;
    BARRIER();
    x = simd_sum(lane < simds ? partial[lane] : 0.0f);
    BARRIER();
    return x;
}

FUNCTION uint group_sum(uint x, THREADGROUP_PTR(uint) partial, uint lane, uint simd, uint simds)
{
    x = simd_sum(x);
    if (lane == 0) partial[simd] = x;
    BARRIER();
    x = simd_sum(lane < simds ? partial[lane] : 0u);
    BARRIER();
    return x;
}

FUNCTION uint group_min(uint x, THREADGROUP_PTR(uint) partial, uint lane, uint simd, uint simds)
{
    x = simd_min(x);
    if (lane == 0) partial[simd] = x;
    BARRIER();
    x = simd_min(lane < simds ? partial[lane] : NONE);
    BARRIER();
    return x;
}

// The sum of the lanes up to this one.
FUNCTION float prefix(float x, uint lane)
{
    for (uint by = 1; by < 32; by *= 2) {
        const float y = simd_shuffle(x, lane < by ? lane : lane - by);
        if (lane >= by) x += y;
    }
    return x;
}

// A logit after the penalty, which is for the marked.
FUNCTION float logit(float x, uint mark, float penalty) { return mark == 0 ? x : x < 0.0f ? x * penalty : x / penalty; }

FUNCTION float4 four_logits(DEVICE_PTR(const float) logits, DEVICE_PTR(const uint) marks, uint i, float penalty)
{
    const float4 x = load4(logits, i);
    if (penalty == 1.0f) return x;
    return make_float4(logit(x.x, marks[i], penalty), logit(x.y, marks[i + 1], penalty), logit(x.z, marks[i + 2], penalty),
                       logit(x.w, marks[i + 3], penalty));
}

FUNCTION float one_logit(DEVICE_PTR(const float) logits, DEVICE_PTR(const uint) marks, uint i, float penalty)
{
    return logit(logits[i], penalty != 1.0f ? marks[i] : 0, penalty);
}

// What a thread learns of its logits: the greatest, the first four that have it, the greatest bits without a sign.
struct Survey { float best; uint best_at; uint magnitude; };

FUNCTION uint magnitude(float x) { return as_uint(x) & 0x7fffffffu; }

FUNCTION void look_at(float4 x, uint i, THREAD_REF(Survey) survey)
{
    const float best = fmax(fmax(x.x, x.y), fmax(x.z, x.w));
    if (best > survey.best) {
        survey.best = best;
        survey.best_at = i;
    }
    const uint greatest = max(max(magnitude(x.x), magnitude(x.y)), max(magnitude(x.z), magnitude(x.w)));
    survey.magnitude = max(survey.magnitude, greatest);
}

// The first of the four logits from `i` on that is `top`.
FUNCTION uint first_of(DEVICE_PTR(const float) logits, DEVICE_PTR(const uint) marks, uint i, uint vocab, float penalty, float top)
{
    while (i < vocab && one_logit(logits, marks, i, penalty) != top) ++i;
    return i;
}

// Whether a logit is NaN or infinite, and not just left out.
FUNCTION bool is_wrong(float x) { return magnitude(x) >= 0x7f800000u && as_uint(x) != 0xff800000u; }

FUNCTION float distance_of(float x, float top, float inverse_temperature) { return fmin((top - x) * inverse_temperature, FAR); }

FUNCTION float mass(float4 d) { return (exp(-d.x) + exp(-d.y)) + (exp(-d.z) + exp(-d.w)); }

FUNCTION float4 four_distances(float4 x, float top, float inverse_temperature)
{
    return make_float4(distance_of(x.x, top, inverse_temperature), distance_of(x.y, top, inverse_temperature),
                       distance_of(x.z, top, inverse_temperature), distance_of(x.w, top, inverse_temperature));
}

// Elements of a SIMD group's stretch of a list of `n`, a multiple of 128.
FUNCTION uint stretch(uint n, uint simds) { return (n + 128 * simds - 1) / (128 * simds) * 128; }

FUNCTION uint below4(float4 d, uint t)
{
    return uint(as_uint(d.x) < t) + uint(as_uint(d.y) < t) + uint(as_uint(d.z) < t) + uint(as_uint(d.w) < t);
}

FUNCTION uint equal4(float4 d, uint t)
{
    return uint(as_uint(d.x) == t) + uint(as_uint(d.y) == t) + uint(as_uint(d.z) == t) + uint(as_uint(d.w) == t);
}

// How many of this thread's part of a list are nearer than `t`.
FUNCTION uint count_below(DEVICE_PTR(const float) distances, uint from, uint n, uint t, uint lane, uint simd, uint simds)
{
    const uint size = stretch(n, simds), end = min((simd + 1) * size, n);
    uint count = 0;
    for (uint i = simd * size + 4 * lane; i < end; i += 128) count += below4(load4(distances, from + i), t);
    return count;
}

FUNCTION float weight_below(float d, uint t) { return exp(as_uint(d) < t ? -d : -FAR); }

FUNCTION float four_below(float4 d, uint t)
{
    return (weight_below(d.x, t) + weight_below(d.y, t)) + (weight_below(d.z, t) + weight_below(d.w, t));
}

// Their probabilities times a common factor.
FUNCTION float mass_below(DEVICE_PTR(const float) distances, uint from, uint n, uint t, uint lane, uint simd, uint simds)
{
    const uint size = stretch(n, simds), end = min((simd + 1) * size, n);
    float sum = 0.0f;
    for (uint i = simd * size + 4 * lane; i < end; i += 128) sum += four_below(load4(distances, from + i), t);
    return sum;
}

// Appends an element where it stays: nearer than `t`, or one of the first `ties` at `t`.
FUNCTION void append(float d, uint id, uint t, uint ties, DEVICE_PTR(float) distances, DEVICE_PTR(uint) ids, THREAD_REF(uint) place,
                     THREAD_REF(uint) tie)
{
    const uint key = as_uint(d);
    const bool stays = key < t || (key == t && tie < ties);
    if (key == t) ++tie;
    if (!stays) return;
    distances[place] = d;
    ids[place] = id;
    ++place;
}

// Copies the part of a list that stays (see append) from `from` to `to` and returns its length. `dense`: ids are places.
FUNCTION uint compact(DEVICE_PTR(float) distances, DEVICE_PTR(uint) ids, uint from, uint to, uint n, bool dense, uint t, uint ties,
                      THREADGROUP_PTR(uint) counts, uint lane, uint simd, uint simds)
{
    const uint size = stretch(n, simds), begin = simd * size, end = min(begin + size, n);
    uint below = count_below(distances, from, n, t, lane, simd, simds);
    uint equal = simd_sum(count_below(distances, from, n, t + 1, lane, simd, simds) - below);
    below = simd_sum(below);
    if (lane == 0) {
        counts[simd] = below;
        counts[32 + simd] = equal;
    }
    BARRIER();
    uint all_below = 0, all_equal = 0;
    for (uint s = 0; s < simds; ++s) {
        if (s == simd) {
            below = all_below;
            equal = all_equal;
        }
        all_below += counts[s];
        all_equal += counts[32 + s];
    }
    for (uint base = begin; base < end; base += 128) {
        const uint i = base + 4 * lane;
        const float4 d = i < end ? load4(distances, from + i) : make_float4(FAR, FAR, FAR, FAR);
        // both counts in one number, as neither passes 128: exact in a float
        const uint own = below4(d, t) + 65536 * equal4(d, t);
        const uint up_to = uint(prefix(float(own), lane));
        const uint before = up_to - own, all = simd_broadcast(up_to, 31);
        uint tie = equal + before / 65536;
        uint place = to + below + before % 65536 + min(tie, ties);
        if (own > 0) {
            append(d.x, dense ? i : ids[from + i], t, ties, distances, ids, place, tie);
            if (i + 1 < n) append(d.y, dense ? i + 1 : ids[from + i + 1], t, ties, distances, ids, place, tie);
            if (i + 2 < n) append(d.z, dense ? i + 2 : ids[from + i + 2], t, ties, distances, ids, place, tie);
            if (i + 3 < n) append(d.w, dense ? i + 3 : ids[from + i + 3], t, ties, distances, ids, place, tie);
        }
        below += all % 65536;
        equal += all / 65536;
    }
    const uint length = all_below + min(all_equal, ties);
    if (simd == 0 && lane < 4) distances[to + length + lane] = FAR;
    BARRIER_DEVICE();
    return length;
}

// Goes on to an element of the cumulated probabilities: `at` becomes its place where the target falls on it.
FUNCTION void visit(float d, uint i, float target, THREAD_REF(float) reached, THREAD_REF(uint) at)
{
    const float weight = exp(-d);
    reached += weight;
    if (at == NONE && weight > 0.0f && reached > target) at = i;
}

// The least `t` up to which a list holds `k` tokens or more.
FUNCTION uint reach_of_count(DEVICE_PTR(const float) distances, uint from, uint n, uint k, THREADGROUP_PTR(uint) words, uint lane, uint simd,
                             uint simds)
{
    uint low = 0, high = as_uint(FAR);
    while (low < high) {
        const uint middle = (low + high) / 2;
        if (group_sum(count_below(distances, from, n, middle + 1, lane, simd, simds), words, lane, simd, simds) >= k) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return high;
}

// The least `t`, at most `high`, up to which the tokens of a list weigh `enough`.
FUNCTION uint reach_of_mass(DEVICE_PTR(const float) distances, uint from, uint n, uint high, float enough, THREADGROUP_PTR(float) sums,
                            uint lane, uint simd, uint simds)
{
    uint low = 0;
    while (low < high) {
        const uint middle = (low + high) / 2;
        if (group_sum(mass_below(distances, from, n, middle + 1, lane, simd, simds), sums, lane, simd, simds) >= enough) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return high;
}

// The element of a list on which the target falls, from `base`, where `before` is reached, to `last`; NONE where rounding leads beyond it. By one
// SIMD group.
FUNCTION uint find(DEVICE_PTR(const float) distances, uint from, uint base, uint last, float before, float target, uint lane)
{
    // eight strides at once up to where it falls, then one by one
    while (base + 1024 <= last) {
        const float ahead = simd_sum(mass_below(distances, from + base, 1024, as_uint(FAR), lane, 0, 1));
        if (before + ahead > target) break;
        before += ahead;
        base += 1024;
    }
    uint found = NONE;
    for (; base < last && found == NONE; base += 128) {
        const uint i = base + 4 * lane;
        const float4 d = i < last ? load4(distances, from + i) : make_float4(FAR, FAR, FAR, FAR);
        const float own = mass(d), up_to = prefix(own, lane);
        float reached = before + (up_to - own);
        uint at = NONE;
        visit(d.x, i, target, reached, at);
        visit(d.y, i + 1, target, reached, at);
        visit(d.z, i + 2, target, reached, at);
        visit(d.w, i + 3, target, reached, at);
        found = simd_min(at);
        before += simd_broadcast(up_to, 31);
    }
    return found;
}

/// The id of the next token, to `token [1]`; 0xffffffff where a logit is NaN or infinite above, or none is finite. Marks `seen [news]`, all
/// different, as seen before (0 in `marks [vocab]`: not seen; read and written where there is a penalty only). An inverse temperature of 0 takes
/// the likeliest, of equals the lowest id. `min_p_distance` is `ln(1 / min_p)`, `likelihood` in [0, 1) the place in the cumulated probabilities,
/// in the order of ids. `distances` and `ids` are room: twice vocab rounded up to a multiple of 4, plus 4. One threadgroup.
KERNEL(sample_token)(READ(float, logits, 0), READ(uint, seen, 1), UPDATE(uint, marks, 2), UPDATE(float, distances, 3), UPDATE(uint, ids, 4),
                     WRITE(uint, token, 5), PARAMS(SamplerParams, 6))
{
    THREADGROUP(float, sums, 32);
    THREADGROUP(uint, words, 64);
    const uint vocab = params.vocab;
    const float penalty = params.repetition_penalty;
    if (penalty != 1.0f) {
        for (uint i = THREAD; i < params.news; i += THREADS) {
            if (seen[i] < vocab) marks[seen[i]] = 1;
        }
    }
    BARRIER_DEVICE();

    // whole fours of the stretches; the first threads have one of what is left behind them each
    const uint fours = vocab / 4 * 4, size = stretch(vocab, SIMDS);
    const uint begin = SIMD * size + 4 * LANE, end = min((SIMD + 1) * size, fours), odd = fours + THREAD;
    Survey survey;
    survey.best = -FAR;
    survey.best_at = NONE;
    survey.magnitude = 0;
    for (uint i = begin; i < end; i += 128) look_at(four_logits(logits, marks, i, penalty), i, survey);
    if (odd < vocab) look_at(make_float4(one_logit(logits, marks, odd, penalty), -FAR, -FAR, -FAR), odd, survey);
    const float best = survey.best, simds_best = simd_max(best);
    if (LANE == 0) sums[SIMD] = simds_best;
    BARRIER();
    const float top = simd_max(LANE < SIMDS ? sums[LANE] : -FAR);
    const uint own_likeliest = best > -FAR && best == top ? first_of(logits, marks, survey.best_at, vocab, penalty, top) : NONE;
    uint likeliest = group_min(own_likeliest, words, LANE, SIMD, SIMDS);
    // rare: a token that is left out, or a model that fails
    if (group_min(NONE - survey.magnitude, words, LANE, SIMD, SIMDS) <= NONE - 0x7f800000u) {
        uint wrong = 0;
        for (uint i = THREAD; i < vocab; i += THREADS) wrong += uint(is_wrong(one_logit(logits, marks, i, penalty)));
        if (group_sum(wrong, words, LANE, SIMD, SIMDS) > 0) likeliest = NONE;
    }
    if (likeliest == NONE || params.inverse_temperature == 0.0f) {
        if (THREAD == 0) token[0] = likeliest;
        return;
    }

    float sum = 0.0f;
    for (uint i = begin; i < end; i += 128) {
        const float4 d = four_distances(four_logits(logits, marks, i, penalty), top, params.inverse_temperature);
        store4(distances, i, d);
        sum += mass(d);
    }
    if (THREAD < 4) {
        distances[odd] = odd < vocab ? distance_of(one_logit(logits, marks, odd, penalty), top, params.inverse_temperature) : FAR;
        sum += exp(-distances[odd]);
    }
    const float whole = group_sum(sum, sums, LANE, SIMD, SIMDS);
    BARRIER_DEVICE();

    // what is surely too far goes first, so that the bisections below walk a short list
    const uint far = as_uint(FAR), k = params.top_k;
    uint bound = far;
    const uint room = (vocab + 3) / 4 * 4 + 4;
    if (k > 0 && k <= THREADS && THREADS <= vocab) {
        // the k nearest of the threads' nearest are k tokens
        distances[room + THREAD] = distance_of(best, top, params.inverse_temperature);
        BARRIER_DEVICE();
        bound = reach_of_count(distances, room, THREADS, k, words, LANE, SIMD, SIMDS);
        BARRIER_DEVICE();
    } else if (k == 0) {
        // all tokens this far weigh less than half of what top-p leaves out
        if (params.top_p < 1.0f) bound = as_uint(-log(0.5f * (1.0f - params.top_p) * whole / float(vocab)));
        bound = min(bound, as_uint(params.min_p_distance));
    }
    uint from = 0, n = vocab;
    if (bound < far) {
        n = compact(distances, ids, 0, room, vocab, true, bound, NONE, words, LANE, SIMD, SIMDS);
        from = room;
    }

    // tokens nearer than `t` stay, and the first `ties` at it
    uint t = far, ties = 0;
    if (k > 0 && k < vocab) {
        t = reach_of_count(distances, from, n, k, words, LANE, SIMD, SIMDS);
        ties = t < far ? NONE : 0;
    }
    if (params.top_p < 1.0f) {
        const uint kept = t < far ? t + 1 : far;
        const float all = k > 0 ? group_sum(mass_below(distances, from, n, kept, LANE, SIMD, SIMDS), sums, LANE, SIMD, SIMDS) : whole;
        const float enough = params.top_p * all;
        const uint high = reach_of_mass(distances, from, n, t, enough, sums, LANE, SIMD, SIMDS);
        if (high < far) {
            const float before = group_sum(mass_below(distances, from, n, high, LANE, SIMD, SIMDS), sums, LANE, SIMD, SIMDS);
            const float needed = fmin((enough - before) / exp(-as_float(high)), 1.0e9f);
            t = high;
            ties = max(uint(floor(needed)) + uint(floor(needed) < needed), 1u);
        }
    }
    if (as_uint(params.min_p_distance) < t) {
        t = as_uint(params.min_p_distance);
        ties = NONE;
    }
    if (t < far) {
        const uint to = from == 0 ? room : 0;
        n = compact(distances, ids, from, to, n, from == 0, t, ties, words, LANE, SIMD, SIMDS);
        from = to;
    }
    const bool dense = bound == far && t == far;

    // the SIMD group in whose stretch the likelihood falls finds the token
    const float own = simd_sum(mass_below(distances, from, n, far, LANE, SIMD, SIMDS));
    if (LANE == 0) sums[SIMD] = own;
    BARRIER();
    float total = 0.0f, before = 0.0f;
    for (uint s = 0; s < SIMDS; ++s) {
        if (s == SIMD) before = total;
        total += sums[s];
    }
    const float target = params.likelihood * total;
    if (target < before || target >= before + own) return;
    const uint part = stretch(n, SIMDS), last = min((SIMD + 1) * part, n);
    const uint found = find(distances, from, SIMD * part, last, before, target, LANE);
    if (LANE == 0) token[0] = found == NONE ? likeliest : dense ? found : ids[from + found];
}
