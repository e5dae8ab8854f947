//! A shuffled order of `0..count` that is computed, not stored: any position in constant time and memory.
//! Not a buffer of records: sources are indices, so a full shuffle costs nothing. Source: Black and Rogaway, "Ciphers with
//! arbitrary finite domains", CT-RSA 2002: a Feistel network over the next power of four, walked until it lands inside.

use crate::kernels::random::Stream;

/// Fewer rounds leave visible order in small domains; more only cost time.
const ROUNDS: usize = 8;

/// A permutation of `0..count`, a pure function of (count, seed, epoch).
#[derive(Debug, Clone, Copy)]
pub struct Permutation {
    count: u64,
    /// Each half of the network has this many bits.
    half_bits: u32,
    keys: [u64; ROUNDS],
}

impl Permutation {
    pub fn new(count: u64, seed: u64, epoch: u64) -> Self {
        let bits = u64::BITS - count.saturating_sub(1).leading_zeros();
        let stream = Stream::new(seed, "shuffle");
        let keys = std::array::from_fn(|round| stream.bits(epoch.wrapping_mul(ROUNDS as u64).wrapping_add(round as u64)));
        Self { count, half_bits: bits.div_ceil(2).max(1), keys }
    }

    /// Where position `index` of the shuffled order points. `index` must be below the count.
    pub fn at(&self, index: u64) -> u64 {
        assert!(index < self.count, "position {index} of {}", self.count);
        let mut value = index;
        // The network permutes a domain at most four times as large (16 for the smallest); following it from inside comes
        // back inside, and distinct starts never meet.
        loop {
            value = self.network(value);
            if value < self.count {
                return value;
            }
        }
    }

    fn network(&self, value: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for key in self.keys {
            (left, right) = (right, left ^ (mix(right ^ key) & mask));
        }
        left << self.half_bits | right
    }
}

/// A bijective scrambling of 64 bits: the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
fn mix(mut value: u64) -> u64 {
    value = (value ^ value >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    value = (value ^ value >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ value >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_index_appears_once() {
        for count in [1u64, 2, 3, 4, 5, 7, 16, 17, 33, 255, 1000, 4097] {
            for epoch in 0..3 {
                let permutation = Permutation::new(count, 5, epoch);
                let mut order: Vec<u64> = (0..count).map(|index| permutation.at(index)).collect();
                order.sort_unstable();
                assert!(order.into_iter().eq(0..count), "{count}");
            }
        }
    }

    #[test]
    fn epochs_and_seeds_give_different_orders_and_all_orders_of_three_occur_evenly() {
        let order = |seed, epoch| -> Vec<u64> { (0..100).map(|index| Permutation::new(100, seed, epoch).at(index)).collect() };
        assert_eq!(order(1, 0), order(1, 0));
        assert!(order(1, 0) != order(1, 1) && order(1, 0) != order(2, 0));
        let mut counts = std::collections::BTreeMap::new();
        for epoch in 0..6_000 {
            let permutation = Permutation::new(3, 9, epoch);
            *counts.entry([0, 1, 2].map(|index| permutation.at(index))).or_insert(0u32) += 1;
        }
        // 1000 each is expected with a deviation of 29: six of them are allowed.
        assert!(counts.len() == 6 && counts.values().all(|count| count.abs_diff(1_000) < 175), "{counts:?}");
    }

    #[test]
    fn neighbours_are_torn_apart_and_a_huge_count_costs_no_memory() {
        let count = 10_000;
        let permutation = Permutation::new(count, 3, 0);
        let adjacent = (1..count).filter(|index| permutation.at(*index) == permutation.at(index - 1) + 1).count();
        // A random order has one such pair on average.
        assert!(adjacent < 8, "{adjacent}");
        let correlation: f64 = (0..count).map(|index| (index as f64 / 1e4 - 0.5) * (permutation.at(index) as f64 / 1e4 - 0.5)).sum();
        // The sum's deviation is sqrt(10000) / 12 = 8.3.
        assert!(correlation.abs() < 42.0, "{correlation}");
        let huge = Permutation::new(u64::MAX / 2, 1, 0);
        assert!(huge.at(0) != huge.at(1) && huge.at(u64::MAX / 2 - 1) < u64::MAX / 2);
    }
}
