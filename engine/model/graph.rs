//! The one forward pass of Qwen2.5, dense and mixture of experts: training, scoring and generation all run this graph.
//! The attention step is an argument, so that packed sequences and a cache of earlier keys need no second graph.
//! Source: reference implementation `Qwen2ForCausalLM` and `Qwen2MoeForCausalLM` of Hugging Face transformers.

use super::config::Config;
use crate::error::{Error, Result};
use crate::tensor::attention::{Documents, Heads, Rope, attention};
use crate::tensor::embedding::embedding;
use crate::tensor::experts::{Expert, Experts, Routing, mixture, routing};
use crate::tensor::linear::{linear, norm_linear, norm_swiglu, swiglu_linear};
use crate::tensor::paged_attention::{KvBlocks, Span, Texts, paged_attention};
use crate::tensor::recompute::recompute;
use crate::tensor::rms_norm::rms_norm;
use crate::tensor::{ModelElement, Parameter, Place, Tensor};
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// Documents laid end to end: `tokens` and `position_ids` of `[tokens]`, and the borders of the documents, from 0 to
/// the number of tokens. Attention stays inside a document.
#[derive(Clone, Copy, Debug)]
pub struct Packed<'a> {
    pub tokens: &'a [i32],
    pub position_ids: &'a [i32],
    pub cu_seqlens: &'a [u32],
    /// For each document, the rows of an earlier one that stand before its own: the beginning of a document that has none
    /// itself. No entries at all where every document is whole.
    pub prefixes: &'a [Range<u32>],
}

impl Packed<'_> {
    /// Errors: [`Error::Shape`] or [`Error::Argument`] if the three do not fit together, or a token is outside the
    /// vocabulary.
    pub fn check(&self, op: &'static str, vocab: usize) -> Result<()> {
        let tokens = self.tokens.len();
        if self.position_ids.len() != tokens {
            return Err(Error::Shape {
                op,
                arg: "position_ids",
                expected: format!("[{tokens}]"),
                got: format!("[{}]", self.position_ids.len()),
            });
        }
        let rising = self.cu_seqlens.windows(2).all(|pair| pair[0] <= pair[1]);
        if self.cu_seqlens.first() != Some(&0) || self.cu_seqlens.last().map(|last| *last as usize) != Some(tokens) || !rising {
            return Err(Error::argument(
                op,
                "cu_seqlens",
                format!("document borders rising from 0 to {tokens}"),
                format!("{:?}", self.cu_seqlens),
            ));
        }
        if let Some((index, token)) = self.tokens.iter().enumerate().find(|(_, token)| **token < 0 || **token as usize >= vocab) {
            return Err(Error::argument(op, format!("tokens[{index}]"), format!("an id from 0 to {}", vocab - 1), token));
        }
        if let Some(position) = self.position_ids.iter().find(|position| **position < 0) {
            return Err(Error::argument(op, "position_ids", "0 or more", position));
        }
        if !self.prefixes.is_empty() && self.prefixes.len() + 1 != self.cu_seqlens.len() {
            let expected = format!("{} (one a document), or none", self.cu_seqlens.len() - 1);
            return Err(Error::argument(op, "prefixes", expected, self.prefixes.len()));
        }
        for (index, prefix) in self.prefixes.iter().enumerate().filter(|(_, prefix)| !prefix.is_empty()) {
            // The last document that begins at or before that row; empty ones come before it.
            let earlier = self.cu_seqlens.partition_point(|border| *border <= prefix.start) - 1;
            let begins = earlier < index && self.cu_seqlens[earlier] == prefix.start && prefix.end <= self.cu_seqlens[earlier + 1];
            if !(begins && self.prefixes[earlier].is_empty()) {
                let expected = "the beginning of an earlier document that is whole";
                return Err(Error::argument(op, format!("prefixes[{index}]"), expected, format!("{prefix:?}")));
            }
        }
        Ok(())
    }
}

/// A transformer layer's weights. q, k and v are rows of one matrix, as are gate and up, so that each input is read once.
pub struct Layer<E: ModelElement> {
    /// `[hidden]`
    pub input_norm: Arc<Parameter<E>>,
    /// `[(heads + 2 * kv_heads) * head_dim, hidden]`
    pub qkv: Arc<Parameter<E>>,
    /// `[(heads + 2 * kv_heads) * head_dim]`
    pub qkv_bias: Arc<Parameter<E>>,
    /// `[hidden, heads * head_dim]`
    pub o: Arc<Parameter<E>>,
    /// `[hidden]`
    pub post_norm: Arc<Parameter<E>>,
    pub mlp: Mlp<E>,
    /// Keys that a query sees, itself included; all of its document if none.
    pub window: Option<usize>,
}

/// The second half of a layer.
pub enum Mlp<E: ModelElement> {
    Dense(Expert<E>),
    Sparse(Box<Sparse<E>>),
}

/// A mixture of experts beside one shared expert.
pub struct Sparse<E: ModelElement> {
    /// `[experts, hidden]`
    pub router: Arc<Parameter<E>>,
    pub experts: Experts<E>,
    pub shared: Expert<E>,
    /// `[1, hidden]`
    pub shared_gate: Arc<Parameter<E>>,
}

/// A model's weights and what is derived from its configuration.
pub struct Graph<E: ModelElement> {
    pub config: Config,
    /// `[vocab, hidden]`
    pub embed: Arc<Parameter<E>>,
    pub layers: Vec<Layer<E>>,
    /// `[hidden]`
    pub norm: Arc<Parameter<E>>,
    /// `[vocab, hidden]`; the embedding itself when tied.
    pub head: Arc<Parameter<E>>,
    pub rope: Rope,
}

/// What a forward pass gives.
pub struct Forward<E: ModelElement> {
    /// `[tokens, hidden]`, after the last layer and before the final norm.
    pub hidden: Tensor<E, 2>,
    /// One for each sparse layer, in order.
    pub routing: Vec<Routing<E>>,
}

impl<E: ModelElement> Graph<E> {
    fn eps(&self) -> f32 {
        self.config.rms_norm_eps as f32
    }

    /// Where the weights lie, and all that is computed from them.
    pub fn place(&self) -> &Place {
        self.embed.place()
    }

    /// How a layer's attention sees the heads.
    pub fn heads(&self) -> Heads {
        Heads { heads: self.config.heads, kv_heads: self.config.kv_heads, head_dim: self.config.head_dim }
    }

    /// Runs the layers over packed documents.
    ///
    /// - `recompute_layers`: keep only each layer's input and compute the layer again for the backward pass
    /// - `observe`: sees the residual stream before the first layer and after each one
    ///
    /// Errors: those of [`Packed::check`].
    pub fn forward(self: &Arc<Self>, input: &Packed, recompute_layers: bool, observe: impl FnMut(&Tensor<E, 2>)) -> Result<Forward<E>> {
        input.check("forward", self.config.vocab)?;
        let heads = self.heads();
        let documents = Arc::new(Documents::new(input.cu_seqlens, input.prefixes, self.place()));
        let tables = Arc::new(documents.tables::<E>(&self.rope, input.position_ids, self.place())?);
        let attend = move |_, qkv: &Tensor<E, 2>, window| attention(qkv, heads, &tables, &documents, window);
        self.forward_with(embedding(input.tokens, &self.embed)?, recompute_layers, observe, attend)
    }

    /// Runs the layers over new tokens of texts whose earlier keys and values lie in `cache`, which takes those of the new
    /// ones. Each row has the bits that [`Graph::forward`] gives it over its whole text. Not differentiable.
    ///
    /// - `tokens`, `position_ids`: `[tokens]`, of all new tokens
    /// - `spans`: the texts that they belong to
    ///
    /// Errors: [`Error::Argument`] for a token outside the vocabulary.
    pub fn forward_paged(
        self: &Arc<Self>,
        tokens: &[i32],
        position_ids: &[i32],
        spans: Vec<Span>,
        cache: &Arc<Mutex<KvBlocks>>,
    ) -> Result<Forward<E>> {
        Packed { tokens, position_ids, cu_seqlens: &[0, tokens.len() as u32], prefixes: &[] }.check("generate", self.config.vocab)?;
        let tables = Arc::new(self.rope.tables::<E>(position_ids, self.place())?);
        let (heads, texts, cache) = (self.heads(), Arc::new(Texts::new(spans)), cache.clone());
        let attend = move |layer, qkv: &Tensor<E, 2>, window| {
            let mut cache = cache.lock().expect("attention does not panic under this lock");
            paged_attention(qkv, heads, &tables, &texts, &mut cache, layer, window)
        };
        self.forward_with(embedding(tokens, &self.embed)?, false, |_| {}, attend)
    }

    /// Runs the layers over the embedded tokens; `attend` turns `[tokens, (heads + 2 * kv_heads) * head_dim]` before rope into
    /// `[tokens, heads * head_dim]` for the layer of that number, with that window.
    pub(super) fn forward_with(
        self: &Arc<Self>,
        mut x: Tensor<E, 2>,
        recompute_layers: bool,
        mut observe: impl FnMut(&Tensor<E, 2>),
        attend: impl Fn(usize, &Tensor<E, 2>, Option<usize>) -> Result<Tensor<E, 2>> + Clone + Send + 'static,
    ) -> Result<Forward<E>> {
        let mut routings = Vec::new();
        observe(&x);
        for (index, layer) in self.layers.iter().enumerate() {
            match &layer.mlp {
                Mlp::Dense(_) if recompute_layers => {
                    let (graph, attend) = (self.clone(), attend.clone());
                    x = recompute(&x, layer.trains(), move |x| {
                        let layer = &graph.layers[index];
                        let x = layer.attend(x, graph.eps(), |qkv, window| attend(index, qkv, window))?;
                        layer.dense(&x, graph.eps())
                    })?;
                }
                Mlp::Dense(_) => {
                    x = layer.attend(&x, self.eps(), |qkv, window| attend(index, qkv, window))?;
                    x = layer.dense(&x, self.eps())?;
                }
                Mlp::Sparse(sparse) => {
                    // Routing gives several results, so only the attention half is computed again.
                    if recompute_layers {
                        let (graph, attend) = (self.clone(), attend.clone());
                        x = recompute(&x, layer.trains(), move |x| {
                            graph.layers[index].attend(x, graph.eps(), |qkv, window| attend(index, qkv, window))
                        })?;
                    } else {
                        x = layer.attend(&x, self.eps(), |qkv, window| attend(index, qkv, window))?;
                    }
                    let (next, routing) = sparse.forward(&x, layer, self)?;
                    x = next;
                    routings.push(routing);
                }
            }
            observe(&x);
        }
        Ok(Forward { hidden: x, routing: routings })
    }

    /// The final norm: `[tokens, hidden]` ready for the head.
    pub fn final_norm(&self, hidden: &Tensor<E, 2>) -> Result<Tensor<E, 2>> {
        rms_norm(hidden, &self.norm, self.eps())
    }
}

impl<E: ModelElement> Layer<E> {
    /// Whether any weight of what may be computed again (all but the experts) trains, or a low-rank part of one.
    pub(super) fn trains(&self) -> bool {
        let attention = [&self.input_norm, &self.qkv, &self.qkv_bias, &self.o];
        attention.into_iter().any(|parameter| parameter.learns())
            || matches!(&self.mlp, Mlp::Dense(mlp) if [&self.post_norm, &mlp.gate_up, &mlp.down].into_iter().any(|parameter| parameter.learns()))
    }

    fn attend(
        &self,
        x: &Tensor<E, 2>,
        eps: f32,
        attend: impl Fn(&Tensor<E, 2>, Option<usize>) -> Result<Tensor<E, 2>>,
    ) -> Result<Tensor<E, 2>> {
        let qkv = norm_linear(x, &self.input_norm, eps, &self.qkv, Some(&self.qkv_bias))?;
        let mixed = attend(&qkv, self.window)?;
        linear(&mixed, &self.o, None, Some(x))
    }

    fn dense(&self, x: &Tensor<E, 2>, eps: f32) -> Result<Tensor<E, 2>> {
        let Mlp::Dense(mlp) = &self.mlp else { unreachable!("the caller looked") };
        if let Some(activation) = norm_swiglu(x, &self.post_norm, eps, &mlp.gate_up)? {
            return linear(&activation, &mlp.down, None, Some(x));
        }
        let gate_up = norm_linear(x, &self.post_norm, eps, &mlp.gate_up, None)?;
        swiglu_linear(&gate_up, &mlp.down, Some(x))
    }
}

impl<E: ModelElement> Sparse<E> {
    fn forward(&self, x: &Tensor<E, 2>, layer: &Layer<E>, graph: &Graph<E>) -> Result<(Tensor<E, 2>, Routing<E>)> {
        let moe = graph.config.moe.as_ref().expect("a sparse layer exists only with experts configured");
        let normed = rms_norm(x, &layer.post_norm, graph.eps())?;
        let logits = linear(&normed, &self.router, None, None)?;
        let routing = routing(&logits, moe.experts_per_token, moe.norm_topk_prob)?;
        let shared = swiglu_linear(&linear(&normed, &self.shared.gate_up, None, None)?, &self.shared.down, None)?;
        let gate = linear(&normed, &self.shared_gate, None, None)?;
        let mixed = mixture(x, &normed, &routing, &self.experts, &shared, &gate)?;
        Ok((mixed, routing))
    }
}
