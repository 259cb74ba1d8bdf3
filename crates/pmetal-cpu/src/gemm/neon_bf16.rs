//! Tiles of a product by NEON's dot products of pairs of bf16 (`bfdot`, of Armv8.6).

use std::arch::aarch64::*;
use std::arch::asm;

use half::bf16;

use super::PANEL;
use super::driver::{PITCH, Slice};

/// Rows of a tile: 24 sums, a vector of each row and two of the right operand fill the registers.
const ROWS: usize = 6;
/// Vectors of sums that a panel's columns fill.
const VECTORS: usize = PANEL / 4;
/// Pairs that a vector of a row holds.
const PAIRS: usize = 4;

/// `c [rows][panels * 16] (+)= a b` for a slice of the sum.
pub(super) fn multiply(slice: &Slice<bf16>, c: &mut [f32]) {
    slice.check(c, PANEL);
    // SAFETY: the level says that the machine has the instructions; `check` saw that the slices hold what is read and written.
    unsafe { tiles(slice, c) }
}

#[target_feature(enable = "neon,bf16")]
unsafe fn tiles(slice: &Slice<bf16>, c: &mut [f32]) {
    let stride = slice.panels * PANEL;
    for panel in 0..slice.panels {
        for row in (0..slice.rows).step_by(ROWS) {
            // SAFETY: row and panel lie inside the slice, whose sizes the caller checked.
            unsafe {
                let tile = Tile {
                    a: slice.a.as_ptr().add(row * PITCH).cast(),
                    b: slice.b.as_ptr().add(panel * slice.panel_len).cast(),
                    pairs: slice.depths / 2,
                    c: c.as_mut_ptr().add(row * stride + panel * PANEL),
                    stride,
                    add: slice.add,
                };
                match (slice.rows - row).min(ROWS) {
                    1 => tile.run::<1>(),
                    2 => tile.run::<2>(),
                    3 => tile.run::<3>(),
                    4 => tile.run::<4>(),
                    5 => tile.run::<5>(),
                    _ => tile.run::<ROWS>(),
                }
            }
        }
    }
}

/// Pointers to the first elements of a tile's operands.
struct Tile {
    a: *const u16,
    b: *const u16,
    pairs: usize,
    c: *mut f32,
    stride: usize,
    add: bool,
}

/// Adds the products of lane `$lane` of the rows with a pair of depths of a panel. A macro, so that the sums stay in registers.
macro_rules! add_pair {
    ($sums:ident, $left:ident, $b:expr, $lane:literal) => {
        for v in 0..VECTORS {
            let right = vld1q_u16($b.add(8 * v));
            for (sums, &left) in $sums.iter_mut().zip(&$left) {
                sums[v] = dot::<$lane>(sums[v], right, left);
            }
        }
    };
}

impl Tile {
    /// # Safety
    /// The machine has `bfdot`; `R` rows of `a`, [`PITCH`] apart, and the panel `b` have `2 * pairs` depths, and `c` has their rows and the
    /// panel's columns.
    #[target_feature(enable = "neon,bf16")]
    unsafe fn run<const R: usize>(&self) {
        // SAFETY: every address is inside the operands, by the caller's promise.
        unsafe {
            let mut sums = [[vdupq_n_f32(0.0); VECTORS]; R];
            let (mut a, mut b) = (self.a, self.b);
            for _ in 0..self.pairs / PAIRS {
                let mut left = [vdupq_n_u16(0); R];
                for (r, left) in left.iter_mut().enumerate() {
                    *left = vld1q_u16(a.add(r * PITCH));
                }
                add_pair!(sums, left, b, 0);
                add_pair!(sums, left, b.add(2 * PANEL), 1);
                add_pair!(sums, left, b.add(4 * PANEL), 2);
                add_pair!(sums, left, b.add(6 * PANEL), 3);
                a = a.add(2 * PAIRS);
                b = b.add(2 * PAIRS * PANEL);
            }
            for _ in 0..self.pairs % PAIRS {
                let mut left = [vdupq_n_u16(0); R];
                for (r, left) in left.iter_mut().enumerate() {
                    *left = vreinterpretq_u16_u32(vdupq_n_u32(a.add(r * PITCH).cast::<u32>().read_unaligned()));
                }
                add_pair!(sums, left, b, 0);
                a = a.add(2);
                b = b.add(2 * PANEL);
            }
            for (r, sums) in sums.iter().enumerate() {
                for (v, &sum) in sums.iter().enumerate() {
                    let c = self.c.add(r * self.stride + 4 * v);
                    vst1q_f32(c, if self.add { vaddq_f32(vld1q_f32(c), sum) } else { sum });
                }
            }
        }
    }
}

/// `sum + right * left[LANE]`, pair by pair.
#[target_feature(enable = "neon,bf16")]
#[inline]
fn dot<const LANE: usize>(mut sum: float32x4_t, right: uint16x8_t, left: uint16x8_t) -> float32x4_t {
    // SAFETY: the instruction reads and writes these registers alone. The compiler has no stable intrinsic for it.
    unsafe {
        asm!(
            "bfdot {sum:v}.4s, {right:v}.8h, {left:v}.2h[{lane}]",
            sum = inout(vreg) sum,
            right = in(vreg) right,
            left = in(vreg) left,
            lane = const LANE,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}
