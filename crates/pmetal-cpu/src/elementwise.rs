//! Elementwise sums, conversions, biases and dropout.

use rayon::prelude::*;

use crate::Element;
use crate::random::uniform;
use crate::simd::{CHUNK, column_sums, rows_per_task, simd_fn};

/// `y += x`, rounded to the dtype.
pub fn add_assign<T: Element>(y: &mut [T], x: &[T]) {
    add_assign_mixed(y, x);
}

/// `y += x` for two dtypes, rounded to that of `y`.
pub fn add_assign_mixed<Y: Element, X: Element>(y: &mut [Y], x: &[X]) {
    assert_eq!(y.len(), x.len(), "add_assign: x");
    if y.len() <= CHUNK {
        return add_slice(y, x);
    }
    y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(y, x)| add_slice(y, x));
}

simd_fn! {
    /// `y += x` on this thread.
    pub(crate) fn add_slice['a; Y, X](y: &'a mut [Y], x: &'a [X]) -> () {
        for (y, x) in y.iter_mut().zip(x) {
            *y = Y::from_f32(y.to_f32() + x.to_f32());
        }
    }
}

/// Converts from one dtype to another, rounding to nearest.
pub fn convert<A: Element, B: Element>(src: &[A], dst: &mut [B]) {
    assert_eq!(src.len(), dst.len(), "convert: dst");
    if src.len() <= CHUNK {
        return convert_slice(src, dst);
    }
    dst.par_chunks_mut(CHUNK).zip(src.par_chunks(CHUNK)).for_each(|(dst, src)| convert_slice(src, dst));
}

simd_fn! {
    /// [`convert`] on this thread.
    pub(crate) fn convert_slice['a; A, B](src: &'a [A], dst: &'a mut [B]) -> () {
        for (dst, src) in dst.iter_mut().zip(src) {
            *dst = B::from_f32(src.to_f32());
        }
    }
}

/// Adds `bias` (`[width]`) to every row of `y` (`[rows, width]`).
pub fn bias_add<T: Element, B: Element>(y: &mut [T], bias: &[B], width: usize) {
    assert!(width > 0 && y.len().is_multiple_of(width), "bias_add: y");
    assert_eq!(bias.len(), width, "bias_add: bias");
    let rows = rows_per_task(width);
    let run = |y: &mut [T]| y.chunks_exact_mut(width).for_each(|y| add_slice(y, bias));
    if y.len() <= rows * width {
        return run(y);
    }
    y.par_chunks_mut(rows * width).for_each(run);
}

/// The gradient of [`bias_add`]: `dbias` (`[width]`) grows by the sum of the rows of `dy` (`[rows, width]`).
pub fn bias_grad<T: Element>(dy: &[T], width: usize, dbias: &mut [f32]) {
    assert!(width > 0 && dy.len().is_multiple_of(width), "bias_grad: dy");
    assert_eq!(dbias.len(), width, "bias_grad: dbias");
    column_sums(dy.len() / width, dbias, |row, rows, partial| {
        let block = &dy[row * width..(row + rows) * width];
        block.chunks_exact(width).for_each(|dy| add_slice(partial, dy));
    });
}

/// `y = x * keep / (1 - rate)`, where element `i` is kept if number `i` of the stream `seed` is at least `rate`.
///
/// The mask is a function of seed and index: the same call on the gradient is the backward. `rate` is in `[0, 1)`.
pub fn dropout<T: Element>(x: &[T], y: &mut [T], seed: u64, rate: f32) {
    assert_eq!(x.len(), y.len(), "dropout: y");
    assert!((0.0..1.0).contains(&rate), "dropout: rate {rate} is not in [0, 1)");
    if x.len() <= CHUNK {
        return drop_slice(x, y, seed, 0, rate);
    }
    y.par_chunks_mut(CHUNK)
        .zip(x.par_chunks(CHUNK))
        .enumerate()
        .for_each(|(i, (y, x))| drop_slice(x, y, seed, (i * CHUNK) as u64, rate));
}

simd_fn! {
    fn drop_slice['a; T](x: &'a [T], y: &'a mut [T], seed: u64, first: u64, rate: f32) -> () {
        let factor = 1.0 / (1.0 - rate);
        for ((y, x), i) in y.iter_mut().zip(x).zip(first..) {
            let kept = x.to_f32() * factor;
            *y = T::from_f32(if uniform(seed, i) >= rate { kept } else { 0.0 });
        }
    }
}
