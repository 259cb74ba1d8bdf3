//! Panels of pairs of bf16 by AVX-512: from matrices in either layout, and from packed weights turned over.

use std::arch::x86_64::*;

use half::bf16;

use super::{PANEL, PackedWeight};
use crate::gemm::pack::Part;

/// Numbers that are loaded as bf16, 32 at a time.
pub(super) trait Source: Copy {
    /// The 32 numbers at `from`, rounded.
    ///
    /// # Safety
    /// The machine has AVX512-BF16, and 32 numbers can be read at `from`.
    unsafe fn load(from: *const Self) -> __m512i;
}

impl Source for bf16 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn load(from: *const Self) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
}

impl Source for f32 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn load(from: *const Self) -> __m512i {
        // SAFETY: the caller's promise; a vector of bf16 is 64 bytes like any other.
        unsafe {
            let (low, high) = (_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(16)));
            std::mem::transmute(_mm512_cvtne2ps_pbh(high, low))
        }
    }
}

/// A panel of sixteen lanes, `stride` apart in `data`, whose depths lie side by side: `panel [depths / 2][16][2]` with `depths` a multiple
/// of 32.
pub(super) fn pack_rows<T: Source>(data: &[T], stride: usize, depths: usize, panel: &mut [bf16]) {
    assert!(depths.is_multiple_of(32) && panel.len() >= depths * PANEL, "pack_rows: panel");
    assert!(data.len() >= (PANEL - 1) * stride + depths, "pack_rows: data");
    // SAFETY: the level says that the machine has the instructions; the lengths were checked.
    unsafe { pack_rows_unchecked(data.as_ptr(), stride, depths, panel.as_mut_ptr()) }
}

/// # Safety
/// As [`pack_rows`] checks.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn pack_rows_unchecked<T: Source>(data: *const T, stride: usize, depths: usize, panel: *mut bf16) {
    for k in (0..depths).step_by(32) {
        // SAFETY: sixteen lanes of `depths` numbers can be read, and as many written.
        unsafe {
            let mut x = [_mm512_setzero_si512(); 16];
            for (lane, x) in x.iter_mut().enumerate() {
                *x = T::load(data.add(lane * stride + k));
            }
            for (pair, x) in transposed(x).into_iter().enumerate() {
                _mm512_storeu_si512(panel.add((k / 2 + pair) * 2 * PANEL).cast(), x);
            }
        }
    }
}

/// Two neighbouring panels whose lanes lie side by side: `data [depths]`, `stride` apart, into `panels [2][depths / 2][16][2]`, `panel_len`
/// apart. An odd last depth is left to the caller.
pub(super) fn interleave<T: Source>(data: &[T], stride: usize, depths: usize, panel_len: usize, panels: &mut [bf16]) {
    let pairs = depths / 2;
    assert!(panels.len() >= panel_len + pairs * 2 * PANEL, "interleave: panels");
    assert!(pairs == 0 || data.len() >= (2 * pairs - 1) * stride + 2 * PANEL, "interleave: data");
    // SAFETY: the level says that the machine has the instructions; the lengths were checked.
    unsafe { interleave_unchecked(data.as_ptr(), stride, pairs, panels.as_mut_ptr(), panel_len) }
}

/// Pairs of rows that are asked for before they are needed: rows lie pages apart, where the machine foresees nothing.
const AHEAD: usize = 8;

/// # Safety
/// As [`interleave`] checks.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn interleave_unchecked<T: Source>(
    data: *const T,
    stride: usize,
    pairs: usize,
    panels: *mut bf16,
    panel_len: usize,
) {
    let (low, high) = (interleaved(0), interleaved(16));
    for pair in 0..pairs {
        // SAFETY: two rows of 32 numbers can be read, and as many written; a prefetch may name any address.
        unsafe {
            for ahead in [2 * (pair + AHEAD), 2 * (pair + AHEAD) + 1] {
                _mm_prefetch::<_MM_HINT_T0>(data.wrapping_add(ahead * stride).cast());
            }
            let even = T::load(data.add(2 * pair * stride));
            let odd = T::load(data.add((2 * pair + 1) * stride));
            let to = panels.add(pair * 2 * PANEL);
            _mm512_storeu_si512(to.cast(), _mm512_permutex2var_epi16(even, low, odd));
            _mm512_storeu_si512(to.add(panel_len).cast(), _mm512_permutex2var_epi16(even, high, odd));
        }
    }
}

/// Where the lanes of two vectors of bf16 go that are interleaved, from lane `first` on.
#[target_feature(enable = "avx512f")]
#[inline]
fn interleaved(first: i16) -> __m512i {
    let lanes: [i16; 32] = std::array::from_fn(|i| first + (i as i16) / 2 + if i % 2 == 0 { 0 } else { 32 });
    // SAFETY: the array is 64 bytes.
    unsafe { _mm512_loadu_si512(lanes.as_ptr().cast()) }
}

/// Inputs of a block: two panels of the result.
const INPUTS: usize = 2 * PANEL;

/// Panels of inputs with pairs of outputs, as [`super::right::bf16_panels`] wants them. Part begins at a whole panel of the weight and at a
/// multiple of 32 inputs.
pub(super) fn turn(weight: &PackedWeight, part: Part, panels: &mut [bf16]) {
    let panel_len = part.depths * PANEL;
    assert!(part.depth.is_multiple_of(PANEL) && part.lane.is_multiple_of(INPUTS), "turn: a part that begins anywhere");
    assert!(part.depth + part.depths <= weight.outputs().next_multiple_of(PANEL), "turn: outputs");
    for (i, panels) in panels.chunks_mut(2 * panel_len).enumerate() {
        let first = (part.lane + i * INPUTS) / 2;
        let pairs = (weight.inputs().div_ceil(2)).saturating_sub(first).min(PANEL);
        for n in (0..part.depths).step_by(PANEL) {
            let from = (part.depth + n) / PANEL * weight.panel_len() + first * 2 * PANEL;
            let source = &weight.panels()[from..][..pairs * 2 * PANEL];
            let rows = (part.depths - n).min(PANEL) / 2;
            let (low, high) = panels.split_at_mut(panel_len);
            let low = &mut low[n * PANEL..][..rows * 2 * PANEL];
            let high = high.get_mut(n * PANEL..(n + 2 * rows) * PANEL);
            // SAFETY: the level says that the machine has the instructions; the slices have the lengths that `block` asks for.
            unsafe { block(source, weight.panel_len(), low, high) };
        }
    }
}

/// Turns sixteen outputs by up to 32 inputs: `source [pairs][16 outputs][2 inputs]` into the pairs of outputs of the first sixteen inputs and
/// of the others, each `[rows][16 inputs][2 outputs]`.
///
/// # Safety
/// The machine has AVX-512 F and BW; `source` holds at most 16 pairs, `low` and `high` at most 8 rows, whole ones.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn block(source: &[bf16], panel_len: usize, low: &mut [bf16], high: Option<&mut [bf16]>) {
    // SAFETY: loads and stores are of whole vectors inside the slices; a prefetch may name any address.
    unsafe {
        let mut x = [_mm512_setzero_si512(); 16];
        for (x, pair) in x.iter_mut().zip(source.chunks_exact(2 * PANEL)) {
            *x = _mm512_loadu_si512(pair.as_ptr().cast());
            // the same place of the next panel, which is far away
            _mm_prefetch::<_MM_HINT_T0>(pair.as_ptr().wrapping_add(panel_len).cast());
        }
        let x = transposed(x);
        let (low_lanes, high_lanes) = (interleaved(0), interleaved(16));
        for (row, x) in low.chunks_exact_mut(2 * PANEL).zip(x.chunks_exact(2)) {
            _mm512_storeu_si512(row.as_mut_ptr().cast(), _mm512_permutex2var_epi16(x[0], low_lanes, x[1]));
        }
        for (row, x) in high.into_iter().flat_map(|high| high.chunks_exact_mut(2 * PANEL)).zip(x.chunks_exact(2)) {
            _mm512_storeu_si512(row.as_mut_ptr().cast(), _mm512_permutex2var_epi16(x[0], high_lanes, x[1]));
        }
    }
}

/// The transpose of sixteen vectors of sixteen 32-bit lanes.
#[target_feature(enable = "avx512f")]
#[inline]
pub(crate) fn transposed(x: [__m512i; 16]) -> [__m512i; 16] {
    let mut a = [_mm512_setzero_si512(); 16];
    for i in 0..8 {
        a[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    }
    // b[4 i + j]: column 4 l + j of rows 4 i..4 i + 4 in 128-bit lane l
    let mut b = [_mm512_setzero_si512(); 16];
    for i in 0..4 {
        for half in 0..2 {
            b[4 * i + 2 * half] = _mm512_unpacklo_epi64(a[4 * i + half], a[4 * i + 2 + half]);
            b[4 * i + 2 * half + 1] = _mm512_unpackhi_epi64(a[4 * i + half], a[4 * i + 2 + half]);
        }
    }
    let mut y = [_mm512_setzero_si512(); 16];
    for j in 0..4 {
        let even_top = _mm512_shuffle_i32x4::<0x88>(b[j], b[4 + j]);
        let odd_top = _mm512_shuffle_i32x4::<0xdd>(b[j], b[4 + j]);
        let even_bottom = _mm512_shuffle_i32x4::<0x88>(b[8 + j], b[12 + j]);
        let odd_bottom = _mm512_shuffle_i32x4::<0xdd>(b[8 + j], b[12 + j]);
        y[j] = _mm512_shuffle_i32x4::<0x88>(even_top, even_bottom);
        y[8 + j] = _mm512_shuffle_i32x4::<0xdd>(even_top, even_bottom);
        y[4 + j] = _mm512_shuffle_i32x4::<0x88>(odd_top, odd_bottom);
        y[12 + j] = _mm512_shuffle_i32x4::<0xdd>(odd_top, odd_bottom);
    }
    y
}
