//! What a pass through the layers shares: where tokens stand, and how far that turns them.

use pmetal_ops::{RopeAngles, RopeTable, Rows};

use crate::{Input, KvCache, RopeUse};

/// Where a pass leaves its keys and values, and the tokens of each row.
pub(super) type CacheUse<'a> = Option<(&'a KvCache, &'a [usize])>;

/// What a pass through the layers shares.
#[derive(Clone)]
pub(super) struct Pass {
    /// Angles of the tokens, for each of the spec's ropes.
    pub(super) tables: Vec<RopeTable>,
    /// Positions of the tokens in their rows.
    pub(super) positions: Vec<u32>,
    /// Where rows lie among queries and keys.
    pub(super) rows: Rows,
    /// The seed of dropout.
    pub(super) noise: Option<u64>,
}

/// A decoder's ropes, with the angles that passes asked for.
pub(super) struct Ropes(Vec<(RopeUse, Option<RopeAngles>)>);

impl Ropes {
    pub(super) fn new(ropes: &[RopeUse]) -> Self {
        let angles = |used: &RopeUse| {
            let fixed = !used.rope.depends_on_length();
            fixed.then(|| RopeAngles::new(&used.rope.inv_freq(1), used.rope.attention_factor, used.layout))
        };
        Self(ropes.iter().map(|used| (used.clone(), angles(used))).collect())
    }

    /// The pass of whole rows.
    pub(super) fn pass(&self, input: &Input) -> Pass {
        let spans: Vec<Span> = input.q_lens.iter().map(|&len| Span { start: 0, tokens: len, row_len: len }).collect();
        self.of(&spans, Rows::packed(input.q_lens), input.noise)
    }

    /// The pass of rows whose last tokens are new; with them they have `lens` tokens, in a cache of `capacity` places each.
    pub(super) fn pass_behind(&self, input: &Input, lens: &[usize], capacity: usize) -> Pass {
        let span = |(&tokens, &len): (&usize, &usize)| Span { start: len.saturating_sub(tokens), tokens, row_len: len };
        let spans: Vec<Span> = input.q_lens.iter().zip(lens).map(span).collect();
        self.of(&spans, Rows::cached(input.q_lens, lens, capacity), input.noise)
    }

    /// Whether a row of `len` tokens turns otherwise than it did when it had `before`.
    pub(super) fn turn_anew(&self, before: usize, len: usize) -> bool {
        let changes = |(used, _): &(RopeUse, _)| {
            used.rope.depends_on_length() && used.rope.inv_freq(before) != used.rope.inv_freq(len)
        };
        before > 0 && self.0.iter().any(changes)
    }

    fn of(&self, spans: &[Span], rows: Rows, noise: Option<u64>) -> Pass {
        let positions: Vec<u32> = spans.iter().flat_map(Span::positions).collect();
        let table = |(used, angles): &(RopeUse, Option<RopeAngles>)| match angles {
            Some(angles) => angles.of(&positions),
            None => by_length(used, spans),
        };
        let tables = self.0.iter().map(table).collect();
        Pass { tables, positions, rows, noise }
    }
}

/// Neighbouring tokens of a row, which has `row_len` of them.
struct Span {
    start: usize,
    tokens: usize,
    row_len: usize,
}

impl Span {
    fn positions(&self) -> impl Iterator<Item = u32> {
        (self.start..self.start + self.tokens).map(|position| position as u32)
    }
}

/// Angles whose frequencies follow from the length of each row.
fn by_length(used: &RopeUse, spans: &[Span]) -> RopeTable {
    let of_span = |span: &Span| {
        let positions: Vec<u32> = span.positions().collect();
        RopeTable::new(&positions, &used.rope.inv_freq(span.row_len), used.rope.attention_factor, used.layout)
    };
    RopeTable::joined(&spans.iter().map(of_span).collect::<Vec<_>>())
}
