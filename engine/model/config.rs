//! What a Qwen2.5 model is: sizes, rotary base, windows, experts. Read from the `config.json` of transformers 4 or 5 and
//! written in the form of 4, keys it does not know kept. Builds no model, and reads no weights.
//! Source: qwen2.5.md sections 1.4, 2 and 5.1; defaults are those of transformers 4.57.

use super::fields::{Fields, parse_object};
use super::rope_scaling::RopeScaling;
use crate::checkpoint::folder::{read_text, require_folder};
use crate::error::{Error, Result};
use crate::kernels::element::Dtype;
use serde_json::{Map, Value, json};
use std::path::Path;

/// The largest sizes read. Each but the heads', which the kernels limit, is several times that of any published model, and all
/// products of them fit 64 bits.
mod limit {
    pub const VOCAB: usize = 1 << 24;
    pub const HIDDEN: usize = 1 << 17;
    pub const INTERMEDIATE: usize = 1 << 20;
    pub const LAYERS: usize = 1 << 10;
    pub const HEADS: usize = 1 << 10;
    pub const HEAD_DIM: usize = crate::kernels::cpu::heads::Heads::HEAD_DIM_MAX;
    pub const EXPERTS: usize = 1 << 10;
    pub const POSITIONS: usize = 1 << 30;
}

/// A Qwen2.5 model, dense or with experts. Two configurations of the same model may differ in `source`.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Rows of the embedding and of the head; more than the tokenizer has, since they are padded.
    pub vocab: usize,
    pub hidden: usize,
    /// Width of the dense feed-forward layers.
    pub intermediate: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    pub rope: RopeScaling,
    /// Longest text, tokens.
    pub max_positions: usize,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Whether the head gives one score in place of logits: `Qwen2ForSequenceClassification` with one label.
    pub score: bool,
    /// One a layer: how many tokens it sees back, its own included, or all.
    pub sliding: Vec<Option<usize>>,
    /// Standard deviation of new weights.
    pub initializer_range: f64,
    pub moe: Option<MoeConfig>,
    /// In which the weights are stored. f16 counts as f32, which holds it exactly; bf16 would not.
    pub dtype: Dtype,
    /// Informational: `generation_config.json` decides where text ends.
    pub bos: Option<u32>,
    pub eos: Vec<u32>,
    pub pad: Option<u32>,
    /// The object this was read from; writing starts from it, so that unknown keys survive. Empty for a new model.
    pub source: Map<String, Value>,
}

/// The experts of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeConfig {
    pub experts: usize,
    pub experts_per_token: usize,
    /// Width of one expert.
    pub moe_intermediate: usize,
    /// Width of the expert that every token passes.
    pub shared_intermediate: usize,
    /// Whether the weights of the chosen experts are scaled to sum to 1; false for every published Qwen.
    pub norm_topk_prob: bool,
    /// Every how many layers one has experts.
    pub sparse_step: usize,
    /// Layers, counted from 0, that stay dense whatever `sparse_step` says.
    pub mlp_only_layers: Vec<usize>,
    pub router_aux_loss_coef: f64,
}

impl Config {
    /// Reads `config.json` of a checkpoint folder. Errors: [`Error::Io`]; [`Error::Format`] if there is no folder; as [`Config::parse`].
    pub fn load(folder: &Path) -> Result<Self> {
        require_folder(folder)?;
        let path = folder.join("config.json");
        Self::parse(&path, &read_text(&path)?)
    }

    /// Reads the text of a `config.json`; `path` is for messages.
    ///
    /// Errors: [`Error::Format`] with the key, what was expected and found; [`Error::Unsupported`] for quantised weights,
    /// Dual Chunk Attention, dropout in attention and rotary types that depend on the length.
    pub fn parse(path: &Path, text: &str) -> Result<Self> {
        let source = parse_object(path, text)?;
        let fields = Fields { path, prefix: "", object: &source };
        refuse_unsupported(&fields)?;
        let sparse = match fields.text("model_type")? {
            Some("qwen2") => false,
            Some("qwen2_moe") => true,
            _ => return Err(fields.wrong("model_type", "\"qwen2\" or \"qwen2_moe\"")),
        };
        // transformers has one set of defaults for each model type.
        let default = |dense: usize, moe: usize| if sparse { moe } else { dense };
        let hidden = fields.count("hidden_size", default(4096, 2048), 1..=limit::HIDDEN)?;
        let layers = fields.count("num_hidden_layers", default(32, 24), 1..=limit::LAYERS)?;
        let heads = fields.count("num_attention_heads", default(32, 16), 1..=limit::HEADS)?;
        // null means as many as heads; only an absent key has a default of its own.
        let kv_default = if fields.object.contains_key("num_key_value_heads") { heads } else { default(32, 16) };
        let head_dim = match fields.optional_count("head_dim", 2..=limit::HEAD_DIM)? {
            Some(head_dim) => head_dim,
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => return Err(fields.fault("hidden_size", format!("a multiple of num_attention_heads, {heads}"), hidden.to_string())),
        };
        let max_positions = fields.count("max_position_embeddings", 32_768, 1..=limit::POSITIONS)?;
        let (rope_theta, rope) = RopeScaling::parse(&fields, max_positions)?;
        let config = Self {
            vocab: fields.count("vocab_size", 151_936, 1..=limit::VOCAB)?,
            hidden,
            intermediate: fields.count("intermediate_size", default(22_016, 5632), 1..=limit::INTERMEDIATE)?,
            layers,
            heads,
            kv_heads: fields.count("num_key_value_heads", kv_default, 1..=limit::HEADS)?,
            head_dim,
            // Far below the least bound it would be zero in f32, and a row of zeros would become NaN.
            rms_norm_eps: fields.number("rms_norm_eps", 1e-6, 1e-12..=1.0)?,
            rope_theta,
            rope,
            max_positions,
            tied: fields.flag("tie_word_embeddings", false)?,
            score: parse_score(&fields),
            sliding: parse_sliding(&fields, layers)?,
            initializer_range: fields.number("initializer_range", 0.02, 0.0..=1e3)?,
            moe: if sparse { Some(parse_moe(&fields)?) } else { None },
            dtype: parse_dtype(&fields)?,
            bos: fields.token("bos_token_id")?,
            eos: fields.tokens("eos_token_id")?,
            pad: fields.token("pad_token_id")?,
            source: Map::new(),
        };
        config.check(path)?;
        Ok(Self { source, ..config })
    }

    /// Checks what must hold between fields. Errors: [`Error::Format`] at `path`, by the keys of `config.json`.
    pub fn check(&self, path: &Path) -> Result<()> {
        let fault = |key: &str, expected: String, found: String| Err(Error::format(path, key, expected, found));
        if !self.heads.is_multiple_of(self.kv_heads) {
            let expected = format!("a divisor of num_attention_heads, {}", self.heads);
            return fault("num_key_value_heads", expected, self.kv_heads.to_string());
        }
        if !self.head_dim.is_multiple_of(2) {
            return fault("head_dim", "an even number, since rotation pairs its halves".into(), self.head_dim.to_string());
        }
        if self.sliding.len() != self.layers {
            return fault("layer_types", format!("one for each of {} layers", self.layers), format!("{} of them", self.sliding.len()));
        }
        let Some(moe) = &self.moe else { return Ok(()) };
        if moe.experts_per_token > moe.experts {
            let expected = format!("at most num_experts, {}", moe.experts);
            return fault("num_experts_per_tok", expected, moe.experts_per_token.to_string());
        }
        if let Some(layer) = moe.mlp_only_layers.iter().find(|layer| **layer >= self.layers) {
            return fault("mlp_only_layers", format!("layers below num_hidden_layers, {}", self.layers), layer.to_string());
        }
        Ok(())
    }

    /// Whether layer `layer`, counted from 0, has experts.
    pub fn is_sparse(&self, layer: usize) -> bool {
        assert!(layer < self.layers, "layer {layer} of {}", self.layers);
        self.moe.as_ref().is_some_and(|moe| (layer + 1).is_multiple_of(moe.sparse_step) && !moe.mlp_only_layers.contains(&layer))
    }

    /// The rotary frequencies, radians a position, `[head_dim / 2]`, and the factor on cos and sin.
    pub fn inv_freq(&self) -> (Vec<f32>, f32) {
        self.rope.inv_freq(self.rope_theta, self.head_dim)
    }

    /// The `config.json` of this model, in the form of transformers 4: `source` with every key known here set anew.
    pub fn to_json(&self) -> Value {
        let mut object = self.source.clone();
        // The names of version 5 for what is written below under those of version 4.
        object.shift_remove("rope_parameters");
        object.shift_remove("dtype");
        let mut set = |key: &str, value: Value| object.insert(key.to_owned(), value);
        let moe = self.moe.as_ref();
        let task = if self.score { "ForSequenceClassification" } else { "ForCausalLM" };
        set("architectures", json!([format!("{}{task}", if moe.is_some() { "Qwen2Moe" } else { "Qwen2" })]));
        set("model_type", json!(if moe.is_some() { "qwen2_moe" } else { "qwen2" }));
        set("vocab_size", json!(self.vocab));
        set("hidden_size", json!(self.hidden));
        set("intermediate_size", json!(self.intermediate));
        set("num_hidden_layers", json!(self.layers));
        set("num_attention_heads", json!(self.heads));
        set("num_key_value_heads", json!(self.kv_heads));
        set("hidden_act", json!("silu"));
        set("rms_norm_eps", json!(self.rms_norm_eps));
        set("rope_theta", json!(self.rope_theta));
        set("rope_scaling", self.rope.to_json());
        set("max_position_embeddings", json!(self.max_positions));
        set("tie_word_embeddings", json!(self.tied));
        set("initializer_range", json!(self.initializer_range));
        set("attention_dropout", json!(0.0));
        set("torch_dtype", json!(if self.dtype == Dtype::Bf16 { "bfloat16" } else { "float32" }));
        set("bos_token_id", json!(self.bos));
        set("eos_token_id", if let [one] = self.eos[..] { json!(one) } else { json!((!self.eos.is_empty()).then_some(&self.eos)) });
        set("pad_token_id", json!(self.pad));
        if let Some(moe) = moe {
            set("num_experts", json!(moe.experts));
            set("num_experts_per_tok", json!(moe.experts_per_token));
            set("moe_intermediate_size", json!(moe.moe_intermediate));
            set("shared_expert_intermediate_size", json!(moe.shared_intermediate));
            set("norm_topk_prob", json!(moe.norm_topk_prob));
            set("decoder_sparse_step", json!(moe.sparse_step));
            set("mlp_only_layers", json!(moe.mlp_only_layers));
            set("router_aux_loss_coef", json!(moe.router_aux_loss_coef));
            set("qkv_bias", json!(true));
        }
        if self.score {
            // transformers counts labels by their names, and has two if there are none.
            object.insert("id2label".into(), json!({ "0": "LABEL_0" }));
            object.insert("label2id".into(), json!({ "LABEL_0": 0 }));
        }
        if self.head_dim * self.heads != self.hidden || object.contains_key("head_dim") {
            object.insert("head_dim".into(), json!(self.head_dim));
        }
        for key in ["use_cache", "use_sliding_window", "sliding_window", "max_window_layers"] {
            object.entry(key).or_insert(match key {
                "use_cache" => json!(true),
                "use_sliding_window" => json!(false),
                "sliding_window" => Value::Null,
                _ => json!(self.layers),
            });
        }
        self.write_sliding(&mut object);
        Value::Object(object)
    }

    fn write_sliding(&self, object: &mut Map<String, Value>) {
        let first = self.sliding.iter().position(Option::is_some);
        object.insert("use_sliding_window".into(), json!(first.is_some()));
        if let Some(first) = first {
            object.insert("sliding_window".into(), json!(self.sliding[first]));
            object.insert("max_window_layers".into(), json!(first));
        }
        // Readers of before layer_types know only "all from max_window_layers on", so other patterns need the list.
        let from_first_on = first.is_none_or(|first| self.sliding[first..].iter().all(Option::is_some));
        if object.contains_key("layer_types") || !from_first_on {
            let kind = |window: &Option<usize>| if window.is_some() { "sliding_attention" } else { "full_attention" };
            object.insert("layer_types".into(), self.sliding.iter().map(kind).collect());
        }
    }
}

/// What is known to the field and not built here.
fn refuse_unsupported(fields: &Fields) -> Result<()> {
    let unsupported = |what: String, remedy: &str| {
        let what = format!("{}: {what}", fields.path.display());
        Err(Error::Unsupported { what, remedy: remedy.to_owned() })
    };
    if let Some(quantization) = fields.object("quantization_config", "quantization_config.")? {
        let method = quantization.text("quant_method")?.unwrap_or("unnamed").to_owned();
        return unsupported(
            format!("quantization_config: a quantised checkpoint ({method})"),
            "use the unquantised checkpoint of the same model, in bf16",
        );
    }
    if fields.get("dual_chunk_attention_config").is_some() {
        return unsupported(
            "dual_chunk_attention_config: Dual Chunk Attention".into(),
            "remove the key from config.json to run the model with plain attention, exact up to its trained length of 262144 tokens",
        );
    }
    if fields.number("attention_dropout", 0.0, 0.0..=1.0)? != 0.0 {
        return unsupported(
            "attention_dropout: dropout in attention".into(),
            "set it to 0.0, as every published Qwen2.5 has it; it acts in training only",
        );
    }
    if fields.text("hidden_act")?.is_some_and(|name| name != "silu") {
        return Err(fields.wrong("hidden_act", "\"silu\""));
    }
    if !fields.flag("qkv_bias", true)? {
        return Err(fields.wrong("qkv_bias", "true, as in every Qwen2 model"));
    }
    Ok(())
}

/// The window of each layer. Errors: [`Error::Format`].
fn parse_sliding(fields: &Fields, layers: usize) -> Result<Vec<Option<usize>>> {
    let enabled = fields.flag("use_sliding_window", false)?;
    // While it is off the number is inert, whatever it is: published files say 131072, version 5 writes 0.
    let window = match enabled {
        true if !fields.object.contains_key("sliding_window") => Some(4096),
        true => fields.optional_count("sliding_window", 1..=limit::POSITIONS)?,
        false => fields.optional_count("sliding_window", 0..=usize::MAX)?.and(None),
    };
    let from = fields.count("max_window_layers", 28, 0..=usize::MAX)?;
    let Some(kinds) = fields.get("layer_types") else {
        return Ok((0..layers).map(|layer| window.filter(|_| layer >= from)).collect());
    };
    let expected = "a list of \"full_attention\" and \"sliding_attention\"";
    let kinds = kinds.as_array().ok_or_else(|| fields.wrong("layer_types", expected))?;
    if kinds.len() != layers {
        return Err(fields.fault("layer_types", format!("one for each of {layers} layers"), format!("{} of them", kinds.len())));
    }
    let kind = |kind: &Value| match kind.as_str() {
        Some("full_attention") => Ok(None),
        Some("sliding_attention") if window.is_some() => Ok(window),
        Some("sliding_attention") => {
            Err(fields.fault("layer_types", "use_sliding_window and sliding_window to be set", "\"sliding_attention\" without them"))
        }
        _ => Err(fields.fault("layer_types", expected, kind.to_string().chars().take(80).collect::<String>())),
    };
    kinds.iter().map(kind).collect()
}

/// The keys of `qwen2_moe`; defaults are those of Qwen1.5-MoE-A2.7B, as in transformers. Errors: [`Error::Format`].
fn parse_moe(fields: &Fields) -> Result<MoeConfig> {
    Ok(MoeConfig {
        experts: fields.count("num_experts", 60, 1..=limit::EXPERTS)?,
        experts_per_token: fields.count("num_experts_per_tok", 4, 1..=limit::EXPERTS)?,
        moe_intermediate: fields.count("moe_intermediate_size", 1408, 1..=limit::INTERMEDIATE)?,
        shared_intermediate: fields.count("shared_expert_intermediate_size", 5632, 1..=limit::INTERMEDIATE)?,
        norm_topk_prob: fields.flag("norm_topk_prob", false)?,
        sparse_step: fields.count("decoder_sparse_step", 1, 1..=limit::LAYERS)?,
        mlp_only_layers: fields.counts("mlp_only_layers", 0..=limit::LAYERS)?.unwrap_or_default(),
        router_aux_loss_coef: fields.number("router_aux_loss_coef", 0.001, 0.0..=1e6)?,
    })
}

/// Whether `architectures` names a model that scores.
fn parse_score(fields: &Fields) -> bool {
    let names = fields.get("architectures").and_then(Value::as_array);
    names.into_iter().flatten().any(|name| name.as_str().is_some_and(|name| name.ends_with("ForSequenceClassification")))
}

/// `torch_dtype` (version 4) or `dtype` (5); f32 if neither is there, as in transformers. Errors: [`Error::Format`].
fn parse_dtype(fields: &Fields) -> Result<Dtype> {
    let key = if fields.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
    let Some(name) = fields.text(key)? else { return Ok(Dtype::F32) };
    match name.strip_prefix("torch.").unwrap_or(name) {
        "bfloat16" => Ok(Dtype::Bf16),
        "float32" | "float16" => Ok(Dtype::F32),
        _ => Err(fields.wrong(key, "\"bfloat16\", \"float32\" or \"float16\"")),
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
