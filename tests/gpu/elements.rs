//! Conversions, sums, rows put at their places, and the columns of low-rank parts: the bits of the CPU.

use crate::{assert_same, bench, uniform};
use half::bf16;
use perilune::kernels::cpu::{low_rank, norm};
use perilune::kernels::cuda::elements;
use perilune::kernels::element::Float;

fn elements_agree<E: Float>(rows: usize, width: usize) {
    let Some(bench) = bench() else { return };
    let (x, y) = (uniform::<E>(1, rows * width), uniform::<E>(2, rows * width));
    // Not exact in bf16.
    let wide: Vec<f32> = uniform::<f32>(3, rows * width).iter().map(|value| value / 3.0).collect();
    let columns = width / 3..width / 3 + width.div_ceil(2);
    let delta: Vec<f32> = wide[..rows * columns.len()].to_vec();
    let places: Vec<i32> = (0..rows as i32).rev().map(|row| row * 2).collect();
    let got = bench.run(|device| {
        let (x, wide, delta, places) = (bench.upload(&x), bench.upload(&wide), bench.upload(&delta), bench.upload(&places));
        let (mut widened, mut narrowed) = (bench.poisoned::<f32>(rows * width), bench.poisoned::<E>(rows * width));
        elements::widen(device, x.view(), widened.view_mut()).unwrap();
        elements::narrow(device, wide.view(), narrowed.view_mut()).unwrap();
        let (mut sum, mut put) = (bench.upload(&y), bench.upload(&vec![E::from_f32(1.0); 2 * rows * width]));
        elements::add(device, sum.view_mut(), x.view()).unwrap();
        elements::put_rows(device, x.view(), places.view(), width, put.view_mut(), true).unwrap();
        elements::put_rows(device, x.view(), places.view(), width, put.view_mut(), true).unwrap();
        let (mut added, mut taken) = (bench.upload(&y), bench.poisoned::<E>(rows * columns.len()));
        elements::add_columns(device, added.view_mut(), width, columns.clone(), delta.view(), 0.3).unwrap();
        elements::take_columns(device, x.view(), width, columns.clone(), 0.3, taken.view_mut()).unwrap();
        let all = [&narrowed, &sum, &put, &added, &taken].map(|buffer| buffer.to_vec().unwrap());
        (widened.to_vec().unwrap(), all)
    });
    let (mut widened, mut narrowed) = (vec![0.0; rows * width], vec![E::default(); rows * width]);
    norm::convert(&x, &mut widened);
    norm::convert(&wide, &mut narrowed);
    let (mut sum, mut added, mut taken) = (y.clone(), y, vec![E::default(); rows * columns.len()]);
    norm::add(&mut sum, &x);
    low_rank::add_columns(&mut added, width, columns.clone(), &delta, 0.3);
    low_rank::take_columns(&x, width, columns, 0.3, &mut taken);
    let mut put = vec![E::from_f32(1.0); 2 * rows * width];
    for _ in 0..2 {
        for (from, place) in x.chunks_exact(width).zip(&places) {
            norm::add(&mut put[*place as usize * width..][..width], from);
        }
    }
    assert_same("widened", &got.0, &widened);
    for (what, got, want) in [
        ("narrowed", &got.1[0], &narrowed),
        ("sum", &got.1[1], &sum),
        ("rows put", &got.1[2], &put),
        ("columns added", &got.1[3], &added),
        ("columns taken", &got.1[4], &taken),
    ] {
        assert_same(what, got, want);
    }
}

#[test]
fn elements_have_the_bits_of_the_cpu() {
    for (rows, width) in [(1, 1), (3, 7), (5, 33), (2, 260)] {
        elements_agree::<f32>(rows, width);
        elements_agree::<bf16>(rows, width);
    }
}
