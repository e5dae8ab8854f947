//! Launchers of rms_norm.cu: RMS normalisation of rows, with the residual sum before it, and its derivative.

use super::device::Device;
use super::launch::{Launch, assert_aligned};
use super::memory::{View, ViewMut};
use super::norm;
use super::program::{Program, Variant};
use crate::error::Result;
use crate::kernels::element::Float;

/// Threads of a row: a function of its length alone, since the shape of the sum follows from it.
pub(super) fn threads(hidden: usize) -> usize {
    hidden.div_ceil(8).next_multiple_of(32).clamp(32, 512)
}

/// The residual stream before a norm: `sum = x + residual`, which then is what is normalised.
pub struct Residual<'a, E: Float> {
    /// `[tokens, hidden]`
    pub residual: View<'a, E>,
    /// `[tokens, hidden]`, written in full; rounded to `E` before it is normalised.
    pub sum: ViewMut<'a, E>,
}

/// Scales each row to unit root-mean-square in f32, rounds it to `E`, multiplies by `weight` and rounds again.
///
/// - `x`, `y`: `[tokens, hidden]`; `weight`: `[hidden]`; `eps`: added to the mean square
/// - `inv_rms`: `[tokens]`, the scale of each row, for the backward step
pub fn rms_norm<E: Float>(
    device: &Device,
    x: View<E>,
    residual: Option<Residual<E>>,
    weight: View<E>,
    eps: f32,
    mut y: ViewMut<E>,
    mut inv_rms: ViewMut<f32>,
) -> Result<()> {
    let (tokens, hidden) = (inv_rms.len(), weight.len());
    assert!(hidden > 0, "rms_norm: rows have no elements");
    assert!(x.len() == tokens * hidden, "rms_norm: x has {} values for [{tokens}, {hidden}]", x.len());
    assert!(y.len() == x.len(), "rms_norm: y has {} values for [{tokens}, {hidden}]", y.len());
    if tokens == 0 {
        return Ok(());
    }
    assert_aligned::<E>("rms_norm", hidden, &[x.address, weight.address, y.address]);
    let launch = Launch::new(device, "rms_norm", Variant::of::<E>(Program::RmsNorm), "rms_norm")?.waiting().read(x);
    let launch = match residual {
        Some(Residual { residual, mut sum }) => {
            assert!(residual.len() == x.len() && sum.len() == x.len(), "rms_norm: a residual of {}", residual.len());
            assert_aligned::<E>("rms_norm", hidden, &[residual.address, sum.address]);
            launch.read(residual).write(&mut sum)
        }
        None => launch.read_or_null::<E>(None).write_or_null::<E>(None),
    };
    let launch = launch.read(weight).float(eps).write(&mut y).write(&mut inv_rms).int(hidden);
    // SAFETY: the arguments are rms_norm's. Block t stays in row t of each, and each has that many rows.
    unsafe { launch.run((tokens, 1, 1), threads(hidden), 0) }
}

/// Backward step: the gradient of `x` (of the sum, if there was a residual).
///
/// - `x`, `dy`, `dx`: `[tokens, hidden]`; `dx` is overwritten, or with `add` added to, in f32 and rounded once
/// - `weight`: `[hidden]`, `inv_rms`: `[tokens]` from the forward step
pub fn rms_norm_backward<E: Float>(
    device: &Device,
    x: View<E>,
    weight: View<E>,
    inv_rms: View<f32>,
    dy: View<E>,
    mut dx: ViewMut<E>,
    add: bool,
) -> Result<()> {
    let (tokens, hidden) = (inv_rms.len(), weight.len());
    assert!(hidden > 0, "rms_norm: rows have no elements");
    for (name, len) in [("x", x.len()), ("dy", dy.len()), ("dx", dx.len())] {
        assert!(len == tokens * hidden, "rms_norm: {name} has {len} values for [{tokens}, {hidden}]");
    }
    if tokens == 0 {
        return Ok(());
    }
    assert_aligned::<E>("rms_norm_backward", hidden, &[x.address, weight.address, dy.address, dx.address]);
    let launch = Launch::new(device, "rms_norm_backward", Variant::of::<E>(Program::RmsNorm), "rms_norm_backward")?.waiting();
    let launch = launch.read(x).read(weight).read(inv_rms).read(dy).write(&mut dx).int(usize::from(add)).int(hidden);
    // SAFETY: the arguments are rms_norm_backward's. Block t stays in row t of each.
    unsafe { launch.run((tokens, 1, 1), threads(hidden), 0) }
}

/// The gradient of the weight: `dweight += sum over rows of dy * u`, `u` rounded to `E` as it was used.
///
/// - `parts`: scratch of [`norm::parts_len`] elements
/// - `dweight`: `[hidden]`, f32, added to; rows are summed in parts that depend on `tokens` alone
pub fn rms_norm_weight_gradient<E: Float>(
    device: &Device,
    x: View<E>,
    inv_rms: View<f32>,
    dy: View<E>,
    mut parts: ViewMut<f32>,
    dweight: ViewMut<f32>,
) -> Result<()> {
    let (tokens, hidden) = (inv_rms.len(), dweight.len());
    assert!(x.len() == tokens * hidden && dy.len() == x.len(), "rms_norm: x has {} values for [{tokens}, {hidden}]", x.len());
    assert!(parts.len() == norm::parts_len(tokens, hidden), "rms_norm: {} values of scratch", parts.len());
    if tokens == 0 || hidden == 0 {
        return Ok(());
    }
    let (part_rows, count) = norm::parts(tokens);
    let launch = Launch::new(device, "rms_norm_backward", Variant::of::<E>(Program::RmsNorm), "rms_norm_weight_parts")?.waiting();
    let launch = launch.read(x).read(inv_rms).read(dy).write(&mut parts).int(tokens).int(hidden).int(part_rows);
    // SAFETY: the arguments are rms_norm_weight_parts's. A thread stays in its column and its part's rows, cut at `tokens`.
    unsafe { launch.run((hidden.div_ceil(128), count, 1), 128, 0)? };
    norm::add_parts(device, parts.view(), dweight, true)
}
