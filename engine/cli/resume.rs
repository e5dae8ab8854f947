//! `perilune resume RUN`: goes on with a run that was stopped, failed or killed, from its newest checkpoint, with its own code; or,
//! with `--code new`, with a fork of it that has the code of today.

use super::run::{perform, runs_folder};
use super::runs::fork::Making;
use crate::error::{Error, Result};
use crate::host::progress::Screen;
use crate::host::replay::Target;
use crate::host::run::{Facts, Run, is_alive};
use crate::host::run_object::shown;
use crate::host::vm::Vm;
use crate::host::work::explanation;
use crate::host::workflow::Workflow;
use crate::host::{args, interrupt};
use crate::kernels::cpu::isa::expect_many_rows;
use crate::store::records::{GenerationStatus, StepStatus};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Go on with a run: recorded steps are not done again, loops go on where the newest checkpoint was taken.
#[derive(clap::Args)]
pub struct Resume {
    /// Id of the run, the beginning of one, `latest`, or its folder.
    run: String,
    /// `recorded` for the run's own code; `new` for the files as they are now, in a fork of the run, after a plan of what it will
    /// do.
    #[arg(long, value_name = "WHICH", default_value = "recorded", value_parser = ["recorded", "new"])]
    code: String,
    #[command(flatten)]
    go_on: GoOn,
}

/// How a run is gone on with.
#[derive(clap::Args)]
pub struct GoOn {
    /// No progress, only what the script prints.
    #[arg(long)]
    pub quiet: bool,
    /// Say how the numbers of the progress are computed.
    #[arg(long)]
    explain: bool,
    /// Where runs are kept.
    #[arg(long, value_name = "FOLDER", default_value = "checkpoints/runs")]
    pub runs: PathBuf,
    /// Write TensorBoard event files beside the metrics.
    #[arg(long)]
    tensorboard: bool,
    /// Take over edits of the script and its modules while it runs.
    #[arg(long)]
    watch: bool,
}

impl Resume {
    pub fn run(self) -> Result<()> {
        let folder = runs_folder(&self.go_on.runs, &self.run)?;
        let screen = Screen::new(self.go_on.quiet);
        if self.code == "recorded" {
            return self.go_on.run(&folder, screen);
        }
        if is_alive(&folder) {
            let what = format!("{}: the run is alive: `perilune reload {}` lets it try the files as they are now", self.run, self.run);
            return Err(Error::Script(what));
        }
        let child = Making { folder: &folder, root: &self.go_on.runs, screen: &screen }.make(None, &[], &[], true, false)?;
        self.go_on.run(&child, screen)
    }
}

impl GoOn {
    /// Goes on with the run in `folder`.
    ///
    /// Errors: [`Error::Script`] if it is finished or alive; those of the run.
    pub fn run(self, folder: &Path, screen: Screen) -> Result<()> {
        expect_many_rows();
        interrupt::listen()?;
        let run = Run::open(folder, screen.clone())?;
        go_to_working_folder(&run.facts, &screen);
        let code = run.code().clone();
        let mut vm = Vm::with_recorded(Path::new(&run.facts.script), screen.clone(), code.sources)?;
        vm.set_seed(run.facts.seed);
        let Some(object) = vm.load_workflow()? else {
            return Err(Error::Script(format!("{}: the recorded script returns no workflow", run.facts.script)));
        };
        let workflow = object.borrow::<Workflow>().expect("load gives only workflows");
        let values = args::parse(&workflow.specs, run.facts.words_of(code.number))?;
        if self.explain {
            screen.note(&explanation());
        }
        let target = say_plan(&run, &screen);
        run.set_resumed()?;
        if self.tensorboard {
            run.write_tensorboard()?;
        }
        drop(workflow);
        perform(&Arc::new(run), vm, values, target, self.watch)
    }
}

/// Paths in a script are relative to where it was started.
pub fn go_to_working_folder(facts: &Facts, screen: &Screen) {
    let folder = Path::new(&facts.working_folder);
    if std::env::set_current_dir(folder).is_err() {
        screen.note(&format!("{} is gone, where the run was started: paths are relative to here now", folder.display()));
    }
}

/// Says what will be skipped and where the run goes on; gives that place.
fn say_plan(run: &Run, screen: &Screen) -> Option<Target> {
    screen.note(&format!("run {} in {}", run.facts.id, shown(&run.folder)));
    let steps = run.store.records().steps;
    let done = steps.iter().filter(|step| step.status == StepStatus::Done && !step.key.contains("#now")).count();
    if done > 0 {
        screen.note(&format!("  skip  {done} recorded steps: their results are taken from the record"));
    }
    for step in steps.iter().filter(|step| step.status != StepStatus::Done) {
        let why = step.error.as_ref().map_or_else(|| "it was not finished".into(), |error| format!("it failed: {error}"));
        screen.note(&format!("  run   step {}: {why}", step.key));
    }
    let leads = run.code().number;
    for record in run.store.generations() {
        if let (Some(path), true) = (&record.loop_path, record.status == GenerationStatus::Accepted && record.number > leads) {
            screen.note(&format!("  code  generation {} takes over at step {} of {path}, as it did", record.number, record.step));
        }
    }
    let Some(origin) = run.checkpoints.origin() else {
        screen.note("  run   everything else from the start: there is no checkpoint yet");
        return None;
    };
    for (path, record) in &origin.state.loops {
        if record.finished {
            screen.note(&format!("  skip  loop {path}: its {} steps are done", record.count));
        } else {
            screen.note(&format!("  run   loop {path} from step {}, with the checkpoint {}", record.count, origin.manifest.name));
        }
    }
    screen.note(&format!("  {}", origin.exactness()));
    Some(origin.target())
}
