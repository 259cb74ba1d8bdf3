//! Tiles in f32, by the loops of the instruction set, for tensors of any dtype.

use pulp::{Simd, WithSimd};

use super::operands::HeadRows;
use super::tiles::{Gradients, KEYS, Lanes, MAX_LANES, PANELS, Running, Tiles};
use crate::Element;
use crate::elementwise::convert_slice;
use crate::gemm::pack::{Part, pack_panels};
use crate::gemm::tile::{column_vectors, multiply_add, product_interleaved, product_rows};
use crate::math::exp;
use crate::simd::{arch, simd_fn};

/// Distances that rows of keys may have when packed: the smallest that holds a head is taken. None is a power of two, so
/// that rows do not share places in the cache.
const PITCHES: [usize; 5] = [80, 144, 272, 528, 592];

/// The largest head.
pub const MAX_HEAD_DIM: usize = PITCHES[PITCHES.len() - 1];

/// Rows of the left operand that a tile has: its sums and operands fit the registers, and it divides common heads.
const fn tile_rows<S: Simd>() -> usize {
    if S::REGISTER_COUNT >= 32 { 8 } else { 4 }
}

/// Queries of a panel, one per lane of two vectors.
const fn tile_lanes<S: Simd>() -> usize {
    2 * S::F32_LANES
}

/// [`tile_rows`] and [`tile_lanes`] of the instruction set that kernels run in.
fn tile() -> (usize, usize) {
    struct Ask;
    impl WithSimd for Ask {
        type Output = (usize, usize);
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> (usize, usize) {
            (tile_rows::<S>(), tile_lanes::<S>())
        }
    }
    arch().dispatch(Ask)
}

/// Everything is widened to f32 and multiplied as it is.
pub(super) enum Wide {}

impl Tiles for Wide {
    type Packed = f32;

    fn rows() -> usize {
        tile().0
    }

    fn lanes() -> usize {
        tile().1
    }

    fn pitch(head_dim: usize) -> usize {
        PITCHES.into_iter().find(|&pitch| pitch >= head_dim).unwrap_or(MAX_HEAD_DIM)
    }

    fn token_panel() -> usize {
        Self::rows()
    }

    fn pack_rows<T: Element>(rows: HeadRows<T>, packed: &mut [f32]) {
        for (i, row) in packed.chunks_exact_mut(Self::pitch(rows.head_dim)).enumerate() {
            let row = &mut row[..rows.head_dim];
            if i < rows.tokens {
                convert_slice(rows.row(i), row);
            } else {
                row.fill(0.0);
            }
        }
    }

    /// `[head_dim / rows][padded][rows]`.
    fn pack_tokens<T: Element>(rows: HeadRows<T>, padded: usize, packed: &mut [f32]) {
        let part = Part { lane: 0, lanes: rows.head_dim, depth: 0, depths: rows.tokens };
        pack_panels(rows.by_head(), part, Self::rows(), padded * Self::rows(), packed);
    }

    /// `[head_dim][lanes]`.
    fn pack_queries<T: Element>(rows: HeadRows<T>, packed: &mut [f32]) {
        let part = Part { lane: 0, lanes: rows.tokens, depth: 0, depths: rows.head_dim };
        pack_panels(rows.by_tokens(), part, Self::lanes(), packed.len(), packed);
    }

    /// `[head_dim / lanes][PANELS * lanes][lanes]`.
    fn pack_columns<T: Element>(rows: HeadRows<T>, packed: &mut [f32]) {
        let (lanes, queries) = (Self::lanes(), PANELS * Self::lanes());
        // Queries that are not there must not leave what an earlier block left: their probability is zero, but zero
        // times NaN is not.
        if rows.tokens < queries {
            packed.fill(0.0);
        }
        let part = Part { lane: 0, lanes: rows.head_dim, depth: 0, depths: rows.tokens };
        pack_panels(rows.by_head(), part, lanes, queries * lanes, packed);
    }

    fn head_products(rows: &[f32], head_dim: usize, count: usize, queries: &[f32], tile: &mut [f32]) {
        arch().dispatch(HeadProducts { rows, pitch: Self::pitch(head_dim), count, queries, tile });
    }

    fn softmax(state: &mut Running, scale: f32, scores: &[f32], p: &mut [f32]) -> Lanes {
        softmax(state, Self::lanes(), scale, scores, p)
    }

    fn key_products(
        tokens: &[f32],
        padded: usize,
        first: usize,
        count: usize,
        tile: &[f32],
        factor: &Lanes,
        result: &mut [f32],
    ) {
        arch().dispatch(KeyProducts { tokens, padded, first, count, tile, factor, result });
    }

    fn gradients<'a>(tile: &Gradients, p: &mut [f32], ds: &'a mut [f32], _: &'a mut [f32]) -> &'a [f32] {
        gradients(tile, Self::lanes(), p, ds);
        ds
    }

    fn query_products(tiles: &[f32], columns: &[f32], counts: &[usize; PANELS], width: usize, sums: &mut [f32]) {
        arch().dispatch(QueryProducts { tiles, columns, counts, width, sums });
    }

    fn turn(result: &[f32], factor: &Lanes, head_dim: usize, rows: &mut [f32]) {
        turn(result, Self::lanes(), factor, head_dim, rows);
    }
}

/// Forwards `with_simd` to `run` with the rows of a tile as a constant.
macro_rules! with_tile_rows {
    ($name:ident) => {
        impl WithSimd for $name<'_> {
            type Output = ();

            #[inline(always)]
            fn with_simd<S: Simd>(self, simd: S) {
                match tile_rows::<S>() {
                    8 => self.run::<S, 8>(simd),
                    _ => self.run::<S, 4>(simd),
                }
            }
        }
    };
}

struct HeadProducts<'a> {
    rows: &'a [f32],
    pitch: usize,
    count: usize,
    queries: &'a [f32],
    tile: &'a mut [f32],
}

with_tile_rows!(HeadProducts);

impl HeadProducts<'_> {
    #[inline(always)]
    fn run<S: Simd, const R: usize>(self, simd: S) {
        let (lanes, pitch) = (tile_lanes::<S>(), self.pitch);
        for i in (0..self.count).step_by(R) {
            let rows = &self.rows[i * pitch..][..R * pitch];
            let sums = match pitch {
                80 => product_rows::<S, R, 80>(simd, rows, self.queries),
                144 => product_rows::<S, R, 144>(simd, rows, self.queries),
                272 => product_rows::<S, R, 272>(simd, rows, self.queries),
                528 => product_rows::<S, R, 528>(simd, rows, self.queries),
                _ => product_rows::<S, R, 592>(simd, rows, self.queries),
            };
            let (tile, _) = S::as_mut_simd_f32s(&mut self.tile[i * lanes..][..R * lanes]);
            for (tile, sums) in tile.chunks_exact_mut(2).zip(sums) {
                tile.copy_from_slice(&sums);
            }
        }
    }
}

struct KeyProducts<'a> {
    tokens: &'a [f32],
    padded: usize,
    first: usize,
    count: usize,
    tile: &'a [f32],
    factor: &'a Lanes,
    result: &'a mut [f32],
}

with_tile_rows!(KeyProducts);

impl KeyProducts<'_> {
    #[inline(always)]
    fn run<S: Simd, const R: usize>(self, simd: S) {
        let lanes = tile_lanes::<S>();
        let tile = &self.tile[..self.count * lanes];
        let (factor, _) = S::as_simd_f32s(self.factor);
        let result = self.result.chunks_exact_mut(R * lanes);
        for (panel, result) in self.tokens.chunks_exact(self.padded * R).zip(result) {
            let sums = product_interleaved::<S, R>(simd, &panel[self.first * R..][..self.count * R], tile);
            let (result, _) = S::as_mut_simd_f32s(result);
            for (result, sums) in result.chunks_exact_mut(2).zip(sums) {
                for v in 0..2 {
                    result[v] = simd.mul_add_f32s(factor[v], result[v], sums[v]);
                }
            }
        }
    }
}

struct QueryProducts<'a> {
    tiles: &'a [f32],
    columns: &'a [f32],
    counts: &'a [usize; PANELS],
    width: usize,
    sums: &'a mut [f32],
}

with_tile_rows!(QueryProducts);

impl QueryProducts<'_> {
    #[inline(always)]
    fn run<S: Simd, const R: usize>(self, simd: S) {
        let (lanes, width) = (tile_lanes::<S>(), self.width);
        let most = self.counts.iter().copied().max().unwrap_or(0);
        for (c, columns) in self.columns.chunks_exact(PANELS * lanes * lanes).enumerate() {
            for i in (0..most).step_by(R) {
                let mut products = [[simd.splat_f32s(0.0); 2]; R];
                for (p, _) in self.counts.iter().enumerate().filter(|&(_, &count)| i < count) {
                    let tile = &self.tiles[(p * KEYS + i) * lanes..][..R * lanes];
                    let columns = column_vectors::<S>(&columns[p * lanes * lanes..]);
                    for (q, columns) in columns.iter().enumerate().take(lanes) {
                        let column = std::array::from_fn(|i| tile[i * lanes + q]);
                        multiply_add(simd, &mut products, &column, columns);
                    }
                }
                for (r, products) in products.iter().enumerate() {
                    let (row, _) = S::as_mut_simd_f32s(&mut self.sums[(i + r) * width + c * lanes..][..lanes]);
                    for (sum, &product) in row.iter_mut().zip(products) {
                        *sum = simd.add_f32s(*sum, product);
                    }
                }
            }
        }
    }
}

simd_fn! {
    fn softmax['a;](state: &'a mut Running, lanes: usize, scale: f32, scores: &'a [f32], p: &'a mut [f32]) -> Lanes {
        let old = state.max;
        let mut max = old;
        for row in scores.chunks_exact(lanes) {
            for (x, max) in row.iter().zip(&mut max) {
                *max = if *x > *max { *x } else { *max };
            }
        }
        let mut sum = [0.0f32; MAX_LANES];
        for (row, p) in scores.chunks_exact(lanes).zip(p.chunks_exact_mut(lanes)) {
            for (((x, p), max), sum) in row.iter().zip(p).zip(&max).zip(&mut sum) {
                *p = exp((x - max) * scale);
                *sum += *p;
            }
        }
        let mut factors = [0.0f32; MAX_LANES];
        for lane in 0..MAX_LANES {
            factors[lane] = exp((old[lane] - max[lane]) * scale);
            state.sum[lane] = state.sum[lane] * factors[lane] + sum[lane];
        }
        state.max = max;
        factors
    }
}

simd_fn! {
    fn gradients['a, 'b;](tile: &'a Gradients<'b>, lanes: usize, p: &'a mut [f32], ds: &'a mut [f32]) -> () {
        let scale = tile.scale;
        let statistics = || tile.lse.iter().zip(tile.delta);
        let inputs = tile.scores.chunks_exact(lanes).zip(tile.dp.chunks_exact(lanes));
        for ((p, ds), (scores, dp)) in p.chunks_exact_mut(lanes).zip(ds.chunks_exact_mut(lanes)).zip(inputs) {
            let inputs = scores.iter().zip(dp).zip(statistics());
            for ((p, ds), ((x, dp), (lse, delta))) in p.iter_mut().zip(ds).zip(inputs) {
                *p = exp(x * scale - lse);
                *ds = *p * (dp - delta) * scale;
            }
        }
    }
}

simd_fn! {
    fn turn['a;](result: &'a [f32], lanes: usize, factor: &'a Lanes, head_dim: usize, rows: &'a mut [f32]) -> () {
        for (query, row) in rows.chunks_exact_mut(head_dim).enumerate() {
            for (y, x) in row.iter_mut().zip(result[query..].iter().step_by(lanes)) {
                *y = x * factor[query];
            }
        }
    }
}
