//! The only place where an [`Error`] becomes a Lua error, and a Lua error becomes an [`Error`] again. On the way in it gets
//! the script's line in front; on the way out it loses Lua's own frames. Rust panics take neither road: they unwind.

use crate::error::Error;
use mlua::Lua;
use std::sync::Arc;

/// Why a call from Lua failed: the engine said no, or Lua code that it called did.
#[derive(Debug)]
pub enum Failure {
    Engine(Error),
    Lua(mlua::Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Engine(error)
    }
}

impl From<mlua::Error> for Failure {
    fn from(error: mlua::Error) -> Self {
        Self::Lua(error)
    }
}

impl Failure {
    /// A finished sentence, which gets only the line in front.
    pub fn message(text: impl Into<String>) -> Self {
        Self::Engine(Error::Script(text.into()))
    }
}

/// An engine error on its way through Lua, with its place in the script.
#[derive(Debug)]
struct Raised {
    message: String,
    kind: Kind,
}

/// What may be done about a raised error.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// Another attempt may go well.
    Passing,
    /// Another attempt would end alike: a wrong argument, a shape that does not fit.
    Final,
    /// The script must end; no `pcall` may keep it from that.
    Interrupted,
    /// As these, because another generation leads the run.
    Superseded,
    /// As these, up to the step whose time is over.
    TimedOut,
}

impl Kind {
    fn of(error: &Error) -> Self {
        match error {
            Error::Interrupted => Self::Interrupted,
            Error::Superseded => Self::Superseded,
            Error::TimedOut { .. } => Self::TimedOut,
            Error::Shape { .. } | Error::Dtype { .. } | Error::Device { .. } | Error::Argument { .. } | Error::Unsupported { .. } => {
                Self::Final
            }
            _ => Self::Passing,
        }
    }
}

impl std::fmt::Display for Raised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Raised {}

/// Frames of a traceback that are printed; more do not fit a screen beside the message.
const FRAMES_MAX: usize = 6;

/// The Lua error for `failure`, which happens in the innermost frame of `lua` now.
pub fn raise(lua: &Lua, failure: Failure) -> mlua::Error {
    match failure {
        // A value that mlua could not convert: no function of ours was reached that could have said where.
        Failure::Lua(error @ (mlua::Error::FromLuaConversionError { .. } | mlua::Error::BadArgument { .. })) => {
            mlua::Error::ExternalError(Arc::new(Raised { message: format!("{}{}", place(lua), message(&error)), kind: Kind::Final }))
        }
        Failure::Lua(error) => error,
        Failure::Engine(error) => {
            let kind = Kind::of(&error);
            mlua::Error::ExternalError(Arc::new(Raised { message: format!("{}{error}", place(lua)), kind }))
        }
    }
}

/// `scripts/sft.lua:41: ` for the nearest frame that is a file of the user's, or nothing where there is none.
pub fn place(lua: &Lua) -> String {
    for level in 0.. {
        let frame = lua.inspect_stack(level, |frame| {
            let source = frame.source().source?;
            let path = source.strip_prefix('@')?.to_string();
            Some(format!("{path}:{}: ", frame.current_line()?))
        });
        match frame {
            None => break,
            Some(None) => continue,
            Some(Some(place)) => return place,
        }
    }
    String::new()
}

/// What a Lua error says, without tracebacks.
pub fn message(error: &mlua::Error) -> String {
    match error {
        mlua::Error::CallbackError { cause, .. } | mlua::Error::WithContext { cause, .. } => message(cause),
        mlua::Error::RuntimeError(text) => split_traceback(text).0.to_string(),
        mlua::Error::SyntaxError { message, .. } => split_traceback(message).0.to_string(),
        other => split_traceback(&other.to_string()).0.to_string(),
    }
}

fn kind(error: &mlua::Error) -> Kind {
    match error {
        mlua::Error::CallbackError { cause, .. } | mlua::Error::WithContext { cause, .. } => kind(cause),
        mlua::Error::ExternalError(error) => error.downcast_ref::<Raised>().map_or(Kind::Passing, |raised| raised.kind),
        mlua::Error::SyntaxError { .. } => Kind::Final,
        _ => Kind::Passing,
    }
}

/// Whether this Lua error says that the script must end, which no `pcall` may swallow.
pub fn is_stop(error: &mlua::Error) -> bool {
    matches!(kind(error), Kind::Interrupted | Kind::Superseded | Kind::TimedOut)
}

/// Whether this Lua error says that the time of a step is over.
pub fn is_timeout(error: &mlua::Error) -> bool {
    kind(error) == Kind::TimedOut
}

/// Whether another attempt at what raised this error would end alike.
pub fn is_final(error: &mlua::Error) -> bool {
    kind(error) != Kind::Passing
}

/// A Lua error as the crate's: the message, then the script's own frames, outermost last.
pub fn explain(error: &mlua::Error) -> Error {
    match kind(error) {
        Kind::Interrupted => return Error::Interrupted,
        Kind::Superseded => return Error::Superseded,
        _ => {}
    }
    let mut text = message(error);
    let frames = script_frames(&traceback(error));
    // One frame is the line that already stands in front of the message.
    if frames.len() > 1 {
        text.push_str("\n  called from:");
        for frame in frames.iter().take(FRAMES_MAX) {
            text.push_str("\n    ");
            text.push_str(frame);
        }
        if frames.len() > FRAMES_MAX {
            text.push_str(&format!("\n    ... {} more", frames.len() - FRAMES_MAX));
        }
    }
    Error::Script(text)
}

/// The innermost traceback: the one nearest to the cause.
fn traceback(error: &mlua::Error) -> String {
    match error {
        mlua::Error::CallbackError { cause, traceback: outer } => {
            let inner = traceback(cause);
            if inner.is_empty() { outer.clone() } else { inner }
        }
        mlua::Error::WithContext { cause, .. } => traceback(cause),
        mlua::Error::RuntimeError(text) => split_traceback(text).1.to_string(),
        _ => String::new(),
    }
}

fn split_traceback(text: &str) -> (&str, &str) {
    match text.split_once("\nstack traceback:") {
        Some((message, frames)) => (message.trim_end(), frames),
        None => (text.trim_end(), ""),
    }
}

/// Lines of a traceback that are places in the user's files. Lua marks its own with `[C]`, mlua's begin with
/// `__mlua`, the engine's Lua has names in round brackets.
fn script_frames(traceback: &str) -> Vec<String> {
    let is_script =
        |line: &&str| !line.is_empty() && !line.starts_with(['[', '(', '.']) && !line.starts_with("__mlua") && line.contains(": in ");
    traceback.lines().map(str::trim).filter(is_script).map(str::to_string).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_of_lua_and_of_the_engine_are_left_out() {
        let frames = script_frames(
            "\n\t[C]: in function 'error'\n\t(std.losses):3: in upvalue 'f'\n\ta.lua:2: in local 'g'\n\ta.lua:9: in main chunk\n\t[C]: in ?",
        );
        assert_eq!(frames, ["a.lua:2: in local 'g'", "a.lua:9: in main chunk"]);
    }
}
