//! `perilune runs show RUN`: everything about one run on a page: what it is, how it stands, steps, code, checkpoints, numbers.

use super::{Which, json_number};
use crate::cli::output::{columns, print};
use crate::cli::plot::{Style, plot};
use crate::cli::table::{Side, shortened, table};
use crate::cli::times::{ago, duration, utc};
use crate::cli::units::bytes;
use crate::error::{Error, Result};
use crate::host::code_diff::{FileChange, generation_changes};
use crate::host::inspect::{Inspection, Look, Standing, inspect};
use crate::host::metric_series::{Logged, Series, read, read_timing};
use crate::host::progress::short;
use crate::host::run::unix_seconds;
use crate::host::run_object::shown;
use crate::store::records::{CheckpointRecord, GenerationRecord, GenerationStatus, Output, StepRecord, StepStatus};
use serde_json::{Value as Json, json};

/// Show a run: how it stands, its steps, the changes of its code, its checkpoints, its metrics drawn over the steps.
#[derive(clap::Args)]
pub struct Show {
    #[command(flatten)]
    which: Which,
    /// Draw this metric; may be given more than once. Otherwise up to four, losses first.
    #[arg(long, value_name = "NAME")]
    metric: Vec<String>,
    /// Draw with plain characters.
    #[arg(long)]
    ascii: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Metrics that are drawn where none is asked for.
const PLOTS_MAX: usize = 4;
/// Steps that are listed in any case.
const STEPS_MAX: usize = 30;

impl Show {
    pub fn run(self) -> Result<()> {
        let run = inspect(&self.which.folder()?, Look::Whole);
        if run.standing == Standing::Unreadable {
            return Err(Error::Script(format!("{}: {}", run.id, run.reason.unwrap_or_default())));
        }
        let logged = read(&run.folder)?;
        let chosen = choose(&logged, &read_timing(&run.folder)?, &self.metric)?;
        if self.json {
            return print(&format!("{:#}\n", object(&run, &logged)));
        }
        let width = columns();
        let mut text = facts(&run, width);
        text += &steps(&run.records.steps, width);
        text += &generations(&run);
        text += &checkpoints(&run.records.checkpoints, width);
        text += &events(&run, width);
        if !chosen.is_empty() {
            text += "\nmetrics\n";
        }
        let style = if self.ascii { Style::Ascii } else { Style::Braille };
        for series in &chosen {
            text += &plot(&series.title(), &series.points, width, style);
        }
        text += &single_values(&logged);
        for damage in &logged.damaged {
            text += &format!("\nmetrics.jsonl: {damage}");
        }
        print(&text)
    }
}

/// The series to draw: those of the names that were asked for, with or without their loop; else a few, losses first.
fn choose(logged: &Logged, timing: &Logged, names: &[String]) -> Result<Vec<Series>> {
    if names.is_empty() {
        let mut series: Vec<&Series> = logged.series.iter().filter(|series| series.points.len() > 1).collect();
        series.sort_by_key(|series| series.rank());
        return Ok(series.into_iter().take(PLOTS_MAX).cloned().collect());
    }
    let mut chosen = Vec::new();
    for name in names {
        let all = logged.series.iter().chain(&timing.series);
        let found: Vec<Series> = all.filter(|series| series.name == *name || series.title() == *name).cloned().collect();
        if found.is_empty() {
            let mut known: Vec<&str> = logged.series.iter().chain(&timing.series).map(|series| series.name.as_str()).collect();
            known.sort_unstable();
            known.dedup();
            let expected = if known.is_empty() { "the name of a metric; the run has logged none".into() } else { known.join(", ") };
            return Err(Error::argument("runs show", "--metric", expected, format!("\"{name}\"")));
        }
        chosen.extend(found);
    }
    Ok(chosen)
}

fn facts(run: &Inspection, width: usize) -> String {
    let facts = run.facts.as_ref().expect("a run whose facts cannot be read is not shown");
    let now = unix_seconds();
    let mut text = format!("run {}  {}  {}\n", run.id, facts.workflow, run.standing.name());
    let mut rows = vec![vec!["  script".to_string(), run.words()], vec!["  folder".into(), shown(&run.folder)]];
    let took = run.duration().map_or_else(String::new, |seconds| format!(", {} so far", duration(seconds)));
    let took = if run.alive { took } else { took.replace(" so far", "").replacen(", ", ", took ", 1) };
    let record = run.records.run.as_ref();
    let resumed = match record.map_or(0, |record| record.resumes) {
        0 => String::new(),
        1 => ", resumed once".into(),
        count => format!(", resumed {count} times"),
    };
    rows.push(vec!["  started".into(), format!("{}, {}{took}{resumed}", utc(facts.created), ago(facts.created, now))]);
    if let Some(parent) = &facts.parent {
        let place = parent.at.as_ref().map_or_else(|| "its beginning".to_string(), |at| format!("at {at}"));
        rows.push(vec!["  fork of".into(), format!("{}, {place}", parent.id)]);
    }
    rows.push(vec!["  in".into(), facts.working_folder.clone()]);
    rows.push(vec!["  seed".into(), format!("{}, engine {}", facts.seed, facts.engine)]);
    if let Some(record) = record.filter(|_| run.alive) {
        rows.push(vec!["  process".into(), record.pid.to_string()]);
    }
    if let Some((path, step)) = run.position() {
        rows.push(vec!["  at".into(), format!("{step} steps of {path}")]);
    }
    let head = [("", Side::Left), ("", Side::Left)];
    text += &table(&head, &rows, usize::MAX);
    for line in run.reason.iter().flat_map(|reason| reason.lines()) {
        text += &format!("  {line}\n");
    }
    for note in &run.notes {
        text += &format!("  note: {note}\n");
    }
    if !facts.args.is_empty() {
        text += "\narguments\n";
        let rows: Vec<Vec<String>> = facts.args.iter().map(|(name, value)| vec![format!("  {name}"), plain(value)]).collect();
        text += &table(&head, &rows, width);
    }
    text
}

/// A value as it would be typed.
fn plain(value: &Json) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_string)
}

fn steps(all: &[StepRecord], width: usize) -> String {
    // What `run:now()` recorded is no step of the script.
    let mut all: Vec<&StepRecord> = all.iter().filter(|step| !step.key.contains("#now")).collect();
    if all.is_empty() {
        return String::new();
    }
    // A step in a loop is recorded each time: the page shows the last ones, and those that did not end well.
    let older = all.len().saturating_sub(STEPS_MAX);
    let mut place = 0..;
    all.retain(|step| place.next().is_some_and(|place: usize| place >= older) || step.status != StepStatus::Done);
    let hidden = if older == 0 { String::new() } else { "  (of earlier ones only those that were not done; --json has all)\n".into() };
    let head = [("  step", Side::Left), ("status", Side::Left), ("took", Side::Right), ("tries", Side::Right), ("result", Side::Left)];
    let row = |step: &&StepRecord| {
        let status = match step.status {
            StepStatus::Started => "not finished",
            StepStatus::Done => "done",
            StepStatus::Failed => "failed",
        };
        let result = match (&step.error, &step.output) {
            (Some(error), _) => error.clone(),
            (None, Some(Output::Inline(value))) => match value.as_array().map(Vec::as_slice) {
                Some([]) => String::new(),
                Some([one]) => one.to_string(),
                _ => value.to_string(),
            },
            (None, Some(Output::File { hash, bytes: size })) => format!("{} in steps/{}", bytes(*size), shortened(hash, 11)),
            (None, None) => String::new(),
        };
        vec![format!("  {}", step.key), status.into(), duration(step.seconds), step.attempts.to_string(), result]
    };
    format!("\nsteps\n{hidden}{}", table(&head, &all.iter().map(row).collect::<Vec<_>>(), width))
}

/// The diffs of one generation, or why there are none.
fn changes_of(run: &Inspection, record: &GenerationRecord) -> Result<Vec<FileChange>, String> {
    generation_changes(&run.folder, record, &run.records.generations).map_err(|error| error.to_string())
}

fn generations(run: &Inspection) -> String {
    let mut text = String::new();
    for record in &run.records.generations {
        let status = if record.status == GenerationStatus::Accepted { "" } else { ", rejected" };
        let place = match &record.loop_path {
            Some(path) => format!("from step {} of {path}", record.step),
            None => "from the start".into(),
        };
        text += &format!("  generation {} {place}, {}{status}\n", record.number, utc(record.time));
        for line in record.reason.iter().flat_map(|reason| reason.lines()) {
            text += &format!("    {line}\n");
        }
        match changes_of(run, record) {
            Err(error) => text += &format!("    its code cannot be read: {error}\n"),
            Ok(changes) => {
                for line in changes.iter().flat_map(|change| change.diff.lines()) {
                    text += &format!("    {line}\n");
                }
            }
        }
    }
    if text.is_empty() { text } else { format!("\ncode\n{text}") }
}

fn checkpoints(all: &[CheckpointRecord], width: usize) -> String {
    if all.is_empty() {
        return String::new();
    }
    let now = unix_seconds();
    let head = [("  checkpoint", Side::Left), ("step", Side::Right), ("bytes", Side::Right), ("taken", Side::Left), ("", Side::Left)];
    let row = |record: &CheckpointRecord| {
        let number = |value: &Json| value.as_f64().map_or_else(|| plain(value), short);
        let metrics: Vec<String> = record.metrics.iter().map(|(name, value)| format!("{name} {}", number(value))).collect();
        let mut about = Vec::new();
        if record.pinned {
            about.push("pinned".to_string());
        }
        about.extend(record.lost.iter().map(|reason| format!("lost: {reason}")));
        about.extend(metrics);
        vec![format!("  {}", record.name), record.step.to_string(), bytes(record.bytes), ago(record.time, now), about.join("  ")]
    };
    format!("\ncheckpoints\n{}", table(&head, &all.iter().map(row).collect::<Vec<_>>(), width))
}

fn events(run: &Inspection, width: usize) -> String {
    let all = &run.records.events;
    if all.is_empty() {
        return String::new();
    }
    let head = [("  event", Side::Left), ("at", Side::Left), ("when", Side::Left), ("detail", Side::Left)];
    let row = |event: &crate::store::records::EventRecord| {
        let place = event.loop_path.as_ref().map_or_else(String::new, |path| format!("{path} {}", event.step));
        vec![format!("  {}", event.kind), place, utc(event.time), event.detail.to_string()]
    };
    format!("\nevents\n{}", table(&head, &all.iter().map(row).collect::<Vec<_>>(), width))
}

/// What was logged once: a line for all.
fn single_values(logged: &Logged) -> String {
    let once: Vec<String> = logged
        .series
        .iter()
        .filter_map(|series| match series.points[..] {
            [(_, value)] => Some(format!("{} {}", series.title(), short(value))),
            _ => None,
        })
        .collect();
    if once.is_empty() { String::new() } else { format!("\nlogged once: {}\n", once.join(", ")) }
}

fn object(run: &Inspection, logged: &Logged) -> Json {
    let generation = |record: &GenerationRecord| {
        let mut object = json!(record);
        match changes_of(run, record) {
            Ok(changes) => object["diff"] = changes.iter().map(|change| json!(change.diff)).collect(),
            Err(error) => object["damage"] = error.into(),
        }
        object
    };
    let series = |series: &Series| {
        let points: Vec<Json> = series.points.iter().map(|(step, value)| json!([step, json_number(*value)])).collect();
        json!({ "loop": series.loop_path, "name": series.name, "points": points })
    };
    json!({
        "id": run.id,
        "folder": run.folder.display().to_string(),
        "status": run.standing,
        "alive": run.alive,
        "reason": run.reason,
        "seconds": run.duration(),
        "notes": run.notes,
        "facts": run.facts,
        "run": run.records.run,
        "steps": run.records.steps.iter().filter(|step| !step.key.contains("#now")).collect::<Vec<_>>(),
        "generations": run.records.generations.iter().map(generation).collect::<Vec<_>>(),
        "checkpoints": run.records.checkpoints,
        "events": run.records.events,
        "metrics": logged.series.iter().map(series).collect::<Vec<_>>(),
        "damaged_metrics": logged.damaged,
    })
}
