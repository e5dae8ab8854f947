//! Typed tensors, autograd and the operations on them, one file an operation. The only folder that names dfdx.

pub mod any;
pub mod autograd;
pub mod recompute;
mod typed;

pub use any::AnyTensor;
pub use typed::{Data, Tensor};
