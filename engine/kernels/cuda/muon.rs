//! Launchers of muon.cu, and the Newton-Schulz iteration of `kernels/cpu/muon.rs` from them and the products. Nothing waits for the
//! device: whether gradients are finite is read there.

use super::device::Device;
use super::launch::{Launch, blocks};
use super::memory::{DeviceBuffer, View, ViewMut};
use super::norm::Norm;
use super::product::{self, Weight};
use super::program::{Program, Variant};
use crate::error::Result;
use crate::kernels::cpu::adamw::{Moment, salt};
use crate::kernels::cpu::muon::{COEFFICIENTS, EPS, ITERATIONS};
use crate::kernels::element::{Dtype, Float};
use std::sync::Arc;

/// Threads of a block.
const THREADS: usize = 256;
/// Blocks that sum squares.
const PARTS: usize = 128;
/// What an out-of-memory error calls the matrices of an iteration.
const LABEL: &str = "matrices of Muon";

fn launch<'d, E: Float>(device: &'d Device, name: &'static str) -> Result<Launch<'d>> {
    Launch::new(device, "muon", Variant::of::<E>(Program::Muon), name)
}

fn grid(count: usize) -> (usize, usize, usize) {
    (blocks(count, THREADS, 1 << 16), 1, 1)
}

/// As [`crate::kernels::cpu::muon::momentum`], of the gradient times the factor of `norm`; with a norm that is not finite nothing is written.
pub fn momentum<M: Moment>(
    device: &Device,
    gradient: View<f32>,
    mut m: ViewMut<M>,
    mut update: ViewMut<f32>,
    momentum: f64,
    step: u64,
    norm: &Norm,
) -> Result<()> {
    let count = gradient.len();
    assert!(m.len() == count && update.len() == count, "muon: {count} gradients, {} momenta", m.len());
    if count == 0 {
        return Ok(());
    }
    let (total, factor) = norm.on_device();
    let launch = launch::<f32>(device, "momentum")?.read(gradient).write(&mut m).int(usize::from(M::DTYPE == Dtype::Bf16));
    let launch = launch.write(&mut update).long(count).read(total).read(factor);
    let launch = launch.float(momentum as f32).float((1.0 - momentum) as f32).signed(salt(step) as i32 as isize);
    // SAFETY: the arguments are momentum's; threads stride over `count` elements, which all have, and `m` is of the type named.
    unsafe { launch.run(grid(count), THREADS, 0) }
}

/// As [`crate::kernels::cpu::muon::orthogonalise`], of one matrix.
pub fn orthogonalise(device: &Arc<Device>, mut values: ViewMut<f32>, rows: usize, columns: usize, factor: f32) -> Result<()> {
    let count = values.len();
    assert!(count == rows * columns, "muon: {count} values for [{rows}, {columns}]");
    if count == 0 {
        return Ok(());
    }
    let (n, tall, turned) = (rows.min(columns), rows.max(columns), rows < columns);
    let mut x = DeviceBuffer::<f32>::scratch(device, LABEL, count)?;
    let mut parts = DeviceBuffer::<f64>::scratch(device, LABEL, PARTS)?;
    let square = || DeviceBuffer::<f32>::scratch(device, LABEL, n * n);
    let (mut g, mut p, mut q, mut other) = (square()?, square()?, square()?, square()?);

    let launched = launch::<f32>(device, "squares_of")?.read(values.view()).long(count).write(&mut parts.view_mut());
    // SAFETY: the arguments are squares_of's, and `parts` has one f64 for each block.
    unsafe { launched.run((PARTS, 1, 1), THREADS, 0)? };
    let launched = launch::<f32>(device, "normalise")?.read(values.view()).read(parts.view()).int(PARTS).double(EPS);
    let launched = launched.write(&mut x.view_mut()).int(rows).int(columns).int(usize::from(turned));
    // SAFETY: the arguments are normalise's; both matrices have rows times columns elements.
    unsafe { launched.run(grid(count), THREADS, 0)? };

    product::weight_gradient(device, g.view_mut(), x.view(), x.view(), (n, n), false, None)?;
    // `out = left right`, all `[n, n]`.
    let multiply = |out: &mut DeviceBuffer<f32>, left: &DeviceBuffer<f32>, right: &DeviceBuffer<f32>| {
        let right = Weight { values: right.view(), outputs: n, inputs: n };
        product::input_gradient(device, out.view_mut(), left.view(), right, false, None)
    };
    let [a, b, c] = COEFFICIENTS;
    for turn in 0..ITERATIONS {
        multiply(&mut p, &g, &g)?;
        let launched = launch::<f32>(device, "combine")?.write(&mut p.view_mut()).read(g.view()).int(n).float(a).float(b).float(c);
        // SAFETY: the arguments are combine's; both matrices are `[n, n]`.
        unsafe { launched.run(grid(n * n), THREADS, 0)? };
        if turn == 0 {
            let launched = launch::<f32>(device, "scaled")?.read(p.view()).float(factor).write(&mut q.view_mut()).long(n * n);
            // SAFETY: the arguments are scaled's; both matrices are `[n, n]`.
            unsafe { launched.run(grid(n * n), THREADS, 0)? };
        } else {
            multiply(&mut other, &q, &p)?;
            std::mem::swap(&mut q, &mut other);
        }
        if turn + 1 < ITERATIONS {
            multiply(&mut other, &g, &p)?;
            multiply(&mut g, &other, &p)?;
        }
    }
    let q = Weight { values: q.view(), outputs: n, inputs: n };
    if !turned {
        return product::input_gradient(device, values, x.view(), q, false, None);
    }
    let mut result = DeviceBuffer::<f32>::scratch(device, LABEL, count)?;
    product::input_gradient(device, result.view_mut(), x.view(), q, false, None)?;
    let launched = launch::<f32>(device, "turn")?.read(result.view()).write(&mut values).int(tall).int(n);
    // SAFETY: the arguments are turn's; both matrices have `tall * n` elements.
    unsafe { launched.run(grid(count), THREADS, 0) }
}

/// Masters times `keep` plus `delta`; with a norm that is not finite nothing is written.
///
/// - `rest`: the low halves of the masters of a bf16 weight (`kernels/cpu/adamw.rs`); none for f32
pub fn move_by<E: Float>(
    device: &Device,
    mut weight: ViewMut<E>,
    mut rest: Option<ViewMut<i16>>,
    delta: View<f32>,
    keep: f32,
    norm: &Norm,
) -> Result<()> {
    let count = weight.len();
    assert!(delta.len() == count, "muon: {count} weights, {} steps", delta.len());
    let split = E::DTYPE == Dtype::Bf16;
    assert!(rest.as_ref().map(|rest| rest.len()) == split.then_some(count), "muon: the remainders do not fit {count} weights");
    if count == 0 {
        return Ok(());
    }
    let launch = launch::<E>(device, "move")?.write(&mut weight).write_or_null(rest.as_mut()).read(delta);
    let launch = launch.float(keep).read(norm.on_device().0).long(count);
    // SAFETY: the arguments are move's; threads stride over `count` elements, which all have.
    unsafe { launch.run(grid(count), THREADS, 0) }
}
