//! How two versions of a run's code differ, as unified diffs of their files. The only file that names similar.

use super::code;
use super::modules::Source;
use crate::error::Result;
use crate::store::records::{GenerationRecord, GenerationStatus};
use similar::{ChangeTag, TextDiff};
use std::path::Path;

/// A file that is not the same in two versions.
#[derive(Clone, Debug, PartialEq)]
pub struct FileChange {
    pub path: String,
    /// Lines that only the new one has, and only the old one.
    pub added: usize,
    pub removed: usize,
    /// The unified diff, with its two lines of header.
    pub diff: String,
}

/// Lines around a change that are shown too.
const CONTEXT: usize = 3;

/// The files that differ between `old` and `new`, in the order of the new ones, then those that are gone.
pub fn changes(old: &[Source], new: &[Source]) -> Vec<FileChange> {
    let find = |sources: &[Source], path: &str| sources.iter().find(|source| source.path == path).map(|source| source.text.clone());
    let gone = old.iter().filter(|source| find(new, &source.path).is_none());
    let paths: Vec<&str> = new.iter().chain(gone).map(|source| source.path.as_str()).collect();
    let changed = paths.into_iter().filter_map(|path| file_change(path, find(old, path), find(new, path)));
    changed.collect()
}

fn file_change(path: &str, old: Option<String>, new: Option<String>) -> Option<FileChange> {
    if old == new {
        return None;
    }
    let header = |text: &Option<String>| if text.is_some() { path.to_string() } else { "/dev/null".into() };
    let (from, to) = (header(&old), header(&new));
    let (old, new) = (old.unwrap_or_default(), new.unwrap_or_default());
    let diff = TextDiff::from_lines(&old, &new);
    let count = |wanted: ChangeTag| diff.iter_all_changes().filter(|change| change.tag() == wanted).count();
    let text = diff.unified_diff().context_radius(CONTEXT).header(&from, &to).to_string();
    Some(FileChange { path: path.into(), added: count(ChangeTag::Insert), removed: count(ChangeTag::Delete), diff: text })
}

/// What generation `record` of the run in `folder` changed of the accepted one before it; nothing for the first.
///
/// - `all`: the generations of the run
///
/// Errors: as [`code::load`].
pub fn generation_changes(folder: &Path, record: &GenerationRecord, all: &[GenerationRecord]) -> Result<Vec<FileChange>> {
    let before = all.iter().filter(|other| other.number < record.number && other.status == GenerationStatus::Accepted);
    match before.max_by_key(|other| other.number) {
        None => Ok(Vec::new()),
        Some(before) => Ok(changes(&code::load(folder, before.number)?, &code::load(folder, record.number)?)),
    }
}

/// The code that the run in `folder` executes: its latest accepted generation, and its number.
///
/// Errors: as [`code::load`].
pub fn latest(folder: &Path, all: &[GenerationRecord]) -> Result<(u32, Vec<Source>)> {
    let accepted = all.iter().filter(|record| record.status == GenerationStatus::Accepted).map(|record| record.number);
    let number = accepted.max().unwrap_or(0);
    Ok((number, code::load(folder, number)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(path: &str, text: &str) -> Source {
        Source { path: path.into(), text: text.into() }
    }

    #[test]
    fn changed_new_and_removed_files_are_shown_and_equal_ones_are_not() {
        let same = source("same.lua", "return 1\n");
        let lines = |middle: &str| (1..=9).map(|n| if n == 5 { format!("{middle}\n") } else { format!("line {n}\n") }).collect::<String>();
        let old = [source("a.lua", &lines("old")), same.clone(), source("gone.lua", "x\n")];
        let new = [source("a.lua", &lines("new")), source("more.lua", "y\nz\n"), same];
        let found = changes(&old, &new);
        let summary: Vec<_> = found.iter().map(|change| (change.path.as_str(), change.added, change.removed)).collect();
        assert_eq!(summary, [("a.lua", 1, 1), ("more.lua", 2, 0), ("gone.lua", 0, 1)]);
        // As GNU diff -u writes it, without times.
        let wanted = "--- a.lua\n+++ a.lua\n@@ -2,7 +2,7 @@\n line 2\n line 3\n line 4\n-old\n+new\n line 6\n line 7\n line 8\n";
        assert_eq!(found[0].diff, wanted);
        assert!(found[1].diff.starts_with("--- /dev/null\n+++ more.lua\n@@ -0,0 +1,2 @@\n"), "{}", found[1].diff);
        assert!(found[2].diff.contains("--- gone.lua\n+++ /dev/null\n"), "{}", found[2].diff);
        assert!(changes(&old, &old).is_empty());
    }

    #[test]
    fn a_generation_is_compared_with_the_accepted_one_before_it() {
        let folder = tempfile::tempdir().unwrap();
        let record =
            |number, status| GenerationRecord { number, loop_path: None, step: 0, time: 1.0, hash: String::new(), status, reason: None };
        for (number, text) in [(0, "one\n"), (1, "broken\n"), (2, "two\n")] {
            code::save(folder.path(), number, None, 1.0, &[source("a.lua", text)]).unwrap();
        }
        let all = [record(0, GenerationStatus::Accepted), record(1, GenerationStatus::Rejected), record(2, GenerationStatus::Accepted)];
        let diff = |n: usize| generation_changes(folder.path(), &all[n], &all).unwrap().pop().map(|change| change.diff);
        assert_eq!(diff(0), None);
        assert!(diff(1).unwrap().ends_with("-one\n+broken\n") && diff(2).unwrap().ends_with("-one\n+two\n"));
        assert_eq!(latest(folder.path(), &all).unwrap(), (2, vec![source("a.lua", "two\n")]));
        assert_eq!(latest(folder.path(), &all[..2]).unwrap().0, 0);
        std::fs::remove_file(folder.path().join("code/g2.json")).unwrap();
        assert!(generation_changes(folder.path(), &all[2], &all).is_err());
    }
}
