//! From the columns a file has to the keys a format of rows is known by.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result, RowFault};

/// The keys that formats are made of.
const TARGETS: [&str; 17] = [
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "system",
    "history",
    "tools",
    "functions",
    "text",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "label",
    "input_ids",
    "labels",
];

/// Keys whose values are lists or objects; tables, and files with a fixed schema, have them as JSON in a string.
const STRUCTURED: [&str; 10] = [
    "messages",
    "conversations",
    "history",
    "input_ids",
    "labels",
    "chosen",
    "rejected",
    "prompt",
    "completion",
    "functions",
];

/// Those of them that may be plain text, too.
const TEXTS: [&str; 4] = ["chosen", "rejected", "prompt", "completion"];

/// Which columns of a file are which keys of a row: `instruction=question,output=answer`.
///
/// With a map, a row has the mapped keys alone; a dotted name reaches into objects and lists (`answers.text.0`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ColumnMap {
    /// Key of the row, column of the file.
    pairs: Vec<(String, String)>,
}

impl FromStr for ColumnMap {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = |reason: String| Error::Columns { reason };
        let mut pairs: Vec<(String, String)> = Vec::new();
        for pair in text.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
            let (key, column) = pair.split_once('=').ok_or_else(|| bad(format!("'{pair}' is no key=column")))?;
            let (key, column) = (key.trim(), column.trim());
            if !TARGETS.contains(&key) {
                return Err(bad(format!("no row has the key '{key}'; known are {}", TARGETS.join(", "))));
            }
            if column.is_empty() {
                return Err(bad(format!("'{key}' needs a column")));
            }
            if pairs.iter().any(|(known, _)| known == key) {
                return Err(bad(format!("'{key}' is there twice")));
            }
            pairs.push((key.to_string(), column.to_string()));
        }
        Ok(Self { pairs })
    }
}

impl TryFrom<String> for ColumnMap {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<ColumnMap> for String {
    fn from(map: ColumnMap) -> Self {
        map.to_string()
    }
}

impl fmt::Display for ColumnMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, (key, column)) in self.pairs.iter().enumerate() {
            write!(f, "{}{key}={column}", if at > 0 { "," } else { "" })?;
        }
        Ok(())
    }
}

impl ColumnMap {
    /// The row under the keys of its format, with what is JSON in a string parsed.
    pub(crate) fn apply(&self, value: Value) -> Result<Value, RowFault> {
        let Value::Object(row) = value else { return Ok(value) };
        let mut row = if self.pairs.is_empty() { row } else { self.renamed(&row)? };
        for (key, value) in &mut row {
            if let Some(text) = value.as_str().filter(|_| STRUCTURED.contains(&key.as_str())) {
                // a table has a cell where there is nothing
                let may_be_text = TEXTS.contains(&key.as_str());
                let parsed = match structure(text) {
                    None if text.is_empty() && !may_be_text => Some(Value::Null),
                    Some(structure) if may_be_text && !is_turns(&structure) => None,
                    found => found,
                };
                *value = parsed.unwrap_or_else(|| std::mem::take(value));
            }
        }
        Ok(Value::Object(row))
    }

    fn renamed(&self, row: &Map<String, Value>) -> Result<Map<String, Value>, RowFault> {
        let mut renamed = Map::new();
        for (key, column) in &self.pairs {
            let Some(value) = row.get(column).or_else(|| reach(row, column)) else {
                let columns = row.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
                return Err(RowFault::NoColumn { column: column.clone(), columns });
            };
            // a number or a truth value is what a text key says in words
            let text = match value {
                Value::Number(number) => Value::from(number.to_string()),
                Value::Bool(truth) if key != "label" => Value::from(truth.to_string()),
                other => other.clone(),
            };
            renamed.insert(key.clone(), text);
        }
        Ok(renamed)
    }
}

/// The value at a dotted name.
fn reach<'a>(row: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    let (first, rest) = name.split_once('.')?;
    rest.split('.').try_fold(row.get(first)?, |value, part| match value {
        Value::Object(object) => object.get(part),
        Value::Array(list) => list.get(part.parse::<usize>().ok()?),
        _ => None,
    })
}

/// A list or object written as a string.
fn structure(text: &str) -> Option<Value> {
    let text = text.trim_start();
    // brackets alone say nothing: a prompt may begin with one
    let opens = |text: &str| text.starts_with('[') || text.starts_with('{');
    opens(text).then(|| serde_json::from_str(text).ok()).flatten().filter(|value: &Value| !value.is_string())
}

/// Whether a value is a list of messages: an answer may itself be JSON.
fn is_turns(value: &Value) -> bool {
    let first = value.as_array().and_then(|turns| turns.first());
    first.is_some_and(|turn| turn.get("role").or(turn.get("from")).is_some())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn columns_become_keys() {
        let map: ColumnMap = "instruction = question, output=answers.text.0".parse().unwrap();
        let row = json!({"question": "1 + 1?", "answers": {"text": [2, 3]}, "text": "left out"});
        assert_eq!(map.apply(row).unwrap(), json!({"instruction": "1 + 1?", "output": "2"}));
        assert_eq!(map.to_string(), "instruction=question,output=answers.text.0");
        let fault = map.apply(json!({"question": "x", "answer": "y"})).unwrap_err().to_string();
        assert_eq!(fault, "there is no column 'answers.text.0'; the row has question, answer");
    }

    #[test]
    fn lists_in_strings_are_parsed_and_prompts_are_not() {
        let row = json!({"messages": "[{\"role\": \"user\", \"content\": \"[1]\"}]", "text": "[1]", "prompt": "[x] is", "completion": "[{\"a\": 1}]", "n": 1});
        let parsed = ColumnMap::default().apply(row).unwrap();
        assert_eq!(parsed["messages"][0]["content"], "[1]");
        assert_eq!((&parsed["text"], &parsed["prompt"]), (&json!("[1]"), &json!("[x] is")));
        assert_eq!(parsed["completion"], "[{\"a\": 1}]");
    }

    #[test]
    fn maps_that_make_no_sense_are_refused() {
        let message = |text: &str| text.parse::<ColumnMap>().unwrap_err().to_string();
        assert!(message("question=instruction").contains("no row has the key 'question'; known are messages"));
        assert!(message("output").contains("'output' is no key=column"));
        assert!(message("output=").contains("needs a column"));
        assert!(message("output=a,output=b").contains("twice"));
    }
}
