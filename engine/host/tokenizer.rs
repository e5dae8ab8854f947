//! `engine.tokenizer`: text to token ids and back, in scripts.

use super::call::{Call, Class, Failed, Field, Function, as_integer, describe};
use super::conversations::{plain_json, tools};
use super::data::DataObject;
use super::raise::Failure;
use crate::checkpoint::folder::require_folder;
use crate::data::bpe_trainer::{BpeTraining, train_bpe};
use crate::data::chat_template::{ChatTemplate, Rendering};
use crate::data::tokenizer::{Specials, Tokenizer};
use crate::error::Error;
use mlua::Value;
use std::path::Path;
use std::sync::Arc;

/// A tokenizer with the chat template of its folder. Cheap to clone.
#[derive(Clone)]
pub struct TokenizerObject {
    pub tokenizer: Arc<Tokenizer>,
    pub template: Arc<ChatTemplate>,
}

impl TokenizerObject {
    /// Errors: those of [`Tokenizer::from_folder`] and [`ChatTemplate::from_folder`].
    pub fn load(path: &Path) -> Result<Self, Error> {
        if path.is_file() {
            return Ok(Self { tokenizer: Arc::new(Tokenizer::from_file(path)?), template: Arc::default() });
        }
        require_folder(path)?;
        Ok(Self { tokenizer: Arc::new(Tokenizer::from_folder(path)?), template: Arc::new(ChatTemplate::from_folder(path)?) })
    }

    fn of(tokenizer: Tokenizer) -> Self {
        Self { tokenizer: Arc::new(tokenizer), template: Arc::default() }
    }

    /// The files of the tokenizer and its chat template, by name.
    pub fn files(&self) -> Vec<(String, Vec<u8>)> {
        self.tokenizer.files(Some(self.template.source()))
    }

    /// Writes the files of the tokenizer into `folder`. Errors: [`Error::Io`].
    pub fn save(&self, folder: &Path) -> Result<(), Error> {
        self.tokenizer.save(folder, Some(self.template.source()))
    }
}

/// Functions of `engine.tokenizer`.
pub const FUNCTIONS: &[Function] = &[
    Function { op: "tokenizer.bytes", params: &[], call: |call| call.give(TokenizerObject::of(Tokenizer::bytes_with_chat())) },
    Function { op: "tokenizer.load", params: &["path"], call: |call| call.give(TokenizerObject::load(&call.path(0)?)?) },
    Function {
        op: "tokenizer.train",
        params: &["data", "options"],
        call: |call| {
            let options = call.options(1, &["vocab_size"])?;
            let Some(vocab_size) = options.count("vocab_size", 1)? else {
                return Err(Error::argument(call.op, "vocab_size", "given", "nil").into());
            };
            let texts = {
                let data = call.object::<DataObject>(0)?;
                data.dataset()?.texts()?
            };
            call.give(TokenizerObject::of(train_bpe(texts, &BpeTraining::new(vocab_size))?))
        },
    },
];

impl Class for TokenizerObject {
    const NAME: &'static str = "Tokenizer";
    const METHODS: &'static [&'static [Function]] = &[&[
        Function {
            op: "Tokenizer:chat",
            params: &["messages", "options?"],
            call: |call| {
                let this = call.subject::<TokenizerObject>()?;
                let options = call.options(1, &["generation_prompt", "tools"])?;
                let messages = match plain_json(&Value::Table(call.table(0)?)) {
                    Ok(serde_json::Value::Array(messages)) => messages,
                    _ => return Err(call.wrong(0, "a list of messages, each with a role and a content")),
                };
                let tools = tools(call, &options.value("tools")?)?;
                let add_generation_prompt = options.boolean("generation_prompt")?.unwrap_or(false);
                let rendering = Rendering { add_generation_prompt, tools, ..Rendering::default() };
                call.give(this.template.render(&messages, &rendering)?)
            },
        },
        Function {
            op: "Tokenizer:decode",
            params: &["ids", "options?"],
            call: |call| {
                let this = call.subject::<TokenizerObject>()?;
                let skip_special = call.options(1, &["skip_special"])?.boolean("skip_special")?.unwrap_or(false);
                call.give(this.tokenizer.decode(&token_ids(call, 0, &call.value(0))?, skip_special)?)
            },
        },
        Function {
            op: "Tokenizer:encode",
            params: &["text", "options?"],
            call: |call| {
                let this = call.subject::<TokenizerObject>()?;
                let recognise = call.options(1, &["specials"])?.boolean("specials")?.unwrap_or(false);
                let specials = if recognise { Specials::Recognise } else { Specials::Plain };
                call.give(this.tokenizer.encode(&call.string(0)?, specials))
            },
        },
        Function {
            op: "Tokenizer:save",
            params: &["folder"],
            call: |call| {
                let folder = call.path(0)?;
                std::fs::create_dir_all(&folder).map_err(|source| Error::io(&folder, "make the folder", source))?;
                call.subject::<TokenizerObject>()?.save(&folder)?;
                call.done()
            },
        },
    ]];
    const FIELDS: &'static [Field<Self>] = &[
        Field { name: "eos", get: |_, this| optional(this.tokenizer.eos()) },
        Field { name: "pad", get: |_, this| optional(this.tokenizer.pad()) },
        Field { name: "vocab_size", get: |_, this| Ok(Value::Integer(this.tokenizer.vocab_size() as i64)) },
    ];
}

super::call::user_data!(TokenizerObject);

fn optional(id: Option<u32>) -> Failed<Value> {
    Ok(id.map_or(Value::Nil, |id| Value::Integer(i64::from(id))))
}

/// Token ids in `value`, which is argument `index` or a part of it: a list, or a tensor of them.
pub fn token_ids(call: &Call, index: usize, value: &Value) -> Failed<Vec<u32>> {
    let wrong = |got: String| Failure::from(Error::argument(call.op, call.param(index), "a list of token ids", got));
    let ids: Vec<Value> = match (super::call::as_tensor(value), value) {
        (Some(tensor), _) => {
            let ids = tensor.on_host()?.typed::<i32, 1>(call.op, "ids")?;
            ids.values().iter().map(|id| Value::Integer(i64::from(*id))).collect()
        }
        (None, Value::Table(list)) => call.list(index, "a list of token ids", list)?,
        (None, other) => return Err(wrong(describe(other))),
    };
    let id = |id: &Value| {
        as_integer(id)
            .and_then(|id| i32::try_from(id).ok())
            .and_then(|id| u32::try_from(id).ok())
            .ok_or_else(|| wrong(format!("an entry that is {}", describe(id))))
    };
    ids.iter().map(id).collect()
}
