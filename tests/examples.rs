//! Every lesson in examples/, run as a reader would run it, keeps what its header promises. What the engine computes is
//! tested elsewhere; here a lesson that fails, or shows something else than its prose says, is found.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

/// A lesson, arguments that keep it short, and what it must print.
type Lesson = (&'static str, &'static [&'static str], fn(&str));

const LESSONS: [Lesson; 18] = [
    ("01_hello", &["--name", "Ada", "--count", "2", "--mood", "loud", "--farewell", "Bye"], |text| {
        for part in ["2 of 2: HELLO, ADA!", "\"letters\":22", "Bye", "seed 0"] {
            assert!(text.contains(part), "{part}");
        }
    }),
    ("02_tensors", &[], |text| {
        assert!(text.contains("at 3 is 8"));
        // The points were made with slope 2, offset -1, and noise of variance 0.01.
        assert!((number_after(text, ": slope ") - 2.0).abs() < 0.1);
        assert!((number_after(text, ", offset ") + 1.0).abs() < 0.1);
        assert!(number_after(text, "squared error ") < 0.02);
    }),
    ("03_classifier", &[], |text| {
        assert!(number_after(text, "always the same answer: ") < 70.0);
        assert!(number_after(text, "the network: ") > 90.0);
    }),
    ("04_model", &[], |text| {
        assert!(text.contains("11 tokens in 2 documents, 9 with a label"));
        assert!((number_after(text, "sum to ") - 1.0).abs() < 1e-3);
        assert_eq!(number_after(text, "loss "), number_after(text, "by cross_entropy: "));
    }),
    ("05_tokens", &[], |text| {
        assert!(text.contains("66 108 195 169") && text.contains("36 facts, 12 rhymes"));
        assert!(number_after(text, "34 bytes, ") < 20.0);
        for how in ["concat ", "best_fit ", "windows "] {
            assert!(number_after(text, how) > 0.0);
        }
    }),
    ("06_training_loop", &["--steps", "80"], |text| {
        // Rounding alone parts the two gradients.
        assert!((number_after(text, "four rows at once: ") - number_after(text, "two and two rows: ")).abs() < 1e-4);
        assert!(number_after(text, "step  80  loss ") < number_after(text, "step   1  loss ") - 2.0);
    }),
    ("07_experts", &["--steps", "100"], |text| {
        let (free, balanced) = (number_after(text, "free: load-balancing loss "), number_after(text, "balanced: load-balancing loss "));
        assert!(balanced < free && balanced < 1.2, "{balanced} and {free}");
    }),
    ("08_checkpoints", &["--steps", "40"], |text| {
        assert_eq!(number_after(text, "difference of logits: "), 0.0);
        assert!(number_after(text, "when saved, ") < number_after(text, "\nloss "));
        assert!(number_after(text, "differ by at most ") < 0.2);
    }),
    ("09_evaluation", &["--steps", "100"], |text| {
        // Bytes of English with equal chances would have a perplexity of about 60.
        assert!(number_after(text, "perplexity ") < 10.0);
        assert_eq!(text.matches("One morning").count(), 3);
    }),
    ("10_modules", &[], |text| {
        assert!(text.contains("the same table: true"));
        assert!(text.contains("10_modules.lua:") && text.contains("got 1.5"));
    }),
    ("11_steps", &[], |text| {
        assert!(text.contains("in attempt 3") && text.contains("the sum of four squares: 30"));
        assert!((1.0..=100.0).contains(&number_after(text, "drawn ")));
    }),
    ("12_resuming", &["--steps", "60"], |text| {
        assert!(number_after(text, "lowest loss ") < 4.0);
        assert!(text.contains("\n60 lines of metrics"), "each step is logged once");
    }),
    ("13_reloading", &["--steps", "3000"], |text| {
        assert!((number_after(text, "slope ") - 3.0).abs() < 0.4 && (number_after(text, "offset ") + 1.0).abs() < 0.3);
    }),
    ("14_forks", &["--steps", "12", "--every", "6"], |text| assert_eq!(number_after(text, "rate "), 2e-3)),
    ("15_conversations", &[], |text| {
        assert!(text.contains("<|im_start|>assistant\nHello.<|im_end|>\n"));
        assert!(text.contains("all\tHello.<|im_end|>  and  No.<|im_end|>Yes.<|im_end|>"));
        assert!(text.contains("last\tHello.<|im_end|>  and  Yes.<|im_end|>"));
        let call =
            "<tool_call>~{\"name\": \"weather\", \"arguments\": {\"city\": \"Oslo\"}}~</tool_call><|im_end|>Nearly: sleet.<|im_end|>";
        assert!(text.contains(call));
        assert!(text.contains("2 documents in 1 rows, 9 of ") && text.contains(", 1 too long"));
    }),
    ("16_preferences", &[], |text| {
        assert!(text.contains("12 documents, 72 tokens of them answers"));
        assert_eq!(number_after(text, "first loss "), number_after(text, "log 2 is "));
        assert_eq!(number_after(text, "accuracy "), 1.0);
        assert!(number_after(text, "margin ") > 0.3);
    }),
    ("17_rewards", &[], |text| {
        assert!(text.contains("\\boxed{\\frac{1}{2}}      1") && text.contains("I do not know            0"));
        // The right answer, without the form, politely, too long; a wrong one.
        let scores: Vec<&str> = text.lines().filter(|line| line.starts_with(' ')).map(|line| line[..6].trim()).collect();
        assert_eq!(scores, ["1.000", "0.000", "1.100", "0.500", "0.000"]);
        assert_eq!(number_after(text, "mean correct: "), 0.6);
    }),
    ("18_sandbox", &[], |text| {
        for (name, status) in [("kind", "ok"), ("broken", "error"), ("endless", "timeout"), ("greedy", "memory"), ("loud", "killed")] {
            assert!(text.contains(&format!("{name:<8} {status} ")), "{name} is {status}");
        }
        assert!(text.contains("nil\tnil\tnil") && number_after(text, "sum: ") == 42.0);
        assert_eq!(number_after(text, "program 1 passes "), 1.0);
        assert_eq!(number_after(text, "program 2 passes "), 0.33);
        assert_eq!(number_after(text, "program 3 passes "), 0.0);
    }),
];

/// A run of a lesson in a folder of runs, by other words than `perilune run`.
fn perilune(runs: &Path, words: &[&str]) -> (bool, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_perilune"));
    command.current_dir(env!("CARGO_MANIFEST_DIR")).args(words).args(["--runs", runs.to_str().unwrap()]);
    let output = command.output().unwrap();
    (output.status.success(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
}

#[test]
fn lessons_can_be_resumed_and_forked_as_they_say() {
    let runs = tempfile::tempdir().unwrap();
    let check = |words: &[&str], parts: &[&str]| {
        let (ok, text) = perilune(runs.path(), words);
        let missing: Vec<_> = parts.iter().filter(|part| !text.contains(**part)).collect();
        assert!(missing.is_empty(), "{words:?} should say {missing:?}:\n{text}");
        (ok, text)
    };
    let stop = runs.path().join("stop");
    std::fs::write(&stop, "").unwrap();
    let (ok, stopped) = check(&["run", "examples/11_steps.lua", "--stop", stop.to_str().unwrap()], &["remove it, then go on with"]);
    assert!(!ok);
    std::fs::remove_file(stop).unwrap();
    let (ok, resumed) = check(&["resume", "latest"], &["skip  2 recorded steps", "the sum of four squares: 30"]);
    assert!(ok && number_after(&stopped, "drawn ") == number_after(&resumed, "drawn "), "a recorded step draws nothing anew");

    assert!(check(&["run", "examples/14_forks.lua", "--steps", "12", "--every", "6"], &[]).0);
    let fork = ["runs", "fork", "latest", "--at", "train=6", "--arg", "lr=1e-2"];
    assert!(check(&fork, &["run   loop train from step 6", "rate 0.01"]).0);
}

/// The number behind the first `label` in `text`, spaces between them left out.
fn number_after(text: &str, label: &str) -> f64 {
    let at = text.find(label).unwrap_or_else(|| panic!("no {label:?} in:\n{text}")) + label.len();
    let digits = text[at..].trim_start().split(|c: char| !(c.is_ascii_digit() || "+-.e".contains(c))).next().unwrap_or_default();
    digits.trim_end_matches('.').parse().unwrap_or_else(|_| panic!("no number behind {label:?} in:\n{text}"))
}

/// Whether this kernel can hold programs as the lesson on the sandbox wants.
fn has_sandbox() -> bool {
    let output = Command::new(env!("CARGO_BIN_EXE_perilune")).args(["doctor", "--json"]).output().unwrap();
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    report["sandbox"]["holds"] == true
}

#[test]
fn every_lesson_does_what_it_says() {
    let runs = tempfile::tempdir().unwrap();
    for (name, args, check) in LESSONS {
        if name == "18_sandbox" && !has_sandbox() {
            eprintln!("skipped: {name}: this system cannot hold programs; `perilune doctor` says why");
            continue;
        }
        let script = format!("examples/{name}.lua");
        let output = Command::new(env!("CARGO_BIN_EXE_perilune"))
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .args(["run", "--quiet", "--runs", runs.path().to_str().unwrap(), &script])
            .args(args)
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
        if let Err(panic) = std::panic::catch_unwind(|| check(&text)) {
            eprintln!("{script} printed:\n{text}");
            std::panic::resume_unwind(panic);
        }
    }
}

#[test]
fn every_file_is_a_lesson_or_a_module_of_one() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let mut files: BTreeSet<String> = BTreeSet::new();
    for entry in std::fs::read_dir(&folder).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        files.extend(name.strip_suffix(".lua").map(str::to_owned));
    }
    let read = |name: &str| std::fs::read_to_string(folder.join(format!("{name}.lua"))).unwrap();
    let lessons: BTreeSet<String> = LESSONS.iter().map(|(name, ..)| (*name).to_owned()).collect();
    for name in files.difference(&lessons) {
        let wanted = format!("require \"{name}\"");
        let required = lessons.iter().any(|lesson| read(lesson).contains(&wanted));
        assert!(required, "examples/{name}.lua is neither in the list of lessons nor required by one");
    }
    for name in &lessons {
        assert!(files.contains(name), "examples/{name}.lua is listed but missing");
        let text = read(name);
        let head = format!("--- Lesson {}: ", name[..2].trim_start_matches('0'));
        assert!(text.starts_with(&head), "examples/{name}.lua should begin with {head:?}");
        assert!(text.contains(&format!("perilune run examples/{name}.lua")), "examples/{name}.lua should say how to run it");
        let lines = text.lines().count();
        assert!((15..=80).contains(&lines), "examples/{name}.lua has {lines} lines; a lesson is read in one go");
    }
}
