//! The arguments of a workflow: declared in its `args` table, typed by their defaults, given on the command line.
//!
//! How an entry `key = value` of the table is read:
//! - a string, integer, number or boolean is the default and gives the type (`200` is an integer, `200.0` a number);
//! - a table without named fields is the default of a list: `{ 0.2, 0.28 }` is a list of numbers;
//! - a table with named fields describes: its one entry without a name is the default, the names are `help`, `choices`,
//!   `min`, `max`, `type`. The default of a list stands in its own table: `{ { 0.2, 0.28 }, help = "..." }`;
//! - `engine.required(type, {...})` has no default and must be given; `engine.optional(type, {...})` is nil unless given.

use super::call::{Call, Class, Failed, Field, Function, describe};
use super::key_order;
use super::nearest::suggestion;
use super::options::Options;
use super::raise::Failure;
use crate::error::{Error, Result};
use mlua::{Lua, Table, Value};
use serde_json::Value as Json;

/// The type of one value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    String,
    Integer,
    Number,
    Boolean,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::String => "string",
            Self::Integer => "integer",
            Self::Number => "number",
            Self::Boolean => "boolean",
        }
    }

    /// From `string`, or `strings` for a list.
    fn parse(name: &str) -> Option<(Self, bool)> {
        let kinds = [Self::String, Self::Integer, Self::Number, Self::Boolean];
        let (single, list) = name.strip_suffix('s').map_or((name, false), |single| (single, true));
        kinds.into_iter().find(|kind| kind.name() == single).map(|kind| (kind, list))
    }
}

/// One declared argument.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    pub name: String,
    pub kind: Kind,
    pub list: bool,
    pub default: Option<Json>,
    pub required: bool,
    pub help: String,
    choices: Vec<Json>,
    min: Option<f64>,
    max: Option<f64>,
}

/// What `engine.required` and `engine.optional` give.
#[derive(Clone)]
pub struct Declaration(Spec);

impl Class for Declaration {
    const NAME: &'static str = "Argument";
    const METHODS: &'static [&'static [Function]] = &[];
    const FIELDS: &'static [Field<Self>] = &[];
}

super::call::user_data!(Declaration);

/// `engine.required` and `engine.optional`.
pub const FUNCTIONS: &[Function] = &[
    Function { op: "engine.required", params: &["type", "options?"], call: |call| call.give(declaration(call, true)?) },
    Function { op: "engine.optional", params: &["type", "options?"], call: |call| call.give(declaration(call, false)?) },
];

fn declaration(call: &Call, required: bool) -> Failed<Declaration> {
    let name = call.string(0)?;
    let Some((kind, list)) = Kind::parse(&name) else {
        return Err(call.wrong(0, "\"string\", \"integer\", \"number\" or \"boolean\", with an s for a list"));
    };
    let options = call.options(1, &["help", "choices", "min", "max"])?;
    let mut spec =
        Spec { name: String::new(), kind, list, default: None, required, help: String::new(), choices: vec![], min: None, max: None };
    spec.read_limits(&options)?;
    Ok(Declaration(spec))
}

impl Spec {
    /// As the file's head says. `key` names the argument in errors.
    fn read(key: &str, value: &Value) -> Failed<Self> {
        let op = "engine.workflow";
        let blank = |kind, list, default| Spec {
            name: key.to_string(),
            kind,
            list,
            default: Some(default),
            required: false,
            help: String::new(),
            choices: vec![],
            min: None,
            max: None,
        };
        if let Value::UserData(object) = value
            && let Ok(declaration) = object.borrow::<Declaration>()
        {
            return Ok(Spec { name: key.to_string(), ..declaration.0.clone() });
        }
        let Value::Table(table) = value else {
            let (kind, default) = scalar(value).ok_or_else(|| {
                Error::argument(op, format!("args.{key}"), "a default (string, number, boolean or a list of these)", describe(value))
            })?;
            return Ok(blank(kind, false, default));
        };
        let named = table.pairs::<Value, Value>().any(|pair| matches!(pair, Ok((Value::String(_), _))));
        if !named {
            let (kind, default) = list(op, key, table)?;
            return Ok(blank(kind, true, default));
        }
        let count = table.raw_len();
        let (fields, first) = (table.clone(), table.raw_get::<Value>(1)?);
        // Options::read takes only names: look at a copy without the default.
        let names = fields_only(&fields)?;
        let mut spec = match (&first, count) {
            (_, 0) => {
                let expected = "a default as its first entry, or engine.required(type)";
                return Err(Error::argument(op, format!("args.{key}"), expected, "a table with names only").into());
            }
            (Value::Table(values), 1) if values.raw_len() == 0 => {
                let kind = match names.get::<Value>("type")? {
                    Value::String(name) => Kind::parse(&name.to_string_lossy()).filter(|(_, list)| *list),
                    _ => None,
                };
                let Some((kind, _)) = kind else {
                    let expected = "`type` beside an empty list, such as type = \"strings\"";
                    return Err(Error::argument(op, format!("args.{key}"), expected, "none").into());
                };
                blank(kind, true, Json::Array(vec![]))
            }
            (Value::Table(values), 1) => {
                let (kind, default) = list(op, key, values)?;
                blank(kind, true, default)
            }
            (value, 1) => {
                let (kind, default) = scalar(value).ok_or_else(|| {
                    Error::argument(op, format!("args.{key}"), "a default (string, number, boolean or a list of these)", describe(value))
                })?;
                blank(kind, false, default)
            }
            _ => {
                let (kind, default) = list(op, key, table)?;
                blank(kind, true, default)
            }
        };
        spec.read_limits(&Options::read(op, Some(names), &["help", "choices", "min", "max", "type"])?)?;
        if let Some(default) = &spec.default {
            spec.check(default).map_err(|what| Failure::message(format!("engine.workflow: the default of args.{key}: {what}")))?;
        }
        Ok(spec)
    }

    fn read_limits(&mut self, options: &Options) -> Failed<()> {
        self.help = options.string("help")?.unwrap_or_default();
        self.min = options.number("min")?;
        self.max = options.number("max")?;
        if let Some(table) = options.table("choices")? {
            for value in table.sequence_values::<Value>() {
                let value = value?;
                let choice = scalar(&value).and_then(|(_, choice)| self.convert(choice));
                self.choices.push(choice.ok_or_else(|| {
                    Error::argument("engine.workflow", "choices", format!("a list of {}s", self.kind.name()), describe(&value))
                })?);
            }
        }
        Ok(())
    }

    /// `value` if it is of this type; an integer is a number too.
    fn convert(&self, value: Json) -> Option<Json> {
        match (self.kind, &value) {
            (Kind::String, Json::String(_)) | (Kind::Boolean, Json::Bool(_)) => Some(value),
            (Kind::Integer, Json::Number(number)) if number.is_i64() => Some(value),
            (Kind::Number, Json::Number(number)) => number.as_f64().map(Json::from),
            _ => None,
        }
    }

    /// Whether a value of the right type is one of the choices and in the range. The error says what it must be.
    fn check(&self, value: &Json) -> std::result::Result<(), String> {
        if let Json::Array(values) = value {
            return values.iter().try_for_each(|value| self.check(value));
        }
        if !self.choices.is_empty() && !self.choices.contains(value) {
            let list: Vec<String> = self.choices.iter().map(Json::to_string).collect();
            return Err(format!("should be one of {}, got {value}", list.join(", ")));
        }
        if let Some(number) = value.as_f64() {
            match (self.min, self.max) {
                (Some(min), _) if number < min => return Err(format!("should be at least {min}, got {value}")),
                (_, Some(max)) if number > max => return Err(format!("should be at most {max}, got {value}")),
                _ => {}
            }
        }
        Ok(())
    }

    /// The value that `text` of the command line stands for.
    fn parse(&self, text: &str) -> std::result::Result<Json, String> {
        let value = if self.list {
            let parts: Vec<&str> = if text.is_empty() { vec![] } else { text.split(',').map(str::trim).collect() };
            Json::Array(parts.into_iter().map(|part| self.parse_one(part)).collect::<std::result::Result<_, _>>()?)
        } else {
            self.parse_one(text)?
        };
        self.check(&value)?;
        Ok(value)
    }

    fn parse_one(&self, text: &str) -> std::result::Result<Json, String> {
        let parsed = match self.kind {
            Kind::String => Some(Json::from(text)),
            Kind::Boolean => match text {
                "true" | "yes" | "1" => Some(Json::from(true)),
                "false" | "no" | "0" => Some(Json::from(false)),
                _ => None,
            },
            Kind::Number => text.parse::<f64>().ok().filter(|value| value.is_finite()).map(Json::from),
            // `1e4` is how people write ten thousand.
            Kind::Integer => text
                .parse::<i64>()
                .ok()
                .or_else(|| {
                    let value = text.parse::<f64>().ok()?;
                    (value.fract() == 0.0 && value.abs() < 2f64.powi(53)).then_some(value as i64)
                })
                .map(Json::from),
        };
        parsed.ok_or_else(|| {
            let hint = match (self.kind, text.parse::<f64>()) {
                (Kind::Integer, Ok(_)) => "; if it may be a fraction, write its default with a point, such as 1.0",
                _ => "",
            };
            format!("should be {}, got `{text}`{hint}", self.expected())
        })
    }

    fn expected(&self) -> String {
        let article = if self.kind == Kind::Integer { "an" } else { "a" };
        match (self.list, self.kind) {
            (true, kind) => format!("{}s with commas between", kind.name()),
            (false, Kind::Boolean) => "true or false".into(),
            (false, kind) => format!("{article} {}", kind.name()),
        }
    }

    /// The name as the command line spells it.
    fn flag(&self) -> String {
        self.name.replace('_', "-")
    }
}

/// Names that the engine keeps for itself on every run's command line.
pub const RESERVED: [&str; 7] = ["explain", "help", "seed", "quiet", "runs", "tensorboard", "watch"];

/// All entries of a workflow's `args`, by name.
pub fn read_specs(table: Option<Table>) -> Failed<Vec<Spec>> {
    let mut specs = Vec::new();
    for pair in table.iter().flat_map(|table| table.pairs::<Value, Value>()) {
        let (key, value) = pair?;
        let Value::String(key) = &key else {
            return Err(Error::argument("engine.workflow", "args", "entries with names", describe(&key)).into());
        };
        let key = key.to_string_lossy();
        if key.is_empty() || !key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            return Err(Error::argument("engine.workflow", "args", "names of letters, digits and _", format!("`{key}`")).into());
        }
        if RESERVED.contains(&key.as_str()) || key.starts_with("no_") {
            let what = format!("`{key}`, which the command line uses itself");
            return Err(Error::argument("engine.workflow", "args", "another name", what).into());
        }
        specs.push(Spec::read(&key, &value)?);
    }
    // Lua keeps no order; the command line's help wants one.
    specs.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(specs)
}

fn scalar(value: &Value) -> Option<(Kind, Json)> {
    match value {
        Value::String(text) => Some((Kind::String, Json::from(text.to_string_lossy()))),
        Value::Integer(value) => Some((Kind::Integer, Json::from(*value))),
        Value::Number(value) if value.is_finite() => Some((Kind::Number, Json::from(*value))),
        Value::Boolean(value) => Some((Kind::Boolean, Json::from(*value))),
        _ => None,
    }
}

fn list(op: &'static str, key: &str, table: &Table) -> Failed<(Kind, Json)> {
    let values = table.sequence_values::<Value>().collect::<mlua::Result<Vec<_>>>()?;
    let wrong = |got: String| Error::argument(op, format!("args.{key}"), "a list of values of one type", got);
    let entries: Option<Vec<(Kind, Json)>> = values.iter().map(scalar).collect();
    let entries = entries.ok_or_else(|| wrong("a list with other things in it".into()))?;
    let Some((first, _)) = entries.first() else {
        return Err(wrong("an empty list; its type is given by { {}, type = \"strings\" }".into()).into());
    };
    // 0 and 0.5 in one list are numbers.
    let numeric = |kind: &Kind| matches!(kind, Kind::Integer | Kind::Number);
    let kind = if entries.iter().all(|(kind, _)| kind == first) {
        *first
    } else if entries.iter().all(|(kind, _)| numeric(kind)) {
        Kind::Number
    } else {
        return Err(wrong("a list of several types".into()).into());
    };
    let as_kind = |value: Json| if kind == Kind::Number { Json::from(value.as_f64()) } else { value };
    Ok((kind, Json::Array(entries.into_iter().map(|(_, value)| as_kind(value)).collect())))
}

fn fields_only(table: &Table) -> Failed<Table> {
    let copy = table.clone();
    let names: Vec<(mlua::LuaString, Value)> = copy
        .pairs::<Value, Value>()
        .filter_map(|pair| pair.ok())
        .filter_map(|(key, value)| match key {
            Value::String(key) => Some((key, value)),
            _ => None,
        })
        .collect();
    let lua = table.weak_lua().upgrade();
    Ok(lua.create_table_from(names)?)
}

/// Values for all of `specs` from the words of a command line, defaults filled in, in the order of `specs`.
///
/// Errors: [`Error::Script`] for a word that is no argument, a wrong type, a value out of range, one that is missing.
pub fn parse(specs: &[Spec], words: &[String]) -> Result<Vec<(String, Json)>> {
    let fail = |text: String| Err(Error::Script(format!("{text} (--help lists the arguments)")));
    let mut given: Vec<(usize, Json)> = Vec::new();
    let mut words = words.iter();
    while let Some(word) = words.next() {
        let Some(body) = word.strip_prefix("--").filter(|body| !body.is_empty()) else {
            return fail(format!("`{word}` is not an argument; they are given as --name value"));
        };
        let (flag, text) = body.split_once('=').map_or((body, None), |(flag, text)| (flag, Some(text)));
        let name = flag.replace('-', "_");
        let find = |name: &str| specs.iter().position(|spec| spec.name == name);
        let is_switch = |index: &usize| specs[*index].kind == Kind::Boolean && !specs[*index].list;
        let negated = name.strip_prefix("no_").and_then(find).filter(is_switch);
        let (index, value) = match (find(&name), negated) {
            (None, Some(index)) if text.is_none() => (index, Ok(Json::from(false))),
            (Some(index), _) if text.is_none() && is_switch(&index) => (index, Ok(Json::from(true))),
            (Some(index), _) => {
                let text = match text {
                    Some(text) => text,
                    None => match words.next() {
                        Some(text) => text.as_str(),
                        None => return fail(format!("--{flag} needs a value")),
                    },
                };
                (index, specs[index].parse(text))
            }
            _ => {
                let flags: Vec<String> = specs.iter().map(Spec::flag).collect();
                let hint = suggestion(flag, flags.iter().map(String::as_str)).replace('`', "").replace("mean ", "mean --");
                return fail(format!("no argument --{flag}{hint}"));
            }
        };
        if given.iter().any(|(other, _)| *other == index) {
            return fail(format!("--{flag} is given twice"));
        }
        match value {
            Ok(value) => given.push((index, value)),
            Err(what) => return fail(format!("--{flag} {what}")),
        }
    }
    let mut values = Vec::new();
    for (index, spec) in specs.iter().enumerate() {
        let value = given.iter().find(|(other, _)| *other == index).map(|(_, value)| value.clone());
        match value.or_else(|| spec.default.clone()) {
            Some(value) => values.push((spec.name.clone(), value)),
            None if spec.required => return fail(format!("--{} must be given: {}", spec.flag(), spec.expected())),
            None => {}
        }
    }
    Ok(values)
}

/// The `args` table of a run. Reading or writing a name that was not declared is an error.
pub fn to_lua(lua: &Lua, specs: &[Spec], values: &[(String, Json)]) -> mlua::Result<Table> {
    let given = lua.create_table()?;
    for (name, value) in values {
        given.raw_set(name.as_str(), json_to_lua(lua, value)?)?;
    }
    let names: Vec<String> = specs.iter().map(|spec| spec.name.clone()).collect();
    let metatable = lua.create_table()?;
    let next = lua.globals().get::<mlua::Function>("next")?;
    let all = given.clone();
    metatable.set("__pairs", lua.create_function(move |_, _: Table| Ok((next.clone(), all.clone(), Value::Nil)))?)?;
    metatable.set(
        "__index",
        lua.create_function(move |lua, (_, key): (Table, Value)| {
            let name = key.to_string()?;
            if names.contains(&name) {
                return given.raw_get::<Value>(name); // Nil for an optional one that was not given.
            }
            let hint = suggestion(&name, names.iter().map(String::as_str));
            let what = format!("args.{name} is not declared in the workflow's args{hint}");
            Err(super::raise::raise(lua, Failure::message(what)))
        })?,
    )?;
    metatable.set(
        "__newindex",
        lua.create_function(|lua, (_, key, _): (Table, Value, Value)| -> mlua::Result<()> {
            let what = format!("args.{} cannot be set: arguments are what the run was started with", key.to_string()?);
            Err(super::raise::raise(lua, Failure::message(what)))
        })?,
    )?;
    // An empty table in front, so that assignments to known names are seen too.
    let args = lua.create_table()?;
    args.set_metatable(Some(metatable))?;
    Ok(args)
}

/// A JSON value in Lua: objects and arrays become tables, null nil. The names of an object keep their order where it becomes JSON
/// again.
pub(super) fn json_to_lua(lua: &Lua, value: &Json) -> mlua::Result<Value> {
    Ok(match value {
        Json::Null => Value::Nil,
        Json::Bool(value) => Value::Boolean(*value),
        Json::Number(number) => match number.as_i64() {
            Some(integer) => Value::Integer(integer),
            None => Value::Number(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::String(lua.create_string(text)?),
        Json::Array(values) => {
            let values = values.iter().map(|value| json_to_lua(lua, value)).collect::<mlua::Result<Vec<_>>>()?;
            Value::Table(lua.create_sequence_from(values)?)
        }
        Json::Object(fields) => {
            let table = lua.create_table()?;
            for (name, value) in fields {
                table.raw_set(name.as_str(), json_to_lua(lua, value)?)?;
            }
            key_order::remember(lua, &table, fields.keys().map(String::as_str))?;
            Value::Table(table)
        }
    })
}

/// The arguments as `--help` prints them.
pub fn help(specs: &[Spec]) -> String {
    let left = |spec: &Spec| {
        let kind = spec.kind.name().to_uppercase();
        match (spec.kind, spec.list) {
            (Kind::Boolean, false) => format!("--{0}, --no-{0}", spec.flag()),
            (_, false) => format!("--{} {kind}", spec.flag()),
            (_, true) => format!("--{} {kind},...", spec.flag()),
        }
    };
    let width = specs.iter().map(|spec| left(spec).len()).max().unwrap_or(0);
    let mut text = String::new();
    for spec in specs {
        let mut facts = Vec::new();
        match &spec.default {
            Some(Json::Array(values)) => {
                let values: Vec<String> = values.iter().map(Json::to_string).collect();
                facts.push(format!("default {}", values.join(",")));
            }
            Some(value) => facts.push(format!("default {value}")),
            None if spec.required => facts.push("must be given".into()),
            None => facts.push("optional".into()),
        }
        if !spec.choices.is_empty() {
            let choices: Vec<String> = spec.choices.iter().map(Json::to_string).collect();
            facts.push(format!("one of {}", choices.join(" ")));
        }
        facts.extend(spec.min.map(|min| format!("at least {min}")));
        facts.extend(spec.max.map(|max| format!("at most {max}")));
        let gap = if spec.help.is_empty() { "" } else { " " };
        text.push_str(&format!("  {:width$}  {}{gap}({})\n", left(spec), spec.help, facts.join("; ")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn specs() -> Vec<Spec> {
        let lua = Lua::new();
        let table: Table = lua
            .load(
                r#"return { model = { "a/b", help = "a folder" }, steps = { 200, min = 1, max = 1000 }, lr = 1e-6, warm_up = true,
                    clip = { 0.2, 0.28 }, betas = { { 0, 0.5 }, help = "two" }, names = { {}, type = "strings" },
                    kind = { "x", choices = { "x", "y" } } }"#,
            )
            .eval()
            .unwrap();
        read_specs(Some(table)).unwrap()
    }

    fn value(words: &[&str], name: &str) -> String {
        let words: Vec<String> = words.iter().map(|word| word.to_string()).collect();
        match parse(&specs(), &words) {
            Ok(values) => values.iter().find(|(n, _)| n == name).map_or("none".into(), |(_, value)| value.to_string()),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn defaults_give_types_and_words_are_converted() {
        assert_eq!(value(&[], "clip"), "[0.2,0.28]");
        assert_eq!(value(&[], "betas"), "[0.0,0.5]");
        assert_eq!(value(&["--steps", "1e2"], "steps"), "100");
        assert_eq!(value(&["--lr=3"], "lr"), "3.0");
        assert_eq!(value(&["--no-warm-up"], "warm_up"), "false");
        assert_eq!(value(&["--warm_up=no"], "warm_up"), "false");
        assert_eq!(value(&["--clip", "0.1, 1"], "clip"), "[0.1,1.0]");
        assert_eq!(value(&["--names", "a,b"], "names"), r#"["a","b"]"#);
        assert_eq!(value(&["--model", "--x"], "model"), r#""--x""#);
    }

    #[test]
    fn wrong_words_are_answered_with_what_is_right() {
        for (words, part) in [
            (&["--stepz", "3"][..], "no argument --stepz; did you mean --steps?"),
            (&["--steps", "x"], "--steps should be an integer, got `x`"),
            (&["--steps", "1.5"], "write its default with a point"),
            (&["--steps", "0"], "should be at least 1, got 0"),
            (&["--steps=2000"], "should be at most 1000"),
            (&["--steps"], "needs a value"),
            (&["--steps=1", "--steps=2"], "given twice"),
            (&["--kind", "z"], "should be one of \"x\", \"y\", got \"z\""),
            (&["--warm-up=maybe"], "should be true or false"),
            (&["--clip", "a,b"], "numbers with commas between"),
            (&["steps"], "--name value"),
            (&["--lr", "nan"], "should be a number"),
        ] {
            let got = value(words, "steps");
            assert!(got.contains(part), "{words:?}: {got}");
        }
    }
}
