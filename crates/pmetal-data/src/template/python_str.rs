use std::fmt::{self, Write};

use minijinja::{Error, ErrorKind, Value, value::ValueKind};

use super::python_json::float;

/// Deeper nesting is left to the engine, which has a limit of its own.
const DEEPEST: usize = 64;

/// Bytes of a value written as text. A list can be as long as a number says and take no memory until it is written.
pub(super) const LONGEST: usize = 64 << 20;

/// Items of one list or mapping written as text, for the same reason.
const MOST: usize = 1 << 20;

/// A value as Python's `str` writes it; fails beyond [`LONGEST`].
pub(super) fn python_str(value: &Value) -> Result<String, Error> {
    let mut out = Limited(String::new());
    let written = write_str(&mut out, value);
    written.map_err(|_| Error::new(ErrorKind::InvalidOperation, "the text of a value is too long"))?;
    Ok(out.0)
}

/// Writes a value as Python's `str` does; fails when `out` does.
pub(super) fn write_str(out: &mut impl Write, value: &Value) -> fmt::Result {
    match value.as_str() {
        Some(text) => out.write_str(text),
        None => repr(out, value, 0),
    }
}

/// A text that refuses to grow without end.
struct Limited(String);

impl Write for Limited {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if self.0.len() + text.len() > LONGEST {
            return Err(fmt::Error);
        }
        self.0.push_str(text);
        Ok(())
    }
}

fn repr(out: &mut impl Write, value: &Value, level: usize) -> fmt::Result {
    match value.kind() {
        ValueKind::Number if !value.is_integer() => match f64::try_from(value.clone()) {
            Ok(number) if number.is_finite() => out.write_str(&float(number)),
            Ok(number) if number.is_nan() => out.write_str("nan"),
            Ok(number) => out.write_str(if number > 0.0 { "inf" } else { "-inf" }),
            Err(_) => write!(out, "{value}"),
        },
        ValueKind::String => quoted(out, value.as_str().unwrap_or_default()),
        ValueKind::Seq | ValueKind::Iterable if level < DEEPEST && !value.is_tuple() => {
            out.write_char('[')?;
            for (index, item) in value.try_iter().into_iter().flatten().enumerate() {
                enough(index)?;
                out.write_str(if index > 0 { ", " } else { "" })?;
                repr(out, &item, level + 1)?;
            }
            out.write_char(']')
        }
        ValueKind::Map if level < DEEPEST && is_plain_map(value) => {
            out.write_char('{')?;
            for (index, key) in value.try_iter().into_iter().flatten().enumerate() {
                enough(index)?;
                out.write_str(if index > 0 { ", " } else { "" })?;
                repr(out, &key, level + 1)?;
                out.write_str(": ")?;
                repr(out, &value.get_item(&key).unwrap_or_default(), level + 1)?;
            }
            out.write_char('}')
        }
        _ => write!(out, "{value}"),
    }
}

fn enough(items: usize) -> fmt::Result {
    if items < MOST { Ok(()) } else { Err(fmt::Error) }
}

/// Not a namespace, a loop or another thing with attributes: those write a name first.
fn is_plain_map(value: &Value) -> bool {
    let mut first = FirstByte(None);
    let _ = write!(first, "{value}");
    first.0 == Some(b'{')
}

/// Stops a value from writing more than its first byte.
struct FirstByte(Option<u8>);

impl Write for FirstByte {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0 = self.0.or(text.bytes().next());
        if self.0.is_some() { Err(fmt::Error) } else { Ok(()) }
    }
}

/// The text in quotes: double ones where it has single ones and no double ones; what does not print is escaped.
fn quoted(out: &mut impl Write, text: &str) -> fmt::Result {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.write_char(quote)?;
    for c in text.chars() {
        match c {
            '\n' => out.write_str("\\n")?,
            '\r' => out.write_str("\\r")?,
            '\t' => out.write_str("\\t")?,
            '\\' => out.write_str("\\\\")?,
            c if c == quote => write!(out, "\\{c}")?,
            c if c.is_control() && u32::from(c) < 0x100 => write!(out, "\\x{:02x}", u32::from(c))?,
            '\u{a0}' | '\u{ad}' => write!(out, "\\x{:02x}", u32::from(c))?,
            // Separators and marks without a shape, as Python's `isprintable` has them.
            '\u{1680}'
            | '\u{2000}'..='\u{200f}'
            | '\u{2028}'..='\u{202f}'
            | '\u{205f}'..='\u{206f}'
            | '\u{3000}'
            | '\u{e000}'..='\u{f8ff}'
            | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}' => {
                write!(out, "\\u{:04x}", u32::from(c))?;
            }
            c => out.write_char(c)?,
        }
    }
    out.write_char(quote)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expected texts printed by Python's `str`.
    #[test]
    fn values_are_written_as_python_does() {
        let pairs = [
            (Value::from(1e22), "1e+22"),
            (Value::from(1.0), "1.0"),
            (Value::from(f64::INFINITY), "inf"),
            (Value::from("it's"), "it's"),
            (Value::from(vec!["it's", "a", "\"'", "\n\u{2028}é\\"]), r#"["it's", 'a', '"\'', '\n\u2028é\\']"#),
            (Value::from_pairs([("k", Value::from(())), ("f", Value::from(1e-7))]), "{'k': None, 'f': 1e-07}"),
            (Value::from(Vec::<Value>::new()), "[]"),
        ];
        for (value, expected) in pairs {
            assert_eq!(python_str(&value).unwrap(), expected);
        }
    }
}
