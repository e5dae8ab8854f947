//! A disk that becomes full before, during and at the commit of a checkpoint, and while the store writes: the error says what to
//! do, the last checkpoint stays as it is, and with room again the run goes on to an end that is equal to the bit. The disk is
//! a small tmpfs in a mount namespace of its own; the same errors at every point, without a disk, are in `resume.rs`.

#[path = "fixtures/runs.rs"]
mod runs;

use perilune::checkpoint::catalog::list;
use perilune::checkpoint::free_space::free_bytes;
use runs::{Outcome, Place, fault_of_files, fault_of_list};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

/// Where the test process in the namespace mounts the disk.
const MOUNT: &str = "DISK_FULL_MOUNT";
/// What it says once the disk is there.
const MOUNTED: &str = "the disk is mounted";
const SCRIPT: &str = "resumable.lua";

#[test]
fn a_full_disk_costs_no_checkpoint_and_no_bit() {
    let folder = tempfile::tempdir().unwrap();
    // As root, or as root of a user namespace.
    for flags in ["-m", "-rm"] {
        let mut command = Command::new("unshare");
        command.arg(flags).arg(std::env::current_exe().unwrap()).args(["inside_the_disk", "--exact", "--nocapture"]);
        let Ok(output) = command.env(MOUNT, folder.path()).output() else { continue };
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if text.contains(MOUNTED) {
            println!("{text}");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            return;
        }
    }
    println!("SKIPPED: no small disk can be mounted here; resume.rs has the failpoints of a full one");
}

/// Not a test of its own: what runs in the namespace.
#[test]
fn inside_the_disk() {
    let Ok(mount) = std::env::var(MOUNT) else { return };
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=160m", "tmpfs", &mount]).status();
    if !mounted.is_ok_and(|status| status.success()) {
        return;
    }
    println!("{MOUNTED}");
    let whole = Place::new().whole(SCRIPT, &[]);
    // Before: checkpoints ask for more room than is left. The others: not one byte is left from there on.
    check(&mount, "before a checkpoint", "loop.boundary=14", 20 << 20, &whole);
    check(&mount, "while the files are written", "checkpoint.write=17", 0, &whole);
    check(&mount, "at the end of the files", "checkpoint.write=20", 0, &whole);
    check(&mount, "at the manifest", "checkpoint.manifest=4", 0, &whole);
    check(&mount, "at the rename", "checkpoint.rename=4", 0, &whole);
    check(&mount, "between commit and record", "checkpoint.committed=4", 0, &whole);
    check(&mount, "while the store flushes", "store.flush=12", 0, &whole);
    check(&mount, "before the store writes", "loop.boundary=11", 0, &whole);
}

/// A run whose disk becomes full, but for `left` bytes, at a failpoint.
fn check(mount: &str, when: &str, failpoint: &str, left: u64, whole: &Outcome) {
    let place = Place::inside(Path::new(mount));
    let mut command = place.start(SCRIPT, "full", &[]);
    command.env("PERILUNE_FAILPOINT", format!("{failpoint}*say,{failpoint}*sleep(300)"));
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    stderr.read_line(&mut line).unwrap();
    let name = failpoint.split('=').next().unwrap();
    assert_eq!(line, format!("failpoint {name}\n"), "{when}");
    let filler = place.path().join("filler");
    fill(&filler, left);
    let mut said = String::new();
    stderr.read_to_string(&mut said).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1), "{when}: {said}");
    assert!(said.contains("error: ") && said.contains("make room"), "{when}: {said}");
    let run = place.folder("full");
    assert_eq!(fault_of_files(&run, whole), None, "{when}");
    let kept = list(&run.join("checkpoints")).unwrap().len();
    assert!(kept >= 2, "{when}: {kept} checkpoints");
    // Without room nothing goes on, and nothing breaks.
    let again = place.resume("full").output().unwrap();
    assert_eq!(again.status.code(), Some(1), "{when}: {}", String::from_utf8_lossy(&again.stderr));
    assert_eq!(fault_of_files(&run, whole), None, "{when}");
    std::fs::remove_file(&filler).unwrap();
    place.finish("full");
    whole.check(&run, when);
    assert_eq!(fault_of_list(&run), None, "{when}");
    let aside: Vec<_> = std::fs::read_dir(&run).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!aside.iter().any(|name| name.to_string_lossy().contains(".bad-")), "{when}: a full disk is no damage: {aside:?}");
    println!("full {when}: {}", said.lines().find(|line| line.contains("error: ")).unwrap_or_default());
}

/// Takes all room but `left` bytes.
fn fill(path: &Path, left: u64) {
    let mut file = File::create(path).unwrap();
    let mut block = vec![0x5a; 1 << 20];
    loop {
        let free = free_bytes(path).unwrap().saturating_sub(left);
        block.truncate(block.len().min(free as usize));
        if block.is_empty() || file.write_all(&block).is_err() {
            break;
        }
    }
}
