//! What a configuration costs before anything is built: its tensors by name and shape, parameters, cache and memory.
//! Estimates of memory count weights, gradients, moments and cache; activations depend on the batch and are not counted.
//! Source: qwen2.5.md sections 1.1, 1.3, 2.1 and 2.3.

use super::config::Config;
use super::lora::{EMBEDDING, Lora, module};
use crate::error::Result;
use crate::kernels::element::Dtype;
use crate::tensor::logprobs::{rows_on_device, rows_on_host};

/// The tensors of a checkpoint of `config`: names of the hub's layout, shapes `[out, in]`, in the order of the forward
/// pass. A tied model has no `lm_head.weight`, one that scores has `score.weight` in its place.
pub fn tensors(config: &Config) -> Vec<(String, Vec<usize>)> {
    let Config { vocab, hidden, heads, kv_heads, head_dim, .. } = *config;
    let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![vocab, hidden])];
    for layer in 0..config.layers {
        let mut add = |name: &str, shape: &[usize]| tensors.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
        add("input_layernorm.weight", &[hidden]);
        for (projection, rows) in [("q", heads * head_dim), ("k", kv_heads * head_dim), ("v", kv_heads * head_dim)] {
            add(&format!("self_attn.{projection}_proj.weight"), &[rows, hidden]);
            add(&format!("self_attn.{projection}_proj.bias"), &[rows]);
        }
        add("self_attn.o_proj.weight", &[hidden, heads * head_dim]);
        add("post_attention_layernorm.weight", &[hidden]);
        let mut swiglu = |prefix: &str, width: usize| {
            add(&format!("{prefix}.gate_proj.weight"), &[width, hidden]);
            add(&format!("{prefix}.up_proj.weight"), &[width, hidden]);
            add(&format!("{prefix}.down_proj.weight"), &[hidden, width]);
        };
        match config.moe.as_ref().filter(|_| config.is_sparse(layer)) {
            None => swiglu("mlp", config.intermediate),
            Some(moe) => {
                for expert in 0..moe.experts {
                    swiglu(&format!("mlp.experts.{expert}"), moe.moe_intermediate);
                }
                swiglu("mlp.shared_expert", moe.shared_intermediate);
                add("mlp.gate.weight", &[moe.experts, hidden]);
                add("mlp.shared_expert_gate.weight", &[1, hidden]);
            }
        }
    }
    tensors.push(("model.norm.weight".to_owned(), vec![hidden]));
    if config.score {
        tensors.push(("score.weight".to_owned(), vec![1, hidden]));
    } else if !config.tied {
        tensors.push(("lm_head.weight".to_owned(), vec![vocab, hidden]));
    }
    tensors
}

/// Parameter counts of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    pub total: u64,
    /// Without the embedding and, if it is a tensor of its own, the head.
    pub non_embedding: u64,
    /// That one token passes: all but the experts it is not sent to; without embedding and head.
    pub activated: u64,
}

/// Counts the parameters of `config` without listing its tensors.
pub fn parameters(config: &Config) -> Parameters {
    let size = |value: usize| value as u64;
    let (hidden, query, key) = (size(config.hidden), size(config.heads * config.head_dim), size(config.kv_heads * config.head_dim));
    // Query, key and value have biases, the output has none; two norms.
    let attention = (hidden + 1) * (query + 2 * key) + query * hidden + 2 * hidden;
    let swiglu = |width: usize| 3 * hidden * size(width);
    let (mut non_embedding, mut activated) = (hidden, hidden);
    for layer in 0..config.layers {
        let (all, used) = match config.moe.as_ref().filter(|_| config.is_sparse(layer)) {
            None => (swiglu(config.intermediate), swiglu(config.intermediate)),
            Some(moe) => {
                let always = swiglu(moe.shared_intermediate) + (size(moe.experts) + 1) * hidden;
                let expert = swiglu(moe.moe_intermediate);
                (always + size(moe.experts) * expert, always + size(moe.experts_per_token) * expert)
            }
        };
        non_embedding += attention + all;
        activated += attention + used;
    }
    let head = match (config.score, config.tied) {
        (true, _) => hidden,
        (false, true) => 0,
        (false, false) => size(config.vocab) * hidden,
    };
    let embedding = size(config.vocab) * hidden + head;
    Parameters { total: non_embedding + embedding, non_embedding, activated }
}

/// Bytes of keys and values that one token leaves in the cache, over all layers.
pub fn kv_cache_bytes_per_token(config: &Config, dtype: Dtype) -> u64 {
    (2 * config.layers * config.kv_heads * config.head_dim * dtype.size()) as u64
}

/// Bytes of the weights alone, in `dtype`.
pub fn load_bytes(config: &Config, dtype: Dtype) -> u64 {
    parameters(config).total * dtype.size() as u64
}

/// Bytes that training all parameters with AdamW keeps, without activations: 16 a parameter in either type, 12 with moments in
/// bf16.
///
/// f32: weights 4, gradients 4, moments 8. bf16: weights 2 and the lower half of their f32 masters 2, gradients 4,
/// moments 8.
pub fn train_bytes(config: &Config, dtype: Dtype, moments: Dtype) -> u64 {
    parameters(config).total * kept_bytes(dtype, moments)
}

/// Bytes of the copy from which a checkpoint is written while training goes on: masters in f32, or weights and their remainders, and the
/// moments. Where memory has no room for it, the run waits instead.
pub fn checkpoint_copy_bytes(config: &Config, moments: Dtype) -> u64 {
    (4 + 2 * moments.size() as u64) * parameters(config).total
}

/// Bytes that training keeps for an element: weight, gradient, moments.
fn kept_bytes(dtype: Dtype, moments: Dtype) -> u64 {
    let weight = match dtype {
        // The master is the weight and its lower half together, so it takes no more than f32 weights do.
        Dtype::Bf16 => 2 + 2,
        other => other.size() as u64,
    };
    weight + 4 + 2 * moments.size() as u64
}

/// Bytes that serving keeps: weights, and the cache of `sequences` texts of `context_tokens` each. Layers with a sliding
/// window keep no more than their window.
pub fn serve_bytes(config: &Config, dtype: Dtype, context_tokens: usize, sequences: usize) -> u64 {
    // A script may ask for any length: an absurd one gives an absurd need, not a small one.
    load_bytes(config, dtype).saturating_add(cache_bytes(config, dtype, context_tokens, sequences))
}

/// Bytes of the keys and values of `sequences` texts of `context_tokens`; layers with a window keep no more than it.
pub fn cache_bytes(config: &Config, dtype: Dtype, context_tokens: usize, sequences: usize) -> u64 {
    let per_layer = (2 * config.kv_heads * config.head_dim * dtype.size()) as u64;
    let kept = config.sliding.iter().map(|window| window.unwrap_or(usize::MAX).min(context_tokens) as u64);
    per_layer.saturating_mul(kept.fold(0, u64::saturating_add)).saturating_mul(sequences as u64)
}

/// What an adapter takes beside the model that it is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdapterSize {
    pub parameters: u64,
    /// Elements in memory on the CPU, where the rows of factors are padded to panels of 32.
    elements: u64,
}

impl AdapterSize {
    /// Of `lora` on a model of `config`.
    ///
    /// Errors: [`crate::error::Error::Argument`] for ranks and targets that cannot be meant.
    pub fn of(config: &Config, lora: &Lora) -> Result<Self> {
        lora.check()?;
        let mut modules: Vec<(String, usize, usize)> = Vec::new();
        for (name, shape) in tensors(config) {
            if let [rows, columns] = shape[..]
                && name != "score.weight"
            {
                modules.push((module(&name).into(), rows, columns));
            }
        }
        if config.tied && !config.score {
            modules.push(("lm_head".into(), config.vocab, config.hidden));
        }
        lora.check_targets(&modules.iter().map(|(module, ..)| module.as_str()).collect::<Vec<_>>())?;
        let mut size = Self { parameters: 0, elements: 0 };
        for (module, rows, columns) in modules.iter().filter(|(module, ..)| lora.takes(module)) {
            let (rank, rows, columns) = (lora.rank_of(module) as u64, *rows as u64, *columns as u64);
            size.parameters += rank * (rows + columns) + if lora.dora { rows } else { 0 };
            size.elements += match module == EMBEDDING {
                true => rank * rows + rank * columns.next_multiple_of(32),
                false => rank.next_multiple_of(32) * columns + rank * rows.next_multiple_of(32) + if lora.dora { rows } else { 0 },
            };
        }
        Ok(size)
    }

    /// Bytes of its weights in `dtype`.
    pub fn load_bytes(&self, dtype: Dtype) -> u64 {
        self.elements * dtype.size() as u64
    }

    /// Bytes that training it with AdamW keeps, without its base and without activations: as [`train_bytes`].
    pub fn train_bytes(&self, dtype: Dtype, moments: Dtype) -> u64 {
        self.elements * kept_bytes(dtype, moments)
    }
}

/// A step of training with AdamW, as far as its memory depends on it.
#[derive(Clone, Copy, Debug)]
pub struct TrainingStep {
    /// Of weights and activations.
    pub dtype: Dtype,
    /// Of the step, or of its largest micro-batch; each has a label.
    pub tokens: usize,
    /// Parameters that train; those of adapters count here alone.
    pub trainable: u64,
    /// In what the optimizer keeps its moments.
    pub moments: Dtype,
    /// Whether layers are computed again in the backward pass.
    pub recompute: bool,
    /// Memory of the device that computes it, which decides how many logits exist together; none on the host.
    pub device_bytes: Option<u64>,
}

/// What is held at the height of a training step with AdamW, the largest first: names and bytes. Activations are those that
/// wait for the backward pass of a model that trains all its weights.
pub fn training_parts(config: &Config, step: &TrainingStep) -> Vec<(&'static str, u64)> {
    let (element, trainable) = (step.dtype.size() as u64, step.trainable);
    // A script may ask for any number of tokens, here as in `serve_bytes`.
    let activations = (step.tokens as u64).saturating_mul(activation_bytes_per_token(config, step));
    let chunk = match step.device_bytes {
        Some(bytes) => rows_on_device(config.vocab, step.tokens, bytes),
        None => rows_on_host(config.vocab, step.tokens),
    };
    let rows = step.tokens.min(chunk) as u64;
    let remainders = if step.dtype == Dtype::Bf16 { 2 * trainable } else { 0 };
    let mut parts = vec![
        ("moments of AdamW", 2 * step.moments.size() as u64 * trainable),
        ("gradients of weights", 4 * trainable),
        ("weights", load_bytes(config, step.dtype)),
        ("remainders of masters", remainders),
        ("activations", activations),
        ("logits of a chunk and their gradient", rows * config.vocab as u64 * (4 + element)),
    ];
    parts.retain(|(_, bytes)| *bytes > 0);
    parts.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
    parts
}

fn activation_bytes_per_token(config: &Config, step: &TrainingStep) -> u64 {
    let (element, size) = (step.dtype.size() as u64, |value: usize| value as u64);
    let (hidden, query, key) = (size(config.hidden), size(config.heads * config.head_dim), size(config.kv_heads * config.head_dim));
    // Two inputs of norms, the turned queries, keys and values, and what attention mixed; lengths and sums of rows in f32.
    let attention = element * (2 * hidden + 2 * query + 2 * key) + 4 * (2 + size(config.heads));
    let sparse = |index: usize| config.moe.as_ref().filter(|_| config.is_sparse(index));
    let behind_attention = |index: usize| match sparse(index) {
        None => element * 2 * size(config.intermediate),
        Some(moe) => {
            let visits = size(moe.experts_per_token);
            let experts = visits * (2 * size(moe.moe_intermediate) + hidden) + 2 * size(moe.shared_intermediate) + 3 * hidden;
            element * (experts + size(moe.experts)) + 4 * (size(moe.experts) + 2 * visits + 2)
        }
    };
    let layer = |index: usize| attention + behind_attention(index);
    if step.recompute {
        // The input of every layer, and one layer while it is computed again; of a sparse one only the attention is.
        let kept = |index: usize| element * hidden + sparse(index).map_or(0, |_| element * hidden + behind_attention(index));
        let again = |index: usize| if sparse(index).is_some() { attention } else { layer(index) };
        return (0..config.layers).map(kept).sum::<u64>() + (0..config.layers).map(again).max().unwrap_or(0);
    }
    (0..config.layers).map(layer).sum()
}

#[cfg(test)]
mod tests {
    use super::super::presets::{names, preset};
    use super::*;

    #[test]
    fn counts_and_cache_equal_the_published_table() {
        // qwen2.5.md sections 1.1 and 2.3: total, non-embedding, KV bytes a token in bf16.
        for (name, total, non_embedding, cache) in [
            ("0.5B", 494_032_768, 357_898_112, 12_288),
            ("1.5B", 1_543_714_304, 1_310_340_608, 28_672),
            ("3B", 3_085_938_688, 2_774_773_760, 36_864),
            ("7B", 7_615_616_512, 6_525_621_760, 57_344),
            ("14B", 14_770_033_664, 13_212_898_304, 196_608),
            ("32B", 32_763_876_352, 31_206_740_992, 262_144),
            ("72B", 72_706_203_648, 70_214_787_072, 327_680),
        ] {
            let config = preset(name).unwrap();
            assert_eq!(parameters(&config), Parameters { total, non_embedding, activated: non_embedding }, "{name}");
            assert_eq!(kv_cache_bytes_per_token(&config, Dtype::Bf16), cache, "{name}");
        }
        // The reference gives activated counts in billions, to two places.
        let hundredths = |count: u64| (count as f64 / 1e7).round() as u64;
        let small = parameters(&preset("Qwen1.5-MoE-A2.7B").unwrap());
        assert_eq!((small.total, hundredths(small.activated)), (14_315_784_192, 207));
        let large = parameters(&preset("Qwen2-57B-A14B").unwrap());
        assert_eq!((large.total, hundredths(large.activated)), (57_408_658_944, 1316));
        // 14.25B with embedding and head.
        assert_eq!(hundredths(large.activated + large.total - large.non_embedding), 1425);
    }

    #[test]
    fn the_list_of_tensors_and_the_count_agree() {
        for name in names() {
            let config = preset(name).unwrap();
            let sum: u64 = tensors(&config).iter().map(|(_, shape)| shape.iter().product::<usize>() as u64).sum();
            assert_eq!(sum, parameters(&config).total, "{name}");
        }
    }

    #[test]
    fn golden_checkpoints_hold_exactly_the_listed_tensors() {
        let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        for name in [
            "dense_tied",
            "dense_untied",
            "dense_sharded",
            "dense_bf16",
            "dense_yarn",
            "dense_sliding",
            "dense_theta_1e7",
            "moe_norm_false",
            "moe_norm_true",
            "moe_mixed_layers",
            "train_dense",
            "train_moe",
        ] {
            let config = Config::load(&golden.join(name)).unwrap();
            let folder = crate::checkpoint::folder::CheckpointFolder::open(&golden.join(name)).unwrap();
            let mut want = tensors(&config);
            want.sort();
            let got: Vec<_> = folder.tensors().map(|tensor| (tensor.name.clone(), tensor.shape.clone())).collect();
            assert_eq!(got, want, "{name}");
        }
    }

    fn all(config: &Config, dtype: Dtype, tokens: usize) -> TrainingStep {
        TrainingStep { dtype, tokens, trainable: parameters(config).total, moments: Dtype::F32, recompute: false, device_bytes: None }
    }

    #[test]
    fn the_parts_of_a_training_step_hold_what_training_keeps() {
        for (name, dtype) in [("0.5B", Dtype::Bf16), ("0.5B", Dtype::F32), ("Qwen1.5-MoE-A2.7B", Dtype::Bf16)] {
            let config = preset(name).unwrap();
            let parts = training_parts(&config, &all(&config, dtype, 4096));
            let of = |wanted: &[&str]| parts.iter().filter(|(part, _)| wanted.contains(part)).map(|(_, bytes)| bytes).sum::<u64>();
            let kept = of(&["moments of AdamW", "gradients of weights", "weights", "remainders of masters"]);
            assert_eq!(kept, train_bytes(&config, dtype, Dtype::F32), "{name}");
            assert!(parts.is_sorted_by(|a, b| a.1 >= b.1) && of(&["activations"]) > 1 << 28, "{name}: {parts:?}");
        }
        // 0.5B: 24 layers of 2 bytes x (2 x 896 + 2 x 896 + 2 x 128 + 2 x 4864) and 4 x (2 + 14) a token.
        let config = preset("0.5B").unwrap();
        let step = all(&config, Dtype::Bf16, 10);
        let (parts, layer) = (training_parts(&config, &step), 2 * (4 * 896 + 256 + 9728) + 64);
        assert!(parts.contains(&("activations", 10 * 24 * layer)), "{parts:?}");
        let parts = training_parts(&config, &TrainingStep { recompute: true, trainable: 1000, ..step });
        assert!(parts.contains(&("activations", 10 * (24 * 2 * 896 + layer))), "{parts:?}");
        let halved = training_parts(&config, &TrainingStep { moments: Dtype::Bf16, trainable: 1000, ..step });
        assert!(halved.contains(&("moments of AdamW", 4000)), "{halved:?}");
        // Logits: the host has 576 rows of them together, a GPU of 80 GiB half of 8192, one of 16 GiB what a sixteenth of it holds.
        let logits = |device_bytes| {
            let parts = training_parts(&config, &TrainingStep { device_bytes, tokens: 8192, ..step });
            parts.iter().find(|(part, _)| part.starts_with("logits")).unwrap().1 / (151_936 * 6)
        };
        assert_eq!([None, Some(80 << 30), Some(16 << 30)].map(logits), [576, 4096, 1664]);
        // Of 24 sparse layers only the attention is computed again; each keeps the input of its norm too.
        let mixture = preset("Qwen1.5-MoE-A2.7B").unwrap();
        let activations = |recompute| activation_bytes_per_token(&mixture, &TrainingStep { recompute, ..all(&mixture, Dtype::Bf16, 10) });
        let attention = 2 * (2 * 2048 + 2 * 2048 + 2 * 2048) + 4 * (2 + 16);
        assert_eq!(activations(false) - activations(true), 24 * (attention - 2 * 2 * 2048) - attention);
        assert!(parts.contains(&("moments of AdamW", 8000)) && parts.contains(&("weights", 2 * 494_032_768)), "{parts:?}");
    }

    /// Counted by hand for 0.5B: hidden 896, keys 128, intermediate 4864, 24 layers, vocabulary 151,936.
    #[test]
    fn an_adapter_takes_what_its_factors_do() {
        let config = preset("0.5B").unwrap();
        let of = |rank: usize, dora: bool, targets: &[&str]| {
            let targets = targets.iter().map(|target| target.to_string()).collect();
            AdapterSize::of(&config, &Lora { rank, dora, targets, ..Lora::default() })
        };
        let attention = (896 + 896) + 2 * (896 + 128) + (896 + 896);
        let all = 24 * 16 * (attention + 3 * (896 + 4864));
        assert_eq!(of(16, false, &["all-linear"]).unwrap().parameters, all);
        let q = of(16, true, &["q_proj"]).unwrap();
        assert_eq!(q.parameters, 24 * (16 * (896 + 896) + 896));
        assert_eq!(q.load_bytes(Dtype::Bf16), 2 * 24 * (32 * 896 + 16 * 896 + 896));
        assert_eq!(q.train_bytes(Dtype::Bf16, Dtype::F32), 16 * 24 * (32 * 896 + 16 * 896 + 896));
        let ends = of(4, false, &["embed_tokens", "lm_head"]).unwrap();
        assert_eq!(ends.parameters, 2 * 4 * (151_936 + 896));
        for error in [of(0, false, &["q_proj"]), of(8, false, &["q"])] {
            assert!(error.unwrap_err().to_string().contains("lora"));
        }
        // A model has the tensors that are counted here.
        let small = crate::model::presets::with_fields(&preset("tiny").unwrap(), &[("layers".into(), serde_json::json!(2))]).unwrap();
        for lora in [Lora::default(), Lora { dora: true, targets: vec!["lm_head".into(), "gate_proj".into()], ..Lora::default() }] {
            let model = crate::model::Model::random(small.clone(), Dtype::F32, 1).unwrap();
            model.adapt(lora.clone(), 1).unwrap();
            assert_eq!(AdapterSize::of(&small, &lora).unwrap().parameters, model.trainable() as u64);
        }
    }

    #[test]
    fn memory_adds_up() {
        let config = preset("0.5B").unwrap();
        let total = 494_032_768;
        assert_eq!(load_bytes(&config, Dtype::Bf16), 2 * total);
        let bytes = |dtype, moments| train_bytes(&config, dtype, moments) / total;
        assert_eq!([bytes(Dtype::F32, Dtype::F32), bytes(Dtype::Bf16, Dtype::F32), bytes(Dtype::Bf16, Dtype::Bf16)], [16, 16, 12]);
        assert_eq!(serve_bytes(&config, Dtype::Bf16, 1000, 3), 2 * total + 3 * 1000 * 12_288);
        let mut sliding = config.clone();
        sliding.sliding[12..].fill(Some(100));
        assert_eq!(serve_bytes(&sliding, Dtype::Bf16, 1000, 1), 2 * total + (12 * 1000 + 12 * 100) * 512);
        assert_eq!(serve_bytes(&config, Dtype::F32, 0, 7), 4 * total);
        assert_eq!(serve_bytes(&config, Dtype::F32, 1 << 40, 1 << 40), u64::MAX);
    }
}
