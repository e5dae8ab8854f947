//! Records by number, wherever they lie: in indexed files, in Parquet files, or in memory; and the orders in which they can
//! be read. Not the position in an order: `source.rs`.

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::content_hash::ContentHash;
use super::cursor::FileFingerprint;
use super::document_index::{DocumentIndex, DocumentReader, Format, Part, Split};
use super::jsonl::{BadLine, Record};
use super::parquet::ParquetFiles;
use super::shuffle::Permutation;
use crate::error::{Error, Result};
use crate::kernels::random::Stream;

/// Where records come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    Parquet,
    Memory,
    #[serde(untagged)]
    Files(Format),
}

/// Records that a script made. They are named by the hash of their content.
#[derive(Debug)]
pub struct MemoryRecords {
    records: Vec<Record>,
    bytes: u64,
    hash: String,
}

impl MemoryRecords {
    pub fn new(records: Vec<Record>) -> Self {
        let (mut hash, mut bytes) = (ContentHash::default(), 0);
        for record in &records {
            let line = serde_json::to_string(record).expect("JSON values become JSON") + "\n";
            hash.update(line.as_bytes());
            bytes += line.len() as u64;
        }
        Self { records, bytes, hash: hash.hex() }
    }

    pub fn hash(&self) -> &str {
        &self.hash
    }
}

/// What is read, opened.
#[derive(Debug)]
pub(super) enum Records {
    Files(DocumentReader),
    Parquet(ParquetFiles),
    Memory { records: Arc<MemoryRecords>, kept: Kept },
}

/// The numbers of a part of `0..count`, or all.
#[derive(Debug, Clone)]
pub(super) struct Kept {
    all: u64,
    part: Option<Vec<u64>>,
}

impl Kept {
    /// The same draw for each number as for documents in files.
    ///
    /// Errors: [`Error::Argument`] for a fraction outside 0 to 1.
    pub fn new(all: u64, split: Option<Split>) -> Result<Self> {
        let Some(Split { part, fraction }) = split else { return Ok(Self { all, part: None }) };
        if !(0.0..=1.0).contains(&fraction) {
            return Err(Error::argument("data.split", "fraction", "a number from 0 to 1", fraction));
        }
        let draw = Stream::new(0, "split");
        let kept = (0..all).filter(|number| (draw.f64(*number) < fraction) == (part == Part::Validation));
        Ok(Self { all, part: Some(kept.collect()) })
    }

    pub fn count(&self) -> u64 {
        self.part.as_ref().map_or(self.all, |part| part.len() as u64)
    }

    /// The number among all of the kept one at `index`.
    pub fn number(&self, index: u64) -> u64 {
        self.part.as_ref().map_or(index, |part| part[index as usize])
    }

    /// How many are kept of the first `number`.
    pub fn before(&self, number: u64) -> u64 {
        self.part.as_ref().map_or(number, |part| part.partition_point(|kept| *kept < number) as u64)
    }
}

impl Records {
    /// - `shuffled`: whether records will be asked for in any order
    ///
    /// Errors: those of [`DocumentIndex::scan`] and [`ParquetFiles::open`].
    pub fn open(
        paths: &[PathBuf],
        origin: Origin,
        memory: Option<&Arc<MemoryRecords>>,
        split: Option<Split>,
        shuffled: bool,
    ) -> Result<Self> {
        match origin {
            Origin::Files(format) => Ok(Self::Files(DocumentReader::new(Arc::new(DocumentIndex::scan(paths, format, split)?)))),
            Origin::Parquet => Ok(Self::Parquet(ParquetFiles::open(paths, split, shuffled)?)),
            Origin::Memory => {
                let records = memory.expect("records in memory come with their plan").clone();
                Ok(Self::Memory { kept: Kept::new(records.records.len() as u64, split)?, records })
            }
        }
    }

    pub fn count(&self) -> u64 {
        match self {
            Self::Files(reader) => reader.index().count(),
            Self::Parquet(files) => files.count(),
            Self::Memory { kept, .. } => kept.count(),
        }
    }

    /// Record `number`, which must be below the count. The inner error is a record that is not what its format promises.
    ///
    /// Errors: [`Error::Io`]; [`Error::Format`] for a Parquet file that cannot be decoded.
    pub fn read(&mut self, number: u64) -> Result<Result<Record>> {
        match self {
            Self::Files(reader) => reader.read(number),
            Self::Parquet(files) => files.read(number),
            Self::Memory { records, kept } => Ok(Ok(records.records[kept.number(number) as usize].clone())),
        }
    }

    /// The file of record `number`, and its place there, as messages name them.
    ///
    /// Errors: [`Error::Io`].
    pub fn place(&self, number: u64) -> Result<(String, String)> {
        match self {
            Self::Files(reader) => reader.place(number, 0),
            Self::Parquet(files) => Ok(files.place(number)),
            Self::Memory { kept, .. } => Ok(("records".into(), format!("record {}", kept.number(number) + 1))),
        }
    }

    /// An error about record `number` as a whole.
    ///
    /// Errors: [`Error::Io`].
    pub fn bad(&self, number: u64, expected: &'static str, found: String) -> Result<Error> {
        match self {
            Self::Files(reader) => reader.bad(number, BadLine { offset: 0, column: 0, expected, found }),
            _ => {
                let (path, place) = self.place(number)?;
                Ok(Error::Format { path, place, expected: expected.into(), found })
            }
        }
    }

    /// What a cursor remembers of the files.
    pub fn fingerprints(&self) -> Vec<FileFingerprint> {
        let file = |path: &PathBuf, bytes, hash: &str| FileFingerprint {
            name: path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
            bytes,
            hash: hash.into(),
        };
        match self {
            Self::Files(reader) => reader.index().files().iter().map(|f| file(&f.path, f.bytes, &f.hash)).collect(),
            Self::Parquet(files) => files.files().map(|(path, bytes, hash)| file(path, bytes, hash)).collect(),
            Self::Memory { records, .. } => vec![file(&"records".into(), records.bytes, &records.hash)],
        }
    }

    /// The order of one epoch, drawn from `seed`.
    pub fn order(&self, seed: u64, epoch: u64) -> Order {
        match self {
            Self::Parquet(files) if files.groups().is_some() => {
                let ends = files.groups().expect("just asked");
                Order::ByGroup { order: Permutation::new(ends.len() as u64, seed, epoch), ends, seed, epoch, walked: Vec::new() }.walked()
            }
            _ => Order::Any(Permutation::new(self.count(), seed, epoch)),
        }
    }
}

/// A shuffled order of records.
#[derive(Debug, Clone)]
pub(super) enum Order {
    Any(Permutation),
    /// Group after group, in random order, each in a random order of its own: for files of which only a group at a time fits
    /// memory.
    ByGroup {
        order: Permutation,
        /// `[groups]`: the number behind the last record of each group.
        ends: Vec<u64>,
        seed: u64,
        epoch: u64,
        /// `[groups]`: the position behind the last record of each group, in this order.
        walked: Vec<u64>,
    },
}

impl Order {
    fn walked(mut self) -> Self {
        if let Self::ByGroup { order, ends, walked, .. } = &mut self {
            let mut position = 0;
            for turn in 0..ends.len() as u64 {
                let group = order.at(turn) as usize;
                position += ends[group] - if group == 0 { 0 } else { ends[group - 1] };
                walked.push(position);
            }
        }
        self
    }

    /// The number of the record at `position`.
    pub fn at(&self, position: u64) -> u64 {
        match self {
            Self::Any(permutation) => permutation.at(position),
            Self::ByGroup { order, ends, seed, epoch, walked } => {
                let turn = walked.partition_point(|end| *end <= position);
                let group = order.at(turn as u64) as usize;
                let start = if group == 0 { 0 } else { ends[group - 1] };
                let inside = position - if turn == 0 { 0 } else { walked[turn - 1] };
                // Another seed for each group: groups of one length must not share an order.
                let seed = seed.wrapping_add((group as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
                start + Permutation::new(ends[group] - start, seed, *epoch).at(inside)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_order_by_groups_visits_each_record_once_and_one_group_at_a_time() {
        // Groups of 3, 0, 5, 1 and 4 records.
        let ends = vec![3, 3, 8, 9, 13];
        let order = |seed, epoch| {
            Order::ByGroup { order: Permutation::new(5, seed, epoch), ends: ends.clone(), seed, epoch, walked: Vec::new() }.walked()
        };
        let visit = |order: Order| (0..13).map(|position| order.at(position)).collect::<Vec<_>>();
        let group = |number: &u64| ends.partition_point(|end| end <= number);
        for seed in 0..20 {
            let visited = visit(order(seed, 1));
            let mut sorted = visited.clone();
            sorted.sort_unstable();
            assert!(sorted.into_iter().eq(0..13));
            let mut groups: Vec<usize> = visited.iter().map(group).collect();
            groups.dedup();
            assert_eq!(groups.len(), 4, "each group is read in one go: {visited:?}");
        }
        assert!(visit(order(1, 0)) != visit(order(1, 1)) && visit(order(1, 0)) != visit(order(2, 0)));
    }

    #[test]
    fn records_in_memory_are_named_by_their_content() {
        let record = |n: i32| json!({ "n": n }).as_object().unwrap().clone();
        let memory = |numbers: &[i32]| MemoryRecords::new(numbers.iter().map(|n| record(*n)).collect());
        assert_eq!(memory(&[1, 2]).hash(), memory(&[1, 2]).hash());
        assert!(memory(&[1, 2]).hash() != memory(&[2, 1]).hash() && memory(&[12]).hash() != memory(&[1, 2]).hash());
        let all = Arc::new(memory(&(0..100).collect::<Vec<_>>()));
        let part = |part| Records::open(&[], Origin::Memory, Some(&all), Some(Split { part, fraction: 0.2 }), false).unwrap();
        let read = |mut records: Records| {
            (0..records.count()).map(|n| records.read(n).unwrap().unwrap()["n"].as_u64().unwrap()).collect::<Vec<_>>()
        };
        let mut both = [read(part(Part::Train)), read(part(Part::Validation))].concat();
        both.sort_unstable();
        assert!(both.into_iter().eq(0..100));
        assert!(part(Part::Train).bad(0, "x", "y".into()).unwrap().to_string().starts_with("records: record "));
    }
}
