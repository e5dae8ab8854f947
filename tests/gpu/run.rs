//! Whole runs through the program itself: one that stopped, or lost its device, and was resumed ends with the bits of one that did not. The program
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

/// A folder with the script, where the program runs on the device of the tests.
pub struct Workplace {
    folder: tempfile::TempDir,
    is_emulated: bool,
}

impl Workplace {
    /// None where there is no device, or no program beside its tests.
    pub fn new() -> Option<Self> {
        let is_emulated = bench()?.is_emulated();
        if !Path::new(env!("CARGO_BIN_EXE_perilune")).exists() {
            eprintln!("skipped: the program is not beside its tests");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        assert!(!is_emulated || build_libraries(&folder.path().join("libraries")), "the emulator was built before");
        std::fs::write(folder.path().join("survivor.lua"), SCRIPT).unwrap();
        Some(Self { folder, is_emulated })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_perilune"));
        command.current_dir(self.folder.path()).args(arguments).env("PERILUNE_CACHE", self.path("cache"));
        command
    }

    /// Runs the program with the device.
    pub fn run(&self, arguments: &[&str]) -> Output {
        self.run_losing("", arguments)
    }

    /// Runs the program with the emulated device, which is lost as `loses` says (tests/emulator/driver.cpp).
    fn run_losing(&self, loses: &str, arguments: &[&str]) -> Output {
        let mut command = self.command(arguments);
        if self.is_emulated {
            command.env("LD_LIBRARY_PATH", self.path("libraries")).env("LD_PRELOAD", self.path("libraries/libcuda.so.1"));
        }
        if !loses.is_empty() {
            command.env("EMULATOR_LOSES", loses);
        }
        command.output().unwrap()
    }

    /// What a run of `experts` experts that nothing stops leaves and says.
    fn whole(&self, experts: &str) -> Finished {
        self.finished(&self.run(&["run", "survivor.lua", "--experts", experts]))
    }

    /// Runs the script until it stops inside its sixth step.
    fn stopped(&self, run: impl Fn() -> Output) -> String {
        std::fs::write(self.path("stop"), "").unwrap();
        let told = errors(&run());
        assert!(told.contains("stopped as planned"), "{told}");
        std::fs::remove_file(self.path("stop")).unwrap();
        told
    }

    /// What a run that has ended well leaves, which is gone then, and says.
    fn finished(&self, output: &Output) -> Finished {
        assert!(output.status.success(), "{}", errors(output));
        let weights = std::fs::read(self.path("final/model.safetensors")).unwrap();
        std::fs::remove_dir_all(self.path("final")).unwrap();
        Finished { weights, said: String::from_utf8_lossy(&output.stdout).into_owned() }
    }
}

/// The weights that a run leaves, and what its script printed.
struct Finished {
    weights: Vec<u8>,
    said: String,
}

impl Finished {
    /// Whether a resumed run ended as this one, all of it.
    fn is_end_of(&self, resumed: &Self) -> bool {
        self.weights == resumed.weights && !resumed.said.is_empty() && self.said.ends_with(&resumed.said)
    }

    /// Losses by step.
    fn losses(&self) -> Vec<(usize, f64)> {
        self.said
            .lines()
            .filter_map(|line| line.split_once('\t'))
            .map(|(step, loss)| (step.parse().unwrap(), loss.parse().unwrap()))
            .collect()
    }
}

pub fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_run_that_stopped_goes_on_to_the_bit() {
    let Some(place) = Workplace::new() else { return };
    // The emulator takes its time: there the one that has everything must do.
    let shapes: &[&str] = if place.is_emulated { &["4"] } else { &["0", "4"] };
    for experts in shapes.iter().copied() {
        let want = place.whole(experts);
        place.stopped(|| place.run(&["run", "survivor.lua", "--experts", experts]));
        let resumed = place.finished(&place.run(&["resume", "latest"]));
        assert!(want.is_end_of(&resumed), "{experts} experts: a resumed run is another one");
    }
}

/// While weights are made, in kernels of a step, while a checkpoint is copied, when a gradient's norm is fetched, and late in the run.
const LOSSES: [&str; 6] = ["copy:20", "launch:150", "launch:600", "copy:95", "copy:122", "copy:230"];

#[test]
fn a_run_that_lost_its_device_goes_on_to_the_bit() {
    let Some(place) = Workplace::new().filter(|place| place.is_emulated) else { return };
    let want = place.whole("0");
    for loses in LOSSES {
        let lost = place.run_losing(loses, &["run", "survivor.lua", "--experts", "0"]);
        let told = errors(&lost);
        assert!(!lost.status.success() && !told.contains("panicked"), "{loses}: {told}");
        assert!(told.contains("cuda:0 (CUDA emulator) was lost") && told.contains("perilune resume"), "{loses}: {told}");
        let resumed = place.finished(&place.run(&["resume", "latest"]));
        assert!(want.is_end_of(&resumed), "{loses}: a resumed run is another one");
    }
}

#[test]
fn a_run_goes_on_where_its_device_is_another() {
    let Some(place) = Workplace::new().filter(|place| place.is_emulated) else {
        eprintln!("skipped: a GPU cannot be taken away");
        return;
    };
    // Without the emulator there is no GPU, and `auto` is the CPU.
    let run = |gpu: bool, arguments: &[&str]| if gpu { place.run(arguments) } else { place.command(arguments).output().unwrap() };
    for (experts, gpu_first) in [("0", false), ("4", true)] {
        let started = ["run", "survivor.lua", "--experts", experts, "--device", "auto"];
        let whole = place.finished(&run(false, &started));
        let told = place.stopped(|| run(gpu_first, &started));
        assert_eq!(told.contains("a model on cuda:0"), gpu_first, "{told}");
        let resumed = run(!gpu_first, &["resume", "latest"]);
        let told = errors(&resumed);
        assert!(told.contains("a model on cuda:0") != gpu_first && told.contains("agree but for rounding"), "{told}");
        check_end(&place.finished(&resumed), &whole, experts, &[5, 6, 7, 8]);
        // A script that names its device moves by another argument.
        let forked = run(true, &["runs", "fork", "latest", "--at", "train=6", "--arg", "device=cuda:0"]);
        assert!(errors(&forked).contains("a model on cuda:0"), "{}", errors(&forked));
        check_end(&place.finished(&forked), &whole, experts, &[7, 8]);
    }
}

/// Checks the losses of a run that went on at a checkpoint on another device: those of `steps`.
fn check_end(end: &Finished, whole: &Finished, experts: &str, steps: &[usize]) {
    let losses = end.losses();
    assert_eq!(losses.iter().map(|(step, _)| *step).collect::<Vec<_>>(), steps, "it goes on at the checkpoint");
    for (step, loss) in losses {
        let near = whole.losses()[step - 1].1;
        assert!((loss - near).abs() <= 2e-2 * near, "{experts} experts, step {step}: {loss}, and {near} in one go on the CPU");
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
    let Some(place) = Workplace::new() else { return };
    std::fs::write(place.path("tensors.lua"), TENSORS).unwrap();
    let output = place.run(&["run", "tensors.lua"]);
    let (said, told) = (String::from_utf8_lossy(&output.stdout).into_owned(), errors(&output));
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

/// Reads what lies on a device, or is computed there when it is first read, after the device was lost.
const READERS: &str = r#"
local engine = require "engine"
local tensor = engine.tensor
return engine.workflow {
  name = "readers",
  args = {},
  run = function(run)
    local tokenizer = engine.tokenizer.bytes()
    local model = run:model("model", {
      preset = "tiny", vocab = 320, hidden = 32, layers = 1, heads = 2, kv_heads = 1, intermediate = 48,
    }, { device = "cuda", dtype = "bf16", tokenizer = tokenizer })
    local batch = engine.data.batch { tokenizer:encode "the moon goes round" }
    local w = tensor.randn({ 3 }, { device = "cuda" }):requires_grad();
    (w * w):sum():backward()
    local function loss() return model:cross_entropy(batch) end
    local losses = {}
    for index = 1, 8 do losses[index] = loss() end
    io.open("lose", "w"):close()
    print(pcall(function() return tostring(w.grad) end))
    local readers = {
      function(x) return x * 0.5 end,
      function(x) return 1 - x end,
      function(x) return -x end,
      function(x) return x:exp() end,
      function(x) return tensor.stack { x, x } end,
      function(x) return tostring(x) end,
      function(x) return x:item() end,
      function(x) return x:backward() end,
    }
    for index, read in ipairs(readers) do print(pcall(read, losses[index])) end
    loss():backward()
  end,
}
"#;

#[test]
fn what_a_script_reads_of_a_lost_device_is_an_error() {
    let Some(place) = Workplace::new().filter(|place| place.is_emulated) else { return };
    std::fs::write(place.path("readers.lua"), READERS).unwrap();
    let output = place.run_losing("file:lose", &["run", "readers.lua"]);
    let (said, told) = (String::from_utf8_lossy(&output.stdout).into_owned(), errors(&output));
    assert!(!output.status.success() && !told.contains("panicked"), "{told}");
    assert_eq!(said.matches("was lost").count(), 9, "{said}");
    assert!(told.contains("was lost") && told.contains("perilune resume"), "{told}");
}
