//! Whole workflows of post-training on the device, through the program: what they log is what they log on the CPU.

use crate::run::{Workplace, errors};
use serde_json::Value;
use std::path::Path;

/// The numbers that a run logged, by the loop's name, the step and their own.
fn logged(run: &Path) -> Vec<(String, f64)> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let mut numbers = Vec::new();
    for line in text.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let place = format!("{} {}", line["loop"].as_str().unwrap_or(""), line["step"]);
        let known = |name: &str| ["loss", "margin", "ratio", "mean", "slow", "other", "merged", "base", "accuracy"].contains(&name);
        let found = line.as_object().unwrap().iter().filter(|(name, _)| known(name));
        numbers.extend(found.filter_map(|(name, value)| Some((format!("{place} {name}"), value.as_f64()?))));
    }
    numbers
}

/// Runs a script of the project's on the CPU and on the device, and compares what both log: that of loops named `until` and after not,
/// whose texts may differ.
fn logs_what_the_cpu_logs(place: &Workplace, script: &str, arguments: &[&str], until: &str) {
    let [want, got] = ["cpu", "cuda"].map(|device| {
        let runs = format!("runs-{device}");
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(script);
        let words = [&["run", "--quiet", "--runs", &runs, path.to_str().unwrap(), "--device", device], arguments].concat();
        let output = place.run(&words);
        assert!(output.status.success(), "{script} {arguments:?} on {device}: {}", errors(&output));
        let folder = std::fs::read_dir(place.path(&runs)).unwrap().map(|entry| entry.unwrap().path()).find(|path| path.is_dir()).unwrap();
        let numbers = logged(&folder);
        std::fs::remove_dir_all(place.path(&runs)).unwrap();
        numbers
    });
    assert!(!want.is_empty() && want.len() == got.len(), "{script}: {} and {} numbers", want.len(), got.len());
    for ((name, want), (_, got)) in want.iter().zip(&got).filter(|((name, _), _)| until.is_empty() || !name.starts_with(until)) {
        println!("{script} {arguments:?}: {name}: {want} and {got}");
        // f32 on both; each update carries the rounding of the former ones on, and Adam divides small gradients by their size.
        assert!((got - want).abs() <= 2e-3 * (1.0 + want.abs()), "{script} {arguments:?}, {name}: {got}, and {want} on the CPU");
    }
}

#[test]
fn post_training_logs_what_it_logs_on_the_cpu() {
    let Some(place) = Workplace::new() else { return };
    logs_what_the_cpu_logs(&place, "tests/fixtures/post_training.lua", &["--steps", "2"], "grpo");
}

/// Averages, merges, bases that change, and weights that a script sets.
#[test]
fn adapters_average_and_merge_as_on_the_cpu() {
    let Some(place) = Workplace::new() else { return };
    let lines: String = (0..40).map(|line| format!("line {line}: the moon goes round the earth, and round\n")).collect();
    std::fs::write(place.path("text.txt"), lines).unwrap();
    logs_what_the_cpu_logs(&place, "tests/fixtures/adapters.lua", &["--text", "text.txt", "--method", "none"], "");
    logs_what_the_cpu_logs(
        &place,
        "tests/fixtures/adapters.lua",
        &["--text", "text.txt", "--method", "none", "--experts", "3", "--dora"],
        "",
    );
}

/// The first records of a file of JSON lines, as a file of their own.
fn few(place: &Workplace, name: &str, from: &str, count: usize) -> String {
    let text: String = from.lines().take(count).map(|line| format!("{line}\n")).collect();
    std::fs::write(place.path(name), text).unwrap();
    name.to_owned()
}

/// The scripts of `scripts/`, each with an adapter, on the model that the first workflow leaves.
#[test]
fn the_scripts_log_what_they_log_on_the_cpu() {
    let Some(place) = Workplace::new() else { return };
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/post_training.lua");
    let output = place.run(&["run", "--quiet", "--runs", "start", fixture.to_str().unwrap(), "--steps", "1"]);
    assert!(output.status.success(), "{}", errors(&output));
    let run = std::fs::read_dir(place.path("start")).unwrap().map(|entry| entry.unwrap().path()).find(|path| path.is_dir()).unwrap();
    let [chats, pairs, prompts] =
        ["sft", "pairs", "prompts"].map(|name| std::fs::read_to_string(run.join(format!("{name}.jsonl"))).unwrap());
    let (chats, pairs, prompts) =
        (few(&place, "chats.jsonl", &chats, 6), few(&place, "pairs.jsonl", &pairs, 4), few(&place, "prompts.jsonl", &prompts, 4));
    let base = run.join("sft").to_str().unwrap().to_owned();
    let dora = ["--lora", "2", "--targets", "all-linear,lm_head", "--dora", "--lr", "0.001"];
    let words = |words: &[&str], more: &[&str]| [words, more].concat().into_iter().map(str::to_owned).collect::<Vec<_>>();
    let cases = [
        (
            "sft",
            words(&["--model", &base, "--data", &chats, "--epochs", "1", "--seq_len", "96", "--rows", "1", "--validation", "0"], &dora),
        ),
        ("dpo", words(&["--model", &base, "--data", &pairs, "--pairs", "2"], &dora)),
        (
            "reward",
            words(
                &["--model", &base, "--data", &pairs, "--pairs", "2", "--validation", "0"],
                &["--lora", "2", "--targets", "q_proj,down_proj,embed_tokens", "--lr", "0.001"],
            ),
        ),
        (
            "distill",
            words(&["--student", &base, "--teacher", &base, "--data", &chats, "--steps", "2", "--rows", "1", "--seq_len", "96"], &dora),
        ),
        (
            "grpo",
            words(
                &[
                    "--model",
                    &base,
                    "--prompts",
                    &prompts,
                    "--steps",
                    "1",
                    "--group",
                    "2",
                    "--questions",
                    "1",
                    "--max_tokens",
                    "4",
                    "--reward",
                    "exact",
                    "--beta",
                    "0.1",
                ],
                &dora,
            ),
        ),
    ];
    for (name, arguments) in cases {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        // What is sampled may differ where two tokens are nearly equal.
        logs_what_the_cpu_logs(&place, &format!("scripts/{name}.lua"), &arguments, if name == "grpo" { "grpo" } else { "" });
    }
}
