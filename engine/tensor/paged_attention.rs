//! Rotary positions and causal attention of new tokens over a cache of earlier keys and values: generation's attention step.
//! Not differentiable. The loops are in kernels/cpu/attention_paged.rs; which text has which blocks is the scheduler's matter.

use super::ModelElement;
use super::attention::{Heads, RopeTables};
use super::typed::Tensor;
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use crate::kernels::cpu::attention::Attention as Settings;
use crate::kernels::cpu::attention_paged::paged_attention as kernel;
pub use crate::kernels::cpu::attention_paged::{BLOCK_POSITIONS, KvBlocks, Span};
use crate::kernels::cpu::rope;

/// Turns new queries and keys to their positions, keeps the keys and values, and mixes for each new token the values of its
/// text so far, with the bits of [`super::attention::attention`] over the whole text.
///
/// - `qkv`: `[tokens, (heads + 2 * kv_heads) * head_dim]`, queries, keys, values of the new tokens
/// - `spans`: the texts that they belong to, with blocks for them in `cache`
/// - `layer`: whose keys and values these are
/// - `window`: keys that a query sees, itself included; all earlier ones of its text if none
/// - returns `[tokens, heads * head_dim]`
///
/// Errors: [`Error::Shape`] if `qkv` has another width.
pub fn paged_attention<E: ModelElement>(
    qkv: &Tensor<E, 2>,
    heads: Heads,
    tables: &RopeTables,
    spans: &[Span],
    cache: &mut KvBlocks,
    layer: usize,
    window: Option<usize>,
) -> Result<Tensor<E, 2>> {
    let [tokens, width] = qkv.shape();
    if width != heads.width() {
        let (expected, got) = (format!("[tokens, {}]", heads.width()), format!("[{tokens}, {width}]"));
        return Err(Error::Shape { op: "paged_attention", arg: "qkv", expected, got });
    }
    let mut turned = Buffer::copy_of(qkv.values());
    rope::rope(&mut turned, heads, tables.cos(), tables.sin())?;
    let scale = (heads.head_dim as f32).sqrt().recip();
    let mut mixed = Buffer::<E>::scratch(tokens * heads.heads * heads.head_dim);
    kernel(&Settings { heads, cu_seqlens: &[], scale, window }, &turned, spans, cache, layer, &mut mixed);
    Tensor::new([tokens, heads.heads * heads.head_dim], mixed)
}
