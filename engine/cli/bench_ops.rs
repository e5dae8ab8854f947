//! `perilune bench ops`: every fused operation of a layer, forward and backward, at the shapes of the measured step.

use super::bench::{Batch, Case, Times, clocked, timed};
use super::bench_ceilings::{self, filled};
use crate::error::Result;
use crate::kernels::element::Dtype;
use crate::model::config::Config;
use crate::model::flops::attention_pairs;
use crate::model::graph::{Graph, Mlp};
use crate::model::presets::with_fields;
use crate::tensor::attention::{Documents, attention};
use crate::tensor::embedding::embedding;
use crate::tensor::linear::{linear, norm_linear, swiglu_linear};
use crate::tensor::rms_norm::rms_norm;
use crate::tensor::trainable::Trainable;
use crate::tensor::{ModelElement, Place, Tensor, logprobs};
use crate::train::optimizer::{AdamW, Settings};
use half::bf16;
use serde_json::{Value, json};
use std::sync::Arc;

/// What an operation's time is held against.
#[derive(Clone, Copy)]
enum Work {
    /// Floating-point operations of the forward pass; the backward pass has twice as many.
    Flops(f64),
    /// Bytes of the forward and of the backward pass.
    Bytes(f64, f64),
}

/// Report and text. Errors: those of the operations.
pub fn run(case: &Case) -> Result<(Value, String)> {
    let product = bench_ceilings::matrix_product(case.dtype, case.seconds)?.best;
    let copy = bench_ceilings::copy(case.seconds)?.best;
    let mut table = Table {
        text: format!(
            "{}, {}, {} tokens; ceilings {product:.0} GFLOP/s, {copy:.1} GB/s\n{:<36}{:>10}{:>10}{:>9}{:>20}{:>8}\n",
            case.name,
            case.dtype,
            case.sequences * case.sequence_tokens,
            "operation",
            "median ms",
            "best ms",
            "spread",
            "rate",
            "share"
        ),
        rows: Vec::new(),
        product,
        copy,
    };
    match case.dtype {
        Dtype::Bf16 => measure::<bf16>(case, &mut table)?,
        _ => measure::<f32>(case, &mut table)?,
    }
    let report = json!({
        "config": case.name,
        "dtype": case.dtype.name(),
        "ceiling_gflops": product,
        "ceiling_gb_per_s": copy,
        "operations": table.rows,
    });
    Ok((report, table.text))
}

struct Table {
    text: String,
    rows: Vec<Value>,
    product: f64,
    copy: f64,
}

impl Table {
    fn add(&mut self, name: &str, times: &Times, work: f64, is_flops: bool) {
        let (ceiling, unit) = if is_flops { (self.product, "GFLOP/s") } else { (self.copy, "GB/s") };
        let rate = work / times.median() / 1e9;
        let share = rate / ceiling;
        self.text += &format!(
            "{name:<36}{:>10.2}{:>10.2}{:>8.0}%{:>20}{:>7.0}%\n",
            times.median() * 1e3,
            times.best() * 1e3,
            times.spread() * 100.0,
            format!("{rate:.1} {unit}"),
            share * 100.0
        );
        self.rows.push(json!({ "name": name, "times": times.to_json(), "rate": rate, "unit": unit, "share_of_ceiling": share }));
    }
}

fn measure<E: ModelElement>(case: &Case, table: &mut Table) -> Result<()> {
    // One layer has every operation, and a large vocabulary is large enough once.
    let config = with_fields(&case.config, &[("layers".into(), json!(1))])?;
    let graph = Graph::<E>::random(&Place::Host, config.clone(), false, 0)?;
    let batch = Batch::random(config.vocab, case.sequences, case.sequence_tokens);
    let parameters: Vec<Arc<dyn Trainable>> = graph.parameters().into_iter().map(|parameter| parameter as Arc<dyn Trainable>).collect();
    let Config { vocab, hidden, intermediate, heads, kv_heads, head_dim, .. } = config;
    let (tokens, eps) = (batch.tokens.len(), config.rms_norm_eps as f32);
    let (query, width) = (heads * head_dim, (heads + 2 * kv_heads) * head_dim);
    let input = |columns: usize| Tensor::<E, 2>::new([tokens, columns], filled(tokens * columns));
    let product = |outputs: usize, inputs: usize| Work::Flops(2.0 * (tokens * outputs * inputs) as f64);
    let rows = |count: usize, columns: usize| (count * tokens * columns * size_of::<E>()) as f64;
    let layer = &graph.layers[0];
    let Mlp::Dense(mlp) = &layer.mlp else {
        return Err(crate::error::Error::Unsupported {
            what: "bench ops of a model with experts".into(),
            remedy: "use a dense configuration: tiny, small or q05x4".into(),
        });
    };
    let mut op = |name: &str, work: Work, x: &Tensor<E, 2>, run: &dyn Fn(&Tensor<E, 2>) -> Result<Tensor<E, 2>>| {
        both(case.seconds, table, name, work, &parameters, || {
            let x = x.leaf();
            let (forward, y) = clocked(|| run(&x));
            let y = y?;
            let gradient = filled(y.len());
            let (backward, done) = clocked(|| y.backward_with(gradient));
            done.map(|()| (forward, backward))
        })
    };
    let x = input(hidden)?;
    // Backward adds rows into an f32 gradient of the whole table, which must be cleared first.
    let embedding_backward = rows(1, hidden) + (2 * 4 * tokens * hidden + 4 * vocab * hidden) as f64;
    op("embedding", Work::Bytes(rows(2, hidden), embedding_backward), &x, &|_| embedding(&batch.tokens, &graph.embed))?;
    op("rms_norm", Work::Bytes(rows(2, hidden), rows(3, hidden)), &x, &|x| rms_norm(x, &graph.norm, eps))?;
    op("norm + qkv linear", product(width, hidden), &x, &|x| norm_linear(x, &layer.input_norm, eps, &layer.qkv, Some(&layer.qkv_bias)))?;
    let tables = Arc::new(graph.rope.tables::<E>(&batch.position_ids, &Place::Host)?);
    let documents = Arc::new(Documents::new(&batch.cu_seqlens, &[], &Place::Host));
    let pairs = case.sequences as f64 * attention_pairs(&config, case.sequence_tokens);
    op("rope + attention", Work::Flops(4.0 * query as f64 * pairs), &input(width)?, &|qkv| {
        attention(qkv, graph.heads(), &tables, &documents, None)
    })?;
    op("output linear + residual", product(hidden, query), &input(query)?, &|mixed| linear(mixed, &layer.o, None, Some(&x)))?;
    op("norm + gate, up linear", product(2 * intermediate, hidden), &x, &|x| norm_linear(x, &layer.post_norm, eps, &mlp.gate_up, None))?;
    op("swiglu + down linear", product(hidden, intermediate), &input(2 * intermediate)?, &|gate_up| {
        swiglu_linear(gate_up, &mlp.down, Some(&x))
    })?;
    // Deferred: the forward product runs inside the backward pass, so the two have one time.
    let head = timed(case.seconds, || {
        let x = x.leaf();
        let (took, done) = clocked(|| logprobs::cross_entropy(&x, &graph.head, &batch.labels, batch.labelled() as f32, None)?.backward());
        parameters.iter().for_each(|parameter| parameter.clear_gradient());
        done.map(|()| took)
    })?;
    table.add("head + cross entropy, both", &head, 6.0 * (vocab * hidden * batch.labelled()) as f64, true);
    adamw::<E>(case, table, &graph, &parameters)
}

/// Measures an operation's forward and backward pass and adds a row for each.
fn both(
    seconds: f64,
    table: &mut Table,
    name: &str,
    work: Work,
    parameters: &[Arc<dyn Trainable>],
    mut run: impl FnMut() -> Result<(std::time::Duration, std::time::Duration)>,
) -> Result<()> {
    let mut backwards = Vec::new();
    let forwards = timed(seconds, || {
        let (forward, backward) = run()?;
        backwards.push(backward.as_secs_f64());
        // Every run writes its gradients anew, as the first micro-batch of an update does.
        parameters.iter().for_each(|parameter| parameter.clear_gradient());
        Ok(forward)
    })?;
    let (forward, backward, is_flops) = match work {
        Work::Flops(flops) => (flops, 2.0 * flops, true),
        Work::Bytes(forward, backward) => (forward, backward, false),
    };
    table.add(name, &forwards, forward, is_flops);
    // The first run warmed up.
    table.add(&format!("{name}, backward"), &Times::new(backwards.split_off(1)), backward, is_flops);
    Ok(())
}

fn adamw<E: ModelElement>(case: &Case, table: &mut Table, graph: &Graph<E>, parameters: &[Arc<dyn Trainable>]) -> Result<()> {
    let count: usize = parameters.iter().map(|parameter| parameter.count()).sum();
    let mut optimizer = AdamW::new(parameters.to_vec(), Settings { clip_norm: None, moments: case.moments, ..Settings::default() })?;
    let times = timed(case.seconds, || {
        for parameter in graph.parameters() {
            parameter.accumulate(|gradient, _| gradient.fill(1e-3));
        }
        let (took, step) = clocked(|| optimizer.step());
        step.map(|_| took)
    })?;
    table.add("adamw + gradient norm", &times, case.update_bytes() * count as f64, false);
    Ok(())
}
