//! The ceilings of a machine: how fast it multiplies, copies and reads.

use super::bench::{Case, Times, clocked, timed};
use crate::error::Result;
use crate::kernels::buffer::Buffer;
use crate::kernels::cpu::gemm::{self, Weight};
use crate::kernels::cpu::panels;
use crate::kernels::cpu::threads::threads;
use crate::kernels::cpu::tile::TileElement;
use crate::kernels::cuda::device::Device;
use crate::kernels::cuda::memory::DeviceBuffer;
use crate::kernels::cuda::product;
use crate::kernels::element::{Dtype, Element, Float};
use crate::tensor::Place;
use half::bf16;
use serde_json::{Value, json};
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

/// Rows, columns and depth of the matrix product.
const SIZE: usize = 4096;
const COPY_BYTES: usize = 256 << 20;
const READ_BYTES: usize = 512 << 20;

/// Seconds to times and the rate of the best of them.
pub struct Ceiling {
    pub times: Times,
    /// GFLOP/s or GB/s of the best run.
    pub best: f64,
}

impl Ceiling {
    fn new(times: Times, work: f64) -> Self {
        Self { best: work / times.best() / 1e9, times }
    }
}

/// GFLOP/s of a product of 4096^3 by the engine's own kernels.
pub fn matrix_product(dtype: Dtype, seconds: f64) -> Result<Ceiling> {
    match dtype {
        Dtype::Bf16 => product_of::<bf16>(seconds),
        _ => product_of::<f32>(seconds),
    }
}

fn product_of<E: TileElement>(seconds: f64) -> Result<Ceiling> {
    let x = filled::<E>(SIZE * SIZE);
    // Any numbers will do, so the panels are filled as they lie.
    let weight = filled::<E>(panels::len::<E>(SIZE, SIZE));
    let mut y = Buffer::<E>::zeroed(SIZE * SIZE);
    let times = timed(seconds, || {
        let weight = Weight { panels: &weight, outputs: SIZE, inputs: SIZE };
        Ok(clocked(|| gemm::forward(&mut y, &x, None, weight, None, None)).0)
    })?;
    Ok(Ceiling::new(times, 2.0 * (SIZE as f64).powi(3)))
}

/// As [`matrix_product`], at a place.
///
/// Errors: those of the device.
pub fn matrix_product_at(place: &Place, dtype: Dtype, seconds: f64) -> Result<Ceiling> {
    let Some(device) = place.device() else { return matrix_product(dtype, seconds) };
    match dtype {
        Dtype::Bf16 => product_on::<bf16>(device, seconds),
        _ => product_on::<f32>(device, seconds),
    }
}

fn product_on<E: Element + Float>(device: &Arc<Device>, seconds: f64) -> Result<Ceiling> {
    let label = "the matrices of a ceiling";
    let (x, w) = (filled::<E>(SIZE * SIZE), filled::<E>(SIZE * SIZE));
    let (x, w) = (DeviceBuffer::copy_of(device, label, &x)?, DeviceBuffer::copy_of(device, label, &w)?);
    let mut y = DeviceBuffer::<E>::zeroed(device, label, SIZE * SIZE)?;
    let times = timed(seconds, || {
        let weight = product::Weight { values: w.view(), outputs: SIZE, inputs: SIZE };
        let product = || product::forward(device, y.view_mut(), x.view(), weight, None, product::Residual::None, None);
        Ok(Duration::from_secs_f64(f64::from(device.time_ms(product)?) / 1e3))
    })?;
    Ok(Ceiling::new(times, 2.0 * (SIZE as f64).powi(3)))
}

/// GB/s of a copy of 256 MiB on a device: bytes read and bytes written together.
///
/// Errors: those of the device.
pub fn copy_on(device: &Arc<Device>, seconds: f64) -> Result<Ceiling> {
    let new = || DeviceBuffer::<f32>::zeroed(device, "the copy of a ceiling", COPY_BYTES / 4);
    let (from, mut to) = (new()?, new()?);
    let times = timed(seconds, || Ok(Duration::from_secs_f64(f64::from(device.time_ms(|| to.copy_from(from.view()))?) / 1e3)))?;
    Ok(Ceiling::new(times, 2.0 * COPY_BYTES as f64))
}

/// Numbers between -1 and 1: zeros or denormals would take other times.
pub fn filled<E: Element>(len: usize) -> Buffer<E> {
    let mut values = Buffer::<E>::scratch(len);
    for (index, value) in values.iter_mut().enumerate() {
        *value = E::from_f32((index * 37 % 1021) as f32 / 511.0 - 1.0);
    }
    values
}

/// GB/s of a copy of 256 MiB by all threads: bytes read and bytes written together.
pub fn copy(seconds: f64) -> Result<Ceiling> {
    let from = filled::<f32>(COPY_BYTES / 4);
    let mut to = Buffer::<f32>::zeroed(COPY_BYTES / 4);
    let part = from.len().div_ceil(threads());
    let times = timed(seconds, || {
        let (took, ()) = clocked(|| {
            std::thread::scope(|scope| {
                for (to, from) in to.chunks_mut(part).zip(from.chunks(part)) {
                    scope.spawn(|| to.copy_from_slice(from));
                }
            })
        });
        Ok(took)
    })?;
    Ok(Ceiling::new(times, 2.0 * COPY_BYTES as f64))
}

/// GB/s at which all threads read 512 MiB by a plain loop. Products that ask for lines ahead of time have read faster than it.
pub fn read(seconds: f64) -> Result<Ceiling> {
    let values = filled::<f32>(READ_BYTES / 4);
    let part = values.len().div_ceil(threads());
    let sum = |part: &[f32]| part.iter().fold(0u32, |sum, value| sum.wrapping_add(value.to_bits()));
    let times = timed(seconds, || {
        let (took, ()) = clocked(|| {
            std::thread::scope(|scope| {
                for part in values.chunks(part) {
                    scope.spawn(move || black_box(sum(part)));
                }
            })
        });
        Ok(took)
    })?;
    Ok(Ceiling::new(times, READ_BYTES as f64))
}

/// Report and text of all four. Errors: none in practice.
pub fn run(case: &Case) -> Result<(Value, String)> {
    let figures = [
        ("matmul_f32", "GFLOP/s", matrix_product(Dtype::F32, case.seconds)?),
        ("matmul_bf16", "GFLOP/s", matrix_product(Dtype::Bf16, case.seconds)?),
        ("copy", "GB/s", copy(case.seconds)?),
        ("read", "GB/s", read(case.seconds)?),
    ];
    let (mut report, mut text) = (json!({}), String::new());
    for (name, unit, ceiling) in figures {
        let median = ceiling.best * ceiling.times.best() / ceiling.times.median();
        text += &format!(
            "{name:<13}{:>8.1} {unit} best, {median:.1} median, spread {:.0}% of {} runs\n",
            ceiling.best,
            ceiling.times.spread() * 100.0,
            ceiling.times.count()
        );
        report[name] = json!({ "best": ceiling.best, "median": median, "unit": unit, "times": ceiling.times.to_json() });
    }
    Ok((report, text))
}
