//! Generations of a run's script. Each has a Lua state and a thread of its own, and one of them leads. At a boundary another can
//! try to take over: it repeats the script up to the same loop with the live resources in hand, and does one iteration. If that goes
//! well it leads from there, is recorded, and the old state ends; if not, everything is as it was at the boundary and the old one
//! goes on. Does not know when a try is due (`reload.rs`, `control.rs`, or a recorded generation that a resume comes to).

use super::args;
use super::checkpoints::Snapshot;
use super::code;
use super::modules::{Modules, Source};
use super::replay::{Replay, Target};
use super::run::{Code, Run, unix_seconds};
use super::vm::Vm;
use super::workflow::Workflow;
use crate::error::{Error, Result};
use crate::failpoint::failpoint;
use crate::store::records::{GenerationRecord, GenerationStatus};
use crate::tensor::place::ImageTo;
use mlua::Lua;
use serde_json::{Map, Value as Json};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// How the last generation ended: its result, or its panic.
pub type End = Result<Result<()>, Box<dyn Any + Send>>;

/// Scripts may recurse deeper than a thread's usual 2 MiB allow.
const STACK_BYTES: usize = 64 << 20;
/// Least time that a new generation gets to come to the loop. It gets three times what the first one needed, if that is more.
const REPLAY_TIME_MIN: Duration = Duration::from_secs(10);
/// How long a generation that is given up may take to notice. One that is inside a long call of Lua's own C code never does.
const LEAVE_TIME: Duration = Duration::from_secs(5);

/// Runs `vm`'s workflow as the generation that leads, then those that take over from it, until one ends the run.
///
/// - `target`: what is to be repeated first
///
/// Errors: those of the script; [`Error::Interrupted`]. A panic of a generation goes on here.
pub fn conduct(run: &Arc<Run>, vm: Vm, values: Vec<(String, Json)>, target: Option<Target>) -> Result<()> {
    let (ends, ended) = mpsc::channel();
    run.set_ends(ends);
    let led = run.clone();
    let lead = move || {
        let end = catch_unwind(AssertUnwindSafe(|| {
            let replay = Replay::new(led.clone(), led.code().number, target);
            let result = with_workflow(&vm, |workflow| workflow.perform(vm.lua(), &led, &values, replay));
            drop(vm);
            result
        }));
        report(led, end);
    };
    spawn(run, lead)?;
    match ended.recv().expect("the run itself holds a sender") {
        Ok(result) => result,
        Err(panic) => resume_unwind(panic),
    }
}

fn spawn(run: &Run, body: impl FnOnce() + Send + 'static) -> Result<()> {
    let thread = std::thread::Builder::new().name("script".into()).stack_size(STACK_BYTES).spawn(body);
    thread.map(drop).map_err(|error| Error::io(&run.folder, "start a thread for the script of", error))
}

/// A generation that led has ended. One that was superseded ends in silence.
fn report(run: Arc<Run>, end: End) {
    let end = match end {
        Ok(Err(Error::Superseded)) => return,
        Ok(result) => Ok(run.conclude(result)),
        Err(panic) => Err(panic),
    };
    let ends = run.ends();
    // The store is closed by whoever waits for the end, not while the process is on its way out.
    drop(run);
    // Nobody listens any more if the process is ending.
    let _ = ends.send(end);
}

/// Hands the workflow of `vm` to `body`.
pub fn with_workflow<T>(vm: &Vm, body: impl FnOnce(&Workflow) -> Result<T>) -> Result<T> {
    let none = || Error::Script(format!("{}: the script returns no workflow", vm.script().display()));
    let object = vm.workflow().ok_or_else(none)?;
    let workflow = object.borrow::<Workflow>().expect("load gives only workflows");
    body(&workflow)
}

/// Where a generation tries to take over.
pub struct Boundary {
    pub loop_path: String,
    /// Iterations that are behind it.
    pub step: u64,
    /// Iterations when the last checkpoint was taken, and when that was.
    pub saved: (u64, Instant),
    /// What the loop logged last.
    pub metrics: Map<String, Json>,
}

/// What became of a try.
pub enum Outcome {
    /// It leads now; the old generation must end with [`Error::Superseded`]. How long training stood still.
    Taken { number: u32, pause: Duration },
    /// It does not, for this reason, and everything is as it was.
    Refused(Error),
}

/// A generation that tries to take over.
pub struct Trial {
    number: u32,
    boundary: Boundary,
    /// Whether the run has recorded it before.
    known: bool,
    /// The run at the boundary, to be handed over or put back; none once it is clear which.
    base: Mutex<Option<Snapshot>>,
    /// Its files as far as they were known, and which differ from those of the generation that leads.
    files: Vec<Source>,
    changed: Vec<String>,
    began: Instant,
    phase: Mutex<Phase>,
    verdict: Sender<Verdict>,
    /// Lines that the script has printed again on its way.
    held: Mutex<Vec<String>>,
}

#[derive(Clone, Copy, PartialEq)]
enum Phase {
    /// On the way to the loop, until this time at most.
    Replaying(Instant),
    /// In its first iteration.
    Trying,
    Accepted,
    GivenUp,
}

enum Verdict {
    Arrived,
    Accepted,
    Failed(Error),
}

impl Trial {
    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().expect("no panic happens under this lock")
    }

    fn base(&self) -> MutexGuard<'_, Option<Snapshot>> {
        self.base.lock().expect("no panic happens under this lock")
    }

    /// Why its script must end now, if it must.
    pub fn must_end(&self) -> Option<Error> {
        match *self.phase() {
            Phase::GivenUp => Some(Error::Superseded),
            Phase::Replaying(end) if end < Instant::now() => {
                let what = format!("the way to the loop `{}`, which a reload repeats,", self.boundary.loop_path);
                Some(Error::TimedOut { what, seconds: (end - self.began).as_secs_f64() })
            }
            _ => None,
        }
    }

    /// Whether it has not proved itself yet.
    pub fn is_open(&self) -> bool {
        matches!(*self.phase(), Phase::Replaying(_) | Phase::Trying)
    }

    /// Takes a printed line if it is one of the repetition.
    pub fn hold(&self, line: &str) -> bool {
        let holds = matches!(*self.phase(), Phase::Replaying(_));
        if holds {
            self.held.lock().expect("no panic happens under this lock").push(line.into());
        }
        holds
    }

    /// What the loop logged last.
    pub fn metrics(&self) -> Map<String, Json> {
        self.boundary.metrics.clone()
    }

    /// When the last checkpoint was taken, for the loop's plan.
    pub fn saved(&self) -> (u64, Instant) {
        self.boundary.saved
    }

    /// The script has come to the loop: it gets the tables and positions of the old one.
    ///
    /// Errors: those of [`Snapshot::hand_over`].
    pub fn arrive(&self, lua: &Lua, run: &Arc<Run>, replay: &Replay) -> super::call::Failed<()> {
        failpoint("reload.arrive").map_err(|error| Error::io(&run.folder, "hand over", error))?;
        {
            // Under one lock with the look that gives it up: either it is in time, or it never leads.
            let mut phase = self.phase();
            let Phase::Replaying(_) = *phase else { return Err(Error::Superseded.into()) };
            *phase = Phase::Trying;
        }
        if let Some(base) = &*self.base() {
            base.hand_over(lua, run)?;
        }
        for (name, optimizer, _) in run.resources.optimizers() {
            if let Some(asked) = replay.asked(&name) {
                optimizer.take_asked(asked)?;
            }
        }
        replay.arrive();
        // A closed channel is noticed by `must_end`.
        let _ = self.verdict.send(Verdict::Arrived);
        Ok(())
    }

    /// It has done an iteration, or come to the end of its loop: it leads from now on, durably.
    ///
    /// Errors: those of recording it.
    pub fn accept(&self, lua: &Lua, run: &Arc<Run>) -> Result<()> {
        if *self.phase() != Phase::Trying {
            return Ok(());
        }
        failpoint("reload.accept").map_err(|error| Error::io(&run.folder, "record a generation in", error))?;
        let mut sources = lua.app_data_ref::<Modules>().map_or_else(Vec::new, |modules| modules.sources());
        // Where it is known, modules that it asks for later stay in its list, and new ones join it.
        let later = |file: &&Source| self.known && !sources.iter().any(|source| source.path == file.path);
        let later: Vec<Source> = self.files.iter().filter(later).cloned().collect();
        sources.extend(later);
        self.record(run, &sources, GenerationStatus::Accepted, None)?;
        *run.code() = Code { number: self.number, sources };
        run.printed_again(std::mem::take(&mut self.held.lock().expect("no panic happens under this lock")));
        *self.phase() = Phase::Accepted;
        // As large as the models and their optimizers.
        drop(self.base().take());
        failpoint("reload.accepted").map_err(|error| Error::io(&run.folder, "go on with", error))?;
        let _ = self.verdict.send(Verdict::Accepted);
        Ok(())
    }

    fn record(&self, run: &Run, sources: &[Source], status: GenerationStatus, reason: Option<String>) -> Result<()> {
        let Boundary { loop_path, step, .. } = &self.boundary;
        let time = unix_seconds();
        let position = Some((loop_path.as_str(), *step));
        let hash = match &reason {
            None => code::save(&run.folder, self.number, position, time, sources)?,
            Some(reason) => code::save_rejected(&run.folder, self.number, position, time, sources, reason)?,
        };
        let record = GenerationRecord { number: self.number, loop_path: Some(loop_path.clone()), step: *step, time, hash, status, reason };
        run.store.put_generation(record)
    }
}

/// Lets the script in `sources` try to take over from the one in `lua`, which stands at `boundary`.
///
/// - `known`: the number under which the run has recorded it, when a resume comes by again
///
/// Errors: those of taking the state of the run, of putting it back, and of recording.
pub fn attempt(lua: &Lua, run: &Arc<Run>, boundary: Boundary, sources: Vec<Source>, known: Option<u32>) -> super::call::Failed<Outcome> {
    let began = Instant::now();
    failpoint("reload.begin").map_err(|error| Error::io(&run.folder, "reload", error))?;
    run.checkpoints.wait()?;
    let base = Snapshot::take(lua, run, (&boundary.loop_path, boundary.step), None, boundary.metrics.clone(), ImageTo::Host)?;
    let steps = run.store.step_keys();
    let limit = REPLAY_TIME_MIN.max(run.time_to_loop() * 3);
    let number = known.unwrap_or_else(|| run.store.generations().last().map_or(0, |last| last.number) + 1);
    let (verdict, verdicts) = mpsc::channel();
    let trial = Arc::new(Trial {
        number,
        files: sources.clone(),
        changed: code::changed(&run.code().sources, &sources),
        boundary,
        known: known.is_some(),
        base: Mutex::new(Some(base)),
        began,
        phase: Mutex::new(Phase::Replaying(began + limit)),
        verdict: verdict.clone(),
        held: Mutex::default(),
    });
    let (there, tried, files) = (run.clone(), trial.clone(), sources.clone());
    spawn(run, move || follow(&there, &tried, files, &verdict))?;
    match judge(&trial, &verdicts) {
        Ok(pause) => {
            let Boundary { loop_path, step, .. } = &trial.boundary;
            let changed = trial.changed.join(", ");
            let ms = pause.as_secs_f64() * 1e3;
            run.screen.note(&format!("generation {number} leads from step {step} of {loop_path} on ({changed}; {ms:.0} ms)"));
            Ok(Outcome::Taken { number, pause })
        }
        Err(reason) => {
            if let Some(base) = trial.base().take() {
                base.put_back(run, &steps)?;
            }
            if known.is_none() {
                trial.record(run, &sources, GenerationStatus::Rejected, Some(reason.to_string()))?;
            }
            Ok(Outcome::Refused(reason))
        }
    }
}

/// Waits for what becomes of `trial`: how long training stood still, or why it failed.
fn judge(trial: &Trial, verdicts: &Receiver<Verdict>) -> Result<Duration> {
    let mut pause = None;
    loop {
        match verdicts.recv_timeout(Duration::from_millis(20)) {
            Ok(Verdict::Arrived) => pause = Some(trial.began.elapsed()),
            Ok(Verdict::Accepted) => return Ok(pause.unwrap_or_default()),
            Ok(Verdict::Failed(error)) => return Err(error),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => unreachable!("the trial holds a sender"),
        }
        // It notices by itself that its time is over, unless it does not come out of a call of Lua's own.
        let Some(error) = trial.must_end() else { continue };
        let late = Instant::now() + LEAVE_TIME;
        while let Some(left) = late.checked_duration_since(Instant::now()) {
            match verdicts.recv_timeout(left) {
                Ok(Verdict::Failed(error)) => return Err(error),
                Ok(Verdict::Accepted) => return Ok(pause.unwrap_or_default()),
                Ok(Verdict::Arrived) => {
                    pause = Some(trial.began.elapsed());
                    break;
                }
                Err(_) => {}
            }
        }
        let mut phase = trial.phase();
        if *phase != Phase::Trying && *phase != Phase::Accepted {
            *phase = Phase::GivenUp;
            return Err(error);
        }
    }
}

/// The thread of a generation that tries to take over.
fn follow(run: &Arc<Run>, trial: &Arc<Trial>, files: Vec<Source>, verdict: &Sender<Verdict>) {
    let end = catch_unwind(AssertUnwindSafe(|| -> Result<()> {
        let mut vm = Vm::with_recorded(Path::new(&run.facts.script), run.screen.clone(), files)?;
        vm.set_seed(run.facts.seed);
        vm.lua().set_app_data(trial.clone());
        vm.load_workflow()?;
        with_workflow(&vm, |workflow| {
            let values = args::parse(&workflow.specs, run.facts.words_of(trial.number))?;
            let target = Target::Loop(trial.boundary.loop_path.clone());
            let replay = Replay::new(run.clone(), trial.number, Some(target)).on_trial(trial.clone());
            workflow.perform(vm.lua(), run, &values, replay)
        })
    }));
    let accepted = *trial.phase() == Phase::Accepted;
    match end {
        Ok(result) if !accepted => {
            let lost = || Error::Script(format!("the script ended without coming to the loop `{}`", trial.boundary.loop_path));
            *trial.phase() = Phase::GivenUp;
            let _ = verdict.send(Verdict::Failed(result.err().unwrap_or_else(lost)));
        }
        // A panic is the engine's mistake, whichever generation met it, and ends the run.
        end => report(run.clone(), end),
    }
}
