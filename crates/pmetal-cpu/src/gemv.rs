//! Products with few rows, as in decoding: the weight streams past once, in its own dtype.

use rayon::prelude::*;

use crate::Element;
use crate::gemm::{Mat, finish_row};
use crate::scratch::with_scratch;
use crate::simd::{LANES, simd_fn, sum_lanes};

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
            match m {
                1 => dots_1(x, weight, b.col_stride, sums),
                2 => dots_2(x, weight, b.col_stride, sums),
                3 => dots_3(x, weight, b.col_stride, sums),
                _ => dots_4(x, weight, b.col_stride, sums),
            }
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

macro_rules! dots {
    ($($name:ident $rows:literal),*) => { $(
        simd_fn! {
            fn $name['a; B](x: &'a [f32], weight: &'a [B], stride: usize, sums: &'a mut [f32]) -> () {
                dots::<B, $rows>(x, weight, stride, sums);
            }
        }
    )* };
}
dots!(dots_1 1, dots_2 2, dots_3 3, dots_4 4);

/// `sums[j][i] = x[i] . weight[j]` for every row of the weight.
#[inline(always)]
fn dots<B: Element, const M: usize>(x: &[f32], weight: &[B], stride: usize, sums: &mut [f32]) {
    let k = x.len() / M;
    let mut rows = [x; M];
    for (i, row) in rows.iter_mut().enumerate() {
        *row = &x[i * k..][..k];
    }
    let (sums, _) = sums.as_chunks_mut::<M>();
    for (j, sums) in sums.iter_mut().enumerate() {
        let (chunks, tail) = weight[j * stride..][..k].as_chunks::<LANES>();
        let mut lanes = [[0.0f32; LANES]; M];
        for (l, w) in chunks.iter().enumerate() {
            for i in 0..M {
                let x = &rows[i][l * LANES..][..LANES];
                for lane in 0..LANES {
                    lanes[i][lane] = w[lane].to_f32().mul_add(x[lane], lanes[i][lane]);
                }
            }
        }
        for i in 0..M {
            let x = &rows[i][chunks.len() * LANES..];
            for ((lane, w), x) in lanes[i].iter_mut().zip(tail).zip(x) {
                *lane = w.to_f32().mul_add(*x, *lane);
            }
            sums[i] = sum_lanes(lanes[i]);
        }
    }
}
