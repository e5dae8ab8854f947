//! The CUDA kernels, and models and runs on them, against the CPU's. On a machine with a GPU they run on it; without one their
//! sources are compiled by the C++ compiler and executed by the emulator of tests/emulator, each twice: with threads in
//! ascending and in descending order, which must not change a bit. Either way launchers, allocator and cache are the real ones.
//! `PERILUNE_GPU=emulated` takes the emulator in any case. `cargo test --release --test gpu` says which it was.

mod adapters;
mod attention;
mod decode;
mod elements;
mod experts;
#[path = "../fixtures/mod.rs"]
mod fixtures;
mod generic;
#[path = "../fixtures/tensor_ops.rs"]
mod golden_tensor_ops;
mod graph;
mod int8;
mod looking;
mod memory;
mod model;
mod optimizer;
mod paged;
mod product;
mod room;
mod rows;
mod run;
mod sample;
mod tensor_ops;
#[path = "../fixtures/training.rs"]
mod training;
mod workflows;

use half::bf16;
use perilune::kernels::cuda::device::{Device, Settings};
use perilune::kernels::cuda::memory::DeviceBuffer;
use perilune::kernels::cuda_probe::{Absence, probe};
use perilune::kernels::element::{Element, Float};
use std::ffi::{CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};

unsafe extern "C" {
    fn dlopen(path: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
}

/// How the emulated device is opened: so that it sees each access beyond the end of a buffer, and its code is not kept.
pub const EMULATED: Settings = Settings { size_classes: false, memory_bytes_max: usize::MAX, keeps_kernels: false };

/// What the tests run on.
pub struct Bench {
    pub device: Arc<Device>,
    set_order: Option<extern "C" fn(c_int)>,
    graph_launches: Option<extern "C" fn() -> u64>,
    waits: Option<extern "C" fn() -> u64>,
}

/// The device of all tests, or none, with the reason printed, where there is neither a GPU nor a C++ compiler.
pub fn bench() -> Option<&'static Bench> {
    static BENCH: OnceLock<Option<Bench>> = OnceLock::new();
    BENCH.get_or_init(open).as_ref()
}

fn open() -> Option<Bench> {
    let emulated = std::env::var("PERILUNE_GPU").is_ok_and(|value| value == "emulated");
    if !emulated {
        match probe() {
            Ok(_) => {
                let device = Device::open(0).unwrap();
                announce(&format!("on {} (compute capability {:?})", device.name, device.capability));
                return Some(Bench { device, set_order: None, graph_launches: None, waits: None });
            }
            Err(Absence::NoDriver) => {}
            // The driver's library stays loaded, so the emulator could not take its name any more.
            Err(absence) => {
                announce(&format!("nowhere: SKIPPED, {}; PERILUNE_GPU=emulated emulates them", absence.reason()));
                return None;
            }
        }
    }
    let Some(driver) = build_emulator() else {
        announce("nowhere: SKIPPED, there is no GPU, and no g++ on x86-64 to build the emulator with");
        return None;
    };
    // SAFETY: the emulator's driver has functions of these names and types.
    let (set_order, graph_launches, waits) = unsafe {
        (
            std::mem::transmute::<*mut c_void, extern "C" fn(c_int)>(dlsym(driver, c"emulator_set_order".as_ptr())),
            std::mem::transmute::<*mut c_void, extern "C" fn() -> u64>(dlsym(driver, c"emulator_graph_launches".as_ptr())),
            std::mem::transmute::<*mut c_void, extern "C" fn() -> u64>(dlsym(driver, c"emulator_waits".as_ptr())),
        )
    };
    let device = Device::open_with(0, EMULATED).unwrap();
    announce("emulated on the CPU; no GPU was used");
    Some(Bench { device, set_order: Some(set_order), graph_launches: Some(graph_launches), waits: Some(waits) })
}

fn announce(what: &str) {
    // Past the capture of the test harness, so that it is always seen.
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "the CUDA kernels run {what}");
}

/// Builds the emulator's driver and compiler in the folder `libraries`, under the names by which the engine looks for NVIDIA's.
/// False where there is no compiler for it.
pub fn build_libraries(libraries: &Path) -> bool {
    if !cfg!(all(target_arch = "x86_64", target_os = "linux")) {
        return false;
    }
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/emulator");
    let work = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("emulator");
    std::fs::create_dir_all(&work).unwrap();
    std::fs::create_dir_all(libraries).unwrap();
    // Renamed into place: others may be compiling with it.
    let shim = work.join(format!("shim.{}.{:?}.h", std::process::id(), std::thread::current().id()));
    std::fs::copy(sources.join("shim.h"), &shim).unwrap();
    std::fs::rename(shim, work.join("shim.h")).unwrap();
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".into());
    for (source, library) in [("nvrtc.cpp", "libnvrtc.so.13"), ("driver.cpp", "libcuda.so.1")] {
        let built = Command::new(&compiler)
            .args(["-std=c++17", "-O2", "-fPIC", "-shared", &format!("-Wl,-soname,{library}")])
            .arg(format!("-DEMULATOR_FOLDER=\"{}\"", work.display()))
            .arg(sources.join(source))
            .args(["-ldl", "-o"])
            .arg(libraries.join(library))
            .output();
        let Ok(built) = built else { return false };
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    }
    true
}

/// Builds the emulator and loads it.
fn build_emulator() -> Option<*mut c_void> {
    let folder = tempfile::tempdir().unwrap();
    let libraries = folder.path();
    if !build_libraries(libraries) {
        return None;
    }
    let mut driver = std::ptr::null_mut();
    for library in ["libnvrtc.so.13", "libcuda.so.1"] {
        let path = CString::new(libraries.join(library).to_str().unwrap()).unwrap();
        // SAFETY: our own library. RTLD_NOW | RTLD_GLOBAL: kernels find the driver's functions in it.
        driver = unsafe { dlopen(path.as_ptr(), 0x102) };
        assert!(!driver.is_null(), "{library} cannot be loaded");
    }
    Some(driver)
}

impl Bench {
    /// The same device once more, with a memory of its own that no other test takes from.
    pub fn apart(&self) -> Arc<Device> {
        if self.is_emulated() { Device::open_with(0, EMULATED).unwrap() } else { Device::open(0).unwrap() }
    }

    /// Whether there is no GPU: shapes stay small then.
    pub fn is_emulated(&self) -> bool {
        self.set_order.is_some()
    }

    /// Launches of captured graphs so far, all tests together; none on a GPU, which does not count them.
    pub fn graph_launches(&self) -> Option<u64> {
        self.graph_launches.map(|count| count())
    }

    /// How often this thread waits for the device in `work`; none on a GPU, which does not count that.
    pub fn waits_in<T>(&self, work: impl FnOnce() -> T) -> (T, Option<u64>) {
        let before = self.waits.map(|count| count());
        let result = work();
        (result, self.waits.map(|count| count() - before.expect("it is counted in both")))
    }

    /// Runs `compute`; on the emulator in both orders of threads, which must give the same bits.
    pub fn run<T: PartialEq + std::fmt::Debug>(&self, compute: impl Fn(&Arc<Device>) -> T) -> T {
        let first = compute(&self.device);
        if let Some(set_order) = self.set_order {
            set_order(1);
            let second = compute(&self.device);
            set_order(0);
            assert!(first == second, "the result depends on the order in which threads run");
        }
        first
    }

    /// A copy of host memory.
    pub fn upload<E: bytemuck::Pod>(&self, values: &[E]) -> DeviceBuffer<E> {
        DeviceBuffer::copy_of(&self.device, "test", values).unwrap()
    }

    /// A buffer that holds NaN until it is written.
    pub fn poisoned<E: bytemuck::Pod>(&self, len: usize) -> DeviceBuffer<E> {
        let mut buffer = DeviceBuffer::scratch(&self.device, "test", len).unwrap();
        buffer.fill_bytes(0xff).unwrap();
        buffer
    }
}

/// `count` values spread over [-1, 1) that bf16 holds exactly, the same for the same seed (splitmix64).
pub fn uniform<E: Float>(seed: u64, count: usize) -> Vec<E> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..count)
        .map(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            let value = ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
            E::from_f32(bf16::from_f32(value).to_f32())
        })
        .collect()
}

/// A tolerance for `E`: `f32` for f32, `bf16` for bf16.
pub fn tolerance<E: Float>(f32: f32, bf16: f32) -> f32 {
    if size_of::<E>() == 4 { f32 } else { bf16 }
}

/// Asserts |got - want| <= by * (1 + |want|) for each value; NaN never passes.
#[track_caller]
pub fn assert_close<E: Element>(what: &str, got: &[E], want: &[E], by: f32) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (index, (got, want)) in got.iter().zip(want).enumerate() {
        let (got, want) = (got.to_f32(), want.to_f32());
        assert!((got - want).abs() <= by * (1.0 + want.abs()), "{what}[{index}]: got {got}, the CPU has {want}");
    }
}

/// Asserts that the bits are the same.
#[track_caller]
pub fn assert_same<E: Element>(what: &str, got: &[E], want: &[E]) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (index, (got, want)) in got.iter().zip(want).enumerate() {
        assert!(got == want, "{what}[{index}]: {got:?} and {want:?}");
    }
}
