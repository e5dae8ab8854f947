//! `engine.sandbox`: programs that a model wrote, run where they can do no harm, for scripts.

use super::call::{Answer, Call, Failed, Function, describe};
use super::options::Options;
use super::replay::must_end;
use super::sandbox_job::{self, Job, Language, Outcome};
use crate::error::{Error, Result};
use mlua::{Lua, Table, Value};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

/// Functions of `engine.sandbox`.
pub const FUNCTIONS: &[Function] = &[
    Function {
        op: "sandbox.run",
        params: &["options"],
        call: |call| {
            let job = job(call.op, &call.options(0, &OPTIONS)?)?;
            let outcomes = run_all(call.lua, std::slice::from_ref(&job), 1)?;
            call.give(outcome_table(call.lua, &outcomes[0])?)
        },
    },
    Function { op: "sandbox.run_all", params: &["list", "options?"], call: start_all },
];

const OPTIONS: [&str; 8] = ["program", "language", "stdin", "seconds", "memory_mb", "output_kb", "files_mb", "allow_weaker"];
/// What a program gets where the script does not say: seconds, MiB, KiB.
const DEFAULTS: (f64, usize, usize) = (2.0, 256, 64);
/// The least memory: less, and Python does not even begin.
const MEMORY_LEAST_MB: usize = 32;
/// Between two looks at whether the user wants to stop.
const LOOK: Duration = Duration::from_millis(50);

fn start_all(call: &Call) -> Answer {
    let expected = "a list of tables of options, as of engine.sandbox.run";
    let entries = call.list(0, expected, &call.table(0)?)?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = call.options(1, &["jobs"])?.count("jobs", 1)?.unwrap_or(cores);
    let job = |entry: &Value| match entry {
        Value::Table(table) => job(call.op, &Options::read(call.op, Some(table.clone()), &OPTIONS)?),
        other => Err(Error::argument(call.op, "list", expected, format!("an entry that is {}", describe(other))).into()),
    };
    let jobs = entries.iter().map(job).collect::<Failed<Vec<Job>>>()?;
    let outcomes = run_all(call.lua, &jobs, threads)?;
    let tables = outcomes.iter().map(|outcome| outcome_table(call.lua, outcome)).collect::<mlua::Result<Vec<_>>>()?;
    call.give(tables)
}

fn job(op: &'static str, options: &Options) -> Failed<Job> {
    let bytes = |key: &str| -> Failed<Option<Vec<u8>>> {
        match options.value(key)? {
            Value::Nil => Ok(None),
            Value::String(text) => Ok(Some(text.as_bytes().to_vec())),
            other => Err(Error::argument(op, key, "a string", describe(&other)).into()),
        }
    };
    let Some(program) = bytes("program")? else { return Err(Error::argument(op, "program", "given", "nil").into()) };
    let language = match options.string("language")?.as_deref() {
        None | Some("lua") => Language::Lua,
        Some("python") => Language::Python,
        Some(other) => return Err(Error::argument(op, "language", "lua or python", other).into()),
    };
    let seconds = options.number("seconds")?.unwrap_or(DEFAULTS.0);
    if !(seconds > 0.0 && seconds <= 3600.0) {
        return Err(Error::argument(op, "seconds", "a number above 0, at most 3600", format!("{seconds:?}")).into());
    }
    Ok(Job {
        program,
        language,
        stdin: bytes("stdin")?.unwrap_or_default(),
        seconds,
        memory_bytes: (options.count("memory_mb", MEMORY_LEAST_MB)?.unwrap_or(DEFAULTS.1) as u64) << 20,
        output_bytes: options.count("output_kb", 1)?.unwrap_or(DEFAULTS.2) << 10,
        files_bytes: (options.count("files_mb", 0)?.unwrap_or(0) as u64) << 20,
        allow_weaker: options.boolean("allow_weaker")?.unwrap_or(false),
    })
}

/// This binary, even if its file was replaced since it started.
///
/// Errors: [`Error::Io`] if the system does not tell.
pub fn executable() -> Result<PathBuf> {
    let own = Path::new("/proc/self/exe");
    if own.exists() {
        return Ok(own.to_path_buf());
    }
    std::env::current_exe().map_err(|error| Error::io(Path::new("perilune"), "find this program's file", error))
}

/// Runs jobs, `threads` at a time; outcomes in their order. A wish to stop kills them all.
fn run_all(lua: &Lua, jobs: &[Job], threads: usize) -> Failed<Vec<Outcome>> {
    let executable = executable()?;
    let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let (sender, receiver) = channel();
    let mut outcomes: Vec<Option<Outcome>> = vec![None; jobs.len()];
    std::thread::scope(|scope| {
        for _ in 0..threads.min(jobs.len()) {
            let (sender, next, stop, executable) = (sender.clone(), &next, &stop, &executable);
            // The kernel ends a program with the thread that started it, so each thread stays until its programs have ended.
            scope.spawn(move || {
                loop {
                    let index = next.fetch_add(1, SeqCst);
                    let Some(job) = jobs.get(index).filter(|_| !stop.load(SeqCst)) else { return };
                    let outcome = sandbox_job::run(executable, job, &|| stop.load(SeqCst));
                    // Nobody listens once the batch was given up.
                    let _ = sender.send((index, outcome));
                }
            });
        }
        drop(sender);
        let collect = |outcomes: &mut Vec<Option<Outcome>>| -> Failed<()> {
            loop {
                if let Some(error) = must_end(lua) {
                    return Err(error.into());
                }
                match receiver.recv_timeout(LOOK) {
                    Ok((index, outcome)) => outcomes[index] = Some(outcome?),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return Ok(()),
                }
            }
        };
        let collected = collect(&mut outcomes);
        stop.store(true, SeqCst);
        collected
    })?;
    Ok(outcomes.into_iter().map(|outcome| outcome.expect("the channel closes once each job has sent its outcome")).collect())
}

fn outcome_table(lua: &Lua, outcome: &Outcome) -> mlua::Result<Table> {
    let table = lua.create_table()?;
    table.raw_set("status", outcome.status.name())?;
    table.raw_set("reason", outcome.reason.as_deref())?;
    table.raw_set("stdout", lua.create_string(&outcome.stdout)?)?;
    table.raw_set("stderr", lua.create_string(&outcome.stderr)?)?;
    table.raw_set("exit", outcome.exit)?;
    table.raw_set("seconds", outcome.seconds)?;
    table.raw_set("missing", outcome.missing.clone())?;
    Ok(table)
}
