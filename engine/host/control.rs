//! What users ask of a run while it lives: pause, go on, a checkpoint now, other settings, a reload. Wishes wait here until the next
//! boundary of an outermost loop takes them; what needs no boundary is answered at once. The way in is the socket in the run's
//! folder; a wish of the program itself (the watcher's) comes without anybody who waits.

use super::interrupt;
use super::run::{Run, unix_seconds};
use crate::error::{Error, Result};
use crate::serve::local_socket::{self, Listener};
use crate::store::records::{CheckpointRecord, EventRecord};
use serde_json::{Value as Json, json};
use std::collections::VecDeque;
use std::path::Path;
use std::sync::mpsc::{self, SyncSender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// What only a boundary can do.
#[derive(Clone, Debug, PartialEq)]
pub enum Wish {
    Pause,
    Continue,
    Checkpoint,
    /// Settings of optimizers: which optimizer, the setting's name, its value.
    Set(Vec<Setting>),
    /// Another generation of the script.
    Reload,
}

/// `policy.lr=1e-4`, taken apart.
#[derive(Clone, Debug, PartialEq)]
pub struct Setting {
    /// `optimizer` for the only one, else the name of its model.
    pub owner: String,
    pub name: String,
    /// A number, `false`, or `"script"`.
    pub value: Json,
}

/// A wish, and who waits for what becomes of it.
pub struct Asked {
    pub wish: Wish,
    answer: Option<SyncSender<Result<Json>>>,
}

impl Asked {
    /// Tells who asked what came of it.
    pub fn answer(self, outcome: Result<Json>) {
        if let Some(answer) = self.answer {
            // Who went away meanwhile wants no answer.
            let _ = answer.send(outcome);
        }
    }
}

/// Wishes that wait for the next boundary.
#[derive(Default)]
pub struct Control {
    waiting: Mutex<VecDeque<Asked>>,
    came: Condvar,
}

impl Control {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Asked>> {
        self.waiting.lock().expect("no panic happens under this lock")
    }

    fn push(&self, asked: Asked) {
        self.lock().push_back(asked);
        self.came.notify_all();
    }

    /// A wish of the program itself. One that waits already is not doubled.
    pub fn hint(&self, wish: Wish) {
        if !self.lock().iter().any(|asked| asked.wish == wish) {
            self.push(Asked { wish, answer: None });
        }
    }

    /// The next wish, if one waits.
    pub fn take(&self) -> Option<Asked> {
        self.lock().pop_front()
    }

    /// Waits for a wish, at most this long.
    pub fn wait(&self, time: Duration) {
        let waiting = self.lock();
        if waiting.is_empty() {
            drop(self.came.wait_timeout(waiting, time).expect("no panic happens under this lock"));
        }
    }

    /// Asks the run and waits for the boundary that answers. Errors: what came of it; [`Error::Script`] if the run ends first.
    fn ask(&self, wish: Wish) -> Result<Json> {
        let (answer, outcome) = mpsc::sync_channel(1);
        self.push(Asked { wish, answer: Some(answer) });
        outcome.recv().unwrap_or_else(|_| Err(Error::Script("the run ended before it came to this".into())))
    }
}

/// Opens the socket of `run`. Where that is impossible the run goes on without, and a line says so.
pub fn listen(run: &Arc<Run>) -> Option<Listener> {
    let asked = run.clone();
    match local_socket::listen(&run.folder, move |question| answer(&asked, question)) {
        Ok(listener) => Some(listener),
        Err(error) => {
            run.screen.note(&format!("the run cannot be asked or steered from outside: {error}"));
            None
        }
    }
}

fn answer(run: &Arc<Run>, question: &Json) -> Result<Json> {
    let text = |key: &str| question.get(key).and_then(Json::as_str);
    match (text("ask"), text("do")) {
        (Some("records"), _) => Ok(serde_json::to_value(run.store.records()).expect("records have text keys")),
        (Some("pin"), _) => {
            pin(run, text("checkpoint").unwrap_or_default(), question["pinned"].as_bool().unwrap_or(true))?;
            Ok(json!("done"))
        }
        (_, Some("pause")) => run.control.ask(Wish::Pause),
        (_, Some("continue")) => run.control.ask(Wish::Continue),
        (_, Some("checkpoint")) => run.control.ask(Wish::Checkpoint),
        (_, Some("reload")) => run.control.ask(Wish::Reload),
        (_, Some("set")) => run.control.ask(Wish::Set(settings(question)?)),
        (_, Some("stop")) => {
            interrupt::request();
            Ok(json!("stopping"))
        }
        _ => Err(Error::Script(format!("no such question: {question}; this engine is {}", env!("CARGO_PKG_VERSION")))),
    }
}

/// Keeps the checkpoint `name` from being removed, or lets it go.
fn pin(run: &Run, name: &str, pinned: bool) -> Result<()> {
    let known = run.store.checkpoints().into_iter().find(|record| record.name == name);
    let known = known.ok_or_else(|| Error::argument("pin", "checkpoint", "the name of one of the run's", format!("`{name}`")))?;
    run.store.put_checkpoint(CheckpointRecord { pinned, ..known })
}

fn settings(question: &Json) -> Result<Vec<Setting>> {
    let words = question["settings"].as_array().cloned().unwrap_or_default();
    words.iter().map(|word| setting(word.as_str().unwrap_or_default())).collect()
}

/// Takes `optimizer.lr=1e-4` apart.
///
/// Errors: [`Error::Argument`] for a word of another form.
pub fn setting(word: &str) -> Result<Setting> {
    let parts = word.split_once('=').and_then(|(place, value)| Some((place.rsplit_once('.')?, value)));
    let Some(((owner, name), value)) = parts.filter(|((owner, name), value)| !(owner.is_empty() || name.is_empty() || value.is_empty()))
    else {
        let expected = "NAME=VALUE such as optimizer.lr=1e-4, or with the name of a model in place of `optimizer`";
        return Err(Error::argument("set", "setting", expected, format!("`{word}`")));
    };
    let value = match value {
        "script" => json!("script"),
        "false" => json!(false),
        number => number
            .parse::<f64>()
            .ok()
            .filter(|number| number.is_finite())
            .map(|number| json!(number))
            .ok_or_else(|| Error::argument("set", name, "a number, `false` or `script`", format!("`{number}`")))?,
    };
    Ok(Setting { owner: owner.into(), name: name.into(), value })
}

/// Events that change settings.
const SET: &str = "set";

/// Records settings as events at the boundary of the loop `path` behind `step` iterations and applies them: all or none.
///
/// Errors: [`Error::Argument`] for an optimizer, a name or a value that there is not; those of the store.
pub fn set(run: &Run, path: &str, step: u64, settings: &[Setting]) -> Result<Json> {
    let mut done = Vec::new();
    let mut before = Vec::new();
    let mut apply = || -> Result<()> {
        for setting in settings {
            let (name, optimizer) = owner(run, &setting.owner)?;
            before.push((optimizer.clone(), optimizer.lock().forced.clone()));
            optimizer.force(&setting.name, &setting.value)?;
            done.push(json!({ "optimizer": name, "name": setting.name, "value": setting.value }));
        }
        for detail in &done {
            run.store.put_event(EventRecord {
                number: run.store.next_event_number(),
                time: unix_seconds(),
                kind: SET.into(),
                loop_path: Some(path.into()),
                step,
                detail: detail.clone(),
            })?;
        }
        Ok(())
    };
    if let Err(error) = apply() {
        for (optimizer, forced) in before.into_iter().rev() {
            let mut held = optimizer.lock();
            held.forced = forced;
            held.apply()?;
        }
        return Err(error);
    }
    Ok(json!({ "loop": path, "step": step, "set": done }))
}

fn owner(run: &Run, owner: &str) -> Result<(String, super::optim::OptimizerObject)> {
    let all = run.resources.optimizers();
    let mut fitting = all.iter().filter(|(name, _, model)| owner == "optimizer" || name == owner || model == owner);
    match (fitting.next(), fitting.next()) {
        (Some((name, optimizer, _)), None) => Ok((name.clone(), optimizer.clone())),
        (found, _) => {
            let models: Vec<&str> = all.iter().map(|(_, _, model)| model.as_str()).collect();
            let expected = format!("that of one optimizer: its model's name, one of: {}", models.join(", "));
            let got = if found.is_some() { "`optimizer`, of which there are several".into() } else { format!("`{owner}`") };
            Err(Error::argument("set", "name", expected, got))
        }
    }
}

/// Applies what was set at this boundary before: a resumed run comes by again.
///
/// - `seen`: the number of the last event that the run has in it
/// - returns that number now
///
/// Errors: as [`set`].
pub fn apply_recorded(run: &Run, path: &str, step: u64, seen: u64) -> Result<u64> {
    // Every step comes by here, and nearly always there is nothing.
    if run.store.next_event_number() <= seen + 1 {
        return Ok(seen);
    }
    let here = |event: &EventRecord| event.number > seen && event.step == step && event.loop_path.as_deref() == Some(path);
    let mut last = seen;
    for event in run.store.events().into_iter().filter(here) {
        if event.kind == SET {
            let text = |key: &str| event.detail[key].as_str().unwrap_or_default().to_string();
            let (_, optimizer) = owner(run, &text("optimizer"))?;
            optimizer.force(&text("name"), &event.detail["value"])?;
            run.screen.note(&format!(
                "{}.{}={} again, as it was set at step {step}",
                text("optimizer"),
                text("name"),
                event.detail["value"]
            ));
        }
        last = event.number;
    }
    Ok(last)
}

/// Sends a wish to the living run in `folder` and waits for what comes of it.
///
/// Errors: as [`local_socket::ask`].
pub fn ask(folder: &Path, question: &Json) -> Result<Json> {
    // A step of a large model may take many minutes; the user can always leave.
    local_socket::ask(folder, question, Duration::from_secs(24 * 3600))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_taken_apart() {
        let parts = |word| setting(word).map(|s| (s.owner, s.name, s.value)).map_err(|error| error.to_string());
        assert_eq!(parts("optimizer.lr=1e-4").unwrap(), ("optimizer".into(), "lr".into(), json!(1e-4)));
        assert_eq!(parts("my.model.clip_norm=false").unwrap(), ("my.model".into(), "clip_norm".into(), json!(false)));
        assert_eq!(parts("policy.lr=script").unwrap().2, json!("script"));
        for wrong in ["lr=1", "optimizer.lr", "optimizer.=1", ".lr=1", "optimizer.lr=", "optimizer.lr=fast", "optimizer.lr=inf"] {
            assert!(parts(wrong).unwrap_err().starts_with("set: "), "{wrong}");
        }
    }

    #[test]
    fn wishes_wait_in_order_and_hints_are_not_doubled() {
        let control = Control::default();
        control.hint(Wish::Reload);
        control.hint(Wish::Reload);
        control.hint(Wish::Pause);
        let taken: Vec<Wish> = std::iter::from_fn(|| control.take()).map(|asked| asked.wish).collect();
        assert_eq!(taken, [Wish::Reload, Wish::Pause]);
    }
}
