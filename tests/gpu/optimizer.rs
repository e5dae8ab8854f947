//! AdamW over many parameters in one launch, Muon, and the global norm.

use crate::{assert_same, bench, uniform};
use half::bf16;
use perilune::kernels::buffer::Buffer;
use perilune::kernels::cpu::adamw as cpu_adamw;
use perilune::kernels::cpu::adamw::AdamW;
use perilune::kernels::cpu::muon as cpu_muon;
use perilune::kernels::cpu::norm::sum_of_squares;
use perilune::kernels::cuda::adamw::{Parameter, adamw};
use perilune::kernels::cuda::muon;
use perilune::kernels::cuda::norm::{Norm, Table};

const SETTINGS: AdamW = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 3, gradient_scale: 0.5 };
/// One is longer than what a block takes.
const LENGTHS: [usize; 4] = [1, 33, 70_000, 256];

#[test]
fn adamw_has_the_bits_of_the_cpu_in_f32() {
    let Some(bench) = bench() else { return };
    let (weights, gradients) = (LENGTHS.map(|len| uniform::<f32>(1, len)), LENGTHS.map(|len| uniform::<f32>(2, len)));
    let (ms, vs) = (LENGTHS.map(|len| uniform::<f32>(3, len)), LENGTHS.map(|len| uniform::<f32>(4, len).iter().map(|v| v.abs()).collect()));
    let vs: [Vec<f32>; 4] = vs;
    let got = bench.run(|device| {
        let gradients = gradients.each_ref().map(|g| bench.upload(g));
        let mut lines: Vec<_> =
            weights.iter().zip(&ms).zip(&vs).map(|((w, m), v)| (bench.upload(w), bench.upload(m), bench.upload(v))).collect();
        let parameters: Vec<_> = (lines.iter_mut().zip(&gradients).enumerate())
            .map(|(index, ((w, m, v), g))| Parameter {
                weight: w.view_mut(),
                rest: None,
                gradient: g.view(),
                m: m.view_mut(),
                v: v.view_mut(),
                decays: index != 1,
            })
            .map(|parameter| parameter.line(device))
            .collect();
        let mut table = Table::default();
        adamw(device, &mut table, &parameters, &SETTINGS, None).unwrap();
        // Again with the same table: nothing is uploaded, the state goes on.
        adamw(device, &mut table, &parameters, &AdamW { step: 4, ..SETTINGS }, None).unwrap();
        lines.iter().map(|(w, m, v)| [w, m, v].map(|buffer| buffer.to_vec().unwrap())).collect::<Vec<_>>()
    });
    for index in 0..LENGTHS.len() {
        let (mut w, mut m, mut v) = (weights[index].clone(), ms[index].clone(), vs[index].clone());
        for step in [3, 4] {
            let weight_decay = if index == 1 { 0.0 } else { SETTINGS.weight_decay };
            cpu_adamw::adamw(&mut w, &gradients[index], &mut m, &mut v, &AdamW { step, weight_decay, ..SETTINGS });
        }
        for (got, want) in got[index].iter().zip([&w, &m, &v]) {
            assert_same("state", got, want);
        }
    }
}

#[test]
fn adamw_has_the_bits_of_the_cpu_in_bf16_and_waits_for_finite_gradients() {
    let Some(bench) = bench() else { return };
    let len = 1000;
    let (start, gradient) = (uniform::<f32>(1, len).iter().map(|w| w / 3.0).collect::<Vec<_>>(), uniform::<f32>(2, len));
    let (mut hi, mut lo) = (vec![bf16::ZERO; len], vec![0i16; len]);
    cpu_adamw::split_all(&start, &mut hi, &mut lo);
    let damaged: Vec<f32> = gradient.iter().enumerate().map(|(i, g)| if i == 700 { f32::INFINITY } else { *g }).collect();
    let norm_max = 0.25;
    let got = bench.run(|device| {
        let (mut weight, mut rest) = (bench.upload(&hi), bench.upload(&lo));
        let (mut m, mut v) = (bench.upload(&vec![0.0f32; len]), bench.upload(&vec![0.0f32; len]));
        let mut norm = Norm::new(device).unwrap();
        let mut results = Vec::new();
        for gradient in [&damaged, &gradient] {
            let gradient = bench.upload(gradient);
            norm.compute(&mut Table::default(), &[gradient.view()], norm_max).unwrap();
            let (w, rest_view) = (weight.view_mut(), Some(rest.view_mut()));
            let parameter =
                Parameter { weight: w, rest: rest_view, gradient: gradient.view(), m: m.view_mut(), v: v.view_mut(), decays: true };
            let settings = AdamW { step: 1, ..SETTINGS };
            adamw(device, &mut Table::default(), &[parameter.line(device)], &settings, Some(&norm)).unwrap();
            results.push((norm.factor().unwrap(), weight.to_vec().unwrap(), rest.to_vec().unwrap()));
        }
        results
    });
    assert!(got[0].1 == hi && got[0].2 == lo, "a gradient that is not finite must change nothing");
    let norm = sum_of_squares(&[&gradient[..]]).sqrt();
    assert_eq!(got[1].0, (norm_max / (norm + 1e-6)) as f32);
    let (mut m, mut v) = (vec![0.0f32; len], vec![0.0f32; len]);
    let settings = AdamW { step: 1, gradient_scale: f64::from(got[1].0), ..SETTINGS };
    cpu_adamw::adamw_bf16(&mut hi, &mut lo, &gradient, &mut m, &mut v, &settings);
    assert!(got[1].1 == hi && got[1].2 == lo, "weights and remainders are those of the CPU");
}

#[test]
fn bf16_moments_are_rounded_as_on_the_cpu() {
    let Some(bench) = bench() else { return };
    let len = 1003;
    let (start, gradient) = (uniform::<f32>(1, len), uniform::<f32>(2, len));
    let m = uniform::<bf16>(3, len);
    let v: Vec<bf16> = uniform::<f32>(4, len).iter().map(|v| bf16::from_f32(v.abs())).collect();
    let (mut hi, mut lo) = (vec![bf16::ZERO; len], vec![0i16; len]);
    cpu_adamw::split_all(&start, &mut hi, &mut lo);
    let steps = [1u64, 2, 1 << 33];
    let got = bench.run(|device| {
        let gradient = bench.upload(&gradient);
        let (mut m32, mut v32, mut m16, mut v16) = (bench.upload(&m), bench.upload(&v), bench.upload(&m), bench.upload(&v));
        let (mut weight, mut high, mut rest) = (bench.upload(&start), bench.upload(&hi), bench.upload(&lo));
        for step in steps {
            let (m, v) = (m32.view_mut(), v32.view_mut());
            let f32s = Parameter { weight: weight.view_mut(), rest: None, gradient: gradient.view(), m, v, decays: true };
            let (m, v) = (m16.view_mut(), v16.view_mut());
            let rest = Some(rest.view_mut());
            let bf16s = Parameter { weight: high.view_mut(), rest, gradient: gradient.view(), m, v, decays: true };
            let settings = AdamW { step, ..SETTINGS };
            adamw(device, &mut Table::default(), &[f32s.line(device)], &settings, None).unwrap();
            adamw(device, &mut Table::default(), &[bf16s.line(device)], &settings, None).unwrap();
        }
        let moments = [&m32, &v32, &m16, &v16].map(|moments| moments.to_vec().unwrap());
        (weight.to_vec().unwrap(), high.to_vec().unwrap(), rest.to_vec().unwrap(), moments)
    });
    let (mut weight, mut m, mut v) = (start, m, v);
    for step in steps {
        cpu_adamw::adamw(&mut weight, &gradient, &mut m, &mut v, &AdamW { step, ..SETTINGS });
    }
    assert_same("weights", &got.0, &weight);
    for (got, want) in got.3.iter().zip([&m, &v, &m, &v]) {
        assert_same("moments", got, want);
    }
    let mut masters = vec![0.0; len];
    cpu_adamw::join_all(&got.1, &got.2, &mut masters);
    assert_same("masters", &masters, &weight);
}

#[test]
fn muon_has_the_bits_of_the_cpu_around_its_products_and_waits_for_finite_gradients() {
    let Some(bench) = bench() else { return };
    let len = 700;
    let (start, gradient) = (uniform::<f32>(1, len).iter().map(|w| w / 3.0).collect::<Vec<_>>(), uniform::<f32>(2, len));
    let (m, delta) = (uniform::<f32>(3, len), uniform::<f32>(4, len));
    let m16: Vec<bf16> = m.iter().map(|m| bf16::from_f32(*m)).collect();
    let (mut hi, mut lo) = (vec![bf16::ZERO; len], vec![0i16; len]);
    cpu_adamw::split_all(&start, &mut hi, &mut lo);
    let broken: Vec<f32> = gradient.iter().enumerate().map(|(i, g)| if i == 5 { f32::NAN } else { *g }).collect();
    let got = bench.run(|device| {
        let (mut m32, mut m16) = (bench.upload(&m), bench.upload(&m16));
        let (mut update, mut update16) = (bench.upload(&start), bench.upload(&start));
        let (mut weight, mut high, mut rest) = (bench.upload(&start), bench.upload(&hi), bench.upload(&lo));
        let delta = bench.upload(&delta);
        let mut norm = Norm::new(device).unwrap();
        for gradient in [&broken, &gradient] {
            let gradient = bench.upload(gradient);
            norm.compute(&mut Table::default(), &[gradient.view()], 1.5).unwrap();
            muon::momentum(device, gradient.view(), m32.view_mut(), update.view_mut(), 0.9, 7, &norm).unwrap();
            muon::momentum(device, gradient.view(), m16.view_mut(), update16.view_mut(), 0.9, 7, &norm).unwrap();
            muon::move_by(device, weight.view_mut(), None, delta.view(), 0.75, &norm).unwrap();
            muon::move_by(device, high.view_mut(), Some(rest.view_mut()), delta.view(), 0.75, &norm).unwrap();
        }
        let updates = [&update, &update16].map(|update| update.to_vec().unwrap());
        let weights = (weight.to_vec().unwrap(), high.to_vec().unwrap(), rest.to_vec().unwrap());
        (m32.to_vec().unwrap(), m16.to_vec().unwrap(), updates, weights, f64::from(norm.factor().unwrap()))
    });
    let (mut m, mut m16, mut update) = (m, m16, vec![0.0; len]);
    cpu_muon::momentum(&gradient, &mut m, &mut update, 0.9, got.4, 7);
    assert_same("momentum", &got.0, &m);
    assert_same("update", &got.2[0], &update);
    cpu_muon::momentum(&gradient, &mut m16, &mut update, 0.9, got.4, 7);
    assert_same("bf16 momentum", &got.1, &m16);
    assert_same("update of a bf16 momentum", &got.2[1], &update);
    let moved: Vec<f32> = start.iter().zip(&delta).map(|(start, delta)| start * 0.75 + delta).collect();
    assert_same("weights", &got.3.0, &moved);
    let mut masters = vec![0.0; len];
    cpu_adamw::join_all(&got.3.1, &got.3.2, &mut masters);
    assert_same("masters", &masters, &moved);
}

#[test]
fn matrices_become_as_orthogonal_as_on_the_cpu() {
    let Some(bench) = bench() else { return };
    for (rows, columns, rank) in [(1, 9, 1), (40, 24, 24), (24, 40, 24), (33, 70, 33), (64, 48, 2)] {
        let mut values = uniform::<f32>(rows as u64, rows * columns);
        if rank < rows.min(columns) {
            let (left, right) = (uniform::<f32>(7, rows * rank), uniform::<f32>(8, rank * columns));
            let product = |i: usize| (0..rank).map(|k| left[i / columns * rank + k] * right[k * columns + i % columns]).sum();
            values = (0..rows * columns).map(product).collect();
        }
        let got = bench.run(|device| {
            let mut values = bench.upload(&values);
            muon::orthogonalise(device, values.view_mut(), rows, columns, 0.5).unwrap();
            values.to_vec().unwrap()
        });
        let mut kept = Buffer::scratch(values.len());
        kept.copy_from_slice(&values);
        let mut want = [cpu_muon::Matrix { values: kept, rows, columns, factor: 0.5 }];
        cpu_muon::orthogonalise(&mut want);
        let length = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        let far = length(&mut got.iter().zip(&want[0].values[..]).map(|(got, want)| got - want));
        let share = far / length(&mut want[0].values.iter().copied());
        // The order of sums differs, and five turns multiply what is small by 500.
        assert!(share < 2e-4, "[{rows}, {columns}] of rank {rank}: {share}");
    }
}

#[test]
fn the_global_norm_agrees() {
    let Some(bench) = bench() else { return };
    let tensors = LENGTHS.map(|len| uniform::<f32>(len as u64, len));
    let want = sum_of_squares(&tensors.each_ref().map(|t| &t[..]));
    let got = bench.run(|device| {
        let buffers = tensors.each_ref().map(|t| bench.upload(t));
        let views: Vec<_> = buffers.iter().map(|buffer| buffer.view()).collect();
        let mut norm = Norm::new(device).unwrap();
        norm.compute(&mut Table::default(), &views, 1e9).unwrap();
        (norm.sum_of_squares().unwrap(), norm.factor().unwrap())
    });
    assert!((got.0 - want).abs() <= 1e-12 * want, "{} and {want}", got.0);
    assert_eq!(got.1, 1.0, "a small norm is left as it is");
}
