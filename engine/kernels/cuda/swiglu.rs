//! Launchers of swiglu.cu: the gated activation of the feed-forward block, forward and backward.

use super::device::Device;
use super::launch::{Launch, assert_aligned, blocks};
use super::memory::{View, ViewMut};
use super::program::{Program, Variant};
use crate::error::Result;
use crate::kernels::element::Float;

/// `act = silu(gate) * up`, in f32, rounded once.
///
/// - `gate_up`: `[tokens, 2 * inter]`, the gate's columns first, then up's; `act`: `[tokens, inter]`
pub fn swiglu<E: Float>(device: &Device, gate_up: View<E>, inter: usize, mut act: ViewMut<E>) -> Result<()> {
    check(gate_up.len(), inter, act.len());
    if act.is_empty() {
        return Ok(());
    }
    assert_aligned::<E>("swiglu", inter, &[gate_up.address, act.address]);
    let launch = Launch::new(device, "swiglu", Variant::of::<E>(Program::Swiglu), "swiglu")?.waiting();
    let count = act.len();
    let launch = launch.read(gate_up).write(&mut act).long(count).int(inter);
    // SAFETY: the arguments are swiglu's; threads stride over the elements of act, and gate_up has twice as many.
    unsafe { launch.run((blocks(count, 2048, 1 << 20), 1, 1), 256, 0) }
}

/// Where the gradient of gate and up goes.
pub enum Gradient<'a, E: Float> {
    /// Over gate and up themselves.
    InPlace(ViewMut<'a, E>),
    /// `gate_up` stays; both `[tokens, 2 * inter]`.
    Beside { gate_up: View<'a, E>, d_gate_up: ViewMut<'a, E> },
}

/// Backward step of [`swiglu`].
///
/// - `d_act`: `[tokens, inter]`
/// - `act`: `[tokens, inter]`, written with the same bits as the forward step's, which so need not be saved
pub fn swiglu_backward<E: Float>(
    device: &Device,
    gradient: Gradient<E>,
    inter: usize,
    d_act: View<E>,
    mut act: Option<ViewMut<E>>,
) -> Result<()> {
    let (source, mut out) = match gradient {
        Gradient::InPlace(gate_up) => (None, gate_up),
        Gradient::Beside { gate_up, d_gate_up } => (Some(gate_up), d_gate_up),
    };
    check(out.len(), inter, d_act.len());
    assert!(source.is_none_or(|source| source.len() == out.len()), "swiglu: d_gate_up has {} values", out.len());
    assert!(act.as_ref().is_none_or(|act| act.len() == d_act.len()), "swiglu: act does not have {} values", d_act.len());
    if d_act.is_empty() {
        return Ok(());
    }
    let act_address = act.as_ref().map_or(0, |act| act.address);
    assert_aligned::<E>("swiglu_backward", inter, &[out.address, d_act.address, act_address, source.map_or(0, |source| source.address)]);
    let launch = Launch::new(device, "swiglu_backward", Variant::of::<E>(Program::Swiglu), "swiglu_backward")?.waiting();
    let launch = match source {
        Some(source) => launch.read(source),
        None => launch.read(out.view()),
    };
    let count = d_act.len();
    let launch = launch.read(d_act).write(&mut out).write_or_null(act.as_mut()).long(count).int(inter);
    // SAFETY: the arguments are swiglu_backward's; threads stride over the elements of d_act, and each reads its gate and up
    // before it writes their gradients, so these may lie in the same place.
    unsafe { launch.run((blocks(count, 2048, 1 << 20), 1, 1), 256, 0) }
}

fn check(gate_up: usize, inter: usize, act: usize) {
    assert!(inter > 0 && act.is_multiple_of(inter), "swiglu: {act} values do not divide into rows of {inter}");
    assert!(gate_up == 2 * act, "swiglu: {gate_up} values of gate and up for {act} of act");
}
