//! The folder that holds the checkpoints of a run: their names, the list of them, removal, and sweeping up what killed processes
//! left. A folder `tmp-*` is under way or left over, every other is a checkpoint. Which to remove is decided in `retention.rs`.

use super::manifest::{MANIFEST_NAME, Manifest};
use crate::error::{Error, Result};
use crate::failpoint::failpoint;
use rustix::fs::FlockOperation;
use std::fmt::Write;
use std::fs::File;
use std::io::{Error as IoError, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

/// What the name of a folder begins with that is no checkpoint: not yet, or no more.
pub(super) const TEMPORARY: &str = "tmp-";
/// The longest name of a checkpoint, bytes. File systems allow 255.
const NAME_BYTES_MAX: usize = 200;
/// What is left of it for the loop: `-` and the 20 digits of the largest step go off.
const LOOP_BYTES_MAX: usize = NAME_BYTES_MAX - 21;
/// How much of a longer loop path still shows; `~` and 32 digits of its hash follow.
const LOOP_BYTES_SHOWN: usize = 140;

/// The name of the checkpoint at `step` of the loop `loop_path`: a plain folder name, such as `train-000050`.
///
/// Different arguments give different names of at most 200 bytes. `/` becomes `+` and an occurrence `[3]` becomes `=3`, so
/// `outer[3]/inner` gives `outer=3+inner-000050`; letters, digits, `_`, `-` and `.` stay; other bytes become `%` and two
/// hexadecimal digits. A path too long for that ends in `~` and its hash.
pub fn checkpoint_name(loop_path: &str, step: u64) -> String {
    let mut name = String::new();
    let mut rest = loop_path;
    while let Some(first) = rest.bytes().next() {
        if let Some((number, after)) = occurrence(rest) {
            name.push('=');
            name.push_str(number);
            rest = after;
            continue;
        }
        // At its start a name must not look like an option, a hidden folder or a temporary one.
        let start = name.is_empty() && (matches!(first, b'-' | b'.') || rest.starts_with(TEMPORARY));
        let width = rest.chars().next().map_or(0, char::len_utf8);
        match first {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'-' | b'.' if !start => name.push(char::from(first)),
            b'/' => name.push('+'),
            _ => rest.bytes().take(width).for_each(|byte| write!(name, "%{byte:02X}").expect("a string takes all text")),
        }
        rest = &rest[width..];
    }
    if name.is_empty() {
        // No other path gives a `%` that no digits follow.
        name.push('%');
    }
    if name.len() > LOOP_BYTES_MAX {
        name.truncate(LOOP_BYTES_SHOWN);
        name = format!("{name}~{}", &blake3::hash(loop_path.as_bytes()).to_hex()[..32]);
    }
    write!(name, "-{step:06}").expect("a string takes all text");
    assert!(name.len() <= NAME_BYTES_MAX, "{name} has {} bytes", name.len());
    name
}

/// The digits of `[digits]` at the start of `text` and what follows, if that is the end of a part of the path: only there
/// can it be told from digits that follow.
fn occurrence(text: &str) -> Option<(&str, &str)> {
    let (number, after) = text.strip_prefix('[')?.split_once(']')?;
    let plain = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
    (plain && (after.is_empty() || after.starts_with('/'))).then_some((number, after))
}

/// Refuses names that [`checkpoint_name`] cannot give. Errors: [`Error::Argument`].
pub(super) fn check_name(op: &'static str, name: &str) -> Result<()> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.+=%~".contains(&byte);
    let sound = !name.is_empty() && name.len() <= NAME_BYTES_MAX && name.bytes().all(plain);
    if !sound || name.starts_with(TEMPORARY) || name.starts_with(['.', '-']) {
        let expected = "a name as checkpoint_name gives: at most 200 of A-Z a-z 0-9 - _ . + = % ~, not first `.`, `-` or `tmp-`";
        return Err(Error::argument(op, "name", expected, format!("{name:?}")));
    }
    Ok(())
}

/// The checkpoints in `root`, oldest first: by time, then step. Those whose manifest cannot be read come first, each with
/// the reason. A folder that is not there holds none.
///
/// Reads manifests only; [`Manifest::quick_check`] and [`Manifest::verify`] look at the files.
/// Errors: [`Error::Io`] if `root` cannot be listed.
pub fn list(root: &Path) -> Result<Vec<(String, Result<Manifest>)>> {
    let mut checkpoints = Vec::new();
    for name in folders(root, |name| !name.starts_with(TEMPORARY))? {
        let folder = root.join(&name);
        let manifest = match Manifest::read(&folder) {
            // A copy under another name would stand in for the original.
            Ok(manifest) if manifest.name != name => {
                let expected = format!("{name}, the name of its folder");
                let found = format!("{:?}; rename the folder back, or move a copy elsewhere", manifest.name);
                Err(Error::format(&folder.join(MANIFEST_NAME), "name", expected, found))
            }
            // Another process has removed it meanwhile.
            Err(_) if std::fs::symlink_metadata(&folder).is_err_and(|e| e.kind() == ErrorKind::NotFound) => continue,
            read => read,
        };
        checkpoints.push((name, manifest));
    }
    checkpoints.sort_by(|(name, a), (other, b)| match (a, b) {
        (Ok(a), Ok(b)) => a.time.total_cmp(&b.time).then(a.step.cmp(&b.step)).then_with(|| name.cmp(other)),
        _ => a.is_ok().cmp(&b.is_ok()).then_with(|| name.cmp(other)),
    });
    Ok(checkpoints)
}

/// The time of a checkpoint that is to be the newest in `root`: `now`, or just behind those that are there. A clock that was set back
/// would make it old, and the newest is what a run goes on from and always keeps.
///
/// Errors: [`Error::Io`] if `root` cannot be listed.
pub fn next_time(root: &Path, now: f64) -> Result<f64> {
    let earlier = list(root)?.into_iter().filter_map(|(_, manifest)| manifest.ok()).map(|manifest| manifest.time);
    Ok(earlier.fold(now, |time, earlier| if earlier < time { time } else { earlier + 1e-3 }))
}

/// Removes the checkpoint `name` from `root`. It loses its name durably before its first file goes, so that no half of it is
/// ever taken for a checkpoint.
///
/// Failpoint: `checkpoint.remove`, between the two.
/// Errors: [`Error::Argument`] if `name` is no checkpoint's; [`Error::Io`], also if there is none of that name.
pub fn remove(root: &Path, name: &str) -> Result<()> {
    check_name("remove a checkpoint", name)?;
    let folder = root.join(name);
    let gone = temporary_path(root, "gone-");
    std::fs::rename(&folder, &gone).map_err(|e| Error::io(&folder, "remove", e))?;
    sync_folder(root)?;
    failpoint("checkpoint.remove").map_err(|e| Error::io(&gone, "remove", e))?;
    remove_tree(&gone)
}

/// Removes the folders `tmp-*` in `root` that no living process holds and whose last change is `grace` ago; returns their
/// names. `grace` covers the instant between the creation of a folder and its lock: a minute is plenty.
///
/// What cannot be removed stays for the next sweep. On a file system without locks nothing is removed: there the living
/// cannot be told from the dead. Errors: [`Error::Io`] if `root` cannot be listed.
pub fn sweep(root: &Path, grace: Duration) -> Result<Vec<String>> {
    let mut removed = Vec::new();
    for name in folders(root, |name| name.starts_with(TEMPORARY))? {
        let path = root.join(&name);
        let Ok(changed) = path.symlink_metadata().and_then(|about| about.modified()) else { continue };
        // A change in the future is one after a clock was set back: not old.
        if SystemTime::now().duration_since(changed).unwrap_or_default() < grace {
            continue;
        }
        if let Ok(folder) = File::open(&path)
            && rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive).is_ok()
            && remove_tree(&path).is_ok()
        {
            removed.push(name);
        }
    }
    Ok(removed)
}

/// The names of the folders in `root` that `wanted` accepts, sorted. Links to folders count, except for temporary ones.
fn folders(root: &Path, wanted: impl Fn(&str) -> bool) -> Result<Vec<String>> {
    let entries = match std::fs::read_dir(root) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io(root, "list", e)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|e| Error::io(root, "list", e))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_folder = if name.starts_with(TEMPORARY) { entry.file_type().is_ok_and(|t| t.is_dir()) } else { entry.path().is_dir() };
        if is_folder && wanted(&name) {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// A path `tmp-*` in `root` that nobody uses: `kind`, the process, the time, and a count.
pub(super) fn temporary_path(root: &Path, kind: &str) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let nanos = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos();
    root.join(format!("{TEMPORARY}{kind}{}-{nanos:x}-{}", std::process::id(), COUNT.fetch_add(1, Relaxed)))
}

/// Removes a folder with all in it; that another process removes it too is no error.
pub(super) fn remove_tree(path: &Path) -> Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(Error::io(path, "remove", e)),
        _ => Ok(()),
    }
}

/// Makes the names in a folder durable.
pub(super) fn sync_folder(path: &Path) -> Result<()> {
    File::open(path).and_then(|folder| folder.sync_all()).map_err(|e| Error::io(path, "sync", e))
}

/// Creates `folder` and those above it, each durably. `folder` is absolute. Errors: [`Error::Io`].
pub fn create_durably(folder: &Path) -> Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    let Some(parent) = folder.parent() else {
        return Err(Error::io(folder, "create", IoError::from(ErrorKind::NotADirectory)));
    };
    create_durably(parent)?;
    match std::fs::create_dir(folder) {
        Err(e) if e.kind() != ErrorKind::AlreadyExists || !folder.is_dir() => Err(Error::io(folder, "create", e)),
        _ => sync_folder(parent),
    }
}

#[cfg(test)]
mod tests {
    use super::super::commit::tests::{about, draft, names};
    use super::super::commit::{About, Draft};
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn names_are_plain_and_show_loop_and_step() {
        let check = |loop_path: &str, step, wanted: &str| assert_eq!(checkpoint_name(loop_path, step), wanted);
        check("train", 50, "train-000050");
        check("train", 0, "train-000000");
        check("train", u64::MAX, "train-18446744073709551615");
        check("outer[3]/inner", 50, "outer=3+inner-000050");
        check("sft/train#2", 7, "sft+train%232-000007");
        check("two words", 1, "two%20words-000001");
        check("é", 1, "%C3%A9-000001");
        check("a[x]", 1, "a%5Bx%5D-000001");
        check("a[3]b", 1, "a%5B3%5Db-000001");
        check("tmp-x", 1, "%74mp-x-000001");
        check(".x", 1, "%2Ex-000001");
        check("-x", 1, "%2Dx-000001");
        check("..", 1, "%2E.-000001");
        check("", 1, "%-000001");
    }

    #[test]
    fn different_loops_and_steps_have_different_names() {
        let mut seen: HashMap<String, (String, u64)> = HashMap::new();
        let mut check = |loop_path: String, step| {
            let name = checkpoint_name(&loop_path, step);
            check_name("test", &name).unwrap();
            let owner = seen.entry(name.clone()).or_insert_with(|| (loop_path.clone(), step)).clone();
            assert_eq!(owner, (loop_path, step), "{name}");
        };
        // Every path of up to five of these parts, which are what the encoding treats in a special way.
        let parts = ["a", "-", "/", "[", "3]", "[3]", "=", "+", "%", "2D", "~", "é", ".", "-000001"];
        let mut paths = vec![String::new()];
        let mut all = paths.clone();
        for length in 1..=4 {
            paths = paths.iter().flat_map(|path| parts.map(|part| format!("{path}{part}"))).collect();
            all.extend(paths.iter().cloned());
            assert_eq!(paths.len(), parts.len().pow(length));
        }
        // Long ones: equal up to their last byte, at and beyond the limit, and escapes cut in the middle.
        for length in 100..260 {
            all.extend(["a", "b", "/", "é"].map(|end| "x".repeat(length) + end));
            all.push("é".repeat(length));
        }
        all.extend(["tmp-".to_owned(), "tmp-gone-1".to_owned(), "%74mp-".to_owned()]);
        for path in all {
            for step in [0, 1, 999_999, 1_000_000, u64::MAX] {
                check(path.clone(), step);
            }
        }
        assert!(seen.keys().any(|name| name.len() == 200) && seen.keys().any(|name| name.contains('~')));
    }

    #[test]
    fn the_list_is_by_time_then_step_and_shows_what_cannot_be_read() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("checkpoints");
        assert!(list(&root).unwrap().is_empty(), "a folder that is not there holds none");
        for (name, step, time) in [("a-000003", 3, 5.0), ("b-000001", 1, 9.0), ("c-000002", 2, 5.0), ("d-000009", 9, 1.0)] {
            let mut about = about(step);
            about.time = time;
            draft(&root, name, step).unwrap().commit(about).unwrap();
        }
        let _live = draft(&root, "e-000001", 1).unwrap();
        std::fs::write(root.join("notes.txt"), "no folder").unwrap();
        std::fs::create_dir(root.join("half-000001")).unwrap();
        std::fs::create_dir(root.join("copied-000003")).unwrap();
        std::fs::copy(root.join("a-000003/MANIFEST.json"), root.join("copied-000003/MANIFEST.json")).unwrap();
        let listed = list(&root).unwrap();
        let order: Vec<_> = listed.iter().map(|(name, manifest)| (name.as_str(), manifest.is_ok())).collect();
        let wanted = [
            ("copied-000003", false),
            ("half-000001", false),
            ("d-000009", true),
            ("c-000002", true),
            ("a-000003", true),
            ("b-000001", true),
        ];
        assert_eq!(order, wanted);
        let message = listed[0].1.as_ref().unwrap_err().to_string();
        assert!(message.contains("expected copied-000003, the name of its folder, found \"a-000003\"; rename"), "{message}");
        let message = listed[1].1.as_ref().unwrap_err().to_string();
        assert!(message.contains("half-000001: MANIFEST.json: expected the manifest of a complete checkpoint"), "{message}");
        assert!(matches!(list(&root.join("notes.txt")), Err(Error::Io { .. })));
    }

    #[test]
    fn removal_takes_one_and_refuses_what_is_no_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        for step in 1..4 {
            draft(root, &checkpoint_name("train", step), step).unwrap().commit(about(step)).unwrap();
        }
        remove(root, "train-000002").unwrap();
        assert_eq!(names(root), ["train-000001", "train-000003"]);
        let message = remove(root, "train-000002").unwrap_err().to_string();
        assert!(message.contains("train-000002: cannot remove: No such file"), "{message}");
        for name in ["", ".", "..", "../x", "/", "tmp-1"] {
            assert!(matches!(remove(root, name), Err(Error::Argument { .. })), "{name}");
        }
        for (_, manifest) in list(root).unwrap() {
            let manifest = manifest.unwrap();
            manifest.verify(&root.join(&manifest.name)).unwrap();
        }
    }

    #[test]
    fn a_new_checkpoint_is_the_newest_whatever_the_clock_says() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        assert_eq!(next_time(root, 5.0).unwrap(), 5.0);
        for (step, now) in [(1, 7200.0), (2, 3600.0), (3, 3600.0), (4, 9000.0)] {
            let time = next_time(root, now).unwrap();
            draft(root, &format!("train-{step:06}"), 1).unwrap().commit(About { time, ..about(step) }).unwrap();
            assert_eq!(list(root).unwrap().last().unwrap().1.as_ref().unwrap().step, step);
        }
        assert_eq!(list(root).unwrap().pop().unwrap().1.unwrap().time, 9000.0);
    }

    #[test]
    fn a_sweep_takes_the_old_that_nobody_holds() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        draft(root, "train-000001", 1).unwrap().commit(about(1)).unwrap();
        let live = Draft::begin(root, "train-000002", 0).unwrap();
        let set_age = |path: &Path, seconds| {
            File::open(path).unwrap().set_modified(SystemTime::now() - Duration::from_secs(seconds)).unwrap();
        };
        for (name, seconds) in [("tmp-old", 3600), ("tmp-gone-old", 3600), ("tmp-young", 5), ("train-000001", 3600)] {
            std::fs::create_dir_all(root.join(name)).unwrap();
            set_age(&root.join(name), seconds);
        }
        std::fs::create_dir(root.join("elsewhere")).unwrap();
        std::os::unix::fs::symlink(root.join("elsewhere"), root.join("tmp-link")).unwrap();
        std::fs::write(root.join("tmp-file"), "x").unwrap();
        set_age(live.path(), 3600);
        assert_eq!(sweep(root, Duration::from_secs(60)).unwrap(), ["tmp-gone-old", "tmp-old"]);
        let future = SystemTime::now() + Duration::from_secs(3600);
        File::open(root.join("tmp-young")).unwrap().set_modified(future).unwrap();
        assert_eq!(sweep(root, Duration::from_secs(1)).unwrap(), [""; 0], "a clock that was set back makes nothing old");
        assert_eq!(sweep(root, Duration::ZERO).unwrap(), ["tmp-young"]);
        let live_name = live.path().file_name().unwrap().to_str().unwrap();
        let mut want = vec!["elsewhere", "tmp-file", "tmp-link", live_name, "train-000001"];
        want.sort_unstable();
        assert_eq!(names(root), want);
        live.write_file("x", b"x").unwrap();
        live.commit(about(2)).unwrap();
        assert!(root.join("train-000002").is_dir());
        assert_eq!(sweep(&root.join("missing"), Duration::ZERO).unwrap(), [""; 0]);
    }
}
