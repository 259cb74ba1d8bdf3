//! Causal attention over packed rows of different lengths, with grouped key-value heads.

use crate::Element;

/// One row of the batch. Causal and aligned at the end: query `i` of the row sees keys `0..=kv_len - q_len + i`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// First token of the row among the queries.
    pub q_start: usize,
    /// Queries of the row.
    pub q_len: usize,
    /// First token of the row among the keys and values.
    pub kv_start: usize,
    /// Keys and values of the row, at least `q_len`.
    pub kv_len: usize,
}

/// The sizes that all rows share.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads, a multiple of `kv_heads`: query head `h` reads key-value head `h / (heads / kv_heads)`.
    pub heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Factor of the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
}

/// `out = softmax(scale * q k^T) v`, row by row and head by head.
pub fn attention_forward<T: Element>(
    q: &[T],
    k: &[T],
    v: &[T],
    segments: &[Segment],
    shape: &AttentionShape,
    out: &mut [T],
    lse: &mut [f32],
) {
    let (h, d, group) = (shape.heads, shape.head_dim, shape.heads / shape.kv_heads);
    for s in segments {
        for i in 0..s.q_len {
            for head in 0..h {
                let at = ((s.q_start + i) * h + head) * d;
                let kv = |j: usize| ((s.kv_start + j) * shape.kv_heads + head / group) * d;
                let keys = s.kv_len - s.q_len + i + 1;
                let scores: Vec<f32> = (0..keys)
                    .map(|j| (0..d).map(|e| q[at + e].to_f32() * k[kv(j) + e].to_f32()).sum::<f32>() * shape.scale)
                    .collect();
                let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let sum: f32 = scores.iter().map(|x| (x - max).exp()).sum();
                lse[(s.q_start + i) * h + head] = max + sum.ln();
                for e in 0..d {
                    let y: f32 = (0..keys).map(|j| (scores[j] - max).exp() / sum * v[kv(j) + e].to_f32()).sum();
                    out[at + e] = T::from_f32(y);
                }
            }
        }
    }
}
