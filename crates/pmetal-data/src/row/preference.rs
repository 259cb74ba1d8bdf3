//! Rows of answers that were compared (DPO and its kin) or judged (KTO).

use serde_json::Value;

use super::{
    alpaca::question,
    fields::{Object, Parsed, required_text, wrong},
    tools, turns,
};
use crate::{conversation::Message, error::RowFault};

/// What is said, as a text or as messages.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Said {
    /// Without a template.
    Text(String),
    /// Rendered with a template.
    Messages(Vec<Message>),
}

/// Answers to a prompt, with what people thought of them.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Preference {
    /// `None` where each answer is a whole conversation.
    pub(crate) prompt: Option<Said>,
    /// The answers.
    pub(crate) answers: Answers,
    /// A JSON array of tool descriptions.
    pub(crate) tools: Option<Value>,
}

/// The answers of a preference row.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Answers {
    /// `chosen` and `rejected`.
    Pair {
        /// The better one.
        chosen: Said,
        /// The worse one.
        rejected: Said,
    },
    /// `completion` and `label`.
    Judged {
        /// The answer.
        completion: Said,
        /// Whether it is a good one.
        good: bool,
    },
}

impl Said {
    /// Reads a string, one turn, or an array of turns.
    pub(super) fn parse(row: &Object, key: &'static str) -> Parsed<Self> {
        match row.get(key) {
            Some(Value::String(text)) => Ok(Self::Text(text.clone())),
            Some(turns @ Value::Array(_)) => match turns::messages(key, turns)? {
                messages if messages.is_empty() => Err(RowFault::EmptyConversation(key)),
                messages => Ok(Self::Messages(messages)),
            },
            Some(turn @ Value::Object(_)) => Ok(Self::Messages(vec![turns::message(0, turn)?])),
            Some(other) => Err(wrong(format!("'{key}'"), "a string or an array of turns", other)),
            None => Err(RowFault::MissingKey(key)),
        }
    }

    /// The messages; a text is said by `role`.
    pub(super) fn into_messages(self, role: &str) -> Vec<Message> {
        match self {
            Self::Text(text) => vec![Message::new(role, text)],
            Self::Messages(messages) => messages,
        }
    }
}

/// Whether the row compares answers. One that also has a whole conversation under `messages` or `conversations` is that
/// conversation: some data sets repeat the chosen one there.
pub(super) fn is_preference(row: &Object) -> bool {
    let answered = |key: &str| {
        let last = row.get(key).and_then(Value::as_array).and_then(|turns| turns.last());
        let role = last.and_then(|turn| turn.get("role").or_else(|| turn.get("from"))).and_then(Value::as_str);
        role.is_some_and(|role| ["assistant", "gpt", "model"].contains(&role))
    };
    let compared = ["chosen", "rejected"].iter().all(|key| row.contains_key(*key));
    compared && !answered("messages") && !answered("conversations")
}

/// A row with `chosen` and `rejected`, whose prompt is `prompt`, `conversations`, `messages`, `instruction` (and `input`), or
/// part of the answers.
pub(super) fn pair(row: &Object) -> Parsed<Preference> {
    let prompt = ["prompt", "conversations", "messages"].into_iter().find(|key| row.contains_key(*key));
    let mut prompt = match prompt {
        Some(key) => Some(Said::parse(row, key)?),
        None if row.contains_key("instruction") => {
            let input = super::fields::optional_text(row, "input")?.unwrap_or_default();
            Some(Said::Messages(vec![question(required_text(row, "instruction")?, input)]))
        }
        None => None,
    };
    if let (Some(Said::Messages(messages)), Some(system)) = (&mut prompt, super::fields::optional_text(row, "system")?)
        && !system.is_empty()
        && messages.iter().all(|message| message.role() != "system")
    {
        messages.insert(0, Message::new("system", system));
    }
    let answers = Answers::Pair { chosen: Said::parse(row, "chosen")?, rejected: Said::parse(row, "rejected")? };
    Ok(Preference { prompt, answers, tools: tools::of_row(row)? })
}

/// A row with `prompt`, `completion` and `label`.
pub(super) fn judged(row: &Object, good: bool) -> Parsed<Preference> {
    let answers = Answers::Judged { completion: Said::parse(row, "completion")?, good };
    Ok(Preference { prompt: Some(Said::parse(row, "prompt")?), answers, tools: tools::of_row(row)? })
}

impl Preference {
    /// The keys that make it one, for an error.
    fn keys(&self) -> &'static str {
        match self.answers {
            Answers::Pair { .. } => "'chosen' and 'rejected'",
            Answers::Judged { .. } => "'completion' and 'label'",
        }
    }

    /// The mapping of columns that makes rows with one answer of it, if there is one.
    fn hint(&self) -> &'static str {
        match (&self.prompt, &self.answers) {
            (Some(_), Answers::Pair { chosen: Said::Text(_), .. }) => {
                "; for the chosen answers alone: --columns completion=chosen"
            }
            (_, Answers::Pair { chosen: Said::Messages(messages), .. }) if messages.len() > 1 => {
                "; for the chosen answers alone: --columns messages=chosen"
            }
            _ => "",
        }
    }

    /// The fault of such a row where one answer is needed.
    pub(crate) fn fault(&self) -> RowFault {
        RowFault::Preference { keys: self.keys(), hint: self.hint() }
    }
}
