//! The Qwen2.5 graph: configuration, parameter names, layers, dense and mixture of experts.

#[macro_use]
mod any;
pub mod config;
pub mod fields;
pub mod flops;
pub mod generation_config;
pub mod graph;
pub mod names;
pub mod paged;
pub mod presets;
pub mod rope_scaling;
pub mod sizes;
mod training_state;
pub mod weights;

pub use any::{Loss, Model};
pub use graph::Packed;
