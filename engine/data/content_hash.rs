//! A 64-bit fingerprint of bytes, to notice that a file is not the one it was. Not a defence against forgery.
//! The same on every machine and for every way of cutting the bytes into calls.

/// Odd constants with well mixed bits: the golden ratio's fraction, and SplitMix64's first multiplier.
const STEP: u64 = 0x9E37_79B9_7F4A_7C15;
const FOLD: u64 = 0xBF58_476D_1CE4_E5B9;

/// A fingerprint in the making.
#[derive(Debug, Clone, Default)]
pub struct ContentHash {
    state: u64,
    bytes: u64,
    /// The bytes since the last full word, and how many they are.
    tail: [u8; 8],
}

impl ContentHash {
    pub fn update(&mut self, mut bytes: &[u8]) {
        let held = (self.bytes % 8) as usize;
        self.bytes += bytes.len() as u64;
        if held > 0 {
            let take = bytes.len().min(8 - held);
            self.tail[held..held + take].copy_from_slice(&bytes[..take]);
            bytes = &bytes[take..];
            if held + take < 8 {
                return;
            }
            self.word(u64::from_le_bytes(self.tail));
        }
        let (words, rest) = bytes.as_chunks::<8>();
        words.iter().for_each(|word| self.word(u64::from_le_bytes(*word)));
        self.tail[..rest.len()].copy_from_slice(rest);
    }

    fn word(&mut self, word: u64) {
        // A 128-bit product folded in half mixes every bit of the word into the state.
        let product = u128::from(self.state ^ word ^ STEP) * u128::from(FOLD);
        self.state = (product as u64 ^ (product >> 64) as u64).wrapping_add(self.state.rotate_left(23)).wrapping_add(STEP);
    }

    /// The fingerprint of all bytes so far, as 16 hexadecimal digits: JSON readers do not keep 64-bit integers.
    pub fn hex(&self) -> String {
        let mut last = self.clone();
        let held = (self.bytes % 8) as usize;
        last.tail[held..].fill(0);
        last.word(u64::from_le_bytes(last.tail));
        last.word(self.bytes);
        format!("{:016x}", last.state)
    }

    /// The fingerprint of `bytes`.
    pub fn of(bytes: &[u8]) -> String {
        let mut hash = Self::default();
        hash.update(bytes);
        hash.hex()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cutting_does_not_matter_and_every_byte_does() {
        let bytes: Vec<u8> = (0..100u8).collect();
        for cut in 0..100 {
            let mut hash = ContentHash::default();
            hash.update(&bytes[..cut]);
            hash.update(&bytes[cut..(cut + 3).min(100)]);
            hash.update(&bytes[(cut + 3).min(100)..]);
            assert_eq!(hash.hex(), ContentHash::of(&bytes), "{cut}");
        }
        let mut seen: Vec<String> = (0..=100).map(|length| ContentHash::of(&bytes[..length])).collect();
        for at in 0..100 {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            seen.push(ContentHash::of(&changed));
        }
        // One zero byte is `bytes[..1]`, seen already.
        seen.extend((2..20).map(|length| ContentHash::of(&vec![0; length])));
        let count = seen.len();
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), count);
    }
}
