//! The tile product of bf16 operands with sums in f32, for each instruction set. `vdpbf16ps` takes a pair of products at
//! a time, and denormal numbers for zero; AMX takes 16 pairs (amx.rs); the other forms widen both values of a pair to f32, which is a shift or a mask,
//! and add the even one first. AVX2 has its rows widened when they are packed, since it needs every instruction for products.

#[cfg(target_arch = "x86_64")]
use super::amx;
use super::isa::Isa;
use super::tile::{Layout, PANEL_COLUMNS, Piece, TileArgs, TileElement, tile_in_pieces};
#[cfg(target_arch = "x86_64")]
use super::tile::{for_rows, tile_avx2, tile_avx512};
use half::bf16;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

impl TileElement for bf16 {
    const UNIT: usize = 2;

    fn layout(isa: Isa) -> Layout {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::AmxBf16 => Layout::AMX,
            Isa::Avx2 => Layout::WIDE,
            _ => Layout::UNITS,
        }
    }

    unsafe fn tile(isa: Isa, rows: usize, panels: usize, args: &TileArgs<Self>) {
        // SAFETY: the caller's promise, passed on: the processor has `isa`, which includes the features of the form.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            match isa {
                Isa::AmxBf16 => return amx::tile(rows, args),
                Isa::Avx512Bf16 => return dot_pairs(rows, panels, args),
                Isa::Avx512 => return avx512(rows, panels, args),
                Isa::Avx2 => return avx2(rows, panels, args),
                Isa::Portable => {}
            }
            let _ = isa;
            tile_in_pieces!(rows, panels, args, 8, 4, 2, [1 => portable::<1>, 2 => portable::<2>, 3 => portable::<3>, 4 => portable::<4>]);
        }
    }
}

#[cfg(target_arch = "x86_64")]
tile_avx512!(dot_pairs, dot_pairs_tile, bf16, "avx512f,avx512bw,avx512bf16", |sum, a, b| {
    _mm512_dpbf16_ps(sum, std::mem::transmute::<__m512i, __m512bh>(a), std::mem::transmute::<__m512i, __m512bh>(b))
});

#[cfg(target_arch = "x86_64")]
tile_avx512!(avx512, avx512_tile, bf16, "avx512f", |sum, a, b| {
    let high = _mm512_set1_epi32(0xffff_0000u32 as i32);
    let even = |pair| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pair));
    let odd = |pair| _mm512_castsi512_ps(_mm512_and_si512(pair, high));
    _mm512_fmadd_ps(odd(a), odd(b), _mm512_fmadd_ps(even(a), even(b), sum))
});

#[cfg(target_arch = "x86_64")]
tile_avx2!(avx2, avx2_piece, avx2_piece::<3, 4>, bf16, [0 => |at| even_of_pairs(at), 1 => |at| odd_of_pairs(at)]);

/// The first values of 8 pairs, as f32.
///
/// # Safety
/// There are 8 pairs at `at`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn even_of_pairs(at: *const bf16) -> __m256 {
    // SAFETY: the caller's promise.
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(unsafe { _mm256_loadu_si256(at.cast()) }))
}

/// The second values of 8 pairs, as f32. Read from memory once more: the compiler would keep the pairs in registers, of which there
/// is none to spare, and a sum in memory instead, which took a quarter of the speed.
///
/// # Safety
/// There are 8 pairs at `at`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn odd_of_pairs(at: *const bf16) -> __m256 {
    let odd: __m256i;
    // SAFETY: the caller's promise; the instruction does nothing but read them.
    unsafe {
        std::arch::asm!(
            "vpand {odd}, {mask}, ymmword ptr [{at}]",
            odd = out(ymm_reg) odd, mask = in(ymm_reg) _mm256_set1_epi32(0xffff_0000u32 as i32), at = in(reg) at,
            options(pure, readonly, nostack, preserves_flags),
        );
    }
    _mm256_castsi256_ps(odd)
}

/// `ROWS` rows and 8 columns.
///
/// # Safety
/// As [`TileElement::tile`], for 8 columns.
unsafe fn portable<const ROWS: usize>(piece: Piece<bf16>, args: &TileArgs<bf16>) {
    let Piece { a, b, c, .. } = piece;
    let TileArgs { a_row, a_unit, b_unit, c_row, units, add, .. } = *args;
    let mut sums = [[0.0f32; 8]; ROWS];
    // SAFETY: the caller vouches for `units` units of `ROWS` rows of `a`, of 8 columns of the panel, and 8 columns of
    // `c`. Arrays of bf16 ask no more alignment than bf16.
    unsafe {
        if add {
            for (r, row) in sums.iter_mut().enumerate() {
                *row = c.add(r * c_row).cast::<[f32; 8]>().read();
            }
        }
        for u in 0..units {
            let columns = b.add(u * b_unit).cast::<[[bf16; 2]; 8]>().read();
            for (r, row) in sums.iter_mut().enumerate() {
                let [even, odd] = a.add(r * a_row + u * a_unit).cast::<[bf16; 2]>().read();
                for (sum, column) in row.iter_mut().zip(&columns) {
                    *sum += even.to_f32() * column[0].to_f32();
                    *sum += odd.to_f32() * column[1].to_f32();
                }
            }
        }
        for (r, row) in sums.iter().enumerate() {
            c.add(r * c_row).cast::<[f32; 8]>().write(*row);
        }
    }
}
