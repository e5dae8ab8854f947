//! `perilune run SCRIPT`: reads the script, gives its workflow the arguments of the command line, runs it.

use crate::error::{Error, Result};
use crate::host::progress::Screen;
use crate::host::run::{self, Start};
use crate::host::vm::Vm;
use crate::host::work::explanation;
use crate::host::workflow::Workflow;
use crate::host::{args, interrupt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Run a Lua script. `perilune run SCRIPT --help` lists the script's own arguments.
#[derive(clap::Args)]
pub struct Run {
    /// Start of all random numbers.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// No progress, only what the script prints.
    #[arg(long)]
    quiet: bool,
    /// Say how the numbers of the progress are computed.
    #[arg(long)]
    explain: bool,
    /// Where runs are kept.
    #[arg(long, value_name = "FOLDER", default_value = "checkpoints/runs")]
    runs: PathBuf,
    // One list, so that words behind the script are never taken for the program's own.
    /// The script, then its arguments: --name value.
    #[arg(value_name = "SCRIPT [--name value]", required = true, num_args = 1.., trailing_var_arg = true, allow_hyphen_values = true)]
    words: Vec<String>,
}

impl Run {
    pub fn run(mut self) -> Result<()> {
        let script = self.words.remove(0);
        if script.starts_with("--") {
            return Err(Error::Script(format!(
                "`perilune run` has no option {script}; it takes --seed, --quiet, --explain, --runs, then a script"
            )));
        }
        let help = self.take_own_words()?;
        interrupt::listen()?;
        let screen = Screen::new(self.quiet);
        let vm = Vm::new(Path::new(&script), screen.clone())?;
        vm.set_seed(self.seed);
        let Some(object) = vm.load()? else {
            return match self.words.first() {
                None => Ok(()),
                Some(word) => Err(Error::Script(format!("{script} returns no workflow, so it takes no arguments, got `{word}`"))),
            };
        };
        let workflow = object.borrow::<Workflow>().expect("load gives only workflows");
        if help {
            let text = vm.sources().into_iter().next().map_or_else(String::new, |source| source.text);
            print!("{}", workflow.help(&script, &text));
            return Ok(());
        }
        let values = args::parse(&workflow.specs, &self.words).map_err(|error| Error::Script(format!("{script}: {error}")))?;
        let sources = vm.sources();
        let start =
            Start { root: &self.runs, workflow: &workflow.name, seed: self.seed, args: &values, sources: &sources, screen: screen.clone() };
        if self.explain {
            screen.note(&explanation());
        }
        let run = Arc::new(run::Run::start(&start)?);
        screen.note(&format!("run {} in {}", run.id, run.folder.display()));
        workflow.call(vm.lua(), run, &values)
    }

    /// Takes the words that belong to every run out of the script's; whether help is asked for.
    fn take_own_words(&mut self) -> Result<bool> {
        let mut help = false;
        let mut rest = Vec::new();
        let mut words = std::mem::take(&mut self.words).into_iter();
        while let Some(word) = words.next() {
            let (name, given) = word.split_once('=').map_or((word.as_str(), None), |(name, value)| (name, Some(value.to_string())));
            let mut value = |what: &str| {
                given
                    .clone()
                    .or_else(|| words.next())
                    .ok_or_else(|| Error::Script(format!("{name} needs {what} (--help lists the arguments)")))
            };
            match name {
                "--help" | "-h" => help = true,
                "--explain" => self.explain = true,
                "--quiet" => self.quiet = true,
                "--runs" => self.runs = PathBuf::from(value("a folder")?),
                "--seed" => {
                    let text = value("an integer")?;
                    self.seed =
                        text.parse().map_err(|_| Error::Script(format!("--seed should be an integer of at least 0, got `{text}`")))?;
                }
                "--" => {}
                _ => rest.push(word),
            }
        }
        self.words = rest;
        Ok(help)
    }
}
