//! Rows times factors, and the sum over heads.

use rayon::prelude::*;

use crate::{Element, simd::rows_per_task, simd::simd_fn};

/// `y = x * factors[row]`, `[rows, width]`: multiplied in f32, rounded once. One factor serves all rows.
pub fn scale_rows<T: Element>(x: &[T], width: usize, factors: &[f32], y: &mut [T]) {
    let rows = x.len().checked_div(width).unwrap_or(0);
    assert!(y.len() == x.len() && x.len() == rows * width, "scale_rows: {} elements, rows of {width}", x.len());
    assert!(factors.len() == rows || factors.len() == 1, "scale_rows: {} factors of {rows} rows", factors.len());
    let each = rows_per_task(width.max(1));
    let chunks = y.par_chunks_mut((each * width).max(1)).zip(x.par_chunks((each * width).max(1))).enumerate();
    chunks.for_each(|(i, (y, x))| {
        for (row, (y, x)) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)).enumerate() {
            scale(x, if factors.len() == 1 { factors[0] } else { factors[i * each + row] }, y);
        }
    });
}

simd_fn! {
    /// `y = x * factor` on this thread.
    fn scale['a; T](x: &'a [T], factor: f32, y: &'a mut [T]) -> () {
        for (y, x) in y.iter_mut().zip(x) {
            *y = T::from_f32(x.to_f32() * factor);
        }
    }
}

/// The sum over the heads of each row: `x [rows, heads * width]`, `y [rows, width]`; f32 inside, rounded once.
pub fn sum_heads<T: Element>(x: &[T], heads: usize, width: usize, y: &mut [T]) {
    assert!(width > 0 && y.len().is_multiple_of(width), "sum_heads: y");
    assert_eq!(x.len(), y.len() * heads, "sum_heads: x");
    if heads == 0 {
        return y.fill(T::ZERO);
    }
    let each = rows_per_task(heads * width);
    y.par_chunks_mut(each * width).zip(x.par_chunks(each * heads * width)).for_each(|(y, x)| {
        let mut sums = vec![0f32; width];
        for (y, x) in y.chunks_exact_mut(width).zip(x.chunks_exact(heads * width)) {
            sums.fill(0.0);
            for head in x.chunks_exact(width) {
                sums.iter_mut().zip(head).for_each(|(sum, x)| *sum += x.to_f32());
            }
            y.iter_mut().zip(&sums).for_each(|(y, &sum)| *y = T::from_f32(sum));
        }
    });
}
