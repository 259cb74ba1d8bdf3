// Root-mean-square norm, alone and with the residual sum before it; its gradients.
//
// A row of at most 16 elements to a thread stays in registers: where it is `wide`, a threadgroup has it, else a SIMD group. `aligned`:
// eight elements can be moved at once, in every row. A pitch is the distance between rows.
//
// A norm is PLAIN where its weight is taken as it is, behind a rounding of what is normalised. The kernels of others are `_general`: their
// weight is f32, `offset` is added to it, and the rounding comes first where `rounds_first` says so, else with the product alone.

struct RmsNormParams {
    uint rows;
    uint width;
    uint wide;
    uint aligned;
    uint x_pitch;
    uint residual_pitch;
    uint y_pitch;
    uint rounds_first;
    float offset;
    float eps;
};

// What a thread holds: twice eight elements.
struct RmsNormRow { Octet part[2]; };

template <typename E>
FUNCTION float4 rms_norm_four(DEVICE_PTR(const E) x, ulong row, uint c, uint width) {
    return make_float4(c < width ? float(x[row + c]) : 0.0f, c + 1 < width ? float(x[row + c + 1]) : 0.0f,
                       c + 2 < width ? float(x[row + c + 2]) : 0.0f, c + 3 < width ? float(x[row + c + 3]) : 0.0f);
}

// Which row and elements of it are a thread's: from `c` on, every `step`; and which thread it is.
struct RmsNormThread { uint row; uint c; uint step; uint lane; uint simd; uint simds; };

FUNCTION RmsNormThread rms_norm_thread(uint wide, uint group, uint place, uint threads) {
    const uint simd = place / 32, simds = threads / 32;
    const RmsNormThread t = {wide ? group : group * simds + simd, 8 * (wide ? place : place % 32),
                             8 * (wide ? threads : 32),           place % 32, simd, simds};
    return t;
}

// A thread's elements of a row of `width` that begins at `row`; zeros behind its end.
template <bool ALIGNED, typename E>
FUNCTION RmsNormRow rms_norm_load(DEVICE_PTR(const E) x, ulong row, uint width, RmsNormThread t) {
    RmsNormRow v;
    for (uint k = 0; k < 2; ++k) {
        const uint c = t.c + k * t.step;
        v.part[k].low = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        v.part[k].high = v.part[k].low;
        if (ALIGNED) {
            if (c < width) v.part[k] = load8(x, row + c);
        } else {
            v.part[k].low = rms_norm_four<E>(x, row, c, width);
            v.part[k].high = rms_norm_four<E>(x, row, c + 4, width);
        }
    }
    return v;
}

FUNCTION void rms_norm_store_four(DEVICE_PTR(T) y, ulong row, uint c, uint width, float4 v) {
    if (c < width) y[row + c] = T(v.x);
    if (c + 1 < width) y[row + c + 1] = T(v.y);
    if (c + 2 < width) y[row + c + 2] = T(v.z);
    if (c + 3 < width) y[row + c + 3] = T(v.w);
}

template <bool ALIGNED>
FUNCTION void rms_norm_store(DEVICE_PTR(T) y, ulong row, uint width, RmsNormThread t, RmsNormRow v) {
    for (uint k = 0; k < 2; ++k) {
        const uint c = t.c + k * t.step;
        if (ALIGNED) {
            if (c < width) store8(y, row + c, v.part[k]);
        } else {
            rms_norm_store_four(y, row, c, width, v.part[k].low);
            rms_norm_store_four(y, row, c + 4, width, v.part[k].high);
        }
    }
}

// The sum of `x` over the threads of a row.
FUNCTION float rms_norm_total(float x, uint wide, THREADGROUP_PTR(float) sums, RmsNormThread t) {
    const float mine = simd_sum(x);
    if (!wide) return mine;
    if (t.lane == 0) sums[t.simd] = mine;
    BARRIER();
    float total = 0.0f;
    for (uint k = 0; k < t.simds; ++k) total += sums[k];
    return total;
}

FUNCTION float rms_norm_rounded(float x) { return float(T(x)); }

FUNCTION float4 rms_norm_rounded_sum(float4 a, float4 b) {
    return make_float4(rms_norm_rounded(a.x + b.x), rms_norm_rounded(a.y + b.y), rms_norm_rounded(a.z + b.z),
                       rms_norm_rounded(a.w + b.w));
}

template <bool ROUNDS>
FUNCTION float rms_norm_normalised(float x) { return ROUNDS ? rms_norm_rounded(x) : x; }

template <bool ROUNDS>
FUNCTION float4 rms_norm_of(float4 x, float scale, float4 weight) {
    return make_float4(
        rms_norm_normalised<ROUNDS>(x.x * scale) * weight.x, rms_norm_normalised<ROUNDS>(x.y * scale) * weight.y,
        rms_norm_normalised<ROUNDS>(x.z * scale) * weight.z, rms_norm_normalised<ROUNDS>(x.w * scale) * weight.w);
}

// The norm of a thread's elements, in their place.
template <bool ROUNDS>
FUNCTION RmsNormRow rms_norm_of_row(RmsNormRow v, float scale, RmsNormRow weight) {
    for (uint k = 0; k < 2; ++k) {
        v.part[k].low = rms_norm_of<ROUNDS>(v.part[k].low, scale, weight.part[k].low);
        v.part[k].high = rms_norm_of<ROUNDS>(v.part[k].high, scale, weight.part[k].high);
    }
    return v;
}

FUNCTION float4 rms_norm_sum(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

FUNCTION float4 rms_norm_product(float4 a, float4 b) { return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w); }

FUNCTION float rms_norm_dot(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }

FUNCTION float rms_norm_dot_row(RmsNormRow a, RmsNormRow b) {
    float dot = 0.0f;
    for (uint k = 0; k < 2; ++k) dot += rms_norm_dot(a.part[k].low, b.part[k].low) + rms_norm_dot(a.part[k].high, b.part[k].high);
    return dot;
}

// `g * scale - x * factor`.
FUNCTION float4 rms_norm_dx(float4 g, float scale, float4 x, float factor) {
    return make_float4(g.x * scale - x.x * factor, g.y * scale - x.y * factor, g.z * scale - x.z * factor, g.w * scale - x.w * factor);
}

// A thread's elements of the weight, and what the norm adds to them.
template <bool ALIGNED, bool PLAIN, typename W>
FUNCTION RmsNormRow rms_norm_weight(DEVICE_PTR(const W) weight, uint width, float offset, RmsNormThread t) {
    RmsNormRow w = rms_norm_load<ALIGNED, W>(weight, 0, width, t);
    if (PLAIN) return w;
    const float4 more = make_float4(offset, offset, offset, offset);
    for (uint k = 0; k < 2; ++k) {
        w.part[k].low = rms_norm_sum(w.part[k].low, more);
        w.part[k].high = rms_norm_sum(w.part[k].high, more);
    }
    return w;
}

// Writes the norm of `v`, of which the thread has its share, and the row's `rstd`.
template <bool ALIGNED, bool PLAIN>
FUNCTION void rms_norm_write(RmsNormRow v, RmsNormRow weight, DEVICE_PTR(T) y, DEVICE_PTR(float) rstd, THREADGROUP_PTR(float) sums,
                             RmsNormParams p, RmsNormThread t) {
    const float squares = rms_norm_total(rms_norm_dot_row(v, v), p.wide, sums, t);
    const float scale = rsqrt(squares / float(p.width) + p.eps);
    if (t.c == 0) rstd[t.row] = scale;
    v = PLAIN || p.rounds_first ? rms_norm_of_row<true>(v, scale, weight) : rms_norm_of_row<false>(v, scale, weight);
    rms_norm_store<ALIGNED>(y, ulong(t.row) * p.y_pitch, p.width, t, v);
}

template <bool ALIGNED, bool PLAIN, typename W>
FUNCTION void rms_norm_row(DEVICE_PTR(const T) x, DEVICE_PTR(const W) weight, DEVICE_PTR(T) y, DEVICE_PTR(float) rstd,
                           THREADGROUP_PTR(float) sums, RmsNormParams p, RmsNormThread t) {
    const RmsNormRow v = rms_norm_load<ALIGNED, T>(x, ulong(t.row) * p.x_pitch, p.width, t);
    const RmsNormRow w = rms_norm_weight<ALIGNED, PLAIN, W>(weight, p.width, p.offset, t);
    rms_norm_write<ALIGNED, PLAIN>(v, w, y, rstd, sums, p, t);
}

/// `y = round(x * rstd) * weight`, `rstd = 1 / sqrt(mean(x²) + eps)`: `x`, `y [rows, width]`, `weight [width]`, `rstd [rows]`.
KERNEL(rms_norm)(READ_ROWS(T, x, 0), READ(T, weight, 1), WRITE_ROWS(T, y, 2), WRITE(float, rstd, 3), PARAMS(RmsNormParams, 4))
{
    THREADGROUP(float, sums, 32);
    const RmsNormThread t = rms_norm_thread(params.wide, GROUP_X, THREAD, THREADS);
    if (t.row >= params.rows) return;
    if (params.aligned) rms_norm_row<true, true, T>(x, weight, y, rstd, sums, params, t);
    else rms_norm_row<false, true, T>(x, weight, y, rstd, sums, params, t);
}

/// `y = x * rstd * (offset + weight)`, the rest as in `rms_norm`; `x * rstd` is rounded first where `rounds_first`.
KERNEL(rms_norm_general)(READ_ROWS(T, x, 0), READ(float, weight, 1), WRITE_ROWS(T, y, 2), WRITE(float, rstd, 3),
                         PARAMS(RmsNormParams, 4))
{
    THREADGROUP(float, sums, 32);
    const RmsNormThread t = rms_norm_thread(params.wide, GROUP_X, THREAD, THREADS);
    if (t.row >= params.rows) return;
    if (params.aligned) rms_norm_row<true, false, float>(x, weight, y, rstd, sums, params, t);
    else rms_norm_row<false, false, float>(x, weight, y, rstd, sums, params, t);
}

template <bool ALIGNED, bool PLAIN, typename W>
FUNCTION void add_rms_norm_row(DEVICE_PTR(const T) x, DEVICE_PTR(const T) residual, DEVICE_PTR(const W) weight, DEVICE_PTR(T) sum,
                               DEVICE_PTR(T) y, DEVICE_PTR(float) rstd, THREADGROUP_PTR(float) sums, RmsNormParams p, RmsNormThread t) {
    RmsNormRow v = rms_norm_load<ALIGNED, T>(x, ulong(t.row) * p.x_pitch, p.width, t);
    const RmsNormRow r = rms_norm_load<ALIGNED, T>(residual, ulong(t.row) * p.residual_pitch, p.width, t);
    const RmsNormRow w = rms_norm_weight<ALIGNED, PLAIN, W>(weight, p.width, p.offset, t);
    for (uint k = 0; k < 2; ++k) {
        v.part[k].low = rms_norm_rounded_sum(v.part[k].low, r.part[k].low);
        v.part[k].high = rms_norm_rounded_sum(v.part[k].high, r.part[k].high);
    }
    rms_norm_store<ALIGNED>(sum, ulong(t.row) * p.width, p.width, t, v);
    rms_norm_write<ALIGNED, PLAIN>(v, w, y, rstd, sums, p, t);
}

/// `sum = x + residual`, and its norm as in `rms_norm`.
KERNEL(add_rms_norm)(READ_ROWS(T, x, 0), READ_ROWS(T, residual, 1), READ(T, weight, 2), WRITE(T, sum, 3), WRITE_ROWS(T, y, 4),
                     WRITE(float, rstd, 5), PARAMS(RmsNormParams, 6))
{
    THREADGROUP(float, sums, 32);
    const RmsNormThread t = rms_norm_thread(params.wide, GROUP_X, THREAD, THREADS);
    if (t.row >= params.rows) return;
    if (params.aligned) add_rms_norm_row<true, true, T>(x, residual, weight, sum, y, rstd, sums, params, t);
    else add_rms_norm_row<false, true, T>(x, residual, weight, sum, y, rstd, sums, params, t);
}

/// `sum = x + residual`, and its norm as in `rms_norm_general`.
KERNEL(add_rms_norm_general)(READ_ROWS(T, x, 0), READ_ROWS(T, residual, 1), READ(float, weight, 2), WRITE(T, sum, 3),
                             WRITE_ROWS(T, y, 4), WRITE(float, rstd, 5), PARAMS(RmsNormParams, 6))
{
    THREADGROUP(float, sums, 32);
    const RmsNormThread t = rms_norm_thread(params.wide, GROUP_X, THREAD, THREADS);
    if (t.row >= params.rows) return;
    if (params.aligned) add_rms_norm_row<true, false, float>(x, residual, weight, sum, y, rstd, sums, params, t);
    else add_rms_norm_row<false, false, float>(x, residual, weight, sum, y, rstd, sums, params, t);
}

struct RmsNormBackwardParams {
    uint rows;
    uint width;
    uint wide;
    uint aligned;
    uint has_dsum;
    uint dy_pitch;
    uint x_pitch;
    uint dsum_pitch;
    uint dx_pitch;
    float offset;
};

template <bool ALIGNED, bool PLAIN, typename W>
FUNCTION void rms_norm_row_backward(DEVICE_PTR(const T) dy, DEVICE_PTR(const T) x, DEVICE_PTR(const W) weight, DEVICE_PTR(const float) rstd,
                                    DEVICE_PTR(const T) dsum, DEVICE_PTR(T) dx, THREADGROUP_PTR(float) sums, RmsNormBackwardParams p,
                                    RmsNormThread t) {
    RmsNormRow g = rms_norm_load<ALIGNED, T>(dy, ulong(t.row) * p.dy_pitch, p.width, t);
    const RmsNormRow v = rms_norm_load<ALIGNED, T>(x, ulong(t.row) * p.x_pitch, p.width, t);
    // of a row without elements nothing is read
    const RmsNormRow d = rms_norm_load<ALIGNED, T>(dsum, ulong(t.row) * p.dsum_pitch, p.has_dsum ? p.width : 0, t);
    const RmsNormRow w = rms_norm_weight<ALIGNED, PLAIN, W>(weight, p.width, p.offset, t);
    const float scale = rstd[t.row];
    for (uint k = 0; k < 2; ++k) {
        g.part[k].low = rms_norm_product(g.part[k].low, w.part[k].low);
        g.part[k].high = rms_norm_product(g.part[k].high, w.part[k].high);
    }
    const float factor = rms_norm_total(rms_norm_dot_row(g, v), p.wide, sums, t) / float(p.width) * scale * scale * scale;
    for (uint k = 0; k < 2; ++k) {
        g.part[k].low = rms_norm_sum(rms_norm_dx(g.part[k].low, scale, v.part[k].low, factor), d.part[k].low);
        g.part[k].high = rms_norm_sum(rms_norm_dx(g.part[k].high, scale, v.part[k].high, factor), d.part[k].high);
    }
    rms_norm_store<ALIGNED>(dx, ulong(t.row) * p.dx_pitch, p.width, t, g);
}

/// `dx = rstd * (g - n * mean(g * n)) + dsum` with `g = dy * weight` and `n = x * rstd`; without `has_dsum` nothing is read of `dsum`.
KERNEL(rms_norm_backward)(READ_ROWS(T, dy, 0), READ_ROWS(T, x, 1), READ(T, weight, 2), READ(float, rstd, 3), READ_ROWS(T, dsum, 4),
                          WRITE_ROWS(T, dx, 5), PARAMS(RmsNormBackwardParams, 6))
{
    THREADGROUP(float, sums, 32);
    const RmsNormThread t = rms_norm_thread(params.wide, GROUP_X, THREAD, THREADS);
    if (t.row >= params.rows) return;
    if (params.aligned) rms_norm_row_backward<true, true, T>(dy, x, weight, rstd, dsum, dx, sums, params, t);
    else rms_norm_row_backward<false, true, T>(dy, x, weight, rstd, dsum, dx, sums, params, t);
}

/// As `rms_norm_backward`, with `g = dy * (offset + weight)`.
KERNEL(rms_norm_backward_general)(READ_ROWS(T, dy, 0), READ_ROWS(T, x, 1), READ(float, weight, 2), READ(float, rstd, 3),
                                  READ_ROWS(T, dsum, 4), WRITE_ROWS(T, dx, 5), PARAMS(RmsNormBackwardParams, 6))
{
    THREADGROUP(float, sums, 32);
    const RmsNormThread t = rms_norm_thread(params.wide, GROUP_X, THREAD, THREADS);
    if (t.row >= params.rows) return;
    if (params.aligned) rms_norm_row_backward<true, false, float>(dy, x, weight, rstd, dsum, dx, sums, params, t);
    else rms_norm_row_backward<false, false, float>(dy, x, weight, rstd, dsum, dx, sums, params, t);
}

struct RmsNormWeightParams {
    uint rows;
    uint width;
    uint rows_per_group;
    uint aligned;
    uint rounds_first;
    uint dy_pitch;
    uint x_pitch;
};

FUNCTION float4 rms_norm_quad(DEVICE_PTR(const T) x, ulong row, uint c, uint width, uint aligned) {
    if (c < width && aligned) return load4(x, row + c);
    return rms_norm_four<T>(x, row, c, width);
}

// The sums of `dy * round(x * rstd)` over four of every `4 * simds` rows from `four` to `last`, of four columns.
template <bool ROUNDS>
FUNCTION float4 rms_norm_weight_sums(DEVICE_PTR(const T) dy, DEVICE_PTR(const T) x, DEVICE_PTR(const float) rstd, uint four, uint last,
                                     uint simds, uint c, RmsNormWeightParams p) {
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (; four < last; four += 4 * simds) {
        for (uint k = 0; k < 4; ++k) {
            // a row behind the last is the last without weight
            const uint row = min(four + k, last - 1);
            const float4 g = rms_norm_quad(dy, ulong(row) * p.dy_pitch, c, p.width, p.aligned);
            const float4 v = rms_norm_quad(x, ulong(row) * p.x_pitch, c, p.width, p.aligned);
            sum = rms_norm_sum(sum, rms_norm_of<ROUNDS>(v, four + k < last ? rstd[row] : 0.0f, g));
        }
    }
    return sum;
}

/// The sums of `dy * round(x * rstd)` over the rows of each GROUP_Y (rounded where `rounds_first`): `partial [groups, width]`. 256 threads: a SIMD group adds four
/// of every 32 rows, 128 columns.
KERNEL(rms_norm_weight_grad)(READ_ROWS(T, dy, 0), READ_ROWS(T, x, 1), READ(float, rstd, 2), WRITE(float, partial, 3),
                             PARAMS(RmsNormWeightParams, 4))
{
    THREADGROUP(float, sums, 1024);
    const uint width = params.width, first = GROUP_Y * params.rows_per_group;
    const uint last = min(first + params.rows_per_group, params.rows);
    const uint c = 128 * GROUP_X + 4 * LANE, four = first + 4 * SIMD;
    const float4 sum = params.rounds_first ? rms_norm_weight_sums<true>(dy, x, rstd, four, last, SIMDS, c, params)
                                           : rms_norm_weight_sums<false>(dy, x, rstd, four, last, SIMDS, c, params);
    sums[128 * SIMD + 4 * LANE] = sum.x;
    sums[128 * SIMD + 4 * LANE + 1] = sum.y;
    sums[128 * SIMD + 4 * LANE + 2] = sum.z;
    sums[128 * SIMD + 4 * LANE + 3] = sum.w;
    BARRIER();
    const uint column = 128 * GROUP_X + THREAD;
    if (THREAD >= 128 || column >= width) return;
    float total = 0.0f;
    for (uint k = 0; k < SIMDS; ++k) total += sums[128 * k + THREAD];
    partial[ulong(GROUP_Y) * width + column] = total;
}
