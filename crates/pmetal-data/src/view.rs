//! Rows token by token, for people to look at.

use std::collections::HashSet;

use crate::{
    encode::{Encoded, Example, IGNORE},
    error::Result,
    tokenizer::Tokenizer,
};

/// One token of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenView {
    /// The id.
    pub id: u32,
    /// The text it stands for. A character that takes several tokens is the first one's; the others are empty.
    pub text: String,
    /// Whether it is trained.
    pub trained: bool,
    /// Whether it is a special token, not text.
    pub special: bool,
    /// Whether nothing is said after it: the end of a turn or of the text.
    pub ends_turn: bool,
}

/// The tokens of a rendered row; `ends` are the ids that end a turn.
pub(crate) fn text(row: &Encoded, tokenizer: &Tokenizer, ends: &HashSet<u32>) -> Vec<TokenView> {
    let mut tokens = tokens(&row.example, Some(tokenizer), ends);
    let mut at = 0;
    let last = row.offsets.len().saturating_sub(1);
    for (index, token) in tokens.iter_mut().enumerate() {
        let Some(&(_, end)) = index.checked_sub(row.before).and_then(|inner| row.offsets.get(inner)) else {
            token.text = tokenizer.token(token.id).unwrap_or_default();
            continue;
        };
        // What a normalizer leaves out belongs to the token that follows, or to the last.
        let end = if index - row.before == last { row.text.len() } else { end.max(at) };
        token.text = row.text.get(at..end).unwrap_or_default().to_string();
        at = end;
    }
    tokens
}

/// The tokens of a row of ids; without a tokenizer they have no texts.
pub(crate) fn ids(example: &Example, tokenizer: Option<&Tokenizer>) -> Result<Vec<TokenView>> {
    let ends = tokenizer.map(|t| t.eos_ids().iter().copied().collect()).unwrap_or_default();
    let mut tokens = tokens(example, tokenizer, &ends);
    let Some(tokenizer) = tokenizer else { return Ok(tokens) };
    let mut stream = tokenizer.stream();
    for token in &mut tokens {
        token.text = if token.special {
            let waiting = std::mem::replace(&mut stream, tokenizer.stream()).finish()?;
            waiting + &tokenizer.token(token.id).unwrap_or_default()
        } else {
            stream.push(token.id)?
        };
    }
    let waiting = stream.finish()?;
    if let Some(last) = tokens.last_mut() {
        last.text.push_str(&waiting);
    }
    Ok(tokens)
}

fn tokens(example: &Example, tokenizer: Option<&Tokenizer>, ends: &HashSet<u32>) -> Vec<TokenView> {
    let special =
        |id: u32| tokenizer.is_some_and(|t| t.token(id).is_some_and(|token| t.special_set().contains(&token)));
    let token = |(&id, &label): (&u32, &i64)| TokenView {
        id,
        text: String::new(),
        trained: label != IGNORE,
        special: special(id),
        ends_turn: ends.contains(&id),
    };
    example.input_ids.iter().zip(&example.labels).map(token).collect()
}
