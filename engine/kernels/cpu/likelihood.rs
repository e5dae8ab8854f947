//! What sampling computes over a whole vocabulary: whether logits are numbers, the largest of them, and the weight of each
//! token. Knows no rules.

use super::exp::exp;
use super::lanes;
use crate::vectorised;

/// Weights that are summed in f32 before f64 takes over.
pub const BLOCK: usize = 1024;

vectorised! {
    /// Whether every logit is a number or minus infinity, and the largest.
    pub fn survey(logits: &[f32]) -> (bool, f32) {
        let mut fine = [true; lanes::LANES];
        let (chunks, tail) = logits.as_chunks::<{ lanes::LANES }>();
        for chunk in chunks {
            for lane in 0..lanes::LANES {
                fine[lane] &= chunk[lane] < f32::INFINITY;
            }
        }
        (fine.iter().all(|fine| *fine) && tail.iter().all(|logit| *logit < f32::INFINITY), lanes::max(logits))
    }
}

vectorised! {
    /// `weights = exp((logits - largest) / temperature)`: relative to the most likely token, whose weight is 1.
    pub fn weights(logits: &[f32], largest: f32, temperature: f32, weights: &mut [f32]) {
        for (weight, logit) in weights.iter_mut().zip(logits) {
            *weight = exp((logit - largest) / temperature);
        }
    }
}

vectorised! {
    /// The sum of a block of weights.
    pub fn sum(weights: &[f32]) -> f64 {
        f64::from(lanes::sum(weights, |weight| weight))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_survey_sees_what_is_not_a_number_wherever_it_is() {
        for len in [1, 31, 32, 33, 100] {
            let logits: Vec<f32> = (0..len).map(|i| (i * 7 % 13) as f32).collect();
            assert_eq!(survey(&logits), (true, logits.iter().copied().fold(f32::MIN, f32::max)));
            for at in [0, len / 2, len - 1] {
                for odd in [f32::NAN, f32::INFINITY] {
                    let mut logits = logits.clone();
                    logits[at] = odd;
                    assert!(!survey(&logits).0, "{odd} at {at} of {len}");
                }
                let mut logits = logits.clone();
                logits[at] = f32::NEG_INFINITY;
                assert!(survey(&logits).0);
            }
        }
    }

    #[test]
    fn weights_are_relative_to_the_most_likely() {
        let logits: Vec<f32> = (0..70).map(|i| (i % 9) as f32 / 2.0).collect();
        let mut out = vec![f32::NAN; 70];
        weights(&logits, 4.0, 0.5, &mut out);
        for (weight, logit) in out.iter().zip(&logits) {
            assert!((weight - ((logit - 4.0) * 2.0).exp()).abs() < 1e-6);
        }
        assert!((sum(&out) - out.iter().map(|weight| f64::from(*weight)).sum::<f64>()).abs() < 1e-5);
    }
}
