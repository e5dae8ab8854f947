//! Documents into rows of a given length, and rows into a batch, with the borders between documents kept.
//! Not a reader: documents are handed in. Labels are shifted here, once: `labels[t]` is what position `t` should predict.
//! Source: Ding et al., "Fewer truncations improve language modeling", arXiv 2404.10830 (best-fit packing).

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;

use super::shuffle::Permutation;
use crate::error::{Error, Result};

/// The label of a position that no loss counts.
pub const IGNORED: i32 = -100;

/// Documents that best-fit packing chooses among at a time, unless told otherwise.
pub const BEST_FIT_POOL: usize = 1024;

/// How documents become rows. Lengths are in tokens and count inputs; the label of a row's last position may lie beyond it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Packing {
    /// One after another, cut where a row is full; the rest of a cut document begins the next row as a document of its own.
    Concat { seq_len: usize },
    /// Whole documents into the fullest row that still has room, longest first among `pool` documents; only documents longer
    /// than a row are cut. Rows may be shorter than `seq_len`.
    BestFit { seq_len: usize, pool: usize },
    /// One long text cut into windows: one after another, or, when the data set is shuffled, in an order and from a first place that are
    /// others each epoch.
    Windows { seq_len: usize },
    /// What a record gives, uncut: one document, or two for a pair.
    Whole,
}

impl Packing {
    /// Most tokens of a row, if there is such a number.
    pub fn seq_len(&self) -> Option<usize> {
        match self {
            Self::Concat { seq_len } | Self::BestFit { seq_len, .. } | Self::Windows { seq_len } => Some(*seq_len),
            Self::Whole => None,
        }
    }

    /// Errors: [`Error::Argument`] for a zero length, or a pool without documents.
    pub fn check(&self) -> Result<()> {
        if let Some(seq_len) = self.seq_len().filter(|seq_len| *seq_len == 0 || *seq_len > i32::MAX as usize) {
            return Err(Error::argument("data.pack", "seq_len", format!("from 1 to {} tokens", i32::MAX), seq_len));
        }
        if let Self::BestFit { pool: 0, .. } = self {
            return Err(Error::argument("data.pack", "pool", "at least 1 document", 0));
        }
        Ok(())
    }
}

/// The tokens of a document, and which of them the model learns to produce.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Document {
    pub tokens: Vec<u32>,
    /// `[tokens]`; `None` means all.
    pub supervised: Option<Vec<bool>>,
}

impl Document {
    /// A document whose every token is learned (the first has nothing before it to be predicted from).
    pub fn all(tokens: Vec<u32>) -> Self {
        Self { tokens, supervised: None }
    }

    /// What position `at` should predict.
    fn label(&self, at: usize) -> i32 {
        match self.tokens.get(at + 1) {
            Some(token) if self.supervised.as_ref().is_none_or(|supervised| supervised[at + 1]) => *token as i32,
            _ => IGNORED,
        }
    }

    fn piece(&self, range: std::ops::Range<usize>) -> Piece {
        Piece {
            tokens: self.tokens[range.clone()].iter().map(|token| *token as i32).collect(),
            labels: range.map(|at| self.label(at)).collect(),
        }
    }

    fn check(&self) {
        if let Some(supervised) = &self.supervised {
            assert_eq!(supervised.len(), self.tokens.len(), "a mask of another length than its document");
        }
    }
}

/// A part of one document inside a row: attention stays within it and its positions start at 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    tokens: Vec<i32>,
    labels: Vec<i32>,
}

impl Piece {
    #[allow(clippy::len_without_is_empty, reason = "a piece is never empty")]
    pub fn len(&self) -> usize {
        self.tokens.len()
    }
}

/// One row: pieces that together have at most `seq_len` tokens.
pub type Row = Vec<Piece>;

/// Rows laid end to end, ready for attention of variable length.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenBatch {
    /// `[tokens]`
    pub tokens: Vec<i32>,
    /// `[tokens]`: what each position should predict, or [`IGNORED`].
    pub labels: Vec<i32>,
    /// `[tokens]`: counted from the document's start, its prefix included.
    pub position_ids: Vec<i32>,
    /// `[documents + 1]`: where each document begins, and the end.
    pub cu_seqlens: Vec<u32>,
    /// `[rows + 1]`: where each row begins, and the end.
    pub row_starts: Vec<u32>,
    /// `[documents]`: the rows of an earlier document that stand before each one's own, and are computed once. Empty if no
    /// document shares any.
    pub prefixes: Vec<Range<u32>>,
}

impl TokenBatch {
    /// Lays rows end to end.
    pub fn from_rows(rows: &[Row]) -> Self {
        let mut batch = Self { cu_seqlens: vec![0], row_starts: vec![0], ..Self::default() };
        for row in rows {
            for Piece { tokens, labels } in row {
                batch.push(tokens, labels, None);
            }
            batch.row_starts.push(batch.tokens.len() as u32);
        }
        batch
    }

    /// One row a document, uncut. Documents without tokens become no row.
    pub fn from_documents(documents: &[Document]) -> Self {
        let rows: Vec<Row> = documents.iter().map(|document| whole_row(std::slice::from_ref(document))).collect();
        Self::from_rows(&rows.into_iter().filter(|row| !row.is_empty()).collect::<Vec<_>>())
    }

    /// Lays pairs end to end, a row of two documents each, of which the second shares the prompt of the first.
    pub fn from_pairs(pairs: &[Row]) -> Self {
        let mut batch = Self { cu_seqlens: vec![0], row_starts: vec![0], ..Self::default() };
        for pair in pairs {
            let first = batch.documents();
            for (index, Piece { tokens, labels }) in pair.iter().enumerate() {
                batch.push(tokens, labels, (index > 0).then_some(first));
            }
            batch.row_starts.push(batch.tokens.len() as u32);
        }
        batch
    }

    /// Appends a document. With `like`, the number of an earlier whole document, it shares that one's rows as far as the
    /// tokens are the same and nothing is learned at them; at least its last token stays its own.
    pub fn push(&mut self, tokens: &[i32], labels: &[i32], like: Option<usize>) {
        assert_eq!(tokens.len(), labels.len());
        let prefix = like.map_or(0..0, |like| {
            let (start, end) = (self.cu_seqlens[like], self.cu_seqlens[like + 1]);
            let earlier = start as usize..end as usize;
            let pairs = self.tokens[earlier.clone()].iter().zip(&self.labels[earlier]).zip(tokens.iter().zip(labels));
            let shared =
                pairs.take_while(|((token, label), (own, own_label))| token == own && **label == IGNORED && **own_label == IGNORED);
            let shared = shared.count().min(tokens.len().saturating_sub(1)) as u32;
            if shared == 0 { 0..0 } else { start..start + shared }
        });
        if !prefix.is_empty() || !self.prefixes.is_empty() {
            self.prefixes.resize(self.documents(), 0..0);
            self.prefixes.push(prefix.clone());
        }
        self.tokens.extend_from_slice(&tokens[prefix.len()..]);
        self.labels.extend_from_slice(&labels[prefix.len()..]);
        self.position_ids.extend(prefix.len() as i32..tokens.len() as i32);
        self.cu_seqlens.push(self.tokens.len() as u32);
    }

    /// Rows in the batch.
    pub fn rows(&self) -> usize {
        self.row_starts.len().saturating_sub(1)
    }

    /// Documents in the batch.
    pub fn documents(&self) -> usize {
        self.cu_seqlens.len().saturating_sub(1)
    }

    /// `[tokens]`: the index of the document to which each token belongs.
    pub fn sequence(&self) -> Vec<i32> {
        let lengths = self.cu_seqlens.windows(2).map(|border| (border[1] - border[0]) as usize);
        lengths.enumerate().flat_map(|(index, length)| std::iter::repeat_n(index as i32, length)).collect()
    }

    /// Positions that a loss counts.
    pub fn supervised(&self) -> usize {
        self.labels.iter().filter(|label| **label != IGNORED).count()
    }

    /// Appends `pad` as one more document until `tokens` is a multiple of `multiple`. Padding has no labels, so it never counts.
    pub fn pad_to_multiple(&mut self, multiple: usize, pad: u32) {
        let missing = self.tokens.len().next_multiple_of(multiple.max(1)) - self.tokens.len();
        if missing == 0 {
            return;
        }
        self.push(&vec![pad as i32; missing], &vec![IGNORED; missing], None);
    }
}

/// Packs one document after another; the rest of one that a row cuts begins the next row.
#[derive(Debug, Clone)]
pub struct ConcatPacker {
    pub seq_len: usize,
    document: Document,
    /// Tokens of `document` that are in rows already.
    used: usize,
}

impl ConcatPacker {
    pub fn new(seq_len: usize) -> Self {
        Self::within(seq_len, Document::default(), 0)
    }

    /// One that goes on in a document of which `used` tokens are in rows already.
    pub fn within(seq_len: usize, document: Document, used: usize) -> Self {
        assert!(seq_len > 0);
        document.check();
        assert!(used <= document.tokens.len(), "{used} of {} tokens", document.tokens.len());
        Self { seq_len, document, used }
    }

    /// Tokens of the document that the last row cut that are in rows; 0 if it cut none.
    pub fn used(&self) -> usize {
        if self.used < self.document.tokens.len() { self.used } else { 0 }
    }

    /// The next row, from documents that `next` gives. The last one may be short; `None` after it.
    ///
    /// Errors: those of `next`.
    pub fn row(&mut self, mut next: impl FnMut() -> Result<Option<Document>>) -> Result<Option<Row>> {
        let (mut row, mut filled) = (Row::new(), 0);
        while filled < self.seq_len {
            let left = self.document.tokens.len() - self.used;
            if left == 0 {
                let Some(document) = next()? else { break };
                document.check();
                (self.document, self.used) = (document, 0);
                continue;
            }
            let take = left.min(self.seq_len - filled);
            row.push(self.document.piece(self.used..self.used + take));
            filled += take;
            self.used += take;
        }
        Ok(Some(row).filter(|row| !row.is_empty()))
    }
}

/// Packs pools of documents. Between pools nothing is carried over.
#[derive(Debug, Clone)]
pub struct BestFitPacker {
    seq_len: usize,
    pool: usize,
    pools: u64,
    ready: VecDeque<Row>,
}

impl BestFitPacker {
    /// - `pools`: how many pools were packed before, which decides the order of the next pool's rows
    pub fn new(seq_len: usize, pool: usize, pools: u64) -> Self {
        assert!(seq_len > 0 && pool > 0);
        Self { seq_len, pool, pools, ready: VecDeque::new() }
    }

    /// The same settings, at the beginning of pool `pools`.
    pub fn fresh(&self, pools: u64) -> Self {
        Self::new(self.seq_len, self.pool, pools)
    }

    /// Whether the next call to [`BestFitPacker::row`] begins a new pool.
    pub fn at_pool_start(&self) -> bool {
        self.ready.is_empty()
    }

    pub fn pools(&self) -> u64 {
        self.pools
    }

    /// Rows of this pool that are still to come.
    pub fn ready(&self) -> usize {
        self.ready.len()
    }

    /// The next row; `None` when `next` has no more documents and all rows are out.
    ///
    /// Errors: those of `next`.
    pub fn row(&mut self, mut next: impl FnMut() -> Result<Option<Document>>) -> Result<Option<Row>> {
        if self.ready.is_empty() {
            let mut documents = Vec::new();
            while documents.len() < self.pool {
                let Some(document) = next()? else { break };
                document.check();
                // An empty document has no place in a row; a pool of such must not look like the end.
                if !document.tokens.is_empty() {
                    documents.push(document);
                }
            }
            let mut rows = best_fit(&documents, self.seq_len);
            // Long documents open the first rows; a shuffled order keeps length and time apart.
            let order = Permutation::new(rows.len() as u64, 0, self.pools);
            self.ready = (0..rows.len()).map(|index| std::mem::take(&mut rows[order.at(index as u64) as usize])).collect();
            self.pools += u64::from(!self.ready.is_empty());
        }
        Ok(self.ready.pop_front())
    }
}

/// Best fit, decreasing: the longest piece first, each into the row with the least room that still holds it.
fn best_fit(documents: &[Document], seq_len: usize) -> Vec<Row> {
    let mut pieces: Vec<Piece> = Vec::new();
    for document in documents {
        let starts = (0..document.tokens.len()).step_by(seq_len);
        pieces.extend(starts.map(|start| document.piece(start..(start + seq_len).min(document.tokens.len()))));
    }
    pieces.sort_by_key(|piece| std::cmp::Reverse(piece.tokens.len())); // Stable, so equal lengths keep their order.
    let mut rows: Vec<Row> = Vec::new();
    let mut room: BTreeSet<(usize, usize)> = BTreeSet::new();
    for piece in pieces {
        let size = piece.tokens.len();
        let (left, index) = room.range((size, 0)..).next().copied().unwrap_or_else(|| {
            rows.push(Row::new());
            (seq_len, rows.len() - 1)
        });
        room.remove(&(left, index));
        room.insert((left - size, index));
        rows[index].push(piece);
    }
    rows
}

/// Documents side by side in one row, uncut. Those without tokens are left out.
pub fn whole_row(documents: &[Document]) -> Row {
    documents.iter().filter(|document| !document.tokens.is_empty()).map(|document| document.piece(0..document.tokens.len())).collect()
}

/// The row of the window at `start`: up to `seq_len` tokens, each with its successor as label.
pub fn window(tokens: &[u32], start: usize, seq_len: usize) -> Row {
    assert!(start + 1 < tokens.len(), "a window at {start} of {} tokens", tokens.len());
    let end = (start + seq_len).min(tokens.len() - 1);
    let signed = |range: std::ops::Range<usize>| tokens[range].iter().map(|token| *token as i32).collect();
    vec![Piece { tokens: signed(start..end), labels: signed(start + 1..end + 1) }]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(documents: &[Document]) -> impl FnMut() -> Result<Option<Document>> + use<> {
        let mut left: VecDeque<Document> = documents.to_vec().into();
        move || Ok(left.pop_front())
    }

    fn rows(mut row: impl FnMut() -> Result<Option<Row>>) -> Vec<Row> {
        std::iter::from_fn(|| row().unwrap()).collect()
    }

    fn numbered(lengths: &[usize]) -> Vec<Document> {
        let mut next = 0;
        lengths
            .iter()
            .map(|length| {
                next += *length as u32;
                Document::all((next - *length as u32..next).collect())
            })
            .collect()
    }

    #[test]
    fn concatenation_cuts_rows_and_loses_no_label() {
        let mut packer = ConcatPacker::new(4);
        let mut next = feed(&numbered(&[3, 0, 6, 1]));
        let batch = TokenBatch::from_rows(&rows(|| packer.row(&mut next)));
        assert_eq!(batch.tokens, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
        // Position 3 ends a row in the middle of a document: its label is the next row's first token.
        assert_eq!(batch.labels, [1, 2, -100, 4, 5, 6, 7, 8, -100, -100]);
        assert_eq!(batch.position_ids, [0, 1, 2, 0, 0, 1, 2, 3, 0, 0]);
        assert_eq!((batch.cu_seqlens.clone(), batch.row_starts.clone()), (vec![0, 3, 4, 8, 9, 10], vec![0, 4, 8, 10]));
        assert_eq!((batch.supervised(), batch.rows(), batch.documents()), (7, 3, 5));
        assert_eq!(batch.sequence(), [0, 0, 0, 1, 2, 2, 2, 2, 3, 4]);
    }

    #[test]
    fn masks_travel_with_their_tokens_through_cuts() {
        let document = Document { tokens: vec![10, 11, 12, 13, 14], supervised: Some(vec![false, false, true, false, true]) };
        for seq_len in 1..=6 {
            let mut concat = ConcatPacker::new(seq_len);
            let mut next = feed(std::slice::from_ref(&document));
            let batch = TokenBatch::from_rows(&rows(|| concat.row(&mut next)));
            assert_eq!(batch.labels, [-100, 12, -100, 14, -100], "{seq_len}");
        }
        assert_eq!(TokenBatch::from_documents(&[Document::default(), document]).labels, [-100, 12, -100, 14, -100]);
    }

    #[test]
    fn best_fit_keeps_documents_whole_and_fills_rows() {
        let mut packer = BestFitPacker::new(8, 100, 0);
        let documents = numbered(&[5, 3, 8, 2, 6, 20, 1, 0, 3]);
        let mut next = feed(&documents);
        let rows = rows(|| packer.row(&mut next));
        assert!(rows.iter().all(|row| row.iter().map(|piece| piece.tokens.len()).sum::<usize>() <= 8));
        let mut lengths: Vec<usize> = rows.iter().flatten().map(|piece| piece.tokens.len()).collect();
        lengths.sort_unstable();
        // Only the 20 is cut, into 8, 8 and 4. 48 tokens fit into six rows of 8.
        assert_eq!((lengths, rows.len()), (vec![1, 2, 3, 3, 4, 5, 6, 8, 8, 8], 6));
        let batch = TokenBatch::from_rows(&rows);
        let mut tokens = batch.tokens.clone();
        tokens.sort_unstable();
        assert!(tokens.into_iter().eq(0..48));
        assert_eq!(batch.supervised(), documents.iter().map(|d| d.tokens.len().saturating_sub(1)).sum::<usize>());
    }

    #[test]
    fn best_fit_pools_come_one_after_another_and_repeat() {
        let documents = numbered(&[2; 50]);
        let run = || {
            let (mut packer, mut next) = (BestFitPacker::new(4, 10, 0), feed(&documents));
            rows(move || packer.row(&mut next))
        };
        assert_eq!(run(), run());
        // The first pool holds documents 0 to 9, thus tokens 0 to 19, in five rows.
        let first: i32 = run()[..5].iter().flatten().flat_map(|piece| &piece.tokens).sum();
        assert_eq!((first, run().len()), ((0..20).sum(), 25));
    }

    #[test]
    fn sequential_windows_predict_every_token_but_the_first_once() {
        let tokens: Vec<u32> = (0..11).collect();
        let rows: Vec<Row> = (0..10).step_by(4).map(|start| window(&tokens, start, 4)).collect();
        let batch = TokenBatch::from_rows(&rows);
        assert!(batch.labels.iter().copied().eq(1..11) && batch.tokens.iter().copied().eq(0..10));
        assert_eq!(batch.cu_seqlens, [0, 4, 8, 10]);
    }

    #[test]
    fn a_document_shares_rows_up_to_where_something_is_learned() {
        let mut batch = TokenBatch::from_documents(&[Document::all(vec![9])]);
        batch.push(&[1, 2, 3, 4], &[IGNORED, IGNORED, 4, IGNORED], None);
        // The third token is what both answers are predicted from, so each has its own.
        batch.push(&[1, 2, 3, 5, 6], &[IGNORED, IGNORED, 5, 6, IGNORED], Some(1));
        assert_eq!((&batch.tokens[5..], &batch.labels[5..], &batch.position_ids[5..]), (&[3, 5, 6][..], &[5, 6, -100][..], &[2, 3, 4][..]));
        assert_eq!((&batch.cu_seqlens[..], &batch.prefixes[..]), (&[0, 1, 5, 8][..], &[0..0, 0..0, 1..3][..]));
        assert_eq!(batch.sequence(), [0, 1, 1, 1, 1, 2, 2, 2]);
        batch.push(&[1, 2], &[IGNORED, IGNORED], Some(1));
        batch.push(&[7, 2], &[IGNORED, IGNORED], Some(1));
        batch.pad_to_multiple(4, 0);
        assert_eq!((&batch.tokens[8..], &batch.prefixes[3..]), (&[2, 7, 2, 0][..], &[1..2, 0..0, 0..0][..]));
    }

    #[test]
    fn padding_has_no_labels_and_nothing_packs_to_nothing() {
        let mut batch = TokenBatch::from_documents(&numbered(&[3]));
        batch.pad_to_multiple(4, 7);
        batch.pad_to_multiple(4, 7);
        assert_eq!((batch.tokens.clone(), batch.labels.clone()), (vec![0, 1, 2, 7], vec![1, 2, -100, -100]));
        assert_eq!((batch.position_ids.clone(), batch.cu_seqlens.clone(), batch.supervised()), (vec![0, 1, 2, 0], vec![0, 3, 4], 2));
        let empty = TokenBatch::from_rows(&[]);
        assert_eq!((empty.rows(), empty.supervised(), empty.cu_seqlens), (0, 0, vec![0]));
        assert!(ConcatPacker::new(4).row(|| Ok(None)).unwrap().is_none());
        assert!(Packing::Concat { seq_len: 0 }.check().is_err() && Packing::BestFit { seq_len: 1, pool: 0 }.check().is_err());
    }
}
