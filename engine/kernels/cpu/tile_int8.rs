//! The tile product of integers: rows of 16 bits times a panel of 32 columns of signed bytes. Sums are exact, so that every form gives
//! the same bits, and a product may choose among them by its number of rows. Knows no scales; int8.rs does.
//!
//! Inputs come in groups of 64, all whole.
//! - packed rows: `[groups][rows][128 bytes]`. Of a group a row has 64 words, or, where instructions multiply bytes, two *planes* of 64:
//!   the upper and the lower bytes of its values plus [`PLANES_OFFSET`], which makes both unsigned
//! - a panel: `[groups][16][32][4]`, four neighbouring inputs of a column together, as `vpdpbusd` and AMX want them
//! - sums: `[rows][2][32]`; the first of two counts 256 times

use super::isa::Isa;
use super::tile::PANEL_COLUMNS;
#[cfg(target_arch = "x86_64")]
use super::{amx, tile::TileArgs};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Inputs of a group: a row of an AMX register.
pub(super) const GROUP: usize = 64;

/// Inputs that lie together in a panel.
pub(super) const TOGETHER: usize = 4;

/// Bytes of a group of a panel.
pub(super) const PANEL_GROUP: usize = GROUP * PANEL_COLUMNS;

/// Added to a value whose bytes are to be unsigned.
pub(super) const PLANES_OFFSET: i32 = 32_768;

/// Most rows of a tile in any form.
pub(super) const TILE_ROWS_MAX: usize = 8;

/// Most rows of a tile on vector registers: of 12 planes 12 x 2 sums, 2 vectors of the panel and a broadcast fill the 32 of AVX-512.
const VECTOR_ROWS: usize = 6;

/// The ways to compute a tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Portable,
    Avx2,
    /// `vpdpbusd` on AVX-512.
    Vnni,
    Amx,
}

impl Form {
    /// The fastest with instructions `isa` for a product of `rows`.
    pub(super) fn of(isa: Isa, rows: usize) -> Self {
        match isa {
            Isa::AmxBf16 if rows > VECTOR_ROWS => Self::Amx,
            Isa::AmxBf16 | Isa::Avx512Bf16 => Self::Vnni,
            Isa::Avx512 | Isa::Avx2 => Self::Avx2,
            Isa::Portable => Self::Portable,
        }
    }

    /// Most rows of a tile.
    pub(super) const fn rows(self) -> usize {
        if matches!(self, Self::Amx) { TILE_ROWS_MAX } else { VECTOR_ROWS }
    }

    /// Whether packed rows are planes, not words.
    pub(super) const fn takes_planes(self) -> bool {
        matches!(self, Self::Vnni | Self::Amx)
    }
}

/// Writes the sums of `rows` packed rows times a panel, in a form that this processor has. At most 66,311 inputs fit them. A tile that
/// meets panels `alone` asks for the next ones.
pub(super) fn tile(form: Form, rows: usize, a: &[u8], panel: &[i8], sums: &mut [i32], alone: bool) {
    let groups = panel.len() / PANEL_GROUP;
    assert!((1..=form.rows()).contains(&rows), "a tile of {rows} rows");
    assert_eq!(panel.len(), groups * PANEL_GROUP, "a panel of whole groups");
    assert_eq!(a.len(), groups * rows * 2 * GROUP, "{rows} packed rows of {groups} groups");
    assert_eq!(sums.len(), rows * 2 * PANEL_COLUMNS, "sums of {rows} rows");
    #[cfg(target_arch = "x86_64")]
    {
        let (a, panel, to) = (a.as_ptr(), panel.as_ptr(), sums.as_mut_ptr());
        // SAFETY: `Form::of` names only forms of instructions that `isa()` has found. The lengths asserted above are those that
        // the forms read and write.
        unsafe {
            match form {
                Form::Amx => {
                    let (columns, units, planes) = (PANEL_COLUMNS, groups * GROUP / TOGETHER, 2 * rows);
                    return amx::int8_tile(
                        planes,
                        &TileArgs {
                            a: a.cast(),
                            a_row: GROUP,
                            a_unit: planes * GROUP,
                            b: panel,
                            b_unit: columns * TOGETHER,
                            b_panel: 0,
                            columns,
                            c: to.cast(),
                            c_row: columns,
                            c_panel: 0,
                            units,
                            ahead: panel.wrapping_add(2 * PANEL_GROUP),
                            ahead_unit: if alone { columns * TOGETHER } else { 0 },
                            add: false,
                        },
                    );
                }
                Form::Vnni => {
                    return match rows {
                        1 => vnni::<2>(a, panel, groups, to),
                        2 => vnni::<4>(a, panel, groups, to),
                        3 => vnni::<6>(a, panel, groups, to),
                        4 => vnni::<8>(a, panel, groups, to),
                        5 => vnni::<10>(a, panel, groups, to),
                        _ => vnni::<{ 2 * VECTOR_ROWS }>(a, panel, groups, to),
                    };
                }
                Form::Avx2 => return avx2(rows, a.cast(), panel, groups, to, alone),
                Form::Portable => {}
            }
        }
    }
    portable(rows, a, panel, sums);
}

/// The two numbers of a sum.
fn in_two(sum: i64) -> [i32; 2] {
    [(sum >> 8) as i32, (sum & 255) as i32]
}

fn portable(rows: usize, a: &[u8], panel: &[i8], sums: &mut [i32]) {
    let mut totals = [[0i64; PANEL_COLUMNS]; TILE_ROWS_MAX];
    for (a, panel) in a.chunks_exact(rows * 2 * GROUP).zip(panel.chunks_exact(PANEL_GROUP)) {
        for (row, totals) in a.chunks_exact(2 * GROUP).zip(&mut totals) {
            for (words, unit) in row.as_chunks::<{ 2 * TOGETHER }>().0.iter().zip(panel.chunks_exact(PANEL_COLUMNS * TOGETHER)) {
                for (total, column) in totals.iter_mut().zip(unit.as_chunks::<TOGETHER>().0) {
                    let words = words.as_chunks::<2>().0.iter().map(|word| i32::from(i16::from_ne_bytes(*word)));
                    *total += words.zip(column).map(|(word, weight)| i64::from(word * i32::from(*weight))).sum::<i64>();
                }
            }
        }
    }
    write_totals(&totals[..rows], sums);
}

fn write_totals(totals: &[[i64; PANEL_COLUMNS]], sums: &mut [i32]) {
    for (totals, sums) in totals.iter().zip(sums.chunks_exact_mut(2 * PANEL_COLUMNS)) {
        for (column, total) in totals.iter().enumerate() {
            [sums[column], sums[PANEL_COLUMNS + column]] = in_two(*total);
        }
    }
}

/// # Safety
/// The processor has AVX-512 F and VNNI; `a` is `groups` groups of `PLANES` planes, `panel` as many of a panel, `sums`
/// `[PLANES][32]`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn vnni<const PLANES: usize>(mut a: *const u8, mut panel: *const i8, groups: usize, to: *mut i32) {
    // Bytes of the panel that are asked for ahead of time, into the second cache and from there into the first: a step of the
    // 0.5B shape multiplied for 19 ms with both, for 20.5 with the second cache alone, 4 KiB ahead, and for 28 without.
    const FAR: usize = 8192;
    const NEAR: usize = 1024;
    let mut sums = [[_mm512_setzero_si512(); 2]; PLANES];
    for _ in 0..groups {
        for unit in 0..GROUP / TOGETHER {
            for line in [0, 64] {
                _mm_prefetch::<_MM_HINT_T1>(panel.wrapping_add(FAR + line));
                _mm_prefetch::<_MM_HINT_T0>(panel.wrapping_add(NEAR + line));
            }
            // SAFETY: the caller's promise: 128 bytes of this unit of the panel, and 4 of each plane of this group.
            unsafe {
                let columns = [_mm512_loadu_si512(panel.cast()), _mm512_loadu_si512(panel.add(64).cast())];
                for (plane, sums) in sums.iter_mut().enumerate() {
                    let some = _mm512_set1_epi32(a.add(plane * GROUP + unit * TOGETHER).cast::<i32>().read_unaligned());
                    for (sum, columns) in sums.iter_mut().zip(columns) {
                        *sum = _mm512_dpbusd_epi32(*sum, some, columns);
                    }
                }
            }
            panel = panel.wrapping_add(PANEL_COLUMNS * TOGETHER);
        }
        a = a.wrapping_add(PLANES * GROUP);
    }
    for (index, sum) in sums.as_flattened().iter().enumerate() {
        // SAFETY: the caller's promise: 16 sums of each half of a plane.
        unsafe { _mm512_storeu_si512(to.add(index * 16).cast(), *sum) };
    }
}

/// Groups whose sums fit 32 bits: of 512 inputs, each product at most 32,767 x 127.
#[cfg(target_arch = "x86_64")]
const EXACT_GROUPS: usize = 8;

/// Weights are widened to 16 bits, and `vpmaddwd` adds two products. `vpmaddubsw` would be one instruction for three, but its sums of
/// 16 bits overflow.
///
/// # Safety
/// The processor has AVX2; `a` is `groups` groups of `rows` rows of words, `panel` as many of a panel, `to` `[rows][2][32]`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn avx2(rows: usize, a: *const i16, panel: *const i8, groups: usize, to: *mut i32, alone: bool) {
    let mut totals = [[0i64; PANEL_COLUMNS]; TILE_ROWS_MAX];
    let ahead = if alone { AHEAD_BYTES } else { 0 };
    for from in (0..groups).step_by(EXACT_GROUPS) {
        let mut block = Words {
            a: a.wrapping_add(from * rows * GROUP),
            a_group: rows * GROUP,
            panel: panel.wrapping_add(from * PANEL_GROUP),
            groups: EXACT_GROUPS.min(groups - from),
            ahead,
        };
        for top in (0..rows).step_by(2) {
            let totals = &mut totals[top..];
            // SAFETY: the caller's promise; these are some of its groups, rows and columns.
            unsafe {
                if rows - top == 1 {
                    add_words::<1, 8>(&block, totals, 0);
                } else {
                    add_words::<2, 4>(&block, totals, 0);
                    add_words::<2, 4>(&block, totals, PANEL_COLUMNS / 2);
                }
            }
            block.a = block.a.wrapping_add(2 * GROUP);
        }
    }
    // SAFETY: the caller's promise.
    write_totals(&totals[..rows], unsafe { std::slice::from_raw_parts_mut(to, rows * 2 * PANEL_COLUMNS) });
}

/// Bytes of a panel that are asked for ahead of time by a tile that meets it alone.
#[cfg(target_arch = "x86_64")]
const AHEAD_BYTES: usize = 4096;

/// Some groups of a tile's rows from one on, and of a panel.
#[cfg(target_arch = "x86_64")]
struct Words {
    a: *const i16,
    /// Words from a group of `a` to the next.
    a_group: usize,
    panel: *const i8,
    groups: usize,
    /// Bytes from what is read to what is asked for, or 0.
    ahead: usize,
}

/// Adds `ROWS` rows times columns `left..left + 4 * FOURS` to their totals.
///
/// # Safety
/// The processor has AVX2; the block's rows and columns exist, in at most [`EXACT_GROUPS`] groups.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn add_words<const ROWS: usize, const FOURS: usize>(block: &Words, totals: &mut [[i64; PANEL_COLUMNS]], left: usize) {
    let Words { mut a, a_group, panel, groups, ahead } = *block;
    let mut panel = panel.wrapping_add(left * TOGETHER);
    // Of each row and four columns: two sums a column, of its first two inputs and of its last two.
    let mut sums = [[_mm256_setzero_si256(); FOURS]; ROWS];
    for _ in 0..groups {
        for unit in 0..GROUP / TOGETHER {
            if ahead > 0 {
                for line in (0..16 * FOURS).step_by(64) {
                    _mm_prefetch::<_MM_HINT_T0>(panel.wrapping_add(ahead + line));
                }
            }
            // SAFETY: the caller's promise: so many columns of this unit, and 4 words of each row.
            unsafe {
                let mut columns = [_mm256_setzero_si256(); FOURS];
                for (four, columns) in columns.iter_mut().enumerate() {
                    *columns = _mm256_cvtepi8_epi16(_mm_loadu_si128(panel.add(four * 16).cast()));
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let row = _mm256_set1_epi64x(a.add(r * GROUP + unit * TOGETHER).cast::<i64>().read_unaligned());
                    for (sum, columns) in sums.iter_mut().zip(columns) {
                        *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(row, columns));
                    }
                }
            }
            panel = panel.wrapping_add(PANEL_COLUMNS * TOGETHER);
        }
        a = a.wrapping_add(a_group);
    }
    for (sums, totals) in sums.into_iter().zip(totals) {
        let mut put = |eight: usize| {
            let both = _mm256_hadd_epi32(sums[2 * eight], sums[2 * eight + 1]);
            let ordered = _mm256_permute4x64_epi64::<0b11_01_10_00>(both);
            let fours = [_mm256_castsi256_si128(ordered), _mm256_extracti128_si256::<1>(ordered)];
            for (four, totals) in fours.into_iter().zip(totals[left + 8 * eight..].as_chunks_mut::<4>().0) {
                // SAFETY: four totals.
                unsafe {
                    let at = totals.as_mut_ptr().cast::<__m256i>();
                    _mm256_storeu_si256(at, _mm256_add_epi64(_mm256_loadu_si256(at), _mm256_cvtepi32_epi64(four)));
                }
            }
        };
        // One by one: what is reached by an index that runs would lie in memory all the time.
        put(0);
        put(1);
        if FOURS == 8 {
            put(2);
            put(3);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_gives_the_exact_sums() {
        for isa in Isa::ALL.into_iter().filter(|isa| *isa <= Isa::best()) {
            for rows in 1..=TILE_ROWS_MAX {
                let form = Form::of(isa, rows);
                if rows > form.rows() {
                    continue;
                }
                // More than are exact in 32 bits, and so many that all sums are as large as they get.
                for (groups, extreme) in [(0, false), (1, false), (3, false), (2 * 8 + 1, false), (1036, true)] {
                    // The ends of both ranges among the rest.
                    let value = |i: usize| match i % 3 {
                        _ if extreme => -32_767,
                        0 => 32_767 - (i as i32 / 3 % 2 * 65_534),
                        _ => (i * 4637 + i / 64) as i32 % 65_535 - 32_767,
                    };
                    let weight = |i: usize| match i % 5 {
                        _ if extreme => 127,
                        few @ ..2 => 127 - (few * 254) as i32,
                        _ => (i * 91 + i / 128) as i32 % 127,
                    };
                    let mut a = vec![0u8; groups * rows * 2 * GROUP];
                    for (i, row) in a.chunks_exact_mut(2 * GROUP).enumerate() {
                        for input in 0..GROUP {
                            let value = value(i * GROUP + input);
                            if form.takes_planes() {
                                let unsigned = (value + PLANES_OFFSET) as u16;
                                [row[GROUP + input], row[input]] = unsigned.to_le_bytes();
                            } else {
                                row[2 * input..2 * input + 2].copy_from_slice(&(value as i16).to_ne_bytes());
                            }
                        }
                    }
                    let panel: Vec<i8> = (0..groups * PANEL_GROUP).map(|i| weight(i) as i8).collect();
                    let mut sums = vec![7; rows * 2 * PANEL_COLUMNS];
                    tile(form, rows, &a, &panel, &mut sums, true);
                    let offset = if form.takes_planes() { PLANES_OFFSET } else { 0 };
                    for (row, sums) in sums.chunks_exact(2 * PANEL_COLUMNS).enumerate() {
                        for column in 0..PANEL_COLUMNS {
                            let product = |input: usize| {
                                let (group, within) = (input / GROUP, input % GROUP);
                                let at = group * PANEL_GROUP + (within / TOGETHER * PANEL_COLUMNS + column) * TOGETHER + within % TOGETHER;
                                i64::from((value((group * rows + row) * GROUP + within) + offset) * weight(at))
                            };
                            let got = 256 * i64::from(sums[column]) + i64::from(sums[PANEL_COLUMNS + column]);
                            assert_eq!(got, (0..groups * GROUP).map(product).sum::<i64>(), "{form:?}, {rows} rows, {groups} groups");
                        }
                    }
                }
            }
        }
    }
}
