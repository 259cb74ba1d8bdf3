//! What the forward and the backward of attention share: operands in packed form and the products of their tiles.
//!
//! Scores are kept transposed, `[keys][queries]` with as many queries as a tile has columns. So the softmax runs down the
//! columns, a query per lane, and a tile of probabilities is at once the packed right operand of the next product.

use pulp::{Simd, WithSimd};

use crate::Element;
use crate::elementwise::convert_slice;
use crate::gemm_kernel::{column_vectors, multiply_add, product_interleaved, product_rows};
use crate::gemm_pack::{Operand, Part, pack_panels};
use crate::simd::{arch, simd_fn};

/// Keys of a tile.
pub(crate) const KEYS: usize = 128;

/// Distances that rows of keys may have when packed: the smallest that holds a head is taken. None is a power of two, so
/// that rows do not share places in the cache.
const PITCHES: [usize; 4] = [80, 144, 272, 528];

/// The largest head.
pub(crate) const MAX_HEAD_DIM: usize = PITCHES[PITCHES.len() - 1];

/// The distance of packed rows for a head.
pub(crate) fn pitch(head_dim: usize) -> usize {
    PITCHES.into_iter().find(|&pitch| pitch >= head_dim).unwrap_or(MAX_HEAD_DIM)
}

/// Rows of the left operand that a tile has: its sums and operands fit the registers, and it divides common heads.
pub(crate) const fn tile_rows<S: Simd>() -> usize {
    if S::REGISTER_COUNT >= 32 { 8 } else { 4 }
}

/// Queries of a panel, one per lane of two vectors.
pub(crate) const fn tile_queries<S: Simd>() -> usize {
    2 * S::F32_LANES
}

/// [`tile_rows`] and [`tile_queries`] of the instruction set that kernels run in.
pub(crate) fn tile() -> (usize, usize) {
    struct Ask;
    impl WithSimd for Ask {
        type Output = (usize, usize);
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> (usize, usize) {
            (tile_rows::<S>(), tile_queries::<S>())
        }
    }
    arch().dispatch(Ask)
}

/// One head of some consecutive tokens: token `i` is `data[i * stride..][..head_dim]`.
#[derive(Clone, Copy)]
pub(crate) struct HeadRows<'a, T> {
    pub data: &'a [T],
    pub stride: usize,
    pub head_dim: usize,
    pub tokens: usize,
}

impl<'a, T: Element> HeadRows<'a, T> {
    /// Head `head` of the tokens from `start` on, in `[_, heads, head_dim]`.
    pub(crate) fn new(data: &'a [T], start: usize, tokens: usize, heads: usize, head: usize, head_dim: usize) -> Self {
        Self { data: &data[(start * heads + head) * head_dim..], stride: heads * head_dim, head_dim, tokens }
    }

    pub(crate) fn row(&self, token: usize) -> &'a [T] {
        &self.data[token * self.stride..][..self.head_dim]
    }

    /// The tokens from `first` on, at most `tokens`.
    pub(crate) fn part(self, first: usize, tokens: usize) -> Self {
        let tokens = tokens.min(self.tokens - first);
        Self { data: &self.data[first * self.stride..], tokens, ..self }
    }

    /// `[rows][pitch]`: the left operand of a sum over the head. Rows beyond the last token are zero.
    pub(crate) fn pack_rows(self, pitch: usize, packed: &mut [f32]) {
        for (i, row) in packed.chunks_exact_mut(pitch).enumerate() {
            let row = &mut row[..self.head_dim];
            if i < self.tokens {
                convert_slice(self.row(i), row);
            } else {
                row.fill(0.0);
            }
        }
    }

    /// `[head_dim / width][tokens][width]`: an operand of a sum over the tokens, panels `panel_len` apart.
    pub(crate) fn pack_lanes(self, width: usize, panel_len: usize, packed: &mut [f32]) {
        let operand = Operand { data: self.data, lane_stride: 1, depth_stride: self.stride };
        let part = Part { lane: 0, lanes: self.head_dim, depth: 0, depths: self.tokens };
        pack_panels(operand, part, width, panel_len, packed);
    }

    /// `[head_dim][width]`: the right operand of a sum over the head, for at most `width` tokens.
    pub(crate) fn pack_transposed(self, width: usize, packed: &mut [f32]) {
        let operand = Operand { data: self.data, lane_stride: self.stride, depth_stride: 1 };
        let part = Part { lane: 0, lanes: self.tokens, depth: 0, depths: self.head_dim };
        pack_panels(operand, part, width, self.head_dim * width, packed);
    }
}

/// Products over the head: `tile[i][q] = rows[i] . queries[q]` for `count` packed rows.
///
/// `rows` is `[count rounded up to R][pitch]`, `queries` is `[head_dim][lanes]`, `tile` is `[rows][lanes]`.
#[inline(always)]
pub(crate) fn head_products<S: Simd, const R: usize>(
    simd: S,
    rows: &[f32],
    pitch: usize,
    count: usize,
    queries: &[f32],
    tile: &mut [f32],
) {
    for i in (0..count).step_by(R) {
        let rows = &rows[i * pitch..][..R * pitch];
        let sums = match pitch {
            80 => product_rows::<S, R, 80>(simd, rows, queries),
            144 => product_rows::<S, R, 144>(simd, rows, queries),
            272 => product_rows::<S, R, 272>(simd, rows, queries),
            _ => product_rows::<S, R, 528>(simd, rows, queries),
        };
        let (tile, _) = S::as_mut_simd_f32s(&mut tile[i * tile_queries::<S>()..][..R * tile_queries::<S>()]);
        for (tile, sums) in tile.chunks_exact_mut(2).zip(sums) {
            tile.copy_from_slice(&sums);
        }
    }
}

/// Products over the keys: `result[e][q] = factor[q] * result[e][q] + sum over i of lanes[i][e] * tile[i][q]`.
///
/// `lanes` is `[head_dim / R][panel_len]`, of which `keys` rows from `first` on are used; `tile` is `[keys][lanes]`,
/// `result` is `[head_dim rounded up to R][lanes]`.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub(crate) fn key_products<S: Simd, const R: usize>(
    simd: S,
    lanes: &[f32],
    panel_len: usize,
    first: usize,
    keys: usize,
    tile: &[f32],
    factor: &[S::f32s; 2],
    result: &mut [f32],
) {
    let tile = &tile[..keys * tile_queries::<S>()];
    let result = result.chunks_exact_mut(R * tile_queries::<S>());
    for (panel, result) in lanes.chunks_exact(panel_len).zip(result) {
        let sums = product_interleaved::<S, R>(simd, &panel[first * R..][..keys * R], tile);
        let (result, _) = S::as_mut_simd_f32s(result);
        for (result, sums) in result.chunks_exact_mut(2).zip(sums) {
            for v in 0..2 {
                result[v] = simd.mul_add_f32s(factor[v], result[v], sums[v]);
            }
        }
    }
}

/// Adds to `sums` (`R` keys by two vectors of the head) the sum over the queries of one panel:
/// `tile[i][q] * columns[q][e]`, `tile` being `[R][lanes]` and `columns` `[lanes][lanes of the head]`.
#[inline(always)]
pub(crate) fn add_query_products<S: Simd, const R: usize>(
    simd: S,
    tile: &[f32],
    columns: &[f32],
    sums: &mut [[S::f32s; 2]; R],
) {
    let queries = tile_queries::<S>();
    let tile = &tile[..R * queries];
    for (q, columns) in column_vectors::<S>(columns).iter().enumerate().take(queries) {
        let column = std::array::from_fn(|i| tile[i * queries + q]);
        multiply_add(simd, sums, &column, columns);
    }
}

simd_fn! {
    /// Writes column `query` of `[head_dim][lanes]`, times a factor, as a row.
    pub(crate) fn write_column['a; T](tile: &'a [f32], lanes: usize, query: usize, factor: f32, row: &'a mut [T]) -> () {
        for (y, x) in row.iter_mut().zip(tile[query..].iter().step_by(lanes)) {
            *y = T::from_f32(x * factor);
        }
    }
}
