//! Every function and method that scripts can call, with seeded random wrong arguments, in a process of its own with little
//! memory: each call returns or raises an error with the script's line. None panics, hangs or ends the process.
//! The calls are made by tests/fuzz/calls.lua, from the engine's own lists of what it exports.

#![cfg(target_os = "linux")]

use perilune::host::call::Function;
use perilune::host::vm::{NAMESPACES, TOP, classes};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// KiB of address space that the process may have: far more than these calls need, far less than their wrong sizes ask for.
const MEMORY_KIB: usize = 6 << 20;

/// Seconds after which a run counts as hanging; it takes a few.
const SECONDS_MAX: u64 = 240;

/// The lists of the engine as a Lua table: `{ name = ..., class = ... or nil, params = count }`.
fn targets() -> String {
    let mut text = String::from("return {\n");
    let mut add = |owner: &str, class: bool, functions: &[&'static [Function]]| {
        for function in functions.iter().copied().flatten() {
            let key = if class { "class" } else { "space" };
            text.push_str(&format!("  {{ {key} = {owner:?}, name = {:?}, params = {} }},\n", function.name(), function.params.len()));
        }
    };
    add("", false, TOP);
    for (namespace, functions) in NAMESPACES {
        add(namespace, false, functions);
    }
    for class in classes() {
        add(class.name, true, class.methods);
    }
    text.push_str("}\n");
    text
}

/// Runs `calls` random calls from `seed` in a fresh folder.
fn fuzz(seed: u64, calls: usize) {
    let folder = tempfile::tempdir().unwrap();
    // Two folders down, so that a saved "../x" stays inside.
    let work = folder.path().join("outer/work");
    std::fs::create_dir_all(&work).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/calls.lua");
    std::fs::copy(script, work.join("calls.lua")).unwrap();
    std::fs::write(work.join("targets.lua"), targets()).unwrap();
    let command = format!("ulimit -v {MEMORY_KIB}; exec \"$0\" run --quiet calls.lua --seed {seed} --calls {calls}");
    let mut child = Command::new("sh")
        .args(["-c", &command, env!("CARGO_BIN_EXE_perilune")])
        .current_dir(&work)
        .env("RAYON_NUM_THREADS", "2")
        .stdin(Stdio::null())
        .stdout(std::fs::File::create(folder.path().join("stdout")).unwrap())
        .stderr(std::fs::File::create(folder.path().join("stderr")).unwrap())
        .spawn()
        .unwrap();
    let started = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break Some(status);
        }
        if started.elapsed() > Duration::from_secs(SECONDS_MAX) {
            child.kill().unwrap();
            child.wait().unwrap();
            break None;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let read = |path: &Path| String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned();
    let (said, last) = (read(&folder.path().join("stderr")), read(&work.join("last_call.txt")));
    let ended = status.map_or("hung and was ended".into(), |status| status.to_string());
    assert!(status.is_some_and(|status| status.success()), "seed {seed}: {ended} in {last}\n{said}");
    let out = read(&folder.path().join("stdout"));
    assert!(out.contains("every function was called"), "seed {seed}: {out}\n{said}");
    println!("seed {seed}, {:.1} s: {out}", started.elapsed().as_secs_f64());
}

#[test]
fn no_call_with_wrong_arguments_panics_or_hangs() {
    // PERILUNE_FUZZ_SEED and PERILUNE_FUZZ_CALLS search further by hand.
    let number = |name: &str, default: u64| std::env::var(name).map_or(default, |text| text.parse().unwrap());
    fuzz(number("PERILUNE_FUZZ_SEED", 1), number("PERILUNE_FUZZ_CALLS", 20_000) as usize);
}
