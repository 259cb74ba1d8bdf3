//! The numbers that kernels read and write: f32, bf16 and f16, all computed with in f32.
//!
//! The conversions use integer operations and selects instead of branches and calls, so that a loop over a slice
//! becomes vector code for whatever unit the loop is compiled for.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::fmt::Debug;

use half::{bf16, f16};

use crate::gemm::{Mat, Matrix};

/// A number that tensors are made of. Rounding is to nearest, ties to even; NaN stays NaN.
pub trait Element: Copy + Send + Sync + Default + PartialEq + Debug + 'static {
    /// Zero.
    const ZERO: Self;

    /// Widens, exactly.
    fn to_f32(self) -> f32;

    /// Rounds to the nearest value of this type.
    fn from_f32(value: f32) -> Self;

    /// A matrix of any dtype out of one of this.
    #[doc(hidden)]
    fn matrix(matrix: Mat<Self>) -> Matrix;

    /// Sixteen of them, widened.
    ///
    /// # Safety
    /// There are sixteen, and the machine has AVX-512 with bf16.
    #[cfg(target_arch = "x86_64")]
    #[doc(hidden)]
    unsafe fn load_16(from: *const Self) -> __m512;

    /// Rounds sixteen numbers, and writes them.
    ///
    /// # Safety
    /// There is room for sixteen, and the machine has AVX-512 with bf16.
    #[cfg(target_arch = "x86_64")]
    #[doc(hidden)]
    unsafe fn store_16(to: *mut Self, numbers: __m512);

    /// Rounds sixteen numbers to this type.
    ///
    /// # Safety
    /// The machine has AVX-512 with bf16.
    #[cfg(target_arch = "x86_64")]
    #[doc(hidden)]
    unsafe fn rounded_16(numbers: __m512) -> __m512;
}

impl Element for f32 {
    const ZERO: Self = 0.0;

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }

    fn matrix(matrix: Mat<Self>) -> Matrix {
        Matrix::F32(matrix)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load_16(from: *const Self) -> __m512 {
        // SAFETY: the caller's promises.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn store_16(to: *mut Self, numbers: __m512) {
        // SAFETY: the caller's promises.
        unsafe { _mm512_storeu_ps(to, numbers) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn rounded_16(numbers: __m512) -> __m512 {
        numbers
    }
}

impl Element for bf16 {
    const ZERO: Self = bf16::ZERO;

    fn matrix(matrix: Mat<Self>) -> Matrix {
        Matrix::Bf16(matrix)
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        // A NaN whose payload sits in the low half would round to infinity: keep the high half and make it quiet.
        let nan = (bits >> 16) | 0x40;
        let is_nan = bits & 0x7fff_ffff > 0x7f80_0000;
        bf16::from_bits(if is_nan { nan } else { rounded } as u16)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load_16(from: *const Self) -> __m512 {
        // SAFETY: the caller's promises.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast())))) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn store_16(to: *mut Self, numbers: __m512) {
        // SAFETY: the caller's promises.
        unsafe { _mm256_storeu_si256(to.cast(), std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(numbers))) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn rounded_16(numbers: __m512) -> __m512 {
        // SAFETY: the caller's promises.
        unsafe {
            let halves = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(numbers));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
        }
    }
}

impl Element for f16 {
    const ZERO: Self = f16::ZERO;

    fn matrix(matrix: Mat<Self>) -> Matrix {
        Matrix::F16(matrix)
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        let half = u32::from(self.to_bits());
        // The exponent is rebased by a product, which turns f16's subnormals into ordinary f32 numbers exactly.
        let rebase = f32::from_bits((127 + 127 - 15) << 23);
        let magnitude = f32::from_bits((half & 0x7fff) << 13) * rebase;
        let overflow = f32::from_bits((127 + 16) << 23);
        let bits = magnitude.to_bits();
        let bits = if magnitude >= overflow { bits | 0x7f80_0000 } else { bits };
        f32::from_bits(bits | ((half & 0x8000) << 16))
    }

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        let bits = value.to_bits();
        let magnitude = bits & 0x7fff_ffff;
        // Normal numbers: rebase the exponent and round the 13 bits that fall off.
        let odd = (magnitude >> 13) & 1;
        let normal = magnitude.wrapping_add(((15u32.wrapping_sub(127)) << 23).wrapping_add(0xfff + odd)) >> 13;
        // Subnormal results: adding 0.5 moves the number to where the unit of the last place is f16's smallest step,
        // and the addition itself rounds.
        let shifted = (f32::from_bits(magnitude) + 0.5).to_bits();
        let subnormal = shifted.wrapping_sub(0.5f32.to_bits());
        let infinity = 0x7c00;
        let nan = 0x7e00 | ((magnitude >> 13) & 0x3ff);
        let finite = if magnitude < (113 << 23) { subnormal } else { normal };
        let large = if magnitude > 0x7f80_0000 { nan } else { infinity };
        let result = if magnitude >= ((127 + 16) << 23) { large } else { finite };
        f16::from_bits((result | ((bits >> 16) & 0x8000)) as u16)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load_16(from: *const Self) -> __m512 {
        // SAFETY: the caller's promises.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn store_16(to: *mut Self, numbers: __m512) {
        // SAFETY: the caller's promises.
        unsafe { _mm256_storeu_si256(to.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(numbers)) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn rounded_16(numbers: __m512) -> __m512 {
        // SAFETY: the caller's promises.
        unsafe { _mm512_cvtph_ps(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(numbers)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_widens_as_the_half_crate_says() {
        for bits in 0..=u16::MAX {
            let (b, h) = (bf16::from_bits(bits), f16::from_bits(bits));
            assert_eq!(Element::to_f32(b).to_bits(), f32::from_bits(u32::from(bits) << 16).to_bits());
            if h.is_nan() {
                assert!(Element::to_f32(h).is_nan());
            } else {
                assert_eq!(Element::to_f32(h).to_bits(), h.to_f32_const().to_bits(), "{bits:#x}");
            }
        }
    }

    #[test]
    fn rounding_agrees_with_the_half_crate_near_every_half() {
        for bits in 0..=u16::MAX {
            for centre in
                [bf16::from_bits(bits).to_bits() as u32 * 65536, f16::from_bits(bits).to_f32_const().to_bits()]
            {
                // The number itself, its neighbours, and both sides of the two midpoints around it.
                for offset in [0, 1, 0x7fff, 0x8000, 0x8001, 0xfff, 0x1000, 0x1001] {
                    for value in [centre.wrapping_add(offset), centre.wrapping_sub(offset)] {
                        check(f32::from_bits(value));
                    }
                }
            }
        }
    }

    fn check(value: f32) {
        let (b, h) = (<bf16 as Element>::from_f32(value), <f16 as Element>::from_f32(value));
        if value.is_nan() {
            assert!(b.is_nan() && h.is_nan());
        } else {
            assert_eq!(b.to_bits(), bf16::from_f32_const(value).to_bits(), "{value:e}");
            assert_eq!(h.to_bits(), f16::from_f32_const(value).to_bits(), "{value:e}");
        }
    }
}
