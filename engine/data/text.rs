//! How a text file divides into documents. Not the reading: `document_index.rs`.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use crate::error::{Error, Result};

/// What ends a document of a text file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Delimiter {
    /// Nothing: the file is one document.
    Whole,
    /// Each line that is not blank is a document, without its newline.
    Line,
    /// Blank lines lie between documents, which keep their inner newlines but not the last.
    BlankLine,
}

/// The byte at which the last `fraction` of a text file begins, moved on to the start of a character.
///
/// Errors: [`Error::Io`].
pub fn split_point(path: &Path, bytes: u64, fraction: f64) -> Result<u64> {
    // 1 - 0.8 is a little below 0.2 in floating point; the crumb keeps that from costing a byte.
    let at = ((bytes as f64 * (1.0 - fraction) + 1e-6) as u64).min(bytes);
    let mut file = File::open(path).map_err(|source| Error::io(path, "open", source))?;
    let mut next = Vec::new();
    file.seek(SeekFrom::Start(at)).map_err(|source| Error::io(path, "seek in", source))?;
    file.take(4).read_to_end(&mut next).map_err(|source| Error::io(path, "read", source))?;
    // A continuation byte of UTF-8 is 10xxxxxx; a character has at most three of them.
    let inside = next.iter().take_while(|byte| **byte & 0xC0 == 0x80).count();
    Ok(at + inside as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_split_never_cuts_a_character() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.txt");
        std::fs::write(&path, "aé中😀").unwrap(); // Characters begin at bytes 0, 1, 3, 6; the end is 10.
        let points: Vec<u64> = (0..=10).map(|tenths| split_point(&path, 10, f64::from(10 - tenths) / 10.0).unwrap()).collect();
        assert!(points.iter().all(|point| [0, 1, 3, 6, 10].contains(point)), "{points:?}");
        assert_eq!((points[0], points[2], points[10]), (0, 3, 10));
        assert!(split_point(&folder.path().join("none"), 1, 0.1).is_err());
    }
}
