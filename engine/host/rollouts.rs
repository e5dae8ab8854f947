//! `Rollouts`: what `Model:generate` returns, in scripts: texts with their log-probabilities, and batches to train on them.

use super::call::{Answer, Call, Class, Failed, Field, Function};
use super::data::BatchObject;
use super::tensor::tensor;
use crate::data::pack::{IGNORED, TokenBatch};
use crate::error::Error;
use crate::infer::scheduler::{Finish, Text};
use crate::kernels::buffer::Buffer;
use crate::tensor::AnyTensor;
use mlua::{IntoLua, Lua, Table, Value};
use std::sync::Arc;

/// Tokens of a batch unless told otherwise.
const BATCH_TOKENS: usize = 8192;

/// The prompt that some texts continue.
pub struct Origin {
    /// As the script gave it.
    pub record: Value,
    pub prompt: Arc<[i32]>,
}

/// One text and its prompt.
#[derive(Clone)]
struct Rollout {
    prompt: Arc<[i32]>,
    text: Arc<Text>,
}

/// Generated texts, the members of a group side by side.
pub struct Rollouts {
    rollouts: Vec<Rollout>,
    /// Texts of each prompt, side by side; none if there are not equally many.
    group: Option<usize>,
    /// Lists made once, since scripts index them in loops.
    texts: Table,
    records: Table,
    lengths: Table,
    finish: Table,
}

/// What a batch of rollouts knows beside its tokens.
pub struct Sampled {
    /// All rollouts, of which these are some.
    pub rollouts: usize,
    /// `[tokens]`: the index of each token's rollout among all of them.
    pub sequence: Vec<i32>,
    /// `[tokens]`: the log-probability with which the label was sampled; 0 where there is none.
    pub logprobs: Vec<f32>,
}

impl Rollouts {
    /// - `groups`: each prompt with its texts
    pub fn new(lua: &Lua, groups: Vec<(Origin, Vec<Text>)>) -> Failed<Self> {
        let (mut rollouts, mut records) = (Vec::new(), Vec::new());
        for (origin, texts) in groups {
            for text in texts {
                rollouts.push(Rollout { prompt: origin.prompt.clone(), text: Arc::new(text) });
                records.push(origin.record.clone());
            }
        }
        Self::of(lua, rollouts, records)
    }

    fn of(lua: &Lua, rollouts: Vec<Rollout>, records: Vec<Value>) -> Failed<Self> {
        let mut members = rollouts.chunk_by(|a, b| Arc::ptr_eq(&a.prompt, &b.prompt)).map(<[Rollout]>::len);
        let first = members.next();
        let group = first.filter(|first| members.all(|count| count == *first));
        let texts = rollouts.iter().map(|rollout| rollout.text.text.as_str());
        let lengths = rollouts.iter().map(|rollout| rollout.text.tokens.len());
        let finish = rollouts.iter().map(|rollout| rollout.text.finish.name());
        Ok(Self {
            texts: lua.create_sequence_from(texts)?,
            records: lua.create_sequence_from(records)?,
            lengths: lua.create_sequence_from(lengths)?,
            finish: lua.create_sequence_from(finish)?,
            rollouts,
            group,
        })
    }

    /// Rollout number `index`, from 1.
    fn at(&self, call: &Call, index: i64) -> Failed<&Rollout> {
        let rollout = usize::try_from(index).ok().and_then(|index| self.rollouts.get(index.wrapping_sub(1)));
        rollout.ok_or_else(|| call.wrong(0, format!("a rollout from 1 to {}", self.rollouts.len())))
    }
}

/// Prompt and output of `rollouts`, one document each; neighbours share their prompt's rows. `first` is the index of the
/// first among `all`.
fn batch_of(rollouts: &[Rollout], first: usize, all: usize) -> BatchObject {
    let mut batch = TokenBatch { cu_seqlens: vec![0], row_starts: vec![0], ..TokenBatch::default() };
    let mut sampled = Sampled { rollouts: all, sequence: Vec::new(), logprobs: Vec::new() };
    let mut like = 0;
    for (index, Rollout { prompt, text }) in rollouts.iter().enumerate() {
        if !Arc::ptr_eq(prompt, &rollouts[like].prompt) {
            like = index;
        }
        let tokens = [&prompt[..], &text.tokens].concat();
        // Each token is the label of the position before it.
        let mut labels = vec![IGNORED; tokens.len()];
        let end = tokens.len() - 1;
        labels[prompt.len() - 1..end].copy_from_slice(&text.tokens);
        batch.push(&tokens, &labels, (like < index).then_some(like));
        batch.row_starts.push(batch.tokens.len() as u32);
        sampled.logprobs.resize(batch.tokens.len() - 1 - text.tokens.len(), 0.0);
        sampled.logprobs.extend_from_slice(&text.logprobs);
        sampled.logprobs.push(0.0);
        sampled.sequence.resize(batch.tokens.len(), (first + index) as i32);
    }
    BatchObject(Arc::new(batch), Some(Arc::new(sampled)))
}

/// `rollouts:batches(options)`: an iterator over batches of whole rollouts, in order.
fn batches(call: &Call) -> Answer {
    let options = call.options(0, &["tokens"])?;
    let most = options.count("tokens", 1)?.unwrap_or(BATCH_TOKENS);
    let rollouts = call.subject::<Rollouts>()?.rollouts.clone();
    let mut next = 0;
    let iterate = call.lua.create_function_mut(move |lua, ()| {
        let (first, mut tokens) = (next, 0);
        while let Some(Rollout { prompt, text }) = rollouts.get(next) {
            let shared = next > first && Arc::ptr_eq(prompt, &rollouts[next - 1].prompt);
            tokens += if shared { 1 } else { prompt.len() } + text.tokens.len();
            if next > first && tokens > most {
                break;
            }
            next += 1;
        }
        if next == first { Ok(Value::Nil) } else { batch_of(&rollouts[first..next], first, rollouts.len()).into_lua(lua) }
    })?;
    call.give(iterate)
}

/// `rollouts:select(indices)`: some of them, as rollouts of their own.
fn select(call: &Call) -> Answer {
    let selected = {
        let this = call.subject::<Rollouts>()?;
        let (mut rollouts, mut records) = (Vec::new(), Vec::new());
        for index in call.integers(0)? {
            rollouts.push(this.at(call, index)?.clone());
            records.push(this.records.raw_get::<Value>(index)?);
        }
        Rollouts::of(call.lua, rollouts, records)?
    };
    call.give(selected)
}

/// `rollouts:top_logprobs(index)`: for each token of a rollout, the most likely ones.
fn top_logprobs(call: &Call) -> Answer {
    let rollout = call.subject::<Rollouts>()?.at(call, call.integer(0)?)?.clone();
    if rollout.text.top_logprobs.is_empty() && !rollout.text.tokens.is_empty() {
        return Err(Error::argument(call.op, "self", "rollouts made with the option `top_logprobs`", "some without").into());
    }
    let list = call.lua.create_table()?;
    for top in &rollout.text.top_logprobs {
        let tokens = call.lua.create_table()?;
        for (id, logprob) in top {
            let entry = call.lua.create_table()?;
            entry.raw_set("id", *id)?;
            entry.raw_set("logprob", *logprob)?;
            tokens.raw_push(entry)?;
        }
        list.raw_push(tokens)?;
    }
    call.give(list)
}

impl Class for Rollouts {
    const NAME: &'static str = "Rollouts";
    const METHODS: &'static [&'static [Function]] = &[&[
        Function { op: "Rollouts:batches", params: &["options?"], call: batches },
        Function {
            op: "Rollouts:logprobs",
            params: &["index"],
            call: |call| {
                let text = call.subject::<Rollouts>()?.at(call, call.integer(0)?)?.text.clone();
                tensor(call, AnyTensor::new(&[text.logprobs.len()], Buffer::copy_of(&text.logprobs))?)
            },
        },
        Function {
            op: "Rollouts:prompt",
            params: &["index"],
            call: |call| {
                let prompt = call.subject::<Rollouts>()?.at(call, call.integer(0)?)?.prompt.clone();
                call.give(call.lua.create_sequence_from(prompt.iter().copied())?)
            },
        },
        Function { op: "Rollouts:select", params: &["indices"], call: select },
        Function {
            op: "Rollouts:tokens",
            params: &["index"],
            call: |call| {
                let text = call.subject::<Rollouts>()?.at(call, call.integer(0)?)?.text.clone();
                call.give(call.lua.create_sequence_from(text.tokens.iter().copied())?)
            },
        },
        Function { op: "Rollouts:top_logprobs", params: &["index"], call: top_logprobs },
    ]];
    const FIELDS: &'static [Field<Self>] = &[
        Field { name: "count", get: |_, this| Ok(Value::Integer(this.rollouts.len() as i64)) },
        Field { name: "finish", get: |_, this| Ok(Value::Table(this.finish.clone())) },
        Field { name: "group", get: |_, this| Ok(this.group.map_or(Value::Nil, |group| Value::Integer(group as i64))) },
        Field { name: "lengths", get: |_, this| Ok(Value::Table(this.lengths.clone())) },
        Field { name: "records", get: |_, this| Ok(Value::Table(this.records.clone())) },
        Field { name: "texts", get: |_, this| Ok(Value::Table(this.texts.clone())) },
        Field {
            name: "total_tokens",
            get: |_, this| Ok(Value::Integer(this.rollouts.iter().map(|rollout| rollout.text.tokens.len() as i64).sum())),
        },
        Field {
            name: "truncated",
            get: |_, this| {
                let cut = this.rollouts.iter().filter(|rollout| rollout.text.finish == Finish::Length).count();
                Ok(Value::Integer(cut as i64))
            },
        },
    ];
}

super::call::user_data!(Rollouts);
