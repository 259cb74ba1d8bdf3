//! What a dataset is like: lengths, what a cut would lose, what is trained, what is there twice, how well it packs.

use std::collections::HashSet;

use serde::Serialize;

use crate::{error::Result, examples::Examples, packing::pack};

/// Rows compared with one another at once: more come in several passes, so that memory does not grow.
const TOGETHER: usize = 1 << 20;
/// Lengths that rows are usually cut to.
const CUTS: [usize; 5] = [512, 1024, 2048, 4096, 8192];
/// The narrowest bin of the histogram ends here.
const FIRST_BIN: u32 = 32;

/// Figures of tokenized rows, none of which was cut.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Stats {
    /// Rows with something to train.
    pub rows: usize,
    /// Tokens of them all.
    pub tokens: u64,
    /// Trained tokens of them all.
    pub supervised_tokens: u64,
    /// Rows that an earlier one is equal to, token by token.
    pub duplicates: usize,
    /// Lengths in tokens.
    pub lengths: Lengths,
    /// Rows by length.
    pub histogram: Vec<Bin>,
    /// What cuts at usual lengths (and the one asked for) do.
    pub cuts: Vec<Cut>,
}

/// Lengths of rows, in tokens.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Lengths {
    /// The shortest.
    pub min: u32,
    /// The mean.
    pub mean: f64,
    /// Half of the rows are at most this long.
    pub median: u32,
    /// 95 of 100 are.
    pub p95: u32,
    /// 99 of 100 are.
    pub p99: u32,
    /// The longest.
    pub max: u32,
}

/// Rows of at least `from` and fewer than `to` tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Bin {
    /// The least length.
    pub from: u32,
    /// One above the greatest.
    pub to: u32,
    /// How many.
    pub rows: usize,
}

/// What cutting rows at a length would do.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cut {
    /// Tokens that are kept of a row, and that a pack holds.
    pub max_seq_len: usize,
    /// Rows that are longer.
    pub truncated: usize,
    /// Tokens that are lost.
    pub lost_tokens: u64,
    /// Packs of the rows.
    pub packs: usize,
    /// Tokens in packs by tokens the packs could hold, the emptiest pack aside.
    pub packing_efficiency: f64,
}

impl Stats {
    /// The figures of rows that were read whole; `max_seq_len` is among the cuts where it is not 0.
    ///
    /// # Errors
    /// When rows cannot be read.
    pub fn of(examples: &Examples, max_seq_len: usize) -> Result<Self> {
        let mut lengths = Vec::with_capacity(examples.len());
        let mut supervised_tokens = 0;
        examples.for_each_summary(|_, row| {
            lengths.push(row.tokens as u32);
            supervised_tokens += row.supervised as u64;
        })?;
        let longest = lengths.iter().copied().max().unwrap_or(0) as usize;
        let mut wanted: Vec<usize> = CUTS.into_iter().filter(|&cut| cut < longest).collect();
        // the first that loses nothing is of use, too
        wanted.extend(CUTS.into_iter().find(|&cut| cut >= longest));
        wanted.extend((max_seq_len > 0).then_some(max_seq_len));
        wanted.sort_unstable();
        wanted.dedup();
        let cuts = wanted.into_iter().map(|cut| Cut::at(&lengths, cut)).collect();
        let rows = lengths.len();
        let tokens: u64 = lengths.iter().map(|&length| u64::from(length)).sum();
        lengths.sort_unstable();
        Ok(Self {
            rows,
            tokens,
            supervised_tokens,
            duplicates: duplicates(examples)?,
            histogram: histogram(&lengths),
            lengths: Lengths::of(&lengths, tokens),
            cuts,
        })
    }
}

impl Lengths {
    /// Of lengths in ascending order.
    fn of(sorted: &[u32], tokens: u64) -> Self {
        // the nearest rank: the least length that this share of the rows does not exceed
        let at = |share: f64| {
            let rank = (share * sorted.len() as f64).ceil() as usize;
            sorted.get(rank.saturating_sub(1)).copied().unwrap_or(0)
        };
        Self {
            min: at(0.0),
            mean: tokens as f64 / sorted.len().max(1) as f64,
            median: at(0.5),
            p95: at(0.95),
            p99: at(0.99),
            max: at(1.0),
        }
    }
}

impl Cut {
    fn at(lengths: &[u32], max_seq_len: usize) -> Self {
        let most = u32::try_from(max_seq_len).unwrap_or(u32::MAX);
        let longer = lengths.iter().filter(|&&length| length > most);
        let cut: Vec<u32> = lengths.iter().map(|&length| length.min(most)).collect();
        let packing = pack(&cut, max_seq_len);
        Self {
            max_seq_len,
            truncated: longer.clone().count(),
            lost_tokens: longer.map(|&length| u64::from(length - most)).sum(),
            packs: packing.len(),
            packing_efficiency: packing.efficiency,
        }
    }
}

/// Bins whose borders double, from that of the shortest row to that of the longest.
fn histogram(sorted: &[u32]) -> Vec<Bin> {
    let mut bins = Vec::new();
    let (mut from, mut to) = (0, FIRST_BIN);
    let mut rest = sorted;
    while !rest.is_empty() {
        let rows = rest.partition_point(|&length| length < to);
        if rows > 0 || !bins.is_empty() {
            bins.push(Bin { from, to, rows });
        }
        rest = rest.get(rows..).unwrap_or_default();
        (from, to) = (to, to.saturating_mul(2));
        if from == to {
            break;
        }
    }
    bins
}

/// Rows whose ids and labels an earlier row has.
fn duplicates(examples: &Examples) -> Result<usize> {
    let passes = examples.len().div_ceil(TOGETHER).max(1) as u64;
    let mut duplicates = 0;
    for pass in 0..passes {
        let mut seen = HashSet::new();
        examples.for_each_summary(|_, row| {
            if row.hash % passes == pass && !seen.insert(row.hash) {
                duplicates += 1;
            }
        })?;
    }
    Ok(duplicates)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encode::Example;

    #[test]
    fn figures_counted_by_hand() {
        let row = |tokens: usize, trained: usize, id: u32| {
            let labels = (0..tokens).map(|at| if at >= tokens - trained { i64::from(id) } else { -100 });
            Example { input_ids: vec![id; tokens], labels: labels.collect() }
        };
        let rows = vec![row(10, 4, 1), row(700, 7, 2), row(10, 4, 1), row(40, 1, 3), row(1400, 9, 4)];
        let stats = Stats::of(&rows.into(), 600).unwrap();
        assert_eq!((stats.rows, stats.tokens, stats.supervised_tokens, stats.duplicates), (5, 2160, 25, 1));
        let Lengths { min, mean, median, p95, p99, max } = stats.lengths;
        assert_eq!((min, mean, median, p95, p99, max), (10, 432.0, 40, 1400, 1400, 1400));
        let bins: Vec<_> = stats.histogram.iter().map(|bin| (bin.from, bin.rows)).collect();
        assert_eq!(bins, [(0, 2), (32, 1), (64, 0), (128, 0), (256, 0), (512, 1), (1024, 1)]);
        let cuts: Vec<_> = stats.cuts.iter().map(|c| (c.max_seq_len, c.truncated, c.lost_tokens, c.packs)).collect();
        assert_eq!(cuts, [(512, 2, 188 + 888, 3), (600, 2, 100 + 800, 3), (1024, 1, 376, 2), (2048, 0, 0, 2)]);
    }
}
