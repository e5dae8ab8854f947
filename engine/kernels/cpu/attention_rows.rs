//! What attention does to one row of 64 scores beside products: maximum, exponential, rounding to pairs of bf16; in plain
//! Rust, and where the compiler does not find the instructions, in AVX-512. Both give the same bits, but that the
//! instructions round a denormal number to a bf16 zero.

use super::attention_tile::{BLOCK, Row};
use crate::kernels::element::Element;
use half::bf16;

/// The largest of a row's numbers; NaN where one is, or not.
#[inline(always)]
pub fn max(row: &Row) -> f32 {
    let larger = |a: f32, b: f32| if a > b { a } else { b };
    let mut lanes = [f32::NEG_INFINITY; 16];
    for chunk in row.chunks_exact(16) {
        lanes.iter_mut().zip(chunk).for_each(|(lane, x)| *lane = larger(*x, *lane));
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, larger)
}

/// Word j is `(first[j], second[j])`, rounded to bf16.
#[inline(always)]
pub fn pair_rows(first: &Row, second: &Row, words: &mut Row) {
    for ((word, x), y) in words.iter_mut().zip(first).zip(second) {
        *word = pair(*x, *y);
    }
}

/// Word j is `(row[2 * j], row[2 * j + 1])`, rounded to bf16.
#[inline(always)]
pub fn pair_columns(row: &Row, words: &mut [f32; BLOCK / 2]) {
    for (word, x) in words.iter_mut().zip(row.chunks_exact(2)) {
        *word = pair(x[0], x[1]);
    }
}

#[inline(always)]
fn pair(first: f32, second: f32) -> f32 {
    let bits = |x| u32::from(<bf16 as Element>::from_f32(x).to_bits());
    f32::from_bits(bits(first) | bits(second) << 16)
}

#[cfg(target_arch = "x86_64")]
pub use avx512::*;

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::super::exp;
    use super::{BLOCK, Row};
    use std::arch::x86_64::*;

    /// [`super::max`].
    ///
    /// # Safety
    /// The processor has AVX-512 F.
    #[target_feature(enable = "avx512f")]
    #[inline]
    pub fn max_512(row: &Row) -> f32 {
        // SAFETY: the four loads cover the 64 numbers of the row.
        let part = |index: usize| unsafe { _mm512_loadu_ps(row.as_ptr().add(index * 16)) };
        _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(part(0), part(1)), _mm512_max_ps(part(2), part(3))))
    }

    /// Sets the first `walk` numbers x of a row, and those up to the next multiple of 16, to `exp(x * scale - shift)`, the others
    /// to 0.
    ///
    /// # Safety
    /// The processor has AVX-512 F.
    #[target_feature(enable = "avx512f")]
    #[inline]
    pub fn exp_512(row: &mut Row, walk: usize, scale: f32, shift: f32) {
        let (scale, shift) = (_mm512_set1_ps(scale), _mm512_set1_ps(shift));
        for at in (0..BLOCK).step_by(16) {
            // SAFETY: each step reads and writes 16 of the 64 numbers.
            unsafe {
                let x = _mm512_loadu_ps(row.as_ptr().add(at));
                let y = if at < walk { exp::exp_512(_mm512_sub_ps(_mm512_mul_ps(x, scale), shift)) } else { _mm512_setzero_ps() };
                _mm512_storeu_ps(row.as_mut_ptr().add(at), y);
            }
        }
    }

    /// [`super::pair_rows`].
    ///
    /// # Safety
    /// The processor has AVX-512 F, BW and BF16.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    #[inline]
    pub fn pair_rows_512(first: &Row, second: &Row, words: &mut Row) {
        // Place 2j takes the j-th number of the first row, place 2j + 1 the j-th of the second, 16 places further.
        let order: [i16; 32] = std::array::from_fn(|place| (place / 2 + place % 2 * 16) as i16);
        // SAFETY: `order` is 64 bytes, and each step reads 16 of the 64 numbers of each row and writes 16 of 64 words.
        unsafe {
            let order = _mm512_loadu_si512(order.as_ptr().cast());
            for at in (0..BLOCK).step_by(16) {
                let (x, y) = (_mm512_loadu_ps(first.as_ptr().add(at)), _mm512_loadu_ps(second.as_ptr().add(at)));
                let both = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(y, x));
                _mm512_storeu_si512(words.as_mut_ptr().add(at).cast(), _mm512_permutexvar_epi16(order, both));
            }
        }
    }

    /// [`super::pair_columns`].
    ///
    /// # Safety
    /// The processor has AVX-512 F and BF16.
    #[target_feature(enable = "avx512f,avx512bf16")]
    #[inline]
    pub fn pair_columns_512(row: &Row, words: &mut [f32; BLOCK / 2]) {
        for at in [0, 32] {
            // SAFETY: each step reads 32 of the 64 numbers and writes 16 of the 32 words.
            unsafe {
                let (x, y) = (_mm512_loadu_ps(row.as_ptr().add(at)), _mm512_loadu_ps(row.as_ptr().add(at + 16)));
                let both = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(y, x));
                _mm512_storeu_si512(words.as_mut_ptr().add(at / 2).cast(), both);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::exp::exp;
    use super::*;
    use crate::kernels::cpu::isa::Isa;

    fn bits(words: &[f32]) -> Vec<u32> {
        words.iter().map(|word| word.to_bits()).collect()
    }

    #[test]
    fn each_form_of_a_row_operation_gives_the_bits_of_its_definition() {
        let first: Row = std::array::from_fn(|i| (i as f32 - 30.3) * if i % 2 == 0 { 1.1 } else { -0.7 });
        let second: Row = std::array::from_fn(|i| i as f32 / 7.0);
        let both = |x: f32, y: f32| u32::from(bf16::from_f32(x).to_bits()) | u32::from(bf16::from_f32(y).to_bits()) << 16;
        let want_rows: Vec<u32> = first.iter().zip(&second).map(|(x, y)| both(*x, *y)).collect();
        let want_columns: Vec<u32> = first.chunks_exact(2).map(|x| both(x[0], x[1])).collect();
        let want_max = first.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
        let (mut words, mut half) = ([0.0; BLOCK], [0.0; BLOCK / 2]);
        pair_rows(&first, &second, &mut words);
        pair_columns(&first, &mut half);
        assert_eq!((max(&first), bits(&words), bits(&half)), (want_max, want_rows.clone(), want_columns.clone()));
        #[cfg(target_arch = "x86_64")]
        if Isa::best() >= Isa::Avx512Bf16 {
            let (mut exponentials, mut some) = (first, first);
            // SAFETY: the processor has AVX-512 F, BW and BF16.
            let max = unsafe {
                pair_rows_512(&first, &second, &mut words);
                pair_columns_512(&first, &mut half);
                exp_512(&mut exponentials, BLOCK, 0.3, 1.7);
                exp_512(&mut some, 17, 0.3, 1.7);
                max_512(&first)
            };
            assert_eq!((max, bits(&words), bits(&half)), (want_max, want_rows, want_columns));
            assert_eq!(bits(&exponentials), bits(&first.map(|x| exp(x * 0.3 - 1.7))));
            assert_eq!((&some[..32], &some[32..]), (&exponentials[..32], &[0.0; 32][..]));
        }
    }
}
