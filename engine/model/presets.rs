//! Models by name, and any other by a table of fields over one of them. A preset has the shape of a published model, not
//! its weights: a checkpoint's own `config.json` is what counts when it is loaded (`config.rs`).
//! Source: qwen2.5.md sections 1.1 and 2.3, the base models' files; the bench shapes are this engine's own.

use super::config::{Config, MoeConfig};
use super::rope_scaling::RopeScaling;
use crate::error::{Error, Result};
use crate::kernels::element::Dtype;
use serde_json::{Map, Value};
use std::path::Path;

/// Name, vocab, hidden, intermediate, layers, heads, kv_heads, tied, max_positions, rms_norm_eps.
type Row = (&'static str, usize, usize, usize, usize, usize, usize, bool, usize, f64);

/// Base models: instruct models have 32768 positions in their files, and 1e-6 in every size (trap 6 of the reference).
const ROWS: [Row; 13] = [
    ("0.5B", 151_936, 896, 4864, 24, 14, 2, true, 32_768, 1e-6),
    ("1.5B", 151_936, 1536, 8960, 28, 12, 2, true, 131_072, 1e-6),
    ("3B", 151_936, 2048, 11_008, 36, 16, 2, true, 32_768, 1e-6),
    ("7B", 152_064, 3584, 18_944, 28, 28, 4, false, 131_072, 1e-6),
    ("14B", 152_064, 5120, 13_824, 48, 40, 8, false, 131_072, 1e-5),
    ("32B", 152_064, 5120, 27_648, 64, 40, 8, false, 131_072, 1e-5),
    ("72B", 152_064, 8192, 29_568, 80, 64, 8, false, 131_072, 1e-5),
    ("Qwen1.5-MoE-A2.7B", 151_936, 2048, 5632, 24, 16, 16, false, 8192, 1e-6),
    ("Qwen2-57B-A14B", 151_936, 3584, 18_944, 28, 28, 4, false, 131_072, 1e-6),
    ("tiny", 4096, 256, 704, 4, 4, 2, true, 8192, 1e-6),
    ("small", 8192, 512, 1408, 8, 8, 2, true, 8192, 1e-6),
    ("q05x4", 151_936, 896, 4864, 4, 14, 2, true, 8192, 1e-6),
    ("q05", 151_936, 896, 4864, 24, 14, 2, true, 8192, 1e-6),
];

/// `<|endoftext|>`, which begins and ends the text of base models.
const END_OF_TEXT: u32 = 151_643;

/// The names that [`preset`] knows, published sizes first.
pub fn names() -> impl Iterator<Item = &'static str> {
    ROWS.iter().map(|row| row.0)
}

/// The configuration of that name. Published sizes are bf16 and end with token 151643; the bench shapes are f32 and have
/// no special tokens.
///
/// Errors: [`Error::Argument`] with the known names.
pub fn preset(name: &str) -> Result<Config> {
    let row = ROWS.iter().find(|row| row.0.eq_ignore_ascii_case(name.strip_prefix("Qwen2.5-").unwrap_or(name)));
    let Some(&(name, vocab, hidden, intermediate, layers, heads, kv_heads, tied, max_positions, rms_norm_eps)) = row else {
        let known = names().collect::<Vec<_>>().join(", ");
        return Err(Error::argument("model config", "preset", format!("one of {known}"), format!("{name:?}")));
    };
    let moe = |experts, experts_per_token, moe_intermediate, shared_intermediate| MoeConfig {
        experts,
        experts_per_token,
        moe_intermediate,
        shared_intermediate,
        norm_topk_prob: false,
        sparse_step: 1,
        mlp_only_layers: Vec::new(),
        router_aux_loss_coef: 0.001,
    };
    let bench = matches!(name, "tiny" | "small" | "q05x4" | "q05");
    Ok(Config {
        vocab,
        hidden,
        intermediate,
        layers,
        heads,
        kv_heads,
        head_dim: hidden / heads,
        rms_norm_eps,
        rope_theta: 1e6,
        rope: RopeScaling::Default,
        max_positions,
        tied,
        score: false,
        sliding: vec![None; layers],
        initializer_range: 0.02,
        moe: match name {
            "Qwen1.5-MoE-A2.7B" => Some(moe(60, 4, 1408, 5632)),
            "Qwen2-57B-A14B" => Some(moe(64, 8, 2560, 20_480)),
            _ => None,
        },
        dtype: if bench { Dtype::F32 } else { Dtype::Bf16 },
        bos: (!bench).then_some(END_OF_TEXT),
        eos: if bench { Vec::new() } else { vec![END_OF_TEXT] },
        pad: None,
        source: Map::new(),
    })
}

/// The keys of [`with_fields`], each with its key in `config.json`, under which its value is checked.
const KEYS: [(&str, &str); 19] = [
    ("vocab", "vocab_size"),
    ("hidden", "hidden_size"),
    ("intermediate", "intermediate_size"),
    ("layers", "num_hidden_layers"),
    ("heads", "num_attention_heads"),
    ("kv_heads", "num_key_value_heads"),
    ("head_dim", "head_dim"),
    ("rms_norm_eps", "rms_norm_eps"),
    ("rope_theta", "rope_theta"),
    ("rope_scaling", "rope_scaling"),
    ("max_positions", "max_position_embeddings"),
    ("tied", "tie_word_embeddings"),
    ("initializer_range", "initializer_range"),
    ("dtype", "torch_dtype"),
    ("bos", "bos_token_id"),
    ("eos", "eos_token_id"),
    ("pad", "pad_token_id"),
    ("sliding_window", "sliding_window"),
    ("sliding_from_layer", "max_window_layers"),
];

/// As [`KEYS`], for models with experts. The first four have no default.
const MOE_KEYS: [(&str, &str); 8] = [
    ("experts", "num_experts"),
    ("experts_per_token", "num_experts_per_tok"),
    ("moe_intermediate", "moe_intermediate_size"),
    ("shared_intermediate", "shared_expert_intermediate_size"),
    ("norm_topk_prob", "norm_topk_prob"),
    ("sparse_step", "decoder_sparse_step"),
    ("mlp_only_layers", "mlp_only_layers"),
    ("router_aux_loss_coef", "router_aux_loss_coef"),
];

fn all_keys() -> impl Iterator<Item = &'static (&'static str, &'static str)> {
    KEYS.iter().chain(&MOE_KEYS)
}

/// `base` with some fields changed, for example `layers` = 4; null resets a field to its default.
///
/// - `fields`: names of [`Config`] and [`MoeConfig`]; `rope_scaling` as in `config.json`; `sliding_window` switches the
///   window on, from layer `sliding_from_layer` (0) on; any of the expert fields makes a dense base sparse, and then
///   `experts`, `experts_per_token`, `moe_intermediate` and `shared_intermediate` must all be given
/// - when `hidden` or `heads` changes and `head_dim` is not given, it becomes `hidden / heads`
///
/// Errors: [`Error::Argument`] for an unknown key, with the known ones, or a wrong value.
pub fn with_fields(base: &Config, fields: &[(String, Value)]) -> Result<Config> {
    const OP: &str = "model config";
    let given = |ours: &str| fields.iter().any(|(key, value)| key == ours && !value.is_null());
    let mut object = base.to_json().as_object().expect("a configuration is written as an object").clone();
    // `layers` may change, and with it what a list by layer or an inert limit means.
    object.shift_remove("layer_types");
    if MOE_KEYS.iter().any(|(ours, _)| given(ours)) && base.moe.is_none() {
        for (ours, _) in &MOE_KEYS[..4] {
            if !given(ours) {
                return Err(Error::argument(OP, *ours, "given with the other fields of a model with experts", "nothing"));
            }
        }
        object.insert("model_type".into(), "qwen2_moe".into());
    }
    let uneven = !base.sliding.iter().skip_while(|window| window.is_none()).all(Option::is_some);
    if uneven && given("layers") {
        return Err(Error::argument(OP, "layers", "a base whose sliding layers are all its upper ones", "another pattern"));
    }
    if given("sliding_window") {
        object.insert("use_sliding_window".into(), true.into());
        if base.sliding.iter().all(Option::is_none) {
            object.insert("max_window_layers".into(), 0.into());
        }
    } else if given("sliding_from_layer") && base.sliding.iter().all(Option::is_none) {
        return Err(Error::argument(OP, "sliding_window", "given with sliding_from_layer", "nothing"));
    } else if fields.iter().any(|(key, _)| key == "sliding_window") {
        object.insert("use_sliding_window".into(), false.into());
    }
    if (given("hidden") || given("heads")) && !given("head_dim") {
        object.shift_remove("head_dim");
    }
    for (index, (key, value)) in fields.iter().enumerate() {
        let Some((_, theirs)) = all_keys().find(|(ours, _)| ours == key) else {
            let known = all_keys().map(|(ours, _)| *ours).collect::<Vec<_>>().join(", ");
            return Err(Error::argument(OP, key, format!("one of {known}"), "an unknown field"));
        };
        if fields[..index].iter().any(|(earlier, _)| earlier == key) {
            return Err(Error::argument(OP, key, "each field once", "it twice"));
        }
        let value = match (key.as_str(), value.as_str()) {
            // Scripts say bf16 and f32.
            ("dtype", Some(name)) => match Dtype::parse(name) {
                Some(Dtype::Bf16) => "bfloat16".into(),
                Some(Dtype::F32) => "float32".into(),
                _ => return Err(Error::argument(OP, key, "\"bf16\" or \"f32\"", format!("{name:?}"))),
            },
            _ => value.clone(),
        };
        object.insert((*theirs).to_owned(), value);
    }
    let text = Value::Object(object).to_string();
    let mut config = Config::parse(Path::new(OP), &text).map_err(in_our_words)?;
    if uneven && !fields.iter().any(|(key, _)| key.starts_with("sliding")) {
        config.sliding.clone_from(&base.sliding);
    }
    config.source.clone_from(&base.source);
    Ok(config)
}

/// An error of `config.json` as one of a table of fields: our names for its keys.
fn in_our_words(error: Error) -> Error {
    match error {
        Error::Format { place, expected, found, .. } => {
            // The longest first, since num_experts is a part of num_experts_per_tok.
            let mut keys: Vec<_> = all_keys().collect();
            keys.sort_by_key(|(_, theirs)| std::cmp::Reverse(theirs.len()));
            let rename = |text: String| match keys.iter().find(|(_, theirs)| text.contains(theirs)) {
                Some((ours, theirs)) => text.replace(theirs, ours),
                None => text,
            };
            Error::Argument { op: "model config", arg: rename(place), expected: rename(expected), got: found }
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn changed(base: &str, fields: &Value) -> Result<Config> {
        let fields: Vec<_> = fields.as_object().unwrap().clone().into_iter().collect();
        with_fields(&preset(base).unwrap(), &fields)
    }

    #[test]
    fn every_preset_is_sound_and_survives_its_own_config_json() {
        for name in names() {
            let config = preset(name).unwrap();
            config.check(Path::new(name)).unwrap();
            let written = config.to_json();
            let again = Config::parse(Path::new(name), &written.to_string()).unwrap();
            assert_eq!(Config { source: Map::new(), ..again }, config, "{name}");
            assert_eq!(with_fields(&config, &[]).unwrap(), config, "{name}");
        }
        assert_eq!(preset("Qwen2.5-7B").unwrap(), preset("7b").unwrap());
        let message = preset("8B").unwrap_err().to_string();
        assert!(message.contains("0.5B, 1.5B") && message.contains("q05x4") && message.contains("\"8B\""), "{message}");
    }

    #[test]
    fn bench_shapes_have_their_published_counts() {
        // 4.0M, 26.8M, 196M and 494M parameters.
        for (name, millions) in [("tiny", 4.0), ("small", 26.8), ("q05x4", 196.0), ("q05", 494.0)] {
            let total = super::super::sizes::parameters(&preset(name).unwrap()).total as f64 / 1e6;
            assert!((total - millions).abs() < 0.06f64.max(millions * 2e-3), "{name}: {total}");
        }
    }

    #[test]
    fn fields_change_a_base() {
        let config = changed("0.5B", &json!({ "layers": 4, "vocab": 1000, "dtype": "f32", "max_positions": 256 })).unwrap();
        assert_eq!((config.layers, config.vocab, config.dtype, config.max_positions), (4, 1000, Dtype::F32, 256));
        assert_eq!((config.sliding.len(), config.hidden, config.head_dim, config.tied), (4, 896, 64, true));
        // head_dim follows hidden and heads unless it is given.
        let config = changed("tiny", &json!({ "hidden": 96, "heads": 6 })).unwrap();
        assert_eq!((config.hidden, config.heads, config.head_dim), (96, 6, 16));
        let config = changed("tiny", &json!({ "hidden": 100, "head_dim": 32 })).unwrap();
        assert_eq!((config.hidden, config.heads, config.head_dim), (100, 4, 32));
        let again = with_fields(&config, &[("layers".into(), json!(2))]).unwrap();
        assert_eq!((again.head_dim, again.layers), (32, 2));
        let config = changed("tiny", &json!({ "sliding_window": 16, "sliding_from_layer": 3 })).unwrap();
        assert_eq!(config.sliding, [None, None, None, Some(16)]);
        let config = with_fields(&config, &[("sliding_window".into(), json!(8))]).unwrap();
        assert_eq!(config.sliding, [None, None, None, Some(8)]);
        assert_eq!(with_fields(&config, &[("sliding_window".into(), Value::Null)]).unwrap().sliding, [None; 4]);
        assert_eq!(changed("tiny", &json!({ "sliding_window": 16 })).unwrap().sliding, [Some(16); 4]);
        let scaling = json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32 });
        let config = changed("tiny", &json!({ "rope_scaling": scaling })).unwrap();
        assert_eq!(config.rope, RopeScaling::Yarn(super::super::rope_scaling::Yarn::new(4.0, 32)));
    }

    #[test]
    fn a_dense_base_becomes_sparse_when_all_four_sizes_are_given() {
        let fields = json!({ "experts": 8, "experts_per_token": 2, "moe_intermediate": 64, "shared_intermediate": 128, "sparse_step": 2 });
        let config = changed("tiny", &fields).unwrap();
        let moe = config.moe.clone().unwrap();
        assert_eq!((moe.experts, moe.experts_per_token, moe.moe_intermediate, moe.shared_intermediate), (8, 2, 64, 128));
        assert_eq!((moe.norm_topk_prob, moe.router_aux_loss_coef, config.intermediate), (false, 0.001, 704));
        assert_eq!((0..4).map(|layer| config.is_sparse(layer)).collect::<Vec<_>>(), [false, true, false, true]);
        let message = changed("tiny", &json!({ "experts": 8 })).unwrap_err().to_string();
        assert!(message.contains("experts_per_token"), "{message}");
    }

    #[test]
    fn wrong_fields_are_refused_in_our_words() {
        for (fields, wanted) in [
            (json!({ "layer": 4 }), "`layer` should be one of vocab, hidden"),
            (json!({ "num_hidden_layers": 4 }), "an unknown field"),
            (json!({ "layers": 0 }), "`layers` should be a whole number from 1 to 1024, got 0"),
            (json!({ "vocab": "many" }), "`vocab` should be a whole number"),
            (json!({ "kv_heads": 3 }), "`kv_heads` should be a divisor of heads, 4, got 3"),
            (json!({ "hidden": 255 }), "`hidden` should be a multiple of heads, 4, got 255"),
            (json!({ "dtype": "f16" }), "`dtype` should be \"bf16\" or \"f32\""),
            (json!({ "dtype": 16 }), "`dtype`"),
            (json!({ "sliding_from_layer": 2 }), "`sliding_window` should be given"),
            (json!({ "rope_scaling": { "rope_type": "ntk" } }), "rope_scaling.rope_type"),
        ] {
            let message = changed("tiny", &fields).expect_err(wanted).to_string();
            assert!(message.contains(wanted), "{message}\nlacks {wanted}");
        }
        let message = changed("Qwen2-57B-A14B", &json!({ "experts_per_token": 65 })).unwrap_err().to_string();
        assert!(message.contains("`experts_per_token` should be at most experts, 64, got 65"), "{message}");
        let twice = [("layers".to_owned(), json!(1)), ("layers".to_owned(), json!(2))];
        assert!(with_fields(&preset("tiny").unwrap(), &twice).unwrap_err().to_string().contains("twice"));
    }
}
