//! A model over texts whose earlier keys and values are cached: what generation asks of it. The same graph and the same
//! weights as training, in place.

use super::any::Model;
use crate::error::Result;
use crate::tensor::autograd::with_recording;
pub use crate::tensor::head::{Change, Draw, Likely, LogitRows};
use crate::tensor::paged_attention::KvBlocks;
pub use crate::tensor::paged_attention::{BLOCK_POSITIONS, Span};
use crate::tensor::select_rows::{row_ids, select_rows};
use crate::tensor::{ModelElement, head};
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// Most bytes of logits that exist together.
const LOGITS_BYTES: usize = 64 << 20;

/// Cached keys and values of a model's texts.
pub type Cache = Arc<Mutex<KvBlocks>>;

/// Sees the logits of some of the wanted rows: their range, and the rows.
pub type EachLogits<'a> = dyn FnMut(Range<usize>, &LogitRows) -> Result<()> + 'a;

/// The new tokens of some texts, end to end.
#[derive(Debug, Default)]
pub struct NewTokens {
    /// `[tokens]`
    pub tokens: Vec<i32>,
    /// `[tokens]`: the place of each in its text.
    pub position_ids: Vec<i32>,
    pub spans: Vec<Span>,
    /// Indices of the tokens whose logits are wanted.
    pub rows: Vec<usize>,
}

impl NewTokens {
    /// Adds the next tokens of a text at `position`, whose `blocks` have room for them.
    pub fn push(&mut self, tokens: &[i32], position: usize, blocks: &[u32]) {
        self.spans.push(Span { row: self.tokens.len(), count: tokens.len(), position, blocks: blocks.to_vec() });
        self.position_ids.extend(position as i32..(position + tokens.len()) as i32);
        self.tokens.extend_from_slice(tokens);
    }
}

impl Model {
    /// A cache for this model's keys and values, without blocks.
    ///
    /// Errors: those of the device.
    pub fn cache(&self) -> Result<Cache> {
        on_graph!(self, graph => Ok(Arc::new(Mutex::new(blocks_of(graph)?))))
    }

    /// Runs new tokens and hands the logits of the wanted rows to `each`, some rows at a time: the range among
    /// `input.rows`, and the rows. They have the bits that [`Model::logits`] gives for the whole text.
    ///
    /// Errors: [`crate::error::Error::Argument`] for a token outside the vocabulary, or a model that scores; those of `each`.
    pub fn logits_paged(&self, input: NewTokens, cache: &Cache, each: &mut EachLogits) -> Result<()> {
        self.check_language("generate")?;
        let NewTokens { tokens, position_ids, spans, rows } = input;
        on_graph!(self, graph => with_recording(false, || {
            let continues = rows.len() == tokens.len() && spans.iter().all(|span| span.count == 1);
            if continues && let Some(logits) = graph.continue_captured(&tokens, &spans, cache)? {
                return each(0..rows.len(), &logits);
            }
            let forward = graph.forward_paged(&tokens, &position_ids, spans, cache)?;
            let chunk = (LOGITS_BYTES / (4 * graph.config.vocab)).max(1);
            for start in (0..rows.len()).step_by(chunk) {
                let range = start..rows.len().min(start + chunk);
                let wanted = select_rows("generate", &forward.hidden, &row_ids(&rows[range.clone()]))?;
                each(range, &head::logit_rows(&graph.final_norm(&wanted)?, &graph.head)?)?;
            }
            Ok(())
        }))
    }
}

fn blocks_of<E: ModelElement>(graph: &super::graph::Graph<E>) -> Result<KvBlocks> {
    KvBlocks::new::<E>(graph.place(), graph.heads(), graph.config.layers)
}
