//! Causal attention over packed rows of different lengths, with grouped key-value heads.
//!
//! The scores never exist beyond a tile: for a panel of queries the softmax is carried along the keys with a running
//! maximum and sum (Milakov and Gimelshein, 2018; Dao et al., "FlashAttention", 2022).

use pulp::{Simd, WithSimd};

use crate::Element;
use crate::attention_decode::decode;
use crate::attention_tiles::{
    HeadRows, KEYS, MAX_HEAD_DIM, head_products, key_products, pitch, tile, tile_queries, tile_rows, write_column,
};
use crate::math::exp;
use crate::scratch::with_scratch;
use crate::shared::Shared;
use crate::simd::{arch, for_each_task};

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

impl Segment {
    /// Keys that query `i` of the row sees: the mask of this kernel, in one place.
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
    /// Factor of the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
}

impl AttentionShape {
    /// Query heads per key-value head.
    pub(crate) fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Asserts that everything fits together, naming the kernel.
    pub(crate) fn check(&self, name: &str, segments: &[Segment], q: usize, lse: usize, k: usize, v: usize) {
        let Self { heads, kv_heads, head_dim, .. } = *self;
        assert!(kv_heads > 0 && heads > 0 && heads % kv_heads == 0, "{name}: {heads} heads, {kv_heads} for keys");
        assert!((1..=MAX_HEAD_DIM).contains(&head_dim), "{name}: head_dim {head_dim} is not in 1..={MAX_HEAD_DIM}");
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

/// Queries that share one packing of the keys and values; more than this are split into tasks.
const TASK_QUERIES: usize = 512;

/// `out = softmax(scale * q k^T) v`, row by row and head by head.
///
/// `q` and `out` are `[tokens, heads, head_dim]`, `k` and `v` `[kv_tokens, kv_heads, head_dim]`. `lse` (`[tokens, heads]`)
/// receives the logarithm of the sum of exponentials of the scaled scores, for the backward. Rows do not overlap; tokens
/// that belong to no row are left as they are.
#[allow(clippy::too_many_arguments)]
pub fn attention_forward<T: Element>(
    q: &[T],
    k: &[T],
    v: &[T],
    segments: &[Segment],
    shape: &AttentionShape,
    out: &mut [T],
    lse: &mut [f32],
) {
    shape.check("attention_forward", segments, q.len(), lse.len(), k.len(), v.len());
    assert_eq!(q.len(), out.len(), "attention_forward: out");
    let (out, lse) = (Shared::new(out), Shared::new(lse));
    let mut tasks = Vec::new();
    for segment in segments {
        for kv_head in 0..shape.kv_heads {
            // The last queries have the most keys: they start first.
            for first in (0..segment.q_len).step_by(TASK_QUERIES).rev() {
                let count = TASK_QUERIES.min(segment.q_len - first);
                tasks.push(Forward { q, k, v, segment, shape, kv_head, first, count, out: &out, lse: &lse });
            }
        }
    }
    for_each_task(tasks.len(), |i| tasks[i].run());
}

/// Some queries of a row, for the query heads of one key-value head.
pub(crate) struct Forward<'a, T> {
    pub q: &'a [T],
    pub k: &'a [T],
    pub v: &'a [T],
    pub segment: &'a Segment,
    pub shape: &'a AttentionShape,
    pub kv_head: usize,
    pub first: usize,
    pub count: usize,
    pub out: &'a Shared<'a, T>,
    pub lse: &'a Shared<'a, f32>,
}

impl<T: Element> Forward<'_, T> {
    fn run(&self) {
        if self.count == 1 { decode(self) } else { self.by_tiles() }
    }

    /// The path for many queries.
    fn by_tiles(&self) {
        let (rows, lanes) = tile();
        let d = self.shape.head_dim;
        let (pitch, panels) = (pitch(d), d.div_ceil(rows));
        let keys = self.segment.visible(self.first + self.count - 1);
        let panel_len = keys * rows;
        let sizes =
            [keys.next_multiple_of(rows) * pitch, panels * panel_len, d * lanes, panels * rows * lanes, KEYS * lanes];
        with_scratch(sizes.iter().sum(), |scratch| {
            let [keys_packed, values, queries, result, tile] = split(scratch, sizes);
            self.row_of(self.k).part(0, keys).pack_rows(pitch, keys_packed);
            self.row_of(self.v).part(0, keys).pack_lanes(rows, panel_len, values);
            let packed = Packed { rows: keys_packed, pitch, values, panel_len };
            for g in 0..self.shape.group() {
                for first in (0..self.count).step_by(lanes) {
                    let rows = self.queries(g).part(first, lanes);
                    rows.pack_transposed(lanes, queries);
                    let (first, count) = (self.first + first, rows.tokens);
                    let (segment, scale) = (self.segment, self.shape.scale);
                    let panel = Panel { segment, scale, first, count, packed: &packed, queries, result, tile };
                    let state = arch().dispatch(panel);
                    for i in 0..count {
                        let lse = state.max[i] + state.sum[i].ln();
                        self.store(g, first - self.first + i, lse, |out| {
                            write_column(result, lanes, i, 1.0 / state.sum[i], out);
                        });
                    }
                }
            }
        });
    }

    /// The keys or values of the row.
    pub(crate) fn row_of<'b>(&self, x: &'b [T]) -> HeadRows<'b, T> {
        let (s, shape) = (self.segment, self.shape);
        HeadRows::new(x, s.kv_start, s.kv_len, shape.kv_heads, self.kv_head, shape.head_dim)
    }

    /// The queries of the task, of head `g` of the group.
    pub(crate) fn queries(&self, g: usize) -> HeadRows<'_, T> {
        let (shape, head) = (self.shape, self.head(g));
        HeadRows::new(self.q, self.segment.q_start + self.first, self.count, shape.heads, head, shape.head_dim)
    }

    fn head(&self, g: usize) -> usize {
        self.kv_head * self.shape.group() + g
    }

    /// Writes the statistic of one query of the task, and its result with `write`.
    pub(crate) fn store(&self, g: usize, query: usize, lse: f32, write: impl FnOnce(&mut [T])) {
        let at = (self.segment.q_start + self.first + query) * self.shape.heads + self.head(g);
        let d = self.shape.head_dim;
        // SAFETY: a query and a head belong to one task, because rows are disjoint (`check`), and the references end with
        // this call.
        let (out, statistic) = unsafe { (self.out.part(at * d, d), self.lse.part(at, 1)) };
        statistic[0] = lse;
        write(out);
    }
}

/// Cuts a buffer into parts of the given sizes.
pub(crate) fn split<const N: usize>(mut buffer: &mut [f32], sizes: [usize; N]) -> [&mut [f32]; N] {
    sizes.map(|size| {
        let (part, rest) = std::mem::take(&mut buffer).split_at_mut(size);
        buffer = rest;
        part
    })
}

/// Keys and values of a task.
struct Packed<'a> {
    rows: &'a [f32],
    pitch: usize,
    values: &'a [f32],
    panel_len: usize,
}

/// Lanes of the widest panel.
pub(crate) const MAX_LANES: usize = 32;

/// The softmax of a panel of queries as far as its keys are known.
struct Running {
    max: [f32; MAX_LANES],
    sum: [f32; MAX_LANES],
}

/// A panel of queries on its way along the keys.
struct Panel<'a> {
    segment: &'a Segment,
    scale: f32,
    /// The first query, counted in its row, and how many there are.
    first: usize,
    count: usize,
    packed: &'a Packed<'a>,
    queries: &'a [f32],
    /// Becomes `[head_dim][lanes]`, not yet divided by the sums.
    result: &'a mut [f32],
    tile: &'a mut [f32],
}

impl WithSimd for Panel<'_> {
    type Output = Running;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Running {
        match tile_rows::<S>() {
            8 => self.run::<S, 8>(simd),
            _ => self.run::<S, 4>(simd),
        }
    }
}

impl Panel<'_> {
    #[inline(always)]
    fn run<S: Simd, const R: usize>(self, simd: S) -> Running {
        let (lanes, packed) = (tile_queries::<S>(), self.packed);
        let keys = self.segment.visible(self.first + self.count - 1);
        let mut state = Running { max: [f32::NEG_INFINITY; MAX_LANES], sum: [0.0; MAX_LANES] };
        self.result.fill(0.0);
        for key in (0..keys).step_by(KEYS) {
            let here = KEYS.min(keys - key);
            let rows = &packed.rows[key * packed.pitch..];
            head_products::<S, R>(simd, rows, packed.pitch, here, self.queries, self.tile);
            let tile = &mut self.tile[..here * lanes];
            mask(self.segment, self.first, lanes, key, tile, f32::NEG_INFINITY);
            let factors = softmax_step(&mut state, lanes, self.scale, tile);
            let factors = column_pair::<S>(&factors);
            key_products::<S, R>(simd, packed.values, packed.panel_len, key, here, tile, &factors, self.result);
        }
        state
    }
}

/// The first two vectors of an array with a number per lane.
#[inline(always)]
pub(crate) fn column_pair<S: Simd>(x: &[f32; MAX_LANES]) -> [S::f32s; 2] {
    let (vectors, _) = S::as_simd_f32s(x);
    [vectors[0], vectors[1]]
}

/// Replaces what a query does not see in a tile `[keys][lanes]` that starts at key `key` and query `first`.
#[inline(always)]
pub(crate) fn mask(segment: &Segment, first: usize, lanes: usize, key: usize, tile: &mut [f32], hidden: f32) {
    let always = segment.visible(first);
    for (i, row) in tile.chunks_exact_mut(lanes).enumerate().skip(always.saturating_sub(key)) {
        // Key `key + i` is the last one that query `first + n` sees; lanes before it do not see it.
        let n = (key + i + 1 - always).min(lanes);
        row[..n].fill(hidden);
    }
}

/// Turns scores into exponentials relative to the new maximum of each query and returns what earlier sums shrink by.
#[inline(always)]
fn softmax_step(state: &mut Running, lanes: usize, scale: f32, tile: &mut [f32]) -> [f32; MAX_LANES] {
    let old = state.max;
    let mut max = old;
    for row in tile.chunks_exact_mut(lanes) {
        for (x, max) in row.iter_mut().zip(&mut max) {
            *x *= scale;
            *max = if *x > *max { *x } else { *max };
        }
    }
    let mut sum = [0.0f32; MAX_LANES];
    for row in tile.chunks_exact_mut(lanes) {
        for ((x, max), sum) in row.iter_mut().zip(&max).zip(&mut sum) {
            *x = exp(*x - max);
            *sum += *x;
        }
    }
    let mut factors = [0.0f32; MAX_LANES];
    for lane in 0..MAX_LANES {
        factors[lane] = exp(old[lane] - max[lane]);
        state.sum[lane] = state.sum[lane] * factors[lane] + sum[lane];
    }
    state.max = max;
    factors
}
