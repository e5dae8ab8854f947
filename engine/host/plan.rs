//! What a script would do with what a run has recorded: which steps it would skip, which it would do, and why, up to the loop where
//! the run stands. The script is executed so far and no further; nothing of the run changes.

use super::args;
use super::generations::with_workflow;
use super::modules::Source;
use super::replay::{Replay, Target};
use super::run::Run;
use super::vm::Vm;
use crate::error::{Error, Result};
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex};

/// What was found out.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// A line for each step and loop, in the script's order.
    pub lines: Vec<String>,
    /// Keys of recorded steps that the script asks for as they are.
    pub kept: BTreeSet<String>,
    /// Whether it comes to the place where the run stands without doing anything new.
    pub arrives: bool,
}

/// Takes notes while a script shows what it would do.
#[derive(Default)]
pub struct Notes(Mutex<Plan>);

impl Notes {
    fn with(&self, note: impl FnOnce(&mut Plan)) {
        note(&mut self.0.lock().expect("no panic happens under this lock"));
    }

    /// A recorded step is asked for as it is; `edited` if its function is another now.
    pub fn skip(&self, key: &str, edited: bool) {
        self.with(|plan| {
            let why = if edited { "recorded; its function has changed, the result is kept" } else { "recorded" };
            plan.lines.push(format!("skip  step {key}: {why}"));
            plan.kept.insert(key.into());
        });
    }

    /// The script comes to what has to be done, and the notes end.
    pub fn run(&self, what: &str, why: &str, arrives: bool) -> Error {
        self.with(|plan| {
            plan.lines.push(format!("run   {what}: {why}"));
            plan.arrives = arrives;
        });
        Error::Superseded
    }
}

/// Executes the script in `sources` up to where `run` stands, or to the first thing that is new.
///
/// Errors: those of the script.
pub fn plan(run: &Arc<Run>, sources: Vec<Source>, target: Option<Target>) -> Result<Plan> {
    let mut vm = Vm::with_recorded(Path::new(&run.facts.script), run.screen.quiet(), sources)?;
    vm.set_seed(run.facts.seed);
    vm.load_workflow()?;
    let notes = Arc::new(Notes::default());
    let result = with_workflow(&vm, |workflow| {
        let values = args::parse(&workflow.specs, &run.facts.words)?;
        // Without a checkpoint the first loop is where everything begins: it, too, is come to and not entered.
        let target = target.unwrap_or(Target::Loop(String::new()));
        let replay = Replay::new(run.clone(), run.code().number, Some(target)).with_notes(notes.clone());
        workflow.perform(vm.lua(), run, &values, replay)
    });
    match result {
        Ok(()) | Err(Error::Superseded) => {}
        Err(error) => return Err(error),
    }
    let mut plan = notes.0.lock().expect("no panic happens under this lock").clone();
    for step in run.store.records().steps {
        if !plan.kept.contains(&step.key) && !step.key.contains(['[', '#']) {
            plan.lines.push(format!("leave step {}: the script does not ask for it before this", step.key));
        }
    }
    Ok(plan)
}
