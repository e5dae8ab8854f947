//! The model's operations on a GPU: one file beside each operation of the folder above, which looks where its operands lie and
//! calls it. Shapes are checked there; here are forward and backward by the launchers of kernels/cuda, in the same order as on
//! the host. Nothing waits for the device but what says so.

pub mod attention;
pub mod decode;
pub mod embedding;
pub mod experts;
pub mod generic;
pub mod head;
pub mod linear;
pub mod logprobs;
pub mod low_rank;
pub mod paged_attention;
pub mod rms_norm;
pub mod select_rows;
pub mod training;
pub mod update;
pub mod value;

use super::ModelElement;
use super::parameter::{Parameter, Value};
use crate::error::Result;
use crate::kernels::cuda::device::Device;
use crate::kernels::cuda::memory::DeviceBuffer;
use crate::kernels::cuda::product::Weight;
use bytemuck::Pod;
use std::sync::Arc;

/// What an out-of-memory error calls what lives from the forward pass to the backward pass, and what lives in between.
const ACTIVATIONS: &str = "activations";
const GRADIENTS: &str = "gradients of activations";
const SCRATCH: &str = "scratch";

fn activation<T: Pod>(device: &Arc<Device>, len: usize) -> Result<DeviceBuffer<T>> {
    DeviceBuffer::scratch(device, ACTIVATIONS, len)
}

fn gradient<T: Pod>(device: &Arc<Device>, len: usize) -> Result<DeviceBuffer<T>> {
    DeviceBuffer::scratch(device, GRADIENTS, len)
}

fn scratch<T: Pod>(device: &Arc<Device>, len: usize) -> Result<DeviceBuffer<T>> {
    DeviceBuffer::scratch(device, SCRATCH, len)
}

/// A value of `parameter` as an operand of products.
fn operand<'a, E: ModelElement>(parameter: &Parameter<E>, value: &'a Value<E>) -> Weight<'a, E> {
    Weight { values: value.on_device(), outputs: parameter.rows(), inputs: parameter.columns() }
}
