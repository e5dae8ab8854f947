//! Typed tensors, autograd and the operations on them, one file an operation. The only folder that names dfdx.

pub mod any;
pub mod arithmetic;
pub mod autograd;
pub mod compare;
pub mod construct;
pub mod convert;
mod dfdx_tape;
pub mod elementwise;
pub mod gather;
#[cfg(test)]
mod gradient_check;
pub mod index;
pub mod matmul;
mod operation;
pub mod order;
pub mod recompute;
pub mod reduce;
mod shape;
pub mod softmax;
mod typed;

pub use any::AnyTensor;
pub use typed::{Data, Tensor};
