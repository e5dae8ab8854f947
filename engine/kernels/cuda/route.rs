//! Launchers of route.cu: the routing of a mixture of experts, the choices sorted by expert on the device, and the way of the
//! experts' outputs back to their tokens. The products between are product.rs's, with groups; rows are gathered by
//! [`super::embedding::embed`].

use super::device::Device;
use super::launch::Launch;
use super::memory::{DeviceBuffer, View, ViewMut};
use super::program::{Program, Variant};
use crate::error::Result;
use crate::kernels::element::Float;
use std::sync::Arc;

/// Warps of a block, one token each.
const WARPS: usize = 4;

/// How tokens choose experts.
#[derive(Clone, Copy, Debug)]
pub struct Routing {
    pub experts: usize,
    /// Experts a token visits.
    pub k: usize,
    /// Divides each token's weights by their sum (`norm_topk_prob`).
    pub renormalise: bool,
}

impl Routing {
    fn tokens(&self, logits: usize) -> usize {
        let Self { experts, k, .. } = *self;
        assert!(experts > 0 && logits.is_multiple_of(experts), "route: {logits} logits of {experts} experts");
        assert!(k > 0 && k <= experts, "route: {k} of {experts} experts");
        logits / experts
    }
}

/// Probabilities of all experts, and the best `k` with their weights, best first; of equal ones the lower index. A NaN comes
/// last, and its token's weights are NaN.
///
/// - `logits`, `probs`: `[tokens, experts]`, f32; `chosen`, `weights`: `[tokens, k]`
pub fn route(
    device: &Device,
    routing: Routing,
    logits: View<f32>,
    mut probs: ViewMut<f32>,
    mut chosen: ViewMut<i32>,
    mut weights: ViewMut<f32>,
) -> Result<()> {
    let tokens = routing.tokens(logits.len());
    assert!(probs.len() == logits.len(), "route: {} probabilities for {} logits", probs.len(), logits.len());
    assert!(chosen.len() == tokens * routing.k && weights.len() == chosen.len(), "route: {} choices of {tokens} tokens", chosen.len());
    if tokens == 0 {
        return Ok(());
    }
    let launch = Launch::new(device, "route", Variant::of::<f32>(Program::Route), "route")?.read(logits);
    let launch = launch.int(tokens).int(routing.experts).int(routing.k).int(usize::from(routing.renormalise));
    let launch = launch.write(&mut probs).write(&mut chosen).write(&mut weights);
    // SAFETY: the arguments are route's. A warp stays in its token; k is at most the number of experts.
    unsafe { launch.run((tokens.div_ceil(WARPS), 1, 1), 32 * WARPS, 0) }
}

/// Backward step of [`route`].
///
/// - `d_weights`: `[tokens, k]`; `d_probs`: `[tokens, experts]`, a further gradient on the probabilities
/// - `d_logits`: `[tokens, experts]`, overwritten
pub fn route_backward(
    device: &Device,
    routing: Routing,
    probs: View<f32>,
    chosen: View<i32>,
    d_weights: View<f32>,
    d_probs: Option<View<f32>>,
    mut d_logits: ViewMut<f32>,
) -> Result<()> {
    let tokens = routing.tokens(probs.len());
    assert!(chosen.len() == tokens * routing.k && d_weights.len() == chosen.len(), "route: {} choices of {tokens} tokens", chosen.len());
    assert!(d_logits.len() == probs.len(), "route: {} logit gradients for {} logits", d_logits.len(), probs.len());
    assert!(d_probs.is_none_or(|d| d.len() == probs.len()), "route: the probabilities' gradient has the wrong length");
    if tokens == 0 {
        return Ok(());
    }
    let launch = Launch::new(device, "route_backward", Variant::of::<f32>(Program::Route), "route_backward")?.read(probs).read(chosen);
    let launch = launch.int(tokens).int(routing.experts).int(routing.k).int(usize::from(routing.renormalise));
    let launch = launch.read(d_weights).read_or_null(d_probs).write(&mut d_logits);
    // SAFETY: the arguments are route_backward's. A warp stays in its token; the choices are route's, below `experts`.
    unsafe { launch.run((tokens.div_ceil(WARPS), 1, 1), 32 * WARPS, 0) }
}

/// The choices of a batch sorted by expert, each expert's in token order, all on the device.
pub struct Groups {
    /// `[experts + 1]`: grouped rows `offsets[e]..offsets[e + 1]` belong to expert `e`.
    pub offsets: DeviceBuffer<i32>,
    /// `[tokens * k]`: the token of each grouped row.
    pub rows: DeviceBuffer<i32>,
    /// `[tokens * k]`: the choice, `token * k + slot`, of each grouped row.
    pub slots: DeviceBuffer<i32>,
    /// `[tokens * k]`: the grouped row of each choice; the inverse of `slots`.
    pub places: DeviceBuffer<i32>,
}

/// Sorts the choices by expert. Stable, so the order is fixed.
///
/// - `chosen`: `[tokens, k]`, each below `experts`
pub fn group(device: &Arc<Device>, routing: Routing, chosen: View<i32>) -> Result<Groups> {
    let op = "group";
    let (count, experts) = (chosen.len(), routing.experts);
    assert!(routing.k > 0 && count.is_multiple_of(routing.k), "group: {count} choices of {} a token", routing.k);
    let new = |len| DeviceBuffer::<i32>::scratch(device, "expert groups", len);
    let mut groups = Groups { offsets: new(experts + 1)?, rows: new(count)?, slots: new(count)?, places: new(count)? };
    let mut counts = new(experts)?;
    let variant = || Variant::of::<f32>(Program::Route);
    let launch = Launch::new(device, op, variant(), "count_choices")?.read(chosen).int(count).write(&mut counts.view_mut());
    // SAFETY: the arguments are count_choices's; block e writes counts[e].
    unsafe { launch.run((experts, 1, 1), 256, 0)? };
    let launch = Launch::new(device, op, variant(), "sum_counts")?.read(counts.view()).int(experts).write(&mut groups.offsets.view_mut());
    // SAFETY: the arguments are sum_counts's; one thread writes experts + 1 offsets.
    unsafe { launch.run((1, 1, 1), 32, 0)? };
    if count > 0 {
        let launch = Launch::new(device, op, variant(), "place_choices")?.read(chosen).int(count).int(routing.k);
        let launch = launch.read(groups.offsets.view()).write(&mut groups.rows.view_mut());
        let launch = launch.write(&mut groups.slots.view_mut()).write(&mut groups.places.view_mut());
        // SAFETY: the arguments are place_choices's; block e writes the rows from offsets[e] on, as many as it counted, and the
        // place of each of its own choices.
        unsafe { launch.run((experts, 1, 1), 256, 0)? };
    }
    Ok(groups)
}

/// `y[token] (+)= sum over its slots, in slot order, of weight * expert_out[grouped row]`, in f32, rounded once.
///
/// - `expert_out`: `[tokens * k, hidden]`; `places`: `[tokens * k]`; `weights`: `[tokens, k]`, f32; `y`: `[tokens, hidden]`
pub fn combine<E: Float>(
    device: &Device,
    expert_out: View<E>,
    places: View<i32>,
    weights: View<f32>,
    hidden: usize,
    mut y: ViewMut<E>,
    add: bool,
) -> Result<()> {
    let (tokens, k) = sizes(expert_out.len(), places.len(), weights.len(), hidden, y.len());
    if tokens == 0 {
        return Ok(());
    }
    let launch = Launch::new(device, "combine", Variant::of::<E>(Program::Route), "combine")?;
    let launch = launch.read(expert_out).read(places).read(weights).int(k).int(hidden).write(&mut y).int(usize::from(add));
    // SAFETY: the arguments are combine's. Block t writes row t; places are grouped rows, made by `group`.
    unsafe { launch.run((tokens, 1, 1), 256, 0) }
}

/// Backward step of [`combine`]: `d_expert_out[grouped row] = weight * dy[token]` and
/// `d_weights[choice] = dy[token] . expert_out[grouped row]`, both overwritten.
#[allow(clippy::too_many_arguments, reason = "the operands of one step")]
pub fn combine_backward<E: Float>(
    device: &Device,
    expert_out: View<E>,
    places: View<i32>,
    weights: View<f32>,
    hidden: usize,
    dy: View<E>,
    mut d_expert_out: ViewMut<E>,
    mut d_weights: ViewMut<f32>,
) -> Result<()> {
    let (tokens, k) = sizes(expert_out.len(), places.len(), weights.len(), hidden, dy.len());
    assert!(d_expert_out.len() == expert_out.len(), "combine: {} gradients of {} outputs", d_expert_out.len(), expert_out.len());
    assert!(d_weights.len() == weights.len(), "combine: {} gradients of {} weights", d_weights.len(), weights.len());
    if tokens == 0 || k == 0 {
        return Ok(());
    }
    let launch = Launch::new(device, "combine_backward", Variant::of::<E>(Program::Route), "combine_backward")?;
    let launch = launch.read(expert_out).read(places).read(weights).int(k).int(hidden).read(dy);
    let launch = launch.write(&mut d_expert_out).write(&mut d_weights);
    // SAFETY: the arguments are combine_backward's. A block writes its choice's grouped row, which no other choice has.
    unsafe { launch.run((tokens * k, 1, 1), 256, 0) }
}

fn sizes(expert_out: usize, places: usize, weights: usize, hidden: usize, y: usize) -> (usize, usize) {
    assert!(hidden > 0 && y.is_multiple_of(hidden), "combine: {y} values do not divide into rows of {hidden}");
    let tokens = y / hidden;
    let k = weights.checked_div(tokens).unwrap_or(0);
    assert!(weights == tokens * k && places == weights, "combine: {weights} weights, {places} places for {tokens} tokens");
    assert!(expert_out == weights * hidden, "combine: {expert_out} outputs for {weights} rows of {hidden}");
    (tokens, k)
}

/// `y[token] += sigmoid(gate[token]) * shared[token]`, in f32, rounded once.
///
/// - `gate`: `[tokens]`, f32, before the sigmoid; `shared`, `y`: `[tokens, hidden]`
pub fn add_gated<E: Float>(device: &Device, gate: View<f32>, shared: View<E>, mut y: ViewMut<E>) -> Result<()> {
    let tokens = gate.len();
    assert!(shared.len() == y.len() && (tokens == 0 || y.len().is_multiple_of(tokens)), "add_gated: {} values, {tokens} gates", y.len());
    if y.is_empty() {
        return Ok(());
    }
    let hidden = y.len() / tokens;
    let launch = Launch::new(device, "add_gated", Variant::of::<E>(Program::Route), "add_gated")?;
    let launch = launch.read(gate).read(shared).write(&mut y).int(hidden);
    // SAFETY: the arguments are add_gated's. Block t stays in row t.
    unsafe { launch.run((tokens, 1, 1), 256, 0) }
}

/// Backward step of [`add_gated`]; the gradient of `y` itself passes unchanged.
///
/// - `dy`, `d_shared`: `[tokens, hidden]`; `d_gate`: `[tokens]`, f32; both overwritten
pub fn add_gated_backward<E: Float>(
    device: &Device,
    gate: View<f32>,
    shared: View<E>,
    dy: View<E>,
    mut d_gate: ViewMut<f32>,
    mut d_shared: ViewMut<E>,
) -> Result<()> {
    let tokens = gate.len();
    assert!(shared.len() == dy.len() && d_shared.len() == dy.len() && d_gate.len() == tokens, "add_gated: {} values", dy.len());
    if tokens == 0 || dy.is_empty() {
        return Ok(());
    }
    let hidden = dy.len() / tokens;
    let launch = Launch::new(device, "add_gated_backward", Variant::of::<E>(Program::Route), "add_gated_backward")?;
    let launch = launch.read(gate).read(shared).read(dy).write(&mut d_gate).write(&mut d_shared).int(hidden);
    // SAFETY: the arguments are add_gated_backward's. Block t stays in row t.
    unsafe { launch.run((tokens, 1, 1), 256, 0) }
}

/// `visits (+)= the rows that chose each expert`, for the load-balancing loss (`cpu/load_balance.rs`).
///
/// - `offsets`: `[experts + 1]`, of [`Groups`]; `visits`: `[experts]`, whole numbers in f32, exact below 2^24 rows
pub fn count_visits(device: &Device, offsets: View<i32>, mut visits: ViewMut<f32>, add: bool) -> Result<()> {
    let experts = visits.len();
    assert!(experts > 0 && offsets.len() == experts + 1, "load balance: {} offsets of {experts} experts", offsets.len());
    let launch = Launch::new(device, "load_balance", Variant::of::<f32>(Program::Route), "count_visits")?;
    let launch = launch.read(offsets).int(experts).write(&mut visits).int(usize::from(add));
    // SAFETY: the arguments are count_visits's. A thread reads two offsets of its expert and writes its count.
    unsafe { launch.run((experts.div_ceil(128), 1, 1), 128, 0) }
}

/// The load-balancing loss of all rows counted: `experts * sum of visits / rows * prob_sums / rows`.
///
/// - `visits`, `prob_sums`: `[experts]`; `loss`: one f32
pub fn balance(device: &Device, visits: View<f32>, prob_sums: View<f32>, rows: usize, mut loss: ViewMut<f32>) -> Result<()> {
    let experts = visits.len();
    assert!(prob_sums.len() == experts && loss.len() == 1, "load balance: {} sums of {experts} experts", prob_sums.len());
    let launch = Launch::new(device, "load_balance", Variant::of::<f32>(Program::Route), "balance")?;
    let launch = launch.read(visits).read(prob_sums).int(experts).double(rows.max(1) as f64).write(&mut loss);
    // SAFETY: the arguments are balance's. One thread reads `experts` of both and writes one f32.
    unsafe { launch.run((1, 1, 1), 32, 0) }
}

/// The gradient of `by * loss` in the probabilities of one layer's rows.
///
/// - `visits`: `[experts]`; `rows`: as in [`balance`]; `d_probs`: `[tokens, experts]`, overwritten
pub fn balance_backward(device: &Device, visits: View<f32>, rows: usize, by: f64, mut d_probs: ViewMut<f32>) -> Result<()> {
    let (experts, count) = (visits.len(), d_probs.len());
    assert!(experts > 0 && count.is_multiple_of(experts), "load balance: {count} gradients of {experts} experts");
    if count == 0 {
        return Ok(());
    }
    let rows = rows.max(1) as f64;
    let launch = Launch::new(device, "load_balance", Variant::of::<f32>(Program::Route), "balance_backward")?;
    let launch = launch.read(visits).int(experts).double(by * experts as f64 / (rows * rows)).write(&mut d_probs).long(count);
    // SAFETY: the arguments are balance_backward's; threads stride over the elements of d_probs.
    unsafe { launch.run((super::launch::blocks(count, 256, 4096), 1, 1), 256, 0) }
}
