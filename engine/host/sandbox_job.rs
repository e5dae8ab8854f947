//! One program that a model wrote, run in a process of its own and watched from outside: it ends by itself, or it is ended. The process
//! is this binary again, by a command that users do not see; it builds its own walls (`sandbox_walls.rs`) before the program begins.
//! What is watched here is what walls cannot hold: the clock, how much it writes to its streams, how much it keeps on the disk.

use crate::error::{Error, Result};
use crate::store::scratch::Scratch;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// The hidden command that [`super::sandbox_child`] is reached by.
pub const COMMAND: &str = "sandboxed";
/// The exit code of a Lua program that wanted more memory than it may have.
pub const MEMORY_EXIT: i32 = 86;
/// How long the process may take until the program begins, on a busy machine.
const START: Duration = Duration::from_secs(30);
/// Between two looks at the clock and the disk.
const TICK: Duration = Duration::from_millis(10);
/// Most characters of a program's own words that are taken as the reason of its end.
const REASON_MAX: usize = 200;
/// What an empty file or folder counts.
const ENTRY_BYTES: u64 = 4096;

/// What a program is written in.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Language {
    Lua,
    Python,
}

impl Language {
    /// The name of the program's file, which its messages carry.
    pub fn file(self) -> &'static str {
        match self {
            Self::Lua => "program.lua",
            Self::Python => "program.py",
        }
    }
}

/// A program and what it may use.
#[derive(Clone, Debug)]
pub struct Job {
    pub program: Vec<u8>,
    pub language: Language,
    pub stdin: Vec<u8>,
    /// Seconds by the clock, from when the program begins.
    pub seconds: f64,
    pub memory_bytes: u64,
    /// Most bytes of each of its two streams.
    pub output_bytes: usize,
    /// Most bytes on disk, in a folder of its own that goes with it; 0 for no writing at all.
    pub files_bytes: u64,
    /// Run it even if the kernel refuses a wall.
    pub allow_weaker: bool,
}

/// What the process is told on its command line, as JSON.
#[derive(Debug, Serialize, Deserialize)]
pub struct Order {
    pub parent: u32,
    pub language: Language,
    pub seconds: f64,
    pub memory_bytes: u64,
    pub files_bytes: u64,
    pub allow_weaker: bool,
    /// The interpreter, for Python.
    pub python: Option<PathBuf>,
}

/// What the process says on its first line of standard error, before the program begins.
#[derive(Debug, Serialize, Deserialize)]
pub struct Ready {
    /// Walls that are missing, with why.
    pub missing: Vec<String>,
    /// Whether the program begins now.
    pub begins: bool,
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Status {
    Ok,
    /// It failed by itself: an error that it did not catch, or an exit code.
    Error,
    Timeout,
    Memory,
    /// A signal ended it, or we did, because it wrote too much.
    Killed,
    /// It was not run.
    Refused,
}

impl Status {
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Error => "error",
            Self::Timeout => "timeout",
            Self::Memory => "memory",
            Self::Killed => "killed",
            Self::Refused => "refused",
        }
    }
}

/// What became of a program.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub status: Status,
    /// In words, unless it is ok.
    pub reason: Option<String>,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    /// None if no exit code came.
    pub exit: Option<i32>,
    /// By the clock, from when the program began.
    pub seconds: f64,
    /// Walls that it ran without.
    pub missing: Vec<String>,
}

impl Outcome {
    fn refused(reason: String, missing: Vec<String>) -> Self {
        Self { status: Status::Refused, reason: Some(reason), stdout: vec![], stderr: vec![], exit: None, seconds: 0.0, missing }
    }
}

/// Runs `job` to its end, which is near.
///
/// - `executable`: the `perilune` binary
/// - `given_up`: asked all the time; once it says true, the program is killed
///
/// Errors: [`Error::Io`] if the folder or the process cannot be made; [`Error::Interrupted`] if it was given up.
pub fn run(executable: &Path, job: &Job, given_up: &dyn Fn() -> bool) -> Result<Outcome> {
    let python = match job.language {
        Language::Lua => None,
        Language::Python => match find_python() {
            Some(path) => Some(path),
            None => return Ok(Outcome::refused("no python3 on this machine: none in /usr/bin, /usr/local/bin and PATH".into(), vec![])),
        },
    };
    let folder = Folder::make()?;
    let file = folder.0.path().join(job.language.file());
    std::fs::write(&file, &job.program).map_err(|error| Error::io(&file, "write", error))?;
    let order = Order {
        parent: std::process::id(),
        language: job.language,
        seconds: job.seconds,
        memory_bytes: job.memory_bytes,
        files_bytes: job.files_bytes,
        allow_weaker: job.allow_weaker,
        python,
    };
    let mut command = Command::new(executable);
    command.arg(COMMAND).arg(serde_json::to_string(&order).expect("numbers and paths are JSON"));
    command.current_dir(folder.0.path()).env_clear().process_group(0);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    if let Some(points) = std::env::var_os("PERILUNE_FAILPOINT") {
        command.env("PERILUNE_FAILPOINT", points);
    }
    let child = command.spawn().map_err(|error| Error::io(executable, "start the sandbox's process", error))?;
    let mut watched = Watched::of(child, job).map_err(|error| Error::io(executable, "watch the sandbox's process", error))?;
    let (exit, ended) = watched.watch(&folder, given_up)?;
    if ended == Some(Ended::GivenUp) {
        return Err(Error::Interrupted);
    }
    let mut outcome = watched.outcome(exit, ended);
    // Where the folder lies is another place each time, and nothing to learn from.
    let own = format!("{}/", folder.0.path().display());
    outcome.stdout = without(outcome.stdout, own.as_bytes());
    outcome.stderr = without(outcome.stderr, own.as_bytes());
    Ok(outcome)
}

/// The text without any `part`, which is not empty.
fn without(text: Vec<u8>, part: &[u8]) -> Vec<u8> {
    if text.windows(part.len()).all(|window| window != part) {
        return text;
    }
    let (mut left, mut at) = (Vec::with_capacity(text.len()), 0);
    while at < text.len() {
        if text[at..].starts_with(part) {
            at += part.len();
        } else {
            left.push(text[at]);
            at += 1;
        }
    }
    left
}

/// A program that does nothing, run to see whether this system can hold programs. Errors: as [`run`].
pub fn probe(executable: &Path) -> Result<Outcome> {
    let job = Job {
        program: Vec::new(),
        language: Language::Lua,
        stdin: Vec::new(),
        seconds: 10.0,
        memory_bytes: 64 << 20,
        output_bytes: 1 << 10,
        files_bytes: 0,
        allow_weaker: false,
    };
    run(executable, &job, &|| false)
}

/// The interpreter itself; scripts that look for one (pyenv's) would need a shell.
pub fn find_python() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = ["/usr/bin", "/usr/local/bin"].map(PathBuf::from).into_iter().chain(std::env::split_paths(&path));
    let is_program = |path: &PathBuf| {
        let mut head = [0; 4];
        let read = std::fs::File::open(path).and_then(|mut file| file.read_exact(&mut head));
        read.is_ok() && head == *b"\x7fELF"
    };
    folders.filter_map(|folder| folder.join("python3").canonicalize().ok()).find(is_program)
}

/// The program's folder.
struct Folder(Scratch);

impl Folder {
    fn make() -> Result<Self> {
        Scratch::make().map(Self).map_err(|error| Error::io(&std::env::temp_dir(), "make a folder in", error))
    }

    /// Bytes in the folder; none if it cannot be seen to its end, which takes names longer than the system's own limits.
    fn bytes(&self) -> Option<u64> {
        let (mut sum, mut folders) = (0, vec![self.0.path().to_owned()]);
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).ok()? {
                let entry = entry.ok()?;
                match entry.metadata() {
                    Ok(meta) => {
                        sum += ENTRY_BYTES + meta.blocks() * 512;
                        if meta.is_dir() {
                            folders.push(entry.path());
                        }
                    }
                    // Removed meanwhile.
                    Err(error) if error.kind() == ErrorKind::NotFound => {}
                    Err(_) => return None,
                }
            }
        }
        Some(sum)
    }
}

/// Why we ended a program.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Ended {
    NotBegun,
    Time,
    Output,
    Disk,
    GivenUp,
}

/// A process under watch.
struct Watched<'a> {
    job: &'a Job,
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Option<ChildStdout>,
    stderr: Option<ChildStderr>,
    /// Bytes of `job.stdin` that are written.
    written: usize,
    out: Vec<u8>,
    err: Vec<u8>,
    ready: Option<(Ready, Instant)>,
    spawned: Instant,
    took: Duration,
}

impl<'a> Watched<'a> {
    fn of(mut child: Child, job: &'a Job) -> std::io::Result<Self> {
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let watched = Self {
            job,
            child,
            stdin,
            stdout,
            stderr,
            written: 0,
            out: Vec::new(),
            err: Vec::new(),
            ready: None,
            spawned: Instant::now(),
            took: Duration::ZERO,
        };
        let flags = FcntlArg::F_SETFL(OFlag::O_NONBLOCK);
        if let (Some(stdin), Some(stdout), Some(stderr)) = (&watched.stdin, &watched.stdout, &watched.stderr) {
            fcntl(stdin, flags)?;
            fcntl(stdout, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
            fcntl(stderr, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        }
        Ok(watched)
    }

    /// Until it has ended: how, and why if that was us.
    fn watch(&mut self, folder: &Folder, given_up: &dyn Fn() -> bool) -> Result<(ExitStatus, Option<Ended>)> {
        let failed = |error| Error::io(Path::new("sandbox"), "watch its process", error);
        loop {
            self.wait_for_events().map_err(failed)?;
            self.exchange();
            if let Some(exit) = self.child.try_wait().map_err(failed)? {
                self.took = self.begun().map_or(Duration::ZERO, |begun| begun.elapsed());
                self.exchange();
                // Nothing of it lives, unless it ran without the wall of calls and left children in its group.
                self.kill();
                return Ok((exit, None));
            }
            if let Some(ended) = self.must_end(folder, given_up) {
                self.took = self.begun().map_or(Duration::ZERO, |begun| begun.elapsed());
                self.kill();
                let exit = self.child.wait().map_err(failed)?;
                self.exchange();
                return Ok((exit, Some(ended)));
            }
        }
    }

    fn begun(&self) -> Option<Instant> {
        self.ready.as_ref().map(|(_, begun)| *begun)
    }

    fn wait_for_events(&self) -> std::io::Result<()> {
        let mut events: Vec<PollFd> = Vec::with_capacity(3);
        events.extend(self.stdout.as_ref().map(|stream| PollFd::new(stream.as_fd(), PollFlags::POLLIN)));
        events.extend(self.stderr.as_ref().map(|stream| PollFd::new(stream.as_fd(), PollFlags::POLLIN)));
        let is_ended = events.is_empty();
        events.extend(self.stdin.as_ref().map(|stream| PollFd::new(stream.as_fd(), PollFlags::POLLOUT)));
        // Both streams are closed just before a process is gone.
        let patience = if is_ended { 1 } else { TICK.as_millis() as u16 };
        match poll(&mut events, PollTimeout::from(patience)) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes what the streams hold and gives what standard input takes.
    fn exchange(&mut self) {
        let most = self.job.output_bytes;
        take(&mut self.stdout, &mut self.out, most);
        // The first line of standard error is the process's own.
        take(&mut self.stderr, &mut self.err, if self.ready.is_some() { most } else { usize::MAX });
        if self.ready.is_none()
            && let Some(end) = self.err.iter().position(|byte| *byte == b'\n')
            && let Ok(ready) = serde_json::from_slice::<Ready>(&self.err[..end])
        {
            self.err.drain(..=end);
            self.ready = Some((ready, Instant::now()));
        }
        if let Some(stream) = &mut self.stdin {
            match stream.write(&self.job.stdin[self.written..]) {
                Ok(count) => self.written += count,
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                // It does not read; that is no error of its own.
                Err(_) => self.written = self.job.stdin.len(),
            }
            if self.written == self.job.stdin.len() {
                self.stdin = None;
            }
        }
    }

    fn must_end(&self, folder: &Folder, given_up: &dyn Fn() -> bool) -> Option<Ended> {
        if given_up() {
            return Some(Ended::GivenUp);
        }
        let Some(begun) = self.begun() else { return (self.spawned.elapsed() > START).then_some(Ended::NotBegun) };
        if begun.elapsed().as_secs_f64() > self.job.seconds {
            return Some(Ended::Time);
        }
        if self.out.len() > self.job.output_bytes || self.err.len() > self.job.output_bytes {
            return Some(Ended::Output);
        }
        // The program's own text lies there too, and a file system rounds up.
        let most = self.job.files_bytes + 8 * ENTRY_BYTES + self.job.program.len() as u64;
        (self.job.files_bytes > 0 && folder.bytes().is_none_or(|bytes| bytes > most)).then_some(Ended::Disk)
    }

    /// SIGKILL, which nothing can catch, to all of its group.
    fn kill(&mut self) {
        // They may all be gone already.
        let _ = killpg(Pid::from_raw(self.child.id() as i32), Signal::SIGKILL);
    }

    fn outcome(mut self, exit: ExitStatus, ended: Option<Ended>) -> Outcome {
        let Some((ready, _)) = self.ready.take() else {
            let said = String::from_utf8_lossy(&self.err);
            let how = match ended {
                Some(_) => format!("did not begin within {} s", START.as_secs()),
                None => format!("ended before the program began ({exit})"),
            };
            return Outcome::refused(format!("the sandbox's process {how}: {}", said.trim()), vec![]);
        };
        if !ready.begins {
            let reason = format!("this system cannot hold a program as it should ({})", ready.missing.join("; "));
            return Outcome::refused(format!("{reason}; allow_weaker = true runs it all the same"), ready.missing);
        }
        let output_limit = self.out.len().max(self.err.len()) > self.job.output_bytes;
        let (status, reason) = match ended {
            Some(Ended::Disk) => (Status::Killed, Some(format!("it kept more than {} bytes in files", self.job.files_bytes))),
            Some(Ended::Output) => (Status::Killed, Some(self.too_much())),
            None if output_limit => (Status::Killed, Some(self.too_much())),
            Some(_) => (Status::Timeout, Some(format!("it was given {} s", self.job.seconds))),
            None => self.own_end(exit),
        };
        self.out.truncate(self.job.output_bytes);
        self.err.truncate(self.job.output_bytes);
        let seconds = self.took.as_secs_f64();
        Outcome {
            status,
            reason,
            stdout: std::mem::take(&mut self.out),
            stderr: std::mem::take(&mut self.err),
            exit: exit.code(),
            seconds,
            missing: ready.missing,
        }
    }

    fn too_much(&self) -> String {
        format!("it wrote more than {} bytes", self.job.output_bytes)
    }

    /// The end of a program that we did not end.
    fn own_end(&self, exit: ExitStatus) -> (Status, Option<String>) {
        let out_of_memory = Some(format!("it wanted more than {} MiB", self.job.memory_bytes >> 20));
        if let Some(signal) = exit.signal() {
            let name = Signal::try_from(signal).map_or_else(|_| signal.to_string(), |signal| signal.to_string());
            return match Signal::try_from(signal) {
                Ok(Signal::SIGXCPU) => (Status::Timeout, Some(format!("it was given {} s", self.job.seconds))),
                _ => (Status::Killed, Some(format!("{name} ended it"))),
            };
        }
        match (exit.code(), self.job.language) {
            (Some(0), _) => (Status::Ok, None),
            (Some(MEMORY_EXIT), Language::Lua) => (Status::Memory, out_of_memory),
            (_, Language::Python) if last_line(&self.err).starts_with("MemoryError") => (Status::Memory, out_of_memory),
            (code, _) => {
                let line = last_line(&self.err);
                let what = if line.is_empty() { format!("exit code {}", code.unwrap_or(-1)) } else { line };
                (Status::Error, Some(what))
            }
        }
    }
}

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        // Where watching itself failed; nothing else leaves a process here.
        if matches!(self.child.try_wait(), Ok(None)) {
            self.kill();
            let _ = self.child.wait();
        }
    }
}

/// Reads what a stream holds, up to one byte more than `most` in all; the stream goes at its end.
fn take<S: Read>(stream: &mut Option<S>, into: &mut Vec<u8>, most: usize) {
    let mut piece = [0; 16384];
    while let Some(open) = stream {
        let room = most.saturating_add(1).saturating_sub(into.len()).min(piece.len());
        if room == 0 {
            return;
        }
        match open.read(&mut piece[..room]) {
            Ok(0) => *stream = None,
            Ok(count) => into.extend_from_slice(&piece[..count]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            Err(_) => *stream = None,
        }
    }
}

/// The beginning of the last line that says something.
fn last_line(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let line = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    line.trim().chars().take(REASON_MAX).collect()
}
