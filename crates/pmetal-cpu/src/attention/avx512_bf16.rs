//! Tiles by AVX-512's dot products of pairs of bf16: probabilities and their gradients are rounded to bf16, sums are f32.

use std::arch::x86_64::*;

use half::bf16;

use super::operands::{Cut, HeadRows, room_for};
use super::tiles::{Gradients, KEYS, Lanes, PANELS, Running, Tiles};
use crate::Element;
use crate::elementwise::convert_slice;
use crate::gemm::pack::Part;
use crate::gemm::{Arithmetic, Mat, PANEL, Right, bf16_panels, transposed};
use crate::level::Level;
use crate::scratch::with_scratch;

/// Rows of a tile: with two vectors a row, enough sums to hide the latency of a product.
const ROWS: usize = 8;
/// Queries of a panel.
const LANES: usize = 2 * PANEL;

/// Whether tensors of `T` are multiplied by these tiles.
pub(super) fn serves<T: Element>(head_dim: usize) -> bool {
    let present = Level::current().has_avx512_bf16();
    present && Arithmetic::of::<T>() == Arithmetic::Bf16 && head_dim.is_multiple_of(PANEL)
}

/// bf16 as it is.
pub(super) enum Dots {}

impl Tiles for Dots {
    type Packed = bf16;

    fn rows() -> usize {
        ROWS
    }

    fn lanes() -> usize {
        LANES
    }

    fn pitch(head_dim: usize) -> usize {
        head_dim
    }

    fn token_panel() -> usize {
        PANEL
    }

    fn pack_rows<T: Element>(rows: HeadRows<T>, packed: &mut [bf16]) {
        for (i, row) in packed.chunks_exact_mut(rows.head_dim).enumerate() {
            if i < rows.tokens { convert_slice(rows.row(i), row) } else { row.fill(bf16::ZERO) }
        }
    }

    /// `[head_dim / 16][padded / 2][16][2 tokens]`.
    fn pack_tokens<T: Element>(rows: HeadRows<T>, padded: usize, packed: &mut [bf16]) {
        if rows.tokens < padded {
            return with_zeros(rows, padded, |rows| Self::pack_tokens(rows, padded, packed));
        }
        let right = Mat::strided(rows.data, padded, rows.head_dim, rows.stride);
        bf16_panels(&Right::plain(right), Part { lane: 0, lanes: rows.head_dim, depth: 0, depths: padded }, packed);
    }

    /// `[2][head_dim / 2][16][2 elements]`.
    fn pack_queries<T: Element>(rows: HeadRows<T>, packed: &mut [bf16]) {
        // Lanes without a query count in sums over the queries, with a probability of zero: they must not be NaN.
        if rows.tokens < LANES {
            return with_zeros(rows, LANES, |rows| Self::pack_queries(rows, packed));
        }
        let right = Mat::strided(rows.data, LANES, rows.head_dim, rows.stride).t();
        bf16_panels(&Right::plain(right), Part { lane: 0, lanes: LANES, depth: 0, depths: rows.head_dim }, packed);
    }

    /// `[head_dim / 16][PANELS * 32 / 2][16][2 queries]`.
    fn pack_columns<T: Element>(rows: HeadRows<T>, packed: &mut [bf16]) {
        Self::pack_tokens(rows, PANELS * LANES, packed);
    }

    fn head_products(rows: &[bf16], head_dim: usize, count: usize, queries: &[bf16], tile: &mut [f32]) {
        let count = count.next_multiple_of(ROWS);
        assert!(rows.len() >= count * head_dim && tile.len() >= count * LANES, "head_products: rows and tile");
        assert!(queries.len() >= head_dim * LANES && head_dim.is_multiple_of(2), "head_products: queries");
        // SAFETY: the level says that the machine has the instructions; the slices hold what is read and written.
        unsafe { head_products(rows, head_dim, count, queries, tile) }
    }

    fn softmax(state: &mut Running, scale: f32, scores: &[f32], p: &mut [bf16]) -> Lanes {
        assert!(scores.len().is_multiple_of(2 * LANES) && p.len() == scores.len(), "softmax: tile");
        // SAFETY: the level says that the machine has the instructions; the slices hold what is read and written.
        unsafe { softmax(state, scale * std::f32::consts::LOG2_E, scores, p) }
    }

    fn key_products(
        tokens: &[bf16],
        padded: usize,
        first: usize,
        count: usize,
        tile: &[bf16],
        factor: &Lanes,
        result: &mut [f32],
    ) {
        let count = count.next_multiple_of(2);
        assert!(first.is_multiple_of(2) && first + count <= padded, "key_products: tokens");
        assert!(tokens.len() * LANES >= result.len() * padded && tile.len() >= count * LANES, "key_products: operands");
        // SAFETY: the level says that the machine has the instructions; the slices hold what is read and written.
        unsafe { key_products(&tokens[first * PANEL..], padded * PANEL, count / 2, tile, factor, result) }
    }

    fn gradients<'a>(tile: &Gradients, p: &mut [bf16], ds: &'a mut [bf16], turned: &'a mut [bf16]) -> &'a [bf16] {
        let len = tile.scores.len();
        assert!(len.is_multiple_of(2 * LANES) && tile.dp.len() == len, "gradients: tile");
        assert!(p.len() == len && ds.len() == len && turned.len() >= len, "gradients: results");
        // SAFETY: the level says that the machine has the instructions; the slices hold what is read and written.
        unsafe { gradients(tile, p, ds, turned) };
        turned
    }

    fn query_products(tiles: &[bf16], columns: &[bf16], counts: &[usize; PANELS], width: usize, sums: &mut [f32]) {
        let most = counts.iter().copied().max().unwrap_or(0).next_multiple_of(ROWS);
        assert!(most <= KEYS && tiles.len() >= PANELS * KEYS * LANES, "query_products: tiles");
        assert!(width.is_multiple_of(LANES) && columns.len() >= width * PANELS * LANES, "query_products: columns");
        assert!(sums.len() >= most * width, "query_products: sums");
        // SAFETY: the level says that the machine has the instructions; the slices hold what is read and written.
        unsafe { query_products(tiles, columns, counts, width, sums) }
    }

    fn turn(result: &[f32], factor: &Lanes, head_dim: usize, rows: &mut [f32]) {
        assert!(result.len() >= head_dim * LANES && rows.len() >= LANES * head_dim, "turn: sizes");
        assert!(head_dim.is_multiple_of(PANEL), "turn: head_dim");
        // SAFETY: the level says that the machine has the instructions; the slices hold what is read and written.
        unsafe { turn(result, factor, head_dim, rows) }
    }
}

/// Calls `pack` with a copy of the rows that zeros make up to `tokens` of them, because whole panels are packed by vectors.
fn with_zeros<T: Element>(rows: HeadRows<T>, tokens: usize, pack: impl FnOnce(HeadRows<bf16>)) {
    let head_dim = rows.head_dim;
    with_scratch(room_for::<bf16>(tokens * head_dim), |scratch| {
        let copy = Cut(scratch).take(tokens * head_dim);
        Dots::pack_rows(rows, copy);
        pack(HeadRows { data: copy, stride: head_dim, head_dim, tokens });
    });
}

/// The sums of a tile: [`ROWS`] rows by two vectors.
type Sums = [[__m512; 2]; ROWS];

/// Where a left operand's pairs lie: row `r` and pair `k` at `start + r * row + k * pair`.
#[derive(Clone, Copy)]
struct Left {
    start: *const bf16,
    row: usize,
    pair: usize,
}

/// Where a right operand's vectors lie: vector `v` of pair `k` at `start + v * vector + k * pair`.
#[derive(Clone, Copy)]
struct Columns {
    start: *const bf16,
    vector: usize,
    pair: usize,
}

/// Adds `pairs` products of pairs to a tile.
///
/// # Safety
/// The operands have [`ROWS`] rows, two vectors, and as many pairs.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
unsafe fn multiply(left: Left, right: Columns, pairs: usize, sums: &mut Sums) {
    let (mut a, mut b) = (left.start, right.start);
    for _ in 0..pairs {
        // SAFETY: every address is inside the operands, by the caller's promise.
        unsafe {
            let columns = [_mm512_loadu_si512(b.cast()), _mm512_loadu_si512(b.add(right.vector).cast())];
            for (r, sums) in sums.iter_mut().enumerate() {
                let row = _mm512_set1_epi32(a.add(r * left.row).cast::<i32>().read_unaligned());
                for (sum, column) in sums.iter_mut().zip(columns) {
                    *sum = _mm512_dpbf16_ps(*sum, bits(row), bits(column));
                }
            }
            a = a.add(left.pair);
            b = b.add(right.pair);
        }
    }
}

#[inline(always)]
fn bits(x: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes without a meaning of their own.
    unsafe { std::mem::transmute(x) }
}

#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
fn rounded(low: __m512, high: __m512) -> __m512i {
    // SAFETY: both are 64 bytes without a meaning of their own.
    unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(high, low)) }
}

/// # Safety
/// As [`Dots::head_products`] checks; `count` is a multiple of [`ROWS`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn head_products(rows: &[bf16], head_dim: usize, count: usize, queries: &[bf16], tile: &mut [f32]) {
    let right = Columns { start: queries.as_ptr(), vector: head_dim * PANEL, pair: 2 * PANEL };
    for i in (0..count).step_by(ROWS) {
        // SAFETY: the rows and the tile's lines lie inside their slices.
        unsafe {
            let left = Left { start: rows.as_ptr().add(i * head_dim), row: head_dim, pair: 2 };
            let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
            multiply(left, right, head_dim / 2, &mut sums);
            for (v, &sum) in sums.as_flattened().iter().enumerate() {
                _mm512_storeu_ps(tile.as_mut_ptr().add(i * LANES + v * PANEL), sum);
            }
        }
    }
}

/// # Safety
/// As [`Dots::key_products`] checks.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn key_products(
    tokens: &[bf16],
    panel_len: usize,
    pairs: usize,
    tile: &[bf16],
    factor: &Lanes,
    result: &mut [f32],
) {
    let right = Columns { start: tile.as_ptr(), vector: 2 * PANEL, pair: 2 * LANES };
    for (i, result) in result.chunks_exact_mut(ROWS * LANES).enumerate() {
        let (panel, half) = (i * ROWS / PANEL, i * ROWS % PANEL);
        // SAFETY: the panels and the rows of the result lie inside their slices.
        unsafe {
            let left = Left { start: tokens.as_ptr().add(panel * panel_len + half * 2), row: 2, pair: 2 * PANEL };
            let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
            multiply(left, right, pairs, &mut sums);
            for (r, sums) in sums.iter().enumerate() {
                for (v, &sum) in sums.iter().enumerate() {
                    let at = result.as_mut_ptr().add(r * LANES + v * PANEL);
                    let factor = _mm512_loadu_ps(factor.as_ptr().add(v * PANEL));
                    _mm512_storeu_ps(at, _mm512_fmadd_ps(factor, _mm512_loadu_ps(at), sum));
                }
            }
        }
    }
}

/// # Safety
/// As [`Dots::query_products`] checks.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn query_products(tiles: &[bf16], columns: &[bf16], counts: &[usize; PANELS], width: usize, sums: &mut [f32]) {
    let most = counts.iter().copied().max().unwrap_or(0);
    let panel_len = PANELS * LANES * PANEL;
    for e in (0..width).step_by(LANES) {
        for i in (0..most).step_by(ROWS) {
            // SAFETY: tiles, columns and rows of the sums lie inside their slices.
            unsafe {
                let mut products = [[_mm512_setzero_ps(); 2]; ROWS];
                for (p, _) in counts.iter().enumerate().filter(|&(_, &count)| i < count) {
                    let left = Left { start: tiles.as_ptr().add((p * KEYS + i) * LANES), row: LANES, pair: 2 };
                    let start = columns.as_ptr().add(e * PANELS * LANES + p * LANES * PANEL);
                    multiply(left, Columns { start, vector: panel_len, pair: 2 * PANEL }, LANES / 2, &mut products);
                }
                for (r, products) in products.iter().enumerate() {
                    for (v, &product) in products.iter().enumerate() {
                        let at = sums.as_mut_ptr().add((i + r) * width + e + v * PANEL);
                        _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), product));
                    }
                }
            }
        }
    }
}

/// `2^x` for `x <= 0`, with a relative error below 1e-7; 0 where it would be less than the smallest normal number of bf16.
///
/// The fraction of `x` is in [0, 1), where the polynomial is the best of its degree for the relative error.
#[target_feature(enable = "avx512f,avx512dq")]
#[inline]
fn exp2(x: __m512) -> __m512 {
    const COEFFICIENTS: [f32; 6] =
        [0.001_877_576_7, 0.008_989_34, 0.055_826_318, 0.240_153_62, 0.693_153_1, 0.999_999_94];
    // A fraction of minus infinity is no number.
    let x = _mm512_max_ps(x, _mm512_set1_ps(-200.0));
    let fraction = _mm512_reduce_ps::<0x09>(x);
    let mut p = _mm512_set1_ps(COEFFICIENTS[0]);
    for c in &COEFFICIENTS[1..] {
        p = _mm512_fmadd_ps(p, fraction, _mm512_set1_ps(*c));
    }
    _mm512_scalef_ps(p, x)
}

/// The lanes of two vectors of bf16 in turn, the first or the second half of them.
#[target_feature(enable = "avx512f")]
#[inline]
fn interleaved(first: i16) -> __m512i {
    let lanes: [i16; 32] = std::array::from_fn(|i| first + (i / 2 + i % 2 * 32) as i16);
    // SAFETY: the array is 64 bytes.
    unsafe { _mm512_loadu_si512(lanes.as_ptr().cast()) }
}

/// # Safety
/// As [`Dots::softmax`] checks.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn softmax(state: &mut Running, factor: f32, scores: &[f32], p: &mut [bf16]) -> Lanes {
    let mut factors = [0.0; LANES];
    let scale = _mm512_set1_ps(factor);
    let (low, high) = (interleaved(0), interleaved(16));
    // SAFETY: all vectors lie inside the slices, whose lengths are whole pairs of rows.
    unsafe {
        let load = |x: &[f32], v: usize| _mm512_loadu_ps(x.as_ptr().add(v * PANEL));
        let old = [load(&state.max, 0), load(&state.max, 1)];
        let mut max = old;
        for row in scores.chunks_exact(LANES) {
            max = [_mm512_max_ps(max[0], load(row, 0)), _mm512_max_ps(max[1], load(row, 1))];
        }
        let shift = max.map(|max| _mm512_mul_ps(max, scale));
        let mut sums = [_mm512_setzero_ps(); 2];
        for (scores, p) in scores.chunks_exact(2 * LANES).zip(p.chunks_exact_mut(2 * LANES)) {
            let e: [__m512; 4] = std::array::from_fn(|v| exp2(_mm512_fmsub_ps(load(scores, v), scale, shift[v % 2])));
            sums = [0, 1].map(|v| _mm512_add_ps(sums[v], _mm512_add_ps(e[v], e[v + 2])));
            let (even, odd) = (rounded(e[0], e[1]), rounded(e[2], e[3]));
            _mm512_storeu_si512(p.as_mut_ptr().cast(), _mm512_permutex2var_epi16(even, low, odd));
            _mm512_storeu_si512(p.as_mut_ptr().add(LANES).cast(), _mm512_permutex2var_epi16(even, high, odd));
        }
        for v in 0..2 {
            let factor = exp2(_mm512_fmsub_ps(old[v], scale, shift[v]));
            let sum = _mm512_fmadd_ps(load(&state.sum, v), factor, sums[v]);
            _mm512_storeu_ps(state.max.as_mut_ptr().add(v * PANEL), max[v]);
            _mm512_storeu_ps(state.sum.as_mut_ptr().add(v * PANEL), sum);
            _mm512_storeu_ps(factors.as_mut_ptr().add(v * PANEL), factor);
        }
    }
    factors
}

/// # Safety
/// As [`Dots::gradients`] checks.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
unsafe fn gradients(tile: &Gradients, p: &mut [bf16], ds: &mut [bf16], turned: &mut [bf16]) {
    let (scale, factor) = (_mm512_set1_ps(tile.scale), _mm512_set1_ps(tile.scale * std::f32::consts::LOG2_E));
    let log2_e = _mm512_set1_ps(std::f32::consts::LOG2_E);
    let (low, high) = (interleaved(0), interleaved(16));
    // SAFETY: all vectors lie inside the slices, whose lengths are whole pairs of rows.
    unsafe {
        let load = |x: &[f32], v: usize| _mm512_loadu_ps(x.as_ptr().add(v * PANEL));
        let shift = [0, 1].map(|v| _mm512_mul_ps(load(tile.lse, v), log2_e));
        let delta = [0, 1].map(|v| _mm512_mul_ps(load(tile.delta, v), scale));
        let inputs = tile.scores.chunks_exact(2 * LANES).zip(tile.dp.chunks_exact(2 * LANES));
        let outputs = p.chunks_exact_mut(2 * LANES).zip(ds.chunks_exact_mut(2 * LANES));
        for (((scores, dp), (p, ds)), turned) in inputs.zip(outputs).zip(turned.chunks_exact_mut(2 * LANES)) {
            let e: [__m512; 4] = std::array::from_fn(|v| exp2(_mm512_fmsub_ps(load(scores, v), factor, shift[v % 2])));
            let g: [__m512; 4] =
                std::array::from_fn(|v| _mm512_mul_ps(e[v], _mm512_fmsub_ps(load(dp, v), scale, delta[v % 2])));
            _mm512_storeu_si512(p.as_mut_ptr().cast(), rounded(e[0], e[1]));
            _mm512_storeu_si512(p.as_mut_ptr().add(LANES).cast(), rounded(e[2], e[3]));
            let (even, odd) = (rounded(g[0], g[1]), rounded(g[2], g[3]));
            _mm512_storeu_si512(ds.as_mut_ptr().cast(), even);
            _mm512_storeu_si512(ds.as_mut_ptr().add(LANES).cast(), odd);
            _mm512_storeu_si512(turned.as_mut_ptr().cast(), _mm512_permutex2var_epi16(even, low, odd));
            _mm512_storeu_si512(turned.as_mut_ptr().add(LANES).cast(), _mm512_permutex2var_epi16(even, high, odd));
        }
    }
}

/// # Safety
/// As [`Dots::turn`] checks.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn turn(result: &[f32], factor: &Lanes, head_dim: usize, rows: &mut [f32]) {
    for v in 0..2 {
        // SAFETY: all vectors lie inside the slices.
        unsafe {
            let factor = _mm512_loadu_ps(factor.as_ptr().add(v * PANEL));
            for e in (0..head_dim).step_by(PANEL) {
                let columns = std::array::from_fn(|i| {
                    let x = _mm512_loadu_ps(result.as_ptr().add((e + i) * LANES + v * PANEL));
                    _mm512_castps_si512(_mm512_mul_ps(x, factor))
                });
                for (i, row) in transposed(columns).into_iter().enumerate() {
                    _mm512_storeu_si512(rows.as_mut_ptr().add((v * PANEL + i) * head_dim + e).cast(), row);
                }
            }
        }
    }
}
