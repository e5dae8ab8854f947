//! Launchers of int8.cu: weights of 8 bits for inference, with one scale a row. Products multiply integers, whose sums are exact: a
//! row's bits are the same alone and in a batch, and those of the CPU (kernels/cpu/int8.rs, whose limit of inputs holds here too).

use super::device::Device;
use super::launch::Launch;
use super::memory::{DeviceBuffer, View, ViewMut};
use super::product::Groups;
use super::program::{Program, Variant};
use crate::error::Result;
use crate::kernels::cpu::int8::INPUTS_MAX;
use crate::kernels::element::{Dtype, Float};
use std::ops::Range;
use std::sync::Arc;

/// Threads of a block, and of its warps that each multiply some columns.
const THREADS: usize = 256;
const WARPS: usize = 8;

/// Bytes of a row are whole multiples of these.
const PIECE: usize = 16;

/// Rows and columns of a tile: few rows want many blocks, many rows want the weights less often.
const FEW: (usize, usize) = (1, 1);
const SOME: (usize, usize) = (8, 1);
const MANY: (usize, usize) = (8, 4);

fn variant<E: Float, O: Float>((rows, columns): (usize, usize)) -> Variant {
    assert!(O::DTYPE == E::DTYPE || O::DTYPE == Dtype::F32, "int8: results in the type of the activations or in f32");
    variant_of(E::DTYPE, O::DTYPE == Dtype::F32, rows, columns)
}

fn variant_of(dtype: Dtype, out_f32: bool, rows: usize, columns: usize) -> Variant {
    Variant::new(Program::Int8, dtype).with("OUT_F32", u32::from(out_f32)).with("ROWS", rows as u32).with("COLUMNS", columns as u32)
}

/// All variants of int8.cu in `dtype`.
pub(super) fn variants(dtype: Dtype) -> impl Iterator<Item = Variant> {
    [FEW, SOME, MANY].into_iter().flat_map(move |(rows, columns)| [false, true].map(|out| variant_of(dtype, out, rows, columns)))
}

/// A weight `[rows, inputs]` in integers, its rows padded with zeros.
pub struct Int8Weight {
    values: DeviceBuffer<i8>,
    scales: DeviceBuffer<f32>,
    /// Of each row's integers.
    sums: DeviceBuffer<i32>,
    inputs: usize,
}

impl Int8Weight {
    /// Zeros; `label` is for messages of a full device.
    ///
    /// Errors: [`crate::error::Error::Device`] if the device has no room, here and below. Panics for more inputs than fit the sums.
    pub fn zeroed(device: &Arc<Device>, label: &'static str, rows: usize, inputs: usize) -> Result<Self> {
        assert!((1..=INPUTS_MAX).contains(&inputs), "{inputs} inputs, {INPUTS_MAX} fit the sums");
        let values = DeviceBuffer::zeroed(device, label, rows * inputs.next_multiple_of(PIECE))?;
        Ok(Self { values, scales: DeviceBuffer::zeroed(device, label, rows)?, sums: DeviceBuffer::zeroed(device, label, rows)?, inputs })
    }

    pub fn try_clone(&self) -> Result<Self> {
        let (values, scales, sums) = (self.values.try_clone()?, self.scales.try_clone()?, self.sums.try_clone()?);
        Ok(Self { values, scales, sums, inputs: self.inputs })
    }

    pub fn inputs(&self) -> usize {
        self.inputs
    }

    pub fn bytes(&self) -> usize {
        self.values.len() + 8 * self.scales.len()
    }

    fn stride(&self) -> usize {
        self.inputs.next_multiple_of(PIECE)
    }

    /// Rounds `rows` from `from` `[rows, inputs]` to the nearest multiples of their scale, a 127th of the row's largest magnitude.
    pub fn write_rows(&mut self, rows: Range<usize>, from: &[f32]) -> Result<()> {
        let (inputs, stride, count) = (self.inputs, self.stride(), rows.len());
        assert!(rows.end <= self.scales.len() && from.len() == count * inputs, "int8: {} values of rows {rows:?}", from.len());
        if count == 0 {
            return Ok(());
        }
        let device = self.values.device().clone();
        let from = DeviceBuffer::copy_of(&device, "weights before they are rounded", from)?;
        let (mut values, mut scales) = (self.values.part_mut(rows.start * stride..rows.end * stride), self.scales.part_mut(rows.clone()));
        let mut sums = self.sums.part_mut(rows);
        let launch = Launch::new(&device, "int8", variant::<f32, f32>(FEW), "quantize")?.read(from.view()).write(&mut values);
        let launch = launch.write(&mut scales).write(&mut sums).int(inputs).int(stride);
        // SAFETY: the arguments are quantize's. A block stays in its row, of which all five buffers have `count`.
        unsafe { launch.run((count, 1, 1), THREADS, 0) }
    }

    /// Copies `rows` as f32: waits for the device.
    pub fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let stride = self.stride();
        let (mut values, mut scales) = (vec![0i8; rows.len() * stride], vec![0.0; rows.len()]);
        self.values.download_at(rows.start * stride, &mut values)?;
        self.scales.download_at(rows.start, &mut scales)?;
        for ((out, values), scale) in out.chunks_exact_mut(self.inputs).zip(values.chunks_exact(stride)).zip(scales) {
            out.iter_mut().zip(values).for_each(|(out, value)| *out = f32::from(*value) * scale);
        }
        Ok(())
    }

    /// Copies row `ids[t]` to row `t` of `out` `[tokens, inputs]`; each id is below the rows, else the device is lost.
    pub fn embed<E: Float>(&self, device: &Device, ids: View<i32>, mut out: ViewMut<E>) -> Result<()> {
        assert!(out.len() == ids.len() * self.inputs, "embedding: {} values for {} rows of {}", out.len(), ids.len(), self.inputs);
        if ids.is_empty() {
            return Ok(());
        }
        let launch = Launch::new(device, "embedding", variant::<E, E>(FEW), "embed_int8")?.read(self.values.view());
        let launch = launch.read(self.scales.view()).read(ids).write(&mut out);
        let launch = launch.int(self.scales.len()).int(self.inputs).int(self.stride());
        // SAFETY: the arguments are embed_int8's. Block t reads ids[t] and one row of the weight, which it checks, and writes row t.
        unsafe { launch.run((ids.len(), 1, 1), THREADS, 0) }
    }

    /// `y = x W^T (+ bias) (+ residual)`, rounded once. A row of `x` with a value that is not finite gives NaN, one without a value of
    /// at least 1e-34 zeros.
    ///
    /// - `y`: `[m, outputs]`, E or f32; `x`: `[m, inputs]`; `bias`: `[outputs]`; `residual`: as `y`
    /// - `groups`: rows of each group use its own weight, of those that lie one after the other
    pub fn forward<E: Float, O: Float>(
        &self,
        device: &Arc<Device>,
        mut y: ViewMut<O>,
        x: View<E>,
        bias: Option<View<E>>,
        residual: Option<View<O>>,
        groups: Option<Groups>,
    ) -> Result<()> {
        let (op, count, stride) = ("linear", groups.map_or(1, |groups| groups.count()), self.stride());
        assert!(self.scales.len().is_multiple_of(count), "{op}: {} rows of {count} weights", self.scales.len());
        let outputs = self.scales.len() / count;
        assert!(outputs > 0 && y.len().is_multiple_of(outputs), "{op}: y has {} values, rows of {outputs}", y.len());
        let rows = y.len() / outputs;
        assert!(x.len() == rows * self.inputs, "{op}: x has {} values for [{rows}, {}]", x.len(), self.inputs);
        assert!(bias.is_none_or(|bias| bias.len() == outputs && count == 1), "{op}: a bias of {outputs}");
        assert!(residual.is_none_or(|residual| residual.len() == y.len()), "{op}: a residual of {}", y.len());
        if rows == 0 {
            return Ok(());
        }
        let scratch = "activations in integers";
        let mut planes = DeviceBuffer::<u8>::scratch(device, scratch, rows * 2 * stride)?;
        let mut scales = DeviceBuffer::<f32>::scratch(device, scratch, rows)?;
        let (tile_rows, tile_columns) = match rows {
            1 => FEW,
            ..=64 => SOME,
            _ => MANY,
        };
        let variant = variant::<E, O>((tile_rows, tile_columns));
        let (mut planes_out, mut scales_out) = (planes.view_mut(), scales.view_mut());
        let launch = Launch::new(device, op, variant.clone(), "round_rows")?.read(x).write(&mut planes_out).write(&mut scales_out);
        let launch = launch.int(self.inputs).int(stride);
        // SAFETY: the arguments are round_rows's. A block stays in its row, of which all three buffers have `rows`.
        unsafe { launch.run((rows, 1, 1), THREADS, 0)? };
        let launch = Launch::new(device, op, variant, "multiply")?.read(planes.view()).read(scales.view()).read(self.values.view());
        let launch = launch.read(self.scales.view()).read(self.sums.view()).read_or_null(bias).read_or_null(residual).write(&mut y);
        let launch = launch.int(rows).int(outputs).int(stride).read_or_null(groups.map(|groups| groups.offsets));
        let grid = (outputs.div_ceil(WARPS * tile_columns), rows.div_ceil(tile_rows), count);
        // SAFETY: the arguments are multiply's, with the sizes that were checked above; blocks cut their rows at the group's and their
        // columns at `outputs`. Rows of planes and weights are whole 16 bytes, as their buffers' beginnings are.
        unsafe { launch.run(grid, WARPS * 32, 0) }
    }
}
