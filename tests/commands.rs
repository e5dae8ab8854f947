//! The program's commands as a user starts them: what they print, and how they fail. The work behind them is tested where
//! it lives.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn perilune(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_perilune")).args(words).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// What a command prints, if it ends well.
fn printed(words: &[&str]) -> String {
    let output = perilune(words);
    assert!(output.status.success(), "{words:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// The one line that a command fails with.
fn refusal(words: &[&str]) -> String {
    let output = perilune(words);
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{words:?}: {message}");
    assert!(output.stdout.is_empty() && !message.contains("panicked"), "{message}");
    message
}

/// A golden checkpoint with the bytes tokenizer: a folder that generates text.
fn model_folder() -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let golden: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/dense_tied");
    for name in ["config.json", "generation_config.json", "model.safetensors"] {
        std::fs::copy(golden.join(name), folder.path().join(name)).unwrap();
    }
    perilune::data::tokenizer::Tokenizer::bytes_with_chat().save(folder.path(), None).unwrap();
    let path = folder.path().to_str().unwrap().to_owned();
    (folder, path)
}

#[test]
fn a_reader_who_goes_away_is_no_error_and_a_full_disk_is_one() {
    let (_folder, model) = model_folder();
    for words in [&["doctor"][..], &["params", &model], &["params", "7B", "--json"]] {
        let shell = |line: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", line, "sh", env!("CARGO_BIN_EXE_perilune")]).args(words).output().unwrap()
        };
        // The reader has closed its end before the first line comes.
        let gone = shell("(sleep 0.2; \"$@\"; echo \"ended with $?\" >&2) | true");
        assert_eq!(text(&gone.stderr), "ended with 0\n", "{words:?}");
        let full = shell("\"$@\" > /dev/full");
        assert_eq!(full.status.code(), Some(1), "{words:?}");
        assert!(text(&full.stderr).starts_with("error: standard output: cannot write to"), "{}", text(&full.stderr));
    }
}

#[test]
fn a_script_prints_bytes_that_are_no_text() {
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("s.lua");
    std::fs::write(&script, r#"print("caf\xe9", 1)"#).unwrap();
    assert_eq!(printed(&["run", script.to_str().unwrap()]), "caf\u{fffd}\t1\n");
}

#[test]
fn doctor_reports_in_text_and_json() {
    let report: serde_json::Value = serde_json::from_str(&printed(&["doctor", "--json"])).unwrap();
    for name in ["perilune", "rustc", "cpu", "instructions", "threads", "memory", "disk", "sandbox", "gpu"] {
        assert!(report[name].is_object(), "{name} in {report}");
    }
    assert!(report["cpu"]["cores"].as_u64().unwrap() >= 1);
    assert!(report["sandbox"]["holds"] == true || report["sandbox"]["remedy"].is_string(), "{report}");
    let lines = printed(&["doctor"]);
    assert!(lines.lines().any(|line| line.starts_with("gpu ")), "{lines}");
}

#[test]
fn a_chat_answers_line_by_line_and_knows_its_commands() {
    let (_folder, path) = model_folder();
    let chat_bytes = |lines: &[u8]| {
        let mut child = Command::new(env!("CARGO_BIN_EXE_perilune"))
            .args(["chat", &path, "--max-tokens", "5", "--system", "Be brief."])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), lines).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        text(&output.stdout)
    };
    let chat = |lines: &str| chat_bytes(lines.as_bytes());
    let once = chat("Hello\n");
    assert!(!once.trim().is_empty(), "an answer");
    // The same questions, the same answers; what was taken back is as if it had not been.
    assert_eq!(once, chat("Hello\n"));
    assert!(chat("/undo\n").contains("nothing to take back"));
    assert!(chat("/help\n/exit\nHello\n").ends_with("Ctrl-D)\n"));
    assert!(chat("/rest\n").contains("no command /rest"));
    // A line that is no text does not end the conversation.
    assert!(chat_bytes(b"\xff\n/help\n").starts_with("this line is no UTF-8 text"));
    assert!(refusal(&["chat", "no_such_folder"]).contains("no_such_folder"));
}

#[test]
fn output_that_cannot_be_written_is_an_error_that_says_so() {
    let (folder, path) = model_folder();
    let script = folder.path().join("s.lua");
    std::fs::write(&script, "return require('engine').workflow { name = 'w', run = function() end }").unwrap();
    let script = script.to_str().unwrap();
    for words in [&["doctor"][..], &["doctor", "--json"], &["params", "7B"], &["run", script, "--help"], &["params", &path, "--json"]] {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_perilune")).args(words).stdout(full).output().unwrap();
        let said = text(&output.stderr);
        assert!(output.status.code() == Some(1) && said.contains("standard output: cannot write"), "{words:?}: {said}");
    }
}

#[test]
fn a_text_cut_within_a_character_is_printed() {
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("s.lua");
    std::fs::write(&script, "print(('caf\u{e9}'):sub(1, 4), 1)").unwrap();
    assert_eq!(printed(&["run", script.to_str().unwrap()]), "caf\u{FFFD}\t1\n");
}

#[test]
fn params_knows_presets_and_folders() {
    let report: serde_json::Value = serde_json::from_str(&printed(&["params", "7B", "--json"])).unwrap();
    assert_eq!(report["parameters"]["total"], 7_615_616_512u64);
    let (_folder, path) = model_folder();
    assert!(printed(&["params", &path, "--tensors"]).contains("model.embed_tokens.weight"));
    assert!(refusal(&["params", "8B"]).contains("0.5B"));
}

#[test]
fn generate_prints_text_and_repeats_it_by_seed() {
    let (_folder, path) = model_folder();
    let words = ["generate", &path, "--prompt", "Once", "--max-tokens", "12", "--seed", "3"];
    let first = printed(&words);
    assert_eq!(first, printed(&words));
    let report: serde_json::Value = serde_json::from_str(&printed(&[&words[..], &["--json"]].concat())).unwrap();
    assert_eq!(format!("{}\n", report["text"].as_str().unwrap()), first);
    assert!(report["generated_tokens"].as_u64().unwrap() <= 12 && report["prompt_tokens"] == 4, "{report}");
    // The rate is that of the tokens behind the first, which comes with the prompt.
    let [prompt, all, rate] = ["prompt_seconds", "seconds", "tokens_per_s"].map(|key| report[key].as_f64().unwrap());
    let after = report["generated_tokens"].as_f64().unwrap() - 1.0;
    assert!(prompt > 0.0 && prompt < all && (rate * (all - prompt) / after - 1.0).abs() < 1e-6, "{report}");
    let chat: serde_json::Value =
        serde_json::from_str(&printed(&["generate", &path, "--prompt", "Hi", "--chat", "--max-tokens", "3", "--json"])).unwrap();
    assert!(chat["prompt_tokens"].as_u64().unwrap() > 10, "{chat}");
}

#[test]
fn what_cannot_be_done_is_one_line_that_says_why() {
    let (_folder, path) = model_folder();
    assert!(refusal(&["generate", "missing-folder", "--prompt", "x"]).contains("missing-folder"));
    assert!(refusal(&["generate", &path, "--prompt", ""]).contains("--prompt"));
    assert!(refusal(&["generate", &path, "--prompt", "x", "--top-p", "2"]).contains("top_p"));
    assert!(refusal(&["generate", &path, "--prompt", "x", "--dtype", "i8"]).contains("f32, bf16 or int8"));
    assert!(refusal(&["generate", &path, "--prompt", "x", "--stop", ""]).contains("stop"));
    assert!(refusal(&["bench", "train", "--config", "huge"]).contains("tiny"));
    assert!(refusal(&["bench", "ops", "--seconds", "0"]).contains("--seconds"));
    assert!(refusal(&["bench", "train", "--dtype", "f16"]).contains("bf16"));
    let report = printed(&["bench", "decode", "--config", "tiny", "--seconds", "0.1"]);
    assert!(["batch 1", "batch 8", "prefill 512", "tokens/s"].iter().all(|part| report.contains(part)), "{report}");
}

#[test]
fn a_bench_measures_and_explains() {
    let report = printed(&["bench", "train", "--config", "tiny", "--seconds", "0.1", "--explain", "--profile"]);
    for word in ["FLOPs of a training step", "tokens/s", "of the ceiling", "forward", "head", "backward", "optimizer"] {
        assert!(report.contains(word), "{word} in {report}");
    }
}
