//! Sampling on the device against infer/sampler.rs: the same token for the same logits and random number, always.

use crate::{bench, uniform};
use perilune::infer::sampler::{History, Rules, choose};
use perilune::kernels::cuda::sample::{Draw, sample};
use perilune::kernels::random::Stream;

/// `vocab` of a row's `stride` may be chosen.
fn on_device(logits: &[f32], (stride, vocab): (usize, usize), draws: &[Draw]) -> Vec<i32> {
    let bench = bench().unwrap();
    bench.run(|device| {
        let (given, mut tokens) = (bench.upload(logits), bench.poisoned::<i32>(draws.len()));
        sample(device, given.view(), (stride, vocab), draws, tokens.view_mut()).unwrap();
        tokens.to_vec().unwrap()
    })
}

#[test]
fn tokens_are_those_of_the_host() {
    let Some(bench) = bench() else { return };
    let none = History { tokens: &[], prompt: 0 };
    let most = if bench.is_emulated() { 3_000 } else { 151_936 };
    for (seed, (stride, vocab)) in [(1, 1), (7, 7), (40, 33), (1_024, 1_024), (1_500, 1_025), (most, most - 17)].into_iter().enumerate() {
        let seed = seed as u64;
        let rows = 3;
        // Peaked, flat, and with tokens that tie or are ruled out.
        let mut logits: Vec<f32> = uniform::<f32>(seed, rows * stride);
        logits[..stride].iter_mut().for_each(|logit| *logit *= 30.0);
        logits[2 * stride..].iter_mut().for_each(|logit| *logit = (*logit * 16.0).round() / 4.0);
        logits[2 * stride..].iter_mut().step_by(5).skip(1).for_each(|logit| *logit = f32::NEG_INFINITY);
        let stream = Stream::new(seed, "test");
        let ends = [0.0, f64::from_bits(1), 0.5, 1.0 - f64::EPSILON / 2.0];
        let numbers = ends.into_iter().chain((0..if bench.is_emulated() { 12 } else { 400 }).map(|counter| stream.f64(counter)));
        let warmths = [0.0, 1e-38, 0.05, 0.7, 1.0, 3.0];
        let cases: Vec<(usize, f64, f64)> = numbers
            .enumerate()
            .flat_map(|(index, uniform)| warmths.map(|warmth| ((index + warmth as usize) % rows, warmth, uniform)))
            .collect();
        let rules = |warmth: f64| Rules { temperature: warmth, ..Rules::GREEDY };
        let draw = |(row, warmth, uniform): &(usize, f64, f64)| {
            let temperature = rules(*warmth).plain_temperature().expect("no other rule");
            Draw { uniform: *uniform, temperature, row: *row as i32 }
        };
        let got = on_device(&logits, (stride, vocab), &cases.iter().map(draw).collect::<Vec<_>>());
        for ((row, warmth, uniform), got) in cases.into_iter().zip(got) {
            let want = choose(&rules(warmth), &[], &logits[row * stride..][..vocab], none, uniform).unwrap();
            assert_eq!(got, want as i32, "{vocab} of {stride}, row {row}, temperature {warmth}, {uniform}");
        }
    }
}

#[test]
fn damaged_logits_choose_nothing() {
    if bench().is_none() {
        return;
    }
    let mut logits = vec![0.0f32; 4 * 40];
    logits[37] = f32::NAN;
    logits[40] = f32::INFINITY;
    logits[80..120].fill(f32::NEG_INFINITY);
    logits[159] = f32::NAN;
    for temperature in [0.0, 1.0] {
        let draws: Vec<Draw> = (0..4).map(|row| Draw { uniform: 0.9, temperature, row }).collect();
        let tokens = on_device(&logits, (40, 38), &draws);
        assert_eq!(tokens[..3], [-1; 3]);
        assert!((0..38).contains(&tokens[3]), "what may not be chosen does not count: {tokens:?}");
    }
}

#[test]
fn rules_that_change_or_drop_tokens_are_the_hosts() {
    let off = Rules { temperature: 1.0, ..Rules::GREEDY };
    assert_eq!(off.plain_temperature(), Some(1.0));
    assert_eq!(Rules::GREEDY.plain_temperature(), Some(0.0));
    // Filters have nothing to do with the most likely token, penalties have.
    assert_eq!(Rules { top_k: 5, top_p: 0.5, ..Rules::GREEDY }.plain_temperature(), Some(0.0));
    let others = [
        Rules { top_k: 5, ..off },
        Rules { top_p: 0.7, ..off },
        Rules { min_p: 0.1, ..off },
        Rules { repetition_penalty: 1.1, ..Rules::GREEDY },
        Rules { presence_penalty: 0.1, ..Rules::GREEDY },
        Rules { frequency_penalty: 0.1, ..off },
    ];
    assert!(others.iter().all(|rules| rules.plain_temperature().is_none()));
}
