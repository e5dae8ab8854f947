//! `engine.data`, where scripts hand in records of their own: conversations as one batch, records as a data set, records to
//! a file. Which fields a conversation has is `data/conversation.rs`.

use super::call::{Call, Failed, Function, describe};
use super::code::write_durably;
use super::data::{BatchObject, reading_options};
use super::key_order::{self, Unordered};
use super::tokenizer::TokenizerObject;
use crate::data::conversation::{self, Form, Learn, Long, Rules};
use crate::data::dataset::Dataset;
use crate::data::jsonl::Record;
use crate::data::pack::TokenBatch;
use crate::data::tokenizer::Specials;
use crate::error::Error;
use mlua::{Table, Value};
use serde_json::Value as Json;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Functions of `engine.data`.
pub const FUNCTIONS: &[Function] = &[
    Function {
        op: "data.chat_batch",
        params: &["tokenizer", "conversations", "options?"],
        call: |call| {
            let TokenizerObject { tokenizer, template } = call.object::<TokenizerObject>(0)?.clone();
            let rules = rules(call, 2, Form::Conversations)?;
            let table = call.table(1)?;
            let mut documents = Vec::new();
            for (index, value) in call.list(1, "a list of conversations", &table)?.iter().enumerate() {
                let located = |error: Error| match error {
                    Error::Argument { op: _, arg, expected, got } => {
                        Error::Argument { op: call.op, arg: format!("conversations[{}].{arg}", index + 1), expected, got }
                    }
                    other => other,
                };
                let record = conversation_record(call, index, value)?;
                let made = conversation::documents(&record, &rules, &template, &tokenizer, Specials::Plain).map_err(located)?;
                if made.documents.is_empty() {
                    let got = "one of which nothing is left to learn";
                    let expected = format!("a conversation that fits {} tokens", rules.max_tokens.unwrap_or(0));
                    return Err(Error::argument(call.op, format!("conversations[{}]", index + 1), expected, got).into());
                }
                documents.extend(made.documents);
            }
            call.give(BatchObject(Arc::new(TokenBatch::from_documents(&documents)), None))
        },
    },
    Function {
        op: "data.records",
        params: &["records", "options?"],
        call: |call| {
            let dataset = Dataset::records(records(call, 0, "a list of tables")?);
            reading_options(call, dataset)
        },
    },
    Function {
        op: "data.write_jsonl",
        params: &["path", "records"],
        call: |call| {
            let path = call.path(0)?;
            let mut text = Vec::new();
            for record in records(call, 1, "a list of tables")? {
                serde_json::to_writer(&mut text, &record).expect("JSON values become JSON");
                text.push(b'\n');
            }
            if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
                std::fs::create_dir_all(folder).map_err(|source| Error::io(folder, "make the folder", source))?;
            }
            write_durably(&path, &text)?;
            call.done()
        },
    },
];

/// The options at `index` that say how records become documents.
pub fn rules(call: &Call, index: usize, form: Form) -> Failed<Rules> {
    let known: &[&str] = if form == Form::Prompts { &["max_tokens", "long"] } else { &["learn", "max_tokens", "long"] };
    let options = call.options(index, known)?;
    let wrong = |option: &str, expected: &str, got: &str| Error::argument(call.op, option, expected, format!("\"{got}\""));
    let mut rules = Rules { max_tokens: options.count("max_tokens", 1)?, ..Rules::new(form) };
    if form != Form::Prompts {
        rules.learn = match options.string("learn")?.as_deref() {
            None | Some("all") => Learn::All,
            Some("last") => Learn::Last,
            Some(other) => return Err(wrong("learn", "\"all\" or \"last\"", other).into()),
        };
    }
    rules.long = match (form, options.string("long")?.as_deref()) {
        (Form::Prompts, None) | (_, Some("skip")) => Long::Skip,
        (_, Some("error")) => Long::Error,
        (Form::Prompts, Some(other)) => return Err(wrong("long", "\"skip\" or \"error\"", other).into()),
        (_, None | Some("cut")) => Long::Cut,
        (_, Some(other)) => return Err(wrong("long", "\"cut\", \"skip\" or \"error\"", other).into()),
    };
    Ok(rules)
}

/// Argument `index`, a list of tables, as records.
fn records(call: &Call, index: usize, expected: &str) -> Failed<Vec<Record>> {
    let table = call.table(index)?;
    let read = |(at, value): (usize, &Value)| match plain_json(value) {
        Ok(Json::Object(record)) if !record.is_empty() => Ok(record),
        Ok(_) => Err(Error::argument(call.op, format!("{}[{}]", call.param(index), at + 1), "a table with names", describe(value)).into()),
        Err(error) => Err(Error::argument(call.op, format!("{}[{}]", call.param(index), at + 1), "plain data", error).into()),
    };
    call.list(index, expected, &table)?.iter().enumerate().map(read).collect()
}

/// Tables in tables in tables: deeper ones contain themselves.
const DEPTH_MAX: usize = 64;

/// A Lua value as JSON. A list with nil in it has null there. Names are sorted, since Lua's order differs from run to run; those of a
/// table that was JSON are in its order.
///
/// Errors, as what was found: what JSON would lose, that is numbers that are not finite, bytes that are not UTF-8, tables
/// that are a list and more, functions and objects.
pub fn plain_json(value: &Value) -> Result<Json, String> {
    json_of(value, Unordered::Sorted, 0)
}

/// Descriptions of tools, none for nil: a list, or its JSON as records may have it. Names of a table that a script wrote are in the
/// order that models are used to.
///
/// Errors: [`Error::Argument`] for anything else.
pub fn tools(call: &Call, value: &Value) -> Failed<Vec<Json>> {
    let read = match value {
        Value::String(text) => serde_json::from_slice(&text.as_bytes()).ok(),
        table => json_of(table, Unordered::Tools, 0).ok(),
    };
    match read {
        Some(Json::Array(tools)) => Ok(tools),
        Some(Json::Null) => Ok(Vec::new()),
        Some(Json::Object(none)) if none.is_empty() => Ok(Vec::new()),
        _ => Err(Error::argument(call.op, "tools", "a list of tools, or its JSON", describe(value)).into()),
    }
}

fn json_of(value: &Value, unordered: Unordered, depth: usize) -> Result<Json, String> {
    match value {
        Value::Nil => Ok(Json::Null),
        Value::Boolean(value) => Ok(Json::from(*value)),
        Value::Integer(value) => Ok(Json::from(*value)),
        Value::Number(value) if value.is_finite() => Ok(Json::from(*value)),
        Value::Number(value) => Err(format!("the number {value}, which JSON does not have")),
        Value::String(text) => text.to_str().map(|text| Json::from(text.to_string())).map_err(|_| "text that is not UTF-8".into()),
        Value::Table(_) if depth == DEPTH_MAX => Err(format!("tables in each other, {depth} deep")),
        Value::Table(table) => json_of_table(table, unordered, depth),
        other => Err(describe(other)),
    }
}

fn json_of_table(table: &Table, unordered: Unordered, depth: usize) -> Result<Json, String> {
    let (mut names, mut entries) = (Vec::new(), BTreeMap::new());
    for pair in table.pairs::<Value, Value>() {
        let (key, value) = pair.map_err(|error| error.to_string())?;
        let within = |place: String| move |found: String| format!("{found}, at {place}");
        match key {
            Value::String(name) => {
                let name = name.to_str().map_err(|_| "a name of bytes that are not UTF-8")?.to_string();
                let json = json_of(&value, unordered, depth + 1).map_err(within(format!("`{name}`")))?;
                names.push((name, json));
            }
            Value::Integer(index) if index > 0 => {
                entries.insert(index as usize, json_of(&value, unordered, depth + 1).map_err(within(format!("[{index}]")))?);
            }
            other => return Err(format!("a table with the key {}", describe(&other))),
        }
    }
    key_order::sort(table, &mut names, unordered);
    let Some((last, _)) = entries.last_key_value() else { return Ok(Json::Object(names.into_iter().collect())) };
    if let Some((name, _)) = names.first() {
        return Err(format!("a list with the name `{name}` beside its entries"));
    }
    if *last > 2 * entries.len() {
        return Err(format!("a list of {} entries up to [{last}]", entries.len()));
    }
    Ok(Json::Array((1..=*last).map(|index| entries.remove(&index).unwrap_or(Json::Null)).collect()))
}

/// Entry `index` of a list of conversations: a record, or the list of its messages alone.
fn conversation_record(call: &Call, index: usize, value: &Value) -> Failed<Record> {
    let wrong = |expected: &str, got: String| Error::argument(call.op, format!("conversations[{}]", index + 1), expected, got);
    match plain_json(value).map_err(|got| wrong("plain data", got))? {
        Json::Object(record) if !record.is_empty() => Ok(record),
        messages @ Json::Array(_) => Ok(Record::from_iter([("messages".to_string(), messages)])),
        _ => Err(wrong("a list of messages, or a record with one", describe(value)).into()),
    }
}
