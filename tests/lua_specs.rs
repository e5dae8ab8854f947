//! Runs every spec in tests/lua, and checks the lists of files that are embedded in the binary against the folders.

use perilune::host::modules::{Embedded, STDLIB, STUBS};
use perilune::host::progress::Screen;
use perilune::host::vm::Vm;
use std::path::Path;

#[test]
fn every_spec_passes() {
    let mut ran = 0;
    for entry in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lua")).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().is_some_and(|name| name == "harness.lua") || path.extension().is_none_or(|end| end != "lua") {
            continue;
        }
        if let Err(error) = Vm::new(&path, Screen::new(true)).and_then(|vm| vm.load()) {
            panic!("{}: {error}", path.display());
        }
        ran += 1;
    }
    assert!(ran >= 3, "only {ran} specs were found");
}

#[test]
fn the_embedded_lists_name_every_file() {
    let check = |list: &[Embedded], folder: &str, prefix: &str| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
        let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut files: Vec<String> = files.filter(|name| name.ends_with(".lua")).map(|name| format!("{prefix}{name}")).collect();
        files.sort();
        let listed: Vec<&str> = list.iter().map(|file| file.path).collect();
        assert_eq!(files, listed);
    };
    check(STDLIB, "stdlib", "");
    check(STUBS, "stdlib/meta", "meta/");
}
