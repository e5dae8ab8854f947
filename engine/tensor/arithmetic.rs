//! Arithmetic on two tensors of one element type whose shapes broadcast as numpy's do; a scalar is a tensor of rank 0.
//!
//! - By dfdx with its derivatives: add, sub, mul, div. Both operands become dfdx tensors of their own, so that a tensor
//!   may meet itself (x - x), which dfdx alone refuses.
//! - On a device by the expression beside each; integers come to the host for it.
//! - Ours: maximum and minimum (dfdx drops NaN where torch keeps it), pow of two tensors (absent from dfdx), and all of
//!   i32, where a result that does not fit is an error. Integers have no gradient.

use super::any::{AnyData, AnyTensor, TensorElement};
use super::cuda::generic::{self as cuda, Expression};
use super::dfdx_tape::{self, Traced};
use super::operation::{as_f32, record_float, require_float, require_same, through_host};
use super::shape::{View, broadcast_shape, room_for};
use super::typed::Data;
use crate::error::{Error, Result};
use crate::kernels::element::Dtype;

type Row = Traced<(usize,)>;

/// The common shape of two operands of one type.
fn check(op: &'static str, a: &AnyTensor, b: &AnyTensor) -> Result<Vec<usize>> {
    require_same(op, "b", a, b)?;
    let shape = broadcast_shape(op, "b", a.shape(), b.shape())?;
    room_for(op, &shape)?;
    Ok(shape)
}

fn by_dfdx(op: &'static str, a: &AnyTensor, b: &AnyTensor, f: fn(Row, Row) -> Row, on_device: Expression) -> Result<AnyTensor> {
    let shape = check(op, a, b)?;
    let dtype = require_float(op, "a", a)?;
    if let Some(device) = a.device() {
        return cuda::map(device, op, on_device, &[a, b], shape, dtype);
    }
    dfdx_tape::binary(op, a, b, shape, f)
}

/// A loop of ours; `derivative` gives those by `a` and by `b`.
fn by_loop(
    op: &'static str,
    a: &AnyTensor,
    b: &AnyTensor,
    f: fn(f32, f32) -> f32,
    derivative: fn(f32, f32) -> (f32, f32),
    on_device: Expression,
) -> Result<AnyTensor> {
    let shape = check(op, a, b)?;
    let dtype = require_float(op, "a", a)?;
    if let Some(device) = a.device() {
        return cuda::map(device, op, on_device, &[a, b], shape, dtype);
    }
    let views = [View::broadcast(a.shape(), &shape), View::broadcast(b.shape(), &shape)];
    let (saved, lens) = ([a.data().clone(), b.data().clone()], [a.len(), b.len()]);
    let load = {
        let views = views.clone();
        move || [0, 1].map(|i| views[i].read(&as_f32(&saved[i])))
    };
    let [mut values, right] = load();
    values.iter_mut().zip(right.iter()).for_each(|(a, b)| *a = f(*a, *b));
    Ok(record_float(shape, dtype, values, &[a, b], move |gradient, sink| {
        let [mut left, mut right] = load();
        for ((a, b), g) in left.iter_mut().zip(right.iter_mut()).zip(gradient) {
            let (by_a, by_b) = derivative(*a, *b);
            (*a, *b) = (g * by_a, g * by_b);
        }
        for (index, gradient) in [left, right].into_iter().enumerate() {
            if sink.wants(index) {
                sink.add(index, views[index].scatter_add(&gradient, lens[index]));
            }
        }
        Ok(())
    }))
}

/// `value` of `x0` and `x1` on a device, and its derivatives by both, given the gradient `x2`.
const fn expression(value: &'static str, derivatives: &'static [Option<&'static str>; 2]) -> Expression {
    Expression { value, derivatives }
}

/// Both operands as integers, if they are; checks the shapes and types. Those on a device come to the host for it.
fn integers(op: &'static str, a: &AnyTensor, b: &AnyTensor, f: fn(i32, i32) -> Option<i32>) -> Result<Option<AnyTensor>> {
    let (AnyData::I32(left), AnyData::I32(right)) = (a.data(), b.data()) else { return Ok(None) };
    let shape = check(op, a, b)?;
    if a.device().is_some() {
        let run = |x: &[AnyTensor; 2]| Ok(integers(op, &x[0], &x[1], f)?.expect("both operands are i32"));
        return through_host([a, b], run).map(Some);
    }
    let mut values = View::broadcast(a.shape(), &shape).read(left.get());
    let right = View::broadcast(b.shape(), &shape).read(right.get());
    for (a, b) in values.iter_mut().zip(right.iter()) {
        *a = f(*a, *b).ok_or_else(|| Error::argument(op, "a, b", "integers whose result fits i32", format!("{a}, {b}")))?;
    }
    Ok(Some(AnyTensor::from_parts(shape, i32::wrap(Data::ready(values)), None)))
}

fn integers_only(op: &'static str, a: &AnyTensor, b: &AnyTensor, f: fn(i32, i32) -> Option<i32>) -> Result<AnyTensor> {
    for (arg, x) in [("a", a), ("b", b)] {
        if x.dtype() != Dtype::I32 {
            return Err(Error::Dtype { op, arg, expected: "i32".into(), got: x.dtype().name().into() });
        }
    }
    Ok(integers(op, a, b, f)?.expect("both operands are i32"))
}

macro_rules! arithmetic {
    ($($(#[$doc:meta])* $name:ident: $integers:expr, $route:ident($($f:expr),+);)*) => {$(
        $(#[$doc])*
        /// `a` and `b`: both f32, both bf16 or both i32, of shapes that broadcast.
        ///
        /// Errors: [`Error::Dtype`] if the types differ or are i8; [`Error::Shape`] if the shapes do not broadcast;
        /// [`Error::Argument`] if an integer result does not fit.
        pub fn $name(a: &AnyTensor, b: &AnyTensor) -> Result<AnyTensor> {
            match integers(stringify!($name), a, b, $integers)? {
                Some(result) => Ok(result),
                None => $route(stringify!($name), a, b, $($f),+),
            }
        }
    )*};
}

arithmetic! {
    /// a + b.
    add: i32::checked_add, by_dfdx(|a, b| a + b, expression("x0 + x1", &[Some("x2"), Some("x2")]));
    /// a - b.
    sub: i32::checked_sub, by_dfdx(|a, b| a - b, expression("x0 - x1", &[Some("x2"), Some("-x2")]));
    /// a * b.
    mul: i32::checked_mul, by_dfdx(|a, b| a * b, expression("x0 * x1", &[Some("x2 * x1"), Some("x2 * x0")]));
    /// The larger of a and b, NaN if one is. Where they are equal, each takes half of the
    /// gradient; where one is NaN, each takes all of it; as in torch.
    maximum: |a, b| Some(a.max(b)), by_loop(|a, b| if a > b || a.is_nan() { a } else { b }, share, MAXIMUM);
    /// The smaller of a and b, NaN if one is. Where they are equal, each takes half of the
    /// gradient; where one is NaN, each takes all of it; as in torch.
    minimum: |a, b| Some(a.min(b)), by_loop(|a, b| if a < b || a.is_nan() { a } else { b }, |a, b| share(b, a), MINIMUM);
}

const MAXIMUM: Expression = expression(
    "x0 > x1 || x0 != x0 ? x0 : x1",
    &[Some("x0 == x1 ? 0.5f * x2 : x0 < x1 ? 0.0f : x2"), Some("x0 == x1 ? 0.5f * x2 : x1 < x0 ? 0.0f : x2")],
);
const MINIMUM: Expression = expression(
    "x0 < x1 || x0 != x0 ? x0 : x1",
    &[Some("x0 == x1 ? 0.5f * x2 : x1 < x0 ? 0.0f : x2"), Some("x0 == x1 ? 0.5f * x2 : x0 < x1 ? 0.0f : x2")],
);

/// Derivatives of the larger of two values: by the larger one 1, by both where they do not compare.
fn share(a: f32, b: f32) -> (f32, f32) {
    if a == b {
        return (0.5, 0.5);
    }
    let keeps = |a: f32, b: f32| if a < b { 0.0 } else { 1.0 };
    (keeps(a, b), keeps(b, a))
}

/// a / b, for f32 or bf16. A division by 0 gives an infinity or NaN.
///
/// Errors: as [`add`], and [`Error::Dtype`] for i32: whether to round is the caller's choice ([`floor_div`], or convert).
pub fn div(a: &AnyTensor, b: &AnyTensor) -> Result<AnyTensor> {
    by_dfdx("div", a, b, |a, b| a / b, expression("x0 / x1", &[Some("x2 / x1"), Some("-x2 * (x0 / x1 / x1)")]))
}

/// The derivative of a power by its base.
pub(super) const POW_BY_BASE: &str = "x1 == 0.0f ? 0.0f : x2 * x1 * powf(x0, x1 - 1.0f)";

const POW_BY_EXPONENT: &str = "x0 == 0.0f && x1 >= 0.0f ? 0.0f : x2 * powf(x0, x1) * logf(x0)";

/// a to the power of b, for f32 or bf16. Derivatives as torch's: 0 by `a` where b = 0, 0 by `b` where a = 0 and b >= 0.
///
/// Errors: as [`div`].
pub fn pow(a: &AnyTensor, b: &AnyTensor) -> Result<AnyTensor> {
    let derivative = |a: f32, b: f32| {
        let by_a = if b == 0.0 { 0.0 } else { b * a.powf(b - 1.0) };
        let by_b = if a == 0.0 && b >= 0.0 { 0.0 } else { a.powf(b) * a.ln() };
        (by_a, by_b)
    };
    by_loop("pow", a, b, f32::powf, derivative, expression("powf(x0, x1)", &[Some(POW_BY_BASE), Some(POW_BY_EXPONENT)]))
}

/// The quotient of i32 rounded down (towards minus infinity), as Lua's `//`.
///
/// Errors: [`Error::Dtype`] if not both are i32; [`Error::Shape`] if the shapes do not broadcast; [`Error::Argument`] for
/// a divisor 0 or an overflow.
pub fn floor_div(a: &AnyTensor, b: &AnyTensor) -> Result<AnyTensor> {
    integers_only("floor_div", a, b, |a, b| {
        let (quotient, rest) = (a.checked_div(b)?, a.checked_rem(b)?);
        Some(if rest != 0 && (rest < 0) != (b < 0) { quotient - 1 } else { quotient })
    })
}

/// The rest of [`floor_div`], which has the sign of `b`, as Lua's `%`.
///
/// Errors: as [`floor_div`].
pub fn modulo(a: &AnyTensor, b: &AnyTensor) -> Result<AnyTensor> {
    integers_only("modulo", a, b, |a, b| {
        if b == -1 {
            return Some(0); // Of the smallest i32 too, whose quotient overflows.
        }
        let rest = a.checked_rem(b)?;
        Some(if rest != 0 && (rest < 0) != (b < 0) { rest + b } else { rest })
    })
}

#[cfg(test)]
mod tests {
    use super::super::gradient_check::{check, integers as i32s, numbers, tensor};
    use super::*;
    use crate::tensor::convert::to_dtype;
    use crate::tensor::elementwise::exp;
    use crate::tensor::reduce::sum;

    type Function = fn(&AnyTensor, &AnyTensor) -> Result<AnyTensor>;
    type Case = (&'static str, Function, fn(f64, f64) -> f64);

    #[test]
    fn values_and_gradients_agree_with_f64_over_broadcasts() {
        let table: [Case; 6] = [
            ("add", add, |a, b| a + b),
            ("sub", sub, |a, b| a - b),
            ("mul", mul, |a, b| a * b),
            ("div", div, |a, b| a / b),
            ("maximum", maximum, f64::max),
            ("minimum", minimum, f64::min),
        ];
        for (what, op, f) in table {
            let run = |x: &[AnyTensor]| op(&x[0], &x[1]);
            let (row, column, scalar) = (numbers(&[1, 7]), numbers(&[3, 1]), numbers(&[]));
            check(what, &[numbers(&[3, 7]), row.clone()], run, |x| (0..21).map(|i| f(x[0][i], x[1][i % 7])).collect());
            check(what, &[column, row], run, |x| (0..21).map(|i| f(x[0][i / 7], x[1][i % 7])).collect());
            check(what, &[scalar, numbers(&[2, 1, 3])], run, |x| (0..6).map(|i| f(x[0][0], x[1][i])).collect());
        }
        let positive = [exp(&numbers(&[3, 5])).unwrap(), numbers(&[5])];
        check("pow", &positive, |x| pow(&x[0], &x[1]), |x| (0..15).map(|i| x[0][i].powf(x[1][i % 5])).collect());
    }

    #[test]
    fn a_tensor_meets_itself() {
        let table: [(&str, Function, [f32; 3], [f32; 3]); 5] = [
            ("sub", sub, [0., 0., 0.], [0., 0., 0.]),
            ("add", add, [2., -4., 6.], [2., 2., 2.]),
            ("mul", mul, [1., 4., 9.], [2., -4., 6.]),
            ("div", div, [1., 1., 1.], [0., 0., 0.]),
            ("maximum", maximum, [1., -2., 3.], [1., 1., 1.]),
        ];
        for (what, op, values, gradient) in table {
            let x = tensor(&[3], &[1., -2., 3.]).leaf().unwrap();
            let y = op(&x, &x).unwrap();
            assert_eq!(y.to_f32_vec(), values, "{what}");
            sum(&y, None, false).unwrap().backward().unwrap();
            assert_eq!(x.gradient().unwrap().unwrap().to_f32_vec(), gradient, "{what}");
        }
        // x + x x, where x enters by two ways of different length: 1 + 2 x.
        let x = tensor(&[2], &[1., -2.]).leaf().unwrap();
        sum(&add(&x, &mul(&x, &x).unwrap()).unwrap(), None, false).unwrap().backward().unwrap();
        assert_eq!(x.gradient().unwrap().unwrap().to_f32_vec(), [3., -3.]);
    }

    #[test]
    fn a_graph_may_run_backwards_on_another_thread() {
        let x = tensor(&[2], &[3., 4.]).leaf().unwrap();
        let loss = sum(&mul(&x, &x).unwrap(), None, false).unwrap();
        std::thread::spawn(move || loss.backward().unwrap()).join().unwrap();
        assert_eq!(x.gradient().unwrap().unwrap().to_f32_vec(), [6., 8.]);
    }

    #[test]
    fn integers_round_down_and_refuse_to_wrap() {
        let (a, b) = (i32s(&[4], &[7, -7, 7, -7]), i32s(&[4], &[2, 2, -2, -2]));
        let ints = |x: AnyTensor| x.to_f32_vec();
        assert_eq!(ints(floor_div(&a, &b).unwrap()), [3., -4., -4., 3.]);
        assert_eq!(ints(modulo(&a, &b).unwrap()), [1., 1., -1., -1.]);
        let (big, small) = (i32s(&[], &[i32::MAX]), i32s(&[], &[i32::MIN]));
        let (one, zero, minus) = (i32s(&[], &[1]), i32s(&[], &[0]), i32s(&[], &[-1]));
        for wrong in [add(&big, &one), sub(&small, &one), mul(&big, &big), floor_div(&one, &zero), modulo(&one, &zero)] {
            assert!(wrong.unwrap_err().to_string().contains("fits i32"));
        }
        assert!(floor_div(&small, &minus).is_err());
        assert_eq!(ints(modulo(&small, &minus).unwrap()), [0.]);
    }

    #[test]
    fn wrong_operands_are_named() {
        let (a, bf16) = (numbers(&[3]), to_dtype(&numbers(&[3]), Dtype::Bf16).unwrap());
        let (ints, bytes) = (i32s(&[3], &[1, 2, 3]), to_dtype(&numbers(&[3]), Dtype::I8).unwrap());
        for (wrong, parts) in [
            (add(&a, &bf16), ["add", "`b`", "should be f32", "got bf16"]),
            (mul(&bf16, &ints), ["mul", "`b`", "should be bf16", "got i32"]),
            (div(&ints, &ints), ["div", "`a`", "should be f32", "got i32"]),
            (add(&bytes, &bytes), ["add", "`a`", "should be f32", "got i8"]),
            (modulo(&a, &a), ["modulo", "`a`", "should be i32", "got f32"]),
            (sub(&a, &numbers(&[2])), ["sub", "`b`", "broadcastable to [3]", "got [2]"]),
            (pow(&a, &numbers(&[2, 2])), ["pow", "`b`", "broadcastable to [3]", "got [2, 2]"]),
        ] {
            let told = wrong.unwrap_err().to_string();
            assert!(parts.iter().all(|part| told.contains(part)), "{told}");
        }
    }
}
