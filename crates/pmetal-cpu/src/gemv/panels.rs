//! Few rows of f32 times packed weights, which are widened on the way.

use half::bf16;
use pulp::{Simd, WithSimd};

use super::TILE_ROWS;
use crate::gemm::PANEL;
use crate::simd::arch;

/// Adds the products of `rows` rows `x` with `panels` to `sums [panels][rows][16]`.
pub(super) fn add_products(rows: usize, x: &[f32], panels: &[bf16], sums: &mut [f32]) {
    let depth = x.len() / rows;
    for row in (0..rows).step_by(TILE_ROWS) {
        arch().dispatch(Products { rows, row, depth, x, panels, sums });
    }
}

/// Up to [`TILE_ROWS`] rows from `row` on.
struct Products<'a> {
    rows: usize,
    row: usize,
    depth: usize,
    x: &'a [f32],
    panels: &'a [bf16],
    sums: &'a mut [f32],
}

impl WithSimd for Products<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match S::F32_LANES {
            16 => self.of_rows::<S, 1>(simd),
            8 => self.of_rows::<S, 2>(simd),
            4 => self.of_rows::<S, 4>(simd),
            _ => self.of_rows::<S, 16>(simd),
        }
    }
}

impl Products<'_> {
    #[inline(always)]
    fn of_rows<S: Simd, const V: usize>(self, simd: S) {
        match self.rows - self.row {
            1 => self.run::<S, V, 1>(simd),
            2 => self.run::<S, V, 2>(simd),
            3 => self.run::<S, V, 3>(simd),
            _ => self.run::<S, V, TILE_ROWS>(simd),
        }
    }

    /// `M` rows, whose sums take `V` vectors each.
    #[inline(always)]
    fn run<S: Simd, const V: usize, const M: usize>(self, simd: S) {
        let depth = self.depth;
        let x: [&[f32]; M] = std::array::from_fn(|i| &self.x[(self.row + i) * depth..][..depth]);
        let panels = self.panels.chunks_exact(depth.next_multiple_of(2).max(1) * PANEL);
        for (panel, sums) in panels.zip(self.sums.chunks_exact_mut(self.rows * PANEL)) {
            let mut lanes = [[[simd.splat_f32s(0.0); V]; 2]; M];
            let pairs = panel.as_chunks::<{ 2 * PANEL }>().0;
            for (k, pair) in pairs.iter().enumerate().take(depth / 2) {
                let [even, odd] = widened::<S, V>(simd, pair);
                for (x, [evens, odds]) in x.iter().zip(&mut lanes) {
                    add_scaled(simd, x[2 * k], &even, evens);
                    add_scaled(simd, x[2 * k + 1], &odd, odds);
                }
            }
            if depth % 2 == 1 {
                let [last, _] = widened::<S, V>(simd, &pairs[depth / 2]);
                x.iter().zip(&mut lanes).for_each(|(x, [evens, _])| add_scaled(simd, x[depth - 1], &last, evens));
            }
            let sums = &mut sums[self.row * PANEL..];
            for ([evens, odds], sums) in lanes.iter().zip(sums.chunks_exact_mut(PANEL)) {
                let (sums, _) = S::as_mut_simd_f32s(sums);
                for (v, sum) in sums.iter_mut().enumerate().take(V) {
                    *sum = simd.add_f32s(*sum, simd.add_f32s(evens[v], odds[v]));
                }
            }
        }
    }
}

/// The even and the odd inputs of 16 outputs.
#[inline(always)]
fn widened<S: Simd, const V: usize>(simd: S, pairs: &[bf16; 2 * PANEL]) -> [[S::f32s; V]; 2] {
    let mut bits = [0u32; PANEL];
    for (bits, [even, odd]) in bits.iter_mut().zip(pairs.as_chunks::<2>().0) {
        *bits = u32::from(even.to_bits()) | u32::from(odd.to_bits()) << 16;
    }
    let (bits, _) = S::as_simd_u32s(&bits);
    let (shift, high) = (simd.splat_u32s(16), simd.splat_u32s(0xffff_0000));
    let even = |v: usize| simd.transmute_f32s_u32s(simd.wrapping_dyn_shl_u32s(bits[v], shift));
    let odd = |v: usize| simd.transmute_f32s_u32s(simd.and_u32s(bits[v], high));
    [std::array::from_fn(even), std::array::from_fn(odd)]
}

#[inline(always)]
fn add_scaled<S: Simd, const V: usize>(simd: S, factor: f32, x: &[S::f32s; V], sums: &mut [S::f32s; V]) {
    let factor = simd.splat_f32s(factor);
    for (sum, &x) in sums.iter_mut().zip(x) {
        *sum = simd.mul_add_e_f32s(factor, x, *sum);
    }
}
