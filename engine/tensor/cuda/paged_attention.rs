//! Attention over cached keys and values on a GPU; see tensor/paged_attention.rs. A text's bits are those of training, whichever
//! kernel computes them: one for texts that go on by a token, one for pieces of prompts.

use super::attention::Tables;
use super::decode::CapturedSteps;
use super::{activation, scratch};
use crate::error::Result;
use crate::kernels::cuda::attention::{Cache, Plan, Span as PlanSpan};
use crate::kernels::cuda::device::Device;
use crate::kernels::cuda::memory::{DeviceBuffer, View, ViewMut};
use crate::kernels::cuda::paged::{self, Decode};
use crate::kernels::element::Dtype;
use crate::tensor::attention::Heads;
use crate::tensor::paged_attention::{BLOCK_POSITIONS, Span};
use crate::tensor::{ModelElement, Tensor};
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// What an out-of-memory error calls the cache.
const CACHE: &str = "cached keys and values";
/// Blocks that a cache has room for at first.
const BLOCKS_LEAST: usize = 32;

/// Memory of cached keys and values of all layers of a model, `[blocks, 64, kv_heads, head_dim]` each.
pub struct DeviceBlocks {
    device: Arc<Device>,
    /// Bytes of the keys, or of the values, of one block in one layer.
    part_bytes: usize,
    capacity: usize,
    /// Keys and values of each layer, as bytes: the cache does not know the model's type.
    layers: Vec<[DeviceBuffer<u8>; 2]>,
    /// Steps that read and write where the cache lies now.
    pub(super) captured: CapturedSteps,
}

impl DeviceBlocks {
    /// A cache without blocks.
    ///
    /// Errors: those of the device.
    pub fn new(device: &Arc<Device>, heads: Heads, layers: usize, dtype: Dtype) -> Result<Self> {
        let part_bytes = BLOCK_POSITIONS * heads.kv_heads * heads.head_dim * dtype.size();
        let empty = || DeviceBuffer::scratch(device, CACHE, 0);
        let layers = (0..layers).map(|_| Ok([empty()?, empty()?])).collect::<Result<_>>()?;
        Ok(Self { device: device.clone(), part_bytes, capacity: 0, layers, captured: CapturedSteps::new(device) })
    }

    /// Bytes of one block, all layers together.
    pub fn block_bytes(&self) -> usize {
        2 * self.layers.len() * self.part_bytes
    }

    /// Bytes that the device has left for blocks.
    pub fn bytes_free(&self) -> u64 {
        self.device.memory_bytes_free()
    }

    /// Makes room for block `id`. Room grows by doubling, layer by layer, and is kept.
    ///
    /// Errors: [`crate::error::Error::Device`] if the device has none left.
    pub fn make(&mut self, id: u32) -> Result<()> {
        if (id as usize) < self.capacity {
            return Ok(());
        }
        self.captured.clear();
        let capacity = (2 * self.capacity).max(id as usize + 1).max(BLOCKS_LEAST);
        for part in self.layers.as_flattened_mut() {
            let mut grown = DeviceBuffer::scratch(&self.device, CACHE, capacity * self.part_bytes)?;
            grown.part_mut(..part.len()).copy_from(&self.device, part.view())?;
            *part = grown;
        }
        self.capacity = capacity;
        Ok(())
    }

    pub(super) fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Blocks that there is room for. The cache lies elsewhere once this has changed.
    pub(super) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Keys and values of a layer.
    pub(super) fn layer(&self, layer: usize) -> [View<'_, u8>; 2] {
        self.layers[layer].each_ref().map(DeviceBuffer::view)
    }

    /// The same, to be written.
    pub(super) fn layer_mut(&mut self, layer: usize) -> [ViewMut<'_, u8>; 2] {
        self.layers[layer].each_mut().map(DeviceBuffer::view_mut)
    }

    /// Makes block `to` a copy of block `from`.
    ///
    /// Errors: as [`DeviceBlocks::make`].
    pub fn copy(&mut self, from: u32, to: u32) -> Result<()> {
        self.make(to)?;
        let range = |id: u32| id as usize * self.part_bytes..(id as usize + 1) * self.part_bytes;
        let (from, to) = (range(from), range(to));
        for part in self.layers.as_flattened_mut() {
            let mut between = scratch::<u8>(&self.device, self.part_bytes)?;
            between.copy_from(part.part(from.clone()))?;
            part.part_mut(to.clone()).copy_from(&self.device, between.view())?;
        }
        Ok(())
    }
}

/// What the kernels read of a step's texts: the same in all layers.
pub struct Step {
    /// `[rows]`: where the keys of each new token go.
    slots: DeviceBuffer<i32>,
    /// `[texts, width]`
    table: DeviceBuffer<i32>,
    width: usize,
    /// Texts at the beginning that go on by a token, for the kernel that decodes, and the keys of each.
    decoding: usize,
    lengths: DeviceBuffer<i32>,
    length_max: usize,
    /// The grids of the other texts, by window.
    plans: Mutex<Vec<(Option<usize>, Arc<Plan>)>>,
}

impl Step {
    /// - `dtype`: of the activations; the f32 kernels have no decoding of their own
    ///
    /// Errors: those of the device.
    pub fn new(device: &Arc<Device>, spans: &[Span], dtype: Dtype) -> Result<Self> {
        let label = "tables of blocks";
        let width = spans.iter().map(|span| span.blocks.len()).max().unwrap_or(0);
        let (mut slots, mut table) = (Vec::new(), vec![0; spans.len() * width]);
        for (span, line) in spans.iter().zip(table.chunks_exact_mut(width.max(1))) {
            line.iter_mut().zip(&span.blocks).for_each(|(to, id)| *to = *id as i32);
            slots.extend(paged::slots(span_of(span), line));
        }
        let decoding = if dtype == Dtype::F32 { 0 } else { spans.iter().take_while(|span| span.count == 1).count() };
        let lengths: Vec<i32> = spans[..decoding].iter().map(|span| span.position as i32 + 1).collect();
        Ok(Self {
            slots: DeviceBuffer::copy_of(device, label, &slots)?,
            table: DeviceBuffer::copy_of(device, label, &table)?,
            width,
            decoding,
            length_max: lengths.iter().max().map_or(0, |length| *length as usize),
            lengths: DeviceBuffer::copy_of(device, label, &lengths)?,
            plans: Mutex::default(),
        })
    }

    /// The grid of the texts that are not decoding, whose rows are counted from the first of them.
    fn plan(&self, device: &Arc<Device>, spans: &[Span], heads: Heads, scale: f32, window: Option<usize>) -> Result<Arc<Plan>> {
        let mut plans = self.plans.lock().expect("plans are made without panics");
        if let Some((_, plan)) = plans.iter().find(|(known, _)| *known == window) {
            return Ok(plan.clone());
        }
        let rest: Vec<PlanSpan> =
            spans[self.decoding..].iter().map(|span| PlanSpan { row: span.row - self.decoding, ..span_of(span) }).collect();
        let plan = Arc::new(Plan::of_spans(device, heads, &rest, scale, window)?);
        plans.push((window, plan.clone()));
        Ok(plan)
    }
}

fn span_of(span: &Span) -> PlanSpan {
    PlanSpan { row: span.row, cached: span.position, count: span.count }
}

/// The queries of new tokens at their positions, in the places that they have in `qkv`; keys and values go to the cache.
///
/// - `slots`: as in [`paged::append`]
pub(super) fn turn_and_append<E: ModelElement>(
    device: &Arc<Device>,
    qkv: &Tensor<E, 2>,
    heads: Heads,
    tables: &Tables,
    slots: View<i32>,
    cache: &mut DeviceBlocks,
    layer: usize,
) -> Result<DeviceBuffer<E>> {
    let mut turned = activation::<E>(device, qkv.len())?;
    let [keys, values] = &mut cache.layers[layer];
    let (keys, values, angles) = (keys.view_mut().cast(), values.view_mut().cast(), (tables.cos.view(), tables.sin.view()));
    paged::append(device, heads, qkv.cuda(), angles, slots, turned.view_mut(), keys, values)?;
    Ok(turned)
}

/// As [`crate::tensor::paged_attention::paged_attention`], of spans whose rows follow one another.
#[allow(clippy::too_many_arguments, reason = "the operands of one step")]
pub fn paged_attention<E: ModelElement>(
    device: &Arc<Device>,
    qkv: &Tensor<E, 2>,
    heads: Heads,
    tables: &Tables,
    (spans, step): (&[Span], &Step),
    cache: &mut DeviceBlocks,
    layer: usize,
    window: Option<usize>,
) -> Result<Tensor<E, 2>> {
    let [tokens, width] = qkv.shape();
    let (mixed_width, scale) = (heads.heads * heads.head_dim, heads.scale());
    let turned = turn_and_append(device, qkv, heads, tables, step.slots.view(), cache, layer)?;
    let mut mixed = activation::<E>(device, tokens * mixed_width)?;
    let mut lse = scratch::<f32>(device, tokens * heads.heads)?;
    let [keys, values] = cache.layer(layer);
    let cached = |lines: Range<usize>| Cache {
        keys: keys.cast(),
        values: values.cast(),
        block_table: step.table.part(lines.start * step.width..lines.end * step.width),
        table_width: step.width,
    };
    let rows = |range: Range<usize>, width: usize| range.start * width..range.end * width;
    let (first, rest) = (0..step.decoding, step.decoding..tokens);
    if !first.is_empty() {
        let settings = Decode { heads, scale, window, length_max: step.length_max };
        let (o, lse) = (mixed.part_mut(rows(first.clone(), mixed_width)), lse.part_mut(rows(first.clone(), heads.heads)));
        paged::decode(device, settings, turned.part(rows(first.clone(), width)), cached(first), step.lengths.view(), o, lse)?;
    }
    if !rest.is_empty() {
        let plan = step.plan(device, spans, heads, scale, window)?;
        let (o, lse) = (mixed.part_mut(rows(rest.clone(), mixed_width)), lse.part_mut(rows(rest.clone(), heads.heads)));
        paged::prefill(device, &plan, turned.part(rows(rest, width)), cached(step.decoding..spans.len()), o, lse)?;
    }
    Ok(Tensor::from_operation_on_device([tokens, mixed_width], mixed, &[], false, |_, _| Ok(())))
}
