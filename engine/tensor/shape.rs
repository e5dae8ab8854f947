//! Axes, broadcasting and views: where each element of a result comes from. Pure arithmetic on sizes and strides, no
//! mathematics of its own. Axes count from 0; negative ones count from the end.

use super::typed::count;
use crate::error::{Error, Result};
use crate::kernels::available_memory::fits;
use crate::kernels::buffer::Buffer;
use crate::kernels::element::Element;

/// Above this many bytes a result is tried for size before it is made.
const LARGE_BYTES: usize = 1 << 30;

/// Number of elements of `shape`. Its sizes may be multiplied in any grouping, also those beside a 0.
///
/// Errors: [`Error::Shape`] if a product does not fit a usize.
pub(super) fn elements_of(op: &'static str, shape: &[usize]) -> Result<usize> {
    count(op, &shape.iter().map(|size| (*size).max(1)).collect::<Vec<_>>())?;
    count(op, shape)
}

/// As [`elements_of`], if the machine has the memory for them.
///
/// Errors: [`Error::Shape`] if not.
pub(super) fn room_for(op: &'static str, shape: &[usize]) -> Result<usize> {
    let elements = elements_of(op, shape)?;
    let bytes = elements.saturating_mul(4);
    if bytes > LARGE_BYTES && !fits(bytes as u64) {
        return Err(Error::Shape {
            op,
            arg: "shape",
            expected: "a number of elements that fits memory".into(),
            got: format!("{shape:?}, {} GiB", bytes >> 30),
        });
    }
    Ok(elements)
}

/// `axis` as an index into `rank` axes.
///
/// Errors: [`Error::Argument`] if there is no such axis.
pub(super) fn axis_index(op: &'static str, axis: isize, rank: usize) -> Result<usize> {
    let signed = rank as isize;
    if axis < -signed || axis >= signed {
        let expected = match rank {
            0 => "absent: the tensor has rank 0 and no axis".into(),
            _ => format!("from {} to {} for a tensor of rank {rank}", -signed, rank - 1),
        };
        return Err(Error::argument(op, "axis", expected, axis));
    }
    Ok(if axis < 0 { axis + signed } else { axis } as usize)
}

/// As [`axis_index`] for several axes, in ascending order.
///
/// Errors: [`Error::Argument`] also if an axis is named twice.
pub(super) fn axis_indices(op: &'static str, axes: &[isize], rank: usize) -> Result<Vec<usize>> {
    let mut indices = axes.iter().map(|axis| axis_index(op, *axis, rank)).collect::<Result<Vec<_>>>()?;
    indices.sort_unstable();
    if indices.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(Error::argument(op, "axes", "axes that differ", format!("{axes:?}")));
    }
    Ok(indices)
}

/// A shape of any rank around one axis: `[outer, axis, inter]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Around {
    pub(super) outer: usize,
    pub(super) axis: usize,
    pub(super) inter: usize,
}

impl Around {
    /// `shape` with the axes in `range` taken as one.
    pub(super) fn axes(shape: &[usize], range: std::ops::Range<usize>) -> Self {
        Self {
            outer: shape[..range.start].iter().product(),
            axis: shape[range.clone()].iter().product(),
            inter: shape[range.end..].iter().product(),
        }
    }

    pub(super) fn axis(shape: &[usize], axis: usize) -> Self {
        Self::axes(shape, axis..axis + 1)
    }
}

/// The shape that `a` and `b` broadcast to: aligned at the last axis, sizes equal or 1.
///
/// Errors: [`Error::Shape`] if they do not.
pub(super) fn broadcast_shape(op: &'static str, arg: &'static str, a: &[usize], b: &[usize]) -> Result<Vec<usize>> {
    let rank = a.len().max(b.len());
    let size = |shape: &[usize], axis: usize| if axis + shape.len() < rank { 1 } else { shape[axis + shape.len() - rank] };
    (0..rank)
        .map(|axis| match (size(a, axis), size(b, axis)) {
            (a, b) if a == b => Ok(a),
            (1, size) | (size, 1) => Ok(size),
            _ => Err(Error::Shape { op, arg, expected: format!("broadcastable to {a:?}"), got: format!("{b:?}") }),
        })
        .collect()
}

/// Row-major strides.
pub(super) fn strides_of(shape: &[usize]) -> Vec<isize> {
    let mut strides = vec![0; shape.len()];
    let mut stride = 1isize;
    for (axis, size) in shape.iter().enumerate().rev() {
        strides[axis] = stride;
        stride = stride.wrapping_mul(*size as isize);
    }
    strides
}

/// A result whose elements stand at `offset + index . strides` of a source; a stride may be 0 (broadcast) or negative.
#[derive(Clone, Debug)]
pub(super) struct View {
    pub(super) shape: Vec<usize>,
    pub(super) strides: Vec<isize>,
    pub(super) offset: usize,
}

impl View {
    /// The source itself.
    pub(super) fn whole(shape: &[usize]) -> Self {
        Self { shape: shape.to_vec(), strides: strides_of(shape), offset: 0 }
    }

    /// `from` broadcast to `to`, which [`broadcast_shape`] must have allowed.
    pub(super) fn broadcast(from: &[usize], to: &[usize]) -> Self {
        assert!(from.len() <= to.len());
        let own = strides_of(from);
        let missing = to.len() - from.len();
        let strides = (0..to.len())
            .map(|axis| match axis.checked_sub(missing) {
                Some(source) if from[source] == to[axis] => own[source],
                Some(source) => {
                    assert_eq!(from[source], 1, "{from:?} does not broadcast to {to:?}");
                    0
                }
                None => 0,
            })
            .collect();
        Self { shape: to.to_vec(), strides, offset: 0 }
    }

    /// Whether every element of the source appears once and in order.
    fn is_whole(&self, source_len: usize) -> bool {
        self.offset == 0 && self.shape.iter().product::<usize>() == source_len && self.strides == strides_of(&self.shape)
    }

    /// Calls `run(first index in the source, stride, length)` for each row of the result along its last axis, in order.
    fn for_each_row(&self, mut run: impl FnMut(usize, isize, usize)) {
        if self.shape.contains(&0) {
            return;
        }
        let Some((&length, outer)) = self.shape.split_last() else { return run(self.offset, 0, 1) };
        let stride = self.strides[outer.len()];
        let mut index = vec![0usize; outer.len()];
        let mut place = self.offset as isize;
        loop {
            run(place as usize, stride, length);
            let mut axis = outer.len();
            loop {
                if axis == 0 {
                    return;
                }
                axis -= 1;
                index[axis] += 1;
                place += self.strides[axis];
                if index[axis] < outer[axis] {
                    break;
                }
                place -= self.strides[axis] * outer[axis] as isize;
                index[axis] = 0;
            }
        }
    }

    /// The elements of the view, handed to `put` in row-major order.
    fn for_each<E: Element>(&self, source: &[E], mut put: impl FnMut(E)) {
        self.for_each_row(|first, stride, length| match stride {
            1 => source[first..first + length].iter().for_each(|value| put(*value)),
            0 => (0..length).for_each(|_| put(source[first])),
            _ => (0..length as isize).for_each(|i| put(source[(first as isize + i * stride) as usize])),
        });
    }

    /// The elements of the view in row-major order.
    pub(super) fn read<E: Element>(&self, source: &[E]) -> Buffer<E> {
        if self.is_whole(source.len()) {
            return Buffer::copy_of(source);
        }
        let mut out = Buffer::scratch(self.shape.iter().product());
        let mut next = 0;
        self.for_each(source, |value| {
            out[next] = value;
            next += 1;
        });
        assert_eq!(next, out.len());
        out
    }

    /// As [`View::read`], into a vector.
    pub(super) fn read_vec(&self, source: &[f32]) -> Vec<f32> {
        if self.is_whole(source.len()) {
            return source.to_vec();
        }
        let mut out = Vec::with_capacity(self.shape.iter().product());
        self.for_each(source, |value| out.push(value));
        out
    }

    /// The gradient of a source of `len` elements from that of the view: each element sums its appearances, in f64,
    /// since a broadcast scalar may have millions.
    pub(super) fn scatter_add(&self, gradient: &[f32], len: usize) -> Buffer<f32> {
        if self.is_whole(len) {
            return Buffer::copy_of(gradient);
        }
        let mut sums = vec![0f64; len];
        let mut next = 0;
        self.for_each_row(|first, stride, length| {
            for (i, value) in gradient[next..next + length].iter().enumerate() {
                sums[(first as isize + i as isize * stride) as usize] += f64::from(*value);
            }
            next += length;
        });
        assert_eq!(next, gradient.len());
        let mut out = Buffer::scratch(len);
        out.iter_mut().zip(&sums).for_each(|(out, sum)| *out = *sum as f32);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broadcasting_follows_numpy() {
        for (a, b, want) in [
            (vec![3, 1], vec![4], Some(vec![3, 4])),
            (vec![], vec![2, 3], Some(vec![2, 3])),
            (vec![0, 1], vec![1, 5], Some(vec![0, 5])),
            (vec![0], vec![1], Some(vec![0])),
            (vec![2], vec![3], None),
            (vec![0], vec![2], None),
        ] {
            assert_eq!(broadcast_shape("add", "b", &a, &b).ok(), want, "{a:?} {b:?}");
        }
    }

    #[test]
    fn views_read_and_scatter_by_strides() {
        let source: Vec<f32> = (0..6).map(|v| v as f32).collect();
        let column = View::broadcast(&[2, 1], &[2, 3]);
        assert_eq!(&*column.read(&source[..2]), [0., 0., 0., 1., 1., 1.]);
        assert_eq!(&*column.scatter_add(&[1., 2., 3., 4., 5., 6.], 2), [6., 15.]);
        let transposed = View { shape: vec![3, 2], strides: vec![1, 3], offset: 0 };
        assert_eq!(&*transposed.read(&source), [0., 3., 1., 4., 2., 5.]);
        let backwards = View { shape: vec![2, 3], strides: vec![3, -1], offset: 2 };
        assert_eq!(backwards.read_vec(&source), [2., 1., 0., 5., 4., 3.]);
        assert_eq!(&*View { shape: vec![], strides: vec![], offset: 4 }.read(&source), [4.]);
        assert!(View::broadcast(&[1], &[0]).read(&source[..1]).is_empty());
    }

    #[test]
    fn axes_count_from_both_ends_and_are_checked() {
        assert_eq!(axis_index("sum", -1, 3).unwrap(), 2);
        assert_eq!(axis_indices("sum", &[2, -3], 3).unwrap(), [0, 2]);
        assert!(axis_index("sum", 3, 3).unwrap_err().to_string().contains("from -3 to 2"));
        assert!(axis_index("sum", 0, 0).unwrap_err().to_string().contains("rank 0"));
        assert!(axis_indices("sum", &[1, -2], 3).unwrap_err().to_string().contains("differ"));
        assert_eq!(Around::axis(&[2, 3, 4], 1), Around { outer: 2, axis: 3, inter: 4 });
        assert!(room_for("zeros", &[usize::MAX, 2]).is_err());
        assert!(room_for("zeros", &[1 << 50]).is_err());
    }
}
