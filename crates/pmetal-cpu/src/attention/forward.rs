//! Attention: queries against keys, softmax, times values.

use super::operands::{Cut, HeadRows, room_for};
use super::tiles::{KEYS, LOWEST, Lanes, MAX_LANES, Running, Tiles, cap, mask};
use super::wide::Wide;
use super::{AttentionShape, Segment};
use crate::Element;
use crate::attention_decode::Decode;
use crate::elementwise::convert_slice;
use crate::scratch::with_scratch;
use crate::shared::Shared;
use crate::tasks::for_each_task;

/// Queries that share one packing of the keys and values; more than this are split into tasks.
const TASK_QUERIES: usize = 512;

/// `out = softmax(scale * q k^T) v` over the keys that each query sees, row by row and head by head.
///
/// `q` and `out` are `[tokens, heads, head_dim]`, `k` and `v` `[kv_tokens, kv_heads, head_dim]`. `lse` (`[tokens, heads]`)
/// receives the logarithm of the sum of exponentials of the scaled scores, for the backward. Rows do not overlap; tokens
/// that belong to no row are left as they are. Where the machine has dot products of bf16, bf16 is multiplied as it is, the
/// probabilities rounded to it; sums and statistics are f32.
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
    let (single, several): (Vec<Segment>, Vec<Segment>) = segments.iter().partition(|segment| segment.q_len == 1);
    Decode { q, k, v, segments: &single, shape }.run(&out, &lse);
    let mut tasks = Vec::new();
    for segment in &several {
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
        #[cfg(target_arch = "x86_64")]
        if super::avx512_bf16::serves::<T>(self.shape.head_dim) {
            return self.by_tiles::<super::avx512_bf16::Dots>();
        }
        self.by_tiles::<Wide>();
    }

    /// The path for many queries.
    fn by_tiles<K: Tiles>(&self) {
        let (d, lanes) = (self.shape.head_dim, K::lanes());
        let base = self.shape.first_seen(self.segment, self.first);
        let keys = self.segment.visible(self.first + self.count - 1) - base;
        let padded = keys.next_multiple_of(K::rows());
        let d_padded = d.next_multiple_of(K::token_panel());
        let packed = [padded * K::pitch(d), d_padded * padded, d * lanes, KEYS * lanes];
        let sums = [d_padded * lanes, KEYS * lanes, lanes * d];
        let room =
            packed.map(room_for::<K::Packed>).iter().sum::<usize>() + sums.map(room_for::<f32>).iter().sum::<usize>();
        with_scratch(room, |scratch| {
            let mut scratch = Cut(scratch);
            let [rows, values, queries, p] = packed.map(|len| scratch.take(len));
            let [result, scores, turned] = sums.map(|len| scratch.take(len));
            K::pack_rows(self.row_of(self.k).part(base, keys), rows);
            K::pack_tokens(self.row_of(self.v).part(base, keys), padded, values);
            for g in 0..self.shape.group() {
                for first in (0..self.count).step_by(lanes) {
                    let panel = self.queries(g).part(first, lanes);
                    K::pack_queries(panel, queries);
                    let last = self.first + first + panel.tokens - 1;
                    let mut task = Panel::<K> {
                        segment: self.segment,
                        shape: self.shape,
                        first: self.first + first,
                        last,
                        base,
                        rows,
                        values,
                        padded,
                        queries,
                        scores,
                        p,
                        result,
                    };
                    let state = task.run();
                    K::turn(result, &state.sum.map(|sum| 1.0 / sum), d, turned);
                    for (i, row) in turned.chunks_exact(d).enumerate().take(panel.tokens) {
                        let lse = state.max[i] * self.shape.scale + state.sum[i].ln();
                        self.store(g, first + i, lse, |out| convert_slice(row, out));
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

/// A panel of queries on its way along the keys.
struct Panel<'a, K: Tiles> {
    segment: &'a Segment,
    shape: &'a AttentionShape,
    /// The first query and the last, counted in their row.
    first: usize,
    last: usize,
    /// Keys and values from the row's key `base` on, packed, with room for `padded` of them.
    base: usize,
    rows: &'a [K::Packed],
    values: &'a [K::Packed],
    padded: usize,
    queries: &'a [K::Packed],
    scores: &'a mut [f32],
    p: &'a mut [K::Packed],
    /// Becomes `[head_dim][lanes]`, not yet divided by the sums.
    result: &'a mut [f32],
}

impl<K: Tiles> Panel<'_, K> {
    fn run(&mut self) -> Running {
        let (d, lanes) = (self.shape.head_dim, K::lanes());
        let keys = self.segment.visible(self.last) - self.base;
        let first = (self.shape.first_seen(self.segment, self.first) - self.base) / K::rows() * K::rows();
        let mut state = Running { max: [LOWEST; MAX_LANES], sum: [0.0; MAX_LANES] };
        self.result.fill(0.0);
        for key in (first..keys).step_by(KEYS) {
            let count = KEYS.min(keys - key);
            let len = count.next_multiple_of(K::rows()) * lanes;
            let (scores, p) = (&mut self.scores[..len], &mut self.p[..len]);
            K::head_products(&self.rows[key * K::pitch(d)..], d, count, self.queries, scores);
            if let Some(softcap) = self.shape.softcap {
                cap(scores, self.shape.scale, softcap);
            }
            mask(self.segment, self.shape, self.first, lanes, self.base + key, scores);
            let factors: Lanes = K::softmax(&mut state, self.shape.scale, scores, p);
            K::key_products(self.values, self.padded, key, count, p, &factors, self.result);
        }
        state
    }
}
