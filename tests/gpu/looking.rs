//! What scripts look at inside a model on the device, and what they freeze there, against the CPU: states of layers and what routers
//! say, with the gradients that losses on them leave.

use crate::bench;
use crate::fixtures::clear_gradients;
use crate::model::{Steps, assert_near, config, on, step, values, with_batch};
use crate::uniform;
use perilune::kernels::buffer::Buffer;
use perilune::kernels::element::Dtype;
use perilune::model::Model;
use perilune::tensor::AnyTensor;
use perilune::train::optimizer::AdamW;

/// Gradients by name; none where there is none.
fn gradients(model: &Model) -> Vec<(String, Option<Vec<f32>>)> {
    let names = model.tensors().into_iter().map(|(name, _)| name);
    names.map(|name| (name.clone(), model.gradient(&name).unwrap().map(|gradient| gradient.to_f32_vec()))).collect()
}

/// Runs a matrix backwards from numbers of its size.
fn backward(x: &AnyTensor, seed: u64) {
    let x = x.typed::<f32, 2>("test", "x").unwrap();
    x.backward_with(Buffer::copy_of(&uniform::<f32>(seed, x.len()))).unwrap();
}

#[track_caller]
fn assert_gradients_near(what: &str, got: &[(String, Option<Vec<f32>>)], want: &[(String, Option<Vec<f32>>)], by: f64) {
    for ((name, got), (_, want)) in got.iter().zip(want) {
        match (got, want) {
            (None, None) => {}
            (Some(got), Some(want)) => assert_near(&format!("{what}: gradient of {name}"), got, want, by),
            // Experts are one matrix on a device: one without rows has a gradient of zeros.
            (Some(got), None) => assert!(got.iter().all(|value| *value == 0.0), "{what}: {name} has a gradient on the device alone"),
            (None, Some(_)) => panic!("{what}: {name} has no gradient on the device"),
        }
    }
}

fn tolerance(dtype: Dtype) -> f64 {
    if dtype == Dtype::F32 { 1e-5 } else { 2e-2 }
}

const CASES: [(bool, Dtype); 4] = [(false, Dtype::F32), (false, Dtype::Bf16), (true, Dtype::F32), (true, Dtype::Bf16)];

#[test]
fn states_of_layers_and_their_gradients_are_the_cpus() {
    let Some(bench) = bench() else { return };
    for (moe, dtype) in CASES {
        for (layer, recompute) in [(0, false), (1, false), (1, true), (2, false)] {
            let run = |model: &Model| {
                model.set_recompute(recompute);
                clear_gradients(model);
                let state = with_batch(|batch| model.hidden_states(batch, layer)).unwrap();
                backward(&state, 4);
                (state.to_f32_vec(), gradients(model))
            };
            let what = format!("experts {moe}, {dtype}, layer {layer}, recomputed {recompute}");
            let want = run(&Model::random(config(moe), dtype, 3).unwrap());
            let model = on(bench, moe, dtype);
            let got = bench.run(|_| run(&model));
            assert_near(&what, &got.0, &want.0, tolerance(dtype));
            assert_gradients_near(&what, &got.1, &want.1, 3.0 * tolerance(dtype));
        }
    }
}

#[test]
fn logits_of_states_and_their_gradients_are_the_cpus() {
    let Some(bench) = bench() else { return };
    for (moe, dtype) in CASES {
        let run = |model: &Model| {
            clear_gradients(model);
            let states = with_batch(|batch| model.hidden_states(batch, model.config().layers)).unwrap();
            let logits = AnyTensor::from(model.head(&states).unwrap());
            backward(&logits, 7);
            (logits.to_f32_vec(), gradients(model))
        };
        let what = format!("experts {moe}, {dtype}");
        let want = run(&Model::random(config(moe), dtype, 3).unwrap());
        let model = on(bench, moe, dtype);
        let got = bench.run(|_| run(&model));
        assert_near(&what, &got.0, &want.0, tolerance(dtype));
        assert_gradients_near(&what, &got.1, &want.1, 3.0 * tolerance(dtype));
    }
}

#[test]
fn what_routers_say_and_its_gradients_are_the_cpus() {
    let Some(bench) = bench() else { return };
    for dtype in [Dtype::F32, Dtype::Bf16] {
        for part in 0..3 {
            let run = |model: &Model| {
                clear_gradients(model);
                let (layers, balance) = with_batch(|batch| model.routing(batch)).unwrap();
                let balance = balance.unwrap();
                match part {
                    0 => backward(&layers[1].0, 5),
                    1 => backward(&layers[1].2, 6),
                    _ => balance.backward().unwrap(),
                }
                let numbers: Vec<f32> =
                    layers.iter().flat_map(|(logits, _, weights)| [logits.to_f32_vec(), weights.to_f32_vec()].concat()).collect();
                let chosen: Vec<u32> = layers.iter().flat_map(|(_, chosen, _)| chosen.clone()).collect();
                (numbers, chosen, balance.values().to_vec(), gradients(model))
            };
            let what = format!("{dtype}, part {part}");
            let want = run(&Model::random(config(true), dtype, 3).unwrap());
            let model = on(bench, true, dtype);
            let got = bench.run(|_| run(&model));
            assert_near(&what, &got.0, &want.0, tolerance(dtype));
            assert_eq!(got.1, want.1, "{what}: chosen experts");
            assert_near(&format!("{what}: balance"), &got.2, &want.2, tolerance(dtype));
            assert_gradients_near(&what, &got.3, &want.3, 3.0 * tolerance(dtype));
        }
    }
    let (layers, balance) = with_batch(|batch| on(bench, false, Dtype::F32).routing(batch)).unwrap();
    assert!(layers.is_empty() && balance.is_none(), "a dense model routes nothing");
}

#[test]
fn what_is_frozen_rests_and_what_is_thawed_goes_on() {
    let Some(bench) = bench() else { return };
    let parts = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
    for (moe, dtype) in CASES {
        let run = |model: &Model| {
            let mut optimizer = AdamW::new(model.parameters(), Steps::settings()).unwrap();
            let mut losses = vec![step(model, &mut optimizer).0];
            let mut before = values(model);
            model.freeze(&parts(&["layers.0", "embed_tokens"])).unwrap();
            let trainable = model.trainable();
            // Two steps of a shape: the second is a captured one, where such are made.
            for _ in 0..3 {
                Steps::loss(model).backward().unwrap();
                let frozen = |name: &str| name.contains("layers.0.") || name.contains("embed_tokens");
                assert!(
                    gradients(model).iter().all(|(name, gradient)| !frozen(name) || gradient.is_none()),
                    "a frozen weight has a gradient"
                );
                losses.push(step(model, &mut optimizer).0);
                let after = values(model);
                for ((name, before), (_, after)) in before.iter().zip(&after) {
                    let is_expert = name.contains(".experts.");
                    assert!(is_expert || (before == after) == frozen(name), "{name}: frozen weights rest, others move");
                }
                before = after;
            }
            model.thaw(Some(&parts(&["layers.0.mlp"]))).unwrap();
            losses.push(step(model, &mut optimizer).0);
            let after = values(model);
            for ((name, before), (_, after)) in before.iter().zip(&after).filter(|((name, _), _)| name.contains("layers.0.")) {
                let is_expert = name.contains(".experts.");
                assert!(is_expert || (before == after) != name.contains(".mlp."), "{name}: what is thawed moves");
            }
            model.thaw(None).unwrap();
            losses.extend([step(model, &mut optimizer).0, step(model, &mut optimizer).0]);
            (losses, trainable)
        };
        let what = format!("experts {moe}, {dtype}");
        let want = run(&Model::random(config(moe), dtype, 3).unwrap());
        let got = bench.run(|_| run(&on(bench, moe, dtype)));
        assert_near(&what, &got.0, &want.0, 10.0 * tolerance(dtype));
        assert_eq!(got.1, want.1, "{what}: weights that train");
    }
}
