//! Rows of a dataset: the format of each is told by its keys.

mod alpaca;
mod fields;
mod preference;
mod tools;
mod turns;
mod write;

use std::borrow::Cow;

use serde_json::Value;

pub(crate) use alpaca::Alpaca;
use fields::{Object, Parsed, tokens, wrong};
pub(crate) use fields::{keys, kind};
pub(crate) use preference::{Preference, Said};
pub use write::Format;

use crate::{
    conversation::{Conversation, Message},
    error::RowFault,
};

/// One row of a dataset, in the format its keys tell.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Row {
    /// ShareGPT (`conversations`), Messages (`messages`), or `prompt` and `completion` as messages.
    Conversation(Conversation),
    /// `instruction`, `input`, `output`, and optionally `system` and `history`.
    Alpaca(Alpaca),
    /// `prompt` and `completion` as texts: no template, the completion is trained.
    PromptCompletion {
        /// Not trained.
        prompt: String,
        /// Trained, and eos after it.
        completion: String,
    },
    /// Answers people compared or judged: for methods other than supervised fine-tuning.
    Preference(Preference),
    /// `text`: trained as it is.
    Text(String),
    /// `input_ids` and optionally `labels`, -100 where a token is not trained; without them all are.
    Tokens { input_ids: Vec<u32>, labels: Option<Vec<i64>> },
}

/// Keys a format is known by and what their values are, for a row that has one of them with nothing in it.
const KNOWN: [(&str, &str); 7] = [
    ("input_ids", "an array of integers"),
    ("messages", "an array of turns"),
    ("conversations", "an array of turns"),
    ("instruction", "a string"),
    ("prompt", "a string or an array of turns"),
    ("completion", "a string or an array of turns"),
    ("text", "a string"),
];

impl Row {
    /// Finds the format by the keys and reads the row. Keys without a value count as absent (tables have every column in
    /// every row), and keys that no format knows are ignored beside those of one.
    pub(crate) fn parse(value: Value) -> Parsed<Self> {
        let all = match value {
            Value::Object(object) => object,
            other => return Err(RowFault::NotObject(kind(&other))),
        };
        let mut row: Object = all.iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.clone(), v.clone())).collect();
        if row.contains_key("input_ids") {
            return tokens(&row).map(|(input_ids, labels)| Self::Tokens { input_ids, labels });
        }
        if preference::is_preference(&row) {
            return preference::pair(&row).map(Self::Preference);
        }
        for key in ["messages", "conversations"] {
            if let Some(turns) = row.shift_remove(key) {
                return conversation(key, turns, &row).map(Self::Conversation);
            }
        }
        if row.contains_key("instruction") {
            return Alpaca::parse(&row).map(Self::Alpaca);
        }
        if row.contains_key("prompt") && row.contains_key("completion") {
            return match row.get("label") {
                Some(&Value::Bool(label)) => preference::judged(&row, label).map(Self::Preference),
                _ => prompt_completion(&row),
            };
        }
        match row.get("text") {
            Some(Value::String(text)) => Ok(Self::Text(text.clone())),
            Some(other) => Err(wrong("'text'", "a string", other)),
            None => match KNOWN.iter().find(|(key, _)| all.get(*key).is_some_and(Value::is_null)) {
                Some((key, expected)) => Err(wrong(format!("'{key}'"), expected, &Value::Null)),
                None => Err(RowFault::UnknownKeys { seen: keys(&all) }),
            },
        }
    }

    /// The row as a conversation: `None` for plain text, ids and preferences.
    pub(crate) fn conversation(&self) -> Option<Cow<'_, Conversation>> {
        match self {
            Self::Conversation(conversation) => Some(Cow::Borrowed(conversation)),
            Self::Alpaca(alpaca) => Some(Cow::Owned(alpaca.conversation())),
            Self::PromptCompletion { .. } | Self::Preference(_) | Self::Text(_) | Self::Tokens { .. } => None,
        }
    }
}

/// A row of turns, with the columns `system` and `tools`.
fn conversation(key: &'static str, turns: Value, row: &Object) -> Parsed<Conversation> {
    let mut messages = turns::messages(key, &turns)?;
    if messages.is_empty() {
        return Err(RowFault::EmptyConversation(key));
    }
    let system = fields::optional_text(row, "system")?.filter(|text| !text.is_empty());
    if let Some(system) = system.filter(|_| messages.iter().all(|m| m.role() != "system")) {
        messages.insert(0, Message::new("system", system));
    }
    Ok(Conversation { messages, tools: tools::of_row(row)? })
}

/// Texts stay texts; messages become one conversation of which only the completion is trained.
fn prompt_completion(row: &Object) -> Parsed<Row> {
    match (Said::parse(row, "prompt")?, Said::parse(row, "completion")?) {
        (Said::Text(prompt), Said::Text(completion)) => Ok(Row::PromptCompletion { prompt, completion }),
        (prompt, completion) => {
            let mut messages = prompt.into_messages("user");
            messages.iter_mut().for_each(|message| message.set_trained(false));
            messages.extend(completion.into_messages("assistant"));
            Ok(Row::Conversation(Conversation { messages, tools: tools::of_row(row)? }))
        }
    }
}

#[cfg(test)]
mod tests;
