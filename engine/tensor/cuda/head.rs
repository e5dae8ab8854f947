//! What stands on top of the layers, on a GPU; see tensor/head.rs. Logits and scores come to the host, where scripts and
//! samplers read them: both functions wait for the device.

use super::linear::weight_gradients;
use super::{activation, gradient, operand, scratch};
use crate::error::Result;
use crate::kernels::buffer::Buffer;
use crate::kernels::cuda::device::Device;
use crate::kernels::cuda::memory::DeviceBuffer;
use crate::kernels::cuda::product::{self, Residual};
use crate::kernels::cuda::{elements, embedding::embed};
use crate::tensor::parameter::Parameter;
use crate::tensor::place::downloaded;
use crate::tensor::{Data, ModelElement, Tensor};
use std::sync::Arc;

/// As [`crate::tensor::head::select_rows`], of rows that `x` has.
pub fn select_rows<E: ModelElement>(device: &Arc<Device>, x: &Tensor<E, 2>, rows: &[usize]) -> Result<Tensor<E, 2>> {
    let [tokens, hidden] = x.shape();
    let ids = ids_of(rows);
    let on_device = DeviceBuffer::copy_of(device, "rows", &ids)?;
    let mut some = activation::<E>(device, rows.len() * hidden)?;
    embed(device, x.cuda(), hidden, on_device.view(), some.view_mut())?;
    let device = device.clone();
    Ok(Tensor::from_operation_on_device([rows.len(), hidden], some, &[x.node()], false, move |dy, sink| {
        sink.accumulate_on_device::<E>(0, &device, tokens * hidden, |mut dx, add| {
            if !add {
                dx.zero(&device)?;
            }
            let mut start = 0;
            // A row that was asked for twice is added to twice, in that order.
            for part in distinct(&ids) {
                let (from, rows) = (dy.part(start * hidden..(start + part.len()) * hidden), DeviceBuffer::copy_of(&device, "rows", part)?);
                elements::put_rows(&device, from, rows.view(), hidden, dx.reborrow(), true)?;
                start += part.len();
            }
            Ok(())
        })
    }))
}

/// Row numbers as the kernels read them.
pub fn ids_of(rows: &[usize]) -> Vec<i32> {
    rows.iter().map(|row| i32::try_from(*row).expect("a batch has fewer than 2^31 tokens")).collect()
}

/// The longest parts, one after the other, in which no number comes twice.
fn distinct(ids: &[i32]) -> Vec<&[i32]> {
    let (mut parts, mut start, mut seen) = (Vec::new(), 0, std::collections::HashSet::new());
    for (at, id) in ids.iter().enumerate() {
        if !seen.insert(id) {
            parts.push(&ids[start..at]);
            (start, seen) = (at, std::collections::HashSet::from([id]));
        }
    }
    parts.push(&ids[start..]);
    parts
}

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

#[cfg(test)]
mod tests {
    use super::distinct;

    #[test]
    fn rows_are_cut_before_each_repetition() {
        assert_eq!(distinct(&[3, 1, 3, 2, 2]), [&[3, 1][..], &[3, 2], &[2]]);
        assert_eq!(distinct(&[]), [&[] as &[i32]]);
    }
}
