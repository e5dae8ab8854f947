//! What a run remembers: its records, in a small database that survives power loss, and its logs of numbers.
//! Not here: tensors and checkpoints (files, written by `checkpoint`), and what the records mean (`host`).
//! The only folder that names sled, and in it only `sled_log.rs` does.

pub mod database;
pub mod export;
pub mod filesystem;
pub mod metrics;
pub mod records;
mod rewrite;
pub mod run_store;
pub mod salvage;
pub mod scratch;
mod seal;
mod sled_log;
pub mod tensorboard;
mod value;

pub use database::{Database, Durability, Opened};
pub use metrics::LineLog;
pub use records::Records;
pub use run_store::{OpenedStore, RunStore};
