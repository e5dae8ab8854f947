//! `perilune store`: the database of one run: is it sound, make it small, write it anew from what the run's files tell.

use super::output::print;
use super::runs::Which;
use super::units::bytes;
use crate::error::{Error, Result};
use crate::host::compact::compact;
use crate::host::rebuild::rebuild;
use crate::host::run_object::shown;
use crate::host::verify::verify;
use clap::Subcommand;

/// Check, compact or rebuild the records of a run.
#[derive(clap::Args)]
pub struct Store {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Read everything that the run has kept, and compare it with its checksums.
    Verify(Which),
    /// Write the store anew without the garbage of its log.
    Compact(Which),
    /// Write the store anew from what can be read of it and from the run's files; the old one is put aside.
    Rebuild(Which),
}

impl Store {
    pub fn run(self) -> Result<()> {
        match self.command {
            Command::Verify(which) => say_verified(&which),
            Command::Compact(which) => {
                let (before, after) = compact(&which.folder()?)?;
                print(&format!("{} before, {} now\n", bytes(before), bytes(after)))
            }
            Command::Rebuild(which) => say_rebuilt(&which),
        }
    }
}

fn say_verified(which: &Which) -> Result<()> {
    let parts = verify(&which.folder()?)?;
    let mut text = String::new();
    for part in &parts {
        let verdict = if part.damage.is_empty() { "sound" } else { "damaged" };
        text += &format!("{:<12} {verdict:<8} {}\n", part.name, part.about);
        part.damage.iter().for_each(|damage| text += &format!("  {damage}\n"));
    }
    print(&text)?;
    let damaged: Vec<&str> = parts.iter().filter(|part| !part.damage.is_empty()).map(|part| part.name).collect();
    if damaged.is_empty() { Ok(()) } else { Err(Error::Script(format!("damaged: {}", damaged.join(", ")))) }
}

fn say_rebuilt(which: &Which) -> Result<()> {
    let done = rebuild(&which.folder()?)?;
    let mut text = String::new();
    done.damage.iter().for_each(|damage| text += &format!("damage     {damage}\n"));
    text += &format!("read       {} records of the old store\n", done.salvaged);
    done.completed.added.iter().for_each(|what| text += &format!("recovered  {what}\n"));
    done.completed.missing.iter().for_each(|what| text += &format!("missing    {what}\n"));
    if let Some(aside) = &done.aside {
        text += &format!("the old store is in {}\n", shown(aside));
    }
    print(&text)
}
