//! The records of a run from what lies in its folder: its facts, the lists of its code, the manifests of its checkpoints and
//! what they remember of steps. It stands in where the store is damaged, and `store rebuild` writes a new store from it.
//! What no file holds is named: results of steps that no checkpoint remembers are computed again by a resume.

use super::code;
use super::hold;
use super::run::{Facts, read_facts};
use crate::checkpoint::catalog::list;
use crate::checkpoint::manifest::Manifest;
use crate::error::{Error, Result};
use crate::store::RunStore;
use crate::store::records::{
    CheckpointRecord, EventRecord, GenerationRecord, GenerationStatus, Output, Records, RunRecord, Status, StepRecord, StepStatus,
};
use crate::store::salvage::{Salvage, replace, salvage};
use serde::Deserialize;
use serde_json::Value as Json;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// What a checkpoint's `state.json` remembers of the run around it.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Remembered {
    /// The step at whose end it was taken.
    #[serde(default)]
    pub after: Option<StepRecord>,
    /// Keys of the steps that had ended by then.
    #[serde(default)]
    pub steps: BTreeSet<String>,
    /// Number of the last event by then.
    #[serde(default)]
    pub events: u64,
    /// Ends of `metrics.jsonl` and `timing.jsonl` then.
    #[serde(default)]
    pub log_offsets: (u64, u64),
}

/// Reads what the checkpoint in `folder` remembers. Errors: [`Error::Io`]; [`Error::Format`].
pub fn remembered(folder: &Path) -> Result<Remembered> {
    let path = folder.join("state.json");
    let text = std::fs::read_to_string(&path).map_err(|error| Error::io(&path, "read", error))?;
    serde_json::from_str(&text).map_err(|error| Error::format(&path, "state", "the state of a run", error.to_string()))
}

/// The record of a checkpoint that the store does not know.
pub fn adopted(manifest: &Manifest, number: u64) -> CheckpointRecord {
    CheckpointRecord {
        number,
        name: manifest.name.clone(),
        loop_path: manifest.loop_path.clone(),
        step: manifest.step,
        generation: manifest.generation,
        manifest: manifest.hash().to_string(),
        bytes: manifest.bytes(),
        time: manifest.time,
        metrics: manifest.metrics.clone(),
        pinned: false,
        lost: None,
    }
}

/// How thoroughly checkpoints are looked at.
#[derive(Clone, Copy, PartialEq)]
pub enum Care {
    /// Their manifests are read.
    Manifests,
    /// Every file is read and compared with its hash.
    Files,
}

/// Records with all that the files of a run add to them.
#[derive(Debug, Default)]
pub struct Completed {
    pub records: Records,
    /// What was added, a line each.
    pub added: Vec<String>,
    /// What is missing or damaged, a line each.
    pub missing: Vec<String>,
}

/// Adds to `known` what the files of the run in `folder` tell beyond it.
///
/// Errors: [`Error::Io`] if the folder of the checkpoints cannot be listed.
pub fn complete(folder: &Path, facts: &Facts, known: Records, care: Care) -> Result<Completed> {
    let mut done = Completed { records: known, ..Completed::default() };
    done.add_generations(folder);
    done.add_checkpoints(&folder.join("checkpoints"), care)?;
    done.name_missing_results(folder);
    if done.records.run.is_none() {
        // Of a dead run this says that it was interrupted: what else it was is not known, and a resume finds out.
        let reason = Some("rebuilt from the files of the run".to_string());
        let changed = done.records.checkpoints.iter().map(|record| record.time).fold(facts.created, f64::max);
        done.records.run = Some(RunRecord { status: Status::Running, reason, started: facts.created, changed, pid: 0, resumes: 0 });
        done.added.push("the run: its status is not known, so it counts as interrupted".into());
    }
    Ok(done)
}

impl Completed {
    fn add_generations(&mut self, folder: &Path) {
        for number in code::numbers(folder) {
            if self.records.generations.iter().any(|record| record.number == number) {
                continue;
            }
            match generation_record(folder, number) {
                Ok(record) => {
                    self.added.push(format!("generation {number} of the code"));
                    self.records.generations.push(record);
                }
                Err(error) => self.missing.push(format!("generation {number} of the code: {error}")),
            }
        }
        self.records.generations.sort_by_key(|record| record.number);
    }

    fn add_checkpoints(&mut self, root: &Path, care: Care) -> Result<()> {
        let listed = list(root)?;
        let mut steps: BTreeMap<String, StepRecord> = BTreeMap::new();
        let (mut keys, mut events) = (BTreeSet::new(), 0);
        for (name, manifest) in &listed {
            let sound = match manifest {
                Ok(manifest) if care == Care::Files => manifest.verify(&root.join(name)).map(|()| manifest),
                Ok(manifest) => Ok(manifest),
                Err(error) => Err(Error::Script(error.to_string())),
            };
            if let Err(error) = &sound {
                self.missing.push(format!("checkpoint {name}: {error}"));
            }
            let record = self.records.checkpoints.iter_mut().find(|record| record.name == *name);
            match (record, manifest, sound) {
                (Some(record), Ok(manifest), Ok(_)) if care == Care::Files || record.manifest != manifest.hash() => {
                    // The folder is there and sound, and what it is stands in its manifest.
                    let (number, pinned) = (record.number, record.pinned);
                    *record = CheckpointRecord { pinned, ..adopted(manifest, number) };
                }
                (Some(record), _, Err(error)) => record.lost = Some(error.to_string()),
                (None, Ok(manifest), sound) => {
                    let number = self.records.checkpoints.iter().map(|record| record.number + 1).max().unwrap_or(0);
                    let lost = sound.err().map(|error| error.to_string());
                    self.added.push(format!("checkpoint {name} at step {} of {}", manifest.step, manifest.loop_path));
                    self.records.checkpoints.push(CheckpointRecord { lost, ..adopted(manifest, number) });
                }
                _ => {}
            }
            if let Ok(remembered) = remembered(&root.join(name)) {
                events = events.max(remembered.events);
                keys.extend(remembered.steps);
                steps.extend(remembered.after.map(|step| (step.key.clone(), step)));
            }
        }
        for record in self.records.checkpoints.iter_mut().filter(|record| record.lost.is_none()) {
            if !listed.iter().any(|(name, _)| *name == record.name) {
                record.lost = Some("its folder is gone".into());
                self.missing.push(format!("checkpoint {}: its folder is gone", record.name));
            }
        }
        self.add_steps(steps, keys);
        self.keep_event_numbers(events);
        Ok(())
    }

    /// A resume passes over events up to the last one that its checkpoint has seen, so new ones must come behind that number.
    fn keep_event_numbers(&mut self, last: u64) {
        if self.records.events.last().map_or(0, |event| event.number) >= last {
            return;
        }
        let what = format!("events up to number {last}: what they set is in the checkpoints, when they came is not known");
        let detail = Json::from(what.as_str());
        self.records.events.push(EventRecord { number: last, time: 0.0, kind: "lost".into(), loop_path: None, step: 0, detail });
        self.missing.push(what);
    }

    /// Steps that checkpoints hold whole, and those of which they know only that they were done.
    fn add_steps(&mut self, whole: BTreeMap<String, StepRecord>, keys: BTreeSet<String>) {
        for (key, step) in whole {
            match self.records.steps.iter_mut().find(|record| record.key == key) {
                Some(record) if record.status == StepStatus::Done => continue,
                Some(record) => *record = step,
                None => self.records.steps.push(step),
            }
            self.added.push(format!("step {key}, which a checkpoint holds"));
        }
        for key in keys.into_iter().filter(|key| !key.contains("#now")) {
            if !self.records.steps.iter().any(|record| record.key == key) {
                self.missing.push(format!("step {key}: it was recorded; a resume runs it again if it comes to it"));
            }
        }
    }

    /// Without the steps whose results are gone, so that a resume runs them again.
    fn without_lost_results(mut self, folder: &Path) -> Self {
        self.records.steps.retain(|step| match &step.output {
            Some(Output::File { hash, .. }) => folder.join("steps").join(format!("{hash}.json")).is_file(),
            _ => true,
        });
        self
    }

    fn name_missing_results(&mut self, folder: &Path) {
        for step in &self.records.steps {
            if let Some(Output::File { hash, .. }) = &step.output
                && !folder.join("steps").join(format!("{hash}.json")).is_file()
            {
                self.missing.push(format!("step {}: the file of its result, steps/{hash}.json, is gone", step.key));
            }
        }
    }
}

fn generation_record(folder: &Path, number: u32) -> Result<GenerationRecord> {
    // Reads the sources too: a list of files that are not there is no code.
    code::load(folder, number)?;
    let listed = code::generation(folder, number)?;
    let path = folder.join(format!("code/g{number}.json"));
    let text = std::fs::read_to_string(&path).map_err(|error| Error::io(&path, "read", error))?;
    Ok(GenerationRecord {
        number,
        loop_path: listed.loop_path,
        step: listed.step,
        time: listed.time,
        hash: code::hash(text.trim_end_matches('\n')),
        status: if listed.rejected.is_some() { GenerationStatus::Rejected } else { GenerationStatus::Accepted },
        reason: listed.rejected,
    })
}

/// What `store rebuild` did.
pub struct Rebuilt {
    /// Records that the old store still held.
    pub salvaged: usize,
    pub completed: Completed,
    /// What was wrong with the old store.
    pub damage: Vec<String>,
    /// Where the old store lies now.
    pub aside: Option<PathBuf>,
}

/// Writes the store of the dead run in `folder` anew: what can be read of the old one, then what the files add. Step records
/// whose results are gone are left out, so that a resume runs those steps again.
///
/// Errors: [`Error::Script`] if the run is alive; those of reading `run.json`; those of [`replace`], and the old store stays.
pub fn rebuild(folder: &Path) -> Result<Rebuilt> {
    let held = hold::to_change(folder)?;
    let _held = held.ok_or_else(|| Error::Script(format!("{}: the run is alive; stop it first: perilune stop", folder.display())))?;
    let facts = read_facts(folder)?;
    let store = folder.join("store");
    let Salvage { records, damage, .. } = salvage(&store)?;
    let salvaged = count(&records);
    let completed = complete(folder, &facts, records, Care::Files)?.without_lost_results(folder);
    let reason = if damage.is_empty() { "replaced by a rebuilt one".to_string() } else { damage.join("\n") };
    let aside = replace(&store, &reason, completed.records.clone())?;
    Ok(Rebuilt { salvaged, completed, damage, aside })
}

/// Fills the new `store` of the run in `folder`, whose old one was damaged and lies at `aside`, as [`rebuild`] would.
///
/// Errors: as [`complete`]; those of the store.
pub fn refill(folder: &Path, facts: &Facts, aside: &Path, store: &RunStore) -> Result<()> {
    // What cannot even be copied gives nothing, and the files are still there.
    let records = salvage(aside).map(|found| found.records).unwrap_or_default();
    store.import(complete(folder, facts, records, Care::Manifests)?.without_lost_results(folder).records)
}

fn count(records: &Records) -> usize {
    let lists = records.steps.len() + records.generations.len() + records.checkpoints.len() + records.events.len();
    lists + usize::from(records.run.is_some())
}

#[cfg(test)]
mod tests {
    use super::super::modules::Source;
    use super::super::run::write_facts;
    use super::*;
    use crate::checkpoint::commit::{About, Draft};
    use serde_json::{Map, json};

    fn step(key: &str, output: Output) -> StepRecord {
        let mut record = super::super::steps::started(key, 0);
        (record.status, record.output) = (StepStatus::Done, Some(output));
        record
    }

    /// A run with two generations that led, one that was refused, and two checkpoints, of which the second knows of a step with a
    /// result in a file, of another step and of three events.
    fn run(folder: &Path) -> Facts {
        let facts = Facts::new("name", "a.lua", &[], &[], 3);
        write_facts(folder, &facts).unwrap();
        let source = |text: &str| [Source { path: "a.lua".into(), text: text.into() }];
        code::save(folder, 0, None, 1.0, &source("one")).unwrap();
        code::save(folder, 1, Some(("train", 7)), 2.0, &source("two")).unwrap();
        code::save_rejected(folder, 2, Some(("train", 9)), 3.0, &source("three"), "a.lua:1: no").unwrap();
        let after = step("prepare#0", Output::File { hash: "0f".repeat(16), bytes: 2 });
        let states = [json!({}), json!({ "after": after, "steps": ["prepare#0", "#now#0", "eval#0"], "events": 3 })];
        for (number, state) in (1u64..).zip(states) {
            let draft = Draft::begin(&folder.join("checkpoints"), &format!("train-{number:06}"), 100).unwrap();
            draft.write_file("state.json", state.to_string().as_bytes()).unwrap();
            let about = About {
                loop_path: "train".into(),
                step: number,
                generation: 1,
                engine: "e".into(),
                time: number as f64,
                metrics: Map::new(),
                facts: Json::Null,
            };
            draft.commit(about).unwrap();
        }
        facts
    }

    #[test]
    fn files_tell_of_code_checkpoints_steps_and_the_numbers_of_events() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path();
        let facts = run(folder);
        let found = complete(folder, &facts, Records::default(), Care::Files).unwrap();
        let generations: Vec<_> = found.records.generations.iter().map(|g| (g.number, g.status, g.step, g.reason.clone())).collect();
        let wanted = [
            (0, GenerationStatus::Accepted, 0, None),
            (1, GenerationStatus::Accepted, 7, None),
            (2, GenerationStatus::Rejected, 9, Some("a.lua:1: no".to_string())),
        ];
        assert_eq!(generations, wanted);
        let checkpoints: Vec<_> = found.records.checkpoints.iter().map(|c| (c.number, c.step, c.lost.clone())).collect();
        assert_eq!(checkpoints, [(0, 1, None), (1, 2, None)]);
        assert_eq!(found.records.steps.iter().map(|step| step.key.as_str()).collect::<Vec<_>>(), ["prepare#0"]);
        assert_eq!(found.records.events.last().map(|event| event.number), Some(3), "new events come behind those that were lost");
        assert_eq!(found.records.run.as_ref().map(|run| run.status), Some(Status::Running));
        let missing = found.missing.join("\n");
        for part in ["step eval#0: it was recorded", "events up to number 3", "step prepare#0: the file of its result"] {
            assert!(missing.contains(part) && found.missing.len() == 3, "{part} in {missing}");
        }

        // Whoever knows all of it already learns nothing, but for what is gone or damaged.
        let again = complete(folder, &facts, found.records.clone(), Care::Manifests).unwrap();
        assert_eq!((again.records, again.added), (found.records.clone(), vec![]));
        let spoiled = folder.join("checkpoints/train-000002/state.json");
        std::fs::remove_file(&spoiled).unwrap();
        std::fs::write(&spoiled, "{").unwrap();
        std::fs::remove_dir_all(folder.join("checkpoints/train-000001")).unwrap();
        let lost = complete(folder, &facts, found.records, Care::Files).unwrap().records.checkpoints;
        assert_eq!(lost[0].lost.as_deref(), Some("its folder is gone"));
        assert!(lost[1].lost.as_ref().is_some_and(|reason| reason.contains("state.json")), "{lost:?}");
    }

    #[test]
    fn a_rebuilt_store_keeps_what_the_old_one_held_and_no_step_without_its_result() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path();
        run(folder);
        let store = RunStore::open(&folder.join("store")).unwrap().store;
        let inline = step("eval#0", Output::Inline(json!([1])));
        store.import(Records { steps: vec![inline.clone()], ..Records::default() }).unwrap();
        store.close().unwrap();
        let done = rebuild(folder).unwrap();
        assert_eq!((done.salvaged, done.damage.len(), done.aside.is_some()), (1, 0, true));
        let records = salvage(&folder.join("store")).unwrap().records;
        assert_eq!(records, done.completed.records);
        assert_eq!(records.steps, [inline], "prepare#0 has no result any more and runs again");
        assert_eq!((records.generations.len(), records.checkpoints.len()), (3, 2));
        let _owner = super::super::run::lock(folder).unwrap();
        assert!(rebuild(folder).err().unwrap().to_string().contains("the run is alive"));
    }
}
