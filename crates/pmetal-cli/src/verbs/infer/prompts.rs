//! Files of prompts.

use std::{fs, path::Path};

use pmetal::{core::Error as FileError, data::Prompt};
use serde_json::{Map, Value};

use crate::verbs::{Failure, Result};

/// A prompt with what stood beside it.
pub struct Row {
    /// Everything the row had.
    pub fields: Map<String, Value>,
    /// What is asked.
    pub prompt: Prompt,
    /// The file and where in it.
    pub place: String,
}

impl Row {
    /// Whether it is a conversation, which always goes through the chat template.
    pub fn is_conversation(&self) -> bool {
        matches!(self.prompt, Prompt::Conversation(_))
    }

    fn new(value: Value, place: String) -> Result<Self> {
        let fields = match &value {
            Value::Object(fields) => fields.clone(),
            other => Map::from_iter([("prompt".to_owned(), other.clone())]),
        };
        match Prompt::parse(value) {
            Ok(prompt) => Ok(Self { fields, prompt, place }),
            Err(fault) => Err(Failure::Row { place, reason: fault.to_string() }),
        }
    }
}

/// Reads a file of prompts: lines of text (`.txt`), JSON lines, or a JSON array.
pub fn read(path: &Path) -> Result<Vec<Row>> {
    let bytes = fs::read(path).map_err(FileError::io("read", path))?;
    let refuse = |reason: &str| Failure::Content { path: path.to_path_buf(), reason: reason.to_owned() };
    let text = str::from_utf8(&bytes).map_err(|e| {
        let line = bytes.iter().take(e.valid_up_to()).filter(|&&byte| byte == b'\n').count() + 1;
        let reason = "is not UTF-8 text; expected JSON lines, a JSON array, or a .txt file with a prompt per line";
        Failure::Row { place: at_line(path, line), reason: reason.to_owned() }
    })?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let plain = path.extension().is_some_and(|kind| kind.eq_ignore_ascii_case("txt"));
    let rows = if !plain && text.trim_start().starts_with('[') {
        array(path, text)?
    } else {
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let row = |(i, line): (usize, &str)| {
            let place = at_line(path, i + 1);
            let value = if plain { Value::from(line) } else { json(line, &place)? };
            Row::new(value, place)
        };
        lines.map(row).collect::<Result<Vec<_>>>()?
    };
    if rows.is_empty() {
        return Err(refuse("has no prompt"));
    }
    Ok(rows)
}

fn at_line(path: &Path, line: usize) -> String {
    format!("{}:{line}", path.display())
}

fn json(line: &str, place: &str) -> Result<Value> {
    serde_json::from_str(line).map_err(|e| {
        // it counts lines from the one it was given
        let words = e.to_string();
        let words = words.split(" at line ").next().unwrap_or_default();
        let reason =
            format!("bad JSON: {words} at column {}; expected one JSON object per line, or a .txt file", e.column());
        Failure::Row { place: place.to_owned(), reason }
    })
}

fn array(path: &Path, text: &str) -> Result<Vec<Row>> {
    let values: Vec<Value> = serde_json::from_str(text).map_err(|e| {
        let words = e.to_string();
        let words = words.split(" at line ").next().unwrap_or_default();
        Failure::Row { place: at_line(path, e.line()), reason: format!("bad JSON: {words} at column {}", e.column()) }
    })?;
    let row = |(i, value)| Row::new(value, format!("{}: element {i} (from 0)", path.display()));
    values.into_iter().enumerate().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(name: &str, contents: &[u8]) -> Result<Vec<Row>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        fs::write(&path, contents).unwrap();
        read(&path)
    }

    #[test]
    fn lines_arrays_and_plain_text() {
        let texts = |name: &str, contents: &[u8]| -> Vec<(Prompt, String)> {
            let rows = rows(name, contents).unwrap();
            rows.into_iter().map(|row| (row.prompt, Value::Object(row.fields).to_string())).collect()
        };
        let text = |text: &str| Prompt::Text(text.into());
        let expected =
            [(text("a b"), r#"{"id":1,"prompt":"a b"}"#.to_owned()), (text("é"), r#"{"prompt":"é"}"#.to_owned())];
        assert_eq!(texts("x.jsonl", "\u{feff}{\"id\":1,\"prompt\":\"a b\"}\r\n\n\"é\"".as_bytes()), expected);
        assert_eq!(texts("x.json", "\n [{\"id\":1,\"prompt\":\"a b\"},\n\"é\"]".as_bytes()), expected);
        let expected =
            [(text("[a \"b\""), r#"{"prompt":"[a \"b\""}"#.to_owned()), (text("{}"), r#"{"prompt":"{}"}"#.to_owned())];
        assert_eq!(texts("x.txt", b"[a \"b\"\r\n  \n{}\n"), expected);
    }

    #[test]
    fn a_bad_row_is_named_by_its_line() {
        let says = |name: &str, contents: &[u8], parts: &[&str]| {
            let message = rows(name, contents).err().unwrap().to_string();
            for part in parts {
                assert!(message.contains(part), "'{part}' is not in: {message}");
            }
        };
        says("x.jsonl", b"\"a\"\n\n{\"prompt\": }", &["x.jsonl:3: bad JSON: expected value at column 12"]);
        says("x.jsonl", b"\"a\"\n{\"text\": \"b\"}", &["x.jsonl:2: has the keys [text], expected prompt"]);
        says("x.json", b"[\"a\",\n{\"prompt\": }]", &["x.json:2: bad JSON"]);
        says("x.json", b"[\"a\", {\"prompt\": 3}]", &["x.json: element 1 (from 0): 'prompt' is a number"]);
        says("x.jsonl", b"\"a\"\n\"\xff\"", &["x.jsonl:2: is not UTF-8"]);
        says("x.txt", b"\n \n", &["x.txt: has no prompt"]);
        says("x.csv", b"prompt\nhi", &["x.csv:1: bad JSON", "expected one JSON object per line"]);
    }
}
