// Root-mean-square norm, alone and with the residual sum before it; its gradients.
//
// A threadgroup has a row of at most 16 elements to a thread, which stay in registers; the `narrow` kernels have four rows of at most 128
// elements to a SIMD group. `aligned`: four elements can be moved at once, in every row.

struct RmsNormParams { uint rows; uint width; uint aligned; float eps; };

// What a thread holds: four times four elements.
struct RmsNormQuads { float4 q[4]; };

FUNCTION float4 rms_norm_four(DEVICE_PTR(const T) x, ulong row, uint c, uint width) {
    return make_float4(c < width ? float(x[row + c]) : 0.0f, c + 1 < width ? float(x[row + c + 1]) : 0.0f,
                       c + 2 < width ? float(x[row + c + 2]) : 0.0f, c + 3 < width ? float(x[row + c + 3]) : 0.0f);
}

// Elements of one row from `c` on, every `step`; zeros behind its end.
FUNCTION RmsNormQuads rms_norm_load(DEVICE_PTR(const T) x, ulong row, uint c, uint step, uint width, uint aligned) {
    const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    RmsNormQuads v;
    if (aligned) {
        for (uint k = 0; k < 4; ++k) v.q[k] = c + k * step < width ? load4(x, row + c + k * step) : zero;
    } else {
        for (uint k = 0; k < 4; ++k) v.q[k] = rms_norm_four(x, row, c + k * step, width);
    }
    return v;
}

// Elements of four rows from `first_row` on at `c`; zeros behind the last row and behind a row's end.
FUNCTION RmsNormQuads rms_norm_load_rows(DEVICE_PTR(const T) x, uint first_row, uint c, uint rows, uint width, uint aligned) {
    const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const ulong start = ulong(first_row) * width;
    RmsNormQuads v;
    if (aligned) {
        for (uint k = 0; k < 4; ++k) v.q[k] = first_row + k < rows && c < width ? load4(x, start + k * width + c) : zero;
    } else {
        for (uint k = 0; k < 4; ++k) v.q[k] = first_row + k < rows ? rms_norm_four(x, start + k * width, c, width) : zero;
    }
    return v;
}

FUNCTION void rms_norm_store(DEVICE_PTR(T) y, ulong row, uint c, uint width, uint aligned, float4 v) {
    if (c >= width) return;
    if (aligned) return store4(y, row + c, v);
    y[row + c] = T(v.x);
    if (c + 1 < width) y[row + c + 1] = T(v.y);
    if (c + 2 < width) y[row + c + 2] = T(v.z);
    if (c + 3 < width) y[row + c + 3] = T(v.w);
}

// The sum of `x` over the threadgroup.
FUNCTION float rms_norm_total(float x, THREADGROUP_PTR(float) sums, uint lane, uint simd, uint simds) {
    const float mine = simd_sum(x);
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

FUNCTION float4 rms_norm_product(float4 a, float4 b) { return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w); }

FUNCTION float rms_norm_dot(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }

// `g * scale - x * factor`.
FUNCTION float4 rms_norm_dx(float4 g, float scale, float4 x, float factor) {
    return make_float4(g.x * scale - x.x * factor, g.y * scale - x.y * factor, g.z * scale - x.z * factor, g.w * scale - x.w * factor);
}

/// `y = round(x * rstd) * weight`, `rstd = 1 / sqrt(mean(x²) + eps)`: `x`, `y [rows, width]`, `weight [width]`, `rstd [rows]`.
KERNEL(rms_norm)(READ(T, x, 0), READ(T, weight, 1), WRITE(T, y, 2), WRITE(float, rstd, 3), PARAMS(RmsNormParams, 4))
{
    THREADGROUP(float, sums, 32);
    const uint width = params.width, c = 4 * THREAD, step = 4 * THREADS;
    const ulong row = ulong(GROUP_X) * width;
    const RmsNormQuads v = rms_norm_load(x, row, c, step, width, params.aligned);
    float squares = 0.0f;
    for (uint k = 0; k < 4; ++k) squares += rms_norm_dot(v.q[k], v.q[k]);
    const float scale = rsqrt(rms_norm_total(squares, sums, LANE, SIMD, SIMDS) / float(width) + params.eps);
    if (THREAD == 0) rstd[GROUP_X] = scale;
    const RmsNormQuads w = rms_norm_load(weight, 0, c, step, width, params.aligned);
    for (uint k = 0; k < 4; ++k)
        rms_norm_store(y, row, c + k * step, width, params.aligned, rms_norm_of(v.q[k], scale, w.q[k]));
}

/// `rms_norm` of rows of at most 128: a SIMD group has four.
KERNEL(rms_norm_narrow)(READ(T, x, 0), READ(T, weight, 1), WRITE(T, y, 2), WRITE(float, rstd, 3), PARAMS(RmsNormParams, 4))
{
    const uint width = params.width, c = 4 * LANE, first = 4 * (GROUP_X * SIMDS + SIMD);
    if (first >= params.rows) return;
    const RmsNormQuads v = rms_norm_load_rows(x, first, c, params.rows, width, params.aligned);
    const float4 w = rms_norm_load_rows(weight, 0, c, 1, width, params.aligned).q[0];
    for (uint k = 0; k < 4; ++k) {
        const float scale = rsqrt(simd_sum(rms_norm_dot(v.q[k], v.q[k])) / float(width) + params.eps);
        if (first + k >= params.rows) return;
        if (LANE == 0) rstd[first + k] = scale;
        rms_norm_store(y, ulong(first + k) * width, c, width, params.aligned, rms_norm_of(v.q[k], scale, w));
    }
}

/// `sum = x + residual`, and its norm as in `rms_norm`.
KERNEL(add_rms_norm)(READ(T, x, 0), READ(T, residual, 1), READ(T, weight, 2), WRITE(T, sum, 3), WRITE(T, y, 4),
                     WRITE(float, rstd, 5), PARAMS(RmsNormParams, 6))
{
    THREADGROUP(float, sums, 32);
    const uint width = params.width, c = 4 * THREAD, step = 4 * THREADS;
    const ulong row = ulong(GROUP_X) * width;
    RmsNormQuads v = rms_norm_load(x, row, c, step, width, params.aligned);
    const RmsNormQuads r = rms_norm_load(residual, row, c, step, width, params.aligned);
    float squares = 0.0f;
    for (uint k = 0; k < 4; ++k) {
        v.q[k] = rms_norm_rounded_sum(v.q[k], r.q[k]);
        rms_norm_store(sum, row, c + k * step, width, params.aligned, v.q[k]);
        squares += rms_norm_dot(v.q[k], v.q[k]);
    }
    const float scale = rsqrt(rms_norm_total(squares, sums, LANE, SIMD, SIMDS) / float(width) + params.eps);
    if (THREAD == 0) rstd[GROUP_X] = scale;
    const RmsNormQuads w = rms_norm_load(weight, 0, c, step, width, params.aligned);
    for (uint k = 0; k < 4; ++k)
        rms_norm_store(y, row, c + k * step, width, params.aligned, rms_norm_of(v.q[k], scale, w.q[k]));
}

struct RmsNormBackwardParams { uint rows; uint width; uint aligned; uint has_dsum; };

/// `dx = rstd * (g - n * mean(g * n)) + dsum` with `g = dy * weight` and `n = x * rstd`; without `has_dsum` nothing is read of `dsum`.
KERNEL(rms_norm_backward)(READ(T, dy, 0), READ(T, x, 1), READ(T, weight, 2), READ(float, rstd, 3), READ(T, dsum, 4),
                          WRITE(T, dx, 5), PARAMS(RmsNormBackwardParams, 6))
{
    THREADGROUP(float, sums, 32);
    const uint width = params.width, c = 4 * THREAD, step = 4 * THREADS;
    const ulong row = ulong(GROUP_X) * width;
    const RmsNormQuads v = rms_norm_load(x, row, c, step, width, params.aligned);
    RmsNormQuads g = rms_norm_load(dy, row, c, step, width, params.aligned);
    const RmsNormQuads w = rms_norm_load(weight, 0, c, step, width, params.aligned);
    float dot = 0.0f;
    for (uint k = 0; k < 4; ++k) {
        g.q[k] = rms_norm_product(g.q[k], w.q[k]);
        dot += rms_norm_dot(g.q[k], v.q[k]);
    }
    const float scale = rstd[GROUP_X];
    const float factor = rms_norm_total(dot, sums, LANE, SIMD, SIMDS) / float(width) * scale * scale * scale;
    for (uint k = 0; k < 4; ++k) g.q[k] = rms_norm_dx(g.q[k], scale, v.q[k], factor);
    if (params.has_dsum) {
        const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        const RmsNormQuads d = rms_norm_load(dsum, row, c, step, width, params.aligned);
        for (uint k = 0; k < 4; ++k) g.q[k] = rms_norm_rounded_sum(rms_norm_rounded_sum(g.q[k], zero), d.q[k]);
    }
    for (uint k = 0; k < 4; ++k) rms_norm_store(dx, row, c + k * step, width, params.aligned, g.q[k]);
}

/// `rms_norm_backward` of rows of at most 128, without `dsum`: a SIMD group has four.
KERNEL(rms_norm_backward_narrow)(READ(T, dy, 0), READ(T, x, 1), READ(T, weight, 2), READ(float, rstd, 3), WRITE(T, dx, 4),
                                 PARAMS(RmsNormBackwardParams, 5))
{
    const uint width = params.width, c = 4 * LANE, first = 4 * (GROUP_X * SIMDS + SIMD);
    if (first >= params.rows) return;
    const RmsNormQuads v = rms_norm_load_rows(x, first, c, params.rows, width, params.aligned);
    const RmsNormQuads d = rms_norm_load_rows(dy, first, c, params.rows, width, params.aligned);
    const float4 w = rms_norm_load_rows(weight, 0, c, 1, width, params.aligned).q[0];
    for (uint k = 0; k < 4; ++k) {
        const float4 g = rms_norm_product(d.q[k], w);
        const float dot = simd_sum(rms_norm_dot(g, v.q[k]));
        if (first + k >= params.rows) return;
        const float scale = rstd[first + k];
        const float4 dv = rms_norm_dx(g, scale, v.q[k], dot / float(width) * scale * scale * scale);
        rms_norm_store(dx, ulong(first + k) * width, c, width, params.aligned, dv);
    }
}

struct RmsNormWeightParams { uint rows; uint width; uint rows_per_group; uint aligned; };

/// The sums of `dy * round(x * rstd)` over the rows of each GROUP_Y: `partial [groups, width]`. 256 threads: a SIMD group adds four
/// of every 32 rows, 128 columns.
KERNEL(rms_norm_weight_grad)(READ(T, dy, 0), READ(T, x, 1), READ(float, rstd, 2), WRITE(float, partial, 3),
                             PARAMS(RmsNormWeightParams, 4))
{
    THREADGROUP(float, sums, 1024);
    const uint width = params.width, first = GROUP_Y * params.rows_per_group;
    const uint last = min(first + params.rows_per_group, params.rows);
    const uint c = 128 * GROUP_X + 4 * LANE;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (uint row = first + 4 * SIMD; row < last; row += 4 * SIMDS) {
        const RmsNormQuads g = rms_norm_load_rows(dy, row, c, last, width, params.aligned);
        const RmsNormQuads v = rms_norm_load_rows(x, row, c, last, width, params.aligned);
        for (uint k = 0; k < 4; ++k) {
            const float4 n = rms_norm_of(v.q[k], row + k < last ? rstd[row + k] : 0.0f, g.q[k]);
            sum = make_float4(sum.x + n.x, sum.y + n.y, sum.z + n.z, sum.w + n.w);
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
