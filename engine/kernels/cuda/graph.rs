//! CUDA graphs: what is asked of the device is captured once and replayed by one call, which spares the host a launch for each
//! kernel. A graph holds kernels and copies on the device only: loading kernels, copies to and from the host and waiting are
//! refused while it is captured, so run the same work once before.
//! What a graph reads must stay where it is while the graph lives; what it writes on the way lies in its [`Memory`].
//! Source: CUDA driver API, stream capture and graph management; CUDA programming guide, CUDA graphs.

use super::device::{Device, lock};
use crate::error::{Error, Result};
use cudarc::driver::sys;
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

thread_local! {
    /// What this thread captures. Other threads go on using the device's own stream meanwhile.
    static CAPTURE: Cell<Option<Capture>> = const { Cell::new(None) };
}

/// A capture that is going on.
#[derive(Clone, Copy)]
pub(super) struct Capture {
    /// Only compared: several devices may be open.
    device: *const Device,
    pub stream: sys::CUstream,
    pub memory: u64,
    overlaps: bool,
}

/// What this thread captures on `device`.
pub(super) fn capture_on(device: &Device) -> Option<Capture> {
    CAPTURE.get().filter(|capture| std::ptr::eq(capture.device, device))
}

/// Whether kernels that this thread asks for may fetch what is constant before those in front of them have ended: in a captured graph of
/// which that was said.
pub(super) fn overlaps(device: &Device) -> bool {
    capture_on(device).is_some_and(|capture| capture.overlaps) && device.overlaps_kernels()
}

/// Errors: [`Error::Device`] if this thread captures on `device`: `what` cannot be part of a graph.
pub(super) fn refuse_capture(device: &Device, op: &'static str, what: &str) -> Result<()> {
    if capture_on(device).is_none() {
        return Ok(());
    }
    Err(Error::Device { op, what: format!("{what} cannot be part of a captured graph; it comes before the capture or after it") })
}

/// Device memory that captured graphs write to: blocks that are taken while one is captured belong to it until it is dropped,
/// and are lent to nobody else. Graphs that share it must not need each other's contents: one after the other overwrites them.
pub struct Memory {
    device: Arc<Device>,
    number: u64,
}

impl Memory {
    /// Memory without blocks.
    pub fn new(device: &Arc<Device>) -> Arc<Self> {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        Arc::new(Self { device: device.clone(), number: NUMBERS.fetch_add(1, Relaxed) })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        lock(&self.device.pool).release(self.number);
    }
}

/// Work of a device that is asked for by one call.
pub struct Graph {
    memory: Arc<Memory>,
    executable: sys::CUgraphExec,
}

// SAFETY: the handle belongs to the context, not to a thread; the driver wants no two calls on it at once, and calls that change
// it need `self` alone (drop), while launches are ordered by the stream's own lock in the driver.
unsafe impl Send for Graph {}

impl Graph {
    /// Captures what `work` asks of the device, without doing it, and what `work` returns. Buffers that it returns belong to `memory`
    /// and hold results after each launch.
    ///
    /// Errors: those of `work`; [`Error::Device`] for anything in it that cannot be captured.
    pub fn capture<T>(memory: &Arc<Memory>, op: &'static str, work: impl FnOnce() -> Result<T>) -> Result<(Self, T)> {
        Self::capture_as(memory, op, false, work)
    }

    /// As [`Graph::capture`], of work that writes no weight and nothing that it is given: its kernels may ask for these before the
    /// kernels in front of them have ended.
    pub fn capture_overlapping<T>(memory: &Arc<Memory>, op: &'static str, work: impl FnOnce() -> Result<T>) -> Result<(Self, T)> {
        Self::capture_as(memory, op, true, work)
    }

    fn capture_as<T>(memory: &Arc<Memory>, op: &'static str, overlaps: bool, work: impl FnOnce() -> Result<T>) -> Result<(Self, T)> {
        let device = &*memory.device;
        assert!(CAPTURE.get().is_none(), "{op}: a capture inside a capture");
        let mut capturing = Capturing::begin(device, op, memory.number, overlaps)?;
        let worked = work();
        let graph = capturing.end();
        drop(capturing);
        let result = worked?;
        let graph = Template(graph?);
        let mut executable = std::ptr::null_mut();
        // SAFETY: the graph was captured in this context; one handle is written.
        let code = unsafe { sys::cuGraphInstantiateWithFlags(&mut executable, graph.0, 0) };
        device.check(op, "cuGraphInstantiate", code)?;
        Ok((Self { memory: memory.clone(), executable }, result))
    }

    /// Asks for all of it, behind what was asked for before.
    ///
    /// Errors: [`Error::Device`] if the device refuses or was lost.
    pub fn launch(&self, op: &'static str) -> Result<()> {
        let device = &*self.memory.device;
        device.enter(op)?;
        refuse_capture(device, op, "launching another graph")?;
        // SAFETY: the executable was made in this context; all that it touches is in its memory, or is kept by its owner.
        device.check(op, "cuGraphLaunch", unsafe { sys::cuGraphLaunch(self.executable, device.stream()) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let device = &*self.memory.device;
        // What was launched must be done before the driver takes the graph apart; of a lost device nothing is left.
        if device.synchronize().is_ok() {
            // SAFETY: made by `capture`, and nobody else has the handle.
            unsafe { sys::cuGraphExecDestroy(self.executable) };
        }
    }
}

/// A graph that is not executable.
struct Template(sys::CUgraph);

impl Drop for Template {
    fn drop(&mut self) {
        // SAFETY: the handle came from cuStreamEndCapture and is used by nobody else. An executable keeps what it needs.
        unsafe { sys::cuGraphDestroy(self.0) };
    }
}

/// A stream of its own that is being captured; the end of `self` is the end of the capture, also in a panic.
struct Capturing<'a> {
    device: &'a Device,
    op: &'static str,
    stream: sys::CUstream,
    is_open: bool,
}

impl<'a> Capturing<'a> {
    fn begin(device: &'a Device, op: &'static str, memory: u64, overlaps: bool) -> Result<Self> {
        device.enter(op)?;
        let mut stream = std::ptr::null_mut();
        // SAFETY: writes one handle to an exclusive place.
        let code = unsafe { sys::cuStreamCreate(&mut stream, sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32) };
        device.check(op, "cuStreamCreate", code)?;
        let mut capturing = Self { device, op, stream, is_open: false };
        // Other threads may go on asking the driver for whatever they like.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is new and nobody else has it.
        device.check(op, "cuStreamBeginCapture", unsafe { sys::cuStreamBeginCapture_v2(stream, mode) })?;
        capturing.is_open = true;
        CAPTURE.set(Some(Capture { device, stream, memory, overlaps }));
        Ok(capturing)
    }

    fn end(&mut self) -> Result<sys::CUgraph> {
        self.is_open = false;
        CAPTURE.set(None);
        let mut graph = std::ptr::null_mut();
        // SAFETY: this thread began the capture on this stream; one handle is written, null if the capture failed.
        let code = unsafe { sys::cuStreamEndCapture(self.stream, &mut graph) };
        self.device.check(self.op, "cuStreamEndCapture", code)?;
        Ok(graph)
    }
}

impl Drop for Capturing<'_> {
    fn drop(&mut self) {
        if self.is_open {
            // The work panicked: what was captured is of no use.
            drop(self.end().map(Template));
        }
        // SAFETY: the stream was created above, and nothing runs on it: work was captured, not done.
        unsafe { sys::cuStreamDestroy_v2(self.stream) };
    }
}

/// Lets this thread ask the driver for memory during its capture, of which that is no part: graphs hold kernels and copies.
pub(super) fn outside_capture<T>(device: &Device, ask: impl FnOnce() -> T) -> T {
    if capture_on(device).is_none() {
        return ask();
    }
    let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
    // SAFETY: swaps this thread's mode with `mode`; a failure would show in what is asked.
    unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) };
    let answer = ask();
    // SAFETY: as above, back to what it was.
    unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) };
    answer
}
