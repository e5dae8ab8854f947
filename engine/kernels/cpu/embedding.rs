//! Rows of the embedding table by token id, and the table's gradient. The table may lie in row-major order or, when it
//! is also the output head, in the column panels that the matrix products read. No scale, no positions.

use super::threads::{Shared, parallel_ranges};
use crate::kernels::element::{Dtype, Float};

/// Vocabulary rows side by side in one panel.
pub const PANEL: usize = 32;

/// Where row `v`, column `c` of a `[vocab, hidden]` table lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// `v * hidden + c`.
    Rows,
    /// Panels of 32 vocabulary rows with the columns running down each: f32 `[ceil(vocab/32)][hidden][32]`, bf16
    /// `[ceil(vocab/32)][ceil(hidden/2)][32][2]`, pairs along the columns. Absent rows and columns are zero.
    Panels,
}

impl Order {
    /// Elements of a `[vocab, hidden]` table of `E` in this order.
    pub fn len<E: Float>(self, vocab: usize, hidden: usize) -> usize {
        match self {
            Self::Rows => vocab * hidden,
            Self::Panels if E::DTYPE == Dtype::Bf16 => vocab.div_ceil(PANEL) * PANEL * hidden.next_multiple_of(2),
            Self::Panels => vocab.div_ceil(PANEL) * PANEL * hidden,
        }
    }
}

fn row_of(id: i32, vocab: usize) -> usize {
    let row = usize::try_from(id).unwrap_or(usize::MAX);
    assert!(row < vocab, "embedding: token id {id} of a vocabulary of {vocab}");
    row
}

/// Copies row `ids[t]` of `weight` to row `t` of `out`.
///
/// - `weight`: `[vocab, hidden]` in `order`
/// - `ids`: `[tokens]`, each in `0..vocab` (the caller has checked them)
/// - `out`: `[tokens, hidden]`
pub fn embed<E: Float>(weight: &[E], order: Order, vocab: usize, hidden: usize, ids: &[i32], out: &mut [E]) {
    assert!(weight.len() == order.len::<E>(vocab, hidden), "embedding: a {vocab} x {hidden} table of {} values", weight.len());
    assert!(out.len() == ids.len() * hidden, "embedding: out has {} values for [{}, {hidden}]", out.len(), ids.len());
    let pairs = E::DTYPE == Dtype::Bf16;
    let out = Shared::new(out);
    parallel_ranges(ids.len(), 16, |tokens| {
        // SAFETY: parallel_ranges hands out disjoint ranges of tokens.
        let out = unsafe { out.part(tokens.start * hidden..tokens.end * hidden) };
        for (index, id) in ids[tokens].iter().enumerate() {
            let row = row_of(*id, vocab);
            let out = &mut out[index * hidden..(index + 1) * hidden];
            match order {
                Order::Rows => out.copy_from_slice(&weight[row * hidden..(row + 1) * hidden]),
                Order::Panels if pairs => {
                    let stride = PANEL * hidden.next_multiple_of(2);
                    let panel = &weight[row / PANEL * stride..(row / PANEL + 1) * stride];
                    let lane = 2 * (row % PANEL);
                    for (out, pair) in out.chunks_mut(2).zip(panel.chunks_exact(2 * PANEL)) {
                        out.copy_from_slice(&pair[lane..lane + out.len()]);
                    }
                }
                Order::Panels => {
                    let stride = PANEL * hidden;
                    let panel = &weight[row / PANEL * stride..(row / PANEL + 1) * stride];
                    for (out, column) in out.iter_mut().zip(panel.chunks_exact(PANEL)) {
                        *out = column[row % PANEL];
                    }
                }
            }
        }
    });
}

/// Adds row `t` of `d_out` to row `ids[t]` of the table's gradient, tokens in order, so that a row that occurs often
/// always sums the same way.
///
/// - `d_out`: `[tokens, hidden]`
/// - `ids`: `[tokens]`, each in `0..vocab`
/// - `d_weight`: `[vocab, hidden]`, f32, in `order` (panels as of f32, whatever `E` is), added to
pub fn embed_backward<E: Float>(d_out: &[E], ids: &[i32], order: Order, vocab: usize, hidden: usize, d_weight: &mut [f32]) {
    assert!(d_weight.len() == order.len::<f32>(vocab, hidden), "embedding: a {vocab} x {hidden} gradient of {} values", d_weight.len());
    assert!(d_out.len() == ids.len() * hidden, "embedding: d_out has {} values for [{}, {hidden}]", d_out.len(), ids.len());
    let d_weight = Shared::new(d_weight);
    // Tasks own columns, not tokens: no two of them meet in one element. Taking the tokens of one panel together, so
    // that they share cache lines, was tried: a quarter faster for 4096 words, a tenth slower for 151936.
    parallel_ranges(hidden, 64, |columns| {
        for (id, d_out) in ids.iter().zip(d_out.chunks_exact(hidden)) {
            let row = row_of(*id, vocab);
            let d_out = &d_out[columns.clone()];
            match order {
                Order::Rows => {
                    // SAFETY: this task alone touches its columns, in any row, and holds one part at a time.
                    let own = unsafe { d_weight.part(row * hidden + columns.start..row * hidden + columns.end) };
                    own.iter_mut().zip(d_out).for_each(|(own, d)| *own += d.to_f32());
                }
                Order::Panels => {
                    let panel = row / PANEL * PANEL * hidden;
                    // SAFETY: as above; columns lie one after the other down a panel.
                    let own = unsafe { d_weight.part(panel + columns.start * PANEL..panel + columns.end * PANEL) };
                    for (own, d) in own.chunks_exact_mut(PANEL).zip(d_out) {
                        own[row % PANEL] += d.to_f32();
                    }
                }
            }
        }
    });
}

/// Puts row i of `some` to row `places[i]` of `all`: added to what is there, or with zeros in all other rows.
///
/// - `some`: `[places, width]`
/// - `places`: ascending, each once
/// - `all`: `[rows, width]`
pub fn spread_rows<E: Float>(some: &[E], places: &[u32], width: usize, all: &mut [E], add: bool) {
    assert!(some.len() == places.len() * width, "spread_rows: {} values for [{}, {width}]", some.len(), places.len());
    assert!(places.is_sorted(), "spread_rows: places out of order");
    let rows = all.len() / width.max(1);
    let all = Shared::new(all);
    parallel_ranges(rows, 16, |range| {
        // SAFETY: parallel_ranges hands out disjoint ranges of rows.
        let part = unsafe { all.part(range.start * width..range.end * width) };
        if !add {
            part.fill(E::default());
        }
        let taken = places.partition_point(|row| (*row as usize) < range.start)..places.partition_point(|row| (*row as usize) < range.end);
        for (from, row) in some[taken.start * width..taken.end * width].chunks_exact(width.max(1)).zip(&places[taken]) {
            let to = &mut part[(*row as usize - range.start) * width..][..width];
            to.iter_mut().zip(from).for_each(|(to, from)| *to = E::from_f32(to.to_f32() + from.to_f32()));
        }
    });
}

#[cfg(test)]
mod tests {
    use super::super::samples::{assert_same_on_any_threads, cast, uniform};
    use super::*;
    use half::bf16;

    /// Index of row `v`, column `c` in panels, written from the layout's definition.
    fn panel_index<E: Float>(v: usize, c: usize, hidden: usize) -> usize {
        match E::DTYPE {
            Dtype::Bf16 => (((v / 32) * hidden.div_ceil(2) + c / 2) * 32 + v % 32) * 2 + c % 2,
            _ => ((v / 32) * hidden + c) * 32 + v % 32,
        }
    }

    fn check<E: Float>(vocab: usize, hidden: usize, ids: &[i32]) {
        let rows = cast::<E>(&uniform(1, vocab * hidden));
        let mut panels = vec![E::default(); Order::Panels.len::<E>(vocab, hidden)];
        for v in 0..vocab {
            for c in 0..hidden {
                panels[panel_index::<E>(v, c, hidden)] = rows[v * hidden + c];
            }
        }
        let want: Vec<E> = ids.iter().flat_map(|id| rows[*id as usize * hidden..(*id as usize + 1) * hidden].to_vec()).collect();
        for (order, weight) in [(Order::Rows, &rows), (Order::Panels, &panels)] {
            let mut out = vec![E::default(); ids.len() * hidden];
            embed(weight, order, vocab, hidden, ids, &mut out);
            assert_eq!(out, want, "{order:?}");
        }
    }

    #[test]
    fn both_orders_give_the_rows() {
        for (vocab, hidden) in [(1, 1), (33, 7), (70, 64)] {
            let ids: Vec<i32> = (0..45).map(|i| i * 11 % vocab as i32).collect();
            for ids in [&ids[..], &ids[..1], &[]] {
                check::<f32>(vocab, hidden, ids);
                check::<bf16>(vocab, hidden, ids);
            }
        }
    }

    #[test]
    fn gradients_add_up_in_token_order_in_both_orders() {
        let (vocab, hidden) = (40, 133);
        let ids: Vec<i32> = (0..57).map(|i| if i % 3 == 0 { 5 } else { i * 7 % 40 }).collect();
        let d_out = uniform(2, ids.len() * hidden);
        let mut want = vec![0.25f32; vocab * hidden];
        for (id, d_out) in ids.iter().zip(d_out.chunks(hidden)) {
            for c in 0..hidden {
                want[*id as usize * hidden + c] += d_out[c];
            }
        }
        let mut rows = vec![0.25f32; vocab * hidden];
        embed_backward(&d_out, &ids, Order::Rows, vocab, hidden, &mut rows);
        assert_eq!(rows, want);
        let mut panels = vec![0.25f32; Order::Panels.len::<f32>(vocab, hidden)];
        embed_backward(&d_out, &ids, Order::Panels, vocab, hidden, &mut panels);
        for v in 0..vocab {
            for c in 0..hidden {
                assert_eq!(panels[panel_index::<f32>(v, c, hidden)], want[v * hidden + c]);
            }
        }
        assert_same_on_any_threads(|| {
            let mut rows = vec![0.0f32; vocab * hidden];
            embed_backward(&cast::<bf16>(&d_out), &ids, Order::Rows, vocab, hidden, &mut rows);
            rows
        });
    }

    #[test]
    #[should_panic(expected = "token id -1")]
    fn an_id_outside_the_vocabulary_is_our_mistake() {
        embed(&[0.0f32; 6], Order::Rows, 3, 2, &[-1], &mut [0.0; 2]);
    }

    #[test]
    fn spread_rows_adds_or_clears() {
        let some: Vec<f32> = (0..200).map(|i| i as f32).collect();
        let places: Vec<u32> = (0..100).map(|i| 3 * i + 1).collect();
        for add in [false, true] {
            let mut all = vec![0.5f32; 2 * 301];
            spread_rows(&some, &places, 2, &mut all, add);
            let start = if add { 0.5 } else { 0.0 };
            let want = (0..602).map(|i| start + if i / 2 % 3 == 1 { (i / 6 * 2 + i % 2) as f32 } else { 0.0 });
            assert!(all.iter().copied().eq(want), "{add}: {:?}", &all[..12]);
        }
    }
}
