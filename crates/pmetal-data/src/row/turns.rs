//! The turns of a conversation: Messages (`role`, `content`) and ShareGPT (`from`, `value`).

use serde_json::Value;

use super::{
    fields::{Object, Parsed, keys, wrong},
    tools,
};
use crate::{conversation::Message, error::RowFault};

const ROLES: &str = "system, developer, user (human), assistant (gpt, model, bot, chatgpt, bing, bard), function_call, \
    tool (observation, function)";

/// Keys of a turn that say who speaks, what, and whether it is trained; templates see the first two as `role` and `content`.
const OWN_KEYS: [&str; 7] = ["role", "from", "content", "value", "weight", "train", "function_call"];

/// Reads an array of turns; `key` names it in errors.
pub(super) fn messages(key: &str, turns: &Value) -> Parsed<Vec<Message>> {
    match turns {
        Value::Array(turns) => turns.iter().enumerate().map(|(turn, value)| message(turn, value)).collect(),
        other => Err(wrong(format!("'{key}'"), "an array of turns", other)),
    }
}

/// Reads one turn; `turn` is its index, for errors.
pub(super) fn message(turn: usize, value: &Value) -> Parsed<Message> {
    let Value::Object(object) = value else { return Err(wrong(format!("turn {turn}"), "an object", value)) };
    let field = |names: [&'static str; 2]| {
        names.into_iter().find_map(|name| object.get(name).filter(|v| !v.is_null()).map(|value| (name, value)))
    };
    let turn_keys = || RowFault::TurnKeys { turn, seen: keys(object) };
    let (role_key, role) = field(["role", "from"]).ok_or_else(turn_keys)?;
    let role = role.as_str().ok_or_else(|| wrong(format!("turn {turn}: '{role_key}'"), "a string", role))?;
    let said = field(["content", "value"]);
    let mut known = Object::new();
    known.insert("role".to_string(), role_name(turn, role)?.into());
    match said {
        Some((key, value)) if role == "function_call" => {
            known.insert("content".to_string(), "".into());
            known.insert("tool_calls".to_string(), tools::calls(&format!("turn {turn}: '{key}'"), value)?.into());
        }
        Some((key, value)) => drop(known.insert("content".to_string(), content(turn, key, value)?)),
        // A template can tell a message without content from one whose content is null.
        None if calls_tools(object) || reasons(object) => {
            if object.contains_key("content") || object.contains_key("value") {
                known.insert("content".to_string(), Value::Null);
            }
        }
        None => match object.get_key_value("content").or_else(|| object.get_key_value("value")) {
            Some((key, null)) => return Err(wrong(format!("turn {turn}: '{key}'"), "a string", null)),
            None => return Err(turn_keys()),
        },
    }
    if let Some(call) = object.get("function_call").filter(|call| !call.is_null()) {
        let calls = tools::calls(&format!("turn {turn}: 'function_call'"), call)?;
        known.insert("tool_calls".to_string(), calls.into());
    }
    for (key, value) in object.iter().filter(|(key, _)| !OWN_KEYS.contains(&key.as_str())) {
        let value = match (key.as_str(), value) {
            ("tool_calls", Value::Null) => Value::Null,
            ("tool_calls", calls) => tools::calls(&format!("turn {turn}: 'tool_calls'"), calls)?.into(),
            (_, value) => value.clone(),
        };
        known.entry(key.clone()).or_insert(value);
    }
    let mut message = Message::from_object(known);
    message.set_trained(trained(turn, object)?);
    Ok(message)
}

fn role_name(turn: usize, role: &str) -> Parsed<&'static str> {
    match role {
        "user" | "human" => Ok("user"),
        "assistant" | "gpt" | "model" | "bot" | "chatgpt" | "bing" | "bard" | "function_call" => Ok("assistant"),
        "tool" | "observation" | "function" => Ok("tool"),
        "system" => Ok("system"),
        "developer" => Ok("developer"),
        other => Err(RowFault::UnknownRole { turn, role: other.to_string(), expected: ROLES }),
    }
}

fn calls_tools(turn: &Object) -> bool {
    ["tool_calls", "function_call"].iter().any(|key| turn.get(*key).is_some_and(|calls| !calls.is_null()))
}

fn reasons(turn: &Object) -> bool {
    ["reasoning_content", "reasoning", "thinking"].iter().any(|key| turn.get(*key).is_some_and(Value::is_string))
}

/// A text, or parts of which each is text or reasoning. Keys without a value are left out of a part: tables have them all.
fn content(turn: usize, key: &str, value: &Value) -> Parsed<Value> {
    let parts = match value {
        Value::String(_) => return Ok(value.clone()),
        Value::Array(parts) => parts,
        other => return Err(wrong(format!("turn {turn}: '{key}'"), "a string or an array of parts", other)),
    };
    let part = |(index, part): (usize, &Value)| {
        let at = || format!("turn {turn}: '{key}' entry {index}");
        let Value::Object(part) = part else { return Err(wrong(at(), "an object with type and text", part)) };
        let part: Object = part.iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.clone(), v.clone())).collect();
        let text_key = match part.get("type").and_then(Value::as_str) {
            Some("text") => ["text", "text", "text"],
            Some("thinking" | "reasoning") => ["thinking", "reasoning", "text"],
            Some(other) => return Err(RowFault::Part { turn, index, kind: other.to_string() }),
            None => return Err(RowFault::PartKeys { turn, index, seen: keys(&part) }),
        };
        match text_key.iter().find_map(|key| part.get(*key)) {
            Some(Value::String(_)) => Ok(Value::Object(part)),
            // Mistral's reasoning is itself a list of parts.
            Some(Value::Array(_)) if text_key[0] == "thinking" => Ok(Value::Object(part)),
            Some(other) => Err(wrong(format!("{}: its text", at()), "a string", other)),
            None => Err(RowFault::PartKeys { turn, index, seen: keys(&part) }),
        }
    };
    parts.iter().enumerate().map(part).collect()
}

/// Whether a turn is trained, where it is the assistant's: not with `weight` 0 or `train` false.
fn trained(turn: usize, object: &Object) -> Parsed<bool> {
    let weight = match object.get("weight").filter(|weight| !weight.is_null()) {
        None => true,
        Some(weight) => match weight.as_f64() {
            Some(0.0) => false,
            Some(1.0) => true,
            _ => return Err(RowFault::Weight { turn, found: weight.to_string() }),
        },
    };
    match object.get("train").filter(|train| !train.is_null()) {
        None => Ok(weight),
        Some(Value::Bool(train)) => Ok(weight && *train),
        Some(other) => Err(wrong(format!("turn {turn}: 'train'"), "true or false", other)),
    }
}
