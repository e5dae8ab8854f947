//! Functions of one element: the mathematics of losses, rewards and heads. Shape and element type stay.
//! Float operands (f32, bf16) unless a function says otherwise.
//!
//! - By dfdx with its derivative: neg, abs, exp, log, sqrt, square, recip, powf, tanh, sigmoid, silu, gelu_tanh, sin, cos.
//! - Values by dfdx, derivative ours: gelu (dfdx 0.13 misses a factor 1/sqrt(2) in the derivative of its second term).
//! - Ours: relu (dfdx turns NaN into 0), clamp (dfdx differentiates to 1 at a bound), softplus (absent from dfdx), and
//!   floor, ceil, round, sign, which are constants of the graph; neg, abs and sign of i32.

use super::any::{AnyData, AnyTensor, TensorElement};
use super::dfdx_tape::{self, Traced};
use super::operation::{as_f32, record_float, require_float};
use super::typed::Data;
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use dfdx::tensor::{PutTape, SplitTape};

/// A function of dfdx with its derivative.
fn by_dfdx(op: &'static str, x: &AnyTensor, f: impl Fn(Traced<(usize,)>) -> Traced<(usize,)> + Send + 'static) -> Result<AnyTensor> {
    require_float(op, "x", x)?;
    dfdx_tape::unary(op, x, (x.len(),), x.shape().to_vec(), f, |x| x.to_vec(), |gradient| gradient)
}

/// A loop of ours with its derivative.
fn by_loop(op: &'static str, x: &AnyTensor, f: impl Fn(f32) -> f32, derivative: impl Fn(f32) -> f32 + Send + 'static) -> Result<AnyTensor> {
    let dtype = require_float(op, "x", x)?;
    let saved = x.data().clone();
    let mut values = Buffer::scratch(x.len());
    values.iter_mut().zip(as_f32(&saved).iter()).for_each(|(y, x)| *y = f(*x));
    Ok(record_float(x.shape().to_vec(), dtype, values, &[x], move |gradient, sink| {
        let mut out = Buffer::scratch(gradient.len());
        let x = as_f32(&saved);
        out.iter_mut().zip(gradient).zip(x.iter()).for_each(|((out, g), x)| *out = g * derivative(*x));
        sink.add(0, out);
        Ok(())
    }))
}

/// A step function: a constant of the graph.
fn step(op: &'static str, x: &AnyTensor, f: fn(f32) -> f32) -> Result<AnyTensor> {
    by_loop(op, &x.detach(), f, |_| 0.0)
}

/// A function of integers that may overflow.
fn integers(op: &'static str, x: &[i32], shape: &[usize], f: fn(i32) -> Option<i32>) -> Result<AnyTensor> {
    let mut out = Buffer::scratch(x.len());
    for (out, x) in out.iter_mut().zip(x) {
        *out = f(*x).ok_or_else(|| Error::argument(op, "x", "a value whose result fits i32", x))?;
    }
    Ok(AnyTensor::from_parts(shape.to_vec(), i32::wrap(Data::ready(out)), None))
}

macro_rules! elementwise {
    ($($(#[$doc:meta])* $name:ident = $op:literal by $route:ident($($f:expr),+);)*) => {$(
        $(#[$doc])*
        ///
        /// Errors: [`Error::Dtype`] if `x` is not f32 or bf16.
        pub fn $name(x: &AnyTensor) -> Result<AnyTensor> {
            $route($op, x, $($f),+)
        }
    )*};
}

elementwise! {
    /// e to the power of each element of `x`.
    exp = "exp" by by_dfdx(|x| x.exp());
    /// Natural logarithm of each element of `x`; 0 gives -inf, below 0 NaN.
    log = "log" by by_dfdx(|x| x.ln());
    /// Square root of each element of `x`; below 0 NaN.
    sqrt = "sqrt" by by_dfdx(|x| x.sqrt());
    /// The square of each element of `x`.
    square = "square" by by_dfdx(|x| x.square());
    /// 1 over each element of `x`.
    recip = "recip" by by_dfdx(|x| x.recip());
    /// Hyperbolic tangent of each element of `x`.
    tanh = "tanh" by by_dfdx(|x| x.tanh());
    /// 1 / (1 + e^-x) of each element of `x`.
    sigmoid = "sigmoid" by by_dfdx(|x| x.sigmoid());
    /// x * sigmoid(x) of each element of `x`.
    silu = "silu" by by_dfdx(|x| {
        let (x, tape) = x.split_tape();
        x.clone().put_tape(tape).sigmoid() * x
    });
    /// The tanh approximation of gelu, as torch's `gelu(approximate="tanh")`.
    gelu_tanh = "gelu_tanh" by by_dfdx(|x| x.fast_gelu());
    /// Sine of each element of `x`, in radians.
    sin = "sin" by by_dfdx(|x| x.sin());
    /// Cosine of each element of `x`, in radians.
    cos = "cos" by by_dfdx(|x| x.cos());
    /// The larger of x and 0, element by element; NaN stays NaN. The derivative at 0 is 0.
    relu = "relu" by by_loop(|x| if x <= 0.0 { 0.0 } else { x }, |x| if x <= 0.0 { 0.0 } else { 1.0 });
    /// log(1 + e^x) of each element of `x`, without overflow.
    softplus = "softplus" by by_loop(|x| x.max(0.0) + (-x.abs()).exp().ln_1p(), |x| 1.0 / (1.0 + (-x).exp()));
    /// The largest whole number not above each element of `x`. A constant of the graph.
    floor = "floor" by step(f32::floor);
    /// The smallest whole number not below each element of `x`. A constant of the graph.
    ceil = "ceil" by step(f32::ceil);
    /// The nearest whole number, halves to even as in torch. A constant of the graph.
    round = "round" by step(f32::round_ties_even);
}

/// -x, element by element; f32, bf16 or i32.
///
/// Errors: [`Error::Dtype`] for i8; [`Error::Argument`] if an integer overflows.
pub fn neg(x: &AnyTensor) -> Result<AnyTensor> {
    match x.data() {
        AnyData::I32(data) => integers("neg", data.get(), x.shape(), i32::checked_neg),
        _ => by_dfdx("neg", x, |x| x.negate()),
    }
}

/// The magnitude of each element of `x`; f32, bf16 or i32. The derivative at 0 is 0, and NaN
/// where x is NaN.
///
/// Errors: [`Error::Dtype`] for i8; [`Error::Argument`] if an integer overflows.
pub fn abs(x: &AnyTensor) -> Result<AnyTensor> {
    match x.data() {
        AnyData::I32(data) => integers("abs", data.get(), x.shape(), i32::checked_abs),
        _ => by_dfdx("abs", x, |x| x.abs()),
    }
}

/// -1, 0 or 1 by the sign of each element of `x`, NaN for NaN; f32, bf16 or i32. A constant of the graph.
///
/// Errors: [`Error::Dtype`] for i8.
pub fn sign(x: &AnyTensor) -> Result<AnyTensor> {
    match x.data() {
        AnyData::I32(data) => integers("sign", data.get(), x.shape(), |x| Some(x.signum())),
        _ => step("sign", x, |x| if x == 0.0 { 0.0 } else { x.signum() }),
    }
}

/// x to the power of `exponent`, element by element. NaN where x is below 0 and the exponent no whole number. The
/// derivative for exponent 0 is 0, also at x = 0.
///
/// Errors: [`Error::Dtype`] if `x` is not f32 or bf16.
pub fn powf(x: &AnyTensor, exponent: f32) -> Result<AnyTensor> {
    if exponent == 0.0 {
        return by_loop("pow", x, |_| 1.0, |_| 0.0);
    }
    by_dfdx("pow", x, move |x| x.powf(exponent))
}

/// Each element of `x` kept between `min` and `max`, either of which may be absent. NaN stays NaN. The derivative is 1
/// where min < x < max and 0 elsewhere, also at a bound and for NaN, as in torch 2.15.
///
/// Errors: [`Error::Dtype`] if `x` is not f32 or bf16; [`Error::Argument`] if a bound is NaN or min > max.
pub fn clamp(x: &AnyTensor, min: Option<f32>, max: Option<f32>) -> Result<AnyTensor> {
    let (low, high) = (min.unwrap_or(f32::NEG_INFINITY), max.unwrap_or(f32::INFINITY));
    if low > high || low.is_nan() || high.is_nan() {
        return Err(Error::argument("clamp", "min, max", "numbers with min <= max", format!("{low}, {high}")));
    }
    let inside = move |x: f32| min.is_none_or(|min| min < x) && max.is_none_or(|max| x < max) && !x.is_nan();
    by_loop("clamp", x, |x| if x.is_nan() { x } else { x.clamp(low, high) }, move |x| f32::from(u8::from(inside(x))))
}

/// x times the normal distribution function of x, by the error function; torch's `gelu` without approximation.
///
/// Errors: [`Error::Dtype`] if `x` is not f32 or bf16.
pub fn gelu(x: &AnyTensor) -> Result<AnyTensor> {
    let dtype = require_float("gelu", "x", x)?;
    let saved = x.data().clone();
    let values = dfdx_tape::values("gelu", &as_f32(&saved), |x| x.accurate_gelu())?;
    Ok(record_float(x.shape().to_vec(), dtype, values, &[x], move |gradient, sink| {
        let x = as_f32(&saved);
        let mut out = dfdx_tape::values("gelu", &x, |x| x.accurate_gelu())?;
        for ((out, x), g) in out.iter_mut().zip(x.iter()).zip(gradient) {
            // gelu(x) = x P(x), so its derivative is P(x) + x p(x), with P(x) = gelu(x) / x and P(0) = 1/2.
            let below = if *x == 0.0 { 0.5 } else { *out / x };
            let density = (-0.5 * x * x).exp() / (2.0 * std::f32::consts::PI).sqrt();
            *out = g * (below + x * density);
        }
        sink.add(0, out);
        Ok(())
    }))
}

#[cfg(test)]
mod tests {
    use super::super::gradient_check::{check, integers as i32s, numbers, tensor};
    use super::*;
    use crate::kernels::element::Dtype;

    type Function = fn(&AnyTensor) -> Result<AnyTensor>;
    type Case = (&'static str, Function, fn(f64) -> f64);

    /// The normal distribution function by Simpson's rule from 0: independent of any error function.
    fn normal_below(x: f64) -> f64 {
        let density = |t: f64| (-0.5 * t * t).exp() / std::f64::consts::TAU.sqrt();
        let (count, step) = (400, x / 400.0);
        let inner: f64 = (1..count).map(|i| density(i as f64 * step) * if i % 2 == 1 { 4.0 } else { 2.0 }).sum();
        0.5 + (density(0.0) + inner + density(x)) * step / 3.0
    }

    #[test]
    fn values_and_gradients_agree_with_f64() {
        let any: [Case; 13] = [
            ("neg", neg, |x| -x),
            ("abs", abs, f64::abs),
            ("exp", exp, f64::exp),
            ("square", square, |x| x * x),
            ("recip", recip, |x| 1.0 / x),
            ("tanh", tanh, f64::tanh),
            ("sigmoid", sigmoid, |x| 1.0 / (1.0 + (-x).exp())),
            ("relu", relu, |x| x.max(0.0)),
            ("silu", silu, |x| x / (1.0 + (-x).exp())),
            ("gelu", gelu, |x| x * normal_below(x)),
            ("gelu_tanh", gelu_tanh, |x| 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())),
            ("softplus", softplus, |x| (1.0 + x.exp()).ln()),
            ("cube", |x| powf(x, 3.0), |x| x.powi(3)),
        ];
        for (what, op, reference) in any {
            for shape in [vec![], vec![1], vec![7], vec![3, 11], vec![1, 2, 1, 3, 1, 2]] {
                check(what, &[numbers(&shape)], |x| op(&x[0]), |x| x[0].iter().map(|x| reference(*x)).collect());
            }
        }
        let positive: [Case; 5] = [
            ("log", log, f64::ln),
            ("sqrt", sqrt, f64::sqrt),
            ("sin", sin, f64::sin),
            ("cos", cos, f64::cos),
            ("power", |x| powf(x, -1.5), |x| x.powf(-1.5)),
        ];
        for (what, op, reference) in positive {
            let x = exp(&numbers(&[33])).unwrap();
            check(what, &[x], |x| op(&x[0]), |x| x[0].iter().map(|x| reference(*x)).collect());
        }
        let clamped = |x: &[AnyTensor]| clamp(&x[0], Some(-0.6), Some(0.4));
        check("clamp", &[numbers(&[33])], clamped, |x| x[0].iter().map(|x| x.clamp(-0.6, 0.4)).collect());
    }

    #[test]
    fn empty_tensors_keep_their_shape_and_get_empty_gradients() {
        for op in [neg, exp, relu, gelu, silu] {
            let x = tensor(&[3, 0], &[]).leaf().unwrap();
            let y = op(&x).unwrap();
            assert_eq!(y.shape(), [3, 0]);
            super::super::reduce::sum(&y, None, false).unwrap().backward().unwrap();
            assert_eq!(x.gradient().unwrap().shape(), [3, 0]);
        }
    }

    #[test]
    fn bf16_is_computed_in_f32_and_rounded_once() {
        let x = super::super::convert::to_dtype(&numbers(&[7]), Dtype::Bf16).unwrap();
        let wide = exp(&super::super::convert::to_dtype(&x, Dtype::F32).unwrap()).unwrap();
        let want = super::super::convert::to_dtype(&wide, Dtype::Bf16).unwrap();
        assert_eq!(exp(&x).unwrap().to_f32_vec(), want.to_f32_vec());
    }

    #[test]
    fn steps_are_constants_and_nothing_is_recorded_under_no_grad() {
        let x = numbers(&[3]).leaf().unwrap();
        assert!(floor(&x).unwrap().node().is_none() && exp(&x).unwrap().node().is_some());
        assert!(super::super::autograd::with_recording(false, || exp(&x)).unwrap().node().is_none());
    }

    #[test]
    fn integers_are_checked_and_wrong_operands_are_named() {
        let x = i32s(&[2], &[i32::MIN, 3]);
        assert!(neg(&x).unwrap_err().to_string().contains("-2147483648"));
        assert!(abs(&x).is_err());
        assert_eq!(sign(&x).unwrap().to_f32_vec(), [-1.0, 1.0]);
        let told = exp(&x).unwrap_err().to_string();
        assert!(told.contains("exp") && told.contains("f32") && told.contains("i32"), "{told}");
        for (min, max) in [(Some(1.0), Some(0.0)), (Some(f32::NAN), None)] {
            assert!(clamp(&numbers(&[1]), min, max).unwrap_err().to_string().contains("min <= max"));
        }
    }
}
