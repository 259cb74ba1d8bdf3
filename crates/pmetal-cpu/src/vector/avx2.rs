//! The vector of AVX2: eight numbers in a register. Halves are widened and rounded by plain code, which becomes vector code.

use std::arch::x86_64::*;

use super::{Body, ROUND, Vector};
use crate::Element;

/// Runs a body. The level must have AVX2 with FMA.
pub(super) fn run<B: Body>(body: B) -> B::Output {
    #[target_feature(enable = "avx2,fma")]
    unsafe fn with_instructions<B: Body>(body: B) -> B::Output {
        body.run::<__m256>()
    }
    // SAFETY: the caller has asked the level.
    unsafe { with_instructions(body) }
}

#[inline(always)]
fn lanes(x: __m256) -> [f32; 8] {
    // SAFETY: both are eight f32.
    unsafe { std::mem::transmute(x) }
}

#[inline(always)]
fn vector(x: [f32; 8]) -> __m256 {
    // SAFETY: both are eight f32.
    unsafe { std::mem::transmute(x) }
}

/// `2^e`.
#[inline(always)]
fn power(e: __m256i) -> __m256 {
    // SAFETY: see below.
    unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(e, _mm256_set1_epi32(127)))) }
}

// SAFETY of every call below: vectors of this type are only made by bodies that `run` started, on a machine that has the instructions.
impl Vector for __m256 {
    const LANES: usize = 8;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        // SAFETY: see above.
        unsafe { _mm256_set1_ps(x) }
    }

    #[inline(always)]
    fn load<T: Element>(from: &[T]) -> Self {
        let mut x = [0.0; 8];
        for (x, from) in x.iter_mut().zip(&from[..8]) {
            *x = from.to_f32();
        }
        vector(x)
    }

    #[inline(always)]
    fn store<T: Element>(self, to: &mut [T]) {
        for (to, x) in to[..8].iter_mut().zip(lanes(self)) {
            *to = T::from_f32(x);
        }
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        // SAFETY: see above.
        unsafe { _mm256_add_ps(self, other) }
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        // SAFETY: see above.
        unsafe { _mm256_sub_ps(self, other) }
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        // SAFETY: see above.
        unsafe { _mm256_mul_ps(self, other) }
    }

    #[inline(always)]
    fn div(self, other: Self) -> Self {
        // SAFETY: see above.
        unsafe { _mm256_div_ps(self, other) }
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, term: Self) -> Self {
        // SAFETY: see above.
        unsafe { _mm256_fmadd_ps(self, factor, term) }
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        // The instruction returns its second operand where one is NaN.
        // SAFETY: see above.
        unsafe { _mm256_max_ps(other, self) }
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        // SAFETY: see above.
        unsafe { _mm256_min_ps(other, self) }
    }

    #[inline(always)]
    fn round(self) -> Self {
        self.add(Self::splat(ROUND)).sub(Self::splat(ROUND))
    }

    #[inline(always)]
    fn scale(self, exponent: Self) -> Self {
        // In two factors, so that results below the smallest normal number and the step to infinity come out right.
        // SAFETY: see above.
        unsafe {
            let n = _mm256_cvtps_epi32(exponent);
            let half = _mm256_srai_epi32::<1>(n);
            self.mul(power(half)).mul(power(_mm256_sub_epi32(n, half)))
        }
    }

    #[inline(always)]
    fn rounded<T: Element>(self) -> Self {
        let mut x = lanes(self);
        for x in &mut x {
            *x = T::from_f32(*x).to_f32();
        }
        vector(x)
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        let x = lanes(self);
        ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]))
    }

    #[inline(always)]
    fn largest(self) -> f32 {
        let mut largest = f32::NEG_INFINITY;
        for x in lanes(self) {
            largest = Vector::max(largest, x);
        }
        largest
    }
}
