//! The records of one run, typed, in its database. All of them are held in memory too, so that a replay asks no disk: a run
//! has thousands of steps, never millions. Decides nothing about runs but one law: a step that is done stays as it is.
//!
//! Keys: `format`, `run`, `step/<key>`, `generation/<number>`, `checkpoint/<number>`, `event/<number>`; values are JSON.

use super::database::{Database, Durability, Opened};
use super::records::{CheckpointRecord, EventRecord, GenerationRecord, Records, RunRecord, StepRecord, StepStatus};
use super::sled_log::move_aside;
use crate::error::{Error, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The layout of keys and records. A store with a higher number was written by a newer engine.
const FORMAT: u32 = 1;
/// Records that an import writes at a time.
const IMPORT_BATCH: usize = 256;

/// An opened store.
pub struct OpenedStore {
    pub store: RunStore,
    /// Where damaged files were moved, with the reason in `why.txt` there. The store is empty then and has to be rebuilt.
    pub damaged: Option<PathBuf>,
}

/// The records of a run. Its methods may be called from several threads.
pub struct RunStore {
    database: Database,
    held: Mutex<Held>,
}

/// What is in the database, decoded.
#[derive(Default)]
pub(super) struct Held {
    run: Option<RunRecord>,
    steps: HashMap<String, StepRecord>,
    generations: BTreeMap<u32, GenerationRecord>,
    checkpoints: BTreeMap<u64, CheckpointRecord>,
    events: BTreeMap<u64, EventRecord>,
}

impl RunStore {
    /// Opens or creates the store in `folder` and reads all of it. If its files or one of its records are damaged, they are
    /// moved aside and the store is empty.
    ///
    /// Errors: [`Error::Unsupported`] on a network or user-space filesystem; [`Error::Format`] if a newer engine wrote it;
    /// [`Error::Io`], also if another process has it open.
    pub fn open(folder: &Path) -> Result<OpenedStore> {
        let Opened { database, damaged } = Database::open(folder)?;
        let damage = match Held::load(&database) {
            Ok(held) => return Ok(OpenedStore { store: Self::with_format(database, held)?, damaged }),
            Err(Fault::Other(error)) => return Err(error),
            Err(Fault::Damage(error)) => error,
        };
        // Whether it closes or not, it goes aside.
        let _ = database.close();
        let aside = move_aside(folder, &damage.to_string())?;
        let Opened { database, .. } = Database::open(folder)?;
        Ok(OpenedStore { store: Self::with_format(database, Held::default())?, damaged: Some(aside) })
    }

    fn with_format(database: Database, held: Held) -> Result<Self> {
        database.compare_and_swap("format", None, Some(FORMAT.to_string().as_bytes()), Durability::Flushed)?;
        Ok(Self { database, held: Mutex::new(held) })
    }

    /// Where the store lies.
    pub fn folder(&self) -> &Path {
        self.database.folder()
    }

    /// The database below: to measure, compact, export or verify it. Writing there goes past what this store holds.
    pub fn database(&self) -> &Database {
        &self.database
    }

    /// How the run stands; none in a new store.
    pub fn run(&self) -> Option<RunRecord> {
        self.held().run.clone()
    }

    /// Errors: as [`Database::put`].
    pub fn put_run(&self, record: RunRecord, durability: Durability) -> Result<()> {
        let record = record.fitted();
        let mut held = self.held();
        self.put("run".into(), &record, durability)?;
        held.run = Some(record);
        Ok(())
    }

    /// The record of the step `key`.
    pub fn step(&self, key: &str) -> Option<StepRecord> {
        self.held().steps.get(key).cloned()
    }

    /// The keys of the steps that have ended, well or not.
    pub fn ended_steps(&self) -> BTreeSet<String> {
        let held = self.held();
        held.steps.values().filter(|step| step.status != StepStatus::Started).map(|step| step.key.clone()).collect()
    }

    /// Errors: [`Error::Argument`] if the step is done and this is another record, if its key is over 256 bytes or its inline
    /// output over 3 KiB; [`Error::Io`].
    pub fn put_step(&self, record: StepRecord, durability: Durability) -> Result<()> {
        let record = record.fitted()?;
        let mut held = self.held();
        held.check_step(&record)?;
        self.put(step_key(&record.key), &record, durability)?;
        held.steps.insert(record.key.clone(), record);
        Ok(())
    }

    /// Keys of all steps.
    pub fn step_keys(&self) -> HashSet<String> {
        self.held().steps.keys().cloned().collect()
    }

    /// Forgets steps that were done by a script which never led the run: whatever comes there again is new. Durable when it returns;
    /// keys that are unknown are fine. Errors: as [`Database::delete`].
    pub fn forget_steps(&self, keys: Vec<String>) -> Result<()> {
        if keys.is_empty() {
            return Ok(());
        }
        let mut held = self.held();
        self.database.delete(keys.iter().map(|key| step_key(key)).collect(), Durability::Flushed)?;
        keys.iter().for_each(|key| drop(held.steps.remove(key)));
        Ok(())
    }

    /// The generations, by number.
    pub fn generations(&self) -> Vec<GenerationRecord> {
        self.held().generations.values().cloned().collect()
    }

    /// The first generation that is `wanted`.
    pub fn find_generation(&self, wanted: impl Fn(&GenerationRecord) -> bool) -> Option<GenerationRecord> {
        self.held().generations.values().find(|record| wanted(record)).cloned()
    }

    /// Durable when it returns. Errors: as [`Database::put`].
    pub fn put_generation(&self, record: GenerationRecord) -> Result<()> {
        let record = record.fitted();
        let mut held = self.held();
        self.put(generation_key(record.number), &record, Durability::Flushed)?;
        held.generations.insert(record.number, record);
        Ok(())
    }

    /// The checkpoints, by number.
    pub fn checkpoints(&self) -> Vec<CheckpointRecord> {
        self.held().checkpoints.values().cloned().collect()
    }

    /// Durable when it returns. Errors: as [`Database::put`].
    pub fn put_checkpoint(&self, record: CheckpointRecord) -> Result<()> {
        let record = record.fitted();
        let mut held = self.held();
        self.put(checkpoint_key(record.number), &record, Durability::Flushed)?;
        held.checkpoints.insert(record.number, record);
        Ok(())
    }

    /// Forgets a checkpoint; durable when it returns. One that is unknown is fine. Errors: as [`Database::delete`].
    pub fn remove_checkpoint(&self, number: u64) -> Result<()> {
        let mut held = self.held();
        self.database.delete(vec![checkpoint_key(number)], Durability::Flushed)?;
        held.checkpoints.remove(&number);
        Ok(())
    }

    /// The events, by number.
    pub fn events(&self) -> Vec<EventRecord> {
        self.held().events.values().cloned().collect()
    }

    /// Durable when it returns. Errors: as [`Database::put`]; an event is never shortened, since a resume repeats it.
    pub fn put_event(&self, record: EventRecord) -> Result<()> {
        let mut held = self.held();
        self.put(event_key(record.number), &record, Durability::Flushed)?;
        held.events.insert(record.number, record);
        Ok(())
    }

    /// The number of the event that comes next: 1 in a new store.
    pub fn next_event_number(&self) -> u64 {
        self.held().events.last_key_value().map_or(1, |(number, _)| number + 1)
    }

    /// Everything, as plain data.
    pub fn records(&self) -> Records {
        self.held().records()
    }

    /// Adds `records`, over what has the same keys; durable when it returns. If it fails halfway it can be called again.
    ///
    /// Errors: [`Error::Argument`] if one of the steps is done here and another record there, and nothing is written; [`Error::Io`].
    pub fn import(&self, records: Records) -> Result<()> {
        let mut held = self.held();
        let mut added = Held::default();
        let mut batch = Vec::new();
        if let Some(record) = records.run.map(RunRecord::fitted) {
            batch.push(("run".into(), encoded(&record)));
            added.run = Some(record);
        }
        for record in records.steps {
            let record = record.fitted()?;
            held.check_step(&record)?;
            batch.push((step_key(&record.key), encoded(&record)));
            added.steps.insert(record.key.clone(), record);
        }
        for record in records.generations.into_iter().map(GenerationRecord::fitted) {
            batch.push((generation_key(record.number), encoded(&record)));
            added.generations.insert(record.number, record);
        }
        for record in records.checkpoints.into_iter().map(CheckpointRecord::fitted) {
            batch.push((checkpoint_key(record.number), encoded(&record)));
            added.checkpoints.insert(record.number, record);
        }
        for record in records.events {
            batch.push((event_key(record.number), encoded(&record)));
            added.events.insert(record.number, record);
        }
        batch.chunks(IMPORT_BATCH).try_for_each(|part| self.database.put(part.to_vec(), Durability::Later))?;
        self.database.durable_flush()?;
        held.run = added.run.or(held.run.take());
        held.steps.extend(added.steps);
        held.generations.extend(added.generations);
        held.checkpoints.extend(added.checkpoints);
        held.events.extend(added.events);
        Ok(())
    }

    /// Makes every record survive a power loss. Errors: [`Error::Io`], after which the store takes no more records.
    pub fn flush(&self) -> Result<()> {
        self.database.durable_flush()
    }

    /// Flushes and lets go of the store. Errors: [`Error::Io`].
    pub fn close(self) -> Result<()> {
        self.database.close()
    }

    fn put(&self, key: String, record: &impl Serialize, durability: Durability) -> Result<()> {
        self.database.put(vec![(key, encoded(record))], durability)
    }

    /// Held during a write too, so that memory and disk never disagree about the order of two writes.
    fn held(&self) -> MutexGuard<'_, Held> {
        // Memory is changed after the disk and by single insertions, so a panic elsewhere leaves nothing half done.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a database could not be read.
enum Fault {
    /// What it holds is not what was written.
    Damage(Error),
    Other(Error),
}

impl Held {
    /// As plain data, steps in the order in which they started.
    pub(super) fn records(&self) -> Records {
        let mut steps: Vec<_> = self.steps.values().cloned().collect();
        steps.sort_by(|a, b| a.started.total_cmp(&b.started).then_with(|| a.key.cmp(&b.key)));
        Records {
            run: self.run.clone(),
            steps,
            generations: self.generations.values().cloned().collect(),
            checkpoints: self.checkpoints.values().cloned().collect(),
            events: self.events.values().cloned().collect(),
        }
    }

    fn load(database: &Database) -> Result<Self, Fault> {
        let fault = |error| if matches!(error, Error::Format { .. }) { Fault::Damage(error) } else { Fault::Other(error) };
        // First, since another format's keys are no damage.
        if let Some(found) = database.get("format").map_err(fault)? {
            let found = decoded(database.folder(), "format", &found).map_err(fault)?;
            check_format(database.folder(), found).map_err(Fault::Other)?;
        }
        let mut held = Self::default();
        for (key, payload) in database.scan("").map_err(fault)? {
            held.add(database.folder(), &key, &payload).map_err(fault)?;
        }
        Ok(held)
    }

    /// Takes the value of one key of the database in `folder`. Errors: [`Error::Format`] that names the key.
    pub(super) fn add(&mut self, folder: &Path, key: &str, payload: &[u8]) -> Result<()> {
        match key.split_once('/').map_or(key, |(kind, _)| kind) {
            "format" => {}
            "run" => self.run = Some(decoded(folder, key, payload)?),
            "step" => {
                let record: StepRecord = decoded(folder, key, payload)?;
                self.steps.insert(record.key.clone(), record);
            }
            "generation" => {
                let record: GenerationRecord = decoded(folder, key, payload)?;
                self.generations.insert(record.number, record);
            }
            "checkpoint" => {
                let record: CheckpointRecord = decoded(folder, key, payload)?;
                self.checkpoints.insert(record.number, record);
            }
            "event" => {
                let record: EventRecord = decoded(folder, key, payload)?;
                self.events.insert(record.number, record);
            }
            _ => return Err(Error::format(folder, key, "a key of this engine", "another")),
        }
        Ok(())
    }

    /// A step that is done has been seen by the script: to change it would change the past.
    fn check_step(&self, record: &StepRecord) -> Result<()> {
        match self.steps.get(&record.key) {
            Some(done) if done.status == StepStatus::Done && done != record => {
                let got = format!("a record that says {:?}, fingerprint {}", record.status, record.fingerprint);
                Err(Error::argument("store", format!("step {}", record.key), "left as it is, since it is done", got))
            }
            _ => Ok(()),
        }
    }
}

fn step_key(key: &str) -> String {
    format!("step/{key}")
}

// Numbers with leading zeros, so that keys sort as they do.
fn generation_key(number: u32) -> String {
    format!("generation/{number:010}")
}

fn checkpoint_key(number: u64) -> String {
    format!("checkpoint/{number:020}")
}

fn event_key(number: u64) -> String {
    format!("event/{number:020}")
}

fn encoded(record: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(record).expect("records have text keys and no other way to fail")
}

pub(super) fn decoded<T: DeserializeOwned>(folder: &Path, key: &str, payload: &[u8]) -> Result<T> {
    serde_json::from_slice(payload).map_err(|error| Error::format(folder, key, "a record of this engine", error.to_string()))
}

/// Refuses what a newer engine wrote in `folder`. Errors: [`Error::Format`].
pub(super) fn check_format(folder: &Path, found: u32) -> Result<()> {
    if found <= FORMAT {
        return Ok(());
    }
    let expected = format!("records of format {FORMAT} or older");
    let found = format!("format {found}; a newer engine wrote this run, continue it with that one");
    Err(Error::format(folder, "format", expected, found))
}

#[cfg(test)]
mod tests {
    use super::super::records::{GenerationStatus, Output, Status};
    use super::*;
    use serde_json::{Map, json};
    use std::time::Instant;

    fn open(folder: &Path) -> RunStore {
        let opened = RunStore::open(folder).unwrap();
        assert_eq!(opened.damaged, None);
        opened.store
    }

    fn run(status: Status) -> RunRecord {
        RunRecord { status, reason: Some("é".repeat(5000)), started: 1.25, changed: 2.5, pid: 7, resumes: 1 }
    }

    fn step(key: &str, status: StepStatus, started: f64) -> StepRecord {
        StepRecord {
            key: key.into(),
            fingerprint: "f".repeat(32),
            inputs: "{\"lr\":1e-5}".into(),
            code: "c".repeat(32),
            status,
            output: (status == StepStatus::Done).then(|| Output::Inline(json!({ "loss": 2.5 }))),
            error: None,
            attempts: 1,
            started,
            ended: None,
            generation: 0,
            seconds: 0.5,
        }
    }

    fn generation(number: u32) -> GenerationRecord {
        let (hash, reason) = (format!("h{number}"), Some("a.lua:1: no".into()));
        GenerationRecord { number, loop_path: None, step: 0, time: 1.0, hash, status: GenerationStatus::Rejected, reason }
    }

    fn checkpoint(number: u64) -> CheckpointRecord {
        CheckpointRecord {
            number,
            name: format!("train-{number}"),
            loop_path: "train".into(),
            step: number * 10,
            generation: 0,
            manifest: "m".into(),
            bytes: 1 << 33,
            time: 3.5,
            metrics: Map::from_iter([("loss".into(), json!(1.25))]),
            pinned: true,
            lost: None,
        }
    }

    fn event(number: u64) -> EventRecord {
        EventRecord { number, time: 4.5, kind: "set".into(), loop_path: None, step: 3, detail: json!({ "lr": 1e-7 }) }
    }

    /// A store with some of everything.
    fn filled(folder: &Path) -> RunStore {
        let store = open(folder);
        store.put_run(run(Status::Running), Durability::Later).unwrap();
        store.put_step(step("b", StepStatus::Started, 1.0), Durability::Later).unwrap();
        store.put_step(step("b", StepStatus::Done, 1.0), Durability::Flushed).unwrap();
        store.put_step(step("a/c#2", StepStatus::Failed, 2.0), Durability::Later).unwrap();
        // More than nine, so that keys which do not sort as numbers would show.
        (0..12).for_each(|number| store.put_generation(generation(number)).unwrap());
        (1..=12).for_each(|number| store.put_checkpoint(checkpoint(number)).unwrap());
        store.remove_checkpoint(5).unwrap();
        store.remove_checkpoint(500).unwrap();
        assert_eq!(store.next_event_number(), 1);
        (1..=12).for_each(|number| store.put_event(event(number)).unwrap());
        assert_eq!(store.next_event_number(), 13);
        store
    }

    #[test]
    fn records_are_the_same_in_memory_after_a_reopening_and_after_an_import() {
        let root = tempfile::tempdir().unwrap();
        let store = filled(&root.path().join("store"));
        let records = store.records();
        assert_eq!(records.steps.iter().map(|step| step.key.as_str()).collect::<Vec<_>>(), ["b", "a/c#2"]);
        assert_eq!(store.step("b"), Some(step("b", StepStatus::Done, 1.0)));
        assert_eq!(store.run().unwrap().reason.as_ref().map(|reason| reason.len() < 2100), Some(true));
        assert_eq!((records.checkpoints.len(), records.checkpoints[4].number), (11, 6));
        store.close().unwrap();

        let store = open(&root.path().join("store"));
        assert_eq!(store.records(), records);
        assert_eq!(store.next_event_number(), 13);

        let copy = open(&root.path().join("copy"));
        copy.import(records.clone()).unwrap();
        copy.import(records.clone()).unwrap();
        assert_eq!(copy.records(), records);
        copy.close().unwrap();
        assert_eq!(open(&root.path().join("copy")).records(), records);
    }

    #[test]
    fn a_step_that_is_done_stays_as_it_is() {
        let root = tempfile::tempdir().unwrap();
        let store = filled(&root.path().join("store"));
        let done = step("b", StepStatus::Done, 1.0);
        store.put_step(done.clone(), Durability::Flushed).unwrap();
        let other_output = StepRecord { output: Some(Output::File { hash: "x".into(), bytes: 9 }), ..done.clone() };
        for changed in [step("b", StepStatus::Started, 1.0), step("b", StepStatus::Failed, 1.0), other_output] {
            let message = store.put_step(changed.clone(), Durability::Flushed).unwrap_err().to_string();
            assert!(message.contains("`step b` should be left as it is, since it is done"), "{message}");
            let records = Records { run: Some(run(Status::Failed)), steps: vec![changed], ..Records::default() };
            assert!(store.import(records).is_err());
        }
        assert_eq!(store.step("b"), Some(done));
        assert_eq!(store.run().unwrap().status, Status::Running, "a refused import changes nothing");
    }

    #[test]
    fn a_damaged_record_moves_the_store_aside_but_a_newer_format_does_not() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("store");
        let store = filled(&folder);
        store.database.put(vec![("step/b".into(), b"{\"no\":\"step\"}".into())], Durability::Flushed).unwrap();
        store.close().unwrap();
        let OpenedStore { store, damaged } = RunStore::open(&folder).unwrap();
        let why = std::fs::read_to_string(damaged.unwrap().join("why.txt")).unwrap();
        assert!(why.contains("step/b: expected a record of this engine, found missing field"), "{why}");
        assert_eq!(store.records(), Records::default());

        store.database.put(vec![("format".into(), b"2".into())], Durability::Flushed).unwrap();
        store.close().unwrap();
        let message = RunStore::open(&folder).err().unwrap().to_string();
        assert!(message.contains("format: expected records of format 1 or older, found format 2; a newer engine"), "{message}");
        assert_eq!(Database::open(&folder).unwrap().database.get("format").unwrap().unwrap(), b"2");
    }

    #[test]
    fn ten_thousand_steps_open_in_well_under_a_second() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("store");
        let store = open(&folder);
        let steps = (0..10_000).map(|i| step(&format!("eval#{i}"), StepStatus::Done, f64::from(i))).collect();
        let records = Records { steps, ..Records::default() };
        store.import(records.clone()).unwrap();
        store.close().unwrap();
        let start = Instant::now();
        let store = open(&folder);
        let seconds = start.elapsed().as_secs_f64();
        assert_eq!(store.records(), records);
        // Some 0.1 s; the limit is for a machine that is busy with other tests.
        assert!(seconds < 1.0, "{seconds} s");
    }
}
