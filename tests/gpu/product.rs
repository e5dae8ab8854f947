//! Products of linear layers, alone and in groups.

use crate::{assert_close, assert_same, bench, tolerance, uniform};
use half::bf16;
use perilune::kernels::cpu::{gemm, panels, tile::TileElement};
use perilune::kernels::cuda::memory::DeviceBuffer;
use perilune::kernels::cuda::product::{self, Groups, Residual, Weight};
use perilune::kernels::cuda::product_few::{self, Form, Norm};
use perilune::kernels::cuda::{rms_norm, swiglu};
use perilune::kernels::element::Float;

/// A linear layer on the CPU: (y, dx, dw).
fn on_cpu<E: TileElement>(x: &[E], w: &[E], bias: Option<&[E]>, dy: &[E], (n, k): (usize, usize)) -> (Vec<E>, Vec<f32>, Vec<f32>) {
    let m = x.len() / k;
    let mut packed = vec![E::default(); panels::len::<E>(n, k)];
    panels::pack(&mut packed, n, k, 0..n, w);
    let weight = gemm::Weight { panels: &packed, outputs: n, inputs: k };
    let (mut y, mut dx) = (vec![E::default(); m * n], vec![0.0f32; m * k]);
    gemm::forward(&mut y, x, None, weight, bias, None);
    gemm::input_gradient(&mut dx, dy, gemm::Weight { panels: &packed, outputs: n, inputs: k }, false);
    let (mut dw_panels, mut dw) = (vec![0.0f32; panels::len_f32(n, k)], vec![0.0f32; n * k]);
    gemm::weight_gradient(&mut dw_panels, dy, x, None, n, k, false);
    panels::unpack(&dw_panels, n, k, 0..n, &mut dw);
    (y, dx, dw)
}

fn linear_agrees<E: TileElement>(m: usize, n: usize, k: usize) {
    let Some(bench) = bench() else { return };
    let (x, w, dy) = (uniform::<E>(1, m * k), uniform::<E>(2, n * k), uniform::<E>(3, m * n));
    let bias = uniform::<E>(4, n);
    let (y, dx, dw) = on_cpu(&x, &w, Some(&bias), &dy, (n, k));
    let got = bench.run(|device| {
        let (x, w, dy, bias) = (bench.upload(&x), bench.upload(&w), bench.upload(&dy), bench.upload(&bias));
        let weight = Weight { values: w.view(), outputs: n, inputs: k };
        let (mut y, mut dx, mut dw) = (bench.poisoned::<E>(m * n), bench.poisoned::<f32>(m * k), bench.poisoned::<f32>(n * k));
        product::forward(device, y.view_mut(), x.view(), weight, Some(bias.view()), Residual::None, None).unwrap();
        product::input_gradient(device, dx.view_mut(), dy.view(), weight, false, None).unwrap();
        product::weight_gradient(device, dw.view_mut(), dy.view(), x.view(), (n, k), false, None).unwrap();
        (y.to_vec().unwrap(), dx.to_vec().unwrap(), dw.to_vec().unwrap())
    });
    // f32 sums in another order; y in bf16 is rounded once. Tensor cores cut what does not fit their sum instead of rounding it, so
    // their errors have one sign and grow with the number of products: 1e-5 for 256 of them.
    let by = |products: usize| 1e-5 * (products as f32 / 256.0).max(1.0);
    assert_close("y", &got.0, &y, tolerance::<E>(by(k), 8e-3));
    assert_close("dx", &got.1, &dx, by(n));
    assert_close("dw", &got.2, &dw, by(m));
}

#[test]
fn linear_layers_agree() {
    let shapes = [(1, 1, 1), (1, 65, 40), (3, 7, 5), (17, 130, 72), (33, 9, 129), (130, 72, 64)];
    for (m, n, k) in shapes {
        linear_agrees::<f32>(m, n, k);
        linear_agrees::<bf16>(m, n, k);
    }
    // The tile of 8 rows, with a long sum in whole chunks of 16 bytes and not; the last tile of columns is cut.
    linear_agrees::<bf16>(8, 20, 2312);
    linear_agrees::<bf16>(3, 9, 2300);
    // The tile of 128 rows; few columns, since the emulator pays for each.
    linear_agrees::<bf16>(264, 136, 40);
    linear_agrees::<bf16>(40, 264, 24);
    // Widths for which Hopper has wider tiles, one of which is no whole number of blocks of 64.
    linear_agrees::<bf16>(130, 1032, 24);
    linear_agrees::<bf16>(129, 224, 224);
}

#[test]
fn a_row_has_the_same_bits_in_every_tile() {
    let Some(bench) = bench() else { return };
    let (rows, n, k) = (270, 72, 328);
    let (x, w) = (uniform::<bf16>(1, rows * k), uniform::<bf16>(2, n * k));
    let forward = |x: &[bf16]| {
        let m = x.len() / k;
        let (x, w, mut y) = (bench.upload(x), bench.upload(&w), bench.poisoned::<f32>(m * n));
        let weight = Weight { values: w.view(), outputs: n, inputs: k };
        product::forward(&bench.device, y.view_mut(), x.view(), weight, None, Residual::None, None).unwrap();
        y.to_vec().unwrap()
    };
    let all = forward(&x);
    // Up to 8 rows take a tile of 8, 16 one of 16, 40 that of 64, all of them that of 128 (Hopper's, on it).
    for range in [0..1, 5..6, 17..24, 250..266, 100..140, 269..270] {
        assert_same("y", &forward(&x[range.start * k..range.end * k]), &all[range.start * n..range.end * n]);
    }
}

/// Products of up to 8 rows that normalise their rows and apply the gate, against the kernels that do one thing each.
#[test]
fn products_of_few_rows_have_the_bits_of_their_parts() {
    let Some(bench) = bench().filter(|bench| Form::exists(&bench.device)) else { return };
    // Rows that a norm sums by one warp and by several, whole slabs of the sum and not, several elements a thread; columns that end in a tile,
    // a warp's or a block's.
    for (m, n, k) in [(1, 12, 40), (3, 20, 264), (8, 10, 1032), (2, 4, 4104), (5, 2, 8), (1, 16, 896), (6, 3, 1536)] {
        let (x, w, scale) = (uniform::<bf16>(1, m * k), uniform::<bf16>(2, 2 * n * k), uniform::<bf16>(3, k));
        let (bias, residual, eps) = (uniform::<bf16>(4, 2 * n), uniform::<bf16>(5, m * 2 * n), 1e-6);
        let (got, want) = bench.run(|device| {
            let (w, scale, bias) = (bench.upload(&w), bench.upload(&scale), bench.upload(&bias));
            let weight = Weight { values: w.view(), outputs: 2 * n, inputs: k };
            // Of 17 rows, the first of which are those: they take another tile.
            let many = [&x[..], &uniform::<bf16>(6, (17 - m) * k)].concat();
            let (x, many) = (bench.upload(&x), bench.upload(&many));
            let residuals = bench.upload(&[&residual[..], &uniform::<bf16>(7, (17 - m) * 2 * n)].concat());
            let (mut normed, mut inv_rms) = (bench.poisoned::<bf16>(17 * k), bench.poisoned::<f32>(17));
            rms_norm::rms_norm(device, many.view(), None, scale.view(), eps, normed.view_mut(), inv_rms.view_mut()).unwrap();
            let (mut y, mut gate_up, mut plain) =
                (bench.poisoned::<bf16>(17 * 2 * n), bench.poisoned::<bf16>(17 * 2 * n), bench.poisoned::<bf16>(17 * 2 * n));
            product::forward(device, y.view_mut(), normed.view(), weight, Some(bias.view()), Residual::None, None).unwrap();
            product::forward(device, gate_up.view_mut(), normed.view(), weight, None, Residual::None, None).unwrap();
            product::forward(device, plain.view_mut(), many.view(), weight, None, Residual::Other(residuals.view()), None).unwrap();
            let mut gated = bench.poisoned::<bf16>(17 * n);
            swiglu::swiglu(device, gate_up.view(), n, gated.view_mut()).unwrap();
            let first = |buffer: DeviceBuffer<bf16>, width: usize| buffer.to_vec().unwrap()[..m * width].to_vec();
            let want = [first(y, 2 * n), first(plain, 2 * n), first(gated, n)];

            let norm = Some(Norm { weight: scale.view(), eps });
            let (mut y, mut plain, mut gated) =
                (bench.poisoned::<bf16>(m * 2 * n), bench.poisoned::<bf16>(m * 2 * n), bench.poisoned::<bf16>(m * n));
            let few = product_few::forward::<bf16, bf16>;
            few(device, Form::NORMED, y.view_mut(), x.view(), norm, weight, Some(bias.view()), Residual::None).unwrap();
            let residual = Residual::Other(residuals.part(..m * 2 * n));
            few(device, Form::PLAIN, plain.view_mut(), x.view(), None, weight, None, residual).unwrap();
            few(device, Form::GATED, gated.view_mut(), x.view(), norm, weight, None, Residual::None).unwrap();
            ([y, plain, gated].map(|buffer| buffer.to_vec().unwrap()), want)
        });
        for ((what, got), want) in ["normed", "plain", "gated"].iter().zip(&got).zip(&want) {
            assert_same(&format!("{what}, [{m}, {n}, {k}]"), got, want);
        }
    }
}

/// Sums whose weights are too long to be asked for at once: the tile of 8 rows with its ring of slabs.
#[test]
fn long_sums_of_few_rows_have_the_bits_of_many() {
    let Some(bench) = bench() else { return };
    for k in [14_600, 2_300] {
        let (x, w) = (uniform::<bf16>(1, 17 * k), uniform::<bf16>(2, 10 * k));
        let of = |rows: usize| {
            let (x, w, mut y) = (bench.upload(&x[..rows * k]), bench.upload(&w), bench.poisoned::<f32>(rows * 10));
            let weight = Weight { values: w.view(), outputs: 10, inputs: k };
            product::forward(&bench.device, y.view_mut(), x.view(), weight, None, Residual::None, None).unwrap();
            y.to_vec().unwrap()
        };
        assert_same("y", &of(3), &of(17)[..30]);
    }
}

#[test]
fn sums_go_on_in_what_is_there() {
    let Some(bench) = bench() else { return };
    let (m, n, k) = (5, 12, 24);
    let (x, w, dy, old) = (uniform::<bf16>(1, m * k), uniform::<bf16>(2, n * k), uniform::<bf16>(3, m * n), uniform::<bf16>(4, m * n));
    let (_, dx, dw) = on_cpu(&x, &w, None, &dy, (n, k));
    let got = bench.run(|device| {
        let (x, w, dy, old) = (bench.upload(&x), bench.upload(&w), bench.upload(&dy), bench.upload(&old));
        let weight = Weight { values: w.view(), outputs: n, inputs: k };
        let (mut y, mut plain) = (bench.poisoned::<f32>(m * n), bench.poisoned::<f32>(m * n));
        let (mut dx, mut dw) = (bench.upload(&vec![1.0f32; m * k]), bench.upload(&vec![2.0f32; n * k]));
        let wide: Vec<f32> = old.to_vec().unwrap().iter().map(|v| v.to_f32()).collect();
        let other = bench.upload(&wide);
        product::forward(device, plain.view_mut(), x.view(), weight, None, Residual::None, None).unwrap();
        product::forward(device, y.view_mut(), x.view(), weight, None, Residual::Other(other.view()), None).unwrap();
        product::input_gradient(device, dx.view_mut(), dy.view(), weight, true, None).unwrap();
        product::weight_gradient(device, dw.view_mut(), dy.view(), x.view(), (n, k), true, None).unwrap();
        let sum: Vec<f32> = plain.to_vec().unwrap().iter().zip(&wide).map(|(y, old)| y + old).collect();
        assert_same("y + residual", &y.to_vec().unwrap(), &sum);
        (dx.to_vec().unwrap(), dw.to_vec().unwrap())
    });
    assert_close("dx", &got.0, &dx.iter().map(|v| v + 1.0).collect::<Vec<_>>(), 1e-5);
    assert_close("dw", &got.1, &dw.iter().map(|v| v + 2.0).collect::<Vec<_>>(), 1e-5);
}

fn groups_agree<E: TileElement + Float>(offsets: &[i32], n: usize, k: usize) {
    let Some(bench) = bench() else { return };
    let (count, m) = (offsets.len() - 1, *offsets.last().unwrap() as usize);
    let (x, w, dy) = (uniform::<E>(1, m * k), uniform::<E>(2, count * n * k), uniform::<E>(3, m * n));
    let (mut y, mut dx, mut dw) = (Vec::new(), Vec::new(), Vec::new());
    for (group, pair) in offsets.windows(2).enumerate() {
        let rows = pair[0] as usize..pair[1] as usize;
        let (x, dy) = (&x[rows.start * k..rows.end * k], &dy[rows.start * n..rows.end * n]);
        let (own_y, own_dx, own_dw) = on_cpu(x, &w[group * n * k..(group + 1) * n * k], None, dy, (n, k));
        y.extend(own_y);
        dx.extend(own_dx);
        dw.extend(own_dw);
    }
    let got = bench.run(|device| {
        let (x, w, dy, offsets) = (bench.upload(&x), bench.upload(&w), bench.upload(&dy), bench.upload(offsets));
        let groups = Some(Groups { offsets: offsets.view() });
        let weight = Weight { values: w.view(), outputs: n, inputs: k };
        let (mut y, mut dx, mut dw) = (bench.poisoned::<E>(m * n), bench.poisoned::<f32>(m * k), bench.poisoned::<f32>(count * n * k));
        product::forward(device, y.view_mut(), x.view(), weight, None, Residual::None, groups).unwrap();
        product::input_gradient(device, dx.view_mut(), dy.view(), weight, false, groups).unwrap();
        product::weight_gradient(device, dw.view_mut(), dy.view(), x.view(), (n, k), false, groups).unwrap();
        (y.to_vec().unwrap(), dx.to_vec().unwrap(), dw.to_vec().unwrap())
    });
    assert_close("y", &got.0, &y, tolerance::<E>(1e-5, 8e-3));
    assert_close("dx", &got.1, &dx, 1e-5);
    assert_close("dw", &got.2, &dw, 1e-5);
}

#[test]
fn groups_of_experts_agree() {
    // An expert without tokens, one with one, one with more than a tile.
    for offsets in [&[0, 0, 1, 70, 75][..], &[0, 3]] {
        groups_agree::<f32>(offsets, 24, 40);
        groups_agree::<bf16>(offsets, 24, 40);
        groups_agree::<bf16>(offsets, 9, 7);
    }
}
