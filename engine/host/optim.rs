//! `engine.optim`: optimizers in scripts. An optimizer consumes the gradients that `backward` left in its model.

use super::call::{Call, Class, Failed, Field, Function, register};
use super::model::ModelObject;
use super::options::Options;
use super::progress::Screen;
use crate::error::Error;
use crate::train::optimizer::{AdamW, Settings};
use mlua::{UserData, UserDataMethods, Value};
use std::sync::{Arc, Mutex, MutexGuard};

/// An optimizer in Lua. Cheap to clone: clones are one optimizer.
#[derive(Clone)]
pub struct OptimizerObject(Arc<Mutex<AdamW>>);

/// Options of an optimizer.
pub const OPTIONS: &[&str] = &["lr", "betas", "eps", "weight_decay", "decay_vectors", "clip_norm"];

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
    settings.check()?;
    Ok(settings)
}

impl OptimizerObject {
    /// AdamW over the parameters of `model`.
    ///
    /// Errors: [`Error::Argument`] for a setting that cannot be meant, or a model of which nothing trains.
    pub fn adamw(op: &'static str, model: &ModelObject, options: &Options) -> Failed<Self> {
        let settings = settings(op, Settings::default(), options)?;
        Ok(Self(Arc::new(Mutex::new(AdamW::new(model.model.parameters(), settings)?))))
    }

    /// Changes settings from the next step on.
    ///
    /// Errors: as [`OptimizerObject::adamw`].
    pub fn set(&self, op: &'static str, options: &Options) -> Failed<()> {
        let mut adamw = self.lock();
        let settings = settings(op, adamw.settings(), options)?;
        Ok(adamw.set(settings)?)
    }

    fn lock(&self) -> MutexGuard<'_, AdamW> {
        self.0.lock().expect("an update does not panic under this lock")
    }
}

/// Functions of `engine.optim`.
pub const FUNCTIONS: &[Function] = &[Function {
    op: "optim.adamw",
    params: &["model", "options?"],
    call: |call| {
        let model = call.object::<ModelObject>(0)?.clone();
        call.give(OptimizerObject::adamw(call.op, &model, &call.options(1, OPTIONS)?)?)
    },
}];

fn step(call: &Call) -> super::call::Answer {
    let (step, skipped) = {
        let this = call.subject::<OptimizerObject>()?;
        let mut adamw = this.lock();
        (adamw.step(), adamw.skipped())
    };
    if !step.grad_norm.is_finite()
        && let Some(screen) = call.lua.app_data_ref::<Screen>()
    {
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
                call.subject::<OptimizerObject>()?.lock().clear_gradients();
                call.done()
            },
        },
        Function {
            op: "Optimizer:gradient_norm",
            params: &[],
            call: |call| call.give(call.subject::<OptimizerObject>()?.lock().gradient_norm()),
        },
        Function {
            op: "Optimizer:set",
            params: &["options"],
            call: |call| {
                call.subject::<OptimizerObject>()?.set(call.op, &call.options(0, OPTIONS)?)?;
                call.done()
            },
        },
        Function { op: "Optimizer:step", params: &[], call: step },
    ]];
    const FIELDS: &'static [Field<Self>] = &[
        Field { name: "lr", get: |_, this| Ok(Value::Number(this.lock().settings().lr)) },
        Field { name: "skipped", get: |_, this| Ok(Value::Integer(this.lock().skipped() as i64)) },
        Field { name: "steps", get: |_, this| Ok(Value::Integer(this.lock().steps() as i64)) },
    ];
}

impl UserData for OptimizerObject {
    fn add_methods<M: UserDataMethods<Self>>(methods: &mut M) {
        register(methods);
    }
}
