//! Tiles of a product by AVX-512's dot products of pairs of bf16.

use std::arch::x86_64::*;

use half::bf16;

use super::driver::{PITCH, Slice};

/// Sums of a tile, in rows of one or two panels: with the operands they fill the registers.
const SUMS: usize = 24;
/// The most panels of a tile.
const PANELS: usize = 2;
/// Columns of a panel.
const PANEL: usize = 16;

/// `c [rows][panels * 16] (+)= a b` for a slice of the sum.
pub(super) fn multiply(slice: &Slice<bf16>, c: &mut [f32]) {
    slice.check(c, PANEL);
    // SAFETY: the level says that the machine has the instructions; `check` saw that the slices hold what is read and written.
    unsafe { tiles(slice, c) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn tiles(slice: &Slice<bf16>, c: &mut [f32]) {
    let stride = slice.panels * PANEL;
    for panel in (0..slice.panels).step_by(PANELS) {
        let panels = (slice.panels - panel).min(PANELS);
        // tiles of about the same height: a low one would wait for its own sums
        let most = SUMS / panels;
        let height = slice.rows.div_ceil(slice.rows.div_ceil(most));
        for row in (0..slice.rows).step_by(height) {
            // SAFETY: row and panel lie inside the slice, whose sizes the caller checked.
            unsafe {
                let tile = Tile {
                    a: slice.a.as_ptr().add(row * PITCH),
                    b: slice.b.as_ptr().add(panel * slice.panel_len),
                    panel_len: slice.panel_len,
                    pairs: slice.depths / 2,
                    c: c.as_mut_ptr().add(row * stride + panel * PANEL),
                    stride,
                    add: slice.add,
                };
                tile.of_rows((slice.rows - row).min(height), panels);
            }
        }
    }
}

/// Pointers to the first elements of a tile's operands.
struct Tile {
    a: *const bf16,
    b: *const bf16,
    panel_len: usize,
    pairs: usize,
    c: *mut f32,
    stride: usize,
    add: bool,
}

/// Calls `run::<R, G>` for a number of rows that is known when the program runs.
macro_rules! rows {
    ($self:ident, $rows:expr, $panels:literal: $($n:literal)*) => {
        match $rows {
            // SAFETY: the promise of the caller.
            $($n => unsafe { $self.run::<$n, $panels>() },)*
            _ => unreachable!("a tile has at most {SUMS} sums"),
        }
    };
}

impl Tile {
    /// # Safety
    /// As for [`Tile::run`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn of_rows(&self, rows: usize, panels: usize) {
        if panels == 2 {
            rows!(self, rows, 2: 1 2 3 4 5 6 7 8 9 10 11 12)
        } else {
            rows!(self, rows, 1: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24)
        }
    }

    /// # Safety
    /// `R` rows of `a`, [`PITCH`] apart, and `G` panels of `b` have `2 * pairs` depths, and `c` has their rows and columns.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    #[inline]
    unsafe fn run<const R: usize, const G: usize>(&self) {
        // SAFETY: every address is inside the operands, by the caller's promise.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); G]; R];
            let (mut a, mut b) = (self.a, self.b);
            for _ in 0..self.pairs {
                let mut right = [_mm512_setzero_si512(); G];
                for (g, right) in right.iter_mut().enumerate() {
                    *right = _mm512_loadu_si512(b.add(g * self.panel_len).cast());
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let left = _mm512_set1_epi32(a.add(r * PITCH).cast::<i32>().read_unaligned());
                    for (sum, right) in sums.iter_mut().zip(right) {
                        *sum = _mm512_dpbf16_ps(*sum, pairs(left), pairs(right));
                    }
                }
                a = a.add(2);
                b = b.add(2 * PANEL);
            }
            for (r, sums) in sums.iter().enumerate() {
                for (g, &sum) in sums.iter().enumerate() {
                    let c = self.c.add(r * self.stride + g * PANEL);
                    let sum = if self.add { _mm512_add_ps(_mm512_loadu_ps(c), sum) } else { sum };
                    _mm512_storeu_ps(c, sum);
                }
            }
        }
    }
}

/// The same bits as pairs of bf16.
#[inline(always)]
pub(crate) fn pairs(x: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes without a meaning of their own.
    unsafe { std::mem::transmute(x) }
}
