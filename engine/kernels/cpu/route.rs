//! Routing of a mixture of experts: which experts each token visits, with what weight, and the way back to the router's
//! logits. The order is softmax over all experts, then the best k. No capacity, no dropped tokens, no noise.
//! Source: Qwen2-MoE as in transformers; combining the experts' outputs is in combine.rs.

use super::exp::exp;
use super::lanes;
use super::threads::{Shared, parallel_ranges};
use crate::vectorised;

/// Tokens below which a thread of its own costs more than it saves.
const TOKENS_LEAST: usize = 64;

/// Probabilities of all experts in f32, and the best `k` with their weights, best first; of equal ones the lower index.
///
/// - `logits`, `probs`: `[tokens, experts]`
/// - `chosen`: `[tokens, k]`, expert indices; `weights`: `[tokens, k]`, `k` is their width
/// - `renormalise`: divides each token's weights by their sum (`norm_topk_prob`)
///
/// A token whose logits hold a NaN still gets `k` different experts; its weights are NaN.
pub fn route(logits: &[f32], experts: usize, k: usize, renormalise: bool, probs: &mut [f32], chosen: &mut [u32], weights: &mut [f32]) {
    let tokens = tokens_of(logits.len(), experts, k);
    assert!(probs.len() == logits.len(), "route: {} probabilities for {} logits", probs.len(), logits.len());
    assert!(chosen.len() == tokens * k, "route: {} choices for {tokens} tokens of {k}", chosen.len());
    assert!(weights.len() == tokens * k, "route: {} weights for {tokens} tokens of {k}", weights.len());
    let (probs, chosen, weights) = (Shared::new(probs), Shared::new(chosen), Shared::new(weights));
    parallel_ranges(tokens, TOKENS_LEAST, |range| {
        for token in range {
            let logits = &logits[token * experts..(token + 1) * experts];
            // SAFETY: parallel_ranges hands out disjoint ranges of tokens.
            let probs = unsafe { probs.part(token * experts..(token + 1) * experts) };
            // SAFETY: as above.
            let (chosen, weights) = unsafe { (chosen.part(token * k..(token + 1) * k), weights.part(token * k..(token + 1) * k)) };
            softmax(logits, probs);
            best(probs, chosen);
            for (weight, expert) in weights.iter_mut().zip(&*chosen) {
                *weight = probs[*expert as usize];
            }
            if renormalise {
                let sum: f32 = weights.iter().sum();
                weights.iter_mut().for_each(|weight| *weight /= sum);
            }
        }
    });
}

vectorised! {
    fn softmax(logits: &[f32], probs: &mut [f32]) {
        let largest = lanes::max(logits);
        for (prob, logit) in probs.iter_mut().zip(logits) {
            *prob = exp(logit - largest);
        }
        let sum = lanes::sum(probs, |prob| prob);
        probs.iter_mut().for_each(|prob| *prob /= sum);
    }
}

/// Insertion into a sorted list of k: k and the experts are few.
fn best(probs: &[f32], chosen: &mut [u32]) {
    for (count, prob) in probs.iter().enumerate() {
        let held = count.min(chosen.len());
        let place = chosen[..held].iter().position(|other| *prob > probs[*other as usize]).unwrap_or(held);
        if place < chosen.len() {
            let end = (held + 1).min(chosen.len());
            chosen.copy_within(place..end - 1, place + 1);
            chosen[place] = count as u32;
        }
    }
}

/// Backward step of [`route`]: through the weights, the optional renormalisation and the softmax.
///
/// - `probs`, `chosen`: from the forward step
/// - `d_weights`: `[tokens, k]`
/// - `d_probs`: `[tokens, experts]`, a further gradient on the probabilities, as of a load-balancing loss
/// - `d_logits`: `[tokens, experts]`, overwritten
pub fn route_backward(
    probs: &[f32],
    chosen: &[u32],
    experts: usize,
    renormalise: bool,
    d_weights: &[f32],
    d_probs: Option<&[f32]>,
    d_logits: &mut [f32],
) {
    assert!(experts > 0 && probs.len().is_multiple_of(experts), "route: {} probabilities of {experts} experts", probs.len());
    let tokens = probs.len() / experts;
    let k = chosen.len().checked_div(tokens).unwrap_or(0);
    assert!(chosen.len() == tokens * k, "route: {} choices for {tokens} tokens", chosen.len());
    assert!(d_weights.len() == chosen.len(), "route: {} weight gradients for {} choices", d_weights.len(), chosen.len());
    assert!(d_probs.is_none_or(|d| d.len() == probs.len()), "route: the probabilities' gradient has the wrong length");
    assert!(d_logits.len() == probs.len(), "route: {} logit gradients for {} logits", d_logits.len(), probs.len());
    let d_logits = Shared::new(d_logits);
    parallel_ranges(tokens, TOKENS_LEAST, |range| {
        for token in range {
            let all = token * experts..(token + 1) * experts;
            // SAFETY: parallel_ranges hands out disjoint ranges of tokens.
            let d = unsafe { d_logits.part(all.clone()) };
            let (probs, few) = (&probs[all.clone()], token * k..(token + 1) * k);
            match d_probs {
                Some(d_probs) => d.copy_from_slice(&d_probs[all]),
                None => d.fill(0.0),
            }
            let (chosen, d_weights) = (&chosen[few.clone()], &d_weights[few]);
            if renormalise {
                // w = p / s with s the sum of the chosen: dp = (dw - sum(dw * w)) / s.
                let sum: f32 = chosen.iter().map(|expert| probs[*expert as usize]).sum();
                let dot: f32 = chosen.iter().zip(d_weights).map(|(expert, d)| probs[*expert as usize] * d).sum::<f32>() / sum;
                chosen.iter().zip(d_weights).for_each(|(expert, d_weight)| d[*expert as usize] += (d_weight - dot) / sum);
            } else {
                chosen.iter().zip(d_weights).for_each(|(expert, d_weight)| d[*expert as usize] += d_weight);
            }
            let dot: f32 = d.iter().zip(probs).map(|(d, p)| d * p).sum();
            d.iter_mut().zip(probs).for_each(|(d, p)| *d = p * (*d - dot));
        }
    });
}

/// The choices of a batch sorted by expert, each expert's in token order. A *grouped row* is one (token, slot) choice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Groups {
    /// `[experts + 1]`: grouped rows `offsets[e]..offsets[e + 1]` belong to expert `e`.
    pub offsets: Vec<usize>,
    /// `[tokens * k]`: the token of each grouped row.
    pub rows: Vec<u32>,
    /// `[tokens * k]`: the choice, `token * k + slot`, of each grouped row.
    pub slots: Vec<u32>,
    /// `[tokens * k]`: the grouped row of each choice; the inverse of `slots`.
    pub places: Vec<u32>,
}

/// Sorts the choices by expert, by counting: linear and stable.
///
/// - `chosen`: `[tokens, k]`, each below `experts`
pub fn group(chosen: &[u32], experts: usize, k: usize) -> Groups {
    assert!(k > 0 && chosen.len().is_multiple_of(k), "group: {} choices of {k} a token", chosen.len());
    assert!(u32::try_from(chosen.len()).is_ok(), "group: {} choices do not fit 32-bit indices", chosen.len());
    let mut offsets = vec![0usize; experts + 1];
    for expert in chosen {
        assert!((*expert as usize) < experts, "group: expert {expert} of {experts}");
        offsets[*expert as usize + 1] += 1;
    }
    for expert in 0..experts {
        offsets[expert + 1] += offsets[expert];
    }
    let mut next = offsets.clone();
    let (mut rows, mut slots, mut places) = (vec![0; chosen.len()], vec![0; chosen.len()], vec![0; chosen.len()]);
    for (slot, expert) in chosen.iter().enumerate() {
        let row = next[*expert as usize];
        next[*expert as usize] += 1;
        rows[row] = (slot / k) as u32;
        slots[row] = slot as u32;
        places[slot] = row as u32;
    }
    Groups { offsets, rows, slots, places }
}

fn tokens_of(values: usize, experts: usize, k: usize) -> usize {
    assert!(experts > 0 && values.is_multiple_of(experts), "route: {values} logits of {experts} experts");
    assert!(k > 0 && k <= experts, "route: {k} of {experts} experts");
    values / experts
}

#[cfg(test)]
mod tests {
    use super::super::samples::{assert_near, assert_same_on_any_threads, uniform, wide};
    use super::*;

    fn run(logits: &[f32], experts: usize, k: usize, renormalise: bool) -> (Vec<f32>, Vec<u32>, Vec<f32>) {
        let tokens = logits.len() / experts;
        let (mut probs, mut chosen, mut weights) = (vec![0.0; logits.len()], vec![9; tokens * k], vec![0.0; tokens * k]);
        route(logits, experts, k, renormalise, &mut probs, &mut chosen, &mut weights);
        (probs, chosen, weights)
    }

    #[test]
    fn hand_made_tokens() {
        // exp = 1, 2, 4, 1 over 8.
        let ln2 = std::f32::consts::LN_2;
        let (probs, chosen, weights) = run(&[0.0, ln2, 2.0 * ln2, 0.0], 4, 2, false);
        assert_near("probs", &probs, &[0.125, 0.25, 0.5, 0.125], 3e-7, 0.0);
        assert_eq!(chosen, [2, 1]);
        assert_near("weights", &weights, &[0.5, 0.25], 3e-7, 0.0);
        assert_near("renormalised", &run(&[0.0, ln2, 2.0 * ln2, 0.0], 4, 2, true).2, &[2.0 / 3.0, 1.0 / 3.0], 3e-7, 0.0);
        // Ties: the lower index first; all experts when k is all.
        assert_eq!(run(&[1.0, 3.0, 3.0, 1.0, 3.0], 5, 3, false).1, [1, 2, 4]);
        assert_eq!(run(&[1.0, 3.0, 2.0], 3, 3, false).1, [1, 2, 0]);
        assert!(run(&[], 3, 2, false).1.is_empty());
    }

    #[test]
    fn a_nan_does_not_repeat_an_expert() {
        let (_, mut chosen, weights) = run(&[1.0, f32::NAN, 2.0, 0.0], 4, 3, false);
        chosen.sort_unstable();
        assert!(chosen.windows(2).all(|pair| pair[0] < pair[1]) && chosen[2] < 4, "{chosen:?}");
        assert!(weights.iter().all(|weight| weight.is_nan()));
    }

    fn reference_loss(logits: &[f64], experts: usize, chosen: &[u32], renormalise: bool, d_weights: &[f32], d_probs: &[f32]) -> f64 {
        let tokens = logits.len() / experts;
        let k = chosen.len() / tokens;
        (0..tokens)
            .map(|token| {
                let row = &logits[token * experts..(token + 1) * experts];
                let sum: f64 = row.iter().map(|v| v.exp()).sum();
                let probs: Vec<f64> = row.iter().map(|v| v.exp() / sum).collect();
                let few = token * k..(token + 1) * k;
                let total: f64 = if renormalise { chosen[few.clone()].iter().map(|e| probs[*e as usize]).sum() } else { 1.0 };
                let routed: f64 = few.map(|slot| probs[chosen[slot] as usize] / total * f64::from(d_weights[slot])).sum();
                routed + probs.iter().zip(&d_probs[token * experts..]).map(|(p, d)| p * f64::from(*d)).sum::<f64>()
            })
            .sum()
    }

    #[test]
    fn backward_matches_finite_differences() {
        for (tokens, experts, k) in [(1, 1, 1), (7, 6, 2), (3, 33, 4)] {
            for renormalise in [false, true] {
                for extra in [false, true] {
                    let logits: Vec<f32> = uniform(1, tokens * experts).iter().map(|v| v * 2.0).collect();
                    let (probs, chosen, _) = run(&logits, experts, k, renormalise);
                    let (d_weights, mut d_probs) = (uniform(2, tokens * k), uniform(3, tokens * experts));
                    if !extra {
                        d_probs.fill(0.0);
                    }
                    let mut got = vec![f32::NAN; logits.len()];
                    route_backward(&probs, &chosen, experts, renormalise, &d_weights, extra.then_some(&d_probs[..]), &mut got);
                    let at = wide(&logits);
                    let loss = |at: &[f64]| reference_loss(at, experts, &chosen, renormalise, &d_weights, &d_probs);
                    let want: Vec<f64> = (0..at.len())
                        .map(|i| {
                            let (mut up, mut down) = (at.clone(), at.clone());
                            up[i] += 1e-5;
                            down[i] -= 1e-5;
                            (loss(&up) - loss(&down)) / 2e-5
                        })
                        .collect();
                    assert_near("d_logits", &got, &want, 1e-5, 1e-6);
                }
            }
        }
        route_backward(&[], &[], 4, true, &[], None, &mut []);
    }

    #[test]
    fn groups_keep_token_order_and_leave_unused_experts_empty() {
        // Tokens choose (2, 0), (0, 3), (2, 3): expert 1 has none.
        let groups = group(&[2, 0, 0, 3, 2, 3], 4, 2);
        assert_eq!(groups.offsets, [0, 2, 2, 4, 6]);
        assert_eq!(groups.rows, [0, 1, 0, 2, 1, 2]);
        assert_eq!(groups.slots, [1, 2, 0, 4, 3, 5]);
        assert_eq!(groups.places, [2, 0, 1, 4, 3, 5]);
        assert_eq!(group(&[], 3, 2).offsets, [0, 0, 0, 0]);
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let logits = uniform(5, 1000 * 12);
        assert_same_on_any_threads(|| {
            let (probs, chosen, weights) = run(&logits, 12, 3, true);
            let mut d_logits = vec![0.0; logits.len()];
            route_backward(&probs, &chosen, 12, true, &uniform(6, 3000), Some(&logits), &mut d_logits);
            (probs, chosen, weights, d_logits)
        });
    }
}
