//! Launchers of the derivative of attention: attention_backward.cu and attention_backward_hopper.cu in bf16, attention_plain.cu in
//! f32. Three kernels: a number for each query, the queries' gradients, the keys' and values'; on Hopper the first is part of
//! the second.

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

/// How attention_backward_hopper.cu divides its work. The order of sums depends on it, so it may depend on nothing but the heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HopperTiles {
    /// Warpgroups of a block of queries, with 64 queries each, and such blocks that a multiprocessor has registers for.
    pub query_groups: usize,
    pub query_blocks: usize,
    /// Warpgroups with 64 keys each that read the same queries, and how many parts of the queries there are.
    pub key_groups: usize,
    pub key_splits: usize,
}

impl HopperTiles {
    /// Those for a head width of 64 or 128.
    pub fn of(head_dim: usize) -> Self {
        match head_dim {
            64 => Self { query_groups: 2, query_blocks: 2, key_groups: 1, key_splits: 3 },
            128 => Self { query_groups: 3, query_blocks: 1, key_groups: 2, key_splits: 1 },
            _ => panic!("attention_backward_hopper.cu has no head width {head_dim}"),
        }
    }

    pub(super) fn variant(self, head_dim: usize) -> Variant {
        let variant = Variant::new(Program::AttentionBackwardHopper, Dtype::Bf16).with("HEAD_DIM", head_dim as u32);
        let variant = variant.with("QUERY_GROUPS", self.query_groups as u32).with("QUERY_BLOCKS", self.query_blocks as u32);
        variant.with("KEY_GROUPS", self.key_groups as u32).with("KEY_SPLITS", self.key_splits as u32)
    }
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
    if let Some(tiles) = plan.kernels.backward {
        return on_hopper(device, plan, tiles, d_o, saved, deltas, dqkv);
    }
    let launch = new("attention_deltas")?.read(d_o).read(o).write(&mut deltas).int(items);
    // SAFETY: the arguments are attention_deltas's; a warp is one of `items` heads of rows.
    unsafe { launch.run((items.div_ceil(THREADS / 32), 1, 1), THREADS, 0)? };
    let shared = 6 * BLOCK * tile_row(head_dim) * 2;
    let kernels = [
        ("attention_backward_queries", &plan.backward_queries, heads, 0),
        ("attention_backward_keys", &plan.backward_keys, kv_heads, 4 * BLOCK * 4),
    ];
    for (name, tiles, across, extra) in kernels {
        let launch = new(name)?.read(d_o).read(qkv).read(lse).read(deltas.view()).write(&mut dqkv).read(tiles.view());
        let launch = launch.int(heads).int(kv_heads).float(plan.scale).int(plan.window);
        // SAFETY: both kernels of attention_backward.cu have these arguments. The plan's tiles lie within its rows, which all
        // operands have, and each tile's block writes its own rows and head of dqkv. The shared memory holds six tiles, and in
        // the second kernel two times lse and delta of 64 queries.
        unsafe { launch.run((tiles.len() / 4, across, 1), THREADS, shared + extra)? };
    }
    Ok(())
}

fn on_hopper<E: Float>(
    device: &Device,
    plan: &Plan,
    tiles: HopperTiles,
    d_o: View<E>,
    saved: Saved<E>,
    mut deltas: ViewMut<f32>,
    mut dqkv: ViewMut<E>,
) -> Result<()> {
    let op = "attention_backward";
    let Heads { heads, kv_heads, head_dim } = plan.heads;
    let Saved { qkv, o, lse } = saved;
    let aligned = [d_o.address, qkv.address, o.address].iter().all(|at| at.is_multiple_of(16));
    assert!(aligned, "{op}: operands are not aligned to 16 bytes");
    let new = |name| Ok(Launch::new(device, op, tiles.variant(head_dim), name)?.waiting());
    let tile = BLOCK * head_dim * 2;
    let HopperTiles { query_groups, key_groups, key_splits, .. } = tiles;
    let launch = new("attention_backward_queries")?.read(d_o).read(qkv).read(o).read(lse).write(&mut deltas).write(&mut dqkv);
    let launch = launch.read(plan.backward_queries.view()).int(heads).int(kv_heads).float(plan.scale).int(plan.window);
    let blocks = plan.backward_queries.len() / 4 * heads;
    // SAFETY: the arguments are the kernel's in attention_backward_hopper.cu. The plan's tiles lie within its rows, which all
    // operands have; a tile's block writes the deltas and the columns of dqkv of its own rows and head. The shared memory holds
    // queries and gradients of each warpgroup, and three pairs of keys and values.
    unsafe { launch.run((blocks, 1, 1), 128 * query_groups, (2 * query_groups + 6) * tile)? };
    let launch = new("attention_backward_keys")?.read(d_o).read(qkv).read(lse).read(deltas.view()).write(&mut dqkv);
    let launch = launch.read(plan.backward_keys.view()).int(heads).int(kv_heads).float(plan.scale).int(plan.window);
    let blocks = plan.backward_keys.len() / 4 * kv_heads;
    let shared = (2 * key_groups + 6 * key_splits) * tile + key_splits * 3 * 2 * BLOCK * 4;
    // SAFETY: as above, with rows of keys. The shared memory holds keys and values of the tile, and for each part of the queries
    // three pairs of queries and gradients with their lse and deltas.
    unsafe { launch.run((blocks, 1, 1), 128 * key_groups * key_splits, shared) }
}
