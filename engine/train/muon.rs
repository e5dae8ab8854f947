//! One update of Muon: the momentum of a matrix's gradient, made nearly orthogonal tensor by tensor, so that it moves the matrix in
//! all directions alike. Its size is that of an AdamW update, by `0.2 sqrt(max(rows, columns))`, so both take one learning rate and one
//! weight decay. Vectors, embeddings and heads are AdamW's.
//! Source: Jordan et al. (kellerjordan.github.io/posts/muon, 2024); the size and the decay of Liu et al., Muon is scalable for LLM
//! training, arXiv 2502.16982, equation 4, which is `adjust_lr_fn = "match_rms_adamw"` of `torch.optim.Muon`.

use super::optimizer::Settings;
use crate::error::Result;
use crate::kernels::buffer::Buffer;
use crate::kernels::cpu::adamw::{AdamW as Update, Moment};
use crate::kernels::cpu::muon::{self, Matrix};
use crate::kernels::cuda::norm::Norm;
use crate::tensor::trainable::{DeviceMoments, DeviceUpdate, MuonStep, TensorRows, Trainable};

/// Root mean square of the elements of a usual AdamW update, over the learning rate.
const USUAL: f64 = 0.2;

/// Whether Muon updates a parameter: a matrix of a layer.
pub(super) fn is_hidden_matrix(parameter: &dyn Trainable) -> bool {
    parameter.is_matrix() && parameter.name().contains("layers.")
}

/// What the orthogonal matrix of a tensor is multiplied by when its weight moves.
pub(super) fn step_size(lr: f64, rows: usize, columns: usize) -> f32 {
    (-lr * USUAL * (rows.max(columns) as f64).sqrt()) as f32
}

/// Updates a parameter that is held on its device.
///
/// - `parameter`: the same, and the tensors that it is made of
///
/// Errors: those of the device.
pub(super) fn update_on_device(
    locked: &mut dyn DeviceUpdate,
    m: DeviceMoments,
    (parameter, tensors): (&dyn Trainable, &[TensorRows]),
    settings: &Settings,
    update: &Update,
    norm: &Norm,
) -> Result<()> {
    let columns = parameter.columns();
    let matrix = |TensorRows { rows, .. }: &TensorRows| {
        let elements = rows.start * columns..rows.end * columns;
        (elements, rows.len(), columns, step_size(update.lr, rows.len(), columns))
    };
    let matrices: Vec<_> = tensors.iter().map(matrix).collect();
    let momentum = settings.momentum.expect("it is Muon's");
    let keep = (1.0 - update.lr * update.weight_decay) as f32;
    locked.muon(m, &MuonStep { momentum, step: update.step, keep, matrices: &matrices }, norm)
}

/// Elements of the updates that are kept, to be made orthogonal together.
const TOGETHER: usize = 1 << 22;

/// Updates on the host that are made orthogonal together: small matrices are shared out over the threads.
#[derive(Default)]
pub(super) struct HostUpdates<'a>(Vec<HostUpdate<'a>>);

struct HostUpdate<'a> {
    parameter: &'a dyn Trainable,
    tensors: &'a [TensorRows],
    /// In the layout of the gradient.
    delta: Buffer<f32>,
    update: Update,
}

impl<'a> HostUpdates<'a> {
    /// Takes the gradient of a parameter, which is gone afterwards, into its momentum. Nothing happens without a gradient.
    ///
    /// - `m`: its momentum, in the layout of its gradient
    /// - `tensors`: what it is made of; each is made orthogonal by itself
    /// - `update`: learning rate, decay, number and scale of the gradient
    ///
    /// Errors: those of [`Self::finish`].
    pub fn take<M: Moment>(
        &mut self,
        parameter: &'a dyn Trainable,
        tensors: &'a [TensorRows],
        m: &mut [M],
        momentum: f64,
        update: Update,
    ) -> Result<()> {
        let mut delta = Buffer::<f32>::scratch(parameter.gradient_len());
        parameter.read_gradient(&mut |gradient| {
            if let Some(gradient) = gradient {
                muon::momentum(gradient, m, &mut delta, momentum, update.gradient_scale, update.step);
            }
        })?;
        if parameter.has_gradient() {
            parameter.clear_gradient();
            self.0.push(HostUpdate { parameter, tensors, delta, update });
        }
        if self.0.iter().map(|update| update.delta.len()).sum::<usize>() < TOGETHER { Ok(()) } else { self.finish() }
    }

    /// Moves the parameters by what was taken.
    ///
    /// Errors: those of [`Trainable::scale_and_add`].
    pub fn finish(&mut self) -> Result<()> {
        let updates = std::mem::take(&mut self.0);
        let shape = |parameter: &dyn Trainable| (parameter.count() / parameter.columns().max(1), parameter.columns());
        let matrices = updates.iter().flat_map(|HostUpdate { parameter, tensors, delta, update }| {
            tensors.iter().map(move |TensorRows { rows, .. }| {
                let (rows, columns) = (rows.clone(), parameter.columns());
                let mut values = Buffer::<f32>::scratch(rows.len() * columns);
                parameter.layout().unpack_f32(delta, shape(*parameter), rows.clone(), &mut values);
                Matrix { values, rows: rows.len(), columns, factor: step_size(update.lr, rows.len(), columns) }
            })
        });
        let mut matrices: Vec<Matrix> = matrices.collect();
        muon::orthogonalise(&mut matrices);
        let mut matrices = matrices.iter();
        for HostUpdate { parameter, tensors, update, .. } in &updates {
            let decay = (1.0 - update.lr * update.weight_decay) as f32;
            for (TensorRows { rows, .. }, matrix) in tensors.iter().zip(&mut matrices) {
                parameter.scale_and_add(rows.clone(), decay, &matrix.values)?;
            }
        }
        Ok(())
    }
}
