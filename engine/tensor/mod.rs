//! Typed tensors, autograd and the operations on them, one file an operation. The only folder that names dfdx.

pub mod any;
pub mod arithmetic;
pub mod attention;
pub mod autograd;
pub mod compare;
pub mod construct;
pub mod convert;
mod cuda;
mod dfdx_tape;
pub mod dora;
pub mod elementwise;
pub mod embedding;
pub mod embedding_part;
pub mod experts;
pub mod gather;
#[cfg(test)]
mod gradient_check;
pub mod head;
pub mod index;
pub mod linear;
pub mod logprobs;
pub mod low_rank;
pub mod matmul;
mod model_element;
mod operation;
pub mod order;
pub mod paged_attention;
pub mod parameter;
mod parameter_adapters;
mod parameter_copy;
pub mod place;
pub mod recompute;
pub mod reduce;
pub mod rms_norm;
pub mod select_rows;
mod shape;
pub mod softmax;
pub mod trainable;
mod typed;

pub use any::AnyTensor;
pub use cuda::training;
pub use model_element::ModelElement;
pub use parameter::Parameter;
pub use place::Place;
pub use typed::{Data, Tensor};
