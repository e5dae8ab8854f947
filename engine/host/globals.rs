//! The global names of a script: Lua's own, with a few replaced so that a run repeats itself and mistakes are seen.
//! Assigning or reading an undeclared global is an error; `math.random` is a stream of the run; `pcall` hands out plain
//! strings and cannot swallow the user's Ctrl-C.

use super::call::describe;
use super::nearest::suggestion;
use super::progress::Screen;
use super::raise::{Failure, is_interrupt, message, raise};
use crate::error::Error;
use crate::kernels::random::Stream;
use mlua::{Lua, MultiValue, Table, Value, Variadic};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// `pcall` and its kin over Lua's own. `text` turns an error object of the engine into its message, and raises it again
/// if it is the user's wish to stop.
const PROTECTED_CALLS: &str = r#"
local text = ...
local pcall_raw, xpcall_raw, resume_raw = pcall, xpcall, coroutine.resume
local function tidy(ok, first, ...)
  if not ok and type(first) == "userdata" then first = text(first) end
  return ok, first, ...
end
function pcall(...) return tidy(pcall_raw(...)) end
function xpcall(f, handler, ...)
  return tidy(xpcall_raw(f, function(err)
    if type(err) == "userdata" then
      local ok, plain = pcall_raw(text, err)
      if not ok then return plain end
      err = plain
    end
    return handler(err)
  end, ...))
end
function coroutine.resume(...) return tidy(resume_raw(...)) end
"#;

/// Instructions between two looks at whether the user wants to stop; a few milliseconds.
const INSTRUCTIONS: u32 = 100_000;

/// Where the random numbers of a script stand: a stream for `math.random`, one for random tensors. Replaced when the run's
/// seed is known.
pub struct RandomState {
    seed: u64,
    numbers: Stream,
    numbers_taken: AtomicU64,
    tensors: Stream,
    tensors_taken: AtomicU64,
}

impl RandomState {
    pub fn new(seed: u64) -> Self {
        let (numbers, tensors) = (Stream::new(seed, "lua math.random"), Stream::new(seed, "lua tensor"));
        Self { seed, numbers, numbers_taken: AtomicU64::new(0), tensors, tensors_taken: AtomicU64::new(0) }
    }

    fn bits(&self) -> u64 {
        self.numbers.bits(self.numbers_taken.fetch_add(1, Relaxed))
    }
}

/// The seed of the run.
pub fn seed(lua: &Lua) -> u64 {
    lua.app_data_ref::<RandomState>().expect("installed with the globals").seed
}

/// The script's stream of random tensors, and the first of `count` counters of it that nobody else gets.
pub fn take_counters(lua: &Lua, count: u64) -> (Stream, u64) {
    let state = lua.app_data_ref::<RandomState>().expect("installed with the globals");
    (state.tensors, state.tensors_taken.fetch_add(count, Relaxed))
}

/// Replaces what must be replaced in the globals of `lua`.
pub fn install(lua: &Lua) -> mlua::Result<()> {
    let globals = lua.globals();
    lua.set_app_data(RandomState::new(0));

    // Objects that a script raised itself, a tensor say, stay what they are.
    let text = lua.create_function(|lua, value: Value| match value {
        Value::Error(error) if is_interrupt(&error) => Err(*error),
        Value::Error(error) => lua.create_string(message(&error)).map(Value::String),
        other => Ok(other),
    })?;
    lua.load(PROTECTED_CALLS).set_name("=(perilune)").call::<()>(text)?;

    let math: Table = globals.get("math")?;
    math.set("random", lua.create_function(|lua, bounds: Variadic<Value>| random(lua, &bounds).map_err(|e| raise(lua, e.into())))?)?;
    math.set(
        "randomseed",
        lua.create_function(|lua, _: MultiValue| -> mlua::Result<()> {
            let what = "math.randomseed: the seed belongs to the run, so that a run can be repeated; start it with --seed N";
            Err(raise(lua, Failure::message(what)))
        })?,
    )?;

    // The screen may hold a bar: lines of the script go above it.
    globals.set(
        "print",
        lua.create_function(|lua, values: MultiValue| {
            let tostring: mlua::Function = lua.globals().raw_get("tostring")?;
            let words = values.iter().map(|value| tostring.call::<String>(value)).collect::<mlua::Result<Vec<_>>>()?;
            let line = words.join("\t");
            match lua.app_data_ref::<Screen>() {
                Some(screen) => screen.print(&line),
                None => println!("{line}"),
            }
            Ok(())
        })?,
    )?;

    lua.set_global_hook(mlua::HookTriggers::new().every_nth_instruction(INSTRUCTIONS), |lua, _| {
        if super::interrupt::is_pending() && !super::interrupt::in_loop() {
            return Err(raise(lua, Error::Interrupted.into()));
        }
        Ok(mlua::VmState::Continue)
    })?;
    strict(lua, &globals)
}

/// From here on, names must be declared.
fn strict(lua: &Lua, globals: &Table) -> mlua::Result<()> {
    let metatable = lua.create_table()?;
    metatable.set(
        "__newindex",
        lua.create_function(|lua, (_, key, _): (Table, Value, Value)| -> mlua::Result<()> {
            let name = key.to_string()?;
            let what =
                format!("`{name}` is not declared; write `local {name}` where it is first set (scripts have no globals of their own)");
            Err(raise(lua, Failure::message(what)))
        })?,
    )?;
    metatable.set(
        "__index",
        lua.create_function(|lua, (globals, key): (Table, Value)| -> mlua::Result<()> {
            let name = key.to_string()?;
            let known: Vec<String> = globals.pairs::<String, Value>().filter_map(|pair| pair.ok().map(|(name, _)| name)).collect();
            let mut known: Vec<&str> = known.iter().map(String::as_str).collect();
            known.sort_unstable();
            let hint = match name.as_str() {
                "engine" => "; begin the script with `local engine = require \"engine\"`".to_string(),
                _ => suggestion(&name, known),
            };
            Err(raise(lua, Failure::message(format!("`{name}` is not declared{hint}"))))
        })?,
    )?;
    globals.set_metatable(Some(metatable))
}

/// `math.random` as Lua's manual defines it: a float in [0, 1), or an integer in a closed range.
fn random(lua: &Lua, bounds: &[Value]) -> Result<Value, Error> {
    let state = lua.app_data_ref::<RandomState>().expect("installed with the globals");
    let integer = |value: &Value| {
        super::call::as_integer(value).ok_or_else(|| Error::argument("math.random", "bound", "an integer", describe(value)))
    };
    let (low, high) = match bounds {
        [] => return Ok(Value::Number((state.bits() >> 11) as f64 / (1u64 << 53) as f64)),
        [high] => (1, integer(high)?),
        [low, high] => (integer(low)?, integer(high)?),
        _ => return Err(Error::argument("math.random", "arguments", "at most two bounds", bounds.len())),
    };
    if low > high {
        return Err(Error::argument("math.random", "bounds", "the lower first", format!("{low} and {high}")));
    }
    // The width may be all 2^64 values, which the product below needs one more bit for.
    let width = u128::from(high.wrapping_sub(low) as u64) + 1;
    let offset = ((u128::from(state.bits()) * width) >> 64) as u64;
    Ok(Value::Integer(low.wrapping_add(offset as i64)))
}
