//! Plain text: every line that is not blank is a row of `text`.

use serde_json::{Map, Value};

use super::{Opened, UseRow};
use crate::error::{Place, Result, RowFault};

pub(super) fn rows(file: &mut Opened, use_row: &mut UseRow) -> Result<()> {
    let mut bytes = Vec::new();
    for number in 1.. {
        let read = file.line(&mut bytes, number)?;
        if read.is_empty() {
            break;
        }
        let place = Place::Line(number);
        let line = std::str::from_utf8(read).map_err(|e| file.fault(place, RowFault::utf8(e)))?;
        let line = line.trim_end_matches(['\r', '\n']);
        if line.trim().is_empty() {
            continue;
        }
        let row = Map::from_iter([("text".to_string(), Value::from(line))]);
        if use_row(file.row(place, Value::Object(row)))?.is_break() {
            break;
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
    fn lines_are_rows() {
        let rows = read("x.txt", "one\r\n\n  two\n".as_bytes()).unwrap();
        assert_eq!(rows, [(Place::Line(1), json!({"text": "one"})), (Place::Line(3), json!({"text": "  two"}))]);
        assert!(message("x.txt", b"ok\nna\xefve\n").contains("x.txt:2: no UTF-8 at byte 2"));
    }
}
