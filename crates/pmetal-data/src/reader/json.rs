//! Rows as JSON lines, or as the elements of a JSON array.

use std::{
    cell::Cell,
    fmt,
    io::{BufRead, Read},
    ops::ControlFlow,
    rc::Rc,
};

use serde::de::{DeserializeSeed, Deserializer, SeqAccess, Visitor};
use serde_json::Value;

use super::{Opened, RawRow, UseRow};
use crate::error::{Error, Place, Result, RowFault};

/// The first character tells lines and array apart, whatever the file is called. CRLF line ends and blank lines are fine.
pub(super) fn rows(file: &mut Opened, use_row: &mut UseRow) -> Result<()> {
    // Blank lines before the first row count, so that the numbers are an editor's.
    let mut line = 1;
    let first = loop {
        let next = file.reader.fill_buf().map(|bytes| bytes.first().copied());
        let Some(byte) = next.map_err(|source| file.failed(source))? else { return Ok(()) };
        if !byte.is_ascii_whitespace() {
            break byte;
        }
        line += usize::from(byte == b'\n');
        file.reader.consume(1);
    };
    if first == b'[' { array(file, line, use_row) } else { lines(file, line, use_row) }
}

fn lines(file: &mut Opened, first_line: usize, use_row: &mut UseRow) -> Result<()> {
    let mut bytes = Vec::new();
    for line in first_line.. {
        let read = file.line(&mut bytes, line)?;
        if read.is_empty() {
            break;
        }
        let row = read.trim_ascii();
        if row.is_empty() {
            continue;
        }
        let place = Place::Line(line);
        let value = serde_json::from_slice(row).map_err(|e| file.fault(place, RowFault::Json(in_words(&e))))?;
        if use_row(file.row(place, value))?.is_break() {
            break;
        }
    }
    Ok(())
}

/// serde_json counts lines from where it began to read; only its column means something here.
fn in_words(error: &serde_json::Error) -> String {
    let words = error.to_string();
    let reason = words.rfind(" at line ").and_then(|end| words.get(..end)).unwrap_or(&words);
    let hint = if error.is_eof() { "; a row is one line, or an element of a JSON array" } else { "" };
    format!("{reason} at column {}{hint}", error.column())
}

fn array(file: &mut Opened, first_line: usize, use_row: &mut UseRow) -> Result<()> {
    let line = Rc::new(Cell::new(first_line));
    let read = Rc::clone(&file.read);
    let mut end = None;
    let counted = LineCounter { reader: &mut file.reader, line: Rc::clone(&line) };
    let mut json = serde_json::Deserializer::from_reader(counted);
    let elements = Elements { line: &line, read: &read, use_row, end: &mut end };
    let parsed = json.deserialize_seq(elements).and_then(|()| json.end());
    match (parsed, end) {
        (_, Some(End::Failed(error))) => Err(error),
        (_, Some(End::Stopped)) | (Ok(()), None) => Ok(()),
        (Err(e), None) if e.is_io() => Err(file.failed(e.into())),
        (Err(e), None) => Err(file.fault(Place::Line(line.get()), RowFault::Json(in_words(&e)))),
    }
}

/// Counts the lines that went by. serde_json takes one byte at a time, so the count is that of the byte it looks at.
struct LineCounter<R> {
    reader: R,
    line: Rc<Cell<usize>>,
}

impl<R: BufRead> Read for LineCounter<R> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let read = self.reader.read(out)?;
        let ends = out.iter().take(read).filter(|&&byte| byte == b'\n').count();
        self.line.set(self.line.get() + ends);
        Ok(read)
    }
}

/// Why reading ended before the array did, if not for its JSON.
enum End {
    Stopped,
    Failed(Error),
}

/// Hands each element on as it is parsed.
struct Elements<'a, 'b> {
    line: &'a Cell<usize>,
    read: &'a Cell<u64>,
    use_row: &'a mut UseRow<'b>,
    end: &'a mut Option<End>,
}

impl<'de> Visitor<'de> for Elements<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of rows")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let mut element = 0;
        while let Some((line, value)) = seq.next_element_seed(Located(self.line))? {
            let place = Place::Element { line, element };
            *self.end = match (self.use_row)(RawRow { place, value, bytes_read: self.read.get() }) {
                Ok(ControlFlow::Continue(())) => None,
                Ok(ControlFlow::Break(())) => Some(End::Stopped),
                Err(error) => Some(End::Failed(error)),
            };
            if self.end.is_some() {
                return Err(serde::de::Error::custom("stopped"));
            }
            element += 1;
        }
        Ok(())
    }
}

/// A value with the line it starts on.
struct Located<'a>(&'a Cell<usize>);

impl<'de> DeserializeSeed<'de> for Located<'_> {
    type Value = (usize, Value);

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        let line = self.0.get();
        serde::Deserialize::deserialize(deserializer).map(|value| (line, value))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::{message, read};
    use super::*;

    #[test]
    fn lines_with_mark_crlf_and_blanks() {
        let rows = read("x.jsonl", b"\xef\xbb\xbf{\"text\":\"a\"}\r\n\r\n{\"text\":\"b\"}").unwrap();
        assert_eq!(rows, [(Place::Line(1), json!({"text": "a"})), (Place::Line(3), json!({"text": "b"}))]);
    }

    #[test]
    fn arrays_know_the_line_of_each_element() {
        let rows = read("x.json", b"\n[\n {\n \"text\": \"a\"},\r\n\n {\"text\": \"b\"}\n]\n").unwrap();
        let place = |line, element| Place::Element { line, element };
        assert_eq!(rows, [(place(3, 0), json!({"text": "a"})), (place(6, 1), json!({"text": "b"}))]);
    }

    #[test]
    fn a_bad_row_is_named_by_file_and_line() {
        let bad = message("x.jsonl", b"{\"text\":\"a\"}\n{\"text\":\n");
        assert!(bad.contains("x.jsonl:2: bad JSON: EOF while parsing a value at column"), "{bad}");
        let bad = message("x.json", b"[{\"text\":\"a\"},\n{\"text\":\"b\"\n\n\"x\"}]");
        assert!(bad.contains("x.json:4: bad JSON: expected `,` or `}` at column 1"), "{bad}");
        let bad = message("x.json", b"[{\"text\":\"a\"}");
        assert!(bad.contains("x.json:1: bad JSON: EOF while parsing a list"), "{bad}");
        assert!(message("x.jsonl", b"\xff\x01{}").contains("x.jsonl:1: bad JSON"));
        assert!(message("x.jsonl", "[".repeat(100_000).as_bytes()).contains("recursion limit"));
        assert!(read("x.jsonl", b"\n\n").unwrap().is_empty());
    }
}
