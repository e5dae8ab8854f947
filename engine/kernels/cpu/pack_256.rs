//! What pack.rs does, on registers of 256 bits: the forms for AVX2, which knows no 16 x 16 transpose.

use super::tile::{PANEL_COLUMNS, TILE_ROWS};
use half::bf16;
use std::arch::x86_64::*;

/// Packs the first units, a multiple of 8, of f32 rows as one tile `[units][rows]`; returns how many.
///
/// # Safety
/// The processor has AVX2; `rows` are one or more, of one length.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn tile_of_rows(rows: &[&[f32]], out: &mut [f32]) -> usize {
    let (count, k) = (rows.len(), rows[0].len());
    for at in (0..k / 8 * 8).step_by(8) {
        // What a store of four rows writes past the last row is overwritten by what is stored later: the same unit's rows were
        // stored after it, and those of later units are to come.
        for first in (0..count).step_by(4).rev() {
            if (at + 7) * count + first + 4 > out.len() {
                return at;
            }
            // SAFETY: 8 values from `at` lie inside a row.
            let row = |i: usize| unsafe { _mm256_loadu_ps(rows[(first + i).min(count - 1)].as_ptr().add(at)) };
            let [a, b, c, d] = [row(0), row(1), row(2), row(3)];
            let [ab, ab_high] = [_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)].map(|values| _mm256_castps_pd(values));
            let [cd, cd_high] = [_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d)].map(|values| _mm256_castps_pd(values));
            let units = [
                _mm256_unpacklo_pd(ab, cd),
                _mm256_unpackhi_pd(ab, cd),
                _mm256_unpacklo_pd(ab_high, cd_high),
                _mm256_unpackhi_pd(ab_high, cd_high),
            ]
            .map(|values| _mm256_castpd_ps(values));
            let to = out.as_mut_ptr().wrapping_add(at * count + first);
            for (i, unit) in units.iter().enumerate() {
                // SAFETY: four values from row `first` of unit `at + 7`, and so of those before it, lie inside `out`.
                unsafe { _mm_storeu_ps(to.wrapping_add(i * count), _mm256_castps256_ps128(*unit)) };
            }
            for (i, unit) in units.iter().enumerate() {
                // SAFETY: as above.
                unsafe { _mm_storeu_ps(to.wrapping_add((i + 4) * count), _mm256_extractf128_ps::<1>(*unit)) };
            }
        }
    }
    k / 8 * 8
}

/// Packs the first units, a multiple of 4, of rows of bf16 as one tile of f32, `[units][rows][2]`; returns how many.
///
/// # Safety
/// The processor has AVX2; `rows` are one or more, of one length.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn tile_of_widened_rows(rows: &[&[bf16]], out: &mut [f32]) -> usize {
    let (count, k) = (rows.len(), rows[0].len());
    for at in (0..k / 8 * 4).step_by(4) {
        // As in `tile_of_rows`.
        for first in (0..count).step_by(4).rev() {
            if ((at + 3) * count + first + 4) * 2 > out.len() {
                return at;
            }
            // SAFETY: 8 values from `2 * at` lie inside a row.
            let row = |i: usize| unsafe { widened(_mm_loadu_si128(rows[(first + i).min(count - 1)].as_ptr().add(2 * at).cast())) };
            let [a, b, c, d] = [row(0), row(1), row(2), row(3)].map(|values| _mm256_castps_pd(values));
            let (even_ab, odd_ab) = (_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b));
            let (even_cd, odd_cd) = (_mm256_unpacklo_pd(c, d), _mm256_unpackhi_pd(c, d));
            let units = [
                _mm256_permute2f128_pd::<0x20>(even_ab, even_cd),
                _mm256_permute2f128_pd::<0x20>(odd_ab, odd_cd),
                _mm256_permute2f128_pd::<0x31>(even_ab, even_cd),
                _mm256_permute2f128_pd::<0x31>(odd_ab, odd_cd),
            ];
            for (i, unit) in units.iter().enumerate() {
                let to = out.as_mut_ptr().wrapping_add(((at + i) * count + first) * 2);
                // SAFETY: four pairs from row `first` of unit `at + 3`, and so of those before it, lie inside `out`.
                unsafe { _mm256_storeu_ps(to, _mm256_castpd_ps(*unit)) };
            }
        }
    }
    k / 8 * 4
}

/// 8 bf16 as f32.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn widened(values: __m128i) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(values)))
}

/// Columns of two tokens as units of f32, `[columns][2]`, of a tile as wide as tiles are.
///
/// # Safety
/// The processor has AVX2.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn widened_columns(even: &[bf16; TILE_ROWS], odd: &[bf16; TILE_ROWS], out: &mut [f32; 2 * TILE_ROWS]) {
    // SAFETY: eight values from the first and four from the ninth are the twelve of a token, and make the 24 of `out`.
    unsafe {
        let (some, others) = (_mm_loadu_si128(even.as_ptr().cast()), _mm_loadu_si128(odd.as_ptr().cast()));
        let (rest, other_rest) = (_mm_loadl_epi64(even.as_ptr().add(8).cast()), _mm_loadl_epi64(odd.as_ptr().add(8).cast()));
        let pairs = [_mm_unpacklo_epi16(some, others), _mm_unpackhi_epi16(some, others), _mm_unpacklo_epi16(rest, other_rest)];
        for (i, pairs) in pairs.into_iter().enumerate() {
            _mm256_storeu_ps(out.as_mut_ptr().add(8 * i), widened(pairs));
        }
    }
}

/// The transpose of 8 x 8 values of 4 bytes.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn transposed(rows: [__m256i; 8]) -> [__m256i; 8] {
    let mut pairs = rows;
    for i in 0..4 {
        pairs[2 * i] = _mm256_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm256_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    // fours[4g + c], 128-bit lane l: column 4l + c of rows 4g to 4g + 3.
    let mut fours = pairs;
    for g in 0..2 {
        fours[4 * g] = _mm256_unpacklo_epi64(pairs[4 * g], pairs[4 * g + 2]);
        fours[4 * g + 1] = _mm256_unpackhi_epi64(pairs[4 * g], pairs[4 * g + 2]);
        fours[4 * g + 2] = _mm256_unpacklo_epi64(pairs[4 * g + 1], pairs[4 * g + 3]);
        fours[4 * g + 3] = _mm256_unpackhi_epi64(pairs[4 * g + 1], pairs[4 * g + 3]);
    }
    let mut columns = fours;
    for c in 0..4 {
        columns[c] = _mm256_permute2x128_si256::<0x20>(fours[c], fours[4 + c]);
        columns[4 + c] = _mm256_permute2x128_si256::<0x31>(fours[c], fours[4 + c]);
    }
    columns
}

/// Transposes a 32 x 32 block of a panel: `block` is `[inputs or pairs of them][32]` words of 4 bytes, and what is missing of
/// 32 inputs counts as zero; `out` is as many outputs or pairs of them, `[32]` each. A word is one f32, or with `PAIRS` two bf16.
///
/// # Safety
/// The processor has AVX2; `block` is a number of rows of 32 words, at most 32 or, with pairs, 16; `out` holds so many.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn transposed_block<const PAIRS: bool>(block: &[i32], out: &mut [i32]) {
    let rows = block.len() / PANEL_COLUMNS;
    let height = if PAIRS { PANEL_COLUMNS / 2 } else { PANEL_COLUMNS };
    for top in (0..height).step_by(8) {
        for left in (0..PANEL_COLUMNS).step_by(8) {
            let mut square = [_mm256_setzero_si256(); 8];
            for (i, slot) in square.iter_mut().enumerate().take(rows.saturating_sub(top)) {
                // SAFETY: row `top + i` is below `rows`, so its 8 words from `left` lie inside `block`.
                *slot = unsafe { _mm256_loadu_si256(block.as_ptr().add((top + i) * PANEL_COLUMNS + left).cast()) };
            }
            let columns = transposed(square);
            if !PAIRS {
                for (i, column) in columns.iter().enumerate() {
                    // SAFETY: row `left + i` and the 8 columns from `top` lie inside the 32 x 32 words of `out`.
                    unsafe { _mm256_storeu_si256(out.as_mut_ptr().add((left + i) * PANEL_COLUMNS + top).cast(), *column) };
                }
                continue;
            }
            // Each of `columns` holds 16 inputs of one output.
            for (i, [even, odd]) in columns.as_chunks::<2>().0.iter().enumerate() {
                let (low, high) = (_mm256_unpacklo_epi16(*even, *odd), _mm256_unpackhi_epi16(*even, *odd));
                let to = out.as_mut_ptr().wrapping_add((left / 2 + i) * PANEL_COLUMNS + 2 * top);
                // SAFETY: row `left / 2 + i` is one of 16 of 32 words, and `2 * top` is 0 or 16.
                unsafe {
                    _mm256_storeu_si256(to.cast(), _mm256_permute2x128_si256::<0x20>(low, high));
                    _mm256_storeu_si256(to.add(8).cast(), _mm256_permute2x128_si256::<0x31>(low, high));
                }
            }
        }
    }
}
