//! Products with a weight on a GPU; see tensor/linear.rs.

use super::low_rank::Applied;
use super::{activation, gradient, operand, rms_norm, scratch};
use crate::error::Result;
use crate::kernels::cuda::device::Device;
use crate::kernels::cuda::memory::{DeviceBuffer, View};
use crate::kernels::cuda::product::{self, Residual};
use crate::kernels::cuda::product_few::{self, Form, Norm};
use crate::kernels::cuda::{norm as column_norms, rms_norm as norm_kernel, swiglu};
use crate::tensor::autograd::is_recording;
use crate::tensor::parameter::Parameter;
use crate::tensor::{ModelElement, Tensor};
use std::sync::Arc;

/// As [`crate::tensor::linear::linear`].
pub fn linear<E: ModelElement>(
    device: &Arc<Device>,
    x: &Tensor<E, 2>,
    weight: &Arc<Parameter<E>>,
    bias: Option<&Arc<Parameter<E>>>,
    residual: Option<&Tensor<E, 2>>,
) -> Result<Tensor<E, 2>> {
    let [tokens, input] = x.shape();
    let (y, applied) = product(device, x.cuda(), tokens, weight, bias, residual)?;
    let trains = weight.trains() || applied.trains();
    // The input is needed for the gradients of weights alone: a frozen weight keeps none.
    let saved = trains.then(|| x.data().clone());
    let trains = trains || bias.is_some_and(|bias| bias.trains());
    let (device, weight, bias, seen) = (device.clone(), weight.clone(), bias.cloned(), weight.version());
    let parents = [x.node(), residual.and_then(Tensor::node)];
    Ok(Tensor::from_operation_on_device([tokens, weight.rows()], y, &parents, trains, move |dy, sink| {
        weight.check_version(seen, "linear")?;
        applied.check_versions("linear")?;
        let x = saved.as_ref().map(|saved| saved.cuda().view());
        bias_gradient(&device, dy.view(), bias.as_deref())?;
        let unscaled = applied.unscaled(&device, &weight, dy.view(), None)?;
        let d_product = unscaled.as_ref().unwrap_or(&dy).view();
        weight_gradient(&device, d_product, x, &weight)?;
        let d_inner = applied.factor_gradients(&device, d_product, x, None)?;
        sink.accumulate_on_device::<E>(0, &device, tokens * input, |mut dx, add| {
            product::input_gradient(&device, dx.reborrow(), d_product, operand(&weight, &weight.read(), None), add, None)?;
            applied.add_input_gradient(&device, &d_inner, dx, None)
        })?;
        sink.add_on_device(1, dy)
    }))
}

/// As [`crate::tensor::linear::norm_linear`].
pub fn norm_linear<E: ModelElement>(
    device: &Arc<Device>,
    x: &Tensor<E, 2>,
    norm: &Arc<Parameter<E>>,
    eps: f32,
    weight: &Arc<Parameter<E>>,
    bias: Option<&Arc<Parameter<E>>>,
) -> Result<Tensor<E, 2>> {
    if let Some(y) = few_rows(device, x, norm, eps, weight, bias, Form::NORMED)? {
        return Ok(y);
    }
    let [tokens, hidden] = x.shape();
    let mut inv_rms = activation::<f32>(device, tokens)?;
    let mut normed = scratch::<E>(device, tokens * hidden)?;
    norm_kernel::rms_norm(device, x.cuda(), None, norm.read().on_device(), eps, normed.view_mut(), inv_rms.view_mut())?;
    let (y, applied) = product(device, normed.view(), tokens, weight, bias, None)?;
    drop(normed);
    let (device, saved, norm, weight, bias) = (device.clone(), x.data().clone(), norm.clone(), weight.clone(), bias.cloned());
    let needs_input = weight.trains() || applied.trains();
    let trains = needs_input || norm.trains() || bias.as_ref().is_some_and(|bias| bias.trains());
    let (seen, norm_seen) = (weight.version(), norm.version());
    Ok(Tensor::from_operation_on_device([tokens, weight.rows()], y, &[x.node()], trains, move |dy, sink| {
        weight.check_version(seen, "norm_linear")?;
        norm.check_version(norm_seen, "norm_linear")?;
        applied.check_versions("norm_linear")?;
        let mut normed = scratch::<E>(&device, tokens * hidden)?;
        if needs_input {
            let x = saved.cuda().view();
            norm_kernel::rms_norm(&device, x, None, norm.read().on_device(), eps, normed.view_mut(), inv_rms.view_mut())?;
        }
        let x = needs_input.then(|| normed.view());
        bias_gradient(&device, dy.view(), bias.as_deref())?;
        let dy = applied.unscaled(&device, &weight, dy.view(), None)?.unwrap_or(dy);
        weight_gradient(&device, dy.view(), x, &weight)?;
        let d_inner = applied.factor_gradients(&device, dy.view(), x, None)?;
        if sink.wants(0) || norm.trains() {
            // The normalised input is read no more: its buffer takes the gradient that flows into the norm.
            product::input_gradient(&device, normed.view_mut(), dy.view(), operand(&weight, &weight.read(), None), false, None)?;
            applied.add_input_gradient(&device, &d_inner, normed.view_mut(), None)?;
            drop(dy);
            rms_norm::backward(&device, sink, &norm, saved.cuda().view(), inv_rms.view(), normed.view())?;
        }
        Ok(())
    }))
}

/// As [`crate::tensor::linear::norm_swiglu`].
pub fn norm_swiglu<E: ModelElement>(
    device: &Arc<Device>,
    x: &Tensor<E, 2>,
    norm: &Parameter<E>,
    eps: f32,
    gate_up: &Parameter<E>,
) -> Result<Option<Tensor<E, 2>>> {
    few_rows(device, x, norm, eps, gate_up, None, Form::GATED)
}

/// The product of normalised rows by one kernel: of few rows, by which nobody differentiates, with a weight alone. None for others.
fn few_rows<E: ModelElement>(
    device: &Arc<Device>,
    x: &Tensor<E, 2>,
    norm: &Parameter<E>,
    eps: f32,
    weight: &Parameter<E>,
    bias: Option<&Arc<Parameter<E>>>,
    form: Form,
) -> Result<Option<Tensor<E, 2>>> {
    let tokens = x.shape()[0];
    if is_recording() || tokens > product_few::ROWS_MAX || !weight.adapters().is_empty() {
        return Ok(None);
    }
    let value = weight.read();
    if value.cuda.as_ref().is_none_or(|cuda| cuda.int8.is_some()) {
        return Ok(None);
    }
    let operand = operand(weight, &value, None);
    if !form.fits(device, tokens, x.cuda(), &operand) {
        return Ok(None);
    }
    let outputs = if form.gated { weight.rows() / 2 } else { weight.rows() };
    let mut y = activation::<E>(device, tokens * outputs)?;
    let (norm, bias) = (norm.read(), bias.map(|bias| bias.read()));
    let by = Norm { weight: norm.on_device(), eps };
    let bias = bias.as_ref().map(|bias| bias.on_device());
    product_few::forward(device, form, y.view_mut(), x.cuda(), Some(by), operand, bias, Residual::None)?;
    Ok(Some(Tensor::from_operation_on_device([tokens, outputs], y, &[], false, |_, _| Ok(()))))
}

/// As [`crate::tensor::linear::swiglu_linear`].
pub fn swiglu_linear<E: ModelElement>(
    device: &Arc<Device>,
    gate_up: &Tensor<E, 2>,
    weight: &Arc<Parameter<E>>,
    residual: Option<&Tensor<E, 2>>,
) -> Result<Tensor<E, 2>> {
    let [tokens, width] = gate_up.shape();
    let inter = width / 2;
    let mut activation = scratch::<E>(device, tokens * inter)?;
    swiglu::swiglu(device, gate_up.cuda(), inter, activation.view_mut())?;
    let (y, applied) = product(device, activation.view(), tokens, weight, None, residual)?;
    drop(activation);
    let (device, saved, weight) = (device.clone(), gate_up.data().clone(), weight.clone());
    let (seen, trains) = (weight.version(), weight.trains() || applied.trains());
    let parents = [gate_up.node(), residual.and_then(Tensor::node)];
    Ok(Tensor::from_operation_on_device([tokens, weight.rows()], y, &parents, trains, move |dy, sink| {
        weight.check_version(seen, "swiglu_linear")?;
        applied.check_versions("swiglu_linear")?;
        let mut activation = scratch::<E>(&device, tokens * inter)?;
        let x = if applied.trains() {
            // The factors' part of the gradient flows back through the activation, which they must see first.
            swiglu::swiglu(&device, saved.cuda().view(), inter, activation.view_mut())?;
            Some(activation.view())
        } else {
            None
        };
        let unscaled = applied.unscaled(&device, &weight, dy.view(), None)?;
        let d_product = unscaled.as_ref().unwrap_or(&dy).view();
        let d_inner = applied.factor_gradients(&device, d_product, x, None)?;
        let mut d_activation = gradient::<E>(&device, tokens * inter)?;
        product::input_gradient(&device, d_activation.view_mut(), d_product, operand(&weight, &weight.read(), None), false, None)?;
        applied.add_input_gradient(&device, &d_inner, d_activation.view_mut(), None)?;
        let mut d_gate_up = gradient::<E>(&device, tokens * width)?;
        let place = swiglu::Gradient::Beside { gate_up: saved.cuda().view(), d_gate_up: d_gate_up.view_mut() };
        swiglu::swiglu_backward(&device, place, inter, d_activation.view(), Some(activation.view_mut()))?;
        drop(d_activation);
        weight_gradient(&device, d_product, Some(activation.view()), &weight)?;
        sink.add_on_device(0, d_gate_up)?;
        sink.add_on_device(1, dy)
    }))
}

/// The product itself, and the low-rank parts of the weight that took part.
pub fn product<E: ModelElement>(
    device: &Arc<Device>,
    x: View<E>,
    tokens: usize,
    weight: &Parameter<E>,
    bias: Option<&Arc<Parameter<E>>>,
    residual: Option<&Tensor<E, 2>>,
) -> Result<(DeviceBuffer<E>, Applied<E>)> {
    let mut y = activation::<E>(device, tokens * weight.rows())?;
    let bias = bias.map(|bias| bias.read());
    let bias = bias.as_ref().map(|bias| bias.on_device());
    let applied = Applied::product(device, weight, y.view_mut(), x, bias, residual.map(Tensor::cuda), None)?;
    Ok((y, applied))
}

/// Adds `dyᵀ x` to the gradient of the weight, if it trains.
///
/// - `x`: needed then
pub fn weight_gradient<E: ModelElement>(device: &Arc<Device>, dy: View<E>, x: Option<View<E>>, weight: &Parameter<E>) -> Result<()> {
    weight.accumulate_on_device(|dw, add| {
        let x = x.expect("a weight that trains has its input");
        product::weight_gradient(device, dw, dy, x, (weight.rows(), weight.columns()), add, None)
    })
}

/// Adds the column sums of `dy` to the gradient of a bias that trains.
fn bias_gradient<E: ModelElement>(device: &Arc<Device>, dy: View<E>, bias: Option<&Parameter<E>>) -> Result<()> {
    let Some(bias) = bias else { return Ok(()) };
    bias.accumulate_on_device(|sums, add| {
        let mut parts = scratch::<f32>(device, column_norms::parts_len(dy.len() / bias.rows(), bias.rows()))?;
        column_norms::column_sums(device, dy, parts.view_mut(), sums, add)
    })
}
