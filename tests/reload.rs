//! Edits of a script while it trains: what takes over does so at a step's end, once, and is recorded; what is refused leaves no
//! trace. Forks and settings from outside too, since a run that comes by the same place again must do the same. Runs of the binary
//! are compared to the bit with runs that had the same edits at the same steps, or none.

#[path = "fixtures/runs.rs"]
mod runs;

use perilune::host::control::ask;
use perilune::store::RunStore;
use perilune::store::records::{GenerationRecord, GenerationStatus, Records};
use runs::{Outcome, Place, Random, succeed};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

/// What an edit may change: the script is written from it.
#[derive(Clone)]
struct Script {
    steps: u64,
    lr: f64,
    rows: u64,
    scale: f64,
    extra: bool,
    /// Lines above the loop, in it behind the update, and at the very top.
    above: &'static str,
    inside: &'static str,
    top: &'static str,
    hidden: u64,
    /// The number that the module `part.lua` returns.
    part: f64,
}

impl Script {
    fn new(steps: u64) -> Self {
        Self { steps, lr: 1e-3, rows: 1, scale: 1.0, extra: false, above: "", inside: "", top: "", hidden: 16, part: 0.5 }
    }

    fn text(&self) -> String {
        let Self { steps, lr, rows, scale, above, inside, top, hidden, .. } = self;
        let extra = if self.extra { "line.extra = seen.sum * 2" } else { "" };
        format!(
            r#"local engine = require "engine"
local part = require "part"
{top}
return engine.workflow {{
  name = "edited",
  args = {{ steps = {steps}, every = 100 }},
  run = function(run, args)
    local seed = run:step("seed", {{}}, function() return math.random(1 << 30) end)
    local tokenizer = engine.tokenizer.bytes()
    local lines = engine.data.text("text.txt", {{ document = "line" }}):tokenizer(tokenizer)
    local train = run:data("train", lines:shuffle {{ seed = seed }}:pack {{ seq_len = 16 }}:forever())
    local model = run:model("model", {{ preset = "tiny", vocab = tokenizer.vocab_size, hidden = {hidden}, layers = 1, heads = 2,
      kv_heads = 1, intermediate = 24 }})
    local optim = run:optimizer("adamw", model, {{ lr = {lr} }})
    local seen = run:state("seen", {{ sum = 0 }})
    {above}
    for step in run:loop("train", {{ steps = args.steps, checkpoint_every = args.every }}) do
      local loss = model:cross_entropy(train:take({rows}))
      ;(loss * {scale}):backward()
      seen.sum = seen.sum + math.random() * part.weight
      local line = {{ loss = loss, grad_norm = optim:step(), sum = seen.sum, lr = optim.lr }}
      if step.index % 50 == 7 then line.measured = run:step("measure", {{}}, function() return math.random() end) end
      {inside}
      {extra}
      step:log(line)
    end
    run:save("final", model)
  end,
}}
"#
        )
    }

    /// Writes script and module as an editor does that replaces files.
    fn write(&self, place: &Place) {
        self.write_as(place, &self.text());
    }

    fn write_as(&self, place: &Place, text: &str) {
        for (name, text) in [("part.lua", format!("return {{ weight = {} }}\n", self.part)), ("s.lua", text.to_string())] {
            let path = place.path().join(name);
            if std::fs::read_to_string(&path).ok().as_deref() != Some(&text) {
                let new = place.path().join(format!("{name}.new"));
                std::fs::write(&new, text).unwrap();
                std::fs::rename(new, path).unwrap();
            }
        }
    }
}

/// A run of `s.lua` in a process of its own.
struct Live {
    child: Child,
    folder: PathBuf,
}

impl Live {
    fn start(place: &Place, name: &str, words: &[&str]) -> Self {
        let mut command = place.command(&["run", "--quiet", "--seed", "3", "--runs", name]);
        let child = command.args(words).arg("s.lua").stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut live = Self { child, folder: PathBuf::new() };
        live.wait("the run to begin", |live| {
            live.folder = place.run_of(name).unwrap_or_default();
            live.folder.join("control.sock").exists() && live.lines() > 0
        });
        live
    }

    fn wait(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let began = Instant::now();
        while !done(self) {
            if self.child.try_wait().unwrap().is_some() {
                let mut text = String::new();
                std::io::Read::read_to_string(self.child.stderr.as_mut().unwrap(), &mut text).unwrap();
                panic!("the run ended before {what}: {text}");
            }
            assert!(began.elapsed() < Duration::from_secs(60), "waited in vain for {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn lines(&self) -> usize {
        std::fs::read_to_string(self.folder.join("metrics.jsonl")).unwrap_or_default().lines().count()
    }

    fn ask(&self, question: Value) -> Result<Value, String> {
        ask(&self.folder, &question).map_err(|error| error.to_string())
    }

    fn reload(&self) -> Result<Value, String> {
        self.ask(json!({ "do": "reload" }))
    }

    fn records(&self) -> Records {
        serde_json::from_value(self.ask(json!({ "ask": "records" })).unwrap()).unwrap()
    }

    /// Waits for the end, which must be a good one.
    fn finish(self) {
        let output = self.child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

fn generations(folder: &Path, status: GenerationStatus) -> Vec<GenerationRecord> {
    let store = RunStore::open(&folder.join("store")).unwrap().store;
    let mut found = store.generations();
    store.close().unwrap();
    found.retain(|record| record.status == status);
    found
}

/// A finished fork of the run in `parent`, with its end.
fn fork(place: &Place, parent: &Path, name: &str, words: &[&str]) -> PathBuf {
    let mut command = place.command(&["runs", "fork", parent.to_str().unwrap(), "--quiet", "--runs", name]);
    succeed(command.args(words));
    place.folder(name)
}

#[test]
fn a_hundred_edits_give_what_a_run_with_the_same_generations_gives() {
    let place = Place::new();
    let mut script = Script::new(6000);
    script.write(&place);
    let mut live = Live::start(&place, "live", &[]);
    let mut random = Random::new();
    let (mut taken, mut refused, mut unchanged) = (0, 0, 0);
    for edit in 0..100 {
        let lines = live.lines();
        live.wait("another step", |live| live.lines() > lines + 3);
        let before = script.clone();
        // Every tenth is one that must be refused.
        match if edit % 10 == 9 { 6 } else { random.below(8) } {
            0 => script.lr = 1e-4 * (1 + random.below(40)) as f64,
            1 => script.rows = 1 + random.below(3),
            2 => script.scale = [0.5, 1.0, 2.0][random.below(3) as usize],
            3 => script.extra = !script.extra,
            4 => script.part = random.below(100) as f64 / 8.0,
            5 => {
                script.above = ["train:take(2)", "model:cross_entropy(train:take(1)):backward() optim:step()", ""][random.below(3) as usize]
            }
            6 => script.inside = ["error 'behind the update'", "local x = nil + 1"][random.below(2) as usize],
            _ => script.top = ["-- a remark", "local unused = 7", ""][random.below(3) as usize],
        }
        script.write(&place);
        match live.reload() {
            Ok(answer) if answer["generation"].is_u64() => taken += 1,
            Ok(_) => unchanged += 1,
            Err(error) => {
                assert!(error.starts_with("s.lua:"), "edit {edit} is refused without a line: {error}");
                refused += 1;
                script = before;
            }
        }
        script.inside = "";
    }
    println!("{taken} edits taken, {refused} refused, {unchanged} changed nothing");
    assert!(taken > 40 && refused >= 10, "{taken} taken, {refused} refused");
    // The last word is a script without traps.
    script.write(&place);
    live.reload().unwrap();
    let folder = live.folder.clone();
    live.finish();
    assert!(generations(&folder, GenerationStatus::Accepted).len() > taken, "each is recorded, and the first");
    let outcome = Outcome::of(&folder);
    outcome.check(&fork(&place, &folder, "again", &["--at", "train=0"]), "the same generations from the start");
}

#[test]
fn a_refused_edit_leaves_no_trace() {
    let place = Place::new();
    let script = Script::new(3000);
    script.write(&place);
    succeed(&mut place.command(&["run", "--quiet", "--seed", "3", "--runs", "whole", "s.lua"]));
    let expected = Outcome::of(&place.folder("whole"));
    let mut live = Live::start(&place, "live", &[]);
    let with = |change: &dyn Fn(&mut Script)| {
        let mut changed = script.clone();
        change(&mut changed);
        changed.text()
    };
    let cases: Vec<(String, &[&str])> = vec![
        (format!("{}\nlocal = 3", script.text()), &["s.lua:31:", "expected near 'local'"]),
        ("return 7".into(), &["s.lua: a script returns engine.workflow"]),
        (String::new(), &["s.lua", "an empty file"]),
        (with(&|s| s.top = "local x = nil .. 'text'"), &["s.lua:3:", "concatenate a nil value"]),
        (with(&|s| s.above = "local y = seed.field.other"), &["s.lua:16:", "index a"]),
        (with(&|s| s.inside = "line.bad = step.nothing"), &["s.lua:23:", "no method or field `nothing`"]),
        (
            with(&|s| {
                s.inside = "optim:step() run:log { stray = 1 } run:step('stray', {}, function() return 1 end) error('behind it all')"
            }),
            &["s.lua:23:", "behind it all"],
        ),
        (with(&|s| s.hidden = 32), &["s.lua:12:", "the model `model` differs"]),
        (with(&|s| s.above = "run:step('new', {}, function() return 1 end)"), &["s.lua:16:", "the step `new#0`", "--code new"]),
        (with(&|_| ()).replace("run:step(\"seed\", {}", "run:step(\"seed\", { 1 }"), &["s.lua:8:", "the step `seed#0`", "inputs"]),
        (with(&|_| ()).replace("run:loop(\"train\"", "run:loop(\"other\""), &["s.lua:17:", "the loop `other`", "`train`"]),
        (with(&|s| s.above = "if true then return end"), &["the script ended without coming to the loop `train`"]),
        (with(&|_| ()).replace("seq_len = 16", "seq_len = 24"), &["s.lua:11:", "the data set `train`"]),
        (with(&|_| ()).replace("steps = 3000,", "steps = 3000, more = engine.required 'string',"), &["--more must be given"]),
        (with(&|s| s.top = "local x = require 'missing'"), &["s.lua:3:", "no module \"missing\""]),
        // Endless, and not to be caught.
        (
            with(&|s| s.above = "while true do pcall(function() while true do end end) end"),
            &["s.lua:16:", "the way to the loop `train`", "10 s"],
        ),
    ];
    for (text, parts) in &cases {
        let lines = live.lines();
        live.wait("another step", |live| live.lines() > lines + 3);
        script.write_as(&place, text);
        let error = live.reload().expect_err(text);
        let missing: Vec<_> = parts.iter().filter(|part| !error.contains(**part)).collect();
        assert!(missing.is_empty() && error.lines().count() < 8, "should say {missing:?}; says {error}");
        let records = live.records();
        let last = records.generations.last().unwrap();
        assert_eq!((last.status, last.reason.is_some()), (GenerationStatus::Rejected, true), "{error}");
        assert!(!records.steps.iter().any(|step| step.key.contains("stray")), "a step of a refused edit is known");
    }
    script.write(&place);
    assert_eq!(live.reload().unwrap()["unchanged"], true);
    let folder = live.folder.clone();
    live.finish();
    assert_eq!(generations(&folder, GenerationStatus::Rejected).len(), cases.len());
    expected.check(&folder, "edits that were refused");
}

#[test]
fn an_edit_that_changes_nothing_changes_no_bit() {
    for threads in ["1", "2"] {
        let place = Place::new();
        let mut script = Script::new(1500);
        script.write(&place);
        succeed(place.command(&["run", "--quiet", "--seed", "3", "--runs", "whole", "s.lua"]).env("PERILUNE_THREADS", threads));
        let expected = Outcome::of(&place.folder("whole"));
        let mut live = Live::start(&place, "live", &[]);
        for remark in ["-- one remark", "-- another", "local unused = 1", "-- a third"] {
            let lines = live.lines();
            live.wait("another step", |live| live.lines() > lines + 20);
            script.top = remark;
            script.write(&place);
            assert!(live.reload().unwrap()["generation"].is_u64());
        }
        let folder = live.folder.clone();
        live.finish();
        expected.check(&folder, "four edits of remarks");
    }
}

#[test]
fn every_way_to_save_a_file_is_one_reload() {
    let place = Place::new();
    let mut script = Script::new(1_000_000);
    script.write(&place);
    let mut live = Live::start(&place, "live", &["--watch"]);
    let path = place.path().join("s.lua");
    type Save = (&'static str, fn(&Path, &str));
    let saves: [Save; 6] = [
        ("written in place", |path, text| std::fs::write(path, text).unwrap()),
        ("renamed over", |path, text| {
            std::fs::write(path.with_extension("swp"), text).unwrap();
            std::fs::rename(path.with_extension("swp"), path).unwrap();
        }),
        ("moved away, then written anew", |path, text| {
            std::fs::rename(path, path.with_extension("lua~")).unwrap();
            std::fs::write(path, text).unwrap();
        }),
        ("removed, then written", |path, text| {
            std::fs::remove_file(path).unwrap();
            std::thread::sleep(Duration::from_millis(20));
            std::fs::write(path, text).unwrap();
        }),
        ("truncated, then written in two parts", |path, text| {
            let (head, tail) = text.split_at(text.len() / 2);
            std::fs::write(path, "").unwrap();
            std::thread::sleep(Duration::from_millis(30));
            std::fs::write(path, head).unwrap();
            std::thread::sleep(Duration::from_millis(30));
            std::fs::write(path, format!("{head}{tail}")).unwrap();
        }),
        ("touched, then written", |path, text| {
            let old = std::fs::read(path).unwrap();
            std::fs::write(path, old).unwrap();
            std::fs::write(path, text).unwrap();
        }),
    ];
    for (number, (how, save)) in saves.iter().enumerate() {
        script.lr = 1e-4 * (number + 2) as f64;
        save(&path, &script.text());
        live.wait(how, |live| live.records().generations.len() >= number + 2);
        // Whatever comes late would come now.
        std::thread::sleep(Duration::from_millis(300));
        let records = live.records();
        assert_eq!(records.generations.len(), number + 2, "{how}: {:?}", records.generations);
        assert!(records.generations.iter().all(|record| record.status == GenerationStatus::Accepted), "{how}");
    }
    // A module counts as well, and what is refused is not tried again and again.
    std::fs::write(place.path().join("part.lua"), "return { weight = 3 }").unwrap();
    live.wait("the module", |live| live.records().generations.len() >= 8);
    std::fs::write(&path, "local").unwrap();
    live.wait("the refusal", |live| live.records().generations.len() >= 9);
    std::thread::sleep(Duration::from_millis(600));
    let records = live.records();
    assert_eq!(records.generations.len(), 9);
    assert_eq!(records.generations[8].status, GenerationStatus::Rejected);
    live.ask(json!({ "do": "stop" })).unwrap();
    assert_eq!(live.child.wait().unwrap().code(), Some(130));
}

/// A finished run with edits and settings, each at a step that is known, and its end.
fn edited(place: &Place) -> (PathBuf, Outcome) {
    let mut script = Script::new(900);
    script.write(place);
    let mut live = Live::start(place, "parent", &[]);
    for change in 0..3 {
        // While it is held the edit is asked for; it takes over at the boundary where the run goes on.
        let at = live.ask(json!({ "do": "pause" })).unwrap()["step"].as_u64().unwrap();
        match change {
            0 => (script.lr, script.rows) = (4e-3, 2),
            1 => (script.scale, script.extra) = (2.0, true),
            _ => script.part = 9.0,
        }
        script.write(place);
        let set = live.ask(json!({ "do": "set", "settings": [format!("optimizer.weight_decay={}", 0.1 * f64::from(change + 1))] }));
        assert_eq!(set.unwrap()["step"], at);
        std::thread::scope(|scope| {
            let reload = scope.spawn(|| live.reload());
            while live.ask(json!({ "do": "continue" })).unwrap()["step"] == at && !reload.is_finished() {
                std::thread::sleep(Duration::from_millis(1));
            }
            assert!(reload.join().unwrap().unwrap()["generation"].is_u64());
        });
        let lines = live.lines();
        live.wait("more steps", |live| live.lines() > lines + 40);
    }
    let folder = live.folder.clone();
    live.finish();
    assert_eq!(generations(&folder, GenerationStatus::Accepted).len(), 4);
    let outcome = Outcome::of(&folder);
    (folder, outcome)
}

#[test]
fn a_run_that_dies_in_a_reload_goes_on_as_if_it_had_not() {
    let place = Place::new();
    let (parent, expected) = edited(&place);
    for point in ["reload.begin", "reload.arrive", "reload.accept", "reload.accepted"] {
        for action in ["kill", "exit", "panic", "error"] {
            let name = format!("{point}-{action}");
            // From the beginning: edits and settings come again at their steps.
            let id = succeed(&mut place.command(&[
                "runs",
                "fork",
                parent.to_str().unwrap(),
                "--at",
                "train=0",
                "--no-start",
                "--quiet",
                "--runs",
                &name,
            ]));
            assert_eq!(String::from_utf8(id.stdout).unwrap().trim().len(), 26);
            let failed = place.resume(&name).env("PERILUNE_FAILPOINT", format!("{point}=2*{action}")).output().unwrap();
            assert!(!failed.status.success(), "{name} did not fail");
            succeed(&mut place.resume(&name));
            expected.check(&place.folder(&name), &name);
        }
    }
}

/// Points of a reload where a process is held up, so that kills fall there.
const SLOW: &str = "reload.begin=sleep(15),reload.arrive=sleep(15),reload.accept=sleep(15),reload.accepted=sleep(15)";

#[test]
fn kills_amid_edits_and_tidying_lose_no_generation() {
    let place = Place::new();
    let mut random = Random::new();
    let mut script = Script::new(5000);
    script.write(&place);
    let (mut kills, mut in_reload, mut gc_kills, mut acknowledged) = (0, 0, 0, Vec::new());
    let begin = |resumes: bool, slow: bool| {
        let run = ["run", "--quiet", "--seed", "3", "--runs", "killed", "s.lua", "--every", "20"];
        let mut command = if resumes { place.resume("killed") } else { place.command(&run) };
        command.env("PERILUNE_FAILPOINT", if slow { SLOW } else { "" }).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    while kills < 60 {
        let mut child = begin(place.run_of("killed").is_some(), random.below(2) == 0);
        let began = Instant::now();
        // Once it answers, an edit is asked for; the kill comes while it is tried, before, or behind it.
        let edit = std::thread::scope(|scope| {
            let asks = scope.spawn(|| {
                while began.elapsed() < Duration::from_secs(20) {
                    let Some(folder) = place.run_of("killed") else { continue };
                    match ask(&folder, &json!({ "do": "reload" })) {
                        Ok(answer) => return answer["generation"].as_u64(),
                        // Nobody listens yet: the process is on its way up. Anything else is the end of this try.
                        Err(error) if error.to_string().contains("cannot ask") && !error.to_string().contains("without an answer") => {
                            std::thread::sleep(Duration::from_millis(1));
                            if began.elapsed() > Duration::from_secs(1) {
                                return None;
                            }
                        }
                        Err(_) => return None,
                    }
                }
                None
            });
            match random.below(4) {
                0 => script.lr = 1e-4 * (1 + random.below(40)) as f64,
                1 => script.rows = 1 + random.below(3),
                2 => script.extra = !script.extra,
                _ => script.part = random.below(100) as f64 / 8.0,
            }
            script.write(&place);
            std::thread::sleep(Duration::from_millis(20 + random.below(120)));
            in_reload += u64::from(!asks.is_finished());
            child.kill().unwrap();
            child.wait().unwrap();
            asks.join().unwrap()
        });
        kills += 1;
        acknowledged.extend(edit);
        let Some(folder) = place.run_of("killed") else { continue };
        let mut gc = place.command(&["runs", "gc", "--runs", "killed"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        if random.below(2) == 0 {
            std::thread::sleep(Duration::from_millis(random.below(15)));
            gc.kill().unwrap();
            gc_kills += 1;
        }
        gc.wait().unwrap();
        let known: Vec<u32> = generations(&folder, GenerationStatus::Accepted).iter().map(|record| record.number).collect();
        assert!(
            acknowledged.iter().all(|number| known.contains(&(*number as u32))),
            "{acknowledged:?} were acknowledged, {known:?} are there"
        );
        if String::from_utf8_lossy(&place.resume("killed").env("PERILUNE_FAILPOINT", "loop.boundary=1*exit").output().unwrap().stderr)
            .contains("the run is finished")
        {
            break;
        }
    }
    let folder = place.folder("killed");
    place.finish("killed");
    println!("{kills} kills, {in_reload} while an edit waited or was tried, {gc_kills} of gc, {} edits acknowledged", acknowledged.len());
    assert!(kills >= 20 && acknowledged.len() >= 5, "{kills} kills, {} edits", acknowledged.len());
    Outcome::of(&folder).check(&fork(&place, &folder, "again", &["--at", "train=0"]), "the same generations without a kill");
}

#[test]
fn forks_equal_their_parent_up_to_what_is_changed() {
    let place = Place::new();
    let (parent, expected) = edited(&place);
    let store = RunStore::open(&parent.join("store")).unwrap().store;
    let at = store.checkpoints().into_iter().map(|record| format!("{}={}", record.loop_path, record.step)).collect::<Vec<_>>();
    store.close().unwrap();
    assert_eq!(at.last().unwrap(), "train=900");
    expected.check(&fork(&place, &parent, "same", &["--at", &at[0]]), "a fork without a change");
    let longer = fork(&place, &parent, "longer", &["--at", &at[0], "--arg", "steps=950"]);
    let metrics = std::fs::read(longer.join("metrics.jsonl")).unwrap();
    assert!(metrics.starts_with(expected.metrics()) && metrics.len() > expected.metrics().len(), "50 more steps and nothing else");
    // Without what came later the last generation is missing from the place on where it came.
    let plain = fork(&place, &parent, "plain", &["--at", "0", "--drop-later"]);
    let lines = std::fs::read_to_string(plain.join("metrics.jsonl")).unwrap();
    let first = generations(&parent, GenerationStatus::Accepted)[1].step as usize;
    let parents = String::from_utf8(expected.metrics().to_vec()).unwrap();
    let same = lines.lines().zip(parents.lines()).take_while(|(a, b)| a == b).count();
    assert_eq!(same, first, "the first edit was at step {first}");

    let refuse = |words: &[&str], part: &str| {
        let mut command = place.command(&["runs", "fork", parent.to_str().unwrap(), "--runs", "refused"]);
        let output = command.args(words).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains(part) && text.lines().count() < 8, "{words:?}: {text}");
    };
    refuse(&["--at", "train=451"], "a place with a checkpoint: train=");
    refuse(&["--at", "train"], "LOOP=STEP");
    refuse(&["--arg", "stepz=3"], "no argument --stepz; did you mean --steps?");
    refuse(&["--arg", "steps"], "NAME=VALUE");
    refuse(&["--drop-arg", "stepz"], "an argument that the run was started with");
}

#[test]
fn resuming_with_new_code_says_what_it_will_do() {
    let place = Place::new();
    let mut script = Script::new(300);
    script.write(&place);
    succeed(&mut place.command(&["run", "--quiet", "--seed", "3", "--runs", "runs", "s.lua"]));
    let id = place.folder("runs").file_name().unwrap().to_str().unwrap().to_string();
    let resume = |parts: &[&str]| {
        let output = place.command(&["resume", &id, "--code", "new", "--runs", "runs"]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let missing: Vec<_> = parts.iter().filter(|part| !text.contains(**part)).collect();
        assert!(output.status.success() && missing.is_empty(), "should say {missing:?}: {text}");
    };
    script.steps = 320;
    script.write(&place);
    resume(&[
        "skip  step seed#0: recorded",
        "run   loop train: from step 300",
        "is a fork of",
        "generation 1 leads from step 300 of train on",
    ]);
    let text = script.text().replace("math.random(1 << 30)", "math.random(1 << 29)");
    script.write_as(&place, &text);
    resume(&["skip  step seed#0: recorded; its function has changed, the result is kept", "run   loop train: from step 300"]);
    let text = script.text().replace("run:step(\"seed\", {}", "run:step(\"seed\", { again = true }");
    script.write_as(&place, &text);
    resume(&["run   step seed#0: its inputs were {} and are now {\"again\":true}", "everything from there on is done again"]);
    let output = place.command(&["resume", &id, "--runs", "runs"]).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("the run is finished"), "the parent is as it was");
}

#[test]
fn a_live_run_is_held_steered_and_stopped() {
    let place = Place::new();
    Script::new(1_000_000).write(&place);
    let mut live = Live::start(&place, "live", &[]);
    let id = live.folder.file_name().unwrap().to_str().unwrap().to_string();
    let say = |words: &[&str]| {
        let output = place.command(words).args(["latest", "--runs", "live"]).output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    };
    let check = |words: &[&str], part: &str| {
        let (ok, text) = say(words);
        assert!(ok && text.contains(part), "{words:?}: {text}");
    };
    check(&["pause"], "paused after step");
    let lines = live.lines();
    std::thread::sleep(Duration::from_millis(150));
    assert_eq!(live.lines(), lines, "a paused run stands still");
    check(&["checkpoint"], "checkpoints/train-");
    check(&["continue"], "goes on from step");
    let output = place.command(&["set", "latest", "optimizer.lr=0.25", "--runs", "live"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    check(&["reload"], "the files are those that run already");
    for (setting, part) in [
        ("optimizer.lrr=1", "lr, eps, weight_decay"),
        ("teacher.lr=1", "model"),
        ("optimizer.lr=-1", "lr"),
        ("optimizer.eps=false", "a number"),
        ("lr=1", "NAME=VALUE"),
    ] {
        let output = place.command(&["set", "latest", setting, "--runs", "live"]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains(part), "{setting}: {text}");
    }
    let lines = live.lines();
    live.wait("a step with the setting", |live| live.lines() > lines);
    check(&["stop"], &format!("stopped; go on with: perilune resume live/{id}"));
    let metrics = std::fs::read_to_string(live.folder.join("metrics.jsonl")).unwrap();
    let last: Value = serde_json::from_str(metrics.lines().last().unwrap()).unwrap();
    assert_eq!(last["lr"], 0.25);
    let (ok, text) = say(&["pause"]);
    assert!(!ok && text.contains("no process runs this run"), "{text}");
    live.child.wait_with_output().unwrap();
    // The setting stays with the run, until the script may decide again.
    let mut again = place.command(&["resume", "latest", "--quiet", "--runs", "live"]).stderr(Stdio::null()).spawn().unwrap();
    let folder = place.folder("live");
    let began = Instant::now();
    while ask(&folder, &json!({ "do": "set", "settings": ["optimizer.lr=script"] })).is_err() {
        assert!(began.elapsed() < Duration::from_secs(30), "it does not come up again");
        std::thread::sleep(Duration::from_millis(10));
    }
    ask(&folder, &json!({ "do": "checkpoint" })).unwrap();
    // All of this may have happened at one boundary: the setting shows in a step only.
    let lines = || std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap().lines().count();
    let before = lines();
    while lines() <= before {
        assert!(began.elapsed() < Duration::from_secs(60), "it does not go on");
        std::thread::sleep(Duration::from_millis(10));
    }
    ask(&folder, &json!({ "do": "stop" })).unwrap();
    assert_eq!(again.wait().unwrap().code(), Some(130));
    let metrics = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    let values: Vec<f64> = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["lr"].as_f64().unwrap()).collect();
    let runs = values.chunk_by(|a, b| a == b).map(|run| run[0]).collect::<Vec<_>>();
    assert_eq!(runs, [1e-3, 0.25, 1e-3]);
}
