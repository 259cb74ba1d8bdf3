//! Few rows of f32 times the contiguous columns of a matrix of any dtype.

use pulp::{Simd, WithSimd};

use super::TILE_ROWS;
use crate::Element;
use crate::gemm::{Mat, PANEL};
use crate::simd::arch;

/// Elements of a column that are widened at a time.
const WIDENED: usize = 256;

/// Adds the products of `rows` rows `x` with `count` columns of `b` from `first` on to `sums [count / 16][rows][16]`.
pub(super) fn add_products<B: Element>(
    rows: usize,
    x: &[f32],
    b: Mat<B>,
    first: usize,
    count: usize,
    sums: &mut [f32],
) {
    let columns = &b.data[(first * b.col_stride).min(b.data.len())..];
    for row in (0..rows).step_by(TILE_ROWS) {
        let x = &x[row * b.rows..];
        arch().dispatch(Products { rows, row, x, depth: b.rows, columns, stride: b.col_stride, count, sums });
    }
}

/// Up to [`TILE_ROWS`] rows from `row` on.
struct Products<'a, B> {
    rows: usize,
    row: usize,
    /// The rows from `row` on.
    x: &'a [f32],
    depth: usize,
    /// `stride` elements apart.
    columns: &'a [B],
    stride: usize,
    count: usize,
    sums: &'a mut [f32],
}

impl<B: Element> WithSimd for Products<'_, B> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match self.rows - self.row {
            1 => self.run::<S, 1>(simd),
            2 => self.run::<S, 2>(simd),
            3 => self.run::<S, 3>(simd),
            _ => self.run::<S, TILE_ROWS>(simd),
        }
    }
}

impl<B: Element> Products<'_, B> {
    #[inline(always)]
    fn run<S: Simd, const M: usize>(self, simd: S) {
        let mut widened = [0.0f32; WIDENED];
        for j in 0..self.count {
            let column = &self.columns[j * self.stride..][..self.depth];
            let mut lanes = [[simd.splat_f32s(0.0); 4]; M];
            let mut rest = [0.0f32; M];
            for (c, weight) in column.chunks(WIDENED).enumerate() {
                for (y, w) in widened.iter_mut().zip(weight) {
                    *y = w.to_f32();
                }
                let (vectors, tail) = S::as_simd_f32s(&widened[..weight.len()]);
                for i in 0..M {
                    let x = &self.x[i * self.depth + c * WIDENED..][..weight.len()];
                    let (x, x_tail) = S::as_simd_f32s(x);
                    add_products_of(simd, &mut lanes[i], vectors, x);
                    for (w, x) in tail.iter().zip(x_tail) {
                        rest[i] = w.mul_add(*x, rest[i]);
                    }
                }
            }
            let at = (j / PANEL * self.rows + self.row) * PANEL + j % PANEL;
            for i in 0..M {
                let [a, b, c, d] = lanes[i];
                let sum = simd.reduce_sum_f32s(simd.add_f32s(simd.add_f32s(a, b), simd.add_f32s(c, d)));
                self.sums[at + i * PANEL] += rest[i] + sum;
            }
        }
    }
}

/// `lanes += w * x`, vector `v` into sum `v % 4`.
#[inline(always)]
fn add_products_of<S: Simd>(simd: S, lanes: &mut [S::f32s; 4], w: &[S::f32s], x: &[S::f32s]) {
    let (w, w_rest) = w.as_chunks::<4>();
    let (x, x_rest) = x.as_chunks::<4>();
    for (w, x) in w.iter().zip(x) {
        for lane in 0..4 {
            lanes[lane] = simd.mul_add_e_f32s(w[lane], x[lane], lanes[lane]);
        }
    }
    for ((lane, &w), &x) in lanes.iter_mut().zip(w_rest).zip(x_rest) {
        *lane = simd.mul_add_e_f32s(w, x, *lane);
    }
}
