//! Typed reading of the keys of one JSON object, with bounds: each fault names the file, the key, what was expected and
//! what was found. Knows no key by name; `config.rs`, `generation_config.rs` and `presets.rs` do.

use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::ops::RangeInclusive;
use std::path::Path;

/// A JSON object and where it came from. A key that is absent and one that is null read alike, as in transformers.
#[derive(Clone, Copy)]
pub struct Fields<'a> {
    /// The file, or what stands for one in messages.
    pub path: &'a Path,
    /// The key under which the object itself lies, with a dot, or nothing.
    pub prefix: &'a str,
    pub object: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The value of `key`, unless it is absent or null.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    /// An [`Error::Format`] at `key`.
    pub fn fault(&self, key: &str, expected: impl Into<String>, found: impl Into<String>) -> Error {
        Error::format(self.path, format!("{}{key}", self.prefix), expected, found)
    }

    /// An [`Error::Format`] at `key` that quotes its value.
    pub fn wrong(&self, key: &str, expected: impl Into<String>) -> Error {
        self.fault(key, expected, self.object.get(key).map_or("no such key".into(), describe))
    }

    /// A whole number within `range`, or `default`.
    pub fn count(&self, key: &str, default: usize, range: RangeInclusive<usize>) -> Result<usize> {
        Ok(self.optional_count(key, range)?.unwrap_or(default))
    }

    /// A whole number within `range`, if there is one.
    pub fn optional_count(&self, key: &str, range: RangeInclusive<usize>) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let count = value.as_u64().and_then(|count| usize::try_from(count).ok()).filter(|count| range.contains(count));
        count.map(Some).ok_or_else(|| self.wrong(key, format!("a whole number from {} to {}", range.start(), range.end())))
    }

    /// A number within `range`, or `default`. A range may exclude its start by beginning just above it.
    pub fn number(&self, key: &str, default: f64, range: RangeInclusive<f64>) -> Result<f64> {
        Ok(self.optional_number(key, range)?.unwrap_or(default))
    }

    /// A number within `range`, if there is one.
    pub fn optional_number(&self, key: &str, range: RangeInclusive<f64>) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_f64().filter(|number| range.contains(number));
        number.map(Some).ok_or_else(|| self.wrong(key, format!("a number from {} to {}", range.start(), range.end())))
    }

    /// true or false, or `default`.
    pub fn flag(&self, key: &str, default: bool) -> Result<bool> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.wrong(key, "true or false"))
    }

    /// A string, if there is one.
    pub fn text(&self, key: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(key, "a string"))
    }

    /// An object, if there is one. `prefix` is `key` with a dot, for the messages of its own keys.
    pub fn object(&self, key: &str, prefix: &'a str) -> Result<Option<Fields<'a>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let object = value.as_object().ok_or_else(|| self.wrong(key, "an object"))?;
        Ok(Some(Fields { path: self.path, prefix, object }))
    }

    /// A list of whole numbers within `range`, if there is one.
    pub fn counts(&self, key: &str, range: RangeInclusive<usize>) -> Result<Option<Vec<usize>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let count = |value: &Value| value.as_u64().and_then(|count| usize::try_from(count).ok()).filter(|count| range.contains(count));
        let counts = value.as_array().and_then(|list| list.iter().map(count).collect());
        counts.map(Some).ok_or_else(|| self.wrong(key, format!("a list of whole numbers from {} to {}", range.start(), range.end())))
    }

    /// A token id, if there is one.
    pub fn token(&self, key: &str) -> Result<Option<u32>> {
        let id = self.optional_count(key, 0..=i32::MAX as usize)?;
        Ok(id.map(|id| u32::try_from(id).expect("the range ends below u32::MAX")))
    }

    /// Token ids: a list, one number, or none.
    pub fn tokens(&self, key: &str) -> Result<Vec<u32>> {
        if self.get(key).is_some_and(Value::is_array) {
            let ids = self.counts(key, 0..=i32::MAX as usize)?.unwrap_or_default();
            return Ok(ids.into_iter().map(|id| u32::try_from(id).expect("the range ends below u32::MAX")).collect());
        }
        Ok(self.token(key)?.into_iter().collect())
    }
}

/// The JSON object in `text`. Errors: [`Error::Format`] if it is something else.
pub fn parse_object(path: &Path, text: &str) -> Result<Map<String, Value>> {
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => Err(Error::format(path, "file", "a JSON object", describe(&other))),
        Err(e) => Err(Error::format(path, "file", "a JSON object", format!("text that is no JSON ({e})"))),
    }
}

/// A value as a message may hold it: short, and with its type.
fn describe(value: &Value) -> String {
    match value {
        Value::Array(list) if list.len() > 8 => format!("a list of {} values", list.len()),
        Value::Object(object) => format!("an object of {} keys", object.len()),
        other => {
            let text = other.to_string();
            if text.chars().count() > 80 { text.chars().take(80).chain("...".chars()).collect() } else { text }
        }
    }
}
