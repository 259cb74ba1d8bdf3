//! Loops compiled for the vector unit of the machine, and the two shapes most loops have.
//!
//! [`simd_fn!`] writes a function whose body is compiled once per instruction set (AVX-512, AVX2, NEON, baseline)
//! and picks one at run time. A body is a plain loop: the compiler vectorises it.

use std::sync::OnceLock;

use pulp::Arch;
use rayon::prelude::*;

use crate::Element;
use crate::level::Level;
use crate::scratch::with_scratch;

/// The instruction set that loops are compiled for on this machine, looked up once.
pub(crate) fn arch() -> Arch {
    static ARCH: OnceLock<Arch> = OnceLock::new();
    *ARCH.get_or_init(|| Level::current().arch())
}

/// Defines a function over slices that runs in the widest instruction set of the machine.
///
/// `fn name['a; T, U](arguments) -> result { body }`: lifetimes, then type parameters, each an `Element`. The body must
/// call only inlined functions, because a call out of it loses the instruction set.
macro_rules! simd_fn {
    ($(#[$meta:meta])* $vis:vis fn $name:ident [$($life:lifetime),*; $($gen:ident),*]
     ($($arg:ident : $ty:ty),* $(,)?) -> $ret:ty $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name<$($life,)* $($gen: $crate::Element),*>($($arg: $ty),*) -> $ret {
            struct Arguments<$($life,)* $($gen: $crate::Element),*> { $($arg: $ty),* }
            impl<$($life,)* $($gen: $crate::Element),*> pulp::WithSimd for Arguments<$($life,)* $($gen),*> {
                type Output = $ret;
                #[inline(always)]
                fn with_simd<S: pulp::Simd>(self, _: S) -> $ret {
                    let Self { $($arg),* } = self;
                    $body
                }
            }
            $crate::simd::arch().dispatch(Arguments { $($arg),* })
        }
    };
}
pub(crate) use simd_fn;

/// Elements that one task works on: large enough to hide the cost of a task, small enough to stay in the cache.
pub(crate) const CHUNK: usize = 1 << 14;

/// Rows of `width` elements that make up one task.
pub(crate) fn rows_per_task(width: usize) -> usize {
    (CHUNK / width.max(1)).max(1)
}

/// Accumulators that a reduction runs side by side, so that it fills the vector unit and hides its latency.
pub(crate) const LANES: usize = 32;

/// Folds pairs of elements into one number with `step(sum so far, a, b)`, 32 sums side by side, added as a tree.
#[inline(always)]
pub(crate) fn fold2<A: Element, B: Element>(a: &[A], b: &[B], step: impl Fn(f32, f32, f32) -> f32) -> f32 {
    fold3(a, b, b, |sum, a, b, _| step(sum, a, b))
}

/// [`fold2`] for three slices.
#[inline(always)]
pub(crate) fn fold3<A: Element, B: Element, C: Element>(
    a: &[A],
    b: &[B],
    c: &[C],
    step: impl Fn(f32, f32, f32, f32) -> f32,
) -> f32 {
    let mut sums = [0.0f32; LANES];
    let (a_chunks, a_tail) = a.as_chunks::<LANES>();
    let (b_chunks, b_tail) = b.as_chunks::<LANES>();
    let (c_chunks, c_tail) = c.as_chunks::<LANES>();
    for ((a, b), c) in a_chunks.iter().zip(b_chunks).zip(c_chunks) {
        // Widened as a whole first: the compiler then works on vectors and not on single lanes.
        let (a, b, c) = (widened(a), widened(b), widened(c));
        sums = std::array::from_fn(|lane| step(sums[lane], a[lane], b[lane], c[lane]));
    }
    for (((sum, a), b), c) in sums.iter_mut().zip(a_tail).zip(b_tail).zip(c_tail) {
        *sum = step(*sum, a.to_f32(), b.to_f32(), c.to_f32());
    }
    sum_lanes(sums)
}

#[inline(always)]
fn widened<T: Element>(x: &[T; LANES]) -> [f32; LANES] {
    std::array::from_fn(|lane| x[lane].to_f32())
}

/// Adds the lanes as a binary tree.
#[inline(always)]
pub(crate) fn sum_lanes(mut sums: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    sums[0]
}

/// Adds to `sums` (`[width]`) what `task(first_row, rows, partial)` adds to a zeroed partial sum for every block of rows.
///
/// Blocks depend on the shape alone and their sums are added in order.
pub(crate) fn column_sums(rows: usize, sums: &mut [f32], task: impl Fn(usize, usize, &mut [f32]) + Send + Sync) {
    let width = sums.len();
    let block = rows_per_task(width).max(32);
    let blocks = rows.div_ceil(block);
    with_scratch(blocks * width, |partials| {
        let run = |(i, partial): (usize, &mut [f32])| {
            partial.fill(0.0);
            task(i * block, block.min(rows - i * block), partial);
        };
        if blocks > 1 {
            partials.par_chunks_exact_mut(width).enumerate().for_each(run);
        } else {
            partials.chunks_exact_mut(width).enumerate().for_each(run);
        }
        for partial in partials.chunks_exact(width) {
            sums.iter_mut().zip(partial).for_each(|(sum, &x)| *sum += x);
        }
    });
}
