//! A GPU that this process uses: its context, its stream, the kernels loaded on it. Memory is memory.rs's and pool.rs's.
//! All work of a device is ordered on its stream, so a buffer may be freed and taken again without waiting for anything. While
//! a thread captures a graph (graph.rs), its work goes to a stream of the capture, and while it works behind a mark (behind.rs), to
//! a second one.
//! Source: CUDA driver API, primary contexts and streams.

use super::behind::{Marks, Side, behind_on};
use super::compile::{self, Target};
use super::driver::{check, failed, is_lost, lost};
use super::graph::{capture_on, refuse_capture};
use super::memory::Staging;
use super::pool::Pool;
use super::program::Variant;
use crate::error::{Error, Result};
use crate::kernels::cuda_probe;
use cudarc::driver::sys;
use std::collections::HashMap;
use std::ffi::CString;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

/// How a device is opened.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Round sizes up to classes, so that freed memory fits again. Without it every buffer has its exact size, which lets
    /// an emulator see each access beyond the end.
    pub size_classes: bool,
    /// Bytes that the pool may take from the driver; more is out of memory.
    pub memory_bytes_max: usize,
    /// Keep machine code in the user's cache. An emulator's is none, and must not be found there by a GPU.
    pub keeps_kernels: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self { size_classes: true, memory_bytes_max: usize::MAX, keeps_kernels: true }
    }
}

/// One GPU, shared by everything that lives on it.
pub struct Device {
    pub ordinal: usize,
    pub name: String,
    /// Major and minor number: 9.0 is a Hopper.
    pub capability: (i32, i32),
    pub multiprocessors: usize,
    pub memory_bytes: usize,
    /// Shared memory that one block may ask for.
    pub shared_bytes_max: usize,
    pub(super) settings: Settings,
    driver_version: i32,
    handle: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    pub(super) pool: Mutex<Pool>,
    pub(super) staging: Mutex<Option<Staging>>,
    pub(super) side: Mutex<Option<Arc<Side>>>,
    pub(super) marks: Marks,
    modules: Mutex<HashMap<Variant, Module>>,
    kernels: Mutex<HashMap<(Variant, &'static str), Kernel>>,
    lost: OnceLock<String>,
}

// SAFETY: a context, its stream and its functions may be used from any thread once it has made the context its own, which
// `enter` does before every call; what the driver does not order itself is behind a mutex.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

struct Module(sys::CUmodule);

/// A function on the device.
#[derive(Clone, Copy)]
pub(super) struct Kernel(pub(super) sys::CUfunction);

// SAFETY: handles are numbers of the driver, valid in each thread that has the context (see `Device`).
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Send for Module {}

impl Device {
    /// The oldest compute capability that the kernels run on: Ampere, 2020.
    pub const CAPABILITY_LEAST: (i32, i32) = (8, 0);

    /// The GPU with this number, counted as the driver counts.
    ///
    /// Errors: [`Error::Device`] if there is no driver, no such device, or one below compute capability 8.0.
    pub fn open(ordinal: usize) -> Result<Arc<Self>> {
        Self::open_with(ordinal, Settings::default())
    }

    /// [`Device::open`] with settings.
    pub fn open_with(ordinal: usize, settings: Settings) -> Result<Arc<Self>> {
        let op = "cuda";
        let driver =
            cuda_probe::probe().map_err(|absence| Error::Device { op, what: format!("{}; {}", absence.reason(), absence.remedy()) })?;
        let Some(gpu) = driver.gpus.get(ordinal) else {
            let have = driver.gpus.len();
            return Err(Error::Device { op, what: format!("there is no cuda:{ordinal}; this machine has cuda:0 to cuda:{}", have - 1) });
        };
        if gpu.compute_capability < Self::CAPABILITY_LEAST {
            let (major, minor) = gpu.compute_capability;
            let what = format!("{} has compute capability {major}.{minor}; 8.0 (Ampere, 2020) is the least; use the CPU", gpu.name);
            return Err(Error::Device { op, what });
        }
        let (mut handle, mut context, mut stream) = (0, std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the probe has loaded and initialised the driver; each call writes one handle to its own place, and the
        // context is retained before anything is made in it. It is released when the device is dropped.
        unsafe {
            check(op, "cuDeviceGet", sys::cuDeviceGet(&mut handle, ordinal as i32))?;
            check(op, "cuDevicePrimaryCtxRetain", sys::cuDevicePrimaryCtxRetain(&mut context, handle))?;
            check(op, "cuCtxSetCurrent", sys::cuCtxSetCurrent(context))?;
            check(op, "cuStreamCreate", sys::cuStreamCreate(&mut stream, sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32))?;
        }
        let attribute = |which| {
            let mut value = 0;
            // SAFETY: writes one int to an exclusive place; `handle` came from cuDeviceGet.
            check(op, "cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&mut value, which, handle) }).map(|()| value as usize)
        };
        use sys::CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN as SHARED, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as MULTIPROCESSORS,
        };
        Ok(Arc::new(Self {
            ordinal,
            name: gpu.name.clone(),
            capability: gpu.compute_capability,
            multiprocessors: attribute(MULTIPROCESSORS)?,
            memory_bytes: gpu.memory_bytes,
            shared_bytes_max: attribute(SHARED)?,
            settings,
            driver_version: driver.cuda.0 * 1000 + driver.cuda.1 * 10,
            handle,
            context,
            stream,
            pool: Mutex::new(Pool::default()),
            staging: Mutex::new(None),
            side: Mutex::new(None),
            marks: Marks::default(),
            modules: Mutex::new(HashMap::new()),
            kernels: Mutex::new(HashMap::new()),
            lost: OnceLock::new(),
        }))
    }

    /// Makes the context the thread's own. Every call on the device begins with it.
    ///
    /// Errors: [`Error::Device`] if the device was lost before, with the first reason.
    pub(super) fn enter(&self, op: &'static str) -> Result<()> {
        if let Some(reason) = self.lost.get() {
            return Err(Error::Device { op, what: reason.clone() });
        }
        // SAFETY: the context is retained while `self` lives.
        self.check(op, "cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context) })
    }

    /// The stream that this thread's work goes to: the device's own, the one on which the thread captures a graph, or the second one.
    pub(super) fn stream(&self) -> sys::CUstream {
        let other = capture_on(self).map(|capture| capture.stream).or_else(|| behind_on(self).map(|side| side.stream));
        other.unwrap_or(self.stream)
    }

    /// The device's own stream.
    pub(super) fn own_stream(&self) -> sys::CUstream {
        self.stream
    }

    /// As [`check`], and remembers a lost device.
    pub(super) fn check(&self, op: &'static str, call: &'static str, code: sys::CUresult) -> Result<()> {
        if code == sys::CUresult::CUDA_SUCCESS {
            return Ok(());
        }
        if !is_lost(code) {
            return Err(failed(op, call, code));
        }
        // The first reason is the true one.
        let what = self.lost.get_or_init(|| lost(&format!("cuda:{} ({})", self.ordinal, self.name), call, code));
        Err(Error::Device { op, what: what.clone() })
    }

    /// Waits until everything that this thread's stream was asked for is done. An error of an earlier kernel shows here.
    pub fn synchronize(&self) -> Result<()> {
        let op = "synchronize";
        self.enter(op)?;
        refuse_capture(self, op, "waiting for the device")?;
        // SAFETY: the stream lives as long as `self`.
        self.check(op, "cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.stream()) })
    }

    /// Milliseconds that the device spends on what `work` asks for, by its own clock.
    pub fn time_ms(&self, work: impl FnOnce() -> Result<()>) -> Result<f32> {
        let op = "time_ms";
        self.enter(op)?;
        refuse_capture(self, op, "measuring time")?;
        let (mut start, mut end) = (std::ptr::null_mut(), std::ptr::null_mut());
        let mut elapsed = 0.0;
        // SAFETY: each call writes one handle to its own place; both events are recorded on a living stream, waited for
        // before they are read, and destroyed once.
        unsafe {
            self.check(op, "cuEventCreate", sys::cuEventCreate(&mut start, 0))?;
            self.check(op, "cuEventCreate", sys::cuEventCreate(&mut end, 0))?;
            self.check(op, "cuEventRecord", sys::cuEventRecord(start, self.stream))?;
            work()?;
            self.check(op, "cuEventRecord", sys::cuEventRecord(end, self.stream))?;
            self.check(op, "cuEventSynchronize", sys::cuEventSynchronize(end))?;
            self.check(op, "cuEventElapsedTime", sys::cuEventElapsedTime_v2(&mut elapsed, start, end))?;
            self.check(op, "cuEventDestroy", sys::cuEventDestroy_v2(start))?;
            self.check(op, "cuEventDestroy", sys::cuEventDestroy_v2(end))?;
        }
        Ok(elapsed)
    }

    /// Whether a kernel may begin before the one in front of it has ended: on Hopper and later, with a driver that captures that.
    pub(super) fn overlaps_kernels(&self) -> bool {
        self.capability >= (9, 0) && self.driver_version >= 12_030
    }

    /// For what kernels are compiled.
    pub fn target(&self) -> Target {
        Target { capability: self.capability, driver_version: self.driver_version }
    }

    /// The function `name` of a program, compiled and loaded at its first use.
    ///
    /// Errors: [`Error::Device`] if NVRTC is missing or the program does not compile.
    pub(super) fn kernel(&self, op: &'static str, variant: Variant, name: &'static str) -> Result<Kernel> {
        if let Some(kernel) = lock(&self.kernels).get(&(variant.clone(), name)) {
            return Ok(*kernel);
        }
        refuse_capture(self, op, "the first use of a kernel")?;
        // Compiled without holding the lock, so that two programs may compile side by side; the first of two equal ones stays.
        let is_loaded = lock(&self.modules).contains_key(&variant);
        if !is_loaded {
            let module = self.load(op, &variant)?;
            lock(&self.modules).entry(variant.clone()).or_insert(module);
        }
        let modules = lock(&self.modules);
        let module = &modules[&variant];
        let c_name = CString::new(name).expect("names of kernels have no zero byte");
        let mut function = std::ptr::null_mut();
        // SAFETY: the module is loaded and kept; the name is a C string that outlives the call.
        self.check(op, "cuModuleGetFunction", unsafe { sys::cuModuleGetFunction(&mut function, module.0, c_name.as_ptr()) })?;
        // Blocks may ask for all the shared memory there is; the launch says how much.
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let mut fixed = 0;
        let fixed_attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
        // SAFETY: the function was found in the line above; one int is written.
        self.check(op, "cuFuncGetAttribute", unsafe { sys::cuFuncGetAttribute(&mut fixed, fixed_attribute, function) })?;
        let most = self.shared_bytes_max as i32 - fixed;
        // SAFETY: as above.
        self.check(op, "cuFuncSetAttribute", unsafe { sys::cuFuncSetAttribute(function, attribute, most) })?;
        lock(&self.kernels).insert((variant, name), Kernel(function));
        Ok(Kernel(function))
    }

    fn load(&self, op: &'static str, variant: &Variant) -> Result<Module> {
        let compile = if self.settings.keeps_kernels { compile::compile } else { compile::compile_anew };
        let compiled = compile(op, variant, self.target())?;
        let mut module = std::ptr::null_mut();
        // SAFETY: the image is what NVRTC made for this device's architecture, and the driver copies it.
        let code = unsafe { sys::cuModuleLoadData(&mut module, compiled.image.as_ptr().cast()) };
        self.check(op, "cuModuleLoadData", code)?;
        Ok(Module(module))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.enter("close").is_err() {
            return;
        }
        // Buffers hold the device, so none is left; what remains is the pool's, the modules and the stream.
        // SAFETY: everything was made by this context, and nothing uses it any more.
        unsafe {
            sys::cuStreamSynchronize(self.stream);
            lock(&self.side).take();
            lock(&self.staging).take();
            lock(&self.pool).close();
            for module in lock(&self.modules).values() {
                sys::cuModuleUnload(module.0);
            }
            sys::cuStreamDestroy_v2(self.stream);
            sys::cuDevicePrimaryCtxRelease_v2(self.handle);
        }
    }
}

/// A panic of another thread leaves these maps whole, so its mark on the mutex is passed over.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
