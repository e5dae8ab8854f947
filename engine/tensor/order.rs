//! Order along an axis: sort, topk, argmax, argmin, and running sums. Plain loops of ours: dfdx has none of them.
//! Values stay in the graph (through `gather`); indices are i32 and have no gradient. NaN counts as larger than all, as in
//! torch; equal elements keep their order. What lies on a device comes to the host for all of these, and goes back.

use super::any::{AnyData, AnyTensor, TensorElement};
use super::gather::gather;
use super::operation::{as_f32, pair_through_host, record_float, require_float, through_host};
use super::shape::{Around, axis_index};
use super::typed::Data;
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use std::cmp::Ordering;

/// Ascending, NaN last; 0 and -0 are equal.
fn compare<T: PartialOrd>(a: &T, b: &T) -> Ordering {
    #[allow(clippy::eq_op)]
    a.partial_cmp(b).unwrap_or_else(|| (a != a).cmp(&(b != b)))
}

/// Elements in a type that orders all of them exactly.
fn keys(x: &AnyTensor) -> Vec<f64> {
    match x.data() {
        AnyData::I32(data) => data.get().iter().map(|v| f64::from(*v)).collect(),
        _ => as_f32(x.data()).iter().map(|v| f64::from(*v)).collect(),
    }
}

fn indices(shape: Vec<usize>, values: Buffer<i32>) -> AnyTensor {
    AnyTensor::from_parts(shape, i32::wrap(Data::ready(values)), None)
}

fn fits_i32(op: &'static str, size: usize) -> Result<()> {
    match i32::try_from(size) {
        Ok(_) => Ok(()),
        Err(_) => Err(Error::argument(op, "x", "an axis whose indices fit i32", size)),
    }
}

/// Indices that would sort along `axis`, the first `k` of each row.
fn sorted_indices(op: &'static str, x: &AnyTensor, axis: usize, descending: bool, k: usize) -> Result<AnyTensor> {
    let around = Around::axis(x.shape(), axis);
    fits_i32(op, around.axis)?;
    let keys = keys(x);
    let mut shape = x.shape().to_vec();
    shape[axis] = k;
    let mut out = Buffer::scratch(shape.iter().product());
    if out.is_empty() {
        return Ok(indices(shape, out));
    }
    let mut row: Vec<i32> = Vec::with_capacity(around.axis);
    for outer in 0..around.outer {
        for inter in 0..around.inter {
            let key = |i: &i32| &keys[(outer * around.axis + *i as usize) * around.inter + inter];
            // Ties go by index, which makes the order total and the quick selection below as good as a stable sort.
            let order = |a: &i32, b: &i32| {
                let by_key = compare(key(a), key(b));
                (if descending { by_key.reverse() } else { by_key }).then(a.cmp(b))
            };
            row.clear();
            row.extend(0..around.axis as i32);
            if k > 0 && k < row.len() {
                row.select_nth_unstable_by(k - 1, order);
            }
            row[..k].sort_unstable_by(order);
            for (place, index) in row[..k].iter().enumerate() {
                out[(outer * k + place) * around.inter + inter] = *index;
            }
        }
    }
    Ok(indices(shape, out))
}

/// `x` sorted along `axis`, and the indices (i32) that its elements had. Any element type.
///
/// Errors: [`Error::Argument`] if there is no such axis.
pub fn sort(x: &AnyTensor, axis: isize, descending: bool) -> Result<(AnyTensor, AnyTensor)> {
    if x.device().is_some() {
        return pair_through_host(x, |x| sort(x, axis, descending));
    }
    let index = axis_index("sort", axis, x.rank())?;
    let order = sorted_indices("sort", x, index, descending, x.shape()[index])?;
    Ok((gather(x, axis, &order)?, order))
}

/// The `k` largest (or smallest) elements along `axis`, best first, and their indices (i32). Any element type.
///
/// Errors: [`Error::Argument`] if there is no such axis or it has fewer than `k` elements.
pub fn topk(x: &AnyTensor, k: usize, axis: isize, largest: bool) -> Result<(AnyTensor, AnyTensor)> {
    if x.device().is_some() {
        return pair_through_host(x, |x| topk(x, k, axis, largest));
    }
    let index = axis_index("topk", axis, x.rank())?;
    if k > x.shape()[index] {
        return Err(Error::argument("topk", "k", format!("at most {}, the size of axis {index}", x.shape()[index]), k));
    }
    let order = sorted_indices("topk", x, index, largest, k)?;
    Ok((gather(x, axis, &order)?, order))
}

fn arg_best(op: &'static str, x: &AnyTensor, axis: Option<isize>, keepdim: bool, largest: bool) -> Result<AnyTensor> {
    if x.device().is_some() {
        return through_host([x], |[x]| arg_best(op, x, axis, keepdim, largest));
    }
    let (around, shape) = match axis {
        Some(axis) => {
            let axis = axis_index(op, axis, x.rank())?;
            let mut shape = x.shape().to_vec();
            if keepdim {
                shape[axis] = 1;
            } else {
                shape.remove(axis);
            }
            (Around::axis(x.shape(), axis), shape)
        }
        None => (Around::axes(x.shape(), 0..x.rank()), vec![1; if keepdim { x.rank() } else { 0 }]),
    };
    let mut out = Buffer::scratch(shape.iter().product());
    if around.axis == 0 && !out.is_empty() {
        return Err(Error::Shape { op, arg: "x", expected: "with an element to choose".into(), got: format!("{:?}", x.shape()) });
    }
    fits_i32(op, around.axis)?;
    let keys = keys(x);
    for (at, out) in out.iter_mut().enumerate() {
        let (outer, inter) = (at / around.inter, at % around.inter);
        let key = |i: usize| &keys[(outer * around.axis + i) * around.inter + inter];
        let better = |a: usize, b: usize| match compare(key(a), key(b)) {
            _ if key(b).is_nan() => false,
            _ if key(a).is_nan() => true,
            Ordering::Greater => largest,
            Ordering::Less => !largest,
            Ordering::Equal => false,
        };
        *out = (1..around.axis).fold(0, |best, i| if better(i, best) { i } else { best }) as i32;
    }
    Ok(indices(shape, out))
}

/// The index (i32) of the first largest element along `axis`, or of the flattened `x` if `axis` is absent. The first NaN
/// counts as the largest. Any element type.
///
/// Errors: [`Error::Argument`] if there is no such axis; [`Error::Shape`] if it has no element.
pub fn argmax(x: &AnyTensor, axis: Option<isize>, keepdim: bool) -> Result<AnyTensor> {
    arg_best("argmax", x, axis, keepdim, true)
}

/// The index (i32) of the first smallest element; as [`argmax`], NaN is found first here too.
///
/// Errors: as [`argmax`].
pub fn argmin(x: &AnyTensor, axis: Option<isize>, keepdim: bool) -> Result<AnyTensor> {
    arg_best("argmin", x, axis, keepdim, false)
}

/// Running sums along `axis`: out[i] = x[0] + ... + x[i]. f32 and bf16 (summed in f64), or i32.
///
/// Errors: [`Error::Dtype`] for i8; [`Error::Argument`] if there is no such axis, or an i32 sum does not fit.
pub fn cumsum(x: &AnyTensor, axis: isize) -> Result<AnyTensor> {
    if x.device().is_some() {
        return through_host([x], |[x]| cumsum(x, axis));
    }
    let axis = axis_index("cumsum", axis, x.rank())?;
    let around = Around::axis(x.shape(), axis);
    if let AnyData::I32(data) = x.data() {
        let mut out = Buffer::copy_of(data.get());
        for i in 0..out.len() {
            if !(i / around.inter).is_multiple_of(around.axis) {
                let (sum, value) = (out[i - around.inter], out[i]);
                let next = sum.checked_add(value);
                out[i] = next.ok_or_else(|| Error::argument("cumsum", "x", "integers whose sums fit i32", format!("{sum} + {value}")))?;
            }
        }
        return Ok(indices(x.shape().to_vec(), out));
    }
    let dtype = require_float("cumsum", "x", x)?;
    let values = running(&as_f32(x.data()), around, false);
    Ok(record_float(x.shape().to_vec(), dtype, values, &[x], move |gradient, sink| {
        sink.add(0, running(gradient, around, true));
        Ok(())
    }))
}

/// Running sums from the front or from the back.
fn running(values: &[f32], around: Around, from_back: bool) -> Buffer<f32> {
    let mut out = Buffer::scratch(values.len());
    if out.is_empty() {
        return out;
    }
    for outer in 0..around.outer {
        for inter in 0..around.inter {
            let mut sum = 0f64;
            for i in 0..around.axis {
                let i = if from_back { around.axis - 1 - i } else { i };
                let place = (outer * around.axis + i) * around.inter + inter;
                sum += f64::from(values[place]);
                out[place] = sum as f32;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::gradient_check::{backward_with, check, integers, numbers, tensor};
    use super::*;

    #[test]
    fn sorting_is_stable_puts_nan_last_and_carries_gradients() {
        let x = tensor(&[6], &[2., f32::NAN, -1., 2., f32::NEG_INFINITY, 0.]).leaf().unwrap();
        let (values, places) = sort(&x, 0, false).unwrap();
        assert_eq!(places.to_f32_vec(), [4., 2., 5., 0., 3., 1.]);
        assert_eq!(values.to_f32_vec()[..5], [f32::NEG_INFINITY, -1., 0., 2., 2.]);
        backward_with(&values, &[1., 2., 3., 4., 5., 6.]).unwrap();
        assert_eq!(x.gradient().unwrap().unwrap().to_f32_vec(), [4., 6., 2., 5., 1., 3.]);
        let down = sort(&x, -1, true).unwrap().1;
        assert_eq!(down.to_f32_vec(), [1., 0., 3., 5., 2., 4.]);
    }

    #[test]
    fn topk_is_the_head_of_the_sort_along_any_axis() {
        let x = numbers(&[3, 33, 2]);
        for largest in [true, false] {
            let whole = sort(&x, 1, largest).unwrap().1;
            for k in [0, 1, 7, 33] {
                let (values, places) = topk(&x, k, 1, largest).unwrap();
                assert_eq!(values.shape(), [3, k, 2]);
                let head = super::super::index::slice(&whole, 1, 0, Some(k as isize), 1).unwrap();
                assert_eq!(places.to_f32_vec(), head.to_f32_vec());
            }
        }
        assert!(topk(&x, 34, 1, true).unwrap_err().to_string().contains("at most 33"));
        assert!(sort(&numbers(&[]), 0, false).is_err());
    }

    #[test]
    fn the_best_is_the_first_of_equals_and_nan_wins() {
        let x = tensor(&[2, 3], &[1., 5., 5., -1., f32::NAN, -1.]);
        assert_eq!(argmax(&x, Some(1), false).unwrap().to_f32_vec(), [1., 1.]);
        assert_eq!(argmin(&x, Some(-1), true).unwrap().to_f32_vec(), [0., 1.]);
        assert_eq!(argmin(&x, Some(0), false).unwrap().to_f32_vec(), [1., 1., 1.]);
        assert_eq!(argmax(&x, None, true).unwrap().shape(), [1, 1]);
        assert_eq!(argmax(&numbers(&[]), None, false).unwrap().to_f32_vec(), [0.]);
        let none = tensor(&[2, 0], &[]);
        assert!(argmax(&none, Some(1), false).unwrap_err().to_string().contains("element to choose"));
        assert_eq!(argmax(&none, Some(0), false).unwrap().shape(), [0]);
        // 2^24 + 1 beats 2^24, though they are one number in f32.
        assert_eq!(argmax(&integers(&[2], &[1 << 24, (1 << 24) + 1]), None, false).unwrap().to_f32_vec(), [1.]);
    }

    #[test]
    fn running_sums_agree_with_loops() {
        check(
            "cumsum",
            &[numbers(&[2, 3, 5])],
            |x| cumsum(&x[0], 1),
            |x| (0..30).map(|n| (0..=n / 5 % 3).map(|i| x[0][(n / 15 * 3 + i) * 5 + n % 5]).sum()).collect(),
        );
        assert_eq!(cumsum(&tensor(&[0, 2], &[]), 0).unwrap().shape(), [0, 2]);
        let whole = integers(&[2, 2], &[1, 2, 3, i32::MAX]);
        assert_eq!(cumsum(&integers(&[2, 2], &[1, 2, 3, 4]), 1).unwrap().to_f32_vec(), [1., 3., 3., 7.]);
        assert!(cumsum(&whole, 0).unwrap_err().to_string().contains("fit i32"));
    }
}
