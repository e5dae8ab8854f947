//! How a value lies in the database: a magic byte, a version byte, a checksum, the payload. The database below has
//! checksums of its own, but only for the log it wrote, not for what it made of it. Knows nothing of what payloads mean.

use crate::error::{Error, Result};
use std::path::Path;

/// Larger values belong into files: beyond some size the database below writes files of its own, which it never syncs.
pub const PAYLOAD_BYTES_MAX: usize = 4096;
/// Keys are short; the limit keeps a node of the tree far below the size at which it would become a file.
pub const KEY_BYTES_MAX: usize = 512;

const MAGIC: u8 = 0xb7;
const VERSION: u8 = 1;
const HEADER_BYTES: usize = 6;

/// The stored form of `payload` under `key`.
///
/// Errors: [`Error::Argument`] for a key that is empty or over 512 bytes, and a payload over 4 KiB.
pub(super) fn encode(key: &str, payload: &[u8]) -> Result<Vec<u8>> {
    check_key(key)?;
    if payload.len() > PAYLOAD_BYTES_MAX {
        let expected = format!("at most {PAYLOAD_BYTES_MAX} bytes; write larger ones to a file and store its hash");
        return Err(Error::argument("store", key, expected, format!("{} bytes", payload.len())));
    }
    let mut stored = Vec::with_capacity(HEADER_BYTES + payload.len());
    stored.extend([MAGIC, VERSION]);
    stored.extend(checksum(key, payload).to_le_bytes());
    stored.extend(payload);
    Ok(stored)
}

/// Errors: [`Error::Argument`] for a key that is empty or over 512 bytes.
pub(super) fn check_key(key: &str) -> Result<()> {
    if key.is_empty() || key.len() > KEY_BYTES_MAX {
        return Err(Error::argument("store", "key", format!("1 to {KEY_BYTES_MAX} bytes"), format!("{} bytes", key.len())));
    }
    Ok(())
}

/// The payload of `stored`, which was read under `key` from the database at `path`. Errors: as [`check`].
pub(super) fn decode(path: &Path, key: &str, mut stored: Vec<u8>) -> Result<Vec<u8>> {
    check(path, key, &stored)?;
    stored.drain(..HEADER_BYTES);
    Ok(stored)
}

/// That `stored` is what [`encode`] makes for that key. Errors: [`Error::Format`] that names the key, if it is not.
pub(super) fn check(path: &Path, key: &str, stored: &[u8]) -> Result<()> {
    let fault = |expected: &str, found: String| Err(Error::format(path, key, expected, found));
    if stored.len() < HEADER_BYTES || stored[0] != MAGIC {
        let found = stored.first().map_or("nothing".into(), |first| format!("{} bytes that begin with {first:#04x}", stored.len()));
        return fault("a value of this engine", found);
    }
    if stored[1] != VERSION {
        return fault("a value of version 1", format!("version {}; a newer engine wrote it", stored[1]));
    }
    let (header, payload) = stored.split_at(HEADER_BYTES);
    let promised = u32::from_le_bytes(header[2..].try_into().expect("the header has four bytes of checksum"));
    let actual = checksum(key, payload);
    if promised != actual {
        return fault(&format!("checksum {promised:08x}"), format!("{actual:08x}; the record is damaged"));
    }
    Ok(())
}

/// The key is part of it, so that a value found under another's key is no value.
fn checksum(key: &str, payload: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(key.as_bytes()), payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_come_back_and_every_flipped_bit_is_found() {
        let stored = encode("step/a", b"{\"x\":1}").unwrap();
        assert_eq!(decode(Path::new("db"), "step/a", stored.clone()).unwrap(), b"{\"x\":1}");
        // The check value of CRC-32C, from its definition: that of "123456789", here as key "1234" and payload "56789".
        assert_eq!(encode("1234", b"56789").unwrap()[..6], [0xb7, 1, 0x83, 0x92, 0x06, 0xe3]);
        for bit in 0..stored.len() * 8 {
            let mut spoiled = stored.clone();
            spoiled[bit / 8] ^= 1 << (bit % 8);
            let message = check(Path::new("db"), "step/a", &spoiled).unwrap_err().to_string();
            assert!(message.starts_with("db: step/a: expected"), "bit {bit}: {message}");
        }
        for length in 0..stored.len() {
            assert!(check(Path::new("db"), "step/a", &stored[..length]).is_err(), "{length} bytes");
        }
        assert!(check(Path::new("db"), "step/b", &stored).unwrap_err().to_string().contains("step/b: expected checksum"));
    }

    #[test]
    fn sizes_have_limits() {
        assert_eq!(encode("k", &[7; PAYLOAD_BYTES_MAX]).unwrap().len(), PAYLOAD_BYTES_MAX + HEADER_BYTES);
        let message = encode("k", &[7; PAYLOAD_BYTES_MAX + 1]).unwrap_err().to_string();
        assert!(message.contains("`k` should be at most 4096 bytes; write larger ones to a file"), "{message}");
        assert!(encode("", b"").is_err());
        assert!(encode(&"k".repeat(KEY_BYTES_MAX), b"").is_ok());
        assert!(encode(&"k".repeat(KEY_BYTES_MAX + 1), b"").is_err());
    }
}
