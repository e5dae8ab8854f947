//! Sampling on the device against infer/sampler.rs.

use crate::{bench, uniform};
use perilune::infer::sampler::{History, Rules, choose};
use perilune::kernels::cuda::sample::{Choice, sample};

fn on_device(vocab: usize, rules: &Rules, logits: &[f32], uniforms: &[f64], previous: &[i32]) -> Vec<i32> {
    let bench = bench().unwrap();
    assert_eq!(logits.len(), vocab * uniforms.len());
    let choices: Vec<Choice> = (uniforms.iter())
        .map(|uniform| Choice {
            temperature: rules.temperature,
            top_p: rules.top_p,
            min_p: rules.min_p,
            uniform: *uniform,
            repetition_penalty: rules.repetition_penalty,
            top_k: rules.top_k as i64,
        })
        .collect();
    bench.run(|device| {
        let (mut given, mut tokens) = (bench.upload(logits), bench.poisoned::<i32>(choices.len()));
        let previous = bench.upload(&previous.repeat(choices.len()));
        let before = (!previous.is_empty()).then(|| previous.view());
        sample(device, given.view_mut(), &choices, before, tokens.view_mut()).unwrap();
        tokens.to_vec().unwrap()
    })
}

#[test]
fn choices_are_those_of_the_cpu() {
    if bench().is_none() {
        return;
    }
    let off = Rules { temperature: 1.0, ..Rules::GREEDY };
    let sets = [
        Rules::GREEDY,
        off,
        Rules { temperature: 0.3, ..off },
        Rules { top_k: 5, ..off },
        Rules { top_p: 0.7, ..off },
        Rules { min_p: 0.1, ..off },
        Rules { temperature: 0.8, top_k: 20, top_p: 0.9, min_p: 0.02, repetition_penalty: 2.0, ..off },
        Rules { top_k: 1, ..off },
        Rules { top_p: 1e-6, ..off },
    ];
    for vocab in [1, 7, 700] {
        let uniforms: Vec<f64> = (0..6).map(|i| f64::from(i) / 6.0 + 0.05).collect();
        // Quarters, so that tokens tie; a power of two, so that a penalty of 2 is exact in f32.
        let mut logits: Vec<f32> = uniform::<f32>(vocab as u64, vocab * 6).iter().map(|v| (v * 16.0).round() / 4.0).collect();
        logits.iter_mut().step_by(5).skip(1).for_each(|logit| *logit = f32::NEG_INFINITY);
        let previous: Vec<i32> = [0, 3, 3, 600].into_iter().filter(|id| *id < vocab as i32).collect();
        let history = History { tokens: &previous, prompt: previous.len() };
        for rules in &sets {
            let got = on_device(vocab, rules, &logits, &uniforms, &previous);
            for (row, (got, uniform)) in got.iter().zip(&uniforms).enumerate() {
                let want = choose(rules, &[], &logits[row * vocab..(row + 1) * vocab], history, *uniform);
                assert_eq!(*got, want.map_or(-1, |id| id as i32), "{rules:?}, vocabulary of {vocab}, row {row}");
            }
        }
    }
}

#[test]
fn damaged_logits_choose_nothing() {
    if bench().is_none() {
        return;
    }
    let rules = Rules { temperature: 1.0, ..Rules::GREEDY };
    let mut logits = vec![0.0f32; 3 * 40];
    logits[39] = f32::NAN;
    logits[40] = f32::INFINITY;
    logits[80..].fill(f32::NEG_INFINITY);
    assert_eq!(on_device(40, &rules, &logits, &[0.5; 3], &[]), [-1; 3]);
}
