//! The global names of a script: Lua's own, with a few replaced so that a run repeats itself and mistakes are seen.
//! Assigning or reading an undeclared global is an error; `math.random` is a stream of the run; `pcall` hands out plain
//! strings and cannot swallow the user's Ctrl-C.

use super::call::describe;
use super::generations::Trial;
use super::nearest::suggestion;
use super::progress::Screen;
use super::raise::{Failure, is_stop, message, raise};
use super::replay::{self, Replay};
use crate::error::Error;
use crate::kernels::random::Stream;
use mlua::{Lua, MultiValue, Table, Value, Variadic};
use std::sync::{Arc, Mutex};

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

/// `pairs` in an order that is the same in every process: keys that are numbers, then strings, each sorted, then booleans,
/// then whatever else in Lua's own order. Lua's is another in each process, and a run must repeat itself. Fields may be changed
/// and removed on the way, as the manual allows; `next` is Lua's own.
pub(super) const SORTED_PAIRS: &str = r#"
local next, type, sort, getmetatable, error = next, type, table.sort, getmetatable, error
local rank = { number = 1, string = 2, boolean = 3 }
local function before(a, b)
  local kind_a, kind_b = type(a), type(b)
  if kind_a ~= kind_b then return rank[kind_a] < rank[kind_b] end
  if kind_a == "boolean" then return not a and b end
  return a < b
end
local function iterate(state)
  local keys, of = state.keys, state.of
  for index = state.index + 1, state.count do
    local key = index
    if keys then key = keys[index] end
    local value = of[key]
    if value ~= nil then
      state.index = index
      return key, value
    end
  end
end
function pairs(t)
  local meta = getmetatable(t)
  if type(meta) == "table" and meta.__pairs then
    local step, state, first = meta.__pairs(t)
    return step, state, first
  end
  if type(t) ~= "table" then error("bad argument #1 to 'pairs' (table expected, got " .. type(t) .. ")", 2) end
  local length = #t
  local keys, others, count, is_list = {}, {}, 0, true
  for key in next, t do
    local kind = type(key)
    if not rank[kind] then
      others[#others + 1] = key
    else
      count = count + 1
      keys[count] = key
      is_list = is_list and kind == "number" and key >= 1 and key <= length and key % 1 == 0
    end
  end
  if is_list and count == length and #others == 0 then return iterate, { of = t, index = 0, count = count } end
  sort(keys, before)
  for index = 1, #others do keys[count + index] = others[index] end
  return iterate, { keys = keys, of = t, index = 0, count = count + #others }
end
"#;

/// Instructions between two looks at whether the user wants to stop; a few milliseconds.
const INSTRUCTIONS: u32 = 100_000;

/// Where the random numbers of a script stand. A recorded step has streams of its own, so that what comes after it is the
/// same whether its function ran or its result was recorded.
pub struct RandomState {
    seed: u64,
    scopes: Mutex<Vec<Scope>>,
}

/// A stream for `math.random`, one for random tensors, and how many numbers of each are taken.
struct Scope {
    numbers: Stream,
    numbers_taken: u64,
    tensors: Stream,
    tensors_taken: u64,
}

/// Numbers taken in each scope, outermost first: of `math.random`, of random tensors.
pub type RandomPosition = Vec<(u64, u64)>;

impl Scope {
    fn new(seed: u64, label: &str) -> Self {
        let stream = |kind: &str| Stream::new(seed, &format!("lua {kind}{label}"));
        Self { numbers: stream("math.random"), numbers_taken: 0, tensors: stream("tensor"), tensors_taken: 0 }
    }
}

impl RandomState {
    pub fn new(seed: u64) -> Self {
        Self { seed, scopes: Mutex::new(vec![Scope::new(seed, "")]) }
    }

    fn innermost<T>(&self, use_it: impl FnOnce(&mut Scope) -> T) -> T {
        let mut scopes = self.scopes.lock().expect("no panic happens under this lock");
        use_it(scopes.last_mut().expect("the outermost scope stays"))
    }

    fn bits(&self) -> u64 {
        self.innermost(|scope| {
            scope.numbers_taken += 1;
            scope.numbers.bits(scope.numbers_taken - 1)
        })
    }
}

fn random_state(lua: &Lua) -> mlua::AppDataRef<'_, RandomState> {
    lua.app_data_ref::<RandomState>().expect("installed with the globals")
}

/// The seed of the run.
pub fn seed(lua: &Lua) -> u64 {
    random_state(lua).seed
}

/// The script's stream of random tensors, and the first of `count` counters of it that nobody else gets.
pub fn take_counters(lua: &Lua, count: u64) -> (Stream, u64) {
    random_state(lua).innermost(|scope| {
        scope.tensors_taken += count;
        (scope.tensors, scope.tensors_taken - count)
    })
}

/// Random numbers come from streams of the recorded step `key` until [`leave_scope`].
pub fn enter_scope(lua: &Lua, key: &str) {
    let state = random_state(lua);
    let scope = Scope::new(state.seed, &format!(" in {key}"));
    state.scopes.lock().expect("no panic happens under this lock").push(scope);
}

/// Ends what [`enter_scope`] began.
pub fn leave_scope(lua: &Lua) {
    let state = random_state(lua);
    let mut scopes = state.scopes.lock().expect("no panic happens under this lock");
    assert!(scopes.len() > 1, "a scope is left once for each time that one is entered");
    scopes.pop();
}

/// How far each scope's random numbers are taken.
pub fn random_position(lua: &Lua) -> RandomPosition {
    let state = random_state(lua);
    let scopes = state.scopes.lock().expect("no panic happens under this lock");
    scopes.iter().map(|scope| (scope.numbers_taken, scope.tensors_taken)).collect()
}

/// Goes to a position that [`random_position`] gave in the same scopes.
pub fn set_random_position(lua: &Lua, position: &RandomPosition) {
    let state = random_state(lua);
    let mut scopes = state.scopes.lock().expect("no panic happens under this lock");
    for (scope, (numbers, tensors)) in scopes.iter_mut().zip(position) {
        (scope.numbers_taken, scope.tensors_taken) = (*numbers, *tensors);
    }
}

/// Replaces what must be replaced in the globals of `lua`.
pub fn install(lua: &Lua) -> mlua::Result<()> {
    let globals = lua.globals();
    lua.set_app_data(RandomState::new(0));

    // Objects that a script raised itself, a tensor say, stay what they are.
    let text = lua.create_function(|lua, value: Value| match value {
        Value::Error(error) if is_stop(&error) => Err(*error),
        Value::Error(error) => lua.create_string(message(&error)).map(Value::String),
        other => Ok(other),
    })?;
    lua.load(PROTECTED_CALLS).set_name("=(perilune)").call::<()>(text)?;

    lua.load(SORTED_PAIRS).set_name("=(perilune)").exec()?;

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
            // A text may be cut within a character: what is not UTF-8 is shown as U+FFFD.
            let word = |value| Ok(tostring.call::<mlua::LuaString>(value)?.to_string_lossy());
            let words = values.iter().map(word).collect::<mlua::Result<Vec<_>>>()?;
            let line = words.join("\t");
            if lua.app_data_ref::<Arc<Trial>>().is_some_and(|trial| trial.hold(&line)) {
                return Ok(());
            }
            if let Some(replay) = Replay::of(lua).filter(|replay| replay.loop_depth() == 0) {
                replay.run.printed(&line);
            }
            match lua.app_data_ref::<Screen>() {
                Some(screen) => screen.print(&line),
                None => println!("{line}"),
            }
            Ok(())
        })?,
    )?;

    let time: Table = globals.get("os")?;
    let date: mlua::Function = time.get("date")?;
    let stored: mlua::Function = time.get("time")?;
    time.set(
        "time",
        lua.create_function(move |lua, of: Value| match of {
            Value::Nil => Ok(Value::Integer(replay::now(lua).map_err(|failure| raise(lua, failure))?.floor() as i64)),
            of => stored.call(of),
        })?,
    )?;
    time.set(
        "date",
        lua.create_function(move |lua, (format, of): (Value, Value)| -> mlua::Result<Value> {
            let of = match of {
                Value::Nil => Value::Integer(replay::now(lua).map_err(|failure| raise(lua, failure))?.floor() as i64),
                of => of,
            };
            date.call((if format.is_nil() { Value::String(lua.create_string("%c")?) } else { format }, of))
        })?,
    )?;

    lua.set_global_hook(mlua::HookTriggers::new().every_nth_instruction(INSTRUCTIONS), |lua, _| match replay::must_end(lua) {
        Some(error) => Err(raise(lua, error.into())),
        None => Ok(mlua::VmState::Continue),
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
                "debug" => "; scripts do without Lua's debug library".to_string(),
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
