//! Token embedding on a GPU, with its low-rank part for lookups; see tensor/embedding.rs.

use super::{activation, gradient, operand, scratch};
use crate::error::Result;
use crate::kernels::cuda::device::Device;
use crate::kernels::cuda::elements;
use crate::kernels::cuda::embedding::{add_to_columns_of, embed, embed_backward, take_columns_of};
use crate::kernels::cuda::memory::{DeviceBuffer, View, ViewMut};
use crate::kernels::cuda::product::{self, Residual};
use crate::tensor::embedding_part::EmbeddingPart;
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
    let (x, looked_up) = rows_of(device, tokens.view(), weight)?;
    let trains = weight.trains() || looked_up.as_ref().is_some_and(|looked_up| looked_up.part.trains());
    let (device, weight) = (device.clone(), weight.clone());
    Ok(Tensor::from_operation_on_device([count, hidden], x, &[], trains, move |dx, _| {
        looked_up.as_ref().map_or(Ok(()), |looked_up| looked_up.backward(&device, tokens.view(), dx.view()))?;
        weight.accumulate_on_device(|mut dweight, add| {
            if !add {
                dweight.zero(&device)?;
            }
            embed_backward(&device, dx.view(), tokens.view(), hidden, dweight)
        })
    }))
}

/// The rows of `weight` that `tokens` name with what its low-rank part adds, and that part if there is one.
pub(super) fn rows_of<E: ModelElement>(
    device: &Arc<Device>,
    tokens: View<i32>,
    weight: &Parameter<E>,
) -> Result<(DeviceBuffer<E>, Option<LookedUp<E>>)> {
    let mut x = activation::<E>(device, tokens.len() * weight.columns())?;
    let value = weight.read();
    match value.cuda.as_ref().and_then(|cuda| cuda.int8.as_ref()) {
        Some(int8) => int8.embed(device, tokens, x.view_mut())?,
        None => embed(device, value.on_device(), weight.columns(), tokens, x.view_mut())?,
    }
    drop(value);
    let looked_up = weight.embedding_part().map(|part| LookedUp::forward(device, part, tokens, x.view_mut())).transpose()?;
    Ok((x, looked_up))
}

/// The low-rank part of one lookup, with what its backward pass needs; as that of tensor/embedding_part.rs.
pub(super) struct LookedUp<E: ModelElement> {
    part: EmbeddingPart<E>,
    /// `A[:, token]` of each token, `[tokens, rank]`.
    inner: DeviceBuffer<E>,
    versions: [u64; 2],
}

impl<E: ModelElement> LookedUp<E> {
    fn forward(device: &Arc<Device>, part: EmbeddingPart<E>, tokens: View<i32>, x: ViewMut<E>) -> Result<Self> {
        let (rank, hidden) = (part.a.rows(), part.b.rows());
        let mut inner = activation::<E>(device, tokens.len() * rank)?;
        take_columns_of(device, part.a.read().on_device(), rank, tokens, inner.view_mut())?;
        let mut delta = scratch::<f32>(device, tokens.len() * hidden)?;
        let b = part.b.read();
        product::forward(device, delta.view_mut(), inner.view(), operand(&part.b, &b, None), None, Residual::None, None)?;
        drop(b);
        elements::add_columns(device, x, hidden, 0..hidden, delta.view(), part.scale)?;
        let versions = [part.a.version(), part.b.version()];
        Ok(Self { part, inner, versions })
    }

    /// Adds the gradients of the factors that train.
    ///
    /// - `dx`: `[tokens, hidden]`
    ///
    /// Errors: as [`Parameter::check_version`], for both factors; those of the device.
    fn backward(&self, device: &Arc<Device>, tokens: View<i32>, dx: View<E>) -> Result<()> {
        let part = &self.part;
        part.parameters().zip(self.versions).try_for_each(|(factor, seen)| factor.check_version(seen, "embedding"))?;
        let (rank, hidden) = (part.a.rows(), part.b.rows());
        let mut d_delta = gradient::<E>(device, dx.len())?;
        elements::take_columns(device, dx, hidden, 0..hidden, part.scale, d_delta.view_mut())?;
        part.b.accumulate_on_device(|dw, add| {
            product::weight_gradient(device, dw, d_delta.view(), self.inner.view(), (hidden, rank), add, None)
        })?;
        part.a.accumulate_on_device(|mut dw, add| {
            let mut d_inner = gradient::<E>(device, self.inner.len())?;
            let b = part.b.read();
            product::input_gradient(device, d_inner.view_mut(), d_delta.view(), operand(&part.b, &b, None), false, None)?;
            if !add {
                dw.zero(device)?;
            }
            add_to_columns_of(device, d_inner.view(), tokens, rank, dw)
        })
    }
}
