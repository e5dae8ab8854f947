//! Operations on rows: embedding, norms, rope, swiglu, log-probabilities.

use crate::{assert_close, assert_same, bench, tolerance, uniform};
use half::bf16;
use perilune::kernels::cpu::{self, heads::Heads};
use perilune::kernels::cuda::{embedding, logprobs, norm, rms_norm, rope, swiglu};
use perilune::kernels::element::Float;

fn embedding_agrees<E: Float>(vocab: usize, hidden: usize, ids: &[i32]) {
    let Some(bench) = bench() else { return };
    let (weight, d_out) = (uniform::<E>(1, vocab * hidden), uniform::<E>(2, ids.len() * hidden));
    let start = uniform::<f32>(3, vocab * hidden);
    let (mut want, mut want_d) = (vec![E::default(); ids.len() * hidden], start.clone());
    let order = cpu::embedding::Order::Rows;
    cpu::embedding::embed(&weight, order, vocab, hidden, ids, &mut want);
    cpu::embedding::embed_backward(&d_out, ids, order, vocab, hidden, &mut want_d);
    let (got, got_d) = bench.run(|device| {
        let (weight, ids, d_out) = (bench.upload(&weight), bench.upload(ids), bench.upload(&d_out));
        let (mut out, mut d_weight) = (bench.poisoned::<E>(want.len()), bench.upload(&start));
        embedding::embed(device, weight.view(), hidden, ids.view(), out.view_mut()).unwrap();
        embedding::embed_backward(device, d_out.view(), ids.view(), hidden, d_weight.view_mut()).unwrap();
        (out.to_vec().unwrap(), d_weight.to_vec().unwrap())
    });
    assert_same("embedding", &got, &want);
    assert_same("embedding gradient", &got_d, &want_d);
}

#[test]
fn embedding_has_the_bits_of_the_cpu() {
    let many: Vec<i32> = (0..600).map(|i| (i * i) % 7).collect();
    for (vocab, hidden, ids) in [(5, 7, &[4, 0, 4, 4][..]), (33, 24, &[32]), (9, 16, &many), (3, 8, &[])] {
        embedding_agrees::<f32>(vocab, hidden, ids);
        embedding_agrees::<bf16>(vocab, hidden, ids);
    }
}

fn rms_norm_agrees<E: Float>(tokens: usize, hidden: usize, with_residual: bool) {
    let Some(bench) = bench() else { return };
    let (x, residual) = (uniform::<E>(1, tokens * hidden), uniform::<E>(2, tokens * hidden));
    let (weight, dy, old) = (uniform::<E>(3, hidden), uniform::<E>(4, tokens * hidden), uniform::<E>(5, tokens * hidden));
    let eps = 1e-6;
    let sum: Vec<E> = x.iter().zip(&residual).map(|(x, r)| E::from_f32(x.to_f32() + r.to_f32())).collect();
    let input = if with_residual { &sum } else { &x };
    let (mut y, mut inv, mut dx, mut dw) = (x.clone(), vec![0.0; tokens], old.clone(), vec![0.5; hidden]);
    cpu::rms_norm::rms_norm(input, &weight, eps, &mut y, &mut inv);
    cpu::rms_norm::rms_norm_backward(input, &weight, &inv, &dy, &mut dx, with_residual, Some(&mut dw));
    let got = bench.run(|device| {
        let (x, residual, weight, dy) = (bench.upload(&x), bench.upload(&residual), bench.upload(&weight), bench.upload(&dy));
        let (mut sum, mut y) = (bench.poisoned::<E>(tokens * hidden), bench.poisoned::<E>(tokens * hidden));
        let (mut inv, mut dx, mut dw) = (bench.poisoned::<f32>(tokens), bench.upload(&old), bench.upload(&vec![0.5f32; hidden]));
        let given = rms_norm::Residual { residual: residual.view(), sum: sum.view_mut() };
        rms_norm::rms_norm(device, x.view(), with_residual.then_some(given), weight.view(), eps, y.view_mut(), inv.view_mut()).unwrap();
        let input = if with_residual { sum.view() } else { x.view() };
        rms_norm::rms_norm_backward(device, input, weight.view(), inv.view(), dy.view(), dx.view_mut(), with_residual).unwrap();
        let mut parts = bench.poisoned::<f32>(norm::parts_len(tokens, hidden));
        rms_norm::rms_norm_weight_gradient(device, input, inv.view(), dy.view(), parts.view_mut(), dw.view_mut()).unwrap();
        (y.to_vec().unwrap(), inv.to_vec().unwrap(), dx.to_vec().unwrap(), dw.to_vec().unwrap())
    });
    // A sum in another order; for bf16 that may turn one rounding, so two units of 2^-8.
    assert_close("inv_rms", &got.1, &inv, 2e-6);
    assert_close("y", &got.0, &y, tolerance::<E>(3e-6, 8e-3));
    assert_close("dx", &got.2, &dx, tolerance::<E>(1e-5, 8e-3));
    assert_close("dweight", &got.3, &dw, tolerance::<E>(1e-5, 8e-3));
}

#[test]
fn rms_norm_agrees_forward_and_backward() {
    for (tokens, hidden) in [(1, 1), (3, 7), (5, 896), (70, 33), (2, 2048)] {
        for with_residual in [false, true] {
            rms_norm_agrees::<f32>(tokens, hidden, with_residual);
            rms_norm_agrees::<bf16>(tokens, hidden, with_residual);
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone() {
    let Some(bench) = bench() else { return };
    let (tokens, hidden) = (9, 100);
    let (x, weight) = (uniform::<bf16>(1, tokens * hidden), uniform::<bf16>(2, hidden));
    let norm = |x: &[bf16]| {
        let rows = x.len() / hidden;
        let (x, weight, mut y, mut inv) = (bench.upload(x), bench.upload(&weight), bench.poisoned(x.len()), bench.poisoned(rows));
        rms_norm::rms_norm(&bench.device, x.view(), None, weight.view(), 1e-6, y.view_mut(), inv.view_mut()).unwrap();
        y.to_vec().unwrap()
    };
    let all = norm(&x);
    for row in 0..tokens {
        let range = row * hidden..(row + 1) * hidden;
        assert_same("row", &norm(&x[range.clone()]), &all[range]);
    }
}

fn rope_agrees<E: Float>(heads: Heads, tokens: usize) {
    let Some(bench) = bench() else { return };
    let half = heads.head_dim / 2;
    let inv_freq: Vec<f32> = (0..half).map(|i| 10_000f32.powf(-(i as f32) / half as f32)).collect();
    let positions: Vec<i32> = (0..tokens as i32).map(|i| i * 997 % 5000).collect();
    let qkv = uniform::<E>(1, tokens * heads.width());
    let (mut cos, mut sin) = (vec![0.0; tokens * half], vec![0.0; tokens * half]);
    cpu::rope::rope_tables::<E>(&inv_freq, 1.25, &positions, &mut cos, &mut sin).unwrap();
    let mut turned = qkv.clone();
    cpu::rope::rope(&qkv, &mut turned, heads, &cos, &sin).unwrap();
    let mut back = turned.clone();
    cpu::rope::rope_backward(&mut back, heads, &cos, &sin).unwrap();
    let got = bench.run(|device| {
        let (frequencies, places) = (bench.upload(&inv_freq), bench.upload(&positions));
        let (mut own_cos, mut own_sin) = (bench.poisoned::<f32>(cos.len()), bench.poisoned::<f32>(sin.len()));
        rope::rope_tables::<E>(device, frequencies.view(), 1.25, places.view(), own_cos.view_mut(), own_sin.view_mut()).unwrap();
        let (mut x, cos, sin) = (bench.upload(&qkv), bench.upload(&cos), bench.upload(&sin));
        rope::rope(device, x.view_mut(), heads, cos.view(), sin.view()).unwrap();
        let turned = x.to_vec().unwrap();
        rope::rope_backward(device, x.view_mut(), heads, cos.view(), sin.view()).unwrap();
        (own_cos.to_vec().unwrap(), own_sin.to_vec().unwrap(), turned, x.to_vec().unwrap())
    });
    // Sine and cosine differ by their last bits, which may turn the rounding of a table in bf16.
    assert_close("cos", &got.0, &cos, tolerance::<E>(1e-6, 8e-3));
    assert_close("sin", &got.1, &sin, tolerance::<E>(1e-6, 8e-3));
    assert_same("rope", &got.2, &turned);
    assert_same("rope backward", &got.3, &back);
}

#[test]
fn rope_turns_with_the_bits_of_the_cpu() {
    for (heads, kv_heads, head_dim, tokens) in [(1, 1, 2, 1), (4, 2, 64, 5), (3, 1, 10, 7), (2, 2, 128, 3)] {
        rope_agrees::<f32>(Heads { heads, kv_heads, head_dim }, tokens);
        rope_agrees::<bf16>(Heads { heads, kv_heads, head_dim }, tokens);
    }
}

fn swiglu_agrees<E: Float>(tokens: usize, inter: usize) {
    let Some(bench) = bench() else { return };
    let (gate_up, d_act) = (uniform::<E>(1, 2 * tokens * inter), uniform::<E>(2, tokens * inter));
    let (mut act, mut d_gate_up) = (d_act.clone(), gate_up.clone());
    cpu::swiglu::swiglu(&gate_up, inter, &mut act);
    cpu::swiglu::swiglu_backward(&gate_up, inter, &d_act, &mut d_gate_up, None);
    let got = bench.run(|device| {
        let (mut x, d_act) = (bench.upload(&gate_up), bench.upload(&d_act));
        let (mut act, mut again, mut d) = (bench.poisoned::<E>(act.len()), bench.poisoned::<E>(act.len()), bench.poisoned(gate_up.len()));
        swiglu::swiglu(device, x.view(), inter, act.view_mut()).unwrap();
        let beside = swiglu::Gradient::Beside { gate_up: x.view(), d_gate_up: d.view_mut() };
        swiglu::swiglu_backward(device, beside, inter, d_act.view(), Some(again.view_mut())).unwrap();
        swiglu::swiglu_backward(device, swiglu::Gradient::InPlace(x.view_mut()), inter, d_act.view(), None).unwrap();
        assert_same("act, again", &again.to_vec().unwrap(), &act.to_vec().unwrap());
        assert_same("in place", &x.to_vec().unwrap(), &d.to_vec().unwrap());
        (act.to_vec().unwrap(), d.to_vec().unwrap())
    });
    assert_close("act", &got.0, &act, tolerance::<E>(1e-6, 8e-3));
    assert_close("d_gate_up", &got.1, &d_gate_up, tolerance::<E>(1e-6, 8e-3));
}

#[test]
fn swiglu_agrees_forward_and_backward() {
    for (tokens, inter) in [(1, 1), (3, 7), (5, 64), (2, 300)] {
        swiglu_agrees::<f32>(tokens, inter);
        swiglu_agrees::<bf16>(tokens, inter);
    }
}

fn logprobs_agree<E: Float>(rows: usize, vocab: usize) {
    let Some(bench) = bench() else { return };
    let mut logits: Vec<f32> = uniform::<f32>(1, rows * vocab).iter().map(|v| v * 9.0).collect();
    // Ruled out tokens, and a row that is nearly certain.
    logits.iter_mut().skip(1).step_by(11).for_each(|logit| *logit = f32::NEG_INFINITY);
    logits[0] = 40.0;
    let labels: Vec<i32> = (0..rows as i32).map(|row| if row % 3 == 2 { -100 } else { (row * 22) % vocab as i32 / 11 * 11 }).collect();
    let (coefficients, bends) = (uniform::<f32>(2, rows), uniform::<f32>(3, rows));
    let (mut lse, mut logprob, mut entropy) = (vec![0.0; rows], vec![0.0; rows], vec![0.0; rows]);
    cpu::cross_entropy::logprobs(&logits, vocab, &labels, &mut lse, &mut logprob, Some(&mut entropy));
    let mut plain = logits.clone();
    cpu::cross_entropy::gradient::<f32>(&mut plain, vocab, &labels, &lse, &coefficients, None);
    let given = cpu::cross_entropy::EntropyGradient { entropy: &entropy, coefficients: &bends };
    let mut memory = logits.clone();
    let bent: &[E] = cpu::cross_entropy::gradient(&mut memory, vocab, &labels, &lse, &coefficients, Some(given));
    let got = bench.run(|device| {
        let (mut x, labels) = (bench.upload(&logits), bench.upload(&labels));
        let (by, bends) = (bench.upload(&coefficients), bench.upload(&bends));
        let (mut lse, mut logprob, mut entropy) = (bench.poisoned(rows), bench.poisoned(rows), bench.poisoned(rows));
        let (a, b, c) = (lse.view_mut(), logprob.view_mut(), entropy.view_mut());
        logprobs::logprobs(device, x.view(), labels.view(), a, b, Some(c)).unwrap();
        let mut bent = bench.poisoned::<E>(logits.len());
        let place = logprobs::Place::Rounded { logits: x.view(), gradient: bent.view_mut() };
        let given = logprobs::EntropyGradient { entropy: entropy.view(), coefficients: bends.view() };
        logprobs::gradient(device, place, labels.view(), lse.view(), by.view(), Some(given)).unwrap();
        let place = logprobs::Place::<f32>::InPlace(x.view_mut());
        logprobs::gradient(device, place, labels.view(), lse.view(), by.view(), None).unwrap();
        let values = [lse, logprob, entropy, x].map(|buffer| buffer.to_vec().unwrap());
        (values, bent.to_vec().unwrap())
    });
    for ((name, got), want) in ["lse", "logprob", "entropy", "gradient"].iter().zip(&got.0).zip([&lse, &logprob, &entropy, &plain]) {
        assert_close(name, got, want, 3e-6);
    }
    assert_close("gradient with entropy", &got.1, bent, tolerance::<E>(3e-6, 8e-3));
}

#[test]
fn logprobs_and_their_gradients_agree() {
    // Rows of one slice and of several.
    for (rows, vocab) in [(1, 12), (3, 33), (5, 1000), (4, 5000), (2, 20_001)] {
        logprobs_agree::<f32>(rows, vocab);
        logprobs_agree::<bf16>(rows, vocab);
    }
}

#[test]
fn column_sums_agree() {
    let Some(bench) = bench() else { return };
    for (rows, columns) in [(0, 5), (1, 1), (33, 130), (70, 3)] {
        let x = uniform::<bf16>(1, rows * columns);
        let mut want = vec![1.0f32; columns];
        cpu::norm::add_column_sums(&x, &mut want);
        let got = bench.run(|device| {
            let (x, mut sums) = (bench.upload(&x), bench.upload(&vec![1.0f32; columns]));
            let mut parts = bench.poisoned::<f32>(norm::parts_len(rows, columns));
            norm::column_sums(device, x.view(), parts.view_mut(), sums.view_mut(), true).unwrap();
            sums.to_vec().unwrap()
        });
        assert_close("sums", &got, &want, 2e-6);
    }
}
