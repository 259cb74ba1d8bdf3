//! Elementary functions without branches or calls, for loops that become vector code.

/// `e^x`. Relative error below 2e-7 where the result is a normal number; 0 below -104, infinity above 88.73, NaN kept.
///
/// The argument is split as `x = n ln 2 + r` with `|r| <= ln 2 / 2` (ln 2 in two parts, so that the difference is
/// exact), `e^r` is its Taylor polynomial of degree 7, and `2^n` is built from its bits.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    // Written as selects and not as min and max, which would lose NaN.
    let clamped = if x > 89.0 { 89.0 } else { x };
    let clamped = if clamped < -104.0 { -104.0 } else { clamped };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let n_float = shifted - ROUND;
    let r = n_float.mul_add(-LN2_LOW, n_float.mul_add(-LN2_HIGH, clamped));
    let mut p = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = r.mul_add(p, c);
    }
    // In two factors, so that results below the smallest normal number and the step to infinity come out right.
    let half = n >> 1;
    let power = |e: i32| f32::from_bits((e.wrapping_add(127) as u32) << 23);
    let result = p * power(half) * power(n.wrapping_sub(half));
    if x < -104.0 { 0.0 } else { result }
}

/// The hyperbolic tangent, with a relative error below 4e-7; NaN kept.
///
/// Near zero its Taylor polynomial, where `1 - 2 / (e^2x + 1)` would be the difference of nearly equal numbers.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let square = x * x;
    let mut p = 21_844.0 / 6_081_075.0;
    for c in [-1382.0 / 155_925.0, 62.0 / 2835.0, -17.0 / 315.0, 2.0 / 15.0, -1.0 / 3.0, 1.0] {
        p = square.mul_add(p, c);
    }
    let near = x * p;
    let far = 1.0 - 2.0 / (exp(2.0 * x.abs()) + 1.0);
    if x.abs() < 0.4 { near } else { far.copysign(x) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_to_the_f64_function() {
        let mut worst = 0.0f64;
        for step in 0..2_000_000 {
            let x = -87.3 + step as f32 * (175.9 / 2_000_000.0);
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) / exact - 1.0).abs());
        }
        assert!(worst < 2e-7, "relative error {worst:e}");
    }

    #[test]
    fn tanh_is_close_to_the_f64_function() {
        let mut worst = 0.0f64;
        for step in 1..1_000_000 {
            let x = step as f32 * 2e-5 - 10.0;
            let exact = f64::from(x).tanh();
            if exact != 0.0 {
                worst = worst.max((f64::from(tanh(x)) / exact - 1.0).abs());
            }
        }
        assert!(worst < 4e-7, "relative error {worst:e}");
        assert_eq!([0.0, 100.0, f32::INFINITY, f32::NEG_INFINITY].map(tanh), [0.0, 1.0, 1.0, -1.0]);
        assert!(tanh(f32::NAN).is_nan());
    }

    #[test]
    fn exp_at_the_borders() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-200.0), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(88.8), f32::INFINITY);
        assert!(exp(88.7).is_finite());
        assert!(exp(f32::NAN).is_nan());
        let subnormal = exp(-95.0);
        assert!((f64::from(subnormal) - (-95.0f64).exp()).abs() < 1.5e-45);
    }
}
