//! For tests: compares an operation with an independent f64 reference, and its gradients with central differences of that
//! reference. The reference is written in each test, never derived from the operation.

use super::any::AnyTensor;
use crate::error::Result;
use crate::kernels::buffer::Buffer;

/// An f32 tensor.
pub fn tensor(shape: &[usize], values: &[f32]) -> AnyTensor {
    AnyTensor::new(shape, Buffer::copy_of(values)).unwrap()
}

/// An i32 tensor.
pub fn integers(shape: &[usize], values: &[i32]) -> AnyTensor {
    AnyTensor::new(shape, Buffer::copy_of(values)).unwrap()
}

/// Numbers between -2 and 2 without a pattern, none within 0.05 of a whole number, so that no step of size 1e-5 meets a kink.
pub fn numbers(shape: &[usize]) -> AnyTensor {
    let count = shape.iter().product::<usize>();
    let draw = |i: usize| {
        let value = (i as f32 * 1.618 + count as f32 * 0.377).fract();
        (i as f32 * 7.0 % 4.0).floor() - 2.0 + 0.05 + 0.9 * value
    };
    tensor(shape, &(0..count).map(draw).collect::<Vec<_>>())
}

/// Runs `y` backwards with the given gradient.
pub fn backward_with(y: &AnyTensor, gradient: &[f32]) -> Result<()> {
    y.with_shape(vec![y.len()]).typed::<f32, 1>("backward", "y")?.backward_with(Buffer::copy_of(gradient))
}

/// Checks `op` at `inputs` against `reference`, which gets the inputs' elements and gives the result's. f32 in the
/// operation allows 2e-5 of the size of the numbers in it.
pub fn check(
    what: &str,
    inputs: &[AnyTensor],
    op: impl Fn(&[AnyTensor]) -> Result<AnyTensor>,
    reference: impl Fn(&[Vec<f64>]) -> Vec<f64>,
) {
    let close = |got: f32, want: f64| (f64::from(got) - want).abs() <= 2e-5 * want.abs().max(1.0);
    let leaves: Vec<AnyTensor> = inputs.iter().map(|x| x.leaf().unwrap()).collect();
    let mut values: Vec<Vec<f64>> = inputs.iter().map(|x| x.to_f32_vec().iter().map(|v| f64::from(*v)).collect()).collect();
    let (got, want) = (op(&leaves).unwrap(), reference(&values));
    assert_eq!(got.len(), want.len(), "{what}");
    for (index, (got, want)) in got.to_f32_vec().iter().zip(&want).enumerate() {
        assert!(close(*got, *want), "{what}, element {index}: {got} against {want}");
    }
    let weights: Vec<f32> = (0..want.len()).map(|i| (i as f32 + 1.0).cos()).collect();
    backward_with(&got, &weights).unwrap();
    let loss = |values: &[Vec<f64>]| reference(values).iter().zip(&weights).map(|(y, w)| y * f64::from(*w)).sum::<f64>();
    for (input, leaf) in leaves.iter().enumerate() {
        let gradient = leaf.gradient().unwrap().unwrap_or_else(|| panic!("{what}: input {input} has no gradient")).to_f32_vec();
        assert_eq!(gradient.len(), leaf.len(), "{what}");
        for (index, got) in gradient.iter().enumerate() {
            let (here, step) = (values[input][index], 1e-5);
            let mut at = |value: f64| {
                values[input][index] = value;
                loss(&values)
            };
            let want = (at(here + step) - at(here - step)) / (2.0 * step);
            at(here);
            assert!(close(*got, want), "{what}, gradient of input {input} at {index}: {got} against {want}");
        }
    }
}
