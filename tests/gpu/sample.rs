//! Sampling on the device against infer/sampler.rs: the same token for the same logits and random number, always.

use crate::{bench, uniform};
use perilune::infer::sampler::{History, Rules, changes, choose, choose_likely};
use perilune::kernels::cuda::sample::{Change, Draw, sample};
use perilune::kernels::random::Stream;
use perilune::model::paged::LogitRows;
use std::sync::Arc;

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
            let temperature = rules(*warmth).drawn_temperature();
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

/// Rules, bias and the text so far.
type Case = (Rules, Vec<(u32, f64)>, Vec<i32>);

fn cases() -> Vec<Case> {
    let warm = Rules { temperature: 0.8, ..Rules::GREEDY };
    let said = vec![3, 5, 5, 9, 3, 5, 0, 39, 70_000];
    let bias = vec![(2, 1.5), (5, -0.75), (8, f64::NEG_INFINITY)];
    let penalties = Rules { repetition_penalty: 1.3, presence_penalty: 0.4, frequency_penalty: 0.1, ..warm };
    let mut cases = vec![
        (warm, bias.clone(), vec![]),
        (Rules { repetition_penalty: 0.7, ..Rules::GREEDY }, vec![], said.clone()),
        (Rules { presence_penalty: -0.3, frequency_penalty: 0.2, ..Rules::GREEDY }, bias.clone(), said.clone()),
        (penalties, bias.clone(), said.clone()),
    ];
    let filters = [(5, 1.0, 0.0), (1, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.05), (20, 0.9, 0.02), (10_000, 0.999, 0.0)];
    for (top_k, top_p, min_p) in filters {
        cases.push((Rules { top_k, top_p, min_p, ..warm }, vec![], vec![]));
        cases.push((Rules { top_k, top_p, min_p, temperature: 2.5, ..penalties }, bias.clone(), said.clone()));
    }
    cases
}

#[test]
fn rules_choose_on_the_device_as_on_the_host() {
    let Some(bench) = bench() else { return };
    let most = if bench.is_emulated() { 3_000 } else { 151_936 };
    for (seed, (stride, vocab)) in [(48, 40), (1_500, 1_300), (most, most - 17)].into_iter().enumerate() {
        let rows = 3;
        let mut logits: Vec<f32> = uniform::<f32>(seed as u64 + 50, rows * stride);
        // As many tokens a unit in a large vocabulary as in one of 3,000.
        let spread = (stride as f32 / 3_000.0).max(1.0);
        logits.iter_mut().for_each(|logit| *logit *= spread);
        logits[..stride].iter_mut().for_each(|logit| *logit *= 30.0);
        logits[stride..2 * stride].iter_mut().for_each(|logit| *logit *= 12.0);
        logits[2 * stride..].iter_mut().for_each(|logit| *logit = (*logit * 16.0).round() / 4.0);
        let stream = Stream::new(seed as u64, "test");
        let picks: Vec<_> =
            cases().into_iter().enumerate().flat_map(|(at, case)| (0..rows).map(move |row| (at * rows + row, row, case.clone()))).collect();
        let lists: Vec<_> = picks.iter().map(|(counter, row, case)| (*row, stream.f64(*counter as u64), case)).collect();
        let (mut by_hand, mut got) = (0, vec![None; lists.len()]);
        for filters in [false, true] {
            let some: Vec<usize> = (0..lists.len()).filter(|at| lists[*at].2.0.filters() == filters).collect();
            let draw = |at: &usize| {
                let (row, uniform, (rules, ..)) = &lists[*at];
                Draw { uniform: *uniform, temperature: rules.drawn_temperature(), row: *row as i32 }
            };
            let draws: Vec<Draw> = some.iter().map(draw).collect();
            let changed = some.iter().enumerate().flat_map(|(draw, at)| {
                let (_, _, (rules, bias, tokens)) = &lists[*at];
                changes(rules, bias, vocab, History { tokens, prompt: 2.min(tokens.len()) })
                    .into_iter()
                    .map(move |change| change.in_row(draw))
            });
            let changed: Vec<Change> = changed.collect();
            if filters {
                let found = bench.run(|_| {
                    let rows = LogitRows::on_device(Arc::new(bench.upload(&logits)), rows, stride);
                    rows.likely(vocab, &draws, &changed).unwrap()
                });
                for (at, likely) in some.iter().zip(found) {
                    let (_, uniform, (rules, ..)) = &lists[*at];
                    got[*at] = likely.and_then(|likely| choose_likely(rules, likely, *uniform)).map(|id| id as i32);
                    by_hand += usize::from(got[*at].is_none());
                }
            } else {
                let (tokens, _) = bench.run(|_| {
                    let rows = LogitRows::on_device(Arc::new(bench.upload(&logits)), rows, stride);
                    rows.draw(vocab, &draws, &changed, &vec![1.0; draws.len()]).unwrap()
                });
                some.iter().zip(tokens).for_each(|(at, token)| got[*at] = Some(token));
            }
        }
        for ((row, uniform, (rules, bias, tokens)), got) in lists.iter().zip(&got) {
            let history = History { tokens, prompt: 2.min(tokens.len()) };
            let want = choose(rules, bias, &logits[row * stride..][..vocab], history, *uniform).unwrap();
            assert!(got.is_none_or(|got| got == want as i32), "{vocab} of {stride}, row {row}, {rules:?}: {got:?} and {want}");
        }
        // More than fit are needed by few: of flat rows of many tokens.
        assert!(by_hand <= if vocab > 2_048 { 8 } else { 0 }, "{by_hand} of {} go to the host", lists.len());
    }
}

#[test]
fn filters_have_nothing_to_do_with_the_most_likely_token() {
    let off = Rules { temperature: 1.0, ..Rules::GREEDY };
    assert!(!off.filters() && off.drawn_temperature() == 1.0 && Rules::GREEDY.drawn_temperature() == 0.0);
    assert!(!Rules { top_k: 5, top_p: 0.5, ..Rules::GREEDY }.filters());
    assert!([Rules { top_k: 5, ..off }, Rules { top_p: 0.7, ..off }, Rules { min_p: 0.1, ..off }].iter().all(Rules::filters));
}
