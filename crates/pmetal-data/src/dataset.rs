use std::{fmt, path::Path};

use rayon::prelude::*;

use crate::{
    encode::{Example, RowEncoder},
    error::{Error, Place, Result, RowFault},
    mask::TrainOn,
    mix::permutation,
    reader::for_each_row,
    row::Row,
    template::Template,
    tokenizer::Tokenizer,
};

/// Rows tokenized at a time: enough for all threads, few enough to hold beside the tokens.
const CHUNK: usize = 2048;

/// Rows named when there is nothing to train on.
const NAMED: usize = 3;

/// Tokenized rows, in the order of the file.
#[derive(Debug, Clone, Default)]
pub struct Dataset {
    /// The rows with something to train.
    pub examples: Vec<Example>,
    /// What became of the file.
    pub report: Report,
}

/// What became of a file's rows.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Rows read.
    pub rows: usize,
    /// Rows left out, and why.
    pub dropped: Vec<Dropped>,
    /// Rows kept that were cut to the longest length allowed.
    pub truncated: usize,
    /// Tokens of the examples.
    pub tokens: usize,
    /// Trained tokens of the examples: with a label, and not the first of their row.
    pub supervised_tokens: usize,
    /// Tokens of the longest example.
    pub longest: usize,
    /// Examples of conversations.
    pub conversations: usize,
    /// Examples of Alpaca rows.
    pub alpaca: usize,
}

/// A row left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dropped {
    /// Where it stands.
    pub place: Place,
    /// Why.
    pub reason: DropReason,
}

/// Why a row has nothing to train.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DropReason {
    /// A conversation without an answer.
    NoAnswer,
    /// Pre-tokenized, and every label but perhaps the first is -100.
    NoLabel,
    /// A single token, or none.
    TooShort,
    /// What would be trained begins after the last token that is kept.
    Truncated {
        /// Tokens of the whole row.
        tokens: usize,
    },
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoAnswer => f.write_str("the assistant says nothing"),
            Self::NoLabel => f.write_str("no label but -100"),
            Self::TooShort => f.write_str("fewer than two tokens"),
            Self::Truncated { tokens } => write!(f, "{tokens} tokens, and the answer is behind the cut"),
        }
    }
}

/// How rows become examples.
#[derive(Debug, Clone)]
pub struct DatasetOptions {
    /// Which turns are trained.
    pub train_on: TrainOn,
    /// The templates conversations are rendered with.
    pub template: Template,
    /// Longer rows are cut to this many tokens; 0 keeps them whole.
    pub max_seq_len: usize,
    /// Ids the model knows: a row with one from here on is refused.
    pub vocab_size: usize,
}

impl Dataset {
    /// Reads and tokenizes a file. Rows with nothing to train are left out and reported. Without a tokenizer, rows have to be
    /// ids.
    ///
    /// # Errors
    /// When the file cannot be read, at the first broken row, and when no row has anything to train.
    pub fn load<'a>(
        path: impl AsRef<Path>,
        tokenizer: impl Into<Option<&'a Tokenizer>>,
        options: &DatasetOptions,
    ) -> Result<Self> {
        let path = path.as_ref();
        let encoder = &RowEncoder::new(tokenizer.into(), &options.template, options.train_on);
        let mut dataset = Self::default();
        let mut chunk = Vec::with_capacity(CHUNK);
        for_each_row(path, |place, row| {
            chunk.push((place, row));
            if chunk.len() == CHUNK { dataset.add(path, encoder, options, &mut chunk) } else { Ok(()) }
        })?;
        dataset.add(path, encoder, options, &mut chunk)?;
        if dataset.examples.is_empty() {
            let named = dataset.report.dropped.iter().take(NAMED);
            let mut reasons: Vec<String> = named.map(|row| format!("line {}: {}", row.place, row.reason)).collect();
            if dataset.report.rows > NAMED {
                reasons.push("…".to_string());
            }
            let reasons = if reasons.is_empty() { "the file is empty".to_string() } else { reasons.join("; ") };
            return Err(Error::NothingToTrain { path: path.to_path_buf(), rows: dataset.report.rows, reasons });
        }
        Ok(dataset)
    }

    /// Tokenizes rows on all threads and takes them in, in order.
    fn add(
        &mut self,
        path: &Path,
        encoder: &RowEncoder,
        options: &DatasetOptions,
        rows: &mut Vec<(Place, Row)>,
    ) -> Result<()> {
        let encoded: Vec<Result<Example, RowFault>> = rows
            .par_iter()
            .map(|(_, row)| encoder.encode(row).and_then(|example| example.within(options.vocab_size)))
            .collect();
        for ((place, row), encoded) in rows.drain(..).zip(encoded) {
            let example =
                encoded.map_err(|fault| Error::Row { path: path.to_path_buf(), place, fault: Box::new(fault) })?;
            self.report.rows += 1;
            match cut(example, &row, options.max_seq_len) {
                Ok((example, truncated)) => {
                    self.report.truncated += usize::from(truncated);
                    self.report.count(&example);
                    self.report.conversations += usize::from(matches!(row, Row::Conversation(_)));
                    self.report.alpaca += usize::from(matches!(row, Row::Alpaca(_)));
                    self.examples.push(example);
                }
                Err(reason) => self.report.dropped.push(Dropped { place, reason }),
            }
        }
        Ok(())
    }
}

/// Sets `held` of the rows aside, spread over the file: the same ones for the same seed and number of rows. Both parts keep
/// the file's order.
pub fn split(rows: Vec<Example>, held: usize, seed: u64) -> (Vec<Example>, Vec<Example>) {
    let mut aside = vec![false; rows.len()];
    for row in permutation(rows.len(), seed).into_iter().take(held) {
        aside.iter_mut().skip(row).take(1).for_each(|aside| *aside = true);
    }
    let mut aside = aside.into_iter();
    let (held, rest) = rows.into_iter().partition(|_| aside.next() == Some(true));
    (rest, held)
}

impl Report {
    fn count(&mut self, example: &Example) {
        let tokens = example.input_ids.len();
        self.tokens += tokens;
        self.supervised_tokens += example.supervised_tokens();
        self.longest = self.longest.max(tokens);
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rows, tokens, supervised_tokens, longest, .. } = self;
        write!(f, "{rows} rows, {tokens} tokens, {supervised_tokens} of them trained, the longest row has {longest}")?;
        if self.truncated > 0 {
            write!(f, "; {} rows cut to length", self.truncated)?;
        }
        if let Some(first) = self.dropped.first() {
            write!(f, "; {} rows left out (the first in line {}: {})", self.dropped.len(), first.place, first.reason)?;
        }
        Ok(())
    }
}

/// The example cut to length, and whether it was; or why nothing of it can be trained.
fn cut(mut example: Example, row: &Row, max_seq_len: usize) -> Result<(Example, bool), DropReason> {
    let tokens = example.input_ids.len();
    if tokens < 2 {
        return Err(DropReason::TooShort);
    }
    if example.supervised_tokens() == 0 {
        let labelled = matches!(row, Row::Tokens { .. });
        return Err(if labelled { DropReason::NoLabel } else { DropReason::NoAnswer });
    }
    let truncated = max_seq_len > 0 && tokens > max_seq_len;
    if truncated {
        example.truncate(max_seq_len);
    }
    if example.supervised_tokens() == 0 { Err(DropReason::Truncated { tokens }) } else { Ok((example, truncated)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encode::IGNORE;

    fn example(labels: &[i64]) -> Example {
        Example { input_ids: (0..labels.len() as u32).collect(), labels: labels.to_vec() }
    }

    fn tokens() -> Row {
        Row::Tokens { input_ids: vec![], labels: None }
    }

    #[test]
    fn rows_are_cut_or_left_out_with_a_reason() {
        let row = example(&[IGNORE, IGNORE, 2, 3]);
        assert_eq!(cut(row.clone(), &tokens(), 0), Ok((row.clone(), false)));
        assert_eq!(cut(row.clone(), &tokens(), 4), Ok((row.clone(), false)));
        assert_eq!(cut(row.clone(), &tokens(), 3), Ok((example(&[IGNORE, IGNORE, 2]), true)));
        assert_eq!(cut(row, &tokens(), 2), Err(DropReason::Truncated { tokens: 4 }));
        assert_eq!(cut(example(&[0, IGNORE]), &tokens(), 0), Err(DropReason::NoLabel));
        assert_eq!(cut(example(&[0, IGNORE]), &Row::Text(String::new()), 0), Err(DropReason::NoAnswer));
        assert_eq!(cut(example(&[0]), &tokens(), 0), Err(DropReason::TooShort));
    }

    #[test]
    fn a_split_is_deterministic_and_keeps_order() {
        let parts = |seed| {
            let rows = (0..10).map(|i| example(&vec![i; 2 + i as usize])).collect();
            let (rest, held) = split(rows, 3, seed);
            let lengths = |part: Vec<Example>| part.iter().map(|e| e.labels.len()).collect::<Vec<_>>();
            (lengths(rest), lengths(held))
        };
        let (rest, held) = parts(1);
        assert_eq!((rest.len(), held.len()), (7, 3));
        assert!(rest.is_sorted() && held.is_sorted());
        assert_eq!(rest.iter().chain(&held).sum::<usize>(), 65);
        assert_eq!(parts(1), (rest, held));
        assert_ne!(parts(1), parts(2));
    }
}
