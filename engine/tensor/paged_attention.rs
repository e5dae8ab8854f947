//! Rotary positions and causal attention of new tokens over a cache of earlier keys and values: generation's attention step.
//! Not differentiable. The loops are in kernels/cpu/attention_paged.rs; which text has which blocks is the scheduler's matter.

use super::ModelElement;
use super::attention::{Heads, RopeTables};
use super::cuda::paged_attention as cuda;
use super::place::Place;
use super::typed::Tensor;
use crate::error::{Error, Result};
use crate::kernels::available_memory::available_bytes;
use crate::kernels::buffer::Buffer;
use crate::kernels::cpu::attention::Attention as Settings;
pub use crate::kernels::cpu::attention_paged::{BLOCK_POSITIONS, Span};
use crate::kernels::cpu::attention_paged::{KvBlocks as HostBlocks, paged_attention as kernel};
use crate::kernels::cpu::rope;
use std::sync::OnceLock;

/// Memory of cached keys and values, all layers of a model together, where the model lies.
pub enum KvBlocks {
    Host(HostBlocks),
    Cuda(cuda::DeviceBlocks),
}

impl KvBlocks {
    /// A cache without blocks for a model of element type `E` at `place`.
    ///
    /// Errors: those of the device.
    pub fn new<E: ModelElement>(place: &Place, heads: Heads, layers: usize) -> Result<Self> {
        match place {
            Place::Host => Ok(Self::Host(HostBlocks::new::<E>(heads, layers))),
            Place::Cuda(device) => Ok(Self::Cuda(cuda::DeviceBlocks::new(device, heads, layers, E::DTYPE)?)),
        }
    }

    /// Those of a model on a device, where steps that continue texts are captured (cuda/decode.rs).
    pub fn on_device(&mut self) -> Option<&mut cuda::DeviceBlocks> {
        match self {
            Self::Host(_) => None,
            Self::Cuda(blocks) => Some(blocks),
        }
    }

    /// Bytes of one block.
    pub fn block_bytes(&self) -> usize {
        match self {
            Self::Host(blocks) => blocks.block_bytes(),
            Self::Cuda(blocks) => blocks.block_bytes(),
        }
    }

    /// Bytes that are free for blocks, if the system says it.
    pub fn bytes_free(&self) -> Option<u64> {
        match self {
            Self::Host(_) => available_bytes(),
            Self::Cuda(blocks) => Some(blocks.bytes_free()),
        }
    }

    /// Makes room for block `id`.
    ///
    /// Errors: [`Error::Device`] if the device has none left.
    pub fn make(&mut self, id: u32) -> Result<()> {
        match self {
            Self::Host(blocks) => {
                blocks.make(id);
                Ok(())
            }
            Self::Cuda(blocks) => blocks.make(id),
        }
    }

    /// Gives the memory of block `id` back; a device keeps it for the next one.
    pub fn drop_block(&mut self, id: u32) {
        match self {
            Self::Host(blocks) => blocks.drop_block(id),
            Self::Cuda(_) => {}
        }
    }

    /// Makes block `to` a copy of block `from`.
    ///
    /// Errors: as [`KvBlocks::make`].
    pub fn copy(&mut self, from: u32, to: u32) -> Result<()> {
        match self {
            Self::Host(blocks) => {
                blocks.copy(from, to);
                Ok(())
            }
            Self::Cuda(blocks) => blocks.copy(from, to),
        }
    }
}

/// The new tokens of some texts, end to end in their order.
pub struct Texts {
    spans: Vec<Span>,
    on_device: OnceLock<cuda::Step>,
}

impl Texts {
    /// With blocks for them in the cache.
    pub fn new(spans: Vec<Span>) -> Self {
        Self { spans, on_device: OnceLock::new() }
    }
}

/// Turns new queries and keys to their positions, keeps the keys and values, and mixes for each new token the values of its
/// text so far, with the bits of [`super::attention::attention`] over the whole text.
///
/// - `qkv`: `[tokens, (heads + 2 * kv_heads) * head_dim]`, queries, keys, values of the new tokens
/// - `texts`: the texts that they belong to, with blocks for them in `cache`
/// - `layer`: whose keys and values these are
/// - `window`: keys that a query sees, itself included; all earlier ones of its text if none
/// - returns `[tokens, heads * head_dim]`
///
/// Errors: [`Error::Shape`] if `qkv` has another width.
pub fn paged_attention<E: ModelElement>(
    qkv: &Tensor<E, 2>,
    heads: Heads,
    tables: &RopeTables,
    texts: &Texts,
    cache: &mut KvBlocks,
    layer: usize,
    window: Option<usize>,
) -> Result<Tensor<E, 2>> {
    let [tokens, width] = qkv.shape();
    if width != heads.width() {
        let (expected, got) = (format!("[tokens, {}]", heads.width()), format!("[{tokens}, {width}]"));
        return Err(Error::Shape { op: "paged_attention", arg: "qkv", expected, got });
    }
    let cache = match cache {
        KvBlocks::Host(blocks) => blocks,
        KvBlocks::Cuda(blocks) => {
            let device = qkv.device().expect("the cache lies where the model does");
            let step = match texts.on_device.get() {
                Some(step) => step,
                None => {
                    let step = cuda::Step::new(device, &texts.spans, E::DTYPE)?;
                    texts.on_device.get_or_init(|| step)
                }
            };
            return cuda::paged_attention(device, qkv, heads, tables.cuda(), (&texts.spans, step), blocks, layer, window);
        }
    };
    let mut turned = Buffer::scratch(qkv.values().len());
    let (cos, sin) = tables.host();
    rope::rope(qkv.values(), &mut turned, heads, cos, sin)?;
    let scale = heads.scale();
    let mut mixed = Buffer::<E>::scratch(tokens * heads.heads * heads.head_dim);
    kernel(&Settings { heads, cu_seqlens: &[], prefixes: &[], scale, window }, &turned, &texts.spans, cache, layer, &mut mixed);
    Tensor::new([tokens, heads.heads * heads.head_dim], mixed)
}
