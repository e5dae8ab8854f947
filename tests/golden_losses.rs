//! The losses of the standard library against TRL's numbers: values, gradients and statistics. The cases go through a Lua
//! script (tests/fixtures/golden_losses.lua) as a user's would; here they are written down and compared.

mod fixtures;

use fixtures::{Golden, check};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;

/// What the script gives for each case, by name.
fn run(cases: &[Value]) -> Vec<Value> {
    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("cases.jsonl"), folder.path().join("results.jsonl"));
    std::fs::write(&input, cases.iter().map(|case| format!("{case}\n")).collect::<String>()).unwrap();
    let run = Command::new(env!("CARGO_BIN_EXE_perilune"))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["run", "--quiet", "--runs", folder.path().join("runs").to_str().unwrap(), "tests/fixtures/golden_losses.lua"])
        .args(["--input", input.to_str().unwrap(), "--output", output.to_str().unwrap()])
        .output()
        .unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let text = std::fs::read_to_string(output).unwrap();
    let results: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(results.len(), cases.len());
    results
}

fn floats(result: &Value, name: &str) -> Vec<f32> {
    let values = result[name].as_array().unwrap_or_else(|| panic!("no {name} in {result}"));
    values.iter().map(|value| value.as_f64().unwrap() as f32).collect()
}

/// Chosen and rejected in turn.
fn interleaved<T: Clone>(chosen: &[T], rejected: &[T]) -> Vec<T> {
    chosen.iter().zip(rejected).flat_map(|(chosen, rejected)| [chosen.clone(), rejected.clone()]).collect()
}

/// The chosen and the rejected of values that come in turn.
fn parted(values: &[f32]) -> [Vec<f32>; 2] {
    [0, 1].map(|offset| values.iter().skip(offset).step_by(2).copied().collect())
}

fn merged(family: &str, name: &str, case: &Value) -> Value {
    let mut merged = case.clone();
    merged["family"] = family.into();
    merged["name"] = name.into();
    merged
}

fn cases(golden: &Golden) -> Vec<(String, Value)> {
    let cases = golden.meta["params"]["cases"].as_object().unwrap();
    cases.iter().map(|(name, case)| (name.clone(), case.clone())).collect()
}

#[test]
fn dpo_and_its_relatives_are_those_of_trl() {
    let golden = Golden::open("dpo");
    let pair = |of: &str| interleaved(&golden.floats(&format!("{of}_chosen_logps")), &golden.floats(&format!("{of}_rejected_logps")));
    let named = cases(&golden);
    assert_eq!(named.len(), 8);
    let lines: Vec<Value> = named
        .iter()
        .map(|(name, case)| {
            let mut line = merged("dpo", name, case);
            (line["policy"], line["reference"]) = (json!(pair("policy")), json!(pair("ref")));
            line
        })
        .collect();
    for ((name, _), result) in named.iter().zip(run(&lines)) {
        let array = |what: &str| format!("{name}.{what}");
        golden.check(&array("losses"), &floats(&result, "losses"));
        golden.check(&array("loss"), &floats(&result, "loss"));
        let [chosen, rejected] = parted(&floats(&result, "gradient"));
        golden.check(&array("grad_chosen"), &chosen);
        golden.check(&array("grad_rejected"), &rejected);
        let [chosen, rejected] = parted(&floats(&result, "rewards"));
        golden.check(&array("chosen_rewards"), &chosen);
        golden.check(&array("rejected_rewards"), &rejected);
        let wins = chosen.iter().zip(&rejected).filter(|(chosen, rejected)| chosen > rejected).count();
        check("accuracy", &floats(&result, "accuracy"), &[wins as f32 / chosen.len() as f32], 1e-6, 0.0);
        let margin = chosen.iter().zip(&rejected).map(|(chosen, rejected)| chosen - rejected).sum::<f32>() / chosen.len() as f32;
        check("margin", &floats(&result, "margin"), &[margin], 1e-6, 1e-5);
    }
}

/// Documents of `ids` whose tokens with `mask` are learned, in the order of `rows`.
fn documents(golden: &Golden, ids: &str, attention: &str, mask: &str, rows: &[usize]) -> Vec<Value> {
    let (ids, attention, mask) = (golden.integer_rows(ids), golden.integer_rows(attention), golden.integer_rows(mask));
    let document = |row: &usize| {
        let real =
            |values: &[i32]| values.iter().zip(&attention[*row]).filter(|(_, real)| **real == 1).map(|(v, _)| *v).collect::<Vec<_>>();
        json!({ "tokens": real(&ids[*row]), "mask": real(&mask[*row]) })
    };
    rows.iter().map(document).collect()
}

#[test]
fn dpo_trains_a_policy_against_a_reference_as_trl_does() {
    let golden = Golden::open("dpo");
    let documents = documents(&golden, "e2e.input_ids", "e2e.attention_mask", "e2e.completion_mask", &[0, 3, 1, 4, 2, 5]);
    let gradients = golden.names("e2e.grad.");
    assert_eq!(gradients.len(), 3);
    let case = json!({ "family": "dpo_models", "documents": documents, "gradients": gradients,
        "policy": "tests/golden/dense_tied", "reference": "tests/golden/dense_sharded" });
    let result = &run(&[case])[0];
    for (array, name) in [("policy_logps", "sums"), ("ref_logps", "reference_sums")] {
        golden.check(&format!("e2e.{array}"), &parted(&floats(result, name)).concat());
    }
    golden.check("e2e.losses", &floats(result, "losses"));
    let [chosen, rejected] = parted(&floats(result, "rewards"));
    golden.check("e2e.chosen_rewards", &chosen);
    golden.check("e2e.rejected_rewards", &rejected);
    golden.check("e2e.grad_norm", &floats(result, "norm"));
    for name in gradients {
        golden.check(&format!("e2e.grad.{name}"), &floats(result, &format!("grad.{name}")));
    }
}

#[test]
fn grpo_and_its_relatives_are_those_of_trl() {
    let golden = Golden::open("grpo");
    let named = cases(&golden);
    assert_eq!(named.len(), 24);
    let lines: Vec<Value> = named
        .iter()
        .map(|(name, case)| {
            let mut line = merged("grpo", name, case);
            line["logprobs"] = json!(golden.floats("per_token_logps"));
            line["reference"] = json!(golden.floats("ref_per_token_logps"));
            line["mask"] = json!(golden.integers(case["mask"].as_str().unwrap()));
            line["advantage"] = json!(golden.floats("advantages"));
            if case["old_logps"] == "old_per_token_logps" {
                line["old"] = json!(golden.floats("old_per_token_logps"));
            }
            line
        })
        .collect();
    for ((name, case), result) in named.iter().zip(run(&lines)) {
        golden.check(&format!("{name}.loss"), &floats(&result, "loss"));
        golden.check(&format!("{name}.grad"), &floats(&result, "gradient"));
        let metric = |key: &str| case["metrics"][key].as_f64().unwrap_or(0.0) as f32;
        for (ours, theirs) in [("kl", "kl"), ("clip_low", "clip_ratio/low_mean"), ("clip_high", "clip_ratio/high_mean")] {
            // f32 sums of a hundred shares.
            check(&format!("{name} {theirs}"), &floats(&result, ours), &[metric(theirs)], 1e-6, 1e-5);
        }
    }
}

#[test]
fn advantages_are_those_of_trl() {
    let golden = Golden::open("grpo");
    let group = golden.meta["params"]["num_generations"].clone();
    let result = &run(&[json!({ "family": "advantages", "rewards": golden.floats("rewards"), "group": group })])[0];
    for scale in ["group", "batch", "none"] {
        golden.check(&format!("advantages.{scale}"), &floats(result, scale));
    }
}

#[test]
fn the_loss_of_a_reward_model_is_that_of_trl() {
    let golden = Golden::open("reward_bt");
    let rewards = interleaved(&golden.floats("rewards_chosen"), &golden.floats("rewards_rejected"));
    let margin = golden.floats("margin");
    let named = [("plain", false, false), ("margin", true, false), ("centered0.01", false, true), ("centered0.01_margin", true, true)];
    let lines = named.map(|(_, with_margin, centred)| {
        let mut line = json!({ "family": "reward", "rewards": rewards });
        if with_margin {
            line["margin"] = json!(margin);
        }
        if centred {
            line["center"] = json!(0.01);
        }
        line
    });
    for ((name, ..), result) in named.iter().zip(run(&lines)) {
        golden.check(&format!("{name}.loss"), &floats(&result, "loss"));
        let [chosen, rejected] = parted(&floats(&result, "gradient"));
        golden.check(&format!("{name}.grad_chosen"), &chosen);
        golden.check(&format!("{name}.grad_rejected"), &rejected);
    }
}

#[test]
fn fine_tuning_on_conversations_gives_the_losses_and_gradients_of_transformers() {
    let golden = Golden::open("sft");
    let chats: Value =
        serde_json::from_slice(&std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer/chats.json")).unwrap())
            .unwrap();
    let find = |name: &Value| {
        let chat = |chat: &&Value| chat["name"] == *name && chat["add_generation_prompt"] == false;
        chats["chats"].as_array().unwrap().iter().find(chat).unwrap()["messages"].clone()
    };
    let conversations: Vec<Value> = golden.meta["params"]["chats"].as_array().unwrap().iter().map(find).collect();
    assert_eq!(conversations.len(), 3);
    let model = "tests/golden/dense_untied";
    // TRL also learns the newlines around an answer, which we do not: there the masks are the fixture's.
    let attention = golden.integer_rows("attention_mask");
    let marked = |labels: &str| {
        let (ids, labels) = (golden.integer_rows("input_ids"), golden.integer_rows(labels));
        let row = |row: usize| {
            let real: Vec<usize> = (0..ids[row].len()).filter(|at| attention[row][*at] == 1).collect();
            let tokens: Vec<i32> = real.iter().map(|at| ids[row][*at]).collect();
            json!({ "tokens": tokens, "mask": real.iter().map(|at| i32::from(labels[row][*at] != -100)).collect::<Vec<_>>() })
        };
        (0..3).map(row).collect::<Vec<_>>()
    };
    let cases = [
        json!({ "family": "sft", "model": model, "documents": marked("labels_trl") }),
        json!({ "family": "sft", "model": model, "tokenizer": "tests/golden/tokenizer", "conversations": conversations }),
    ];
    for (masks, result) in ["trl", "content"].iter().zip(run(&cases)) {
        let array = |what: &str| format!("{what}_{masks}");
        golden.check(&array("loss"), &floats(&result, "loss"));
        golden.check(&array("loss_sum_per_chat"), &floats(&result, "sums"));
        golden.check(&array("grad_norm"), &floats(&result, "norm"));
        golden.check(&format!("grad_{masks}.model.norm.weight"), &floats(&result, "gradient"));
        let counts: Vec<f32> = golden.integers(&array("target_tokens")).iter().map(|count| *count as f32).collect();
        assert_eq!(floats(&result, "lengths"), counts, "{masks}");
        let ids = golden.real_rows("input_ids", "attention_mask");
        assert_eq!(floats(&result, "tokens"), ids.concat().iter().map(|id| *id as f32).collect::<Vec<_>>());
        let labels = fixtures::Batch::new(&ids).shift(&golden.real_rows(&array("labels"), "attention_mask").concat());
        assert_eq!(floats(&result, "labels"), labels.iter().map(|label| *label as f32).collect::<Vec<_>>(), "{masks}");
    }
}
