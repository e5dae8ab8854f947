//! Launchers of elements.cu: conversions between element types, sums of gradients, rows put at their places, and the columns
//! of low-rank parts. The CPU's are in cpu/norm.rs and cpu/low_rank.rs.

use super::device::Device;
use super::launch::{Launch, blocks};
use super::memory::{View, ViewMut};
use super::program::{Program, Variant};
use crate::error::Result;
use crate::kernels::element::Float;
use std::ops::Range;

/// Threads of a block.
const THREADS: usize = 256;

fn launch<'d, E: Float>(device: &'d Device, name: &'static str) -> Result<Launch<'d>> {
    Launch::new(device, name, Variant::of::<E>(Program::Elements), name)
}

fn grid(count: usize) -> (usize, usize, usize) {
    (blocks(count, THREADS, 1 << 16), 1, 1)
}

/// `to = from`, both of one length.
pub fn widen<E: Float>(device: &Device, from: View<E>, mut to: ViewMut<f32>) -> Result<()> {
    let count = from.len();
    assert!(to.len() == count, "widen: {count} values to {}", to.len());
    if count == 0 {
        return Ok(());
    }
    let launch = launch::<E>(device, "widen")?.read(from).write(&mut to).long(count);
    // SAFETY: the arguments are widen's; threads stride over `count` elements, which both have.
    unsafe { launch.run(grid(count), THREADS, 0) }
}

/// `to = from`, rounded to nearest even; both of one length.
pub fn narrow<E: Float>(device: &Device, from: View<f32>, mut to: ViewMut<E>) -> Result<()> {
    let count = from.len();
    assert!(to.len() == count, "narrow: {count} values to {}", to.len());
    if count == 0 {
        return Ok(());
    }
    let launch = launch::<E>(device, "narrow")?.read(from).write(&mut to).long(count);
    // SAFETY: the arguments are narrow's; threads stride over `count` elements, which both have.
    unsafe { launch.run(grid(count), THREADS, 0) }
}

/// `sum += x` in f32, rounded once; both of one length.
pub fn add<E: Float>(device: &Device, mut sum: ViewMut<E>, x: View<E>) -> Result<()> {
    let count = x.len();
    assert!(sum.len() == count, "add: {count} values to {}", sum.len());
    if count == 0 {
        return Ok(());
    }
    let launch = launch::<E>(device, "add")?.write(&mut sum).read(x).long(count);
    // SAFETY: the arguments are add's; threads stride over `count` elements, which both have.
    unsafe { launch.run(grid(count), THREADS, 0) }
}

/// Row `rows[i]` of `to` becomes row i of `from`, or with `add` gains it, in f32 and rounded once.
///
/// - `from`: `[rows.len(), width]`; `to`: `[any, width]`
/// - `rows`: each below the rows of `to`, else the device is lost; no two alike, else which one stays is open
pub fn put_rows<E: Float>(device: &Device, from: View<E>, rows: View<i32>, width: usize, mut to: ViewMut<E>, add: bool) -> Result<()> {
    assert!(width > 0 && to.len().is_multiple_of(width), "put_rows: {} values in rows of {width}", to.len());
    assert!(from.len() == rows.len() * width, "put_rows: {} values for [{}, {width}]", from.len(), rows.len());
    if rows.is_empty() {
        return Ok(());
    }
    let to_rows = to.len() / width;
    let launch = launch::<E>(device, "put_rows")?.read(from).read(rows).write(&mut to).int(to_rows).int(width).int(usize::from(add));
    // SAFETY: the arguments are put_rows's. Block i reads rows[i] and row i of `from`, and writes one row of `to`, which it checks.
    unsafe { launch.run((rows.len(), 1, 1), THREADS, 0) }
}

/// `y[:, columns] += scale * delta`, in f32, rounded once.
///
/// - `y`: `[rows, width]`; `delta`: `[rows, columns]`, f32
pub fn add_columns<E: Float>(
    device: &Device,
    mut y: ViewMut<E>,
    width: usize,
    columns: Range<usize>,
    delta: View<f32>,
    scale: f32,
) -> Result<()> {
    check_columns(y.len(), width, &columns, delta.len());
    let count = delta.len();
    if count == 0 {
        return Ok(());
    }
    let launch = launch::<E>(device, "add_columns")?.write(&mut y).int(width).int(columns.start).int(columns.len());
    let launch = launch.read(delta).float(scale).long(count);
    // SAFETY: the arguments are add_columns's; threads stride over the elements of delta, each of which has its own place in y.
    unsafe { launch.run(grid(count), THREADS, 0) }
}

/// `out = scale * dy[:, columns]`.
///
/// - `dy`: `[rows, width]`; `out`: `[rows, columns]`
pub fn take_columns<E: Float>(
    device: &Device,
    dy: View<E>,
    width: usize,
    columns: Range<usize>,
    scale: f32,
    mut out: ViewMut<E>,
) -> Result<()> {
    check_columns(dy.len(), width, &columns, out.len());
    let count = out.len();
    if count == 0 {
        return Ok(());
    }
    let launch = launch::<E>(device, "take_columns")?.read(dy).int(width).int(columns.start).int(columns.len());
    let launch = launch.float(scale).write(&mut out).long(count);
    // SAFETY: the arguments are take_columns's; threads stride over the elements of out, each of which has a place in dy.
    unsafe { launch.run(grid(count), THREADS, 0) }
}

fn check_columns(len: usize, width: usize, columns: &Range<usize>, part: usize) {
    assert!(columns.start < columns.end && columns.end <= width, "columns {columns:?} of {width}");
    assert!(len.is_multiple_of(width), "{len} values in rows of {width}");
    assert!(part == len / width * columns.len(), "a part of {part} values for columns {columns:?} of {} rows", len / width);
}
