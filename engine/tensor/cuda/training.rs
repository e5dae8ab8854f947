//! Forward and backward pass of a training step on a GPU, captured once for a shape and replayed by one call. What differs between
//! two steps of a shape lies in buffers that the kernels read ([`Operands`]); gradients of weights lie where the graphs wrote them
//! first (`Parameter::keep_gradient`). Bits are those of the same step without a graph: its kernels are the same.

use super::attention::{Tables, attend};
use super::embedding::embedding_of;
use super::logprobs::differentiate;
use super::value::GRADIENTS;
use crate::error::Result;
use crate::kernels::cuda::attention::{Plan, tile_counts};
use crate::kernels::cuda::device::Device;
use crate::kernels::cuda::graph::{Graph, Memory};
use crate::kernels::cuda::memory::{DeviceBuffer, Keeper};
use crate::tensor::attention::{Heads, Rope};
use crate::tensor::parameter::Parameter;
use crate::tensor::place::Array;
use crate::tensor::{ModelElement, Tensor};
use std::collections::VecDeque;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, MutexGuard};

/// Shapes that graphs are kept of; the oldest goes first. All share their memory.
const STEPS_MAX: usize = 4;
/// Captures that may fail. One does if a shape was only looked at before, and its backward pass meets a kernel for the first time.
const FAILURES_MAX: usize = 3;
/// Shapes that are remembered as seen.
const SEEN_MAX: usize = 64;

/// What a captured step is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    tokens: usize,
    /// Tokens with a label.
    labelled: usize,
    /// Tiles of the documents: forward, and of queries and of keys backward.
    tiles: [usize; 3],
    /// Whether layers are computed again in the backward pass.
    recompute: bool,
}

impl Shape {
    /// - `borders`: of the documents, from 0 to the number of tokens, rising
    pub fn of(device: &Device, heads: Heads, borders: &[i32], labelled: usize, recompute: bool) -> Self {
        let tokens = borders.last().map_or(0, |last| *last as usize);
        Self { tokens, labelled, tiles: tile_counts(device, heads, borders), recompute }
    }
}

/// A micro-batch.
pub struct Batch {
    /// `[tokens]` each.
    pub tokens: Vec<i32>,
    pub position_ids: Vec<i32>,
    /// Borders of the documents, from 0 to the number of tokens.
    pub borders: Vec<i32>,
    /// The rows that have a label, and their labels: `[labelled]` each.
    pub rows: Vec<i32>,
    pub labels: Vec<i32>,
}

/// What a step computes.
#[derive(Clone, Copy)]
pub struct Task<'a> {
    pub shape: Shape,
    pub batch: &'a Batch,
    /// The derivative in each labelled token's loss.
    pub coefficient: f32,
}

/// What a model brings to the steps of a shape.
#[derive(Clone, Copy)]
pub struct Setting<'a> {
    pub heads: Heads,
    pub rope: &'a Rope,
    /// Windows of the layers, each once.
    pub windows: &'a [Option<usize>],
}

/// What the kernels of a step read that differs between two steps of a shape.
pub struct Operands {
    shape: Shape,
    heads: Heads,
    tokens: Arc<DeviceBuffer<i32>>,
    positions: DeviceBuffer<i32>,
    rows: Arc<DeviceBuffer<i32>>,
    labels: Arc<DeviceBuffer<i32>>,
    /// Derivatives of the loss in minus each label's log-probability: `[labelled]`.
    coefficients: DeviceBuffer<f32>,
    /// `[head_dim / 2]`
    inv_freq: DeviceBuffer<f32>,
    attention_scaling: f32,
    plans: Vec<(Option<usize>, Arc<Plan>)>,
}

impl Operands {
    fn new(device: &Arc<Device>, shape: Shape, setting: Setting, batch: &Batch) -> Result<Self> {
        let Setting { heads, rope, windows } = setting;
        let plan = |window: &Option<usize>| Ok((*window, Arc::new(Plan::packed(device, heads, &batch.borders, heads.scale(), *window)?)));
        Ok(Self {
            shape,
            heads,
            tokens: Arc::new(DeviceBuffer::copy_of(device, "tokens", &batch.tokens)?),
            positions: DeviceBuffer::copy_of(device, "positions", &batch.position_ids)?,
            rows: Arc::new(DeviceBuffer::copy_of(device, "rows", &batch.rows)?),
            labels: Arc::new(DeviceBuffer::copy_of(device, "labels", &batch.labels)?),
            coefficients: DeviceBuffer::scratch(device, "labels", shape.labelled)?,
            inv_freq: DeviceBuffer::copy_of(device, "positions", &rope.inv_freq)?,
            attention_scaling: rope.attention_scaling,
            plans: windows.iter().map(plan).collect::<Result<_>>()?,
        })
    }

    fn set(&mut self, batch: &Batch, coefficient: f32) -> Result<()> {
        fn alone<T>(shared: &mut Arc<T>) -> &mut T {
            Arc::get_mut(shared).expect("a step has ended, and its graph holds addresses")
        }
        alone(&mut self.tokens).upload(&batch.tokens)?;
        self.positions.upload(&batch.position_ids)?;
        alone(&mut self.rows).upload(&batch.rows)?;
        alone(&mut self.labels).upload(&batch.labels)?;
        self.coefficients.upload(&vec![coefficient; batch.rows.len()])?;
        self.plans.iter_mut().try_for_each(|(_, plan)| alone(plan).replace(&batch.borders))
    }

    fn device(&self) -> &Arc<Device> {
        self.positions.device()
    }

    /// The rows of `weight` that the tokens name: `[tokens, hidden]`.
    ///
    /// Errors: those of the device, here and below.
    pub fn embedding<E: ModelElement>(&self, weight: &Arc<Parameter<E>>) -> Result<Tensor<E, 2>> {
        embedding_of(self.device(), self.tokens.clone(), weight)
    }

    /// Cosines and sines of the positions.
    pub fn tables<E: ModelElement>(&self) -> Result<Arc<Tables>> {
        Tables::of::<E>(self.device(), self.inv_freq.view(), self.attention_scaling, self.positions.view()).map(Arc::new)
    }

    /// As [`super::attention::attention`], of these documents.
    pub fn attention<E: ModelElement>(&self, qkv: &Tensor<E, 2>, tables: &Arc<Tables>, window: Option<usize>) -> Result<Tensor<E, 2>> {
        let plan = self.plans.iter().find(|(of, _)| *of == window).map(|(_, plan)| plan.clone());
        attend(self.device(), qkv, self.heads, tables, plan.expect("there is one for each window of the model"))
    }

    /// The backward pass from the cross entropy of `x`, `[tokens, hidden]`, after the final norm. Leaves gradients, and gives the
    /// log-probabilities of the labels, `[labelled]`.
    pub fn backward<E: ModelElement>(&self, x: &Tensor<E, 2>, head: &Arc<Parameter<E>>) -> Result<DeviceBuffer<f32>> {
        let (logprobs, dx) = differentiate(self.device(), x, head, (&self.rows, &self.labels), self.coefficients.view())?;
        if let Some(dx) = dx {
            x.backward_from(Array::Cuda(dx))?;
        }
        Ok(logprobs)
    }
}

/// A step that is one call.
struct Captured {
    graph: Graph,
    /// What it leaves: `[labelled]`.
    logprobs: DeviceBuffer<f32>,
    /// Where the weights and the gradients of those that train lay, whose addresses it holds.
    places: Vec<[Option<u64>; 3]>,
    /// Which of those that train it gives a gradient.
    gives: Vec<bool>,
}

/// The captured steps of a shape.
struct Step {
    operands: Arc<Operands>,
    /// Of a first micro-batch, which writes gradients, and of one that adds to them.
    captured: [Option<Captured>; 2],
}

/// The captured training steps of a model.
#[derive(Default)]
pub struct TrainingGraphs {
    memory: Option<Arc<Memory>>,
    seen: VecDeque<Shape>,
    steps: Vec<Step>,
    /// Captures that failed.
    failures: usize,
    /// They failed too often, or losses are read before they run backwards, which captured steps cannot serve.
    is_off: bool,
}

impl TrainingGraphs {
    /// Whether a step of this shape has run before, which loaded its kernels and brought its memory. From now on it has.
    pub fn has_run(&mut self, shape: Shape) -> bool {
        if self.is_off {
            return false;
        }
        let has_run = self.seen.contains(&shape);
        if !has_run {
            self.seen.push_back(shape);
            if self.seen.len() > SEEN_MAX {
                self.seen.pop_front();
            }
        }
        has_run
    }

    /// Forgets all graphs, and gives their memory back.
    pub fn clear(&mut self) {
        *self = Self { failures: self.failures, is_off: self.is_off, ..Self::default() };
    }

    /// Captures and replays nothing any more.
    pub fn turn_off(&mut self) {
        *self = Self { is_off: true, ..Self::default() };
    }

    /// Runs forward and backward pass of a micro-batch: gradients are left in the weights, and the log-probabilities of the labels,
    /// `[labelled]`, are returned. None where that cannot be one call, and nothing has happened then.
    ///
    /// - `parameters`: all of the model
    /// - `compute`: the passes on the device, the same work at each call, which asks nothing of the host
    ///
    /// Errors: those of the device.
    pub fn run<E: ModelElement>(
        &mut self,
        device: &Arc<Device>,
        setting: Setting,
        Task { shape, batch, coefficient }: Task,
        parameters: &[Arc<Parameter<E>>],
        compute: impl Fn(&Arc<Operands>) -> Result<DeviceBuffer<f32>>,
    ) -> Result<Option<DeviceBuffer<f32>>> {
        let op = "cross_entropy";
        let trained: Vec<_> = parameters.iter().filter(|parameter| parameter.trains()).collect();
        let adds = trained.iter().any(|parameter| parameter.has_gradient());
        if self.is_off || (self.memory.is_none() && device.memory_bytes_free() < device.memory_bytes as u64 / 4) {
            // Graphs have memory of their own, beside that of other steps.
            return Ok(None);
        }
        if !adds {
            trained.iter().try_for_each(|parameter| parameter.keep_gradient())?;
        }
        if !trained.iter().all(|parameter| if adds { parameter.has_kept_gradient() } else { parameter.may_be_given() }) {
            return Ok(None);
        }
        let memory = self.memory.get_or_insert_with(|| Memory::new(device)).clone();
        let index = match self.steps.iter().position(|step| step.operands.shape == shape) {
            Some(index) => index,
            None => {
                if self.steps.len() == STEPS_MAX {
                    self.steps.remove(0);
                }
                let operands = Arc::new(Operands::new(device, shape, setting, batch)?);
                self.steps.push(Step { operands, captured: [None, None] });
                self.steps.len() - 1
            }
        };
        let Step { operands, captured } = &mut self.steps[index];
        let captured = &mut captured[usize::from(adds)];
        Arc::get_mut(operands).expect("a step has ended, and its graph holds addresses").set(batch, coefficient)?;
        let places: Vec<_> = parameters.iter().map(|parameter| parameter.places()).collect();
        if captured.as_ref().is_none_or(|captured| captured.places != places) {
            // What the old one held is the new one's.
            *captured = None;
            match Graph::capture(&memory, op, || compute(operands)) {
                Ok((graph, logprobs)) => {
                    let gives = trained.iter().map(|parameter| parameter.has_gradient()).collect();
                    *captured = Some(Captured { graph, logprobs, places, gives });
                }
                Err(_) => {
                    // Kernel by kernel it may do; if not, it says why.
                    if !adds {
                        trained.iter().for_each(|parameter| parameter.clear_gradient());
                    }
                    self.failures += 1;
                    if self.failures == FAILURES_MAX {
                        self.turn_off();
                    }
                    return Ok(None);
                }
            }
        }
        let captured = captured.as_ref().expect("it was captured above");
        captured.graph.launch(op)?;
        trained.iter().zip(&captured.gives).filter(|(_, gives)| **gives).for_each(|(parameter, _)| parameter.take_kept_gradient());
        // The next replay overwrites them; a loss may be read later.
        captured.logprobs.try_clone().map(Some)
    }
}

impl<E: ModelElement> Parameter<E> {
    fn keeper(&self) -> MutexGuard<'_, Option<Keeper<f32>>> {
        self.keeper.lock().expect("nothing panics while a place is kept")
    }

    /// From now on gradients come to lie at one place, which graphs know. Panics on the host.
    fn keep_gradient(&self) -> Result<()> {
        let mut keeper = self.keeper();
        if keeper.is_none() {
            let device = self.place().device().expect("a weight on the host is part of no graph");
            *keeper = Some(Keeper::of(DeviceBuffer::scratch(device, GRADIENTS, self.gradient_len())?));
        }
        Ok(())
    }

    /// Whether there is a place where gradients are kept.
    pub(in crate::tensor) fn keeps_gradient(&self) -> bool {
        self.keeper().is_some()
    }

    /// Whether there is a gradient, and it lies where gradients are kept.
    fn has_kept_gradient(&self) -> bool {
        let gradient = self.gradient.lock().expect("nothing panics while a gradient is read");
        let address = match gradient.as_ref() {
            Some(Array::Cuda(gradient)) => gradient.view().address(),
            _ => return false,
        };
        self.keeper().as_ref().is_some_and(|keeper| keeper.address() == address)
    }

    /// Whether there is no gradient, and nobody holds the place for one.
    fn may_be_given(&self) -> bool {
        !self.has_gradient() && self.keeper().as_ref().is_some_and(Keeper::is_free)
    }

    /// The place where gradients are kept, if it is and nobody holds it.
    pub(in crate::tensor) fn kept_place(&self) -> Option<DeviceBuffer<f32>> {
        self.keeper().as_ref().and_then(Keeper::lend)
    }

    /// What a graph wrote or added there is the gradient.
    fn take_kept_gradient(&self) {
        let mut gradient = self.gradient.lock().expect("nothing panics while a gradient is written");
        if gradient.is_none() {
            *gradient = self.kept_place().map(Array::Cuda);
        }
        self.gradients.fetch_add(1, Relaxed);
    }

    /// The addresses of the weight, of its remainder, which lengths of rows are read with, and of where gradients are kept, which they
    /// are not while it is frozen.
    fn places(&self) -> [Option<u64>; 3] {
        let value = self.read();
        let rest = value.cuda.as_ref().and_then(|cuda| cuda.remainder.as_ref()).map(|rest| rest.view().address());
        [Some(value.on_device().address()), rest, self.keeper().as_ref().map(Keeper::address)]
    }
}
