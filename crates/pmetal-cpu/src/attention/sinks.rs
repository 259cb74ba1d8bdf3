//! Sinks: one logit more in the softmax of each query of a head, whose share is dropped.
//!
//! They need no kernel of attention's own: with the statistics of the softmax without them its results are scaled, and whoever computes
//! probabilities from the new statistics, as the backward does, computes the right ones.
//! Source: Xiao et al., "Efficient streaming language models with attention sinks", 2024.

use rayon::prelude::*;

use crate::Element;
use crate::simd::{column_sums, fold2, rows_per_task, simd_fn};

/// Takes the results of [`crate::attention_forward`], `out [tokens, heads, head_dim]` and `lse [tokens, heads]`, to those with sinks in
/// the softmax; `sinks` has one for each head.
pub fn attention_sinks<T: Element>(sinks: &[f32], out: &mut [T], lse: &mut [f32]) {
    let heads = sinks.len();
    if lse.is_empty() {
        return;
    }
    assert!(lse.len().is_multiple_of(heads) && out.len().is_multiple_of(lse.len()), "attention_sinks: sizes");
    let (width, rows) = (out.len() / lse.len(), rows_per_task(heads * (out.len() / lse.len())));
    let tasks = out.par_chunks_mut(rows * heads * width).zip(lse.par_chunks_mut(rows * heads));
    tasks.for_each(|(out, lse)| {
        for ((out, lse), sink) in out.chunks_exact_mut(width).zip(lse).zip(sinks.iter().cycle()) {
            let with = lse.max(*sink) + (-(*lse - sink).abs()).exp().ln_1p();
            scale(out, (*lse - with).exp());
            *lse = with;
        }
    });
}

/// The gradients of the sinks from that of the result, `dout`, and what [`attention_sinks`] left in `out` and `lse`:
/// `-sum over queries of exp(sink - lse) * rowsum(dout * out)`.
pub fn attention_sinks_backward<T: Element>(sinks: &[f32], dout: &[T], out: &[T], lse: &[f32]) -> Vec<f32> {
    let heads = sinks.len();
    let mut sums = vec![0.0; heads];
    if lse.is_empty() {
        return sums;
    }
    assert!(lse.len().is_multiple_of(heads) && out.len().is_multiple_of(lse.len()), "attention_sinks_backward: sizes");
    assert_eq!(dout.len(), out.len(), "attention_sinks_backward: dout");
    let width = out.len() / lse.len();
    column_sums(lse.len() / heads, &mut sums, |first, rows, partial| {
        let (dout, out) = (&dout[first * heads * width..], &out[first * heads * width..]);
        let rows = dout.chunks_exact(width).zip(out.chunks_exact(width)).zip(&lse[first * heads..][..rows * heads]);
        for (i, ((dout, out), lse)) in rows.enumerate() {
            partial[i % heads] -= (sinks[i % heads] - lse).exp() * dot(dout, out);
        }
    });
    sums
}

simd_fn! {
    fn scale['a; T](x: &'a mut [T], factor: f32) -> () {
        for x in x {
            *x = T::from_f32(x.to_f32() * factor);
        }
    }
}

simd_fn! {
    fn dot['a; T](x: &'a [T], y: &'a [T]) -> f32 {
        fold2(x, y, |sum, x, y| x.mul_add(y, sum))
    }
}
