//! Where a script stands in its run: the path of steps and iterations that is being executed, whether it repeats what the run
//! has already done, and whether it must end. One for each Lua state.
//!
//! A path names one execution: `evaluate#0` is the first step of that name, `train[57]/sample#2` the third of its name in
//! iteration 57 of the loop `train`. Source: occurrence numbers as in durable execution engines (runs survive when a line is
//! added elsewhere), not positions in the code.

use super::call::Failed;
use super::generations::Trial;
use super::interrupt;
use super::plan::Notes;
use super::run::Run;
use crate::error::Error;
use crate::train::optimizer::Settings;
use mlua::Lua;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// How far a replay goes.
#[derive(Clone, Debug, PartialEq)]
pub enum Target {
    /// Up to the first boundary of this outermost loop.
    Loop(String),
    /// Up to the end of this recorded step.
    Step(String),
}

struct Frame {
    path: String,
    /// How often each name was used in this frame.
    counts: BTreeMap<String, u32>,
    is_iteration: bool,
    deadline: Option<(Instant, f64)>,
}

/// The place of one Lua state in its run.
pub struct Replay {
    pub run: Arc<Run>,
    pub generation: u32,
    /// The end of what is repeated; none once the script does new things.
    target: Mutex<Option<Target>>,
    frames: Mutex<Vec<Frame>>,
    /// Settings that the code above the loop asked for, by the optimizer's name.
    asked: Mutex<BTreeMap<String, Settings>>,
    /// What the generation has to prove first; none if it led from the start.
    trial: Option<Arc<Trial>>,
    /// Taken where the script only shows what it would do.
    notes: Option<Arc<Notes>>,
    superseded: AtomicBool,
}

impl Replay {
    /// A state that repeats what was done up to `target`, then does new things.
    pub fn new(run: Arc<Run>, generation: u32, target: Option<Target>) -> Self {
        let root = Frame { path: String::new(), counts: BTreeMap::new(), is_iteration: false, deadline: None };
        Self {
            run,
            generation,
            target: Mutex::new(target),
            frames: Mutex::new(vec![root]),
            asked: Mutex::default(),
            trial: None,
            notes: None,
            superseded: AtomicBool::new(false),
        }
    }

    /// That of a generation that tries to take over.
    pub fn on_trial(self, trial: Arc<Trial>) -> Self {
        Self { trial: Some(trial), ..self }
    }

    /// That of a script which only shows what it would do.
    pub fn with_notes(self, notes: Arc<Notes>) -> Self {
        Self { notes: Some(notes), ..self }
    }

    /// The notes to be taken, if the script only shows what it would do.
    pub fn notes(&self) -> Option<&Notes> {
        self.notes.as_deref()
    }

    /// The trial of this generation, while it is open.
    pub fn trial(&self) -> Option<&Arc<Trial>> {
        self.trial.as_ref().filter(|trial| trial.is_open())
    }

    /// Another generation leads: every call of this one's script fails from now on.
    pub fn supersede(&self) {
        self.superseded.store(true, Relaxed);
    }

    /// That of `lua`; none in a plain script, which has no run.
    pub fn of(lua: &Lua) -> Option<Arc<Self>> {
        lua.app_data_ref::<Arc<Self>>().map(|replay| replay.clone())
    }

    fn frames(&self) -> MutexGuard<'_, Vec<Frame>> {
        self.frames.lock().expect("no panic happens under this lock")
    }

    /// Where the repetition ends; none once the script does new things.
    pub fn target(&self) -> Option<Target> {
        self.target.lock().expect("no panic happens under this lock").clone()
    }

    /// Whether the script repeats what the run has done before.
    pub fn is_replaying(&self) -> bool {
        self.target().is_some()
    }

    /// The replay is over: from here on everything is new.
    pub fn arrive(&self) {
        *self.target.lock().expect("no panic happens under this lock") = None;
    }

    /// Notes that an optimizer's settings were asked for on the way.
    pub fn ask(&self, optimizer: &str, settings: Settings) {
        self.asked.lock().expect("no panic happens under this lock").insert(optimizer.into(), settings);
    }

    /// What was asked for on the way, so far.
    pub fn asked(&self, optimizer: &str) -> Option<Settings> {
        self.asked.lock().expect("no panic happens under this lock").get(optimizer).copied()
    }

    /// The path of `name` in the frame that runs.
    pub fn path(&self, name: &str) -> String {
        join(&self.frames().last().expect("the outermost frame stays").path, name)
    }

    /// As [`Self::path`], with the number of this use of the name.
    pub fn numbered_path(&self, name: &str) -> String {
        let mut frames = self.frames();
        let frame = frames.last_mut().expect("the outermost frame stays");
        let count = frame.counts.entry(name.to_string()).or_default();
        *count += 1;
        join(&frame.path, &format!("{name}#{}", *count - 1))
    }

    /// Loops that are being run, one in the other.
    pub fn loop_depth(&self) -> usize {
        self.frames().iter().filter(|frame| frame.is_iteration).count()
    }

    /// Whether what runs is code above, between and behind the loops, which every replay executes again: no iteration, no step.
    pub fn is_outermost(&self) -> bool {
        self.depth() == 1
    }

    /// A step begins, which may take `seconds`.
    pub fn enter_step(&self, key: &str, seconds: Option<f64>) {
        let deadline = seconds.map(|seconds| (Instant::now() + Duration::from_secs_f64(seconds), seconds));
        self.frames().push(Frame { path: key.into(), counts: BTreeMap::new(), is_iteration: false, deadline });
    }

    /// An iteration of the loop `path` begins.
    pub fn enter_iteration(&self, path: &str, index: u64) {
        self.frames().push(Frame { path: format!("{path}[{index}]"), counts: BTreeMap::new(), is_iteration: true, deadline: None });
    }

    /// How many frames there are, to come back to.
    pub fn depth(&self) -> usize {
        self.frames().len()
    }

    /// Ends all frames beyond the first `depth`: an error may leave several at once.
    pub fn leave_to(&self, depth: usize) {
        assert!(depth > 0, "the outermost frame stays");
        self.frames().truncate(depth);
    }

    fn expired(&self) -> Option<Error> {
        let now = Instant::now();
        let frames = self.frames();
        let (frame, seconds) = frames.iter().find_map(|frame| Some((frame, frame.deadline.filter(|(end, _)| *end < now)?.1)))?;
        Some(Error::TimedOut { what: format!("the step `{}`", frame.path), seconds })
    }
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_string() } else { format!("{path}/{name}") }
}

/// Why the script of `lua` must end now, if it must. The hook asks every few milliseconds, and every call of the engine.
pub fn must_end(lua: &Lua) -> Option<Error> {
    if let Some(error) = lua.app_data_ref::<Arc<Trial>>().and_then(|trial| trial.must_end()) {
        return Some(error);
    }
    if let Some(replay) = lua.app_data_ref::<Arc<Replay>>() {
        if replay.superseded.load(Relaxed) {
            return Some(Error::Superseded);
        }
        if let Some(error) = replay.expired() {
            return Some(error);
        }
    }
    (interrupt::is_pending() && !interrupt::in_loop()).then_some(Error::Interrupted)
}

/// Seconds since 1970 for a script. Outside of loops they are recorded, so that a replay gets the same; inside a loop they are
/// the real ones, and what depends on them belongs into `run:step`.
///
/// Errors: those of the store.
pub fn now(lua: &Lua) -> Failed<f64> {
    match Replay::of(lua).filter(|replay| replay.loop_depth() == 0) {
        // No step of a script has such a name.
        Some(replay) => Ok(replay.run.recorded_time(&replay.numbered_path("#now"))?),
        None => Ok(super::run::unix_seconds()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_joined() {
        assert_eq!(join("", "a#0"), "a#0");
        assert_eq!(join("train[3]", "a#0"), "train[3]/a#0");
    }
}
