//! Buffers on a device, borrowed parts of them, and copies to and from the host through pinned memory.
//! Knows no tensors. Contents of a new buffer are undefined until something writes them.

use super::behind::behind_on;
use super::device::{Device, lock};
use super::graph::refuse_capture;
use super::pool::Block;
use crate::error::Result;
use bytemuck::Pod;
use cudarc::driver::sys;
use std::marker::PhantomData;
use std::ops::{Bound, RangeBounds};
use std::sync::Arc;

/// `len` elements of `E` on a device, given back when dropped.
pub struct DeviceBuffer<E: Pod> {
    device: Arc<Device>,
    block: Block,
    len: usize,
    element: PhantomData<E>,
    /// Whose block it is, if it was lent.
    lender: Option<Arc<DeviceBuffer<E>>>,
}

/// Memory that one buffer at a time holds, always at the same place: the next holder gets it when the last has dropped it.
pub struct Keeper<E: Pod>(Arc<DeviceBuffer<E>>);

impl<E: Pod> Keeper<E> {
    /// Of the memory of `buffer`.
    pub fn of(buffer: DeviceBuffer<E>) -> Self {
        Self(Arc::new(buffer))
    }

    /// Where it lies.
    pub fn address(&self) -> u64 {
        self.0.block.address
    }

    /// Whether nobody holds it.
    pub fn is_free(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }

    /// A buffer of this memory; none while another holds it.
    pub fn lend(&self) -> Option<DeviceBuffer<E>> {
        let DeviceBuffer { device, block, len, .. } = &*self.0;
        let lender = self.is_free().then(|| self.0.clone());
        lender.map(|lender| DeviceBuffer { device: device.clone(), block: *block, len: *len, element: PhantomData, lender: Some(lender) })
    }
}

/// Part of a buffer, to read.
#[derive(Clone, Copy)]
pub struct View<'a, E: Pod> {
    pub(super) address: u64,
    pub(super) ordinal: usize,
    len: usize,
    borrow: PhantomData<&'a [E]>,
}

/// Part of a buffer, to write.
pub struct ViewMut<'a, E: Pod> {
    pub(super) address: u64,
    pub(super) ordinal: usize,
    len: usize,
    borrow: PhantomData<&'a mut [E]>,
}

impl<E: Pod> DeviceBuffer<E> {
    /// A buffer whose contents are undefined: device memory of earlier holders. `label` says what it is for in an
    /// out-of-memory error.
    pub fn scratch(device: &Arc<Device>, label: &'static str, len: usize) -> Result<Self> {
        let block = device.take("allocate", label, len * size_of::<E>())?;
        Ok(Self { device: device.clone(), block, len, element: PhantomData, lender: None })
    }

    /// A buffer of zeros.
    pub fn zeroed(device: &Arc<Device>, label: &'static str, len: usize) -> Result<Self> {
        let mut buffer = Self::scratch(device, label, len)?;
        buffer.fill_bytes(0)?;
        Ok(buffer)
    }

    /// A copy of host memory.
    pub fn copy_of(device: &Arc<Device>, label: &'static str, values: &[E]) -> Result<Self> {
        let mut buffer = Self::scratch(device, label, values.len())?;
        buffer.upload(values)?;
        Ok(buffer)
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The device.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// All of it, to read.
    pub fn view(&self) -> View<'_, E> {
        View { address: self.block.address, ordinal: self.device.ordinal, len: self.len, borrow: PhantomData }
    }

    /// All of it, to write.
    pub fn view_mut(&mut self) -> ViewMut<'_, E> {
        ViewMut { address: self.block.address, ordinal: self.device.ordinal, len: self.len, borrow: PhantomData }
    }

    /// Elements `range`, to read.
    pub fn part(&self, range: impl RangeBounds<usize>) -> View<'_, E> {
        self.view().part(range)
    }

    /// Elements `range`, to write.
    pub fn part_mut(&mut self, range: impl RangeBounds<usize>) -> ViewMut<'_, E> {
        self.view_mut().into_part(range)
    }

    /// Sets every byte.
    pub fn fill_bytes(&mut self, byte: u8) -> Result<()> {
        let op = "fill";
        self.device.enter(op)?;
        if self.len == 0 {
            return Ok(());
        }
        let bytes = self.len * size_of::<E>();
        // SAFETY: the block holds `bytes` bytes, and it is borrowed alone.
        let code = unsafe { sys::cuMemsetD8Async(self.block.address, byte, bytes, self.device.stream()) };
        self.device.check(op, "cuMemsetD8Async", code)
    }

    /// Overwrites all elements with `values`, which may be changed as soon as this returns; the copy itself is queued.
    pub fn upload(&mut self, values: &[E]) -> Result<()> {
        assert!(values.len() == self.len, "upload: {} values to a buffer of {}", values.len(), self.len);
        let device = self.device.clone();
        with_staging(&device, "upload", |staging| staging.upload(&device, self.block.address, bytemuck::cast_slice(values)))
    }

    /// As [`DeviceBuffer::upload`], of the elements from `start` on.
    pub fn upload_at(&mut self, start: usize, values: &[E]) -> Result<()> {
        assert!(start + values.len() <= self.len, "upload: {} values at {start} of {}", values.len(), self.len);
        let (device, address) = (self.device.clone(), self.block.address + (start * size_of::<E>()) as u64);
        with_staging(&device, "upload", |staging| staging.upload(&device, address, bytemuck::cast_slice(values)))
    }

    /// As [`DeviceBuffer::download`], of the elements from `start` on.
    pub fn download_at(&self, start: usize, values: &mut [E]) -> Result<()> {
        assert!(start + values.len() <= self.len, "download: {} values at {start} of {}", values.len(), self.len);
        let address = self.block.address + (start * size_of::<E>()) as u64;
        with_staging(&self.device, "download", |staging| staging.download(&self.device, address, bytemuck::cast_slice_mut(values)))
    }

    /// A copy on the same device.
    ///
    /// Errors: [`crate::error::Error::Device`] if it has no room.
    pub fn try_clone(&self) -> Result<Self> {
        let mut copy = Self::scratch(&self.device, self.block.label, self.len)?;
        copy.copy_from(self.view())?;
        Ok(copy)
    }

    /// Copies all elements to `values`, after everything that was asked for before.
    pub fn download(&self, values: &mut [E]) -> Result<()> {
        assert!(values.len() == self.len, "download: a buffer of {} to {} values", self.len, values.len());
        with_staging(&self.device, "download", |staging| {
            staging.download(&self.device, self.block.address, bytemuck::cast_slice_mut(values))
        })
    }

    /// [`DeviceBuffer::download`] to a new vector.
    pub fn to_vec(&self) -> Result<Vec<E>> {
        let mut values = vec![E::zeroed(); self.len];
        self.download(&mut values)?;
        Ok(values)
    }

    /// Overwrites all elements with those of another buffer of the same device.
    pub fn copy_from(&mut self, other: View<'_, E>) -> Result<()> {
        let device = self.device.clone();
        self.view_mut().copy_from(&device, other)
    }
}

impl<E: Pod> std::fmt::Debug for DeviceBuffer<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DeviceBuffer[{}] on cuda:{}", self.len, self.device.ordinal)
    }
}

impl<E: Pod> Drop for DeviceBuffer<E> {
    fn drop(&mut self) {
        if self.lender.is_none() {
            self.device.give_back(self.block);
        }
    }
}

/// The borders of `range` in `len` elements.
fn borders(range: impl RangeBounds<usize>, len: usize) -> (usize, usize) {
    let start = match range.start_bound() {
        Bound::Included(start) => *start,
        Bound::Excluded(start) => start + 1,
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(end) => end + 1,
        Bound::Excluded(end) => *end,
        Bound::Unbounded => len,
    };
    assert!(start <= end && end <= len, "elements {start}..{end} of {len}");
    (start, end)
}

impl<'a, E: Pod> View<'a, E> {
    /// Where it lies, to compare.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The same bytes as elements of another type. Panics if they do not divide into whole ones.
    pub fn cast<T: Pod>(self) -> View<'a, T> {
        let bytes = self.len * size_of::<E>();
        assert!(
            bytes.is_multiple_of(size_of::<T>()) && self.address.is_multiple_of(align_of::<T>() as u64),
            "{bytes} bytes as other elements"
        );
        View { address: self.address, ordinal: self.ordinal, len: bytes / size_of::<T>(), borrow: PhantomData }
    }

    /// Elements `range` of it.
    pub fn part(self, range: impl RangeBounds<usize>) -> View<'a, E> {
        let (start, end) = borders(range, self.len);
        View { address: self.address + (start * size_of::<E>()) as u64, len: end - start, ..self }
    }
}

impl<'a, E: Pod> ViewMut<'a, E> {
    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Elements `range` of it.
    pub fn into_part(self, range: impl RangeBounds<usize>) -> ViewMut<'a, E> {
        let (start, end) = borders(range, self.len);
        ViewMut { address: self.address + (start * size_of::<E>()) as u64, len: end - start, ..self }
    }

    /// The same bytes as elements of another type. Panics if they do not divide into whole ones.
    pub fn cast<T: Pod>(self) -> ViewMut<'a, T> {
        let len = self.view().cast::<T>().len();
        ViewMut { address: self.address, ordinal: self.ordinal, len, borrow: PhantomData }
    }

    /// Overwrites all elements with those of another buffer of the same device.
    pub fn copy_from(&mut self, device: &Device, other: View<'_, E>) -> Result<()> {
        let op = "copy";
        assert!(other.len == self.len, "copy: {} elements to {}", other.len, self.len);
        let here = device.ordinal;
        assert!(other.ordinal == here && self.ordinal == here, "copy: from cuda:{} to cuda:{}", other.ordinal, self.ordinal);
        device.enter(op)?;
        if self.len == 0 {
            return Ok(());
        }
        // SAFETY: both are `len` elements of living buffers; `self` is borrowed alone, so they do not overlap.
        let code = unsafe { sys::cuMemcpyDtoDAsync_v2(self.address, other.address, self.len * size_of::<E>(), device.stream()) };
        device.check(op, "cuMemcpyDtoDAsync", code)
    }

    /// Sets all bytes to zero.
    pub fn zero(&mut self, device: &Device) -> Result<()> {
        let op = "fill";
        device.enter(op)?;
        assert!(self.ordinal == device.ordinal, "fill: a buffer of cuda:{} on cuda:{}", self.ordinal, device.ordinal);
        if self.len == 0 {
            return Ok(());
        }
        // SAFETY: the view is `len` elements of a living buffer, and it is borrowed alone.
        let code = unsafe { sys::cuMemsetD8Async(self.address, 0, self.len * size_of::<E>(), device.stream()) };
        device.check(op, "cuMemsetD8Async", code)
    }

    /// The same, to read meanwhile.
    pub fn view(&self) -> View<'_, E> {
        View { address: self.address, ordinal: self.ordinal, len: self.len, borrow: PhantomData }
    }

    /// The same, borrowed for a while.
    pub fn reborrow(&mut self) -> ViewMut<'_, E> {
        ViewMut { address: self.address, ordinal: self.ordinal, len: self.len, borrow: PhantomData }
    }
}

/// Slots of pinned memory for long copies: while one is filled by the host the others travel.
const LONG: (usize, usize) = (4 << 20, 4);
/// And for short ones, such as the tokens of a batch: so many that the host, which must not use a slot before its last copy is
/// done, asks for several steps ahead of the device.
const SHORT: (usize, usize) = (64 << 10, 128);

/// Pinned host memory through which copies go. The driver copies pageable memory through a buffer of its own and makes the
/// host wait; from pinned memory the copy is queued like a kernel.
pub(super) struct Staging {
    long: Ring,
    short: Ring,
}

/// Slots of pinned memory that are used in turn.
struct Ring {
    memory: *mut u8,
    slot_bytes: usize,
    /// One for each slot, passed when the slot's last copy is done.
    events: Vec<sys::CUevent>,
    next: usize,
}

// SAFETY: pinned memory and events belong to the context, not to a thread, and a mutex guards them.
unsafe impl Send for Ring {}

fn with_staging<T>(device: &Device, op: &'static str, copy: impl FnOnce(&mut Staging) -> Result<T>) -> Result<T> {
    device.enter(op)?;
    refuse_capture(device, op, "a copy to or from the host")?;
    let side = behind_on(device);
    let mut staging = lock(side.as_ref().map_or(&device.staging, |side| &side.staging));
    if staging.is_none() {
        *staging = Some(Staging::new(device, op)?);
    }
    copy(staging.as_mut().expect("it was made above"))
}

impl Staging {
    fn new(device: &Device, op: &'static str) -> Result<Self> {
        Ok(Self { long: Ring::new(device, op, LONG)?, short: Ring::new(device, op, SHORT)? })
    }

    fn ring(&mut self, bytes: usize) -> &mut Ring {
        if bytes <= SHORT.0 { &mut self.short } else { &mut self.long }
    }

    fn upload(&mut self, device: &Device, address: u64, bytes: &[u8]) -> Result<()> {
        self.ring(bytes.len()).upload(device, address, bytes)
    }

    fn download(&mut self, device: &Device, address: u64, bytes: &mut [u8]) -> Result<()> {
        self.ring(bytes.len()).download(device, address, bytes)
    }
}

impl Ring {
    fn new(device: &Device, op: &'static str, (slot_bytes, slots): (usize, usize)) -> Result<Self> {
        let mut memory = std::ptr::null_mut();
        // SAFETY: writes one address to an exclusive place.
        device.check(op, "cuMemAllocHost", unsafe { sys::cuMemAllocHost_v2(&mut memory, slot_bytes * slots) })?;
        let mut ring = Self { memory: memory.cast(), slot_bytes, events: Vec::new(), next: 0 };
        let untimed = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        for _ in 0..slots {
            let mut event = std::ptr::null_mut();
            // SAFETY: as above. A new event counts as passed.
            device.check(op, "cuEventCreate", unsafe { sys::cuEventCreate(&mut event, untimed) })?;
            ring.events.push(event);
        }
        Ok(ring)
    }

    /// The next slot, once its last copy is done.
    fn slot(&mut self, device: &Device, op: &'static str) -> Result<usize> {
        let slot = self.next;
        self.next = (slot + 1) % self.events.len();
        // SAFETY: the event lives as long as `self`.
        device.check(op, "cuEventSynchronize", unsafe { sys::cuEventSynchronize(self.events[slot]) })?;
        Ok(slot)
    }

    fn memory_of(&self, slot: usize) -> *mut u8 {
        // SAFETY: slots lie one after the other in the memory.
        unsafe { self.memory.add(slot * self.slot_bytes) }
    }

    fn upload(&mut self, device: &Device, address: u64, bytes: &[u8]) -> Result<()> {
        let op = "upload";
        for (index, chunk) in bytes.chunks(self.slot_bytes).enumerate() {
            let slot = self.slot(device, op)?;
            let (pinned, to) = (self.memory_of(slot), address + (index * self.slot_bytes) as u64);
            // SAFETY: the slot holds a chunk and no copy uses it (its event has passed); the buffer holds all of `bytes`.
            unsafe {
                std::ptr::copy_nonoverlapping(chunk.as_ptr(), pinned, chunk.len());
                device.check(op, "cuMemcpyHtoDAsync", sys::cuMemcpyHtoDAsync_v2(to, pinned.cast(), chunk.len(), device.stream()))?;
                device.check(op, "cuEventRecord", sys::cuEventRecord(self.events[slot], device.stream()))?;
            }
        }
        Ok(())
    }

    fn download(&mut self, device: &Device, address: u64, bytes: &mut [u8]) -> Result<()> {
        let op = "download";
        let total = bytes.len();
        let mut waiting: std::collections::VecDeque<(usize, &mut [u8])> = std::collections::VecDeque::new();
        for (index, chunk) in bytes.chunks_mut(self.slot_bytes).enumerate() {
            if waiting.len() == self.events.len() {
                let (slot, chunk) = waiting.pop_front().expect("it is full");
                self.collect(device, slot, chunk)?;
            }
            let slot = self.slot(device, op)?;
            let from = address + (index * self.slot_bytes) as u64;
            debug_assert!(index * self.slot_bytes + chunk.len() <= total);
            // SAFETY: the slot holds a chunk and no copy uses it; the buffer holds all of `bytes`.
            unsafe {
                let pinned = self.memory_of(slot).cast();
                device.check(op, "cuMemcpyDtoHAsync", sys::cuMemcpyDtoHAsync_v2(pinned, from, chunk.len(), device.stream()))?;
                device.check(op, "cuEventRecord", sys::cuEventRecord(self.events[slot], device.stream()))?;
            }
            waiting.push_back((slot, chunk));
        }
        waiting.into_iter().try_for_each(|(slot, chunk)| self.collect(device, slot, chunk))
    }

    fn collect(&self, device: &Device, slot: usize, chunk: &mut [u8]) -> Result<()> {
        // SAFETY: the event lives as long as `self`.
        device.check("download", "cuEventSynchronize", unsafe { sys::cuEventSynchronize(self.events[slot]) })?;
        // SAFETY: the copy to the slot is done, and the slot holds a chunk.
        unsafe { std::ptr::copy_nonoverlapping(self.memory_of(slot), chunk.as_mut_ptr(), chunk.len()) };
        Ok(())
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: only the device drops it, in its own context and after waiting for the stream.
        unsafe {
            sys::cuMemFreeHost(self.memory.cast());
            self.events.iter().for_each(|event| {
                sys::cuEventDestroy_v2(*event);
            });
        }
    }
}
