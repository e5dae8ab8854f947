//! `engine.optim`: optimizers in scripts. An optimizer consumes the gradients that `backward` left in its model.

use super::call::{Call, Class, Failed, Field, Function, describe};
use super::globals::seed;
use super::model::ModelObject;
use super::options::Options;
use super::progress::Screen;
use super::replay::Replay;
use crate::error::Error;
use crate::kernels::element::Dtype;
use crate::tensor::trainable::TensorRows;
use crate::train::online_merge::{MergeSettings, Method, OnlineMerge, Source};
use crate::train::optimizer::{AdamW, Settings};
use mlua::{Lua, Value};
use serde_json::Value as Json;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

/// An optimizer in Lua. Cheap to clone: clones are one optimizer.
#[derive(Clone)]
pub struct OptimizerObject {
    held: Arc<Mutex<Held>>,
    /// The name under which the run knows it.
    name: Option<String>,
}

/// An optimizer and where its settings come from.
pub(super) struct Held {
    pub adamw: AdamW,
    /// As the script last set them.
    pub script: Settings,
    /// As the code above the loop asked for them: what a newer generation changes is what differs from these.
    pub asked: Settings,
    /// What the user has set from outside, in place of what the script says.
    pub forced: Forced,
    /// How often settings were put into force.
    applied: u64,
}

/// Settings by name that hold whatever the script says; none (null) only for `clip_norm`: no limit.
pub type Forced = BTreeMap<String, Option<f64>>;

impl Held {
    /// Puts the script's settings into force, and over them those from outside.
    ///
    /// Errors: those of [`Settings::check`].
    pub fn apply(&mut self) -> Result<(), Error> {
        self.applied += 1;
        let mut settings = self.script;
        for (name, value) in &self.forced {
            force(&mut settings, name, *value)?;
        }
        self.adamw.set(settings)
    }
}

/// Names that can be set from outside.
const FORCIBLE: &str = "lr, eps, weight_decay, clip_norm, beta1, beta2 and momentum (of muon)";

fn force(settings: &mut Settings, name: &str, value: Option<f64>) -> Result<(), Error> {
    let slot = match name {
        "clip_norm" => {
            settings.clip_norm = value;
            return Ok(());
        }
        "lr" => &mut settings.lr,
        "eps" => &mut settings.eps,
        "weight_decay" => &mut settings.weight_decay,
        "beta1" => &mut settings.betas.0,
        "beta2" => &mut settings.betas.1,
        "momentum" if settings.momentum.is_some() => settings.momentum.insert(0.0),
        _ => return Err(Error::argument("set", "name", format!("one of {FORCIBLE}"), format!("`{name}`"))),
    };
    *slot = value.ok_or_else(|| Error::argument("set", name, "a number, or `script` to let the script decide again", "false"))?;
    Ok(())
}

/// Takes into `live` what differs between `before` and `after`.
fn take_changes(live: &mut Settings, before: &Settings, after: &Settings) {
    fn take<T: PartialEq + Copy>(live: &mut T, before: T, after: T) {
        if before != after {
            *live = after;
        }
    }
    take(&mut live.lr, before.lr, after.lr);
    take(&mut live.betas, before.betas, after.betas);
    take(&mut live.eps, before.eps, after.eps);
    take(&mut live.weight_decay, before.weight_decay, after.weight_decay);
    take(&mut live.decay_vectors, before.decay_vectors, after.decay_vectors);
    take(&mut live.clip_norm, before.clip_norm, after.clip_norm);
    take(&mut live.moments, before.moments, after.moments);
    take(&mut live.momentum, before.momentum, after.momentum);
}

/// An optimizer that scripts make.
#[derive(Clone, Copy)]
pub struct Kind {
    pub name: &'static str,
    /// The options that it is made with.
    pub options: &'static [&'static str],
    /// Those of them that can be changed.
    changeable: &'static [&'static str],
    momentum: Option<f64>,
}

pub const ADAMW: Kind = Kind {
    name: "adamw",
    options: &["lr", "betas", "eps", "weight_decay", "decay_vectors", "clip_norm", "moments", "merge"],
    changeable: &["lr", "betas", "eps", "weight_decay", "decay_vectors", "clip_norm", "moments"],
    momentum: None,
};

const MUON_OPTIONS: &[&str] = &["lr", "betas", "eps", "weight_decay", "decay_vectors", "clip_norm", "moments", "momentum"];

pub const MUON: Kind = Kind { name: "muon", options: MUON_OPTIONS, changeable: MUON_OPTIONS, momentum: Some(0.95) };

impl Kind {
    fn of(settings: &Settings) -> Self {
        if settings.momentum.is_some() { MUON } else { ADAMW }
    }

    /// What its options change.
    fn defaults(self) -> Settings {
        Settings { momentum: self.momentum, ..Settings::default() }
    }
}

/// Keys of the option `merge`.
const MERGE: &[&str] = &["alpha", "base", "every", "method", "reference", "rescale", "reserve"];

/// What the option `merge` asks for, if it is given.
///
/// Errors: [`Error::Argument`] for settings and models that cannot be meant.
fn merge_option(lua: &Lua, op: &'static str, options: &Options) -> Failed<Option<OnlineMerge>> {
    let Some(table) = options.table("merge")? else { return Ok(None) };
    let fields = Options::read(op, Some(table), MERGE)?;
    let model = |key: &str| -> Failed<ModelObject> {
        let value = fields.value(key)?;
        let object = value.as_userdata().and_then(|object| Some(object.borrow::<ModelObject>().ok()?.clone()));
        Ok(object.ok_or_else(|| Error::argument(op, format!("merge.{key}"), "a Model", describe(&value)))?)
    };
    let (base, reference) = (model("base")?.model, model("reference")?.model);
    let method = match fields.string("method")?.as_deref() {
        None | Some("dare") => Method::Dare,
        Some("ties") => Method::Ties,
        Some(other) => return Err(Error::argument(op, "merge.method", "\"dare\" or \"ties\"", format!("\"{other}\"")).into()),
    };
    let settings = MergeSettings {
        method,
        alpha: fields.number("alpha")?.unwrap_or(1e-7),
        reserve: fields.number("reserve")?.unwrap_or(0.01),
        rescale: fields.boolean("rescale")?.unwrap_or(false),
        every: fields.count("every", 1)?.unwrap_or(1) as u64,
    };
    if base.parameters().len() != reference.parameters().len() {
        let got = "a model with another number of parameters";
        return Err(Error::argument(op, "merge.reference", "a model of the shape of merge.base", got).into());
    }
    let parts = base.parameters().into_iter().zip(reference.parameters()).zip(base.tensor_rows());
    let ranges = |tensors: Vec<TensorRows>| tensors.into_iter().map(|tensor| tensor.rows).collect();
    let sources = parts.map(|((base, reference), tensors)| Source { base, reference, tensors: ranges(tensors) }).collect();
    Ok(Some(OnlineMerge::new(settings, seed(lua), sources)?))
}

/// `base` with what `options` say.
fn settings(op: &'static str, base: Settings, options: &Options) -> Failed<Settings> {
    let mut settings = base;
    let set = |slot: &mut f64, name: &str| -> Failed<()> {
        if let Some(value) = options.number(name)? {
            *slot = value;
        }
        Ok(())
    };
    set(&mut settings.lr, "lr")?;
    set(&mut settings.eps, "eps")?;
    set(&mut settings.weight_decay, "weight_decay")?;
    settings.decay_vectors = options.boolean("decay_vectors")?.unwrap_or(settings.decay_vectors);
    if settings.momentum.is_some() {
        settings.momentum = options.number("momentum")?.or(settings.momentum);
    }
    if let Some(betas) = options.numbers("betas")? {
        let [first, second] = betas[..] else {
            return Err(Error::argument(op, "betas", "two numbers, such as { 0.9, 0.95 }", format!("{} numbers", betas.len())).into());
        };
        settings.betas = (first, second);
    }
    match options.value("clip_norm")? {
        Value::Nil => {}
        Value::Boolean(false) => settings.clip_norm = None,
        _ => settings.clip_norm = options.number("clip_norm")?,
    }
    if let Some(name) = options.string("moments")? {
        let dtype = Dtype::parse(&name).filter(|dtype| matches!(dtype, Dtype::F32 | Dtype::Bf16));
        settings.moments = dtype.ok_or_else(|| Error::argument(op, "moments", "\"f32\" or \"bf16\"", format!("\"{name}\"")))?;
    }
    settings.check()?;
    Ok(settings)
}

impl OptimizerObject {
    /// An optimizer over the parameters of `model`.
    ///
    /// Errors: [`Error::Argument`] for a setting that cannot be meant, a model of which nothing trains, or one whose training
    /// does not fit the memory.
    pub fn new(lua: &Lua, op: &'static str, kind: Kind, model: &ModelObject, options: &Options) -> Failed<Self> {
        let settings = settings(op, kind.defaults(), options)?;
        let mut adamw = AdamW::new(model.model.parameters(), settings)?.naming(model.model.tensor_rows());
        if kind.options.contains(&"merge")
            && let Some(merge) = merge_option(lua, op, options)?
        {
            adamw = adamw.merging(merge)?;
        }
        let held = Held { adamw, script: settings, asked: settings, forced: Forced::new(), applied: 0 };
        let held = Arc::new(Mutex::new(held));
        model.room.enter(op, &model.model, &held)?;
        Ok(Self { held, name: None })
    }

    /// The same optimizer under a name of the run.
    pub fn named(self, name: &str) -> Self {
        Self { name: Some(name.into()), ..self }
    }

    /// Changes settings from the next step on.
    ///
    /// Above a loop that is being replayed nothing changes yet: what differs from what was asked for there before takes
    /// effect on arrival ([`Self::take_asked`]).
    ///
    /// Errors: as [`OptimizerObject::new`].
    pub fn set(&self, op: &'static str, replay: Option<&Replay>, options: &Options) -> Failed<()> {
        let replay = replay.filter(|_| self.name.is_some());
        if let Some(replay) = replay.filter(|replay| replay.is_replaying()) {
            let name = self.name.as_deref().expect("only named optimizers are replayed");
            let base = replay.asked(name).unwrap_or_else(|| self.kind().defaults());
            let asked = settings(op, base, options)?;
            // What a step set is in the checkpoint, and no replay of a step that is done sets it again.
            if replay.is_outermost() {
                replay.ask(name, asked);
            }
            return Ok(());
        }
        let mut held = self.lock();
        let script = settings(op, held.script, options)?;
        held.script = script;
        if replay.is_some_and(Replay::is_outermost) {
            held.asked = script;
        }
        Ok(held.apply()?)
    }

    /// The options that `run:optimizer` was given, for an optimizer that exists.
    ///
    /// Errors: as [`OptimizerObject::new`].
    pub fn ask(&self, op: &'static str, replay: &Replay, options: &Options) -> Failed<()> {
        if let (true, Some(name)) = (replay.is_replaying(), &self.name) {
            let base = replay.asked(name).unwrap_or_else(|| self.kind().defaults());
            replay.ask(name, settings(op, base, options)?);
            return Ok(());
        }
        self.set(op, Some(replay), options)
    }

    /// What code above the loop asked for and had not asked for before takes effect.
    ///
    /// Errors: those of [`Settings::check`].
    pub fn take_asked(&self, asked: Settings) -> Result<(), Error> {
        let mut held = self.lock();
        let before = held.asked;
        take_changes(&mut held.script, &before, &asked);
        held.asked = asked;
        held.apply()
    }

    /// Sets `name` from outside, whatever the script says, from the next update on: to a number, to false (`clip_norm`: no limit), or
    /// to `"script"`, which lets the script decide again.
    ///
    /// Errors: [`Error::Argument`] for another name or value, and nothing changes.
    pub fn force(&self, name: &str, value: &Json) -> Result<(), Error> {
        let mut held = self.lock();
        let before = held.forced.clone();
        match value {
            Json::String(text) if text == "script" => {
                force(&mut held.script.clone(), name, Some(0.0))?;
                held.forced.remove(name);
            }
            Json::Bool(false) => drop(held.forced.insert(name.into(), None)),
            other => {
                let number = other.as_f64();
                let number = number.ok_or_else(|| Error::argument("set", name, "a number, `false` or `script`", other))?;
                held.forced.insert(name.into(), Some(number));
            }
        }
        held.apply().inspect_err(|_| held.forced = before)
    }

    fn kind(&self) -> Kind {
        Kind::of(&self.lock().script)
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().expect("an update does not panic under this lock")
    }

    /// A number that changes with every update and with every setting.
    pub fn version(&self) -> u64 {
        let held = self.lock();
        held.adamw.steps() + held.adamw.skipped() + held.applied
    }
}

/// Functions of `engine.optim`.
pub const FUNCTIONS: &[Function] = &[
    Function { op: "optim.adamw", params: &["model", "options?"], call: |call| make(call, ADAMW) },
    Function { op: "optim.muon", params: &["model", "options?"], call: |call| make(call, MUON) },
];

fn make(call: &Call, kind: Kind) -> super::call::Answer {
    let model = call.object::<ModelObject>(0)?.clone();
    call.give(OptimizerObject::new(call.lua, call.op, kind, &model, &call.options(1, kind.options)?)?)
}

fn step(call: &Call) -> super::call::Answer {
    let (step, skipped, is_news) = {
        let this = call.subject::<OptimizerObject>()?;
        let adamw = &mut this.lock().adamw;
        let step = adamw.step()?;
        let is_news = !step.grad_norm.is_finite() && adamw.skipped().is_power_of_two();
        // A bad batch passes; with a bad weight nothing would ever be learned again.
        if is_news && let Some(weight) = adamw.broken_weight()? {
            let expected = "finite numbers: with others every gradient is NaN, and nothing is learned";
            return Err(Error::argument(call.op, weight, expected, "NaN or infinity in it; go on from a model that is whole").into());
        }
        (step, adamw.skipped(), is_news)
    };
    if is_news && let Some(screen) = call.lua.app_data_ref::<Screen>() {
        screen.note(&format!("a gradient was not finite; its update was not applied ({skipped} so far)"));
    }
    call.give((step.grad_norm, step.applied))
}

impl Class for OptimizerObject {
    const NAME: &'static str = "Optimizer";
    const METHODS: &'static [&'static [Function]] = &[&[
        Function {
            op: "Optimizer:clear",
            params: &[],
            call: |call| {
                call.subject::<OptimizerObject>()?.lock().adamw.clear_gradients();
                call.done()
            },
        },
        Function {
            op: "Optimizer:gradient_norm",
            params: &[],
            call: |call| call.give(call.subject::<OptimizerObject>()?.lock().adamw.gradient_norm()?),
        },
        Function {
            op: "Optimizer:set",
            params: &["options"],
            call: |call| {
                let replay = Replay::of(call.lua);
                let this = call.subject::<OptimizerObject>()?;
                let options = call.options(0, this.kind().changeable)?;
                this.set(call.op, replay.as_deref(), &options)?;
                call.done()
            },
        },
        Function { op: "Optimizer:step", params: &[], call: step },
    ]];
    const FIELDS: &'static [Field<Self>] = &[
        Field { name: "lr", get: |_, this| Ok(Value::Number(this.lock().adamw.settings().lr)) },
        Field { name: "skipped", get: |_, this| Ok(Value::Integer(this.lock().adamw.skipped() as i64)) },
        Field { name: "steps", get: |_, this| Ok(Value::Integer(this.lock().adamw.steps() as i64)) },
    ];
}

super::call::user_data!(OptimizerObject);
