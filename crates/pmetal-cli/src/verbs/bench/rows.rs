//! Rows of random tokens, all of one length or as long as those of real data.

use std::f64::consts::E;

use pmetal::{data::Example, ops::random};

/// Half of the packed rows are shorter.
const MEDIAN: f64 = 256.0;

/// Standard deviation of the logarithm of their lengths. With the median it says that of 100 rows 5 are shorter than 58 tokens, 25 than 139,
/// 75 than 470, 95 than 1,125, 99 than 2,077; the mean is 384. That lies between rows of instructions (Alpaca's: median 166, deviation 0.77)
/// and of conversations (answers to prompts of several turns: 569, 0.95).
const DEVIATION: f64 = 0.9;

/// Token ids without a pattern.
pub fn random_ids(seed: u64, count: usize, vocab_size: usize) -> Vec<u32> {
    (0..count as u64).map(|i| (random::uniform(seed, i) * vocab_size as f32) as u32).collect()
}

/// A row whose every token is trained.
pub fn random_row(seed: u64, tokens: usize, vocab_size: usize) -> Example {
    let input_ids = random_ids(seed, tokens, vocab_size);
    let labels = input_ids.iter().map(|&id| i64::from(id)).collect();
    Example { input_ids, labels }
}

/// Lengths of rows that fill `tokens` tokens together, none above `longest`: drawn anew for each seed, the last cut to what is left.
pub fn packed_lengths(seed: u64, tokens: usize, longest: usize) -> Vec<usize> {
    let mut lengths = Vec::new();
    let mut left = tokens;
    while left > 0 {
        let z = f64::from(random::normal(seed, lengths.len() as u64));
        let drawn = (MEDIAN * E.powf(DEVIATION * z)).round() as usize;
        let mut length = drawn.clamp(2, longest).min(left);
        // no row of one token, which has nothing to predict
        if left - length == 1 {
            length = left;
        }
        lengths.push(length);
        left -= length;
    }
    lengths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packed_rows_fill_a_step_and_have_the_quantiles_that_are_told() {
        let tokens = 4_000_000;
        let mut lengths = packed_lengths(1, tokens, usize::MAX);
        assert_eq!(lengths.iter().sum::<usize>(), tokens);
        lengths.sort_unstable();
        let quantile = |q: f64| lengths[(q * lengths.len() as f64) as usize] as f64;
        for (q, told) in [(0.05, 58.0), (0.25, 139.0), (0.5, 256.0), (0.75, 470.0), (0.95, 1125.0), (0.99, 2077.0)] {
            let found = quantile(q);
            assert!((found / told - 1.0).abs() < 0.1, "quantile {q}: {found}, told {told}");
        }
        for seed in 0..50 {
            let lengths = packed_lengths(seed, 1025, 512);
            assert_eq!(lengths.iter().sum::<usize>(), 1025);
            assert!(lengths.iter().all(|&length| (2..=513).contains(&length)), "{lengths:?}");
        }
    }
}
