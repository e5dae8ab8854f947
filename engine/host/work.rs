//! Counts what models compute for a run, for the numbers that progress shows: tokens, floating-point operations, and the
//! share of what this machine can do, which is the rate of one large matrix product of the engine, measured once.

use crate::error::Result;
use crate::kernels::buffer::Buffer;
use crate::kernels::cpu::gemm::{self, Weight};
use crate::kernels::cpu::panels;
use crate::kernels::cpu::tile::TileElement;
use crate::kernels::cuda::device::Device;
use crate::kernels::cuda::memory::DeviceBuffer;
use crate::kernels::cuda::product;
use crate::kernels::element::{Dtype, Float};
use crate::model::Model;
use crate::model::flops::{FORMULA, generation_flops, packed_flops};
use crate::tensor::Place;
use crate::tensor::autograd::is_recording;
use half::bf16;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

/// How the numbers come about, as `--explain` prints it.
pub fn explanation() -> String {
    format!(
        "tokens/s: tokens that went through a model's forward pass in the step, over the step's seconds.
% of peak: FLOPs of the step over its seconds, as a share of the rate of a [512, 1024] x [1024, 1024] matrix product of this
  engine on this machine in the model's element type, of 4096^3 where the model is on a GPU. Recomputed layers count once; a forward pass alone is a third,
  and a step that trains an adapter two thirds.
{FORMULA}
memory: bytes of live tensors, of the process's resident memory; and those of live tensors on GPUs.
left: seconds so far, times the share to do over the share done."
    )
}

/// The work of one Lua state since it began.
#[derive(Default)]
pub struct Work {
    tokens: AtomicU64,
    operations: AtomicU64,
    /// Whether the model that worked last computes in bf16.
    is_bf16: AtomicBool,
    /// Where it lies.
    place: Mutex<Place>,
    /// Operations a second of a large matrix product, in f32 and in bf16, on the CPU and then on a GPU.
    ceilings: [OnceLock<f64>; 4],
}

impl Work {
    /// Tokens that went through models, and floating-point operations.
    pub fn so_far(&self) -> (u64, u64) {
        (self.tokens.load(Relaxed), self.operations.load(Relaxed))
    }

    /// A forward pass of `model` over packed documents, with the backward pass it will have if it is recorded.
    ///
    /// Layers that are computed again are not counted again: this is the work asked for, as the share of peak is usually
    /// quoted (PaLM, arXiv 2204.02311, appendix B).
    ///
    /// - `head_rows`: tokens that the head sees
    pub fn forward(&self, model: &Model, cu_seqlens: &[u32], head_rows: usize, trains: bool) {
        let tokens = u64::from(cu_seqlens.last().copied().unwrap_or(0));
        let documents = cu_seqlens.windows(2).map(|border| (border[1] - border[0]) as usize);
        let once = packed_flops(model.config(), documents, head_rows);
        // A frozen weight has no product for its gradient.
        let passes = match (trains && is_recording(), model.adapter().is_some()) {
            (false, _) => 1,
            (true, true) => 2,
            (true, false) => 3,
        };
        self.remember(model);
        self.tokens.fetch_add(tokens, Relaxed);
        self.operations.fetch_add(passes * once as u64, Relaxed);
    }

    /// Texts of these lengths that `model` generated behind a prompt of `prompt` tokens, which it read once for all of them.
    pub fn generation(&self, model: &Model, prompt: usize, outputs: &[usize]) {
        let once = generation_flops(model.config(), prompt, outputs.iter().copied());
        self.remember(model);
        self.tokens.fetch_add((prompt + outputs.iter().sum::<usize>()) as u64, Relaxed);
        self.operations.fetch_add(once as u64, Relaxed);
    }

    fn remember(&self, model: &Model) {
        self.is_bf16.store(model.dtype() == Dtype::Bf16, Relaxed);
        *self.place.lock().expect("no panic happens under this lock") = model.place().clone();
    }

    /// `operations_per_second` as a share of the matrix rate, in the element type and at the place of the model that worked last. The rate is
    /// measured once, when the script has done as much work as that takes, about a tenth of a second; before, there is none.
    pub fn share_of_peak(&self, operations_per_second: f64) -> Option<f64> {
        if self.operations.load(Relaxed) < MEASURED_OPERATIONS {
            return None;
        }
        let is_bf16 = self.is_bf16.load(Relaxed);
        let place = self.place.lock().expect("no panic happens under this lock").clone();
        let ceiling = self.ceilings[usize::from(is_bf16) + 2 * usize::from(place.device().is_some())].get_or_init(|| {
            match (place.device(), is_bf16) {
                (None, true) => matrix_rate::<bf16>(),
                (None, false) => matrix_rate::<f32>(),
                // A device that cannot even multiply makes every share 0; the step's own error says more.
                (Some(device), true) => matrix_rate_on::<bf16>(device).unwrap_or(f64::INFINITY),
                (Some(device), false) => matrix_rate_on::<f32>(device).unwrap_or(f64::INFINITY),
            }
        });
        Some(operations_per_second / ceiling)
    }
}

/// The products by which the rate is measured, and what they take.
const ROWS: usize = 512;
const SIDE: usize = 1024;
const PRODUCTS: u64 = 24;
const PRODUCT_OPERATIONS: u64 = (2 * ROWS * SIDE * SIDE) as u64;
const MEASURED_OPERATIONS: u64 = PRODUCTS * PRODUCT_OPERATIONS;

/// Rows, columns and depth of the product on a GPU, and how many are timed.
const SIDE_ON_DEVICE: usize = 4096;
const PRODUCTS_ON_DEVICE: usize = 4;

/// Operations a second of the best of some products of 4096^3, by the device's clock. Errors: those of the device.
fn matrix_rate_on<E: Float>(device: &Arc<Device>) -> Result<f64> {
    let buffer = || DeviceBuffer::<E>::zeroed(device, "the matrices of a ceiling", SIDE_ON_DEVICE * SIDE_ON_DEVICE);
    let (x, weight, mut y) = (buffer()?, buffer()?, buffer()?);
    let mut best = f64::INFINITY;
    for _ in 0..PRODUCTS_ON_DEVICE {
        let weight = product::Weight { values: weight.view(), outputs: SIDE_ON_DEVICE, inputs: SIDE_ON_DEVICE };
        let multiply = || product::forward(device, y.view_mut(), x.view(), weight, None, product::Residual::None, None);
        best = best.min(f64::from(device.time_ms(multiply)?) / 1e3);
    }
    Ok(2.0 * (SIDE_ON_DEVICE as f64).powi(3) / best)
}

/// Operations a second of the best of some products, after the first few have woken the threads, of `[512, 1024]` and `[1024, 1024]`, on all threads.
fn matrix_rate<E: TileElement>() -> f64 {
    let half = E::from_f32(0.5);
    let mut weight = Buffer::<E>::scratch(panels::len::<E>(SIDE, SIDE));
    let (mut x, mut y) = (Buffer::<E>::scratch(ROWS * SIDE), Buffer::<E>::scratch(ROWS * SIDE));
    weight.fill(half);
    x.fill(half);
    let mut best = f64::INFINITY;
    for _ in 0..PRODUCTS {
        let started = Instant::now();
        gemm::forward(&mut y, &x, None, Weight { panels: &weight, outputs: SIDE, inputs: SIDE }, None, None);
        best = best.min(started.elapsed().as_secs_f64());
    }
    PRODUCT_OPERATIONS as f64 / best
}
