//! `perilune runs`: the list of runs, and what can be done with one from outside. Looks and tidies; what goes on with a run is
//! `resume`.

mod diff;
mod export;
pub mod fork;
mod gc;
mod list;
mod pin;
mod show;

use super::run::runs_folder;
use crate::error::Result;
use clap::Subcommand;
use serde_json::Value as Json;
use std::path::PathBuf;

/// List the runs, or look at one, compare two, export, pin and tidy up.
#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Runs {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    list: list::List,
}

#[derive(Subcommand)]
enum Command {
    Show(show::Show),
    Diff(diff::Diff),
    Export(export::Export),
    Fork(fork::Fork),
    /// Keep a checkpoint whatever the script's `keep` says.
    Pin(pin::Pin),
    /// Let a pinned checkpoint go when it is its turn.
    Unpin(pin::Pin),
    Gc(gc::Gc),
}

impl Runs {
    pub fn run(self) -> Result<()> {
        match self.command {
            None => self.list.run(),
            Some(Command::Show(show)) => show.run(),
            Some(Command::Diff(diff)) => diff.run(),
            Some(Command::Export(export)) => export.run(),
            Some(Command::Fork(fork)) => fork.run(),
            Some(Command::Pin(pin)) => pin.run(true),
            Some(Command::Unpin(pin)) => pin.run(false),
            Some(Command::Gc(gc)) => gc.run(),
        }
    }
}

/// Which run is meant.
#[derive(clap::Args)]
pub struct Which {
    /// Id of the run, the beginning of one, `latest`, or its folder.
    run: String,
    /// Where runs are kept.
    #[arg(long, value_name = "FOLDER", default_value = "checkpoints/runs")]
    runs: PathBuf,
}

impl Which {
    /// Its folder. Errors: as [`runs_folder`].
    pub fn folder(&self) -> Result<PathBuf> {
        runs_folder(&self.runs, &self.run)
    }
}

/// A number for JSON, which has none that are not finite: those are their names, as in the metrics.
fn json_number(value: f64) -> Json {
    if value.is_finite() { Json::from(value) } else { Json::from(value.to_string()) }
}
