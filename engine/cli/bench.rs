//! `perilune bench ceilings|train|ops|decode|durability`: what this machine can do at most, and what share of it the engine reaches. The
//! ceiling is measured in the same run as what is held against it, since a shared machine is not the same an hour later.

use super::output::print;
use super::{bench_ceilings, bench_decode, bench_durability, bench_ops, bench_train};
use crate::error::{Error, Result};
use crate::kernels::cpu::isa::{expect_many_rows, instructions};
use crate::kernels::cpu::threads::threads;
use crate::kernels::element::Dtype;
use crate::model::config::Config;
use crate::model::presets::preset;
use crate::model::{Packed, flops};
use crate::tensor::Place;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// Measure this machine's ceilings, a training step, every operation of one, generation, or what it costs that a run survives.
#[derive(clap::Args)]
pub struct BenchArgs {
    #[arg(value_enum)]
    what: What,
    /// Shape of the model: tiny (4M parameters), small (27M), q05x4 (196M), or any preset of `perilune params`.
    #[arg(long, default_value = "small")]
    config: String,
    /// f32 or bf16; with decode also int8.
    #[arg(long, default_value = "f32")]
    dtype: String,
    /// With train and decode: cpu, cuda (the first GPU), cuda:1 ..., or auto: cuda if there is a GPU.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// With train and ops: tokens of each sequence.
    #[arg(long, value_name = "N", default_value_t = 512)]
    sequence: usize,
    /// With train and ops: sequences of a step.
    #[arg(long, value_name = "N", default_value_t = 4)]
    sequences: usize,
    /// About how long to measure each figure [default: ceilings 3, train 20, ops 1, decode 30, durability 180].
    #[arg(long, value_name = "N")]
    seconds: Option<f64>,
    /// With decode: how many texts are decoded together, a figure each [default: 1,8, or none with --prefill].
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    batch: Vec<usize>,
    /// With decode: lengths of prompts, in tokens [default: 512,4096, or none with --batch].
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    prefill: Vec<usize>,
    /// With train and ops: in what AdamW keeps its moments.
    #[arg(long, default_value = "f32", value_parser = ["f32", "bf16"])]
    moments: String,
    /// With train: time the phases of the step too.
    #[arg(long)]
    profile: bool,
    /// Print how floating-point operations and bytes are counted.
    #[arg(long)]
    explain: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum What {
    /// Matrix product 4096^3 in f32 and bf16, and a copy of 256 MiB.
    Ceilings,
    /// A step of training: forward, backward, AdamW, on sequences of random tokens.
    Train,
    /// Each fused operation, forward and backward, at the shapes of that step.
    Ops,
    /// Decoding of several texts at once, and prefill of prompts.
    Decode,
    /// That step with and without checkpoints; the resume of a run with 10,000 recorded steps; the room of its records.
    Durability,
}

/// What to measure.
pub struct Case {
    pub name: String,
    pub config: Config,
    pub dtype: Dtype,
    /// Of the optimizer.
    pub moments: Dtype,
    pub place: Place,
    pub sequences: usize,
    pub sequence_tokens: usize,
    pub seconds: f64,
    pub profile: bool,
    /// Texts decoded together.
    pub batches: Vec<usize>,
    /// Tokens of prompts.
    pub prefills: Vec<usize>,
}

impl Case {
    /// Bytes that a step of AdamW reads and writes for a parameter, its norm included.
    pub fn update_bytes(&self) -> f64 {
        (16 + 4 * self.moments.size()) as f64
    }
}

/// Measures and prints. Errors: [`Error::Argument`] for an option that cannot be meant; those of the model.
pub fn bench(args: BenchArgs) -> Result<()> {
    if args.explain {
        print(&format!("{}\n\n{EXPLANATION}\n\n", flops::FORMULA))?;
    }
    let default = match args.what {
        What::Ceilings => 3.0,
        What::Train => 20.0,
        What::Ops => 1.0,
        What::Decode => 30.0,
        What::Durability => 180.0,
    };
    let seconds = args.seconds.unwrap_or(default);
    if !(seconds > 0.0 && seconds <= 3600.0) {
        return Err(Error::argument("bench", "--seconds", "a number above 0, up to 3600", seconds));
    }
    let dtype = match Dtype::parse(&args.dtype) {
        Some(dtype @ (Dtype::F32 | Dtype::Bf16)) => dtype,
        None if matches!(args.what, What::Decode) && args.dtype == "int8" => Dtype::I8,
        _ => return Err(Error::argument("bench", "--dtype", "f32 or bf16", format!("{:?}", args.dtype))),
    };
    for (option, numbers) in [("--batch", &args.batch), ("--prefill", &args.prefill)] {
        if numbers.contains(&0) {
            return Err(Error::argument("bench", option, "numbers above 0", "0"));
        }
    }
    let (batches, prefills) = if args.batch.is_empty() && args.prefill.is_empty() {
        (bench_decode::BATCHES.to_vec(), bench_decode::PREFILLS.to_vec())
    } else {
        (args.batch, args.prefill)
    };
    let config = preset(&args.config)?;
    let place = Place::named(&args.device)?;
    if place.device().is_some() && !matches!(args.what, What::Train | What::Decode) {
        return Err(Error::argument("bench", "--device", "cpu, but for `bench train` and `bench decode`", args.device));
    }
    for (arg, value, most) in [("--sequence", args.sequence, config.max_positions), ("--sequences", args.sequences, 4096)] {
        if !(1..=most).contains(&value) {
            return Err(Error::argument("bench", arg, format!("1 to {most}"), value));
        }
    }
    let (sequences, sequence_tokens, profile) = (args.sequences, args.sequence, args.profile);
    let moments = Dtype::parse(&args.moments).expect("the parser knows them");
    let case = Case { name: args.config, config, dtype, moments, place, sequences, sequence_tokens, seconds, profile, batches, prefills };
    if !matches!(args.what, What::Decode) {
        expect_many_rows();
    }
    let (mut report, text) = match args.what {
        What::Ceilings => bench_ceilings::run(&case)?,
        What::Train => bench_train::run(&case)?,
        What::Ops => bench_ops::run(&case)?,
        What::Decode => bench_decode::run(&case)?,
        What::Durability => bench_durability::run(&case)?,
    };
    if args.json {
        report["machine"] = json!({ "threads": threads(), "instructions": instructions(), "perilune": env!("CARGO_PKG_VERSION") });
        report["device"] = json!(case.place.device().map_or_else(|| case.place.to_string(), |device| device.name.clone()));
        return print(&format!("{report:#}\n"));
    }
    match case.place.device() {
        Some(device) => print(&format!("{} ({})\n{text}", device.name, case.place)),
        None => print(&format!("{} threads, {}\n{text}", threads(), instructions())),
    }
}

const EXPLANATION: &str = "\
A share is the figure's median over the best time of the ceiling: the matrix product of 4096^3 for arithmetic, a copy of
256 MiB (bytes read and written) for memory. Spread is the slowest time less the fastest, over the median.
Bytes of an operation are those it must read and write once, whatever the caches do. AdamW reads weight, gradient and two
moments and writes all but the gradient, after the gradient was read once for its norm: 32 bytes a parameter, 24 with
moments in bf16.";

/// Times of repeated runs, seconds, rising.
#[derive(Clone, Debug)]
pub struct Times(Vec<f64>);

impl Times {
    /// Of at least one time.
    pub fn new(mut seconds: Vec<f64>) -> Self {
        assert!(!seconds.is_empty(), "no times to speak of");
        seconds.sort_by(f64::total_cmp);
        Self(seconds)
    }

    pub fn best(&self) -> f64 {
        self.0[0]
    }

    pub fn median(&self) -> f64 {
        let middle = self.0.len() / 2;
        if self.0.len() % 2 == 1 { self.0[middle] } else { (self.0[middle - 1] + self.0[middle]) / 2.0 }
    }

    /// The slowest less the fastest, over the median.
    pub fn spread(&self) -> f64 {
        (self.0[self.0.len() - 1] - self.0[0]) / self.median()
    }

    pub fn count(&self) -> usize {
        self.0.len()
    }

    pub fn to_json(&self) -> Value {
        json!({ "median_ms": self.median() * 1e3, "best_ms": self.best() * 1e3, "spread": self.spread(), "runs": self.count() })
    }
}

/// Runs once to warm up, then for `seconds`, at least 3 and at most 200 times. `run` returns what it took itself.
///
/// Errors: those of `run`.
pub fn timed(seconds: f64, mut run: impl FnMut() -> Result<Duration>) -> Result<Times> {
    run()?;
    let start = Instant::now();
    let mut times = Vec::new();
    while times.len() < 3 || (times.len() < 200 && start.elapsed().as_secs_f64() < seconds) {
        times.push(run()?.as_secs_f64());
    }
    Ok(Times::new(times))
}

/// The time that `body` takes, and what it gives.
pub fn clocked<T>(body: impl FnOnce() -> T) -> (Duration, T) {
    let start = Instant::now();
    let value = body();
    (start.elapsed(), value)
}

/// The tokens of the measured step, as documents laid end to end, and the label of each: the next one, none for the last.
pub struct Batch {
    pub tokens: Vec<i32>,
    pub position_ids: Vec<i32>,
    pub cu_seqlens: Vec<u32>,
    pub labels: Vec<i32>,
}

impl Batch {
    /// Random tokens below `vocab`; the speed does not depend on which.
    pub fn random(vocab: usize, sequences: usize, sequence_tokens: usize) -> Self {
        let stream = crate::kernels::random::Stream::new(0, "bench");
        let count = sequences * sequence_tokens;
        let tokens: Vec<i32> = (0..count as u64).map(|counter| stream.below(counter, vocab as u64) as i32).collect();
        let is_last = |index: usize| (index + 1).is_multiple_of(sequence_tokens);
        let labels = (0..count).map(|index| if is_last(index) { -100 } else { tokens[index + 1] }).collect();
        Self {
            labels,
            tokens,
            position_ids: (0..count).map(|index| (index % sequence_tokens) as i32).collect(),
            cu_seqlens: (0..=sequences).map(|sequence| (sequence * sequence_tokens) as u32).collect(),
        }
    }

    pub fn packed(&self) -> Packed<'_> {
        Packed { tokens: &self.tokens, position_ids: &self.position_ids, cu_seqlens: &self.cu_seqlens, prefixes: &[] }
    }

    /// Tokens with a label.
    pub fn labelled(&self) -> usize {
        self.labels.iter().filter(|label| **label >= 0).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_summed_up_as_stated() {
        let times = Times::new(vec![0.4, 0.1, 0.2]);
        assert_eq!((times.best(), times.median(), times.count()), (0.1, 0.2, 3));
        assert!((times.spread() - 1.5).abs() < 1e-12);
        assert!((Times::new(vec![0.4, 0.1, 0.2, 0.3]).median() - 0.25).abs() < 1e-12);
        let mut runs = 0;
        let times = timed(1e-9, || {
            runs += 1;
            Ok(Duration::from_millis(runs))
        });
        assert_eq!((times.unwrap().best(), runs), (0.002, 4), "the first run warms up");
    }

    #[test]
    fn a_batch_is_four_documents_labelled_by_their_next_tokens() {
        let batch = Batch::random(4096, 4, 512);
        batch.packed().check("bench", 4096).unwrap();
        assert_eq!((batch.tokens.len(), batch.labelled(), batch.labels[511]), (2048, 2044, -100));
        assert_eq!((batch.labels[0], batch.labels[512], batch.position_ids[512]), (batch.tokens[1], batch.tokens[513], 0));
    }
}
