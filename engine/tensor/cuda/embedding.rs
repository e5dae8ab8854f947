//! Token embedding on a GPU; see tensor/embedding.rs.

use super::activation;
use crate::error::Result;
use crate::kernels::cuda::device::Device;
use crate::kernels::cuda::embedding::{embed, embed_backward};
use crate::kernels::cuda::memory::DeviceBuffer;
use crate::tensor::parameter::Parameter;
use crate::tensor::{ModelElement, Tensor};
use std::sync::Arc;

/// As [`crate::tensor::embedding::embedding`], of tokens that are in the vocabulary.
pub fn embedding<E: ModelElement>(device: &Arc<Device>, tokens: &[i32], weight: &Arc<Parameter<E>>) -> Result<Tensor<E, 2>> {
    embedding_of(device, Arc::new(DeviceBuffer::copy_of(device, "tokens", tokens)?), weight)
}

/// As [`embedding`], of tokens that lie on the device.
pub(super) fn embedding_of<E: ModelElement>(
    device: &Arc<Device>,
    tokens: Arc<DeviceBuffer<i32>>,
    weight: &Arc<Parameter<E>>,
) -> Result<Tensor<E, 2>> {
    let (count, hidden) = (tokens.len(), weight.columns());
    let mut x = activation::<E>(device, count * hidden)?;
    embed(device, weight.read().on_device(), hidden, tokens.view(), x.view_mut())?;
    let (device, weight, trains) = (device.clone(), weight.clone(), weight.trains());
    Ok(Tensor::from_operation_on_device([count, hidden], x, &[], trains, move |dx, _| {
        weight.accumulate_on_device(|mut dweight, add| {
            if !add {
                dweight.zero(&device)?;
            }
            embed_backward(&device, dx.view(), tokens.view(), hidden, dweight)
        })
    }))
}
