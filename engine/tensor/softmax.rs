//! softmax and log_softmax along an axis, by dfdx with their derivatives, and on a device composed of other operations; for
//! probabilities of any small tensor. A row with +inf, NaN or nothing but -inf gives NaN, as in torch. Not for logits over a
//! vocabulary: `logprobs` never stores those.

use super::any::AnyTensor;
use super::arithmetic::{div, sub};
use super::convert::to_dtype;
use super::dfdx_tape::{self, Traced};
use super::elementwise::{exp, log};
use super::index::reshape;
use super::operation::{require_float, through_host};
use super::reduce::{max, sum};
use super::shape::{Around, axis_index};
use crate::error::Result;
use crate::kernels::element::Dtype;
use dfdx::shapes::Axis;

/// The same of `[outer, axis, inter]` in f32, from which the largest of each row has been taken.
type Composed = fn(&AnyTensor) -> Result<AnyTensor>;

type Cube = Traced<(usize, usize, usize)>;

fn along(op: &'static str, x: &AnyTensor, axis: isize, f: fn(Cube) -> Cube, on_device: Composed) -> Result<AnyTensor> {
    let dtype = require_float(op, "x", x)?;
    // A scalar is a row of one element, as in torch.
    let around = match x.rank() {
        0 if axis == 0 || axis == -1 => Around { outer: 1, axis: 1, inter: 1 },
        rank => Around::axis(x.shape(), axis_index(op, axis, rank)?),
    };
    if x.device().is_some() && x.is_empty() {
        return through_host([x], |[x]| along(op, x, axis, f, on_device));
    }
    if x.device().is_some() {
        let shape = [around.outer, around.axis, around.inter].map(|size| size as isize);
        let cube = reshape(&to_dtype(x, Dtype::F32)?, &shape)?;
        let shifted = sub(&cube, &max(&cube.detach(), Some(&[1]), true)?)?;
        return Ok(to_dtype(&on_device(&shifted)?, dtype)?.with_shape(x.shape().to_vec()));
    }
    let seen = (around.outer, around.axis, around.inter);
    dfdx_tape::unary(op, x, seen, x.shape().to_vec(), f, |x| x.to_vec(), |gradient| gradient)
}

/// e^x, scaled to sum to 1 along `axis`.
///
/// Errors: [`Error::Dtype`](crate::error::Error::Dtype) if `x` is not f32 or bf16;
/// [`Error::Argument`](crate::error::Error::Argument) if there is no such axis.
pub fn softmax(x: &AnyTensor, axis: isize) -> Result<AnyTensor> {
    along(
        "softmax",
        x,
        axis,
        |x| x.softmax::<Axis<1>>(),
        |x| {
            let powers = exp(x)?;
            div(&powers, &sum(&powers, Some(&[1]), true)?)
        },
    )
}

/// The natural logarithm of [`softmax`], computed without going through it.
///
/// Errors: as [`softmax`].
pub fn log_softmax(x: &AnyTensor, axis: isize) -> Result<AnyTensor> {
    along("log_softmax", x, axis, |x| x.log_softmax::<Axis<1>>(), |x| sub(x, &log(&sum(&exp(x)?, Some(&[1]), true)?)?))
}

#[cfg(test)]
mod tests {
    use super::super::gradient_check::{check, integers, numbers, tensor};
    use super::*;

    fn log_softmax_of(x: &[f64], axis_len: usize, inter: usize) -> Vec<f64> {
        let row = |at: usize| (0..axis_len).map(move |i| at / (axis_len * inter) * axis_len * inter + i * inter + at % inter);
        (0..x.len()).map(|at| x[at] - row(at).map(|i| x[i].exp()).sum::<f64>().ln()).collect()
    }

    #[test]
    fn values_and_gradients_agree_with_f64_along_each_axis() {
        for (axis, axis_len, inter) in [(0, 2, 15), (1, 3, 5), (-1, 5, 1)] {
            let x = [numbers(&[2, 3, 5])];
            check("log_softmax", &x, |x| log_softmax(&x[0], axis), |x| log_softmax_of(&x[0], axis_len, inter));
            check("softmax", &x, |x| softmax(&x[0], axis), |x| log_softmax_of(&x[0], axis_len, inter).iter().map(|v| v.exp()).collect());
        }
    }

    #[test]
    fn scalars_and_empty_tensors_pass_and_wrong_ones_are_named() {
        assert_eq!(softmax(&tensor(&[], &[3.]), -1).unwrap().to_f32_vec(), [1.]);
        assert_eq!(log_softmax(&tensor(&[2, 0], &[]), 1).unwrap().shape(), [2, 0]);
        assert!(softmax(&integers(&[1], &[1]), 0).unwrap_err().to_string().contains("softmax"));
        assert!(softmax(&numbers(&[3]), 1).unwrap_err().to_string().contains("`axis`"));
    }
}
