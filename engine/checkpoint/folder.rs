//! A Hugging Face folder, open for reading: which file holds which tensor. One `model.safetensors`, or shards with an
//! index. Does not know what the tensors mean, nor what `config.json` says (`model/config.rs`).
//! Source: the hub's layout, qwen2.5.md section 1.3.

use super::header::shown;
use super::safetensors::{SafetensorsFile, TensorInfo};
use crate::error::{Error, Result};
use crate::kernels::element::Float;
use serde::de::{self, Deserializer, MapAccess, Visitor};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The file of an unsharded checkpoint.
const SINGLE: &str = "model.safetensors";
/// The file that lists the shards of a checkpoint.
const INDEX: &str = "model.safetensors.index.json";
/// The longest text file read: tokenizers take 12 MB, the index of the largest models a few.
const TEXT_BYTES_MAX: u64 = 100_000_000;

/// The tensors of a folder. Reading takes `&self`, so several threads may read at once.
#[derive(Debug)]
pub struct CheckpointFolder {
    path: PathBuf,
    files: Vec<SafetensorsFile>,
    /// Name to its file.
    by_name: BTreeMap<String, usize>,
}

impl CheckpointFolder {
    /// Opens every file of the checkpoint in folder `path` and checks their headers and the index against each other.
    ///
    /// Errors: [`Error::Io`]; [`Error::Format`] for a malformed file, a missing shard, a shard without the tensor that the
    /// index promises, a tensor in two shards, an index that points out of the folder; [`Error::Unsupported`] if only
    /// pytorch_model.bin is there.
    pub fn open(path: &Path) -> Result<Self> {
        let about = std::fs::metadata(path).map_err(|e| Error::io(path, "open", e))?;
        if !about.is_dir() {
            return Err(Error::format(path, "checkpoint", "a folder with config.json and model.safetensors", "a file"));
        }
        // The order of transformers: a single file wins over an index beside it.
        if path.join(SINGLE).exists() {
            let file = SafetensorsFile::open(&path.join(SINGLE))?;
            let by_name = file.tensors().iter().map(|tensor| (tensor.name.clone(), 0)).collect();
            return Ok(Self { path: path.to_owned(), files: vec![file], by_name });
        }
        if path.join(INDEX).exists() {
            return Self::open_shards(path);
        }
        Err(no_weights(path)?)
    }

    fn open_shards(path: &Path) -> Result<Self> {
        let index_path = path.join(INDEX);
        let text = read_text(&index_path)?;
        let index: Index = serde_json::from_str(&text)
            .map_err(|e| Error::format(&index_path, "index", "an object whose weight_map maps names to files", shown(&e.to_string())))?;
        if let Some(name) = index.weight_map.twice {
            return Err(Error::format(&index_path, shown(&name), "each tensor once", "the name twice in weight_map"));
        }
        let mut files: Vec<SafetensorsFile> = Vec::new();
        let mut file_numbers: BTreeMap<&str, usize> = BTreeMap::new();
        let mut by_name = BTreeMap::new();
        for (name, file_name) in &index.weight_map.files {
            let number = match file_numbers.get(file_name.as_str()) {
                Some(number) => *number,
                None => {
                    if !is_plain_name(file_name) || !file_name.ends_with(".safetensors") {
                        let expected = "the plain name of a .safetensors file in this folder";
                        return Err(Error::format(&index_path, shown(name), expected, format!("{:?}", shown(file_name))));
                    }
                    if !path.join(file_name).exists() {
                        let found = "no such file; the download may be incomplete";
                        return Err(Error::format(&index_path, shown(name), format!("the shard {file_name}"), found));
                    }
                    files.push(SafetensorsFile::open(&path.join(file_name))?);
                    file_numbers.insert(file_name, files.len() - 1);
                    files.len() - 1
                }
            };
            if files[number].get(name).is_none() {
                let shard = files[number].path();
                return Err(Error::format(shard, shown(name), "this tensor, which the index places here", "no such name"));
            }
            by_name.insert(name.clone(), number);
        }
        for (number, file) in files.iter().enumerate() {
            for tensor in file.tensors() {
                match by_name.get(&tensor.name) {
                    Some(home) if *home == number => {}
                    Some(home) => {
                        let also = format!("it in {} too", files[*home].path().display());
                        return Err(Error::format(file.path(), shown(&tensor.name), "each tensor in one shard", also));
                    }
                    None => {
                        return Err(Error::format(file.path(), shown(&tensor.name), "only tensors that the index lists", "one it lacks"));
                    }
                }
            }
        }
        Ok(Self { path: path.to_owned(), files, by_name })
    }

    /// Where the folder lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The tensors, sorted by name.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorInfo> {
        self.by_name.iter().map(|(name, number)| self.files[*number].get(name).expect("open has found every name in its file"))
    }

    /// The tensor of that name, if the checkpoint has it.
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.files[*self.by_name.get(name)?].get(name)
    }

    /// The tensor of that name, when it has that shape and a float type. Errors: [`Error::Format`] if not.
    pub fn expect(&self, name: &str, shape: &[usize]) -> Result<&TensorInfo> {
        self.file(name)?.expect(name, shape)
    }

    /// Reads rows of a float tensor into `out`, as [`SafetensorsFile::read_rows`] does.
    pub fn read_rows<E: Float>(&self, name: &str, rows: Range<usize>, out: &mut [E]) -> Result<()> {
        self.file(name)?.read_rows(name, rows, out)
    }

    /// A whole float tensor as a new vector. Errors: as [`SafetensorsFile::read_rows`].
    pub fn read_floats<E: Float>(&self, name: &str) -> Result<Vec<E>> {
        self.file(name)?.read_floats(name)
    }

    /// The file that holds the tensor of that name. Errors: [`Error::Format`] if none does.
    fn file(&self, name: &str) -> Result<&SafetensorsFile> {
        let number = self.by_name.get(name);
        let number = number.ok_or_else(|| Error::format(&self.path, shown(name), "this tensor in the checkpoint", "no such name"))?;
        Ok(&self.files[*number])
    }
}

/// The text of a small file, such as a configuration or an index.
///
/// Errors: [`Error::Io`]; [`Error::Format`] for a file over 100 MB, that is no plain file, or not UTF-8.
pub fn read_text(path: &Path) -> Result<String> {
    let about = std::fs::metadata(path).map_err(|e| Error::io(path, "read", e))?;
    if !about.is_file() || about.len() > TEXT_BYTES_MAX {
        let found = if about.is_file() { format!("{} bytes", about.len()) } else { "a folder or a special file".into() };
        return Err(Error::format(path, "file", format!("a text file of at most {TEXT_BYTES_MAX} bytes"), found));
    }
    let mut bytes = Vec::new();
    // The limit holds even if the file grows meanwhile.
    File::open(path).and_then(|file| file.take(TEXT_BYTES_MAX).read_to_end(&mut bytes)).map_err(|e| Error::io(path, "read", e))?;
    String::from_utf8(bytes)
        .map_err(|e| Error::format(path, "file", "UTF-8 text", format!("an invalid byte at offset {}", e.utf8_error().valid_up_to())))
}

/// Whether `name` names a file directly in a folder: no separator, no `..`, not empty, not absolute.
pub(super) fn is_plain_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let first = components.next();
    // The comparison with the whole name refuses "a/" and "./a", which have one normal component too.
    matches!(first, Some(std::path::Component::Normal(part)) if part == name) && components.next().is_none() && !name.contains(['\\', '\0'])
}

/// Why the folder holds no checkpoint that this engine reads.
fn no_weights(path: &Path) -> Result<Error> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(path).map_err(|e| Error::io(path, "list", e))? {
        names.push(entry.map_err(|e| Error::io(path, "list", e))?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    let expected = format!("{SINGLE} or {INDEX}");
    if let Some(name) = names.iter().find(|name| name.starts_with("pytorch_model") && (name.ends_with(".bin") || name.ends_with(".json"))) {
        let what = format!("{}: a checkpoint in PyTorch's pickle format ({name})", path.display());
        let remedy = "a pickle can run code when it is read; convert it with transformers: save_pretrained(path, safe_serialization=True)";
        return Ok(Error::Unsupported { what, remedy: remedy.into() });
    }
    if let Some(name) = names.iter().find(|name| name.ends_with(".gguf")) {
        let what = format!("{}: a GGUF checkpoint ({name})", path.display());
        return Ok(Error::Unsupported { what, remedy: "use the safetensors files of the same model".into() });
    }
    if names.iter().any(|name| name == "adapter_model.safetensors") {
        let found = "adapter_model.safetensors: a LoRA adapter; open its base model and load the adapter into it";
        return Ok(Error::format(path, "weights", expected, found));
    }
    if let Some(name) = names.iter().find(|name| name.starts_with("model-") && name.ends_with(".safetensors")) {
        return Ok(Error::format(path, "weights", expected, format!("{name} without {INDEX}; the download may be incomplete")));
    }
    Ok(Error::format(path, "weights", expected, if names.is_empty() { "an empty folder" } else { "neither" }))
}

/// `model.safetensors.index.json`, of which only the map counts.
#[derive(serde::Deserialize)]
struct Index {
    weight_map: WeightMap,
}

/// Tensor name to file name; `twice` is a name that stood twice, which a JSON tree would hide.
struct WeightMap {
    files: BTreeMap<String, String>,
    twice: Option<String>,
}

impl<'de> de::Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        struct WeightMapVisitor;
        impl<'de> Visitor<'de> for WeightMapVisitor {
            type Value = WeightMap;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of tensor names and file names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
                let mut weight_map = WeightMap { files: BTreeMap::new(), twice: None };
                while let Some((name, file)) = map.next_entry::<String, String>()? {
                    if weight_map.files.insert(name.clone(), file).is_some() {
                        weight_map.twice = Some(name);
                    }
                }
                Ok(weight_map)
            }
        }
        json.deserialize_map(WeightMapVisitor)
    }
}

/// Errors: [`Error::Format`] if `folder`, from which a model's files are to be read, is not there at all.
pub fn require_folder(folder: &Path) -> Result<()> {
    if folder.exists() {
        return Ok(());
    }
    let name = folder.display();
    // A name of the hub reads like a path: owner and model.
    let is_of_hub = folder.is_relative() && folder.components().count() == 2 && folder.parent().is_some_and(|owner| !owner.exists());
    let how = if is_of_hub {
        format!("; `hf download {name} --local-dir {name}` fetches a model of the Hugging Face hub")
    } else {
        String::new()
    };
    Err(Error::format(folder, "model", format!("a folder on this machine{how}"), "none of this name"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn golden(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
    }

    #[test]
    fn shards_and_a_single_file_of_one_model_read_alike() {
        let (sharded, single) =
            (CheckpointFolder::open(&golden("dense_sharded")).unwrap(), CheckpointFolder::open(&golden("dense_tied")).unwrap());
        let names = |folder: &CheckpointFolder| folder.tensors().map(|t| (t.name.clone(), t.shape.clone())).collect::<Vec<_>>();
        assert_eq!(names(&sharded), names(&single));
        assert_eq!(sharded.tensors().map(TensorInfo::elements).sum::<usize>(), 119_360);
        let whole = sharded.read_floats::<f32>("model.layers.1.mlp.up_proj.weight").unwrap();
        let mut rows = vec![0.0f32; 2 * 64];
        sharded.read_rows("model.layers.1.mlp.up_proj.weight", 3..5, &mut rows).unwrap();
        assert_eq!(rows, whole[3 * 64..5 * 64]);
        let message = sharded.expect("lm_head.weight", &[512, 64]).unwrap_err().to_string();
        assert!(message.contains("lm_head.weight") && message.contains("no such name"), "{message}");
    }

    /// A copy of the sharded golden checkpoint, which `change` then spoils; its error must hold `wanted`.
    fn check_spoiled(wanted: &str, change: impl Fn(&Path)) {
        let folder = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(golden("dense_sharded")).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
        }
        change(folder.path());
        let message = CheckpointFolder::open(folder.path()).expect_err(wanted).to_string();
        assert!(message.contains(wanted), "{message} lacks {wanted}");
    }

    /// The index with `from` replaced by `to`.
    fn edit_index(folder: &Path, from: &str, to: &str) {
        let text = std::fs::read_to_string(folder.join(INDEX)).unwrap();
        assert!(text.contains(from), "{from}");
        std::fs::write(folder.join(INDEX), text.replacen(from, to, 1)).unwrap();
    }

    #[test]
    fn a_spoiled_folder_is_refused_and_the_message_says_why() {
        const NORM: &str = "\"model.norm.weight\": \"";
        let shard_1 = "model-00001-of-00003.safetensors";
        check_spoiled("the shard model-00001-of-00003.safetensors, found no such file", |f| std::fs::remove_file(f.join(shard_1)).unwrap());
        check_spoiled("a length of", |f| std::fs::write(f.join(shard_1), [9; 20]).unwrap());
        check_spoiled("EOF", |f| std::fs::write(f.join(INDEX), "{").unwrap());
        check_spoiled("missing field `weight_map`", |f| std::fs::write(f.join(INDEX), "{}").unwrap());
        check_spoiled("invalid type", |f| std::fs::write(f.join(INDEX), r#"{"weight_map": [1]}"#).unwrap());
        check_spoiled("invalid type", |f| std::fs::write(f.join(INDEX), r#"{"weight_map": {"a": 1}}"#).unwrap());
        check_spoiled("UTF-8", |f| std::fs::write(f.join(INDEX), b"{\"\xff\"}").unwrap());
        for outside in
            ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "..", ".", "", "./x.safetensors", "x.safetensors/", "model.bin"]
        {
            let to = format!("\"first\": \"{outside}\", {NORM}");
            check_spoiled("the plain name of a .safetensors file", |f| edit_index(f, NORM, &to));
        }
        check_spoiled("twice in weight_map", |f| edit_index(f, NORM, &format!("\"model.norm.weight\": \"{shard_1}\", {NORM}")));
        check_spoiled("which the index places here, found no such name", |f| {
            edit_index(f, NORM, &format!("\"lm_head.weight\": \"{shard_1}\", {NORM}"));
        });
        check_spoiled("only tensors that the index lists", |f| {
            edit_index(f, "\"model.layers.0.input_layernorm.weight\": \"model-00002-of-00003.safetensors\",", "")
        });
        check_spoiled("each tensor in one shard", |f| {
            std::fs::copy(f.join(shard_1), f.join("zz.safetensors")).unwrap();
            let name = "\"model.embed_tokens.weight\": \"";
            edit_index(f, &format!("{name}{shard_1}"), &format!("{name}zz.safetensors"));
        });
    }

    #[test]
    fn a_folder_without_weights_says_what_it_holds() {
        let check = |name: &str, wanted: &str| {
            let folder = tempfile::tempdir().unwrap();
            if !name.is_empty() {
                std::fs::write(folder.path().join(name), "x").unwrap();
            }
            let message = CheckpointFolder::open(folder.path()).expect_err(wanted).to_string();
            assert!(message.contains(wanted), "{message} lacks {wanted}");
        };
        check("", "an empty folder");
        check("notes.txt", "model.safetensors or model.safetensors.index.json, found neither");
        check("pytorch_model.bin", "pickle format (pytorch_model.bin) is not supported");
        check("pytorch_model.bin.index.json", "safe_serialization=True");
        check("model-q4.gguf", "GGUF");
        check("adapter_model.safetensors", "a LoRA adapter");
        check("model-00001-of-00002.safetensors", "without model.safetensors.index.json");
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(CheckpointFolder::open(&folder.path().join("none")), Err(Error::Io { .. })));
        let message = CheckpointFolder::open(&golden("dense_tied/config.json")).unwrap_err().to_string();
        assert!(message.contains("found a file"), "{message}");
    }
}
