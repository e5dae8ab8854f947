//! The numbers that a run has logged, as one series a name: what is plotted and compared. Read from its log of metrics, alive
//! or dead. Draws nothing and judges nothing but which way a metric is better.

use super::inspect::number;
use crate::checkpoint::retention::Order;
use crate::error::Result;
use crate::store::metrics;
use std::collections::HashMap;
use std::path::Path;

/// The values of one metric.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// The loop that logged it; empty outside of loops. Loops that run many times, one inside the other, are one.
    pub loop_path: String,
    pub name: String,
    /// Step and value, in the order in which they were logged. The step counts from 0; outside of loops, and in loops that
    /// run many times, it is the number of the value.
    pub points: Vec<(u64, f64)>,
}

/// All series of a log, in the order in which they began.
#[derive(Clone, Debug, Default)]
pub struct Logged {
    pub series: Vec<Series>,
    /// Lines that were damaged, with what is wrong.
    pub damaged: Vec<String>,
}

impl Series {
    /// Its name with its loop in front.
    pub fn title(&self) -> String {
        if self.loop_path.is_empty() { self.name.clone() } else { format!("{}/{}", self.loop_path, self.name) }
    }

    /// Which of its values is the best, as far as its name tells.
    pub fn order(&self) -> Order {
        const MORE_IS_BETTER: [&str; 13] =
            ["reward", "accuracy", "score", "margin", "win", "exact", "pass", "bleu", "rouge", "f1", "recall", "precision", "solved"];
        let name = self.name.to_lowercase();
        if MORE_IS_BETTER.iter().any(|word| name.contains(word)) { Order::Highest } else { Order::Lowest }
    }

    /// The best finite value and its step.
    pub fn best(&self) -> Option<(u64, f64)> {
        let finite = self.points.iter().copied().filter(|(_, value)| value.is_finite());
        finite.reduce(|best, next| {
            let better = match self.order() {
                Order::Lowest => next.1 < best.1,
                Order::Highest => next.1 > best.1,
            };
            if better { next } else { best }
        })
    }

    /// The last value and its step.
    pub fn last(&self) -> Option<(u64, f64)> {
        self.points.last().copied()
    }

    /// The first step at which this and `other` have two values that are not the same bits; steps that one of them lacks
    /// count nothing. And how many steps both have.
    pub fn first_difference(&self, other: &Self) -> (Option<u64>, usize) {
        let values: HashMap<u64, f64> = other.points.iter().copied().collect();
        let common = self.points.iter().filter_map(|(step, value)| Some((*step, *value, *values.get(step)?)));
        let (mut first, mut count) = (None, 0);
        for (step, a, b) in common {
            count += 1;
            if first.is_none() && a.to_bits() != b.to_bits() {
                first = Some(step);
            }
        }
        (first, count)
    }

    /// How soon it is shown where nobody asks for a metric: losses first.
    pub fn rank(&self) -> u8 {
        let name = self.name.to_lowercase();
        match () {
            () if name == "loss" => 0,
            () if ["loss", "nll", "perplexity", "bits"].iter().any(|word| name.contains(word)) => 1,
            () if self.order() == Order::Highest => 2,
            () => 3,
        }
    }
}

/// What the run in `folder` has logged: `metrics.jsonl`. A run that has logged nothing has no series.
///
/// Errors: [`crate::error::Error::Io`].
pub fn read(folder: &Path) -> Result<Logged> {
    read_log(&folder.join("metrics.jsonl"))
}

/// What the engine has measured of the run in `folder`: `timing.jsonl`. Errors: as [`read`].
pub fn read_timing(folder: &Path) -> Result<Logged> {
    read_log(&folder.join("timing.jsonl"))
}

fn read_log(path: &Path) -> Result<Logged> {
    let mut logged = Logged::default();
    if !path.exists() {
        return Ok(logged);
    }
    let mut places: HashMap<(String, String), usize> = HashMap::new();
    for (line_number, line) in metrics::read(path)? {
        let line = match line {
            Ok(line) => line,
            Err(error) => {
                logged.damaged.push(format!("line {line_number}: {error}"));
                continue;
            }
        };
        let full_path = line.get("loop").and_then(|path| path.as_str()).unwrap_or_default();
        let loop_path = without_occurrences(full_path);
        // The loop inside an iteration counts anew each time; the series goes on.
        let own_step = line.get("step").and_then(|step| step.as_u64()).filter(|_| loop_path == full_path);
        for (name, value) in line.iter().filter(|(name, _)| *name != "loop" && *name != "step") {
            let Some(value) = number(value) else { continue };
            let place = *places.entry((loop_path.clone(), name.clone())).or_insert_with(|| {
                logged.series.push(Series { loop_path: loop_path.clone(), name: name.clone(), points: Vec::new() });
                logged.series.len() - 1
            });
            let points = &mut logged.series[place].points;
            points.push((own_step.unwrap_or(points.len() as u64), value));
        }
    }
    Ok(logged)
}

/// `outer[3]/inner` as `outer/inner`.
fn without_occurrences(path: &str) -> String {
    let mut plain = String::new();
    let mut inside = false;
    for c in path.chars() {
        match c {
            '[' => inside = true,
            ']' => inside = false,
            c if !inside => plain.push(c),
            _ => {}
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::LineLog;
    use serde_json::{Value, json};

    fn series(name: &str, values: &[f64]) -> Series {
        let points = values.iter().enumerate().map(|(step, value)| (step as u64, *value)).collect();
        Series { loop_path: String::new(), name: name.into(), points }
    }

    #[test]
    fn a_log_becomes_series_by_loop_and_name() {
        let folder = tempfile::tempdir().unwrap();
        assert!(read(folder.path()).unwrap().series.is_empty());
        let mut log = LineLog::create(&folder.path().join("metrics.jsonl")).unwrap();
        for line in [
            json!({ "loop": "train", "step": 0, "loss": 2.5, "note": "text" }),
            json!({ "loop": "train", "step": 5, "loss": "NaN", "rate": 3 }),
            json!({ "loop": "train[0]/eval", "step": 0, "loss": 1.0 }),
            json!({ "loop": "train[9]/eval", "step": 0, "loss": "-inf" }),
            json!({ "last": 7.0 }),
        ] {
            let Value::Object(line) = line else { unreachable!() };
            log.append(&line).unwrap();
        }
        let logged = read(folder.path()).unwrap();
        let titles: Vec<_> = logged.series.iter().map(Series::title).collect();
        assert_eq!(titles, ["train/loss", "train/rate", "train/eval/loss", "last"]);
        assert_eq!(logged.series[0].points[0], (0, 2.5));
        assert!(logged.series[0].points[1].0 == 5 && logged.series[0].points[1].1.is_nan());
        assert_eq!(logged.series[2].points, [(0, 1.0), (1, f64::NEG_INFINITY)]);
        assert_eq!((logged.series[3].points.as_slice(), logged.damaged.len()), (&[(0, 7.0)][..], 0));
    }

    #[test]
    fn best_values_are_finite_and_know_their_direction() {
        assert_eq!(series("loss", &[3.0, f64::NAN, 1.0, f64::NEG_INFINITY, 1.0]).best(), Some((2, 1.0)));
        assert_eq!(series("mean_reward", &[3.0, f64::INFINITY, 1.0]).best(), Some((0, 3.0)));
        assert_eq!(series("loss", &[f64::NAN]).best(), None);
        let mut ranked = ["lr", "val_loss", "accuracy", "loss"].map(|name| series(name, &[]));
        ranked.sort_by_key(Series::rank);
        assert_eq!(ranked.map(|series| series.name), ["loss", "val_loss", "accuracy", "lr"]);
    }

    #[test]
    fn differences_are_of_bits_at_common_steps() {
        let a = series("loss", &[1.0, 2.0, f64::NAN, 0.0]);
        assert_eq!(a.first_difference(&a), (None, 4));
        assert_eq!(a.first_difference(&series("loss", &[1.0, 2.0])), (None, 2));
        assert_eq!(a.first_difference(&series("loss", &[1.0, 2.0 + 1e-15, 3.0])), (Some(1), 3));
        assert_eq!(a.first_difference(&series("loss", &[1.0, 2.0, f64::NAN, -0.0])), (Some(3), 4));
    }
}
