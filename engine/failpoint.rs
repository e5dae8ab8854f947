//! Failpoints: named places at which a test makes the program fail. They are in the shipped binary, so that what is tested is
//! what users have; without `PERILUNE_FAILPOINT` a point costs one look at an empty list.
//!
//! `PERILUNE_FAILPOINT` is a list of `name=action`, separated by commas. Actions: `error` (an input/output error), `no_space`
//! (the disk is full), `panic`, `exit` (the process ends at once, nothing is tidied up), `kill` (SIGKILL), `sleep(MILLISECONDS)`,
//! `say` (a line `failpoint NAME` on standard error). In front of an action `3*` means: only the third time that the point is
//! passed; a name may stand in the list more than once.

use std::io::{Error, ErrorKind, Result};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

/// The exit code of the action `exit`: that of a process that SIGKILL ended.
pub const EXIT_CODE: i32 = 137;

struct Point {
    name: String,
    action: Action,
    /// Which passing of the point triggers it; none for each.
    only: Option<u64>,
    passed: AtomicU64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Action {
    Error,
    NoSpace,
    Panic,
    Exit,
    Kill,
    Say,
    Sleep(u64),
}

static POINTS: OnceLock<Vec<Point>> = OnceLock::new();

/// The place `name` is passed. Errors and ends as the environment asks.
pub fn failpoint(name: &str) -> Result<()> {
    let points = POINTS.get_or_init(|| parse(&std::env::var("PERILUNE_FAILPOINT").unwrap_or_default()));
    points.iter().filter(|point| point.name == name).try_for_each(pass)
}

fn pass(point: &Point) -> Result<()> {
    let passed = point.passed.fetch_add(1, SeqCst) + 1;
    if point.only.is_some_and(|only| only != passed) {
        return Ok(());
    }
    let name = &point.name;
    match point.action {
        Action::Error => Err(Error::other(format!("failpoint {name}"))),
        Action::NoSpace => Err(ErrorKind::StorageFull.into()),
        Action::Panic => panic!("failpoint {name}"),
        Action::Exit => std::process::exit(EXIT_CODE),
        Action::Kill => kill(),
        Action::Say => {
            eprintln!("failpoint {name}");
            Ok(())
        }
        Action::Sleep(millis) => {
            std::thread::sleep(Duration::from_millis(millis));
            Ok(())
        }
    }
}

/// Ends this process as the system or an impatient user does. The standard library has no call for it, the program `kill` has.
fn kill() -> ! {
    let sent = std::process::Command::new("kill").args(["-KILL", &std::process::id().to_string()]).status();
    // The signal may take a moment; nothing more may happen here.
    std::thread::sleep(Duration::from_secs(5));
    panic!("failpoint: the signal did not come: {sent:?}");
}

/// Panics on what it does not understand: a test that names no point tests nothing.
fn parse(text: &str) -> Vec<Point> {
    let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
    parts
        .map(|part| {
            let (name, action) = part.split_once('=').unwrap_or_else(|| panic!("PERILUNE_FAILPOINT: `{part}` is no name=action"));
            let (only, action) = match action.split_once('*') {
                Some((count, action)) => {
                    (Some(count.parse().unwrap_or_else(|_| panic!("PERILUNE_FAILPOINT: no count in `{part}`"))), action)
                }
                None => (None, action),
            };
            let sleep = |action: &str| action.strip_prefix("sleep(")?.strip_suffix(')')?.parse().ok().map(Action::Sleep);
            let action = match action {
                "error" => Action::Error,
                "no_space" => Action::NoSpace,
                "panic" => Action::Panic,
                "exit" => Action::Exit,
                "kill" => Action::Kill,
                "say" => Action::Say,
                other => sleep(other).unwrap_or_else(|| panic!("PERILUNE_FAILPOINT: unknown action in `{part}`")),
            };
            Point { name: name.to_string(), action, only, passed: AtomicU64::new(0) }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read() {
        let points = parse("a.b=error, c=2*sleep(50),d=exit,c=9*kill,e=say");
        let read: Vec<_> = points.iter().map(|point| (point.name.as_str(), point.action, point.only)).collect();
        let wanted = [
            ("a.b", Action::Error, None),
            ("c", Action::Sleep(50), Some(2)),
            ("d", Action::Exit, None),
            ("c", Action::Kill, Some(9)),
            ("e", Action::Say, None),
        ];
        assert_eq!(read, wanted);
        for wrong in ["a", "a=explode", "a=x*error", "a=sleep(long)"] {
            assert!(std::panic::catch_unwind(|| parse(wrong)).is_err(), "{wrong}");
        }
    }
}
