//! One source of a data set: files, the order of their documents, and the position in that order.
//! Not a mixture and not tokens: `dataset.rs`.

use std::path::PathBuf;
use std::sync::Arc;

use serde_json::Value;

use super::document_index::{Split, TEXT_FIELD};
use super::jsonl::{Record, kind};
use super::records::{MemoryRecords, Order, Origin, Records};
use crate::error::{Error, Result};

/// What to do about a document that is not what its format promises.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnError {
    /// Stop with an error that names file, line and column.
    #[default]
    Fail,
    /// Leave it out and count it.
    Skip,
}

/// What a script says about a source.
#[derive(Debug, Clone)]
pub(super) struct SourcePlan {
    pub paths: Vec<PathBuf>,
    pub origin: Origin,
    /// What [`Origin::Memory`] reads.
    pub memory: Option<Arc<MemoryRecords>>,
    pub field: String,
    pub split: Option<Split>,
    /// The seed of the order; `None` for the order of the files.
    pub shuffle: Option<u64>,
    /// How often all documents are read; `None` for ever.
    pub epochs: Option<u64>,
    pub on_error: OnError,
}

impl SourcePlan {
    pub fn new(paths: Vec<PathBuf>, origin: Origin) -> Self {
        let field = TEXT_FIELD.to_string();
        Self { paths, origin, memory: None, field, split: None, shuffle: None, epochs: Some(1), on_error: OnError::Fail }
    }
}

/// Where a source stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct SourcePosition {
    pub epoch: u64,
    /// The next position in the epoch's order.
    pub record: u64,
    /// What became of records so far.
    #[serde(flatten)]
    pub tally: Tally,
}

/// Records that were not used whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Tally {
    /// Left out because they were bad.
    pub skipped: u64,
    /// Left out because they were too long.
    #[serde(default)]
    pub long: u64,
    /// Documents that were cut.
    #[serde(default)]
    pub cut: u64,
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.skipped += other.skipped;
        self.long += other.long;
        self.cut += other.cut;
    }
}

/// A source being read.
#[derive(Debug)]
pub(super) struct Source {
    pub plan: SourcePlan,
    records: Records,
    position: SourcePosition,
    order: Option<Order>,
    /// Documents in a row that were bad when read, and records in a row of which nothing was used.
    bad_in_a_row: u64,
    unused_in_a_row: u64,
}

impl Source {
    /// Indexes the files.
    ///
    /// Errors: those of [`Records::open`]; [`Error::Argument`] for no documents at all.
    pub fn open(plan: SourcePlan) -> Result<Self> {
        let records = Records::open(&plan.paths, plan.origin, plan.memory.as_ref(), plan.split, plan.shuffle.is_some())?;
        if records.count() == 0 {
            let mut paths: Vec<_> = plan.paths.iter().map(|path| path.display().to_string()).collect();
            if plan.origin == Origin::Memory {
                paths.push("a list of records".into());
            }
            let part = plan.split.map_or_else(String::new, |split| format!(" in the {} part of the split", split.part.name()));
            let got = format!("none{part} in {}", paths.join(", "));
            return Err(Error::argument("data", "paths", "files with at least one document", got));
        }
        let mut source = Self { plan, records, position: SourcePosition::default(), order: None, bad_in_a_row: 0, unused_in_a_row: 0 };
        source.seek(SourcePosition::default());
        Ok(source)
    }

    /// Documents of an epoch, bad ones included.
    pub fn count(&self) -> u64 {
        self.records.count()
    }

    pub fn records(&self) -> &Records {
        &self.records
    }

    pub fn position(&self) -> SourcePosition {
        self.position
    }

    /// Goes on from `position`, which must lie within the source.
    pub fn seek(&mut self, position: SourcePosition) {
        assert!(position.record <= self.count(), "record {} of {}", position.record, self.count());
        self.position = position;
        self.order = self.plan.shuffle.map(|seed| self.records.order(seed, position.epoch));
        (self.bad_in_a_row, self.unused_in_a_row) = (0, 0);
        self.wrap();
    }

    /// Whether another document will be tried.
    pub fn is_alive(&self) -> bool {
        self.plan.epochs.is_none_or(|epochs| self.position.epoch < epochs)
    }

    /// As many documents in a row mean that no good one will come: in a random order all but one may come at the end of one
    /// epoch, and again at the beginning of the next.
    fn hopeless(&self) -> u64 {
        if self.plan.shuffle.is_some() { 2 * self.count() } else { self.count() }
    }

    /// Counts a record of which something was used, or nothing.
    ///
    /// Errors: [`Error::Argument`] if nothing was used of any record of an epoch and there will be another.
    pub fn gave(&mut self, any: bool) -> Result<()> {
        self.unused_in_a_row = if any { 0 } else { self.unused_in_a_row + 1 };
        if self.unused_in_a_row < self.hopeless() || !self.is_alive() {
            return Ok(());
        }
        let got = format!("{} in a row that are too long or bad", self.unused_in_a_row);
        Err(Error::argument("data.take", "records", "some that are not left out", got))
    }

    fn wrap(&mut self) {
        if self.position.record == self.count() {
            self.position.epoch += 1;
            self.position.record = 0;
            self.order = self.plan.shuffle.map(|seed| self.records.order(seed, self.position.epoch));
        }
    }

    /// Counts what became of documents after they were read.
    pub fn count_in(&mut self, tally: Tally) {
        self.position.tally += tally;
    }

    /// `error` about the content of document `number`, with its file and line.
    ///
    /// Errors: [`Error::Io`].
    pub fn located(&self, number: u64, error: Error) -> Result<Error> {
        let (path, place) = self.records.place(number)?;
        Ok(match error {
            Error::Argument { arg, expected, got, .. } => Error::Format { path, place: format!("{place}, {arg}"), expected, found: got },
            other => Error::Format { path, place, expected: "a document that can be tokenised".into(), found: other.to_string() },
        })
    }

    /// The next document and its number; `None` at the end of the last epoch.
    ///
    /// Errors: [`Error::Io`]; [`Error::Format`] for a bad document, if those are not skipped, or if all are bad.
    pub fn next(&mut self) -> Result<Option<(u64, Record)>> {
        while self.is_alive() {
            let number = self.order.as_ref().map_or(self.position.record, |order| order.at(self.position.record));
            let found = match self.records.read(number)? {
                Ok(record) => self.checked(number, record)?,
                Err(error) => Err(error),
            };
            let record = match found {
                Ok(record) => record,
                Err(error) => {
                    self.bad_in_a_row += 1;
                    if self.plan.on_error == OnError::Fail || self.bad_in_a_row >= self.hopeless() {
                        return Err(error);
                    }
                    self.position.tally.skipped += 1;
                    self.position.record += 1;
                    self.wrap();
                    continue;
                }
            };
            self.bad_in_a_row = 0;
            self.position.record += 1;
            self.wrap();
            return Ok(Some((number, record)));
        }
        Ok(None)
    }

    /// The record, if the field that is to be read is there and fits.
    fn checked(&self, number: u64, record: Record) -> Result<Result<Record>> {
        let field = self.plan.field.as_str();
        let found = match record.get(field) {
            _ if field.is_empty() => return Ok(Ok(record)),
            Some(Value::String(_)) => return Ok(Ok(record)),
            Some(other) => format!("{} in the field {field:?}", kind(other)),
            None => {
                let fields: Vec<_> = record.keys().map(String::as_str).collect();
                format!("no field {field:?}, only {}", fields.join(", "))
            }
        };
        self.records.bad(number, "a string", found).map(Err)
    }
}

#[cfg(test)]
mod tests {
    use super::super::document_index::Format;
    use super::*;

    fn source(lines: &str, change: impl FnOnce(&mut SourcePlan)) -> (tempfile::TempDir, Result<Source>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        std::fs::write(&path, lines).unwrap();
        let mut plan = SourcePlan::new(vec![path], Origin::Files(Format::Jsonl));
        change(&mut plan);
        (folder, Source::open(plan))
    }

    fn read(source: &mut Source, count: usize) -> Vec<String> {
        (0..count).map_while(|_| source.next().unwrap()).map(|(_, record)| record["text"].as_str().unwrap().to_string()).collect()
    }

    #[test]
    fn epochs_follow_each_other_in_different_orders_and_every_position_can_be_sought() {
        let lines: String = (0..20).map(|line| format!("{{\"text\": \"{line}\"}}\n")).collect();
        let open = |epochs| source(&lines, |plan| (plan.shuffle, plan.epochs) = (Some(3), epochs));
        let (_folder, first) = open(Some(2));
        let mut first = first.unwrap();
        let mut positions = vec![first.position()];
        let mut order = Vec::new();
        while let Some(text) = read(&mut first, 1).pop() {
            order.push(text);
            positions.push(first.position());
        }
        assert_eq!(order.len(), 40);
        assert!(order[..20] != order[20..]);
        let sorted = |part: &[String]| std::collections::BTreeSet::from_iter(part.to_vec());
        assert_eq!(sorted(&order[..20]), sorted(&order[20..]));
        for (at, position) in positions.iter().enumerate() {
            first.seek(*position);
            assert_eq!(read(&mut first, 100), order[at..], "{at}");
        }
        let (_folder, endless) = open(None);
        assert_eq!(read(&mut endless.unwrap(), 100)[..40], order);
    }

    #[test]
    fn bad_documents_stop_or_are_counted() {
        let lines = "{\"text\": \"a\"}\n{\"other\": 1}\n{\"text\": 2}\n{bad\n{\"text\": \"b\"}\n";
        let (_folder, failing) = source(lines, |_| {});
        let mut failing = failing.unwrap();
        assert_eq!(read(&mut failing, 1), ["a"]);
        let error = failing.next().unwrap_err().to_string();
        assert!(error.contains("a.jsonl: line 2: expected a string, found no field \"text\", only other"), "{error}");
        let (_folder, skipping) = source(lines, |plan| plan.on_error = OnError::Skip);
        let mut skipping = skipping.unwrap();
        assert_eq!(read(&mut skipping, 9), ["a", "b"]);
        assert_eq!(skipping.position().tally.skipped, 3);
    }

    #[test]
    fn only_bad_documents_end_an_endless_source_with_an_error() {
        let (_folder, hopeless) = source("{}\n[]\n", |plan| (plan.on_error, plan.epochs) = (OnError::Skip, None));
        assert!(hopeless.unwrap().next().is_err());
        for lines in ["", "\n \n"] {
            assert!(source(lines, |_| {}).1.unwrap_err().to_string().contains("at least one document"));
        }
    }
}
