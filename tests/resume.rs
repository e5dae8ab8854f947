//! A run that is killed and resumed ends as the run that was not: metrics, weights, optimizer, cursor and random numbers are
//! equal to the bit. Here processes end at chosen places, at failpoints; `crash.rs` kills them at random instants.

#[path = "fixtures/runs.rs"]
mod runs;

use runs::{Outcome, Place, succeed};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

const SCRIPT: &str = "resumable.lua";
const SIGKILL: Option<i32> = Some(9);
const KINDS: [&[&str]; 4] = [&[], &["--dtype", "bf16"], &["--experts", "4"], &["--experts", "4", "--dtype", "bf16"]];
/// What ends a process or fails in it.
const ACTIONS: [&str; 5] = ["error", "no_space", "panic", "exit", "kill"];

/// Runs a command that a failpoint kills. The signal is a real one.
fn killed(command: &mut Command, failpoint: &str) {
    let output = command.env("PERILUNE_FAILPOINT", failpoint).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.signal(), SIGKILL, "{failpoint} was not passed: {} {text}", output.status);
}

#[test]
fn a_run_killed_after_any_step_ends_as_if_it_had_not_been() {
    let kills = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for (kind, args) in KINDS.iter().enumerate() {
            let kills = &kills;
            scope.spawn(move || {
                let place = Place::new();
                let whole = place.whole(SCRIPT, args);
                // Boundary n is in front of the step of index n - 1; the last one is the loop's end.
                for boundary in 1..=41 {
                    let name = format!("killed-{boundary}");
                    // One thread and two give the same bits, before and after.
                    let threads = |count: usize| if count.is_multiple_of(2) { "1" } else { "2" };
                    let mut first = place.start(SCRIPT, &name, args);
                    killed(first.env("PERILUNE_THREADS", threads(boundary)), &format!("loop.boundary={boundary}*kill"));
                    kills.fetch_add(1, Relaxed);
                    // Every other run is killed once more, on the way that it goes again.
                    if boundary % 2 == 0 {
                        let again = if boundary < 40 { "loop.boundary=2*kill" } else { "loop.boundary=1*kill" };
                        killed(&mut place.resume(&name), again);
                        kills.fetch_add(1, Relaxed);
                    }
                    succeed(place.resume(&name).env("PERILUNE_THREADS", threads(boundary / 2)));
                    whole.check(&place.folder(&name), &format!("a kill at boundary {boundary}, kind {kind}"));
                    std::fs::remove_dir_all(place.path().join(&name)).unwrap();
                }
            });
        }
    });
    let kills = kills.into_inner();
    println!("{} runs killed {kills} times, all ends equal to the bit", KINDS.len() * 41);
    assert_eq!(kills, KINDS.len() * (41 + 20));
}

#[test]
fn a_run_of_every_shape_killed_at_any_boundary_ends_as_if_it_had_not_been() {
    let place = Place::new();
    let whole = place.whole("shapes.lua", &[]);
    let mut boundary = 0;
    loop {
        boundary += 1;
        let name = format!("killed-{boundary}");
        let output =
            place.start("shapes.lua", &name, &[]).env("PERILUNE_FAILPOINT", format!("loop.boundary={boundary}*kill")).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() {
            // The run has fewer boundaries: all were seen.
            break;
        }
        assert_eq!(output.status.signal(), SIGKILL, "{name}: {text}");
        let effects = place.path().join(format!("{name}.effects"));
        assert_eq!(runs::fault_of_records(&place.folder(&name), &effects), None, "{name}");
        succeed(&mut place.resume(&name));
        whole.check(&place.folder(&name), &name);
        assert_eq!(runs::fault_of_effects(&effects), None, "{name}");
        assert_eq!(runs::fault_of_list(&place.folder(&name)), None, "{name}");
        std::fs::remove_dir_all(place.path().join(&name)).unwrap();
    }
    println!("{} boundaries of five loops, all ends equal to the bit", boundary - 1);
    assert!(boundary > 40, "only {boundary} boundaries");
}

#[test]
fn failures_at_every_stage_of_a_checkpoint_leave_a_run_that_goes_on() {
    let place = Place::new();
    let whole = place.whole(SCRIPT, &[]);
    let points = ["begin", "write", "sync", "manifest", "rename", "renamed", "committed", "remove"];
    let points = points.map(|point| format!("checkpoint.{point}"));
    let points = points.into_iter().chain(["store.put", "store.flush", "store.sync", "store.ack"].map(String::from));
    let mut count = 0;
    for point in points {
        for action in ACTIONS {
            // The first checkpoint of all, and one with others before it.
            for passing in [1, 6] {
                let name = format!("{point}-{action}-{passing}");
                let failed =
                    place.start(SCRIPT, &name, &[]).env("PERILUNE_FAILPOINT", format!("{point}={passing}*{action}")).output().unwrap();
                let text = String::from_utf8_lossy(&failed.stderr).into_owned();
                match action {
                    "error" => assert!(text.contains("error: ") && text.contains(&format!("failpoint {point}")), "{name}: {text}"),
                    "no_space" => assert!(text.contains("error: ") && text.contains("make room on that disk"), "{name}: {text}"),
                    "panic" => assert!(text.contains(&format!("failpoint {point}")), "{name}: {text}"),
                    "exit" => assert_eq!(failed.status.code(), Some(137), "{name}: {text}"),
                    _ => assert_eq!(failed.status.signal(), SIGKILL, "{name}: {text}"),
                }
                assert!(!failed.status.success(), "{name} did not fail");
                if let Some(run) = place.run_of(&name) {
                    assert_eq!(runs::fault_of_files(&run, &whole), None, "{name}");
                    place.finish(&name);
                } else {
                    succeed(&mut place.start(SCRIPT, &name, &[]));
                }
                whole.check(&place.folder(&name), &name);
                assert_eq!(runs::fault_of_list(&place.folder(&name)), None, "{name}");
                std::fs::remove_dir_all(place.path().join(&name)).unwrap();
                count += 1;
            }
        }
    }
    println!("{count} failures, all ends equal to the bit");
}

#[test]
fn ctrl_c_takes_a_checkpoint_and_the_run_goes_on_from_it() {
    let place = Place::new();
    let args = ["--steps", "400", "--every", "1000"];
    let whole = place.whole(SCRIPT, &args);
    let mut child = place.start(SCRIPT, "stopped", &args).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let metrics = || place.run_of("stopped").and_then(|run| run.join("metrics.jsonl").metadata().ok()).map_or(0, |about| about.len());
    while metrics() < 500 {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it could be stopped");
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(std::fs::read_dir(place.folder("stopped").join("checkpoints")).unwrap().count(), 1);
    place.finish("stopped");
    whole.check(&place.folder("stopped"), "SIGTERM");
    // What is finished stays so.
    let again = place.resume("stopped").output().unwrap();
    assert!(String::from_utf8_lossy(&again.stderr).contains("the run is finished"));
}

/// The newest checkpoint of a run that was killed. Which it is depends on how far the writer had come; two there are always.
fn newest(place: &Place, name: &str) -> std::path::PathBuf {
    let entries = std::fs::read_dir(place.folder(name).join("checkpoints")).unwrap();
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).filter(|path| path.join("MANIFEST.json").is_file()).collect();
    paths.sort();
    assert!(paths.len() >= 2, "{paths:?}");
    paths.pop().unwrap()
}

#[test]
fn a_damaged_checkpoint_is_passed_over() {
    let place = Place::new();
    let whole: Outcome = place.whole(SCRIPT, &[]);
    killed(&mut place.start(SCRIPT, "damaged", &[]), "loop.boundary=20*kill");
    let weights = newest(&place, "damaged").join("models/model/model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::remove_file(&weights).unwrap();
    std::fs::write(&weights, bytes).unwrap();
    let output = place.command(&["resume", "latest", "--runs", "damaged"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && text.contains("is damaged and passed over"), "{text}");
    whole.check(&place.folder("damaged"), "damage");
    // One whose manifest cannot be read gives its name free, too.
    killed(&mut place.start(SCRIPT, "unreadable", &[]), "loop.boundary=20*kill");
    let newest = newest(&place, "unreadable");
    std::fs::remove_file(newest.join("MANIFEST.json")).unwrap();
    place.finish("unreadable");
    whole.check(&place.folder("unreadable"), "a manifest that is gone");
    let aside = format!("damaged/{}.0/state.json", newest.file_name().unwrap().to_str().unwrap());
    assert!(place.folder("unreadable").join(aside).is_file());
    assert_eq!(runs::fault_of_list(&place.folder("damaged")), None);
}

/// A run that is killed while it saves a model leaves half of one, which may be gigabytes, in its folder.
#[test]
fn half_a_model_that_a_killed_run_was_saving_goes_when_the_run_goes_on() {
    let place = Place::new();
    let whole = place.whole(SCRIPT, &[]);
    killed(&mut place.start(SCRIPT, "killed", &[]), "loop.boundary=20*kill");
    let half = place.folder("killed").join("final.4000000-0.tmp");
    std::fs::create_dir(&half).unwrap();
    std::fs::write(half.join("model.safetensors"), "half").unwrap();
    succeed(&mut place.resume("killed"));
    assert!(!half.exists());
    whole.check(&place.folder("killed"), "half a model");
}

#[test]
fn a_metric_that_keep_best_names_and_nobody_logs_is_told_once() {
    let place = Place::new();
    let script = r#"local engine = require "engine"
        return engine.workflow { name = "best", run = function(run)
          local state = run:state("state", { n = 0 })
          for step in run:loop("train", { steps = 6, checkpoint_every = 2, keep_best = "-acuracy" }) do
            state.n = state.n + 1
            step:log { loss = 1 / step.count, accuracy = step.count }
          end
        end }"#;
    std::fs::write(place.path().join("best.lua"), script).unwrap();
    let output = succeed(&mut place.command(&["run", "best.lua", "--runs", "best"]));
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(
        text.matches("no `acuracy` was logged so far (what was: accuracy, loss), so no checkpoint is the best").count(),
        1,
        "{text}"
    );
}
