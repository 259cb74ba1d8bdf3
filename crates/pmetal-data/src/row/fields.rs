//! Values of a row by key, and what is wrong with them.

use serde_json::{Map, Value};

use crate::error::RowFault;

pub(super) type Object = Map<String, Value>;
pub(super) type Parsed<T> = Result<T, RowFault>;

/// The string under a key; `None` where there is none.
pub(super) fn optional_text<'a>(row: &'a Object, key: &'static str) -> Parsed<Option<&'a str>> {
    match row.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(wrong(format!("'{key}'"), "a string", other)),
    }
}

/// The string under a key that has to be there.
pub(super) fn required_text<'a>(row: &'a Object, key: &'static str) -> Parsed<&'a str> {
    optional_text(row, key)?.ok_or(RowFault::MissingKey(key))
}

/// `input_ids` and `labels`.
pub(super) fn tokens(row: &Object) -> Parsed<(Vec<u32>, Option<Vec<i64>>)> {
    let input_ids = integers(row, "input_ids", |id| u32::try_from(id).ok(), "a token id")?;
    let trained = |label: i64| (label == -100 || u32::try_from(label).is_ok()).then_some(label);
    let labels = match row.get("labels") {
        None | Some(Value::Null) => None,
        Some(_) => Some(integers(row, "labels", trained, "a token id or -100")?),
    };
    match &labels {
        Some(labels) if labels.len() != input_ids.len() => {
            Err(RowFault::LabelsLength { input_ids: input_ids.len(), labels: labels.len() })
        }
        _ => Ok((input_ids, labels)),
    }
}

fn integers<T>(
    row: &Object,
    key: &'static str,
    convert: impl Fn(i64) -> Option<T>,
    expected: &'static str,
) -> Parsed<Vec<T>> {
    let array = match row.get(key) {
        Some(Value::Array(array)) => array,
        Some(other) => return Err(wrong(format!("'{key}'"), "an array of integers", other)),
        None => return Err(RowFault::MissingKey(key)),
    };
    let entry = |(index, value): (usize, &Value)| {
        let id = value.as_i64().and_then(&convert);
        id.ok_or_else(|| RowFault::Id { key, index, found: value.to_string(), expected })
    };
    array.iter().enumerate().map(entry).collect()
}

/// The fault of a value of another kind than expected.
pub(super) fn wrong(key: impl Into<String>, expected: &'static str, found: &Value) -> RowFault {
    RowFault::WrongKind { key: key.into(), expected, found: kind(found) }
}

/// The keys of an object, for an error.
pub(crate) fn keys(object: &Object) -> String {
    object.keys().map(String::as_str).collect::<Vec<_>>().join(", ")
}

/// What a value is, for an error.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
