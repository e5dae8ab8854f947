//! The gated activation of the feed-forward block, forward and backward. The products around it are in matmul.
//! Source: Shazeer, arXiv 2002.05202, with silu(z) = z * sigmoid(z).

use super::exp::exp;
use super::threads::{Shared, parallel_ranges};
use crate::kernels::element::Float;
use crate::vectorised;

/// Elements below which a thread of its own costs more than it saves.
const VALUES_LEAST: usize = 8192;

/// `1 / (1 + e^-x)`, for loops that become vector code.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `act = silu(gate) * up`, in f32, rounded once.
///
/// - `gate_up`: `[tokens, 2 * inter]`, the gate's columns first, then up's
/// - `act`: `[tokens, inter]`
pub fn swiglu<E: Float>(gate_up: &[E], inter: usize, act: &mut [E]) {
    let tokens = tokens_of("swiglu", gate_up.len(), inter);
    assert!(act.len() == tokens * inter, "swiglu: act has {} values for [{tokens}, {inter}]", act.len());
    let act = Shared::new(act);
    parallel_ranges(tokens, VALUES_LEAST / inter, |rows| {
        // SAFETY: parallel_ranges hands out disjoint ranges of rows.
        let act = unsafe { act.part(rows.start * inter..rows.end * inter) };
        forward_rows(&gate_up[rows.start * 2 * inter..rows.end * 2 * inter], inter, act);
    });
}

vectorised! {
    fn forward_rows<E: Float>(gate_up: &[E], inter: usize, act: &mut [E]) {
        for (gate_up, act) in gate_up.chunks_exact(2 * inter).zip(act.chunks_exact_mut(inter)) {
            let (gate, up) = gate_up.split_at(inter);
            for ((act, gate), up) in act.iter_mut().zip(gate).zip(up) {
                let gate = gate.to_f32();
                *act = E::from_f32(gate * sigmoid(gate) * up.to_f32());
            }
        }
    }
}

/// Backward step of [`swiglu`]: with `s = sigmoid(gate)`, `d_gate = d_act * up * s * (1 + gate * (1 - s))` and
/// `d_up = d_act * gate * s`.
///
/// - `gate_up`, `d_gate_up`: `[tokens, 2 * inter]`
/// - `d_act`: `[tokens, inter]`
/// - `act`: `[tokens, inter]`, written with the same bits as the forward step's, which so need not be saved
pub fn swiglu_backward<E: Float>(gate_up: &[E], inter: usize, d_act: &[E], d_gate_up: &mut [E], act: Option<&mut [E]>) {
    assert!(d_gate_up.len() == gate_up.len(), "swiglu: d_gate_up has {} values, not {}", d_gate_up.len(), gate_up.len());
    backward(Some(gate_up), inter, d_act, d_gate_up, act);
}

/// [`swiglu_backward`] that writes the gradient over `gate_up` itself.
pub fn swiglu_backward_in_place<E: Float>(gate_up: &mut [E], inter: usize, d_act: &[E], act: Option<&mut [E]>) {
    backward(None, inter, d_act, gate_up, act);
}

fn backward<E: Float>(gate_up: Option<&[E]>, inter: usize, d_act: &[E], d_gate_up: &mut [E], act: Option<&mut [E]>) {
    let tokens = tokens_of("swiglu", d_gate_up.len(), inter);
    assert!(d_act.len() == tokens * inter, "swiglu: d_act has {} values for [{tokens}, {inter}]", d_act.len());
    let wants_act = act.is_some();
    let act = act.unwrap_or_default();
    assert!(!wants_act || act.len() == d_act.len(), "swiglu: act has {} values for [{tokens}, {inter}]", act.len());
    let (d_gate_up, act) = (Shared::new(d_gate_up), Shared::new(act));
    parallel_ranges(tokens, VALUES_LEAST / inter, |rows| {
        let (wide, narrow) = (rows.start * 2 * inter..rows.end * 2 * inter, rows.start * inter..rows.end * inter);
        // SAFETY: parallel_ranges hands out disjoint ranges of rows, so parts of one slice do not overlap.
        let d_gate_up = unsafe { d_gate_up.part(wide.clone()) };
        // SAFETY: as above; the empty range of an unwanted `act` overlaps nothing.
        let act = unsafe { act.part(if wants_act { narrow.clone() } else { 0..0 }) };
        match gate_up {
            Some(gate_up) => backward_rows(&gate_up[wide], inter, &d_act[narrow], d_gate_up, act),
            None => backward_rows(&[], inter, &d_act[narrow], d_gate_up, act),
        }
    });
}

vectorised! {
    /// An empty `gate_up` means that its values are in `d_gate_up`; an empty `act` that it is not wanted.
    fn backward_rows<E: Float>(gate_up: &[E], inter: usize, d_act: &[E], d_gate_up: &mut [E], act: &mut [E]) {
        for (row, (d_gate_up, d_act)) in d_gate_up.chunks_exact_mut(2 * inter).zip(d_act.chunks_exact(inter)).enumerate() {
            let gate_up = if gate_up.is_empty() { gate_up } else { &gate_up[row * 2 * inter..(row + 1) * 2 * inter] };
            let act = if act.is_empty() { &mut [][..] } else { &mut act[row * inter..(row + 1) * inter] };
            backward_row(gate_up, d_gate_up, d_act, act);
        }
    }
}

/// Works in tiles of f32 on the stack: rows of one type that are read and written in place would keep the loop scalar.
#[inline(always)]
fn backward_row<E: Float>(gate_up: &[E], d_gate_up: &mut [E], d_act: &[E], act: &mut [E]) {
    const TILE: usize = 64;
    let inter = d_act.len();
    let mut tiles = [[0.0f32; TILE]; 3];
    let [d_gates, d_ups, acts] = &mut tiles;
    let (gate, up) = d_gate_up.split_at_mut(inter);
    let mut act_tiles = act.chunks_mut(TILE);
    for (index, ((gate, up), d_act)) in gate.chunks_mut(TILE).zip(up.chunks_mut(TILE)).zip(d_act.chunks(TILE)).enumerate() {
        let start = index * TILE;
        let (gates, ups) = match gate_up.is_empty() {
            true => (&*gate, &*up),
            false => (&gate_up[start..start + gate.len()], &gate_up[inter + start..inter + start + up.len()]),
        };
        for ((((gate, up), d_act), d_gate), (d_up, act)) in
            gates.iter().zip(ups).zip(d_act).zip(&mut *d_gates).zip(d_ups.iter_mut().zip(&mut *acts))
        {
            let (g, u, d) = (gate.to_f32(), up.to_f32(), d_act.to_f32());
            let s = sigmoid(g);
            *d_gate = d * u * s * (1.0 + g * (1.0 - s));
            *d_up = d * (g * s);
            *act = g * s * u;
        }
        gate.iter_mut().zip(&*d_gates).for_each(|(gate, d)| *gate = E::from_f32(*d));
        up.iter_mut().zip(&*d_ups).for_each(|(up, d)| *up = E::from_f32(*d));
        if let Some(act) = act_tiles.next() {
            act.iter_mut().zip(&*acts).for_each(|(act, value)| *act = E::from_f32(*value));
        }
    }
}

fn tokens_of(op: &str, values: usize, inter: usize) -> usize {
    assert!(inter > 0, "{op}: the inner width is zero");
    assert!(values.is_multiple_of(2 * inter), "{op}: {values} values do not divide into rows of {}", 2 * inter);
    values / (2 * inter)
}

#[cfg(test)]
mod tests {
    use super::super::samples::{assert_near, assert_same_on_any_threads, cast, uniform, wide};
    use super::*;
    use half::bf16;

    fn reference(gate_up: &[f64], inter: usize) -> Vec<f64> {
        let act = |g: f64, u: f64| g / (1.0 + (-g).exp()) * u;
        gate_up.chunks(2 * inter).flat_map(|row| (0..inter).map(|i| act(row[i], row[inter + i])).collect::<Vec<_>>()).collect()
    }

    fn gate_up<E: Float>(seed: u64, count: usize) -> Vec<E> {
        cast(&uniform(seed, count).iter().map(|v| v * 6.0).collect::<Vec<_>>())
    }

    #[test]
    fn hand_numbers_and_far_ends() {
        // silu(1) = 0.731058579; far below zero silu vanishes, far above it is the identity.
        let mut act = [0.0f32; 3];
        swiglu(&[1.0f32, -200.0, 200.0, 2.0, 3.0, 0.5], 3, &mut act);
        assert_near("act", &act, &[1.462_117_157, 0.0, 100.0], 5e-7, 1e-30);
    }

    fn check<E: Float>(tokens: usize, inter: usize, relative: f64) {
        let gate_up = gate_up::<E>(1, tokens * 2 * inter);
        let d_act = cast::<E>(&uniform(2, tokens * inter));
        let mut act = vec![E::default(); tokens * inter];
        swiglu(&gate_up, inter, &mut act);
        assert_near("act", &act, &reference(&wide(&gate_up), inter), relative, 1e-7);

        let (mut d_gate_up, mut again) = (vec![E::default(); gate_up.len()], vec![E::default(); act.len()]);
        swiglu_backward(&gate_up, inter, &d_act, &mut d_gate_up, Some(&mut again));
        assert_eq!(act, again, "the recomputed activation differs");
        let (mut in_place, mut without) = (gate_up.clone(), d_gate_up.clone());
        swiglu_backward_in_place(&mut in_place, inter, &d_act, None);
        swiglu_backward(&gate_up, inter, &d_act, &mut without, None);
        assert_eq!(in_place, d_gate_up);
        assert_eq!(without, d_gate_up);

        let at = wide(&gate_up);
        let loss = |at: &[f64]| reference(at, inter).iter().zip(&d_act).map(|(a, d)| a * f64::from(d.to_f32())).sum::<f64>();
        let slope: Vec<f64> = (0..at.len())
            .map(|i| {
                let (mut up, mut down) = (at.clone(), at.clone());
                up[i] += 1e-5;
                down[i] -= 1e-5;
                (loss(&up) - loss(&down)) / 2e-5
            })
            .collect();
        assert_near("d_gate_up", &d_gate_up, &slope, relative, 2e-6);
    }

    #[test]
    fn forward_and_backward_match_f64_and_finite_differences() {
        for (tokens, inter) in [(0, 5), (1, 1), (3, 33), (2, 70)] {
            check::<f32>(tokens, inter, 5e-6); // Some f32 roundings, and cancellation in 1 + g * (1 - s).
            check::<bf16>(tokens, inter, 4e-3); // One rounding to 8 bits.
        }
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let (tokens, inter) = (64, 600);
        let (gate_up, d_act) = (gate_up::<f32>(3, tokens * 2 * inter), uniform(4, tokens * inter));
        assert_same_on_any_threads(|| {
            let (mut act, mut d_gate_up) = (vec![0.0f32; d_act.len()], vec![0.0f32; gate_up.len()]);
            swiglu(&gate_up, inter, &mut act);
            swiglu_backward(&gate_up, inter, &d_act, &mut d_gate_up, None);
            (act, d_gate_up)
        });
    }
}
