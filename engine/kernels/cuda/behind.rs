//! Work behind a mark: a thread reads on a second stream what a device held when the mark was set, while other threads go on
//! asking the device for work. So a checkpoint is copied out while its run trains on. Nobody may write to what is read so: it is
//! a copy, or shared.
//! Source: CUDA driver API, streams and events.

use super::device::{Device, lock};
use super::graph::refuse_capture;
use super::memory::Staging;
use crate::error::Result;
use cudarc::driver::sys;
use std::cell::RefCell;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

thread_local! {
    /// Second streams that this thread's work goes to, of the devices behind whose marks it works.
    static BEHIND: RefCell<Vec<(*const Device, Arc<Side>)>> = const { RefCell::new(Vec::new()) };
}

/// The second stream of a device, with pinned memory of its own: who waits for a copy there keeps nobody else waiting.
pub(super) struct Side {
    pub stream: sys::CUstream,
    pub staging: Mutex<Option<Staging>>,
}

// SAFETY: a stream belongs to the context, not to a thread; the driver orders calls on it.
unsafe impl Send for Side {}
// SAFETY: as above.
unsafe impl Sync for Side {}

impl Drop for Side {
    fn drop(&mut self) {
        // SAFETY: the device drops it in its own context; the stream was created below, and nothing is asked of it any more.
        unsafe {
            sys::cuStreamSynchronize(self.stream);
            lock(&self.staging).take();
            sys::cuStreamDestroy_v2(self.stream);
        }
    }
}

/// The second stream, if this thread works behind a mark of `device`.
pub(super) fn behind_on(device: &Device) -> Option<Arc<Side>> {
    BEHIND.with_borrow(|sides| sides.iter().rev().find(|(of, _)| std::ptr::eq(*of, device)).map(|(_, side)| side.clone()))
}

/// Marks of a device that are alive.
#[derive(Default)]
pub(super) struct Marks {
    count: Mutex<usize>,
    fewer: Condvar,
}

/// A place in the work of a device: all that was asked of it before.
pub struct Mark {
    device: Arc<Device>,
    event: sys::CUevent,
}

// SAFETY: an event belongs to the context, not to a thread.
unsafe impl Send for Mark {}

impl Mark {
    /// Behind all that was asked of `device` so far. What is kept for it should end before it does: a device that is full waits until
    /// it has no marks.
    ///
    /// Errors: [`crate::error::Error::Device`] if the device refuses or was lost.
    pub fn now(device: &Arc<Device>) -> Result<Self> {
        let op = "mark";
        device.enter(op)?;
        refuse_capture(device, op, "a mark")?;
        let mut event = std::ptr::null_mut();
        let untimed = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: writes one handle to an exclusive place.
        device.check(op, "cuEventCreate", unsafe { sys::cuEventCreate(&mut event, untimed) })?;
        *lock(&device.marks.count) += 1;
        let mark = Self { device: device.clone(), event };
        // SAFETY: the event is new, the stream lives as long as the device.
        device.check(op, "cuEventRecord", unsafe { sys::cuEventRecord(event, device.stream()) })?;
        Ok(mark)
    }

    /// Lets what this thread asks of the device in `work` go to the second stream, which begins when the mark is passed.
    ///
    /// Errors: those of `work`; [`crate::error::Error::Device`] if the device refuses or was lost.
    pub fn work_behind<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        struct Leave;
        impl Drop for Leave {
            fn drop(&mut self) {
                BEHIND.with_borrow_mut(Vec::pop);
            }
        }
        let side = self.device.side("mark")?;
        // SAFETY: both live: the stream as long as the device, the event as long as `self`.
        let code = unsafe { sys::cuStreamWaitEvent(side.stream, self.event, 0) };
        self.device.check("mark", "cuStreamWaitEvent", code)?;
        BEHIND.with_borrow_mut(|sides| sides.push((Arc::as_ptr(&self.device), side)));
        let _leave = Leave;
        work()
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        if self.device.enter("mark").is_ok() {
            // SAFETY: made by `now`; the driver lets it go once it is passed.
            unsafe { sys::cuEventDestroy_v2(self.event) };
        }
        let mut count = lock(&self.device.marks.count);
        *count -= 1;
        if *count == 0 {
            lock(&self.device.pool).end_images();
            self.device.marks.fewer.notify_all();
        }
    }
}

impl Device {
    fn side(&self, op: &'static str) -> Result<Arc<Side>> {
        self.enter(op)?;
        let mut side = lock(&self.side);
        if let Some(side) = side.as_ref() {
            return Ok(side.clone());
        }
        let mut stream = std::ptr::null_mut();
        // SAFETY: writes one handle to an exclusive place.
        let code = unsafe { sys::cuStreamCreate(&mut stream, sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32) };
        self.check(op, "cuStreamCreate", code)?;
        Ok(side.insert(Arc::new(Side { stream, staging: Mutex::new(None) })).clone())
    }

    /// Waits until nobody works behind a mark, which gives back what was kept for it. False if there was no mark, or if this
    /// thread itself works behind one.
    pub fn wait_for_marks(&self) -> bool {
        if behind_on(self).is_some() {
            return false;
        }
        let mut count = lock(&self.marks.count);
        let there_were = *count > 0;
        while *count > 0 {
            count = self.marks.fewer.wait(count).unwrap_or_else(PoisonError::into_inner);
        }
        there_were
    }

    /// Lets the second stream, if this thread works there, begin what it is asked for next behind all that was asked of the first:
    /// memory that is taken again may still be in use there.
    ///
    /// Errors: [`crate::error::Error::Device`] if the device refuses or was lost.
    pub(super) fn catch_up(self: &Arc<Self>) -> Result<()> {
        let Some(side) = behind_on(self) else { return Ok(()) };
        let mut event = std::ptr::null_mut();
        let untimed = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: one handle is written; the event is recorded on a living stream, waited for by another, and destroyed once, which
        // the driver puts off until it is passed.
        unsafe {
            self.check("mark", "cuEventCreate", sys::cuEventCreate(&mut event, untimed))?;
            let recorded = self.check("mark", "cuEventRecord", sys::cuEventRecord(event, self.own_stream()));
            let waits = recorded.and_then(|()| self.check("mark", "cuStreamWaitEvent", sys::cuStreamWaitEvent(side.stream, event, 0)));
            sys::cuEventDestroy_v2(event);
            waits
        }
    }
}
