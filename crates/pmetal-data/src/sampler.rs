use crate::mix::{derive, permutation};

/// Batches within which rows are sorted by length: enough for batches of like lengths, few enough to stay random.
const WINDOW: usize = 32;

/// Which rows (or packs) share a micro-batch, epoch by epoch: a function of seed and epoch alone.
#[derive(Debug, Clone)]
pub struct Sampler {
    lengths: Vec<usize>,
    batch_size: usize,
    seed: u64,
    shuffle: bool,
}

impl Sampler {
    /// `batch_size` (at least 1) rows per micro-batch, the last one perhaps fewer. `lengths` are the tokens of each row. Shuffled,
    /// rows come in another order each epoch, and those of similar length share a batch; else they come in order.
    pub fn new(lengths: Vec<usize>, batch_size: usize, seed: u64, shuffle: bool) -> Self {
        Self { lengths, batch_size: batch_size.max(1), seed, shuffle }
    }

    /// The rows of each micro-batch of an epoch (counted from 0), in order.
    pub fn epoch(&self, epoch: usize) -> Vec<Vec<usize>> {
        if self.shuffle {
            return self.shuffled(derive(self.seed, epoch as u64));
        }
        let order: Vec<usize> = (0..self.lengths.len()).collect();
        order.chunks(self.batch_size).map(<[usize]>::to_vec).collect()
    }

    fn shuffled(&self, seed: u64) -> Vec<Vec<usize>> {
        let order = permutation(self.lengths.len(), seed);
        let mut batches = Vec::with_capacity(order.len().div_ceil(self.batch_size));
        for (window, rows) in order.chunks(self.batch_size * WINDOW).enumerate() {
            let mut rows = rows.to_vec();
            rows.sort_by_key(|&row| self.lengths.get(row));
            let mut sorted: Vec<&[usize]> = rows.chunks(self.batch_size).collect();
            // The batch that is not full, if any, stays the epoch's last.
            let partial = sorted.pop_if(|batch| batch.len() < self.batch_size);
            let order = permutation(sorted.len(), derive(seed, window as u64));
            let shuffled = order.into_iter().filter_map(|batch| sorted.get(batch));
            batches.extend(shuffled.map(|batch| batch.to_vec()));
            batches.extend(partial.map(<[usize]>::to_vec));
        }
        batches
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths() -> Vec<usize> {
        (0..1003).map(|row| 10 + (row * 7919) % 500).collect()
    }

    #[test]
    fn an_epoch_has_every_row_once() {
        for shuffle in [false, true] {
            let epoch = Sampler::new(lengths(), 4, 7, shuffle).epoch(0);
            assert_eq!(epoch.len(), 251);
            assert!(epoch[..250].iter().all(|batch| batch.len() == 4));
            assert_eq!(epoch[250].len(), 3);
            let mut rows: Vec<usize> = epoch.concat();
            assert_eq!(rows.is_sorted(), !shuffle);
            rows.sort_unstable();
            assert_eq!(rows, (0..1003).collect::<Vec<_>>());
        }
    }

    #[test]
    fn shuffles_depend_on_seed_and_epoch_alone() {
        let epoch = |seed, epoch| Sampler::new(lengths(), 4, seed, true).epoch(epoch);
        assert_eq!(epoch(7, 1), epoch(7, 1));
        assert_ne!(epoch(7, 1), epoch(7, 2));
        assert_ne!(epoch(7, 1), epoch(8, 1));
    }

    #[test]
    fn rows_of_like_length_share_a_batch() {
        let lengths = lengths();
        let spread = |batches: Vec<Vec<usize>>| -> usize {
            let of = |batch: &Vec<usize>| batch.iter().map(|&row| lengths[row]).collect::<Vec<_>>();
            let lengths = batches.iter().map(of);
            lengths.map(|l| l.iter().max().unwrap() - l.iter().min().unwrap()).sum::<usize>() / batches.len()
        };
        let sampler = |shuffle| Sampler::new(lengths.clone(), 4, 1, shuffle).epoch(0);
        assert!(spread(sampler(true)) < 20 && spread(sampler(false)) > 200);
    }
}
