//! Tables of text: a header, then a row per record; every cell is a string.

use std::io::BufRead;

use csv::{ErrorKind, Reader, ReaderBuilder, StringRecord};
use serde_json::{Map, Value};

use super::{Opened, UseRow};
use crate::error::{Error, Place, Result, RowFault};

/// What may stand between the cells of a `.csv`: spreadsheets write semicolons where the comma is decimal.
const DELIMITERS: [u8; 3] = [b',', b';', b'\t'];

/// RFC 4180, with any line ends; `delimiter` is read off the header where it is none.
pub(super) fn rows(file: &mut Opened, delimiter: Option<u8>, use_row: &mut UseRow) -> Result<()> {
    let header = header(file)?;
    let delimiter = delimiter.unwrap_or_else(|| sniff(&header));
    // the csv crate counts a line where its `\n` goes by, which after `\r` is at the start of the next record
    let behind = usize::from(header.ends_with(b"\r"));
    let (path, read) = (file.path.clone(), file.read.clone());
    let fault = |place, fault| Error::Row { path: path.clone(), place, fault: Box::new(fault) };
    let mut reader: Reader<&mut Box<dyn BufRead>> =
        ReaderBuilder::new().delimiter(delimiter).from_reader(&mut file.reader);
    let broken = |e: csv::Error| {
        let line = e.position().map_or(1, |at| at.line() as usize + behind);
        match e.into_kind() {
            ErrorKind::Io(source) => Error::Read { path: path.clone(), source },
            ErrorKind::Utf8 { err, .. } => {
                fault(Place::Line(line), RowFault::Table(format!("cell {} is no UTF-8", err.field() + 1)))
            }
            ErrorKind::UnequalLengths { expected_len, len, .. } => fault(
                Place::Line(line),
                RowFault::Table(format!(
                    "{len} cells, the header has {expected_len}; cells with a delimiter or a line end need quotes"
                )),
            ),
            other => fault(Place::Line(line), RowFault::Table(format!("{other:?}"))),
        }
    };
    let names = reader.headers().map_err(&broken)?.clone();
    check_header(&names).map_err(|reason| fault(Place::Line(1), RowFault::Table(reason)))?;
    let mut record = StringRecord::new();
    while reader.read_record(&mut record).map_err(&broken)? {
        let place = Place::Line(record.position().map_or(0, |at| at.line() as usize + behind));
        let cells = names.iter().zip(&record).map(|(name, cell)| (name.trim().to_string(), Value::from(cell)));
        let value = Value::Object(Map::from_iter(cells));
        if use_row(super::RawRow { place, value, bytes_read: read.get() })?.is_break() {
            break;
        }
    }
    Ok(())
}

/// The first line, as far as it is in the buffer.
fn header(file: &mut Opened) -> Result<Vec<u8>> {
    let path = &file.path;
    let start = file.reader.fill_buf().map_err(|source| Error::Read { path: path.clone(), source })?;
    Ok(start.split(|&byte| byte == b'\n').next().unwrap_or_default().to_vec())
}

/// The delimiter that the header has most of.
fn sniff(header: &[u8]) -> u8 {
    let count = |delimiter: u8| header.iter().filter(|&&byte| byte == delimiter).count();
    // of equals the first: a comma
    DELIMITERS.into_iter().rev().max_by_key(|&delimiter| count(delimiter)).unwrap_or(b',')
}

fn check_header(names: &StringRecord) -> Result<(), String> {
    for (column, name) in names.iter().enumerate() {
        if name.trim().is_empty() {
            // pandas writes its index so, and nobody reads it
            if column == 0 {
                continue;
            }
            return Err(format!("column {} has no name", column + 1));
        }
        if names.iter().take(column).any(|other| other.trim() == name.trim()) {
            return Err(format!("two columns are called '{}'", name.trim()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::{message, read};
    use super::*;

    #[test]
    fn cells_with_quotes_line_ends_and_marks() {
        let csv = "\u{feff}instruction,output\r\n\"Say \"\"hi\"\", twice\",\"a\nb\"\r\nplain,\r\n";
        let rows = read("x.csv", csv.as_bytes()).unwrap();
        let first = json!({"instruction": "Say \"hi\", twice", "output": "a\nb"});
        assert_eq!(rows, [(Place::Line(2), first), (Place::Line(4), json!({"instruction": "plain", "output": ""}))]);
        for (name, contents) in
            [("x.tsv", "a\tb,c\n1\t2;3\n"), ("x.csv", "a;b,c;d\n1;2;3\n"), ("x.csv", "a\tb\n1\t2\n")]
        {
            let value = read(name, contents.as_bytes()).unwrap().remove(0).1;
            assert_eq!(value["a"], "1", "{name}: {value}");
        }
    }

    #[test]
    fn broken_tables_are_named_by_line() {
        let bad = message("x.csv", b"a,b\n1,2\n3\n");
        assert!(bad.contains("x.csv:3: 1 cells, the header has 2"), "{bad}");
        assert!(message("x.csv", b"a,b\n1,\xff\n").contains("x.csv:2: cell 2 is no UTF-8"));
        assert!(message("x.csv", b"a,a\n1,2\n").contains("two columns are called 'a'"));
        assert!(message("x.csv", b"a,,b\n1,2,3\n").contains("column 2 has no name"));
        assert!(read("x.csv", b"").unwrap().is_empty());
    }
}
