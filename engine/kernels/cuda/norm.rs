//! Launchers of norm.cu: sums of columns (gradients of biases and norms), and the norm of all gradients with the clipping
//! factor that follows from it. Results stay on the device, so that a step never waits for them.

use super::device::Device;
use super::launch::Launch;
use super::memory::{DeviceBuffer, View, ViewMut};
use super::program::{Program, Variant};
use crate::error::Result;
use crate::kernels::element::Float;
use std::sync::Arc;

/// Least rows of a part, and most parts.
const ROWS_LEAST: usize = 32;
const PARTS_MAX: usize = 256;
/// Elements of a tensor that one block takes.
pub const PIECE: usize = 1 << 16;

/// Rows of a part and how many parts there are, when `rows` are summed.
pub(super) fn parts(rows: usize) -> (usize, usize) {
    let part_rows = rows.div_ceil(PARTS_MAX).max(ROWS_LEAST);
    (part_rows, rows.div_ceil(part_rows))
}

/// Elements of scratch for sums over `rows` rows of `columns`.
pub fn parts_len(rows: usize, columns: usize) -> usize {
    parts(rows).1 * columns
}

/// `sums (+)= column sums of x`, in f32: the gradient of a bias.
///
/// - `x`: `[rows, columns]`; `parts`: scratch of [`parts_len`]; `sums`: `[columns]`
pub fn column_sums<E: Float>(device: &Device, x: View<E>, mut parts: ViewMut<f32>, mut sums: ViewMut<f32>, add: bool) -> Result<()> {
    let columns = sums.len();
    assert!(columns > 0 && x.len().is_multiple_of(columns), "column sums: {} values do not divide into rows of {columns}", x.len());
    let rows = x.len() / columns;
    assert!(parts.len() == parts_len(rows, columns), "column sums: {} values of scratch", parts.len());
    if rows > 0 {
        let (part_rows, count) = self::parts(rows);
        let launch = Launch::new(device, "column_sums", Variant::of::<E>(Program::Norm), "column_parts")?.waiting();
        let launch = launch.read(x).write(&mut parts).int(rows).int(columns).int(part_rows);
        // SAFETY: the arguments are column_parts's. A thread stays in its column and its part's rows, cut at `rows`.
        unsafe { launch.run((columns.div_ceil(128), count, 1), 128, 0)? };
    }
    add_parts(device, parts.view(), sums.reborrow(), add)
}

/// `sums (+)= the sum of the parts`, in an order that depends on their number alone.
pub(super) fn add_parts(device: &Device, parts: View<f32>, mut sums: ViewMut<f32>, add: bool) -> Result<()> {
    let columns = sums.len();
    let launch = Launch::new(device, "column_sums", Variant::of::<f32>(Program::Norm), "add_parts")?.waiting();
    let launch = launch.read(parts).write(&mut sums).int(parts.len() / columns).int(columns).int(usize::from(add));
    // SAFETY: the arguments are add_parts's. A thread stays in its column of both, of 32 a block.
    unsafe { launch.run((columns.div_ceil(32), 1, 1), 512, 0) }
}

/// A list of tensors on the device, kept while the same tensors come again, as in every step of a run.
#[derive(Default)]
pub struct Table {
    words: Vec<u64>,
    device: Option<(DeviceBuffer<u64>, DeviceBuffer<u64>)>,
    pieces: usize,
}

impl Table {
    /// Sets the table to `lines` of `width` words of 64 bits, for tensors of these lengths, and cuts them into pieces.
    pub(super) fn set(&mut self, device: &Arc<Device>, lines: &[u64], lengths: &[usize]) -> Result<()> {
        if self.device.is_some() && self.words == lines {
            return Ok(());
        }
        let pieces: Vec<u64> = (lengths.iter().enumerate())
            .flat_map(|(index, length)| (0..*length).step_by(PIECE).flat_map(move |start| [index as u64, start as u64]))
            .collect();
        let label = "tables of tensors";
        self.pieces = pieces.len() / 2;
        self.device = Some((DeviceBuffer::copy_of(device, label, lines)?, DeviceBuffer::copy_of(device, label, &pieces)?));
        self.words = lines.to_vec();
        Ok(())
    }

    /// Lines and pieces on the device, and the number of pieces.
    pub(super) fn get(&self) -> (View<'_, u64>, View<'_, u64>, usize) {
        let (lines, pieces) = self.device.as_ref().expect("a table is set before it is used");
        (lines.view(), pieces.view(), self.pieces)
    }
}

/// The norm of a set of tensors, on the device.
pub struct Norm {
    total: DeviceBuffer<f64>,
    factor: DeviceBuffer<f32>,
}

impl Norm {
    /// Room for one.
    pub fn new(device: &Arc<Device>) -> Result<Self> {
        Ok(Self { total: DeviceBuffer::scratch(device, "norm", 1)?, factor: DeviceBuffer::scratch(device, "norm", 1)? })
    }

    /// Computes the sum of the squares of all elements of all tensors in f64, and the factor that brings the norm down to
    /// `norm_max` (1 where it is below). The order of summation depends on the tensors' lengths and order alone.
    pub fn compute<E: Float>(&mut self, table: &mut Table, tensors: &[View<E>], norm_max: f64) -> Result<()> {
        let device = self.total.device().clone();
        let lines: Vec<u64> = tensors.iter().flat_map(|tensor| [tensor.address, tensor.len() as u64]).collect();
        let lengths: Vec<usize> = tensors.iter().map(|tensor| tensor.len()).collect();
        table.set(&device, &lines, &lengths)?;
        let (lines, pieces, count) = table.get();
        let mut sums = DeviceBuffer::<f64>::scratch(&device, "norm", count.max(1))?;
        if count > 0 {
            let launch = Launch::new(&device, "global_norm", Variant::of::<E>(Program::Norm), "squares")?;
            let launch = launch.read(lines).read(pieces).int(PIECE).write(&mut sums.view_mut());
            // SAFETY: the arguments are squares's: the table holds (address, length) of each tensor, which the caller lends,
            // and one piece for each block; `sums` has one f64 for each.
            unsafe { launch.run((count, 1, 1), 256, 0)? };
        }
        let launch = Launch::new(&device, "global_norm", Variant::of::<f32>(Program::Norm), "finish_norm")?;
        let (mut total, mut factor) = (self.total.view_mut(), self.factor.view_mut());
        let launch = launch.read(sums.view()).int(count).double(norm_max).write(&mut total).write(&mut factor);
        // SAFETY: the arguments are finish_norm's, and `sums` holds `count` f64.
        unsafe { launch.run((1, 1, 1), 256, 0) }
    }

    /// The sum of squares, to the host: waits for the device.
    pub fn sum_of_squares(&self) -> Result<f64> {
        Ok(self.total.to_vec()?[0])
    }

    /// The clipping factor, to the host: waits for the device.
    pub fn factor(&self) -> Result<f32> {
        Ok(self.factor.to_vec()?[0])
    }

    pub(super) fn on_device(&self) -> (View<'_, f64>, View<'_, f32>) {
        (self.total.view(), self.factor.view())
    }
}
