//! A database as a text file that needs no database to be read: JSON lines with checksums, as metrics are, one a value, and
//! a last line that counts them. A backup, and the way to another database. Knows no records.

use super::database::{Database, Durability};
use super::filesystem::{parent, sync_folder};
use super::metrics::{Lines, read, sealed};
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

/// Values that are written at a time.
const BATCH: usize = 256;

impl Database {
    /// Writes every key and value to the new file `path`, durably. How many. Errors: [`Error::Format`] for a damaged value;
    /// [`Error::Io`], also if the file exists.
    pub fn export(&self, path: &Path) -> Result<usize> {
        let pairs = self.scan("")?;
        let count = pairs.len();
        let mut bytes = Vec::new();
        for (key, payload) in pairs {
            // Records are JSON text, which stays readable; anything else is hex digits.
            let (kind, value) = match String::from_utf8(payload) {
                Ok(text) => ("text", text),
                Err(error) => ("hex", error.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect()),
            };
            bytes.extend(sealed(&object([("key", json!(key)), (kind, json!(value))]))?);
        }
        bytes.extend(sealed(&object([("end", json!(count))]))?);
        let write = || {
            let mut file = BufWriter::new(File::create_new(path)?);
            file.write_all(&bytes)?;
            file.into_inner()?.sync_all()?;
            sync_folder(parent(path))
        };
        write().map_err(|error| Error::io(path, "write", error))?;
        Ok(count)
    }

    /// Puts everything from the export `path` into this database, over what has the same keys, durably. How many. The whole
    /// file is checked first.
    ///
    /// Errors: [`Error::Format`] for a damaged or incomplete file, and nothing is written; [`Error::Io`].
    pub fn import(&self, path: &Path) -> Result<usize> {
        let pairs = parse(path, read(path)?)?;
        pairs.chunks(BATCH).try_for_each(|batch| self.put(batch.to_vec(), Durability::Later))?;
        self.durable_flush()?;
        Ok(pairs.len())
    }
}

fn object<const N: usize>(pairs: [(&str, Value); N]) -> Map<String, Value> {
    pairs.into_iter().map(|(key, value)| (key.to_string(), value)).collect()
}

fn parse(path: &Path, lines: Lines) -> Result<Vec<(String, Vec<u8>)>> {
    let mut pairs = Vec::new();
    let mut complete = false;
    for (number, line) in lines {
        let line = line?;
        let fault = |found: &str| Err(Error::format(path, format!("line {number}"), "a key with its text or hex, and `end` last", found));
        if complete {
            return fault("a line after the end");
        }
        let text = |key| line.get(key).and_then(Value::as_str);
        match (text("key"), text("text"), text("hex"), line.get("end").and_then(Value::as_u64)) {
            (Some(key), Some(text), None, None) => pairs.push((key.to_string(), text.as_bytes().to_vec())),
            (Some(key), None, Some(hex), None) => match unhex(hex) {
                Some(bytes) => pairs.push((key.to_string(), bytes)),
                None => return fault("hex digits that are none"),
            },
            (None, None, None, Some(count)) if count == pairs.len() as u64 => complete = true,
            (None, None, None, Some(count)) => return fault(&format!("an end after {} values that counts {count}", pairs.len())),
            _ => return fault("something else"),
        }
    }
    if !complete {
        return Err(Error::format(
            path,
            "end of file",
            "a line with `end`",
            format!("none after {} values; the file was cut", pairs.len()),
        ));
    }
    Ok(pairs)
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.bytes().map(|digit| char::from(digit).to_digit(16)).collect::<Option<Vec<_>>>()?;
    let pairs = digits.chunks_exact(2);
    pairs.remainder().is_empty().then(|| pairs.map(|pair| (pair[0] << 4 | pair[1]) as u8).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn an_export_becomes_the_same_database_again_and_damage_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let open = |name| Database::open(&root.path().join(name)).unwrap().database;
        let (first, second) = (open("first"), open("second"));
        let pairs = (0..600u32).map(|i| (format!("key/{i:03}"), if i % 3 == 0 { vec![i as u8; 5] } else { format!("é{i}\n").into() }));
        let pairs: Vec<_> = pairs.collect();
        first.put(pairs.clone(), Durability::Flushed).unwrap();
        let path = root.path().join("backup.jsonl");
        assert_eq!(first.export(&path).unwrap(), 600);
        assert!(first.export(&path).unwrap_err().to_string().contains("backup.jsonl: cannot write"));
        assert_eq!(second.import(&path).unwrap(), 600);
        assert_eq!(second.scan("").unwrap(), pairs);

        let third = open("third");
        let text = fs::read_to_string(&path).unwrap();
        let cut = text.lines().take(300).map(|line| format!("{line}\n")).collect::<String>();
        let missing = text.lines().enumerate().filter(|(i, _)| *i != 7).map(|(_, line)| format!("{line}\n")).collect::<String>();
        for (spoiled, wanted) in [
            (cut, "none after 300 values; the file was cut"),
            (missing, "line 600: expected a key with its text or hex, and `end` last, found an end after 599 values that counts 600"),
            (text.replacen("key/200", "key/201", 1), "line 201: expected checksum"),
            (format!("{text}{text}"), "line 602: expected a key with its text or hex, and `end` last, found a line after the end"),
        ] {
            fs::write(&path, spoiled).unwrap();
            let message = third.import(&path).unwrap_err().to_string();
            assert!(message.contains(wanted), "{message}");
        }
        assert_eq!(third.verify().unwrap(), 0);
    }
}
