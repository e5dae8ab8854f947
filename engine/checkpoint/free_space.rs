//! How much room a disk has left for checkpoints. Reserves nothing.

use crate::error::{Error, Result};
use std::path::Path;

/// Bytes that this user may still write to the disk of `path`, which must exist.
///
/// Errors: [`Error::Io`].
pub fn free_bytes(path: &Path) -> Result<u64> {
    let about = rustix::fs::statvfs(path).map_err(|error| Error::io(path, "measure the disk of", error.into()))?;
    Ok(about.f_bavail * about.f_frsize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_disk_of_a_folder_is_measured_and_a_missing_one_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        assert!(free_bytes(folder.path()).unwrap() > 0);
        assert!(free_bytes(&folder.path().join("missing")).unwrap_err().to_string().contains("missing"));
    }
}
