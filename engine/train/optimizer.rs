//! AdamW with decoupled weight decay over a list of parameters, or Muon for those that it suits; clipping by global norm, and refusal
//! of updates that are not finite. Gradients accumulate in the parameters until `step`, which consumes them.
//! Source: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2; order of operations as in `torch.optim.AdamW`.

use super::device_step::DeviceStep;
use super::moments::Moments;
use super::muon;
use super::online_merge::OnlineMerge;
use super::optimizer_state::blocks;
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use crate::kernels::cpu::adamw::{AdamW as Update, MomentsMut};
use crate::kernels::cpu::norm;
use crate::kernels::cpu::online_merge::adam_update;
use crate::kernels::element::Dtype;
use crate::tensor::trainable::{TensorRows, Trainable};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// What a script sets.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Settings {
    pub lr: f64,
    pub betas: (f64, f64),
    pub eps: f64,
    pub weight_decay: f64,
    /// Whether biases and norm weights decay too.
    pub decay_vectors: bool,
    /// Largest norm of the whole gradient; larger ones are scaled down to it.
    pub clip_norm: Option<f64>,
    /// In what the moments are kept: f32, or bf16, rounded stochastically (`kernels/cpu/adamw.rs`), in half the memory.
    pub moments: Dtype,
    /// The momentum of Muon, which then updates the matrices of the layers (muon.rs). None: AdamW updates all.
    pub momentum: Option<f64>,
}

impl Default for Settings {
    /// As in Qwen's reports: betas 0.9 and 0.95, eps 1e-8, weight decay 0.1 on matrices, clipping at 1; moments in f32.
    fn default() -> Self {
        let (lr, betas, eps, weight_decay) = (1e-3, (0.9, 0.95), 1e-8, 0.1);
        Self { lr, betas, eps, weight_decay, decay_vectors: false, clip_norm: Some(1.0), moments: Dtype::F32, momentum: None }
    }
}

impl Settings {
    /// Errors: [`Error::Argument`] for a value that cannot be meant.
    pub fn check(&self) -> Result<()> {
        let op = self.name();
        let finite_from = |arg: &str, value: f64, least: f64| {
            if value.is_finite() && value >= least {
                Ok(())
            } else {
                Err(Error::argument(op, arg, format!("a number from {least}"), value))
            }
        };
        finite_from("lr", self.lr, 0.0)?;
        finite_from("weight_decay", self.weight_decay, 0.0)?;
        let momentum = self.momentum.unwrap_or(0.0);
        for (arg, beta) in [("betas[1]", self.betas.0), ("betas[2]", self.betas.1), ("momentum", momentum)] {
            if !(0.0..1.0).contains(&beta) {
                return Err(Error::argument(op, arg, "a number from 0 to below 1", beta));
            }
        }
        if !(self.eps > 0.0 && self.eps.is_finite()) {
            return Err(Error::argument(op, "eps", "a number above 0", self.eps));
        }
        if !matches!(self.moments, Dtype::F32 | Dtype::Bf16) {
            return Err(Error::argument(op, "moments", "\"f32\" or \"bf16\"", format!("\"{}\"", self.moments)));
        }
        match self.clip_norm {
            Some(norm) if !(norm > 0.0 && norm.is_finite()) => Err(Error::argument(op, "clip_norm", "a number above 0, or none", norm)),
            _ => Ok(()),
        }
    }
}

impl Settings {
    /// What optimizer they make, in messages.
    pub fn name(&self) -> &'static str {
        if self.momentum.is_some() { "muon" } else { "adamw" }
    }

    /// Whether a parameter decays.
    pub(super) fn decays(&self, parameter: &dyn Trainable) -> bool {
        self.decay_vectors || parameter.is_matrix()
    }

    /// The update of a parameter that has its `step`-th.
    pub(super) fn update(&self, decays: bool, step: u64, gradient_scale: f64) -> Update {
        Update {
            lr: self.lr,
            beta1: self.betas.0,
            beta2: self.betas.1,
            eps: self.eps,
            weight_decay: if decays { self.weight_decay } else { 0.0 },
            step,
            gradient_scale,
        }
    }
}

impl Slot {
    fn new(parameter: Arc<dyn Trainable>) -> Self {
        let rows = 0..parameter.count() / parameter.columns().max(1);
        let tensors = Arc::new([TensorRows { name: parameter.name().into(), rows }]);
        let is_hidden_matrix = muon::is_hidden_matrix(parameter.as_ref());
        Self { parameter, tensors, is_hidden_matrix, moments: None, waiting: None, updates: 0 }
    }

    /// Whether Muon updates it.
    pub(super) fn is_muons(&self, settings: &Settings) -> bool {
        self.is_hidden_matrix && settings.momentum.is_some()
    }

    /// Makes the moments, zeros, where the parameter lies, if they are not there; a copy of its own, where a state shares them.
    ///
    /// Errors: [`Error::Device`] if the device has no room.
    pub(super) fn make_moments(&mut self, settings: &Settings) -> Result<()> {
        match &mut self.moments {
            None => {
                let (place, len) = (self.parameter.place(), self.parameter.gradient_len());
                let moments = Moments::zeroed(settings.moments, place, len, !self.is_muons(settings))?;
                self.moments = Some(Arc::new(moments));
            }
            Some(moments) => {
                if Arc::get_mut(moments).is_none() {
                    *moments = Arc::new(moments.try_clone()?);
                }
            }
        }
        Ok(())
    }
}

/// One parameter and its moments, which come with its first gradient.
pub(super) struct Slot {
    pub parameter: Arc<dyn Trainable>,
    /// What it is in files.
    pub tensors: Arc<[TensorRows]>,
    /// Whether Muon may update it.
    pub is_hidden_matrix: bool,
    /// A state may share them until they are written.
    pub moments: Option<Arc<Moments>>,
    /// The sum of the updates that wait to be merged with a later one.
    pub waiting: Option<Buffer<f32>>,
    /// Updates of this very parameter, for its bias correction.
    pub updates: u64,
}

/// AdamW over a list of parameters.
pub struct AdamW {
    settings: Settings,
    pub(super) slots: Vec<Slot>,
    steps: u64,
    skipped: u64,
    merge: Option<OnlineMerge>,
    /// On a device: its launches and what they keep there.
    on_device: Option<DeviceStep>,
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// Norm of the whole gradient before clipping.
    pub grad_norm: f64,
    /// False if the gradient was not finite, or if there was none: parameters and moments are as before.
    pub applied: bool,
}

impl AdamW {
    /// Errors: those of [`Settings::check`]; [`Error::Argument`] if no parameter trains, or if they lie at several places.
    pub fn new(parameters: Vec<Arc<dyn Trainable>>, settings: Settings) -> Result<Self> {
        settings.check()?;
        let slots: Vec<Slot> = parameters.into_iter().map(Slot::new).collect();
        if !slots.iter().any(|slot| slot.parameter.trains()) {
            return Err(Error::argument("adamw", "parameters", "at least one that trains", "none; is the model frozen?"));
        }
        let place = slots[0].parameter.place();
        if let Some(slot) = slots.iter().find(|slot| !slot.parameter.place().is(place)) {
            let (expected, got) = (format!("parameters at one place ({place})"), format!("one on {}", slot.parameter.place()));
            return Err(Error::argument("adamw", slot.parameter.name(), expected, got));
        }
        let on_device = place.device().map(DeviceStep::new).transpose()?;
        Ok(Self { settings, slots, steps: 0, skipped: 0, merge: None, on_device })
    }

    /// The same optimizer, whose moments are written by the names of tensors: for each parameter those that it is made of. Without
    /// it a parameter is one tensor.
    pub fn naming(mut self, tensors: Vec<Vec<TensorRows>>) -> Self {
        assert_eq!(tensors.len(), self.slots.len(), "names for each parameter");
        self.slots.iter_mut().zip(tensors).for_each(|(slot, tensors)| slot.tensors = tensors.into());
        self
    }

    /// The same optimizer, whose updates are merged with task vectors.
    ///
    /// Errors: [`Error::Argument`] for a parameter that trains and has no task vector, and for a model on a device.
    pub fn merging(self, merge: OnlineMerge) -> Result<Self> {
        if self.on_device.is_some() {
            let got = format!("one on {}", self.slots[0].parameter.place());
            return Err(Error::argument("adamw", "merge", "a model on the CPU, where updates are merged", got));
        }
        self.slots.iter().try_for_each(|slot| merge.check(slot.parameter.as_ref()))?;
        Ok(Self { merge: Some(merge), ..self })
    }

    pub fn settings(&self) -> Settings {
        self.settings
    }

    /// Replaces the settings from the next step on; moments stay, rounded to nearest where they are kept in bf16 from now on.
    ///
    /// Errors: those of [`Settings::check`]; [`Error::Argument`] if AdamW should become Muon, or Muon AdamW; those of the device. Nothing
    /// changes then.
    pub fn set(&mut self, settings: Settings) -> Result<()> {
        settings.check()?;
        let names = (self.settings.name(), settings.name());
        if names.0 != names.1 {
            return Err(Error::argument(names.0, "momentum", format!("settings of {}", names.0), format!("those of {}", names.1)));
        }
        if settings.moments != self.settings.moments {
            let convert = |slot: &Slot| slot.moments.as_ref().map(|moments| moments.converted(settings.moments)).transpose();
            let converted: Vec<_> = self.slots.iter().map(convert).collect::<Result<_>>()?;
            self.slots.iter_mut().zip(converted).for_each(|(slot, moments)| slot.moments = moments.map(Arc::new));
        }
        self.settings = settings;
        Ok(())
    }

    /// Steps that were applied.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Steps that were not applied because the gradient was not finite.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    pub(super) fn set_counts(&mut self, steps: u64, skipped: u64) {
        (self.steps, self.skipped) = (steps, skipped);
    }

    /// Bytes that steps will keep and have not asked for yet: moments and remainders; and those of gradients that are not there.
    pub fn bytes_to_come(&self) -> (u64, u64) {
        let training = self.slots.iter().filter(|slot| slot.parameter.trains());
        training.fold((0, 0), |(kept, gradients), slot| {
            let len = 4 * slot.parameter.gradient_len() as u64;
            let each = len / 4 * self.settings.moments.size() as u64;
            let count = if slot.moments.is_some() { 0 } else { 2 - u64::from(slot.is_muons(&self.settings)) };
            let moments = count * each;
            let waits = self.merge.as_ref().is_some_and(OnlineMerge::accumulates) && slot.waiting.is_none();
            let gradient = if slot.parameter.has_gradient_memory() { 0 } else { len };
            (kept + moments + if waits { len } else { 0 } + slot.parameter.remainder_bytes_to_come() as u64, gradients + gradient)
        })
    }

    /// Bytes of the moments that are there, on the host.
    pub fn moments_bytes_on_host(&self) -> u64 {
        let moments = self.slots.iter().filter_map(|slot| slot.moments.as_ref());
        moments.filter(|moments| moments.place().device().is_none()).map(|moments| moments.bytes()).sum()
    }

    /// Norm of the whole gradient as it stands, in the order of the parameters. Gradients on a device come to the host for it,
    /// one by one.
    ///
    /// Errors: those of the device.
    pub fn gradient_norm(&self) -> Result<f64> {
        let mut sum = 0.0;
        for slot in &self.slots {
            slot.parameter.read_gradient(&mut |gradient| {
                if let Some(gradient) = gradient {
                    sum += norm::sum_of_squares(&[gradient]);
                }
            })?;
        }
        Ok(sum.sqrt())
    }

    /// Updates every parameter that has a gradient, scaled so that its norm is at most `clip_norm`, and clears all
    /// gradients. A gradient with a number that is not finite changes nothing but the count of skipped steps. On a device all is
    /// asked for before the norm is read: the step waits once, at its end.
    ///
    /// Errors: those of the device.
    pub fn step(&mut self) -> Result<Step> {
        let step = match &mut self.on_device {
            Some(on_device) => on_device.step(&mut self.slots, &self.settings)?,
            None => self.step_on_host()?,
        };
        self.skipped += u64::from(!step.grad_norm.is_finite());
        self.steps += u64::from(step.applied);
        Ok(step)
    }

    fn step_on_host(&mut self) -> Result<Step> {
        let grad_norm = self.gradient_norm()?;
        if !grad_norm.is_finite() {
            self.clear_gradients();
            return Ok(Step { grad_norm, applied: false });
        }
        let gradient_scale = self.settings.clip_norm.map_or(1.0, |clip| (clip / (grad_norm + 1e-6)).min(1.0));
        let (mut applied, mut hidden) = (false, muon::HostUpdates::default());
        for slot in &mut self.slots {
            if !slot.parameter.has_gradient() {
                continue;
            }
            applied = true;
            slot.updates += 1;
            slot.make_moments(&self.settings)?;
            let is_muons = slot.is_muons(&self.settings);
            let Slot { parameter, moments, waiting, updates, tensors, .. } = slot;
            let parameter = &**parameter;
            let moments = moments.as_mut().and_then(Arc::get_mut).expect("they were made above, our own").host_mut();
            let update = self.settings.update(self.settings.decays(parameter), *updates, gradient_scale);
            match &self.merge {
                None if is_muons => {
                    let momentum = self.settings.momentum.expect("it is Muon's");
                    match moments {
                        MomentsMut::F32(m, _) => hidden.take(parameter, tensors, m, momentum, update)?,
                        MomentsMut::Bf16(m, _) => hidden.take(parameter, tensors, m, momentum, update)?,
                    }
                }
                None => parameter.adamw(moments, &update)?,
                Some(merge) => merged_update(parameter, moments, waiting, &update, merge)?,
            }
        }
        hidden.finish()?;
        Ok(Step { grad_norm, applied })
    }

    /// The name of a weight that holds NaN or infinity, if there is one: no update can mend it. Frozen weights count too.
    ///
    /// Errors: those of the device.
    pub fn broken_weight(&self) -> Result<Option<&str>> {
        for slot in &self.slots {
            for tensor in slot.tensors.iter() {
                if !slot.parameter.are_finite(tensor.rows.clone())? {
                    return Ok(Some(&tensor.name));
                }
            }
        }
        Ok(None)
    }

    /// Forgets all gradients.
    pub fn clear_gradients(&mut self) {
        self.slots.iter().for_each(|slot| slot.parameter.clear_gradient());
    }
}

/// One update of Adam, merged with the parameter's task vector if it is time, and weight decay after it; the gradient is gone
/// afterwards.
///
/// - `waiting`: the sum of earlier updates, which are in the weights, and are taken back when they are merged
fn merged_update(
    parameter: &dyn Trainable,
    moments: MomentsMut,
    waiting: &mut Option<Buffer<f32>>,
    update: &Update,
    merge: &OnlineMerge,
) -> Result<()> {
    let (mut delta, mut moments) = (Buffer::<f32>::scratch(parameter.gradient_len()), moments);
    parameter.read_gradient(&mut |gradient| match (gradient, &mut moments) {
        (None, _) => {}
        (Some(gradient), MomentsMut::F32(m, v)) => adam_update(gradient, m, v, &mut delta, update),
        (Some(gradient), MomentsMut::Bf16(m, v)) => adam_update(gradient, m, v, &mut delta, update),
    })?;
    parameter.clear_gradient();
    if merge.is_due(update.step) {
        let taken_back = waiting.take();
        if let Some(earlier) = &taken_back {
            norm::add(&mut delta, earlier);
        }
        merge.merge(parameter, update.step, &mut delta);
        if let Some(mut earlier) = taken_back {
            norm::scale(&mut earlier, -1.0);
            norm::add(&mut delta, &earlier);
        }
    } else {
        let sum = waiting.get_or_insert_with(|| Buffer::zeroed(delta.len()));
        norm::add(sum, &delta);
    }
    let decay = (1.0 - update.lr * update.weight_decay) as f32;
    norm::scale(&mut delta, decay);
    let (columns, layout) = (parameter.columns(), parameter.layout());
    let count = parameter.count() / columns.max(1);
    for rows in blocks(count, columns) {
        let mut values = Buffer::<f32>::scratch(rows.len() * columns);
        layout.unpack_f32(&delta, (count, columns), rows.clone(), &mut values);
        parameter.scale_and_add(rows, decay, &values)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::parameter::{Layout, Parameter};

    /// A vector with `values` and `gradient`.
    fn parameter(values: &[f32], gradient: &[f32]) -> Arc<Parameter<f32>> {
        let parameter = Parameter::zeros("p", values.len(), 1, Layout::Rows);
        parameter.write_rows(0..values.len(), values, false).unwrap();
        give(&parameter, gradient);
        Arc::new(parameter)
    }

    fn give(parameter: &Parameter<f32>, gradient: &[f32]) {
        parameter.accumulate(|sum, add| {
            assert!(!add);
            sum.copy_from_slice(gradient);
        });
    }

    fn value(parameter: &Parameter<f32>) -> Vec<f32> {
        parameter.read().weight.to_vec()
    }

    #[test]
    fn the_first_step_moves_by_the_rate_and_clipping_keeps_the_direction() {
        // The first AdamW update is lr * g / (|g| + eps): the rate, whatever the gradient's size and so whatever clipping does.
        let p = parameter(&[1.0, -2.0], &[30.0, -40.0]);
        let mut optimizer = AdamW::new(vec![p.clone()], Settings { lr: 0.5, ..Settings::default() }).unwrap();
        assert_eq!(optimizer.step().unwrap(), Step { grad_norm: 50.0, applied: true });
        assert!(value(&p).iter().zip([0.5, -1.5]).all(|(got, want)| (got - want).abs() < 1e-6), "{:?}", value(&p));
        assert!(p.gradient_rows(0..2).unwrap().is_none(), "a step consumes the gradient");
        assert_eq!(optimizer.step().unwrap(), Step { grad_norm: 0.0, applied: false });
        assert_eq!((optimizer.steps(), optimizer.skipped()), (1, 0));

        // With beta1 0 and beta2 0 nothing is remembered, and eps 1 shows the clipped gradient: 0.6 / (0.6 + 1).
        let p = parameter(&[0.0, 0.0], &[30.0, -40.0]);
        let settings = Settings { lr: 1.0, betas: (0.0, 0.0), eps: 1.0, ..Settings::default() };
        AdamW::new(vec![p.clone()], settings).unwrap().step().unwrap();
        assert!(value(&p).iter().zip([-0.375, 0.8 / 1.8]).all(|(got, want)| (got - want).abs() < 1e-6), "{:?}", value(&p));
    }

    #[test]
    fn vectors_decay_only_when_asked() {
        for (decay_vectors, want) in [(false, 1.0), (true, 0.95)] {
            let p = parameter(&[1.0], &[0.0]);
            let settings = Settings { lr: 0.5, decay_vectors, ..Settings::default() };
            AdamW::new(vec![p.clone()], settings).unwrap().step().unwrap();
            assert_eq!(value(&p), [want]);
        }
    }

    #[test]
    fn a_gradient_that_is_not_finite_changes_nothing() {
        for bad in [f32::NAN, f32::INFINITY] {
            let (p, q) = (parameter(&[1.0], &[bad]), parameter(&[2.0], &[1.0]));
            let mut optimizer = AdamW::new(vec![p.clone(), q.clone()], Settings::default()).unwrap();
            assert!(!optimizer.step().unwrap().applied);
            assert_eq!((value(&p), value(&q), optimizer.steps(), optimizer.skipped()), (vec![1.0], vec![2.0], 0, 1));
            assert!(q.gradient_rows(0..1).unwrap().is_none());
            give(&q, &[1.0]);
            assert!(optimizer.step().unwrap().applied, "the next gradient counts again");
            assert_eq!(value(&p), [1.0], "without a gradient nothing moves");
        }
    }

    #[test]
    fn moments_change_their_type_on_the_way() {
        let train = |changes: [Dtype; 3]| {
            let p = parameter(&[1.0, -2.0], &[0.3, 0.7]);
            let mut optimizer = AdamW::new(vec![p.clone()], Settings { moments: changes[0], ..Settings::default() }).unwrap();
            for moments in changes {
                optimizer.set(Settings { moments, ..optimizer.settings() }).unwrap();
                assert!(optimizer.step().unwrap().applied);
                give(&p, &[0.3, 0.7]);
                assert_eq!(optimizer.moments_bytes_on_host(), 2 * 2 * moments.size() as u64);
            }
            value(&p)
        };
        let f32s = train([Dtype::F32; 3]);
        for changes in [[Dtype::Bf16; 3], [Dtype::F32, Dtype::Bf16, Dtype::F32]] {
            let got = train(changes);
            assert!(got != f32s && got.iter().zip(&f32s).all(|(got, want)| (got - want).abs() < 1e-5), "{got:?}, {f32s:?}");
        }
    }

    #[test]
    fn a_weight_that_is_not_finite_is_found_frozen_or_not() {
        let (p, q) = (parameter(&[1.0], &[1.0]), parameter(&[2.0, f32::INFINITY], &[1.0, 1.0]));
        let optimizer = AdamW::new(vec![p.clone(), q.clone()], Settings::default()).unwrap();
        assert_eq!(optimizer.broken_weight().unwrap(), Some(q.name()));
        q.set_trains(false);
        assert!(optimizer.broken_weight().unwrap().is_some());
        assert_eq!(AdamW::new(vec![p], Settings::default()).unwrap().broken_weight().unwrap(), None);
    }

    #[test]
    fn frozen_models_and_settings_that_cannot_be_meant_are_refused() {
        let p = parameter(&[1.0], &[1.0]);
        p.set_trains(false);
        assert!(AdamW::new(vec![p], Settings::default()).is_err());
        for settings in [
            Settings { lr: -1.0, ..Settings::default() },
            Settings { lr: f64::NAN, ..Settings::default() },
            Settings { betas: (1.0, 0.9), ..Settings::default() },
            Settings { eps: 0.0, ..Settings::default() },
            Settings { clip_norm: Some(0.0), ..Settings::default() },
            Settings { weight_decay: f64::INFINITY, ..Settings::default() },
            Settings { moments: Dtype::I8, ..Settings::default() },
            Settings { momentum: Some(1.0), ..Settings::default() },
        ] {
            assert!(settings.check().is_err(), "{settings:?}");
        }
    }
}
