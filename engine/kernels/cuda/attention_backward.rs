//! Launchers of the derivative of attention: attention_backward.cu in bf16, attention_plain.cu in f32. Three kernels: a number
//! for each query, the queries' gradients, the keys' and values'.

use super::attention::{BLOCK, PLAIN_WARPS, Plan, THREADS, tile_row};
use super::device::Device;
use super::launch::Launch;
use super::memory::{View, ViewMut};
use super::program::{Program, Variant};
use crate::error::{Error, Result};
use crate::kernels::cpu::heads::Heads;
use crate::kernels::element::{Dtype, Float};

/// What the forward step read and wrote.
#[derive(Clone, Copy)]
pub struct Saved<'a, E: Float> {
    pub qkv: View<'a, E>,
    pub o: View<'a, E>,
    pub lse: View<'a, f32>,
}

/// Gradient of [`super::attention::attention`] with respect to `qkv`.
///
/// - `d_o`: `[tokens, heads * head_dim]`; `dqkv`: `[tokens, (heads + 2 * kv_heads) * head_dim]`, written in full
/// - `deltas`: `[tokens, heads]`, scratch
///
/// Errors: [`Error::Shape`] if sizes do not fit the plan.
pub fn attention_backward<E: Float>(
    device: &Device,
    plan: &Plan,
    d_o: View<E>,
    saved: Saved<E>,
    mut deltas: ViewMut<f32>,
    mut dqkv: ViewMut<E>,
) -> Result<()> {
    let op = "attention_backward";
    plan.check(op, saved.qkv.len(), saved.o.len(), saved.lse.len())?;
    plan.check(op, dqkv.len(), d_o.len(), deltas.len())?;
    if plan.rows == 0 {
        return Ok(());
    }
    let Heads { heads, kv_heads, head_dim } = plan.heads;
    let plain = E::DTYPE == Dtype::F32;
    let program = if plain { Program::AttentionPlain } else { Program::AttentionBackward };
    let mut variant = Variant::of::<E>(program).with("HEAD_DIM", head_dim as u32);
    if plain {
        variant = variant.with("PAGED", 0);
    } else if !dqkv.address.is_multiple_of(4) {
        return Err(Error::argument(op, "dqkv", "to begin at an even element", dqkv.address));
    }
    let new = |name| Launch::new(device, op, variant.clone(), name);
    let Saved { qkv, o, lse } = saved;
    let items = plan.rows * heads;
    if plain {
        let launch = new("attention_backward_queries")?.read(d_o).read(qkv).read(o).read(lse).write(&mut deltas).write(&mut dqkv);
        let launch = launch.read(plan.each_row.view()).int(items).int(heads).int(kv_heads).float(plan.scale).int(plan.window);
        // SAFETY: the arguments are those of the kernel in attention_plain.cu. A warp is a head of a row; it reads keys of its
        // document up to its position and writes its own delta and its own columns of dqkv.
        unsafe { launch.run((items.div_ceil(PLAIN_WARPS), 1, 1), 32 * PLAIN_WARPS, 0)? };
        let items = plan.rows * kv_heads;
        let launch = new("attention_backward_keys")?.read(d_o).read(qkv).read(lse).read(deltas.view()).write(&mut dqkv);
        let launch = launch.read(plan.each_row.view()).int(items).int(heads).int(kv_heads).float(plan.scale).int(plan.window);
        // SAFETY: as above, with a key head of a row, and queries from its position to its document's end.
        return unsafe { launch.run((items.div_ceil(PLAIN_WARPS), 1, 1), 32 * PLAIN_WARPS, 0) };
    }
    let launch = new("attention_deltas")?.read(d_o).read(o).write(&mut deltas).int(items);
    // SAFETY: the arguments are attention_deltas's; a warp is one of `items` heads of rows.
    unsafe { launch.run((items.div_ceil(THREADS / 32), 1, 1), THREADS, 0)? };
    let tiles = plan.backward.len() / 4;
    let shared = 6 * BLOCK * tile_row(head_dim) * 2;
    for (name, across, extra) in [("attention_backward_queries", heads, 0), ("attention_backward_keys", kv_heads, 4 * BLOCK * 4)] {
        let launch = new(name)?.read(d_o).read(qkv).read(lse).read(deltas.view()).write(&mut dqkv).read(plan.backward.view());
        let launch = launch.int(heads).int(kv_heads).float(plan.scale).int(plan.window);
        // SAFETY: both kernels of attention_backward.cu have these arguments. The plan's tiles lie within its rows, which all
        // operands have, and each tile's block writes its own rows and head of dqkv. The shared memory holds six tiles, and in
        // the second kernel two times lse and delta of 64 queries.
        unsafe { launch.run((tiles, across, 1), THREADS, shared + extra)? };
    }
    Ok(())
}
