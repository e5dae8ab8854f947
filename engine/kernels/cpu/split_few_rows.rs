//! One tile of split f32 rows times panels. A panel then is split for a single tile, which costs more than the products: one row
//! is multiplied on vector registers, which need the parts of a panel only where they come to be; for more rows, the next group of
//! the panel is split between the products of this one. Both have the bits of a panel that is split whole.

use super::amx::SplitSums;
use super::split_f32::{GROUP_UNITS, PANEL_WORDS, ROW_WORDS, flushing, parts, quarter_of_panel};
use crate::kernels::buffer::Buffer;
use std::arch::x86_64::*;

/// How far ahead vectors ask for a panel, in values. Without asking they read at half the speed.
const AHEAD: usize = 4 * GROUP_UNITS * 32;

/// Products of parts that are added (split_f32.rs).
const PRODUCTS: usize = 6;

/// A group of a panel as it is stored: `[unit][32]`.
type Group = [f32; GROUP_UNITS * 32];

/// Packed rows of one tile, `[groups][rows][ROW_WORDS]`, ready for panels.
pub(super) struct Rows<'a> {
    packed: &'a [f32],
    rows: usize,
    /// Of one row: the parts as f32 that can be broadcast, `[groups][part][32]`.
    spread: Buffer<f32>,
}

impl<'a> Rows<'a> {
    pub(super) fn new(packed: &'a [f32], rows: usize) -> Self {
        let mut spread = Buffer::scratch(if rows == 1 { 2 * packed.len() } else { 0 });
        for (words, out) in packed.as_chunks::<16>().0.iter().zip(spread.as_chunks_mut::<32>().0) {
            let (even, odd) = out.split_at_mut(16);
            for ((even, odd), word) in even.iter_mut().zip(odd).zip(words) {
                *even = f32::from_bits(word.to_bits() << 16);
                *odd = f32::from_bits(word.to_bits() & 0xffff_0000);
            }
        }
        Self { packed, rows, spread }
    }

    /// The product with `panel`, `[units][32]` as it is stored, in `sums` `[rows][32]`; with `add`, continues them. There is a unit.
    ///
    /// # Safety
    /// This process may use AMX, and so the processor has AVX-512 F and BW.
    pub(super) unsafe fn multiply(&mut self, panel: &[f32], sums: &mut [f32], add: bool) {
        let Self { packed, rows, ref spread } = *self;
        let (groups, rest) = panel.as_chunks::<{ GROUP_UNITS * 32 }>();
        let count = groups.len() + usize::from(!rest.is_empty());
        assert_eq!(packed.len(), count * rows * ROW_WORDS, "rows of {} values", panel.len() / 32);
        assert_eq!(sums.len(), rows * 32, "sums of {rows} rows");
        let mut last: Group = [0.0; GROUP_UNITS * 32];
        if !rest.is_empty() {
            last[..rest.len()].copy_from_slice(rest);
        }
        let last = if rest.is_empty() { &[] } else { std::slice::from_ref(&last) };
        if rows > 1 {
            // SAFETY: the caller's promise; the rows have as many groups.
            flushing(|| unsafe { by_tiles(rows, packed, groups, last, sums, add) });
            return;
        }
        if !add {
            sums.fill(0.0);
        }
        let (whole, rest) = spread.split_at(groups.len() * 2 * ROW_WORDS);
        // SAFETY: the caller's promise; the rows have as many groups.
        flushing(|| unsafe {
            by_vectors(whole, groups, sums);
            by_vectors(rest, last, sums);
        });
    }
}

/// All groups of a panel in tile registers, each split while the one before is multiplied.
///
/// # Safety
/// This process may use AMX; `packed` holds `rows` rows of the groups and of `last`; `sums` has 32 values a row.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline(never)]
unsafe fn by_tiles(rows: usize, packed: &[f32], groups: &[Group], last: &[Group], sums: &mut [f32], add: bool) {
    let mut split = [const { Aligned([0.0; PANEL_WORDS]) }; 2];
    let row_words = rows * ROW_WORDS;
    let mut groups = groups.iter().chain(last);
    // SAFETY: the caller's promise. A split group is as long as it has to be.
    unsafe {
        let mut tile = SplitSums::begin(rows, sums.as_mut_ptr(), add);
        let mut next = groups.next();
        if let Some(group) = next {
            (0..4).for_each(|quarter| quarter_of_panel(group, quarter, &mut split[0].0));
        }
        for (g, packed) in packed.chunks_exact(row_words).enumerate() {
            let [even, odd] = &mut split;
            let (this, other) = if g.is_multiple_of(2) { (even, odd) } else { (odd, even) };
            next = groups.next();
            for quarter in 0..4 {
                tile.add_quarter(quarter, packed.as_ptr(), this.0.as_ptr());
                if let Some(group) = next {
                    quarter_of_panel(group, quarter, &mut other.0);
                }
            }
        }
        tile.end();
    }
}

/// Lines of the first cache, so that no row of a tile lies in two.
#[repr(align(64))]
struct Aligned<T>(T);

/// Adds the products of whole groups to `sums` `[32]`. In each column the even and the odd products of a group are a chain each, for
/// each pair of parts; the two chains are added, then their sum to the column's, pair by pair in the order of amx.rs.
///
/// # Safety
/// The processor has AVX-512 F and BW; `spread` holds a row of the groups, and `sums` 32 values.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline(never)]
unsafe fn by_vectors(spread: &[f32], groups: &[Group], sums: &mut [f32]) {
    // SAFETY: `sums` has 32 values.
    let mut totals = unsafe { [_mm512_loadu_ps(sums.as_ptr()), _mm512_loadu_ps(sums.as_ptr().add(16))] };
    for (group, spread) in groups.iter().zip(spread.as_chunks::<{ 2 * ROW_WORDS }>().0) {
        let mut halves = [[[_mm512_setzero_ps(); PRODUCTS]; 2]; 2];
        for (first, half) in [0, 16].into_iter().zip(&mut halves) {
            // A local value, which stays in registers.
            let mut chains = *half;
            for place in first..first + 16 {
                let [a0, a1, a2] = [0, 1, 2].map(|part| _mm512_set1_ps(spread[part * GROUP_UNITS + place]));
                // Line by line, as memory is read fastest.
                for (left, chains) in [0, 16].into_iter().zip(&mut chains) {
                    let at = group.as_ptr().wrapping_add(place * 32 + left);
                    // SAFETY: 16 values from column `left` of row `place` lie inside the group. A prefetch may be of any address.
                    let values = unsafe {
                        _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(AHEAD).cast());
                        _mm512_loadu_ps(at)
                    };
                    let [b0, b1, b2] = parts(values).map(|part| _mm512_castsi512_ps(part));
                    for (chain, (a, b)) in chains.iter_mut().zip([(a2, b0), (a1, b0), (a1, b1), (a0, b1), (a0, b2), (a0, b0)]) {
                        *chain = _mm512_fmadd_ps(a, b, *chain);
                    }
                }
            }
            *half = chains;
        }
        let [even, odd] = halves;
        for (total, (even, odd)) in totals.iter_mut().zip(even.into_iter().zip(odd)) {
            *total = even.into_iter().zip(odd).fold(*total, |sum, (even, odd)| _mm512_add_ps(sum, _mm512_add_ps(even, odd)));
        }
    }
    // SAFETY: as above.
    unsafe {
        _mm512_storeu_ps(sums.as_mut_ptr(), totals[0]);
        _mm512_storeu_ps(sums.as_mut_ptr().add(16), totals[1]);
    }
}

#[cfg(test)]
mod tests {
    use super::super::isa::Isa;
    use super::super::split_f32::{panel, tile_of_rows};
    use super::*;

    /// A value of any size: denormal ones, those that round up from them, and all others up to 2^60.
    fn value(i: usize, sizes: u32) -> f32 {
        let bits = (i as u32).wrapping_mul(2_654_435_761) ^ 0x2545_f491;
        let exponent = match sizes {
            0 => (i as u32 * 7) % 4,
            _ => 127 - sizes / 2 + (i as u32 * 7) % sizes,
        };
        f32::from_bits(bits & 0x807f_ffff | exponent << 23 | if i.is_multiple_of(5) { 0x007f_8000 } else { 0 })
    }

    #[test]
    fn every_number_of_rows_has_the_bits_of_a_panel_split_whole() {
        if Isa::best() != Isa::AmxBf16 {
            return;
        }
        for (rows, units, sizes) in [(1, 32, 1), (2, 96, 20), (1, 100, 120), (2, 33, 0), (1, 7, 60), (3, 64, 20), (16, 95, 9), (7, 1, 0)] {
            let values: Vec<Vec<f32>> = (0..rows).map(|r| (0..units).map(|i| value(r * 7919 + i, sizes.max(8))).collect()).collect();
            let weights: Vec<f32> = (0..units * 32).map(|i| value(i * 3 + 1, sizes)).collect();
            let groups = units.div_ceil(GROUP_UNITS);
            let mut packed = vec![0.0; groups * rows * ROW_WORDS];
            let mut split = vec![0.0; groups * PANEL_WORDS];
            // SAFETY: the processor has AVX-512; the lengths are those of the rows and the panel.
            unsafe {
                tile_of_rows(&values.iter().map(Vec::as_slice).collect::<Vec<_>>(), &mut packed);
                panel(&weights, &mut split);
            }
            for add in [false, true] {
                let start: Vec<f32> = (0..rows * 32).map(|i| value(i * 11, 30)).collect();
                let (mut got, mut want) = (start.clone(), start);
                // SAFETY: this process may use AMX; rows and panel are packed for it, and sums have 32 columns.
                unsafe {
                    Rows::new(&packed, rows).multiply(&weights, &mut got, add);
                    let mut tile = SplitSums::begin(rows, want.as_mut_ptr(), add);
                    tile.add(packed.as_ptr(), rows * ROW_WORDS, split.as_ptr(), groups);
                    tile.end();
                }
                let bits = |sums: &[f32]| sums.iter().map(|sum| sum.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&got), bits(&want), "{rows} rows of {units} units, sizes {sizes}, add {add}");
            }
        }
    }
}
