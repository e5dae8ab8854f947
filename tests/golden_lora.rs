//! Adapters against PEFT: logits of the base, with the adapter and merged; the loss and the gradient of every factor; folders
//! there and back; and steps of AdamW. Numbers are those of tests/golden/lora and its siblings: plain, with DoRA, and on embedding
//! and head.

mod fixtures;

use fixtures::{Batch, Golden, clear_gradients, gradient, targets};
use perilune::checkpoint::safetensors::SafetensorsFile;
use perilune::error::Error;
use perilune::kernels::buffer::Buffer;
use perilune::kernels::element::Dtype;
use perilune::model::sizes::AdapterSize;
use perilune::model::{Lora, Model};
use perilune::tensor::AnyTensor;
use perilune::train::optimizer::{AdamW, Settings};
use std::path::Path;

const NAMES: [&str; 8] =
    ["lora", "lora_moe", "lora_rslora_qv", "lora_dora", "lora_dora_moe", "lora_dora_head", "lora_embedding", "lora_embedding_tied"];

fn adapted(golden: &Golden, dtype: Dtype) -> Model {
    let model = golden.model(dtype);
    model.load_adapter(golden.folder(), true, &mut |remark| panic!("an odd adapter: {remark}")).unwrap();
    model
}

#[test]
fn an_adapter_gives_the_reference_numbers_at_run_time_and_merged() {
    for name in NAMES {
        let golden = Golden::open(name);
        let batch = Batch::new(&golden.integer_rows("input_ids"));
        let logits = |model: &Model| model.logits(&batch.packed()).unwrap().values().to_vec();
        golden.check("logits_base", &logits(&golden.model(Dtype::F32)));
        let model = adapted(&golden, Dtype::F32);
        let at_run_time = logits(&model);
        golden.check("logits_adapter", &at_run_time);
        golden.check("logits_base", &logits(&model.base().unwrap()));

        if name == "lora_embedding_tied" {
            let error = model.merge().unwrap_err().to_string();
            assert!(error.contains("save the model") && !model.is_merged() && logits(&model) == at_run_time, "{error}");
            continue;
        }
        let before: Vec<Vec<f32>> = model.tensors().iter().map(|(name, _)| model.value(name).unwrap().to_f32_vec()).collect();
        model.merge().unwrap();
        golden.check("logits_merged", &logits(&model));
        for tensor in golden.names("merged.") {
            golden.check(&format!("merged.{tensor}"), &model.value(&tensor).unwrap().to_f32_vec());
        }
        model.unmerge().unwrap();
        for ((name, _), before) in model.tensors().iter().zip(&before) {
            assert!(model.value(name).unwrap().to_f32_vec() == *before, "{name} is not what it was");
        }
        assert!(logits(&model) == at_run_time);
    }
}

#[test]
fn the_loss_and_every_gradient_of_an_adapter_follow_the_reference() {
    for name in NAMES {
        let golden = Golden::open(name);
        let batch = Batch::new(&golden.integer_rows("input_ids"));
        let labels = batch.shift(&golden.integers("labels"));
        let model = adapted(&golden, Dtype::F32);
        let factors: Vec<String> = model.tensors().into_iter().map(|(name, _)| name).filter(|name| name.contains(".lora_")).collect();
        for recompute in [false, true] {
            model.set_recompute(recompute);
            clear_gradients(&model);
            let loss = model.cross_entropy(&batch.packed(), &labels, targets(&labels) as f32, 0.0).unwrap();
            loss.total.backward().unwrap();
            golden.check("loss", loss.total.values());
            let mut expected = golden.names("grad.");
            for factor in &factors {
                golden.check(&format!("grad.{factor}"), &gradient(&model, factor));
                expected.retain(|name| name != factor);
            }
            assert!(expected.is_empty(), "{name}: no factor for {expected:?}");
            let frozen: Vec<String> = model.tensors().into_iter().map(|(name, _)| name).filter(|name| !name.contains(".lora_")).collect();
            assert!(frozen.iter().all(|name| model.gradient(name).unwrap().is_none()), "{name}: a frozen weight has a gradient");
        }
    }
}

#[test]
fn steps_of_adamw_follow_the_reference() {
    for name in NAMES.into_iter().filter(|name| Golden::open(name).has("losses")) {
        let golden = Golden::open(name);
        let batch = Batch::new(&golden.integer_rows("input_ids"));
        let labels = batch.shift(&golden.integers("labels"));
        let model = adapted(&golden, Dtype::F32);
        let number = |key: &str| golden.meta["params"]["optimizer"][key].as_f64().unwrap();
        let (lr, weight_decay) = (number("lr"), number("weight_decay"));
        let settings =
            Settings { lr, betas: (0.9, 0.95), eps: 1e-8, weight_decay, decay_vectors: false, clip_norm: None, ..Settings::default() };
        let mut optimizer = AdamW::new(model.parameters(), settings).unwrap();
        let step = |_| {
            let loss = model.cross_entropy(&batch.packed(), &labels, targets(&labels) as f32, 0.0).unwrap().total;
            loss.backward().unwrap();
            assert!(optimizer.step().unwrap().applied);
            loss.values()[0]
        };
        let losses: Vec<f32> = (0..golden.floats("losses").len()).map(step).collect();
        golden.check("losses", &losses);
        for tensor in golden.names("final.") {
            golden.check(&format!("final.{tensor}"), &model.value(&tensor).unwrap().to_f32_vec());
        }
    }
}

/// bf16 keeps 8 bits: logits up to 16 are off by a few hundredths a layer, and losses by what training in bf16 is off.
#[test]
fn an_adapter_in_bf16_stays_near_f32() {
    for name in NAMES {
        let golden = Golden::open(name);
        let batch = Batch::new(&golden.integer_rows("input_ids"));
        let labels = batch.shift(&golden.integers("labels"));
        let model = adapted(&golden, Dtype::Bf16);
        let loss = model.cross_entropy(&batch.packed(), &labels, targets(&labels) as f32, 0.0).unwrap().total;
        // The largest relative difference measured is 0.2 %; the bound is five times that.
        fixtures::check(&format!("{name}/loss in bf16"), loss.values(), &golden.floats("loss"), 0.0, 0.01);
    }
}

/// Tensors of a PEFT folder, without the copies of embedding and head that PEFT writes beside adapters of theirs.
fn tensors(folder: &Path) -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let file = SafetensorsFile::open(&folder.join("adapter_model.safetensors")).unwrap();
    let mut all: Vec<_> =
        file.tensors().iter().map(|tensor| (tensor.name.clone(), tensor.shape.clone(), file.read_floats(&tensor.name).unwrap())).collect();
    all.retain(|(name, ..)| !name.ends_with(".base_layer.weight"));
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

#[test]
fn a_folder_is_written_as_it_was_read_and_a_saved_model_has_the_adapter_in_its_weights() {
    for name in NAMES {
        let golden = Golden::open(name);
        let batch = Batch::new(&golden.integer_rows("input_ids"));
        let model = adapted(&golden, Dtype::F32);
        let place = tempfile::tempdir().unwrap();
        model.save_adapter(&place.path().join("adapter"), None, Some("base")).unwrap();
        assert!(tensors(&place.path().join("adapter")) == tensors(golden.folder()), "{name}");
        let json = |folder: &Path| -> serde_json::Value {
            serde_json::from_str(&std::fs::read_to_string(folder.join("adapter_config.json")).unwrap()).unwrap()
        };
        let (written, read) = (json(&place.path().join("adapter")), json(golden.folder()));
        for key in ["r", "lora_alpha", "use_rslora", "target_modules", "modules_to_save", "bias", "peft_type", "task_type", "use_dora"] {
            assert_eq!(written[key], read[key], "{name}: {key}");
        }
        let before = model.version();
        model.save(&place.path().join("merged"), None, &[]).unwrap();
        assert_eq!(model.version(), before, "saving changes nothing");
        let merged = fixtures::load(&place.path().join("merged"), Dtype::F32);
        assert!(merged.adapter().is_none());
        // Where embedding and head are one matrix, PEFT merges the part of one into both; two are saved here.
        let (logits, is_tied) = (merged.logits(&batch.packed()).unwrap(), name == "lora_embedding_tied");
        golden.check(if is_tied { "logits_adapter" } else { "logits_merged" }, logits.values());
        assert_eq!(merged.config().tied, model.config().tied && !is_tied, "{name}");
    }
}

fn lora(targets: &[&str]) -> Lora {
    let targets = targets.iter().map(|target| target.to_string()).collect();
    Lora { rank: 4, alpha: 8.0, targets, ..Lora::default() }
}

/// A new adapter changes nothing until it is trained; then all targets of a mixture of experts, routers and experts included,
/// take part, and nothing else does.
#[test]
fn a_new_adapter_begins_as_its_base_and_only_it_trains() {
    let cases = [("dense_tied", Dtype::F32), ("moe_mixed_layers", Dtype::F32), ("moe_norm_true", Dtype::Bf16)];
    for ((name, dtype), dora) in cases.into_iter().flat_map(|case| [(case, false), (case, true)]) {
        let golden = Golden::open(name);
        let batch = Batch::new(&golden.integer_rows("input_ids"));
        let labels = batch.next_tokens();
        let model = golden.model(dtype);
        let plain = model.logits(&batch.packed()).unwrap().values().to_vec();
        let count = model.count();
        let modules: &[&str] = if dora { &["all-linear", "lm_head"] } else { &["all-linear", "lm_head", "embed_tokens"] };
        model.adapt(Lora { dora, ..lora(modules) }, 5).unwrap();
        // What products read; the masters of frozen bf16 weights are dropped with the freezing.
        let base: Vec<(String, Vec<f32>)> =
            model.tensors().into_iter().map(|(name, _)| (name.clone(), model.value(&name).unwrap().to_f32_vec())).collect();
        assert!(model.logits(&batch.packed()).unwrap().values() == plain, "{name}: B is zero");
        assert_eq!(model.trainable(), model.count() - count, "{name}");

        let mut optimizer = AdamW::new(model.parameters(), Settings { lr: 1e-2, ..Settings::default() }).unwrap();
        let mut losses = Vec::new();
        for _ in 0..12 {
            let loss = model.cross_entropy(&batch.packed(), &labels, targets(&labels) as f32, 0.0).unwrap().total;
            loss.backward().unwrap();
            losses.push(loss.values()[0]);
            assert!(optimizer.step().unwrap().applied);
        }
        assert!(losses[11] < 0.8 * losses[0], "{name}: {losses:?}");
        for (tensor, before) in base.iter().filter(|(tensor, _)| !tensor.contains(".lora_")) {
            assert!(model.value(tensor).unwrap().to_f32_vec() == *before, "{name}: {tensor} has changed");
        }
        let unmoved = |module: &str| model.value(&format!("{module}.lora_B.weight")).unwrap().to_f32_vec().iter().all(|b| *b == 0.0);
        if !dora {
            let a = model.value("model.embed_tokens.lora_embedding_A").unwrap().to_f32_vec();
            let moved = |token: usize| a.iter().skip(token).step_by(model.config().vocab).any(|value| *value != 0.0);
            // The last token of a document has no label, and no later one sees it.
            let mut learned = batch.tokens.iter().zip(&labels).filter(|(_, label)| **label != fixtures::IGNORE);
            assert!(learned.all(|(token, _)| moved(*token as usize)), "{name}: an embedding has not moved");
            assert!((0..model.config().vocab).any(|token| !moved(token)), "{name}: tokens that do not occur");
        }
        for (tensor, _) in model.tensors().iter().filter(|(tensor, _)| tensor.ends_with("lora_B.weight")) {
            let module = tensor.trim_end_matches(".lora_B.weight");
            // An expert that no token is sent to learns nothing.
            assert!(!unmoved(module) || module.contains(".experts."), "{name}: {module} has not moved");
        }
    }
}

/// PEFT has a word for all projections, but none beside other names.
#[test]
fn the_targets_of_a_folder_are_names_that_peft_knows() {
    let golden = Golden::open("dense_untied");
    let place = tempfile::tempdir().unwrap();
    for (targets, want) in [
        (&["all-linear"][..], serde_json::json!("all-linear")),
        (
            &["all-linear", "lm_head"],
            serde_json::json!(["down_proj", "gate_proj", "k_proj", "lm_head", "o_proj", "q_proj", "up_proj", "v_proj"]),
        ),
    ] {
        let model = golden.model(Dtype::F32);
        model.adapt(lora(targets), 1).unwrap();
        let folder = place.path().join(targets.len().to_string());
        model.save_adapter(&folder, None, None).unwrap();
        let config: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(folder.join("adapter_config.json")).unwrap()).unwrap();
        assert_eq!(config["target_modules"], want);
        let again = golden.model(Dtype::F32);
        again.load_adapter(&folder, true, &mut |_| ()).unwrap();
        assert_eq!(again.trainable(), model.trainable());
    }
}

/// PEFT's `rank_pattern` and `alpha_pattern`: modules with a rank and a scale of their own. The first name that fits counts.
#[test]
fn modules_have_ranks_and_scales_of_their_own() {
    let golden = Golden::open("dense_untied");
    let patterned = Lora {
        rank_pattern: vec![("layers.1.self_attn.q_proj".into(), 2), ("q_proj".into(), 6)],
        alpha_pattern: vec![("v_proj".into(), 1.0)],
        ..lora(&["q_proj", "v_proj"])
    };
    let scales =
        ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"].map(|module| patterned.scale_of(module));
    assert_eq!(scales, [8.0 / 6.0, 4.0, 0.25]);
    let model = golden.model(Dtype::F32);
    model.adapt(patterned.clone(), 1).unwrap();
    let rank = |module: &str| model.value(&format!("model.layers.{module}.lora_A.weight")).unwrap().shape()[0];
    assert_eq!([rank("0.self_attn.q_proj"), rank("1.self_attn.q_proj"), rank("0.self_attn.v_proj")], [6, 2, 4]);
    assert_eq!(AdapterSize::of(model.config(), &patterned).unwrap().parameters, model.trainable() as u64);

    let batch = Batch::new(&golden.integer_rows("input_ids"));
    let labels = batch.next_tokens();
    let mut optimizer = AdamW::new(model.parameters(), Settings { lr: 1e-2, ..Settings::default() }).unwrap();
    model.cross_entropy(&batch.packed(), &labels, 1.0, 0.0).unwrap().total.backward().unwrap();
    optimizer.step().unwrap();
    let place = tempfile::tempdir().unwrap();
    model.save_adapter(&place.path().join("adapter"), None, None).unwrap();
    let again = golden.model(Dtype::F32);
    again.load_adapter(&place.path().join("adapter"), true, &mut |_| ()).unwrap();
    assert_eq!(again.adapter(), Some(patterned));
    assert!(again.logits(&batch.packed()).unwrap().values() == model.logits(&batch.packed()).unwrap().values());
}

/// PEFT's regular expressions, choices of layers and exclusions: the modules are those that the file has parts of.
#[test]
fn modules_that_are_not_chosen_by_names_are_those_of_the_file() {
    use serde_json::json;
    let golden = Golden::open("dense_untied");
    let batch = Batch::new(&golden.integer_rows("input_ids"));
    let model = golden.model(Dtype::F32);
    model.adapt(lora(&["layers.1.self_attn.q_proj", "layers.1.mlp.down_proj", "embed_tokens"]), 1).unwrap();
    let labels = batch.next_tokens();
    let mut optimizer = AdamW::new(model.parameters(), Settings { lr: 1e-2, ..Settings::default() }).unwrap();
    model.cross_entropy(&batch.packed(), &labels, 1.0, 0.0).unwrap().total.backward().unwrap();
    optimizer.step().unwrap();
    let place = tempfile::tempdir().unwrap();
    let folder = place.path().join("adapter");
    model.save_adapter(&folder, None, None).unwrap();
    let path = folder.join("adapter_config.json");
    let saved: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    for choice in [
        json!({ "target_modules": r".*(layers\.1\..*(q_proj|down_proj)|embed_tokens)" }),
        json!({ "target_modules": ["q_proj", "down_proj", "embed_tokens"], "layers_to_transform": 1, "layers_pattern": "layers" }),
        json!({ "target_modules": ["q_proj", "down_proj", "embed_tokens"], "exclude_modules": r".*layers\.0\..*" }),
    ] {
        let mut config = saved.clone();
        config.as_object_mut().unwrap().extend(choice.as_object().unwrap().clone());
        std::fs::write(&path, config.to_string()).unwrap();
        let again = golden.model(Dtype::F32);
        again.load_adapter(&folder, true, &mut |_| ()).unwrap();
        assert_eq!(again.trainable(), model.trainable(), "{choice}");
        assert!(again.logits(&batch.packed()).unwrap().values() == model.logits(&batch.packed()).unwrap().values(), "{choice}");
        // It is written by the names of its modules, which PEFT knows.
        again.save_adapter(&place.path().join("again"), None, None).unwrap();
        let named: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(place.path().join("again/adapter_config.json")).unwrap()).unwrap();
        let mut names: Vec<&str> = named["target_modules"].as_array().unwrap().iter().filter_map(|name| name.as_str()).collect();
        names.sort_unstable();
        assert_eq!(names, ["model.embed_tokens", "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"], "{choice}");
    }
}

/// What a full fine-tuning keeps for each parameter (gradient, moments) an adapter does not keep for the base.
#[test]
fn a_module_that_is_saved_whole_trains_beside_the_adapter() {
    let golden = Golden::open("dense_untied");
    let batch = Batch::new(&golden.integer_rows("input_ids"));
    let labels = batch.next_tokens();
    let make = || {
        let model = golden.model(Dtype::F32);
        model.adapt(Lora { modules_to_save: vec!["lm_head".into()], ..lora(&["q_proj", "layers.1.mlp.down_proj"]) }, 1).unwrap();
        model
    };
    let model = make();
    let head = model.value("lm_head.weight").unwrap().to_f32_vec();
    let mut optimizer = AdamW::new(model.parameters(), Settings { lr: 1e-2, ..Settings::default() }).unwrap();
    model.cross_entropy(&batch.packed(), &labels, 1.0, 0.0).unwrap().total.backward().unwrap();
    optimizer.step().unwrap();
    assert!(model.value("lm_head.weight").unwrap().to_f32_vec() != head);
    let names: Vec<String> = model.tensors().into_iter().map(|(name, _)| name).filter(|name| name.ends_with("lora_A.weight")).collect();
    assert_eq!(
        names,
        ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "layers.1.mlp.down_proj"]
            .map(|name| format!("model.{name}.lora_A.weight"))
    );
    let place = tempfile::tempdir().unwrap();
    model.save_adapter(place.path().join("adapter").as_path(), None, None).unwrap();
    let again = golden.model(Dtype::F32);
    again.load_adapter(&place.path().join("adapter"), true, &mut |_| ()).unwrap();
    assert!(again.logits(&batch.packed()).unwrap().values() == model.logits(&batch.packed()).unwrap().values());
    assert!(!model.base_changed() && !again.base_changed());
}

#[test]
fn adapters_that_do_not_fit_are_refused_by_name() {
    let golden = Golden::open("lora");
    let model = golden.model(Dtype::F32);
    let message = |error: Error| error.to_string();
    for (bad, says) in [
        (lora(&["q_prj"]), "\"q_prj\""),
        (lora(&["score"]), "trains whole"),
        (Lora { dora: true, ..lora(&["embed_tokens"]) }, "DoRA of model.embed_tokens"),
        (lora(&[]), "an empty list"),
        (Lora { rank: 0, ..lora(&["q_proj"]) }, "`rank`"),
        (Lora { alpha: f64::NAN, ..lora(&["q_proj"]) }, "`alpha`"),
        (Lora { modules_to_save: vec!["q_proj".into()], ..lora(&["k_proj"]) }, "use it as a target"),
        (Lora { modules_to_save: vec!["nothing".into()], ..lora(&["k_proj"]) }, "\"nothing\""),
    ] {
        let got = message(model.adapt(bad, 0).unwrap_err());
        assert!(got.contains(says), "{got}");
        assert!(model.adapter().is_none() && model.trainable() == model.count());
    }
    assert!(message(model.merge().unwrap_err()).contains("adapter"));
    model.adapt(lora(&["q_proj"]), 0).unwrap();
    assert!(message(model.adapt(lora(&["q_proj"]), 0).unwrap_err()).contains("one that has one"));

    let place = tempfile::tempdir().unwrap();
    let config: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(golden.folder().join("adapter_config.json")).unwrap()).unwrap();
    let load = |key: &str, value: serde_json::Value| {
        let mut config = config.clone();
        config[key] = value;
        std::fs::write(place.path().join("adapter_config.json"), config.to_string()).unwrap();
        std::fs::copy(golden.folder().join("adapter_model.safetensors"), place.path().join("adapter_model.safetensors")).unwrap();
        golden.model(Dtype::F32).load_adapter(place.path(), true, &mut |_| ()).map_err(message)
    };
    use serde_json::json;
    load("r", json!(4)).unwrap();
    for (key, value, says) in [
        ("r", json!(8), "lora_A.weight"),
        ("r", json!("many"), "whole number"),
        ("use_dora", json!(true), "lora_magnitude_vector"),
        ("bias", json!("all"), "bias"),
        ("rank_pattern", json!({ "q_proj": 2 }), "lora_A.weight"),
        ("rank_pattern", json!({ "q_proj": 0 }), "rank_pattern.q_proj"),
        ("rank_pattern", json!({ ".*q_proj": 4 }), "a regular expression"),
        ("rank_pattern", json!([4]), "an object of names of modules"),
        ("alpha_pattern", json!({ "q_proj": "high" }), "alpha_pattern.q_proj"),
        ("init_lora_weights", json!("pissa_niter_4"), "changes the weights of the base"),
        ("init_lora_weights", json!("olora"), "changes the weights of the base"),
        ("peft_type", json!("IA3"), "LORA"),
        ("target_modules", json!(7), "a list of names of modules"),
        ("target_parameters", json!(["q_proj.weight"]), "target_parameters"),
        ("target_modules", json!(["q_proj"]), "only tensors of the modules"),
        ("target_modules", json!(["qkv"]), "\"qkv\""),
        ("modules_to_save", json!(["embed_tokens"]), "embed_tokens"),
    ] {
        let got = load(key, value.clone()).unwrap_err();
        assert!(got.contains(says), "{key} {value}: {got}");
    }
    // The adapter of an embedding that another model has; the adapter of another model; and no weights at all.
    let of_embedding = Golden::open("lora_embedding");
    let other = of_embedding.model(Dtype::F32);
    let name = "model.embed_tokens.weight";
    let mut value = other.value(name).unwrap().to_f32_vec();
    value[5] += 1.0;
    let value = AnyTensor::new(other.value(name).unwrap().shape(), Buffer::copy_of(&value)).unwrap();
    other.set_value(name, &value).unwrap();
    let other = other.load_adapter(of_embedding.folder(), true, &mut |_| ()).map_err(message).unwrap_err();
    assert!(other.contains("embed_tokens.base_layer") && other.contains("merge_and_unload"), "{other}");
    let other = Golden::open("lora_moe").model(Dtype::F32).load_adapter(golden.folder(), true, &mut |_| ()).map_err(message).unwrap_err();
    assert!(other.contains("gate_proj") || other.contains("lora_A"), "{other}");
    std::fs::remove_file(place.path().join("adapter_model.safetensors")).unwrap();
    let none = golden.model(Dtype::F32).load_adapter(place.path(), true, &mut |_| ()).map_err(message).unwrap_err();
    assert!(none.contains("adapter_"), "{none}");
}

/// A row is the same alone and in a batch, and for one thread or two.
#[test]
fn rows_with_an_adapter_do_not_depend_on_their_batch() {
    for (name, dtype) in NAMES.into_iter().flat_map(|name| [(name, Dtype::F32), (name, Dtype::Bf16)]) {
        let golden = Golden::open(name);
        let rows = golden.integer_rows("input_ids");
        let model = adapted(&golden, dtype);
        let together = model.logits(&Batch::new(&rows).packed()).unwrap();
        let apart: Vec<f32> = rows.iter().flat_map(|row| model.logits(&Batch::new(&[row]).packed()).unwrap().values().to_vec()).collect();
        assert!(together.values() == apart, "{name} in {dtype}");
    }
}
