//! Routing, grouping and combining of experts.

use crate::{assert_close, assert_same, bench, tolerance, uniform};
use half::bf16;
use perilune::kernels::cpu;
use perilune::kernels::cuda::route::{self, Routing};
use perilune::kernels::element::Float;

fn routing_agrees(tokens: usize, experts: usize, k: usize, renormalise: bool) {
    let Some(bench) = bench() else { return };
    let routing = Routing { experts, k, renormalise };
    // Few different values, so that experts tie.
    let logits: Vec<f32> = uniform::<f32>(1, tokens * experts).iter().map(|v| (v * 4.0).round()).collect();
    let (d_weights, d_probs) = (uniform::<f32>(2, tokens * k), uniform::<f32>(3, tokens * experts));
    let (mut probs, mut chosen, mut weights) = (vec![0.0; tokens * experts], vec![0; tokens * k], vec![0.0; tokens * k]);
    cpu::route::route(&logits, experts, k, renormalise, &mut probs, &mut chosen, &mut weights);
    let mut d_logits = probs.clone();
    cpu::route::route_backward(&probs, &chosen, experts, renormalise, &d_weights, Some(&d_probs), &mut d_logits);
    let groups = cpu::route::group(&chosen, experts, k);
    let signed = |values: &[u32]| values.iter().map(|v| *v as i32).collect::<Vec<_>>();
    let got = bench.run(|device| {
        let (logits, d_weights, d_probs) = (bench.upload(&logits), bench.upload(&d_weights), bench.upload(&d_probs));
        let (mut p, mut c, mut w) =
            (bench.poisoned::<f32>(probs.len()), bench.poisoned::<i32>(chosen.len()), bench.poisoned(weights.len()));
        route::route(device, routing, logits.view(), p.view_mut(), c.view_mut(), w.view_mut()).unwrap();
        let mut d = bench.poisoned::<f32>(probs.len());
        let further = Some(d_probs.view());
        route::route_backward(device, routing, p.view(), c.view(), d_weights.view(), further, d.view_mut()).unwrap();
        let g = route::group(device, routing, c.view()).unwrap();
        let sorted = [g.offsets, g.rows, g.slots, g.places].map(|buffer| buffer.to_vec().unwrap());
        (p.to_vec().unwrap(), c.to_vec().unwrap(), w.to_vec().unwrap(), d.to_vec().unwrap(), sorted)
    });
    assert_close("probs", &got.0, &probs, 1e-6);
    assert_same("chosen", &got.1, &signed(&chosen));
    assert_close("weights", &got.2, &weights, 1e-6);
    assert_close("d_logits", &got.3, &d_logits, 2e-6);
    let offsets: Vec<i32> = groups.offsets.iter().map(|v| *v as i32).collect();
    for (got, want) in got.4.iter().zip([offsets, signed(&groups.rows), signed(&groups.slots), signed(&groups.places)]) {
        assert_same("groups", got, &want);
    }
}

#[test]
fn routing_and_groups_agree() {
    for (tokens, experts, k) in [(1, 1, 1), (5, 7, 3), (33, 60, 4), (90, 4, 4), (0, 4, 2)] {
        routing_agrees(tokens, experts, k, false);
        routing_agrees(tokens, experts, k, true);
    }
}

#[test]
fn a_nan_still_chooses_different_experts() {
    let Some(bench) = bench() else { return };
    let logits = [f32::NAN, 1.0, 2.0, f32::NAN];
    let logits = bench.upload(&logits);
    let (mut p, mut c, mut w) = (bench.poisoned(4), bench.poisoned(3), bench.poisoned::<f32>(3));
    let routing = Routing { experts: 4, k: 3, renormalise: false };
    route::route(&bench.device, routing, logits.view(), p.view_mut(), c.view_mut(), w.view_mut()).unwrap();
    let mut chosen: Vec<i32> = c.to_vec().unwrap();
    chosen.sort_unstable();
    chosen.dedup();
    assert!(chosen.len() == 3 && chosen.iter().all(|e| (0..4).contains(e)), "{chosen:?}");
    assert!(w.to_vec().unwrap().iter().all(|w| w.is_nan()));
}

fn combining_agrees<E: Float>(tokens: usize, k: usize, hidden: usize) {
    let Some(bench) = bench() else { return };
    let choices = tokens * k;
    // A permutation of the grouped rows.
    let places: Vec<u32> = (0..choices).map(|i| ((i * 7 + 3) % choices) as u32).collect();
    let (out, weights, dy) = (uniform::<E>(1, choices * hidden), uniform::<f32>(2, choices), uniform::<E>(3, tokens * hidden));
    let (old, gate) = (uniform::<E>(4, tokens * hidden), uniform::<f32>(5, tokens));
    let mut y = old.clone();
    cpu::combine::combine(&out, &places, &weights, hidden, &mut y, true);
    let (mut d_out, mut d_weights) = (out.clone(), weights.clone());
    cpu::combine::combine_backward(&out, &places, &weights, hidden, &dy, &mut d_out, &mut d_weights);
    let mut gated = old.clone();
    cpu::combine::add_gated(&gate, &dy, &mut gated);
    let (mut d_gate, mut d_shared) = (gate.clone(), dy.clone());
    cpu::combine::add_gated_backward(&gate, &old, &dy, &mut d_gate, &mut d_shared);
    let signed: Vec<i32> = places.iter().map(|v| *v as i32).collect();
    let got = bench.run(|device| {
        let (out, places, weights) = (bench.upload(&out), bench.upload(&signed), bench.upload(&weights));
        let (dy, gate, shared) = (bench.upload(&dy), bench.upload(&gate), bench.upload(&old));
        let (mut y, mut gated) = (bench.upload(&old), bench.upload(&old));
        let (mut d_out, mut d_weights) = (bench.poisoned::<E>(out.len()), bench.poisoned::<f32>(weights.len()));
        let (mut d_gate, mut d_shared) = (bench.poisoned::<f32>(gate.len()), bench.poisoned::<E>(dy.len()));
        route::combine(device, out.view(), places.view(), weights.view(), hidden, y.view_mut(), true).unwrap();
        let (a, b) = (d_out.view_mut(), d_weights.view_mut());
        route::combine_backward(device, out.view(), places.view(), weights.view(), hidden, dy.view(), a, b).unwrap();
        route::add_gated(device, gate.view(), dy.view(), gated.view_mut()).unwrap();
        route::add_gated_backward(device, gate.view(), shared.view(), dy.view(), d_gate.view_mut(), d_shared.view_mut()).unwrap();
        let rows = [y, d_out, gated, d_shared].map(|buffer| buffer.to_vec().unwrap());
        (rows, d_weights.to_vec().unwrap(), d_gate.to_vec().unwrap())
    });
    for (got, want) in got.0.iter().zip([&y, &d_out, &gated, &d_shared]) {
        assert_close("rows", got, want, tolerance::<E>(1e-6, 8e-3));
    }
    assert_close("d_weights", &got.1, &d_weights, 1e-5);
    assert_close("d_gate", &got.2, &d_gate, 1e-5);
}

#[test]
fn combining_agrees_forward_and_backward() {
    for (tokens, k, hidden) in [(1, 1, 1), (3, 2, 40), (5, 4, 33), (2, 4, 300)] {
        combining_agrees::<f32>(tokens, k, hidden);
        combining_agrees::<bf16>(tokens, k, hidden);
    }
}
