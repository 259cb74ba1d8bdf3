// Rows times a factor. A threadgroup has a row; `quads` groups of four of it are moved whole: all of them, or none where rows do not begin at
// aligned places. A pitch is the distance between rows.

struct ScaleParams { uint width; uint quads; uint x_pitch; uint y_pitch; float factor; };
struct ScaleRowsParams { uint width; uint quads; uint x_pitch; uint y_pitch; };

FUNCTION void scale_row(DEVICE_PTR(const T) x, DEVICE_PTR(T) y, uint width, uint quads, float factor, uint id, uint threads)
{
    for (uint i = id; i < quads; i += threads) {
        const float4 v = load4(x, 4 * i);
        store4(y, 4 * i, make_float4(v.x * factor, v.y * factor, v.z * factor, v.w * factor));
    }
    for (uint i = 4 * quads + id; i < width; i += threads) y[i] = T(float(x[i]) * factor);
}

/// `y = x * factor`, both `[rows, width]`.
KERNEL(scale)(READ_ROWS(T, x, 0), WRITE_ROWS(T, y, 1), PARAMS(ScaleParams, 2))
{
    const ulong from = GROUP_X * ulong(params.x_pitch), to = GROUP_X * ulong(params.y_pitch);
    scale_row(x + from, y + to, params.width, params.quads, params.factor, THREAD, THREADS);
}

/// `y[r] = x[r] * factors[r]`, x and y `[rows, width]`.
KERNEL(scale_rows)(READ_ROWS(T, x, 0), READ(float, factors, 1), WRITE_ROWS(T, y, 2), PARAMS(ScaleRowsParams, 3))
{
    const ulong from = GROUP_X * ulong(params.x_pitch), to = GROUP_X * ulong(params.y_pitch);
    scale_row(x + from, y + to, params.width, params.quads, factors[GROUP_X], THREAD, THREADS);
}
