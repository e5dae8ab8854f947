//! The tile product in f32, for each instruction set.

use super::isa::Isa;
#[cfg(target_arch = "x86_64")]
use super::isa::f32_on_amx;
use super::tile::{Layout, PANEL_COLUMNS, Piece, TileArgs, TileElement, tile_in_pieces};
#[cfg(target_arch = "x86_64")]
use super::tile::{TILE_ROWS, for_rows, tile_avx2, tile_avx512};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

impl TileElement for f32 {
    const UNIT: usize = 1;

    fn layout(isa: Isa) -> Layout {
        #[cfg(target_arch = "x86_64")]
        if isa == Isa::AmxBf16 && f32_on_amx() {
            return Layout::SPLIT;
        }
        let _ = isa;
        Layout::UNITS
    }

    unsafe fn tile(isa: Isa, rows: usize, panels: usize, args: &TileArgs<Self>) {
        // SAFETY: the caller's promise, passed on: the processor has `isa`, which includes the features of the form.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            match isa {
                Isa::AmxBf16 if f32_on_amx() => unreachable!("split values are multiplied by split_product.rs"),
                Isa::Avx512 | Isa::Avx512Bf16 | Isa::AmxBf16 if panels == 1 && args.a_row == 1 => {
                    return for_rows!(rows, side_by_side, 2, args, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
                }
                Isa::Avx512 | Isa::Avx512Bf16 | Isa::AmxBf16 => return avx512(rows, panels, args),
                Isa::Avx2 => return avx2(rows, panels, args),
                Isa::Portable => {}
            }
            let _ = isa;
            tile_in_pieces!(rows, panels, args, 8, 4, 1, [1 => portable::<1>, 2 => portable::<2>, 3 => portable::<3>, 4 => portable::<4>]);
        }
    }
}

#[cfg(target_arch = "x86_64")]
tile_avx512!(avx512, avx512_tile, f32, "avx512f", |sum, a, b| _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum));

/// Adds each row `$r` that the tile has to its sums: its value at `$a + $r` times two vectors of the panel.
#[cfg(target_arch = "x86_64")]
macro_rules! add_rows {
    ($rows:ident, $a:ident, $columns:ident, $sums:ident, [$($r:literal),*]) => {
        $(if $r < $rows {
            // Two rows in three broadcast their value inside the instruction, one by an instruction of its own: that keeps
            // loads below two and all that is done below three a cycle.
            if $r % 3 == 0 {
                let value = _mm512_set1_ps(*$a.add($r));
                for (sum, column) in $sums[$r].iter_mut().zip($columns) {
                    *sum = _mm512_fmadd_ps(value, column, *sum);
                }
            } else {
                for (sum, column) in $sums[$r].iter_mut().zip($columns) {
                    std::arch::asm!(
                        "vfmadd231ps {sum}, {column}, dword ptr [{a} + 4 * {r}]{{1to16}}",
                        sum = inlateout(zmm_reg) *sum, column = in(zmm_reg) column, a = in(reg) $a, r = const $r,
                        options(pure, readonly, nostack, preserves_flags),
                    );
                }
            }
        })*
    };
}

/// `ROWS` rows and `VECTORS` (2) vectors of one panel, where the values of a unit lie side by side: what products spend their
/// time in. As [`avx512_tile`] in all bits, with a third fewer instructions: rows are constants away from one address. Where
/// another thread uses the same core, instructions are what it takes away: 95 GFLOP/s became 119, while 153 alone became 158.
///
/// # Safety
/// As [`TileElement::tile`], for one panel; `a_row` is 1.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn side_by_side<const ROWS: usize, const VECTORS: usize>(args: &TileArgs<f32>) {
    let TileArgs { mut a, a_unit, mut b, b_unit, c, c_row, units, mut ahead, ahead_unit, add, .. } = *args;
    let mut sums = [[_mm512_setzero_ps(); VECTORS]; TILE_ROWS];
    // SAFETY: the caller vouches for `units` units of `ROWS` rows of `a` and of 32 columns of the panel, and for the tile
    // `c`. Loads and stores ask no alignment.
    unsafe {
        if add {
            for (r, row) in sums.iter_mut().enumerate().take(ROWS) {
                for (v, sum) in row.iter_mut().enumerate() {
                    *sum = _mm512_loadu_ps(c.add(r * c_row + v * 16));
                }
            }
        }
        for _ in 0..units {
            let mut columns = [_mm512_setzero_ps(); VECTORS];
            for (v, column) in columns.iter_mut().enumerate() {
                _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(v * 16).cast());
                *column = _mm512_loadu_ps(b.add(v * 16));
            }
            add_rows!(ROWS, a, columns, sums, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]);
            a = a.wrapping_add(a_unit);
            b = b.wrapping_add(b_unit);
            ahead = ahead.wrapping_byte_add(ahead_unit);
        }
        for (r, row) in sums.iter().enumerate().take(ROWS) {
            for (v, sum) in row.iter().enumerate() {
                _mm512_storeu_ps(c.add(r * c_row + v * 16), *sum);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
tile_avx2!(avx2, avx2_piece, three_rows, f32, [0 => |at: *const f32| _mm256_loadu_ps(at)]);

/// Adds to `$sums`, three rows of four vectors, the products of a unit of three rows and 32 columns: the `$i`-th after `$a` and `$b`. Rows
/// are `$row` bytes apart, units `$unit` bytes in `$a` and 128 in `$b`. With three values in registers each vector of columns is loaded
/// once and forgotten: what the 16 registers hold beside 12 sums. The compiler orders the same so that sums go to memory.
#[cfg(target_arch = "x86_64")]
macro_rules! add_three_rows {
    ($sums:ident, $a:ident, $row:expr, $unit:expr, $b:ident, [$($i:literal),*]) => {
        $(std::arch::asm!(
            "vbroadcastss {x0}, dword ptr [{a} + {i}]",
            "vbroadcastss {x1}, dword ptr [{a} + {row} + {i}]",
            "vbroadcastss {x2}, dword ptr [{a} + 2*{row} + {i}]",
            "vmovups {column}, [{b} + 128 * {j}]",
            "vfmadd231ps {s00}, {x0}, {column}",
            "vfmadd231ps {s10}, {x1}, {column}",
            "vfmadd231ps {s20}, {x2}, {column}",
            "vmovups {column}, [{b} + 128 * {j} + 32]",
            "vfmadd231ps {s01}, {x0}, {column}",
            "vfmadd231ps {s11}, {x1}, {column}",
            "vfmadd231ps {s21}, {x2}, {column}",
            "vmovups {column}, [{b} + 128 * {j} + 64]",
            "vfmadd231ps {s02}, {x0}, {column}",
            "vfmadd231ps {s12}, {x1}, {column}",
            "vfmadd231ps {s22}, {x2}, {column}",
            "vmovups {column}, [{b} + 128 * {j} + 96]",
            "vfmadd231ps {s03}, {x0}, {column}",
            "vfmadd231ps {s13}, {x1}, {column}",
            "vfmadd231ps {s23}, {x2}, {column}",
            s00 = inout(ymm_reg) $sums[0][0], s01 = inout(ymm_reg) $sums[0][1],
            s02 = inout(ymm_reg) $sums[0][2], s03 = inout(ymm_reg) $sums[0][3],
            s10 = inout(ymm_reg) $sums[1][0], s11 = inout(ymm_reg) $sums[1][1],
            s12 = inout(ymm_reg) $sums[1][2], s13 = inout(ymm_reg) $sums[1][3],
            s20 = inout(ymm_reg) $sums[2][0], s21 = inout(ymm_reg) $sums[2][1],
            s22 = inout(ymm_reg) $sums[2][2], s23 = inout(ymm_reg) $sums[2][3],
            x0 = out(ymm_reg) _, x1 = out(ymm_reg) _, x2 = out(ymm_reg) _, column = out(ymm_reg) _,
            a = in(reg) $a, row = in(reg) $row, i = const $unit * $i, b = in(reg) $b, j = const $i,
            options(pure, readonly, nostack, preserves_flags),
        );)*
    };
}
#[cfg(target_arch = "x86_64")]
pub(super) use add_three_rows;

/// Three rows and 32 columns: what products on AVX2 spend their time in. As [`avx2_piece`] in all bits. Eight units of a whole tile
/// are 158 instructions, 57 of them loads or prefetches, for 96 products, where pieces of 6 rows and 16 columns, unit by unit, took
/// 208 and 72: as in [`side_by_side`], a neighbour on the core takes instructions away, not products. Beside one, eight units a turn
/// made 88 % of the core's peak where four made 84; 16 and 32 were slower again.
///
/// # Safety
/// As [`TileElement::tile`], for one panel, in which a unit follows the one before.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn three_rows(piece: Piece<f32>, args: &TileArgs<f32>) {
    let Piece { mut a, mut b, c, mut ahead, ahead_unit } = piece;
    let TileArgs { a_unit, b_unit, c_row, mut units, add, .. } = *args;
    let mut sums = [[_mm256_setzero_ps(); 4]; 3];
    // SAFETY: the caller vouches for `units` units of three rows of `a` and of 32 columns of the panel, and for the tile `c`.
    // Loads and stores ask no alignment.
    unsafe {
        if add {
            for (r, row) in sums.iter_mut().enumerate() {
                for (v, sum) in row.iter_mut().enumerate() {
                    *sum = _mm256_loadu_ps(c.add(r * c_row + v * 8));
                }
            }
        }
        while units >= 8 && a_unit == TILE_ROWS && b_unit == PANEL_COLUMNS {
            _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
            add_three_rows!(sums, a, size_of::<f32>(), 4 * TILE_ROWS, b, [0, 1, 2, 3, 4, 5, 6, 7]);
            a = a.wrapping_add(8 * TILE_ROWS);
            b = b.wrapping_add(8 * PANEL_COLUMNS);
            ahead = ahead.wrapping_byte_add(8 * ahead_unit);
            units -= 8;
        }
        for _ in 0..units {
            _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
            _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(16).cast());
            add_three_rows!(sums, a, size_of::<f32>(), 0, b, [0]);
            a = a.wrapping_add(a_unit);
            b = b.wrapping_add(b_unit);
            ahead = ahead.wrapping_byte_add(ahead_unit);
        }
        for (r, row) in sums.iter().enumerate() {
            for (v, sum) in row.iter().enumerate() {
                _mm256_storeu_ps(c.add(r * c_row + v * 8), *sum);
            }
        }
    }
}

/// `ROWS` rows and 8 columns.
///
/// # Safety
/// As [`TileElement::tile`], for 8 columns.
unsafe fn portable<const ROWS: usize>(piece: Piece<f32>, args: &TileArgs<f32>) {
    let Piece { a, b, c, .. } = piece;
    let TileArgs { a_row, a_unit, b_unit, c_row, units, add, .. } = *args;
    let mut sums = [[0.0f32; 8]; ROWS];
    // SAFETY: the caller vouches for `units` units of `ROWS` rows of `a`, of 8 columns of the panel, and 8 columns of `c`.
    unsafe {
        if add {
            for (r, row) in sums.iter_mut().enumerate() {
                *row = c.add(r * c_row).cast::<[f32; 8]>().read();
            }
        }
        for u in 0..units {
            let columns = b.add(u * b_unit).cast::<[f32; 8]>().read();
            for (r, row) in sums.iter_mut().enumerate() {
                let x = *a.add(r * a_row + u * a_unit);
                for (sum, column) in row.iter_mut().zip(&columns) {
                    *sum += x * column;
                }
            }
        }
        for (r, row) in sums.iter().enumerate() {
            c.add(r * c_row).cast::<[f32; 8]>().write(*row);
        }
    }
}
