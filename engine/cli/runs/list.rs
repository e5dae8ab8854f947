//! `perilune runs`: a line a run, newest first.

use super::json_number;
use crate::cli::output::{columns, print};
use crate::cli::table::{Side, table};
use crate::cli::times::{ago, duration};
use crate::error::Result;
use crate::host::inspect::{Inspection, Look, Standing, inspect_all};
use crate::host::progress::short;
use crate::host::run::unix_seconds;
use serde_json::{Value as Json, json};
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct List {
    /// Where runs are kept.
    #[arg(long, value_name = "FOLDER", default_value = "checkpoints/runs")]
    runs: PathBuf,
    /// Whole ids, and whole lines.
    #[arg(long)]
    long: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

impl List {
    pub fn run(self) -> Result<()> {
        let mut all = inspect_all(&self.runs, Look::Glance)?;
        all.reverse();
        if self.json {
            let all: Vec<Json> = all.iter().map(object).collect();
            return print(&format!("{:#}\n", Json::from(all)));
        }
        if all.is_empty() {
            return print(&format!("no runs in {}\n", self.runs.display()));
        }
        print(&text(&all, self.long, columns(), unix_seconds()))
    }
}

fn text(all: &[Inspection], long: bool, columns: usize, now: f64) -> String {
    // Those that cannot be read cannot be named by the beginning of their ids either.
    let ids: Vec<&str> = all.iter().filter(|run| run.facts.is_some()).map(|run| run.id.as_str()).collect();
    let letters = if long { usize::MAX } else { unique_length(&ids) };
    let head = [
        ("run", Side::Left),
        ("workflow", Side::Left),
        ("status", Side::Left),
        ("step", Side::Left),
        ("loss", Side::Right),
        ("started", Side::Left),
        ("took", Side::Left),
        ("script", Side::Left),
    ];
    let row = |run: &Inspection| {
        let position = run.position().map_or_else(String::new, |(path, step)| format!("{path} {step}"));
        vec![
            run.id.chars().take(letters).collect(),
            run.facts.as_ref().map_or_else(String::new, |facts| facts.workflow.clone()),
            run.standing.name().to_string(),
            position,
            run.loss().map_or_else(String::new, short),
            run.started().map_or_else(String::new, |started| ago(started, now)),
            run.duration().map_or_else(String::new, duration),
            run.words(),
        ]
    };
    let rows: Vec<Vec<String>> = all.iter().map(row).collect();
    let mut text = table(&head, &rows, if long { usize::MAX } else { columns });
    for run in all {
        let unread = run.reason.iter().filter(|_| run.standing == Standing::Unreadable);
        for note in unread.chain(&run.notes) {
            text += &format!("{}: {note}\n", run.id);
        }
    }
    text
}

/// How many letters tell all `ids` apart; at least 8, so that the next runs are likely to be told apart too.
fn unique_length(ids: &[&str]) -> usize {
    let mut sorted = ids.to_vec();
    sorted.sort_unstable();
    let common = |pair: &[&str]| pair[0].chars().zip(pair[1].chars()).take_while(|(a, b)| a == b).count();
    sorted.windows(2).map(|pair| common(pair) + 1).max().unwrap_or(0).max(8)
}

fn object(run: &Inspection) -> Json {
    let position = run.position();
    json!({
        "id": run.id,
        "folder": run.folder.display().to_string(),
        "workflow": run.facts.as_ref().map(|facts| &facts.workflow),
        "status": run.standing,
        "reason": run.reason,
        "loop": position.as_ref().map(|(path, _)| path),
        "step": position.as_ref().map(|(_, step)| step),
        "loss": run.loss().map(json_number),
        "started": run.started(),
        "seconds": run.duration(),
        "script": run.facts.as_ref().map(|facts| &facts.script),
        "words": run.facts.as_ref().map(|facts| &facts.words),
        "seed": run.facts.as_ref().map(|facts| facts.seed),
        "parent": run.facts.as_ref().and_then(|facts| facts.parent.as_ref()).map(|parent| &parent.id),
        "notes": run.notes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_cut_where_they_still_differ() {
        assert_eq!(unique_length(&["01JD5Z0AAAAAAAAAAAAAAAAAAA"]), 8);
        assert_eq!(unique_length(&["01JD5Z0AAAB0", "01JD5Z0AAAA0", "01JE000000"]), 11);
        assert_eq!(unique_length(&[]), 8);
    }
}
