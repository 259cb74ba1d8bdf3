//! Cross-entropy of rows of logits, with and without the gradient.

use rayon::prelude::*;

use crate::math::exp;
use crate::simd::{LANES, fold2, simd_fn, sum_lanes};

/// Replaces every row of logits by its gradient and writes its loss.
///
/// `logits` is `[rows, vocab]`, `labels` and `losses` are `[rows]`. With `p = softmax(row)`: the loss is
/// `-ln p[label]` and the row becomes `grad_scale * (p - onehot(label))`. A negative label means ignored: loss and
/// gradient are zero.
pub fn cross_entropy_rows(logits: &mut [f32], vocab: usize, labels: &[i64], grad_scale: f32, losses: &mut [f32]) {
    check("cross_entropy_rows", logits.len(), vocab, labels, losses.len());
    logits.par_chunks_exact_mut(vocab).zip(labels).zip(losses).for_each(|((row, &label), loss)| {
        if label < 0 {
            row.fill(0.0);
            *loss = 0.0;
        } else {
            *loss = gradient(row, label as usize, grad_scale);
        }
    });
}

/// The losses alone; the logits stay as they are. Shapes and meaning as in [`cross_entropy_rows`].
pub fn cross_entropy_losses(logits: &[f32], vocab: usize, labels: &[i64], losses: &mut [f32]) {
    check("cross_entropy_losses", logits.len(), vocab, labels, losses.len());
    logits.par_chunks_exact(vocab).zip(labels).zip(losses).for_each(|((row, &label), loss)| {
        *loss = if label < 0 { 0.0 } else { loss_of(row, label as usize) };
    });
}

simd_fn! {
    fn gradient['a;](row: &'a mut [f32], label: usize, grad_scale: f32) -> f32 {
        let max = maximum(row);
        let target = row[label];
        let mut sums = [0.0f32; LANES];
        for chunk in row.chunks_mut(LANES) {
            for (sum, x) in sums.iter_mut().zip(chunk) {
                *x = exp(*x - max);
                *sum += *x;
            }
        }
        let sum = sum_lanes(sums);
        let factor = grad_scale / sum;
        row.iter_mut().for_each(|x| *x *= factor);
        row[label] -= grad_scale;
        sum.ln() + (max - target)
    }
}

simd_fn! {
    fn loss_of['a;](row: &'a [f32], label: usize) -> f32 {
        let max = maximum(row);
        let sum = fold2(row, row, |sum, x, _| sum + exp(x - max));
        sum.ln() + (max - row[label])
    }
}

/// The largest number of a row, any NaN aside (the sum of exponentials brings it back).
#[inline(always)]
fn maximum(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, tail) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = if chunk[lane] > lanes[lane] { chunk[lane] } else { lanes[lane] };
        }
    }
    lanes.iter().chain(tail).fold(f32::NEG_INFINITY, |max, &x| if x > max { x } else { max })
}

fn check(name: &str, len: usize, vocab: usize, labels: &[i64], losses: usize) {
    assert!(vocab > 0 && len == labels.len() * vocab, "{name}: {len} logits, {} labels, vocab {vocab}", labels.len());
    assert_eq!(losses, labels.len(), "{name}: losses");
    assert!(labels.iter().all(|&label| label < vocab as i64), "{name}: a label is not below {vocab}");
}
