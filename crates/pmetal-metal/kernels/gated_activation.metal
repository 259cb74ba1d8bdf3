// The gates of MLPs.
//
// A thread has eight columns of `rows_each` rows. `aligned`: eight elements can be moved at once, in every row. A pitch is the distance
// between rows; the clamped gate alone reads alpha and limit.

struct GateParams { uint rows; uint width; uint rows_each; uint aligned; uint gate_pitch; uint up_pitch; uint y_pitch; float alpha; float limit; };

struct GateBackwardParams {
    uint rows;
    uint width;
    uint rows_each;
    uint aligned;
    uint dy_pitch;
    uint gate_pitch;
    uint up_pitch;
    uint dgate_pitch;
    uint dup_pitch;
    float alpha;
    float limit;
};

// What is rounded to sixteen bits in the end does not show the last bits of a float.
FUNCTION float gate_sigmoid(float x) {
    return sizeof(T) == 4 ? 1.0f / (1.0f + exp(-x)) : quick_reciprocal(1.0f + quick_exp(-x));
}

// An activation is `x * sigmoid(argument(x))`.
struct Silu {
    static FUNCTION float argument(float x) { return x; }
    static FUNCTION float slope(float) { return 1.0f; }
};

// `(1 + tanh(sqrt(2/π) (x + 0.044715 x³))) / 2` is the sigmoid of twice the tangent's argument.
struct GeluTanh {
    static FUNCTION float argument(float x) { return x * (1.5957691f + 0.071354814f * x * x); }
    static FUNCTION float slope(float x) { return 1.5957691f + 0.21406444f * x * x; }
};

// A gate: its value, and `slopes` that turns `gate` and `up` into their gradients. Alpha and limit are those of the clamped one.
template <typename A>
struct Gate {
    static FUNCTION float of(float gate, float up, float, float) { return gate * gate_sigmoid(A::argument(gate)) * up; }
    static FUNCTION void slopes(float dy, THREAD_REF(float) gate, THREAD_REF(float) up, float, float) {
        const float g = gate, s = gate_sigmoid(A::argument(g));
        gate = dy * up * s * (1.0f + g * (1.0f - s) * A::slope(g));
        up = dy * g * s;
    }
};

// Sigmoid and product are of the gate up to the limit, and of `up` between the limits, plus one. What is not a number stays so.
struct Clamped {
    static FUNCTION float bound(float gate, float limit) { return gate > limit ? limit : gate; }
    static FUNCTION float factor(float up, float limit) { return (up > limit ? limit : up < -limit ? -limit : up) + 1.0f; }
    static FUNCTION float of(float gate, float up, float alpha, float limit) {
        const float g = bound(gate, limit);
        return factor(up, limit) * g * gate_sigmoid(alpha * g);
    }
    static FUNCTION void slopes(float dy, THREAD_REF(float) gate, THREAD_REF(float) up, float alpha, float limit) {
        const float g = bound(gate, limit), u = factor(up, limit), s = gate_sigmoid(alpha * g);
        gate = gate > limit ? 0.0f : dy * u * s * (1.0f + alpha * g * (1.0f - s));
        up = fabs(up) > limit ? 0.0f : dy * g * s;
    }
};

template <typename G>
FUNCTION float4 gate_of_four(float4 g, float4 u, float alpha, float limit) {
    return make_float4(G::of(g.x, u.x, alpha, limit), G::of(g.y, u.y, alpha, limit), G::of(g.z, u.z, alpha, limit),
                       G::of(g.w, u.w, alpha, limit));
}

template <typename G>
FUNCTION void gate_slopes_four(float4 dy, THREAD_REF(float4) gate, THREAD_REF(float4) up, float alpha, float limit) {
    float g0 = gate.x, g1 = gate.y, g2 = gate.z, g3 = gate.w, u0 = up.x, u1 = up.y, u2 = up.z, u3 = up.w;
    G::slopes(dy.x, g0, u0, alpha, limit);
    G::slopes(dy.y, g1, u1, alpha, limit);
    G::slopes(dy.z, g2, u2, alpha, limit);
    G::slopes(dy.w, g3, u3, alpha, limit);
    gate = make_float4(g0, g1, g2, g3);
    up = make_float4(u0, u1, u2, u3);
}

template <typename G>
FUNCTION void gate_rows(DEVICE_PTR(const T) gate, DEVICE_PTR(const T) up, DEVICE_PTR(T) y, uint first, uint c, GateParams p) {
    const uint last = min(first + p.rows_each, p.rows);
    if (c >= p.width) return;
    if (p.aligned) {
        for (uint row = first; row < last; ++row) {
            const Octet g = load8(gate, ulong(row) * p.gate_pitch + c), u = load8(up, ulong(row) * p.up_pitch + c);
            Octet v;
            v.low = gate_of_four<G>(g.low, u.low, p.alpha, p.limit);
            v.high = gate_of_four<G>(g.high, u.high, p.alpha, p.limit);
            store8(y, ulong(row) * p.y_pitch + c, v);
        }
        return;
    }
    for (uint row = first; row < last; ++row) {
        for (uint k = c; k < min(c + 8, p.width); ++k) {
            const float g = float(gate[ulong(row) * p.gate_pitch + k]), u = float(up[ulong(row) * p.up_pitch + k]);
            y[ulong(row) * p.y_pitch + k] = T(G::of(g, u, p.alpha, p.limit));
        }
    }
}

/// `y = silu(gate) * up`, all `[rows, width]`.
KERNEL(swiglu)(READ_ROWS(T, gate, 0), READ_ROWS(T, up, 1), WRITE_ROWS(T, y, 2), PARAMS(GateParams, 3))
{
    gate_rows<Gate<Silu>>(gate, up, y, GROUP_Y * params.rows_each, 8 * THREAD_IN_GRID, params);
}

/// `y = gelu(gate) * up` with the approximation by tanh, all `[rows, width]`.
KERNEL(geglu)(READ_ROWS(T, gate, 0), READ_ROWS(T, up, 1), WRITE_ROWS(T, y, 2), PARAMS(GateParams, 3))
{
    gate_rows<Gate<GeluTanh>>(gate, up, y, GROUP_Y * params.rows_each, 8 * THREAD_IN_GRID, params);
}

/// `y = (up + 1) * gate * sigmoid(alpha * gate)` with the gate up to the limit and `up` between the limits, all `[rows, width]`.
KERNEL(clamped_gate)(READ_ROWS(T, gate, 0), READ_ROWS(T, up, 1), WRITE_ROWS(T, y, 2), PARAMS(GateParams, 3))
{
    gate_rows<Clamped>(gate, up, y, GROUP_Y * params.rows_each, 8 * THREAD_IN_GRID, params);
}

template <typename G>
FUNCTION void gate_rows_backward(DEVICE_PTR(const T) dy, DEVICE_PTR(const T) gate, DEVICE_PTR(const T) up, DEVICE_PTR(T) dgate,
                                 DEVICE_PTR(T) dup, uint first, uint c, GateBackwardParams p) {
    const uint last = min(first + p.rows_each, p.rows);
    if (c >= p.width) return;
    if (p.aligned) {
        for (uint row = first; row < last; ++row) {
            const Octet d = load8(dy, ulong(row) * p.dy_pitch + c);
            Octet g = load8(gate, ulong(row) * p.gate_pitch + c), u = load8(up, ulong(row) * p.up_pitch + c);
            gate_slopes_four<G>(d.low, g.low, u.low, p.alpha, p.limit);
            gate_slopes_four<G>(d.high, g.high, u.high, p.alpha, p.limit);
            store8(dgate, ulong(row) * p.dgate_pitch + c, g);
            store8(dup, ulong(row) * p.dup_pitch + c, u);
        }
        return;
    }
    for (uint row = first; row < last; ++row) {
        for (uint k = c; k < min(c + 8, p.width); ++k) {
            float g = float(gate[ulong(row) * p.gate_pitch + k]), u = float(up[ulong(row) * p.up_pitch + k]);
            G::slopes(float(dy[ulong(row) * p.dy_pitch + k]), g, u, p.alpha, p.limit);
            dgate[ulong(row) * p.dgate_pitch + k] = T(g);
            dup[ulong(row) * p.dup_pitch + k] = T(u);
        }
    }
}

/// With `s = sigmoid(gate)`: `dgate = dy * up * s * (1 + gate * (1 - s))`, `dup = dy * gate * s`, all `[rows, width]`.
KERNEL(swiglu_backward)(READ_ROWS(T, dy, 0), READ_ROWS(T, gate, 1), READ_ROWS(T, up, 2), WRITE_ROWS(T, dgate, 3), WRITE_ROWS(T, dup, 4),
                        PARAMS(GateBackwardParams, 5))
{
    gate_rows_backward<Gate<Silu>>(dy, gate, up, dgate, dup, GROUP_Y * params.rows_each, 8 * THREAD_IN_GRID, params);
}

/// `dgate = dy * up * gelu'(gate)`, `dup = dy * gelu(gate)`, all `[rows, width]`.
KERNEL(geglu_backward)(READ_ROWS(T, dy, 0), READ_ROWS(T, gate, 1), READ_ROWS(T, up, 2), WRITE_ROWS(T, dgate, 3), WRITE_ROWS(T, dup, 4),
                       PARAMS(GateBackwardParams, 5))
{
    gate_rows_backward<Gate<GeluTanh>>(dy, gate, up, dgate, dup, GROUP_Y * params.rows_each, 8 * THREAD_IN_GRID, params);
}

/// With `s = sigmoid(alpha * gate)`: `dgate = dy * (up + 1) * s * (1 + alpha * gate * (1 - s))` and `dup = dy * gate * s`, 0 beyond the limits.
KERNEL(clamped_gate_backward)(READ_ROWS(T, dy, 0), READ_ROWS(T, gate, 1), READ_ROWS(T, up, 2), WRITE_ROWS(T, dgate, 3),
                              WRITE_ROWS(T, dup, 4), PARAMS(GateBackwardParams, 5))
{
    gate_rows_backward<Clamped>(dy, gate, up, dgate, dup, GROUP_Y * params.rows_each, 8 * THREAD_IN_GRID, params);
}
