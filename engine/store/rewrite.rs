//! A database written anew into a fresh folder that then takes the old one's place. sled's log keeps garbage that it cleans
//! only as it goes on, and never well in place. At every instant one whole database has the name or can get it back.

use super::filesystem::{parent, remove_folder, sync_folder, with_suffix};
use super::sled_log::{Change, SledLog, move_aside};
use super::value::check;
use crate::error::{Error, Result};
use crate::failpoint::failpoint;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Changes that are applied at a time.
const BATCH: usize = 256;
/// The new database while it is written.
const NEW: &str = ".rewrite";
/// The old one between the two renames, and until it is removed.
const OLD: &str = ".replaced";

/// Brings a rewrite or a rebuilding to an end that a crash interrupted. Errors: [`Error::Io`].
pub(super) fn finish_rewrite(folder: &Path) -> Result<()> {
    let finish = || -> io::Result<()> {
        let whole = whole(folder);
        if whole != folder {
            fs::rename(&whole, folder)?;
            sync_folder(parent(folder))?;
        }
        remove_folder(&with_suffix(folder, OLD))?;
        remove_folder(&with_suffix(folder, NEW))
    };
    finish().map_err(|error| Error::io(folder, "finish the compaction of", error))
}

/// Where the whole database of `folder` lies, which a crash between two renames leaves under another name.
pub(super) fn whole(folder: &Path) -> PathBuf {
    let (old, new) = (with_suffix(folder, OLD), with_suffix(folder, NEW));
    // Nothing but `replace_damaged` leaves a new one and no other, and there the new one is complete.
    [old, new].into_iter().find(|path| path.exists() && !folder.exists()).unwrap_or_else(|| folder.to_owned())
}

/// Puts what `fill` writes into a new folder in the place of `folder`, which is moved aside with `reason`: where it lies then,
/// none if there was nothing. Failpoint: `store.rebuilt`, between the two renames.
///
/// Errors: those of `fill`, and all is as it was; [`Error::Io`].
pub(super) fn replace_damaged(folder: &Path, reason: &str, fill: impl FnOnce(&Path) -> Result<()>) -> Result<Option<PathBuf>> {
    let io = |error| Error::io(folder, "rebuild", error);
    finish_rewrite(folder)?;
    // A folder has to be there while the new one is written, or half a new one would be taken for the whole database.
    fs::create_dir_all(folder).and_then(|()| sync_folder(parent(folder))).map_err(io)?;
    let new = with_suffix(folder, NEW);
    fill(&new)?;
    let is_empty = fs::read_dir(folder).map_err(io)?.next().is_none();
    let aside = if is_empty { fs::remove_dir(folder).map(|()| None).map_err(io)? } else { Some(move_aside(folder, reason)?) };
    sync_folder(parent(folder)).and_then(|()| failpoint("store.rebuilt")).map_err(io)?;
    fs::rename(&new, folder).and_then(|()| sync_folder(parent(folder))).map_err(io)?;
    Ok(aside)
}

/// Writes `log` anew. The log to go on with: the old one if the new could not be written, none if neither opens.
pub(super) fn rewrite(log: SledLog) -> (Option<SledLog>, Result<()>) {
    let folder = log.folder().to_owned();
    let new = with_suffix(&folder, NEW);
    if let Err(error) = copy(&log, &new) {
        let _ = remove_folder(&new);
        return (Some(log), Err(error));
    }
    let replaced = log.close().and_then(|()| replace(&folder, &new)).map_err(|error| Error::io(&folder, "replace", error));
    // Whatever happened, what has the name now, or gets it back, is whole.
    match finish_rewrite(&folder).and_then(|()| SledLog::open(&folder)) {
        Ok((log, None)) => (Some(log), replaced),
        Ok((_, Some(aside))) => (None, Err(Error::format(&aside, "store", "a database that was just written to open", "damage"))),
        Err(error) => (None, Err(error)),
    }
}

/// All of `log`, checksums verified, in a new and durable database at `new`.
fn copy(log: &SledLog, new: &Path) -> Result<()> {
    let io = |error| Error::io(new, "write", error);
    let pairs = log.scan("").map_err(|error| Error::io(log.folder(), "read", error))?;
    let mut changes = Vec::with_capacity(pairs.len());
    for (key, stored) in pairs {
        check(log.folder(), &key, &stored)?;
        changes.push(Change::Put(key, stored));
    }
    remove_folder(new).map_err(io)?;
    let (target, _) = SledLog::open(new)?;
    changes.chunks(BATCH).try_for_each(|batch| target.apply(batch)).and_then(|()| target.close()).map_err(io)
}

fn replace(folder: &Path, new: &Path) -> io::Result<()> {
    let old = with_suffix(folder, OLD);
    fs::rename(folder, &old)?;
    // Each rename is durable before the next, so that a power loss leaves no state that `finish_rewrite` does not know.
    sync_folder(parent(folder))?;
    fs::rename(new, folder)?;
    sync_folder(parent(folder))?;
    remove_folder(&old)
}

#[cfg(test)]
mod tests {
    use super::super::{Database, Durability};
    use super::*;

    fn filled(folder: &Path) -> Database {
        let database = Database::open(folder).unwrap().database;
        let pairs = (0..50).map(|i| (format!("key/{i:02}"), vec![i; 300])).collect();
        database.put(pairs, Durability::Flushed).unwrap();
        database
    }

    #[test]
    fn a_rewritten_database_holds_the_same_and_takes_less() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("store");
        let database = filled(&folder);
        for round in 0..200u32 {
            let pairs = (0..50).map(|i| (format!("key/{i:02}"), vec![round as u8; 300])).collect();
            database.put(pairs, Durability::Later).unwrap();
        }
        database.durable_flush().unwrap();
        let (before, pairs) = (database.disk_bytes().unwrap(), database.scan("").unwrap());
        database.compact().unwrap();
        assert_eq!(database.scan("").unwrap(), pairs);
        let after = database.disk_bytes().unwrap();
        assert!(after < before, "{before} to {after} bytes");
        database.put(vec![("key/51".into(), vec![1])], Durability::Flushed).unwrap();
        database.close().unwrap();
        let opened = Database::open(&folder).unwrap();
        assert_eq!((opened.damaged, opened.database.verify().unwrap()), (None, 51));
        let names: Vec<_> = fs::read_dir(root.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["store"], "nothing else is left");
    }

    /// The states that a crash can leave, in the order in which `rewrite` passes through them.
    #[test]
    fn every_interrupted_rewrite_is_finished() {
        for state in ["new half written", "between the renames", "both renamed"] {
            let root = tempfile::tempdir().unwrap();
            let folder = root.path().join("store");
            filled(&folder).close().unwrap();
            let (new, old) = (with_suffix(&folder, NEW), with_suffix(&folder, OLD));
            match state {
                "new half written" => {
                    fs::create_dir(&new).unwrap();
                    fs::write(new.join("db"), b"half").unwrap();
                }
                "between the renames" => {
                    filled(&new).close().unwrap();
                    fs::rename(&folder, &old).unwrap();
                }
                _ => {
                    fs::create_dir(&old).unwrap();
                    fs::write(old.join("db"), b"removed in part").unwrap();
                }
            }
            let opened = Database::open(&folder).unwrap();
            assert_eq!((opened.damaged, opened.database.verify().unwrap()), (None, 50), "{state}");
            assert!(!new.exists() && !old.exists(), "{state}");
        }
    }

    #[test]
    fn a_damaged_value_stops_the_rewrite_and_everything_stays() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("store");
        filled(&folder).close().unwrap();
        let (log, _) = SledLog::open(&folder).unwrap();
        log.apply(&[Change::Put("key/07".into(), vec![0xb7, 1, 0, 0, 0, 0, 9])]).unwrap();
        let (log, outcome) = rewrite(log);
        let message = outcome.unwrap_err().to_string();
        assert!(message.contains("key/07: expected checksum"), "{message}");
        assert_eq!(log.unwrap().scan("").unwrap().len(), 50);
    }
}
