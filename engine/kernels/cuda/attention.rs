//! Launchers of causal attention over packed documents, forward: attention.cu in bf16, attention_plain.cu in f32. What a
//! batch's documents mean for the grid is worked out once for all layers and both directions ([`Plan`]).
//!
//! Batch invariance: a query's bits depend on its document up to its position. Keys are walked in blocks of 64 from the
//! document's start; each span of 512 keys is summed from nothing and the spans are merged in order, so that decoding may
//! compute spans side by side (paged.rs) and get the same bits.

use super::attention_backward::HopperTiles;
use super::device::Device;
use super::launch::Launch;
use super::memory::{DeviceBuffer, View, ViewMut};
use super::program::{Program, Variant};
use crate::error::{Error, Result};
use crate::kernels::cpu::heads::Heads;
use crate::kernels::element::{Dtype, Float};
use std::sync::Arc;

/// Keys of one block.
pub const BLOCK: usize = 64;
/// Threads of the bf16 kernels.
pub(super) const THREADS: usize = 128;
/// Warps of the f32 kernels' blocks, one query each.
pub(super) const PLAIN_WARPS: usize = 4;
/// The window when there is none: more than any position.
pub(super) const NO_WINDOW: usize = 1 << 30;

/// Where a document's new queries stand.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    /// Row of the first query in the fused activation.
    pub row: usize,
    /// Keys before it, in a cache.
    pub cached: usize,
    /// Queries.
    pub count: usize,
}

/// The tiles of a batch of documents, on the device.
pub struct Plan {
    pub(super) heads: Heads,
    pub(super) scale: f32,
    pub(super) window: usize,
    pub(super) rows: usize,
    pub(super) kernels: Kernels,
    /// `[tiles, 4]` of queries for the forward step, of queries and of keys for the backward step.
    pub(super) forward: DeviceBuffer<i32>,
    pub(super) backward_queries: DeviceBuffer<i32>,
    pub(super) backward_keys: DeviceBuffer<i32>,
    /// `[rows, 4]`, for the f32 kernels.
    pub(super) each_row: DeviceBuffer<i32>,
}

/// Groups of 16 queries that a warp of attention.cu has (`ATOMS` there). Two read each key once for both, but fill the registers;
/// measured on an H200, 8 documents of 1024: head_dim 64 takes 0.104 ms with one and 0.131 with two, 128 at 16384 keys 8.2 and 7.3.
fn atoms(head_dim: usize) -> usize {
    if (65..=128).contains(&head_dim) { 2 } else { 1 }
}

/// Which of the bf16 kernels compute, where there is a choice. The forward step has the same bits with either.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernels {
    /// Whether attention_hopper.cu does.
    pub forward_on_hopper: bool,
    /// The tiles of attention_backward_hopper.cu, if it does.
    pub backward: Option<HopperTiles>,
}

impl Kernels {
    /// Those for a device and a head width. On an H100 8 documents of 1024 took the forward step 0.231 ms with attention_hopper.cu and
    /// 0.305 with attention.cu at width 128, 0.080 and 0.099 at 64; the backward step 0.49 and 1.10, 0.14 and 0.37.
    pub fn of(device: &Device, head_dim: usize) -> Self {
        let is_hopper = device.capability == (9, 0) && matches!(head_dim, 64 | 128);
        Self { forward_on_hopper: is_hopper, backward: is_hopper.then(|| HopperTiles::of(head_dim)) }
    }

    /// Queries of a tile of the forward step, queries and keys of one of the backward step.
    fn tile_sizes(self, head_dim: usize) -> [usize; 3] {
        let forward = if self.forward_on_hopper { 128 } else { 16 * atoms(head_dim) * THREADS / 32 };
        let [queries, keys] = self.backward.map_or([BLOCK; 2], |tiles| [tiles.query_groups * BLOCK, tiles.key_groups * BLOCK]);
        [forward, queries, keys]
    }
}

/// Elements of a row of a tile in shared memory (`ROW` of attention_core.cuh).
pub(super) fn tile_row(head_dim: usize) -> usize {
    head_dim.next_multiple_of(16) + 8
}

impl Plan {
    /// For documents packed one after the other.
    ///
    /// - `cu_seqlens`: borders of the documents, ascending, first 0; a document may be empty
    /// - `scale`: factor on the scores; `window`: the query at i sees keys j with `i - window < j <= i`
    ///
    /// Errors: [`Error::Argument`] if heads, borders, scale or window do not fit.
    pub fn packed(device: &Arc<Device>, heads: Heads, cu_seqlens: &[i32], scale: f32, window: Option<usize>) -> Result<Self> {
        let ascend = cu_seqlens.first() == Some(&0) && cu_seqlens.windows(2).all(|pair| pair[0] <= pair[1]);
        if !ascend {
            return Err(Error::argument("attention", "cu_seqlens", "ascending borders from 0", format!("{cu_seqlens:?}")));
        }
        Self::of_spans(device, heads, &documents(cu_seqlens), scale, window)
    }

    /// [`Plan::packed`] with kernels of the caller's choice, for tests and measurements. Errors as there.
    pub fn packed_with(
        device: &Arc<Device>,
        heads: Heads,
        cu_seqlens: &[i32],
        scale: f32,
        window: Option<usize>,
        kernels: Kernels,
    ) -> Result<Self> {
        let mut plan = Self::packed(device, heads, cu_seqlens, scale, window)?;
        let (spans, [forward, queries, keys]) = (documents(cu_seqlens), kernels.tile_sizes(heads.head_dim));
        plan.kernels = kernels;
        plan.forward = upload(device, &tiles(&spans, forward))?;
        plan.backward_queries = upload(device, &tiles(&spans, queries))?;
        plan.backward_keys = upload(device, &key_tiles(&spans, keys))?;
        Ok(plan)
    }

    /// Takes other documents in place, as many rows and tiles ([`tile_counts`]) of them: whatever reads the plan goes on.
    ///
    /// Errors: those of the device. Panics for other numbers of them.
    pub fn replace(&mut self, cu_seqlens: &[i32]) -> Result<()> {
        let (spans, [forward, queries, keys]) = (documents(cu_seqlens), self.kernels.tile_sizes(self.heads.head_dim));
        self.forward.upload(tiles(&spans, forward).as_flattened())?;
        self.backward_queries.upload(tiles(&spans, queries).as_flattened())?;
        self.backward_keys.upload(key_tiles(&spans, keys).as_flattened())?;
        self.each_row.upload(each_row(&spans, self.rows).as_flattened())
    }

    /// For queries that follow cached keys; `spans[i]` belongs to line i of the block table.
    ///
    /// Errors: as [`Plan::packed`].
    pub fn of_spans(device: &Arc<Device>, heads: Heads, spans: &[Span], scale: f32, window: Option<usize>) -> Result<Self> {
        let op = "attention";
        heads.check(op)?;
        if !(scale > 0.0 && scale.is_finite()) {
            return Err(Error::argument(op, "scale", "a positive number", scale));
        }
        if window == Some(0) {
            return Err(Error::argument(op, "window", "at least 1 token, or none", 0));
        }
        let rows = spans.iter().map(|span| span.row + span.count).max().unwrap_or(0);
        let kernels = Kernels::of(device, heads.head_dim);
        let [forward, queries, keys] = kernels.tile_sizes(heads.head_dim);
        Ok(Self {
            heads,
            scale,
            window: window.map_or(NO_WINDOW, |window| window.min(NO_WINDOW)),
            rows,
            kernels,
            forward: upload(device, &tiles(spans, forward))?,
            backward_queries: upload(device, &tiles(spans, queries))?,
            backward_keys: upload(device, &key_tiles(spans, keys))?,
            each_row: upload(device, &each_row(spans, rows))?,
        })
    }

    pub(super) fn check(&self, op: &'static str, qkv: usize, o: usize, lse: usize) -> Result<()> {
        let width = self.heads.heads * self.heads.head_dim;
        let parts = [("qkv", qkv, self.heads.width()), ("o", o, width), ("lse", lse, self.heads.heads)];
        for (arg, got, width) in parts {
            if got != self.rows * width {
                let expected = format!("[{}, {width}]", self.rows);
                return Err(Error::Shape { op, arg, expected, got: format!("{got} values") });
            }
        }
        Ok(())
    }
}

impl Span {
    /// What the kernels read of a query or a tile: row of position 0, keys, position, line of the block table.
    fn line(&self, index: usize, position: usize) -> [i32; 4] {
        let keys = self.cached + self.count;
        [self.row as i32 - self.cached as i32, keys as i32, position as i32, index as i32]
    }
}

fn documents(cu_seqlens: &[i32]) -> Vec<Span> {
    cu_seqlens.windows(2).map(|pair| Span { row: pair[0] as usize, cached: 0, count: (pair[1] - pair[0]) as usize }).collect()
}

/// Tiles of documents packed one after the other: of queries for the forward step, of queries and of keys for the backward step.
///
/// - `cu_seqlens`: borders of the documents, ascending
pub fn tile_counts(device: &Device, heads: Heads, cu_seqlens: &[i32]) -> [usize; 3] {
    let sizes = Kernels::of(device, heads.head_dim).tile_sizes(heads.head_dim);
    sizes.map(|size| documents(cu_seqlens).iter().map(|span| span.count.div_ceil(size)).sum())
}

fn upload(device: &Arc<Device>, lines: &[[i32; 4]]) -> Result<DeviceBuffer<i32>> {
    DeviceBuffer::copy_of(device, "attention plan", lines.as_flattened())
}

/// A line for each of `rows` rows.
fn each_row(spans: &[Span], rows: usize) -> Vec<[i32; 4]> {
    let mut lines = vec![[0; 4]; rows];
    for (index, span) in spans.iter().enumerate() {
        for (position, line) in lines[span.row..span.row + span.count].iter_mut().enumerate() {
            *line = span.line(index, span.cached + position);
        }
    }
    lines
}

/// Tiles of `queries` positions, those with most keys first, so that the last to run are short.
fn tiles(spans: &[Span], queries: usize) -> Vec<[i32; 4]> {
    let mut tiles: Vec<[i32; 4]> = (spans.iter().enumerate())
        .flat_map(|(index, span)| (0..span.count).step_by(queries).map(move |first| span.line(index, span.cached + first)))
        .collect();
    tiles.sort_by_key(|tile| std::cmp::Reverse(tile[2]));
    tiles
}

/// Tiles of `keys` positions, those that most queries see first.
fn key_tiles(spans: &[Span], keys: usize) -> Vec<[i32; 4]> {
    let mut tiles = tiles(spans, keys);
    tiles.sort_by_key(|tile| std::cmp::Reverse(tile[1] - tile[2]));
    tiles
}

/// A paged cache of keys and values.
#[derive(Clone, Copy)]
pub struct Cache<'a, E: Float> {
    /// `[blocks, 64, kv_heads, head_dim]` each.
    pub keys: View<'a, E>,
    pub values: View<'a, E>,
    /// `[sequences, table_width]`: the blocks of each sequence, in order; each below `blocks`, else memory beyond is read.
    pub block_table: View<'a, i32>,
    pub table_width: usize,
}

/// Attends within each document.
///
/// - `qkv`: `[tokens, (heads + 2 * kv_heads) * head_dim]`, after rope; query head h reads kv head `h / (heads / kv_heads)`
/// - `o`: `[tokens, heads * head_dim]`, `lse`: `[tokens, heads]`, f32, natural logarithm; both written in full
///
/// Errors: [`Error::Shape`] if sizes do not fit the plan.
pub fn attention<E: Float>(device: &Device, plan: &Plan, qkv: View<E>, o: ViewMut<E>, lse: ViewMut<f32>) -> Result<()> {
    run(device, plan, qkv, o, lse, None)
}

/// [`attention`] whose keys and values lie in `cache`, those of the rows of `qkv` included.
pub(super) fn run<E: Float>(
    device: &Device,
    plan: &Plan,
    qkv: View<E>,
    mut o: ViewMut<E>,
    mut lse: ViewMut<f32>,
    cache: Option<Cache<E>>,
) -> Result<()> {
    let op = "attention";
    plan.check(op, qkv.len(), o.len(), lse.len())?;
    if plan.rows == 0 {
        return Ok(());
    }
    let Heads { heads, kv_heads, head_dim } = plan.heads;
    let plain = E::DTYPE == Dtype::F32;
    let hopper = !plain && plan.kernels.forward_on_hopper;
    let program = match (plain, hopper) {
        (true, _) => Program::AttentionPlain,
        (_, true) => Program::AttentionHopper,
        _ => Program::Attention,
    };
    let variant = Variant::of::<E>(program).with("HEAD_DIM", head_dim as u32).with("PAGED", u32::from(cache.is_some()));
    let variant = if plain || hopper { variant } else { variant.with("ATOMS", atoms(head_dim) as u32) };
    assert!(plain || o.address.is_multiple_of(4), "{op}: o begins at an odd element");
    let sources = [Some(qkv.address), cache.map(|cache| cache.keys.address), cache.map(|cache| cache.values.address)];
    assert!(!hopper || sources.iter().flatten().all(|at| at.is_multiple_of(16)), "{op}: operands are not aligned to 16 bytes");
    let launch = Launch::new(device, op, variant, "attention")?.waiting().read(qkv).write(&mut o).write(&mut lse);
    let launch = if plain { launch.read(plan.each_row.view()).int(plan.rows * heads) } else { launch.read(plan.forward.view()) };
    let launch = launch.int(heads).int(kv_heads).float(plan.scale).int(plan.window);
    let launch = launch.read_or_null(cache.map(|cache| cache.keys)).read_or_null(cache.map(|cache| cache.values));
    let launch = launch.read_or_null(cache.map(|cache| cache.block_table)).int(cache.map_or(0, |cache| cache.table_width));
    if plain {
        // SAFETY: the arguments are attention's in attention_plain.cu: a warp is a head of one of `rows` rows, which reads keys
        // from its document's first row (or its line of the table) up to its position and writes its own o and lse.
        return unsafe { launch.run(((plan.rows * heads).div_ceil(PLAIN_WARPS), 1, 1), 32 * PLAIN_WARPS, 0) };
    }
    if hopper {
        let shared = (2 + 2 * 4) * BLOCK * head_dim * 2;
        // SAFETY: as below. The shared memory holds 128 queries and four blocks of keys and of values.
        return unsafe { launch.run((plan.forward.len() / 4, heads, 1), 256, shared) };
    }
    let shared = (plan.kernels.tile_sizes(head_dim)[0] + 3 * BLOCK) * tile_row(head_dim) * 2;
    // SAFETY: the arguments are attention's in attention.cu. The plan's tiles lie within `rows` rows, which qkv, o and lse have;
    // rows beyond a document's end are neither read nor written. The shared memory holds a tile of queries and three of keys.
    unsafe { launch.run((plan.forward.len() / 4, heads, 1), THREADS, shared) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_each_query_once_and_the_longest_come_first() {
        let spans =
            [Span { row: 0, cached: 0, count: 130 }, Span { row: 130, cached: 70, count: 1 }, Span { row: 131, cached: 0, count: 0 }];
        assert_eq!(tiles(&spans, 64), [[0, 130, 128, 0], [60, 71, 70, 1], [0, 130, 64, 0], [0, 130, 0, 0]]);
    }
}
