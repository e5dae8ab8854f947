//! The mixture of experts, with autograd: routing, the experts' products over the rows grouped by expert, the shared
//! expert behind its gate, and the load-balancing loss. No capacity and no dropped tokens.
//! Source: `Qwen2MoeSparseMoeBlock` and `load_balancing_loss_func` of transformers.

use super::ModelElement;
use super::low_rank::Applied;
use super::parameter::Parameter;
use super::typed::{Data, Tensor};
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use crate::kernels::cpu::load_balance::Balance;
use crate::kernels::cpu::route::{Groups, group, route, route_backward};
use crate::kernels::cpu::{combine, gemm, norm, swiglu};
use std::ops::Range;
use std::sync::Arc;

/// A SwiGLU MLP: an expert, the shared expert, or a dense layer's.
pub struct Expert<E: ModelElement> {
    /// `[2 * intermediate, hidden]`, gate rows first
    pub gate_up: Arc<Parameter<E>>,
    /// `[hidden, intermediate]`
    pub down: Arc<Parameter<E>>,
}

/// Where each token of a layer goes.
#[derive(Clone)]
pub struct Routing<E: ModelElement> {
    /// `[tokens, experts]`, the router's output
    pub logits: Tensor<E, 2>,
    /// `[tokens, experts]`, softmax over all experts
    pub probs: Tensor<f32, 2>,
    /// `[tokens, k]`, expert indices, best first
    pub chosen: Arc<[u32]>,
    /// `[tokens, k]`, what each chosen expert's output is multiplied by
    pub weights: Tensor<f32, 2>,
    groups: Arc<Groups>,
}

/// Chooses the best `k` experts of each token.
///
/// - `logits`: `[tokens, experts]`
/// - `renormalise`: divides each token's weights by their sum (`norm_topk_prob`)
///
/// Errors: [`Error::Argument`] if `k` is 0 or above the number of experts.
pub fn routing<E: ModelElement>(logits: &Tensor<E, 2>, k: usize, renormalise: bool) -> Result<Routing<E>> {
    let [tokens, experts] = logits.shape();
    if k == 0 || k > experts {
        return Err(Error::argument("routing", "experts_per_token", format!("1 to {experts}"), k));
    }
    let mut wide = Buffer::<f32>::scratch(tokens * experts);
    norm::convert(logits.values(), &mut wide);
    let mut probs = Buffer::<f32>::scratch(tokens * experts);
    let mut weights = Buffer::<f32>::scratch(tokens * k);
    let mut chosen = vec![0; tokens * k];
    route(&wide, experts, k, renormalise, &mut probs, &mut chosen, &mut weights);
    // The reference multiplies by weights of the model's type.
    weights.iter_mut().for_each(|weight| *weight = E::from_f32(*weight).to_f32());
    let groups = Arc::new(group(&chosen, experts, k));
    let (chosen, probs): (Arc<[u32]>, _) = (chosen.into(), Data::ready(probs));
    let back = move |saved: Arc<Data<f32>>, chosen: Arc<[u32]>, d_weights: &[f32], d_probs: Option<&[f32]>| {
        let mut wide = Buffer::<f32>::scratch(tokens * experts);
        route_backward(saved.get(), &chosen, experts, renormalise, d_weights, d_probs, &mut wide);
        let mut d_logits = Buffer::<E>::scratch(tokens * experts);
        norm::convert(&wide, &mut d_logits);
        d_logits
    };
    let (saved, picked) = (probs.clone(), chosen.clone());
    let probs = Tensor::from_operation([tokens, experts], probs, &[logits.node()], false, move |d_probs, sink| {
        sink.add(0, back(saved, picked, &Buffer::<f32>::zeroed(tokens * k), Some(&d_probs)));
        Ok(())
    });
    let (saved, picked) = (probs.data().clone(), chosen.clone());
    let weights = Tensor::from_operation([tokens, k], Data::ready(weights), &[logits.node()], false, move |d_weights, sink| {
        sink.add(0, back(saved, picked, &d_weights, None));
        Ok(())
    });
    Ok(Routing { logits: logits.clone(), probs, chosen, weights, groups })
}

/// The load-balancing loss over all layers' rows together: `experts * sum of f[s, e] * P[e]`; perfect balance gives k.
///
/// Returns a scalar, f32, before any coefficient; none without layers.
pub fn load_balance<E: ModelElement>(layers: &[Routing<E>]) -> Option<Tensor<f32, 0>> {
    let [tokens, experts] = layers.first()?.probs.shape();
    let k = layers[0].weights.shape()[1];
    let mut pooled = Balance::new(experts, k);
    for layer in layers {
        pooled.count(layer.probs.values(), &layer.chosen, None);
    }
    let parents: Vec<_> = layers.iter().map(|layer| layer.probs.node()).collect();
    let count = layers.len();
    let loss = Buffer::copy_of(&[pooled.loss() as f32]);
    Some(Tensor::from_operation([], Data::ready(loss), &parents, false, move |upstream, sink| {
        for layer in 0..count {
            let mut d_probs = Buffer::<f32>::zeroed(tokens * experts);
            pooled.add_gradient(f64::from(upstream[0]), None, &mut d_probs);
            sink.add(layer, d_probs);
        }
        Ok(())
    }))
}

/// `x + sum over the chosen experts of weight * expert(normed) + sigmoid(gate) * shared`.
///
/// - `x`, `normed`, `shared`: `[tokens, hidden]`; `gate`: `[tokens, 1]`
/// - returns `[tokens, hidden]`
///
/// Errors: [`Error::Shape`] if the sizes do not fit.
pub fn mixture<E: ModelElement>(
    x: &Tensor<E, 2>,
    normed: &Tensor<E, 2>,
    routing: &Routing<E>,
    experts: &Arc<[Expert<E>]>,
    shared: &Tensor<E, 2>,
    gate: &Tensor<E, 2>,
) -> Result<Tensor<E, 2>> {
    let [tokens, hidden] = x.shape();
    for (arg, shape, expected) in [
        ("normed", normed.shape(), x.shape()),
        ("shared", shared.shape(), x.shape()),
        ("gate", gate.shape(), [tokens, 1]),
        ("routing", routing.probs.shape(), [tokens, experts.len()]),
    ] {
        if shape != expected {
            return Err(Error::Shape { op: "mixture", arg, expected: format!("{expected:?}"), got: format!("{shape:?}") });
        }
    }
    let grouped = routing.chosen.len();
    let intermediate = experts.first().map_or(0, |expert| expert.down.columns());
    let mut gate_up = Buffer::<E>::scratch(grouped * 2 * intermediate);
    let mut activation = Buffer::<E>::scratch(grouped * intermediate);
    let mut out = Buffer::<E>::scratch(grouped * hidden);
    // The low-rank parts of each expert that has rows, by its index.
    let none = || experts.iter().map(|_| None).collect::<Vec<Option<Applied<E>>>>();
    let (mut gate_up_parts, mut down_parts) = (none(), none());
    each_expert(&routing.groups, |index, rows| {
        let weight = &experts[index].gate_up;
        let tokens = &routing.groups.rows[rows.clone()];
        let y = &mut gate_up[part(&rows, 2 * intermediate)];
        weight.multiply(&mut *y, normed.values(), Some(tokens), None, None);
        gate_up_parts[index] = Some(Applied::forward(weight, y, normed.values(), Some(tokens)));
    });
    swiglu::swiglu(&gate_up, intermediate, &mut activation);
    each_expert(&routing.groups, |index, rows| {
        let weight = &experts[index].down;
        let (from, y) = (&activation[part(&rows, intermediate)], &mut out[part(&rows, hidden)]);
        weight.multiply(&mut *y, from, None, None, None);
        down_parts[index] = Some(Applied::forward(weight, y, from, None));
    });
    drop(activation);
    let mut y = Buffer::copy_of(x.values());
    combine::combine(&out, &routing.groups.places, routing.weights.values(), hidden, &mut y, true);
    let mut open = Buffer::<f32>::scratch(tokens);
    norm::convert(gate.values(), &mut open);
    combine::add_gated(&open, shared.values(), &mut y);

    let parents = [x.node(), normed.node(), routing.weights.node(), shared.node(), gate.node()];
    let trains = experts.iter().any(|expert| expert.gate_up.learns() || expert.down.learns());
    let needs_input = experts.iter().any(|expert| expert.gate_up.learns());
    let seen: Vec<(u64, u64)> = experts.iter().map(|expert| (expert.gate_up.version(), expert.down.version())).collect();
    let (groups, experts) = (routing.groups.clone(), experts.clone());
    let (weights, shared) = (routing.weights.data().clone(), shared.data().clone());
    let normed = needs_input.then(|| normed.data().clone());
    Ok(Tensor::from_operation([tokens, hidden], Data::ready(y), &parents, trains, move |dy, sink| {
        for (expert, (gate_up, down)) in experts.iter().zip(&seen) {
            expert.gate_up.check_version(*gate_up, "mixture")?;
            expert.down.check_version(*down, "mixture")?;
        }
        gate_up_parts.iter().chain(&down_parts).flatten().try_for_each(|parts| parts.check_versions("mixture"))?;
        let mut d_shared = Buffer::<E>::scratch(tokens * hidden);
        let mut d_open = Buffer::<f32>::scratch(tokens);
        combine::add_gated_backward(&open, shared.get(), &dy, &mut d_open, &mut d_shared);
        let mut d_gate = Buffer::<E>::scratch(tokens);
        norm::convert(&d_open, &mut d_gate);
        sink.add(3, d_shared);
        sink.add(4, d_gate);

        let mut d_out = Buffer::<E>::scratch(grouped * hidden);
        let mut d_weights = Buffer::<f32>::scratch(grouped);
        combine::combine_backward(&out, &groups.places, weights.get(), hidden, &dy, &mut d_out, &mut d_weights);
        drop(out);
        sink.add(2, d_weights);
        sink.add(0, dy);

        let mut d_activation = Buffer::<E>::scratch(grouped * intermediate);
        each_expert(&groups, |index, rows| {
            let weight = &experts[index].down;
            let (d_out, d) = (&d_out[part(&rows, hidden)], &mut d_activation[part(&rows, intermediate)]);
            gemm::input_gradient(&mut *d, d_out, weight.product_weight(&weight.read()), false);
            let down = down_parts[index].as_ref().expect("an expert with rows was applied");
            if down.trains() {
                let mut activation = Buffer::<E>::scratch(rows.len() * intermediate);
                swiglu::swiglu(&gate_up[part(&rows, 2 * intermediate)], intermediate, &mut activation);
                down.add_input_gradient(&down.factor_gradients(d_out, &activation, None), d);
            } else {
                down.add_input_gradient(&down.factor_gradients(d_out, &[], None), d);
            }
        });
        let mut activation = Buffer::<E>::scratch(grouped * intermediate);
        swiglu::swiglu_backward_in_place(&mut gate_up, intermediate, &d_activation, Some(&mut activation));
        drop(d_activation);
        let normed = normed.as_ref().map_or(&[][..], |normed| normed.get());
        let mut d_inner = Vec::new();
        for (index, expert) in experts.iter().enumerate() {
            let rows = groups.offsets[index]..groups.offsets[index + 1];
            let tokens = &groups.rows[rows.clone()];
            let (d_out, activation) = (&d_out[part(&rows, hidden)], &activation[part(&rows, intermediate)]);
            expert.down.accumulate(|gradient, add| {
                gemm::weight_gradient(gradient, d_out, activation, None, hidden, intermediate, add);
            });
            let d_gate_up = &gate_up[part(&rows, 2 * intermediate)];
            expert.gate_up.accumulate(|gradient, add| {
                gemm::weight_gradient(gradient, d_gate_up, normed, Some(tokens), 2 * intermediate, hidden, add);
            });
            d_inner.push(gate_up_parts[index].as_ref().map(|gate_up| gate_up.factor_gradients(d_gate_up, normed, Some(tokens))));
        }
        if sink.wants(1) {
            // The gradients of the experts' outputs are read no more: their buffer takes those of the inputs.
            each_expert(&groups, |index, rows| {
                let weight = &experts[index].gate_up;
                let (from, d) = (&gate_up[part(&rows, 2 * intermediate)], &mut d_out[part(&rows, hidden)]);
                gemm::input_gradient(&mut *d, from, weight.product_weight(&weight.read()), false);
                if let (Some(gate_up), Some(d_inner)) = (&gate_up_parts[index], &d_inner[index]) {
                    gate_up.add_input_gradient(d_inner, d);
                }
            });
            let mut ones = Buffer::<f32>::scratch(grouped);
            ones.fill(1.0);
            sink.accumulate(1, tokens * hidden, |d_normed, add| combine::combine(&d_out, &groups.places, &ones, hidden, d_normed, add));
        }
        Ok(())
    }))
}

/// Runs `visit` for each expert that has rows, with its grouped rows.
fn each_expert(groups: &Groups, mut visit: impl FnMut(usize, Range<usize>)) {
    for (index, pair) in groups.offsets.windows(2).enumerate() {
        if pair[0] < pair[1] {
            visit(index, pair[0]..pair[1]);
        }
    }
}

/// The elements of those rows in a matrix of `width` columns.
fn part(rows: &Range<usize>, width: usize) -> Range<usize> {
    rows.start * width..rows.end * width
}
