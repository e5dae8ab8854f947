//! Copies of a parameter, with all that training keeps of it, and the average of two.

use super::ModelElement;
use super::cuda::value::GRADIENTS;
use super::parameter::{Adapters, BLOCK_VALUES, Parameter, Value, own};
use super::place::{Array, ImageTo, Place};
use crate::error::Result;
use crate::kernels::buffer::Buffer;
use crate::kernels::cpu::norm;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, RwLock};

impl<E: ModelElement> Parameter<E> {
    /// A parameter of its own with the same value, low-rank parts, gradient and flag. Its version begins anew. A value that
    /// does not train is shared until one of the two is written.
    ///
    /// Errors: [`crate::error::Error::Device`] if it lies on a device without room for one more.
    pub fn copy(&self) -> Result<Self> {
        self.copy_with(&self.place, false, Self::copy)
    }

    /// As [`Parameter::copy`], what a checkpoint is written from. It serves [`Parameter::copy_from`] and reading, not products. A value
    /// that does not train is shared where it is, and so is every value on the host that stays [`ImageTo::InPlace`].
    ///
    /// Errors: those of the device.
    pub fn image(&self, to: ImageTo) -> Result<Self> {
        let part = |parameter: &Self| parameter.image(to);
        if self.trains()
            && to.stays_at(&self.place, self.state_bytes())
            && let Ok(image) = self.copy_with(&self.place, false, part)
        {
            return Ok(image);
        }
        self.copy_with(&Place::Host, to.shares(&self.place), part)
    }

    /// A copy at `place`, which is its own or the host, with low-rank parts of what `copy` makes of their parameters.
    ///
    /// - `shares`: whether the value is shared until one of the two is written, also if it trains
    fn copy_with(&self, place: &Place, shares: bool, copy: impl Fn(&Self) -> Result<Self>) -> Result<Self> {
        let value = self.read();
        let place = if self.trains() { place } else { &self.place };
        let value = match &value.cuda {
            _ if shares || !self.trains() => value.clone(),
            Some(cuda) if place.device().is_none() => {
                let (weight, remainder) = (cuda.weight_to_host()?, cuda.remainder_to_host()?);
                Arc::new(Value { weight, remainder, int8: None, cuda: None })
            }
            _ => Arc::new(value.try_clone()?),
        };
        let gradient = self.gradient.lock().expect("nothing panics while a gradient is read");
        let gradient = match gradient.as_ref() {
            Some(gradient) if place.device().is_none() => Some(Array::Host(gradient.to_host()?)),
            Some(gradient) => Some(gradient.try_clone()?),
            None => None,
        };
        let adapters = self.lock_adapters();
        let parts = adapters.parts.iter().map(|part| part.copy_with(&copy)).collect::<Result<_>>()?;
        let embedding = adapters.embedding.as_ref().map(|part| part.copy_with(&copy)).transpose()?;
        Ok(Self {
            name: self.name.clone(),
            rows: self.rows,
            columns: self.columns,
            layout: self.layout,
            is_matrix: self.is_matrix,
            value: RwLock::new(value),
            place: place.clone(),
            adapters: RwLock::new(Adapters { parts, embedding, former: adapters.former.clone() }),
            gradient: Mutex::new(gradient),
            keeper: Mutex::new(None),
            trains: AtomicBool::new(self.trains()),
            version: AtomicU64::new(0),
            gradients: AtomicU64::new(0),
        })
    }

    /// Takes value, gradient and low-rank parts of `other`, a copy or an image, to the bit. Panics if it has another shape, or
    /// parts of other shapes.
    ///
    /// Errors: those of the device.
    pub fn copy_from(&self, other: &Self) -> Result<()> {
        assert_eq!((self.rows, self.columns, self.layout), (other.rows, other.columns, other.layout), "{}: another shape", self.name);
        {
            let from = other.read();
            let mut value = self.value.write().expect("nothing panics while a parameter is written");
            if !self.trains() {
                *value = from.clone();
            } else if !Arc::ptr_eq(&value, &from) {
                own(&mut value)?.take(&from)?;
            }
        }
        let theirs = other.lock_adapters().clone();
        let ours = {
            let mut adapters = self.adapters.write().expect("nothing panics while adapters change");
            adapters.former.clone_from(&theirs.former);
            adapters.clone()
        };
        assert_eq!(ours.parts.len(), theirs.parts.len(), "{}: other low-rank parts", self.name);
        if let (Some(to), Some(from)) = (&ours.embedding, &theirs.embedding) {
            to.parameters().zip(from.parameters()).try_for_each(|(to, from)| to.copy_from(from))?;
        }
        for (to, from) in ours.parts.iter().zip(theirs.parts.iter()) {
            to.parameters().zip(from.parameters()).try_for_each(|(to, from)| to.copy_from(from))?;
        }
        let gradient =
            other.gradient.lock().expect("nothing panics while a gradient is read").as_ref().map(Array::try_clone).transpose()?;
        let gradient = gradient.map(|gradient| gradient.moved_to(&self.place, GRADIENTS)).transpose()?;
        *self.gradient.lock().expect("nothing panics while a gradient is written") = gradient;
        self.version.fetch_add(1, Relaxed);
        Ok(())
    }

    /// `this = (1 - weight) * this + weight * other`, in f32 from masters where they exist; a bf16 weight has one afterwards.
    /// Panics if `other` has another shape or layout.
    ///
    /// Errors: those of [`Parameter::write_rows`].
    pub fn average(&self, other: &Self, weight: f64) -> Result<()> {
        assert_eq!((self.rows, self.columns, self.layout), (other.rows, other.columns, other.layout), "{}: another shape", self.name);
        if self.place.device().is_some() || other.place.device().is_some() {
            return self.row_blocks().try_for_each(|rows| {
                let len = rows.len() * self.columns;
                let (mut ours, mut theirs) = (Buffer::<f32>::scratch(len), Buffer::<f32>::scratch(len));
                self.read_rows(rows.clone(), &mut ours)?;
                other.read_rows(rows.clone(), &mut theirs)?;
                norm::blend(&mut ours, &theirs, weight);
                self.write_rows(rows, &ours, E::HAS_REMAINDER)
            });
        }
        let from = other.read().clone();
        let mut guard = self.value.write().expect("nothing panics while a parameter is written");
        let to = own(&mut guard)?;
        let len = to.weight.len();
        if E::HAS_REMAINDER {
            to.remainder.get_or_insert_with(|| vec![0; len]);
        }
        for start in (0..len).step_by(BLOCK_VALUES) {
            let range = start..(start + BLOCK_VALUES).min(len);
            let (mut ours, mut theirs) = (Buffer::<f32>::scratch(range.len()), Buffer::<f32>::scratch(range.len()));
            to.read_masters(range.clone(), &mut ours);
            from.read_masters(range.clone(), &mut theirs);
            norm::blend(&mut ours, &theirs, weight);
            match &mut to.remainder {
                None => E::split_master(&ours, &mut to.weight[range], &mut []),
                Some(remainder) => {
                    E::split_master(&ours, &mut to.weight[range.clone()], E::remainder_as_elements_mut(&mut remainder[range]));
                }
            }
        }
        self.version.fetch_add(1, Relaxed);
        Ok(())
    }
}

impl<E: ModelElement> Value<E> {
    /// Takes the bits of a copy, which lies at the same place or on the host.
    fn take(&mut self, from: &Self) -> Result<()> {
        match (&mut self.cuda, &from.cuda) {
            (Some(to), Some(from)) => to.take(from),
            (Some(to), None) => to.upload(&from.weight, from.remainder.as_deref()),
            (None, Some(_)) => panic!("a weight on the host takes its value from a copy on the host"),
            (None, None) => {
                self.weight.copy_from_slice(&from.weight);
                self.remainder.clone_from(&from.remainder);
                Ok(())
            }
        }
    }

    /// Copies elements as they lie, as f32: masters where they exist.
    fn read_masters(&self, range: Range<usize>, masters: &mut [f32]) {
        match &self.remainder {
            None => norm::convert(&self.weight[range], masters),
            Some(remainder) => {
                E::join_master(&self.weight[range.clone()], E::remainder_as_elements(&remainder[range]), masters);
            }
        }
    }
}
