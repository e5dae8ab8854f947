//! A dead run in the hands of a process that does not run it: to look at it, or to tidy it up. While it is held nobody can go on
//! with it, and it is not taken for alive. Several may look at once; who changes something is alone.
//!
//! Two locks. That of the run, which its owner has alone, is shared here: owner and holders exclude each other, and a holder is
//! told from an owner. The run's folder itself is locked by those who hold it, shared or alone.

use crate::error::{Error, Result};
use std::fs::{File, TryLockError};
use std::path::Path;

/// Held until it is dropped.
pub struct Hold {
    _owner: File,
    _turn: File,
}

/// The dead run in `folder`, to read its store. None if a living process owns it.
///
/// Waits for who is changing it. Errors: [`Error::Io`].
pub fn to_read(folder: &Path) -> Result<Option<Hold>> {
    hold(folder, false)
}

/// The dead run in `folder`, to change it. None if a living process owns it.
///
/// Waits for all others who hold it. Errors: [`Error::Io`].
pub fn to_change(folder: &Path) -> Result<Option<Hold>> {
    hold(folder, true)
}

fn hold(folder: &Path, alone: bool) -> Result<Option<Hold>> {
    let path = folder.join("lock");
    // A run that can only be read, say in an archive, has no owner that could not be seen.
    let owner = File::open(&path).or_else(|_| File::options().create(true).truncate(false).write(true).open(&path));
    let owner = owner.map_err(|error| Error::io(&path, "open", error))?;
    match owner.try_lock_shared() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(error)) => return Err(Error::io(&path, "lock", error)),
    }
    let turn = File::open(folder).map_err(|error| Error::io(folder, "open", error))?;
    let locked = if alone { turn.lock() } else { turn.lock_shared() };
    locked.map_err(|error| Error::io(folder, "lock", error))?;
    Ok(Some(Hold { _owner: owner, _turn: turn }))
}

#[cfg(test)]
mod tests {
    use super::super::run::{is_alive, lock};
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_run_that_is_looked_at_is_not_alive_and_one_that_is_alive_is_not_looked_at() {
        let folder = tempfile::tempdir().unwrap();
        let (first, second) = (to_read(folder.path()).unwrap(), to_read(folder.path()).unwrap());
        assert!(first.is_some() && second.is_some() && !is_alive(folder.path()));
        drop((first, second));
        let owner = lock(folder.path()).unwrap();
        assert!(is_alive(folder.path()));
        assert!(to_read(folder.path()).unwrap().is_none() && to_change(folder.path()).unwrap().is_none());
        assert!(lock(folder.path()).unwrap_err().to_string().contains("the run is alive in process"));
        drop(owner);
        assert!(!is_alive(folder.path()));
    }

    #[test]
    fn an_owner_waits_for_a_holder_and_a_change_for_a_look() {
        let folder = tempfile::tempdir().unwrap();
        let held = to_read(folder.path()).unwrap();
        std::thread::scope(|scope| {
            let owner = scope.spawn(|| lock(folder.path()));
            let alone = scope.spawn(|| to_change(folder.path()).map(|held| held.is_some()));
            std::thread::sleep(Duration::from_millis(30));
            assert!(!owner.is_finished() && !alone.is_finished());
            drop(held);
            // Whichever comes first, both come to an end; the one who changes may find that the owner was faster.
            owner.join().unwrap().unwrap();
            alone.join().unwrap().unwrap();
        });
    }
}
