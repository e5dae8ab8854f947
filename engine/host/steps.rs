//! `run:step`: work that is done once. Its result is recorded; whenever the script comes to the same step again, after a crash or
//! an edit, it gets the recorded result. Source: durable execution as in Temporal and DBOS, with names in place of positions.

use super::call::{Answer, Call, Class, Failed, Field, Function};
use super::globals::{enter_scope, leave_scope};
use super::options::Options;
use super::plain::Plain;
use super::plan::Notes;
use super::raise::{explain, is_final, is_stop, is_timeout, message, place};
use super::replay::{Replay, Target, must_end};
use super::run::{Run, unix_seconds};
use super::run_object::{check_name, standing};
use super::{checkpoints, results, states};
use crate::error::{Error, Result};
use crate::store::Durability;
use crate::store::records::{StepRecord, StepStatus};
use mlua::{Lua, MultiValue, Value};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// When and how often a step is tried again.
struct Policy {
    attempts: u32,
    /// Seconds before the second attempt; doubles from one to the next.
    backoff: f64,
    /// Seconds that one attempt may take.
    timeout: Option<f64>,
    /// Texts of errors that no further attempt would mend.
    finals: Vec<String>,
}

impl Policy {
    fn read(options: &Options) -> Failed<Self> {
        let seconds = |name: &'static str| -> Failed<Option<f64>> {
            match options.number(name)? {
                Some(seconds) if !(seconds.is_finite() && (0.0..1e9).contains(&seconds)) => {
                    Err(Error::argument("Run:step", name, "seconds, from 0", seconds).into())
                }
                seconds => Ok(seconds),
            }
        };
        let attempts = options.count("attempts", 1)?.unwrap_or(1);
        Ok(Self {
            attempts: u32::try_from(attempts).unwrap_or(u32::MAX),
            backoff: seconds("backoff")?.unwrap_or(1.0),
            timeout: seconds("timeout")?,
            finals: options.strings("final")?.unwrap_or_default(),
        })
    }
}

/// The record of a step that begins now.
pub fn started(key: &str, generation: u32) -> StepRecord {
    StepRecord {
        key: key.into(),
        fingerprint: String::new(),
        inputs: String::new(),
        code: String::new(),
        status: StepStatus::Started,
        output: None,
        error: None,
        attempts: 0,
        started: unix_seconds(),
        ended: None,
        generation,
        seconds: 0.0,
    }
}

/// `run:step(name, inputs, body, options)`: the results of `body`, which runs at most once to its end.
pub fn step(call: &Call) -> Answer {
    let (run, replay) = standing(call)?;
    let name = call.string(0)?;
    check_name(call.op, &name)?;
    let inputs = Plain::of(call.op, "inputs", &call.value(1))?.canonical();
    let body = call.function(2)?;
    let policy = Policy::read(&call.options(3, &["attempts", "backoff", "timeout", "final"])?)?;
    let key = replay.numbered_path(&name);
    let mut record = started(&key, replay.generation);
    record.fingerprint = hash(inputs.as_bytes());
    record.inputs = inputs;
    record.code = hash(&body.dump(true));
    let behind = is_behind(&run, &replay, &key);
    let recorded = run.store.step(&key);
    if let Some(notes) = replay.notes() {
        note(notes, &replay, recorded.as_ref(), &record)?;
    }
    let known = recorded.filter(|known| known.status == StepStatus::Done || known.status == StepStatus::Failed && behind);
    let Some((known, output)) = known.and_then(|known| known.output.clone().map(|output| (known, output))) else {
        // A step around the loop has not come to its end, and is entered again.
        if replay.trial().is_some() && replay.is_replaying() && !is_around(&replay, &key) {
            return Err(Error::Diverged {
                what: format!("the step `{key}`"),
                how: "the run has not done it, and a reload does nothing new above its loop".into(),
                remedy: "put it into the loop or behind it, or stop the run and go on with: perilune resume RUN --code new".into(),
            }
            .into());
        }
        return execute(call, &run, &replay, &body, &policy, record);
    };
    // On the way to a checkpoint the same code may come with other inputs: between two loops it sees the state as it was first
    // made, not as the first loop left it. The record is what it got. Other code or arguments are another matter.
    let other_arguments = run.facts.parent.as_ref().is_some_and(|parent| parent.other_arguments);
    if !behind || known.generation != replay.generation || other_arguments {
        check_inputs(&known, &record)?;
    }
    if replay.target() == Some(Target::Step(key.clone())) {
        checkpoints::arrive(call.lua, &run, &replay)?;
    }
    let values = results::read(call.lua, &run, &key, &output)?;
    if known.status == StepStatus::Done {
        return Ok(values);
    }
    // The script has caught this error and gone on to where the checkpoint was taken: it has to take the same way again.
    let message = values.front().and_then(Value::as_string).map_or_else(String::new, |text| text.to_string_lossy());
    Err(mlua::Error::RuntimeError(message).into())
}

/// Whether the loop that is come to is inside the step `key`.
fn is_around(replay: &Replay, key: &str) -> bool {
    matches!(replay.target(), Some(Target::Loop(path)) if path.starts_with(&format!("{key}/")))
}

/// Says what would become of a step. Errors: [`Error::Superseded`] where something would be done, which ends the notes.
fn note(notes: &Notes, replay: &Replay, known: Option<&StepRecord>, now: &StepRecord) -> Result<()> {
    let what = format!("step {}", now.key);
    match known {
        Some(known) if known.status == StepStatus::Done && known.fingerprint != now.fingerprint => {
            Err(notes.run(&what, &format!("its inputs were {} and are now {}", known.inputs, shorten(&now.inputs)), false))
        }
        Some(known) if known.status == StepStatus::Done => {
            notes.skip(&now.key, known.code != now.code);
            match replay.target() {
                Some(Target::Step(key)) if key == now.key => Err(notes.run("what follows", "from the checkpoint at that step's end", true)),
                _ => Ok(()),
            }
        }
        Some(known) if known.status == StepStatus::Failed && is_behind(&replay.run, replay, &now.key) => {
            notes.skip(&now.key, false);
            Ok(())
        }
        _ if is_around(replay, &now.key) => Ok(()),
        None => Err(notes.run(&what, "it is new", false)),
        Some(_) => Err(notes.run(&what, "it did not come to its end", false)),
    }
}

/// Whether the script repeats its way to a checkpoint that was taken after the step `key` had ended.
fn is_behind(run: &Run, replay: &Replay, key: &str) -> bool {
    // A generation on trial comes to a place that the run has reached in this process: every step above it had ended.
    replay.is_replaying() && (replay.trial().is_some() || run.checkpoints.origin().is_some_and(|origin| origin.state.steps.contains(key)))
}

fn hash(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex()[..32].to_string()
}

fn check_inputs(known: &StepRecord, now: &StepRecord) -> Result<()> {
    if known.fingerprint == now.fingerprint {
        return Ok(());
    }
    Err(Error::Diverged {
        what: format!("the step `{}`", known.key),
        how: format!("its inputs were {} and are now {}", known.inputs, shorten(&now.inputs)),
        remedy: "give it another name, or fork the run before it: perilune runs fork".into(),
    })
}

fn shorten(text: &str) -> String {
    const MAX: usize = 300;
    match text.char_indices().nth(MAX) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_string(),
    }
}

/// Runs `body`, as often as the policy allows, and records how it went.
fn execute(call: &Call, run: &Arc<Run>, replay: &Replay, body: &mlua::Function, policy: &Policy, mut record: StepRecord) -> Answer {
    let (lua, key) = (call.lua, record.key.clone());
    let resources_before = run.resources.version();
    let before = (run.changes(), states::fingerprints(lua, &run.states));
    let began = Instant::now();
    for attempt in 1.. {
        record.attempts = attempt;
        record.status = StepStatus::Started;
        run.store.put_step(record.clone(), Durability::Later)?;
        let outcome = attempt_once(lua, replay, body, policy, &key, attempt);
        record.seconds = began.elapsed().as_secs_f64();
        record.ended = Some(unix_seconds());
        let error = match outcome {
            Ok(values) => {
                let changed = (run.changes(), states::fingerprints(lua, &run.states)) != before;
                let values = finish(lua, run, replay, record, values, changed)?;
                return Ok(values);
            }
            Err(error) => error,
        };
        // Whoever stops the whole script stops no step; time that is over is this step's own affair.
        if must_end(lua).is_some() || is_stop(&error) && !is_timeout(&error) {
            return Err(error.into());
        }
        let what = explain(&error).to_string();
        let hopeless = is_final(&error) && !is_timeout(&error) || policy.finals.iter().any(|text| what.contains(text.as_str()));
        let changed = run.resources.version() != resources_before;
        if attempt < policy.attempts && !hopeless && !changed {
            let wait = policy.backoff * f64::from(1u32 << (attempt - 1).min(16));
            run.screen.note(&format!("step {key}: attempt {attempt} of {} failed, again in {wait:.1} s: {what}", policy.attempts));
            sleep(lua, wait)?;
            continue;
        }
        // Above this step, time that is over is an ordinary error, which a script may catch.
        let timeout = is_timeout(&error).then(|| format!("{}{what}", place(lua)));
        let raised = lua.create_string(timeout.clone().unwrap_or_else(|| message(&error)))?;
        let (raised, _) = results::write(lua, run, &key, MultiValue::from_iter([Value::String(raised)]))?;
        record.status = StepStatus::Failed;
        record.error = Some(what);
        record.output = Some(raised);
        run.store.put_step(record, Durability::Flushed)?;
        return Err(timeout.map_or(error, mlua::Error::RuntimeError).into());
    }
    unreachable!("the loop above ends by returning")
}

fn attempt_once(lua: &Lua, replay: &Replay, body: &mlua::Function, policy: &Policy, key: &str, attempt: u32) -> mlua::Result<MultiValue> {
    let depth = replay.depth();
    replay.enter_step(key, policy.timeout);
    enter_scope(lua, key);
    let result = body.call::<MultiValue>(StepContext { key: key.into(), attempt });
    leave_scope(lua);
    replay.leave_to(depth);
    result
}

/// Records a step that has come to its end. What it changed in resources or state, and what it logged, is made durable with it.
fn finish(lua: &Lua, run: &Arc<Run>, replay: &Replay, mut record: StepRecord, values: MultiValue, changed: bool) -> Answer {
    let (output, values) = results::write(lua, run, &record.key, values)?;
    record.status = StepStatus::Done;
    record.error = None;
    if changed && replay.loop_depth() > 0 {
        // A step in an iteration that changed weights, positions or state, or logged, is part of it, and done again with it.
        return Ok(values);
    }
    record.output = Some(output);
    if changed {
        checkpoints::after_step(lua, run, &record)?;
    }
    run.store.put_step(record.clone(), Durability::Flushed)?;
    Ok(values)
}

/// Waits, unless the script must end.
fn sleep(lua: &Lua, seconds: f64) -> Failed<()> {
    let end = Instant::now() + Duration::from_secs_f64(seconds);
    while let Some(left) = end.checked_duration_since(Instant::now()) {
        if let Some(error) = must_end(lua) {
            return Err(error.into());
        }
        std::thread::sleep(left.min(Duration::from_millis(20)));
    }
    Ok(())
}

/// What the body of a step gets.
pub struct StepContext {
    key: String,
    attempt: u32,
}

impl Class for StepContext {
    const NAME: &'static str = "StepContext";
    const METHODS: &'static [&'static [Function]] = &[];
    const FIELDS: &'static [Field<Self>] = &[
        Field { name: "attempt", get: |_, this| Ok(Value::Integer(this.attempt.into())) },
        Field { name: "key", get: |lua, this| Ok(Value::String(lua.create_string(&this.key)?)) },
    ];
}

super::call::user_data!(StepContext);
