//! Log-probabilities of labels, entropies and their gradients, on a chunk of rows of logits. Cutting the hidden states
//! into chunks, and the products with the head before and after, are the caller's.
//!
//! A row whose label is negative (-100) is skipped: it gives 0 everywhere and passes no gradient.

use super::exp::exp;
use super::lanes;
use super::threads::{Shared, parallel};
use crate::kernels::buffer::Buffer;
use crate::kernels::element::Float;
use crate::vectorised;
use bytemuck::{cast_slice, cast_slice_mut};

/// Columns that are summed in f32 before f64 takes over: over a vocabulary of 152k, f32 alone would lose digits.
const BLOCK: usize = 2048;

/// Per row: the logarithm of the sum of exponentials, the log-probability of the label, and the entropy if asked.
///
/// - `logits`: `[rows, vocab]`, f32
/// - `labels`: `[rows]`, below `vocab`; negative rows are skipped
/// - `logsumexp`, `logprobs`: `[rows]`, natural logarithm
/// - `entropy`: `[rows]`, in nats
pub fn logprobs(logits: &[f32], vocab: usize, labels: &[i32], logsumexp: &mut [f32], logprobs: &mut [f32], entropy: Option<&mut [f32]>) {
    let rows = labels.len();
    assert_rows(logits.len(), vocab, labels);
    assert!(logsumexp.len() == rows, "logprobs: {} logsumexp for {rows} rows", logsumexp.len());
    assert!(logprobs.len() == rows, "logprobs: {} results for {rows} rows", logprobs.len());
    let wants_entropy = entropy.is_some();
    let entropy = entropy.unwrap_or_default();
    assert!(!wants_entropy || entropy.len() == rows, "logprobs: {} entropies for {rows} rows", entropy.len());
    let (logsumexp, logprobs, entropy) = (Shared::new(logsumexp), Shared::new(logprobs), Shared::new(entropy));
    parallel(rows, |row| {
        let (mut lse, mut logprob, mut row_entropy) = (0.0, 0.0, 0.0);
        if let Ok(label) = usize::try_from(labels[row]) {
            let logits = &logits[row * vocab..(row + 1) * vocab];
            let (largest, sum, weighted) = if wants_entropy { row_sums_entropy(logits) } else { row_sums(logits) };
            let log_sum = sum.ln();
            lse = (f64::from(largest) + log_sum) as f32;
            // Relative to the largest: near-certain labels keep their digits.
            logprob = (f64::from(logits[label]) - f64::from(largest) - log_sum) as f32;
            row_entropy = (log_sum - weighted / sum) as f32;
        }
        // SAFETY: each row is one task, and its elements are its own.
        unsafe {
            logsumexp.part(row..row + 1)[0] = lse;
            logprobs.part(row..row + 1)[0] = logprob;
        }
        if wants_entropy {
            // SAFETY: as above.
            unsafe { entropy.part(row..row + 1)[0] = row_entropy };
        }
    });
}

vectorised! {
    /// The largest logit `m`, the sum of `exp(logit - m)`, and 0.
    fn row_sums(logits: &[f32]) -> (f32, f64, f64) {
        let largest = lanes::max(logits);
        let mut powers = [0.0f32; BLOCK];
        let mut sum = 0.0;
        for block in logits.chunks(BLOCK) {
            let powers = powers_of(block, largest, &mut powers);
            sum += f64::from(lanes::sum(powers, |e| e));
        }
        (largest, sum, 0.0)
    }
}

vectorised! {
    /// The largest logit `m`, the sum of `e = exp(logit - m)`, and the sum of `e * (logit - m)`.
    fn row_sums_entropy(logits: &[f32]) -> (f32, f64, f64) {
        let largest = lanes::max(logits);
        let mut powers = [0.0f32; BLOCK];
        let (mut sum, mut weighted) = (0.0, 0.0);
        for block in logits.chunks(BLOCK) {
            let powers = powers_of(block, largest, &mut powers);
            sum += f64::from(lanes::sum(powers, |e| e));
            // A logit of minus infinity has probability 0 and adds nothing; 0 * -inf would be NaN.
            weighted += f64::from(lanes::sum2(powers, block, |e, logit| if e == 0.0 { 0.0 } else { e * (logit - largest) }));
        }
        (largest, sum, weighted)
    }
}

/// `exp(logit - largest)` of one block. Kept apart from its sum: inside the sum's loop over lanes it stays scalar.
#[inline(always)]
fn powers_of<'a>(block: &[f32], largest: f32, powers: &'a mut [f32; BLOCK]) -> &'a [f32] {
    let powers = &mut powers[..block.len()];
    for (power, logit) in powers.iter_mut().zip(block) {
        *power = exp(logit - largest);
    }
    powers
}

/// Gradient of the entropies, for [`gradient`].
#[derive(Clone, Copy)]
pub struct EntropyGradient<'a> {
    /// `[rows]`, as [`logprobs`] gave them.
    pub entropy: &'a [f32],
    /// `[rows]`: the derivative of the loss in each row's entropy.
    pub coefficients: &'a [f32],
}

/// The loss's gradient in the logits, in their memory:
/// `coefficient * (softmax - onehot(label))`, the coefficient being the derivative of the loss in *minus* the row's
/// log-probability; plus, if given, `entropy_coefficient * -p * (ln p + entropy)`.
///
/// - `logits`: `[rows, vocab]`, f32; overwritten
/// - `labels`, `logsumexp`, `coefficients`: `[rows]`
/// - returns `[rows, vocab]`, rounded once: all of the memory, or its front half for bf16
pub fn gradient<'a, E: Float>(
    logits: &'a mut [f32],
    vocab: usize,
    labels: &[i32],
    logsumexp: &[f32],
    coefficients: &[f32],
    entropy: Option<EntropyGradient>,
) -> &'a mut [E] {
    let rows = labels.len();
    assert_rows(logits.len(), vocab, labels);
    assert!(logsumexp.len() == rows, "logprobs: {} logsumexp for {rows} rows", logsumexp.len());
    assert!(coefficients.len() == rows, "logprobs: {} coefficients for {rows} rows", coefficients.len());
    if let Some(entropy) = entropy {
        assert!(entropy.entropy.len() == rows, "logprobs: {} entropies for {rows} rows", entropy.entropy.len());
        assert!(entropy.coefficients.len() == rows, "logprobs: {} entropy coefficients for {rows} rows", entropy.coefficients.len());
    }
    let terms = |row: usize| Terms {
        label: usize::try_from(labels[row]).ok(),
        logsumexp: logsumexp[row],
        coefficient: coefficients[row],
        entropy: entropy.map(|e| (e.entropy[row], e.coefficients[row])),
    };
    let count = logits.len();
    if size_of::<E>() == size_of::<f32>() {
        let shared = Shared::new(&mut *logits);
        parallel(rows, |row| {
            // SAFETY: each row is one task.
            gradient_row_in_place(unsafe { shared.part(row * vocab..(row + 1) * vocab) }, terms(row));
        });
        return cast_slice_mut(logits);
    }
    // In bf16 row r goes where row r / 2 was. So the first row is computed from a copy, and then rows k to 2k at a time: they write
    // where rows k / 2 to k were, which have been read.
    let memory: &mut [E] = cast_slice_mut(logits);
    if rows > 0 {
        let first: Buffer<f32> = Buffer::copy_of(cast_slice(&memory[..2 * vocab]));
        gradient_row(&first, terms(0), &mut memory[..vocab]);
    }
    let shared = Shared::new(&mut *memory);
    let mut done = 1;
    while done < rows {
        parallel(done.min(rows - done), |index| {
            let row = done + index;
            // SAFETY: each row is one task and has its own place; what is written ends where the rows begin that are read meanwhile.
            let (from, to) = unsafe { (shared.part(2 * row * vocab..2 * (row + 1) * vocab), shared.part(row * vocab..(row + 1) * vocab)) };
            gradient_row(cast_slice(from), terms(row), to);
        });
        done *= 2;
    }
    &mut memory[..count]
}

/// What the gradient of one row depends on besides its logits.
#[derive(Clone, Copy)]
struct Terms {
    label: Option<usize>,
    logsumexp: f32,
    coefficient: f32,
    /// Entropy and the loss's derivative in it.
    entropy: Option<(f32, f32)>,
}

#[inline(always)]
fn with_entropy(logit: f32, terms: Terms, entropy: f32, entropy_coefficient: f32) -> f32 {
    let logprob = logit - terms.logsumexp;
    let p = exp(logprob);
    let bend = if p == 0.0 { 0.0 } else { p * (logprob + entropy) };
    terms.coefficient * p - entropy_coefficient * bend
}

vectorised! {
    fn gradient_row<E: Float>(logits: &[f32], terms: Terms, out: &mut [E]) {
        let Some(label) = terms.label else { return out.fill(E::default()) };
        match terms.entropy {
            None => {
                for (out, logit) in out.iter_mut().zip(logits) {
                    *out = E::from_f32(terms.coefficient * exp(logit - terms.logsumexp));
                }
                // expm1 keeps the digits of a probability near 1.
                out[label] = E::from_f32(terms.coefficient * (logits[label] - terms.logsumexp).exp_m1());
            }
            Some((entropy, by)) => {
                for (out, logit) in out.iter_mut().zip(logits) {
                    *out = E::from_f32(with_entropy(*logit, terms, entropy, by));
                }
                out[label] = E::from_f32(with_entropy(logits[label], terms, entropy, by) - terms.coefficient);
            }
        }
    }
}

vectorised! {
    fn gradient_row_in_place(logits: &mut [f32], terms: Terms) {
        let Some(label) = terms.label else { return logits.fill(0.0) };
        let of_label = logits[label];
        match terms.entropy {
            None => {
                for logit in &mut *logits {
                    *logit = terms.coefficient * exp(*logit - terms.logsumexp);
                }
                logits[label] = terms.coefficient * (of_label - terms.logsumexp).exp_m1();
            }
            Some((entropy, by)) => {
                for logit in &mut *logits {
                    *logit = with_entropy(*logit, terms, entropy, by);
                }
                logits[label] = with_entropy(of_label, terms, entropy, by) - terms.coefficient;
            }
        }
    }
}

fn assert_rows(values: usize, vocab: usize, labels: &[i32]) {
    assert!(vocab > 0, "logprobs: the vocabulary is empty");
    assert!(values == labels.len() * vocab, "logprobs: {values} logits for {} rows of {vocab}", labels.len());
    for label in labels {
        assert!(i64::from(*label) < vocab as i64, "logprobs: label {label} of a vocabulary of {vocab}");
    }
}

#[cfg(test)]
mod tests {
    use super::super::samples::{assert_near, assert_same_on_any_threads, uniform, wide};
    use super::*;
    use crate::kernels::element::Element;
    use half::bf16;

    /// Log-probability of `label` and entropy, in f64.
    fn reference(logits: &[f64], label: usize) -> (f64, f64) {
        let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let lse = largest + logits.iter().map(|v| (v - largest).exp()).sum::<f64>().ln();
        let entropy = lse - logits.iter().filter(|v| v.is_finite()).map(|v| (v - lse).exp() * v).sum::<f64>();
        (logits[label] - lse, entropy)
    }

    fn logits(seed: u64, count: usize) -> Vec<f32> {
        uniform(seed, count).iter().map(|v| v * 8.0).collect()
    }

    #[test]
    fn hand_numbers() {
        // Equal logits over 4: log-probability -ln 4, entropy ln 4.
        let mut got = [[f32::NAN; 2]; 3];
        let [lse, logprob, entropy] = &mut got;
        logprobs(&[7.0; 8], 4, &[2, -100], lse, logprob, Some(entropy));
        assert_near("lse", &got[0], &[8.386_294_361, 0.0], 1e-7, 0.0);
        assert_near("logprob", &got[1], &[-1.386_294_361, 0.0], 1e-7, 0.0);
        assert_near("entropy", &got[2], &[1.386_294_361, 0.0], 1e-7, 0.0);
    }

    #[test]
    fn logprobs_and_entropies_match_f64() {
        for (rows, vocab) in [(0, 3), (1, 1), (7, 33), (3, 5000)] {
            let logits = logits(1, rows * vocab);
            let labels: Vec<i32> = (0..rows).map(|row| (row * 13 % vocab) as i32).collect();
            let mut got = [vec![0.0; rows], vec![0.0; rows], vec![0.0; rows]];
            let [lse, logprob, entropy] = &mut got;
            logprobs(&logits, vocab, &labels, lse, logprob, Some(entropy));
            let want: Vec<(f64, f64)> = wide(&logits).chunks(vocab).zip(&labels).map(|(row, l)| reference(row, *l as usize)).collect();
            // Sums of at most 64 f32 terms a lane and one rounding.
            assert_near("logprob", &got[1], &want.iter().map(|w| w.0).collect::<Vec<_>>(), 1e-6, 1e-6);
            assert_near("entropy", &got[2], &want.iter().map(|w| w.1).collect::<Vec<_>>(), 1e-6, 2e-6);
            let mut alone = [vec![0.0; rows], vec![0.0; rows]];
            let [lse, logprob] = &mut alone;
            logprobs(&logits, vocab, &labels, lse, logprob, None);
            assert_eq!(alone[..], got[..2]);
        }
    }

    #[test]
    fn masked_logits_have_no_probability_and_no_gradient() {
        let mut row = [1.0, f32::NEG_INFINITY, 2.0];
        let (mut lse, mut logprob, mut entropy) = ([0.0], [0.0], [0.0]);
        logprobs(&row, 3, &[0], &mut lse, &mut logprob, Some(&mut entropy));
        let want = reference(&[1.0, f64::NEG_INFINITY, 2.0], 0);
        assert_near("logprob", &logprob, &[want.0], 1e-6, 0.0);
        assert_near("entropy", &entropy, &[want.1], 1e-6, 0.0);
        let terms = EntropyGradient { entropy: &entropy, coefficients: &[0.5] };
        gradient::<f32>(&mut row, 3, &[0], &lse, &[1.0], Some(terms));
        assert!(row.iter().all(|v| v.is_finite()) && row[1] == 0.0, "{row:?}");
    }

    fn check_gradient(rows: usize, vocab: usize, entropy_coefficient: Option<f64>) {
        let values = logits(2, rows * vocab);
        let labels: Vec<i32> = (0..rows).map(|row| if row % 3 == 1 { -100 } else { (row * 5 % vocab) as i32 }).collect();
        let coefficients = uniform(3, rows);
        let mut sums = [vec![0.0; rows], vec![0.0; rows], vec![0.0; rows]];
        let [lse, logprob, entropy] = &mut sums;
        logprobs(&values, vocab, &labels, lse, logprob, Some(entropy));
        let bends = vec![entropy_coefficient.unwrap_or(0.0) as f32; rows];
        let terms = entropy_coefficient.map(|_| EntropyGradient { entropy: &*entropy, coefficients: &bends });

        let mut want = vec![0.0; values.len()];
        for row in 0..rows {
            let Ok(label) = usize::try_from(labels[row]) else { continue };
            let at = wide(&values[row * vocab..(row + 1) * vocab]);
            let loss = |at: &[f64]| {
                let (logprob, entropy) = reference(at, label);
                -f64::from(coefficients[row]) * logprob + entropy_coefficient.unwrap_or(0.0) * entropy
            };
            for c in 0..vocab {
                let (mut up, mut down) = (at.clone(), at.clone());
                up[c] += 1e-5;
                down[c] -= 1e-5;
                want[row * vocab + c] = (loss(&up) - loss(&down)) / 2e-5;
            }
        }
        let (mut memory, mut got) = (values.clone(), values.clone());
        let rounded: &[bf16] = gradient(&mut memory, vocab, &labels, lse, &coefficients, terms);
        gradient::<f32>(&mut got, vocab, &labels, lse, &coefficients, terms);
        assert_near("gradient", &got, &want, 1e-5, 1e-6); // logsumexp is rounded to f32, so p is good to about 1e-6.
        assert_near("bf16 gradient", rounded, &wide(&got), 4e-3, 0.0); // One rounding to 8 bits.
    }

    #[test]
    fn gradients_match_finite_differences() {
        for (rows, vocab) in [(0, 3), (1, 1), (7, 33), (4, 100)] {
            check_gradient(rows, vocab, None);
            check_gradient(rows, vocab, Some(0.3));
        }
    }

    #[test]
    fn threads_and_neighbours_do_not_change_a_bit() {
        let (rows, vocab) = (37, 3001);
        let (values, labels) = (logits(4, rows * vocab), vec![17; rows]);
        let run = |rows: usize| {
            let mut sums = [vec![0.0; rows], vec![0.0; rows], vec![0.0; rows]];
            let [lse, logprob, entropy] = &mut sums;
            logprobs(&values[..rows * vocab], vocab, &labels[..rows], lse, logprob, Some(entropy));
            let (mut d, mut memory) = (values[..rows * vocab].to_vec(), values[..rows * vocab].to_vec());
            gradient::<f32>(&mut d, vocab, &labels[..rows], lse, &vec![0.1; rows], None);
            let rounded: &[bf16] = gradient(&mut memory, vocab, &labels[..rows], lse, &vec![0.1; rows], None);
            assert!(rounded.iter().zip(&d).all(|(rounded, d)| *rounded == <bf16 as Element>::from_f32(*d)));
            (sums, d)
        };
        assert_same_on_any_threads(|| run(rows));
        assert_eq!(run(rows).0[1][..2], run(2).0[1]);
    }
}
