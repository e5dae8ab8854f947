//! Cross entropy of small steps on a GPU, where asking for hundreds of short kernels takes longer than running them: forward and
//! backward pass are one captured graph (tensor/cuda/training.rs), which runs when the loss runs backwards. It is the one forward pass
//! (graph.rs) over operands that lie on the device, so its bits are those of any other step.
//! Mixtures of experts, batches whose documents share rows, and losses that are read before they run backwards go kernel by kernel.

use super::flops::train_flops;
use super::graph::{Graph, Packed};
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use crate::tensor::autograd::{is_recording, with_recording};
use crate::tensor::logprobs::{cross_entropy, labelled_rows, loss_of};
use crate::tensor::parameter::weights_changed;
use crate::tensor::training::{Batch, Setting, Shape, Task, TrainingGraphs};
use crate::tensor::{Data, ModelElement, Tensor};
use std::sync::{Arc, Mutex, MutexGuard};

/// Operations of a step, above which its kernels are long enough to hide how they are asked for: about 4 ms of an H100.
const FLOPS_MAX: f64 = 2e12;

/// The graphs of a model, which losses that wait for their backward pass hold too.
pub(super) type Graphs = Arc<Mutex<TrainingGraphs>>;

impl<E: ModelElement> Graph<E> {
    /// The loss of [`super::Model::cross_entropy`], as one graph that runs with the backward pass; none where such steps are not
    /// captured, and for the first one of a shape, which loads kernels and brings memory.
    ///
    /// Errors: as there.
    pub(super) fn cross_entropy_captured(
        self: &Arc<Self>,
        graphs: &Graphs,
        input: &Packed,
        labels: &[i32],
        normalizer: f32,
        recompute: bool,
    ) -> Result<Option<Tensor<f32, 0>>> {
        let is_plain = self.config.moe.is_none() && input.prefixes.iter().all(|prefix| prefix.is_empty());
        let is_small = train_flops(&self.config, input.tokens.len()) <= FLOPS_MAX;
        let is_sound = normalizer > 0.0 && normalizer.is_finite();
        let Some(device) = self.place().device().filter(|_| is_plain && is_small && is_sound && is_recording() && self.learns()) else {
            return Ok(None);
        };
        input.check("forward", self.config.vocab)?;
        let rows = labelled_rows("cross_entropy", input.tokens.len(), labels, self.head.rows())?;
        let borders: Vec<i32> = input.cu_seqlens.iter().map(|border| *border as i32).collect();
        let shape = Shape::of(device, self.heads(), &borders, rows.len(), recompute);
        if rows.is_empty() || !lock(graphs).has_run(shape) {
            return Ok(None);
        }
        let batch = Arc::new(Batch {
            tokens: input.tokens.to_vec(),
            position_ids: input.position_ids.to_vec(),
            borders,
            labels: rows.iter().map(|row| labels[*row as usize]).collect(),
            rows: rows.into_iter().map(|row| row as i32).collect(),
        });
        let seen = self.version();
        let singly = {
            let (graph, labels, cu_seqlens, batch) = (self.clone(), labels.to_vec(), input.cu_seqlens.to_vec(), batch.clone());
            move || {
                graph.check_version(seen)?;
                let Batch { tokens, position_ids, .. } = &*batch;
                let input = Packed { tokens, position_ids, cu_seqlens: &cu_seqlens, prefixes: &[] };
                let forward = graph.forward(&input, recompute, |_| {})?;
                cross_entropy(&graph.final_norm(&forward.hidden)?, &graph.head, &labels, normalizer, None)
            }
        };
        let singly = Arc::new(Mutex::new(singly));
        let data = {
            let singly = singly.clone();
            Data::deferred(move || {
                let loss = with_recording(false, || singly.lock().expect(NO_PANIC)())?;
                Ok(Buffer::copy_of(loss.data().force()?.host()))
            })
        };
        let (value, graph, graphs, device) = (data.clone(), self.clone(), graphs.clone(), device.clone());
        Ok(Some(Tensor::from_operation([], data, &[], true, move |upstream: Buffer<f32>, _| {
            graph.check_version(seen)?;
            if value.is_ready() {
                // Who reads losses before they run backwards would pay for two forward passes each time.
                lock(&graphs).turn_off();
            }
            // What a graph reads of the weights beside themselves.
            graph.weights().iter().try_for_each(|weight| weight.refresh_lengths())?;
            let parameters = graph.parameters();
            let windows = graph.windows();
            let setting = Setting { heads: graph.heads(), rope: &graph.rope, windows: &windows };
            let task = Task { shape, batch: &batch, coefficient: upstream[0] / normalizer };
            let captured = lock(&graphs).run(&device, setting, task, &parameters, |operands| {
                let tables = operands.tables::<E>()?;
                let documents = operands.clone();
                let attend = move |_, qkv: &Tensor<E, 2>, window| documents.attention(qkv, &tables, window);
                with_recording(true, || {
                    let forward = graph.forward_with(operands.embedding(&graph.embed)?, recompute, |_| {}, attend)?;
                    operands.backward(&graph.final_norm(&forward.hidden)?, &graph.head)
                })
            })?;
            if let Some(logprobs) = captured {
                value.defer_to(move || loss_of(&logprobs, normalizer));
                return Ok(());
            }
            let loss = with_recording(true, || singly.lock().expect(NO_PANIC)())?;
            loss.backward_with(upstream)?;
            value.defer_to(move || Ok(Buffer::copy_of(loss.data().force()?.host())));
            Ok(())
        })))
    }

    /// Whether a weight trains, or a low-rank part of one.
    fn learns(&self) -> bool {
        [&self.embed, &self.norm, &self.head].into_iter().any(|weight| weight.learns()) || self.layers.iter().any(|layer| layer.trains())
    }

    /// Windows of the layers, each once.
    fn windows(&self) -> Vec<Option<usize>> {
        let mut windows: Vec<_> = self.layers.iter().map(|layer| layer.window).collect();
        windows.sort_unstable();
        windows.dedup();
        windows
    }

    fn check_version(&self, seen: u64) -> Result<(), Error> {
        if self.version() == seen { Ok(()) } else { Err(weights_changed("cross_entropy", "self")) }
    }
}

const NO_PANIC: &str = "no panic happens under this lock";

fn lock(graphs: &Graphs) -> MutexGuard<'_, TrainingGraphs> {
    graphs.lock().expect(NO_PANIC)
}
