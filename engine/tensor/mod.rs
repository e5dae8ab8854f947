//! Typed tensors, autograd and the operations on them, one file an operation. The only folder that names dfdx.

pub mod any;
pub mod attention;
pub mod autograd;
pub mod embedding;
pub mod experts;
pub mod linear;
pub mod logprobs;
mod model_element;
pub mod parameter;
pub mod recompute;
pub mod rms_norm;
mod typed;

pub use any::AnyTensor;
pub use model_element::ModelElement;
pub use parameter::Parameter;
pub use typed::{Data, Tensor};
