//! The sandbox's own process: it builds its walls, says so, and becomes the program. Reached by a hidden command (`sandbox_job.rs`);
//! a user who calls it gets what a program gets, which is little.

use super::globals::SORTED_PAIRS;
use super::raise::message;
use super::sandbox_job::{Language, MEMORY_EXIT, Order, Ready};
use super::sandbox_walls::{Limits, Reach, end_with, raise_all};
use crate::error::{Error, Result};
use mlua::chunk::ChunkMode;
use mlua::{Lua, LuaOptions, StdLib, Table, Variadic};
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Address space that the process itself may need beside the program's memory.
const SPARE_BYTES: u64 = 64 << 20;

/// What Python reads of a system beside its own library: the loader's cache, libraries, time zones, the two devices.
const SYSTEM: [&str; 9] =
    ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/urandom"];

/// The few names of `io` that a program without files has use for, over its two streams.
const STREAMS: &str = r#"
local read_all, write = ...
local text, at = nil, 1
local function one(format)
  text = text or read_all()
  format = type(format) == "string" and format:gsub("^%*", "") or format
  if format == "a" then
    local rest = text:sub(at)
    at = #text + 1
    return rest
  elseif format == "n" then
    local first, last = text:find("^%s*[-+]?[%w.]+", at)
    if not first then return nil end
    at = last + 1
    return tonumber((text:sub(first, last)))
  elseif math.type(format) == "integer" then
    if at > #text then return nil end
    local piece = text:sub(at, at + format - 1)
    at = at + #piece
    return piece
  elseif format == "l" or format == "L" then
    if at > #text then return nil end
    local stop = text:find("\n", at, true) or #text + 1
    local line = text:sub(at, format == "L" and stop or stop - 1)
    at = stop + 1
    return line
  end
  error("bad argument to 'read' (invalid format)", 3)
end
local function read(...)
  local results, count = {}, math.max(select('#', ...), 1)
  for index = 1, count do
    results[index] = one((select(index, ...)) or "l")
    if results[index] == nil then return table.unpack(results, 1, index) end
  end
  return table.unpack(results, 1, count)
end
return {
  read = read,
  write = write,
  lines = function(...)
    local formats = table.pack(...)
    return function() return read(table.unpack(formats, 1, formats.n)) end
  end,
}
"#;

/// Runs the program that `order` (JSON) is about, in the working folder; the exit code.
///
/// Errors: [`Error::Argument`] if the order cannot be read; [`Error::Io`] if the program cannot.
pub fn main(order: &str) -> Result<i32> {
    let order: Order = serde_json::from_str(order).map_err(|error| Error::argument("sandboxed", "order", "JSON of an order", error))?;
    if !end_with(order.parent) {
        return Err(Error::argument("sandboxed", "parent", "the process that asks", "another one"));
    }
    let file = Path::new(order.language.file());
    let program = std::fs::read(file).map_err(|error| Error::io(file, "read", error))?;
    let folder = std::env::current_dir().map_err(|error| Error::io(Path::new("."), "use as the working folder", error))?;
    // The interpreter starts with an empty space of addresses; this process has filled some of its own.
    let taken = if order.python.is_some() { 0 } else { address_space() + SPARE_BYTES };
    let limits = Limits { memory_bytes: order.memory_bytes + taken, file_bytes: order.files_bytes, seconds: order.seconds };
    let missing = raise_all(&limits, &reach(&order, folder));
    let begins = missing.is_empty() || order.allow_weaker;
    let ready = serde_json::to_string(&Ready { missing, begins }).expect("texts are JSON");
    eprintln!("{ready}");
    if !begins {
        return Ok(0);
    }
    match (order.language, order.python) {
        (Language::Python, Some(python)) => Err(become_python(&python)),
        (Language::Python, None) => Err(Error::argument("sandboxed", "python", "the interpreter's path", "none")),
        (Language::Lua, _) => Ok(run_lua(&program, order.memory_bytes)),
    }
}

/// Bytes of address space that this process has taken.
fn address_space() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    text.split_whitespace().next().and_then(|pages| pages.parse::<u64>().ok()).map_or(0, |pages| pages * 4096)
}

fn reach(order: &Order, folder: PathBuf) -> Reach {
    let mut reach = Reach { execs: order.python.is_some(), ..Reach::default() };
    if let Some(python) = &order.python {
        reach.readable.extend(SYSTEM.map(PathBuf::from));
        reach.readable.push(python.clone());
        // bin/python3 has its library in lib/.
        reach.readable.extend(python.parent().and_then(Path::parent).map(|prefix| prefix.join("lib")));
        reach.readable.push(folder.clone());
    }
    if order.files_bytes > 0 {
        reach.writable.push(folder);
    }
    reach
}

/// Becomes Python; what is returned is why that failed. `-I` would ignore PYTHONHASHSEED with the rest of the environment, which is
/// ours, and without it sets come in another order each time: a program must do the same in each run.
fn become_python(python: &Path) -> Error {
    let mut command = Command::new(python);
    command.args(["-s", "-S", "-B", Language::Python.file()]).env_clear();
    command.envs([("PYTHONHASHSEED", "0"), ("LANG", "C.UTF-8"), ("PYTHONUTF8", "1"), ("HOME", "."), ("TMPDIR", ".")]);
    Error::io(python, "start", command.exec())
}

/// Runs a program in a fresh state: text, tables, mathematics, coroutines, and two streams.
fn run_lua(program: &[u8], memory_bytes: u64) -> i32 {
    match try_lua(program, memory_bytes) {
        Ok(()) => 0,
        Err(error) if is_out_of_memory(&error) => {
            eprintln!("not enough memory");
            MEMORY_EXIT
        }
        Err(error) => {
            eprintln!("{}", message(&error));
            1
        }
    }
}

fn try_lua(program: &[u8], memory_bytes: u64) -> mlua::Result<()> {
    let libraries = StdLib::COROUTINE | StdLib::TABLE | StdLib::STRING | StdLib::UTF8 | StdLib::MATH;
    let lua = Lua::new_with(libraries, LuaOptions::new())?;
    lua.set_memory_limit(usize::try_from(memory_bytes).unwrap_or(usize::MAX))?;
    let globals = lua.globals();
    for name in ["dofile", "loadfile", "collectgarbage"] {
        globals.raw_set(name, mlua::Nil)?;
    }
    // A program does the same each time: its random numbers, and the order of `pairs`.
    globals.get::<Table>("math")?.get::<mlua::Function>("randomseed")?.call::<()>(0)?;
    lua.load(SORTED_PAIRS).set_name("=(sandbox)").exec()?;
    // Compiled Lua can do what the language cannot.
    let load: mlua::Function = globals.get("load")?;
    let text_only = "local load, env = ...
        return function(chunk, name, _, ...) return load(chunk, name, 't', select('#', ...) > 0 and (...) or env) end";
    let load: mlua::Function = lua.load(text_only).set_name("=(sandbox)").call((load, &globals))?;
    globals.raw_set("load", load)?;
    let write = lua.create_function(|_, pieces: Variadic<mlua::LuaString>| -> mlua::Result<()> {
        let mut out = std::io::stdout().lock();
        pieces.iter().try_for_each(|piece| out.write_all(&piece.as_bytes())).map_err(mlua::Error::external)
    })?;
    let read_all = lua.create_function(|lua, ()| {
        let mut text = Vec::new();
        // More than the memory limit is refused by the string that it becomes; the caller gives it anyway.
        std::io::stdin().lock().read_to_end(&mut text).map_err(mlua::Error::external)?;
        lua.create_string(text)
    })?;
    let print = "local write = ...
        return function(...)
          local words = table.pack(...)
          for index = 1, words.n do words[index] = tostring(words[index]) end
          write(table.concat(words, '\\t', 1, words.n), '\\n')
        end";
    globals.raw_set("print", lua.load(print).set_name("=(sandbox)").call::<mlua::Function>(&write)?)?;
    globals.raw_set("io", lua.load(STREAMS).set_name("=(sandbox)").call::<Table>((read_all, write))?)?;
    let chunk = lua.load(program).set_name(format!("@{}", Language::Lua.file())).set_mode(ChunkMode::Text);
    chunk.exec()?;
    std::io::stdout().flush().map_err(mlua::Error::external)
}

fn is_out_of_memory(error: &mlua::Error) -> bool {
    match error {
        mlua::Error::MemoryError(_) => true,
        mlua::Error::CallbackError { cause, .. } | mlua::Error::WithContext { cause, .. } => is_out_of_memory(cause),
        _ => false,
    }
}
