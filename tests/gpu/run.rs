//! Whole runs through the program itself: one that stopped and was resumed ends with the bits of one that did not. The program
//! finds the emulator as it would find NVIDIA's driver, or a GPU.

use crate::{bench, build_libraries};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Checkpoints fall on steps 2, 4 and 6; the run stops inside step 6 if it is told to.
const SCRIPT: &str = r#"
local engine = require "engine"
return engine.workflow {
  name = "survivor",
  args = { experts = { 0, min = 0 } },
  run = function(run, args)
    local tokenizer = engine.tokenizer.bytes()
    local model = run:model("model", {
      preset = "tiny", vocab = 320, hidden = 32, layers = 2, heads = 2, kv_heads = 1, intermediate = 48,
      experts = args.experts > 0 and args.experts or nil, experts_per_token = args.experts > 0 and 2 or nil,
      moe_intermediate = args.experts > 0 and 24 or nil, shared_intermediate = args.experts > 0 and 48 or nil,
    }, { device = "cuda", dtype = "bf16", tokenizer = tokenizer })
    local optim = run:optimizer("adamw", model, { lr = 1e-3 })
    local batch = engine.data.batch { tokenizer:encode "the moon goes round", tokenizer:encode "and round" }
    for step in run:loop("train", { steps = 8, checkpoint_every = 2 }) do
      local loss = model:cross_entropy(batch)
      loss:backward()
      local file = io.open "stop"
      if file and step.count == 6 then error "stopped as planned" end
      step:log { loss = loss:item(), grad_norm = optim:step() }
    end
    local rollouts = model:generate({ "the" }, { n = 2, max_tokens = 3, temperature = 1.0 })
    print(table.concat(rollouts.texts, "|"))
    model:save("final")
  end,
}
"#;

/// The program, in a folder of its own, on the device of the tests.
fn perilune(folder: &Path, libraries: Option<&PathBuf>, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_perilune"));
    command.current_dir(folder).args(arguments).env("PERILUNE_CACHE", folder.join("cache"));
    if let Some(libraries) = libraries {
        command.env("LD_LIBRARY_PATH", libraries).env("LD_PRELOAD", libraries.join("libcuda.so.1"));
    }
    command.output().unwrap()
}

#[test]
fn a_run_that_stopped_goes_on_to_the_bit() {
    let Some(bench) = bench() else { return };
    if !Path::new(env!("CARGO_BIN_EXE_perilune")).exists() {
        eprintln!("skipped: the program is not beside its tests");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let libraries = folder.path().join("libraries");
    assert!(!bench.is_emulated() || build_libraries(&libraries), "the emulator was built before");
    let run = |arguments: &[&str]| perilune(folder.path(), bench.is_emulated().then_some(&libraries), arguments);
    std::fs::write(folder.path().join("survivor.lua"), SCRIPT).unwrap();
    // The emulator takes its time: there the one that has everything must do.
    let shapes: &[&str] = if bench.is_emulated() { &["4"] } else { &["0", "4"] };
    for experts in shapes.iter().copied() {
        let weights = || std::fs::read(folder.path().join("final/model.safetensors")).unwrap();
        let whole = run(&["run", "survivor.lua", "--experts", experts]);
        let answer = |output: &Output| String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(whole.status.success(), "{}", String::from_utf8_lossy(&whole.stderr));
        let want = weights();
        std::fs::remove_dir_all(folder.path().join("final")).unwrap();
        std::fs::write(folder.path().join("stop"), "").unwrap();
        let stopped = run(&["run", "survivor.lua", "--experts", experts]);
        assert!(String::from_utf8_lossy(&stopped.stderr).contains("stopped as planned"), "{}", String::from_utf8_lossy(&stopped.stderr));
        std::fs::remove_file(folder.path().join("stop")).unwrap();
        let resumed = run(&["resume", "latest"]);
        assert!(resumed.status.success(), "{}", String::from_utf8_lossy(&resumed.stderr));
        assert!(weights() == want, "{experts} experts: a resumed run has other bits");
        assert_eq!(answer(&resumed), answer(&whole), "{experts} experts: and says something else");
    }
}
