//! Rows written in another format.

use std::{fmt, str::FromStr};

use serde_json::{Map, Value, json};

use super::{
    Row,
    preference::{Answers, Said},
};
use crate::{
    conversation::{Conversation, Message},
    error::{Error, RowFault},
};

/// A format rows can be written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `messages` of `role` and `content`.
    Messages,
    /// `conversations` of `from` and `value`.
    ShareGpt,
    /// `instruction`, `input`, `output`, `system`, `history`.
    Alpaca,
    /// `text`.
    Text,
    /// `prompt` and `completion`.
    PromptCompletion,
    /// `prompt`, `chosen` and `rejected`, or `prompt`, `completion` and `label`.
    Preference,
    /// `input_ids` and `labels`.
    Tokens,
}

const FORMATS: [(&str, Format); 7] = [
    ("messages", Format::Messages),
    ("sharegpt", Format::ShareGpt),
    ("alpaca", Format::Alpaca),
    ("text", Format::Text),
    ("prompt-completion", Format::PromptCompletion),
    ("preference", Format::Preference),
    ("tokens", Format::Tokens),
];

impl Format {
    /// The keys of a row, in order.
    pub(crate) fn columns(self) -> &'static [&'static str] {
        match self {
            Self::Messages => &["messages", "tools"],
            Self::ShareGpt => &["conversations", "system", "tools"],
            Self::Alpaca => &["instruction", "input", "output", "system", "history"],
            Self::Text => &["text"],
            Self::PromptCompletion => &["prompt", "completion", "tools"],
            Self::Preference => &["prompt", "chosen", "rejected", "completion", "label", "tools"],
            Self::Tokens => &["input_ids", "labels"],
        }
    }
}

impl FromStr for Format {
    type Err = Error;

    /// Reads `messages`, `sharegpt`, `alpaca`, `text`, `prompt-completion`, `preference` or `tokens`.
    fn from_str(text: &str) -> Result<Self, Error> {
        let found = FORMATS.iter().find(|(name, _)| *name == text).map(|&(_, format)| format);
        found.ok_or_else(|| Error::UnknownFormat { name: text.to_string() })
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = FORMATS.iter().find(|(_, format)| format == self).map_or("", |(name, _)| *name);
        f.write_str(name)
    }
}

type Written = Result<Value, RowFault>;

impl Row {
    /// The row in another format, as JSON that reads back as the same row.
    ///
    /// A text of a conversation needs a template and is the caller's to make; here only rows of text are written as such.
    ///
    /// # Errors
    /// [`RowFault::DoesNotFit`] where the format has no place for something of the row.
    pub(crate) fn write(&self, format: Format) -> Written {
        let no = |reason: &str| RowFault::DoesNotFit { format: format.to_string(), reason: reason.to_string() };
        match (self, format) {
            (Self::Tokens { input_ids, labels }, Format::Tokens) => {
                Ok(json!({ "input_ids": input_ids, "labels": labels }))
            }
            (_, Format::Tokens) => Err(no("ids are made by a model's tokenizer: name one with --model")),
            (Self::Text(text), Format::Text) => Ok(json!({ "text": text })),
            (Self::Text(_), _) => Err(no("the row is one text without turns")),
            (Self::Tokens { .. }, _) => Err(no("the row is token ids, not text")),
            (Self::Preference(preference), Format::Preference) => Ok(preference.write()),
            (Self::Preference(_), _) => Err(no("the row compares or judges answers, and the format holds one answer")),
            (_, Format::Preference) => Err(no("the row has one answer, and nothing to compare it with")),
            (Self::PromptCompletion { prompt, completion }, Format::PromptCompletion) => {
                Ok(json!({ "prompt": prompt, "completion": completion }))
            }
            (Self::PromptCompletion { prompt, completion }, Format::Text) => {
                Ok(json!({ "text": format!("{prompt}{completion}") }))
            }
            (Self::PromptCompletion { prompt, completion }, _) => {
                let messages = vec![Message::new("user", prompt), Message::new("assistant", completion)];
                Self::Conversation(Conversation { messages, tools: None }).write(format)
            }
            (Self::Alpaca(alpaca), Format::Alpaca) => Ok(alpaca_row(
                alpaca.system.as_deref(),
                &alpaca.history,
                [&alpaca.instruction, &alpaca.input, &alpaca.output],
            )),
            (Self::Alpaca(alpaca), _) => plain(alpaca.conversation()).write(format),
            (Self::Conversation(_), Format::Text) => {
                Err(no("a conversation becomes a text through a chat template: name a model with --model"))
            }
            (Self::Conversation(conversation), Format::Messages) => {
                Ok(with_tools(json!({ "messages": turns(&conversation.messages) }), conversation.tools.clone()))
            }
            (Self::Conversation(conversation), Format::ShareGpt) => share_gpt(conversation).map_err(|r| no(&r)),
            (Self::Conversation(conversation), Format::Alpaca) => alpaca(conversation).map_err(|r| no(&r)),
            (Self::Conversation(conversation), Format::PromptCompletion) => {
                prompt_completion(conversation).map_err(|r| no(&r))
            }
        }
    }
}

/// The conversation without the keys that only Alpaca's own prompt reads: its content says the same.
fn plain(mut conversation: Conversation) -> Row {
    for message in &mut conversation.messages {
        message.remove("instruction");
        message.remove("input");
    }
    Row::Conversation(conversation)
}

fn with_tools(mut row: Value, tools: Option<Value>) -> Value {
    if let (Value::Object(row), Some(tools)) = (&mut row, tools) {
        row.insert("tools".to_string(), tools);
    }
    row
}

fn turns(messages: &[Message]) -> Value {
    messages.iter().map(turn).collect()
}

fn turn(message: &Message) -> Value {
    let mut object = message.object().clone();
    if !message.trained() {
        object.insert("weight".to_string(), 0.into());
    }
    Value::Object(object)
}

/// ShareGPT has tools as a text, calls as a turn of their own, and other keys as they are.
fn share_gpt(conversation: &Conversation) -> Result<Value, String> {
    let turns = conversation.messages.iter().map(share_gpt_turn).collect::<Result<Vec<_>, _>>()?;
    let tools = conversation.tools.as_ref().map(|tools| Value::String(tools.to_string()));
    Ok(with_tools(json!({ "conversations": turns }), tools))
}

fn share_gpt_turn(message: &Message) -> Result<Value, String> {
    let mut out = Map::new();
    let mut rest = message.object().clone();
    rest.retain(|key, _| key != "role" && key != "content");
    let text = text_of(message, "ShareGPT")?;
    let (from, value) = match bare_calls(message) {
        Some(calls) => {
            rest.shift_remove("tool_calls");
            ("function_call", Some(calls))
        }
        None => (share_gpt_role(message.role()), text.map(str::to_string)),
    };
    out.insert("from".to_string(), from.into());
    out.insert("value".to_string(), value.map_or(Value::Null, Value::String));
    out.extend(rest);
    if !message.trained() {
        out.insert("weight".to_string(), 0.into());
    }
    Ok(Value::Object(out))
}

fn share_gpt_role(role: &str) -> &str {
    match role {
        "user" => "human",
        "assistant" => "gpt",
        "tool" => "observation",
        other => other,
    }
}

/// The calls of a message that has nothing but calls, as ShareGPT writes them; `None` where a turn of calls has no place for
/// something, as an id or a text beside them.
fn bare_calls(message: &Message) -> Option<String> {
    let object = message.object();
    let said = message.object().get("content").is_some_and(|c| !c.is_null() && c.as_str() != Some(""));
    if said || object.keys().any(|key| !["role", "content", "tool_calls"].contains(&key.as_str())) {
        return None;
    }
    let bare = |call: &Value| {
        let call = call.as_object()?;
        let function = call.get("function")?.as_object()?;
        let known = call.keys().all(|key| key == "type" || key == "function")
            && function.keys().all(|key| key == "name" || key == "arguments");
        known.then(|| Value::Object(function.clone()))
    };
    let calls = object.get("tool_calls")?.as_array()?.iter().map(bare).collect::<Option<Vec<_>>>()?;
    match calls.as_slice() {
        [] => None,
        [one] => Some(one.to_string()),
        several => Some(Value::from(several).to_string()),
    }
}

/// The text of a message; one part is as good as a text, several have no place.
fn text_of<'a>(message: &'a Message, format: &str) -> Result<Option<&'a str>, String> {
    match message.object().get("content") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(Value::Array(parts)) => match parts.as_slice() {
            [part] if part.get("type").is_some_and(|kind| kind == "text") => {
                Ok(part.get("text").and_then(Value::as_str))
            }
            _ => Err(format!("{format} holds one text per turn, not parts of a content")),
        },
        Some(_) => Err("a content is no text".to_string()),
    }
}

/// Alpaca holds a system text and rounds of a question and an answer, all of them trained.
fn alpaca(conversation: &Conversation) -> Result<Value, String> {
    if conversation.tools.as_ref().is_some_and(|tools| tools.as_array().is_none_or(|tools| !tools.is_empty())) {
        return Err("Alpaca has no place for tools".to_string());
    }
    let mut messages = conversation.messages.iter().peekable();
    let system = messages.next_if(|message| message.role() == "system");
    let mut rounds = Vec::new();
    for (place, message) in messages.enumerate() {
        let expected = if place % 2 == 0 { "user" } else { "assistant" };
        if message.role() != expected {
            return Err(format!(
                "Alpaca holds rounds of user and assistant, and a turn of {} is not one",
                message.role()
            ));
        }
        rounds.push(alpaca_text(message)?);
    }
    let system = system.map(alpaca_text).transpose()?;
    let mut pairs: Vec<(String, String)> = Vec::new();
    let mut texts = rounds.into_iter();
    while let Some(asked) = texts.next() {
        let answered = texts.next().ok_or("Alpaca needs an answer to the last question")?;
        pairs.push((asked, answered));
    }
    let (instruction, output) = pairs.pop().ok_or("Alpaca needs a question and an answer")?;
    Ok(alpaca_row(system.as_deref(), &pairs, [&instruction, "", &output]))
}

fn alpaca_text(message: &Message) -> Result<String, String> {
    if let Some(key) = message.object().iter().find(|(k, v)| !["role", "content"].contains(&k.as_str()) && !v.is_null())
    {
        return Err(format!("Alpaca has no place for '{}' of a turn", key.0));
    }
    if message.role() == "assistant" && !message.trained() {
        return Err("Alpaca has no place for an answer that is not trained".to_string());
    }
    Ok(text_of(message, "Alpaca")?.unwrap_or_default().to_string())
}

fn alpaca_row(system: Option<&str>, history: &[(String, String)], [instruction, input, output]: [&str; 3]) -> Value {
    let mut row = json!({"instruction": instruction, "input": input, "output": output});
    if let Value::Object(row) = &mut row {
        if let Some(system) = system {
            row.insert("system".to_string(), system.into());
        }
        if !history.is_empty() {
            row.insert("history".to_string(), json!(history));
        }
    }
    row
}

/// The completion is what follows the last turn that is not trained: it holds one trained answer, with its tool calls.
fn prompt_completion(conversation: &Conversation) -> Result<Value, String> {
    let messages = &conversation.messages;
    let trained = |message: &Message| message.role() == "assistant" && message.trained();
    let first = messages.iter().position(trained).ok_or("no answer is trained")?;
    let (prompt, completion) = messages.split_at(first);
    if completion.iter().any(|message| !trained(message) && message.role() != "tool") {
        return Err(
            "a completion holds one answer, and the row trains several turns (those with weight 0 would count as \
            prompt)"
                .to_string(),
        );
    }
    if prompt.is_empty() {
        return Err("the row begins with the answer, so there is no prompt".to_string());
    }
    let prompt: Vec<Value> = prompt.iter().map(|message| Value::Object(message.object().clone())).collect();
    let row = json!({ "prompt": prompt, "completion": turns(completion) });
    Ok(with_tools(row, conversation.tools.clone()))
}

impl super::Preference {
    fn write(&self) -> Value {
        let said = |said: &Said| match said {
            Said::Text(text) => Value::from(text.as_str()),
            Said::Messages(messages) => turns(messages),
        };
        let mut row = Map::new();
        if let Some(prompt) = &self.prompt {
            row.insert("prompt".to_string(), said(prompt));
        }
        match &self.answers {
            Answers::Pair { chosen, rejected } => {
                row.insert("chosen".to_string(), said(chosen));
                row.insert("rejected".to_string(), said(rejected));
            }
            Answers::Judged { completion, good } => {
                row.insert("completion".to_string(), said(completion));
                row.insert("label".to_string(), (*good).into());
            }
        }
        with_tools(Value::Object(row), self.tools.clone())
    }
}
