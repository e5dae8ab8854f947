//! Sums and maxima over a row in an order that the row's length alone decides: element `i` goes to lane `i % 32`, and
//! the lanes are folded in halves. Every vector form adds in this order, so all give the same bits.
//! Not for whole tensors: past some thousand elements the caller adds blocks of rows in f64.

/// Lanes of a sum: two AVX-512 registers, so that one addition need not wait for the one before.
pub const LANES: usize = 32;

#[inline(always)]
fn fold(mut lanes: [f32; LANES], join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = join(lanes[lane], lanes[lane + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// The sum of `term(a)` over a row.
#[inline(always)]
pub fn sum<A: Copy>(a: &[A], term: impl Fn(A) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a, a_tail) = a.as_chunks::<LANES>();
    for a in a {
        for lane in 0..LANES {
            lanes[lane] += term(a[lane]);
        }
    }
    for (lane, a) in lanes.iter_mut().zip(a_tail) {
        *lane += term(*a);
    }
    fold(lanes, |x, y| x + y)
}

/// The sum of `term(a, b)` over two rows of one length.
#[inline(always)]
pub fn sum2<A: Copy, B: Copy>(a: &[A], b: &[B], term: impl Fn(A, B) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let ((a, a_tail), (b, b_tail)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            lanes[lane] += term(a[lane], b[lane]);
        }
    }
    for (lane, (a, b)) in lanes.iter_mut().zip(a_tail.iter().zip(b_tail)) {
        *lane += term(*a, *b);
    }
    fold(lanes, |x, y| x + y)
}

/// The sum of `term(a, b, c)` over three rows of one length.
#[inline(always)]
pub fn sum3<A: Copy, B: Copy, C: Copy>(a: &[A], b: &[B], c: &[C], term: impl Fn(A, B, C) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let ((a, a_tail), (b, b_tail), (c, c_tail)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>(), c.as_chunks::<LANES>());
    for ((a, b), c) in a.iter().zip(b).zip(c) {
        for lane in 0..LANES {
            lanes[lane] += term(a[lane], b[lane], c[lane]);
        }
    }
    for (lane, ((a, b), c)) in lanes.iter_mut().zip(a_tail.iter().zip(b_tail).zip(c_tail)) {
        *lane += term(*a, *b, *c);
    }
    fold(lanes, |x, y| x + y)
}

/// The largest value of a row, minus infinity for an empty one. A NaN is passed over.
#[inline(always)]
pub fn max(values: &[f32]) -> f32 {
    let larger = |x: f32, y: f32| if y > x { y } else { x };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, tail) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = larger(lanes[lane], chunk[lane]);
        }
    }
    for (lane, value) in lanes.iter_mut().zip(tail) {
        *lane = larger(*lane, *value);
    }
    fold(lanes, larger)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_and_maxima_of_rows_of_all_lengths_are_right() {
        for len in [0usize, 1, 7, 31, 32, 33, 64, 100] {
            let row: Vec<f32> = (0..len).map(|i| i as f32 - 20.0).collect();
            // Small whole numbers: f32 sums them exactly in any order.
            assert_eq!(sum(&row, |v| v), row.iter().sum::<f32>(), "{len}");
            assert_eq!(sum2(&row, &row, |a, b| a * b), row.iter().map(|v| v * v).sum::<f32>(), "{len}");
            assert_eq!(sum3(&row, &row, &row, |a, b, c| a + b - c), row.iter().sum::<f32>(), "{len}");
            assert_eq!(max(&row), row.iter().copied().fold(f32::NEG_INFINITY, f32::max), "{len}");
        }
    }
}
