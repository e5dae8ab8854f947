//! A log of JSON lines, each with its own checksum, only ever appended to; a resume cuts it back to where its checkpoint was.
//! Appending is one write without a sync: what a power loss takes is written again by the resume. Knows no names of metrics.
//!
//! A line is an object whose last key is `crc`: the CRC-32C, as eight hex digits, of the bytes before `,"crc"`.

use super::filesystem::{parent, sync_folder};
use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// `,"crc":"01234567"}` and the line's end.
const SEAL_BYTES: usize = 19;

/// A log that is being written.
#[derive(Debug)]
pub struct LineLog {
    path: PathBuf,
    file: File,
    /// Bytes of whole lines, which is where the next one goes.
    offset: u64,
}

impl LineLog {
    /// A new, empty log at `path`. Errors: [`Error::Io`], also if there is a file already.
    pub fn create(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().read(true).append(true).create_new(true).open(path).map_err(|e| Error::io(path, "create", e))?;
        let synced = file.sync_all().and_then(|()| sync_folder(parent(path)));
        synced.map_err(|e| Error::io(path, "sync", e))?;
        Ok(Self { path: path.to_owned(), file, offset: 0 })
    }

    /// The log at `path`, cut to its first `offset` bytes. What follows them is moved to the new file `aside`, which is durable
    /// before the log is cut; if nothing follows, no such file is made.
    ///
    /// Errors: [`Error::Format`] if `offset` is beyond the end or in the middle of a line; [`Error::Io`], also if `aside` exists.
    pub fn open_at(path: &Path, offset: u64, aside: &Path) -> Result<Self> {
        let io = |action| move |error| Error::io(path, action, error);
        let mut file = OpenOptions::new().read(true).append(true).open(path).map_err(io("open"))?;
        let bytes = file.metadata().map_err(io("measure"))?.len();
        if offset > bytes {
            let found = format!("{bytes} bytes; it was cut, or belongs to another run");
            return Err(Error::format(path, "end of file", format!("at least the {offset} bytes that the checkpoint counts"), found));
        }
        let mut last = [b'\n'];
        if offset > 0 {
            file.read_exact_at(&mut last, offset - 1).map_err(io("read"))?;
        }
        if last != [b'\n'] {
            return Err(Error::format(path, format!("offset {offset}"), "the start of a line", "the middle of one"));
        }
        if offset < bytes {
            file.seek(SeekFrom::Start(offset)).map_err(io("read"))?;
            let mut keep = || {
                let mut tail = OpenOptions::new().write(true).create_new(true).open(aside)?;
                io::copy(&mut file, &mut tail)?;
                tail.sync_all()?;
                sync_folder(parent(aside))
            };
            keep().map_err(|error| Error::io(aside, "write what was cut off to", error))?;
            file.set_len(offset).and_then(|()| file.sync_all()).map_err(io("cut"))?;
        }
        Ok(Self { path: path.to_owned(), file, offset })
    }

    /// The log at `path` as another process left it. Half a line at its end, of a process that was killed while it wrote, is cut
    /// off.
    ///
    /// Errors: [`Error::Io`].
    pub fn reopen(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().read(true).append(true).open(path).map_err(|error| Error::io(path, "open", error))?;
        let bytes = file.metadata().map_err(|error| Error::io(path, "measure", error))?.len();
        let offset = end_of_last_line(&file, bytes).map_err(|error| Error::io(path, "read", error))?;
        if offset < bytes {
            file.set_len(offset).and_then(|()| file.sync_all()).map_err(|error| Error::io(path, "cut", error))?;
        }
        Ok(Self { path: path.to_owned(), file, offset })
    }

    /// Appends `line` and its checksum in one write. It survives the end of this process at once, a power loss after
    /// [`LineLog::sync`].
    ///
    /// Errors: [`Error::Argument`] for an empty object or one with a key `crc`; [`Error::Io`], and no part of the line is left.
    pub fn append(&mut self, line: &Map<String, Value>) -> Result<()> {
        let bytes = sealed(line)?;
        if let Err(error) = self.file.write_all(&bytes) {
            // Half a line in the middle of the log would spoil the next one too. If even this fails, readers name the line.
            let _ = self.file.set_len(self.offset);
            return Err(Error::io(&self.path, "write to", error));
        }
        self.offset += bytes.len() as u64;
        Ok(())
    }

    /// Makes every line survive a power loss. Errors: [`Error::Io`].
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(|error| Error::io(&self.path, "sync", error))
    }

    /// Where the next line goes: what a checkpoint keeps for [`LineLog::open_at`].
    pub fn offset(&self) -> u64 {
        self.offset
    }
}

/// Where the last whole line of a file of `bytes` ends, read from its end.
fn end_of_last_line(file: &File, bytes: u64) -> io::Result<u64> {
    let mut block = [0; 4096];
    let mut end = bytes;
    while end > 0 {
        let start = end.saturating_sub(block.len() as u64);
        let part = &mut block[..(end - start) as usize];
        file.read_exact_at(part, start)?;
        if let Some(last) = part.iter().rposition(|byte| *byte == b'\n') {
            return Ok(start + last as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}

/// The lines of the log at `path` with their numbers, from 1. One that is damaged is an [`Error::Format`] that says which, and
/// reading goes on after it; a last one without its end was never whole and is left out.
///
/// Errors: [`Error::Io`].
pub fn read(path: &Path) -> Result<Lines> {
    let file = File::open(path).map_err(|error| Error::io(path, "open", error))?;
    Ok(Lines { path: path.to_owned(), file: BufReader::new(file), number: 0 })
}

/// The last whole lines of the log at `path`, oldest first: those within its last `bytes` bytes. Damaged ones are left out, so
/// that a look at the end of many logs is cheap and never fails for one bad line.
///
/// Errors: [`Error::Io`].
pub fn tail(path: &Path, bytes: u64) -> Result<Vec<Map<String, Value>>> {
    let read = || -> io::Result<(bool, Vec<u8>)> {
        let mut file = File::open(path)?;
        let start = file.metadata()?.len().saturating_sub(bytes);
        file.seek(SeekFrom::Start(start))?;
        let mut text = Vec::new();
        // A log that grows meanwhile gives no more than was asked for.
        file.take(bytes).read_to_end(&mut text)?;
        Ok((start > 0, text))
    };
    let (cut, text) = read().map_err(|error| Error::io(path, "read the end of", error))?;
    let lines = text.split_inclusive(|byte| *byte == b'\n').skip(usize::from(cut));
    Ok(lines.filter_map(|line| unsealed(line).ok()).collect())
}

/// The iterator of [`read`].
pub struct Lines {
    path: PathBuf,
    file: BufReader<File>,
    number: usize,
}

impl Iterator for Lines {
    type Item = (usize, Result<Map<String, Value>>);

    fn next(&mut self) -> Option<Self::Item> {
        let mut line = Vec::new();
        self.number += 1;
        match self.file.read_until(b'\n', &mut line) {
            Err(error) => return Some((self.number, Err(Error::io(&self.path, "read", error)))),
            Ok(_) if line.last() != Some(&b'\n') => return None,
            Ok(_) => {}
        }
        let place = || format!("line {}", self.number);
        Some((self.number, unsealed(&line).map_err(|(expected, found)| Error::format(&self.path, place(), expected, found))))
    }
}

/// `line` as it lies in a log, its end included. Errors: [`Error::Argument`] for an empty object or one with a key `crc`.
pub(super) fn sealed(line: &Map<String, Value>) -> Result<Vec<u8>> {
    if line.is_empty() || line.contains_key("crc") {
        let got = if line.is_empty() { "an empty one" } else { "the key crc, which is the checksum's" };
        return Err(Error::argument("log", "line", "an object with keys of its own", got));
    }
    let mut bytes = serde_json::to_vec(line).expect("a map of JSON values has no way to fail");
    bytes.pop();
    let crc = crc32c::crc32c(&bytes);
    writeln!(bytes, ",\"crc\":\"{crc:08x}\"}}").expect("a vector takes every write");
    Ok(bytes)
}

/// The object in a line of a log, without its checksum; else what was expected and what was found.
pub(super) fn unsealed(line: &[u8]) -> Result<Map<String, Value>, (String, String)> {
    let split = line.len().checked_sub(SEAL_BYTES).map(|at| line.split_at(at));
    let promised = split.and_then(|(_, seal)| {
        let digits = seal.strip_prefix(b",\"crc\":\"")?.strip_suffix(b"\"}\n")?;
        let plain = digits.iter().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
        u32::from_str_radix(std::str::from_utf8(digits).ok().filter(|_| plain)?, 16).ok()
    });
    let (Some((body, _)), Some(promised)) = (split, promised) else {
        return Err(("a JSON object that ends in its checksum".into(), format!("{} bytes that do not", line.len())));
    };
    let actual = crc32c::crc32c(body);
    if actual != promised {
        return Err((format!("checksum {promised:08x}"), format!("{actual:08x}; the line is damaged")));
    }
    let mut json = body.to_vec();
    json.push(b'}');
    serde_json::from_slice(&json).map_err(|error| ("a JSON object".into(), error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::fs;

    fn line(step: u64) -> Map<String, Value> {
        let Value::Object(map) = json!({ "step": step, "loss": 10.0 / step as f64, "note": "a \"b\"\né" }) else { panic!() };
        map
    }

    /// A log of five lines, and where each begins.
    fn five(folder: &Path) -> (PathBuf, Vec<u64>) {
        let path = folder.join("metrics.jsonl");
        let mut log = LineLog::create(&path).unwrap();
        let mut offsets = Vec::new();
        for step in 1..=5 {
            offsets.push(log.offset());
            log.append(&line(step)).unwrap();
        }
        log.sync().unwrap();
        offsets.push(log.offset());
        (path, offsets)
    }

    fn steps(path: &Path) -> Vec<Result<u64, String>> {
        let value = |line: Result<Map<String, Value>>| line.map(|line| line["step"].as_u64().unwrap()).map_err(|e| e.to_string());
        read(path).unwrap().map(|(_, line)| value(line)).collect()
    }

    #[test]
    fn lines_come_back_and_are_plain_json() {
        let folder = tempfile::tempdir().unwrap();
        let (path, offsets) = five(folder.path());
        let lines: Vec<_> = read(&path).unwrap().map(|(number, line)| (number, line.unwrap())).collect();
        assert_eq!(lines, (1..=5).map(|step| (step as usize, line(step))).collect::<Vec<_>>());
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text.len() as u64, offsets[5]);
        let first: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        assert_eq!(first["crc"].as_str().unwrap().len(), 8);
        // CRC-32C of `{"a":1`, from a bitwise implementation of the polynomial 0x82f63b78.
        let bitwise = |bytes: &[u8]| {
            let step = |crc: u32| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
            !bytes.iter().fold(!0u32, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc)))
        };
        let mut map = Map::new();
        map.insert("a".into(), json!(1));
        assert_eq!(sealed(&map).unwrap(), format!("{{\"a\":1,\"crc\":\"{:08x}\"}}\n", bitwise(b"{\"a\":1")).into_bytes());
    }

    #[test]
    fn lines_without_keys_or_with_the_checksums_key_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let mut log = LineLog::create(&folder.path().join("log")).unwrap();
        assert!(log.append(&Map::new()).unwrap_err().to_string().contains("an empty one"));
        let mut map = line(1);
        map.insert("crc".into(), json!("x"));
        assert!(log.append(&map).unwrap_err().to_string().contains("the key crc"));
        assert_eq!(log.offset(), 0);
        assert!(LineLog::create(&folder.path().join("log")).unwrap_err().to_string().contains("cannot create"));
    }

    #[test]
    fn every_damaged_byte_is_found_by_its_line() {
        let folder = tempfile::tempdir().unwrap();
        let (path, offsets) = five(folder.path());
        let whole = fs::read(&path).unwrap();
        for at in offsets[1] as usize..offsets[2] as usize - 1 {
            let mut spoiled = whole.clone();
            spoiled[at] ^= 4;
            fs::write(&path, &spoiled).unwrap();
            let steps = steps(&path);
            assert_eq!((steps.len(), &steps[0], &steps[4]), (5, &Ok(1), &Ok(5)), "byte {at}");
            assert!(steps[1].as_ref().unwrap_err().contains("line 2: expected"), "byte {at}: {:?}", steps[1]);
        }
    }

    #[test]
    fn a_torn_last_line_ends_the_log() {
        let folder = tempfile::tempdir().unwrap();
        let (path, offsets) = five(folder.path());
        let whole = fs::read(&path).unwrap();
        for end in offsets[4]..offsets[5] {
            fs::write(&path, &whole[..end as usize]).unwrap();
            assert_eq!(steps(&path), [Ok(1), Ok(2), Ok(3), Ok(4)], "{end} bytes");
            let mut log = LineLog::reopen(&path).unwrap();
            assert_eq!(log.offset(), offsets[4]);
            log.append(&line(5)).unwrap();
            assert_eq!(fs::read(&path).unwrap(), whole, "{end} bytes");
        }
        let long = [vec![b'x'; 10_000], b"\n".to_vec(), vec![b'y'; 9_000]].concat();
        for (end, wanted) in [(19_001, 10_001), (10_001, 10_001), (10_000, 0), (0, 0)] {
            fs::write(&path, &long[..end]).unwrap();
            assert_eq!(LineLog::reopen(&path).unwrap().offset(), wanted, "{end} bytes");
        }
    }

    #[test]
    fn the_end_of_a_log_is_its_last_whole_lines() {
        let folder = tempfile::tempdir().unwrap();
        let (path, offsets) = five(folder.path());
        let steps = |bytes: u64| tail(&path, bytes).unwrap().iter().map(|line| line["step"].as_u64().unwrap()).collect::<Vec<_>>();
        assert_eq!(
            (steps(1 << 20), steps(offsets[5]), steps(offsets[5] - 1)),
            (vec![1, 2, 3, 4, 5], vec![1, 2, 3, 4, 5], vec![2, 3, 4, 5])
        );
        assert_eq!((steps(offsets[5] - offsets[3] + 1), steps(5), steps(0)), (vec![4, 5], vec![], vec![]));
        let mut whole = fs::read(&path).unwrap();
        whole[offsets[4] as usize + 3] ^= 4;
        whole.extend(b"{\"step\":6");
        fs::write(&path, whole).unwrap();
        assert_eq!(steps(1 << 20), [1, 2, 3, 4]);
        assert!(tail(&folder.path().join("none"), 9).is_err());
    }

    #[test]
    fn a_resume_cuts_the_log_and_keeps_the_tail() {
        let folder = tempfile::tempdir().unwrap();
        let (path, offsets) = five(folder.path());
        let whole = fs::read(&path).unwrap();
        let aside = folder.path().join("metrics.cut-1.jsonl");
        let mut log = LineLog::open_at(&path, offsets[3], &aside).unwrap();
        assert_eq!(fs::read(&aside).unwrap(), whole[offsets[3] as usize..]);
        assert_eq!((log.offset(), steps(&path).len(), steps(&aside).len()), (offsets[3], 3, 2));
        for step in 4..=5 {
            log.append(&line(step)).unwrap();
        }
        assert_eq!(fs::read(&path).unwrap(), whole, "a log that was cut and written again is the same");
        drop(log);
        let again = LineLog::open_at(&path, offsets[3], &aside).unwrap_err().to_string();
        assert!(again.contains("metrics.cut-1.jsonl: cannot write"), "{again}");
        assert_eq!(fs::read(&path).unwrap(), whole, "nothing is cut before the tail is kept");
        let nothing = folder.path().join("nothing");
        LineLog::open_at(&path, offsets[5], &nothing).unwrap();
        assert!(!nothing.exists());
        LineLog::open_at(&path, 0, &nothing).unwrap();
        assert_eq!((steps(&path).len(), fs::read(&nothing).unwrap()), (0, whole));
    }

    #[test]
    fn an_offset_that_is_no_line_start_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (path, offsets) = five(folder.path());
        let aside = folder.path().join("aside");
        for offset in (1..offsets[5]).filter(|offset| !offsets.contains(offset)) {
            let message = LineLog::open_at(&path, offset, &aside).unwrap_err().to_string();
            assert!(message.contains(&format!("offset {offset}: expected the start of a line")), "{message}");
        }
        let message = LineLog::open_at(&path, offsets[5] + 1, &aside).unwrap_err().to_string();
        assert!(message.contains("at least the"), "{message}");
        assert!(!aside.exists() && steps(&path).len() == 5);
    }
}
