//! The Qwen2.5 graph: configuration, parameter names, layers, dense and mixture of experts.

#[macro_use]
mod any;
mod adapted;
mod captured_training;
pub mod config;
mod decode;
pub mod fields;
pub mod flops;
mod freezing;
pub mod generation_config;
pub mod graph;
pub mod lora;
pub mod names;
pub mod paged;
pub mod presets;
mod room;
pub mod rope_scaling;
pub mod sizes;
mod training_state;
mod weight_space;
pub mod weights;

pub use any::{Loss, Model, parse_dtype};
pub use graph::Packed;
pub use lora::Lora;
