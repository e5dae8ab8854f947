//! f32 operands for AMX, which multiplies bf16: each value as three bf16 whose sum it is. Copies and splits only; amx.rs adds up
//! the products.
//!
//! A value `a` has 24 bits, a bf16 has 8. `a0` is `a` rounded to bf16, `a1` what is left of it rounded likewise, `a2` what is left
//! then: nothing is lost. Of the nine products of `a` and `b` six are added, `a0 b0`, `a0 b1`, `a1 b0`, `a1 b1`, `a0 b2` and
//! `a2 b0`; each is exact, and the other three together are at most 2^-23 of `|a b|`, as much as two roundings of an f32. A group
//! of 32 products joins the running sum in six additions instead of 32, so that a sum comes nearer to the exact one than a
//! chain of fused multiply-adds does (of 1024 terms: 0.4 of its error, root mean square).
//!
//! What differs from f32 arithmetic: AMX takes denormals for zero, so that values below 2^-110 lose low bits and sums below 2^-126
//! are zero; and where a value is not finite, or is beyond the largest bf16, the sum is not a number.
//! Source: Henry, Tang and Heinecke, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations",
//! ARITH 2019.
//!
//! The 32 places of a group lie as 16 pairs, `i` beside `i + 16`: both operands pair the same places, and two vectors
//! of 16 values become one of pairs without a permutation.

use std::arch::asm;
use std::arch::x86_64::*;

/// Units of a group: a row of a tile register, 64 bytes, for each of the three parts.
pub(super) const GROUP_UNITS: usize = 32;

/// Bytes that stand for a unit.
pub(super) const UNIT_BYTES: usize = 6;

/// Words of 4 bytes that a row of a group takes: the first, second and third parts of its 32 values, 64 bytes each.
pub(super) const ROW_WORDS: usize = GROUP_UNITS * UNIT_BYTES / 4;

/// Words that a panel of 32 columns takes for a group: `[part][pair][column][2 bf16]`.
pub(super) const PANEL_WORDS: usize = 32 * ROW_WORDS;

/// Does `work` while vector instructions take denormals for zero and make none, as AMX's do: what is split, or computed in AMX's
/// stead, has the same bits on both. `work` calls functions that are not inlined, so that nothing of it moves out of here.
pub(super) fn flushing(work: impl FnOnce()) {
    const ZERO_DENORMALS: u32 = 0x8040;
    /// Sets the word again that was found, also when `work` panics.
    struct Restore(u32);
    impl Drop for Restore {
        fn drop(&mut self) {
            // SAFETY: the word is one that the thread had.
            unsafe { asm!("ldmxcsr [{}]", in(reg) &self.0, options(nostack, readonly)) };
        }
    }
    let mut before = Restore(0);
    // SAFETY: the control word of the thread's vector arithmetic is stored, then set to itself with two more flags.
    unsafe {
        asm!("stmxcsr [{}]", in(reg) &mut before.0, options(nostack));
        asm!("ldmxcsr [{}]", in(reg) &(before.0 | ZERO_DENORMALS), options(nostack, readonly));
    }
    work();
}

/// The three parts of 16 values, each in the upper half of its word; the lower halves are zero, but for the last part's, which
/// is as exact as bf16.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn parts(values: __m512) -> [__m512i; 3] {
    let half = _mm512_set1_epi32(0x8000);
    let upper = _mm512_set1_epi32(0xffff_0000u32 as i32);
    let rounded = |value: __m512| _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(value), half), upper);
    let first = rounded(values);
    let rest = _mm512_sub_ps(values, _mm512_castsi512_ps(first));
    let second = rounded(rest);
    let third = _mm512_sub_ps(rest, _mm512_castsi512_ps(second));
    [first, second, _mm512_castps_si512(third)]
}

/// The parts of 32 values in pairs: of each part, `even` in the lower halves and `odd` in the upper ones.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn paired(even: __m512, odd: __m512) -> [__m512i; 3] {
    const LOWER: __mmask64 = 0x3333_3333_3333_3333;
    let halves = _mm512_set4_epi32(0x0f0e_0f0e, 0x0b0a_0b0a, 0x0706_0706, 0x0302_0302);
    let (even, mut odd) = (parts(even), parts(odd));
    for (odd, even) in odd.iter_mut().zip(even) {
        // Bytes 0 and 1 of each word come from bytes 2 and 3 of the even one. As an intrinsic this would be compiled to a
        // permutation of words, which is three operations and not one.
        // SAFETY: the processor has AVX-512 BW; only registers are read and written.
        unsafe {
            asm!("vpshufb {odd}{{{lower}}}, {even}, {halves}", odd = inout(zmm_reg) *odd, even = in(zmm_reg) even,
                halves = in(zmm_reg) halves, lower = in(kreg) LOWER, options(pure, nomem, nostack, preserves_flags));
        }
    }
    odd
}

/// Splits units of a panel, `[units][32]`, into whole groups of [`PANEL_WORDS`], with zeros after the last unit.
///
/// # Safety
/// The processor has AVX-512 F and BW. Panics if `out` has no room for the groups.
pub(super) unsafe fn panel(block: &[f32], out: &mut [f32]) {
    // SAFETY: the caller's promise.
    flushing(|| unsafe { groups_of_panel(block, out) });
}

/// # Safety
/// As [`panel`].
#[target_feature(enable = "avx512f,avx512bw")]
#[inline(never)]
unsafe fn groups_of_panel(block: &[f32], out: &mut [f32]) {
    let (groups, rest) = block.as_chunks::<{ GROUP_UNITS * 32 }>();
    let (out, last) = out.split_at_mut(groups.len() * PANEL_WORDS);
    for (group, out) in groups.iter().zip(out.as_chunks_mut::<PANEL_WORDS>().0) {
        group_of_panel(group, out);
    }
    if !rest.is_empty() {
        let mut group = [0.0; GROUP_UNITS * 32];
        group[..rest.len()].copy_from_slice(rest);
        group_of_panel(&group, last.first_chunk_mut().expect("a place for the last group"));
    }
}

#[target_feature(enable = "avx512f,avx512bw")]
fn group_of_panel(group: &[f32; GROUP_UNITS * 32], out: &mut [f32; PANEL_WORDS]) {
    for quarter in 0..4 {
        // SAFETY: quarters are 0 to 3.
        unsafe { quarter_of_panel(group, quarter, out) };
    }
}

/// Splits four of the 16 pairs of rows of a group.
///
/// # Safety
/// The processor has AVX-512 F and BW; `quarter` is below 4.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
pub(super) unsafe fn quarter_of_panel(group: &[f32; GROUP_UNITS * 32], quarter: usize, out: &mut [f32; PANEL_WORDS]) {
    let (group, out) = (group.as_ptr(), out.as_mut_ptr());
    for at in (quarter * 128..quarter * 128 + 128).step_by(16) {
        // SAFETY: 16 values from place `at`, of a row below 16, and from the row 16 rows below lie inside the 32 x 32 of the group,
        // and 16 words from that place inside each third of `out`. Prefetches may be of any address.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(group.wrapping_add(AHEAD + at).cast());
            _mm_prefetch::<_MM_HINT_T1>(group.wrapping_add(AHEAD + 512 + at).cast());
            let words = paired(_mm512_loadu_ps(group.add(at)), _mm512_loadu_ps(group.add(512 + at)));
            for (part, words) in words.into_iter().enumerate() {
                _mm512_storeu_si512(out.add(part * 512 + at).cast(), words);
            }
        }
    }
}

/// How far ahead a panel is asked for while it is split, in values: the next block, 16 KiB, since nothing is read while tiles pass.
const AHEAD: usize = 4 * GROUP_UNITS * 32;

/// Splits `rows`, of equal length, as one tile: `[groups][rows][ROW_WORDS]`, with zeros after the last value.
///
/// # Safety
/// The processor has AVX-512 F and BW. `out` has `groups * rows.len() * ROW_WORDS` words.
pub(super) unsafe fn tile_of_rows(rows: &[&[f32]], out: &mut [f32]) {
    // SAFETY: the caller's promise.
    flushing(|| unsafe { groups_of_rows(rows, out) });
}

/// # Safety
/// As [`tile_of_rows`].
#[target_feature(enable = "avx512f,avx512bw")]
#[inline(never)]
unsafe fn groups_of_rows(rows: &[&[f32]], out: &mut [f32]) {
    let count = rows.len();
    for (r, row) in rows.iter().enumerate() {
        for (g, values) in row.chunks(GROUP_UNITS).enumerate() {
            let out: &mut [f32; ROW_WORDS] = out[(g * count + r) * ROW_WORDS..].first_chunk_mut().expect("a row of a group");
            let mask = if values.len() == GROUP_UNITS { u32::MAX } else { (1 << values.len()) - 1 };
            // SAFETY: the masks let the values of the chunk be read and no others.
            let [even, odd] = unsafe {
                [
                    _mm512_maskz_loadu_ps(mask as u16, values.as_ptr()),
                    _mm512_maskz_loadu_ps((mask >> 16) as u16, values.as_ptr().wrapping_add(16)),
                ]
            };
            write_row(even, odd, out);
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw")]
fn write_row(even: __m512, odd: __m512, out: &mut [f32; ROW_WORDS]) {
    for (part, words) in paired(even, odd).into_iter().enumerate() {
        // SAFETY: `out` holds three times 16 words.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().add(part * 16).cast(), words) };
    }
}

/// Splits `columns` values, from `left`, of 32 tokens as that many rows of a group.
///
/// # Safety
/// The processor has AVX-512 F and BW; `columns` is 1 to 16; each of `tokens` is empty, which counts as zeros, or holds
/// `left + columns` values; `out` has `columns * ROW_WORDS` words.
pub(super) unsafe fn group_of_columns(tokens: &[&[f32]; GROUP_UNITS], left: usize, columns: usize, out: &mut [f32]) {
    // SAFETY: the caller's promise.
    flushing(|| unsafe { turned_columns(tokens, left, columns, out) });
}

/// # Safety
/// As [`group_of_columns`].
#[target_feature(enable = "avx512f,avx512bw")]
#[inline(never)]
unsafe fn turned_columns(tokens: &[&[f32]; GROUP_UNITS], left: usize, columns: usize, out: &mut [f32]) {
    let mask = ((1u32 << columns) - 1) as u16;
    let turned = |tokens: &[&[f32]]| {
        let mut square = [_mm512_setzero_si512(); 16];
        for (slot, token) in square.iter_mut().zip(tokens).filter(|(_, token)| !token.is_empty()) {
            // SAFETY: the mask lets `columns` values from `left` be read, which the token holds.
            *slot = unsafe { _mm512_maskz_loadu_epi32(mask, token.as_ptr().add(left).cast()) };
        }
        super::pack::transposed(square)
    };
    let (even, odd) = (turned(&tokens[..16]), turned(&tokens[16..]));
    for ((out, even), odd) in out.as_chunks_mut().0.iter_mut().zip(even).zip(odd) {
        write_row(_mm512_castsi512_ps(even), _mm512_castsi512_ps(odd), out);
    }
}

#[cfg(test)]
mod tests {
    use super::super::isa::Isa;
    use super::*;
    use half::bf16;

    /// Values of many sizes and signs, among them those at which rounding carries into the exponent.
    fn value(i: usize) -> f32 {
        let bits = (i as u32).wrapping_mul(2_654_435_761) ^ 0x2545_f491;
        let exponent = 127 - 20 + (i as u32 * 7) % 41;
        f32::from_bits(bits & 0x807f_ffff | exponent << 23)
    }

    /// The value whose parts stand at `place` of 64 bytes a part, `stride` words apart.
    fn joined(words: &[f32], stride: usize, place: usize) -> f64 {
        (0..3)
            .map(|part| {
                let word = words[part * stride + place % 16].to_bits();
                let half = if place < 16 { word as u16 } else { (word >> 16) as u16 };
                f64::from(bf16::from_bits(half).to_f32())
            })
            .sum()
    }

    #[test]
    fn three_parts_are_the_value() {
        if Isa::best() < Isa::Avx512 {
            return;
        }
        for (count, k) in [(1, 1), (3, 16), (16, 17), (5, 100), (2, 64)] {
            let rows: Vec<Vec<f32>> = (0..count).map(|r| (0..k).map(|i| value(r * 1000 + i)).collect()).collect();
            let padded = k.next_multiple_of(GROUP_UNITS);
            let mut out = vec![1.0; padded / GROUP_UNITS * count * ROW_WORDS];
            // SAFETY: the processor has AVX-512, and `out` whole groups of the rows.
            unsafe { tile_of_rows(&rows.iter().map(Vec::as_slice).collect::<Vec<_>>(), &mut out) };
            for (r, i) in (0..count).flat_map(|r| (0..padded).map(move |i| (r, i))) {
                let words = &out[(i / GROUP_UNITS * count + r) * ROW_WORDS..];
                assert_eq!(
                    joined(words, 16, i % GROUP_UNITS),
                    f64::from(rows[r].get(i).copied().unwrap_or(0.0)),
                    "{count} x {k}: {r}, {i}"
                );
            }
        }
    }

    #[test]
    fn a_panel_and_columns_are_split_as_rows_are() {
        if Isa::best() < Isa::Avx512 {
            return;
        }
        for units in [1, 16, 31, 32, 77] {
            let block: Vec<f32> = (0..units * 32).map(value).collect();
            let groups = units.div_ceil(GROUP_UNITS);
            let mut out = vec![1.0; groups * PANEL_WORDS];
            // SAFETY: the processor has AVX-512.
            unsafe { panel(&block, &mut out) };
            for (unit, column) in (0..groups * GROUP_UNITS).flat_map(|unit| (0..32).map(move |column| (unit, column))) {
                let place = unit % GROUP_UNITS;
                let words = &out[unit / GROUP_UNITS * PANEL_WORDS + place % 16 * 32 + column..];
                let word = [words[0], words[512], words[1024]].map(|word| [word; 16]).concat();
                assert_eq!(joined(&word, 16, place), f64::from(block.get(unit * 32 + column).copied().unwrap_or(0.0)), "{unit}, {column}");
            }
            let mut tokens: [&[f32]; GROUP_UNITS] = [&[]; GROUP_UNITS];
            tokens.iter_mut().zip(block.chunks(32)).for_each(|(token, row)| *token = row);
            for (left, columns) in [(0, 16), (16, 16), (5, 7), (31, 1)] {
                let mut out = vec![1.0; columns * ROW_WORDS];
                // SAFETY: the processor has AVX-512; tokens hold 32 values.
                unsafe { group_of_columns(&tokens, left, columns, &mut out) };
                for (column, place) in (0..columns).flat_map(|column| (0..GROUP_UNITS).map(move |place| (column, place))) {
                    let want = tokens[place].get(left + column).copied().unwrap_or(0.0);
                    assert_eq!(joined(&out[column * ROW_WORDS..], 16, place), f64::from(want), "column {column} of token {place}");
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        if Isa::best() < Isa::Avx512 {
            return;
        }
        for bits in [0x7f80_0000, 0xff80_0000, 0x7fc0_0000, 0x7fff_ffff, 0xffff_ffff, 0x7f80_0001u32] {
            let mut out = [0.0; ROW_WORDS];
            // SAFETY: the processor has AVX-512, and `out` has a row of one group.
            unsafe { tile_of_rows(&[&[f32::from_bits(bits)]], &mut out) };
            assert!(joined(&out, 16, 0).is_nan(), "{bits:#x}");
        }
    }
}
