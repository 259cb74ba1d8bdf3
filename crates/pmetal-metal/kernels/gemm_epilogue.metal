// What follows a matrix product.

struct EpilogueParams { ulong n; float alpha; float beta; };

/// `c = alpha * product + beta * c`, both `[n]`; where `beta` is 0, nothing of `c` is read.
KERNEL(gemm_epilogue)(READ(T, product, 0), UPDATE(T, c, 1), PARAMS(EpilogueParams, 2))
{
    for (ulong i = THREAD_IN_GRID; i < params.n; i += GRID_THREADS) {
        const float scaled = params.alpha * float(product[i]);
        c[i] = T(params.beta == 0.0f ? scaled : scaled + params.beta * float(c[i]));
    }
}
