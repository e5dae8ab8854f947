//! The house rules that a machine can hold: import directions, one door a dependency, the home of `unsafe`, file heads,
//! names, lengths, links. Each check is a function of texts, and each is shown to fail on a bad sample. It reads lines, not
//! syntax: code that a rule is about is written plainly.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// A file of the repository: path relative to its root with `/`, and text.
struct File {
    path: String,
    text: String,
    /// Whether only tests compile it.
    for_tests: bool,
}

/// The floors of the engine and what each may import. Siblings never import each other.
const FLOORS: [(&str, &[&str]); 11] = [
    ("kernels", &[]),
    ("tensor", &["kernels"]),
    ("data", &["kernels", "tensor"]),
    ("checkpoint", &["kernels", "tensor"]),
    ("store", &["kernels", "tensor"]),
    ("model", &["kernels", "tensor", "data", "checkpoint", "store"]),
    ("train", &["kernels", "tensor", "data", "checkpoint", "store", "model"]),
    ("infer", &["kernels", "tensor", "data", "checkpoint", "store", "model"]),
    ("serve", &["kernels", "tensor", "data", "checkpoint", "store", "model", "train", "infer"]),
    ("host", &["kernels", "tensor", "data", "checkpoint", "store", "model", "train", "infer", "serve"]),
    ("cli", &["kernels", "tensor", "data", "checkpoint", "store", "model", "train", "infer", "serve", "host"]),
];

/// Crates that one place alone may name: a folder, or a file.
const DOORS: [(&str, &[&str]); 21] = [
    ("cudarc", &["engine/kernels/"]),
    ("dfdx", &["engine/tensor/"]),
    ("tokenizers", &["engine/data/"]),
    ("minijinja", &["engine/data/"]),
    ("parquet", &["engine/data/parquet.rs"]),
    ("rustix", &["engine/kernels/arena.rs", "engine/checkpoint/", "engine/store/"]),
    ("similar", &["engine/host/code_diff.rs"]),
    ("console", &["engine/cli/output.rs"]),
    ("blake3", &["engine/data/", "engine/checkpoint/", "engine/store/", "engine/host/"]),
    ("sled", &["engine/store/"]),
    ("axum", &["engine/serve/"]),
    ("tower_http", &["engine/serve/"]),
    ("tokio", &["engine/serve/", "engine/host/"]),
    ("mlua", &["engine/host/"]),
    ("notify", &["engine/host/reload.rs"]),
    ("signal_hook", &["engine/host/interrupt.rs"]),
    ("landlock", &["engine/host/sandbox_walls.rs"]),
    ("seccompiler", &["engine/host/sandbox_walls.rs"]),
    ("nix", &["engine/host/sandbox_walls.rs", "engine/host/sandbox_job.rs"]),
    ("indicatif", &["engine/host/progress.rs", "engine/cli/"]),
    ("clap", &["engine/cli/"]),
];

/// Files with more lines, and why.
const LONG_FILES: [(&str, &str); 0] = [];

/// Most lines of a file, its test modules not counted.
const LINES_MAX: usize = 600;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All files below `folder` with one of these endings, sorted. A folder that does not exist yet has none.
fn files(folder: &str, endings: &[&str]) -> Vec<File> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if endings.iter().any(|ending| path.extension().is_some_and(|extension| extension == *ending)) {
                found.push(path);
            }
        }
    }
    found.sort();
    found.into_iter().map(|path| read(&path)).collect()
}

fn read(path: &PathBuf) -> File {
    let relative = path.strip_prefix(root()).unwrap().to_string_lossy().replace('\\', "/");
    File { path: relative, text: std::fs::read_to_string(path).unwrap(), for_tests: false }
}

fn rust_files() -> Vec<File> {
    let mut files = files("engine", &["rs"]);
    assert!(files.len() > 50, "the engine was not found: {} files", files.len());
    let for_tests: BTreeSet<String> = files.iter().flat_map(test_modules).collect();
    files.iter_mut().for_each(|file| file.for_tests = for_tests.contains(&file.path));
    files
}

fn lua_files() -> Vec<File> {
    ["stdlib", "scripts", "examples", "tests/lua"].iter().flat_map(|folder| files(folder, &["lua"])).collect()
}

/// Runs a check over files and fails with every finding.
fn check(files: &[File], check: impl Fn(&File) -> Vec<String>) {
    let findings: Vec<String> = files.iter().flat_map(check).collect();
    assert!(findings.is_empty(), "{} findings:\n{}", findings.len(), findings.join("\n"));
}

/// The findings of a check on one made-up file.
fn on_sample(check: impl Fn(&File) -> Vec<String>, path: &str, text: &str) -> Vec<String> {
    check(&File { path: path.into(), text: text.into(), for_tests: false })
}

/// Lines of code with their numbers: without comments, the insides of string literals, and test modules.
fn code(file: &File) -> Vec<(usize, String)> {
    let (mut lines, mut for_tests, mut inside_tests) = (Vec::new(), false, false);
    for (index, line) in file.text.lines().enumerate() {
        if inside_tests {
            // rustfmt puts the end of a module that stands at the top of a file in the first column.
            inside_tests = line != "}";
            continue;
        }
        inside_tests = for_tests && has_word(line, "mod") && line.ends_with('{');
        for_tests = line.trim() == "#[cfg(test)]";
        if !inside_tests {
            lines.push((index + 1, without_literals(line)));
        }
    }
    lines
}

/// The line without its comment, and with string literals emptied.
fn without_literals(line: &str) -> String {
    let (mut out, mut chars, mut inside) = (String::new(), line.chars().peekable(), false);
    while let Some(c) = chars.next() {
        match c {
            '\\' if inside => {
                chars.next();
            }
            '"' => {
                // A quote between single quotes is a character.
                if !inside && out.ends_with('\'') && chars.peek() == Some(&'\'') {
                    continue;
                }
                inside = !inside;
                out.push('"');
            }
            '/' if !inside && chars.peek() == Some(&'/') => break,
            _ if inside => {}
            _ => out.push(c),
        }
    }
    out
}

/// The files that a file declares for tests alone: `#[cfg(test)] mod name;`, or another file by `#[path]`.
fn test_modules(file: &File) -> Vec<String> {
    let (folder, own) = file.path.rsplit_once('/').unwrap_or(("", &file.path));
    let (mut found, mut for_tests, mut elsewhere) = (Vec::new(), false, None);
    for line in file.text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("#[path = \"") {
            elsewhere = name.split('"').next();
            continue;
        }
        let module = line.strip_suffix(';').and_then(|line| line.split_once("mod ")).map(|(_, name)| name);
        if let Some(name) = module.filter(|_| for_tests) {
            // Modules of x.rs lie in x/, those of mod.rs beside it.
            let inner = if own == "mod.rs" { folder.to_owned() } else { format!("{folder}/{}", own.trim_end_matches(".rs")) };
            found.push(elsewhere.map_or_else(|| format!("{inner}/{name}.rs"), |name| format!("{folder}/{name}")));
        }
        for_tests = line == "#[cfg(test)]";
        elsewhere = None;
    }
    found
}

/// Names that follow `prefix` as whole words in a line: `crate::a::b` and the first names of `crate::{a::b, c}`.
fn names_after(line: &str, prefix: &str) -> Vec<String> {
    let word = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut names = Vec::new();
    for (at, _) in line.match_indices(prefix) {
        if line[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_') {
            continue;
        }
        let rest = &line[at + prefix.len()..];
        match rest.strip_prefix('{') {
            Some(list) => {
                let mut depth = 0;
                for part in list.split_inclusive(['{', ',', '}']) {
                    if depth == 0 && !word(part.trim()).is_empty() {
                        names.push(word(part.trim()));
                    }
                    depth += part.matches('{').count() as i32 - part.matches('}').count() as i32;
                    if depth < 0 {
                        break;
                    }
                }
            }
            None => names.push(word(rest)),
        }
    }
    names
}

/// Imports of a floor that is not below.
fn imports(file: &File) -> Vec<String> {
    let Some((floor, below)) = FLOORS.iter().find(|(floor, _)| file.path.starts_with(&format!("engine/{floor}/"))) else {
        return Vec::new();
    };
    let known: BTreeSet<&str> = FLOORS.iter().map(|(floor, _)| *floor).collect();
    let mut findings = Vec::new();
    // A list of imports may run over lines, so the file is read as one line of code, tests included: they live in the house.
    let all = file.text.lines().map(without_literals).collect::<Vec<_>>().join(" ");
    for name in names_after(&all.replace("crate:: {", "crate::{"), "crate::") {
        if known.contains(name.as_str()) && name != *floor && !below.contains(&name.as_str()) {
            findings.push(format!("{}: {floor} must not import {name}", file.path));
        }
    }
    findings
}

/// Crates named outside their door.
fn doors(file: &File) -> Vec<String> {
    let mut findings = Vec::new();
    for (number, line) in file.text.lines().enumerate().map(|(index, line)| (index + 1, without_literals(line))) {
        for (name, homes) in DOORS {
            // Our own modules and fields of that name do not count.
            let names = line.match_indices(&format!("{name}::")).any(|(at, _)| {
                let before = &line[..at];
                !before.ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':')
            }) || line.trim_start().starts_with(&format!("use {name};"));
            if names && !homes.iter().any(|home| file.path.starts_with(home)) {
                findings.push(format!("{}:{number}: {name} is named in {} only", file.path, homes.join(", ")));
            }
        }
    }
    findings
}

/// Printing that panics when the reader has gone or the disk is full; `cli/output.rs` does it well.
fn printing(file: &File) -> Vec<String> {
    let prints =
        |line: &str| ["print!(", "println!("].iter().any(|call| has_word(line, call.trim_end_matches("!(")) && line.contains(call));
    let lines = if file.path.starts_with("engine/cli/") { code(file) } else { Vec::new() };
    let finding = |(number, _): &(usize, String)| format!("{}:{number}: commands print through cli/output.rs", file.path);
    lines.iter().filter(|(_, line)| prints(line)).map(finding).collect()
}

/// Whether the line has `word` as a whole word.
fn has_word(line: &str, word: &str) -> bool {
    let outside = |c: char| !(c.is_alphanumeric() || c == '_');
    line.match_indices(word)
        .any(|(at, _)| line[..at].chars().next_back().is_none_or(outside) && line[at + word.len()..].chars().next().is_none_or(outside))
}

/// `unsafe` outside the kernels, and unsafe blocks there without an argument in the lines above.
fn unsafe_code(file: &File) -> Vec<String> {
    let lines: Vec<&str> = file.text.lines().collect();
    let mut findings = Vec::new();
    for (number, line) in file.text.lines().enumerate().map(|(index, line)| (index + 1, without_literals(line))) {
        if !has_word(&line, "unsafe") {
            continue;
        }
        if !file.path.starts_with("engine/kernels/") {
            findings.push(format!("{}:{number}: unsafe lives in engine/kernels only", file.path));
        } else if line.contains("unsafe {") || line.contains("unsafe impl") {
            let above = &lines[number.saturating_sub(13)..number];
            if !above.iter().any(|line| line.contains("SAFETY:")) {
                findings.push(format!("{}:{number}: unsafe without a SAFETY comment above", file.path));
            }
        }
    }
    findings
}

fn header(file: &File) -> Vec<String> {
    let (mark, what) = if file.path.ends_with(".lua") { ("---", "`---`") } else { ("//!", "`//!`") };
    let first = file.text.lines().next().unwrap_or("");
    let fits = first.strip_prefix(mark).is_some_and(|rest| rest.trim().len() > 10 || rest.trim_start().starts_with("@meta"));
    if fits { Vec::new() } else { vec![format!("{}: begins with a {what} line that says what it is", file.path)] }
}

fn name(file: &File) -> Vec<String> {
    let bad = ["util", "utils", "common", "helper", "helpers", "misc"];
    let parts = file.path.split('/').map(|part| part.split('.').next().unwrap_or(part));
    parts.filter(|part| bad.contains(part)).map(|part| format!("{}: nothing is called {part}", file.path)).collect()
}

fn length(file: &File) -> Vec<String> {
    let count = code(file).len();
    let excepted = file.for_tests || LONG_FILES.iter().any(|(path, _)| *path == file.path);
    if count <= LINES_MAX || excepted { Vec::new() } else { vec![format!("{}: {count} lines, at most {LINES_MAX}", file.path)] }
}

fn unfinished(file: &File) -> Vec<String> {
    let marks = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("X", "XX")];
    let calls = [concat!("to", "do!("), concat!("unimpl", "emented!("), concat!("d", "bg!(")];
    let mut findings = Vec::new();
    for (index, line) in file.text.lines().enumerate() {
        if marks.iter().any(|mark| has_word(line, mark)) || calls.iter().any(|call| without_literals(line).contains(call)) {
            findings.push(format!("{}:{}: unfinished: {}", file.path, index + 1, line.trim()));
        }
    }
    findings
}

fn unwraps(file: &File) -> Vec<String> {
    if file.for_tests {
        return Vec::new();
    }
    let lines = code(file).into_iter().filter(|(_, line)| line.contains(concat!(".unw", "rap()")));
    lines.map(|(number, _)| format!("{}:{number}: unwrap outside tests; expect(\"why this cannot fail\") or `?`", file.path)).collect()
}

/// Paths of the machine that something was written on.
fn private_paths(file: &File) -> Vec<String> {
    let roots = ["work", "home", "root", "Users", "opt"].map(|name| format!("/{name}/"));
    let mut findings = Vec::new();
    for (index, line) in file.text.lines().enumerate() {
        let named = roots.iter().any(|root| {
            // At the start of a path: `data/work/x` and `https://host/home/` are others.
            line.match_indices(root.as_str())
                .any(|(at, _)| line[..at].chars().next_back().is_none_or(|c| !(c.is_alphanumeric() || "/.-_)}".contains(c))))
        });
        if named {
            findings.push(format!("{}:{}: names a private path: {}", file.path, index + 1, line.trim()));
        }
    }
    findings
}

/// Relative links and `code paths` of a page that lead nowhere, judged by `exists`.
fn dead_links(file: &File, exists: &dyn Fn(&str) -> bool) -> Vec<String> {
    let folder = file.path.rsplit_once('/').map_or("", |(folder, _)| folder);
    let mut findings = Vec::new();
    for (index, line) in file.text.lines().enumerate() {
        for (at, _) in line.match_indices("](") {
            let target = line[at + 2..].split([')', '#', ' ']).next().unwrap_or("");
            if target.is_empty() || target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            let path = if folder.is_empty() { target.to_owned() } else { format!("{folder}/{target}") };
            if !exists(&path) {
                findings.push(format!("{}:{}: a link to {target}, which does not exist", file.path, index + 1));
            }
        }
        // `engine/model/graph.rs` in backticks is a promise too; patterns and placeholders are not.
        for quoted in line.split('`').skip(1).step_by(2) {
            let is_path = ["engine/", "stdlib/", "scripts/", "examples/", "tests/"].iter().any(|root| quoted.starts_with(root));
            if is_path && !quoted.contains(['*', '<', '{', ' ', ',']) && !exists(quoted) {
                findings.push(format!("{}:{}: names {quoted}, which does not exist", file.path, index + 1));
            }
        }
    }
    findings
}

/// The pages at the top, those that exist.
fn pages() -> Vec<File> {
    ["README.md", "architecture.md", "CHANGELOG.md", "checkpoints/README.md", "tests/golden/README.md", "tests/bench/RESULTS.md"]
        .iter()
        .map(|page| root().join(page))
        .filter(|path| path.exists())
        .map(|path| read(&path))
        .collect()
}

#[test]
fn floors_import_only_floors_below() {
    check(&rust_files(), imports);
    let sample = "//! A.\nuse crate::kernels::buffer::Buffer;\nuse crate::{\n    model::{Model, config},\n    error::Error,\n};\n";
    assert_eq!(on_sample(imports, "engine/tensor/a.rs", sample).len(), 1);
    assert_eq!(on_sample(imports, "engine/train/a.rs", "let x = crate::infer::generate::generate();").len(), 1);
    assert_eq!(on_sample(imports, "engine/data/a.rs", "use crate::checkpoint::folder;").len(), 1, "siblings");
    assert!(on_sample(imports, "engine/cli/a.rs", "use crate::{host::vm, kernels};\n// crate::nothing").is_empty());
}

#[test]
fn every_floor_has_its_place_in_the_order() {
    let known: BTreeSet<&str> = FLOORS.iter().map(|(floor, _)| *floor).collect();
    for entry in std::fs::read_dir(root().join("engine")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        assert!(!path.is_dir() || known.contains(name.as_str()), "engine/{name} is no floor that this test knows");
    }
    for (index, (floor, below)) in FLOORS.iter().enumerate() {
        assert!(below.iter().all(|name| FLOORS[..index].iter().any(|(floor, _)| floor == name)), "{floor} imports upwards");
    }
}

#[test]
fn every_dependency_has_one_door() {
    check(&rust_files(), doors);
    assert_eq!(on_sample(doors, "engine/cli/a.rs", "let lua = mlua::Lua::new();").len(), 1);
    assert_eq!(on_sample(doors, "engine/host/vm.rs", "use notify::Watcher;").len(), 1);
    assert!(on_sample(doors, "engine/host/reload.rs", "use notify::Watcher;").is_empty());
    assert!(on_sample(doors, "engine/model/a.rs", "use crate::data::tokenizers::Tokenizer; // mlua::Lua").is_empty());
}

#[test]
fn unsafe_lives_in_the_kernels_and_argues() {
    check(&rust_files(), unsafe_code);
    assert_eq!(on_sample(unsafe_code, "engine/model/a.rs", "let x = unsafe { y() };").len(), 1);
    assert_eq!(on_sample(unsafe_code, "engine/kernels/a.rs", "let x = unsafe { y() };").len(), 1);
    assert!(on_sample(unsafe_code, "engine/kernels/a.rs", "// SAFETY: y asks for nothing.\nlet x = unsafe { y() };").is_empty());
    assert!(on_sample(unsafe_code, "engine/lib.rs", "#![deny(unsafe_code)] // unsafe").is_empty());
}

#[test]
fn every_file_says_what_it_is() {
    check(&rust_files(), header);
    check(&files("tests", &["rs"]), header);
    check(&lua_files(), header);
    assert_eq!(on_sample(header, "engine/a.rs", "use std::fs;\n//! Late.").len(), 1);
    assert_eq!(on_sample(header, "engine/a.rs", "//!").len(), 1);
    assert_eq!(on_sample(header, "stdlib/a.lua", "local x = 1").len(), 1);
    assert!(on_sample(header, "stdlib/meta/a.lua", "---@meta").is_empty());
}

#[test]
fn files_are_named_by_a_noun_of_the_field() {
    check(&rust_files(), name);
    check(&lua_files(), name);
    assert_eq!(on_sample(name, "engine/model/utils.rs", "").len(), 1);
    assert_eq!(on_sample(name, "engine/helpers/mod.rs", "").len(), 1);
    assert!(on_sample(name, "engine/model/names.rs", "").is_empty());
}

#[test]
fn files_are_short() {
    check(&rust_files(), length);
    for (path, reason) in LONG_FILES {
        let lines = code(&read(&root().join(path))).len();
        assert!(lines > LINES_MAX && !reason.is_empty(), "{path} has {lines} lines and needs no exception");
    }
    assert_eq!(on_sample(length, "engine/model/a.rs", &"x\n".repeat(601)).len(), 1);
    assert!(on_sample(length, "engine/model/a.rs", &format!("#[cfg(test)]\nmod tests {{\n{}}}\n", "x\n".repeat(601))).is_empty());
}

#[test]
fn nothing_is_left_unfinished() {
    check(&rust_files(), unfinished);
    check(&lua_files(), unfinished);
    for sample in [concat!("// TO", "DO: later"), concat!("    to", "do!()"), concat!("unimpl", "emented!(\"x\")"), concat!("-- FIX", "ME")]
    {
        assert_eq!(on_sample(unfinished, "engine/a.rs", sample).len(), 1, "{sample}");
    }
    assert!(on_sample(unfinished, "engine/a.rs", "let todo_list = 1; // mastodon").is_empty());
}

#[test]
fn unwrap_stays_in_tests() {
    check(&rust_files(), unwraps);
    let call = concat!("x.unw", "rap();\n");
    assert_eq!(on_sample(unwraps, "engine/a.rs", call).len(), 1);
    assert!(on_sample(unwraps, "engine/a.rs", &format!("#[cfg(test)]\npub(super) mod tests {{\n    {call}}}\n")).is_empty());
    assert_eq!(on_sample(unwraps, "engine/a.rs", &format!("#[cfg(test)]\nmod tests {{\n}}\n{call}")).len(), 1);
    assert_eq!(
        on_sample(unwraps, "engine/a.rs", &format!("#[cfg(test)]\nmod samples;\n{call}")).len(),
        1,
        "code goes on after a test module's name"
    );
    assert!(on_sample(unwraps, "engine/a.rs", &format!("// {call}let text = \"{}\";", call.trim())).is_empty());
}

#[test]
fn commands_print_through_one_place() {
    check(&rust_files(), printing);
    assert_eq!(on_sample(printing, "engine/cli/a.rs", "println!(\"x\");\nprint!(\"x\");\neprintln!();\n").len(), 2);
    assert!(on_sample(printing, "engine/cli/a.rs", "eprint!(\"x\");\nprint(&text)?;\n").is_empty());
}

#[test]
fn nothing_names_a_private_path() {
    check(&rust_files(), private_paths);
    check(&lua_files(), private_paths);
    check(&pages(), private_paths);
    check(&files("tests", &["rs", "py", "sh"]), private_paths);
    check(&files(".ci", &["sh", "yml"]), private_paths);
    for sample in ["read ~ from /hom\u{65}/me/x", "\"/wor\u{6b}/data\"", "(/op\u{74}/venv/bin/python)"] {
        assert_eq!(on_sample(private_paths, "README.md", sample).len(), 1, "{sample}");
    }
    assert!(on_sample(private_paths, "README.md", "https://example.org/home/x and data/work/x").is_empty());
}

#[test]
fn links_lead_somewhere() {
    let exists = |path: &str| root().join(path).exists();
    for page in pages() {
        let findings = dead_links(&page, &exists);
        assert!(findings.is_empty(), "{}", findings.join("\n"));
    }
    let sample = |text: &str| on_sample(|file| dead_links(file, &exists), "README.md", text).len();
    assert_eq!(sample("[map](missing.md) and `engine/missing.rs`"), 2);
    assert_eq!(sample("[map](Cargo.toml#x), [web](https://example.org/x), `engine/lib.rs`, `tests/golden_*.rs`"), 0);
    assert_eq!(on_sample(|file| dead_links(file, &exists), "tests/golden/README.md", "[x](../../Cargo.toml)").len(), 0);
}

#[test]
fn changes_are_listed() {
    let changes = std::fs::read_to_string(root().join("CHANGELOG.md")).expect("CHANGELOG.md exists");
    assert!(changes.lines().any(|line| line.starts_with("- ")), "CHANGELOG.md lists nothing");
}

#[test]
fn modules_for_tests_are_known() {
    let sample = "#[cfg(test)]\nmod samples;\npub mod graph;\n#[cfg(test)]\n#[path = \"b_tests.rs\"]\nmod tests;\n";
    assert_eq!(on_sample(test_modules, "engine/a/mod.rs", sample), ["engine/a/samples.rs", "engine/a/b_tests.rs"]);
    let sample = "#[cfg(test)]\n#[path = \"b_tests.rs\"]\nmod tests;\n";
    assert_eq!(on_sample(test_modules, "engine/a/b.rs", sample), ["engine/a/b_tests.rs"]);
    assert!(rust_files().iter().filter(|file| file.for_tests).count() >= 3);
}

#[test]
fn literals_and_comments_are_no_code() {
    assert_eq!(without_literals(r#"let a = "unsafe // \" x"; b // unsafe"#), r#"let a = ""; b "#);
    assert_eq!(without_literals(r#"if c == '"' { unsafe }"#), r#"if c == '' { unsafe }"#);
    assert_eq!(names_after("use crate::{a::{b, c}, d}; xcrate::e; crate::f::g", "crate::"), ["a", "d", "f"]);
}
