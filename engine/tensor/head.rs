//! What stands on top of the layers, as tensors that scripts go on with: their logits, and one score for each.
//! Losses over labels do not come here: they go through logprobs.rs, which has them for some rows at a time.

use super::ModelElement;
use super::cuda::head as cuda;
use super::linear::{check_weight, weight_gradients};
use super::logprobs::logprobs_of_logits;
use super::low_rank::Applied;
use super::parameter::Parameter;
use super::typed::{Data, Tensor};
use crate::error::Result;
use crate::kernels::buffer::Buffer;
use crate::kernels::cpu::{gemm, norm};
use crate::kernels::cuda::memory::DeviceBuffer;
pub use crate::kernels::cuda::sample::{Change, Draw, Likely};
use std::sync::{Arc, OnceLock};

/// All logits of each row: `[rows, hidden]` times the head gives `[rows, vocab]`, f32.
///
/// Errors: [`Error::Shape`] if the sizes do not fit.
pub fn logits<E: ModelElement>(x: &Tensor<E, 2>, head: &Arc<Parameter<E>>) -> Result<Tensor<f32, 2>> {
    product("logits", [x.shape()[0], head.rows()], x, head)
}

/// Logits for looking and sampling, where they were computed; on the host as soon as somebody looks.
pub struct LogitRows {
    rows: usize,
    vocab: usize,
    values: OnceLock<Buffer<f32>>,
    /// The first of its rows are these.
    on_device: Option<Arc<DeviceBuffer<f32>>>,
}

impl LogitRows {
    /// The first `rows` rows of logits on a device, `[any, vocab]`.
    pub fn on_device(logits: Arc<DeviceBuffer<f32>>, rows: usize, vocab: usize) -> Self {
        assert!(logits.len() >= rows * vocab, "{} logits for [{rows}, {vocab}]", logits.len());
        Self { rows, vocab, values: OnceLock::new(), on_device: Some(logits) }
    }

    /// `[rows, vocab]`, on the host; waits for a device at the first call.
    ///
    /// Errors: those of the device.
    pub fn values(&self) -> Result<&[f32]> {
        if let (None, Some(logits)) = (self.values.get(), &self.on_device) {
            let mut values = Buffer::scratch(self.rows * self.vocab);
            logits.download_at(0, &mut values)?;
            let _ = self.values.set(values);
        }
        Ok(self.values.get().expect("logits on the host are there from the beginning"))
    }

    /// Whether they lie on a device.
    pub fn are_on_device(&self) -> bool {
        self.on_device.is_some()
    }

    fn device_rows(&self) -> &DeviceBuffer<f32> {
        self.on_device.as_ref().expect("the host's sampler chooses from logits on the host")
    }

    /// Chooses tokens where the logits lie, by [`Draw`]s over the first `vocab` of each row, with what [`LogitRows::logprobs`] says of
    /// them. A token is -1 where the logits allow no choice. Waits for the device once. Panics on the host, whose sampler does that.
    ///
    /// - `changes`: of the logits that a draw sees, with its index; log-probabilities are those without
    /// - `temperatures`: for each draw the one that its log-probability is reported for, above 0
    ///
    /// Errors: those of the device.
    pub fn draw(&self, vocab: usize, draws: &[Draw], changes: &[Change], temperatures: &[f32]) -> Result<(Vec<i32>, Vec<f32>)> {
        super::cuda::logprobs::draw(self.device_rows(), (self.vocab, vocab), draws, changes, temperatures)
    }

    /// The tokens that filters may keep, for each draw; none where that are too many, and where the logits allow no choice. Arguments as
    /// in [`LogitRows::draw`].
    ///
    /// Errors: those of the device.
    pub fn likely(&self, vocab: usize, draws: &[Draw], changes: &[Change]) -> Result<Vec<Option<Likely>>> {
        super::cuda::logprobs::likely(self.device_rows(), (self.vocab, vocab), draws, changes)
    }

    /// Log-probabilities of chosen tokens: the bits of [`super::logprobs::logprobs`] over the same rows, at the same place.
    ///
    /// - `rows`: which row each choice was made from; one may come again
    /// - `labels`: the chosen tokens
    /// - `temperatures`: each above 0; a row's logits are divided by its own
    /// - returns the log-probabilities, and the logarithm of each row's sum of exponentials
    ///
    /// Errors: those of the device.
    pub fn logprobs(&self, rows: &[usize], labels: &[i32], temperatures: &[f32]) -> Result<(Vec<f32>, Vec<f32>)> {
        match &self.on_device {
            Some(logits) => super::cuda::logprobs::logprobs_of_logits(logits, self.vocab, rows, labels, temperatures),
            None => {
                let values = self.values()?;
                if rows.iter().copied().eq(0..rows.len()) {
                    return Ok(logprobs_of_logits(&values[..rows.len() * self.vocab], self.vocab, labels, temperatures));
                }
                // Members of a group begin at one row, and each wants it for a label of its own.
                let rows = rows.iter().map(|row| &values[row * self.vocab..][..self.vocab]).collect::<Vec<_>>().concat();
                Ok(logprobs_of_logits(&rows, self.vocab, labels, temperatures))
            }
        }
    }
}

/// All logits of each row, as [`logits`] gives them; not differentiable.
///
/// Errors: [`Error::Shape`] if the sizes do not fit; those of the device.
pub fn logit_rows<E: ModelElement>(x: &Tensor<E, 2>, head: &Parameter<E>) -> Result<LogitRows> {
    check_weight("logits", x, head)?;
    let (rows, vocab) = (x.shape()[0], head.rows());
    if let Some(device) = x.device() {
        return Ok(LogitRows::on_device(Arc::new(cuda::logits(device, x, head)?), rows, vocab));
    }
    let mut values = Buffer::scratch(rows * vocab);
    Applied::product(head, &mut values, x.values(), None, None, None);
    Ok(LogitRows { rows, vocab, values: OnceLock::from(values), on_device: None })
}

/// As [`logit_rows`] of a model on a device, as they lie there.
///
/// Errors: as there.
pub fn logits_on_device<E: ModelElement>(x: &Tensor<E, 2>, head: &Parameter<E>) -> Result<DeviceBuffer<f32>> {
    check_weight("logits", x, head)?;
    cuda::logits(x.device().expect("the model lies on a device"), x, head)
}

/// One number for each row: `[rows, hidden]` times a head of one output gives `[rows]`, f32.
///
/// Errors: [`Error::Shape`] if the sizes do not fit.
pub fn scores<E: ModelElement>(x: &Tensor<E, 2>, head: &Arc<Parameter<E>>) -> Result<Tensor<f32, 1>> {
    assert_eq!(head.rows(), 1, "{}: outputs of a head that scores", head.name());
    product("scores", [x.shape()[0]], x, head)
}

fn product<E: ModelElement, const R: usize>(
    op: &'static str,
    shape: [usize; R],
    x: &Tensor<E, 2>,
    head: &Arc<Parameter<E>>,
) -> Result<Tensor<f32, R>> {
    let [rows, hidden] = x.shape();
    check_weight(op, x, head)?;
    if let Some(device) = x.device() {
        return cuda::product(op, device, shape, x, head);
    }
    let mut y = Buffer::scratch(rows * head.rows());
    let applied = Applied::product(head, &mut y, x.values(), None, None, None);
    let trains = head.learns();
    let (saved, head, seen) = (trains.then(|| x.data().clone()), head.clone(), head.version());
    Ok(Tensor::from_operation(shape, Data::ready(y), &[x.node()], trains, {
        move |dy, sink| {
            head.check_version(seen, op)?;
            applied.check_versions(op)?;
            let mut narrow = Buffer::<E>::scratch(dy.len());
            norm::convert(&dy, &mut narrow);
            drop(dy);
            let narrow = applied.unscaled(&narrow).unwrap_or(narrow);
            let x = saved.as_ref().map_or(&[][..], |saved| saved.get());
            weight_gradients(&narrow, x, &head, None);
            let d_inner = applied.factor_gradients(&narrow, x, None);
            sink.accumulate::<E>(0, rows * hidden, |dx, add| {
                gemm::input_gradient(&mut *dx, &narrow, head.product_weight(&head.read()), add);
                applied.add_input_gradient(&d_inner, dx);
            });
            Ok(())
        }
    }))
}
