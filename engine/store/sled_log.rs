//! sled, tamed: the only file that names it. One database folder: how it is opened, what a write and a durable flush are,
//! and how it is let go. Not thread-aware (`database.rs`), and it takes values as they are (`value.rs`).
//!
//! What sled 0.34.7 needs, each found by experiment or in its source: its `flush` writes but does not fsync, so [`SledLog`]
//! syncs the file itself; a crash while it opens leaves a `snap.*.generating` that makes the database unreadable, so those
//! are removed first; it writes its snapshot from what it reads, synced or not, so the log is synced before it opens; it
//! names files without syncing the folder; opening may panic or hang on damaged files; and after an input/output error
//! both `flush` and `drop` may hang, so a database that had one is never dropped.

use super::filesystem::{parent, sync_folder, with_suffix};
use crate::error::{Error, Result};
use crate::failpoint::failpoint;
use rustix::fs::FlockOperation;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How long opening may take. A million records take a few seconds.
const OPEN_SECONDS_MAX: u64 = 30;
/// How long another holder of the database may take to let go: the threads of one that was just dropped end a little later.
const LOCK_WAIT: Duration = Duration::from_secs(2);

/// One change of a batch.
#[derive(Clone, Debug)]
pub(super) enum Change {
    Put(String, Vec<u8>),
    Delete(String),
}

/// An open sled database. Dropping it does *not* drop sled's handle: only [`SledLog::close`] does.
pub(super) struct SledLog {
    db: ManuallyDrop<sled::Db>,
    /// Our own handle of `<folder>/db`, to sync it.
    file: File,
    folder: PathBuf,
}

/// Why a folder did not open.
enum OpenFailure {
    /// Its files are not a database any more.
    Damaged(String),
    Other(Error),
}

impl SledLog {
    /// Opens or creates the database in `folder`. A damaged one is moved aside and an empty one made: then the second value
    /// is where the damaged one lies now, with the reason in its `why.txt`.
    ///
    /// Errors: [`Error::Io`], also if another process has it open.
    pub(super) fn open(folder: &Path) -> Result<(Self, Option<PathBuf>)> {
        let reason = match Self::try_open(folder) {
            Ok(log) => return Ok((log, None)),
            Err(OpenFailure::Other(error)) => return Err(error),
            Err(OpenFailure::Damaged(reason)) => reason,
        };
        let aside = move_aside(folder, &reason)?;
        match Self::try_open(folder) {
            Ok(log) => Ok((log, Some(aside))),
            Err(OpenFailure::Other(error)) => Err(error),
            Err(OpenFailure::Damaged(reason)) => Err(Error::format(folder, "store", "a fresh database to open", reason)),
        }
    }

    fn try_open(folder: &Path) -> Result<Self, OpenFailure> {
        let new = !folder.join("db").exists();
        let io = |action| move |error| OpenFailure::Other(Error::io(folder, action, error));
        fs::create_dir_all(folder).map_err(io("create"))?;
        if new {
            // `conf` is written before `db` is created, and not at once: half a one of a database that never was is no loss.
            let _ = fs::remove_file(folder.join("conf"));
        } else {
            wait_for_lock(&folder.join("db")).map_err(OpenFailure::Other)?;
        }
        remove_half_snapshots(folder).map_err(io("clean"))?;
        let db = open_watched(folder)?;
        let settle = || {
            let file = File::options().read(true).write(true).open(folder.join("db"))?;
            file.sync_all()?;
            if new {
                File::open(folder.join("conf"))?.sync_all()?;
                sync_folder(&folder.join("blobs"))?;
            }
            sync_folder(folder)?;
            if new {
                sync_folder(parent(folder))?;
            }
            Ok(file)
        };
        let db = ManuallyDrop::new(db);
        let file = settle().map_err(io("sync"))?;
        Ok(Self { db, file, folder: folder.to_owned() })
    }

    /// Applies the changes, all or none even if the process dies. They are durable after the next [`SledLog::sync`].
    pub(super) fn apply(&self, changes: &[Change]) -> io::Result<()> {
        let mut batch = sled::Batch::default();
        for change in changes {
            match change {
                Change::Put(key, value) => batch.insert(key.as_bytes(), value.as_slice()),
                Change::Delete(key) => batch.remove(key.as_bytes()),
            }
        }
        guarded(|| self.db.apply_batch(batch))
    }

    /// Makes everything applied so far survive a power loss.
    pub(super) fn sync(&self) -> io::Result<()> {
        failpoint("store.flush")?;
        guarded(|| self.db.flush())?;
        failpoint("store.sync")?;
        self.file.sync_data()
    }

    pub(super) fn get(&self, key: &str) -> io::Result<Option<Vec<u8>>> {
        Ok(guarded(|| self.db.get(key))?.map(|value| value.to_vec()))
    }

    /// The keys that begin with `prefix`, sorted, with their values. Keys are bytes to sled; ours were strings.
    pub(super) fn scan(&self, prefix: &str) -> io::Result<Vec<(String, Vec<u8>)>> {
        let pairs = guarded(|| self.db.scan_prefix(prefix).collect::<sled::Result<Vec<_>>>())?;
        let pairs = pairs.into_iter().map(|(key, value)| {
            let key = String::from_utf8(key.to_vec()).map_err(|error| invalid(format!("a key that is no text: {error}")))?;
            Ok((key, value.to_vec()))
        });
        pairs.collect()
    }

    /// Syncs and lets go of everything, sled's threads included. After an error the handle is forgotten instead.
    pub(super) fn close(self) -> io::Result<()> {
        self.sync()?;
        let Self { db, file, .. } = self;
        guarded(move || -> io::Result<()> {
            drop(ManuallyDrop::into_inner(db));
            Ok(())
        })?;
        file.sync_data()
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }
}

/// Runs a call into sled, which reports faults of its files as errors or as panics: both come back as errors.
pub(super) fn guarded<T, E: Into<io::Error>>(call: impl FnOnce() -> Result<T, E>) -> io::Result<T> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(outcome) => outcome.map_err(|error| plain(error.into())),
        Err(panic) => Err(invalid(format!("the database panicked: {}", panic_text(&*panic)))),
    }
}

/// sled hands an error of the system on as its debug text; its kind says the same in words.
fn plain(error: io::Error) -> io::Error {
    let told = error.raw_os_error().is_some() || matches!(error.kind(), ErrorKind::Other | ErrorKind::InvalidData);
    if told { error } else { error.kind().into() }
}

fn invalid(what: String) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what)
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| text.to_string());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "without a message".into())
}

/// Opens sled on a thread of its own, which is left behind if it does not come back.
fn open_watched(folder: &Path) -> Result<sled::Db, OpenFailure> {
    // Absolute, since sled compares paths in it with paths that it makes from the current folder.
    let path = std::path::absolute(folder).map_err(|error| OpenFailure::Other(Error::io(folder, "open", error)))?;
    let config = sled::Config::new().path(path).mode(sled::Mode::LowSpace).cache_capacity(16 << 20).flush_every_ms(Some(200));
    let (sender, receiver) = mpsc::sync_channel(1);
    let open = move || {
        let outcome = catch_unwind(AssertUnwindSafe(|| config.open()));
        // Nobody listens any more after the time limit. Then the handle must not be dropped: that may hang or write.
        if let Err(mpsc::SendError(Ok(Ok(db)))) = sender.send(outcome) {
            std::mem::forget(db);
        }
    };
    let thread = std::thread::Builder::new().name("store open".into()).spawn(open);
    thread.map_err(|error| OpenFailure::Other(Error::io(folder, "start a thread to open", error)))?;
    match receiver.recv_timeout(Duration::from_secs(OPEN_SECONDS_MAX)) {
        Ok(Ok(Ok(db))) => Ok(db),
        // sled's own words are `Read corrupted data at file offset None backtrace ()`.
        Ok(Ok(Err(sled::Error::Corruption { at, .. }))) => {
            let place = at.map_or_else(String::new, |at| format!(" at {at:?}"));
            Err(OpenFailure::Damaged(format!("its log is not what was written{place}")))
        }
        Ok(Ok(Err(error @ (sled::Error::ReportableBug(_) | sled::Error::CollectionNotFound(_))))) => {
            Err(OpenFailure::Damaged(error.to_string()))
        }
        Ok(Ok(Err(sled::Error::Unsupported(what)))) => {
            let what = format!("{what}; if no other engine wrote it, it is damaged: perilune store rebuild");
            Err(OpenFailure::Other(Error::format(folder, "conf", "a database of this version of the engine", what)))
        }
        // A file shorter than its log says is damage, an operating system that refuses is not.
        Ok(Ok(Err(sled::Error::Io(error)))) if matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::InvalidData) => {
            Err(OpenFailure::Damaged(error.to_string()))
        }
        Ok(Ok(Err(error))) => Err(OpenFailure::Other(Error::io(folder, "open", error.into()))),
        Ok(Err(panic)) => Err(OpenFailure::Damaged(format!("opening it panicked: {}", panic_text(&*panic)))),
        Err(_) => Err(OpenFailure::Damaged(format!("opening it took more than {OPEN_SECONDS_MAX} s"))),
    }
}

/// Waits until nobody holds the database, then makes durable what the last holder wrote. sled takes the lock itself, but does
/// not wait for it. Syncing comes first because sled's opening writes and syncs a snapshot of what it reads: after a power loss
/// that would speak of a log that is not there.
fn wait_for_lock(path: &Path) -> Result<()> {
    let file = File::options().read(true).write(true).open(path).map_err(|error| Error::io(path, "open", error))?;
    let start = Instant::now();
    loop {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => break,
            Err(rustix::io::Errno::WOULDBLOCK) if start.elapsed() < LOCK_WAIT => std::thread::sleep(Duration::from_millis(5)),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let held = io::Error::new(ErrorKind::ResourceBusy, "another process has this run's store open; stop it or ask it");
                return Err(Error::io(path, "lock", held));
            }
            Err(error) => return Err(Error::io(path, "lock", error.into())),
        }
    }
    // Released by name: closing the file does not, while a process that is being started by another thread still shares it.
    let released = rustix::fs::flock(&file, FlockOperation::Unlock).map_err(io::Error::from);
    released.and_then(|()| file.sync_all()).map_err(|error| Error::io(path, "sync", error))
}

/// sled writes a snapshot as `snap.N.generating`, syncs it, renames it, and only then removes the older one; but when it opens
/// it takes any `snap.*`, and one that a crash left half written is "corruption".
fn remove_half_snapshots(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("snap.") && name.ends_with(".generating") {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Renames a damaged database to `<folder>.bad-<unix seconds>`, which it returns, and writes down why.
pub(super) fn move_aside(folder: &Path, reason: &str) -> Result<PathBuf> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let mut aside = with_suffix(folder, &format!(".bad-{seconds}"));
    let mut again = 1;
    while aside.exists() {
        aside = with_suffix(folder, &format!(".bad-{seconds}-{again}"));
        again += 1;
    }
    fs::rename(folder, &aside).map_err(|error| Error::io(folder, "move aside", error))?;
    sync_folder(parent(folder)).map_err(|error| Error::io(parent(folder), "sync", error))?;
    // The note and the space are courtesies: the disk may be what is broken.
    let _ = fs::write(aside.join("why.txt"), format!("{reason}\n"));
    let _ = fs::remove_file(aside.join(super::filesystem::BALLAST));
    Ok(aside)
}
