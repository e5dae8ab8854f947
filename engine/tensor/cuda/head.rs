//! What stands on top of the layers, on a GPU; see tensor/head.rs. Logits and scores come to the host, where scripts and
//! samplers read them: both functions wait for the device.

use super::linear::weight_gradient;
use super::low_rank::Applied;
use super::{gradient, operand, scratch};
use crate::error::Result;
use crate::kernels::buffer::Buffer;
use crate::kernels::cuda::device::Device;
use crate::kernels::cuda::elements;
use crate::kernels::cuda::memory::{DeviceBuffer, View, ViewMut};
use crate::kernels::cuda::product;
use crate::tensor::parameter::Parameter;
use crate::tensor::place::downloaded;
use crate::tensor::{Data, ModelElement, Tensor};
use std::sync::Arc;

/// `x headᵀ`: `[rows, outputs]`, f32.
pub fn logits<E: ModelElement>(device: &Arc<Device>, x: &Tensor<E, 2>, head: &Parameter<E>) -> Result<DeviceBuffer<f32>> {
    Ok(logits_of(device, x.cuda(), head)?.0)
}

/// The same of rows, and the low-rank parts of the head that took part.
pub(super) fn logits_of<E: ModelElement>(device: &Arc<Device>, x: View<E>, head: &Parameter<E>) -> Result<(DeviceBuffer<f32>, Applied<E>)> {
    let mut y = scratch::<f32>(device, x.len() / head.columns() * head.rows())?;
    let applied = Applied::product(device, head, y.view_mut(), x, None, None, None)?;
    Ok((y, applied))
}

/// The backward pass of [`logits_of`]: adds the gradients of the head and its low-rank parts.
///
/// - `dy`: `[rows, outputs]`; `x`: `[rows, hidden]`, needed if one of them trains
/// - `dx`: `[rows, hidden]`, if it is wanted, and whether it is added to
pub(super) fn backward<E: ModelElement>(
    device: &Arc<Device>,
    dy: View<E>,
    x: Option<View<E>>,
    head: &Parameter<E>,
    applied: &Applied<E>,
    dx: Option<(ViewMut<E>, bool)>,
) -> Result<()> {
    let unscaled = applied.unscaled(device, head, dy, None)?;
    let dy = unscaled.as_ref().map_or(dy, DeviceBuffer::view);
    weight_gradient(device, dy, x, head)?;
    let d_inner = applied.factor_gradients(device, dy, x, None)?;
    let Some((mut dx, add)) = dx else { return Ok(()) };
    product::input_gradient(device, dx.reborrow(), dy, operand(head, &head.read(), None), add, None)?;
    applied.add_input_gradient(device, &d_inner, dx, None)
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
    let (y, applied) = logits_of(device, x.cuda(), head)?;
    let y = Data::ready(downloaded(&y)?);
    let trains = head.learns();
    let (device, saved, head, seen) = (device.clone(), trains.then(|| x.data().clone()), head.clone(), head.version());
    Ok(Tensor::from_operation(shape, y, &[x.node()], trains, move |dy: Buffer<f32>, sink| {
        head.check_version(seen, op)?;
        applied.check_versions(op)?;
        let dy = DeviceBuffer::copy_of(&device, super::GRADIENTS, &dy)?;
        let mut narrow = gradient::<E>(&device, dy.len())?;
        elements::narrow(&device, dy.view(), narrow.view_mut())?;
        drop(dy);
        let x = saved.as_ref().map(|saved| saved.cuda().view());
        if !sink.wants(0) {
            return backward(&device, narrow.view(), x, &head, &applied, None);
        }
        sink.accumulate_on_device::<E>(0, &device, rows * hidden, |dx, add| {
            backward(&device, narrow.view(), x, &head, &applied, Some((dx, add)))
        })
    }))
}
