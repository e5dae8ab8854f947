//! Launchers of logprobs.cu: log-probabilities of labels, entropies and their gradients, on a chunk of rows of logits.
//! Cutting the hidden states into chunks, and the products with the head before and after, are the caller's, as on the CPU.

use super::device::Device;
use super::launch::Launch;
use super::memory::{DeviceBuffer, View, ViewMut};
use super::program::{Program, Variant};
use crate::error::Result;
use crate::kernels::element::Float;
use std::sync::Arc;

/// Logits of a slice of a row, which a block has, and threads of that (`SLICE`, `THREADS` of logprobs.cu): the same for every vocabulary
/// and every number of rows, so that the order of sums depends on the vocabulary's size alone.
const SLICE: usize = 8192;
const SLICE_THREADS: usize = 256;
/// Words of 8 bytes that are known of a slice.
const PART: usize = 3;

/// Most rows of one launch.
const ROWS_MAX: usize = 65_535;

/// Threads of a row of the gradient.
const THREADS: usize = 512;

/// Per row: the logarithm of the sum of exponentials, the log-probability of the label, and the entropy if asked.
///
/// - `logits`: `[rows, vocab]`, f32; `labels`: `[rows]`, below `vocab` (else the device is lost); negative rows give 0
/// - `logsumexp`, `logprobs`: `[rows]`, natural logarithm; `entropy`: `[rows]`, in nats
pub fn logprobs(
    device: &Arc<Device>,
    logits: View<f32>,
    labels: View<i32>,
    mut logsumexp: ViewMut<f32>,
    mut logprobs: ViewMut<f32>,
    mut entropy: Option<ViewMut<f32>>,
) -> Result<()> {
    let (rows, vocab) = sizes(logits.len(), labels.len());
    assert!(logsumexp.len() == rows && logprobs.len() == rows, "logprobs: {} results for {rows} rows", logprobs.len());
    assert!(entropy.as_ref().is_none_or(|entropy| entropy.len() == rows), "logprobs: the entropies are not {rows}");
    if rows == 0 {
        return Ok(());
    }
    let slices = vocab.div_ceil(SLICE);
    let mut parts = DeviceBuffer::<f64>::scratch(device, "scratch", rows * slices * PART)?;
    let new = |name| Launch::new(device, "logprobs", Variant::of::<f32>(Program::Logprobs), name);
    // A grid has at most 65,535 rows.
    for first in (0..rows).step_by(ROWS_MAX) {
        let count = (rows - first).min(ROWS_MAX);
        let mut own = parts.part_mut(first * slices * PART..(first + count) * slices * PART);
        let launch = new("logprobs_parts")?.read(logits.part(first * vocab..(first + count) * vocab)).int(vocab);
        let launch = launch.read(labels.part(first..first + count)).write(&mut own);
        // SAFETY: the arguments are logprobs_parts's. A block reads its slice of its row, and writes what is known of it.
        unsafe { launch.run((slices, count, 1), SLICE_THREADS, 0)? };
    }
    let launch = new("logprobs")?.read(logits).int(vocab).read(labels).read(parts.view()).int(slices);
    let launch = launch.write(&mut logsumexp).write(&mut logprobs).write_or_null(entropy.as_mut());
    // SAFETY: the arguments are logprobs's. A block stays in its row, whose label the kernel before has looked at, and reads the slices of
    // a row that has a label, all written by that kernel.
    unsafe { launch.run((rows, 1, 1), 32, 0) }
}

/// Gradient of the entropies, for [`gradient`].
#[derive(Clone, Copy)]
pub struct EntropyGradient<'a> {
    /// `[rows]`, as [`logprobs`] gave them.
    pub entropy: View<'a, f32>,
    /// `[rows]`: the derivative of the loss in each row's entropy.
    pub coefficients: View<'a, f32>,
}

/// Where the gradient of the logits goes.
pub enum Place<'a, E: Float> {
    /// Over the logits.
    InPlace(ViewMut<'a, f32>),
    /// `[rows, vocab]` each: takes the gradient, rounded once, and leaves the logits as they are.
    Rounded { logits: View<'a, f32>, gradient: ViewMut<'a, E> },
}

/// The loss's gradient in the logits: `coefficient * (softmax - onehot(label))`, the coefficient being the derivative of the
/// loss in *minus* the row's log-probability; plus, if given, `entropy_coefficient * -p * (ln p + entropy)`.
///
/// - `labels`, `logsumexp`, `coefficients`: `[rows]`
pub fn gradient<'d, E: Float>(
    device: &'d Device,
    place: Place<E>,
    labels: View<i32>,
    logsumexp: View<f32>,
    coefficients: View<f32>,
    entropy: Option<EntropyGradient>,
) -> Result<()> {
    let rows = labels.len();
    assert!(logsumexp.len() == rows && coefficients.len() == rows, "logprobs: {} coefficients for {rows} rows", coefficients.len());
    if let Some(entropy) = entropy {
        assert!(entropy.entropy.len() == rows && entropy.coefficients.len() == rows, "logprobs: the entropies are not {rows}");
    }
    if rows == 0 {
        return Ok(());
    }
    let op = "logprobs_backward";
    let finish = |launch: Launch<'d>, vocab: usize| -> Launch<'d> {
        let launch = launch.int(vocab).read(labels).read(logsumexp).read(coefficients);
        launch.read_or_null(entropy.map(|e| e.entropy)).read_or_null(entropy.map(|e| e.coefficients))
    };
    match place {
        Place::InPlace(mut logits) => {
            let (_, vocab) = sizes(logits.len(), rows);
            let launch = Launch::new(device, op, Variant::of::<f32>(Program::Logprobs), "logprobs_gradient")?;
            let launch = finish(launch.read(logits.view()), vocab).write(&mut logits);
            // SAFETY: the arguments are logprobs_gradient's with an f32 `out`; a thread reads an element before it writes it.
            unsafe { launch.run((rows, 1, 1), THREADS, 0) }
        }
        Place::Rounded { logits, mut gradient } => {
            let (_, vocab) = sizes(logits.len(), rows);
            assert!(gradient.len() == logits.len(), "logprobs: {} gradients for {} logits", gradient.len(), logits.len());
            let launch = Launch::new(device, op, Variant::of::<E>(Program::Logprobs), "logprobs_gradient")?;
            let launch = finish(launch.read(logits), vocab).write(&mut gradient);
            // SAFETY: the arguments are logprobs_gradient's. A block stays in its row.
            unsafe { launch.run((rows, 1, 1), THREADS, 0) }
        }
    }
}

/// Rows and vocabulary.
fn sizes(logits: usize, rows: usize) -> (usize, usize) {
    let vocab = logits.checked_div(rows).unwrap_or(0);
    assert!(logits == rows * vocab && (rows == 0 || vocab > 0), "logprobs: {logits} logits for {rows} rows");
    (rows, vocab)
}
