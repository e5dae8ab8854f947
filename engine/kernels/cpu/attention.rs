//! Causal attention with grouped query heads over packed documents, forward: training and prefill.
//! Keeps no scores beyond one tile. Knows no caches: attention_paged.rs walks over cached blocks by [`attend_block`].
//! Source: Dao, arXiv 2307.08691 (online softmax over blocks of keys).
//!
//! Batch invariance: a row's bits depend on its document up to its position and on nothing else. Keys are walked in
//! blocks of 64 from the document's start; inside a block each score is one chain along head_dim and each output element
//! one chain along the keys; the walk ends at the multiple of 8 above the position, and the keys it passes over masked
//! have probability exactly 0. Blocks outside a sliding window leave the row's state as it is, whether visited or not.
//!
//! Semantics by element type: scores and sums in f32, softmax in f32. For bf16 the probabilities are rounded to bf16
//! before they meet the values, as on GPUs, while their sum is taken before rounding.

use super::attention_blocks::{Block, Blocks};
use super::attention_operands::{HeadRows, padded, words};
use super::attention_tile::{BLOCK, COLUMNS, Form, Left, ROWS, Row, Start, with_form};
use super::exp::exp;
use super::heads::Heads;
use super::threads::{Shared, parallel};
use crate::error::{Error, Result};
use crate::kernels::buffer::Buffer;
use crate::kernels::element::Float;
use std::ops::Range;

/// Lanes in which a row's probabilities are added; the same in every form.
const LANES: usize = 16;

/// What attention needs to know besides its tensors.
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    pub heads: Heads,
    /// Borders of the documents' own rows: ascending, first 0, last the number of tokens. A document may be empty.
    pub cu_seqlens: &'a [i32],
    /// For each document, the rows that stand before its own: the beginning of an earlier document that has none itself. No
    /// entries where every document is whole.
    pub prefixes: &'a [Range<u32>],
    /// Factor on the scores, no unit; head_dim^-0.5 in Qwen2.5.
    pub scale: f32,
    /// Sliding window in tokens: the query at i sees keys j with `i - window < j <= i`.
    pub window: Option<usize>,
}

/// Attends within each document.
///
/// - `qkv`: `[tokens, (heads + 2 * kv_heads) * head_dim]`, after rope; query head h reads kv head `h / (heads / kv_heads)`
/// - `o`: `[tokens, heads * head_dim]`, written in full
/// - `lse`: `[tokens, heads]`, f32, natural logarithm of the sum of exponentials of the scaled scores, written in full
///
/// Errors: [`Error::Shape`] or [`Error::Argument`] if sizes, borders, prefixes, scale or window do not fit.
pub fn attention<E: Float>(settings: &Attention, qkv: &[E], o: &mut [E], lse: &mut [f32]) -> Result<()> {
    let op = "attention";
    let blocks = settings.blocks(op, qkv.len())?;
    settings.check_rows(op, "o", o.len(), blocks.tokens, settings.heads.heads * settings.heads.head_dim)?;
    settings.check_rows(op, "lse", lse.len(), blocks.tokens, settings.heads.heads)?;
    with_form!(E, settings.heads.head_dim, |form| forward(form, settings, &blocks, qkv, Shared::new(o), Shared::new(lse)));
    Ok(())
}

impl Attention<'_> {
    /// The blocks of the documents, after checking everything but the outputs.
    pub(super) fn blocks(&self, op: &'static str, values: usize) -> Result<Blocks> {
        self.heads.check(op)?;
        let tokens = self.heads.tokens(op, "qkv", values)?;
        if !(self.scale > 0.0 && self.scale.is_finite()) {
            return Err(Error::argument(op, "scale", "a positive number", self.scale));
        }
        if self.window == Some(0) {
            return Err(Error::argument(op, "window", "at least 1 token, or none", 0));
        }
        Blocks::new(op, self.cu_seqlens, self.prefixes, tokens)
    }

    pub(super) fn check_rows(&self, op: &'static str, arg: &'static str, values: usize, tokens: usize, width: usize) -> Result<()> {
        if values != tokens * width {
            return Err(Error::Shape { op, arg, expected: format!("[{tokens}, {width}]"), got: format!("{values} values") });
        }
        Ok(())
    }

    /// The first position that the query at `position` sees.
    #[inline(always)]
    pub(super) fn first_visible(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }
}

/// Words of one packed block of keys (and, in the backward step, of values reduced along head_dim).
pub(super) fn transposed_words<F: Form>(heads: Heads) -> usize {
    BLOCK * words::<F>(heads.head_dim)
}

/// Words of one packed block of values (and, in the backward step, of other rows reduced along the rows).
pub(super) fn panels_words<F: Form>(heads: Heads) -> usize {
    words::<F>(BLOCK) * padded(heads.head_dim)
}

fn forward<F: Form, E: Float>(form: F, settings: &Attention, blocks: &Blocks, qkv: &[E], o: Shared<E>, lse: Shared<f32>) {
    let heads = settings.heads;
    let (key_words, value_words) = (transposed_words::<F>(heads), panels_words::<F>(heads));
    let packed_words = key_words + value_words;
    let tasks = blocks.len() * heads.kv_heads;
    // One place a block and kv head: its keys, then its values.
    let mut packed = Buffer::<f32>::scratch(tasks * packed_words);
    let places = Shared::new(&mut packed);
    parallel(tasks, |task| {
        // SAFETY: each task packs into its own place.
        let place = unsafe { places.part(task * packed_words..(task + 1) * packed_words) };
        let (block, kv_head) = (blocks.get(task / heads.kv_heads), task % heads.kv_heads);
        form.enter(
            #[inline(always)]
            || {
                let rows = |column| HeadRows::new(qkv, heads.width(), block.all_rows(), column, heads.head_dim);
                let (keys, values) = place.split_at_mut(key_words);
                rows(heads.key(kv_head)).pack_transposed::<F>(keys);
                rows(heads.value(kv_head)).pack_panels::<F>(values);
            },
        );
    });
    // From the last block on: in a long document late blocks have the most keys, and the longest tasks go first.
    parallel(tasks, |task| {
        let task = tasks - 1 - task;
        form.enter(
            #[inline(always)]
            || attend::<F, E>(form, settings, blocks.get(task / heads.kv_heads), task % heads.kv_heads, qkv, &packed, &o, &lse),
        );
    });
}

/// State of 8 rows while they walk over their keys: `[8, padded(head_dim)]` outputs, `[8]` maxima, `[8, LANES]` sums.
pub(super) struct State<'a> {
    outputs: &'a mut [f32],
    maxima: &'a mut [f32],
    sums: &'a mut [f32],
}

impl<'a> State<'a> {
    pub const fn words(padded: usize) -> usize {
        ROWS * (padded + 1 + LANES)
    }

    #[inline(always)]
    pub fn of(memory: &'a mut [f32], padded: usize) -> Self {
        let (outputs, rest) = memory.split_at_mut(ROWS * padded);
        let (maxima, sums) = rest.split_at_mut(ROWS);
        Self { outputs, maxima, sums }
    }

    #[inline(always)]
    pub fn begin(&mut self) {
        self.outputs.fill(0.0);
        self.maxima.fill(f32::NEG_INFINITY);
        self.sums.fill(0.0);
    }

    /// The lanes of row `r`'s sum.
    #[inline(always)]
    pub fn sums_of(&self, r: usize) -> &[f32; LANES] {
        self.sums[r * LANES..][..LANES].try_into().expect("the slice has this length")
    }

    /// Row `r`'s output, divided by `sum`, the row's sum of probabilities.
    #[inline(always)]
    pub fn write_row<E: Float>(&self, r: usize, sum: f32, o: &mut [E]) {
        let (factor, padded) = (1.0 / sum, self.outputs.len() / ROWS);
        o.iter_mut().zip(&self.outputs[r * padded..]).for_each(|(o, output)| *o = E::from_f32(output * factor));
    }
}

/// The queries of one block in all heads of one group, against all their keys.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the operands of one task")]
fn attend<F: Form, E: Float>(
    form: F,
    settings: &Attention,
    block: Block,
    kv_head: usize,
    qkv: &[E],
    packed: &[f32],
    o: &Shared<E>,
    lse: &Shared<f32>,
) {
    let heads = settings.heads;
    let (group, head_dim, padded) = (heads.group(), heads.head_dim, padded(heads.head_dim));
    let (key_words, value_words) = (transposed_words::<F>(heads), panels_words::<F>(heads));
    // Queries of an earlier document are answered there.
    let from = block.first + block.shared.saturating_sub(block.first) / ROWS * ROWS;
    let count = (block.first + block.count()).saturating_sub(from);
    let (tiles, tile_words) = (count.div_ceil(ROWS), ROWS * words::<F>(head_dim));
    if tiles == 0 {
        return;
    }
    let rows = block.rows(from..from + count);
    let mut queries = Buffer::<f32>::scratch(group * tiles * tile_words);
    let mut states = Buffer::<f32>::scratch(group * tiles * State::words(padded));
    let mut work = Work::new();
    for (member, tiles) in queries.chunks_exact_mut(tiles * tile_words).enumerate() {
        let column = heads.query(kv_head * group + member);
        HeadRows::new(qkv, heads.width(), rows, column, head_dim).pack_rows::<F>(tiles);
    }
    states.chunks_exact_mut(State::words(padded)).for_each(|memory| State::of(memory, padded).begin());

    for key_block in settings.first_visible(block.first) / BLOCK..=block.first / BLOCK {
        let place = (block.base + key_block) * heads.kv_heads + kv_head;
        let (keys, values) = packed[place * (key_words + value_words)..][..key_words + value_words].split_at(key_words);
        for (index, (queries, memory)) in queries.chunks_exact(tile_words).zip(states.chunks_exact_mut(State::words(padded))).enumerate() {
            let first = index % tiles * ROWS;
            let visible = std::array::from_fn(|r| Visible::of(settings, from + first + r, key_block * BLOCK));
            let (height, mut state) = (ROWS.min(count - first), State::of(memory, padded));
            attend_block::<F, E>(form, settings.scale, queries, keys, values, &visible, height, &mut state, &mut work);
        }
    }

    for (index, memory) in states.chunks_exact_mut(State::words(padded)).enumerate() {
        let state = State::of(memory, padded);
        let (head, first) = (kv_head * group + index / tiles, index % tiles * ROWS);
        for r in rows.shared.saturating_sub(first)..ROWS.min(count - first) {
            let row = rows.row(first + r) * heads.heads + head;
            let sum = sum_lanes(state.sums_of(r));
            // SAFETY: each (row, head) belongs to one tile of one task, which makes one part of each output for it.
            let (o, lse) = unsafe { (o.part(row * head_dim..(row + 1) * head_dim), lse.part(row..row + 1)) };
            lse[0] = state.maxima[r] + sum.ln();
            state.write_row(r, sum, o);
        }
    }
}

/// The keys of a block that one query sees: those at `from..to`, counted in the block.
#[derive(Clone, Copy)]
pub(super) struct Visible {
    pub from: usize,
    pub to: usize,
}

impl Visible {
    /// For the query at `position` in the block whose first key is at `first`.
    #[inline(always)]
    pub fn of(settings: &Attention, position: usize, first: usize) -> Self {
        Self {
            from: settings.first_visible(position).saturating_sub(first).min(BLOCK),
            to: (position + 1).saturating_sub(first).min(BLOCK),
        }
    }

    /// Keys of a block that 8 rows walk over: up to the last that one of them sees, rounded up to whole tiles. Rows of a
    /// tile lie between two multiples of 8, so that this depends on a row's own position only.
    #[inline(always)]
    pub fn walk(rows: &[Self; ROWS]) -> usize {
        rows.iter().map(|row| row.to).max().unwrap_or(0).next_multiple_of(ROWS)
    }

    /// Sets the scores of all other keys to minus infinity.
    #[inline(always)]
    pub fn mask(&self, scores: &mut Row) {
        if self.from == 0 && self.to == BLOCK {
            return;
        }
        let (from, to) = (self.from as u32, self.to as u32);
        for (j, score) in scores.iter_mut().enumerate() {
            *score = if (j as u32) < from || (j as u32) >= to { f32::NEG_INFINITY } else { *score };
        }
    }
}

/// Scores, softmax and weighted values of 8 query rows for one block of keys.
///
/// - `queries`: `[8, words(head_dim)]`; `keys`: `[2, words(head_dim), 32]`; `values`: `[panels, words(64), 32]`
/// - `visible`: the keys that each row sees; rows in one call have positions between two multiples of 8
/// - `rows`: how many of the rows matter, the first ones
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "the operands of one step")]
pub(super) fn attend_block<F: Form, E: Float>(
    form: F,
    scale: f32,
    queries: &[f32],
    keys: &[f32],
    values: &[f32],
    visible: &[Visible; ROWS],
    rows: usize,
    state: &mut State,
    work: &mut Work,
) {
    let depth = queries.len() / ROWS;
    let walk = Visible::walk(visible);
    let left = Left { words: queries, row: depth };
    let scores = &mut work.scores.0;
    let panels = walk.div_ceil(COLUMNS);
    form.multiply_rows(rows, left, keys, depth * COLUMNS, panels, depth, scores.as_flattened_mut(), BLOCK, Start::Zero);
    let mut factors = [0.0; ROWS];
    for ((row, visible), maximum) in scores[..rows].iter_mut().zip(visible).zip(&mut factors) {
        visible.mask(row);
        *maximum = form.max(row);
    }
    let mut shifts = [0.0; ROWS];
    for ((factor, shift), maximum) in factors[..rows].iter_mut().zip(&mut shifts).zip(&mut *state.maxima) {
        // The scale is positive, so the maximum of the scaled scores is the scaled maximum.
        let new = larger(*factor * scale, *maximum);
        // While nothing has been visible, any finite number will do: each term below is exp(-inf) = 0.
        *shift = if new == f32::NEG_INFINITY { 0.0 } else { new };
        *factor = exp(*maximum - *shift);
        *maximum = new;
    }
    for (r, row) in scores[..rows].iter_mut().enumerate() {
        let mut sums: [f32; LANES] = std::array::from_fn(|lane| state.sums[r * LANES + lane] * factors[r]);
        form.exp(row, walk, scale, shifts[r]);
        for chunk in row.chunks_exact(LANES) {
            sums.iter_mut().zip(chunk).for_each(|(sum, probability)| *sum += probability);
        }
        state.sums[r * LANES..][..LANES].copy_from_slice(&sums);
        if F::PAIRS {
            form.pair_columns(row, &mut work.pairs.0[r]);
        } else {
            row.iter_mut().for_each(|probability| *probability = E::from_f32(*probability).to_f32());
        }
    }
    let padded = state.outputs.len() / ROWS;
    let left = if F::PAIRS {
        Left { words: work.pairs.0.as_flattened(), row: BLOCK / 2 }
    } else {
        Left { words: work.scores.0.as_flattened(), row: BLOCK }
    };
    let walk = words::<F>(walk).next_multiple_of(F::GROUP);
    let (panel_words, panels) = (words::<F>(BLOCK) * COLUMNS, padded / COLUMNS);
    form.multiply_rows(rows, left, values, panel_words, panels, walk, state.outputs, padded, Start::Scaled(&factors));
}

/// 8 rows, on cache lines of their own.
#[repr(align(64))]
pub(super) struct Tile<const WIDTH: usize>(pub [[f32; WIDTH]; ROWS]);

/// Room for one tile of scores and, in a form with pairs, of its rounded probabilities.
pub(super) struct Work {
    scores: Tile<BLOCK>,
    pairs: Tile<{ BLOCK / 2 }>,
}

impl Work {
    #[inline(always)]
    pub fn new() -> Self {
        Self { scores: Tile([[0.0; BLOCK]; ROWS]), pairs: Tile([[0.0; BLOCK / 2]; ROWS]) }
    }
}

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// The sum of the lanes, always in the same order.
#[inline(always)]
pub(super) fn sum_lanes(lanes: &[f32; LANES]) -> f32 {
    let eight: [f32; 8] = std::array::from_fn(|i| lanes[i] + lanes[i + 8]);
    let four: [f32; 4] = std::array::from_fn(|i| eight[i] + eight[i + 4]);
    (four[0] + four[2]) + (four[1] + four[3])
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::kernels::cpu::threads::{set_threads, threads};
    use half::bf16;

    /// Values in -1..1 that a bf16 holds exactly, so that both element types have the same reference.
    pub fn sample<E: Float>(count: usize, seed: usize) -> Vec<E> {
        let mut state = seed as u64 * 0x9e37_79b9 + 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            E::from_f32(bf16::from_f32((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0).to_f32())
        };
        (0..count).map(|_| next()).collect()
    }

    pub fn borders(lens: &[usize]) -> Vec<i32> {
        std::iter::once(0)
            .chain(lens.iter().scan(0, |sum, len| {
                *sum += *len as i32;
                Some(*sum)
            }))
            .collect()
    }

    /// Calls `visit(head, query row, key rows it sees)` for each query of each head.
    pub fn each_query(settings: &Attention, mut visit: impl FnMut(usize, usize, std::ops::Range<usize>)) {
        for pair in settings.cu_seqlens.windows(2) {
            let (start, end) = (pair[0] as usize, pair[1] as usize);
            for row in start..end {
                let first = settings.window.map_or(start, |window| start.max((row + 1).saturating_sub(window)));
                (0..settings.heads.heads).for_each(|head| visit(head, row, first..row + 1));
            }
        }
    }

    pub fn dot(a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).map(|(a, b)| a * b).sum()
    }

    /// Outputs and log-sum-exp by the definition, in f64.
    pub fn reference(settings: &Attention, qkv: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let heads = settings.heads;
        let (dim, width) = (heads.head_dim, heads.width());
        let tokens = qkv.len() / width;
        let (mut o, mut lse) = (vec![0.0; tokens * heads.heads * dim], vec![0.0; tokens * heads.heads]);
        let at = |row: usize, column: usize| &qkv[row * width + column..][..dim];
        each_query(settings, |head, row, keys| {
            let kv_head = head / heads.group();
            let score = |key| dot(at(row, heads.query(head)), at(key, heads.key(kv_head))) * f64::from(settings.scale);
            let maximum = keys.clone().map(score).fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = keys.clone().map(|key| (score(key) - maximum).exp()).sum();
            let place = row * heads.heads + head;
            lse[place] = maximum + sum.ln();
            for key in keys {
                let probability = (score(key) - lse[place]).exp();
                for (o, v) in o[place * dim..][..dim].iter_mut().zip(at(key, heads.value(kv_head))) {
                    *o += probability * v;
                }
            }
        });
        (o, lse)
    }

    pub fn widen<E: Float>(values: &[E]) -> Vec<f64> {
        values.iter().map(|v| f64::from(v.to_f32())).collect()
    }

    pub fn run<E: Float>(settings: &Attention, qkv: &[E]) -> (Vec<E>, Vec<f32>) {
        let tokens = qkv.len() / settings.heads.width();
        let mut o = vec![E::from_f32(f32::NAN); tokens * settings.heads.heads * settings.heads.head_dim];
        let mut lse = vec![f32::NAN; tokens * settings.heads.heads];
        attention(settings, qkv, &mut o, &mut lse).unwrap();
        (o, lse)
    }

    pub fn assert_close(got: &[f64], want: &[f64], tolerance: f64, what: &str) {
        assert_eq!(got.len(), want.len());
        for (i, (got, want)) in got.iter().zip(want).enumerate() {
            assert!((got - want).abs() <= tolerance, "{what}: value {i} is {got}, expected {want}");
        }
    }

    /// (heads, kv_heads, head_dim, documents, window).
    type Case = (usize, usize, usize, &'static [usize], Option<usize>);

    /// Shapes that meet every border.
    pub const CASES: &[Case] = &[
        (1, 1, 2, &[1], None),
        (2, 1, 16, &[], None),
        (2, 1, 16, &[0, 0], None),
        (4, 2, 16, &[1, 7, 0, 33, 65, 130], None),
        (7, 1, 64, &[33, 65], None),
        (3, 3, 64, &[130, 1], Some(1)),
        (4, 2, 64, &[200, 7, 130], Some(70)),
        (2, 2, 128, &[7, 130], Some(33)),
        (2, 1, 128, &[65], None),
        (2, 1, 6, &[64, 128], Some(64)),
        (2, 1, 256, &[70], None),
        (6, 2, 80, &[67, 2], None),
    ];

    fn check<E: Float>(tolerance_o: f64, tolerance_lse: f64) {
        for (heads, kv_heads, head_dim, lens, window) in CASES.iter().copied() {
            let cu_seqlens = borders(lens);
            let heads = Heads { heads, kv_heads, head_dim };
            let settings = Attention { heads, cu_seqlens: &cu_seqlens, prefixes: &[], scale: 2.0 * (head_dim as f32).powf(-0.5), window };
            let qkv: Vec<E> = sample(lens.iter().sum::<usize>() * heads.width(), 3);
            let (o, lse) = run(&settings, &qkv);
            let (want_o, want_lse) = reference(&settings, &widen(&qkv));
            assert_close(&widen(&o), &want_o, tolerance_o, &format!("o of {settings:?}"));
            assert_close(&widen(&lse), &want_lse, tolerance_lse, &format!("lse of {settings:?}"));
        }
    }

    #[test]
    fn attention_matches_the_definition_in_f64() {
        // Scores below 32 in f32: 2^-19 each from their sums; outputs are means of values below 1.
        check::<f32>(4e-6, 4e-6);
        // The output is rounded to 8 bits (2^-9 below 1), and each probability moved by up to 2^-9 of itself.
        check::<bf16>(1.0 / 256.0, 4e-6);
    }

    fn rows<T: Copy>(values: &[T], width: usize, rows: std::ops::Range<usize>) -> Vec<T> {
        values[rows.start * width..rows.end * width].to_vec()
    }

    fn check_invariance<E: Float>(heads: Heads, window: Option<usize>) {
        let lens = [130, 1, 33, 200, 65, 7];
        let documents: Vec<Vec<E>> = lens.iter().enumerate().map(|(i, len)| sample(len * heads.width(), i + 11)).collect();
        let bits = |o: &[E], lse: &[f32]| {
            (o.iter().map(|v| v.to_f32().to_bits()).collect::<Vec<_>>(), lse.iter().map(|v| v.to_bits()).collect::<Vec<_>>())
        };
        let attend = |parts: &[&[E]]| {
            let cu_seqlens = borders(&parts.iter().map(|part| part.len() / heads.width()).collect::<Vec<_>>());
            run(&Attention { heads, cu_seqlens: &cu_seqlens, prefixes: &[], scale: 0.3, window }, &parts.concat())
        };
        let alone: Vec<_> = documents.iter().map(|document| attend(&[document])).collect();
        for order in [[0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4], [4, 0, 5, 2, 3, 1]] {
            let (o, lse) = attend(&order.map(|i| &documents[i][..]));
            let mut start = 0;
            for i in order {
                let range = start..start + lens[i];
                let packed = (rows(&o, heads.heads * heads.head_dim, range.clone()), rows(&lse, heads.heads, range));
                assert_eq!(bits(&packed.0, &packed.1), bits(&alone[i].0, &alone[i].1), "document {i} in order {order:?}");
                start += lens[i];
            }
        }
        for (document, (o, lse)) in documents.iter().zip(&alone) {
            for len in [1, 5, 8, 32, 63, 64, 100].into_iter().filter(|len| len * heads.width() < document.len()) {
                let prefix = attend(&[&document[..len * heads.width()]]);
                let want = (rows(o, heads.heads * heads.head_dim, 0..len), rows(lse, heads.heads, 0..len));
                assert_eq!(bits(&prefix.0, &prefix.1), bits(&want.0, &want.1), "a prefix of {len} tokens");
            }
        }
    }

    #[test]
    fn a_row_has_the_same_bits_in_any_company_and_on_any_number_of_threads() {
        let before = threads();
        for count in [1, 2] {
            set_threads(count);
            for (heads, kv_heads, head_dim) in [(4, 2, 64), (7, 1, 16), (2, 2, 40)] {
                let heads = Heads { heads, kv_heads, head_dim };
                for window in [None, Some(50)] {
                    check_invariance::<f32>(heads, window);
                    check_invariance::<bf16>(heads, window);
                }
            }
        }
        let heads = Heads { heads: 6, kv_heads: 2, head_dim: 64 };
        let cu_seqlens = borders(&[70, 300, 5]);
        let settings = Attention { heads, cu_seqlens: &cu_seqlens, prefixes: &[], scale: 0.125, window: None };
        let qkv: Vec<f32> = sample(375 * heads.width(), 1);
        let [one, two] = [1, 2].map(|count| {
            set_threads(count);
            run(&settings, &qkv)
        });
        set_threads(before);
        assert_eq!(one, two);
    }

    #[test]
    fn a_future_token_does_not_touch_earlier_rows() {
        let heads = Heads { heads: 2, kv_heads: 1, head_dim: 16 };
        let settings = Attention { heads, cu_seqlens: &[0, 40], prefixes: &[], scale: 0.25, window: None };
        let mut qkv: Vec<f32> = sample(40 * heads.width(), 5);
        let before = run(&settings, &qkv);
        qkv[20 * heads.width()..].iter_mut().for_each(|v| *v = 1e4 - *v);
        let after = run(&settings, &qkv);
        assert_eq!(before.0[..20 * 32], after.0[..20 * 32]);
        assert_ne!(before.0[20 * 32..], after.0[20 * 32..]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let heads = Heads { heads: 2, kv_heads: 1, head_dim: 4 };
        let right = Attention { heads, cu_seqlens: &[0, 3], prefixes: &[], scale: 0.5, window: None };
        let attempt = |settings: Attention, values: usize| attention(&settings, &vec![0.0f32; values], &mut [0.0; 24], &mut [0.0; 6]);
        attempt(right, 48).unwrap();
        for cu_seqlens in [&[] as &[i32], &[0], &[0, 2], &[1, 3], &[0, 2, 1, 3], &[0, -1, 3], &[0, 4]] {
            assert!(attempt(Attention { cu_seqlens, ..right }, 48).is_err(), "{cu_seqlens:?}");
        }
        assert!(attempt(right, 47).is_err());
        assert!(attempt(Attention { cu_seqlens: &[0, 4], ..right }, 64).is_err());
        assert!(attempt(Attention { scale: 0.0, ..right }, 48).is_err());
        assert!(attempt(Attention { scale: f32::NAN, ..right }, 48).is_err());
        assert!(attempt(Attention { window: Some(0), ..right }, 48).is_err());
        let begins = |prefixes: [Range<u32>; 3]| attempt(Attention { cu_seqlens: &[0, 1, 2, 3], prefixes: &prefixes, ..right }, 48);
        begins([0..0, 0..1, 0..1]).unwrap();
        for wrong in [[0..1, 0..0, 0..0], [0..0, 0..2, 0..0], [0..0, 0..1, 1..2], [0..0, 0..0, 2..3], [0..0, 0..0, 9..10]] {
            assert!(begins(wrong.clone()).is_err_and(|error| error.to_string().contains("prefixes")), "{wrong:?}");
        }
        let few = std::slice::from_ref(&(0..0));
        assert!(
            attempt(Attention { prefixes: few, ..right }, 48).is_ok()
                && attempt(Attention { cu_seqlens: &[0, 1, 3], prefixes: few, ..right }, 48).is_err()
        );
    }
}
