//! Generic tensors on the device: PyTorch's cases as on the CPU, what the cases leave out, and operands that lie apart.

use crate::golden_tensor_ops::check_all;
use crate::{assert_close, bench, uniform};
use perilune::kernels::buffer::Buffer;
use perilune::kernels::element::Dtype;
use perilune::tensor::{AnyTensor, Place, arithmetic, convert, elementwise, gather, index, matmul, reduce};

#[test]
fn results_and_gradients_are_those_of_pytorch() {
    let Some(bench) = bench() else { return };
    check_all(&Place::Cuda(bench.device.clone()));
}

fn tensor(shape: &[usize], seed: u64) -> AnyTensor {
    AnyTensor::new(shape, Buffer::copy_of(&uniform::<f32>(seed, shape.iter().product()))).unwrap()
}

/// A small network with a view, a broadcast, a choice of rows and a mean: its value, and the gradients of both weights.
fn network(place: &Place, dtype: Dtype) -> [Vec<f32>; 3] {
    let at = |x: AnyTensor| convert::to_dtype(&x, dtype).unwrap().to_place(place).unwrap();
    let (x, w, b) = (at(tensor(&[2, 70, 33], 1)), at(tensor(&[17, 33], 2)).leaf().unwrap(), at(tensor(&[17], 3)).leaf().unwrap());
    let rows = AnyTensor::new(&[5], Buffer::copy_of(&[69, 3, 3, 0, 41])).unwrap().to_place(place).unwrap();
    let x = gather::index_select(&x, 1, &rows).unwrap();
    let y = matmul::matmul(&x, &index::transpose(&w, 0, 1).unwrap()).unwrap();
    let y = elementwise::tanh(&arithmetic::add(&y, &b).unwrap()).unwrap();
    let loss = reduce::mean(&elementwise::square(&index::flip(&y, &[1]).unwrap()).unwrap(), None, false).unwrap();
    loss.backward().unwrap();
    assert!(loss.place().is(place) && w.gradient().unwrap().unwrap().place().is(place), "a result left {place}");
    [loss, w.gradient().unwrap().unwrap(), b.gradient().unwrap().unwrap()].map(|x| x.on_host().unwrap().to_f32_vec())
}

#[test]
fn a_network_learns_on_the_device_as_on_the_host() {
    let Some(bench) = bench() else { return };
    for (dtype, by) in [(Dtype::F32, 4e-6), (Dtype::Bf16, 2e-2)] {
        let want = network(&Place::Host, dtype);
        let got = network(&Place::Cuda(bench.device.clone()), dtype);
        for (what, (got, want)) in ["loss", "gradient of w", "gradient of b"].iter().zip(got.iter().zip(&want)) {
            assert_close(what, got, want, by);
        }
    }
}

#[test]
fn a_tensor_moves_in_the_graph_and_operands_that_lie_apart_are_refused() {
    let Some(bench) = bench() else { return };
    let place = Place::Cuda(bench.device.clone());
    let x = tensor(&[3], 1).leaf().unwrap();
    let there = elementwise::square(&x.to_place(&place).unwrap()).unwrap();
    reduce::sum(&there.on_host().unwrap(), None, false).unwrap().backward().unwrap();
    let gradient = x.gradient().unwrap().unwrap();
    assert!(gradient.place().is(&Place::Host));
    assert_close("2 x", &gradient.to_f32_vec(), &x.to_f32_vec().iter().map(|x| 2.0 * x).collect::<Vec<_>>(), 1e-7);

    let index = AnyTensor::new(&[1], Buffer::copy_of(&[0i32])).unwrap();
    for (error, arg) in [
        (arithmetic::add(&x, &there).unwrap_err(), "add: `b`"),
        (matmul::matmul(&there, &x).unwrap_err(), "matmul: `b`"),
        (gather::gather(&there, 0, &index).unwrap_err(), "gather: `index`"),
        (gather::concat(&[there.clone(), x.detach()], 0).unwrap_err(), "concat: `parts`"),
    ] {
        let message = error.to_string();
        assert!(message.starts_with(arg) && message.contains("on cuda:0") && message.contains("cpu"), "{message}");
    }
    let outside = AnyTensor::new(&[1], Buffer::copy_of(&[3i32])).unwrap().to_place(&place).unwrap();
    let message = gather::gather(&there, 0, &outside).unwrap_err().to_string();
    assert!(message.contains("from 0 to below 3"), "{message}");
}

#[test]
fn shapes_of_many_axes_and_of_none_are_seen() {
    let Some(bench) = bench() else { return };
    let place = Place::Cuda(bench.device.clone());
    // Seven axes, of which neighbours that lie alike are taken together.
    let x = tensor(&[2, 1, 3, 2, 1, 2, 3], 1);
    let order = [6, 0, 1, 2, 3, 4, 5];
    let want = index::permute(&x, &order).unwrap().to_f32_vec();
    let got = index::permute(&x.to_place(&place).unwrap(), &order).unwrap();
    assert_eq!(got.on_host().unwrap().to_f32_vec(), want);
    // Reversed, no two of seven lie alike: more than kernels take.
    let x = tensor(&[2; 7], 1);
    let order = [6, 5, 4, 3, 2, 1, 0];
    let got = index::permute(&x.to_place(&place).unwrap(), &order).unwrap();
    assert!(got.place().is(&place));
    assert_eq!(got.on_host().unwrap().to_f32_vec(), index::permute(&x, &order).unwrap().to_f32_vec());
    let none = tensor(&[0, 3], 1).to_place(&place).unwrap().leaf().unwrap();
    let sum = reduce::sum(&elementwise::exp(&none).unwrap(), None, false).unwrap();
    sum.backward().unwrap();
    assert_eq!((sum.on_host().unwrap().to_f32_vec(), none.gradient().unwrap().unwrap().shape()), (vec![0.0], &[0, 3][..]));
}
