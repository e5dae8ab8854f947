//! The store of a dead run without the garbage of its log.

use super::hold;
use crate::error::{Error, Result};
use crate::store::RunStore;
use crate::store::salvage::salvage;
use std::path::Path;

/// Compacts the store of the dead run in `folder`: the bytes that it took on the disk, and those that it takes now.
///
/// Errors: [`Error::Script`] if the run is alive, or its store is damaged, which then stays as it is; those of the store.
pub fn compact(folder: &Path) -> Result<(u64, u64)> {
    let held = hold::to_change(folder)?;
    let _held = held.ok_or_else(|| Error::Script(format!("{}: the run is alive; stop it first: perilune stop", folder.display())))?;
    let path = folder.join("store");
    if let Some(damage) = salvage(&path)?.damage.first() {
        return Err(Error::Script(format!("the store is damaged; mend it with: perilune store rebuild {}: {damage}", folder.display())));
    }
    let store = RunStore::open(&path)?.store;
    let before = store.database().disk_bytes()?;
    store.database().compact()?;
    let after = store.database().disk_bytes()?;
    store.close()?;
    Ok((before, after))
}
