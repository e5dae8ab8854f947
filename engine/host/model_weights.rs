//! Methods of models that change or hand out weights: adapters, merging, averages, single tensors.

use super::call::{Answer, Call, Failed, Function};
use super::model::{ModelObject, forward};
use super::options::Options;
use super::tensor::tensor;
use super::work::Work;
use crate::data::pack::TokenBatch;
use crate::error::Error;
use crate::kernels::buffer::Buffer;
use crate::kernels::element::Dtype;
use crate::model::{Lora, Model};
use crate::tensor::any::AnyTensor;
use crate::tensor::gather::index_select;
use mlua::{Lua, Value};
use std::path::PathBuf;
use std::sync::Arc;

/// Keys of the option `lora`.
const LORA: &[&str] = &["alpha", "dora", "modules_to_save", "rank", "rank_stabilized", "targets"];

/// What the option `lora` asks for, if it is given.
///
/// Errors: [`Error::Argument`] for unknown keys and other types.
pub(super) fn lora_option(op: &'static str, options: &Options) -> Failed<Option<Lora>> {
    let Some(table) = options.table("lora")? else { return Ok(None) };
    let fields = Options::read(op, Some(table), LORA)?;
    let default = Lora::default();
    let rank = fields.count("rank", 1)?.unwrap_or(default.rank);
    Ok(Some(Lora {
        rank,
        alpha: fields.number("alpha")?.unwrap_or(2.0 * rank as f64),
        rank_stabilized: fields.boolean("rank_stabilized")?.unwrap_or(default.rank_stabilized),
        dora: fields.boolean("dora")?.unwrap_or(default.dora),
        targets: fields.strings("targets")?.unwrap_or(default.targets),
        modules_to_save: fields.strings("modules_to_save")?.unwrap_or_default(),
        ..default
    }))
}

/// What the option `head` asks for: whether the model scores.
///
/// Errors: [`Error::Argument`] for another head.
pub(super) fn score_option(op: &'static str, options: &Options) -> Failed<bool> {
    match options.string("head")?.as_deref() {
        None => Ok(false),
        Some("score") => Ok(true),
        Some(other) => Err(Error::argument(op, "head", "\"score\", or nothing for logits", format!("\"{other}\"")).into()),
    }
}

/// The adapter as a table, or nil.
pub(super) fn adapter_value(lua: &Lua, model: &Model) -> Failed<Value> {
    let Some(lora) = model.adapter() else { return Ok(Value::Nil) };
    let table = lua.create_table()?;
    table.raw_set("rank", lora.rank)?;
    table.raw_set("alpha", lora.alpha)?;
    table.raw_set("rank_stabilized", lora.rank_stabilized)?;
    table.raw_set("dora", lora.dora)?;
    table.raw_set("targets", lora.targets)?;
    table.raw_set("modules_to_save", lora.modules_to_save)?;
    table.raw_set("merged", model.is_merged())?;
    Ok(Value::Table(table))
}

/// The element type that the option `dtype` of call argument `index` names.
fn dtype_option(call: &Call, index: usize) -> Failed<Option<Dtype>> {
    match call.options(index, &["dtype"])?.string("dtype")? {
        Some(name) => Ok(Some(super::tensor::dtype_of(call, Some(name))?)),
        None => Ok(None),
    }
}

fn average(call: &Call) -> Answer {
    let (this, other) = (call.subject::<ModelObject>()?.clone(), call.object::<ModelObject>(0)?.clone());
    let weight = call.number(1)?;
    this.model.average(&other.model, weight)?;
    call.done()
}

fn save_adapter(call: &Call) -> Answer {
    let this = call.subject::<ModelObject>()?.clone();
    let folder: PathBuf = call.path(0)?;
    this.model.save_adapter(&folder, dtype_option(call, 1)?, this.source())?;
    call.done()
}

fn scores(call: &Call) -> Answer {
    forward(call, true, |batch| batch.cu_seqlens.len() - 1, |this, _, packed| Ok(this.model.scores(packed)?.into()))
}

fn labelled_or_all(call: &Call) -> Answer {
    let labelled = call.options(1, &["labelled"])?.boolean("labelled")?.unwrap_or(false);
    let head_rows: fn(&TokenBatch) -> usize = if labelled { TokenBatch::supervised } else { |batch| batch.tokens.len() };
    forward(call, true, head_rows, |this, batch, packed| {
        if !labelled {
            return Ok(this.model.logits(packed)?.into());
        }
        Ok(this.model.logits_of(packed, &labelled_rows(batch))?.into())
    })
}

/// The rows that have a label.
fn labelled_rows(batch: &TokenBatch) -> Vec<usize> {
    batch.labels.iter().enumerate().filter(|(_, label)| **label != crate::tensor::logprobs::IGNORE).map(|(row, _)| row).collect()
}

/// The list of names at argument 0.
fn names(call: &Call) -> Failed<Vec<String>> {
    let wrong = || call.wrong(0, "a list of names, such as { \"layers.0\", \"embed_tokens\" }");
    let table = call.table(0)?;
    let name = |value: mlua::Result<Value>| value?.as_string().map(|name| name.to_string_lossy()).ok_or_else(wrong);
    let names = table.sequence_values::<Value>().map(name).collect::<Failed<Vec<_>>>()?;
    if names.is_empty() { Err(wrong()) } else { Ok(names) }
}

fn hidden_states(call: &Call) -> Answer {
    let options = call.options(1, &["layer", "labelled"])?;
    let (layer, labelled) = (options.count("layer", 0)?, options.boolean("labelled")?.unwrap_or(false));
    forward(
        call,
        true,
        |_| 0,
        |this, batch, packed| {
            let states = this.model.hidden_states(packed, layer.unwrap_or(this.model.config().layers))?;
            if !labelled {
                return Ok(states);
            }
            let rows: Vec<i32> = labelled_rows(batch).iter().map(|row| *row as i32).collect();
            Ok(index_select(&states, 0, &AnyTensor::new(&[rows.len()], Buffer::copy_of(&rows))?)?)
        },
    )
}

fn head(call: &Call) -> Answer {
    let (this, states) = (call.subject::<ModelObject>()?.clone(), call.tensor(0)?);
    let logits = this.model.head(&states)?;
    if let Some(work) = call.lua.app_data_ref::<Arc<Work>>() {
        work.forward(&this.model, &[], logits.shape()[0], !this.frozen);
    }
    tensor(call, logits.into())
}

/// Methods of [`ModelObject`], beside those in model.rs.
pub const METHODS: &[Function] = &[
    Function { op: "Model:average", params: &["other", "weight"], call: average },
    Function {
        op: "Model:base",
        params: &[],
        call: |call| {
            let base = call.subject::<ModelObject>()?.base()?;
            call.give(base)
        },
    },
    Function {
        op: "Model:freeze",
        params: &["names"],
        call: |call| {
            call.subject::<ModelObject>()?.model.freeze(&names(call)?)?;
            call.done()
        },
    },
    Function { op: "Model:head", params: &["states"], call: head },
    Function { op: "Model:hidden_states", params: &["batch", "options?"], call: hidden_states },
    Function { op: "Model:logits", params: &["batch", "options?"], call: labelled_or_all },
    Function {
        op: "Model:merge",
        params: &[],
        call: |call| {
            call.subject::<ModelObject>()?.model.merge()?;
            call.done()
        },
    },
    Function { op: "Model:save_adapter", params: &["folder", "options?"], call: save_adapter },
    Function { op: "Model:scores", params: &["batch"], call: scores },
    Function {
        op: "Model:set_parameter",
        params: &["name", "value"],
        call: |call| {
            call.subject::<ModelObject>()?.model.set_value(&call.string(0)?, &call.tensor(1)?)?;
            call.done()
        },
    },
    Function {
        op: "Model:thaw",
        params: &["names?"],
        call: |call| {
            let names = if call.value(0).is_nil() { None } else { Some(names(call)?) };
            call.subject::<ModelObject>()?.model.thaw(names.as_deref())?;
            call.done()
        },
    },
    Function {
        op: "Model:unmerge",
        params: &[],
        call: |call| {
            call.subject::<ModelObject>()?.model.unmerge()?;
            call.done()
        },
    },
];
