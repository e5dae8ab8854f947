//! One pass of AdamW over a parameter: read gradient and moments, update moments and weights. Learning rates, clipping
//! and which parameters decay are the trainer's.
//! Source: Loshchilov and Hutter, arXiv 1711.05101, in the order of operations of torch.optim.AdamW.
//!
//! A bf16 weight keeps its f32 master in two halves: `hi`, the bf16 that the products read, and `lo`, the i16 that is
//! missing: master bits = (hi bits << 16) + lo. Together they cost what the master alone would, and nothing is lost.
//! `hi` is the master rounded to nearest; a tie goes away from zero, not to even, since its remainder would otherwise
//! be +32768, which no i16 holds. So `join(split(x))` is x, bit for bit, for every x. (A NaN too; but `hi` alone shows
//! it only with a usual payload, so gradients are checked before the update, not weights after it.)

//!
//! Moments may be bf16, which halves them. Rounded to nearest they would stand still: a step of `v` with beta2 0.999 is less than
//! half the distance of two neighbours. So they are rounded stochastically (Gupta et al., arXiv 1502.02551), by bits that depend
//! on the number of the update and on the moments themselves: the same on any thread, in any layout and on any device.

use super::threads::{Shared, parallel_ranges};
use crate::kernels::element::Float;
use crate::vectorised;
use half::bf16;

/// Elements below which a thread of its own costs more than it saves.
const LEAST: usize = 8192;
/// Columns of a panel.
const PANEL: usize = 32;

/// What one update needs besides the arrays. All f64, as a script gives them; rounded to f32 once, after combining.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    /// Above zero: padding elements divide by it.
    pub eps: f64,
    pub weight_decay: f64,
    /// Number of this update, from 1.
    pub step: u64,
    /// What each gradient is multiplied by first: the clipping factor.
    pub gradient_scale: f64,
}

/// The factors of one update.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct Factors {
    pub decay: f32,
    pub beta1: f32,
    pub beta2: f32,
    pub rest1: f32,
    pub rest2: f32,
    pub step_size: f32,
    pub root_correction2: f32,
    pub eps: f32,
    pub gradient_scale: f32,
    /// See [`salt`].
    pub salt: u32,
}

impl AdamW {
    pub(in crate::kernels) fn factors(&self) -> Factors {
        assert!(self.step > 0, "adamw: updates count from 1");
        assert!(self.eps > 0.0, "adamw: eps is {}", self.eps);
        let step = i32::try_from(self.step).unwrap_or(i32::MAX);
        Factors {
            decay: (1.0 - self.lr * self.weight_decay) as f32,
            beta1: self.beta1 as f32,
            beta2: self.beta2 as f32,
            rest1: (1.0 - self.beta1) as f32,
            rest2: (1.0 - self.beta2) as f32,
            step_size: (self.lr / (1.0 - self.beta1.powi(step))) as f32,
            root_correction2: (1.0 - self.beta2.powi(step)).sqrt() as f32,
            eps: self.eps as f32,
            gradient_scale: self.gradient_scale as f32,
            salt: salt(self.step),
        }
    }
}

/// What makes the rounding of bf16 moments another one in each update; `step` is its number.
pub(in crate::kernels) fn salt(step: u64) -> u32 {
    mix(step as u32 ^ (step >> 32) as u32)
}

/// The finalizer of MurmurHash3: every bit of the result depends on every bit of `x`.
#[inline(always)]
pub(super) fn mix(mut x: u32) -> u32 {
    x = (x ^ (x >> 16)).wrapping_mul(0x85EB_CA6B);
    x = (x ^ (x >> 13)).wrapping_mul(0xC2B2_AE35);
    x ^ (x >> 16)
}

/// An element type in which moments are kept: f32, or bf16.
pub trait Moment: Float {
    /// `value` in this type: in bf16 one of its two neighbours, chosen by the low 16 bits of `dither`, so that the mean over all of
    /// those is `value`.
    fn keep(value: f32, dither: u32) -> Self;
}

impl Moment for f32 {
    #[inline(always)]
    fn keep(value: f32, _: u32) -> Self {
        value
    }
}

impl Moment for bf16 {
    #[inline(always)]
    fn keep(value: f32, dither: u32) -> Self {
        bf16::from_bits((value.to_bits().wrapping_add(dither & 0xFFFF) >> 16) as u16)
    }
}

/// Keeps the moments `new_m` and `new_v` in `m` and `v`.
#[inline(always)]
pub(super) fn keep<M: Moment>(m: &mut M, v: &mut M, new_m: f32, new_v: f32, salt: u32) {
    let dither = mix(new_m.to_bits() ^ new_v.to_bits().rotate_left(16) ^ salt);
    (*m, *v) = (M::keep(new_m, dither), M::keep(new_v, dither >> 16));
}

/// The first and the second moments of a parameter, as many as its gradient has elements.
pub enum MomentsMut<'a> {
    F32(&'a mut [f32], &'a mut [f32]),
    Bf16(&'a mut [bf16], &'a mut [bf16]),
}

/// The new weight; `m` and `v` are updated.
#[inline(always)]
fn update<M: Moment>(weight: f32, gradient: f32, m: &mut M, v: &mut M, f: Factors) -> f32 {
    let gradient = gradient * f.gradient_scale;
    let new_m = f.beta1 * m.to_f32() + f.rest1 * gradient;
    let new_v = f.beta2 * v.to_f32() + f.rest2 * gradient * gradient;
    keep(m, v, new_m, new_v, f.salt);
    weight * f.decay - f.step_size * new_m / (new_v.sqrt() / f.root_correction2 + f.eps)
}

/// The bf16 nearest to `master`, ties away from zero, and the bits that it lacks.
#[inline(always)]
pub fn split(master: f32) -> (bf16, i16) {
    let bits = master.to_bits();
    let hi = (bits.wrapping_add(0x8000) >> 16) as u16;
    (bf16::from_bits(hi), bits as u16 as i16)
}

/// The f32 that [`split`] took apart.
#[inline(always)]
pub fn join(hi: bf16, lo: i16) -> f32 {
    f32::from_bits((u32::from(hi.to_bits()) << 16).wrapping_add(lo as i32 as u32))
}

/// Splits each master weight; all three slices have one length.
pub fn split_all(master: &[f32], hi: &mut [bf16], lo: &mut [i16]) {
    assert!(hi.len() == master.len(), "split: {} masters, {} weights", master.len(), hi.len());
    assert!(lo.len() == master.len(), "split: {} masters, {} remainders", master.len(), lo.len());
    let (hi, lo) = (Shared::new(hi), Shared::new(lo));
    parallel_ranges(master.len(), LEAST, |range| {
        // SAFETY: parallel_ranges hands out disjoint ranges.
        let (hi, lo) = unsafe { (hi.part(range.clone()), lo.part(range.clone())) };
        for ((master, hi), lo) in master[range].iter().zip(hi).zip(lo) {
            (*hi, *lo) = split(*master);
        }
    });
}

/// Joins each master weight; all three slices have one length.
pub fn join_all(hi: &[bf16], lo: &[i16], master: &mut [f32]) {
    assert!(hi.len() == master.len(), "join: {} masters, {} weights", master.len(), hi.len());
    assert!(lo.len() == master.len(), "join: {} masters, {} remainders", master.len(), lo.len());
    let shared = Shared::new(master);
    parallel_ranges(hi.len(), LEAST, |range| {
        // SAFETY: parallel_ranges hands out disjoint ranges.
        let master = unsafe { shared.part(range.clone()) };
        for ((master, hi), lo) in master.iter_mut().zip(&hi[range.clone()]).zip(&lo[range]) {
            *master = join(*hi, *lo);
        }
    });
}

/// Updates an f32 parameter. All slices have one length and one order, whichever it is.
pub fn adamw<M: Moment>(weight: &mut [f32], gradient: &[f32], m: &mut [M], v: &mut [M], settings: &AdamW) {
    assert_lengths(weight.len(), gradient.len(), m.len(), v.len());
    let factors = settings.factors();
    let (weight, m, v) = (Shared::new(weight), Shared::new(m), Shared::new(v));
    parallel_ranges(gradient.len(), LEAST, |range| {
        // SAFETY: parallel_ranges hands out disjoint ranges.
        let (weight, m, v) = unsafe { (weight.part(range.clone()), m.part(range.clone()), v.part(range.clone())) };
        update_f32(weight, &gradient[range], m, v, factors);
    });
}

vectorised! {
    fn update_f32<M: Moment>(weight: &mut [f32], gradient: &[f32], m: &mut [M], v: &mut [M], factors: Factors) {
        for (((weight, gradient), m), v) in weight.iter_mut().zip(gradient).zip(m).zip(v) {
            *weight = update(*weight, *gradient, m, v, factors);
        }
    }
}

/// Updates a bf16 parameter and its remainders. All slices have one length and one order.
pub fn adamw_bf16<M: Moment>(hi: &mut [bf16], lo: &mut [i16], gradient: &[f32], m: &mut [M], v: &mut [M], settings: &AdamW) {
    assert_lengths(hi.len(), gradient.len(), m.len(), v.len());
    assert!(lo.len() == hi.len(), "adamw: {} weights, {} remainders", hi.len(), lo.len());
    let factors = settings.factors();
    let (hi, lo, m, v) = (Shared::new(hi), Shared::new(lo), Shared::new(m), Shared::new(v));
    parallel_ranges(gradient.len(), LEAST, |range| {
        // SAFETY: parallel_ranges hands out disjoint ranges.
        let (hi, lo) = unsafe { (hi.part(range.clone()), lo.part(range.clone())) };
        // SAFETY: as above.
        let (m, v) = unsafe { (m.part(range.clone()), v.part(range.clone())) };
        update_bf16(hi, lo, &gradient[range], m, v, factors);
    });
}

vectorised! {
    fn update_bf16<M: Moment>(hi: &mut [bf16], lo: &mut [i16], gradient: &[f32], m: &mut [M], v: &mut [M], factors: Factors) {
        for ((((hi, lo), gradient), m), v) in hi.iter_mut().zip(lo).zip(gradient).zip(m).zip(v) {
            (*hi, *lo) = split(update(join(*hi, *lo), *gradient, m, v, factors));
        }
    }
}

/// Updates a bf16 parameter that lies in the panels of the bf16 products.
///
/// - `hi`, `lo`: `[panels][ceil(k/2)][32][2]`, pairs along `k`
/// - `gradient`, `m`, `v`: `[panels][k][32]`
///
/// With an odd `k` the second half of each panel's last pair is padding and stays as it is.
pub fn adamw_bf16_panels<M: Moment>(
    hi: &mut [bf16],
    lo: &mut [i16],
    gradient: &[f32],
    m: &mut [M],
    v: &mut [M],
    k: usize,
    settings: &AdamW,
) {
    assert!(k > 0, "adamw: panels have no rows");
    let panels = gradient.len() / (k * PANEL);
    let pairs = k.div_ceil(2);
    assert_lengths(panels * k * PANEL, gradient.len(), m.len(), v.len());
    assert!(hi.len() == panels * pairs * 2 * PANEL, "adamw: {} weights for {panels} panels of {pairs} pairs", hi.len());
    assert!(lo.len() == hi.len(), "adamw: {} weights, {} remainders", hi.len(), lo.len());
    let factors = settings.factors();
    let (hi, lo, m, v) = (Shared::new(hi), Shared::new(lo), Shared::new(m), Shared::new(v));
    // The items shared out are pairs of rows, of all panels in a line; a range is cut where a panel ends.
    parallel_ranges(panels * pairs, LEAST / (2 * PANEL), |range| {
        let mut start = range.start;
        while start < range.end {
            let (panel, first) = (start / pairs, start % pairs);
            let count = (pairs - first).min(range.end - start);
            let halves = start * 2 * PANEL..(start + count) * 2 * PANEL;
            let rows = panel * k + 2 * first..panel * k + (2 * (first + count)).min(k);
            let plain = rows.start * PANEL..rows.end * PANEL;
            // SAFETY: parallel_ranges hands out disjoint ranges of pairs, and each pair has its own rows in every slice.
            let (hi, lo) = unsafe { (hi.part(halves.clone()), lo.part(halves)) };
            // SAFETY: as above.
            let (m, v) = unsafe { (m.part(plain.clone()), v.part(plain.clone())) };
            update_pairs(hi, lo, &gradient[plain], m, v, factors);
            start += count;
        }
    });
}

vectorised! {
    fn update_pairs<M: Moment>(hi: &mut [bf16], lo: &mut [i16], gradient: &[f32], m: &mut [M], v: &mut [M], factors: Factors) {
        const WIDE: usize = 2 * PANEL;
        let (hi_pairs, _) = hi.as_chunks_mut::<WIDE>();
        let (lo_pairs, _) = lo.as_chunks_mut::<WIDE>();
        let (gradients, odd_gradient) = gradient.as_chunks::<WIDE>();
        let ((ms, odd_m), (vs, odd_v)) = (m.as_chunks_mut::<WIDE>(), v.as_chunks_mut::<WIDE>());
        let whole = gradients.len();
        for ((((hi, lo), gradient), m), v) in hi_pairs.iter_mut().zip(lo_pairs.iter_mut()).zip(gradients).zip(ms).zip(vs) {
            for column in 0..PANEL {
                let (even, odd) = (2 * column, 2 * column + 1);
                let first = update(join(hi[even], lo[even]), gradient[column], &mut m[column], &mut v[column], factors);
                let below = PANEL + column;
                let second = update(join(hi[odd], lo[odd]), gradient[below], &mut m[below], &mut v[below], factors);
                (hi[even], lo[even]) = split(first);
                (hi[odd], lo[odd]) = split(second);
            }
        }
        if !odd_gradient.is_empty() {
            let (hi, lo) = (&mut hi_pairs[whole], &mut lo_pairs[whole]);
            for column in 0..PANEL {
                let even = 2 * column;
                let first = update(join(hi[even], lo[even]), odd_gradient[column], &mut odd_m[column], &mut odd_v[column], factors);
                (hi[even], lo[even]) = split(first);
            }
        }
    }
}

fn assert_lengths(weight: usize, gradient: usize, m: usize, v: usize) {
    assert!(gradient == weight, "adamw: {weight} weights, {gradient} gradients");
    assert!(m == weight, "adamw: {weight} weights, {m} first moments");
    assert!(v == weight, "adamw: {weight} weights, {v} second moments");
}

#[cfg(test)]
mod tests {
    use super::super::samples::{assert_near, assert_same_on_any_threads, cast, uniform, wide};
    use super::*;

    const SETTINGS: AdamW = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 1, gradient_scale: 0.5 };

    /// `steps` updates in f64 with the gradients of [`gradient_at`].
    fn reference(weight: &[f32], steps: u64) -> Vec<f64> {
        let s = SETTINGS;
        let (mut weight, mut m, mut v) = (wide(weight), vec![0.0; weight.len()], vec![0.0; weight.len()]);
        for step in 1..=steps {
            let gradient = wide(&gradient_at(step, weight.len()));
            for i in 0..weight.len() {
                let g = gradient[i] * s.gradient_scale;
                m[i] = s.beta1 * m[i] + (1.0 - s.beta1) * g;
                v[i] = s.beta2 * v[i] + (1.0 - s.beta2) * g * g;
                let (m_hat, v_hat) = (m[i] / (1.0 - s.beta1.powi(step as i32)), v[i] / (1.0 - s.beta2.powi(step as i32)));
                weight[i] = weight[i] * (1.0 - s.lr * s.weight_decay) - s.lr * m_hat / (v_hat.sqrt() + s.eps);
            }
        }
        weight
    }

    fn gradient_at(step: u64, count: usize) -> Vec<f32> {
        uniform(100 + step, count)
    }

    #[test]
    fn bf16_moments_are_right_in_the_mean() {
        // Every neighbour pair is chosen in proportion to the distance, so the mean over all dithers is the value itself.
        for value in [1.0f32, 1.001, -0.3, 7.3e-12, f32::MIN_POSITIVE] {
            let kept: f64 = (0..1u32 << 16).map(|dither| f64::from(bf16::keep(value, dither).to_f32())).sum();
            let mean = kept / f64::from(1u32 << 16);
            assert!((mean - f64::from(value)).abs() <= 1e-7 * f64::from(value.abs()), "{value}: {mean}");
        }
        assert_eq!(bf16::keep(f32::INFINITY, u32::MAX), bf16::INFINITY);

        // A second moment that decays by a thousandth a step, half the distance of two bf16 numbers and less, decays all the same: each of
        // many elements by its own way, their mean by that of f32, and so does the first moment.
        let count = 4096;
        let start = |seed| cast::<bf16>(&uniform(seed, count).iter().map(|x| 1.0 + x.abs()).collect::<Vec<f32>>());
        let (mut m, mut v) = (start(5), start(6));
        let sum = |moments: &[bf16]| moments.iter().map(|x| x.to_f32()).sum::<f32>();
        let before = [sum(&m), sum(&v)];
        let (mut weight, gradient) = (vec![0.0; count], vec![0.0; count]);
        for step in 1..=300 {
            let settings = AdamW { beta1: 0.998, beta2: 0.999, step, ..SETTINGS };
            adamw(&mut weight, &gradient, &mut m, &mut v, &settings);
        }
        // 300 roundings of 0.3% each make 5% of an element, and a thousandth of the mean of 4096: three of those.
        for (kept, before, beta) in [(&m, before[0], 0.998f32), (&v, before[1], 0.999)] {
            let share = sum(kept) / before;
            assert!((share / beta.powi(300) - 1.0).abs() < 3e-3, "{share} where {} was due", beta.powi(300));
        }
    }

    #[test]
    fn bf16_moments_lead_near_where_f32_moments_do_and_all_forms_agree() {
        let (panels, k) = (2, 5);
        let count = panels * k * PANEL;
        let start = cast::<bf16>(&uniform(1, count)).iter().map(|w| w.to_f32()).collect::<Vec<f32>>();
        let (mut weight, mut m, mut v) = (start.clone(), vec![bf16::ZERO; count], vec![bf16::ZERO; count]);
        let (mut hi, mut lo) = (vec![bf16::ZERO; count], vec![0i16; count]);
        split_all(&start, &mut hi, &mut lo);
        let (mut m2, mut v2) = (m.clone(), v.clone());
        for step in 1..=20 {
            let (settings, gradient) = (AdamW { step, ..SETTINGS }, gradient_at(step, count));
            adamw(&mut weight, &gradient, &mut m, &mut v, &settings);
            adamw_bf16(&mut hi, &mut lo, &gradient, &mut m2, &mut v2, &settings);
        }
        let mut master = vec![0.0; count];
        join_all(&hi, &lo, &mut master);
        assert!(master == weight && m == m2 && v == v2);
        // A moment's error is below a bf16 step, 2^-8 of it, and 20 updates move by at most 20 rates of 0.01.
        let want = reference(&start, 20);
        let worst = weight.iter().zip(&want).map(|(got, want)| (f64::from(*got) - want).abs()).fold(0.0, f64::max);
        assert!(worst > 0.0 && worst < 0.2 / 64.0, "{worst}");
    }

    #[test]
    fn the_first_step_by_hand() {
        // m = 0.1 * 1, v = 0.05 * 1, both corrected to 1: the weight decays by 0.001 of itself and moves by lr = 0.01.
        let (mut weight, mut m, mut v) = ([2.0f32], [0.0f32], [0.0f32]);
        adamw(&mut weight, &[2.0], &mut m, &mut v, &SETTINGS);
        assert_near("weight", &weight, &[1.998 - 0.01], 1e-7, 0.0);
        assert_near("m", &m, &[0.1], 1e-7, 0.0);
        assert_near("v", &v, &[0.05], 1e-7, 0.0);
    }

    #[test]
    fn all_forms_follow_the_f64_reference_and_agree_bit_for_bit() {
        for count in [0, 1, 33, 20_001] {
            let start = cast::<bf16>(&uniform(1, count)).iter().map(|w| w.to_f32()).collect::<Vec<f32>>();
            let (mut weight, mut m, mut v) = (start.clone(), vec![0.0f32; count], vec![0.0f32; count]);
            let (mut hi, mut lo) = (vec![bf16::ZERO; count], vec![0i16; count]);
            split_all(&start, &mut hi, &mut lo);
            assert!(lo.iter().all(|lo| *lo == 0), "a bf16 weight has no remainder");
            let (mut m2, mut v2) = (m.clone(), v.clone());
            for step in 1..=5 {
                let settings = AdamW { step, ..SETTINGS };
                let gradient = gradient_at(step, count);
                adamw(&mut weight, &gradient, &mut m, &mut v, &settings);
                adamw_bf16(&mut hi, &mut lo, &gradient, &mut m2, &mut v2, &settings);
            }
            assert_near("weight", &weight, &reference(&start, 5), 1e-6, 1e-6); // Five updates of some f32 roundings.
            let mut master = vec![0.0; count];
            join_all(&hi, &lo, &mut master);
            assert_eq!(master, weight);
            assert_eq!(m, m2);
            assert_eq!(v, v2);
        }
    }

    fn check_panels(panels: usize, k: usize) {
        let plain = panels * k * PANEL;
        let pairs = k.div_ceil(2);
        let at = |index: usize| {
            let (panel, row, column) = (index / (k * PANEL), index / PANEL % k, index % PANEL);
            ((panel * pairs + row / 2) * PANEL + column) * 2 + row % 2
        };
        let (mut weight, mut m, mut v) = (uniform(2, plain), vec![0.0f32; plain], vec![0.0f32; plain]);
        let (mut hi, mut lo) = (vec![bf16::ZERO; panels * pairs * 64], vec![0i16; panels * pairs * 64]);
        for (index, weight) in weight.iter().enumerate() {
            (hi[at(index)], lo[at(index)]) = split(*weight);
        }
        let (mut m2, mut v2) = (m.clone(), v.clone());
        for step in 1..=2 {
            let settings = AdamW { step, ..SETTINGS };
            adamw(&mut weight, &gradient_at(step, plain), &mut m, &mut v, &settings);
            adamw_bf16_panels(&mut hi, &mut lo, &gradient_at(step, plain), &mut m2, &mut v2, k, &settings);
        }
        let got: Vec<f32> = (0..plain).map(|index| join(hi[at(index)], lo[at(index)])).collect();
        assert_eq!(got, weight, "{panels} panels of {k}");
        assert_eq!((m, v), (m2, v2));
        if k % 2 == 1 {
            let padding = (0..panels).flat_map(|panel| (0..PANEL).map(move |c| ((panel + 1) * pairs - 1) * 64 + 2 * c + 1));
            assert!(padding.into_iter().all(|index| hi[index] == bf16::ZERO && lo[index] == 0), "padding moved");
        }
    }

    #[test]
    fn panels_agree_with_the_plain_form_bit_for_bit() {
        for (panels, k) in [(0, 4), (1, 1), (2, 7), (3, 33), (2, 64), (5, 301)] {
            check_panels(panels, k);
        }
    }

    #[test]
    fn split_and_join_lose_nothing() {
        let special = [0.0, -0.0, f32::MIN_POSITIVE, f32::MAX, f32::MIN, f32::INFINITY, 1.0, -1.0];
        let ties = [0x3f80_8000, 0x3f81_8000, 0xbf80_8000, 0x0000_8000].map(f32::from_bits);
        let spread = (0..=u32::MAX).step_by(10_007).map(f32::from_bits);
        for master in special.into_iter().chain(ties).chain(spread) {
            let (hi, lo) = split(master);
            assert_eq!(join(hi, lo).to_bits(), master.to_bits(), "{master}");
            if lo != i16::MIN && !master.is_nan() {
                assert_eq!(hi.to_bits(), bf16::from_f32(master).to_bits(), "{master}: not the nearest");
            }
        }
        // The tie between 1 and 1 + 2^-7 would go to even, 1; here it goes away from zero.
        assert_eq!(split(f32::from_bits(0x3f80_8000)), (bf16::from_bits(0x3f81), i16::MIN));
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let count = 64 * 1000;
        assert_same_on_any_threads(|| {
            let (mut hi, mut lo) = (cast::<bf16>(&uniform(3, count)), vec![0i16; count]);
            let (mut m, mut v) = (vec![0.0; count], vec![0.0; count]);
            adamw_bf16_panels(&mut hi, &mut lo, &gradient_at(1, count), &mut m, &mut v, 250, &SETTINGS);
            (hi, lo, m, v)
        });
    }
}
