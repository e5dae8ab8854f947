//! LoRA on a model: which modules get low-rank parts, how those begin, and the folders in which PEFT keeps them.
//! The arithmetic is in tensor/low_rank.rs, dora.rs and embedding_part.rs. Dropout is not built.
//! Source: Hu et al., arXiv 2106.09685; rank-stabilised scale of Kalajdzievski, arXiv 2312.03732; DoRA of Liu et al., arXiv
//! 2402.09353; files as PEFT 0.18 writes.

use super::fields::{Fields, parse_object};
use super::graph::{Graph, Layer, Mlp};
use super::names::Named;
use super::weights::blocks;
use crate::checkpoint::folder::read_text;
use crate::checkpoint::safetensors::SafetensorsFile;
use crate::checkpoint::stored_dtype::StoredDtype;
use crate::checkpoint::writer::{FolderWriter, SHARD_BYTES_MAX, TensorSpec};
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use crate::kernels::element::Dtype;
use crate::kernels::random::Stream;
use crate::tensor::dora::Magnitude;
use crate::tensor::embedding_part::EmbeddingPart;
use crate::tensor::experts::Experts;
use crate::tensor::low_rank::{LowRank, Stack};
use crate::tensor::parameter::Layout;
use crate::tensor::{ModelElement, Parameter};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

/// Every target at once, as PEFT calls it: all projections of the layers.
const ALL: &str = "all-linear";
/// The largest rank that is read.
const RANK_MAX: usize = 4096;
/// Files of a PEFT folder.
const CONFIG: &str = "adapter_config.json";
const STEM: &str = "adapter_model";
/// What the names of tensors in it begin with.
const FILE_PREFIX: &str = "base_model.model.";
/// Beginnings of PEFT's `init_lora_weights` that leave the base as it is, beside true and false.
const KEEPS_BASE: [&str; 4] = ["default", "gaussian", "eva", "orthogonal"];
/// What the names of modules of layers begin with.
const LAYERS: &str = "model.layers.";
/// The module of the embedding.
pub(super) const EMBEDDING: &str = "model.embed_tokens";

/// What the low-rank parts of a model are.
#[derive(Clone, Debug, PartialEq)]
pub struct Lora {
    pub rank: usize,
    pub alpha: f64,
    /// Ranks and alphas of modules that have others than these, by names or ends of names; the first that fits counts.
    pub rank_pattern: Vec<(String, usize)>,
    pub alpha_pattern: Vec<(String, f64)>,
    /// Scale by `alpha / sqrt(rank)` in place of `alpha / rank`.
    pub rank_stabilized: bool,
    /// Scale each adapted row to a length that is learnt.
    pub dora: bool,
    /// Names of modules, or ends of them: `q_proj`, `layers.0.mlp.down_proj`, `embed_tokens`, `lm_head`; or `all-linear`, which
    /// are those of the layers.
    pub targets: Vec<String>,
    /// Ends of names of modules that train whole and are kept with the adapter.
    pub modules_to_save: Vec<String>,
}

impl Default for Lora {
    fn default() -> Self {
        Self {
            rank: 8,
            alpha: 16.0,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            rank_stabilized: false,
            dora: false,
            targets: vec![ALL.into()],
            modules_to_save: Vec::new(),
        }
    }
}

impl Lora {
    /// The rank of the low-rank part of `module`.
    pub fn rank_of(&self, module: &str) -> usize {
        of_pattern(&self.rank_pattern, module).unwrap_or(self.rank)
    }

    /// What the low-rank part of `module` is multiplied by.
    pub fn scale_of(&self, module: &str) -> f32 {
        let rank = self.rank_of(module) as f64;
        let alpha = of_pattern(&self.alpha_pattern, module).unwrap_or(self.alpha);
        (alpha / if self.rank_stabilized { rank.sqrt() } else { rank }) as f32
    }

    /// Errors: [`Error::Argument`] for a rank, a scale or targets that cannot be meant.
    pub fn check(&self) -> Result<()> {
        if !(1..=RANK_MAX).contains(&self.rank) {
            return Err(Error::argument("lora", "rank", format!("a whole number from 1 to {RANK_MAX}"), self.rank));
        }
        if !(self.alpha > 0.0 && self.alpha.is_finite()) {
            return Err(Error::argument("lora", "alpha", "a number above 0", self.alpha));
        }
        if self.targets.is_empty() {
            return Err(Error::argument("lora", "targets", "names of modules, such as { \"q_proj\", \"v_proj\" }", "an empty list"));
        }
        Ok(())
    }

    /// Whether the weight of `module`, one of a layer, the head or the embedding, gets a low-rank part.
    pub(super) fn takes(&self, module: &str) -> bool {
        self.targets.iter().any(|target| (target == ALL && module.starts_with(LAYERS)) || is_called(module, target))
    }

    /// Errors: [`Error::Argument`] for a target that is none of `modules`, with the names that are.
    pub(super) fn check_targets(&self, modules: &[&str]) -> Result<()> {
        for target in self.targets.iter().filter(|target| *target != ALL) {
            if !modules.iter().any(|module| is_called(module, target)) {
                let remedy = if target == "score" { "; it trains whole beside an adapter" } else { "" };
                let known = leaves(modules.iter().copied()).join(", ");
                let expected = format!("modules of this model ({known}), or {ALL}");
                return Err(Error::argument("lora", "targets", expected, format!("{target:?}{remedy}")));
            }
        }
        Ok(())
    }

    /// What `adapter_config.json` says.
    ///
    /// - `layers`: modules of the layers: beside other names PEFT knows no name for all of them
    fn to_json(&self, task: &str, base: Option<&str>, layers: &[&str]) -> Value {
        // Whole numbers stay so: PEFT writes 16, not 16.0.
        let alpha = |alpha: f64| if alpha.fract() == 0.0 && alpha < 1e15 { json!(alpha as i64) } else { json!(alpha) };
        let ranks = Map::from_iter(self.rank_pattern.iter().map(|(name, rank)| (name.clone(), json!(rank))));
        let alphas = Map::from_iter(self.alpha_pattern.iter().map(|(name, value)| (name.clone(), alpha(*value))));
        let named = self.targets.iter().map(String::as_str).filter(|target| *target != ALL);
        let targets = match self.targets.iter().any(|target| target == ALL) {
            true if self.targets.len() == 1 => json!(ALL),
            true => json!(leaves(layers.iter().copied()).into_iter().chain(named).collect::<BTreeSet<_>>()),
            false => json!(self.targets),
        };
        json!({
            "peft_type": "LORA", "task_type": task, "base_model_name_or_path": base, "r": self.rank,
            "lora_alpha": alpha(self.alpha), "rank_pattern": ranks, "alpha_pattern": alphas,
            "use_rslora": self.rank_stabilized, "target_modules": targets,
            "modules_to_save": (!self.modules_to_save.is_empty()).then_some(&self.modules_to_save),
            "bias": "none", "lora_dropout": 0.0, "fan_in_fan_out": false, "use_dora": self.dora, "inference_mode": true,
            "init_lora_weights": true,
        })
    }

    /// Reads `adapter_config.json`; `remark` hears what is passed over.
    ///
    /// Errors: [`Error::Format`] with the key; [`Error::Unsupported`] for other kinds of adapters.
    fn load(folder: &Path, remark: &mut dyn FnMut(String)) -> Result<Self> {
        let path = folder.join(CONFIG);
        let object = parse_object(&path, &read_text(&path)?)?;
        let fields = Fields { path: &path, prefix: "", object: &object };
        if fields.text("peft_type")? != Some("LORA") {
            return Err(fields.wrong("peft_type", "\"LORA\""));
        }
        refuse_relatives(&fields)?;
        if fields.number("lora_dropout", 0.0, 0.0..=1.0)? != 0.0 {
            remark("lora_dropout is passed over: adapters train without dropout here".into());
        }
        let names = |key: &str| -> Result<Vec<String>> {
            let expected = "a list of names of modules";
            let list = match fields.get(key) {
                None => return Ok(Vec::new()),
                Some(Value::String(name)) if name == ALL => return Ok(vec![ALL.into()]),
                Some(list) => list.as_array().ok_or_else(|| fields.wrong(key, expected))?,
            };
            list.iter().map(|name| name.as_str().map(str::to_owned).ok_or_else(|| fields.wrong(key, expected))).collect()
        };
        let lora = Self {
            rank: fields.count("r", 8, 1..=RANK_MAX)?,
            alpha: fields.number("lora_alpha", 8.0, f64::MIN_POSITIVE..=1e9)?,
            rank_pattern: pattern(&fields, "rank_pattern", |fields, name| fields.count(name, 0, 1..=RANK_MAX))?,
            alpha_pattern: pattern(&fields, "alpha_pattern", |fields, name| fields.number(name, 0.0, f64::MIN_POSITIVE..=1e9))?,
            rank_stabilized: fields.flag("use_rslora", false)?,
            dora: fields.flag("use_dora", false)?,
            targets: if is_choice(&fields) { adapted_modules(folder)? } else { names("target_modules")? },
            modules_to_save: names("modules_to_save")?,
        };
        if lora.targets.is_empty() {
            return Err(fields.wrong("target_modules", "the names of at least one module"));
        }
        Ok(lora)
    }
}

/// Whether the modules are told otherwise than by names: by a regular expression, or as some of those that have the names.
fn is_choice(fields: &Fields) -> bool {
    let is_regex = fields.get("target_modules").and_then(Value::as_str).is_some_and(|name| name != ALL);
    is_regex || ["layers_to_transform", "exclude_modules"].iter().any(|key| is_set(fields, key))
}

/// Whether `key` says something: PEFT writes empty lists and objects too.
fn is_set(fields: &Fields, key: &str) -> bool {
    let is_empty = |value: &Value| value.as_array().is_some_and(Vec::is_empty) || value.as_object().is_some_and(Map::is_empty);
    fields.get(key).is_some_and(|value| !is_empty(value))
}

/// The modules that have a low-rank part in a PEFT folder: what a choice came to.
///
/// Errors: as [`open_tensors`].
fn adapted_modules(folder: &Path) -> Result<Vec<String>> {
    let module = |name: &str| {
        let name = name.strip_prefix(FILE_PREFIX)?;
        Some(name.strip_suffix(".lora_A.weight").or_else(|| name.strip_suffix(".lora_embedding_A"))?.to_owned())
    };
    Ok(open_tensors(folder)?.tensors().iter().filter_map(|tensor| module(&tensor.name)).collect())
}

/// The file of a PEFT folder's tensors.
///
/// Errors: [`Error::Unsupported`] for one of PyTorch's own; those of [`SafetensorsFile::open`].
fn open_tensors(folder: &Path) -> Result<SafetensorsFile> {
    let path = folder.join(format!("{STEM}.safetensors"));
    if !path.exists() && folder.join(format!("{STEM}.bin")).exists() {
        let what = format!("{}: {STEM}.bin", folder.display());
        return Err(Error::Unsupported { what, remedy: "save the adapter with safe_serialization=True".into() });
    }
    SafetensorsFile::open(&path)
}

/// Errors: [`Error::Unsupported`] for what would change the arithmetic and is not built.
fn refuse_relatives(fields: &Fields) -> Result<()> {
    let unsupported = |key: &str, what: &str, remedy: &str| {
        let what = format!("{}: {key}: {what}", fields.path.display());
        Err(Error::Unsupported { what, remedy: remedy.to_owned() })
    };
    let merge = "merge the adapter into its base with PEFT (merge_and_unload) and load the result";
    for (key, what) in
        [("lora_bias", "a bias beside the low-rank part"), ("fan_in_fan_out", "transposed weights"), ("use_qalora", "QA-LoRA")]
    {
        if fields.flag(key, false)? {
            return unsupported(key, what, merge);
        }
    }
    if fields.text("bias")?.is_some_and(|bias| bias != "none") {
        return unsupported("bias", "biases that the adapter trains", merge);
    }
    // PiSSA, OLoRA, CorDA, LoftQ and their like begin by changing the base, and the folder holds the difference from that one.
    if let Some(how) = fields.get("init_lora_weights").and_then(Value::as_str).filter(|how| !KEEPS_BASE.contains(how)) {
        return unsupported("init_lora_weights", &format!("{how:?}, which changes the weights of the base"), merge);
    }
    for (key, what) in [
        ("layer_replication", "layers that stand twice"),
        ("target_parameters", "targets that are no modules"),
        ("trainable_token_indices", "single rows of the embedding"),
        ("alora_invocation_tokens", "adapters that a token switches on"),
        ("arrow_config", "routing between adapters"),
    ] {
        if is_set(fields, key) {
            return unsupported(key, what, merge);
        }
    }
    Ok(())
}

/// The values of PEFT's pattern `key`: for each name of modules the one that `read` finds.
///
/// Errors: [`Error::Format`] for what is no such object, and those of `read`; [`Error::Unsupported`] for a regular expression.
fn pattern<T>(fields: &Fields, key: &str, read: impl Fn(&Fields, &str) -> Result<T>) -> Result<Vec<(String, T)>> {
    let Some(value) = fields.get(key) else { return Ok(Vec::new()) };
    let object = value.as_object().ok_or_else(|| fields.wrong(key, "an object of names of modules"))?;
    let prefix = format!("{key}.");
    let values = Fields { path: fields.path, prefix: &prefix, object };
    let of = |name: &String| {
        if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte)) {
            let what = format!("{}: {key}: {name:?}, a regular expression", fields.path.display());
            return Err(Error::Unsupported { what, remedy: "name each module there, such as model.layers.0.self_attn.q_proj".into() });
        }
        Ok((name.clone(), read(&values, name)?))
    };
    object.keys().map(of).collect()
}

/// The value of the first name that `module` is called.
fn of_pattern<T: Copy>(pattern: &[(String, T)], module: &str) -> Option<T> {
    pattern.iter().find(|(name, _)| is_called(module, name)).map(|(_, value)| *value)
}

/// The module of a tensor: its name without what it is of the module.
pub(super) fn module(name: &str) -> &str {
    name.rsplit_once('.').map_or(name, |(module, _)| module)
}

/// The last words of names of modules, each once, sorted.
fn leaves<'a>(modules: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut leaves: Vec<&str> = modules.filter_map(|module| module.rsplit('.').next()).collect();
    leaves.sort_unstable();
    leaves.dedup();
    leaves
}

/// Whether `module` is called `name`, or ends in it.
fn is_called(module: &str, name: &str) -> bool {
    module == name || module.strip_suffix(name).is_some_and(|rest| rest.ends_with('.'))
}

/// A weight, and the low-rank parts that it gets.
type Adapted<E> = (Arc<Parameter<E>>, Vec<LowRank<E>>);

impl<E: ModelElement> Graph<E> {
    /// Gives the modules that `lora` names low-rank parts of zeros and freezes all else but what is saved whole.
    ///
    /// Errors: [`Error::Argument`] for a target or a module to save that this model does not have or that cannot be one;
    /// [`Error::Unsupported`] for DoRA of the embedding, and on a device for some of a layer's experts, or for some otherwise than for
    /// others; those of the device.
    pub(super) fn attach(&self, lora: &Lora) -> Result<()> {
        lora.check()?;
        let named = self.named();
        let saved = saved_modules(&named, lora)?;
        let modules = self.modules();
        lora.check_targets(&modules.iter().map(|tensor| module(&tensor.name)).chain([EMBEDDING]).collect::<Vec<_>>())?;
        let embedding = self.embedding_part(lora)?;
        let mut parts: Vec<Adapted<E>> = Vec::new();
        for tensor in modules.iter().filter(|tensor| lora.takes(module(&tensor.name))) {
            let (parameter, count) = (&tensor.parameter, self.stacked(&tensor.parameter));
            let stack = Stack::of(parameter, count);
            let (index, rows) = stack.place(&tensor.rows);
            let known = parts.iter_mut().rev().find(|(known, _)| Arc::ptr_eq(known, parameter));
            if let Some((_, known)) = &known
                && known.iter().any(|part| part.rows == rows)
            {
                // An expert whose part lies behind that of the first.
                continue;
            }
            let name = module(&tensor.name).replace(&format!(".experts.{index}."), ".experts.");
            let whose = if count == 1 { module(&tensor.name) } else { &name };
            if let Some(expert) = (0..count).find(|other| !lora.takes(&expert_module(module(&tensor.name), index, *other))) {
                let what = format!("an adapter on some experts of {whose}, not on expert {expert}, of a model on {}", self.place());
                let remedy = "name all experts of a layer or none (gate_proj names all of every layer), or train it on the CPU".into();
                return Err(Error::Unsupported { what, remedy });
            }
            let size = |other| {
                let module = expert_module(module(&tensor.name), index, other);
                (lora.rank_of(&module), lora.scale_of(&module))
            };
            let (rank, scale) = size(index);
            if let Some(expert) = (0..count).find(|other| size(*other) != (rank, scale)) {
                let what = format!("a rank or alpha of {whose} that is another for expert {expert}, of a model on {}", self.place());
                let remedy = "name one rank and alpha for all experts of a layer, or train it on the CPU".into();
                return Err(Error::Unsupported { what, remedy });
            }
            let factor = |name: &str, rows, columns, layout| -> Result<Arc<Parameter<E>>> {
                let name = format!("{whose}.{name}");
                Ok(Arc::new(Parameter::zeros_at(self.place(), name, count * rows, columns, layout)?))
            };
            let lengths = |name| Ok(Arc::new(Magnitude::new(factor(name, rows.len(), 1, Layout::Rows)?)));
            let part = LowRank {
                stack,
                a: factor("lora_A", rank, parameter.columns(), Layout::Panels)?,
                b: factor("lora_B", rows.len(), rank, Layout::Panels)?,
                scale,
                magnitude: lora.dora.then(|| lengths("lora_magnitude_vector")).transpose()?,
                rows,
            };
            match known {
                Some((_, parts)) => parts.push(part),
                None => parts.push((parameter.clone(), vec![part])),
            }
        }
        named.iter().for_each(|tensor| tensor.parameter.set_trains(false));
        saved.iter().for_each(|tensor| tensor.parameter.set_trains(true));
        named.iter().filter(|tensor| !tensor.parameter.trains()).try_for_each(|tensor| tensor.parameter.drop_master())?;
        parts.into_iter().for_each(|(parameter, parts)| parameter.set_adapters(parts));
        embedding.into_iter().for_each(|part| self.embed.set_embedding_part(part));
        Ok(())
    }

    /// The low-rank part that the embedding gets, zeros; none if `lora` does not name it.
    ///
    /// Errors: [`Error::Unsupported`] with DoRA; those of the device.
    fn embedding_part(&self, lora: &Lora) -> Result<Option<EmbeddingPart<E>>> {
        if !lora.takes(EMBEDDING) {
            return Ok(None);
        }
        if lora.dora {
            let remedy = "leave embed_tokens out of the targets (modules_to_save trains it whole), or leave `dora` out".into();
            return Err(Error::Unsupported { what: format!("DoRA of {EMBEDDING}"), remedy });
        }
        let factor = |name: &str, rows, columns, layout| -> Result<Arc<Parameter<E>>> {
            Ok(Arc::new(Parameter::zeros_at(self.place(), format!("{EMBEDDING}.{name}"), rows, columns, layout)?))
        };
        let rank = lora.rank_of(EMBEDDING);
        let a = factor("lora_embedding_A", rank, self.config.vocab, Layout::Rows)?;
        let b = factor("lora_embedding_B", self.config.hidden, rank, Layout::Panels)?;
        Ok(Some(EmbeddingPart { a, b, scale: lora.scale_of(EMBEDDING) }))
    }

    /// How many weights `parameter` holds, one after the other: the experts of a layer on a device, itself otherwise.
    fn stacked(&self, parameter: &Arc<Parameter<E>>) -> usize {
        let of = |layer: &Layer<E>| match &layer.mlp {
            Mlp::Sparse(sparse) => match &sparse.experts {
                Experts::Stacked { count, weights } => {
                    [&weights.gate_up, &weights.down].iter().any(|weight| Arc::ptr_eq(weight, parameter)).then_some(*count)
                }
                Experts::Each(_) => None,
            },
            Mlp::Dense(_) => None,
        };
        self.layers.iter().find_map(of).unwrap_or(1)
    }

    /// Low-rank parts as they begin: A uniform in ±1/sqrt(in), as PEFT's Kaiming initialisation gives, each number a function
    /// of the seed, the tensor's name and its index there; B zero; the lengths of rows those of the weight. Of the embedding, as
    /// there, A is zero and B normal.
    ///
    /// Errors: those of the device.
    pub(super) fn begin_adapters(&self, seed: u64) -> Result<()> {
        for tensor in self.named_adapters().iter().filter(|tensor| tensor.name.ends_with("lora_A.weight")) {
            let columns = tensor.parameter.columns();
            let (stream, bound) = (Stream::new(seed, &tensor.name), (columns as f32).sqrt().recip());
            let mut values = vec![0.0; tensor.rows.len() * columns];
            for (index, value) in values.iter_mut().enumerate() {
                *value = (2.0 * stream.f32(index as u64) - 1.0) * bound;
            }
            tensor.parameter.write_rows(tensor.rows.clone(), &values, E::HAS_REMAINDER)?;
        }
        for tensor in self.named_adapters().iter().filter(|tensor| tensor.name.ends_with("lora_embedding_B")) {
            let mut values = vec![0.0; tensor.parameter.count()];
            Stream::new(seed, &tensor.name).fill_normal(0, 1.0, &mut values);
            tensor.parameter.write_rows(tensor.rows.clone(), &values, E::HAS_REMAINDER)?;
        }
        for weight in self.weights() {
            for part in weight.adapters().iter() {
                part.magnitude.as_ref().map_or(Ok(()), |magnitude| magnitude.begin(&weight, part))?;
            }
        }
        Ok(())
    }

    /// The tensors of the adapter: the parameters of every low-rank part, then the modules saved whole.
    ///
    /// Errors: as [`Graph::attach`].
    pub(super) fn adapter_tensors(&self, lora: &Lora) -> Result<Vec<Named<E>>> {
        let mut tensors = self.named_adapters();
        tensors.extend(saved_modules(&self.named(), lora)?);
        Ok(tensors)
    }

    /// Writes a PEFT folder, whole or not at all.
    ///
    /// - `base`: what to call the base model in it
    ///
    /// Errors: those of [`FolderWriter`].
    pub(super) fn save_adapter(&self, target: &Path, lora: &Lora, dtype: Dtype, base: Option<&str>) -> Result<()> {
        let stored = if dtype == Dtype::Bf16 { StoredDtype::Bf16 } else { StoredDtype::F32 };
        let tensors = self.adapter_tensors(lora)?;
        let stored_as = |tensor: &Named<E>| if is_length(tensor) { StoredDtype::F32 } else { stored };
        let specs =
            tensors.iter().map(|tensor| TensorSpec { name: file_name(tensor), dtype: stored_as(tensor), shape: tensor.shape.clone() });
        // PEFT reads one file, whatever its size.
        let mut writer = FolderWriter::create_named(target, STEM, specs.collect(), SHARD_BYTES_MAX.max(u64::MAX / 2))?;
        for tensor in &tensors {
            if dtype == E::DTYPE && !is_length(tensor) {
                let mut values = Buffer::<E>::scratch(tensor.rows.len() * tensor.parameter.columns());
                tensor.parameter.read_weight_rows(tensor.rows.clone(), &mut values)?;
                writer.write(&file_name(tensor), &values)?;
            } else {
                let mut values = Buffer::<f32>::scratch(tensor.rows.len() * tensor.parameter.columns());
                tensor.parameter.read_rows(tensor.rows.clone(), &mut values)?;
                writer.write(&file_name(tensor), &values)?;
            }
        }
        let task = if self.config.score { "SEQ_CLS" } else { "CAUSAL_LM" };
        let modules = self.modules();
        let layers = modules.iter().map(|tensor| module(&tensor.name)).filter(|module| module.starts_with(LAYERS)).collect::<Vec<_>>();
        writer.add_json(CONFIG, &lora.to_json(task, base, &layers))?;
        writer.finish()
    }

    /// Takes the weights of a PEFT folder into low-rank parts that are there.
    ///
    /// Errors: [`Error::Format`] for a tensor that is missing, of another shape, or of no module that has a part.
    pub(super) fn fill_adapter(&self, folder: &Path, lora: &Lora, trains: bool) -> Result<()> {
        let file = open_tensors(folder)?;
        let tensors = self.adapter_tensors(lora)?;
        for tensor in &tensors {
            file.expect(&file_name(tensor), &tensor.shape)?;
        }
        let mut known: std::collections::HashSet<String> = tensors.iter().map(file_name).collect();
        self.check_copies(&file, &mut known)?;
        if let Some(tensor) = file.tensors().iter().find(|tensor| !known.contains(&tensor.name)) {
            let expected = format!("only tensors of the modules that {CONFIG} names");
            return Err(Error::format(file.path(), &tensor.name, expected, format!("this one, of shape {:?}", tensor.shape)));
        }
        for tensor in &tensors {
            let values: Vec<f32> = file.read_floats(&file_name(tensor))?;
            // bf16 holds a stored bf16 exactly; of every other type something is left over.
            let is_finer = file.get(&file_name(tensor)).is_some_and(|info| info.dtype != StoredDtype::Bf16);
            tensor.parameter.write_rows(tensor.rows.clone(), &values, is_finer && (trains || is_length(tensor)))?;
        }
        Ok(())
    }

    /// Looks at the copies of embedding and head that PEFT writes beside their adapters; they are `known` then.
    ///
    /// Errors: [`Error::Format`] if they are not those of this model.
    fn check_copies(&self, file: &SafetensorsFile, known: &mut std::collections::HashSet<String>) -> Result<()> {
        for (module, weight) in [(EMBEDDING, &self.embed), ("lm_head", &self.head)].into_iter().take(if self.config.score { 1 } else { 2 })
        {
            let name = format!("{FILE_PREFIX}{module}.base_layer.weight");
            if file.get(&name).is_none() {
                continue;
            }
            file.expect(&name, &[weight.rows(), weight.columns()])?;
            for rows in blocks(weight.rows(), weight.columns()) {
                let len = rows.len() * weight.columns();
                let (mut theirs, mut ours) = (Buffer::<f32>::scratch(len), Buffer::<E>::scratch(len));
                file.read_rows(&name, rows.clone(), &mut theirs)?;
                weight.read_weight_rows(rows, &mut ours)?;
                if theirs.iter().zip(ours.iter()).any(|(theirs, ours)| E::from_f32(*theirs) != *ours) {
                    let expected = format!("the weight of {module} that the model has");
                    let got = "another one; merge the adapter into its base with PEFT (merge_and_unload) and load the result";
                    return Err(Error::format(file.path(), &name, expected, got));
                }
            }
            known.insert(name);
        }
        Ok(())
    }

    /// As [`Graph::attach`] and [`Graph::fill_adapter`] with what the folder says. Gives what was attached.
    ///
    /// Errors: of both, and [`Error::Unsupported`] for adapters that are no plain LoRA.
    pub(super) fn load_adapter(&self, folder: &Path, trains: bool, remark: &mut dyn FnMut(String)) -> Result<Lora> {
        let lora = Lora::load(folder, remark)?;
        self.attach(&lora)?;
        self.fill_adapter(folder, &lora, trains)?;
        Ok(lora)
    }
}

/// The module of expert `other` that `module` is of expert `index`.
fn expert_module(module: &str, index: usize, other: usize) -> String {
    module.replace(&format!(".experts.{index}."), &format!(".experts.{other}."))
}

/// Whether it is the lengths of a weight's rows, which are kept in f32: all of a row has the error of its length.
fn is_length<E: ModelElement>(tensor: &Named<E>) -> bool {
    tensor.name.ends_with(".lora_magnitude_vector")
}

/// The name that PEFT gives a tensor.
fn file_name<E: ModelElement>(tensor: &Named<E>) -> String {
    format!("{FILE_PREFIX}{}", tensor.name)
}

/// Tensors of the modules that train whole. As in PEFT, any module is one whose name ends so: `norm` names all norms, and
/// `model.norm` the last.
fn saved_modules<E: ModelElement>(named: &[Named<E>], lora: &Lora) -> Result<Vec<Named<E>>> {
    let mut saved: Vec<Named<E>> = Vec::new();
    for name in &lora.modules_to_save {
        let mut is_known = false;
        for tensor in named.iter().filter(|tensor| module(&tensor.name).ends_with(name.as_str())) {
            is_known = true;
            if tensor.rows != (0..tensor.parameter.rows()) {
                let expected = "modules whose weights are a matrix of their own, such as lm_head, embed_tokens, norm or score";
                return Err(Error::argument("lora", "modules_to_save", expected, format!("{name:?}; use it as a target")));
            }
            if !saved.iter().any(|known| known.name == tensor.name) {
                saved.push(tensor.clone());
            }
        }
        if !is_known || name.is_empty() {
            let has_head = named.iter().any(|tensor| module(&tensor.name) == "lm_head");
            let remedy = if name == "lm_head" && !has_head { ", which is one matrix with embed_tokens here; name that alone" } else { "" };
            let expected = "modules of this model with a matrix of their own, such as embed_tokens or norm";
            return Err(Error::argument("lora", "modules_to_save", expected, format!("{name:?}{remedy}")));
        }
    }
    Ok(saved)
}
