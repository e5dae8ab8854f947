//! The mixture of experts on a GPU; see tensor/experts.rs. How many rows an expert has stays on the device: grouped products
//! read it there, so that a step does not wait.

use super::low_rank::Applied;
use super::{activation, gradient, operand, scratch};
use crate::error::Result;
use crate::kernels::buffer::Buffer;
use crate::kernels::cuda::device::Device;
use crate::kernels::cuda::memory::DeviceBuffer;
use crate::kernels::cuda::product::{self, Groups};
use crate::kernels::cuda::route::{self, Groups as Sorted, Routing as Settings};
use crate::kernels::cuda::{elements, embedding::embed, norm, swiglu};
use crate::kernels::element::Dtype;
use crate::tensor::experts::{self, Expert, Routing};
use crate::tensor::place::downloaded;
use crate::tensor::{Data, ModelElement, Tensor};
use std::sync::Arc;

/// Which experts each token visits, and the visits sorted by expert.
pub struct Choices {
    chosen: DeviceBuffer<i32>,
    sorted: Sorted,
    k: usize,
}

impl Choices {
    /// `[tokens, k]`, on the host; waits for the device.
    pub fn chosen(&self) -> Result<Vec<u32>> {
        Ok(self.chosen.to_vec()?.into_iter().map(|expert| expert as u32).collect())
    }
}

/// As [`crate::tensor::experts::routing`].
pub fn routing<E: ModelElement>(device: &Arc<Device>, logits: &Tensor<E, 2>, k: usize, renormalise: bool) -> Result<Routing<E>> {
    let [tokens, experts] = logits.shape();
    let settings = Settings { experts, k, renormalise };
    let mut wide = scratch::<f32>(device, tokens * experts)?;
    elements::widen(device, logits.cuda(), wide.view_mut())?;
    let (mut probs, mut weights) = (activation::<f32>(device, tokens * experts)?, activation::<f32>(device, tokens * k)?);
    let mut chosen = activation::<i32>(device, tokens * k)?;
    route::route(device, settings, wide.view(), probs.view_mut(), chosen.view_mut(), weights.view_mut())?;
    if E::DTYPE != Dtype::F32 {
        // The reference multiplies by weights of the model's type.
        let mut narrow = scratch::<E>(device, tokens * k)?;
        elements::narrow(device, weights.view(), narrow.view_mut())?;
        elements::widen(device, narrow.view(), weights.view_mut())?;
    }
    let sorted = route::group(device, settings, chosen.view())?;
    let choices = Arc::new(Choices { chosen, sorted, k });
    let probs = Data::on_device(probs);
    let back = {
        let (device, probs, choices) = (device.clone(), probs.clone(), choices.clone());
        move |d_weights: &DeviceBuffer<f32>, d_probs: Option<&DeviceBuffer<f32>>| -> Result<DeviceBuffer<E>> {
            let mut wide = scratch::<f32>(&device, tokens * experts)?;
            let (probs, d_probs) = (probs.cuda().view(), d_probs.map(DeviceBuffer::view));
            route::route_backward(&device, settings, probs, choices.chosen.view(), d_weights.view(), d_probs, wide.view_mut())?;
            let mut d_logits = gradient::<E>(&device, tokens * experts)?;
            elements::narrow(&device, wide.view(), d_logits.view_mut())?;
            Ok(d_logits)
        }
    };
    let (back_probs, on) = (back.clone(), device.clone());
    let probs = Tensor::from_operation_anywhere([tokens, experts], probs, &[logits.node()], false, move |d_probs, sink| {
        let none = DeviceBuffer::zeroed(&on, super::GRADIENTS, tokens * k)?;
        sink.add_on_device(0, back_probs(&none, Some(d_probs.cuda()))?)
    });
    let weights = Tensor::from_operation_on_device([tokens, k], weights, &[logits.node()], false, move |d_weights, sink| {
        sink.add_on_device(0, back(&d_weights, None)?)
    });
    Ok(Routing { logits: logits.clone(), probs, weights, choices: experts::Choices::Cuda(choices) })
}

/// As [`crate::tensor::experts::load_balance`], of at least one layer.
pub fn load_balance<E: ModelElement>(device: &Arc<Device>, layers: &[Routing<E>]) -> Result<Tensor<f32, 0>> {
    let [tokens, experts] = layers[0].probs.shape();
    let rows = layers.len() * tokens;
    let (mut visits, mut sums) = (activation::<f32>(device, experts)?, scratch::<f32>(device, experts)?);
    let mut parts = scratch::<f32>(device, norm::parts_len(tokens, experts))?;
    for (index, layer) in layers.iter().enumerate() {
        route::count_visits(device, layer.choices.cuda().sorted.offsets.view(), visits.view_mut(), index > 0)?;
        norm::column_sums(device, layer.probs.cuda(), parts.view_mut(), sums.view_mut(), index > 0)?;
    }
    let mut loss = activation::<f32>(device, 1)?;
    route::balance(device, visits.view(), sums.view(), rows, loss.view_mut())?;
    let parents: Vec<_> = layers.iter().map(|layer| layer.probs.node()).collect();
    let (device, count) = (device.clone(), layers.len());
    Ok(Tensor::from_operation([], Data::deferred(move || downloaded(&loss)), &parents, false, move |upstream: Buffer<f32>, sink| {
        for layer in 0..count {
            let mut d_probs = gradient::<f32>(&device, tokens * experts)?;
            route::balance_backward(&device, visits.view(), rows, f64::from(upstream[0]), d_probs.view_mut())?;
            sink.add_on_device(layer, d_probs)?;
        }
        Ok(())
    }))
}

/// As [`crate::tensor::experts::mixture`], of experts whose weights are stacked, as their low-rank parts are.
pub fn mixture<E: ModelElement>(
    x: &Tensor<E, 2>,
    normed: &Tensor<E, 2>,
    routing: &Routing<E>,
    experts: &Expert<E>,
    shared: &Tensor<E, 2>,
    gate: &Tensor<E, 2>,
) -> Result<Tensor<E, 2>> {
    let device = experts.down.place().device().expect("stacked experts lie on a device");
    let [tokens, hidden] = x.shape();
    let choices = routing.choices.cuda().clone();
    let (grouped, inter) = (tokens * choices.k, experts.down.columns());
    let mut gate_up = activation::<E>(device, grouped * 2 * inter)?;
    let mut out = activation::<E>(device, grouped * hidden)?;
    let (gate_up_parts, down_parts) = {
        let groups = Some(Groups { offsets: choices.sorted.offsets.view() });
        let mut rows = scratch::<E>(device, grouped * hidden)?;
        embed(device, normed.cuda(), hidden, choices.sorted.rows.view(), rows.view_mut())?;
        let first = Applied::product(device, &experts.gate_up, gate_up.view_mut(), rows.view(), None, None, groups)?;
        let mut activation = scratch::<E>(device, grouped * inter)?;
        swiglu::swiglu(device, gate_up.view(), inter, activation.view_mut())?;
        (first, Applied::product(device, &experts.down, out.view_mut(), activation.view(), None, None, groups)?)
    };
    let mut y = activation::<E>(device, tokens * hidden)?;
    y.copy_from(x.cuda())?;
    route::combine(device, out.view(), choices.sorted.places.view(), routing.weights.cuda(), hidden, y.view_mut(), true)?;
    let mut open = activation::<f32>(device, tokens)?;
    elements::widen(device, gate.cuda(), open.view_mut())?;
    route::add_gated(device, open.view(), shared.cuda(), y.view_mut())?;

    let parents = [x.node(), normed.node(), routing.weights.node(), shared.node(), gate.node()];
    let needs_input = experts.gate_up.trains() || gate_up_parts.trains();
    let trains = needs_input || experts.down.trains() || down_parts.trains();
    let seen = (experts.gate_up.version(), experts.down.version());
    let (device, gate_up_weight, down_weight) = (device.clone(), experts.gate_up.clone(), experts.down.clone());
    let (weights, shared) = (routing.weights.data().clone(), shared.data().clone());
    let normed = needs_input.then(|| normed.data().clone());
    Ok(Tensor::from_operation_on_device([tokens, hidden], y, &parents, trains, move |dy, sink| {
        gate_up_weight.check_version(seen.0, "mixture")?;
        down_weight.check_version(seen.1, "mixture")?;
        gate_up_parts.check_versions("mixture")?;
        down_parts.check_versions("mixture")?;
        let sorted = &choices.sorted;
        let groups = Some(Groups { offsets: sorted.offsets.view() });
        let (mut d_shared, mut d_open) = (gradient::<E>(&device, tokens * hidden)?, scratch::<f32>(&device, tokens)?);
        route::add_gated_backward(&device, open.view(), shared.cuda().view(), dy.view(), d_open.view_mut(), d_shared.view_mut())?;
        let mut d_gate = gradient::<E>(&device, tokens)?;
        elements::narrow(&device, d_open.view(), d_gate.view_mut())?;
        sink.add_on_device(3, d_shared)?;
        sink.add_on_device(4, d_gate)?;

        let (mut d_out, mut d_weights) = (gradient::<E>(&device, grouped * hidden)?, gradient::<f32>(&device, grouped)?);
        let (places, weights) = (sorted.places.view(), weights.cuda().view());
        route::combine_backward(&device, out.view(), places, weights, hidden, dy.view(), d_out.view_mut(), d_weights.view_mut())?;
        drop(out);
        sink.add_on_device(2, d_weights)?;
        sink.add_on_device(0, dy)?;

        let mut d_out = down_parts.unscaled(&device, &down_weight, d_out.view(), groups)?.unwrap_or(d_out);
        let mut activation = scratch::<E>(&device, grouped * inter)?;
        let x = if down_parts.trains() {
            // The factors' part of the gradient flows back through the activation, which they must see first.
            swiglu::swiglu(&device, gate_up.view(), inter, activation.view_mut())?;
            Some(activation.view())
        } else {
            None
        };
        let d_inner = down_parts.factor_gradients(&device, d_out.view(), x, groups)?;
        let mut d_activation = gradient::<E>(&device, grouped * inter)?;
        let down = down_weight.read();
        product::input_gradient(&device, d_activation.view_mut(), d_out.view(), operand(&down_weight, &down, groups), false, groups)?;
        drop(down);
        down_parts.add_input_gradient(&device, &d_inner, d_activation.view_mut(), groups)?;
        let place = swiglu::Gradient::InPlace(gate_up.view_mut());
        swiglu::swiglu_backward(&device, place, inter, d_activation.view(), Some(activation.view_mut()))?;
        drop(d_activation);
        down_weight.accumulate_on_device(|dw, add| {
            product::weight_gradient(&device, dw, d_out.view(), activation.view(), (hidden, inter), add, groups)
        })?;
        drop(activation);
        let d_gate_up = gate_up_parts.unscaled(&device, &gate_up_weight, gate_up.view(), groups)?.unwrap_or(gate_up);
        let rows = match &normed {
            None => None,
            Some(normed) => {
                let mut rows = scratch::<E>(&device, grouped * hidden)?;
                embed(&device, normed.cuda().view(), hidden, sorted.rows.view(), rows.view_mut())?;
                Some(rows)
            }
        };
        let x = rows.as_ref().map(DeviceBuffer::view);
        gate_up_weight.accumulate_on_device(|dw, add| {
            let x = x.expect("experts that train have their input");
            product::weight_gradient(&device, dw, d_gate_up.view(), x, (2 * inter, hidden), add, groups)
        })?;
        let d_inner = gate_up_parts.factor_gradients(&device, d_gate_up.view(), x, groups)?;
        drop(rows);
        if sink.wants(1) {
            // The gradients of the experts' outputs are read no more: their buffer takes those of the inputs.
            let value = gate_up_weight.read();
            product::input_gradient(&device, d_out.view_mut(), d_gate_up.view(), operand(&gate_up_weight, &value, groups), false, groups)?;
            drop(value);
            gate_up_parts.add_input_gradient(&device, &d_inner, d_out.view_mut(), groups)?;
            let ones = DeviceBuffer::copy_of(&device, super::SCRATCH, &vec![1.0f32; grouped])?;
            sink.accumulate_on_device::<E>(1, &device, tokens * hidden, |d_normed, add| {
                route::combine(&device, d_out.view(), sorted.places.view(), ones.view(), hidden, d_normed, add)
            })?;
        }
        Ok(())
    }))
}
