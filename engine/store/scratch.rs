//! Folders among the machine's temporary files: each goes with its value, and those that killed processes left go when another
//! process makes its first. Knows nothing of what lies in them.

use std::fs::{DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

/// What their names begin with; the process and a count follow.
const PREFIX: &str = "perilune-scratch-";
/// Between its creation and its lock a folder is free though in use: the young are left alone.
const AGE: Duration = Duration::from_secs(60);

/// An empty folder that only this user may enter. It is locked while its process lives.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    _lock: File,
}

impl Scratch {
    /// Errors: those of the system, where there is no folder for temporary files, or no room in it.
    pub fn make() -> io::Result<Self> {
        static SWEPT: Once = Once::new();
        // A real path: walls around programs, and their messages, see no links.
        let root = std::env::temp_dir().canonicalize()?;
        SWEPT.call_once(|| sweep(&root, AGE));
        Self::make_in(&root)
    }

    fn make_in(root: &Path) -> io::Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        loop {
            let path = root.join(format!("{PREFIX}{}-{}", std::process::id(), COUNT.fetch_add(1, Relaxed)));
            match DirBuilder::new().mode(0o700).create(&path) {
                // Left by a process of that number that was killed.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                made => {
                    made?;
                    let lock = File::open(&path)?;
                    // A file system without locks only loses the sweep.
                    let _ = lock.try_lock();
                    return Ok(Self { path, _lock: lock });
                }
            }
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

/// Removes a folder as far as that is possible; what stays is small and lies where temporary files do.
fn remove(path: &Path) {
    if std::fs::remove_dir_all(path).is_ok() {
        return;
    }
    // A program made folders that may not be read; each round opens one more level.
    let mut folders = vec![path.to_owned()];
    while let Some(folder) = folders.pop() {
        let _ = std::fs::set_permissions(&folder, Permissions::from_mode(0o700));
        let inner = std::fs::read_dir(&folder).into_iter().flatten().flatten();
        folders.extend(inner.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()));
    }
    let _ = std::fs::remove_dir_all(path);
}

/// Removes the folders in `root` that no living process holds and that are older than `age`.
fn sweep(root: &Path, age: Duration) {
    for entry in std::fs::read_dir(root).into_iter().flatten().flatten() {
        let is_ours = entry.file_name().to_string_lossy().starts_with(PREFIX) && entry.file_type().is_ok_and(|kind| kind.is_dir());
        let changed = entry.metadata().and_then(|about| about.modified());
        let is_old = changed.is_ok_and(|time| SystemTime::now().duration_since(time).unwrap_or_default() >= age);
        if is_ours
            && is_old
            && let Ok(folder) = File::open(entry.path())
            && folder.try_lock().is_ok()
        {
            remove(&entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_killed_processes_left_is_swept_up_and_the_rest_stays() {
        let root = tempfile::tempdir().unwrap();
        let (held, dropped) = (Scratch::make_in(root.path()).unwrap(), Scratch::make_in(root.path()).unwrap());
        let gone = dropped.path().to_owned();
        std::fs::create_dir_all(gone.join("a/b")).unwrap();
        drop(dropped);
        assert!(!gone.exists() && held.path().is_dir());
        let left = root.path().join(format!("{PREFIX}1-0"));
        std::fs::create_dir_all(left.join("a/b")).unwrap();
        std::fs::set_permissions(left.join("a"), Permissions::from_mode(0o000)).unwrap();
        let other = root.path().join("perilune-notes");
        std::fs::create_dir(&other).unwrap();
        sweep(root.path(), Duration::from_secs(60));
        assert!(left.is_dir(), "the young stay");
        sweep(root.path(), Duration::ZERO);
        assert!(!left.exists() && held.path().is_dir() && other.is_dir());
    }
}
