//! The choice of the next token from its logits. Rules act in a fixed order: logit bias, repetition penalty, presence and
//! frequency penalty, temperature, top_k, top_p, min_p (the order of transformers' logits processors, with the additive
//! penalties where vLLM has them). Knows no model and keeps no state: the random number is an argument, so a choice can be
//! made again.
//! Sources: Keskar et al., arXiv 1909.05858, section 4.1 (repetition penalty); OpenAI's API reference (presence and
//! frequency penalty, logit bias); Holtzman et al., arXiv 1904.09751, section 3.1 (top_p); Nguyen et al., arXiv 2407.01082
//! (min_p).

use crate::error::{Error, Result};
use crate::kernels::cpu::likelihood::{BLOCK, sum, survey, weights};
use crate::model::paged::{Change, Likely};
use std::borrow::Cow;
use std::collections::BTreeMap;

/// How tokens are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rules {
    /// Logits of tokens that are already there, in the prompt or after it, are divided by it where positive and multiplied
    /// where not; 1 is off. Acts on greedy choices too, as do the next two.
    pub repetition_penalty: f64,
    /// Taken from the logits of tokens that were generated; 0 is off.
    pub presence_penalty: f64,
    /// The same for each time that a token was generated; 0 is off.
    pub frequency_penalty: f64,
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
    pub const GREEDY: Self =
        Self { repetition_penalty: 1.0, presence_penalty: 0.0, frequency_penalty: 0.0, temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0 };

    /// Errors: [`Error::Argument`] for a value that cannot be meant.
    pub fn check(&self) -> Result<()> {
        let within = |arg: &str, value: f64, fits: bool, expected: &str| {
            if fits { Ok(()) } else { Err(Error::argument("generate", arg, expected, value)) }
        };
        let penalty = self.repetition_penalty;
        within("repetition_penalty", penalty, penalty > 0.0 && penalty.is_finite(), "a number above 0 (1 is off)")?;
        within("presence_penalty", self.presence_penalty, self.presence_penalty.is_finite(), "a number (0 is off)")?;
        within("frequency_penalty", self.frequency_penalty, self.frequency_penalty.is_finite(), "a number (0 is off)")?;
        let warm = self.temperature >= 0.0 && self.temperature.is_finite();
        within("temperature", self.temperature, warm, "a number from 0 (0 takes the most likely token)")?;
        within("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "a number above 0, up to 1 (1 is off)")?;
        within("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "a number from 0 to 1 (0 is off)")
    }

    /// The temperature of the distribution that log-probabilities are reported for: 1 where choices are greedy.
    pub fn reported_temperature(&self) -> f32 {
        if self.is_greedy() { 1.0 } else { self.temperature as f32 }
    }

    /// The temperature of the choice: 0 is the most likely token.
    pub fn drawn_temperature(&self) -> f32 {
        if self.is_greedy() { 0.0 } else { self.temperature as f32 }
    }

    /// Whether a rule drops tokens from the draw. A device draws from all, and else finds the tokens that may be kept.
    pub fn filters(&self) -> bool {
        !self.is_greedy() && !self.is_unfiltered()
    }

    /// Below the least normal f32 the most likely token has all of the probability.
    fn is_greedy(&self) -> bool {
        self.temperature < f64::from(f32::MIN_POSITIVE)
    }

    fn is_unfiltered(&self) -> bool {
        self.top_k == 0 && self.top_p >= 1.0 && self.min_p <= 0.0
    }
}

/// The tokens so far.
#[derive(Clone, Copy, Debug)]
pub struct History<'a> {
    /// Prompt and output.
    pub tokens: &'a [i32],
    /// How many of them are the prompt.
    pub prompt: usize,
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
/// - `bias`: numbers that are added to the logits of some ids
/// - `logits`: `[vocab]`; minus infinity rules a token out
/// - `uniform`: a random number in [0, 1); not read when the temperature is 0
///
/// Errors: as [`candidates`].
pub fn choose(rules: &Rules, bias: &[(u32, f64)], logits: &[f32], history: History, uniform: f64) -> Result<u32> {
    assert!((0.0..1.0).contains(&uniform), "a uniform number of {uniform}");
    if rules.filters() {
        return Ok(pick(&candidates(rules, bias, logits, history)?, uniform));
    }
    let (scores, largest) = scores(rules, bias, logits, history)?;
    Ok(if rules.is_greedy() { first_of(&scores, largest) } else { draw(&scores, largest, rules.temperature as f32, uniform) })
}

/// As [`choose`] with rules that filter, from the most likely tokens, after bias and penalties; none if more of them would be needed.
pub fn choose_likely(rules: &Rules, likely: Likely, uniform: f64) -> Option<u32> {
    keep(rules, likely).map(|candidates| pick(&candidates, uniform))
}

fn pick(candidates: &[Candidate], uniform: f64) -> u32 {
    let mut below = 0.0;
    for candidate in candidates {
        below += candidate.probability;
        if uniform < below {
            return candidate.id;
        }
    }
    // The probabilities may sum to a little less than 1.
    candidates.last().expect("at least the most likely token is kept").id
}

/// The token at which the sum of weights, by rising id, passes `uniform` of the whole.
fn draw(scores: &[f32], largest: f32, temperature: f32, uniform: f64) -> u32 {
    let mut powers = vec![0.0; scores.len()];
    weights(scores, largest, temperature, &mut powers);
    let sums: Vec<f64> = powers.chunks(BLOCK).map(sum).collect();
    let target = uniform * sums.iter().sum::<f64>();
    let (mut below, mut last) = (0.0, first_of(scores, largest));
    for (block, (sum, powers)) in sums.iter().zip(powers.chunks(BLOCK)).enumerate() {
        if below + sum <= target {
            below += sum;
            continue;
        }
        let mut within = below;
        for (index, power) in powers.iter().enumerate().filter(|(_, power)| **power > 0.0) {
            within += f64::from(*power);
            last = (block * BLOCK + index) as u32;
            if within > target {
                return last;
            }
        }
        // The block's own sum was a rounding larger than that of its numbers one by one.
        return last;
    }
    last
}

/// The tokens that the rules keep, by rising id, with their probabilities. Arguments as in [`choose`].
///
/// Errors: [`Error::Argument`] for rules that cannot be meant, and for logits that are not numbers or are all minus
/// infinity: the model's weights are damaged, or everything was ruled out.
pub fn candidates(rules: &Rules, bias: &[(u32, f64)], logits: &[f32], history: History) -> Result<Vec<Candidate>> {
    let (scores, largest) = scores(rules, bias, logits, history)?;
    if rules.is_greedy() {
        return Ok(vec![Candidate { id: first_of(&scores, largest), probability: 1.0 }]);
    }
    let mut powers = vec![0.0; scores.len()];
    weights(&scores, largest, rules.temperature as f32, &mut powers);
    let total: f64 = powers.chunks(BLOCK).map(sum).sum();
    let tokens: Vec<(f32, u32)> = powers.iter().zip(0..).filter(|(weight, _)| **weight > 0.0).map(|(weight, id)| (*weight, id)).collect();
    Ok(keep(rules, Likely { tokens, total, floor: 0.0 }).expect("no token with weight is left out"))
}

/// What filters keep of the most likely tokens, with probabilities; none if it depends on tokens that are not there.
fn keep(rules: &Rules, likely: Likely) -> Option<Vec<Candidate>> {
    let Likely { tokens: mut kept, mut total, mut floor } = likely;
    // Weights rise with scores, so the most likely tokens are those with the largest. What is not there weighs less.
    if rules.top_k > 0 && (rules.top_k < kept.len() || (rules.top_k == kept.len() && floor > 0.0)) {
        let mut weights: Vec<f32> = kept.iter().map(|(weight, _)| *weight).collect();
        let least = *weights.select_nth_unstable_by(rules.top_k - 1, |a, b| b.total_cmp(a)).1;
        kept.retain(|(weight, _)| *weight >= least);
        total = kept.iter().map(|(weight, _)| f64::from(*weight)).sum();
        floor = 0.0;
    } else if rules.top_k > kept.len() && floor > 0.0 {
        return None;
    }
    if rules.top_p < 1.0 {
        let reached = keep_nucleus(&mut kept, rules.top_p * total);
        if !reached && floor > 0.0 {
            return None;
        }
        floor = 0.0;
    }
    if f64::from(floor) > rules.min_p {
        return None;
    }
    // The most likely token has weight 1.
    kept.retain(|(weight, _)| f64::from(*weight) >= rules.min_p);
    kept.sort_unstable_by_key(|(_, id)| *id);
    let total: f64 = kept.iter().map(|(weight, _)| f64::from(*weight)).sum();
    Some(kept.into_iter().map(|(weight, id)| Candidate { id, probability: f64::from(weight) / total }).collect())
}

fn most_likely_first(a: &(f32, u32), b: &(f32, u32)) -> std::cmp::Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

/// Keeps the fewest most likely tokens whose weights reach `mass`, all if they do not; whether they do. Usually they are few of many, so
/// that some are sorted first, and more only if these do not reach it.
fn keep_nucleus(kept: &mut Vec<(f32, u32)>, mass: f64) -> bool {
    let mut sorted = 256;
    loop {
        let all = sorted >= kept.len();
        let some = if all { &mut kept[..] } else { kept.select_nth_unstable_by(sorted, most_likely_first).0 };
        some.sort_unstable_by(most_likely_first);
        let mut reached = 0.0;
        let crossing = some.iter().position(|(weight, _)| {
            reached += f64::from(*weight);
            reached >= mass
        });
        match crossing {
            Some(index) => {
                kept.truncate(index + 1);
                return true;
            }
            None if all => return false,
            None => sorted *= 8,
        }
    }
}

/// The logits after bias and penalties, and the largest of them.
fn scores<'a>(rules: &Rules, bias: &[(u32, f64)], logits: &'a [f32], history: History) -> Result<(Cow<'a, [f32]>, f32)> {
    rules.check()?;
    let (fine, mut largest) = survey(logits);
    if !fine {
        let odd = |logit: &f32| logit.is_nan() || *logit == f32::INFINITY;
        let id = logits.iter().position(odd).expect("a survey found one");
        return Err(Error::argument("generate", format!("logits[{id}]"), "a number (are the model's weights damaged?)", logits[id]));
    }
    let vocab = logits.len();
    if let Some((id, _)) = bias.iter().find(|(id, _)| *id as usize >= vocab) {
        let expected = format!("ids from 0 to {}", vocab.saturating_sub(1));
        return Err(Error::argument("generate", "logit_bias", expected, id));
    }
    let mut scores = Cow::Borrowed(logits);
    for change in changes(rules, bias, vocab, history) {
        let score = &mut scores.to_mut()[change.id as usize];
        *score = change.applied(*score);
    }
    if matches!(scores, Cow::Owned(_)) {
        largest = survey(&scores).1;
    }
    if largest == f32::NEG_INFINITY {
        return Err(Error::argument("generate", "logits", "at least one token that is not ruled out", "none"));
    }
    Ok((scores, largest))
}

/// What bias and penalties do to logits, by rising id: each token once. Of ids from `vocab` on nothing is said: a prompt may hold some
/// that are never chosen, rows of padding or images. Arguments as in [`choose`].
pub fn changes(rules: &Rules, bias: &[(u32, f64)], vocab: usize, history: History) -> Vec<Change> {
    let mut changes = BTreeMap::<i32, Change>::new();
    let known = |id: &i32| usize::try_from(*id).is_ok_and(|id| id < vocab);
    let mut of = |id: i32, change: &dyn Fn(&mut Change)| change(changes.entry(id).or_insert_with(|| Change::of(id)));
    for (id, by) in bias.iter().filter(|(id, _)| (*id as usize) < vocab) {
        of(*id as i32, &|change| change.add(*by));
    }
    if rules.repetition_penalty != 1.0 {
        history.tokens.iter().filter(|id| known(id)).for_each(|id| of(*id, &|change| change.divide(rules.repetition_penalty)));
    }
    if rules.presence_penalty != 0.0 || rules.frequency_penalty != 0.0 {
        let mut counts = BTreeMap::<i32, f64>::new();
        for id in history.tokens[history.prompt..].iter().filter(|id| known(id)) {
            *counts.entry(*id).or_default() += 1.0;
        }
        for (id, count) in counts {
            of(id, &|change| change.take(rules.presence_penalty, rules.frequency_penalty * count));
        }
    }
    changes.into_values().collect()
}

/// The first of the highest scores.
fn first_of(scores: &[f32], largest: f32) -> u32 {
    scores.iter().position(|score| *score == largest).expect("the largest is one of them") as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::safetensors::SafetensorsFile;
    use crate::kernels::random::Stream;
    use std::path::Path;

    /// All of them prompt.
    fn all(tokens: &[i32]) -> History<'_> {
        History { tokens, prompt: tokens.len() }
    }

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
                ..Rules::GREEDY
            };
            let probabilities = file.read_floats::<f32>(&format!("probs.{name}")).unwrap();
            let counts = file.read_integers(&format!("kept.{name}")).unwrap();
            for (row, count) in counts.iter().enumerate() {
                let (range, want) = (row * 512..(row + 1) * 512, &probabilities[row * 512..][..512]);
                let kept = candidates(&rules, &[], &logits[range], all(&previous[row * 12..][..12])).unwrap();
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
            let token = choose(&OFF, &[], &logits, all(&[]), uniform).unwrap();
            assert_eq!(token, choose(&OFF, &[], &logits, all(&[]), uniform).unwrap());
            counts[token as usize] += 1;
        }
        // Deviations are 50 and 43: five of each are allowed.
        assert!(counts[0].abs_diff(5000) < 250 && counts[1].abs_diff(2500) < 215 && counts[2].abs_diff(2500) < 215, "{counts:?}");
        let just_below = 1.0 - f64::EPSILON / 2.0;
        assert_eq!([0.0, 0.49, 0.51, 0.74, 0.76, just_below].map(|u| choose(&OFF, &[], &logits, all(&[]), u).unwrap()), [0, 0, 1, 1, 2, 2]);
    }

    #[test]
    fn ties_infinities_and_tiny_temperatures() {
        let infinite = f32::NEG_INFINITY;
        assert_eq!(choose(&Rules::GREEDY, &[], &[1.0, 3.0, 3.0], all(&[]), 0.0).unwrap(), 1);
        assert_eq!(choose(&Rules { top_k: 1, ..OFF }, &[], &[infinite, 2.0, infinite], all(&[]), 0.99).unwrap(), 1);
        let kept = candidates(&Rules { top_k: 2, ..OFF }, &[], &[1.0, 0.0, 1.0, 1.0], all(&[])).unwrap();
        assert_eq!(kept.iter().map(|candidate| candidate.id).collect::<Vec<_>>(), [0, 2, 3], "all that tie with the last one stay");
        assert_eq!(choose(&Rules { temperature: 1e-300, ..OFF }, &[], &[5.0, 80.0, 79.0], all(&[]), 0.999).unwrap(), 1);
        assert_eq!(choose(&Rules { min_p: 1.0, ..OFF }, &[], &[5.0, 80.0, 79.0], all(&[]), 0.999).unwrap(), 1);
    }

    #[test]
    fn the_penalty_acts_once_a_token_and_by_sign() {
        let rules = Rules { repetition_penalty: 2.0, ..OFF };
        let with = candidates(&rules, &[], &[2.0, -1.0, 0.0], all(&[0, 1, 0, 0])).unwrap();
        let without = candidates(&OFF, &[], &[1.0, -2.0, 0.0], all(&[])).unwrap();
        assert_eq!(with, without);
        assert_eq!(choose(&Rules { repetition_penalty: 2.0, ..Rules::GREEDY }, &[], &[2.0, 1.5], all(&[0]), 0.0).unwrap(), 1);
    }

    #[test]
    fn bias_and_additive_penalties_act_on_what_was_generated() {
        let history = History { tokens: &[0, 0, 1, 2, 2], prompt: 2 };
        let rules = Rules { presence_penalty: 0.5, frequency_penalty: 0.25, ..OFF };
        let with = candidates(&rules, &[(3, 2.0)], &[1.0, 1.0, 1.0, 1.0], history).unwrap();
        assert_eq!(with, candidates(&OFF, &[], &[1.0, 0.25, 0.0, 3.0], all(&[])).unwrap());
        assert_eq!(choose(&Rules::GREEDY, &[(1, f64::NEG_INFINITY)], &[0.0, 5.0, 1.0], all(&[]), 0.0).unwrap(), 2);
        assert!(choose(&OFF, &[(4, 1.0)], &[0.0; 4], history, 0.0).unwrap_err().to_string().contains("ids from 0 to 3"));
    }

    #[test]
    fn a_wide_nucleus_is_found_among_many() {
        // 5,000 tokens of which the i-th most likely has weight 0.999^i; those up to 0.9 of the mass are kept.
        let logits: Vec<f32> = (0..5000).map(|i| (i * 2039 % 5000) as f32 * 0.999f32.ln()).collect();
        let kept = candidates(&Rules { top_p: 0.9, ..OFF }, &[], &logits, all(&[])).unwrap();
        let whole: f64 = (0..5000).map(|i| 0.999f64.powi(i)).sum();
        let mut sum = 0.0;
        let want = (0..5000).position(|i| {
            sum += 0.999f64.powi(i);
            sum >= 0.9 * whole
        });
        assert!(kept.len().abs_diff(want.unwrap() + 1) <= 1, "{} of {want:?}", kept.len());
        assert!(kept.iter().all(|kept| kept.id as usize * 2039 % 5000 <= want.unwrap() + 1));
        let all_of_them = candidates(&OFF, &[], &logits, all(&[])).unwrap();
        for uniform in [0.0, 0.1, 0.5, 0.93, 0.999_999] {
            let mut below = 0.0;
            let slow = all_of_them.iter().find(|candidate| {
                below += candidate.probability;
                uniform < below
            });
            let id = choose(&OFF, &[], &logits, all(&[]), uniform).unwrap();
            assert!(id.abs_diff(slow.unwrap().id) <= 1, "{uniform}: {id}, {slow:?}");
        }
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
            assert!(choose(&rules, &[], &[1.0], all(&[]), 0.0).unwrap_err().to_string().contains(wanted), "{wanted}");
        }
        assert!(choose(&OFF, &[], &[1.0, f32::NAN], all(&[]), 0.0).unwrap_err().to_string().contains("logits[1]"));
        assert!(choose(&OFF, &[], &[f32::NEG_INFINITY; 2], all(&[]), 0.0).unwrap_err().to_string().contains("ruled out"));
    }
}
