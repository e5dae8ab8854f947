//! Weights of 8 bits on the device: products and lookups with the bits of the CPU, and models that generate with them.

use crate::adapters::lora;
use crate::decode::{jobs, reports_what_training_computes};
use crate::model::{assert_near, config, with_batch};
use crate::{assert_same, bench, uniform};
use half::bf16;
use perilune::kernels::cpu::int8::{self, Int8WeightMut};
use perilune::kernels::cuda::int8::Int8Weight;
use perilune::kernels::cuda::product::Groups;
use perilune::kernels::element::{Dtype, Float};
use perilune::model::Model;
use perilune::tensor::Place;

/// A weight `[outputs, inputs]` on the CPU.
struct Packed {
    values: Vec<i8>,
    scales: Vec<f32>,
    sums: Vec<i32>,
    inputs: usize,
}

impl Packed {
    fn new(outputs: usize, inputs: usize, from: &[f32]) -> Self {
        let (mut values, mut scales, mut sums) = (vec![0; int8::len(outputs, inputs)], vec![0.0; outputs], vec![0; outputs]);
        int8::pack(Int8WeightMut { values: &mut values, scales: &mut scales, sums: &mut sums, inputs }, 0..outputs, from);
        Self { values, scales, sums, inputs }
    }

    fn weight(&self) -> int8::Int8Weight<'_> {
        let Self { values, scales, sums, inputs } = self;
        int8::Int8Weight { values, scales, sums, outputs: scales.len(), inputs: *inputs }
    }
}

/// Values that no two rows round alike.
fn weights(groups: usize, outputs: usize, inputs: usize) -> Vec<f32> {
    uniform::<f32>(1, groups * outputs * inputs).iter().enumerate().map(|(i, value)| value * (1 + i / inputs) as f32 / 3.0).collect()
}

fn products_agree<E: Float>(rows: usize, outputs: usize, inputs: usize) {
    let Some(bench) = bench() else { return };
    let (from, bias, residual) = (weights(1, outputs, inputs), uniform::<E>(2, outputs), uniform::<E>(3, rows * outputs));
    let mut x: Vec<E> = uniform(4, rows * inputs);
    if rows > 3 {
        // A row of zeros, and one that is not finite.
        x[inputs..2 * inputs].fill(E::from_f32(0.0));
        x[2 * inputs] = E::from_f32(f32::INFINITY);
    }
    let packed = Packed::new(outputs, inputs, &from);
    let (mut y, mut bare) = (vec![E::default(); rows * outputs], vec![0.0f32; rows * outputs]);
    int8::forward(&mut y, &x, None, packed.weight(), Some(&bias), Some(&residual));
    int8::forward::<E, f32>(&mut bare, &x, None, packed.weight(), None, None);
    let mut table = vec![0.0; outputs * inputs];
    table.chunks_exact_mut(inputs).enumerate().for_each(|(row, out)| int8::read_row(packed.weight(), row, out));
    let ids: Vec<i32> = (0..5).map(|token| (token * 7) % outputs as i32).collect();
    let looked_up: Vec<E> = ids.iter().flat_map(|id| &table[*id as usize * inputs..][..inputs]).map(|value| E::from_f32(*value)).collect();
    let got = bench.run(|device| {
        let mut weight = Int8Weight::zeroed(device, "test", outputs, inputs).unwrap();
        // In two pieces, as files are read.
        let middle = outputs / 2;
        weight.write_rows(0..middle, &from[..middle * inputs]).unwrap();
        weight.write_rows(middle..outputs, &from[middle * inputs..]).unwrap();
        let mut read = vec![0.0; outputs * inputs];
        weight.read_rows(0..outputs, &mut read).unwrap();
        let (x, bias, residual, ids) = (bench.upload(&x), bench.upload(&bias), bench.upload(&residual), bench.upload(&ids));
        let (mut y, mut bare) = (bench.poisoned::<E>(rows * outputs), bench.poisoned::<f32>(rows * outputs));
        weight.forward(device, y.view_mut(), x.view(), Some(bias.view()), Some(residual.view()), None).unwrap();
        weight.forward(device, bare.view_mut(), x.view(), None, None, None).unwrap();
        let mut looked_up = bench.poisoned::<E>(5 * inputs);
        weight.embed(device, ids.view(), looked_up.view_mut()).unwrap();
        let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        let wide = |values: Vec<E>| values.into_iter().map(|value| value.to_f32()).collect::<Vec<_>>();
        let [y, looked_up] = [y, looked_up].map(|buffer| bits(wide(buffer.to_vec().unwrap())));
        (bits(read), y, bits(bare.to_vec().unwrap()), looked_up)
    });
    let floats = |bits: &[u32]| {
        bits.iter().map(|bits| f32::from_bits(*bits)).map(|value| if value.is_nan() { 1e30 } else { value }).collect::<Vec<_>>()
    };
    let known = |values: Vec<f32>| values.into_iter().map(|value| if value.is_nan() { 1e30 } else { value }).collect::<Vec<_>>();
    let wide = |values: &[E]| values.iter().map(|value| value.to_f32()).collect::<Vec<_>>();
    assert_same("weights", &floats(&got.0), &table);
    assert_same("products", &floats(&got.1), &known(wide(&y)));
    assert_same("products in f32", &floats(&got.2), &known(bare));
    assert_same("lookups", &floats(&got.3), &wide(&looked_up));
}

#[test]
fn products_of_integers_have_the_bits_of_the_cpu() {
    for (rows, outputs, inputs) in [(1, 1, 1), (1, 33, 40), (5, 7, 33), (9, 70, 16), (70, 65, 530)] {
        products_agree::<f32>(rows, outputs, inputs);
        products_agree::<bf16>(rows, outputs, inputs);
    }
}

/// Rows of experts, one of them without any, as single products give them.
#[test]
fn groups_of_rows_use_their_own_integers() {
    let Some(bench) = bench() else { return };
    let (outputs, inputs, offsets) = (21, 40, [0, 3, 3, 12]);
    let from = weights(3, outputs, inputs);
    let x: Vec<bf16> = uniform(4, 12 * inputs);
    let got = bench.run(|device| {
        let mut weight = Int8Weight::zeroed(device, "test", 3 * outputs, inputs).unwrap();
        weight.write_rows(0..3 * outputs, &from).unwrap();
        let (x, offsets) = (bench.upload(&x), bench.upload(&offsets));
        let mut y = bench.poisoned::<bf16>(12 * outputs);
        weight.forward(device, y.view_mut(), x.view(), None, None, Some(Groups { offsets: offsets.view() })).unwrap();
        y.to_vec().unwrap()
    });
    for (group, pair) in offsets.windows(2).enumerate() {
        let rows = pair[0] as usize..pair[1] as usize;
        let packed = Packed::new(outputs, inputs, &from[group * outputs * inputs..(group + 1) * outputs * inputs]);
        let mut want = vec![bf16::ZERO; rows.len() * outputs];
        int8::forward(&mut want, &x[rows.start * inputs..rows.end * inputs], None, packed.weight(), None, None);
        assert_same("a group", &got[rows.start * outputs..rows.end * outputs], &want);
    }
}

#[test]
fn models_of_integers_score_and_generate_as_on_the_cpu() {
    let Some(bench) = bench() else { return };
    let place = Place::Cuda(bench.device.clone());
    let folder = tempfile::tempdir().unwrap();
    for (moe, adapter) in [(false, None), (true, None), (false, Some(false)), (true, Some(true))] {
        let what = format!("experts {moe}, adapter {adapter:?}");
        let host = Model::random(config(moe), Dtype::I8, 3).unwrap();
        let model = Model::random_at(&place, config(moe), Dtype::I8, 3).unwrap();
        if let Some(dora) = adapter {
            // One that was trained elsewhere.
            let trained = Model::random(config(moe), Dtype::Bf16, 3).unwrap();
            trained.adapt(lora(&["all-linear"], dora), 5).unwrap();
            let path = folder.path().join(format!("{moe}"));
            trained.save_adapter(&path, None, None).unwrap();
            for model in [&host, &model] {
                model.load_adapter(&path, false, &mut |remark| panic!("{remark}")).unwrap();
            }
        }
        assert!(model.is_int8() && model.trainable() == host.trainable(), "{what}");
        for (name, _) in host.tensors() {
            let [want, got] = [&host, &model].map(|model| model.value(&name).unwrap().to_f32_vec());
            assert!(want == got, "{what}: {name} is another one on the device");
        }
        let [want, got] = [&host, &model].map(|model| with_batch(|batch| model.logits(batch)).unwrap().values().to_vec());
        // Activations are bf16, and attention sums in another order.
        assert_near(&format!("{what}: logits"), &got, &want, 2e-2);
        reports_what_training_computes(&what, &model, &jobs());
        if adapter == Some(false) {
            [&host, &model].into_iter().for_each(|model| model.merge().unwrap());
            let [want, got] = [&host, &model].map(|model| with_batch(|batch| model.logits(batch)).unwrap().values().to_vec());
            assert_near(&format!("{what}: merged"), &got, &want, 2e-2);
        }
    }
}
