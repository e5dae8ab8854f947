//! Products of matrices of any batch shape, for heads and probes; the model's own products are `linear.rs` and its kernels.
//! A plain loop of ours over the threads: dfdx 0.13 without its feature `cpu` (a second gemm and rayon) overwrites where it
//! should add along k, so its product is wrong for k > 1 (a test in `dfdx_tape.rs` watches this).
//! Each element is summed along k in order, in f32, whatever the number of rows and threads.

use super::any::AnyTensor;
use super::cuda::generic as cuda;
use super::operation::{as_f32, record_float, require_float, require_same};
use super::shape::{View, broadcast_shape, room_for};
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use crate::kernels::cpu::threads::parallel;
use std::sync::Mutex;

/// Rows that share a pass over `b`, whose row then stays in the nearest cache.
const ROWS: usize = 8;
/// Multiplications below which threads cost more than they bring.
const SMALL: usize = 1 << 16;

/// Sizes of one product.
#[derive(Clone, Copy)]
struct Sizes {
    m: usize,
    k: usize,
    n: usize,
}

/// out += a b, for `a` [m, k], `b` [k, n], `out` [m, n].
fn multiply_add(out: &mut [f32], a: &[f32], b: &[f32], Sizes { m, k, n }: Sizes) {
    assert_eq!((out.len(), a.len(), b.len()), (m * n, m * k, k * n));
    if out.is_empty() || k == 0 {
        return;
    }
    let some_rows = |out: &mut [f32], a: &[f32]| {
        for (index, b) in b.chunks_exact(n).enumerate() {
            for (out, a) in out.chunks_exact_mut(n).zip(a.chunks_exact(k)) {
                let a = a[index];
                out.iter_mut().zip(b).for_each(|(out, b)| *out += a * b);
            }
        }
    };
    if m * k * n < SMALL {
        out.chunks_mut(ROWS * n).zip(a.chunks(ROWS * k)).for_each(|(out, a)| some_rows(out, a));
        return;
    }
    // Each task locks its own part alone; the locks are there to hand out `&mut` parts, not to wait.
    let parts: Vec<Mutex<&mut [f32]>> = out.chunks_mut(ROWS * n).map(Mutex::new).collect();
    parallel(parts.len(), |task| {
        let mut out = parts[task].lock().expect("a part is locked once");
        some_rows(&mut out, &a[task * ROWS * k..(task * ROWS * k + ROWS * k).min(a.len())]);
    });
}

fn transposed(x: &[f32], rows: usize, columns: usize) -> Buffer<f32> {
    View { shape: vec![columns, rows], strides: vec![1, columns as isize], offset: 0 }.read(x)
}

/// One product of a batch: where its matrices start, counted in matrices.
struct Place {
    a: usize,
    b: usize,
    out: usize,
}

/// The matrix product of `a` [..., m, k] and `b` [..., k, n], as torch's `matmul`: leading axes broadcast; a vector on the
/// left is a row, on the right a column, and its axis of size 1 is gone from the result.
///
/// - `a`, `b`: both f32, or both bf16 (computed in f32, rounded once)
/// - returns `[..., m, n]`
///
/// Errors: [`Error::Dtype`] if the types differ or are integers; [`Error::Shape`] for rank 0, different k, or leading axes
/// that do not broadcast.
pub fn matmul(a: &AnyTensor, b: &AnyTensor) -> Result<AnyTensor> {
    let dtype = require_float("matmul", "a", a)?;
    require_same("matmul", "b", a, b)?;
    for (arg, x) in [("a", a), ("b", b)] {
        if x.rank() == 0 {
            return Err(Error::Shape { op: "matmul", arg, expected: "of rank 1 or more".into(), got: "rank 0".into() });
        }
    }
    let (a_batch, a_matrix) = a.shape().split_at(a.rank().saturating_sub(2));
    let (b_batch, b_matrix) = b.shape().split_at(b.rank().saturating_sub(2));
    let (m, k) = if let [m, k] = *a_matrix { (Some(m), k) } else { (None, a_matrix[0]) };
    let (b_k, n) = if let [k, n] = *b_matrix { (k, Some(n)) } else { (b_matrix[0], None) };
    if k != b_k {
        let expected = format!("with {k} rows, as {:?} has columns", a.shape());
        return Err(Error::Shape { op: "matmul", arg: "b", expected, got: format!("{:?}", b.shape()) });
    }
    let batch = broadcast_shape("matmul", "b", a_batch, b_batch)?;
    let shape: Vec<usize> = batch.iter().copied().chain(m).chain(n).collect();
    let out_len = room_for("matmul", &shape)?;
    let mut sizes = Sizes { m: m.unwrap_or(1), k, n: n.unwrap_or(1) };
    let places: Vec<Place> = if a.is_empty() || b.is_empty() {
        Vec::new()
    } else if b_batch.is_empty() {
        // One `b` for all: the leading axes of `a` are just more rows.
        sizes.m *= a_batch.iter().product::<usize>();
        vec![Place { a: 0, b: 0, out: 0 }]
    } else {
        let numbers = |from: &[usize]| {
            let count = from.iter().product::<usize>() as i32;
            View::broadcast(from, &batch).read(&(0..count).collect::<Vec<i32>>())
        };
        let (a, b) = (numbers(a_batch), numbers(b_batch));
        a.iter().zip(b.iter()).enumerate().map(|(out, (a, b))| Place { a: *a as usize, b: *b as usize, out }).collect()
    };
    let Sizes { m, k, n } = sizes;
    if let Some(device) = a.device() {
        let places = places.iter().map(|place| [place.a, place.b, place.out]).collect();
        return cuda::matmul(device, (a, b), (m, k, n), places, shape);
    }
    let at = |values: usize, index: usize| index * values..(index + 1) * values;
    let (left, right) = (a.data().clone(), b.data().clone());
    let mut out = Buffer::zeroed(out_len);
    let (a_values, b_values) = (as_f32(&left), as_f32(&right));
    for place in &places {
        multiply_add(&mut out[at(m * n, place.out)], &a_values[at(m * k, place.a)], &b_values[at(k * n, place.b)], sizes);
    }
    drop((a_values, b_values));
    let lens = [a.len(), b.len()];
    Ok(record_float(shape, dtype, out, &[a, b], move |gradient, sink| {
        let (a, b) = (as_f32(&left), as_f32(&right));
        if sink.wants(0) {
            let mut out = Buffer::zeroed(lens[0]);
            for place in &places {
                let b = transposed(&b[at(k * n, place.b)], k, n);
                multiply_add(&mut out[at(m * k, place.a)], &gradient[at(m * n, place.out)], &b, Sizes { m, k: n, n: k });
            }
            sink.add(0, out);
        }
        if sink.wants(1) {
            let mut out = Buffer::zeroed(lens[1]);
            for place in &places {
                let a = transposed(&a[at(m * k, place.a)], m, k);
                multiply_add(&mut out[at(k * n, place.b)], &a, &gradient[at(m * n, place.out)], Sizes { m: k, k: m, n });
            }
            sink.add(1, out);
        }
        Ok(())
    }))
}

#[cfg(test)]
mod tests {
    use super::super::gradient_check::{check, integers, numbers, tensor};
    use super::*;
    use crate::tensor::reduce::sum;

    /// Entry by entry, in f64, for `batches` pairs of [m, k] and [k, n]; a side with one matrix serves all.
    fn reference(x: &[Vec<f64>], batches: usize, m: usize, k: usize, n: usize) -> Vec<f64> {
        let a = |b: usize, i: usize, l: usize| x[0][(b * m * k % x[0].len()) + i * k + l];
        let b = |b: usize, l: usize, j: usize| x[1][(b * k * n % x[1].len()) + l * n + j];
        (0..batches * m * n)
            .map(|at| {
                let (batch, i, j) = (at / (m * n), at / n % m, at % n);
                (0..k).map(|l| a(batch, i, l) * b(batch, l, j)).sum()
            })
            .collect()
    }

    #[test]
    fn values_and_gradients_agree_with_f64_over_ranks() {
        for (a, b, [batches, m, k, n], shape) in [
            (vec![7], vec![7], [1, 1, 7, 1], vec![]),
            (vec![3, 7], vec![7], [1, 3, 7, 1], vec![3]),
            (vec![7], vec![7, 5], [1, 1, 7, 5], vec![5]),
            (vec![3, 7], vec![7, 5], [1, 3, 7, 5], vec![3, 5]),
            (vec![2, 3, 7], vec![7, 5], [2, 3, 7, 5], vec![2, 3, 5]),
            (vec![3, 7], vec![2, 7, 5], [2, 3, 7, 5], vec![2, 3, 5]),
            (vec![2, 3, 7], vec![2, 7, 1], [2, 3, 7, 1], vec![2, 3, 1]),
        ] {
            let x = [numbers(&a), numbers(&b)];
            assert_eq!(matmul(&x[0], &x[1]).unwrap().shape(), shape);
            check("matmul", &x, |x| matmul(&x[0], &x[1]), |x| reference(x, batches, m, k, n));
        }
    }

    #[test]
    fn threads_and_neighbours_change_no_bit() {
        let (a, b) = (numbers(&[33, 65]), numbers(&[65, 47]));
        let whole = matmul(&a, &b).unwrap().to_f32_vec();
        for row in [0, 8, 32] {
            let alone = matmul(&tensor(&[65], &a.to_f32_vec()[row * 65..(row + 1) * 65]), &b).unwrap();
            assert_eq!(alone.to_f32_vec(), whole[row * 47..(row + 1) * 47]);
        }
    }

    #[test]
    fn a_matrix_meets_itself_and_nothing_sums_to_zero() {
        // d sum(X X) / dX_ij = sum of row j + sum of column i.
        let x = tensor(&[2, 2], &[1., 2., 3., 4.]).leaf().unwrap();
        let y = matmul(&x, &x).unwrap();
        assert_eq!(y.to_f32_vec(), [7., 10., 15., 22.]);
        sum(&y, None, false).unwrap().backward().unwrap();
        assert_eq!(x.gradient().unwrap().unwrap().to_f32_vec(), [7., 11., 9., 13.]);
        let (a, b) = (tensor(&[2, 0], &[]).leaf().unwrap(), tensor(&[0, 3], &[]).leaf().unwrap());
        let y = matmul(&a, &b).unwrap();
        assert_eq!((y.shape(), y.to_f32_vec()), (&[2, 3][..], vec![0.; 6]));
        sum(&y, None, false).unwrap().backward().unwrap();
        assert_eq!((a.gradient().unwrap().unwrap().shape(), b.gradient().unwrap().unwrap().shape()), (&[2, 0][..], &[0, 3][..]));
    }

    #[test]
    fn wrong_operands_are_named() {
        let a = numbers(&[2, 3]);
        for (b, part) in [
            (numbers(&[2, 3]), "3 rows"),
            (numbers(&[]), "rank 1 or more"),
            (numbers(&[2]), "3 rows"),
            (integers(&[3], &[1, 2, 3]), "should be f32"),
        ] {
            let told = matmul(&a, &b).unwrap_err().to_string();
            assert!(told.starts_with("matmul: `b`") && told.contains(part), "{told}");
        }
        assert!(matmul(&numbers(&[2, 3, 3]), &numbers(&[4, 3, 3])).unwrap_err().to_string().contains("broadcastable"));
    }
}
