//! The choice of the next token from its logits. Rules act in a fixed order, that of transformers' logits processors:
//! repetition penalty, temperature, top_k, top_p, min_p. All in f64. Knows no model and keeps no state: the random number
//! is an argument, so a choice can be made again.
//! Sources: Keskar et al., arXiv 1909.05858, section 4.1 (repetition penalty); Holtzman et al., arXiv 1904.09751, section
//! 3.1 (top_p); Nguyen et al., arXiv 2407.01082 (min_p).

use crate::error::{Error, Result};

/// How tokens are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rules {
    /// Logits of tokens that are already there are divided by it where positive and multiplied where not; 1 is off. Acts on
    /// greedy choices too.
    pub repetition_penalty: f64,
    /// Logits are divided by it; 0 takes the most likely token, and the next three are without effect.
    pub temperature: f64,
    /// Keeps this many of the most likely tokens, and those as likely as the last of them; 0 is off.
    pub top_k: usize,
    /// Keeps the fewest most likely tokens whose probabilities reach it together, at least one; 1 is off.
    pub top_p: f64,
    /// Drops tokens less likely than this times the most likely one; 0 is off.
    pub min_p: f64,
}

impl Rules {
    /// The most likely token each time.
    pub const GREEDY: Self = Self { repetition_penalty: 1.0, temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0 };

    /// Errors: [`Error::Argument`] for a value that cannot be meant.
    pub fn check(&self) -> Result<()> {
        let within = |arg: &str, value: f64, fits: bool, expected: &str| {
            if fits { Ok(()) } else { Err(Error::argument("generate", arg, expected, value)) }
        };
        let penalty = self.repetition_penalty;
        within("repetition_penalty", penalty, penalty > 0.0 && penalty.is_finite(), "a number above 0 (1 is off)")?;
        let warm = self.temperature >= 0.0 && self.temperature.is_finite();
        within("temperature", self.temperature, warm, "a number from 0 (0 takes the most likely token)")?;
        within("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "a number above 0, up to 1 (1 is off)")?;
        within("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "a number from 0 to 1 (0 is off)")
    }
}

/// A token that may be chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    pub id: u32,
    /// After all rules; the candidates' sum is 1.
    pub probability: f64,
}

/// The next token.
///
/// - `logits`: `[vocab]`; minus infinity rules a token out
/// - `previous`: the tokens so far, prompt and output, for the repetition penalty
/// - `uniform`: a random number in [0, 1); not read when the temperature is 0
///
/// Errors: as [`candidates`].
pub fn choose(rules: &Rules, logits: &[f32], previous: &[i32], uniform: f64) -> Result<u32> {
    assert!((0.0..1.0).contains(&uniform), "a uniform number of {uniform}");
    if rules.temperature == 0.0 {
        return Ok(most_likely(&penalised(rules, logits, previous)?) as u32);
    }
    let candidates = candidates(rules, logits, previous)?;
    let mut below = 0.0;
    for candidate in &candidates {
        below += candidate.probability;
        if uniform < below {
            return Ok(candidate.id);
        }
    }
    // The probabilities may sum to a little less than 1.
    Ok(candidates.last().expect("at least the most likely token is kept").id)
}

/// The tokens that the rules keep, by rising id, with their probabilities. Arguments as in [`choose`].
///
/// Errors: [`Error::Argument`] for rules that cannot be meant, and for logits that are not numbers or are all minus
/// infinity: the model's weights are damaged, or everything was ruled out.
pub fn candidates(rules: &Rules, logits: &[f32], previous: &[i32]) -> Result<Vec<Candidate>> {
    let scores = penalised(rules, logits, previous)?;
    if rules.temperature == 0.0 {
        return Ok(vec![Candidate { id: most_likely(&scores) as u32, probability: 1.0 }]);
    }
    let finite = scores.iter().enumerate().filter(|(_, score)| **score != f64::NEG_INFINITY);
    // (score, id); the maximum is subtracted before the division, so that small temperatures do not overflow.
    let highest = scores[most_likely(&scores)];
    let mut kept: Vec<(f64, u32)> = finite.map(|(id, score)| ((score - highest) / rules.temperature, id as u32)).collect();
    if rules.top_k > 0 && rules.top_k < kept.len() {
        let (_, last, _) = kept.select_nth_unstable_by(rules.top_k - 1, |a, b| b.0.total_cmp(&a.0));
        let least = last.0;
        kept.retain(|(score, _)| *score >= least);
    }
    if rules.top_p < 1.0 {
        kept.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let total: f64 = kept.iter().map(|(score, _)| score.exp()).sum();
        let mut sum = 0.0;
        let crossing = kept.iter().position(|(score, _)| {
            sum += score.exp() / total;
            sum >= rules.top_p
        });
        kept.truncate(crossing.map_or(kept.len(), |index| index + 1));
    }
    if rules.min_p > 0.0 {
        // The most likely token has score 0.
        kept.retain(|(score, _)| score.exp() >= rules.min_p);
    }
    kept.sort_unstable_by_key(|(_, id)| *id);
    let total: f64 = kept.iter().map(|(score, _)| score.exp()).sum();
    Ok(kept.into_iter().map(|(score, id)| Candidate { id, probability: score.exp() / total }).collect())
}

/// The logits after the repetition penalty, which acts once on each distinct token.
fn penalised(rules: &Rules, logits: &[f32], previous: &[i32]) -> Result<Vec<f64>> {
    rules.check()?;
    if let Some(id) = logits.iter().position(|logit| logit.is_nan() || *logit == f32::INFINITY) {
        return Err(Error::argument("generate", format!("logits[{id}]"), "a number (are the model's weights damaged?)", logits[id]));
    }
    if logits.iter().all(|logit| *logit == f32::NEG_INFINITY) {
        return Err(Error::argument("generate", "logits", "at least one token that is not ruled out", "none"));
    }
    let mut scores: Vec<f64> = logits.iter().map(|logit| f64::from(*logit)).collect();
    if rules.repetition_penalty != 1.0 {
        let mut distinct = previous.to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        for id in distinct {
            let score = usize::try_from(id).ok().and_then(|id| scores.get_mut(id));
            let score = score.unwrap_or_else(|| panic!("token {id} of a vocabulary of {}", logits.len()));
            *score = if *score > 0.0 { *score / rules.repetition_penalty } else { *score * rules.repetition_penalty };
        }
    }
    Ok(scores)
}

/// The first of the highest scores.
fn most_likely(scores: &[f64]) -> usize {
    let better = |best: usize, index: usize| if scores[index] > scores[best] { index } else { best };
    (0..scores.len()).reduce(better).expect("a vocabulary is not empty")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::safetensors::SafetensorsFile;
    use crate::kernels::random::Stream;
    use std::path::Path;

    const OFF: Rules = Rules { temperature: 1.0, ..Rules::GREEDY };

    #[test]
    fn golden_probabilities_after_every_set_of_rules() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/sampling");
        let meta: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(folder.join("meta.json")).unwrap()).unwrap();
        let file = SafetensorsFile::open(&folder.join("expected.safetensors")).unwrap();
        let logits = file.read_floats::<f32>("logits").unwrap();
        let previous: Vec<i32> = file.read_integers("previous_ids").unwrap().iter().map(|id| *id as i32).collect();
        let cases = meta["params"]["cases"].as_object().unwrap();
        assert!(cases.len() >= 11);
        for (name, case) in cases {
            let number = |key: &str, off: f64| case.get(key).map_or(off, |value| value.as_f64().unwrap());
            let rules = Rules {
                repetition_penalty: number("repetition_penalty", 1.0),
                temperature: number("temperature", 1.0),
                top_k: number("top_k", 0.0) as usize,
                top_p: number("top_p", 1.0),
                min_p: number("min_p", 0.0),
            };
            let probabilities = file.read_floats::<f32>(&format!("probs.{name}")).unwrap();
            let counts = file.read_integers(&format!("kept.{name}")).unwrap();
            for (row, count) in counts.iter().enumerate() {
                let (range, want) = (row * 512..(row + 1) * 512, &probabilities[row * 512..][..512]);
                let kept = candidates(&rules, &logits[range], &previous[row * 12..][..12]).unwrap();
                assert_eq!(kept.len() as i64, *count, "{name}, row {row}");
                let mut got = [0.0f64; 512];
                kept.iter().for_each(|candidate| got[candidate.id as usize] = candidate.probability);
                for (id, (got, want)) in got.iter().zip(want).enumerate() {
                    let want = f64::from(*want);
                    // Stated in meta.json; a token that is dropped must be exactly 0.
                    assert!(
                        (got - want).abs() <= 2e-6 + 1e-4 * want && (*got == 0.0) == (want == 0.0),
                        "{name}, {row}, {id}: {got} {want}"
                    );
                }
            }
        }
    }

    #[test]
    fn choices_follow_the_probabilities_and_repeat() {
        // Probabilities 0.5, 0.25, 0.25 from logits that are their logarithms.
        let logits = [0.5f32.ln(), 0.25f32.ln(), 0.25f32.ln()];
        let stream = Stream::new(5, "choices");
        let mut counts = [0u32; 3];
        for counter in 0..10_000 {
            let uniform = stream.f64(counter);
            let token = choose(&OFF, &logits, &[], uniform).unwrap();
            assert_eq!(token, choose(&OFF, &logits, &[], uniform).unwrap());
            counts[token as usize] += 1;
        }
        // Deviations are 50 and 43: five of each are allowed.
        assert!(counts[0].abs_diff(5000) < 250 && counts[1].abs_diff(2500) < 215 && counts[2].abs_diff(2500) < 215, "{counts:?}");
        let just_below = 1.0 - f64::EPSILON / 2.0;
        assert_eq!([0.0, 0.49, 0.51, 0.74, 0.76, just_below].map(|u| choose(&OFF, &logits, &[], u).unwrap()), [0, 0, 1, 1, 2, 2]);
    }

    #[test]
    fn ties_infinities_and_tiny_temperatures() {
        let infinite = f32::NEG_INFINITY;
        assert_eq!(choose(&Rules::GREEDY, &[1.0, 3.0, 3.0], &[], 0.0).unwrap(), 1);
        assert_eq!(choose(&Rules { top_k: 1, ..OFF }, &[infinite, 2.0, infinite], &[], 0.99).unwrap(), 1);
        let kept = candidates(&Rules { top_k: 2, ..OFF }, &[1.0, 0.0, 1.0, 1.0], &[]).unwrap();
        assert_eq!(kept.iter().map(|candidate| candidate.id).collect::<Vec<_>>(), [0, 2, 3], "all that tie with the last one stay");
        assert_eq!(choose(&Rules { temperature: 1e-300, ..OFF }, &[5.0, 80.0, 79.0], &[], 0.999).unwrap(), 1);
        assert_eq!(choose(&Rules { min_p: 1.0, ..OFF }, &[5.0, 80.0, 79.0], &[], 0.999).unwrap(), 1);
    }

    #[test]
    fn the_penalty_acts_once_a_token_and_by_sign() {
        let rules = Rules { repetition_penalty: 2.0, ..OFF };
        let with = candidates(&rules, &[2.0, -1.0, 0.0], &[0, 1, 0, 0]).unwrap();
        let without = candidates(&OFF, &[1.0, -2.0, 0.0], &[]).unwrap();
        assert_eq!(with, without);
        assert_eq!(choose(&Rules { repetition_penalty: 2.0, ..Rules::GREEDY }, &[2.0, 1.5], &[0], 0.0).unwrap(), 1);
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for (rules, wanted) in [
            (Rules { temperature: -1.0, ..OFF }, "temperature"),
            (Rules { temperature: f64::NAN, ..OFF }, "temperature"),
            (Rules { top_p: 0.0, ..OFF }, "top_p"),
            (Rules { top_p: 1.1, ..OFF }, "top_p"),
            (Rules { min_p: 1.1, ..OFF }, "min_p"),
            (Rules { repetition_penalty: 0.0, ..OFF }, "repetition_penalty"),
        ] {
            assert!(choose(&rules, &[1.0], &[], 0.0).unwrap_err().to_string().contains(wanted), "{wanted}");
        }
        assert!(choose(&OFF, &[1.0, f32::NAN], &[], 0.0).unwrap_err().to_string().contains("logits[1]"));
        assert!(choose(&OFF, &[f32::NEG_INFINITY; 2], &[], 0.0).unwrap_err().to_string().contains("ruled out"));
    }
}
