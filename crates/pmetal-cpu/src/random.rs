//! Random numbers as functions of a seed and a counter: nothing to carry along, nothing to restore.
//!
//! The generator is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014)
//! read at any position: output `i` of the stream `seed` is the finaliser applied to `seed + (i + 1) * gamma`.

/// The increment of SplitMix64: 2^64 divided by the golden ratio, made odd.
const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finaliser of SplitMix64 (variant 13 of Stafford's mixers): a bijection that spreads every input bit.
#[inline(always)]
fn finalise(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// 64 random bits: output `counter` of the stream `seed`.
#[inline(always)]
fn bits(seed: u64, counter: u64) -> u64 {
    finalise(seed.wrapping_add(counter.wrapping_add(1).wrapping_mul(GAMMA)))
}

/// A number in `[0, 1)`, a multiple of 2^-24.
#[inline(always)]
pub fn uniform(seed: u64, counter: u64) -> f32 {
    (bits(seed, counter) >> 40) as u32 as f32 * (1.0 / 16_777_216.0)
}

/// A number from the standard normal distribution (Box and Muller, 1958).
pub fn normal(seed: u64, counter: u64) -> f32 {
    let random = bits(seed, counter);
    // One half of the bits is the radius, kept away from zero, the other the angle.
    let radius = ((random >> 32) as f64 + 1.0) / 4_294_967_296.0;
    let angle = (random & 0xffff_ffff) as f64 / 4_294_967_296.0;
    ((-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()) as f32
}

/// The seed of a stream of its own for a place: `words` are, for example, the step, the layer and the use.
pub fn mix(seed: u64, words: &[u64]) -> u64 {
    words.iter().fold(finalise(seed.wrapping_add(GAMMA)), |state, &word| {
        finalise(state.wrapping_add(GAMMA) ^ finalise(word.wrapping_add(GAMMA)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first outputs of the reference implementation (splitmix64.c by Vigna) for the seed 1234567.
    #[test]
    fn stream_is_splitmix64() {
        let expected: [u64; 4] = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431];
        for (counter, &word) in expected.iter().enumerate() {
            assert_eq!(bits(1_234_567, counter as u64), word);
        }
    }

    #[test]
    fn moments_of_both_distributions() {
        let n = 200_000;
        let mean = |f: &dyn Fn(u64) -> f64| (0..n).map(f).sum::<f64>() / n as f64;
        let u = |i| f64::from(uniform(7, i));
        let g = |i| f64::from(normal(7, i));
        assert!((0..n).all(|i| (0.0..1.0).contains(&u(i)) && g(i).is_finite()));
        assert!((mean(&u) - 0.5).abs() < 3e-3);
        assert!((mean(&|i| u(i).powi(2)) - 1.0 / 3.0).abs() < 3e-3);
        assert!(mean(&g).abs() < 1e-2);
        assert!((mean(&|i| g(i).powi(2)) - 1.0).abs() < 2e-2);
        assert!((mean(&|i| g(i).powi(4)) - 3.0).abs() < 0.1);
    }

    #[test]
    fn streams_depend_on_every_word_and_its_place() {
        let seeds = [mix(1, &[]), mix(2, &[]), mix(1, &[0]), mix(1, &[0, 0]), mix(1, &[1, 2]), mix(1, &[2, 1])];
        for (i, a) in seeds.iter().enumerate() {
            assert!(seeds[i + 1..].iter().all(|b| a != b));
        }
    }
}
