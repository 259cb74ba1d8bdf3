//! Numbers that are computed with side by side, and bodies of kernels that are written once for any number of them.
//!
//! A [`Vector`] is one `f32`, a register of AVX2 or AVX-512, or an array of vectors. A body that works on arrays gives the processor several
//! chains of dependent instructions at a time, which hides their latency; compilers leave a loop with one.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod sweep;

pub(crate) use sweep::{Step, Term, sweep, total};

#[cfg(target_arch = "x86_64")]
use crate::level::Level;
use crate::{Element, simd::arch};

/// [`Vector::LANES`] f32 numbers.
pub(crate) trait Vector: Copy {
    /// How many numbers.
    const LANES: usize;

    /// The same number in every lane.
    fn splat(x: f32) -> Self;
    /// The first [`Self::LANES`] elements, widened.
    fn load<T: Element>(from: &[T]) -> Self;
    /// Writes the numbers, rounded, to the first [`Self::LANES`] elements.
    fn store<T: Element>(self, to: &mut [T]);
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn div(self, other: Self) -> Self;
    /// `self * factor + term`, rounded once where the machine can.
    fn mul_add(self, factor: Self, term: Self) -> Self;
    /// The larger one; `self` where one is NaN.
    fn max(self, other: Self) -> Self;
    /// The smaller one; `self` where one is NaN.
    fn min(self, other: Self) -> Self;
    /// To the nearest integer.
    fn round(self) -> Self;
    /// `self * 2^exponent` for an integral exponent from -151 to 128.
    fn scale(self, exponent: Self) -> Self;
    /// To the nearest value of a dtype.
    fn rounded<T: Element>(self) -> Self;
    /// The sum of the lanes, as a tree.
    fn sum(self) -> f32;
    /// The largest of the lanes; a NaN may be lost.
    fn largest(self) -> f32;

    /// `(n, r)` with an integral `n`, `self = n ln 2 + r` and `|r| <= ln 2 / 2`. ln 2 is in two parts, so that the difference is exact.
    #[inline(always)]
    fn parts(self) -> (Self, Self) {
        const LN2_HIGH: f32 = 0.693_359_4;
        const LN2_LOW: f32 = -2.121_944_4e-4;
        let splat = Self::splat;
        let n = self.mul(splat(std::f32::consts::LOG2_E)).round();
        (n, n.mul_add(splat(-LN2_LOW), n.mul_add(splat(-LN2_HIGH), self)))
    }

    /// `e^self`. Relative error below 2e-7 where the result is a normal number; 0 below -104, infinity above 88.73, NaN kept.
    ///
    /// The argument is split by [`Vector::parts`], and `e^r` is its Taylor polynomial of degree 7.
    #[inline(always)]
    fn exp(self) -> Self {
        let splat = Self::splat;
        let (n, r) = self.min(splat(89.0)).max(splat(-104.5)).parts();
        let mut p = splat(1.0 / 5040.0);
        for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            p = r.mul_add(p, splat(c));
        }
        p.scale(n)
    }

    /// `tanh(self)`. Relative error below 5e-7.
    ///
    /// With `u = e^(2 self) - 1` it is `u / (u + 2)`; `u` is formed from `e^r - 1` as [`Vector::exp`] forms `e^r`, so that small numbers
    /// keep their digits.
    #[inline(always)]
    fn tanh(self) -> Self {
        let splat = Self::splat;
        let (n, r) = self.add(self).min(splat(30.0)).max(splat(-30.0)).parts();
        let mut p = splat(1.0 / 5040.0);
        for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0] {
            p = r.mul_add(p, splat(c));
        }
        let power = splat(1.0).scale(n);
        let u = p.mul(r).mul_add(power, power.sub(splat(1.0)));
        u.div(u.add(splat(2.0)))
    }

    /// `1 / (1 + e^-self)`.
    #[inline(always)]
    fn sigmoid(self) -> Self {
        let one = Self::splat(1.0);
        one.div(one.add(Self::splat(0.0).sub(self).exp()))
    }
}

/// 1.5 * 2^23: added to a number, it leaves the nearest integer in the low bits of the sum.
const ROUND: f32 = 12_582_912.0;

/// `2^e`.
#[inline(always)]
fn power(e: i32) -> f32 {
    f32::from_bits((e.wrapping_add(127) as u32) << 23)
}

impl Vector for f32 {
    const LANES: usize = 1;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        x
    }

    #[inline(always)]
    fn load<T: Element>(from: &[T]) -> Self {
        from[0].to_f32()
    }

    #[inline(always)]
    fn store<T: Element>(self, to: &mut [T]) {
        to[0] = T::from_f32(self);
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self + other
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self - other
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self * other
    }

    #[inline(always)]
    fn div(self, other: Self) -> Self {
        self / other
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, term: Self) -> Self {
        // not `f32::mul_add`, which without an instruction is a slow function
        self * factor + term
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        if other > self { other } else { self }
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        if other < self { other } else { self }
    }

    #[inline(always)]
    fn round(self) -> Self {
        self + ROUND - ROUND
    }

    #[inline(always)]
    fn scale(self, exponent: Self) -> Self {
        // In two factors, so that results below the smallest normal number and the step to infinity come out right.
        let n = ((exponent + ROUND).to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
        let half = n >> 1;
        self * power(half) * power(n.wrapping_sub(half))
    }

    #[inline(always)]
    fn rounded<T: Element>(self) -> Self {
        T::from_f32(self).to_f32()
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        self
    }

    #[inline(always)]
    fn largest(self) -> f32 {
        self
    }
}

/// `$result[i] = $value` for every vector of an array: a loop, because the closure of `std::array::from_fn` need not be inlined.
macro_rules! each {
    ($array:expr, $i:ident => $value:expr) => {{
        let mut result = $array;
        let mut $i = 0;
        while $i < N {
            result[$i] = $value;
            $i += 1;
        }
        result
    }};
}

impl<V: Vector, const N: usize> Vector for [V; N] {
    const LANES: usize = N * V::LANES;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        [V::splat(x); N]
    }

    #[inline(always)]
    fn load<T: Element>(from: &[T]) -> Self {
        let from = &from[..Self::LANES];
        each!(Self::splat(0.0), i => V::load(&from[i * V::LANES..]))
    }

    #[inline(always)]
    fn store<T: Element>(self, to: &mut [T]) {
        let to = &mut to[..Self::LANES];
        let mut i = 0;
        while i < N {
            self[i].store(&mut to[i * V::LANES..]);
            i += 1;
        }
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        each!(self, i => self[i].add(other[i]))
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        each!(self, i => self[i].sub(other[i]))
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        each!(self, i => self[i].mul(other[i]))
    }

    #[inline(always)]
    fn div(self, other: Self) -> Self {
        each!(self, i => self[i].div(other[i]))
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, term: Self) -> Self {
        each!(self, i => self[i].mul_add(factor[i], term[i]))
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        each!(self, i => self[i].max(other[i]))
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        each!(self, i => self[i].min(other[i]))
    }

    #[inline(always)]
    fn round(self) -> Self {
        each!(self, i => self[i].round())
    }

    #[inline(always)]
    fn scale(self, exponent: Self) -> Self {
        each!(self, i => self[i].scale(exponent[i]))
    }

    #[inline(always)]
    fn rounded<T: Element>(self) -> Self {
        each!(self, i => self[i].rounded::<T>())
    }

    #[inline(always)]
    fn sum(mut self) -> f32 {
        let mut width = N;
        while width > 1 {
            let half = width / 2;
            for i in 0..half {
                self[i] = self[i].add(self[i + width - half]);
            }
            width -= half;
        }
        self[0].sum()
    }

    #[inline(always)]
    fn largest(self) -> f32 {
        let mut largest = self[0];
        for &vector in &self[1..] {
            largest = largest.max(vector);
        }
        largest.largest()
    }
}

/// A kernel's work on one thread, compiled for whatever vector the level has.
///
/// What `run` calls must be inlined: a call out of it loses the instruction set.
pub(crate) trait Body {
    /// What it returns.
    type Output;

    /// The work, with vectors of `V`.
    fn run<V: Vector>(self) -> Self::Output;
}

/// Runs a body with the vectors of [`Level::current`].
pub(crate) fn run<B: Body>(body: B) -> B::Output {
    struct Anywhere<B>(B);
    impl<B: Body> pulp::WithSimd for Anywhere<B> {
        type Output = B::Output;
        #[inline(always)]
        fn with_simd<S: pulp::Simd>(self, _: S) -> B::Output {
            self.0.run::<[f32; 16]>()
        }
    }
    #[cfg(target_arch = "x86_64")]
    match Level::current() {
        Level::Avx512Bf16 | Level::Amx => return avx512::run(body),
        Level::Avx2 | Level::Avx512 => return avx2::run(body),
        _ => {}
    }
    arch().dispatch(Anywhere(body))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Functions<'a> {
        x: &'a [f32],
        exp: &'a mut [f32],
        sigmoid: &'a mut [f32],
    }

    impl Body for Functions<'_> {
        type Output = ();

        #[inline(always)]
        fn run<V: Vector>(mut self) {
            sweep::<V>(self.x.len(), &mut self);
        }
    }

    impl Step for Functions<'_> {
        #[inline(always)]
        fn step<V: Vector>(&mut self, at: usize) {
            let x = V::load(&self.x[at..]);
            x.exp().store(&mut self.exp[at..]);
            x.sigmoid().store(&mut self.sigmoid[at..]);
        }
    }

    fn functions(x: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let (mut exp, mut sigmoid) = (x.to_vec(), x.to_vec());
        run(Functions { x, exp: &mut exp, sigmoid: &mut sigmoid });
        (exp, sigmoid)
    }

    #[test]
    fn exp_is_close_to_the_f64_function() {
        let x: Vec<f32> = (0..1_000_003).map(|step| -87.3 + step as f32 * (175.9 / 1_000_003.0)).collect();
        let (exp, sigmoid) = functions(&x);
        for ((x, exp), sigmoid) in x.into_iter().map(f64::from).zip(exp).zip(sigmoid) {
            assert!((f64::from(exp) / x.exp() - 1.0).abs() < 2e-7, "e^{x}");
            let exact = 1.0 / (1.0 + (-x).exp());
            assert!((f64::from(sigmoid) - exact).abs() <= 4e-7 * exact, "sigmoid {x}");
        }
    }

    /// Among many, which vectors hold, and behind the last vector.
    #[test]
    fn exp_and_sigmoid_at_the_borders() {
        let at = |x: f32, right: &dyn Fn(f32, f32) -> bool| {
            let (exp, sigmoid) = functions(&[x; 101]);
            assert!(exp.iter().zip(&sigmoid).all(|(&e, &s)| right(e, s)), "{x}: {exp:?} {sigmoid:?}");
        };
        at(0.0, &|e, s| e == 1.0 && s == 0.5);
        at(f32::NEG_INFINITY, &|e, s| e == 0.0 && s == 0.0);
        at(-200.0, &|e, s| e == 0.0 && s == 0.0);
        at(f32::INFINITY, &|e, s| e == f32::INFINITY && s == 1.0);
        at(88.8, &|e, _| e == f32::INFINITY);
        at(88.7, &|e, _| e.is_finite());
        at(f32::NAN, &|e, s| e.is_nan() && s.is_nan());
        at(-95.0, &|e, _| (f64::from(e) - (-95.0f64).exp()).abs() < 1.5e-45);
    }
}
