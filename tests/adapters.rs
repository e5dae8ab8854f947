//! Adapters and heads in runs and on disk: a run with adapters that is killed and resumed ends as one that was not; models
//! that score, averages, and what an adapter's training keeps in memory.

mod fixtures;
#[path = "fixtures/runs.rs"]
mod runs;

use fixtures::{Batch, Golden};
use perilune::kernels::buffer::live_bytes;
use perilune::kernels::element::Dtype;
use perilune::model::presets::preset;
use perilune::model::{Lora, Model};
use perilune::tensor::AnyTensor;
use perilune::tensor::autograd::with_recording;
use perilune::train::optimizer::{AdamW, Settings};
use runs::{Place, succeed};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

const SCRIPT: &str = "adapters.lua";

/// Held by tests that make models, since one of them measures what is allocated.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn a_run_with_adapters_killed_at_any_boundary_ends_as_if_it_had_not_been() {
    let mixture = ["--method", "ties", "--every", "4", "--dtype", "bf16", "--experts", "4", "--dora"];
    for args in [&["--method", "dare"][..], &mixture] {
        let boundaries = Place::new().kill_at_each_boundary(SCRIPT, args);
        // Six, three and four steps.
        assert!(boundaries >= 13, "only {boundaries} boundaries");
    }
}

/// What a checkpoint of a run holds of an adapted model: no base, as long as nothing has changed it.
#[test]
fn a_checkpoint_holds_the_adapter_alone_until_its_base_changes() {
    let _alone = alone();
    let place = Place::new();
    succeed(&mut place.start(SCRIPT, "whole", &[]));
    let run = place.folder("whole");
    let checkpoints = perilune::checkpoint::catalog::list(&run.join("checkpoints")).unwrap();
    let holds = |prefix: &str, part: &str| {
        let (name, _) =
            checkpoints.iter().rfind(|(name, _)| name.starts_with(prefix)).unwrap_or_else(|| panic!("no checkpoint of {prefix}"));
        run.join("checkpoints").join(name).join(part).is_dir()
    };
    for prefix in ["train", "merged"] {
        assert!(holds(prefix, "adapters/policy") && !holds(prefix, "models/policy") && holds(prefix, "models/full"), "{prefix}");
    }
    assert!(holds("again", "adapters/policy") && holds("again", "models/policy") && !holds("again", "models/slow"));

    // What it saved is the model that its adapter gives on its changed base.
    let merged = fixtures::load(&run.join("final"), Dtype::F32);
    let last = checkpoints.iter().rfind(|(name, _)| name.starts_with("again")).map(|(name, _)| run.join("checkpoints").join(name)).unwrap();
    let adapted = Model::load(&last.join("models/policy"), None, false, &mut |_| ()).unwrap();
    adapted.load_adapter(&run.join("adapter"), false, &mut |_| ()).unwrap();
    let batch = Batch::new(&[[70, 71, 72, 73]]);
    let pairs = [&merged, &adapted].map(|model| model.logits(&batch.packed()).unwrap().values().to_vec());
    fixtures::check("saved and adapted", &pairs[0], &pairs[1], 1e-4, 1e-4);
}

fn lora(rank: usize) -> Lora {
    Lora { rank, ..Lora::default() }
}

/// The base of an adapter has neither gradients nor moments nor masters: what training keeps is that of the adapter.
#[test]
fn training_an_adapter_keeps_nothing_for_its_base() {
    let _alone = alone();
    let config = preset("small").unwrap();
    let batch = Batch::new(&[(0..64).map(|i| (i * 37) % 1000).collect::<Vec<i32>>()]);
    let labels = batch.next_tokens();
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let kept = |adapt: bool| {
            let start = live_bytes();
            let model = Model::random(config.clone(), dtype, 3).unwrap();
            // As a model that is loaded frozen: bf16 without masters.
            let place = tempfile::tempdir().unwrap();
            model.save(place.path().join("m").as_path(), None, &[]).unwrap();
            drop(model);
            let model = Model::load(&place.path().join("m"), Some(dtype), !adapt, &mut |_| ()).unwrap();
            if adapt {
                model.adapt(lora(8), 1).unwrap();
            }
            let weights = live_bytes() - start;
            let mut optimizer = AdamW::new(model.parameters(), Settings::default()).unwrap();
            model.cross_entropy(&batch.packed(), &labels, 63.0, 0.0).unwrap().total.backward().unwrap();
            let gradients = live_bytes() - start - weights;
            optimizer.step().unwrap();
            (model.count(), model.trainable(), weights, gradients, live_bytes() - start - weights)
        };
        let (count, trainable, weights, gradients, state) = kept(true);
        let (_, _, full_weights, full_gradients, full_state) = kept(false);
        let mb = |bytes: usize| bytes as f64 / 1e6;
        println!(
            "small in {dtype}: {trainable} of {count} train; weights {:.1} MB, gradients {:.1} MB, after a step {:.1} MB; full: {:.1}, {:.1}, {:.1} MB",
            mb(weights),
            mb(gradients),
            mb(state),
            mb(full_weights),
            mb(full_gradients),
            mb(full_state)
        );
        // Factors of rank 8 lie in panels of 32 outputs: A is padded four times. Beyond that, a gradient or two moments each.
        assert!(gradients < 4 * 4 * trainable + (1 << 20), "{gradients} bytes of gradients for {trainable} parameters");
        assert!(state < 2 * 4 * 4 * trainable + (1 << 20), "{state} bytes of state for {trainable} parameters");
        assert!(full_gradients > 10 * gradients && full_state > 10 * state);
    }
}

/// Averages and copies of single tensors.
#[test]
fn averages_are_those_of_the_weights_and_of_masters_in_bf16() {
    let _alone = alone();
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let model = |range: f64| {
            let config = perilune::model::config::Config { initializer_range: range, ..preset("tiny").unwrap() };
            Model::random(config, dtype, 3).unwrap()
        };
        let (a, b) = (model(0.02), model(0.5));
        let name = "model.layers.0.mlp.up_proj.weight";
        let values = |model: &Model| model.value(name).unwrap().to_f32_vec();
        let (before, other) = (values(&a), values(&b));
        a.average(&b, 0.25).unwrap();
        let want: Vec<f32> = before.iter().zip(&other).map(|(a, b)| 0.75 * a + 0.25 * b).collect();
        // Two roundings of values below 3, also in bf16, which keeps masters.
        fixtures::check("average", &values(&a), &want, 6e-7, 0.0);
        a.average(&b, 1.0).unwrap();
        assert!(values(&a) == other && values(&b) == other);
        let again = a.version();
        a.average(&a, 0.5).unwrap();
        assert_eq!(a.version(), again);

        let value = AnyTensor::new(a.value(name).unwrap().shape(), perilune::kernels::buffer::Buffer::copy_of(&before)).unwrap();
        a.set_value(name, &value).unwrap();
        assert!(values(&a) == before);
        assert!(a.set_value("model.norm.weight", &value).unwrap_err().to_string().contains("model.norm.weight"));
        assert!(a.average(&b, f64::NAN).is_err());
    }
    let error = Model::random(preset("tiny").unwrap(), Dtype::F32, 1).unwrap();
    let other = Model::random(preset("tiny").unwrap(), Dtype::Bf16, 1).unwrap();
    assert!(error.average(&other, 0.5).unwrap_err().to_string().contains("bf16"));
    other.adapt(lora(2), 1).unwrap();
    let plain = Model::random(preset("tiny").unwrap(), Dtype::Bf16, 1).unwrap();
    assert!(plain.average(&other, 0.5).unwrap_err().to_string().contains("adapter"));
}

/// The score of each document against the product of its last hidden state with the head, and the gradient of the head and
/// of a weight below it against finite differences.
#[test]
fn scores_come_from_last_tokens_and_differentiate() {
    let _alone = alone();
    for name in ["dense_tied", "moe_norm_true"] {
        let golden = Golden::open(name);
        let folder = golden.folder().join(golden.meta["checkpoint"].as_str().unwrap());
        let model = Model::load_scoring(&perilune::tensor::Place::Host, &folder, Some(Dtype::F32), true, 7, &mut |_| ()).unwrap();
        let batch = Batch::new(&[vec![3, 1, 4, 1, 5], vec![9], vec![2, 6, 5]]);
        let scores = || model.scores(&batch.packed()).unwrap();
        let head = model.value("score.weight").unwrap();
        assert_eq!(head.shape(), [1, model.config().hidden]);
        let states = with_recording(false, || model.hidden_states(&batch.packed(), model.config().layers).unwrap()).to_f32_vec();
        let hidden = model.config().hidden;
        let want: Vec<f32> = [4, 5, 8]
            .map(|row| {
                states[row * hidden..(row + 1) * hidden]
                    .iter()
                    .zip(head.to_f32_vec())
                    .map(|(a, b)| f64::from(*a) * f64::from(b))
                    .sum::<f64>() as f32
            })
            .to_vec();
        fixtures::check(&format!("{name}/scores"), scores().values(), &want, 1e-5, 1e-5);

        // transformers 4.57.6, AutoModelForSequenceClassification with num_labels 1 and score.weight[i] = sin(i + 1), in f64.
        let transformers = if name == "dense_tied" { [0.762823, 0.205404, 2.581228] } else { [5.091766, 19.229769, 8.405635] };
        let sines: Vec<f32> = (1..=hidden).map(|i| (i as f64).sin() as f32).collect();
        let set = |values: &[f32]| {
            let value = AnyTensor::new(&[1, hidden], perilune::kernels::buffer::Buffer::copy_of(values)).unwrap();
            model.set_value("score.weight", &value).unwrap();
        };
        set(&sines);
        fixtures::check(&format!("{name}/scores of transformers"), scores().values(), &transformers, 1e-4, 1e-5);
        set(&head.to_f32_vec());

        // The sum of the squares: its upstream gradient is twice the score.
        let y = scores();
        let mut upstream = perilune::kernels::buffer::Buffer::copy_of(y.values());
        upstream.iter_mut().for_each(|value| *value *= 2.0);
        y.backward_with(upstream).unwrap();
        for (tensor, at) in [
            ("score.weight", 5),
            ("model.norm.weight", 3),
            ("model.layers.0.self_attn.q_proj.weight", 17),
            ("model.embed_tokens.weight", 5 * hidden + 1),
        ] {
            let value = model.value(tensor).unwrap();
            let gradient = model.gradient(tensor).unwrap().unwrap().to_f32_vec()[at];
            let loss = |step: f32| {
                let mut moved = value.to_f32_vec();
                moved[at] += step;
                let moved = AnyTensor::new(value.shape(), perilune::kernels::buffer::Buffer::copy_of(&moved)).unwrap();
                model.set_value(tensor, &moved).unwrap();
                scores().values().iter().map(|score| f64::from(*score).powi(2)).sum::<f64>()
            };
            let step = 1e-2;
            let slope = (loss(step) - loss(-step)) / (2.0 * f64::from(step));
            loss(0.0);
            // Curvature and rounding of an f32 forward pass.
            assert!((f64::from(gradient) - slope).abs() < 2e-3 + 2e-2 * slope.abs(), "{name} {tensor}: {gradient}, by differences {slope}");
        }

        let place = tempfile::tempdir().unwrap();
        model.save(&place.path().join("saved"), None, &[]).unwrap();
        let config: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(place.path().join("saved/config.json")).unwrap()).unwrap();
        let architecture = if name == "dense_tied" { "Qwen2ForSequenceClassification" } else { "Qwen2MoeForSequenceClassification" };
        assert_eq!(config["architectures"], serde_json::json!([architecture]));
        let again = fixtures::load(&place.path().join("saved"), Dtype::F32);
        assert!(again.scores(&batch.packed()).unwrap().values() == scores().values());
        refuses(&model, &again, &batch, &folder);
    }
}

/// What a model that scores cannot do, and a model of language neither.
fn refuses(model: &Model, again: &Model, batch: &Batch, folder: &Path) {
    let labels = batch.next_tokens();
    for message in [
        model.logits(&batch.packed()).unwrap_err().to_string(),
        model.logprobs(&batch.packed(), &labels, 1.0).unwrap_err().to_string(),
        model.cross_entropy(&batch.packed(), &labels, 1.0, 0.0).err().unwrap().to_string(),
    ] {
        assert!(message.contains("scores"), "{message}");
    }
    let language = fixtures::load(folder, Dtype::F32);
    assert!(language.scores(&batch.packed()).unwrap_err().to_string().contains("`head`"));
    let empty = Batch { cu_seqlens: vec![0, 2, 2], ..Batch::new(&[[1, 2]]) };
    assert!(model.scores(&empty.packed()).unwrap_err().to_string().contains("document 2"));
    // The head of an adapted model that scores is saved whole, as PEFT does.
    again.adapt(lora(2), 1).unwrap();
    assert_eq!(again.adapter().unwrap().modules_to_save, ["score"]);
    assert!(again.trainable() > again.config().hidden);
}

/// Logits take part in losses that scripts write, for all rows or some, and are constants where nothing is recorded.
#[test]
fn logits_differentiate() {
    let _alone = alone();
    let golden = Golden::open("dense_untied");
    let model = golden.model(Dtype::F32);
    let batch = Batch::new(&golden.integer_rows("input_ids"));
    let labels = batch.next_tokens();
    assert!(with_recording(false, || model.logits(&batch.packed())).unwrap().node().is_none());
    let rows: Vec<usize> = (0..labels.len()).filter(|row| labels[*row] != fixtures::IGNORE).collect();
    let names = ["lm_head.weight", "model.norm.weight", "model.layers.0.mlp.down_proj.weight"];
    let gradients = |backward: &dyn Fn()| {
        fixtures::clear_gradients(&model);
        backward();
        names.map(|name| fixtures::gradient(&model, name))
    };
    let fused = gradients(&|| model.cross_entropy(&batch.packed(), &labels, 1.0, 0.0).unwrap().total.backward().unwrap());
    // The derivative of cross entropy in the logits, from its definition: softmax minus one at the label.
    let upstream = |logits: &[f32], rows: &[usize]| {
        let vocab = logits.len() / rows.len();
        let mut d = Vec::with_capacity(logits.len());
        for (row, logits) in rows.iter().zip(logits.chunks_exact(vocab)) {
            let top = logits.iter().copied().fold(f32::MIN, f32::max);
            let sum: f32 = logits.iter().map(|logit| (logit - top).exp()).sum();
            let label = labels[*row];
            let real = f32::from(u8::from(label != fixtures::IGNORE));
            d.extend(logits.iter().enumerate().map(|(i, logit)| real * (logit - top).exp() / sum - f32::from(u8::from(i as i32 == label))));
        }
        perilune::kernels::buffer::Buffer::copy_of(&d)
    };
    let all: Vec<usize> = (0..labels.len()).collect();
    for rows in [&all, &rows] {
        let composed = gradients(&|| {
            let logits =
                if rows.len() == all.len() { model.logits(&batch.packed()) } else { model.logits_of(&batch.packed(), rows) }.unwrap();
            let d = upstream(logits.values(), rows);
            logits.backward_with(d).unwrap();
        });
        for ((name, fused), composed) in names.iter().zip(&fused).zip(&composed) {
            fixtures::check(name, composed, fused, 1e-4, 1e-3);
        }
    }
}
