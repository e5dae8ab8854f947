//! Buffers on a device and the loops over them. The only home of `unsafe`. Knows slices, not tensors.

mod arena;
pub mod available_memory;
pub mod buffer;
pub mod cpu;
pub mod cuda;
pub mod cuda_probe;
pub mod element;
pub mod random;
