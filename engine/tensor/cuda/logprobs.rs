//! The loss head on a GPU; see tensor/logprobs.rs. Log-probabilities and entropies come to the host, where scripts make losses
//! of them: `score` waits for the device. Cross entropy does not: its value is fetched when somebody reads it.

use super::head::{backward, logits_of};
use super::low_rank::Applied;
use super::{GRADIENTS, activation, gradient, scratch};
use crate::error::Result;
use crate::kernels::buffer::Buffer;
use crate::kernels::cuda::device::Device;
use crate::kernels::cuda::logprobs::{self as kernel, EntropyGradient, Place};
use crate::kernels::cuda::memory::{DeviceBuffer, View, ViewMut};
use crate::kernels::cuda::sample::{self, Change, Draw, Likely, change};
use crate::kernels::cuda::{elements, embedding::embed};
use crate::tensor::autograd::{Node, Sink};
use crate::tensor::logprobs::{Extra, Score, labelled_rows, rows_on_device, scalar};
use crate::tensor::parameter::Parameter;
use crate::tensor::place::downloaded;
use crate::tensor::select_rows::row_ids;
use crate::tensor::{Data, ModelElement, Tensor};
use std::ops::Range;
use std::sync::Arc;

/// The rows that have a label, their hidden states side by side.
struct Targets<E: ModelElement> {
    /// Index in the whole of each row that has a label.
    row_ids: Arc<DeviceBuffer<i32>>,
    labels: Arc<DeviceBuffer<i32>>,
    /// `[rows, hidden]`; the whole itself when every row has a label.
    x: Source<E>,
    tokens: usize,
    hidden: usize,
    vocab: usize,
}

enum Source<E: ModelElement> {
    Whole(Arc<Data<E>>),
    Some(DeviceBuffer<E>),
}

impl<E: ModelElement> Targets<E> {
    /// Of the labels that are none to be ignored, and the indices of their rows on the host.
    fn new(op: &'static str, device: &Arc<Device>, x: &Tensor<E, 2>, labels: &[i32], vocab: usize) -> Result<(Self, Vec<u32>)> {
        let rows = labelled_rows(op, x.shape()[0], labels, vocab)?;
        let ids: Vec<i32> = rows.iter().map(|row| *row as i32).collect();
        let own: Vec<i32> = rows.iter().map(|row| labels[*row as usize]).collect();
        let copy = |values: &[i32], label| DeviceBuffer::copy_of(device, label, values).map(Arc::new);
        Ok((Self::of(device, x, copy(&ids, "rows")?, copy(&own, "labels")?, vocab)?, rows))
    }

    /// Of rows and labels that lie on the device.
    fn of(
        device: &Arc<Device>,
        x: &Tensor<E, 2>,
        row_ids: Arc<DeviceBuffer<i32>>,
        labels: Arc<DeviceBuffer<i32>>,
        vocab: usize,
    ) -> Result<Self> {
        let [tokens, hidden] = x.shape();
        let source = if row_ids.len() == tokens {
            Source::Whole(x.data().clone())
        } else {
            let mut some = activation::<E>(device, row_ids.len() * hidden)?;
            embed(device, x.cuda(), hidden, row_ids.view(), some.view_mut())?;
            Source::Some(some)
        };
        Ok(Self { row_ids, labels, x: source, tokens, hidden, vocab })
    }

    fn count(&self) -> usize {
        self.labels.len()
    }

    /// The hidden states of some of the rows.
    fn x(&self, range: &Range<usize>) -> View<'_, E> {
        let elements = range.start * self.hidden..range.end * self.hidden;
        match &self.x {
            Source::Whole(data) => data.cuda().part(elements),
            Source::Some(buffer) => buffer.part(elements),
        }
    }

    /// Ranges of rows whose logits exist together.
    fn chunks(&self, device: &Device) -> impl Iterator<Item = Range<usize>> + use<E> {
        let (count, size) = (self.count(), rows_on_device(self.vocab, self.count(), device.memory_bytes as u64));
        (0..count).step_by(size).map(move |start| start..(start + size).min(count))
    }

    /// Log-probabilities of the labels, and the gradients of the labelled rows if they are wanted; those of the head are added to it.
    ///
    /// - `coefficients`: `[labelled]`, the derivative in minus each log-probability
    fn differentiate(
        &self,
        device: &Arc<Device>,
        head: &Parameter<E>,
        coefficients: View<f32>,
        wants_rows: bool,
    ) -> Result<(DeviceBuffer<f32>, DeviceBuffer<E>)> {
        let count = self.count();
        let mut d_rows = gradient::<E>(device, if wants_rows { count * self.hidden } else { 0 })?;
        let (mut lse, mut logprobs) = (scratch::<f32>(device, count)?, scratch::<f32>(device, count)?);
        for range in self.chunks(device) {
            let (x, labels) = (self.x(&range), self.labels.part(range.clone()));
            let (logits, applied) = chunk_logits(device, x, head, 1.0)?;
            kernel::logprobs(device, logits.view(), labels, lse.part_mut(range.clone()), logprobs.part_mut(range.clone()), None)?;
            let upstream = Upstream { lse: lse.part(range.clone()), coefficients: coefficients.part(range.clone()), entropy: None };
            let d_part = wants_rows.then(|| d_rows.part_mut(range.start * self.hidden..range.end * self.hidden));
            chunk_backward(device, x, logits, labels, upstream, (head, &applied), d_part)?;
        }
        Ok((logprobs, d_rows))
    }

    /// Gives parent 0 the gradients of its labelled rows.
    fn give_rows(&self, device: &Arc<Device>, sink: &mut Sink, d_rows: DeviceBuffer<E>) -> Result<()> {
        match self.x {
            Source::Whole(_) => sink.add_on_device(0, d_rows),
            Source::Some(_) => sink.accumulate_on_device::<E>(0, device, self.tokens * self.hidden, |mut dx, add| {
                if !add {
                    dx.zero(device)?;
                }
                elements::put_rows(device, d_rows.view(), self.row_ids.view(), self.hidden, dx, true)
            }),
        }
    }
}

/// The logits of some rows, divided by the temperature, and the low-rank parts of the head.
fn chunk_logits<E: ModelElement>(
    device: &Arc<Device>,
    x: View<E>,
    head: &Parameter<E>,
    temperature: f32,
) -> Result<(DeviceBuffer<f32>, Applied<E>)> {
    let vocab = head.rows();
    let (logits, applied) = logits_of(device, x, head)?;
    if temperature == 1.0 || logits.is_empty() {
        return Ok((logits, applied));
    }
    let mut scaled = scratch::<f32>(device, logits.len())?;
    elements::take_columns(device, logits.view(), vocab, 0..vocab, temperature.recip(), scaled.view_mut())?;
    Ok((scaled, applied))
}

/// What the derivative of the loss is in each row's numbers: minus its log-probability, and its entropy.
#[derive(Clone, Copy)]
struct Upstream<'a> {
    lse: View<'a, f32>,
    coefficients: View<'a, f32>,
    entropy: Option<EntropyGradient<'a>>,
}

/// One chunk's part of the backward pass: from its logits to the gradients of its hidden states and of the head.
fn chunk_backward<E: ModelElement>(
    device: &Arc<Device>,
    x: View<E>,
    logits: DeviceBuffer<f32>,
    labels: View<i32>,
    upstream: Upstream,
    (head, applied): (&Parameter<E>, &Applied<E>),
    d_rows: Option<ViewMut<E>>,
) -> Result<()> {
    let mut d_logits = gradient::<E>(device, logits.len())?;
    let place = Place::Rounded { logits: logits.view(), gradient: d_logits.view_mut() };
    kernel::gradient(device, place, labels, upstream.lse, upstream.coefficients, upstream.entropy)?;
    drop(logits);
    backward(device, d_logits.view(), Some(x), head, applied, d_rows.map(|d_rows| (d_rows, false)))
}

/// Sum of minus log-probabilities, in f64.
fn sum_of(logprobs: &DeviceBuffer<f32>) -> Result<f64> {
    Ok(-downloaded(logprobs)?.iter().map(|logprob| f64::from(*logprob)).sum::<f64>())
}

/// As [`crate::tensor::logprobs::cross_entropy`].
pub fn cross_entropy<E: ModelElement>(
    device: &Arc<Device>,
    x: &Tensor<E, 2>,
    head: &Arc<Parameter<E>>,
    labels: &[i32],
    normalizer: f32,
    (extra, extra_node): (Extra, Option<&Arc<Node>>),
) -> Result<Tensor<f32, 0>> {
    let targets = Arc::new(Targets::new("cross_entropy", device, x, labels, head.rows())?.0);
    let data = {
        let (device, targets, head, extra) = (device.clone(), targets.clone(), head.clone(), extra.clone());
        let seen = head.versions();
        Data::deferred(move || {
            head.check_versions(&seen, "cross_entropy")?;
            let (mut lse, mut logprobs) = (scratch::<f32>(&device, targets.count())?, scratch::<f32>(&device, targets.count())?);
            for range in targets.chunks(&device) {
                let (logits, _) = chunk_logits(&device, targets.x(&range), &head, 1.0)?;
                let (lse, logprobs) = (lse.part_mut(range.clone()), logprobs.part_mut(range.clone()));
                kernel::logprobs(&device, logits.view(), targets.labels.part(range), lse, logprobs, None)?;
            }
            Ok(scalar(sum_of(&logprobs)?, normalizer, extra.value()?))
        })
    };
    let (value, device, head, trains, seen) = (data.clone(), device.clone(), head.clone(), head.learns(), head.versions());
    let loss = Tensor::from_operation([], data, &[x.node(), extra_node], trains, move |upstream: Buffer<f32>, sink| {
        head.check_versions(&seen, "cross_entropy")?;
        let coefficients = DeviceBuffer::copy_of(&device, GRADIENTS, &vec![upstream[0] / normalizer; targets.count()])?;
        let (logprobs, d_rows) = targets.differentiate(&device, &head, coefficients.view(), sink.wants(0))?;
        let coefficient = extra.coefficient();
        value.defer_to(move || Ok(scalar(sum_of(&logprobs)?, normalizer, extra.value()?)));
        sink.add(1, Buffer::<f32>::copy_of(&[upstream[0] * coefficient]));
        targets.give_rows(&device, sink, d_rows)
    });
    if loss.node().is_none() {
        // No backward pass will come: compute now rather than hold the hidden states.
        loss.data().force()?;
    }
    Ok(loss)
}

/// The backward pass of a cross entropy on operands that lie on the device: the log-probabilities of the labels, `[labelled]`, and
/// the gradient of `x` if it takes one. That of the head is added to it.
///
/// - `rows`, `labels`: `[labelled]`; `coefficients`: as many, the derivative in minus each log-probability
pub(super) fn differentiate<E: ModelElement>(
    device: &Arc<Device>,
    x: &Tensor<E, 2>,
    head: &Arc<Parameter<E>>,
    (rows, labels): (&Arc<DeviceBuffer<i32>>, &Arc<DeviceBuffer<i32>>),
    coefficients: View<f32>,
) -> Result<(DeviceBuffer<f32>, Option<DeviceBuffer<E>>)> {
    let targets = Targets::of(device, x, rows.clone(), labels.clone(), head.rows())?;
    let (logprobs, d_rows) = targets.differentiate(device, head, coefficients, x.node().is_some())?;
    let dx = match targets.x {
        _ if x.node().is_none() => None,
        Source::Whole(_) => Some(d_rows),
        Source::Some(_) => {
            let mut dx = gradient::<E>(device, targets.tokens * targets.hidden)?;
            dx.fill_bytes(0)?;
            elements::put_rows(device, d_rows.view(), rows.view(), targets.hidden, dx.view_mut(), true)?;
            Some(dx)
        }
    };
    Ok((logprobs, dx))
}

/// The cross entropy of log-probabilities on a device, fetched.
///
/// Errors: those of the device.
pub fn loss_of(logprobs: &DeviceBuffer<f32>, normalizer: f32) -> Result<Buffer<f32>> {
    Ok(scalar(sum_of(logprobs)?, normalizer, 0.0))
}

/// As [`crate::tensor::logprobs::logprobs`] and [`crate::tensor::logprobs::entropy`].
pub fn score<E: ModelElement>(
    op: &'static str,
    device: &Arc<Device>,
    x: &Tensor<E, 2>,
    head: &Arc<Parameter<E>>,
    labels: &[i32],
    temperature: f32,
    score: Score,
) -> Result<Tensor<f32, 1>> {
    let (targets, rows) = Targets::new(op, device, x, labels, head.rows())?;
    let count = targets.count();
    let mut lse = activation::<f32>(device, count)?;
    let (mut logprobs, mut entropies) = (activation::<f32>(device, count)?, activation::<f32>(device, count)?);
    for range in targets.chunks(device) {
        let (logits, _) = chunk_logits(device, targets.x(&range), head, temperature)?;
        let entropies = (score == Score::Entropy).then(|| entropies.part_mut(range.clone()));
        let (lse, logprobs) = (lse.part_mut(range.clone()), logprobs.part_mut(range.clone()));
        kernel::logprobs(device, logits.view(), targets.labels.part(range), lse, logprobs, entropies)?;
    }
    let values = downloaded(if score == Score::Logprob { &logprobs } else { &entropies })?;
    drop(logprobs);
    let mut y = Buffer::zeroed(targets.tokens);
    rows.iter().zip(values.iter()).for_each(|(row, value)| y[*row as usize] = *value);
    let (device, head, trains, seen) = (device.clone(), head.clone(), head.learns(), head.versions());
    Ok(Tensor::from_operation([targets.tokens], Data::ready(y), &[x.node()], trains, move |dy: Buffer<f32>, sink| {
        head.check_versions(&seen, op)?;
        let wants_rows = sink.wants(0);
        let mut d_rows = gradient::<E>(&device, if wants_rows { count * targets.hidden } else { 0 })?;
        let plain: Vec<f32> = rows.iter().map(|row| dy[*row as usize] / temperature).collect();
        let minus: Vec<f32> = plain.iter().map(|plain| if score == Score::Logprob { -plain } else { 0.0 }).collect();
        let (plain, minus) = (DeviceBuffer::copy_of(&device, GRADIENTS, &plain)?, DeviceBuffer::copy_of(&device, GRADIENTS, &minus)?);
        for range in targets.chunks(&device) {
            let (x, labels) = (targets.x(&range), targets.labels.part(range.clone()));
            let (logits, applied) = chunk_logits(&device, x, &head, temperature)?;
            let entropy = (score == Score::Entropy)
                .then(|| EntropyGradient { entropy: entropies.part(range.clone()), coefficients: plain.part(range.clone()) });
            let upstream = Upstream { lse: lse.part(range.clone()), coefficients: minus.part(range.clone()), entropy };
            let d_part = wants_rows.then(|| d_rows.part_mut(range.start * targets.hidden..range.end * targets.hidden));
            chunk_backward(&device, x, logits, labels, upstream, (&head, &applied), d_part)?;
        }
        targets.give_rows(&device, sink, d_rows)
    }))
}

/// As [`crate::tensor::head::LogitRows::logprobs`].
///
/// - `logits`: `[any, vocab]`
pub fn logprobs_of_logits(
    logits: &DeviceBuffer<f32>,
    vocab: usize,
    rows: &[usize],
    labels: &[i32],
    temperatures: &[f32],
) -> Result<(Vec<f32>, Vec<f32>)> {
    let (device, count) = (logits.device(), rows.len());
    let labels = DeviceBuffer::copy_of(device, "labels", labels)?;
    let (mut lse, mut logprobs) = (scratch::<f32>(device, count)?, scratch::<f32>(device, count)?);
    logprobs_of_rows(logits, vocab, rows, temperatures, labels.view(), lse.view_mut(), logprobs.view_mut())?;
    Ok((logprobs.to_vec()?, lse.to_vec()?))
}

/// Copies of the rows that are drawn from, with changes of their logits, and the draws from these; none without changes.
fn changed(
    logits: &DeviceBuffer<f32>,
    stride: usize,
    draws: &[Draw],
    changes: &[Change],
) -> Result<Option<(DeviceBuffer<f32>, Vec<Draw>)>> {
    if changes.is_empty() {
        return Ok(None);
    }
    let device = logits.device();
    let rows: Vec<i32> = draws.iter().map(|draw| draw.row).collect();
    let rows = DeviceBuffer::copy_of(device, "rows", &rows)?;
    let mut copies = scratch::<f32>(device, draws.len() * stride)?;
    embed(device, logits.view(), stride, rows.view(), copies.view_mut())?;
    change(device, copies.view_mut(), stride, changes)?;
    Ok(Some((copies, draws.iter().enumerate().map(|(row, draw)| Draw { row: row as i32, ..*draw }).collect())))
}

/// As [`crate::tensor::head::LogitRows::likely`]; arguments as in [`draw`].
pub fn likely(logits: &DeviceBuffer<f32>, sizes: (usize, usize), draws: &[Draw], changes: &[Change]) -> Result<Vec<Option<Likely>>> {
    let device = logits.device();
    match changed(logits, sizes.0, draws, changes)? {
        None => sample::likely(device, logits.view(), sizes, draws),
        Some((copies, draws)) => sample::likely(device, copies.view(), sizes, &draws),
    }
}

/// As [`crate::tensor::head::LogitRows::draw`].
///
/// - `logits`: `[any, stride]`, of which the first `vocab` of a row may be chosen
/// - `changes`: of logits, by the index of their draw
/// - `temperatures`: those that log-probabilities are reported for
pub fn draw(
    logits: &DeviceBuffer<f32>,
    (stride, vocab): (usize, usize),
    draws: &[Draw],
    changes: &[Change],
    temperatures: &[f32],
) -> Result<(Vec<i32>, Vec<f32>)> {
    let (device, count) = (logits.device(), draws.len());
    // Tokens and log-probabilities side by side, so that one copy fetches both.
    let mut both = scratch::<i32>(device, 2 * count)?;
    match changed(logits, stride, draws, changes)? {
        None => sample::sample(device, logits.view(), (stride, vocab), draws, both.part_mut(..count))?,
        Some((copies, draws)) => sample::sample(device, copies.view(), (stride, vocab), &draws, both.part_mut(..count))?,
    }
    let (mut lse, mut logprobs) = (scratch::<f32>(device, count)?, scratch::<f32>(device, count)?);
    let rows: Vec<usize> = draws.iter().map(|draw| draw.row as usize).collect();
    logprobs_of_rows(logits, stride, &rows, temperatures, both.part(..count), lse.view_mut(), logprobs.view_mut())?;
    both.part_mut(count..).copy_from(device, logprobs.view().cast())?;
    let both = both.to_vec()?;
    Ok((both[..count].to_vec(), both[count..].iter().map(|bits| f32::from_bits(*bits as u32)).collect()))
}

/// Log-probabilities of `labels`, `[rows]`, and the logarithm of each row's sum of exponentials, all on the device.
fn logprobs_of_rows(
    logits: &DeviceBuffer<f32>,
    vocab: usize,
    rows: &[usize],
    temperatures: &[f32],
    labels: View<i32>,
    lse: ViewMut<f32>,
    logprobs: ViewMut<f32>,
) -> Result<()> {
    let (device, len) = (logits.device(), rows.len() * vocab);
    // As a rule each row is wanted once; the members of a group begin at one row.
    let gathered = if rows.iter().copied().eq(0..rows.len()) {
        None
    } else {
        let row_ids = DeviceBuffer::copy_of(device, "rows", &row_ids(rows))?;
        let mut gathered = scratch::<f32>(device, len)?;
        embed(device, logits.view(), vocab, row_ids.view(), gathered.view_mut())?;
        Some(gathered)
    };
    let plain = gathered.as_ref().unwrap_or(logits).part(..len);
    if temperatures.iter().all(|temperature| *temperature == 1.0) {
        return kernel::logprobs(device, plain, labels, lse, logprobs, None);
    }
    let mut scaled = scratch::<f32>(device, len)?;
    // Neighbours of one temperature go together; all of them, as a rule.
    let mut start = 0;
    for group in temperatures.chunk_by(|a, b| a == b) {
        let part = start * vocab..(start + group.len()) * vocab;
        elements::take_columns(device, plain.part(part.clone()), vocab, 0..vocab, group[0].recip(), scaled.part_mut(part))?;
        start += group.len();
    }
    kernel::logprobs(device, scaled.view(), labels, lse, logprobs, None)
}
