//! How a call from Lua reaches a Rust function: arguments by name and position, checked, with errors that say which
//! argument was wrong, what was expected and what came. All functions of the engine are entries of tables of this type,
//! so that the tests can compare them with the stubs an editor reads.

use super::options::Options;
use super::raise::{Failure, raise};
use super::replay::must_end;
use super::tensor::TensorObject;
use crate::error::Error;
use crate::tensor::AnyTensor;
use mlua::{AnyUserData, IntoLuaMulti, Lua, MultiValue, Table, UserDataFields, UserDataMethods, UserDataRef, Value};
use std::path::PathBuf;

/// A result whose error still has to get the script's line.
pub type Failed<T> = Result<T, Failure>;

/// What a function of the engine returns to Lua.
pub type Answer = Failed<MultiValue>;

/// A function of the engine, as a namespace or a class lists it.
pub struct Function {
    /// Its full name, `tensor.zeros` or, for a method, `Tensor:sum`; messages begin with it.
    pub op: &'static str,
    /// Names of its arguments, without self. An optional one ends in `?`.
    pub params: &'static [&'static str],
    pub call: fn(&Call) -> Answer,
}

impl Function {
    /// The part of the name after the last `.` or `:`.
    pub fn name(&self) -> &'static str {
        self.op.rsplit(['.', ':']).next().unwrap_or(self.op)
    }
}

/// A value that a class lets scripts read with a dot.
pub struct Field<T> {
    pub name: &'static str,
    pub get: fn(&Lua, &T) -> Failed<Value>,
}

/// A Rust type that scripts hold.
pub trait Class: Send + Sync + Sized + 'static {
    /// Its name in messages and, after `engine.`, in the stubs.
    const NAME: &'static str;
    /// In lists, so that a long class can keep its operations in a file of their own.
    const METHODS: &'static [&'static [Function]];
    const FIELDS: &'static [Field<Self>];

    /// What `tostring` and `print` say of it.
    fn text(&self) -> String {
        Self::NAME.to_string()
    }
}

/// One call: its arguments, and for a method the object.
pub struct Call<'a> {
    pub lua: &'a Lua,
    pub op: &'static str,
    params: &'static [&'static str],
    subject: Option<AnyUserData>,
    values: Vec<Value>,
}

/// Calls `function` with `values` as Lua passed them; errors get the script's line.
fn dispatch(lua: &Lua, function: &Function, is_self: Option<fn(&AnyUserData) -> bool>, values: MultiValue) -> mlua::Result<MultiValue> {
    let run = || -> Answer {
        if let Some(error) = must_end(lua) {
            return Err(error.into());
        }
        let mut values: Vec<Value> = values.into_iter().collect();
        let mut subject = None;
        if let Some(is_self) = is_self {
            match values.first() {
                Some(Value::UserData(object)) if is_self(object) => subject = Some(object.clone()),
                other => {
                    let got = other.map_or("nothing".into(), describe);
                    let (class, name) = function.op.split_once(':').unwrap_or(("object", function.op));
                    let how = format!("a {class} in front; call it with a colon, object:{name}(...)");
                    return Err(Error::argument(function.op, "self", how, got).into());
                }
            }
            values.remove(0);
        }
        if values.len() > function.params.len() {
            let takes = match function.params.len() {
                0 => "no arguments".to_string(),
                1 => format!("1 argument ({})", function.params[0]),
                n => format!("{n} arguments ({})", function.params.join(", ")),
            };
            return Err(Error::argument(function.op, "arguments", takes, values.len()).into());
        }
        for (index, param) in function.params.iter().enumerate() {
            if !param.ends_with('?') && matches!(values.get(index), None | Some(Value::Nil)) {
                let expected = match *param {
                    "tokenizer" => "a Tokenizer (that of a model is nil where its folder has none; engine.tokenizer makes them)",
                    _ => "given",
                };
                return Err(Error::argument(function.op, *param, expected, "nil").into());
            }
        }
        let call = Call { lua, op: function.op, params: function.params, subject, values };
        (function.call)(&call)
    };
    run().map_err(|failure| raise(lua, failure))
}

/// Puts `functions` into a table of the engine.
pub fn add_functions(lua: &Lua, table: &Table, functions: &'static [&'static [Function]]) -> mlua::Result<()> {
    for function in functions.iter().copied().flatten() {
        table.raw_set(function.name(), lua.create_function(|lua, values: MultiValue| dispatch(lua, function, None, values))?)?;
    }
    Ok(())
}

/// What Lua's own errors call objects of class T.
pub fn name<T: Class + mlua::UserData, F: UserDataFields<T>>(fields: &mut F) {
    fields.add_meta_field(mlua::MetaMethod::Type, T::NAME);
}

/// Makes a [`Class`] one that Lua knows.
macro_rules! user_data {
    ($class:ty) => {
        impl mlua::UserData for $class {
            fn add_fields<F: mlua::UserDataFields<Self>>(fields: &mut F) {
                $crate::host::call::name(fields);
            }

            fn add_methods<M: mlua::UserDataMethods<Self>>(methods: &mut M) {
                $crate::host::call::register(methods);
            }
        }
    };
}
pub(super) use user_data;

/// Gives class T its methods, its fields, and errors for names that it does not have.
pub fn register<T: Class + mlua::UserData, M: UserDataMethods<T>>(methods: &mut M) {
    for function in T::METHODS.iter().copied().flatten() {
        methods.add_function(function.name(), |lua, values: MultiValue| dispatch(lua, function, Some(|object| object.is::<T>()), values));
    }
    methods.add_meta_function(mlua::MetaMethod::Index, |lua, (object, key): (AnyUserData, Value)| {
        let find = || -> Failed<Value> {
            let name = match &key {
                Value::String(name) => name.to_string_lossy(),
                other => return Err(Failure::message(format!("a {} is not indexed by {}", T::NAME, describe(other)))),
            };
            if let Some(field) = T::FIELDS.iter().find(|field| field.name == name) {
                let object = object.borrow::<T>()?;
                return (field.get)(lua, &object);
            }
            let known = T::METHODS.iter().copied().flatten().map(Function::name).chain(T::FIELDS.iter().map(|field| field.name));
            let hint = super::nearest::suggestion(&name, known);
            Err(Failure::message(format!("{} has no method or field `{name}`{hint}", T::NAME)))
        };
        find().map_err(|failure| raise(lua, failure))
    });
    methods.add_meta_method(mlua::MetaMethod::ToString, |_, object, ()| Ok(object.text()));
    methods.add_meta_function(mlua::MetaMethod::Concat, |lua, _: (Value, Value)| -> mlua::Result<()> {
        Err(raise(
            lua,
            Failure::message(format!("a {} is not joined to text by `..`; write tostring(x), or format what you want of it", T::NAME)),
        ))
    });
    methods.add_meta_function(mlua::MetaMethod::NewIndex, |lua, (_, key, _): (AnyUserData, Value, Value)| -> mlua::Result<()> {
        let text = format!("the fields of a {} cannot be assigned (tried to set {})", T::NAME, describe(&key));
        Err(raise(lua, Failure::message(text)))
    });
}

impl Call<'_> {
    /// `value` as this call's answer.
    pub fn give(&self, value: impl IntoLuaMulti) -> Answer {
        Ok(value.into_lua_multi(self.lua)?)
    }

    /// No answer.
    pub fn done(&self) -> Answer {
        Ok(MultiValue::new())
    }

    /// The object a method is called on.
    pub fn subject<T: 'static>(&self) -> Failed<UserDataRef<T>> {
        let object = self.subject.as_ref().expect("dispatch checks the object of a method");
        Ok(object.borrow::<T>()?)
    }

    /// The object a method is called on, to hand back.
    pub fn subject_value(&self) -> Value {
        self.subject.clone().map_or(Value::Nil, Value::UserData)
    }

    /// The tensor a method is called on, its elements computed.
    pub fn this(&self) -> Failed<AnyTensor> {
        Ok(self.this_deferred()?.computed()?)
    }

    /// The tensor a method is called on, whose elements may be deferred.
    pub fn this_deferred(&self) -> Failed<AnyTensor> {
        Ok(self.subject::<TensorObject>()?.0.clone())
    }

    /// Argument `index`; nil if not given.
    pub fn value(&self, index: usize) -> Value {
        self.values.get(index).cloned().unwrap_or(Value::Nil)
    }

    pub fn is_given(&self, index: usize) -> bool {
        !matches!(self.values.get(index), None | Some(Value::Nil))
    }

    /// The name of argument `index`, as messages give it.
    pub fn param(&self, index: usize) -> &'static str {
        self.params[index].trim_end_matches('?')
    }

    /// An [`Error::Argument`] about argument `index`.
    pub fn wrong(&self, index: usize, expected: impl Into<String>) -> Failure {
        Error::argument(self.op, self.param(index), expected, describe(&self.value(index))).into()
    }

    /// Argument `index` as a tensor, its elements computed.
    pub fn tensor(&self, index: usize) -> Failed<AnyTensor> {
        let tensor = as_tensor(&self.value(index)).ok_or_else(|| self.wrong(index, "a tensor"))?;
        Ok(tensor.computed()?)
    }

    /// Argument `index` as an object of class T.
    pub fn object<T: Class>(&self, index: usize) -> Failed<UserDataRef<T>> {
        let object = match self.value(index) {
            Value::UserData(object) => object.borrow::<T>().ok(),
            _ => None,
        };
        object.ok_or_else(|| self.wrong(index, format!("a {}", T::NAME)))
    }

    pub fn string(&self, index: usize) -> Failed<String> {
        match self.value(index) {
            Value::String(text) => match text.to_str() {
                Ok(text) => Ok(text.to_string()),
                Err(_) => Err(Error::argument(self.op, self.param(index), NOT_UTF8.0, NOT_UTF8.1).into()),
            },
            _ => Err(self.wrong(index, "a string")),
        }
    }

    /// The path of a file or folder.
    pub fn path(&self, index: usize) -> Failed<PathBuf> {
        match self.string(index)? {
            empty if empty.is_empty() => Err(self.wrong(index, "a path")),
            path => Ok(path.into()),
        }
    }

    pub fn number(&self, index: usize) -> Failed<f64> {
        match self.value(index) {
            Value::Integer(value) => Ok(value as f64),
            Value::Number(value) => Ok(value),
            _ => Err(self.wrong(index, "a number")),
        }
    }

    pub fn integer(&self, index: usize) -> Failed<i64> {
        as_integer(&self.value(index)).ok_or_else(|| self.wrong(index, "an integer"))
    }

    /// An integer of at least 0.
    pub fn count(&self, index: usize) -> Failed<usize> {
        let value = as_integer(&self.value(index)).and_then(|value| usize::try_from(value).ok());
        value.ok_or_else(|| self.wrong(index, "an integer of at least 0"))
    }

    pub fn boolean(&self, index: usize) -> Failed<bool> {
        match self.value(index) {
            Value::Boolean(value) => Ok(value),
            _ => Err(self.wrong(index, "true or false")),
        }
    }

    pub fn function(&self, index: usize) -> Failed<mlua::Function> {
        match self.value(index) {
            Value::Function(function) => Ok(function),
            _ => Err(self.wrong(index, "a function")),
        }
    }

    pub fn table(&self, index: usize) -> Failed<Table> {
        match self.value(index) {
            Value::Table(table) => Ok(table),
            _ => Err(self.wrong(index, "a table")),
        }
    }

    /// A list of integers, such as `{ 2, 3 }`.
    pub fn integers(&self, index: usize) -> Failed<Vec<i64>> {
        let expected = "a list of integers, such as { 2, 3 }";
        let Value::Table(table) = self.value(index) else { return Err(self.wrong(index, expected)) };
        let values = self.list(index, expected, &table)?;
        values.iter().map(|value| as_integer(value).ok_or_else(|| self.wrong_entry(index, expected, value))).collect()
    }

    /// A list of sizes, such as `{ 2, 3 }`; `{}` is the shape of a single number.
    pub fn shape(&self, index: usize) -> Failed<Vec<usize>> {
        let sizes = self.integers(index)?;
        let check = |size: &i64| usize::try_from(*size).map_err(|_| self.wrong_entry(index, "sizes of at least 0", &Value::Integer(*size)));
        sizes.iter().map(check).collect()
    }

    /// A list of tensors, their elements computed.
    pub fn tensors(&self, index: usize) -> Failed<Vec<AnyTensor>> {
        let Value::Table(table) = self.value(index) else { return Err(self.wrong(index, "a list of tensors")) };
        let values = self.list(index, "a list of tensors", &table)?;
        let entry = |value| as_tensor(value).ok_or_else(|| self.wrong_entry(index, "a list of tensors", value));
        values.iter().map(|value| Ok(entry(value)?.computed()?)).collect()
    }

    /// The entries of `table`, which is argument `index` or a part of it and must be a list: no names, no gaps.
    pub fn list(&self, index: usize, expected: &str, table: &Table) -> Failed<Vec<Value>> {
        list_of(table)?.map_err(|got| Error::argument(self.op, self.param(index), expected, got).into())
    }

    fn wrong_entry(&self, index: usize, expected: &str, entry: &Value) -> Failure {
        Error::argument(self.op, self.param(index), expected, format!("an entry that is {}", describe(entry))).into()
    }

    /// The trailing table of options; only `known` keys may be in it.
    pub fn options(&self, index: usize, known: &[&str]) -> Failed<Options> {
        match self.value(index) {
            Value::Nil => Options::read(self.op, None, known),
            Value::Table(table) => Options::read(self.op, Some(table), known),
            _ => Err(self.wrong(index, format!("a table of options ({})", known.join(", ")))),
        }
    }
}

/// What a string must be, and what came, where it is text for the engine.
pub const NOT_UTF8: (&str, &str) = ("UTF-8 text", "bytes that are not");

/// The entries of a list; what is wrong with it if it has names or gaps, which would else be passed over in silence.
pub fn list_of(table: &Table) -> mlua::Result<Result<Vec<Value>, String>> {
    let values = (1..=table.raw_len()).map(|i| table.raw_get::<Value>(i)).collect::<mlua::Result<Vec<_>>>()?;
    if let Some(gap) = values.iter().position(Value::is_nil) {
        return Ok(Err(format!("a list with nil at {}", gap + 1)));
    }
    let mut entries = 0;
    for pair in table.pairs::<Value, Value>() {
        let (key, _) = pair?;
        entries += 1;
        if entries > values.len() {
            return Ok(Err(format!("a table with the key {} beside its list", describe(&key))));
        }
    }
    Ok(Ok(values))
}

/// A tensor, if `value` is one.
pub fn as_tensor(value: &Value) -> Option<AnyTensor> {
    let Value::UserData(object) = value else { return None };
    Some(object.borrow::<TensorObject>().ok()?.0.clone())
}

/// An integer, or a float that is one.
pub fn as_integer(value: &Value) -> Option<i64> {
    match value {
        Value::Integer(value) => Some(*value),
        Value::Number(value) if value.fract() == 0.0 && value.abs() < 2f64.powi(53) => Some(*value as i64),
        _ => None,
    }
}

/// A Lua value in a message: its kind and, if short, itself.
pub fn describe(value: &Value) -> String {
    match value {
        Value::Nil => "nil".into(),
        Value::Boolean(value) => format!("{value}"),
        Value::Integer(value) => format!("{value}"),
        Value::Number(value) => format!("{value:?}"),
        Value::String(text) => {
            let text = text.to_string_lossy();
            let cut: String = text.chars().take(40).collect();
            if cut.len() < text.len() { format!("string \"{cut}...\"") } else { format!("string \"{cut}\"") }
        }
        Value::Table(table) => match table.raw_len() {
            0 => "a table without a list in it".into(),
            n => format!("a table of {n}"),
        },
        Value::Function(_) => "a function".into(),
        Value::UserData(object) => match object.borrow::<TensorObject>() {
            Ok(tensor) => format!("a Tensor {} {:?}", tensor.0.dtype(), tensor.0.shape()),
            Err(_) => object.type_name().map_or("an object".into(), |name| format!("a {}", name.to_string_lossy())),
        },
        other => format!("a {}", other.type_name()),
    }
}
