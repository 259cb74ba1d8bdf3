// Numbers from the standard normal distribution, each a function of a seed and its place: Box and Muller, 1958, on SplitMix64, as on the CPU.

#define NORMAL_GAMMA ulong(0x9e3779b97f4a7c15)

struct NormalParams { ulong n; ulong seed; float std; uint aligned; };

// -log(1 - x) for x = steps / 2^32: by its series where 1 - x would round.
FUNCTION float minus_log_of_rest(uint steps) {
    const float x = float(steps) * (1.0f / 4294967296.0f);
    if (x < 0.03125f) return x * fma(x, fma(x, fma(x, fma(x, 0.2f, 0.25f), 1.0f / 3.0f), 0.5f), 1.0f);
    return -log(float(0xffffffffu - steps + 1u) * (1.0f / 4294967296.0f));
}

// The cosine of `turns / 2^32` of a circle: Taylor's series of sine or cosine within an eighth of the nearest quarter.
FUNCTION float cosine_of_turns(uint turns) {
    const uint quarter = (turns + 0x20000000u) >> 30;
    const float x = float(int(turns - (quarter << 30))) * 1.4629180792671596e-9f, square = x * x;
    const float sine = x * fma(square, fma(square, fma(square, fma(square, 2.7557319e-6f, -1.9841270e-4f), 8.3333333e-3f), -0.16666667f), 1.0f);
    const float cosine = fma(square, fma(square, fma(square, fma(square, 2.4801587e-5f, -1.3888889e-3f), 4.1666667e-2f), -0.5f), 1.0f);
    const float magnitude = quarter % 2 == 1 ? sine : cosine;
    return quarter % 4 == 1 || quarter % 4 == 2 ? -magnitude : magnitude;
}

FUNCTION float normal_at(ulong i, ulong seed) {
    ulong z = seed + (i + 1) * NORMAL_GAMMA;
    z = (z ^ (z >> 30)) * ulong(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * ulong(0x94d049bb133111eb);
    z = z ^ (z >> 31);
    return sqrt(2.0f * minus_log_of_rest(0xffffffffu - uint(z >> 32))) * cosine_of_turns(uint(z & ulong(0xffffffff)));
}

/// Fills `y [n]` with numbers of the stream `seed`, times `std`.
KERNEL(normal)(WRITE(T, y, 0), PARAMS(NormalParams, 1))
{
    const ulong seed = params.seed, quads = params.aligned ? params.n / 4 : 0;
    const float std = params.std;
    for (ulong i = THREAD_IN_GRID; i < quads; i += GRID_THREADS) {
        store4(y, 4 * i,
               make_float4(std * normal_at(4 * i, seed), std * normal_at(4 * i + 1, seed), std * normal_at(4 * i + 2, seed),
                           std * normal_at(4 * i + 3, seed)));
    }
    for (ulong i = 4 * quads + THREAD_IN_GRID; i < params.n; i += GRID_THREADS) y[i] = T(std * normal_at(i, seed));
}
