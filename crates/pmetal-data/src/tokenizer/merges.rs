use std::borrow::Cow;
use std::collections::HashMap;

use serde::Deserialize;
use serde::de::IgnoredAny;

/// What of a `tokenizer.json` says how its pairs merge.
#[derive(Deserialize)]
struct File<'a> {
    #[serde(borrow)]
    model: Model<'a>,
}

#[derive(Deserialize)]
struct Model<'a> {
    #[serde(borrow)]
    vocab: HashMap<Cow<'a, str>, IgnoredAny>,
    #[serde(borrow)]
    merges: Vec<Merge<'a>>,
    continuing_subword_prefix: Option<String>,
}

/// Two tokens, in today's files and in those of years ago.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge<'a> {
    Pair(#[serde(borrow)] (Cow<'a, str>, Cow<'a, str>)),
    Text(#[serde(borrow)] Cow<'a, str>),
}

/// Refuses merges that make something longer than every token, or of a part shorter than the prefix of all parts: the library
/// that reads the file checks for neither and panics. Everything else that may be wrong it tells itself.
pub(super) fn check_merges(bytes: &[u8]) -> Result<(), String> {
    // Other kinds of models have no merges.
    let Ok(file) = serde_json::from_slice::<File>(bytes) else { return Ok(()) };
    let longest = file.model.vocab.keys().map(|token| token.len()).max().unwrap_or_default();
    let prefix = file.model.continuing_subword_prefix.map_or(0, |prefix| prefix.len());
    for merge in &file.model.merges {
        let Some((left, right)) = merge.parts() else { continue };
        if right.len() < prefix || left.len() + right.len() - prefix > longest {
            return Err(format!("the merge of {left:?} and {right:?} makes no token of the vocabulary"));
        }
    }
    Ok(())
}

impl Merge<'_> {
    fn parts(&self) -> Option<(&str, &str)> {
        match self {
            Self::Pair((left, right)) => Some((left, right)),
            Self::Text(text) => text.split_once(' '),
        }
    }
}
