//! Launcher of sample.cu: the choice of the next token of each sequence on the device, by the rules of `infer/sampler.rs` in
//! the same order. The repetition penalty acts on logits in f32 (there: f64); all else is f64 as there. Logit bias and the
//! additive penalties come before these rules and are not here yet.

use super::device::Device;
use super::launch::Launch;
use super::memory::{DeviceBuffer, View, ViewMut};
use super::program::{Program, Variant};
use crate::error::Result;
use bytemuck::{Pod, Zeroable};
use std::sync::Arc;

/// How one sequence's token is chosen; `Rules` of sample.cu.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct Choice {
    /// 0 takes the most likely token.
    pub temperature: f64,
    /// 1 is off.
    pub top_p: f64,
    /// 0 is off.
    pub min_p: f64,
    /// The random number, in [0, 1).
    pub uniform: f64,
    /// 1 is off.
    pub repetition_penalty: f64,
    /// 0 is off.
    pub top_k: i64,
}

/// Chooses a token for each row.
///
/// - `logits`: `[rows, vocab]`, f32; the penalty changes them
/// - `choices`: one for each row
/// - `previous`: `[rows, width]`, the tokens so far, -1 where there is none; not needed if no row has a penalty
/// - `tokens`: `[rows]`; -1 where a logit is NaN or infinite, or all are ruled out
pub fn sample(
    device: &Arc<Device>,
    mut logits: ViewMut<f32>,
    choices: &[Choice],
    previous: Option<View<i32>>,
    mut tokens: ViewMut<i32>,
) -> Result<()> {
    let rows = choices.len();
    assert!(tokens.len() == rows, "sample: {} tokens for {rows} choices", tokens.len());
    assert!(choices.iter().all(|choice| (0.0..1.0).contains(&choice.uniform) && choice.top_k >= 0), "sample: {choices:?}");
    if rows == 0 {
        return Ok(());
    }
    let vocab = logits.len() / rows;
    assert!(logits.len() == rows * vocab && vocab > 0, "sample: {} logits for {rows} rows", logits.len());
    let op = "sample";
    let rules = DeviceBuffer::copy_of(device, op, choices)?;
    if choices.iter().any(|choice| choice.repetition_penalty != 1.0) {
        let previous = previous.expect("a penalty wants the tokens so far");
        assert!(previous.len().is_multiple_of(rows), "sample: {} previous tokens for {rows} rows", previous.len());
        let launch = Launch::new(device, op, Variant::of::<f32>(Program::Sample), "penalise")?;
        let launch = launch.write(&mut logits).int(vocab).read(previous).int(previous.len() / rows).read(rules.view());
        // SAFETY: the arguments are penalise's. A block stays in its row, and ids outside the vocabulary are passed over.
        unsafe { launch.run((rows, 1, 1), 256, 0)? };
    }
    let mut weights = DeviceBuffer::<f64>::scratch(device, op, rows * vocab)?;
    let launch = Launch::new(device, op, Variant::of::<f32>(Program::Sample), "sample")?;
    let launch = launch.read(logits.view()).int(vocab).read(rules.view()).write(&mut weights.view_mut()).write(&mut tokens);
    // SAFETY: the arguments are sample's; `Choice` has the layout of its Rules. A block stays in its row.
    unsafe { launch.run((rows, 1, 1), 512, 0) }
}
