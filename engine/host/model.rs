//! `engine.model`: Qwen2.5 models in scripts. A model keeps the tokenizer of the folder it came from.

use super::args::json_to_lua;
use super::call::{Answer, Call, Class, Failed, Field, Function, describe};
use super::conversations::plain_json;
use super::data::BatchObject;
use super::generation;
use super::globals::seed;
use super::model_weights::{self, adapter_value, lora_option, score_option};
use super::options::Options;
use super::progress::Screen;
use super::room::Room;
use super::tensor::{tensor, tensor_value};
use super::tokenizer::TokenizerObject;
use super::work::Work;
use crate::data::pack::TokenBatch;
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use crate::kernels::element::Dtype;
use crate::model::config::Config;
use crate::model::generation_config::GenerationConfig;
use crate::model::presets::{names, preset, with_fields};
use crate::model::{Lora, Model, Packed, parse_dtype};
use crate::tensor::place::ImageTo;
use crate::tensor::{AnyTensor, Place};
use mlua::{IntoLua, Lua, Table, Value};
use serde_json::Value as Json;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A model in Lua. Cheap to clone: clones are one model.
#[derive(Clone)]
pub struct ModelObject {
    pub model: Arc<Model>,
    pub tokenizer: Option<TokenizerObject>,
    /// `generation_config.json` of the folder it came from, to be written again.
    generation_config: Option<Vec<u8>>,
    pub(super) frozen: bool,
    /// The folder it came from.
    source: Option<String>,
    /// Its version when it was as its source has it; none if it never was.
    made: Option<u64>,
    pub(super) room: Room,
}

/// What a script says of a new model besides its source.
struct Making {
    place: Place,
    dtype: Option<Dtype>,
    pub(super) frozen: bool,
    scores: bool,
    lora: Option<Lora>,
    adapter: Option<PathBuf>,
}

impl Making {
    /// Whether the weights themselves will be trained.
    fn trains(&self) -> bool {
        !self.frozen && self.lora.is_none() && self.adapter.is_none()
    }
}

/// Options of `engine.model.load` and of `run:model`.
pub const OPTIONS: &[&str] = &["adapter", "device", "dtype", "frozen", "head", "lora", "recompute", "tokenizer"];

impl ModelObject {
    /// A model from `source`: the folder of a checkpoint, or the fields of a new model.
    ///
    /// Errors: those of [`Model::load`] and [`Model::random`]; unknown options.
    pub fn make(lua: &Lua, op: &'static str, source: &Value, options: &Options) -> Failed<Self> {
        let dtype = match options.string("dtype")? {
            None => None,
            Some(name) => match parse_dtype(&name) {
                Some(dtype) => Some(dtype),
                None => return Err(Error::argument(op, "dtype", "\"f32\", \"bf16\" or \"int8\"", format!("\"{name}\"")).into()),
            },
        };
        let is_int8 = dtype == Some(Dtype::I8);
        if is_int8 && !options.value("lora")?.is_nil() {
            return Err(Error::argument(op, "dtype", "f32 or bf16 under an adapter that trains", "\"int8\", which is for inference").into());
        }
        let making = Making {
            place: options.string("device")?.map_or(Ok(Place::Host), |name| Place::named(&name))?,
            dtype,
            frozen: is_int8 || options.boolean("frozen")?.unwrap_or(false),
            scores: score_option(op, options)?,
            lora: lora_option(op, options)?,
            adapter: options.string("adapter")?.map(PathBuf::from),
        };
        if let (Some(device), Some(screen)) = (making.place.device(), lua.app_data_ref::<Screen>()) {
            screen.note(&format!("a model on {}, {}", making.place, device.name));
        }
        let mut this = match source {
            Value::String(folder) => Self::load(lua, &PathBuf::from(folder.to_string_lossy()), &making)?,
            Value::Table(fields) => Self::random(lua, fields, &making)?,
            other => {
                let expected = "the folder of a checkpoint, or a table of fields for a new model";
                return Err(Error::argument(op, "source", expected, describe(other)).into());
            }
        };
        match options.value("tokenizer")? {
            Value::Nil => {}
            value => {
                let tokenizer = value.as_userdata().and_then(|object| Some(object.borrow::<TokenizerObject>().ok()?.clone()));
                let wrong = || Error::argument(op, "tokenizer", "a Tokenizer (engine.tokenizer makes them)", describe(&value));
                this.tokenizer = Some(tokenizer.ok_or_else(wrong)?);
            }
        }
        if let Some(tokenizer) = &this.tokenizer {
            tokenizer.tokenizer.check_fits(this.model.config().vocab)?;
        }
        this.model.set_recompute(options.boolean("recompute")?.unwrap_or(false));
        this.adapt(lua, op, making)?;
        this.made = Some(this.model.version());
        Ok(this)
    }

    fn adapt(&self, lua: &Lua, op: &'static str, making: Making) -> Result<()> {
        match (making.lora, making.adapter) {
            (None, None) => Ok(()),
            (Some(lora), None) => {
                self.model.adapt(lora, seed(lua))?;
                if making.frozen {
                    self.model.set_trains(false);
                }
                Ok(())
            }
            (None, Some(folder)) => {
                let mut remarks = Vec::new();
                self.model.load_adapter(&folder, !making.frozen, &mut |remark| remarks.push(remark))?;
                note(lua, &folder, &remarks);
                Ok(())
            }
            (Some(_), Some(_)) => {
                Err(Error::argument(op, "lora", "one of `lora` (a new adapter) and `adapter` (the folder of one)", "both"))
            }
        }
    }

    fn load(lua: &Lua, folder: &Path, making: &Making) -> Result<Self> {
        if making.scores && making.frozen && making.adapter.is_none() && making.lora.is_none() && !Config::load(folder)?.score {
            let expected = "a model that scores (scripts/reward.lua trains one), where nothing trains its head";
            let got = format!("{}, which has a head over the vocabulary", folder.display());
            return Err(Error::argument("model.load", "source", expected, got));
        }
        let mut remarks = Vec::new();
        let mut remark = |remark| remarks.push(remark);
        let model = if making.scores {
            Model::load_scoring(&making.place, folder, making.dtype, making.trains(), seed(lua), &mut remark)?
        } else {
            Model::load_at(&making.place, folder, making.dtype, making.trains(), &mut remark)?
        };
        note(lua, folder, &remarks);
        let has_tokenizer = ["tokenizer.json", "vocab.json"].iter().any(|file| folder.join(file).is_file());
        let tokenizer = if has_tokenizer { Some(TokenizerObject::load(folder)?) } else { None };
        let generation_config = GenerationConfig::load(folder)?.map(|config| format!("{:#}\n", config.to_json()).into_bytes());
        let source = Some(folder.display().to_string());
        Ok(Self { model: Arc::new(model), tokenizer, generation_config, frozen: making.frozen, source, made: None, room: Room::default() })
    }

    fn random(lua: &Lua, fields: &Table, making: &Making) -> Failed<Self> {
        let mut changes: Vec<(String, Json)> = Vec::new();
        let mut base = "tiny".to_string();
        for pair in fields.pairs::<Value, Value>() {
            let (key, value) = pair?;
            let Value::String(key) = key else {
                return Err(Error::argument("model.new", "fields", "names only", "an entry without a name").into());
            };
            match (key.to_string_lossy(), value) {
                (key, Value::String(name)) if key == "preset" => base = name.to_string_lossy(),
                (key, value) => {
                    let expected = "a number, string, boolean or a table of these";
                    let json = plain_json(&value).map_err(|got| Error::argument("model.new", key.as_str(), expected, got))?;
                    changes.push((key, json));
                }
            }
        }
        changes.sort_by(|a, b| a.0.cmp(&b.0));
        let config = Config { score: making.scores, ..with_fields(&preset(&base)?, &changes)? };
        let dtype = making.dtype.unwrap_or(Dtype::F32);
        let model = Model::random_at(&making.place, config, dtype, seed(lua))?;
        model.set_trains(making.trains());
        Ok(Self {
            model: Arc::new(model),
            tokenizer: None,
            generation_config: None,
            frozen: making.frozen,
            source: None,
            made: None,
            room: Room::default(),
        })
    }

    /// The folder it came from.
    pub fn source(&self) -> Option<&str> {
        self.source.as_deref()
    }

    /// The same model, which counts as one made from `source` (a folder, or fields of a new one) and changed since.
    pub fn made_from(self, source: &Value) -> Self {
        let folder = source.as_string().map(|folder| folder.to_string_lossy());
        Self { source: folder, made: None, ..self }
    }

    /// The model without its adapter, frozen, with which it shares its weights.
    ///
    /// Errors: those of [`Model::base`].
    pub fn base(&self) -> Result<Self> {
        Ok(Self { model: Arc::new(self.model.base()?), frozen: true, ..self.clone() })
    }

    /// Its state, to be written while this one trains on.
    ///
    /// Errors: those of [`Model::image`].
    pub fn image(&self, to: ImageTo) -> Result<Self> {
        Ok(Self { model: Arc::new(self.model.image(to)?), ..self.clone() })
    }

    /// The name of the GPU that it is on.
    pub fn gpu(&self) -> Option<String> {
        self.model.place().device().map(|device| device.name.clone())
    }

    /// Whether nothing trains it, and nothing else has changed it: it can be made again from its source.
    pub fn is_as_made(&self) -> bool {
        self.frozen && self.made == Some(self.model.version())
    }

    /// Writes a Hugging Face checkpoint folder, with the tokenizer.
    ///
    /// - `stop_ids`: ids after which texts of the saved model end; none for those of this one
    ///
    /// Errors: those of [`Model::save`].
    pub fn save(&self, folder: &Path, dtype: Option<Dtype>, stop_ids: Option<Vec<u32>>) -> Result<()> {
        let mut files = self.tokenizer.as_ref().map_or_else(Vec::new, TokenizerObject::files);
        let known = self.own_generation_config();
        let written = match (known, stop_ids) {
            (Some(known), None) => known,
            (Some(known), Some(eos)) => GenerationConfig { eos, ..known },
            (None, eos) => {
                let eos = eos.unwrap_or_else(|| self.stop_ids());
                GenerationConfig { eos, pad: self.model.config().pad, ..GenerationConfig::default() }
            }
        };
        files.push(("generation_config.json".into(), format!("{:#}\n", written.to_json()).into_bytes()));
        self.model.save(folder, dtype, &files)
    }

    /// Ids that end a text: generation_config.json has the first word, then config.json, then the tokenizer.
    pub fn stop_ids(&self) -> Vec<u32> {
        let given = self.own_generation_config().map_or_else(Vec::new, |config| config.eos);
        let known = if given.is_empty() { self.model.config().eos.clone() } else { given };
        if !known.is_empty() {
            return known;
        }
        // A new model: its texts end with the end of a document, or of a turn.
        let ends =
            self.tokenizer.iter().flat_map(|object| [object.tokenizer.eos(), object.tokenizer.end_of_text(), object.tokenizer.im_end()]);
        let mut ids: Vec<u32> = Vec::new();
        for id in ends.flatten() {
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        ids
    }

    /// What the folder that it came from says of generation.
    fn own_generation_config(&self) -> Option<GenerationConfig> {
        let text = std::str::from_utf8(self.generation_config.as_ref()?).ok()?;
        GenerationConfig::parse(Path::new("generation_config.json"), text).ok()
    }

    /// The option `stop_tokens` of saving: texts of tokens, as ids.
    ///
    /// Errors: [`Error::Argument`] for a text that is not one added token of the tokenizer.
    pub fn stop_tokens(&self, op: &'static str, options: &Options) -> Failed<Option<Vec<u32>>> {
        let Some(texts) = options.strings("stop_tokens")? else { return Ok(None) };
        let id = |text: &String| {
            let id = self.tokenizer.as_ref().and_then(|object| object.tokenizer.added_id(text));
            id.ok_or_else(|| Error::argument(op, "stop_tokens", "added tokens of the tokenizer, such as <|im_end|>", format!("{text:?}")))
        };
        Ok(Some(texts.iter().map(id).collect::<Result<_>>()?))
    }
}

/// Functions of `engine.model`.
pub const FUNCTIONS: &[Function] = &[
    Function {
        op: "model.load",
        params: &["folder", "options?"],
        call: |call| {
            call.path(0)?;
            call.give(ModelObject::make(call.lua, call.op, &call.value(0), &call.options(1, OPTIONS)?)?)
        },
    },
    Function {
        op: "model.new",
        params: &["fields", "options?"],
        call: |call| {
            call.table(0)?;
            call.give(ModelObject::make(call.lua, call.op, &call.value(0), &call.options(1, OPTIONS)?)?)
        },
    },
    Function { op: "model.presets", params: &[], call: |call| call.give(names().map(str::to_string).collect::<Vec<_>>()) },
];

fn note(lua: &Lua, folder: &Path, remarks: &[String]) {
    if let Some(screen) = lua.app_data_ref::<Screen>() {
        remarks.iter().for_each(|remark| screen.note(&format!("{}: {remark}", folder.display())));
    }
}

fn packed(batch: &TokenBatch) -> Packed<'_> {
    Packed { tokens: &batch.tokens, position_ids: &batch.position_ids, cu_seqlens: &batch.cu_seqlens, prefixes: &batch.prefixes }
}

/// The batch at argument 0, counted as work, and `run` on it.
///
/// - `head_rows`: tokens of a batch that the head sees
pub(super) fn forward(
    call: &Call,
    trains: bool,
    head_rows: fn(&TokenBatch) -> usize,
    run: impl FnOnce(&ModelObject, &TokenBatch, &Packed) -> Failed<AnyTensor>,
) -> Answer {
    let this = call.subject::<ModelObject>()?.clone();
    let batch = call.object::<BatchObject>(0)?.0.clone();
    let packed = packed(&batch);
    if trains && !this.frozen {
        this.room.check(call.lua, call.op, &this.model, batch.tokens.len())?;
    }
    let result = run(&this, &batch, &packed)?;
    if let Some(work) = call.lua.app_data_ref::<Arc<Work>>() {
        work.forward(&this.model, &batch.cu_seqlens, head_rows(&batch), trains && !this.frozen);
    }
    tensor(call, result)
}

/// A table for each sparse layer, with tensors `experts`, `weights` and `logits`; then the load-balancing loss, or nil.
fn routing(call: &Call) -> Answer {
    let this = call.subject::<ModelObject>()?.clone();
    let batch = call.object::<BatchObject>(0)?.0.clone();
    let packed = packed(&batch);
    if !this.frozen {
        this.room.check(call.lua, call.op, &this.model, batch.tokens.len())?;
    }
    let (layers, balance) = this.model.routing(&packed)?;
    let answer = call.lua.create_table()?;
    for (logits, chosen, weights) in layers {
        let chosen: Vec<i32> = chosen.iter().map(|expert| i32::try_from(*expert).expect("a model has fewer experts")).collect();
        let layer = call.lua.create_table()?;
        layer.raw_set("experts", tensor_value(call.lua, AnyTensor::new(weights.shape(), Buffer::copy_of(&chosen))?)?)?;
        layer.raw_set("logits", tensor_value(call.lua, logits)?)?;
        layer.raw_set("weights", tensor_value(call.lua, weights)?)?;
        answer.raw_push(layer)?;
    }
    let balance = match balance {
        Some(balance) => tensor_value(call.lua, balance.into())?,
        None => Value::Nil,
    };
    if let Some(work) = call.lua.app_data_ref::<Arc<Work>>() {
        work.forward(&this.model, &batch.cu_seqlens, 0, !this.frozen);
    }
    call.give((answer, balance))
}

fn temperature(options: &Options) -> Failed<f32> {
    Ok(options.number("temperature")?.unwrap_or(1.0) as f32)
}

impl Class for ModelObject {
    const NAME: &'static str = "Model";

    fn text(&self) -> String {
        format!("Model: {} parameters, {}, on {}", self.model.count(), self.model.dtype_name(), self.model.place())
    }

    const METHODS: &'static [&'static [Function]] = &[
        &[
            Function { op: "Model:complete", params: &["prompt", "options?"], call: generation::complete },
            Function {
                op: "Model:cross_entropy",
                params: &["batch", "options?"],
                call: |call| {
                    let options = call.options(1, &["normalizer", "router_aux_loss_coef"])?;
                    let (normalizer, coefficient) = (options.number("normalizer")?, options.number("router_aux_loss_coef")?);
                    if let Some(coefficient) = coefficient.filter(|coefficient| !(0.0..f64::INFINITY).contains(coefficient)) {
                        return Err(Error::argument(call.op, "router_aux_loss_coef", "a finite number of at least 0", coefficient).into());
                    }
                    forward(call, true, TokenBatch::supervised, |this, batch, packed| {
                        let normalizer = normalizer.unwrap_or(batch.supervised().max(1) as f64);
                        let published = this.model.config().moe.as_ref().map_or(0.0, |moe| moe.router_aux_loss_coef);
                        // Of one update's micro-batches each balances for its share of the tokens.
                        let coefficient = coefficient.unwrap_or(published) * batch.supervised() as f64 / normalizer;
                        Ok(this.model.cross_entropy(packed, &batch.labels, normalizer as f32, coefficient as f32)?.total.into())
                    })
                },
            },
            Function {
                op: "Model:entropy",
                params: &["batch", "options?"],
                call: |call| {
                    let temperature = temperature(&call.options(1, &["temperature"])?)?;
                    forward(call, false, TokenBatch::supervised, |this, batch, packed| {
                        Ok(this.model.logprobs_and_entropy(packed, &batch.labels, temperature)?.1.into())
                    })
                },
            },
            Function { op: "Model:generate", params: &["prompts", "options?"], call: generation::generate_all },
            Function {
                op: "Model:gradient",
                params: &["name"],
                call: |call| match call.subject::<ModelObject>()?.model.gradient(&call.string(0)?)? {
                    Some(gradient) => tensor(call, gradient),
                    None => call.give(Value::Nil),
                },
            },
            Function {
                op: "Model:logprobs",
                params: &["batch", "options?"],
                call: |call| {
                    let temperature = temperature(&call.options(1, &["temperature"])?)?;
                    forward(call, true, TokenBatch::supervised, |this, batch, packed| {
                        Ok(this.model.logprobs(packed, &batch.labels, temperature)?.into())
                    })
                },
            },
            Function {
                op: "Model:parameter",
                params: &["name"],
                call: |call| {
                    let value = call.subject::<ModelObject>()?.model.value(&call.string(0)?)?;
                    tensor(call, value)
                },
            },
            Function {
                op: "Model:parameter_names",
                params: &[],
                call: |call| {
                    let names = call.subject::<ModelObject>()?.model.tensors().into_iter().map(|(name, _)| name);
                    call.give(names.collect::<Vec<_>>())
                },
            },
            Function { op: "Model:routing", params: &["batch"], call: routing },
            Function {
                op: "Model:save",
                params: &["folder", "options?"],
                call: |call| {
                    let options = call.options(1, &["dtype", "stop_tokens"])?;
                    let dtype = match options.string("dtype")? {
                        Some(name) => Some(super::tensor::dtype_of(call, Some(name))?),
                        None => None,
                    };
                    let this = call.subject::<ModelObject>()?.clone();
                    this.save(&call.path(0)?, dtype, this.stop_tokens(call.op, &options)?)?;
                    call.done()
                },
            },
        ],
        model_weights::METHODS,
    ];
    const FIELDS: &'static [Field<Self>] = &[
        Field { name: "adapter", get: |lua, this| adapter_value(lua, &this.model) },
        Field { name: "config", get: |lua, this| Ok(json_to_lua(lua, &this.model.config().to_json())?) },
        Field { name: "count", get: |_, this| Ok(Value::Integer(this.model.count() as i64)) },
        Field { name: "device", get: |lua, this| Ok(Value::String(lua.create_string(this.model.place().to_string())?)) },
        Field { name: "dtype", get: |lua, this| Ok(Value::String(lua.create_string(this.model.dtype_name())?)) },
        Field { name: "frozen", get: |_, this| Ok(Value::Boolean(this.frozen)) },
        Field {
            name: "tokenizer",
            get: |lua, this| match &this.tokenizer {
                Some(tokenizer) => Ok(tokenizer.clone().into_lua(lua)?),
                None => Ok(Value::Nil),
            },
        },
        Field { name: "trainable", get: |_, this| Ok(Value::Integer(this.model.trainable() as i64)) },
    ];
}

super::call::user_data!(ModelObject);
