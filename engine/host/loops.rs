//! `run:loop`: the long part of a run. The engine owns the counter; at the end of an iteration metrics are written and progress is
//! shown. What else happens there is `boundary.rs`'s.

use super::call::{Answer, Call, Class, Failed, Field, Function, as_tensor, describe};
use super::checkpoints;
use super::data::DataObject;
use super::interrupt::InLoop;
use super::options::Options;
use super::progress::{Progress, Report, short};
use super::raise::{Failure, message, raise};
use super::replay::{Replay, Target};
use super::run::Run;
use super::run_object::{check_name, standing};
use super::work::Work;
use crate::checkpoint::retention::{Best, Keep, Order};
use crate::error::{Error, Result};
use crate::tensor::place::live_bytes;
use mlua::{AnyUserData, IntoLuaMulti, Lua, MetaMethod, UserData, UserDataMethods, Value};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How far a loop has come; belongs to the run, so that it outlives the Lua state.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct LoopRecord {
    /// Iterations done.
    pub count: u64,
    pub finished: bool,
    /// Left by `break`: it does not go on, whatever its options say.
    pub broken: bool,
    /// Left by this error, which the script has caught if the run went on.
    #[serde(default)]
    pub error: Option<String>,
}

/// When a loop takes checkpoints, and which of them stay.
pub(super) struct Plan {
    /// Iterations between two; none for by time alone.
    pub(super) every: Option<u64>,
    /// Time between two.
    pub(super) interval: Option<Duration>,
    keep: Keep,
}

/// A checkpoint is taken this often where the script does not say.
const INTERVAL: Duration = Duration::from_secs(600);

impl Plan {
    fn read(options: &Options) -> Failed<Self> {
        let best = match options.string("keep_best")? {
            None => None,
            Some(text) => {
                let (order, metric) = match text.strip_prefix('-') {
                    Some(metric) => (Order::Highest, metric.to_string()),
                    None => (Order::Lowest, text),
                };
                Some(Best { metric, order, count: 1 })
            }
        };
        let keep =
            Keep { last: options.count("keep", 1)?.unwrap_or(2), every: options.count("keep_every", 1)?.map(|every| every as u64), best };
        let (every, interval) = match options.value("checkpoint_every")? {
            Value::Nil => (None, Some(INTERVAL)),
            Value::Boolean(false) => (None, None),
            _ => (options.count("checkpoint_every", 1)?.map(|every| every as u64), None),
        };
        Ok(Self { every, interval, keep })
    }

    /// Whether the script wants checkpoints.
    pub(super) fn is_on(&self) -> bool {
        self.every.is_some() || self.interval.is_some()
    }
}

/// A loop that runs.
pub(super) struct Loop {
    pub(super) run: Arc<Run>,
    pub(super) replay: Arc<Replay>,
    pub(super) path: String,
    pub(super) steps: Option<u64>,
    /// The data set that ends the loop, and how often it is read.
    over: Option<(DataObject, u64)>,
    pub(super) plan: Plan,
    /// Frames of the path where the loop began.
    depth: usize,
    is_outermost: bool,
    work: Option<Arc<Work>>,
    state: Mutex<State>,
}

pub(super) struct State {
    /// The iteration that is under way.
    current: Option<u64>,
    pub(super) next: u64,
    logged: Map<String, Json>,
    /// What was logged last, for the choice of the best checkpoint.
    pub(super) metrics: Map<String, Json>,
    /// Whether it was said that `keep_best` names what is not logged.
    told_of_best: bool,
    pub(super) progress: Option<Progress>,
    in_loop: Option<InLoop>,
    step_started: Instant,
    /// Iterations when the last checkpoint was taken, and when that was.
    pub(super) saved: (u64, Instant),
    /// Tokens and operations counted when the step began.
    work_before: (u64, u64),
}

const OPTIONS: [&str; 7] = ["steps", "epochs", "over", "checkpoint_every", "keep", "keep_every", "keep_best"];

/// `run:loop(name, options)`: what Lua's `for` needs, with the loop as its closing value.
pub fn start(call: &Call) -> Answer {
    let (run, replay) = standing(call)?;
    let name = call.string(0)?;
    check_name(call.op, &name)?;
    let options = call.options(1, &OPTIONS)?;
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
            data.set_epochs(epochs, replay.trial().is_some())?;
            Some((data, epochs))
        }
        (Some(data), None) => Some((data, 1)),
        (None, None) => None,
    };
    if steps.is_none() && over.is_none() {
        return Err(Error::argument(call.op, "options", "steps, or over with a data set, to say where the loop ends", "neither").into());
    }
    let plan = Plan::read(&options)?;
    let path = replay.path(&name);
    let arrives = replay.target() == Some(Target::Loop(path.clone()));
    let known = run.loops.lock().expect("no panic happens under this lock").get(&path).cloned();
    let next = match (&known, replay.is_replaying()) {
        (None, false) => 0,
        (Some(record), true) if arrives => record.count,
        // The run has left it behind: nothing of it is done again.
        (Some(record), true) if record.finished => return passed_over(call),
        (None, true) if replay.notes().is_some() => 0,
        (Some(LoopRecord { error: Some(error), .. }), true) => return Err(mlua::Error::RuntimeError(error.clone()).into()),
        (Some(_), true) | (None, true) => {
            let goal = match replay.target() {
                Some(Target::Loop(goal) | Target::Step(goal)) => goal,
                None => String::new(),
            };
            return Err(Error::Diverged {
                what: format!("the loop `{path}`"),
                how: format!("the run stands in `{goal}`, and the script comes to this loop first"),
                remedy: "start another run for another script".into(),
            }
            .into());
        }
        (Some(_), false) => {
            let what = format!("{}: the loop \"{path}\" has run already; give each loop of a run its own name", call.op);
            return Err(Failure::message(what));
        }
    };
    if let Some(notes) = replay.notes() {
        let what = format!("loop {path}");
        let stops = match known {
            Some(record) if arrives => notes.run(&what, &format!("from step {}", record.count), true),
            _ => notes.run(&what, "from its beginning", true),
        };
        return Err(stops.into());
    }
    let trial = replay.trial().cloned();
    let mut metrics = Map::new();
    if arrives {
        match &trial {
            Some(trial) => trial.arrive(call.lua, &run, &replay)?,
            None => checkpoints::arrive(call.lua, &run, &replay)?,
        }
        // What was logged last still counts in the choice of the best.
        metrics = match &trial {
            Some(trial) => trial.metrics(),
            None => run.checkpoints.origin().map_or_else(Map::new, |origin| origin.manifest.metrics.clone()),
        };
        if known.is_some_and(|record| record.broken) {
            return passed_over(call);
        }
    }
    run.loops.lock().expect("no panic happens under this lock").insert(path.clone(), LoopRecord { count: next, ..LoopRecord::default() });
    let is_outermost = replay.loop_depth() == 0;
    if is_outermost {
        run.reached_loop();
    }
    let work = call.lua.app_data_ref::<Arc<Work>>().map(|work| work.clone());
    let state = State {
        current: None,
        next,
        logged: Map::new(),
        metrics,
        told_of_best: false,
        progress: Some(Progress::start(&run.screen, &path, steps)),
        in_loop: is_outermost.then(InLoop::enter),
        step_started: Instant::now(),
        saved: trial.map_or_else(|| (next, Instant::now()), |trial| trial.saved()),
        work_before: (0, 0),
    };
    let depth = replay.depth();
    let looping = Loop { run, replay, path, steps, over, plan, depth, is_outermost, work, state: Mutex::new(state) };
    let looping = LoopObject(Arc::new(looping));
    let next = call.lua.create_function(|lua, (looping, _): (Value, Value)| {
        let held = looping.as_userdata().and_then(|object| Some(object.borrow::<LoopObject>().ok()?.0.clone()));
        let Some(looping) = held else {
            return Err(raise(lua, Failure::message("Run:loop: what it gives belongs into a `for`: for step in run:loop(...) do")));
        };
        match Loop::next(&looping, lua) {
            Ok(Some(step)) => Ok(Value::UserData(lua.create_userdata(step)?)),
            Ok(None) => Ok(Value::Nil),
            Err(failure) => Err(raise(lua, failure)),
        }
    })?;
    let object = call.lua.create_userdata(looping)?;
    Ok((next, object.clone(), Value::Nil, object).into_lua_multi(call.lua)?)
}

/// A loop that ends before it begins.
fn passed_over(call: &Call) -> Answer {
    let next = call.lua.create_function(|_, _: mlua::MultiValue| Ok(Value::Nil))?;
    Ok((next, Value::Nil, Value::Nil).into_lua_multi(call.lua)?)
}

impl Loop {
    /// Ends the current step, if there is one, and begins the next.
    fn next(this: &Arc<Self>, lua: &Lua) -> Failed<Option<Step>> {
        let mut state = this.state.lock().expect("no panic happens under this lock");
        if state.current.is_some() {
            this.prove(lua)?;
        }
        this.end_step(&mut state)?;
        // A generation on trial is still at the boundary where it got the run.
        if this.is_outermost && this.replay.trial().is_none() {
            this.boundary(lua, &mut state)?;
        }
        let data_ended = match &this.over {
            Some((data, _)) if state.next > 0 && !data.has_begun() => {
                this.close(&mut state, true);
                let expected = "a data set that the loop takes from; without a `take` it would never end";
                return Err(Error::argument("Run:loop", "over", expected, "one of which the first step took nothing").into());
            }
            Some((data, _)) => !data.has_more()?,
            None => false,
        };
        if data_ended || this.steps.is_some_and(|steps| state.next >= steps) {
            this.finish(lua, &mut state, false)?;
            return Ok(None);
        }
        let index = state.next;
        this.replay.enter_iteration(&this.path, index);
        state.next += 1;
        state.current = Some(index);
        state.step_started = Instant::now();
        state.work_before = this.work.as_ref().map_or((0, 0), |work| work.so_far());
        Ok(Some(Step { of: this.clone(), index }))
    }

    /// An iteration is done, or the loop is: what is on trial has proved itself.
    fn prove(&self, lua: &Lua) -> Result<()> {
        match self.replay.trial() {
            Some(trial) if self.is_outermost => trial.accept(lua, &self.run),
            _ => Ok(()),
        }
    }

    pub(super) fn checkpoint(&self, lua: &Lua, state: &mut State) -> Failed<()> {
        if let Some(best) = self.plan.keep.best.as_ref().filter(|best| !state.metrics.contains_key(&best.metric))
            && !std::mem::replace(&mut state.told_of_best, true)
        {
            let logged = state.metrics.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
            let logged = if logged.is_empty() { "nothing was".into() } else { format!("what was: {logged}") };
            let what =
                format!("keep_best of {}: no `{}` was logged so far ({logged}), so no checkpoint is the best", self.path, best.metric);
            self.run.screen.note(&what);
        }
        checkpoints::at_boundary(lua, &self.run, &self.path, state.next, state.metrics.clone(), &self.plan.keep)?;
        state.saved = (state.next, Instant::now());
        Ok(())
    }

    /// The loop has come to its end, or was left by `break`. What it did is kept before anything else is done.
    fn finish(&self, lua: &Lua, state: &mut State, broken: bool) -> Failed<()> {
        self.prove(lua)?;
        self.close(state, false);
        if let Some(record) = self.run.loops.lock().expect("no panic happens under this lock").get_mut(&self.path) {
            (record.finished, record.broken) = (true, broken);
        }
        if self.is_outermost && self.plan.is_on() && state.next > state.saved.0 {
            self.checkpoint(lua, state)?;
        }
        Ok(())
    }

    /// Writes the step's line, shows it, counts it.
    fn end_step(&self, state: &mut State) -> Result<()> {
        let Some(index) = state.current.take() else { return Ok(()) };
        self.replay.leave_to(self.depth);
        // Loops of the next iteration may have the names of those of this one.
        let inner = format!("{}[", self.path);
        self.run.loops.lock().expect("no panic happens under this lock").retain(|path, _| !path.starts_with(&inner));
        let logged = std::mem::take(&mut state.logged);
        let shown: Vec<(String, String)> = logged.iter().map(|(name, value)| (name.clone(), shown(value))).collect();
        let seconds = state.step_started.elapsed().as_secs_f64();
        let work = self.work.as_ref().map_or((0, 0), |work| work.so_far());
        let tokens = work.0.saturating_sub(state.work_before.0);
        let operations = work.1.saturating_sub(state.work_before.1);
        let rate = (tokens > 0).then(|| tokens as f64 / seconds);
        let measure = self.work.as_ref().filter(|_| operations > 0);
        let share = measure.and_then(|work| work.share_of_peak(operations as f64 / seconds));
        if !logged.is_empty() {
            let mut line = Map::new();
            line.insert("loop".into(), Json::from(self.path.as_str()));
            line.insert("step".into(), Json::from(index));
            let mut timing = line.clone();
            timing.insert("time".into(), Json::from(self.run.seconds()));
            timing.insert("step_seconds".into(), Json::from(seconds));
            timing.extend(rate.map(|rate| ("tokens_per_second".to_string(), Json::from(rate))));
            timing.extend(share.map(|share| ("share_of_peak".to_string(), Json::from(share))));
            timing.insert("tensor_bytes".into(), Json::from(live_bytes()));
            state.metrics.extend(logged.clone());
            line.extend(logged);
            self.run.write_metrics(&line, &timing)?;
        }
        if let Some(record) = self.run.loops.lock().expect("no panic happens under this lock").get_mut(&self.path) {
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

    /// Ends the display. `left` is true where the loop is not at its end.
    pub(super) fn close(&self, state: &mut State, left: bool) {
        state.progress = None;
        if !left {
            state.in_loop = None;
        }
        self.replay.leave_to(self.depth);
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
            let tensor = tensor.on_host()?;
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
            if state.in_loop.is_none() && state.progress.is_none() {
                return Ok(());
            }
            // Left by `break`: the step counts, and the loop is done. Left by an error: neither.
            if !error.is_nil() {
                looping.close(&mut state, false);
                let text = match &error {
                    Value::Error(error) => message(error),
                    other => other.to_string().unwrap_or_default(),
                };
                if let Some(record) = looping.run.loops.lock().expect("no panic happens under this lock").get_mut(&looping.path) {
                    record.error = Some(text);
                }
                return Ok(());
            }
            let ended = looping.prove(lua).and_then(|()| looping.end_step(&mut state));
            let ended = ended.map_err(Failure::from).and_then(|()| looping.finish(lua, &mut state, true));
            ended.map_err(|failure| raise(lua, failure))
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
            step.of.run.note_logged();
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

super::call::user_data!(Step);
