//! One safetensors file, open for reading: its tensors, row by row, into slices of the caller. `header.rs` decides what
//! the file holds; this knows no folder (`folder.rs`) and does not write (`writer.rs`).
//!
//! Positioned reads rather than a memory map: they need no `unsafe`, a file that shrinks while it is read is an error
//! instead of a fault, and the memory used beyond the caller's slice is one small block.
//! Source: the safetensors format: u64 header length, JSON header, then the bytes of all tensors without holes.

pub use super::header::TensorInfo;
use super::header::{Header, shown};
use super::stored_dtype::{StoredDtype, decode_floats, decode_integers};
use crate::error::{Error, Result};
use crate::kernels::element::Float;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The longest header read: the limit of the format's own library, and a hundred times what 72B needs.
const HEADER_BYTES_MAX: u64 = 100_000_000;
/// Bytes read at a time: within the second-level cache, and long enough that the system calls do not show.
const BLOCK_BYTES: usize = 256 * 1024;

/// An open safetensors file. Reading takes `&self`, so several threads may read tensors at once.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    file: File,
    metadata: BTreeMap<String, String>,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
}

impl SafetensorsFile {
    /// Opens the file and checks its whole header: lengths, names, types, shapes, and that the tensors cover the rest of
    /// the file without holes, overlaps or bytes left over. No tensor is read yet.
    ///
    /// Errors: [`Error::Io`]; [`Error::Format`] naming the file, the tensor or header, what was expected and found.
    pub fn open(path: &Path) -> Result<Self> {
        let place = "header";
        // Before opening: to open a pipe or a device could wait for ever.
        let about = std::fs::metadata(path).map_err(|e| Error::io(path, "open", e))?;
        if !about.is_file() {
            return Err(Error::format(path, place, "a safetensors file", "a folder or a special file"));
        }
        let file = File::open(path).map_err(|e| Error::io(path, "open", e))?;
        let file_bytes = file.metadata().map_err(|e| Error::io(path, "open", e))?.len();
        if file_bytes < 8 {
            return Err(Error::format(path, place, "8 bytes of header length", format!("a file of {file_bytes} bytes")));
        }
        let mut prefix = [0; 8];
        file.read_exact_at(&mut prefix, 0).map_err(|e| Error::io(path, "read", e))?;
        let header_bytes = u64::from_le_bytes(prefix);
        let header_bytes_max = HEADER_BYTES_MAX.min(file_bytes - 8);
        if header_bytes > header_bytes_max {
            let expected = format!("a header of at most {header_bytes_max} bytes in a file of {file_bytes}");
            return Err(Error::format(path, place, expected, format!("a length of {header_bytes}: not a safetensors file, or cut short")));
        }
        let mut header = vec![0; header_bytes as usize];
        file.read_exact_at(&mut header, 8).map_err(|e| Error::io(path, "read", e))?;
        let data_start = 8 + header_bytes;
        let Header { metadata, mut tensors } = Header::parse(path, &header, file_bytes - data_start)?;
        let mut by_name = HashMap::with_capacity(tensors.len());
        for (index, tensor) in tensors.iter_mut().enumerate() {
            tensor.offset += data_start;
            if by_name.insert(tensor.name.clone(), index).is_some() {
                return Err(Error::format(path, shown(&tensor.name), "each tensor once", "the name twice in the header"));
            }
        }
        Ok(Self { path: path.to_owned(), file, metadata, tensors, by_name })
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tensors, in the order of their bytes in the file.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The header's `__metadata__`, for example `format`: `pt`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The tensor of that name, if the file has it.
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|index| &self.tensors[*index])
    }

    /// The tensor of that name. Errors: [`Error::Format`] if the file lacks it.
    pub fn find(&self, name: &str) -> Result<&TensorInfo> {
        self.get(name).ok_or_else(|| Error::format(&self.path, shown(name), "this tensor in the file", "no such name"))
    }

    /// The tensor of that name, when it has that shape. Errors: [`Error::Format`] if not.
    pub fn expect_shape(&self, name: &str, shape: &[usize]) -> Result<&TensorInfo> {
        let tensor = self.find(name)?;
        if tensor.shape != shape {
            return Err(Error::format(&self.path, shown(name), format!("shape {shape:?}"), format!("shape {:?}", tensor.shape)));
        }
        Ok(tensor)
    }

    /// As [`Self::expect_shape`], when it has a float type too. Errors: [`Error::Format`] if not.
    pub fn expect(&self, name: &str, shape: &[usize]) -> Result<&TensorInfo> {
        let tensor = self.expect_shape(name, shape)?;
        if !tensor.dtype.is_float() {
            return Err(Error::format(&self.path, shown(name), "F32, BF16, F16 or F64", tensor.dtype.name()));
        }
        Ok(tensor)
    }

    /// Reads rows `rows` of a float tensor into `out`, converted to f32 or bf16 (nearest even). A block of 256 KiB is the
    /// only memory taken.
    ///
    /// - `out`: `rows.len() * row_elements` elements
    ///
    /// Errors: [`Error::Format`] for an unknown name, an integer tensor, or a file that shrank; [`Error::Io`].
    /// Panics if `rows` or `out` does not fit the tensor: check the shape first, with [`Self::expect`].
    pub fn read_rows<E: Float>(&self, name: &str, rows: Range<usize>, out: &mut [E]) -> Result<()> {
        let tensor = self.find(name)?;
        if !tensor.dtype.is_float() {
            return Err(Error::format(&self.path, shown(name), "F32, BF16, F16 or F64", tensor.dtype.name()));
        }
        assert!(rows.start <= rows.end && rows.end <= tensor.rows(), "{name}: rows {rows:?} of {}", tensor.rows());
        assert_eq!(out.len(), rows.len() * tensor.row_elements(), "{name}: elements of rows {rows:?}");
        let size = tensor.dtype.size();
        let mut offset = tensor.offset + (rows.start * tensor.row_elements() * size) as u64;
        let mut block = vec![0; BLOCK_BYTES.min(out.len() * size)];
        for part in out.chunks_mut(BLOCK_BYTES / size) {
            let bytes = &mut block[..part.len() * size];
            self.read_exact(name, offset, bytes)?;
            decode_floats(tensor.dtype, bytes, part);
            offset += bytes.len() as u64;
        }
        Ok(())
    }

    /// A whole float tensor as a new vector, converted as in [`Self::read_rows`]. Errors: the same.
    pub fn read_floats<E: Float>(&self, name: &str) -> Result<Vec<E>> {
        let tensor = self.find(name)?;
        let mut out = vec![E::default(); tensor.elements()];
        self.read_rows(name, 0..tensor.rows(), &mut out)?;
        Ok(out)
    }

    /// Reads rows `rows` of a tensor of 16-bit integers into `out`, `rows.len() * row_elements` of them.
    ///
    /// Errors: [`Error::Format`] for an unknown name, another type, or a file that shrank; [`Error::Io`]. Panics as
    /// [`Self::read_rows`] does: check the shape first, with [`Self::expect_shape`].
    pub fn read_i16_rows(&self, name: &str, rows: Range<usize>, out: &mut [i16]) -> Result<()> {
        let tensor = self.find(name)?;
        if tensor.dtype != StoredDtype::I16 {
            return Err(Error::format(&self.path, shown(name), "I16", tensor.dtype.name()));
        }
        assert!(rows.start <= rows.end && rows.end <= tensor.rows(), "{name}: rows {rows:?} of {}", tensor.rows());
        assert_eq!(out.len(), rows.len() * tensor.row_elements(), "{name}: elements of rows {rows:?}");
        let offset = tensor.offset + (rows.start * tensor.row_elements() * 2) as u64;
        self.read_exact(name, offset, bytemuck::cast_slice_mut(out))?;
        out.iter_mut().for_each(|value| *value = i16::from_le(*value));
        Ok(())
    }

    /// A whole integer or boolean tensor. Errors: [`Error::Format`] for an unknown name, a float tensor, or a value beyond
    /// i64; [`Error::Io`].
    pub fn read_integers(&self, name: &str) -> Result<Vec<i64>> {
        let tensor = self.find(name)?;
        if tensor.dtype.is_float() {
            return Err(Error::format(&self.path, shown(name), "an integer type", tensor.dtype.name()));
        }
        let mut out = Vec::with_capacity(tensor.elements());
        let mut block = vec![0; BLOCK_BYTES.min(tensor.bytes() as usize)];
        let (mut offset, end) = (tensor.offset, tensor.offset + tensor.bytes());
        while offset < end {
            let bytes = &mut block[..(end - offset).min(BLOCK_BYTES as u64) as usize];
            self.read_exact(name, offset, bytes)?;
            decode_integers(tensor.dtype, bytes, &mut out)
                .ok_or_else(|| Error::format(&self.path, shown(name), "values that fit a signed 64-bit integer", "a larger one"))?;
            offset += bytes.len() as u64;
        }
        Ok(out)
    }

    fn read_exact(&self, name: &str, offset: u64, bytes: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(bytes, offset).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => Error::format(
                &self.path,
                shown(name),
                format!("{} bytes at offset {offset}", bytes.len()),
                "a file cut short since it was opened",
            ),
            _ => Error::io(&self.path, "read", e),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::stored_dtype::StoredDtype;
    use super::*;
    use half::bf16;

    fn golden(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
    }

    /// Every golden file, read here and by the format's own library.
    #[test]
    fn golden_files_read_as_the_reference_library_reads_them() {
        for name in [
            "dense_tied/model.safetensors",
            "dense_bf16/model.safetensors",
            "train_dense/expected.safetensors",
            "lora/adapter_model.safetensors",
        ] {
            let bytes = std::fs::read(golden(name)).unwrap();
            let reference = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let file = SafetensorsFile::open(&golden(name)).unwrap();
            assert_eq!(file.tensors().len(), reference.len(), "{name}");
            for (tensor_name, view) in reference.tensors() {
                let tensor = file.find(&tensor_name).unwrap();
                assert_eq!(tensor.shape, view.shape(), "{tensor_name}");
                assert_eq!(tensor.dtype.name(), view.dtype().to_string(), "{tensor_name}");
                match tensor.dtype {
                    StoredDtype::F32 => {
                        let want: Vec<u8> = file.read_floats::<f32>(&tensor_name).unwrap().iter().flat_map(|v| v.to_le_bytes()).collect();
                        assert_eq!(want, view.data(), "{tensor_name}");
                    }
                    StoredDtype::Bf16 => {
                        let want: Vec<u8> = file.read_floats::<bf16>(&tensor_name).unwrap().iter().flat_map(|v| v.to_le_bytes()).collect();
                        assert_eq!(want, view.data(), "{tensor_name}");
                    }
                    StoredDtype::I64 => {
                        let want: Vec<u8> = file.read_integers(&tensor_name).unwrap().iter().flat_map(|v| v.to_le_bytes()).collect();
                        assert_eq!(want, view.data(), "{tensor_name}");
                    }
                    other => panic!("{tensor_name}: no golden file should hold {other}"),
                }
            }
        }
    }

    #[test]
    fn a_range_of_rows_is_that_part_of_the_whole() {
        let file = SafetensorsFile::open(&golden("dense_bf16/model.safetensors")).unwrap();
        let name = "model.embed_tokens.weight";
        let tensor = file.expect(name, &[448, 64]).unwrap();
        assert_eq!((tensor.rows(), tensor.row_elements(), tensor.bytes()), (448, 64, 448 * 64 * 2));
        let whole = file.read_floats::<f32>(name).unwrap();
        for rows in [0..0, 0..1, 7..40, 447..448, 448..448, 0..448] {
            let mut part = vec![f32::NAN; rows.len() * 64];
            file.read_rows(name, rows.clone(), &mut part).unwrap();
            assert_eq!(part, whole[rows.start * 64..rows.end * 64]);
        }
    }

    #[test]
    fn asking_for_what_is_not_there_names_it() {
        let file = SafetensorsFile::open(&golden("dense_tied/model.safetensors")).unwrap();
        assert_eq!(file.metadata()["format"], "pt");
        for (message, wanted) in [
            (file.find("lm_head.weight").unwrap_err().to_string(), ["lm_head.weight", "no such name"]),
            (file.expect("model.norm.weight", &[65]).unwrap_err().to_string(), ["shape [65]", "shape [64]"]),
            (file.read_integers("model.norm.weight").unwrap_err().to_string(), ["an integer type", "F32"]),
        ] {
            assert!(wanted.iter().all(|part| message.contains(part)), "{message}");
        }
    }

    #[test]
    fn a_file_cut_short_after_opening_is_an_error_not_a_fault() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        std::fs::copy(golden("dense_tied/model.safetensors"), &path).unwrap();
        let file = SafetensorsFile::open(&path).unwrap();
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(5_000).unwrap();
        let message = file.read_floats::<f32>("model.norm.weight").unwrap_err().to_string();
        assert!(message.contains("cut short"), "{message}");
    }

    #[test]
    fn folders_devices_and_absent_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert!(SafetensorsFile::open(folder.path()).unwrap_err().to_string().contains("a folder or a special file"));
        assert!(SafetensorsFile::open(Path::new("/dev/zero")).unwrap_err().to_string().contains("a folder or a special file"));
        assert!(matches!(SafetensorsFile::open(&folder.path().join("none")), Err(Error::Io { .. })));
    }
}
