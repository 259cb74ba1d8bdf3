use minijinja::{Value, value::ValueKind};

use super::python_json::float;

/// Deeper nesting is left to the engine, which has a limit of its own.
const DEEPEST: usize = 64;

/// A value as Python's `str` writes it.
pub(super) fn python_str(value: &Value) -> String {
    let mut out = String::new();
    match value.as_str() {
        Some(text) => out.push_str(text),
        None => repr(&mut out, value, 0),
    }
    out
}

fn repr(out: &mut String, value: &Value, level: usize) {
    match value.kind() {
        ValueKind::Number if !value.is_integer() => match f64::try_from(value.clone()) {
            Ok(number) if number.is_finite() => out.push_str(&float(number)),
            Ok(number) => out.push_str(if number.is_nan() {
                "nan"
            } else if number > 0.0 {
                "inf"
            } else {
                "-inf"
            }),
            Err(_) => out.push_str(&value.to_string()),
        },
        ValueKind::String => quoted(out, value.as_str().unwrap_or_default()),
        ValueKind::Seq if level < DEEPEST && !value.is_tuple() => {
            out.push('[');
            for (index, item) in value.try_iter().into_iter().flatten().enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                repr(out, &item, level + 1);
            }
            out.push(']');
        }
        ValueKind::Map if level < DEEPEST && is_plain_map(value) => {
            out.push('{');
            for (index, key) in value.try_iter().into_iter().flatten().enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                repr(out, &key, level + 1);
                out.push_str(": ");
                repr(out, &value.get_item(&key).unwrap_or_default(), level + 1);
            }
            out.push('}');
        }
        _ => out.push_str(&value.to_string()),
    }
}

/// Not a namespace, a loop or another thing with attributes.
fn is_plain_map(value: &Value) -> bool {
    value.to_string().starts_with('{')
}

/// The text in quotes: double ones where it has single ones and no double ones; what does not print is escaped.
fn quoted(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => out.extend(['\\', c]),
            c if c.is_control() && u32::from(c) < 0x100 => out.push_str(&format!("\\x{:02x}", u32::from(c))),
            '\u{a0}' | '\u{ad}' => out.push_str(&format!("\\x{:02x}", u32::from(c))),
            // Separators and marks without a shape, as Python's `isprintable` has them.
            '\u{1680}'
            | '\u{2000}'..='\u{200f}'
            | '\u{2028}'..='\u{202f}'
            | '\u{205f}'..='\u{206f}'
            | '\u{3000}'
            | '\u{e000}'..='\u{f8ff}'
            | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}' => {
                out.push_str(&format!("\\u{:04x}", u32::from(c)));
            }
            c => out.push(c),
        }
    }
    out.push(quote);
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
            assert_eq!(python_str(&value), expected);
        }
    }
}
