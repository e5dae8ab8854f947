//! Typed tensors, autograd and the operations on them, one file an operation. The only folder that names dfdx.

pub mod any;
mod dfdx_tape;
mod model_element;
mod operation;
mod shape;
pub mod arithmetic;
pub mod attention;
pub mod autograd;
pub mod compare;
pub mod construct;
pub mod convert;
pub mod elementwise;
pub mod embedding;
pub mod experts;
pub mod gather;
pub mod index;
pub mod linear;
pub mod logprobs;
pub mod matmul;
pub mod order;
pub mod parameter;
pub mod recompute;
pub mod reduce;
pub mod rms_norm;
pub mod softmax;
mod typed;

pub use any::AnyTensor;
pub use model_element::ModelElement;
pub use parameter::Parameter;
pub use typed::{Data, Tensor};
