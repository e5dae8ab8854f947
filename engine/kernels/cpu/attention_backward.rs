//! The derivative of attention.rs: probabilities are computed again from the log-sum-exp, one tile at a time.
//! Source: Dao, arXiv 2307.08691, algorithm 2.
//!
//! Order of sums, the same for any number of threads and any neighbours of a document: a query's gradient adds keys from
//! the first on; a key's and a value's gradient adds blocks of 64 queries from the first on, in a block the heads of the
//! group, in a head the queries; those of a row that several documents begin with then add the documents in their order. For
//! bf16 the probabilities and the score gradients are rounded to bf16 before they are multiplied on; sums stay in f32 and are
//! rounded once.

use super::attention::{Attention, Visible, panels_words, sum_lanes, transposed_words};
use super::attention_blocks::{Block, Blocks};
use super::attention_operands::{HeadRows, Positions, padded, words};
use super::attention_tile::{BLOCK, COLUMNS, Form, Left, ROWS, Row, Start, with_form};
use super::heads::Heads;
use super::threads::{Shared, parallel, threads};
use crate::error::Result;
use crate::kernels::buffer::Buffer;
use crate::kernels::element::Float;
use std::ops::Range;

/// Gradient of [`super::attention::attention`] with respect to `qkv`.
///
/// - `d_o`: `[tokens, heads * head_dim]`, gradient with respect to `o`
/// - `qkv`, `o`, `lse`: what the forward step read and wrote
/// - `dqkv`: `[tokens, (heads + 2 * kv_heads) * head_dim]`, written in full
///
/// Errors: as [`super::attention::attention`].
pub fn attention_backward<E: Float>(settings: &Attention, d_o: &[E], qkv: &[E], o: &[E], lse: &[f32], dqkv: &mut [E]) -> Result<()> {
    let op = "attention_backward";
    let blocks = settings.blocks(op, qkv.len())?;
    let heads = settings.heads;
    settings.check_rows(op, "d_o", d_o.len(), blocks.tokens, heads.heads * heads.head_dim)?;
    settings.check_rows(op, "o", o.len(), blocks.tokens, heads.heads * heads.head_dim)?;
    settings.check_rows(op, "lse", lse.len(), blocks.tokens, heads.heads)?;
    settings.check_rows(op, "dqkv", dqkv.len(), blocks.tokens, heads.width())?;
    let dqkv = &Shared::new(dqkv);
    // Documents that share rows may be at work at the same time, so what each adds to them is kept until all are done.
    let is_shared = settings.prefixes.iter().any(|prefix| !prefix.is_empty());
    let mut parts = Buffer::<f32>::scratch(if is_shared { blocks.len() * BLOCK * 2 * heads.kv_heads * heads.head_dim } else { 0 });
    let kept = is_shared.then(|| Shared::new(&mut parts));
    let saved = Saved { settings, blocks: &blocks, d_o, qkv, o, lse, dqkv, parts: kept.as_ref() };
    with_form!(E, heads.head_dim, |form| backward(form, &saved));
    if is_shared {
        add_parts(&blocks, heads, &parts, dqkv);
    }
    Ok(())
}

/// Writes the gradients of the keys and values of each row: the sum of those that the documents which have it made.
fn add_parts<E: Float>(blocks: &Blocks, heads: Heads, parts: &[f32], dqkv: &Shared<E>) {
    let (documents, ..) = documents(blocks);
    let block = |index: i32| blocks.get(index as usize);
    let mut copies = Buffer::<i32>::scratch(documents.len());
    copies.copy_from_slice(&documents);
    // Those that begin as a whole one does stand together, in their order.
    copies.sort_unstable_by_key(|index| (block(*index).prefix, *index));
    let (first, width) = (heads.heads * heads.head_dim, 2 * heads.kv_heads * heads.head_dim);
    parallel(documents.len(), |number| {
        let document = block(documents[number]);
        let mut sums = Buffer::<f32>::scratch(width);
        let part = |of: Block, position: usize| &parts[(of.base * BLOCK + position) * width..][..width];
        let from = copies.partition_point(|index| block(*index).prefix < document.prefix);
        let to = copies.partition_point(|index| block(*index).prefix <= document.prefix);
        let alike = if document.shared == 0 { &copies[from..to] } else { &[] };
        for position in document.shared..document.len {
            sums.copy_from_slice(part(document, position));
            for copy in alike.iter().map(|index| block(*index)).filter(|copy| position < copy.shared) {
                sums.iter_mut().zip(part(copy, position)).for_each(|(sum, more)| *sum += more);
            }
            let row = (document.own + position - document.shared) * heads.width() + first;
            // SAFETY: a row is one document's own, and each document is one task.
            let out = unsafe { dqkv.part(row..row + width) };
            out.iter_mut().zip(&sums[..]).for_each(|(out, sum)| *out = E::from_f32(*sum));
        }
    });
}

/// Everything the tasks share.
struct Saved<'a, E> {
    settings: &'a Attention<'a>,
    blocks: &'a Blocks,
    d_o: &'a [E],
    qkv: &'a [E],
    o: &'a [E],
    lse: &'a [f32],
    dqkv: &'a Shared<'a, E>,
    /// Where documents share rows, `[blocks, 64, 2 * kv_heads * head_dim]`: what each document adds to the gradients of keys and
    /// values, after the scale.
    parts: Option<&'a Shared<'a, f32>>,
}

/// Which gradients one task computes: of the queries of `queries`, or of the keys and values of `keys`, or of both.
/// Both are ranges of blocks, counted in the document.
struct Part {
    queries: Range<usize>,
    keys: Range<usize>,
    of_queries: bool,
    of_keys: bool,
}

fn backward<F: Form, E: Float>(form: F, saved: &Saved<E>) {
    let (heads, blocks) = (saved.settings.heads, saved.blocks);
    let (across, panels) = (transposed_words::<F>(heads), panels_words::<F>(heads));
    let packed_words = 2 * across + panels;
    let tasks = blocks.len() * heads.kv_heads;
    // One place a block and kv head: keys and values to meet queries along head_dim, then keys to be summed.
    let mut packed = Buffer::<f32>::scratch(tasks * packed_words);
    let places = Shared::new(&mut packed);
    parallel(tasks, |task| {
        // SAFETY: each task packs into its own place.
        let place = unsafe { places.part(task * packed_words..(task + 1) * packed_words) };
        let (block, kv_head) = (blocks.get(task / heads.kv_heads), task % heads.kv_heads);
        form.enter(
            #[inline(always)]
            || {
                let rows = |column| HeadRows::new(saved.qkv, heads.width(), block.all_rows(), column, heads.head_dim);
                let (keys, rest) = place.split_at_mut(across);
                let (values, keys_rows) = rest.split_at_mut(across);
                rows(heads.key(kv_head)).pack_transposed::<F>(keys);
                rows(heads.value(kv_head)).pack_transposed::<F>(values);
                rows(heads.key(kv_head)).pack_panels::<F>(keys_rows);
            },
        );
    });
    let run = |block: Block, kv_head: usize, part: Part| {
        form.enter(
            #[inline(always)]
            || differentiate::<F, E>(form, saved, &packed, block, kv_head, part),
        );
    };

    let (mut documents, total, most) = documents(blocks);
    // One task a document and kv head computes each tile of probabilities once. When the longest such task would keep
    // the other threads waiting, two passes over single blocks compute the tiles twice (7 products in place of 5), with
    // the same order of sums, hence the same bits.
    if most as f64 * threads() as f64 <= 1.4 * total as f64 * heads.kv_heads as f64 {
        documents.sort_unstable_by_key(|index| std::cmp::Reverse(blocks.get(*index as usize).len));
        parallel(documents.len() * heads.kv_heads, |task| {
            let block = blocks.get(documents[task / heads.kv_heads] as usize);
            let all = 0..block.len.div_ceil(BLOCK);
            run(block, task % heads.kv_heads, Part { queries: all.clone(), keys: all, of_queries: true, of_keys: true });
        });
        return;
    }
    parallel(2 * tasks, |task| {
        let (block, kv_head) = (blocks.get(task / 2 / heads.kv_heads), task / 2 % heads.kv_heads);
        let (index, count) = (block.first / BLOCK, block.len.div_ceil(BLOCK));
        let part = if task % 2 == 0 {
            Part { queries: index..count, keys: index..index + 1, of_queries: false, of_keys: true }
        } else {
            Part { queries: index..index + 1, keys: 0..index + 1, of_queries: true, of_keys: false }
        };
        run(block, kv_head, part);
    });
}

/// The first block of each document that has tokens; the number of pairs of blocks in all documents, and in the longest.
fn documents(blocks: &Blocks) -> (Buffer<i32>, usize, usize) {
    let firsts = || (0..blocks.len()).filter(|index| blocks.get(*index).first == 0);
    let mut documents = Buffer::scratch(firsts().count());
    let (mut total, mut most) = (0, 0);
    for (document, index) in documents.iter_mut().zip(firsts()) {
        *document = index as i32;
        let count = blocks.get(index).len.div_ceil(BLOCK);
        let pairs = count * (count + 1) / 2;
        total += pairs;
        most = most.max(pairs);
    }
    (documents, total, most)
}

/// The queries of one block in one head, packed in every way that the products need.
struct Queries<'a> {
    /// `[64, words(head_dim)]`: queries and output gradients, to meet keys and values.
    queries: &'a mut [f32],
    d_outputs: &'a mut [f32],
    /// `[panels, words(64), 32]`: the same, to be summed over queries.
    queries_rows: &'a mut [f32],
    d_outputs_rows: &'a mut [f32],
    /// `[64]`: infinite for missing rows and for an earlier document's, whose probabilities are thereby 0.
    lse: &'a mut [f32],
    /// `[64]`: sum over a row of `d_o * o`.
    delta: &'a mut [f32],
    /// `[64, padded(head_dim)]`: gradient of the queries, before the scale.
    sums: &'a mut [f32],
}

impl<'a> Queries<'a> {
    fn words<F: Form>(head_dim: usize) -> usize {
        2 * BLOCK * words::<F>(head_dim) + 2 * words::<F>(BLOCK) * padded(head_dim) + 2 * BLOCK + BLOCK * padded(head_dim)
    }

    #[inline(always)]
    fn of<F: Form>(memory: &'a mut [f32], head_dim: usize) -> Self {
        let (across, panels) = (BLOCK * words::<F>(head_dim), words::<F>(BLOCK) * padded(head_dim));
        let (queries, rest) = memory.split_at_mut(across);
        let (d_outputs, rest) = rest.split_at_mut(across);
        let (queries_rows, rest) = rest.split_at_mut(panels);
        let (d_outputs_rows, rest) = rest.split_at_mut(panels);
        let (lse, rest) = rest.split_at_mut(BLOCK);
        let (delta, sums) = rest.split_at_mut(BLOCK);
        Self { queries, d_outputs, queries_rows, d_outputs_rows, lse, delta, sums }
    }

    #[inline(always)]
    fn fill<F: Form, E: Float>(&mut self, saved: &Saved<E>, rows: Positions, head: usize) {
        let heads = saved.settings.heads;
        let (dim, o_width) = (heads.head_dim, heads.heads * heads.head_dim);
        let queries = HeadRows::new(saved.qkv, heads.width(), rows, heads.query(head), dim);
        let d_outputs = HeadRows::new(saved.d_o, o_width, rows, head * dim, dim);
        let outputs = HeadRows::new(saved.o, o_width, rows, head * dim, dim);
        queries.pack_rows::<F>(self.queries);
        queries.pack_panels::<F>(self.queries_rows);
        d_outputs.pack_rows::<F>(self.d_outputs);
        d_outputs.pack_panels::<F>(self.d_outputs_rows);
        self.lse.fill(f32::INFINITY);
        self.delta.fill(0.0);
        for i in rows.shared..rows.count {
            self.lse[i] = saved.lse[rows.row(i) * heads.heads + head];
            let mut lanes = [0.0; 16];
            for (a, b) in d_outputs.row(i).chunks(16).zip(outputs.row(i).chunks(16)) {
                lanes.iter_mut().zip(a).zip(b).for_each(|((lane, a), b)| *lane += a.to_f32() * b.to_f32());
            }
            self.delta[i] = sum_lanes(&lanes);
        }
        self.sums.fill(0.0);
    }
}

/// Probabilities and score gradients of 64 queries and 64 keys, as left operands.
#[repr(align(64))]
struct Weights {
    /// Of one tile of 8 queries, f32: scores, then probabilities; products with the output gradient, then score gradients.
    p: [Row; ROWS],
    ds: [Row; ROWS],
    /// The same tile's score gradients to be summed over keys, in a form with pairs: `[8, words(64)]`.
    ds_pairs: [[f32; BLOCK / 2]; ROWS],
    /// Of all queries, to be summed over queries: `[words(64 queries), 64 keys]`.
    p_words: [Row; BLOCK],
    ds_words: [Row; BLOCK],
}

/// Gradients of one part of a document in the heads of one group.
#[inline(always)]
fn differentiate<F: Form, E: Float>(form: F, saved: &Saved<E>, packed: &[f32], document: Block, kv_head: usize, part: Part) {
    let settings = saved.settings;
    let heads = settings.heads;
    let (dim, padded) = (heads.head_dim, padded(heads.head_dim));
    let (across, panels) = (transposed_words::<F>(heads), panels_words::<F>(heads));
    let mut memory = Buffer::<f32>::scratch(Queries::words::<F>(dim));
    let mut queries = Queries::of::<F>(&mut memory, dim);
    // For each block of keys: gradients of keys, then of values, `[64, padded]` each, before the scale.
    let key_sums_words = if part.of_keys { 2 * BLOCK * padded } else { 0 };
    let mut key_sums = Buffer::<f32>::zeroed(part.keys.len() * key_sums_words);
    let mut weights = Weights {
        p: [[0.0; BLOCK]; ROWS],
        ds: [[0.0; BLOCK]; ROWS],
        ds_pairs: [[0.0; BLOCK / 2]; ROWS],
        p_words: [[0.0; BLOCK]; BLOCK],
        ds_words: [[0.0; BLOCK]; BLOCK],
    };

    for query_block in part.queries.clone() {
        let first = query_block * BLOCK;
        let first_key_block = part.keys.start.max(settings.first_visible(first) / BLOCK);
        let last_key_block = query_block.min(part.keys.end - 1);
        if first_key_block > last_key_block {
            continue;
        }
        let rows = document.rows(first..document.len.min(first + BLOCK));
        let tiles = rows.shared / ROWS..rows.count.div_ceil(ROWS);
        if rows.shared == rows.count {
            continue;
        }
        for head in kv_head * heads.group()..(kv_head + 1) * heads.group() {
            queries.fill::<F, E>(saved, rows, head);
            for key_block in first_key_block..=last_key_block {
                let place = (document.base + key_block) * heads.kv_heads + kv_head;
                let (keys, rest) = packed[place * (2 * across + panels)..][..2 * across + panels].split_at(across);
                let (values, keys_rows) = rest.split_at(across);
                for index in tiles.clone() {
                    let position = first + index * ROWS;
                    let visible: [Visible; ROWS] = std::array::from_fn(|r| Visible::of(settings, position + r, key_block * BLOCK));
                    weights.weigh::<F, E>(form, settings.scale, &queries, index, keys, values, &visible);
                    if part.of_keys {
                        weights.keep(form, index);
                    }
                    if part.of_queries {
                        let out = &mut queries.sums[index * ROWS * padded..][..ROWS * padded];
                        weights.add_keys(form, keys_rows, Visible::walk(&visible), out, padded);
                    }
                }
                if part.of_keys {
                    // What an earlier head left for queries that this block does not have.
                    let (from, to) = (words::<F>(tiles.start * ROWS), words::<F>(tiles.end * ROWS));
                    for missing in [from / F::GROUP * F::GROUP..from, to..to.next_multiple_of(F::GROUP)] {
                        weights.p_words[missing.clone()].as_flattened_mut().fill(0.0);
                        weights.ds_words[missing].as_flattened_mut().fill(0.0);
                    }
                    let sums = &mut key_sums[(key_block - part.keys.start) * key_sums_words..][..key_sums_words];
                    let (d_keys, d_values) = sums.split_at_mut(BLOCK * padded);
                    let key_tiles = (document.len - key_block * BLOCK).min(BLOCK).div_ceil(ROWS);
                    for tile in 0..key_tiles {
                        // In the diagonal block earlier queries do not see these keys.
                        let from = if key_block == query_block { tile.max(tiles.start) } else { tiles.start };
                        let rows = from * ROWS..tiles.end * ROWS;
                        let at = tile * ROWS * padded..(tile + 1) * ROWS * padded;
                        add_queries(form, &weights.ds_words, queries.queries_rows, tile, rows.clone(), &mut d_keys[at.clone()], padded);
                        add_queries(form, &weights.p_words, queries.d_outputs_rows, tile, rows, &mut d_values[at], padded);
                    }
                }
            }
            if part.of_queries {
                write::<E>(saved, rows, heads.query(head), queries.sums, settings.scale);
            }
        }
    }

    if part.of_keys {
        for (key_block, sums) in part.keys.clone().zip(key_sums.chunks_exact(key_sums_words)) {
            let (d_keys, d_values) = sums.split_at(BLOCK * padded);
            let first = key_block * BLOCK;
            let rows = document.rows(first..document.len.min(first + BLOCK));
            for (column, sums, scale) in [(heads.key(kv_head), d_keys, settings.scale), (heads.value(kv_head), d_values, 1.0)] {
                match saved.parts {
                    None => write::<E>(saved, rows, column, sums, scale),
                    Some(parts) => keep(heads, parts, document.base * BLOCK + first, rows.count, column, sums, scale),
                }
            }
        }
    }
}

impl Weights {
    /// Probabilities `p` and score gradients `p * (d_o . v - delta)` of tile `index` and the keys it sees; 0 elsewhere.
    #[inline(always)]
    #[allow(clippy::too_many_arguments, reason = "the operands of one step")]
    fn weigh<F: Form, E: Float>(
        &mut self,
        form: F,
        scale: f32,
        queries: &Queries,
        index: usize,
        keys: &[f32],
        values: &[f32],
        visible: &[Visible; ROWS],
    ) {
        let depth = queries.queries.len() / BLOCK;
        let [queries_left, d_outputs_left] =
            [&*queries.queries, &*queries.d_outputs].map(|rows| Left { words: &rows[index * ROWS * depth..], row: depth });
        let walk = Visible::walk(visible);
        let (panels, panel_words) = (walk.div_ceil(COLUMNS), depth * COLUMNS);
        form.multiply_panels(queries_left, keys, panel_words, panels, depth, self.p.as_flattened_mut(), BLOCK, Start::Zero);
        form.multiply_panels(d_outputs_left, values, panel_words, panels, depth, self.ds.as_flattened_mut(), BLOCK, Start::Zero);
        for (r, (p, ds)) in self.p.iter_mut().zip(&mut self.ds).enumerate() {
            let (lse, delta) = (queries.lse[index * ROWS + r], queries.delta[index * ROWS + r]);
            visible[r].mask(p);
            form.exp(p, walk, scale, lse);
            for (p, ds) in p.iter_mut().zip(&mut *ds) {
                let probability = *p;
                // In a form with pairs the rounding comes with the pairing.
                let round = |x: f32| if F::PAIRS { x } else { E::from_f32(x).to_f32() };
                *ds = round(probability * (*ds - delta));
                *p = round(probability);
            }
            if F::PAIRS {
                form.pair_columns(ds, &mut self.ds_pairs[r]);
            }
        }
    }

    /// Keeps the weights of tile `index` for the sums over queries.
    #[inline(always)]
    fn keep<F: Form>(&mut self, form: F, index: usize) {
        for (tile, kept) in [(&self.p, &mut self.p_words), (&self.ds, &mut self.ds_words)] {
            if F::PAIRS {
                for (rows, words) in tile.chunks_exact(2).zip(&mut kept[index * ROWS / 2..]) {
                    form.pair_rows(&rows[0], &rows[1], words);
                }
            } else {
                kept[index * ROWS..][..ROWS].copy_from_slice(tile);
            }
        }
    }

    /// Adds to the gradients of the tile's 8 queries, `[8, padded]`: score gradients times the first `walk` keys of a block.
    #[inline(always)]
    fn add_keys<F: Form>(&self, form: F, keys_rows: &[f32], walk: usize, out: &mut [f32], padded: usize) {
        let left = if F::PAIRS {
            Left { words: self.ds_pairs.as_flattened(), row: BLOCK / 2 }
        } else {
            Left { words: self.ds.as_flattened(), row: BLOCK }
        };
        let depth = words::<F>(walk).next_multiple_of(F::GROUP);
        form.multiply_panels(left, keys_rows, words::<F>(BLOCK) * COLUMNS, padded / COLUMNS, depth, out, padded, Start::Keep);
    }
}

/// Adds to the gradients of the 8 keys of `tile`, `[8, padded]`: their weights times the queries of `rows`.
#[inline(always)]
fn add_queries<F: Form>(
    form: F,
    weights: &[Row; BLOCK],
    queries_rows: &[f32],
    tile: usize,
    rows: Range<usize>,
    out: &mut [f32],
    padded: usize,
) {
    if F::GROUP > 1 {
        // Queries of a group that do not see these keys, or are none, have zeros for weights.
        let (from, to) = (words::<F>(rows.start) / F::GROUP * F::GROUP, words::<F>(rows.end).next_multiple_of(F::GROUP));
        let mut turned = [[0.0; BLOCK / 2]; ROWS];
        form.turn(&weights[from..to], tile, &mut turned);
        let left = Left { words: turned.as_flattened(), row: BLOCK / 2 };
        let queries = &queries_rows[from * COLUMNS..];
        form.multiply_panels(left, queries, words::<F>(BLOCK) * COLUMNS, padded / COLUMNS, to - from, out, padded, Start::Keep);
        return;
    }
    let (from, depth) = (words::<F>(rows.start), words::<F>(rows.len()));
    for (panel, queries) in queries_rows.chunks_exact(words::<F>(BLOCK) * COLUMNS).enumerate() {
        let weights = Left { words: &weights.as_flattened()[from * BLOCK + tile * ROWS..], row: 1 };
        form.multiply::<BLOCK>(weights, &queries[from * COLUMNS..], depth, &mut out[panel * COLUMNS..], padded, Start::Keep);
    }
}

/// Writes sums, `[_, padded]`, times `scale`, into the columns of `dqkv` from `column` on: those of the document's own rows.
#[inline(always)]
fn write<E: Float>(saved: &Saved<E>, rows: Positions, column: usize, sums: &[f32], scale: f32) {
    let heads = saved.settings.heads;
    for (i, sums) in sums.chunks_exact(padded(heads.head_dim)).enumerate().take(rows.count).skip(rows.shared) {
        let start = rows.row(i) * heads.width() + column;
        // SAFETY: a part of a document in a head is written by one task, which makes one part of `dqkv` for it at a time.
        let out = unsafe { saved.dqkv.part(start..start + heads.head_dim) };
        out.iter_mut().zip(sums).for_each(|(out, sum)| *out = E::from_f32(sum * scale));
    }
}

/// Keeps `count` rows of sums, `[_, padded]`, times `scale`, for [`add_parts`], from place `first` on; `column` is theirs in qkv.
#[inline(always)]
fn keep(heads: Heads, parts: &Shared<f32>, first: usize, count: usize, column: usize, sums: &[f32], scale: f32) {
    let (width, left) = (2 * heads.kv_heads * heads.head_dim, column - heads.heads * heads.head_dim);
    for (i, sums) in sums.chunks_exact(padded(heads.head_dim)).take(count).enumerate() {
        let start = (first + i) * width + left;
        // SAFETY: a key or value of a document is one task's, which makes one part for it at a time.
        let out = unsafe { parts.part(start..start + heads.head_dim) };
        out.iter_mut().zip(sums).for_each(|(out, sum)| *out = sum * scale);
    }
}

#[cfg(test)]
mod tests {
    use super::super::attention::tests::{CASES, assert_close, borders, dot, each_query, reference, run, sample, widen};
    use super::*;
    use crate::kernels::cpu::threads::set_threads;
    use half::bf16;

    /// The derivative by the definition, in f64.
    fn reference_backward(settings: &Attention, d_o: &[f64], qkv: &[f64]) -> Vec<f64> {
        let heads = settings.heads;
        let (dim, width, scale) = (heads.head_dim, heads.width(), f64::from(settings.scale));
        let (o, lse) = reference(settings, qkv);
        let mut dqkv = vec![0.0; qkv.len()];
        let at = |row: usize, column: usize| row * width + column..row * width + column + dim;
        each_query(settings, |head, row, keys| {
            let kv_head = head / heads.group();
            let place = row * heads.heads + head;
            let (d_o, o) = (&d_o[place * dim..][..dim], &o[place * dim..][..dim]);
            let q = at(row, heads.query(head));
            for key in keys {
                let (k, v) = (at(key, heads.key(kv_head)), at(key, heads.value(kv_head)));
                let p = (dot(&qkv[q.clone()], &qkv[k.clone()]) * scale - lse[place]).exp();
                let ds = p * (dot(d_o, &qkv[v.clone()]) - dot(d_o, o)) * scale;
                for i in 0..dim {
                    dqkv[v.start + i] += p * d_o[i];
                    dqkv[q.start + i] += ds * qkv[k.start + i];
                    dqkv[k.start + i] += ds * qkv[q.start + i];
                }
            }
        });
        dqkv
    }

    fn run_backward<E: Float>(settings: &Attention, d_o: &[E], qkv: &[E]) -> Vec<E> {
        let (o, lse) = run(settings, qkv);
        let mut dqkv = vec![E::from_f32(f32::NAN); qkv.len()];
        attention_backward(settings, d_o, qkv, &o, &lse, &mut dqkv).unwrap();
        dqkv
    }

    fn check<E: Float>(tolerance: f64) {
        for (heads, kv_heads, head_dim, lens, window) in CASES.iter().copied() {
            let cu_seqlens = borders(lens);
            let heads = Heads { heads, kv_heads, head_dim };
            let tokens: usize = lens.iter().sum();
            let settings = Attention { heads, cu_seqlens: &cu_seqlens, prefixes: &[], scale: 2.0 * (head_dim as f32).powf(-0.5), window };
            let (qkv, d_o): (Vec<E>, Vec<E>) = (sample(tokens * heads.width(), 3), sample(tokens * heads.heads * head_dim, 4));
            let want = reference_backward(&settings, &widen(&d_o), &widen(&qkv));
            let got = widen(&run_backward(&settings, &d_o, &qkv));
            let size = want.iter().fold(1.0, |size: f64, v| size.max(v.abs()));
            assert_close(&got, &want, tolerance * size, &format!("dqkv of {settings:?}"));
        }
    }

    #[test]
    fn the_gradient_matches_the_definition_in_f64() {
        // Sums of at most 200 terms in f32, relative to the largest gradient.
        check::<f32>(3e-6);
        // The result is rounded to 8 bits (2^-9), and so are probabilities, score gradients and the output in delta.
        check::<bf16>(3.0 / 256.0);
    }

    #[test]
    fn the_f64_gradient_is_the_slope_of_the_f64_output() {
        let heads = Heads { heads: 4, kv_heads: 2, head_dim: 6 };
        let settings = Attention { heads, cu_seqlens: &[0, 5, 6, 13], prefixes: &[], scale: 0.7, window: Some(4) };
        let mut qkv = widen(&sample::<f32>(13 * heads.width(), 1));
        let d_o = widen(&sample::<f32>(13 * 24, 2));
        let want = reference_backward(&settings, &d_o, &qkv);
        for i in (0..qkv.len()).step_by(7) {
            let step = 1e-5;
            let mut loss = |shift: f64| {
                qkv[i] += shift;
                let loss = dot(&reference(&settings, &qkv).0, &d_o);
                qkv[i] -= shift;
                loss
            };
            let slope = (loss(step) - loss(-step)) / (2.0 * step);
            assert!((slope - want[i]).abs() < 1e-8, "value {i}: slope {slope}, gradient {}", want[i]);
        }
    }

    fn check_invariance<E: Float>(heads: Heads, window: Option<usize>) {
        let lens = [300, 1, 70];
        let parts: Vec<(Vec<E>, Vec<E>)> = lens
            .iter()
            .enumerate()
            .map(|(i, len)| (sample(len * heads.heads * heads.head_dim, i), sample(len * heads.width(), i + 9)))
            .collect();
        let bits = |values: &[E]| values.iter().map(|v| v.to_f32().to_bits()).collect::<Vec<_>>();
        let differentiate = |order: &[usize]| {
            let cu_seqlens = borders(&order.iter().map(|i| lens[*i]).collect::<Vec<_>>());
            let d_o: Vec<E> = order.iter().flat_map(|i| parts[*i].0.clone()).collect();
            let qkv: Vec<E> = order.iter().flat_map(|i| parts[*i].1.clone()).collect();
            run_backward(&Attention { heads, cu_seqlens: &cu_seqlens, prefixes: &[], scale: 0.2, window }, &d_o, &qkv)
        };
        // One thread takes a document in one pass; with two threads and one kv head a lone document takes two passes.
        let mut alone: Vec<Vec<Vec<u32>>> = Vec::new();
        for count in [1, 2] {
            set_threads(count);
            alone.push((0..3).map(|i| bits(&differentiate(&[i]))).collect());
            for order in [[0, 1, 2], [2, 0, 1]] {
                let want: Vec<u32> = order.iter().flat_map(|i| alone[0][*i].clone()).collect();
                assert!(bits(&differentiate(&order)) == want, "{heads:?} in order {order:?} on {count} threads");
            }
        }
        assert!(alone[0] == alone[1], "{heads:?}: one and two threads differ");
    }

    #[test]
    fn gradients_have_the_same_bits_in_any_company_and_on_any_number_of_threads() {
        let before = threads();
        for (heads, kv_heads, head_dim) in [(4, 2, 64), (3, 1, 40)] {
            for window in [None, Some(90)] {
                check_invariance::<f32>(Heads { heads, kv_heads, head_dim }, window);
                check_invariance::<bf16>(Heads { heads, kv_heads, head_dim }, window);
            }
        }
        set_threads(before);
    }

    /// Documents that begin as others do have the bits that they have when written out, but for the sums of gradients over copies,
    /// on any number of threads.
    fn check_shared<E: Float>(heads: Heads, window: Option<usize>, tolerance: f64) {
        // The third document is all of the first and no more, the fourth begins as it does, the last as the second.
        let (cu_seqlens, prefixes) = ([0, 150, 159, 159, 230, 235, 245], [0..0, 0..0, 0..150, 0..77, 0..0, 150..158]);
        let rows: Vec<usize> =
            prefixes.iter().zip(cu_seqlens.windows(2)).flat_map(|(prefix, pair)| prefix.clone().chain(pair[0]..pair[1])).collect();
        let (whole, mut own, mut at) = (borders(&[150, 9, 150, 148, 5, 18]), vec![0; 245], 0);
        for (prefix, pair) in prefixes.iter().zip(cu_seqlens.windows(2)) {
            at += prefix.len();
            (pair[0]..pair[1]).for_each(|row| own[row] = at + row - pair[0]);
            at += pair[1] - pair[0];
        }
        let (width, o_width) = (heads.width(), heads.heads * heads.head_dim);
        let (qkv, d_o): (Vec<E>, Vec<E>) = (sample(245 * width, 1), sample(245 * o_width, 2));
        let copied: Vec<E> = rows.iter().flat_map(|row| qkv[row * width..][..width].to_vec()).collect();
        let mut d_copied = vec![E::default(); rows.len() * o_width];
        own.iter().enumerate().for_each(|(row, at)| d_copied[at * o_width..][..o_width].copy_from_slice(&d_o[row * o_width..][..o_width]));
        let written_out = Attention { heads, cu_seqlens: &whole, prefixes: &[], scale: 0.3, window };
        let (want_o, want_lse) = run(&written_out, &copied);
        let each = widen(&run_backward(&written_out, &d_copied, &copied));
        let mut want = vec![0.0; 245 * width];
        rows.iter()
            .zip(each.chunks_exact(width))
            .for_each(|(row, each)| want[row * width..][..width].iter_mut().zip(each).for_each(|(sum, x)| *sum += x));
        let (borders, ranges) =
            (cu_seqlens.map(|border| border as i32), prefixes.clone().map(|prefix| prefix.start as u32..prefix.end as u32));
        let shared = Attention { heads, cu_seqlens: &borders, prefixes: &ranges, scale: 0.3, window };
        let bits = |values: &[E]| values.iter().map(|v| v.to_f32().to_bits()).collect::<Vec<_>>();
        let mut seen: Vec<Vec<u32>> = Vec::new();
        for count in [1, 2, 5] {
            set_threads(count);
            let (o, lse) = run(&shared, &qkv);
            for (row, at) in own.iter().enumerate() {
                assert_eq!(bits(&o[row * o_width..][..o_width]), bits(&want_o[at * o_width..][..o_width]), "{heads:?}: o of row {row}");
                assert_eq!(
                    lse[row * heads.heads..][..heads.heads],
                    want_lse[at * heads.heads..][..heads.heads],
                    "{heads:?}: lse of row {row}"
                );
            }
            let got = run_backward(&shared, &d_o, &qkv);
            let size = want.iter().fold(1.0, |size: f64, v| size.max(v.abs()));
            assert_close(&widen(&got), &want, tolerance * size, &format!("{heads:?}: dqkv"));
            seen.push(bits(&got));
        }
        assert!(seen[0] == seen[1] && seen[0] == seen[2], "{heads:?}: threads change bits");
    }

    #[test]
    fn documents_that_share_rows_are_as_if_each_had_its_own() {
        let before = threads();
        for (heads, kv_heads, head_dim) in [(4, 2, 64), (3, 1, 40)] {
            for window in [None, Some(60)] {
                check_shared::<f32>(Heads { heads, kv_heads, head_dim }, window, 1e-6);
                // Each copy's part is rounded to 8 bits where it is written out.
                check_shared::<bf16>(Heads { heads, kv_heads, head_dim }, window, 3.0 / 256.0);
            }
        }
        set_threads(before);
    }

    /// Prints the share of causal arithmetic: 4 operations a score and column forward, 10 backward.
    fn measure<E: Float>(heads: Heads, lens: &[usize]) {
        let cu_seqlens = borders(lens);
        let tokens: usize = lens.iter().sum();
        let settings = Attention { heads, cu_seqlens: &cu_seqlens, prefixes: &[], scale: 0.125, window: None };
        let (qkv, d_o): (Vec<E>, Vec<E>) = (sample(tokens * heads.width(), 3), sample(tokens * heads.heads * heads.head_dim, 4));
        let (mut o, mut lse) = run(&settings, &qkv);
        let mut dqkv = qkv.clone();
        let pairs: usize = lens.iter().map(|len| len * (len + 1) / 2).sum();
        let operations = (pairs * heads.heads * heads.head_dim) as f64;
        let mut best = [f64::MAX; 2];
        for _ in 0..12 {
            let start = std::time::Instant::now();
            super::super::attention::attention(&settings, &qkv, &mut o, &mut lse).unwrap();
            best[0] = best[0].min(start.elapsed().as_secs_f64());
            let start = std::time::Instant::now();
            attention_backward(&settings, &d_o, &qkv, &o, &lse, &mut dqkv).unwrap();
            best[1] = best[1].min(start.elapsed().as_secs_f64());
        }
        println!(
            "{} {heads:?} {} documents of {}: forward {:.2} ms {:.0} GFLOP/s, backward {:.2} ms {:.0} GFLOP/s",
            E::DTYPE,
            lens.len(),
            lens[0],
            best[0] * 1e3,
            4e-9 * operations / best[0],
            best[1] * 1e3,
            10e-9 * operations / best[1]
        );
    }

    #[test]
    #[ignore = "a measurement"]
    fn attention_throughput() {
        for count in [1, 2] {
            set_threads(count);
            println!("{count} threads, {:?}", crate::kernels::cpu::isa::isa());
            for (heads, kv_heads, head_dim, lens) in
                [(8, 2, 64, &[512; 4][..]), (14, 2, 64, &[512; 4][..]), (14, 2, 64, &[4096][..]), (12, 2, 128, &[1024; 2][..])]
            {
                let heads = Heads { heads, kv_heads, head_dim };
                measure::<f32>(heads, lens);
                measure::<bf16>(heads, lens);
            }
        }
    }
}
