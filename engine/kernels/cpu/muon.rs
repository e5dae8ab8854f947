//! Muon's two loops: the momentum of a gradient, and a Newton-Schulz iteration that brings the singular values of a matrix near
//! one. Which parameters are updated so, and how far they move, is the trainer's.
//! Source: Jordan et al., Muon (kellerjordan.github.io/posts/muon, 2024), whose coefficients these are; momentum as in
//! `torch.optim.Muon`.

use super::adamw::{Moment, mix, salt};
use super::gemm::{self, Weight};
use super::norm::sum_of_squares;
use super::panels;
use super::threads::{Shared, parallel, parallel_ranges};
use super::tile::PANEL_COLUMNS;
use crate::kernels::buffer::Buffer;
use crate::vectorised;
use std::sync::Mutex;

/// Most elements of matrices that a thread each has for itself.
const ALONE: usize = 1 << 18;
/// Elements below which a thread of its own costs more than it saves.
const LEAST: usize = 8192;
/// Rows and columns of a block that is turned at once.
const BLOCK: usize = 16;
/// `x <- a x + b (x xᵀ) x + c (x xᵀ)² x` takes singular values from 0.0015 to 1 between 0.68 and 1.21 in [`ITERATIONS`] turns.
pub(in crate::kernels) const COEFFICIENTS: [f32; 3] = [3.4445, -4.7750, 2.0315];
pub(in crate::kernels) const ITERATIONS: usize = 5;
/// What is added to the norm that a matrix is divided by, so that zeros stay zeros.
pub(in crate::kernels) const EPS: f64 = 1e-7;

/// Nesterov's momentum: `m = momentum * m + (1 - momentum) * g` and `update = momentum * m + (1 - momentum) * g`, where `g` is the
/// gradient times `gradient_scale`. All slices have one length and one order.
///
/// - `step`: the number of this update, from 1: decides how bf16 momenta are rounded (`adamw.rs`)
pub fn momentum<M: Moment>(gradient: &[f32], m: &mut [M], update: &mut [f32], momentum: f64, gradient_scale: f64, step: u64) {
    assert!(m.len() == gradient.len() && update.len() == gradient.len(), "momenta of another length");
    let (m, update) = (Shared::new(m), Shared::new(update));
    parallel_ranges(gradient.len(), LEAST, |range| {
        // SAFETY: parallel_ranges hands out disjoint ranges.
        let (m, update) = unsafe { (m.part(range.clone()), update.part(range.clone())) };
        momentum_part(&gradient[range], m, update, momentum, gradient_scale, step);
    });
}

vectorised! {
    fn momentum_part<M: Moment>(gradient: &[f32], m: &mut [M], update: &mut [f32], momentum: f64, gradient_scale: f64, step: u64) {
        let (keep, rest, scale) = (momentum as f32, (1.0 - momentum) as f32, gradient_scale as f32);
        let salt = salt(step);
        for ((gradient, m), update) in gradient.iter().zip(m).zip(update) {
            let part = rest * (gradient * scale);
            let new_m = keep * m.to_f32() + part;
            *m = M::keep(new_m, mix(new_m.to_bits() ^ salt));
            *update = keep * new_m + part;
        }
    }
}

/// A matrix to make orthogonal.
pub struct Matrix {
    /// `[rows, columns]`, row-major
    pub values: Buffer<f32>,
    pub rows: usize,
    pub columns: usize,
    /// What the result is multiplied by.
    pub factor: f32,
}

/// Replaces each matrix by one near `U Vᵀ` of its singular value decomposition `U S Vᵀ`: singular values lie between 0.68 and 1.21
/// then, but for those below 0.0015 of the matrix's Frobenius norm. All is f32: bf16 would not carry the small ones through five squarings.
pub fn orthogonalise(matrices: &mut [Matrix]) {
    if matrices.iter().any(|matrix| matrix.values.len() > ALONE) {
        matrices.iter_mut().for_each(orthogonalise_one);
        return;
    }
    // Each task locks its own matrix alone.
    let matrices: Vec<Mutex<&mut Matrix>> = matrices.iter_mut().map(Mutex::new).collect();
    parallel(matrices.len(), |i| orthogonalise_one(&mut matrices[i].lock().expect("a matrix is locked once")));
}

/// The turns `x <- x p(xᵀ x)` of a tall `x` are `x q`, where q is the product of the p: all turns but the last product need the small
/// matrix `g = xᵀ x` alone, which goes to `p(g) g p(g)`.
fn orthogonalise_one(matrix: &mut Matrix) {
    let Matrix { values, rows, columns, factor } = matrix;
    let (rows, columns, factor) = (*rows, *columns, *factor);
    assert_eq!(values.len(), rows * columns, "values of [{rows}, {columns}]");
    let n = rows.min(columns);
    if n == 0 {
        return;
    }
    let inverse = (1.0 / (sum_of_squares(&[&values[..]]).sqrt() + EPS)) as f32;
    let mut x = Buffer::<f32>::scratch(values.len());
    if rows >= columns {
        fill(&mut x, |i| values[i] * inverse);
    } else {
        turn(values, rows, columns, &mut x, |value| value * inverse);
    }
    let mut panels = Buffer::<f32>::scratch(panels::len_f32(n, n));
    let [mut g, mut p, mut q, mut other] = [(); 4].map(|()| Buffer::<f32>::scratch(n * n));
    gemm::weight_gradient(&mut panels, &x, &x, None, n, n, false);
    panels::unpack(&panels, n, n, 0..n, &mut g);
    let [a, b, c] = COEFFICIENTS;
    for turn in 0..ITERATIONS {
        // What `panels` hold is what the products have on the right.
        pack_right(&g, n, &mut panels);
        product(&mut p, &g, &panels, n);
        combine(&mut p, &g, n, [a, b, c]);
        pack_right(&p, n, &mut panels);
        if turn == 0 {
            q.copy_from_slice(&p);
        } else {
            product(&mut other, &q, &panels, n);
            std::mem::swap(&mut q, &mut other);
        }
        if turn + 1 < ITERATIONS {
            product(&mut other, &g, &panels, n);
            product(&mut g, &other, &panels, n);
        }
    }
    q.iter_mut().for_each(|q| *q *= factor);
    pack_right(&q, n, &mut panels);
    let weight = Weight { panels: &panels, outputs: n, inputs: n };
    if rows >= columns {
        gemm::forward(&mut values[..], &x, None, weight, None, None);
    } else {
        let mut turned = Buffer::<f32>::scratch(x.len());
        gemm::forward(&mut turned[..], &x, None, weight, None, None);
        turn(&turned, columns, rows, values, |value| value);
    }
}

/// `out = left right`, all `[n, n]`, for a `right` in panels by [`pack_right`].
fn product(out: &mut [f32], left: &[f32], right: &[f32], n: usize) {
    gemm::forward(out, left, None, Weight { panels: right, outputs: n, inputs: n }, None, None);
}

/// Writes `[n, n]`, row-major, to panels as the right side of [`product`]: pieces of rows, one below the other.
fn pack_right(values: &[f32], n: usize, panels: &mut [f32]) {
    let shared = Shared::new(panels);
    parallel_ranges(n.div_ceil(PANEL_COLUMNS), (LEAST / (n * PANEL_COLUMNS)).max(1), |range| {
        for panel in range {
            // SAFETY: parallel_ranges hands out disjoint ranges of panels.
            let panel_values = unsafe { shared.part(panel * n * PANEL_COLUMNS..(panel + 1) * n * PANEL_COLUMNS) };
            let left = panel * PANEL_COLUMNS;
            let width = PANEL_COLUMNS.min(n - left);
            for (to, row) in panel_values.chunks_exact_mut(PANEL_COLUMNS).zip(values.chunks_exact(n)) {
                to[..width].copy_from_slice(&row[left..left + width]);
                to[width..].fill(0.0);
            }
        }
    });
}

/// `square = a I + b g + c square`, all `[n, n]`.
fn combine(square: &mut [f32], g: &[f32], n: usize, [a, b, c]: [f32; 3]) {
    let shared = Shared::new(square);
    parallel_ranges(n, LEAST / n, |rows| {
        // SAFETY: parallel_ranges hands out disjoint ranges of rows.
        let part = unsafe { shared.part(rows.start * n..rows.end * n) };
        part.iter_mut().zip(&g[rows.start * n..rows.end * n]).for_each(|(square, g)| *square = b * g + c * *square);
        rows.clone().for_each(|row| part[(row - rows.start) * n + row] += a);
    });
}

/// Sets every element by its place.
fn fill<T: Send>(values: &mut [T], value: impl Fn(usize) -> T + Sync) {
    let (len, shared) = (values.len(), Shared::new(values));
    parallel_ranges(len, LEAST, |range| {
        // SAFETY: parallel_ranges hands out disjoint ranges.
        let part = unsafe { shared.part(range.clone()) };
        part.iter_mut().zip(range).for_each(|(to, i)| *to = value(i));
    });
}

/// Writes `from` `[rows, columns]` to `to` `[columns, rows]`, each element as `value` says.
fn turn<A: Copy + Sync, B: Send>(from: &[A], rows: usize, columns: usize, to: &mut [B], value: impl Fn(A) -> B + Sync) {
    assert!(from.len() == rows * columns && to.len() == from.len(), "[{rows}, {columns}] to turn");
    let shared = Shared::new(to);
    parallel_ranges(columns.div_ceil(BLOCK), (LEAST / (BLOCK * rows)).max(1), |range| {
        let taken = range.start * BLOCK..(range.end * BLOCK).min(columns);
        // SAFETY: parallel_ranges hands out disjoint ranges of columns, which are rows of `to`.
        let to = unsafe { shared.part(taken.start * rows..taken.end * rows) };
        for top in (0..rows).step_by(BLOCK) {
            for row in top..(top + BLOCK).min(rows) {
                let line = &from[row * columns..][taken.clone()];
                line.iter().enumerate().for_each(|(column, from)| to[column * rows + row] = value(*from));
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::super::samples::{assert_near, assert_same_on_any_threads, uniform};
    use super::*;
    use half::bf16;

    /// The iteration in f64, as it stands in the source.
    fn reference(values: &[f32], rows: usize, columns: usize) -> Vec<f64> {
        let product = |a: &[f64], b: &[f64], (m, k, n): (usize, usize, usize)| -> Vec<f64> {
            let element = |i: usize| (0..k).map(|l| a[i / n * k + l] * b[l * n + i % n]).sum();
            (0..m * n).map(element).collect()
        };
        let norm = values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt() + EPS;
        let mut x: Vec<f64> = values.iter().map(|x| f64::from(*x) / norm).collect();
        let [a, b, c] = COEFFICIENTS.map(f64::from);
        for _ in 0..ITERATIONS {
            let turned: Vec<f64> = (0..x.len()).map(|i| x[i % rows * columns + i / rows]).collect();
            let gram = product(&x, &turned, (rows, columns, rows));
            let square = product(&gram, &gram, (rows, rows, rows));
            let sum: Vec<f64> = gram.iter().zip(&square).map(|(gram, square)| b * gram + c * square).collect();
            let add = product(&sum, &x, (rows, rows, columns));
            x.iter_mut().zip(add).for_each(|(x, add)| *x = a * *x + add);
        }
        x
    }

    fn buffer(values: &[f32]) -> Buffer<f32> {
        let mut buffer = Buffer::scratch(values.len());
        buffer.copy_from_slice(values);
        buffer
    }

    fn one(values: &mut [f32], rows: usize, columns: usize, factor: f32) {
        let mut matrices = [Matrix { values: buffer(values), rows, columns, factor }];
        orthogonalise(&mut matrices);
        values.copy_from_slice(&matrices[0].values);
    }

    #[test]
    fn the_iteration_is_that_of_f64_for_tall_and_wide_matrices() {
        for (rows, columns) in [(1, 1), (1, 40), (40, 1), (7, 33), (33, 7), (48, 48), (70, 130)] {
            let values = uniform(rows as u64, rows * columns);
            let want: Vec<f64> = reference(&values, rows, columns).iter().map(|x| 0.5 * x).collect();
            let mut got = values;
            one(&mut got, rows, columns, 0.5);
            assert_near("orthogonal", &got, &want, 2e-5, 1e-5);
        }
        let mut zeros = vec![0.0; 6];
        one(&mut zeros, 2, 3, 1.0);
        assert_eq!(zeros, [0.0; 6]);
        one(&mut [], 0, 3, 1.0);
    }

    #[test]
    fn columns_come_out_nearly_orthogonal() {
        let (rows, columns) = (96, 24);
        let mut values = uniform(3, rows * columns);
        // One column is ten times the others.
        values.iter_mut().step_by(columns).for_each(|value| *value *= 10.0);
        one(&mut values, rows, columns, 1.0);
        for i in 0..columns {
            for j in 0..columns {
                let dot: f32 = (0..rows).map(|row| values[row * columns + i] * values[row * columns + j]).sum();
                let want = if i == j { 0.45..1.5 } else { -0.4..0.4 };
                assert!(want.contains(&dot), "columns {i} and {j}: {dot}");
            }
        }
    }

    #[test]
    fn momentum_by_hand_and_rounded_right_in_the_mean() {
        let (mut m, mut update) = ([0.0f32, 1.0], [0.0; 2]);
        momentum(&[4.0, -2.0], &mut m, &mut update, 0.75, 0.5, 1);
        assert_eq!((m, update), ([0.5, 0.5], [0.875, 0.125]));

        let count = 4096;
        let (gradient, mut update) = (uniform(5, count), vec![0.0; count]);
        let (mut wide, mut narrow) = (vec![1.0f32; count], vec![bf16::from_f32(1.0); count]);
        for step in 1..=100 {
            momentum(&gradient, &mut wide, &mut update, 0.999, 1.0, step);
            momentum(&gradient, &mut narrow, &mut update, 0.999, 1.0, step);
        }
        let mean = |m: &mut dyn Iterator<Item = f32>| m.map(f64::from).sum::<f64>() / count as f64;
        let (got, want) = (mean(&mut narrow.iter().map(|m| m.to_f32())), mean(&mut wide.iter().copied()));
        // To nearest nothing would move: a step of a thousandth is a quarter of the distance of two bf16 numbers.
        assert!((got - want).abs() < 2e-3 && want < 0.95, "{got}, {want}");
    }

    #[test]
    fn neighbours_and_threads_do_not_change_a_bit() {
        // Small ones alone are shared out over the threads; beside a large one all are done one after the other.
        for shapes in [&[(40, 33), (7, 90), (64, 64)][..], &[(40, 33), (600, 440)]] {
            let matrices = || shapes.iter().map(|(rows, columns)| (uniform((rows + columns) as u64, rows * columns), *rows, *columns));
            let together = || {
                let matrix = |(values, rows, columns): (Vec<f32>, _, _)| Matrix { values: buffer(&values), rows, columns, factor: 1.0 };
                let mut all: Vec<Matrix> = matrices().map(matrix).collect();
                orthogonalise(&mut all);
                all.iter().map(|matrix| matrix.values.to_vec()).collect::<Vec<_>>()
            };
            assert_same_on_any_threads(together);
            for ((mut values, rows, columns), got) in matrices().zip(together()) {
                one(&mut values, rows, columns, 1.0);
                assert!(values == got, "[{rows}, {columns}]");
            }
        }
    }
}
