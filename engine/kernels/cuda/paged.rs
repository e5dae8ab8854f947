//! Launchers of attention over a paged cache: turning and writing keys and values, prefill behind a cached prefix, decoding. A query's bits
//! are those of the same query in training (attention.rs).

use super::attention::{self, BLOCK, Cache, NO_WINDOW, PLAIN_WARPS, Plan, Span, THREADS, tile_row};
use super::device::Device;
use super::launch::{Launch, assert_aligned};
use super::memory::{DeviceBuffer, View, ViewMut};
use super::program::{Program, Variant};
use crate::error::{Error, Result};
use crate::kernels::cpu::heads::Heads;
use crate::kernels::element::{Dtype, Float};
use std::sync::Arc;

/// Keys that one block of the decoding kernel walks (`SPAN` of attention_core.cuh).
pub const SPAN: usize = 512;

fn variant<E: Float>(program: Program, heads: Heads) -> Variant {
    let variant = Variant::of::<E>(program).with("HEAD_DIM", heads.head_dim as u32);
    if E::DTYPE == Dtype::F32 { variant.with("PAGED", 1) } else { variant }
}

fn program<E: Float>() -> Program {
    if E::DTYPE == Dtype::F32 { Program::AttentionPlain } else { Program::AttentionPaged }
}

/// Turns queries and keys of each row of `qkv` by its position's angles. Queries go to the same places of `turned`; keys, and values as
/// they are, to the caches. The bits are those of [`super::rope::rope`].
///
/// - `qkv`, `turned`: `[rows, (heads + 2 * kv_heads) * head_dim]`; `turned` gets no keys and values
/// - `tables`: cosines and sines, `[rows, head_dim / 2]` each, f32
/// - `slots`: `[rows]`: `block * 64 + place in the block`, each in the caches, else memory beyond is written; the keys and values of a
///   row with a negative one are not kept
/// - `keys`, `values`: `[blocks, 64, kv_heads, head_dim]`
///
/// Errors: [`Error::Shape`] or [`Error::Argument`] if sizes do not fit.
#[allow(clippy::too_many_arguments, reason = "the operands of one step")]
pub fn append<E: Float>(
    device: &Device,
    heads: Heads,
    qkv: View<E>,
    (cos, sin): (View<f32>, View<f32>),
    slots: View<i32>,
    mut turned: ViewMut<E>,
    mut keys: ViewMut<E>,
    mut values: ViewMut<E>,
) -> Result<()> {
    let op = "append_cache";
    heads.check(op)?;
    let (rows, half) = (heads.tokens(op, "qkv", qkv.len())?, heads.head_dim / 2);
    let sizes = [("slots", slots.len(), 1), ("cos", cos.len(), half), ("sin", sin.len(), half), ("turned", turned.len(), heads.width())];
    for (arg, got, width) in sizes {
        if got != rows * width {
            return Err(Error::Shape { op, arg, expected: format!("[{rows}, {width}]"), got: format!("{got} values") });
        }
    }
    check_caches(op, heads, keys.len(), values.len())?;
    if rows == 0 {
        return Ok(());
    }
    assert_aligned::<E>(op, half, &[qkv.address, turned.address, keys.address, values.address]);
    let launch = Launch::new(device, op, Variant::of::<E>(Program::Rope), "append")?.waiting();
    let launch = launch.read(qkv).read(cos).read(sin).read(slots).write(&mut turned).write(&mut keys).write(&mut values);
    let launch = launch.int(heads.heads).int(heads.kv_heads).int(half);
    // SAFETY: the arguments are append's. A block reads its row and writes its row's queries and its slot, which the caller vouches for.
    unsafe { launch.run((rows, 1, 1), 128, 0) }
}

pub(super) fn check_caches(op: &'static str, heads: Heads, keys: usize, values: usize) -> Result<()> {
    let block = BLOCK * heads.kv_heads * heads.head_dim;
    if keys != values || !keys.is_multiple_of(block) {
        let expected = format!("[blocks, 64, {}, {}]", heads.kv_heads, heads.head_dim);
        return Err(Error::Shape { op, arg: "cache", expected, got: format!("{keys} and {values} values") });
    }
    Ok(())
}

/// Attends from new queries to cached keys and values, those of the queries included ([`append`] comes first).
///
/// - `plan`: of [`Plan::of_spans`]; the others as in [`attention::attention`]
///
/// Errors: as [`attention::attention`].
pub fn prefill<E: Float>(device: &Device, plan: &Plan, qkv: View<E>, cache: Cache<E>, o: ViewMut<E>, lse: ViewMut<f32>) -> Result<()> {
    check_caches("attention", plan.heads, cache.keys.len(), cache.values.len())?;
    attention::run(device, plan, qkv, o, lse, Some(cache))
}

/// What decoding needs besides its tensors.
#[derive(Clone, Copy, Debug)]
pub struct Decode {
    pub heads: Heads,
    pub scale: f32,
    pub window: Option<usize>,
    /// No sequence has more keys; the grid follows from it.
    pub length_max: usize,
}

/// Attends from one query a sequence, spans of 512 keys side by side.
///
/// - `qkv`: `[sequences, (heads + 2 * kv_heads) * head_dim]`; keys and values are read from the cache only
/// - `lengths`: `[sequences]`, keys of each, its own query's included, up to `length_max`; in bf16 one of 0 gives zeros
/// - `o`: `[sequences, heads * head_dim]`; `lse`: `[sequences, heads]`
///
/// Errors: [`Error::Shape`] or [`Error::Argument`] if sizes do not fit.
pub fn decode<E: Float>(
    device: &Arc<Device>,
    settings: Decode,
    qkv: View<E>,
    cache: Cache<E>,
    lengths: View<i32>,
    mut o: ViewMut<E>,
    mut lse: ViewMut<f32>,
) -> Result<()> {
    let op = "attention";
    let Decode { heads, scale, window, length_max } = settings;
    heads.check(op)?;
    check_caches(op, heads, cache.keys.len(), cache.values.len())?;
    let rows = heads.tokens(op, "qkv", qkv.len())?;
    let width = heads.heads * heads.head_dim;
    for (arg, got, width) in [("lengths", lengths.len(), 1), ("o", o.len(), width), ("lse", lse.len(), heads.heads)] {
        if got != rows * width {
            return Err(Error::Shape { op, arg, expected: format!("[{rows}, {width}]"), got: format!("{got} values") });
        }
    }
    if length_max == 0 || length_max > cache.table_width * BLOCK || cache.block_table.len() != rows * cache.table_width {
        let expected = format!("at most {} keys, {rows} lines of the block table", cache.table_width * BLOCK);
        return Err(Error::argument(op, "length_max", expected, length_max));
    }
    if rows == 0 {
        return Ok(());
    }
    let window = window_of(window);
    if E::DTYPE == Dtype::F32 {
        // The f32 kernel takes one warp a query; it wants lines as of a plan, which only the lengths lack.
        let lines: Vec<i32> = (lengths_to_host(device, lengths)?.iter().enumerate())
            .flat_map(|(row, length)| [row as i32 + 1 - length, *length, length - 1, row as i32])
            .collect();
        let lines = DeviceBuffer::copy_of(device, "attention plan", &lines)?;
        let launch = Launch::new(device, op, variant::<E>(program::<E>(), heads), "attention")?;
        let launch = launch.read(qkv).write(&mut o).write(&mut lse).read(lines.view()).int(rows * heads.heads);
        let launch = launch.int(heads.heads).int(heads.kv_heads).float(scale).int(window);
        let launch = launch.read(cache.keys).read(cache.values).read(cache.block_table).int(cache.table_width);
        // SAFETY: the arguments are attention's in attention_plain.cu, as attention.rs gives them.
        return unsafe { launch.run(((rows * heads.heads).div_ceil(PLAIN_WARPS), 1, 1), 32 * PLAIN_WARPS, 0) };
    }
    let spans = length_max.div_ceil(SPAN);
    let shared = (16 + 3 * BLOCK) * tile_row(heads.head_dim) * 2 + 16 * (BLOCK + 4) * 4;
    let across = heads.kv_heads * heads.group().div_ceil(16);
    let new = |name| Ok(Launch::new(device, op, variant::<E>(program::<E>(), heads), name)?.waiting());
    let spans_of = || -> Result<Launch> {
        let launch = new("decode_spans")?.read(qkv).read(cache.keys).read(cache.values).read(cache.block_table).int(cache.table_width);
        Ok(launch.read(lengths))
    };
    if spans == 1 {
        let launch = spans_of()?.read_or_null::<f32>(None).read_or_null::<f32>(None).read_or_null::<f32>(None);
        let launch = launch.int(heads.heads).int(heads.kv_heads).float(scale).int(window).write(&mut o).write(&mut lse);
        // SAFETY: as below, with results in place of parts: a block writes those of its heads and its sequence.
        return unsafe { launch.run((1, across, rows), THREADS, shared) };
    }
    let mut parts = Parts::new(device, heads, rows, spans)?;
    let launch = spans_of()?.write(&mut parts.values.view_mut()).write(&mut parts.maxima.view_mut()).write(&mut parts.sums.view_mut());
    let launch = launch.int(heads.heads).int(heads.kv_heads).float(scale).int(window).read_or_null::<E>(None).read_or_null::<f32>(None);
    // SAFETY: the arguments are decode_spans's. A block writes the places of its span, its heads and its sequence; spans beyond
    // a sequence's keys return. The shared memory holds 16 queries, three tiles and a tile of scores.
    unsafe { launch.run((spans, across, rows), THREADS, shared)? };
    parts.merge(device, heads, lengths, window, o, lse)
}

/// What kernels are told of a window, or of none.
pub(super) fn window_of(window: Option<usize>) -> usize {
    window.map_or(NO_WINDOW, |window| window.min(NO_WINDOW))
}

/// Sums of spans that are to be merged.
pub(super) struct Parts {
    rows: usize,
    spans: usize,
    /// `[rows, heads, spans, head_dim]`, in whole steps of mma.
    pub values: DeviceBuffer<f32>,
    /// `[rows, heads, spans]`
    pub maxima: DeviceBuffer<f32>,
    pub sums: DeviceBuffer<f32>,
}

impl Parts {
    pub fn new(device: &Arc<Device>, heads: Heads, rows: usize, spans: usize) -> Result<Self> {
        let (places, dim) = (rows * heads.heads * spans, heads.head_dim.next_multiple_of(16));
        let new = |len| DeviceBuffer::<f32>::scratch(device, "attention spans", len);
        Ok(Self { rows, spans, values: new(places * dim)?, maxima: new(places)?, sums: new(places)? })
    }

    /// Merges what a kernel has written to all spans that the texts have; sizes of `o`, `lse` and `lengths` as in [`decode`].
    pub fn merge<E: Float>(
        self,
        device: &Device,
        heads: Heads,
        lengths: View<i32>,
        window: usize,
        mut o: ViewMut<E>,
        mut lse: ViewMut<f32>,
    ) -> Result<()> {
        let Self { rows, spans, values, maxima, sums } = self;
        let launch = Launch::new(device, "attention", variant::<E>(program::<E>(), heads), "decode_merge")?.waiting();
        let launch = launch.read(values.view()).read(maxima.view()).read(sums.view()).read(lengths);
        let launch = launch.write(&mut o).write(&mut lse).int(heads.heads).int(spans).int(window);
        // SAFETY: the arguments are decode_merge's. A block reads the spans that its sequence has, all written by the kernel before.
        unsafe { launch.run((rows * heads.heads, 1, 1), 64, 0) }
    }
}

fn lengths_to_host(device: &Arc<Device>, lengths: View<i32>) -> Result<Vec<i32>> {
    let mut copy = DeviceBuffer::scratch(device, "attention plan", lengths.len())?;
    copy.copy_from(lengths)?;
    copy.to_vec()
}

/// Where the keys of `span` go in the caches: the slots of [`append`].
///
/// - `blocks`: the sequence's line of the block table
pub fn slots(span: Span, blocks: &[i32]) -> Vec<i32> {
    (span.cached..span.cached + span.count).map(|position| blocks[position / BLOCK] * BLOCK as i32 + (position % BLOCK) as i32).collect()
}
