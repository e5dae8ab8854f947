//! The tile product in f32, for each instruction set.

use super::isa::Isa;
use super::tile::{PANEL_COLUMNS, TileArgs, TileElement, tile_in_pieces};
#[cfg(target_arch = "x86_64")]
use super::tile::{for_rows, tile_avx2, tile_avx512};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

impl TileElement for f32 {
    const UNIT: usize = 1;

    unsafe fn tile(isa: Isa, rows: usize, panels: usize, args: &TileArgs<Self>) {
        // SAFETY: the caller's promise, passed on: the processor has `isa`, which includes the features of the form.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            match isa {
                Isa::Avx512 | Isa::Avx512Bf16 | Isa::AmxBf16 => return avx512(rows, panels, args),
                Isa::Avx2 => return avx2(rows, panels, args),
                Isa::Portable => {}
            }
            let _ = isa;
            tile_in_pieces!(rows, panels, args, 8, 4, 1, portable, [1, 2, 3, 4]);
        }
    }
}

#[cfg(target_arch = "x86_64")]
tile_avx512!(avx512, avx512_tile, f32, "avx512f", |sum, a, b| _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum));

#[cfg(target_arch = "x86_64")]
tile_avx2!(avx2, avx2_piece, f32, |sum, a, b| _mm256_fmadd_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), sum));

/// `ROWS` rows and 8 columns.
///
/// # Safety
/// As [`TileElement::tile`], for 8 columns.
unsafe fn portable<const ROWS: usize>(args: &TileArgs<f32>) {
    let TileArgs { a, a_row, a_unit, b, b_unit, c, c_row, units, add, .. } = *args;
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
