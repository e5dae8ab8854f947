//! Weights come to be: from a seed, or from a checkpoint folder, row block by row block into the layout of the products,
//! so that loading needs no second copy of them. And they go out the same way.
//! Source: initialisation as in the reference implementation, N(0, initializer_range), biases 0, norm weights 1.

use super::config::Config;
use super::graph::{Graph, Layer, Mlp, Sparse};
use super::names::Named;
use crate::checkpoint::folder::CheckpointFolder;
use crate::checkpoint::stored_dtype::StoredDtype;
use crate::checkpoint::writer::{FolderWriter, SHARD_BYTES_MAX, TensorSpec};
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use crate::kernels::cpu::int8::INPUTS_MAX;
use crate::kernels::element::Dtype;
use crate::kernels::random::Stream;
use crate::tensor::attention::Rope;
use crate::tensor::experts::{Expert, Experts};
use crate::tensor::parameter::{Layout, Parameter};
use crate::tensor::{ModelElement, Place};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// f32 values that one block of rows may have while weights move.
const BLOCK_VALUES: usize = 1 << 20;

/// What the head is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Head {
    /// The embedding.
    Tied,
    Own,
    /// One output in place of logits.
    Score,
}

impl<E: ModelElement> Graph<E> {
    /// A model of zeros.
    ///
    /// Errors: those of [`Config::check`]; [`Error::Argument`] for a model too wide for integers; [`Error::Device`] if the device
    /// has no room.
    pub fn zeros(place: &Place, config: Config, int8: bool) -> Result<Self> {
        config.check(Path::new("model"))?;
        if int8 {
            check_int8(&config)?;
        }
        let head = match (config.score, config.tied) {
            (true, _) => Head::Score,
            (false, true) => Head::Tied,
            (false, false) => Head::Own,
        };
        Self::build(place, config, head, int8)
    }

    /// A new model with random weights: each is a function of the seed, the tensor's name and its index there.
    ///
    /// Errors: as [`Graph::zeros`].
    pub fn random(place: &Place, config: Config, int8: bool, seed: u64) -> Result<Self> {
        let graph = Self::zeros(place, config, int8)?;
        graph.named().iter().try_for_each(|named| graph.begin(named, seed))?;
        Ok(graph)
    }

    /// A tensor of a new model.
    fn begin(&self, named: &Named<E>, seed: u64) -> Result<()> {
        let (deviation, pad) = (self.config.initializer_range as f32, self.config.pad);
        let Kind::Matrix = kind(named) else {
            let value = if matches!(kind(named), Kind::Norm) { 1.0 } else { 0.0 };
            return named.parameter.write_rows(named.rows.clone(), &vec![value; named.rows.len()], E::HAS_REMAINDER);
        };
        let stream = Stream::new(seed, &named.name);
        let columns = named.parameter.columns();
        for block in blocks(named.rows.len(), columns) {
            let mut values = Buffer::<f32>::scratch(block.len() * columns);
            stream.fill_normal((block.start * columns) as u64, deviation, &mut values);
            if named.name == "model.embed_tokens.weight"
                && let Some(pad) = pad.map(|pad| pad as usize).filter(|pad| block.contains(pad))
            {
                values[(pad - block.start) * columns..][..columns].fill(0.0);
            }
            named.parameter.write_rows(shift(&block, named.rows.start), &values, E::HAS_REMAINDER)?;
        }
        Ok(())
    }

    /// The model of a checkpoint folder. Remarks on what was odd but clear (a redundant head, a missing one) go to `remark`.
    ///
    /// - `trains`: whether it is loaded to be trained; a bf16 model loaded from a finer type then keeps f32 master weights
    /// - `seed`: of a head that scores, if `config` has one and the folder does not
    ///
    /// Errors: [`Error::Format`] for a tensor that is missing, unexpected, or of another shape; [`Error::Argument`] for a model
    /// too wide for integers; those of reading.
    pub fn load(
        place: &Place,
        folder: &CheckpointFolder,
        config: Config,
        int8: bool,
        trains: bool,
        seed: u64,
        remark: &mut dyn FnMut(String),
    ) -> Result<Self> {
        let head = if config.score { Head::Score } else { choose_head(folder, &config, remark)? };
        let tied = if config.score { config.tied } else { head == Head::Tied };
        let config = Config { tied, ..config };
        if int8 {
            check_int8(&config)?;
        }
        let graph = Self::build(place, config, head, int8)?;
        let named = graph.named();
        refuse_unexpected(folder, &named)?;
        for tensor in &named {
            if tensor.name == "score.weight" && folder.get(&tensor.name).is_none() {
                graph.begin(tensor, seed)?;
                continue;
            }
            let info = folder.expect(&tensor.name, &tensor.shape)?;
            // bf16 holds a stored bf16 exactly; of every other type something is left over.
            let split = trains && info.dtype != StoredDtype::Bf16;
            let columns = tensor.parameter.columns();
            for block in blocks(tensor.rows.len(), columns) {
                let mut values = Buffer::<f32>::scratch(block.len() * columns);
                folder.read_rows(&tensor.name, block.clone(), &mut values)?;
                tensor.parameter.write_rows(shift(&block, tensor.rows.start), &values, split)?;
            }
        }
        if !trains {
            graph.parameters().iter().for_each(|parameter| parameter.set_trains(false));
        }
        Ok(graph)
    }

    fn build(place: &Place, config: Config, head: Head, int8: bool) -> Result<Self> {
        let packed = if int8 { Layout::Int8 } else { Layout::Panels };
        let (hidden, query, key) = (config.hidden, config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let new = |name: String, rows, columns, layout| Ok(Arc::new(Parameter::zeros_at(place, name, rows, columns, layout)?));
        let matrix = |name: String, rows, columns| new(name, rows, columns, packed);
        // Routers are small, and a token that is sent elsewhere is another token.
        let router = |name: String, rows, columns| new(name, rows, columns, Layout::Panels);
        let vector = |name: String, rows| new(name, rows, 1, Layout::Rows);
        let mlps = |name: &str, count: usize, intermediate| -> Result<Expert<E>> {
            Ok(Expert {
                gate_up: matrix(format!("{name}.gate_up_proj"), count * 2 * intermediate, hidden)?,
                down: matrix(format!("{name}.down_proj"), count * hidden, intermediate)?,
            })
        };
        let experts = |name: String, count: usize, intermediate| -> Result<Experts<E>> {
            if place.device().is_some() {
                return Ok(Experts::Stacked { count, weights: mlps(&name, count, intermediate)? });
            }
            let each = (0..count).map(|index| mlps(&format!("{name}.{index}"), 1, intermediate));
            Ok(Experts::Each(each.collect::<Result<_>>()?))
        };
        let layer = |index: usize| {
            let name = format!("model.layers.{index}");
            let second = match config.moe.as_ref().filter(|_| config.is_sparse(index)) {
                None => Mlp::Dense(mlps(&format!("{name}.mlp"), 1, config.intermediate)?),
                Some(moe) => Mlp::Sparse(Box::new(Sparse {
                    router: router(format!("{name}.mlp.gate"), moe.experts, hidden)?,
                    experts: experts(format!("{name}.mlp.experts"), moe.experts, moe.moe_intermediate)?,
                    shared: mlps(&format!("{name}.mlp.shared_expert"), 1, moe.shared_intermediate)?,
                    shared_gate: router(format!("{name}.mlp.shared_expert_gate"), 1, hidden)?,
                })),
            };
            Ok(Layer {
                input_norm: vector(format!("{name}.input_layernorm"), hidden)?,
                qkv: matrix(format!("{name}.self_attn.qkv_proj"), query + 2 * key, hidden)?,
                qkv_bias: vector(format!("{name}.self_attn.qkv_proj.bias"), query + 2 * key)?,
                o: matrix(format!("{name}.self_attn.o_proj"), hidden, query)?,
                post_norm: vector(format!("{name}.post_attention_layernorm"), hidden)?,
                mlp: second,
                window: config.sliding.get(index).copied().flatten(),
            })
        };
        let layers = (0..config.layers).map(layer).collect::<Result<Vec<_>>>()?;
        let embed_layout = if head == Head::Tied { packed } else { Layout::Rows };
        let embed = new("model.embed_tokens".into(), config.vocab, hidden, embed_layout)?;
        let head = match head {
            Head::Tied => embed.clone(),
            Head::Own => matrix("lm_head".into(), config.vocab, hidden)?,
            Head::Score => matrix("score".into(), 1, hidden)?,
        };
        let (inv_freq, attention_scaling) = config.inv_freq();
        Ok(Self { embed, layers, norm: vector("model.norm".into(), hidden)?, head, rope: Rope { inv_freq, attention_scaling }, config })
    }

    /// Writes a checkpoint folder, whole or not at all: weights with their low-rank parts added in f32, `config.json`, and `files`
    /// (tokenizer, generation configuration) by name. Where an adapter makes two matrices of a tied embedding, both are written.
    ///
    /// - `dtype`: of the stored weights; the model's own type stores them as they stand, f32 the master weights of a bf16
    ///   model that trains
    ///
    /// Errors: those of [`FolderWriter`].
    pub fn save(&self, target: &Path, dtype: Dtype, files: &[(String, Vec<u8>)]) -> Result<()> {
        let stored = if dtype == Dtype::Bf16 { StoredDtype::Bf16 } else { StoredDtype::F32 };
        let (mut named, is_torn) = (self.named(), self.is_torn());
        if is_torn {
            named.extend(self.modules().into_iter().filter(|module| Arc::ptr_eq(&module.parameter, &self.head)));
        }
        let specs = named.iter().map(|tensor| TensorSpec { name: tensor.name.clone(), dtype: stored, shape: tensor.shape.clone() });
        let mut writer = FolderWriter::create(target, specs.collect(), SHARD_BYTES_MAX)?;
        for tensor in &named {
            let (columns, is_plain) = (tensor.parameter.columns(), !tensor.parameter.is_adapted() || tensor.parameter.is_merged());
            for block in blocks(tensor.rows.len(), columns) {
                if dtype == E::DTYPE && is_plain {
                    let mut values = Buffer::<E>::scratch(block.len() * columns);
                    tensor.parameter.read_weight_rows(shift(&block, tensor.rows.start), &mut values)?;
                    writer.write(&tensor.name, &values)?;
                } else {
                    let mut values = Buffer::<f32>::scratch(block.len() * columns);
                    let rows = shift(&block, tensor.rows.start);
                    if tensor.name == "model.embed_tokens.weight" {
                        tensor.parameter.read_embedded_rows(rows, &mut values)?;
                    } else {
                        tensor.parameter.read_adapted_rows(rows, &mut values)?;
                    }
                    writer.write(&tensor.name, &values)?;
                }
            }
        }
        writer.add_json("config.json", &Config { dtype, tied: self.config.tied && !is_torn, ..self.config.clone() }.to_json())?;
        for (name, bytes) in files {
            writer.add_file(name, bytes)?;
        }
        writer.finish()
    }

    /// Copies rows of a named tensor, counted from its own first row, as f32: master weights where they exist.
    ///
    /// Errors: those of the device.
    pub fn read_tensor_rows(named: &Named<E>, rows: Range<usize>, values: &mut [f32]) -> Result<()> {
        named.parameter.read_rows(shift(&rows, named.rows.start), values)
    }
}

/// What a tensor is initialised as.
enum Kind {
    Matrix,
    Norm,
    Bias,
}

fn kind<E: ModelElement>(named: &Named<E>) -> Kind {
    match named.shape.len() {
        1 if named.name.ends_with(".bias") => Kind::Bias,
        1 => Kind::Norm,
        _ => Kind::Matrix,
    }
}

/// Ranges of rows of at most [`BLOCK_VALUES`] values, each of whole panels where it can be.
pub(super) fn blocks(rows: usize, columns: usize) -> impl Iterator<Item = Range<usize>> {
    let step = (BLOCK_VALUES / columns.max(1)).next_multiple_of(32);
    (0..rows).step_by(step).map(move |start| start..(start + step).min(rows))
}

pub(super) fn shift(range: &Range<usize>, by: usize) -> Range<usize> {
    range.start + by..range.end + by
}

/// Whether sums of 32 bits hold the products of this model's weights in 8.
///
/// Errors: [`Error::Argument`] naming the width that is too large.
fn check_int8(config: &Config) -> Result<()> {
    let of_experts = config.moe.iter().flat_map(|moe| [moe.moe_intermediate, moe.shared_intermediate]);
    let widths = [config.hidden, config.heads * config.head_dim, config.intermediate].into_iter().chain(of_experts);
    match widths.max() {
        Some(width) if width > INPUTS_MAX => Err(Error::argument(
            "model",
            "dtype",
            format!("f32 or bf16 for a model wider than {INPUTS_MAX}"),
            format!("int8 and a width of {width}"),
        )),
        _ => Ok(()),
    }
}

/// Decides between tied and own head by what the checkpoint holds: some say one thing and hold another.
fn choose_head(folder: &CheckpointFolder, config: &Config, remark: &mut dyn FnMut(String)) -> Result<Head> {
    let (embed, head) = ("model.embed_tokens.weight", "lm_head.weight");
    let shape = [config.vocab, config.hidden];
    if folder.get(head).is_none() {
        if !config.tied {
            remark(format!(
                "{}: tie_word_embeddings is false, but there is no {head}; the embedding serves as head",
                folder.path().display()
            ));
        }
        return Ok(Head::Tied);
    }
    if !config.tied {
        return Ok(Head::Own);
    }
    folder.expect(embed, &shape)?;
    folder.expect(head, &shape)?;
    for block in blocks(config.vocab, config.hidden) {
        let len = block.len() * config.hidden;
        let (mut a, mut b) = (Buffer::<f32>::scratch(len), Buffer::<f32>::scratch(len));
        folder.read_rows(embed, block.clone(), &mut a)?;
        folder.read_rows(head, block, &mut b)?;
        if a[..] != b[..] {
            remark(format!("{}: tie_word_embeddings is true, but {head} differs from {embed}; it is used", folder.path().display()));
            return Ok(Head::Own);
        }
    }
    Ok(Head::Tied)
}

fn refuse_unexpected<E: ModelElement>(folder: &CheckpointFolder, named: &[Named<E>]) -> Result<()> {
    let known: std::collections::HashSet<&str> = named.iter().map(|tensor| tensor.name.as_str()).collect();
    for tensor in folder.tensors() {
        let name = tensor.name.as_str();
        // A redundant head has been compared with the embedding; old checkpoints hold a table that is computed today.
        if !known.contains(name) && name != "lm_head.weight" && !name.ends_with(".rotary_emb.inv_freq") {
            let expected = "only tensors of the model that config.json describes";
            return Err(Error::format(folder.path(), name, expected, format!("this one, of shape {:?}", tensor.shape)));
        }
    }
    Ok(())
}
