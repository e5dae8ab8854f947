//! Writes a Hugging Face folder: safetensors files, split at a size limit, their index, and the small files beside them.
//! Tensors are streamed in pieces, so that saving needs no second copy of the weights; nothing shows at the target until
//! all is there (`replacement.rs`). Knows no names of tensors.
//! Source: the safetensors format; file names and index as transformers writes them.

use super::header::shown;
use super::replacement::Replacement;
use super::stored_dtype::{StoredDtype, encode_floats};
use crate::error::{Error, Result};
use crate::kernels::element::Float;
use serde_json::{Map, Value, json};
use std::fs::File;
use std::io::Write;
use std::path::Path;

/// The size at which transformers begins another file, bytes.
pub const SHARD_BYTES_MAX: u64 = 5_000_000_000;
/// Bytes converted at a time.
const BLOCK_BYTES: usize = 256 * 1024;
/// Room asked for beyond the tensors: headers, and the small files of which only the tokenizer has megabytes.
const EXTRA_BYTES: u64 = 64_000_000;

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    pub name: String,
    pub dtype: StoredDtype,
    pub shape: Vec<usize>,
}

impl TensorSpec {
    fn bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * self.dtype.size()) as u64
    }
}

/// A folder on its way to `target`. Give each tensor in the order of the list, in as many pieces as you like, then
/// [`FolderWriter::finish`]. Dropped before that, it leaves no trace and the old target as it was.
#[derive(Debug)]
pub struct FolderWriter {
    replacement: Replacement,
    specs: Vec<TensorSpec>,
    /// The file of each tensor.
    file_names: Vec<String>,
    /// Index of the tensor that is being written; `specs.len()` when all are.
    current: usize,
    /// Bytes of it that are written.
    written: u64,
    file: Option<File>,
    block: Vec<u8>,
}

impl FolderWriter {
    /// Begins a checkpoint at `target` with the files `model.safetensors` or `model-0000x-of-0000y.safetensors`.
    ///
    /// - `specs`: every tensor, in the order in which it will be given
    /// - `shard_bytes_max`: a file holds more only if one tensor alone does; [`SHARD_BYTES_MAX`] is usual
    ///
    /// Errors: [`Error::Argument`] if a name stands twice, or `target` is something that no checkpoint was saved to;
    /// [`Error::Io`], also when the disk has too little room.
    pub fn create(target: &Path, specs: Vec<TensorSpec>, shard_bytes_max: u64) -> Result<Self> {
        Self::create_named(target, "model", specs, shard_bytes_max)
    }

    /// As [`Self::create`] with another name than `model`: adapters are `adapter_model`.
    pub fn create_named(target: &Path, stem: &str, specs: Vec<TensorSpec>, shard_bytes_max: u64) -> Result<Self> {
        let mut names: Vec<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Error::argument("save", shown(pair[0]), "each tensor once", "it twice"));
        }
        if names.binary_search(&"__metadata__").is_ok() {
            return Err(Error::argument("save", "__metadata__", "the name of a tensor", "the format's own key"));
        }
        let file_names = plan_files(stem, &specs, shard_bytes_max);
        let replacement = Replacement::begin(target)?;
        let header_bytes: u64 = specs.iter().map(|spec| spec.name.len() as u64 + 200).sum();
        replacement.check_room(specs.iter().map(TensorSpec::bytes).sum::<u64>() + header_bytes + EXTRA_BYTES)?;
        if !file_names.iter().all(|name| *name == file_names[0]) {
            let total: u64 = specs.iter().map(TensorSpec::bytes).sum();
            let mut pairs: Vec<_> = specs.iter().zip(&file_names).map(|(spec, file)| (spec.name.clone(), json!(file))).collect();
            pairs.sort_by(|a, b| a.0.cmp(&b.0));
            let index = json!({ "metadata": { "total_size": total }, "weight_map": Map::from_iter(pairs) });
            replacement.write_file(&format!("{stem}.safetensors.index.json"), pretty(&index).as_bytes())?;
        }
        let mut writer = Self { replacement, specs, file_names, current: 0, written: 0, file: None, block: Vec::new() };
        if writer.specs.is_empty() {
            // A folder without tensors still has the file that readers look for.
            writer.file_names.push(format!("{stem}.safetensors"));
            writer.open_file(0)?;
            writer.close_file(0)?;
        }
        writer.skip_empty()?;
        Ok(writer)
    }

    /// The tensor that is written next, until all are.
    pub fn next_tensor(&self) -> Option<&TensorSpec> {
        self.specs.get(self.current)
    }

    /// Appends values to the tensor `name`, converted to its stored type (nearest even).
    ///
    /// Errors: [`Error::Io`]. Panics if it is not this tensor's turn, it would grow beyond its shape, or it is stored as
    /// integers: the list given at the start says all three.
    pub fn write<E: Float>(&mut self, name: &str, values: &[E]) -> Result<()> {
        let Some(dtype) = self.next_tensor().map(|spec| spec.dtype) else { panic!("{name}: all tensors are written") };
        let mut block = std::mem::take(&mut self.block);
        block.resize(BLOCK_BYTES, 0);
        for part in values.chunks(BLOCK_BYTES / dtype.size()) {
            let bytes = &mut block[..part.len() * dtype.size()];
            encode_floats(dtype, part, bytes);
            self.write_bytes(name, bytes)?;
        }
        self.block = block;
        Ok(())
    }

    /// Appends bytes, little-endian elements of the stored type, to the tensor `name`. Errors and panics: as
    /// [`Self::write`].
    pub fn write_bytes(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let Some(spec) = self.specs.get(self.current) else { panic!("{name}: all tensors are written") };
        assert_eq!(spec.name, name, "tensors are written in the order of the list");
        let size = spec.bytes();
        assert!(self.written + bytes.len() as u64 <= size, "{name}: {} + {} bytes of {size}", self.written, bytes.len());
        if self.file.is_none() {
            self.open_file(self.current)?;
        }
        let file = self.file.as_mut().expect("it was opened above");
        file.write_all(bytes).map_err(|e| Error::io(&self.replacement.path().join(&self.file_names[self.current]), "write", e))?;
        self.written += bytes.len() as u64;
        if self.written == size {
            self.advance()?;
            self.skip_empty()?;
        }
        Ok(())
    }

    /// Writes a small file beside the weights, for example `config.json`. Errors: [`Error::Argument`] if `name` is no
    /// plain name; [`Error::Io`], also when it is there already.
    pub fn add_file(&self, name: &str, bytes: &[u8]) -> Result<()> {
        self.replacement.write_file(name, bytes)
    }

    /// Writes a JSON file, indented by two as transformers does. Errors: as [`Self::add_file`].
    pub fn add_json(&self, name: &str, value: &Value) -> Result<()> {
        self.add_file(name, pretty(value).as_bytes())
    }

    /// Copies a small file, for example the tokenizer of the base model. Errors: as [`Self::add_file`].
    pub fn copy_file(&self, name: &str, from: &Path) -> Result<()> {
        self.replacement.copy_file(name, from)
    }

    /// Puts the folder in the target's place, durably. Errors: [`Error::Io`], and the old target is in place.
    ///
    /// Panics if a tensor was not written in full.
    pub fn finish(self) -> Result<()> {
        if let Some(spec) = self.next_tensor() {
            panic!("{}: {} of {} bytes were written", spec.name, self.written, spec.bytes());
        }
        self.replacement.commit()
    }

    /// Creates the file of tensor `index`, which is its first, and writes its header.
    fn open_file(&mut self, index: usize) -> Result<()> {
        let name = &self.file_names[index];
        let members = self.specs.iter().zip(&self.file_names).filter(|(_, file)| *file == name).map(|(spec, _)| spec);
        let header = header_of(members);
        let mut file = self.replacement.create_file(name)?;
        file.write_all(&header).map_err(|e| Error::io(&self.replacement.path().join(name), "write", e))?;
        self.file = Some(file);
        Ok(())
    }

    /// Makes the file of tensor `index` durable.
    fn close_file(&mut self, index: usize) -> Result<()> {
        let file = self.file.take().expect("a file is closed after it was opened");
        file.sync_all().map_err(|e| Error::io(&self.replacement.path().join(&self.file_names[index]), "write", e))
    }

    /// Goes on to the next tensor, and closes the file when the next one lies in another.
    fn advance(&mut self) -> Result<()> {
        let done = self.current;
        self.current += 1;
        self.written = 0;
        if self.file_names.get(self.current) != Some(&self.file_names[done]) {
            self.close_file(done)?;
        }
        Ok(())
    }

    /// Passes over tensors without elements, which no call will bring bytes for.
    fn skip_empty(&mut self) -> Result<()> {
        while self.next_tensor().is_some_and(|spec| spec.bytes() == 0) {
            if self.file.is_none() {
                self.open_file(self.current)?;
            }
            self.advance()?;
        }
        Ok(())
    }
}

/// The file of each tensor: another one begins where the limit would be passed.
fn plan_files(stem: &str, specs: &[TensorSpec], shard_bytes_max: u64) -> Vec<String> {
    let (mut shard, mut shard_bytes) = (0, 0);
    let mut shards = Vec::with_capacity(specs.len());
    for spec in specs {
        if shard_bytes > 0 && spec.bytes() > 0 && shard_bytes + spec.bytes() > shard_bytes_max {
            shard += 1;
            shard_bytes = 0;
        }
        shard_bytes += spec.bytes();
        shards.push(shard);
    }
    let count = shard + 1;
    let name = |shard: usize| match count {
        1 => format!("{stem}.safetensors"),
        _ => format!("{stem}-{:05}-of-{count:05}.safetensors", shard + 1),
    };
    shards.into_iter().map(name).collect()
}

/// Length and JSON of a header. Spaces at its end bring the first tensor to a multiple of 8 bytes.
fn header_of<'a>(specs: impl Iterator<Item = &'a TensorSpec>) -> Vec<u8> {
    let mut object = Map::from_iter([("__metadata__".to_owned(), json!({ "format": "pt" }))]);
    let mut offset = 0;
    for spec in specs {
        let end = offset + spec.bytes();
        object.insert(spec.name.clone(), json!({ "dtype": spec.dtype.name(), "shape": spec.shape, "data_offsets": [offset, end] }));
        offset = end;
    }
    let mut json = Value::Object(object).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    [&(json.len() as u64).to_le_bytes()[..], &json].concat()
}

fn pretty(value: &Value) -> String {
    let text = serde_json::to_string_pretty(value).expect("a JSON tree has only string keys");
    text + "\n"
}

#[cfg(test)]
mod tests {
    use super::super::folder::CheckpointFolder;
    use super::super::safetensors::SafetensorsFile;
    use super::*;
    use half::bf16;

    fn spec(name: &str, dtype: StoredDtype, shape: &[usize]) -> TensorSpec {
        TensorSpec { name: name.into(), dtype, shape: shape.into() }
    }

    /// Values that bf16 and f16 hold exactly.
    fn values(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 37 + seed * 11) % 255) as f32 / 8.0 - 16.0).collect()
    }

    /// Tensors of odd sizes in every float type, one empty, one a scalar, one larger than a block.
    fn specs() -> Vec<TensorSpec> {
        vec![
            spec("a.weight", StoredDtype::F32, &[33, 7]),
            spec("b \"quoted\" \u{e9}", StoredDtype::Bf16, &[7]),
            spec("empty", StoredDtype::F32, &[0, 5]),
            spec("large", StoredDtype::Bf16, &[3, 70_001]),
            spec("scalar", StoredDtype::F64, &[]),
            spec("half", StoredDtype::F16, &[1, 1, 9]),
            spec("last", StoredDtype::F32, &[0]),
        ]
    }

    fn save(target: &Path, shard_bytes_max: u64) -> Result<()> {
        let mut writer = FolderWriter::create(target, specs(), shard_bytes_max)?;
        for (index, spec) in specs().iter().enumerate() {
            let all = values(spec.shape.iter().product(), index);
            for part in all.chunks(1 + 1000 * index) {
                if index % 2 == 0 {
                    writer.write(&spec.name, part)?;
                } else {
                    writer.write(&spec.name, &part.iter().map(|v| bf16::from_f32(*v)).collect::<Vec<_>>())?;
                }
            }
        }
        writer.add_json("config.json", &json!({ "model_type": "qwen2" }))?;
        writer.finish()
    }

    fn check_content(target: &Path) {
        let folder = CheckpointFolder::open(target).unwrap();
        assert_eq!(folder.tensors().count(), specs().len());
        for (index, spec) in specs().iter().enumerate() {
            let tensor = folder.expect(&spec.name, &spec.shape).unwrap();
            assert_eq!(tensor.dtype, spec.dtype);
            assert_eq!(folder.read_floats::<f32>(&spec.name).unwrap(), values(tensor.elements(), index), "{}", spec.name);
        }
    }

    #[test]
    fn one_file_and_many_shards_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("model");
        // Everything in one file; a few files; a file for each tensor that has bytes.
        for (limit, files) in [(SHARD_BYTES_MAX, 1), (1000, 3), (0, 5)] {
            save(&target, limit).unwrap();
            check_content(&target);
            let count =
                std::fs::read_dir(&target).unwrap().filter(|e| e.as_ref().unwrap().path().extension().unwrap() == "safetensors").count();
            assert_eq!(count, files, "limit {limit}");
            assert_eq!(target.join("model.safetensors").exists(), files == 1);
            assert_eq!(target.join("model.safetensors.index.json").exists(), files > 1);
            assert_eq!(std::fs::read_to_string(target.join("config.json")).unwrap(), "{\n  \"model_type\": \"qwen2\"\n}\n");
        }
    }

    #[test]
    fn the_reference_library_reads_what_is_written() {
        let folder = tempfile::tempdir().unwrap();
        save(&folder.path().join("model"), SHARD_BYTES_MAX).unwrap();
        let bytes = std::fs::read(folder.path().join("model/model.safetensors")).unwrap();
        let header_bytes = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        assert_eq!(header_bytes % 8, 0);
        let reference = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let (_, metadata) = ::safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
        for (index, spec) in specs().iter().enumerate() {
            let view = reference.tensor(&spec.name).unwrap();
            assert_eq!((view.dtype().to_string(), view.shape()), (spec.dtype.name().to_owned(), &spec.shape[..]));
            if spec.dtype == StoredDtype::F32 {
                let want: Vec<u8> = values(view.data().len() / 4, index).iter().flat_map(|v| v.to_le_bytes()).collect();
                assert_eq!(view.data(), want);
            }
        }
    }

    #[test]
    fn a_golden_checkpoint_survives_a_copy_bit_for_bit() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/dense_bf16");
        let source = CheckpointFolder::open(&golden).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("copy");
        let specs = source.tensors().map(|t| spec(&t.name, t.dtype, &t.shape)).collect();
        let mut writer = FolderWriter::create(&target, specs, 100_000).unwrap();
        while let Some(spec) = writer.next_tensor().cloned() {
            let rows = spec.shape[0];
            for start in (0..rows).step_by(17) {
                let end = rows.min(start + 17);
                let mut part = vec![bf16::ZERO; (end - start) * spec.shape[1..].iter().product::<usize>()];
                source.read_rows(&spec.name, start..end, &mut part).unwrap();
                writer.write(&spec.name, &part).unwrap();
            }
        }
        writer.copy_file("config.json", &golden.join("config.json")).unwrap();
        writer.finish().unwrap();
        let copy = CheckpointFolder::open(&target).unwrap();
        for tensor in source.tensors() {
            let bits = |folder: &CheckpointFolder| {
                folder.read_floats::<bf16>(&tensor.name).unwrap().iter().map(|v| v.to_bits()).collect::<Vec<_>>()
            };
            assert_eq!(bits(&copy), bits(&source), "{}", tensor.name);
        }
        assert_eq!(std::fs::read(target.join("config.json")).unwrap(), std::fs::read(golden.join("config.json")).unwrap());
    }

    #[test]
    fn an_interrupted_save_leaves_the_old_checkpoint_and_no_trace() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("model");
        save(&target, 0).unwrap();
        let mut writer = FolderWriter::create(&target, specs(), 0).unwrap();
        writer.write("a.weight", &[1.0f32; 100]).unwrap();
        assert!(writer.copy_file("x.json", &folder.path().join("none")).is_err());
        drop(writer);
        check_content(&target);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn adapters_and_empty_lists_have_their_files() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("adapter");
        let mut writer = FolderWriter::create_named(&target, "adapter_model", vec![spec("x", StoredDtype::F32, &[2])], 100).unwrap();
        writer.write("x", &[1.0f32, 2.0]).unwrap();
        writer.finish().unwrap();
        let file = SafetensorsFile::open(&target.join("adapter_model.safetensors")).unwrap();
        assert_eq!(file.read_floats::<f32>("x").unwrap(), [1.0, 2.0]);
        let target = folder.path().join("nothing");
        FolderWriter::create(&target, Vec::new(), 100).unwrap().finish().unwrap();
        assert_eq!(CheckpointFolder::open(&target).unwrap().tensors().count(), 0);
    }

    #[test]
    fn lists_that_cannot_be_meant_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("model");
        let x = || spec("x", StoredDtype::F32, &[1]);
        let message = FolderWriter::create(&target, vec![x(), x()], 1).unwrap_err().to_string();
        assert!(message.contains("each tensor once"), "{message}");
        assert!(FolderWriter::create(&target, vec![spec("__metadata__", StoredDtype::F32, &[1])], 1).is_err());
        let message = FolderWriter::create(&target, vec![spec("x", StoredDtype::F32, &[1 << 50])], 1).unwrap_err().to_string();
        assert!(message.contains("bytes are needed"), "{message}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
