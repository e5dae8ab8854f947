//! Attention over packed documents, forward and backward.

use crate::{assert_close, assert_same, bench, tolerance, uniform};
use half::bf16;
use perilune::kernels::cpu::{self, heads::Heads};
use perilune::kernels::cuda::attention::{Kernels, Plan, attention};
use perilune::kernels::cuda::attention_backward::{HopperTiles, Saved, attention_backward};
use perilune::kernels::element::Float;

pub fn borders(lens: &[usize]) -> Vec<i32> {
    let sums = lens.iter().scan(0, |sum, len| {
        *sum += *len as i32;
        Some(*sum)
    });
    std::iter::once(0).chain(sums).collect()
}

pub fn heads(heads: usize, kv_heads: usize, head_dim: usize) -> Heads {
    Heads { heads, kv_heads, head_dim }
}

/// Outputs, log-sum-exp and gradient.
type Results<E> = (Vec<E>, Vec<f32>, Vec<E>);

fn on_device<E: Float>(heads: Heads, cu_seqlens: &[i32], window: Option<usize>, qkv: &[E], d_o: &[E]) -> Results<E> {
    on_device_with(heads, cu_seqlens, window, None, qkv, d_o)
}

/// [`on_device`], perhaps with other kernels than those of the device.
fn on_device_with<E: Float>(
    heads: Heads,
    cu_seqlens: &[i32],
    window: Option<usize>,
    kernels: Option<Kernels>,
    qkv: &[E],
    d_o: &[E],
) -> Results<E> {
    let bench = bench().unwrap();
    let scale = (heads.head_dim as f32).powf(-0.5);
    bench.run(|device| {
        let plan = match kernels {
            None => Plan::packed(device, heads, cu_seqlens, scale, window).unwrap(),
            Some(kernels) => Plan::packed_with(device, heads, cu_seqlens, scale, window, kernels).unwrap(),
        };
        let (qkv, d_o) = (bench.upload(qkv), bench.upload(d_o));
        let rows = d_o.len() / (heads.heads * heads.head_dim);
        let (mut o, mut lse) = (bench.poisoned::<E>(d_o.len()), bench.poisoned::<f32>(rows * heads.heads));
        attention(device, &plan, qkv.view(), o.view_mut(), lse.view_mut()).unwrap();
        let (mut deltas, mut dqkv) = (bench.poisoned::<f32>(lse.len()), bench.poisoned::<E>(qkv.len()));
        let saved = Saved { qkv: qkv.view(), o: o.view(), lse: lse.view() };
        attention_backward(device, &plan, d_o.view(), saved, deltas.view_mut(), dqkv.view_mut()).unwrap();
        (o.to_vec().unwrap(), lse.to_vec().unwrap(), dqkv.to_vec().unwrap())
    })
}

fn attention_agrees<E: Float>(heads: Heads, lens: &[usize], window: Option<usize>) {
    attention_agrees_with::<E>(heads, lens, window, None);
}

fn attention_agrees_with<E: Float>(heads: Heads, lens: &[usize], window: Option<usize>, kernels: Option<Kernels>) {
    if bench().is_none() {
        return;
    }
    let cu_seqlens = borders(lens);
    let tokens = lens.iter().sum::<usize>();
    let (qkv, d_o) = (uniform::<E>(1, tokens * heads.width()), uniform::<E>(2, tokens * heads.heads * heads.head_dim));
    let settings =
        cpu::attention::Attention { heads, cu_seqlens: &cu_seqlens, prefixes: &[], scale: (heads.head_dim as f32).powf(-0.5), window };
    let (mut o, mut lse, mut dqkv) = (d_o.clone(), vec![0.0; tokens * heads.heads], qkv.clone());
    cpu::attention::attention(&settings, &qkv, &mut o, &mut lse).unwrap();
    cpu::attention_backward::attention_backward(&settings, &d_o, &qkv, &o, &lse, &mut dqkv).unwrap();
    let got = on_device_with(heads, &cu_seqlens, window, kernels, &qkv, &d_o);
    let what = format!("{heads:?} {lens:?} {window:?} {kernels:?}");
    // In bf16 both round the probabilities, but relative to other maxima: some units of 2^-9 on values around 1.
    assert_close(&format!("lse {what}"), &got.1, &lse, tolerance::<E>(3e-6, 1e-5));
    assert_close(&format!("o {what}"), &got.0, &o, tolerance::<E>(3e-6, 1.2e-2));
    assert_close(&format!("dqkv {what}"), &got.2, &dqkv, tolerance::<E>(1e-5, 3e-2));
}

#[test]
fn attention_agrees_in_f32() {
    let cases: [(Heads, &[usize], Option<usize>); 5] = [
        (heads(1, 1, 2), &[1], None),
        (heads(4, 2, 8), &[5, 0, 33, 1], None),
        (heads(3, 1, 64), &[70], Some(9)),
        (heads(2, 2, 80), &[3, 40], Some(1)),
        (heads(2, 1, 128), &[20], None),
    ];
    for (heads, lens, window) in cases {
        attention_agrees::<f32>(heads, lens, window);
    }
}

#[test]
fn attention_agrees_in_bf16() {
    let cases: [(Heads, &[usize], Option<usize>); 6] = [
        (heads(1, 1, 2), &[1], None),
        (heads(4, 2, 16), &[5, 0, 133, 1], None),
        (heads(3, 1, 64), &[150, 7], Some(9)),
        (heads(2, 2, 80), &[3, 70], Some(1)),
        (heads(2, 1, 10), &[67], Some(64)),
        (heads(1, 1, 128), &[65], None),
    ];
    for (heads, lens, window) in cases {
        attention_agrees::<bf16>(heads, lens, window);
    }
}

#[test]
fn attention_agrees_where_hopper_has_kernels() {
    // Lengths around tiles of 64, 128 and 192; groups of 1 and 7; windows that end inside a tile, at its border, and cover all.
    let cases: [(Heads, &[usize], Option<usize>); 7] = [
        (heads(7, 1, 64), &[1, 0, 70], None),
        (heads(2, 2, 64), &[193, 64, 5], None),
        (heads(2, 1, 64), &[200, 128], Some(64)),
        (heads(1, 1, 64), &[260], Some(70)),
        (heads(2, 2, 128), &[129, 3], None),
        (heads(7, 1, 128), &[66], None),
        (heads(2, 1, 128), &[150, 64], Some(1)),
    ];
    for (heads, lens, window) in cases {
        attention_agrees::<bf16>(heads, lens, window);
    }
}

#[test]
fn attention_agrees_with_other_kernels() {
    if bench().is_none_or(|bench| bench.device.capability != (9, 0)) {
        return;
    }
    let with = |tiles| Some(Kernels { forward_on_hopper: true, backward: Some(tiles) });
    let threes = HopperTiles { query_groups: 3, query_blocks: 1, key_groups: 1, key_splits: 3 };
    let wide = HopperTiles { query_groups: 1, query_blocks: 1, key_groups: 2, key_splits: 2 };
    attention_agrees_with::<bf16>(heads(3, 1, 64), &[135, 1], None, with(threes));
    attention_agrees_with::<bf16>(heads(2, 1, 64), &[135, 1], Some(67), with(wide));
    let split = HopperTiles { key_groups: 1, key_splits: 2, ..HopperTiles::of(128) };
    attention_agrees_with::<bf16>(heads(1, 1, 128), &[135, 1], None, with(split));
    // Those of other devices.
    attention_agrees_with::<bf16>(heads(2, 1, 64), &[70, 1], None, Some(Kernels { forward_on_hopper: false, backward: None }));
}

#[test]
fn wgmma_and_mma_give_the_same_bits() {
    if bench().is_none_or(|bench| bench.device.capability != (9, 0)) {
        return;
    }
    for (heads, len) in [(heads(1, 1, 64), 580), (heads(1, 1, 128), 140)] {
        let (qkv, d_o) = (uniform::<bf16>(1, len * heads.width()), uniform::<bf16>(2, len * heads.heads * heads.head_dim));
        let [wgmma, mma] = [true, false].map(|forward_on_hopper| {
            let kernels = Kernels { forward_on_hopper, backward: Some(HopperTiles::of(heads.head_dim)) };
            on_device_with(heads, &[0, len as i32], None, Some(kernels), &qkv, &d_o)
        });
        assert_same("o", &wgmma.0, &mma.0);
        assert_same("lse", &wgmma.1, &mma.1);
        assert_same("dqkv", &wgmma.2, &mma.2);
    }
}

#[test]
fn attention_over_several_spans_agrees() {
    // 512 keys are a span: the sums of three meet here, and a window ends in the middle of one.
    attention_agrees::<bf16>(heads(1, 1, 16), &[1100], None);
    attention_agrees::<bf16>(heads(1, 1, 16), &[1100], Some(520));
    // A width for which Hopper has a kernel of its own.
    attention_agrees::<bf16>(heads(1, 1, 128), &[600], None);
}

#[test]
fn a_document_has_the_same_bits_alone() {
    if bench().is_none() {
        return;
    }
    fn check<E: Float>(heads: Heads, lens: &[usize]) {
        let (width, d_width) = (heads.width(), heads.heads * heads.head_dim);
        let tokens = lens.iter().sum::<usize>();
        let (qkv, d_o) = (uniform::<E>(1, tokens * width), uniform::<E>(2, tokens * d_width));
        let all = on_device(heads, &borders(lens), None, &qkv, &d_o);
        let mut start = 0;
        for len in lens {
            let rows = start..start + len;
            let part = |values: &[E], width: usize| values[rows.start * width..rows.end * width].to_vec();
            let own = on_device(heads, &[0, *len as i32], None, &part(&qkv, width), &part(&d_o, d_width));
            assert_same("o", &own.0, &part(&all.0, d_width));
            assert_same("lse", &own.1, &all.1[rows.start * heads.heads..rows.end * heads.heads]);
            assert_same("dqkv", &own.2, &part(&all.2, width));
            start += len;
        }
    }
    check::<bf16>(heads(2, 1, 16), &[3, 130, 64]);
    check::<bf16>(heads(2, 1, 64), &[3, 130, 64]);
    check::<bf16>(heads(2, 1, 128), &[70, 3]);
    check::<f32>(heads(2, 1, 16), &[3, 40]);
}
