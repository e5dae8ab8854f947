//! The one trailing table of options. Every key must be known: a mistyped option that is ignored costs a run.

use super::call::{Failed, NOT_UTF8, describe, list_of};
use super::nearest::suggestion;
use crate::error::Error;
use mlua::{Function, Table, Value};

/// Options of operation `op`, or none given.
pub struct Options {
    op: &'static str,
    table: Option<Table>,
}

impl Options {
    /// Errors: [`Error::Argument`] for a key that is not in `known`, with all that are.
    pub fn read(op: &'static str, table: Option<Table>, known: &[&str]) -> Failed<Self> {
        if let Some(table) = &table {
            for pair in table.pairs::<Value, Value>() {
                let (key, _) = pair?;
                let name = match &key {
                    Value::String(name) => name.to_string_lossy(),
                    other => {
                        let got = format!("an entry without a name ({})", describe(other));
                        return Err(Error::argument(op, "options", format!("named options ({})", known.join(", ")), got).into());
                    }
                };
                if !known.contains(&name.as_str()) {
                    let hint = suggestion(&name, known.iter().copied());
                    let expected = if known.is_empty() { "empty".into() } else { format!("one of {}", known.join(", ")) };
                    return Err(Error::argument(op, "option", expected, format!("`{name}`{hint}")).into());
                }
            }
        }
        Ok(Self { op, table })
    }

    /// The value of `key`; nil if not given.
    pub fn value(&self, key: &str) -> Failed<Value> {
        Ok(match &self.table {
            Some(table) => table.raw_get(key)?,
            None => Value::Nil,
        })
    }

    fn wrong(&self, key: &str, expected: &str, got: &Value) -> super::raise::Failure {
        Error::argument(self.op, key, expected, describe(got)).into()
    }

    pub fn string(&self, key: &str) -> Failed<Option<String>> {
        match self.value(key)? {
            Value::Nil => Ok(None),
            Value::String(text) => match text.to_str() {
                Ok(text) => Ok(Some(text.to_string())),
                Err(_) => Err(Error::argument(self.op, key, NOT_UTF8.0, NOT_UTF8.1).into()),
            },
            other => Err(self.wrong(key, "a string", &other)),
        }
    }

    pub fn number(&self, key: &str) -> Failed<Option<f64>> {
        match self.value(key)? {
            Value::Nil => Ok(None),
            Value::Integer(value) => Ok(Some(value as f64)),
            Value::Number(value) => Ok(Some(value)),
            other => Err(self.wrong(key, "a number", &other)),
        }
    }

    pub fn integer(&self, key: &str) -> Failed<Option<i64>> {
        match self.value(key)? {
            Value::Nil => Ok(None),
            Value::Integer(value) => Ok(Some(value)),
            Value::Number(value) if value.fract() == 0.0 && value.abs() < 2f64.powi(53) => Ok(Some(value as i64)),
            other => Err(self.wrong(key, "an integer", &other)),
        }
    }

    /// An integer that counts or measures something: at least `least`.
    pub fn count(&self, key: &str, least: usize) -> Failed<Option<usize>> {
        match self.integer(key)? {
            None => Ok(None),
            Some(value) => match usize::try_from(value) {
                Ok(count) if count >= least => Ok(Some(count)),
                _ => Err(Error::argument(self.op, key, format!("an integer of at least {least}"), value).into()),
            },
        }
    }

    pub fn boolean(&self, key: &str) -> Failed<Option<bool>> {
        match self.value(key)? {
            Value::Nil => Ok(None),
            Value::Boolean(value) => Ok(Some(value)),
            other => Err(self.wrong(key, "true or false", &other)),
        }
    }

    pub fn function(&self, key: &str) -> Failed<Option<Function>> {
        match self.value(key)? {
            Value::Nil => Ok(None),
            Value::Function(function) => Ok(Some(function)),
            other => Err(self.wrong(key, "a function", &other)),
        }
    }

    /// A list of strings.
    pub fn strings(&self, key: &str) -> Failed<Option<Vec<String>>> {
        let expected = "a list of strings";
        let Value::Table(table) = self.value(key)? else {
            return if self.value(key)?.is_nil() { Ok(None) } else { Err(self.wrong(key, expected, &self.value(key)?)) };
        };
        let entries = list_of(&table)?.map_err(|got| Error::argument(self.op, key, expected, got))?;
        let text = |value: &Value| value.as_string().and_then(|text| Some(text.to_str().ok()?.to_string()));
        let strings = entries.iter().map(|value| {
            text(value).ok_or_else(|| Error::argument(self.op, key, expected, format!("an entry that is {}", describe(value))).into())
        });
        strings.collect::<Failed<_>>().map(Some)
    }

    /// A list of numbers.
    pub fn numbers(&self, key: &str) -> Failed<Option<Vec<f64>>> {
        let Some(table) = self.table(key)? else { return Ok(None) };
        let expected = "a list of numbers";
        let entries = list_of(&table)?.map_err(|got| Error::argument(self.op, key, expected, got))?;
        let number = |value: &Value| match value {
            Value::Integer(value) => Ok(*value as f64),
            Value::Number(value) => Ok(*value),
            other => Err(Error::argument(self.op, key, expected, format!("an entry that is {}", describe(other))).into()),
        };
        entries.iter().map(number).collect::<Failed<_>>().map(Some)
    }

    pub fn table(&self, key: &str) -> Failed<Option<Table>> {
        match self.value(key)? {
            Value::Nil => Ok(None),
            Value::Table(table) => Ok(Some(table)),
            other => Err(self.wrong(key, "a table", &other)),
        }
    }
}
