//! Conversion between element types. f32 to bf16 rounds to nearest even and stays in the graph, as does the way back;
//! what becomes an integer leaves the graph.

use super::any::{AnyData, AnyTensor, TensorElement};
use super::cuda::generic as cuda;
use super::operation::{as_f32, float_data, record, through_host};
use super::typed::Data;
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use crate::kernels::element::Dtype;

/// `x` with elements of type `dtype`. To an integer, fractions are cut towards zero. Integers on a device are made on the host.
///
/// Errors: [`Error::Argument`] if an element does not fit the integer type: NaN, infinite or too large.
pub fn to_dtype(x: &AnyTensor, dtype: Dtype) -> Result<AnyTensor> {
    if x.dtype() == dtype {
        return Ok(x.clone());
    }
    if let Some(device) = x.device() {
        let is_float = |dtype| matches!(dtype, Dtype::F32 | Dtype::Bf16);
        return if is_float(x.dtype()) && is_float(dtype) {
            cuda::convert(device, x, dtype)
        } else {
            through_host([x], |[x]| to_dtype(x, dtype))
        };
    }
    match dtype {
        Dtype::F32 | Dtype::Bf16 => {
            let data = float_data(dtype, Buffer::copy_of(&as_f32(x.data())));
            // The sink rounds the gradient to the type of `x`.
            Ok(record(x.shape().to_vec(), data, &[x], |gradient, sink| {
                sink.add(0, Buffer::copy_of(gradient));
                Ok(())
            }))
        }
        Dtype::I32 => integers::<i32>(x, f64::from(i32::MIN), f64::from(i32::MAX), |v| v as i32),
        Dtype::I8 => integers::<i8>(x, f64::from(i8::MIN), f64::from(i8::MAX), |v| v as i8),
    }
}

fn integers<E: TensorElement>(x: &AnyTensor, min: f64, max: f64, convert: fn(f64) -> E) -> Result<AnyTensor> {
    let mut out = Buffer::<E>::scratch(x.len());
    let mut put = |index: usize, value: f64| {
        let whole = value.trunc();
        // Written so that a NaN fails too.
        if !(min <= whole && whole <= max) {
            return Err(Error::argument("to", "self", format!("values that fit {}", E::DTYPE), value));
        }
        out[index] = convert(whole);
        Ok(())
    };
    match x.data() {
        AnyData::I32(data) => data.get().iter().enumerate().try_for_each(|(i, v)| put(i, f64::from(*v)))?,
        data => as_f32(data).iter().enumerate().try_for_each(|(i, v)| put(i, f64::from(*v)))?,
    }
    Ok(AnyTensor::from_parts(x.shape().to_vec(), E::wrap(Data::ready(out)), None))
}

#[cfg(test)]
mod tests {
    use super::super::gradient_check::{integers as i32s, tensor};
    use super::*;
    use crate::tensor::arithmetic::mul;
    use crate::tensor::reduce::sum;

    #[test]
    fn gradients_pass_between_f32_and_bf16() {
        let x = tensor(&[2], &[1.0, 3.0]).leaf().unwrap();
        let narrow = to_dtype(&x, Dtype::Bf16).unwrap();
        let wide = to_dtype(&mul(&narrow, &narrow).unwrap(), Dtype::F32).unwrap();
        sum(&wide, None, false).unwrap().backward().unwrap();
        let gradient = x.gradient().unwrap().unwrap();
        assert_eq!((gradient.dtype(), gradient.to_f32_vec()), (Dtype::F32, vec![2.0, 6.0]));
        // 1 + 2^-8 is half way between two bf16 and goes to the even one.
        assert_eq!(to_dtype(&tensor(&[], &[1.0 + 1.0 / 256.0]), Dtype::Bf16).unwrap().to_f32_vec(), [1.0]);
    }

    #[test]
    fn integers_take_what_fits_and_refuse_the_rest() {
        let x = tensor(&[3], &[1.9, -1.9, -0.5]).leaf().unwrap();
        let whole = to_dtype(&x, Dtype::I32).unwrap();
        assert!(whole.node().is_none());
        assert_eq!(whole.to_f32_vec(), [1., -1., 0.]);
        assert_eq!(to_dtype(&tensor(&[1], &[-128.9]), Dtype::I8).unwrap().to_f32_vec(), [-128.]);
        for (value, dtype) in [(f32::NAN, Dtype::I32), (f32::INFINITY, Dtype::I8), (2147483648.0, Dtype::I32), (128.0, Dtype::I8)] {
            assert!(to_dtype(&tensor(&[], &[value]), dtype).unwrap_err().to_string().contains("fit"));
        }
        assert!(to_dtype(&i32s(&[], &[300]), Dtype::I8).is_err());
        assert_eq!(to_dtype(&tensor(&[0, 3], &[]), Dtype::I8).unwrap().shape(), [0, 3]);
    }
}
