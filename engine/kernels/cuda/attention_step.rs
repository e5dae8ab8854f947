//! Launcher of attention_step.cu: what a captured step of few texts does between two products of a layer, by one kernel: turning queries and
//! keys, keeping keys and values, attending. The bits are those of paged.rs.

use super::attention::{BLOCK, THREADS, tile_row};
use super::device::Device;
use super::launch::{Launch, assert_aligned};
use super::memory::{View, ViewMut};
use super::paged::{self, Decode, SPAN, check_caches};
use super::program::{Program, Variant};
use crate::error::{Error, Result};
use crate::kernels::cpu::heads::Heads;
use crate::kernels::element::{Dtype, Float};
use std::sync::Arc;

/// Most texts: a block takes a multiprocessor's shared memory nearly alone.
const ROWS_MAX: usize = 8;

/// What the kernel reads besides queries, keys and values of the step; arguments as in [`paged::append`] and [`paged::decode`].
#[derive(Clone, Copy)]
pub struct Step<'a> {
    pub cos: View<'a, f32>,
    pub sin: View<'a, f32>,
    pub slots: View<'a, i32>,
    pub block_table: View<'a, i32>,
    pub table_width: usize,
    pub lengths: View<'a, i32>,
}

/// Bytes of shared memory: 16 queries, a ring of blocks of keys and values, the new key and value, two tiles of scores.
fn shared_bytes(head_dim: usize) -> usize {
    let ring = match head_dim.next_multiple_of(16) {
        0..=64 => 8,
        65..=128 => 5,
        _ => 3,
    };
    (16 + 2 * ring * BLOCK + 2) * tile_row(head_dim) * 2 + 2 * 16 * (BLOCK + 4) * 4
}

/// Whether the kernel takes a step of so many texts.
pub fn fits<E: Float>(device: &Device, heads: Heads, rows: usize) -> bool {
    let fits = shared_bytes(heads.head_dim) <= device.shared_bytes_max && heads.head_dim.is_multiple_of(2);
    E::DTYPE == Dtype::Bf16 && rows <= ROWS_MAX && fits
}

/// Turns queries and keys of each row of `qkv`, keeps keys and values in the cache and attends, one query a text.
///
/// - `qkv`: `[texts, (heads + 2 * kv_heads) * head_dim]`, as [`paged::append`] takes it; `keys`, `values`: the caches
/// - the last key of each text that has one is the step's own, and its slot, unless negative, where the block table has that
/// - `o`: `[texts, heads * head_dim]`; `lse`: `[texts, heads]`
///
/// Errors: as [`paged::append`] and [`paged::decode`].
#[allow(clippy::too_many_arguments, reason = "the operands of one step")]
pub fn attend<E: Float>(
    device: &Arc<Device>,
    settings: Decode,
    qkv: View<E>,
    step: Step,
    mut keys: ViewMut<E>,
    mut values: ViewMut<E>,
    mut o: ViewMut<E>,
    mut lse: ViewMut<f32>,
) -> Result<()> {
    let op = "attention";
    let Decode { heads, scale, window, length_max } = settings;
    heads.check(op)?;
    check_caches(op, heads, keys.len(), values.len())?;
    let rows = heads.tokens(op, "qkv", qkv.len())?;
    assert!(fits::<E>(device, heads, rows), "{op}: a step of {rows} texts with heads of {}", heads.head_dim);
    let (half, width) = (heads.head_dim / 2, heads.heads * heads.head_dim);
    let Step { cos, sin, slots, block_table, table_width, lengths } = step;
    let sizes = [("cos", cos.len(), half), ("sin", sin.len(), half), ("slots", slots.len(), 1), ("lengths", lengths.len(), 1)];
    for (arg, got, width) in sizes.into_iter().chain([("o", o.len(), width), ("lse", lse.len(), heads.heads)]) {
        if got != rows * width {
            return Err(Error::Shape { op, arg, expected: format!("[{rows}, {width}]"), got: format!("{got} values") });
        }
    }
    if length_max == 0 || length_max > table_width * BLOCK || block_table.len() != rows * table_width {
        let expected = format!("at most {} keys, {rows} lines of the block table", table_width * BLOCK);
        return Err(Error::argument(op, "length_max", expected, length_max));
    }
    if rows == 0 {
        return Ok(());
    }
    assert_aligned::<E>(op, half, &[qkv.address, keys.address, values.address]);
    let (spans, across) = (length_max.div_ceil(SPAN), heads.kv_heads * heads.group().div_ceil(16));
    let variant = Variant::of::<E>(Program::AttentionStep).with("HEAD_DIM", heads.head_dim as u32);
    let launch = Launch::new(device, op, variant, "decode_step")?.fetching().read(qkv).read(cos).read(sin).read(slots);
    let launch = launch.write(&mut keys).write(&mut values).read(block_table).int(table_width).read(lengths);
    let window = paged::window_of(window);
    let grid = (spans, across, rows);
    if spans == 1 {
        let launch = launch.read_or_null::<f32>(None).read_or_null::<f32>(None).read_or_null::<f32>(None);
        let launch = launch.int(heads.heads).int(heads.kv_heads).float(scale).int(window).write(&mut o).write(&mut lse);
        // SAFETY: as below, with results in place of parts: a block writes those of its heads and its sequence.
        return unsafe { launch.run(grid, THREADS, shared_bytes(heads.head_dim)) };
    }
    let mut parts = paged::Parts::new(device, heads, rows, spans)?;
    let launch = launch.write(&mut parts.values.view_mut()).write(&mut parts.maxima.view_mut()).write(&mut parts.sums.view_mut());
    let launch = launch.int(heads.heads).int(heads.kv_heads).float(scale).int(window).read_or_null::<E>(None).read_or_null::<f32>(None);
    // SAFETY: the arguments are decode_step's. A block writes the places of its span, its heads and its sequence; spans beyond a
    // sequence's keys return. One block of a key head writes its slot, which the caller vouches for, and no block reads that place of the cache.
    unsafe { launch.run(grid, THREADS, shared_bytes(heads.head_dim))? };
    parts.merge(device, heads, lengths, window, o, lse)
}
