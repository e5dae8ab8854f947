//! Weights of 8 bits for inference: integers from -127 to 127 in panels, and one f32 scale an output. A product rounds each row of
//! activations to 16 bits of its largest magnitude and multiplies integers (tile_int8.rs), whose sums are exact; the scales
//! join after the sum, in f64, which holds it exactly. So a row's bits are the same alone and in a batch, and in every form.
//!
//! Rounding a row of `k` activations to 32,767 steps moves it by at most `sqrt(k) / 65,534` of its length, since its largest is at
//! most its length: 0.11 % for 4864 inputs, and a third of it where errors spread evenly. bf16, in which the row came, had moved it
//! by up to 0.39 %, and the weight's own rounding to 127 steps does more.
//! Source: Dettmers et al., arXiv 2208.07339, section 2.1 (absmax by rows), without its outliers, and with 16 bits for activations.

use super::epilogue::{Fence, finish_forward, streams};
use super::gemm::Rows;
use super::isa::{Isa, isa};
use super::threads::{Shared, parallel, parallel_ranges, threads};
use super::tile::PANEL_COLUMNS;
use super::tile_int8::{Form, GROUP, PANEL_GROUP, PLANES_OFFSET, TILE_ROWS_MAX, TOGETHER, tile};
use crate::kernels::buffer::Buffer;
use crate::kernels::element::Float;
use crate::vectorised;
use std::ops::Range;

/// Largest integer of a weight.
const MOST: f32 = 127.0;

/// Largest integer of an activation.
const MOST_ACTIVATION: f32 = 32_767.0;

/// Most inputs of a weight: so many products of 255 and 127 fit a sum of 32 bits.
pub const INPUTS_MAX: usize = i32::MAX as usize / (255 * 127);

/// Bytes of packed rows that one task multiplies by its panels: with four of them they fit the second cache.
const BLOCK_BYTES: usize = 1 << 20;

/// Panels whose sums are finished together, so that results are written in longer runs (product.rs, `AMX_PANELS`).
const PANELS: usize = 4;

/// Tasks a thread that a product is split into at least: a slow core leaves its last ones to the others.
const TASKS: usize = 8;

/// A weight `[outputs, inputs]`: `values` in panels, `scales` and `sums` `[outputs]`.
#[derive(Clone, Copy)]
pub struct Int8Weight<'a> {
    pub values: &'a [i8],
    pub scales: &'a [f32],
    /// Of each output's integers.
    pub sums: &'a [i32],
    pub outputs: usize,
    pub inputs: usize,
}

/// [`Int8Weight`] to write to.
pub struct Int8WeightMut<'a> {
    pub values: &'a mut [i8],
    pub scales: &'a mut [f32],
    pub sums: &'a mut [i32],
    pub inputs: usize,
}

/// Integers of a weight in panels, their padding included.
pub fn len(outputs: usize, inputs: usize) -> usize {
    outputs.div_ceil(PANEL_COLUMNS) * panel_len(inputs)
}

fn panel_len(inputs: usize) -> usize {
    inputs.div_ceil(GROUP) * PANEL_GROUP
}

/// Where the value of an output and input lies.
fn place(inputs: usize, row: usize, column: usize) -> usize {
    let unit = column / TOGETHER * PANEL_COLUMNS + row % PANEL_COLUMNS;
    row / PANEL_COLUMNS * panel_len(inputs) + unit * TOGETHER + column % TOGETHER
}

/// Rounds outputs `rows` of a weight `[outputs, inputs]` from `from` `[rows, inputs]`, row-major, to the nearest multiples of
/// their scale, a 127th of the row's largest magnitude. What else is in `values` must be zero.
pub fn pack(weight: Int8WeightMut, rows: Range<usize>, from: &[f32]) {
    let Int8WeightMut { values, scales, sums, inputs } = weight;
    assert!(inputs <= INPUTS_MAX, "{inputs} inputs, {INPUTS_MAX} fit the sums");
    assert_eq!(values.len(), len(scales.len(), inputs), "panels of [{}, {inputs}]", scales.len());
    assert_eq!(sums.len(), scales.len(), "a sum and a scale an output");
    assert_eq!(from.len(), rows.len() * inputs, "values of rows {rows:?} with {inputs} inputs");
    let (values, scales, sums) = (Shared::new(values), Shared::new(scales), Shared::new(sums));
    let (first, size) = (rows.start / PANEL_COLUMNS, panel_len(inputs));
    // Whole panels a task: two tasks never write the same one.
    parallel_ranges(rows.end.div_ceil(PANEL_COLUMNS) - first, 1, |range| {
        for panel in first + range.start..first + range.end {
            let taken = rows.start.max(panel * PANEL_COLUMNS)..rows.end.min((panel + 1) * PANEL_COLUMNS);
            // SAFETY: each panel, and each row, belongs to one range of disjoint ones.
            let panel_values = unsafe { values.part(panel * size..(panel + 1) * size) };
            // SAFETY: as above.
            let (scales, sums) = unsafe { (scales.part(taken.clone()), sums.part(taken.clone())) };
            for ((row, scale), sum) in taken.zip(scales).zip(sums) {
                let from = &from[(row - rows.start) * inputs..][..inputs];
                let largest = from.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
                *scale = largest / MOST;
                *sum = 0;
                let factor = if largest > 0.0 { MOST / largest } else { 0.0 };
                for (column, value) in from.iter().enumerate() {
                    let rounded = (value * factor).round().clamp(-MOST, MOST) as i8;
                    panel_values[place(inputs, row, column) - panel * size] = rounded;
                    *sum += i32::from(rounded);
                }
            }
        }
    });
}

/// Output `row` as f32: `[inputs]`.
pub fn read_row(weight: Int8Weight, row: usize, out: &mut [f32]) {
    for (column, out) in out.iter_mut().enumerate() {
        *out = f32::from(weight.values[place(weight.inputs, row, column)]) * weight.scales[row];
    }
}

/// `y = x Wᵀ (+ bias) (+ residual)`; arguments as in [`super::gemm::forward`]. A row of `x` with a value that is not finite gives
/// NaN, one without a value of at least 1e-34 zeros.
pub fn forward<E: Float, O: Float>(
    y: &mut [O],
    x: &[E],
    rows: Option<&[u32]>,
    weight: Int8Weight,
    bias: Option<&[E]>,
    residual: Option<&[O]>,
) {
    forward_as(isa(), y, x, rows, weight, bias, residual);
}

fn forward_as<E: Float, O: Float>(
    isa: Isa,
    y: &mut [O],
    x: &[E],
    rows: Option<&[u32]>,
    weight: Int8Weight,
    bias: Option<&[E]>,
    residual: Option<&[O]>,
) {
    let Int8Weight { values, scales, sums: weight_sums, outputs, inputs } = weight;
    assert_eq!(values.len(), len(outputs, inputs), "panels of [{outputs}, {inputs}]");
    assert_eq!((scales.len(), weight_sums.len()), (outputs, outputs), "a scale and a sum for each output");
    assert_eq!(y.len() % outputs, 0, "y has {} values, rows of {outputs}", y.len());
    assert!(bias.is_none_or(|bias| bias.len() == outputs), "a bias of {outputs}");
    assert!(residual.is_none_or(|residual| residual.len() == y.len()), "a residual of {}", y.len());
    let count = y.len() / outputs;
    if count == 0 {
        return;
    }
    let form = Form::of(isa, count);
    let x = Rounded::new(form, &Rows::new(x, inputs, rows, count), count, inputs);
    let (panels, size) = (outputs.div_ceil(PANEL_COLUMNS), panel_len(inputs));
    let tiles = count.div_ceil(x.tile_rows);
    let row_parts = (count * x.row_len).div_ceil(BLOCK_BYTES).clamp(1, tiles);
    let panel_parts = (TASKS * threads()).div_ceil(row_parts).min(panels);
    let streams = streams(y);
    let y = Shared::new(y);
    parallel(row_parts * panel_parts, |task| {
        #[cfg(target_arch = "x86_64")]
        let _release = super::amx::Release;
        let _fence = Fence;
        let (row_part, part) = (task / panel_parts, task % panel_parts);
        let taken = panels * part / panel_parts..panels * (part + 1) / panel_parts;
        let tiles = tiles * row_part / row_parts..tiles * (row_part + 1) / row_parts;
        let (mut sums, mut scaled) = ([0; TILE_ROWS_MAX * 2 * PANEL_COLUMNS], [0.0; TILE_ROWS_MAX * PANEL_COLUMNS]);
        for first in taken.clone().step_by(PANELS) {
            for number in tiles.clone() {
                let (rows, packed) = x.tile(number);
                let (sums, scaled) = (&mut sums[..2 * rows.len() * PANEL_COLUMNS], &mut scaled[..rows.len() * PANEL_COLUMNS]);
                for panel in first..taken.end.min(first + PANELS) {
                    tile(form, rows.len(), packed, &values[panel * size..(panel + 1) * size], sums, x.scales.len() <= x.tile_rows);
                    let left = panel * PANEL_COLUMNS;
                    let width = PANEL_COLUMNS.min(outputs - left);
                    let (mut factors, mut offsets) = ([0.0; PANEL_COLUMNS], [0; PANEL_COLUMNS]);
                    factors[..width].copy_from_slice(&scales[left..left + width]);
                    if form.takes_planes() {
                        offsets[..width].copy_from_slice(&weight_sums[left..left + width]);
                    }
                    scale(sums, &x.scales[rows.clone()], &factors, &offsets, scaled);
                    let bias = bias.map(|bias| &bias[left..left + width]);
                    finish_forward(&y, rows.start * outputs + left, outputs, width, scaled, bias, residual, streams);
                }
            }
        }
    });
}

/// Rows of activations in 16 bits, packed in tiles as their form wants them (tile_int8.rs).
struct Rounded {
    bytes: Buffer<i8>,
    /// `[rows]`
    scales: Buffer<f32>,
    tile_rows: usize,
    /// Bytes of a row.
    row_len: usize,
}

impl Rounded {
    fn new<E: Float>(form: Form, x: &Rows<E>, count: usize, inputs: usize) -> Self {
        let tile_rows = form.rows();
        let row_len = inputs.div_ceil(GROUP) * 2 * GROUP;
        let (mut bytes, mut scales) = (Buffer::<i8>::scratch(count * row_len), Buffer::<f32>::scratch(count));
        let (shared_bytes, shared_scales) = (Shared::new(&mut bytes), Shared::new(&mut scales));
        parallel_ranges(count.div_ceil(tile_rows), 1, |range| {
            for rows in range.map(|number| number * tile_rows..count.min((number + 1) * tile_rows)) {
                // SAFETY: each tile belongs to one range of disjoint ones.
                let bytes = unsafe { shared_bytes.part(rows.start * row_len..rows.end * row_len) };
                // SAFETY: as above.
                let scales = unsafe { shared_scales.part(rows.clone()) };
                for (index, row) in rows.clone().enumerate() {
                    scales[index] = round_row(x.row(row), bytemuck::cast_slice_mut(bytes), index, rows.len(), form.takes_planes());
                }
            }
        });
        Self { bytes, scales, tile_rows, row_len }
    }

    /// The rows of a tile, as they are and packed.
    fn tile(&self, number: usize) -> (Range<usize>, &[u8]) {
        let rows = number * self.tile_rows..self.scales.len().min((number + 1) * self.tile_rows);
        let bytes = &self.bytes[rows.start * self.row_len..rows.end * self.row_len];
        (rows, bytemuck::cast_slice(bytes))
    }
}

vectorised! {
    /// Rounds a row to row `index` of a tile of `rows`; returns what its integers are multiplied by.
    fn round_row<E: Float>(row: &[E], tile: &mut [u8], index: usize, rows: usize, takes_planes: bool) -> f32 {
        // A whole number plus this has the number's two's complement in its lowest bits, whatever the rounding mode was.
        const ROUNDING: f32 = 12_582_912.0;
        const MAGNITUDE: u32 = 0x7fff_ffff;
        // By their bits: infinity is more than every number, and NaN more than that.
        let mut lanes = [0u32; 16];
        let (whole, rest) = row.as_chunks::<16>();
        for values in whole {
            for (lane, value) in lanes.iter_mut().zip(values) {
                *lane = (*lane).max(value.to_f32().to_bits() & MAGNITUDE);
            }
        }
        for (lane, value) in lanes.iter_mut().zip(rest) {
            *lane = (*lane).max(value.to_f32().to_bits() & MAGNITUDE);
        }
        let largest = f32::from_bits(lanes.into_iter().fold(0, u32::max));
        let (factor, scale) = match MOST_ACTIVATION / largest {
            _ if !largest.is_finite() => (0.0, f32::NAN),
            factor if factor.is_infinite() => (0.0, 0.0),
            factor => (factor, largest / MOST_ACTIVATION),
        };
        for (values, packed) in row.chunks(GROUP).zip(tile.as_chunks_mut::<{ 2 * GROUP }>().0.iter_mut().skip(index).step_by(rows)) {
            // Past the last input the weights are zero.
            let mut group = [E::default(); GROUP];
            group[..values.len()].copy_from_slice(values);
            if takes_planes {
                for (input, value) in group.iter().enumerate() {
                    let bits = (value.to_f32() * factor + (ROUNDING + PLANES_OFFSET as f32)).to_bits();
                    packed[input] = (bits >> 8) as u8;
                    packed[GROUP + input] = bits as u8;
                }
            } else {
                for (word, value) in packed.as_chunks_mut::<2>().0.iter_mut().zip(&group) {
                    *word = ((value.to_f32() * factor + ROUNDING).to_bits() as i16).to_ne_bytes();
                }
            }
        }
        scale
    }
}

vectorised! {
    /// `sums` `[rows][2][32]` of a tile to products `[rows][32]`. `row_scales`: `[rows]`; `scales` and `weight_sums` of the columns.
    fn scale(sums: &[i32], row_scales: &[f32], scales: &[f32; PANEL_COLUMNS], weight_sums: &[i32; PANEL_COLUMNS], scaled: &mut [f32]) {
        let rows = sums.as_chunks::<{ 2 * PANEL_COLUMNS }>().0.iter().zip(scaled.as_chunks_mut::<PANEL_COLUMNS>().0);
        for ((sums, scaled), row_scale) in rows.zip(row_scales) {
            for column in 0..PANEL_COLUMNS {
                let (upper, lower) = (f64::from(sums[column]), f64::from(sums[PANEL_COLUMNS + column]));
                let sum = upper * 256.0 + lower - f64::from(weight_sums[column]) * f64::from(PLANES_OFFSET);
                scaled[column] = (sum * (f64::from(*row_scale) * f64::from(scales[column]))) as f32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    fn number(i: usize) -> f32 {
        ((i * 7919 + i / 13 * 101) % 1013) as f32 / 506.0 - 1.0
    }

    /// A weight in integers.
    struct Packed {
        values: Vec<i8>,
        scales: Vec<f32>,
        sums: Vec<i32>,
        outputs: usize,
        inputs: usize,
    }

    impl Packed {
        fn new(outputs: usize, inputs: usize, from: &[f32]) -> Self {
            let (mut values, mut scales, mut sums) = (vec![0; len(outputs, inputs)], vec![f32::NAN; outputs], vec![9; outputs]);
            for start in (0..outputs).step_by(32) {
                let rows = start..outputs.min(start + 32);
                let weight = Int8WeightMut { values: &mut values, scales: &mut scales, sums: &mut sums, inputs };
                pack(weight, rows.clone(), &from[rows.start * inputs..rows.end * inputs]);
            }
            Self { values, scales, sums, outputs, inputs }
        }

        fn weight(&self) -> Int8Weight<'_> {
            let Self { values, scales, sums, outputs, inputs } = self;
            Int8Weight { values, scales, sums, outputs: *outputs, inputs: *inputs }
        }
    }

    /// The product against that of the rounded weight in f64, then every form and many rows against one.
    fn check<E: Float>(outputs: usize, inputs: usize) {
        let from: Vec<f32> = (0..outputs * inputs).map(|i| number(i) * (1 + i / inputs) as f32).collect();
        let packed = Packed::new(outputs, inputs, &from);
        let weight = packed.weight();
        let mut exact = vec![0.0; outputs * inputs];
        for (row, out) in exact.chunks_exact_mut(inputs).enumerate() {
            read_row(weight, row, out);
            let integers = out.iter().map(|value| (value / packed.scales[row]).round() as i32);
            assert_eq!(packed.sums[row], integers.sum::<i32>());
        }
        let rows = 37;
        let x: Vec<E> = (0..rows * inputs).map(|i| E::from_f32(number(i + 5))).collect();
        let bias: Vec<E> = (0..outputs).map(|i| E::from_f32(number(i))).collect();
        let mut got = vec![0.0f32; rows * outputs];
        forward(&mut got, &x, None, weight, Some(&bias), None);
        for (row, got) in got.chunks_exact(outputs).enumerate() {
            let x = &x[row * inputs..(row + 1) * inputs];
            // Half a step of each activation, times its weight; then some roundings of f32.
            let step = x.iter().fold(0.0f32, |most, x| most.max(x.to_f32().abs())) / MOST_ACTIVATION;
            for (output, got) in got.iter().enumerate() {
                let (mut want, mut bound) = (f64::from(bias[output].to_f32()), 1e-6);
                for (x, w) in x.iter().zip(&exact[output * inputs..]) {
                    want += f64::from(x.to_f32()) * f64::from(*w);
                    bound += f64::from(step * 0.501 * w.abs()) + 1e-7 * f64::from(x.to_f32() * w).abs();
                }
                assert!((f64::from(*got) - want).abs() <= bound, "{got} {want}, bound {bound}");
            }
        }
        for isa in Isa::ALL.into_iter().filter(|isa| *isa <= Isa::best()) {
            let mut other = vec![0.0f32; rows * outputs];
            forward_as(isa, &mut other, &x, None, weight, Some(&bias), None);
            assert_eq!(other, got, "{isa:?}");
            for row in [0, 5, rows - 1] {
                let mut alone = vec![0.0f32; outputs];
                forward_as(isa, &mut alone, &x, Some(&[row as u32]), weight, Some(&bias), None);
                assert_eq!(alone, got[row * outputs..(row + 1) * outputs], "{isa:?}, row {row} alone");
            }
        }
    }

    #[test]
    fn products_are_those_of_the_rounded_weight_in_any_company() {
        for (outputs, inputs) in [(1, 1), (5, 7), (33, 64), (96, 130), (70, 1000)] {
            check::<f32>(outputs, inputs);
            check::<bf16>(outputs, inputs);
        }
    }

    #[test]
    fn many_rows_in_several_blocks_are_those_of_one() {
        let (outputs, inputs, rows) = (40, 1100, 1000);
        let packed = Packed::new(outputs, inputs, &(0..outputs * inputs).map(number).collect::<Vec<_>>());
        let x: Vec<bf16> = (0..rows * inputs).map(|i| bf16::from_f32(number(i * 3))).collect();
        let residual: Vec<bf16> = (0..rows * outputs).map(|i| bf16::from_f32(number(i * 7))).collect();
        let mut got = vec![bf16::ZERO; rows * outputs];
        forward(&mut got, &x, None, packed.weight(), None, Some(&residual));
        for row in (0..rows).step_by(111) {
            let (mut alone, part) = (vec![bf16::ZERO; outputs], row * outputs..(row + 1) * outputs);
            forward(&mut alone, &x[row * inputs..(row + 1) * inputs], None, packed.weight(), None, Some(&residual[part.clone()]));
            assert_eq!(alone, got[part], "row {row}");
        }
    }

    /// The header's bound, up to a row as bad as can be: one value that is far larger than all others.
    #[test]
    fn rounding_a_row_moves_it_by_a_small_part_of_its_length() {
        let inputs = 4864;
        for outlier in [0.0, 1.0, 30.0, 1e4] {
            let x: Vec<f32> = (0..inputs).map(|i| if i == 77 { outlier } else { number(i * 31) }).collect();
            let rounded = Rounded::new(Form::Portable, &Rows::new(&x, inputs, None, 1), 1, inputs);
            let (_, bytes) = rounded.tile(0);
            let (mut error, mut length, mut narrow) = (0.0, 0.0, 0.0);
            for (i, x) in x.iter().enumerate() {
                let integer = i16::from_ne_bytes([bytes[2 * i], bytes[2 * i + 1]]);
                error += (f64::from(f32::from(integer) * rounded.scales[0]) - f64::from(*x)).powi(2);
                narrow += f64::from(bf16::from_f32(*x).to_f32() - x).powi(2);
                length += f64::from(*x).powi(2);
            }
            assert!((error / length).sqrt() <= (inputs as f64).sqrt() / 65_534.0, "outlier {outlier}");
            assert!(error < narrow || outlier > 100.0, "outlier {outlier}: {error}, in bf16 {narrow}");
        }
    }

    #[test]
    fn values_that_are_not_finite_reach_the_result_and_tiny_ones_are_zero() {
        let packed = Packed::new(3, 70, &(0..210).map(number).collect::<Vec<_>>());
        for (value, is_nan) in [(f32::NAN, true), (f32::NEG_INFINITY, true), (0.0, false), (-1e-36, false)] {
            let mut x = vec![0.0f32; 70];
            x[69] = value;
            let mut y = vec![7.0f32; 3];
            forward(&mut y, &x, None, packed.weight(), None, None);
            assert!(y.iter().all(|y| if is_nan { y.is_nan() } else { *y == 0.0 }), "{value}: {y:?}");
        }
    }

    #[test]
    fn rounding_is_within_half_a_step_and_zeros_stay() {
        let (outputs, inputs) = (3, 50);
        let from: Vec<f32> = (0..outputs * inputs).map(|i| if i < inputs { 0.0 } else { number(i) * i as f32 }).collect();
        let packed = Packed::new(outputs, inputs, &from);
        for row in 0..outputs {
            let mut out = vec![f32::NAN; inputs];
            read_row(packed.weight(), row, &mut out);
            for (out, from) in out.iter().zip(&from[row * inputs..]) {
                assert!((out - from).abs() <= packed.scales[row] * 0.5001, "{out} {from}");
            }
        }
    }
}
