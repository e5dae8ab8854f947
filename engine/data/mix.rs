//! Which source the next record comes from, by weight. A pure function of a counter, so a cursor stores one integer.
//! Not the sources: `dataset.rs` owns their positions.

use crate::error::{Error, Result};
use crate::kernels::random::Stream;

/// Weights over sources, and the stream of draws.
#[derive(Debug, Clone)]
pub struct Mix {
    weights: Vec<f64>,
    stream: Stream,
}

impl Mix {
    /// - `weights`: one a source, any non-negative scale; a record comes from source `i` with probability weight / sum
    ///
    /// Errors: [`Error::Argument`] for no weights, a weight that is negative, infinite or not a number, or a sum of zero.
    pub fn new(weights: &[f64], seed: u64) -> Result<Self> {
        for (index, weight) in weights.iter().enumerate() {
            if !weight.is_finite() || *weight < 0.0 {
                return Err(Error::argument("data.mix", format!("weights[{index}]"), "a finite number, zero or more", weight));
            }
        }
        let sum: f64 = weights.iter().sum();
        if sum <= 0.0 || !sum.is_finite() {
            return Err(Error::argument("data.mix", "weights", "at least one above zero", format!("{weights:?}")));
        }
        Ok(Self { weights: weights.to_vec(), stream: Stream::new(seed, "mix") })
    }

    pub fn weights(&self) -> &[f64] {
        &self.weights
    }

    /// The source of draw `counter` among those that still have records. `None` when no source with a weight has any.
    ///
    /// - `alive`: `[sources]`
    pub fn source(&self, counter: u64, alive: &[bool]) -> Option<usize> {
        assert_eq!(alive.len(), self.weights.len());
        let candidates = || self.weights.iter().zip(alive).enumerate().filter(|(_, (weight, alive))| **alive && **weight > 0.0);
        let sum: f64 = candidates().map(|(_, (weight, _))| weight).sum();
        let mut left = self.stream.f64(counter) * sum;
        for (index, (weight, _)) in candidates() {
            if left < *weight {
                return Some(index);
            }
            left -= weight;
        }
        // Rounding may leave a crumb above the last weight.
        candidates().next_back().map(|(index, _)| index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_come_in_proportion_and_the_same_every_time() {
        let mix = Mix::new(&[1.0, 0.0, 3.0], 4).unwrap();
        let draws: Vec<_> = (0..8_000).map(|counter| mix.source(counter, &[true; 3]).unwrap()).collect();
        let count = |source| draws.iter().filter(|draw| **draw == source).count();
        // 2000 with a deviation of 39.
        assert!(count(0).abs_diff(2_000) < 200 && count(1) == 0, "{}", count(0));
        let again = Mix::new(&[1.0, 0.0, 3.0], 4).unwrap();
        assert!((0..8_000).all(|counter| again.source(counter, &[true; 3]) == Some(draws[counter as usize])));
    }

    #[test]
    fn an_exhausted_source_leaves_the_rest_and_none_is_the_end() {
        let mix = Mix::new(&[1.0, 1.0, 0.0], 4).unwrap();
        assert!((0..100).all(|counter| mix.source(counter, &[false, true, true]) == Some(1)));
        assert_eq!(mix.source(0, &[false, false, true]), None);
    }

    #[test]
    fn senseless_weights_are_errors() {
        for weights in [&[][..], &[-1.0, 2.0], &[f64::NAN], &[f64::INFINITY], &[0.0, 0.0], &[f64::MAX, f64::MAX]] {
            assert!(Mix::new(weights, 0).is_err(), "{weights:?}");
        }
    }
}
