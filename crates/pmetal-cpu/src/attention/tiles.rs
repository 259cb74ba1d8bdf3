//! What forward and backward ask of an instruction set: operands in packed form, products of tiles, and the softmax.
//!
//! Scores are kept transposed, `[keys][lanes]` with a query per lane of two vectors. So the softmax runs down the columns, and a
//! tile of probabilities is at once the right operand of the next product. In every product the left operand's numbers are
//! broadcast, and the right operand is read by vectors.

use bytemuck::Pod;

use super::operands::HeadRows;
use super::{AttentionShape, Segment};
use crate::Element;
use crate::math::tanh;
use crate::simd::simd_fn;

/// Keys of a tile.
pub(super) const KEYS: usize = 128;

/// Panels of queries that the backward takes through the keys together, so that sums over the queries are not too short.
pub(super) const PANELS: usize = 4;

/// Lanes of the widest panel.
pub(super) const MAX_LANES: usize = 32;

/// The greatest score of a query none of whose keys is known: finite, so that what it does not see still weighs nothing,
/// and a power of two, so that it is scaled without rounding.
pub(super) const LOWEST: f32 = -((1u128 << 100) as f32);

/// A number per query of a panel.
pub(super) type Lanes = [f32; MAX_LANES];

/// The softmax of a panel of queries as far as its keys are known.
pub(super) struct Running {
    /// Of the scores before they are scaled.
    pub max: Lanes,
    pub sum: Lanes,
}

/// The scores of a panel and the gradients of its probabilities, `[keys][lanes]`, with what belongs to each query: the logarithm of
/// the sum of exponentials, and the product of the result and its gradient.
pub(super) struct Gradients<'a> {
    pub scores: &'a [f32],
    pub dp: &'a [f32],
    pub lse: &'a Lanes,
    pub delta: &'a Lanes,
    pub scale: f32,
}

/// The kernel of an arithmetic. Layouts of packed operands are its own.
pub(super) trait Tiles {
    /// What operands are made of.
    type Packed: Pod;

    /// Keys, or elements of a head, that tiles come in.
    fn rows() -> usize;

    /// Queries of a panel, at most [`MAX_LANES`].
    fn lanes() -> usize;

    /// Distance of the rows that [`Tiles::pack_rows`] makes.
    fn pitch(head_dim: usize) -> usize;

    /// Elements of a head that [`Tiles::pack_tokens`] keeps together.
    fn token_panel() -> usize;

    /// The left operand of a sum over the head, `[tokens][pitch]`: as many rows as `packed` has, zeros after the last token.
    fn pack_rows<T: Element>(rows: HeadRows<T>, packed: &mut [Self::Packed]);

    /// The left operand of a sum over the tokens, with room for `padded` of them (a multiple of [`Tiles::rows`]).
    fn pack_tokens<T: Element>(rows: HeadRows<T>, padded: usize, packed: &mut [Self::Packed]);

    /// The right operand of a sum over the head, for at most [`Tiles::lanes`] queries: `head_dim * lanes` numbers.
    fn pack_queries<T: Element>(rows: HeadRows<T>, packed: &mut [Self::Packed]);

    /// The right operand of a sum over at most [`PANELS`] panels of queries: `head_dim` rounded up to lanes, times all lanes.
    fn pack_columns<T: Element>(rows: HeadRows<T>, packed: &mut [Self::Packed]);

    /// `tile[i][q] = rows[i] . queries[q]` for `count` rows, rounded up to [`Tiles::rows`].
    fn head_products(rows: &[Self::Packed], head_dim: usize, count: usize, queries: &[Self::Packed], tile: &mut [f32]);

    /// Turns scores `[keys][lanes]` into exponentials relative to the new maximum of each query, `p`, and returns what earlier sums
    /// shrink by.
    fn softmax(state: &mut Running, scale: f32, scores: &[f32], p: &mut [Self::Packed]) -> Lanes;

    /// `result[e][q] = factor[q] * result[e][q] + sum over i of tokens[first + i][e] * tile[i][q]` for `count` tokens out of `padded`
    /// that were packed. `tile` comes from [`Tiles::softmax`] or [`Tiles::gradients`], `result` is `[head_dim][lanes]`.
    #[allow(clippy::too_many_arguments)]
    fn key_products(
        tokens: &[Self::Packed],
        padded: usize,
        first: usize,
        count: usize,
        tile: &[Self::Packed],
        factor: &Lanes,
        result: &mut [f32],
    );

    /// `p = exp(scale * scores - lse)` and `ds = scale * p * (dp - delta)`, in the form for [`Tiles::query_products`]. What
    /// [`Tiles::key_products`] wants of `ds` is returned: it, or `turned`.
    fn gradients<'a>(
        tile: &Gradients,
        p: &mut [Self::Packed],
        ds: &'a mut [Self::Packed],
        turned: &'a mut [Self::Packed],
    ) -> &'a [Self::Packed];

    /// `sums[i][e] += sum over panels and queries of tiles[panel][i][q] * columns[panel, q][e]`, where `counts[panel]` keys of a tile
    /// count for a panel. `sums` is `[keys][width]` with `width` the head rounded up to lanes, `tiles` `[PANELS][KEYS][lanes]`.
    fn query_products(
        tiles: &[Self::Packed],
        columns: &[Self::Packed],
        counts: &[usize; PANELS],
        width: usize,
        sums: &mut [f32],
    );

    /// Turns `[head_dim][lanes]` into rows `[lanes][head_dim]`, each times its factor.
    fn turn(result: &[f32], factor: &Lanes, head_dim: usize, rows: &mut [f32]);
}

/// Hides what a query does not see in a tile of scores `[keys][lanes]` that starts at key `key` and query `first`.
pub(super) fn mask(
    segment: &Segment,
    shape: &AttentionShape,
    first: usize,
    lanes: usize,
    key: usize,
    scores: &mut [f32],
) {
    let always = segment.visible(first);
    for (i, row) in scores.chunks_exact_mut(lanes).enumerate().skip(always.saturating_sub(key)) {
        // Key `key + i` is the last one that query `first + n` sees; lanes before it do not see it.
        let n = (key + i + 1 - always).min(lanes);
        row[..n].fill(f32::NEG_INFINITY);
    }
    if shape.first_seen(segment, first + lanes - 1) > key {
        for (i, row) in scores.chunks_exact_mut(lanes).enumerate() {
            // Lanes behind the last that reaches back so far.
            let n = (shape.reach.end(key + i) + 1).saturating_sub(always).min(lanes);
            row[n..].fill(f32::NEG_INFINITY);
        }
    }
}

simd_fn! {
    /// Puts a soft cap on scores before they are scaled, as they are kept.
    pub(super) fn cap['a;](scores: &'a mut [f32], scale: f32, softcap: f32) -> () {
        let (inward, outward) = (scale / softcap, softcap / scale);
        for x in scores {
            *x = outward * tanh(*x * inward);
        }
    }
}

simd_fn! {
    /// [`cap`], and with it the cap's slope on the gradients of the probabilities, so that `dp - delta` becomes `slope * (dp - delta)`.
    pub(super) fn cap_gradients['a;](
        scores: &'a mut [f32],
        dp: &'a mut [f32],
        lanes: usize,
        delta: &'a Lanes,
        scale: f32,
        softcap: f32,
    ) -> () {
        let (inward, outward) = (scale / softcap, softcap / scale);
        for (scores, dp) in scores.chunks_exact_mut(lanes).zip(dp.chunks_exact_mut(lanes)) {
            for ((x, dp), delta) in scores.iter_mut().zip(dp).zip(delta) {
                let t = tanh(*x * inward);
                *x = outward * t;
                *dp = (*dp - delta).mul_add((-t).mul_add(t, 1.0), *delta);
            }
        }
    }
}
