// Root-mean-square norm, alone and with the residual sum before it; its gradients.
//
// A row belongs to `simds_per_row` SIMD groups: to one where it is narrow, else to all of its threadgroup. `aligned`: four elements can be
// moved at once, in every row.

struct RmsNormParams { uint rows; uint width; uint simds_per_row; uint aligned; float eps; };

FUNCTION float4 rms_norm_load(DEVICE_PTR(const T) x, ulong row, uint c, uint width, uint aligned) {
    if (aligned) return load4(x, row + c);
    return make_float4(float(x[row + c]), c + 1 < width ? float(x[row + c + 1]) : 0.0f,
                       c + 2 < width ? float(x[row + c + 2]) : 0.0f, c + 3 < width ? float(x[row + c + 3]) : 0.0f);
}

FUNCTION void rms_norm_store(DEVICE_PTR(T) y, ulong row, uint c, uint width, uint aligned, float4 v) {
    if (aligned) return store4(y, row + c, v);
    y[row + c] = T(v.x);
    if (c + 1 < width) y[row + c + 1] = T(v.y);
    if (c + 2 < width) y[row + c + 2] = T(v.z);
    if (c + 3 < width) y[row + c + 3] = T(v.w);
}

// The sum of `x` over the threads of a row.
FUNCTION float rms_norm_total(float x, THREADGROUP_PTR(float) sums, uint lane, uint simd, uint simds_per_row) {
    const float mine = simd_sum(x);
    if (simds_per_row == 1) return mine;
    if (lane == 0) sums[simd] = mine;
    BARRIER();
    float total = 0.0f;
    for (uint k = 0; k < simds_per_row; ++k) total += sums[k];
    return total;
}

FUNCTION float rms_norm_rounded(float x) { return float(T(x)); }

FUNCTION float4 rms_norm_rounded_sum(float4 a, float4 b) {
    return make_float4(rms_norm_rounded(a.x + b.x), rms_norm_rounded(a.y + b.y), rms_norm_rounded(a.z + b.z), rms_norm_rounded(a.w + b.w));
}

FUNCTION float4 rms_norm_of(float4 x, float scale, float4 weight) {
    return make_float4(rms_norm_rounded(x.x * scale) * weight.x, rms_norm_rounded(x.y * scale) * weight.y,
                       rms_norm_rounded(x.z * scale) * weight.z, rms_norm_rounded(x.w * scale) * weight.w);
}

FUNCTION float rms_norm_squares(float4 x) { return x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w; }

/// `y = round(x * rstd) * weight`, `rstd = 1 / sqrt(mean(x²) + eps)`: `x`, `y [rows, width]`, `weight [width]`, `rstd [rows]`.
KERNEL(rms_norm)(READ(T, x, 0), READ(T, weight, 1), WRITE(T, y, 2), WRITE(float, rstd, 3), PARAMS(RmsNormParams, 4))
{
    THREADGROUP(float, sums, 32);
    const uint team = params.simds_per_row, width = params.width, aligned = params.aligned;
    const uint row = GROUP_X * (SIMDS / team) + SIMD / team;
    if (row >= params.rows) return;
    const ulong start = ulong(row) * width;
    const uint first = 4 * (32 * (SIMD % team) + LANE);
    float squares = 0.0f;
    for (uint c = first; c < width; c += 128 * team) squares += rms_norm_squares(rms_norm_load(x, start, c, width, aligned));
    const float scale = 1.0f / sqrt(rms_norm_total(squares, sums, LANE, SIMD, team) / float(width) + params.eps);
    if (first == 0) rstd[row] = scale;
    for (uint c = first; c < width; c += 128 * team) {
        const float4 w = rms_norm_load(weight, 0, c, width, aligned);
        rms_norm_store(y, start, c, width, aligned, rms_norm_of(rms_norm_load(x, start, c, width, aligned), scale, w));
    }
}

/// `sum = x + residual`, and its norm as in `rms_norm`.
KERNEL(add_rms_norm)(READ(T, x, 0), READ(T, residual, 1), READ(T, weight, 2), WRITE(T, sum, 3), WRITE(T, y, 4),
                     WRITE(float, rstd, 5), PARAMS(RmsNormParams, 6))
{
    THREADGROUP(float, sums, 32);
    const uint team = params.simds_per_row, width = params.width, aligned = params.aligned;
    const uint row = GROUP_X * (SIMDS / team) + SIMD / team;
    if (row >= params.rows) return;
    const ulong start = ulong(row) * width;
    const uint first = 4 * (32 * (SIMD % team) + LANE);
    float squares = 0.0f;
    for (uint c = first; c < width; c += 128 * team) {
        const float4 v =
            rms_norm_rounded_sum(rms_norm_load(x, start, c, width, aligned), rms_norm_load(residual, start, c, width, aligned));
        rms_norm_store(sum, start, c, width, aligned, v);
        squares += rms_norm_squares(v);
    }
    const float scale = 1.0f / sqrt(rms_norm_total(squares, sums, LANE, SIMD, team) / float(width) + params.eps);
    if (first == 0) rstd[row] = scale;
    for (uint c = first; c < width; c += 128 * team) {
        const float4 v =
            rms_norm_rounded_sum(rms_norm_load(x, start, c, width, aligned), rms_norm_load(residual, start, c, width, aligned));
        rms_norm_store(y, start, c, width, aligned, rms_norm_of(v, scale, rms_norm_load(weight, 0, c, width, aligned)));
    }
}

struct RmsNormBackwardParams { uint rows; uint width; uint simds_per_row; uint aligned; uint has_dsum; };

/// `dx = rstd * (g - n * mean(g * n)) + dsum` with `g = dy * weight` and `n = x * rstd`; without `has_dsum` nothing is read of `dsum`.
KERNEL(rms_norm_backward)(READ(T, dy, 0), READ(T, x, 1), READ(T, weight, 2), READ(float, rstd, 3), READ(T, dsum, 4),
                          WRITE(T, dx, 5), PARAMS(RmsNormBackwardParams, 6))
{
    THREADGROUP(float, sums, 32);
    const uint team = params.simds_per_row, width = params.width, aligned = params.aligned;
    const uint row = GROUP_X * (SIMDS / team) + SIMD / team;
    if (row >= params.rows) return;
    const ulong start = ulong(row) * width;
    const uint first = 4 * (32 * (SIMD % team) + LANE);
    float dot = 0.0f;
    for (uint c = first; c < width; c += 128 * team) {
        const float4 g = rms_norm_load(dy, start, c, width, aligned);
        const float4 w = rms_norm_load(weight, 0, c, width, aligned);
        const float4 v = rms_norm_load(x, start, c, width, aligned);
        dot += g.x * w.x * v.x + g.y * w.y * v.y + g.z * w.z * v.z + g.w * w.w * v.w;
    }
    const float scale = rstd[row];
    const float factor = rms_norm_total(dot, sums, LANE, SIMD, team) / float(width) * scale * scale * scale;
    for (uint c = first; c < width; c += 128 * team) {
        const float4 g = rms_norm_load(dy, start, c, width, aligned);
        const float4 w = rms_norm_load(weight, 0, c, width, aligned);
        const float4 v = rms_norm_load(x, start, c, width, aligned);
        float4 d = make_float4(g.x * w.x * scale - v.x * factor, g.y * w.y * scale - v.y * factor,
                               g.z * w.z * scale - v.z * factor, g.w * w.w * scale - v.w * factor);
        if (params.has_dsum) {
            const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            d = rms_norm_rounded_sum(rms_norm_rounded_sum(d, zero), rms_norm_load(dsum, start, c, width, aligned));
        }
        rms_norm_store(dx, start, c, width, aligned, d);
    }
}

struct RmsNormWeightParams { uint rows; uint width; uint rows_per_group; uint aligned; };

/// The sums of `dy * round(x * rstd)` over the rows of each GROUP_Y: `partial [groups, width]`. 256 threads: a SIMD group adds every
/// eighth row of 128 columns.
KERNEL(rms_norm_weight_grad)(READ(T, dy, 0), READ(T, x, 1), READ(float, rstd, 2), WRITE(float, partial, 3),
                             PARAMS(RmsNormWeightParams, 4))
{
    THREADGROUP(float, sums, 1024);
    const uint width = params.width, first = GROUP_Y * params.rows_per_group;
    const uint last = min(first + params.rows_per_group, params.rows);
    const uint c = 128 * GROUP_X + 4 * LANE;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (c < width) {
        for (uint row = first + SIMD; row < last; row += SIMDS) {
            const float4 g = rms_norm_load(dy, ulong(row) * width, c, width, params.aligned);
            const float4 v = rms_norm_load(x, ulong(row) * width, c, width, params.aligned);
            const float4 n = rms_norm_of(v, rstd[row], g);
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
