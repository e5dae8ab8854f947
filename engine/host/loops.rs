//! `run:loop`: the long part of a run. The engine owns the counter; the end of an iteration is the only boundary, where
//! metrics are written, progress is shown and the user's wish to stop is taken.

use super::call::{Answer, Call, Class, Field, Function, as_tensor, describe, register};
use super::data::DataObject;
use super::interrupt::{self, InLoop};
use super::progress::{Progress, Report, short};
use super::raise::{Failure, raise};
use super::run::{Run, RunObject, check_name};
use super::work::Work;
use crate::error::{Error, Result};
use crate::kernels::buffer::live_bytes;
use mlua::{AnyUserData, IntoLuaMulti, Lua, MetaMethod, UserData, UserDataMethods, Value};
use serde_json::{Map, Value as Json};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// How far a loop has come; belongs to the run, so that it outlives the Lua state.
#[derive(Clone, Debug, Default)]
pub struct LoopRecord {
    /// Iterations done.
    pub count: u64,
    pub finished: bool,
}

/// A loop that runs.
struct Loop {
    run: Arc<Run>,
    name: String,
    steps: Option<u64>,
    /// The data set that ends the loop, and how often it is read.
    over: Option<(DataObject, u64)>,
    work: Option<Arc<Work>>,
    state: Mutex<State>,
}

struct State {
    /// The iteration that is under way.
    current: Option<u64>,
    next: u64,
    logged: Map<String, Json>,
    progress: Option<Progress>,
    in_loop: Option<InLoop>,
    step_started: Instant,
    /// Tokens and operations counted when the step began.
    work_before: (u64, u64),
}

/// `run:loop(name, options)`: what Lua's `for` needs, with the loop as its closing value.
pub fn start(call: &Call) -> Answer {
    let run = call.subject::<RunObject>()?.0.clone();
    let name = call.string(0)?;
    check_name(call.op, &name)?;
    let options = call.options(1, &["steps", "epochs", "over"])?;
    let steps = options.count("steps", 0)?.map(|steps| steps as u64);
    let epochs = options.count("epochs", 1)?.map(|epochs| epochs as u64);
    let over = match options.value("over")? {
        Value::Nil => None,
        Value::UserData(object) if object.is::<DataObject>() => Some(object.borrow::<DataObject>()?.clone()),
        other => return Err(Error::argument(call.op, "over", "a data set", describe(&other)).into()),
    };
    let over = match (over, epochs) {
        (None, Some(_)) => return Err(Error::argument(call.op, "over", "given with epochs: the data set to read", "nil").into()),
        (Some(data), Some(epochs)) => {
            data.set_epochs(epochs)?;
            Some((data, epochs))
        }
        (Some(data), None) => Some((data, 1)),
        (None, None) => None,
    };
    if steps.is_none() && over.is_none() {
        return Err(Error::argument(call.op, "options", "steps, or over with a data set, to say where the loop ends", "neither").into());
    }
    let work = call.lua.app_data_ref::<Arc<Work>>().map(|work| work.clone());
    let mut records = run.loops.lock().expect("no panic happens under this lock");
    // A loop inside a step of another is told apart by that step.
    let running = records.iter().filter(|(_, record)| !record.finished);
    let outer = running.max_by_key(|(name, _)| name.len()).map(|(name, record)| format!("{name}[{}]/", record.count));
    let path = format!("{}{name}", outer.unwrap_or_default());
    if records.contains_key(&path) {
        let what = format!("{}: the loop \"{name}\" has run already; give each loop of a run its own name", call.op);
        return Err(Failure::message(what));
    }
    records.insert(path.clone(), LoopRecord::default());
    drop(records);
    let progress = Some(Progress::start(&run.screen, &path, steps));
    let state = State {
        current: None,
        next: 0,
        logged: Map::new(),
        progress,
        in_loop: Some(InLoop::enter()),
        step_started: Instant::now(),
        work_before: (0, 0),
    };
    let looping = LoopObject(Arc::new(Loop { run, name: path, steps, over, work, state: Mutex::new(state) }));
    let next = call.lua.create_function(|lua, (looping, _): (Value, Value)| {
        let held = looping.as_userdata().and_then(|object| Some(object.borrow::<LoopObject>().ok()?.0.clone()));
        let Some(looping) = held else {
            return Err(raise(lua, Failure::message("Run:loop: what it gives belongs into a `for`: for step in run:loop(...) do")));
        };
        match Loop::next(&looping) {
            Ok(Some(step)) => Ok(Value::UserData(lua.create_userdata(step)?)),
            Ok(None) => Ok(Value::Nil),
            Err(error) => Err(raise(lua, error.into())),
        }
    })?;
    let object = call.lua.create_userdata(looping)?;
    Ok((next, object.clone(), Value::Nil, object).into_lua_multi(call.lua)?)
}

impl Loop {
    /// Ends the current step, if there is one, and begins the next.
    fn next(this: &Arc<Self>) -> Result<Option<Step>> {
        let mut state = this.state.lock().expect("no panic happens under this lock");
        this.end_step(&mut state)?;
        if interrupt::is_pending() {
            this.close(&mut state);
            this.run.screen.note(&format!("stopped by the user after step {} of {}", state.next, this.name));
            return Err(Error::Interrupted);
        }
        let data_ended = match &this.over {
            Some((data, _)) if state.next > 0 && !data.has_begun() => {
                this.close(&mut state);
                let expected = "a data set that the loop takes from; without a `take` it would never end";
                return Err(Error::argument("Run:loop", "over", expected, "one of which the first step took nothing"));
            }
            Some((data, _)) => !data.has_more()?,
            None => false,
        };
        if data_ended || this.steps.is_some_and(|steps| state.next >= steps) {
            this.close(&mut state);
            return Ok(None);
        }
        let index = state.next;
        state.next += 1;
        state.current = Some(index);
        state.step_started = Instant::now();
        state.work_before = this.work.as_ref().map_or((0, 0), |work| work.so_far());
        Ok(Some(Step { of: this.clone(), index }))
    }

    /// The boundary: writes the step's line, shows it, counts it.
    fn end_step(&self, state: &mut State) -> Result<()> {
        let Some(index) = state.current.take() else { return Ok(()) };
        let logged = std::mem::take(&mut state.logged);
        let shown: Vec<(String, String)> = logged.iter().map(|(name, value)| (name.clone(), shown(value))).collect();
        let seconds = state.step_started.elapsed().as_secs_f64();
        let work = self.work.as_ref().map_or((0, 0), |work| work.so_far());
        let tokens = work.0.saturating_sub(state.work_before.0);
        let operations = work.1.saturating_sub(state.work_before.1);
        let rate = (tokens > 0).then(|| tokens as f64 / seconds);
        let measure = self.work.as_ref().filter(|_| operations > 0);
        let share = measure.map(|work| work.share_of_peak(operations as f64 / seconds));
        if !logged.is_empty() {
            let mut line = Map::new();
            line.insert("loop".into(), Json::from(self.name.as_str()));
            line.insert("step".into(), Json::from(index));
            line.insert("time".into(), Json::from(self.run.seconds()));
            line.insert("step_seconds".into(), Json::from(seconds));
            line.extend(rate.map(|rate| ("tokens_per_second".to_string(), Json::from(rate))));
            line.extend(share.map(|share| ("share_of_peak".to_string(), Json::from(share))));
            line.insert("tensor_bytes".into(), Json::from(live_bytes()));
            line.extend(logged);
            self.run.write_metrics(&line)?;
        }
        if let Some(record) = self.run.loops.lock().expect("no panic happens under this lock").get_mut(&self.name) {
            record.count = index + 1;
        }
        let done = self.share_done(index + 1);
        let report = Report { count: index + 1, done, values: &shown, tokens_per_second: rate, share_of_peak: share };
        if let Some(progress) = &mut state.progress {
            progress.step(&report);
        }
        Ok(())
    }

    /// Share of the loop that is done after `count` steps: of its steps or of its data, whichever ends it sooner.
    fn share_done(&self, count: u64) -> Option<f64> {
        let by_steps = self.steps.map(|steps| count as f64 / steps as f64);
        let by_data = self.over.as_ref().and_then(|(data, epochs)| data.share_done(*epochs));
        by_steps.into_iter().chain(by_data).reduce(f64::max)
    }

    fn close(&self, state: &mut State) {
        state.progress = None;
        state.in_loop = None;
        if let Some(record) = self.run.loops.lock().expect("no panic happens under this lock").get_mut(&self.name) {
            record.finished = true;
        }
    }
}

fn shown(value: &Json) -> String {
    match value {
        Json::Number(number) if number.is_f64() => short(number.as_f64().unwrap_or(f64::NAN)),
        Json::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Names that the engine writes into each line itself.
const OWN_NAMES: [&str; 7] = ["loop", "step", "time", "step_seconds", "tokens_per_second", "share_of_peak", "tensor_bytes"];

/// The table of values at argument `index`, sorted by name: numbers, strings, booleans, tensors of one element.
pub fn logged_values(call: &Call, index: usize) -> Result<Map<String, Json>, Failure> {
    let table = call.table(index)?;
    let mut values = Vec::new();
    for pair in table.pairs::<Value, Value>() {
        let (key, value) = pair?;
        let Value::String(name) = &key else {
            return Err(Error::argument(call.op, "values", "values with names, such as { loss = loss }", describe(&key)).into());
        };
        let name = name.to_string_lossy();
        if OWN_NAMES.contains(&name.as_str()) {
            return Err(Error::argument(call.op, "values", "another name", format!("`{name}`, which the engine writes itself")).into());
        }
        values.push((name.clone(), logged_value(call.op, &name, &value)?));
    }
    values.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(values.into_iter().collect())
}

fn logged_value(op: &'static str, name: &str, value: &Value) -> Result<Json, Failure> {
    // JSON has no NaN and no infinity; a run that diverges must still be readable.
    let number = |value: f64| if value.is_finite() { Json::from(value) } else { Json::from(value.to_string()) };
    if let Some(tensor) = as_tensor(value) {
        if tensor.len() == 1 {
            tensor.force()?;
            return Ok(number(f64::from(tensor.to_f32_vec()[0])));
        }
        let expected = "a number, or a tensor of one element (take its :mean())";
        return Err(Error::argument(op, name, expected, describe(value)).into());
    }
    match value {
        Value::Integer(value) => Ok(Json::from(*value)),
        Value::Number(value) => Ok(number(*value)),
        Value::Boolean(value) => Ok(Json::from(*value)),
        Value::String(text) => Ok(Json::from(text.to_string_lossy())),
        other => Err(Error::argument(op, name, "a number, string, boolean or tensor of one element", describe(other)).into()),
    }
}

/// Holds a loop for Lua's `for`, which closes it when the loop is left.
struct LoopObject(Arc<Loop>);

impl UserData for LoopObject {
    fn add_methods<M: UserDataMethods<Self>>(methods: &mut M) {
        methods.add_meta_function(MetaMethod::Close, |lua: &Lua, (looping, error): (AnyUserData, Value)| {
            let looping = looping.borrow::<LoopObject>()?.0.clone();
            let mut state = looping.state.lock().expect("no panic happens under this lock");
            // Left by `break`: the step counts. Left by an error: it does not.
            let ended = if error.is_nil() { looping.end_step(&mut state) } else { Ok(()) };
            looping.close(&mut state);
            ended.map_err(|error| raise(lua, error.into()))
        });
    }
}

/// One iteration, as the script holds it.
pub struct Step {
    of: Arc<Loop>,
    index: u64,
}

impl Class for Step {
    const NAME: &'static str = "Step";
    const METHODS: &'static [&'static [Function]] = &[&[Function {
        op: "Step:log",
        params: &["values"],
        call: |call| {
            let step = call.subject::<Step>()?;
            let values = logged_values(call, 0)?;
            let mut state = step.of.state.lock().expect("no panic happens under this lock");
            if state.current != Some(step.index) {
                return Err(Failure::message(format!("{}: step {} is over", call.op, step.index)));
            }
            state.logged.extend(values);
            call.done()
        },
    }]];
    const FIELDS: &'static [Field<Self>] = &[
        Field { name: "count", get: |_, step| Ok(Value::Integer(step.index as i64 + 1)) },
        Field { name: "first", get: |_, step| Ok(Value::Boolean(step.index == 0)) },
        Field { name: "index", get: |_, step| Ok(Value::Integer(step.index as i64)) },
        Field { name: "last", get: |_, step| Ok(Value::Boolean(step.of.steps == Some(step.index + 1))) },
        Field { name: "progress", get: |_, step| Ok(step.of.share_done(step.index).map_or(Value::Nil, Value::Number)) },
        Field { name: "steps", get: |_, step| Ok(step.of.steps.map_or(Value::Nil, |steps| Value::Integer(steps as i64))) },
    ];
}

impl UserData for Step {
    fn add_methods<M: UserDataMethods<Self>>(methods: &mut M) {
        register(methods);
    }
}
