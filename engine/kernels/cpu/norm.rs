//! Passes over whole gradients and parameters: the sum of squares for clipping, and scale, add, fill, convert.
//! The rule that turns a norm into a clipping factor belongs to the trainer.

use super::threads::{Shared, parallel, parallel_ranges};
use crate::kernels::element::{Element, Float};
use crate::vectorised;

/// Elements of one partial sum: blocks start at multiples of this in each slice, whatever the threads.
const BLOCK: usize = 16_384;
/// Elements below which a thread of its own costs more than it saves.
const LEAST: usize = 32_768;
/// f64 lanes of a partial sum.
const LANES: usize = 16;

/// The sum of the squares of all elements of all slices, in f64. Finite exactly if every element is: the square of an
/// f32 cannot overflow f64. The order of summation depends on the slices' lengths and order alone.
pub fn sum_of_squares<E: Float>(slices: &[&[E]]) -> f64 {
    let blocks: Vec<&[E]> = slices.iter().flat_map(|slice| slice.chunks(BLOCK)).collect();
    let mut sums = vec![0.0f64; blocks.len()];
    let shared = Shared::new(&mut sums);
    parallel_ranges(blocks.len(), 2, |range| {
        // SAFETY: parallel_ranges hands out disjoint ranges.
        let sums = unsafe { shared.part(range.clone()) };
        sums.iter_mut().zip(&blocks[range]).for_each(|(sum, block)| *sum = block_sum_of_squares(block));
    });
    sums.iter().sum()
}

vectorised! {
    fn block_sum_of_squares<E: Float>(block: &[E]) -> f64 {
        let mut lanes = [0.0f64; LANES];
        let (chunks, tail) = block.as_chunks::<LANES>();
        for chunk in chunks {
            for lane in 0..LANES {
                let value = f64::from(chunk[lane].to_f32());
                lanes[lane] += value * value;
            }
        }
        for (lane, value) in lanes.iter_mut().zip(tail) {
            let value = f64::from(value.to_f32());
            *lane += value * value;
        }
        lanes.iter().sum()
    }
}

/// Index and value of the first element that is not finite, to name it in a message.
pub fn first_non_finite<E: Float>(values: &[E]) -> Option<(usize, f32)> {
    values.iter().map(|v| v.to_f32()).enumerate().find(|(_, v)| !v.is_finite())
}

/// Multiplies each value by `by`, rounding once.
pub fn scale<E: Float>(values: &mut [E], by: f32) {
    let count = values.len();
    let values = Shared::new(values);
    // SAFETY: parallel_ranges hands out disjoint ranges.
    parallel_ranges(count, LEAST, |range| scale_part(unsafe { values.part(range) }, by));
}

vectorised! {
    fn scale_part<E: Float>(values: &mut [E], by: f32) {
        for value in values {
            *value = E::from_f32(value.to_f32() * by);
        }
    }
}

/// Adds `x` to `y`, element by element, in f32, rounding once to the type of `y`.
pub fn add<D: Float, S: Float>(y: &mut [D], x: &[S]) {
    assert!(y.len() == x.len(), "add: {} values to {}", x.len(), y.len());
    let y = Shared::new(y);
    parallel_ranges(x.len(), LEAST, |range| {
        // SAFETY: parallel_ranges hands out disjoint ranges.
        add_part(unsafe { y.part(range.clone()) }, &x[range]);
    });
}

vectorised! {
    fn add_part<D: Float, S: Float>(y: &mut [D], x: &[S]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = D::from_f32(y.to_f32() + x.to_f32());
        }
    }
}

/// `y = (1 - weight) * y + weight * x`, element by element, in f32.
pub fn blend(y: &mut [f32], x: &[f32], weight: f64) {
    assert!(y.len() == x.len(), "blend: {} values with {}", y.len(), x.len());
    let y = Shared::new(y);
    parallel_ranges(x.len(), LEAST, |range| {
        // SAFETY: parallel_ranges hands out disjoint ranges.
        blend_part(unsafe { y.part(range.clone()) }, &x[range], (1.0 - weight) as f32, weight as f32);
    });
}

vectorised! {
    fn blend_part(y: &mut [f32], x: &[f32], rest: f32, weight: f32) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = rest * *y + weight * x;
        }
    }
}

/// Sets every element to `value`.
pub fn fill<E: Element>(values: &mut [E], value: E) {
    let count = values.len();
    let values = Shared::new(values);
    // SAFETY: parallel_ranges hands out disjoint ranges.
    parallel_ranges(count, LEAST, |range| unsafe { values.part(range) }.fill(value));
}

/// Writes `from` to `to` in the type of `to`: bf16 rounds to nearest even, widening is exact.
pub fn convert<S: Float, D: Float>(from: &[S], to: &mut [D]) {
    assert!(to.len() == from.len(), "convert: {} values to {}", from.len(), to.len());
    let to = Shared::new(to);
    parallel_ranges(from.len(), LEAST, |range| {
        // SAFETY: parallel_ranges hands out disjoint ranges.
        convert_part(&from[range.clone()], unsafe { to.part(range) });
    });
}

vectorised! {
    fn convert_part<S: Float, D: Float>(from: &[S], to: &mut [D]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = D::from_f32(from.to_f32());
        }
    }
}

/// Adds the sum of each column of `x` to `sums`: the gradient of a bias.
///
/// - `x`: `[rows, columns]`
/// - `sums`: `[columns]`, f32; each column adds its rows in order
pub fn add_column_sums<E: Float>(x: &[E], sums: &mut [f32]) {
    let columns = sums.len();
    assert!(columns > 0 && x.len().is_multiple_of(columns), "column sums: {} values do not divide into rows of {columns}", x.len());
    let sums = Shared::new(sums);
    // A task owns at least one cache line of columns.
    let tasks = columns.div_ceil(64);
    parallel(tasks, |task| {
        let own = task * 64..((task + 1) * 64).min(columns);
        // SAFETY: tasks own disjoint columns.
        column_sums_part(x, columns, own.start, unsafe { sums.part(own) });
    });
}

vectorised! {
    fn column_sums_part<E: Float>(x: &[E], columns: usize, first: usize, sums: &mut [f32]) {
        for row in x.chunks_exact(columns) {
            for (sum, x) in sums.iter_mut().zip(&row[first..]) {
                *sum += x.to_f32();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::samples::{assert_near, assert_same_on_any_threads, cast, uniform, wide};
    use super::*;
    use half::bf16;

    #[test]
    fn sums_of_squares_match_f64_and_show_what_is_not_finite() {
        let parts: Vec<Vec<f32>> = [0, 1, 7, 33, 16_384, 50_001].iter().map(|count| uniform(*count as u64, *count)).collect();
        let slices: Vec<&[f32]> = parts.iter().map(Vec::as_slice).collect();
        // The samples are multiples of 2^-23, so whole numbers hold the exact sum.
        let exact: u64 = parts.iter().flatten().map(|v| ((v * 8_388_608.0) as i64).pow(2) as u64).sum();
        let want = exact as f64 / 2f64.powi(46);
        assert!((sum_of_squares(&slices) / want - 1.0).abs() < 1e-13);
        assert_eq!(sum_of_squares::<f32>(&[]), 0.0);
        assert_eq!(sum_of_squares(&[&[3.0f32][..], &[4.0]]), 25.0);
        assert_eq!(sum_of_squares(&[&cast::<bf16>(&[3.0, 4.0])[..]]), 25.0);
        assert!(sum_of_squares(&[&[f32::MAX; 40][..]]).is_finite());
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = uniform(1, 70);
            values[41] = bad;
            assert!(!sum_of_squares(&[&values[..]]).is_finite());
            assert_eq!(first_non_finite(&values).map(|(index, _)| index), Some(41));
        }
        assert_eq!(first_non_finite(&uniform(1, 70)), None);
        assert_same_on_any_threads(|| sum_of_squares(&slices).to_bits());
    }

    #[test]
    fn elementwise_passes_do_what_they_say() {
        for count in [0, 1, 33, 70_001] {
            let (a, b) = (uniform(1, count), uniform(2, count));
            let mut scaled = a.clone();
            scale(&mut scaled, 0.5);
            assert_near("scale", &scaled, &wide(&a).iter().map(|v| v * 0.5).collect::<Vec<_>>(), 0.0, 0.0);
            let mut narrow = vec![bf16::ONE; count];
            convert(&a, &mut narrow);
            assert_eq!(narrow, a.iter().map(|v| bf16::from_f32(*v)).collect::<Vec<_>>());
            let mut widened = vec![0.0f32; count];
            convert(&narrow, &mut widened);
            assert_eq!(widened, narrow.iter().map(|v| v.to_f32()).collect::<Vec<_>>());
            let mut sum = b.clone();
            add(&mut sum, &narrow);
            assert_eq!(sum, b.iter().zip(&widened).map(|(b, a)| b + a).collect::<Vec<_>>());
            add(&mut narrow, &b);
            assert_eq!(narrow, sum.iter().map(|v| bf16::from_f32(*v)).collect::<Vec<_>>());
            fill(&mut sum, 2.0);
            assert!(sum.iter().all(|v| *v == 2.0));
        }
    }

    #[test]
    fn column_sums_add_rows_in_order() {
        for (rows, columns) in [(0, 3), (1, 1), (7, 33), (19, 200)] {
            let x = uniform(3, rows * columns);
            let mut want = vec![1.0f32; columns];
            x.chunks(columns).for_each(|row| want.iter_mut().zip(row).for_each(|(sum, v)| *sum += v));
            let mut got = vec![1.0f32; columns];
            add_column_sums(&x, &mut got);
            assert_eq!(got, want);
        }
    }
}
