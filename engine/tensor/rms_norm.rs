//! RMS normalisation of rows, with autograd. The loops are in kernels/cpu/rms_norm.rs.
//! Source: Zhang and Sennrich, arXiv 1910.07467, section 4; rounding as `Qwen2RMSNorm` of transformers.

use super::ModelElement;
use super::autograd::Sink;
use super::cuda::rms_norm as cuda;
use super::linear::{check_place, check_vector};
use super::parameter::Parameter;
use super::typed::{Data, Tensor};
use crate::error::Result;
use crate::kernels::buffer::Buffer;
use crate::kernels::cpu::rms_norm;
use std::sync::Arc;

/// Scales each row of `x` to unit root-mean-square, rounds it to E, then multiplies by `weight`.
///
/// - `x`: `[tokens, hidden]`; `weight`: `[hidden]`; `eps` is added to the mean square
/// - returns `[tokens, hidden]`
///
/// Errors: [`crate::error::Error::Shape`] if the sizes do not fit.
pub fn rms_norm<E: ModelElement>(x: &Tensor<E, 2>, weight: &Arc<Parameter<E>>, eps: f32) -> Result<Tensor<E, 2>> {
    let [tokens, hidden] = x.shape();
    check_vector("rms_norm", "weight", hidden, weight)?;
    check_place("rms_norm", "weight", &x.place(), weight.place())?;
    if let Some(device) = x.device() {
        return cuda::rms_norm(device, x, weight, eps);
    }
    let mut inv_rms = Buffer::<f32>::scratch(tokens);
    let mut y = Buffer::<E>::scratch(tokens * hidden);
    rms_norm::rms_norm(x.values(), &weight.read().weight, eps, &mut y, &mut inv_rms);
    let (saved, weight) = (x.data().clone(), weight.clone());
    let (seen, trains) = (weight.version(), weight.trains());
    Ok(Tensor::from_operation(x.shape(), Data::ready(y), &[x.node()], trains, move |dy, sink| {
        weight.check_version(seen, "rms_norm")?;
        backward(sink, &weight, saved.get(), &inv_rms, &dy);
        Ok(())
    }))
}

/// Hands parent 0 and the weight their gradients, given that of the normalised rows.
pub(super) fn backward<E: ModelElement>(sink: &mut Sink, weight: &Parameter<E>, x: &[E], inv_rms: &[f32], dy: &[E]) {
    let value = weight.read();
    let mut both = |dweight: Option<&mut [f32]>| {
        if sink.wants(0) {
            sink.accumulate(0, x.len(), |dx, add| rms_norm::rms_norm_backward(x, &value.weight, inv_rms, dy, dx, add, dweight));
        } else {
            let mut dx = Buffer::scratch(x.len());
            rms_norm::rms_norm_backward(x, &value.weight, inv_rms, dy, &mut dx, false, dweight);
        }
    };
    if weight.trains() {
        weight.accumulate(|gradient, add| {
            if !add {
                gradient.fill(0.0);
            }
            both(Some(gradient));
        });
    } else {
        both(None);
    }
}
