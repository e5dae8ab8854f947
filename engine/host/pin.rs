//! Pinned checkpoints of a run that is dead or alive: marked in the store by whoever may write there.

use super::hold;
use super::rebuild::adopted;
use crate::checkpoint::catalog::list;
use crate::checkpoint::manifest::Manifest;
use crate::error::{Error, Result};
use crate::serve::local_socket::ask;
use crate::store::RunStore;
use crate::store::records::CheckpointRecord;
use crate::store::salvage::salvage;
use serde_json::json;
use std::path::Path;
use std::time::Duration;

/// A living run answers at once, unless its store is busy.
const PATIENCE: Duration = Duration::from_secs(10);

/// Pins the checkpoint `name` of the dead run in `folder`, or lets it go; `latest` is the newest. Its name, or none if the run
/// is alive.
///
/// Errors: [`Error::Argument`] if there is no such checkpoint; [`Error::Script`] if the store is damaged; those of the store.
pub fn pin(folder: &Path, name: &str, pinned: bool) -> Result<Option<String>> {
    let Some(_held) = hold::to_change(folder)? else { return Ok(None) };
    let manifest = find(folder, name)?;
    let store = folder.join("store");
    if let Some(damage) = salvage(&store)?.damage.first() {
        let what = format!("the store is damaged, mend it first: perilune store rebuild {}: {damage}", folder.display());
        return Err(Error::Script(what));
    }
    let store = RunStore::open(&store)?.store;
    let known = store.checkpoints();
    let number = known.last().map_or(0, |last| last.number + 1);
    // One that the store does not know was written by a process that was killed before it could say so.
    let record = known.into_iter().find(|record| record.manifest == manifest.hash()).unwrap_or_else(|| adopted(&manifest, number));
    store.put_checkpoint(CheckpointRecord { pinned, ..record })?;
    store.close()?;
    Ok(Some(manifest.name))
}

/// As [`pin`], for a run that is alive: its process is asked.
///
/// Errors: [`Error::Argument`] as there; [`Error::Io`] if it does not answer; [`Error::Script`] with its refusal.
pub fn pin_live(folder: &Path, name: &str, pinned: bool) -> Result<String> {
    let name = find(folder, name)?.name;
    ask(folder, &json!({ "ask": "pin", "checkpoint": name, "pinned": pinned }), PATIENCE)?;
    Ok(name)
}

fn find(folder: &Path, name: &str) -> Result<Manifest> {
    let sound: Vec<Manifest> = list(&folder.join("checkpoints"))?.into_iter().filter_map(|(_, manifest)| manifest.ok()).collect();
    let found = if name == "latest" { sound.last() } else { sound.iter().find(|manifest| manifest.name == name) };
    found.cloned().ok_or_else(|| {
        let names: Vec<&str> = sound.iter().map(|manifest| manifest.name.as_str()).collect();
        let expected = if names.is_empty() { "a checkpoint; the run has none".to_string() } else { format!("one of {}", names.join(", ")) };
        Error::argument("pin", "CHECKPOINT", expected, format!("\"{name}\""))
    })
}
