//! SFT, DPO and GRPO as runs: killed anywhere, also in the middle of generation, and resumed, they end to the bit as a run that
//! was not; a reward that is edited while GRPO runs is a generation, recorded; every script of `scripts/` does its work.

#[path = "fixtures/runs.rs"]
mod runs;

use runs::{Place, Random, succeed};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const SCRIPT: &str = "post_training.lua";
const KINDS: [&[&str]; 4] = [&[], &["--dtype", "bf16"], &["--experts", "4"], &["--experts", "4", "--dtype", "bf16"]];

#[test]
fn a_run_killed_at_any_boundary_ends_as_if_it_had_not_been() {
    for args in KINDS {
        let boundaries = Place::new().kill_at_each_boundary(SCRIPT, args);
        // Three loops of four steps.
        assert!(boundaries >= 12, "only {boundaries} boundaries");
    }
}

#[test]
fn a_run_killed_at_random_instants_ends_as_if_it_had_not_been() {
    let (mut random, mut kills) = (Random::from(11), 0);
    for args in [KINDS[0], KINDS[3]] {
        let place = Place::new();
        let started = Instant::now();
        let whole = place.whole(SCRIPT, args);
        let took = started.elapsed();
        for round in 0..6 {
            let name = format!("round-{round}");
            // Killed again and again, from anywhere in what is left, until it comes through.
            for _ in 0..4 {
                let mut child = place.start_or_resume(SCRIPT, &name, args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
                std::thread::sleep(took.mul_f64(random.below(1000) as f64 / 1000.0));
                if child.try_wait().unwrap().is_some() {
                    break;
                }
                child.kill().unwrap();
                child.wait().unwrap();
                kills += 1;
            }
            match place.run_of(&name) {
                Some(_) => place.finish(&name),
                None => drop(succeed(&mut place.start(SCRIPT, &name, args))),
            }
            whole.check(&place.folder(&name), &format!("{kills} kills, {args:?}"));
        }
    }
    println!("{kills} kills at random instants, all ends equal to the bit");
    assert!(kills > 6, "only {kills} kills");
}

#[test]
fn a_reward_that_is_edited_while_grpo_runs_is_a_generation() {
    let place = Place::new();
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(SCRIPT)).unwrap();
    let script = place.path().join("edited.lua");
    std::fs::write(&script, &text).unwrap();
    let mut child = place
        .command(&["run", "--watch", "--seed", "5", "--runs", "edited", "edited.lua", "--steps", "40", "--wait", "0.05"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let metrics =
        |place: &Place| place.run_of("edited").and_then(|run| std::fs::read_to_string(run.join("metrics.jsonl")).ok()).unwrap_or_default();
    let begun = Instant::now();
    while metrics(&place).matches("\"loop\":\"grpo\"").count() < 3 {
        assert!(begun.elapsed() < Duration::from_secs(120), "GRPO does not begin: {}", metrics(&place));
        std::thread::sleep(Duration::from_millis(20));
    }
    let edited = text.replace("gsub(\"%a\", \"\")) / 10", "gsub(\"%s\", \"\")) / 5");
    assert_ne!(edited, text);
    std::fs::write(&script, edited).unwrap();
    assert!(child.wait().unwrap().success());
    let shown = succeed(&mut place.command(&["runs", "show", "latest", "--runs", "edited"])).stdout;
    let shown = String::from_utf8_lossy(&shown).into_owned();
    assert!(shown.contains("generation 1") && shown.contains("grpo"), "{shown}");
}

/// Runs a script of the project to its end and gives what it printed, and its folder.
fn script(place: &Place, name: &str, args: &[&str]) -> (String, std::path::PathBuf) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts").join(format!("{name}.lua"));
    let mut words = vec!["run", "--quiet", "--runs", name, path.to_str().unwrap()];
    words.extend(args);
    let output = succeed(&mut place.command(&words));
    (String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned(), place.folder(name))
}

fn lines(path: &Path) -> usize {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).lines().count()
}

#[test]
fn the_scripts_hand_their_results_to_each_other() {
    let place = Place::new();
    let start = succeed(&mut place.start(SCRIPT, "start", &["--steps", "2"]));
    drop(start);
    let run = place.folder("start");
    let (base, chats, pairs, prompts) = (run.join("sft"), run.join("sft.jsonl"), run.join("pairs.jsonl"), run.join("prompts.jsonl"));
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let (base, chats, pairs, prompts) = (text(&base), text(&chats), text(&pairs), text(&prompts));
    let model = |run: &Path| text(&run.join("model"));

    let short = ["--epochs", "1", "--seq_len", "192", "--rows", "2", "--accumulate", "2", "--validation", "0.2"];
    let (said, sft) = script(&place, "sft", &[&["--model", &base, "--data", &chats, "--lora", "2"][..], &short].concat());
    assert!(sft.join("adapter/adapter_config.json").is_file());
    assert!(said.contains("loss of what was held out"), "{said}");
    let config = std::fs::read_to_string(sft.join("model/generation_config.json")).unwrap();
    assert!(config.contains("258") && config.contains("256"), "ends of turn and text: {config}");
    let (said, reward) =
        script(&place, "reward", &["--model", &base, "--data", &pairs, "--pairs", "4", "--validation", "0.2", "--max_tokens", "200"]);
    assert!(said.contains("held-out pairs"), "{said}");
    let (_, dpo) =
        script(&place, "dpo", &["--model", &model(&sft), "--data", &pairs, "--base", &base, "--pairs", "4", "--accumulate", "2"]);
    for (loss, max_tokens) in [("grpo", "8"), ("dr_grpo", "1"), ("gspo", "8"), ("cispo", "8")] {
        let sampling = ["--max_tokens", max_tokens, "--questions", "2"];
        let args = [
            "--model",
            &model(&dpo),
            "--prompts",
            &prompts,
            "--steps",
            "2",
            "--group",
            "2",
            "--updates",
            "2",
            "--beta",
            "0.1",
            "--loss",
            loss,
            "--reward",
            "exact",
        ];
        std::fs::remove_dir_all(place.path().join("grpo")).ok();
        let (_, grpo) = script(&place, "grpo", &[&args[..], &sampling].concat());
        assert_eq!(lines(&grpo.join("metrics.jsonl")), 2, "{loss}");
    }
    let grpo = place.folder("grpo");
    let args =
        ["--model", &model(&grpo), "--prompts", &prompts, "--judge", &model(&reward), "--reward", "exact", "--n", "2", "--max_tokens", "8"];
    let (_, rejection) = script(&place, "rejection", &args);
    assert_eq!(lines(&rejection.join("chats.jsonl")), 40);
    // Prompts that are lists of messages.
    let listed = place.path().join("listed.jsonl");
    std::fs::write(&listed, "{\"prompt\": [{\"role\": \"user\", \"content\": \"1+1\"}], \"answer\": 2}\n".repeat(4)).unwrap();
    std::fs::remove_dir_all(place.path().join("rejection")).unwrap();
    let args = ["--model", &model(&grpo), "--prompts", &text(&listed), "--judge", &model(&reward), "--n", "2", "--max_tokens", "8"];
    let (_, rejection) = script(&place, "rejection", &args);
    let kept = std::fs::read_to_string(rejection.join("chats.jsonl")).unwrap();
    assert!(kept.lines().count() == 4 && kept.contains("\"content\":\""), "{kept}");
    for how in ["data", "samples"] {
        let data = if how == "data" { &chats } else { &prompts };
        let args = [
            "--teacher",
            &model(&grpo),
            "--student",
            &base,
            "--data",
            data,
            "--how",
            how,
            "--steps",
            "2",
            "--max_tokens",
            "8",
            "--seq_len",
            "192",
        ];
        let adapter: &[&str] = if how == "data" { &[] } else { &["--lora", "2", "--targets", "q_proj,lm_head", "--dora"] };
        std::fs::remove_dir_all(place.path().join("distill")).ok();
        let (_, distill) = script(&place, "distill", &[&args[..], adapter].concat());
        assert_eq!(distill.join("adapter/adapter_model.safetensors").is_file(), how == "samples");
    }
    for how in ["linear", "ties", "dare"] {
        std::fs::remove_dir_all(place.path().join("merge")).ok();
        script(&place, "merge", &["--base", &base, "--models", &format!("{},{}", model(&dpo), model(&grpo)), "--how", how]);
    }
    std::fs::remove_dir_all(place.path().join("merge")).ok();
    let (_, merged) = script(&place, "merge", &["--base", &base, "--adapter", &text(&sft.join("adapter"))]);
    let args = [
        "--model",
        &model(&merged),
        "--text",
        &chats,
        "--problems",
        &prompts,
        "--n",
        "2",
        "--temperature",
        "1",
        "--max_tokens",
        "8",
        "--by",
        "kind",
        "--reward",
        "exact",
    ];
    let (said, eval) = script(&place, "eval", &args);
    assert!(said.contains("problems_accuracy") && lines(&eval.join("problems.jsonl")) == 40, "{said}");

    // Few records, of which chance holds none out.
    let few = place.path().join("few.jsonl");
    for (name, data) in [("sft", &chats), ("reward", &pairs)] {
        let first = std::fs::read_to_string(data).unwrap().lines().next().unwrap().to_owned();
        std::fs::write(&few, first + "\n").unwrap();
        std::fs::remove_dir_all(place.path().join(name)).unwrap();
        let (said, run) = script(&place, name, &["--model", &base, "--data", &text(&few)]);
        assert!(run.join("model/config.json").is_file() && !said.contains("held"), "{name}: {said}");
    }

    // What cannot be meant is said before anything long begins.
    let bare = place.path().join("bare.jsonl");
    std::fs::write(&bare, "{\"prompt\": \"1+1\"}\n").unwrap();
    let bare = text(&bare);
    for (name, args, says) in [
        ("sft", &["--model", &base, "--data", &chats, "--dora"][..], "go with --lora RANK"),
        ("sft", &["--model", &base, "--data", &chats, "--seq_len", "8"], "longer than --seq_len"),
        ("grpo", &["--model", &base, "--prompts", &bare], "has no `answer` to compare with, only prompt"),
        ("rejection", &["--model", &base, "--prompts", &bare], "has no `answer` to compare with, only prompt"),
        ("rejection", &["--model", &base, "--prompts", &bare, "--judge", &base], "a model that scores"),
        ("eval", &["--model", &base, "--problems", &bare], "has no `answer` to compare with, only prompt"),
    ] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts").join(format!("{name}.lua"));
        let output = place.command(&["run", "--quiet", "--runs", "wrong", path.to_str().unwrap()]).args(args).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(says), "{name}: {said}");
    }
}

#[test]
fn the_quickstart_goes_through_all_stages_and_reports() {
    let place = Place::new();
    let few = ["--documents", "300", "--chats", "300", "--pretrain", "6", "--sft", "30", "--dpo", "2", "--grpo", "2", "--held_out", "10"];
    let args = [&few[..], &["--hidden", "32", "--layers", "1", "--digits", "1", "--questions", "2", "--group", "2", "--max_tokens", "12"]]
        .concat();
    let (said, run) = script(&place, "quickstart", &args);
    for stage in ["pretrained", "SFT", "DPO", "GRPO"] {
        assert!(said.contains(&format!("{stage}: ")), "{said}");
    }
    let report = std::fs::read_to_string(run.join("report.html")).unwrap();
    assert!(report.contains("<svg") && !report.contains("http://") && !report.contains("https://"), "self-contained");
    let chat = Command::new(env!("CARGO_BIN_EXE_perilune"))
        .args(["chat", run.join("model").to_str().unwrap(), "--max-tokens", "4"])
        .stdin(Stdio::null())
        .status();
    assert!(chat.unwrap().success());
}
