//! A run: a script, its arguments and a seed, with its folder. It owns everything that must outlive a Lua state, under the
//! names that the script gives; the script holds handles. Asking twice for a name gives the same object.

use super::call::{Call, Class, Failed, Field, Function, describe, register};
use super::data::DataObject;
use super::loops::{self, LoopRecord};
use super::model::ModelObject;
use super::modules::Source;
use super::optim::OptimizerObject;
use super::progress::Screen;
use super::raise::Failure;
use crate::error::{Error, Result};
use mlua::{UserData, UserDataMethods, Value};
use serde_json::{Map, Value as Json};
use std::collections::BTreeMap;
use std::fs::File;
use std::hash::{BuildHasher, Hasher};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// One run of a workflow.
pub struct Run {
    pub id: String,
    pub workflow: String,
    pub seed: u64,
    pub folder: PathBuf,
    pub screen: Screen,
    started: Instant,
    metrics: Mutex<File>,
    /// What the script named, by name.
    resources: Mutex<BTreeMap<String, Resource>>,
    /// Loops by name: how far each has come. The engine's counter, not Lua's.
    pub(super) loops: Mutex<BTreeMap<String, LoopRecord>>,
}

/// Something of a run that outlives a Lua state; the script holds handles of it.
#[derive(Clone)]
enum Resource {
    /// With what it was made from, as [`asked_for`] writes it.
    Model(ModelObject, String),
    Optimizer(OptimizerObject),
    Data(DataObject),
}

impl Resource {
    fn kind(&self) -> &'static str {
        match self {
            Self::Model(..) => "model",
            Self::Optimizer(_) => "optimizer",
            Self::Data(_) => "data set",
        }
    }
}

/// What a run is started with.
pub struct Start<'a> {
    /// The folder that holds all runs.
    pub root: &'a Path,
    pub workflow: &'a str,
    pub seed: u64,
    pub args: &'a [(String, Json)],
    pub sources: &'a [Source],
    pub screen: Screen,
}

impl Run {
    /// Makes the folder of a new run, with a copy of its code and arguments.
    ///
    /// Errors: [`Error::Io`].
    pub fn start(start: &Start) -> Result<Self> {
        let id = new_id();
        let folder = start.root.join(&id);
        std::fs::create_dir_all(folder.join("code")).map_err(|source| Error::io(&folder, "make the folder", source))?;
        for source in start.sources {
            // A path that leaves the working folder must not leave the run's folder.
            let inside: PathBuf =
                Path::new(&source.path).components().filter(|part| matches!(part, std::path::Component::Normal(_))).collect();
            let path = folder.join("code").join(inside);
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent).map_err(|source| Error::io(parent, "make the folder", source))?;
            }
            write(&path, source.text.as_bytes())?;
        }
        let script = start.sources.first().map_or("", |source| source.path.as_str());
        let facts = serde_json::json!({
            "id": id, "workflow": start.workflow, "script": script, "seed": start.seed, "engine": env!("CARGO_PKG_VERSION"),
            "args": start.args.iter().cloned().collect::<Map<String, Json>>(),
        });
        let text = serde_json::to_string_pretty(&facts).expect("strings and numbers become JSON");
        write(&folder.join("args.json"), format!("{text}\n").as_bytes())?;
        let path = folder.join("metrics.jsonl");
        let metrics = File::create(&path).map_err(|source| Error::io(&path, "create", source))?;
        Ok(Self {
            id,
            workflow: start.workflow.to_string(),
            seed: start.seed,
            folder,
            screen: start.screen.clone(),
            started: Instant::now(),
            metrics: Mutex::new(metrics),
            resources: Mutex::new(BTreeMap::new()),
            loops: Mutex::new(BTreeMap::new()),
        })
    }

    /// Seconds since the run began.
    pub fn seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    /// Adds one line to `metrics.jsonl`.
    ///
    /// Errors: [`Error::Io`].
    pub fn write_metrics(&self, line: &Map<String, Json>) -> Result<()> {
        let mut text = serde_json::to_string(line).expect("strings and numbers become JSON");
        text.push('\n');
        let mut file = self.metrics.lock().expect("no panic happens under this lock");
        file.write_all(text.as_bytes()).map_err(|source| Error::io(&self.folder.join("metrics.jsonl"), "write", source))
    }

    /// The resource called `name`, made by `make` if there is none. `wanted` takes it apart, none if it is of another kind.
    fn resource<T>(
        &self,
        op: &'static str,
        kind: &'static str,
        name: &str,
        wanted: impl Fn(&Resource) -> Option<T>,
        make: impl FnOnce() -> Failed<Resource>,
    ) -> Failed<T> {
        check_name(op, name)?;
        let known = self.resources.lock().expect("no panic happens under this lock").get(name).cloned();
        let resource = match known {
            Some(resource) => resource,
            None => {
                let made = make()?;
                self.resources.lock().expect("no panic happens under this lock").insert(name.to_string(), made.clone());
                made
            }
        };
        wanted(&resource).ok_or_else(|| {
            let got = format!("`{name}`, which is a {} of this run", resource.kind());
            Error::argument(op, "name", format!("a name that is free, or that of a {kind}"), got).into()
        })
    }

    /// The name under which the run knows `model`.
    fn name_of(&self, model: &ModelObject) -> Option<String> {
        let resources = self.resources.lock().expect("no panic happens under this lock");
        let is_it = |resource: &Resource| matches!(resource, Resource::Model(other, _) if Arc::ptr_eq(&other.model, &model.model));
        resources.iter().find(|(_, resource)| is_it(resource)).map(|(name, _)| name.clone())
    }

    /// The folder of the artifact `name`.
    ///
    /// Errors: [`Error::Argument`] if the name is no plain name of a folder.
    pub fn artifact(&self, name: &str) -> Result<PathBuf> {
        let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)) && !name.starts_with('.') && !name.is_empty();
        if !plain || name == "code" {
            let expected = "a name of letters, digits, - and _, other than code";
            return Err(Error::argument("Run:save", "name", expected, format!("\"{name}\"")));
        }
        Ok(self.folder.join(name))
    }
}

/// What a call of `run:model` asks for, in words that are equal when it is: source, element type, frozen or not.
fn asked_for(call: &Call) -> Failed<String> {
    let options = call.options(2, super::model::OPTIONS)?;
    let mut words = Vec::new();
    match call.value(1) {
        Value::Table(fields) => {
            for pair in fields.pairs::<Value, Value>() {
                let (key, value) = pair?;
                words.push(format!("{} = {}", key.to_string().unwrap_or_default(), describe(&value)));
            }
            words.sort();
        }
        other => words.push(describe(&other)),
    }
    for option in ["dtype", "frozen"] {
        match options.value(option)? {
            Value::Nil | Value::Boolean(false) => {}
            value => words.push(format!("{option} = {}", describe(&value))),
        }
    }
    Ok(if words.is_empty() { "no fields".into() } else { words.join(", ") })
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    std::fs::write(path, bytes).map_err(|source| Error::io(path, "write", source))
}

/// A ULID: 48 bits of milliseconds, then 80 random bits, in 26 letters that sort by time.
/// Source: github.com/ulid/spec.
fn new_id() -> String {
    const LETTERS: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
    let millis = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis());
    // The standard library seeds every RandomState from the system's random numbers; an id needs no better ones.
    let random = || u128::from(std::hash::RandomState::new().build_hasher().finish());
    let bits = millis << 80 | (random() << 64 | random()) & ((1 << 80) - 1);
    (0..26).rev().map(|place| char::from(LETTERS[(bits >> (place * 5) & 31) as usize])).collect()
}

/// The object that a workflow's function gets.
#[derive(Clone)]
pub struct RunObject(pub Arc<Run>);

impl Class for RunObject {
    const NAME: &'static str = "Run";
    const METHODS: &'static [&'static [Function]] = &[&[
        Function { op: "Run:loop", params: &["name", "options"], call: loops::start },
        Function {
            op: "Run:log",
            params: &["values"],
            call: |call| {
                let run = call.subject::<RunObject>()?.0.clone();
                let values = loops::logged_values(call, 0)?;
                let mut line = Map::new();
                line.insert("time".into(), Json::from(run.seconds()));
                line.extend(values);
                run.write_metrics(&line)?;
                call.done()
            },
        },
        Function {
            op: "Run:now",
            params: &[],
            call: |call| {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64());
                call.give(now)
            },
        },
        Function {
            op: "Run:data",
            params: &["name", "data"],
            call: |call| {
                let run = call.subject::<RunObject>()?.0.clone();
                let data = call.object::<DataObject>(1)?.clone();
                let wanted = |resource: &Resource| if let Resource::Data(data) = resource { Some(data.clone()) } else { None };
                call.give(run.resource(call.op, "data set", &call.string(0)?, wanted, || Ok(Resource::Data(data)))?)
            },
        },
        Function {
            op: "Run:model",
            params: &["name", "source", "options?"],
            call: |call| {
                let run = call.subject::<RunObject>()?.0.clone();
                let options = call.options(2, super::model::OPTIONS)?;
                let asked = asked_for(call)?;
                let wanted = |resource: &Resource| match resource {
                    Resource::Model(model, made_from) => Some((model.clone(), made_from.clone())),
                    _ => None,
                };
                let make = || Ok(Resource::Model(ModelObject::make(call.lua, call.op, &call.value(1), &options)?, asked.clone()));
                let name = call.string(0)?;
                let (model, made_from) = run.resource(call.op, "model", &name, wanted, make)?;
                if made_from != asked {
                    let expected = format!("a free name, or the model `{name}` as it was made ({made_from})");
                    return Err(Error::argument(call.op, "name", expected, format!("`{name}` with {asked}")).into());
                }
                call.give(model)
            },
        },
        Function {
            op: "Run:optimizer",
            params: &["kind", "model", "options?"],
            call: |call| {
                let run = call.subject::<RunObject>()?.0.clone();
                let kind = call.string(0)?;
                if kind != "adamw" {
                    return Err(call.wrong(0, "\"adamw\""));
                }
                let model = call.object::<ModelObject>(1)?.clone();
                let options = call.options(2, super::optim::OPTIONS)?;
                // An optimizer goes with its model, so the model's name names it.
                let owner = run.name_of(&model).unwrap_or_else(|| "model".into());
                let wanted = |resource: &Resource| if let Resource::Optimizer(optim) = resource { Some(optim.clone()) } else { None };
                let make = || Ok(Resource::Optimizer(OptimizerObject::adamw(call.op, &model, &options)?));
                let optimizer = run.resource(call.op, "optimizer", &format!("{kind} of {owner}"), wanted, make)?;
                optimizer.set(call.op, &options)?;
                call.give(optimizer)
            },
        },
        Function {
            op: "Run:save",
            params: &["name", "model", "options?"],
            call: |call| {
                let run = call.subject::<RunObject>()?.0.clone();
                let model = call.object::<ModelObject>(1)?.clone();
                let dtype = match call.options(2, &["dtype"])?.string("dtype")? {
                    Some(name) => Some(super::tensor::dtype_of(call, Some(name))?),
                    None => None,
                };
                let folder = run.artifact(&call.string(0)?)?;
                model.save(&folder, dtype)?;
                run.screen.print(&format!("saved {}", folder.display()));
                call.give(folder.display().to_string())
            },
        },
    ]];
    const FIELDS: &'static [Field<Self>] = &[
        Field { name: "folder", get: |lua, run| Ok(Value::String(lua.create_string(run.0.folder.display().to_string())?)) },
        Field { name: "id", get: |lua, run| Ok(Value::String(lua.create_string(&run.0.id)?)) },
        Field { name: "seed", get: |_, run| Ok(Value::Integer(run.0.seed as i64)) },
    ];
}

impl UserData for RunObject {
    fn add_methods<M: UserDataMethods<Self>>(methods: &mut M) {
        register(methods);
    }
}

/// Errors if `name` cannot name something of a run.
pub(super) fn check_name(op: &'static str, name: &str) -> Result<(), Failure> {
    if name.is_empty() || name.contains(['/', '\n', '#']) {
        return Err(Error::argument(op, "name", "a name without / or #", format!("\"{name}\"")).into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_have_26_letters_and_sort_by_time() {
        let first = new_id();
        std::thread::sleep(std::time::Duration::from_millis(3));
        let second = new_id();
        assert_eq!(first.len(), 26);
        assert!(first < second, "{first} {second}");
    }
}
