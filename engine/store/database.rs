//! A small durable map from text keys to short values. One thread owns the database below; callers send it requests and
//! wait for the answers, and durable writes that wait at the same time share one flush. Knows no records (`run_store.rs`).
//!
//! After the first input/output error the store takes no more writes: what the disk then holds is no longer known, and
//! another process that opens it finds out. Reads still answer as far as they can.

use super::filesystem::{Ballast, check_filesystem, disk_bytes};
use super::rewrite::{finish_rewrite, rewrite};
use super::seal;
use super::sled_log::{Change, SledLog, guarded, move_aside};
use super::value::{check_key, decode, encode};
use crate::error::{Error, Result};
use crate::failpoint::failpoint;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// Requests that may wait, and that one flush serves at most.
const GROUP_MAX: usize = 64;
/// How long an answer may take. A flush to a broken disk may never come back.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(60);
/// The log is rewritten when it takes this many times what is in it ...
const REWRITE_RATIO: u64 = 4;
/// ... and at least this much.
const REWRITE_BYTES_MIN: u64 = 64 << 20;

/// When a write counts as done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// When it survives a power loss.
    Flushed,
    /// With the next flush, at the latest some 200 ms later: what was written before a write that is flushed survives with it,
    /// and a process that is killed may lose the last ones.
    Later,
}

/// An opened database.
pub struct Opened {
    pub database: Database,
    /// Where files lie that were no database any more, with the reason in `why.txt` there. The database is empty then.
    pub damaged: Option<PathBuf>,
}

/// The handle of an open database. Its methods may be called from several threads.
pub struct Database {
    /// None only while it closes.
    requests: Option<SyncSender<Request>>,
    thread: Option<JoinHandle<()>>,
    shared: Arc<Shared>,
}

/// What the handle and the owning thread both see.
struct Shared {
    folder: PathBuf,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The first error, after which nothing is written.
    broken: Option<(ErrorKind, String)>,
    /// The owning thread did not answer in time, so nobody waits for its end.
    stuck: bool,
    flushes: u64,
}

type Answer<T> = SyncSender<Result<T>>;
/// Keys and what is stored under them.
type Pairs = Vec<(String, Vec<u8>)>;

enum Request {
    Write { changes: Vec<Change>, durability: Durability, answer: Answer<()> },
    Swap { key: String, expected: Option<Vec<u8>>, change: Change, durability: Durability, answer: Answer<bool> },
    Get { key: String, answer: Answer<Option<Vec<u8>>> },
    Scan { prefix: String, answer: Answer<Pairs> },
    Compact { answer: Answer<()> },
    Close { answer: Answer<()> },
}

impl Database {
    /// Opens or creates the database in `folder`. Files that are damaged are moved aside. The caller holds the lock of the run:
    /// two openers at once may disturb each other's clean-up, although only one of them gets the database.
    ///
    /// Errors: [`Error::Unsupported`] on a network or user-space filesystem; [`Error::Io`], also if another process holds it.
    pub fn open(folder: &Path) -> Result<Opened> {
        check_filesystem(folder)?;
        finish_rewrite(folder)?;
        let (mut log, mut damaged) = SledLog::open(folder)?;
        if let Some(reason) = seal::check_and_break(&log).map_err(|error| Error::io(folder, "check the seal of", error))? {
            // Whether it closes or not, it goes aside.
            let _ = log.close();
            damaged = Some(move_aside(folder, &reason)?);
            (log, _) = SledLog::open(folder)?;
        }
        let shared = Arc::new(Shared { folder: folder.to_owned(), state: Mutex::default() });
        let (requests, receiver) = mpsc::sync_channel(GROUP_MAX);
        let owner = Owner { log: Some(log), ballast: Ballast::take(folder), shared: shared.clone() };
        let thread = std::thread::Builder::new().name("store".into()).spawn(move || owner.serve(&receiver));
        let thread = thread.map_err(|error| Error::io(folder, "start a thread for", error))?;
        Ok(Opened { database: Self { requests: Some(requests), thread: Some(thread), shared }, damaged })
    }

    /// Where the database lies.
    pub fn folder(&self) -> &Path {
        &self.shared.folder
    }

    /// The value of `key`, if there is one. Errors: [`Error::Format`] if it is damaged; [`Error::Io`].
    pub fn get(&self, key: &str) -> Result<Option<Vec<u8>>> {
        let stored = self.ask(|answer| Request::Get { key: key.into(), answer })?;
        stored.map(|stored| decode(self.folder(), key, stored)).transpose()
    }

    /// The keys that begin with `prefix` and their values, sorted by key. Errors: as [`Database::get`], naming the key.
    pub fn scan(&self, prefix: &str) -> Result<Pairs> {
        let pairs = self.ask(|answer| Request::Scan { prefix: prefix.into(), answer })?;
        let decoded = pairs.into_iter().map(|(key, stored)| {
            let payload = decode(self.folder(), &key, stored)?;
            Ok((key, payload))
        });
        decoded.collect()
    }

    /// Writes all of `batch` or, if the process or the machine stops, none of it.
    ///
    /// Errors: [`Error::Argument`] for a value over 4 KiB, which belongs into a file, and for a key that is empty or over 512
    /// bytes: nothing is written then. [`Error::Io`]: the disk is full, or an earlier error has closed the store for writing.
    pub fn put(&self, batch: Pairs, durability: Durability) -> Result<()> {
        let changes = batch.into_iter().map(|(key, payload)| {
            let stored = encode(&key, &payload)?;
            Ok(Change::Put(key, stored))
        });
        self.write(changes.collect::<Result<_>>()?, durability)
    }

    /// Removes `keys`, all or none; one that is not there is fine. Errors: as [`Database::put`].
    pub fn delete(&self, keys: Vec<String>, durability: Durability) -> Result<()> {
        keys.iter().try_for_each(|key| check_key(key))?;
        self.write(keys.into_iter().map(Change::Delete).collect(), durability)
    }

    /// Makes `new` the value of `key` (none removes it) if its value is `expected` (none: there is no value). Whether it was.
    ///
    /// Errors: as [`Database::put`]; [`Error::Format`] if the present value is damaged.
    pub fn compare_and_swap(&self, key: &str, expected: Option<&[u8]>, new: Option<&[u8]>, durability: Durability) -> Result<bool> {
        let change = match new {
            Some(payload) => Change::Put(key.into(), encode(key, payload)?),
            None => Change::Delete(key.into()),
        };
        check_key(key)?;
        let expected = expected.map(<[u8]>::to_vec);
        self.ask(|answer| Request::Swap { key: key.into(), expected, change, durability, answer })
    }

    /// Makes all earlier writes survive a power loss. Errors: [`Error::Io`], after which the store takes no more writes.
    pub fn durable_flush(&self) -> Result<()> {
        self.write(Vec::new(), Durability::Flushed)
    }

    /// Reads every value and its checksum. How many there are. Errors: [`Error::Format`] that names the first damaged key.
    pub fn verify(&self) -> Result<usize> {
        self.scan("").map(|pairs| pairs.len())
    }

    /// Bytes of all keys and values. Errors: as [`Database::get`].
    pub fn logical_bytes(&self) -> Result<u64> {
        Ok(self.scan("")?.iter().map(|(key, payload)| (key.len() + payload.len()) as u64).sum())
    }

    /// Bytes that the database takes on the disk, without its reserve. Errors: [`Error::Io`].
    pub fn disk_bytes(&self) -> Result<u64> {
        disk_bytes(self.folder()).map_err(|error| Error::io(self.folder(), "measure", error))
    }

    /// Writes the database anew, without the garbage of its log. At most as slow as writing each record once.
    ///
    /// Errors: [`Error::Format`] for a damaged value, and all is as it was; [`Error::Io`].
    pub fn compact(&self) -> Result<()> {
        self.ask(|answer| Request::Compact { answer })
    }

    /// How many flushes have served the durable writes so far.
    pub fn flushes(&self) -> u64 {
        self.shared.state().flushes
    }

    /// Flushes, compacts if the log has grown out of proportion, seals what is there against silent damage, and ends the owning
    /// thread. Errors: [`Error::Io`].
    pub fn close(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        if self.requests.is_none() {
            return Ok(());
        }
        let outcome = self.ask(|answer| Request::Close { answer });
        // Without a sender the thread ends, unless it hangs below.
        self.requests = None;
        if let Some(thread) = self.thread.take().filter(|_| !self.shared.state().stuck) {
            thread.join().expect("the store's thread catches panics of the database and has none of its own");
        }
        outcome
    }

    fn write(&self, changes: Vec<Change>, durability: Durability) -> Result<()> {
        self.ask(|answer| Request::Write { changes, durability, answer })
    }

    /// Sends a request and waits for its answer.
    fn ask<T>(&self, request: impl FnOnce(Answer<T>) -> Request) -> Result<T> {
        if self.shared.state().stuck {
            return Err(self.shared.refusal());
        }
        let (answer, receiver) = mpsc::sync_channel(1);
        let requests = self.requests.as_ref().expect("only `end` takes it, which has the handle to itself");
        requests.send(request(answer)).expect("the store's thread lives as long as its handle");
        match receiver.recv_timeout(ANSWER_TIME_MAX) {
            Ok(outcome) => outcome,
            Err(RecvTimeoutError::Disconnected) => panic!("the store's thread answers every request"),
            Err(RecvTimeoutError::Timeout) => {
                let seconds = ANSWER_TIME_MAX.as_secs();
                self.shared.state().stuck = true;
                let late = io::Error::new(ErrorKind::TimedOut, format!("no answer from the disk in {seconds} s"));
                Err(self.shared.break_down("wait for", late))
            }
        }
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        // Whoever wants to know calls `close`.
        let _ = self.end();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Every critical section is one assignment, so a panic elsewhere leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes the store for writing because of `error`, which comes back for the caller.
    fn break_down(&self, action: &'static str, error: io::Error) -> Error {
        self.state().broken.get_or_insert_with(|| (error.kind(), error.to_string()));
        Error::io(&self.folder, action, error)
    }

    /// What a write gets after the store broke down.
    fn refusal(&self) -> Error {
        let state = self.state();
        let (kind, text) = state.broken.as_ref().expect("writes are refused only after an error");
        let advice = format!("an earlier error has closed it ({text}); see to the disk, then resume the run");
        Error::io(&self.folder, "write to the store", io::Error::new(*kind, advice))
    }
}

/// The thread that owns the database below.
struct Owner {
    /// None after a rewrite that could not open its result.
    log: Option<SledLog>,
    ballast: Ballast,
    shared: Arc<Shared>,
}

impl Owner {
    fn serve(mut self, requests: &Receiver<Request>) {
        // Durable writes that are applied and wait for the flush.
        let mut waiting: Vec<Box<dyn FnOnce(Result<()>)>> = Vec::new();
        while let Ok(first) = requests.recv() {
            let mut next = Some(first);
            let mut closing = None;
            while let Some(request) = next.take() {
                match request {
                    Request::Write { changes, durability, answer } => match self.apply(&changes) {
                        Ok(()) if durability == Durability::Flushed => waiting.push(Box::new(move |outcome| reply(&answer, outcome))),
                        outcome => reply(&answer, outcome),
                    },
                    Request::Swap { key, expected, change, durability, answer } => match self.swap(&key, expected, change) {
                        Ok(true) if durability == Durability::Flushed => {
                            waiting.push(Box::new(move |outcome| reply(&answer, outcome.map(|()| true))));
                        }
                        outcome => reply(&answer, outcome),
                    },
                    Request::Get { key, answer } => reply(&answer, self.read(|log| log.get(&key))),
                    Request::Scan { prefix, answer } => reply(&answer, self.read(|log| log.scan(&prefix))),
                    Request::Compact { answer } => {
                        self.flush(&mut waiting);
                        reply(&answer, self.compact());
                    }
                    Request::Close { answer } => closing = Some(answer),
                }
                if closing.is_none() && waiting.len() < GROUP_MAX {
                    next = requests.try_recv().ok();
                }
            }
            self.flush(&mut waiting);
            if let Some(answer) = closing {
                reply(&answer, self.close());
            }
        }
    }

    /// Applies changes, or refuses them. A disk that is about to be full is noticed before the database below is, because
    /// that would be its last write: then the reserve is given free, this write is refused, and the next ones may use it.
    fn apply(&mut self, changes: &[Change]) -> Result<()> {
        if self.shared.state().broken.is_some() {
            return Err(self.shared.refusal());
        }
        if changes.is_empty() {
            return Ok(());
        }
        let full = if self.ballast.disk_is_full() { Err(ErrorKind::StorageFull.into()) } else { Ok(()) };
        if let Err(error) = guarded(|| failpoint("store.put")).and(full) {
            if error.kind() == ErrorKind::StorageFull {
                self.ballast.release();
                return Err(Error::io(&self.shared.folder, "write to the store", error));
            }
            return Err(self.break_down("write to", error));
        }
        let log = self.log.as_ref().expect("a store without a log is broken");
        log.apply(changes).map_err(|error| self.break_down("write to", error))
    }

    fn swap(&mut self, key: &str, expected: Option<Vec<u8>>, change: Change) -> Result<bool> {
        let present = self.read(|log| log.get(key))?;
        let present = present.map(|stored| decode(&self.shared.folder, key, stored)).transpose()?;
        if present != expected {
            return Ok(false);
        }
        self.apply(&[change]).map(|()| true)
    }

    fn read<T>(&self, read: impl FnOnce(&SledLog) -> io::Result<T>) -> Result<T> {
        let log = self.log.as_ref().ok_or_else(|| self.shared.refusal())?;
        read(log).map_err(|error| Error::io(&self.shared.folder, "read", error))
    }

    /// One flush for all who wait.
    fn flush(&mut self, waiting: &mut Vec<Box<dyn FnOnce(Result<()>)>>) {
        if waiting.is_empty() {
            return;
        }
        let log = self.log.as_ref().expect("writes that wait were applied to it");
        let outcome = guarded(|| log.sync().and_then(|()| failpoint("store.ack")));
        self.shared.state().flushes += 1;
        let first = outcome.map_err(|error| self.break_down("flush", error));
        let mut outcomes = Some(first);
        for answer in waiting.drain(..) {
            // Errors cannot be copied: the first who waits gets this one, the others one that quotes it.
            let broken = self.shared.state().broken.is_some();
            answer(outcomes.take().unwrap_or_else(|| if broken { Err(self.shared.refusal()) } else { Ok(()) }));
        }
    }

    fn compact(&mut self) -> Result<()> {
        if self.shared.state().broken.is_some() {
            return Err(self.shared.refusal());
        }
        let log = self.log.take().expect("a store without a log is broken");
        let (log, outcome) = rewrite(log);
        self.log = log;
        self.ballast = Ballast::take(&self.shared.folder);
        if self.log.is_none() {
            let lost = io::Error::other("it did not open again after it was compacted");
            self.shared.break_down("compact", lost);
        }
        outcome
    }

    /// Ends in good order, or leaves everything as it is if there was an error: then sled's `drop` may hang.
    fn close(&mut self) -> Result<()> {
        if self.shared.state().broken.is_some() {
            self.log = None;
            return Err(self.shared.refusal());
        }
        if self.has_outgrown()?
            && let Err(error) = self.compact()
            && self.log.is_none()
        {
            return Err(error);
        }
        // A log that could not be written anew is closed as it is.
        let log = self.log.take().expect("a store without a log is broken");
        let closed = log.sync().and_then(|()| seal::write(&log)).and_then(|()| log.close());
        closed.map_err(|error| self.break_down("close", error))
    }

    fn has_outgrown(&self) -> Result<bool> {
        let disk = disk_bytes(&self.shared.folder).map_err(|error| Error::io(&self.shared.folder, "measure", error))?;
        if disk < REWRITE_BYTES_MIN {
            return Ok(false);
        }
        let pairs = self.read(|log| log.scan(""))?;
        let logical: u64 = pairs.iter().map(|(key, value)| (key.len() + value.len()) as u64).sum();
        Ok(disk > REWRITE_RATIO * logical)
    }

    fn break_down(&mut self, action: &'static str, error: io::Error) -> Error {
        if error.kind() == ErrorKind::StorageFull {
            self.ballast.release();
        }
        self.shared.break_down(action, error)
    }
}

/// Whoever gave up waiting does not hear it.
fn reply<T>(answer: &Answer<T>, outcome: Result<T>) {
    let _ = answer.send(outcome);
}

#[cfg(test)]
mod tests {
    use super::super::value::PAYLOAD_BYTES_MAX;
    use super::*;
    use std::fs::{self, File};

    fn open(folder: &Path) -> Database {
        let opened = Database::open(folder).unwrap();
        assert_eq!(opened.damaged, None);
        opened.database
    }

    fn pair(key: &str, value: &[u8]) -> (String, Vec<u8>) {
        (key.into(), value.into())
    }

    #[test]
    fn what_is_written_is_read_after_a_reopening() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("run/store");
        let database = open(&folder);
        assert_eq!(database.get("a/1").unwrap(), None);
        database.put(vec![pair("a/1", b"one"), pair("a/2", b""), pair("b/1", &[9; PAYLOAD_BYTES_MAX])], Durability::Later).unwrap();
        database.put(vec![pair("a/1", b"uno")], Durability::Flushed).unwrap();
        database.delete(vec!["a/2".into(), "a/3".into()], Durability::Flushed).unwrap();
        let swap = |expected: Option<&[u8]>, new: Option<&[u8]>| database.compare_and_swap("c", expected, new, Durability::Flushed);
        assert!(!swap(Some(b"x"), Some(b"y")).unwrap());
        assert!(swap(None, Some(b"x")).unwrap());
        assert!(!swap(None, Some(b"y")).unwrap());
        assert!(swap(Some(b"x"), Some(b"z")).unwrap());
        database.close().unwrap();

        let database = open(&folder);
        assert_eq!(database.get("a/1").unwrap().unwrap(), b"uno");
        assert_eq!(database.get("a/2").unwrap(), None);
        assert_eq!(database.scan("a/").unwrap(), [pair("a/1", b"uno")]);
        assert_eq!(database.scan("").unwrap(), [pair("a/1", b"uno"), pair("b/1", &[9; PAYLOAD_BYTES_MAX]), pair("c", b"z")]);
        assert!(database.compare_and_swap("c", Some(b"z"), None, Durability::Later).unwrap());
        assert_eq!(database.verify().unwrap(), 2);
        assert_eq!(database.logical_bytes().unwrap(), 3 + 3 + 3 + PAYLOAD_BYTES_MAX as u64);
    }

    #[test]
    fn a_batch_with_a_value_too_large_writes_nothing() {
        let root = tempfile::tempdir().unwrap();
        let database = open(&root.path().join("store"));
        let batch = vec![pair("small", b"1"), pair("large", &[0; PAYLOAD_BYTES_MAX + 1])];
        let message = database.put(batch, Durability::Flushed).unwrap_err().to_string();
        assert!(message.contains("`large` should be at most 4096 bytes"), "{message}");
        assert_eq!(database.verify().unwrap(), 0);
        database.put(vec![pair("small", b"1")], Durability::Flushed).unwrap();
    }

    #[test]
    fn durable_writes_that_wait_share_a_flush() {
        let root = tempfile::tempdir().unwrap();
        let database = open(&root.path().join("store"));
        const THREADS: usize = 16;
        const EACH: usize = 25;
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let database = &database;
                scope.spawn(move || {
                    for i in 0..EACH {
                        database.put(vec![pair(&format!("{thread}/{i}"), b"x")], Durability::Flushed).unwrap();
                    }
                });
            }
        });
        assert_eq!(database.verify().unwrap(), THREADS * EACH);
        let flushes = database.flushes();
        assert!(flushes >= EACH as u64 && flushes < (THREADS * EACH) as u64 / 2, "{flushes} flushes");
    }

    #[test]
    fn a_second_opener_is_told_and_changes_nothing() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("store");
        let database = open(&folder);
        let message = Database::open(&folder).err().unwrap().to_string();
        assert!(message.contains("another process has this run's store open"), "{message}");
        database.put(vec![pair("a", b"1")], Durability::Flushed).unwrap();
        drop(database);
        assert_eq!(open(&folder).verify().unwrap(), 1);
    }

    /// A closed database of some hundred records, which `damage` then spoils: it must open empty, and the old files must lie
    /// aside with a reason.
    fn check_damage(what: &str, damage: impl Fn(&Path)) {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("store");
        let database = open(&folder);
        for i in 0..300 {
            database.put(vec![pair(&format!("key/{i:03}"), &[i as u8; 300])], Durability::Later).unwrap();
        }
        database.close().unwrap();
        // A second opening writes a snapshot.
        open(&folder).close().unwrap();
        damage(&folder);
        let Opened { database, damaged } = Database::open(&folder).unwrap();
        let aside = damaged.unwrap_or_else(|| panic!("{what}: opened with {:?} values", database.verify()));
        assert!(fs::read_to_string(aside.join("why.txt")).unwrap().len() > 10, "{what}");
        assert!(aside.file_name().unwrap().to_str().unwrap().starts_with("store.bad-1"), "{what}: {aside:?}");
        assert_eq!(database.verify().unwrap(), 0, "{what}");
        database.put(vec![pair("a", b"1")], Durability::Flushed).unwrap();
        database.close().unwrap();
        assert_eq!(open(&folder).verify().unwrap(), 1, "{what}");
    }

    fn snapshot(folder: &Path) -> PathBuf {
        let mut paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        paths.find(|path| path.file_name().unwrap().to_str().unwrap().starts_with("snap.")).unwrap()
    }

    fn overwrite(path: &Path, range: std::ops::Range<usize>, byte: u8) {
        let mut bytes = fs::read(path).unwrap();
        let end = range.end.min(bytes.len());
        bytes[range.start..end].fill(byte);
        fs::write(path, bytes).unwrap();
    }

    #[test]
    fn damaged_files_are_moved_aside_and_an_empty_database_is_opened() {
        check_damage("snapshot", |folder| overwrite(&snapshot(folder), 3..20, 0xff));
        check_damage("snapshot empty", |folder| fs::write(snapshot(folder), "").unwrap());
        check_damage("conf", |folder| fs::write(folder.join("conf"), "segment_size: many\nuse_compression: false\n").unwrap());
        check_damage("log garbage", |folder| overwrite(&folder.join("db"), 0..usize::MAX, 0xa5));
        check_damage("log hole", |folder| overwrite(&folder.join("db"), 20_000..60_000, 0));
        check_damage("log empty", |folder| fs::write(folder.join("db"), "").unwrap());
        check_damage("log gone", |folder| fs::remove_file(folder.join("db")).unwrap());
        check_damage("log half", |folder| {
            let file = File::options().write(true).open(folder.join("db")).unwrap();
            file.set_len(file.metadata().unwrap().len() / 2).unwrap();
        });
    }

    #[test]
    fn what_a_crash_while_opening_leaves_is_no_damage() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("store");
        let database = open(&folder);
        database.put(vec![pair("a", b"1")], Durability::Flushed).unwrap();
        database.close().unwrap();
        // sled takes this for its newest snapshot.
        fs::write(folder.join("snap.FFFFFFFFFFFFFFF0.generating"), b"half").unwrap();
        assert_eq!(open(&folder).verify().unwrap(), 1);
        // The settings were half written when the first opening was killed: there is no log yet.
        let young = root.path().join("young");
        fs::create_dir_all(young.join("blobs")).unwrap();
        fs::write(young.join("conf"), b"segment_size: 5242").unwrap();
        assert_eq!(open(&young).verify().unwrap(), 0);
    }
}
