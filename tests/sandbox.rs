//! Programs that mean harm, each ended within its limits, the caller unharmed, and nothing left behind: no process, no zombie, no
//! folder. And programs that mean none, which do what they would do elsewhere. Where the kernel refuses a wall (one without Landlock,
//! most often) the tests are skipped with a line that says so, once it is seen that no program runs there unprotected.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use perilune::host::sandbox_job::{Job, Language, Outcome, Status, find_python, run};
use std::io::Write;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

/// One program at a time, so that whatever is left behind is its.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Why this kernel holds no program, asked once; none if it does.
fn why_not() -> Option<&'static str> {
    static WHY: OnceLock<Option<String>> = OnceLock::new();
    let ask = || {
        let outcome = end(&job(Language::Lua, "print 'ran'"));
        if outcome.missing.is_empty() {
            assert_eq!((outcome.status, &outcome.stdout[..]), (Status::Ok, &b"ran\n"[..]), "{outcome:?}");
            return None;
        }
        // Without a wall it is not run, and that is told.
        assert!(outcome.status == Status::Refused && outcome.stdout.is_empty(), "{outcome:?}");
        let reason = outcome.reason.expect("what is refused has a reason");
        assert!(reason.starts_with("this system cannot hold a program as it should"), "{reason}");
        Some(reason)
    };
    WHY.get_or_init(ask).as_deref()
}

/// Whether there is no sandbox to test here, with a line that says so. A test asks first: it runs a program.
fn is_skipped() -> bool {
    if let Some(reason) = why_not() {
        eprintln!("skipped: {reason}");
    }
    why_not().is_some()
}

fn job(language: Language, program: &str) -> Job {
    Job {
        program: program.into(),
        language,
        stdin: Vec::new(),
        // A busy machine must not make an innocent program late.
        seconds: 20.0,
        memory_bytes: 256 << 20,
        output_bytes: 64 << 10,
        files_bytes: 0,
        allow_weaker: false,
    }
}

/// Runs a job and looks at what it leaves.
fn end(job: &Job) -> Outcome {
    let guard = alone();
    let started = Instant::now();
    let outcome = run(Path::new(env!("CARGO_BIN_EXE_perilune")), job, &|| false).unwrap();
    let took = started.elapsed().as_secs_f64();
    assert!(took < job.seconds + 10.0, "{took} s: {outcome:?}");
    assert!(outcome.stdout.len() <= job.output_bytes && outcome.stderr.len() <= job.output_bytes);
    assert_eq!(children(std::process::id()), Vec::<String>::new(), "{outcome:?}");
    let own = format!("perilune-scratch-{}-", std::process::id());
    let folders = std::fs::read_dir(std::env::temp_dir()).unwrap().flatten();
    let left: Vec<_> = folders.filter(|entry| entry.file_name().to_string_lossy().starts_with(&own)).collect();
    assert!(left.is_empty(), "{left:?}");
    drop(guard);
    outcome
}

/// Processes whose parent is `parent`, zombies too.
fn children(parent: u32) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
        // The name in brackets may hold anything; the parent is the second word behind it.
        let behind = stat.rsplit_once(')').map_or("", |(_, behind)| behind);
        if behind.split_whitespace().nth(1) == Some(parent.to_string().as_str()) {
            found.push(stat);
        }
    }
    found
}

fn lua(program: &str) -> Outcome {
    end(&job(Language::Lua, program))
}

/// None, with a line that says so, where there is no Python.
fn python(program: &str) -> Option<Outcome> {
    python_job(program, |_| {})
}

fn python_job(program: &str, change: impl FnOnce(&mut Job)) -> Option<Outcome> {
    if find_python().is_none() {
        eprintln!("skipped: no python3 on this machine");
        return None;
    }
    let mut job = job(Language::Python, program);
    change(&mut job);
    Some(end(&job))
}

#[track_caller]
fn expect(outcome: &Outcome, status: Status, stdout: &str) {
    assert_eq!(outcome.status, status, "{outcome:?}\n{}", String::from_utf8_lossy(&outcome.stderr));
    assert_eq!(String::from_utf8_lossy(&outcome.stdout), stdout, "{outcome:?}");
    assert_eq!(outcome.reason.is_none(), status == Status::Ok, "{outcome:?}");
    assert!(outcome.missing.is_empty());
}

#[track_caller]
fn expect_python(program: &str, status: Status, stdout: &str) {
    if let Some(outcome) = python(program) {
        expect(&outcome, status, stdout);
    }
}

/// Python that prints `ended` for each of these lines that fails, and what it did for each that does not.
fn attempts(lines: &[&str]) -> String {
    let mut program = String::from("import os, sys\n");
    for line in lines {
        program += &format!("try:\n    done = {line}\n    print('did', {line:?}, done)\nexcept OSError as error:\n    print('ended')\n");
    }
    program
}

#[track_caller]
fn all_fail(lines: &[&str]) {
    expect_python(&attempts(lines), Status::Ok, &"ended\n".repeat(lines.len()));
}

#[test]
fn lua_programs_run() {
    if is_skipped() {
        return;
    }
    expect(&lua("print(1 + 1, 'x', nil) io.write('a', 2, '\\n')"), Status::Ok, "2\tx\tnil\na2\n");
    let mut reads = job(Language::Lua, "local n = io.read('n') io.read() for line in io.lines() do print(#line, n) end print(io.read())");
    reads.stdin = b"12.5\nab\n\nabc".to_vec();
    expect(&end(&reads), Status::Ok, "2\t12.5\n0\t12.5\n3\t12.5\nnil\n");
    let outcome = lua("local function f() error('no good') end\nf()");
    expect(&outcome, Status::Error, "");
    assert_eq!((outcome.exit, outcome.reason.as_deref()), (Some(1), Some("program.lua:1: no good")));
    expect(&lua("local x = = 1"), Status::Error, "");
    // The same numbers and the same order in each run.
    let random = "local t = {} for i = 1, 9 do t['k' .. i] = i end for k in pairs(t) do io.write(k) end print(math.random(1 << 40))";
    assert_eq!(lua(random).stdout, lua(random).stdout);
}

#[test]
fn python_programs_run() {
    if is_skipped() {
        return;
    }
    let program = "import sys, math, json, re, collections, random, datetime, fractions\nprint(sum(map(int, sys.stdin.read().split())))";
    if let Some(outcome) = python_job(program, |job| job.stdin = b"1 2\n39".to_vec()) {
        expect(&outcome, Status::Ok, "42\n");
    }
    if let Some(outcome) = python("import sys\nprint('é')\nsys.exit(3)") {
        expect(&outcome, Status::Error, "é\n");
        assert_eq!((outcome.exit, outcome.reason.as_deref()), (Some(3), Some("exit code 3")));
    }
    if let Some(outcome) = python("def f():\n  raise ValueError('no good')\nf()") {
        assert_eq!((outcome.status, outcome.reason.as_deref()), (Status::Error, Some("ValueError: no good")));
        assert!(String::from_utf8_lossy(&outcome.stderr).contains("File \"program.py\", line 2"));
    }
    if let (Some(a), Some(b)) = (python("print({'a', 'b', 'c', 'd', 'e'})"), python("print({'a', 'b', 'c', 'd', 'e'})")) {
        assert_eq!(a.stdout, b.stdout);
    }
}

#[test]
fn loops_and_sleeps_end_with_their_time() {
    if is_skipped() {
        return;
    }
    let ends = |language, program: &str| {
        let mut job = job(language, program);
        job.seconds = 0.4;
        let outcome = end(&job);
        expect(&outcome, Status::Timeout, "");
        assert!((0.4..4.0).contains(&outcome.seconds), "{outcome:?}");
        assert_eq!(outcome.reason.as_deref(), Some("it was given 0.4 s"));
    };
    ends(Language::Lua, "while true do end");
    ends(Language::Lua, "while true do pcall(function() while true do end end) end");
    ends(Language::Lua, "local s = ('a'):rep(40) string.find(s, ('a*'):rep(40) .. 'b')");
    ends(Language::Lua, "local f f = coroutine.wrap(function() while true do coroutine.yield() end end) while true do f() end");
    if find_python().is_none() {
        eprintln!("skipped: no python3 on this machine");
        return;
    }
    ends(Language::Python, "while True: pass");
    ends(Language::Python, "import time\ntime.sleep(1000)");
    ends(Language::Python, "import os\nos.close(1)\nos.close(2)\nwhile True: pass");
    // All signals are ignored, but for the one that cannot be.
    let deaf = "import signal, time\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except Exception: pass\n";
    ends(Language::Python, &format!("{deaf}while True: time.sleep(1)"));
    ends(Language::Python, "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)");
    ends(Language::Python, "import sys\nsys.stdin.read()\nwhile True:\n    try: pass\n    except BaseException: pass");
}

#[test]
fn processor_time_has_a_limit_of_its_own() {
    if is_skipped() {
        return;
    }
    // Even if the clock were never looked at: the program is given an hour by the clock, and 2 s of processor (1 and 1 to spare).
    let started = Instant::now();
    let order = |seconds: f64| {
        format!(
            "{{\"parent\":{},\"language\":\"lua\",\"seconds\":{seconds},\"memory_bytes\":99999999,\"files_bytes\":0,\"allow_weaker\":false,\"python\":null}}",
            std::process::id()
        )
    };
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("program.lua"), "while true do end").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_perilune"));
    command.current_dir(folder.path()).args(["sandboxed", &order(1.0)]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let status = command.status().unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(24), "SIGXCPU: {status:?}");
    assert!(started.elapsed() > Duration::from_secs_f64(1.5));
}

#[test]
fn memory_has_an_end() {
    if is_skipped() {
        return;
    }
    let hog = |language, program: &str| {
        let outcome = end(&job(language, program));
        assert_eq!(outcome.status, Status::Memory, "{outcome:?} {}", String::from_utf8_lossy(&outcome.stderr));
        assert_eq!(outcome.reason.as_deref(), Some("it wanted more than 256 MiB"));
    };
    hog(Language::Lua, "local t = {} while true do t[#t + 1] = ('x'):rep(1 << 20) .. #t end");
    hog(Language::Lua, "local s = ('x'):rep(1 << 30)");
    hog(Language::Lua, "local t = {} for i = 1, 1e12 do t[i] = i end");
    // Caught, it is the program's own affair.
    expect(&lua("print(pcall(string.rep, 'x', 1 << 30))"), Status::Ok, "false\tnot enough memory\n");
    // Far below the limit all is well.
    expect(&lua("local t = {} for i = 1, 100 do t[i] = ('x'):rep(1 << 20) .. i end print(#t)"), Status::Ok, "100\n");
    if find_python().is_none() {
        eprintln!("skipped: no python3 on this machine");
        return;
    }
    hog(Language::Python, "x = []\nwhile True: x.append(bytearray(1 << 20))");
    hog(Language::Python, "x = bytearray(1 << 40)");
    expect_python("x = bytearray(100 << 20)\nprint(len(x))", Status::Ok, "104857600\n");
    // Memory that belongs to no process's own: what can be mapped counts, what cannot be made is refused.
    let shared = "import mmap\ntry:\n    mmap.mmap(-1, 1 << 30)\n    print('did')\nexcept OSError: print('ended')";
    expect_python(shared, Status::Ok, "ended\n");
    all_fail(&["os.memfd_create('x')"]);
}

#[test]
fn lua_sees_no_file_and_no_engine() {
    if is_skipped() {
        return;
    }
    let names =
        ["os", "require", "package", "debug", "dofile", "loadfile", "engine", "io.open", "io.popen", "io.output", "string.dump and nil"];
    let program: String = names.iter().map(|name| format!("assert(({name}) == nil, {name:?}) ")).collect();
    expect(&lua(&format!("{program} print 'nothing'")), Status::Ok, "nothing\n");
    // Compiled Lua is no text, wherever it comes from.
    expect(&lua("print(load(string.dump(function() end)))"), Status::Ok, "nil\tattempt to load a binary chunk (mode is 't')\n");
    expect(&lua("print(load('return 1 + 1')(), load('return x', 'n', 'b', { x = 5 })())"), Status::Ok, "2\t5\n");
    expect(&end(&job(Language::Lua, "\u{1b}Lua")), Status::Error, "");
    expect(&lua("local function f() return 1 + f() end f()"), Status::Error, "");
}

#[test]
fn files_outside_are_out_of_reach() {
    if is_skipped() {
        return;
    }
    let outside = tempfile::tempdir().unwrap();
    let secret = outside.path().join("secret");
    std::fs::write(&secret, "a secret").unwrap();
    let (secret, folder) = (secret.to_str().unwrap(), outside.path().to_str().unwrap());
    let parent = std::process::id();
    all_fail(&[
        &format!("open('{secret}').read()"),
        &format!("open('{secret}', 'w')"),
        &format!("open('{folder}/new', 'w')"),
        &format!("os.listdir('{folder}')"),
        &format!("os.remove('{secret}')"),
        &format!("os.rename('{secret}', '{folder}/moved')"),
        &format!("os.truncate('{secret}', 0)"),
        &format!("os.chmod('{secret}', 0)"),
        &format!("os.chmod('{folder}', 0)"),
        &format!("os.chown('{secret}', 1, 1)"),
        &format!("os.utime('{secret}', (0, 0))"),
        &format!("os.setxattr('{secret}', 'user.x', b'1')"),
        &format!("os.link('{secret}', 'here')"),
        &format!("os.symlink('{secret}', 'here')"),
        &format!("os.mkdir('{folder}/deep')"),
        &format!("open('/proc/{parent}/environ').read()"),
        "open('/proc/self/environ').read()",
        "os.listdir('/proc')",
        "open('/etc/passwd').read()",
        "os.listdir('/')",
        "open('/tmp/perilune-was-here', 'w')",
        "open('/dev/shm/perilune-was-here', 'w')",
        "open('program.py', 'w')",
        "open('here', 'w')",
        "os.mkfifo('here')",
        "os.chroot('.')",
    ]);
    assert_eq!(std::fs::read_to_string(secret).unwrap(), "a secret");
    assert_eq!(std::fs::read_dir(folder).unwrap().count(), 1);
}

#[test]
fn files_of_its_own_have_a_limit() {
    if is_skipped() {
        return;
    }
    let writes = |program: &str| {
        python_job(program, |job| {
            job.files_bytes = 1 << 20;
        })
    };
    let Some(outcome) = writes("import os\nos.mkdir('d')\nopen('d/x', 'w').write('abc')\nprint(open('d/x').read(), os.listdir('d'))")
    else {
        return;
    };
    expect(&outcome, Status::Ok, "abc ['x']\n");
    // One file cannot grow past the limit at all; many are counted.
    let one = writes("f = open('x', 'wb', 0)\nn = 0\ntry:\n    while True: n += f.write(b'x' * 65536)\nexcept OSError: print(n)").unwrap();
    expect(&one, Status::Ok, "1048576\n");
    for many in [
        "i = 0\nwhile True:\n    i += 1\n    open(str(i), 'wb').write(b'x' * 65536)",
        "i = 0\nwhile True:\n    i += 1\n    open(str(i), 'wb')",
        "import os\nwhile True:\n    os.mkdir('d' * 200)\n    os.chdir('d' * 200)",
        "import os\nfor i in range(10**9):\n    os.mkdir('d', 0o300)\n    os.chdir('d')\n    open('f', 'w').write('x' * 9999)",
    ] {
        let outcome = writes(many).unwrap();
        expect(&outcome, Status::Killed, "");
        assert_eq!(outcome.reason.as_deref(), Some("it kept more than 1048576 bytes in files"));
    }
    // A folder that cannot be listed is removed all the same.
    expect(&writes("import os\nos.mkdir('d', 0o300)\nopen('d/x', 'w')\nprint('left')").unwrap(), Status::Ok, "left\n");
}

#[test]
fn no_process_and_no_thread_begins() {
    if is_skipped() {
        return;
    }
    all_fail(&[
        "os.fork()",
        "os.vfork() if hasattr(os, 'vfork') else os.fork()",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.setsid()",
    ]);
    expect_python("import os\nwhile True:\n    try: os.fork()\n    except OSError: break\nprint('one')", Status::Ok, "one\n");
    let spawn = "import subprocess\ntry:\n    subprocess.run(['/bin/echo', 'x'])\n    print('did')\nexcept OSError: print('ended')";
    expect_python(spawn, Status::Ok, "ended\n");
    let thread =
        "import threading\ntry:\n    threading.Thread(target=print).start()\n    print('did')\nexcept RuntimeError: print('ended')";
    expect_python(thread, Status::Ok, "ended\n");
    all_fail(&["os.execv('/bin/sh', ['sh', '-c', 'echo x'])", "os.execv('/usr/bin/env', ['env'])"]);
}

#[test]
fn other_processes_are_out_of_reach() {
    if is_skipped() {
        return;
    }
    let parent = std::process::id();
    let (kill, group, priority) =
        (format!("os.kill({parent}, 9)"), "os.kill(-1, 9)".to_string(), format!("os.setpriority(0, {parent}, 19)"));
    all_fail(&[&kill, "os.kill(os.getppid(), 9)", &group, "os.killpg(0, 9)", &priority, "os.setpgid(0, 0)"]);
    let limits = format!("import resource\ntry:\n    resource.prlimit({parent}, resource.RLIMIT_CPU, (1, 1))\n    print('did')\n");
    expect_python(&format!("{limits}except OSError: print('ended')"), Status::Ok, "ended\n");
    let own = "import resource\ntry:\n    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))\n    print('did')\nexcept (OSError, ValueError): print('ended')";
    expect_python(own, Status::Ok, "ended\n");
    // Signals through a descriptor, and to itself.
    let fcntl = format!("import fcntl, os\nr, w = os.pipe()\ntry:\n    fcntl.fcntl(r, fcntl.F_SETOWN, {parent})\n    print('did')\n");
    expect_python(&format!("{fcntl}except OSError: print('ended')"), Status::Ok, "ended\n");
    if let Some(outcome) = python("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)") {
        expect(&outcome, Status::Killed, "");
        assert_eq!(outcome.reason.as_deref(), Some("SIGTERM ended it"));
    }
}

#[test]
fn no_byte_leaves_by_a_network() {
    if is_skipped() {
        return;
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    let program = "import socket\nkinds = [(socket.AF_INET, socket.SOCK_STREAM), (socket.AF_INET, socket.SOCK_DGRAM),\
        (socket.AF_INET6, socket.SOCK_STREAM), (socket.AF_UNIX, socket.SOCK_STREAM), (16, socket.SOCK_RAW), (40, socket.SOCK_STREAM)]\n\
        for family, kind in kinds:\n    try:\n        socket.socket(family, kind)\n        print('did')\n    except OSError: print('ended')\n\
        try:\n    socket.socketpair()\n    print('did')\nexcept OSError: print('ended')\n\
        try:\n    socket.create_connection(('127.0.0.1', PORT))\n    print('did')\nexcept OSError: print('ended')\n";
    expect_python(&program.replace("PORT", &port.to_string()), Status::Ok, &"ended\n".repeat(8));
    assert_eq!(listener.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
}

#[test]
fn the_system_itself_is_out_of_reach() {
    if is_skipped() {
        return;
    }
    // By number, past the names that Python has: io_uring_setup, ptrace, unshare, bpf, perf_event_open, keyctl, userfaultfd, shmget.
    if !cfg!(target_arch = "x86_64") {
        return;
    }
    let program = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n\
        for number in [425, 101, 272, 321, 298, 250, 323, 29, 435, 56, 57, 58, 310, 434, 424]:\n\
        \x20   if libc.syscall(number, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() != 1: print('did', number, ctypes.get_errno())\n\
        print('end')\n";
    let Some(outcome) = python(program) else { return };
    if String::from_utf8_lossy(&outcome.stderr).contains("ModuleNotFoundError") {
        eprintln!("skipped: this python3 has no ctypes");
        return;
    }
    expect(&outcome, Status::Ok, "end\n");
}

#[test]
fn floods_are_cut_off() {
    if is_skipped() {
        return;
    }
    let flood = |outcome: Outcome, out: usize, err: usize| {
        assert_eq!((outcome.status, outcome.stdout.len(), outcome.stderr.len()), (Status::Killed, out, err), "{:?}", outcome.reason);
        assert_eq!(outcome.reason.as_deref(), Some("it wrote more than 65536 bytes"));
    };
    flood(lua("while true do print('flood') end"), 65536, 0);
    // Exactly the limit is no flood.
    let full = lua("io.write(('x'):rep(65536))");
    assert_eq!((full.status, full.stdout.len()), (Status::Ok, 65536));
    flood(lua("io.write(('x'):rep(65537))"), 65536, 0);
    if let Some(outcome) = python("import sys\nwhile True: sys.stderr.write('flood' * 1000)") {
        flood(outcome, 0, 65536);
    }
    // What is given and not read blocks nobody.
    let mut deaf = job(Language::Lua, "print('done')");
    deaf.stdin = vec![b'x'; 8 << 20];
    expect(&end(&deaf), Status::Ok, "done\n");
}

#[test]
fn a_first_line_of_its_own_is_not_taken_for_the_sandbox() {
    if is_skipped() {
        return;
    }
    let claims = "import sys\nprint('{\"missing\":[\"all\"],\"begins\":true}', file=sys.stderr)";
    if let Some(outcome) = python(claims) {
        expect(&outcome, Status::Ok, "");
        assert!(outcome.stderr.starts_with(b"{\"missing\":[\"all\"]"));
    }
}

/// A script that runs one program, and prints how that ended.
const SCRIPT: &str = "local engine = require 'engine'
    return engine.workflow { name = 's', args = { program = engine.required 'string', language = 'lua', seconds = 20.0, weaker = false },
      run = function(_, args)
        local result = engine.sandbox.run { program = args.program, language = args.language, seconds = args.seconds, allow_weaker = args.weaker }
        print(result.status, result.stdout, result.reason, #result.missing, result.missing[1])
      end }";

/// `perilune run` of [`SCRIPT`] in `folder`.
fn script(folder: &Path, args: &[&str]) -> Command {
    std::fs::write(folder.join("s.lua"), SCRIPT).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_perilune"));
    command.current_dir(folder).args(["run", "--quiet", "--runs", "runs", "s.lua"]).args(args);
    command
}

#[test]
fn what_the_kernel_does_not_grant_is_told() {
    if is_skipped() {
        return;
    }
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    for wall in ["descriptors", "limits", "files", "calls"] {
        let point = format!("sandbox_{wall}=error");
        let run = |args: &[&str]| {
            let output = script(folder.path(), args).env("PERILUNE_FAILPOINT", &point).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap()
        };
        let refused = run(&["--program", "print 'ran'"]);
        assert!(refused.starts_with("refused\t\tthis system cannot hold a program as it should"), "{refused}");
        assert!(refused.contains(&format!("({wall}: failpoint")) && refused.contains("allow_weaker = true"), "{refused}");
        let weaker = run(&["--program", "print 'ran'", "--weaker"]);
        assert!(weaker.starts_with("ok\tran\n\tnil\t1\t") && weaker.contains(&format!("{wall}: ")), "{weaker}");
    }
    // Weaker by one wall, the others stand; and what it starts is killed with it.
    if find_python().is_none() {
        eprintln!("skipped: no python3 on this machine");
        return;
    }
    let program = "import os, time\nif os.fork() == 0:\n    time.sleep(77)\ntry: open('/etc/passwd')\nexcept OSError: print('ended')";
    let args = ["--language", "python", "--weaker", "--program", program];
    let output = script(folder.path(), &args).env("PERILUNE_FAILPOINT", "sandbox_calls=error").output().unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("ok\tended\n"), "{output:?}");
}

#[test]
fn a_program_goes_with_its_caller() {
    if is_skipped() {
        return;
    }
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    // Ctrl-C, which the caller hears, and SIGKILL, which it does not.
    for signal in [Signal::SIGINT, Signal::SIGKILL] {
        let mut command = script(folder.path(), &["--program", "while true do end", "--seconds", "600"]);
        let mut caller = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let of_caller = format!("\"parent\":{},", caller.id());
        let running = || {
            let folders = std::fs::read_dir("/proc").unwrap().flatten();
            let lines = folders.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
            lines.filter(|line| String::from_utf8_lossy(line).contains(&of_caller)).count()
        };
        let wait_for = |count: usize| {
            let started = Instant::now();
            while running() != count {
                assert!(started.elapsed() < Duration::from_secs(60), "{} programs run, {count} should", running());
                std::thread::sleep(Duration::from_millis(20));
            }
        };
        wait_for(1);
        let started = Instant::now();
        kill(Pid::from_raw(caller.id() as i32), signal).unwrap();
        assert!(!caller.wait().unwrap().success());
        assert!(started.elapsed() < Duration::from_secs(30));
        wait_for(0);
    }
}

#[test]
fn what_the_caller_inherited_is_closed() {
    if is_skipped() {
        return;
    }
    if find_python().is_none() {
        eprintln!("skipped: no python3 on this machine");
        return;
    }
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("open"), "").unwrap();
    let program = "import os\ntry: os.write(7, b'x')\nexcept OSError: print('closed')";
    let command = script(folder.path(), &["--language", "python", "--program", program]);
    let mut shell = Command::new("sh");
    shell.current_dir(folder.path()).args(["-c", "exec 7>open; exec \"$0\" \"$@\""]).arg(command.get_program()).args(command.get_args());
    let output = shell.output().unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("ok\tclosed\n"), "{output:?}");
    assert_eq!(std::fs::read_to_string(folder.path().join("open")).unwrap(), "");
}

#[test]
fn a_batch_keeps_its_order_and_its_options_are_checked() {
    if is_skipped() {
        return;
    }
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let mut file = std::fs::File::create(folder.path().join("batch.lua")).unwrap();
    file.write_all(
        b"local sandbox = require('engine').sandbox
        local list = {}
        for i = 1, 9 do list[i] = { program = ('for _ = 1, %d do end print(%d)'):format((10 - i) * 100000, i) } end
        list[5].program = 'error(\"five\")'
        for i, result in ipairs(sandbox.run_all(list, { jobs = 3 })) do list[i] = i .. result.status .. result.stdout:gsub('\\n', '') end
        print(table.concat(list, ' '), #sandbox.run_all {})
        for _, bad in ipairs {
          function() sandbox.run { } end, function() sandbox.run { program = '', seconds = 0 } end,
          function() sandbox.run { program = '', language = 'ruby' } end, function() sandbox.run { program = '', memry_mb = 9 } end,
          function() sandbox.run { program = '', memory_mb = 1 } end, function() sandbox.run_all({ 1 }) end,
          function() sandbox.run_all({}, { jobs = 0 }) end,
        } do print((select(2, pcall(bad)))) end",
    )
    .unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_perilune"))
        .current_dir(folder.path())
        .args(["run", "--quiet", "--runs", "runs", "batch.lua"])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.starts_with("1ok1 2ok2 3ok3 4ok4 5error 6ok6 7ok7 8ok8 9ok9\t0\n"), "{text}");
    for part in [
        "sandbox.run: `program` should be given, got nil",
        "sandbox.run: `seconds` should be a number above 0, at most 3600, got 0.0",
        "sandbox.run: `language` should be lua or python, got ruby",
        "`memry_mb`; did you mean `memory_mb`?",
        "sandbox.run: `memory_mb` should be an integer of at least 32, got 1",
        "sandbox.run_all: `list` should be a list of tables of options, as of engine.sandbox.run, got an entry that is 1",
        "sandbox.run_all: `jobs` should be an integer of at least 1, got 0",
    ] {
        assert!(text.contains(part), "{part}\n{text}");
    }
}

#[test]
fn rewards_by_programs_run_their_tests() {
    if is_skipped() {
        return;
    }
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let script = r#"local rewards = require "std.rewards"
        local echo = { tests = { { stdin = "1\n2\n", stdout = "1\n2" }, { stdin = "x", stdout = "x\n" }, { code = "print 'end'", stdin = "", stdout = "end" } } }
        local asserts = { tests = { "assert(f(1) == 2)", "assert(f(2) == 3)" } }
        local rollouts = {
          texts = { "for line in io.lines() do print(line) end", "```lua\nf = function(x) return x + 1 end\n```", "f = function() return 2 end", "", "f = (" },
          records = { echo, asserts, asserts, asserts, asserts },
        }
        print(table.concat(rewards.score(rollouts, rewards.programs()):to_table(), " "))
        print(table.concat(rewards.score(rollouts, rewards.programs { all = true }):to_table(), " "))
        -- As a part of others, all at once; and as a plain function.
        local both = rewards.combine { { rewards.programs(), name = "tests" }, { function(text) return #text end, weight = 0, name = "size" } }
        local scores, means = rewards.score(rollouts, both)
        print(table.concat(scores:to_table(), " "), means.tests, means.size, both(rollouts.texts[3], asserts, {}))
        print((select(2, pcall(rewards.score, { texts = { "x" }, records = { {} } }, rewards.programs()))))
        print((select(2, pcall(rewards.score, { texts = { "x = 1" }, records = { { tests = { { input = "1", output = "1" } } } } }, rewards.programs()))))
        print((select(2, pcall(rewards.programs, { language = "lua", second = 1 }))))"#;
    std::fs::write(folder.path().join("programs.lua"), script).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_perilune"));
    let output = command.current_dir(folder.path()).args(["run", "--quiet", "--runs", "runs", "programs.lua"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[..2], ["1.0 1.0 0.5 0.0 0.0", "1.0 1.0 0.0 0.0 0.0"], "{text}");
    assert_eq!(lines[2], "1.0 1.0 0.5 0.0 0.0\t0.5\t23.2\t0.5", "{text}");
    assert!(lines[3].contains("std.rewards.programs: the record has no `tests`"), "{text}");
    assert!(lines[4].contains("`code` or `stdout` to check; test 1 has neither"), "{text}");
    assert!(lines[5].contains("got `second`"), "{text}");
}
