//! `engine.data`, where scripts hand in records of their own: conversations as one batch, records as a data set, records to
//! a file. Which fields a conversation has is `data/conversation.rs`.

use super::call::{Call, Failed, Function, describe};
use super::code::write_durably;
use super::data::{BatchObject, reading_options};
use super::tokenizer::TokenizerObject;
use crate::data::conversation::{self, Form, Learn, Long, Rules};
use crate::data::dataset::Dataset;
use crate::data::jsonl::Record;
use crate::data::pack::TokenBatch;
use crate::data::tokenizer::Specials;
use crate::error::Error;
use mlua::{Lua, LuaSerdeExt, Value};
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

/// Argument `index`, a list of tables, as records. Keys are sorted: Lua's order differs from run to run.
fn records(call: &Call, index: usize, expected: &str) -> Failed<Vec<Record>> {
    let table = call.table(index)?;
    let read = |(at, value): (usize, &Value)| match plain_json(call.lua, value) {
        Ok(serde_json::Value::Object(record)) if !record.is_empty() => Ok(record),
        Ok(_) => Err(Error::argument(call.op, format!("{}[{}]", call.param(index), at + 1), "a table with names", describe(value)).into()),
        Err(error) => Err(Error::argument(call.op, format!("{}[{}]", call.param(index), at + 1), "plain data", error).into()),
    };
    call.list(index, expected, &table)?.iter().enumerate().map(read).collect()
}

/// A Lua value as JSON, its keys sorted.
pub fn plain_json(lua: &Lua, value: &Value) -> mlua::Result<serde_json::Value> {
    lua.from_value_with(value.clone(), mlua::serde::DeserializeOptions::new().sort_keys(true))
}

/// Entry `index` of a list of conversations: a record, or the list of its messages alone.
fn conversation_record(call: &Call, index: usize, value: &Value) -> Failed<Record> {
    let wrong = |expected: &str, got: String| Error::argument(call.op, format!("conversations[{}]", index + 1), expected, got);
    match plain_json(call.lua, value).map_err(|error| wrong("plain data", error.to_string()))? {
        serde_json::Value::Object(record) if !record.is_empty() => Ok(record),
        messages @ serde_json::Value::Array(_) => Ok(Record::from_iter([("messages".to_string(), messages)])),
        _ => Err(wrong("a list of messages, or a record with one", describe(value)).into()),
    }
}
