use minijinja::{Error, ErrorKind, Value, value::ValueKind};

use super::python_str::LONGEST;

/// How Python's `json.dumps` writes a value.
pub(super) struct Style<'a> {
    /// Everything beyond ASCII as `\uXXXX`.
    pub(super) ensure_ascii: bool,
    /// Repeated per level, each item on its own line; `None` is one line.
    pub(super) indent: Option<&'a str>,
    /// Between items.
    pub(super) item: &'a str,
    /// Between a key and its value.
    pub(super) key: &'a str,
    /// Keys in order of their characters.
    pub(super) sort_keys: bool,
}

impl Style<'_> {
    /// The value as JSON. Fails on what has none: undefined values, functions.
    pub(super) fn dump(&self, value: &Value) -> Result<String, Error> {
        let mut out = String::new();
        self.write(&mut out, value, 0)?;
        Ok(out)
    }

    fn write(&self, out: &mut String, value: &Value, level: usize) -> Result<(), Error> {
        if out.len() > LONGEST {
            return Err(too_long());
        }
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => out.push_str(&value.to_string()),
            ValueKind::Number => out.push_str(&float(f64::try_from(value.clone())?)),
            ValueKind::String => self.string(out, value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items = listed(value)?;
                self.container(out, ['[', ']'], &items, level, |out, item| self.write(out, item, level + 1))?;
            }
            ValueKind::Map => {
                let mut keys = listed(value)?;
                if self.sort_keys {
                    keys.sort();
                }
                self.container(out, ['{', '}'], &keys, level, |out, key| {
                    self.string(out, &key_text(key));
                    out.push_str(self.key);
                    self.write(out, &value.get_item(key)?, level + 1)
                })?;
            }
            kind => return Err(Error::new(ErrorKind::InvalidOperation, format!("tojson: {kind} is not JSON"))),
        }
        Ok(())
    }

    fn container(
        &self,
        out: &mut String,
        [open, close]: [char; 2],
        items: &[Value],
        level: usize,
        write: impl Fn(&mut String, &Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let new_line = |out: &mut String, level: usize| {
            if let Some(indent) = self.indent {
                out.push('\n');
                out.extend(std::iter::repeat_n(indent, level));
            }
        };
        out.push(open);
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                out.push_str(self.item);
            }
            new_line(out, level + 1);
            write(out, item)?;
        }
        if !items.is_empty() {
            new_line(out, level);
        }
        out.push(close);
        Ok(())
    }

    fn string(&self, out: &mut String, text: &str) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !c.is_ascii()) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

/// The items, unless the text of so many would be too long: a list can take no memory until it is looked at.
fn listed(value: &Value) -> Result<Vec<Value>, Error> {
    const MOST: usize = LONGEST / 64;
    let items: Vec<Value> = value.try_iter()?.take(MOST + 1).collect();
    if items.len() > MOST { Err(too_long()) } else { Ok(items) }
}

fn too_long() -> Error {
    Error::new(ErrorKind::InvalidOperation, "tojson: the text of a value is too long")
}

fn key_text(key: &Value) -> String {
    match key.kind() {
        ValueKind::None => "null".to_string(),
        ValueKind::Bool => key.is_true().to_string(),
        _ => key.to_string(),
    }
}

/// Python's `repr` of a float: the shortest digits that read back, with an exponent below 1e-4 and from 1e16.
pub(super) fn float(number: f64) -> String {
    if !number.is_finite() {
        return if number.is_nan() {
            "NaN"
        } else if number > 0.0 {
            "Infinity"
        } else {
            "-Infinity"
        }
        .to_string();
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(power) if number != 0.0 && !(-4..16).contains(&power) => {
            let sign = if power < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", power.abs())
        }
        _ => format!("{number:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expected values printed by Python's `repr`.
    #[test]
    fn floats_are_written_as_python_does() {
        let pairs = [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e16, "1e+16"),
            (1e15, "1000000000000000.0"),
            (1e-4, "0.0001"),
            (1.5e-5, "1.5e-05"),
            (-2.5e300, "-2.5e+300"),
            (0.0, "0.0"),
            (123456.789, "123456.789"),
        ];
        for (number, text) in pairs {
            assert_eq!(float(number), text);
        }
    }
}
