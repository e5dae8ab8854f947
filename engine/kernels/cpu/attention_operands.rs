//! Packing of a head's rows into the operands of attention's register tile (attention_tile.rs): words side by side in the
//! order in which the tile reads them. Knows no sums.

use super::attention_tile::{BLOCK, COLUMNS, Form};
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

/// Rows of one head in a larger matrix: row i is `values[i * stride..][..head_dim]`.
#[derive(Clone, Copy)]
pub struct HeadRows<'a, E> {
    pub values: &'a [E],
    pub stride: usize,
    pub count: usize,
    pub head_dim: usize,
}

impl<'a, E: Float> HeadRows<'a, E> {
    /// Rows `first..first + count` of `matrix` with rows of `stride` elements, from `column` on.
    #[inline(always)]
    pub fn new(matrix: &'a [E], stride: usize, first: usize, count: usize, column: usize, head_dim: usize) -> Self {
        assert!(count > 0);
        let start = first * stride + column;
        Self { values: &matrix[start..start + (count - 1) * stride + head_dim], stride, count, head_dim }
    }

    #[inline(always)]
    pub fn row(&self, index: usize) -> &'a [E] {
        &self.values[index * self.stride..][..self.head_dim]
    }

    /// Left operands reduced along head_dim: `[rows, words(head_dim)]`; missing rows are zero.
    #[inline(always)]
    pub fn pack_rows<F: Form>(&self, out: &mut [f32]) {
        for (index, out) in out.chunks_exact_mut(words::<F>(self.head_dim)).enumerate() {
            if index >= self.count {
                out.fill(0.0);
            } else {
                self.row_words::<F>(index, out.iter_mut());
            }
        }
    }

    /// Right operands reduced along head_dim: `[2 panels, words(head_dim), 32 rows]` for the 64 rows of a block; missing
    /// rows are zero.
    #[inline(always)]
    pub fn pack_transposed<F: Form>(&self, out: &mut [f32]) {
        for (panel, out) in out.chunks_exact_mut(words::<F>(self.head_dim) * COLUMNS).enumerate() {
            for lane in 0..COLUMNS {
                let (index, out) = (panel * COLUMNS + lane, out[lane..].iter_mut().step_by(COLUMNS));
                if index >= self.count {
                    out.for_each(|word| *word = 0.0);
                } else {
                    self.row_words::<F>(index, out);
                }
            }
        }
    }

    #[inline(always)]
    fn row_words<'b, F: Form>(&self, index: usize, out: impl Iterator<Item = &'b mut f32>) {
        if F::PAIRS {
            out.zip(self.row(index).chunks_exact(2)).for_each(|(out, pair)| *out = word::<F, E>(pair[0], pair[1]));
        } else {
            out.zip(self.row(index)).for_each(|(out, x)| *out = x.to_f32());
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
                if index >= self.count {
                    out.fill(0.0);
                    continue;
                }
                let first = &self.row(index)[column..][..width];
                out[width..].fill(0.0);
                if F::PAIRS && index + 1 < self.count {
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
