//! scripts/pretrain.lua as a user runs it, with tiny models: it learns, whatever the kind of model, one seed gives one
//! result to the last byte, and what it saves is what it trained. Kernels and gradients are tested where they are computed.

use perilune::host::progress::Screen;
use perilune::host::vm::Vm;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Sizes of a model that takes about a millisecond a step.
const TINY: [&str; 18] = [
    "--hidden",
    "32",
    "--layers",
    "2",
    "--heads",
    "2",
    "--kv_heads",
    "1",
    "--intermediate",
    "64",
    "--seq_len",
    "64",
    "--warmup",
    "10",
    "--lr",
    "0.01",
    "--sample",
    "0",
];

fn pretrain(runs: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_perilune"))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["run", "--quiet", "--runs", runs.to_str().unwrap(), "scripts/pretrain.lua"])
        .args(args)
        .output()
        .unwrap()
}

/// A finished run.
struct Trained {
    _runs: tempfile::TempDir,
    folder: PathBuf,
    steps: Vec<Value>,
}

impl Trained {
    /// Runs the script on [`TINY`] for `steps` steps, and checks its metrics: one line a step, in order, all numbers finite.
    fn new(steps: usize, args: &[&str]) -> Self {
        // What this process computes has the bits of the runs.
        perilune::kernels::cpu::isa::expect_many_rows();
        let runs = tempfile::tempdir().unwrap();
        let count = steps.to_string();
        let output = pretrain(runs.path(), &[&TINY[..], &["--steps", &count], args].concat());
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        let folder = std::fs::read_dir(runs.path()).unwrap().next().unwrap().unwrap().path();
        let metrics = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
        let lines: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), steps, "{args:?}");
        for (index, line) in lines.iter().enumerate() {
            assert_eq!(line["step"], index, "{line}");
            for name in ["loss", "lr", "grad_norm"] {
                // JSON has no infinity and no NaN: what is not finite is not a number there.
                assert!(line[name].as_f64().is_some_and(f64::is_finite), "{name} in {line}");
            }
        }
        let timing = std::fs::read_to_string(folder.join("timing.jsonl")).unwrap();
        for (line, timing) in lines.iter().zip(timing.lines()) {
            let timing: Value = serde_json::from_str(timing).unwrap();
            assert_eq!((&timing["loop"], &timing["step"]), (&line["loop"], &line["step"]));
            assert!(timing["time"].is_f64() && timing["step_seconds"].is_f64() && timing["tokens_per_second"].is_f64(), "{timing}");
        }
        Self { _runs: runs, folder, steps: lines }
    }

    fn losses(&self) -> Vec<f64> {
        self.steps.iter().map(|line| line["loss"].as_f64().unwrap()).collect()
    }

    /// Mean loss on the held-out text after the last step, nats a token.
    fn validation_loss(&self) -> f64 {
        self.steps.last().unwrap()["validation_loss"].as_f64().unwrap()
    }

    fn model(&self) -> PathBuf {
        self.folder.join("model")
    }

    fn weights(&self) -> Vec<u8> {
        std::fs::read(self.model().join("model.safetensors")).unwrap()
    }

    /// Entropy of the text's bytes, each by itself, in nats: what a model reaches that knows frequencies and no context.
    fn byte_entropy(&self) -> f64 {
        let text = std::fs::read(self.folder.join("tales.txt")).unwrap();
        let mut counts = [0u32; 256];
        text.iter().for_each(|byte| counts[usize::from(*byte)] += 1);
        let shares = counts.iter().filter(|count| **count > 0).map(|count| f64::from(*count) / text.len() as f64);
        -shares.map(|share| share * share.ln()).sum::<f64>()
    }
}

#[test]
fn every_kind_of_model_learns_to_use_context() {
    let kinds: [&[&str]; 5] =
        [&["--dtype", "bf16"], &["--dtype", "f32"], &["--experts", "4"], &["--accumulate", "2"], &["--recompute", "--clip_norm", "0"]];
    for args in kinds {
        let trained = Trained::new(120, args);
        let (loss, entropy) = (trained.validation_loss(), trained.byte_entropy());
        assert!(loss < entropy - 0.3, "{args:?}: {loss} nats a byte, and {entropy} without context");
        // The untrained model guesses evenly among 259 tokens.
        assert!((trained.losses()[0] - 259f64.ln()).abs() < 0.2, "{args:?}: {}", trained.losses()[0]);
    }
}

#[test]
fn a_trained_tokenizer_serves_the_model_and_is_saved_with_it() {
    let trained = Trained::new(120, &["--tokenizer", "bpe:512"]);
    assert!((trained.losses()[0] - 512f64.ln()).abs() < 0.3, "{}", trained.losses()[0]);
    // Tokens are phrases here; about half of what even guessing costs shows that it learns.
    assert!(trained.validation_loss() < 2.5, "{}", trained.validation_loss());
    let folder = trained.model();
    let output = Command::new(env!("CARGO_BIN_EXE_perilune"))
        .args(["generate", folder.to_str().unwrap(), "--prompt", "One morning", "--max-tokens", "12", "--seed", "1", "--json"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["prompt_tokens"].as_u64().unwrap() < 11, "the prompt has 11 bytes and fewer tokens: {report}");
    assert!(!report["text"].as_str().unwrap().is_empty(), "{report}");
}

#[test]
fn the_saved_model_is_the_one_that_was_evaluated() {
    for args in [["--dtype", "bf16"], ["--dtype", "f32"], ["--experts", "4"]] {
        let trained = Trained::new(10, &args);
        // The same sums in the same order, so the very same number.
        let script = format!(
            r#"local engine = require "engine"
            local model = engine.model.load({folder:?}, {{ frozen = true }})
            local text = engine.data.text({text:?}):split("validation", 0.1)
            local data = text:tokenizer(model.tokenizer):pack {{ seq_len = 64, how = "windows" }}
            local sum, count = 0, 0
            for batch in function() return data:take(16) end do
              sum = sum - engine.tensor.no_grad(function() return model:logprobs(batch) end):sum():item()
              count = count + batch.supervised
            end
            assert(sum / count == {wanted:?}, sum / count)"#,
            folder = trained.model(),
            text = trained.folder.join("tales.txt"),
            wanted = trained.validation_loss(),
        );
        let path = trained.folder.join("evaluate.lua");
        std::fs::write(&path, script).unwrap();
        if let Err(error) = Vm::new(&path, Screen::new(true)).and_then(|vm| vm.load()) {
            panic!("{args:?}: saved {}, loaded {error}", trained.validation_loss());
        }
    }
}

#[test]
fn one_seed_gives_one_result_to_the_last_byte() {
    for args in [&["--dtype", "bf16"][..], &["--experts", "4", "--dtype", "f32", "--tokenizer", "bpe:300"]] {
        let first = Trained::new(20, args);
        let again = Trained::new(20, args);
        assert_eq!(first.losses(), again.losses(), "{args:?}");
        assert!(first.weights() == again.weights(), "{args:?}: weights differ between two runs");
        let other = Trained::new(20, &[args, &["--seed", "1"]].concat());
        assert!(first.weights() != other.weights(), "{args:?}: another seed should give other weights");
    }
}

#[test]
fn recomputing_layers_changes_no_bit() {
    for args in [&["--dtype", "bf16"][..], &["--dtype", "f32"], &["--experts", "4"]] {
        let stored = Trained::new(20, args);
        let recomputed = Trained::new(20, &[args, &["--recompute"]].concat());
        assert_eq!(stored.losses(), recomputed.losses(), "{args:?}");
        assert!(stored.weights() == recomputed.weights(), "{args:?}: weights differ");
    }
}

#[test]
fn accumulated_rows_are_as_good_as_rows_at_once() {
    let at_once = Trained::new(20, &["--dtype", "f32", "--rows", "4"]);
    let accumulated = Trained::new(20, &["--dtype", "f32", "--rows", "2", "--accumulate", "2"]);
    for (step, (a, b)) in at_once.losses().iter().zip(accumulated.losses()).enumerate() {
        // Sums in another order part by rounding, which twenty updates carry on.
        assert!((a - b).abs() < 1e-5, "step {step}: {a} and {b}");
    }
}

#[test]
fn what_cannot_be_trained_is_refused_before_training() {
    let folder = tempfile::tempdir().unwrap();
    let short = folder.path().join("short.txt");
    std::fs::write(&short, "abc").unwrap();
    let short = short.to_str().unwrap();
    let refused = |args: &[&str], parts: &[&str]| {
        // Many steps: if they ran, this test would take minutes.
        let output = pretrain(&folder.path().join("runs"), &[args, &["--steps", "1000000"]].concat());
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {message}");
        for part in parts {
            assert!(message.contains(part), "{args:?}: {part:?} is not in {message}");
        }
    };
    refused(&["--text", short], &["scripts/pretrain.lua:", "at least 2 tokens"]);
    refused(&["--text", "nowhere.txt"], &["nowhere.txt", "No such file"]);
    refused(&["--experts", "2", "--experts_per_token", "3"], &["`experts_per_token` should be at most experts, 2"]);
    refused(&["--tokenizer", "bpe:10"], &["`vocab_size` should be at least 259"]);
    refused(&["--preset", "8B"], &["0.5B", "\"8B\""]);
    refused(&["--heads", "5"], &["`hidden` should be a multiple of heads, 5, got 128"]);
    refused(&["--stepps", "3"], &["--stepps"]);
}
