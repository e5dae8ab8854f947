//! `MANIFEST.json`: what a checkpoint is (loop, step, generation, metrics) and which files it consists of, with sizes and
//! BLAKE3 hashes. It is written last, so a folder that has one was complete. Knows files and names; no model, no store.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

/// The name of the manifest in the folder of its checkpoint.
pub const MANIFEST_NAME: &str = "MANIFEST.json";
/// The format that this engine writes and reads.
pub const MANIFEST_FORMAT: u32 = 1;
/// No manifest that we write comes near; a larger one is damage, and is not read into memory.
const MANIFEST_BYTES_MAX: u64 = 64 << 20;
/// What the files of a checkpoint may claim together, bytes (1 PiB): more is damage.
const TOTAL_BYTES_MAX: u64 = 1 << 50;
/// The longest path of a file below the folder, bytes.
const PATH_BYTES_MAX: usize = 1024;
/// Bytes hashed at a time: small enough for the second-level cache, large enough for all lanes of the hash.
const BLOCK_BYTES: usize = 256 * 1024;

/// A manifest as it lies on the disk. Only [`Manifest::read`] and the commit of a checkpoint make one.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Manifest {
    /// [`MANIFEST_FORMAT`].
    pub format: u32,
    /// The name of the checkpoint, which is that of its folder.
    pub name: String,
    /// The loop at whose boundary it was taken, for example `train` or `outer[3]/inner`.
    pub loop_path: String,
    /// Iterations of that loop that are behind it.
    pub step: u64,
    /// The generation of the script that ran.
    pub generation: u32,
    /// The build of the engine that wrote it.
    pub engine: String,
    /// When it was taken, Unix seconds.
    pub time: f64,
    /// The numbers logged at that step; one that is not finite is `null`.
    pub metrics: Map<String, Value>,
    /// Whatever the caller added.
    pub facts: Value,
    /// Every file but the manifest itself, sorted by path.
    pub files: Vec<FileEntry>,
    /// BLAKE3 of the bytes on the disk.
    #[serde(skip)]
    pub(super) hash: String,
}

/// A file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FileEntry {
    /// Relative to the folder of the checkpoint, with `/` between names.
    pub path: String,
    pub bytes: u64,
    /// 64 lower-case hexadecimal digits.
    pub blake3: String,
}

impl Manifest {
    /// Reads the manifest of the checkpoint in `folder`. Looks at no other file: see [`Self::quick_check`], [`Self::verify`].
    ///
    /// Errors: [`Error::Format`] names the file, the key, what was expected and what was found, also for paths that lead out
    /// of the folder, stand twice, or claim absurd sizes; [`Error::Io`].
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(MANIFEST_NAME);
        let bytes = read_bytes(folder, &path)?;
        let no_json = |error: serde_json::Error| Error::format(&path, "JSON", "a manifest", error.to_string());
        let keys: Map<String, Value> = serde_json::from_slice(&bytes).map_err(no_json)?;
        let wrong = |place: String, expected: &str, found: &Value| Error::format(&path, place, expected, shown(&found.to_string()));
        // The format comes first: a newer one may have other keys.
        match keys.get("format") {
            Some(format) if format.as_u64() == Some(u64::from(MANIFEST_FORMAT)) => {}
            Some(format) => return Err(wrong("format".into(), &format!("{MANIFEST_FORMAT}, which this engine reads"), format)),
            None => return Err(Error::format(&path, "format", format!("the number {MANIFEST_FORMAT}"), "no such key")),
        }
        // Serde names missing and unknown keys, and those of wrong type only by line: hence these two looks at types.
        if let Some(files) = keys.get("files") {
            let entries = files.as_array().ok_or_else(|| wrong("files".into(), "a list of files", files))?;
            if let Some((index, entry)) = entries.iter().enumerate().find(|(_, entry)| !entry.is_object()) {
                return Err(wrong(format!("files[{index}]"), "an object of path, bytes and blake3", entry));
            }
        }
        let raw: RawManifest = serde_json::from_slice(&bytes).map_err(no_json)?;
        let text = |place: &str, value: Value| match value {
            Value::String(text) => Ok(text),
            other => Err(wrong(place.into(), "a text", &other)),
        };
        let whole = |place: String, value: Value| value.as_u64().ok_or_else(|| wrong(place, "a whole number", &value));
        let generation = whole("generation".into(), raw.generation)?;
        let too_large = |_| Error::format(&path, "generation", format!("at most {}", u32::MAX), generation.to_string());
        let mut files = Vec::with_capacity(raw.files.len());
        for (index, entry) in raw.files.into_iter().enumerate() {
            let bytes = whole(format!("files[{index}].bytes"), entry.bytes)?;
            let blake3 = text(&format!("files[{index}].blake3"), entry.blake3)?;
            if blake3.len() != 64 || !blake3.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
                let expected = "64 lower-case hexadecimal digits";
                return Err(Error::format(&path, format!("files[{index}].blake3"), expected, shown(&blake3)));
            }
            files.push(FileEntry { path: text(&format!("files[{index}].path"), entry.path)?, bytes, blake3 });
        }
        check_files(&path, &files)?;
        let Value::Object(metrics) = raw.metrics else { return Err(wrong("metrics".into(), "an object", &raw.metrics)) };
        Ok(Self {
            format: MANIFEST_FORMAT,
            name: text("name", raw.name)?,
            loop_path: text("loop_path", raw.loop_path)?,
            step: whole("step".into(), raw.step)?,
            generation: u32::try_from(generation).map_err(too_large)?,
            engine: text("engine", raw.engine)?,
            time: raw.time.as_f64().ok_or_else(|| wrong("time".into(), "a number, Unix seconds", &raw.time))?,
            metrics,
            facts: raw.facts,
            files,
            hash: blake3::hash(&bytes).to_hex().to_string(),
        })
    }

    /// BLAKE3 of `MANIFEST.json` as it lies on the disk, 64 hexadecimal digits. Who records it can tell later whether this
    /// is the checkpoint that was meant, and through the hashes in it, whether each file is.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// Bytes of all files, without the manifest.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    /// Reads every file in `folder` once and compares it with this manifest.
    ///
    /// Errors: [`Error::Format`] for the first file that is missing, not listed, of another size or of other content, and
    /// names it; [`Error::Io`]. See [`Self::faults`] for all of them.
    pub fn verify(&self, folder: &Path) -> Result<()> {
        self.quick_check(folder)?;
        let mut block = vec![0; BLOCK_BYTES];
        self.files.iter().try_for_each(|file| check_content(folder, file, &mut block))
    }

    /// Compares names and sizes in `folder` with this manifest, without reading the files. Errors: as [`Self::verify`].
    pub fn quick_check(&self, folder: &Path) -> Result<()> {
        self.compare_names(folder)?.into_iter().next().map_or(Ok(()), |fault| Err(fault.1))
    }

    /// All that [`Self::verify`] would complain about, one error a file; empty if the checkpoint is sound.
    ///
    /// Errors: [`Error::Io`] if the folder cannot be listed.
    pub fn faults(&self, folder: &Path) -> Result<Vec<Error>> {
        let mut faults = self.compare_names(folder)?;
        let mut block = vec![0; BLOCK_BYTES];
        for file in &self.files {
            if !faults.contains_key(&file.path)
                && let Err(fault) = check_content(folder, file, &mut block)
            {
                faults.insert(file.path.clone(), fault);
            }
        }
        Ok(faults.into_values().collect())
    }

    /// What is wrong with the names and sizes in `folder`, by path.
    fn compare_names(&self, folder: &Path) -> Result<BTreeMap<String, Error>> {
        let mut found = FolderContent::of(folder)?;
        let mut faults = BTreeMap::new();
        for file in &self.files {
            let fault = match found.files.remove(&file.path) {
                Some(bytes) if bytes == file.bytes => continue,
                Some(bytes) => (format!("{} bytes", file.bytes), format!("{bytes} bytes")),
                None if found.special.remove(&file.path) => ("a plain file".into(), "a link, a pipe or another special file".into()),
                None => (format!("a file of {} bytes, which the manifest lists", file.bytes), "no such file".into()),
            };
            faults.insert(file.path.clone(), Error::format(folder, &file.path, fault.0, fault.1));
        }
        if found.files.remove(MANIFEST_NAME).is_none() {
            let fault = Error::format(folder, MANIFEST_NAME, "the manifest of a complete checkpoint", "no such file");
            faults.insert(MANIFEST_NAME.into(), fault);
        }
        for path in found.files.into_keys().chain(found.special) {
            let fault = Error::format(folder, shown(&path), "only files that the manifest lists", "a file that it does not list");
            faults.insert(path, fault);
        }
        Ok(faults)
    }

    /// The bytes of the file: indented, and ended by a newline. Notes their hash.
    pub(super) fn encode(&mut self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(self).expect("a JSON tree has only string keys");
        bytes.push(b'\n');
        self.hash = blake3::hash(&bytes).to_hex().to_string();
        bytes
    }
}

/// The manifest's keys, before their types are known. Serde refuses missing, unknown and repeated ones.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawManifest {
    #[serde(rename = "format")]
    _format: Value,
    name: Value,
    loop_path: Value,
    step: Value,
    generation: Value,
    engine: Value,
    time: Value,
    metrics: Value,
    facts: Value,
    files: Vec<RawEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    path: Value,
    bytes: Value,
    blake3: Value,
}

/// What lies below a folder.
#[derive(Default)]
pub(super) struct FolderContent {
    /// Plain files by relative path, with their sizes in bytes.
    pub files: BTreeMap<String, u64>,
    /// Subfolders, each behind those in it.
    pub folders: Vec<String>,
    /// Links, pipes, and names that are not UTF-8 (shown as well as can be).
    pub special: BTreeSet<String>,
}

impl FolderContent {
    /// Lists all below `folder` and follows no link. Errors: [`Error::Io`].
    pub fn of(folder: &Path) -> Result<Self> {
        let mut content = Self::default();
        let mut waiting = vec![String::new()];
        while let Some(below) = waiting.pop() {
            let here = folder.join(&below);
            let failed = |e| Error::io(&here, "list", e);
            for entry in std::fs::read_dir(&here).map_err(failed)? {
                let entry = entry.map_err(failed)?;
                let name = entry.file_name();
                let path = if below.is_empty() { name.to_string_lossy().into() } else { format!("{below}/{}", name.to_string_lossy()) };
                let about = entry.metadata().map_err(|e| Error::io(&entry.path(), "read", e))?;
                if name.to_str().is_none() || !(about.is_file() || about.is_dir()) {
                    content.special.insert(path);
                } else if about.is_dir() {
                    content.folders.push(path.clone());
                    waiting.push(path);
                } else {
                    content.files.insert(path, about.len());
                }
            }
        }
        // A folder is found before those in it.
        content.folders.reverse();
        Ok(content)
    }
}

/// BLAKE3 of all that `source` still gives, in hexadecimal, and how many bytes that were. `each` sees every block, too.
pub(super) fn hash_stream(
    source: &mut impl Read,
    block: &mut [u8],
    mut each: impl FnMut(&[u8]) -> std::io::Result<()>,
) -> std::io::Result<(String, u64)> {
    let mut hasher = blake3::Hasher::new();
    let mut bytes = 0;
    loop {
        match source.read(block) {
            Ok(0) => return Ok((hasher.finalize().to_hex().to_string(), bytes)),
            Ok(count) => {
                hasher.update(&block[..count]);
                each(&block[..count])?;
                bytes += count as u64;
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// A block for [`hash_stream`].
pub(super) fn hash_block() -> Vec<u8> {
    vec![0; BLOCK_BYTES]
}

/// Why `path` may not stand in a manifest, if it may not. It must lead to a file below the folder, on any system.
pub(super) fn path_fault(path: &str) -> Option<&'static str> {
    if path.len() > PATH_BYTES_MAX {
        return Some("a longer path");
    }
    if path.contains(|c: char| c.is_control() || c == '\\') {
        return Some("a control character or a backslash");
    }
    if path.split('/').any(|name| matches!(name, "" | "." | "..")) {
        return Some("an absolute path, `.`, `..` or an empty name");
    }
    (path == MANIFEST_NAME).then_some("the manifest itself")
}

/// Refuses lists of files that no commit can have written.
fn check_files(path: &Path, files: &[FileEntry]) -> Result<()> {
    let mut total = 0u64;
    let mut seen = BTreeSet::new();
    for (index, file) in files.iter().enumerate() {
        let place = format!("files[{index}].path");
        if let Some(fault) = path_fault(&file.path) {
            let expected = format!("a path below the folder of at most {PATH_BYTES_MAX} bytes");
            return Err(Error::format(path, place, expected, format!("{}: {fault}", shown(&file.path))));
        }
        if !seen.insert(file.path.as_str()) {
            return Err(Error::format(path, place, "each path once", format!("{} twice", shown(&file.path))));
        }
        total = total.saturating_add(file.bytes);
        if total > TOTAL_BYTES_MAX {
            let expected = format!("at most {TOTAL_BYTES_MAX} bytes in all files together");
            return Err(Error::format(path, format!("files[{index}].bytes"), expected, format!("{} bytes in this one", file.bytes)));
        }
    }
    for (index, file) in files.iter().enumerate() {
        let folders = file.path.match_indices('/').map(|(end, _)| &file.path[..end]);
        if let Some(folder) = folders.into_iter().find(|folder| seen.contains(folder)) {
            let found = format!("{}, and {} as a file", shown(&file.path), shown(folder));
            return Err(Error::format(path, format!("files[{index}].path"), "a path whose folders are no files", found));
        }
    }
    Ok(())
}

/// The bytes of the manifest at `path`.
fn read_bytes(folder: &Path, path: &Path) -> Result<Vec<u8>> {
    let about = match std::fs::symlink_metadata(path) {
        Ok(about) => about,
        Err(e) if e.kind() == ErrorKind::NotFound && folder.is_dir() => {
            return Err(Error::format(folder, MANIFEST_NAME, "the manifest of a complete checkpoint", "no such file"));
        }
        Err(e) => return Err(Error::io(path, "read", e)),
    };
    if !about.is_file() || about.len() > MANIFEST_BYTES_MAX {
        let found = if about.is_file() { format!("{} bytes", about.len()) } else { "a folder, a link or a special file".into() };
        return Err(Error::format(path, "file", format!("a plain file of at most {MANIFEST_BYTES_MAX} bytes"), found));
    }
    let mut bytes = Vec::with_capacity(about.len() as usize);
    // The limit holds even if the file grows meanwhile.
    File::open(path).and_then(|file| file.take(MANIFEST_BYTES_MAX).read_to_end(&mut bytes)).map_err(|e| Error::io(path, "read", e))?;
    Ok(bytes)
}

/// Reads a file and compares its hash.
fn check_content(folder: &Path, file: &FileEntry, block: &mut [u8]) -> Result<()> {
    let path = folder.join(&file.path);
    let failed = |e| Error::io(&path, "read", e);
    let (hash, _) = hash_stream(&mut File::open(&path).map_err(failed)?, block, |_| Ok(())).map_err(failed)?;
    if hash != file.blake3 {
        return Err(Error::format(
            folder,
            &file.path,
            format!("content of BLAKE3 {}", file.blake3),
            format!("{hash}; the file is damaged"),
        ));
    }
    Ok(())
}

/// Text from a file, short and without control characters.
fn shown(text: &str) -> String {
    let short: String = text.chars().take(100).flat_map(char::escape_debug).collect();
    if text.chars().nth(100).is_some() { short + "..." } else { short }
}

#[cfg(test)]
mod tests {
    use super::super::commit::tests::{about, draft};
    use super::*;
    use serde_json::json;
    use std::path::PathBuf;

    /// A committed checkpoint whose files may be written again.
    fn checkpoint() -> (tempfile::TempDir, PathBuf, Manifest) {
        let folder = tempfile::tempdir().unwrap();
        let manifest = draft(folder.path(), "train-000050", 3).unwrap().commit(about(50)).unwrap();
        let path = folder.path().join("train-000050");
        (folder, path, manifest)
    }

    /// Writes a file anew, also where the old one is read-only.
    fn rewrite(path: &Path, bytes: &[u8]) {
        std::fs::remove_file(path).unwrap();
        std::fs::write(path, bytes).unwrap();
    }

    const WEIGHTS: &str = "model/deep/model.safetensors";

    /// Spoils a checkpoint; both checks must say `wanted`, or, if `hidden`, only the one that reads the files.
    #[track_caller]
    fn check_spoiled(wanted: &str, hidden: bool, spoil: impl Fn(&Path)) {
        let (_folder, path, manifest) = checkpoint();
        manifest.quick_check(&path).unwrap();
        manifest.verify(&path).unwrap();
        assert!(manifest.faults(&path).unwrap().is_empty());
        spoil(&path);
        let message = manifest.verify(&path).expect_err(wanted).to_string();
        assert!(message.contains(wanted), "{message} lacks {wanted}");
        let faults: Vec<String> = manifest.faults(&path).unwrap().iter().map(Error::to_string).collect();
        assert_eq!(faults, [message.as_str()]);
        assert_eq!(manifest.quick_check(&path).err().map(|error| error.to_string()), (!hidden).then_some(message));
    }

    #[test]
    fn a_spoiled_checkpoint_is_found_and_the_file_is_named() {
        let bytes = vec![3u8; 300_001];
        check_spoiled("model.safetensors: expected 300001 bytes, found 300000 bytes", false, |f| rewrite(&f.join(WEIGHTS), &bytes[1..]));
        check_spoiled("empty: expected 0 bytes, found 1 bytes", false, |f| rewrite(&f.join("empty"), b"x"));
        for place in [0, 262_143, 262_144, 300_000] {
            check_spoiled("model/deep/model.safetensors: expected content of BLAKE3", true, |f| {
                let mut flipped = bytes.clone();
                flipped[place] ^= 1;
                rewrite(&f.join(WEIGHTS), &flipped);
            });
        }
        check_spoiled("state.json: expected a file of 13 bytes, which the manifest lists, found no such file", false, |f| {
            std::fs::remove_file(f.join("state.json")).unwrap();
        });
        check_spoiled("model/extra: expected only files that the manifest lists", false, |f| {
            std::fs::write(f.join("model/extra"), "").unwrap()
        });
        check_spoiled("MANIFEST.json: expected the manifest of a complete", false, |f| {
            std::fs::remove_file(f.join(MANIFEST_NAME)).unwrap()
        });
        // A link is refused even where it leads to the same bytes.
        check_spoiled("state.json: expected a plain file, found a link", false, |f| {
            std::fs::rename(f.join("state.json"), f.parent().unwrap().join("outside")).unwrap();
            std::os::unix::fs::symlink("../outside", f.join("state.json")).unwrap();
        });
        check_spoiled("strange: expected only files that the manifest lists", false, |f| {
            std::os::unix::fs::symlink("/etc", f.join("strange")).unwrap();
        });
    }

    #[test]
    fn all_faults_are_named_at_once() {
        let (_folder, path, manifest) = checkpoint();
        rewrite(&path.join(WEIGHTS), &[4; 300_001]);
        std::fs::remove_file(path.join("state.json")).unwrap();
        std::fs::write(path.join("extra\n"), "x").unwrap();
        let faults = manifest.faults(&path).unwrap();
        assert_eq!(faults.len(), 3);
        for (fault, wanted) in faults.iter().zip(["extra\\n", WEIGHTS, "state.json"]) {
            assert!(fault.to_string().contains(wanted), "{fault} lacks {wanted}");
        }
        assert!(matches!(manifest.faults(&path.join("none")), Err(Error::Io { .. })));
    }

    /// The message about a manifest whose key is changed to `value`; a pointer as JSON has them.
    fn message_of(pointer: &str, value: Value) -> String {
        let (_folder, path, _) = checkpoint();
        let file = path.join(MANIFEST_NAME);
        let mut json: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        *json.pointer_mut(pointer).unwrap() = value;
        rewrite(&file, json.to_string().as_bytes());
        let error = Manifest::read(&path).expect_err(pointer);
        assert!(matches!(error, Error::Format { .. }), "{error}");
        error.to_string()
    }

    #[test]
    fn a_wrong_value_is_named_with_its_key() {
        let check = |pointer: &str, value: Value, wanted: &str| {
            let message = message_of(pointer, value);
            assert!(message.contains(&format!("MANIFEST.json: {wanted}")), "{message} lacks {wanted}");
        };
        check("/format", json!(2), "format: expected 1, which this engine reads, found 2");
        check("/format", json!("1"), "format: expected 1, which this engine reads, found \\\"1\\\"");
        check("/name", json!(null), "name: expected a text, found null");
        check("/loop_path", json!([1]), "loop_path: expected a text, found [1]");
        check("/step", json!(-1), "step: expected a whole number, found -1");
        check("/step", json!(1.5), "step: expected a whole number, found 1.5");
        check("/generation", json!(4_294_967_296u64), "generation: expected at most 4294967295, found 4294967296");
        check("/engine", json!({}), "engine: expected a text, found {}");
        check("/time", json!("noon"), "time: expected a number, Unix seconds, found \\\"noon\\\"");
        check("/metrics", json!([]), "metrics: expected an object, found []");
        check("/files", json!("all"), "files: expected a list of files, found \\\"all\\\"");
        check("/files/1", json!("a"), "files[1]: expected an object of path, bytes and blake3, found \\\"a\\\"");
        check("/files/2", json!({ "path": "x", "bytes": 1 }), "JSON: expected a manifest, found missing field `blake3`");
        check("/files/2/bytes", json!(-5), "files[2].bytes: expected a whole number, found -5");
        check(
            "/files/2/bytes",
            json!(u64::MAX),
            "files[2].bytes: expected at most 1125899906842624 bytes in all files together, found 184",
        );
        check("/files/2/blake3", json!("00"), "files[2].blake3: expected 64 lower-case hexadecimal digits, found 00");
        check("/files/2/blake3", json!("Z".repeat(64)), "files[2].blake3: expected 64 lower-case");
        check("/files/2/path", json!(7), "files[2].path: expected a text, found 7");
        check("/files/2/path", json!("empty"), "files[2].path: expected each path once, found empty twice");
        check("/files/2/path", json!("empty/x"), "files[2].path: expected a path whose folders are no files, found empty/x, and empty");
        let long =
            format!("files[2].path: expected a path below the folder of at most 1024 bytes, found {}...: a longer path", "x".repeat(100));
        check("/files/2/path", json!("x".repeat(1025)), &long);
        for outside in ["/etc/passwd", "../x", "a/../../x", "..", ".", "", "a/", "./a", "a//b"] {
            check("/files/2/path", json!(outside), "files[2].path: expected a path below the folder");
        }
        for strange in ["a\\b", "a\u{0}b", "a\nb"] {
            let message = message_of("/files/2/path", json!(strange));
            assert!(message.contains("a control character or a backslash") && !message.contains(['\n', '\0']), "{message:?}");
        }
        check(
            "/files/2/path",
            json!(MANIFEST_NAME),
            "files[2].path: expected a path below the folder of at most 1024 bytes, found MANIFEST.json: the manifest itself",
        );
    }

    #[test]
    fn a_wrong_text_is_refused() {
        let (_folder, path, manifest) = checkpoint();
        let file = path.join(MANIFEST_NAME);
        let text = std::fs::read_to_string(&file).unwrap();
        let check = |text: &[u8], wanted: &str| {
            rewrite(&file, text);
            let message = Manifest::read(&path).expect_err(wanted).to_string();
            assert!(message.contains(wanted), "{message} lacks {wanted}");
        };
        check(b"", "EOF while parsing");
        check(b"[1]", "invalid type");
        check(b"{}", "format: expected the number 1, found no such key");
        check(b"{ \"format\": 1 }", "missing field `name`");
        check(b"\xff", "JSON");
        check("[".repeat(1 << 20).as_bytes(), "JSON");
        check(text.replacen("\"step\": 50", "\"step\": 50, \"step\": 60", 1).as_bytes(), "duplicate field `step`");
        check(text.replacen("\"step\"", "\"steps\"", 1).as_bytes(), "unknown field `steps`");
        check(text.replacen("\"bytes\"", "\"size\"", 1).as_bytes(), "unknown field `size`");
        // No part of it is a manifest.
        for end in (0..text.len() - 1).step_by(7) {
            check(&text.as_bytes()[..end], "MANIFEST.json");
        }
        rewrite(&file, text.as_bytes());
        assert_eq!(Manifest::read(&path).unwrap(), manifest);
        // Another layout is the same manifest to us, but not to who recorded the hash.
        rewrite(&file, serde_json::from_str::<Value>(&text).unwrap().to_string().as_bytes());
        let compact = Manifest::read(&path).unwrap();
        assert_eq!(compact.files, manifest.files);
        assert_ne!(compact.hash(), manifest.hash());
    }

    #[test]
    fn what_is_no_plain_file_is_not_read() {
        let (_folder, path, _) = checkpoint();
        let file = path.join(MANIFEST_NAME);
        std::fs::remove_file(&file).unwrap();
        let check = |wanted: &str| {
            let message = Manifest::read(&path).expect_err(wanted).to_string();
            assert!(message.contains(wanted), "{message} lacks {wanted}");
        };
        check("train-000050: MANIFEST.json: expected the manifest of a complete checkpoint, found no such file");
        File::create(&file).unwrap().set_len(MANIFEST_BYTES_MAX + 1).unwrap();
        check("at most 67108864 bytes, found 67108865 bytes");
        std::fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &file).unwrap();
        check("a folder, a link or a special file");
        assert!(matches!(Manifest::read(&path.join("none")), Err(Error::Io { .. })));
    }
}
