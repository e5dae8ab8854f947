//! The model's operations on a GPU: one file beside each operation of the folder above, which looks where its operands lie and
//! calls it. Shapes are checked there; here are forward and backward by the launchers of kernels/cuda, in the same order as on
//! the host. Nothing waits for the device but what says so.

pub mod attention;
pub mod decode;
pub mod dora;
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
use crate::kernels::cuda::memory::{DeviceBuffer, View, ViewMut};
use crate::kernels::cuda::product::{self, Groups, Residual, Weight};
use crate::kernels::element::Float;
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

/// A value of `parameter` as an operand of products; with groups, of weights that lie one after the other.
fn operand<'a, E: ModelElement>(parameter: &Parameter<E>, value: &'a Value<E>, groups: Option<Groups>) -> Weight<'a, E> {
    let count = groups.map_or(1, |groups| groups.count());
    Weight { values: value.on_device(), outputs: parameter.rows() / count, inputs: parameter.columns() }
}

/// `y = x Wᵀ (+ bias) (+ residual)` with a value of `weight` as it is, low-rank parts left out.
///
/// - `y`: `[tokens, out]`; `x`: `[tokens, in]`; `bias`: `[out]`; `residual`: `[tokens, out]`
/// - `groups`: of rows, which use one of the weights each that lie one after the other
fn multiply<E: ModelElement, O: Float>(
    device: &Arc<Device>,
    (weight, value): (&Parameter<E>, &Value<E>),
    y: ViewMut<O>,
    x: View<E>,
    bias: Option<View<E>>,
    residual: Option<View<O>>,
    groups: Option<Groups>,
) -> Result<()> {
    match value.cuda.as_ref().and_then(|cuda| cuda.int8.as_ref()) {
        Some(int8) => int8.forward(device, y, x, bias, residual, groups),
        None => {
            let residual = residual.map_or(Residual::None, Residual::Other);
            product::forward(device, y, x, operand(weight, value, groups), bias, residual, groups)
        }
    }
}
