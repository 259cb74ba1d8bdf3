//! Rows out of a file, one at a time.

use std::{
    cell::Cell,
    fmt,
    fs::File,
    io::{BufRead, BufReader, Read},
    path::Path,
    rc::Rc,
};

use serde::de::{DeserializeSeed, Deserializer, SeqAccess, Visitor};
use serde_json::Value;

use crate::{
    error::{Error, Place, Result, RowFault},
    row::Row,
};

/// Endings of files that hold rows in a form that is not read here.
const OTHER_KINDS: [&str; 9] = ["parquet", "csv", "tsv", "arrow", "gz", "zst", "zip", "yaml", "yml"];

/// Calls `use_row` with each row of a file of JSON lines or a JSON array of objects, in order; stops at its first error.
///
/// The first character tells the two apart, whatever the file is called. A byte order mark, CRLF line ends and blank
/// lines are fine. No more than one row is held at a time.
///
/// # Errors
/// When the file cannot be read or is no file of rows, when a row is broken, or what `use_row` returns.
pub(crate) fn for_each_row(path: &Path, mut use_row: impl FnMut(Place, Row) -> Result<()>) -> Result<()> {
    let kind = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    if path.is_dir() || OTHER_KINDS.contains(&kind.as_str()) {
        return Err(Error::NotRows { path: path.to_path_buf() });
    }
    let read_error = |source| Error::Read { path: path.to_path_buf(), source };
    let mut reader = BufReader::with_capacity(1 << 20, File::open(path).map_err(read_error)?);
    if reader.fill_buf().map_err(read_error)?.starts_with(b"\xef\xbb\xbf") {
        reader.consume(3);
    }
    // Blank lines before the first row count, so that the numbers are an editor's.
    let mut line = 1;
    let first = loop {
        let Some(&byte) = reader.fill_buf().map_err(read_error)?.first() else { return Ok(()) };
        if !byte.is_ascii_whitespace() {
            break byte;
        }
        line += usize::from(byte == b'\n');
        reader.consume(1);
    };
    if first == b'[' { array(path, reader, line, &mut use_row) } else { lines(path, reader, line, &mut use_row) }
}

fn lines(
    path: &Path,
    mut reader: impl BufRead,
    mut line: usize,
    use_row: &mut dyn FnMut(Place, Row) -> Result<()>,
) -> Result<()> {
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        let read = reader.read_until(b'\n', &mut bytes);
        if read.map_err(|source| Error::Read { path: path.to_path_buf(), source })? == 0 {
            return Ok(());
        }
        let place = Place { line, element: None };
        let row = bytes.trim_ascii();
        if !row.is_empty() {
            let fault = |fault| Error::Row { path: path.to_path_buf(), place, fault: Box::new(fault) };
            let value = serde_json::from_slice(row).map_err(|e| fault(RowFault::Json(in_words(&e))))?;
            use_row(place, Row::parse(value).map_err(fault)?)?;
        }
        line += 1;
    }
}

/// serde_json counts lines from where it began to read; only its column means something here.
fn in_words(error: &serde_json::Error) -> String {
    let words = error.to_string();
    let reason = words.rfind(" at line ").and_then(|end| words.get(..end)).unwrap_or(&words);
    let hint = if error.is_eof() { "; a row is one line, or an element of a JSON array" } else { "" };
    format!("{reason} at column {}{hint}", error.column())
}

fn array(
    path: &Path,
    reader: impl BufRead,
    first_line: usize,
    use_row: &mut dyn FnMut(Place, Row) -> Result<()>,
) -> Result<()> {
    let line = Rc::new(Cell::new(first_line));
    let counted = LineCounter { reader, line: Rc::clone(&line) };
    let mut failure = None;
    let mut json = serde_json::Deserializer::from_reader(counted);
    let elements = Elements { path, line: &line, use_row, failure: &mut failure };
    let parsed = json.deserialize_seq(elements).and_then(|()| json.end());
    match (parsed, failure) {
        (_, Some(error)) => Err(error),
        (Ok(()), None) => Ok(()),
        (Err(e), None) if e.is_io() => Err(Error::Read { path: path.to_path_buf(), source: e.into() }),
        (Err(e), None) => Err(Error::Row {
            path: path.to_path_buf(),
            place: Place { line: line.get(), element: None },
            fault: Box::new(RowFault::Json(in_words(&e))),
        }),
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

/// Hands each element on as it is parsed.
struct Elements<'a> {
    path: &'a Path,
    line: &'a Cell<usize>,
    use_row: &'a mut dyn FnMut(Place, Row) -> Result<()>,
    /// The error that stopped it, if it was not the JSON's.
    failure: &'a mut Option<Error>,
}

impl<'de> Visitor<'de> for Elements<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of rows")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let mut element = 0;
        while let Some((line, value)) = seq.next_element_seed(Located(self.line))? {
            let place = Place { line, element: Some(element) };
            let fault = |fault| Error::Row { path: self.path.to_path_buf(), place, fault: Box::new(fault) };
            let used = Row::parse(value).map_err(fault).and_then(|row| (self.use_row)(place, row));
            if let Err(error) = used {
                *self.failure = Some(error);
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
    use super::*;

    fn read(name: &str, contents: &[u8]) -> Result<Vec<(Place, String)>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, contents).unwrap();
        let mut rows = Vec::new();
        for_each_row(&path, |place, row| {
            let Row::Text(text) = row else { panic!("{row:?}") };
            rows.push((place, text));
            Ok(())
        })?;
        Ok(rows)
    }

    fn message(name: &str, contents: &[u8]) -> String {
        read(name, contents).unwrap_err().to_string()
    }

    #[test]
    fn lines_with_mark_crlf_and_blanks() {
        let rows = read("x.jsonl", b"\xef\xbb\xbf{\"text\":\"a\"}\r\n\r\n{\"text\":\"b\"}").unwrap();
        let place = |line| Place { line, element: None };
        assert_eq!(rows, [(place(1), "a".to_string()), (place(3), "b".to_string())]);
    }

    #[test]
    fn arrays_know_the_line_of_each_element() {
        let rows = read("x.json", b"\n[\n {\n \"text\": \"a\"},\r\n\n {\"text\": \"b\"}\n]\n").unwrap();
        let place = |line, element| Place { line, element: Some(element) };
        assert_eq!(rows, [(place(3, 0), "a".to_string()), (place(6, 1), "b".to_string())]);
    }

    #[test]
    fn a_bad_row_is_named_by_file_and_line() {
        let bad = message("x.jsonl", b"{\"text\":\"a\"}\n{\"text\":\n");
        assert!(bad.contains("x.jsonl:2: bad JSON: EOF while parsing a value at column"), "{bad}");
        let bad = message("x.json", b"[{\"text\":\"a\"},\n{\"txt\":\"b\"}]");
        assert!(bad.contains("x.json:2: element 1: no known format has the keys [txt]"), "{bad}");
        let bad = message("x.json", b"[{\"text\":\"a\"},\n{\"text\":\"b\"\n\n\"x\"}]");
        assert!(bad.contains("x.json:4: bad JSON: expected `,` or `}` at column 1"), "{bad}");
        let bad = message("x.json", b"[{\"text\":\"a\"}");
        assert!(bad.contains("x.json:1: bad JSON: EOF while parsing a list"), "{bad}");
        assert!(message("x.csv", b"a,b").contains("expected a .jsonl or .json file"));
        assert!(message("x.jsonl", b"\xff\xfe{}").contains("x.jsonl:1: bad JSON"));
        assert!(read("x.jsonl", b"\n\n").unwrap().is_empty());
    }
}
