// Sums and casts, element by element.

struct ElementwiseParams { uint n; };

/// `y += x`, both `[n]`.
KERNEL(add_assign)(READ(T, x, 0), UPDATE(T, y, 1), PARAMS(ElementwiseParams, 2))
{
    const uint quads = params.n / 4;
    for (uint i = THREAD_IN_GRID; i < quads; i += GRID_THREADS) {
        const float4 a = load4(x, 4 * i);
        const float4 b = load4(y, 4 * i);
        store4(y, 4 * i, make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w));
    }
    const uint tail = 4 * quads + THREAD_IN_GRID;
    if (tail < params.n) y[tail] = T(float(y[tail]) + float(x[tail]));
}
