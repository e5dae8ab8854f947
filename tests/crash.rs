//! Runs that end at any instant: SIGKILL at random moments of opening, steps and checkpoints, and power losses after which only
//! synced bytes and names are there. What was acknowledged must be kept, nothing be done twice, and the end be equal to the
//! bit. The store alone is `store_crash.rs`'s, chosen places are `resume.rs`'s.

#[path = "fixtures/power_loss.rs"]
mod power_loss;
#[path = "fixtures/runs.rs"]
mod runs;

use perilune::checkpoint::catalog::list;
use runs::{Outcome, Place, Random, fault_of_effects, fault_of_files, fault_of_list, fault_of_records, succeed};
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

/// The scripts that are killed, with arguments under which there is much to lose.
const SCRIPTS: [(&str, &[&str]); 4] = [
    ("shapes.lua", &[]),
    ("resumable.lua", &["--every", "1", "--dtype", "bf16"]),
    ("resumable.lua", &["--every", "4", "--experts", "4"]),
    // Without a checkpoint before the end of its loop.
    ("resumable.lua", &["--every", "1000"]),
];
/// Where processes are slowed down so that kills fall there; the first gives them their usual speed.
const SLOWED: [&str; 4] = [
    "",
    "checkpoint.begin=sleep(3),checkpoint.write=sleep(3),checkpoint.sync=sleep(1),checkpoint.manifest=sleep(5),checkpoint.rename=sleep(5)",
    "checkpoint.renamed=sleep(8),checkpoint.committed=sleep(8),checkpoint.remove=sleep(8)",
    "store.put=sleep(2),store.flush=sleep(2),store.sync=sleep(2),store.ack=sleep(2),loop.boundary=sleep(2)",
];

/// What the kills met.
#[derive(Default, Debug)]
struct Tally {
    kills: u64,
    /// There was no run yet, or it had not gone beyond where the last process left it.
    in_opening: u64,
    /// A checkpoint was being written or removed.
    in_checkpoint: u64,
    runs: u64,
    effects: u64,
}

impl Tally {
    fn add(&mut self, other: Self) {
        self.kills += other.kills;
        self.in_opening += other.in_opening;
        self.in_checkpoint += other.in_checkpoint;
        self.runs += other.runs;
        self.effects += other.effects;
    }
}

fn temporary_folders(run: &Path) -> usize {
    let entries = fs::read_dir(run.join("checkpoints")).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("tmp-")).count()
}

/// All that must hold of a run between two processes.
fn check_killed(run: &Path, effects: &Path, whole: &Outcome, with_store: bool) {
    assert_eq!(fault_of_files(run, whole), None, "{}", run.display());
    assert_eq!(fault_of_effects(effects), None, "{}", effects.display());
    // Opening it ourselves takes the next process the trouble of doing so, hence not each time.
    if with_store {
        assert_eq!(fault_of_records(run, effects), None, "{}", run.display());
    }
}

/// Kills runs of `script` again and again, each until it comes to its end, with `kills` kills at least.
fn kill_loop(script: &str, args: &[&str], kills: u64, mut random: Random) -> Tally {
    let place = Place::new();
    let began = Instant::now();
    let whole = place.whole(script, args);
    // What a process takes from its start to its end, undisturbed.
    let millis = u64::try_from(began.elapsed().as_millis()).unwrap().max(50);
    let mut tally = Tally::default();
    while tally.kills < kills {
        let name = format!("run-{}", tally.runs);
        let effects = place.path().join(format!("{name}.effects"));
        let mut round = 0;
        loop {
            assert!(round < 200, "{name} does not come to its end");
            round += 1;
            let before = place.run_of(&name).and_then(|run| fs::read(run.join("metrics.jsonl")).ok()).unwrap_or_default();
            let mut command = place.start_or_resume(script, &name, args);
            let slowed = SLOWED[random.below(SLOWED.len() as u64) as usize];
            let mut child = command.env("PERILUNE_FAILPOINT", slowed).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
            let micros = if random.below(4) == 0 { random.below(25_000) } else { random.below(millis * 1300) };
            std::thread::sleep(Duration::from_micros(micros));
            if child.try_wait().unwrap().is_some() {
                let output = child.wait_with_output().unwrap();
                let text = String::from_utf8_lossy(&output.stderr).into_owned();
                assert!(output.status.success() || text.contains("the run is finished"), "{name}: {text}");
                break;
            }
            child.kill().unwrap();
            let output = child.wait_with_output().unwrap();
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            if output.status.signal() != Some(9) {
                assert!(output.status.success() || text.contains("the run is finished"), "{name}: {text}");
                break;
            }
            tally.kills += 1;
            let Some(run) = place.run_of(&name) else {
                tally.in_opening += 1;
                continue;
            };
            let after = fs::read(run.join("metrics.jsonl")).unwrap_or_default();
            tally.in_opening += u64::from(after == before);
            tally.in_checkpoint += u64::from(temporary_folders(&run) > 0);
            check_killed(&run, &effects, &whole, random.below(2) == 0);
        }
        let run = place.folder(&name);
        whole.check(&run, "kills");
        check_killed(&run, &effects, &whole, true);
        assert_eq!(fault_of_list(&run), None, "{}", run.display());
        tally.effects += fs::read_to_string(&effects).unwrap_or_default().lines().count() as u64;
        tally.runs += 1;
        fs::remove_dir_all(place.path().join(&name)).unwrap();
    }
    tally
}

#[test]
fn sigkill_at_random_instants_loses_nothing_and_does_nothing_twice() {
    let mut random = Random::new();
    let seeds = SCRIPTS.map(|_| random.below(u64::MAX));
    let mut total = Tally::default();
    std::thread::scope(|scope| {
        let workers = SCRIPTS.iter().zip(seeds);
        let workers = workers.map(|((script, args), seed)| scope.spawn(move || kill_loop(script, args, 80, Random::from(seed))));
        workers.collect::<Vec<_>>().into_iter().for_each(|worker| total.add(worker.join().unwrap()));
    });
    println!("{total:?}");
    assert!(total.kills >= 300 && total.in_opening >= 20 && total.in_checkpoint >= 20, "{total:?}");
    assert!(total.runs >= 9 && total.effects >= 200, "{total:?}");
}

/// A failed step is caught, a checkpoint follows; by the time of the resume the step would go well.
const FLAKY: &str = r#"
local engine = require "engine"
return engine.workflow {
  name = "flaky",
  args = { flag = "flag" },
  run = function(run, args)
    local function flaky()
      local seen = io.open(args.flag)
      if seen then return "went well" end
      assert(io.open(args.flag, "w")):close()
      error(("a message of some length, "):rep(200) .. "and its end")
    end
    local function outer() return run:step("outer", {}, function() return run:step("flaky", { 1 }, flaky) end) end
    local ok, got = pcall(outer)
    local _, late = pcall(run.step, run, "late", {}, function() while true do end end, { timeout = 0.05 })
    for step in run:loop("train", { steps = 6, checkpoint_every = 2 }) do
      step:log { ok = ok, got = got, late = late, random = math.random() }
    end
  end,
}
"#;

#[test]
fn a_failed_step_behind_a_checkpoint_fails_again_with_the_same_message() {
    let place = Place::new();
    fs::write(place.path().join("flaky.lua"), FLAKY).unwrap();
    let start = |name: &str| {
        let flag = format!("{name}.flag");
        place.command(&["run", "--quiet", "--runs", name, "flaky.lua", "--flag", &flag])
    };
    succeed(&mut start("whole"));
    let metrics = |name: &str| fs::read_to_string(place.folder(name).join("metrics.jsonl")).unwrap();
    assert!(metrics("whole").contains("and its end") && metrics("whole").contains("was given 0.05 s"), "{}", metrics("whole"));
    // By then the first checkpoint is written: the second waits for it.
    for boundary in 6..=7 {
        let name = format!("killed-{boundary}");
        let output = start(&name).env("PERILUNE_FAILPOINT", format!("loop.boundary={boundary}*kill")).output().unwrap();
        assert_eq!(output.status.signal(), Some(9), "{}", String::from_utf8_lossy(&output.stderr));
        succeed(&mut place.resume(&name));
        assert_eq!(metrics(&name), metrics("whole"), "boundary {boundary}");
    }
    // Before there is a checkpoint nothing speaks against another try.
    assert_eq!(start("early").env("PERILUNE_FAILPOINT", "loop.boundary=1*kill").output().unwrap().status.signal(), Some(9));
    succeed(&mut place.resume("early"));
    assert!(metrics("early").contains("went well"));
}

#[test]
fn the_checks_find_what_they_look_for() {
    let place = Place::new();
    let whole = place.whole("shapes.lua", &[]);
    let (run, effects) = (place.folder("whole"), place.path().join("whole.effects"));
    let faults = || [fault_of_files(&run, &whole), fault_of_effects(&effects), fault_of_records(&run, &effects), fault_of_list(&run)];
    assert_eq!(faults(), [const { None }; 4]);
    let found = |fault: Option<String>, part: &str| {
        let fault = fault.unwrap_or_else(|| panic!("{part}: not found"));
        assert!(fault.contains(part), "{fault}");
    };
    let spoiled = |path: &Path, change: &dyn Fn(&mut Vec<u8>), check: &dyn Fn()| {
        let sound = fs::read(path).unwrap();
        let mut bytes = sound.clone();
        change(&mut bytes);
        // Files of checkpoints cannot be written, but replaced.
        fs::remove_file(path).unwrap();
        fs::write(path, bytes).unwrap();
        check();
        fs::remove_file(path).unwrap();
        fs::write(path, sound).unwrap();
    };

    let metrics = run.join("metrics.jsonl");
    let lines = |bytes: &[u8]| bytes.split_inclusive(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect::<Vec<_>>();
    let doubled = |bytes: &mut Vec<u8>| {
        *bytes = lines(bytes).into_iter().enumerate().flat_map(|(i, line)| vec![line; 1 + usize::from(i == 9)]).flatten().collect()
    };
    let missing =
        |bytes: &mut Vec<u8>| *bytes = lines(bytes).into_iter().enumerate().filter(|(i, _)| *i != 9).flat_map(|(_, line)| line).collect();
    spoiled(&metrics, &doubled, &|| found(fault_of_files(&run, &whole), "a line is doubled"));
    spoiled(&metrics, &missing, &|| found(fault_of_files(&run, &whole), "missing"));
    spoiled(&metrics, &missing, &|| found(whole.difference(&run), "metrics.jsonl differs"));

    let (last, _) = list(&run.join("checkpoints")).unwrap().pop().unwrap();
    for file in runs::files_below(&run.join("checkpoints").join(&last)) {
        let path = run.join("checkpoints").join(&last).join(&file);
        if path.metadata().unwrap().len() > 0 {
            let flipped = |bytes: &mut Vec<u8>| {
                let middle = bytes.len() / 2;
                bytes[middle] ^= 1;
            };
            let by_hash = || match file.ends_with("MANIFEST.json") {
                true => found(fault_of_list(&run).or_else(|| fault_of_files(&run, &whole)), ""),
                false => found(fault_of_files(&run, &whole), &file.display().to_string()),
            };
            spoiled(&path, &flipped, &by_hash);
        }
    }

    let append = |line: &'static str| move |bytes: &mut Vec<u8>| bytes.extend(line.as_bytes());
    spoiled(&effects, &append("ran prepare#0\n"), &|| found(fault_of_effects(&effects), "prepare#0 ran again after it was done"));
    spoiled(&effects, &append("done ghost#0\n"), &|| found(fault_of_records(&run, &effects), "ghost#0 has returned and is not recorded"));
    let moved = place.path().join("moved");
    fs::rename(run.join("checkpoints").join(&last), &moved).unwrap();
    found(fault_of_list(&run), &last);
    fs::rename(&moved, run.join("checkpoints").join(&last)).unwrap();
    assert_eq!(faults(), [const { None }; 4], "all is as it was");
}

/// A run on a disk that the power leaves again and again: `losses` times, each at another instant. How many checkpoints were
/// committed and how many steps returned, all of which must be there afterwards.
fn lose_power(script: &str, args: &[&str], losses: usize, shim: &Path, mut random: Random) -> (usize, usize) {
    let place = Place::new();
    let began = Instant::now();
    let whole = place.whole(script, args);
    let millis = u64::try_from(began.elapsed().as_millis()).unwrap().max(50);
    let (mut committed, mut returned) = (0, 0);
    let mut name = "disk-0".to_string();
    fs::create_dir(place.path().join(&name)).unwrap();
    // What a run says to the outside is not on the disk that loses its power.
    let mut effects = PathBuf::new();
    for loss in 1..=losses {
        let when = format!("loss {loss} of {script}");
        let (disk, shadow) = (place.path().join(&name), place.path().join("shadow"));
        power_loss::seed(&disk, &shadow);
        if place.run_of(&name).is_none() {
            effects = place.path().join(format!("{name}.effects"));
        }
        let count_returned = || fs::read_to_string(&effects).unwrap_or_default().lines().filter(|line| line.starts_with("done ")).count();
        let returned_before = count_returned();
        let mut command = place.start_or_resume(script, &name, args);
        command.env("LD_PRELOAD", shim).env("POWER_LOSS_ROOT", &disk).env("POWER_LOSS_SHADOW", &shadow);
        command.env("PERILUNE_FAILPOINT", "checkpoint.renamed=say,checkpoint.committed=say");
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(Duration::from_micros(random.below(millis * 1500)));
        let _ = child.kill();
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let is_over = output.status.success() || text.contains("the run is finished");
        assert!(is_over || output.status.signal() == Some(9), "{when}: {} {text}", output.status);
        let said = |what: &str| text.lines().filter(|line| *line == format!("failpoint checkpoint.{what}")).count();
        // What has a name is committed, but for the newest if its name was not yet made durable.
        let mut certain = checkpoints_of(place.run_of(&name));
        if said("renamed") > said("committed") {
            certain.pop();
        }

        // What the disk holds when the power is back; the next process goes on with it.
        name = format!("disk-{loss}");
        power_loss::restore(&disk, &shadow, &place.path().join(&name));
        fs::remove_dir_all(&shadow).unwrap();
        fs::remove_dir_all(&disk).unwrap();
        let run = place.run_of(&name);
        let survived = checkpoints_of(run.clone());
        let lost: Vec<_> = certain.iter().filter(|checkpoint| !survived.contains(checkpoint)).collect();
        assert!(lost.is_empty(), "{when}: of {certain:?} are gone: {lost:?}");
        let new = count_returned() - returned_before;
        match &run {
            Some(run) => check_killed(run, &effects, &whole, true),
            None => assert_eq!((new, said("committed")), (0, 0), "{when}: the run is gone"),
        }
        (committed, returned) = (committed + said("committed"), returned + new);
        if is_over || loss == losses {
            succeed_or_be_finished(&place, script, &name, args);
            whole.check(&place.folder(&name), &when);
            assert_eq!(fault_of_list(&place.folder(&name)), None, "{when}");
            fs::remove_dir_all(place.path().join(&name)).unwrap();
            fs::create_dir(place.path().join(&name)).unwrap();
        }
    }
    (committed, returned)
}

/// Brings the run in `name` to its end, from its start if there is none yet.
fn succeed_or_be_finished(place: &Place, script: &str, name: &str, args: &[&str]) {
    match place.run_of(name) {
        Some(_) => place.finish(name),
        None => drop(succeed(&mut place.start(script, name, args))),
    }
}

/// The checkpoints of `run`, oldest first.
fn checkpoints_of(run: Option<PathBuf>) -> Vec<String> {
    run.map_or_else(Vec::new, |run| list(&run.join("checkpoints")).unwrap().into_iter().map(|(name, _)| name).collect())
}

#[test]
fn what_was_acknowledged_survives_power_losses_of_whole_runs() {
    let folder = tempfile::tempdir().unwrap();
    let Some(shim) = power_loss::build_shim(folder.path()) else { return };
    let mut random = Random::new();
    let seeds = SCRIPTS.map(|_| random.below(u64::MAX));
    let (mut committed, mut returned) = (0, 0);
    std::thread::scope(|scope| {
        let workers = SCRIPTS.iter().zip(seeds);
        let workers = workers.map(|((script, args), seed)| {
            let shim = &shim;
            scope.spawn(move || lose_power(script, args, 15, shim, Random::from(seed)))
        });
        for worker in workers.collect::<Vec<_>>() {
            let (more_committed, more_returned) = worker.join().unwrap();
            (committed, returned) = (committed + more_committed, returned + more_returned);
        }
    });
    println!("{} power losses, {committed} checkpoints committed and {returned} steps returned, none lost", SCRIPTS.len() * 15);
    assert!(committed >= 60 && returned >= 60, "{committed} checkpoints and {returned} steps are too few to say anything");
}
