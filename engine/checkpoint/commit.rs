//! The commit of a checkpoint: files are written into a temporary folder, hashed, made durable and read-only, then named in a
//! manifest, then the folder gets its name by one rename. Whatever stops it, no half of a checkpoint has a valid name.
//! Knows files and names; no model, no store. What lies in `root` is listed and removed by `catalog.rs`.

use super::catalog::{check_name, create_durably, remove_tree, sync_folder, temporary_path};
use super::free_space::free_bytes;
use super::manifest::{FileEntry, FolderContent, MANIFEST_FORMAT, MANIFEST_NAME, Manifest, hash_block, hash_stream, path_fault};
use crate::error::{Error, Result};
use crate::failpoint::failpoint;
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::fs::{File, Permissions};
use std::io::{Error as IoError, ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// The mode of a committed file: nobody writes it again, and forks share it by hard links.
const READ_ONLY: u32 = 0o444;
const ATTEMPTS: usize = 1000;

/// What a manifest says of its checkpoint beside its files.
#[derive(Clone, Debug, PartialEq)]
pub struct About {
    /// The loop at whose boundary it is taken.
    pub loop_path: String,
    /// Iterations of that loop that are behind it.
    pub step: u64,
    /// The generation of the script that runs.
    pub generation: u32,
    /// The build of the engine.
    pub engine: String,
    /// Unix seconds.
    pub time: f64,
    /// The numbers logged at that step.
    pub metrics: Map<String, Value>,
    /// Whatever else is to be known without opening a file.
    pub facts: Value,
}

/// A checkpoint that is being written, in a folder `tmp-*` of its own. Dropped without a commit, it is removed.
///
/// The folder is locked while its process lives, so that a sweep leaves it alone; one that a killed process left is not.
#[derive(Debug)]
pub struct Draft {
    root: PathBuf,
    name: String,
    temporary: PathBuf,
    /// The temporary folder, open and locked.
    folder: File,
    committed: bool,
}

impl Draft {
    /// Begins the checkpoint `name` in `root`, which is created if need be. Failpoint: `checkpoint.begin`.
    ///
    /// - `bytes_estimate`: what will be written; a fifth more must be free
    ///
    /// Errors: [`Error::Argument`] for a name that is none; [`Error::Io`] of kind `StorageFull` before anything is written.
    pub fn begin(root: &Path, name: &str, bytes_estimate: u64) -> Result<Self> {
        check_name("checkpoint", name)?;
        let root = std::path::absolute(root).map_err(|e| Error::io(root, "checkpoint to", e))?;
        failpoint("checkpoint.begin").map_err(|e| Error::io(&root.join(name), "begin", e))?;
        create_durably(&root)?;
        check_room(&root, name, bytes_estimate)?;
        for _ in 0..ATTEMPTS {
            let temporary = temporary_path(&root, "");
            match std::fs::create_dir(&temporary) {
                Ok(()) => {}
                Err(e) if e.kind() == ErrorKind::AlreadyExists => continue,
                Err(e) => return Err(Error::io(&temporary, "create", e)),
            }
            // A sweep without grace may come between any two lines here: then another folder is made.
            let Ok(folder) = File::open(&temporary) else { continue };
            let swept = rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive) == Err(Errno::WOULDBLOCK);
            // A file system without locks only loses the sweep.
            if !swept && temporary.is_dir() {
                return Ok(Self { root, name: name.into(), temporary, folder, committed: false });
            }
        }
        Err(Error::io(&root, "create a temporary folder in", IoError::new(ErrorKind::AlreadyExists, "a thousand vanished or were taken")))
    }

    /// The folder to write into. Files and subfolders need not be synced; temporary files must be gone at the commit.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// The path of a file (or folder) about to be written, `relative` to the checkpoint; the folders above it are created.
    /// Failpoint: `checkpoint.write`.
    ///
    /// Errors: [`Error::Argument`] if it leads out of the folder; [`Error::Io`].
    pub fn place(&self, relative: &str) -> Result<PathBuf> {
        if let Some(fault) = path_fault(relative) {
            return Err(Error::argument("checkpoint", "file", "a path below the checkpoint", format!("{relative:?}: {fault}")));
        }
        let path = self.temporary.join(relative);
        let parent = path.parent().expect("it was joined to a folder");
        std::fs::create_dir_all(parent).map_err(|e| Error::io(parent, "create", e))?;
        failpoint("checkpoint.write").map_err(|e| Error::io(&path, "write", e))?;
        Ok(path)
    }

    /// Writes a whole small file. Errors: as [`Self::place`], also when it is there already.
    pub fn write_file(&self, relative: &str, bytes: &[u8]) -> Result<()> {
        let path = self.place(relative)?;
        File::create_new(&path).and_then(|mut file| file.write_all(bytes)).map_err(|e| Error::io(&path, "write", e))
    }

    /// Makes it durable and gives it its name. It outlives a power loss from when this returns.
    ///
    /// Failpoints: `checkpoint.sync` for each file, `checkpoint.manifest`, `checkpoint.rename`, `checkpoint.renamed` (the name
    /// is there, not yet durable), `checkpoint.committed`.
    /// Errors: [`Error::Argument`] if the name is taken, there is no file, or `about` holds a time that is none;
    /// [`Error::Format`] for links and other special files; [`Error::Io`]. After an error at one of the last two points the
    /// checkpoint has its name and is complete; after any other it is gone. Earlier checkpoints are as they were.
    pub fn commit(self, about: About) -> Result<Manifest> {
        self.check_free()?;
        self.finish(about, &[], false)
    }

    /// As [`Self::commit`], but a checkpoint of the same name, loop and step is replaced, in one exchange: a run that went
    /// on from an older checkpoint comes to the same step again. The old one may be damaged, as long as its manifest is read.
    ///
    /// Errors: [`Error::Argument`] also if what has the name is another checkpoint, or none; `remove` it first if it may go.
    pub fn commit_replacing(self, about: About) -> Result<Manifest> {
        let target = self.root.join(&self.name);
        let refuse = |found: String| {
            let expected = format!("no checkpoint, or one of loop {:?} at step {}", about.loop_path, about.step);
            Err(Error::argument("checkpoint", target.display().to_string(), expected, format!("{found}; remove it first if it may go")))
        };
        if target.symlink_metadata().is_ok() {
            match Manifest::read(&target) {
                Ok(old) if old.name == self.name && old.loop_path == about.loop_path && old.step == about.step => {}
                Ok(old) => return refuse(format!("{:?}, loop {:?} at step {}", old.name, old.loop_path, old.step)),
                Err(error) => return refuse(format!("one that cannot be read ({error})")),
            }
        }
        self.finish(about, &[], true)
    }

    fn check_free(&self) -> Result<()> {
        let target = self.root.join(&self.name);
        match target.symlink_metadata() {
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
            Err(e) => Err(Error::io(&target, "look at", e)),
            Ok(_) => {
                let expected = "a name that is free";
                Err(Error::argument("checkpoint", target.display().to_string(), expected, "an existing one; it was not touched"))
            }
        }
    }

    /// `known`: files that were hashed and made read-only before.
    fn finish(mut self, about: About, known: &[FileEntry], replace: bool) -> Result<Manifest> {
        if !about.time.is_finite() {
            return Err(Error::argument("checkpoint", "time", "finite Unix seconds", about.time));
        }
        let mut manifest = Manifest {
            format: MANIFEST_FORMAT,
            name: self.name.clone(),
            loop_path: about.loop_path,
            step: about.step,
            generation: about.generation,
            engine: about.engine,
            time: about.time,
            metrics: about.metrics,
            facts: about.facts,
            files: self.sync_files(known)?,
            hash: String::new(),
        };
        self.write_manifest(&manifest.encode())?;
        self.publish(replace)?;
        Ok(manifest)
    }

    /// Hashes every file and makes it read-only and durable, then the subfolders.
    fn sync_files(&self, known: &[FileEntry]) -> Result<Vec<FileEntry>> {
        let known: HashMap<&str, &FileEntry> = known.iter().map(|file| (file.path.as_str(), file)).collect();
        let content = FolderContent::of(&self.temporary)?;
        if let Some(path) = content.special.first() {
            let found = "a link, a pipe, or a name that is not UTF-8";
            return Err(Error::format(&self.temporary, path, "plain files and folders in a checkpoint", found));
        }
        if content.files.is_empty() {
            return Err(Error::argument("checkpoint", &self.name, "at least one file", "an empty folder"));
        }
        let mut block = hash_block();
        let mut files = Vec::with_capacity(content.files.len());
        for (path, bytes) in content.files {
            if let Some(fault) = path_fault(&path) {
                return Err(Error::format(&self.temporary, path, "files that a manifest can list", fault));
            }
            let place = self.temporary.join(&path);
            let failed = |e| Error::io(&place, "sync", e);
            failpoint("checkpoint.sync").map_err(failed)?;
            let mut file = File::open(&place).map_err(failed)?;
            let entry = match known.get(path.as_str()) {
                Some(entry) if entry.bytes == bytes => (*entry).clone(),
                _ => {
                    let (blake3, read) = hash_stream(&mut file, &mut block, |_| Ok(())).map_err(failed)?;
                    FileEntry { path, bytes: read, blake3 }
                }
            };
            file.set_permissions(Permissions::from_mode(READ_ONLY)).and_then(|()| file.sync_all()).map_err(failed)?;
            files.push(entry);
        }
        content.folders.iter().try_for_each(|folder| sync_folder(&self.temporary.join(folder)))?;
        Ok(files)
    }

    fn write_manifest(&self, bytes: &[u8]) -> Result<()> {
        let path = self.temporary.join(MANIFEST_NAME);
        failpoint("checkpoint.manifest")
            .and_then(|()| File::create_new(&path))
            .and_then(|mut file| {
                file.write_all(bytes)?;
                file.set_permissions(Permissions::from_mode(READ_ONLY))?;
                file.sync_all()
            })
            .map_err(|e| Error::io(&path, "write", e))?;
        self.folder.sync_all().map_err(|e| Error::io(&self.temporary, "sync", e))
    }

    /// Gives the temporary folder its name, durably.
    fn publish(&mut self, replace: bool) -> Result<()> {
        let target = self.root.join(&self.name);
        let failed = |e| Error::io(&target, "commit", e);
        failpoint("checkpoint.rename").map_err(failed)?;
        let old = if replace && target.symlink_metadata().is_ok() {
            Some(exchange(&self.root, &self.temporary, &target).map_err(failed)?)
        } else {
            rename_to_free(&self.temporary, &target).map_err(failed)?;
            None
        };
        self.committed = true;
        failpoint("checkpoint.renamed").map_err(failed)?;
        sync_folder(&self.root)?;
        if let Some(old) = old {
            // The checkpoint is safe whether or not this works; a sweep tries again.
            let _ = remove_tree(&old);
        }
        failpoint("checkpoint.committed").map_err(failed)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.committed {
            // Nothing can be done about a failure here; a sweep tries again.
            let _ = remove_tree(&self.temporary);
        }
    }
}

/// Commits the checkpoint `name` in `root` from the files of the one in `source`, by hard links: a fork's first checkpoint. Where
/// links do not work (another file system, too many links) files are copied, and their hashes checked on the way.
///
/// - `change`: what is different in its manifest; name, format and files are not its to change
///
/// Linked files are not read: `source` vouches for their hashes, and who loads the fork verifies them.
/// Failpoints and errors: as [`Draft::begin`] and [`Draft::commit`]; [`Error::Format`] if `source` is not complete.
pub fn link_from(source: &Path, root: &Path, name: &str, change: impl FnOnce(&mut Manifest)) -> Result<Manifest> {
    link_from_by(source, root, name, change, |from, to| std::fs::hard_link(from, to))
}

/// [`link_from`] with the system's own way to link, which tests make fail.
fn link_from_by(
    source: &Path,
    root: &Path,
    name: &str,
    change: impl FnOnce(&mut Manifest),
    link: impl Fn(&Path, &Path) -> std::io::Result<()>,
) -> Result<Manifest> {
    let mut manifest = Manifest::read(source)?;
    manifest.quick_check(source)?;
    let files = manifest.files.clone();
    let draft = Draft::begin(root, name, 0)?;
    draft.check_free()?;
    let mut left_bytes = manifest.bytes();
    let mut copying = false;
    for file in &files {
        let (from, to) = (source.join(&file.path), draft.place(&file.path)?);
        // Any refusal leads to a copy, and what cannot be copied either says why.
        if link(&from, &to).is_err() {
            if !copying {
                check_room(&draft.root, name, left_bytes)?;
                copying = true;
            }
            copy(source, file, &from, &to)?;
        }
        left_bytes -= file.bytes;
    }
    change(&mut manifest);
    let Manifest { loop_path, step, generation, engine, time, metrics, facts, .. } = manifest;
    draft.finish(About { loop_path, step, generation, engine, time, metrics, facts }, &files, false)
}

/// Copies a file of the checkpoint `source` and checks its hash.
fn copy(source: &Path, file: &FileEntry, from: &Path, to: &Path) -> Result<()> {
    let mut reader = File::open(from).map_err(|e| Error::io(from, "read", e))?;
    let mut writer = File::create_new(to).map_err(|e| Error::io(to, "write", e))?;
    let (hash, _) = hash_stream(&mut reader, &mut hash_block(), |part| writer.write_all(part)).map_err(|e| Error::io(from, "copy", e))?;
    if hash != file.blake3 {
        return Err(Error::format(
            source,
            &file.path,
            format!("content of BLAKE3 {}", file.blake3),
            format!("{hash}; the file is damaged"),
        ));
    }
    Ok(())
}

/// Fails unless a fifth more than `bytes_estimate` is free on the disk of `root`.
fn check_room(root: &Path, name: &str, bytes_estimate: u64) -> Result<()> {
    let needed = u128::from(bytes_estimate) * 6 / 5;
    let free = free_bytes(root)?;
    if needed > u128::from(free) {
        let what = format!(
            "{needed} bytes are needed (1.2 times the estimate), {free} are free; nothing was written; \
             make room, keep fewer checkpoints, or put the run on another disk"
        );
        return Err(Error::io(&root.join(name), "write the checkpoint", IoError::new(ErrorKind::StorageFull, what)));
    }
    Ok(())
}

/// Renames a folder to a name that must be free: a plain rename would replace an empty folder.
fn rename_to_free(from: &Path, to: &Path) -> std::io::Result<()> {
    #[cfg(target_os = "linux")]
    match rustix::fs::renameat_with(rustix::fs::CWD, from, rustix::fs::CWD, to, rustix::fs::RenameFlags::NOREPLACE) {
        // Some file systems cannot: then by looking first.
        Err(Errno::INVAL | Errno::NOSYS) => {}
        done => return Ok(done?),
    }
    if to.symlink_metadata().is_ok() {
        return Err(ErrorKind::AlreadyExists.into());
    }
    std::fs::rename(from, to)
}

/// Puts `new` where `target` is, at one instant where the system can; returns where the old one went.
fn exchange(root: &Path, new: &Path, target: &Path) -> std::io::Result<PathBuf> {
    #[cfg(target_os = "linux")]
    match rustix::fs::renameat_with(rustix::fs::CWD, new, rustix::fs::CWD, target, rustix::fs::RenameFlags::EXCHANGE) {
        Err(Errno::INVAL | Errno::NOSYS) => {}
        done => return done.map(|()| new.to_owned()).map_err(IoError::from),
    }
    exchange_in_two_steps(root, new, target)
}

/// As [`exchange`]; a kill between the steps costs the checkpoint of that name, and only that one.
fn exchange_in_two_steps(root: &Path, new: &Path, target: &Path) -> std::io::Result<PathBuf> {
    let aside = temporary_path(root, "gone-");
    std::fs::rename(target, &aside)?;
    if let Err(e) = std::fs::rename(new, target) {
        std::fs::rename(&aside, target)?;
        return Err(e);
    }
    Ok(aside)
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::catalog::{list, remove};
    use super::*;
    use serde_json::json;
    use std::os::unix::fs::MetadataExt;

    /// What the checkpoints of the tests say of themselves.
    pub fn about(step: u64) -> About {
        let metrics = Map::from_iter([("loss".to_owned(), json!(0.1 + 1.0 / (step as f64 + 3.0)))]);
        let (loop_path, engine) = ("train".to_owned(), "perilune 0.1.0".to_owned());
        About { loop_path, step, generation: 2, engine, time: 1.7e9 + step as f64 / 7.0, metrics, facts: json!({ "seed": 7 }) }
    }

    /// A draft with files in three folders, one of them empty, one larger than a block; `seed` makes their content.
    pub fn draft(root: &Path, name: &str, seed: u64) -> Result<Draft> {
        let draft = Draft::begin(root, name, 1_000_000)?;
        draft.write_file("state.json", format!("{{ \"seed\": {seed} }}").as_bytes())?;
        draft.write_file("model/config.json", b"{}")?;
        draft.write_file("model/deep/model.safetensors", &vec![seed as u8; 300_001])?;
        draft.write_file("empty", b"")?;
        Ok(draft)
    }

    /// The names in a folder, sorted.
    pub fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn root() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("runs/one/checkpoints");
        (folder, root)
    }

    #[test]
    fn a_commit_is_complete_read_only_and_says_the_same_when_read() {
        let (_folder, root) = root();
        let draft = draft(&root, "train-000050", 3).unwrap();
        std::fs::create_dir(draft.path().join("nothing")).unwrap();
        let manifest = draft.commit(about(50)).unwrap();
        assert_eq!(names(&root), ["train-000050"]);
        let target = root.join("train-000050");
        assert_eq!(names(&target), [MANIFEST_NAME, "empty", "model", "nothing", "state.json"]);
        let read = Manifest::read(&target).unwrap();
        assert_eq!(read, manifest);
        assert_eq!((read.step, read.generation, read.name.as_str()), (50, 2, "train-000050"));
        let stored = std::fs::read(target.join(MANIFEST_NAME)).unwrap();
        assert_eq!(manifest.hash(), blake3::hash(&stored).to_hex().as_str());
        let listed: Vec<_> = read.files.iter().map(|file| (file.path.as_str(), file.bytes)).collect();
        let wanted = [("empty", 0), ("model/config.json", 2), ("model/deep/model.safetensors", 300_001), ("state.json", 13)];
        assert_eq!(listed, wanted);
        assert_eq!(read.bytes(), 300_016);
        // The hash of no bytes, from the test vectors of BLAKE3.
        assert_eq!(read.files[0].blake3, "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262");
        read.verify(&target).unwrap();
        for path in listed.iter().map(|file| file.0).chain([MANIFEST_NAME]) {
            assert_eq!(target.join(path).metadata().unwrap().mode() & 0o777, 0o444, "{path}");
        }
        // Read-only files are no hindrance to reading, checking and removal.
        assert_eq!(std::fs::read(target.join("model/deep/model.safetensors")).unwrap(), vec![3; 300_001]);
        remove(&root, "train-000050").unwrap();
        assert_eq!(names(&root), [""; 0]);
    }

    #[test]
    fn without_a_commit_nothing_is_left() {
        let (_folder, root) = root();
        let draft = draft(&root, "train-000050", 3).unwrap();
        assert_eq!(names(&root).len(), 1);
        assert!(list(&root).unwrap().is_empty());
        drop(draft);
        assert_eq!(names(&root), [""; 0]);
    }

    #[test]
    fn a_taken_name_is_refused_and_what_has_it_stays() {
        let (_folder, root) = root();
        let target = root.join("train-000050");
        draft(&root, "train-000050", 3).unwrap().commit(about(50)).unwrap();
        let message = draft(&root, "train-000050", 4).unwrap().commit(about(50)).unwrap_err().to_string();
        assert!(message.contains("a name that is free, got an existing one"), "{message}");
        assert_eq!(std::fs::read_to_string(target.join("state.json")).unwrap(), "{ \"seed\": 3 }");
        // Taken between the check and the rename, even by an empty folder.
        let late = draft(&root, "late", 4).unwrap();
        std::fs::create_dir(root.join("late")).unwrap();
        assert_eq!(rename_to_free(late.path(), &root.join("late")).unwrap_err().kind(), ErrorKind::AlreadyExists);
        drop(late);
        assert_eq!(names(&root), ["late", "train-000050"]);
    }

    #[test]
    fn only_the_same_checkpoint_is_replaced_even_when_damaged() {
        let (_folder, root) = root();
        let target = root.join("train-000050");
        let replace = |seed, step| draft(&root, "train-000050", seed).unwrap().commit_replacing(about(step));
        replace(3, 50).unwrap();
        std::fs::remove_file(target.join("state.json")).unwrap();
        let manifest = replace(4, 50).unwrap();
        manifest.verify(&target).unwrap();
        assert_eq!(std::fs::read_to_string(target.join("state.json")).unwrap(), "{ \"seed\": 4 }");
        let message = replace(5, 51).unwrap_err().to_string();
        assert!(message.contains("loop \"train\" at step 51, got \"train-000050\", loop \"train\" at step 50; remove it"), "{message}");
        manifest.verify(&target).unwrap();
        std::fs::remove_file(target.join(MANIFEST_NAME)).unwrap();
        let message = replace(5, 50).unwrap_err().to_string();
        assert!(message.contains("one that cannot be read") && message.contains("no such file"), "{message}");
        assert_eq!(names(&root), ["train-000050"], "nothing is left beside it");
    }

    #[test]
    fn two_steps_do_what_one_exchange_does() {
        let (_folder, root) = root();
        let (new, target) = (root.join("tmp-new"), root.join("train-000050"));
        std::fs::create_dir_all(&target).unwrap();
        assert!(exchange_in_two_steps(&root, &new, &target).is_err());
        assert_eq!(names(&root), ["train-000050"], "the old one is back after a failure");
        std::fs::create_dir(&new).unwrap();
        std::fs::write(new.join("x"), "x").unwrap();
        let aside = exchange_in_two_steps(&root, &new, &target).unwrap();
        assert!(target.join("x").exists() && names(&aside).is_empty());
        assert!(aside.file_name().unwrap().to_str().unwrap().starts_with("tmp-gone-"));
    }

    #[test]
    fn too_little_room_is_said_before_anything_is_written() {
        let (_folder, root) = root();
        create_durably(&root).unwrap();
        let refused = |estimate: u64| {
            let error = Draft::begin(&root, "train-000050", estimate).unwrap_err();
            assert!(matches!(&error, Error::Io { source, .. } if source.kind() == ErrorKind::StorageFull), "{error}");
            assert_eq!(names(&root), [""; 0]);
            error.to_string()
        };
        assert!(refused(u64::MAX).contains("22136092888451461938 bytes are needed"));
        // What is free now is less than 1.2 times itself.
        let message = refused(free_bytes(&root).unwrap());
        assert!(message.contains("are free; nothing was written; make room, keep fewer checkpoints"), "{message}");
        Draft::begin(&root, "train-000050", free_bytes(&root).unwrap() / 2).unwrap();
    }

    #[test]
    fn what_cannot_be_committed_is_refused_and_leaves_nothing() {
        let (_folder, root) = root();
        let check = |wanted: &str, change: &dyn Fn(&Draft), about: About| {
            let draft = draft(&root, "train-000050", 3).unwrap();
            change(&draft);
            let message = draft.commit(about).expect_err(wanted).to_string();
            assert!(message.contains(wanted), "{message} lacks {wanted}");
            assert_eq!(names(&root), [""; 0], "{wanted}");
        };
        let link = |draft: &Draft| std::os::unix::fs::symlink("/etc", draft.path().join("model/link")).unwrap();
        check("model/link: expected plain files", &link, about(50));
        let named = |name: &'static str| move |draft: &Draft| std::fs::write(draft.path().join(name), "x").unwrap();
        check("the manifest itself", &named(MANIFEST_NAME), about(50));
        check("a control character or a backslash", &named("a\\b"), about(50));
        check(
            "at least one file",
            &|draft| std::fs::read_dir(draft.path()).unwrap().for_each(|e| remove_any(&e.unwrap().path())),
            about(50),
        );
        check("finite Unix seconds", &|_| {}, About { time: f64::NAN, ..about(50) });
        for name in ["", "../x", "a/b", ".", "..", ".hidden", "tmp-x", "-rf", "a b", "é", &"x".repeat(201)] {
            let message = Draft::begin(&root, name, 0).expect_err(name).to_string();
            assert!(message.contains("checkpoint: `name` should be a name as checkpoint_name gives"), "{message}");
        }
        let draft = Draft::begin(&root, "train-000050", 0).unwrap();
        for path in ["", "/x", "../x", "a/../x", "a//b", MANIFEST_NAME] {
            assert!(draft.write_file(path, b"").unwrap_err().to_string().contains("a path below the checkpoint"), "{path}");
        }
        std::fs::write(root.join("file"), "x").unwrap();
        assert!(matches!(Draft::begin(&root.join("file"), "x", 0), Err(Error::Io { .. })));
        assert!(matches!(Draft::begin(&root.join("file/below"), "x", 0), Err(Error::Io { .. })));
    }

    fn remove_any(path: &Path) {
        if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) }.unwrap();
    }

    fn inode(path: PathBuf) -> (u64, u64) {
        let about = path.metadata().unwrap();
        (about.dev(), about.ino())
    }

    #[test]
    fn a_fork_links_the_files_and_outlives_its_parent() {
        let (_folder, root) = root();
        let parent = draft(&root, "train-000050", 3).unwrap().commit(about(50)).unwrap();
        let (source, child_root) = (root.join("train-000050"), root.parent().unwrap().join("child"));
        let fork = link_from(&source, &child_root, "train-000050", |manifest| {
            manifest.generation = 9;
            manifest.facts = json!({ "parent": "one" });
            manifest.name = "other".into();
            manifest.files.clear();
        })
        .unwrap();
        let target = child_root.join("train-000050");
        assert_eq!(Manifest::read(&target).unwrap(), fork);
        assert_eq!((fork.generation, fork.name.as_str(), &fork.facts), (9, "train-000050", &json!({ "parent": "one" })));
        assert_eq!(fork.files, parent.files);
        assert_ne!(fork.hash(), parent.hash());
        for file in &fork.files {
            assert_eq!(inode(source.join(&file.path)), inode(target.join(&file.path)), "{}", file.path);
        }
        assert_ne!(inode(source.join(MANIFEST_NAME)), inode(target.join(MANIFEST_NAME)));
        parent.verify(&source).unwrap();
        remove(&root, "train-000050").unwrap();
        fork.verify(&target).unwrap();
        let message = link_from(&target, &child_root, "train-000050", |_| {}).unwrap_err().to_string();
        assert!(message.contains("a name that is free"), "{message}");
        assert_eq!(names(&child_root), ["train-000050"]);
    }

    #[test]
    fn where_links_fail_files_are_copied_and_checked() {
        let (_folder, root) = root();
        draft(&root, "train-000050", 3).unwrap().commit(about(50)).unwrap();
        let (source, child_root) = (root.join("train-000050"), root.parent().unwrap().join("child"));
        let too_many = |from: &Path, to: &Path| {
            // Some links work and some do not, as on a file with too many.
            if from.ends_with("model.safetensors") { Err(Errno::MLINK.into()) } else { std::fs::hard_link(from, to) }
        };
        let fork = link_from_by(&source, &child_root, "mixed-000001", |_| {}, too_many).unwrap();
        let target = child_root.join("mixed-000001");
        fork.verify(&target).unwrap();
        assert_eq!(inode(source.join("state.json")), inode(target.join("state.json")));
        let weights = "model/deep/model.safetensors";
        assert_ne!(inode(source.join(weights)), inode(target.join(weights)));
        assert_eq!(target.join(weights).metadata().unwrap().mode() & 0o777, 0o444);
        // Damage that a link would carry along is found by a copy, and by a look at the sizes.
        let spoil = |bytes: &[u8]| {
            std::fs::remove_file(source.join(weights)).unwrap();
            std::fs::write(source.join(weights), bytes).unwrap();
        };
        spoil(&[4; 300_001]);
        let message = link_from_by(&source, &child_root, "bad", |_| {}, |_, _| Err(Errno::XDEV.into())).unwrap_err().to_string();
        assert!(message.contains(weights) && message.contains("the file is damaged"), "{message}");
        spoil(&[3; 300_000]);
        let message = link_from(&source, &child_root, "bad", |_| {}).unwrap_err().to_string();
        assert!(message.contains("expected 300001 bytes, found 300000 bytes"), "{message}");
        assert_eq!(names(&child_root), ["mixed-000001"]);
    }

    #[test]
    fn a_fork_on_another_file_system_is_a_copy() {
        let (_folder, root) = root();
        draft(&root, "train-000050", 3).unwrap().commit(about(50)).unwrap();
        let Ok(elsewhere) = tempfile::tempdir_in("/dev/shm") else { return };
        let fork = link_from(&root.join("train-000050"), elsewhere.path(), "train-000050", |_| {}).unwrap();
        fork.verify(&elsewhere.path().join("train-000050")).unwrap();
    }
}
