//! Launchers of rope.cu: tables of angles, and the turn of queries and keys inside the fused activation.

use super::device::Device;
use super::launch::{Launch, assert_aligned, blocks};
use super::memory::{View, ViewMut};
use super::program::{Program, Variant};
use crate::error::{Error, Result};
use crate::kernels::cpu::heads::Heads;
use crate::kernels::element::Float;

/// Fills the tables: `cos[t, i] = cos(inv_freq[i] * positions[t]) * attention_scaling`, `sin` alike, rounded to `E`.
///
/// - `inv_freq`: `[head_dim / 2]`; `positions`: `[tokens]`; `cos`, `sin`: `[tokens, head_dim / 2]`, f32
///
/// Errors: [`Error::Shape`] if a table has another size.
pub fn rope_tables<E: Float>(
    device: &Device,
    inv_freq: View<f32>,
    attention_scaling: f32,
    positions: View<i32>,
    mut cos: ViewMut<f32>,
    mut sin: ViewMut<f32>,
) -> Result<()> {
    let op = "rope_tables";
    let half = inv_freq.len();
    check_tables(op, positions.len(), half, cos.len(), sin.len())?;
    if cos.is_empty() {
        return Ok(());
    }
    let launch = Launch::new(device, op, Variant::of::<E>(Program::Rope), "rope_tables")?.waiting();
    let count = cos.len();
    let launch = launch.read(inv_freq).float(attention_scaling).read(positions).write(&mut cos).write(&mut sin).long(count).int(half);
    // SAFETY: the arguments are rope_tables's; threads stride over `count` angles, which both tables have.
    unsafe { launch.run((blocks(count, 256, 4096), 1, 1), 256, 0) }
}

/// Turns each query and key head of `qkv` in place by its position's angles; values stay.
///
/// - `qkv`: `[tokens, (heads + 2 * kv_heads) * head_dim]`; `cos`, `sin`: `[tokens, head_dim / 2]`, f32
///
/// Errors: [`Error::Shape`] or [`Error::Argument`] if the shapes do not fit.
pub fn rope<E: Float>(device: &Device, qkv: ViewMut<E>, heads: Heads, cos: View<f32>, sin: View<f32>) -> Result<()> {
    turn(device, "rope", qkv, heads, cos, sin, 1.0)
}

/// Turns gradients back; shapes and errors as in [`rope`].
pub fn rope_backward<E: Float>(device: &Device, dqkv: ViewMut<E>, heads: Heads, cos: View<f32>, sin: View<f32>) -> Result<()> {
    turn(device, "rope_backward", dqkv, heads, cos, sin, -1.0)
}

fn check_tables(op: &'static str, tokens: usize, half: usize, cos: usize, sin: usize) -> Result<()> {
    for (arg, len) in [("cos", cos), ("sin", sin)] {
        if len != tokens * half {
            return Err(Error::Shape { op, arg, expected: format!("[{tokens}, {half}]"), got: format!("{len} values") });
        }
    }
    Ok(())
}

fn turn<E: Float>(
    device: &Device,
    op: &'static str,
    mut qkv: ViewMut<E>,
    heads: Heads,
    cos: View<f32>,
    sin: View<f32>,
    direction: f32,
) -> Result<()> {
    heads.check(op)?;
    let tokens = heads.tokens(op, "qkv", qkv.len())?;
    let half = heads.head_dim / 2;
    check_tables(op, tokens, half, cos.len(), sin.len())?;
    if tokens == 0 {
        return Ok(());
    }
    let turned = heads.heads + heads.kv_heads;
    assert_aligned::<E>(op, half, &[qkv.address]);
    let launch = Launch::new(device, op, Variant::of::<E>(Program::Rope), "rope")?.waiting();
    let launch = launch.write(&mut qkv).read(cos).read(sin).float(direction).int(heads.width()).int(turned).int(half);
    // SAFETY: the arguments are rope's. Block t stays in row t; the heads it turns are within a row's width.
    unsafe { launch.run((tokens, 1, 1), 128, 0) }
}
