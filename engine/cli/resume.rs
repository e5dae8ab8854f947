//! `perilune resume RUN`: goes on with a run that was stopped, failed or killed, from its newest checkpoint, with its own code.

use super::run::runs_folder;
use crate::error::{Error, Result};
use crate::host::progress::Screen;
use crate::host::replay::Target;
use crate::host::run::Run;
use crate::host::run_object::shown;
use crate::host::vm::Vm;
use crate::host::work::explanation;
use crate::host::workflow::Workflow;
use crate::host::{args, interrupt};
use crate::store::records::StepStatus;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Go on with a run: recorded steps are not done again, loops go on where the newest checkpoint was taken.
#[derive(clap::Args)]
pub struct Resume {
    /// Id of the run, the beginning of one, `latest`, or its folder.
    run: String,
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
}

impl Resume {
    pub fn run(self) -> Result<()> {
        let folder = runs_folder(&self.runs, &self.run)?;
        interrupt::listen()?;
        let screen = Screen::new(self.quiet);
        let run = Run::open(&folder, screen.clone())?;
        go_to_working_folder(&run, &screen);
        let code = run.code().clone();
        let vm = Vm::with_recorded(Path::new(&run.facts.script), screen.clone(), code.sources)?;
        vm.set_seed(run.facts.seed);
        let Some(object) = vm.load()? else {
            return Err(Error::Script(format!("{}: the recorded script returns no workflow", run.facts.script)));
        };
        let workflow = object.borrow::<Workflow>().expect("load gives only workflows");
        let values = args::parse(&workflow.specs, &run.facts.words)?;
        if self.explain {
            screen.note(&explanation());
        }
        if self.tensorboard {
            run.write_tensorboard()?;
        }
        let target = say_plan(&run, &screen);
        run.set_resumed()?;
        workflow.call(vm.lua(), &Arc::new(run), &values, target)
    }
}

/// Paths in a script are relative to where it was started.
fn go_to_working_folder(run: &Run, screen: &Screen) {
    let folder = Path::new(&run.facts.working_folder);
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
    // Iterations are done again as a whole, so steps in them are no news.
    for step in steps.iter().filter(|step| step.status != StepStatus::Done && !step.key.contains('[')) {
        let why = step.error.as_ref().map_or_else(|| "it was not finished".into(), |error| format!("it failed: {error}"));
        screen.note(&format!("  run   step {}: {why}", step.key));
    }
    let Some(origin) = run.checkpoints.origin() else {
        screen.note("  run   everything else from the start: there is no checkpoint yet");
        return None;
    };
    for (path, record) in &origin.state.loops {
        if let Some(error) = &record.error {
            screen.note(&format!("  skip  loop {path}: it ended after {} steps with an error that was caught: {error}", record.count));
        } else if record.finished {
            screen.note(&format!("  skip  loop {path}: its {} steps are done", record.count));
        } else {
            screen.note(&format!("  run   loop {path} from step {}, with the checkpoint {}", record.count, origin.manifest.name));
        }
    }
    screen.note(&format!("  {}", origin.exactness()));
    Some(origin.target())
}
