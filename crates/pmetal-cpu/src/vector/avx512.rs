//! The vector of AVX-512: sixteen numbers in a register. bf16 is rounded by its own instruction, which takes subnormal numbers for zeros.

use std::arch::x86_64::*;

use super::{Body, Vector};
use crate::Element;

/// Runs a body. The level must have AVX-512 with bf16.
pub(super) fn run<B: Body>(body: B) -> B::Output {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,avx2,f16c")]
    unsafe fn with_instructions<B: Body>(body: B) -> B::Output {
        body.run::<__m512>()
    }
    // SAFETY: the caller has asked the level.
    unsafe { with_instructions(body) }
}

// SAFETY of every call below: vectors of this type are only made by bodies that `run` started, on a machine that has the instructions.
impl Vector for __m512 {
    const LANES: usize = 16;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        // SAFETY: see above.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    fn load<T: Element>(from: &[T]) -> Self {
        assert!(from.len() >= 16, "a vector of {} elements", from.len());
        // SAFETY: see above; sixteen elements are there.
        unsafe { T::load_16(from.as_ptr()) }
    }

    #[inline(always)]
    fn store<T: Element>(self, to: &mut [T]) {
        assert!(to.len() >= 16, "a vector of {} elements", to.len());
        // SAFETY: see above; sixteen elements are there.
        unsafe { T::store_16(to.as_mut_ptr(), self) }
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        // SAFETY: see above.
        unsafe { _mm512_add_ps(self, other) }
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        // SAFETY: see above.
        unsafe { _mm512_sub_ps(self, other) }
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        // SAFETY: see above.
        unsafe { _mm512_mul_ps(self, other) }
    }

    #[inline(always)]
    fn div(self, other: Self) -> Self {
        // SAFETY: see above.
        unsafe { _mm512_div_ps(self, other) }
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, term: Self) -> Self {
        // SAFETY: see above.
        unsafe { _mm512_fmadd_ps(self, factor, term) }
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        // The instruction returns its second operand where one is NaN.
        // SAFETY: see above.
        unsafe { _mm512_max_ps(other, self) }
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        // SAFETY: see above.
        unsafe { _mm512_min_ps(other, self) }
    }

    #[inline(always)]
    fn round(self) -> Self {
        // SAFETY: see above.
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self) }
    }

    #[inline(always)]
    fn scale(self, exponent: Self) -> Self {
        // SAFETY: see above.
        unsafe { _mm512_scalef_ps(self, exponent) }
    }

    #[inline(always)]
    fn rounded<T: Element>(self) -> Self {
        // SAFETY: see above.
        unsafe { T::rounded_16(self) }
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        // SAFETY: see above.
        unsafe { _mm512_reduce_add_ps(self) }
    }

    #[inline(always)]
    fn largest(self) -> f32 {
        // SAFETY: see above.
        unsafe { _mm512_reduce_max_ps(self) }
    }
}
