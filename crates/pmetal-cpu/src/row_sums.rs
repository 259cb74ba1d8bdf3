//! Weighted sums of rows that a list names, the products that the gradients of their weights need, and copies of columns: how tokens come to
//! their experts and back.

use std::ops::Range;

use rayon::prelude::*;

use crate::Element;
use crate::elementwise::convert_slice;
use crate::scratch::with_scratch;
use crate::simd::{fold2, rows_per_task, simd_fn};

/// What each row of a result is the sum of: the entries `starts[r]..starts[r + 1]` of row `r`. Entry `e` is row `rows[e]` of the source,
/// times weight number `weights[e]` where sums are weighted.
#[derive(Clone, Copy, Debug)]
pub struct RowLists<'a> {
    /// Where the entries of each row begin, and the last end.
    pub starts: &'a [u32],
    /// The source's row of each entry.
    pub rows: &'a [u32],
    /// The number of each entry's weight: every weight has one entry.
    pub weights: &'a [u32],
}

impl RowLists<'_> {
    /// How many rows the result has.
    fn len(&self) -> usize {
        self.starts.len().saturating_sub(1)
    }

    fn entries(&self, row: usize) -> Range<usize> {
        self.starts[row] as usize..self.starts[row + 1] as usize
    }
}

/// `y[r] = sum of weights[e] * x[rows[e]]` over the entries `e` of row `r`, in their order, summed in f32; without weights they are 1. `x` is
/// `[_, width]`, `y` `[rows, width]`.
pub fn sum_rows<T: Element>(x: &[T], lists: RowLists, weights: Option<&[f32]>, width: usize, y: &mut [T]) {
    assert!(width > 0, "sum_rows: width 0");
    assert_eq!(y.len(), lists.len() * width, "sum_rows: y");
    let each = rows_per_task(width);
    let source = |e: usize| &x[lists.rows[e] as usize * width..][..width];
    let run = |(task, y): (usize, &mut [T])| {
        with_scratch(width, |sum| {
            for (row, y) in (task * each..).zip(y.chunks_exact_mut(width)) {
                let entries = lists.entries(row);
                if let (1, None) = (entries.len(), weights) {
                    y.copy_from_slice(source(entries.start));
                    continue;
                }
                sum.fill(0.0);
                for e in entries {
                    add_scaled(source(e), weights.map_or(1.0, |weights| weights[lists.weights[e] as usize]), sum);
                }
                convert_slice(sum, y);
            }
        });
    };
    if lists.len() <= each {
        return run((0, y));
    }
    y.par_chunks_mut(each * width).enumerate().for_each(run);
}

simd_fn! {
    fn add_scaled['a; T](x: &'a [T], weight: f32, sum: &'a mut [f32]) -> () {
        for (sum, x) in sum.iter_mut().zip(x) {
            *sum += weight * x.to_f32();
        }
    }
}

/// The gradient of the weights of [`sum_rows`]: `dots[weights[e]]` is the product of `dy[r]` and `x[rows[e]]` for the entry `e` of row `r`, in f32.
pub fn dot_rows<T: Element>(dy: &[T], x: &[T], lists: RowLists, width: usize, dots: &mut [f32]) {
    assert_eq!(dots.len(), lists.rows.len(), "dot_rows: dots");
    let owners = (0..lists.len()).flat_map(|row| lists.entries(row).map(move |_| row)).collect::<Vec<_>>();
    let product = |e: usize| dot(&dy[owners[e] * width..][..width], &x[lists.rows[e] as usize * width..][..width]);
    let by_entry = (0..owners.len()).into_par_iter().with_min_len(rows_per_task(width)).map(product);
    for (weight, dot) in lists.weights.iter().zip(by_entry.collect::<Vec<_>>()) {
        dots[*weight as usize] = dot;
    }
}

simd_fn! {
    fn dot['a; T](a: &'a [T], b: &'a [T]) -> f32 {
        fold2(a, b, |sum, a, b| sum + a * b)
    }
}

/// Where columns of a row-major matrix begin.
#[derive(Clone, Copy, Debug)]
pub struct Columns {
    /// Elements of a whole row.
    pub pitch: usize,
    /// The first column.
    pub first: usize,
}

/// Copies `width` columns of every row of `x` to columns of `y`.
pub fn copy_columns<T: Element>(x: &[T], from: Columns, y: &mut [T], to: Columns, width: usize) {
    assert!(from.pitch > 0 && to.pitch > 0, "copy_columns: rows of nothing");
    assert_eq!(x.len() / from.pitch, y.len() / to.pitch, "copy_columns: rows");
    let rows = rows_per_task(width);
    let copy = |(y, x): (&mut [T], &[T])| {
        for (y, x) in y.chunks_exact_mut(to.pitch).zip(x.chunks_exact(from.pitch)) {
            y[to.first..to.first + width].copy_from_slice(&x[from.first..from.first + width]);
        }
    };
    if y.len() <= rows * to.pitch {
        return copy((y, x));
    }
    y.par_chunks_mut(rows * to.pitch).zip(x.par_chunks(rows * from.pitch)).for_each(copy);
}
