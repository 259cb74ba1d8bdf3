//! What became of the rows of a dataset.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::Place;

/// Rows left out that are named.
const NAMED: usize = 8;

/// A row left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dropped {
    /// Where it stands.
    pub place: Place,
    /// Why.
    pub reason: DropReason,
}

/// Why a row has nothing to train.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
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
            Self::NoAnswer => f.write_str("the assistant says nothing that is trained"),
            Self::NoLabel => f.write_str("no label but -100"),
            Self::TooShort => f.write_str("fewer than two tokens"),
            Self::Truncated { tokens } => write!(f, "{tokens} tokens, and the answer is behind the cut"),
        }
    }
}

/// Rows of a file before any is cut to length.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Counts {
    /// Rows read.
    pub(crate) rows: usize,
    /// Rows with something to train.
    pub(crate) kept: usize,
    /// Those of them that are conversations.
    pub(crate) conversations: usize,
    /// Those of them that are Alpaca's.
    pub(crate) alpaca: usize,
    /// The first of those left out.
    pub(crate) named: Vec<Dropped>,
}

/// Remembers a row that is left out, while there are few.
pub(crate) fn name(named: &mut Vec<Dropped>, place: Place, reason: DropReason) {
    if named.len() < NAMED {
        named.push(Dropped { place, reason });
    }
}

/// What became of the rows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Rows read.
    pub rows: usize,
    /// Rows left out.
    pub dropped: usize,
    /// The first of those.
    pub named: Vec<Dropped>,
    /// Rows kept that were cut to the longest length allowed.
    pub truncated: usize,
    /// Tokens of the examples.
    pub tokens: u64,
    /// Trained tokens of the examples: with a label, and not the first of their row.
    pub supervised_tokens: u64,
    /// Tokens of the longest example.
    pub longest: usize,
    /// Rows with something to train that are conversations.
    pub conversations: usize,
    /// Rows with something to train that are Alpaca's.
    pub alpaca: usize,
}

impl Report {
    /// Adds the rows of another file.
    pub(crate) fn add(&mut self, other: Self) {
        self.rows += other.rows;
        self.dropped += other.dropped;
        let room = NAMED.saturating_sub(self.named.len());
        self.named.extend(other.named.into_iter().take(room));
        self.truncated += other.truncated;
        self.tokens += other.tokens;
        self.supervised_tokens += other.supervised_tokens;
        self.longest = self.longest.max(other.longest);
        self.conversations += other.conversations;
        self.alpaca += other.alpaca;
    }

    /// The first rows left out, with their reasons, for the error that nothing is left.
    pub(crate) fn reasons(&self) -> String {
        const SHOWN: usize = 3;
        let mut reasons: Vec<String> =
            self.named.iter().take(SHOWN).map(|row| format!("{}: {}", row.place, row.reason)).collect();
        if self.dropped > SHOWN {
            reasons.push("…".to_string());
        }
        if reasons.is_empty() { "the file is empty".to_string() } else { reasons.join("; ") }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rows, tokens, supervised_tokens, longest, .. } = self;
        write!(f, "{rows} rows, {tokens} tokens, {supervised_tokens} of them trained, the longest row has {longest}")?;
        if self.truncated > 0 {
            write!(f, "; {} rows cut to length", self.truncated)?;
        }
        if let Some(first) = self.named.first() {
            write!(f, "; {} rows left out (the first, {}: {})", self.dropped, first.place, first.reason)?;
        }
        Ok(())
    }
}
