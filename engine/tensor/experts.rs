//! The mixture of experts, with autograd: routing, the experts' products over the rows grouped by expert, the shared
//! expert behind its gate, and the load-balancing loss. No capacity and no dropped tokens.
//! Source: `Qwen2MoeSparseMoeBlock` and `load_balancing_loss_func` of transformers.

use super::ModelElement;
use super::cuda::experts as cuda;
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

/// The experts of a layer.
pub enum Experts<E: ModelElement> {
    /// On the host, each by itself.
    Each(Arc<[Expert<E>]>),
    /// On a device, where one launch multiplies by all: `[experts * 2 * intermediate, hidden]` and `[experts * hidden, intermediate]`.
    Stacked { count: usize, weights: Expert<E> },
}

impl<E: ModelElement> Experts<E> {
    pub fn count(&self) -> usize {
        match self {
            Self::Each(experts) => experts.len(),
            Self::Stacked { count, .. } => *count,
        }
    }

    /// The weights of expert `index`, and which rows of both it is.
    pub fn get(&self, index: usize) -> (&Expert<E>, Range<usize>, Range<usize>) {
        match self {
            Self::Each(experts) => {
                let expert = &experts[index];
                (expert, 0..expert.gate_up.rows(), 0..expert.down.rows())
            }
            Self::Stacked { count, weights } => {
                let part = |rows: usize| index * (rows / count)..(index + 1) * (rows / count);
                (weights, part(weights.gate_up.rows()), part(weights.down.rows()))
            }
        }
    }
}

/// Where each token of a layer goes.
#[derive(Clone)]
pub struct Routing<E: ModelElement> {
    /// `[tokens, experts]`, the router's output
    pub logits: Tensor<E, 2>,
    /// `[tokens, experts]`, softmax over all experts
    pub probs: Tensor<f32, 2>,
    /// `[tokens, k]`, what each chosen expert's output is multiplied by
    pub weights: Tensor<f32, 2>,
    pub(super) choices: Choices,
}

/// `[tokens, k]`, expert indices, best first; and the same sorted by expert.
#[derive(Clone)]
pub(super) enum Choices {
    Host { chosen: Arc<[u32]>, groups: Arc<Groups> },
    Cuda(Arc<cuda::Choices>),
}

impl Choices {
    /// Those on the host. Panics if they lie on a device, where the layer then lies too.
    fn host(&self) -> (&Arc<[u32]>, &Arc<Groups>) {
        match self {
            Self::Host { chosen, groups } => (chosen, groups),
            Self::Cuda(_) => panic!("choices on a device met experts on the host"),
        }
    }

    /// Those on a device. Panics as [`Choices::host`] does.
    pub(super) fn cuda(&self) -> &Arc<cuda::Choices> {
        match self {
            Self::Host { .. } => panic!("choices on the host met experts on a device"),
            Self::Cuda(choices) => choices,
        }
    }
}

impl<E: ModelElement> Routing<E> {
    /// `[tokens, k]`, expert indices, best first, on the host.
    ///
    /// Errors: those of the device.
    pub fn chosen(&self) -> Result<Vec<u32>> {
        match &self.choices {
            Choices::Host { chosen, .. } => Ok(chosen.to_vec()),
            Choices::Cuda(choices) => choices.chosen(),
        }
    }
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
    if let Some(device) = logits.device() {
        return cuda::routing(device, logits, k, renormalise);
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
    Ok(Routing { logits: logits.clone(), probs, weights, choices: Choices::Host { chosen, groups } })
}

/// The load-balancing loss over all layers' rows together: `experts * sum of f[s, e] * P[e]`; perfect balance gives k.
///
/// Returns a scalar on the host, f32, before any coefficient; none without layers. Of layers on a device it is fetched when it
/// is read.
///
/// Errors: those of the device.
pub fn load_balance<E: ModelElement>(layers: &[Routing<E>]) -> Result<Option<Tensor<f32, 0>>> {
    let Some(first) = layers.first() else { return Ok(None) };
    if let Some(device) = first.probs.device() {
        return cuda::load_balance(device, layers).map(Some);
    }
    let [tokens, experts] = first.probs.shape();
    let k = layers[0].weights.shape()[1];
    let mut pooled = Balance::new(experts, k);
    for layer in layers {
        pooled.count(layer.probs.values(), layer.choices.host().0, None);
    }
    let parents: Vec<_> = layers.iter().map(|layer| layer.probs.node()).collect();
    let count = layers.len();
    let loss = Buffer::copy_of(&[pooled.loss() as f32]);
    Ok(Some(Tensor::from_operation([], Data::ready(loss), &parents, false, move |upstream, sink| {
        for layer in 0..count {
            let mut d_probs = Buffer::<f32>::zeroed(tokens * experts);
            pooled.add_gradient(f64::from(upstream[0]), None, &mut d_probs);
            sink.add(layer, d_probs);
        }
        Ok(())
    })))
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
    experts: &Experts<E>,
    shared: &Tensor<E, 2>,
    gate: &Tensor<E, 2>,
) -> Result<Tensor<E, 2>> {
    let [tokens, hidden] = x.shape();
    for (arg, shape, expected) in [
        ("normed", normed.shape(), x.shape()),
        ("shared", shared.shape(), x.shape()),
        ("gate", gate.shape(), [tokens, 1]),
        ("routing", routing.probs.shape(), [tokens, experts.count()]),
    ] {
        if shape != expected {
            return Err(Error::Shape { op: "mixture", arg, expected: format!("{expected:?}"), got: format!("{shape:?}") });
        }
    }
    let experts = match experts {
        Experts::Each(experts) => experts,
        Experts::Stacked { weights, .. } => return cuda::mixture(x, normed, routing, weights, shared, gate),
    };
    let (chosen, groups) = routing.choices.host();
    let grouped = chosen.len();
    let intermediate = experts.first().map_or(0, |expert| expert.down.columns());
    let mut gate_up = Buffer::<E>::scratch(grouped * 2 * intermediate);
    let mut activation = Buffer::<E>::scratch(grouped * intermediate);
    let mut out = Buffer::<E>::scratch(grouped * hidden);
    // The low-rank parts of each expert that has rows, by its index.
    let none = || experts.iter().map(|_| None).collect::<Vec<Option<Applied<E>>>>();
    let (mut gate_up_parts, mut down_parts) = (none(), none());
    each_expert(groups, |index, rows| {
        let weight = &experts[index].gate_up;
        let tokens = &groups.rows[rows.clone()];
        let y = &mut gate_up[part(&rows, 2 * intermediate)];
        gate_up_parts[index] = Some(Applied::product(weight, y, normed.values(), Some(tokens), None, None));
    });
    swiglu::swiglu(&gate_up, intermediate, &mut activation);
    each_expert(groups, |index, rows| {
        let weight = &experts[index].down;
        let (from, y) = (&activation[part(&rows, intermediate)], &mut out[part(&rows, hidden)]);
        down_parts[index] = Some(Applied::product(weight, y, from, None, None, None));
    });
    drop(activation);
    let mut y = Buffer::copy_of(x.values());
    combine::combine(&out, &groups.places, routing.weights.values(), hidden, &mut y, true);
    let mut open = Buffer::<f32>::scratch(tokens);
    norm::convert(gate.values(), &mut open);
    combine::add_gated(&open, shared.values(), &mut y);

    let parents = [x.node(), normed.node(), routing.weights.node(), shared.node(), gate.node()];
    let trains = experts.iter().any(|expert| expert.gate_up.learns() || expert.down.learns());
    let needs_input = experts.iter().any(|expert| expert.gate_up.learns());
    let seen: Vec<(u64, u64)> = experts.iter().map(|expert| (expert.gate_up.version(), expert.down.version())).collect();
    let (groups, experts) = (groups.clone(), experts.clone());
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
            let (d_out, d) = (&mut d_out[part(&rows, hidden)], &mut d_activation[part(&rows, intermediate)]);
            let down = down_parts[index].as_ref().expect("an expert with rows was applied");
            if let Some(unscaled) = down.unscaled(d_out) {
                d_out.copy_from_slice(&unscaled);
            }
            gemm::input_gradient(&mut *d, d_out, weight.product_weight(&weight.read()), false);
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
            let d_gate_up = &mut gate_up[part(&rows, 2 * intermediate)];
            if let Some(unscaled) = gate_up_parts[index].as_ref().and_then(|gate_up| gate_up.unscaled(d_gate_up)) {
                d_gate_up.copy_from_slice(&unscaled);
            }
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
