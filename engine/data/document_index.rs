//! Where each document of a list of files begins, found in one streaming pass, so that any document can be read by number
//! from files larger than memory. Costs 8 bytes a document. Not an order: `shuffle.rs` and `dataset.rs` choose numbers.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::content_hash::ContentHash;
use super::jsonl::{BadLine, Record, parse_line};
use super::text::{Delimiter, split_point};
use crate::error::{Error, Result};
use crate::kernels::random::Stream;

/// The field that holds the text of a document from a text file.
pub const TEXT_FIELD: &str = "text";

const BUFFER_BYTES: usize = 64 * 1024;

/// What the files hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// A JSON object on each line.
    Jsonl,
    Text(Delimiter),
}

/// Which side of a split.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    Train,
    Validation,
}

impl Part {
    /// As scripts call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Validation => "validation",
        }
    }
}

/// A part of the data: of a text file that is one document its first or last bytes, else documents drawn by their number.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Split {
    pub part: Part,
    /// How much is validation, between 0 and 1.
    pub fraction: f64,
}

/// One file and its documents.
#[derive(Debug)]
pub struct IndexedFile {
    pub path: PathBuf,
    pub bytes: u64,
    /// Of the content, as [`ContentHash::hex`].
    pub hash: String,
    /// Number of the first document of this file.
    first: u64,
    starts: Vec<u64>,
    end: u64,
}

/// The documents of a list of files, numbered from 0.
#[derive(Debug)]
pub struct DocumentIndex {
    format: Format,
    files: Vec<IndexedFile>,
    count: u64,
}

impl DocumentIndex {
    /// Reads each file once, in pieces.
    ///
    /// Errors: [`Error::Io`]; [`Error::Argument`] for no paths, or a fraction outside 0 to 1.
    pub fn scan(paths: &[PathBuf], format: Format, split: Option<Split>) -> Result<Self> {
        if paths.is_empty() {
            return Err(Error::argument("data", "paths", "at least one file", "none"));
        }
        if let Some(Split { fraction, .. }) = split
            && !(0.0..=1.0).contains(&fraction)
        {
            return Err(Error::argument("data.split", "fraction", "a number from 0 to 1", fraction));
        }
        let (mut files, mut first, mut number) = (Vec::new(), 0, 0);
        for path in paths {
            let mut file = scan_file(path, format)?;
            match split {
                Some(Split { part, fraction }) if format == Format::Text(Delimiter::Whole) && !file.starts.is_empty() => {
                    let cut = split_point(path, file.bytes, fraction)?.max(file.starts[0]);
                    match part {
                        Part::Train => file.end = cut,
                        Part::Validation => file.starts[0] = cut,
                    }
                    if file.starts[0] == file.end {
                        file.starts.clear();
                    }
                }
                Some(Split { part, fraction }) => {
                    // The stream's seed is fixed, so that a document stays on its side whatever else a script changes.
                    let draw = Stream::new(0, "split");
                    file.starts.retain(|_| {
                        number += 1;
                        (draw.f64(number - 1) < fraction) == (part == Part::Validation)
                    });
                }
                None => {}
            }
            file.first = first;
            first += file.starts.len() as u64;
            files.push(file);
        }
        Ok(Self { format, files, count: first })
    }

    /// Documents in all files.
    pub fn count(&self) -> u64 {
        self.count
    }

    pub fn format(&self) -> Format {
        self.format
    }

    pub fn files(&self) -> &[IndexedFile] {
        &self.files
    }
}

fn scan_file(path: &Path, format: Format) -> Result<IndexedFile> {
    let mut file = File::open(path).map_err(|source| Error::io(path, "open", source))?;
    let (mut hash, mut bytes, mut starts) = (ContentHash::default(), 0u64, Vec::new());
    // Where the text begins: behind the byte order mark, if there is one.
    let mut body = 0;
    let mut buffer = vec![0; 16 * BUFFER_BYTES];
    // Where the current line begins, whether it has shown a visible byte, and whether the line before it was blank.
    let (mut line, mut visible, mut after_blank) = (0u64, false, true);
    loop {
        let count = match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(source) => return Err(Error::io(path, "read", source)),
        };
        let chunk = &buffer[..count];
        hash.update(chunk);
        let mut skip = 0;
        if bytes == 0 && chunk.starts_with(b"\xEF\xBB\xBF") {
            (line, body, skip) = (3, 3, 3);
        }
        for part in chunk[skip..].split_inclusive(|byte| *byte == b'\n') {
            if !visible && part.iter().any(|byte| !byte.is_ascii_whitespace()) {
                visible = true;
                match format {
                    Format::Jsonl | Format::Text(Delimiter::Line) => starts.push(line),
                    Format::Text(Delimiter::BlankLine) if after_blank => starts.push(line),
                    Format::Text(_) => {}
                }
            }
            skip += part.len();
            if part.ends_with(b"\n") {
                (after_blank, visible, line) = (!visible, false, bytes + skip as u64);
            }
        }
        bytes += count as u64;
    }
    if format == Format::Text(Delimiter::Whole) && bytes > body {
        starts.push(body);
    }
    Ok(IndexedFile { path: path.to_path_buf(), bytes, hash: hash.hex(), first: 0, starts, end: bytes })
}

/// Reads documents by number. Going forward through a file costs no seeks.
#[derive(Debug)]
pub struct DocumentReader {
    index: Arc<DocumentIndex>,
    /// The file last read, and the position in it.
    open: Option<(usize, BufReader<File>, u64)>,
}

impl DocumentReader {
    pub fn new(index: Arc<DocumentIndex>) -> Self {
        Self { index, open: None }
    }

    pub fn index(&self) -> &DocumentIndex {
        &self.index
    }

    /// Document `number`, which must be below the count. The inner error is a document that is not what its format promises;
    /// the reader goes on after it.
    ///
    /// Errors: [`Error::Io`], also for a file that has become shorter. Inner: [`Error::Format`] with line and column.
    pub fn read(&mut self, number: u64) -> Result<Result<Record>> {
        let index = self.index.clone();
        assert!(number < index.count, "document {number} of {}", index.count);
        let which = index.files.partition_point(|file| file.first <= number) - 1;
        let file = &index.files[which];
        let start = file.starts[(number - file.first) as usize];
        let bytes = self.bytes(which, file, start).map_err(|source| Error::io(&file.path, "read", source))?;
        let parsed = match index.format {
            Format::Jsonl => parse_line(&bytes),
            Format::Text(_) => match String::from_utf8(bytes) {
                Ok(text) => Ok(Record::from_iter([(TEXT_FIELD.to_string(), text.into())])),
                Err(error) => {
                    let (at, bytes) = (error.utf8_error().valid_up_to(), error.as_bytes());
                    let column = bytes[..at].iter().rev().take_while(|byte| **byte != b'\n').count();
                    let found = format!("the byte {:#04x} at byte {} of the file", bytes[at], start + at as u64);
                    Err(BadLine { offset: (at - column) as u64, column: column + 1, expected: "UTF-8", found })
                }
            },
        };
        match parsed {
            Ok(record) => Ok(Ok(record)),
            Err(bad) => Ok(Err(self.bad(number, bad)?)),
        }
    }

    /// The error for document `number`, with the number of its line.
    ///
    /// Errors: [`Error::Io`].
    pub fn bad(&self, number: u64, bad: BadLine) -> Result<Error> {
        let (path, line) = self.place(number, bad.offset)?;
        let place = if bad.column == 0 { line } else { format!("{line}, column {}", bad.column) };
        Ok(Error::Format { path, place, expected: bad.expected.into(), found: bad.found })
    }

    /// The file of document `number`, and the line that begins `offset` bytes behind its start.
    ///
    /// Errors: [`Error::Io`].
    pub fn place(&self, number: u64, offset: u64) -> Result<(String, String)> {
        let which = self.index.files.partition_point(|file| file.first <= number) - 1;
        let file = &self.index.files[which];
        let line = line_number(&file.path, file.starts[(number - file.first) as usize] + offset)?;
        Ok((file.path.display().to_string(), format!("line {line}")))
    }

    fn bytes(&mut self, which: usize, file: &IndexedFile, start: u64) -> std::io::Result<Vec<u8>> {
        let (mut reader, position) = match self.open.take() {
            Some((open, reader, position)) if open == which => (reader, position),
            _ => (BufReader::with_capacity(BUFFER_BYTES, File::open(&file.path)?), 0),
        };
        // `seek_relative` keeps the buffer when the target lies in it.
        match i64::try_from(i128::from(start) - i128::from(position)) {
            Ok(distance) => reader.seek_relative(distance)?,
            Err(_) => drop(reader.seek(SeekFrom::Start(start))?),
        }
        let mut bytes = Vec::new();
        let mut read = 0;
        match self.index.format {
            Format::Text(Delimiter::Whole) => read += (&mut reader).take(file.end - start).read_to_end(&mut bytes)?,
            Format::Jsonl | Format::Text(Delimiter::Line) => {
                read += reader.read_until(b'\n', &mut bytes)?;
                trim_newline(&mut bytes);
            }
            Format::Text(Delimiter::BlankLine) => loop {
                let line_start = bytes.len();
                let count = reader.read_until(b'\n', &mut bytes)?;
                read += count;
                if count == 0 || bytes[line_start..].iter().all(u8::is_ascii_whitespace) {
                    bytes.truncate(line_start);
                    trim_newline(&mut bytes);
                    break;
                }
            },
        }
        if read == 0 || (self.index.format == Format::Text(Delimiter::Whole) && (read as u64) < file.end - start) {
            return Err(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "the file has become shorter since it was indexed"));
        }
        self.open = Some((which, reader, start + read as u64));
        Ok(bytes)
    }
}

fn trim_newline(bytes: &mut Vec<u8>) {
    if bytes.last() == Some(&b'\n') {
        bytes.pop();
    }
    if bytes.last() == Some(&b'\r') {
        bytes.pop();
    }
}

/// The number, from 1, of the line that begins at byte `start`.
fn line_number(path: &Path, start: u64) -> Result<u64> {
    let file = File::open(path).map_err(|source| Error::io(path, "open", source))?;
    let mut reader = BufReader::with_capacity(BUFFER_BYTES, file.take(start));
    let mut line = 1;
    loop {
        let chunk = reader.fill_buf().map_err(|source| Error::io(path, "read", source))?;
        if chunk.is_empty() {
            return Ok(line);
        }
        line += chunk.iter().filter(|byte| **byte == b'\n').count() as u64;
        let count = chunk.len();
        reader.consume(count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(contents: &[&[u8]]) -> (tempfile::TempDir, Vec<PathBuf>) {
        let folder = tempfile::tempdir().unwrap();
        let paths: Vec<PathBuf> = (0..contents.len()).map(|index| folder.path().join(format!("{index}.txt"))).collect();
        paths.iter().zip(contents).for_each(|(path, content)| std::fs::write(path, content).unwrap());
        (folder, paths)
    }

    fn texts(contents: &[&[u8]], format: Format, split: Option<Split>) -> Vec<String> {
        let (_folder, paths) = files(contents);
        let index = Arc::new(DocumentIndex::scan(&paths, format, split).unwrap());
        let mut reader = DocumentReader::new(index.clone());
        let forward: Vec<_> = (0..index.count()).map(|number| reader.read(number).unwrap().unwrap()).collect();
        // Backwards, each read seeks; the documents are the same.
        let backward: Vec<_> = (0..index.count()).rev().map(|number| reader.read(number).unwrap().unwrap()).collect();
        assert!(forward.iter().eq(backward.iter().rev()));
        forward.iter().map(|record| record["text"].as_str().unwrap().to_string()).collect()
    }

    #[test]
    fn text_divides_by_file_line_or_blank_line() {
        let contents: [&[u8]; 4] = [b"\xEF\xBB\xBFa\nb\r\n\r\n \n\nc", b"", b"\n\n", "d\né\n".as_bytes()];
        assert_eq!(texts(&contents, Format::Text(Delimiter::Whole), None), ["a\nb\r\n\r\n \n\nc", "\n\n", "d\né\n"]);
        assert_eq!(texts(&contents, Format::Text(Delimiter::Line), None), ["a", "b", "c", "d", "é"]);
        assert_eq!(texts(&contents, Format::Text(Delimiter::BlankLine), None), ["a\nb", "c", "d\né"]);
    }

    #[test]
    fn json_lines_survive_marks_carriage_returns_blanks_and_lines_longer_than_any_buffer() {
        let long = format!("{{\"text\": \"{}\"}}\n{{\"text\": \"z\"}}", "y".repeat(3_000_000));
        let contents: [&[u8]; 2] = [b"\xEF\xBB\xBF{\"text\": \"a\"}\r\n\r\n{\"text\": \"b\"}", long.as_bytes()];
        let texts = texts(&contents, Format::Jsonl, None);
        assert_eq!(texts.iter().map(String::len).collect::<Vec<_>>(), [1, 1, 3_000_000, 1]);
    }

    #[test]
    fn a_bad_document_names_file_line_and_column_and_the_reader_goes_on() {
        let (_folder, paths) = files(&[b"{}\n\n{\"a\": 1,}\n[]\n{\"a\":\"\xFF\"}\n{}"]);
        let mut reader = DocumentReader::new(Arc::new(DocumentIndex::scan(&paths, Format::Jsonl, None).unwrap()));
        let mut check = |number, says: &str| {
            let error = reader.read(number).unwrap().unwrap_err().to_string();
            assert!(error.contains("0.txt: ") && error.contains(says), "{error}");
        };
        check(1, "line 3, column 9: expected a JSON object");
        check(2, "line 4: expected a JSON object, found an array");
        check(3, "line 5, column 7: expected UTF-8");
        assert!(reader.read(4).unwrap().is_ok());
        let (_folder, paths) = files(&[b"ab\ncd\xFFe"]);
        let mut reader = DocumentReader::new(Arc::new(DocumentIndex::scan(&paths, Format::Text(Delimiter::Whole), None).unwrap()));
        assert!(reader.read(0).unwrap().unwrap_err().to_string().contains("at byte 5 of the file"));
        std::fs::write(&paths[0], "a").unwrap();
        assert!(DocumentReader::new(reader.index.clone()).read(0).unwrap_err().to_string().contains("shorter"));
    }

    #[test]
    fn the_two_parts_of_a_split_are_disjoint_and_complete() {
        let lines: String = (0..1_000).map(|line| format!("{line}\n")).collect();
        for (format, expected) in [(Format::Text(Delimiter::Line), 1_000), (Format::Text(Delimiter::Whole), 1)] {
            let part = |part| texts(&[lines.as_bytes()], format, Some(Split { part, fraction: 0.1 }));
            let (train, validation) = (part(Part::Train), part(Part::Validation));
            if expected == 1 {
                assert_eq!(train.concat() + &validation.concat(), lines);
                assert_eq!(validation[0].len(), lines.len().div_ceil(10));
                continue;
            }
            // 100 of 1000 with a deviation of 9.5.
            assert!(validation.len().abs_diff(100) < 50, "{}", validation.len());
            let mut all: Vec<usize> = train.iter().chain(&validation).map(|line| line.parse().unwrap()).collect();
            all.sort_unstable();
            assert!(all.into_iter().eq(0..1_000));
        }
        for (fraction, count) in [(0.0, 0), (1.0, 1)] {
            let split = Some(Split { part: Part::Validation, fraction });
            assert_eq!(texts(&[b"abc"], Format::Text(Delimiter::Whole), split).len(), count);
        }
        let (_folder, paths) = files(&[b"x"]);
        for fraction in [-0.1, 1.1, f64::NAN] {
            assert!(DocumentIndex::scan(&paths, Format::Jsonl, Some(Split { part: Part::Train, fraction })).is_err());
        }
        assert!(DocumentIndex::scan(&[], Format::Jsonl, None).is_err());
        let missing = DocumentIndex::scan(&["no/such".into()], Format::Jsonl, None).unwrap_err();
        assert!(missing.to_string().contains("no/such: cannot open"));
    }
}
