// What follows a matrix product.

struct EpilogueParams { ulong n; ulong width; ulong pitch; float alpha; float beta; };

/// `c = alpha * product + beta * c`, both of `n` elements in rows of `width`, those of `c` `pitch` apart; where `beta` is 0, nothing of `c` is
/// read.
KERNEL(gemm_epilogue)(READ(T, product, 0), UPDATE_ROWS(T, c, 1), PARAMS(EpilogueParams, 2))
{
    for (ulong i = THREAD_IN_GRID; i < params.n; i += GRID_THREADS) {
        const ulong at = i / params.width * params.pitch + i % params.width;
        const float scaled = params.alpha * float(product[i]);
        c[at] = T(params.beta == 0.0f ? scaled : scaled + params.beta * float(c[at]));
    }
}
