//! Products with few rows, as in decoding: the weight streams past once, in its own dtype.

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use crate::Element;
use crate::gemm::{Mat, finish_row};
use crate::scratch::with_scratch;
use crate::simd::arch;

/// The most rows of the left operand that go this way.
pub(crate) const MAX_ROWS: usize = 4;
/// Columns of the result that one task computes.
const TASK_COLUMNS: usize = 64;
/// Elements of the weight below which threads cost more than they bring.
const SMALL: usize = 1 << 15;

/// `C = alpha * A B + beta * C` for at most [`MAX_ROWS`] rows, where every column of B is contiguous.
pub(crate) fn few_rows<A: Element, B: Element, C: Element>(
    c: &mut [C],
    c_row_stride: usize,
    a: Mat<A>,
    b: Mat<B>,
    alpha: f32,
    beta: f32,
) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    with_scratch(m * (n + k), |scratch| {
        let (sums, x) = scratch.split_at_mut(m * n);
        for (i, x) in x.chunks_exact_mut(k.max(1)).enumerate() {
            for (l, x) in x.iter_mut().enumerate() {
                *x = a.data[i * a.row_stride + l * a.col_stride].to_f32() * alpha;
            }
        }
        let x = &*x;
        let run = |(task, sums): (usize, &mut [f32])| {
            let weight = &b.data[task * TASK_COLUMNS * b.col_stride..];
            arch().dispatch(Dots { rows: m, x, weight, stride: b.col_stride, sums });
        };
        if n * k <= SMALL {
            sums.chunks_mut(TASK_COLUMNS * m).enumerate().for_each(run);
        } else {
            sums.par_chunks_mut(TASK_COLUMNS * m).enumerate().for_each(run);
        }
        if m == 1 {
            return finish_row(&mut c[..n], sums, beta);
        }
        for i in 0..m {
            for (j, c) in c[i * c_row_stride..][..n].iter_mut().enumerate() {
                let old = if beta == 0.0 { 0.0 } else { beta * c.to_f32() };
                *c = C::from_f32(sums[j * m + i] + old);
            }
        }
    });
}

/// Rows of the left operand against some columns of the right one.
struct Dots<'a, B> {
    rows: usize,
    /// `[rows, k]`.
    x: &'a [f32],
    /// Columns, `stride` elements apart.
    weight: &'a [B],
    stride: usize,
    /// `[columns, rows]`.
    sums: &'a mut [f32],
}

/// Elements of the weight that are widened at a time.
const WIDENED: usize = 256;

impl<B: Element> Dots<'_, B> {
    #[inline(always)]
    fn run<S: Simd, const M: usize>(self, simd: S) {
        let k = self.x.len() / M;
        let (sums, _) = self.sums.as_chunks_mut::<M>();
        let mut widened = [0.0f32; WIDENED];
        for (j, sums) in sums.iter_mut().enumerate() {
            let column = &self.weight[j * self.stride..][..k];
            let mut lanes = [[simd.splat_f32s(0.0); 4]; M];
            *sums = [0.0; M];
            for (c, weight) in column.chunks(WIDENED).enumerate() {
                for (y, w) in widened.iter_mut().zip(weight) {
                    *y = w.to_f32();
                }
                let (vectors, tail) = S::as_simd_f32s(&widened[..weight.len()]);
                for i in 0..M {
                    let x = &self.x[i * k + c * WIDENED..][..weight.len()];
                    let (x, x_tail) = S::as_simd_f32s(x);
                    add_products(simd, &mut lanes[i], vectors, x);
                    for (w, x) in tail.iter().zip(x_tail) {
                        sums[i] = w.mul_add(*x, sums[i]);
                    }
                }
            }
            for i in 0..M {
                let [a, b, c, d] = lanes[i];
                sums[i] += simd.reduce_sum_f32s(simd.add_f32s(simd.add_f32s(a, b), simd.add_f32s(c, d)));
            }
        }
    }
}

/// `lanes += w * x`, vector `v` into sum `v % 4`.
#[inline(always)]
fn add_products<S: Simd>(simd: S, lanes: &mut [S::f32s; 4], w: &[S::f32s], x: &[S::f32s]) {
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

impl<B: Element> WithSimd for Dots<'_, B> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match self.rows {
            1 => self.run::<S, 1>(simd),
            2 => self.run::<S, 2>(simd),
            3 => self.run::<S, 3>(simd),
            _ => self.run::<S, 4>(simd),
        }
    }
}
