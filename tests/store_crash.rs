//! What the store acknowledged survives: processes that are killed at random instants, a disk that keeps only what was
//! synced, and errors at each stage of a write. The writer is this test binary again, told its part by the environment.
//! Not about whole runs (`crash.rs`).

#[path = "fixtures/power_loss.rs"]
mod power_loss;
#[path = "fixtures/runs.rs"]
mod runs;

use perilune::store::{Database, Durability};
use power_loss::{build_shim, restore, seed};
use runs::Random;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

/// The folder of the database that a writer opens; its acknowledgements go to the file `ACKS`.
const STORE: &str = "STORE_CRASH_STORE";
const ACKS: &str = "STORE_CRASH_ACKS";
/// How the writer works: `flushed`, `compacting`, `later`, or a number of durable writes after which it reports and closes.
const WORK: &str = "STORE_CRASH_WORK";
/// Records that are overwritten again and again.
const HOT: u64 = 40;

/// Not a test of its own: the process that is killed. Write number i is a batch of `a/i`, `b/i` and `hot/(i mod 40)`.
#[test]
fn writer() {
    let (Ok(store), Ok(acks), Ok(work)) = (std::env::var(STORE), std::env::var(ACKS), std::env::var(WORK)) else { return };
    let mut acks = File::options().append(true).create(true).open(acks).unwrap();
    let opened = Database::open(Path::new(&store)).unwrap();
    assert_eq!(opened.damaged, None);
    let database = opened.database;
    let first = survivors(&database).last().map_or(1, |last| last + 1);
    let put = |i: u64, durability| {
        let value = i.to_string().into_bytes();
        // Sizes of 20 to 3000 bytes: small records share a page, large ones split it.
        let padded = [&value[..], b" ", &vec![b'x'; (i * 7919 % 2980) as usize]].concat();
        database
            .put(vec![(format!("a/{i:08}"), value.clone()), (format!("b/{i:08}"), padded), (format!("hot/{}", i % HOT), value)], durability)
    };
    match work.as_str() {
        "flushed" | "compacting" => {
            for i in first.. {
                put(i, Durability::Flushed).unwrap();
                // In one piece: a kill between a number and its end would leave half a line to the next writer.
                acks.write_all(format!("{i}\n").as_bytes()).unwrap();
                if work == "compacting" && i % 20 == 0 {
                    database.compact().unwrap();
                }
            }
        }
        // Claims too early, to show that the checker finds it.
        "later" => {
            for i in first..first + 200 {
                put(i, Durability::Later).unwrap();
                writeln!(acks, "{i}").unwrap();
            }
            std::process::abort();
        }
        count => {
            for i in 1..=count.parse().unwrap() {
                match put(i, Durability::Flushed) {
                    Ok(()) => writeln!(acks, "{i}").unwrap(),
                    Err(error) => writeln!(acks, "error {i}: {error}").unwrap(),
                }
            }
            writeln!(acks, "read {:?}", database.get("a/00000001").map(|value| value.is_some()).map_err(|e| e.to_string())).unwrap();
            writeln!(acks, "close {:?}", database.close().map_err(|error| error.to_string())).unwrap();
        }
    }
}

/// The writes that are in the database, in order. Each must be there whole, none may be missing before the last, and a record
/// that is overwritten must be as new as the newest.
fn survivors(database: &Database) -> Vec<u64> {
    let pairs: BTreeMap<_, _> = database.scan("").unwrap().into_iter().collect();
    let numbers: Vec<u64> = pairs.keys().filter_map(|key| key.strip_prefix("a/")).map(|number| number.parse().unwrap()).collect();
    assert_eq!(numbers, (1..=numbers.len() as u64).collect::<Vec<_>>(), "a hole");
    let mut expected = BTreeMap::new();
    for i in &numbers {
        let padding = (i * 7919 % 2980) as usize;
        let b = pairs.get(&format!("b/{i:08}")).unwrap_or_else(|| panic!("half of write {i}"));
        assert_eq!(b.len(), i.to_string().len() + 1 + padding, "write {i}");
        expected.insert(format!("hot/{}", i % HOT), i.to_string().into_bytes());
    }
    let hot: BTreeMap<_, _> = pairs.iter().filter(|(key, _)| key.starts_with("hot/")).map(|(k, v)| (k.clone(), v.clone())).collect();
    assert_eq!(hot, expected);
    assert_eq!(pairs.len(), numbers.len() * 2 + hot.len());
    numbers
}

/// The last write that was acknowledged.
fn acknowledged(acks: &Path) -> u64 {
    let text = fs::read_to_string(acks).unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().last().map_or(0, |line| line.parse().unwrap_or_else(|_| panic!("the writer says: {line}")))
}

fn start(store: &Path, acks: &Path, work: &str, environment: &[(&str, &Path)]) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["writer", "--exact", "--nocapture"]).env(STORE, store).env(ACKS, acks).env(WORK, work);
    command.envs(environment.iter().copied()).stdout(std::process::Stdio::null());
    command.spawn().unwrap()
}

/// Kills the writer after `time`. It must not have ended by itself.
fn kill_after(mut child: Child, time: Duration) {
    std::thread::sleep(time);
    child.kill().unwrap();
    let status = child.wait().unwrap();
    assert_eq!(status.signal(), Some(9), "the writer ended by itself: {status}");
}

/// What the writers of the crash tests do, in turn.
const WORKS: [&str; 2] = ["flushed", "compacting"];

#[test]
fn what_was_acknowledged_survives_kills() {
    let mut random = Random::new();
    let root = tempfile::tempdir().unwrap();
    let (mut rounds, mut total) = (0, 0);
    // Several stores, since opening a young one and an old one take different paths; every third kill falls into the opening. More
    // of them where the machine is too busy to write much in between.
    for history in 0..60 {
        if history >= 6 && total > rounds {
            break;
        }
        let (store, acks) = (root.path().join(format!("store-{history}")), root.path().join(format!("acks-{history}")));
        let mut before = 0;
        for round in 0..12 {
            let time = if round % 3 == 0 { random.below(12_000) } else { 5_000 + random.below(60_000) };
            kill_after(start(&store, &acks, WORKS[history % 2], &[]), Duration::from_micros(time));
            let opened = Database::open(&store).unwrap();
            assert_eq!(opened.damaged, None, "history {history}, round {round}");
            let (survived, acked) = (survivors(&opened.database).len() as u64, acknowledged(&acks));
            // One write may be there that was not acknowledged any more: in this round, or in the one before.
            assert!(
                acked <= survived && survived <= acked.max(before) + 1,
                "round {round}: {before}, {acked} acknowledged, {survived} survived"
            );
            opened.database.close().unwrap();
            before = survived;
            rounds += 1;
        }
        total += acknowledged(&acks);
    }
    println!("{rounds} kills, {total} writes acknowledged, none lost");
    assert!(rounds >= 60 && total > rounds, "{total} writes are too few to say anything");
}

#[test]
fn what_was_acknowledged_survives_power_losses() {
    let root = tempfile::tempdir().unwrap();
    let Some(shim) = build_shim(root.path()) else { return };
    let mut random = Random::new();
    let (mut losses, mut total) = (0, 0);
    // As many histories as it takes to write something, 6 at least.
    for history in 0..60 {
        if history >= 6 && total > 100 {
            break;
        }
        let acks = root.path().join(format!("acks-{history}"));
        let mut disk = root.path().join(format!("disk-{history}-0"));
        fs::create_dir(&disk).unwrap();
        let mut before = 0;
        for round in 0..4 {
            let shadow = root.path().join(format!("shadow-{history}-{round}"));
            seed(&disk, &shadow);
            let environment = [("LD_PRELOAD", &*shim), ("POWER_LOSS_ROOT", &*disk), ("POWER_LOSS_SHADOW", &*shadow)];
            // The first of a history gets time to write something.
            let time = if round == 0 { 60_000 + random.below(60_000) } else { random.below(90_000) };
            kill_after(start(&disk.join("store"), &acks, WORKS[history % 2], &environment), Duration::from_micros(time));
            // What the disk holds when the power is back; the next round goes on with it.
            let after = root.path().join(format!("disk-{history}-{}", round + 1));
            restore(&disk, &shadow, &after);
            let opened = Database::open(&after.join("store")).unwrap();
            assert_eq!(opened.damaged, None, "history {history}, round {round}");
            let (survived, acked) = (survivors(&opened.database).len() as u64, acknowledged(&acks));
            assert!(
                acked <= survived && survived <= acked.max(before) + 1,
                "round {round}: {before}, {acked} acknowledged, {survived} survived"
            );
            opened.database.close().unwrap();
            before = survived;
            disk = after;
            losses += 1;
        }
        total += acknowledged(&acks);
    }
    println!("{losses} power losses, {total} writes acknowledged, none lost");
    assert!(total > 100, "{total} writes are too few to say anything");
}

/// The model must find a store that acknowledges before it syncs.
#[test]
fn the_power_loss_model_finds_a_false_acknowledgement() {
    let root = tempfile::tempdir().unwrap();
    let Some(shim) = build_shim(root.path()) else { return };
    let (disk, shadow, after, acks) =
        (root.path().join("disk"), root.path().join("shadow"), root.path().join("after"), root.path().join("acks"));
    fs::create_dir(&disk).unwrap();
    seed(&disk, &shadow);
    let environment = [("LD_PRELOAD", &*shim), ("POWER_LOSS_ROOT", &*disk), ("POWER_LOSS_SHADOW", &*shadow)];
    let status = start(&disk.join("store"), &acks, "later", &environment).wait().unwrap();
    assert_eq!((status.signal(), acknowledged(&acks)), (Some(6), 200), "{status}");
    restore(&disk, &shadow, &after);
    let opened = Database::open(&after.join("store")).unwrap();
    let survived = survivors(&opened.database).len();
    assert!(opened.damaged.is_none() && survived < 200, "{survived} of 200 survived without a sync");
}

/// A writer that makes `count` durable writes under `failpoint`, and what it said: one line a write, then reading, closing.
fn with_failpoint(failpoint: &str, count: u32) -> (tempfile::TempDir, std::process::ExitStatus, Vec<String>) {
    let root = tempfile::tempdir().unwrap();
    let (store, acks) = (root.path().join("store"), root.path().join("acks"));
    let environment = [("PERILUNE_FAILPOINT", Path::new(failpoint))];
    let status = start(&store, &acks, &count.to_string(), &environment).wait().unwrap();
    let lines = fs::read_to_string(&acks).unwrap_or_default().lines().map(Into::into).collect();
    (root, status, lines)
}

#[test]
fn the_first_error_or_panic_closes_the_store_for_writing() {
    let points = ["store.put", "store.flush", "store.sync", "store.ack"];
    for (point, action) in points.iter().flat_map(|point| ["error", "panic"].map(|action| (point, action))) {
        let (root, status, lines) = with_failpoint(&format!("{point}=3*{action}"), 5);
        assert!(status.success(), "{point}: {status} {lines:?}");
        assert_eq!((lines[0].as_str(), lines[1].as_str()), ("1", "2"), "{point}");
        assert!(lines[2].starts_with("error 3: ") && lines[2].ends_with(&format!("failpoint {point}")), "{}", lines[2]);
        for (i, line) in [(4, &lines[3]), (5, &lines[4])] {
            let wanted = ["cannot write to the store: an earlier error has closed it (", &format!("failpoint {point}); see to the disk")];
            assert!(line.starts_with(&format!("error {i}: ")) && wanted.iter().all(|part| line.contains(part)), "{line}");
        }
        assert_eq!(lines[5], "read Ok(true)", "{point}: reading goes on");
        assert!(lines[6].starts_with("close Err(") && lines[6].contains("an earlier error has closed it"), "{}", lines[6]);
        let opened = Database::open(&root.path().join("store")).unwrap();
        let survived = survivors(&opened.database).len();
        // The third was handed to the log or not; it was never acknowledged.
        assert!(opened.damaged.is_none() && (2..=3).contains(&survived), "{point}: {survived}");
    }
}

#[test]
fn a_full_disk_refuses_a_write_and_leaves_room_for_the_last() {
    let (root, status, lines) = with_failpoint("store.put=3*no_space", 4);
    assert!(status.success() && lines[2].starts_with("error 3: ") && lines[2].contains("cannot write to the store"), "{lines:?}");
    assert_eq!((lines[3].as_str(), lines[5].as_str()), ("4", "close Ok(())"), "{lines:?}");
    assert!(!root.path().join("store/ballast").exists(), "the reserve is free");
    // At the next opening it is taken again.
    drop(Database::open(&root.path().join("store")).unwrap());
    assert!(root.path().join("store/ballast").exists());
    // When the database below has met the full disk itself, nothing more goes through it.
    let (root, status, lines) = with_failpoint("store.flush=3*no_space", 4);
    assert!(status.success() && lines[3].contains("an earlier error has closed it"), "{lines:?}");
    assert!(!root.path().join("store/ballast").exists(), "the next process has room to open");
}

#[test]
fn a_process_that_ends_inside_a_write_loses_nothing_acknowledged() {
    for point in ["store.put", "store.flush", "store.sync", "store.ack"] {
        let (root, status, lines) = with_failpoint(&format!("{point}=3*exit"), 5);
        assert_eq!((status.code(), lines.len()), (Some(137), 2), "{point}: {lines:?}");
        let opened = Database::open(&root.path().join("store")).unwrap();
        let survived = survivors(&opened.database).len();
        assert!(opened.damaged.is_none() && (2..=3).contains(&survived), "{point}: {survived}");
    }
}
