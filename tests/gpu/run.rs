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

/// A folder with the script, where the program runs on the device of the tests.
struct Workplace {
    folder: tempfile::TempDir,
    is_emulated: bool,
}

impl Workplace {
    /// None where there is no device, or no program beside its tests.
    fn new() -> Option<Self> {
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

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs the program; the emulator loses its device as `loses` says (tests/emulator/driver.cpp).
    fn run(&self, loses: Option<&str>, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_perilune"));
        command.current_dir(self.folder.path()).args(arguments).env("PERILUNE_CACHE", self.path("cache"));
        if self.is_emulated {
            command.env("LD_LIBRARY_PATH", self.path("libraries")).env("LD_PRELOAD", self.path("libraries/libcuda.so.1"));
        }
        command.envs(loses.map(|loses| ("EMULATOR_LOSES", loses)));
        command.output().unwrap()
    }

    /// What a run of `experts` experts that nothing stops leaves and says.
    fn whole(&self, experts: &str) -> (Vec<u8>, String) {
        self.finished(&self.run(None, &["run", "survivor.lua", "--experts", experts]))
    }

    /// The weights and the answer of a run that has ended well; the weights are gone then.
    fn finished(&self, output: &Output) -> (Vec<u8>, String) {
        assert!(output.status.success(), "{}", errors(output));
        let weights = std::fs::read(self.path("final/model.safetensors")).unwrap();
        std::fs::remove_dir_all(self.path("final")).unwrap();
        (weights, String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_run_that_stopped_goes_on_to_the_bit() {
    let Some(place) = Workplace::new() else { return };
    // The emulator takes its time: there the one that has everything must do.
    let shapes: &[&str] = if place.is_emulated { &["4"] } else { &["0", "4"] };
    for experts in shapes.iter().copied() {
        let want = place.whole(experts);
        std::fs::write(place.path("stop"), "").unwrap();
        let stopped = place.run(None, &["run", "survivor.lua", "--experts", experts]);
        assert!(errors(&stopped).contains("stopped as planned"), "{}", errors(&stopped));
        std::fs::remove_file(place.path("stop")).unwrap();
        assert!(place.finished(&place.run(None, &["resume", "latest"])) == want, "{experts} experts: a resumed run is another one");
    }
}

/// While weights are made, in kernels of a step, while a checkpoint is copied, when a gradient's norm is fetched, and late in the run.
const LOSSES: [&str; 6] = ["copy:20", "launch:150", "launch:600", "copy:95", "copy:122", "copy:230"];

#[test]
fn a_run_that_lost_its_device_goes_on_to_the_bit() {
    let Some(place) = Workplace::new().filter(|place| place.is_emulated) else { return };
    let want = place.whole("0");
    for loses in LOSSES {
        let lost = place.run(Some(loses), &["run", "survivor.lua", "--experts", "0"]);
        let told = errors(&lost);
        assert!(!lost.status.success() && !told.contains("panicked"), "{loses}: {told}");
        assert!(told.contains("cuda:0 (CUDA emulator) was lost") && told.contains("perilune resume"), "{loses}: {told}");
        assert!(place.finished(&place.run(None, &["resume", "latest"])) == want, "{loses}: a resumed run is another one");
    }
}
