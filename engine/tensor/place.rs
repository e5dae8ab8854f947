//! Where elements lie: on the host or on a GPU. `Place` names it, `Array` is elements at one.

use crate::error::{Error, Result};
use crate::kernels::buffer::{self, Buffer};
use crate::kernels::cpu::norm;
use crate::kernels::cuda::behind::Mark;
use crate::kernels::cuda::compile::nvrtc_version;
use crate::kernels::cuda::device::Device;
use crate::kernels::cuda::elements;
use crate::kernels::cuda::memory::DeviceBuffer;
use crate::kernels::cuda_probe::{Driver, probe};
use crate::kernels::element::{Element, Float};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// The host, or a GPU of this process.
#[derive(Clone, Default)]
pub enum Place {
    #[default]
    Host,
    Cuda(Arc<Device>),
}

/// The devices in use, so that all models on one share its stream and its memory. They stay open: opening one takes as long as
/// a small model's step.
static DEVICES: Mutex<BTreeMap<usize, Arc<Device>>> = Mutex::new(BTreeMap::new());

impl Place {
    /// The place that a user names: `cpu`, `cuda` (the first GPU), `cuda:1`, or `auto`, which is `cuda` if there is a
    /// GPU that the engine can use, with NVRTC to compile its kernels, and `cpu` if not.
    ///
    /// Errors: [`Error::Argument`] for another name; [`Error::Device`] with the remedy if that GPU cannot be used.
    pub fn named(name: &str) -> Result<Self> {
        let unknown =
            || Error::argument("device", "device", "\"auto\", \"cpu\", \"cuda\" or \"cuda:1\" (the second GPU)", format!("{name:?}"));
        match name {
            "cpu" => Ok(Self::Host),
            "auto" => match probe() {
                Ok(Driver { gpus, .. }) if gpus[0].compute_capability >= Device::CAPABILITY_LEAST && nvrtc_version("cuda").is_ok() => {
                    Self::cuda(0)
                }
                _ => Ok(Self::Host),
            },
            "cuda" => Self::cuda(0),
            _ => Self::cuda(name.strip_prefix("cuda:").and_then(|ordinal| ordinal.parse().ok()).ok_or_else(unknown)?),
        }
    }

    fn cuda(ordinal: usize) -> Result<Self> {
        let mut devices = DEVICES.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(device) = devices.get(&ordinal) {
            return Ok(Self::Cuda(device.clone()));
        }
        let device = Device::open(ordinal)?;
        // Said now, not at the first kernel, after the weights have been read.
        nvrtc_version("cuda")?;
        devices.insert(ordinal, device.clone());
        Ok(Self::Cuda(device))
    }

    /// The GPU, if it is one.
    pub fn device(&self) -> Option<&Arc<Device>> {
        match self {
            Self::Host => None,
            Self::Cuda(device) => Some(device),
        }
    }

    /// Waits until all that was asked of it is done; the host is always done.
    ///
    /// Errors: those of the device.
    pub fn synchronize(&self) -> Result<()> {
        self.device().map_or(Ok(()), |device| device.synchronize())
    }

    /// Whether both are the host, or the same GPU.
    pub fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Host, Self::Host) => true,
            (Self::Cuda(a), Self::Cuda(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }
}

/// Bytes of live tensors on all devices in use.
pub fn device_bytes() -> usize {
    let devices = DEVICES.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    devices.values().map(|device| device.memory_statistics().live_bytes).sum()
}

/// Whether live tensors take most of the memory of some device in use.
pub fn is_a_device_nearly_full() -> bool {
    let devices = DEVICES.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    devices.values().any(|device| device.memory_statistics().live_bytes > device.memory_bytes / 4 * 3)
}

/// Bytes of live tensors, wherever they lie.
pub fn live_bytes() -> usize {
    buffer::live_bytes() + device_bytes()
}

/// Where an image goes: a copy that is written to a disk while its original trains on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageTo {
    /// On the host, for which a device is waited for.
    Host,
    /// On its device as far as that has room to spare, the rest on the host. It is read behind [`Marks`], and gone before they are.
    SpareRoom,
    /// Nowhere: what lies on the host is shared and must not be written before the image is gone. The rest as in `Host`.
    InPlace,
}

impl ImageTo {
    /// Whether what lies at `place` is shared in place of copied.
    pub fn shares(self, place: &Place) -> bool {
        self == Self::InPlace && place.device().is_none()
    }

    /// Whether `bytes` at `place` are copied there.
    pub(super) fn stays_at(self, place: &Place, bytes: usize) -> bool {
        self == Self::SpareRoom && place.device().is_some_and(|device| device.lend_room(bytes))
    }
}

/// A place in the work of every device in use: all that was asked of them before.
pub struct Marks(Vec<Mark>);

impl Marks {
    /// Errors: those of the devices.
    pub fn now() -> Result<Self> {
        let devices = DEVICES.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        devices.values().map(Mark::now).collect::<Result<_>>().map(Self)
    }

    /// Lets what this thread asks of the devices in `work` begin behind the marks, while other threads go on asking them.
    ///
    /// Errors: those of `work` and of the devices.
    pub fn work_behind<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        fn run(marks: &[Mark], work: &mut dyn FnMut() -> Result<()>) -> Result<()> {
            match marks.split_first() {
                None => work(),
                Some((mark, others)) => mark.work_behind(|| run(others, work)),
            }
        }
        let (mut work, mut result) = (Some(work), None);
        run(&self.0, &mut || {
            let work = work.take().expect("it is called once");
            work().map(|value| result = Some(value))
        })?;
        Ok(result.expect("work that failed would have been an error"))
    }
}

impl std::fmt::Display for Place {
    /// As users name it: `cpu` or `cuda:0`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Host => f.write_str("cpu"),
            Self::Cuda(device) => write!(f, "cuda:{}", device.ordinal),
        }
    }
}

/// Elements in row-major order, on the host or on a device.
#[derive(Debug)]
pub enum Array<E: Element> {
    Host(Buffer<E>),
    Cuda(DeviceBuffer<E>),
}

impl<E: Element> Array<E> {
    pub fn len(&self) -> usize {
        match self {
            Self::Host(buffer) => buffer.len(),
            Self::Cuda(buffer) => buffer.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn place(&self) -> Place {
        match self {
            Self::Host(_) => Place::Host,
            Self::Cuda(buffer) => Place::Cuda(buffer.device().clone()),
        }
    }

    /// `len` zeros at `place`; `label` is for messages of a full device.
    ///
    /// Errors: [`Error::Device`] if the device has no room.
    pub fn zeroed(place: &Place, label: &'static str, len: usize) -> Result<Self> {
        match place {
            Place::Host => Ok(Self::Host(Buffer::zeroed(len))),
            Place::Cuda(device) => Ok(Self::Cuda(DeviceBuffer::zeroed(device, label, len)?)),
        }
    }

    /// The same elements at `place`: moved if they are there already, copied through the host otherwise.
    ///
    /// Errors: those of the devices.
    pub fn moved_to(self, place: &Place, label: &'static str) -> Result<Self> {
        if self.place().is(place) {
            return Ok(self);
        }
        let host = self.into_host()?;
        match place {
            Place::Host => Ok(Self::Host(host)),
            Place::Cuda(device) => Ok(Self::Cuda(DeviceBuffer::copy_of(device, label, &host)?)),
        }
    }

    /// The elements on the host; waits for a device until all that was asked of it is done.
    ///
    /// Errors: those of the device.
    pub fn into_host(self) -> Result<Buffer<E>> {
        match self {
            Self::Host(buffer) => Ok(buffer),
            Self::Cuda(buffer) => downloaded(&buffer),
        }
    }

    /// A copy of the elements on the host.
    ///
    /// Errors: those of the device.
    pub fn to_host(&self) -> Result<Buffer<E>> {
        match self {
            Self::Host(buffer) => Ok(buffer.clone()),
            Self::Cuda(buffer) => downloaded(buffer),
        }
    }

    /// The elements as a slice. Panics if they lie on a device: who asks does not expect one there.
    pub fn host(&self) -> &[E] {
        match self {
            Self::Host(buffer) => buffer,
            Self::Cuda(buffer) => panic!("elements on cuda:{} were read in place", buffer.device().ordinal),
        }
    }

    /// The elements on their device. Panics if they lie on the host.
    pub fn cuda(&self) -> &DeviceBuffer<E> {
        match self {
            Self::Host(_) => panic!("elements on the host were read as if on a device"),
            Self::Cuda(buffer) => buffer,
        }
    }

    /// As [`Array::cuda`], to keep.
    pub fn into_cuda(self) -> DeviceBuffer<E> {
        match self {
            Self::Host(_) => panic!("elements on the host were taken as if on a device"),
            Self::Cuda(buffer) => buffer,
        }
    }

    /// A copy that lives until it is written.
    ///
    /// Errors: those of the device.
    pub fn image(&self, to: ImageTo) -> Result<Self> {
        if to.stays_at(&self.place(), self.len() * size_of::<E>())
            && let Ok(image) = self.try_clone()
        {
            return Ok(image);
        }
        Ok(Self::Host(self.to_host()?))
    }

    /// A copy at the same place.
    ///
    /// Errors: [`Error::Device`] if the device has no room.
    pub fn try_clone(&self) -> Result<Self> {
        match self {
            Self::Host(buffer) => Ok(Self::Host(buffer.clone())),
            Self::Cuda(buffer) => Ok(Self::Cuda(buffer.try_clone()?)),
        }
    }
}

/// A copy on the host of what lies on a device, after all that was asked of it.
///
/// Errors: those of the device.
pub fn downloaded<E: Element>(buffer: &DeviceBuffer<E>) -> Result<Buffer<E>> {
    let mut host = Buffer::scratch(buffer.len());
    buffer.download(&mut host)?;
    Ok(host)
}

impl<E: Float> Array<E> {
    /// `self += x`. Panics if they lie apart: both are gradients of one tensor.
    ///
    /// Errors: those of the device.
    pub fn add(&mut self, x: &Self) -> Result<()> {
        match (self, x) {
            (Self::Host(sum), Self::Host(x)) => {
                norm::add(sum, x);
                Ok(())
            }
            (Self::Cuda(sum), Self::Cuda(x)) => {
                let device = sum.device().clone();
                elements::add(&device, sum.view_mut(), x.view())
            }
            (sum, x) => panic!("gradients of one tensor on {} and on {}", sum.place(), x.place()),
        }
    }
}
