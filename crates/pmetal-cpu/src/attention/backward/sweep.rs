//! A block of queries on its way along a piece of keys.

use super::{Block, Head};
use crate::Element;
use crate::attention::tiles::{Gradients, KEYS, Lanes, MAX_LANES, PANELS, Tiles, cap_gradients, mask};
use crate::attention::{AttentionShape, Segment};
use crate::simd::{fold2, simd_fn};

/// A piece of keys and values, packed.
pub(super) struct Keys<'a, K: Tiles> {
    pub first: usize,
    pub count: usize,
    pub padded: usize,
    pub key_rows: &'a [K::Packed],
    pub value_rows: &'a [K::Packed],
    pub key_tokens: &'a [K::Packed],
}

/// Takes blocks of queries through a piece of keys.
pub(super) struct Sweep<'a, K: Tiles> {
    pub segment: &'a Segment,
    pub shape: &'a AttentionShape,
    pub d: usize,
    pub width: usize,
    pub keys: Keys<'a, K>,
    /// The block, packed: `[PANELS]` of [`Tiles::pack_queries`].
    pub q: &'a mut [K::Packed],
    pub dout: &'a mut [K::Packed],
    /// As [`Tiles::pack_columns`] makes them.
    pub q_columns: &'a mut [K::Packed],
    pub dout_columns: &'a mut [K::Packed],
    /// `[keys][width]`.
    pub dk: &'a mut [f32],
    pub dv: &'a mut [f32],
    /// `[KEYS][lanes]`, of one panel.
    pub scores: &'a mut [f32],
    pub dp: &'a mut [f32],
    /// `[PANELS][KEYS][lanes]`.
    pub p: &'a mut [K::Packed],
    pub ds: &'a mut [K::Packed],
    /// `ds` of one panel for [`Tiles::key_products`].
    pub turned: &'a mut [K::Packed],
    /// A statistic per query: the logarithm of the sum of exponentials, and the product of gradient and result.
    pub lse: [Lanes; PANELS],
    pub delta: [Lanes; PANELS],
}

impl<K: Tiles> Sweep<'_, K> {
    /// Packs a block of queries and their gradients.
    pub(super) fn load<T: Element>(&mut self, head: &Head<T>, block: Block) {
        let (inputs, lanes) = (head.inputs, K::lanes());
        let rows = |x| head.query_rows(x, block);
        let (q, dout, out) = (rows(inputs.q), rows(inputs.dout), rows(inputs.out));
        for (rows, packed) in [(q, &mut *self.q), (dout, &mut *self.dout)] {
            for (p, panel) in packed.chunks_exact_mut(self.d * lanes).enumerate().take(block.count.div_ceil(lanes)) {
                K::pack_queries(rows.part(p * lanes, lanes), panel);
            }
        }
        K::pack_columns(q, self.q_columns);
        K::pack_columns(dout, self.dout_columns);
        for i in 0..PANELS * lanes {
            let (lse, delta) = if i < block.count {
                let query = self.segment.q_start + block.first + i;
                (inputs.lse[query * inputs.shape.heads + block.head], dot(dout.row(i), out.row(i)))
            } else {
                // no query: its probabilities are zero
                (f32::INFINITY, 0.0)
            };
            self.lse[i / lanes][i % lanes] = lse;
            self.delta[i / lanes][i % lanes] = delta;
        }
    }

    /// Adds a block's part of the gradients; `dq` is `[PANELS][head_dim][lanes]`.
    pub(super) fn run(&mut self, block: Block, dq: &mut [f32]) {
        let (lanes, width, first) = (K::lanes(), self.width, self.keys.first);
        let visible = |query| self.segment.visible(query).saturating_sub(first).min(self.keys.count);
        let ends: [usize; PANELS] = std::array::from_fn(|p| {
            let end = block.count.min((p + 1) * lanes);
            if end > p * lanes { visible(block.first + end - 1) } else { 0 }
        });
        let seen = |query| self.shape.first_seen(self.segment, query).saturating_sub(first);
        let starts: [usize; PANELS] = std::array::from_fn(|p| seen(block.first + p * lanes));
        let start = starts[0] / K::rows() * K::rows();
        for key in (start..visible(block.first + block.count - 1)).step_by(KEYS) {
            let counts =
                std::array::from_fn(|p| if starts[p] < key + KEYS { ends[p].saturating_sub(key).min(KEYS) } else { 0 });
            for (p, dq) in dq.chunks_exact_mut(dq.len() / PANELS).enumerate().filter(|&(p, _)| counts[p] > 0) {
                self.score_gradients(block.first + p * lanes, p, key, counts[p], dq);
            }
            K::query_products(self.p, self.dout_columns, &counts, width, &mut self.dv[key * width..]);
            K::query_products(self.ds, self.q_columns, &counts, width, &mut self.dk[key * width..]);
        }
    }

    /// Computes the tiles `p` and `ds` of one panel, whose first query is `first`, and adds the panel's part of `dq`.
    fn score_gradients(&mut self, first: usize, panel: usize, key: usize, count: usize, dq: &mut [f32]) {
        let (lanes, d, pitch) = (K::lanes(), self.d, K::pitch(self.d));
        let used = count.next_multiple_of(K::rows()) * lanes;
        let (scores, dp) = (&mut self.scores[..used], &mut self.dp[..used]);
        let queries = panel * d * lanes..(panel + 1) * d * lanes;
        K::head_products(&self.keys.key_rows[key * pitch..], d, count, &self.q[queries.clone()], scores);
        K::head_products(&self.keys.value_rows[key * pitch..], d, count, &self.dout[queries], dp);
        let (scale, delta) = (self.shape.scale, &self.delta[panel]);
        if let Some(softcap) = self.shape.softcap {
            cap_gradients(scores, dp, lanes, delta, scale, softcap);
        }
        mask(self.segment, self.shape, first, lanes, self.keys.first + key, scores);
        let tile = Gradients { scores, dp, lse: &self.lse[panel], delta, scale };
        let at = panel * KEYS * lanes..panel * KEYS * lanes + used;
        let ds = K::gradients(&tile, &mut self.p[at.clone()], &mut self.ds[at], self.turned);
        K::key_products(self.keys.key_tokens, self.keys.padded, key, count, ds, &[1.0; MAX_LANES], dq);
    }
}

simd_fn! {
    fn dot['a; T](x: &'a [T], y: &'a [T]) -> f32 {
        fold2(x, y, |sum, x, y| x.mul_add(y, sum))
    }
}
