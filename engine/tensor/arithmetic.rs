//! Arithmetic on two tensors of one element type whose shapes broadcast as numpy's do; a scalar is a tensor of rank 0.
//!
//! - By dfdx with its derivatives: add, sub, mul, div. Both operands become dfdx tensors of their own, so that a tensor
//!   may meet itself (x - x), which dfdx alone refuses.
//! - Ours: maximum and minimum (dfdx drops NaN where torch keeps it), pow of two tensors (absent from dfdx), and all of
//!   i32, where a result that does not fit is an error. Integers have no gradient.

use super::any::{AnyData, AnyTensor, TensorElement};
use super::dfdx_tape::{self, Traced};
use super::operation::{as_f32, record_float, require_float, require_same};
use super::shape::{View, broadcast_shape, room_for};
use super::typed::Data;
use crate::error::{Error, Result};

type Row = Traced<(usize,)>;

/// The common shape of two operands of one type.
fn check(op: &'static str, a: &AnyTensor, b: &AnyTensor) -> Result<Vec<usize>> {
    require_same(op, "b", a, b)?;
    let shape = broadcast_shape(op, "b", a.shape(), b.shape())?;
    room_for(op, &shape)?;
    Ok(shape)
}

fn by_dfdx(op: &'static str, a: &AnyTensor, b: &AnyTensor, f: fn(Row, Row) -> Row) -> Result<AnyTensor> {
    let shape = check(op, a, b)?;
    require_float(op, "a", a)?;
    dfdx_tape::binary(op, a, b, shape, f)
}

/// A loop of ours; `derivative` gives those by `a` and by `b`.
fn by_loop(
    op: &'static str,
    a: &AnyTensor,
    b: &AnyTensor,
    f: fn(f32, f32) -> f32,
    derivative: fn(f32, f32) -> (f32, f32),
) -> Result<AnyTensor> {
    let shape = check(op, a, b)?;
    let dtype = require_float(op, "a", a)?;
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

/// Both operands as integers, if they are; checks the shapes and types.
fn integers(op: &'static str, a: &AnyTensor, b: &AnyTensor, f: fn(i32, i32) -> Option<i32>) -> Result<Option<AnyTensor>> {
    let (AnyData::I32(left), AnyData::I32(right)) = (a.data(), b.data()) else { return Ok(None) };
    let shape = check(op, a, b)?;
    let mut values = View::broadcast(a.shape(), &shape).read(left.get());
    let right = View::broadcast(b.shape(), &shape).read(right.get());
    for (a, b) in values.iter_mut().zip(right.iter()) {
        *a = f(*a, *b).ok_or_else(|| Error::argument(op, "a, b", "integers whose result fits i32", format!("{a}, {b}")))?;
    }
    Ok(Some(AnyTensor::from_parts(shape, i32::wrap(Data::ready(values)), None)))
}

fn integers_only(op: &'static str, a: &AnyTensor, b: &AnyTensor, f: fn(i32, i32) -> Option<i32>) -> Result<AnyTensor> {
    for (arg, x) in [("a", a), ("b", b)] {
        super::operation::require_i32(op, arg, x)?;
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
    add: i32::checked_add, by_dfdx(|a, b| a + b);
    /// a - b.
    sub: i32::checked_sub, by_dfdx(|a, b| a - b);
    /// a * b.
    mul: i32::checked_mul, by_dfdx(|a, b| a * b);
    /// The larger of a and b, NaN if one is. Where they are equal, each takes half of the
    /// gradient; where one is NaN, each takes all of it; as in torch.
    maximum: |a, b| Some(a.max(b)), by_loop(|a, b| if a > b || a.is_nan() { a } else { b }, share);
    /// The smaller of a and b, NaN if one is. Where they are equal, each takes half of the
    /// gradient; where one is NaN, each takes all of it; as in torch.
    minimum: |a, b| Some(a.min(b)), by_loop(|a, b| if a < b || a.is_nan() { a } else { b }, |a, b| share(b, a));
}

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
    by_dfdx("div", a, b, |a, b| a / b)
}

/// a to the power of b, for f32 or bf16. Derivatives as torch's: 0 by `a` where b = 0, 0 by `b` where a = 0 and b >= 0.
///
/// Errors: as [`div`].
pub fn pow(a: &AnyTensor, b: &AnyTensor) -> Result<AnyTensor> {
    by_loop("pow", a, b, f32::powf, |a, b| {
        let by_a = if b == 0.0 { 0.0 } else { b * a.powf(b - 1.0) };
        let by_b = if a == 0.0 && b >= 0.0 { 0.0 } else { a.powf(b) * a.ln() };
        (by_a, by_b)
    })
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
