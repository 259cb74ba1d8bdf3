//! Tools a conversation has and calls of them, in the forms datasets write them.

use serde_json::{Map, Value, json};

use super::fields::{Object, Parsed, kind, wrong};
use crate::error::RowFault;

/// The tools of a row: `tools`, or OpenAI's former `functions`. Either is an array, or one written into a string, as datasets
/// with a fixed schema have it.
pub(super) fn of_row(row: &Object) -> Parsed<Option<Value>> {
    if let Some(tools) = list(row, "tools")? {
        return Ok(Some(Value::Array(tools)));
    }
    let wrapped = |function: Value| json!({"type": "function", "function": function});
    Ok(list(row, "functions")?.map(|functions| functions.into_iter().map(wrapped).collect()))
}

fn list(row: &Object, key: &'static str) -> Parsed<Option<Vec<Value>>> {
    let value = match row.get(key) {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(text)) if text.trim().is_empty() => return Ok(None),
        Some(value) => written_out(&format!("'{key}'"), value)?,
    };
    let entries = match value {
        Value::Array(entries) => entries,
        Value::Null => return Ok(None),
        other => return Err(wrong(format!("'{key}'"), "an array", &other)),
    };
    let entry = |(index, entry): (usize, Value)| match written_out(&format!("'{key}' entry {index}"), &entry)? {
        object @ Value::Object(_) => Ok(object),
        other => Err(wrong(format!("'{key}' entry {index}"), "an object", &other)),
    };
    entries.into_iter().enumerate().map(entry).collect::<Parsed<Vec<_>>>().map(Some)
}

/// The value, or the one its text is JSON of.
fn written_out(key: &str, value: &Value) -> Parsed<Value> {
    match value {
        Value::String(text) => serde_json::from_str(text).map_err(|e| RowFault::Json(format!("in {key}: {e}"))),
        other => Ok(other.clone()),
    }
}

/// Tool calls in OpenAI's form, `{"type": "function", "function": {"name", "arguments"}}`, out of that form, a bare
/// `{"name", "arguments"}`, or a text with either as JSON. Arguments stay as they are, an object or a text of one: which of
/// the two a template can write is its own business.
pub(super) fn calls(key: &str, value: &Value) -> Parsed<Vec<Value>> {
    let entries = match written_out(key, value)? {
        Value::Array(entries) => entries,
        object @ Value::Object(_) => vec![object],
        other => return Err(wrong(key, "an array of calls", &other)),
    };
    entries.into_iter().enumerate().map(|(index, entry)| call(&format!("{key} entry {index}"), entry)).collect()
}

fn call(key: &str, entry: Value) -> Parsed<Value> {
    let Value::Object(mut object) = entry else { return Err(wrong(key, "an object", &entry)) };
    if !object.get("function").is_some_and(Value::is_object) {
        let mut function = Map::new();
        for (from, to) in [("name", "name"), ("arguments", "arguments"), ("parameters", "arguments")] {
            if let Some(value) = object.shift_remove(from) {
                function.entry(to).or_insert(value);
            }
        }
        object.shift_remove("function");
        object.shift_insert(0, "type".to_string(), "function".into());
        object.insert("function".to_string(), Value::Object(function));
    }
    let function = object.get("function").and_then(Value::as_object);
    let name = function.and_then(|function| function.get("name")).filter(|name| !name.is_null());
    match name {
        Some(Value::String(_)) => {}
        Some(other) => return Err(wrong(format!("{key}: 'name'"), "a string", other)),
        None => return Err(RowFault::CallWithoutName { key: key.to_string() }),
    }
    match function.and_then(|function| function.get("arguments")) {
        None | Some(Value::Null | Value::Object(_) | Value::String(_)) => Ok(Value::Object(object)),
        Some(other) => Err(RowFault::WrongKind {
            key: format!("{key}: 'arguments'"),
            expected: "an object or a string of JSON",
            found: kind(other),
        }),
    }
}
