//! One launch of a kernel: its arguments in the order of its signature, then its grid. Sizes are the launchers' to check.

use super::device::{Device, Kernel};
use super::graph::overlaps;
use super::memory::{View, ViewMut};
use super::program::Variant;
use super::tensor_map::TensorMap;
use crate::error::Result;
use bytemuck::Pod;
use cudarc::driver::sys;

/// Most arguments of a kernel.
const ARGUMENTS_MAX: usize = 40;

/// A kernel and the arguments so far.
pub(super) struct Launch<'a> {
    device: &'a Device,
    op: &'static str,
    kernel: Kernel,
    /// The driver reads as many bytes of each as the kernel's parameter has; machines with GPUs are little-endian.
    values: [u64; ARGUMENTS_MAX],
    count: usize,
    /// Arguments larger than that: where they are among all.
    maps: Vec<(usize, sys::CUtensorMap)>,
    begins: Begins,
}

/// When a kernel may begin. Those that may before the one in front has ended call `wait_for_earlier` of prelude.cuh in each thread.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Begins {
    /// When the kernel in front has ended.
    Afterwards,
    /// Before that, as it waits before it touches anything.
    Waiting,
    /// Before that where a graph allows it ([`overlaps`]), as it asks for weights, or what a step was given, before it waits.
    Fetching,
}

impl<'a> Launch<'a> {
    /// Of kernel `name` of a program. Errors as [`Device::kernel`].
    pub fn new(device: &'a Device, op: &'static str, variant: Variant, name: &'static str) -> Result<Self> {
        device.enter(op)?;
        Ok(Self {
            device,
            op,
            kernel: device.kernel(op, variant, name)?,
            values: [0; ARGUMENTS_MAX],
            count: 0,
            maps: Vec::new(),
            begins: Begins::Afterwards,
        })
    }

    /// Lets the kernel begin before the one in front of it has ended: the first that each of its threads does is `wait_for_earlier`.
    pub fn waiting(self) -> Self {
        Self { begins: Begins::Waiting, ..self }
    }

    /// The same in a graph that allows it of a kernel that fetches what the graph does not write before it waits.
    pub fn fetching(self) -> Self {
        Self { begins: Begins::Fetching, ..self }
    }

    fn push(mut self, value: u64) -> Self {
        assert!(self.count < ARGUMENTS_MAX, "{}: more than {ARGUMENTS_MAX} arguments", self.op);
        self.values[self.count] = value;
        self.count += 1;
        self
    }

    fn push_address(self, address: u64, ordinal: usize) -> Self {
        assert!(ordinal == self.device.ordinal, "{}: a buffer of cuda:{ordinal} on cuda:{}", self.op, self.device.ordinal);
        self.push(address)
    }

    /// A pointer to read from.
    pub fn read<E: Pod>(self, view: View<E>) -> Self {
        self.push_address(view.address, view.ordinal)
    }

    /// A pointer to read from, or null.
    pub fn read_or_null<E: Pod>(self, view: Option<View<E>>) -> Self {
        match view {
            Some(view) => self.read(view),
            None => self.push(0),
        }
    }

    /// A pointer to write to.
    pub fn write<E: Pod>(self, view: &mut ViewMut<E>) -> Self {
        self.push_address(view.address, view.ordinal)
    }

    /// A pointer to write to, or null.
    pub fn write_or_null<E: Pod>(self, view: Option<&mut ViewMut<E>>) -> Self {
        match view {
            Some(view) => self.write(view),
            None => self.push(0),
        }
    }

    /// Matrices to read tiles of.
    pub fn map(mut self, map: &TensorMap) -> Self {
        self.maps.push((self.count, map.map));
        self.push_address(0, map.ordinal)
    }

    /// A 32-bit integer.
    pub fn int(self, value: usize) -> Self {
        let value = i32::try_from(value).unwrap_or_else(|_| panic!("{}: {value} does not fit a 32-bit argument", self.op));
        self.push(value as u32 as u64)
    }

    /// A 32-bit integer that may be negative.
    pub fn signed(self, value: isize) -> Self {
        let value = i32::try_from(value).unwrap_or_else(|_| panic!("{}: {value} does not fit a 32-bit argument", self.op));
        self.push(u64::from(value.cast_unsigned()))
    }

    /// A 64-bit integer.
    pub fn long(self, value: usize) -> Self {
        self.push(value as u64)
    }

    /// An f32.
    pub fn float(self, value: f32) -> Self {
        self.push(u64::from(value.to_bits()))
    }

    /// An f64.
    pub fn double(self, value: f64) -> Self {
        self.push(value.to_bits())
    }

    /// Queues the kernel.
    ///
    /// # Safety
    /// The arguments must match the kernel's signature in order and type, and the kernel must stay within what they point
    /// to for this grid. Nothing else may write that memory outside the device's stream meanwhile; the borrows of the
    /// views and the stream's order see to that.
    pub unsafe fn run(mut self, grid: (usize, usize, usize), threads: usize, shared_bytes: usize) -> Result<()> {
        let part = |value: usize, what: &str| {
            u32::try_from(value).unwrap_or_else(|_| panic!("{}: a grid of {value} {what} is too large", self.op))
        };
        let (x, y, z) = (part(grid.0, "columns"), part(grid.1, "rows"), part(grid.2, "layers"));
        assert!(y <= 65_535 && z <= 65_535, "{}: a grid of {x} x {y} x {z} blocks is too large", self.op);
        assert!(x > 0 && y > 0 && z > 0 && threads.is_multiple_of(32) && (32..=1024).contains(&threads), "{}: {threads} threads", self.op);
        let mut pointers = [std::ptr::null_mut(); ARGUMENTS_MAX];
        for (pointer, value) in pointers.iter_mut().zip(&mut self.values[..self.count]) {
            *pointer = std::ptr::from_mut(value).cast();
        }
        for (place, map) in &mut self.maps {
            pointers[*place] = std::ptr::from_mut(map).cast();
        }
        let begins_early = match self.begins {
            Begins::Afterwards => false,
            Begins::Waiting => self.device.overlaps_kernels(),
            Begins::Fetching => overlaps(self.device),
        };
        if begins_early {
            let id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            let value = sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 };
            let mut attribute = sys::CUlaunchAttribute { id, pad: [0; 4], value };
            let config = sys::CUlaunchConfig {
                gridDimX: x,
                gridDimY: y,
                gridDimZ: z,
                blockDimX: threads as u32,
                blockDimY: 1,
                blockDimZ: 1,
                sharedMemBytes: shared_bytes as u32,
                hStream: self.device.stream(),
                attrs: &mut attribute,
                numAttrs: 1,
            };
            // SAFETY: as below; the attribute and the configuration live as long as the call.
            let code = unsafe { sys::cuLaunchKernelEx(&config, self.kernel.0, pointers.as_mut_ptr(), std::ptr::null_mut()) };
            return self.device.check(self.op, "cuLaunchKernelEx", code);
        }
        // SAFETY: the caller's promise; the pointers lead to values that live until the driver has copied them.
        let code = unsafe {
            sys::cuLaunchKernel(
                self.kernel.0,
                x,
                y,
                z,
                threads as u32,
                1,
                1,
                shared_bytes as u32,
                self.device.stream(),
                pointers.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        self.device.check(self.op, "cuLaunchKernel", code)
    }
}

/// Blocks of `threads` for `count` items, at most `blocks_max`: kernels with such a grid stride over the rest.
pub(super) fn blocks(count: usize, threads: usize, blocks_max: usize) -> usize {
    count.div_ceil(threads).clamp(1, blocks_max)
}

/// Asserts that rows of `columns` elements begin at whole 16 bytes if they are as long as whole 16 bytes: kernels then read 16
/// bytes at a time. Parts of a buffer do if they begin at a row.
pub(super) fn assert_aligned<E>(op: &str, columns: usize, addresses: &[u64]) {
    let is_wide = (columns * size_of::<E>()).is_multiple_of(16);
    assert!(!is_wide || addresses.iter().all(|address| address.is_multiple_of(16)), "{op}: an operand begins inside a row of {columns}");
}
