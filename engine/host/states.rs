//! `run:state`: a table of plain data that belongs to the run. It is an ordinary Lua table; at a boundary its content is read
//! for the checkpoint, and after a resume or a reload it is filled again. Other locals are not kept.

use super::call::{Answer, Call, Failed};
use super::plain::Plain;
use super::run_object::{check_name, standing};
use mlua::{Lua, Table, Value};
use std::collections::BTreeMap;
use std::sync::Mutex;

/// Where a Lua state keeps its tables, in its registry.
const REGISTRY: &str = "perilune states";

/// Contents that wait for the script to ask for their names: a run has them after a resume or a reload.
#[derive(Default)]
pub struct Waiting(Mutex<BTreeMap<String, Plain>>);

impl Waiting {
    pub fn set(&self, contents: BTreeMap<String, Plain>) {
        *self.0.lock().expect("no panic happens under this lock") = contents;
    }

    fn take(&self, name: &str) -> Option<Plain> {
        self.0.lock().expect("no panic happens under this lock").remove(name)
    }

    /// Those that nobody has asked for yet: they stay in the run.
    pub fn rest(&self) -> BTreeMap<String, Plain> {
        self.0.lock().expect("no panic happens under this lock").clone()
    }
}

fn tables(lua: &Lua) -> mlua::Result<Table> {
    match lua.named_registry_value::<Option<Table>>(REGISTRY)? {
        Some(tables) => Ok(tables),
        None => {
            let tables = lua.create_table()?;
            lua.set_named_registry_value(REGISTRY, &tables)?;
            Ok(tables)
        }
    }
}

/// `run:state(name, initial)`: the table called `name`.
pub fn state(call: &Call) -> Answer {
    let (run, replay) = standing(call)?;
    let name = call.string(0)?;
    check_name(call.op, &name)?;
    let initial = call.table(1)?;
    Plain::of(call.op, "initial", &Value::Table(initial.clone()))?;
    let tables = tables(call.lua)?;
    if let Some(known) = tables.raw_get::<Option<Table>>(name.as_str())? {
        return call.give(known);
    }
    tables.raw_set(name.as_str(), &initial)?;
    if !replay.is_replaying()
        && let Some(content) = run.states.take(&name)
    {
        fill(call.lua, &initial, &content)?;
    }
    call.give(initial)
}

/// Fills the tables that the script has asked for so far with what waits for them.
pub fn fill_asked(lua: &Lua, waiting: &Waiting) -> Failed<()> {
    for pair in tables(lua)?.pairs::<String, Table>() {
        let (name, table) = pair?;
        if let Some(content) = waiting.take(&name) {
            fill(lua, &table, &content)?;
        }
    }
    Ok(())
}

/// Gives `table` the entries of `content`. Names that only the script's own initial table has keep their values, so that an
/// edited script can add some.
fn fill(lua: &Lua, table: &Table, content: &Plain) -> Failed<()> {
    let Value::Table(content) = content.to_lua(lua)? else { return Ok(()) };
    let is_name = |key: &Value| matches!(key, Value::String(_));
    let old: Vec<Value> = table.pairs::<Value, Value>().map(|pair| pair.map(|(key, _)| key)).collect::<mlua::Result<_>>()?;
    for key in old.into_iter().filter(|key| !is_name(key)) {
        table.raw_set(key, Value::Nil)?;
    }
    for pair in content.pairs::<Value, Value>() {
        let (key, value) = pair?;
        table.raw_set(key, value)?;
    }
    Ok(())
}

/// The contents as texts that are equal when they are; none where a table holds what cannot be kept.
pub fn fingerprints(lua: &Lua, waiting: &Waiting) -> Option<Vec<String>> {
    let contents = contents(lua, waiting).ok()?;
    Some(contents.iter().map(|(name, plain)| format!("{name} {}", plain.canonical())).collect())
}

/// The contents of all tables of `lua`, and of those that still wait.
///
/// Errors: those of [`Plain::of`].
pub fn contents(lua: &Lua, waiting: &Waiting) -> Failed<BTreeMap<String, Plain>> {
    let mut contents = waiting.rest();
    for pair in tables(lua)?.pairs::<String, Table>() {
        let (name, table) = pair?;
        let plain = Plain::of("Run:state", &format!("state \"{name}\""), &Value::Table(table))?;
        contents.insert(name, plain);
    }
    Ok(contents)
}
