//! `run` in scripts: the object that a workflow's function gets.

use super::call::{Call, Class, Failed, Field, Function};
use super::data::DataObject;
use super::model::{self, ModelObject};
use super::optim::{self, OptimizerObject};
use super::plain::Plain;
use super::raise::Failure;
use super::replay::{Replay, now};
use super::resources::{Resource, check_definition};
use super::run::Run;
use super::{loops, states, steps};
use crate::error::Error;
use mlua::Value;
use serde_json::{Map, Value as Json};
use std::sync::Arc;

/// The run of a script.
#[derive(Clone)]
pub struct RunObject(pub Arc<Run>);

/// The run, and where its script stands.
pub(super) fn standing(call: &Call) -> Failed<(Arc<Run>, Arc<Replay>)> {
    let run = call.subject::<RunObject>()?.0.clone();
    Ok((run, Replay::of(call.lua).expect("a state with a run has a place in it")))
}

/// What a call of `run:model` asks for, in words that are equal when it is: source, element type, frozen or not, head, adapter.
fn model_definition(call: &Call) -> Failed<String> {
    let options = call.options(2, model::OPTIONS)?;
    let source = Plain::of(call.op, "source", &call.value(1))?.canonical();
    let dtype = options.string("dtype")?.map_or_else(String::new, |dtype| format!(" in {dtype}"));
    let frozen = if options.boolean("frozen")?.unwrap_or(false) { ", frozen" } else { "" };
    let mut definition = format!("{source}{dtype}{frozen}");
    for key in ["head", "lora", "adapter"] {
        let value = options.value(key)?;
        if !value.is_nil() {
            definition += &format!(", {key} {}", Plain::of(call.op, "options", &value)?.canonical());
        }
    }
    Ok(definition)
}

/// Gives a new resource its name. What the checkpoint has of it comes at once if the script is past the checkpoint's place.
fn add(run: &Run, replay: &Replay, name: &str, resource: Resource, definition: String) -> Failed<()> {
    run.resources.add(name, resource.clone(), definition);
    match run.checkpoints.origin() {
        Some(origin) if !replay.is_replaying() => origin.restore(name, &resource),
        _ => Ok(()),
    }
}

fn run_model(call: &Call) -> super::call::Answer {
    let (run, replay) = standing(call)?;
    let name = call.string(0)?;
    check_name(call.op, &name)?;
    let options = call.options(2, model::OPTIONS)?;
    let definition = model_definition(call)?;
    let wanted = |resource: &Resource| if let Resource::Model(model) = resource { Some(model.clone()) } else { None };
    if let Some(model) = run.resources.find(call.op, "model", &name, &definition, wanted)? {
        return call.give(model);
    }
    let stored = run.checkpoints.origin().filter(|origin| origin.state.models.contains_key(&name));
    let object = match stored {
        Some(origin) => {
            let stored = &origin.state.models[&name];
            check_definition("model", &name, &stored.definition, &definition)?;
            let object = if stored.frozen {
                // Nothing trains a frozen model, so checkpoints do not hold it.
                ModelObject::make(call.lua, call.op, &call.value(1), &options)?
            } else {
                origin.load_model(call.lua, call.op, &name, &call.value(1), &options)?
            };
            if stored.gpu != object.gpu() {
                let [was, is] = [stored.gpu.clone(), object.gpu()].map(|gpu| gpu.unwrap_or_else(|| "the CPU".into()));
                run.screen.note(&format!("the model `{name}` was on {was} and is on {is} now: results agree but for rounding"));
            }
            object
        }
        None => ModelObject::make(call.lua, call.op, &call.value(1), &options)?,
    };
    add(&run, &replay, &name, Resource::Model(object.clone()), definition)?;
    call.give(object)
}

fn run_optimizer(call: &Call) -> super::call::Answer {
    let (run, replay) = standing(call)?;
    let kind = call.string(0)?;
    let Some(kind) = [optim::ADAMW, optim::MUON].into_iter().find(|known| known.name == kind) else {
        return Err(call.wrong(0, "\"adamw\" or \"muon\""));
    };
    let model = call.object::<ModelObject>(1)?.clone();
    let options = call.options(2, kind.options)?;
    // An optimizer goes with its model, so the model's name names it.
    let Some(owner) = run.resources.name_of_model(&model) else {
        let expected = "a model of the run, made by run:model, so that checkpoints hold both";
        return Err(Error::argument(call.op, "model", expected, "another one (those of engine.optim take any)").into());
    };
    let name = format!("{} of {owner}", kind.name);
    let wanted = |resource: &Resource| if let Resource::Optimizer(optim, _) = resource { Some(optim.clone()) } else { None };
    let optimizer = match run.resources.find(call.op, "optimizer", &name, &name, wanted)? {
        Some(optimizer) => {
            optimizer.ask(call.op, &replay, &options)?;
            optimizer
        }
        None => {
            let optimizer = OptimizerObject::new(call.lua, call.op, kind, &model, &options)?.named(&name);
            add(&run, &replay, &name, Resource::Optimizer(optimizer.clone(), owner), name.clone())?;
            if replay.is_replaying() {
                optimizer.ask(call.op, &replay, &options)?;
            }
            optimizer
        }
    };
    call.give(optimizer)
}

impl Class for RunObject {
    const NAME: &'static str = "Run";
    const METHODS: &'static [&'static [Function]] = &[&[
        Function {
            op: "Run:data",
            params: &["name", "data"],
            call: |call| {
                let (run, replay) = standing(call)?;
                let (name, data) = (call.string(0)?, call.object::<DataObject>(1)?.clone());
                check_name(call.op, &name)?;
                let definition = data.definition();
                let wanted = |resource: &Resource| if let Resource::Data(data) = resource { Some(data.clone()) } else { None };
                if let Some(known) = run.resources.find(call.op, "data set", &name, &definition, wanted)? {
                    return call.give(known);
                }
                // Its own reading: the script may take from the description, too.
                let named = data.begin_again();
                add(&run, &replay, &name, Resource::Data(named.clone()), definition)?;
                call.give(named)
            },
        },
        Function {
            op: "Run:log",
            params: &["values"],
            call: |call| {
                let (run, replay) = standing(call)?;
                let values = loops::logged_values(call, 0)?;
                // What is repeated was logged when it was done first.
                if !replay.is_replaying() && !values.is_empty() {
                    let mut timing = Map::new();
                    timing.insert("time".into(), Json::from(run.seconds()));
                    run.write_metrics(&values, &timing)?;
                    run.note_logged();
                }
                call.done()
            },
        },
        Function { op: "Run:loop", params: &["name", "options"], call: loops::start },
        Function { op: "Run:model", params: &["name", "source", "options?"], call: run_model },
        Function { op: "Run:now", params: &[], call: |call| call.give(now(call.lua)?) },
        Function { op: "Run:optimizer", params: &["kind", "model", "options?"], call: run_optimizer },
        Function {
            op: "Run:save",
            params: &["name", "model", "options?"],
            call: |call| {
                let (run, replay) = standing(call)?;
                let model = call.object::<ModelObject>(1)?.clone();
                let options = call.options(2, &["dtype", "stop_tokens"])?;
                let stop_ids = model.stop_tokens(call.op, &options)?;
                let dtype = match options.string("dtype")? {
                    Some(name) => Some(super::tensor::dtype_of(call, Some(name))?),
                    None => None,
                };
                let folder = run.artifact(&call.string(0)?)?;
                // Above the loop that is resumed the model is already that of the checkpoint: what was saved stays.
                if !replay.is_replaying() {
                    model.save(&folder, dtype, stop_ids)?;
                    run.screen.print(&format!("saved {}", shown(&folder)));
                }
                call.give(folder.display().to_string())
            },
        },
        Function { op: "Run:state", params: &["name", "initial"], call: states::state },
        Function { op: "Run:step", params: &["name", "inputs", "body", "options?"], call: steps::step },
    ]];
    const FIELDS: &'static [Field<Self>] = &[
        Field { name: "folder", get: |lua, run| Ok(Value::String(lua.create_string(run.0.folder.display().to_string())?)) },
        Field { name: "id", get: |lua, run| Ok(Value::String(lua.create_string(&run.0.facts.id)?)) },
        Field { name: "seed", get: |_, run| Ok(Value::Integer(run.0.facts.seed as i64)) },
    ];
}

/// A path as users wrote it: relative to where they are, if it lies there.
pub fn shown(path: &std::path::Path) -> String {
    let here = std::env::current_dir().ok().and_then(|here| here.canonicalize().ok());
    here.and_then(|here| path.strip_prefix(here).ok()).unwrap_or(path).display().to_string()
}

super::call::user_data!(RunObject);

/// Errors if `name` cannot name something of a run.
pub(super) fn check_name(op: &'static str, name: &str) -> Result<(), Failure> {
    if name.is_empty() || name.len() > 100 || name.contains(['/', '\n', '#', '[', ']']) {
        let expected = "a name of 1 to 100 bytes, without / # [ ]";
        return Err(Error::argument(op, "name", expected, format!("\"{name}\"")).into());
    }
    Ok(())
}
