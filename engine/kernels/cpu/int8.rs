//! Weights of 8 bits for inference: integers from -127 to 127 in the panels of the element type that computes, and one f32
//! scale an output. A product widens a panel at a time into the cache, where it is exact in f32 and in bf16, multiplies it as
//! any other, and scales the sums. So a row's bits are the same alone and in a batch, as for every weight.
//! Source: Dettmers et al., arXiv 2208.07339, section 2.1 (absmax by rows), without its outliers.

use super::epilogue::{finish_forward, streams};
use super::isa::{Isa, isa};
use super::panels;
use super::product::{Panels, Product};
use super::threads::{Shared, parallel_ranges};
use super::tile::{PANEL_COLUMNS, TileElement};
use crate::kernels::element::Float;
use crate::vectorised;
use half::bf16;
use std::ops::Range;

/// Largest integer of a weight.
const MOST: f32 = 127.0;

/// A weight `[outputs, inputs]`: `values` in the panels of `E`, `scales` `[outputs]`.
#[derive(Clone, Copy)]
pub struct Int8Weight<'a> {
    pub values: &'a [i8],
    pub scales: &'a [f32],
    pub outputs: usize,
    pub inputs: usize,
}

/// Where the value of an output and input lies.
fn place<E: TileElement>(inputs: usize, row: usize, column: usize) -> usize {
    let panel = row / PANEL_COLUMNS * panels::panel_len::<E>(inputs);
    panel + (column / E::UNIT * PANEL_COLUMNS + row % PANEL_COLUMNS) * E::UNIT + column % E::UNIT
}

/// Rounds outputs `rows` of a weight `[outputs, inputs]` from `from` `[rows, inputs]`, row-major, to the nearest multiples of
/// their scale, a 127th of the row's largest magnitude.
pub fn pack<E: TileElement>(values: &mut [i8], scales: &mut [f32], inputs: usize, rows: Range<usize>, from: &[f32]) {
    assert_eq!(values.len(), panels::len::<E>(scales.len(), inputs), "panels of [{}, {inputs}]", scales.len());
    assert_eq!(from.len(), rows.len() * inputs, "values of rows {rows:?} with {inputs} inputs");
    let (values, scales, first) = (Shared::new(values), Shared::new(scales), rows.start / PANEL_COLUMNS);
    // Whole panels a task: two tasks never write the same one.
    parallel_ranges(rows.end.div_ceil(PANEL_COLUMNS) - first, 1, |range| {
        for panel in first + range.start..first + range.end {
            let size = panels::panel_len::<E>(inputs);
            let taken = rows.start.max(panel * PANEL_COLUMNS)..rows.end.min((panel + 1) * PANEL_COLUMNS);
            // SAFETY: each panel, and each row, belongs to one range of disjoint ones.
            let (panel_values, scales) = unsafe { (values.part(panel * size..(panel + 1) * size), scales.part(taken.clone())) };
            for (row, scale) in taken.zip(scales) {
                let from = &from[(row - rows.start) * inputs..][..inputs];
                let largest = from.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
                *scale = largest / MOST;
                let factor = if largest > 0.0 { MOST / largest } else { 0.0 };
                for (column, value) in from.iter().enumerate() {
                    panel_values[place::<E>(inputs, row, column) - panel * size] = (value * factor).round().clamp(-MOST, MOST) as i8;
                }
            }
        }
    });
}

/// Output `row` as f32: `[inputs]`.
pub fn read_row<E: TileElement>(weight: Int8Weight, row: usize, out: &mut [f32]) {
    for (column, out) in out.iter_mut().enumerate() {
        *out = f32::from(weight.values[place::<E>(weight.inputs, row, column)]) * weight.scales[row];
    }
}

/// `y = x Wᵀ (+ bias) (+ residual)`; arguments as in [`super::gemm::forward`].
pub fn forward<E: TileElement, O: Float>(
    y: &mut [O],
    x: &[E],
    rows: Option<&[u32]>,
    weight: Int8Weight,
    bias: Option<&[E]>,
    residual: Option<&[O]>,
) {
    let Int8Weight { values, scales, outputs, inputs } = weight;
    assert_eq!(values.len(), panels::len::<E>(outputs, inputs), "panels of [{outputs}, {inputs}]");
    assert_eq!(scales.len(), outputs, "a scale for each of {outputs}");
    assert_eq!(y.len() % outputs, 0, "y has {} values, rows of {outputs}", y.len());
    assert!(bias.is_none_or(|bias| bias.len() == outputs), "a bias of {outputs}");
    assert!(residual.is_none_or(|residual| residual.len() == y.len()), "a residual of {}", y.len());
    let (isa, count, size) = (isa(), y.len() / outputs, panels::panel_len::<E>(inputs));
    let x = super::gemm::Rows::new(x, inputs, rows, count);
    let streams = streams::<E, O>(isa, y);
    let y = Shared::new(y);
    let make = |panel: usize, out: &mut [E]| E::widen_int8(&values[panel * size..(panel + 1) * size], out);
    let columns = outputs.div_ceil(PANEL_COLUMNS);
    Product { isa, rows: count, units: E::units(inputs), panels: Panels::Made(&make), columns }.run(
        &|rows, out| super::gemm::pack_rows(isa, &x, 0..inputs, rows, out),
        None,
        Some(&|top, panel, sums| {
            let left = panel * PANEL_COLUMNS;
            let width = PANEL_COLUMNS.min(outputs - left);
            let mut factors = [0.0; PANEL_COLUMNS];
            factors[..width].copy_from_slice(&scales[left..left + width]);
            let mut scaled = [0.0; SCALED];
            for (sums, top) in sums.chunks(SCALED).zip((top..).step_by(SCALED / PANEL_COLUMNS)) {
                let scaled = &mut scaled[..sums.len()];
                scale(sums, &factors, scaled);
                let bias = bias.map(|bias| &bias[left..left + width]);
                finish_forward(&y, top * outputs + left, outputs, width, scaled, bias, residual, streams);
            }
        }),
    );
}

/// Sums that are scaled at a time: 16 rows.
const SCALED: usize = 16 * PANEL_COLUMNS;

vectorised! {
    fn scale(sums: &[f32], factors: &[f32; PANEL_COLUMNS], scaled: &mut [f32]) {
        for (sums, scaled) in sums.as_chunks::<PANEL_COLUMNS>().0.iter().zip(scaled.as_chunks_mut::<PANEL_COLUMNS>().0) {
            for column in 0..PANEL_COLUMNS {
                scaled[column] = sums[column] * factors[column];
            }
        }
    }
}

vectorised! {
    /// A panel's integers as f32.
    pub fn widen_f32(from: &[i8], to: &mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = f32::from(*from);
        }
    }
}

/// A panel's integers as bf16, exactly: none has more digits.
pub fn widen_bf16(from: &[i8], to: &mut [bf16]) {
    assert_eq!(from.len(), to.len(), "a panel of another size");
    #[cfg(target_arch = "x86_64")]
    if isa() >= Isa::Avx512Bf16 && from.len().is_multiple_of(64) {
        // SAFETY: the processor has the instructions.
        return unsafe { widen_bf16_512(from, to) };
    }
    widen_bf16_plain(from, to);
}

vectorised! {
    /// The upper half of an integer's f32 is its bf16.
    fn widen_bf16_plain(from: &[i8], to: &mut [bf16]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = bf16::from_bits((f32::from(*from).to_bits() >> 16) as u16);
        }
    }
}

/// [`widen_bf16_plain`] for a multiple of 64 integers, which are asked for 4 KiB ahead of time.
///
/// # Safety
/// The processor has AVX-512 F and BF16.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn widen_bf16_512(from: &[i8], to: &mut [bf16]) {
    use std::arch::x86_64::*;
    for (from, to) in from.as_chunks::<64>().0.iter().zip(to.as_chunks_mut::<64>().0) {
        _mm_prefetch::<_MM_HINT_T1>(from.as_ptr().wrapping_add(4096));
        for half in [0, 32] {
            // SAFETY: each half reads 32 of the 64 integers and writes 32 of the 64 bf16.
            unsafe {
                let wide = |at: usize| _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.as_ptr().add(half + at).cast())));
                let both = _mm512_cvtne2ps_pbh(wide(16), wide(0));
                _mm512_storeu_si512(to.as_mut_ptr().add(half).cast(), std::mem::transmute::<__m512bh, __m512i>(both));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::gemm::{self, Weight};
    use super::*;

    fn number(i: usize) -> f32 {
        ((i * 7919 + i / 13 * 101) % 1013) as f32 / 506.0 - 1.0
    }

    /// The product with the rounded weight, against the same weight in panels of `E` where its scale is a power of two, so that
    /// both are exact; then many rows against one.
    fn check<E: TileElement>(outputs: usize, inputs: usize) {
        let rounded: Vec<f32> =
            (0..outputs * inputs).map(|i| if i % inputs == 0 { 127.0 } else { (number(i) * 126.0).round() } * 0.25).collect();
        let (mut values, mut scales) = (vec![99i8; panels::len::<E>(outputs, inputs)], vec![f32::NAN; outputs]);
        values.fill(0);
        for start in (0..outputs).step_by(32) {
            let rows = start..outputs.min(start + 32);
            pack::<E>(&mut values, &mut scales, inputs, rows.clone(), &rounded[rows.start * inputs..rows.end * inputs]);
        }
        assert!(scales.iter().all(|scale| *scale == 0.25), "{scales:?}");
        let weight = Int8Weight { values: &values, scales: &scales, outputs, inputs };
        let mut row = vec![0.0; inputs];
        read_row::<E>(weight, outputs - 1, &mut row);
        assert_eq!(row, rounded[(outputs - 1) * inputs..]);
        let exact: Vec<E> = rounded.iter().map(|value| E::from_f32(*value)).collect();
        let mut plain = vec![E::default(); panels::len::<E>(outputs, inputs)];
        panels::pack(&mut plain, outputs, inputs, 0..outputs, &exact);
        let rows = 37;
        let x: Vec<E> = (0..rows * inputs).map(|i| E::from_f32(number(i + 5))).collect();
        let bias: Vec<E> = (0..outputs).map(|i| E::from_f32(number(i))).collect();
        let (mut got, mut want) = (vec![0.0f32; rows * outputs], vec![0.0f32; rows * outputs]);
        forward(&mut got, &x, None, weight, Some(&bias), None);
        gemm::forward(&mut want, &x, None, Weight { panels: &plain, outputs, inputs }, Some(&bias), None);
        for (got, want) in got.iter().zip(&want) {
            assert!((got - want).abs() <= 1e-4 * (1.0 + want.abs()), "{got} {want}");
        }
        for row in [0, 5, rows - 1] {
            let mut alone = vec![0.0f32; outputs];
            forward(&mut alone, &x[row * inputs..(row + 1) * inputs], None, weight, Some(&bias), None);
            assert_eq!(alone, got[row * outputs..(row + 1) * outputs], "row {row} alone");
        }
    }

    #[test]
    fn products_are_those_of_the_rounded_weight_in_any_company() {
        for (outputs, inputs) in [(1, 1), (5, 7), (33, 64), (96, 130)] {
            check::<f32>(outputs, inputs);
            check::<bf16>(outputs, inputs);
        }
    }

    #[test]
    fn rounding_is_within_half_a_step_and_zeros_stay() {
        let (outputs, inputs) = (3, 50);
        let from: Vec<f32> = (0..outputs * inputs).map(|i| if i < inputs { 0.0 } else { number(i) * i as f32 }).collect();
        let (mut values, mut scales) = (vec![0i8; panels::len::<bf16>(outputs, inputs)], vec![0.0; outputs]);
        pack::<bf16>(&mut values, &mut scales, inputs, 0..outputs, &from);
        for row in 0..outputs {
            let mut out = vec![f32::NAN; inputs];
            read_row::<bf16>(Int8Weight { values: &values, scales: &scales, outputs, inputs }, row, &mut out);
            for (out, from) in out.iter().zip(&from[row * inputs..]) {
                assert!((out - from).abs() <= scales[row] * 0.5001, "{out} {from}");
            }
        }
    }
}
