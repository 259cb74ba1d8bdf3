//! The key-value part of a GGUF header.
//!
//! Scalars are decoded when the file is opened. Arrays are only measured then, and decoded when asked for: a vocabulary
//! costs nothing until a tokenizer is built from it, and no length a file states is ever allocated on trust.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;

use crate::cursor::Cursor;
use crate::{Error, GgufFile, Result};

/// One value.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    String(String),
    Array(Array),
}

/// An array still in the mapped file: `len` elements of `kind` in `bytes`, whose extent was checked.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Array {
    kind: Kind,
    len: usize,
    bytes: Range<usize>,
}

/// The value types of the format.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl Kind {
    /// In the order of their numbers in the file.
    const ALL: [Self; 13] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::String,
        Self::Array,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    fn read(cursor: &mut Cursor, what: &str) -> Result<Self> {
        let id = cursor.u32(what)?;
        let kind = usize::try_from(id).ok().and_then(|id| Self::ALL.get(id).copied());
        kind.ok_or_else(|| cursor.malformed(what.to_string(), "a value type from 0 to 12", id))
    }

    /// Bytes of one element; none for those of variable length.
    fn size(self) -> Option<u64> {
        match self {
            Self::U8 | Self::I8 | Self::Bool => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::String | Self::Array => None,
        }
    }

    /// A number of this kind out of its bytes; none for strings and arrays, or a wrong number of bytes.
    fn decode(self, bytes: &[u8]) -> Option<Value> {
        Some(match self {
            Self::U8 => Value::Unsigned(u8::from_le_bytes(bytes.try_into().ok()?).into()),
            Self::I8 => Value::Signed(i8::from_le_bytes(bytes.try_into().ok()?).into()),
            Self::U16 => Value::Unsigned(u16::from_le_bytes(bytes.try_into().ok()?).into()),
            Self::I16 => Value::Signed(i16::from_le_bytes(bytes.try_into().ok()?).into()),
            Self::U32 => Value::Unsigned(u32::from_le_bytes(bytes.try_into().ok()?).into()),
            Self::I32 => Value::Signed(i32::from_le_bytes(bytes.try_into().ok()?).into()),
            Self::U64 => Value::Unsigned(u64::from_le_bytes(bytes.try_into().ok()?)),
            Self::I64 => Value::Signed(i64::from_le_bytes(bytes.try_into().ok()?)),
            Self::F32 => Value::Float(shortest(f32::from_le_bytes(bytes.try_into().ok()?))),
            Self::F64 => Value::Float(f64::from_le_bytes(bytes.try_into().ok()?)),
            Self::Bool => Value::Bool(bytes.first().copied()? != 0),
            Self::String | Self::Array => return None,
        })
    }
}

/// The f64 with the shortest decimal text that is this f32: an epsilon stored as f32 comes out as 1e-5, as in `config.json`,
/// and narrows back to the same bits.
pub(crate) fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or_else(|_| value.into())
}

/// Reads `count` pairs.
pub(crate) fn read(cursor: &mut Cursor, count: u64) -> Result<HashMap<String, Value>> {
    let mut metadata = HashMap::new();
    for index in 0..count {
        let key = cursor.string(&format!("metadata key {} of {count}", index + 1))?;
        let what = format!("metadata key '{key}'");
        let kind = Kind::read(cursor, &what)?;
        let value = read_value(cursor, kind, &what)?;
        if metadata.insert(key, value).is_some() {
            return Err(cursor.malformed(what, "one value", "two"));
        }
    }
    Ok(metadata)
}

fn read_value(cursor: &mut Cursor, kind: Kind, what: &str) -> Result<Value> {
    match kind {
        Kind::String => cursor.string(what).map(Value::String),
        Kind::Array => read_array(cursor, what).map(Value::Array),
        _ => {
            let bytes = cursor.take(kind.size().unwrap_or_default(), what)?;
            kind.decode(bytes).ok_or_else(|| cursor.malformed(what.to_string(), "a number", "none"))
        }
    }
}

fn read_array(cursor: &mut Cursor, what: &str) -> Result<Array> {
    let kind = Kind::read(cursor, what)?;
    let count = cursor.u64(what)?;
    let start = cursor.position();
    match kind.size() {
        Some(size) => {
            cursor.take(count.saturating_mul(size), what)?;
        }
        None if kind == Kind::Array => {
            return Err(cursor.malformed(what.to_string(), "an array of scalars", "an array of arrays"));
        }
        None => {
            for _ in 0..count {
                let length = cursor.u64(what)?;
                cursor.take(length, what)?;
            }
        }
    }
    // The elements were all there, so their number fits.
    Ok(Array { kind, len: count as usize, bytes: start..cursor.position() })
}

impl GgufFile {
    fn wrong_kind(&self, key: &str, expected: &'static str, found: &Value) -> Error {
        let found = match found {
            Value::Unsigned(value) => value.to_string(),
            Value::Signed(value) => value.to_string(),
            Value::Float(value) => value.to_string(),
            Value::Bool(value) => value.to_string(),
            Value::String(value) => format!("'{value}'"),
            Value::Array(array) => format!("an array of {} {:?}", array.len, array.kind),
        };
        self.malformed(format!("metadata key '{key}'"), expected, found)
    }

    /// A whole number not below zero, of any integer type in the file.
    pub(crate) fn unsigned(&self, key: &str) -> Result<Option<u64>> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        match *value {
            Value::Unsigned(number) => Ok(Some(number)),
            Value::Signed(number) if number >= 0 => Ok(Some(number.unsigned_abs())),
            _ => Err(self.wrong_kind(key, "a whole number", value)),
        }
    }

    /// A finite number.
    pub(crate) fn float(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        match *value {
            Value::Float(number) if number.is_finite() => Ok(Some(number)),
            _ => Err(self.wrong_kind(key, "a finite float", value)),
        }
    }

    pub(crate) fn boolean(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        match *value {
            Value::Bool(flag) => Ok(Some(flag)),
            _ => Err(self.wrong_kind(key, "true or false", value)),
        }
    }

    pub(crate) fn string(&self, key: &str) -> Result<Option<&str>> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        match value {
            Value::String(text) => Ok(Some(text)),
            _ => Err(self.wrong_kind(key, "a string", value)),
        }
    }

    /// An array of strings. Bytes that are not UTF-8 become U+FFFD.
    pub(crate) fn strings(&self, key: &str) -> Result<Option<Vec<Cow<'_, str>>>> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        let Value::Array(array @ Array { kind: Kind::String, .. }) = value else {
            return Err(self.wrong_kind(key, "an array of strings", value));
        };
        let mut cursor = Cursor::new(&self.path, self.bytes(&array.bytes));
        let mut strings = Vec::with_capacity(array.len);
        for _ in 0..array.len {
            let length = cursor.u64(key)?;
            strings.push(String::from_utf8_lossy(cursor.take(length, key)?));
        }
        Ok(Some(strings))
    }

    /// A number, or true or false, as JSON has it.
    pub(crate) fn scalar(&self, key: &str) -> Result<Option<serde_json::Value>> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        match *value {
            Value::Unsigned(number) => Ok(Some(number.into())),
            Value::Signed(number) => Ok(Some(number.into())),
            Value::Float(number) if number.is_finite() => Ok(Some(number.into())),
            Value::Bool(flag) => Ok(Some(flag.into())),
            _ => Err(self.wrong_kind(key, "a finite number", value)),
        }
    }

    /// Whether a key holds an array.
    pub(crate) fn is_array(&self, key: &str) -> bool {
        matches!(self.metadata.get(key), Some(Value::Array(_)))
    }

    /// An array of numbers, of whatever type in the file; true is 1.
    pub(crate) fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        let expected = "an array of numbers";
        let Value::Array(array) = value else { return Err(self.wrong_kind(key, expected, value)) };
        let Some(size) = array.kind.size() else { return Err(self.wrong_kind(key, expected, value)) };
        let elements = self.bytes(&array.bytes).chunks_exact(size as usize);
        let numbers = elements.map(|bytes| match array.kind.decode(bytes) {
            Some(Value::Unsigned(number)) => Ok(number as f64),
            Some(Value::Signed(number)) => Ok(number as f64),
            Some(Value::Float(number)) => Ok(number),
            Some(Value::Bool(flag)) => Ok(f64::from(u8::from(flag))),
            _ => Err(self.wrong_kind(key, expected, value)),
        });
        numbers.collect::<Result<_>>().map(Some)
    }

    /// What a getter found, or an error that the key is missing.
    pub(crate) fn required<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| Error::MissingKey { path: self.path.clone(), key: key.to_string() })
    }
}
