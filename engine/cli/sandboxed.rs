//! `perilune sandboxed`: not for users. The process in which a program that a model wrote runs; see `host/sandbox_job.rs`.

use crate::error::Result;
use crate::host::sandbox_child;

/// Run a foreign program behind walls; engine.sandbox starts this.
#[derive(clap::Args)]
#[command(hide = true)]
pub struct Sandboxed {
    /// What to run, as JSON.
    order: String,
}

impl Sandboxed {
    pub fn run(self) -> Result<()> {
        let code = sandbox_child::main(&self.order)?;
        std::process::exit(code)
    }
}
