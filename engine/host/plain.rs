//! Plain values: what a script may hand to the engine to keep: nil, booleans, numbers, strings, tensors, and tables of these.
//! In a record they are JSON; tensors lie beside it, by number. What comes back equals what was given, to the bit.
//!
//! JSON that is not the value itself is an object whose only key begins with `$`: `$float` (NaN and infinities), `$bytes`
//! (strings that are not UTF-8), `$map` (tables whose keys are neither 1..n nor names), `$tensor` (a number into the list of
//! tensors; `$leaf` if it is one that asks for its gradient). A name that begins with `$` gets another one in front.

use super::call::{Failed, as_tensor, describe};
use super::key_order::{self, Unordered};
use super::tensor::tensor_value;
use crate::error::Error;
use crate::kernels::element::Dtype;
use crate::tensor::AnyTensor;
use crate::tensor::any::AnyData;
use mlua::{Lua, Table, Value};
use serde_json::{Map, Value as Json, json};

/// Tables in tables in tables: deeper ones contain themselves.
const DEPTH_MAX: usize = 64;

/// A value outside of any Lua state.
#[derive(Clone, Default)]
pub struct Plain {
    pub json: Json,
    pub tensors: Vec<AnyTensor>,
}

impl Plain {
    /// Takes `value` apart.
    ///
    /// - `what`: what the value is called in messages
    ///
    /// Errors: [`Error::Argument`] for functions, objects of the engine other than tensors, and tables that contain
    /// themselves, with the place.
    pub fn of(op: &'static str, what: &str, value: &Value) -> Failed<Self> {
        let mut plain = Self::default();
        plain.json = plain.add(op, what, value, 0)?;
        Ok(plain)
    }

    /// Takes `value` apart into this one; its tensors join the others. As [`Plain::of`].
    pub fn add(&mut self, op: &'static str, place: &str, value: &Value, depth: usize) -> Failed<Json> {
        if let Some(tensor) = as_tensor(value) {
            if tensor.device().is_some() {
                let got = format!("one on {}; move it with :to(\"cpu\")", tensor.place());
                return Err(Error::argument(op, place, "tensors on the CPU, where they are when this is read again", got).into());
            }
            tensor.force()?;
            let key = if tensor.node().is_some_and(|node| node.is_leaf()) { "$leaf" } else { "$tensor" };
            self.tensors.push(tensor.detach());
            return Ok(json!({ key: self.tensors.len() - 1 }));
        }
        Ok(match value {
            Value::Nil => Json::Null,
            Value::Boolean(value) => Json::from(*value),
            Value::Integer(value) => Json::from(*value),
            Value::Number(value) if value.is_finite() => Json::from(*value),
            Value::Number(value) => json!({ "$float": value.to_string() }),
            Value::String(text) => match text.to_str() {
                Ok(text) => Json::from(text.to_string()),
                Err(_) => json!({ "$bytes": hex(&text.as_bytes()) }),
            },
            Value::Table(table) if depth < DEPTH_MAX => self.add_table(op, place, table, depth)?,
            Value::Table(_) => {
                // The way in says what is wrong; all of it would fill the screen.
                let place: String = place.chars().take(40).collect();
                let got = "deeper ones; does a table contain itself?";
                return Err(Error::argument(op, format!("{place}..."), format!("tables at most {DEPTH_MAX} deep"), got).into());
            }
            other => {
                let expected = "plain data: nil, booleans, numbers, strings, tensors and tables of these";
                return Err(Error::argument(op, place, expected, describe(other)).into());
            }
        })
    }

    fn add_table(&mut self, op: &'static str, place: &str, table: &Table, depth: usize) -> Failed<Json> {
        let mut entries = Vec::new();
        for pair in table.pairs::<Value, Value>() {
            entries.push(pair?);
        }
        let count = entries.len();
        if count > 0 && table.raw_len() == count && entries.iter().all(|(key, _)| matches!(key, Value::Integer(_))) {
            let values = (1..=count).map(|index| self.add(op, &format!("{place}[{index}]"), &table.raw_get(index)?, depth + 1));
            return Ok(Json::Array(values.collect::<Failed<_>>()?));
        }
        let name = |key: &Value| match key {
            Value::String(name) => name.to_str().ok().map(|name| name.to_string()),
            _ => None,
        };
        if entries.iter().all(|(key, _)| name(key).is_some()) {
            let mut entries: Vec<(String, Value)> =
                entries.into_iter().map(|(key, value)| (name(&key).unwrap_or_default(), value)).collect();
            key_order::sort(table, &mut entries, Unordered::Sorted);
            let mut object = Map::new();
            for (name, value) in entries {
                let json = self.add(op, &format!("{place}.{name}"), &value, depth + 1)?;
                object.insert(if name.starts_with('$') { format!("${name}") } else { name }, json);
            }
            return Ok(Json::Object(object));
        }
        let mut pairs = Vec::with_capacity(count);
        for (key, value) in entries {
            if !matches!(key, Value::Boolean(_) | Value::Integer(_) | Value::Number(_) | Value::String(_)) {
                return Err(Error::argument(op, place, "keys that are strings, numbers or booleans", describe(&key)).into());
            }
            let shown = key.to_string().unwrap_or_default();
            let value = self.add(op, &format!("{place}[{shown}]"), &value, depth + 1)?;
            pairs.push((self.add(op, place, &key, depth + 1)?, value));
        }
        // Lua's own order differs from process to process.
        pairs.sort_by_cached_key(|(key, _)| key.to_string());
        Ok(json!({ "$map": pairs.into_iter().map(|(key, value)| json!([key, value])).collect::<Vec<_>>() }))
    }

    /// The value in `lua`.
    ///
    /// Errors: [`Error::Format`] if it is no value that [`Plain::of`] made.
    pub fn to_lua(&self, lua: &Lua) -> Failed<Value> {
        self.build(lua, &self.json)
    }

    fn build(&self, lua: &Lua, json: &Json) -> Failed<Value> {
        Ok(match json {
            Json::Null => Value::Nil,
            Json::Bool(value) => Value::Boolean(*value),
            Json::Number(number) => match number.as_i64() {
                Some(integer) => Value::Integer(integer),
                None => Value::Number(number.as_f64().ok_or_else(|| damaged("a number", number))?),
            },
            Json::String(text) => Value::String(lua.create_string(text)?),
            Json::Array(values) => {
                let values = values.iter().map(|value| self.build(lua, value)).collect::<Failed<Vec<_>>>()?;
                Value::Table(lua.create_sequence_from(values)?)
            }
            Json::Object(fields) => match fields.iter().next() {
                Some((key, value)) if key.starts_with('$') && !key.starts_with("$$") => self.build_tagged(lua, key, value)?,
                _ => {
                    let table = lua.create_table()?;
                    for (name, value) in fields {
                        table.raw_set(name.strip_prefix('$').unwrap_or(name), self.build(lua, value)?)?;
                    }
                    key_order::remember(lua, &table, fields.keys().map(|name| name.strip_prefix('$').unwrap_or(name)))?;
                    Value::Table(table)
                }
            },
        })
    }

    fn build_tagged(&self, lua: &Lua, key: &str, value: &Json) -> Failed<Value> {
        Ok(match key {
            "$float" => Value::Number(value.as_str().and_then(|text| text.parse().ok()).ok_or_else(|| damaged("a float", value))?),
            "$bytes" => Value::String(lua.create_string(value.as_str().and_then(unhex).ok_or_else(|| damaged("bytes", value))?)?),
            "$tensor" | "$leaf" => {
                let index = value.as_u64().and_then(|index| usize::try_from(index).ok());
                let tensor = index.and_then(|index| self.tensors.get(index)).ok_or_else(|| damaged("the number of a tensor", value))?;
                tensor_value(lua, if key == "$leaf" { tensor.leaf()? } else { tensor.clone() })?
            }
            "$map" => {
                let table = lua.create_table()?;
                for pair in value.as_array().ok_or_else(|| damaged("pairs", value))? {
                    let (Some(key), Some(value)) = (pair.get(0), pair.get(1)) else { return Err(damaged("a pair", pair).into()) };
                    table.raw_set(self.build(lua, key)?, self.build(lua, value)?)?;
                }
                Value::Table(table)
            }
            _ => return Err(damaged("a known mark", key).into()),
        })
    }

    /// The value as one line of text that is equal for equal values: names are sorted, tensors are in it by type, shape and content.
    pub fn canonical(&self) -> String {
        fn replace(json: &Json, tensors: &[String]) -> Json {
            match json {
                Json::Array(values) => Json::Array(values.iter().map(|value| replace(value, tensors)).collect()),
                Json::Object(fields) => {
                    let named = |(name, value): (&String, &Json)| {
                        let number = value.as_u64().filter(|_| name == "$tensor" || name == "$leaf");
                        let tensor = number.and_then(|index| tensors.get(index as usize));
                        (name.clone(), tensor.map_or_else(|| replace(value, tensors), |tensor| Json::from(tensor.as_str())))
                    };
                    let mut fields: Vec<(String, Json)> = fields.iter().map(named).collect();
                    fields.sort_by(|a, b| a.0.cmp(&b.0));
                    Json::Object(fields.into_iter().collect())
                }
                other => other.clone(),
            }
        }
        let tensors: Vec<String> = self.tensors.iter().map(tensor_hash).collect();
        replace(&self.json, &tensors).to_string()
    }

    /// Bytes of all tensors.
    pub fn tensor_bytes(&self) -> usize {
        self.tensors.iter().map(|tensor| tensor.len() * dtype_bytes(tensor.dtype())).sum()
    }
}

fn dtype_bytes(dtype: Dtype) -> usize {
    match dtype {
        Dtype::F32 | Dtype::I32 => 4,
        Dtype::Bf16 => 2,
        Dtype::I8 => 1,
    }
}

/// The elements as little-endian bytes.
pub fn tensor_bytes(tensor: &AnyTensor) -> Vec<u8> {
    match tensor.data() {
        AnyData::F32(data) => data.get().iter().flat_map(|value| value.to_le_bytes()).collect(),
        AnyData::Bf16(data) => data.get().iter().flat_map(|value| value.to_le_bytes()).collect(),
        AnyData::I32(data) => data.get().iter().flat_map(|value| value.to_le_bytes()).collect(),
        AnyData::I8(data) => data.get().iter().flat_map(|value| value.to_le_bytes()).collect(),
    }
}

fn tensor_hash(tensor: &AnyTensor) -> String {
    let hash = blake3::hash(&tensor_bytes(tensor)).to_hex();
    format!("{}{:?}{}", tensor.dtype().name(), tensor.shape(), &hash[..32])
}

fn damaged(expected: &str, found: impl ToString) -> Error {
    Error::Format { path: "a recorded value".into(), place: "value".into(), expected: expected.into(), found: found.to_string() }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digit = |index: usize| text.get(index..index + 2).and_then(|pair| u8::from_str_radix(pair, 16).ok());
    text.len().is_multiple_of(2).then(|| (0..text.len()).step_by(2).map(digit).collect())?
}

#[cfg(test)]
mod tests {
    use super::super::vm::Vm;
    use super::*;
    use crate::host::progress::Screen;
    use std::path::Path;

    #[test]
    fn values_come_back_as_they_were() {
        let vm = Vm::new(Path::new("test.lua"), Screen::new(true)).unwrap();
        let lua = vm.lua();
        for code in [
            "nil",
            "true",
            "7",
            "7.0",
            "-0.0",
            "0.1",
            "1/0",
            "0/0",
            "'é'",
            "'\\255a'",
            "{}",
            "{ 1, 2, { 3 } }",
            "math.mininteger",
            "{ a = 1, b = { c = 'd' } }",
            "{ ['$x'] = 1, ['$$'] = 2 }",
            "{ [1] = 'a', [3] = 'b' }",
            "{ [true] = 1, [2.5] = 'x', y = 0 }",
            "5e-324",
            "2^53 + 0.0",
            "{ { }, { a = { } } }",
        ] {
            let value: Value = lua.load(code).eval().unwrap();
            let plain = Plain::of("test", "value", &value).unwrap();
            let text = plain.json.to_string();
            let read = Plain { json: serde_json::from_str(&text).unwrap(), tensors: vec![] }.to_lua(lua).unwrap();
            let again = Plain::of("test", "value", &read).unwrap();
            assert_eq!(again.json.to_string(), text, "{code}");
            assert_eq!(value.type_name(), read.type_name(), "{code}");
            if let (Value::Number(a), Value::Number(b)) = (&value, &read) {
                assert!(a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan(), "{code}");
            }
        }
    }

    #[test]
    fn tensors_are_told_apart_by_content_and_leaves_stay_leaves() {
        let vm = Vm::new(Path::new("test.lua"), Screen::new(true)).unwrap();
        let plain = |code: &str| {
            let value: Value = vm.lua().load(code).set_name("@test.lua").eval().unwrap();
            Plain::of("test", "value", &value).unwrap()
        };
        let tensor = |values: &str| format!("{{ w = require('engine').tensor.new({values}):requires_grad() }}");
        assert_eq!(plain(&tensor("{ 1, 2 }")).canonical(), plain(&tensor("{ 1, 2 }")).canonical());
        assert_ne!(plain(&tensor("{ 1, 2 }")).canonical(), plain(&tensor("{ 1, 3 }")).canonical());
        assert_ne!(plain(&tensor("{ 1, 2 }")).canonical(), plain(&tensor("{ { 1, 2 } }")).canonical());
        let back = plain(&tensor("{ 1, 2 }")).to_lua(vm.lua()).unwrap();
        let sum: f64 = vm.lua().load("local t = ... ; t.w:sum():backward() return t.w.grad:sum():item()").call(back).unwrap();
        assert_eq!(sum, 2.0);
    }

    #[test]
    fn what_cannot_be_kept_is_named() {
        let vm = Vm::new(Path::new("test.lua"), Screen::new(true)).unwrap();
        let check = |code: &str, part: &str| {
            let value: Value = vm.lua().load(code).eval().unwrap();
            let failure = Plain::of("Run:step", "inputs", &value).err().unwrap();
            let text = format!("{failure:?}");
            assert!(text.contains(part), "{text}");
        };
        check("{ a = { print } }", "inputs.a[1]");
        check("(function() local t = {} t.t = t return t end)()", "inputs.t.t.t.t.t.t.t.t.t.t.t.t.t.t.t.t.t...");
        check("{ [print] = 1 }", "keys that are strings");
    }
}
