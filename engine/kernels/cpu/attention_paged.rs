//! Causal attention of new tokens over a cache of earlier keys and values: prefill in pieces, and decoding. The cache is
//! made of blocks of 64 positions that a text names in a table, so that texts may share the blocks of a common beginning.
//! Source: Kwon et al., arXiv 2309.06180 (a table of blocks).
//!
//! A block holds keys and values as attention.rs packs them, and a row walks over them by the same [`attend_block`]: its
//! bits are those of the whole text in one call, whatever was cached before, and whoever else is in the call. Where a span
//! is short, the rows of a register tile are not neighbouring positions but the heads of a group at one position, which
//! changes no row.

use super::attention::{Attention, State, Visible, Work, attend_block, panels_words, sum_lanes, transposed_words};
use super::attention_operands::{HeadRows, Positions, padded, word, words};
use super::attention_tile::{BLOCK, COLUMNS, Form, ROWS, with_form};
use super::heads::Heads;
use super::threads::{Shared, parallel, parallel_ranges, threads};
use crate::kernels::buffer::Buffer;
use crate::kernels::element::{Dtype, Float};

/// Positions of a block.
pub const BLOCK_POSITIONS: usize = BLOCK;

/// Tokens from which the rows of a tile are neighbouring positions; below, they are the heads of a group.
const SPAN_LONG: usize = 4;

/// Blocks that one task writes at least.
const WRITES_LEAST: usize = 8;

/// Parts, for each thread, into which many tasks that attend are divided; those of a part share their [`Room`].
const ATTENDS_A_THREAD: usize = 16;

/// Memory of cached keys and values, all layers of a model together.
pub struct KvBlocks {
    heads: Heads,
    layers: usize,
    dtype: Dtype,
    /// Words of the keys of one block, layer and kv head, and of its keys and values together.
    key_words: usize,
    place_words: usize,
    /// `[layers, kv_heads, place_words]` each; none while nobody uses the block.
    blocks: Vec<Option<Buffer<f32>>>,
}

impl KvBlocks {
    /// A cache without blocks for activations of element type `E`.
    pub fn new<E: Float>(heads: Heads, layers: usize) -> Self {
        fn sizes<F: Form>(_: F, heads: Heads) -> (usize, usize) {
            (transposed_words::<F>(heads), panels_words::<F>(heads))
        }
        let (key_words, value_words) = with_form!(E, heads.head_dim, |form| sizes(form, heads));
        Self { heads, layers, dtype: E::DTYPE, key_words, place_words: key_words + value_words, blocks: Vec::new() }
    }

    /// Bytes of one block.
    pub fn block_bytes(&self) -> usize {
        4 * self.layers * self.heads.kv_heads * self.place_words
    }

    /// Makes room for block `id`, zeroed: a masked value meets probability 0, and 0 times what was left there could be NaN.
    pub fn make(&mut self, id: u32) {
        let id = id as usize;
        if self.blocks.len() <= id {
            self.blocks.resize_with(id + 1, || None);
        }
        self.blocks[id] = Some(Buffer::zeroed(self.block_bytes() / 4));
    }

    /// Gives the memory of block `id` back.
    pub fn drop_block(&mut self, id: u32) {
        self.blocks[id as usize] = None;
    }

    /// Makes block `to` a copy of block `from`.
    pub fn copy(&mut self, from: u32, to: u32) {
        let copy = Buffer::copy_of(self.block(from));
        self.make(to);
        self.blocks[to as usize] = Some(copy);
    }

    fn block(&self, id: u32) -> &Buffer<f32> {
        self.blocks[id as usize].as_ref().expect("a text's table names blocks that exist")
    }

    fn place(&self, layer: usize, kv_head: usize) -> std::ops::Range<usize> {
        let start = (layer * self.heads.kv_heads + kv_head) * self.place_words;
        start..start + self.place_words
    }
}

/// New tokens of one text.
#[derive(Clone, Debug)]
pub struct Span {
    /// Row of the first one in the activation.
    pub row: usize,
    pub count: usize,
    /// Its position in the text.
    pub position: usize,
    /// Blocks of the whole text, from position 0, with room for the new tokens.
    pub blocks: Vec<u32>,
}

/// New positions of a span that lie in one block, for one kv head.
#[derive(Clone, Copy)]
struct Task {
    span: usize,
    /// Position of the first one.
    first: usize,
    count: usize,
    kv_head: usize,
}

/// Writes the keys and values of new tokens into their blocks, and attends from each new token over its text so far.
///
/// - `settings`: its `cu_seqlens` and `prefixes` are not read
/// - `qkv`: `[tokens, (heads + 2 * kv_heads) * head_dim]`, after rope
/// - `spans`: whose rows the tokens are; no block into which two of them write
/// - `o`: `[tokens, heads * head_dim]`, the rows of all spans written
///
/// Panics if spans, blocks and sizes do not fit together: tables are the scheduler's work, not a user's.
pub fn paged_attention<E: Float>(settings: &Attention, qkv: &[E], spans: &[Span], cache: &mut KvBlocks, layer: usize, o: &mut [E]) {
    let heads = settings.heads;
    assert_eq!((heads, E::DTYPE), (cache.heads, cache.dtype), "a cache for another model");
    assert!(layer < cache.layers, "layer {layer} of {}", cache.layers);
    assert_eq!(qkv.len() % heads.width(), 0, "whole rows");
    let tokens = qkv.len() / heads.width();
    assert_eq!(o.len(), tokens * heads.heads * heads.head_dim, "a row of outputs for each of {tokens} tokens");
    let tasks = tasks(spans, tokens, heads.kv_heads);
    with_form!(E, heads.head_dim, |form| run(form, settings, qkv, spans, &tasks, cache, layer, o));
}

fn tasks(spans: &[Span], tokens: usize, kv_heads: usize) -> Vec<Task> {
    let (mut tasks, mut rows, mut written) = (Vec::new(), vec![false; tokens], Vec::new());
    for (index, span) in spans.iter().enumerate() {
        let end = span.position + span.count;
        assert!(span.blocks.len() * BLOCK >= end, "{} blocks for {end} positions", span.blocks.len());
        for row in &mut rows[span.row..span.row + span.count] {
            assert!(!std::mem::replace(row, true), "a row belongs to one span");
        }
        let mut first = span.position;
        while first < end {
            let count = (BLOCK - first % BLOCK).min(end - first);
            written.push(span.blocks[first / BLOCK]);
            tasks.extend((0..kv_heads).map(|kv_head| Task { span: index, first, count, kv_head }));
            first += count;
        }
    }
    written.sort_unstable();
    assert!(written.windows(2).all(|pair| pair[0] != pair[1]), "two texts write into one block");
    tasks
}

#[allow(clippy::too_many_arguments, reason = "the operands of one call")]
fn run<F: Form, E: Float>(
    form: F,
    settings: &Attention,
    qkv: &[E],
    spans: &[Span],
    tasks: &[Task],
    cache: &mut KvBlocks,
    layer: usize,
    o: &mut [E],
) {
    let heads = settings.heads;
    let (places, key_words): (Vec<_>, _) = ((0..heads.kv_heads).map(|kv_head| cache.place(layer, kv_head)).collect(), cache.key_words);
    let memory: Vec<Option<Shared<f32>>> = cache.blocks.iter_mut().map(|block| block.as_mut().map(|block| Shared::new(block))).collect();
    parallel_ranges(tasks.len(), WRITES_LEAST, |range| {
        for task in &tasks[range] {
            let span = &spans[task.span];
            let block = memory[span.blocks[task.first / BLOCK] as usize].as_ref().expect("a text's table names blocks that exist");
            // SAFETY: no two spans write into one block, and within it each kv head has a place of its own.
            let (keys, values) = unsafe { block.part(places[task.kv_head].clone()) }.split_at_mut(key_words);
            form.enter(
                #[inline(always)]
                || {
                    for index in 0..task.count {
                        let row = &qkv[(span.row + task.first - span.position + index) * heads.width()..][..heads.width()];
                        put_key::<F, E>(&row[heads.key(task.kv_head)..][..heads.head_dim], keys, task.first % BLOCK + index);
                        put_value::<F, E>(&row[heads.value(task.kv_head)..][..heads.head_dim], values, task.first % BLOCK + index);
                    }
                },
            );
        }
    });
    drop(memory);
    let (cache, o) = (&*cache, Shared::new(o));
    let each = (tasks.len() / (ATTENDS_A_THREAD * threads())).max(1);
    parallel(tasks.len().div_ceil(each), |part| {
        let mut room = Room { queries: Buffer::scratch(0), states: Buffer::scratch(0), work: Work::new() };
        // The longest walks first.
        for task in tasks.iter().rev().skip(part * each).take(each) {
            form.enter(
                #[inline(always)]
                || attend::<F, E>(form, settings, qkv, &spans[task.span], *task, cache, layer, &o, &mut room),
            );
        }
    });
}

/// One key as a column of the packed keys: place `index` of its block.
#[inline(always)]
fn put_key<F: Form, E: Float>(row: &[E], keys: &mut [f32], index: usize) {
    let depth = words::<F>(row.len());
    let out = keys[index / COLUMNS * depth * COLUMNS + index % COLUMNS..].iter_mut().step_by(COLUMNS);
    if F::PAIRS {
        out.zip(row.chunks_exact(2)).for_each(|(out, pair)| *out = word::<F, E>(pair[0], pair[1]));
    } else {
        out.zip(row).for_each(|(out, x)| *out = x.to_f32());
    }
}

/// One value as a row of the packed values, or as one half of a row of pairs: the second half joins the first.
#[inline(always)]
fn put_value<F: Form, E: Float>(row: &[E], values: &mut [f32], index: usize) {
    let panel_words = words::<F>(BLOCK) * COLUMNS;
    for (panel, columns) in row.chunks(COLUMNS).enumerate() {
        let line = if F::PAIRS { index / 2 } else { index };
        let out = values[panel * panel_words + line * COLUMNS..][..columns.len()].iter_mut();
        if !F::PAIRS {
            out.zip(columns).for_each(|(out, x)| *out = x.to_f32());
        } else if index.is_multiple_of(2) {
            out.zip(columns).for_each(|(out, x)| *out = word::<F, E>(*x, E::default()));
        } else {
            out.zip(columns).for_each(|(out, x)| {
                *out = f32::from_bits(out.to_bits() & 0xffff | word::<F, E>(E::default(), *x).to_bits());
            });
        }
    }
}

/// Up to 8 query rows that walk together, between two multiples of 8 positions.
#[derive(Clone, Copy)]
struct QueryTile {
    /// Position of row 0; rows are neighbouring positions of `head`, or heads from `head` on at this one position.
    position: usize,
    head: usize,
    count: usize,
    by_heads: bool,
}

impl QueryTile {
    /// Calls `visit` for each tile of a task's new positions in all heads of its group.
    #[inline(always)]
    fn each(task: Task, heads: Heads, by_heads: bool, mut visit: impl FnMut(Self)) {
        let (group, end) = (heads.group(), task.first + task.count);
        let first_head = task.kv_head * group;
        let mut position = task.first;
        while position < end {
            let count = if by_heads { 1 } else { (ROWS - position % ROWS).min(end - position) };
            let step = if by_heads { ROWS } else { 1 };
            for head in (0..group).step_by(step) {
                let count = if by_heads { ROWS.min(group - head) } else { count };
                visit(Self { position, head: first_head + head, count, by_heads });
            }
            position += count;
        }
    }

    /// Position and head of row `r`.
    #[inline(always)]
    fn row(self, r: usize) -> (usize, usize) {
        if self.by_heads { (self.position, self.head + r) } else { (self.position + r, self.head) }
    }
}

/// Memory of a task that attends.
struct Room {
    queries: Buffer<f32>,
    states: Buffer<f32>,
    work: Work,
}

/// The first `len` words of `memory`, which grows if it is shorter.
#[inline(always)]
fn at_least(memory: &mut Buffer<f32>, len: usize) -> &mut [f32] {
    if memory.len() < len {
        *memory = Buffer::scratch(len);
    }
    &mut memory[..len]
}

/// The new positions of one task in all heads of its group, against all their keys.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the operands of one task")]
fn attend<F: Form, E: Float>(
    form: F,
    settings: &Attention,
    qkv: &[E],
    span: &Span,
    task: Task,
    cache: &KvBlocks,
    layer: usize,
    o: &Shared<E>,
    room: &mut Room,
) {
    let heads = settings.heads;
    let (head_dim, padded) = (heads.head_dim, padded(heads.head_dim));
    let by_heads = span.count < SPAN_LONG;
    let (tile_words, state_words) = (ROWS * words::<F>(head_dim), State::words(padded));
    let mut tiles = 0;
    QueryTile::each(task, heads, by_heads, |_| tiles += 1);
    let (queries, states) = (at_least(&mut room.queries, tiles * tile_words), at_least(&mut room.states, tiles * state_words));
    let work = &mut room.work;
    let row_of = |position: usize| span.row + position - span.position;
    let mut slots = queries.chunks_exact_mut(tile_words);
    QueryTile::each(task, heads, by_heads, |tile| {
        let start = row_of(tile.position) * heads.width() + heads.query(tile.head);
        let stride = if by_heads { head_dim } else { heads.width() };
        let rows = HeadRows::new(&qkv[start..], stride, Positions::first(tile.count), 0, head_dim);
        rows.pack_rows::<F>(slots.next().expect("a slot for each tile"));
    });
    states.chunks_exact_mut(state_words).for_each(|memory| State::of(memory, padded).begin());

    let last = task.first / BLOCK;
    for key_block in settings.first_visible(task.first) / BLOCK..=last {
        let place = &cache.block(span.blocks[key_block])[cache.place(layer, task.kv_head)];
        let (keys, values) = place.split_at(cache.key_words);
        let mut operands = queries.chunks_exact(tile_words).zip(states.chunks_exact_mut(state_words));
        QueryTile::each(task, heads, by_heads, |tile| {
            let (queries, memory) = operands.next().expect("operands for each tile");
            let visible = std::array::from_fn(|r| Visible::of(settings, tile.row(r.min(tile.count - 1)).0, key_block * BLOCK));
            let state = &mut State::of(memory, padded);
            attend_block::<F, E>(form, settings.scale, queries, keys, values, &visible, tile.count, state, work);
        });
    }

    let mut memories = states.chunks_exact_mut(state_words);
    QueryTile::each(task, heads, by_heads, |tile| {
        let state = State::of(memories.next().expect("a state for each tile"), padded);
        for r in 0..tile.count {
            let (position, head) = tile.row(r);
            let start = (row_of(position) * heads.heads + head) * head_dim;
            let sum = sum_lanes(state.sums_of(r));
            // SAFETY: each (row, head) belongs to one tile of one task.
            let o = unsafe { o.part(start..start + head_dim) };
            state.write_row(r, sum, o);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::super::attention::attention;
    use super::super::attention::tests::{borders, sample};
    use super::super::threads::set_threads;
    use super::*;
    use half::bf16;

    /// A text's activations, and its tables while it is fed in pieces.
    struct Text<E> {
        qkv: Vec<E>,
        blocks: Vec<u32>,
        done: usize,
    }

    fn bits<E: Float>(values: &[E]) -> Vec<u32> {
        values.iter().map(|value| value.to_f32().to_bits()).collect()
    }

    /// Feeds texts in pieces of the given sizes, several texts a call, and compares each row with the whole text alone.
    fn check<E: Float>(heads: Heads, window: Option<usize>, lens: &[usize], pieces: &[usize]) {
        let settings = Attention { heads, cu_seqlens: &[], prefixes: &[], scale: 0.3, window };
        let (layers, layer, out) = (2, 1, heads.heads * heads.head_dim);
        let mut cache = KvBlocks::new::<E>(heads, layers);
        let mut next_block = 0;
        let mut texts: Vec<Text<E>> = Vec::new();
        for (index, len) in lens.iter().enumerate() {
            texts.push(Text { qkv: sample(len * heads.width(), index + 3), blocks: Vec::new(), done: 0 });
        }
        let whole: Vec<Vec<u32>> = texts
            .iter()
            .map(|text| {
                let tokens = text.qkv.len() / heads.width();
                let (mut o, mut lse) = (vec![E::default(); tokens * out], vec![0.0; tokens * heads.heads]);
                attention(&Attention { cu_seqlens: &borders(&[tokens]), ..settings }, &text.qkv, &mut o, &mut lse).unwrap();
                bits(&o)
            })
            .collect();
        for turn in 0.. {
            let (mut spans, mut rows, mut of) = (Vec::new(), Vec::new(), Vec::new());
            for (index, text) in texts.iter_mut().enumerate() {
                let left = text.qkv.len() / heads.width() - text.done;
                let count = pieces[(turn + index) % pieces.len()].min(left);
                if count == 0 {
                    continue;
                }
                while text.blocks.len() * BLOCK < text.done + count {
                    cache.make(next_block);
                    text.blocks.push(next_block);
                    next_block += 1;
                }
                spans.push(Span { row: rows.len() / heads.width(), count, position: text.done, blocks: text.blocks.clone() });
                rows.extend_from_slice(&text.qkv[text.done * heads.width()..][..count * heads.width()]);
                of.push((index, text.done, count));
                text.done += count;
            }
            if spans.is_empty() {
                break;
            }
            let mut o = vec![E::from_f32(f32::NAN); rows.len() / heads.width() * out];
            paged_attention(&settings, &rows, &spans, &mut cache, layer, &mut o);
            for (span, (index, done, count)) in spans.iter().zip(of) {
                let got = bits(&o[span.row * out..(span.row + count) * out]);
                assert_eq!(got, whole[index][done * out..(done + count) * out], "text {index} from {done}, {count} tokens, {heads:?}");
            }
        }
        assert!(texts.iter().all(|text| text.done * heads.width() == text.qkv.len()));
    }

    #[test]
    fn rows_have_the_bits_of_the_whole_text_however_it_is_cut() {
        let before = threads();
        for count in [1, 2] {
            set_threads(count);
            for (heads, kv_heads, head_dim) in [(4, 2, 64), (7, 1, 16), (14, 2, 32), (3, 3, 40), (18, 1, 8)] {
                let heads = Heads { heads, kv_heads, head_dim };
                for window in [None, Some(50)] {
                    for pieces in [&[1][..], &[150, 1, 3], &[5, 64, 2, 70]] {
                        check::<f32>(heads, window, &[150, 1, 67], pieces);
                        check::<bf16>(heads, window, &[150, 1, 67], pieces);
                    }
                }
            }
        }
        set_threads(before);
    }

    #[test]
    fn a_copied_block_goes_on_by_itself() {
        let heads = Heads { heads: 2, kv_heads: 1, head_dim: 32 };
        let settings = Attention { heads, cu_seqlens: &[], prefixes: &[], scale: 0.3, window: None };
        let mut cache = KvBlocks::new::<bf16>(heads, 1);
        cache.make(0);
        let qkv: Vec<bf16> = sample(7 * heads.width(), 1);
        let mut o = vec![bf16::default(); 7 * 64];
        paged_attention(&settings, &qkv, &[Span { row: 0, count: 7, position: 0, blocks: vec![0] }], &mut cache, 0, &mut o);
        cache.copy(0, 1);
        let next: Vec<bf16> = sample(2 * heads.width(), 2);
        let spans = [0, 1].map(|id| Span { row: id, count: 1, position: 7, blocks: vec![id as u32] });
        let mut o = vec![bf16::default(); 2 * 64];
        paged_attention(&settings, &next, &spans, &mut cache, 0, &mut o);
        for (id, got) in bits(&o).chunks(64).enumerate() {
            let text = [&qkv[..], &next[id * heads.width()..][..heads.width()]].concat();
            let (mut whole, mut lse) = (vec![bf16::default(); 8 * 64], vec![0.0; 16]);
            attention(&Attention { cu_seqlens: &[0, 8], ..settings }, &text, &mut whole, &mut lse).unwrap();
            assert_eq!(got, bits(&whole[7 * 64..]));
        }
    }
}
