//! `perilune bench decode`: tokens a second of prefill and of decoding, and the share of the memory's bandwidth that decoding
//! one text reaches: each token reads every weight once.

use super::bench::{Case, Times, clocked, timed};
use super::bench_ceilings;
use super::units;
use crate::error::{Error, Result};
use crate::infer::sampler::Rules;
use crate::infer::scheduler::{Job, Scheduler};
use crate::kernels::available_memory::has_room_for_copy;
use crate::kernels::cpu::threads::threads;
use crate::kernels::random::Stream;
use crate::model::{Model, flops, sizes};
use serde_json::{Value, json};
use std::time::Instant;

const PROMPT_TOKENS: usize = 64;
const DECODED_TOKENS: usize = 64;
/// Measured unless others are asked for.
pub const BATCHES: [usize; 2] = [1, 8];
pub const PREFILLS: [usize; 2] = [512, 4096];

/// Report and text. Errors: those of the model.
pub fn run(case: &Case) -> Result<(Value, String)> {
    let model = Model::random_at(&case.place, case.config.clone(), case.dtype, 0)?;
    model.set_trains(false);
    let read = match case.place.device() {
        Some(device) => bench_ceilings::copy_on(device, case.seconds / 10.0)?.best,
        None => bench_ceilings::read(case.seconds / 10.0)?.best,
    };
    let read_by = case.place.device().map_or_else(|| format!("read by {} threads", threads()), |_| "read and written by a copy".into());
    let bytes = weight_bytes(&model);
    let (mut report, mut text) = (json!({}), String::new());
    text += &format!(
        "decode {} ({} parameters), {}, prompts of {PROMPT_TOKENS} tokens, {DECODED_TOKENS} tokens each\nceiling   {read:.1} GB/s {read_by}\n",
        case.name,
        units::count(model.count() as f64),
        model.dtype_name()
    );
    for &batch in &case.batches {
        let cache = sizes::cache_bytes(&case.config, case.dtype, PROMPT_TOKENS + DECODED_TOKENS + 1, batch);
        if case.place.device().is_none() && !has_room_for_copy(cache) {
            let needs = format!("{batch}, whose keys and values take {}", units::bytes(cache));
            return Err(Error::argument("bench decode", "--batch", "as many texts as memory has room for", needs));
        }
        let mut steps = Vec::new();
        timed(case.seconds / 5.0, || {
            let (took, result) = clocked(|| decode(&model, batch, &mut steps));
            result.map(|()| took)
        })?;
        let times = Times::new(steps);
        let rate = batch as f64 / times.median();
        let gbs = bytes as f64 / times.median() / 1e9;
        text += &format!(
            "batch {batch:<4}{rate:>9.1} tokens/s, {:.2} ms a step, weights at {gbs:.1} GB/s, {:.0}% of the ceiling\n",
            times.median() * 1e3,
            100.0 * gbs / read
        );
        report[format!("decode_{batch}")] = json!({ "tokens_per_s": rate, "best": batch as f64 / times.best(), "weights_gb_s": gbs, "share_of_read": gbs / read, "step": times.to_json() });
    }
    let matrix = bench_ceilings::matrix_product_at(&case.place, model.dtype(), (case.seconds / 10.0).min(2.0))?;
    for &tokens in case.prefills.iter().filter(|tokens| **tokens <= case.config.max_positions) {
        let times = timed(case.seconds / 5.0, || {
            let (took, result) = clocked(|| prefill(&model, tokens));
            result.map(|()| took)
        })?;
        let rate = tokens as f64 / times.median();
        let gflops = (flops::forward_flops(&case.config, tokens) - flops::head_flops(&case.config, tokens - 1)) / times.median() / 1e9;
        text += &format!(
            "prefill {tokens:<5}{rate:>7.0} tokens/s, {gflops:.0} GFLOP/s, {:.0}% of {:.0}\n",
            100.0 * gflops / matrix.best,
            matrix.best
        );
        report[format!("prefill_{tokens}")] = json!({ "tokens_per_s": rate, "best": tokens as f64 / times.best(), "gflops": gflops, "share": gflops / matrix.best, "times": times.to_json() });
    }
    report["read_gb_s"] = json!(read);
    report["weight_bytes"] = json!(bytes);
    Ok((report, text))
}

/// Bytes of the weights that one token reads: all but an embedding that is not the head.
fn weight_bytes(model: &Model) -> usize {
    let config = model.config();
    let looked_up = if config.tied { 0 } else { config.vocab * config.hidden };
    (model.count() - looked_up) * if model.is_int8() { 1 } else { model.dtype().size() }
}

fn prompt(model: &Model, tokens: usize, number: usize) -> Vec<i32> {
    let stream = Stream::new(number as u64, "bench");
    (0..tokens as u64).map(|counter| stream.below(counter, model.config().vocab as u64) as i32).collect()
}

/// Decodes `batch` texts together; adds the time of each step after the prompts'.
fn decode(model: &Model, batch: usize, steps: &mut Vec<f64>) -> Result<()> {
    let mut scheduler = Scheduler::new(model, None, batch)?;
    for number in 0..batch {
        scheduler.add(Job::new(prompt(model, PROMPT_TOKENS, number), DECODED_TOKENS + 1, Rules::GREEDY, 0))?;
    }
    scheduler.step()?;
    while !scheduler.is_idle() {
        let start = Instant::now();
        scheduler.step()?;
        steps.push(start.elapsed().as_secs_f64());
    }
    Ok(())
}

fn prefill(model: &Model, tokens: usize) -> Result<()> {
    let mut scheduler = Scheduler::new(model, None, 1)?;
    scheduler.add(Job::new(prompt(model, tokens, 0), 1, Rules::GREEDY, 0))?;
    while !scheduler.is_idle() {
        scheduler.step()?;
    }
    Ok(())
}
