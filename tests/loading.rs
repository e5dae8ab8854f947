//! Checkpoints as they are found: heads that are redundant, different or missing, tensors too many or too few, several
//! element types; and models made from a seed.

mod fixtures;

use fixtures::{Batch, Golden};
use half::bf16;
use perilune::error::Result;
use perilune::kernels::element::Dtype;
use perilune::model::Model;
use perilune::model::config::Config;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use std::collections::BTreeMap;
use std::path::Path;

/// Name, shape and values of a checkpoint's tensors.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

fn read(fixture: &str) -> (String, Tensors) {
    let folder = Golden::open(fixture).folder().to_owned();
    let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = tensors.tensors().into_iter().map(|(name, view)| {
        let values = view.data().chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect();
        (name, (view.shape().to_vec(), values))
    });
    (std::fs::read_to_string(folder.join("config.json")).unwrap(), tensors.collect())
}

/// Writes the tensors as a checkpoint in `stored` and loads it; returns the remarks beside the model.
fn load(config: &str, tensors: &Tensors, stored: safetensors::Dtype, dtype: Option<Dtype>, trains: bool) -> Result<(Model, Vec<String>)> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config).unwrap();
    let encode = |value: f32| match stored {
        safetensors::Dtype::F32 => value.to_le_bytes().to_vec(),
        safetensors::Dtype::F16 => half::f16::from_f32(value).to_le_bytes().to_vec(),
        safetensors::Dtype::BF16 => bf16::from_f32(value).to_le_bytes().to_vec(),
        _ => panic!("{stored:?}"),
    };
    let bytes: Vec<(&String, &Vec<usize>, Vec<u8>)> =
        tensors.iter().map(|(name, (shape, values))| (name, shape, values.iter().flat_map(|value| encode(*value)).collect())).collect();
    let views = bytes.iter().map(|(name, shape, bytes)| (*name, TensorView::new(stored, shape.to_vec(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
    let mut remarks = Vec::new();
    let model = Model::load(folder.path(), dtype, trains, &mut |remark| remarks.push(remark))?;
    Ok((model, remarks))
}

const EMBED: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

fn logits(model: &Model) -> Vec<f32> {
    let tokens: Vec<i32> = (0..20).map(|index| index * 13 % 280).collect();
    model.logits(&Batch::new(&[tokens]).packed()).unwrap().values().to_vec()
}

#[test]
fn what_the_checkpoint_holds_decides_about_the_head() {
    let (config, tensors) = read("dense_tied");
    let f32 = |config: &str, tensors: &Tensors| load(config, tensors, safetensors::Dtype::F32, None, true).unwrap();
    let (plain, remarks) = f32(&config, &tensors);
    assert!(plain.config().tied && remarks.is_empty());
    let count = plain.count();

    let mut redundant = tensors.clone();
    redundant.insert(HEAD.into(), tensors[EMBED].clone());
    let (model, remarks) = f32(&config, &redundant);
    assert!(model.config().tied && remarks.is_empty(), "{remarks:?}");
    assert_eq!((model.count(), logits(&model)), (count, logits(&plain)));

    let mut different = redundant.clone();
    different.get_mut(HEAD).unwrap().1.iter_mut().for_each(|value| *value *= 2.0);
    let (model, remarks) = f32(&config, &different);
    assert!(!model.config().tied && remarks.len() == 1 && remarks[0].contains("differs"), "{remarks:?}");
    assert_eq!(model.count(), count + tensors[EMBED].1.len());
    assert_eq!(logits(&model), logits(&plain).iter().map(|logit| 2.0 * logit).collect::<Vec<_>>());

    let untied = config.replace("\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false");
    assert_ne!(untied, config);
    let (model, remarks) = f32(&untied, &tensors);
    assert!(model.config().tied && remarks.len() == 1 && remarks[0].contains("serves as head"), "{remarks:?}");
    assert_eq!(logits(&model), logits(&plain));

    let (model, remarks) = f32(&untied, &redundant);
    assert!(!model.config().tied && remarks.is_empty(), "{remarks:?}");
    assert_eq!(logits(&model), logits(&plain));
}

#[test]
fn tensors_too_many_too_few_or_misshapen_are_named() {
    let (config, tensors) = read("train_moe");
    let refusal = |tensors: &Tensors| load(&config, tensors, safetensors::Dtype::F32, None, true).err().unwrap().to_string();
    for name in [EMBED, "model.norm.weight", "model.layers.1.self_attn.k_proj.bias", "model.layers.0.mlp.experts.3.up_proj.weight"] {
        let mut less = tensors.clone();
        less.remove(name).unwrap();
        let message = refusal(&less);
        assert!(message.contains(name), "{message}");

        let mut other = tensors.clone();
        let (shape, values) = other.get_mut(name).unwrap();
        shape[0] += 1;
        let row = values.len() / (shape[0] - 1);
        values.extend(vec![0.0; row]);
        let message = refusal(&other);
        assert!(message.contains(name) && message.contains("shape"), "{message}");
    }
    for name in ["model.layers.2.mlp.gate.weight", "model.layers.0.self_attn.o_proj.bias", "model.layers.0.mlp.experts.4.up_proj.weight"] {
        let mut more = tensors.clone();
        more.insert(name.into(), (vec![2], vec![0.0; 2]));
        let message = refusal(&more);
        assert!(message.contains(name), "{message}");
    }
    // Old checkpoints hold this table; it is computed today.
    let mut old = tensors.clone();
    old.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), (vec![8], vec![0.5; 8]));
    load(&config, &old, safetensors::Dtype::F32, None, true).unwrap();
}

/// Every value of the model equals `expected(value)` of the tensors.
fn check_values(what: &str, model: &Model, tensors: &Tensors, expected: impl Fn(f32) -> f32) {
    assert_eq!(model.tensors().len(), tensors.len());
    for (name, (shape, values)) in tensors {
        let value = model.value(name).unwrap();
        assert_eq!(value.shape(), shape, "{what}: {name}");
        let values: Vec<f32> = values.iter().map(|value| expected(*value)).collect();
        assert!(value.to_f32_vec() == values, "{what}: {name}");
    }
}

#[test]
fn stored_values_arrive_and_training_keeps_what_bf16_cannot_hold() {
    let half = |value: f32| half::f16::from_f32(value).to_f32();
    let brain = |value: f32| bf16::from_f32(value).to_f32();
    for fixture in ["train_dense", "train_moe"] {
        let (config, mut tensors) = read(fixture);
        // A value half-way between two of bf16 is rounded to even when frozen, away from zero beside a remainder.
        for value in tensors.values_mut().flat_map(|(_, values)| values).filter(|value| value.to_bits() as u16 == 0x8000) {
            *value = f32::from_bits(value.to_bits() + 1);
        }
        let model = |stored, dtype, trains| load(&config, &tensors, stored, Some(dtype), trains).unwrap().0;
        use safetensors::Dtype::{BF16, F16, F32};
        check_values("f32", &model(F32, Dtype::F32, true), &tensors, |value| value);
        check_values("f32, frozen", &model(F32, Dtype::F32, false), &tensors, |value| value);
        check_values("f16", &model(F16, Dtype::F32, true), &tensors, half);
        check_values("bf16 in f32", &model(BF16, Dtype::F32, true), &tensors, brain);
        check_values("bf16", &model(BF16, Dtype::Bf16, true), &tensors, brain);
        check_values("f32 in bf16, trained", &model(F32, Dtype::Bf16, true), &tensors, |value| value);
        check_values("f16 in bf16, trained", &model(F16, Dtype::Bf16, true), &tensors, half);
        check_values("f32 in bf16, frozen", &model(F32, Dtype::Bf16, false), &tensors, brain);
        let (a, b) = (model(F32, Dtype::Bf16, true), model(BF16, Dtype::Bf16, false));
        assert_eq!(logits(&a), logits(&b), "products read the rounded weights");
    }
    let (config, tensors) = read("train_dense");
    let message = load(&config, &tensors, safetensors::Dtype::F32, Some(Dtype::I32), true).err().unwrap().to_string();
    assert!(message.contains("f32, bf16 or int8"), "{message}");
}

#[test]
fn new_models_follow_their_seed_and_their_distribution() {
    let text = std::fs::read_to_string(Golden::open("moe_mixed_layers").folder().join("config.json")).unwrap();
    let mut config = Config::parse(Path::new("config.json"), &text).unwrap();
    config.pad = Some(5);
    let values = |dtype, seed| -> Vec<(String, Vec<f32>)> {
        let model = Model::random(config.clone(), dtype, seed).unwrap();
        model.tensors().into_iter().map(|(name, _)| (name.clone(), model.value(&name).unwrap().to_f32_vec())).collect()
    };
    let first = values(Dtype::F32, 1);
    assert_eq!(first, values(Dtype::F32, 1));
    assert_eq!(first, values(Dtype::Bf16, 1), "bf16 models start from the same master weights");
    let second = values(Dtype::F32, 2);
    let (mut count, mut sum, mut squares) = (0.0, 0.0, 0.0);
    for ((name, one), (_, two)) in first.iter().zip(&second) {
        if name.ends_with("norm.weight") {
            assert!(one.iter().all(|value| *value == 1.0), "{name}");
        } else if name.ends_with(".bias") {
            assert!(one.iter().all(|value| *value == 0.0), "{name}");
        } else {
            let equal = one.iter().zip(two).filter(|(a, b)| a == b).count();
            assert!(equal <= config.hidden, "{name}: {equal} values of two seeds are equal");
            for value in one {
                count += 1.0;
                sum += f64::from(*value);
                squares += f64::from(*value).powi(2);
            }
        }
    }
    let embed = &first.iter().find(|(name, _)| name == EMBED).unwrap().1;
    assert!(embed[5 * config.hidden..6 * config.hidden].iter().all(|value| *value == 0.0), "the row of the padding token");
    // Over 1e5 values the mean's deviation is 0.02 / sqrt(count), and that of the deviation less; five times that.
    let (mean, deviation) = (sum / count, (squares / count).sqrt());
    println!("{count} values, mean {mean:.2e}, deviation {deviation:.5}");
    assert!(count > 5e4 && mean.abs() < 0.1 / count.sqrt() && (deviation - 0.02).abs() < 0.1 / count.sqrt() + 1e-5, "{mean} {deviation}");
}

#[test]
fn inputs_that_do_not_fit_are_refused() {
    let model = Golden::open("dense_tied").model(Dtype::F32);
    let vocab = model.config().vocab as i32;
    let refusal = |batch: Batch| model.logits(&batch.packed()).err().unwrap().to_string();
    let good = Batch::new(&[[1, 2, 3]]);
    assert!(refusal(Batch { tokens: vec![1, vocab, 3], ..good.clone() }).contains("tokens[1]"));
    assert!(refusal(Batch { tokens: vec![1, 2, -1], ..good.clone() }).contains("tokens[2]"));
    assert!(refusal(Batch { position_ids: vec![0, 1], ..good.clone() }).contains("position_ids"));
    assert!(refusal(Batch { position_ids: vec![0, -1, 2], ..good.clone() }).contains("position_ids"));
    for borders in [vec![], vec![0], vec![0, 2], vec![1, 3], vec![0, 2, 1, 3], vec![0, 4]] {
        assert!(refusal(Batch { cu_seqlens: borders, ..good.clone() }).contains("cu_seqlens"));
    }
    let loss = |labels: &[i32], normalizer| model.cross_entropy(&good.packed(), labels, normalizer, 0.0).err().unwrap().to_string();
    assert!(loss(&[1, 2], 1.0).contains("labels"));
    assert!(loss(&[1, vocab, -100], 1.0).contains("labels[1]"));
    assert!(loss(&[1, -1, -100], 1.0).contains("labels[1]"));
    assert!(loss(&[1, 2, -100], 0.0).contains("normalizer") && loss(&[1, 2, -100], f32::NAN).contains("normalizer"));
    for temperature in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let message = model.logprobs(&good.packed(), &[1, 2, 3], temperature).err().unwrap().to_string();
        assert!(message.contains("temperature"), "{message}");
    }
    assert!(model.logits_at(&good.packed(), &[0, 3]).err().unwrap().to_string().contains("rows"));
    assert!(model.value("model.norm").err().unwrap().to_string().contains("model.norm.weight"));
    assert!(model.gradient("lm_head.weight").is_err(), "a tied head is the embedding");
    assert!(model.gradient("model.norm.weight").unwrap().is_none());
}
