//! Reductions over some axes or all: sum, mean, var, std, max, min, logsumexp. Float operands; sum, max and min of i32 too.
//! The reduced axes are brought together first, so that every reduction sees `[outer, axis, inter]`, whatever the rank.
//!
//! - By dfdx with its derivative: sum and mean. dfdx adds one by one in f32, so an axis is cut into blocks of [`BLOCK`],
//!   added block by block: the error grows with the block and the number of blocks, not with the axis.
//! - On a device by kernels of ours: sum, max and min; integers come to the host for it.
//! - Composed of operations with their own derivatives: var, std, logsumexp (dfdx gives NaN where a row is -inf).
//! - Ours: max and min (dfdx drops NaN, and gives each of several equal maxima the whole gradient; here they share it
//!   evenly, as torch's `amax` does), and i32.
//!
//! Reductions of nothing are torch's: a sum is 0, a mean or variance NaN, logsumexp -inf, max and min are errors.

use super::any::{AnyData, AnyTensor, TensorElement};
use super::arithmetic::{add, div, sub};
use super::convert::to_dtype;
use super::cuda::generic::{self as cuda, Expression};
use super::dfdx_tape;
use super::elementwise::{exp, log, square};
use super::index::permute;
use super::operation::{as_f32, record_float, require_float, through_host};
use super::shape::{Around, axis_indices};
use super::typed::Data;
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use crate::kernels::cuda::generic::Reduction;
use crate::kernels::element::Dtype;
use dfdx::shapes::Axis;
use dfdx::tensor_ops::SumTo;

/// Elements that dfdx adds one after the other.
const BLOCK: usize = 512;

/// `x` with the reduced axes side by side, how it is seen then, and the result's shape.
struct Plan {
    x: AnyTensor,
    around: Around,
    shape: Vec<usize>,
}

/// `axes` absent means all of them; an empty list reduces nothing.
fn plan(op: &'static str, x: &AnyTensor, axes: Option<&[isize]>, keepdim: bool) -> Result<Plan> {
    let reduced = match axes {
        Some(axes) => axis_indices(op, axes, x.rank())?,
        None => (0..x.rank()).collect(),
    };
    let is_reduced = |axis: &usize| reduced.contains(axis);
    let shape = (0..x.rank()).filter(|axis| keepdim || !is_reduced(axis));
    let shape = shape.map(|axis| if is_reduced(&axis) { 1 } else { x.shape()[axis] }).collect();
    let together = reduced.windows(2).all(|pair| pair[0] + 1 == pair[1]);
    let (x, range) = match reduced.first() {
        None => (x.clone(), x.rank()..x.rank()),
        Some(first) if together => (x.clone(), *first..first + reduced.len()),
        Some(_) => {
            let kept = (0..x.rank()).filter(|axis| !is_reduced(axis));
            let order: Vec<isize> = kept.chain(reduced.iter().copied()).map(|axis| axis as isize).collect();
            (permute(x, &order)?, x.rank() - reduced.len()..x.rank())
        }
    };
    let around = Around::axes(x.shape(), range);
    Ok(Plan { x, around, shape })
}

/// The sum along the axis, divided by `divisor`; on the host by dfdx.
fn summed(op: &'static str, plan: Plan, divisor: f32) -> Result<AnyTensor> {
    let Plan { x, around, shape } = plan;
    let dtype = require_float(op, "x", &x)?;
    if let Some(device) = x.device() {
        // Divided before the result is rounded, if it is bf16.
        let total = cuda::sum(device, op, &to_dtype(&x, Dtype::F32)?, around, shape)?;
        let quotient = if divisor == 1.0 { total } else { div(&total, &cuda::scalar(device, divisor)?)? };
        return to_dtype(&quotient, dtype);
    }
    let Around { outer, axis, inter } = around;
    if x.is_empty() {
        let mut out = Buffer::scratch(shape.iter().product());
        out.fill(0.0 / divisor);
        return Ok(record_float(shape, dtype, out, &[&x], |_, sink| {
            sink.add(0, Buffer::zeroed(0));
            Ok(())
        }));
    }
    let block = axis.min(BLOCK);
    let blocks = axis.div_ceil(block);
    let (row, padded_row) = (axis * inter, blocks * block * inter);
    // Zeros fill the last block; they change no sum.
    let load = move |values: &[f32]| {
        let mut out = vec![0f32; outer * padded_row];
        out.chunks_exact_mut(padded_row).zip(values.chunks_exact(row)).for_each(|(out, values)| out[..row].copy_from_slice(values));
        out
    };
    let unload = move |gradient: Buffer<f32>| {
        if row == padded_row {
            return gradient;
        }
        let mut out = Buffer::scratch(outer * row);
        out.chunks_exact_mut(row).zip(gradient.chunks_exact(padded_row)).for_each(|(out, g)| out.copy_from_slice(&g[..row]));
        out
    };
    let f = move |x: dfdx_tape::Traced<(usize, usize, usize, usize)>| {
        let sum = x.sum::<(usize, usize, usize), Axis<2>>().sum::<(usize, usize), Axis<1>>();
        if divisor == 1.0 { sum } else { sum / divisor }
    };
    dfdx_tape::unary(op, &x, (outer, blocks, block, inter), shape, f, load, unload)
}

/// The sum over `axes` (all if absent); with `keepdim` reduced axes stay with size 1. f32, bf16 (summed in f32) or i32.
///
/// Errors: [`Error::Dtype`] for i8; [`Error::Argument`] for an axis that is not there, or an i32 sum that does not fit.
pub fn sum(x: &AnyTensor, axes: Option<&[isize]>, keepdim: bool) -> Result<AnyTensor> {
    let plan = plan("sum", x, axes, keepdim)?;
    if plan.x.dtype() == Dtype::I32 {
        return integers("sum", &plan, 0, |sum, value| sum + value);
    }
    summed("sum", plan, 1.0)
}

/// The mean over `axes`; as [`sum`]. NaN for no elements.
///
/// Errors: [`Error::Dtype`] if `x` is not f32 or bf16; [`Error::Argument`] for an axis that is not there.
pub fn mean(x: &AnyTensor, axes: Option<&[isize]>, keepdim: bool) -> Result<AnyTensor> {
    let plan = plan("mean", x, axes, keepdim)?;
    let count = plan.around.axis as f32;
    summed("mean", plan, count)
}

/// The variance over `axes`: squared distances from the mean, summed and divided by the count less `correction` (1 for
/// the unbiased estimate, torch's default; 0 for the plain one). NaN if that leaves nothing to divide by.
///
/// Errors: as [`mean`].
pub fn var(x: &AnyTensor, axes: Option<&[isize]>, correction: usize, keepdim: bool) -> Result<AnyTensor> {
    let dtype = require_float("var", "x", x)?;
    // In f32 throughout: rounding the mean to bf16 would lose the variance.
    let x = to_dtype(x, Dtype::F32)?;
    let centred = square(&sub(&x, &mean(&x, axes, true)?)?)?;
    let plan = plan("var", &centred, axes, keepdim)?;
    let divisor = plan.around.axis.saturating_sub(correction) as f32;
    to_dtype(&summed("var", plan, divisor)?, dtype)
}

const ROOT: Expression = Expression { value: "sqrtf(x0)", derivatives: &[Some("x0 == 0.0f ? 0.0f : x1 / (2.0f * sqrtf(x0))")] };

/// The square root of [`var`]. Where that is 0 the gradient is 0, as in torch.
///
/// Errors: as [`mean`].
pub fn std(x: &AnyTensor, axes: Option<&[isize]>, correction: usize, keepdim: bool) -> Result<AnyTensor> {
    let dtype = require_float("std", "x", x)?;
    let variance = var(&to_dtype(x, Dtype::F32)?, axes, correction, keepdim)?;
    if let Some(device) = variance.device() {
        let root = cuda::map(device, "std", ROOT, &[&variance], variance.shape().to_vec(), Dtype::F32)?;
        return to_dtype(&root, dtype);
    }
    let saved = variance.data().clone();
    let mut values = Buffer::copy_of(&as_f32(&saved));
    values.iter_mut().for_each(|v| *v = v.sqrt());
    let root = record_float(variance.shape().to_vec(), Dtype::F32, values, &[&variance], move |gradient, sink| {
        let mut out = Buffer::copy_of(gradient);
        let halved = |(g, v): (&mut f32, &f32)| *g = if *v == 0.0 { 0.0 } else { *g / (2.0 * v.sqrt()) };
        out.iter_mut().zip(as_f32(&saved).iter()).for_each(halved);
        sink.add(0, out);
        Ok(())
    });
    to_dtype(&root, dtype)
}

/// Zeros in place of infinities.
fn without_infinities(x: &AnyTensor) -> Result<AnyTensor> {
    if let Some(device) = x.device() {
        let finite = Expression { value: "fabsf(x0) == INFINITE ? 0.0f : x0", derivatives: &[None] };
        return cuda::map(device, "logsumexp", finite, &[x], x.shape().to_vec(), Dtype::F32);
    }
    let mut values = Buffer::copy_of(&as_f32(x.data()));
    values.iter_mut().filter(|v| v.is_infinite()).for_each(|v| *v = 0.0);
    Ok(AnyTensor::from_parts(x.shape().to_vec(), f32::wrap(Data::ready(values)), None))
}

/// log(sum(e^x)) over `axes`, without overflow; -inf for no elements.
///
/// Errors: as [`mean`].
pub fn logsumexp(x: &AnyTensor, axes: Option<&[isize]>, keepdim: bool) -> Result<AnyTensor> {
    let dtype = require_float("logsumexp", "x", x)?;
    let x = to_dtype(x, Dtype::F32)?;
    let shape = plan("logsumexp", &x, axes, keepdim)?.shape;
    let shift = if x.is_empty() {
        return to_dtype(&log(&sum(&exp(&x)?, axes, keepdim)?)?, dtype);
    } else {
        // A constant: its derivatives cancel. An infinite maximum is no shift, for inf - inf is NaN.
        without_infinities(&max(&x.detach(), axes, true)?)?
    };
    let logs = log(&sum(&exp(&sub(&x, &shift)?)?, axes, keepdim)?)?;
    to_dtype(&add(&logs, &shift.with_shape(shape))?, dtype)
}

/// The largest element over `axes`, NaN if one is. Equal largest elements share the gradient evenly, as in torch's `amax`.
/// f32, bf16 or i32.
///
/// Errors: [`Error::Dtype`] for i8; [`Error::Argument`] for an axis that is not there; [`Error::Shape`] for no elements.
pub fn max(x: &AnyTensor, axes: Option<&[isize]>, keepdim: bool) -> Result<AnyTensor> {
    best("max", x, axes, keepdim, |a, b| a > b, |a, b| a.max(b))
}

/// The smallest element over `axes`; as [`max`].
///
/// Errors: as [`max`].
pub fn min(x: &AnyTensor, axes: Option<&[isize]>, keepdim: bool) -> Result<AnyTensor> {
    best("min", x, axes, keepdim, |a, b| a < b, |a, b| a.min(b))
}

fn best(
    op: &'static str,
    x: &AnyTensor,
    axes: Option<&[isize]>,
    keepdim: bool,
    better: fn(f32, f32) -> bool,
    better_integer: fn(i64, i64) -> i64,
) -> Result<AnyTensor> {
    let plan = plan(op, x, axes, keepdim)?;
    let len: usize = plan.shape.iter().product();
    if plan.around.axis == 0 && len > 0 {
        return Err(Error::Shape { op, arg: "x", expected: "with an element to choose".into(), got: format!("{:?}", x.shape()) });
    }
    if plan.x.dtype() == Dtype::I32 {
        let none = better_integer(i64::MAX, i64::MIN);
        // The worst value loses against every element.
        return integers(op, &plan, if none == i64::MAX { i64::MIN } else { i64::MAX }, better_integer);
    }
    let dtype = require_float(op, "x", &plan.x)?;
    let Plan { x, around, shape } = plan;
    if let Some(device) = x.device() {
        let reduction = if better(1.0, 0.0) { Reduction::MAX } else { Reduction::MIN };
        return cuda::best(device, op, reduction, &x, around, shape);
    }
    let saved = x.data().clone();
    let places = move |at: usize| {
        let first = (at / around.inter) * around.axis * around.inter + at % around.inter;
        (0..around.axis).map(move |i| first + i * around.inter)
    };
    let choose = move |values: &[f32], at: usize| {
        let chosen = places(at).map(|place| values[place]);
        chosen.reduce(|best, value| if best.is_nan() || !(better(value, best) || value.is_nan()) { best } else { value })
    };
    let mut out = Buffer::scratch(len);
    let values = as_f32(&saved);
    out.iter_mut().enumerate().for_each(|(at, out)| *out = choose(&values, at).expect("the axis has elements"));
    drop(values);
    let source_len = x.len();
    Ok(record_float(shape, dtype, out, &[&x], move |gradient, sink| {
        let values = as_f32(&saved);
        let mut out = Buffer::zeroed(source_len);
        for (at, g) in gradient.iter().enumerate() {
            let best = choose(&values, at).expect("the axis has elements");
            let is_best = |place: &usize| values[*place] == best || (best.is_nan() && values[*place].is_nan());
            let count = places(at).filter(is_best).count() as f32;
            places(at).filter(is_best).for_each(|place| out[place] = g / count);
        }
        sink.add(0, out);
        Ok(())
    }))
}

/// A reduction of integers, in i64, whose results must fit i32. Those on a device come to the host for it.
fn integers(op: &'static str, plan: &Plan, start: i64, f: fn(i64, i64) -> i64) -> Result<AnyTensor> {
    if plan.x.device().is_some() {
        let here = |[x]: &[AnyTensor; 1]| integers(op, &Plan { x: x.clone(), around: plan.around, shape: plan.shape.clone() }, start, f);
        return through_host([&plan.x], here);
    }
    let AnyData::I32(data) = plan.x.data() else { panic!("{op}: integers of {}", plan.x.dtype()) };
    let values = data.get();
    let Around { axis, inter, .. } = plan.around;
    let mut out = Buffer::scratch(plan.shape.iter().product());
    for (at, out) in out.iter_mut().enumerate() {
        let first = (at / inter) * axis * inter + at % inter;
        let result = (0..axis).fold(start, |sum, i| f(sum, i64::from(values[first + i * inter])));
        *out = i32::try_from(result).map_err(|_| Error::argument(op, "x", "integers whose result fits i32", result))?;
    }
    Ok(AnyTensor::from_parts(plan.shape.clone(), i32::wrap(Data::ready(out)), None))
}

#[cfg(test)]
mod tests {
    use super::super::gradient_check::{check, integers as i32s, numbers, tensor};
    use super::*;

    /// Applies `f` to each row along axis 1 of [2, 3, 5].
    fn middle(x: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
        (0..10).map(|at| f(&[0, 1, 2].map(|i| x[(at / 5 * 3 + i) * 5 + at % 5]))).collect()
    }

    /// Applies `f` to each row along axes 0 and 2 of [2, 3, 5].
    fn outer(x: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
        let row = |at: usize| (0..10).map(|i| x[(i / 5 * 3 + at) * 5 + i % 5]).collect::<Vec<_>>();
        (0..3).map(|at| f(&row(at))).collect()
    }

    fn mean_of(x: &[f64]) -> f64 {
        x.iter().sum::<f64>() / x.len() as f64
    }

    fn var_of(x: &[f64]) -> f64 {
        x.iter().map(|v| (v - mean_of(x)).powi(2)).sum::<f64>() / (x.len() as f64 - 1.0)
    }

    type Reduction = fn(&AnyTensor, Option<&[isize]>, bool) -> Result<AnyTensor>;
    type Case = (&'static str, Reduction, fn(&[f64]) -> f64);

    #[test]
    fn values_and_gradients_agree_with_f64_over_any_axes() {
        let table: [Case; 7] = [
            ("sum", sum, |x| x.iter().sum()),
            ("mean", mean, mean_of),
            ("var", |x, axes, keepdim| var(x, axes, 1, keepdim), var_of),
            ("std", |x, axes, keepdim| std(x, axes, 1, keepdim), |x| var_of(x).sqrt()),
            ("max", max, |x| x.iter().copied().fold(f64::NEG_INFINITY, f64::max)),
            ("min", min, |x| x.iter().copied().fold(f64::INFINITY, f64::min)),
            ("logsumexp", logsumexp, |x| x.iter().map(|v| v.exp()).sum::<f64>().ln()),
        ];
        for (what, op, f) in table {
            let x = [numbers(&[2, 3, 5])];
            check(what, &x, |x| op(&x[0], Some(&[1]), false), |x| middle(&x[0], f));
            check(what, &x, |x| op(&x[0], Some(&[-1, 0]), true), |x| outer(&x[0], f));
            check(what, &x, |x| op(&x[0], None, false), |x| vec![f(&x[0])]);
            assert_eq!(op(&x[0], Some(&[2, 0]), true).unwrap().shape(), [1, 3, 1]);
            assert_eq!(op(&x[0], None, true).unwrap().shape(), [1, 1, 1]);
            // No rows: nothing to reduce and nothing that comes out.
            let none = tensor(&[0, 3], &[]).leaf().unwrap();
            let y = op(&none, Some(&[1]), false).unwrap();
            assert_eq!(y.shape(), [0], "{what}");
            sum(&y, None, false).unwrap().backward().unwrap();
            assert!(none.gradient().unwrap().unwrap().is_empty());
        }
    }

    #[test]
    fn long_sums_do_not_lose_their_tail() {
        // One by one in f32, 2^24 ones and more stay at 2^24; the length is no multiple of the block.
        let ones = tensor(&[(1 << 24) + 777], &vec![1.0; (1 << 24) + 777]);
        assert_eq!(sum(&ones, None, false).unwrap().to_f32_vec(), [16_777_993f32]);
        let x = [numbers(&[2, 1031, 1])];
        check("long", &x, |x| sum(&x[0], Some(&[1]), false), |x| x[0].chunks(1031).map(|row| row.iter().sum()).collect());
    }

    #[test]
    fn reductions_of_nothing_follow_torch() {
        let none = tensor(&[2, 0], &[]);
        assert_eq!(sum(&none, Some(&[1]), false).unwrap().to_f32_vec(), [0., 0.]);
        assert!(mean(&none, Some(&[1]), false).unwrap().to_f32_vec().iter().all(|v| v.is_nan()));
        assert!(var(&none, Some(&[1]), 0, false).unwrap().to_f32_vec().iter().all(|v| v.is_nan()));
        assert_eq!(logsumexp(&none, Some(&[1]), false).unwrap().to_f32_vec(), [f32::NEG_INFINITY; 2]);
        assert!(max(&none, Some(&[1]), false).unwrap_err().to_string().contains("element to choose"));
        assert!(min(&none, None, false).is_err());
        assert_eq!(max(&none, Some(&[0]), false).unwrap().shape(), [0]);
    }

    #[test]
    fn integers_are_exact_or_refused() {
        let x = i32s(&[2, 2], &[i32::MAX, 1, -5, i32::MIN]);
        assert!(sum(&x, Some(&[1]), false).unwrap_err().to_string().contains("2147483648"));
        assert_eq!(sum(&x, None, false).unwrap().to_f32_vec(), [-5.]);
        assert_eq!(max(&x, Some(&[0]), false).unwrap().to_f32_vec(), [i32::MAX as f32, 1.]);
        assert_eq!(min(&x, None, true).unwrap().to_f32_vec(), [i32::MIN as f32]);
        for wrong in [mean(&x, None, false), sum(&numbers(&[2]), Some(&[1]), false), sum(&numbers(&[2, 2]), Some(&[0, -2]), false)] {
            assert!(wrong.is_err());
        }
    }
}
