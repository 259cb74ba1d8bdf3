use serde_json::Value;

use super::fields::{Object, Parsed, optional_text, required_text, wrong};
use crate::conversation::{Conversation, Message};

/// A row of Alpaca's format.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Alpaca {
    pub(super) system: Option<String>,
    /// Earlier turns: what the user asked, what was answered.
    pub(super) history: Vec<(String, String)>,
    pub(super) instruction: String,
    /// May be empty.
    pub(super) input: String,
    pub(super) output: String,
}

impl Alpaca {
    /// Reads the row; `input`, `system` and `history` may be missing.
    pub(super) fn parse(row: &Object) -> Parsed<Self> {
        Ok(Self {
            system: optional_text(row, "system")?.filter(|text| !text.is_empty()).map(str::to_string),
            history: history(row)?,
            instruction: required_text(row, "instruction")?.to_string(),
            input: optional_text(row, "input")?.unwrap_or_default().to_string(),
            output: required_text(row, "output")?.to_string(),
        })
    }

    /// The row as a conversation: the user says instruction and, on the next line, the input if there is one. The keys
    /// `instruction` and `input` stay on that message, for Alpaca's classic prompt.
    pub(crate) fn conversation(&self) -> Conversation {
        let mut messages = Vec::new();
        if let Some(system) = &self.system {
            messages.push(Message::new("system", system));
        }
        for (asked, answered) in &self.history {
            messages.extend([Message::new("user", asked), Message::new("assistant", answered)]);
        }
        messages.extend([question(&self.instruction, &self.input), Message::new("assistant", &self.output)]);
        Conversation { messages, tools: None }
    }
}

/// What the user says: the instruction and, on the next line, the input if there is one.
pub(super) fn question(instruction: &str, input: &str) -> Message {
    if input.is_empty() {
        return Message::new("user", instruction);
    }
    let mut user = Message::new("user", format!("{instruction}\n{input}"));
    user.set("instruction", instruction);
    user.set("input", input);
    user
}

fn history(row: &Object) -> Parsed<Vec<(String, String)>> {
    let rounds = match row.get("history") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(rounds)) => rounds,
        Some(other) => return Err(wrong("'history'", "an array of [question, answer] pairs", other)),
    };
    let pair = |(index, round): (usize, &Value)| match round.as_array().map(Vec::as_slice) {
        Some([Value::String(asked), Value::String(answered)]) => Ok((asked.clone(), answered.clone())),
        _ => Err(wrong(format!("'history' entry {index}"), "a pair of strings", round)),
    };
    rounds.iter().enumerate().map(pair).collect()
}
