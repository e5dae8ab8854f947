//! Numbers that need no published weights: a tiny model whose weights follow a formula, the loss of a model that knows
//! nothing, a batch learnt by heart. The table was computed with transformers 4.57.1 in f32, and agrees with a numpy
//! forward pass in f64; its last digit is the tolerance where no other is given.
// The table's digits stand as they were computed.
#![allow(clippy::excessive_precision)]

mod fixtures;

use fixtures::{Batch, check, gradient, gradient_norm, targets};
use perilune::kernels::buffer::Buffer;
use perilune::kernels::element::Dtype;
use perilune::model::Model;
use perilune::model::config::Config;
use perilune::train::optimizer::{AdamW, Settings};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

const IDS: [i32; 10] = [1, 5, 9, 13, 2, 60, 33, 7, 7, 41];

/// `config` with `changes`.
fn merged(mut config: Value, changes: Value) -> Value {
    let Value::Object(changes) = changes else { panic!("an object of changes") };
    config.as_object_mut().unwrap().extend(changes);
    config
}

/// `config.json` of the model with weights by formula, with `changes`.
fn config(changes: Value) -> Value {
    let config = json!({
        "model_type": "qwen2", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 64, "tie_word_embeddings": false, "torch_dtype": "float32",
    });
    merged(config, changes)
}

fn experts(norm_topk_prob: bool) -> Value {
    json!({
        "model_type": "qwen2_moe", "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "num_experts": 6,
        "num_experts_per_tok": 2, "decoder_sparse_step": 1, "norm_topk_prob": norm_topk_prob,
    })
}

/// The model whose tensor t, in byte order of the names, has at flat index k
/// `(((7919 k + 104729 t) mod 1009) / 1009 - 0.5) * 0.2`, plus 1 for norm weights.
fn model_by_formula(changes: Value) -> Model {
    model_at(&config(changes).to_string(), |_| Box::new(|_| 0.0))
}

/// As [`model_by_formula`], with `offset(name, k)` added to each weight; written as a checkpoint and loaded.
fn model_at(text: &str, offset: impl Fn(&str) -> Box<dyn Fn(usize) -> f64>) -> Model {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), text).unwrap();
    let shapes = Model::random(Config::parse(Path::new("config.json"), text).unwrap(), Dtype::F32, 0).unwrap().tensors();
    let sorted: BTreeMap<String, Vec<usize>> = shapes.into_iter().collect();
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = sorted
        .into_iter()
        .enumerate()
        .map(|(t, (name, shape))| {
            let one = if name.contains("layernorm") || name == "model.norm.weight" { 1.0 } else { 0.0 };
            let more = offset(&name);
            let value = |k: usize| (((k * 7919 + t * 104_729) % 1009) as f64 / 1009.0 - 0.5) * 0.2 + one + more(k);
            let bytes = (0..shape.iter().product()).flat_map(|k| (value(k) as f32).to_le_bytes()).collect();
            (name, shape, bytes)
        })
        .collect();
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| (name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
    fixtures::load(folder.path(), Dtype::F32)
}

struct Row {
    name: &'static str,
    changes: Value,
    loss: f32,
    first: [f32; 4],
    last: [f32; 4],
    sum: f32,
    aux: Option<f32>,
}

#[test]
fn models_by_formula_give_the_computed_table() {
    let first = [-0.916163, 0.239890, 0.915049, 1.134104];
    let yarn = json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}});
    let rows = [
        Row {
            name: "dense untied",
            changes: json!({}),
            loss: 4.6466074,
            first,
            last: [-0.733899, -0.177119, 0.858433, 0.620658],
            sum: -0.45744,
            aux: None,
        },
        Row {
            name: "dense tied",
            changes: json!({"tie_word_embeddings": true}),
            loss: 4.3836374,
            first: [1.126896, 0.473238, -0.735344, -1.276968],
            last: [-0.519166, -0.256887, 0.555055, 0.685143],
            sum: -0.37472,
            aux: None,
        },
        Row {
            name: "untied with yarn",
            changes: yarn,
            loss: 4.6264462,
            first,
            last: [-0.753096, 0.187728, 1.124861, 1.073338],
            sum: 1.83678,
            aux: None,
        },
        Row {
            name: "experts, norm_topk_prob false",
            changes: experts(false),
            loss: 4.8080316,
            first: [0.227108, 0.986821, 1.220901, 0.562306],
            last: [-0.440779, -1.278361, -1.224235, -0.256743],
            sum: -7.57220,
            aux: Some(2.1659145),
        },
        Row {
            name: "experts, norm_topk_prob true",
            changes: experts(true),
            loss: 4.8105798,
            first: [0.230184, 0.979148, 1.204444, 0.564427],
            last: [-0.480672, -1.301760, -1.183848, -0.208349],
            sum: -7.79893,
            aux: Some(2.1659172),
        },
    ];
    let batch = Batch::new(&[IDS]);
    for row in rows {
        let (name, model) = (row.name, model_by_formula(row.changes));
        let logits = model.logits(&batch.packed()).unwrap();
        // Six decimals are printed; f32 arithmetic in another order is off by as much.
        check(&format!("{name}: logits[0]"), &logits.values()[..4], &row.first, 2e-6, 0.0);
        check(&format!("{name}: logits[9]"), &logits.values()[9 * 64..][..4], &row.last, 2e-6, 0.0);
        // 640 logits, each off by up to 1e-6 either way.
        let sum: f64 = logits.values().iter().map(|logit| f64::from(*logit)).sum();
        check(&format!("{name}: sum of logits"), &[sum as f32], &[row.sum], 5e-5, 0.0);
        let labels = batch.next_tokens();
        let loss = model.cross_entropy(&batch.packed(), &labels, 9.0, 0.001).unwrap();
        check(&format!("{name}: loss"), loss.total.values(), &[row.loss], 2e-6, 0.0);
        assert_eq!(loss.load_balance.is_some(), row.aux.is_some(), "{name}");
        if let (Some(balance), Some(aux)) = (loss.load_balance, row.aux) {
            check(&format!("{name}: aux"), balance.values(), &[aux], 2e-6, 0.0);
        }
    }
}

#[test]
fn the_dense_model_by_formula_agrees_inside_too() {
    let model = model_by_formula(json!({}));
    let start = |name: &str| model.value(name).unwrap().to_f32_vec()[..3].to_vec();
    check("q_proj", &start("model.layers.0.self_attn.q_proj.weight"), &[0.0486620, 0.0183350, -0.0119921], 1e-7, 0.0);
    check("lm_head", &start("lm_head.weight"), &[-0.1, 0.0696729, 0.0393459], 1e-7, 0.0);
    let batch = Batch::new(&[IDS]);
    let labels = batch.next_tokens();
    let logprobs = model.logprobs(&batch.packed(), &labels, 1.0).unwrap();
    let want = [-5.28691, -3.49908, -4.42585, -3.30935, -4.83648, -5.47431, -4.70251, -5.21467, -5.07030, 0.0];
    check("log-probs", logprobs.values(), &want, 1e-5, 0.0);

    for (index, want) in [
        (0, [0.069871, 0.039544, 0.009217, -0.021110]),
        (1, [0.394875, -0.387226, -0.222469, -0.275714]),
        (2, [0.320954, -0.910119, -0.445999, -0.439756]),
    ] {
        let state = model.hidden_states(&batch.packed(), index).unwrap().to_f32_vec();
        check(&format!("state {index}"), &state[9 * 32..][..4], &want, 2e-6, 0.0);
    }

    let loss = model.cross_entropy(&batch.packed(), &labels, 9.0, 0.0).unwrap();
    loss.total.backward().unwrap();
    check("gradient norm", &[gradient_norm(&model) as f32], &[2.9694891], 2e-6, 0.0);
    let bias = gradient(&model, "model.layers.0.self_attn.q_proj.bias");
    check("q_proj.bias gradient", &bias[..3], &[-0.0197849, 0.0328360, 0.0254808], 1e-7, 0.0);

    let mut tokens = IDS.to_vec();
    for _ in 0..8 {
        let logits = model.logits_at(&Batch::new(&[&tokens]).packed(), &[tokens.len() - 1]).unwrap();
        let best = (0..64).max_by(|a, b| logits.values()[*a].total_cmp(&logits.values()[*b])).unwrap();
        tokens.push(best as i32);
    }
    assert_eq!(tokens[10..], [9, 5, 1, 58, 20, 56, 31, 34], "greedy continuation");
}

#[test]
fn the_router_by_formula_and_its_parameters_are_as_computed() {
    let model = model_by_formula(experts(false));
    assert_eq!(model.tensors().len(), 67);
    let (layers, balance) = model.routing(&Batch::new(&[IDS]).packed()).unwrap();
    check("router", &layers[0].0.to_f32_vec()[..6], &[0.20520, -1.09999, -1.38436, -0.53671, 0.63517, 1.40948], 1e-5, 0.0);
    check("aux", balance.unwrap().values(), &[2.1659145], 2e-6, 0.0);
}

#[test]
fn the_small_yarn_table_is_as_computed() {
    let model = model_by_formula(json!({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}));
    let (inv_freq, scaling) = model.config().inv_freq();
    check("inv_freq", &inv_freq, &[1.0, 0.025, 0.0025, 0.00025], 0.0, 1e-6);
    check("scaling", &[scaling], &[1.1386294], 1e-7, 0.0);
}

/// A model that knows nothing gives every token 1 / vocab. With weights of deviation 0.02 and hidden 64 a logit has
/// deviation 0.02 * sqrt(64) = 0.16 after the final norm, which adds 0.16^2 / 2 = 0.013 to the loss in the mean.
#[test]
fn a_random_model_is_as_surprised_as_a_die() {
    for (changes, dtype) in [(json!({}), Dtype::F32), (json!({}), Dtype::Bf16), (experts(false), Dtype::F32), (experts(true), Dtype::Bf16)]
    {
        let changes = merged(changes, json!({"vocab_size": 1000, "hidden_size": 64}));
        let config = Config::parse(Path::new("config.json"), &config(changes).to_string()).unwrap();
        let model = Model::random(config, dtype, 7).unwrap();
        let batch = Batch::new(&[(0..500).map(|index| (index * 379 + 11) % 1000).collect::<Vec<i32>>()]);
        let labels = batch.next_tokens();
        let loss = model.cross_entropy(&batch.packed(), &labels, targets(&labels) as f32, 0.0).unwrap();
        check(&format!("{dtype} loss against ln(vocab)"), loss.total.values(), &[1000f32.ln()], 0.05, 0.0);
    }
}

/// A batch seen often enough is known by heart, in every kind of model.
#[test]
fn a_batch_is_learnt_by_heart() {
    for (changes, dtype) in [(json!({}), Dtype::F32), (json!({"tie_word_embeddings": true}), Dtype::Bf16), (experts(false), Dtype::F32)] {
        let text = config(changes).to_string();
        let model = Model::random(Config::parse(Path::new("config.json"), &text).unwrap(), dtype, 3).unwrap();
        let batch = Batch::new(&[&IDS[..], &[3, 1, 4, 1, 5, 9, 2, 6, 53, 58, 63], &[27, 18, 28]]);
        let labels = batch.next_tokens();
        let settings = Settings { lr: 1e-2, weight_decay: 0.0, ..Settings::default() };
        let mut optimizer = AdamW::new(model.parameters(), settings).unwrap();
        let mut losses = Vec::new();
        for _ in 0..100 {
            let loss = model.cross_entropy(&batch.packed(), &labels, targets(&labels) as f32, 0.001).unwrap();
            loss.total.backward().unwrap();
            losses.push(loss.total.values()[0]);
            optimizer.step().unwrap();
        }
        println!("{dtype}: below 0.1 after {:?} steps, last {}", losses.iter().position(|loss| *loss < 0.1), losses[99]);
        assert!(losses[99] < 0.1, "{dtype}: {losses:?}");
    }
}

/// Where policy and reference agree, DPO's loss is ln 2 and its derivative in the margin is -beta / 2: the gradient of the
/// loss is that of the margin alone.
#[test]
fn preferences_start_at_ln_2_with_half_of_beta_as_slope() {
    let model = model_by_formula(json!({}));
    let batch = Batch::new(&[&IDS[..6], &IDS[4..]]);
    let labels = batch.next_tokens();
    let beta = 0.1f32;
    let reference = model.logprobs(&batch.packed(), &labels, 1.0).unwrap().detach();
    let policy = model.logprobs(&batch.packed(), &labels, 1.0).unwrap();
    let ranges: Vec<_> = batch.documents().collect();
    let sum = |values: &[f32], index: usize| values[ranges[index].clone()].iter().sum::<f32>();
    let gap = |index: usize| sum(policy.values(), index) - sum(reference.values(), index);
    let margin = gap(0) - gap(1);
    assert_eq!(margin, 0.0, "one forward pass, one set of bits");
    let loss = (1.0 + (-beta * margin).exp()).ln();
    check("loss", &[loss], &[std::f32::consts::LN_2], 1e-7, 0.0);

    let slope = -beta / (1.0 + (beta * margin).exp());
    let run = |scale: f32| -> Vec<f32> {
        fixtures::clear_gradients(&model);
        let policy = model.logprobs(&batch.packed(), &labels, 1.0).unwrap();
        let mut upstream = Buffer::<f32>::zeroed(batch.tokens.len());
        upstream[ranges[0].clone()].fill(scale);
        upstream[ranges[1].clone()].fill(-scale);
        policy.backward_with(upstream).unwrap();
        gradient(&model, "model.layers.0.mlp.up_proj.weight")
    };
    let expected: Vec<f32> = run(1.0).iter().map(|value| -beta / 2.0 * value).collect();
    check("gradient", &run(slope), &expected, 1e-8, 1e-4);
}

/// Models of every kind in sizes that fill no tile, panel, vector or pair.
fn odd_configs() -> Vec<String> {
    let sliding = json!({"use_sliding_window": true, "sliding_window": 5, "max_window_layers": 1});
    let yarn = json!({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}});
    let odd_experts = |norm_topk_prob| {
        let sizes = json!({"moe_intermediate_size": 13, "shared_expert_intermediate_size": 19, "decoder_sparse_step": 2});
        merged(experts(norm_topk_prob), sizes)
    };
    let kinds = [json!({}), json!({"tie_word_embeddings": true}), sliding, yarn, odd_experts(false), odd_experts(true)];
    let sizes = json!({
        "vocab_size": 53, "hidden_size": 37, "intermediate_size": 43, "head_dim": 10, "num_attention_heads": 3,
        "num_key_value_heads": 1, "num_hidden_layers": 3, "initializer_range": 0.1,
    });
    kinds.into_iter().map(|changes| merged(config(sizes.clone()), changes).to_string()).collect()
}

/// `||got - want|| / ||want||`; 0 if both are 0.
fn distance(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
    let off = norm(&mut got.iter().zip(want).map(|(got, want)| f64::from(*got) - f64::from(*want)));
    if off == 0.0 { 0.0 } else { off / norm(&mut want.iter().map(|want| f64::from(*want))) }
}

/// Gradients in bf16 are those in f32 but for rounding: each value that is passed on is off by up to 2^-9 of itself, and some
/// tens of them lie on the way; measured up to 4%, and allowed 6%. For biases of keys it is up to 14%, and 25% allowed: what
/// all keys of a query share hardly moves its softmax, so their gradient is the small rest of large terms. All experts are
/// chosen here, or rounding would change the choice.
#[test]
fn gradients_in_bf16_are_near_those_in_f32() {
    for text in odd_configs() {
        let config = |per_token: usize| {
            let mut config = Config::parse(Path::new("config.json"), &text).unwrap();
            config.moe.iter_mut().for_each(|moe| moe.experts_per_token = per_token);
            config
        };
        let batch = Batch::new(&[13, 1, 9, 40].map(|len| (0..len).map(|index| (index * 17 + len) % 53).collect::<Vec<i32>>()));
        let labels = batch.next_tokens();
        let run = |dtype| {
            let model = Model::random(config(6), dtype, 5).unwrap();
            model.cross_entropy(&batch.packed(), &labels, 59.0, 0.01).unwrap().total.backward().unwrap();
            model
        };
        let (narrow, wide) = (run(Dtype::Bf16), run(Dtype::F32));
        for (name, _) in wide.tensors() {
            let off = distance(&gradient(&narrow, &name), &gradient(&wide, &name));
            let allowed = if name.ends_with("k_proj.bias") { 0.25 } else { 0.06 };
            assert!(off <= allowed, "{name} is off by {off:.4}: {text}");
        }
    }
}

/// Along the gradient the loss rises by its squared norm: (loss(w + e g) - loss(w - e g)) / 2e = |g|^2. Sizes that fill no
/// tile, panel or vector, in every kind of layer; a wrong gradient anywhere shows, most of all where it is large.
#[test]
fn gradients_are_the_slopes_of_the_loss() {
    for text in odd_configs() {
        let model = model_at(&text, |_| Box::new(|_| 0.0));
        let documents: [Vec<i32>; 3] = [13, 1, 9].map(|len| (0..len).map(|index| (index * 17 + len) % 53).collect());
        let batch = Batch::new(&documents);
        let labels = batch.next_tokens();
        let loss = |model: &Model| model.cross_entropy(&batch.packed(), &labels, 20.0, 0.5).unwrap().total;
        loss(&model).backward().unwrap();
        let squared = gradient_norm(&model).powi(2);
        // The loss moves by 0.003 either way: a thousand times its rounding, and so little that no token changes its experts
        // (at 0.01 one does, and the loss jumps).
        let step = 0.003 / squared;
        let moved = |sign: f64| {
            let moved = model_at(&text, |name| {
                let gradient = gradient(&model, name);
                Box::new(move |k| sign * step * f64::from(gradient[k]))
            });
            f64::from(loss(&moved).values()[0])
        };
        let slope = (moved(1.0) - moved(-1.0)) / (2.0 * step);
        check(&format!("slope of {text}"), &[slope as f32], &[squared as f32], 0.0, 1e-3);
    }
}
