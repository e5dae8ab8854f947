//! Adapters on the device: PEFT's numbers (tests/golden), and training beside the CPU's: plain and with DoRA, on projections, experts,
//! embedding and head; and checkpoints that go from one place to the other.

use crate::fixtures::{Batch, Golden, clear_gradients, gradient, targets};
use crate::model::{Steps, assert_near, config, on, step, with_batch};
use crate::{Bench, bench, uniform};
use perilune::kernels::buffer::Buffer;
use perilune::kernels::element::Dtype;
use perilune::model::{Lora, Model};
use perilune::tensor::place::ImageTo;
use perilune::tensor::{AnyTensor, Place};
use perilune::train::optimizer::AdamW;
use std::path::Path;

const NAMES: [&str; 8] =
    ["lora", "lora_moe", "lora_rslora_qv", "lora_dora", "lora_dora_moe", "lora_dora_head", "lora_embedding", "lora_embedding_tied"];

pub fn lora(targets: &[&str], dora: bool) -> Lora {
    let targets = targets.iter().map(|target| target.to_string()).collect();
    Lora { rank: 3, alpha: 6.0, dora, targets, ..Lora::default() }
}

/// Of every kind that there is: (experts, adapter).
pub fn kinds() -> Vec<(bool, Lora)> {
    vec![
        (false, Lora { modules_to_save: vec!["norm".into()], ..lora(&["q_proj", "v_proj", "down_proj", "gate_proj"], false) }),
        (false, lora(&["all-linear", "lm_head", "embed_tokens"], false)),
        (false, lora(&["q_proj", "o_proj", "up_proj", "down_proj", "lm_head"], true)),
        (true, lora(&["all-linear", "lm_head", "embed_tokens"], false)),
        (true, lora(&["all-linear", "lm_head"], true)),
    ]
}

fn at(bench: &Bench) -> Place {
    Place::Cuda(bench.device.clone())
}

/// An adapter that has learnt something: every factor and length is another than it began as.
fn moved(model: &Model, lora: &Lora) {
    model.adapt(lora.clone(), 5).unwrap();
    for (index, (name, shape)) in model.tensors().into_iter().filter(|(name, _)| name.contains(".lora_")).enumerate() {
        let noise = uniform::<f32>(index as u64, shape.iter().product());
        let values: Vec<f32> =
            model.value(&name).unwrap().to_f32_vec().iter().zip(&noise).map(|(value, noise)| value + 0.1 * noise).collect();
        model.set_value(&name, &AnyTensor::new(&shape, Buffer::copy_of(&values)).unwrap()).unwrap();
    }
}

fn logits(model: &Model) -> Vec<f32> {
    with_batch(|batch| model.logits(batch)).unwrap().values().to_vec()
}

#[test]
fn an_adapter_gives_the_reference_numbers() {
    let Some(bench) = bench() else { return };
    for name in NAMES {
        let golden = Golden::open(name);
        let batch = Batch::new(&golden.integer_rows("input_ids"));
        let labels = batch.shift(&golden.integers("labels"));
        let checkpoint = golden.folder().join(golden.meta["checkpoint"].as_str().unwrap());
        let model = Model::load_at(&at(bench), &checkpoint, Some(Dtype::F32), true, &mut |remark| panic!("{remark}")).unwrap();
        model.load_adapter(golden.folder(), true, &mut |remark| panic!("{remark}")).unwrap();
        let logits = |model: &Model| model.logits(&batch.packed()).unwrap().values().to_vec();
        let at_run_time = logits(&model);
        golden.check("logits_adapter", &at_run_time);
        golden.check("logits_base", &logits(&model.base().unwrap()));
        let loss = model.cross_entropy(&batch.packed(), &labels, targets(&labels) as f32, 0.0).unwrap().total;
        loss.backward().unwrap();
        golden.check("loss", loss.values());
        for factor in golden.names("grad.") {
            golden.check(&format!("grad.{factor}"), &gradient(&model, &factor));
        }
        let folder = tempfile::tempdir().unwrap();
        model.save_adapter(&folder.path().join("adapter"), None, None).unwrap();
        let read = |folder: &Path| std::fs::read(folder.join("adapter_model.safetensors")).unwrap();
        let host = golden.model(Dtype::F32);
        host.load_adapter(golden.folder(), true, &mut |_| ()).unwrap();
        host.save_adapter(&folder.path().join("host"), None, None).unwrap();
        assert!(read(&folder.path().join("adapter")) == read(&folder.path().join("host")), "{name}: the same folder from both places");
        if name == "lora_embedding_tied" {
            assert!(model.merge().unwrap_err().to_string().contains("save the model"));
            continue;
        }
        model.merge().unwrap();
        golden.check("logits_merged", &logits(&model));
        model.unmerge().unwrap();
        assert!(logits(&model) == at_run_time, "{name}: unmerging goes back to the bit");
    }
}

#[test]
fn adapters_of_every_kind_train_as_on_the_cpu() {
    let Some(bench) = bench() else { return };
    for ((moe, lora), dtype) in kinds().into_iter().flat_map(|kind| [(kind.clone(), Dtype::F32), (kind, Dtype::Bf16)]) {
        let run = |model: &Model| {
            moved(model, &lora);
            let start = logits(model);
            let logprobs = with_batch(|batch| model.logprobs(batch, &Steps::labels(), 0.7)).unwrap();
            let tokens = Steps::tokens();
            logprobs.backward_with(Buffer::copy_of(&uniform::<f32>(9, tokens))).unwrap();
            let names = model.tensors().into_iter().map(|(name, _)| name);
            let gradients: Vec<_> = names.filter_map(|name| Some((model.gradient(&name).unwrap()?.to_f32_vec(), name))).collect();
            clear_gradients(model);
            let mut optimizer = AdamW::new(model.parameters(), Steps::settings()).unwrap();
            let losses: Vec<f32> = (0..3).map(|_| step(model, &mut optimizer).0).collect();
            (start, logprobs.values().to_vec(), gradients, losses, logits(model))
        };
        let what = format!("experts {moe}, {dtype}, {lora:?}");
        let by = if dtype == Dtype::F32 { 1e-5 } else { 2e-2 };
        let want = run(&Model::random(config(moe), dtype, 3).unwrap());
        let got = bench.run(|_| run(&on(bench, moe, dtype)));
        assert_near(&format!("{what}: logits"), &got.0, &want.0, by);
        assert_near(&format!("{what}: log-probabilities"), &got.1, &want.1, by);
        assert_eq!(got.2.len(), want.2.len(), "{what}");
        for ((got, name), (want, other)) in got.2.iter().zip(&want.2) {
            assert_eq!(name, other);
            assert_near(&format!("{what}: gradient of {name}"), got, want, 3.0 * by);
        }
        assert_near(&format!("{what}: losses"), &got.3, &want.3, by);
        assert_near(&format!("{what}: logits after three steps"), &got.4, &want.4, if dtype == Dtype::F32 { 1e-3 } else { 4e-2 });
    }
}

/// A document has its bits alone and in company, with an adapter of every kind; and an image goes back to the bit.
#[test]
fn rows_with_an_adapter_do_not_depend_on_their_batch() {
    let Some(bench) = bench() else { return };
    for (moe, lora) in kinds() {
        let model = on(bench, moe, Dtype::Bf16);
        moved(&model, &lora);
        let together = with_batch(|batch| {
            let last = batch.cu_seqlens[1] as usize;
            (model.logits(batch).unwrap().values()[last * 67..].to_vec(), batch.tokens[last..].to_vec())
        });
        let alone = model.logits(&Batch::new(&[together.1]).packed()).unwrap();
        assert!(alone.values() == together.0, "experts {moe}, {lora:?}");

        let mut optimizer = AdamW::new(model.parameters(), Steps::settings()).unwrap().naming(model.tensor_rows());
        step(&model, &mut optimizer);
        let (image, state) = (model.image(ImageTo::SpareRoom).unwrap(), optimizer.state(ImageTo::SpareRoom).unwrap());
        let rest = |optimizer: &mut AdamW| (step(&model, optimizer), step(&model, optimizer), logits(&model));
        let want = rest(&mut optimizer);
        model.copy_from(&image).unwrap();
        optimizer.copy_from(&state).unwrap();
        assert!(rest(&mut optimizer) == want, "experts {moe}, {lora:?}: from an image");
    }
}

#[test]
fn what_a_checkpoint_holds_of_an_adapter_does_not_depend_on_the_place() {
    let Some(bench) = bench() else { return };
    for (moe, lora) in kinds() {
        let what = format!("experts {moe}, {lora:?}");
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str| folder.path().join(name);
        let write = |model: &Model, optimizer: &AdamW, name: &str| {
            model.save_adapter(&place(&format!("{name}/adapter")), None, None).unwrap();
            model.save_training_state(&place(&format!("{name}/training"))).unwrap();
            optimizer.state(ImageTo::Host).unwrap().save(&place(&format!("{name}/optimizer"))).unwrap();
        };
        let read = |at: &Place, name: &str| {
            let model = Model::random_at(at, config(moe), Dtype::Bf16, 3).unwrap();
            model.load_adapter(&place(&format!("{name}/adapter")), true, &mut |remark| panic!("{remark}")).unwrap();
            model.load_training_state(&place(&format!("{name}/training"))).unwrap();
            let mut optimizer = AdamW::new(model.parameters(), Steps::settings()).unwrap().naming(model.tensor_rows());
            optimizer.load(&place(&format!("{name}/optimizer"))).unwrap();
            (model, optimizer)
        };
        let model = Model::random(config(moe), Dtype::Bf16, 3).unwrap();
        moved(&model, &lora);
        let mut optimizer = AdamW::new(model.parameters(), Steps::settings()).unwrap().naming(model.tensor_rows());
        step(&model, &mut optimizer);
        // A gradient that waits for its update goes along.
        Steps::loss(&model).backward().unwrap();
        write(&model, &optimizer, "host");
        let (there, optimizer_there) = read(&at(bench), "host");
        write(&there, &optimizer_there, "device");
        let (back, optimizer_back) = read(&Place::Host, "device");
        write(&back, &optimizer_back, "back");
        for file in ["adapter/adapter_model", "training/training_state", "optimizer/adamw"] {
            let bytes = |name: &str| std::fs::read(place(&format!("{name}/{file}.safetensors"))).unwrap();
            assert!(bytes("host") == bytes("device") && bytes("host") == bytes("back"), "{what}: {file} differs");
        }
    }
}

#[test]
fn experts_are_adapted_all_or_none() {
    let Some(bench) = bench() else { return };
    let model = on(bench, true, Dtype::F32);
    let error = model.adapt(lora(&["layers.0.mlp.experts.1.gate_proj"], false), 5).unwrap_err().to_string();
    assert!(error.contains("not on expert 0") && error.contains("all experts") && error.contains("CPU"), "{error}");
    assert!(model.adapter().is_none() && model.trainable() == model.count());
    let all: Vec<String> = (0..5).map(|expert| format!("layers.1.mlp.experts.{expert}.down_proj")).collect();
    model.adapt(lora(&all.iter().map(String::as_str).collect::<Vec<_>>(), false), 5).unwrap();
    assert_eq!(model.trainable(), 5 * 3 * (20 + 24));
}
