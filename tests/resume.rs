//! A run that is killed and resumed ends as the run that was not: metrics, weights, optimizer, cursor and random numbers are
//! equal to the bit. Processes are ended inside the program, at failpoints, and from outside, by SIGKILL at random instants.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A folder for runs, with the text they train on.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let text: String = (0..300).map(|n| format!("line {n} of {}\n", "words and more words".repeat(n % 4))).collect();
        std::fs::write(folder.path().join("text.txt"), text).unwrap();
        Self(folder)
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_perilune"));
        command.args(words).current_dir(self.0.path()).env_remove("PERILUNE_FAILPOINT").stdin(Stdio::null());
        command
    }

    fn start(&self, name: &str, args: &[&str]) -> Command {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/resumable.lua");
        let mut words = vec!["run", "--quiet", "--seed", "5", "--runs", name, script.to_str().unwrap()];
        words.extend(args);
        self.command(&words)
    }

    fn resume(&self, name: &str) -> Command {
        self.command(&["resume", "latest", "--quiet", "--runs", name])
    }

    /// The only run in `name`.
    fn folder(&self, name: &str) -> PathBuf {
        let mut entries = std::fs::read_dir(self.0.path().join(name)).unwrap();
        let folder = entries.next().unwrap().unwrap().path();
        assert!(entries.next().is_none(), "more than one run in {name}");
        folder
    }

    fn has_run(&self, name: &str) -> bool {
        let entries = std::fs::read_dir(self.0.path().join(name)).into_iter().flatten().flatten();
        entries.into_iter().any(|entry| entry.path().join("run.json").is_file())
    }

    /// Resumes until the run is finished.
    fn finish(&self, name: &str) {
        let output = self.resume(name).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() || text.contains("the run is finished"), "{name}: {text}");
    }
}

/// Everything of a finished run that must be equal to the bit.
fn outcome(run: &Path) -> Vec<(String, Vec<u8>)> {
    let mut names: Vec<_> =
        std::fs::read_dir(run.join("checkpoints")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    let last = run.join("checkpoints").join(names.last().unwrap());
    let files = [
        ("metrics", run.join("metrics.jsonl")),
        ("saved weights", run.join("final/model.safetensors")),
        ("weights", last.join("models/model/model.safetensors")),
        ("masters and gradients", last.join("training/model/training_state.safetensors")),
        ("moments", last.join("optimizers/adamw of model/adamw.safetensors")),
        ("counters", last.join("optimizers/adamw of model/adamw.json")),
        ("tensors of state", last.join("states/seen/tensors.safetensors")),
    ];
    let mut outcome: Vec<_> = files
        .into_iter()
        .map(|(what, path)| (what.to_string(), std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))))
        .collect();
    let state: serde_json::Value = serde_json::from_slice(&std::fs::read(last.join("state.json")).unwrap()).unwrap();
    for key in ["data", "random", "states", "loops", "models", "optimizers"] {
        outcome.push((key.into(), state[key].to_string().into_bytes()));
    }
    outcome.push(("name of the last checkpoint".into(), names.last().unwrap().clone().into_bytes()));
    outcome
}

fn check_equal(expected: &[(String, Vec<u8>)], run: &Path, when: &str) {
    for ((what, expected), (_, got)) in expected.iter().zip(outcome(run)) {
        assert!(*expected == got, "{what} differ after {when} in {}", run.display());
    }
}

const KINDS: [&[&str]; 4] = [&[], &["--dtype", "bf16"], &["--experts", "4"], &["--experts", "4", "--dtype", "bf16"]];

#[test]
fn a_run_killed_after_any_step_ends_as_if_it_had_not_been() {
    for (kind, args) in KINDS.iter().enumerate() {
        let place = Place::new();
        assert!(place.start("whole", args).output().unwrap().status.success());
        let expected = outcome(&place.folder("whole"));
        for step in 1..=40 {
            let name = format!("killed-{step}");
            // One thread and two give the same bits, before and after.
            let threads = |count: usize| if count.is_multiple_of(2) { "1" } else { "2" };
            let killed = place
                .start(&name, args)
                .env("PERILUNE_FAILPOINT", format!("loop.boundary={step}*exit"))
                .env("PERILUNE_THREADS", threads(step))
                .output()
                .unwrap();
            assert_eq!(killed.status.code(), Some(137), "{}", String::from_utf8_lossy(&killed.stderr));
            let resumed = place.resume(&name).env("PERILUNE_THREADS", threads(step / 2)).output().unwrap();
            assert!(resumed.status.success(), "kind {kind}, step {step}: {}", String::from_utf8_lossy(&resumed.stderr));
            check_equal(&expected, &place.folder(&name), &format!("an end at boundary {step}, kind {kind}"));
        }
    }
}

#[test]
fn failures_at_every_stage_of_a_checkpoint_leave_a_run_that_goes_on() {
    let place = Place::new();
    assert!(place.start("whole", &[]).output().unwrap().status.success());
    let expected = outcome(&place.folder("whole"));
    let points =
        ["begin", "write", "sync", "manifest", "rename", "renamed", "committed", "remove"].map(|point| format!("checkpoint.{point}"));
    let points = points.into_iter().chain(["store.put", "store.flush", "store.sync", "store.ack"].map(String::from));
    for point in points {
        for action in ["error", "no_space", "panic", "exit"] {
            let name = format!("{point}-{action}");
            let failed = place.start(&name, &[]).env("PERILUNE_FAILPOINT", format!("{point}=4*{action}")).output().unwrap();
            let text = String::from_utf8_lossy(&failed.stderr).into_owned();
            assert!(!failed.status.success(), "{name} did not fail");
            if action == "error" || action == "no_space" {
                assert!(text.contains("error: "), "{name}: {text}");
            }
            place.finish(&name);
            check_equal(&expected, &place.folder(&name), &name);
        }
    }
}

#[test]
fn sigkill_at_random_instants_loses_nothing() {
    let place = Place::new();
    let args = ["--dtype", "bf16", "--every", "1"];
    assert!(place.start("whole", &args).output().unwrap().status.success());
    let expected = outcome(&place.folder("whole"));
    // A seed from the clock, printed: the instants are not repeatable anyway.
    let mut random = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64 | 1;
    println!("seed {random}");
    let mut next = |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below
    };
    let mut kills = 0;
    for round in 0..6 {
        let name = format!("round-{round}");
        let began = Instant::now();
        loop {
            assert!(began.elapsed() < Duration::from_secs(60), "{name} does not come to its end");
            let mut command = if place.has_run(&name) { place.resume(&name) } else { place.start(&name, &args) };
            let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
            std::thread::sleep(Duration::from_millis(20 + next(150)));
            if let Some(status) = child.try_wait().unwrap() {
                let output = child.wait_with_output().unwrap();
                let text = String::from_utf8_lossy(&output.stderr).into_owned();
                assert!(status.success() || text.contains("the run is finished"), "{name}: {text}");
                break;
            }
            child.kill().unwrap();
            child.wait().unwrap();
            kills += 1;
        }
        check_equal(&expected, &place.folder(&name), &name);
    }
    println!("{kills} kills");
    assert!(kills >= 6, "only {kills} kills: the run is too short for this test");
}

#[test]
fn ctrl_c_takes_a_checkpoint_and_the_run_goes_on_from_it() {
    let place = Place::new();
    let args = ["--steps", "400", "--every", "1000"];
    assert!(place.start("whole", &args).output().unwrap().status.success());
    let mut child = place.start("stopped", &args).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    while !place.has_run("stopped") || std::fs::metadata(place.folder("stopped").join("metrics.jsonl")).map_or(0, |about| about.len()) < 500
    {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it could be stopped");
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(std::fs::read_dir(place.folder("stopped").join("checkpoints")).unwrap().count(), 1);
    place.finish("stopped");
    check_equal(&outcome(&place.folder("whole")), &place.folder("stopped"), "SIGTERM");
    // What is finished stays so, and a damaged newest checkpoint is passed over for the one before it.
    let again = place.resume("stopped").output().unwrap();
    assert!(String::from_utf8_lossy(&again.stderr).contains("the run is finished"));
}

#[test]
fn a_damaged_checkpoint_is_passed_over() {
    let place = Place::new();
    assert!(place.start("whole", &[]).output().unwrap().status.success());
    let killed = place.start("damaged", &[]).env("PERILUNE_FAILPOINT", "loop.boundary=20*exit").output().unwrap();
    assert_eq!(killed.status.code(), Some(137));
    let checkpoints = place.folder("damaged").join("checkpoints");
    let mut names: Vec<_> = std::fs::read_dir(&checkpoints).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.retain(|path| path.join("MANIFEST.json").is_file());
    names.sort();
    assert!(names.len() >= 2, "{names:?}");
    let weights = names.last().unwrap().join("models/model/model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::remove_file(&weights).unwrap();
    std::fs::write(&weights, bytes).unwrap();
    let output = place.command(&["resume", "latest", "--runs", "damaged"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && text.contains("is damaged and passed over"), "{text}");
    check_equal(&outcome(&place.folder("whole")), &place.folder("damaged"), "damage");
}
