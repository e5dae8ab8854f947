//! The 256 printable characters that stand for bytes in the vocabulary files of byte-level BPE, and the way back.
//! Not an encoder: `tokenizer.rs` owns ids. Source: GPT-2's vocabulary files, kept by every Qwen tokenizer.

use std::sync::LazyLock;

/// The character of each byte: printable Latin-1 characters stand for themselves, the other 68 bytes take U+0100 and on.
static CHARS: LazyLock<[char; 256]> = LazyLock::new(|| {
    let mut spare = 0x100;
    std::array::from_fn(|byte| {
        let byte = byte as u8;
        match byte {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
            _ => {
                spare += 1;
                char::from_u32(spare - 1).expect("U+0100 to U+0143 are characters")
            }
        }
    })
});

/// The byte of each character up to U+0143, the last of the alphabet.
static BYTES: LazyLock<[Option<u8>; 0x144]> = LazyLock::new(|| {
    let mut bytes = [None; 0x144];
    for (byte, character) in CHARS.iter().enumerate() {
        bytes[*character as usize] = Some(byte as u8);
    }
    bytes
});

/// The character that stands for `byte` in a vocabulary file.
pub fn byte_to_char(byte: u8) -> char {
    CHARS[usize::from(byte)]
}

/// The byte that `character` stands for, if it is one of the 256.
pub fn char_to_byte(character: char) -> Option<u8> {
    BYTES.get(character as usize).copied().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_its_own_character_and_comes_back() {
        for byte in 0..=255u8 {
            assert_eq!(char_to_byte(byte_to_char(byte)), Some(byte));
        }
        // Known from any GPT-2 style vocabulary: space is U+0120, newline U+010A, delete U+0121.
        assert_eq!([b' ', b'\n', 0x7F, b'A', 0xAD].map(byte_to_char), ['\u{120}', '\u{10A}', '\u{121}', 'A', '\u{143}']);
        assert_eq!([' ', '\u{144}', '\u{AD}', '中'].map(char_to_byte), [None; 4]);
    }
}
