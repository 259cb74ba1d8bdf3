//! A configuration's keys, typed, with errors that name the key.

use std::path::PathBuf;

use serde_json::Value;

use crate::{Error, Result};

/// What to do about a value that no tool wrote.
const RESTORE: &str = "restore the model's own file";

/// The largest size a configuration may state: beyond any model there is, and small enough that products of two do not overflow.
const LARGEST: u64 = 1 << 26;

/// An object of a configuration. A key that is absent or null is none: where a family tells the two apart, it asks [`Keys::has`].
#[derive(Clone, Copy)]
pub(crate) struct Keys<'a> {
    object: &'a Value,
    /// The key this object stands under, for messages.
    under: &'static str,
}

impl<'a> Keys<'a> {
    pub(crate) fn new(object: &'a Value) -> Self {
        Self { object, under: "" }
    }

    /// The object with another key in it.
    pub(crate) fn with(&self, key: &str, value: Value) -> Value {
        let mut object = self.object.clone();
        if let Some(map) = object.as_object_mut() {
            map.insert(key.to_owned(), value);
        }
        object
    }

    /// The object under a key, where there is one.
    pub(crate) fn object(&self, key: &'static str) -> Result<Option<Self>> {
        match self.get(key) {
            None => Ok(None),
            Some(object) if object.is_object() => Ok(Some(Keys { object, under: key })),
            Some(other) => Err(self.refuse(key, format!("expected an object, found {other}; {RESTORE}"))),
        }
    }

    /// Whether the key is there, be it null.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.object.get(key).is_some()
    }

    /// Whether it has no key.
    pub(crate) fn is_empty(&self) -> bool {
        self.object.as_object().is_none_or(|object| object.is_empty())
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|v| !v.is_null())
    }

    /// An error about a key.
    pub(crate) fn refuse(&self, key: &str, reason: impl Into<String>) -> Error {
        let key = if self.under.is_empty() { key.to_owned() } else { format!("{}.{key}", self.under) };
        Error::Config { path: PathBuf::from("config.json"), key, reason: reason.into() }
    }

    /// An error about a value that does not fit the others.
    pub(crate) fn wrong(&self, key: &str, reason: String) -> Error {
        self.refuse(key, format!("{reason}; {RESTORE}"))
    }

    fn typed<T>(&self, key: &str, expected: &str, read: impl FnOnce(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| self.refuse(key, format!("expected {expected}, found {value}; {RESTORE}")))
    }

    fn required<T>(&self, key: &str, found: Option<T>) -> Result<T> {
        found.ok_or_else(|| self.refuse(key, format!("is missing; {RESTORE}")))
    }

    /// A number of things: at least one.
    pub(crate) fn size(&self, key: &str) -> Result<Option<usize>> {
        let sensible = |v: &Value| v.as_u64().filter(|n| (1..=LARGEST).contains(n)).map(|n| n as usize);
        self.typed(key, &format!("a whole number from 1 to {LARGEST}"), sensible)
    }

    /// A number of things that must be there.
    pub(crate) fn required_size(&self, key: &str) -> Result<usize> {
        self.required(key, self.size(key)?)
    }

    /// A whole number from zero on.
    pub(crate) fn whole(&self, key: &str) -> Result<Option<u64>> {
        let sensible = |v: &Value| v.as_u64().filter(|&n| n <= LARGEST);
        self.typed(key, &format!("a whole number up to {LARGEST}"), sensible)
    }

    /// A finite number.
    pub(crate) fn number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", |v| v.as_f64().filter(|x| x.is_finite()))
    }

    /// A number above zero, in f32 too.
    pub(crate) fn positive(&self, key: &str) -> Result<Option<f64>> {
        let sensible = |x: &f64| *x as f32 > 0.0 && (*x as f32).is_finite();
        self.typed(key, "a number above 0", |v| v.as_f64().filter(sensible))
    }

    /// A number above zero that must be there.
    pub(crate) fn required_positive(&self, key: &str) -> Result<f64> {
        self.required(key, self.positive(key)?)
    }

    pub(crate) fn boolean(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.typed(key, "a text", Value::as_str)
    }

    /// A list of numbers above zero that must be there.
    pub(crate) fn required_positives(&self, key: &str) -> Result<Vec<f64>> {
        let positive = |v: &Value| v.as_f64().filter(|x| x.is_finite() && *x > 0.0);
        let list = self.typed(key, "numbers above 0", |v| v.as_array()?.iter().map(positive).collect())?;
        self.required(key, list)
    }

    /// A list of whole numbers.
    pub(crate) fn wholes(&self, key: &str) -> Result<Option<Vec<u64>>> {
        self.typed(key, "a list of whole numbers", |v| v.as_array()?.iter().map(Value::as_u64).collect())
    }

    /// True or false, or a number that is true where it is not 0.
    pub(crate) fn switch(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", |v| v.as_bool().or_else(|| v.as_f64().map(|x| x != 0.0)))
    }

    /// A list of texts.
    pub(crate) fn texts(&self, key: &str) -> Result<Option<Vec<&'a str>>> {
        self.typed(key, "a list of texts", |v| v.as_array()?.iter().map(Value::as_str).collect())
    }

    /// Token ids: one, or a list.
    pub(crate) fn ids(&self, key: &str) -> Result<Option<Vec<u32>>> {
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        self.typed(key, "a token id or a list of them", |v| match v {
            Value::Array(list) => list.iter().map(id).collect(),
            one => Some(vec![id(one)?]),
        })
    }
}
