//! The loss head: log-probabilities, entropy and cross entropy straight from hidden states. Logits exist for a chunk of
//! rows at a time, and few are kept; rows without a label are skipped.
//! Cross entropy is deferred: its backward pass needs the logits anyway and computes the value on the way, so that a
//! training step pays three products with the head, not four.
//! Source of the idea: Liger-Kernel's fused linear cross entropy.

use super::ModelElement;
use super::autograd::{Sink, is_recording, with_recording};
use super::cuda::logprobs as cuda;
pub use super::cuda::logprobs::loss_of;
use super::linear::{check_weight, weight_gradients};
use super::low_rank::Applied;
use super::parameter::Parameter;
use super::typed::{Data, Tensor};
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use crate::kernels::cpu::embedding::{Order, embed, spread_rows};
use crate::kernels::cpu::{cross_entropy as kernel, gemm, norm};
use std::collections::VecDeque;
use std::sync::Arc;

/// A label that is no target.
pub const IGNORE: i32 = -100;

/// Bytes that the f32 logits of one chunk may take: 576 rows of Qwen's vocabulary. Each chunk turns the head once and passes
/// once over its gradient, so that a step of `q05x4` in f32 made 109 tokens/s with 96 rows and 129 with 384; on AMX these
/// passes take longer than the products.
const CHUNK_BYTES: usize = 384 << 20;
/// The same on a device, where each chunk reads and writes the gradient of the head once more: 4352 rows of Qwen's vocabulary, whose
/// tiles are about one for each multiprocessor of a large GPU. A small device spends no more than its share on them.
const CHUNK_BYTES_ON_DEVICE: u64 = 2560 << 20;
const CHUNK_SHARE_ON_DEVICE: u64 = 16;
/// Rows of a chunk on a device are whole tiles of its product.
const TILE_ROWS_ON_DEVICE: usize = 128;

/// Bytes of logits that [`logprobs`] keeps for its backward pass, whole chunks of them: with a small vocabulary, or few rows,
/// one product with the head in four is spared.
const KEPT_BYTES: usize = 128 << 20;

/// Rows of a chunk, of `count` in all, of which `most` fit: as few chunks as that gives, of about the same size, in whole tiles.
fn even_rows(count: usize, most: usize, tile: usize) -> usize {
    count.div_ceil(count.div_ceil(most).max(1)).next_multiple_of(tile).clamp(tile, most)
}

/// Rows of a chunk, of `count` in all, in whole tiles of the product, which have 12 or 32 rows; and a multiple of 32 is where the head's
/// gradient may be cut without changing a bit.
fn chunk_rows(vocab: usize, count: usize, chunk_bytes: usize) -> usize {
    even_rows(count, (chunk_bytes / (4 * vocab.max(1)) / 96 * 96).clamp(96, 2016), 96)
}

/// Rows whose logits exist together on the host, of `count` in all.
pub fn rows_on_host(vocab: usize, count: usize) -> usize {
    chunk_rows(vocab, count, CHUNK_BYTES)
}

/// Rows whose logits exist together on a device, of `count` in all.
///
/// - `memory_bytes`: all that the device has
pub fn rows_on_device(vocab: usize, count: usize, memory_bytes: u64) -> usize {
    let chunk_bytes = CHUNK_BYTES_ON_DEVICE.min(memory_bytes / CHUNK_SHARE_ON_DEVICE) as usize;
    let tiles = chunk_bytes / (4 * vocab.max(1)) / TILE_ROWS_ON_DEVICE;
    even_rows(count, tiles.max(1) * TILE_ROWS_ON_DEVICE, TILE_ROWS_ON_DEVICE)
}

/// Log-probabilities of chosen tokens from logits that are there already: the bits of [`logprobs`] over the same rows.
///
/// - `rows`: `[rows, vocab]`, f32, as [`super::head::logits`] gives them
/// - `labels`: `[rows]`, the chosen tokens
/// - `temperatures`: `[rows]`, each above 0; a row's logits are divided by its own
/// - returns the log-probabilities, and each row's logarithm of the sum of exponentials
pub fn logprobs_of_logits(rows: &[f32], vocab: usize, labels: &[i32], temperatures: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let (mut lse, mut logprobs) = (vec![0.0; labels.len()], vec![0.0; labels.len()]);
    if temperatures.iter().all(|temperature| *temperature == 1.0) {
        kernel::logprobs(rows, vocab, labels, &mut lse, &mut logprobs, None);
    } else {
        let mut scaled = Buffer::copy_of(rows);
        for (row, temperature) in scaled.chunks_exact_mut(vocab).zip(temperatures).filter(|(_, temperature)| **temperature != 1.0) {
            norm::scale(row, temperature.recip());
        }
        kernel::logprobs(&scaled, vocab, labels, &mut lse, &mut logprobs, None);
    }
    (logprobs, lse)
}

/// The rows that have a label, their hidden states side by side, and what each contributes.
struct Targets<E: ModelElement> {
    /// Index in the whole of each row that has a label.
    rows: Vec<u32>,
    labels: Vec<i32>,
    /// `[rows, hidden]`; the whole itself when every row has a label.
    x: Source<E>,
    tokens: usize,
    hidden: usize,
}

/// The rows that have a label.
///
/// Errors: [`Error::Shape`], or [`Error::Argument`] for a label outside the vocabulary.
pub fn labelled_rows(op: &'static str, tokens: usize, labels: &[i32], vocab: usize) -> Result<Vec<u32>> {
    if labels.len() != tokens {
        return Err(Error::Shape { op, arg: "labels", expected: format!("[{tokens}]"), got: format!("[{}]", labels.len()) });
    }
    if let Some((index, label)) =
        labels.iter().enumerate().find(|(_, label)| **label != IGNORE && (**label < 0 || **label as usize >= vocab))
    {
        return Err(Error::argument(op, format!("labels[{index}]"), format!("{IGNORE}, or an id from 0 to {}", vocab - 1), label));
    }
    Ok((0..tokens as u32).filter(|row| labels[*row as usize] != IGNORE).collect())
}

/// Another scalar that a loss contains, times a coefficient. Read when the loss is: it may have to come from a device.
#[derive(Clone)]
pub(super) struct Extra {
    data: Option<Arc<Data<f32>>>,
    coefficient: f32,
}

impl Extra {
    pub fn coefficient(&self) -> f32 {
        self.coefficient
    }

    /// Errors: those of computing it.
    pub fn value(&self) -> Result<f64> {
        let Some(data) = &self.data else { return Ok(0.0) };
        Ok(f64::from(data.force()?.host()[0]) * f64::from(self.coefficient))
    }
}

enum Source<E: ModelElement> {
    Whole(Arc<Data<E>>),
    Some(Buffer<E>),
}

impl<E: ModelElement> Targets<E> {
    fn new(op: &'static str, x: &Tensor<E, 2>, labels: &[i32], vocab: usize) -> Result<Self> {
        let [tokens, hidden] = x.shape();
        let rows = labelled_rows(op, tokens, labels, vocab)?;
        let source = if rows.len() == tokens {
            Source::Whole(x.data().clone())
        } else {
            let mut some = Buffer::scratch(rows.len() * hidden);
            let ids: Vec<i32> = rows.iter().map(|row| *row as i32).collect();
            embed(x.values(), Order::Rows, tokens, hidden, &ids, &mut some);
            Source::Some(some)
        };
        Ok(Self { labels: rows.iter().map(|row| labels[*row as usize]).collect(), rows, x: source, tokens, hidden })
    }

    fn x(&self) -> &[E] {
        match &self.x {
            Source::Whole(data) => data.get(),
            Source::Some(buffer) => buffer,
        }
    }
}

/// The logits of one chunk of labelled rows, divided by the temperature; and the head's low-rank parts in them.
///
/// - `differentiates`: whether [`chunk_backward`] will follow
fn chunk_logits<E: ModelElement>(x: &[E], head: &Parameter<E>, temperature: f32, differentiates: bool) -> (Buffer<f32>, Applied<E>) {
    let rows = x.len() / head.columns();
    let mut logits = Buffer::scratch(rows * head.rows());
    let applied = with_recording(differentiates, || Applied::product(head, &mut logits[..], x, None, None, None));
    if temperature != 1.0 {
        norm::scale(&mut logits, temperature.recip());
    }
    (logits, applied)
}

/// Runs `visit` over chunks of labelled rows: their range, hidden states and labels.
fn for_chunks<E: ModelElement>(targets: &Targets<E>, vocab: usize, mut visit: impl FnMut(std::ops::Range<usize>, &[E], &[i32])) {
    let count = targets.rows.len();
    let size = rows_on_host(vocab, count);
    for start in (0..count).step_by(size) {
        let range = start..(start + size).min(count);
        visit(range.clone(), &targets.x()[range.start * targets.hidden..range.end * targets.hidden], &targets.labels[range]);
    }
}

/// One chunk's part of the backward pass: from the gradient in its logits to those of its hidden states and the head.
fn chunk_backward<E: ModelElement>(x: &[E], d_logits: &[E], head: &Parameter<E>, applied: &Applied<E>, d_rows: Option<&mut [E]>) {
    let unscaled = applied.unscaled(d_logits);
    let d_logits = unscaled.as_deref().unwrap_or(d_logits);
    let d_inner = applied.factor_gradients(d_logits, x, None);
    if let Some(d_rows) = d_rows {
        gemm::input_gradient(&mut *d_rows, d_logits, head.product_weight(&head.read()), false);
        applied.add_input_gradient(&d_inner, d_rows);
    }
    weight_gradients(d_logits, x, head, None);
}

/// Gives parent 0 the gradients of its labelled rows.
fn give_rows<E: ModelElement>(sink: &mut Sink, targets: &Targets<E>, d_rows: Buffer<E>) {
    match targets.x {
        Source::Whole(_) => sink.add(0, d_rows),
        Source::Some(_) => sink.accumulate(0, targets.tokens * targets.hidden, |dx, add| {
            // Rows without a label get zero, or stay as they are.
            spread_rows(&d_rows, &targets.rows, targets.hidden, dx, add);
        }),
    }
}

/// The sum over labelled rows of minus the log-probability of the label, divided by `normalizer`.
///
/// - `x`: `[tokens, hidden]`, after the final norm; `head`: `[vocab, hidden]` in panels
/// - `labels`: `[tokens]`, the target of each row itself (shifted already), or [`IGNORE`]
/// - `normalizer`: what the sum is divided by: the supervised tokens of the whole update
/// - `extra`: another scalar and its coefficient, added to the result (a load-balancing loss)
/// - returns a scalar in nats, deferred: see the file's head. No labelled row at all gives 0.
///
/// Errors: [`Error::Shape`], or [`Error::Argument`] for a label outside the vocabulary or a normalizer that is not above 0.
pub fn cross_entropy<E: ModelElement>(
    x: &Tensor<E, 2>,
    head: &Arc<Parameter<E>>,
    labels: &[i32],
    normalizer: f32,
    extra: Option<(&Tensor<f32, 0>, f32)>,
) -> Result<Tensor<f32, 0>> {
    check_weight("cross_entropy", x, head)?;
    if !(normalizer > 0.0 && normalizer.is_finite()) {
        return Err(Error::argument("cross_entropy", "normalizer", "a number above 0 (the supervised tokens of the update)", normalizer));
    }
    let vocab = head.rows();
    let extra_node = extra.and_then(|(extra, _)| extra.node());
    let extra =
        Extra { data: extra.map(|(extra, _)| extra.data().clone()), coefficient: extra.map_or(0.0, |(_, coefficient)| coefficient) };
    if let Some(device) = x.device() {
        return cuda::cross_entropy(device, x, head, labels, normalizer, (extra, extra_node));
    }
    let targets = Arc::new(Targets::new("cross_entropy", x, labels, vocab)?);
    let data = {
        let (targets, head, extra) = (targets.clone(), head.clone(), extra.clone());
        let seen = head.versions();
        Data::deferred(move || {
            head.check_versions(&seen, "cross_entropy")?;
            let mut sum = 0.0;
            for_chunks(&targets, vocab, |range, x, labels| {
                let (logits, _) = chunk_logits(x, &head, 1.0, false);
                sum += chunk_loss(&logits, vocab, labels, &mut Buffer::scratch(range.len()));
            });
            Ok(scalar(sum, normalizer, extra.value()?))
        })
    };
    let (value, head, seen) = (data.clone(), head.clone(), head.versions());
    let loss = Tensor::from_operation([], data, &[x.node(), extra_node], head.learns(), move |upstream, sink| {
        head.check_versions(&seen, "cross_entropy")?;
        let wants_rows = sink.wants(0);
        let mut d_rows = Buffer::<E>::scratch(if wants_rows { targets.rows.len() * targets.hidden } else { 0 });
        let coefficient = upstream[0] / normalizer;
        let mut sum = 0.0;
        for_chunks(&targets, vocab, |range, x, labels| {
            let (mut logits, applied) = chunk_logits(x, &head, 1.0, true);
            let mut lse = Buffer::scratch(range.len());
            sum += chunk_loss(&logits, vocab, labels, &mut lse);
            let mut coefficients = Buffer::scratch(range.len());
            coefficients.fill(coefficient);
            let d_logits = kernel::gradient(&mut logits, vocab, labels, &lse, &coefficients, None);
            let d_part = wants_rows.then(|| &mut d_rows[range.start * targets.hidden..range.end * targets.hidden]);
            chunk_backward(x, d_logits, &head, &applied, d_part);
        });
        value.fulfil(scalar(sum, normalizer, extra.value()?));
        sink.add(1, Buffer::<f32>::copy_of(&[upstream[0] * extra.coefficient()]));
        give_rows(sink, &targets, d_rows);
        Ok(())
    });
    if loss.node().is_none() {
        // No backward pass will come: compute now rather than hold the hidden states.
        loss.data().force()?;
    }
    Ok(loss)
}

/// Sum of minus log-probabilities of one chunk, in f64; leaves each row's log-sum-exp.
fn chunk_loss(logits: &[f32], vocab: usize, labels: &[i32], lse: &mut [f32]) -> f64 {
    let mut logprobs = Buffer::scratch(labels.len());
    kernel::logprobs(logits, vocab, labels, lse, &mut logprobs, None);
    -logprobs.iter().map(|logprob| f64::from(*logprob)).sum::<f64>()
}

pub(super) fn scalar(sum: f64, normalizer: f32, extra: f64) -> Buffer<f32> {
    Buffer::copy_of(&[(sum / f64::from(normalizer) + extra) as f32])
}

/// Which number each row gives.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Score {
    Logprob,
    Entropy,
}

/// The log-probability of each row's label.
///
/// - `x`: `[tokens, hidden]`, after the final norm; `head`: `[vocab, hidden]` in panels
/// - `labels`: `[tokens]`, the target of each row itself, or [`IGNORE`], which gives 0
/// - `temperature`: logits are divided by it; 1 unless tokens were sampled otherwise
/// - returns `[tokens]`, f32, natural logarithm
///
/// Errors: [`Error::Shape`], or [`Error::Argument`] for a label outside the vocabulary or a temperature not above 0.
pub fn logprobs<E: ModelElement>(x: &Tensor<E, 2>, head: &Arc<Parameter<E>>, labels: &[i32], temperature: f32) -> Result<Tensor<f32, 1>> {
    score("logprobs", x, head, labels, temperature, Score::Logprob)
}

/// The entropy of each row's distribution over the vocabulary; arguments as in [`logprobs`], rows without a label give 0.
///
/// Errors: as [`logprobs`].
pub fn entropy<E: ModelElement>(x: &Tensor<E, 2>, head: &Arc<Parameter<E>>, labels: &[i32], temperature: f32) -> Result<Tensor<f32, 1>> {
    score("entropy", x, head, labels, temperature, Score::Entropy)
}

fn score<E: ModelElement>(
    op: &'static str,
    x: &Tensor<E, 2>,
    head: &Arc<Parameter<E>>,
    labels: &[i32],
    temperature: f32,
    score: Score,
) -> Result<Tensor<f32, 1>> {
    check_weight(op, x, head)?;
    if !(temperature > 0.0 && temperature.is_finite()) {
        return Err(Error::argument(op, "temperature", "a number above 0", temperature));
    }
    if let Some(device) = x.device() {
        return cuda::score(op, device, x, head, labels, temperature, score);
    }
    let vocab = head.rows();
    let targets = Targets::new(op, x, labels, vocab)?;
    let count = targets.rows.len();
    let (mut lse, mut logprobs, mut entropies) =
        (Buffer::<f32>::scratch(count), Buffer::<f32>::scratch(count), Buffer::<f32>::scratch(count));
    let differentiates = is_recording() && (x.node().is_some() || head.learns());
    let (mut kept, mut room) = (VecDeque::new(), if differentiates { KEPT_BYTES } else { 0 });
    for_chunks(&targets, vocab, |range, x, labels| {
        let (logits, applied) = chunk_logits(x, head, temperature, room > 0);
        let entropies = (score == Score::Entropy).then(|| &mut entropies[range.clone()]);
        kernel::logprobs(&logits, vocab, labels, &mut lse[range.clone()], &mut logprobs[range], entropies);
        // The first chunks, without a gap: a later one that is smaller does not slip in.
        room = room.saturating_sub(size_of_val(&logits[..]));
        if room > 0 {
            kept.push_back((logits, applied));
        }
    });
    let mut y = Buffer::zeroed(targets.tokens);
    for (row, value) in targets.rows.iter().zip(if score == Score::Logprob { &logprobs } else { &entropies }.iter()) {
        y[*row as usize] = *value;
    }
    let (head, seen) = (head.clone(), head.versions());
    Ok(Tensor::from_operation([targets.tokens], Data::ready(y), &[x.node()], head.learns(), move |dy, sink| {
        head.check_versions(&seen, op)?;
        let wants_rows = sink.wants(0);
        let mut d_rows = Buffer::<E>::scratch(if wants_rows { count * targets.hidden } else { 0 });
        for_chunks(&targets, vocab, |range, x, labels| {
            let (mut logits, applied) = kept.pop_front().unwrap_or_else(|| chunk_logits(x, &head, temperature, true));
            let (mut minus, mut plain) = (Buffer::scratch(range.len()), Buffer::scratch(range.len()));
            for (index, row) in targets.rows[range.clone()].iter().enumerate() {
                plain[index] = dy[*row as usize] / temperature;
                minus[index] = if score == Score::Logprob { -plain[index] } else { 0.0 };
            }
            let entropy =
                (score == Score::Entropy).then(|| kernel::EntropyGradient { entropy: &entropies[range.clone()], coefficients: &plain });
            let d_logits = kernel::gradient(&mut logits, vocab, labels, &lse[range.clone()], &minus, entropy);
            let d_part = wants_rows.then(|| &mut d_rows[range.start * targets.hidden..range.end * targets.hidden]);
            chunk_backward(x, d_logits, &head, &applied, d_part);
        });
        give_rows(sink, &targets, d_rows);
        Ok(())
    }))
}
