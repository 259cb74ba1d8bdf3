// Root-mean-square norm, alone and with the residual sum before it; its gradients.
//
// A row of at most 32 elements to a thread stays in registers: where it is `wide`, a threadgroup has it, else a SIMD group. `aligned`: eight
// elements can be moved at once, in every row. A pitch is the distance between rows.

struct RmsNormParams {
    uint rows;
    uint width;
    uint wide;
    uint aligned;
    uint x_pitch;
    uint residual_pitch;
    uint y_pitch;
    float eps;
};

// What a thread holds: four times eight elements.
struct RmsNormRow { Octet part[4]; };

FUNCTION float4 rms_norm_four(DEVICE_PTR(const T) x, ulong row, uint c, uint width) {
    return make_float4(c < width ? float(x[row + c]) : 0.0f, c + 1 < width ? float(x[row + c + 1]) : 0.0f,
                       c + 2 < width ? float(x[row + c + 2]) : 0.0f, c + 3 < width ? float(x[row + c + 3]) : 0.0f);
}

// Elements of one row from `c` on, every `step`; zeros behind its end.
FUNCTION RmsNormRow rms_norm_load(DEVICE_PTR(const T) x, ulong row, uint c, uint step, uint width, uint aligned) {
    const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    RmsNormRow v;
    for (uint k = 0; k < 4; ++k, c += step) {
        v.part[k].low = zero;
        v.part[k].high = zero;
        if (c < width && aligned) v.part[k] = load8(x, row + c);
        if (c < width && !aligned) {
            v.part[k].low = rms_norm_four(x, row, c, width);
            v.part[k].high = rms_norm_four(x, row, c + 4, width);
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

FUNCTION void rms_norm_store(DEVICE_PTR(T) y, ulong row, uint c, uint width, uint aligned, Octet v) {
    if (c >= width) return;
    if (aligned) return store8(y, row + c, v);
    rms_norm_store_four(y, row, c, width, v.low);
    rms_norm_store_four(y, row, c + 4, width, v.high);
}

// The sum of `x` over the threads of a row.
FUNCTION float rms_norm_total(float x, uint wide, THREADGROUP_PTR(float) sums, uint lane, uint simd, uint simds) {
    const float mine = simd_sum(x);
    if (!wide) return mine;
    if (lane == 0) sums[simd] = mine;
    BARRIER();
    float total = 0.0f;
    for (uint k = 0; k < simds; ++k) total += sums[k];
    return total;
}

FUNCTION float rms_norm_rounded(float x) { return float(T(x)); }

FUNCTION float4 rms_norm_rounded_sum(float4 a, float4 b) {
    return make_float4(rms_norm_rounded(a.x + b.x), rms_norm_rounded(a.y + b.y), rms_norm_rounded(a.z + b.z),
                       rms_norm_rounded(a.w + b.w));
}

FUNCTION float4 rms_norm_of(float4 x, float scale, float4 weight) {
    return make_float4(rms_norm_rounded(x.x * scale) * weight.x, rms_norm_rounded(x.y * scale) * weight.y,
                       rms_norm_rounded(x.z * scale) * weight.z, rms_norm_rounded(x.w * scale) * weight.w);
}

FUNCTION float4 rms_norm_sum(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

FUNCTION float4 rms_norm_product(float4 a, float4 b) { return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w); }

FUNCTION float rms_norm_dot(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }

FUNCTION float rms_norm_dot_row(RmsNormRow a, RmsNormRow b) {
    float dot = 0.0f;
    for (uint k = 0; k < 4; ++k) dot += rms_norm_dot(a.part[k].low, b.part[k].low) + rms_norm_dot(a.part[k].high, b.part[k].high);
    return dot;
}

// `g * scale - x * factor`.
FUNCTION float4 rms_norm_dx(float4 g, float scale, float4 x, float factor) {
    return make_float4(g.x * scale - x.x * factor, g.y * scale - x.y * factor, g.z * scale - x.z * factor, g.w * scale - x.w * factor);
}

FUNCTION void rms_norm_store_row(DEVICE_PTR(T) y, ulong row, uint c, uint step, uint width, uint aligned, RmsNormRow x, float scale,
                                 RmsNormRow weight) {
    for (uint k = 0; k < 4; ++k, c += step) {
        Octet v;
        v.low = rms_norm_of(x.part[k].low, scale, weight.part[k].low);
        v.high = rms_norm_of(x.part[k].high, scale, weight.part[k].high);
        rms_norm_store(y, row, c, width, aligned, v);
    }
}

/// `y = round(x * rstd) * weight`, `rstd = 1 / sqrt(mean(x²) + eps)`: `x`, `y [rows, width]`, `weight [width]`, `rstd [rows]`.
KERNEL(rms_norm)(READ_ROWS(T, x, 0), READ(T, weight, 1), WRITE_ROWS(T, y, 2), WRITE(float, rstd, 3), PARAMS(RmsNormParams, 4))
{
    THREADGROUP(float, sums, 32);
    const uint width = params.width, wide = params.wide, aligned = params.aligned;
    const uint row = wide ? GROUP_X : GROUP_X * SIMDS + SIMD, c = 8 * (wide ? THREAD : LANE), step = 8 * (wide ? THREADS : 32);
    if (row >= params.rows) return;
    const RmsNormRow v = rms_norm_load(x, ulong(row) * params.x_pitch, c, step, width, aligned);
    const RmsNormRow w = rms_norm_load(weight, 0, c, step, width, aligned);
    const float squares = rms_norm_total(rms_norm_dot_row(v, v), wide, sums, LANE, SIMD, SIMDS);
    const float scale = rsqrt(squares / float(width) + params.eps);
    if (c == 0) rstd[row] = scale;
    rms_norm_store_row(y, ulong(row) * params.y_pitch, c, step, width, aligned, v, scale, w);
}

/// `sum = x + residual`, and its norm as in `rms_norm`.
KERNEL(add_rms_norm)(READ_ROWS(T, x, 0), READ_ROWS(T, residual, 1), READ(T, weight, 2), WRITE(T, sum, 3), WRITE_ROWS(T, y, 4),
                     WRITE(float, rstd, 5), PARAMS(RmsNormParams, 6))
{
    THREADGROUP(float, sums, 32);
    const uint width = params.width, wide = params.wide, aligned = params.aligned;
    const uint row = wide ? GROUP_X : GROUP_X * SIMDS + SIMD, c = 8 * (wide ? THREAD : LANE), step = 8 * (wide ? THREADS : 32);
    if (row >= params.rows) return;
    RmsNormRow v = rms_norm_load(x, ulong(row) * params.x_pitch, c, step, width, aligned);
    const RmsNormRow r = rms_norm_load(residual, ulong(row) * params.residual_pitch, c, step, width, aligned);
    const RmsNormRow w = rms_norm_load(weight, 0, c, step, width, aligned);
    for (uint k = 0; k < 4; ++k) {
        v.part[k].low = rms_norm_rounded_sum(v.part[k].low, r.part[k].low);
        v.part[k].high = rms_norm_rounded_sum(v.part[k].high, r.part[k].high);
        rms_norm_store(sum, ulong(row) * width, c + k * step, width, aligned, v.part[k]);
    }
    const float squares = rms_norm_total(rms_norm_dot_row(v, v), wide, sums, LANE, SIMD, SIMDS);
    const float scale = rsqrt(squares / float(width) + params.eps);
    if (c == 0) rstd[row] = scale;
    rms_norm_store_row(y, ulong(row) * params.y_pitch, c, step, width, aligned, v, scale, w);
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
};

/// `dx = rstd * (g - n * mean(g * n)) + dsum` with `g = dy * weight` and `n = x * rstd`; without `has_dsum` nothing is read of `dsum`.
KERNEL(rms_norm_backward)(READ_ROWS(T, dy, 0), READ_ROWS(T, x, 1), READ(T, weight, 2), READ(float, rstd, 3), READ_ROWS(T, dsum, 4),
                          WRITE_ROWS(T, dx, 5), PARAMS(RmsNormBackwardParams, 6))
{
    THREADGROUP(float, sums, 32);
    const uint width = params.width, wide = params.wide, aligned = params.aligned;
    const uint row = wide ? GROUP_X : GROUP_X * SIMDS + SIMD, c = 8 * (wide ? THREAD : LANE), step = 8 * (wide ? THREADS : 32);
    if (row >= params.rows) return;
    RmsNormRow g = rms_norm_load(dy, ulong(row) * params.dy_pitch, c, step, width, aligned);
    const RmsNormRow v = rms_norm_load(x, ulong(row) * params.x_pitch, c, step, width, aligned);
    // behind the end of every row: nothing is read
    const RmsNormRow d = rms_norm_load(dsum, ulong(row) * params.dsum_pitch, params.has_dsum ? c : width, step, width, aligned);
    const RmsNormRow w = rms_norm_load(weight, 0, c, step, width, aligned);
    const float scale = rstd[row];
    for (uint k = 0; k < 4; ++k) {
        g.part[k].low = rms_norm_product(g.part[k].low, w.part[k].low);
        g.part[k].high = rms_norm_product(g.part[k].high, w.part[k].high);
    }
    const float dot = rms_norm_total(rms_norm_dot_row(g, v), wide, sums, LANE, SIMD, SIMDS);
    const float factor = dot / float(width) * scale * scale * scale;
    for (uint k = 0; k < 4; ++k) {
        Octet o;
        o.low = rms_norm_sum(rms_norm_dx(g.part[k].low, scale, v.part[k].low, factor), d.part[k].low);
        o.high = rms_norm_sum(rms_norm_dx(g.part[k].high, scale, v.part[k].high, factor), d.part[k].high);
        rms_norm_store(dx, ulong(row) * params.dx_pitch, c + k * step, width, aligned, o);
    }
}

struct RmsNormWeightParams { uint rows; uint width; uint rows_per_group; uint aligned; uint dy_pitch; uint x_pitch; };

FUNCTION float4 rms_norm_quad(DEVICE_PTR(const T) x, ulong row, uint c, uint width, uint aligned) {
    if (c < width && aligned) return load4(x, row + c);
    return rms_norm_four(x, row, c, width);
}

/// The sums of `dy * round(x * rstd)` over the rows of each GROUP_Y: `partial [groups, width]`. 256 threads: a SIMD group adds four
/// of every 32 rows, 128 columns.
KERNEL(rms_norm_weight_grad)(READ_ROWS(T, dy, 0), READ_ROWS(T, x, 1), READ(float, rstd, 2), WRITE(float, partial, 3),
                             PARAMS(RmsNormWeightParams, 4))
{
    THREADGROUP(float, sums, 1024);
    const uint width = params.width, first = GROUP_Y * params.rows_per_group;
    const uint last = min(first + params.rows_per_group, params.rows);
    const uint c = 128 * GROUP_X + 4 * LANE;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (uint four = first + 4 * SIMD; four < last; four += 4 * SIMDS) {
        for (uint k = 0; k < 4; ++k) {
            // a row behind the last is the last without weight
            const uint row = min(four + k, last - 1);
            const float4 g = rms_norm_quad(dy, ulong(row) * params.dy_pitch, c, width, params.aligned);
            const float4 v = rms_norm_quad(x, ulong(row) * params.x_pitch, c, width, params.aligned);
            sum = rms_norm_sum(sum, rms_norm_of(v, four + k < last ? rstd[row] : 0.0f, g));
        }
    }
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
