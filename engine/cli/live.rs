//! Commands that steer a run while it lives: `pause`, `continue`, `stop`, `checkpoint`, `set`, `reload`. Each asks the run's process,
//! which answers at the end of its step.

use super::output::print;
use super::runs::Which;
use crate::error::{Error, Result};
use crate::host::control::{ask, setting};
use crate::host::run::{is_alive, read_facts, word_for};
use serde_json::{Value as Json, json};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Hold a run at the end of its step until `continue`.
#[derive(clap::Args)]
pub struct Pause {
    #[command(flatten)]
    which: Which,
}

/// Let a paused run go on.
#[derive(clap::Args)]
pub struct Continue {
    #[command(flatten)]
    which: Which,
}

/// Let a run take a checkpoint at the end of its step and end.
#[derive(clap::Args)]
pub struct Stop {
    #[command(flatten)]
    which: Which,
}

/// Let a run take a checkpoint at the end of its step.
#[derive(clap::Args)]
pub struct Checkpoint {
    #[command(flatten)]
    which: Which,
}

/// Let a run try its script as it is on the disk now.
#[derive(clap::Args)]
pub struct Reload {
    #[command(flatten)]
    which: Which,
}

/// Set hyper-parameters of a run's optimizers, whatever its script says.
///
/// Such as `perilune set latest optimizer.lr=1e-4`, with the name of a model in place of `optimizer` where there are several.
/// Names: lr, eps, weight_decay, clip_norm (false for no limit), beta1, beta2, momentum (of muon). The value `script` lets the script decide again.
#[derive(clap::Args)]
pub struct Set {
    #[command(flatten)]
    which: Which,
    /// NAME=VALUE, such as optimizer.lr=1e-4.
    #[arg(required = true, value_name = "NAME=VALUE")]
    settings: Vec<String>,
}

/// How often a run that is to end is looked at.
const LOOK: Duration = Duration::from_millis(20);
/// When a line says what is being waited for.
const NOTE_AFTER: Duration = Duration::from_secs(2);

/// The folder of the run, which must be alive.
fn living(which: &Which) -> Result<PathBuf> {
    let folder = which.folder()?;
    if is_alive(&folder) {
        return Ok(folder);
    }
    let id = read_facts(&folder)?.id;
    Err(Error::Script(format!("{id}: no process runs this run; go on with it by: perilune resume {}", word_for(&folder))))
}

fn ask_living(which: &Which, question: &Json) -> Result<(PathBuf, Json)> {
    let folder = living(which)?;
    let (done, waiting) = std::sync::mpsc::channel::<()>();
    // The answer comes at the end of a step, which may take long.
    let note = std::thread::spawn(move || {
        if waiting.recv_timeout(NOTE_AFTER).is_err_and(|error| error == std::sync::mpsc::RecvTimeoutError::Timeout) {
            eprintln!("waiting for the end of the step");
        }
    });
    let answer = ask(&folder, question);
    drop(done);
    note.join().expect("the thread prints a line at most");
    answer.map(|answer| (folder, answer))
}

fn place(answer: &Json) -> String {
    format!("step {} of {}", answer["step"], answer["loop"].as_str().unwrap_or_default())
}

impl Pause {
    pub fn run(self) -> Result<()> {
        let (_, answer) = ask_living(&self.which, &json!({ "do": "pause" }))?;
        print(&format!("paused after {}\n", place(&answer)))
    }
}

impl Continue {
    pub fn run(self) -> Result<()> {
        let (_, answer) = ask_living(&self.which, &json!({ "do": "continue" }))?;
        print(&format!("goes on from {}\n", place(&answer)))
    }
}

impl Stop {
    pub fn run(self) -> Result<()> {
        let (folder, _) = ask_living(&self.which, &json!({ "do": "stop" }))?;
        let began = Instant::now();
        let mut noted = false;
        while is_alive(&folder) {
            if !noted && began.elapsed() > NOTE_AFTER {
                eprintln!("waiting for the end of the step");
                noted = true;
            }
            std::thread::sleep(LOOK);
        }
        print(&format!("stopped; go on with: perilune resume {}\n", word_for(&folder)))
    }
}

impl Checkpoint {
    pub fn run(self) -> Result<()> {
        let (folder, answer) = ask_living(&self.which, &json!({ "do": "checkpoint" }))?;
        let name = answer.as_str().unwrap_or_default();
        print(&format!("{}\n", Path::new(&folder).join("checkpoints").join(name).display()))
    }
}

impl Reload {
    pub fn run(self) -> Result<()> {
        let (_, answer) = ask_living(&self.which, &json!({ "do": "reload" }))?;
        match answer["generation"].as_u64() {
            Some(number) => {
                let ms = answer["ms"].as_f64().unwrap_or(0.0);
                print(&format!("generation {number} leads from {} on ({ms:.0} ms)\n", place(&answer)))
            }
            None => print("the files are those that run already\n"),
        }
    }
}

impl Set {
    pub fn run(self) -> Result<()> {
        // Mistakes of form are told at once, not at the end of a step.
        self.settings.iter().try_for_each(|word| setting(word).map(drop))?;
        let (_, answer) = ask_living(&self.which, &json!({ "do": "set", "settings": self.settings }))?;
        print(&format!("set from {} on: {}\n", place(&answer), self.settings.join(" ")))
    }
}
