//! Whole texts from prompts, over the scheduler: many at once, or one with its pieces shown as they come.

use super::scheduler::{Event, Job, Scheduler, TEXTS_MAX, Text};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::model::Model;

/// Generates the texts of all jobs: for each job its members, in order.
///
/// - `tokenizer`: for texts and stop strings; without it there are only tokens
/// - `texts_max`: texts that are continued at a time; none for the default
/// - `watch`: sees every event, and is asked with none before each step; its error ends the work
///
/// Errors: those of [`Scheduler::add`] and [`Scheduler::step`], and of `watch`: [`Error::Interrupted`] to end early.
pub fn generate(
    model: &Model,
    tokenizer: Option<&Tokenizer>,
    jobs: Vec<Job>,
    texts_max: Option<usize>,
    watch: &mut dyn FnMut(Option<&Event>) -> Result<()>,
) -> Result<Vec<Vec<Text>>> {
    let mut texts: Vec<Vec<Option<Text>>> = jobs.iter().map(|job| vec![None; job.members]).collect();
    let mut scheduler = Scheduler::new(model, tokenizer, texts_max.unwrap_or(TEXTS_MAX))?;
    for job in jobs {
        scheduler.add(job)?;
    }
    while !scheduler.is_idle() {
        watch(None)?;
        for mut event in scheduler.step()? {
            watch(Some(&event))?;
            if let Some(text) = event.finished.take() {
                texts[event.job][event.member] = Some(text);
            }
        }
    }
    Ok(texts.into_iter().map(|job| job.into_iter().map(|text| text.expect("an idle scheduler has ended all texts")).collect()).collect())
}

/// Generates one text and gives it to `show` in pieces of whole characters as it comes. `show` says no more by
/// [`Error::Interrupted`].
///
/// Errors: as [`generate`].
pub fn generate_text(model: &Model, tokenizer: &Tokenizer, job: Job, show: &mut dyn FnMut(&str) -> Result<()>) -> Result<Text> {
    let mut watch = |event: Option<&Event>| match event {
        Some(event) if !event.piece.is_empty() => show(&event.piece),
        _ => Ok(()),
    };
    let texts = generate(model, Some(tokenizer), vec![Job { members: 1, ..job }], None, &mut watch)?;
    texts.into_iter().flatten().next().ok_or(Error::Interrupted)
}

#[cfg(test)]
mod tests {
    use super::super::sampler::Rules;
    use super::super::scheduler::Finish;
    use super::*;
    use crate::checkpoint::safetensors::SafetensorsFile;
    use crate::kernels::element::Dtype;
    use crate::model::presets::{preset, with_fields};
    use serde_json::json;
    use std::path::{Path, PathBuf};

    fn golden(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
    }

    fn run(model: &Model, jobs: Vec<Job>, texts_max: usize) -> Vec<Vec<Text>> {
        generate(model, None, jobs, Some(texts_max), &mut |_| Ok(())).unwrap()
    }

    fn tokens_of(model: &Model, job: Job) -> (Vec<i32>, Finish) {
        let text = run(model, vec![job], 1).remove(0).remove(0);
        (text.tokens, text.finish)
    }

    fn greedy_tokens_are_the_golden_ones(name: &str, prompts: usize) {
        let folder = golden(name);
        let meta: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(folder.join("meta.json")).unwrap()).unwrap();
        let model = Model::load(&folder.join(meta["checkpoint"].as_str().unwrap()), None, false, &mut |_| {}).unwrap();
        let file = SafetensorsFile::open(&folder.join("expected.safetensors")).unwrap();
        let integers = |name: &str| file.read_integers(name).unwrap().iter().map(|id| *id as i32).collect::<Vec<_>>();
        let penalised = Rules { repetition_penalty: 1.3, ..Rules::GREEDY };
        let (mut jobs, mut wanted) = (Vec::new(), Vec::new());
        for prompt in 0..prompts {
            let ids = integers(&format!("prompt{prompt}.input_ids"));
            for (rules, want) in [(Rules::GREEDY, "greedy"), (penalised, "greedy_rep1.3")] {
                jobs.push(Job::new(ids.clone(), 64, rules, 0));
                wanted.push((integers(&format!("prompt{prompt}.{want}")), Finish::Length));
            }
            if prompt == 0 {
                let stop_ids: Vec<u32> = integers("stop.eos_ids").iter().map(|id| *id as u32).collect();
                jobs.push(Job { stop_ids, ..Job::new(ids, 64, Rules::GREEDY, 0) });
                wanted.push((integers("stop.greedy"), Finish::StopToken));
            }
        }
        for texts_max in [1, 3, 256] {
            let texts = run(&model, jobs.clone(), texts_max);
            let got: Vec<_> = texts.into_iter().flatten().map(|text| (text.tokens, text.finish)).collect();
            assert_eq!(got, wanted, "{name}, {texts_max} at a time");
        }
    }

    #[test]
    fn dense_greedy_tokens_are_the_golden_ones() {
        greedy_tokens_are_the_golden_ones("generate_dense", 4);
    }

    #[test]
    fn moe_greedy_tokens_are_the_golden_ones() {
        greedy_tokens_are_the_golden_ones("generate_moe", 3);
    }

    /// A model over the bytes tokenizer's 259 ids and 61 rows of padding, with large weights so that it is lively.
    fn byte_model() -> Model {
        let fields = json!({ "vocab": 320, "hidden": 32, "intermediate": 48, "layers": 1, "max_positions": 40, "initializer_range": 0.3 });
        let fields: Vec<_> = fields.as_object().unwrap().clone().into_iter().collect();
        Model::random(with_fields(&preset("tiny").unwrap(), &fields).unwrap(), Dtype::F32, 3).unwrap()
    }

    const WARM: Rules = Rules { temperature: 1.0, ..Rules::GREEDY };

    #[test]
    fn sampled_text_streams_repeats_by_seed_and_ends_at_the_last_position() {
        let (model, tokenizer) = (byte_model(), Tokenizer::bytes_with_chat());
        let job = Job::new(vec![72, 105], 100, WARM, 1);
        let run = |job: &Job| {
            let mut streamed = String::new();
            let mut show = |piece: &str| {
                streamed.push_str(piece);
                Ok(())
            };
            let text = generate_text(&model, &tokenizer, job.clone(), &mut show).unwrap();
            assert_eq!(streamed, text.text);
            text
        };
        let first = run(&job);
        assert_eq!((first.tokens.len(), first.finish), (38, Finish::Length));
        assert!(first.tokens.iter().all(|token| *token < 259), "padding rows have no text: {:?}", first.tokens);
        let ids: Vec<u32> = first.tokens.iter().map(|token| *token as u32).collect();
        assert_eq!(first.text, tokenizer.decode(&ids, true).unwrap());
        assert_eq!(first, run(&job));
        assert_ne!(first.tokens, run(&Job { seed: 2, ..job.clone() }).tokens);
        // A shorter text is the beginning of the longer one: the choice of a token depends on its index alone.
        assert_eq!(run(&Job { max_tokens: 5, ..job }).tokens, first.tokens[..5]);
    }

    #[test]
    fn stop_strings_and_wishes_end_a_text() {
        let (model, tokenizer) = (byte_model(), Tokenizer::bytes_with_chat());
        let job = Job::new(vec![72, 105], 30, WARM, 1);
        let whole = generate_text(&model, &tokenizer, job.clone(), &mut |_| Ok(())).unwrap().text;
        let stop: String = whole.chars().filter(|c| *c != '\u{fffd}').nth(4).unwrap().into();
        let cut = generate_text(&model, &tokenizer, Job { stops: vec![stop.clone()], ..job.clone() }, &mut |_| Ok(())).unwrap();
        assert_eq!((cut.text.as_str(), cut.finish), (whole.split(&stop).next().unwrap(), Finish::StopText));
        let mut shown = 0;
        let mut show = |_: &str| {
            shown += 1;
            if shown == 3 { Err(Error::Interrupted) } else { Ok(()) }
        };
        assert!(matches!(generate_text(&model, &tokenizer, job, &mut show), Err(Error::Interrupted)));
    }

    #[test]
    fn texts_are_what_they_are_alone_in_any_company() {
        let (model, tokenizer) = (byte_model(), Tokenizer::bytes_with_chat());
        let job = |index: usize| Job {
            members: 1 + index % 3,
            stops: if index.is_multiple_of(2) { vec!["e".into()] } else { vec![] },
            top_logprobs: index % 2 * 4,
            rules: if index % 4 == 3 { Rules::GREEDY } else { Rules { top_k: index, temperature: 0.8, ..WARM } },
            ..Job::new((0..1 + index * 3).map(|i| (i * 7 % 250) as i32).collect(), 3 + index * 2, WARM, index as u64)
        };
        let run = |jobs: Vec<Job>, most| generate(&model, Some(&tokenizer), jobs, Some(most), &mut |_| Ok(())).unwrap();
        let together = run((0..9).map(job).collect(), 256);
        assert_eq!(together, run((0..9).map(job).collect(), 4));
        for (index, texts) in together.iter().enumerate() {
            assert_eq!(*texts, run(vec![job(index)], 256)[0], "job {index}");
            for text in texts.iter().filter(|_| index % 2 == 1) {
                for ((token, logprob), top) in text.tokens.iter().zip(&text.logprobs).zip(&text.top_logprobs) {
                    assert!(top.len() == 4 && top.windows(2).all(|pair| pair[0].1 >= pair[1].1));
                    let same = top.iter().find(|(id, _)| *id as i32 == *token).is_none_or(|(_, top)| (top - logprob).abs() < 1e-5);
                    assert!(same && logprob <= &(top[0].1 + 1e-5), "{token} {logprob} {top:?}");
                }
            }
        }
        // Members differ, and the first of a group is the text that it is alone.
        let group = run(vec![Job { members: 4, ..Job::new(vec![1, 2, 3], 20, WARM, 5) }], 256).remove(0);
        assert_eq!(group[0], run(vec![Job::new(vec![1, 2, 3], 20, WARM, 5)], 1)[0][0]);
        assert!(group[1..].iter().all(|text| text.tokens != group[0].tokens));
    }

    #[test]
    fn prompts_that_cannot_be_continued_are_refused() {
        let model = byte_model();
        let long = vec![65; 41];
        for (prompt, wanted) in [(vec![], "1 to 40 tokens"), (long.clone(), "41 tokens"), (vec![320], "an id from 0 to 319")] {
            let jobs = vec![Job::new(prompt, 1, WARM, 0)];
            let message = generate(&model, None, jobs, None, &mut |_| Ok(())).unwrap_err().to_string();
            assert!(message.contains(wanted), "{message}");
        }
        let message = generate(&model, None, vec![Job { stops: vec!["x".into()], ..Job::new(vec![1], 1, WARM, 0) }], None, &mut |_| Ok(()));
        assert!(message.unwrap_err().to_string().contains("tokenizer"));
        assert_eq!(tokens_of(&model, Job::new(long[..40].to_vec(), 9, WARM, 0)), (vec![], Finish::Length));
    }
}
