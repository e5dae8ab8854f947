//! `perilune run SCRIPT`: reads the script, gives its workflow the arguments of the command line, runs it.

use super::output::print;
use crate::error::{Error, Result};
use crate::host::generations::conduct;
use crate::host::progress::Screen;
use crate::host::replay::Target;
use crate::host::run::{self, Facts, Start};
use crate::host::run_object::shown;
use crate::host::vm::Vm;
use crate::host::work::explanation;
use crate::host::workflow::Workflow;
use crate::host::{args, control, interrupt, reload};
use crate::kernels::cpu::isa::expect_many_rows;
use serde_json::Value as Json;
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
    /// Write TensorBoard event files beside the metrics.
    #[arg(long)]
    tensorboard: bool,
    /// Take over edits of the script and its modules while it runs.
    #[arg(long)]
    watch: bool,
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
                "`perilune run` has no option {script}; it takes --seed, --quiet, --explain, --runs, --tensorboard, --watch, then a script"
            )));
        }
        let help = self.take_own_words()?;
        expect_many_rows();
        interrupt::listen()?;
        let screen = Screen::new(self.quiet);
        let mut vm = Vm::new(Path::new(&script), screen.clone())?;
        vm.set_seed(self.seed);
        let Some(object) = vm.load_workflow()? else {
            return match self.words.first() {
                None => Ok(()),
                Some(word) => Err(Error::Script(format!("{script} returns no workflow, so it takes no arguments, got `{word}`"))),
            };
        };
        let workflow = object.borrow::<Workflow>().expect("load gives only workflows");
        if help {
            let text = vm.sources().into_iter().next().map_or_else(String::new, |source| source.text);
            return print(&workflow.help(&script, &text));
        }
        let values = args::parse(&workflow.specs, &self.words).map_err(|error| Error::Script(format!("{script}: {error}")))?;
        let sources = vm.sources();
        let facts = Facts::new(&workflow.name, &script, &self.words, &values, self.seed);
        if self.explain {
            screen.note(&explanation());
        }
        let run = Arc::new(run::Run::start(Start { root: &self.runs, facts, sources: &sources, screen: screen.clone() })?);
        if self.tensorboard {
            run.write_tensorboard()?;
        }
        screen.note(&format!("run {} in {}", run.facts.id, shown(&run.folder)));
        drop(workflow);
        perform(&run, vm, values, None, self.watch)
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
            if let (Some(given), "--help" | "-h" | "--explain" | "--quiet" | "--tensorboard" | "--watch") = (&given, name) {
                return Err(Error::Script(format!("{name} takes no value, got `{given}` (--help lists the arguments)")));
            }
            match name {
                "--help" | "-h" => help = true,
                "--explain" => self.explain = true,
                "--quiet" => self.quiet = true,
                "--tensorboard" => self.tensorboard = true,
                "--watch" => self.watch = true,
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

/// Runs the workflow of `vm`, with the run's socket open and, if asked, its files watched.
///
/// Errors: as [`conduct`].
pub fn perform(run: &Arc<run::Run>, vm: Vm, values: Vec<(String, Json)>, target: Option<Target>, watch: bool) -> Result<()> {
    let _listener = control::listen(run);
    if watch {
        reload::watch(run)?;
        run.screen.note("edits of the script take effect at the end of a step");
    }
    let result = conduct(run, vm, values, target);
    let word = run::word_for(&run.folder);
    match &result {
        Ok(()) => {}
        Err(Error::Interrupted) => run.screen.note(&format!("stopped; go on with: perilune resume {word}")),
        Err(_) => run.screen.note(&format!("when that is mended: perilune resume {word}, with --code new if the script was changed")),
    }
    result
}

/// The folder of the run that a user means: an id, the beginning of one, `latest`, or a folder.
///
/// Errors: [`Error::Script`] if there is none, or more than one.
pub fn runs_folder(root: &Path, name: &str) -> Result<PathBuf> {
    let as_path = Path::new(name);
    if as_path.join("run.json").is_file() {
        return Ok(as_path.to_path_buf());
    }
    let entries = std::fs::read_dir(root).into_iter().flatten().flatten();
    let mut ids: Vec<String> = entries
        .filter(|entry| entry.path().join("run.json").is_file())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    ids.sort();
    let wanted = name.to_uppercase();
    let found: Vec<&String> = match name {
        "latest" => ids.last().into_iter().collect(),
        _ => ids.iter().filter(|id| id.starts_with(&wanted)).collect(),
    };
    match found[..] {
        [id] => Ok(root.join(id)),
        [] => Err(Error::Script(format!("no run `{name}` in {} ({} runs)", root.display(), ids.len()))),
        _ => Err(Error::Script(format!("`{name}` begins the ids of {} runs in {}; give more of it", found.len(), root.display()))),
    }
}
