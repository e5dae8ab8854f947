//! Packed rows times panels over all threads: the loops around the tile product (tile.rs) that gemm.rs's products share.
//! Splits rows and panels, never the reduction, and calls tiles in such an order that operands stay in the caches.
//! Does not know what rows, panels and sums mean.

use super::epilogue::Fence;
use super::isa::Isa;
#[cfg(target_arch = "x86_64")]
use super::split_product;
use super::threads::{Shared, parallel, parallel_ranges, threads};
use super::tile::{AHEAD_UNITS, Layout, PANEL_COLUMNS, TileArgs, TileElement, strip_columns};
use crate::kernels::buffer::Buffer;
use std::ops::Range;

/// Units of the reduction between two visits to a tile's sums: the panel's part (16 KiB) stays in the first cache, or in the half
/// of it that a neighbour on the same core leaves, while tiles pass by. 384 units were 5 % slower.
pub(super) const BLOCK_UNITS: usize = 128;

/// Most tiles of rows that one task packs and multiplies by all panels: 192 rows.
const BLOCK_TILES: usize = 16;

/// The like on AVX2, whose processors have second caches of half a megabyte: 96 rows. In 2048 rows there are 22 tasks, of which
/// the slower core keeps the other waiting for half as long as with 12.
const AVX2_BLOCK_TILES: usize = 8;

/// The like for AMX, which is so fast that packed rows must lie in the second cache, and be many, while panels come from
/// beyond it: one core made 2.0 TFLOP/s with 512 rows of 448 units, 1.4 with 1024 (more than the cache holds) and 1.0 with 96
/// rows of 2432 units. So a long reduction is cut into slabs of at most this many units, and all panels pass by for each.
/// Split values take half as many again: sums that lie elsewhere may be visited more often, to have more rows for each split panel.
pub(super) const fn amx_slab_units(layout: Layout, is_carried: bool) -> usize {
    match layout.is_split() {
        true if is_carried => 512,
        true => 1024,
        false => 768,
    }
}

/// Bytes of packed rows of a slab that one task multiplies by all panels.
pub(super) const AMX_BLOCK_BYTES: usize = 1 << 20;

/// Panels that AMX multiplies before their sums are finished together, so that results are written in runs of 256 bytes and
/// more: a panel at a time took as long to finish as to multiply (512 rows of 9728 outputs).
const AMX_PANELS: usize = 4;

/// Tasks a thread where panels are split: what one core is slower at, others take over. With 4 a thread products of 32 to 128 rows
/// were 2 to 8 % slower on AVX2; 16 gained no more. AMX, which multiplies panels by fours, takes fewer and larger ones unless
/// there is but one tile of rows, which waits for memory: with 2 a thread one waited for the other a tenth of the time.
const TASKS: usize = 8;
const AMX_TASKS: usize = 4;

/// Rows that are finished at a time.
const FINISH_ROWS: usize = 16;

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
        let layout = E::layout(self.isa);
        let row_len = layout.row_len::<E>(self.units);
        let panels = self.columns;
        let tiles = self.rows.div_ceil(layout.rows);
        if tiles == 0 || panels == 0 {
            return;
        }
        let threads = threads();
        let block_tiles = if layout.is_for_vectors() {
            if self.isa == Isa::Avx2 { AVX2_BLOCK_TILES } else { BLOCK_TILES }
        } else {
            (AMX_BLOCK_BYTES / (self.slab(carry.is_some()) * layout.unit_bytes * layout.rows)).max(1)
        };
        let whole = tiles <= block_tiles || matches!(self.panels, Panels::Made(_));
        let row_parts = if whole { 1 } else { row_parts(tiles, threads, block_tiles, 96 / layout.rows) };
        // Tiles that lie abreast stay together.
        let abreast = layout.panels_abreast(self.rows.min(layout.rows));
        let groups = panels.div_ceil(abreast);
        let tasks = threads * if tiles == 1 || layout.is_for_vectors() { TASKS } else { AMX_TASKS };
        let panel_parts = if row_parts >= threads { 1 } else { tasks.div_ceil(row_parts).min(groups) };
        let rows_of = |part: usize| tiles * part / row_parts * layout.rows..self.rows.min(tiles * (part + 1) / row_parts * layout.rows);
        if panel_parts == 1 {
            parallel(row_parts, |part| {
                let rows = rows_of(part);
                let mut packed = Buffer::<E>::scratch(tiles.div_ceil(row_parts) * layout.rows * row_len);
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
            let rows = range.start * layout.rows..self.rows.min(range.end * layout.rows);
            // SAFETY: parallel_ranges hands out disjoint ranges of tiles.
            pack(rows.clone(), unsafe { shared.part(rows.start * row_len..rows.end * row_len) });
        });
        parallel(row_parts * panel_parts, |task| {
            let (rows, part) = (rows_of(task / panel_parts), task % panel_parts);
            let taken = groups * part / panel_parts * abreast..panels.min(groups * (part + 1) / panel_parts * abreast);
            self.sweep(&packed[rows.start * row_len..rows.end * row_len], rows, taken, carry, finish);
        });
    }

    /// Units of the reduction that many rows go through before the next: all, or on AMX equal parts of whole groups.
    fn slab(&self, is_carried: bool) -> usize {
        let layout = E::layout(self.isa);
        if layout.is_for_vectors() {
            return self.units.max(1);
        }
        let groups = self.units.div_ceil(layout.units).max(1);
        let slabs = groups.div_ceil(amx_slab_units(layout, is_carried) / layout.units);
        groups.div_ceil(slabs) * layout.units
    }

    /// Multiplies packed `rows` by the panels of `taken`.
    fn sweep(&self, packed: &[E], rows: Range<usize>, taken: Range<usize>, carry: Option<&Carry>, finish: Option<Finish>) {
        #[cfg(target_arch = "x86_64")]
        let _release = super::amx::Release;
        let _fence = Fence;
        let panel_len = self.units * PANEL_COLUMNS * E::UNIT;
        let is_made = matches!(self.panels, Panels::Made(_));
        // Few rows stay in the cache whatever their length, and a panel is made but once.
        let slab = if is_made || size_of_val(packed) <= AMX_BLOCK_BYTES { self.units.max(1) } else { self.slab(carry.is_some()) };
        let slabs = self.units.div_ceil(slab).max(1);
        let step = if carry.is_some() {
            1
        } else if E::layout(self.isa).is_for_vectors() || is_made {
            E::layout(self.isa).panels_abreast(rows.len())
        } else {
            AMX_PANELS
        };
        let size = rows.len() * PANEL_COLUMNS;
        let kept = if slabs > 1 { taken.len() } else { step };
        let mut own = Buffer::<f32>::scratch(if carry.is_some() { 0 } else { kept * size });
        let mut made = Buffer::<E>::scratch(if is_made { step * panel_len } else { 0 });
        for from in (0..slabs).map(|index| index * slab) {
            let units = from..self.units.min(from + slab);
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
                    None if slabs > 1 => &mut own[(p - taken.start) * size..][..some.len() * size],
                    None => &mut own[..some.len() * size],
                };
                let add = from > 0 || carry.is_some_and(|carry| carry.add);
                multiply(self.isa, packed, rows.len(), b, self.units, units.clone(), sums, add);
                let Some(finish) = finish.filter(|_| units.end == self.units) else { continue };
                // The rows of a result may be pages apart: some of them at a time, and of each all that there is.
                for top in (0..rows.len()).step_by(FINISH_ROWS) {
                    let part = top * PANEL_COLUMNS..rows.len().min(top + FINISH_ROWS) * PANEL_COLUMNS;
                    for (p, sums) in some.clone().zip(sums.chunks_exact(size)) {
                        finish(rows.start + top, p, &sums[part.clone()]);
                    }
                }
            }
        }
    }
}

/// Parts that `tiles` of rows are cut into: of at most `block` tiles where that leaves each about `least`, and as many for each
/// thread, rather larger ones than too many. Of 43 tiles, the 512 inputs of a weight's gradient, 5 parts took two threads a tenth
/// longer than 4, and 6 were no better.
fn row_parts(tiles: usize, threads: usize, block: usize, least: usize) -> usize {
    let (parts, most) = (threads * tiles.div_ceil(threads * block), (tiles / least).max(1));
    if most < threads { most } else { parts.min((most + threads / 4) / threads * threads) }
}

/// Units `part` of packed tiles of `rows` rows times those of neighbouring panels, each of `units`; sums are
/// `[panels][rows][32]`.
#[allow(clippy::too_many_arguments, reason = "the operands of one block")]
fn multiply<E: TileElement>(isa: Isa, a: &[E], rows: usize, b: &[E], units: usize, part: Range<usize>, sums: &mut [f32], add: bool) {
    let layout = E::layout(isa);
    let panels = sums.len() / (rows * PANEL_COLUMNS);
    assert!(isa <= Isa::best(), "{isa:?} is beyond this processor");
    assert_eq!(sums.len(), panels * rows * PANEL_COLUMNS, "sums of {panels} panels and {rows} rows");
    let (row_len, group_len) = (layout.row_len::<E>(units), layout.group_len::<E>());
    assert_eq!(a.len(), rows * row_len, "{rows} packed rows of {units} units");
    assert_eq!(b.len(), panels * units * PANEL_COLUMNS * E::UNIT, "{panels} panels of {units} units");
    assert!(part.start <= part.end && part.end <= units, "units {part:?} of {units}");
    assert_eq!(part.start % layout.units, 0, "a reduction cut inside a group");
    assert!(part.end == units || part.end.is_multiple_of(layout.units), "a reduction cut inside a group");
    #[cfg(target_arch = "x86_64")]
    if layout.is_split() {
        let (a, b) = (bytemuck::cast_slice(a), bytemuck::cast_slice(b));
        // SAFETY: a form that splits is AMX, and the processor has it.
        return unsafe { split_product::multiply(a, rows, b, units, part, sums, add) };
    }
    let (b_unit, b_panel, c_panel) = (PANEL_COLUMNS * E::UNIT, units * PANEL_COLUMNS * E::UNIT, rows * PANEL_COLUMNS);
    let abreast = layout.panels_abreast(rows);
    let (tiles, strip) = (rows.div_ceil(layout.rows), strip_columns::<E>(isa, rows));
    let strips = PANEL_COLUMNS / strip;
    // One tile meets each panel once, so nothing is gained by cutting its reduction, unless the panel is taken in strips.
    let is_single = tiles * strips == 1;
    let block = if is_single { part.len().max(1) } else { BLOCK_UNITS * strips };
    let unit_bytes = b_unit * size_of::<E>();
    // One tile asks for what it comes to next; of many, each for its share of the next block.
    let share = if is_single { unit_bytes } else { unit_bytes / (tiles * strips) };
    for p in (0..panels).step_by(abreast) {
        for from in (part.start..part.end.max(part.start + 1)).step_by(block) {
            let at = b.as_ptr().wrapping_add(p * b_panel + from * b_unit);
            let group = from / layout.units * group_len;
            let mut ahead = at.wrapping_add(if is_single { AHEAD_UNITS } else { block } * b_unit);
            for (left, top) in (0..strips).flat_map(|number| (0..rows).step_by(layout.rows).map(move |top| (number * strip, top))) {
                let height = layout.rows.min(rows - top);
                let args = TileArgs {
                    a: a.as_ptr().wrapping_add(top * row_len + group * height),
                    a_row: group_len,
                    a_unit: height * group_len,
                    b: at.wrapping_add(left * E::UNIT),
                    b_unit,
                    b_panel,
                    columns: strip,
                    c: sums.as_mut_ptr().wrapping_add(p * c_panel + top * PANEL_COLUMNS + left),
                    c_row: PANEL_COLUMNS,
                    c_panel,
                    units: block.min(part.end - from),
                    ahead,
                    ahead_unit: share,
                    add: add || from > part.start,
                };
                ahead = ahead.wrapping_byte_add(block * share);
                // SAFETY: the processor has `isa`. The tile's `units` from `from`, a multiple of a group, lie inside its
                // `height` packed rows, whose last group is whole, and inside panels `p..`, of which there are at most
                // `abreast`: the height's own limit when there is one tile, and 1 when there are more. The strip's
                // columns are some of the panel's, and its sums lie inside `sums`. The lengths are asserted above.
                unsafe { E::tile(isa, height, abreast.min(panels - p), &args) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::row_parts;

    #[test]
    fn every_thread_has_as_many_parts() {
        // Tiles, threads, most and least tiles of a part; parts.
        for (tiles, threads, block, least, want) in [
            (43, 2, 8, 8, 4),
            (43, 2, 16, 8, 4),
            (171, 2, 8, 8, 20),
            (171, 16, 8, 8, 16),
            (248, 16, 8, 8, 32),
            (17, 2, 8, 8, 2),
            (9, 2, 8, 8, 1),
            (6, 2, 5, 6, 1),
            (4, 8, 1, 6, 1),
        ] {
            assert_eq!(row_parts(tiles, threads, block, least), want, "{tiles} tiles for {threads} threads");
        }
    }
}
