//! `require`: the engine, the Lua that is shipped inside the binary (`std.*`), then the user's own files. Every file of the
//! user's that was loaded is remembered with its text, since the code of a run travels with the run.

use super::call::Failed;
use super::raise::{Failure, explain};
use super::replay::Replay;
use crate::error::Error;
use mlua::{Lua, Table, Value};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// A Lua file that is part of the binary: its path in `stdlib/`, and its text.
pub struct Embedded {
    pub path: &'static str,
    pub text: &'static str,
}

macro_rules! embedded {
    ($($path:literal),* $(,)?) => {
        &[$(Embedded { path: $path, text: include_str!(concat!("../../stdlib/", $path)) }),*]
    };
}

/// The modules behind `std.*`. A test compares this list with the folder.
pub const STDLIB: &[Embedded] = embedded![
    "answers.lua",
    "eval.lua",
    "json.lua",
    "losses.lua",
    "merging.lua",
    "options.lua",
    "policy_losses.lua",
    "preference_losses.lua",
    "report.lua",
    "rewards.lua",
    "schedules.lua",
    "schema.lua",
    "tales.lua",
    "tasks.lua"
];

/// The stubs of everything the engine exports, for editors.
pub const STUBS: &[Embedded] = embedded![
    "meta/data.lua",
    "meta/engine.lua",
    "meta/generation.lua",
    "meta/model.lua",
    "meta/run.lua",
    "meta/sandbox.lua",
    "meta/tensor.lua"
];

/// A file of the user's that took part in a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Source {
    /// As messages name it: relative to where the user started, as the user spelled it.
    pub path: String,
    pub text: String,
}

/// Where modules are looked for, and what was loaded.
pub struct Modules {
    /// Folder of the entry script.
    folder: PathBuf,
    /// What a run has recorded: these files are taken from here, not from the disk.
    recorded: Vec<Source>,
    sources: Mutex<Vec<Source>>,
}

impl Modules {
    /// For the script at `path`. Files in `recorded` are read from there.
    pub fn beside(path: &Path, recorded: Vec<Source>) -> Self {
        Self { folder: path.parent().unwrap_or(Path::new("")).to_path_buf(), recorded, sources: Mutex::new(Vec::new()) }
    }

    fn recorded(&self, path: &Path) -> Option<String> {
        self.recorded.iter().find(|source| Path::new(&source.path) == path).map(|source| source.text.clone())
    }

    /// Files loaded so far, the entry script first.
    pub fn sources(&self) -> Vec<Source> {
        self.sources.lock().expect("no panic happens under this lock").clone()
    }
}

/// Reads the Lua file at `path` and compiles it under its own name. A first line that begins with `#` is skipped.
///
/// Errors: [`Error::Io`]; [`Error::Script`] with file and line if it does not compile.
pub fn load_file(lua: &Lua, path: &Path) -> Result<mlua::Function, Error> {
    let recorded = lua.app_data_ref::<Modules>().and_then(|modules| modules.recorded(path));
    let text = match recorded {
        Some(text) => text,
        None => {
            let bytes = std::fs::read(path).map_err(|source| Error::io(path, "read", source))?;
            String::from_utf8(bytes).map_err(|_| Error::format(path, "script", "UTF-8 text", "other bytes"))?
        }
    };
    if text.starts_with('\u{1b}') {
        return Err(Error::format(path, "script", "the text of a Lua script", "compiled Lua"));
    }
    if text.trim().is_empty() {
        return Err(Error::format(path, "script", "Lua that does something", "an empty file"));
    }
    let name = path.display().to_string();
    // The line itself goes, its end stays: line numbers must not move.
    let code = if text.starts_with('#') { &text[text.find('\n').unwrap_or(text.len())..] } else { &text };
    let chunk = lua.load(code).set_name(format!("@{name}")).set_mode(mlua::chunk::ChunkMode::Text);
    let function = chunk.into_function().map_err(|error| explain(&error))?;
    let sources = lua.app_data_ref::<Modules>().map(|modules| {
        let mut sources = modules.sources.lock().expect("no panic happens under this lock");
        sources.push(Source { path: name, text });
        sources.clone()
    });
    // A module that the workflow asks for while it runs belongs to the code of the run as well.
    if let (Some(sources), Some(replay)) = (sources, Replay::of(lua)) {
        replay.run.code_loaded(replay.generation, sources)?;
    }
    Ok(function)
}

/// Replaces `require`. `engine` is the table behind `require "engine"`.
pub fn install(lua: &Lua, engine: &Table) -> mlua::Result<()> {
    let loaded: Table = lua.globals().get::<Table>("package")?.get("loaded")?;
    loaded.set("engine", engine)?;
    let require = lua.create_function(move |lua, name: Value| -> mlua::Result<Value> {
        require(lua, &loaded, &name).map_err(|failure| super::raise::raise(lua, failure))
    })?;
    lua.globals().set("require", require)
}

fn require(lua: &Lua, loaded: &Table, name: &Value) -> Failed<Value> {
    let Value::String(name) = name else {
        return Err(
            Error::argument("require", "module", "the name of a module, such as \"std.losses\"", super::call::describe(name)).into()
        );
    };
    let name = name.to_string_lossy();
    match loaded.raw_get::<Value>(name.as_str())? {
        Value::Nil => {}
        Value::LightUserData(_) => return Err(Failure::message(format!("module \"{name}\" requires itself, directly or through others"))),
        value => return Ok(value),
    }
    let chunk = match name.strip_prefix("std.") {
        Some(standard) => standard_module(lua, standard)?,
        None => {
            let candidates = candidates(lua, &name);
            let is_recorded = |path: &Path| lua.app_data_ref::<Modules>().is_some_and(|modules| modules.recorded(path).is_some());
            let found = candidates.iter().find(|path| is_recorded(path)).or_else(|| candidates.iter().find(|path| path.is_file()));
            let Some(path) = found else {
                let tried: Vec<String> = candidates.iter().map(|path| path.display().to_string()).collect();
                return Err(Failure::message(format!("no module \"{name}\"; looked for {}", tried.join(", "))));
            };
            load_file(lua, path)?
        }
    };
    // A mark while it loads, so that a circle of modules is found.
    loaded.raw_set(name.as_str(), Value::NULL)?;
    let value = match chunk.call::<Value>(name.as_str()) {
        Ok(value) => value,
        Err(error) => {
            loaded.raw_set(name.as_str(), Value::Nil)?;
            return Err(error.into());
        }
    };
    if value.is_nil() {
        loaded.raw_set(name.as_str(), Value::Nil)?;
        return Err(Failure::message(format!("module \"{name}\" returns nothing; end it with `return` and its table")));
    }
    loaded.raw_set(name.as_str(), &value)?;
    Ok(value)
}

fn standard_module(lua: &Lua, name: &str) -> Failed<mlua::Function> {
    let file = format!("{name}.lua");
    match STDLIB.iter().find(|module| module.path == file) {
        // Round brackets in the name keep its frames out of what users see as their own.
        Some(module) => Ok(lua.load(module.text).set_name(format!("=(std.{name})")).into_function()?),
        None => {
            let known: Vec<&str> = STDLIB.iter().map(|module| module.path.trim_end_matches(".lua")).collect();
            let list: Vec<String> = known.iter().map(|name| format!("std.{name}")).collect();
            let hint = super::nearest::suggestion(name, known);
            Err(Failure::message(format!("no module \"std.{name}\"; there are {}{hint}", list.join(", "))))
        }
    }
}

/// Files that `name` may mean, in order: beside the script, then under the working folder.
fn candidates(lua: &Lua, name: &str) -> Vec<PathBuf> {
    let relative = name.replace('.', "/");
    let folder = lua.app_data_ref::<Modules>().map_or_else(PathBuf::new, |modules| modules.folder.clone());
    let mut paths = Vec::new();
    for folder in [folder, PathBuf::new()] {
        for file in [format!("{relative}.lua"), format!("{relative}/init.lua")] {
            let path = folder.join(file);
            if !paths.contains(&path) {
                paths.push(path);
            }
        }
    }
    paths
}
