//! The commands that look at runs and tidy them up, on real runs: whatever state they are in, the list shows them all; nothing that
//! a run needs is removed; and a run whose store was destroyed goes on to the same end, to the bit.

#[path = "fixtures/runs.rs"]
mod runs;

use runs::{Outcome, files_below};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A folder with several folders of runs.
struct Place(runs::Place);

impl Place {
    fn new() -> Self {
        Self(runs::Place::new())
    }

    fn command(&self, words: &[&str]) -> Command {
        self.0.command(words)
    }

    /// Starts a run in the folder `runs` and ends it at `failpoint`, if there is one: its id.
    fn start(&self, runs: &str, args: &[&str], failpoint: Option<&str>) -> String {
        let before = self.ids(runs);
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/resumable.lua");
        let mut words = vec!["run", "--quiet", "--seed", "5", "--runs", runs, script.to_str().unwrap()];
        words.extend(args);
        let output = self.command(&words).envs(failpoint.map(|point| ("PERILUNE_FAILPOINT", point))).output().unwrap();
        assert_eq!(output.status.success(), failpoint.is_none(), "{}", text(&output.stderr));
        let mut ids = self.ids(runs);
        ids.retain(|id| !before.contains(id));
        assert_eq!(ids.len(), 1);
        ids.remove(0)
    }

    /// Goes on with a run to its end.
    fn finish(&self, runs: &str, id: &str) {
        let output = self.command(&["resume", id, "--quiet", "--runs", runs]).output().unwrap();
        assert!(output.status.success(), "{id}: {}", text(&output.stderr));
    }

    fn ids(&self, runs: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.0.path().join(runs)).into_iter().flatten().flatten();
        let mut ids: Vec<String> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
        ids.sort();
        ids
    }

    fn folder(&self, runs: &str, id: &str) -> PathBuf {
        self.0.path().join(runs).join(id)
    }

    /// What a command prints, if it ends well.
    fn printed(&self, words: &[&str]) -> String {
        let output = self.command(words).output().unwrap();
        assert!(output.status.success(), "{words:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    fn json(&self, words: &[&str]) -> Value {
        serde_json::from_str(&self.printed(words)).unwrap()
    }

    /// The one line that a command fails with.
    fn refusal(&self, words: &[&str]) -> String {
        let output = self.command(words).output().unwrap();
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{words:?}: {message}");
        assert!(!message.contains("panicked"), "{message}");
        message
    }

    /// Names of a run's checkpoints, by name.
    fn checkpoints(&self, runs: &str, id: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder(runs, id).join("checkpoints")).unwrap();
        let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| !name.starts_with("tmp-"));
        names.sort();
        names
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// The numbers of a finished run, by file: metrics, weights, masters, moments, tables of state. What the last checkpoint says of
/// recorded steps is not among them: a store that was destroyed has lost some.
fn numbers(run: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files = files_below(run);
    let checkpoint = |file: &PathBuf| file.components().take(2).collect::<PathBuf>();
    let last = files.iter().filter(|file| file.starts_with("checkpoints")).map(checkpoint).max().expect("a finished run has checkpoints");
    let is_number =
        |file: &PathBuf| file.extension().is_some_and(|end| end == "safetensors") && (file.starts_with(&last) || file.starts_with("final"));
    files.retain(|file| is_number(file) || file == Path::new("metrics.jsonl"));
    files.into_iter().map(|file| (file.clone(), std::fs::read(run.join(file)).unwrap())).collect()
}

/// Every file below a folder, with its content.
fn content(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files = Vec::new();
    let mut waiting = vec![folder.to_owned()];
    while let Some(folder) = waiting.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                waiting.push(path);
            } else if path.is_file() {
                // The socket of a process that was killed stays, and is no file.
                files.push((path.clone(), std::fs::read(&path).unwrap()));
            }
        }
    }
    files.sort();
    files
}

fn copy_folder(from: &Path, to: &Path) {
    for (path, _) in content(from) {
        let target = to.join(path.strip_prefix(from).unwrap());
        std::fs::create_dir_all(target.parent().unwrap()).unwrap();
        std::fs::copy(&path, target).unwrap();
    }
}

#[test]
fn the_list_shows_runs_in_every_state_and_changes_nothing() {
    let place = Place::new();
    assert_eq!(place.printed(&["runs", "--runs", "r"]), "no runs in r\n");
    let finished = place.start("r", &["--steps", "12"], None);
    let failed = place.start("r", &[], Some("loop.boundary=8*error"));
    let killed = place.start("r", &["--dtype", "bf16"], Some("loop.boundary=8*exit"));
    let stopped = {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/resumable.lua");
        let mut child = place
            .command(&["run", "--quiet", "--runs", "r", script.to_str().unwrap(), "--steps", "100000", "--every", "100"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let others = [&finished, &failed, &killed];
        let mut listed = Value::Null;
        let mut id = String::new();
        // Seen from outside while it lives, too.
        for _ in 0..2000 {
            assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
            listed = place.json(&["runs", "--runs", "r", "--json"]);
            let newest = &listed[0];
            id = newest["id"].as_str().unwrap().to_string();
            if !others.contains(&&id) && newest["status"] == "running" && newest["step"].as_u64().is_some() {
                break;
            }
        }
        assert_eq!(listed[0]["status"], "running", "{listed}");
        let alive = place.printed(&["runs", "show", &id, "--runs", "r"]);
        assert!(alive.contains(&format!("process  {}", child.id())), "{alive}");
        let living = place.printed(&["runs", "gc", "--runs", "r", "--dry-run", "--keep", "1"]);
        assert!(living.contains(&format!("{id}  left alone: it is alive")), "{living}");
        assert!(place.refusal(&["runs", "gc", "--runs", "r", "--remove", &id]).contains("is alive; stop it first"));
        assert!(place.refusal(&["store", "rebuild", &id, "--runs", "r"]).contains("the run is alive"));
        // A checkpoint may make room for the next one between the look and the wish.
        let pinned = (0..100).find_map(|_| {
            let output = place.command(&["runs", "pin", &id, "latest", "--runs", "r"]).output().unwrap();
            output.status.success().then(|| text(&output.stdout))
        });
        let pinned = pinned.expect("one of a hundred pins comes in time").split(' ').next().unwrap().to_string();
        place.printed(&["set", &id, "optimizer.clip_norm=1.5", "--runs", "r"]);
        assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
        assert_eq!(child.wait().unwrap().code(), Some(130));
        let shown = place.json(&["runs", "show", &id, "--runs", "r", "--json"]);
        let records = shown["checkpoints"].as_array().unwrap();
        assert!(records.iter().any(|record| record["name"] == pinned.as_str() && record["pinned"] == true), "{pinned} in {records:?}");
        assert!(place.checkpoints("r", &id).contains(&pinned));
        let exported = place.printed(&["runs", "export", &id, "--runs", "r"]);
        let event = exported.lines().find(|line| line.starts_with("{\"kind\":\"event\"")).expect("what was set is an event");
        assert!(event.contains("\"event\":\"set\"") && event.contains("clip_norm"), "{event}");
        id
    };
    let runs = place.0.path().join("r");
    std::fs::create_dir(runs.join("00000000000000000000000000")).unwrap();
    std::fs::create_dir(runs.join("00000000000000000000000001")).unwrap();
    std::fs::write(runs.join("00000000000000000000000001/run.json"), "{ \"id\": 7 }").unwrap();

    let before = content(&runs);
    let listed = place.json(&["runs", "--runs", "r", "--json"]);
    let rows: Vec<(&str, &str)> =
        listed.as_array().unwrap().iter().map(|run| (run["id"].as_str().unwrap(), run["status"].as_str().unwrap())).collect();
    let wanted = [
        (stopped.as_str(), "stopped"),
        (killed.as_str(), "interrupted"),
        (failed.as_str(), "failed"),
        (finished.as_str(), "finished"),
        ("00000000000000000000000001", "unreadable"),
        ("00000000000000000000000000", "unreadable"),
    ];
    assert_eq!(rows, wanted);
    assert_eq!((&listed[3]["step"], &listed[3]["loop"]), (&12.into(), &"train".into()));
    assert_eq!((&listed[1]["step"], &listed[1]["words"][1]), (&7.into(), &"bf16".into()));
    let metrics = std::fs::read_to_string(place.folder("r", &finished).join("metrics.jsonl")).unwrap();
    let last: Value =
        metrics.lines().filter(|line| line.contains("\"loss\"")).map(|line| serde_json::from_str(line).unwrap()).next_back().unwrap();
    assert_eq!(listed[3]["loss"], last["loss"]);
    assert!(listed[2]["reason"].as_str().unwrap().contains("failpoint loop.boundary"), "{listed}");
    let table = place.printed(&["runs", "--runs", "r"]);
    assert!(table.lines().take(7).all(|line| line.chars().count() <= 100) && table.lines().count() == 9, "{table}");
    assert!(
        table.contains("interrupted")
            && table.ends_with("00000000000000000000000000: there is no run.json: it was ended while it began, or is no run\n"),
        "{table}"
    );
    assert!(place.printed(&["runs", "--runs", "r", "--long"]).contains(&stopped));
    place.printed(&["runs", "show", &killed, "--runs", "r"]);
    place.printed(&["store", "verify", &killed, "--runs", "r"]);
    assert_eq!(content(&runs), before, "looking changes no byte");
}

#[test]
fn a_run_is_shown_with_all_that_is_known() {
    let place = Place::new();
    let id = place.start("r", &["--dtype", "bf16"], None);
    let shown = place.printed(&["runs", "show", "latest", "--runs", "r", "--ascii"]);
    for part in ["resumable  finished", "--dtype bf16", "seed     5", "prepare#0", "train[3]/measure#0", "generation 0 from the start"] {
        assert!(shown.contains(part), "{part} in {shown}");
    }
    assert!(shown.contains("train-000040") && shown.contains("\ntrain/loss  last ") && shown.contains("logged once: last "), "{shown}");
    let drawn = shown.split_once("\nmetrics\n").unwrap().1;
    assert!(drawn.lines().count() > 40 && drawn.lines().all(|line| line.is_ascii() && line.len() <= 100), "{drawn}");
    let rate = place.printed(&["runs", "show", &id, "--runs", "r", "--metric", "tokens_per_second", "--metric", "train/walk"]);
    assert!(rate.contains("train/tokens_per_second  last") && rate.contains("train/walk  last") && !rate.contains("train/loss"), "{rate}");
    let object = place.json(&["runs", "show", &id[..12], "--runs", "r", "--json"]);
    assert_eq!((&object["status"], &object["facts"]["seed"]), (&"finished".into(), &5.into()));
    assert_eq!(object["checkpoints"].as_array().unwrap().len(), 2);
    let loss = object["metrics"].as_array().unwrap().iter().find(|series| series["name"] == "loss").unwrap();
    assert_eq!(loss["points"].as_array().unwrap().len(), 40);

    assert!(place.refusal(&["runs", "show", &id, "--runs", "r", "--metric", "lossy"]).contains("grad_norm, last, loss"));
    assert!(place.refusal(&["runs", "show", "01ZZ", "--runs", "r"]).contains("no run `01ZZ` in r (1 runs)"));
    assert!(place.refusal(&["runs", "gc", "--runs", "r", "--keep", "0"]).contains("--keep"));
    assert!(place.refusal(&["runs", "gc", "--runs", "r", "--older-than", "-1"]).contains("--older-than"));
    assert!(place.refusal(&["runs", "gc", "--runs", "r", "--remove", &id[..25]]).contains("the whole id of a run"));
}

#[test]
fn two_runs_are_compared_to_the_bit() {
    let place = Place::new();
    let a = place.start("r", &["--steps", "10"], None);
    let b = place.start("r", &["--steps", "20"], None);
    let c = place.start("r", &["--steps", "10", "--dtype", "bf16"], None);
    let compare = |a: &str, b: &str| place.json(&["runs", "diff", a, b, "--runs", "r", "--json"]);
    let metric =
        |diff: &Value, name: &str| diff["metrics"].as_array().unwrap().iter().find(|metric| metric["name"] == name).unwrap().clone();
    let same = compare(&a, &a);
    assert_eq!((same["started_with"].as_array().unwrap().len(), same["code"].as_array().unwrap().len()), (0, 0));
    let longer = compare(&a, &b);
    let names: Vec<&str> = longer["started_with"].as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["--steps"]);
    let loss = metric(&longer, "loss");
    assert_eq!((&loss["first_difference"], &loss["common"]), (&Value::Null, &10.into()), "a longer run begins with the same bits");
    let other = compare(&a, &c);
    assert_eq!(metric(&other, "loss")["first_difference"], 0);
    assert_eq!(metric(&other, "random")["first_difference"], Value::Null);
    let printed = place.printed(&["runs", "diff", &a, &c, "--runs", "r"]);
    assert!(printed.contains("--dtype       f32  bf16") && printed.contains("differs from step 0"), "{printed}");
    assert!(printed.contains("the same code") && printed.contains("equal, all 10 values"), "{printed}");

    // Another script of the same name.
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/resumable.lua");
    let changed = std::fs::read_to_string(&script).unwrap().replace("lr = 1e-3,", "lr = 2e-3,");
    let hash = blake3::hash(changed.as_bytes()).to_hex()[..32].to_string();
    let folder = place.folder("r", &c);
    let list = std::fs::read_to_string(folder.join("code/g0.json")).unwrap();
    let old = serde_json::from_str::<Value>(&list).unwrap()["sources"][0]["hash"].as_str().unwrap().to_string();
    std::fs::write(folder.join("code/objects").join(&hash), &changed).unwrap();
    std::fs::write(folder.join("code/g0.json"), list.replace(&old, &hash)).unwrap();
    let printed = place.printed(&["runs", "diff", &a, &c, "--runs", "r"]);
    assert!(
        printed.contains("-    local optim = run:optimizer(\"adamw\", model, { lr = 1e-3, moments = \"bf16\" })\n+    local optim"),
        "{printed}"
    );
}

#[test]
fn a_fork_takes_code_whose_arguments_have_other_names() {
    let place = Place::new();
    let code = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/resumable.lua")).unwrap();
    let script = place.0.path().join("renamed.lua");
    std::fs::write(&script, &code).unwrap();
    place.printed(&["run", "--quiet", "--runs", "renamed", "renamed.lua", "--steps", "6"]);
    let parent = place.folder("renamed", &place.ids("renamed")[0]);
    std::fs::write(&script, code.replace("steps = { 40", "updates = { 40").replace("args.steps", "args.updates")).unwrap();
    let fork = ["runs", "fork", "latest", "--at", "train=6", "--runs", "renamed", "--quiet", "--code", "new"];
    let refused = text(&place.command(&fork).output().unwrap().stderr);
    assert!(refused.contains("no argument --steps") && refused.contains("--drop-arg"), "{refused}");
    place.printed(&[&fork[..], &["--drop-arg", "steps", "--arg", "updates=9"]].concat());
    let metrics = |run: &Path| {
        let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
        text.lines().filter(|line| line.contains("\"loop\":\"train\"")).map(String::from).collect::<Vec<_>>()
    };
    let (parents, forks) = (metrics(&parent), metrics(&place.folder("renamed", &place.ids("renamed")[1])));
    assert_eq!((parents.len(), forks.len()), (6, 9));
    assert_eq!(parents, forks[..6]);
}

#[test]
fn an_export_is_complete_and_parses() {
    let place = Place::new();
    let id = place.start("r", &["--steps", "12"], None);
    let lines = |text: &str| text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()).collect::<Vec<_>>();
    let exported = lines(&place.printed(&["runs", "export", &id, "--runs", "r"]));
    let kinds: Vec<&str> = exported.iter().map(|line| line["kind"].as_str().unwrap()).collect();
    let mut order = kinds.clone();
    order.dedup();
    assert_eq!(order, ["run", "generation", "step", "checkpoint", "metric"]);
    let of = |kind: &str| exported.iter().filter(|line| line["kind"] == kind).cloned().collect::<Vec<_>>();
    assert_eq!((&of("run")[0]["status"], &of("run")[0]["facts"]["args"]["steps"]), (&"finished".into(), &12.into()));
    let script = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/resumable.lua")).unwrap();
    assert_eq!(of("generation")[0]["sources"][0]["text"], script.as_str());
    let object = place.json(&["runs", "show", &id, "--runs", "r", "--json"]);
    assert_eq!(of("step").len(), object["steps"].as_array().unwrap().len());
    assert_eq!(of("checkpoint").len(), place.checkpoints("r", &id).len());
    let metrics = std::fs::read_to_string(place.folder("r", &id).join("metrics.jsonl")).unwrap();
    assert_eq!(of("metric").len(), metrics.lines().count());
    for (line, metric) in metrics.lines().zip(of("metric")) {
        let line: Value = serde_json::from_str(line).unwrap();
        assert_eq!(line.get("step").unwrap_or(&Value::Null), &metric["step"]);
        for (name, value) in metric["values"].as_object().unwrap() {
            assert_eq!(&line[name], value);
        }
        assert!(metric["timing"]["time"].as_f64().unwrap() > 0.0);
    }

    let file = place.0.path().join("out.jsonl");
    place.printed(&["runs", "export", &id, "--runs", "r", "--output", "out.jsonl"]);
    assert_eq!(lines(&std::fs::read_to_string(&file).unwrap()).len(), exported.len());
    assert!(place.refusal(&["runs", "export", &id, "--runs", "r", "--output", "out.jsonl"]).contains("out.jsonl: cannot write"));

    // A damaged line is left out and said, the rest is there.
    let damaged = metrics.replacen("\"step\":3", "\"step\":4", 1);
    std::fs::write(place.folder("r", &id).join("metrics.jsonl"), damaged).unwrap();
    let output = place.command(&["runs", "export", &id, "--runs", "r"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("what is damaged is left out"), "{}", text(&output.stderr));
    assert_eq!(lines(&text(&output.stdout)).len(), exported.len() - 1);
}

#[test]
fn tidying_up_leaves_what_runs_need_and_pins_hold() {
    let place = Place::new();
    let whole = place.start("whole", &[], None);
    let expected = Outcome::of(&place.folder("whole", &whole));
    let killed = place.start("r", &[], Some("loop.boundary=21*exit"));
    let finished = place.start("r", &["--dtype", "bf16"], None);
    let folder = place.folder("r", &killed);
    let junk = "0123456789abcdef0123456789abcdef";
    std::fs::write(folder.join("steps").join(format!("{junk}.json")), "[]").unwrap();
    std::fs::create_dir(folder.join("steps").join(junk)).unwrap();
    std::fs::write(folder.join("code/objects").join(junk), "return 1").unwrap();
    std::fs::write(folder.join("run.json.new"), "{").unwrap();
    std::fs::create_dir(folder.join("store.bad-1")).unwrap();
    std::fs::write(folder.join("store.bad-1/db"), "x").unwrap();
    std::fs::write(folder.join("metrics.cut-1-0.jsonl"), "x").unwrap();
    std::fs::create_dir(folder.join("final.77-0.tmp")).unwrap();
    let draft = folder.join("checkpoints/tmp-77-0");
    std::fs::create_dir(&draft).unwrap();
    std::fs::File::open(&draft).unwrap().set_modified(std::time::SystemTime::now() - std::time::Duration::from_secs(3600)).unwrap();
    std::fs::create_dir(place.0.path().join("r/gone-x-0")).unwrap();

    let kept = place.checkpoints("r", &killed);
    let before = content(&place.0.path().join("r"));
    let said = place.printed(&["runs", "gc", "--runs", "r", "--keep", "1", "--dry-run"]);
    assert!(
        said.contains("would free") && said.contains(&format!("{finished}  would free")) && said.contains(": 1 checkpoint\n"),
        "{said}"
    );
    assert_eq!(content(&place.0.path().join("r")), before, "a dry run changes nothing");

    // While something that was put aside may still be asked for results, they stay.
    let said = place.printed(&["runs", "gc", "--runs", "r"]);
    assert!(said.contains("1 source that no generation names") && !said.contains("result"), "{said}");
    assert!(folder.join("steps").join(junk).exists() && folder.join("store.bad-1").exists());
    assert_eq!(place.checkpoints("r", &finished).len(), 2, "checkpoints go only when that is asked");
    place.printed(&["runs", "gc", "--runs", "r", "--older-than", "0"]);
    let said = place.printed(&["runs", "gc", "--runs", "r", "--older-than", "0"]);
    assert!(said.contains("2 results that no step names"), "{said}");
    assert_eq!(place.printed(&["runs", "gc", "--runs", "r", "--older-than", "0"]), "nothing to remove\n");
    for gone in ["run.json.new", "store.bad-1", "metrics.cut-1-0.jsonl", "final.77-0.tmp", "checkpoints/tmp-77-0", "../gone-x-0"] {
        assert!(!folder.join(gone).exists(), "{gone}");
    }

    let oldest = place.checkpoints("r", &finished)[0].clone();
    assert!(place.refusal(&["runs", "pin", &finished, "nothing", "--runs", "r"]).contains(&oldest));
    place.printed(&["runs", "pin", &finished, &oldest, "--runs", "r"]);
    place.printed(&["runs", "gc", "--runs", "r", "--keep", "1"]);
    assert_eq!(place.checkpoints("r", &finished).len(), 2, "a pinned checkpoint stays");
    place.printed(&["runs", "unpin", &finished, &oldest, "--runs", "r"]);
    place.printed(&["runs", "gc", "--runs", "r", "--keep", "1"]);
    assert_eq!(place.checkpoints("r", &finished).len(), 1);
    let shown = place.json(&["runs", "show", &finished, "--runs", "r", "--json"]);
    assert_eq!(shown["checkpoints"].as_array().unwrap().len(), 1, "no record is left of what went");
    assert_eq!(place.checkpoints("r", &killed), kept, "a run that can go on keeps all of its checkpoints");

    place.finish("r", &killed);
    expected.check(&folder, "tidying up");
    place.printed(&["runs", "gc", "--runs", "r", "--remove", &finished]);
    assert_eq!(place.ids("r"), [killed]);
}

#[test]
fn tidying_up_may_be_killed_anywhere() {
    let place = Place::new();
    let whole = place.start("whole", &[], None);
    let expected = Outcome::of(&place.folder("whole", &whole));
    let finished = place.start("r", &["--steps", "12"], None);
    let killed = place.start("r", &[], Some("loop.boundary=14*exit"));
    for id in [&finished, &killed] {
        std::fs::write(place.folder("r", id).join("code/objects/0123456789abcdef0123456789abcdef"), "return 1").unwrap();
    }
    for point in ["gc.remove", "gc.record", "checkpoint.remove", "store.put", "store.flush"] {
        // As often as it passes the point: 1, 2, ... until it is not passed that often.
        for count in 1..20 {
            let runs = format!("{point}-{count}");
            copy_folder(&place.0.path().join("r"), &place.0.path().join(&runs));
            let gc = ["runs", "gc", "--runs", &runs, "--keep", "1"];
            let output = place.command(&gc).env("PERILUNE_FAILPOINT", format!("{point}={count}*exit")).output().unwrap();
            let was_killed = output.status.code() == Some(137);
            assert!(was_killed || output.status.success(), "{runs}: {}", text(&output.stderr));
            place.printed(&["store", "verify", &finished, "--runs", &runs]);
            place.printed(&gc);
            place.printed(&gc);
            assert_eq!(place.checkpoints(&runs, &finished), ["train-000012"], "{runs}");
            assert_eq!(place.json(&["runs", "--runs", &runs, "--json"]).as_array().unwrap().len(), 2);
            let removed = place
                .command(&["runs", "gc", "--runs", &runs, "--remove", &finished])
                .env("PERILUNE_FAILPOINT", "gc.remove=1*exit")
                .output()
                .unwrap();
            assert_eq!(removed.status.code(), Some(137));
            assert_eq!(place.json(&["runs", "--runs", &runs, "--json"]).as_array().unwrap().len(), 1);
            place.printed(&gc);
            assert_eq!(place.ids(&runs), std::slice::from_ref(&killed), "{runs}");
            if count == 1 {
                place.finish(&runs, &killed);
                expected.check(&place.folder(&runs, &killed), &runs);
            }
            if !was_killed {
                assert!(count > 1, "{point} is never passed");
                break;
            }
        }
    }
}

/// Makes every file of a run's store garbage.
fn destroy_store(run: &Path) {
    for (path, bytes) in content(&run.join("store")) {
        std::fs::write(&path, vec![b'?'; bytes.len().min(5000)]).unwrap();
    }
}

#[test]
fn a_run_whose_store_was_destroyed_is_rebuilt_and_ends_the_same() {
    let place = Place::new();
    let whole = place.start("whole", &[], None);
    let expected = numbers(&place.folder("whole", &whole));
    assert!(expected.len() > 5, "{} files", expected.len());
    let check = |run: &Path, when: &str| {
        for ((file, expected), (other, got)) in expected.iter().zip(numbers(run)) {
            assert!(*file == other && *expected == got, "{} differs after {when}", file.display());
        }
    };
    let run = |runs: &str| {
        let id = place.start(runs, &[], Some("loop.boundary=20*exit"));
        destroy_store(&place.folder(runs, &id));
        id
    };
    let id = run("r");
    let folder = place.folder("r", &id);
    // How many there are depends on how far the one was that was being written.
    let newest = place.checkpoints("r", &id).pop().unwrap();
    let listed = place.json(&["runs", "--runs", "r", "--json"]);
    assert_eq!(listed[0]["status"], "interrupted");
    assert!(listed[0]["notes"][0].as_str().unwrap().contains(&format!("perilune store rebuild {id}")), "{listed}");
    assert!(place.refusal(&["store", "verify", &id, "--runs", "r"]).contains("damaged: store"));
    assert!(place.refusal(&["store", "compact", &id, "--runs", "r"]).contains("perilune store rebuild"));
    assert!(place.refusal(&["runs", "pin", &id, "latest", "--runs", "r"]).contains("perilune store rebuild"));
    assert!(place.printed(&["runs", "gc", "--runs", "r"]).contains("its store is damaged"));
    let said = place.printed(&["store", "rebuild", &id, "--runs", "r"]);
    for part in ["damage     it does not open", "read       0 records", "recovered  generation 0"] {
        assert!(said.contains(part), "{part} in {said}");
    }
    assert!(said.contains(&format!("recovered  checkpoint {newest} at step ")), "{said}");
    assert!(said.contains("missing    step prepare#0: it was recorded; a resume runs it again") && said.contains("store.bad-"), "{said}");
    assert!(place.printed(&["store", "verify", &id, "--runs", "r"]).contains("store        sound"));
    place.printed(&["runs", "pin", &id, "latest", "--runs", "r"]);
    place.printed(&["store", "compact", &id, "--runs", "r"]);
    // What was pinned meanwhile is still pinned when a sound store is rebuilt.
    let said = place.printed(&["store", "rebuild", &id, "--runs", "r"]);
    assert!(said.starts_with("read       ") && !said.contains("recovered") && !said.contains("damage"), "{said}");
    let shown = place.json(&["runs", "show", &id, "--runs", "r", "--json"]);
    let pinned: Vec<&Value> = shown["checkpoints"].as_array().unwrap().iter().filter(|record| record["pinned"] == true).collect();
    assert_eq!((pinned.len(), &pinned[0]["name"]), (1, &newest.as_str().into()));
    place.finish("r", &id);
    check(&folder, "a rebuilding");
    assert!(place.checkpoints("r", &id).contains(&newest), "it was pinned");

    // Killed between the two renames, and before: the next command finds the one or the other.
    for (point, lost) in [("store.rebuilt=exit", true), ("store.ack=1*exit", false)] {
        let runs = point.split('=').next().unwrap();
        let id = run(runs);
        let output = place.command(&["store", "rebuild", &id, "--runs", runs]).env("PERILUNE_FAILPOINT", point).output().unwrap();
        assert_eq!(output.status.code(), Some(137), "{point}");
        assert_eq!(place.folder(runs, &id).join("store").exists(), !lost, "{point}");
        if lost {
            assert!(place.printed(&["store", "verify", &id, "--runs", runs]).contains("store        sound"));
        }
        place.printed(&["store", "rebuild", &id, "--runs", runs]);
        place.finish(runs, &id);
        check(&place.folder(runs, &id), point);
    }
}

#[test]
fn a_resume_fills_a_damaged_store_again_by_itself() {
    let place = Place::new();
    let whole = place.start("whole", &[], None);
    let id = place.start("r", &[], Some("loop.boundary=20*error"));
    let folder = place.folder("r", &id);
    let recorded = place.json(&["runs", "show", &id, "--runs", "r", "--json"]);
    let mut bytes = std::fs::read(folder.join("store/db")).unwrap();
    let end = bytes.iter().rposition(|byte| *byte != 0).unwrap();
    bytes[end * 9 / 10] ^= 16;
    std::fs::write(folder.join("store/db"), bytes).unwrap();
    assert!(place.refusal(&["store", "verify", &id, "--runs", "r"]).contains("damaged: store"));
    let output = place.command(&["resume", &id, "--runs", "r"]).output().unwrap();
    let said = text(&output.stderr);
    assert!(output.status.success() && said.contains("the store was damaged; what can be read of it"), "{said}");
    let (expected, got) = (numbers(&place.folder("whole", &whole)), numbers(&folder));
    assert!(expected == got, "the numbers differ after damage to the store");
    let shown = place.json(&["runs", "show", &id, "--runs", "r", "--json"]);
    assert_eq!(shown["generations"], recorded["generations"], "the records of the code are those of before");
}
