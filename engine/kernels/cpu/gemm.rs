//! Matrix products of linear layers over weights in panels (panels.rs): forward, gradient of the input, of the weight and
//! of the bias. Sums are f32. Allocates only recycled scratch. Knows nothing of layers, graphs or devices.
//!
//! Order of sums. An output element of [`forward`] and [`input_gradient`] is one chain along its reduction index, in one
//! lane, whatever the number of rows, their neighbours, the threads and the blocking (tile.rs): a row alone and the same
//! row in a batch agree in every bit. Bias and residual join in f32 after the whole sum, then the value is rounded once.
//! [`weight_gradient`] and [`bias_gradient`] add tokens in their order; threads change nothing. Where a sum goes on in another
//! call, slab or part, it is cut at a multiple of 32 of the reduction index: a group of AMX (tile.rs).

use super::epilogue::{finish_forward, finish_gradient, streams};
use super::isa::{Isa, isa};
use super::product::{AMX_BLOCK_BYTES, Carry, Finish, Panels, Product, amx_slab_units};
use super::threads::{Shared, parallel, parallel_ranges, threads};
use super::tile::{PANEL_COLUMNS, TILE_ROWS_MAX, TileElement};
use super::{pack, panels};
use crate::kernels::buffer::Buffer;
use crate::kernels::element::Float;
use crate::vectorised;
use std::ops::Range;

/// Units of tokens that [`weight_gradient`] packs at a time. Twice as many measured 12 % slower at 4864 outputs: the packed
/// gradient of the output no longer stays in the cache between two parts of the inputs.
const TOKEN_UNITS: usize = 1024;

/// Most bytes of the weight that [`input_gradient`] holds transposed at a time, and of the output's gradient that
/// [`weight_gradient`] holds packed.
const SLAB_BYTES: usize = 32 << 20;

/// Most rows for which [`input_gradient`] turns the weight a panel at a time; twice as many on AMX, which waits for memory.
const FEW_ROWS: usize = 320;

/// The weight of a linear layer, `[outputs, inputs]`, in panels of `E`.
#[derive(Clone, Copy)]
pub struct Weight<'a, E> {
    pub panels: &'a [E],
    pub outputs: usize,
    pub inputs: usize,
}

impl<E: TileElement> Weight<'_, E> {
    fn check(&self) {
        assert!(self.outputs > 0, "a weight without outputs");
        assert_eq!(self.panels.len(), panels::len::<E>(self.outputs, self.inputs), "panels of [{}, {}]", self.outputs, self.inputs);
    }
}

/// Rows of a row-major matrix, all or a choice of them.
pub(super) struct Rows<'a, E> {
    values: &'a [E],
    width: usize,
    choice: Option<&'a [u32]>,
}

impl<'a, E> Rows<'a, E> {
    /// Asserts that there are `count` rows.
    pub(super) fn new(values: &'a [E], width: usize, choice: Option<&'a [u32]>, count: usize) -> Self {
        match choice {
            None => assert_eq!(values.len(), count * width, "values of [{count}, {width}]"),
            Some(choice) => {
                assert_eq!(choice.len(), count, "a choice of {count} rows");
                let last = choice.iter().max().map_or(0, |last| *last as usize + 1);
                assert!(last * width <= values.len(), "row {} of {} values in rows of {width}", last.saturating_sub(1), values.len());
            }
        }
        Self { values, width, choice }
    }

    pub(super) fn row(&self, i: usize) -> &'a [E] {
        let row = self.choice.map_or(i, |choice| choice[i] as usize);
        &self.values[row * self.width..(row + 1) * self.width]
    }
}

/// `y = x Wᵀ (+ bias) (+ residual)`.
///
/// - `y`: `[m, outputs]`, E or, for logits, f32; row-major like all but the weight
/// - `x`: `[m, inputs]`; with `rows`, row `i` of the product uses row `rows[i]` of `x`, which may have any number of rows
/// - `bias`: `[outputs]`; `residual`: `[m, outputs]`
pub fn forward<E: TileElement, O: Float>(
    y: &mut [O],
    x: &[E],
    rows: Option<&[u32]>,
    weight: Weight<E>,
    bias: Option<&[E]>,
    residual: Option<&[O]>,
) {
    forward_as(isa(), y, x, rows, weight, bias, residual);
}

fn forward_as<E: TileElement, O: Float>(
    isa: Isa,
    y: &mut [O],
    x: &[E],
    rows: Option<&[u32]>,
    weight: Weight<E>,
    bias: Option<&[E]>,
    residual: Option<&[O]>,
) {
    weight.check();
    let Weight { panels, outputs, inputs } = weight;
    assert_eq!(y.len() % outputs, 0, "y has {} values, rows of {outputs}", y.len());
    assert!(bias.is_none_or(|bias| bias.len() == outputs), "a bias of {outputs}");
    assert!(residual.is_none_or(|residual| residual.len() == y.len()), "a residual of {}", y.len());
    let count = y.len() / outputs;
    let x = Rows::new(x, inputs, rows, count);
    let streams = streams(y);
    let y = Shared::new(y);
    let product =
        Product { isa, rows: count, units: E::units(inputs), panels: Panels::Stored(panels), columns: outputs.div_ceil(PANEL_COLUMNS) };
    product.run(
        &|rows, out| pack_rows(isa, &x, 0..inputs, rows, out),
        None,
        Some(&|top, panel, sums| {
            let left = panel * PANEL_COLUMNS;
            let width = PANEL_COLUMNS.min(outputs - left);
            let bias = bias.map(|bias| &bias[left..left + width]);
            finish_forward(&y, top * outputs + left, outputs, width, sums, bias, residual, streams);
        }),
    );
}

/// `dx = dy W`, or `dx += dy W`: the gradient of the layer's input.
///
/// - `dx`: `[m, inputs]`, E or f32
/// - `dy`: `[m, outputs]`
/// - `add`: add to `dx` (in f32, rounded once) instead of overwriting it
pub fn input_gradient<E: TileElement, O: Float>(dx: &mut [O], dy: &[E], weight: Weight<E>, add: bool) {
    let few_rows = if E::layout(isa()).is_for_vectors() { FEW_ROWS } else { 2 * FEW_ROWS };
    input_gradient_as(isa(), dx, dy, weight, add, SLAB_BYTES, few_rows);
}

fn input_gradient_as<E: TileElement, O: Float>(
    isa: Isa,
    dx: &mut [O],
    dy: &[E],
    weight: Weight<E>,
    add: bool,
    transposed_bytes: usize,
    few_rows: usize,
) {
    weight.check();
    let Weight { outputs, inputs, .. } = weight;
    assert_eq!(dy.len() % outputs, 0, "dy has {} values, rows of {outputs}", dy.len());
    let count = dy.len() / outputs;
    assert_eq!(dx.len(), count * inputs, "dx of [{count}, {inputs}]");
    if dx.is_empty() {
        return;
    }
    let dy = Rows::new(dy, outputs, None, count);
    let columns = inputs.div_ceil(PANEL_COLUMNS);
    // With few rows a task turns each panel of inputs just before it uses it, in its own cache; with many, they are split
    // over tasks, and all panels are turned beforehand.
    let few = count <= few_rows && columns >= threads();
    // Outputs, the reduction index, are taken a slab at a time: as many as fit, in whole panels.
    let panel_bytes = transposed_bytes / if few { 32 } else { columns };
    let mut slab_panels = (panel_bytes / (PANEL_COLUMNS * PANEL_COLUMNS * size_of::<E>())).max(1);
    if few && !E::layout(isa).is_for_vectors() {
        // All rows of the slab meet each panel, and AMX waits for them unless they lie in the second cache.
        let layout = E::layout(isa);
        let most = amx_slab_units(layout, true).min(AMX_BLOCK_BYTES / (layout.unit_bytes * count)).max(PANEL_COLUMNS);
        slab_panels = slab_panels.min(most * E::UNIT / PANEL_COLUMNS);
    }
    let slab = (slab_panels * PANEL_COLUMNS).min(outputs.next_multiple_of(PANEL_COLUMNS));
    let mut transposed = Buffer::<E>::scratch(if few { 0 } else { columns * slab * PANEL_COLUMNS });
    let mut carry = Buffer::<f32>::scratch(if slab < outputs { columns * count * PANEL_COLUMNS } else { 0 });
    let streams = streams(dx);
    let dx = Shared::new(dx);
    for start in (0..outputs).step_by(slab) {
        let taken = start..outputs.min(start + slab);
        let units = E::units(taken.len());
        let turn = |q: usize, panel: &mut [E]| transpose_panel(isa, weight, taken.clone(), q, panel);
        let panels = if few {
            Panels::Made(&turn)
        } else {
            let size = units * PANEL_COLUMNS * E::UNIT;
            let shared = Shared::new(&mut transposed);
            // SAFETY: each task writes its own panel.
            parallel(columns, |q| turn(q, unsafe { shared.part(q * size..(q + 1) * size) }));
            Panels::Stored(&transposed[..columns * size])
        };
        let carry = (slab < outputs).then_some(Carry { sums: Shared::new(&mut carry), add: start > 0 });
        let finish = |top: usize, panel: usize, sums: &[f32]| {
            let left = panel * PANEL_COLUMNS;
            finish_gradient(&dx, top * inputs + left, inputs, PANEL_COLUMNS.min(inputs - left), sums, add, streams);
        };
        let pack = |rows: Range<usize>, out: &mut [E]| pack_rows(isa, &dy, taken.clone(), rows, out);
        let finish: Option<Finish> = if taken.end == outputs { Some(&finish) } else { None };
        Product { isa, rows: count, units, panels, columns }.run(&pack, carry.as_ref(), finish);
    }
}

/// Writes inputs `q * 32..` of outputs `taken` (from the start of a panel) as a panel, outputs running down.
fn transpose_panel<E: TileElement>(isa: Isa, weight: Weight<E>, taken: Range<usize>, q: usize, panel: &mut [E]) {
    let size = panels::panel_len::<E>(weight.inputs);
    let height = PANEL_COLUMNS.min(weight.inputs - q * PANEL_COLUMNS);
    let block_len = E::units(height) * PANEL_COLUMNS * E::UNIT;
    for (i, rows) in panel.chunks_mut(PANEL_COLUMNS * PANEL_COLUMNS).enumerate() {
        let p = taken.start / PANEL_COLUMNS + i;
        let block = &weight.panels[p * size + q * PANEL_COLUMNS * PANEL_COLUMNS..][..block_len];
        if rows.len() == PANEL_COLUMNS * PANEL_COLUMNS {
            pack::transposed_block(isa, block, height, rows);
        } else {
            let mut whole = [E::default(); PANEL_COLUMNS * PANEL_COLUMNS];
            pack::transposed_block(isa, block, height, &mut whole);
            rows.copy_from_slice(&whole[..rows.len()]);
        }
    }
}

/// `dW = dyᵀ x`, or `dW += dyᵀ x`, over all tokens in their order.
///
/// - `dw`: `[outputs, inputs]` in f32 panels, whatever E is
/// - `dy`: `[m, outputs]`
/// - `x`: `[m, inputs]`; with `rows`, token `i` uses row `rows[i]` of `x`
/// - `add`: continue the sums in `dw`; in two calls cut at a multiple of 32 tokens they have the bits of one call
pub fn weight_gradient<E: TileElement>(dw: &mut [f32], dy: &[E], x: &[E], rows: Option<&[u32]>, outputs: usize, inputs: usize, add: bool) {
    weight_gradient_as(isa(), (dw, outputs, inputs), dy, x, rows, add, SLAB_BYTES);
}

fn weight_gradient_as<E: TileElement>(
    isa: Isa,
    (dw, outputs, inputs): (&mut [f32], usize, usize),
    dy: &[E],
    x: &[E],
    rows: Option<&[u32]>,
    add: bool,
    packed_bytes: usize,
) {
    assert!(outputs > 0, "a weight without outputs");
    assert_eq!(dw.len(), panels::len_f32(outputs, inputs), "f32 panels of [{outputs}, {inputs}]");
    assert_eq!(dy.len() % outputs, 0, "dy has {} values, rows of {outputs}", dy.len());
    let count = dy.len() / outputs;
    let (dy, x) = (Rows::new(dy, outputs, None, count), Rows::new(x, inputs, rows, count));
    if count == 0 && !add {
        dw.fill(0.0);
    }
    if inputs == 0 {
        return;
    }
    // Outputs are taken a slab at a time, so that a vocabulary of them needs no second copy of its gradients.
    let slab = (packed_bytes / (TOKEN_UNITS * PANEL_COLUMNS * E::UNIT * size_of::<E>())).max(1) * PANEL_COLUMNS;
    let slab = slab.min(outputs.next_multiple_of(PANEL_COLUMNS));
    let mut packed = Buffer::<E>::scratch(panels::len::<E>(slab, count.min(TOKEN_UNITS * E::UNIT)));
    for (left, dw) in (0..outputs).step_by(slab).zip(dw.chunks_mut(slab * inputs)) {
        let taken = left..outputs.min(left + slab);
        let columns = taken.len().div_ceil(PANEL_COLUMNS);
        for start in (0..count).step_by(TOKEN_UNITS * E::UNIT) {
            let tokens = start..count.min(start + TOKEN_UNITS * E::UNIT);
            let panels = &mut packed[..columns * panels::panel_len::<E>(tokens.len())];
            pack_panels(isa, &dy, tokens.clone(), taken.clone(), panels);
            // The sums of a product lie exactly as f32 panels of the weight do, inputs running down.
            let carry = Carry { sums: Shared::new(dw), add: add || start > 0 };
            let pack = |inputs: Range<usize>, out: &mut [E]| {
                let token = |i: usize| &x.row(tokens.start + i)[inputs.clone()];
                pack::tiles_of_columns(isa, token, tokens.len(), inputs.len(), out);
            };
            let product = Product { isa, rows: inputs, units: E::units(tokens.len()), panels: Panels::Stored(panels), columns };
            product.run(&pack, Some(&carry), None);
        }
    }
}

/// Packs outputs `taken` of `tokens` of `dy` into panels, tokens running down.
fn pack_panels<E: TileElement>(isa: Isa, dy: &Rows<E>, tokens: Range<usize>, taken: Range<usize>, out: &mut [E]) {
    let size = panels::panel_len::<E>(tokens.len());
    let out = Shared::new(out);
    parallel_ranges(taken.len().div_ceil(PANEL_COLUMNS), 4, |range| {
        // SAFETY: parallel_ranges hands out disjoint ranges of panels.
        let out = unsafe { out.part(range.start * size..range.end * size) };
        let columns = taken.start + range.start * PANEL_COLUMNS..taken.end.min(taken.start + range.end * PANEL_COLUMNS);
        let token = |i: usize| &dy.row(tokens.start + i)[columns.clone()];
        pack::columns_of_tokens::<E, PANEL_COLUMNS>(isa, token, tokens.len(), columns.len(), true, out);
    });
}

/// `db = column sums of dy`, or `db += ...`, in f32, tokens in their order.
///
/// - `db`: `[outputs]`; `dy`: `[m, outputs]`
pub fn bias_gradient<E: Float>(db: &mut [f32], dy: &[E], add: bool) {
    let outputs = db.len();
    assert!(outputs > 0, "a bias without outputs");
    assert_eq!(dy.len() % outputs, 0, "dy has {} values, rows of {outputs}", dy.len());
    let db = Shared::new(db);
    parallel_ranges(outputs, 256, |range| {
        // SAFETY: parallel_ranges hands out disjoint ranges.
        let sums = unsafe { db.part(range.clone()) };
        if !add {
            sums.fill(0.0);
        }
        add_rows(sums, dy, range.start, outputs);
    });
}

vectorised! {
    /// Adds columns `left..` of all rows of `dy` to `sums`.
    fn add_rows<E: Float>(sums: &mut [f32], dy: &[E], left: usize, width: usize) {
        for row in dy.chunks_exact(width) {
            for (sum, value) in sums.iter_mut().zip(&row[left..]) {
                *sum += value.to_f32();
            }
        }
    }
}

/// Packs columns `taken` of `rows` into tiles, as the form's layout says.
pub(super) fn pack_rows<E: TileElement>(isa: Isa, values: &Rows<E>, taken: Range<usize>, rows: Range<usize>, out: &mut [E]) {
    let layout = E::layout(isa);
    let row_len = layout.row_len::<E>(E::units(taken.len()));
    for (i, tile) in out.chunks_mut((layout.rows * row_len).max(1)).enumerate() {
        let first = rows.start + i * layout.rows;
        let count = layout.rows.min(rows.end - first);
        let mut sources: [&[E]; TILE_ROWS_MAX] = [&[]; TILE_ROWS_MAX];
        for (r, source) in sources.iter_mut().enumerate().take(count) {
            *source = &values.row(first + r)[taken.clone()];
        }
        pack::tile_of_rows_as(isa, &sources[..count], tile);
    }
}

#[cfg(test)]
mod tests {
    use super::super::threads::set_threads;
    use super::*;
    use half::bf16;
    use std::sync::Mutex;

    /// Held by tests that set the number of threads.
    static THREADS: Mutex<()> = Mutex::new(());

    fn forms() -> impl Iterator<Item = Isa> {
        Isa::ALL.into_iter().filter(|isa| *isa <= Isa::best())
    }

    /// Values in -1 to 1, from a seed, rounded to E.
    fn values<E: Float>(count: usize, seed: u64) -> Vec<E> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..count).map(|_| E::from_f32(next())).collect()
    }

    fn packed<E: TileElement>(rows: &[E], n: usize, k: usize) -> Vec<E> {
        let mut out = vec![E::default(); panels::len::<E>(n, k)];
        panels::pack(&mut out, n, k, 0..n, rows);
        out
    }

    /// `got` against the sum of `terms`: every addition rounds by 2^-24 of the terms' sizes, twice that if products are
    /// rounded too; the result rounds once more, by 2^-8 in bf16.
    fn check<O: Float>(got: O, terms: impl Iterator<Item = (f64, f64)>, what: &str) {
        let (mut sum, mut size, mut count) = (0.0, 0.0, 2);
        for (a, b) in terms {
            sum += a * b;
            size += (a * b).abs();
            count += 1;
        }
        let rounding = if size_of::<O>() == 2 { sum.abs() * 2.0f64.powi(-8) } else { 0.0 };
        let bound = size * f64::from(count) * 2.0f64.powi(-23) + rounding;
        let got = f64::from(got.to_f32());
        assert!((got - sum).abs() <= bound, "{what}: {got} against {sum}, bound {bound}");
    }

    const SHAPES: [(usize, usize, usize); 11] = [
        (1, 1, 1),
        (1, 33, 70),
        (2, 7, 33),
        (7, 64, 1),
        (13, 801, 100),
        (33, 100, 31),
        (37, 1, 65),
        (250, 67, 97),
        (3, 0, 70),
        (1, 9, 900),
        (4, 5, 401),
    ];

    fn products<E: TileElement, O: Float>() {
        for (m, k, n) in SHAPES {
            for isa in forms() {
                let what = format!("{isa:?} {} to {}, {m} x {k} x {n}", E::DTYPE, O::DTYPE);
                let (x, w, dy) = (values::<E>((m + 3) * k, 1), values::<E>(n * k, 2), values::<E>(m * n, 3));
                let (bias, residual) = (values::<E>(n, 4), values::<O>(m * n, 5));
                let rows: Vec<u32> = (0..m as u32).map(|i| (i * 5 + 2) % (m as u32 + 3)).collect();
                let panels = packed(&w, n, k);
                let weight = Weight { panels: &panels, outputs: n, inputs: k };
                let f = |v: E| f64::from(v.to_f32());
                let mut y = values::<O>(m * n, 6);
                forward_as(isa, &mut y, &x, Some(&rows), weight, Some(&bias), Some(&residual));
                for (i, y) in y.iter().enumerate() {
                    let (r, j) = (rows[i / n] as usize, i % n);
                    let terms = (0..k).map(|kk| (f(x[r * k + kk]), f(w[j * k + kk])));
                    check(*y, terms.chain([(f(bias[j]), 1.0), (f64::from(residual[i].to_f32()), 1.0)]), &format!("{what} y[{i}]"));
                }
                for (add, transposed_bytes, few_rows) in [(false, 1 << 20, 0), (true, 1, 0), (true, 1 << 20, m), (false, 1, m)] {
                    let before = values::<O>(m * k, 7);
                    let mut dx = before.clone();
                    input_gradient_as(isa, &mut dx, &dy, weight, add, transposed_bytes, few_rows);
                    for (i, dx) in dx.iter().enumerate() {
                        let terms = (0..n).map(|j| (f(dy[i / k * n + j]), f(w[j * k + i % k])));
                        let start = if add { f64::from(before[i].to_f32()) } else { 0.0 };
                        check(*dx, terms.chain([(start, 1.0)]), &format!("{what} dx[{i}]"));
                    }
                }
                for (add, bytes) in [(false, 1 << 20), (true, 1)] {
                    let before = packed(&values::<f32>(n * k, 8), n, k);
                    let mut dw = before.clone();
                    weight_gradient_as(isa, (&mut dw, n, k), &dy, &x, Some(&rows), add, bytes);
                    let (mut got, mut start) = (vec![0.0; n * k], vec![0.0; n * k]);
                    panels::unpack(&dw, n, k, 0..n, &mut got);
                    panels::unpack(&before, n, k, 0..n, &mut start);
                    for (i, got) in got.iter().enumerate() {
                        let terms = (0..m).map(|t| (f(dy[t * n + i / k]), f(x[rows[t] as usize * k + i % k])));
                        let start = if add { f64::from(start[i]) } else { 0.0 };
                        check(*got, terms.chain([(start, 1.0)]), &format!("{what} dw[{i}]"));
                    }
                }
                let mut db = vec![1.0; n];
                bias_gradient(&mut db, &dy, true);
                for (j, db) in db.iter().enumerate() {
                    check(*db, (0..m).map(|t| (f(dy[t * n + j]), 1.0)).chain([(1.0, 1.0)]), &format!("{what} db[{j}]"));
                }
            }
        }
    }

    #[test]
    fn every_form_agrees_with_f64() {
        products::<f32, f32>();
        products::<bf16, bf16>();
        products::<bf16, f32>();
    }

    fn two_calls<E: TileElement>() {
        // With 300 inputs AMX cuts the tokens of one call into slabs.
        for (m, k, n) in [(2 * TOKEN_UNITS + 77, 13, 40), (2 * TOKEN_UNITS + 77, 300, 40)] {
            let (x, dy) = (values::<E>(m * k, 1), values::<E>(m * n, 2));
            let (mut whole, mut parts) = (vec![0.0; panels::len_f32(n, k)], vec![0.0; panels::len_f32(n, k)]);
            weight_gradient(&mut whole, &dy, &x, None, n, k, false);
            let cut = 31 * 32;
            weight_gradient(&mut parts, &dy[..cut * n], &x[..cut * k], None, n, k, false);
            weight_gradient(&mut parts, &dy[cut * n..], &x[cut * k..], None, n, k, true);
            assert!(whole == parts);
            let f = |v: E| f64::from(v.to_f32());
            check(whole[0], (0..m).map(|t| (f(dy[t * n]), f(x[t * k]))), "dw[0]");
        }
    }

    #[test]
    fn a_weight_gradient_in_two_calls_is_the_one_in_one_call() {
        two_calls::<f32>();
        two_calls::<bf16>();
    }

    /// Split f32 must be f32: no further from the exact sums than a chain of fused multiply-adds.
    #[test]
    fn f32_on_amx_is_as_near_to_exact_sums_as_a_chain() {
        if Isa::best() != Isa::AmxBf16 {
            return;
        }
        let (m, k, n) = (20, 1024, 40);
        // Of many sizes, as weights and gradients are.
        let spread = |seed| values::<f32>(m.max(n) * k, seed).into_iter().map(|v| v * (v * 37.0).sin().abs().powi(8)).collect::<Vec<_>>();
        let (x, w) = (spread(1)[..m * k].to_vec(), spread(2)[..n * k].to_vec());
        let panels = packed(&w, n, k);
        let exact = |i: usize| (0..k).map(|kk| f64::from(x[i / n * k + kk]) * f64::from(w[i % n * k + kk])).sum::<f64>();
        let error = |isa| {
            let mut y = vec![0.0f32; m * n];
            forward_as(isa, &mut y, &x, None, Weight { panels: &panels, outputs: n, inputs: k }, None, None);
            y.iter().enumerate().map(|(i, y)| (f64::from(*y) - exact(i)).powi(2)).sum::<f64>().sqrt()
        };
        let (split, chain) = (error(Isa::AmxBf16), error(Isa::Avx512));
        assert!(split <= chain, "split {split:e}, chain {chain:e}");
    }

    fn slabs<E: TileElement>() {
        let (m, k, n) = (400, 3001, 45);
        let (x, w) = (values::<E>(m * k, 1), values::<E>(n * k, 2));
        let panels = packed(&w, n, k);
        let weight = Weight { panels: &panels, outputs: n, inputs: k };
        for isa in forms() {
            let forward = |rows: usize| {
                let mut y = vec![0.0f32; rows * n];
                forward_as(isa, &mut y, &x[..rows * k], None, weight, None, None);
                y
            };
            let all = forward(m);
            for rows in [1, 17, 45] {
                assert!(forward(rows) == all[..rows * n], "{isa:?}: {rows} rows");
            }
            let f = |v: E| f64::from(v.to_f32());
            let last = (m - 1) * k;
            check(all[m * n - 1], (0..k).map(|i| (f(x[last + i]), f(w[(n - 1) * k + i]))), "the last of y");
        }
    }

    #[test]
    fn rows_whose_reduction_is_cut_into_slabs_are_those_of_one_row_alone() {
        slabs::<f32>();
        slabs::<bf16>();
    }

    #[test]
    fn no_rows_give_no_output_and_an_empty_weight_gradient() {
        let panels = packed(&values::<f32>(15, 1), 5, 3);
        let weight = Weight { panels: &panels, outputs: 5, inputs: 3 };
        forward::<f32, f32>(&mut [], &[], None, weight, None, None);
        forward::<f32, f32>(&mut [], &[1.0; 9], Some(&[]), weight, None, None);
        input_gradient::<f32, f32>(&mut [], &[], weight, false);
        let mut dw = vec![1.0; panels::len_f32(5, 3)];
        weight_gradient::<f32>(&mut dw, &[], &[], None, 5, 3, true);
        assert!(dw.iter().all(|v| *v == 1.0));
        weight_gradient::<f32>(&mut dw, &[], &[], None, 5, 3, false);
        assert!(dw.iter().all(|v| *v == 0.0));
    }

    fn bits<O: Float>(values: &[O]) -> Vec<u32> {
        values.iter().map(|v| v.to_f32().to_bits()).collect()
    }

    /// All results of a batch of `m` rows, the first rows of one fixed matrix.
    fn batch<E: TileElement, O: Float>(isa: Isa, m: usize, k: usize, n: usize) -> [Vec<u32>; 3] {
        let (x, dy, panels) = (values::<E>(m * k, 1), values::<E>(m * n, 3), packed(&values::<E>(n * k, 2), n, k));
        let weight = Weight { panels: &panels, outputs: n, inputs: k };
        let (mut y, mut dx, mut dw) = (vec![O::default(); m * n], vec![O::default(); m * k], vec![0.0; panels::len_f32(n, k)]);
        forward_as(isa, &mut y, &x, None, weight, Some(&values::<E>(n, 4)), None);
        input_gradient_as(isa, &mut dx, &dy, weight, false, 1_000_000, 13);
        weight_gradient_as(isa, (&mut dw, n, k), &dy, &x, None, false, 1 << 20);
        [bits(&y), bits(&dx), bits(&dw)]
    }

    fn invariance<E: TileElement, O: Float>() {
        let (k, n) = (901, 850);
        for isa in forms() {
            let what = format!("{isa:?} {}", E::DTYPE);
            let all = batch::<E, O>(isa, 257, k, n);
            for m in [1, 2, 3, 13, 37] {
                let some = batch::<E, O>(isa, m, k, n);
                assert!(some[0] == all[0][..m * n], "{what}: y of {m} rows");
                assert!(some[1] == all[1][..m * k], "{what}: dx of {m} rows");
                set_threads(1);
                let alone = batch::<E, O>(isa, m, k, n);
                set_threads(2);
                assert!(some == alone, "{what}: {m} rows on one thread");
            }
            set_threads(1);
            let alone = batch::<E, O>(isa, 257, k, n);
            set_threads(2);
            assert!(all == alone, "{what}: one thread");
            // A row in another place, through a choice of rows, is the same row.
            let (x, panels) = (values::<E>(257 * k, 1), packed(&values::<E>(n * k, 2), n, k));
            let weight = Weight { panels: &panels, outputs: n, inputs: k };
            let rows = [200, 3, 3, 256, 0];
            let mut y = vec![O::default(); rows.len() * n];
            forward_as(isa, &mut y, &x, Some(&rows), weight, Some(&values::<E>(n, 4)), None);
            for (got, row) in bits(&y).chunks(n).zip(rows) {
                assert!(got == &all[0][row as usize * n..][..n], "{what}: chosen row {row}");
            }
        }
    }

    #[test]
    fn a_row_is_the_same_alone_in_a_batch_and_on_any_thread() {
        let _guard = THREADS.lock();
        invariance::<f32, f32>();
        invariance::<bf16, f32>();
        invariance::<bf16, bf16>();
    }

    /// Best of `runs`, in seconds.
    fn best(runs: usize, mut run: impl FnMut()) -> f64 {
        let time = |_| {
            let start = std::time::Instant::now();
            run();
            start.elapsed().as_secs_f64()
        };
        (0..runs).map(time).fold(f64::INFINITY, f64::min)
    }

    fn throughput<E: TileElement>() {
        for (m, k, n) in [(2048, 512, 1408), (2048, 256, 704), (2048, 896, 4864), (2048, 4864, 896)] {
            let (x, dy, w) = (values::<E>(m * k, 1), values::<E>(m * n, 2), packed(&values::<E>(n * k, 3), n, k));
            let weight = Weight { panels: &w, outputs: n, inputs: k };
            let (mut y, mut dx, mut dw) = (Buffer::<E>::zeroed(m * n), Buffer::<E>::zeroed(m * k), Buffer::<f32>::zeroed(w.len()));
            let rate = |seconds: f64| 2.0 * (m * k * n) as f64 / seconds / 1e9;
            let runs = if n == 4864 || k == 4864 { 8 } else { 40 };
            println!(
                "{} {m} x {k} x {n}: forward {:.0}, dx {:.0}, dw {:.0} GFLOP/s",
                E::DTYPE,
                rate(best(runs, || forward(&mut y[..], &x, None, weight, None, None))),
                rate(best(runs, || input_gradient(&mut dx[..], &dy, weight, false))),
                rate(best(runs, || weight_gradient(&mut dw, &dy, &x, None, n, k, true))),
            );
        }
        for m in [1, 2, 4, 8] {
            let (k, n) = (896, 151_936 / 2);
            let (x, w) = (values::<E>(m * k, 1), packed(&values::<E>(n * k, 3), n, k));
            let weight = Weight { panels: &w, outputs: n, inputs: k };
            let mut y = Buffer::<f32>::zeroed(m * n);
            let seconds = best(5, || forward(&mut y[..], &x, None, weight, None, None));
            println!("{} {m} x {k} x {n}: {:.1} GB/s of weights", E::DTYPE, (w.len() * size_of::<E>()) as f64 / seconds / 1e9);
        }
    }

    #[test]
    #[ignore = "a measurement: cargo test --release gemm_throughput -- --ignored --nocapture"]
    fn gemm_throughput() {
        throughput::<f32>();
        throughput::<bf16>();
    }
}
