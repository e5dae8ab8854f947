//! Generation on the device, in captured steps where those are made: what it reports is what training computes, to the bit.

use crate::adapters::kinds;
use crate::bench;
use crate::model::{TOKENS, config, on, settings, step};
use perilune::infer::sampler::Rules;
use perilune::infer::scheduler::{Job, Scheduler, Text};
use perilune::kernels::element::Dtype;
use perilune::model::{Lora, Model, Packed};
use perilune::tensor::Place;
use perilune::train::optimizer::AdamW;

const TEMPERATURE: f32 = 0.8;
const WARM: Rules = Rules { temperature: TEMPERATURE as f64, ..Rules::GREEDY };

fn generate(model: &Model, jobs: &[Job]) -> Vec<(usize, Text)> {
    let mut scheduler = Scheduler::new(model, None, 64).unwrap();
    jobs.iter().for_each(|job| assert!(scheduler.add(job.clone()).is_ok()));
    let mut texts = Vec::new();
    while !scheduler.is_idle() {
        let events = scheduler.step().unwrap();
        texts.extend(events.into_iter().filter_map(|event| Some((event.job, event.finished?))));
    }
    texts
}

/// Generates, and asserts that each log-probability has the bits of the training forward over the whole text.
#[track_caller]
pub fn reports_what_training_computes(what: &str, model: &Model, jobs: &[Job]) {
    let texts = generate(model, jobs);
    assert_eq!(texts.len(), jobs.iter().map(|job| job.members).sum::<usize>());
    for (job, text) in texts {
        let prompt = &jobs[job].prompt;
        let tokens = [&prompt[..], &text.tokens].concat();
        let count = tokens.len() as u32;
        let labels: Vec<i32> =
            (1..=tokens.len()).map(|at| if at < prompt.len() { -100 } else { *tokens.get(at).unwrap_or(&-100) }).collect();
        let positions: Vec<i32> = (0..count as i32).collect();
        let packed = Packed { tokens: &tokens, position_ids: &positions, cu_seqlens: &[0, count], prefixes: &[] };
        let trained = model.logprobs(&packed, &labels, jobs[job].rules.reported_temperature()).unwrap();
        let trained = &trained.values()[prompt.len() - 1..tokens.len() - 1];
        assert!(text.logprobs == trained, "{what}, job {job}: {:?} and {trained:?}", text.logprobs);
    }
}

/// Texts of one, two and three members from prompts that fill blocks of 64 and do not; they end one after the other.
pub fn jobs() -> Vec<Job> {
    let long: Vec<i32> = TOKENS.iter().cycle().take(70).copied().collect();
    let prompts = [TOKENS[..5].to_vec(), long, TOKENS[3..20].to_vec()];
    let job = |(index, prompt)| Job { members: index + 1, ..Job::new(prompt, 9 - 2 * index, WARM, 7) };
    prompts.into_iter().enumerate().map(job).collect()
}

#[test]
fn generation_reports_the_log_probabilities_of_training_to_the_bit() {
    let Some(bench) = bench() else { return };
    for (moe, dtype) in [(false, Dtype::Bf16), (true, Dtype::Bf16), (true, Dtype::F32)] {
        let before = bench.graph_launches();
        reports_what_training_computes(&format!("experts {moe}, {dtype}"), &on(bench, moe, dtype), &jobs());
        // Two captured steps of each number of texts, 6 to 5, 3 to 2 and 1, at the least; other tests may add to the count.
        let captured = bench.graph_launches().zip(before).map(|(after, before)| after - before);
        assert!(dtype == Dtype::F32 || captured.is_none_or(|captured| captured >= 3), "{captured:?} launches of graphs");
    }
}

/// Seventeen texts of one block each come to their second one together: the cache grows, and moves, between two captured steps.
#[test]
fn the_cache_may_move_between_captured_steps() {
    let Some(bench) = bench() else { return };
    let prompt: Vec<i32> = TOKENS.iter().cycle().take(60).copied().collect();
    let jobs = [Job { members: 17, ..Job::new(prompt, 9, WARM, 3) }];
    reports_what_training_computes("a cache that grows", &on(bench, false, Dtype::Bf16), &jobs);
}

/// Weights and adapters that change between two generations, and what stays of the first one's memory.
#[test]
fn each_generation_has_the_weights_of_its_time() {
    let Some(bench) = bench() else { return };
    let device = bench.apart();
    let model = Model::random_at(&Place::Cuda(device.clone()), config(false), Dtype::Bf16, 3).unwrap();
    reports_what_training_computes("as it came", &model, &jobs());
    let mut optimizer = AdamW::new(model.parameters(), settings()).unwrap();
    step(&model, &mut optimizer);
    drop(optimizer);
    reports_what_training_computes("trained", &model, &jobs());
    let lora = Lora { rank: 3, alpha: 6.0, targets: vec!["q_proj".into(), "down_proj".into()], ..Lora::default() };
    model.adapt(lora, 5).unwrap();
    let mut optimizer = AdamW::new(model.parameters(), settings()).unwrap();
    step(&model, &mut optimizer);
    drop(optimizer);
    let before = device.memory_statistics();
    reports_what_training_computes("adapted", &model, &jobs());
    model.merge().unwrap();
    reports_what_training_computes("merged", &model, &jobs());
    model.unmerge().unwrap();
    assert_eq!(device.memory_statistics().live_bytes, before.live_bytes, "nothing is left of graphs and caches");
}

/// Adapters of every kind, before and after an update: a captured step reads what follows from weights, too.
#[test]
fn adapters_of_every_kind_report_what_training_computes() {
    let Some(bench) = bench() else { return };
    for (moe, lora) in kinds() {
        let what = format!("experts {moe}, {lora:?}");
        let model = on(bench, moe, Dtype::Bf16);
        model.adapt(lora, 5).unwrap();
        let mut optimizer = AdamW::new(model.parameters(), settings()).unwrap();
        for turn in 0..2 {
            step(&model, &mut optimizer);
            reports_what_training_computes(&format!("{what}, turn {turn}"), &model, &jobs());
        }
    }
}

/// A text of more than 512 tokens outgrows the spans that its step was captured for.
#[test]
fn a_long_text_gets_a_wider_step() {
    let Some(bench) = bench() else { return };
    let prompt: Vec<i32> = TOKENS.iter().cycle().take(509).copied().collect();
    let jobs = [Job::new(prompt, 9, WARM, 3)];
    let place = Place::Cuda(bench.device.clone());
    let config = perilune::model::config::Config { max_positions: 1024, ..config(false) };
    reports_what_training_computes("509 tokens and more", &Model::random_at(&place, config, Dtype::Bf16, 3).unwrap(), &jobs);
}
