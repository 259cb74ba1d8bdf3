//! The gradient of attention, with the probabilities computed again tile by tile from the statistics of the forward.

use pulp::{Simd, WithSimd};

use crate::Element;
use crate::attention::{AttentionShape, MAX_LANES, Segment, column_pair, mask, split};
use crate::attention_tiles::{
    HeadRows, KEYS, add_query_products, head_products, key_products, pitch, tile, tile_queries, tile_rows, write_column,
};
use crate::elementwise::convert_slice;
use crate::math::exp;
use crate::scratch::with_scratch;
use crate::shared::Shared;
use crate::simd::{arch, fold2, for_each_task, simd_fn};

/// The gradients of `q`, `k` and `v` from that of the result, `dout`, and what the forward gave, `out` and `lse`.
///
/// With `p = exp(scale * q k^T - lse)`: `dv = p^T dout`, `ds = scale * p * (dout v^T - rowsum(dout * out))`, `dq = ds k`,
/// `dk = ds^T q`. `dk` and `dv` are summed over the query heads of a group in f32 and rounded once. Shapes are those of
/// [`crate::attention_forward`]; the gradients are overwritten, zero for tokens that belong to no row.
#[allow(clippy::too_many_arguments)]
pub fn attention_backward<T: Element>(
    dout: &[T],
    q: &[T],
    k: &[T],
    v: &[T],
    out: &[T],
    lse: &[f32],
    segments: &[Segment],
    shape: &AttentionShape,
    dq: &mut [T],
    dk: &mut [T],
    dv: &mut [T],
) {
    shape.check("attention_backward", segments, q.len(), lse.len(), k.len(), v.len());
    for (name, len) in [("dout", dout.len()), ("out", out.len()), ("dq", dq.len())] {
        assert_eq!(q.len(), len, "attention_backward: {name}");
    }
    assert!(dk.len() == k.len() && dv.len() == k.len(), "attention_backward: dk and dv");
    if segments.iter().map(|s| s.q_len).sum::<usize>() * shape.heads * shape.head_dim < q.len() {
        dq.fill(T::ZERO);
    }
    if segments.iter().map(|s| s.kv_len).sum::<usize>() * shape.kv_heads * shape.head_dim < k.len() {
        dk.fill(T::ZERO);
        dv.fill(T::ZERO);
    }
    let (dq, dk, dv) = (Shared::new(dq), Shared::new(dk), Shared::new(dv));
    let mut tasks = Vec::new();
    for segment in segments.iter().filter(|s| s.kv_len > 0) {
        for kv_head in 0..shape.kv_heads {
            let inputs = Inputs { dout, q, k, v, out, lse };
            tasks.push(Task { inputs, segment, shape, kv_head, dq: &dq, dk: &dk, dv: &dv });
        }
    }
    for_each_task(tasks.len(), |i| tasks[i].run());
}

#[derive(Clone, Copy)]
struct Inputs<'a, T> {
    dout: &'a [T],
    q: &'a [T],
    k: &'a [T],
    v: &'a [T],
    out: &'a [T],
    lse: &'a [f32],
}

/// A row and one of its key-value heads, with the query heads of its group.
struct Task<'a, T> {
    inputs: Inputs<'a, T>,
    segment: &'a Segment,
    shape: &'a AttentionShape,
    kv_head: usize,
    dq: &'a Shared<'a, T>,
    dk: &'a Shared<'a, T>,
    dv: &'a Shared<'a, T>,
}

/// Panels of queries that go through the keys together, so that sums over the queries are not too short.
const PANELS: usize = 4;

/// Keys and values of the task, packed, and the sums of their gradients.
struct Keys<'a> {
    pitch: usize,
    key_rows: &'a [f32],
    value_rows: &'a [f32],
    key_lanes: &'a [f32],
    panel_len: usize,
    /// `[keys rounded up][columns]`.
    dk: &'a mut [f32],
    dv: &'a mut [f32],
    /// The head's elements, rounded up to whole panels.
    columns: usize,
}

/// A block of queries of one head, packed, with its statistics and its tiles.
struct Queries<'a> {
    first: usize,
    count: usize,
    /// `[PANELS][head_dim][lanes]`.
    q: &'a mut [f32],
    dout: &'a mut [f32],
    /// `[columns / lanes][PANELS * lanes][lanes]`.
    q_columns: &'a mut [f32],
    dout_columns: &'a mut [f32],
    /// `[PANELS][head_dim rounded up][lanes]`.
    dq: &'a mut [f32],
    /// `[PANELS][KEYS][lanes]`.
    p: &'a mut [f32],
    ds: &'a mut [f32],
    /// A statistic per query: the logarithm of the sum of exponentials, and the product of gradient and result.
    lse: [[f32; MAX_LANES]; PANELS],
    delta: [[f32; MAX_LANES]; PANELS],
}

impl<T: Element> Task<'_, T> {
    fn run(&self) {
        let (d, kv_len, (rows, lanes)) = (self.shape.head_dim, self.segment.kv_len, tile());
        let (pitch, columns, block) = (pitch(d), d.next_multiple_of(lanes), PANELS * lanes);
        let (padded, panel_len, d_padded) = (kv_len.next_multiple_of(rows), kv_len * rows, d.next_multiple_of(rows));
        let keys = [padded * pitch, padded * pitch, d_padded * kv_len, padded * columns, padded * columns];
        let queries =
            [block * d, block * d, block * columns, block * columns, block * d_padded, block * KEYS, block * KEYS];
        with_scratch(keys.iter().chain(&queries).sum(), |scratch| {
            let (scratch_keys, scratch) = scratch.split_at_mut(keys.iter().sum());
            let [key_rows, value_rows, key_lanes, dk, dv] = split(scratch_keys, keys);
            let [q, dout, q_columns, dout_columns, dq, p, ds] = split(scratch, queries);
            self.row_of(self.inputs.k).pack_rows(pitch, key_rows);
            self.row_of(self.inputs.v).pack_rows(pitch, value_rows);
            self.row_of(self.inputs.k).pack_lanes(rows, panel_len, key_lanes);
            dk.fill(0.0);
            dv.fill(0.0);
            let mut keys = Keys { pitch, key_rows, value_rows, key_lanes, panel_len, dk, dv, columns };
            let (lse, delta) = ([[0.0; MAX_LANES]; PANELS], [[0.0; MAX_LANES]; PANELS]);
            let mut queries = Queries { first: 0, count: 0, q, dout, q_columns, dout_columns, dq, p, ds, lse, delta };
            for g in 0..self.shape.group() {
                for first in (0..self.segment.q_len).step_by(block) {
                    (queries.first, queries.count) = (first, block.min(self.segment.q_len - first));
                    self.load(&mut queries, g, lanes, columns);
                    let (segment, shape) = (self.segment, self.shape);
                    arch().dispatch(Sweep { segment, shape, keys: &mut keys, block: &mut queries });
                    self.store_queries(&queries, g, lanes);
                }
            }
            for i in 0..kv_len {
                let at = ((self.segment.kv_start + i) * self.shape.kv_heads + self.kv_head) * d;
                // SAFETY: a key and a key-value head belong to one task, because rows are disjoint (`check`).
                let (dk, dv) = unsafe { (self.dk.part(at, d), self.dv.part(at, d)) };
                convert_slice(&keys.dk[i * columns..][..d], dk);
                convert_slice(&keys.dv[i * columns..][..d], dv);
            }
        });
    }

    fn row_of<'b>(&self, x: &'b [T]) -> HeadRows<'b, T> {
        let (s, shape) = (self.segment, self.shape);
        HeadRows::new(x, s.kv_start, s.kv_len, shape.kv_heads, self.kv_head, shape.head_dim)
    }

    fn head(&self, g: usize) -> usize {
        self.kv_head * self.shape.group() + g
    }

    /// Packs a block of queries and their gradients.
    fn load(&self, block: &mut Queries, g: usize, lanes: usize, columns: usize) {
        let (d, heads, head) = (self.shape.head_dim, self.shape.heads, self.head(g));
        let start = self.segment.q_start + block.first;
        let rows = |x| HeadRows::new(x, start, block.count, heads, head, d);
        let (q, dout, out) = (rows(self.inputs.q), rows(self.inputs.dout), rows(self.inputs.out));
        for (rows, packed) in [(q, &mut *block.q), (dout, &mut *block.dout)] {
            for (p, panel) in packed.chunks_exact_mut(d * lanes).enumerate().take(block.count.div_ceil(lanes)) {
                rows.part(p * lanes, lanes).pack_transposed(lanes, panel);
            }
        }
        // Queries that are not there must not leave what an earlier block left: their probability is zero, but zero
        // times NaN is not.
        if block.count < PANELS * lanes {
            block.q_columns.fill(0.0);
            block.dout_columns.fill(0.0);
        }
        let panel_len = PANELS * lanes * lanes;
        q.pack_lanes(lanes, panel_len, &mut block.q_columns[..columns * PANELS * lanes]);
        dout.pack_lanes(lanes, panel_len, &mut block.dout_columns[..columns * PANELS * lanes]);
        block.dq.fill(0.0);
        for i in 0..PANELS * lanes {
            let (lse, delta) = if i < block.count {
                (self.inputs.lse[(start + i) * heads + head], dot(dout.row(i), out.row(i)))
            } else {
                (f32::INFINITY, 0.0)
            };
            block.lse[i / lanes][i % lanes] = lse;
            block.delta[i / lanes][i % lanes] = delta;
        }
    }

    /// Writes the gradients of a block of queries.
    fn store_queries(&self, block: &Queries, g: usize, lanes: usize) {
        let d = self.shape.head_dim;
        let panel_len = block.dq.len() / PANELS;
        for i in 0..block.count {
            let at = ((self.segment.q_start + block.first + i) * self.shape.heads + self.head(g)) * d;
            // SAFETY: a query and a head belong to one task, because rows are disjoint (`check`).
            let row = unsafe { self.dq.part(at, d) };
            write_column(&block.dq[i / lanes * panel_len..][..panel_len], lanes, i % lanes, 1.0, row);
        }
    }
}

/// Takes a block of queries through all its keys.
struct Sweep<'a, 'b> {
    segment: &'a Segment,
    shape: &'a AttentionShape,
    keys: &'a mut Keys<'b>,
    block: &'a mut Queries<'b>,
}

impl WithSimd for Sweep<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match tile_rows::<S>() {
            8 => self.run::<S, 8>(simd),
            _ => self.run::<S, 4>(simd),
        }
    }
}

impl Sweep<'_, '_> {
    #[inline(always)]
    fn run<S: Simd, const R: usize>(self, simd: S) {
        let Self { segment, shape, keys, block } = self;
        let lanes = tile_queries::<S>();
        let last = segment.visible(block.first + block.count - 1);
        for key in (0..last).step_by(KEYS) {
            let mut counts = [0; PANELS];
            for (p, count) in counts.iter_mut().enumerate().take(block.count.div_ceil(lanes)) {
                let end = (block.first + (p + 1) * lanes).min(block.first + block.count);
                *count = segment.visible(end - 1).saturating_sub(key).min(KEYS);
                if *count > 0 {
                    score_gradients::<S, R>(simd, segment, shape, keys, block, p, key, *count);
                }
            }
            add_over_queries::<S, R>(simd, block.p, block.dout_columns, &counts, key, keys.columns, keys.dv);
            add_over_queries::<S, R>(simd, block.ds, block.q_columns, &counts, key, keys.columns, keys.dk);
        }
    }
}

/// Computes the tiles `p` and `ds` of one panel and adds the panel's part of `dq`.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn score_gradients<S: Simd, const R: usize>(
    simd: S,
    segment: &Segment,
    shape: &AttentionShape,
    keys: &Keys,
    block: &mut Queries,
    panel: usize,
    key: usize,
    count: usize,
) {
    let (lanes, d, pitch) = (tile_queries::<S>(), shape.head_dim, keys.pitch);
    let used = count.next_multiple_of(R) * lanes;
    let p = &mut block.p[panel * KEYS * lanes..][..used];
    let ds = &mut block.ds[panel * KEYS * lanes..][..used];
    let queries = panel * d * lanes..(panel + 1) * d * lanes;
    head_products::<S, R>(simd, &keys.key_rows[key * pitch..], pitch, count, &block.q[queries.clone()], p);
    head_products::<S, R>(simd, &keys.value_rows[key * pitch..], pitch, count, &block.dout[queries], ds);
    let (lse, delta, scale) = (&block.lse[panel], &block.delta[panel], shape.scale);
    for (p, ds) in p.chunks_exact_mut(lanes).zip(ds.chunks_exact_mut(lanes)) {
        for (((p, ds), lse), delta) in p.iter_mut().zip(ds).zip(lse).zip(delta) {
            *p = exp(*p * scale - lse);
            *ds = *p * (*ds - delta) * scale;
        }
    }
    let first = block.first + panel * lanes;
    mask(segment, first, lanes, key, p, 0.0);
    mask(segment, first, lanes, key, ds, 0.0);
    let d_padded = d.next_multiple_of(R);
    let dq = &mut block.dq[panel * d_padded * lanes..][..d_padded * lanes];
    let factors = column_pair::<S>(&[1.0; MAX_LANES]);
    key_products::<S, R>(simd, keys.key_lanes, keys.panel_len, key, count, ds, &factors, dq);
}

simd_fn! {
    fn dot['a; T](x: &'a [T], y: &'a [T]) -> f32 {
        fold2(x, y, |sum, x, y| x.mul_add(y, sum))
    }
}

/// `sums[key + i][e] += sum over panels and queries of tiles[panel][i][q] * columns[e / lanes][panel, q][e % lanes]`, where
/// `counts[panel]` keys of the tile count for a panel.
#[inline(always)]
fn add_over_queries<S: Simd, const R: usize>(
    simd: S,
    tiles: &[f32],
    columns: &[f32],
    counts: &[usize; PANELS],
    key: usize,
    width: usize,
    sums: &mut [f32],
) {
    let lanes = tile_queries::<S>();
    let most = counts.iter().copied().max().unwrap_or(0);
    for (c, columns) in columns.chunks_exact(PANELS * lanes * lanes).enumerate() {
        for i in (0..most).step_by(R) {
            let mut products = [[simd.splat_f32s(0.0); 2]; R];
            for (p, _) in counts.iter().enumerate().filter(|&(_, &count)| i < count) {
                let tile = &tiles[(p * KEYS + i) * lanes..];
                add_query_products::<S, R>(simd, tile, &columns[p * lanes * lanes..], &mut products);
            }
            for (r, products) in products.iter().enumerate() {
                let row = &mut sums[(key + i + r) * width + c * lanes..][..lanes];
                let (row, _) = S::as_mut_simd_f32s(row);
                for (sum, &product) in row.iter_mut().zip(products) {
                    *sum = simd.add_f32s(*sum, product);
                }
            }
        }
    }
}
