//! Whether everything that a run has kept is still what it was: its store, its code, the results of its steps, its checkpoints
//! and its logs, each against its own checksum. Changes nothing.

use super::{code, hold, results};
use crate::checkpoint::catalog::list;
use crate::error::{Error, Result};
use crate::store::metrics;
use crate::store::records::{Output, Records};
use crate::store::salvage::salvage;
use std::path::Path;

/// What was found of one part.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// Which it is: `store`, `code`, `steps`, `checkpoints`, `metrics`.
    pub name: &'static str,
    /// How much of it there is, in words.
    pub about: String,
    /// What is wrong with it, a sentence each.
    pub damage: Vec<String>,
}

/// Reads all of the run in `folder`, alive or dead. The store of a living run is its process's own and is not looked at.
///
/// Errors: [`Error::Io`] if folders cannot be listed; [`Error::Format`] if a newer engine wrote the store.
pub fn verify(folder: &Path) -> Result<Vec<Part>> {
    let mut parts = Vec::new();
    let records = match hold::to_read(folder)? {
        None => {
            parts.push(Part { name: "store", about: "in use by the run, which is alive: not read".into(), damage: Vec::new() });
            None
        }
        Some(_held) => {
            let found = salvage(&folder.join("store"))?;
            parts.push(Part { name: "store", about: format!("records: {}", found.keys), damage: found.damage });
            Some(found.records)
        }
    };
    parts.push(verify_code(folder));
    if let Some(records) = &records {
        parts.push(verify_steps(folder, records));
    }
    parts.push(verify_checkpoints(&folder.join("checkpoints"))?);
    for name in ["metrics", "timing"] {
        let path = folder.join(format!("{name}.jsonl"));
        if path.exists() {
            parts.push(verify_log(name, &path)?);
        }
    }
    Ok(parts)
}

fn verify_code(folder: &Path) -> Part {
    let numbers = code::numbers(folder);
    let mut damage: Vec<String> = numbers.iter().filter_map(|number| code::load(folder, *number).err()).map(|e| e.to_string()).collect();
    if !numbers.contains(&0) {
        damage.push("the first generation, code/g0.json, is not there".into());
    }
    Part { name: "code", about: format!("generations: {}", numbers.len()), damage }
}

fn verify_steps(folder: &Path, records: &Records) -> Part {
    let in_files = records.steps.iter().filter_map(|step| {
        let output = step.output.as_ref().filter(|output| matches!(output, Output::File { .. }))?;
        Some(results::recorded(folder, &step.key, output).err())
    });
    let read: Vec<Option<Error>> = in_files.collect();
    let about = format!("recorded: {}, with results in files: {}", records.steps.len(), read.len());
    Part { name: "steps", about, damage: read.into_iter().flatten().map(|error| error.to_string()).collect() }
}

fn verify_checkpoints(root: &Path) -> Result<Part> {
    let listed = list(root)?;
    let mut damage = Vec::new();
    for (name, manifest) in &listed {
        match manifest {
            Ok(manifest) => damage.extend(manifest.faults(&root.join(name))?.iter().map(Error::to_string)),
            Err(error) => damage.push(error.to_string()),
        }
    }
    Ok(Part { name: "checkpoints", about: format!("folders: {}", listed.len()), damage })
}

fn verify_log(name: &'static str, path: &Path) -> Result<Part> {
    let (mut lines, mut damage) = (0, Vec::new());
    for (_, line) in metrics::read(path)? {
        lines += 1;
        damage.extend(line.err().map(|error| error.to_string()));
    }
    Ok(Part { name, about: format!("lines: {lines}"), damage })
}
