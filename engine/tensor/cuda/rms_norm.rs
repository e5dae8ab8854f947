//! RMS normalisation on a GPU; see tensor/rms_norm.rs.

use super::{activation, scratch};
use crate::error::Result;
use crate::kernels::cuda::device::Device;
use crate::kernels::cuda::memory::View;
use crate::kernels::cuda::{norm, rms_norm as kernel};
use crate::tensor::autograd::Sink;
use crate::tensor::parameter::Parameter;
use crate::tensor::{ModelElement, Tensor};
use std::sync::Arc;

/// As [`crate::tensor::rms_norm::rms_norm`].
pub fn rms_norm<E: ModelElement>(device: &Arc<Device>, x: &Tensor<E, 2>, weight: &Arc<Parameter<E>>, eps: f32) -> Result<Tensor<E, 2>> {
    let [tokens, hidden] = x.shape();
    let mut inv_rms = activation::<f32>(device, tokens)?;
    let mut y = activation::<E>(device, tokens * hidden)?;
    kernel::rms_norm(device, x.cuda(), None, weight.read().on_device(), eps, y.view_mut(), inv_rms.view_mut())?;
    let (device, saved, weight) = (device.clone(), x.data().clone(), weight.clone());
    let (seen, trains) = (weight.version(), weight.trains());
    Ok(Tensor::from_operation_on_device(x.shape(), y, &[x.node()], trains, move |dy, sink| {
        weight.check_version(seen, "rms_norm")?;
        backward(&device, sink, &weight, saved.cuda().view(), inv_rms.view(), dy.view())
    }))
}

/// Hands parent 0 and the weight their gradients, given that of the normalised rows.
pub fn backward<E: ModelElement>(
    device: &Arc<Device>,
    sink: &mut Sink,
    weight: &Parameter<E>,
    x: View<E>,
    inv_rms: View<f32>,
    dy: View<E>,
) -> Result<()> {
    let value = weight.read();
    sink.accumulate_on_device::<E>(0, device, x.len(), |dx, add| {
        kernel::rms_norm_backward(device, x, value.on_device(), inv_rms, dy, dx, add)
    })?;
    weight.accumulate_on_device(|mut dweight, add| {
        if !add {
            dweight.zero(device)?;
        }
        let mut parts = scratch::<f32>(device, norm::parts_len(inv_rms.len(), weight.rows()))?;
        kernel::rms_norm_weight_gradient(device, x, inv_rms, dy, parts.view_mut(), dweight)
    })
}
