//! A run seen from outside, alive or dead: what it is, how it stands, what it has recorded. A living run is asked, a dead one's
//! store is read from a copy, and where neither answers the files of the run tell what they can. Changes nothing.

use super::hold;
use super::rebuild::{Care, complete};
use super::run::{Facts, is_alive, read_facts, unix_seconds, word_for};
use crate::checkpoint::catalog::list;
use crate::error::{Error, Result};
use crate::serve::local_socket::ask;
use crate::store::metrics::tail;
use crate::store::records::{Records, Status};
use crate::store::salvage::salvage;
use serde::Serialize;
use serde_json::{Map, Value as Json, json};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

/// How a run stands, seen from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Standing {
    /// A living process has its folder, which is not complete yet.
    Starting,
    Running,
    Paused,
    Finished,
    Stopped,
    Failed,
    /// Its record says that it runs, and no process does.
    Interrupted,
    /// What it is cannot be read.
    Unreadable,
}

impl Standing {
    /// In one word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Finished => "finished",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
            Self::Interrupted => "interrupted",
            Self::Unreadable => "unreadable",
        }
    }

    /// Of a run whose record says `status`.
    fn of(status: Option<Status>, alive: bool) -> Self {
        match (status, alive) {
            (Some(Status::Finished), _) => Self::Finished,
            (Some(Status::Stopped), _) => Self::Stopped,
            (Some(Status::Failed), _) => Self::Failed,
            (Some(Status::Paused), true) => Self::Paused,
            (Some(Status::Running), true) => Self::Running,
            (None, true) => Self::Starting,
            (Some(Status::Running | Status::Paused) | None, false) => Self::Interrupted,
        }
    }
}

/// A run as it was when it was looked at.
pub struct Inspection {
    pub folder: PathBuf,
    /// The name of its folder.
    pub id: String,
    /// None where they cannot be read.
    pub facts: Option<Facts>,
    pub standing: Standing,
    /// Whether a living process owns it.
    pub alive: bool,
    /// Why it stopped, failed or waits, or cannot be read.
    pub reason: Option<String>,
    pub records: Records,
    /// What to know about this view of it, a sentence each.
    pub notes: Vec<String>,
}

/// How closely a run is looked at.
#[derive(Clone, Copy, PartialEq)]
pub enum Look {
    /// Its records are enough.
    Glance,
    /// Checkpoints that its store does not know count too.
    Whole,
}

/// How long a living run may take to answer.
const PATIENCE: Duration = Duration::from_secs(3);
/// A run may end, or another process go on with it, between two looks.
const ATTEMPTS: usize = 5;

/// Looks at the run in `folder`. Never fails: what cannot be read is said in the result.
pub fn inspect(folder: &Path, look: Look) -> Inspection {
    let id = folder.canonicalize().unwrap_or_else(|_| folder.to_path_buf());
    let id = id.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let mut seen = Inspection {
        folder: folder.to_path_buf(),
        id,
        facts: None,
        standing: Standing::Unreadable,
        alive: is_alive(folder),
        reason: None,
        records: Records::default(),
        notes: Vec::new(),
    };
    let facts = match read_facts(folder) {
        Ok(facts) => facts,
        Err(_) if seen.alive => {
            seen.standing = Standing::Starting;
            return seen;
        }
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            seen.reason = Some("there is no run.json: it was ended while it began, or is no run".into());
            return seen;
        }
        Err(error) => {
            seen.reason = Some(error.to_string());
            return seen;
        }
    };
    for attempt in 1..=ATTEMPTS {
        let read = if seen.alive { seen.ask(attempt == ATTEMPTS) } else { seen.read_store() };
        match read {
            Ok(true) => break,
            Ok(false) if attempt < ATTEMPTS => {
                std::thread::sleep(Duration::from_millis(5));
                seen.alive = is_alive(folder);
            }
            Ok(false) => seen.notes.push("it began and ended while it was looked at".into()),
            Err(error) => {
                seen.notes.push(format!("{error}; this is what its files tell"));
                seen.add_files(&facts);
                break;
            }
        }
    }
    if look == Look::Whole && !seen.alive {
        seen.add_files(&facts);
    }
    let status = seen.records.run.as_ref().map(|run| run.status);
    // A living process that does not answer is past its start if it has taken a checkpoint or logged a line.
    let status = status.or_else(|| (seen.alive && has_metrics(folder)).then_some(Status::Running));
    seen.standing = Standing::of(status, seen.alive);
    seen.reason = match &seen.records.run {
        Some(run) => run.reason.clone(),
        None if seen.alive => None,
        None => Some(format!("it has not begun, or was ended before its first record; go on with: perilune resume {}", word_for(folder))),
    };
    seen.facts = Some(facts);
    seen
}

impl Inspection {
    /// Asks the process that runs it. False if it has ended meanwhile.
    fn ask(&mut self, last: bool) -> Result<bool> {
        let answer = match ask(&self.folder, &json!({ "ask": "records" }), PATIENCE) {
            Ok(answer) => answer,
            Err(_) if !last && !is_alive(&self.folder) => return Ok(false),
            Err(error) => return Err(error),
        };
        self.records = serde_json::from_value(answer)
            .map_err(|error| Error::format(&self.folder, "answer", "the records of a run", error.to_string()))?;
        Ok(true)
    }

    /// Reads its store. False if it is alive again.
    fn read_store(&mut self) -> Result<bool> {
        let Some(_held) = hold::to_read(&self.folder)? else { return Ok(false) };
        let found = salvage(&self.folder.join("store"))?;
        self.records = found.records;
        match found.damage.first() {
            None => Ok(true),
            Some(first) => {
                let more = if found.damage.len() > 1 { format!(" (and {} more)", found.damage.len() - 1) } else { String::new() };
                Err(Error::Script(format!("its store is damaged, mend it with: perilune store rebuild {}: {first}{more}", self.id)))
            }
        }
    }

    /// Adds what lies in files and no record tells.
    fn add_files(&mut self, facts: &Facts) {
        let run = self.records.run.clone();
        match complete(&self.folder, facts, std::mem::take(&mut self.records), Care::Manifests) {
            Ok(completed) => self.records = completed.records,
            Err(error) => self.notes.push(error.to_string()),
        }
        self.records.run = run;
    }

    /// When it began, Unix seconds.
    pub fn started(&self) -> Option<f64> {
        Some(self.facts.as_ref()?.created)
    }

    /// Seconds from its beginning to its end; to now for one that is alive, to its last sign of life for one that was interrupted.
    pub fn duration(&self) -> Option<f64> {
        let started = self.started()?;
        let end = if self.alive {
            unix_seconds()
        } else {
            let recorded = self.records.run.as_ref().map_or(started, |run| run.changed);
            let written = if self.standing == Standing::Interrupted { last_written(&self.folder) } else { None };
            written.map_or(recorded, |written| written.max(recorded))
        };
        Some((end - started).max(0.0))
    }

    /// The script and the words behind it, as they were typed.
    pub fn words(&self) -> String {
        let Some(facts) = &self.facts else { return String::new() };
        let quoted = |word: &String| {
            let plain = !word.is_empty() && word.chars().all(|c| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c));
            if plain { word.clone() } else { format!("'{}'", word.replace('\'', r"'\''")) }
        };
        std::iter::once(&facts.script).chain(&facts.words).map(quoted).collect::<Vec<_>>().join(" ")
    }

    /// The build of the engine that wrote its newest checkpoint; none without one.
    pub fn engine_build(&self) -> Option<String> {
        let listed = list(&self.folder.join("checkpoints")).ok()?;
        listed.into_iter().rev().find_map(|(_, manifest)| Some(manifest.ok()?.engine))
    }

    /// Where its last loop stands: the loop's path and how many steps are done.
    pub fn position(&self) -> Option<(String, u64)> {
        let lines = last_lines(&self.folder);
        let logged = lines.iter().rev().find_map(|line| {
            let path = line.get("loop")?.as_str()?;
            Some((path.to_string(), line.get("step")?.as_u64()? + 1))
        });
        let sound = self.records.checkpoints.iter().filter(|record| record.lost.is_none());
        let kept = sound.max_by(|a, b| a.time.total_cmp(&b.time)).map(|record| (record.loop_path.clone(), record.step));
        logged.or(kept)
    }

    /// The last loss that was logged, or else the last number whose name has `loss` in it.
    pub fn loss(&self) -> Option<f64> {
        let lines = last_lines(&self.folder);
        let of = |wanted: &dyn Fn(&str) -> bool| {
            let value = |line: &Map<String, Json>| line.iter().find(|(name, _)| wanted(name)).and_then(|(_, value)| number(value));
            lines.iter().rev().find_map(value)
        };
        of(&|name| name == "loss").or_else(|| of(&|name| name.contains("loss")))
    }
}

/// A logged value as a number; one that is not finite was logged as its name.
pub fn number(value: &Json) -> Option<f64> {
    match value {
        Json::Number(number) => number.as_f64(),
        Json::String(text) if matches!(text.as_str(), "NaN" | "inf" | "-inf") => text.parse().ok(),
        _ => None,
    }
}

/// What of the metrics is enough to see where a run stands, bytes.
const TAIL_BYTES: u64 = 16 << 10;

fn last_lines(folder: &Path) -> Vec<Map<String, Json>> {
    tail(&folder.join("metrics.jsonl"), TAIL_BYTES).unwrap_or_default()
}

fn has_metrics(folder: &Path) -> bool {
    folder.join("metrics.jsonl").metadata().is_ok_and(|about| about.len() > 0)
}

fn last_written(folder: &Path) -> Option<f64> {
    let modified = folder.join("metrics.jsonl").metadata().and_then(|about| about.modified()).ok()?;
    modified.duration_since(UNIX_EPOCH).ok().map(|time| time.as_secs_f64())
}

/// What a folder begins with that was a run and is being removed.
pub const GONE: &str = "gone-";

/// The folders in `root` that are runs, or began to be, oldest first. A folder that is not there holds none.
///
/// Errors: [`Error::Io`] if it cannot be listed.
pub fn folders(root: &Path) -> Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io(root, "list", error)),
    };
    let mut folders = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| Error::io(root, "list", error))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.path().is_dir() && !name.starts_with(GONE) && !name.starts_with('.') {
            folders.push(entry.path());
        }
    }
    folders.sort();
    Ok(folders)
}

/// Looks at all runs in `root`, oldest first, several at a time. Errors: as [`folders`].
pub fn inspect_all(root: &Path, look: Look) -> Result<Vec<Inspection>> {
    let folders = folders(root)?;
    // What takes time is waiting: for the disk, and for the answers of living runs.
    let workers = folders.len().clamp(1, 16);
    let next = std::sync::atomic::AtomicUsize::new(0);
    let mut seen: Vec<(usize, Inspection)> = std::thread::scope(|scope| {
        let look_on = || {
            let mut seen = Vec::new();
            loop {
                let index = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                let Some(folder) = folders.get(index) else { return seen };
                seen.push((index, inspect(folder, look)));
            }
        };
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(look_on)).collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("looking at a run does not panic")).collect()
    });
    seen.sort_by_key(|(index, _)| *index);
    Ok(seen.into_iter().map(|(_, inspection)| inspection).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::run::{lock, write_facts};
    use crate::serve::local_socket::listen;
    use crate::store::records::RunRecord;
    use crate::store::{Durability, LineLog, RunStore};

    fn facts(words: &[&str]) -> Facts {
        let words: Vec<String> = words.iter().map(|word| word.to_string()).collect();
        Facts::new("name", "a script.lua", &words, &[], 3)
    }

    fn record(status: Status) -> RunRecord {
        RunRecord { status, reason: Some("why".into()), started: 1.0, changed: 2.0, pid: 1, resumes: 0 }
    }

    #[test]
    fn every_state_of_a_folder_has_its_word() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path();
        let standing = || inspect(folder, Look::Glance).standing;
        assert_eq!(standing(), Standing::Unreadable);
        let owner = lock(folder).unwrap();
        assert_eq!(standing(), Standing::Starting);
        write_facts(folder, &facts(&[])).unwrap();
        assert_eq!(standing(), Standing::Starting);
        drop(owner);
        assert_eq!(standing(), Standing::Interrupted, "it was ended before its first record");
        for (status, dead) in [
            (Status::Running, Standing::Interrupted),
            (Status::Paused, Standing::Interrupted),
            (Status::Finished, Standing::Finished),
            (Status::Stopped, Standing::Stopped),
            (Status::Failed, Standing::Failed),
        ] {
            let store = RunStore::open(&folder.join("store")).unwrap().store;
            store.put_run(record(status), Durability::Flushed).unwrap();
            store.close().unwrap();
            let seen = inspect(folder, Look::Whole);
            assert_eq!((seen.standing, seen.alive, seen.reason.as_deref(), &seen.notes[..]), (dead, false, Some("why"), &[][..]));
        }
    }

    #[test]
    fn a_living_run_is_asked_and_one_that_is_silent_told_of_by_its_files() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path();
        write_facts(folder, &facts(&[])).unwrap();
        let _owner = lock(folder).unwrap();
        let mut log = LineLog::create(&folder.join("metrics.jsonl")).unwrap();
        let Json::Object(line) = json!({ "loop": "train", "step": 4, "val_loss": 2.5, "loss": "NaN" }) else { unreachable!() };
        log.append(&line).unwrap();
        let silent = inspect(folder, Look::Glance);
        assert_eq!((silent.standing, silent.alive, silent.notes.len()), (Standing::Running, true, 1));
        assert!(silent.notes[0].contains("control.sock: cannot ask the process at"), "{}", silent.notes[0]);
        assert_eq!(silent.position(), Some(("train".into(), 5)));
        assert!(silent.loss().unwrap().is_nan());
        let _listener = listen(folder, |question| {
            assert_eq!(question, &json!({ "ask": "records" }));
            Ok(json!(Records { run: Some(record(Status::Paused)), ..Records::default() }))
        })
        .unwrap();
        let asked = inspect(folder, Look::Glance);
        assert_eq!((asked.standing, asked.reason.as_deref(), asked.notes.len()), (Standing::Paused, Some("why"), 0));
    }

    #[test]
    fn words_are_quoted_where_a_shell_needs_it() {
        let root = tempfile::tempdir().unwrap();
        write_facts(root.path(), &facts(&["--text", "it's", "--n=3"])).unwrap();
        assert_eq!(inspect(root.path(), Look::Glance).words(), r"'a script.lua' --text 'it'\''s' --n=3");
    }

    #[test]
    fn all_runs_come_in_order_whatever_state_they_are_in() {
        let root = tempfile::tempdir().unwrap();
        assert!(folders(&root.path().join("none")).unwrap().is_empty());
        for n in 0..40 {
            let folder = root.path().join(format!("{n:02}"));
            std::fs::create_dir(&folder).unwrap();
            if n % 2 == 0 {
                write_facts(&folder, &facts(&[])).unwrap();
            }
        }
        std::fs::create_dir(root.path().join("gone-x")).unwrap();
        std::fs::write(root.path().join("note.txt"), "no run").unwrap();
        let seen = inspect_all(root.path(), Look::Glance).unwrap();
        let ids: Vec<_> = seen.iter().map(|run| (run.id.clone(), run.standing)).collect();
        let standing = |n| if n % 2 == 0 { Standing::Interrupted } else { Standing::Unreadable };
        assert_eq!(ids, (0..40).map(|n| (format!("{n:02}"), standing(n))).collect::<Vec<_>>());
    }
}
