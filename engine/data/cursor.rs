//! A position in a data set as plain data, with what is needed to notice that it is another data set.
//! Not the reading: `dataset.rs` makes cursors and goes on from them.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::document_index::{Format, Split};
use super::pack::Packing;
use super::source::SourcePosition;
use crate::error::{Error, Result};

/// The layout of [`Cursor`] that this engine writes and reads.
pub const CURSOR_VERSION: u32 = 1;

/// Between two batches of a data set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cursor {
    pub version: u32,
    pub fingerprint: Fingerprint,
    /// Batches taken so far.
    pub batches: u64,
    pub stream: StreamPosition,
    pub packer: PackerPosition,
}

/// How far the sources are read. Documents fetched ahead but not packed do not count as read.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StreamPosition {
    /// Draws of the mixture.
    pub draws: u64,
    pub sources: Vec<SourcePosition>,
}

/// What the packer holds between two rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PackerPosition {
    /// The data set is not packed.
    None,
    /// The rest of the document that the last row cut.
    Concat {
        tokens: Vec<u32>,
        supervised: Option<Vec<bool>>,
    },
    /// The stream stands before the pool; of its rows so many are out.
    BestFit {
        pools: u64,
        rows: u64,
    },
    Windows {
        rows: u64,
    },
}

/// What a data set is made of, as far as its batches depend on it. Paths are not part of it: files may move.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Fingerprint {
    pub sources: Vec<SourceFingerprint>,
    pub mix_seed: u64,
    /// [`super::tokenizer::Tokenizer::fingerprint`], in hexadecimal.
    pub tokenizer: Option<String>,
    /// Hash of the chat template.
    pub chat_template: Option<String>,
    pub recognise_specials: bool,
    pub end_of_document: bool,
    pub packing: Option<Packing>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SourceFingerprint {
    pub weight: f64,
    pub format: Format,
    pub field: String,
    pub split: Option<Split>,
    pub shuffle: Option<u64>,
    pub documents: u64,
    pub files: Vec<FileFingerprint>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileFingerprint {
    pub name: String,
    pub bytes: u64,
    pub hash: String,
}

impl Cursor {
    /// Errors: [`Error::Argument`] that names the first thing in which the stored data set differs from `now`, or a version
    /// that this engine does not read.
    pub(super) fn check(&self, now: &Fingerprint) -> Result<()> {
        if self.version != CURSOR_VERSION {
            return Err(Error::argument("data.restore", "cursor.version", CURSOR_VERSION.to_string(), self.version));
        }
        let value = |fingerprint: &Fingerprint| serde_json::to_value(fingerprint).expect("plain data becomes JSON");
        match difference(&value(&self.fingerprint), &value(now), String::new()) {
            None => Ok(()),
            Some((place, stored, now)) => {
                Err(Error::argument("data.restore", place, format!("{stored}, as when the cursor was stored"), now))
            }
        }
    }
}

/// The first place where two values differ, and both values there.
fn difference(stored: &Value, now: &Value, place: String) -> Option<(String, String, String)> {
    match (stored, now) {
        (Value::Object(a), Value::Object(b)) if a.keys().eq(b.keys()) => a.iter().find_map(|(key, value)| {
            let dot = if place.is_empty() { "" } else { "." };
            difference(value, &b[key], format!("{place}{dot}{key}"))
        }),
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            a.iter().zip(b).enumerate().find_map(|(index, (a, b))| difference(a, b, format!("{place}[{index}]")))
        }
        (Value::Array(a), Value::Array(b)) => Some((place, format!("{} entries", a.len()), b.len().to_string())),
        _ if stored == now => None,
        _ => Some((place, stored.to_string(), now.to_string())),
    }
}
