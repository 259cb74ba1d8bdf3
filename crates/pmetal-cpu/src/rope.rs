//! Rotary position embedding (Su et al., 2021) on half-split pairs, in place.

use rayon::prelude::*;

use crate::Element;
use crate::simd::{CHUNK, rows_per_task, simd_fn};

/// Rotates the pairs `(i, i + head_dim / 2)` of every head by the angle of its token and frequency.
///
/// `x` is `[tokens, heads, head_dim]`; `cos` and `sin` are `[tokens, head_dim / 2]`, any attention factor already in
/// them. `inverse` rotates back by the same angle, which is the backward. The rotation is f32, rounded once.
pub fn rope<T: Element>(x: &mut [T], heads: usize, head_dim: usize, cos: &[f32], sin: &[f32], inverse: bool) {
    assert!(head_dim > 0 && head_dim.is_multiple_of(2), "rope: head_dim {head_dim} is not even");
    let (width, half) = (heads * head_dim, head_dim / 2);
    assert!(width > 0 && x.len().is_multiple_of(width), "rope: x has {} elements, width {width}", x.len());
    let tokens = x.len() / width;
    assert_eq!(cos.len(), tokens * half, "rope: cos");
    assert_eq!(sin.len(), tokens * half, "rope: sin");
    if x.len() <= CHUNK {
        return rotate(x, width, head_dim, cos, sin, inverse);
    }
    let rows = rows_per_task(width);
    x.par_chunks_mut(rows * width)
        .zip(cos.par_chunks(rows * half))
        .zip(sin.par_chunks(rows * half))
        .for_each(|((x, cos), sin)| rotate(x, width, head_dim, cos, sin, inverse));
}

simd_fn! {
    fn rotate['a; T](x: &'a mut [T], width: usize, head_dim: usize, cos: &'a [f32], sin: &'a [f32], inverse: bool) -> () {
        let half = head_dim / 2;
        let sign = if inverse { -1.0 } else { 1.0 };
        for ((token, cos), sin) in x.chunks_exact_mut(width).zip(cos.chunks_exact(half)).zip(sin.chunks_exact(half)) {
            for head in token.chunks_exact_mut(head_dim) {
                let (low, high) = head.split_at_mut(half);
                for (((a, b), &c), &s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                    let (x, y, s) = (a.to_f32(), b.to_f32(), s * sign);
                    *a = T::from_f32(x * c - y * s);
                    *b = T::from_f32(y * c + x * s);
                }
            }
        }
    }
}
