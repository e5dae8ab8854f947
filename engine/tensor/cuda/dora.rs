//! The scaling of DoRA on a GPU; see tensor/dora.rs. Lengths of rows are computed when a weight or a factor has changed, into memory
//! that stays where it is: captured graphs read it, and who launches one brings it up to date before.

use super::{activation, gradient, scratch};
use crate::error::Result;
use crate::kernels::cuda::device::Device;
use crate::kernels::cuda::dora::{self as kernel, Master, Part};
use crate::kernels::cuda::memory::{DeviceBuffer, View, ViewMut};
use crate::kernels::cuda::product::{self, Groups};
use crate::kernels::cuda::{elements, norm};
use crate::kernels::element::Float;
use crate::tensor::ModelElement;
use crate::tensor::autograd::is_recording;
use crate::tensor::dora::Magnitude;
use crate::tensor::low_rank::LowRank;
use crate::tensor::parameter::{Layout, Parameter, Value};
use std::sync::Arc;

/// What an out-of-memory error calls them.
const LENGTHS: &str = "lengths of rows";

/// Lengths that were computed.
pub struct Known {
    /// Of the weight and of both factors.
    versions: [u64; 3],
    norms: DeviceBuffer<f32>,
}

fn master<E: ModelElement>(value: &Value<E>) -> Master<'_, E> {
    let cuda = value.cuda.as_ref().expect("a weight on the host was read as if on a device");
    Master { values: cuda.weight.view(), rest: cuda.remainder.as_ref().map(DeviceBuffer::view) }
}

fn part_of<E: ModelElement>(part: &LowRank<E>) -> Part {
    Part { groups: part.stack.count, width: part.stack.rows, rows: part.rows.clone() }
}

impl<E: ModelElement> Magnitude<E> {
    /// Runs `read` with the length of each row of `weight` with `part`, whose magnitude this is, before it is scaled: `[rows]`.
    ///
    /// Errors: those of `read` and of the device; where lengths must be computed while a graph is captured.
    pub(super) fn with_norms<T>(
        &self,
        device: &Arc<Device>,
        weight: &Parameter<E>,
        part: &LowRank<E>,
        read: impl FnOnce(View<f32>) -> Result<T>,
    ) -> Result<T> {
        let versions = [weight.version(), part.a.version(), part.b.version()];
        let mut guard = self.on_device.lock().expect("nothing panics while lengths are computed");
        let known = match &mut *guard {
            Some(known) if known.versions == versions => return read(known.norms.view()),
            Some(known) => known,
            None => guard.insert(Known { versions, norms: DeviceBuffer::scratch(device, LENGTHS, part.stack.count * part.rows.len())? }),
        };
        // Of no version, should the launch fail.
        known.versions = [u64::MAX; 3];
        if weight.layout() == Layout::Int8 {
            // Never trained: once is enough, from the host.
            known.norms.upload(&self.norms(weight, part)?)?;
            known.versions = versions;
            return read(known.norms.view());
        }
        let (w, a, b) = (weight.read(), part.a.read(), part.b.read());
        kernel::row_norms(device, &part_of(part), master(&w), master(&a), master(&b), part.scale, known.norms.view_mut())?;
        known.versions = versions;
        read(known.norms.view())
    }
}

impl<E: ModelElement> Parameter<E> {
    /// Brings the lengths of rows up to date that products with this weight read on a device, before a captured graph does.
    ///
    /// Errors: those of the device.
    pub fn refresh_lengths(&self) -> Result<()> {
        let Some(device) = self.place().device() else { return Ok(()) };
        self.adapters().iter().try_for_each(|part| match &part.magnitude {
            Some(magnitude) => magnitude.with_norms(device, self, part, |_| Ok(())),
            None => Ok(()),
        })
    }
}

/// The scaling of one product's outputs, with what its backward pass needs.
pub(super) struct Scaling<E: ModelElement> {
    /// `[groups, out]`; 1 for outputs without a part.
    gains: DeviceBuffer<f32>,
    /// `[tokens, out]`, what was scaled; none if no length trains.
    saved: Option<DeviceBuffer<E>>,
    /// Whether a length trains.
    trains: bool,
}

impl<E: ModelElement> Scaling<E> {
    /// That of `weight`; none if no part has a magnitude.
    pub fn of(device: &Arc<Device>, weight: &Parameter<E>, parts: &[LowRank<E>]) -> Result<Option<Self>> {
        let mut gains: Option<DeviceBuffer<f32>> = None;
        for (part, magnitude) in scaled(parts) {
            let is_first = gains.is_none();
            let gains = match &mut gains {
                Some(gains) => gains,
                none => none.insert(activation(device, weight.rows())?),
            };
            let lengths = magnitude.lengths.read();
            magnitude.with_norms(device, weight, part, |norms| {
                kernel::gains(device, &part_of(part), master(&lengths), norms, gains.view_mut(), is_first)
            })?;
        }
        let trains = scaled(parts).any(|(_, magnitude)| magnitude.lengths.trains());
        Ok(gains.map(|gains| Self { gains, saved: None, trains }))
    }

    /// `y = gains * sums (+ bias) (+ residual)`, rounded once.
    ///
    /// - `sums`: `[tokens, out]`, of weight and low-rank parts; kept, as elements, if a length trains and a backward pass may come
    pub fn forward<O: Float>(
        &mut self,
        device: &Arc<Device>,
        sums: DeviceBuffer<f32>,
        bias: Option<View<E>>,
        residual: Option<View<O>>,
        y: ViewMut<O>,
        groups: Option<Groups>,
    ) -> Result<()> {
        kernel::scale_sums(device, sums.view(), self.gains.view(), bias, residual, y, groups)?;
        if self.trains && is_recording() {
            let mut saved = activation::<E>(device, sums.len())?;
            elements::narrow(device, sums.view(), saved.view_mut())?;
            self.saved = Some(saved);
        }
        Ok(())
    }

    /// Adds the gradients of the lengths that train, and gives that of what was scaled.
    ///
    /// - `dy`: `[tokens, out]`
    pub fn backward(
        &self,
        device: &Arc<Device>,
        weight: &Parameter<E>,
        parts: &[LowRank<E>],
        dy: View<E>,
        groups: Option<Groups>,
    ) -> Result<DeviceBuffer<E>> {
        let mut d_sums = gradient::<E>(device, dy.len())?;
        let Some(saved) = &self.saved else {
            kernel::scale_back(device, dy, self.gains.view(), d_sums.view_mut(), None, groups)?;
            return Ok(d_sums);
        };
        let mut products = scratch::<f32>(device, dy.len())?;
        kernel::scale_back(device, dy, self.gains.view(), d_sums.view_mut(), Some((saved.view(), products.view_mut())), groups)?;
        let mut sums = scratch::<f32>(device, self.gains.len())?;
        match groups {
            None => {
                let mut rows = scratch::<f32>(device, norm::parts_len(dy.len() / sums.len(), sums.len()))?;
                norm::column_sums(device, products.view(), rows.view_mut(), sums.view_mut(), false)?;
            }
            Some(_) => {
                let width = sums.len() / groups.map_or(1, |groups| groups.count());
                let ones = DeviceBuffer::copy_of(device, super::SCRATCH, &vec![1.0f32; dy.len() / width])?;
                product::weight_gradient(device, sums.view_mut(), products.view(), ones.view(), (width, 1), false, groups)?;
            }
        }
        for (part, magnitude) in scaled(parts) {
            magnitude.with_norms(device, weight, part, |norms| {
                magnitude.lengths.accumulate_on_device(|gradient, add| {
                    kernel::length_gradient(device, &part_of(part), sums.view(), norms, gradient, add)
                })
            })?;
        }
        Ok(d_sums)
    }
}

/// The parts that have lengths.
fn scaled<E: ModelElement>(parts: &[LowRank<E>]) -> impl Iterator<Item = (&LowRank<E>, &Arc<Magnitude<E>>)> {
    parts.iter().filter_map(|part| part.magnitude.as_ref().map(|magnitude| (part, magnitude)))
}
