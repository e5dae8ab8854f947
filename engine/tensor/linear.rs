//! Products with a weight: `linear`, and the two fused forms in which a layer needs it, `norm_linear` and
//! `swiglu_linear`. The fused forms save their input alone and compute the norm or the activation again for the
//! backward pass, which costs a hundredth of the product and spares its memory.

use super::ModelElement;
use super::cuda::linear as cuda;
use super::low_rank::Applied;
use super::parameter::{Layout, Parameter};
use super::place::Place;
use super::typed::{Data, Tensor};
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use crate::kernels::cpu::{gemm, rms_norm, swiglu};
use std::sync::Arc;

/// `x Wᵀ (+ bias) (+ residual)`.
///
/// - `x`: `[tokens, in]`
/// - `weight`: `[out, in]` in panels; `bias`: `[out]`; `residual`: `[tokens, out]`
/// - returns `[tokens, out]`; sums in f32, rounded once
///
/// Errors: [`Error::Shape`] if the sizes do not fit.
pub fn linear<E: ModelElement>(
    x: &Tensor<E, 2>,
    weight: &Arc<Parameter<E>>,
    bias: Option<&Arc<Parameter<E>>>,
    residual: Option<&Tensor<E, 2>>,
) -> Result<Tensor<E, 2>> {
    let [tokens, input] = x.shape();
    check_weight("linear", x, weight)?;
    check_operands(tokens, weight, bias, residual)?;
    if let Some(device) = x.device() {
        return cuda::linear(device, x, weight, bias, residual);
    }
    let (y, applied) = product(x.values(), tokens, weight, bias, residual);
    let trains = weight.trains() || applied.trains();
    // The input is needed for the gradients of weights alone: a frozen weight keeps none.
    let saved = trains.then(|| x.data().clone());
    let trains = trains || bias.is_some_and(|bias| bias.trains());
    let (weight, bias, seen) = (weight.clone(), bias.cloned(), weight.version());
    let parents = [x.node(), residual.and_then(Tensor::node)];
    Ok(Tensor::from_operation([tokens, weight.rows()], Data::ready(y), &parents, trains, move |dy, sink| {
        weight.check_version(seen, "linear")?;
        applied.check_versions("linear")?;
        let x = saved.as_ref().map_or(&[][..], |saved| saved.get());
        let unscaled = applied.unscaled(&dy);
        let d_product = unscaled.as_deref().unwrap_or(&dy);
        weight_gradients(d_product, x, &weight, None);
        bias_gradient(&dy, bias.as_deref());
        let d_inner = applied.factor_gradients(d_product, x, None);
        sink.accumulate::<E>(0, tokens * input, |dx, add| {
            gemm::input_gradient(&mut *dx, d_product, weight.product_weight(&weight.read()), add);
            applied.add_input_gradient(&d_inner, dx);
        });
        sink.add(1, dy);
        Ok(())
    }))
}

/// `silu(gate) * up` of `rms_norm(x) Wᵀ`, whose first half of columns are the gates, for [`linear`] to go on with: what [`norm_linear`] and
/// the beginning of [`swiglu_linear`] give, by one kernel of a device. None where there is none, and where a backward pass may come.
///
/// - arguments as in [`norm_linear`]; returns `[tokens, out / 2]`
///
/// Errors: [`Error::Shape`] if the sizes do not fit.
pub fn norm_swiglu<E: ModelElement>(
    x: &Tensor<E, 2>,
    norm: &Arc<Parameter<E>>,
    eps: f32,
    weight: &Arc<Parameter<E>>,
) -> Result<Option<Tensor<E, 2>>> {
    let Some(device) = x.device() else { return Ok(None) };
    check_weight("norm_linear", x, weight)?;
    check_vector("norm_linear", "norm", x.shape()[1], norm)?;
    cuda::norm_swiglu(device, x, norm, eps, weight)
}

/// `rms_norm(x) Wᵀ (+ bias)`: the input half of attention and of the MLP.
///
/// - `x`: `[tokens, hidden]`; `norm`: `[hidden]`; `weight`: `[out, hidden]` in panels; `bias`: `[out]`
/// - returns `[tokens, out]`
///
/// Errors: [`Error::Shape`] if the sizes do not fit.
pub fn norm_linear<E: ModelElement>(
    x: &Tensor<E, 2>,
    norm: &Arc<Parameter<E>>,
    eps: f32,
    weight: &Arc<Parameter<E>>,
    bias: Option<&Arc<Parameter<E>>>,
) -> Result<Tensor<E, 2>> {
    let [tokens, hidden] = x.shape();
    check_weight("norm_linear", x, weight)?;
    check_vector("norm_linear", "norm", hidden, norm)?;
    check_operands(tokens, weight, bias, None)?;
    if let Some(device) = x.device() {
        return cuda::norm_linear(device, x, norm, eps, weight, bias);
    }
    let mut inv_rms = Buffer::<f32>::scratch(tokens);
    let mut normed = Buffer::<E>::scratch(tokens * hidden);
    rms_norm::rms_norm(x.values(), &norm.read().weight, eps, &mut normed, &mut inv_rms);
    let (y, applied) = product(&normed, tokens, weight, bias, None);
    let (saved, norm, weight, bias) = (x.data().clone(), norm.clone(), weight.clone(), bias.cloned());
    let needs_input = weight.trains() || applied.trains();
    let trains = needs_input || norm.trains() || bias.as_ref().is_some_and(|bias| bias.trains());
    let (seen, norm_seen) = (weight.version(), norm.version());
    Ok(Tensor::from_operation([tokens, weight.rows()], Data::ready(y), &[x.node()], trains, move |dy, sink| {
        weight.check_version(seen, "norm_linear")?;
        norm.check_version(norm_seen, "norm_linear")?;
        applied.check_versions("norm_linear")?;
        let mut normed = Buffer::<E>::scratch(tokens * hidden);
        if needs_input {
            rms_norm::rms_norm(saved.get(), &norm.read().weight, eps, &mut normed, &mut inv_rms);
        }
        bias_gradient(&dy, bias.as_deref());
        let dy = applied.unscaled(&dy).unwrap_or(dy);
        weight_gradients(&dy, &normed, &weight, None);
        let d_inner = applied.factor_gradients(&dy, &normed, None);
        if sink.wants(0) || norm.trains() {
            // The normalised input is read no more: its buffer takes the gradient that flows into the norm.
            gemm::input_gradient(&mut normed[..], &dy, weight.product_weight(&weight.read()), false);
            applied.add_input_gradient(&d_inner, &mut normed);
            drop(dy);
            super::rms_norm::backward(sink, &norm, saved.get(), &inv_rms, &normed);
        }
        Ok(())
    }))
}

/// `swiglu(gate_up) Wᵀ (+ residual)`: the output half of an MLP.
///
/// - `gate_up`: `[tokens, 2 * intermediate]`, gate columns first
/// - `weight`: `[out, intermediate]` in panels; `residual`: `[tokens, out]`
/// - returns `[tokens, out]`
///
/// Errors: [`Error::Shape`] if the sizes do not fit.
pub fn swiglu_linear<E: ModelElement>(
    gate_up: &Tensor<E, 2>,
    weight: &Arc<Parameter<E>>,
    residual: Option<&Tensor<E, 2>>,
) -> Result<Tensor<E, 2>> {
    let [tokens, width] = gate_up.shape();
    let intermediate = width / 2;
    if width % 2 != 0 {
        return Err(Error::Shape {
            op: "swiglu_linear",
            arg: "gate_up",
            expected: "[tokens, 2 * intermediate]".into(),
            got: format!("{:?}", gate_up.shape()),
        });
    }
    check_inputs("swiglu_linear", intermediate, &gate_up.place(), weight)?;
    check_operands(tokens, weight, None, residual)?;
    if let Some(device) = gate_up.device() {
        return cuda::swiglu_linear(device, gate_up, weight, residual);
    }
    let mut activation = Buffer::<E>::scratch(tokens * intermediate);
    swiglu::swiglu(gate_up.values(), intermediate, &mut activation);
    let (y, applied) = product(&activation, tokens, weight, None, residual);
    drop(activation);
    let (saved, weight) = (gate_up.data().clone(), weight.clone());
    let (seen, trains) = (weight.version(), weight.trains() || applied.trains());
    let parents = [gate_up.node(), residual.and_then(Tensor::node)];
    Ok(Tensor::from_operation([tokens, weight.rows()], Data::ready(y), &parents, trains, move |dy, sink| {
        weight.check_version(seen, "swiglu_linear")?;
        applied.check_versions("swiglu_linear")?;
        let mut activation = Buffer::<E>::scratch(tokens * intermediate);
        let unscaled = applied.unscaled(&dy);
        let d_product = unscaled.as_deref().unwrap_or(&dy);
        let d_inner = if applied.trains() {
            // The factors' part of the gradient flows back through the activation, which they must see first.
            swiglu::swiglu(saved.get(), intermediate, &mut activation);
            applied.factor_gradients(d_product, &activation, None)
        } else {
            applied.factor_gradients(d_product, &[], None)
        };
        let mut d_activation = Buffer::<E>::scratch(tokens * intermediate);
        gemm::input_gradient(&mut d_activation[..], d_product, weight.product_weight(&weight.read()), false);
        applied.add_input_gradient(&d_inner, &mut d_activation);
        let mut d_gate_up = Buffer::<E>::scratch(tokens * width);
        swiglu::swiglu_backward(saved.get(), intermediate, &d_activation, &mut d_gate_up, Some(&mut activation));
        drop(d_activation);
        weight_gradients(d_product, &activation, &weight, None);
        sink.add(0, d_gate_up);
        sink.add(1, dy);
        Ok(())
    }))
}

/// The product itself, on slices, and the low-rank parts of the weight that take part.
fn product<E: ModelElement>(
    x: &[E],
    tokens: usize,
    weight: &Parameter<E>,
    bias: Option<&Arc<Parameter<E>>>,
    residual: Option<&Tensor<E, 2>>,
) -> (Buffer<E>, Applied<E>) {
    let mut y = Buffer::scratch(tokens * weight.rows());
    let bias = bias.map(|bias| bias.read());
    let bias = bias.as_ref().map(|bias| &bias.weight[..]);
    let applied = Applied::product(weight, &mut y[..], x, None, bias, residual.map(Tensor::values));
    (y, applied)
}

fn check_operands<E: ModelElement>(
    tokens: usize,
    weight: &Parameter<E>,
    bias: Option<&Arc<Parameter<E>>>,
    residual: Option<&Tensor<E, 2>>,
) -> Result<()> {
    if let Some(bias) = bias {
        check_vector("linear", "bias", weight.rows(), bias)?;
        check_place("linear", "bias", weight.place(), bias.place())?;
    }
    let Some(residual) = residual else { return Ok(()) };
    check_place("linear", "residual", weight.place(), &residual.place())?;
    if residual.shape() != [tokens, weight.rows()] {
        return Err(Error::Shape {
            op: "linear",
            arg: "residual",
            expected: format!("{:?}", [tokens, weight.rows()]),
            got: format!("{:?}", residual.shape()),
        });
    }
    Ok(())
}

/// Adds `dyᵀ x` and the column sums of `dy` to the gradients of those parameters that train.
pub(super) fn weight_gradients<E: ModelElement>(dy: &[E], x: &[E], weight: &Parameter<E>, bias: Option<&Parameter<E>>) {
    weight.accumulate(|gradient, add| gemm::weight_gradient(gradient, dy, x, None, weight.rows(), weight.columns(), add));
    bias_gradient(dy, bias);
}

fn bias_gradient<E: ModelElement>(dy: &[E], bias: Option<&Parameter<E>>) {
    if let Some(bias) = bias {
        bias.accumulate(|gradient, add| gemm::bias_gradient(gradient, dy, add));
    }
}

/// Errors: [`Error::Device`] if the two lie apart.
pub(super) fn check_place(op: &'static str, arg: &'static str, expected: &Place, got: &Place) -> Result<()> {
    if expected.is(got) {
        return Ok(());
    }
    Err(Error::Device { op, what: format!("`{arg}` should be on {expected}, as its partner is, got one on {got}") })
}

/// Whether `x` `[tokens, in]` can be multiplied by `weight`.
pub(super) fn check_weight<E: ModelElement>(op: &'static str, x: &Tensor<E, 2>, weight: &Parameter<E>) -> Result<()> {
    check_inputs(op, x.shape()[1], &x.place(), weight)
}

/// As [`check_weight`], of rows of `input` elements at `place`.
fn check_inputs<E: ModelElement>(op: &'static str, input: usize, place: &Place, weight: &Parameter<E>) -> Result<()> {
    check_place(op, "x", weight.place(), place)?;
    assert!(place.device().is_some() || weight.layout() != Layout::Rows, "{op}: {} is not packed", weight.name());
    if weight.columns() != input {
        return Err(Error::Shape {
            op,
            arg: "x",
            expected: format!("[tokens, {}] for {}", weight.columns(), weight.name()),
            got: format!("[tokens, {input}]"),
        });
    }
    Ok(())
}

pub(super) fn check_vector<E: ModelElement>(op: &'static str, arg: &'static str, len: usize, vector: &Parameter<E>) -> Result<()> {
    if vector.rows() != len || vector.columns() != 1 {
        return Err(Error::Shape {
            op,
            arg,
            expected: format!("[{len}]"),
            got: format!("[{}, {}] in {}", vector.rows(), vector.columns(), vector.name()),
        });
    }
    Ok(())
}
