//! The Online Merging Optimizer: each update of Adam is merged with a task vector, `reference - base`, so that what was learnt
//! before is not paid for what is learnt now. In the form of the paper: survivors of a mask are not scaled up unless asked.
//! The task vector is kept sparse: what the mask drops from it is dropped for good. With `every` above 1 the updates in between are
//! plain Adam's; at the last of them all are taken back, and their sum is merged (the published code moves one parameter only then).
//! Source: Lu et al., arXiv 2405.17931; qwen2.5.md section 6.3.

use crate::error::{Error, Result};
use crate::kernels::cpu::online_merge::{keep_largest, keep_some};
use crate::kernels::random::Stream;
use crate::tensor::parameter::Layout;
use crate::tensor::trainable::Trainable;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// How two vectors become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Random elements of both, added up.
    Dare,
    /// The largest elements of each tensor of both, where their signs agree with that of the sum.
    Ties,
}

/// What a script sets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MergeSettings {
    pub method: Method,
    /// Weight of the task vector; the update has the rest.
    pub alpha: f64,
    /// Share of the elements that stay.
    pub reserve: f64,
    /// Whether what stays is divided by `reserve`, as the published code (not the paper) does with random masks.
    pub rescale: bool,
    /// Updates of a parameter that are merged together, with its last.
    pub every: u64,
}

impl MergeSettings {
    /// Errors: [`Error::Argument`] for a value that cannot be meant.
    pub fn check(&self) -> Result<()> {
        for (arg, value, least) in [("merge.alpha", self.alpha, 0.0), ("merge.reserve", self.reserve, f64::MIN_POSITIVE)] {
            if !(least..=1.0).contains(&value) {
                let from = if least == 0.0 { "from 0" } else { "above 0" };
                return Err(Error::argument("adamw", arg, format!("a number {from} to 1"), value));
            }
        }
        if self.every == 0 {
            return Err(Error::argument("adamw", "merge.every", "a number of updates from 1", 0));
        }
        if self.rescale && self.method == Method::Ties {
            return Err(Error::argument("adamw", "merge.rescale", "false for ties, which drops nothing at random", true));
        }
        Ok(())
    }
}

/// A parameter before and after the task was learnt, and the rows of the tensors that it is made of.
pub struct Source {
    pub base: Arc<dyn Trainable>,
    pub reference: Arc<dyn Trainable>,
    pub tensors: Vec<Range<usize>>,
}

/// What is left of the task vector of one parameter.
struct Task {
    /// Places in the layout of the gradient, rising, and values.
    elements: Vec<(u32, f32)>,
    tensors: Vec<Range<usize>>,
}

/// The task vectors of a model, and how updates are merged with them.
pub struct OnlineMerge {
    settings: MergeSettings,
    seed: u64,
    tasks: BTreeMap<String, Task>,
}

impl OnlineMerge {
    /// Takes the task vectors; the models that they come from are not needed afterwards.
    ///
    /// - `seed`: of the masks, which are functions of it, the parameter's name and the update's number
    ///
    /// Errors: [`Error::Argument`] for settings that cannot be meant, or two models of different shapes; those of their device.
    pub fn new(settings: MergeSettings, seed: u64, sources: Vec<Source>) -> Result<Self> {
        settings.check()?;
        let mut merge = Self { settings, seed, tasks: BTreeMap::new() };
        for source in sources {
            let name = source.base.name().to_string();
            if (source.reference.name(), source.reference.gradient_len()) != (&name, source.base.gradient_len()) {
                let numbers = (source.reference.gradient_len(), source.base.gradient_len());
                let got = format!("{} of {} numbers in place of {name} of {}", source.reference.name(), numbers.0, numbers.1);
                return Err(Error::argument("adamw", "merge.reference", "a model of the shape of merge.base", got));
            }
            let task = merge.task(&source)?;
            merge.tasks.insert(name, task);
        }
        Ok(merge)
    }

    /// Whether updates wait for later ones, to be merged with them.
    pub(super) fn accumulates(&self) -> bool {
        self.settings.every > 1
    }

    /// Whether update number `update` of a parameter, from 1, is merged, with those that wait.
    pub(super) fn is_due(&self, update: u64) -> bool {
        update.is_multiple_of(self.settings.every)
    }

    /// Bytes of the task vectors.
    pub fn bytes(&self) -> usize {
        self.tasks.values().map(|task| task.elements.len() * size_of::<(u32, f32)>()).sum()
    }

    /// Errors: [`Error::Argument`] if `parameter`, which trains, has no task vector.
    pub(super) fn check(&self, parameter: &dyn Trainable) -> Result<()> {
        if self.tasks.contains_key(parameter.name()) || !parameter.trains() {
            return Ok(());
        }
        let expected = format!("a model with {}, which trains", parameter.name());
        Err(Error::argument("adamw", "merge.base", expected, "one without it; an adapter cannot be merged with a task vector"))
    }

    fn task(&self, source: &Source) -> Result<Task> {
        let mut tau = vec![0.0; source.base.gradient_len()];
        let mut base = vec![0.0; tau.len()];
        source.reference.read_master(&mut tau)?;
        source.base.read_master(&mut base)?;
        tau.iter_mut().zip(&base).for_each(|(tau, base)| *tau = (*tau - base).clamp(-1.0, 1.0));
        drop(base);
        match self.settings.method {
            Method::Dare => keep_some(&mut tau, &self.stream("task", source.base.name()), 0, self.settings.reserve, self.scale()),
            Method::Ties => self.keep_largest_of(source.base.as_ref(), &source.tensors, &mut tau),
        }
        let elements = tau.into_iter().enumerate().filter(|(_, value)| *value != 0.0);
        let elements = elements.map(|(at, value)| (u32::try_from(at).expect("a parameter has fewer than 2^32 elements"), value)).collect();
        Ok(Task { elements, tensors: source.tensors.clone() })
    }

    /// Merges Adam's update `delta` of `parameter`, or a sum of them, with its task vector, in place. `update` is the number of the
    /// last, from 1.
    pub(super) fn merge(&self, parameter: &dyn Trainable, update: u64, delta: &mut [f32]) {
        let task = &self.tasks[parameter.name()];
        let (alpha, rest) = (self.settings.alpha as f32, (1.0 - self.settings.alpha) as f32);
        match self.settings.method {
            Method::Dare => {
                let counter = update * (delta.len() as u64).div_ceil(2);
                keep_some(delta, &self.stream("update", parameter.name()), counter, self.settings.reserve, self.scale() * rest);
                task.elements.iter().for_each(|(at, tau)| delta[*at as usize] += alpha * tau);
            }
            Method::Ties => {
                self.keep_largest_of(parameter, &task.tensors, delta);
                delta.iter_mut().for_each(|delta| *delta *= rest);
                for (at, tau) in &task.elements {
                    let (delta, tau) = (&mut delta[*at as usize], alpha * tau);
                    let is_positive = *delta + tau >= 0.0;
                    let agrees = |value: f32| if (value >= 0.0) == is_positive { value } else { 0.0 };
                    *delta = agrees(*delta) + agrees(tau);
                }
            }
        }
    }

    fn scale(&self) -> f32 {
        if self.settings.rescale { self.settings.reserve.recip() as f32 } else { 1.0 }
    }

    fn stream(&self, of: &str, parameter: &str) -> Stream {
        Stream::new(self.seed, &format!("merge {of} {parameter}"))
    }

    /// Keeps the largest elements of each tensor, at least one.
    fn keep_largest_of(&self, parameter: &dyn Trainable, tensors: &[Range<usize>], values: &mut [f32]) {
        let columns = parameter.columns();
        for rows in tensors {
            let count = ((rows.len() * columns) as f64 * self.settings.reserve) as usize;
            let place = |row: usize, column: usize| match parameter.layout() {
                Layout::Rows => row * columns + column,
                Layout::Panels | Layout::Int8 => (row / 32 * columns + column) * 32 + row % 32,
            };
            let places = rows.clone().flat_map(|row| (0..columns).map(move |column| place(row, column)));
            keep_largest(values, places, count.max(1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::optimizer::{AdamW, Settings};
    use super::*;
    use crate::tensor::ModelElement;
    use crate::tensor::parameter::Parameter;
    use half::bf16;

    const ROWS: usize = 40;
    const COLUMNS: usize = 5;

    fn parameter<E: ModelElement>(value: impl Fn(usize) -> f32) -> Arc<Parameter<E>> {
        let parameter = Parameter::zeros("p", ROWS, COLUMNS, Layout::Panels);
        parameter.write_rows(0..ROWS, &(0..ROWS * COLUMNS).map(value).collect::<Vec<_>>(), E::HAS_REMAINDER).unwrap();
        Arc::new(parameter)
    }

    fn base(i: usize) -> f32 {
        (i % 17) as f32 * 0.25 - 2.0
    }

    fn tau(i: usize) -> f32 {
        ((i * 7) % 13) as f32 * 0.25 - 1.5
    }

    fn gradient(update: usize, i: usize) -> f32 {
        ((i * 5 + update * 3) % 11) as f32 - 5.0
    }

    fn merge(settings: MergeSettings) -> Result<OnlineMerge> {
        // Rows 0 to 25 and the rest are two tensors of one parameter.
        let source =
            Source { base: parameter::<f32>(base), reference: parameter::<f32>(|i| base(i) + tau(i)), tensors: vec![0..25, 25..ROWS] };
        OnlineMerge::new(settings, 7, vec![source])
    }

    const SETTINGS: Settings = Settings {
        lr: 0.25,
        betas: (0.9, 0.99),
        eps: 1e-6,
        weight_decay: 0.5,
        decay_vectors: false,
        clip_norm: None,
        moments: crate::kernels::element::Dtype::F32,
        momentum: None,
    };

    /// Runs `updates` updates; the weights row by row.
    fn trained<E: ModelElement>(settings: MergeSettings, updates: usize) -> Vec<f32> {
        let policy = parameter::<E>(|i| base(i) + tau(i));
        let mut optimizer = AdamW::new(vec![policy.clone()], SETTINGS).unwrap().merging(merge(settings).unwrap()).unwrap();
        for update in 1..=updates {
            let given = parameter::<f32>(|i| gradient(update, i));
            policy.accumulate(|sum, _| given.read_master(sum).unwrap());
            assert!(optimizer.step().unwrap().applied);
        }
        let mut values = vec![0.0; ROWS * COLUMNS];
        policy.read_rows(0..ROWS, &mut values).unwrap();
        values
    }

    /// The same, element by element in f64, merging at every `every`-th update; `merged(update, delta)` over all elements, row by
    /// row.
    fn reference(updates: usize, every: usize, merged: impl Fn(usize, &[f64]) -> Vec<f64>) -> Vec<f64> {
        let count = ROWS * COLUMNS;
        let mut waiting = vec![0.0; count];
        let (mut theta, mut m, mut v): (Vec<f64>, _, _) =
            ((0..count).map(|i| f64::from(base(i) + tau(i))).collect(), vec![0.0; count], vec![0.0; count]);
        for update in 1..=updates {
            let delta: Vec<f64> = (0..count)
                .map(|i| {
                    let g = f64::from(gradient(update, i));
                    m[i] = 0.9 * m[i] + 0.1 * g;
                    v[i] = 0.99 * v[i] + 0.01 * g * g;
                    let (first, second) = (1.0 - 0.9f64.powi(update as i32), 1.0 - 0.99f64.powi(update as i32));
                    -0.25 * second.sqrt() / first * m[i] / (f64::sqrt(v[i]) + 1e-6)
                })
                .collect();
            if update % every == 0 {
                let sum: Vec<f64> = waiting.iter().zip(&delta).map(|(waiting, delta)| waiting + delta).collect();
                for ((theta, step), waiting) in theta.iter_mut().zip(merged(update, &sum)).zip(&mut waiting) {
                    *theta += step - std::mem::take(waiting);
                }
            } else {
                theta.iter_mut().zip(&delta).for_each(|(theta, delta)| *theta += delta);
                waiting.iter_mut().zip(&delta).for_each(|(waiting, delta)| *waiting += delta);
            }
            theta.iter_mut().for_each(|theta| *theta -= 0.25 * 0.5 * *theta);
        }
        theta
    }

    #[track_caller]
    fn assert_near(got: &[f32], want: &[f64], tolerance: f64) {
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            assert!((f64::from(*got) - want).abs() < tolerance, "[{i}]: got {got}, want {want}");
        }
    }

    /// Whether the mask keeps element `i` in row-major order, from the definition of the stream.
    fn kept(of: &str, update: usize, i: usize, reserve: f64) -> bool {
        let (row, column) = (i / COLUMNS, i % COLUMNS);
        let (at, len) = ((row / 32 * COLUMNS + column) * 32 + row % 32, 64 * COLUMNS);
        let bits = Stream::new(7, &format!("merge {of} p")).bits((update * len / 2 + at / 2) as u64);
        let half = if at % 2 == 0 { bits as u32 } else { (bits >> 32) as u32 };
        f64::from(half) < reserve * 4_294_967_296.0
    }

    #[test]
    fn random_merging_follows_the_paper_and_with_scaling_the_code() {
        for (rescale, every) in [(false, 1), (true, 1), (false, 2), (true, 4)] {
            let settings = MergeSettings { method: Method::Dare, alpha: 0.25, reserve: 0.5, rescale, every };
            let scale = if rescale { 2.0 } else { 1.0 };
            let want = reference(5, every as usize, |update, delta| {
                let term = |of: &str, update: usize, i: usize, value: f64| if kept(of, update, i, 0.5) { scale * value } else { 0.0 };
                let clipped = |i: usize| f64::from(tau(i)).clamp(-1.0, 1.0);
                (0..delta.len()).map(|i| 0.75 * term("update", update, i, delta[i]) + 0.25 * term("task", 0, i, clipped(i))).collect()
            });
            assert_near(&trained::<f32>(settings, 5), &want, 2e-5);
            // Masters keep f32 values beside bf16 weights.
            assert_near(&trained::<bf16>(settings, 5), &want, 2e-5);
        }
    }

    #[test]
    fn merging_by_sign_follows_the_paper_tensor_by_tensor() {
        let largest = |values: &[f64]| {
            let mut kept = vec![0.0; values.len()];
            for rows in [0..25, 25..ROWS] {
                let mut order: Vec<usize> = (rows.start * COLUMNS..rows.end * COLUMNS).collect();
                // A stable sort: of equal magnitudes the first stay. f32, so that what is equal there is equal here.
                order.sort_by(|a, b| (values[*b] as f32).abs().total_cmp(&(values[*a] as f32).abs()));
                order.iter().take((rows.len() * COLUMNS) * 3 / 10).for_each(|i| kept[*i] = values[*i]);
            }
            kept
        };
        let taus: Vec<f64> = (0..ROWS * COLUMNS).map(|i| f64::from(tau(i)).clamp(-1.0, 1.0)).collect();
        let merged = |_, delta: &[f64]| {
            let pairs = largest(delta).into_iter().zip(largest(&taus));
            let merged = pairs.map(|(delta, tau)| {
                let (delta, tau) = (0.75 * delta, 0.25 * tau);
                [delta, tau].into_iter().filter(|value| (*value >= 0.0) == (delta + tau >= 0.0)).sum::<f64>()
            });
            merged.collect()
        };
        for every in [1, 3] {
            let settings = MergeSettings { method: Method::Ties, alpha: 0.25, reserve: 0.3, rescale: false, every };
            assert_near(&trained::<f32>(settings, every as usize), &reference(every as usize, every as usize, merged), 2e-5);
        }
    }

    #[test]
    fn settings_and_models_that_cannot_be_meant_are_refused() {
        let good = MergeSettings { method: Method::Ties, alpha: 1e-7, reserve: 0.01, rescale: false, every: 1 };
        assert!(merge(good).unwrap().bytes() <= 8 * ROWS * COLUMNS / 50);
        for bad in [
            MergeSettings { alpha: 1.5, ..good },
            MergeSettings { reserve: 0.0, ..good },
            MergeSettings { rescale: true, ..good },
            MergeSettings { every: 0, ..good },
            MergeSettings { alpha: f64::NAN, ..good },
        ] {
            assert!(merge(bad).is_err(), "{bad:?}");
        }
        let other = Arc::new(Parameter::<f32>::zeros("q", 2, 2, Layout::Rows));
        let error = AdamW::new(vec![other], SETTINGS).unwrap().merging(merge(good).unwrap()).err().unwrap().to_string();
        assert!(error.contains("merge.base"), "{error}");
    }
}
