//! The tile product of integers: rows of unsigned bytes times a panel of 32 columns of signed bytes, with sums in i32. Sums are
//! exact, so that every form gives the same bits, and a product may choose among them by its number of rows. Knows no scales;
//! int8.rs does.
//!
//! A *plane* is a row of one byte an input; a row of 16 bits is two of them. Inputs come in groups of 64, all whole.
//! - packed planes: `[groups][planes][64]`
//! - a panel: `[groups][16][32][4]`, four neighbouring inputs of a column together, as `vpdpbusd` and AMX want them

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

/// Most planes of a tile in any form.
pub(super) const TILE_PLANES_MAX: usize = 16;

/// Most planes of a tile on vector registers: 12 x 2 sums, 2 vectors of the panel and a broadcast fill the 32 of AVX-512.
const VECTOR_PLANES: usize = 12;

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
    /// The fastest with instructions `isa` for a product of `planes`.
    pub(super) fn of(isa: Isa, planes: usize) -> Self {
        match isa {
            Isa::AmxBf16 if planes > VECTOR_PLANES => Self::Amx,
            Isa::AmxBf16 | Isa::Avx512Bf16 => Self::Vnni,
            Isa::Avx512 | Isa::Avx2 => Self::Avx2,
            Isa::Portable => Self::Portable,
        }
    }

    /// Most planes of a tile.
    pub(super) const fn planes(self) -> usize {
        if matches!(self, Self::Amx) { TILE_PLANES_MAX } else { VECTOR_PLANES }
    }
}

/// Writes `planes` packed planes times a panel to `sums` `[planes][32]`, in a form that this processor has. `planes` is even; at
/// most 66,311 inputs fit the sums. A tile that meets panels `alone` asks for the next ones.
pub(super) fn tile(form: Form, planes: usize, a: &[u8], panel: &[i8], sums: &mut [i32], alone: bool) {
    let groups = panel.len() / PANEL_GROUP;
    assert!(planes.is_multiple_of(2) && (2..=form.planes()).contains(&planes), "a tile of {planes} planes");
    assert_eq!(panel.len(), groups * PANEL_GROUP, "a panel of whole groups");
    assert_eq!(a.len(), groups * planes * GROUP, "{planes} packed planes of {groups} groups");
    assert_eq!(sums.len(), planes * PANEL_COLUMNS, "sums of {planes} planes");
    #[cfg(target_arch = "x86_64")]
    {
        let (a, panel, to) = (a.as_ptr(), panel.as_ptr(), sums.as_mut_ptr());
        // SAFETY: `Form::of` names only forms of instructions that `isa()` has found. The lengths asserted above are those that
        // the forms read and write.
        unsafe {
            match form {
                Form::Amx => {
                    let (columns, units) = (PANEL_COLUMNS, groups * GROUP / TOGETHER);
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
                    return match planes {
                        2 => vnni::<2>(a, panel, groups, to),
                        4 => vnni::<4>(a, panel, groups, to),
                        6 => vnni::<6>(a, panel, groups, to),
                        8 => vnni::<8>(a, panel, groups, to),
                        10 => vnni::<10>(a, panel, groups, to),
                        _ => vnni::<VECTOR_PLANES>(a, panel, groups, to),
                    };
                }
                Form::Avx2 => return avx2(planes, a, panel, groups, to),
                Form::Portable => {}
            }
        }
    }
    portable(planes, a, panel, sums);
}

fn portable(planes: usize, a: &[u8], panel: &[i8], sums: &mut [i32]) {
    sums.fill(0);
    for (a, panel) in a.chunks_exact(planes * GROUP).zip(panel.chunks_exact(PANEL_GROUP)) {
        for (plane, sums) in a.chunks_exact(GROUP).zip(sums.chunks_exact_mut(PANEL_COLUMNS)) {
            for (some, unit) in plane.as_chunks::<TOGETHER>().0.iter().zip(panel.chunks_exact(PANEL_COLUMNS * TOGETHER)) {
                for (sum, column) in sums.iter_mut().zip(unit.as_chunks::<TOGETHER>().0) {
                    *sum += some.iter().zip(column).map(|(a, b)| i32::from(*a) * i32::from(*b)).sum::<i32>();
                }
            }
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

/// Two planes and 16 columns at a time. `vpmaddubsw` would be one instruction for three, but its sums of two products of 16 bits
/// overflow.
///
/// # Safety
/// As [`vnni`], for a processor with AVX2 and `planes`, an even number.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn avx2(planes: usize, a: *const u8, panel: *const i8, groups: usize, to: *mut i32) {
    for pair in (0..planes).step_by(2) {
        for left in [0, PANEL_COLUMNS / 2] {
            // Of each plane and four columns: two sums a column, of its first two inputs and of its last two.
            let mut sums = [[_mm256_setzero_si256(); 4]; 2];
            for group in 0..groups {
                for unit in 0..GROUP / TOGETHER {
                    // SAFETY: the caller's promise: 64 bytes of this half of the unit, and 4 of each plane.
                    unsafe {
                        let unit_of = |plane: usize| {
                            let at = a.add((group * planes + pair + plane) * GROUP + unit * TOGETHER);
                            _mm256_cvtepu8_epi16(_mm_set1_epi32(at.cast::<i32>().read_unaligned()))
                        };
                        let rows = [unit_of(0), unit_of(1)];
                        let columns = panel.add(group * PANEL_GROUP + (unit * PANEL_COLUMNS + left) * TOGETHER);
                        for four in 0..4 {
                            let wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(columns.add(four * 16).cast()));
                            for (sums, row) in sums.iter_mut().zip(rows) {
                                sums[four] = _mm256_add_epi32(sums[four], _mm256_madd_epi16(row, wide));
                            }
                        }
                    }
                }
            }
            for (plane, sums) in sums.iter().enumerate() {
                for half in 0..2 {
                    let eight = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_hadd_epi32(sums[2 * half], sums[2 * half + 1]));
                    // SAFETY: the caller's promise: 8 of the plane's 32 sums.
                    unsafe { _mm256_storeu_si256(to.add((pair + plane) * PANEL_COLUMNS + left + half * 8).cast(), eight) };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_gives_the_exact_sums() {
        for isa in Isa::ALL.into_iter().filter(|isa| *isa <= Isa::best()) {
            for planes in (2..=TILE_PLANES_MAX).step_by(2) {
                let form = Form::of(isa, planes);
                if planes > form.planes() {
                    continue;
                }
                for groups in [0, 1, 3] {
                    // The ends of both ranges among the rest.
                    let a: Vec<u8> = (0..groups * planes * GROUP).map(|i| if i % 3 == 0 { 255 } else { (i * 37 + i / 64) as u8 }).collect();
                    let panel: Vec<i8> = (0..groups * PANEL_GROUP)
                        .map(|i| if i % 5 < 2 { 127 - (i % 5 * 254) as i32 } else { (i * 91 + i / 128) as i32 % 127 } as i8)
                        .collect();
                    let mut sums = vec![7; planes * PANEL_COLUMNS];
                    tile(form, planes, &a, &panel, &mut sums, true);
                    for (index, sum) in sums.iter().enumerate() {
                        let (plane, column) = (index / PANEL_COLUMNS, index % PANEL_COLUMNS);
                        let product = |input: usize| {
                            let (group, within) = (input / GROUP, input % GROUP);
                            let at = group * PANEL_GROUP + (within / TOGETHER * PANEL_COLUMNS + column) * TOGETHER + within % TOGETHER;
                            i32::from(a[(group * planes + plane) * GROUP + within]) * i32::from(panel[at])
                        };
                        assert_eq!(*sum, (0..groups * GROUP).map(product).sum::<i32>(), "{form:?}, {planes} planes, {groups} groups");
                    }
                }
            }
        }
    }
}
