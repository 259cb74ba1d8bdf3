//! Causal attention over packed rows of different lengths, with grouped key-value heads: over all keys, windows or chunks of them, scores
//! with or without a soft cap.
//!
//! The scores never exist beyond a tile: for a panel of queries the softmax is carried along the keys with a running
//! maximum and sum (Milakov and Gimelshein, 2018; Dao et al., "FlashAttention", 2022). How tiles are computed is up to a
//! [`tiles::Tiles`]: in f32 by the loops of the instruction set, or by dot products of bf16.

#[cfg(target_arch = "x86_64")]
mod avx512_bf16;
mod backward;
mod forward;
mod operands;
mod reach;
mod sinks;
mod tiles;
mod wide;

pub use backward::attention_backward;
pub use forward::attention_forward;
pub use reach::Reach;
pub use sinks::{attention_sinks, attention_sinks_backward};
pub use wide::MAX_HEAD_DIM;

/// One row of the batch. Causal and aligned at the end: query `i` of the row sees keys up to `kv_len - q_len + i`.
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

impl Segment {
    /// Keys up to the own of query `i` of the row: with [`AttentionShape::first_seen`] the mask of this kernel.
    #[inline(always)]
    pub(crate) fn visible(&self, i: usize) -> usize {
        self.kv_len - self.q_len + i + 1
    }
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
    /// Factor of the scores, usually `1 / sqrt(head_dim)`; positive.
    pub scale: f32,
    /// What each query sees.
    pub reach: Reach,
    /// Scaled scores become `cap * tanh(score / cap)`; positive.
    pub softcap: Option<f32>,
}

impl AttentionShape {
    /// Query heads per key-value head.
    pub(crate) fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// The first key that query `i` of a row sees.
    #[inline(always)]
    pub(crate) fn first_seen(&self, segment: &Segment, i: usize) -> usize {
        self.reach.first(segment.visible(i) - 1)
    }

    /// Asserts that everything fits together, naming the kernel.
    fn check(&self, name: &str, segments: &[Segment], q: usize, lse: usize, k: usize, v: usize) {
        let Self { heads, kv_heads, head_dim, .. } = *self;
        let largest = MAX_HEAD_DIM;
        assert!(kv_heads > 0 && heads > 0 && heads % kv_heads == 0, "{name}: {heads} heads, {kv_heads} for keys");
        assert!((1..=largest).contains(&head_dim), "{name}: head_dim {head_dim} is not in 1..={largest}");
        assert!(!matches!(self.reach, Reach::Window(0) | Reach::Chunk(0)), "{name}: queries see no key");
        assert!(self.softcap.is_none_or(|cap| cap > 0.0), "{name}: softcap {:?}", self.softcap);
        assert!(q.is_multiple_of(heads * head_dim) && lse * head_dim == q, "{name}: q and lse");
        assert!(k.is_multiple_of(kv_heads * head_dim) && k == v, "{name}: k and v");
        assert!(segments.iter().all(|s| s.q_len <= s.kv_len), "{name}: a row has more queries than keys");
        let q_ranges = segments.iter().map(|s| (s.q_start, s.q_len)).collect();
        assert!(disjoint(q_ranges, q / (heads * head_dim)), "{name}: rows overlap or exceed the queries");
        let kv_ranges = segments.iter().map(|s| (s.kv_start, s.kv_len)).collect();
        assert!(disjoint(kv_ranges, k / (kv_heads * head_dim)), "{name}: rows overlap or exceed the keys");
    }
}

fn disjoint(mut ranges: Vec<(usize, usize)>, total: usize) -> bool {
    ranges.retain(|&(_, len)| len > 0);
    ranges.sort_unstable();
    ranges.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0)
        && ranges.last().is_none_or(|&(start, len)| start + len <= total)
}
