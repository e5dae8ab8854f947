//! The same elements in another arrangement: reshape, squeeze, permute, slice, select, flip, broadcast_to. Any element
//! type; float tensors stay in the graph. Plain loops over a view (offset and strides) of ours, for dfdx wants axes and
//! ranks that are known when it is compiled. Reshapes share the elements; the others copy.

use super::any::AnyTensor;
use super::cuda::generic as cuda;
use super::operation::{map_elements, record, through_host};
use super::shape::{View, axis_index, axis_indices, broadcast_shape, elements_of, room_for, strides_of};
use crate::error::{Error, Result};
use crate::kernels::element::Dtype;

/// The elements that `view` names; those of i8 on a device, and views along more axes than kernels take, come to the host for it.
fn viewed(op: &'static str, x: &AnyTensor, view: View) -> Result<AnyTensor> {
    match (x.device(), x.dtype()) {
        (None, _) => Ok(viewed_on_host(x, view)),
        (Some(_), dtype) if dtype == Dtype::I8 || !cuda::can_view(&view) => through_host([x], |[x]| Ok(viewed_on_host(x, view))),
        (Some(device), _) => cuda::viewed(device, op, x, view),
    }
}

fn viewed_on_host(x: &AnyTensor, view: View) -> AnyTensor {
    let data = map_elements!(x.data(), values => view.read(values));
    let len = x.len();
    record(view.shape.clone(), data, &[x], move |gradient, sink| {
        sink.add(0, view.scatter_add(gradient, len));
        Ok(())
    })
}

/// The same elements in row-major order under another shape; one size may be -1 and is then found from the others.
///
/// Errors: [`Error::Shape`] if the numbers of elements differ; [`Error::Argument`] for a negative size, or a -1 that the
/// others do not determine.
pub fn reshape(x: &AnyTensor, shape: &[isize]) -> Result<AnyTensor> {
    let wrong = |expected: &str| Err(Error::argument("reshape", "shape", expected, format!("{shape:?} for {} elements", x.len())));
    if shape.iter().any(|size| *size < -1) || shape.iter().filter(|size| **size == -1).count() > 1 {
        return wrong("sizes from 0, at most one of them -1");
    }
    let known = shape.iter().filter(|size| **size >= 0).try_fold(1usize, |product, size| product.checked_mul(*size as usize));
    let Some(known) = known else { return wrong("a number of elements that fits memory") };
    let open = shape.contains(&-1);
    if open && (known == 0 || !x.len().is_multiple_of(known)) {
        return wrong("sizes that divide the number of elements and leave one value for the -1");
    }
    let sizes: Vec<usize> = shape.iter().map(|size| if *size < 0 { x.len() / known } else { *size as usize }).collect();
    if !open && known != x.len() {
        return Err(Error::Shape {
            op: "reshape",
            arg: "shape",
            expected: format!("of {} elements, as {:?}", x.len(), x.shape()),
            got: format!("{sizes:?}"),
        });
    }
    elements_of("reshape", &sizes)?;
    Ok(x.with_shape(sizes))
}

/// Without its axes of size 1, or without the one `axis`, which must have size 1.
///
/// Errors: [`Error::Argument`] if there is no such axis; [`Error::Shape`] if its size is not 1.
pub fn squeeze(x: &AnyTensor, axis: Option<isize>) -> Result<AnyTensor> {
    let Some(axis) = axis else {
        return Ok(x.with_shape(x.shape().iter().copied().filter(|size| *size != 1).collect()));
    };
    let axis = axis_index("squeeze", axis, x.rank())?;
    let mut shape = x.shape().to_vec();
    if shape.remove(axis) != 1 {
        return Err(Error::Shape {
            op: "squeeze",
            arg: "x",
            expected: format!("of size 1 at axis {axis}"),
            got: format!("{:?}", x.shape()),
        });
    }
    Ok(x.with_shape(shape))
}

/// With an axis of size 1 put in before `axis`; -1 puts it last.
///
/// Errors: [`Error::Argument`] if the result has no such axis.
pub fn unsqueeze(x: &AnyTensor, axis: isize) -> Result<AnyTensor> {
    let axis = axis_index("unsqueeze", axis, x.rank() + 1)?;
    let mut shape = x.shape().to_vec();
    shape.insert(axis, 1);
    Ok(x.with_shape(shape))
}

/// With axis `axes[i]` of `x` as axis i.
///
/// Errors: [`Error::Argument`] if `axes` does not name each axis once.
pub fn permute(x: &AnyTensor, axes: &[isize]) -> Result<AnyTensor> {
    if axis_indices("permute", axes, x.rank())?.len() != x.rank() {
        return Err(Error::argument("permute", "axes", format!("each of the {} axes once", x.rank()), format!("{axes:?}")));
    }
    let strides = strides_of(x.shape());
    let order = axes.iter().map(|axis| axis_index("permute", *axis, x.rank())).collect::<Result<Vec<_>>>()?;
    let view = View {
        shape: order.iter().map(|axis| x.shape()[*axis]).collect(),
        strides: order.iter().map(|axis| strides[*axis]).collect(),
        offset: 0,
    };
    viewed("permute", x, view)
}

/// With two axes exchanged.
///
/// Errors: [`Error::Argument`] if there is no such axis.
pub fn transpose(x: &AnyTensor, first: isize, second: isize) -> Result<AnyTensor> {
    let (first, second) = (axis_index("transpose", first, x.rank())?, axis_index("transpose", second, x.rank())?);
    let mut order: Vec<isize> = (0..x.rank() as isize).collect();
    order.swap(first, second);
    permute(x, &order)
}

/// The elements `start`, `start + step`, ... below `stop` of one axis. Negative `start` and `stop` count from the end;
/// both are cut to the axis, as numpy does. `stop` absent means to the end.
///
/// Errors: [`Error::Argument`] if there is no such axis or `step` is 0.
pub fn slice(x: &AnyTensor, axis: isize, start: isize, stop: Option<isize>, step: usize) -> Result<AnyTensor> {
    let axis = axis_index("slice", axis, x.rank())?;
    if step == 0 {
        return Err(Error::argument("slice", "step", "at least 1", step));
    }
    let size = x.shape()[axis] as isize;
    let cut = |place: isize| (if place < 0 { place.saturating_add(size) } else { place }).clamp(0, size) as usize;
    let (start, stop) = (cut(start), cut(stop.unwrap_or(size)));
    let mut view = View::whole(x.shape());
    view.shape[axis] = stop.saturating_sub(start).div_ceil(step);
    if view.shape[axis] > 0 {
        view.offset = start * view.strides[axis] as usize;
    }
    // One element or none is never stepped over, so that a huge step cannot overflow.
    view.strides[axis] *= if view.shape[axis] > 1 { step as isize } else { 1 };
    viewed("slice", x, view)
}

/// The elements at `index` of one axis, which is then gone; a negative index counts from the end.
///
/// Errors: [`Error::Argument`] if there is no such axis or index.
pub fn select(x: &AnyTensor, axis: isize, index: isize) -> Result<AnyTensor> {
    let axis = axis_index("select", axis, x.rank())?;
    let size = x.shape()[axis] as isize;
    if index < -size || index >= size {
        return Err(Error::argument("select", "index", format!("from {} to {} for {:?}", -size, size - 1, x.shape()), index));
    }
    let mut view = View::whole(x.shape());
    view.shape.remove(axis);
    view.offset = view.strides.remove(axis) as usize * (if index < 0 { index + size } else { index }) as usize;
    viewed("select", x, view)
}

/// With the elements of the given axes in opposite order.
///
/// Errors: [`Error::Argument`] if there is no such axis or one is named twice.
pub fn flip(x: &AnyTensor, axes: &[isize]) -> Result<AnyTensor> {
    let mut view = View::whole(x.shape());
    for axis in axis_indices("flip", axes, x.rank())? {
        if x.shape()[axis] > 1 {
            view.offset += (x.shape()[axis] - 1) * view.strides[axis] as usize;
            view.strides[axis] = -view.strides[axis];
        }
    }
    viewed("flip", x, view)
}

/// Repeated along axes of size 1 and along new leading axes, to `shape`. The gradient sums over the repetitions.
///
/// Errors: [`Error::Shape`] if `x` does not broadcast to `shape`.
pub fn broadcast_to(x: &AnyTensor, shape: &[usize]) -> Result<AnyTensor> {
    let fits = x.rank() <= shape.len() && broadcast_shape("broadcast_to", "shape", x.shape(), shape)? == shape;
    if !fits {
        return Err(Error::Shape {
            op: "broadcast_to",
            arg: "shape",
            expected: format!("one that {:?} broadcasts to", x.shape()),
            got: format!("{shape:?}"),
        });
    }
    room_for("broadcast_to", shape)?;
    viewed("broadcast_to", x, View::broadcast(x.shape(), shape))
}

#[cfg(test)]
mod tests {
    use super::super::gradient_check::{check, integers, numbers, tensor};
    use super::*;

    #[test]
    fn values_and_gradients_agree_with_loops() {
        let x = || [numbers(&[2, 3, 5])];
        let at = |x: &[Vec<f64>], i: usize, j: usize, k: usize| x[0][(i * 3 + j) * 5 + k];
        let turned = |x: &[Vec<f64>]| (0..30).map(|n| at(x, n / 3 % 2, n % 3, n / 6)).collect();
        check("permute", &x(), |x| permute(&x[0], &[2, 0, -2]), turned);
        check("transpose", &x(), |x| transpose(&x[0], 0, 2), |x| (0..30).map(|n| at(x, n % 2, n / 2 % 3, n / 6)).collect());
        check("slice", &x(), |x| slice(&x[0], 2, 1, Some(-1), 2), |x| (0..12).map(|n| at(x, n / 6, n / 2 % 3, 1 + n % 2 * 2)).collect());
        check("select", &x(), |x| select(&x[0], 1, -1), |x| (0..10).map(|n| at(x, n / 5, 2, n % 5)).collect());
        check("flip", &x(), |x| flip(&x[0], &[2, 0]), |x| (0..30).map(|n| at(x, 1 - n / 15, n / 5 % 3, 4 - n % 5)).collect());
        check("reshape", &x(), |x| reshape(&x[0], &[-1, 6]), |x| x[0].clone());
        let wide = |x: &[Vec<f64>]| (0..24).map(|n| x[0][n / 4 % 3]).collect();
        check("broadcast_to", &[numbers(&[3, 1])], |x| broadcast_to(&x[0], &[2, 3, 4]), wide);
    }

    #[test]
    fn integers_and_empty_tensors_move_too() {
        let x = integers(&[2, 2], &[1, 2, 3, (1 << 24) + 1]);
        let turned = transpose(&x, 0, 1).unwrap();
        assert_eq!(super::super::operation::indices("", "", &turned, &turned).unwrap()[..], [1, 3, 2, (1 << 24) + 1]);
        let none = tensor(&[2, 0, 3], &[]);
        assert_eq!(permute(&none, &[1, 2, 0]).unwrap().shape(), [0, 3, 2]);
        assert_eq!(slice(&none, 0, 1, None, 1).unwrap().shape(), [1, 0, 3]);
        assert_eq!(select(&none, 2, 1).unwrap().shape(), [2, 0]);
        assert_eq!(flip(&none, &[0, 1, 2]).unwrap().shape(), [2, 0, 3]);
        assert_eq!(reshape(&none, &[0, 7]).unwrap().shape(), [0, 7]);
        assert_eq!(broadcast_to(&tensor(&[1], &[1.]), &[0]).unwrap().shape(), [0]);
        assert_eq!(slice(&numbers(&[3]), 0, 2, Some(1), 1).unwrap().shape(), [0]);
        assert_eq!(slice(&numbers(&[3]), 0, -9, Some(9), usize::MAX).unwrap().shape(), [1]);
        assert_eq!(slice(&numbers(&[3]), 0, isize::MIN, Some(isize::MAX), 1).unwrap().shape(), [3]);
        assert_eq!(squeeze(&numbers(&[1, 3, 1]), None).unwrap().shape(), [3]);
        assert_eq!(unsqueeze(&numbers(&[]), 0).unwrap().shape(), [1]);
    }

    #[test]
    fn wrong_arguments_are_named() {
        let x = numbers(&[2, 3]);
        for (wrong, part) in [
            (reshape(&x, &[4]), "of 6 elements"),
            (reshape(&x, &[-1, -1]), "at most one"),
            (reshape(&x, &[-1, 4]), "divide"),
            (reshape(&tensor(&[0], &[]), &[-1, 0]), "leave one value"),
            (reshape(&x, &[isize::MAX, isize::MAX]), "fits memory"),
            (permute(&x, &[0]), "each of the 2 axes once"),
            (permute(&x, &[0, 0]), "differ"),
            (select(&x, 1, 3), "from -3 to 2"),
            (slice(&x, 0, 0, None, 0), "at least 1"),
            (slice(&x, 2, 0, None, 1), "from -2 to 1"),
            (squeeze(&x, Some(1)), "of size 1"),
            (broadcast_to(&x, &[3]), "[2, 3] broadcasts to"),
            (broadcast_to(&x, &[2, 2]), "broadcast"),
        ] {
            let told = wrong.unwrap_err().to_string();
            assert!(told.contains(part), "{told}");
        }
    }
}
