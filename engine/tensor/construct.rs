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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::operation::indices;

    #[test]
    fn constants_and_sequences_hold_what_they_say() {
        assert_eq!(ones(&[2, 1], Dtype::Bf16).unwrap().to_f32_vec(), [1., 1.]);
        assert_eq!(full(&[], 2.5, Dtype::F32).unwrap().to_f32_vec(), [2.5]);
        assert_eq!(zeros(&[3, 0], Dtype::I8).unwrap().shape(), [3, 0]);
        let large = full(&[1], f64::from((1 << 24) + 1), Dtype::I32).unwrap();
        assert_eq!(indices("", "", &large, &large).unwrap()[..], [(1 << 24) + 1]);
        assert_eq!(arange(1., 2., 0.25, Dtype::F32).unwrap().to_f32_vec(), [1., 1.25, 1.5, 1.75]);
        assert_eq!(arange(3., 0., -1., Dtype::I32).unwrap().to_f32_vec(), [3., 2., 1.]);
        assert!(arange(3., 0., 1., Dtype::F32).unwrap().is_empty());
        assert_eq!(linspace(0., 1., 5, Dtype::F32).unwrap().to_f32_vec(), [0., 0.25, 0.5, 0.75, 1.]);
        assert_eq!(linspace(3., 7., 1, Dtype::F32).unwrap().to_f32_vec(), [3.]);
        assert_eq!(*linspace(0.1, 0.7, 7, Dtype::F32).unwrap().to_f32_vec().last().unwrap(), 0.7);
        assert_eq!(eye(2, Dtype::I32).unwrap().to_f32_vec(), [1., 0., 0., 1.]);
    }

    #[test]
    fn random_tensors_are_functions_of_their_position() {
        let init = Stream::new(1, "init");
        let draw = |stream, first| randn(&[7, 3], Dtype::F32, stream, first).unwrap().to_f32_vec();
        assert_eq!(draw(init, 9), draw(init, 9));
        assert_ne!(draw(init, 9), draw(Stream::new(2, "init"), 9));
        assert_ne!(draw(init, 9), draw(Stream::new(1, "data"), 9));
        assert_eq!(draw(init, 9)[4..], draw(init, 13)[..17]);
        assert!(rand(&[33], Dtype::Bf16, init, 0).unwrap().to_f32_vec().iter().all(|v| (0.0..=1.0).contains(v)));
        assert!(randint(-1, 2, &[33], init, 0).unwrap().to_f32_vec().iter().all(|v| [-1., 0., 1.].contains(v)));
    }

    #[test]
    fn what_cannot_be_meant_is_named() {
        let stream = Stream::new(1, "init");
        for (wrong, part) in [
            (full(&[1], 0.5, Dtype::I32), "whole number that fits i32"),
            (full(&[1], f64::NAN, Dtype::I8), "whole number that fits i8"),
            (full(&[1], 128.0, Dtype::I8), "whole number that fits i8"),
            (arange(0., 1., 0., Dtype::F32), "step not 0"),
            (arange(0., f64::INFINITY, 1., Dtype::F32), "finite"),
            (arange(0., 1e300, 1., Dtype::F32), "fits memory"),
            (zeros(&[1 << 60, 1 << 10], Dtype::F32), "fits memory"),
            (zeros(&[0, usize::MAX, 2], Dtype::F32), "fits memory"),
            (eye(1 << 40, Dtype::F32), "fits memory"),
            (randn(&[1], Dtype::I32, stream, 0), "should be f32"),
            (randint(3, 3, &[1], stream, 0), "low < high"),
        ] {
            let told = wrong.unwrap_err().to_string();
            assert!(told.contains(part), "{told}");
        }
    }
}
