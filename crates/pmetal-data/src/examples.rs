//! Tokenized rows by number, wherever they lie.

use std::sync::Arc;

use crate::{
    encode::Example,
    error::Result,
    mix::permutation,
    report::{DropReason, Report, name},
    store::{Record, Store, hash},
};

/// Tokenized rows, in order: in memory, or read from disk one by one.
#[derive(Debug, Clone, Default)]
pub struct Examples {
    parts: Vec<Part>,
}

#[derive(Debug, Clone)]
struct Part {
    rows: Rows,
    /// Rows of this part and of those before it.
    end: usize,
}

#[derive(Debug, Clone)]
enum Rows {
    Memory(Arc<Vec<Example>>),
    Stored {
        store: Arc<Store>,
        /// The rows of the store, where they are not all.
        chosen: Option<Arc<Vec<u32>>>,
        /// Longer rows are cut to this many tokens.
        limit: usize,
        /// Keeps the folder of a store that nobody is to find again.
        _folder: Option<Arc<tempfile::TempDir>>,
    },
}

impl From<Vec<Example>> for Examples {
    fn from(rows: Vec<Example>) -> Self {
        let end = rows.len();
        Self { parts: vec![Part { rows: Rows::Memory(Arc::new(rows)), end }] }
    }
}

/// What is known of a row without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Summary {
    /// Tokens before any cut.
    pub(crate) tokens: usize,
    pub(crate) supervised: usize,
    pub(crate) hash: u64,
}

impl Examples {
    /// The rows of a store that have something to train in their first `limit` tokens (0: in all), and what became of the others.
    pub(crate) fn stored(
        store: Arc<Store>,
        limit: usize,
        folder: Option<Arc<tempfile::TempDir>>,
    ) -> Result<(Self, Report)> {
        let limit = if limit == 0 { usize::MAX } else { limit };
        let counts = &store.counts;
        let mut report = Report {
            rows: counts.rows,
            dropped: counts.rows - counts.kept,
            named: counts.named.clone(),
            conversations: counts.conversations,
            alpaca: counts.alpaca,
            ..Report::default()
        };
        let (mut chosen, mut cut) = (Vec::new(), Vec::new());
        store.for_each_record(|row, record| {
            let tokens = record.tokens as usize;
            if record.first_supervised as usize >= limit {
                report.dropped += 1;
                name(&mut report.named, record.place, DropReason::Truncated { tokens });
                return;
            }
            chosen.push(row as u32);
            if tokens > limit {
                cut.push(record);
            } else {
                report.supervised_tokens += u64::from(record.supervised);
            }
            report.tokens += tokens.min(limit) as u64;
            report.longest = report.longest.max(tokens.min(limit));
        })?;
        report.truncated = cut.len();
        for record in &cut {
            report.supervised_tokens += store.example(record, limit)?.supervised_tokens() as u64;
        }
        let end = chosen.len();
        let chosen = (end < store.len()).then(|| Arc::new(chosen));
        let rows = Rows::Stored { store, chosen, limit, _folder: folder };
        Ok((Self { parts: vec![Part { rows, end }] }, report))
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.parts.last().map_or(0, |part| part.end)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The part with a row, and the row's number in it.
    fn place(&self, row: usize) -> Option<(&Rows, usize)> {
        let at = self.parts.partition_point(|part| part.end <= row);
        let start = at.checked_sub(1).and_then(|before| self.parts.get(before)).map_or(0, |part| part.end);
        Some((&self.parts.get(at)?.rows, row - start))
    }

    /// A row.
    ///
    /// # Errors
    /// When it cannot be read. A row that is not there is empty.
    pub fn get(&self, row: usize) -> Result<Example> {
        match self.place(row) {
            None => Ok(Example { input_ids: Vec::new(), labels: Vec::new() }),
            Some((Rows::Memory(rows), row)) => {
                Ok(rows.get(row).cloned().unwrap_or(Example { input_ids: Vec::new(), labels: Vec::new() }))
            }
            Some((rows @ Rows::Stored { store, limit, .. }, row)) => {
                store.example(&store.record(rows.stored(row))?, *limit)
            }
        }
    }

    /// Every row, in order.
    pub fn iter(&self) -> impl Iterator<Item = Result<Example>> + '_ {
        (0..self.len()).map(|row| self.get(row))
    }

    /// The number of tokens of every row.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn lengths(&self) -> Result<Vec<u32>> {
        let mut lengths = Vec::with_capacity(self.len());
        self.for_each_summary(|limit, summary| lengths.push(summary.tokens.min(limit) as u32))?;
        Ok(lengths)
    }

    /// Calls `f` for every row, in order, with the length it is cut to and what is known of it.
    pub(crate) fn for_each_summary(&self, mut f: impl FnMut(usize, Summary)) -> Result<()> {
        for part in &self.parts {
            match &part.rows {
                Rows::Memory(rows) => rows.iter().for_each(|row| {
                    let (tokens, supervised) = (row.input_ids.len(), row.supervised_tokens());
                    f(usize::MAX, Summary { tokens, supervised, hash: hash(row) });
                }),
                Rows::Stored { store, chosen: None, limit, .. } => {
                    store.for_each_record(|_, record| f(*limit, Summary::from(record)))?;
                }
                Rows::Stored { store, chosen: Some(chosen), limit, .. } => {
                    for &row in chosen.iter() {
                        f(*limit, Summary::from(store.record(row as usize)?));
                    }
                }
            }
        }
        Ok(())
    }

    /// The same rows with others behind them.
    pub(crate) fn append(&mut self, other: Self) {
        let start = self.len();
        self.parts.extend(other.parts.into_iter().map(|part| Part { end: start + part.end, ..part }));
    }

    /// The rows `weight` times: 2 is each twice, 0.5 half of them, chosen by the seed.
    pub(crate) fn weighted(self, weight: f64, seed: u64) -> Self {
        let mut all = Self::default();
        for _ in 0..weight.floor() as usize {
            all.append(self.clone());
        }
        let some = (weight.fract() * self.len() as f64).round() as usize;
        if some > 0 {
            all.append(self.split(some, seed).1);
        }
        all
    }

    /// Sets `held` of the rows aside, spread over all: the same ones for the same seed and number of rows. Both parts keep
    /// the order.
    pub fn split(&self, held: usize, seed: u64) -> (Self, Self) {
        let mut aside = vec![false; self.len()];
        for row in permutation(self.len(), seed).into_iter().take(held) {
            aside.iter_mut().skip(row as usize).take(1).for_each(|aside| *aside = true);
        }
        (self.chosen(&aside, false), self.chosen(&aside, true))
    }

    /// The rows whose flag is `wanted`.
    fn chosen(&self, flags: &[bool], wanted: bool) -> Self {
        let mut chosen = Self::default();
        let mut start = 0;
        for part in &self.parts {
            let flags = flags.get(start..part.end).unwrap_or_default();
            let rows = (0_u32..).zip(flags).filter(|&(_, &flag)| flag == wanted).map(|(row, _)| row);
            let end = chosen.len();
            let (rows, count) = part.rows.select(rows);
            chosen.parts.push(Part { rows, end: end + count });
            start = part.end;
        }
        chosen
    }
}

impl Rows {
    /// The row of the store that row `row` of the part is.
    fn stored(&self, row: usize) -> usize {
        match self {
            Self::Stored { chosen: Some(chosen), .. } => chosen.get(row).map_or(0, |&row| row as usize),
            _ => row,
        }
    }

    fn select(&self, rows: impl Iterator<Item = u32>) -> (Self, usize) {
        match self {
            Self::Memory(all) => {
                let some: Vec<Example> = rows.filter_map(|row| all.get(row as usize).cloned()).collect();
                let count = some.len();
                (Self::Memory(Arc::new(some)), count)
            }
            Self::Stored { store, limit, _folder, .. } => {
                let chosen: Vec<u32> = rows.map(|row| self.stored(row as usize) as u32).collect();
                let count = chosen.len();
                let rows = Self::Stored {
                    store: Arc::clone(store),
                    chosen: Some(Arc::new(chosen)),
                    limit: *limit,
                    _folder: _folder.clone(),
                };
                (rows, count)
            }
        }
    }
}

impl From<Record> for Summary {
    fn from(record: Record) -> Self {
        let Record { tokens, supervised, hash, .. } = record;
        Self { tokens: tokens as usize, supervised: supervised as usize, hash }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(lengths: std::ops::Range<usize>) -> Examples {
        let row = |length: usize| Example { input_ids: vec![7; length], labels: vec![7; length] };
        lengths.map(row).collect::<Vec<_>>().into()
    }

    #[test]
    fn a_split_is_deterministic_and_keeps_order() {
        let parts = |seed| {
            let (rest, held) = rows(2..12).split(3, seed);
            (rest.lengths().unwrap(), held.lengths().unwrap())
        };
        let (rest, held) = parts(1);
        assert_eq!((rest.len(), held.len()), (7, 3));
        assert!(rest.is_sorted() && held.is_sorted());
        assert_eq!(rest.iter().chain(&held).sum::<u32>(), 65);
        assert_eq!(parts(1), (rest, held));
        assert_ne!(parts(1), parts(2));
    }

    #[test]
    fn weights_repeat_and_choose_rows() {
        let mut all = rows(2..6);
        all.append(rows(10..20).weighted(2.5, 3));
        assert_eq!(all.len(), 4 + 25);
        assert_eq!(all.get(4).unwrap().input_ids.len(), 10);
        assert_eq!(all.get(14).unwrap().input_ids.len(), 10);
        let half = all.lengths().unwrap().split_off(24);
        assert!(half.is_sorted() && half.len() == 5, "{half:?}");
        assert!(rows(2..6).weighted(0.0, 1).is_empty());
        assert!(all.get(99).unwrap().input_ids.is_empty());
    }
}
