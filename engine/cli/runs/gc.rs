//! `perilune runs gc`: frees the disk of what no run needs, and says what went.

use crate::cli::output::print;
use crate::cli::units::bytes;
use crate::error::{Error, Result};
use crate::host::collect::{Collected, Wish, collect, remove_run};
use std::path::PathBuf;
use std::time::Duration;

/// Remove what killed processes left and no record names; with --keep also checkpoints of finished runs.
#[derive(clap::Args)]
pub struct Gc {
    /// Where runs are kept.
    #[arg(long, value_name = "FOLDER", default_value = "checkpoints/runs")]
    runs: PathBuf,
    /// Only say what would go.
    #[arg(long)]
    dry_run: bool,
    /// Of each finished run keep this many of the newest checkpoints, and pinned ones; without it all stay.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    keep: Option<u32>,
    /// Damaged stores and ends of logs that were put aside go when they are this old.
    #[arg(long, value_name = "DAYS", default_value_t = 30.0, allow_negative_numbers = true)]
    older_than: f64,
    /// Remove this whole run, which must not be alive; takes its whole id.
    #[arg(long, value_name = "RUN", conflicts_with_all = ["keep", "older_than"])]
    remove: Option<String>,
}

impl Gc {
    pub fn run(self) -> Result<()> {
        let verb = if self.dry_run { "would free" } else { "freed" };
        if let Some(id) = &self.remove {
            let freed = remove_run(&self.runs, id, self.dry_run)?;
            return print(&format!("{id}: {verb} {}\n", bytes(freed)));
        }
        let older_than = Duration::try_from_secs_f64(self.older_than * 86_400.0);
        let older_than = older_than.map_err(|_| Error::argument("runs gc", "--older-than", "days, a number from 0", self.older_than))?;
        let wish = Wish { keep: self.keep.map(|keep| keep as usize), older_than, dry_run: self.dry_run };
        let all = collect(&self.runs, &wish)?;
        let mut text: String = all.iter().filter_map(|collected| line(collected, verb)).collect();
        let (freed, runs) = (all.iter().map(Collected::bytes).sum(), all.iter().filter(|collected| !collected.gone.is_empty()).count());
        text += &match runs {
            0 => "nothing to remove\n".to_string(),
            _ => format!("{verb} {} in {runs} of {} runs\n", bytes(freed), all.len()),
        };
        print(&text)
    }
}

fn line(collected: &Collected, verb: &str) -> Option<String> {
    let kinds: Vec<String> = collected.gone.iter().map(|(kind, count, _)| format!("{count} {}", kind.name(*count))).collect();
    let mut parts = Vec::new();
    if !kinds.is_empty() {
        parts.push(format!("{verb} {}: {}", bytes(collected.bytes()), kinds.join(", ")));
    }
    parts.extend(collected.notes.iter().cloned());
    let name = collected.folder.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    (!parts.is_empty()).then(|| format!("{name}  {}\n", parts.join("; ")))
}
