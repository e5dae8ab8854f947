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
  args = { experts = { 0, min = 0 }, device = "cuda" },
  run = function(run, args)
    local tokenizer = engine.tokenizer.bytes()
    local model = run:model("model", {
      preset = "tiny", vocab = 320, hidden = 32, layers = 2, heads = 2, kv_heads = 1, intermediate = 48,
      experts = args.experts > 0 and args.experts or nil, experts_per_token = args.experts > 0 and 2 or nil,
      moe_intermediate = args.experts > 0 and 24 or nil, shared_intermediate = args.experts > 0 and 48 or nil,
    }, { device = args.device, dtype = "bf16", tokenizer = tokenizer })
    local optim = run:optimizer("adamw", model, { lr = 1e-3 })
    local batch = engine.data.batch { tokenizer:encode "the moon goes round", tokenizer:encode "and round" }
    for step in run:loop("train", { steps = 8, checkpoint_every = 2 }) do
      local loss = model:cross_entropy(batch)
      loss:backward()
      local file = io.open "stop"
      if file and step.count == 6 then error "stopped as planned" end
      print(step.count, loss:item())
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
        let rest = |answer: String| answer.lines().skip_while(|line| !line.starts_with("5\t")).map(String::from).collect::<Vec<_>>();
        assert_eq!(rest(answer(&resumed)), rest(answer(&whole)), "{experts} experts: and says something else");
    }
}

/// Losses by step, as the script prints them.
fn losses(output: &Output) -> Vec<(usize, f64)> {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().filter_map(|line| line.split_once('\t')).map(|(step, loss)| (step.parse().unwrap(), loss.parse().unwrap())).collect()
}

#[test]
fn a_run_goes_on_where_its_device_is_another() {
    let Some(bench) = bench() else { return };
    if !bench.is_emulated() || !Path::new(env!("CARGO_BIN_EXE_perilune")).exists() {
        eprintln!("skipped: a GPU cannot be taken away");
        return;
    }
    // Without the emulator there is no GPU, and `auto` is the CPU.
    for (experts, gpu_first) in [("0", false), ("4", true)] {
        let folder = tempfile::tempdir().unwrap();
        let libraries = folder.path().join("libraries");
        assert!(build_libraries(&libraries), "the emulator was built before");
        std::fs::write(folder.path().join("survivor.lua"), SCRIPT).unwrap();
        let run = |gpu: bool, arguments: &[&str]| perilune(folder.path(), gpu.then_some(&libraries), arguments);
        let started = ["run", "survivor.lua", "--experts", experts, "--device", "auto"];
        let whole = run(false, &started);
        assert!(whole.status.success(), "{}", String::from_utf8_lossy(&whole.stderr));
        std::fs::write(folder.path().join("stop"), "").unwrap();
        let stopped = run(gpu_first, &started);
        let told = String::from_utf8_lossy(&stopped.stderr).into_owned();
        assert!(told.contains("stopped as planned") && told.contains("a model on cuda:0") == gpu_first, "{told}");
        std::fs::remove_file(folder.path().join("stop")).unwrap();
        let resumed = run(!gpu_first, &["resume", "latest"]);
        let told = String::from_utf8_lossy(&resumed.stderr).into_owned();
        assert!(resumed.status.success() && told.contains("a model on cuda:0") != gpu_first, "{told}");
        assert!(told.contains("agree but for rounding"), "{told}");
        let want = losses(&whole);
        assert_eq!(losses(&resumed).iter().map(|(step, _)| *step).collect::<Vec<_>>(), [5, 6, 7, 8], "it goes on at the checkpoint");
        for (step, loss) in losses(&resumed) {
            let near = want[step - 1].1;
            assert!((loss - near).abs() <= 2e-2 * near, "{experts} experts, step {step}: {loss}, and {near} in one go on the CPU");
        }
    }
}

const TENSORS: &str = r#"
local engine = require "engine"
local tensor = engine.tensor
return engine.workflow {
  name = "tensors",
  args = {},
  run = function()
    local x = tensor.new({ { 1, -2, 3 }, { 0.5, 0, -1 } }, { device = "cuda" })
    local w = tensor.randn({ 3, 2 }, { device = "cuda:0" }):requires_grad()
    assert(x.device == "cuda:0" and w.device == "cuda:0" and tensor.zeros({ 1 }).device == "cpu")
    local loss = ((x:matmul(w) * 2 + 1) ^ 2 - 0.5):log_softmax():mean()
    assert(loss.device == "cuda:0")
    loss:backward()
    local here = w:detach():to("cpu"):requires_grad()
    local want = ((x:to("cpu"):matmul(here) * 2 + 1) ^ 2 - 0.5):log_softmax():mean()
    want:backward()
    assert(math.abs(loss:item() - want:item()) < 1e-5, loss:item() .. " and " .. want:item())
    assert((w.grad:to("cpu") - here.grad):abs():max():item() < 1e-5, tostring(w.grad))
    local sorted, order = x:sort()
    assert(sorted.device == "cuda:0" and order.device == "cuda:0" and order:to_table()[1][1] == 1)
    assert(x:to("bf16").dtype == "bf16" and x:to("cpu").device == "cpu")
    print(x)
    for _, wrong in ipairs {
      function() return x + tensor.zeros({ 3 }) end,
      function() return x:matmul(tensor.zeros({ 3, 1 })) end,
      function() return x:to("tpu") end,
    } do
      print(select(2, pcall(wrong)))
    end
  end,
}
"#;

#[test]
fn a_script_computes_and_differentiates_on_the_device() {
    let Some(bench) = bench() else { return };
    if !Path::new(env!("CARGO_BIN_EXE_perilune")).exists() {
        eprintln!("skipped: the program is not beside its tests");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let libraries = folder.path().join("libraries");
    assert!(!bench.is_emulated() || build_libraries(&libraries), "the emulator was built before");
    std::fs::write(folder.path().join("tensors.lua"), TENSORS).unwrap();
    let output = perilune(folder.path(), bench.is_emulated().then_some(&libraries), &["run", "tensors.lua"]);
    let (said, told) = (String::from_utf8_lossy(&output.stdout).into_owned(), String::from_utf8_lossy(&output.stderr).into_owned());
    assert!(output.status.success(), "{told}");
    for part in [
        "Tensor f32 [2, 3] on cuda:0",
        "tensors.lua:24: add: `b` should be a tensor on cuda:0, where the other one lies, got one on cpu; move it with :to(\"cuda:0\")",
        "matmul: `b` should be",
        "tensors.lua:26: Tensor:to: `dtype_or_device` should be",
    ] {
        assert!(said.contains(part), "{part} in\n{said}");
    }
}
