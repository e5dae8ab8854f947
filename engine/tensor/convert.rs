//! Conversion between element types. f32 to bf16 rounds to nearest even and stays in the graph, as does the way back;
//! what becomes an integer leaves the graph.

use super::any::{AnyData, AnyTensor, TensorElement};
use super::operation::{as_f32, float_data, record};
use super::typed::Data;
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use crate::kernels::element::Dtype;

/// `x` with elements of type `dtype`. To an integer, fractions are cut towards zero.
///
/// Errors: [`Error::Argument`] if an element does not fit the integer type: NaN, infinite or too large.
pub fn to_dtype(x: &AnyTensor, dtype: Dtype) -> Result<AnyTensor> {
    if x.dtype() == dtype {
        return Ok(x.clone());
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
