//! How the weight of a linear layer lies in memory, for good: in panels of 32 outputs, so that products read it in one
//! stream and nothing is packed again. Also the ways in and out: rows of a checkpoint, a row of an embedding.
//!
//! `W` `[n outputs, k inputs]` is `ceil(n / 32)` panels, one after the other. Column `j` of panel `p` is output
//! `p * 32 + j`; the inputs run down the panel; columns past `n` are zero.
//! - f32, and everything kept beside a weight in f32 (master copy, gradient, moments): `[k][32]` a panel;
//! - bf16: `[ceil(k / 2)][32][2]`, pairs along the inputs as `vdpbf16ps` wants them, with a zero after an odd last input.

use super::threads::{Shared, parallel_ranges};
use super::tile::{PANEL_COLUMNS, TileElement};
use crate::kernels::element::{Element, Float};
use crate::vectorised;
use half::bf16;
use std::ops::Range;

/// Elements of a weight `[n, k]` in panels of `E`.
pub fn len<E: TileElement>(n: usize, k: usize) -> usize {
    n.div_ceil(PANEL_COLUMNS) * panel_len::<E>(k)
}

/// [`len`] in f32.
pub fn len_f32(n: usize, k: usize) -> usize {
    len::<f32>(n, k)
}

/// [`len`] in bf16.
pub fn len_bf16(n: usize, k: usize) -> usize {
    len::<bf16>(n, k)
}

/// Elements of one panel of `k` inputs.
pub(super) fn panel_len<E: TileElement>(k: usize) -> usize {
    E::units(k) * PANEL_COLUMNS * E::UNIT
}

/// Where output `row`'s input 0 lies; its units follow [`PANEL_COLUMNS`] units apart.
fn row_start<E: TileElement>(row: usize, k: usize) -> usize {
    row / PANEL_COLUMNS * panel_len::<E>(k) + row % PANEL_COLUMNS * E::UNIT
}

fn check_rows<E: TileElement>(panels: usize, n: usize, k: usize, rows: &Range<usize>, values: usize) {
    assert_eq!(panels, len::<E>(n, k), "panels of [{n}, {k}]");
    assert!(rows.start <= rows.end && rows.end <= n, "rows {rows:?} of {n}");
    assert_eq!(values, rows.len() * k, "values of rows {rows:?} with {k} inputs");
}

/// Writes outputs `rows` of a weight `[n, k]` from `values` `[rows, k]`, row-major; other outputs keep theirs. Padding
/// of the panels is set to zero where it touches `rows`, and after the last output when `rows` ends there.
pub fn pack<E: TileElement>(panels: &mut [E], n: usize, k: usize, rows: Range<usize>, values: &[E]) {
    check_rows::<E>(panels.len(), n, k, &rows, values.len());
    if k == 0 || rows.is_empty() {
        return;
    }
    // Whole panels a task: two tasks never write the same one.
    let touched = rows.start / PANEL_COLUMNS..rows.end.div_ceil(PANEL_COLUMNS);
    let size = panel_len::<E>(k);
    let panels = Shared::new(panels);
    parallel_ranges(touched.len(), 1, |range| {
        for p in touched.start + range.start..touched.start + range.end {
            // SAFETY: each panel belongs to one range, and ranges are disjoint.
            let panel = unsafe { panels.part(p * size..(p + 1) * size) };
            let columns = rows.start.max(p * PANEL_COLUMNS)..rows.end.min((p + 1) * PANEL_COLUMNS);
            let last = if rows.end == n && columns.end == n { (p + 1) * PANEL_COLUMNS } else { columns.end };
            for (u, unit) in panel.chunks_exact_mut(PANEL_COLUMNS * E::UNIT).enumerate() {
                for row in columns.start..last {
                    for i in 0..E::UNIT {
                        let column = u * E::UNIT + i;
                        let inside = row < columns.end && column < k;
                        let value = if inside { values[(row - rows.start) * k + column] } else { E::default() };
                        unit[(row - p * PANEL_COLUMNS) * E::UNIT + i] = value;
                    }
                }
            }
        }
    });
}

/// Copies outputs `rows` of a weight `[n, k]` to `values` `[rows, k]`, row-major.
pub fn unpack<E: TileElement>(panels: &[E], n: usize, k: usize, rows: Range<usize>, values: &mut [E]) {
    check_rows::<E>(panels.len(), n, k, &rows, values.len());
    if k == 0 {
        return;
    }
    let values = Shared::new(values);
    parallel_ranges(rows.len(), PANEL_COLUMNS, |range| {
        for i in range {
            // SAFETY: each row belongs to one range, and ranges are disjoint.
            let out = unsafe { values.part(i * k..(i + 1) * k) };
            read_row(panels, k, rows.start + i, out);
        }
    });
}

/// Copies output `row` `[k]`: the vector of a token, when the weight is an embedding.
pub fn read_row<E: TileElement>(panels: &[E], k: usize, row: usize, out: &mut [E]) {
    assert_eq!(out.len(), k, "a row of {k} inputs");
    assert!(panels.len() >= (row / PANEL_COLUMNS + 1) * panel_len::<E>(k), "row {row} lies beyond {} elements", panels.len());
    let panel = &panels[row_start::<E>(row, k)..];
    for (i, value) in out.iter_mut().enumerate() {
        *value = panel[i / E::UNIT * PANEL_COLUMNS * E::UNIT + i % E::UNIT];
    }
}

/// Adds `values` `[k]` to output `row` of a gradient in f32 panels: the gradient of one looked-up embedding.
pub fn add_to_row<E: Float>(panels: &mut [f32], k: usize, row: usize, values: &[E]) {
    assert_eq!(values.len(), k, "a row of {k} inputs");
    assert!(panels.len() >= (row / PANEL_COLUMNS + 1) * panel_len::<f32>(k), "row {row} lies beyond {} elements", panels.len());
    let panel = &mut panels[row_start::<f32>(row, k)..];
    for (sum, value) in panel.iter_mut().step_by(PANEL_COLUMNS).zip(values) {
        *sum += value.to_f32();
    }
}

/// Rounds a weight `[n, k]` in f32 panels to bf16 panels.
pub fn round_to_bf16(master: &[f32], n: usize, k: usize, panels: &mut [bf16]) {
    assert_eq!(master.len(), len_f32(n, k), "f32 panels of [{n}, {k}]");
    assert_eq!(panels.len(), len_bf16(n, k), "bf16 panels of [{n}, {k}]");
    let (from, to) = (panel_len::<f32>(k), panel_len::<bf16>(k));
    let panels = Shared::new(panels);
    parallel_ranges(n.div_ceil(PANEL_COLUMNS), 1, |range| {
        for p in range {
            // SAFETY: each panel belongs to one range, and ranges are disjoint.
            round_panel(&master[p * from..(p + 1) * from], unsafe { panels.part(p * to..(p + 1) * to) });
        }
    });
}

/// Widens a weight `[n, k]` in bf16 panels to f32 panels, exactly.
pub fn widen_to_f32(panels: &[bf16], n: usize, k: usize, master: &mut [f32]) {
    assert_eq!(panels.len(), len_bf16(n, k), "bf16 panels of [{n}, {k}]");
    assert_eq!(master.len(), len_f32(n, k), "f32 panels of [{n}, {k}]");
    let (from, to) = (panel_len::<bf16>(k), panel_len::<f32>(k));
    let master = Shared::new(master);
    parallel_ranges(n.div_ceil(PANEL_COLUMNS), 1, |range| {
        for p in range {
            // SAFETY: each panel belongs to one range, and ranges are disjoint.
            widen_panel(&panels[p * from..(p + 1) * from], unsafe { master.part(p * to..(p + 1) * to) });
        }
    });
}

vectorised! {
    /// One panel: two rows of 32 become 32 pairs, the second row zero after an odd last input.
    fn round_panel(master: &[f32], panel: &mut [bf16]) {
        for (rows, pairs) in master.chunks(2 * PANEL_COLUMNS).zip(panel.chunks_exact_mut(2 * PANEL_COLUMNS)) {
            let (even, odd) = rows.split_at(PANEL_COLUMNS);
            let odd = odd.first_chunk().unwrap_or(&[0.0; PANEL_COLUMNS]);
            for ((pair, even), odd) in pairs.chunks_exact_mut(2).zip(even).zip(odd) {
                pair[0] = <bf16 as Element>::from_f32(*even);
                pair[1] = <bf16 as Element>::from_f32(*odd);
            }
        }
    }
}

vectorised! {
    /// One panel: 32 pairs become two rows of 32, or one after an odd last input.
    fn widen_panel(panel: &[bf16], master: &mut [f32]) {
        for (pairs, rows) in panel.chunks_exact(2 * PANEL_COLUMNS).zip(master.chunks_mut(2 * PANEL_COLUMNS)) {
            for (half, row) in rows.chunks_exact_mut(PANEL_COLUMNS).enumerate() {
                for (value, pair) in row.iter_mut().zip(pairs.chunks_exact(2)) {
                    *value = Element::to_f32(pair[half]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: [(usize, usize); 6] = [(1, 1), (7, 33), (32, 8), (33, 7), (70, 5), (96, 64)];

    fn rows<E: Element>(n: usize, k: usize) -> Vec<E> {
        (0..n * k).map(|i| E::from_f32((i % 251) as f32 - 100.0)).collect()
    }

    fn round_trip<E: TileElement>() {
        for (n, k) in SIZES {
            let values = rows::<E>(n, k);
            let mut panels = vec![E::from_f32(9.0); len::<E>(n, k)];
            pack(&mut panels, n, k, 0..n, &values);
            let padding = panels.len() - n * k;
            assert!(panels.iter().filter(|v| **v == E::default()).count() >= padding, "padding of [{n}, {k}]");
            let mut back = vec![E::default(); n * k];
            unpack(&panels, n, k, 0..n, &mut back);
            assert_eq!(back, values);
            // In two parts that meet inside a panel: the same panels.
            let cut = n / 2;
            let mut parts = vec![E::from_f32(9.0); panels.len()];
            pack(&mut parts, n, k, cut..n, &values[cut * k..]);
            pack(&mut parts, n, k, 0..cut, &values[..cut * k]);
            assert!(parts == panels, "[{n}, {k}] in two parts");
            let mut part = vec![E::default(); (n - cut) * k];
            unpack(&panels, n, k, cut..n, &mut part);
            assert_eq!(part, values[cut * k..]);
            let mut row = vec![E::default(); k];
            read_row(&panels, k, n - 1, &mut row);
            assert_eq!(row, values[(n - 1) * k..]);
        }
    }

    #[test]
    fn rows_go_in_and_come_out_in_any_range() {
        round_trip::<f32>();
        round_trip::<bf16>();
    }

    #[test]
    fn panels_lie_as_the_header_says() {
        // Output 33, input 2 of a [34, 3] weight: panel 1, column 1.
        let mut values = vec![0.0; 34 * 3];
        values[33 * 3 + 2] = 5.0;
        let mut panels = vec![0.0; len_f32(34, 3)];
        pack(&mut panels, 34, 3, 0..34, &values);
        assert_eq!(panels.iter().position(|v| *v == 5.0), Some(3 * 32 + 2 * 32 + 1));
        let mut pairs = vec![bf16::ONE; len_bf16(34, 3)];
        round_to_bf16(&panels, 34, 3, &mut pairs);
        assert_eq!(pairs.iter().position(|v| v.to_f32() == 5.0), Some(2 * 32 * 2 + (32 + 1) * 2));
        assert_eq!(pairs.iter().filter(|v| v.to_f32() != 0.0).count(), 1);
        let mut wide = vec![1.0; panels.len()];
        widen_to_f32(&pairs, 34, 3, &mut wide);
        assert_eq!(wide, panels);
        add_to_row(&mut wide, 3, 33, &[bf16::ZERO, bf16::ONE, bf16::ONE]);
        assert_eq!((wide[3 * 32 + 32 + 1], wide[3 * 32 + 2 * 32 + 1]), (1.0, 6.0));
    }
}
