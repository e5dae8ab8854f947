//! A run: a script, its arguments and a seed, with its folder. It owns everything that must outlive a Lua state: the named
//! resources, the counters of its loops, the records of its steps, its code and its metrics. Knows no Lua; `run_object.rs` is
//! its face in scripts.

use super::checkpoints::Checkpoints;
use super::code;
use super::control::Control;
use super::fork::Origin;
use super::generations::End;
use super::loops::LoopRecord;
use super::modules::Source;
use super::progress::Screen;
use super::resources::Resources;
use super::states::Waiting;
use crate::checkpoint::catalog::create_durably;
use crate::error::{Error, Result};
use crate::store::metrics::LineLog;
use crate::store::records::{GenerationRecord, GenerationStatus, Output, RunRecord, Status, StepRecord, StepStatus};
use crate::store::tensorboard::EventFile;
use crate::store::{Durability, RunStore};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, TryLockError};
use std::hash::{BuildHasher, Hasher};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::Sender;
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// What never changes about a run: `run.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Facts {
    pub id: String,
    pub workflow: String,
    /// Path of the entry script, relative to `working_folder`.
    pub script: String,
    /// The words of the command line behind the script, which another generation of the script reads again.
    pub words: Vec<String>,
    /// The arguments as the first generation understood them.
    pub args: Map<String, Json>,
    pub seed: u64,
    /// Version of the engine that made the run.
    pub engine: String,
    /// Unix seconds.
    pub created: f64,
    pub working_folder: String,
    /// The run that this one is a fork of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Origin>,
}

impl Facts {
    /// Those of a run that begins now and here.
    ///
    /// - `words`: of the command line, behind the script
    /// - `args`: what the workflow made of them
    pub fn new(workflow: &str, script: &str, words: &[String], args: &[(String, Json)], seed: u64) -> Self {
        Self {
            id: new_id(),
            workflow: workflow.into(),
            script: script.into(),
            words: words.to_vec(),
            args: args.iter().cloned().collect(),
            seed,
            engine: env!("CARGO_PKG_VERSION").into(),
            created: unix_seconds(),
            working_folder: std::env::current_dir().map(|folder| folder.display().to_string()).unwrap_or_default(),
            parent: None,
        }
    }
}

/// One run of a workflow, alive in this process.
pub struct Run {
    pub facts: Facts,
    pub folder: PathBuf,
    pub screen: Screen,
    pub store: RunStore,
    pub resources: Resources,
    pub checkpoints: Checkpoints,
    /// Loops by path: how far each has come. The engine's counter, not Lua's.
    pub loops: Mutex<BTreeMap<String, LoopRecord>>,
    /// Contents of `run:state` that the script has not asked for yet.
    pub states: Waiting,
    /// What users ask of it.
    pub control: Control,
    /// Number of the last event that is in all this.
    events_seen: AtomicU64,
    /// When this process took it up, and how long the script needed to its first loop.
    opened: Instant,
    time_to_loop: OnceLock<Duration>,
    /// Lines that scripts printed outside of loops.
    printed: Mutex<BTreeSet<String>>,
    ends: OnceLock<Sender<End>>,
    code: Mutex<Code>,
    /// How often the script logged something.
    logged: AtomicU64,
    logs: Mutex<Logs>,
    /// Held while the process lives: a free lock means that nobody runs this run.
    _lock: File,
}

/// The generation that runs.
#[derive(Clone)]
pub struct Code {
    pub number: u32,
    pub sources: Vec<Source>,
}

struct Logs {
    metrics: LineLog,
    timing: LineLog,
    board: Option<EventFile>,
}

/// What a run is started with.
pub struct Start<'a> {
    /// The folder that holds all runs.
    pub root: &'a Path,
    pub facts: Facts,
    pub sources: &'a [Source],
    pub screen: Screen,
}

/// Seconds since 1970.
pub fn unix_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// What identifies the program: runs are bit-equal for one build on one kind of processor.
pub fn build_id() -> &'static str {
    static BUILD: OnceLock<String> = OnceLock::new();
    BUILD.get_or_init(|| {
        let bytes = std::env::current_exe().and_then(std::fs::read).unwrap_or_default();
        let hash = blake3::hash(&bytes).to_hex();
        format!("{} {}", env!("CARGO_PKG_VERSION"), &hash[..16])
    })
}

/// How long a look at a run may keep the run from going on.
const LOOK_WAIT: Duration = Duration::from_secs(10);

/// The lock of the run in `folder`. Who only looks at the run is waited for (`hold.rs`).
///
/// Errors: [`Error::Script`] if a living process holds it; [`Error::Io`].
pub fn lock(folder: &Path) -> Result<File> {
    let path = folder.join("lock");
    let mut file =
        File::options().create(true).truncate(false).write(true).read(true).open(&path).map_err(|error| Error::io(&path, "open", error))?;
    let began = Instant::now();
    let locked = loop {
        match file.try_lock() {
            // Who looks at a dead run, or tidies it up, shares the lock, and soon lets go of it.
            Err(TryLockError::WouldBlock) if file.try_lock_shared().is_ok() => {
                file.unlock().map_err(|error| Error::io(&path, "unlock", error))?;
                if began.elapsed() > LOOK_WAIT {
                    let what = format!("{}: another process looks at the run or tidies it up; try again", folder.display());
                    return Err(Error::Script(what));
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            locked => break locked,
        }
    };
    match locked {
        Ok(()) => {
            let write = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
            write.map_err(|error| Error::io(&path, "write", error))?;
            Ok(file)
        }
        Err(TryLockError::WouldBlock) => {
            let holder = std::fs::read_to_string(&path).unwrap_or_default();
            let what = format!("{}: the run is alive in process {}; stop it first: perilune stop", folder.display(), holder.trim());
            Err(Error::Script(what))
        }
        Err(TryLockError::Error(error)) => Err(Error::io(&path, "lock", error)),
    }
}

/// Whether a living process owns the run in `folder`.
pub fn is_alive(folder: &Path) -> bool {
    let Ok(file) = File::open(folder.join("lock")) else { return false };
    matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock))
}

/// The word for the run in `folder` on the command line: its name where runs usually lie, else the folder.
pub fn word_for(folder: &Path) -> String {
    match folder.file_name() {
        Some(name) if folder.parent().is_some_and(|root| root.ends_with("checkpoints/runs")) => name.to_string_lossy().into_owned(),
        _ if folder.to_string_lossy().contains(char::is_whitespace) => format!("'{}'", folder.display()),
        _ => folder.display().to_string(),
    }
}

/// Reads `run.json`.
///
/// Errors: [`Error::Io`]; [`Error::Format`].
pub fn read_facts(folder: &Path) -> Result<Facts> {
    let path = folder.join("run.json");
    let text = std::fs::read_to_string(&path).map_err(|error| Error::io(&path, "read", error))?;
    serde_json::from_str(&text).map_err(|error| Error::format(&path, "run", "the facts of a run", error.to_string()))
}

/// Writes `run.json`.
///
/// Errors: [`Error::Io`].
pub fn write_facts(folder: &Path, facts: &Facts) -> Result<()> {
    let text = serde_json::to_string_pretty(facts).expect("strings and numbers become JSON");
    code::write_durably(&folder.join("run.json"), format!("{text}\n").as_bytes())
}

impl Run {
    /// Makes the folder of a new run, with a copy of its code and arguments.
    ///
    /// Errors: [`Error::Io`].
    pub fn start(start: Start) -> Result<Self> {
        let folder = start.root.join(&start.facts.id);
        let folder = std::path::absolute(&folder).map_err(|error| Error::io(&folder, "make the folder", error))?;
        // Durably: what is synced in a folder whose own name is not would be lost with the name.
        create_durably(&folder.join("code/objects"))?;
        let folder = folder.canonicalize().map_err(|error| Error::io(&folder, "find", error))?;
        let lock = lock(&folder)?;
        let hash = code::save(&folder, 0, None, start.facts.created, start.sources)?;
        write_facts(&folder, &start.facts)?;
        let opened = RunStore::open(&folder.join("store"))?;
        opened.store.put_generation(GenerationRecord {
            number: 0,
            loop_path: None,
            step: 0,
            time: start.facts.created,
            hash,
            status: GenerationStatus::Accepted,
            reason: None,
        })?;
        let run =
            Self::assemble(start.facts, folder, start.screen, opened.store, lock, Code { number: 0, sources: start.sources.to_vec() })?;
        run.set_status(Status::Running, None)?;
        Ok(run)
    }

    /// The run in `folder` as its last process left it, with its newest checkpoint found but not loaded.
    ///
    /// Errors: [`Error::Script`] if it is alive, or finished; those of reading its files.
    pub fn open(folder: &Path, screen: Screen) -> Result<Self> {
        let folder = folder.canonicalize().map_err(|error| Error::io(folder, "find the run", error))?;
        let facts = read_facts(&folder)?;
        let lock = lock(&folder)?;
        super::collect::sweep_halves(&folder)?;
        let opened = RunStore::open(&folder.join("store"))?;
        if let Some(damaged) = &opened.damaged {
            let what = "the store was damaged; what can be read of it and what the files of the run hold is recorded again";
            screen.note(&format!("{what}: {}", damaged.display()));
            super::rebuild::refill(&folder, &facts, damaged, &opened.store)?;
        }
        // Before anything is set back to the last checkpoint, which is not the end.
        if opened.store.run().is_some_and(|record| record.status == Status::Finished) {
            let what = "the run is finished; there is nothing to go on with, but a fork may go further";
            return Err(Error::Script(format!("{}: {what}: perilune runs fork {} --arg NAME=VALUE", facts.id, word_for(&folder))));
        }
        if opened.store.find_generation(|record| record.number == 0).is_none() {
            // It was killed while it began.
            let first = code::generation(&folder, 0)?;
            opened.store.put_generation(GenerationRecord {
                number: 0,
                loop_path: None,
                step: 0,
                time: first.time,
                hash: code::list_hash(&folder, 0)?,
                status: GenerationStatus::Accepted,
                reason: None,
            })?;
        }
        let code = Code { number: 0, sources: Vec::new() };
        let run = Self::assemble(facts, folder, screen, opened.store, lock, code)?;
        run.find_origin()?;
        let number = run.checkpoints.origin().map_or(0, |origin| origin.manifest.generation);
        *run.code() = Code { number, sources: code::load(&run.folder, number)? };
        Ok(run)
    }

    fn assemble(facts: Facts, folder: PathBuf, screen: Screen, store: RunStore, lock: File, code: Code) -> Result<Self> {
        let open = |name: &str| {
            let path = folder.join(name);
            match path.metadata() {
                Ok(_) => LineLog::reopen(&path),
                Err(_) => LineLog::create(&path),
            }
        };
        let logs = Logs { metrics: open("metrics.jsonl")?, timing: open("timing.jsonl")?, board: None };
        Ok(Self {
            checkpoints: Checkpoints::new(&folder),
            resources: Resources::default(),
            loops: Mutex::default(),
            states: Waiting::default(),
            control: Control::default(),
            events_seen: AtomicU64::new(0),
            opened: Instant::now(),
            time_to_loop: OnceLock::new(),
            printed: Mutex::default(),
            ends: OnceLock::new(),
            code: Mutex::new(code),
            logged: AtomicU64::new(0),
            logs: Mutex::new(logs),
            facts,
            folder,
            screen,
            store,
            _lock: lock,
        })
    }

    /// Finds the checkpoint to go on from, and sets counters and metrics to it.
    fn find_origin(&self) -> Result<()> {
        let origin = self.checkpoints.find_origin(self)?;
        let mut offsets = (0, 0);
        if let Some(origin) = &origin {
            let state = &origin.state;
            *self.loops.lock().expect("no panic happens under this lock") = state.loops.clone();
            if let Some(after) = &state.after
                && self.store.step(&after.key).is_none_or(|step| step.status != StepStatus::Done)
            {
                self.store.put_step(after.clone(), Durability::Flushed)?;
            }
            offsets = state.log_offsets;
            self.set_events_seen(state.events);
        }
        self.cut_logs(offsets)
    }

    /// Cuts `metrics.jsonl` and `timing.jsonl` back to these offsets; what is cut off is kept beside them.
    ///
    /// Errors: [`Error::Io`]; [`Error::Format`] if a log is shorter.
    pub fn cut_logs(&self, offsets: (u64, u64)) -> Result<()> {
        let mut logs = self.logs.lock().expect("no panic happens under this lock");
        let now = unix_seconds() as u64;
        let cut = |name: &str, offset: u64| {
            // Two cuts in one second must not take each other's place.
            let aside = (0..).map(|count| self.folder.join(format!("{name}.cut-{now}-{count}.jsonl"))).find(|path| !path.exists());
            let aside = aside.expect("there are more numbers than files");
            LineLog::open_at(&self.folder.join(format!("{name}.jsonl")), offset, &aside)
        };
        logs.metrics = cut("metrics", offsets.0)?;
        logs.timing = cut("timing", offsets.1)?;
        Ok(())
    }

    /// Ends of `metrics.jsonl` and `timing.jsonl` now.
    pub fn log_offsets(&self) -> (u64, u64) {
        let logs = self.logs.lock().expect("no panic happens under this lock");
        (logs.metrics.offset(), logs.timing.offset())
    }

    /// Makes the metrics that are written so far durable.
    ///
    /// Errors: [`Error::Io`].
    pub fn sync_logs(&self) -> Result<()> {
        let logs = self.logs.lock().expect("no panic happens under this lock");
        logs.metrics.sync()?;
        logs.timing.sync()
    }

    /// Writes TensorBoard event files beside the metrics from now on.
    ///
    /// Errors: [`Error::Io`].
    pub fn write_tensorboard(&self) -> Result<()> {
        let mut board = EventFile::create(&self.folder.join("tensorboard"))?;
        if self.store.run().is_some_and(|record| record.resumes > 0) {
            // TensorBoard drops what an earlier process wrote behind the checkpoint.
            let step = self.checkpoints.origin().map_or(0, |origin| origin.manifest.step);
            board.resumed(step, unix_seconds())?;
        }
        self.logs.lock().expect("no panic happens under this lock").board = Some(board);
        Ok(())
    }

    /// Notes that the script logged something, in a line of its own or for that of an iteration.
    pub fn note_logged(&self) {
        self.logged.fetch_add(1, Relaxed);
    }

    /// A number that changes with whatever a checkpoint holds and the record of a step does not: resources and metrics.
    pub fn changes(&self) -> u64 {
        self.resources.version().wrapping_add(self.logged.load(Relaxed))
    }

    /// Adds one line to `metrics.jsonl`, and what goes with it to `timing.jsonl`.
    ///
    /// Errors: [`Error::Io`].
    pub fn write_metrics(&self, line: &Map<String, Json>, timing: &Map<String, Json>) -> Result<()> {
        let mut logs = self.logs.lock().expect("no panic happens under this lock");
        logs.metrics.append(line)?;
        logs.timing.append(timing)?;
        if let Some(board) = &mut logs.board {
            let step = line.get("step").and_then(Json::as_u64).unwrap_or(0);
            let prefix = line.get("loop").and_then(Json::as_str).map_or_else(String::new, |name| format!("{name}/"));
            let numbers = line.iter().chain(timing).filter(|(name, _)| !["step", "loop", "time"].contains(&name.as_str()));
            let scalars: Vec<(String, f32)> =
                numbers.filter_map(|(name, value)| Some((format!("{prefix}{name}"), value.as_f64()? as f32))).collect();
            let scalars: Vec<(&str, f32)> = scalars.iter().map(|(name, value)| (name.as_str(), *value)).collect();
            board.scalars(step, unix_seconds(), &scalars)?;
        }
        Ok(())
    }

    /// The generation that runs.
    pub fn code(&self) -> MutexGuard<'_, Code> {
        self.code.lock().expect("no panic happens under this lock")
    }

    /// The state of generation `number` has loaded `sources`; a module that is new among them is recorded.
    ///
    /// Errors: [`Error::Io`].
    pub fn code_loaded(&self, number: u32, sources: Vec<Source>) -> Result<()> {
        let mut code = self.code();
        if code.number != number || sources.len() <= code.sources.len() {
            return Ok(());
        }
        let known = code::generation(&self.folder, number)?;
        code::save(&self.folder, number, known.loop_path.as_deref().map(|path| (path, known.step)), known.time, &sources)?;
        code.sources = sources;
        Ok(())
    }

    /// Records how the run stands.
    ///
    /// Errors: those of the store.
    pub fn set_status(&self, status: Status, reason: Option<String>) -> Result<()> {
        self.put_status(status, reason, 0)
    }

    /// Records that another process goes on with the run.
    ///
    /// Errors: those of the store.
    pub fn set_resumed(&self) -> Result<()> {
        self.put_status(Status::Running, None, 1)
    }

    fn put_status(&self, status: Status, reason: Option<String>, more_resumes: u32) -> Result<()> {
        let now = unix_seconds();
        let (started, resumes) = self.store.run().map_or((now, 0), |old| (old.started, old.resumes));
        let record = RunRecord { status, reason, started, changed: now, pid: std::process::id(), resumes: resumes + more_resumes };
        self.store.put_run(record, Durability::Flushed)
    }

    /// The run has come to its end with `result`, or its script has: what is being written is waited for, and how it ended is
    /// recorded.
    ///
    /// Errors: that of `result`, else those of writing.
    pub fn conclude(&self, result: Result<()>) -> Result<()> {
        let written = self.checkpoints.wait();
        let result = result.and(written).and_then(|()| self.sync_logs());
        let (status, reason) = match &result {
            Ok(()) => (Status::Finished, None),
            Err(Error::Interrupted) => (Status::Stopped, None),
            Err(error) => (Status::Failed, Some(error.to_string())),
        };
        // On a disk that is full the status cannot be written either: the first error is the one to be told.
        let recorded = self.set_status(status, reason);
        result.and(recorded)
    }

    /// Number of the last event that is in the state of the run.
    pub fn events_seen(&self) -> u64 {
        self.events_seen.load(Relaxed)
    }

    pub fn set_events_seen(&self, number: u64) {
        self.events_seen.store(number, Relaxed);
    }

    /// How long the script needed from its start to its first loop; nothing before it was there.
    pub fn time_to_loop(&self) -> Duration {
        self.time_to_loop.get().copied().unwrap_or_default()
    }

    /// The script has come to a loop.
    pub fn reached_loop(&self) {
        self.time_to_loop.get_or_init(|| self.opened.elapsed());
    }

    /// Remembers a line that a script printed outside of loops.
    pub fn printed(&self, line: &str) {
        self.printed.lock().expect("no panic happens under this lock").insert(line.into());
    }

    /// Prints what another generation of the script has printed on its way and those before it had not.
    pub fn printed_again(&self, lines: Vec<String>) {
        for line in lines {
            if self.printed.lock().expect("no panic happens under this lock").insert(line.clone()) {
                self.screen.print(&line);
            }
        }
    }

    /// Where generations report the end of the run.
    pub fn set_ends(&self, ends: Sender<End>) {
        assert!(self.ends.set(ends).is_ok(), "a run is conducted once");
    }

    /// As given to [`Self::set_ends`].
    pub fn ends(&self) -> Sender<End> {
        self.ends.get().expect("a generation only takes over in a run that is conducted").clone()
    }

    /// Whether generations can take over from each other.
    pub fn is_conducted(&self) -> bool {
        self.ends.get().is_some()
    }

    /// The generation that took over at the boundary of the loop `path` behind `step` iterations, if it does not lead yet.
    pub fn recorded_generation(&self, path: &str, step: u64) -> Option<GenerationRecord> {
        let leads = self.code().number;
        self.store.find_generation(|record| {
            let accepted = record.status == GenerationStatus::Accepted && record.number > leads;
            accepted && record.loop_path.as_deref() == Some(path) && record.step == step
        })
    }

    /// The time at `key`: what was recorded there, else now, which is recorded.
    ///
    /// Errors: those of the store.
    pub fn recorded_time(&self, key: &str) -> Result<f64> {
        if let Some(StepRecord { output: Some(Output::Inline(time)), .. }) = self.store.step(key)
            && let Some(time) = time.as_f64()
        {
            return Ok(time);
        }
        let now = unix_seconds();
        let mut record = super::steps::started(key, self.code().number);
        record.status = StepStatus::Done;
        record.output = Some(Output::Inline(Json::from(now)));
        record.ended = Some(now);
        self.store.put_step(record, Durability::Later)?;
        Ok(now)
    }

    /// The folder of the artifact `name`.
    ///
    /// Errors: [`Error::Argument`] if the name is no plain name of a folder, or one of the run's own.
    pub fn artifact(&self, name: &str) -> Result<PathBuf> {
        if !is_artifact(name) {
            let expected = format!("a name of letters, digits, - and _, other than {}", OWN_FOLDERS.join(", "));
            return Err(Error::argument("Run:save", "name", expected, format!("\"{name}\"")));
        }
        Ok(self.folder.join(name))
    }

    /// Seconds since the run was created.
    pub fn seconds(&self) -> f64 {
        unix_seconds() - self.facts.created
    }
}

/// Whether a folder of this name in a run's is a script's, and not the run's own.
pub fn is_artifact(name: &str) -> bool {
    let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)) && !name.starts_with('.') && !name.is_empty();
    plain && !OWN_FOLDERS.contains(&name) && !name.ends_with(".jsonl") && !name.ends_with(".json")
}

/// What a run's folder holds besides artifacts.
const OWN_FOLDERS: [&str; 8] = ["code", "checkpoints", "damaged", "store", "steps", "tensorboard", "lock", "control.sock"];

/// A new id, a ULID: 48 bits of milliseconds, then 80 random bits, in 26 letters that sort by time.
/// Source: github.com/ulid/spec.
fn new_id() -> String {
    const LETTERS: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
    let millis = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis());
    // The standard library seeds every RandomState from the system's random numbers; an id needs no better ones.
    let random = || u128::from(std::hash::RandomState::new().build_hasher().finish());
    let bits = millis << 80 | (random() << 64 | random()) & ((1 << 80) - 1);
    (0..26).rev().map(|place| char::from(LETTERS[(bits >> (place * 5) & 31) as usize])).collect()
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
