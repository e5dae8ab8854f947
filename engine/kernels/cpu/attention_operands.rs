//! Packing of a head's rows into the operands of attention's register tile (attention_tile.rs): words side by side in the
//! order in which the tile reads them. Knows no sums.

use super::attention_tile::{BLOCK, COLUMNS, Form};
#[cfg(target_arch = "x86_64")]
use super::{isa::Isa, pack_256};
use crate::kernels::element::Float;

/// Words of `count` elements along the reduction.
#[inline(always)]
pub fn words<F: Form>(count: usize) -> usize {
    if F::PAIRS { count / 2 } else { count }
}

/// The word of one element, or of the two that neighbour along the reduction.
#[inline(always)]
pub fn word<F: Form, E: Float>(first: E, second: E) -> f32 {
    if F::PAIRS {
        // The upper half of a widened bf16 is its bits.
        f32::from_bits((first.to_f32().to_bits() >> 16) | (second.to_f32().to_bits() & 0xffff_0000))
    } else {
        first.to_f32()
    }
}

/// The rows of a matrix that neighbouring positions of a document are, `count` of them: the first `shared` from row `prefix` on,
/// those of an earlier document, the others from row `own` on.
#[derive(Clone, Copy)]
pub struct Positions {
    pub prefix: usize,
    pub shared: usize,
    pub own: usize,
    pub count: usize,
}

impl Positions {
    /// The first `count` rows, none of them shared.
    #[inline(always)]
    pub fn first(count: usize) -> Self {
        Self { prefix: 0, shared: 0, own: 0, count }
    }

    #[inline(always)]
    pub fn row(&self, index: usize) -> usize {
        if index < self.shared { self.prefix + index } else { self.own + index - self.shared }
    }
}

/// One head in rows of a larger matrix.
#[derive(Clone, Copy)]
pub struct HeadRows<'a, E> {
    matrix: &'a [E],
    stride: usize,
    positions: Positions,
    column: usize,
    head_dim: usize,
}

impl<'a, E: Float> HeadRows<'a, E> {
    /// Rows `positions` of `matrix` with rows of `stride` elements, from `column` on.
    #[inline(always)]
    pub fn new(matrix: &'a [E], stride: usize, positions: Positions, column: usize, head_dim: usize) -> Self {
        Self { matrix, stride, positions, column, head_dim }
    }

    #[inline(always)]
    pub fn row(&self, index: usize) -> &'a [E] {
        &self.matrix[self.positions.row(index) * self.stride + self.column..][..self.head_dim]
    }

    /// Left operands reduced along head_dim: `[rows, words(head_dim)]`; missing rows are zero.
    #[inline(always)]
    pub fn pack_rows<F: Form>(&self, out: &mut [f32]) {
        for (index, out) in out.chunks_exact_mut(words::<F>(self.head_dim)).enumerate() {
            if index >= self.positions.count {
                out.fill(0.0);
            } else {
                self.row_words::<F>(index, 0, out.iter_mut());
            }
        }
    }

    /// Right operands reduced along head_dim: `[2 panels, words(head_dim), 32 rows]` for the 64 rows of a block; missing
    /// rows are zero.
    #[inline(always)]
    pub fn pack_transposed<F: Form>(&self, out: &mut [f32]) {
        let depth = words::<F>(self.head_dim);
        for (panel, out) in out.chunks_exact_mut(depth * COLUMNS).enumerate() {
            let first = panel * COLUMNS;
            #[cfg(target_arch = "x86_64")]
            let done = if Isa::best() >= Isa::Avx2 {
                // SAFETY: the processor has AVX2; `out` is a whole panel.
                unsafe { self.turn_rows::<F>(first, out) }
            } else {
                0
            };
            #[cfg(not(target_arch = "x86_64"))]
            let done = 0;
            for lane in 0..COLUMNS {
                let out = out[done * COLUMNS..].chunks_exact_mut(COLUMNS).map(|words| &mut words[lane]);
                if first + lane >= self.positions.count {
                    out.for_each(|word| *word = 0.0);
                } else {
                    self.row_words::<F>(first + lane, done, out);
                }
            }
        }
    }

    /// Writes the first words, a multiple of 8, of 32 rows from `first` as a panel `[words(head_dim), 32]`; returns how many.
    ///
    /// # Safety
    /// The processor has AVX2; `out` holds a whole panel.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    unsafe fn turn_rows<F: Form>(&self, first: usize, out: &mut [f32]) -> usize {
        use std::arch::x86_64::*;
        let whole = words::<F>(self.head_dim) / 8 * 8;
        for k in (0..whole).step_by(8) {
            for lane in (0..COLUMNS).step_by(8) {
                let mut square = [_mm256_setzero_si256(); 8];
                for (i, slot) in square.iter_mut().enumerate().take(self.positions.count.saturating_sub(first + lane)) {
                    let row = self.row(first + lane + i);
                    // SAFETY: a word is an element, or two of 2 bytes that lie as they do in it; words `k` to `k + 7` are in the row.
                    *slot = unsafe {
                        if size_of::<E>() == 2 && !F::PAIRS {
                            _mm256_castps_si256(pack_256::widened(_mm_loadu_si128(row.as_ptr().add(k).cast())))
                        } else {
                            _mm256_loadu_si256(row.as_ptr().cast::<f32>().add(k).cast())
                        }
                    };
                }
                for (i, column) in pack_256::transposed(square).into_iter().enumerate() {
                    // SAFETY: 8 lanes from `lane` of word `k + i` lie inside the panel.
                    unsafe { _mm256_storeu_si256(out.as_mut_ptr().add((k + i) * COLUMNS + lane).cast(), column) };
                }
            }
        }
        whole
    }

    /// The words of a row from `from` on.
    #[inline(always)]
    fn row_words<'b, F: Form>(&self, index: usize, from: usize, out: impl Iterator<Item = &'b mut f32>) {
        if F::PAIRS {
            out.zip(self.row(index)[2 * from..].chunks_exact(2)).for_each(|(out, pair)| *out = word::<F, E>(pair[0], pair[1]));
        } else {
            out.zip(&self.row(index)[from..]).for_each(|(out, x)| *out = x.to_f32());
        }
    }

    /// Right operands reduced along the rows: `[panels of 32 columns, words(64), 32]`; missing rows and columns are zero.
    #[inline(always)]
    pub fn pack_panels<F: Form>(&self, out: &mut [f32]) {
        let step = if F::PAIRS { 2 } else { 1 };
        for (panel, out) in out.chunks_exact_mut(words::<F>(BLOCK) * COLUMNS).enumerate() {
            let column = panel * COLUMNS;
            let width = self.head_dim.saturating_sub(column).min(COLUMNS);
            for (k, out) in out.chunks_exact_mut(COLUMNS).enumerate() {
                let index = k * step;
                if index >= self.positions.count {
                    out.fill(0.0);
                    continue;
                }
                let first = &self.row(index)[column..][..width];
                out[width..].fill(0.0);
                if F::PAIRS && index + 1 < self.positions.count {
                    let second = &self.row(index + 1)[column..][..width];
                    out.iter_mut().zip(first).zip(second).for_each(|((out, x), y)| *out = word::<F, E>(*x, *y));
                } else {
                    out.iter_mut().zip(first).for_each(|(out, x)| *out = word::<F, E>(*x, E::default()));
                }
            }
        }
    }
}

/// head_dim rounded up to whole panels.
pub fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(COLUMNS)
}

#[cfg(test)]
mod tests {
    use super::super::attention_tile::{Pairs512, Plain};
    use super::*;
    use half::bf16;

    /// Every word of turned rows is the one that its place asks for, on any processor: packing needs no instructions of the form.
    fn check<F: Form, E: Float>() {
        for head_dim in [2, 14, 16, 40, 64, 128] {
            for count in [1, 7, 8, 33, 64] {
                let stride = head_dim + 3;
                let matrix: Vec<E> = (0..64 * stride).map(|i| E::from_f32((i * 7919 % 1013) as f32 / 500.0 - 1.0)).collect();
                // The first rows lie after the others.
                let positions = Positions { prefix: 64 - count / 3, shared: count / 3, own: 0, count };
                let (rows, depth) = (HeadRows::new(&matrix, stride, positions, 3, head_dim), words::<F>(head_dim));
                let mut out = vec![f32::NAN; BLOCK * depth];
                rows.pack_transposed::<F>(&mut out);
                for (at, got) in out.iter().enumerate() {
                    let (panel, k, lane) = (at / (depth * COLUMNS), at / COLUMNS % depth, at % COLUMNS);
                    let index = panel * COLUMNS + lane;
                    let want = match index < count {
                        false => 0.0,
                        true if F::PAIRS => word::<F, E>(rows.row(index)[2 * k], rows.row(index)[2 * k + 1]),
                        true => rows.row(index)[k].to_f32(),
                    };
                    assert_eq!(got.to_bits(), want.to_bits(), "{} {head_dim} {count}: word {k} of row {index}", E::DTYPE);
                }
            }
        }
    }

    #[test]
    fn turned_rows_have_every_word_in_its_place() {
        check::<Plain, f32>();
        check::<Plain, bf16>();
        check::<Pairs512, bf16>();
    }
}
