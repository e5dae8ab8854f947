//! `perilune bench durability`: what it costs that a run survives. Training with checkpoints against training without, the time
//! a run with many recorded steps takes to resume, and the room of its store. Measures the program as users start it.

use super::bench::{Case, Times};
use super::units;
use crate::checkpoint::catalog::list;
use crate::error::{Error, Result};
use crate::host::run::read_facts;
use crate::store::{Database, metrics};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant, UNIX_EPOCH};

/// Steps of the stretch behind a checkpoint in which it is written, and of the stretch without one that it is compared with.
const STRETCH: usize = 6;
/// What is promised: at most this share of the time for a checkpoint every so many steps ...
const SHARE_MAX: f64 = 0.02;
const EVERY: f64 = 50.0;
/// ... this long to resume a run with so many recorded steps ...
const RESUME_SECONDS_MAX: f64 = 2.0;
const STEPS: usize = 10_000;
/// ... and this many times the bytes of the records on the disk.
const RATIO_MAX: f64 = 4.0;

const TRAIN: &str = r#"
local engine = require "engine"
return engine.workflow {
  name = "train",
  args = { config = "small", dtype = "f32", sequences = 4, tokens = 512, steps = 1, every = 1 },
  run = function(run, args)
    local model = run:model("model", { preset = args.config }, { dtype = args.dtype })
    local optim = run:optimizer("adamw", model, { lr = 1e-4 })
    local documents = {}
    for i = 1, args.sequences do
      documents[i] = {}
      for j = 1, args.tokens do documents[i][j] = math.random(0, model.config.vocab_size - 1) end
    end
    local batch = engine.data.batch(documents)
    for step in run:loop("train", { steps = args.steps, checkpoint_every = args.every }) do
      local loss = model:cross_entropy(batch)
      loss:backward()
      step:log { grad_norm = optim:step(), loss = loss }
    end
  end,
}
"#;

/// Ends with an error, so that it can be resumed again and again.
const RECORD: &str = r#"
local engine = require "engine"
return engine.workflow {
  name = "record",
  args = { steps = 1 },
  run = function(run, args)
    for i = 1, args.steps do
      run:step("evaluate", { index = i, prompt = "a question" }, function() return { answer = i, reward = math.sin(i), length = 17 } end)
    end
    error "all steps are recorded"
  end,
}
"#;

/// Report and text. Errors: those of the runs; [`Error::Io`].
pub fn run(case: &Case) -> Result<(Value, String)> {
    let folder = std::path::absolute(format!("checkpoints/bench-{}", std::process::id()))
        .map_err(|error| Error::io(Path::new("checkpoints"), "find", error))?;
    std::fs::create_dir_all(&folder).map_err(|error| Error::io(&folder, "create", error))?;
    let measured = measure(case, &folder);
    // What was measured counts, whether or not it goes away.
    let _ = std::fs::remove_dir_all(&folder);
    measured
}

fn measure(case: &Case, folder: &Path) -> Result<(Value, String)> {
    let (training, mut text) = training(case, folder)?;
    let (records, more) = records(folder)?;
    text += &more;
    Ok((json!({ "training": training, "records": records }), text))
}

/// Training with a checkpoint every two stretches: the stretch behind each against the stretches without one on both sides of
/// it, so that a machine that slows down or speeds up does not count.
fn training(case: &Case, folder: &Path) -> Result<(Value, String)> {
    let checkpoints = ((case.seconds / 30.0).ceil() as usize).max(3);
    let steps = 2 * STRETCH * (checkpoints + 1);
    let (steps_word, every) = (steps.to_string(), (2 * STRETCH).to_string());
    let words = ["--config", &case.name, "--dtype", case.dtype.name(), "--steps", &steps_word, "--every", &every];
    let output = start(folder, "train", TRAIN, &words)?;
    if !output.status.success() {
        return Err(Error::Script(String::from_utf8_lossy(&output.stderr).into_owned()));
    }
    let run = run_in(&folder.join("train"))?;
    let mut ends = Vec::new();
    for (_, line) in metrics::read(&run.join("timing.jsonl"))? {
        ends.extend(line?.get("time").and_then(Value::as_f64));
    }
    if ends.len() != steps {
        return Err(Error::format(&run.join("timing.jsonl"), "lines", format!("{steps} steps with a time"), ends.len().to_string()));
    }
    // From the end of the stretch before it to its own end.
    let stretch = |index: usize| ends[(index + 1) * STRETCH - 1] - ends[index * STRETCH - 1];
    let without: Vec<f64> = (0..=checkpoints).map(|k| stretch(2 * k + 1)).collect();
    let lost: Vec<f64> = (1..=checkpoints).map(|k| stretch(2 * k) - (without[k - 1] + without[k]) / 2.0).collect();
    let step = Times::new(without.iter().map(|seconds| seconds / STRETCH as f64).collect());
    let lost = Times::new(lost);
    let share = lost.median() / (EVERY * step.median());
    let (bytes, writing) = last_checkpoint(&run, &ends)?;
    let report = json!({
        "config": case.name,
        "dtype": case.dtype.name(),
        "checkpoints": checkpoints,
        "checkpoint_bytes": bytes,
        "step": step.to_json(),
        "lost_s_median": lost.median(),
        "lost_s_best": lost.best(),
        "written_after_s": writing,
        "every": EVERY,
        "share": share,
        "share_max": SHARE_MAX,
    });
    let text = format!(
        "train {}, {}, {checkpoints} checkpoints of {}, each written {writing:.1} s after its step\n\
         step      {:.1} ms median without one, spread {:.0}%\n\
         lost      {:.0} ms a checkpoint median, {:.0} least: {:.2}% with one every {EVERY} steps (limit {:.0}%)\n",
        case.name,
        case.dtype,
        units::bytes(bytes),
        step.median() * 1e3,
        step.spread() * 100.0,
        lost.median() * 1e3,
        lost.best() * 1e3,
        share * 100.0,
        SHARE_MAX * 100.0,
    );
    Ok((report, text))
}

/// Bytes of the newest checkpoint but the one at the end, and how long after its step it was complete.
fn last_checkpoint(run: &Path, ends: &[f64]) -> Result<(u64, f64)> {
    let root = run.join("checkpoints");
    let found = list(&root)?.into_iter().rev().filter_map(|(_, manifest)| manifest.ok()).find(|manifest| manifest.step < ends.len() as u64);
    let Some(manifest) = found else {
        return Err(Error::format(&root, "checkpoints", "one before the end", "none"));
    };
    let path = root.join(&manifest.name).join("MANIFEST.json");
    let written = path.metadata().and_then(|about| about.modified()).map_err(|error| Error::io(&path, "measure", error))?;
    let written = written.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs_f64();
    let taken = read_facts(run)?.created + ends[manifest.step as usize - 1];
    Ok((manifest.bytes(), written - taken))
}

fn records(folder: &Path) -> Result<(Value, String)> {
    let ended_as_planned = |output: Output| {
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        if text.contains("all steps are recorded") { Ok(()) } else { Err(Error::Script(text)) }
    };
    let began = Instant::now();
    ended_as_planned(start(folder, "record", RECORD, &["--steps", &STEPS.to_string()])?)?;
    let recording = began.elapsed().as_secs_f64();
    let mut seconds = Vec::new();
    for _ in 0..5 {
        let began = Instant::now();
        ended_as_planned(perilune(folder, &["resume", "latest", "--quiet", "--runs", "record"])?)?;
        seconds.push(began.elapsed().as_secs_f64());
    }
    let resume = Times::new(seconds);
    let database = Database::open(&run_in(&folder.join("record"))?.join("store"))?.database;
    let (disk, logical) = (database.disk_bytes()?, database.logical_bytes()?);
    database.close()?;
    let ratio = disk as f64 / logical as f64;
    let report = json!({
        "steps": STEPS,
        "recording_s": recording,
        "resume": resume.to_json(),
        "resume_s_max": RESUME_SECONDS_MAX,
        "store_bytes": disk,
        "logical_bytes": logical,
        "ratio": ratio,
        "ratio_max": RATIO_MAX,
    });
    let text = format!(
        "resume    {:.2} s median of a run with {STEPS} recorded steps, {:.2} best (limit {RESUME_SECONDS_MAX} s); recording them took {recording:.1} s\n\
         store     {} on the disk for {} of records: {ratio:.1} times (limit {RATIO_MAX})\n",
        resume.median(),
        resume.best(),
        units::bytes(disk),
        units::bytes(logical),
    );
    Ok((report, text))
}

/// Runs `script` with its runs in `folder`/`name`.
fn start(folder: &Path, name: &str, script: &str, words: &[&str]) -> Result<Output> {
    let path = folder.join(format!("{name}.lua"));
    std::fs::write(&path, script).map_err(|error| Error::io(&path, "write", error))?;
    let path = path.display().to_string();
    perilune(folder, &[&["run", "--quiet", "--runs", name, &path], words].concat())
}

fn perilune(folder: &Path, words: &[&str]) -> Result<Output> {
    let program = std::env::current_exe().map_err(|error| Error::io(Path::new("perilune"), "find", error))?;
    let output = Command::new(&program).args(words).current_dir(folder).stdin(Stdio::null()).output();
    output.map_err(|error| Error::io(&program, "start", error))
}

/// The one run in `root`.
fn run_in(root: &Path) -> Result<PathBuf> {
    let mut entries = std::fs::read_dir(root).map_err(|error| Error::io(root, "list", error))?;
    match entries.next() {
        Some(entry) => Ok(entry.map_err(|error| Error::io(root, "list", error))?.path()),
        None => Err(Error::format(root, "runs", "one", "none")),
    }
}
