//! Results of recorded steps: small ones lie in the record, larger ones and tensors in files of the run, by content hash.

use super::call::{Answer, Failed};
use super::code::write_durably;
use super::plain::{Plain, tensor_bytes};
use super::run::Run;
use crate::checkpoint::catalog::create_durably;
use crate::checkpoint::safetensors::SafetensorsFile;
use crate::checkpoint::stored_dtype::StoredDtype;
use crate::checkpoint::writer::{FolderWriter, SHARD_BYTES_MAX, TensorSpec};
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use crate::store::records::{INLINE_BYTES_MAX, Output};
use crate::tensor::AnyTensor;
use half::bf16;
use mlua::{Lua, MultiValue, Value};
use serde_json::Value as Json;
use std::path::Path;

/// Bytes of an inline result: some room is left for the rest of the record.
const INLINE_MAX: usize = INLINE_BYTES_MAX - 1024;

/// Stores what the body of the step `key` returned, durably if it goes to files.
///
/// - returns what the record keeps, and the values as every later execution will get them
///
/// Errors: those of [`Plain::of`] and of writing.
pub fn write(lua: &Lua, run: &Run, key: &str, values: MultiValue) -> Failed<(Output, MultiValue)> {
    let mut whole = Plain::default();
    let mut parts = Vec::new();
    for (index, value) in values.iter().enumerate() {
        parts.push(whole.add("Run:step", &format!("result {} of `{key}`", index + 1), value, 0)?);
    }
    whole.json = Json::Array(parts);
    let text = whole.json.to_string();
    let output = if whole.tensors.is_empty() && text.len() <= INLINE_MAX {
        Output::Inline(whole.json.clone())
    } else {
        let hash = blake3::hash(whole.canonical().as_bytes()).to_hex()[..32].to_string();
        let folder = run.folder.join("steps");
        create_durably(&folder)?;
        if !whole.tensors.is_empty() {
            write_tensors(&folder.join(&hash), &whole.tensors)?;
        }
        write_durably(&folder.join(format!("{hash}.json")), text.as_bytes())?;
        Output::File { hash, bytes: text.len() as u64 + whole.tensor_bytes() as u64 }
    };
    let values = build(lua, &whole)?;
    Ok((output, values))
}

/// The values of a recorded step.
///
/// Errors: as [`recorded`].
pub fn read(lua: &Lua, run: &Run, key: &str, output: &Output) -> Answer {
    build(lua, &recorded(&run.folder, key, output)?)
}

/// What the step `key` of the run in `folder` returned, as it is stored.
///
/// Errors: [`Error::Format`] if its files are damaged; [`Error::Io`].
pub fn recorded(folder: &Path, key: &str, output: &Output) -> Result<Plain> {
    let hash = match output {
        Output::Inline(json) => return Ok(Plain { json: json.clone(), tensors: Vec::new() }),
        Output::File { hash, .. } => hash,
    };
    let folder = folder.join("steps");
    let path = folder.join(format!("{hash}.json"));
    let text = std::fs::read_to_string(&path).map_err(|error| Error::io(&path, "read", error))?;
    let json = serde_json::from_str(&text).map_err(|error| Error::format(&path, key, "a recorded result", error.to_string()))?;
    let tensors = folder.join(hash);
    let tensors = if tensors.is_dir() { read_tensors(&tensors)? } else { Vec::new() };
    let plain = Plain { json, tensors };
    let found = &blake3::hash(plain.canonical().as_bytes()).to_hex()[..32];
    if found != hash {
        return Err(Error::format(&path, key, format!("a result of hash {hash}"), format!("one of {found}")));
    }
    Ok(plain)
}

fn build(lua: &Lua, plain: &Plain) -> Failed<MultiValue> {
    let parts = plain.json.as_array().cloned().unwrap_or_default();
    let value = |json: Json| Plain { json, tensors: plain.tensors.clone() }.to_lua(lua);
    Ok(parts.into_iter().map(value).collect::<Failed<Vec<Value>>>()?.into_iter().collect())
}

/// The one file of a folder of tensors, without its ending.
const STEM: &str = "tensors";

/// Writes `tensors` into the folder `target`, by number.
///
/// Errors: those of [`FolderWriter`].
pub fn write_tensors(target: &Path, tensors: &[AnyTensor]) -> Result<()> {
    let name = |index: usize| format!("{index:06}");
    let spec = |(index, tensor): (usize, &AnyTensor)| TensorSpec {
        name: name(index),
        dtype: StoredDtype::from(tensor.dtype()),
        shape: tensor.shape().to_vec(),
    };
    let specs = tensors.iter().enumerate().map(spec).collect();
    let mut writer = FolderWriter::create_named(target, STEM, specs, SHARD_BYTES_MAX.max(u64::MAX / 2))?;
    for (index, tensor) in tensors.iter().enumerate() {
        writer.write_bytes(&name(index), &tensor_bytes(tensor))?;
    }
    writer.finish()
}

/// Reads what [`write_tensors`] wrote.
///
/// Errors: [`Error::Format`] for a file of something else; [`Error::Io`].
pub fn read_tensors(folder: &Path) -> Result<Vec<AnyTensor>> {
    let file = SafetensorsFile::open(&folder.join(format!("{STEM}.safetensors")))?;
    let mut names: Vec<(String, StoredDtype, Vec<usize>)> =
        file.tensors().iter().map(|info| (info.name.clone(), info.dtype, info.shape.clone())).collect();
    names.sort_by(|a, b| a.0.cmp(&b.0));
    let tensor = |(name, dtype, shape): (String, StoredDtype, Vec<usize>)| match dtype {
        StoredDtype::F32 => AnyTensor::new(&shape, Buffer::copy_of(&file.read_floats::<f32>(&name)?)),
        StoredDtype::Bf16 => AnyTensor::new(&shape, Buffer::copy_of(&file.read_floats::<bf16>(&name)?)),
        StoredDtype::I32 => {
            let values: Vec<i32> = file.read_integers(&name)?.into_iter().map(|value| value as i32).collect();
            AnyTensor::new(&shape, Buffer::copy_of(&values))
        }
        StoredDtype::I8 => {
            let values: Vec<i8> = file.read_integers(&name)?.into_iter().map(|value| value as i8).collect();
            AnyTensor::new(&shape, Buffer::copy_of(&values))
        }
        other => Err(Error::format(file.path(), name, "f32, bf16, i32 or i8", other.name())),
    };
    names.into_iter().map(tensor).collect()
}
