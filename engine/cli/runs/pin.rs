//! `perilune runs pin RUN CHECKPOINT` and `unpin`: whether a checkpoint stays whatever the rules of the loop say.

use super::Which;
use crate::cli::output::print;
use crate::error::Result;
use crate::host::pin::{pin, pin_live};

#[derive(clap::Args)]
pub struct Pin {
    #[command(flatten)]
    which: Which,
    /// Name of the checkpoint, as `runs show` lists it, or `latest`.
    checkpoint: String,
}

impl Pin {
    pub fn run(self, pinned: bool) -> Result<()> {
        let folder = self.which.folder()?;
        let name = match pin(&folder, &self.checkpoint, pinned)? {
            Some(name) => name,
            // It is alive, so its process is the one who may write.
            None => pin_live(&folder, &self.checkpoint, pinned)?,
        };
        print(&format!("{name} is {}\n", if pinned { "pinned: it stays until it is unpinned" } else { "not pinned" }))
    }
}
