//! Packed rows times panels over all threads: the loops around the tile product (tile.rs) that gemm.rs's products share.
//! Splits rows and panels, never the reduction, and calls tiles in such an order that operands stay in the caches.
//! Does not know what rows, panels and sums mean.

use super::isa::Isa;
use super::threads::{Shared, parallel, parallel_ranges, threads};
use super::tile::{PANEL_COLUMNS, TILE_ROWS, TileArgs, TileElement, panels_abreast};
use crate::kernels::buffer::Buffer;
use std::ops::Range;

/// Units of the reduction between two visits to a tile's sums: the panel's part (48 KiB) stays close while tiles pass by.
const BLOCK_UNITS: usize = 384;

/// Most tiles of rows that one task packs and multiplies by all panels: 192 rows.
const BLOCK_TILES: usize = 16;

/// The panels of a product.
#[derive(Clone, Copy)]
pub(super) enum Panels<'a, E> {
    /// One after the other in memory.
    Stored(&'a [E]),
    /// Written by a function, given the panel's number, just before it is used: once each, as rows are not split then.
    Made(&'a (dyn Fn(usize, &mut [E]) + Sync)),
}

/// `rows` packed rows times panels, row by row of tiles and panel by panel.
pub(super) struct Product<'a, E> {
    pub(super) isa: Isa,
    pub(super) rows: usize,
    pub(super) units: usize,
    pub(super) panels: Panels<'a, E>,
    /// Number of panels.
    pub(super) columns: usize,
}

/// Sums that go on from one product to the next: `[panels][rows][32]`.
pub(super) struct Carry<'a> {
    pub(super) sums: Shared<'a, f32>,
    /// Whether there are sums to go on from.
    pub(super) add: bool,
}

/// Receives the first row, the panel and the sums `[rows][32]` of a finished piece.
pub(super) type Finish<'a> = &'a (dyn Fn(usize, usize, &[f32]) + Sync);

impl<E: TileElement> Product<'_, E> {
    /// Splits rows and panels over the threads, never the reduction.
    pub(super) fn run(&self, pack: &(impl Fn(Range<usize>, &mut [E]) + Sync), carry: Option<&Carry>, finish: Option<Finish>) {
        let row_len = self.units * E::UNIT;
        let panels = self.columns;
        let tiles = self.rows.div_ceil(TILE_ROWS);
        if tiles == 0 || panels == 0 {
            return;
        }
        let threads = threads();
        let whole = tiles <= BLOCK_TILES || matches!(self.panels, Panels::Made(_));
        let row_parts = if whole { 1 } else { (threads * tiles.div_ceil(threads * BLOCK_TILES)).min(tiles / 8) };
        let panel_parts = if row_parts >= threads { 1 } else { (2 * threads).div_ceil(row_parts).min(panels) };
        let rows_of = |part: usize| tiles * part / row_parts * TILE_ROWS..self.rows.min(tiles * (part + 1) / row_parts * TILE_ROWS);
        if panel_parts == 1 {
            parallel(row_parts, |part| {
                let rows = rows_of(part);
                let mut packed = Buffer::<E>::scratch(tiles.div_ceil(row_parts) * TILE_ROWS * row_len);
                let packed = &mut packed[..rows.len() * row_len];
                pack(rows.clone(), packed);
                self.sweep(packed, rows, 0..panels, carry, finish);
            });
            return;
        }
        // Several tasks use the same rows: pack them once, together.
        let mut packed = Buffer::<E>::scratch(self.rows * row_len);
        let shared = Shared::new(&mut packed);
        parallel_ranges(tiles, 2, |range| {
            let rows = range.start * TILE_ROWS..self.rows.min(range.end * TILE_ROWS);
            // SAFETY: parallel_ranges hands out disjoint ranges of tiles.
            pack(rows.clone(), unsafe { shared.part(rows.start * row_len..rows.end * row_len) });
        });
        parallel(row_parts * panel_parts, |task| {
            let (rows, part) = (rows_of(task / panel_parts), task % panel_parts);
            let taken = panels * part / panel_parts..panels * (part + 1) / panel_parts;
            self.sweep(&packed[rows.start * row_len..rows.end * row_len], rows, taken, carry, finish);
        });
    }

    /// Multiplies packed `rows` by the panels of `taken`.
    fn sweep(&self, packed: &[E], rows: Range<usize>, taken: Range<usize>, carry: Option<&Carry>, finish: Option<Finish>) {
        let panel_len = self.units * PANEL_COLUMNS * E::UNIT;
        let step = if carry.is_some() { 1 } else { panels_abreast(rows.len()) };
        let size = rows.len() * PANEL_COLUMNS;
        let mut own = Buffer::<f32>::scratch(if carry.is_some() { 0 } else { step * size });
        let mut made = Buffer::<E>::scratch(if matches!(self.panels, Panels::Made(_)) { step * panel_len } else { 0 });
        for p in taken.clone().step_by(step) {
            let some = p..taken.end.min(p + step);
            let b = match self.panels {
                Panels::Stored(panels) => &panels[p * panel_len..some.end * panel_len],
                Panels::Made(make) => {
                    some.clone().zip(made.chunks_exact_mut(panel_len.max(1))).for_each(|(p, panel)| make(p, panel));
                    &made[..some.len() * panel_len]
                }
            };
            let sums = match carry {
                Some(carry) => {
                    let first = (p * self.rows + rows.start) * PANEL_COLUMNS;
                    // SAFETY: tasks have disjoint pairs of rows and panels, and this one holds one part at a time.
                    unsafe { carry.sums.part(first..first + size) }
                }
                None => &mut own[..some.len() * size],
            };
            multiply(self.isa, packed, rows.len(), b, self.units, sums, carry.is_some_and(|carry| carry.add));
            if let Some(finish) = finish {
                for (p, sums) in some.zip(sums.chunks_exact(size)) {
                    finish(rows.start, p, sums);
                }
            }
        }
    }
}

/// Packed tiles of `rows` rows times neighbouring panels, each of `units`; sums are `[panels][rows][32]`.
fn multiply<E: TileElement>(isa: Isa, a: &[E], rows: usize, b: &[E], units: usize, sums: &mut [f32], add: bool) {
    let panels = sums.len() / (rows * PANEL_COLUMNS);
    assert!(isa <= Isa::best(), "{isa:?} is beyond this processor");
    assert_eq!(sums.len(), panels * rows * PANEL_COLUMNS, "sums of {panels} panels and {rows} rows");
    assert_eq!(a.len(), rows * units * E::UNIT, "{rows} packed rows of {units} units");
    assert_eq!(b.len(), panels * units * PANEL_COLUMNS * E::UNIT, "{panels} panels of {units} units");
    let (b_unit, b_panel, c_panel) = (PANEL_COLUMNS * E::UNIT, units * PANEL_COLUMNS * E::UNIT, rows * PANEL_COLUMNS);
    let abreast = panels_abreast(rows);
    // One tile meets each panel once, so nothing is gained by cutting its reduction.
    let block = if rows <= TILE_ROWS { units.max(1) } else { BLOCK_UNITS };
    for p in (0..panels).step_by(abreast) {
        for from in (0..units.max(1)).step_by(block) {
            for top in (0..rows).step_by(TILE_ROWS) {
                let height = TILE_ROWS.min(rows - top);
                let args = TileArgs {
                    a: a.as_ptr().wrapping_add((top * units + from * height) * E::UNIT),
                    a_row: E::UNIT,
                    a_unit: height * E::UNIT,
                    b: b.as_ptr().wrapping_add(p * b_panel + from * b_unit),
                    b_unit,
                    b_panel,
                    c: sums.as_mut_ptr().wrapping_add(p * c_panel + top * PANEL_COLUMNS),
                    c_row: PANEL_COLUMNS,
                    c_panel,
                    units: block.min(units - from),
                    add: add || from > 0,
                };
                // SAFETY: the processor has `isa`. The tile's `units` from `from` lie inside its `height` packed rows
                // and inside panels `p..`, of which there are at most `abreast`, the height's own limit when there is
                // one tile and 1 otherwise; its sums lie inside `sums`. The lengths are asserted above.
                unsafe { E::tile(isa, height, abreast.min(panels - p), &args) }
            }
        }
    }
}
