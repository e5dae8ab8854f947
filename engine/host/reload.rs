//! When a run should try another generation of its script: reads the files as they are now, and watches them. Events of the file
//! system are hints; what counts is the content. Editors save by writing in place, or by renaming a new file over the old one, in
//! several steps: so folders are watched, not files, and a file counts once two looks at it agree.
//! Source: the behaviour of inotify and editors as recorded in notify's issues (166, 451, 146).

use super::code;
use super::control::Wish;
use super::modules::Source;
use super::run::Run;
use crate::error::{Error, Result};
use notify::{Event, EventKind, PollWatcher, RecommendedWatcher, RecursiveMode, Watcher};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// Silence after an event before files are read; a save is up to three events.
const QUIET: Duration = Duration::from_millis(100);
/// Longest wait for that silence: a file that is written without end would never be read.
const QUIET_MAX: Duration = Duration::from_secs(2);
/// Between two looks that must agree.
const BETWEEN_LOOKS: Duration = Duration::from_millis(30);
/// How often files are looked at where the system does not report changes.
const POLL: Duration = Duration::from_secs(1);
/// How often the watcher looks whether the run is still there, and whether its files are the same.
const IDLE: Duration = Duration::from_secs(2);

/// The files of the generation that leads as they are on the disk now, the entry script first. A module that is gone is left out.
///
/// Errors: [`Error::Io`] if the entry script cannot be read; [`Error::Format`] for a file that is not UTF-8.
pub fn files_now(leading: &[Source]) -> Result<Vec<Source>> {
    let mut files = Vec::new();
    for (index, source) in leading.iter().enumerate() {
        let path = Path::new(&source.path);
        match std::fs::read(path) {
            Ok(bytes) => {
                let text = String::from_utf8(bytes).map_err(|_| Error::format(path, "script", "UTF-8 text", "other bytes"))?;
                files.push(Source { path: source.path.clone(), text });
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && index > 0 => {}
            Err(error) => return Err(Error::io(path, "read", error)),
        }
    }
    Ok(files)
}

/// Watches the files of `run` until it ends, and hints at a reload whenever they have changed.
///
/// Errors: [`Error::Io`] if no thread can be started. Where the system cannot watch, files are looked at every second.
pub fn watch(run: &Arc<Run>) -> Result<()> {
    let watched = Watched::new(run);
    let run = Arc::downgrade(run);
    let thread = std::thread::Builder::new().name("watch".into()).spawn(move || watched.serve(&run));
    thread.map(drop).map_err(|error| Error::Io { path: "scripts".into(), action: "start a thread to watch", source: error })
}

struct Watched {
    watcher: Box<dyn Watcher + Send>,
    events: Receiver<notify::Result<Event>>,
    folders: BTreeSet<PathBuf>,
    /// What was last hinted at, so that a refused edit is not tried again.
    seen: Vec<Source>,
}

impl Watched {
    fn new(run: &Run) -> Self {
        let (sender, events) = mpsc::channel();
        let system = RecommendedWatcher::new(sender.clone(), notify::Config::default());
        let watcher: Box<dyn Watcher + Send> = match system {
            Ok(watcher) => Box::new(watcher),
            Err(error) => {
                run.screen.note(&format!("the system cannot watch files ({error}); they are looked at every second"));
                let poll = PollWatcher::new(sender, notify::Config::default().with_poll_interval(POLL).with_compare_contents(true));
                Box::new(poll.expect("looking at files needs nothing of the system"))
            }
        };
        let mut this = Self { watcher, events, folders: BTreeSet::new(), seen: run.code().sources.clone() };
        this.watch_folders(run);
        this
    }

    /// Watches the folders of all files of the generation that leads.
    fn watch_folders(&mut self, run: &Run) {
        let sources = run.code().sources.clone();
        for source in &sources {
            let folder = Path::new(&source.path).parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
            if self.folders.insert(folder.to_path_buf())
                && let Err(error) = self.watcher.watch(folder, RecursiveMode::NonRecursive)
            {
                let other = "edits there are seen every two seconds";
                run.screen.note(&format!("{} cannot be watched ({error}); {other}", folder.display()));
            }
        }
    }

    fn serve(mut self, run: &Weak<Run>) {
        loop {
            let waited = self.events.recv_timeout(IDLE);
            if matches!(waited, Err(RecvTimeoutError::Disconnected)) {
                return;
            }
            if let Ok(Ok(event)) = &waited
                && matches!(event.kind, EventKind::Access(_))
                && !event.need_rescan()
            {
                continue;
            }
            if waited.is_ok() {
                self.settle();
            }
            let Some(run) = run.upgrade() else { return };
            self.watch_folders(&run);
            // Without an event, too: one that was lost is noticed.
            self.look(&run);
        }
    }

    /// Waits until events have stopped for a moment.
    fn settle(&self) {
        let end = Instant::now() + QUIET_MAX;
        while Instant::now() < end && self.events.recv_timeout(QUIET).is_ok() {}
    }

    fn look(&mut self, run: &Run) {
        let leading = run.code().sources.clone();
        let read = || files_now(&leading).ok();
        let Some(mut files) = read() else { return };
        if code::same(&files, &self.seen) {
            return;
        }
        for _ in 0..20 {
            std::thread::sleep(BETWEEN_LOOKS);
            let Some(again) = read() else { return };
            if code::same(&files, &again) {
                // In the middle of a save, for an editor that truncates first.
                if files.iter().any(|file| file.text.is_empty()) {
                    return;
                }
                self.seen = files;
                if !code::same(&self.seen, &leading) {
                    run.control.hint(Wish::Reload);
                }
                return;
            }
            files = again;
        }
    }
}
