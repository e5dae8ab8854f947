//! The code of a run: each generation is a list of Lua files, kept in the run's folder by content hash, so that a resumed run
//! executes what it was, whatever has become of the files since.

use super::modules::Source;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// `code/gN.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Generation {
    pub generation: u32,
    /// The boundary from which it holds; none for the first, which holds from the start.
    #[serde(rename = "loop")]
    pub loop_path: Option<String>,
    pub step: u64,
    /// Unix seconds.
    pub time: f64,
    /// The entry script first.
    pub sources: Vec<SourceEntry>,
    /// Why it never led the run; none for one that did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rejected: Option<String>,
}

/// One Lua file of a generation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SourceEntry {
    /// As messages name it: relative to the folder that the run was started in.
    pub path: String,
    pub hash: String,
}

/// The name of a text in `code/objects/`.
pub fn hash(text: &str) -> String {
    blake3::hash(text.as_bytes()).to_hex()[..32].to_string()
}

fn entries(sources: &[Source]) -> Vec<SourceEntry> {
    sources.iter().map(|source| SourceEntry { path: source.path.clone(), hash: hash(&source.text) }).collect()
}

/// Whether two lists hold the same files with the same content, in any order: modules are loaded when they are needed.
pub fn same(a: &[Source], b: &[Source]) -> bool {
    let sorted = |sources: &[Source]| {
        let mut entries: Vec<_> = sources.iter().map(|source| (source.path.clone(), hash(&source.text))).collect();
        entries.sort();
        entries
    };
    sorted(a) == sorted(b)
}

/// Paths of the files that are not the same in two lists: changed, new, or gone.
pub fn changed(before: &[Source], after: &[Source]) -> Vec<String> {
    let text = |sources: &[Source], path: &str| sources.iter().find(|source| source.path == path).map(|source| source.text.clone());
    let mut paths: Vec<String> = before.iter().chain(after).map(|source| source.path.clone()).collect();
    paths.sort();
    paths.dedup();
    paths.retain(|path| text(before, path) != text(after, path));
    paths
}

/// Stores generation `number` of the run in `folder`, durably; one that is there is replaced (it has loaded another module).
///
/// - returns the hash of its list
///
/// Errors: [`Error::Io`].
pub fn save(folder: &Path, number: u32, position: Option<(&str, u64)>, time: f64, sources: &[Source]) -> Result<String> {
    save_as(folder, number, position, time, sources, None)
}

/// As [`save`], for one that was refused, with the reason: the list says so itself, for whoever has no other record of it.
///
/// Errors: [`Error::Io`].
pub fn save_rejected(
    folder: &Path,
    number: u32,
    position: Option<(&str, u64)>,
    time: f64,
    sources: &[Source],
    reason: &str,
) -> Result<String> {
    save_as(folder, number, position, time, sources, Some(reason.into()))
}

fn save_as(
    folder: &Path,
    number: u32,
    position: Option<(&str, u64)>,
    time: f64,
    sources: &[Source],
    rejected: Option<String>,
) -> Result<String> {
    let objects = folder.join("code/objects");
    std::fs::create_dir_all(&objects).map_err(|error| Error::io(&objects, "create", error))?;
    for source in sources {
        let path = objects.join(hash(&source.text));
        if !path.exists() {
            write_durably(&path, source.text.as_bytes())?;
        }
    }
    let (loop_path, step) = position.map_or((None, 0), |(path, step)| (Some(path.to_string()), step));
    let generation = Generation { generation: number, loop_path, step, time, sources: entries(sources), rejected };
    let text = serde_json::to_string_pretty(&generation).expect("strings and numbers become JSON");
    write_durably(&path_of(folder, number), format!("{text}\n").as_bytes())?;
    Ok(hash(&text))
}

fn path_of(folder: &Path, number: u32) -> PathBuf {
    folder.join(format!("code/g{number}.json"))
}

/// The list of generation `number`.
///
/// Errors: [`Error::Io`]; [`Error::Format`] if it is damaged.
pub fn generation(folder: &Path, number: u32) -> Result<Generation> {
    let path = path_of(folder, number);
    let text = std::fs::read_to_string(&path).map_err(|error| Error::io(&path, "read", error))?;
    serde_json::from_str(&text).map_err(|error| Error::format(&path, "generation", "a list of sources", error.to_string()))
}

/// The hash of the list of generation `number`, as [`save`] gave it.
///
/// Errors: [`Error::Io`].
pub fn list_hash(folder: &Path, number: u32) -> Result<String> {
    let path = path_of(folder, number);
    let text = std::fs::read_to_string(&path).map_err(|error| Error::io(&path, "read", error))?;
    Ok(hash(text.trim_end_matches('\n')))
}

/// The files of generation `number`.
///
/// Errors: as [`generation`]; [`Error::Format`] if the content of a file is not what its hash says.
pub fn load(folder: &Path, number: u32) -> Result<Vec<Source>> {
    let read = |entry: SourceEntry| {
        let path = folder.join("code/objects").join(&entry.hash);
        let text = std::fs::read_to_string(&path).map_err(|error| Error::io(&path, "read", error))?;
        if hash(&text) != entry.hash {
            return Err(Error::format(&path, entry.path, "the text that its name is the hash of", "another text"));
        }
        Ok(Source { path: entry.path, text })
    };
    generation(folder, number)?.sources.into_iter().map(read).collect()
}

/// Stores generation `number` of the run in `from` as one of the run in `to`, with all that its list says.
///
/// Errors: as [`load`]; [`Error::Io`].
pub fn copy(from: &Path, to: &Path, number: u32) -> Result<()> {
    let Generation { loop_path, step, time, rejected, .. } = generation(from, number)?;
    save_as(to, number, loop_path.as_deref().map(|path| (path, step)), time, &load(from, number)?, rejected).map(drop)
}

/// Numbers of the generations that are stored.
pub fn numbers(folder: &Path) -> Vec<u32> {
    let entries = std::fs::read_dir(folder.join("code")).into_iter().flatten().flatten();
    let number = |name: String| name.strip_prefix('g')?.strip_suffix(".json")?.parse().ok();
    let mut numbers: Vec<u32> = entries.filter_map(|entry| number(entry.file_name().to_string_lossy().into_owned())).collect();
    numbers.sort_unstable();
    numbers
}

/// Writes a small file whole: beside its place, synced, renamed, the folder synced.
///
/// Errors: [`Error::Io`].
pub fn write_durably(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let new = PathBuf::from(name);
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&new, path)?;
        // A bare name lies in the working folder, which `parent` calls "".
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(folder)?.sync_all()
    };
    write().map_err(|error| Error::io(path, "write", error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generations_come_back_and_damage_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let source = |path: &str, text: &str| Source { path: path.into(), text: text.into() };
        let first = [source("a.lua", "return 1"), source("b.lua", "return 2")];
        save(folder.path(), 0, None, 1.0, &first).unwrap();
        save(folder.path(), 1, Some(("train", 7)), 2.0, &[source("a.lua", "return 3"), first[1].clone()]).unwrap();
        assert_eq!(load(folder.path(), 0).unwrap(), first);
        assert_eq!((numbers(folder.path()), generation(folder.path(), 1).unwrap().step), (vec![0, 1], 7));
        assert_eq!(generation(folder.path(), 1).unwrap().rejected, None);
        save_rejected(folder.path(), 2, Some(("train", 8)), 3.0, &first, "a.lua:1: no").unwrap();
        let other = tempfile::tempdir().unwrap();
        copy(folder.path(), other.path(), 2).unwrap();
        assert_eq!(load(other.path(), 2).unwrap(), first);
        let copied = generation(other.path(), 2).unwrap();
        assert_eq!((copied.rejected.as_deref(), copied.loop_path.as_deref(), copied.step), (Some("a.lua:1: no"), Some("train"), 8));
        assert_eq!(std::fs::read_dir(folder.path().join("code/objects")).unwrap().count(), 3, "equal texts are stored once");
        assert!(same(&first, &[first[1].clone(), first[0].clone()]) && !same(&first, &first[..1]));
        std::fs::write(folder.path().join("code/objects").join(hash("return 2")), "return 4").unwrap();
        assert!(load(folder.path(), 0).unwrap_err().to_string().contains("b.lua"));
    }
}
