// Sums, casts, biases and dropout, element by element.
//
// `quads` is how many groups of four are moved whole: all of them, or none where a buffer does not begin at an aligned place.

struct ElementwiseParams { ulong n; ulong quads; };

/// `y += x`, both `[n]`.
KERNEL(add_assign)(READ(T, x, 0), UPDATE(T, y, 1), PARAMS(ElementwiseParams, 2))
{
    for (ulong i = THREAD_IN_GRID; i < params.quads; i += GRID_THREADS) {
        const float4 a = load4(x, 4 * i);
        const float4 b = load4(y, 4 * i);
        store4(y, 4 * i, make_float4(b.x + a.x, b.y + a.y, b.z + a.z, b.w + a.w));
    }
    for (ulong i = 4 * params.quads + THREAD_IN_GRID; i < params.n; i += GRID_THREADS) y[i] = T(float(y[i]) + float(x[i]));
}

/// `y += x` for an f32 `y`, both `[n]`.
KERNEL(add_assign_f32)(READ(T, x, 0), UPDATE(float, y, 1), PARAMS(ElementwiseParams, 2))
{
    for (ulong i = THREAD_IN_GRID; i < params.quads; i += GRID_THREADS) {
        const float4 a = load4(x, 4 * i);
        const float4 b = load4(y, 4 * i);
        store4(y, 4 * i, make_float4(b.x + a.x, b.y + a.y, b.z + a.z, b.w + a.w));
    }
    for (ulong i = 4 * params.quads + THREAD_IN_GRID; i < params.n; i += GRID_THREADS) y[i] += float(x[i]);
}

/// `y = x`, both `[n]`.
KERNEL(copy)(READ(T, x, 0), WRITE(T, y, 1), PARAMS(ElementwiseParams, 2))
{
    for (ulong i = THREAD_IN_GRID; i < params.quads; i += GRID_THREADS) store4(y, 4 * i, load4(x, 4 * i));
    for (ulong i = 4 * params.quads + THREAD_IN_GRID; i < params.n; i += GRID_THREADS) y[i] = x[i];
}

struct CopyRowsParams { uint rows; uint width; uint x_pitch; uint y_pitch; };

/// `y = x`, both `[rows, width]`. A threadgroup has a row.
KERNEL(copy_rows)(READ_ROWS(T, x, 0), WRITE_ROWS(T, y, 1), PARAMS(CopyRowsParams, 2))
{
    const ulong from = ulong(GROUP_X) * params.x_pitch, to = ulong(GROUP_X) * params.y_pitch;
    for (uint i = THREAD; i < params.width; i += THREADS) y[to + i] = x[from + i];
}

/// `y = x` in f32, both `[n]`.
KERNEL(to_f32)(READ(T, x, 0), WRITE(float, y, 1), PARAMS(ElementwiseParams, 2))
{
    for (ulong i = THREAD_IN_GRID; i < params.quads; i += GRID_THREADS) store4(y, 4 * i, load4(x, 4 * i));
    for (ulong i = 4 * params.quads + THREAD_IN_GRID; i < params.n; i += GRID_THREADS) y[i] = float(x[i]);
}

/// `y = x` rounded from f32, both `[n]`.
KERNEL(from_f32)(READ(float, x, 0), WRITE(T, y, 1), PARAMS(ElementwiseParams, 2))
{
    for (ulong i = THREAD_IN_GRID; i < params.quads; i += GRID_THREADS) store4(y, 4 * i, load4(x, 4 * i));
    for (ulong i = 4 * params.quads + THREAD_IN_GRID; i < params.n; i += GRID_THREADS) y[i] = T(x[i]);
}

// Number `i` of a stream of SplitMix64, in [0, 1), from `z = seed + (i + 1) * DROPOUT_GAMMA`: the same as on the CPU.
#define DROPOUT_GAMMA ulong(0x9e3779b97f4a7c15)
FUNCTION float dropout_uniform(ulong z) {
    z = (z ^ (z >> 30)) * ulong(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * ulong(0x94d049bb133111eb);
    return float(uint((z ^ (z >> 31)) >> 40)) * (1.0f / 16777216.0f);
}

struct DropoutParams { ulong n; ulong quads; ulong seed; float rate; float factor; };

FUNCTION float dropout_of(float x, ulong z, float rate, float factor) { return dropout_uniform(z) >= rate ? x * factor : 0.0f; }

/// `y = x * factor` where number `i` of the stream is at least `rate`, else 0; both `[n]`.
KERNEL(dropout)(READ(T, x, 0), WRITE(T, y, 1), PARAMS(DropoutParams, 2))
{
    const float rate = params.rate, factor = params.factor;
    for (ulong i = THREAD_IN_GRID; i < params.quads; i += GRID_THREADS) {
        const float4 v = load4(x, 4 * i);
        const ulong z = params.seed + (4 * i + 1) * DROPOUT_GAMMA;
        store4(y, 4 * i,
               make_float4(dropout_of(v.x, z, rate, factor), dropout_of(v.y, z + DROPOUT_GAMMA, rate, factor),
                           dropout_of(v.z, z + 2 * DROPOUT_GAMMA, rate, factor),
                           dropout_of(v.w, z + 3 * DROPOUT_GAMMA, rate, factor)));
    }
    for (ulong i = 4 * params.quads + THREAD_IN_GRID; i < params.n; i += GRID_THREADS)
        y[i] = T(dropout_of(float(x[i]), params.seed + (i + 1) * DROPOUT_GAMMA, rate, factor));
}

struct BiasParams { uint rows; uint n; uint rows_per_group; uint aligned; uint pitch; };

/// `y += bias` for every row: `bias [n]`, `y [rows, n]`. A thread has four columns of the rows of GROUP_Y.
KERNEL(bias_add)(READ(T, bias, 0), UPDATE_ROWS(T, y, 1), PARAMS(BiasParams, 2))
{
    const uint first = GROUP_Y * params.rows_per_group;
    const uint last = min(first + params.rows_per_group, params.rows);
    const uint c = 4 * THREAD_IN_GRID;
    if (c >= params.n) return;
    if (params.aligned) {
        const float4 b = load4(bias, c);
        for (uint row = first; row < last; ++row) {
            const ulong i = ulong(row) * params.pitch + c;
            const float4 v = load4(y, i);
            store4(y, i, make_float4(v.x + b.x, v.y + b.y, v.z + b.z, v.w + b.w));
        }
    } else {
        for (uint row = first; row < last; ++row) {
            for (uint k = c; k < min(c + 4, params.n); ++k) {
                const ulong i = ulong(row) * params.pitch + k;
                y[i] = T(float(y[i]) + float(bias[k]));
            }
        }
    }
}

/// The sums of the columns of `dy [rows, n]` over the rows of each GROUP_Y: `partial [groups, n]`. 256 threads: a SIMD group adds
/// an eighth of the rows, 128 columns.
KERNEL(bias_grad)(READ_ROWS(T, dy, 0), WRITE(float, partial, 1), PARAMS(BiasParams, 2))
{
    THREADGROUP(float, sums, 1024);
    const uint first = GROUP_Y * params.rows_per_group;
    const uint last = min(first + params.rows_per_group, params.rows);
    const uint c = 128 * GROUP_X + 4 * LANE;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (params.aligned && c < params.n) {
        const float4 zero = sum;
        for (uint row = first + 4 * SIMD; row < last; row += 4 * SIMDS) {
            const ulong i = ulong(row) * params.pitch + c;
            float4 v[4];
            for (uint k = 0; k < 4; ++k) v[k] = row + k < last ? load4(dy, i + ulong(k) * params.pitch) : zero;
            for (uint k = 0; k < 4; ++k) sum = make_float4(sum.x + v[k].x, sum.y + v[k].y, sum.z + v[k].z, sum.w + v[k].w);
        }
    } else {
        for (uint row = first + SIMD; row < last; row += SIMDS) {
            const ulong i = ulong(row) * params.pitch + c;
            if (c < params.n) sum.x += float(dy[i]);
            if (c + 1 < params.n) sum.y += float(dy[i + 1]);
            if (c + 2 < params.n) sum.z += float(dy[i + 2]);
            if (c + 3 < params.n) sum.w += float(dy[i + 3]);
        }
    }
    sums[128 * SIMD + 4 * LANE] = sum.x;
    sums[128 * SIMD + 4 * LANE + 1] = sum.y;
    sums[128 * SIMD + 4 * LANE + 2] = sum.z;
    sums[128 * SIMD + 4 * LANE + 3] = sum.w;
    BARRIER();
    const uint column = 128 * GROUP_X + THREAD;
    if (THREAD >= 128 || column >= params.n) return;
    float total = 0.0f;
    for (uint k = 0; k < SIMDS; ++k) total += sums[128 * k + THREAD];
    partial[ulong(GROUP_Y) * params.n + column] = total;
}

struct ColumnSumsParams { uint rows; uint n; uint accumulate; };

/// The sums of the columns of `partial [rows, n]`, written to `out [n]` or added to it. 256 threads for 32 columns.
KERNEL(column_sums)(READ(float, partial, 0), UPDATE(float, out, 1), PARAMS(ColumnSumsParams, 2))
{
    THREADGROUP(float, sums, 256);
    const uint column = 32 * GROUP_X + LANE;
    float sum = 0.0f;
    if (column < params.n) {
        for (uint row = SIMD; row < params.rows; row += SIMDS) sum += partial[ulong(row) * params.n + column];
    }
    sums[THREAD] = sum;
    BARRIER();
    if (THREAD >= 32 || column >= params.n) return;
    float total = 0.0f;
    for (uint k = 0; k < SIMDS; ++k) total += sums[32 * k + THREAD];
    out[column] = params.accumulate ? out[column] + total : total;
}
