//! The header of a safetensors file: a JSON object of names, checked against the file's true size before anything in it
//! is trusted. Every fault names the tensor, what was expected and what was found. Reads no tensor (`safetensors.rs`).
//!
//! Parsed here rather than by the `safetensors` crate, whose errors cannot say which tensor is wrong, and without a JSON
//! tree, which for a hostile header would take many times its size in memory.

use super::stored_dtype::StoredDtype;
use crate::error::{Error, Result};
use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::collections::BTreeMap;
use std::path::Path;

/// Axes of a tensor. Models use at most 3; the limit keeps a hostile shape from taking memory.
const RANK_MAX: usize = 16;

/// What a header holds, checked.
pub(super) struct Header {
    /// `__metadata__`, for example `format`: `pt`.
    pub(super) metadata: BTreeMap<String, String>,
    /// In the order of their bytes, which they cover without holes or overlaps. A name may still stand twice.
    pub(super) tensors: Vec<TensorInfo>,
}

impl Header {
    /// Reads `json` as the header of the file at `path`, in which `data_bytes` bytes follow the header.
    ///
    /// Errors: [`Error::Format`].
    pub(super) fn parse(path: &Path, json: &[u8], data_bytes: u64) -> Result<Self> {
        let mut parser = Parser { path, data_bytes, metadata: BTreeMap::new(), tensors: Vec::new(), fault: None };
        parser.parse(json)?;
        parser.check_coverage()?;
        Ok(Self { metadata: parser.metadata, tensors: parser.tensors })
    }
}

/// What the header says of one tensor, after it was checked: the shape times the type is the bytes in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    pub name: String,
    pub dtype: StoredDtype,
    pub shape: Vec<usize>,
    /// Where its bytes begin: in a parsed header from the end of the header, in an open file from its start.
    pub(super) offset: u64,
}

impl TensorInfo {
    /// Elements of the whole tensor; 1 for a scalar.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Size of the first axis; a scalar has one row.
    pub fn rows(&self) -> usize {
        self.shape.first().copied().unwrap_or(1)
    }

    /// Elements of one index of the first axis.
    pub fn row_elements(&self) -> usize {
        self.shape.iter().skip(1).product()
    }

    /// Size in the file.
    pub fn bytes(&self) -> u64 {
        (self.elements() * self.dtype.size()) as u64
    }
}

/// A name as it may stand in a message: a hostile one could be megabytes long or hold control characters.
pub(super) fn shown(name: &str) -> String {
    let mut text: String = name.chars().take(200).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    if text.len() < name.len() && name.chars().count() > 200 {
        text.push_str("...");
    }
    if text.is_empty() { "(empty name)".into() } else { text }
}

/// A header while it is parsed. `fault` carries our own error past serde, which has room only for text.
struct Parser<'a> {
    path: &'a Path,
    data_bytes: u64,
    metadata: BTreeMap<String, String>,
    tensors: Vec<TensorInfo>,
    fault: Option<Error>,
}

impl Parser<'_> {
    fn parse(&mut self, json: &[u8]) -> Result<()> {
        let path = self.path;
        let text = std::str::from_utf8(json)
            .map_err(|e| Error::format(path, "header", "UTF-8 text", format!("an invalid byte at offset {}", 8 + e.valid_up_to())))?;
        // The format asks for `{` first, and allows spaces after the last `}`: both as JSON itself would have it.
        if !text.starts_with('{') {
            let found = text.chars().next().map_or("nothing".into(), |first| format!("{first:?}"));
            return Err(Error::format(path, "header", "JSON that begins with `{`", found));
        }
        let mut json = serde_json::Deserializer::from_str(text);
        let outcome = (&mut *self).deserialize(&mut json).and_then(|()| json.end());
        match (self.fault.take(), outcome) {
            (Some(fault), _) => Err(fault),
            (None, Err(e)) => Err(Error::format(path, "header", "a JSON object of tensors", shown(&e.to_string()))),
            (None, Ok(())) => Ok(()),
        }
    }

    /// Sorts the tensors by offset and checks that they cover the data exactly.
    fn check_coverage(&mut self) -> Result<()> {
        self.tensors.sort_by_key(|tensor| (tensor.offset, tensor.bytes()));
        let mut end = 0;
        for tensor in &self.tensors {
            if tensor.offset != end {
                let what = if tensor.offset < end { "an overlap with its neighbour" } else { "a hole before it" };
                let found = format!("data_offsets that begin at {}: {what}", tensor.offset);
                return Err(Error::format(self.path, shown(&tensor.name), format!("data_offsets that begin at {end}"), found));
            }
            end += tensor.bytes();
        }
        if end != self.data_bytes {
            let found = format!("{} bytes after the header", self.data_bytes);
            return Err(Error::format(self.path, "end of file", format!("{end} bytes of tensors"), found));
        }
        Ok(())
    }

    fn check_entry(&self, name: String, entry: Entry) -> Result<TensorInfo> {
        let fault = |expected: &str, found: String| Error::format(self.path, shown(&name), expected, found);
        if let Some(key) = entry.fault {
            return Err(fault("the keys dtype, shape and data_offsets, each once", key));
        }
        let dtype = match entry.dtype {
            Piece::Text(text) => StoredDtype::parse(&text).ok_or_else(|| {
                fault(&format!("a dtype among {}", StoredDtype::ALL.map(StoredDtype::name).join(", ")), format!("{:?}", shown(&text)))
            })?,
            other => return Err(fault("dtype to be a string", other.describe())),
        };
        let shape = match entry.shape {
            Piece::Counts(counts) => counts,
            other => return Err(fault("shape to be a list of at most 16 sizes", other.describe())),
        };
        let (start, end) = match entry.offsets {
            Piece::Counts(counts) if counts.len() == 2 => (counts[0], counts[1]),
            other => return Err(fault("data_offsets to be [begin, end]", other.describe())),
        };
        if start > end || end > self.data_bytes {
            let expected = format!("data_offsets within the {} bytes after the header", self.data_bytes);
            return Err(fault(&expected, format!("[{start}, {end}]")));
        }
        // A zero counts as one here, so that no product of some of the sizes overflows either. At most isize::MAX: the
        // sizes fit usize, and a buffer of them can exist.
        let bytes = shape.iter().try_fold(dtype.size() as u64, |product, size| product.checked_mul((*size).max(1)));
        let Some(bytes) = bytes.filter(|bytes| isize::try_from(*bytes).is_ok()) else {
            return Err(fault("a shape that fits the address space", format!("{shape:?} of {dtype}")));
        };
        let bytes = if shape.contains(&0) { 0 } else { bytes };
        if bytes != end - start {
            return Err(fault(&format!("{bytes} bytes for shape {shape:?} of {dtype}"), format!("{} bytes in data_offsets", end - start)));
        }
        let shape = shape.into_iter().map(|size| size as usize).collect();
        Ok(TensorInfo { name, dtype, shape, offset: start })
    }
}

impl<'de> DeserializeSeed<'de> for &mut Parser<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for &mut Parser<'_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut metadata_seen = false;
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                if std::mem::replace(&mut metadata_seen, true) {
                    self.fault = Some(Error::format(self.path, "__metadata__", "this key once", "twice"));
                    return Err(de::Error::custom("fault"));
                }
                match map.next_value::<BTreeMap<String, String>>() {
                    Ok(metadata) => self.metadata = metadata,
                    Err(e) => {
                        self.fault = Some(Error::format(self.path, "__metadata__", "an object of strings", shown(&e.to_string())));
                        return Err(e);
                    }
                }
                continue;
            }
            let entry = match map.next_value::<Entry>() {
                Ok(entry) => entry,
                Err(e) => {
                    let expected = "an object with dtype, shape and data_offsets";
                    self.fault = Some(Error::format(self.path, shown(&name), expected, shown(&e.to_string())));
                    return Err(e);
                }
            };
            match self.check_entry(name, entry) {
                Ok(tensor) => self.tensors.push(tensor),
                Err(fault) => {
                    self.fault = Some(fault);
                    return Err(de::Error::custom("fault"));
                }
            }
        }
        Ok(())
    }
}

/// The value of one name, of whatever JSON type; `fault` describes a key that is unknown or stands twice.
#[derive(Default)]
struct Entry {
    dtype: Piece,
    shape: Piece,
    offsets: Piece,
    fault: Option<String>,
}

impl<'de> de::Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        struct EntryVisitor;
        impl<'de> Visitor<'de> for EntryVisitor {
            type Value = Entry;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object with dtype, shape and data_offsets")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entry, A::Error> {
                let mut entry = Entry::default();
                while let Some(key) = map.next_key::<String>()? {
                    let slot = match key.as_str() {
                        "dtype" => &mut entry.dtype,
                        "shape" => &mut entry.shape,
                        "data_offsets" => &mut entry.offsets,
                        _ => {
                            entry.fault = Some(format!("the key {:?}", shown(&key)));
                            map.next_value::<IgnoredAny>()?;
                            continue;
                        }
                    };
                    if !matches!(slot, Piece::Missing) {
                        entry.fault = Some(format!("{key} twice"));
                    }
                    *slot = map.next_value()?;
                }
                Ok(entry)
            }
        }
        json.deserialize_map(EntryVisitor)
    }
}

/// A JSON value, as far as a header may need it; never larger than a short list of numbers or the text in the file.
#[derive(Default)]
enum Piece {
    #[default]
    Missing,
    Text(String),
    Count(u64),
    Counts(Vec<u64>),
    /// Anything else, described.
    Other(String),
}

impl Piece {
    fn describe(self) -> String {
        match self {
            Self::Missing => "no such key".into(),
            Self::Text(text) => format!("the string {:?}", shown(&text)),
            Self::Count(count) => count.to_string(),
            Self::Counts(counts) => format!("{counts:?}"),
            Self::Other(what) => what,
        }
    }
}

impl<'de> de::Deserialize<'de> for Piece {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        struct PieceVisitor;
        impl<'de> Visitor<'de> for PieceVisitor {
            type Value = Piece;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a value")
            }
            fn visit_unit<E>(self) -> Result<Piece, E> {
                Ok(Piece::Other("null".into()))
            }
            fn visit_bool<E>(self, value: bool) -> Result<Piece, E> {
                Ok(Piece::Other(value.to_string()))
            }
            fn visit_i64<E>(self, value: i64) -> Result<Piece, E> {
                Ok(Piece::Other(value.to_string()))
            }
            fn visit_u64<E>(self, value: u64) -> Result<Piece, E> {
                Ok(Piece::Count(value))
            }
            fn visit_f64<E>(self, value: f64) -> Result<Piece, E> {
                Ok(Piece::Other(value.to_string()))
            }
            fn visit_str<E>(self, value: &str) -> Result<Piece, E> {
                Ok(Piece::Text(value.into()))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Piece, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Piece::Other("an object".into()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Piece, A::Error> {
                let (mut counts, mut fault) = (Vec::new(), None);
                while let Some(element) = list.next_element()? {
                    match element {
                        Piece::Count(count) if counts.len() < RANK_MAX => counts.push(count),
                        Piece::Count(_) => fault = Some("a longer list"),
                        _ => fault = Some("a list that holds something else than whole numbers from 0"),
                    }
                }
                Ok(fault.map_or(Piece::Counts(counts), |fault| Piece::Other(fault.into())))
            }
        }
        json.deserialize_any(PieceVisitor)
    }
}
