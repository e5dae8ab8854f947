//! The one error type of the crate. It knows no layer above it: host turns it into a Lua error, cli prints it.

use std::path::Path;

/// What a script, a file, the machine or the network can cause. Our own mistakes are assertions instead.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tensor has the wrong shape or rank.
    #[error("{op}: `{arg}` should be {expected}, got {got}")]
    Shape { op: &'static str, arg: &'static str, expected: String, got: String },
    /// A tensor has the wrong element type.
    #[error("{op}: `{arg}` should be {expected}, got {got}; convert it with tensor:to(\"{expected}\")")]
    Dtype { op: &'static str, arg: &'static str, expected: String, got: String },
    /// A device that does not exist here, or two tensors on different devices.
    #[error("{op}: {what}")]
    Device { op: &'static str, what: String },
    /// A value of the right type that cannot be meant.
    #[error("{op}: `{arg}` should be {expected}, got {got}")]
    Argument { op: &'static str, arg: String, expected: String, got: String },
    /// A file whose content is not what its format or its neighbours promise. `place` is a tensor name, a key or a line.
    #[error("{path}: {place}: expected {expected}, found {found}")]
    Format { path: String, place: String, expected: String, found: String },
    /// The operating system refused.
    #[error("{path}: cannot {action}: {source}{}", advice(.source))]
    Io { path: String, action: &'static str, source: std::io::Error },
    /// Known to the field, not built here; `remedy` says what to do instead.
    #[error("{what} is not supported; {remedy}")]
    Unsupported { what: String, remedy: String },
    /// A loss or gradient that is not a finite number.
    #[error("{op}: {what} is not finite ({value}); the update was not applied")]
    NonFinite { op: &'static str, what: String, value: f32 },
    /// A message that a script raised, already complete.
    #[error("{0}")]
    Script(String),
    /// The user asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// Another generation of the script has taken over, or this one was given up: it must end without a trace.
    #[error("this generation of the script does not lead the run any more")]
    Superseded,
    /// A step of a run took longer than it may.
    #[error("{what} was given {seconds} s, and they are over")]
    TimedOut { what: String, seconds: f64 },
    /// What a run recorded and what its script does now are two things.
    #[error("{what} differs from what the run recorded: {how}; {remedy}")]
    Diverged { what: String, how: String, remedy: String },
}

/// `std::result::Result` with the crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What to do about an error of the system, where that is known.
fn advice(source: &std::io::Error) -> &'static str {
    match source.kind() {
        std::io::ErrorKind::StorageFull => "; make room on that disk, then try again (a run goes on with `perilune resume`)",
        _ => "",
    }
}

impl Error {
    /// An [`Error::Io`] at `path`; `action` completes "cannot ...", for example "read".
    pub fn io(path: &Path, action: &'static str, source: std::io::Error) -> Self {
        Self::Io { path: path.display().to_string(), action, source }
    }

    /// An [`Error::Format`] at `path`.
    pub fn format(path: &Path, place: impl Into<String>, expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self::Format { path: path.display().to_string(), place: place.into(), expected: expected.into(), found: found.into() }
    }

    /// An [`Error::Argument`] of operation `op`.
    pub fn argument(op: &'static str, arg: impl Into<String>, expected: impl Into<String>, got: impl ToString) -> Self {
        Self::Argument { op, arg: arg.into(), expected: expected.into(), got: got.to_string() }
    }
}
