//! RMS normalisation of rows, forward and backward. Knows nothing of layers or of residual streams.
//! Source: Zhang and Sennrich, arXiv 1910.07467, section 4; rounding as in Qwen2 (cast before the weight).

use super::lanes;
use super::threads::{Shared, parallel, parallel_ranges};
use crate::kernels::element::Float;
use crate::vectorised;

/// Rows below which a thread of its own costs more than it saves.
const ROWS_LEAST: usize = 8;
/// Most parts in which the weight's gradient is summed.
const PARTS_MAX: usize = 64;

/// Scales each row to unit root-mean-square in f32, rounds it to `E`, multiplies by `weight` and rounds again.
///
/// - `x`, `y`: `[tokens, hidden]`
/// - `weight`: `[hidden]`
/// - `eps`: added to the mean square
/// - `inv_rms`: `[tokens]`, the scale of each row, for the backward step
pub fn rms_norm<E: Float>(x: &[E], weight: &[E], eps: f32, y: &mut [E], inv_rms: &mut [f32]) {
    let hidden = weight.len();
    let tokens = inv_rms.len();
    assert!(hidden > 0, "rms_norm: rows have no elements");
    assert!(x.len() == tokens * hidden, "rms_norm: x has {} values for [{tokens}, {hidden}]", x.len());
    assert!(y.len() == x.len(), "rms_norm: y has {} values for [{tokens}, {hidden}]", y.len());
    let (y, inv_rms) = (Shared::new(y), Shared::new(inv_rms));
    parallel_ranges(tokens, ROWS_LEAST, |rows| {
        let values = rows.start * hidden..rows.end * hidden;
        // SAFETY: parallel_ranges hands out disjoint ranges of rows, so the parts do not overlap.
        let (y, inv_rms) = unsafe { (y.part(values.clone()), inv_rms.part(rows)) };
        forward_rows(&x[values], weight, eps, y, inv_rms);
    });
}

vectorised! {
    fn forward_rows<E: Float>(x: &[E], weight: &[E], eps: f32, y: &mut [E], inv_rms: &mut [f32]) {
        let hidden = weight.len();
        for ((x, y), inv_rms) in x.chunks_exact(hidden).zip(y.chunks_exact_mut(hidden)).zip(inv_rms) {
            let square_sum = lanes::sum(x, |v| v.to_f32() * v.to_f32());
            let scale = 1.0 / (square_sum / hidden as f32 + eps).sqrt();
            *inv_rms = scale;
            for ((y, x), weight) in y.iter_mut().zip(x).zip(weight) {
                let unit = E::from_f32(x.to_f32() * scale);
                *y = E::from_f32(weight.to_f32() * unit.to_f32());
            }
        }
    }
}

/// Backward step of [`rms_norm`]: with `u = x * inv_rms` and `g = dy * weight`,
/// `dx = inv_rms * (g - u * mean(g * u))` and `dweight = sum over rows of dy * u`, with `u` rounded to `E` as it was used.
///
/// - `x`, `dy`, `dx`: `[tokens, hidden]`; `dx` is overwritten, or with `add` added to, in f32 and rounded once
/// - `weight`: `[hidden]`, `inv_rms`: `[tokens]` from the forward step
/// - `dweight`: `[hidden]`, f32, added to. Rows are summed in parts that depend on `tokens` alone.
pub fn rms_norm_backward<E: Float>(x: &[E], weight: &[E], inv_rms: &[f32], dy: &[E], dx: &mut [E], add: bool, dweight: Option<&mut [f32]>) {
    let hidden = weight.len();
    let tokens = inv_rms.len();
    assert!(hidden > 0, "rms_norm: rows have no elements");
    assert!(x.len() == tokens * hidden, "rms_norm: x has {} values for [{tokens}, {hidden}]", x.len());
    assert!(dy.len() == x.len(), "rms_norm: dy has {} values for [{tokens}, {hidden}]", dy.len());
    assert!(dx.len() == x.len(), "rms_norm: dx has {} values for [{tokens}, {hidden}]", dx.len());
    if tokens == 0 {
        return;
    }
    let part_rows = tokens.div_ceil(tokens.div_ceil(ROWS_LEAST * 2).min(PARTS_MAX));
    let parts = tokens.div_ceil(part_rows);
    let wants_weight = dweight.is_some();
    let mut sums = vec![0.0f32; if wants_weight { parts * hidden } else { 0 }];
    let (dx, shared_sums) = (Shared::new(dx), Shared::new(&mut sums));
    parallel(parts, |part| {
        let rows = part * part_rows..((part + 1) * part_rows).min(tokens);
        let values = rows.start * hidden..rows.end * hidden;
        let sum = if wants_weight { part * hidden..(part + 1) * hidden } else { 0..0 };
        // SAFETY: parts are disjoint ranges of rows, and each owns its own row of `sums` (or an empty range).
        let (dx, sum) = unsafe { (dx.part(values.clone()), shared_sums.part(sum)) };
        backward_rows(&x[values.clone()], weight, &inv_rms[rows], &dy[values], dx, add, sum);
    });
    if let Some(dweight) = dweight {
        assert!(dweight.len() == hidden, "rms_norm: dweight has {} values, not {hidden}", dweight.len());
        for sum in sums.chunks_exact(hidden) {
            dweight.iter_mut().zip(sum).for_each(|(total, part)| *total += part);
        }
    }
}

vectorised! {
    /// One part of the backward step; an empty `sum` means that the weight's gradient is not wanted.
    fn backward_rows<E: Float>(x: &[E], weight: &[E], inv_rms: &[f32], dy: &[E], dx: &mut [E], add: bool, sum: &mut [f32]) {
        let hidden = weight.len();
        for (row, inv_rms) in inv_rms.iter().enumerate() {
            let values = row * hidden..(row + 1) * hidden;
            let (x, dy, dx) = (&x[values.clone()], &dy[values.clone()], &mut dx[values]);
            let dot = lanes::sum3(x, weight, dy, |x, w, dy| dy.to_f32() * w.to_f32() * x.to_f32());
            let pull = dot * inv_rms * inv_rms / hidden as f32;
            if add {
                for (((dx, x), w), dy) in dx.iter_mut().zip(x).zip(weight).zip(dy) {
                    let own = inv_rms * (dy.to_f32() * w.to_f32() - x.to_f32() * pull);
                    *dx = E::from_f32(dx.to_f32() + own);
                }
            } else {
                for (((dx, x), w), dy) in dx.iter_mut().zip(x).zip(weight).zip(dy) {
                    *dx = E::from_f32(inv_rms * (dy.to_f32() * w.to_f32() - x.to_f32() * pull));
                }
            }
            for ((sum, x), dy) in sum.iter_mut().zip(x).zip(dy) {
                *sum += dy.to_f32() * E::from_f32(x.to_f32() * inv_rms).to_f32();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::samples::{assert_near, assert_same_on_any_threads, cast, uniform, wide};
    use super::*;
    use half::bf16;

    fn reference(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
        let hidden = weight.len();
        x.chunks(hidden)
            .flat_map(|row| {
                let scale = (row.iter().map(|v| v * v).sum::<f64>() / hidden as f64 + eps).sqrt().recip();
                row.iter().zip(weight).map(move |(v, w)| v * scale * w).collect::<Vec<_>>()
            })
            .collect()
    }

    #[test]
    fn the_hand_computed_row() {
        // Row [3, 4]: mean square 12.5, so the scale is 1 / sqrt(12.5) = 0.28284271 (eps 0).
        let (mut y, mut inv_rms) = ([0.0f32; 2], [0.0f32; 1]);
        rms_norm(&[3.0, 4.0], &[1.0, 2.0], 0.0, &mut y, &mut inv_rms);
        assert_near("y", &y, &[0.848_528_137, 2.262_741_7], 2e-7, 0.0); // Two f32 roundings a value.
        assert_near("inv_rms", &inv_rms, &[0.282_842_712], 2e-7, 0.0);
    }

    fn check<E: Float>(tokens: usize, hidden: usize, relative: f64) {
        let x = cast::<E>(&uniform(1, tokens * hidden));
        let weight = cast::<E>(&uniform(2, hidden));
        let (mut y, mut inv_rms) = (vec![E::default(); x.len()], vec![0.0; tokens]);
        rms_norm(&x, &weight, 1e-6, &mut y, &mut inv_rms);
        assert_near("y", &y, &reference(&wide(&x), &wide(&weight), 1e-6), relative, 1e-7);
    }

    #[test]
    fn forward_matches_f64_at_odd_sizes() {
        for (tokens, hidden) in [(0, 7), (1, 1), (7, 33), (33, 100)] {
            check::<f32>(tokens, hidden, 1e-6); // A few f32 roundings.
            check::<bf16>(tokens, hidden, 8e-3); // Two roundings to 8 bits: 2 * 2^-8.
        }
    }

    #[test]
    fn bf16_rounds_before_the_weight() {
        let x = cast::<bf16>(&[1.0, 1.5, -0.7]);
        let weight = cast::<bf16>(&[1.1, 0.9, 1.3]);
        let (mut y, mut inv_rms) = ([bf16::ZERO; 3], [0.0; 1]);
        rms_norm(&x, &weight, 0.0, &mut y, &mut inv_rms);
        for i in 0..3 {
            let unit = bf16::from_f32(x[i].to_f32() * inv_rms[0]);
            assert_eq!(y[i], bf16::from_f32(unit.to_f32() * weight[i].to_f32()));
        }
    }

    #[test]
    fn backward_matches_finite_differences() {
        let (tokens, hidden, eps) = (3, 33, 1e-5);
        let (x, weight, dy) = (uniform(3, tokens * hidden), uniform(4, hidden), uniform(5, tokens * hidden));
        let (mut y, mut inv_rms) = (vec![0.0f32; x.len()], vec![0.0; tokens]);
        rms_norm(&x, &weight, eps, &mut y, &mut inv_rms);
        let (mut dx, mut dweight) = (vec![f32::NAN; x.len()], vec![2.0; hidden]);
        rms_norm_backward(&x, &weight, &inv_rms, &dy, &mut dx, false, Some(&mut dweight));
        let loss = |x: &[f64], w: &[f64]| reference(x, w, f64::from(eps)).iter().zip(&dy).map(|(y, d)| y * f64::from(*d)).sum::<f64>();
        let (x64, w64) = (wide(&x), wide(&weight));
        let slope = |at: &[f64], loss: &dyn Fn(&[f64]) -> f64| -> Vec<f64> {
            (0..at.len())
                .map(|i| {
                    let (mut up, mut down) = (at.to_vec(), at.to_vec());
                    up[i] += 1e-5;
                    down[i] -= 1e-5;
                    (loss(&up) - loss(&down)) / 2e-5
                })
                .collect()
        };
        let want = slope(&x64, &|x| loss(x, &w64));
        assert_near("dx", &dx, &want, 1e-5, 2e-6); // Central differences are good to about 1e-9; the rest is f32.
        let want_weight: Vec<f64> = slope(&w64, &|w| loss(&x64, w)).iter().map(|v| v + 2.0).collect();
        assert_near("dweight", &dweight, &want_weight, 1e-5, 2e-6);

        let mut added = vec![1.5f32; x.len()];
        rms_norm_backward(&x, &weight, &inv_rms, &dy, &mut added, true, None);
        assert_near("dx added", &added, &want.iter().map(|v| v + 1.5).collect::<Vec<_>>(), 1e-5, 2e-6);
    }

    #[test]
    fn backward_in_bf16_is_near_f32_and_zero_rows_give_zero() {
        let (tokens, hidden) = (19, 65);
        let [x, dy] = [6, 7].map(|seed| cast::<bf16>(&uniform(seed, tokens * hidden)));
        let weight = cast::<bf16>(&uniform(8, hidden));
        let (mut y, mut inv_rms) = (vec![bf16::ZERO; x.len()], vec![0.0; tokens]);
        rms_norm(&x, &weight, 1e-6, &mut y, &mut inv_rms);
        let (mut dx, mut dweight) = (vec![bf16::ZERO; x.len()], vec![0.0; hidden]);
        rms_norm_backward(&x, &weight, &inv_rms, &dy, &mut dx, false, Some(&mut dweight));
        let widened = |v: &[bf16]| v.iter().map(|v| v.to_f32()).collect::<Vec<f32>>();
        let (mut dx32, mut dweight32) = (vec![0.0f32; x.len()], vec![0.0; hidden]);
        rms_norm_backward(&widened(&x), &widened(&weight), &inv_rms, &widened(&dy), &mut dx32, false, Some(&mut dweight32));
        assert_near("dx", &dx, &wide(&dx32), 4e-3, 1e-6); // One rounding to 8 bits.
        assert_near("dweight", &dweight, &wide(&dweight32), 4e-3, 4e-2); // 19 terms, each with u rounded to 8 bits.
        rms_norm_backward::<bf16>(&[], &weight, &[], &[], &mut [], false, Some(&mut dweight));
    }

    #[test]
    fn threads_do_not_change_a_bit_nor_do_neighbouring_rows() {
        let (tokens, hidden) = (100, 70);
        let (x, weight, dy) = (uniform(9, tokens * hidden), uniform(10, hidden), uniform(11, tokens * hidden));
        let run = |tokens: usize| {
            let values = tokens * hidden;
            let (mut y, mut inv_rms) = (vec![0.0f32; values], vec![0.0; tokens]);
            rms_norm(&x[..values], &weight, 1e-6, &mut y, &mut inv_rms);
            let (mut dx, mut dweight) = (vec![0.0f32; values], vec![0.0; hidden]);
            rms_norm_backward(&x[..values], &weight, &inv_rms, &dy[..values], &mut dx, false, Some(&mut dweight));
            (y, dx, dweight)
        };
        assert_same_on_any_threads(|| run(tokens));
        let (all, few) = (run(tokens), run(3));
        assert_eq!(all.0[..few.0.len()], few.0);
        assert_eq!(all.1[..few.1.len()], few.1);
    }
}
