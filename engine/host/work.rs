//! Counts what models compute for a run, for the numbers that progress shows: tokens and floating-point operations.

use crate::model::Model;
use crate::model::sizes::parameters;
use crate::tensor::autograd::is_recording;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// The work of one Lua state since it began.
#[derive(Default)]
pub struct Work {
    tokens: AtomicU64,
    operations: AtomicU64,
}

impl Work {
    /// Tokens that went through models, and floating-point operations.
    pub fn so_far(&self) -> (u64, u64) {
        (self.tokens.load(Relaxed), self.operations.load(Relaxed))
    }

    /// A forward pass of `model` over packed documents, with the backward pass it will have if it is recorded.
    ///
    /// Operations: two a weight that a token passes, the head included, and for attention 4 heads head_dim a pair of a
    /// token and one it sees; a backward pass costs two forward passes. Layers that are computed again are not counted
    /// again: this is the work asked for, as the share of peak is usually quoted (PaLM, arXiv 2204.02311, appendix B).
    pub fn forward(&self, model: &Model, cu_seqlens: &[u32], trains: bool) {
        let config = model.config();
        let tokens = u64::from(cu_seqlens.last().copied().unwrap_or(0));
        let pairs: u64 = cu_seqlens.windows(2).map(|border| u64::from(border[1] - border[0])).map(|len| len * (len + 1) / 2).sum();
        let weights = parameters(config).activated + (config.vocab * config.hidden) as u64;
        let attention = (config.layers * 4 * config.heads * config.head_dim) as u64 * pairs;
        let passes = if trains && is_recording() { 3 } else { 1 };
        self.tokens.fetch_add(tokens, Relaxed);
        self.operations.fetch_add(passes * (2 * weights * tokens + attention), Relaxed);
    }
}
