//! `perilune bench train`: tokens a second of a whole training step, its share of the machine, and where its time goes.

use super::bench::{Batch, Case, Times, clocked, timed};
use super::bench_ceilings::{self, Ceiling};
use super::peak_memory::peak_memory_bytes;
use super::units;
use crate::error::Result;
use crate::kernels::buffer::live_bytes_max;
use crate::kernels::element::Dtype;
use crate::model::config::Config;
use crate::model::graph::Graph;
use crate::model::{Model, flops};
use crate::tensor::trainable::Trainable;
use crate::tensor::{ModelElement, logprobs};
use crate::train::optimizer::{AdamW, Settings};
use half::bf16;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// As the usual trainers set them; no clipping, but the norm of the gradient is always computed.
fn settings(case: &Case) -> Settings {
    Settings { lr: 1e-4, betas: (0.9, 0.999), weight_decay: 0.01, clip_norm: None, moments: case.moments, ..Settings::default() }
}

/// Report and text. Errors: those of the model and of the optimizer.
pub fn run(case: &Case) -> Result<(Value, String)> {
    let model = Model::random_at(&case.place, case.config.clone(), case.dtype, 0)?;
    let mut optimizer = AdamW::new(model.parameters(), settings(case))?;
    let batch = Batch::random(case.config.vocab, case.sequences, case.sequence_tokens);
    let mut losses = Vec::new();
    let times = timed(case.seconds, || {
        let start = Instant::now();
        let loss = model.cross_entropy(&batch.packed(), &batch.labels, batch.labelled() as f32, 0.0)?.total;
        loss.backward()?;
        // On a device too the step has ended then: its norm has been read.
        optimizer.step()?;
        let took = start.elapsed();
        losses.push(loss.data().force()?.host()[0]);
        Ok(took)
    })?;
    // The ceiling comes second: its matrices would count as the step's memory, of which only the maximum is known.
    let (peak, tensors) = match case.place.device() {
        Some(device) => (Some(device.memory_bytes as u64 - device.memory_bytes_free()), device.memory_statistics().live_bytes_max),
        None => (peak_memory_bytes(), live_bytes_max()),
    };
    let driver_calls = case.place.device().map(|device| device.memory_statistics().driver_calls);
    let parameters = model.count();
    drop((model, optimizer));
    let ceiling = bench_ceilings::matrix_product_at(&case.place, case.dtype, (case.seconds / 5.0).min(3.0))?;
    let (mut report, mut text) = summary(case, &ceiling, &times, parameters);
    report["peak_memory_bytes"] = json!(peak);
    report["tensor_bytes_max"] = json!(tensors);
    report["driver_calls_for_memory"] = json!(driver_calls);
    report["loss"] = json!({ "first": losses.first(), "last": losses.last() });
    if let Some(peak) = peak {
        text += &format!("memory    {} at the peak, {} of it tensors\n", units::bytes(peak), units::bytes(tensors as u64));
    }
    text += &format!("loss      {:.3} at first, {:.3} at last\n", losses[0], losses[losses.len() - 1]);
    if case.profile {
        let (phases, lines) = match case.dtype {
            Dtype::Bf16 => profile::<bf16>(case, &ceiling, &batch)?,
            _ => profile::<f32>(case, &ceiling, &batch)?,
        };
        report["phases"] = phases;
        text += &lines;
    }
    Ok((report, text))
}

fn summary(case: &Case, ceiling: &Ceiling, times: &Times, parameters: usize) -> (Value, String) {
    let (sequences, length) = (case.sequences, case.sequence_tokens);
    let tokens = (sequences * length) as f64;
    let work = sequences as f64 * flops::train_flops(&case.config, length);
    let gflops = work / times.median() / 1e9;
    let share = gflops / ceiling.best;
    let text = format!(
        "train {} ({} parameters), {}, {sequences} x {length} tokens\n\
         ceiling   {:.0} GFLOP/s, a matrix product of 4096^3\n\
         step      {:.1} ms median, {:.1} best, spread {:.0}% of {}\n\
         speed     {:.0} tokens/s median, {:.0} best\n\
         share     {:.0} GFLOP/s, {:.0}% of the ceiling\n",
        case.name,
        units::count(parameters as f64),
        case.dtype,
        ceiling.best,
        times.median() * 1e3,
        times.best() * 1e3,
        times.spread() * 100.0,
        times.count(),
        tokens / times.median(),
        tokens / times.best(),
        gflops,
        share * 100.0,
    );
    let report = json!({
        "config": case.name,
        "dtype": case.dtype.name(),
        "moments": case.moments.name(),
        "parameters": parameters,
        "tokens": tokens,
        "ceiling_gflops": ceiling.best,
        "step": times.to_json(),
        "tokens_per_s": tokens / times.median(),
        "tokens_per_s_best": tokens / times.best(),
        "flops": work,
        "gflops": gflops,
        "share_of_ceiling": share,
    });
    (report, text)
}

/// Operations of the head alone, forward and backward, for the labelled tokens.
fn head_flops(config: &Config, labelled: usize) -> f64 {
    6.0 * (config.vocab * config.hidden) as f64 * labelled as f64
}

/// Times the step cut at the final norm: layers forward, head forward and backward, layers backward, optimizer.
fn profile<E: ModelElement>(case: &Case, ceiling: &Ceiling, batch: &Batch) -> Result<(Value, String)> {
    let graph = Arc::new(Graph::<E>::random(&case.place, case.config.clone(), false, 0)?);
    let parameters: Vec<Arc<dyn Trainable>> = graph.parameters().into_iter().map(|parameter| parameter as Arc<dyn Trainable>).collect();
    let count: usize = parameters.iter().map(|parameter| parameter.count()).sum();
    let mut optimizer = AdamW::new(parameters, settings(case))?;
    let mut phases: [Vec<f64>; 4] = Default::default();
    timed(case.seconds, || {
        let (forward, hidden) = clocked(|| {
            let hidden = graph.final_norm(&graph.forward(&batch.packed(), false, |_| {})?.hidden)?;
            case.place.synchronize().map(|()| hidden)
        });
        let hidden = hidden?;
        let (head, gradient) = clocked(|| {
            let cut = hidden.leaf();
            logprobs::cross_entropy(&cut, &graph.head, &batch.labels, batch.labelled() as f32, None)?.backward()?;
            let gradient = cut.gradient()?.expect("every hidden state has a way to the loss");
            case.place.synchronize()?;
            gradient.data().force()?.try_clone()
        });
        let gradient = gradient?;
        let (backward, done) = clocked(|| hidden.backward_from(gradient).and_then(|()| case.place.synchronize()));
        done?;
        let (update, done) = clocked(|| optimizer.step());
        done?;
        for (times, took) in phases.iter_mut().zip([forward, head, backward, update]) {
            times.push(took.as_secs_f64());
        }
        Ok::<Duration, _>(forward + head + backward + update)
    })?;
    // The first run warmed up.
    let times = phases.map(|times| Times::new(times[1..].to_vec()));
    let total: f64 = times.iter().map(Times::median).sum();
    let tokens = batch.tokens.len();
    let head_of_all = 2.0 * (case.config.vocab * case.config.hidden) as f64 * tokens as f64;
    let layers = case.sequences as f64 * flops::forward_flops(&case.config, case.sequence_tokens) - head_of_all;
    let work = [("forward", layers), ("head", head_flops(&case.config, batch.labelled())), ("backward", 2.0 * layers)];
    let mut report = json!({});
    let mut text = String::from("phase        median ms   of step   GFLOP/s   of ceiling\n");
    for ((name, work), times) in work.iter().zip(&times) {
        let gflops = work / times.median() / 1e9;
        let (of_step, share) = (times.median() / total, gflops / ceiling.best);
        text += &format!("{name:<12}{:>10.1}{:>9.0}%{gflops:>10.0}{:>12.0}%\n", times.median() * 1e3, of_step * 100.0, share * 100.0);
        report[*name] = json!({ "times": times.to_json(), "of_step": of_step, "gflops": gflops, "share_of_ceiling": share });
    }
    let (update, gb_per_s) = (&times[3], case.update_bytes() * count as f64 / times[3].median() / 1e9);
    text += &format!("{:<12}{:>10.1}{:>9.0}%{gb_per_s:>10.1} GB/s\n", "optimizer", update.median() * 1e3, update.median() / total * 100.0);
    report["optimizer"] = json!({ "times": update.to_json(), "of_step": update.median() / total, "gb_per_s": gb_per_s });
    Ok((report, text))
}
