//! Randomness as a function of where it is used: nothing to store, nothing to restore.

/// Sebastiano Vigna's splitmix64, its finalizer: a bijection of 64 bits that scatters neighbours.
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A seed for one use of a seed: an epoch, a purpose.
pub(crate) fn derive(seed: u64, use_: u64) -> u64 {
    mix(mix(seed) ^ use_)
}

/// The numbers below `n` (at most 2^32) in an order that the seed alone decides (Fisher and Yates).
pub(crate) fn permutation(n: usize, seed: u64) -> Vec<u32> {
    let mut order: Vec<u32> = (0..n as u32).collect();
    for last in (1..n).rev() {
        let bits = u128::from(derive(seed, last as u64));
        // A 64-bit fraction of the range: its bias is below 2^-32 for any number of rows.
        let other = ((bits * (last as u128 + 1)) >> 64) as usize;
        order.swap(last, other);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first outputs of the published generator seeded with 0 and its golden-ratio steps.
    #[test]
    fn mix_is_splitmix64() {
        assert_eq!(mix(0), 0xe220_a839_7b1d_cdaf);
        assert_eq!(mix(0x9e37_79b9_7f4a_7c15), 0x6e78_9e6a_a1b9_65f4);
    }

    #[test]
    fn permutations_hold_every_number_and_are_fair() {
        let mut sorted = permutation(100, 3);
        assert_ne!(sorted, permutation(100, 4));
        assert_eq!(sorted, permutation(100, 3));
        sorted.sort_unstable();
        assert_eq!(sorted, (0..100).collect::<Vec<u32>>());
        // Each of the 24 orders of 4 in 24,000 draws: 1,000 expected, standard deviation 31.
        let mut counts = std::collections::HashMap::new();
        for seed in 0..24_000 {
            *counts.entry(permutation(4, seed)).or_insert(0) += 1;
        }
        assert_eq!(counts.len(), 24);
        assert!(counts.values().all(|count| (850..1150).contains(count)), "{counts:?}");
    }
}
