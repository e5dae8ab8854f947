//! The documents of a batch cut into the blocks that attention walks over, and which rows of a matrix the positions of a block
//! are: of a document that begins as an earlier one does, the first are that one's. Knows no heads and no sums.

use super::attention_operands::Positions;
use super::attention_tile::BLOCK;
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use std::ops::Range;

/// Up to 64 positions of a document, from a multiple of 64 on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block {
    /// The row of the document's first token, and of the first of its own.
    pub prefix: usize,
    pub own: usize,
    /// Tokens of the document that are an earlier one's, and all of them.
    pub shared: usize,
    pub len: usize,
    /// Position of the block's first token, counted from the document's start.
    pub first: usize,
    /// Number of the document's first block among all blocks; the packed keys of block b lie at place b.
    pub base: usize,
}

impl Block {
    /// Tokens in this block.
    pub fn count(&self) -> usize {
        (self.len - self.first).min(BLOCK)
    }

    /// The rows of the document's tokens at `positions`.
    #[inline(always)]
    pub fn rows(&self, positions: Range<usize>) -> Positions {
        Positions {
            prefix: self.prefix + positions.start,
            shared: self.shared.saturating_sub(positions.start).min(positions.len()),
            own: self.own + positions.start.saturating_sub(self.shared),
            count: positions.len(),
        }
    }

    /// The rows of this block.
    #[inline(always)]
    pub fn all_rows(&self) -> Positions {
        self.rows(self.first..self.first + self.count())
    }
}

/// All blocks of a batch of documents, in order.
pub(super) struct Blocks {
    /// `[blocks, 6]`: the fields of [`Block`], in a recycled buffer because attention runs in every layer.
    table: Buffer<i32>,
    pub tokens: usize,
}

impl Blocks {
    /// - `cu_seqlens`, `prefixes`: as of [`super::attention::Attention`]
    ///
    /// Errors: [`Error::Argument`] for borders or prefixes that do not fit `tokens` rows.
    pub fn new(op: &'static str, cu_seqlens: &[i32], prefixes: &[Range<u32>], tokens: usize) -> Result<Self> {
        let fits = cu_seqlens.first() == Some(&0)
            && cu_seqlens.last().is_some_and(|last| *last as usize == tokens)
            && cu_seqlens.windows(2).all(|pair| pair[0] <= pair[1]);
        if !fits {
            let (shown, more) = (&cu_seqlens[..cu_seqlens.len().min(8)], if cu_seqlens.len() > 8 { " and more" } else { "" });
            let expected = format!("ascending document borders from 0 to {tokens} tokens");
            return Err(Error::argument(op, "cu_seqlens", expected, format!("{shown:?}{more}")));
        }
        let prefix_of = |index: usize| prefixes.get(index).map_or(0..0, |prefix| prefix.start as i32..prefix.end as i32);
        for index in 0..prefixes.len() {
            let prefix = prefix_of(index);
            // The last document that begins at or before that row; empty ones come before it.
            let earlier = cu_seqlens.partition_point(|border| *border <= prefix.start).saturating_sub(1);
            let begins = || earlier < index && cu_seqlens[earlier] == prefix.start && prefix.end <= cu_seqlens[earlier + 1];
            if prefixes.len() + 1 != cu_seqlens.len() || !(prefix.is_empty() || begins() && prefix_of(earlier).is_empty()) {
                let expected = "for each document none, or the beginning of an earlier one that is whole";
                return Err(Error::argument(op, "prefixes", expected, format!("{prefix:?}, number {index}")));
            }
        }
        let documents = || {
            cu_seqlens.windows(2).enumerate().map(|(index, pair)| {
                let prefix = prefix_of(index);
                let (shared, own) = (prefix.len() as i32, pair[0]);
                (if shared > 0 { prefix.start } else { own }, own, shared, shared + pair[1] - own)
            })
        };
        let count: usize = documents().map(|(.., len)| (len as usize).div_ceil(BLOCK)).sum();
        let mut table = Buffer::scratch(count * 6);
        let mut base = 0;
        for (prefix, own, shared, len) in documents() {
            let blocks = (len as usize).div_ceil(BLOCK);
            for (block, row) in table[base * 6..][..blocks * 6].chunks_exact_mut(6).enumerate() {
                row.copy_from_slice(&[prefix, own, shared, len, (block * BLOCK) as i32, base as i32]);
            }
            base += blocks;
        }
        Ok(Self { table, tokens })
    }

    pub fn len(&self) -> usize {
        self.table.len() / 6
    }

    pub fn get(&self, index: usize) -> Block {
        let mut fields = self.table[index * 6..][..6].iter().map(|field| *field as usize);
        let mut next = || fields.next().expect("six fields");
        Block { prefix: next(), own: next(), shared: next(), len: next(), first: next(), base: next() }
    }
}
