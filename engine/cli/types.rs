//! `perilune types`: writes the typed stubs of everything that scripts can call, for an editor with the Lua language server.

use super::output::print;
use crate::error::{Error, Result};
use crate::host::modules::{STDLIB, STUBS};
use serde_json::{Map, Value as Json, json};
use std::path::{Path, PathBuf};

/// Write typed stubs and a .luarc.json, so that an editor completes and checks scripts.
#[derive(clap::Args)]
pub struct Types {
    /// Where .luarc.json and .perilune/types go.
    #[arg(value_name = "FOLDER", default_value = ".")]
    folder: PathBuf,
}

/// Where the stubs go inside the folder.
const LIBRARY: &str = ".perilune/types";

impl Types {
    pub fn run(self) -> Result<()> {
        // The settings first: if they cannot be merged, nothing is written.
        let settings_path = self.folder.join(".luarc.json");
        let settings = merged_settings(&settings_path)?;
        let library = self.folder.join(LIBRARY);
        for (folder, file) in STUBS.iter().map(|file| ("", file)).chain(STDLIB.iter().map(|file| ("std", file))) {
            // require "std.losses" finds std/losses.lua; the stubs lie beside that folder.
            write(&library.join(folder).join(file.path.trim_start_matches("meta/")), file.text)?;
        }
        match settings {
            Some(text) => {
                write(&settings_path, &text)?;
                print(&format!("wrote {} and {}\n", library.display(), settings_path.display()))
            }
            None => print(&format!("wrote {}; {} names it already\n", library.display(), settings_path.display())),
        }
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(|source| Error::io(folder, "make the folder", source))?;
    }
    std::fs::write(path, text).map_err(|source| Error::io(path, "write", source))
}

/// The settings with our library in them, every other entry as the user left it; none if nothing has to change.
fn merged_settings(path: &Path) -> Result<Option<String>> {
    let mut settings = match std::fs::read_to_string(path) {
        Ok(text) => serde_json::from_str::<Map<String, Json>>(&text).map_err(|error| {
            let remedy = format!("a JSON object; add \"{LIBRARY}\" to its \"workspace.library\" by hand");
            Error::format(path, "settings", remedy, error.to_string())
        })?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let mut settings = Map::new();
            settings.insert("$schema".into(), "https://raw.githubusercontent.com/LuaLS/vscode-lua/master/setting/schema.json".into());
            settings.insert("runtime.version".into(), "Lua 5.4".into());
            settings
        }
        Err(error) => return Err(Error::io(path, "read", error)),
    };
    let mut changed = add(path, &mut settings, "workspace.library", LIBRARY)?;
    // Scripts are also looked for beside themselves, which the server does not do by itself.
    changed |= add(path, &mut settings, "runtime.path", "?.lua")?;
    changed |= add(path, &mut settings, "runtime.path", "?/init.lua")?;
    let text = serde_json::to_string_pretty(&settings).expect("JSON that was read is written");
    Ok(changed.then(|| format!("{text}\n")))
}

/// Adds `entry` to the list `key`; whether it was missing. Both spellings are known: `"a.b"` and `{ "a": { "b" } }`.
fn add(path: &Path, settings: &mut Map<String, Json>, key: &str, entry: &str) -> Result<bool> {
    let (outer, inner) = key.split_once('.').expect("keys have two parts");
    let nested = settings.contains_key(outer);
    let slot = if nested {
        let object = settings.get_mut(outer).and_then(Json::as_object_mut);
        object.ok_or_else(|| Error::format(path, outer, "an object", "something else"))?.entry(inner).or_insert_with(|| json!([]))
    } else {
        settings.entry(key).or_insert_with(|| json!([]))
    };
    let list = slot.as_array_mut().ok_or_else(|| Error::format(path, key, "a list", "something else"))?;
    let missing = !list.iter().any(|value| value == entry);
    if missing {
        list.push(entry.into());
    }
    Ok(missing)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_of_the_user_stay_and_a_second_time_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(".luarc.json");
        std::fs::write(&path, r#"{ "workspace": { "library": ["mine"] }, "hint.enable": true }"#).unwrap();
        for _ in 0..2 {
            Types { folder: folder.path().to_path_buf() }.run().unwrap();
        }
        let settings: Json = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!(settings["workspace"]["library"], json!(["mine", LIBRARY]));
        assert_eq!(settings["hint.enable"], json!(true));
        assert!(merged_settings(&path).unwrap().is_none());
        assert!(folder.path().join(LIBRARY).join("std/losses.lua").is_file());
    }

    #[test]
    fn settings_that_are_no_json_are_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(".luarc.json");
        std::fs::write(&path, "-- mine").unwrap();
        let error = Types { folder: folder.path().to_path_buf() }.run().unwrap_err().to_string();
        assert!(error.contains("by hand"), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "-- mine");
    }
}
