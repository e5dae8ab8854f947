//! Split rows times panels of f32 (split_f32.rs), as a part of product.rs's loops: a block of a panel is split, then all tiles of rows
//! pass over it while it stays in the first cache. The rows of one tile have ways of their own (split_few_rows.rs).

use super::product::BLOCK_UNITS;
use super::split_f32::{GROUP_UNITS, PANEL_WORDS, ROW_WORDS};
use super::tile::PANEL_COLUMNS;
use super::{amx, split_f32, split_few_rows};
use crate::kernels::buffer::Buffer;
use std::ops::Range;

/// Units `part` of `rows` split rows times those of neighbouring panels, each of `units`; `sums` are `[panels][rows][32]`.
///
/// - `a`: `rows` rows packed as `Layout::SPLIT` says; `panels`: as stored
/// - `part`: begins at a group
/// - `add`: continue the sums
///
/// # Safety
/// This process may use AMX; the lengths are those of the shapes.
pub(super) unsafe fn multiply(a: &[f32], rows: usize, panels: &[f32], units: usize, part: Range<usize>, sums: &mut [f32], add: bool) {
    let panels = panels.chunks_exact((units * PANEL_COLUMNS).max(1));
    let sums = sums.chunks_exact_mut(rows * PANEL_COLUMNS);
    if part.is_empty() {
        sums.filter(|_| !add).for_each(|sums| sums.fill(0.0));
        return;
    }
    let row_words = rows * ROW_WORDS;
    let taken = part.start * PANEL_COLUMNS..part.end * PANEL_COLUMNS;
    if rows <= amx::TILE_ROWS {
        let a = &a[part.start / GROUP_UNITS * row_words..part.end.div_ceil(GROUP_UNITS) * row_words];
        let mut tile = split_few_rows::Rows::new(a, rows);
        for (panel, sums) in panels.zip(sums) {
            // SAFETY: this process may use AMX.
            unsafe { tile.multiply(&panel[taken.clone()], sums, add) };
        }
        return;
    }
    let row_len = units.div_ceil(GROUP_UNITS) * ROW_WORDS;
    let mut block = Buffer::<f32>::scratch(BLOCK_UNITS / GROUP_UNITS * PANEL_WORDS);
    for (panel, sums) in panels.zip(sums) {
        for from in part.clone().step_by(BLOCK_UNITS) {
            let taken = from..part.end.min(from + BLOCK_UNITS);
            // SAFETY: AMX comes with AVX-512; `block` holds the groups of a block.
            unsafe { split_f32::panel(&panel[taken.start * PANEL_COLUMNS..taken.end * PANEL_COLUMNS], &mut block) };
            for (index, sums) in sums.chunks_mut(amx::TILE_ROWS * PANEL_COLUMNS).enumerate() {
                let height = sums.len() / PANEL_COLUMNS;
                let (first, row_words) = (index * amx::TILE_ROWS * row_len + from / GROUP_UNITS * height * ROW_WORDS, height * ROW_WORDS);
                let groups = taken.len().div_ceil(GROUP_UNITS);
                let rows = &a[first..first + groups * row_words];
                // SAFETY: this process may use AMX; `rows`, `block` and `sums` are as long as they have to be.
                unsafe {
                    let mut tile = amx::SplitSums::begin(height, sums.as_mut_ptr(), add || from > part.start);
                    tile.add(rows.as_ptr(), row_words, block.as_ptr(), groups);
                    tile.end();
                }
            }
        }
    }
}
