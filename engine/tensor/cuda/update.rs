//! Parameters on a device held for an update: AdamW's of all of them in one launch, or Muon's of each. Which they are, and what is done
//! if their gradient is not finite, is train/device_step.rs's matter.

use crate::error::Result;
use crate::kernels::cuda::adamw::{Line, Parameter};
use crate::kernels::cuda::device::Device;
use crate::kernels::cuda::memory::{DeviceBuffer, View};
use crate::kernels::cuda::muon;
use crate::kernels::cuda::norm::Norm;
use crate::tensor::ModelElement;
use crate::tensor::parameter::{Value, own};
use half::bf16;
use std::ops::Range;
use std::sync::{Arc, RwLockWriteGuard};

/// The first and the second moments of a parameter on a device, as many as its gradient has elements.
pub enum DeviceMoments<'a> {
    F32(&'a mut DeviceBuffer<f32>, &'a mut DeviceBuffer<f32>),
    Bf16(&'a mut DeviceBuffer<bf16>, &'a mut DeviceBuffer<bf16>),
}

impl DeviceMoments<'_> {
    pub fn reborrow(&mut self) -> DeviceMoments<'_> {
        match self {
            Self::F32(m, v) => DeviceMoments::F32(m, v),
            Self::Bf16(m, v) => DeviceMoments::Bf16(m, v),
        }
    }
}

/// A parameter of any element type on a device, and its gradient, held for an update.
pub trait DeviceUpdate {
    /// `[rows * columns]`
    fn gradient(&self) -> View<'_, f32>;
    /// Its line in the table of the launch.
    fn line<'a>(&'a mut self, moments: DeviceMoments<'a>, decays: bool) -> Line<'a>;
    /// Moves it as [`MuonStep`] says; with a norm that is not finite nothing is written.
    ///
    /// Errors: those of the device.
    fn muon(&mut self, moments: DeviceMoments, step: &MuonStep, norm: &Norm) -> Result<()>;
}

/// One update of Muon (train/muon.rs).
pub struct MuonStep<'a> {
    pub momentum: f64,
    /// Number of this update, from 1.
    pub step: u64,
    /// What masters are multiplied by.
    pub keep: f32,
    /// Elements of the tensors that it is made of, rows, columns, and what each orthogonal matrix is multiplied by.
    pub matrices: &'a [(Range<usize>, usize, usize, f32)],
}

/// See [`DeviceUpdate`]; the lock goes with it.
pub struct Locked<'a, E: ModelElement> {
    value: RwLockWriteGuard<'a, Arc<Value<E>>>,
    gradient: DeviceBuffer<f32>,
}

impl<'a, E: ModelElement> Locked<'a, E> {
    /// Errors: [`crate::error::Error::Device`] if there is no room for a weight of its own, where a copy of the model shares it, or for
    /// remainders that it does not have yet: one that came as bf16 is its own master.
    pub fn new(mut value: RwLockWriteGuard<'a, Arc<Value<E>>>, gradient: DeviceBuffer<f32>) -> Result<Self> {
        let cuda = own(&mut value)?.cuda.as_mut().expect("a gradient on a device belongs to a weight there");
        if E::HAS_REMAINDER {
            cuda.remainder_mut()?;
        }
        Ok(Self { value, gradient })
    }
}

impl<E: ModelElement> DeviceUpdate for Locked<'_, E> {
    fn gradient(&self) -> View<'_, f32> {
        self.gradient.view()
    }

    fn line<'a>(&'a mut self, moments: DeviceMoments<'a>, decays: bool) -> Line<'a> {
        let device: Arc<Device> = self.gradient.device().clone();
        let cuda = Arc::get_mut(&mut self.value).and_then(|value| value.cuda.as_mut());
        let cuda = cuda.expect("locking it made it our own, on the device");
        let rest = cuda.remainder.as_mut().map(DeviceBuffer::view_mut);
        let (weight, gradient) = (cuda.weight.view_mut(), self.gradient.view());
        match moments {
            DeviceMoments::F32(m, v) => Parameter { weight, rest, gradient, m: m.view_mut(), v: v.view_mut(), decays }.line(&device),
            DeviceMoments::Bf16(m, v) => Parameter { weight, rest, gradient, m: m.view_mut(), v: v.view_mut(), decays }.line(&device),
        }
    }

    fn muon(&mut self, moments: DeviceMoments, step: &MuonStep, norm: &Norm) -> Result<()> {
        let device: Arc<Device> = self.gradient.device().clone();
        let mut delta = DeviceBuffer::<f32>::scratch(&device, "updates of Muon", self.gradient.len())?;
        let gradient = self.gradient.view();
        match moments {
            DeviceMoments::F32(m, _) => muon::momentum(&device, gradient, m.view_mut(), delta.view_mut(), step.momentum, step.step, norm)?,
            DeviceMoments::Bf16(m, _) => muon::momentum(&device, gradient, m.view_mut(), delta.view_mut(), step.momentum, step.step, norm)?,
        }
        for (elements, rows, columns, factor) in step.matrices {
            muon::orthogonalise(&device, delta.part_mut(elements.clone()), *rows, *columns, *factor)?;
        }
        let cuda = Arc::get_mut(&mut self.value).and_then(|value| value.cuda.as_mut());
        let cuda = cuda.expect("locking it made it our own, on the device");
        let rest = cuda.remainder.as_mut().map(DeviceBuffer::view_mut);
        muon::move_by(&device, cuda.weight.view_mut(), rest, delta.view(), step.keep, norm)
    }
}
