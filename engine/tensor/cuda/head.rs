//! What stands on top of the layers, on a GPU; see tensor/head.rs. Logits and scores come to the host, where scripts and
//! samplers read them: both functions wait for the device.

use super::linear::weight_gradients;
use super::{gradient, operand, scratch};
use crate::error::Result;
use crate::kernels::buffer::Buffer;
use crate::kernels::cuda::device::Device;
use crate::kernels::cuda::elements;
use crate::kernels::cuda::memory::DeviceBuffer;
use crate::kernels::cuda::product::{self, Residual};
use crate::tensor::parameter::Parameter;
use crate::tensor::place::downloaded;
use crate::tensor::{Data, ModelElement, Tensor};
use std::sync::Arc;

/// `x headᵀ`: `[rows, outputs]`, f32.
pub fn logits<E: ModelElement>(device: &Arc<Device>, x: &Tensor<E, 2>, head: &Parameter<E>) -> Result<DeviceBuffer<f32>> {
    let mut y = scratch::<f32>(device, x.shape()[0] * head.rows())?;
    product::forward(device, y.view_mut(), x.cuda(), operand(head, &head.read()), None, Residual::None, None)?;
    Ok(y)
}

/// `x headᵀ` as a tensor of `shape` on the host, f32.
pub fn product<E: ModelElement, const R: usize>(
    op: &'static str,
    device: &Arc<Device>,
    shape: [usize; R],
    x: &Tensor<E, 2>,
    head: &Arc<Parameter<E>>,
) -> Result<Tensor<f32, R>> {
    let [rows, hidden] = x.shape();
    let y = Data::ready(downloaded(&logits(device, x, head)?)?);
    let (device, saved, head, seen) = (device.clone(), head.trains().then(|| x.data().clone()), head.clone(), head.version());
    Ok(Tensor::from_operation(shape, y, &[x.node()], head.trains(), move |dy: Buffer<f32>, sink| {
        head.check_version(seen, op)?;
        let dy = DeviceBuffer::copy_of(&device, super::GRADIENTS, &dy)?;
        let mut narrow = gradient::<E>(&device, dy.len())?;
        elements::narrow(&device, dy.view(), narrow.view_mut())?;
        drop(dy);
        weight_gradients(&device, narrow.view(), saved.as_ref().map(|saved| saved.cuda().view()), &head, None)?;
        sink.accumulate_on_device::<E>(0, &device, rows * hidden, |dx, add| {
            product::input_gradient(&device, dx, narrow.view(), operand(&head, &head.read()), add, None)
        })
    }))
}
