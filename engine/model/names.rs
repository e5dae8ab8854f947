//! Which Hugging Face tensor is which rows of which parameter. The graph keeps q, k and v in one matrix, and gate and
//! up in another; files keep them apart. Everything that speaks of tensors by name (checkpoints, gradients shown to a
//! script, optimizer groups) goes through this table.
//! Source: the hub layout of Qwen2 and Qwen2-MoE checkpoints.

use super::graph::{Graph, Mlp};
use crate::tensor::experts::Expert;
use crate::tensor::{ModelElement, Parameter};
use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

/// A tensor of the checkpoint format and where it lies.
#[derive(Clone)]
pub struct Named<E: ModelElement> {
    /// For example `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// Its own shape: `[out, in]` or `[n]`.
    pub shape: Vec<usize>,
    pub parameter: Arc<Parameter<E>>,
    /// The rows of the parameter that it is.
    pub rows: Range<usize>,
}

impl<E: ModelElement> Graph<E> {
    /// Every tensor of the model, in the order in which transformers lists parameters; a tied head is not listed.
    pub fn named(&self) -> Vec<Named<E>> {
        let mut list = List { named: Vec::new() };
        list.matrix("model.embed_tokens.weight", &self.embed);
        let (query, key) = (self.config.heads * self.config.head_dim, self.config.kv_heads * self.config.head_dim);
        for (index, layer) in self.layers.iter().enumerate() {
            let prefix = format!("model.layers.{index}");
            let parts = [("q", 0..query), ("k", query..query + key), ("v", query + key..query + 2 * key)];
            for (part, rows) in &parts {
                list.add(format!("{prefix}.self_attn.{part}_proj.weight"), &layer.qkv, rows.clone(), true);
                list.add(format!("{prefix}.self_attn.{part}_proj.bias"), &layer.qkv_bias, rows.clone(), false);
            }
            list.matrix(&format!("{prefix}.self_attn.o_proj.weight"), &layer.o);
            match &layer.mlp {
                Mlp::Dense(mlp) => list.whole_expert(&format!("{prefix}.mlp"), mlp),
                Mlp::Sparse(sparse) => {
                    list.matrix(&format!("{prefix}.mlp.gate.weight"), &sparse.router);
                    for index in 0..sparse.experts.count() {
                        list.expert(&format!("{prefix}.mlp.experts.{index}"), sparse.experts.get(index));
                    }
                    list.whole_expert(&format!("{prefix}.mlp.shared_expert"), &sparse.shared);
                    list.matrix(&format!("{prefix}.mlp.shared_expert_gate.weight"), &sparse.shared_gate);
                }
            }
            list.vector(&format!("{prefix}.input_layernorm.weight"), &layer.input_norm);
            list.vector(&format!("{prefix}.post_attention_layernorm.weight"), &layer.post_norm);
        }
        list.vector("model.norm.weight", &self.norm);
        if self.config.score {
            list.matrix("score.weight", &self.head);
        } else if !Arc::ptr_eq(&self.embed, &self.head) {
            list.matrix("lm_head.weight", &self.head);
        }
        list.named
    }

    /// The parameters of low-rank parts, merged or not, in the order of [`Graph::named`]: for `q_proj.weight` they are
    /// `q_proj.lora_A.weight`, `q_proj.lora_B.weight` and, with DoRA, `q_proj.lora_magnitude_vector`; those of the embedding are
    /// `embed_tokens.lora_embedding_A` and `embed_tokens.lora_embedding_B`. On a device those of experts are rows of one parameter.
    pub fn named_adapters(&self) -> Vec<Named<E>> {
        let mut list = List { named: Vec::new() };
        if let Some(part) = self.embed.any_embedding_part() {
            list.matrix("model.embed_tokens.lora_embedding_A", &part.a);
            list.matrix("model.embed_tokens.lora_embedding_B", &part.b);
        }
        for named in self.modules() {
            let module = named.name.trim_end_matches(".weight");
            for part in named.parameter.all_adapters().iter() {
                let (index, rows) = part.stack.place(&named.rows);
                if part.rows != rows {
                    continue;
                }
                let of = |rows: usize| index * rows..(index + 1) * rows;
                list.add(format!("{module}.lora_A.weight"), &part.a, of(part.rank()), true);
                list.add(format!("{module}.lora_B.weight"), &part.b, of(rows.len()), true);
                if let Some(magnitude) = &part.magnitude {
                    list.add(format!("{module}.lora_magnitude_vector"), &magnitude.lengths, of(rows.len()), false);
                }
            }
        }
        list.named
    }

    /// The weights of products: matrices of the layers, and the head over the vocabulary, also where it is the embedding.
    pub fn modules(&self) -> Vec<Named<E>> {
        let is_module = |named: &Named<E>| named.shape.len() == 2 && named.name.starts_with("model.layers.");
        let mut list = List { named: self.named().into_iter().filter(is_module).collect() };
        if !self.config.score {
            list.matrix("lm_head.weight", &self.head);
        }
        list.named
    }

    /// Whether embedding and head are one matrix, and an adapter makes two of it.
    pub fn is_torn(&self) -> bool {
        Arc::ptr_eq(&self.embed, &self.head) && self.embed.is_adapted()
    }

    /// Every parameter once: weights in the order of [`Graph::named`], then those of [`Graph::named_adapters`].
    pub fn parameters(&self) -> Vec<Arc<Parameter<E>>> {
        let mut parameters = self.weights();
        parameters.extend(once(self.named_adapters()));
        parameters
    }

    /// Every parameter once, without those of low-rank parts.
    pub fn weights(&self) -> Vec<Arc<Parameter<E>>> {
        let mut parameters: Vec<Arc<Parameter<E>>> = Vec::new();
        for named in self.named() {
            // The rows of one parameter stand near each other, but a bias stands between q's and k's weights.
            if !parameters.iter().rev().take(4).any(|known| Arc::ptr_eq(known, &named.parameter)) {
                parameters.push(named.parameter);
            }
        }
        parameters
    }
}

/// The parameters of tensors, each once, in their order.
pub fn once<E: ModelElement>(tensors: Vec<Named<E>>) -> impl Iterator<Item = Arc<Parameter<E>>> {
    let mut seen = HashSet::new();
    tensors.into_iter().map(|tensor| tensor.parameter).filter(move |parameter| seen.insert(Arc::as_ptr(parameter)))
}

struct List<E: ModelElement> {
    named: Vec<Named<E>>,
}

impl<E: ModelElement> List<E> {
    fn add(&mut self, name: String, parameter: &Arc<Parameter<E>>, rows: Range<usize>, matrix: bool) {
        let shape = if matrix { vec![rows.len(), parameter.columns()] } else { vec![rows.len()] };
        self.named.push(Named { name, shape, parameter: parameter.clone(), rows });
    }

    fn matrix(&mut self, name: &str, parameter: &Arc<Parameter<E>>) {
        self.add(name.into(), parameter, 0..parameter.rows(), true);
    }

    fn vector(&mut self, name: &str, parameter: &Arc<Parameter<E>>) {
        self.add(name.into(), parameter, 0..parameter.rows(), false);
    }

    fn whole_expert(&mut self, prefix: &str, expert: &Expert<E>) {
        self.expert(prefix, (expert, 0..expert.gate_up.rows(), 0..expert.down.rows()));
    }

    /// An expert that is these rows of both weights, gate before up.
    fn expert(&mut self, prefix: &str, (expert, gate_up, down): (&Expert<E>, Range<usize>, Range<usize>)) {
        let middle = gate_up.start + gate_up.len() / 2;
        self.add(format!("{prefix}.gate_proj.weight"), &expert.gate_up, gate_up.start..middle, true);
        self.add(format!("{prefix}.up_proj.weight"), &expert.gate_up, middle..gate_up.end, true);
        self.add(format!("{prefix}.down_proj.weight"), &expert.down, down, true);
    }
}
