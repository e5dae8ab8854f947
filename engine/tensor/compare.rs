//! Comparisons and choice by a mask. Plain loops of ours: dfdx compares into tensors of bool, which nothing here holds.
//!
//! A comparison gives an f32 mask of 0 and 1, whatever its operands are, because masks are multiplied, summed and averaged
//! in losses. Masks are constants of the graph. NaN compares as IEEE 754 says: unequal to all, neither below nor above.

use super::any::{AnyData, AnyTensor, TensorElement};
use super::cuda::generic::{self as cuda, Expression};
use super::operation::{as_f32, record, require_same, require_together, through_host};
use super::shape::{View, broadcast_shape, room_for};
use super::typed::Data;
use crate::error::Result;
use crate::kernels::buffer::Buffer;
use crate::kernels::element::{Dtype, Element};

/// The mask `f(a, b)` over the broadcast shape. bf16 and i8 convert to f64 exactly, as do f32 and i32.
/// On a device by `on_device`, an expression of `x0` and `x1`; integers come to the host for it.
fn mask(op: &'static str, a: &AnyTensor, b: &AnyTensor, f: fn(f64, f64) -> bool, on_device: &'static str) -> Result<AnyTensor> {
    require_same(op, "b", a, b)?;
    let shape = broadcast_shape(op, "b", a.shape(), b.shape())?;
    room_for(op, &shape)?;
    match (a.device(), a.dtype()) {
        (None, _) => {}
        (Some(device), Dtype::F32 | Dtype::Bf16) => {
            let expression = Expression { value: on_device, derivatives: &[None, None] };
            return cuda::map(device, op, expression, &[a, b], shape, Dtype::F32);
        }
        (Some(_), _) => return through_host([a, b], |[a, b]| mask(op, a, b, f, on_device)),
    }
    fn read(x: &AnyTensor, shape: &[usize]) -> Vec<f64> {
        let view = View::broadcast(x.shape(), shape);
        match x.data() {
            AnyData::I32(data) => view.read(data.get()).iter().map(|v| f64::from(*v)).collect(),
            AnyData::F32(data) => view.read(data.get()).iter().map(|v| f64::from(*v)).collect(),
            AnyData::Bf16(data) => view.read(data.get()).iter().map(|v| f64::from(v.to_f32())).collect(),
            AnyData::I8(data) => view.read(data.get()).iter().map(|v| f64::from(*v)).collect(),
        }
    }
    let (left, right) = (read(a, &shape), read(b, &shape));
    let mut out = Buffer::scratch(left.len());
    out.iter_mut().zip(left.iter().zip(&right)).for_each(|(out, (a, b))| *out = f32::from(u8::from(f(*a, *b))));
    Ok(AnyTensor::from_parts(shape, f32::wrap(Data::ready(out)), None))
}

macro_rules! comparisons {
    ($($(#[$doc:meta])* $name:ident: $f:expr, $on_device:literal;)*) => {$(
        $(#[$doc])*
        /// `a` and `b`: of one element type, any of the four, and of shapes that broadcast. Returns an f32 mask.
        ///
        /// Errors: [`Error::Dtype`](crate::error::Error::Dtype) if the types differ; [`Error::Shape`](crate::error::Error::Shape) if the shapes do not broadcast.
        pub fn $name(a: &AnyTensor, b: &AnyTensor) -> Result<AnyTensor> {
            mask(stringify!($name), a, b, $f, $on_device)
        }
    )*};
}

comparisons! {
    /// 1 where a = b.
    eq: |a, b| a == b, "x0 == x1 ? 1.0f : 0.0f";
    /// 1 where a differs from b.
    ne: |a, b| a != b, "x0 != x1 ? 1.0f : 0.0f";
    /// 1 where a < b.
    lt: |a, b| a < b, "x0 < x1 ? 1.0f : 0.0f";
    /// 1 where a <= b.
    le: |a, b| a <= b, "x0 <= x1 ? 1.0f : 0.0f";
    /// 1 where a > b.
    gt: |a, b| a > b, "x0 > x1 ? 1.0f : 0.0f";
    /// 1 where a >= b.
    ge: |a, b| a >= b, "x0 >= x1 ? 1.0f : 0.0f";
}

fn property(op: &'static str, x: &AnyTensor, f: fn(f32) -> bool, on_device: &'static str) -> Result<AnyTensor> {
    match (x.device(), x.dtype()) {
        (None, _) => {}
        (Some(device), Dtype::F32 | Dtype::Bf16) => {
            let expression = Expression { value: on_device, derivatives: &[None] };
            return cuda::map(device, op, expression, &[x], x.shape().to_vec(), Dtype::F32);
        }
        (Some(_), _) => return through_host([x], |[x]| property(op, x, f, on_device)),
    }
    let mut out = Buffer::scratch(x.len());
    out.iter_mut().zip(as_f32(x.data()).iter()).for_each(|(out, x)| *out = f32::from(u8::from(f(*x))));
    Ok(AnyTensor::from_parts(x.shape().to_vec(), f32::wrap(Data::ready(out)), None))
}

/// An f32 mask: 1 where the element of `x`, of any type, is neither infinite nor NaN.
pub fn is_finite(x: &AnyTensor) -> Result<AnyTensor> {
    property("is_finite", x, f32::is_finite, "x0 - x0 == 0.0f ? 1.0f : 0.0f")
}

/// An f32 mask: 1 where the element of `x`, of any type, is NaN.
pub fn is_nan(x: &AnyTensor) -> Result<AnyTensor> {
    property("is_nan", x, f32::is_nan, "x0 != x0 ? 1.0f : 0.0f")
}

const WHERE: Expression =
    Expression { value: "x0 != 0.0f ? x1 : x2", derivatives: &[None, Some("x0 != 0.0f ? x3 : 0.0f"), Some("x0 != 0.0f ? 0.0f : x3")] };

/// `a` where `condition` is not 0, else `b`. All three broadcast to one shape. An element that was not chosen gets the
/// gradient 0, also where it is not finite.
///
/// - `condition`: any element type, usually a mask; takes no gradient
/// - `a`, `b`: of one element type, any of the four
///
/// Errors: [`Error::Dtype`](crate::error::Error::Dtype) if the types of `a` and `b` differ; [`Error::Shape`](crate::error::Error::Shape) if the shapes do not broadcast.
pub fn where_(condition: &AnyTensor, a: &AnyTensor, b: &AnyTensor) -> Result<AnyTensor> {
    require_same("where", "b", a, b)?;
    let shape = broadcast_shape("where", "b", a.shape(), b.shape())?;
    let shape = broadcast_shape("where", "condition", &shape, condition.shape())?;
    room_for("where", &shape)?;
    require_together("where", "condition", a, condition)?;
    if let Some(device) = a.device() {
        let is_float = |x: &AnyTensor| matches!(x.dtype(), Dtype::F32 | Dtype::Bf16);
        if is_float(condition) && is_float(a) {
            return cuda::map(device, "where", WHERE, &[condition, a, b], shape, a.dtype());
        }
        return through_host([condition, a, b], |[condition, a, b]| where_(condition, a, b));
    }
    let chosen: Vec<bool> = View::broadcast(condition.shape(), &shape).read(&as_f32(condition.data())).iter().map(|v| *v != 0.0).collect();
    let views = [View::broadcast(a.shape(), &shape), View::broadcast(b.shape(), &shape)];
    let lens = [a.len(), b.len()];
    fn choose<E: Element>(chosen: &[bool], a: Buffer<E>, b: Buffer<E>) -> Buffer<E> {
        let mut out = a;
        for ((out, b), chosen) in out.iter_mut().zip(b.iter()).zip(chosen) {
            if !chosen {
                *out = *b;
            }
        }
        out
    }
    let data = match (a.data(), b.data()) {
        (AnyData::F32(a), AnyData::F32(b)) => f32::wrap(Data::ready(choose(&chosen, views[0].read(a.get()), views[1].read(b.get())))),
        (AnyData::Bf16(a), AnyData::Bf16(b)) => {
            half::bf16::wrap(Data::ready(choose(&chosen, views[0].read(a.get()), views[1].read(b.get()))))
        }
        (AnyData::I32(a), AnyData::I32(b)) => i32::wrap(Data::ready(choose(&chosen, views[0].read(a.get()), views[1].read(b.get())))),
        (AnyData::I8(a), AnyData::I8(b)) => i8::wrap(Data::ready(choose(&chosen, views[0].read(a.get()), views[1].read(b.get())))),
        _ => unreachable!("the types were compared above"),
    };
    Ok(record(shape, data, &[a, b], move |gradient, sink| {
        for (index, side) in [true, false].into_iter().enumerate() {
            if sink.wants(index) {
                let mut part = Buffer::scratch(gradient.len());
                part.iter_mut().zip(gradient).zip(&chosen).for_each(|((out, g), c)| *out = if *c == side { *g } else { 0.0 });
                sink.add(index, views[index].scatter_add(&part, lens[index]));
            }
        }
        Ok(())
    }))
}

#[cfg(test)]
mod tests {
    use super::super::gradient_check::{check, integers, numbers, tensor};
    use super::*;
    use crate::tensor::reduce::sum;

    #[test]
    fn masks_follow_ieee_and_keep_large_integers_apart() {
        let (a, b) = (tensor(&[4], &[1., f32::NAN, 0., f32::INFINITY]), tensor(&[4], &[1., f32::NAN, -0., 1.]));
        assert_eq!(eq(&a, &b).unwrap().to_f32_vec(), [1., 0., 1., 0.]);
        assert_eq!(ne(&a, &b).unwrap().to_f32_vec(), [0., 1., 0., 1.]);
        assert_eq!(ge(&a, &b).unwrap().to_f32_vec(), [1., 0., 1., 1.]);
        assert_eq!(is_nan(&a).unwrap().to_f32_vec(), [0., 1., 0., 0.]);
        assert_eq!(is_finite(&a).unwrap().to_f32_vec(), [1., 0., 1., 0.]);
        // 2^24 and 2^24 + 1 are one number in f32.
        assert_eq!(lt(&integers(&[], &[1 << 24]), &integers(&[], &[(1 << 24) + 1])).unwrap().to_f32_vec(), [1.]);
        assert!(eq(&a, &integers(&[4], &[0; 4])).is_err());
        assert!(gt(&a, &tensor(&[3], &[0.; 3])).is_err());
    }

    #[test]
    fn where_chooses_and_sends_gradients_to_the_chosen() {
        let mask = [1., 0., 1., 1., 0., 0., 0.];
        let condition = tensor(&[7], &mask);
        check(
            "where",
            &[numbers(&[3, 7]), numbers(&[3, 1])],
            |x| where_(&condition, &x[0], &x[1]),
            |x| (0..21).map(|i| if mask[i % 7] == 1. { x[0][i] } else { x[1][i / 7] }).collect(),
        );
        // A part that was not chosen gets 0, not the NaN of 0 times an infinite derivative upstream of it.
        let x = tensor(&[2], &[4., 0.]).leaf().unwrap();
        sum(&where_(&tensor(&[2], &[1., 0.]), &x, &tensor(&[], &[9.])).unwrap(), None, false).unwrap().backward().unwrap();
        assert_eq!(x.gradient().unwrap().unwrap().to_f32_vec(), [1., 0.]);
        let both = tensor(&[2], &[4., 5.]).leaf().unwrap();
        sum(&where_(&tensor(&[2], &[1., 0.]), &both, &both).unwrap(), None, false).unwrap().backward().unwrap();
        assert_eq!(both.gradient().unwrap().unwrap().to_f32_vec(), [1., 1.]);
        assert!(where_(&condition, &x, &integers(&[2], &[1, 2])).is_err());
        assert!(where_(&condition, &x, &x).unwrap_err().to_string().contains("`condition`"));
    }
}
