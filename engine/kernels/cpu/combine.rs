//! The outputs of the experts brought back to their tokens, and the shared expert behind its sigmoid gate; forward and
//! backward. Which expert computes which row is decided in route.rs.

use super::lanes;
use super::swiglu::sigmoid;
use super::threads::{Shared, parallel_ranges};
use crate::kernels::element::Float;
use crate::vectorised;

/// Tokens below which a thread of its own costs more than it saves.
const TOKENS_LEAST: usize = 8;

/// `y[token] (+)= sum over its slots, in slot order, of weight * expert_out[grouped row]`, in f32, rounded once.
///
/// - `expert_out`: `[tokens * k, hidden]`, grouped by expert
/// - `places`: `[tokens * k]`, the grouped row of each choice ([`super::route::Groups`])
/// - `weights`: `[tokens, k]`, f32; the caller has rounded them to the model's type if that is wanted
/// - `y`: `[tokens, hidden]`, overwritten, or with `add` added to
pub fn combine<E: Float>(expert_out: &[E], places: &[u32], weights: &[f32], hidden: usize, y: &mut [E], add: bool) {
    let (tokens, k) = sizes(expert_out.len(), places, weights.len(), hidden, y.len());
    let y = Shared::new(y);
    parallel_ranges(tokens, TOKENS_LEAST, |range| {
        // SAFETY: parallel_ranges hands out disjoint ranges of tokens.
        let y = unsafe { y.part(range.start * hidden..range.end * hidden) };
        let choices = range.start * k..range.end * k;
        combine_rows(expert_out, &places[choices.clone()], &weights[choices], hidden, y, add);
    });
}

/// Columns that are summed together: their f32 sums stay in registers while the slots pass.
const COLUMNS: usize = 64;

vectorised! {
    fn combine_rows<E: Float>(expert_out: &[E], places: &[u32], weights: &[f32], hidden: usize, y: &mut [E], add: bool) {
        let k = weights.len() / (y.len() / hidden).max(1);
        for (token, y) in y.chunks_exact_mut(hidden).enumerate() {
            let (places, weights) = (&places[token * k..(token + 1) * k], &weights[token * k..(token + 1) * k]);
            for (tile, y) in y.chunks_mut(COLUMNS).enumerate() {
                let mut sums = [0.0f32; COLUMNS];
                for (place, weight) in places.iter().zip(weights) {
                    let start = *place as usize * hidden + tile * COLUMNS;
                    let out = &expert_out[start..start + y.len()];
                    sums.iter_mut().zip(out).for_each(|(sum, out)| *sum += weight * out.to_f32());
                }
                if add {
                    y.iter_mut().zip(&sums).for_each(|(y, sum)| *y = E::from_f32(y.to_f32() + sum));
                } else {
                    y.iter_mut().zip(&sums).for_each(|(y, sum)| *y = E::from_f32(*sum));
                }
            }
        }
    }
}

/// Backward step of [`combine`]: `d_expert_out[grouped row] = weight * dy[token]` and
/// `d_weights[choice] = dy[token] . expert_out[grouped row]`.
///
/// - `d_expert_out`: `[tokens * k, hidden]`, grouped by expert, overwritten in full
/// - `d_weights`: `[tokens, k]`, f32, overwritten
/// - the others as in [`combine`]; `places` must be a permutation, as grouping makes it
pub fn combine_backward<E: Float>(
    expert_out: &[E],
    places: &[u32],
    weights: &[f32],
    hidden: usize,
    dy: &[E],
    d_expert_out: &mut [E],
    d_weights: &mut [f32],
) {
    let (tokens, k) = sizes(expert_out.len(), places, weights.len(), hidden, dy.len());
    assert!(d_expert_out.len() == expert_out.len(), "combine: {} gradients of {} outputs", d_expert_out.len(), expert_out.len());
    assert!(d_weights.len() == weights.len(), "combine: {} gradients of {} weights", d_weights.len(), weights.len());
    let mut taken = vec![false; places.len()];
    for place in places {
        let before = std::mem::replace(&mut taken[*place as usize], true);
        assert!(!before, "combine: two choices claim grouped row {place}");
    }
    let (d_expert_out, d_weights) = (Shared::new(d_expert_out), Shared::new(d_weights));
    parallel_ranges(tokens, TOKENS_LEAST, |range| {
        for token in range {
            let dy = &dy[token * hidden..(token + 1) * hidden];
            for choice in token * k..(token + 1) * k {
                let row = places[choice] as usize * hidden..(places[choice] as usize + 1) * hidden;
                // SAFETY: no two choices share a grouped row (checked above), and each choice is in one task's range.
                let (d_out, d_weight) = unsafe { (d_expert_out.part(row.clone()), d_weights.part(choice..choice + 1)) };
                d_weight[0] = scale_and_dot(dy, &expert_out[row], weights[choice], d_out);
            }
        }
    });
}

vectorised! {
    /// Writes `by * dy` to `d_out` and gives `dy . out`.
    fn scale_and_dot<E: Float>(dy: &[E], out: &[E], by: f32, d_out: &mut [E]) -> f32 {
        for (d_out, dy) in d_out.iter_mut().zip(dy) {
            *d_out = E::from_f32(by * dy.to_f32());
        }
        lanes::sum2(dy, out, |dy, out| dy.to_f32() * out.to_f32())
    }
}

/// `(tokens, k)`, after checking what [`combine`] and its backward step share.
fn sizes(expert_out: usize, places: &[u32], weights: usize, hidden: usize, y: usize) -> (usize, usize) {
    assert!(hidden > 0 && y.is_multiple_of(hidden), "combine: {y} values do not divide into rows of {hidden}");
    let tokens = y / hidden;
    let k = weights.checked_div(tokens).unwrap_or(0);
    assert!(weights == tokens * k, "combine: {weights} weights for {tokens} tokens");
    assert!(places.len() == weights, "combine: {} places for {weights} weights", places.len());
    assert!(expert_out == weights * hidden, "combine: {expert_out} outputs for {weights} rows of {hidden}");
    for place in places {
        assert!((*place as usize) < weights, "combine: grouped row {place} of {weights}");
    }
    (tokens, k)
}

/// `y[token] += sigmoid(gate[token]) * shared[token]`, in f32, rounded once.
///
/// - `gate`: `[tokens]`, f32, before the sigmoid
/// - `shared`, `y`: `[tokens, hidden]`
pub fn add_gated<E: Float>(gate: &[f32], shared: &[E], y: &mut [E]) {
    let (tokens, hidden) = gated_sizes(gate.len(), shared.len(), y.len());
    let y = Shared::new(y);
    parallel_ranges(tokens, TOKENS_LEAST, |range| {
        let values = range.start * hidden..range.end * hidden;
        // SAFETY: parallel_ranges hands out disjoint ranges of tokens.
        add_gated_rows(&gate[range], &shared[values.clone()], hidden, unsafe { y.part(values) });
    });
}

vectorised! {
    fn add_gated_rows<E: Float>(gate: &[f32], shared: &[E], hidden: usize, y: &mut [E]) {
        for ((gate, shared), y) in gate.iter().zip(shared.chunks_exact(hidden)).zip(y.chunks_exact_mut(hidden)) {
            let open = sigmoid(*gate);
            for (y, shared) in y.iter_mut().zip(shared) {
                *y = E::from_f32(y.to_f32() + open * shared.to_f32());
            }
        }
    }
}

/// Backward step of [`add_gated`]; the gradient of `y` itself passes unchanged.
///
/// - `dy`, `d_shared`: `[tokens, hidden]`; `d_shared` is overwritten with `sigmoid(gate) * dy`
/// - `d_gate`: `[tokens]`, f32, overwritten with `(dy . shared) * s * (1 - s)`
pub fn add_gated_backward<E: Float>(gate: &[f32], shared: &[E], dy: &[E], d_gate: &mut [f32], d_shared: &mut [E]) {
    let (tokens, hidden) = gated_sizes(gate.len(), shared.len(), dy.len());
    assert!(d_gate.len() == tokens, "gated sum: {} gate gradients for {tokens} tokens", d_gate.len());
    assert!(d_shared.len() == shared.len(), "gated sum: {} gradients of {} values", d_shared.len(), shared.len());
    let (d_gate, d_shared) = (Shared::new(d_gate), Shared::new(d_shared));
    parallel_ranges(tokens, TOKENS_LEAST, |range| {
        for token in range {
            let row = token * hidden..(token + 1) * hidden;
            let open = sigmoid(gate[token]);
            // SAFETY: parallel_ranges hands out disjoint ranges of tokens.
            let (d_gate, d_shared) = unsafe { (d_gate.part(token..token + 1), d_shared.part(row.clone())) };
            d_gate[0] = scale_and_dot(&dy[row.clone()], &shared[row], open, d_shared) * open * (1.0 - open);
        }
    });
}

fn gated_sizes(tokens: usize, shared: usize, y: usize) -> (usize, usize) {
    let hidden = shared.checked_div(tokens).unwrap_or(1);
    assert!(hidden > 0 && shared == tokens * hidden, "gated sum: {shared} values for {tokens} gates");
    assert!(y == shared, "gated sum: {shared} values onto {y}");
    (tokens, hidden)
}

#[cfg(test)]
mod tests {
    use super::super::route::group;
    use super::super::samples::{assert_near, assert_same_on_any_threads, cast, uniform, wide};
    use super::*;
    use half::bf16;

    /// Choices of `tokens` tokens among 5 experts of which the last has none.
    fn choices(tokens: usize, k: usize) -> Vec<u32> {
        (0..tokens).flat_map(|token| (0..k).map(move |slot| ((token * 3 + slot) % 4) as u32)).collect()
    }

    fn check<E: Float>(tokens: usize, k: usize, hidden: usize, tolerance: f64) {
        let places = group(&choices(tokens, k), 5, k).places;
        let out = cast::<E>(&uniform(1, tokens * k * hidden));
        let (weights, dy) = (uniform(2, tokens * k), cast::<E>(&uniform(3, tokens * hidden)));
        let mut want = vec![0.0; tokens * hidden];
        let mut want_d_out = vec![0.0; out.len()];
        let mut want_d_weights = vec![0.0; weights.len()];
        for choice in 0..tokens * k {
            for c in 0..hidden {
                let (from, to) = (places[choice] as usize * hidden + c, choice / k * hidden + c);
                let (weight, value, d) = (f64::from(weights[choice]), f64::from(out[from].to_f32()), f64::from(dy[to].to_f32()));
                want[to] += weight * value;
                want_d_out[from] = weight * d;
                want_d_weights[choice] += d * value;
            }
        }
        let mut y = vec![E::from_f32(1.0); tokens * hidden];
        combine(&out, &places, &weights, hidden, &mut y, false);
        assert_near("y", &y, &want, tolerance, 1e-6);
        let mut added = vec![E::from_f32(1.0); tokens * hidden];
        combine(&out, &places, &weights, hidden, &mut added, true);
        assert_near("y added", &added, &want.iter().map(|v| v + 1.0).collect::<Vec<_>>(), tolerance, 1e-6);
        let (mut d_out, mut d_weights) = (vec![E::default(); out.len()], vec![0.0; weights.len()]);
        combine_backward(&out, &places, &weights, hidden, &dy, &mut d_out, &mut d_weights);
        assert_near("d_out", &d_out, &want_d_out, tolerance, 1e-9);
        assert_near("d_weights", &d_weights, &want_d_weights, 1e-6, 1e-5); // f32 sums in either type.
    }

    #[test]
    fn combining_and_its_gradients_match_f64() {
        for (tokens, k, hidden) in [(0, 2, 7), (1, 1, 1), (7, 2, 33), (13, 4, 130)] {
            check::<f32>(tokens, k, hidden, 1e-6);
            check::<bf16>(tokens, k, hidden, 4e-3); // One rounding to 8 bits.
        }
    }

    #[test]
    fn the_gated_sum_and_its_gradients_match_f64() {
        for (tokens, hidden) in [(0, 3), (1, 1), (9, 33)] {
            let gate: Vec<f32> = uniform(4, tokens).iter().map(|v| v * 5.0).collect();
            let [shared, start, dy] = [5, 6, 7].map(|seed| uniform(seed, tokens * hidden));
            let mut y = start.clone();
            add_gated(&gate, &shared, &mut y);
            let (mut d_gate, mut d_shared) = (vec![f32::NAN; tokens], vec![f32::NAN; shared.len()]);
            add_gated_backward(&gate, &shared, &dy, &mut d_gate, &mut d_shared);
            let open = |gate: f64| 1.0 / (1.0 + (-gate).exp());
            for token in 0..tokens {
                let (row, gate) = (token * hidden..(token + 1) * hidden, f64::from(gate[token]));
                let (shared, start, dy) = (wide(&shared[row.clone()]), wide(&start[row.clone()]), wide(&dy[row.clone()]));
                let want: Vec<f64> = start.iter().zip(&shared).map(|(y, s)| y + open(gate) * s).collect();
                assert_near("y", &y[row.clone()], &want, 1e-6, 1e-6);
                let loss = |gate: f64| shared.iter().zip(&dy).map(|(s, d)| open(gate) * s * d).sum::<f64>();
                assert_near("d_gate", &d_gate[token..=token], &[(loss(gate + 1e-5) - loss(gate - 1e-5)) / 2e-5], 1e-5, 1e-6);
                assert_near("d_shared", &d_shared[row], &dy.iter().map(|d| d * open(gate)).collect::<Vec<_>>(), 1e-6, 0.0);
            }
        }
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let (tokens, k, hidden) = (90, 3, 70);
        let places = group(&choices(tokens, k), 5, k).places;
        let (out, weights) = (cast::<bf16>(&uniform(8, tokens * k * hidden)), uniform(9, tokens * k));
        assert_same_on_any_threads(|| {
            let mut y = vec![bf16::ZERO; tokens * hidden];
            combine(&out, &places, &weights, hidden, &mut y, false);
            let (mut d_out, mut d_weights) = (vec![bf16::ZERO; out.len()], vec![0.0; weights.len()]);
            combine_backward(&out, &places, &weights, hidden, &y, &mut d_out, &mut d_weights);
            (y, d_out, d_weights)
        });
    }
}
