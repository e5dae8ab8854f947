//! The step that continues texts by one token each, on a GPU: captured once for some numbers of texts and of cached blocks, then
//! replayed by one call. What differs between two steps lies in one buffer that the kernels read ([`Operands`]), and a step for
//! fewer texts leaves the other rows idle. Bits are those of the same step without a graph: the kernels are the same, and none of
//! them lets a row, or a span of keys that a text does not have, touch another.

use super::attention::Tables;
use super::embedding::rows_of;
use super::paged_attention::{DeviceBlocks, turn_and_append};
use super::{activation, scratch};
use crate::error::Result;
use crate::kernels::cuda::attention::{Cache, Span as Place};
use crate::kernels::cuda::attention_step::{self, Step};
use crate::kernels::cuda::device::Device;
use crate::kernels::cuda::graph::{Graph, Memory};
use crate::kernels::cuda::memory::{DeviceBuffer, View, ViewMut};
use crate::kernels::cuda::paged::{self, Decode, SPAN};
use crate::tensor::attention::{Heads, Rope};
use crate::tensor::paged_attention::{BLOCK_POSITIONS, Span};
use crate::tensor::parameter::Parameter;
use crate::tensor::{ModelElement, Tensor};
use std::sync::Arc;

/// Most texts of a captured step; a step of more is launched kernel by kernel, and has work enough to hide that.
const ROWS_MAX: usize = 256;

/// What a captured step is made for: both numbers are powers of two, so that few of them are captured while texts come, grow and end.
#[derive(Clone, Copy, Debug)]
struct Shape {
    /// Texts, idle ones included.
    rows: usize,
    /// Cached blocks of the longest text that fits: lines of the block table have this width.
    width: usize,
}

impl Shape {
    /// The smallest that fits; none for more texts than a captured step has.
    fn of(spans: &[Span]) -> Option<Self> {
        let blocks = spans.iter().map(|span| span.blocks.len()).max()?;
        let width = blocks.next_power_of_two().max(SPAN / BLOCK_POSITIONS);
        (spans.len() <= ROWS_MAX).then(|| Self { rows: spans.len().next_power_of_two(), width })
    }
}

/// What the kernels of a step read that differs between two steps.
pub struct Operands {
    shape: Shape,
    /// Tokens, positions, slots and lengths, `[rows]` each, then the block table, `[rows, width]`: one copy brings them all.
    numbers: DeviceBuffer<i32>,
    /// `[head_dim / 2]`
    inv_freq: DeviceBuffer<f32>,
    attention_scaling: f32,
}

impl Operands {
    fn new(device: &Arc<Device>, shape: Shape, rope: &Rope) -> Result<Self> {
        let label = "tables of blocks";
        Ok(Self {
            shape,
            numbers: DeviceBuffer::scratch(device, label, shape.rows * (4 + shape.width))?,
            inv_freq: DeviceBuffer::copy_of(device, label, &rope.inv_freq)?,
            attention_scaling: rope.attention_scaling,
        })
    }

    fn set(&mut self, tokens: &[i32], spans: &[Span]) -> Result<()> {
        let Shape { rows, width } = self.shape;
        let mut numbers = vec![0; self.numbers.len()];
        let (columns, table) = numbers.split_at_mut(4 * rows);
        // Idle rows: any token, without a place for its keys and without keys to look at.
        columns[2 * rows..3 * rows].fill(-1);
        for (row, (token, span)) in tokens.iter().zip(spans).enumerate() {
            assert!(span.count == 1 && span.row == row, "generate: a captured step of {} tokens at row {}", span.count, span.row);
            let line = &mut table[row * width..][..span.blocks.len()];
            line.iter_mut().zip(&span.blocks).for_each(|(to, id)| *to = *id as i32);
            let slots = paged::slots(Place { row, cached: span.position, count: 1 }, line);
            let column = [*token, span.position as i32, slots[0], span.position as i32 + 1];
            (0..4).for_each(|part| columns[part * rows + row] = column[part]);
        }
        self.numbers.upload(&numbers)
    }

    fn column(&self, part: usize) -> View<'_, i32> {
        self.numbers.part(part * self.shape.rows..(part + 1) * self.shape.rows)
    }

    /// The rows of `weight` that the tokens name: `[rows, hidden]`.
    ///
    /// Errors: those of the device, here and below.
    pub fn embedding<E: ModelElement>(&self, weight: &Parameter<E>) -> Result<Tensor<E, 2>> {
        let (x, _) = rows_of(self.numbers.device(), self.column(0), weight)?;
        Ok(Tensor::from_operation_on_device([self.shape.rows, weight.columns()], x, &[], false, |_, _| Ok(())))
    }

    /// Cosines and sines of the positions.
    pub fn tables<E: ModelElement>(&self) -> Result<Tables> {
        Tables::of::<E>(self.numbers.device(), self.inv_freq.view(), self.attention_scaling, self.column(1))
    }

    /// As [`super::paged_attention::paged_attention`], for these texts.
    pub fn attention<E: ModelElement>(
        &self,
        qkv: &Tensor<E, 2>,
        heads: Heads,
        tables: &Tables,
        cache: &mut DeviceBlocks,
        layer: usize,
        window: Option<usize>,
    ) -> Result<Tensor<E, 2>> {
        let device = self.numbers.device();
        let Shape { rows, width } = self.shape;
        let mixed_width = heads.heads * heads.head_dim;
        let (mut mixed, mut lse) = (activation::<E>(device, rows * mixed_width)?, scratch::<f32>(device, rows * heads.heads)?);
        let settings = Decode { heads, scale: heads.scale(), window, length_max: width * BLOCK_POSITIONS };
        let whole = |mixed| Ok(Tensor::from_operation_on_device([rows, mixed_width], mixed, &[], false, |_, _| Ok(())));
        if attention_step::fits::<E>(device, heads, rows) {
            let (cos, sin, slots, lengths) = (tables.cos.view(), tables.sin.view(), self.column(2), self.column(3));
            let step = Step { cos, sin, slots, block_table: self.numbers.part(4 * rows..), table_width: width, lengths };
            let [keys, values] = cache.layer_mut(layer).map(ViewMut::cast);
            attention_step::attend(device, settings, qkv.cuda(), step, keys, values, mixed.view_mut(), lse.view_mut())?;
            return whole(mixed);
        }
        let turned = turn_and_append(device, qkv, heads, tables, self.column(2), cache, layer)?;
        let [keys, values] = cache.layer(layer);
        let cached = Cache { keys: keys.cast(), values: values.cast(), block_table: self.numbers.part(4 * rows..), table_width: width };
        paged::decode(device, settings, turned.view(), cached, self.column(3), mixed.view_mut(), lse.view_mut())?;
        whole(mixed)
    }
}

/// A step of one shape: run once as it is, which loads its kernels and brings its memory, then captured.
pub struct CapturedStep {
    shape: Shape,
    /// Of the weights, whose addresses the graph holds, and of the cache.
    version: u64,
    capacity: usize,
    memory: Arc<Memory>,
    operands: Arc<Operands>,
    has_run: bool,
    /// With what it leaves: `[rows, vocab]`.
    graph: Option<(Graph, Arc<DeviceBuffer<f32>>)>,
}

impl CapturedStep {
    /// Runs the step: its logits, `[rows, vocab]`, of which the first are those of `spans`. They hold until the next step.
    ///
    /// - `tokens`: `[texts]`; `spans`: the texts that the step was taken for
    /// - `compute`: the step on the device: the same work at each call, which asks nothing of the host
    pub fn run(
        &mut self,
        tokens: &[i32],
        spans: &[Span],
        compute: impl Fn(&Arc<Operands>) -> Result<DeviceBuffer<f32>>,
    ) -> Result<Arc<DeviceBuffer<f32>>> {
        Arc::get_mut(&mut self.operands).expect("a step has ended, and its graph holds addresses").set(tokens, spans)?;
        if !self.has_run {
            self.has_run = true;
            return Ok(Arc::new(compute(&self.operands)?));
        }
        if self.graph.is_none() {
            let (graph, logits) = Graph::capture_overlapping(&self.memory, "generate", || compute(&self.operands))?;
            self.graph = Some((graph, Arc::new(logits)));
        }
        let (graph, logits) = self.graph.as_ref().expect("it was captured above");
        graph.launch("generate")?;
        Ok(logits.clone())
    }
}

/// The captured steps over one cache.
pub struct CapturedSteps {
    memory: Arc<Memory>,
    steps: Vec<CapturedStep>,
}

impl CapturedSteps {
    pub fn new(device: &Arc<Device>) -> Self {
        Self { memory: Memory::new(device), steps: Vec::new() }
    }

    /// Forgets all: the cache moves.
    pub fn clear(&mut self) {
        self.steps.clear();
    }
}

impl DeviceBlocks {
    /// Takes a step out that fits texts of one token each, to run it; a new one if there is none for these weights. None for more
    /// texts than a captured step has.
    ///
    /// - `version`: changes with the weights
    ///
    /// Errors: those of the device.
    pub fn take_step(&mut self, spans: &[Span], version: u64, rope: &Rope) -> Result<Option<CapturedStep>> {
        let Some(shape) = Shape::of(spans) else { return Ok(None) };
        let (capacity, steps) = (self.capacity(), &mut self.captured.steps);
        steps.retain(|step| step.version == version);
        if let Some(index) = steps.iter().position(|step| step.shape.rows == shape.rows) {
            let step = steps.swap_remove(index);
            // Texts have outgrown a narrower one. A wider one will do, since spans without keys cost next to nothing, and so each
            // number of texts has one step, and logits once.
            if step.shape.width >= shape.width {
                return Ok(Some(step));
            }
        }
        let operands = Arc::new(Operands::new(self.device(), shape, rope)?);
        let memory = self.captured.memory.clone();
        Ok(Some(CapturedStep { shape, version, capacity, memory, operands, has_run: false, graph: None }))
    }

    /// Keeps a step for the next time, unless the cache has moved.
    pub fn put_back(&mut self, step: CapturedStep) {
        if step.capacity == self.capacity() {
            self.captured.steps.push(step);
        }
    }
}
