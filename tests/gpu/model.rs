//! Whole models on the device: forward, loss, every gradient and steps of AdamW against the CPU's; laws that hold to the bit.

use crate::adapters::lora;
use crate::fixtures::clear_gradients;
use crate::training::{Training, check_gradients};
use crate::{Bench, bench};
use perilune::data::pack::TokenBatch;
use perilune::kernels::buffer::Buffer;
use perilune::kernels::cuda::behind::Mark;
use perilune::kernels::element::Dtype;
use perilune::model::config::Config;
use perilune::model::presets::{preset, with_fields};
use perilune::model::{Model, Packed};
use perilune::tensor::place::ImageTo;
use perilune::tensor::{Place, Tensor};
use perilune::train::online_merge::{MergeSettings, Method, OnlineMerge};
use perilune::train::optimizer::{AdamW, Settings};
use perilune::train::optimizer_state::AdamWState;
use serde_json::json;

/// Odd sizes on purpose; two documents.
pub const TOKENS: [i32; 26] = [5, 61, 3, 3, 17, 40, 66, 0, 12, 5, 9, 31, 5, 28, 44, 2, 19, 50, 63, 5, 17, 40, 1, 8, 5, 33];
const BORDERS: [u32; 3] = [0, 19, 26];
const NORMALIZER: f32 = 21.0;
const BALANCE: f32 = 0.01;

pub fn config(moe: bool) -> Config {
    let mut fields = vec![("vocab", json!(67)), ("hidden", json!(24)), ("layers", json!(2)), ("heads", json!(2)), ("kv_heads", json!(1))];
    fields.extend([("intermediate", json!(40)), ("tied", json!(!moe))]);
    if moe {
        fields.extend([("experts", json!(5)), ("experts_per_token", json!(2)), ("moe_intermediate", json!(20))]);
        fields.push(("shared_intermediate", json!(40)));
    }
    let fields: Vec<_> = fields.into_iter().map(|(name, value)| (name.to_string(), value)).collect();
    with_fields(&preset("tiny").unwrap(), &fields).unwrap()
}

fn positions() -> Vec<i32> {
    BORDERS.windows(2).flat_map(|pair| 0..(pair[1] - pair[0]) as i32).collect()
}

/// The next token of each document; the end of each, and one token in between, have no label.
fn labels() -> Vec<i32> {
    let mut labels: Vec<i32> = TOKENS[1..].iter().copied().chain([-100]).collect();
    (labels[18], labels[4]) = (-100, -100);
    labels
}

pub fn with_batch<T>(run: impl FnOnce(&Packed) -> T) -> T {
    let positions = positions();
    run(&Packed { tokens: &TOKENS, position_ids: &positions, cu_seqlens: &BORDERS, prefixes: &[] })
}

pub fn values(model: &Model) -> Vec<(String, Vec<f32>)> {
    model.tensors().into_iter().map(|(name, _)| (name.clone(), model.value(&name).unwrap().to_f32_vec())).collect()
}

fn gradients(model: &Model) -> Vec<(String, Vec<f32>)> {
    let gradient = |name: &str| model.gradient(name).unwrap().unwrap_or_else(|| panic!("{name} has no gradient")).to_f32_vec();
    model.tensors().into_iter().map(|(name, _)| (name.clone(), gradient(&name))).collect()
}

pub fn settings() -> Settings {
    Settings { lr: 2e-3, weight_decay: 0.1, clip_norm: Some(0.5), ..Settings::default() }
}

/// One step; the loss is read after the backward pass, as scripts do.
pub fn step(model: &Model, optimizer: &mut AdamW) -> (f32, f64) {
    let loss = with_batch(|batch| model.cross_entropy(batch, &labels(), NORMALIZER, BALANCE)).unwrap().total;
    loss.backward().unwrap();
    let step = optimizer.step().unwrap();
    assert!(step.applied);
    (loss.values()[0], step.grad_norm)
}

/// Steps of the batch above, for other tests.
pub struct Steps;

impl Steps {
    pub fn settings() -> Settings {
        settings()
    }

    pub fn labels() -> Vec<i32> {
        labels()
    }

    pub fn tokens() -> usize {
        TOKENS.len()
    }

    pub fn loss(model: &Model) -> Tensor<f32, 0> {
        with_batch(|batch| model.cross_entropy(batch, &labels(), NORMALIZER, BALANCE)).unwrap().total
    }

    pub fn step(model: &Model, optimizer: &mut AdamW) -> (f32, f64) {
        step(model, optimizer)
    }
}

/// All that a few steps show of a model.
#[derive(Debug, PartialEq)]
struct Trained {
    logits: Vec<f32>,
    logprobs: Vec<f32>,
    entropies: Vec<f32>,
    gradients: Vec<(String, Vec<f32>)>,
    losses: Vec<f32>,
    norms: Vec<f64>,
    values: Vec<(String, Vec<f32>)>,
}

fn train(model: &Model) -> Trained {
    let logits = with_batch(|batch| model.logits(batch)).unwrap().values().to_vec();
    let (logprobs, entropies) = with_batch(|batch| model.logprobs_and_entropy(batch, &labels(), 0.7)).unwrap();
    let loss = with_batch(|batch| model.cross_entropy(batch, &labels(), NORMALIZER, BALANCE)).unwrap().total;
    loss.backward().unwrap();
    let found = gradients(model);
    let mut optimizer = AdamW::new(model.parameters(), settings()).unwrap();
    optimizer.clear_gradients();
    let (losses, norms) = (0..3).map(|_| step(model, &mut optimizer)).unzip();
    let values = values(model);
    Trained {
        logits,
        logprobs: logprobs.values().to_vec(),
        entropies: entropies.values().to_vec(),
        gradients: found,
        losses,
        norms,
        values,
    }
}

/// The length of the difference over the length of `want`.
fn distance(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let length = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
    let apart = length(&mut got.iter().zip(want).map(|(got, want)| f64::from(*got) - f64::from(*want)));
    apart / length(&mut want.iter().map(|want| f64::from(*want))).max(1e-12)
}

#[track_caller]
pub fn assert_near(what: &str, got: &[f32], want: &[f32], by: f64) {
    let apart = distance(got, want);
    println!("{what}: {apart:.2e}, at most {by:.0e}");
    assert!(apart <= by, "{what}: {apart:.2e} of its length from the CPU's, at most {by:.0e}");
}

pub fn on(bench: &Bench, moe: bool, dtype: Dtype) -> Model {
    Model::random_at(&Place::Cuda(bench.device.clone()), config(moe), dtype, 3).unwrap()
}

fn trains_as_on_the_cpu(moe: bool, dtype: Dtype) {
    let Some(bench) = bench() else { return };
    let host = Model::random(config(moe), dtype, 3).unwrap();
    let before = values(&host);
    assert_eq!(values(&on(bench, moe, dtype)), before, "the same seed gives the same weights");
    let want = train(&host);
    let got = bench.run(|_| train(&on(bench, moe, dtype)));
    // f32 sums in another order; bf16 rounds activations and gradients to 8 bits some ten times on the way through two layers.
    let (by, way) = if dtype == Dtype::F32 { (1e-5, 1e-3) } else { (2e-2, 0.3) };
    assert_near("logits", &got.logits, &want.logits, by);
    assert_near("log-probabilities", &got.logprobs, &want.logprobs, by);
    assert_near("entropies", &got.entropies, &want.entropies, by);
    for ((name, got), (_, want)) in got.gradients.iter().zip(&want.gradients) {
        assert_near(&format!("gradient of {name}"), got, want, 3.0 * by);
    }
    for (got, want) in got.losses.iter().zip(&want.losses) {
        assert!((got - want).abs() <= by as f32 * want.abs(), "losses {:?} and {:?}", got, want);
    }
    for (got, want) in got.norms.iter().zip(&want.norms) {
        assert!((got - want).abs() <= 3.0 * by * want, "norms {got} and {want}");
    }
    // Adam divides by the gradient's size: where that is mostly rounding, a weight moves by the rate in either direction. So the
    // difference is held against the way that the weight has gone.
    let moved = |now: &[f32], before: &[f32]| now.iter().zip(before).map(|(now, before)| now - before).collect::<Vec<f32>>();
    for (((name, got), (_, want)), (_, before)) in got.values.iter().zip(&want.values).zip(&before) {
        assert_near(&format!("the way of {name} in three steps"), &moved(got, before), &moved(want, before), way);
    }
}

#[test]
fn a_dense_model_trains_as_on_the_cpu() {
    trains_as_on_the_cpu(false, Dtype::F32);
    trains_as_on_the_cpu(false, Dtype::Bf16);
}

#[test]
fn a_mixture_of_experts_trains_as_on_the_cpu() {
    trains_as_on_the_cpu(true, Dtype::F32);
    trains_as_on_the_cpu(true, Dtype::Bf16);
}

#[test]
fn a_document_has_the_same_bits_alone_and_recomputed() {
    let Some(bench) = bench() else { return };
    for (moe, dtype) in [(false, Dtype::Bf16), (true, Dtype::F32)] {
        let model = on(bench, moe, dtype);
        let packed = with_batch(|batch| model.logits(batch)).unwrap();
        let alone = Packed { tokens: &TOKENS[19..], position_ids: &positions()[19..], cu_seqlens: &[0, 7], prefixes: &[] };
        assert!(model.logits(&alone).unwrap().values() == &packed.values()[19 * 67..], "{dtype}");
        let gradients_of = |recompute: bool| {
            model.set_recompute(recompute);
            model.parameters().iter().for_each(|parameter| parameter.clear_gradient());
            with_batch(|batch| model.cross_entropy(batch, &labels(), NORMALIZER, BALANCE)).unwrap().total.backward().unwrap();
            gradients(&model)
        };
        assert!(gradients_of(false) == gradients_of(true), "{dtype}: recomputation changes no bit");
        let loss = || with_batch(|batch| model.cross_entropy(batch, &labels(), NORMALIZER, BALANCE)).unwrap().total;
        let (early, late) = (loss(), loss());
        let value = early.values()[0];
        early.backward().unwrap();
        late.backward().unwrap();
        assert!(late.values()[0] == value, "{dtype}: a loss is the same before and after its backward pass");
    }
}

#[test]
fn a_shared_prompt_changes_no_bit_of_what_follows() {
    let Some(bench) = bench() else { return };
    let (prompt, answers) = ([5, 61, 3, 3, 17, 40, 66], [[0, 12, 5], [9, 31, 5], [28, 44, 2]]);
    let (mut whole, mut shared) = (TokenBatch { cu_seqlens: vec![0], ..TokenBatch::default() }, TokenBatch::default());
    shared.cu_seqlens.push(0);
    for (index, answer) in answers.iter().enumerate() {
        let tokens = [&prompt[..], answer].concat();
        let labels: Vec<i32> = [&[-100; 6][..], answer, &[-100]].concat();
        whole.push(&tokens, &labels, None);
        shared.push(&tokens, &labels, (index > 0).then_some(0));
    }
    assert_eq!((whole.tokens.len(), shared.tokens.len()), (30, 18));
    for (moe, dtype) in [(false, Dtype::Bf16), (true, Dtype::F32)] {
        let model = on(bench, moe, dtype);
        let [(alone, want), (together, got)] = [&whole, &shared].map(|batch| {
            clear_gradients(&model);
            let TokenBatch { tokens, position_ids, cu_seqlens, prefixes, labels, .. } = batch;
            let logprobs = model.logprobs(&Packed { tokens, position_ids, cu_seqlens, prefixes }, labels, 1.0).unwrap();
            logprobs.backward_with(Buffer::copy_of(&vec![1.0; tokens.len()])).unwrap();
            (logprobs.values().iter().copied().filter(|value| *value != 0.0).collect::<Vec<_>>(), gradients(&model))
        });
        assert_eq!(alone.len(), 9);
        assert!(alone == together, "{dtype}");
        for ((name, got), (_, want)) in got.iter().zip(&want) {
            assert_near(&format!("gradient of {name}"), got, want, if dtype == Dtype::F32 { 1e-5 } else { 6e-2 });
        }
    }
}

/// What some steps show of a model.
struct SmallSteps {
    losses: Vec<f32>,
    norms: Vec<f64>,
    values: Vec<(String, Vec<f32>)>,
}

/// Steps of two micro-batches each, whose tokens and documents change: losses, norms, and the weights at the end. `first` reads each
/// loss before it runs backwards.
fn small_steps(model: &Model, first: bool) -> SmallSteps {
    let mut optimizer = AdamW::new(model.parameters(), settings()).unwrap();
    let (mut losses, mut norms) = (Vec::new(), Vec::new());
    for step in 0..5 {
        if step == 3 && model.adapter().is_none() {
            // Gradients come to lie elsewhere.
            model.set_trains(false);
            model.set_trains(true);
        }
        let parts: Vec<_> = (0..2)
            .map(|part| {
                let turn = 2 * step + part;
                let tokens: Vec<i32> = (0..TOKENS.len()).map(|at| TOKENS[(at + turn) % TOKENS.len()]).collect();
                let middle = 15 + turn as u32 % 3;
                let positions: Vec<i32> = (0..middle as i32).chain(0..(TOKENS.len() as u32 - middle) as i32).collect();
                let mut labels: Vec<i32> = tokens[1..].iter().copied().chain([-100]).collect();
                labels[middle as usize - 1] = -100;
                let borders = [0, middle, TOKENS.len() as u32];
                let batch = Packed { tokens: &tokens, position_ids: &positions, cu_seqlens: &borders, prefixes: &[] };
                let loss = model.cross_entropy(&batch, &labels, NORMALIZER + turn as f32, BALANCE).unwrap().total;
                if first {
                    loss.data().force().unwrap();
                }
                loss.backward().unwrap();
                loss
            })
            .collect();
        norms.push(optimizer.step().unwrap().grad_norm);
        losses.extend(parts.iter().map(|loss| loss.values()[0]));
    }
    SmallSteps { losses, norms, values: values(model) }
}

#[test]
fn small_steps_are_one_call_and_have_the_bits_of_others() {
    let Some(bench) = bench() else { return };
    let plain = lora(&["q_proj", "down_proj"], false);
    let (dora, torn) = (lora(&["all-linear", "lm_head"], true), lora(&["q_proj", "lm_head", "embed_tokens"], false));
    for (dtype, recompute, lora) in [
        (Dtype::Bf16, false, None),
        (Dtype::F32, true, None),
        (Dtype::Bf16, false, Some(plain)),
        (Dtype::Bf16, true, Some(dora)),
        (Dtype::F32, false, Some(torn)),
    ] {
        let made = || {
            let model = on(bench, false, dtype);
            model.set_recompute(recompute);
            if let Some(lora) = &lora {
                model.adapt(lora.clone(), 5).unwrap();
            }
            model
        };
        let singly = small_steps(&made(), true);
        let before = bench.graph_launches();
        let captured = small_steps(&made(), false);
        let what = format!("{dtype}, recompute {recompute}, adapter {lora:?}");
        assert_eq!((&captured.losses, &captured.norms), (&singly.losses, &singly.norms), "{what}: losses and norms");
        assert!(captured.values == singly.values, "{what}: weights");
        // All but the first micro-batch, and the first that adds, which find no graph.
        let launches = bench.graph_launches().zip(before).map(|(after, before)| after - before);
        assert!(launches.is_none_or(|launches| launches >= 8), "{launches:?} launches of graphs");
    }
}

#[test]
fn a_step_waits_for_nothing_before_its_end() {
    let Some(bench) = bench() else { return };
    for moe in [false, true] {
        let model = on(bench, moe, Dtype::Bf16);
        let mut optimizer = AdamW::new(model.parameters(), settings()).unwrap();
        for turn in 0..4 {
            let (loss, waits) = bench.waits_in(|| {
                let loss = Steps::loss(&model);
                loss.backward().unwrap();
                loss
            });
            // The first step of a model brings kernels and memory.
            assert!(turn == 0 || waits.is_none_or(|waits| waits == 0), "turn {turn}, experts {moe}: {waits:?} waits before the update");
            let (_, waits) = bench.waits_in(|| optimizer.step().unwrap());
            assert!(turn == 0 || waits.is_none_or(|waits| waits == 1), "turn {turn}, experts {moe}: {waits:?} waits for the norm");
            let (_, waits) = bench.waits_in(|| loss.values()[0]);
            assert!(turn == 0 || waits.is_none_or(|waits| waits <= 2), "turn {turn}, experts {moe}: {waits:?} waits for the loss");
        }
    }
}

#[test]
fn training_goes_on_to_the_bit_from_files_and_from_an_image() {
    let Some(bench) = bench() else { return };
    let cases = [
        (true, Dtype::Bf16, Dtype::F32, None, ImageTo::SpareRoom),
        (false, Dtype::F32, Dtype::F32, None, ImageTo::Host),
        (false, Dtype::Bf16, Dtype::Bf16, None, ImageTo::Host),
        (true, Dtype::F32, Dtype::F32, Some(0.9), ImageTo::SpareRoom),
        (false, Dtype::Bf16, Dtype::Bf16, Some(0.9), ImageTo::Host),
    ];
    for (moe, dtype, moments, momentum, to) in cases {
        let model = on(bench, moe, dtype);
        let settings = Settings { moments, momentum, ..settings() };
        let mut optimizer = AdamW::new(model.parameters(), settings).unwrap().naming(model.tensor_rows());
        step(&model, &mut optimizer);
        // A gradient that waits for its update is part of the state.
        with_batch(|batch| model.cross_entropy(batch, &labels(), NORMALIZER, BALANCE)).unwrap().total.backward().unwrap();
        let (image, state) = (model.image(to).unwrap(), optimizer.state(to).unwrap());
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str| folder.path().join(name);
        image.save(&place("model"), None, &[]).unwrap();
        image.save_training_state(&place("training")).unwrap();
        state.save(&place("optimizer")).unwrap();
        let rest = |model: &Model, optimizer: &mut AdamW| (step(model, optimizer), step(model, optimizer), values(model));
        let want = rest(&model, &mut optimizer);

        let again = Model::load_at(model.place(), &place("model"), Some(dtype), true, &mut |remark| panic!("{remark}")).unwrap();
        again.load_training_state(&place("training")).unwrap();
        let mut other = AdamW::new(again.parameters(), settings).unwrap().naming(again.tensor_rows());
        other.load(&place("optimizer")).unwrap();
        assert!(rest(&again, &mut other) == want, "{dtype}: from files");

        model.copy_from(&image).unwrap();
        optimizer.copy_from(&state).unwrap();
        assert!(rest(&model, &mut optimizer) == want, "{dtype}: from an image");
    }
}

#[test]
fn a_checkpoint_is_copied_out_while_training_goes_on() {
    let Some(bench) = bench() else { return };
    let device = bench.apart();
    let model = Model::random_at(&Place::Cuda(device.clone()), config(false), Dtype::Bf16, 3).unwrap();
    let mut optimizer = AdamW::new(model.parameters(), settings()).unwrap().naming(model.tensor_rows());
    step(&model, &mut optimizer);
    let folder = tempfile::tempdir().unwrap();
    let save = |image: &Model, state: &AdamWState, name: &str| -> perilune::error::Result<()> {
        let place = |part: &str| folder.path().join(name).join(part);
        image.save(&place("model"), None, &[])?;
        image.save_training_state(&place("training"))?;
        state.save(&place("optimizer"))
    };
    save(&model.image(ImageTo::Host).unwrap(), &optimizer.state(ImageTo::Host).unwrap(), "want").unwrap();
    // The boundary waits for nothing.
    let ((image, state, mark), waits) = bench
        .waits_in(|| (model.image(ImageTo::SpareRoom).unwrap(), optimizer.state(ImageTo::SpareRoom).unwrap(), Mark::now(&device).unwrap()));
    assert!(waits.is_none_or(|waits| waits == 0), "{waits:?} waits");
    std::thread::scope(|scope| {
        let save = &save;
        let writer = scope.spawn(move || mark.work_behind(|| save(&image, &state, "got")));
        step(&model, &mut optimizer);
        step(&model, &mut optimizer);
        writer.join().unwrap().unwrap();
    });
    for file in ["model/model", "training/training_state", "optimizer/adamw"] {
        let [want, got] = ["want", "got"].map(|name| std::fs::read(folder.path().join(name).join(format!("{file}.safetensors"))).unwrap());
        assert!(want == got, "{file} is another one");
    }
}

#[test]
fn what_a_checkpoint_holds_does_not_depend_on_the_place() {
    let Some(bench) = bench() else { return };
    for (moe, dtype) in [(false, Dtype::F32), (false, Dtype::Bf16), (true, Dtype::F32), (true, Dtype::Bf16)] {
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str| folder.path().join(name);
        let write = |model: &Model, optimizer: &AdamW, name: &str| {
            let image = model.image(ImageTo::Host).unwrap();
            image.save(&place(&format!("{name}/model")), None, &[]).unwrap();
            image.save_training_state(&place(&format!("{name}/training"))).unwrap();
            optimizer.state(ImageTo::Host).unwrap().save(&place(&format!("{name}/optimizer"))).unwrap();
        };
        let read = |at: &Place, name: &str| {
            let model = Model::load_at(at, &place(&format!("{name}/model")), Some(dtype), true, &mut |remark| panic!("{remark}")).unwrap();
            model.load_training_state(&place(&format!("{name}/training"))).unwrap();
            let mut optimizer = AdamW::new(model.parameters(), settings()).unwrap().naming(model.tensor_rows());
            optimizer.load(&place(&format!("{name}/optimizer"))).unwrap();
            (model, optimizer)
        };
        let model = Model::random(config(moe), dtype, 3).unwrap();
        let mut optimizer = AdamW::new(model.parameters(), settings()).unwrap().naming(model.tensor_rows());
        for _ in 0..2 {
            step(&model, &mut optimizer);
        }
        // A gradient that waits for its update goes along.
        Steps::loss(&model).backward().unwrap();
        write(&model, &optimizer, "host");
        let (there, mut optimizer_there) = read(&Place::Cuda(bench.device.clone()), "host");
        write(&there, &optimizer_there, "device");
        let (back, mut optimizer_back) = read(&Place::Host, "device");
        write(&back, &optimizer_back, "back");
        for file in ["model/model", "training/training_state", "optimizer/adamw"] {
            let bytes = |name: &str| std::fs::read(place(&format!("{name}/{file}.safetensors"))).unwrap();
            assert!(bytes("host") == bytes("device") && bytes("host") == bytes("back"), "{moe} {dtype}: {file} differs");
        }
        // From there on both go nearly the same way, and the host exactly the one that it would have gone.
        let by = if dtype == Dtype::F32 { 1e-4 } else { 2e-2 };
        for _ in 0..2 {
            let (want, _) = step(&model, &mut optimizer);
            let (near, _) = step(&there, &mut optimizer_there);
            assert_eq!(step(&back, &mut optimizer_back).0, want, "{moe} {dtype}");
            assert!((near - want).abs() <= by * want.abs(), "{moe} {dtype}: {near} on the device, {want} on the host");
        }
    }
}

#[test]
fn a_warm_step_asks_the_driver_for_no_memory() {
    let Some(bench) = bench() else { return };
    let device = bench.apart();
    let model = Model::random_at(&Place::Cuda(device.clone()), config(false), Dtype::Bf16, 3).unwrap();
    let mut optimizer = AdamW::new(model.parameters(), settings()).unwrap();
    // The moments come with the first step, and the second is the first to have them beside its activations.
    for _ in 0..2 {
        step(&model, &mut optimizer);
    }
    let warm = device.memory_statistics();
    for _ in 0..3 {
        step(&model, &mut optimizer);
    }
    let after = device.memory_statistics();
    assert_eq!(after.driver_calls, warm.driver_calls);
    assert_eq!((after.live_bytes, after.live_bytes_max), (warm.live_bytes, warm.live_bytes_max), "nothing is left over, nothing grows");
}

#[test]
fn a_gradient_that_is_not_finite_changes_nothing() {
    let Some(bench) = bench() else { return };
    let model = on(bench, false, Dtype::F32);
    let mut optimizer = AdamW::new(model.parameters(), settings()).unwrap();
    step(&model, &mut optimizer);
    let before = values(&model);
    let loss = with_batch(|batch| model.cross_entropy(batch, &labels(), f32::MIN_POSITIVE, 0.0)).unwrap().total;
    loss.backward().unwrap();
    let result = optimizer.step().unwrap();
    assert!(!result.applied && !result.grad_norm.is_finite());
    assert_eq!((values(&model), optimizer.steps(), optimizer.skipped()), (before, 1, 1));
    step(&model, &mut optimizer);
    assert_eq!(optimizer.steps(), 2);
}

/// PyTorch's numbers (tests/golden): the loss and every gradient of the first batch, then steps of AdamW on a cosine schedule; all
/// twenty of them on a GPU, the first on the emulator.
#[test]
fn training_follows_the_reference() {
    let Some(bench) = bench() else { return };
    for name in ["train_dense", "train_moe"] {
        let training = Training::open(name);
        let golden = &training.golden;
        let place = Place::Cuda(bench.device.clone());
        let model = Model::load_at(&place, golden.folder(), Some(Dtype::F32), true, &mut |remark| panic!("{remark}")).unwrap();
        let loss = Training::backward(&model, &training.batches[0]);
        golden.check("loss", loss.total.values());
        if let Some(balance) = loss.load_balance {
            golden.check("aux_loss", balance.values());
        }
        check_gradients(golden, &model);
        clear_gradients(&model);
        let steps = if bench.is_emulated() { 2 } else { training.batches.len() };
        let [losses, norms, _] = training.run(&model, steps);
        // The fixture's own tolerance of a loss is about this; later steps carry the rounding of the earlier ones on.
        for (got, want) in [(losses, golden.floats("step_loss")), (norms, golden.floats("step_grad_norm"))] {
            for (step, (got, want)) in got.iter().zip(&want).enumerate() {
                assert!((got - want).abs() <= 1e-3 * want.abs(), "{name}, step {step}: {got} and {want}");
            }
        }
    }
}

#[test]
fn what_has_no_form_on_a_device_is_refused_with_a_remedy() {
    let Some(bench) = bench() else { return };
    let model = on(bench, false, Dtype::F32);
    let merge = OnlineMerge::new(MergeSettings { method: Method::Ties, alpha: 0.1, reserve: 0.5, rescale: false, every: 1 }, 1, Vec::new());
    let error = AdamW::new(model.parameters(), settings()).unwrap().merging(merge.unwrap()).err().unwrap().to_string();
    assert!(error.contains("a model on the CPU"), "{error}");
    let error = Place::named("gpu").err().unwrap().to_string();
    assert!(error.contains("\"cuda:1\""), "{error}");
    let error = Place::named("cuda:77").err().unwrap().to_string();
    assert!(error.contains("cuda:77"), "{error}");
}
