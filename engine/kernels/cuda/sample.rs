//! Launchers of sample.cu: the next token of rows of logits, as `infer/sampler.rs` chooses it where no rule filters or changes
//! them: the most likely one, or a draw by weight. The choice has the host's bits, so it does not matter where it was made.

use super::device::Device;
use super::launch::Launch;
use super::memory::{DeviceBuffer, View, ViewMut};
use super::program::{Program, Variant};
use crate::error::Result;
use crate::kernels::cpu::likelihood::BLOCK;
use bytemuck::{Pod, Zeroable};
use std::sync::Arc;

/// How one token is chosen; `Draw` of sample.cu.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Draw {
    /// The random number, in [0, 1).
    pub uniform: f64,
    /// 0 takes the most likely token.
    pub temperature: f32,
    /// The row of logits; several may choose from one.
    pub row: i32,
}

/// Chooses a token for each draw.
///
/// - `logits`: `[rows, stride]`, f32, of which the first `vocab` of a row may be chosen
/// - `tokens`: `[draws]`; -1 where a logit is NaN or infinite, or all are minus infinity
pub fn sample(
    device: &Arc<Device>,
    logits: View<f32>,
    (stride, vocab): (usize, usize),
    draws: &[Draw],
    mut tokens: ViewMut<i32>,
) -> Result<()> {
    let (op, count) = ("sample", draws.len());
    assert!(tokens.len() == count, "sample: {} tokens for {count} draws", tokens.len());
    assert!(0 < vocab && vocab <= stride && logits.len().is_multiple_of(stride), "sample: {} logits, {vocab} of {stride}", logits.len());
    // The kernel finds first places as whole numbers in f32.
    assert!(vocab < 1 << 24, "sample: a vocabulary of {vocab}");
    let fits = |draw: &Draw| (0.0..1.0).contains(&draw.uniform) && draw.temperature >= 0.0 && (draw.row as usize) < logits.len() / stride;
    assert!(draws.iter().all(fits), "sample: {draws:?}");
    if count == 0 {
        return Ok(());
    }
    let blocks = vocab.div_ceil(BLOCK);
    let draws = DeviceBuffer::copy_of(device, op, draws)?;
    let mut maxima = DeviceBuffer::<f32>::scratch(device, op, count * blocks)?;
    let mut sums = DeviceBuffer::<f64>::scratch(device, op, count * blocks)?;
    let new = |name| Launch::new(device, op, Variant::of::<f32>(Program::Sample), name);
    let launch = new("survey")?.read(logits).int(stride).int(vocab).read(draws.view()).write(&mut maxima.view_mut());
    // SAFETY: the arguments are survey's. A block reads its part of a row that there is and writes its maximum.
    unsafe { launch.run((blocks, count, 1), 256, 0)? };
    let launch = new("weigh")?.read(logits).int(stride).int(vocab).read(draws.view()).read(maxima.view());
    let launch = launch.write(&mut sums.view_mut());
    // SAFETY: the arguments are weigh's. As above, and it reads the maxima of its row.
    unsafe { launch.run((blocks, count, 1), 32, 0)? };
    let launch = new("choose")?.read(logits).int(stride).int(vocab).read(draws.view()).read(maxima.view()).read(sums.view());
    let launch = launch.int(blocks).write(&mut tokens);
    // SAFETY: the arguments are choose's. A block stays in its row and writes the token of its draw; it reads no sums of a greedy
    // draw, which has none.
    unsafe { launch.run((count, 1, 1), 256, 0) }
}
