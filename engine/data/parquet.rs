//! Rows of Parquet files as records: text, numbers, truth values, lists and structs. One row group is decoded at a time, so a
//! file may be larger than memory. Not a writer. The only file that names the parquet crate; its row interface suffices, and
//! Arrow, which is most of that crate's weight, is left out.
//! Source: parquet.apache.org/docs/file-format; nulls are fields that are not there, as in JSON lines written by hand.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use parquet::basic::Compression;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use parquet::schema::types::Type;
use serde_json::{Map, Number, Value};

use super::content_hash::ContentHash;
use super::document_index::Split;
use super::jsonl::Record;
use super::records::Kept;
use crate::error::{Error, Result};

/// Decoded groups are kept until they hold this much, if records are asked for in any order.
const CACHE_BYTES: u64 = 256 << 20;

struct ParquetFile {
    path: PathBuf,
    bytes: u64,
    hash: String,
    reader: SerializedFileReader<File>,
}

/// A row group: where it lies, and what it holds.
#[derive(Debug, Clone, Copy)]
struct Group {
    file: usize,
    index: usize,
    /// Numbers of its first row, among all rows and in its file.
    first: u64,
    first_in_file: u64,
    rows: u64,
    /// Decoded.
    bytes: u64,
}

/// The rows of a list of files, numbered from 0.
pub struct ParquetFiles {
    files: Vec<ParquetFile>,
    groups: Vec<Group>,
    kept: Kept,
    /// Groups last read, the latest at the end.
    decoded: VecDeque<(usize, Vec<Result<Record, BadValue>>)>,
    cache_bytes: u64,
}

/// What cannot be a part of a record, and where in its row.
#[derive(Debug, Clone)]
struct BadValue {
    column: String,
    found: String,
}

impl std::fmt::Debug for ParquetFiles {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "ParquetFiles({} files, {} groups)", self.files.len(), self.groups.len())
    }
}

impl ParquetFiles {
    /// Reads what each file says of itself, and hashes its bytes.
    ///
    /// - `shuffled`: whether rows will be asked for in any order; decoded groups are then kept as far as memory is given to it
    ///
    /// Errors: [`Error::Io`]; [`Error::Format`] for a file that is no Parquet; [`Error::Unsupported`] for other compression
    /// than snappy, gzip and zstd; [`Error::Argument`] for no paths, or a
    /// fraction outside 0 to 1.
    pub fn open(paths: &[PathBuf], split: Option<Split>, shuffled: bool) -> Result<Self> {
        Self::with_cache(paths, split, if shuffled { CACHE_BYTES } else { 0 })
    }

    fn with_cache(paths: &[PathBuf], split: Option<Split>, cache_bytes: u64) -> Result<Self> {
        if paths.is_empty() {
            return Err(Error::argument("data.parquet", "paths", "at least one file", "none"));
        }
        let (mut files, mut groups, mut first) = (Vec::new(), Vec::new(), 0);
        for path in paths {
            let (bytes, hash) = hashed(path)?;
            let file = File::open(path).map_err(|source| Error::io(path, "open", source))?;
            let reader = guarded(|| SerializedFileReader::new(file));
            let reader = reader.map_err(|what| Error::format(path, "footer", "a Parquet file", what))?;
            check_compression(path, &reader)?;
            let mut first_in_file = 0;
            for (index, group) in reader.metadata().row_groups().iter().enumerate() {
                let (rows, bytes) = (group.num_rows().max(0) as u64, group.total_byte_size().max(0) as u64);
                groups.push(Group { file: files.len(), index, first, first_in_file, rows, bytes });
                first += rows;
                first_in_file += rows;
            }
            files.push(ParquetFile { path: path.clone(), bytes, hash, reader });
        }
        Ok(Self { files, groups, kept: Kept::new(first, split)?, decoded: VecDeque::new(), cache_bytes })
    }

    pub fn count(&self) -> u64 {
        self.kept.count()
    }

    /// Path, size and hash of each file.
    pub fn files(&self) -> impl Iterator<Item = (&PathBuf, u64, &str)> {
        self.files.iter().map(|file| (&file.path, file.bytes, file.hash.as_str()))
    }

    /// Where each row group ends, if all of them together do not fit what is kept: a random order should then finish a group
    /// before it begins another.
    pub fn groups(&self) -> Option<Vec<u64>> {
        let all: u64 = self.groups.iter().map(|group| group.bytes).sum();
        (all > self.cache_bytes).then(|| self.groups.iter().map(|group| self.kept.before(group.first + group.rows)).collect())
    }

    fn group_of(&self, number: u64) -> (usize, u64) {
        let row = self.kept.number(number);
        (self.groups.partition_point(|group| group.first + group.rows <= row), row)
    }

    /// The file of row `number`, and its place there.
    pub fn place(&self, number: u64) -> (String, String) {
        let (which, row) = self.group_of(number);
        let group = self.groups[which];
        let place = format!("row {}", group.first_in_file + row - group.first + 1);
        (self.files[group.file].path.display().to_string(), place)
    }

    /// Row `number`, which must be below the count. The inner error is a value that no record can hold.
    ///
    /// Errors: [`Error::Format`] for a group that cannot be decoded, with the column and the row if they can be told.
    pub fn read(&mut self, number: u64) -> Result<Result<Record>> {
        assert!(number < self.count(), "row {number} of {}", self.count());
        let (which, row) = self.group_of(number);
        match self.decoded.iter().position(|(group, _)| *group == which) {
            Some(at) => {
                let group = self.decoded.remove(at).expect("just found");
                self.decoded.push_back(group);
            }
            None => {
                let rows = self.decode(self.groups[which])?;
                self.decoded.push_back((which, rows));
                let held = |decoded: &VecDeque<(usize, _)>| decoded.iter().map(|(group, _)| self.groups[*group].bytes).sum::<u64>();
                while self.decoded.len() > 1 && held(&self.decoded) > self.cache_bytes {
                    self.decoded.pop_front();
                }
            }
        }
        let (_, rows) = self.decoded.back().expect("just put there");
        match rows[(row - self.groups[which].first) as usize].clone() {
            Ok(record) => Ok(Ok(record)),
            Err(BadValue { column, found }) => {
                let (path, place) = self.place(number);
                let expected = "text, numbers, truth values, lists or structs".into();
                Ok(Err(Error::Format { path, place: format!("{place}, column {column}"), expected, found }))
            }
        }
    }

    fn decode(&self, group: Group) -> Result<Vec<Result<Record, BadValue>>> {
        let file = &self.files[group.file];
        let rows = decoded(&file.reader, group.index, None, |row| Ok(record(row)));
        let damaged = |place: String, what: String| Error::format(&file.path, place, "rows that can be decoded", what);
        match rows {
            Ok(rows) if rows.len() as u64 == group.rows => Ok(rows),
            Ok(rows) => Err(damaged(format!("row group {}", group.index), format!("{} of {} rows", rows.len(), group.rows))),
            // One column after the other finds the one that fails, and where.
            Err((_, what)) => {
                let schema = file.reader.metadata().file_metadata().schema();
                for column in schema.get_fields() {
                    let alone = Type::group_type_builder(schema.name()).with_fields(vec![column.clone()]).build();
                    let Ok(alone) = alone else { continue };
                    if let Err((rows, what)) = decoded(&file.reader, group.index, Some(alone), |_| Ok(())) {
                        let place = format!("row {}, column {}", group.first_in_file + rows + 1, column.name());
                        return Err(damaged(place, what));
                    }
                }
                Err(damaged(format!("row group {}", group.index), what))
            }
        }
    }
}

/// Errors: [`Error::Unsupported`] for a column that is compressed in a way that is not built in.
fn check_compression(path: &Path, reader: &SerializedFileReader<File>) -> Result<()> {
    for column in reader.metadata().row_groups().iter().flat_map(|group| group.columns()) {
        let codec = column.compression();
        if !matches!(codec, Compression::UNCOMPRESSED | Compression::SNAPPY | Compression::GZIP(_) | Compression::ZSTD(_)) {
            let name = format!("{codec:?}");
            let (name, column) = (name.split('(').next().unwrap_or_default().to_lowercase(), column.column_path());
            return Err(Error::Unsupported {
                what: format!("{}: column {column}: compression with {name}", path.display()),
                remedy: "write the file with snappy, gzip, zstd or no compression".into(),
            });
        }
    }
    Ok(())
}

/// The rows of a group through `take`; else how many came before the one that failed, and why it did.
fn decoded<T>(
    reader: &SerializedFileReader<File>,
    group: usize,
    columns: Option<Type>,
    take: impl Fn(Row) -> Result<T, ParquetError>,
) -> Result<Vec<T>, (u64, String)> {
    let mut rows = Vec::new();
    let done = guarded(|| {
        for row in reader.get_row_group(group)?.get_row_iter(columns)? {
            rows.push(take(row?)?);
        }
        Ok(())
    });
    match done {
        Ok(()) => Ok(rows),
        Err(what) => Err((rows.len() as u64, what)),
    }
}

/// Runs `body`; its error, or a panic over bytes that the parquet crate did not expect, becomes text.
fn guarded<T>(body: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(error.to_string()),
        Err(panic) => {
            let text = panic.downcast_ref::<&str>().map(|text| text.to_string());
            Err(text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "bytes that cannot be decoded".into()))
        }
    }
}

fn hashed(path: &Path) -> Result<(u64, String)> {
    let mut file = File::open(path).map_err(|source| Error::io(path, "open", source))?;
    let (mut hash, mut bytes, mut buffer) = (ContentHash::default(), 0, vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok((bytes, hash.hex())),
            Ok(count) => {
                hash.update(&buffer[..count]);
                bytes += count as u64;
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(source) => return Err(Error::io(path, "read", source)),
        }
    }
}

fn record(row: Row) -> Result<Record, BadValue> {
    let mut fields = Map::new();
    for (name, field) in row.into_columns() {
        let at = |mut bad: BadValue| {
            bad.column = format!("{name}{}", bad.column);
            bad
        };
        if let Some(value) = json(field).map_err(at)? {
            fields.insert(name, value);
        }
    }
    Ok(fields)
}

/// A field as JSON; `None` for a null.
fn json(field: Field) -> Result<Option<Value>, BadValue> {
    let number = |value: f64| Number::from_f64(value).map(Value::Number);
    Ok(Some(match field {
        Field::Null => return Ok(None),
        Field::Bool(value) => value.into(),
        Field::Byte(value) => value.into(),
        Field::Short(value) => value.into(),
        Field::Int(value) => value.into(),
        Field::Long(value) => value.into(),
        Field::UByte(value) => value.into(),
        Field::UShort(value) => value.into(),
        Field::UInt(value) => value.into(),
        Field::ULong(value) => value.into(),
        // JSON has no number for what is not finite: it is left out as a null is.
        Field::Float16(value) => return Ok(number(f64::from(value))),
        Field::Float(value) => return Ok(number(f64::from(value))),
        Field::Double(value) => return Ok(number(value)),
        Field::Str(text) => text.into(),
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => text.into(),
            Err(_) => return Err(BadValue { column: String::new(), found: format!("{} bytes that are no text", bytes.len()) }),
        },
        Field::Group(row) => {
            let inside = |mut bad: BadValue| {
                bad.column = format!(".{}", bad.column);
                bad
            };
            Value::Object(record(row).map_err(inside)?)
        }
        Field::ListInternal(list) => {
            let mut values = Vec::with_capacity(list.len());
            for element in list.elements() {
                // A list keeps its places: a null in it stays.
                values.push(json(element.clone())?.unwrap_or(Value::Null));
            }
            values.into()
        }
        Field::MapInternal(map) => {
            let mut fields = Map::new();
            for (key, value) in map.entries() {
                let key = if let Field::Str(key) = key { key.clone() } else { key.to_string() };
                if let Some(value) = json(value.clone())? {
                    fields.insert(key, value);
                }
            }
            fields.into()
        }
        // Decimals, dates and times, as they are written.
        other => other.to_string().into(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_cache_gives_the_same_rows_and_an_order_by_groups() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/parquet/snappy.parquet");
        let open = |cache| ParquetFiles::with_cache(std::slice::from_ref(&path), None, cache).unwrap();
        let order = [22, 0, 7, 21, 1, 8, 22, 13, 0];
        let read = |cache| {
            let mut files = open(cache);
            let ids = order.map(|number| files.read(number).unwrap().unwrap()["id"].as_u64().unwrap());
            (ids, files.decoded.len())
        };
        assert_eq!(read(0), (order, 1));
        assert_eq!(read(u64::MAX), (order, 4));
        // Groups of five rows, the last of three.
        assert_eq!((open(0).groups(), open(u64::MAX).groups()), (Some(vec![5, 10, 15, 20, 23]), None));
    }
}
