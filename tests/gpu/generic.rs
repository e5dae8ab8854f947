//! Generic mathematics: kernels written from expressions.

use crate::{assert_close, assert_same, bench, uniform};
use perilune::kernels::cuda::generic::{Input, Reduction, elementwise, reduce, scatter, select, sum_rows};

#[test]
fn elementwise_broadcasts_by_strides() {
    let Some(bench) = bench() else { return };
    // [3, 1, 5] times [4, 1], plus the transpose of [5, 12] as [3, 4, 5].
    let (a, b, c) = (uniform::<f32>(1, 15), uniform::<f32>(2, 4), uniform::<f32>(3, 60));
    let got = bench.run(|device| {
        let (a, b, c, mut out) = (bench.upload(&a), bench.upload(&b), bench.upload(&c), bench.poisoned::<f32>(60));
        let inputs = [
            Input { values: a.view(), offset: 0, strides: &[5, 0, 1] },
            Input { values: b.view(), offset: 0, strides: &[0, 1, 0] },
            Input { values: c.view(), offset: 0, strides: &[4, 1, 12] },
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
fn views_run_backwards_and_back() {
    let Some(bench) = bench() else { return };
    // Every second of 9 columns from the last on, of 3 rows; and into the same places of other elements.
    let x = uniform::<f32>(1, 27);
    let (shape, offset, strides) = ([3, 5], 8, [9, -2]);
    let places: Vec<usize> = (0..15).map(|i| 8 + i / 5 * 9 - i % 5 * 2).collect();
    let (read, written) = bench.run(|device| {
        let (x, mut out) = (bench.upload(&x), bench.poisoned::<f32>(15));
        let input = Input { values: x.view(), offset, strides: &strides };
        elementwise(device, "slice", "x0", &shape, &[input], out.view_mut()).unwrap();
        let mut back = bench.upload(&[7.0f32; 27]);
        scatter(device, "slice", out.view(), &shape, offset, &strides, back.view_mut()).unwrap();
        (out.to_vec().unwrap(), back.to_vec().unwrap())
    });
    assert_same("a view", &read, &places.iter().map(|at| x[*at]).collect::<Vec<_>>());
    let mut want = [7.0; 27];
    places.iter().for_each(|at| want[*at] = x[*at]);
    assert_same("the way back", &written, &want);
}

#[test]
fn places_are_picked_and_their_gradients_added() {
    let Some(bench) = bench() else { return };
    let (outer, axis, inner) = (3, 6, 5);
    let index = [4, 0, 4, 5];
    let from = uniform::<f32>(1, outer * axis * inner);
    let mut want = vec![0.0f32; outer * index.len() * inner];
    for (at, want) in want.iter_mut().enumerate() {
        let (o, j, i) = (at / inner / index.len(), at / inner % index.len(), at % inner);
        *want = from[(o * axis + index[j] as usize) * inner + i];
    }
    let rows = uniform::<f32>(2, 4 * inner);
    // The rows that were read from 0, 4 and 5, in order; nothing was from 1 to 3.
    let (starts, lists) = ([0, 1, 1, 1, 1, 3, 4], [1, 0, 2, 3]);
    let sum = |row: usize, i: usize| {
        lists[starts[row] as usize..starts[row + 1] as usize].iter().map(|at| f64::from(rows[*at as usize * inner + i])).sum::<f64>()
    };
    let want_sums: Vec<f32> = (0..axis * inner).map(|at| sum(at / inner, at % inner) as f32).collect();
    let got = bench.run(|device| {
        let (from, index, rows) = (bench.upload(&from), bench.upload(&index), bench.upload(&rows));
        let (starts, lists) = (bench.upload(&starts), bench.upload(&lists));
        let (mut out, mut sums) = (bench.poisoned::<f32>(want.len()), bench.poisoned::<f32>(axis * inner));
        select(device, "select", from.view(), axis, inner, index.view(), out.view_mut()).unwrap();
        sum_rows(device, "select", rows.view(), starts.view(), lists.view(), inner, sums.view_mut()).unwrap();
        (out.to_vec().unwrap(), sums.to_vec().unwrap())
    });
    assert_same("select", &got.0, &want);
    assert_same("sums of rows", &got.1, &want_sums);
}
