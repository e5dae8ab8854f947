//! Generic mathematics: kernels written from expressions.

use crate::{assert_close, assert_same, bench, uniform};
use perilune::kernels::cuda::generic::{Input, Reduction, elementwise, reduce, select, select_backward};

#[test]
fn elementwise_broadcasts_by_strides() {
    let Some(bench) = bench() else { return };
    // [3, 1, 5] times [4, 1], plus the transpose of [5, 12] as [3, 4, 5].
    let (a, b, c) = (uniform::<f32>(1, 15), uniform::<f32>(2, 4), uniform::<f32>(3, 60));
    let got = bench.run(|device| {
        let (a, b, c, mut out) = (bench.upload(&a), bench.upload(&b), bench.upload(&c), bench.poisoned::<f32>(60));
        let inputs = [
            Input { values: a.view(), strides: &[5, 0, 1] },
            Input { values: b.view(), strides: &[0, 1, 0] },
            Input { values: c.view(), strides: &[4, 1, 12] },
        ];
        elementwise(device, "test", "x0 * x1 + x2", &[3, 4, 5], &inputs, out.view_mut()).unwrap();
        out.to_vec().unwrap()
    });
    let want: Vec<f32> = (0..60).map(|i| (i / 20, i / 5 % 4, i % 5)).map(|(i, j, l)| a[i * 5 + l] * b[j] + c[i * 4 + j + 12 * l]).collect();
    assert_same("x0 * x1 + x2", &got, &want);
}

#[test]
fn an_expression_that_is_no_code_says_so() {
    let Some(bench) = bench() else { return };
    let mut out = bench.poisoned::<f32>(1);
    let error = elementwise(&bench.device, "exp", "expp(1.0f)", &[1], &[], out.view_mut()).unwrap_err().to_string();
    assert!(error.starts_with("exp: generated.cu") && error.contains("does not compile") && error.contains("expp"), "{error}");
}

#[test]
fn reductions_agree() {
    let Some(bench) = bench() else { return };
    for (outer, count, inner) in [(1, 1, 1), (3, 70, 1), (2, 33, 5), (4, 0, 2)] {
        let x = uniform::<f32>(1, outer * count * inner);
        let line = |o: usize, i: usize| (0..count).map(move |j| (o * count + j) * inner + i);
        let each = |f: &dyn Fn(Vec<f32>) -> f32| -> Vec<f32> {
            (0..outer * inner).map(|at| f(line(at / inner, at % inner).map(|i| x[i]).collect())).collect()
        };
        let sum = |values: &[f32]| values.iter().map(|v| f64::from(*v)).sum::<f64>() as f32;
        for (reduction, want) in [
            (Reduction::SUM, each(&|v| sum(&v))),
            (Reduction::MEAN, each(&|v| sum(&v) / v.len() as f32)),
            (Reduction::MAX, each(&|v| v.into_iter().fold(f32::NEG_INFINITY, f32::max))),
        ] {
            let got = bench.run(|device| {
                let (x, mut out) = (bench.upload(&x), bench.poisoned::<f32>(outer * inner));
                reduce(device, "reduce", reduction, x.view(), count, inner, out.view_mut()).unwrap();
                out.to_vec().unwrap().iter().map(|v| v.to_bits()).collect::<Vec<_>>()
            });
            let got: Vec<f32> = got.into_iter().map(f32::from_bits).collect();
            if count > 0 {
                assert_close("reduction", &got, &want, 2e-6);
            }
        }
    }
    let x = bench.upload(&[1.0f32, f32::NAN, 3.0]);
    let mut out = bench.poisoned::<f32>(1);
    reduce(&bench.device, "max", Reduction::MAX, x.view(), 3, 1, out.view_mut()).unwrap();
    assert!(out.to_vec().unwrap()[0].is_nan(), "a NaN wins");
}

#[test]
fn places_are_picked_and_their_gradients_added() {
    let Some(bench) = bench() else { return };
    let (outer, axis, inner) = (3, 6, 5);
    let index = [4, 0, 4, 5];
    let (from, d_out) = (uniform::<f32>(1, outer * axis * inner), uniform::<f32>(2, outer * index.len() * inner));
    let (mut want, mut want_d) = (vec![0.0f32; d_out.len()], vec![1.0f32; from.len()]);
    for o in 0..outer {
        for (j, place) in index.iter().enumerate() {
            for i in 0..inner {
                let (source, target) = ((o * axis + *place as usize) * inner + i, (o * index.len() + j) * inner + i);
                want[target] = from[source];
                want_d[source] += d_out[target];
            }
        }
    }
    let got = bench.run(|device| {
        let (from, d_out, index) = (bench.upload(&from), bench.upload(&d_out), bench.upload(&index));
        let (mut out, mut d_from) = (bench.poisoned::<f32>(d_out.len()), bench.upload(&vec![1.0f32; from.len()]));
        select(device, "select", from.view(), axis, inner, index.view(), out.view_mut()).unwrap();
        select_backward(device, "select", d_out.view(), axis, inner, index.view(), d_from.view_mut()).unwrap();
        (out.to_vec().unwrap(), d_from.to_vec().unwrap())
    });
    assert_same("select", &got.0, &want);
    assert_same("select backward", &got.1, &want_d);
}
