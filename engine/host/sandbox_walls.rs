//! What a process takes from itself before it runs a program that a model wrote: memory, time, files, and all calls of the system
//! that such a program has no need of. Nothing here can be given back, so only the sandbox's own process comes here
//! (`sandbox_child.rs`). What the kernel does not grant is told, never passed over.
//!
//! - limits (setrlimit): address space, seconds of processor, bytes of a file, open files
//! - files (Landlock): what is not listed can be neither read nor written nor run, whoever the user is
//! - calls (seccomp): a list of what is allowed. Not on it: new processes and threads, sockets, signals to others, changes of owners,
//!   modes and times of files (which Landlock does not see), shared memory (which no limit counts), and everything that manages a system
//!
//! One process without children needs no hunt for grandchildren: when it is killed, all of the program is gone.
//! Sources: landlock(7), seccomp(2), setrlimit(2).

use crate::failpoint::failpoint;
use std::path::PathBuf;

/// What a program may use.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Bytes of address space.
    pub memory_bytes: u64,
    /// Bytes of one file that it writes.
    pub file_bytes: u64,
    /// Seconds of processor; the wall clock is the caller's affair.
    pub seconds: f64,
}

/// Which files a program may see, and whether it becomes another program.
#[derive(Clone, Debug, Default)]
pub struct Reach {
    /// Files and folders to read, and to run programs from. Those that do not exist are left out.
    pub readable: Vec<PathBuf>,
    /// Folders to write in.
    pub writable: Vec<PathBuf>,
    /// Whether the process starts an interpreter, once, in its own place.
    pub execs: bool,
}

/// Open files of a program: its three streams, its modules.
#[cfg(target_os = "linux")]
const OPEN_FILES_MAX: u64 = 64;
/// Seconds of processor above those of the wall clock, which ends a program first.
#[cfg(target_os = "linux")]
const SPARE_SECONDS: u64 = 1;

/// Raises all walls around this process, which must have one thread.
///
/// Returns what could not be raised, each with why.
pub fn raise_all(limits: &Limits, reach: &Reach) -> Vec<String> {
    let raised = [
        ("descriptors", failpoint("sandbox_descriptors").map_err(|error| error.to_string()).and_then(|()| close_inherited())),
        ("limits", failpoint("sandbox_limits").map_err(|error| error.to_string()).and_then(|()| raise_limits(limits))),
        ("files", failpoint("sandbox_files").map_err(|error| error.to_string()).and_then(|()| raise_files(reach))),
        // The last, since it also ends the calls that raise the others.
        ("calls", failpoint("sandbox_calls").map_err(|error| error.to_string()).and_then(|()| raise_calls(reach.execs))),
    ];
    raised.into_iter().filter_map(|(wall, result)| Some(format!("{wall}: {}", result.err()?))).collect()
}

/// Asks to be killed when the process `parent`, which started this one, ends. False if it has ended already.
#[cfg(target_os = "linux")]
pub fn end_with(parent: u32) -> bool {
    let asked = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL).is_ok();
    // Whoever ended before the line above sends no signal.
    asked && std::os::unix::process::parent_id() == parent
}

#[cfg(not(target_os = "linux"))]
pub fn end_with(parent: u32) -> bool {
    std::os::unix::process::parent_id() == parent
}

/// Closes what the caller's own caller left open: a program may write to what is open, wherever it lies.
#[cfg(target_os = "linux")]
fn close_inherited() -> Result<(), String> {
    let failed = |error: std::io::Error| error.to_string();
    let mut open = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd").map_err(failed)? {
        open.extend(entry.map_err(failed)?.file_name().to_string_lossy().parse::<i32>());
    }
    // The folder's own descriptor is in the list and closed by now; closing it again is an error without effect.
    for descriptor in open.into_iter().filter(|descriptor| *descriptor > 2) {
        let _ = nix::unistd::close(descriptor);
    }
    Ok(())
}

#[cfg(target_os = "linux")]
fn raise_limits(limits: &Limits) -> Result<(), String> {
    use nix::sys::resource::{Resource, setrlimit};
    let seconds = limits.seconds.ceil() as u64 + SPARE_SECONDS;
    let all = [
        (Resource::RLIMIT_AS, limits.memory_bytes, limits.memory_bytes),
        // The soft limit sends SIGXCPU, the hard one SIGKILL.
        (Resource::RLIMIT_CPU, seconds, seconds + SPARE_SECONDS),
        (Resource::RLIMIT_FSIZE, limits.file_bytes, limits.file_bytes),
        (Resource::RLIMIT_NOFILE, OPEN_FILES_MAX, OPEN_FILES_MAX),
        (Resource::RLIMIT_MEMLOCK, 0, 0),
        (Resource::RLIMIT_CORE, 0, 0),
    ];
    all.into_iter().try_for_each(|(resource, soft, hard)| {
        setrlimit(resource, soft, hard).map_err(|error| format!("{resource:?} cannot be set to {soft}: {error}"))
    })
}

#[cfg(target_os = "linux")]
fn raise_files(reach: &Reach) -> Result<(), String> {
    use landlock::{
        ABI, Access, AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus, path_beneath_rules,
    };
    // The first version suffices beside the list of calls, which has neither truncate nor link; newer ones add to it.
    let (least, wanted) = (ABI::V1, ABI::V5);
    let raise = || -> Result<RulesetStatus, landlock::RulesetError> {
        let rules = Ruleset::default()
            .set_compatibility(CompatLevel::HardRequirement)
            .handle_access(AccessFs::from_all(least))?
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(wanted))?
            .create()?
            .add_rules(path_beneath_rules(&reach.readable, AccessFs::from_read(wanted)))?
            .add_rules(path_beneath_rules(&reach.writable, AccessFs::from_read(wanted) | AccessFs::from_write(wanted)))?;
        Ok(rules.restrict_self()?.ruleset)
    };
    match raise() {
        Ok(RulesetStatus::NotEnforced) => Err("this kernel has no Landlock, which Linux has since 5.13".into()),
        Ok(_) => Ok(()),
        Err(error) => Err(format!("Landlock cannot be used: {error}; Linux has it since 5.13, unless it is switched off")),
    }
}

#[cfg(target_os = "linux")]
fn raise_calls(execs: bool) -> Result<(), String> {
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
    let denied = SeccompAction::Errno(nix::libc::EPERM as u32);
    let rules = allowed_calls(execs).map_err(|error| error.to_string())?;
    let program = std::env::consts::ARCH
        .try_into()
        .and_then(|arch| SeccompFilter::new(rules, denied, SeccompAction::Allow, arch))
        .and_then(BpfProgram::try_from)
        .map_err(|error| error.to_string())?;
    seccompiler::apply_filter(&program).map_err(|error| format!("seccomp cannot be used: {error}"))
}

/// What a program may ask of the system: by number, with the arguments that are allowed, where not all are.
#[cfg(target_os = "linux")]
fn allowed_calls(execs: bool) -> Result<std::collections::BTreeMap<i64, Vec<seccompiler::SeccompRule>>, seccompiler::BackendError> {
    use nix::libc as c;
    use seccompiler::{SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, SeccompCondition, SeccompRule};
    let mut calls: Vec<i64> = vec![
        // Bytes in and out, through what is open.
        c::SYS_read,
        c::SYS_write,
        c::SYS_readv,
        c::SYS_writev,
        c::SYS_pread64,
        c::SYS_pwrite64,
        c::SYS_preadv,
        c::SYS_pwritev,
        c::SYS_lseek,
        c::SYS_close,
        c::SYS_close_range,
        c::SYS_dup,
        c::SYS_dup3,
        c::SYS_pipe2,
        c::SYS_ppoll,
        c::SYS_pselect6,
        c::SYS_fsync,
        c::SYS_fdatasync,
        c::SYS_ftruncate,
        // Names of files; Landlock says which.
        c::SYS_openat,
        c::SYS_openat2,
        c::SYS_fstat,
        c::SYS_newfstatat,
        c::SYS_statx,
        c::SYS_faccessat,
        c::SYS_faccessat2,
        c::SYS_readlinkat,
        c::SYS_getdents64,
        c::SYS_getcwd,
        c::SYS_chdir,
        c::SYS_fchdir,
        c::SYS_mkdirat,
        c::SYS_unlinkat,
        c::SYS_renameat,
        c::SYS_renameat2,
        // Memory; the limit of address space counts it.
        c::SYS_brk,
        c::SYS_mmap,
        c::SYS_munmap,
        c::SYS_mprotect,
        c::SYS_mremap,
        c::SYS_madvise,
        // Clocks, random bytes, itself.
        c::SYS_clock_gettime,
        c::SYS_clock_getres,
        c::SYS_clock_nanosleep,
        c::SYS_nanosleep,
        c::SYS_gettimeofday,
        c::SYS_times,
        c::SYS_getitimer,
        c::SYS_setitimer,
        c::SYS_getrusage,
        c::SYS_getrandom,
        c::SYS_getpid,
        c::SYS_getppid,
        c::SYS_gettid,
        c::SYS_getuid,
        c::SYS_geteuid,
        c::SYS_getgid,
        c::SYS_getegid,
        c::SYS_uname,
        c::SYS_sysinfo,
        c::SYS_umask,
        c::SYS_sched_yield,
        c::SYS_sched_getaffinity,
        c::SYS_futex,
        c::SYS_membarrier,
        c::SYS_rseq,
        c::SYS_set_robust_list,
        c::SYS_set_tid_address,
        c::SYS_rt_sigaction,
        c::SYS_rt_sigprocmask,
        c::SYS_rt_sigreturn,
        c::SYS_rt_sigpending,
        c::SYS_rt_sigtimedwait,
        c::SYS_sigaltstack,
        c::SYS_restart_syscall,
        c::SYS_exit,
        c::SYS_exit_group,
    ];
    #[cfg(target_arch = "x86_64")]
    calls.extend([
        c::SYS_arch_prctl,
        c::SYS_open,
        c::SYS_stat,
        c::SYS_lstat,
        c::SYS_access,
        c::SYS_readlink,
        c::SYS_dup2,
        c::SYS_pipe,
        c::SYS_poll,
        c::SYS_select,
        c::SYS_mkdir,
        c::SYS_rmdir,
        c::SYS_unlink,
        c::SYS_rename,
        c::SYS_time,
        c::SYS_alarm,
        c::SYS_getrlimit,
    ]);
    if execs {
        calls.push(c::SYS_execve);
    }
    let own = u64::from(std::process::id());
    // By call: the argument that is looked at, and its values.
    let some: Vec<(i64, u8, Vec<u64>)> = vec![
        // Signals to itself only.
        (c::SYS_kill, 0, vec![own]),
        (c::SYS_tgkill, 0, vec![own]),
        // Limits can be read; the third argument would set them.
        (c::SYS_prlimit64, 2, vec![0]),
        // No F_SETOWN, which sends signals, and no F_SETPIPE_SZ.
        (c::SYS_fcntl, 1, [c::F_DUPFD, c::F_GETFD, c::F_SETFD, c::F_GETFL, c::F_SETFL, c::F_DUPFD_CLOEXEC].map(|x| x as u64).to_vec()),
        (c::SYS_ioctl, 1, vec![c::TCGETS, c::TIOCGWINSZ, c::FIOCLEX, c::FIONCLEX, c::FIONREAD, c::FIONBIO]),
        // Names of threads and of memory.
        (c::SYS_prctl, 0, vec![c::PR_SET_NAME as u64, c::PR_GET_NAME as u64, c::PR_SET_VMA as u64]),
    ];
    let mut rules: std::collections::BTreeMap<i64, Vec<SeccompRule>> = calls.into_iter().map(|call| (call, Vec::new())).collect();
    for (call, argument, values) in some {
        for value in values {
            // Eq with 64 bits where a pointer is compared, with 32 where the C type is an int.
            let length = if call == c::SYS_prlimit64 { seccompiler::SeccompCmpArgLen::Qword } else { Dword };
            let rule = SeccompRule::new(vec![SeccompCondition::new(argument, length, Eq, value)?])?;
            rules.entry(call).or_default().push(rule);
        }
    }
    Ok(rules)
}

#[cfg(not(target_os = "linux"))]
fn close_inherited() -> Result<(), String> {
    Err(ONLY_LINUX.into())
}

#[cfg(not(target_os = "linux"))]
fn raise_limits(_: &Limits) -> Result<(), String> {
    Err(ONLY_LINUX.into())
}

#[cfg(not(target_os = "linux"))]
fn raise_files(_: &Reach) -> Result<(), String> {
    Err(ONLY_LINUX.into())
}

#[cfg(not(target_os = "linux"))]
fn raise_calls(_: bool) -> Result<(), String> {
    Err(ONLY_LINUX.into())
}

#[cfg(not(target_os = "linux"))]
const ONLY_LINUX: &str = "only built for Linux";
