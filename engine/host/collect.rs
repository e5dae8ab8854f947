//! What may be removed of runs that are over, and its removal: leftovers of killed processes, old copies that were put aside,
//! files that no record names any more, and checkpoints where the user asks. Nothing of a living run is touched, no pinned
//! checkpoint, and of a run that can go on nothing that it may need.
//!
//! Whatever stops a removal halfway, the run opens as before: a record goes before its files, and a folder loses its name
//! before its first file goes.

use super::code;
use super::hold::{self, Hold};
use super::inspect::{GONE, folders};
use super::rebuild::remembered;
use super::run::read_facts;
use crate::checkpoint::catalog::{self, list};
use crate::checkpoint::retention::{Candidate, Keep, removable_when_finished};
use crate::error::{Error, Result};
use crate::failpoint::failpoint;
use crate::store::RunStore;
use crate::store::records::{Output, Records, Status};
use crate::store::salvage::salvage;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// What is to be removed beside leftovers.
#[derive(Clone, Debug)]
pub struct Wish {
    /// Checkpoints of finished runs beyond this many newest ones; none leaves all.
    pub keep: Option<usize>,
    /// What was put aside (damaged stores, ends that were cut off logs) goes when it is as old as this.
    pub older_than: Duration,
    /// Only say what would go.
    pub dry_run: bool,
}

/// Something that may go.
#[derive(Clone, Debug, PartialEq)]
struct Removal {
    kind: Kind,
    path: PathBuf,
    bytes: u64,
}

/// What it is, in the order in which it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Leftover,
    Aside,
    Checkpoint,
    StepResult,
    Code,
}

impl Kind {
    /// What `count` of them are called.
    pub fn name(self, count: usize) -> &'static str {
        match (self, count) {
            (Self::Leftover, 1) => "leftover of a killed process",
            (Self::Leftover, _) => "leftovers of killed processes",
            (Self::Aside, 1) => "old file or folder put aside",
            (Self::Aside, _) => "old files and folders put aside",
            (Self::Checkpoint, 1) => "checkpoint",
            (Self::Checkpoint, _) => "checkpoints",
            (Self::StepResult, 1) => "result that no step names",
            (Self::StepResult, _) => "results that no step names",
            (Self::Code, 1) => "source that no generation names",
            (Self::Code, _) => "sources that no generation names",
        }
    }
}

/// What became of one folder.
pub struct Collected {
    pub folder: PathBuf,
    /// Kinds that went, or would go, with how many and how many bytes.
    pub gone: Vec<(Kind, usize, u64)>,
    /// Why something was left alone.
    pub notes: Vec<String>,
}

impl Collected {
    /// Bytes that were freed, or would be.
    pub fn bytes(&self) -> u64 {
        self.gone.iter().map(|(_, _, bytes)| bytes).sum()
    }
}

/// A draft of a checkpoint is left alone this long: its folder is there an instant before its lock is.
const LEFTOVER_AGE: Duration = Duration::from_secs(60);

/// Removes what `wish` allows from all runs in `root`. One run that cannot be tidied up does not keep the others from it.
///
/// Failpoints: `gc.remove` in front of every removal, `gc.record` between a checkpoint's record and its files.
/// Errors: [`Error::Io`] if `root` cannot be listed.
pub fn collect(root: &Path, wish: &Wish) -> Result<Vec<Collected>> {
    let mut all = Vec::new();
    for folder in removed_in_part(root)? {
        let mut collected = Collected { folder: folder.clone(), gone: Vec::new(), notes: Vec::new() };
        let bytes = freed_bytes(&folder);
        match if wish.dry_run { Ok(()) } else { remove_path(&folder) } {
            Ok(()) => collected.gone.push((Kind::Leftover, 1, bytes)),
            Err(error) => collected.notes.push(error.to_string()),
        }
        all.push(collected);
    }
    for folder in folders(root)? {
        let mut collected = Collected { folder: folder.clone(), gone: Vec::new(), notes: Vec::new() };
        if let Err(error) = collect_run(&folder, wish, &mut collected) {
            collected.notes.push(error.to_string());
        }
        all.push(collected);
    }
    Ok(all)
}

fn collect_run(folder: &Path, wish: &Wish, collected: &mut Collected) -> Result<()> {
    if !folder.join("run.json").is_file() {
        collected.notes.push("left alone: there is no run.json; `--remove` takes it away whole if it was a run".into());
        return Ok(());
    }
    let Some(held) = hold::to_change(folder)? else {
        collected.notes.push("left alone: it is alive".into());
        return Ok(());
    };
    read_facts(folder)?;
    let mut removals = leftovers(folder, wish.older_than)?;
    let found = salvage(&folder.join("store"))?;
    if found.damage.is_empty() {
        removals.extend(unnamed(folder, &found.records)?);
        removals.extend(checkpoints(folder, &found.records, wish.keep)?);
    } else {
        collected.notes.push("its store is damaged, so only leftovers go; mend it with: perilune store rebuild".into());
    }
    removals.sort_by(|a, b| (a.kind, &a.path).cmp(&(b.kind, &b.path)));
    let mut store = None;
    for removal in removals {
        if !wish.dry_run
            && let Err(error) = remove(&held, folder, &removal, &mut store)
        {
            collected.notes.push(error.to_string());
            continue;
        }
        match collected.gone.iter_mut().find(|(kind, ..)| *kind == removal.kind) {
            Some((_, count, bytes)) => (*count, *bytes) = (*count + 1, *bytes + removal.bytes),
            None => collected.gone.push((removal.kind, 1, removal.bytes)),
        }
    }
    store.map_or(Ok(()), RunStore::close)
}

/// Removes the dead run `id` from `root`, whole: the bytes that it frees.
///
/// Failpoint: `gc.remove`, when the run has lost its name and all its files are still there.
/// Errors: [`Error::Argument`] if there is no run of exactly that name; [`Error::Script`] if it is alive; [`Error::Io`].
pub fn remove_run(root: &Path, id: &str, dry_run: bool) -> Result<u64> {
    let folder = root.join(id);
    let is_ulid = id.len() == 26 && id.bytes().all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit());
    let is_plain = !id.is_empty() && !id.contains('/') && !id.starts_with('.');
    if !is_plain || !folder.is_dir() || !(is_ulid || folder.join("run.json").is_file()) {
        let expected = format!("the whole id of a run in {}, so that none goes by mistake", root.display());
        return Err(Error::argument("runs gc", "--remove", expected, format!("\"{id}\"")));
    }
    let held = hold::to_change(&folder)?;
    let _held = held.ok_or_else(|| Error::Script(format!("{id} is alive; stop it first: perilune stop {id}")))?;
    let bytes = freed_bytes(&folder);
    if dry_run {
        return Ok(bytes);
    }
    let gone = (0..).map(|count| root.join(format!("{GONE}{id}-{count}"))).find(|path| !path.exists());
    let gone = gone.expect("there are more numbers than folders");
    std::fs::rename(&folder, &gone).map_err(|error| Error::io(&folder, "remove", error))?;
    sync(root)?;
    remove_path(&gone)?;
    Ok(bytes)
}

/// Runs whose removal was interrupted.
fn removed_in_part(root: &Path) -> Result<Vec<PathBuf>> {
    Ok(entries(root)?.into_iter().filter(|path| name_of(path).starts_with(GONE) && path.is_dir()).collect())
}

/// What killed processes left in the folder, and what was put aside and is old.
fn leftovers(folder: &Path, older_than: Duration) -> Result<Vec<Removal>> {
    let mut removals = Vec::new();
    let mut add = |kind, path: PathBuf| removals.push(Removal { kind, bytes: freed_bytes(&path), path });
    for path in entries(folder)? {
        let name = name_of(&path);
        let is_aside = name.starts_with("store.bad-") || (name.contains(".cut-") && name.ends_with(".jsonl"));
        // Without the store itself one of these is the store.
        let is_rewrite = ["store.rewrite", "store.replaced"].contains(&name.as_str()) && folder.join("store").exists();
        if is_aside && age(&path).is_some_and(|age| age >= older_than) {
            add(Kind::Aside, path);
        } else if is_rewrite {
            add(Kind::Leftover, path);
        }
    }
    halves(folder)?.into_iter().for_each(|path| add(Kind::Leftover, path));
    for path in entries(&folder.join("checkpoints"))? {
        if name_of(&path).starts_with("tmp-") && path.is_dir() && age(&path).is_some_and(|age| age >= LEFTOVER_AGE) {
            add(Kind::Leftover, path);
        }
    }
    Ok(removals)
}

/// Removes what killed processes had half written beside the checkpoints: models, results of steps, code. What cannot be removed
/// stays for the next time. The run's lock must be held.
///
/// Errors: [`Error::Io`] if the folder cannot be listed.
pub fn sweep_halves(folder: &Path) -> Result<()> {
    for path in halves(folder)? {
        let _ = remove_path(&path);
    }
    Ok(())
}

/// Files and folders that were to take another's place, and whose process was killed before they did.
fn halves(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut halves = Vec::new();
    for below in ["", "code", "code/objects", "steps"] {
        halves.extend(entries(&folder.join(below))?.into_iter().filter(|path| {
            let name = name_of(path);
            name.ends_with(".new") && path.is_file() || is_replacement(&name) && path.is_dir()
        }));
    }
    Ok(halves)
}

/// Whether a folder is the half of one that was about to replace another: `NAME.PID-COUNT.tmp`.
fn is_replacement(name: &str) -> bool {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let middle = name.strip_suffix(".tmp").and_then(|name| name.rsplit_once('.')).and_then(|(_, middle)| middle.split_once('-'));
    middle.is_some_and(|(pid, count)| number(pid) && number(count))
}

/// Results of steps and texts of code that nothing names any more.
fn unnamed(folder: &Path, records: &Records) -> Result<Vec<Removal>> {
    let mut removals = Vec::new();
    let mut add = |kind, path: PathBuf| removals.push(Removal { kind, bytes: freed_bytes(&path), path });
    // A store that lost its records names nothing, and one that was put aside may still be asked.
    let is_whole = records.run.is_some() && !entries(folder)?.iter().any(|path| name_of(path).starts_with("store.bad-"));
    if let Some(results) = named_results(folder, records)?.filter(|_| is_whole) {
        for path in entries(&folder.join("steps"))? {
            let name = name_of(&path);
            let hash = name.strip_suffix(".json").unwrap_or(&name);
            if is_hash(hash) && !results.contains(hash) {
                add(Kind::StepResult, path);
            }
        }
    }
    let listed: Option<Vec<_>> = code::numbers(folder).into_iter().map(|number| code::generation(folder, number).ok()).collect();
    // One list that cannot be read may name anything.
    if let Some(listed) = listed.filter(|listed| !listed.is_empty()) {
        let named: BTreeSet<String> = listed.into_iter().flat_map(|list| list.sources).map(|source| source.hash).collect();
        for path in entries(&folder.join("code/objects"))? {
            let name = name_of(&path);
            if is_hash(&name) && !named.contains(&name) {
                add(Kind::Code, path);
            }
        }
    }
    Ok(removals)
}

/// Hashes of results that a step names, in the store or in a checkpoint. None if a checkpoint cannot be asked.
fn named_results(folder: &Path, records: &Records) -> Result<Option<BTreeSet<String>>> {
    let mut outputs: Vec<Output> = records.steps.iter().filter_map(|step| step.output.clone()).collect();
    let root = folder.join("checkpoints");
    for (name, _) in list(&root)? {
        match remembered(&root.join(name)) {
            Ok(remembered) => outputs.extend(remembered.after.and_then(|step| step.output)),
            Err(_) => return Ok(None),
        }
    }
    let hash = |output| if let Output::File { hash, .. } = output { Some(hash) } else { None };
    Ok(Some(outputs.into_iter().filter_map(hash).collect()))
}

/// The checkpoints of a finished run beyond the newest `keep`.
fn checkpoints(folder: &Path, records: &Records, keep: Option<usize>) -> Result<Vec<Removal>> {
    let is_finished = records.run.as_ref().is_some_and(|run| run.status == Status::Finished);
    let Some(last) = keep.filter(|_| is_finished) else { return Ok(Vec::new()) };
    let root = folder.join("checkpoints");
    let candidate = |(name, manifest): (String, Result<_>)| {
        let manifest: crate::checkpoint::manifest::Manifest = manifest.ok()?;
        let pinned = records.checkpoints.iter().any(|record| record.name == name && record.pinned);
        Some(Candidate { name, loop_path: manifest.loop_path, step: manifest.step, metrics: manifest.metrics, pinned })
    };
    let candidates: Vec<Candidate> = list(&root)?.into_iter().filter_map(candidate).collect();
    let names = removable_when_finished(&candidates, &Keep { last, every: None, best: None });
    let removal = |name: String| {
        let path = root.join(name);
        Removal { kind: Kind::Checkpoint, bytes: freed_bytes(&path), path }
    };
    Ok(names.into_iter().map(removal).collect())
}

/// Removes one thing of a run that is held.
fn remove(_held: &Hold, folder: &Path, removal: &Removal, store: &mut Option<RunStore>) -> Result<()> {
    if removal.kind != Kind::Checkpoint {
        return remove_path(&removal.path);
    }
    let name = name_of(&removal.path);
    failpoint("gc.remove").map_err(|error| Error::io(&removal.path, "remove", error))?;
    if store.is_none() {
        *store = Some(RunStore::open(&folder.join("store"))?.store);
    }
    let store = store.as_ref().expect("it was opened just now");
    for record in store.checkpoints().into_iter().filter(|record| record.name == name) {
        store.remove_checkpoint(record.number)?;
    }
    failpoint("gc.record").map_err(|error| Error::io(&removal.path, "remove", error))?;
    catalog::remove(&folder.join("checkpoints"), &name)
}

/// Removes a file, or a folder with all in it.
fn remove_path(path: &Path) -> Result<()> {
    let remove = || {
        failpoint("gc.remove")?;
        if path.is_dir() && !path.is_symlink() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) }
    };
    remove().map_err(|error| Error::io(path, "remove", error))
}

fn sync(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(|error| Error::io(folder, "sync", error))
}

/// What lies in `folder`, sorted; nothing if it is not there.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|error| Error::io(folder, "list", error))?,
    };
    let paths: std::io::Result<Vec<PathBuf>> = entries.map(|entry| entry.map(|entry| entry.path())).collect();
    let mut paths = paths.map_err(|error| Error::io(folder, "list", error))?;
    paths.sort();
    Ok(paths)
}

fn name_of(path: &Path) -> String {
    path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

fn is_hash(name: &str) -> bool {
    name.len() == 32 && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// How long ago it was changed; nothing for a time in the future.
fn age(path: &Path) -> Option<Duration> {
    SystemTime::now().duration_since(path.symlink_metadata().ok()?.modified().ok()?).ok()
}

/// Bytes on the disk that are free once `path` is gone: files that have another name as well give none back.
fn freed_bytes(path: &Path) -> u64 {
    let Ok(about) = path.symlink_metadata() else { return 0 };
    if !about.is_dir() {
        return if about.nlink() > 1 { 0 } else { about.blocks() * 512 };
    }
    let below = std::fs::read_dir(path).into_iter().flatten().flatten();
    below.map(|entry| freed_bytes(&entry.path())).sum::<u64>() + about.blocks() * 512
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_of_folders_are_told_by_their_names() {
        for (name, wanted) in
            [("model.17-0.tmp", true), ("0a1b.tmp", false), ("model.x-0.tmp", false), ("a.b.3-12.tmp", true), ("a.3-.tmp", false)]
        {
            assert_eq!(is_replacement(name), wanted, "{name}");
        }
    }

    #[test]
    fn halves_are_swept_up_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str| folder.path().join(name);
        for name in ["model.17-0.tmp", "model", "steps/ab.3-1.tmp", "checkpoints/tmp-1"] {
            std::fs::create_dir_all(place(name)).unwrap();
            std::fs::write(place(name).join("model.safetensors"), "x").unwrap();
        }
        for name in ["run.json", "run.json.new", "steps/0a.json.new"] {
            std::fs::write(place(name), "x").unwrap();
        }
        sweep_halves(folder.path()).unwrap();
        for (name, stays) in [
            ("model.17-0.tmp", false),
            ("steps/ab.3-1.tmp", false),
            ("run.json.new", false),
            ("steps/0a.json.new", false),
            ("run.json", true),
        ] {
            assert_eq!(place(name).exists(), stays, "{name}");
        }
        assert!(place("model/model.safetensors").exists() && place("checkpoints/tmp-1").exists());
    }

    #[test]
    fn a_file_with_another_name_frees_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a");
        std::fs::write(&file, vec![1; 10_000]).unwrap();
        let alone = freed_bytes(&file);
        assert!((10_000..50_000).contains(&alone), "{alone}");
        std::fs::hard_link(&file, folder.path().join("b")).unwrap();
        assert_eq!(freed_bytes(&file), 0);
        assert_eq!(freed_bytes(&folder.path().join("none")), 0);
    }

    #[test]
    fn only_a_whole_id_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let id = "01JD0000000000000000000000";
        std::fs::create_dir_all(root.path().join(id).join("code")).unwrap();
        std::fs::create_dir(root.path().join("notes")).unwrap();
        for wrong in ["", ".", "..", "01JD", "notes", "../x", "01JD0000000000000000000001"] {
            let message = remove_run(root.path(), wrong, false).unwrap_err().to_string();
            assert!(message.contains("the whole id of a run"), "{wrong}: {message}");
        }
        assert!(remove_run(root.path(), id, true).unwrap() > 0 && root.path().join(id).is_dir());
        remove_run(root.path(), id, false).unwrap();
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 1, "nothing but the notes");
    }
}
