//! The Qwen2.5 graph: configuration, parameter names, layers, dense and mixture of experts.

pub mod config;
pub mod fields;
pub mod flops;
pub mod generation_config;
pub mod graph;
mod model;
pub mod names;
pub mod presets;
pub mod rope_scaling;
pub mod sizes;
pub mod weights;

pub use graph::Packed;
pub use model::{Loss, Model};
