//! `engine.workflow { name, args, run }`: a declaration, checked when the script is read, run by the program.

use super::args::{self, Spec};
use super::call::{Class, Failed, Field, Function};
use super::options::Options;
use super::raise::explain;
use super::replay::Replay;
use super::run::Run;
use super::run_object::RunObject;
use crate::error::{Error, Result};
use mlua::Lua;
use serde_json::Value as Json;
use std::sync::Arc;

/// What a script returns to be run.
pub struct Workflow {
    pub name: String,
    pub specs: Vec<Spec>,
    body: mlua::Function,
}

/// In the Lua state once a workflow was declared: a script that forgets to return it must not end in silence.
pub struct Declared;

/// `engine.workflow`.
pub const FUNCTIONS: &[Function] = &[Function {
    op: "engine.workflow",
    params: &["declaration"],
    call: |call| {
        let table = call.table(0)?;
        let workflow = declare(&Options::read(call.op, Some(table), &["name", "args", "run"])?)?;
        call.lua.set_app_data(Declared);
        call.give(workflow)
    },
}];

fn declare(options: &Options) -> Failed<Workflow> {
    let missing = |what: &str, expected: &str| Error::argument("engine.workflow", what, expected, "nil");
    let name = options.string("name")?.ok_or_else(|| missing("name", "a string"))?;
    super::run_object::check_name("engine.workflow", &name)?;
    let specs = args::read_specs(options.table("args")?)?;
    let body = options.function("run")?.ok_or_else(|| missing("run", "function(run, args) ... end"))?;
    Ok(Workflow { name, specs, body })
}

impl Workflow {
    /// Calls the workflow's function on this thread, as the only generation that the run will have, and records how it ended.
    ///
    /// Errors: those of the script, with their lines; [`Error::Interrupted`]; those of the last checkpoint.
    pub fn call(&self, lua: &Lua, run: &Arc<Run>, values: &[(String, Json)]) -> Result<()> {
        let replay = Replay::new(run.clone(), run.code().number, None);
        run.conclude(self.perform(lua, run, values, replay))
    }

    /// Calls the workflow's function, which repeats what the run has done as far as `replay` says.
    ///
    /// Errors: those of the script, with their lines; [`Error::Interrupted`]; [`Error::Superseded`].
    pub fn perform(&self, lua: &Lua, run: &Arc<Run>, values: &[(String, Json)], replay: Replay) -> Result<()> {
        lua.set_app_data(Arc::new(replay));
        let table = args::to_lua(lua, &self.specs, values).map_err(|error| explain(&error))?;
        self.body.call::<()>((RunObject(run.clone()), table)).map_err(|error| explain(&error))
    }

    /// What `--help` prints: the script's own description, then the arguments.
    pub fn help(&self, script: &str, source: &str) -> String {
        let mut text = format!("{}\n", self.name);
        for line in source.lines().skip_while(|line| line.starts_with('#')).map_while(|line| line.strip_prefix("---")) {
            text.push_str(&format!("{}\n", line.strip_prefix(' ').unwrap_or(line)));
        }
        text.push_str(&format!("\nUsage: perilune run {script} [--name value ...]\n"));
        if !self.specs.is_empty() {
            text.push_str(&format!("\nArguments\n{}", args::help(&self.specs)));
        }
        text.push_str("\nEvery run\n  --seed INTEGER  start of all random numbers (default 0)\n");
        text.push_str("  --quiet         no progress, only what the script prints\n");
        text.push_str("  --explain       say how the numbers of the progress are computed\n");
        text.push_str("  --runs FOLDER   where runs are kept (default checkpoints/runs)\n");
        text.push_str("  --tensorboard   write TensorBoard event files beside the metrics\n");
        text.push_str("  --watch         take over edits of the script while it runs\n");
        text
    }
}

impl Class for Workflow {
    const NAME: &'static str = "Workflow";
    const METHODS: &'static [&'static [Function]] = &[];
    const FIELDS: &'static [Field<Self>] = &[];
}

super::call::user_data!(Workflow);
