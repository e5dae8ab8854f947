//! The step over parameters on a device: the norm of all gradients, the factor that clips them and AdamW's update, in three launches
//! for all parameters; Muon's parameter by parameter. Whether the gradients are finite is decided on the device; the host hears of it at the end.

use super::muon;
use super::optimizer::{Settings, Slot, Step};
use crate::error::Result;
use crate::kernels::cuda::adamw::adamw;
use crate::kernels::cuda::device::Device;
use crate::kernels::cuda::norm::{Norm, Table};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What the launches keep on the device from step to step.
pub(super) struct DeviceStep {
    device: Arc<Device>,
    norm: Norm,
    gradients: Table,
    /// Of parameters that have had equally many updates, fewest first: one, unless some had a gradient where others had none.
    parameters: Vec<Table>,
}

impl DeviceStep {
    /// Errors: [`crate::error::Error::Device`] if the device has no room.
    pub fn new(device: &Arc<Device>) -> Result<Self> {
        Ok(Self { device: device.clone(), norm: Norm::new(device)?, gradients: Table::default(), parameters: Vec::new() })
    }

    /// One step; see [`super::optimizer::AdamW::step`]. Counts updates of slots, not steps.
    pub fn step(&mut self, slots: &mut [Slot], settings: &Settings) -> Result<Step> {
        for slot in slots.iter_mut().filter(|slot| slot.parameter.has_gradient()) {
            slot.make_moments(settings)?;
        }
        // Holding the parameters takes the gradients out; they are freed when this function ends.
        let mut held = Vec::new();
        for slot in slots.iter_mut() {
            let is_muons = slot.is_muons(settings);
            let Slot { parameter, moments, updates, tensors, .. } = slot;
            if let Some(locked) = parameter.lock_update()? {
                let moments = moments.as_mut().and_then(Arc::get_mut).expect("they were made above, our own").device_mut();
                let hidden = is_muons.then(|| (&**parameter, &tensors[..]));
                held.push((locked, moments, settings.decays(parameter.as_ref()), updates, hidden));
            }
        }
        if held.is_empty() {
            return Ok(Step { grad_norm: 0.0, applied: false });
        }
        let gradients: Vec<_> = held.iter().map(|(locked, ..)| locked.gradient()).collect();
        self.norm.compute(&mut self.gradients, &gradients, settings.clip_norm.unwrap_or(f64::INFINITY))?;
        drop(gradients);
        let mut lines = BTreeMap::<u64, Vec<_>>::new();
        let mut counts = Vec::with_capacity(held.len());
        for (locked, moments, decays, updates, hidden) in &mut held {
            match hidden {
                None => lines.entry(**updates + 1).or_default().push(locked.line(moments.reborrow(), *decays)),
                Some((parameter, tensors)) => {
                    let update = settings.update(true, **updates + 1, 1.0);
                    muon::update_on_device(locked.as_mut(), moments.reborrow(), (*parameter, tensors), settings, &update, &self.norm)?;
                }
            }
            counts.push(updates);
        }
        self.parameters.resize_with(lines.len(), Table::default);
        for ((update, lines), table) in lines.iter().zip(&mut self.parameters) {
            adamw(&self.device, table, lines, &settings.update(true, *update, 1.0), Some(&self.norm))?;
        }
        let grad_norm = self.norm.sum_of_squares()?.sqrt();
        let applied = grad_norm.is_finite();
        counts.into_iter().for_each(|updates| **updates += u64::from(applied));
        Ok(Step { grad_norm, applied })
    }
}
