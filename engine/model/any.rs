//! `Model`: a graph in f32 or in bf16 behind one face, with the questions that scripts ask it: logits, log-probabilities,
//! losses, parameters and gradients by name.

use super::adapted::Adapter;
use super::captured_training::Graphs;
use super::config::Config;
use super::graph::{Forward, Graph, Packed};
use super::names::Named;
use super::sizes::load_bytes;
use super::weights::blocks;
use crate::checkpoint::folder::CheckpointFolder;
use crate::error::{Error, Result};
use crate::kernels::available_memory::{available_bytes, fits};
use crate::kernels::buffer::Buffer;
use crate::kernels::element::Dtype;
use crate::tensor::autograd::with_recording;
use crate::tensor::convert::to_dtype;
use crate::tensor::experts::load_balance;
use crate::tensor::parameter::Layout;
use crate::tensor::select_rows::{row_ids, select_rows};
use crate::tensor::trainable::Trainable;
use crate::tensor::{AnyTensor, ModelElement, Place, Tensor};
use crate::tensor::{head, logprobs};
use half::bf16;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

/// A graph in the element type that was chosen when the model was made.
#[derive(Clone)]
pub(super) enum AnyGraph {
    F32(Arc<Graph<f32>>),
    Bf16(Arc<Graph<bf16>>),
}

/// Runs an expression on the graph, whichever its type.
macro_rules! on_graph {
    ($model:expr, $graph:ident => $body:expr) => {
        match &$model.graph {
            $crate::model::any::AnyGraph::F32($graph) => $body,
            $crate::model::any::AnyGraph::Bf16($graph) => $body,
        }
    };
}

/// A Qwen2.5 model.
pub struct Model {
    pub(super) graph: AnyGraph,
    pub(super) recompute: AtomicBool,
    pub(super) adapter: Mutex<Option<Adapter>>,
    pub(super) training: Graphs,
    /// Weights that are frozen for now; see freezing.rs.
    pub(super) held: Mutex<BTreeSet<String>>,
}

/// A training loss and its parts.
pub struct Loss {
    /// What to run backwards: `cross_entropy + coefficient * load_balance`. Deferred; see `tensor/logprobs.rs`.
    pub total: Tensor<f32, 0>,
    /// Before its coefficient; none for a dense model, or if the coefficient is 0.
    pub load_balance: Option<Tensor<f32, 0>>,
}

/// Errors: [`Error::Argument`] if the weights alone do not fit the memory that is free.
fn check_making(place: &Place, config: &Config, dtype: Dtype) -> Result<()> {
    let bytes = load_bytes(config, dtype);
    if let Some(device) = place.device() {
        let free = device.memory_bytes_free();
        if bytes <= free {
            return Ok(());
        }
        let expected = format!("what fits the memory of {place} ({}), of which {:.1} GiB are free", device.name, free as f64 / GIB);
        return Err(Error::argument("model", "weights", expected, format!("{:.1} GiB in {dtype}", bytes as f64 / GIB)));
    }
    if fits(bytes) {
        return Ok(());
    }
    let free = available_bytes().map_or_else(String::new, |free| format!(", of which {:.1} GiB are free", free as f64 / GIB));
    let got = format!("{:.1} GiB in {dtype}; `perilune params` shows what a model takes", bytes as f64 / GIB);
    Err(Error::argument("model", "weights", format!("what fits the memory{free}"), got))
}

/// What users call weights of 8 bits.
const INT8: &str = "int8";

/// The type of a model's weights by its name: f32, bf16, or int8 for inference.
pub fn parse_dtype(name: &str) -> Option<Dtype> {
    match Dtype::parse(name) {
        Some(dtype @ (Dtype::F32 | Dtype::Bf16)) => Some(dtype),
        _ => (name == INT8).then_some(Dtype::I8),
    }
}

const GIB: f64 = (1u64 << 30) as f64;

impl Model {
    /// A new model with random weights.
    ///
    /// Errors: those of [`Config::check`]; [`Error::Argument`] for an element type in which models do not compute, and for
    /// weights that do not fit the memory.
    pub fn random(config: Config, dtype: Dtype, seed: u64) -> Result<Self> {
        Self::random_at(&Place::Host, config, dtype, seed)
    }

    /// As [`Model::random`], at `place`: the same numbers everywhere.
    ///
    /// Errors: as there; [`Error::Device`] if the device has no room.
    pub fn random_at(place: &Place, config: Config, dtype: Dtype, seed: u64) -> Result<Self> {
        config.check(Path::new("model"))?;
        check_making(place, &config, dtype)?;
        let graph = match dtype {
            Dtype::F32 => AnyGraph::F32(Arc::new(Graph::random(place, config, false, seed)?)),
            Dtype::Bf16 | Dtype::I8 => AnyGraph::Bf16(Arc::new(Graph::random(place, config, dtype == Dtype::I8, seed)?)),
            other => return Err(Error::argument("model", "dtype", "f32, bf16 or int8", other)),
        };
        Ok(Self::of(graph))
    }

    fn of(graph: AnyGraph) -> Self {
        let (recompute, adapter, held) = (AtomicBool::new(false), Mutex::default(), Mutex::default());
        Self { graph, recompute, adapter, training: Graphs::default(), held }
    }

    /// The model of a Hugging Face checkpoint folder, in its own element type or in `dtype`.
    ///
    /// - `trains`: whether it will be trained; otherwise it has no gradients
    /// - `remark`: hears of what was odd but clear
    ///
    /// Errors: those of [`Config::load`], [`CheckpointFolder::open`] and [`Graph::load`].
    pub fn load(folder: &Path, dtype: Option<Dtype>, trains: bool, remark: &mut dyn FnMut(String)) -> Result<Self> {
        Self::load_at(&Place::Host, folder, dtype, trains, remark)
    }

    /// As [`Model::load`], to `place`, by blocks of rows.
    ///
    /// Errors: as there; [`Error::Device`] if the device has no room.
    pub fn load_at(place: &Place, folder: &Path, dtype: Option<Dtype>, trains: bool, remark: &mut dyn FnMut(String)) -> Result<Self> {
        Self::load_as(place, folder, Config::load(folder)?, dtype, trains, 0, remark)
    }

    /// As [`Model::load_at`], with a head that gives one score: the folder's, or a new one in place of its head, from `seed`.
    ///
    /// Errors: as there.
    pub fn load_scoring(
        place: &Place,
        folder: &Path,
        dtype: Option<Dtype>,
        trains: bool,
        seed: u64,
        remark: &mut dyn FnMut(String),
    ) -> Result<Self> {
        let config = Config { score: true, ..Config::load(folder)? };
        Self::load_as(place, folder, config, dtype, trains, seed, remark)
    }

    fn load_as(
        place: &Place,
        folder: &Path,
        config: Config,
        dtype: Option<Dtype>,
        trains: bool,
        seed: u64,
        remark: &mut dyn FnMut(String),
    ) -> Result<Self> {
        let files = CheckpointFolder::open(folder)?;
        let dtype = dtype.unwrap_or(config.dtype);
        check_making(place, &config, dtype)?;
        let (int8, trains) = (dtype == Dtype::I8, trains && dtype != Dtype::I8);
        let graph = match dtype {
            Dtype::F32 => AnyGraph::F32(Arc::new(Graph::load(place, &files, config, false, trains, seed, remark)?)),
            Dtype::Bf16 | Dtype::I8 => AnyGraph::Bf16(Arc::new(Graph::load(place, &files, config, int8, trains, seed, remark)?)),
            other => return Err(Error::argument("model", "dtype", "f32, bf16 or int8", other)),
        };
        Ok(Self::of(graph))
    }

    /// Writes a Hugging Face checkpoint folder, whole or not at all, with `files` beside the weights. Low-rank parts are written
    /// as part of the weights; the model stays as it is.
    ///
    /// - `dtype`: of the stored weights; the model's own if none
    ///
    /// Errors: as [`Graph::save`]; [`Error::Argument`] for a type that checkpoints do not hold.
    pub fn save(&self, folder: &Path, dtype: Option<Dtype>, files: &[(String, Vec<u8>)]) -> Result<()> {
        if self.is_int8() {
            let expected = "a model of whole weights: load it in f32 or bf16";
            return Err(Error::argument("save", "model", expected, "one whose weights are rounded to 8 bits for inference"));
        }
        match dtype.unwrap_or(self.dtype()) {
            dtype @ (Dtype::F32 | Dtype::Bf16) => on_graph!(self, graph => graph.save(folder, dtype, files)),
            other => Err(Error::argument("save", "dtype", "f32 or bf16", other)),
        }
    }

    /// Writes what training keeps beside the weights, the remainders of bf16 masters and gradients that wait, into the folder
    /// `target`. With the folder that [`Model::save`] writes it is the whole model, to the bit.
    ///
    /// Errors: those of writing.
    pub fn save_training_state(&self, target: &Path) -> Result<()> {
        on_graph!(self, graph => graph.save_training_state(target))
    }

    /// Takes what [`Model::save_training_state`] wrote.
    ///
    /// Errors: [`Error::Format`] if it is that of another model; those of reading.
    pub fn load_training_state(&self, folder: &Path) -> Result<()> {
        on_graph!(self, graph => graph.load_training_state(folder))
    }

    /// Bytes of weights, masters and gradients.
    pub fn state_bytes(&self) -> u64 {
        on_graph!(self, graph => graph.parameters().iter().map(|parameter| parameter.state_bytes() as u64).sum())
    }

    /// A number that changes with every change of a weight or of a gradient that waits.
    pub fn version(&self) -> u64 {
        on_graph!(self, graph => graph.parameters().iter().map(|parameter| parameter.changes()).fold(0, u64::wrapping_add))
    }

    pub fn config(&self) -> &Config {
        on_graph!(self, graph => &graph.config)
    }

    /// Whether its matrices are integers of 8 bits with scales; [`Model::dtype`] is then the type of its activations.
    pub fn is_int8(&self) -> bool {
        on_graph!(self, graph => graph.head.layout() == Layout::Int8)
    }

    /// Where it lies and computes.
    pub fn place(&self) -> &Place {
        on_graph!(self, graph => graph.place())
    }

    /// What users call the type of its weights, as [`parse_dtype`] reads it.
    pub fn dtype_name(&self) -> &'static str {
        if self.is_int8() { INT8 } else { self.dtype().name() }
    }

    /// The element type of weights and activations.
    pub fn dtype(&self) -> Dtype {
        match self.graph {
            AnyGraph::F32(_) => Dtype::F32,
            AnyGraph::Bf16(_) => Dtype::Bf16,
        }
    }

    /// From now on, keep only each layer's input in the forward pass and compute the layer again for the backward pass.
    pub fn set_recompute(&self, recompute: bool) {
        self.recompute.store(recompute, Relaxed);
    }

    /// Whether layers are computed again; see [`Model::set_recompute`].
    pub fn recomputes(&self) -> bool {
        self.recompute.load(Relaxed)
    }

    fn run<E: ModelElement>(&self, graph: &Arc<Graph<E>>, input: &Packed) -> Result<(Tensor<E, 2>, Forward<E>)> {
        let forward = graph.forward(input, self.recomputes(), |_| {})?;
        Ok((graph.final_norm(&forward.hidden)?, forward))
    }

    /// Errors: [`Error::Argument`] if the model gives a score in place of logits.
    pub(super) fn check_language(&self, op: &'static str) -> Result<()> {
        if self.config().score {
            return Err(Error::argument(op, "self", "a model with a head over the vocabulary", "one that scores; ask it for `scores`"));
        }
        Ok(())
    }

    /// The logits of every token: `[tokens, vocab]`, f32, differentiable. Losses over labels go through [`Model::logprobs`],
    /// which stores no logits.
    ///
    /// Errors: those of [`Packed::check`]; [`Error::Argument`] for a model that scores.
    pub fn logits(&self, input: &Packed) -> Result<Tensor<f32, 2>> {
        self.check_language("logits")?;
        on_graph!(self, graph => {
            let (normed, _) = self.run(graph, input)?;
            head::logits(&normed, &graph.head)
        })
    }

    /// The logits of the given tokens alone, by index: `[rows.len(), vocab]`, f32, for looking and sampling. Not recorded.
    ///
    /// Errors: as [`Model::logits_of`].
    pub fn logits_at(&self, input: &Packed, rows: &[usize]) -> Result<Tensor<f32, 2>> {
        with_recording(false, || self.logits_of(input, rows))
    }

    /// The logits of the given tokens alone, by index: `[rows.len(), vocab]`, f32, differentiable.
    ///
    /// Errors: as [`Model::logits`]; [`Error::Argument`] for an index outside the tokens.
    pub fn logits_of(&self, input: &Packed, rows: &[usize]) -> Result<Tensor<f32, 2>> {
        self.check_language("logits")?;
        let rows = row_ids(rows);
        on_graph!(self, graph => {
            let forward = graph.forward(input, self.recomputes(), |_| {})?;
            let some = select_rows("logits", &forward.hidden, &rows)?;
            head::logits(&graph.final_norm(&some)?, &graph.head)
        })
    }

    /// The score of each document, from its last token: `[documents]`, f32, differentiable.
    ///
    /// Errors: those of [`Packed::check`]; [`Error::Argument`] for a document without tokens, or a model that gives logits.
    pub fn scores(&self, input: &Packed) -> Result<Tensor<f32, 1>> {
        if !self.config().score {
            return Err(Error::argument("scores", "self", "a model that scores (option `head`)", "one with a head over the vocabulary"));
        }
        let last = input.cu_seqlens.windows(2).enumerate().map(|(index, pair)| match pair[1] > pair[0] {
            true => Ok(pair[1] as i32 - 1),
            false => Err(Error::argument("scores", "batch", "documents of at least one token", format!("document {} without", index + 1))),
        });
        let last: Arc<[i32]> = last.collect::<Result<_>>()?;
        on_graph!(self, graph => {
            let forward = graph.forward(input, self.recomputes(), |_| {})?;
            let last = select_rows("scores", &forward.hidden, &last)?;
            head::scores(&graph.final_norm(&last)?, &graph.head)
        })
    }

    /// The residual stream behind the first `layer` layers, behind all of them after the final norm, as entry `layer` of
    /// transformers' `output_hidden_states`: `[tokens, hidden]`, f32, differentiable.
    ///
    /// Errors: those of [`Packed::check`]; [`Error::Argument`] for more layers than there are.
    pub fn hidden_states(&self, input: &Packed, layer: usize) -> Result<AnyTensor> {
        let last = self.config().layers;
        if layer > last {
            return Err(Error::argument("hidden_states", "layer", format!("from 0 (the embeddings) to {last}"), layer));
        }
        on_graph!(self, graph => {
            let (mut seen, mut wanted) = (0, None);
            let forward = graph.forward(input, self.recomputes(), |x| {
                if seen == layer {
                    wanted = Some(x.clone());
                }
                seen += 1;
            })?;
            let state = match wanted {
                Some(state) if layer < last => state,
                _ => graph.final_norm(&forward.hidden)?,
            };
            to_dtype(&state.to_host()?.into(), Dtype::F32)
        })
    }

    /// The logits of rows of [`Model::hidden_states`] behind all layers: `[rows, vocab]`, f32, differentiable in both.
    ///
    /// - `states`: `[rows, hidden]`, f32 or bf16
    ///
    /// Errors: [`Error::Shape`] or [`Error::Dtype`] if they are something else; [`Error::Argument`] for a model that scores.
    pub fn head(&self, states: &AnyTensor) -> Result<Tensor<f32, 2>> {
        self.check_language("head")?;
        let hidden = self.config().hidden;
        if states.rank() != 2 || states.shape()[1] != hidden {
            let (expected, got) = (format!("[rows, {hidden}]"), format!("{:?}", states.shape()));
            return Err(Error::Shape { op: "head", arg: "states", expected, got });
        }
        if !matches!(states.dtype(), Dtype::F32 | Dtype::Bf16) {
            let (expected, got) = ("f32 or bf16".into(), states.dtype().name().into());
            return Err(Error::Dtype { op: "head", arg: "states", expected, got });
        }
        let states = to_dtype(&states.to_place(self.place())?, self.dtype())?;
        on_graph!(self, graph => head::logits(&states.typed("head", "states")?, &graph.head))
    }

    /// What the routers of the sparse layers say, in order: logits `[tokens, experts]`, chosen experts and weights
    /// `[tokens, k]`; and the load-balancing loss over them all. Empty for a dense model. Logits and weights are f32, and
    /// differentiable as the loss is.
    ///
    /// Errors: those of [`Packed::check`].
    #[allow(clippy::type_complexity)]
    pub fn routing(&self, input: &Packed) -> Result<(Vec<(AnyTensor, Vec<u32>, AnyTensor)>, Option<Tensor<f32, 0>>)> {
        on_graph!(self, graph => {
            let (_, forward) = self.run(graph, input)?;
            let balance = load_balance(&forward.routing)?;
            let layers = forward.routing.iter().map(|layer| {
                let logits = to_dtype(&layer.logits.to_host()?.into(), Dtype::F32)?;
                Ok((logits, layer.chosen()?, layer.weights.to_host()?.into()))
            });
            Ok((layers.collect::<Result<_>>()?, balance))
        })
    }

    /// The log-probability of each token's label under the model: `[tokens]`, f32, differentiable; 0 where the label is -100.
    ///
    /// - `labels`: `[tokens]`, the token that should follow each one
    /// - `temperature`: logits are divided by it
    ///
    /// Errors: those of [`Packed::check`] and of [`logprobs::logprobs`].
    pub fn logprobs(&self, input: &Packed, labels: &[i32], temperature: f32) -> Result<Tensor<f32, 1>> {
        self.check_language("logprobs")?;
        on_graph!(self, graph => {
            let (normed, _) = self.run(graph, input)?;
            logprobs::logprobs(&normed, &graph.head, labels, temperature)
        })
    }

    /// The log-probabilities of [`Model::logprobs`], and the entropy of each labelled token's distribution, both `[tokens]`.
    ///
    /// Errors: as [`Model::logprobs`].
    pub fn logprobs_and_entropy(&self, input: &Packed, labels: &[i32], temperature: f32) -> Result<(Tensor<f32, 1>, Tensor<f32, 1>)> {
        self.check_language("entropy")?;
        on_graph!(self, graph => {
            let (normed, _) = self.run(graph, input)?;
            let logp = logprobs::logprobs(&normed, &graph.head, labels, temperature)?;
            Ok((logp, logprobs::entropy(&normed, &graph.head, labels, temperature)?))
        })
    }

    /// The training loss: the sum over labelled tokens of minus the log-probability of the label, divided by
    /// `normalizer`, plus `router_aux_loss_coef` times the load-balancing loss.
    ///
    /// - `normalizer`: the supervised tokens of the whole update, over all its micro-batches
    /// - `router_aux_loss_coef`: 0 leaves the load-balancing loss out; dense models have none
    ///
    /// Errors: those of [`Packed::check`] and of [`logprobs::cross_entropy`].
    pub fn cross_entropy(&self, input: &Packed, labels: &[i32], normalizer: f32, router_aux_loss_coef: f32) -> Result<Loss> {
        self.check_language("cross_entropy")?;
        on_graph!(self, graph => {
            if let Some(total) = graph.cross_entropy_captured(&self.training, input, labels, normalizer, self.recomputes())? {
                return Ok(Loss { total, load_balance: None });
            }
            let (normed, forward) = self.run(graph, input)?;
            let balance = if router_aux_loss_coef == 0.0 { None } else { load_balance(&forward.routing)? };
            let extra = balance.as_ref().map(|balance| (balance, router_aux_loss_coef));
            let total = logprobs::cross_entropy(&normed, &graph.head, labels, normalizer, extra)?;
            Ok(Loss { total, load_balance: balance.map(|balance| balance.detach()) })
        })
    }

    /// Every parameter once, for an optimizer.
    pub fn parameters(&self) -> Vec<Arc<dyn Trainable>> {
        on_graph!(self, graph => graph.parameters().into_iter().map(|parameter| parameter as Arc<dyn Trainable>).collect())
    }

    /// Number of parameters.
    pub fn count(&self) -> usize {
        self.parameters().iter().map(|parameter| parameter.count()).sum()
    }

    /// Freezes or thaws all weights.
    pub fn set_trains(&self, trains: bool) {
        on_graph!(self, graph => graph.parameters().iter().for_each(|parameter| parameter.set_trains(trains)));
    }

    /// Names and shapes of the tensors, as checkpoints know them; those of an adapter at the end.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        on_graph!(self, graph => {
            let named = graph.named().into_iter().chain(graph.named_adapters());
            named.map(|named| (named.name, named.shape)).collect()
        })
    }

    /// Walks the tensor called `name` in blocks of rows, as f32, row-major: master weights where they exist.
    ///
    /// Errors: [`Error::Argument`] for an unknown name; those of `visit`.
    pub fn read_tensor(&self, name: &str, visit: &mut dyn FnMut(&[f32]) -> Result<()>) -> Result<()> {
        on_graph!(self, graph => {
            let named = find(graph, name)?;
            let columns = named.parameter.columns();
            for block in blocks(named.rows.len(), columns) {
                let mut values = Buffer::scratch(block.len() * columns);
                Graph::read_tensor_rows(&named, block, &mut values)?;
                visit(&values)?;
            }
            Ok(())
        })
    }

    /// The value of the tensor called `name`, f32.
    ///
    /// Errors: [`Error::Argument`] for an unknown name.
    pub fn value(&self, name: &str) -> Result<AnyTensor> {
        let mut values = Vec::new();
        self.read_tensor(name, &mut |block| {
            values.extend_from_slice(block);
            Ok(())
        })?;
        AnyTensor::new(&self.shape_of(name)?, Buffer::copy_of(&values))
    }

    /// The gradient of the tensor called `name`, f32; none if there is none.
    ///
    /// Errors: [`Error::Argument`] for an unknown name.
    pub fn gradient(&self, name: &str) -> Result<Option<AnyTensor>> {
        on_graph!(self, graph => {
            let named = find(graph, name)?;
            named.parameter.gradient_rows(named.rows.clone())?.map(|values| AnyTensor::new(&named.shape, values)).transpose()
        })
    }

    fn shape_of(&self, name: &str) -> Result<Vec<usize>> {
        on_graph!(self, graph => find(graph, name).map(|named| named.shape))
    }
}

pub(super) fn find<E: ModelElement>(graph: &Graph<E>, name: &str) -> Result<Named<E>> {
    let known = || Error::argument("model", "name", "a tensor of this model, for example model.norm.weight", format!("{name:?}"));
    graph.named().into_iter().chain(graph.named_adapters()).find(|named| named.name == name).ok_or_else(known)
}
