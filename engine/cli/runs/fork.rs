//! `perilune runs fork` and `perilune resume --code new`: a new run that begins where another stood, with other arguments or code.

use crate::cli::output::print;
use crate::cli::resume::{GoOn, go_to_working_folder};
use crate::cli::run::runs_folder;
use crate::error::{Error, Result};
use crate::host::fork::{Change, Parent, Start, replaced_words};
use crate::host::inspect::{Inspection, Look, inspect};
use crate::host::modules::Source;
use crate::host::plan::plan;
use crate::host::progress::Screen;
use crate::host::reload::files_now;
use crate::host::run::Run;
use crate::host::vm::Vm;
use crate::host::workflow::Workflow;
use crate::host::{args, code};
use crate::store::records::GenerationStatus;
use serde_json::{Map, Value as Json};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Start a new run from a checkpoint of another, with what that one had recorded by then.
///
/// With nothing changed it equals the other to the bit, edits and settings that came later included.
#[derive(clap::Args)]
pub struct Fork {
    /// Id of the run, the beginning of one, `latest`, or its folder.
    run: String,
    /// Which checkpoint, such as train=500; 0 for the beginning. The newest if not given.
    #[arg(long, value_name = "LOOP=STEP")]
    at: Option<String>,
    /// Another value for an argument of the script.
    #[arg(long = "arg", value_name = "NAME=VALUE")]
    args: Vec<String>,
    /// Leave out an argument that the run was started with and that the new code does not have.
    #[arg(long = "drop-arg", value_name = "NAME")]
    drop_args: Vec<String>,
    /// `recorded` for the run's code, `new` for the files as they are now, from the checkpoint on.
    #[arg(long, value_name = "WHICH", default_value = "recorded", value_parser = ["recorded", "new"])]
    code: String,
    /// Leave out edits and settings that the other run met after the checkpoint.
    #[arg(long)]
    drop_later: bool,
    /// Only make the run; `perilune resume` starts it.
    #[arg(long)]
    no_start: bool,
    #[command(flatten)]
    go_on: GoOn,
}

impl Fork {
    pub fn run(self) -> Result<()> {
        let folder = runs_folder(&self.go_on.runs, &self.run)?;
        let screen = Screen::new(self.go_on.quiet);
        let child = Making { folder: &folder, root: &self.go_on.runs, screen: &screen }.make(
            self.at.as_deref(),
            &self.args,
            &self.drop_args,
            self.code == "new",
            !self.drop_later,
        )?;
        if self.no_start {
            return print(&format!("{}\n", child.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())));
        }
        self.go_on.run(&child, screen)
    }
}

/// A child run in the making.
pub struct Making<'a> {
    /// Of the parent.
    pub folder: &'a Path,
    /// Where runs are kept.
    pub root: &'a Path,
    pub screen: &'a Screen,
}

impl Making<'_> {
    /// Makes the child and says what it will do; gives its folder.
    ///
    /// - `at`: `LOOP=STEP`; the newest checkpoint if none
    /// - `changes`: `NAME=VALUE` of arguments
    /// - `dropped`: names of arguments that are left out
    /// - `new_code`: the files as they are now, in place of the recorded ones
    /// - `later`: what the parent met later comes again
    ///
    /// Errors: what cannot be meant; what the script says on its way; those of writing.
    pub fn make(&self, at: Option<&str>, changes: &[String], dropped: &[String], new_code: bool, later: bool) -> Result<PathBuf> {
        let root = std::path::absolute(self.root).map_err(|error| Error::io(self.root, "find", error))?;
        let folder = self.folder.canonicalize().map_err(|error| Error::io(self.folder, "find", error))?;
        let Inspection { facts, records, reason, .. } = inspect(&folder, Look::Whole);
        let Some(facts) = facts else {
            return Err(Error::Script(format!("{}: {}", folder.display(), reason.unwrap_or_default())));
        };
        let parent = Parent { folder: &folder, facts: &facts, records: &records };
        let mut start = match at {
            Some(at) => parent.place(at)?,
            None => parent.newest()?,
        };
        go_to_working_folder(&facts, self.screen);
        let number = match &start {
            Start::Checkpoint(manifest) => manifest.generation,
            Start::Anew(_) => 0,
        };
        let leading = code::load(&folder, number)?;
        let code = if new_code {
            let accepted = records.generations.iter().rfind(|record| record.status == GenerationStatus::Accepted);
            Some(files_now(&code::load(&folder, accepted.map_or(0, |record| record.number))?)?)
        } else {
            None
        };
        let words = replaced_words(&facts.words, changes, dropped)?;
        let args = match &code {
            None if changes.is_empty() && dropped.is_empty() => facts.args.clone(),
            None => self.arguments(&facts.script, &leading, &words)?,
            Some(code) => self.arguments(&facts.script, code, &words).map_err(|error| {
                let remedy =
                    "what the run was started with can be changed, `perilune runs fork --code new --drop-arg NAME --arg NAME=VALUE`";
                Error::Script(format!("{error}\n{remedy}"))
            })?,
        };
        let make = |start: &Start| {
            let later = later && code.is_none();
            parent.fork(&root, start, Change { words: words.clone(), args: args.clone(), later, code: code.clone() })
        };
        let mut child = make(&start)?;
        if let Some(sources) = &code {
            let run = Arc::new(Run::open(&child, self.screen.quiet())?);
            let target = run.checkpoints.origin().map(|origin| origin.target());
            let plan = plan(&run, sources.clone(), target);
            drop(run);
            let plan = plan.inspect_err(|_| drop(std::fs::remove_dir_all(&child)))?;
            plan.lines.iter().for_each(|line| self.screen.note(&format!("  {line}")));
            if !plan.arrives && matches!(start, Start::Checkpoint(_)) {
                self.screen.note("  the checkpoint is behind what is new: everything from there on is done again");
                std::fs::remove_dir_all(&child).map_err(|error| Error::io(&child, "remove", error))?;
                start = Start::Anew(plan.kept);
                child = make(&start)?;
            }
        }
        let id = child.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        self.screen.note(&format!("run {id} is a fork of {}", facts.id));
        Ok(child)
    }

    /// What the script in `sources` makes of the words of its command line.
    fn arguments(&self, script: &str, sources: &[Source], words: &[String]) -> Result<Map<String, Json>> {
        let mut vm = Vm::with_recorded(Path::new(script), self.screen.quiet(), sources.to_vec())?;
        let object = vm.load_workflow()?.ok_or_else(|| Error::Script(format!("{script}: the script returns no workflow")))?;
        let workflow = object.borrow::<Workflow>().expect("load gives only workflows");
        let values = args::parse(&workflow.specs, words).map_err(|error| Error::Script(format!("{script}: {error}")))?;
        Ok(values.into_iter().collect())
    }
}
