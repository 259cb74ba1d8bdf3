//! Attention of a single query: keys and values stream past once, in their own dtype, for all heads of their group.

use crate::Element;
use crate::attention::Forward;
use crate::elementwise::convert_slice;
use crate::math::exp;
use crate::scratch::with_scratch;
use crate::simd::{fold2, simd_fn};

/// The only query of the task.
pub(crate) fn decode<T: Element>(task: &Forward<T>) {
    let (d, group) = (task.shape.head_dim, task.shape.group());
    let keys = task.segment.visible(task.first);
    let (k, v) = (task.row_of(task.k), task.row_of(task.v));
    with_scratch(group * (2 * d + keys + 1), |scratch| {
        let (queries, scratch) = scratch.split_at_mut(group * d);
        let (results, scratch) = scratch.split_at_mut(group * d);
        let (scores, statistics) = scratch.split_at_mut(group * keys);
        results.fill(0.0);
        for (g, query) in queries.chunks_exact_mut(d).enumerate() {
            convert_slice(task.queries(g).row(0), query);
        }
        for key in 0..keys {
            for (query, scores) in queries.chunks_exact(d).zip(scores.chunks_exact_mut(keys)) {
                scores[key] = dot(query, k.row(key)) * task.shape.scale;
            }
        }
        for (scores, lse) in scores.chunks_exact_mut(keys).zip(statistics.iter_mut()) {
            let (max, sum) = softmax(scores);
            *lse = max + sum.ln();
        }
        for key in 0..keys {
            for (result, scores) in results.chunks_exact_mut(d).zip(scores.chunks_exact(keys)) {
                add_scaled(scores[key], v.row(key), result);
            }
        }
        for (g, (result, &lse)) in results.chunks_exact(d).zip(statistics.iter()).enumerate() {
            task.store(g, 0, lse, |out| convert_slice(result, out));
        }
    });
}

simd_fn! {
    fn dot['a; T](x: &'a [f32], y: &'a [T]) -> f32 {
        fold2(x, y, |sum, x, y| x.mul_add(y, sum))
    }
}

simd_fn! {
    fn add_scaled['a; T](factor: f32, x: &'a [T], sum: &'a mut [f32]) -> () {
        for (sum, x) in sum.iter_mut().zip(x) {
            *sum = factor.mul_add(x.to_f32(), *sum);
        }
    }
}

simd_fn! {
    /// Scores to probabilities; returns their maximum and the sum of exponentials relative to it.
    fn softmax['a;](scores: &'a mut [f32]) -> (f32, f32) {
        let max = scores.iter().fold(f32::NEG_INFINITY, |max, &x| if x > max { x } else { max });
        scores.iter_mut().for_each(|x| *x = exp(*x - max));
        let sum = fold2(scores, scores, |sum, x, _| sum + x);
        let factor = 1.0 / sum;
        scores.iter_mut().for_each(|x| *x *= factor);
        (max, sum)
    }
}
