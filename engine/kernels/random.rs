//! Counter-based random numbers: every value is a function of (seed, stream, counter), so a position is data that can be
//! stored, streams never disturb each other, and two runs with one seed agree. No state, no threads.
//! Source: Philox4x32 with 10 rounds, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; stream names
//! are hashed by FNV-1a, 64 bits.

/// A place in a stream of random numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    pub seed: u64,
    /// [`stream`] of a name.
    pub stream: u64,
    /// Number of the next block of four words.
    pub counter: u64,
}

/// The number of the stream called `name`.
pub const fn stream(name: &str) -> u64 {
    let bytes = name.as_bytes();
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let mut index = 0;
    while index < bytes.len() {
        hash = (hash ^ bytes[index] as u64).wrapping_mul(0x0000_0100_0000_01b3);
        index += 1;
    }
    hash
}

/// Blocks that `words` random words take.
pub const fn blocks_of_words(words: usize) -> u64 {
    words.div_ceil(4) as u64
}

const ROUNDS: usize = 10;

/// Philox4x32-10 as its authors define it.
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let first = u64::from(counter[0]) * 0xd251_1f53;
        let second = u64::from(counter[2]) * 0xcd9e_8d57;
        counter = [(second >> 32) as u32 ^ counter[1] ^ key[0], second as u32, (first >> 32) as u32 ^ counter[3] ^ key[1], first as u32];
        key = [key[0].wrapping_add(0x9e37_79b9), key[1].wrapping_add(0xbb67_ae85)];
    }
    counter
}

/// The four words at `position`: the seed is the key, the counter the low half of Philox's counter, the stream the high.
pub fn block(position: Position) -> [u32; 4] {
    let Position { seed, stream, counter } = position;
    philox([counter as u32, (counter >> 32) as u32, stream as u32, (stream >> 32) as u32], [seed as u32, (seed >> 32) as u32])
}

/// Calls `use_block` with each part of up to `size` elements and its block.
fn fill_blocks<T>(from: Position, size: usize, out: &mut [T], use_block: impl Fn([u32; 4], &mut [T])) {
    for (index, part) in out.chunks_mut(size).enumerate() {
        use_block(block(Position { counter: from.counter.wrapping_add(index as u64), ..from }), part);
    }
}

/// Multiples of 2^-24 in [0, 1).
pub fn uniform(word: u32) -> f32 {
    (word >> 8) as f32 * (1.0 / 16_777_216.0)
}

/// Numbers uniform in [0, 1), four a block.
pub fn fill_uniform(from: Position, out: &mut [f32]) {
    fill_blocks(from, 4, out, |words, part| part.iter_mut().zip(words).for_each(|(out, word)| *out = uniform(word)));
}

/// Normal numbers by Box and Muller, four a block. In f64: the tail is decided by the smallest uniform number, and the
/// last bit of a library's logarithm must not show in f32.
pub fn fill_normal(from: Position, out: &mut [f32]) {
    fill_blocks(from, 4, out, |words, part| {
        let mut values = [0f32; 4];
        for (pair, words) in values.chunks_exact_mut(2).zip(words.chunks_exact(2)) {
            // From above 0 to 1, so that the logarithm is finite.
            let radius = (-2.0 * ((f64::from(words[0]) + 1.0) / 4_294_967_296.0).ln()).sqrt();
            let angle = std::f64::consts::TAU * (f64::from(words[1]) / 4_294_967_296.0);
            pair[0] = (radius * angle.cos()) as f32;
            pair[1] = (radius * angle.sin()) as f32;
        }
        part.copy_from_slice(&values[..part.len()]);
    });
}

/// Integers uniform from `low` to below `high`, two a block. Each is the high part of a 64-bit product, whose share of any
/// value is off by less than 2^-32 of it.
pub fn fill_integers(from: Position, low: i32, high: i32, out: &mut [i32]) {
    assert!(low < high, "an empty range {low}..{high}");
    let range = (i64::from(high) - i64::from(low)) as u128;
    fill_blocks(from, 2, out, |words, part| {
        for (out, words) in part.iter_mut().zip(words.chunks_exact(2)) {
            let word = u128::from(words[0]) << 32 | u128::from(words[1]);
            *out = (i64::from(low) + ((word * range) >> 64) as i64) as i32;
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_published_words() {
        // From the known-answer file (kat_vectors) of Random123, the authors' own library: philox4x32, 10 rounds.
        for (counter, key, want) in [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ] {
            assert_eq!(philox(counter, key), want);
        }
    }

    #[test]
    fn stream_names_hash_as_fnv_publishes() {
        assert_eq!(stream(""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(stream("a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(stream("foobar"), 0x8594_4171_f739_67e8);
    }

    #[test]
    fn moments_ranges_and_positions_are_right() {
        let from = Position { seed: 7, stream: stream("test"), counter: 0 };
        let mut normal = vec![0f32; 100_003];
        fill_normal(from, &mut normal);
        let moment = |power: i32| normal.iter().map(|v| f64::from(*v).powi(power)).sum::<f64>() / normal.len() as f64;
        // Standard errors at 1e5 numbers: 0.003, 0.0045, 0.012, 0.031; allowed are four of each.
        for (power, want, allowed) in [(1, 0.0, 0.013), (2, 1.0, 0.018), (3, 0.0, 0.05), (4, 3.0, 0.125)] {
            assert!((moment(power) - want).abs() < allowed, "moment {power} is {}", moment(power));
        }
        let mut uniform = vec![0f32; 4001];
        fill_uniform(from, &mut uniform);
        assert!(uniform.iter().all(|v| (0.0..1.0).contains(v)));
        let mean = uniform.iter().sum::<f32>() / 4001.0;
        assert!((mean - 0.5).abs() < 0.02, "{mean}");
        let mut later = vec![0f32; 5];
        fill_uniform(Position { counter: 3, ..from }, &mut later);
        assert_eq!(later, uniform[12..17]);
        let mut dice = vec![0; 6001];
        fill_integers(from, -2, 4, &mut dice);
        for face in -2..4 {
            let count = dice.iter().filter(|v| **v == face).count();
            assert!((860..1140).contains(&count), "{face} came {count} times"); // 1000, five standard errors of 29 off
        }
        fill_integers(from, i32::MIN, i32::MAX, &mut dice);
        assert!(dice.iter().any(|v| *v < 0) && dice.iter().any(|v| *v > 0));
    }
}
