//! The loops of an optimizer that merges its update with a task vector: Adam's update as a vector of its own, random masks,
//! and the choice of the largest elements. Which of them go together is the trainer's.
//! Source: Lu et al., Online Merging Optimizers, arXiv 2405.17931; Adam as in transformers' former AdamW, whose eps is added
//! before the bias correction.

use super::adamw::{AdamW, Moment, keep, salt};
use super::threads::{Shared, parallel_ranges};
use crate::kernels::random::Stream;
use crate::vectorised;

/// Elements below which a thread of its own costs more than it saves.
const LEAST: usize = 8192;

/// Updates the moments and writes Adam's update, without weight decay, to `delta`. All slices have one length and order.
///
/// `delta = -lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps)`
pub fn adam_update<M: Moment>(gradient: &[f32], m: &mut [M], v: &mut [M], delta: &mut [f32], settings: &AdamW) {
    assert!(settings.step > 0 && settings.eps > 0.0, "updates count from 1, and eps is above 0");
    assert!(m.len() == gradient.len() && v.len() == gradient.len() && delta.len() == gradient.len(), "moments of another length");
    let step = i32::try_from(settings.step).unwrap_or(i32::MAX);
    let size = -settings.lr * (1.0 - settings.beta2.powi(step)).sqrt() / (1.0 - settings.beta1.powi(step));
    let (m, v, delta) = (Shared::new(m), Shared::new(v), Shared::new(delta));
    parallel_ranges(gradient.len(), LEAST, |range| {
        // SAFETY: parallel_ranges hands out disjoint ranges.
        let (m, v, delta) = unsafe { (m.part(range.clone()), v.part(range.clone()), delta.part(range.clone())) };
        update_part(&gradient[range], m, v, delta, settings, size as f32);
    });
}

vectorised! {
    fn update_part<M: Moment>(gradient: &[f32], m: &mut [M], v: &mut [M], delta: &mut [f32], settings: &AdamW, size: f32) {
        let (beta1, beta2, eps) = (settings.beta1 as f32, settings.beta2 as f32, settings.eps as f32);
        let (rest1, rest2, scale) = ((1.0 - settings.beta1) as f32, (1.0 - settings.beta2) as f32, settings.gradient_scale as f32);
        let salt = salt(settings.step);
        for (((gradient, m), v), delta) in gradient.iter().zip(m).zip(v).zip(delta) {
            let gradient = gradient * scale;
            let new_m = beta1 * m.to_f32() + rest1 * gradient;
            let new_v = beta2 * v.to_f32() + rest2 * gradient * gradient;
            keep(m, v, new_m, new_v, salt);
            *delta = size * new_m / (new_v.sqrt() + eps);
        }
    }
}

/// Keeps each value with probability `reserve` and multiplies it by `scale`; the others become zero. Value `i` is kept by half
/// `i % 2` of the number at `counter + i / 2` of `stream`, so `values.len().div_ceil(2)` counters are used.
pub fn keep_some(values: &mut [f32], stream: &Stream, counter: u64, reserve: f64, scale: f32) {
    let threshold = (reserve * f64::from(1u32 << 16) * f64::from(1u32 << 16)) as u64;
    let (count, len) = (values.len().div_ceil(2), values.len());
    let values = Shared::new(values);
    parallel_ranges(count, LEAST / 2, |range| {
        // SAFETY: parallel_ranges hands out disjoint ranges, and each pair has its own values.
        let part = unsafe { values.part(2 * range.start..(2 * range.end).min(len)) };
        for (pair, at) in part.chunks_mut(2).zip(range) {
            let bits = stream.bits(counter + at as u64);
            for (value, bits) in pair.iter_mut().zip([bits as u32, (bits >> 32) as u32]) {
                *value = if u64::from(bits) < threshold { *value * scale } else { 0.0 };
            }
        }
    });
}

/// Of the values at `places`, keeps the `count` largest by magnitude; the others become zero. Of equal ones the first stay.
pub fn keep_largest(values: &mut [f32], places: impl Iterator<Item = usize> + Clone, count: usize) {
    let mut magnitudes: Vec<f32> = places.clone().map(|at| values[at].abs()).collect();
    if count >= magnitudes.len() {
        return;
    }
    let threshold = match count.checked_sub(1) {
        None => f32::INFINITY,
        Some(last) => *magnitudes.select_nth_unstable_by(last, |a, b| b.total_cmp(a)).1,
    };
    let above = magnitudes.iter().filter(|magnitude| **magnitude > threshold).count();
    let mut equal_left = count.saturating_sub(above);
    for at in places {
        let magnitude = values[at].abs();
        if magnitude == threshold && equal_left > 0 {
            equal_left -= 1;
        } else if magnitude <= threshold {
            values[at] = 0.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::samples::assert_same_on_any_threads;
    use super::*;

    #[test]
    fn the_largest_stay_and_of_equal_ones_the_first() {
        let mut values = [3.0, -1.0, 2.0, -3.0, 2.0, 9.0];
        keep_largest(&mut values, 0..5, 3);
        assert_eq!(values, [3.0, 0.0, 2.0, -3.0, 0.0, 9.0]);
        keep_largest(&mut values, 0..6, 0);
        assert_eq!(values, [0.0; 6]);
    }

    #[test]
    fn masks_keep_their_share_and_depend_on_the_counter_alone() {
        let stream = Stream::new(3, "mask");
        let kept = |counter: u64, reserve: f64| {
            let mut values = vec![1.0; 40_001];
            keep_some(&mut values, &stream, counter, reserve, 2.0);
            values
        };
        let values = kept(0, 0.25);
        let count = values.iter().filter(|value| **value == 2.0).count();
        // The deviation of the count is 87: five of them are allowed.
        assert!(count.abs_diff(10_000) < 435 && values.iter().all(|value| *value == 2.0 || *value == 0.0), "{count}");
        assert_eq!(values[2..], kept(1, 0.25)[..39_999], "a position is a counter");
        assert!(kept(9, 1.0).iter().all(|value| *value == 2.0) && kept(9, 0.0).iter().all(|value| *value == 0.0));
        assert_same_on_any_threads(|| kept(5, 0.5));
    }
}
