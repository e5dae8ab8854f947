//! The step that continues texts by one token each, where it is captured: on a GPU, in bf16, dense or with experts. It is the one
//! forward pass (graph.rs) over operands that lie on the device (tensor/cuda/decode.rs), so its bits are those of any other step.
//! f32, whose attention wants its grid from the host, and steps that run pieces of prompts go kernel by kernel.

use super::graph::{Graph, Mlp, Packed};
use super::paged::Cache;
use crate::error::Result;
use crate::kernels::element::Dtype;
use crate::tensor::embedding_part::EmbeddingPart;
use crate::tensor::experts::{Expert, Experts};
use crate::tensor::head::{LogitRows, logits_on_device};
use crate::tensor::low_rank::LowRank;
use crate::tensor::paged_attention::{KvBlocks, Span};
use crate::tensor::{ModelElement, Parameter, Tensor};
use std::sync::{Arc, MutexGuard};

impl<E: ModelElement> Graph<E> {
    /// The logits behind the next token of each text, as [`Graph::forward_paged`] and the head give them; none where such steps
    /// are not captured. They hold until the next step.
    ///
    /// - `tokens`: `[texts]`
    /// - `spans`: the texts, of one token each
    ///
    /// Errors: [`crate::error::Error::Argument`] for a token outside the vocabulary; those of the device.
    pub fn continue_captured(self: &Arc<Self>, tokens: &[i32], spans: &[Span], cache: &Cache) -> Result<Option<LogitRows>> {
        if E::DTYPE != Dtype::Bf16 || self.place().device().is_none() {
            return Ok(None);
        }
        let positions: Vec<i32> = spans.iter().map(|span| span.position as i32).collect();
        let borders = [0, tokens.len() as u32];
        Packed { tokens, position_ids: &positions, cu_seqlens: &borders, prefixes: &[] }.check("generate", self.config.vocab)?;
        let version = self.version();
        let Some(mut step) = lock(cache).on_device().expect(LIES_THERE).take_step(spans, version, &self.rope)? else { return Ok(None) };
        let logits = step.run(tokens, spans, |operands| {
            let tables = Arc::new(operands.tables::<E>()?);
            let (heads, cache, texts) = (self.heads(), cache.clone(), operands.clone());
            let attend = move |layer, qkv: &Tensor<E, 2>, window| {
                texts.attention(qkv, heads, &tables, lock(&cache).on_device().expect(LIES_THERE), layer, window)
            };
            let forward = self.forward_with(operands.embedding(&self.embed)?, false, |_| {}, attend)?;
            logits_on_device(&self.final_norm(&forward.hidden)?, &self.head)
        })?;
        lock(cache).on_device().expect(LIES_THERE).put_back(step);
        Ok(Some(LogitRows::on_device(logits, spans.len(), self.config.vocab)))
    }

    /// A number that changes with every change of a weight: of its values, of where they lie, of its low-rank parts.
    pub(super) fn version(&self) -> u64 {
        let of = |weight: &Arc<Parameter<E>>| {
            let (parts, embedding) = (weight.adapters(), weight.embedding_part());
            let parameters = parts.iter().flat_map(LowRank::parameters).chain(embedding.iter().flat_map(EmbeddingPart::parameters));
            parameters.map(|parameter| parameter.version()).fold(weight.version(), u64::wrapping_add)
        };
        let both = |expert: &Expert<E>| of(&expert.gate_up).wrapping_add(of(&expert.down));
        let mut version = [&self.embed, &self.norm, &self.head].map(of).into_iter().fold(0, u64::wrapping_add);
        for layer in &self.layers {
            let attention = [&layer.input_norm, &layer.qkv, &layer.qkv_bias, &layer.o, &layer.post_norm].map(of);
            let mlp = match &layer.mlp {
                Mlp::Dense(mlp) => both(mlp),
                Mlp::Sparse(sparse) => {
                    let experts = match &sparse.experts {
                        Experts::Stacked { weights, .. } => both(weights),
                        Experts::Each(experts) => experts.iter().map(both).fold(0, u64::wrapping_add),
                    };
                    experts.wrapping_add(both(&sparse.shared)).wrapping_add(of(&sparse.router)).wrapping_add(of(&sparse.shared_gate))
                }
            };
            version = attention.into_iter().fold(version.wrapping_add(mlp), u64::wrapping_add);
        }
        version
    }
}

const LIES_THERE: &str = "the cache lies where the model does";

fn lock(cache: &Cache) -> MutexGuard<'_, KvBlocks> {
    cache.lock().expect("attention does not panic under this lock")
}
