//! What every operation of the generic mathematics shares: reading operands as f32, checking element types, and placing
//! a result in the graph, and the way over the host of what has no form for devices. Arithmetic is done in f32 for bf16 too; a bf16 result or gradient is rounded once, at the end.
//! Knows no single operation; each stands in its own file with its derivative.

use super::any::{AnyData, AnyTensor, TensorElement};
use super::autograd::{Gradient, Node, Sink, is_recording};
use super::typed::Data;
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use crate::kernels::element::{Dtype, Element};
use half::bf16;
use std::borrow::Cow;

/// Runs `$body` with `$values` as the typed slice behind `$data`; the body gives a buffer of the same type, and the
/// whole gives [`AnyData`].
macro_rules! map_elements {
    ($data:expr, $values:ident => $body:expr) => {{
        use $crate::tensor::any::{AnyData, TensorElement};
        use $crate::tensor::typed::Data;
        match $data {
            AnyData::F32(data) => {
                let $values = data.get();
                TensorElement::wrap(Data::ready($body))
            }
            AnyData::Bf16(data) => {
                let $values = data.get();
                TensorElement::wrap(Data::ready($body))
            }
            AnyData::I32(data) => {
                let $values = data.get();
                TensorElement::wrap(Data::ready($body))
            }
            AnyData::I8(data) => {
                let $values = data.get();
                TensorElement::wrap(Data::ready($body))
            }
        }
    }};
}
pub(super) use map_elements;

fn convert<A: Element, B: Element>(values: &[A]) -> Buffer<B> {
    let mut out = Buffer::scratch(values.len());
    out.iter_mut().zip(values).for_each(|(out, value)| *out = B::from_f32(value.to_f32()));
    out
}

/// Elements as f32: borrowed if they are, else converted.
pub(super) fn as_f32(data: &AnyData) -> Cow<'_, [f32]> {
    match data {
        AnyData::F32(data) => Cow::Borrowed(data.get()),
        AnyData::Bf16(data) => Cow::Owned(data.get().iter().map(|v| v.to_f32()).collect()),
        AnyData::I32(data) => Cow::Owned(data.get().iter().map(|v| v.to_f32()).collect()),
        AnyData::I8(data) => Cow::Owned(data.get().iter().map(|v| v.to_f32()).collect()),
    }
}

/// f32 values as elements of a float type: moved for f32, rounded to nearest even for bf16.
pub(super) fn float_data(dtype: Dtype, values: Buffer<f32>) -> AnyData {
    match dtype {
        Dtype::F32 => f32::wrap(Data::ready(values)),
        Dtype::Bf16 => bf16::wrap(Data::ready(convert(&values))),
        Dtype::I32 | Dtype::I8 => panic!("{dtype} is no float type"),
    }
}

/// Where a backward closure puts gradients in f32; they are rounded if the parent is bf16.
pub(super) struct FloatSink<'a, 'b> {
    sink: &'a mut Sink<'b>,
    dtypes: &'a [Dtype],
}

impl FloatSink<'_, '_> {
    /// Whether parent `index` takes a gradient.
    pub(super) fn wants(&self, index: usize) -> bool {
        self.sink.wants(index)
    }

    /// Adds `gradient` to that of parent `index`.
    pub(super) fn add(&mut self, index: usize, gradient: Buffer<f32>) {
        match self.dtypes[index] {
            Dtype::Bf16 => self.sink.add::<bf16>(index, convert(&gradient)),
            _ => self.sink.add::<f32>(index, gradient),
        }
    }
}

/// The result of an operation in the graph: kept there only while recording and if a parent wants a gradient.
/// `backward` gets the result's gradient in f32. It must hold elements (`AnyData`), never tensors with nodes.
pub(super) fn record(
    shape: Vec<usize>,
    data: AnyData,
    parents: &[&AnyTensor],
    backward: impl FnOnce(&[f32], &mut FloatSink) -> Result<()> + Send + 'static,
) -> AnyTensor {
    let nodes: Vec<_> = parents.iter().map(|parent| parent.node()).collect();
    let float = matches!(data, AnyData::F32(_) | AnyData::Bf16(_));
    if !(float && is_recording() && nodes.iter().any(Option::is_some)) {
        return AnyTensor::from_parts(shape, data, None);
    }
    let dtypes: Vec<Dtype> = parents.iter().map(|parent| parent.dtype()).collect();
    let node = Node::new(&nodes, move |gradient, sink| {
        let gradient = match gradient {
            Gradient::F32(gradient) => gradient.into_host()?,
            Gradient::Bf16(gradient) => convert(&gradient.into_host()?),
        };
        backward(&gradient, &mut FloatSink { sink, dtypes: &dtypes })
    });
    AnyTensor::from_parts(shape, data, Some(node))
}

/// As [`record`], with the values in f32 and the element type of the result.
pub(super) fn record_float(
    shape: Vec<usize>,
    dtype: Dtype,
    values: Buffer<f32>,
    parents: &[&AnyTensor],
    backward: impl FnOnce(&[f32], &mut FloatSink) -> Result<()> + Send + 'static,
) -> AnyTensor {
    record(shape, float_data(dtype, values), parents, backward)
}

/// The element type of `x`, which must be f32 or bf16.
///
/// Errors: [`Error::Dtype`] otherwise.
pub(super) fn require_float(op: &'static str, arg: &'static str, x: &AnyTensor) -> Result<Dtype> {
    match x.dtype() {
        dtype @ (Dtype::F32 | Dtype::Bf16) => Ok(dtype),
        other => Err(Error::Dtype { op, arg, expected: "f32".into(), got: other.name().into() }),
    }
}

/// Checks that `b` has the element type of `a`, and lies where it does.
///
/// Errors: [`Error::Dtype`] otherwise, nothing is converted silently; those of [`require_together`].
pub(super) fn require_same(op: &'static str, arg: &'static str, a: &AnyTensor, b: &AnyTensor) -> Result<()> {
    if a.dtype() != b.dtype() {
        return Err(Error::Dtype { op, arg, expected: a.dtype().name().into(), got: b.dtype().name().into() });
    }
    require_together(op, arg, a, b)
}

/// Checks that `b` lies where `a` does.
///
/// Errors: [`Error::Argument`] otherwise; nothing is moved silently.
pub(super) fn require_together(op: &'static str, arg: &'static str, a: &AnyTensor, b: &AnyTensor) -> Result<()> {
    let (place, other) = (a.place(), b.place());
    if place.is(&other) {
        return Ok(());
    }
    let expected = format!("a tensor on {place}, where the other one lies");
    Err(Error::argument(op, arg, expected, format!("one on {other}; move it with :to(\"{place}\")")))
}

/// An operation without a form for devices: it runs on copies on the host, and its result goes to where the operands, which lie
/// together, came from. So does its gradient. Waits for the device.
///
/// Errors: those of the operation and of the device.
pub(super) fn through_host<const N: usize>(
    operands: [&AnyTensor; N],
    run: impl FnOnce(&[AnyTensor; N]) -> Result<AnyTensor>,
) -> Result<AnyTensor> {
    let place = operands[0].place();
    let copies = operands.iter().map(|operand| operand.on_host()).collect::<Result<Vec<_>>>()?;
    run(&copies.try_into().expect("as many copies as operands"))?.to_place(&place)
}

/// As [`through_host`], of an operation with two results.
pub(super) fn pair_through_host(
    x: &AnyTensor,
    run: impl FnOnce(&AnyTensor) -> Result<(AnyTensor, AnyTensor)>,
) -> Result<(AnyTensor, AnyTensor)> {
    let (first, second) = run(&x.on_host()?)?;
    Ok((first.to_place(&x.place())?, second.to_place(&x.place())?))
}

/// Indices as i32, for argument `arg`, which lies where `beside` does; those on a device are fetched, since they are checked.
///
/// Errors: [`Error::Dtype`] if `x` is not i32; those of [`require_together`].
pub(super) fn indices<'a>(op: &'static str, arg: &'static str, beside: &AnyTensor, x: &'a AnyTensor) -> Result<Cow<'a, [i32]>> {
    require_together(op, arg, beside, x)?;
    match x.data() {
        AnyData::I32(data) if data.device().is_some() => Ok(Cow::Owned(data.cuda().to_vec()?)),
        AnyData::I32(data) => Ok(Cow::Borrowed(data.get())),
        _ => Err(Error::Dtype { op, arg, expected: "i32".into(), got: x.dtype().name().into() }),
    }
}
