//! The store's dealings with the disk below it: which filesystems keep their promises, folders whose names must be
//! durable, and a reserve for the moment the disk is full. Knows no record.

use crate::error::{Error, Result};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// What the reserve file takes. A last record and the log around it are a few KiB; there may be thousands of runs, and each
/// store that is open or was closed holds one reserve, so more than a mebibyte would cost more than it saves.
pub const BALLAST_BYTES: u64 = 1 << 20;

/// Filesystems on which a synced byte may not be one, or a lock no lock: what the kernel reports in `statfs`, and the name.
/// Anything else (ext4, xfs, btrfs, zfs, overlay, tmpfs ...) is taken. Source: statfs(2).
const REFUSED: [(u32, &str); 6] =
    [(0x6969, "NFS"), (0x6573_5546, "FUSE"), (0x517b, "SMB"), (0xff53_4d42, "CIFS"), (0xfe53_4d42, "SMB2"), (0x7375_7245, "Coda")];

/// That the store can live in `folder`, or in the folder that it will be made in.
///
/// Errors: [`Error::Unsupported`] on a network or user-space filesystem; [`Error::Io`].
pub fn check_filesystem(folder: &Path) -> Result<()> {
    let existing = folder.ancestors().find(|path| path.exists()).unwrap_or(Path::new("."));
    let about = rustix::fs::statfs(existing).map_err(|error| Error::io(existing, "ask for the filesystem of", error.into()))?;
    // The kernel's field is a word of varying width and sign; magic numbers are its low 32 bits.
    match refused(about.f_type as u32) {
        None => Ok(()),
        Some(name) => {
            let what = format!("{}: a run on a {name} filesystem, where a synced record can be lost,", folder.display());
            Err(Error::Unsupported { what, remedy: "keep runs on a local disk and copy what is finished".into() })
        }
    }
}

fn refused(magic: u32) -> Option<&'static str> {
    REFUSED.iter().find(|(number, _)| *number == magic).map(|(_, name)| *name)
}

/// Makes the names in `folder` durable: what was created, renamed or removed there.
pub(super) fn sync_folder(folder: &Path) -> io::Result<()> {
    // Through std, not rustix: its raw system calls would pass below the power-loss model of the tests.
    File::open(folder)?.sync_all()
}

/// The folder that `path` lies in.
pub(super) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// `path` with `suffix` behind its last name.
pub(super) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Removes a folder and all in it; nothing there is fine.
pub(super) fn remove_folder(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Bytes that the files in `folder` and below it take on the disk, apart from the ballast. A file that is removed meanwhile
/// counts nothing.
pub(super) fn disk_bytes(folder: &Path) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let mut sum = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let about = match entry.metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            about => about?,
        };
        if about.is_dir() {
            sum += disk_bytes(&entry.path())?;
        } else if entry.file_name() != BALLAST {
            sum += about.blocks() * 512;
        }
    }
    Ok(sum)
}

/// The name of the reserve in the store's folder.
pub(super) const BALLAST: &str = "ballast";

/// Space kept for the last record of a run whose disk fills up.
pub(super) struct Ballast {
    path: PathBuf,
    held: bool,
}

impl Ballast {
    /// Takes the reserve in `folder`. On a disk too full for it there is none, which is no error: the run may only read.
    pub(super) fn take(folder: &Path) -> Self {
        let path = folder.join(BALLAST);
        if fs::metadata(&path).is_ok_and(|about| about.len() == BALLAST_BYTES) {
            return Self { path, held: true };
        }
        let held = allocate(&path).is_ok();
        if !held {
            let _ = fs::remove_file(&path);
        }
        Self { path, held }
    }

    /// Bytes that can still be written beside the reserve are too few: a record could fail halfway.
    pub(super) fn disk_is_full(&self) -> bool {
        // A disk that cannot be measured is not called full; the write itself will tell.
        let free = |about: rustix::fs::StatVfs| about.f_bavail.saturating_mul(about.f_frsize);
        self.held && rustix::fs::statvfs(&self.path).is_ok_and(|about| free(about) < BALLAST_BYTES)
    }

    /// Gives the reserve back to the disk. Whether there was one.
    pub(super) fn release(&mut self) -> bool {
        std::mem::take(&mut self.held) && fs::remove_file(&self.path).is_ok()
    }
}

/// A file of the reserve's size that really takes its blocks. Some filesystems cannot reserve and must be written to.
fn allocate(path: &Path) -> io::Result<()> {
    let file = File::create(path)?;
    match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, BALLAST_BYTES) {
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => fs::write(path, vec![0x5a; BALLAST_BYTES as usize]),
        outcome => outcome.map_err(io::Error::from),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn local_filesystems_are_taken_and_others_named() {
        let folder = tempfile::tempdir().unwrap();
        check_filesystem(folder.path()).unwrap();
        check_filesystem(&folder.path().join("not/yet/there")).unwrap();
        // ext4, xfs, btrfs, zfs, overlay, tmpfs: the magic numbers of statfs(2) and linux/magic.h.
        for taken in [0xef53, 0x5846_5342, 0x9123_683e, 0x2fc1_2fc1, 0x794c_7630, 0x0102_1994] {
            assert_eq!(refused(taken), None, "{taken:#x}");
        }
        assert_eq!((refused(0x6969), refused(0x6573_5546)), (Some("NFS"), Some("FUSE")));
    }

    #[test]
    fn the_ballast_takes_real_blocks_and_is_taken_once() {
        let folder = tempfile::tempdir().unwrap();
        let mut ballast = Ballast::take(folder.path());
        let file = folder.path().join(BALLAST);
        use std::os::unix::fs::MetadataExt;
        assert!(fs::metadata(&file).unwrap().blocks() * 512 >= BALLAST_BYTES);
        assert_eq!(disk_bytes(folder.path()).unwrap(), 0);
        assert!(Ballast::take(folder.path()).held);
        assert!(ballast.release());
        assert!(!file.exists() && !ballast.release() && !ballast.disk_is_full());
    }
}
