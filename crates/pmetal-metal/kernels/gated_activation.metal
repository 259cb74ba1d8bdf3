// The gates of MLPs.
//
// `quads` is how many groups of four are moved whole: all of them, or none where a buffer does not begin at an aligned place.

struct GateParams { ulong n; ulong quads; };

FUNCTION float gate_sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }

FUNCTION float swiglu_of(float gate, float up) { return gate * gate_sigmoid(gate) * up; }

/// `y = silu(gate) * up`, all `[n]`.
KERNEL(swiglu)(READ(T, gate, 0), READ(T, up, 1), WRITE(T, y, 2), PARAMS(GateParams, 3))
{
    for (ulong i = THREAD_IN_GRID; i < params.quads; i += GRID_THREADS) {
        const float4 g = load4(gate, 4 * i), u = load4(up, 4 * i);
        store4(y, 4 * i, make_float4(swiglu_of(g.x, u.x), swiglu_of(g.y, u.y), swiglu_of(g.z, u.z), swiglu_of(g.w, u.w)));
    }
    for (ulong i = 4 * params.quads + THREAD_IN_GRID; i < params.n; i += GRID_THREADS)
        y[i] = T(swiglu_of(float(gate[i]), float(up[i])));
}

FUNCTION float swiglu_dgate(float d, float g, float u) {
    const float s = gate_sigmoid(g);
    return d * u * s * (1.0f + g * (1.0f - s));
}

FUNCTION float swiglu_dup(float d, float g) { return d * g * gate_sigmoid(g); }

/// With `s = sigmoid(gate)`: `dgate = dy * up * s * (1 + gate * (1 - s))`, `dup = dy * gate * s`, all `[n]`.
KERNEL(swiglu_backward)(READ(T, dy, 0), READ(T, gate, 1), READ(T, up, 2), WRITE(T, dgate, 3), WRITE(T, dup, 4),
                        PARAMS(GateParams, 5))
{
    for (ulong i = THREAD_IN_GRID; i < params.quads; i += GRID_THREADS) {
        const float4 d = load4(dy, 4 * i), g = load4(gate, 4 * i), u = load4(up, 4 * i);
        store4(dgate, 4 * i,
               make_float4(swiglu_dgate(d.x, g.x, u.x), swiglu_dgate(d.y, g.y, u.y), swiglu_dgate(d.z, g.z, u.z),
                           swiglu_dgate(d.w, g.w, u.w)));
        store4(dup, 4 * i, make_float4(swiglu_dup(d.x, g.x), swiglu_dup(d.y, g.y), swiglu_dup(d.z, g.z), swiglu_dup(d.w, g.w)));
    }
    for (ulong i = 4 * params.quads + THREAD_IN_GRID; i < params.n; i += GRID_THREADS) {
        const float d = float(dy[i]), g = float(gate[i]);
        dgate[i] = T(swiglu_dgate(d, g, float(up[i])));
        dup[i] = T(swiglu_dup(d, g));
    }
}

// `(1 + tanh(sqrt(2/π) (x + 0.044715 x³))) / 2`, which is the sigmoid of twice the tangent's argument.
FUNCTION float geglu_sigmoid(float x) { return gate_sigmoid(x * (1.5957691f + 0.071354814f * x * x)); }

FUNCTION float geglu_of(float gate, float up) { return gate * geglu_sigmoid(gate) * up; }

/// `y = gelu(gate) * up` with the approximation by tanh, all `[n]`.
KERNEL(geglu)(READ(T, gate, 0), READ(T, up, 1), WRITE(T, y, 2), PARAMS(GateParams, 3))
{
    for (ulong i = THREAD_IN_GRID; i < params.quads; i += GRID_THREADS) {
        const float4 g = load4(gate, 4 * i), u = load4(up, 4 * i);
        store4(y, 4 * i, make_float4(geglu_of(g.x, u.x), geglu_of(g.y, u.y), geglu_of(g.z, u.z), geglu_of(g.w, u.w)));
    }
    for (ulong i = 4 * params.quads + THREAD_IN_GRID; i < params.n; i += GRID_THREADS)
        y[i] = T(geglu_of(float(gate[i]), float(up[i])));
}

FUNCTION float geglu_dgate(float d, float g, float u) {
    const float s = geglu_sigmoid(g);
    return d * u * s * (1.0f + g * (1.0f - s) * (1.5957691f + 0.21406444f * g * g));
}

FUNCTION float geglu_dup(float d, float g) { return d * g * geglu_sigmoid(g); }

/// `dgate = dy * up * gelu'(gate)`, `dup = dy * gelu(gate)`, all `[n]`.
KERNEL(geglu_backward)(READ(T, dy, 0), READ(T, gate, 1), READ(T, up, 2), WRITE(T, dgate, 3), WRITE(T, dup, 4),
                       PARAMS(GateParams, 5))
{
    for (ulong i = THREAD_IN_GRID; i < params.quads; i += GRID_THREADS) {
        const float4 d = load4(dy, 4 * i), g = load4(gate, 4 * i), u = load4(up, 4 * i);
        store4(dgate, 4 * i,
               make_float4(geglu_dgate(d.x, g.x, u.x), geglu_dgate(d.y, g.y, u.y), geglu_dgate(d.z, g.z, u.z),
                           geglu_dgate(d.w, g.w, u.w)));
        store4(dup, 4 * i, make_float4(geglu_dup(d.x, g.x), geglu_dup(d.y, g.y), geglu_dup(d.z, g.z), geglu_dup(d.w, g.w)));
    }
    for (ulong i = 4 * params.quads + THREAD_IN_GRID; i < params.n; i += GRID_THREADS) {
        const float d = float(dy[i]), g = float(gate[i]);
        dgate[i] = T(geglu_dgate(d, g, float(up[i])));
        dup[i] = T(geglu_dup(d, g));
    }
}
