// LayerNorm of groups of columns, and its gradients.
//
// A group of `width` columns is a threadgroup's where it is `wide`, else a SIMD group's; a row has `heads` groups. The weight is f32, as long as
// a group, or as `parts` of them, one to each of the row's. `aligned`: four elements can be moved at once, in every group. What was read stays
// in the caches for the next sum.

struct LayerNormParams {
    uint groups;
    uint heads;
    uint width;
    uint parts;
    uint wide;
    uint aligned;
    uint has_bias;
    uint dy_pitch;
    uint x_pitch;
    uint y_pitch;
    float eps;
};

// A thread: its group, where the group begins in its row and its weights, and its columns, four from `c` on of every `step`.
struct LayerNormThread { uint group; uint row; uint column; uint weights; uint c; uint step; uint lane; uint simd; uint simds; };

FUNCTION LayerNormThread layer_norm_thread(LayerNormParams p, uint group_in_grid, uint place, uint threads) {
    const uint simd = place / 32, simds = threads / 32, lane = place % 32;
    const uint group = p.wide ? group_in_grid : group_in_grid * simds + simd;
    const uint row = group / p.heads, head = group % p.heads;
    const LayerNormThread t = {group, row, head * p.width, (head % p.parts) * p.width, 4 * (p.wide ? place : lane),
                               4 * (p.wide ? threads : 32), lane, simd, simds};
    return t;
}

// Four elements from `c` on of `width` that begin at `from`; zeros behind their end.
template <typename E>
FUNCTION float4 layer_norm_load(DEVICE_PTR(const E) x, ulong from, uint c, LayerNormParams p) {
    if (p.aligned) return load4(x, from + c);
    return make_float4(float(x[from + c]), c + 1 < p.width ? float(x[from + c + 1]) : 0.0f, c + 2 < p.width ? float(x[from + c + 2]) : 0.0f,
                       c + 3 < p.width ? float(x[from + c + 3]) : 0.0f);
}

FUNCTION void layer_norm_store(DEVICE_PTR(T) y, ulong to, uint c, LayerNormParams p, float4 v) {
    if (p.aligned) {
        store4(y, to + c, v);
        return;
    }
    y[to + c] = T(v.x);
    if (c + 1 < p.width) y[to + c + 1] = T(v.y);
    if (c + 2 < p.width) y[to + c + 2] = T(v.z);
    if (c + 3 < p.width) y[to + c + 3] = T(v.w);
}

// The sum of `x` over the threads of a group; each sum has its own `sums`.
FUNCTION float layer_norm_total(float x, uint wide, THREADGROUP_PTR(float) sums, uint first, LayerNormThread t) {
    const float mine = simd_sum(x);
    if (!wide) return mine;
    if (t.lane == 0) sums[first + t.simd] = mine;
    BARRIER();
    float total = 0.0f;
    for (uint k = 0; k < t.simds; ++k) total += sums[first + k];
    return total;
}

FUNCTION float4 layer_norm_product(float4 a, float4 b) { return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w); }

FUNCTION float layer_norm_added(float4 a) { return a.x + a.y + a.z + a.w; }

// `(x - mean) * scale`; nothing behind the group's end.
FUNCTION float4 layer_norm_of(float4 x, float mean, float scale, uint c, uint width) {
    return make_float4((x.x - mean) * scale, c + 1 < width ? (x.y - mean) * scale : 0.0f, c + 2 < width ? (x.z - mean) * scale : 0.0f,
                       c + 3 < width ? (x.w - mean) * scale : 0.0f);
}

/// `y = (x - mean) * rstd * weight + bias`, `rstd = 1 / sqrt(variance + eps)` of each group: `x`, `y [rows, heads * width]`, `weight`,
/// `bias [parts * width]`, `mean`, `rstd [rows, heads]`; without `has_bias` nothing is read of `bias`.
KERNEL(layer_norm)(READ_ROWS(T, x, 0), READ(float, weight, 1), READ(float, bias, 2), WRITE_ROWS(T, y, 3), WRITE(float, mean, 4),
                   WRITE(float, rstd, 5), PARAMS(LayerNormParams, 6))
{
    THREADGROUP(float, sums, 64);
    const LayerNormParams p = params;
    const LayerNormThread t = layer_norm_thread(p, GROUP_X, THREAD, THREADS);
    if (t.group >= p.groups) return;
    const ulong from = ulong(t.row) * p.x_pitch + t.column, to = ulong(t.row) * p.y_pitch + t.column;
    float sum = 0.0f, squares = 0.0f;
    for (uint c = t.c; c < p.width; c += t.step) sum += layer_norm_added(layer_norm_load<T>(x, from, c, p));
    const float middle = layer_norm_total(sum, p.wide, sums, 0, t) / float(p.width);
    for (uint c = t.c; c < p.width; c += t.step) {
        const float4 v = layer_norm_of(layer_norm_load<T>(x, from, c, p), middle, 1.0f, c, p.width);
        squares += layer_norm_added(layer_norm_product(v, v));
    }
    const float scale = rsqrt(layer_norm_total(squares, p.wide, sums, 32, t) / float(p.width) + p.eps);
    if (t.c == 0) {
        mean[t.group] = middle;
        rstd[t.group] = scale;
    }
    for (uint c = t.c; c < p.width; c += t.step) {
        const float4 w = layer_norm_load<float>(weight, t.weights, c, p);
        float4 v = layer_norm_product(layer_norm_of(layer_norm_load<T>(x, from, c, p), middle, scale, c, p.width), w);
        if (p.has_bias) {
            const float4 b = layer_norm_load<float>(bias, t.weights, c, p);
            v = make_float4(v.x + b.x, v.y + b.y, v.z + b.z, v.w + b.w);
        }
        layer_norm_store(y, to, c, p, v);
    }
}

/// `dx = rstd * (g - mean(g) - n * mean(g * n))` with `g = dy * weight` and `n = (x - mean) * rstd`; its rows are `y_pitch` apart.
KERNEL(layer_norm_backward)(READ_ROWS(T, dy, 0), READ_ROWS(T, x, 1), READ(float, weight, 2), READ(float, mean, 3), READ(float, rstd, 4),
                            WRITE_ROWS(T, dx, 5), PARAMS(LayerNormParams, 6))
{
    THREADGROUP(float, sums, 64);
    const LayerNormParams p = params;
    const LayerNormThread t = layer_norm_thread(p, GROUP_X, THREAD, THREADS);
    if (t.group >= p.groups) return;
    const ulong from = ulong(t.row) * p.x_pitch + t.column, to = ulong(t.row) * p.y_pitch + t.column;
    const ulong slopes = ulong(t.row) * p.dy_pitch + t.column;
    const float middle = mean[t.group], scale = rstd[t.group];
    float sum = 0.0f, along = 0.0f;
    for (uint c = t.c; c < p.width; c += t.step) {
        const float4 g = layer_norm_product(layer_norm_load<T>(dy, slopes, c, p), layer_norm_load<float>(weight, t.weights, c, p));
        const float4 n = layer_norm_of(layer_norm_load<T>(x, from, c, p), middle, scale, c, p.width);
        sum += layer_norm_added(g);
        along += layer_norm_added(layer_norm_product(g, n));
    }
    sum = layer_norm_total(sum, p.wide, sums, 0, t) / float(p.width);
    along = layer_norm_total(along, p.wide, sums, 32, t) / float(p.width);
    for (uint c = t.c; c < p.width; c += t.step) {
        const float4 g = layer_norm_product(layer_norm_load<T>(dy, slopes, c, p), layer_norm_load<float>(weight, t.weights, c, p));
        const float4 n = layer_norm_of(layer_norm_load<T>(x, from, c, p), middle, scale, c, p.width);
        layer_norm_store(dx, to, c, p,
                         make_float4(scale * (g.x - sum - n.x * along), scale * (g.y - sum - n.y * along),
                                     scale * (g.z - sum - n.z * along), scale * (g.w - sum - n.w * along)));
    }
}

struct LayerNormWeightParams { uint rows; uint columns; uint width; uint rows_per_group; uint dy_pitch; uint x_pitch; };

/// The sums of `dy * (x - mean) * rstd` over the rows of each GROUP_Y: `dy`, `x [rows, columns]`, `mean`, `rstd` one to every `width` columns,
/// `partial [groups, columns]`. 256 threads: a SIMD group adds one of every 8 rows, each lane four columns 32 apart.
KERNEL(layer_norm_weight_grad)(READ_ROWS(T, dy, 0), READ_ROWS(T, x, 1), READ(float, mean, 2), READ(float, rstd, 3),
                               WRITE(float, partial, 4), PARAMS(LayerNormWeightParams, 5))
{
    THREADGROUP(float, sums, 1024);
    const LayerNormWeightParams p = params;
    const uint first = GROUP_Y * p.rows_per_group, last = min(first + p.rows_per_group, p.rows), heads = p.columns / p.width;
    for (uint k = 0; k < 4; ++k) {
        const uint c = 128 * GROUP_X + 32 * k + LANE;
        float sum = 0.0f;
        if (c < p.columns) {
            for (uint row = first + SIMD; row < last; row += SIMDS) {
                const ulong group = ulong(row) * heads + c / p.width;
                const float n = (float(x[ulong(row) * p.x_pitch + c]) - mean[group]) * rstd[group];
                sum += float(dy[ulong(row) * p.dy_pitch + c]) * n;
            }
        }
        sums[128 * SIMD + 32 * k + LANE] = sum;
    }
    BARRIER();
    const uint column = 128 * GROUP_X + THREAD;
    if (THREAD >= 128 || column >= p.columns) return;
    float total = 0.0f;
    for (uint k = 0; k < SIMDS; ++k) total += sums[128 * k + THREAD];
    partial[ulong(GROUP_Y) * p.columns + column] = total;
}
