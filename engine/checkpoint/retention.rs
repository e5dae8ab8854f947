//! Which checkpoints of a run may go. A pure function of what is known about them; removing is `catalog.rs`'s.
//!
//! The rules, for a run whose loops follow each other:
//! - The newest checkpoint of the run is never removable, nor is a pinned one.
//! - Of the newest one's loop, the `last` newest stay. Of each other loop the newest stays until the run is finished: it is what
//!   a fork after that loop begins with. A resume never needs it, since it takes the newest of the run.
//! - `every` and `best` hold in each loop by itself, finished or not: steps and metrics of different loops are no scale.

use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::collections::HashSet;

/// What a run keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keep {
    /// How many of the newest, at least 1; 2 or more survive a damaged newest one.
    pub last: usize,
    /// Also those whose step is a multiple of this, at least 1.
    pub every: Option<u64>,
    /// Also those with the best values of a metric.
    pub best: Option<Best>,
}

/// The checkpoints with the best values of a metric.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Best {
    /// Its name in the metrics of the manifest.
    pub metric: String,
    pub order: Order,
    /// How many, at least 1.
    pub count: usize,
}

/// Which value of a metric is the best.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    Lowest,
    Highest,
}

/// What is to be known about a checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    pub name: String,
    pub loop_path: String,
    pub step: u64,
    /// Metrics as the manifest has them. What is missing or no finite number never counts as best.
    pub metrics: Map<String, Value>,
    /// Kept whatever the rules say.
    pub pinned: bool,
}

impl Keep {
    /// Errors: [`Error::Argument`] for a zero where at least 1 is meant.
    pub fn check(&self) -> Result<()> {
        let zero = |key| Err(Error::argument("keep", key, "at least 1", 0));
        match self {
            Self { last: 0, .. } => zero("last"),
            Self { every: Some(0), .. } => zero("every"),
            Self { best: Some(Best { count: 0, .. }), .. } => zero("best.count"),
            _ => Ok(()),
        }
    }
}

/// The names of the checkpoints that a run under way may remove, oldest first.
///
/// - `checkpoints`: of one run, oldest first, as `list` gives them
///
/// Panics if `keep` does not pass [`Keep::check`].
pub fn removable(checkpoints: &[Candidate], keep: &Keep) -> Vec<String> {
    removable_when(checkpoints, keep, false)
}

/// As [`removable`] for a run that is finished: the newest of each earlier loop is not kept for its own sake.
pub fn removable_when_finished(checkpoints: &[Candidate], keep: &Keep) -> Vec<String> {
    removable_when(checkpoints, keep, true)
}

fn removable_when(checkpoints: &[Candidate], keep: &Keep, finished: bool) -> Vec<String> {
    assert!(keep.check().is_ok(), "{keep:?}");
    let Some(newest) = checkpoints.last() else { return Vec::new() };
    let mut kept: HashSet<&str> = HashSet::from([newest.name.as_str()]);
    let mut loops: Vec<&str> = checkpoints.iter().map(|checkpoint| checkpoint.loop_path.as_str()).collect();
    loops.sort_unstable();
    loops.dedup();
    for loop_path in loops {
        let members: Vec<&Candidate> = checkpoints.iter().filter(|checkpoint| checkpoint.loop_path == loop_path).collect();
        let last = if loop_path == newest.loop_path { keep.last } else { usize::from(!finished) };
        kept.extend(members.iter().rev().take(last).map(|member| member.name.as_str()));
        if let Some(best) = &keep.best {
            kept.extend(best_of(&members, best));
        }
    }
    let stays = |checkpoint: &Candidate| {
        let nth = keep.every.is_some_and(|every| checkpoint.step.is_multiple_of(every));
        checkpoint.pinned || nth || kept.contains(checkpoint.name.as_str())
    };
    checkpoints.iter().filter(|checkpoint| !stays(checkpoint)).map(|checkpoint| checkpoint.name.clone()).collect()
}

/// The names of the best `members`; of equal ones the newer.
fn best_of<'a>(members: &[&'a Candidate], best: &Best) -> Vec<&'a str> {
    let value = |member: &Candidate| member.metrics.get(&best.metric)?.as_f64().filter(|value| value.is_finite());
    let mut ranked: Vec<(f64, &str)> = members.iter().rev().filter_map(|member| Some((value(member)?, member.name.as_str()))).collect();
    // Stable, so that equal values stay in the order newest first. Adding zero makes one zero of two.
    ranked.sort_by(|(a, _), (b, _)| match best.order {
        Order::Lowest => (a + 0.0).total_cmp(&(b + 0.0)),
        Order::Highest => (b + 0.0).total_cmp(&(a + 0.0)),
    });
    ranked.into_iter().take(best.count).map(|(_, name)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn candidate(loop_path: &str, step: u64, loss: Value) -> Candidate {
        let metrics = Map::from_iter([("loss".to_owned(), loss)]);
        Candidate { name: format!("{loop_path}-{step}"), loop_path: loop_path.into(), step, metrics, pinned: false }
    }

    /// Steps 10, 20, ... of one loop with these losses.
    fn candidates(losses: &[Value]) -> Vec<Candidate> {
        losses.iter().enumerate().map(|(index, loss)| candidate("train", 10 * (index as u64 + 1), loss.clone())).collect()
    }

    fn keep(last: usize) -> Keep {
        Keep { last, every: None, best: None }
    }

    fn keep_best(order: Order, count: usize) -> Keep {
        Keep { best: Some(Best { metric: "loss".into(), order, count }), ..keep(1) }
    }

    #[track_caller]
    fn check(checkpoints: &[Candidate], keep: &Keep, wanted: &[&str]) {
        assert_eq!(removable(checkpoints, keep), wanted);
    }

    #[test]
    fn the_last_ones_stay() {
        let five = candidates(&[json!(5), json!(4), json!(3), json!(2), json!(1)]);
        check(&[], &keep(1), &[]);
        check(&five[..1], &keep(1), &[]);
        check(&five, &keep(1), &["train-10", "train-20", "train-30", "train-40"]);
        check(&five, &keep(2), &["train-10", "train-20", "train-30"]);
        check(&five, &keep(5), &[]);
        check(&five, &keep(usize::MAX), &[]);
    }

    #[test]
    fn each_nth_step_and_the_pinned_stay() {
        let mut five = candidates(&[json!(5), json!(4), json!(3), json!(2), json!(1)]);
        check(&five, &Keep { every: Some(20), ..keep(1) }, &["train-10", "train-30"]);
        check(&five, &Keep { every: Some(1), ..keep(1) }, &[]);
        five[0].pinned = true;
        check(&five, &Keep { every: Some(20), ..keep(1) }, &["train-30"]);
        check(&five, &Keep { every: Some(7), ..keep(1) }, &["train-20", "train-30", "train-40"]);
    }

    #[test]
    fn the_best_stay_and_what_is_no_number_is_never_best() {
        let losses = [json!(0.5), Value::Null, json!(0.25), json!("NaN"), json!(2.0), json!("-inf"), json!(1)];
        let seven = candidates(&losses);
        check(&seven, &keep_best(Order::Lowest, 1), &["train-10", "train-20", "train-40", "train-50", "train-60"]);
        check(&seven, &keep_best(Order::Lowest, 2), &["train-20", "train-40", "train-50", "train-60"]);
        check(&seven, &keep_best(Order::Highest, 1), &["train-10", "train-20", "train-30", "train-40", "train-60"]);
        // Seven asked for, four numbers: the others still go.
        check(&seven, &keep_best(Order::Highest, 7), &["train-20", "train-40", "train-60"]);
        let unknown = Keep { best: Some(Best { metric: "reward".into(), order: Order::Highest, count: 3 }), ..keep(6) };
        check(&seven, &unknown, &["train-10"]);
    }

    #[test]
    fn of_equal_values_the_newer_stays() {
        let equal = candidates(&[json!(1.0), json!(1), json!(3.0)]);
        check(&equal, &keep_best(Order::Lowest, 1), &["train-10"]);
        check(&candidates(&[json!(-0.0), json!(0.0), json!(3.0)]), &keep_best(Order::Lowest, 1), &["train-10"]);
    }

    #[test]
    fn other_loops_keep_their_newest_until_the_run_is_finished() {
        let mut run: Vec<Candidate> = [10, 20, 30].map(|step| candidate("sft", step, json!(step))).into();
        run.extend([5, 10, 15].map(|step| candidate("dpo", step, json!(step))));
        check(&run, &keep(2), &["sft-10", "sft-20", "dpo-5"]);
        assert_eq!(removable_when_finished(&run, &keep(2)), ["sft-10", "sft-20", "sft-30", "dpo-5"]);
        // The best of each loop: losses of different loops are not compared.
        check(&run, &keep_best(Order::Lowest, 1), &["sft-20", "dpo-10"]);
        assert_eq!(removable_when_finished(&run, &keep_best(Order::Lowest, 1)), ["sft-20", "sft-30", "dpo-10"]);
        assert_eq!(removable_when_finished(&run, &Keep { every: Some(15), ..keep(1) }), ["sft-10", "sft-20", "dpo-5", "dpo-10"]);
    }

    #[test]
    fn the_newest_and_the_pinned_stay_under_any_rule() {
        for seed in 0..500u64 {
            let mut state = seed;
            let mut random = |below: u64| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 33) % below
            };
            let mut run: Vec<Candidate> = (0..1 + random(12))
                .map(|step| {
                    candidate(["a", "b", "c"][random(3) as usize], step, if random(4) == 0 { Value::Null } else { json!(random(5)) })
                })
                .collect();
            run.iter_mut().for_each(|checkpoint| checkpoint.pinned = random(5) == 0);
            let order = if random(2) == 0 { Order::Lowest } else { Order::Highest };
            let best = (random(2) == 0).then(|| Best { metric: "loss".into(), order, count: 1 + random(3) as usize });
            let keep = Keep { last: 1 + random(3) as usize, every: (random(2) == 0).then(|| 1 + random(4)), best };
            let finished = removable_when_finished(&run, &keep);
            let mut gone = removable(&run, &keep);
            assert!(gone.iter().all(|name| finished.contains(name)), "seed {seed}");
            gone.extend(finished);
            assert!(!gone.contains(&run.last().unwrap().name), "seed {seed}");
            assert!(run.iter().all(|checkpoint| !checkpoint.pinned || !gone.contains(&checkpoint.name)), "seed {seed}");
            // What may go may go at once: asking again after the removal finds nothing more.
            let left: Vec<Candidate> = run.iter().filter(|c| !removable(&run, &keep).contains(&c.name)).cloned().collect();
            assert_eq!(removable(&left, &keep), [""; 0], "seed {seed}");
        }
    }

    #[test]
    fn zeros_are_refused() {
        let check = |keep: Keep, wanted: &str| assert_eq!(keep.check().unwrap_err().to_string(), wanted);
        check(keep(0), "keep: `last` should be at least 1, got 0");
        check(Keep { every: Some(0), ..keep(1) }, "keep: `every` should be at least 1, got 0");
        check(keep_best(Order::Lowest, 0), "keep: `best.count` should be at least 1, got 0");
        assert!(keep_best(Order::Lowest, 1).check().is_ok());
    }
}
