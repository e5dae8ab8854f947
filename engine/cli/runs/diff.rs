//! `perilune runs diff A B`: in what two runs differ: what they were started with, their code, what came out.

use super::json_number;
use crate::checkpoint::retention::Order;
use crate::cli::output::{columns, print};
use crate::cli::run::runs_folder;
use crate::cli::table::{Side, table};
use crate::error::{Error, Result};
use crate::host::code_diff::{FileChange, changes, latest};
use crate::host::inspect::{Inspection, Look, Standing, inspect};
use crate::host::metric_series::{Series, read};
use crate::host::progress::short;
use serde_json::{Value as Json, json};
use std::path::PathBuf;

/// Compare two runs: arguments, seed, code, metrics, and the step at which their numbers part.
#[derive(clap::Args)]
pub struct Diff {
    /// Id of the first run, the beginning of one, `latest`, or its folder.
    a: String,
    /// The second run.
    b: String,
    /// Where runs are kept.
    #[arg(long, value_name = "FOLDER", default_value = "checkpoints/runs")]
    runs: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Two runs side by side.
struct Pair {
    a: Inspection,
    b: Inspection,
    /// What they were started with, where it differs: name and both values.
    differing: Vec<(String, String, String)>,
    code: Vec<FileChange>,
    metrics: Vec<Metric>,
}

/// A metric that one of them has, or both.
struct Metric {
    a: Option<Series>,
    b: Option<Series>,
}

impl Diff {
    pub fn run(self) -> Result<()> {
        let seen = |name: &str| {
            let run = inspect(&runs_folder(&self.runs, name)?, Look::Whole);
            match run.standing {
                Standing::Unreadable => Err(Error::Script(format!("{}: {}", run.id, run.reason.unwrap_or_default()))),
                _ => Ok(run),
            }
        };
        let pair = Pair::of(seen(&self.a)?, seen(&self.b)?)?;
        print(&if self.json { format!("{:#}\n", pair.object()) } else { pair.text(columns()) })
    }
}

impl Pair {
    fn of(a: Inspection, b: Inspection) -> Result<Self> {
        let code = |run: &Inspection| Ok::<_, Error>(latest(&run.folder, &run.records.generations)?.1);
        let changed = changes(&code(&a)?, &code(&b)?);
        let (series_a, mut series_b) = (read(&a.folder)?.series, read(&b.folder)?.series);
        let mut metrics: Vec<Metric> = Vec::new();
        for series in series_a {
            let place = series_b.iter().position(|other| other.title() == series.title());
            metrics.push(Metric { b: place.map(|place| series_b.remove(place)), a: Some(series) });
        }
        metrics.extend(series_b.into_iter().map(|series| Metric { a: None, b: Some(series) }));
        Ok(Self { differing: differing(&a, &b), code: changed, metrics, a, b })
    }

    fn text(&self, width: usize) -> String {
        let mut text = String::new();
        for (name, run) in [("A", &self.a), ("B", &self.b)] {
            text += &format!("{name}  {}  {}  {}\n", run.id, run.standing.name(), run.words());
        }
        if self.differing.is_empty() {
            text += "\nstarted with the same arguments and seed, by the same engine\n";
        } else {
            let head = [("started with", Side::Left), ("A", Side::Left), ("B", Side::Left)];
            let rows: Vec<_> = self.differing.iter().map(|(name, a, b)| vec![name.clone(), a.clone(), b.clone()]).collect();
            text += &format!("\n{}", table(&head, &rows, width));
        }
        text += if self.code.is_empty() { "\nthe same code\n" } else { "\ncode\n" };
        self.code.iter().for_each(|change| text += &change.diff);
        if self.metrics.is_empty() {
            return text + "\nno metrics\n";
        }
        let head = [
            ("metric", Side::Left),
            ("last A", Side::Right),
            ("last B", Side::Right),
            ("best A", Side::Right),
            ("best B", Side::Right),
            ("", Side::Left),
            ("to the bit", Side::Left),
        ];
        let rows: Vec<_> = self.metrics.iter().map(Metric::row).collect();
        text + &format!("\n{}", table(&head, &rows, width))
    }

    fn object(&self) -> Json {
        let run = |run: &Inspection| json!({ "id": run.id, "status": run.standing, "facts": run.facts });
        let differing = |(name, a, b): &(String, String, String)| json!({ "name": name, "a": a, "b": b });
        let change =
            |change: &FileChange| json!({ "path": change.path, "added": change.added, "removed": change.removed, "diff": change.diff });
        json!({
            "a": run(&self.a),
            "b": run(&self.b),
            "started_with": self.differing.iter().map(differing).collect::<Vec<_>>(),
            "code": self.code.iter().map(change).collect::<Vec<_>>(),
            "metrics": self.metrics.iter().map(Metric::object).collect::<Vec<_>>(),
        })
    }
}

/// What the runs were started with, where it is not the same.
fn differing(a: &Inspection, b: &Inspection) -> Vec<(String, String, String)> {
    let (Some(facts_a), Some(facts_b)) = (&a.facts, &b.facts) else { return Vec::new() };
    let value = |value: Option<&Json>| value.map_or("-".into(), |value| value.as_str().map_or_else(|| value.to_string(), str::to_string));
    let mut names: Vec<&String> = facts_a.args.keys().collect();
    names.extend(facts_b.args.keys().filter(|name| !facts_a.args.contains_key(*name)));
    let arguments = names.into_iter().map(|name| (format!("--{name}"), value(facts_a.args.get(name)), value(facts_b.args.get(name))));
    let others = [
        ("workflow", facts_a.workflow.clone(), facts_b.workflow.clone()),
        ("script", facts_a.script.clone(), facts_b.script.clone()),
        ("--seed", facts_a.seed.to_string(), facts_b.seed.to_string()),
        ("engine", facts_a.engine.clone(), facts_b.engine.clone()),
        ("folder", facts_a.working_folder.clone(), facts_b.working_folder.clone()),
    ];
    // Two builds of one version may round differently; checkpoints know which it was.
    let builds = a.engine_build().zip(b.engine_build()).map(|(a, b)| ("engine build".to_string(), a, b));
    let all = others.map(|(name, a, b)| (name.to_string(), a, b)).into_iter().chain(builds).chain(arguments);
    all.filter(|(_, a, b)| a != b).collect()
}

impl Metric {
    fn any(&self) -> &Series {
        self.a.as_ref().or(self.b.as_ref()).expect("a metric is one of a run")
    }

    fn row(&self) -> Vec<String> {
        let value = |series: &Option<Series>, of: fn(&Series) -> Option<(u64, f64)>| {
            series.as_ref().and_then(of).map_or("-".to_string(), |(_, value)| short(value))
        };
        let order = match self.any().order() {
            Order::Lowest => "lowest",
            Order::Highest => "highest",
        };
        vec![
            self.any().title(),
            value(&self.a, Series::last),
            value(&self.b, Series::last),
            value(&self.a, Series::best),
            value(&self.b, Series::best),
            order.into(),
            self.verdict(),
        ]
    }

    /// Where the two part, in words.
    fn verdict(&self) -> String {
        match (&self.a, &self.b) {
            (Some(a), Some(b)) => match a.first_difference(b) {
                (Some(step), _) => format!("differs from step {step}"),
                (None, 0) => "no common step".into(),
                (None, 1) if a.points.len() == 1 && b.points.len() == 1 => "equal".into(),
                (None, common) if common == a.points.len() && common == b.points.len() => format!("equal, all {common} values"),
                (None, common) => format!("equal, the {common} common values"),
            },
            (Some(_), None) => "only A".into(),
            _ => "only B".into(),
        }
    }

    fn object(&self) -> Json {
        let side = |series: &Option<Series>| {
            let point = |(step, value): (u64, f64)| json!({ "step": step, "value": json_number(value) });
            series.as_ref().map(|series| json!({ "last": series.last().map(point), "best": series.best().map(point) }))
        };
        let compared = self.a.as_ref().zip(self.b.as_ref()).map(|(a, b)| a.first_difference(b));
        json!({
            "loop": self.any().loop_path,
            "name": self.any().name,
            "a": side(&self.a),
            "b": side(&self.b),
            "first_difference": compared.and_then(|(first, _)| first),
            "common": compared.map(|(_, common)| common),
        })
    }
}
