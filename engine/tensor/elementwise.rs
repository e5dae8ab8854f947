//! Functions of one element: the mathematics of losses, rewards and heads. Shape and element type stay.
//! Float operands (f32, bf16) unless a function says otherwise.
//!
//! - By dfdx with its derivative: neg, abs, exp, log, sqrt, square, recip, powf, tanh, sigmoid, silu, gelu_tanh, sin, cos.
//! - Values by dfdx, derivative ours: gelu (dfdx 0.13 misses a factor 1/sqrt(2) in the derivative of its second term).
//! - On a device by the expression beside each; integers come to the host for it.
//! - Ours: relu (dfdx turns NaN into 0), clamp (dfdx differentiates to 1 at a bound), softplus (absent from dfdx), and
//!   floor, ceil, round, sign, which are constants of the graph; neg, abs and sign of i32.

use super::any::{AnyData, AnyTensor, TensorElement};
use super::arithmetic::POW_BY_BASE;
use super::cuda::generic::{self as cuda, Expression};
use super::dfdx_tape::{self, Traced};
use super::operation::{as_f32, record_float, require_float, through_host};
use super::typed::Data;
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use dfdx::tensor::{PutTape, SplitTape};

/// A function of dfdx with its derivative.
fn by_dfdx(
    op: &'static str,
    x: &AnyTensor,
    f: impl Fn(Traced<(usize,)>) -> Traced<(usize,)> + Send + 'static,
    on_device: Expression,
) -> Result<AnyTensor> {
    let dtype = require_float(op, "x", x)?;
    match x.device() {
        Some(device) => cuda::map(device, op, on_device, &[x], x.shape().to_vec(), dtype),
        None => dfdx_on_host(op, x, f),
    }
}

fn dfdx_on_host(op: &'static str, x: &AnyTensor, f: impl Fn(Traced<(usize,)>) -> Traced<(usize,)> + Send + 'static) -> Result<AnyTensor> {
    dfdx_tape::unary(op, x, (x.len(),), x.shape().to_vec(), f, |x| x.to_vec(), |gradient| gradient)
}

/// A loop of ours with its derivative.
fn by_loop(
    op: &'static str,
    x: &AnyTensor,
    f: impl Fn(f32) -> f32,
    derivative: impl Fn(f32) -> f32 + Send + 'static,
    on_device: Expression,
) -> Result<AnyTensor> {
    let dtype = require_float(op, "x", x)?;
    match x.device() {
        Some(device) => cuda::map(device, op, on_device, &[x], x.shape().to_vec(), dtype),
        None => loop_on_host(op, x, f, derivative),
    }
}

fn loop_on_host(
    op: &'static str,
    x: &AnyTensor,
    f: impl Fn(f32) -> f32,
    derivative: impl Fn(f32) -> f32 + Send + 'static,
) -> Result<AnyTensor> {
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
fn step(op: &'static str, x: &AnyTensor, f: fn(f32) -> f32, value: &'static str) -> Result<AnyTensor> {
    by_loop(op, &x.detach(), f, |_| 0.0, Expression { value, derivatives: &[None] })
}

/// A function of integers that may overflow; none of other types. Those on a device come to the host for it.
fn integers(op: &'static str, x: &AnyTensor, f: fn(i32) -> Option<i32>) -> Result<Option<AnyTensor>> {
    let AnyData::I32(data) = x.data() else { return Ok(None) };
    if x.device().is_some() {
        return through_host([x], |[x]| Ok(integers(op, x, f)?.expect("it is i32"))).map(Some);
    }
    let mut out = Buffer::scratch(x.len());
    for (out, x) in out.iter_mut().zip(data.get()) {
        *out = f(*x).ok_or_else(|| Error::argument(op, "x", "a value whose result fits i32", x))?;
    }
    Ok(Some(AnyTensor::from_parts(x.shape().to_vec(), i32::wrap(Data::ready(out)), None)))
}

/// `value` of `x0` on a device, and its derivative, given the gradient `x1`.
const fn expression(value: &'static str, derivative: &'static [Option<&'static str>; 1]) -> Expression {
    Expression { value, derivatives: derivative }
}

const ABS: Expression = expression("fabsf(x0)", &[Some("x0 > 0.0f ? x1 : x0 < 0.0f ? -x1 : x0 == 0.0f ? 0.0f : x0")]);
const SILU: Expression =
    expression("x0 / (1.0f + expf(-x0))", &[Some("x1 * ((1.0f + x0 - x0 / (1.0f + expf(-x0))) / (1.0f + expf(-x0)))")]);
const SOFTPLUS: Expression = expression("fmaxf(x0, 0.0f) + log1pf(expf(-fabsf(x0)))", &[Some("x1 / (1.0f + expf(-x0))")]);
/// x P(x), and P(x) + x p(x), with P(x) = erfc(-x / sqrt(2)) / 2 and p(x) = exp(-x^2 / 2) / sqrt(2 pi).
const GELU: Expression = expression(
    "0.5f * x0 * erfcf(-0.70710678118654752f * x0)",
    &[Some("x1 * (0.5f * erfcf(-0.70710678118654752f * x0) + x0 * expf(-0.5f * x0 * x0) * 0.39894228040143268f)")],
);
/// With t = tanh(sqrt(2 / pi) (x + 0.044715 x^3)): x (1 + t) / 2, and its derivative.
const GELU_TANH: Expression = expression(
    "0.5f * x0 * (1.0f + tanhf(0.79788456080286536f * (x0 + 0.044715f * x0 * x0 * x0)))",
    &[Some(
        "[=] { float t = tanhf(0.79788456080286536f * (x0 + 0.044715f * x0 * x0 * x0)); \
         return x1 * (0.5f * (1.0f + t) + 0.5f * x0 * (1.0f - t * t) * 0.79788456080286536f * (1.0f + 0.134145f * x0 * x0)); }()",
    )],
);
const CLAMP: Expression = Expression {
    value: "x0 != x0 ? x0 : fminf(fmaxf(x0, x1), x2)",
    derivatives: &[Some("x0 == x0 && (x1 != x1 || x1 < x0) && (x2 != x2 || x0 < x2) ? x3 : 0.0f"), None, None],
};

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
    exp = "exp" by by_dfdx(|x| x.exp(), expression("expf(x0)", &[Some("x1 * expf(x0)")]));
    /// Natural logarithm of each element of `x`; 0 gives -inf, below 0 NaN.
    log = "log" by by_dfdx(|x| x.ln(), expression("logf(x0)", &[Some("x1 / x0")]));
    /// Square root of each element of `x`; below 0 NaN.
    sqrt = "sqrt" by by_dfdx(|x| x.sqrt(), expression("sqrtf(x0)", &[Some("x1 * (0.5f / sqrtf(x0))")]));
    /// The square of each element of `x`.
    square = "square" by by_dfdx(|x| x.square(), expression("x0 * x0", &[Some("x1 * (2.0f * x0)")]));
    /// 1 over each element of `x`.
    recip = "recip" by by_dfdx(|x| x.recip(), expression("1.0f / x0", &[Some("-x1 / (x0 * x0)")]));
    /// Hyperbolic tangent of each element of `x`.
    tanh = "tanh" by by_dfdx(|x| x.tanh(), expression("tanhf(x0)", &[Some("x1 * (1.0f - tanhf(x0) * tanhf(x0))")]));
    /// 1 / (1 + e^-x) of each element of `x`.
    sigmoid = "sigmoid" by by_dfdx(|x| x.sigmoid(), expression("1.0f / (1.0f + expf(-x0))", &[Some("x1 * (1.0f / (1.0f + expf(-x0)) * (1.0f - 1.0f / (1.0f + expf(-x0))))")]));
    /// x * sigmoid(x) of each element of `x`.
    silu = "silu" by by_dfdx(|x| {
        let (x, tape) = x.split_tape();
        x.clone().put_tape(tape).sigmoid() * x
    }, SILU);
    /// The tanh approximation of gelu, as torch's `gelu(approximate="tanh")`.
    gelu_tanh = "gelu_tanh" by by_dfdx(|x| x.fast_gelu(), GELU_TANH);
    /// Sine of each element of `x`, in radians.
    sin = "sin" by by_dfdx(|x| x.sin(), expression("sinf(x0)", &[Some("x1 * cosf(x0)")]));
    /// Cosine of each element of `x`, in radians.
    cos = "cos" by by_dfdx(|x| x.cos(), expression("cosf(x0)", &[Some("-x1 * sinf(x0)")]));
    /// The larger of x and 0, element by element; NaN stays NaN. The derivative at 0 is 0.
    relu = "relu" by by_loop(|x| if x <= 0.0 { 0.0 } else { x }, |x| if x <= 0.0 { 0.0 } else { 1.0 }, expression("x0 <= 0.0f ? 0.0f : x0", &[Some("x0 <= 0.0f ? 0.0f : x1")]));
    /// log(1 + e^x) of each element of `x`, without overflow.
    softplus = "softplus" by by_loop(|x| x.max(0.0) + (-x.abs()).exp().ln_1p(), |x| 1.0 / (1.0 + (-x).exp()), SOFTPLUS);
    /// The largest whole number not above each element of `x`. A constant of the graph.
    floor = "floor" by step(f32::floor, "floorf(x0)");
    /// The smallest whole number not below each element of `x`. A constant of the graph.
    ceil = "ceil" by step(f32::ceil, "ceilf(x0)");
    /// The nearest whole number, halves to even as in torch. A constant of the graph.
    round = "round" by step(f32::round_ties_even, "rintf(x0)");
}

/// -x, element by element; f32, bf16 or i32.
///
/// Errors: [`Error::Dtype`] for i8; [`Error::Argument`] if an integer overflows.
pub fn neg(x: &AnyTensor) -> Result<AnyTensor> {
    match integers("neg", x, i32::checked_neg)? {
        Some(result) => Ok(result),
        None => by_dfdx("neg", x, |x| x.negate(), expression("-x0", &[Some("-x1")])),
    }
}

/// The magnitude of each element of `x`; f32, bf16 or i32. The derivative at 0 is 0, and NaN
/// where x is NaN.
///
/// Errors: [`Error::Dtype`] for i8; [`Error::Argument`] if an integer overflows.
pub fn abs(x: &AnyTensor) -> Result<AnyTensor> {
    match integers("abs", x, i32::checked_abs)? {
        Some(result) => Ok(result),
        None => by_dfdx("abs", x, |x| x.abs(), ABS),
    }
}

/// -1, 0 or 1 by the sign of each element of `x`, NaN for NaN; f32, bf16 or i32. A constant of the graph.
///
/// Errors: [`Error::Dtype`] for i8.
pub fn sign(x: &AnyTensor) -> Result<AnyTensor> {
    match integers("sign", x, |x| Some(x.signum()))? {
        Some(result) => Ok(result),
        None => step("sign", x, |x| if x == 0.0 { 0.0 } else { x.signum() }, "x0 > 0.0f ? 1.0f : x0 < 0.0f ? -1.0f : x0"),
    }
}

/// x to the power of `exponent`, element by element. NaN where x is below 0 and the exponent no whole number. The
/// derivative for exponent 0 is 0, also at x = 0.
///
/// Errors: [`Error::Dtype`] if `x` is not f32 or bf16.
pub fn powf(x: &AnyTensor, exponent: f32) -> Result<AnyTensor> {
    if let (Some(device), dtype) = (x.device(), require_float("pow", "x", x)?) {
        let power = Expression { value: "powf(x0, x1)", derivatives: &[Some(POW_BY_BASE), None] };
        return cuda::map(device, "pow", power, &[x, &cuda::scalar(device, exponent)?], x.shape().to_vec(), dtype);
    }
    if exponent == 0.0 {
        return loop_on_host("pow", x, |_| 1.0, |_| 0.0);
    }
    dfdx_on_host("pow", x, move |x| x.powf(exponent))
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
    if let (Some(device), dtype) = (x.device(), require_float("clamp", "x", x)?) {
        // A bound that is absent is NaN, which compares with nothing.
        let bound = |bound: Option<f32>| cuda::scalar(device, bound.unwrap_or(f32::NAN));
        return cuda::map(device, "clamp", CLAMP, &[x, &bound(min)?, &bound(max)?], x.shape().to_vec(), dtype);
    }
    let inside = move |x: f32| min.is_none_or(|min| min < x) && max.is_none_or(|max| x < max) && !x.is_nan();
    loop_on_host("clamp", x, |x| if x.is_nan() { x } else { x.clamp(low, high) }, move |x| f32::from(u8::from(inside(x))))
}

/// x times the normal distribution function of x, by the error function; torch's `gelu` without approximation.
///
/// Errors: [`Error::Dtype`] if `x` is not f32 or bf16.
pub fn gelu(x: &AnyTensor) -> Result<AnyTensor> {
    let dtype = require_float("gelu", "x", x)?;
    if let Some(device) = x.device() {
        return cuda::map(device, "gelu", GELU, &[x], x.shape().to_vec(), dtype);
    }
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
            assert_eq!(x.gradient().unwrap().unwrap().shape(), [3, 0]);
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
