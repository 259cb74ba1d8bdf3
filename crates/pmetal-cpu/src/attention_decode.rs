//! Attention of single queries, as in decoding: keys and values stream past once, in their own dtype, for all heads together.
//!
//! The keys of a row are cut into chunks. Each is a task with a softmax of its own; their results are joined in order, each weighted by its
//! share of the sum (Dao et al., "Flash-Decoding", 2023).

use pulp::{Simd, WithSimd};

use crate::Element;
use crate::attention::{AttentionShape, Segment};
use crate::elementwise::convert_slice;
use crate::math::{exp, tanh};
use crate::scratch::with_scratch;
use crate::shared::Shared;
use crate::simd::{arch, fold2, simd_fn};
use crate::tasks::for_each_task;

/// Bytes of the keys of a chunk.
const CHUNK_BYTES: usize = 1 << 15;
/// Keys and values that are widened together.
const TOGETHER: usize = 4;
/// Heads are filled up with zeros to a multiple of this, the widest vector.
const LANES: usize = 16;
/// Numbers of partial results below which threads cost more than they bring.
const SMALL: usize = 1 << 15;

/// Rows with a single query; `segments` are some of those that [`AttentionShape::check`] saw.
pub(crate) struct Decode<'a, T> {
    pub q: &'a [T],
    pub k: &'a [T],
    pub v: &'a [T],
    pub segments: &'a [Segment],
    pub shape: &'a AttentionShape,
}

impl<T: Element> Decode<'_, T> {
    /// Writes the results and the statistics of the rows' queries.
    pub(crate) fn run(&self, out: &Shared<T>, lse: &Shared<f32>) {
        let AttentionShape { heads, head_dim, .. } = *self.shape;
        let pitch = head_dim.next_multiple_of(LANES);
        let chunks: Vec<Chunk> = self.chunks();
        let (queries_len, partial_len) = (self.segments.len() * heads * pitch, heads * (pitch + 2));
        with_scratch(queries_len + chunks.len() * partial_len, |scratch| {
            let (queries, partials) = scratch.split_at_mut(queries_len);
            self.widen_queries(pitch, queries);
            let shared = Shared::new(partials);
            for_each_task(chunks.len(), |i| {
                // SAFETY: the partial results of a chunk belong to its task.
                let partials = unsafe { shared.part(i * partial_len, partial_len) };
                self.attend(&chunks[i], pitch, queries, partials);
            });
            self.join(&chunks, pitch, partials, out, lse);
        });
    }

    /// The keys that the rows' queries see, cut by the shape alone.
    fn chunks(&self) -> Vec<Chunk> {
        let bytes = self.shape.kv_heads * self.shape.head_dim * size_of::<T>();
        let len = (CHUNK_BYTES / bytes).next_multiple_of(TOGETHER).max(4 * TOGETHER);
        let of_row = |(row, segment): (usize, &Segment)| {
            let keys = segment.kv_len;
            (self.shape.first_seen(segment, 0)..keys).step_by(len).map(move |first| Chunk {
                row,
                first,
                keys: len.min(keys - first),
            })
        };
        self.segments.iter().enumerate().flat_map(of_row).collect()
    }

    /// `[rows][heads][pitch]`.
    fn widen_queries(&self, pitch: usize, queries: &mut [f32]) {
        let AttentionShape { heads, head_dim, .. } = *self.shape;
        for (segment, queries) in self.segments.iter().zip(queries.chunks_exact_mut(heads * pitch)) {
            let query = &self.q[segment.q_start * heads * head_dim..][..heads * head_dim];
            for (wide, query) in queries.chunks_exact_mut(pitch).zip(query.chunks_exact(head_dim)) {
                convert_slice(query, &mut wide[..head_dim]);
                wide[head_dim..].fill(0.0);
            }
        }
    }

    /// The partial results of a chunk.
    fn attend(&self, chunk: &Chunk, pitch: usize, queries: &[f32], partials: &mut [f32]) {
        let (group, padded) = (self.shape.group(), chunk.keys.next_multiple_of(TOGETHER));
        let width = self.shape.kv_heads * self.shape.head_dim;
        let start = (self.segments[chunk.row].kv_start + chunk.first) * width;
        let rows = start..start + chunk.keys * width;
        with_scratch(group * padded + TOGETHER * pitch, |scratch| {
            let (scores, wide) = scratch.split_at_mut(group * padded);
            wide.fill(0.0);
            arch().dispatch(Attend {
                shape: self.shape,
                pitch,
                queries: &queries[chunk.row * self.shape.heads * pitch..],
                k: &self.k[rows.clone()],
                v: &self.v[rows],
                keys: chunk.keys,
                scores,
                wide,
                partials,
            });
        });
    }

    fn join(&self, chunks: &[Chunk], pitch: usize, partials: &[f32], out: &Shared<T>, lse: &Shared<f32>) {
        let AttentionShape { heads, head_dim, .. } = *self.shape;
        let mut first = 0;
        for (row, segment) in self.segments.iter().enumerate() {
            let count = chunks[first..].iter().take_while(|chunk| chunk.row == row).count();
            let partials = &partials[first * heads * (pitch + 2)..][..count * heads * (pitch + 2)];
            let join_head = |head: usize| {
                let at = segment.q_start * heads + head;
                // SAFETY: a query and a head belong to one task, because rows are disjoint (`check`).
                let (out, statistic) = unsafe { (out.part(at * head_dim, head_dim), lse.part(at, 1)) };
                with_scratch(pitch, |sum| {
                    statistic[0] = join(partials, heads * (pitch + 2), head * (pitch + 2), sum);
                    convert_slice(&sum[..head_dim], out);
                });
            };
            if partials.len() <= SMALL {
                (0..heads).for_each(join_head)
            } else {
                for_each_task(heads, join_head)
            }
            first += count;
        }
    }
}

/// Consecutive keys of a row.
struct Chunk {
    /// The row, counted among the segments.
    row: usize,
    first: usize,
    keys: usize,
}

/// The keys and values of a chunk, for all heads of one query.
struct Attend<'a, T> {
    shape: &'a AttentionShape,
    pitch: usize,
    /// `[heads][pitch]`.
    queries: &'a [f32],
    k: &'a [T],
    v: &'a [T],
    keys: usize,
    /// Room for `[group][keys]`, keys filled up to whole blocks of [`TOGETHER`].
    scores: &'a mut [f32],
    /// `[TOGETHER][pitch]`, zeros behind the heads.
    wide: &'a mut [f32],
    /// Becomes `[heads][pitch + 2]`: the result relative to the greatest score, that score, and the sum of exponentials.
    partials: &'a mut [f32],
}

impl<T: Element> WithSimd for Attend<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (pitch, padded) = (self.pitch, self.keys.next_multiple_of(TOGETHER));
        let (d, group) = (self.shape.head_dim, self.shape.group());
        let stride = self.shape.kv_heads * d;
        let heads = self.queries.chunks_exact(group * pitch).zip(self.partials.chunks_exact_mut(group * (pitch + 2)));
        for (kv_head, (queries, partials)) in heads.enumerate() {
            let (k, v) = (&self.k[kv_head * d..], &self.v[kv_head * d..]);
            for key in (0..self.keys).step_by(TOGETHER) {
                widen(&k[key * stride..], stride, d, self.keys - key, pitch, self.wide);
                for (query, scores) in queries.chunks_exact(pitch).zip(self.scores.chunks_exact_mut(padded)) {
                    let dots = dots(simd, query, self.wide, pitch);
                    for (score, dot) in scores[key..][..TOGETHER].iter_mut().zip(dots) {
                        *score = dot * self.shape.scale;
                    }
                }
            }
            for (scores, partial) in self.scores.chunks_exact_mut(padded).zip(partials.chunks_exact_mut(pitch + 2)) {
                if let Some(cap) = self.shape.softcap {
                    scores.iter_mut().for_each(|x| *x = cap * tanh(*x / cap));
                }
                let (max, sum) = exponentials(&mut scores[..self.keys]);
                scores[self.keys..].fill(0.0);
                partial.fill(0.0);
                (partial[pitch], partial[pitch + 1]) = (max, sum);
            }
            for key in (0..self.keys).step_by(TOGETHER) {
                widen(&v[key * stride..], stride, d, self.keys - key, pitch, self.wide);
                for (scores, partial) in self.scores.chunks_exact(padded).zip(partials.chunks_exact_mut(pitch + 2)) {
                    if let Some(factors) = scores[key..].first_chunk() {
                        add_scaled(simd, factors, self.wide, pitch, &mut partial[..pitch]);
                    }
                }
            }
        }
    }
}

/// Widens the first [`TOGETHER`] rows of `d` elements; those beyond `count` become zero.
#[inline(always)]
fn widen<T: Element>(rows: &[T], stride: usize, d: usize, count: usize, pitch: usize, wide: &mut [f32]) {
    for (i, wide) in wide.chunks_exact_mut(pitch).enumerate() {
        if i < count {
            for (y, x) in wide[..d].iter_mut().zip(&rows[i * stride..][..d]) {
                *y = x.to_f32();
            }
        } else {
            wide.fill(0.0);
        }
    }
}

/// The products of a query with the widened rows.
#[inline(always)]
fn dots<S: Simd>(simd: S, query: &[f32], wide: &[f32], pitch: usize) -> [f32; TOGETHER] {
    let (query, _) = S::as_simd_f32s(query);
    let rows = rows_of::<S>(wide, pitch, query.len());
    let mut sums = [simd.splat_f32s(0.0); TOGETHER];
    for (i, &q) in query.iter().enumerate() {
        for (sum, row) in sums.iter_mut().zip(rows) {
            *sum = simd.mul_add_e_f32s(q, row[i], *sum);
        }
    }
    // no `map`: its closure would not be compiled for the instruction set
    let mut dots = [0.0; TOGETHER];
    for (dot, sum) in dots.iter_mut().zip(sums) {
        *dot = simd.reduce_sum_f32s(sum);
    }
    dots
}

/// `sum += factors * rows`.
#[inline(always)]
fn add_scaled<S: Simd>(simd: S, factors: &[f32; TOGETHER], wide: &[f32], pitch: usize, sum: &mut [f32]) {
    let (sum, _) = S::as_mut_simd_f32s(sum);
    let rows = rows_of::<S>(wide, pitch, sum.len());
    let mut vectors = [simd.splat_f32s(0.0); TOGETHER];
    for (vector, &factor) in vectors.iter_mut().zip(factors) {
        *vector = simd.splat_f32s(factor);
    }
    for (i, sum) in sum.iter_mut().enumerate() {
        let mut total = *sum;
        for (factor, row) in vectors.into_iter().zip(rows) {
            total = simd.mul_add_e_f32s(factor, row[i], total);
        }
        *sum = total;
    }
}

/// The widened rows, `len` vectors each.
#[inline(always)]
fn rows_of<S: Simd>(wide: &[f32], pitch: usize, len: usize) -> [&[S::f32s]; TOGETHER] {
    std::array::from_fn(|i| &S::as_simd_f32s(&wide[i * pitch..][..pitch]).0[..len])
}

/// Scores to exponentials relative to the greatest; returns that and their sum.
#[inline(always)]
fn exponentials(scores: &mut [f32]) -> (f32, f32) {
    let max = scores.iter().fold(f32::NEG_INFINITY, |max, &x| if x > max { x } else { max });
    scores.iter_mut().for_each(|x| *x = exp(*x - max));
    let sum = fold2(scores, scores, |sum, x, _| sum + x);
    (max, sum)
}

simd_fn! {
    /// Joins the partial results that begin at `first` and lie `stride` apart, each `[result][max, sum]`, into `result`; returns the logarithm
    /// of the sum of exponentials.
    fn join['a;](partials: &'a [f32], stride: usize, first: usize, result: &'a mut [f32]) -> f32 {
        let pitch = result.len();
        let parts = || partials[first..].chunks(stride).map(|partial| (&partial[..pitch], partial[pitch], partial[pitch + 1]));
        let max = parts().fold(f32::NEG_INFINITY, |max, (_, x, _)| if x > max { x } else { max });
        let sum = parts().fold(0.0, |total, (_, x, sum)| total + exp(x - max) * sum);
        result.fill(0.0);
        for (part, x, _) in parts() {
            let factor = exp(x - max) / sum;
            for (result, x) in result.iter_mut().zip(part) {
                *result = factor.mul_add(*x, *result);
            }
        }
        max + sum.ln()
    }
}
