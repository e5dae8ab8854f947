//! `perilune runs export RUN`: everything that is recorded of a run, as JSON lines that need no database to be read.
//!
//! One object a line, its `kind` first, in this order: one `run`; `generation`, each with its sources; `step`; `checkpoint`;
//! `event`; `metric`. The keys are in checkpoints/README.md. Keys may be added, never changed.

use super::Which;
use crate::cli::output::print_with;
use crate::error::{Error, Result};
use crate::host::code;
use crate::host::inspect::{Inspection, Look, Standing, inspect};
use crate::store::metrics;
use crate::store::records::{EventRecord, GenerationRecord};
use serde::Serialize;
use serde_json::{Map, Value as Json, json};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

/// Write a run's records as JSON lines: run, generations with their code, steps, checkpoints, events, metrics.
#[derive(clap::Args)]
pub struct Export {
    #[command(flatten)]
    which: Which,
    /// Write to this new file instead of standard output.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

impl Export {
    pub fn run(self) -> Result<()> {
        let run = inspect(&self.which.folder()?, Look::Whole);
        if run.standing == Standing::Unreadable {
            return Err(Error::Script(format!("{}: {}", run.id, run.reason.unwrap_or_default())));
        }
        run.notes.iter().for_each(|note| eprintln!("note: {note}"));
        let mut damage = Vec::new();
        match &self.output {
            None => print_with(|out| write(&run, out, &mut damage))?,
            Some(path) => {
                let mut to_file = || {
                    let mut file = BufWriter::new(File::create_new(path)?);
                    write(&run, &mut file, &mut damage)?;
                    file.into_inner()?.sync_all()
                };
                to_file().map_err(|error| Error::io(path, "write", error))?;
            }
        }
        // Everything that could be read is written by now.
        if damage.is_empty() { Ok(()) } else { Err(Error::Script(format!("what is damaged is left out: {}", damage.join("; ")))) }
    }
}

/// Writes all lines; what could not be read goes to `damage`.
fn write(run: &Inspection, out: &mut dyn Write, damage: &mut Vec<String>) -> io::Result<()> {
    line(
        out,
        "run",
        &json!({
            "id": run.id, "status": run.standing, "alive": run.alive, "reason": run.reason, "facts": run.facts, "record": run.records.run,
        }),
    )?;
    for record in &run.records.generations {
        line(out, "generation", &generation(&run.folder, record, damage))?;
    }
    run.records.steps.iter().try_for_each(|record| line(out, "step", record))?;
    run.records.checkpoints.iter().try_for_each(|record| line(out, "checkpoint", record))?;
    run.records.events.iter().try_for_each(|record| line(out, "event", &event(record)))?;
    metric_lines(&run.folder, out, damage)
}

fn line(out: &mut dyn Write, kind: &str, record: &impl Serialize) -> io::Result<()> {
    let mut object = Map::from_iter([("kind".to_string(), Json::from(kind))]);
    let Json::Object(keys) = json!(record) else { unreachable!("records are objects") };
    object.extend(keys);
    writeln!(out, "{}", Json::Object(object))
}

/// An event's own kind stands under `event`: `kind` is that of the line.
fn event(record: &EventRecord) -> Map<String, Json> {
    let Json::Object(mut object) = json!(record) else { unreachable!("records are objects") };
    let kind = object.shift_remove("kind").expect("every event has a kind");
    object.insert("event".into(), kind);
    object
}

fn generation(folder: &Path, record: &GenerationRecord, damage: &mut Vec<String>) -> Json {
    let mut object = json!(record);
    match code::load(folder, record.number) {
        Ok(sources) => {
            object["sources"] = sources.iter().map(|source| json!({ "path": source.path, "text": source.text })).collect();
        }
        Err(error) => damage.push(format!("code of generation {}: {error}", record.number)),
    }
    object
}

/// A line each for what the script logged, and beside it what the engine measured at that step. Both logs are written
/// together, line by line.
fn metric_lines(folder: &Path, out: &mut dyn Write, damage: &mut Vec<String>) -> io::Result<()> {
    let open = |name: &str| {
        let path = folder.join(name);
        path.exists().then(|| metrics::read(&path)).transpose()
    };
    let (logged, timing) = match (open("metrics.jsonl"), open("timing.jsonl")) {
        (Ok(logged), Ok(timing)) => (logged, timing),
        (logged, timing) => {
            damage.extend(logged.err().into_iter().chain(timing.err()).map(|error| error.to_string()));
            return Ok(());
        }
    };
    let mut timing = timing.into_iter().flatten();
    for (_, values) in logged.into_iter().flatten() {
        let measured = timing.next().and_then(|(_, measured)| measured.ok());
        let mut values = match values {
            Ok(values) => values,
            Err(error) => {
                damage.push(error.to_string());
                continue;
            }
        };
        let (loop_path, step) = (values.shift_remove("loop"), values.shift_remove("step"));
        let measured: Option<Map<String, Json>> =
            measured.map(|measured| measured.into_iter().filter(|(name, _)| name != "loop" && name != "step").collect());
        line(out, "metric", &json!({ "loop": loop_path, "step": step, "values": values, "timing": measured }))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kind_of_a_line_comes_first_and_that_of_an_event_has_its_own_key() {
        let record = EventRecord { number: 3, time: 1.5, kind: "set".into(), loop_path: None, step: 7, detail: json!({ "lr": 0.1 }) };
        let mut text = Vec::new();
        line(&mut text, "event", &event(&record)).unwrap();
        let wanted = r#"{"kind":"event","number":3,"time":1.5,"loop_path":null,"step":7,"detail":{"lr":0.1},"event":"set"}"#;
        assert_eq!(String::from_utf8(text).unwrap(), format!("{wanted}\n"));
    }
}
