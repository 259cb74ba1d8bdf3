use crate::mix::{derive, permutation};

/// Batches within which rows are sorted by length: enough for batches of like lengths, few enough to stay random.
const WINDOW: usize = 32;

/// Which rows (or packs) share a micro-batch, epoch by epoch: a function of seed and epoch alone.
#[derive(Debug, Clone)]
pub struct Sampler {
    lengths: Vec<u32>,
    batch_size: usize,
    seed: u64,
    shuffle: bool,
}

impl Sampler {
    /// `batch_size` (at least 1) rows per micro-batch, the last one perhaps fewer. `lengths` are the tokens of each row. Shuffled,
    /// rows come in another order each epoch, and those of similar length share a batch; else they come in order.
    pub fn new(lengths: Vec<u32>, batch_size: usize, seed: u64, shuffle: bool) -> Self {
        Self { lengths, batch_size: batch_size.max(1), seed, shuffle }
    }

    /// Micro-batches of an epoch.
    pub fn batches(&self) -> usize {
        self.lengths.len().div_ceil(self.batch_size)
    }

    /// Tokens of all rows.
    pub fn tokens(&self) -> u64 {
        self.lengths.iter().map(|&length| u64::from(length)).sum()
    }

    /// Tokens of the largest micro-batch of the first epoch.
    pub fn largest_batch_tokens(&self) -> u64 {
        let length = |row: &usize| self.lengths.get(*row).map_or(0, |&length| u64::from(length));
        self.epoch(0).map(|batch| batch.iter().map(length).sum()).max().unwrap_or(0)
    }

    /// The rows of each micro-batch of an epoch (counted from 0), in order.
    pub fn epoch(&self, epoch: usize) -> Box<dyn Iterator<Item = Vec<usize>> + '_> {
        let rows = self.lengths.len();
        if !self.shuffle {
            let starts = (0..rows).step_by(self.batch_size);
            return Box::new(starts.map(move |start| (start..rows.min(start + self.batch_size)).collect()));
        }
        let seed = derive(self.seed, epoch as u64);
        let order = permutation(rows, seed);
        let window = self.batch_size.saturating_mul(WINDOW);
        let windows = (0..rows.div_ceil(window)).flat_map(move |at| {
            let rows = order.get(at * window..).unwrap_or_default();
            self.window(rows.get(..window).unwrap_or(rows), derive(seed, at as u64))
        });
        Box::new(windows)
    }

    /// The batches of some rows that follow one another in the epoch's order.
    fn window(&self, rows: &[u32], seed: u64) -> Vec<Vec<usize>> {
        let mut rows: Vec<usize> = rows.iter().map(|&row| row as usize).collect();
        rows.sort_by_key(|&row| self.lengths.get(row));
        let mut sorted: Vec<&[usize]> = rows.chunks(self.batch_size).collect();
        // The batch that is not full, if any, stays the epoch's last.
        let partial = sorted.pop_if(|batch| batch.len() < self.batch_size);
        let shuffled =
            permutation(sorted.len(), seed).into_iter().filter_map(|batch| sorted.get(batch as usize).copied());
        shuffled.chain(partial).map(<[usize]>::to_vec).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths() -> Vec<u32> {
        (0..1003).map(|row| 10 + (row * 7919) % 500).collect()
    }

    #[test]
    fn an_epoch_has_every_row_once() {
        for shuffle in [false, true] {
            let sampler = Sampler::new(lengths(), 4, 7, shuffle);
            let epoch: Vec<_> = sampler.epoch(0).collect();
            assert_eq!((epoch.len(), sampler.batches()), (251, 251));
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
        let epoch = |seed, epoch| Sampler::new(lengths(), 4, seed, true).epoch(epoch).collect::<Vec<_>>();
        assert_eq!(epoch(7, 1), epoch(7, 1));
        assert_ne!(epoch(7, 1), epoch(7, 2));
        assert_ne!(epoch(7, 1), epoch(8, 1));
    }

    #[test]
    fn rows_of_like_length_share_a_batch() {
        let lengths = lengths();
        let spread = |batches: Vec<Vec<usize>>| -> u32 {
            let of = |batch: &Vec<usize>| batch.iter().map(|&row| lengths[row]).collect::<Vec<_>>();
            let lengths = batches.iter().map(of);
            lengths.map(|l| l.iter().max().unwrap() - l.iter().min().unwrap()).sum::<u32>() / batches.len() as u32
        };
        let sampler = |shuffle| Sampler::new(lengths.clone(), 4, 1, shuffle).epoch(0).collect();
        assert!(spread(sampler(true)) < 20 && spread(sampler(false)) > 200);
    }
}
