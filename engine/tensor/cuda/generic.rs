//! Generic mathematics on a GPU, by the kernels that kernels/cuda/generic.rs writes from expressions: what the operations of the
//! folder above call once they have seen that their operands lie on a device. In f32; bf16 is widened before and rounded once
//! after, as on the host. Nothing here waits for the device.

use super::{activation, gradient, scratch};
use crate::error::{Error, Result};
use crate::kernels::cuda::device::Device;
use crate::kernels::cuda::elements::{narrow, widen};
use crate::kernels::cuda::generic::{self, AXES_MAX, Input, Reduction};
use crate::kernels::cuda::memory::{DeviceBuffer, View as Elements, ViewMut};
use crate::kernels::cuda::product::{self, Residual, Weight};
use crate::kernels::element::Dtype;
use crate::tensor::AnyTensor;
use crate::tensor::any::{AnyData, TensorElement};
use crate::tensor::autograd::{Gradient, Node, Sink, is_recording};
use crate::tensor::place::Array;
use crate::tensor::shape::{Around, View};
use crate::tensor::typed::Data;
use bytemuck::Pod;
use half::bf16;
use std::sync::Arc;

/// Elements of a tensor on a device, as f32.
pub(in crate::tensor) enum Wide {
    Shared(Arc<Data<f32>>),
    Own(DeviceBuffer<f32>),
}

impl Wide {
    /// Those of `data`, f32 or bf16. Panics for integers, which operations bring to the host.
    pub fn of(device: &Arc<Device>, data: &AnyData) -> Result<Self> {
        match data {
            AnyData::F32(data) => Ok(Self::Shared(data.clone())),
            AnyData::Bf16(data) => widened(device, data.cuda().view()).map(Self::Own),
            AnyData::I32(_) | AnyData::I8(_) => panic!("integers on {} were read as floats", device.name),
        }
    }

    pub fn view(&self) -> Elements<'_, f32> {
        match self {
            Self::Shared(data) => data.cuda().view(),
            Self::Own(values) => values.view(),
        }
    }
}

fn widened(device: &Arc<Device>, values: Elements<bf16>) -> Result<DeviceBuffer<f32>> {
    let mut wide = scratch(device, values.len())?;
    widen(device, values, wide.view_mut())?;
    Ok(wide)
}

fn narrowed(device: &Arc<Device>, values: &DeviceBuffer<f32>) -> Result<DeviceBuffer<bf16>> {
    let mut rounded = activation(device, values.len())?;
    narrow(device, values.view(), rounded.view_mut())?;
    Ok(rounded)
}

/// Where a backward closure puts gradients in f32; they are rounded if the parent is bf16.
pub(in crate::tensor) struct DeviceSink<'a, 'b> {
    sink: &'a mut Sink<'b>,
    dtypes: &'a [Dtype],
    device: &'a Arc<Device>,
}

impl DeviceSink<'_, '_> {
    /// Whether parent `index` takes a gradient.
    pub fn wants(&self, index: usize) -> bool {
        self.sink.wants(index)
    }

    /// Adds `gradient` to that of parent `index`.
    ///
    /// Errors: those of the device.
    pub fn add(&mut self, index: usize, gradient: DeviceBuffer<f32>) -> Result<()> {
        match self.dtypes[index] {
            Dtype::Bf16 => self.sink.add_on_device::<bf16>(index, narrowed(self.device, &gradient)?),
            _ => self.sink.add_on_device::<f32>(index, gradient),
        }
    }
}

/// The result of an operation on a device in the graph, as `operation::record_float` is on the host.
///
/// Errors: those of the device.
pub(in crate::tensor) fn record(
    device: &Arc<Device>,
    shape: Vec<usize>,
    dtype: Dtype,
    values: DeviceBuffer<f32>,
    parents: &[&AnyTensor],
    backward: impl FnOnce(&Arc<Device>, DeviceBuffer<f32>, &mut DeviceSink) -> Result<()> + Send + 'static,
) -> Result<AnyTensor> {
    let data = match dtype {
        Dtype::Bf16 => bf16::wrap(Data::on_device(narrowed(device, &values)?)),
        _ => f32::wrap(Data::on_device(values)),
    };
    let nodes: Vec<_> = parents.iter().map(|parent| parent.node()).collect();
    if !(is_recording() && nodes.iter().any(Option::is_some)) {
        return Ok(AnyTensor::from_parts(shape, data, None));
    }
    let dtypes: Vec<Dtype> = parents.iter().map(|parent| parent.dtype()).collect();
    let device = device.clone();
    let node = Node::new(&nodes, move |gradient, sink| {
        let gradient = match gradient {
            Gradient::F32(gradient) => gradient.into_cuda(),
            Gradient::Bf16(gradient) => widened(&device, gradient.cuda().view())?,
        };
        backward(&device, gradient, &mut DeviceSink { sink, dtypes: &dtypes, device: &device })
    });
    Ok(AnyTensor::from_parts(shape, data, Some(node)))
}

/// Axes of several views of one shape taken together where all lie alike, and those of size 1 left out. None if what is left is
/// more than the kernels take: too many axes, or one too long.
fn collapsed(shape: &[usize], strides: &[&[isize]]) -> Option<(Vec<usize>, Vec<Vec<isize>>)> {
    let mut sizes: Vec<usize> = Vec::new();
    let mut steps: Vec<Vec<isize>> = vec![Vec::new(); strides.len()];
    for (axis, size) in shape.iter().enumerate().filter(|(_, size)| **size != 1) {
        let joins =
            !sizes.is_empty() && steps.iter().zip(strides).all(|(steps, strides)| steps[steps.len() - 1] == strides[axis] * *size as isize);
        if joins {
            let last = sizes.len() - 1;
            sizes[last] *= size;
            steps.iter_mut().zip(strides).for_each(|(steps, strides)| steps[last] = strides[axis]);
        } else {
            sizes.push(*size);
            steps.iter_mut().zip(strides).for_each(|(steps, strides)| steps.push(strides[axis]));
        }
    }
    let fits = |size: usize| i32::try_from(size).is_ok();
    let is_short = sizes.iter().all(|size| fits(*size)) && steps.iter().flatten().all(|stride| fits(stride.unsigned_abs()));
    (sizes.len() <= AXES_MAX && is_short).then_some((sizes, steps))
}

/// An operand of an expression: elements and the view of them that has the shape of the result.
type Operand<'a> = (Elements<'a, f32>, &'a View);

/// `out = expression`, element by element over one shape.
///
/// Errors: [`Error::Unsupported`] for more axes or longer ones than kernels take; those of the device.
fn evaluate(device: &Arc<Device>, op: &'static str, expression: &str, operands: &[Operand], out: ViewMut<f32>) -> Result<()> {
    if out.is_empty() {
        return Ok(());
    }
    let strides: Vec<&[isize]> = operands.iter().map(|(_, view)| &view.strides[..]).collect();
    let shape = &operands[0].1.shape;
    let (shape, strides) = collapsed(shape, &strides).ok_or_else(|| too_large(op, shape))?;
    let inputs: Vec<Input> =
        operands.iter().zip(&strides).map(|((values, view), strides)| Input { values: *values, offset: view.offset, strides }).collect();
    generic::elementwise(device, op, expression, &shape, &inputs, out)
}

fn too_large(op: &'static str, shape: &[usize]) -> Error {
    Error::Unsupported {
        what: format!("{op}: {shape:?}, on a GPU,"),
        remedy: format!("reshape it to {AXES_MAX} axes of fewer than 2^31 elements, or move it with :to(\"cpu\")"),
    }
}

/// An expression of `x0`, `x1`, ... and its derivatives: for each operand an expression that has the gradient of the result as one
/// more `x` behind the operands; none for an operand that takes no gradient.
#[derive(Clone, Copy)]
pub(in crate::tensor) struct Expression {
    pub value: &'static str,
    pub derivatives: &'static [Option<&'static str>],
}

/// `expression` of operands that broadcast to `shape`, as a tensor of `dtype`.
///
/// Errors: as [`evaluate`].
pub(in crate::tensor) fn map(
    device: &Arc<Device>,
    op: &'static str,
    expression: Expression,
    operands: &[&AnyTensor],
    shape: Vec<usize>,
    dtype: Dtype,
) -> Result<AnyTensor> {
    let count = operands.len();
    assert_eq!(expression.derivatives.len(), count, "{op}: a derivative for each operand, or none");
    let views: Vec<View> = operands.iter().map(|operand| View::broadcast(operand.shape(), &shape)).collect();
    let saved: Vec<AnyData> = operands.iter().map(|operand| operand.data().clone()).collect();
    let load = move |device: &Arc<Device>| saved.iter().map(|data| Wide::of(device, data)).collect::<Result<Vec<_>>>();
    let mut values = activation(device, shape.iter().product())?;
    let wide = load(device)?;
    let list: Vec<_> = wide.iter().zip(&views).map(|(values, view)| (values.view(), view)).collect();
    evaluate(device, op, expression.value, &list, values.view_mut())?;
    // What takes no gradient is no parent.
    let detached: Vec<AnyTensor> = operands.iter().map(|operand| operand.detach()).collect();
    let parents: Vec<&AnyTensor> =
        (0..count).map(|index| if expression.derivatives[index].is_some() { operands[index] } else { &detached[index] }).collect();
    let shapes: Vec<Vec<usize>> = operands.iter().map(|operand| operand.shape().to_vec()).collect();
    let whole = View::whole(&shape);
    record(device, shape, dtype, values, &parents, move |device, d_out, sink| {
        let wide = load(device)?;
        for (index, derivative) in expression.derivatives.iter().enumerate() {
            let (Some(derivative), true) = (derivative, sink.wants(index)) else { continue };
            let mut list: Vec<_> = wide.iter().zip(&views).map(|(values, view)| (values.view(), view)).collect();
            list.push((d_out.view(), &whole));
            let mut part = gradient(device, d_out.len())?;
            evaluate(device, op, derivative, &list, part.view_mut())?;
            sink.add(index, sum_to(device, op, part, &whole.shape, &shapes[index])?)?;
        }
        Ok(())
    })
}

/// The gradient of a tensor of shape `to` that was broadcast to `from`: each element sums its appearances.
fn sum_to(device: &Arc<Device>, op: &'static str, values: DeviceBuffer<f32>, from: &[usize], to: &[usize]) -> Result<DeviceBuffer<f32>> {
    let missing = from.len() - to.len();
    let is_repeated = |axis: usize| from[axis] != 1 && (axis < missing || to[axis - missing] == 1);
    let (mut values, mut shape, mut axis) = (values, from.to_vec(), from.len());
    while axis > 0 {
        axis -= 1;
        if !is_repeated(axis) {
            continue;
        }
        let end = axis + 1;
        while axis > 0 && is_repeated(axis - 1) {
            axis -= 1;
        }
        let around = Around::axes(&shape, axis..end);
        values = reduced(device, op, Reduction::SUM, values.view(), around)?;
        shape[axis..end].fill(1);
    }
    Ok(values)
}

/// The reduction of the middle of `[outer, axis, inter]`. Of no elements it is 0.
pub(in crate::tensor) fn reduced(
    device: &Arc<Device>,
    op: &'static str,
    reduction: Reduction,
    values: Elements<f32>,
    around: Around,
) -> Result<DeviceBuffer<f32>> {
    let mut out = activation(device, around.outer * around.inter)?;
    if values.is_empty() {
        out.view_mut().zero(device)?;
        return Ok(out);
    }
    if i32::try_from(around.axis.max(around.inter)).is_err() {
        return Err(too_large(op, &[around.outer, around.axis, around.inter]));
    }
    generic::reduce(device, op, reduction, values, around.axis, around.inter, out.view_mut())?;
    Ok(out)
}

/// The view of `[outer, inter]` as `[outer, axis, inter]`, each element repeated along the axis.
fn along_axis(around: Around) -> View {
    let Around { outer, axis, inter } = around;
    View { shape: vec![outer, axis, inter], strides: vec![inter as isize, 0, 1], offset: 0 }
}

/// The sum over the middle of `[outer, axis, inter]`, as a tensor of `shape`, f32 or bf16 as `x` is.
pub(in crate::tensor) fn sum(
    device: &Arc<Device>,
    op: &'static str,
    x: &AnyTensor,
    around: Around,
    shape: Vec<usize>,
) -> Result<AnyTensor> {
    let values = reduced(device, op, Reduction::SUM, Wide::of(device, x.data())?.view(), around)?;
    let len = x.len();
    record(device, shape, x.dtype(), values, &[x], move |device, d_out, sink| {
        let mut d_x = gradient(device, len)?;
        evaluate(device, op, "x0", &[(d_out.view(), &along_axis(around))], d_x.view_mut())?;
        sink.add(0, d_x)
    })
}

/// The largest or smallest over the middle of `[outer, axis, inter]`, as a tensor of `shape`; equal ones share the gradient.
pub(in crate::tensor) fn best(
    device: &Arc<Device>,
    op: &'static str,
    reduction: Reduction,
    x: &AnyTensor,
    around: Around,
    shape: Vec<usize>,
) -> Result<AnyTensor> {
    let saved = x.data().clone();
    let values = reduced(device, op, reduction, Wide::of(device, &saved)?.view(), around)?;
    let chosen = values.try_clone()?;
    let whole = View::whole(&[around.outer, around.axis, around.inter]);
    record(device, shape, x.dtype(), values, &[x], move |device, d_out, sink| {
        let x = Wide::of(device, &saved)?;
        let along = along_axis(around);
        let is_best = "x0 == x1 || (x0 != x0 && x1 != x1)";
        let mut hits = scratch(device, x.view().len())?;
        evaluate(device, op, &format!("{is_best} ? 1.0f : 0.0f"), &[(x.view(), &whole), (chosen.view(), &along)], hits.view_mut())?;
        let count = reduced(device, op, Reduction::SUM, hits.view(), around)?;
        let mut d_x = gradient(device, x.view().len())?;
        let operands = [(hits.view(), &whole), (count.view(), &along), (d_out.view(), &along)];
        evaluate(device, op, "x0 != 0.0f ? x2 / x1 : 0.0f", &operands, d_x.view_mut())?;
        sink.add(0, d_x)
    })
}

/// Whether [`viewed`] takes a view: its axes lie few enough ways.
pub(in crate::tensor) fn can_view(view: &View) -> bool {
    collapsed(&view.shape, &[&view.strides]).is_some()
}

/// The elements of `x`, f32, bf16 or i32, that `view` names. A view that names an element twice is a broadcast of all of `x`.
///
/// Errors: as [`evaluate`].
pub(in crate::tensor) fn viewed(device: &Arc<Device>, op: &'static str, x: &AnyTensor, view: View) -> Result<AnyTensor> {
    if let AnyData::I32(data) = x.data() {
        let mut out = activation::<i32>(device, view.shape.iter().product())?;
        evaluate(device, op, "x0", &[(data.cuda().view().cast(), &view)], out.view_mut().cast())?;
        return Ok(AnyTensor::from_parts(view.shape, i32::wrap(Data::on_device(out)), None));
    }
    let mut values = activation(device, view.shape.iter().product())?;
    evaluate(device, op, "x0", &[(Wide::of(device, x.data())?.view(), &view)], values.view_mut())?;
    let from = x.shape().to_vec();
    record(device, view.shape.clone(), x.dtype(), values, &[x], move |device, d_out, sink| {
        let repeats = view.shape.iter().zip(&view.strides).any(|(size, stride)| *size != 1 && *stride == 0);
        if repeats {
            return sink.add(0, sum_to(device, op, d_out, &view.shape, &from)?);
        }
        let mut d_x = gradient(device, from.iter().product())?;
        d_x.view_mut().zero(device)?;
        put(device, op, d_out.view(), &view, &mut d_x)?;
        sink.add(0, d_x)
    })
}

/// Writes `values` to the places of `view` in `out`.
fn put(device: &Arc<Device>, op: &'static str, values: Elements<f32>, view: &View, out: &mut DeviceBuffer<f32>) -> Result<()> {
    let (shape, strides) = collapsed(&view.shape, &[&view.strides]).ok_or_else(|| too_large(op, &view.shape))?;
    generic::scatter(device, op, values, &shape, view.offset, &strides[0], out.view_mut())
}

/// Rows of `x` by number, uploaded; and the way back: for each row of `x` the list of those that were taken from it.
pub(in crate::tensor) struct Rows {
    picked: DeviceBuffer<i32>,
    starts: DeviceBuffer<i32>,
    lists: DeviceBuffer<i32>,
    width: usize,
}

impl Rows {
    /// `rows`, each below `count`, of `width` elements each.
    ///
    /// Errors: [`Error::Unsupported`] if numbers of rows do not fit i32; those of the device.
    pub fn new(device: &Arc<Device>, op: &'static str, rows: &[usize], count: usize, width: usize) -> Result<Self> {
        if i32::try_from(count.max(rows.len())).is_err() {
            let what = format!("{op}: {} of {count} rows, on a GPU,", rows.len());
            return Err(Error::Unsupported { what, remedy: "take fewer than 2^31, or move the tensor with :to(\"cpu\")".into() });
        }
        let mut starts = vec![0; count + 1];
        rows.iter().for_each(|row| starts[row + 1] += 1);
        (0..count).for_each(|row| starts[row + 1] += starts[row]);
        let (mut next, mut lists) = (starts.clone(), vec![0; rows.len()]);
        for (at, row) in rows.iter().enumerate() {
            lists[next[*row] as usize] = at as i32;
            next[*row] += 1;
        }
        let picked: Vec<i32> = rows.iter().map(|row| *row as i32).collect();
        let upload = |values: &[i32]| DeviceBuffer::copy_of(device, "indices", values);
        Ok(Self { picked: upload(&picked)?, starts: upload(&starts)?, lists: upload(&lists)?, width })
    }

    /// Elements of 4 bytes, which are moved only.
    fn pick<T: Pod>(&self, device: &Arc<Device>, op: &'static str, from: Elements<T>) -> Result<DeviceBuffer<T>> {
        let mut out = activation::<T>(device, self.picked.len() * self.width)?;
        if !out.is_empty() {
            let (from, rows) = (from.cast(), from.len() / self.width);
            generic::select(device, op, from, rows, self.width, self.picked.view(), out.view_mut().cast())?;
        }
        Ok(out)
    }

    fn add_up(&self, device: &Arc<Device>, op: &'static str, rows: Elements<f32>) -> Result<DeviceBuffer<f32>> {
        let mut out = activation(device, (self.starts.len() - 1) * self.width)?;
        if !out.is_empty() {
            generic::sum_rows(device, op, rows, self.starts.view(), self.lists.view(), self.width, out.view_mut())?;
        }
        Ok(out)
    }

    /// The rows of `x`, f32, bf16 or i32, as a tensor of `shape`.
    pub fn taken(self, device: &Arc<Device>, op: &'static str, x: &AnyTensor, shape: Vec<usize>) -> Result<AnyTensor> {
        if let AnyData::I32(data) = x.data() {
            let out = self.pick(device, op, data.cuda().view())?;
            return Ok(AnyTensor::from_parts(shape, i32::wrap(Data::on_device(out)), None));
        }
        let values = self.pick(device, op, Wide::of(device, x.data())?.view())?;
        record(device, shape, x.dtype(), values, &[x], move |device, d_out, sink| sink.add(0, self.add_up(device, op, d_out.view())?))
    }

    /// The rows of `x` added up by their numbers, as a tensor of `shape`.
    pub fn added_up(self, device: &Arc<Device>, op: &'static str, x: &AnyTensor, shape: Vec<usize>) -> Result<AnyTensor> {
        let values = self.add_up(device, op, Wide::of(device, x.data())?.view())?;
        record(device, shape, x.dtype(), values, &[x], move |device, d_out, sink| sink.add(0, self.pick(device, op, d_out.view())?))
    }
}

/// `parts`, f32 or bf16, one after the other: each is `[outer, width]`, the result `[outer, sum of widths]` of `shape`.
pub(in crate::tensor) fn concat(
    device: &Arc<Device>,
    op: &'static str,
    parts: &[&AnyTensor],
    widths: &[usize],
    outer: usize,
    shape: Vec<usize>,
) -> Result<AnyTensor> {
    let row: usize = widths.iter().sum();
    let starts = widths.iter().scan(0, |next, width| Some(std::mem::replace(next, *next + width)));
    let view = |(start, width): (usize, &usize)| View { shape: vec![outer, *width], strides: vec![row as isize, 1], offset: start };
    let views: Vec<View> = starts.zip(widths).map(view).collect();
    let mut values = activation(device, outer * row)?;
    for (part, view) in parts.iter().zip(&views) {
        put(device, op, Wide::of(device, part.data())?.view(), view, &mut values)?;
    }
    record(device, shape, parts[0].dtype(), values, parts, move |device, d_out, sink| {
        for (index, view) in views.iter().enumerate() {
            if sink.wants(index) {
                let mut part = gradient(device, view.shape.iter().product())?;
                evaluate(device, op, "x0", &[(d_out.view(), view)], part.view_mut())?;
                sink.add(index, part)?;
            }
        }
        Ok(())
    })
}

/// Products of matrices `[m, k]` and `[k, n]`, one for each of `places`: numbers of the matrix of `a`, of `b`, and of the result.
pub(in crate::tensor) fn matmul(
    device: &Arc<Device>,
    (a, b): (&AnyTensor, &AnyTensor),
    (m, k, n): (usize, usize, usize),
    places: Vec<[usize; 3]>,
    shape: Vec<usize>,
) -> Result<AnyTensor> {
    let at = |size: usize, index: usize| index * size..(index + 1) * size;
    let (left, right) = (a.data().clone(), b.data().clone());
    let mut values = activation::<f32>(device, shape.iter().product())?;
    values.view_mut().zero(device)?;
    let (a_values, b_values) = (Wide::of(device, &left)?, Wide::of(device, &right)?);
    for [a, b, out] in &places {
        // The gradient of a linear layer's input is the product without a transpose.
        let weight = Weight { values: b_values.view().part(at(k * n, *b)), outputs: k, inputs: n };
        product::input_gradient(device, values.part_mut(at(m * n, *out)), a_values.view().part(at(m * k, *a)), weight, false, None)?;
    }
    let lens = [a.len(), b.len()];
    record(device, shape, a.dtype(), values, &[a, b], move |device, d_out, sink| {
        let (a_values, b_values) = (Wide::of(device, &left)?, Wide::of(device, &right)?);
        if sink.wants(0) {
            let mut d_a = gradient::<f32>(device, lens[0])?;
            d_a.view_mut().zero(device)?;
            for [a, b, out] in &places {
                let weight = Weight { values: b_values.view().part(at(k * n, *b)), outputs: k, inputs: n };
                let (d_a, d_out) = (d_a.part_mut(at(m * k, *a)), d_out.part(at(m * n, *out)));
                product::forward(device, d_a, d_out, weight, None, Residual::Own, None)?;
            }
            sink.add(0, d_a)?;
        }
        if sink.wants(1) {
            let mut d_b = gradient::<f32>(device, lens[1])?;
            d_b.view_mut().zero(device)?;
            for [a, b, out] in &places {
                let (d_b, a, d_out) = (d_b.part_mut(at(k * n, *b)), a_values.view().part(at(m * k, *a)), d_out.part(at(m * n, *out)));
                product::weight_gradient(device, d_b, a, d_out, (k, n), true, None)?;
            }
            sink.add(1, d_b)?;
        }
        Ok(())
    })
}

/// bf16 as f32, or f32 rounded to bf16; still in the graph.
pub(in crate::tensor) fn convert(device: &Arc<Device>, x: &AnyTensor, dtype: Dtype) -> Result<AnyTensor> {
    let values = match Wide::of(device, x.data())? {
        Wide::Own(values) => values,
        Wide::Shared(data) => data.cuda().try_clone()?,
    };
    record(device, x.shape().to_vec(), dtype, values, &[x], |_, d_out, sink| sink.add(0, d_out))
}

/// A tensor of no axes.
pub(in crate::tensor) fn scalar(device: &Arc<Device>, value: f32) -> Result<AnyTensor> {
    let data = Data::at_place(Array::Cuda(DeviceBuffer::copy_of(device, "scalars", &[value])?));
    Ok(AnyTensor::from_parts(Vec::new(), f32::wrap(data), None))
}
