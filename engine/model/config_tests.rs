//! Tests of `config.rs`: the golden files of both versions of transformers, round trips, and files to refuse.

use super::*;
use std::path::PathBuf;

const CONFIG: &str = "config.json";

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn parse(text: &str) -> Result<Config> {
    Config::parse(Path::new(CONFIG), text)
}

/// The golden file `name` with keys changed; a null value removes its key.
fn changed(name: &str, changes: &Value) -> String {
    let mut object = parse_object(Path::new(CONFIG), &std::fs::read_to_string(golden(name)).unwrap()).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        if value.is_null() {
            object.shift_remove(key);
        } else {
            object.insert(key.clone(), value.clone());
        }
    }
    Value::Object(object).to_string()
}

fn without_source(config: Config) -> Config {
    Config { source: Map::new(), ..config }
}

#[test]
fn golden_configurations_read_as_they_are() {
    let tied = Config::load(&golden("dense_tied")).unwrap();
    assert_eq!((tied.vocab, tied.hidden, tied.intermediate, tied.layers), (512, 64, 160, 2));
    assert_eq!((tied.heads, tied.kv_heads, tied.head_dim, tied.max_positions), (4, 2, 16, 512));
    assert_eq!((tied.rms_norm_eps, tied.rope_theta, tied.initializer_range), (1e-6, 1e6, 0.02));
    assert_eq!((tied.tied, tied.dtype, tied.bos, &tied.eos[..], tied.pad), (true, Dtype::F32, Some(1), &[2][..], None));
    assert_eq!((tied.sliding, tied.moe, tied.rope), (vec![None, None], None, RopeScaling::Default));

    let wide = Config::load(&golden("dense_bf16")).unwrap();
    assert_eq!((wide.hidden, wide.heads, wide.head_dim, wide.dtype), (64, 14, 64, Dtype::Bf16));
    assert_eq!(Config::load(&golden("dense_theta_1e7")).unwrap().rope_theta, 1e7);
    assert_eq!(Config::load(&golden("dense_sliding")).unwrap().sliding, [None, None, Some(8), Some(8)]);

    let mixed = Config::load(&golden("moe_mixed_layers")).unwrap();
    assert_eq!((0..4).map(|layer| mixed.is_sparse(layer)).collect::<Vec<_>>(), [false, true, false, false]);
    let moe = mixed.moe.unwrap();
    assert_eq!((moe.experts, moe.experts_per_token, moe.moe_intermediate, moe.shared_intermediate), (4, 2, 32, 80));
    assert_eq!((moe.norm_topk_prob, moe.sparse_step, moe.router_aux_loss_coef), (false, 2, 0.01));
    assert!(Config::load(&golden("moe_norm_true")).unwrap().moe.unwrap().norm_topk_prob);
}

#[test]
fn golden_yarn_frequencies_match() {
    let (got, scaling) = Config::load(&golden("dense_yarn")).unwrap().inv_freq();
    let expected = crate::checkpoint::safetensors::SafetensorsFile::open(&golden("dense_yarn/expected.safetensors")).unwrap();
    let want = expected.read_floats::<f32>("inv_freq").unwrap();
    assert_eq!(got.len(), want.len());
    // The tolerances of meta.json.
    assert!(got.iter().zip(&want).all(|(g, w)| (g - w).abs() <= 1e-7 + 1e-5 * w.abs()), "{got:?} against {want:?}");
    let want = expected.read_floats::<f32>("attention_factor").unwrap()[0];
    assert!((scaling - want).abs() <= 1e-6 + 1e-6 * want, "{scaling} against {want}");
}

#[test]
fn both_versions_of_a_file_mean_the_same_model() {
    for name in ["dense_tied", "dense_untied", "dense_yarn", "dense_sliding", "dense_bf16", "moe_norm_false", "moe_mixed_layers"] {
        let path = golden(&format!("config_v5/{name}.config.json"));
        let newer = Config::parse(&path, &std::fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!(without_source(newer), without_source(Config::load(&golden(name)).unwrap()), "{name}");
    }
}

#[test]
fn a_written_configuration_reads_back_and_keeps_what_it_does_not_know() {
    for name in ["dense_yarn", "dense_sliding", "dense_bf16", "moe_mixed_layers"] {
        let text = changed(&format!("{name}/config.json"), &json!({ "note": { "by": [1, 2] }, "use_cache": false }));
        let config = parse(&text).unwrap();
        let written = config.to_json();
        assert_eq!((&written["note"]["by"][1], &written["use_cache"]), (&json!(2), &json!(false)));
        let again = parse(&written.to_string()).unwrap();
        assert_eq!(without_source(again.clone()), without_source(config), "{name}");
        assert_eq!(again.to_json(), written, "{name}");
    }
    // A file that says no more than it must is written with all its own values unchanged.
    let text = std::fs::read_to_string(golden("dense_tied/config.json")).unwrap();
    let mut written = parse(&text).unwrap().to_json();
    assert_eq!(written.as_object_mut().unwrap().shift_remove("pad_token_id"), Some(Value::Null));
    assert_eq!(written, serde_json::from_str::<Value>(&text).unwrap());
}

#[test]
fn version_5_files_are_written_with_the_names_of_version_4() {
    let path = golden("config_v5/dense_yarn.config.json");
    let written = Config::parse(&path, &std::fs::read_to_string(&path).unwrap()).unwrap().to_json();
    assert!(written.get("rope_parameters").is_none() && written.get("dtype").is_none());
    assert_eq!((&written["torch_dtype"], &written["rope_theta"]), (&json!("float32"), &json!(1e4)));
    assert_eq!((&written["rope_scaling"]["rope_type"], &written["rope_scaling"]["factor"]), (&json!("yarn"), &json!(4.0)));
    assert_eq!(written["layer_types"], json!(["full_attention", "full_attention"]));
}

#[test]
fn a_window_pattern_that_is_no_suffix_is_written_as_a_list() {
    let mut config = Config::load(&golden("dense_sliding")).unwrap();
    assert!(config.to_json().get("layer_types").is_none());
    config.sliding = vec![Some(8), None, Some(8), None];
    assert_eq!(parse(&config.to_json().to_string()).unwrap().sliding, config.sliding);
    config.sliding = vec![None; 4];
    let written = config.to_json();
    assert_eq!(written["use_sliding_window"], json!(false));
    assert_eq!(parse(&written.to_string()).unwrap().sliding, config.sliding);
}

#[test]
fn absent_keys_take_the_defaults_of_transformers() {
    let dense = parse(r#"{"model_type": "qwen2"}"#).unwrap();
    assert_eq!((dense.vocab, dense.hidden, dense.intermediate, dense.layers), (151_936, 4096, 22_016, 32));
    assert_eq!((dense.heads, dense.kv_heads, dense.head_dim, dense.max_positions), (32, 32, 128, 32_768));
    assert_eq!((dense.rms_norm_eps, dense.rope_theta, dense.initializer_range, dense.tied), (1e-6, 10_000.0, 0.02, false));
    assert_eq!((dense.dtype, dense.bos, dense.eos.len(), dense.pad), (Dtype::F32, None, 0, None));
    let moe = parse(r#"{"model_type": "qwen2_moe"}"#).unwrap();
    assert_eq!((moe.hidden, moe.layers, moe.heads, moe.kv_heads, moe.intermediate), (2048, 24, 16, 16, 5632));
    let moe = moe.moe.unwrap();
    assert_eq!((moe.experts, moe.experts_per_token, moe.moe_intermediate, moe.shared_intermediate), (60, 4, 1408, 5632));
    assert_eq!((moe.norm_topk_prob, moe.sparse_step, moe.router_aux_loss_coef), (false, 1, 0.001));
    // null kv heads mean one for each head.
    let text = r#"{"model_type": "qwen2", "num_attention_heads": 8, "num_key_value_heads": null}"#;
    assert_eq!(parse(text).unwrap().kv_heads, 8);
    // On, with nothing else said: 4096 tokens from layer 28 on.
    let sliding = parse(r#"{"model_type": "qwen2", "use_sliding_window": true}"#).unwrap().sliding;
    assert_eq!((sliding[27], sliding[28], sliding.len()), (None, Some(4096), 32));
}

#[test]
fn inert_and_old_forms_are_read() {
    // Trap 7: the number means nothing while the switch is off.
    let text = changed("dense_tied/config.json", &json!({ "sliding_window": 131_072, "max_window_layers": 70 }));
    assert_eq!(parse(&text).unwrap().sliding, [None, None]);
    let text = changed("dense_tied/config.json", &json!({ "eos_token_id": [5, 6], "torch_dtype": "torch.float16" }));
    let config = parse(&text).unwrap();
    assert_eq!((&config.eos[..], config.dtype), (&[5, 6][..], Dtype::F32));
    // Trap 12: the trained length stays what the object says, though the limit was edited.
    let scaling = json!({ "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768 });
    let text = changed("dense_tied/config.json", &json!({ "max_position_embeddings": 131_072, "rope_scaling": scaling }));
    assert_eq!(parse(&text).unwrap().rope, RopeScaling::Yarn(crate::model::rope_scaling::Yarn::new(4.0, 32_768)));
    let text = changed("dense_tied/config.json", &json!({ "rope_scaling": { "type": "yarn", "factor": 4 } }));
    assert_eq!(parse(&text).unwrap().rope, RopeScaling::Yarn(crate::model::rope_scaling::Yarn::new(4.0, 512)));
}

#[test]
fn configurations_that_cannot_be_meant_are_refused() {
    // (changes to a sound file, the place and a part of the message)
    let cases = [
        (json!({ "model_type": "llama" }), "model_type: expected \"qwen2\" or \"qwen2_moe\", found \"llama\""),
        (json!({ "model_type": "qwen3" }), "found \"qwen3\""),
        (json!({ "model_type": 2 }), "model_type: expected a string, found 2"),
        (json!({ "model_type": null }), "model_type: expected \"qwen2\" or \"qwen2_moe\", found no such key"),
        (json!({ "hidden_act": "gelu" }), "hidden_act: expected \"silu\", found \"gelu\""),
        (json!({ "qkv_bias": false }), "qkv_bias"),
        (json!({ "attention_dropout": 0.1 }), "set it to 0.0"),
        (json!({ "quantization_config": { "quant_method": "gptq", "bits": 4 } }), "quantised checkpoint (gptq) is not supported"),
        (json!({ "quantization_config": { "quant_method": "awq" } }), "use the unquantised checkpoint"),
        (json!({ "quantization_config": 4 }), "quantization_config: expected an object"),
        (json!({ "dual_chunk_attention_config": { "chunk_size": 262_144 } }), "remove the key from config.json"),
        (json!({ "vocab_size": 0 }), "vocab_size: expected a whole number from 1 to 16777216, found 0"),
        (json!({ "vocab_size": "512" }), "vocab_size: expected a whole number from 1 to 16777216, found \"512\""),
        (json!({ "vocab_size": 512.5 }), "found 512.5"),
        (json!({ "vocab_size": -1 }), "found -1"),
        (json!({ "vocab_size": 1u64 << 40 }), "vocab_size"),
        (json!({ "hidden_size": 0 }), "hidden_size"),
        (json!({ "hidden_size": 66 }), "hidden_size: expected a multiple of num_attention_heads, 4, found 66"),
        (json!({ "hidden_size": 1u64 << 60 }), "hidden_size"),
        (json!({ "hidden_size": [64] }), "hidden_size: expected a whole number from 1 to 131072, found [64]"),
        (json!({ "intermediate_size": 0 }), "intermediate_size"),
        (json!({ "num_hidden_layers": 0 }), "num_hidden_layers"),
        (json!({ "num_hidden_layers": 1_000_000 }), "num_hidden_layers: expected a whole number from 1 to 1024"),
        (json!({ "num_attention_heads": 0 }), "num_attention_heads"),
        (json!({ "num_attention_heads": true }), "num_attention_heads"),
        (json!({ "num_key_value_heads": 0 }), "num_key_value_heads"),
        (json!({ "num_key_value_heads": 3 }), "num_key_value_heads: expected a divisor of num_attention_heads, 4, found 3"),
        (json!({ "num_key_value_heads": 8 }), "num_key_value_heads"),
        (json!({ "head_dim": 0 }), "head_dim"),
        (json!({ "head_dim": 17 }), "head_dim: expected an even number"),
        (json!({ "hidden_size": 60 }), "head_dim: expected an even number, since rotation pairs its halves, found 15"),
        (json!({ "max_position_embeddings": 0 }), "max_position_embeddings"),
        (json!({ "rms_norm_eps": 0 }), "rms_norm_eps"),
        (json!({ "rms_norm_eps": -1e-6 }), "rms_norm_eps"),
        (json!({ "rms_norm_eps": 1e-60 }), "rms_norm_eps"),
        (json!({ "rms_norm_eps": "1e-6" }), "rms_norm_eps"),
        (json!({ "initializer_range": -0.02 }), "initializer_range"),
        (json!({ "tie_word_embeddings": "true" }), "tie_word_embeddings: expected true or false, found \"true\""),
        (json!({ "tie_word_embeddings": 1 }), "tie_word_embeddings"),
        (json!({ "torch_dtype": "int8" }), "torch_dtype: expected \"bfloat16\", \"float32\" or \"float16\", found \"int8\""),
        (json!({ "dtype": "float64" }), "dtype"),
        (json!({ "eos_token_id": -1 }), "eos_token_id"),
        (json!({ "eos_token_id": ["a"] }), "eos_token_id: expected a list of whole numbers"),
        (json!({ "bos_token_id": 1u64 << 40 }), "bos_token_id"),
        (json!({ "pad_token_id": 1.5 }), "pad_token_id"),
        (json!({ "rope_theta": 0 }), "rope_theta"),
        (json!({ "rope_theta": 1 }), "rope_theta"),
        (json!({ "rope_theta": "1e6" }), "rope_theta"),
        (json!({ "rope_scaling": 4 }), "rope_scaling: expected an object, found 4"),
        (json!({ "rope_scaling": {} }), "rope_scaling.rope_type: expected one of"),
        (json!({ "rope_scaling": { "type": "ntk" } }), "rope_scaling.type: expected one of"),
        (json!({ "rope_scaling": { "rope_type": "yarn", "type": "linear" } }), "rope_scaling.type: expected \"yarn\", as rope_type says"),
        (json!({ "rope_scaling": { "rope_type": "dynamic", "factor": 2.0 } }), "change with the length of the text"),
        (json!({ "rope_scaling": { "rope_type": "longrope" } }), "is not supported; use {\"rope_type\": \"yarn\""),
        (json!({ "rope_scaling": { "rope_type": "linear" } }), "rope_scaling.factor: expected a number, found no such key"),
        (json!({ "rope_scaling": { "rope_type": "linear", "factor": 0.5 } }), "rope_scaling.factor"),
        (json!({ "rope_scaling": { "rope_type": "yarn", "factor": "4" } }), "rope_scaling.factor"),
        (json!({ "rope_scaling": { "rope_type": "yarn", "beta_fast": 1, "beta_slow": 2 } }), "rope_scaling.beta_fast"),
        (json!({ "rope_scaling": { "rope_type": "yarn", "original_max_position_embeddings": 0 } }), "original_max_position_embeddings"),
        (json!({ "rope_scaling": { "rope_type": "yarn", "attention_factor": 0 } }), "rope_scaling.attention_factor"),
        (json!({ "rope_scaling": { "rope_type": "llama3", "factor": 8 } }), "rope_scaling.low_freq_factor"),
        (
            json!({ "rope_parameters": { "rope_theta": 5.0, "rope_type": "default" } }),
            "rope_parameters.rope_theta: expected 1000000, as rope_theta says, found 5",
        ),
        (json!({ "rope_parameters": { "full_attention": { "rope_type": "default" } } }), "rope_parameters.rope_type"),
        (json!({ "use_sliding_window": true, "sliding_window": 0 }), "sliding_window"),
        (json!({ "use_sliding_window": "yes" }), "use_sliding_window"),
        (json!({ "max_window_layers": -1 }), "max_window_layers"),
        (json!({ "layer_types": ["full_attention"] }), "layer_types: expected one for each of 2 layers, found 1 of them"),
        (json!({ "layer_types": "full_attention" }), "layer_types: expected a list"),
        (json!({ "layer_types": ["full_attention", "linear_attention"] }), "found \"linear_attention\""),
        (json!({ "layer_types": ["full_attention", "sliding_attention"] }), "use_sliding_window and sliding_window to be set"),
    ];
    for (changes, wanted) in cases {
        let message = parse(&changed("dense_tied/config.json", &changes)).expect_err(wanted).to_string();
        assert!(message.contains(CONFIG) && message.contains(wanted), "{message}\nlacks {wanted}");
    }
    let cases = [
        (json!({ "num_experts": 0 }), "num_experts"),
        (json!({ "num_experts": 1 << 20 }), "num_experts: expected a whole number from 1 to 1024"),
        (json!({ "num_experts_per_tok": 0 }), "num_experts_per_tok"),
        (json!({ "num_experts_per_tok": 9 }), "num_experts_per_tok: expected at most num_experts, 4, found 9"),
        (json!({ "moe_intermediate_size": 0 }), "moe_intermediate_size"),
        (json!({ "shared_expert_intermediate_size": 0 }), "shared_expert_intermediate_size"),
        (json!({ "decoder_sparse_step": 0 }), "decoder_sparse_step"),
        (json!({ "mlp_only_layers": [4] }), "mlp_only_layers: expected layers below num_hidden_layers, 4, found 4"),
        (json!({ "mlp_only_layers": 3 }), "mlp_only_layers: expected a list of whole numbers"),
        (json!({ "norm_topk_prob": 1 }), "norm_topk_prob"),
        (json!({ "router_aux_loss_coef": -1 }), "router_aux_loss_coef"),
    ];
    for (changes, wanted) in cases {
        let message = parse(&changed("moe_mixed_layers/config.json", &changes)).expect_err(wanted).to_string();
        assert!(message.contains(CONFIG) && message.contains(wanted), "{message}\nlacks {wanted}");
    }
    for (text, wanted) in [
        ("", "EOF"),
        ("[]", "expected a JSON object, found []"),
        ("null", "expected a JSON object, found null"),
        ("{\"vocab_size\": NaN}", "expected a JSON object"),
        ("{\"vocab_size\": 1e999}", "number out of range"),
        ("{\"model_type\": \"qwen2\"", "EOF"),
    ] {
        let message = parse(text).expect_err(wanted).to_string();
        assert!(message.contains(wanted), "{message}\nlacks {wanted}");
    }
}

/// Damages sound files in thousands of ways: each is refused, or is a configuration that can be used and written.
#[test]
fn random_damage_never_panics() {
    let texts = ["dense_yarn", "dense_sliding", "moe_mixed_layers"].map(|name| std::fs::read(golden(name).join(CONFIG)).unwrap());
    let digits = b"0123456789-.[]{}\",:eEtrufalsn";
    let seed = 20_240_919u64;
    let mut state = seed;
    // SplitMix64, Steele et al. 2014.
    let mut random = |below: usize| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % below as u64) as usize
    };
    let (mut read, mut refused) = (0, 0);
    for round in 0..10_000 {
        let mut bytes = texts[round % texts.len()].clone();
        for _ in 0..1 + random(3) {
            let at = random(bytes.len());
            match random(4) {
                0 => {
                    bytes.remove(at);
                }
                1 => bytes[at] = digits[random(digits.len())],
                // Only digits, so that many files still read.
                2 => bytes.insert(at, digits[random(10)]),
                _ => bytes.insert(at, digits[random(digits.len())]),
            }
        }
        match parse(&String::from_utf8_lossy(&bytes)) {
            Ok(config) => {
                read += 1;
                assert!(config.inv_freq().0.iter().all(|f| f.is_finite()), "seed {seed} round {round}");
                let again = parse(&config.to_json().to_string()).unwrap_or_else(|e| panic!("seed {seed} round {round}: {e}"));
                // Not all of it: serde_json may read a number of many digits one bit off what it wrote.
                let parameters = crate::model::sizes::parameters;
                assert_eq!(parameters(&again), parameters(&config), "seed {seed} round {round}");
                assert_eq!((again.sliding, again.eos), (config.sliding, config.eos), "seed {seed} round {round}");
            }
            Err(Error::Format { .. } | Error::Unsupported { .. }) => refused += 1,
            Err(other) => panic!("seed {seed} round {round}: {other}"),
        }
    }
    assert!(read > 500 && refused > 500, "{read} read, {refused} refused");
}
