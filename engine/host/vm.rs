//! The Lua state of a script: Lua 5.4 with its standard libraries, `require "engine"`, and the replaced globals. A Rust
//! panic passes through it as a panic; scripts cannot catch one.

use super::call::{Class, Function, add_functions};
use super::memory::Watermark;
use super::modules::{self, Modules, Source};
use super::nearest::suggestion;
use super::progress::Screen;
use super::raise::{Failure, explain, raise};
use super::rollouts::Rollouts;
use super::work::Work;
use super::workflow::{Declared, Workflow};
use super::{
    args, conversations, data, globals, loops, model, optim, run_object, sandbox, steps, tensor, tensor_operations, tokenizer, workflow,
};
use crate::error::{Error, Result};
use mlua::{AnyUserData, Lua, LuaOptions, StdLib, Table, Value};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The functions of `engine` itself.
pub const TOP: &[&[Function]] = &[workflow::FUNCTIONS, args::FUNCTIONS];

/// The tables in `engine`, each a mirror of a folder of the engine.
pub const NAMESPACES: &[(&str, &[&[Function]])] = &[
    ("data", &[data::FUNCTIONS, conversations::FUNCTIONS]),
    ("model", &[model::FUNCTIONS]),
    ("optim", &[optim::FUNCTIONS]),
    ("sandbox", &[sandbox::FUNCTIONS]),
    ("tensor", &[tensor::FUNCTIONS, tensor_operations::FUNCTIONS]),
    ("tokenizer", &[tokenizer::FUNCTIONS]),
];

/// A class of objects that scripts hold, for the test that compares it with its stub.
pub struct ClassListing {
    pub name: &'static str,
    pub methods: &'static [&'static [Function]],
    pub fields: Vec<&'static str>,
}

/// All classes of objects.
pub fn classes() -> Vec<ClassListing> {
    fn listing<T: Class>() -> ClassListing {
        ClassListing { name: T::NAME, methods: T::METHODS, fields: T::FIELDS.iter().map(|field| field.name).collect() }
    }
    vec![
        listing::<args::Declaration>(),
        listing::<data::BatchObject>(),
        listing::<data::DataObject>(),
        listing::<loops::Step>(),
        listing::<model::ModelObject>(),
        listing::<optim::OptimizerObject>(),
        listing::<Rollouts>(),
        listing::<run_object::RunObject>(),
        listing::<steps::StepContext>(),
        listing::<tensor::TensorObject>(),
        listing::<tokenizer::TokenizerObject>(),
        listing::<Workflow>(),
    ]
}

/// One script's Lua state.
pub struct Vm {
    lua: Lua,
    script: PathBuf,
    workflow: Option<AnyUserData>,
}

impl Vm {
    /// A fresh state for the script at `script`, which is not read yet.
    ///
    /// Errors: [`Error::Script`] if Lua cannot be set up, which takes a lack of memory.
    pub fn new(script: &Path, screen: Screen) -> Result<Self> {
        Self::with_recorded(script, screen, Vec::new())
    }

    /// As [`Self::new`]; files in `recorded` are taken from there, not from the disk.
    ///
    /// Errors: as [`Self::new`].
    pub fn with_recorded(script: &Path, screen: Screen, recorded: Vec<Source>) -> Result<Self> {
        let vm = Self { lua: new_state().map_err(|error| explain(&error))?, script: script.to_path_buf(), workflow: None };
        vm.lua.set_app_data(Modules::beside(script, recorded));
        vm.lua.set_app_data(screen);
        Ok(vm)
    }

    /// Runs the script's main part.
    ///
    /// Returns the workflow that it returns, or none for a plain script, which has then done all it does.
    ///
    /// Errors: [`Error::Io`] if it cannot be read; [`Error::Script`] with file and line for everything else.
    pub fn load(&self) -> Result<Option<AnyUserData>> {
        let main = modules::load_file(&self.lua, &self.script)?;
        let value = main.call::<Value>(()).map_err(|error| explain(&error))?;
        match value {
            Value::Nil if self.lua.app_data_ref::<Declared>().is_some() => {
                let text = "engine.workflow was called, and what it gave is not returned; write `return engine.workflow { ... }`";
                Err(Error::Script(format!("{}: {text}", self.script.display())))
            }
            Value::Nil => Ok(None),
            Value::UserData(object) if object.is::<Workflow>() => Ok(Some(object)),
            other => {
                let got = super::call::describe(&other);
                let text = format!("{}: a script returns engine.workflow {{ ... }} or nothing, got {got}", self.script.display());
                Err(Error::Script(text))
            }
        }
    }

    /// As [`Self::load`], and keeps the workflow for [`Self::workflow`].
    ///
    /// Errors: as [`Self::load`].
    pub fn load_workflow(&mut self) -> Result<Option<AnyUserData>> {
        self.workflow = self.load()?;
        Ok(self.workflow.clone())
    }

    /// What [`Self::load_workflow`] found.
    pub fn workflow(&self) -> Option<&AnyUserData> {
        self.workflow.as_ref()
    }

    /// The path of the script, as it was given.
    pub fn script(&self) -> &Path {
        &self.script
    }

    pub fn lua(&self) -> &Lua {
        &self.lua
    }

    /// The files of the user's that were loaded so far, the script first.
    pub fn sources(&self) -> Vec<Source> {
        self.lua.app_data_ref::<Modules>().map_or_else(Vec::new, |modules| modules.sources())
    }

    /// Starts all random numbers of the script from `seed`.
    pub fn set_seed(&self, seed: u64) {
        self.lua.set_app_data(globals::RandomState::new(seed));
    }
}

fn new_state() -> mlua::Result<Lua> {
    // Without catch_rust_panics, pcall lets a panic of ours pass instead of handing it to the script as an error.
    let lua = Lua::new_with(StdLib::ALL_SAFE, LuaOptions::new().catch_rust_panics(false))?;
    lua.set_app_data(Watermark::new());
    lua.set_app_data(Arc::new(Work::default()));
    let engine = engine_table(&lua)?;
    modules::install(&lua, &engine)?;
    globals::install(&lua)?;
    Ok(lua)
}

fn engine_table(lua: &Lua) -> mlua::Result<Table> {
    let engine = lua.create_table()?;
    add_functions(lua, &engine, TOP)?;
    for (name, functions) in NAMESPACES {
        let namespace = lua.create_table()?;
        add_functions(lua, &namespace, functions)?;
        seal(lua, &namespace, &format!("engine.{name}"))?;
        engine.raw_set(*name, namespace)?;
    }
    seal(lua, &engine, "engine")?;
    Ok(engine)
}

/// Makes names that a table of the engine does not have an error, and its own unchangeable by mistake.
fn seal(lua: &Lua, table: &Table, path: &str) -> mlua::Result<()> {
    let (read, write) = (path.to_string(), path.to_string());
    let metatable = lua.create_table()?;
    metatable.raw_set(
        "__index",
        lua.create_function(move |lua, (table, key): (Table, Value)| -> mlua::Result<()> {
            let name = key.to_string()?;
            let known: Vec<String> = table.pairs::<String, Value>().filter_map(|pair| pair.ok().map(|(name, _)| name)).collect();
            let mut known: Vec<&str> = known.iter().map(String::as_str).collect();
            known.sort_unstable();
            let hint = suggestion(&name, known.iter().copied());
            let list = if hint.is_empty() { format!("; it has {}", known.join(", ")) } else { hint };
            Err(raise(lua, Failure::message(format!("there is no {read}.{name}{list}"))))
        })?,
    )?;
    metatable.raw_set(
        "__newindex",
        lua.create_function(move |lua, (_, key, _): (Table, Value, Value)| -> mlua::Result<()> {
            Err(raise(lua, Failure::message(format!("{write} belongs to the engine; {} cannot be added to it", key.to_string()?))))
        })?,
    )?;
    table.set_metatable(Some(metatable))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm() -> Vm {
        Vm::new(Path::new("test.lua"), Screen::new(true)).unwrap()
    }

    fn run(code: &str) -> Result<String> {
        let vm = vm();
        let value: Value = vm.lua.load(code).set_name("@test.lua").eval().map_err(|error| explain(&error))?;
        Ok(value.to_string().unwrap())
    }

    #[test]
    fn pcall_hands_out_strings_and_lets_panics_pass() {
        let message = run("local ok, err = pcall(require, 'std.loses') return err").unwrap();
        assert!(message.starts_with("test.lua:1: no module \"std.loses\"; there are std.answers, std.eval, "), "{message}");
        assert!(message.ends_with("; did you mean `losses`?"), "{message}");
        assert_eq!(run("local ok, err = pcall(error, { 7 }) return err[1]").unwrap(), "7");
        assert_eq!(run("return select(2, pcall(function() error('x') end))").unwrap(), "test.lua:1: x");
        assert_eq!(run("return select(2, xpcall(function() math.randomseed(1) end, function(e) return type(e) end))").unwrap(), "string");
        let vm = vm();
        let panics = vm.lua.create_function(|_, ()| -> mlua::Result<()> { panic!("planned") }).unwrap();
        vm.lua.globals().raw_set("panics", panics).unwrap();
        for code in ["pcall(panics)", "xpcall(panics, print)", "coroutine.resume(coroutine.create(panics))"] {
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| vm.lua.load(code).exec()));
            assert!(result.is_err(), "{code}");
        }
    }

    #[test]
    fn an_interrupt_is_not_caught_by_scripts() {
        let vm = vm();
        let stop = vm.lua.create_function(|lua, ()| -> mlua::Result<()> { Err(raise(lua, Error::Interrupted.into())) }).unwrap();
        vm.lua.globals().raw_set("stop", stop).unwrap();
        for code in ["pcall(stop)", "xpcall(stop, print)", "pcall(pcall, stop)", "coroutine.resume(coroutine.create(stop))"] {
            let error = vm.lua.load(code).exec().unwrap_err();
            assert!(matches!(explain(&error), Error::Interrupted), "{code}");
        }
    }

    #[test]
    fn random_numbers_come_from_the_seed() {
        let numbers = |seed| {
            let vm = vm();
            vm.set_seed(seed);
            vm.lua.load("return math.random(1, 1000000), math.random(6), math.random()").eval::<(i64, i64, f64)>().unwrap()
        };
        assert_eq!(numbers(3), numbers(3));
        assert_ne!(numbers(3), numbers(4));
        let (_, die, fraction) = numbers(3);
        assert!((1..=6).contains(&die) && (0.0..1.0).contains(&fraction));
        assert_eq!(run("return math.random(math.mininteger, math.maxinteger) ~= nil").unwrap(), "true");
    }
}
