//! Tensors from nothing but sizes: constants, sequences, the identity, random numbers. All are constants of the graph.
//! Random tensors are functions of a stream and the counter of their first element; see `kernels/random.rs`.

use super::any::{AnyTensor, TensorElement};
use super::convert::to_dtype;
use super::shape::room_for;
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use crate::kernels::element::Dtype;
use crate::kernels::random::Stream;
use half::bf16;

/// `value` as E, which must hold it: a float of any size, or a whole number in range.
fn element<E: TensorElement>(op: &'static str, value: f64) -> Result<E> {
    let converted: Option<E> = match E::DTYPE {
        Dtype::F32 | Dtype::Bf16 => Some(E::from_f32(value as f32)),
        // An i32 beyond 2^24 must not pass through f32, so both integer types are made of their bytes.
        Dtype::I32 => whole(value, i32::MIN, i32::MAX).and_then(|v| (&v as &dyn std::any::Any).downcast_ref::<E>().copied()),
        Dtype::I8 => whole(value, i8::MIN.into(), i8::MAX.into()).map(|v| E::from_f32(v as f32)),
    };
    converted.ok_or_else(|| Error::argument(op, "value", format!("a whole number that fits {}", E::DTYPE), value))
}

fn whole(value: f64, min: i32, max: i32) -> Option<i32> {
    (value.trunc() == value && f64::from(min) <= value && value <= f64::from(max)).then_some(value as i32)
}

/// Elements that `value` gives by position.
fn fill(op: &'static str, shape: &[usize], dtype: Dtype, value: impl Fn(usize) -> f64) -> Result<AnyTensor> {
    fn typed<E: TensorElement>(op: &'static str, shape: &[usize], value: impl Fn(usize) -> f64) -> Result<AnyTensor> {
        let mut out = Buffer::<E>::scratch(room_for(op, shape)?);
        for (index, out) in out.iter_mut().enumerate() {
            *out = element(op, value(index))?;
        }
        AnyTensor::new(shape, out)
    }
    match dtype {
        Dtype::F32 => typed::<f32>(op, shape, value),
        Dtype::Bf16 => typed::<bf16>(op, shape, value),
        Dtype::I32 => typed::<i32>(op, shape, value),
        Dtype::I8 => typed::<i8>(op, shape, value),
    }
}

/// Zeros.
///
/// Errors: [`Error::Shape`] if memory cannot hold them; so for all functions here that take a shape.
pub fn zeros(shape: &[usize], dtype: Dtype) -> Result<AnyTensor> {
    fill("zeros", shape, dtype, |_| 0.0)
}

/// Ones.
///
/// Errors: as [`zeros`].
pub fn ones(shape: &[usize], dtype: Dtype) -> Result<AnyTensor> {
    fill("ones", shape, dtype, |_| 1.0)
}

/// `value` everywhere; with shape `[]` a scalar.
///
/// Errors: as [`zeros`], and [`Error::Argument`] if an integer type cannot hold `value`.
pub fn full(shape: &[usize], value: f64, dtype: Dtype) -> Result<AnyTensor> {
    fill("full", shape, dtype, |_| value)
}

/// `start`, `start + step`, ... before `stop`; `step` may be negative. Rank 1.
///
/// Errors: [`Error::Argument`] if a number is not finite, `step` is 0, or an integer type cannot hold an element.
pub fn arange(start: f64, stop: f64, step: f64, dtype: Dtype) -> Result<AnyTensor> {
    if ![start, stop, step].iter().all(|v| v.is_finite()) || step == 0.0 {
        return Err(Error::argument("arange", "start, stop, step", "finite numbers, step not 0", format!("{start}, {stop}, {step}")));
    }
    // A cast saturates, and room_for refuses what is then too large.
    let count = ((stop - start) / step).ceil().max(0.0) as usize;
    fill("arange", &[count], dtype, |index| start + index as f64 * step)
}

/// `count` numbers from `start` to `stop`, both included, at equal distances. Rank 1.
///
/// Errors: [`Error::Argument`] if a number is not finite, or an integer type cannot hold an element.
pub fn linspace(start: f64, stop: f64, count: usize, dtype: Dtype) -> Result<AnyTensor> {
    if !(start.is_finite() && stop.is_finite()) {
        return Err(Error::argument("linspace", "start, stop", "finite numbers", format!("{start}, {stop}")));
    }
    let last = count.saturating_sub(1).max(1) as f64;
    // Each half counts from its own end, so that `stop` comes out exactly.
    fill("linspace", &[count], dtype, |index| match 2 * index < count {
        true => start + (stop - start) * (index as f64 / last),
        false => stop - (stop - start) * ((count - 1 - index) as f64 / last),
    })
}

/// The identity matrix, `[size, size]`.
///
/// Errors: as [`zeros`].
pub fn eye(size: usize, dtype: Dtype) -> Result<AnyTensor> {
    fill("eye", &[size, size], dtype, |index| f64::from(u8::from(index / size == index % size)))
}

fn random_floats(op: &'static str, shape: &[usize], dtype: Dtype, draw: impl Fn(&mut [f32])) -> Result<AnyTensor> {
    if !matches!(dtype, Dtype::F32 | Dtype::Bf16) {
        return Err(Error::Dtype { op, arg: "dtype", expected: "f32".into(), got: dtype.name().into() });
    }
    let mut out = Buffer::scratch(room_for(op, shape)?);
    draw(&mut out);
    to_dtype(&AnyTensor::new(shape, out)?, dtype)
}

/// Numbers uniform in [0, 1), f32 or bf16 (which may round to 1). Element `i` uses counter `first + i`.
///
/// Errors: as [`zeros`], and [`Error::Dtype`] for integer types.
pub fn rand(shape: &[usize], dtype: Dtype, stream: Stream, first: u64) -> Result<AnyTensor> {
    random_floats("rand", shape, dtype, |out| out.iter_mut().zip(first..).for_each(|(out, counter)| *out = stream.f32(counter)))
}

/// Numbers of the normal distribution with mean 0 and variance 1, f32 or bf16. Element `i` uses counter `first + i`.
///
/// Errors: as [`rand`].
pub fn randn(shape: &[usize], dtype: Dtype, stream: Stream, first: u64) -> Result<AnyTensor> {
    random_floats("randn", shape, dtype, |out| stream.fill_normal(first, 1.0, out))
}

/// i32 uniform from `low` to below `high`. Element `i` uses counter `first + i`.
///
/// Errors: as [`zeros`], and [`Error::Argument`] if `low` is not below `high`.
pub fn randint(low: i32, high: i32, shape: &[usize], stream: Stream, first: u64) -> Result<AnyTensor> {
    if low >= high {
        return Err(Error::argument("randint", "low, high", "low < high", format!("{low}, {high}")));
    }
    let mut out = Buffer::scratch(room_for("randint", shape)?);
    let span = i64::from(high) - i64::from(low);
    for (out, counter) in out.iter_mut().zip(first..) {
        *out = (i64::from(low) + stream.below(counter, span as u64) as i64) as i32;
    }
    AnyTensor::new(shape, out)
}
