//! A training step that cannot fit is refused before it begins, and none is that would fit: what is predicted of activations is
//! never more than what they take.

use crate::model::{Steps, config};
use crate::{EMULATED, bench};
use perilune::kernels::cuda::device::{Device, Settings};
use perilune::kernels::element::Dtype;
use perilune::model::Model;
use perilune::model::sizes::{TrainingStep, training_parts};
use perilune::tensor::Place;
use perilune::train::optimizer::AdamW;

#[test]
fn no_more_is_predicted_than_a_step_takes() {
    let Some(bench) = bench() else { return };
    for (moe, dtype, recompute) in
        [(false, Dtype::F32, false), (true, Dtype::Bf16, false), (false, Dtype::Bf16, true), (true, Dtype::F32, true)]
    {
        let device = bench.apart();
        let model = Model::random_at(&Place::Cuda(device.clone()), config(moe), dtype, 3).unwrap();
        model.set_recompute(recompute);
        let mut optimizer = AdamW::new(model.parameters(), Steps::settings()).unwrap();
        let (kept, gradients) = optimizer.bytes_to_come();
        let made = device.memory_statistics().live_bytes;
        Steps::step(&model, &mut optimizer);
        let after = device.memory_statistics().live_bytes;
        assert!(kept as usize <= after - made, "{kept} bytes of moments and remainders, {} there", after - made);
        assert_eq!((optimizer.bytes_to_come(), gradients), ((0, gradients), 4 * model.count() as u64));
        // The first step of a model is never captured: its activations wait for the backward pass outside of any graph.
        let fresh = model.copy().unwrap();
        let after = device.memory_statistics().live_bytes;
        let loss = Steps::loss(&fresh);
        let taken = device.memory_statistics().live_bytes - after;
        let step = TrainingStep {
            dtype,
            tokens: Steps::tokens(),
            trainable: model.count() as u64,
            moments: Dtype::F32,
            recompute,
            device_bytes: Some(device.memory_bytes as u64),
        };
        let parts = training_parts(model.config(), &step);
        let waiting = parts.iter().find(|(part, _)| *part == "activations").unwrap().1 as usize;
        // Of a layer that is computed again the backward pass has one more.
        loss.backward().unwrap();
        let height = device.memory_statistics().live_bytes_max - after;
        println!("experts {moe}, {dtype}, recompute {recompute}: {waiting} bytes predicted, {taken} waited, {height} at the height");
        assert!(waiting <= if recompute { height } else { taken }, "{waiting} bytes predicted, {taken} taken, {height} at the height");
    }
}

#[test]
fn what_cannot_fit_is_refused_before_it_begins() {
    let Some(_) = bench() else { return };
    let probe = TrainingStep { dtype: Dtype::F32, tokens: 0, trainable: 0, moments: Dtype::F32, recompute: false, device_bytes: None };
    let weights = training_parts(&config(false), &probe)[0].1 as usize;
    let open = |memory_bytes_max| Place::Cuda(Device::open_with(0, Settings { memory_bytes_max, ..EMULATED }).unwrap());
    let model = Model::random_at(&open(4 * weights - 1), config(false), Dtype::F32, 3).unwrap();
    let optimizer = AdamW::new(model.parameters(), Steps::settings()).unwrap();
    let (kept, gradients) = optimizer.bytes_to_come();
    let message = model.check_training_room("adamw", 0, Dtype::F32, kept + gradients).unwrap_err().to_string();
    assert!(message.contains("adamw: `model`") && message.contains("moments of AdamW") && message.contains("cuda:0"), "{message}");

    let model = Model::random_at(&open(4 * weights + (1 << 16)), config(false), Dtype::F32, 3).unwrap();
    model.check_training_room("adamw", 0, Dtype::F32, kept + gradients).unwrap();
    model.check_training_room("cross_entropy", 10, Dtype::F32, kept).unwrap();
    let message = model.check_training_room("cross_entropy", 1 << 20, Dtype::F32, kept).unwrap_err().to_string();
    assert!(message.contains("(activations ") && message.contains("micro-batches"), "{message}");
}
