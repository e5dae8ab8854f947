//! Counter-based random numbers: the value at (seed, stream name, counter) is a pure function, so a position in a stream is
//! one integer that a cursor can store, and every machine agrees. Not for secrets.
//! Source: Philox4x32 with 10 rounds, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

/// The two multipliers and the two key increments of Philox4x32.
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const KEY_STEPS: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// One Philox4x32-10 block: 128 random bits for a 128-bit counter and a 64-bit key, words low first.
pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let ([mut c0, mut c1, mut c2, mut c3], [mut k0, mut k1]) = (counter, key);
    for _ in 0..ROUNDS {
        let left = u64::from(MULTIPLIERS[0]) * u64::from(c0);
        let right = u64::from(MULTIPLIERS[1]) * u64::from(c2);
        (c0, c1, c2, c3) = ((right >> 32) as u32 ^ c1 ^ k0, right as u32, (left >> 32) as u32 ^ c3 ^ k1, left as u32);
        k0 = k0.wrapping_add(KEY_STEPS[0]);
        k1 = k1.wrapping_add(KEY_STEPS[1]);
    }
    [c0, c1, c2, c3]
}

/// A named stream of random numbers under a seed. The seed is Philox's key; the counter's high half is the hashed name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream {
    seed: u64,
    name: u64,
}

impl Stream {
    /// The stream called `name` of `seed`. Two names share no values in practice: each has its own 2^64 counters.
    pub fn new(seed: u64, name: &str) -> Self {
        Self { seed, name: name_hash(name) }
    }

    /// 64 uniform bits at `counter`.
    pub fn bits(&self, counter: u64) -> u64 {
        let counter = [counter as u32, (counter >> 32) as u32, self.name as u32, (self.name >> 32) as u32];
        let [low, high, ..] = philox4x32(counter, [self.seed as u32, (self.seed >> 32) as u32]);
        u64::from(low) | u64::from(high) << 32
    }

    /// Uniform in [0, 1), a multiple of 2^-24.
    pub fn f32(&self, counter: u64) -> f32 {
        (self.bits(counter) >> 40) as f32 / (1u32 << 24) as f32
    }

    /// Uniform in [0, 1), a multiple of 2^-53.
    pub fn f64(&self, counter: u64) -> f64 {
        (self.bits(counter) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in `0..bound`; the bias is below `bound` / 2^64. `bound` must not be zero.
    pub fn below(&self, counter: u64, bound: u64) -> u64 {
        assert!(bound > 0, "a random number below zero was asked for");
        ((u128::from(self.bits(counter)) * u128::from(bound)) >> 64) as u64
    }
}

/// FNV-1a, 64 bits: names are short, and the hash must never change.
fn name_hash(name: &str) -> u64 {
    name.bytes().fold(0xCBF2_9CE4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_published_vectors() {
        // The known-answer vectors of the Random123 library for philox4x32, 10 rounds.
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox4x32([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox4x32([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn streams_differ_by_seed_name_and_counter_and_repeat_otherwise() {
        let stream = Stream::new(7, "mix");
        assert_eq!(stream.bits(3), Stream::new(7, "mix").bits(3));
        let others = [stream.bits(4), Stream::new(8, "mix").bits(3), Stream::new(7, "windows").bits(3)];
        assert!(others.iter().all(|other| *other != stream.bits(3)));
        // FNV-1a of "a", from the algorithm's published table: the mapping from names must never change.
        assert_eq!(name_hash("a"), 0xaf63_dc4c_8601_ec8c);
    }

    #[test]
    fn floats_and_bounded_integers_are_in_range_and_even() {
        let stream = Stream::new(1, "test");
        let (mut sum, mut counts) = (0.0f64, [0u32; 7]);
        for counter in 0..14_000 {
            let (single, double) = (stream.f32(counter), stream.f64(counter));
            assert!((0.0..1.0).contains(&single) && (0.0..1.0).contains(&double));
            sum += double;
            counts[stream.below(counter, 7) as usize] += 1;
        }
        // The mean's deviation is 0.289 / sqrt(14000) = 0.0024, a count's is 41: five of each are allowed.
        assert!((sum / 14_000.0 - 0.5).abs() < 0.0125, "{sum}");
        assert!(counts.iter().all(|count| count.abs_diff(2_000) < 205), "{counts:?}");
    }
}
