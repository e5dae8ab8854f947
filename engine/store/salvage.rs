//! The records of a store read without touching it, from a copy: what a look at a run shows, and all that can be had of a
//! damaged one. And the way back: a store written anew from records. Decides nothing about what is missing.

use super::filesystem::BALLAST;
use super::records::Records;
use super::rewrite::{replace_damaged, whole};
use super::run_store::{Held, RunStore, check_format, decoded};
use super::scratch::Scratch;
use super::seal;
use super::sled_log::SledLog;
use super::value::decode;
use crate::error::{Error, Result};
use std::io;
use std::path::{Path, PathBuf};

/// What a store holds, as far as it can be read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Salvage {
    pub records: Records,
    /// What is wrong with it, one sentence each; empty for a sound store, and for one that is not there.
    pub damage: Vec<String>,
    /// Keys that were read.
    pub keys: usize,
}

/// Reads the store in `folder` from a copy, so that it stays as it is, damaged or not. The caller sees to it that nobody
/// writes there meanwhile. A folder that is not there has no records.
///
/// Errors: [`Error::Format`] if a newer engine wrote it; [`Error::Io`].
pub fn salvage(folder: &Path) -> Result<Salvage> {
    let mut found = Salvage::default();
    let source = whole(folder);
    if !source.exists() {
        return Ok(found);
    }
    let copy = copy_of(&source).map_err(|error| Error::io(&source, "copy", error))?;
    let (log, aside) = match SledLog::open(&copy.path().join("store")) {
        Ok(opened) => opened,
        // What looks like another version's may be damage. The copy's place says nothing to anybody.
        Err(Error::Format { place, expected, found: other, .. }) => {
            found.damage.push(format!("it does not open: {place}: expected {expected}, found {other}"));
            return Ok(found);
        }
        Err(error) => return Err(error),
    };
    if let Some(aside) = aside {
        let why = std::fs::read_to_string(aside.join("why.txt")).unwrap_or_default();
        found.damage.push(format!("it does not open: {}", why.trim()));
    } else if let Some(difference) = seal::check_and_break(&log).map_err(|error| Error::io(&source, "check the seal of", error))? {
        found.damage.push(difference);
    }
    let mut held = Held::default();
    match log.scan("") {
        Err(error) => found.damage.push(format!("it cannot be read: {error}")),
        Ok(pairs) => {
            for (key, stored) in pairs {
                let payload = decode(&source, &key, stored);
                if let (Ok(payload), "format") = (&payload, key.as_str()) {
                    check_format(&source, decoded(&source, &key, payload).unwrap_or_default())?;
                }
                match payload.and_then(|payload| held.add(&source, &key, &payload)) {
                    Ok(()) => found.keys += 1,
                    Err(error) => found.damage.push(error.to_string()),
                }
            }
        }
    }
    // The copy goes away, so how it closes does not matter.
    let _ = log.close();
    found.records = held.records();
    Ok(found)
}

/// Writes a store of `records` and puts it in the place of the one in `folder`, which is moved aside with `reason`: where it
/// lies then, none if there was none. Whatever stops it, `folder` holds the old store or the new one. The caller holds the run.
///
/// Failpoint: `store.rebuilt`, when the old one is aside and the new one not yet in its place.
/// Errors: those of [`RunStore::import`]; [`Error::Io`].
pub fn replace(folder: &Path, reason: &str, records: Records) -> Result<Option<PathBuf>> {
    replace_damaged(folder, reason, |new| {
        let store = RunStore::open(new)?.store;
        store.import(records)?;
        store.close()
    })
}

/// A copy of the store in `source`, in the folder `store` there.
fn copy_of(source: &Path) -> io::Result<Scratch> {
    // The folder of temporary files is everybody's, and records are not.
    let scratch = Scratch::make()?;
    copy_folder(source, &scratch.path().join("store"))?;
    Ok(scratch)
}

fn copy_folder(from: &Path, to: &Path) -> io::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_folder(&entry.path(), &target)?;
        } else if entry.file_name() != BALLAST {
            std::fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::records::{EventRecord, RunRecord, Status};
    use super::super::{Database, Durability};
    use super::*;
    use serde_json::json;
    use std::fs;

    fn records() -> Records {
        let event = |number| EventRecord { number, time: 1.5, kind: "set".into(), loop_path: None, step: 3, detail: json!({ "lr": 0.1 }) };
        let run = RunRecord { status: Status::Stopped, reason: None, started: 1.0, changed: 2.0, pid: 7, resumes: 1 };
        Records { run: Some(run), events: (1..=200).map(event).collect(), ..Records::default() }
    }

    fn filled(folder: &Path) {
        let store = RunStore::open(folder).unwrap().store;
        store.import(records()).unwrap();
        store.close().unwrap();
    }

    /// Names and contents of all files in a folder.
    fn content(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
        let mut files = Vec::new();
        let mut waiting = vec![folder.to_owned()];
        while let Some(folder) = waiting.pop() {
            for entry in fs::read_dir(&folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() { waiting.push(path) } else { files.push((path.clone(), fs::read(&path).unwrap())) }
            }
        }
        files.sort();
        files
    }

    #[test]
    fn a_store_is_read_without_a_change_and_what_is_not_there_is_empty() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("store");
        assert_eq!(salvage(&folder).unwrap(), Salvage::default());
        assert!(!folder.exists());
        filled(&folder);
        let before = content(root.path());
        let found = salvage(&folder).unwrap();
        assert_eq!((found.records, found.damage, found.keys), (records(), vec![], 202));
        assert_eq!(content(root.path()), before);
    }

    #[test]
    fn a_damaged_store_gives_what_is_left_and_says_what_is_not() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("store");
        filled(&folder);
        let database = Database::open(&folder).unwrap().database;
        database.put(vec![("event/00000000000000000007".into(), b"{}".into())], Durability::Flushed).unwrap();
        database.close().unwrap();
        let found = salvage(&folder).unwrap();
        assert_eq!((found.records.events.len(), found.damage.len()), (199, 1));
        assert!(found.damage[0].contains("event/00000000000000000007: expected a record of this engine"), "{:?}", found.damage);

        let mut bytes = fs::read(folder.join("db")).unwrap();
        // Within what was written: behind it the file is zeros.
        let end = bytes.iter().rposition(|byte| *byte != 0).unwrap();
        bytes[end / 2] ^= 16;
        fs::write(folder.join("db"), bytes).unwrap();
        let before = content(root.path());
        let found = salvage(&folder).unwrap();
        // Where the bit lies decides whether it opens without some of its records or not at all.
        assert!(!found.damage.is_empty() && found.records.events.len() < 199, "{} events, {:?}", found.records.events.len(), found.damage);
        assert_eq!(content(root.path()), before, "a damaged store stays as it is");

        for file in content(&folder) {
            fs::write(&file.0, b"garbage of no meaning").unwrap();
        }
        let found = salvage(&folder).unwrap();
        assert_eq!((found.records, found.damage.len()), (Records::default(), 1));

        fs::remove_dir_all(&folder).unwrap();
        filled(&folder);
        let database = Database::open(&folder).unwrap().database;
        database.put(vec![("format".into(), b"2".into())], Durability::Flushed).unwrap();
        database.close().unwrap();
        assert!(salvage(&folder).unwrap_err().to_string().contains("a newer engine wrote this run"));
    }

    #[test]
    fn a_store_is_replaced_and_every_state_between_opens() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("store");
        assert_eq!(replace(&folder, "none was there", records()).unwrap(), None);
        assert_eq!(salvage(&folder).unwrap().records, records());
        let aside = replace(&folder, "a test", Records::default()).unwrap().unwrap();
        assert_eq!(fs::read_to_string(aside.join("why.txt")).unwrap(), "a test\n");
        assert_eq!(salvage(&aside).unwrap().records, records());
        assert_eq!(salvage(&folder).unwrap().records, Records::default());

        // The old one aside, the new one not yet in its place.
        fs::remove_dir_all(&folder).unwrap();
        filled(&root.path().join("store.rewrite"));
        assert_eq!(salvage(&folder).unwrap().records, records());
        assert!(!folder.exists());
        assert_eq!(RunStore::open(&folder).unwrap().store.records(), records());
        // The new one half written, the old one in its place: it stays.
        fs::create_dir(root.path().join("store.rewrite")).unwrap();
        assert_eq!(RunStore::open(&folder).unwrap().store.records(), records());
        assert!(!root.path().join("store.rewrite").exists());
    }
}
