//! The inner loop of every product: a tile of the result held in registers.

use pulp::{Arch, Simd};

use crate::simd::arch;

/// Rows and columns of the tile a product of this machine computes at a time.
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    pub rows: usize,
    pub columns: usize,
}

/// Two vectors wide; as many rows as leave registers for the operands.
pub(crate) const fn tile_of<S: Simd>() -> Tile {
    Tile { rows: if S::REGISTER_COUNT >= 32 { 12 } else { 6 }, columns: 2 * S::F32_LANES }
}

/// [`tile_of`] for the instruction set that kernels run in.
pub(crate) fn tile() -> Tile {
    struct Ask;
    impl pulp::WithSimd for Ask {
        type Output = Tile;
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> Tile {
            tile_of::<S>()
        }
    }
    let arch: Arch = arch();
    arch.dispatch(Ask)
}

/// `sum over k of a(i, k) * b[k][j]` for a left panel `[depth][R]` and two vectors of columns (`[depth][2 * lanes]`).
#[inline(always)]
pub(crate) fn product_interleaved<S: Simd, const R: usize>(simd: S, a: &[f32], b: &[f32]) -> [[S::f32s; 2]; R] {
    let mut sums = [[simd.splat_f32s(0.0); 2]; R];
    let (a, _) = a.as_chunks::<R>();
    for (a, b) in a.iter().zip(column_vectors::<S>(b)) {
        multiply_add(simd, &mut sums, a, b);
    }
    sums
}

/// [`product_interleaved`] where the left panel is `[R][P]` and at most `P` deep.
#[inline(always)]
pub(crate) fn product_rows<S: Simd, const R: usize, const P: usize>(
    simd: S,
    a: &[f32],
    b: &[f32],
) -> [[S::f32s; 2]; R] {
    let mut sums = [[simd.splat_f32s(0.0); 2]; R];
    let (a, _) = a.as_chunks::<P>();
    let Some((a, _)) = a.split_first_chunk::<R>() else { return sums };
    for (k, b) in column_vectors::<S>(b).iter().enumerate().take(P) {
        let column = std::array::from_fn(|i| a[i][k]);
        multiply_add(simd, &mut sums, &column, b);
    }
    sums
}

/// A right panel as pairs of vectors.
#[inline(always)]
pub(crate) fn column_vectors<S: Simd>(b: &[f32]) -> &[[S::f32s; 2]] {
    let (vectors, _) = S::as_simd_f32s(b);
    vectors.as_chunks::<2>().0
}

/// `sums[i][j] += a[i] * b[j]`.
#[inline(always)]
pub(crate) fn multiply_add<S: Simd, const R: usize>(
    simd: S,
    sums: &mut [[S::f32s; 2]; R],
    a: &[f32; R],
    &[b0, b1]: &[S::f32s; 2],
) {
    for i in 0..R {
        let a = simd.splat_f32s(a[i]);
        sums[i][0] = simd.mul_add_e_f32s(a, b0, sums[i][0]);
        sums[i][1] = simd.mul_add_e_f32s(a, b1, sums[i][1]);
    }
}
