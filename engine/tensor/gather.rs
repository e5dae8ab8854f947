//! Elements chosen by an i32 tensor of indices: gather and index_select; rows added up by such a tensor: segment_sum; and
//! parts put together: concat and stack.
//! Any element type; float tensors stay in the graph. Plain loops of ours: dfdx gathers only along axes known when it is
//! compiled, and concatenates two tensors at a time, which must differ. Indices count from 0; none may be negative. Those on
//! a device are fetched, since the host checks them.

use super::any::{AnyData, AnyTensor, TensorElement};
use super::cuda::generic::{self as cuda, Rows};
use super::index::unsqueeze;
use super::operation::{as_f32, indices, map_elements, record, record_float, require_float, require_same, through_host};
use super::shape::{Around, axis_index, room_for};
use super::typed::Data;
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use crate::kernels::cuda::device::Device;
use crate::kernels::element::{Dtype, Element};
use std::sync::Arc;

/// The rows of `x`, seen as `[any, width]`, that `rows` names; each may appear any number of times.
fn taken(op: &'static str, x: &AnyTensor, shape: Vec<usize>, rows: Vec<usize>, width: usize) -> Result<AnyTensor> {
    fn read<E: Element>(values: &[E], rows: &[usize], width: usize) -> Buffer<E> {
        let mut out = Buffer::scratch(rows.len() * width);
        out.chunks_exact_mut(width.max(1)).zip(rows).for_each(|(out, row)| out.copy_from_slice(&values[row * width..][..width]));
        out
    }
    match (x.device(), x.dtype()) {
        (Some(_), Dtype::I8) => return through_host([x], |[x]| taken(op, x, shape, rows, width)),
        (Some(device), _) => {
            return Rows::new(device, op, &rows, x.len() / width.max(1), width)?.taken(device, op, x, shape);
        }
        (None, _) => {}
    }
    let data = map_elements!(x.data(), values => read(values, &rows, width));
    let len = x.len();
    Ok(record(shape, data, &[x], move |gradient, sink| {
        sink.add(0, added_up(gradient, &rows, width, len));
        Ok(())
    }))
}

/// `len` elements seen as `[any, width]`, of which row `rows[i]` gains row i of `values`; in f64, rounded once.
fn added_up(values: &[f32], rows: &[usize], width: usize, len: usize) -> Buffer<f32> {
    let mut sums = vec![0f64; len];
    for (row, values) in rows.iter().zip(values.chunks_exact(width.max(1))) {
        sums[row * width..][..width].iter_mut().zip(values).for_each(|(sum, value)| *sum += f64::from(*value));
    }
    let mut out = Buffer::scratch(len);
    out.iter_mut().zip(&sums).for_each(|(out, sum)| *out = *sum as f32);
    out
}

fn check_index(op: &'static str, index: i32, size: usize) -> Result<usize> {
    usize::try_from(index)
        .ok()
        .filter(|place| *place < size)
        .ok_or_else(|| Error::argument(op, "index", format!("from 0 to below {size}, the size of the axis"), index))
}

/// One element along `axis` for each element of `index`: out[i, j, k] = x[i, index[i, j, k], k] for axis 1. Repeated
/// indices add up in the gradient.
///
/// - `x`: any element type
/// - `index`: i32, of the rank of `x`, and of its sizes but at `axis`
/// - returns the shape of `index`
///
/// Errors: [`Error::Dtype`] if `index` is not i32; [`Error::Shape`] if its shape does not fit; [`Error::Argument`] if
/// there is no such axis, or an index is outside it.
pub fn gather(x: &AnyTensor, axis: isize, index: &AnyTensor) -> Result<AnyTensor> {
    let axis = axis_index("gather", axis, x.rank())?;
    let places = indices("gather", "index", x, index)?;
    let fits = index.rank() == x.rank() && (0..x.rank()).all(|i| i == axis || index.shape()[i] == x.shape()[i]);
    if !fits {
        return Err(Error::Shape {
            op: "gather",
            arg: "index",
            expected: format!("as {:?} but at axis {axis}", x.shape()),
            got: format!("{:?}", index.shape()),
        });
    }
    let (from, to) = (Around::axis(x.shape(), axis), Around::axis(index.shape(), axis));
    let mut source = Vec::with_capacity(places.len());
    for (at, index) in places.iter().enumerate() {
        let (outer, inter) = (at / (to.axis * to.inter), at % to.inter);
        source.push((outer * from.axis + check_index("gather", *index, from.axis)?) * from.inter + inter);
    }
    taken("gather", x, index.shape().to_vec(), source, 1)
}

/// The parts of `x` along `axis` that `index` names, in its order, with repetitions.
///
/// - `x`: any element type
/// - `index`: `[count]` or rank 0, i32
/// - returns the shape of `x` with `count` at `axis`, or without the axis if `index` has rank 0
///
/// Errors: [`Error::Dtype`] if `index` is not i32; [`Error::Shape`] if its rank is above 1; [`Error::Argument`] if there
/// is no such axis, or an index is outside it.
pub fn index_select(x: &AnyTensor, axis: isize, index: &AnyTensor) -> Result<AnyTensor> {
    let axis = axis_index("index_select", axis, x.rank())?;
    let places = indices("index_select", "index", x, index)?;
    if index.rank() > 1 {
        return Err(Error::Shape {
            op: "index_select",
            arg: "index",
            expected: "of rank 0 or 1".into(),
            got: format!("{:?}", index.shape()),
        });
    }
    let around = Around::axis(x.shape(), axis);
    let places = places.iter().map(|place| check_index("index_select", *place, around.axis)).collect::<Result<Vec<_>>>()?;
    let mut shape = x.shape().to_vec();
    shape.splice(axis..axis + 1, index.shape().iter().copied());
    let len = room_for("index_select", &shape)?;
    let outers = if len == 0 { 0 } else { around.outer };
    let rows = (0..outers).flat_map(|outer| places.iter().map(move |place| outer * around.axis + place));
    taken("index_select", x, shape, rows.collect(), around.inter)
}

/// The rows of `x` added up by number: out[s] is the sum of x[i] over all i with ids[i] = s, in the order of i, in f64 and
/// rounded once. A number without a row gives zeros. The gradient of a row is that of its sum.
///
/// - `x`: `[rows, ...]`, f32 or bf16
/// - `ids`: `[rows]`, i32, from 0 to below `count`
/// - returns `[count, ...]`, of the element type of `x`
///
/// Errors: [`Error::Dtype`]; [`Error::Shape`] if `x` has rank 0, or `ids` is not one number a row; [`Error::Argument`] for
/// a number outside the range.
pub fn segment_sum(x: &AnyTensor, ids: &AnyTensor, count: usize) -> Result<AnyTensor> {
    let op = "segment_sum";
    let dtype = require_float(op, "x", x)?;
    let segments = indices(op, "ids", x, ids)?;
    let Some(rows) = x.shape().first().copied() else {
        return Err(Error::Shape { op, arg: "x", expected: "[rows, ...]".into(), got: "rank 0".into() });
    };
    if ids.shape() != [rows] {
        return Err(Error::Shape { op, arg: "ids", expected: format!("[{rows}], one a row of x"), got: format!("{:?}", ids.shape()) });
    }
    let place = |id: &i32| usize::try_from(*id).ok().filter(|place| *place < count);
    let wrong = |id: &i32| Error::argument(op, "ids", format!("from 0 to below {count}, the count"), id);
    let places = segments.iter().map(|id| place(id).ok_or_else(|| wrong(id))).collect::<Result<Vec<_>>>()?;
    let mut shape = x.shape().to_vec();
    shape[0] = count;
    let (len, width) = (room_for(op, &shape)?, x.shape()[1..].iter().product::<usize>());
    if let Some(device) = x.device() {
        return Rows::new(device, op, &places, count, width)?.added_up(device, op, x, shape);
    }
    let out = added_up(&as_f32(x.data()), &places, width, len);
    Ok(record_float(shape, dtype, out, &[x], move |gradient, sink| {
        let mut rows = Buffer::scratch(places.len() * width);
        for (row, place) in rows.chunks_exact_mut(width.max(1)).zip(&places) {
            row.copy_from_slice(&gradient[place * width..][..width]);
        }
        sink.add(0, rows);
        Ok(())
    }))
}

/// The tensors one after the other along `axis`. A tensor may appear more than once.
///
/// - `parts`: at least one, of one element type and of one shape but at `axis`
///
/// Errors: [`Error::Argument`] if there is none or no such axis; [`Error::Dtype`], [`Error::Shape`] if they do not fit.
pub fn concat(parts: &[AnyTensor], axis: isize) -> Result<AnyTensor> {
    let Some(first) = parts.first() else {
        return Err(Error::argument("concat", "parts", "at least one tensor", "none"));
    };
    let axis = axis_index("concat", axis, first.rank())?;
    let mut shape = first.shape().to_vec();
    shape[axis] = 0;
    for part in parts {
        require_same("concat", "parts", first, part)?;
        let fits = part.rank() == first.rank() && (0..part.rank()).all(|i| i == axis || part.shape()[i] == first.shape()[i]);
        if !fits {
            return Err(Error::Shape {
                op: "concat",
                arg: "parts",
                expected: format!("as {:?} but at axis {axis}", first.shape()),
                got: format!("{:?}", part.shape()),
            });
        }
        shape[axis] += part.shape()[axis];
    }
    let len = room_for("concat", &shape)?;
    if let Some(device) = first.device() {
        return concat_on_device(device, parts, axis, shape);
    }
    let mut around = Around::axis(&shape, axis);
    if len == 0 {
        around.outer = 0; // However many rows of nothing there are.
    }
    let widths: Vec<usize> = parts.iter().map(|part| part.shape()[axis] * around.inter).collect();
    fn join<E: TensorElement>(parts: &[AnyTensor], widths: &[usize], outer: usize, len: usize) -> AnyData {
        let mut out = Buffer::<E>::scratch(len);
        let mut next = 0;
        for row in 0..outer {
            for (part, width) in parts.iter().zip(widths) {
                let values = E::unwrap(part.data()).expect("the types were compared").get();
                out[next..next + width].copy_from_slice(&values[row * width..(row + 1) * width]);
                next += width;
            }
        }
        E::wrap(Data::ready(out))
    }
    let data = match first.data() {
        AnyData::F32(_) => join::<f32>(parts, &widths, around.outer, len),
        AnyData::Bf16(_) => join::<half::bf16>(parts, &widths, around.outer, len),
        AnyData::I32(_) => join::<i32>(parts, &widths, around.outer, len),
        AnyData::I8(_) => join::<i8>(parts, &widths, around.outer, len),
    };
    let parents: Vec<&AnyTensor> = parts.iter().collect();
    Ok(record(shape, data, &parents, move |gradient, sink| {
        let row_len: usize = widths.iter().sum();
        let mut start = 0;
        for (index, width) in widths.iter().enumerate() {
            if sink.wants(index) {
                let mut part = Buffer::scratch(around.outer * width);
                for row in 0..around.outer {
                    let from = row * row_len + start;
                    part[row * width..(row + 1) * width].copy_from_slice(&gradient[from..from + width]);
                }
                sink.add(index, part);
            }
            start += width;
        }
        Ok(())
    }))
}

/// Integers, and parts without elements, come to the host for it.
fn concat_on_device(device: &Arc<Device>, parts: &[AnyTensor], axis: usize, shape: Vec<usize>) -> Result<AnyTensor> {
    if matches!(parts[0].dtype(), Dtype::I32 | Dtype::I8) || shape.contains(&0) {
        let copies = parts.iter().map(AnyTensor::on_host).collect::<Result<Vec<_>>>()?;
        return concat(&copies, axis as isize)?.to_place(&parts[0].place());
    }
    let around = Around::axis(&shape, axis);
    let widths: Vec<usize> = parts.iter().map(|part| part.shape()[axis] * around.inter).collect();
    let parts: Vec<&AnyTensor> = parts.iter().collect();
    cuda::concat(device, "concat", &parts, &widths, around.outer, shape)
}

/// The tensors along a new axis put in before `axis`; -1 puts it last.
///
/// - `parts`: at least one, of one element type and one shape
///
/// Errors: as [`concat`].
pub fn stack(parts: &[AnyTensor], axis: isize) -> Result<AnyTensor> {
    let Some(first) = parts.first() else {
        return Err(Error::argument("stack", "parts", "at least one tensor", "none"));
    };
    if let Some(other) = parts.iter().find(|part| part.shape() != first.shape()) {
        return Err(Error::Shape {
            op: "stack",
            arg: "parts",
            expected: format!("{:?}", first.shape()),
            got: format!("{:?}", other.shape()),
        });
    }
    let axis = axis_index("stack", axis, first.rank() + 1)? as isize;
    let parts = parts.iter().map(|part| unsqueeze(part, axis)).collect::<Result<Vec<_>>>()?;
    concat(&parts, axis)
}

#[cfg(test)]
mod tests {
    use super::super::gradient_check::{backward_with, check, integers, numbers, tensor};
    use super::*;

    #[test]
    fn values_and_gradients_agree_with_loops() {
        let index = integers(&[2, 2, 3], &[3, 0, 1, 3, 3, 1, 0, 0, 0, 2, 1, 0]);
        let places = [3, 0, 1, 3, 3, 1, 0, 0, 0, 2, 1, 0];
        check(
            "gather",
            &[numbers(&[2, 4, 3])],
            |x| gather(&x[0], 1, &index),
            |x| (0..12).map(|n| x[0][(n / 6 * 4 + places[n]) * 3 + n % 3]).collect(),
        );
        let rows = integers(&[3], &[1, 0, 1]);
        check(
            "index_select",
            &[numbers(&[2, 2, 3])],
            |x| index_select(&x[0], -2, &rows),
            |x| (0..18).map(|n| x[0][(n / 9 * 2 + [1, 0, 1][n / 3 % 3]) * 3 + n % 3]).collect(),
        );
        let (segments, owner) = (integers(&[5], &[2, 0, 2, 3, 2]), [2, 0, 2, 3, 2]);
        let by_segment = |x: &[f64], width: usize| -> Vec<f64> {
            (0..4 * width).map(|n| (0..5).filter(|row| owner[*row] == n / width).map(|row| x[row * width + n % width]).sum()).collect()
        };
        check("segment_sum", &[numbers(&[5])], |x| segment_sum(&x[0], &segments, 4), |x| by_segment(&x[0], 1));
        check("segment_sum", &[numbers(&[5, 2, 3])], |x| segment_sum(&x[0], &segments, 4), |x| by_segment(&x[0], 6));
        check(
            "concat",
            &[numbers(&[2, 1, 3]), numbers(&[2, 2, 3])],
            |x| concat(x, 1),
            |x| {
                (0..18)
                    .map(|n| if n / 3 % 3 == 0 { x[0][n / 9 * 3 + n % 3] } else { x[1][(n / 9 * 2 + n / 3 % 3 - 1) * 3 + n % 3] })
                    .collect()
            },
        );
        check("stack", &[numbers(&[3]), exp_of(&numbers(&[3]))], |x| stack(x, -1), |x| (0..6).map(|n| x[n % 2][n / 2]).collect());
    }

    fn exp_of(x: &AnyTensor) -> AnyTensor {
        super::super::elementwise::exp(x).unwrap()
    }

    #[test]
    fn a_tensor_joins_itself_and_nothing() {
        let x = tensor(&[1, 2], &[1., 2.]).leaf().unwrap();
        let y = concat(&[x.clone(), tensor(&[0, 2], &[]), x.clone()], 0).unwrap();
        assert_eq!((y.shape(), y.to_f32_vec()), (&[2, 2][..], vec![1., 2., 1., 2.]));
        backward_with(&y, &[1., 10., 100., 1000.]).unwrap();
        assert_eq!(x.gradient().unwrap().unwrap().to_f32_vec(), [101., 1010.]);
        assert_eq!(concat(&[tensor(&[0], &[]), tensor(&[0], &[])], 0).unwrap().shape(), [0]);
        assert_eq!(index_select(&numbers(&[2, 3]), 0, &integers(&[0], &[])).unwrap().shape(), [0, 3]);
        assert_eq!(index_select(&numbers(&[2, 3]), 1, &integers(&[], &[2])).unwrap().shape(), [2]);
        assert_eq!(gather(&numbers(&[2, 3]), 1, &integers(&[2, 0], &[])).unwrap().shape(), [2, 0]);
        assert_eq!(segment_sum(&tensor(&[0], &[]), &integers(&[0], &[]), 2).unwrap().to_f32_vec(), [0., 0.]);
        assert_eq!(segment_sum(&tensor(&[2, 0], &[]), &integers(&[2], &[0, 0]), 3).unwrap().shape(), [3, 0]);
        // 1 is lost in one f32 chain: it is half a unit of the last place of 2^24.
        assert_eq!(segment_sum(&tensor(&[3], &[16777216., 1., 1.]), &integers(&[3], &[0; 3]), 1).unwrap().to_f32_vec(), [16777218.]);
    }

    #[test]
    fn wrong_operands_are_named() {
        let x = numbers(&[2, 3]);
        for (wrong, part) in [
            (gather(&x, 1, &numbers(&[2, 1])), "should be i32"),
            (gather(&x, 1, &integers(&[2, 1], &[0, 3])), "below 3"),
            (gather(&x, 1, &integers(&[2, 1], &[0, -1])), "got -1"),
            (gather(&x, 1, &integers(&[1, 1], &[0])), "but at axis 1"),
            (gather(&numbers(&[]), 0, &integers(&[], &[0])), "rank 0"),
            (index_select(&x, 0, &integers(&[1], &[2])), "below 2"),
            (index_select(&x, 0, &integers(&[1, 1], &[0])), "rank 0 or 1"),
            (segment_sum(&x, &numbers(&[2]), 2), "should be i32"),
            (segment_sum(&x, &integers(&[3], &[0; 3]), 2), "[2], one a row"),
            (segment_sum(&x, &integers(&[2], &[0, 2]), 2), "below 2"),
            (segment_sum(&x, &integers(&[2], &[0, -1]), 2), "got -1"),
            (segment_sum(&integers(&[2], &[0, 1]), &integers(&[2], &[0, 1]), 2), "f32"),
            (segment_sum(&numbers(&[]), &integers(&[0], &[]), 2), "rank 0"),
            (concat(&[], 0), "at least one"),
            (concat(&[x.clone(), integers(&[1, 3], &[0; 3])], 0), "should be f32"),
            (concat(&[x.clone(), numbers(&[2, 2])], 0), "but at axis 0"),
            (stack(&[x.clone(), numbers(&[3, 2])], 0), "[2, 3]"),
            (stack(&[], 0), "at least one"),
        ] {
            let told = wrong.unwrap_err().to_string();
            assert!(told.contains(part), "{told}");
        }
    }
}
