//! Forks: a new run that begins where another stood at a checkpoint, with what that one had recorded by then. Its files share the
//! other's disk space by hard links, so neither needs the other any more. The parent may be alive: nothing of it is changed.

use super::code;
use super::modules::Source;
use super::rebuild::{Remembered, adopted, remembered};
use super::run::{Facts, lock, unix_seconds, write_facts};
use crate::checkpoint::catalog::{checkpoint_name, list};
use crate::checkpoint::commit::link_from;
use crate::checkpoint::manifest::Manifest;
use crate::error::{Error, Result};
use crate::store::records::{GenerationRecord, GenerationStatus, Output, Records, StepRecord};
use crate::store::{LineLog, RunStore};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// A run to fork, as it stands on the disk.
pub struct Parent<'a> {
    pub folder: &'a Path,
    pub facts: &'a Facts,
    pub records: &'a Records,
}

/// Where a fork comes from, as its facts say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    pub id: String,
    /// `LOOP=STEP` of the checkpoint; none for the beginning.
    pub at: Option<String>,
    /// Whether the child has other arguments.
    #[serde(default)]
    pub other_arguments: bool,
    /// The words that generations before the child's new code read, which may have other arguments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub earlier: Option<EarlierWords>,
}

/// The words that generations with numbers below `before` read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EarlierWords {
    pub before: u32,
    pub words: Vec<String>,
}

impl Facts {
    /// The words of the command line that a generation reads.
    pub fn words_of(&self, generation: u32) -> &[String] {
        let earlier = self.parent.as_ref().and_then(|parent| parent.earlier.as_ref());
        earlier.filter(|earlier| generation < earlier.before).map_or(&self.words, |earlier| &earlier.words)
    }
}

/// Where a fork begins.
pub enum Start {
    /// From the beginning, with the recorded steps of these keys.
    Anew(BTreeSet<String>),
    /// At this checkpoint.
    Checkpoint(Box<Manifest>),
}

/// What is different in the child.
pub struct Change {
    /// The words of its command line.
    pub words: Vec<String>,
    /// What the script makes of them.
    pub args: Map<String, Json>,
    /// Whether edits and settings that the parent met after the checkpoint come again at the same steps.
    pub later: bool,
    /// The code that leads from the start on; none for the parent's.
    pub code: Option<Vec<Source>>,
}

/// The words of a command line with some arguments replaced, and some left out.
///
/// - `changes`: `name=value`, each
/// - `dropped`: names
///
/// Errors: [`Error::Argument`] for a change of another form, and for a name to leave out that is not there.
pub fn replaced_words(words: &[String], changes: &[String], dropped: &[String]) -> Result<Vec<String>> {
    let plain = |flag: &str| flag.trim_start_matches("--").split('=').next().unwrap_or_default().replace('-', "_");
    let mut changed = BTreeSet::new();
    for name in dropped {
        let is_it = |word: &String| word.starts_with("--") && [plain(name), format!("no_{}", plain(name))].contains(&plain(word));
        if !words.iter().any(is_it) {
            return Err(Error::argument("fork", "drop-arg", "an argument that the run was started with", format!("`{name}`")));
        }
        changed.insert(plain(name));
    }
    for change in changes {
        let Some((name, _)) = change.split_once('=').filter(|(name, _)| !name.is_empty()) else {
            return Err(Error::argument("fork", "arg", "NAME=VALUE, such as lr=1e-4", format!("`{change}`")));
        };
        changed.insert(plain(name));
    }
    let mut kept = Vec::new();
    let mut keeps = true;
    for word in words {
        if word.starts_with("--") {
            let name = plain(word);
            keeps = !(changed.contains(&name) || name.strip_prefix("no_").is_some_and(|name| changed.contains(name)));
        }
        if keeps {
            kept.push(word.clone());
        }
    }
    kept.extend(changes.iter().map(|change| format!("--{}", change.trim_start_matches("--"))));
    Ok(kept)
}

impl Parent<'_> {
    fn checkpoints(&self) -> Result<Vec<Manifest>> {
        let root = self.folder.join("checkpoints");
        let sound = |(name, manifest): (String, Result<Manifest>)| manifest.ok().filter(|m| m.quick_check(&root.join(name)).is_ok());
        Ok(list(&root)?.into_iter().filter_map(sound).collect())
    }

    /// The newest checkpoint, or the beginning where there is none.
    ///
    /// Errors: [`Error::Io`].
    pub fn newest(&self) -> Result<Start> {
        Ok(self.checkpoints()?.pop().map_or(Start::Anew(BTreeSet::new()), |manifest| Start::Checkpoint(Box::new(manifest))))
    }

    /// The place that `LOOP=STEP` names. 0, and step 0 of a loop without a checkpoint there, are the beginning of the run.
    ///
    /// Errors: [`Error::Argument`] for a place of another form, or one without a checkpoint, with those there are.
    pub fn place(&self, at: &str) -> Result<Start> {
        if at == "0" {
            return Ok(Start::Anew(BTreeSet::new()));
        }
        let parsed = at.rsplit_once('=').and_then(|(path, step)| Some((path, step.parse::<u64>().ok()?)));
        let Some((path, step)) = parsed else {
            return Err(Error::argument("fork", "at", "LOOP=STEP, such as train=500, or 0", format!("`{at}`")));
        };
        let checkpoints = self.checkpoints()?;
        if let Some(manifest) = checkpoints.iter().find(|manifest| manifest.loop_path == path && manifest.step == step) {
            return Ok(Start::Checkpoint(Box::new(manifest.clone())));
        }
        if step == 0 {
            return Ok(Start::Anew(BTreeSet::new()));
        }
        let places: Vec<String> = checkpoints.iter().map(|manifest| format!("{}={}", manifest.loop_path, manifest.step)).collect();
        let expected = match places.is_empty() {
            true => "0, the beginning: the run has no checkpoint".to_string(),
            false => format!("a place with a checkpoint: {}, or 0", places.join(", ")),
        };
        Err(Error::argument("fork", "at", expected, format!("`{at}`")))
    }

    /// Makes a run in `root` that begins at `start`. It is there, whole and durable, once its `run.json` is.
    ///
    /// Errors: [`Error::Io`]; [`Error::Format`] if files of the parent are damaged; those of the store.
    pub fn fork(&self, root: &Path, start: &Start, change: Change) -> Result<PathBuf> {
        let mut facts = Facts::new(&self.facts.workflow, &self.facts.script, &change.words, &[], self.facts.seed);
        facts.working_folder.clone_from(&self.facts.working_folder);
        let other_arguments = change.words != self.facts.words;
        facts.args = change.args;
        let earlier = match (start, &change.code) {
            (Start::Checkpoint(manifest), Some(_)) => {
                let number = manifest.generation;
                Some(EarlierWords { before: number + 1, words: self.facts.words_of(number).to_vec() })
            }
            (Start::Anew(_), Some(_)) => None,
            (_, None) => self.facts.parent.as_ref().and_then(|parent| parent.earlier.clone()),
        };
        let at = match start {
            Start::Anew(_) => None,
            Start::Checkpoint(manifest) => Some(format!("{}={}", manifest.loop_path, manifest.step)),
        };
        facts.parent = Some(Origin { id: self.facts.id.clone(), at, other_arguments, earlier });
        let folder = root.join(&facts.id);
        let made = std::fs::create_dir_all(folder.join("code/objects"));
        made.map_err(|error| Error::io(&folder, "make the folder", error))?;
        let _lock = lock(&folder)?;
        self.fill(&folder, start, change.later, change.code)?;
        write_facts(&folder, &facts)?;
        Ok(folder)
    }

    fn fill(&self, folder: &Path, start: &Start, later: bool, new_code: Option<Vec<Source>>) -> Result<()> {
        let state = match start {
            Start::Anew(_) => None,
            Start::Checkpoint(manifest) => {
                let name = checkpoint_name(&manifest.loop_path, manifest.step);
                let from = self.folder.join("checkpoints").join(&name);
                Some((link_from(&from, &folder.join("checkpoints"), &name, |_| {})?, remembered(&from)?))
            }
        };
        let mut records = self.records_at(start, state.as_ref().map(|(_, state)| state), later);
        if let Some((manifest, _)) = &state {
            records.checkpoints = vec![adopted(manifest, 0)];
        }
        let (position, number) = match &state {
            Some((manifest, _)) => (Some((manifest.loop_path.as_str(), manifest.step)), manifest.generation + 1),
            None => (None, 0),
        };
        if let Some(sources) = new_code {
            records.generations.retain(|record| record.number < number);
            let time = unix_seconds();
            let hash = code::save(folder, number, position, time, &sources)?;
            let (loop_path, step) = position.map_or((None, 0), |(path, step)| (Some(path.to_string()), step));
            records.generations.push(GenerationRecord {
                number,
                loop_path,
                step,
                time,
                hash,
                status: GenerationStatus::Accepted,
                reason: None,
            });
        }
        for record in &records.generations {
            if !folder.join(format!("code/g{}.json", record.number)).exists() {
                code::copy(self.folder, folder, record.number)?;
            }
        }
        self.link_results(folder, &records.steps)?;
        if let (Start::Checkpoint(manifest), Some((_, state))) = (start, &state) {
            copy_start(&self.folder.join("metrics.jsonl"), &folder.join("metrics.jsonl"), state.log_offsets.0)?;
            copy_start(&self.folder.join("timing.jsonl"), &folder.join("timing.jsonl"), state.log_offsets.1)?;
            self.link_artifacts(folder, manifest.time)?;
        }
        let store = RunStore::open(&folder.join("store"))?.store;
        store.import(records)?;
        store.close()
    }

    /// What the child knows from the start.
    fn records_at(&self, start: &Start, state: Option<&Remembered>, later: bool) -> Records {
        let mut records = self.records.clone();
        records.run = None;
        records.checkpoints.clear();
        match (start, state) {
            (Start::Checkpoint(manifest), Some(state)) => {
                records.steps.retain(|step| state.steps.contains(&step.key));
                if let Some(after) = state.after.clone().filter(|after| !records.steps.iter().any(|step| step.key == after.key)) {
                    records.steps.push(after);
                }
                records.generations.retain(|record| later || record.number <= manifest.generation);
                records.events.retain(|event| later || event.number <= state.events);
            }
            (Start::Anew(keys), _) => {
                records.steps.retain(|step| keys.contains(&step.key));
                records.generations.retain(|record| later || record.number == 0);
                records.events.retain(|_| later);
            }
            (Start::Checkpoint(_), None) => unreachable!("the state of a checkpoint was read"),
        }
        records
    }

    /// Results of steps that lie in files.
    fn link_results(&self, folder: &Path, steps: &[StepRecord]) -> Result<()> {
        for step in steps {
            let Some(Output::File { hash, .. }) = &step.output else { continue };
            let (from, to) = (self.folder.join("steps"), folder.join("steps"));
            std::fs::create_dir_all(&to).map_err(|error| Error::io(&to, "make the folder", error))?;
            link_tree(&from.join(format!("{hash}.json")), &to.join(format!("{hash}.json")))?;
            if from.join(hash).is_dir() {
                link_tree(&from.join(hash), &to.join(hash))?;
            }
        }
        Ok(())
    }

    /// What scripts had saved by then, Unix seconds: a replay does not save it again.
    fn link_artifacts(&self, folder: &Path, time: f64) -> Result<()> {
        let entries = std::fs::read_dir(self.folder).map_err(|error| Error::io(self.folder, "list", error))?;
        for entry in entries {
            let entry = entry.map_err(|error| Error::io(self.folder, "list", error))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let model = entry.path().join("config.json");
            let Ok(saved) = model.metadata().and_then(|about| about.modified()) else { continue };
            let saved = saved.duration_since(std::time::UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64());
            if super::run::is_artifact(&name) && saved <= time {
                link_tree(&entry.path(), &folder.join(&name))?;
            }
        }
        Ok(())
    }
}

/// A file or a folder with all in it, by hard links; copied where links do not work.
fn link_tree(from: &Path, to: &Path) -> Result<()> {
    if !from.is_dir() {
        if to.exists() {
            return Ok(());
        }
        let linked = std::fs::hard_link(from, to).or_else(|_| std::fs::copy(from, to).map(drop));
        return linked.map_err(|error| Error::io(from, "link", error));
    }
    std::fs::create_dir_all(to).map_err(|error| Error::io(to, "make the folder", error))?;
    for entry in std::fs::read_dir(from).map_err(|error| Error::io(from, "list", error))? {
        let entry = entry.map_err(|error| Error::io(from, "list", error))?;
        link_tree(&entry.path(), &to.join(entry.file_name()))?;
    }
    File::open(to).and_then(|folder| folder.sync_all()).map_err(|error| Error::io(to, "sync", error))
}

/// Copies the first `bytes` of a log.
fn copy_start(from: &Path, to: &Path, bytes: u64) -> Result<()> {
    drop(LineLog::create(to)?);
    let copy = || -> std::io::Result<u64> {
        let mut source = File::open(from)?.take(bytes);
        let mut target = File::options().write(true).open(to)?;
        let copied = std::io::copy(&mut source, &mut target)?;
        target.sync_all()?;
        Ok(copied)
    };
    match copy() {
        Ok(copied) if copied == bytes => Ok(()),
        Ok(copied) => Err(Error::format(from, "end of file", format!("the {bytes} bytes that the checkpoint counts"), format!("{copied}"))),
        Err(error) => Err(Error::io(from, "copy", error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_replaced_however_they_were_written() {
        let words = |text: &str| text.split_whitespace().map(String::from).collect::<Vec<_>>();
        let check =
            |old, changes, new: &str| assert_eq!(replaced_words(&words(old), &words(changes), &[]).unwrap(), words(new), "{old} {changes}");
        check("--lr 1e-3 --steps=40", "lr=1", "--steps=40 --lr=1");
        check("--no-quick --text a.txt", "quick=true text=b.txt", "--quick=true --text=b.txt");
        check("--keep_last=3 -1", "keep-last=4", "--keep-last=4");
        check("", "--a=b=c", "--a=b=c");
        for wrong in ["lr", "=3"] {
            assert!(replaced_words(&[], &words(wrong), &[]).unwrap_err().to_string().contains("NAME=VALUE"), "{wrong}");
        }
        let left = |old, dropped| replaced_words(&words(old), &words("steps=3"), &words(dropped));
        assert_eq!(left("--lr 1e-3 --no-quick --a-b=2 x", "lr quick --a-b").unwrap(), words("--steps=3"));
        assert!(left("--lr 1e-3", "rate").unwrap_err().to_string().contains("an argument that the run was started with, got `rate`"));
    }
}
