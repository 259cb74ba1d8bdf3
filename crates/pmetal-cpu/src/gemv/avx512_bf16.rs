//! Few rows times packed weights by AVX-512's dot products of pairs of bf16.

use std::arch::x86_64::*;

use half::bf16;

use super::TILE_ROWS;
use crate::gemm::{PANEL, pairs};

/// How far ahead the weight is asked for: beyond the end of a page, where the machine's own prefetching stops.
const AHEAD: usize = 4096;

/// Adds the products of `rows` rows `x` with `panels` to `sums [panels][rows][16]`. The length of a row of `x` is even.
pub(super) fn add_products(rows: usize, x: &[bf16], panels: &[bf16], sums: &mut [f32]) {
    let depth = x.len() / rows;
    assert!(depth.is_multiple_of(2) && x.len() == rows * depth, "few_rows: rows of pairs");
    assert_eq!(panels.len() / PANEL * rows, sums.len() / PANEL * depth, "few_rows: panels");
    for row in (0..rows).step_by(TILE_ROWS) {
        let (x, sums) = (&x[row * depth..], &mut sums[row * PANEL..]);
        // SAFETY: the level says that the machine has the instructions; the lengths were checked above: every panel has `depth` pairs of
        // every row, and sums for all rows.
        unsafe {
            match rows - row {
                1 => run::<1>(rows, depth, x, panels, sums),
                2 => run::<2>(rows, depth, x, panels, sums),
                3 => run::<3>(rows, depth, x, panels, sums),
                _ => run::<TILE_ROWS>(rows, depth, x, panels, sums),
            }
        }
    }
}

/// The first `M` of the rows.
///
/// # Safety
/// `x` holds `M` rows of `depth`, an even number; `panels` holds whole panels of it, `sums` `[panels][rows][16]` from the first row on.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn run<const M: usize>(rows: usize, depth: usize, x: &[bf16], panels: &[bf16], sums: &mut [f32]) {
    for (p, panel) in panels.chunks_exact((depth * PANEL).max(1)).enumerate() {
        let (x, panel) = (x.as_ptr(), panel.as_ptr());
        let mut lanes = [[_mm512_setzero_ps(); 2]; M];
        let mut k = 0;
        // SAFETY: pairs of the rows and of the panel, at `k + 2 * n` below `depth`.
        unsafe {
            while k + 4 <= depth {
                step::<M, 2>(x.add(k), depth, panel.add(k * PANEL), &mut lanes);
                k += 4;
            }
            if k < depth {
                step::<M, 1>(x.add(k), depth, panel.add(k * PANEL), &mut lanes);
            }
        }
        for (i, [even, odd]) in lanes.into_iter().enumerate() {
            // SAFETY: the sums of the panel's row `i`.
            unsafe {
                let sums = sums.as_mut_ptr().add((p * rows + i) * PANEL);
                _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), _mm512_add_ps(even, odd)));
            }
        }
    }
}

/// `N` pairs of the sum.
///
/// # Safety
/// `x` points to `N` pairs of `M` rows that are `depth` apart, `panel` to as many of the weight.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[inline]
unsafe fn step<const M: usize, const N: usize>(
    x: *const bf16,
    depth: usize,
    panel: *const bf16,
    lanes: &mut [[__m512; 2]; M],
) {
    for n in 0..N {
        // SAFETY: the caller's promise; asking for what lies ahead reads nothing.
        unsafe {
            let weight = panel.add(n * 2 * PANEL);
            _mm_prefetch::<_MM_HINT_T0>(weight.cast::<i8>().wrapping_add(AHEAD));
            let weight = pairs(_mm512_loadu_si512(weight.cast()));
            for (i, lanes) in lanes.iter_mut().enumerate() {
                let x = pairs(_mm512_set1_epi32(x.add(i * depth + 2 * n).cast::<i32>().read_unaligned()));
                lanes[n] = _mm512_dpbf16_ps(lanes[n], x, weight);
            }
        }
    }
}
