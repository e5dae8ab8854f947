//! A position in a data set as plain data, with what is needed to notice that it is another data set.
//! Not the reading: `dataset.rs` makes cursors and goes on from them.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::conversation::Rules;
use super::document_index::Split;
use super::pack::Packing;
use super::records::Origin;
use super::source::SourcePosition;
use crate::error::{Error, Result};

/// The layout of [`Cursor`] that this engine writes and reads.
pub const CURSOR_VERSION: u32 = 2;

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
    /// The stream stands before the document that the last row cut; so many of its tokens are out. 0: no document is cut, and
    /// the stream stands before the next.
    Concat {
        used: usize,
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
    /// How records become conversations.
    #[serde(default)]
    pub chat_rules: Option<Rules>,
    pub recognise_specials: bool,
    pub end_of_document: bool,
    pub packing: Option<Packing>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SourceFingerprint {
    pub weight: f64,
    pub format: Origin,
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

fn close(a: Option<f64>, b: Option<f64>) -> bool {
    a.zip(b).is_some_and(|(a, b)| (a - b).abs() <= 1e-14 * a.abs().max(b.abs()))
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
        // A stored number went through decimal digits, which may move its last bit.
        (Value::Number(a), Value::Number(b)) if a.is_f64() && b.is_f64() && close(a.as_f64(), b.as_f64()) => None,
        _ if stored == now => None,
        _ => Some((place, stored.to_string(), now.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::Arc;

    use super::super::chat_template::ChatTemplate;
    use super::super::conversation::Form;
    use super::super::dataset::Dataset;
    use super::super::document_index::Part;
    use super::super::pack::TokenBatch;
    use super::super::source::OnError;
    use super::super::text::Delimiter;
    use super::super::tokenizer::Tokenizer;
    use super::*;

    /// Two files of lines, one of them with bad ones, and a file of conversations.
    fn files() -> (tempfile::TempDir, Vec<PathBuf>) {
        let folder = tempfile::tempdir().unwrap();
        let line = |n: usize| format!("{{\"text\": \"{}\"}}\n", "x".repeat(n * 7 % 23));
        let jsonl: String = (0..40).map(|n| if n % 9 == 4 { "{bad\n".to_string() } else { line(n) }).collect();
        let text: String = (0..30).map(|n| format!("{n} {}\n", "y".repeat(n * 5 % 17))).collect();
        let chat = |n: usize| {
            let words = "z".repeat(n);
            format!(
                "{{\"messages\": [{{\"role\": \"user\", \"content\": \"{n}\"}}, {{\"role\": \"assistant\", \"content\": \"{words}\"}}]}}\n"
            )
        };
        let contents = [("a.jsonl", jsonl), ("b.txt", text), ("c.jsonl", (0..12).map(chat).collect())];
        let paths = contents.map(|(name, content)| {
            std::fs::write(folder.path().join(name), content).unwrap();
            folder.path().join(name)
        });
        (folder, paths.to_vec())
    }

    fn all(data: &mut Dataset, rows: usize, most: usize) -> Vec<TokenBatch> {
        (0..most).map_while(|_| data.take_batch(rows).unwrap()).collect()
    }

    /// For every k: k batches, a cursor through JSON, a new data set restored from it, and the rest of the batches.
    fn check(data: Dataset, rows: usize, least: usize) {
        let expected = all(&mut data.fresh(), rows, 200);
        assert!(expected.len() >= least, "{} batches", expected.len());
        let mut running = data.fresh();
        for k in 0..=expected.len().min(60) {
            let text = serde_json::to_string(&running.cursor().unwrap()).unwrap();
            let cursor: Cursor = serde_json::from_str(&text).unwrap();
            assert_eq!(cursor.batches, k as u64);
            let mut restored = data.fresh();
            // Whatever it read before does not matter.
            all(&mut restored, rows, k % 3);
            restored.restore(&cursor).unwrap();
            assert_eq!(restored.tally(), running.tally(), "after {k}");
            assert_eq!(all(&mut restored, rows, 5), expected[k..(k + 5).min(expected.len())], "after {k}");
            running.take_batch(rows).unwrap();
        }
    }

    #[test]
    fn any_batch_is_continued_exactly() {
        let (_folder, paths) = files();
        let bytes = Arc::new(Tokenizer::bytes_with_chat());
        let jsonl = || Dataset::jsonl([&paths[0]]).on_error(OnError::Skip).shuffle(5).epochs(3);
        let lines = || Dataset::text([&paths[1]]).delimiter(Delimiter::Line).shuffle(6);
        let mixed = || Dataset::mix(vec![(jsonl(), 1.0), (lines(), 2.0 / 3.0)], 7).unwrap();
        for seq_len in [1, 7, 33] {
            check(mixed().tokenizer(bytes.clone()).pack(Packing::Concat { seq_len }), 3, 10);
            check(mixed().tokenizer(bytes.clone()).pack(Packing::BestFit { seq_len, pool: 10 }), 3, 10);
        }
        let forever = Dataset::mix(vec![(jsonl().forever(), 1.0), (lines().forever(), 3.0)], 7).unwrap();
        check(forever.tokenizer(bytes.clone()).pack(Packing::BestFit { seq_len: 16, pool: 300 }), 2, 200);
        let chat = Dataset::jsonl([&paths[2]])
            .chat(Arc::new(ChatTemplate::default()), Rules::new(Form::Conversations))
            .shuffle(1)
            .tokenizer(bytes.clone());
        check(chat.fresh().pack(Packing::Concat { seq_len: 50 }), 2, 10);
        check(chat.pack(Packing::BestFit { seq_len: 200, pool: 5 }), 1, 10);
        let text = || Dataset::text([&paths[1]]).split(Part::Train, 0.1).tokenizer(bytes.clone());
        check(text().pack(Packing::Windows { seq_len: 9 }), 2, 15);
        check(text().shuffle(3).epochs(2).pack(Packing::Windows { seq_len: 9 }), 2, 30);
    }

    #[test]
    fn a_cursor_in_a_long_document_holds_a_place_and_no_text() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("book.txt");
        std::fs::write(&path, "a line of a book\n".repeat(5000)).unwrap();
        let mut data = Dataset::text([&path]).tokenizer(Arc::new(Tokenizer::bytes_with_chat())).pack(Packing::Concat { seq_len: 64 });
        data.take_batch(3).unwrap();
        let cursor = data.cursor().unwrap();
        assert_eq!(cursor.packer, PackerPosition::Concat { used: 192 });
        assert!(serde_json::to_string(&cursor).unwrap().len() < 1000, "{cursor:?}");
    }

    #[test]
    fn records_are_continued_exactly_too() {
        let (_folder, paths) = files();
        let data = Dataset::jsonl([&paths[2]]).shuffle(2).epochs(2);
        let expected = data.fresh().take_rows(100).unwrap();
        assert_eq!(expected.len(), 24);
        for k in 0..=24 {
            let mut first = data.fresh();
            assert_eq!(first.take_rows(k).unwrap(), expected[..k]);
            let mut rest = data.fresh();
            rest.restore(&first.cursor().unwrap()).unwrap();
            assert_eq!(rest.take_rows(100).unwrap(), expected[k..]);
        }
    }

    #[test]
    fn other_data_is_refused_with_what_differs() {
        let (folder, paths) = files();
        let bytes = Arc::new(Tokenizer::bytes_with_chat());
        let data = || Dataset::text([&paths[1]]).tokenizer(bytes.clone()).shuffle(1).pack(Packing::Concat { seq_len: 8 });
        let cursor = data().cursor().unwrap();
        let check = |mut other: Dataset, says: &str| {
            let error = other.restore(&cursor).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        };
        check(data().shuffle(2), "`sources[0].shuffle` should be 1, as when the cursor was stored, got 2");
        check(data().pack(Packing::Concat { seq_len: 9 }), "packing.Concat.seq_len");
        check(data().tokenizer(Arc::new(Tokenizer::bytes(&["<|endoftext|>"]).unwrap())), "`tokenizer`");
        check(data().delimiter(Delimiter::Line), "`sources[0].format.text`");
        check(data().split(Part::Train, 0.2), "`sources[0].split`");
        check(Dataset::mix(vec![(data(), 1.0), (data(), 1.0)], 0).unwrap(), "`sources` should be 1 entries");
        // The same name and size, one byte changed in the middle.
        let mut content = std::fs::read(&paths[1]).unwrap();
        let middle = content.len() / 2;
        content[middle] ^= 1;
        std::fs::write(&paths[1], &content).unwrap();
        check(data(), "`sources[0].files[0].hash`");
        content[middle] ^= 1;
        std::fs::create_dir(folder.path().join("moved")).unwrap();
        std::fs::write(folder.path().join("moved/b.txt"), &content).unwrap();
        let moved = Dataset::text([folder.path().join("moved/b.txt")]);
        moved.tokenizer(bytes.clone()).shuffle(1).pack(Packing::Concat { seq_len: 8 }).restore(&cursor).unwrap();
    }

    #[test]
    fn a_damaged_cursor_is_an_error() {
        let (_folder, paths) = files();
        let bytes = Arc::new(Tokenizer::bytes_with_chat());
        let lines = Dataset::text([&paths[1]]).delimiter(Delimiter::Line).tokenizer(bytes);
        let check = |packing, change: fn(&mut Cursor), says: &str| {
            let mut data = lines.fresh().pack(packing);
            data.take_batch(1).unwrap();
            let mut cursor = data.cursor().unwrap();
            change(&mut cursor);
            let error = data.restore(&cursor).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        };
        let concat = Packing::Concat { seq_len: 4 };
        check(concat, |cursor| cursor.version = 9, "version");
        check(concat, |cursor| cursor.stream.sources[0].record = 30, "below 30");
        check(concat, |cursor| cursor.stream.sources.clear(), "1 positions");
        check(concat, |cursor| cursor.packer = PackerPosition::None, "Concat");
        check(concat, |cursor| cursor.packer = PackerPosition::Concat { used: 99 }, "`packer.used` should be below 8");
        let best_fit = Packing::BestFit { seq_len: 20, pool: 10 };
        check(best_fit, |cursor| cursor.packer = PackerPosition::BestFit { pools: 0, rows: 99 }, "at most");
    }
}
