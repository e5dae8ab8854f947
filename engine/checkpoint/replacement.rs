//! A folder that appears whole or not at all: written beside its target, made durable, then put in the target's place.
//! Until then the old target stays as it was; after a failure or a kill, too. Knows no tensors (`writer.rs` does).

use super::folder::is_plain_name;
use crate::error::{Error, Result};
use rustix::fs::{CWD, FlockOperation};
use std::fs::File;
use std::io::{Error as IoError, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// A temporary folder `NAME.PID-N.tmp` beside its target. Dropped without [`Replacement::commit`], it is removed.
///
/// It is locked while its process lives. One that a killed process left behind is unlocked, and the next replacement of
/// the same target removes it.
#[derive(Debug)]
pub struct Replacement {
    target: PathBuf,
    temporary: PathBuf,
    /// The temporary folder, open and locked.
    folder: File,
    committed: bool,
}

impl Replacement {
    /// Begins to replace (or create) the folder `target`; its parents are created too.
    ///
    /// Errors: [`Error::Argument`] if `target` is something that no checkpoint was saved to: a file, or a folder with
    /// folders in it, or with files but no safetensors; [`Error::Io`].
    pub fn begin(target: &Path) -> Result<Self> {
        // A target that is a link keeps being one: the folder it points to is replaced.
        let target = match target.canonicalize() {
            Ok(real) => real,
            Err(e) if e.kind() == ErrorKind::NotFound => std::path::absolute(target).map_err(|e| Error::io(target, "save to", e))?,
            Err(e) => return Err(Error::io(target, "save to", e)),
        };
        let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
            return Err(Error::argument("save", "path", "a folder with a name", target.display()));
        };
        check_replaceable(&target)?;
        std::fs::create_dir_all(parent).map_err(|e| Error::io(parent, "create", e))?;
        let name = name.to_string_lossy();
        remove_leftovers(parent, &name);
        for attempt in 0..10_000 {
            let temporary = parent.join(format!("{name}.{}-{attempt}.tmp", std::process::id()));
            match std::fs::create_dir(&temporary) {
                Ok(()) => {
                    let folder = File::open(&temporary).map_err(|e| Error::io(&temporary, "open", e))?;
                    // A file system without locks only loses the removal of leftovers.
                    let _ = rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive);
                    return Ok(Self { target, temporary, folder, committed: false });
                }
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                Err(e) => return Err(Error::io(&temporary, "create", e)),
            }
        }
        Err(Error::io(&target, "save to", IoError::new(ErrorKind::AlreadyExists, "10000 temporary folders of this process lie beside it")))
    }

    /// Where the files are to be written meanwhile.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// Fails unless the file system has room for `bytes` more, besides the old target, which stays until the end.
    pub fn check_room(&self, bytes: u64) -> Result<()> {
        let about = rustix::fs::fstatvfs(&self.folder).map_err(|e| Error::io(&self.temporary, "measure", e.into()))?;
        let free = about.f_bavail.saturating_mul(about.f_frsize);
        if free < bytes {
            let what = format!("{bytes} bytes are needed, {free} are free; the old folder stays until the new one is complete");
            return Err(Error::io(&self.target, "save to", IoError::new(ErrorKind::StorageFull, what)));
        }
        Ok(())
    }

    /// Creates the file `name` in the temporary folder. Errors: [`Error::Argument`] if it is no plain name; [`Error::Io`].
    pub fn create_file(&self, name: &str) -> Result<File> {
        if !is_plain_name(name) {
            return Err(Error::argument("save", "file", "the plain name of a file", format!("{name:?}")));
        }
        let path = self.temporary.join(name);
        File::create_new(&path).map_err(|e| Error::io(&path, "create", e))
    }

    /// Writes a whole small file and makes it durable. Errors: as [`Self::create_file`].
    pub fn write_file(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let mut file = self.create_file(name)?;
        std::io::Write::write_all(&mut file, bytes)
            .and_then(|()| file.sync_all())
            .map_err(|e| Error::io(&self.temporary.join(name), "write", e))
    }

    /// Copies the file at `from` and makes the copy durable. Errors: as [`Self::create_file`].
    pub fn copy_file(&self, name: &str, from: &Path) -> Result<()> {
        let mut source = File::open(from).map_err(|e| Error::io(from, "read", e))?;
        let mut file = self.create_file(name)?;
        std::io::copy(&mut source, &mut file).and_then(|_| file.sync_all()).map_err(|e| Error::io(&self.temporary.join(name), "write", e))
    }

    /// Puts the temporary folder in the target's place, durably. Every file in it must have been synced by its writer.
    ///
    /// On Linux the two folders change places in one step, so that at no instant neither is there.
    /// Errors: [`Error::Io`], and the old target is in place, unless only the removal of its remains failed.
    pub fn commit(mut self) -> Result<()> {
        self.folder.sync_all().map_err(|e| Error::io(&self.temporary, "sync", e))?;
        check_replaceable(&self.target)?;
        let failed = |e: IoError| Error::io(&self.target, "replace", e);
        let old = if self.target.exists() {
            Some(exchange(&self.temporary, &self.target).map_err(failed)?)
        } else {
            std::fs::rename(&self.temporary, &self.target).map_err(failed)?;
            None
        };
        self.committed = true;
        let parent = self.target.parent().expect("begin has checked that there is a parent");
        File::open(parent).and_then(|parent| parent.sync_all()).map_err(|e| Error::io(parent, "sync", e))?;
        match old.map_or(Ok(()), |old| std::fs::remove_dir_all(&old).map_err(|e| (old, e))) {
            Err((old, e)) if e.kind() != ErrorKind::NotFound => Err(Error::io(&old, "remove", e)),
            // Gone already: another process took it for a leftover, which by now it is.
            _ => Ok(()),
        }
    }
}

impl Drop for Replacement {
    fn drop(&mut self) {
        if !self.committed {
            // Nothing can be done about a failure here; a later save tries again.
            let _ = std::fs::remove_dir_all(&self.temporary);
        }
    }
}

/// Puts `new` where `target` is; returns where the old target went, which is to be removed.
#[cfg(target_os = "linux")]
fn exchange(new: &Path, target: &Path) -> std::io::Result<PathBuf> {
    match rustix::fs::renameat_with(CWD, new, CWD, target, rustix::fs::RenameFlags::EXCHANGE) {
        Ok(()) => Ok(new.to_owned()),
        // Some file systems cannot: then in two steps.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => rename_aside(new, target),
        Err(e) => Err(e.into()),
    }
}

#[cfg(not(target_os = "linux"))]
fn exchange(new: &Path, target: &Path) -> std::io::Result<PathBuf> {
    rename_aside(new, target)
}

/// As [`exchange`] in two steps: a kill between them leaves the old folder whole, under the name `NAME.old-PID`.
fn rename_aside(new: &Path, target: &Path) -> std::io::Result<PathBuf> {
    let mut aside = target.as_os_str().to_owned();
    aside.push(format!(".old-{}", std::process::id()));
    let aside = PathBuf::from(aside);
    std::fs::rename(target, &aside)?;
    if let Err(e) = std::fs::rename(new, target) {
        std::fs::rename(&aside, target)?;
        return Err(e);
    }
    Ok(aside)
}

/// Whether a save may replace what lies at `target`: nothing, an empty folder, or an earlier checkpoint. A mistyped path
/// must not cost a home folder.
fn check_replaceable(target: &Path) -> Result<()> {
    let refuse = |found: String| {
        Err(Error::argument("save", format!("{}", target.display()), "a new folder, an empty one, or an earlier checkpoint", found))
    };
    let about = match std::fs::metadata(target) {
        Ok(about) => about,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::io(target, "save to", e)),
    };
    if !about.is_dir() {
        return refuse("a file".into());
    }
    let (mut names, mut weights) = (0, false);
    for entry in std::fs::read_dir(target).map_err(|e| Error::io(target, "list", e))? {
        let entry = entry.map_err(|e| Error::io(target, "list", e))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type().map_err(|e| Error::io(target, "list", e))?.is_dir() {
            return refuse(format!("a folder that holds the folder {name}"));
        }
        names += 1;
        weights |= name.ends_with(".safetensors");
    }
    if names > 0 && !weights { refuse(format!("a folder of {names} files without weights")) } else { Ok(()) }
}

/// Removes temporary folders of `name` whose process is gone. Whatever fails here only leaves them for another time.
fn remove_leftovers(parent: &Path, name: &str) {
    let Ok(entries) = std::fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        let leftover = entry.file_name().to_string_lossy().into_owned();
        let number = leftover.strip_prefix(name).and_then(|rest| rest.strip_prefix('.')).and_then(|rest| rest.strip_suffix(".tmp"));
        if !number.is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit() || b == b'-')) {
            continue;
        }
        // Between its creation and its lock a folder is unlocked though in use: leave the young alone.
        let age =
            entry.metadata().and_then(|about| about.modified()).map(|time| SystemTime::now().duration_since(time).unwrap_or_default());
        if !age.is_ok_and(|age| age > Duration::from_secs(60)) {
            continue;
        }
        if let Ok(folder) = File::open(entry.path())
            && rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive).is_ok()
        {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Saves one weights file of `text` to `target`.
    fn save(target: &Path, text: &str) -> Result<()> {
        let replacement = Replacement::begin(target)?;
        replacement.write_file("w.safetensors", text.as_bytes())?;
        replacement.commit()
    }

    #[test]
    fn a_new_an_empty_and_an_old_target_are_replaced_whole() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("model");
        save(&target, "one").unwrap();
        std::fs::write(target.join("extra.txt"), "of the old one").unwrap();
        save(&target, "two").unwrap();
        assert_eq!(std::fs::read_to_string(target.join("w.safetensors")).unwrap(), "two");
        assert_eq!(names(&target), ["w.safetensors"]);
        let empty = folder.path().join("empty");
        std::fs::create_dir(&empty).unwrap();
        save(&empty, "three").unwrap();
        save(&folder.path().join("runs/monday/model"), "four").unwrap();
        assert_eq!(names(folder.path()), ["empty", "model", "runs"]);
    }

    #[test]
    fn without_commit_nothing_changes_and_nothing_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("model");
        save(&target, "one").unwrap();
        let replacement = Replacement::begin(&target).unwrap();
        replacement.write_file("w.safetensors", b"half").unwrap();
        assert_eq!(names(folder.path()).len(), 2);
        drop(replacement);
        assert_eq!(names(folder.path()), ["model"]);
        assert_eq!(std::fs::read_to_string(target.join("w.safetensors")).unwrap(), "one");
    }

    #[test]
    fn two_steps_do_what_one_does() {
        let folder = tempfile::tempdir().unwrap();
        let (new, target) = (folder.path().join("new"), folder.path().join("model"));
        std::fs::create_dir(&target).unwrap();
        assert!(rename_aside(&new, &target).is_err());
        assert_eq!(names(folder.path()), ["model"], "the old target is back after a failure");
        std::fs::create_dir(&new).unwrap();
        std::fs::write(new.join("x"), "x").unwrap();
        let aside = rename_aside(&new, &target).unwrap();
        assert!(target.join("x").exists() && aside.is_dir());
    }

    #[test]
    fn a_link_stays_a_link() {
        let folder = tempfile::tempdir().unwrap();
        let (real, link) = (folder.path().join("real"), folder.path().join("link"));
        save(&real, "one").unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        save(&link, "two").unwrap();
        assert!(link.symlink_metadata().unwrap().is_symlink());
        assert_eq!(std::fs::read_to_string(real.join("w.safetensors")).unwrap(), "two");
    }

    #[test]
    fn what_is_no_checkpoint_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let check = |target: &Path, wanted: &str| {
            let message = Replacement::begin(target).expect_err(wanted).to_string();
            assert!(message.contains(wanted), "{message} lacks {wanted}");
        };
        std::fs::write(folder.path().join("file"), "x").unwrap();
        check(&folder.path().join("file"), "a file");
        let home = folder.path().join("home");
        std::fs::create_dir_all(home.join("letters")).unwrap();
        std::fs::write(home.join("x.safetensors"), "x").unwrap();
        check(&home, "the folder letters");
        let notes = folder.path().join("notes");
        std::fs::create_dir(&notes).unwrap();
        std::fs::write(notes.join("a.txt"), "x").unwrap();
        check(&notes, "1 files without weights");
        check(Path::new("/"), "a folder with a name");
        check(&folder.path().join("file/model"), "cannot save to");
        let replacement = Replacement::begin(&folder.path().join("model")).unwrap();
        for name in ["../x", "", "a/b", "/x", ".."] {
            assert!(replacement.write_file(name, b"x").unwrap_err().to_string().contains("plain name"), "{name}");
        }
        let message = replacement.check_room(u64::MAX).unwrap_err().to_string();
        assert!(message.contains("18446744073709551615 bytes are needed"), "{message}");
        replacement.check_room(1).unwrap();
    }

    #[test]
    fn leftovers_of_dead_processes_go_and_those_of_live_ones_stay() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("model");
        let old = SystemTime::now() - Duration::from_secs(3600);
        let live = Replacement::begin(&target).unwrap();
        File::open(live.path()).unwrap().set_modified(old).unwrap();
        for name in ["model.123-0.tmp", "model.124-0.tmp", "model.notes.tmp", "other.123-0.tmp"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
            if name != "model.124-0.tmp" {
                File::open(folder.path().join(name)).unwrap().set_modified(old).unwrap();
            }
        }
        save(&target, "one").unwrap();
        let live_name = live.path().file_name().unwrap().to_str().unwrap();
        let mut want = vec!["model", "model.124-0.tmp", "model.notes.tmp", "other.123-0.tmp", live_name];
        want.sort_unstable();
        assert_eq!(names(folder.path()), want);
    }
}
