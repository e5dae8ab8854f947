//! Every CUDA kernel compiled by NVIDIA's own compiler for Ampere and for Hopper, without a GPU: each must compile, and the
//! assembler must neither have to keep registers in memory nor let asynchronous products wait for each other. The table of
//! registers goes to `target/tmp/gpu_kernels.txt`.
//! NVRTC is taken from `$PERILUNE_NVRTC`, or brought from PyPI by tests/nvrtc.sh; without network the test says that it skips.

use perilune::kernels::cuda::compile::{Target, compile_anew};
use perilune::kernels::cuda::program::{self, Variant};
use std::ffi::{CString, c_char, c_int, c_void};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

unsafe extern "C" {
    fn dlopen(path: *const c_char, flags: c_int) -> *mut c_void;
}

/// Bytes of registers that a thread may keep in memory: a few that are touched once a kernel.
const SPILLED_BYTES_MAX: u32 = 64;

/// What the assembler says about one kernel.
struct Usage {
    title: String,
    architecture: String,
    kernel: String,
    registers: u32,
    stack: u32,
    spilled: u32,
}

/// Where NVRTC is, or none.
fn nvrtc() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("PERILUNE_NVRTC") {
        return Some(PathBuf::from(path));
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("nvrtc");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/nvrtc.sh");
    let status = std::process::Command::new("bash").arg(script).arg(&folder).status();
    status.is_ok_and(|status| status.success()).then(|| folder.join("nvidia/cu13/lib/libnvrtc.so.13"))
}

fn load(path: &Path) {
    let name = CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: NVIDIA's compiler. RTLD_NOW | RTLD_GLOBAL: the engine finds it by its name.
    assert!(!unsafe { dlopen(name.as_ptr(), 0x102) }.is_null(), "{} cannot be loaded", path.display());
}

/// The number before `after` in a line of the assembler.
fn number_before(line: &str, after: &str) -> u32 {
    let before = &line[..line.find(after).unwrap_or_else(|| panic!("{after} in {line}"))];
    before.trim_end().rsplit(' ').next().unwrap().parse().unwrap()
}

fn usages(variant: &Variant, target: Target) -> Vec<Usage> {
    let compiled = compile_anew("test", variant, target).unwrap_or_else(|error| panic!("{error}"));
    assert!(compiled.image.starts_with(b"\x7fELF"), "machine code is an ELF file");
    // The assembler lets wgmma run one by one where it cannot follow their registers, and only says so.
    let serialized = compiled.log.lines().find(|line| line.contains("wgmma.mma_async instructions are serialized"));
    assert!(serialized.is_none(), "{}: {}", variant.title(), serialized.unwrap_or_default());
    let (mut found, mut kernel, mut stack, mut spilled) = (Vec::new(), String::new(), 0, 0);
    for line in compiled.log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            kernel = rest.split('\'').next().unwrap().to_owned();
        } else if line.contains("bytes stack frame") {
            stack = number_before(line, " bytes stack frame");
            spilled = number_before(line, " bytes spill stores");
        } else if line.contains("Used ") {
            let registers = number_before(line, " registers");
            let (title, architecture) = (variant.title(), target.architecture());
            found.push(Usage { title, architecture, kernel: kernel.clone(), registers, stack, spilled });
        }
    }
    assert!(!found.is_empty(), "{}: the assembler says nothing: {}", variant.title(), compiled.log);
    found
}

#[test]
fn all_kernels_compile_for_ampere_and_hopper() {
    let Some(path) = nvrtc() else {
        eprintln!("SKIPPED: NVRTC could not be brought by tests/nvrtc.sh; set PERILUNE_NVRTC to libnvrtc.so.13");
        return;
    };
    let folder = path.parent().unwrap();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap().to_string_lossy().starts_with("libnvrtc-builtins.so") {
            load(&path);
        }
    }
    load(&path);
    let mut work = Vec::new();
    for capability in [(8, 0), (9, 0)] {
        let target = Target { capability, driver_version: 13_000 };
        work.extend(program::variants(capability).into_iter().map(|variant| (variant, target)));
    }
    assert!(work.len() > 80, "{} programs", work.len());
    let (next, found) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some((variant, target)) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let usages = usages(variant, *target);
                    found.lock().unwrap().extend(usages);
                }
            });
        }
    });
    let mut found = found.into_inner().unwrap();
    found.sort_by(|a, b| (&a.architecture, &a.title, &a.kernel).cmp(&(&b.architecture, &b.title, &b.kernel)));
    let mut table = format!("{:<8} {:<28} registers  stack  spilled  program\n", "", "kernel");
    for usage in &found {
        let Usage { title, architecture, kernel, registers, stack, spilled } = usage;
        writeln!(table, "{architecture:<8} {kernel:<28} {registers:>9} {stack:>6} {spilled:>8}  {title}").unwrap();
    }
    let place = Path::new(env!("CARGO_TARGET_TMPDIR")).join("gpu_kernels.txt");
    std::fs::write(&place, &table).unwrap();
    println!("{table}");
    eprintln!("{} kernels compiled; registers are listed in {}", found.len(), place.display());
    let spills: Vec<String> = (found.iter().filter(|usage| usage.spilled > SPILLED_BYTES_MAX))
        .map(|usage| format!("{} {} {}: {} bytes", usage.architecture, usage.title, usage.kernel, usage.spilled))
        .collect();
    assert!(spills.is_empty(), "registers are kept in memory:\n{}", spills.join("\n"));
}
