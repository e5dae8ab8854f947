//! What the low-rank parts of a weight need beside products: their result joins some columns of a layer's output, and the
//! gradient of those columns is taken out again. And the sum of a weight and its low-rank part, for a merge.
//! Source: Hu et al., LoRA, arXiv 2106.09685, equation 3.

use super::threads::{Shared, parallel_ranges};
use crate::kernels::element::Float;
use crate::vectorised;
use std::ops::Range;

/// Elements below which a thread of its own costs more than it saves.
const LEAST: usize = 32_768;

/// `y[:, columns] += scale * delta`, added in f32 and rounded once.
///
/// - `y`: `[rows, width]`
/// - `delta`: `[rows, columns]`, f32
pub fn add_columns<E: Float>(y: &mut [E], width: usize, columns: Range<usize>, delta: &[f32], scale: f32) {
    let count = check(y.len(), width, &columns, delta.len());
    let y = Shared::new(y);
    parallel_ranges(count, LEAST.div_ceil(columns.len()), |rows| {
        for row in rows {
            // SAFETY: parallel_ranges hands out disjoint ranges of rows, and each row has its own elements.
            let y = unsafe { y.part(row * width + columns.start..row * width + columns.end) };
            add_scaled(y, &delta[row * columns.len()..][..columns.len()], scale);
        }
    });
}

vectorised! {
    fn add_scaled<E: Float>(y: &mut [E], delta: &[f32], scale: f32) {
        for (y, delta) in y.iter_mut().zip(delta) {
            *y = E::from_f32(y.to_f32() + scale * delta);
        }
    }
}

/// `out = scale * dy[:, columns]`.
///
/// - `dy`: `[rows, width]`; `out`: `[rows, columns]`
pub fn take_columns<E: Float>(dy: &[E], width: usize, columns: Range<usize>, scale: f32, out: &mut [E]) {
    let count = check(dy.len(), width, &columns, out.len());
    let out = Shared::new(out);
    parallel_ranges(count, LEAST.div_ceil(columns.len()), |rows| {
        for row in rows {
            // SAFETY: parallel_ranges hands out disjoint ranges of rows, and each row has its own elements.
            let out = unsafe { out.part(row * columns.len()..(row + 1) * columns.len()) };
            let dy = &dy[row * width + columns.start..row * width + columns.end];
            out.iter_mut().zip(dy).for_each(|(out, dy)| *out = E::from_f32(dy.to_f32() * scale));
        }
    });
}

/// The number of rows.
fn check(len: usize, width: usize, columns: &Range<usize>, part: usize) -> usize {
    assert!(columns.start < columns.end && columns.end <= width, "columns {columns:?} of {width}");
    assert_eq!(len % width, 0, "{len} values in rows of {width}");
    let count = len / width;
    assert_eq!(part, count * columns.len(), "a part of {count} rows and columns {columns:?}");
    count
}

/// `values += scale * (b a)`, in f32: each element sums over the rank in order, then joins.
///
/// - `values`: `[rows, inputs]`; `a`: `[rank, inputs]`; `b`: `[rows, rank]`
pub fn add_product(values: &mut [f32], a: &[f32], b: &[f32], rank: usize, scale: f32) {
    assert!(rank > 0 && a.len().is_multiple_of(rank) && b.len().is_multiple_of(rank), "factors of rank {rank}");
    let (inputs, rows) = (a.len() / rank, b.len() / rank);
    assert_eq!(values.len(), rows * inputs, "values of [{rows}, {inputs}]");
    let values = Shared::new(values);
    parallel_ranges(rows, (LEAST / (inputs * rank).max(1)).max(1), |range| {
        let mut sum = vec![0.0; inputs];
        for row in range {
            sum.fill(0.0);
            for (b, a) in b[row * rank..(row + 1) * rank].iter().zip(a.chunks_exact(inputs)) {
                add_scaled(&mut sum, a, *b);
            }
            // SAFETY: parallel_ranges hands out disjoint ranges of rows, and each row has its own elements.
            add_scaled(unsafe { values.part(row * inputs..(row + 1) * inputs) }, &sum, scale);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::super::samples::{assert_near, assert_same_on_any_threads, uniform};
    use super::*;

    #[test]
    fn columns_are_added_and_taken_where_they_lie() {
        let mut y = [1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0];
        add_columns(&mut y, 3, 1..2, &[10.0, 20.0], 0.5);
        assert_eq!(y, [1.0, 7.0, 3.0, 4.0, 15.0, 6.0]);
        let mut out = [0.0f32; 4];
        take_columns(&y, 3, 1..3, 2.0, &mut out);
        assert_eq!(out, [14.0, 6.0, 30.0, 12.0]);
        add_columns::<f32>(&mut [], 3, 0..3, &[], 1.0);
    }

    #[test]
    fn a_product_joins_the_values() {
        let (rows, inputs, rank) = (37, 33, 3);
        let (values, a, b) = (uniform(1, rows * inputs), uniform(2, rank * inputs), uniform(3, rows * rank));
        let mut got = values.clone();
        add_product(&mut got, &a, &b, rank, 1.5);
        let element =
            |i: usize| (0..rank).map(|k| f64::from(b[i / inputs * rank + k]) * f64::from(a[k * inputs + i % inputs])).sum::<f64>();
        let want: Vec<f64> = values.iter().enumerate().map(|(i, value)| f64::from(*value) + 1.5 * element(i)).collect();
        // Five roundings of values below 6.
        assert_near("merged", &got, &want, 0.0, 5.0 * 6.0 * 6e-8);
        assert_same_on_any_threads(|| {
            let (mut values, a, b) = (uniform(4, 64 * 4096), uniform(5, 8 * 4096), uniform(6, 64 * 8));
            add_product(&mut values, &a, &b, 8, 2.0);
            values
        });
    }
}
