//! Kernels from source to machine code by NVRTC, which is loaded when it is first needed, with a cache on disk. An entry
//! of the cache holds everything that it was made from and is used only if all of it is the same.
//! Source: NVRTC user guide.

use super::program::{HEADERS, Variant};
use crate::error::{Error, Result};
use cudarc::nvrtc::sys as nvrtc;
use std::ffi::{CString, c_char};
use std::path::{Path, PathBuf};
use std::sync::Once;

/// What is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Major and minor number: 8.0 to 12.x.
    pub capability: (i32, i32),
    /// 13000 is CUDA 13.0.
    pub driver_version: i32,
}

impl Target {
    /// The name of the architecture. Hopper's own instructions need the `a`.
    pub fn architecture(self) -> String {
        let (major, minor) = self.capability;
        format!("sm_{major}{minor}{}", if self.capability == (9, 0) { "a" } else { "" })
    }
}

/// Machine code, and what the assembler said about registers.
#[derive(Clone, Debug)]
pub struct Compiled {
    pub image: Vec<u8>,
    pub log: String,
}

/// The machine code of a program, from the cache or from NVRTC.
///
/// Errors: [`Error::Device`] if NVRTC is missing, does not know the architecture, or refuses the source; with its log.
pub fn compile(op: &'static str, variant: &Variant, target: Target) -> Result<Compiled> {
    let key = cache_key(variant, target, nvrtc_version(op)?);
    let place = cache_folder().map(|folder| folder.join(format!("{:016x}.cubin", hash(key.as_bytes()))));
    if let Some(image) = place.as_ref().and_then(|place| read_cached(place, &key)) {
        return Ok(Compiled { image, log: String::new() });
    }
    let compiled = run_nvrtc(op, variant, target)?;
    if let Some(place) = place {
        // A cache that cannot be written costs the next start some seconds and nothing else.
        let _ = write_cached(&place, &key, &compiled.image);
    }
    Ok(compiled)
}

/// Compiles without looking at the cache: the assembler's log is part of the answer.
///
/// Errors: as [`compile`].
pub fn compile_anew(op: &'static str, variant: &Variant, target: Target) -> Result<Compiled> {
    load_nvrtc(op)?;
    run_nvrtc(op, variant, target)
}

fn options(variant: &Variant, target: Target) -> Vec<String> {
    let mut options = variant.options();
    options.push(format!("--gpu-architecture={}", target.architecture()));
    options.push("--ptxas-options=-v".into());
    options
}

fn run_nvrtc(op: &'static str, variant: &Variant, target: Target) -> Result<Compiled> {
    let (name, text) = variant.program.source();
    let c_text = |text: &str| CString::new(text).expect("sources have no zero byte");
    let (text, name) = (c_text(text), c_text(name));
    let (header_names, header_texts): (Vec<_>, Vec<_>) = HEADERS.iter().map(|(name, text)| (c_text(name), c_text(text))).unzip();
    let options: Vec<CString> = options(variant, target).iter().map(|option| c_text(option)).collect();
    let pointers = |texts: &[CString]| texts.iter().map(|text| text.as_ptr()).collect::<Vec<*const c_char>>();
    let (names, texts, options) = (pointers(&header_names), pointers(&header_texts), pointers(&options));
    let mut program = std::ptr::null_mut();
    // SAFETY: all strings are C strings that live until the program is destroyed, and the counts are those of the arrays.
    let code = unsafe {
        nvrtc::nvrtcCreateProgram(&mut program, text.as_ptr(), name.as_ptr(), names.len() as i32, texts.as_ptr(), names.as_ptr())
    };
    check(op, "nvrtcCreateProgram", code)?;
    // SAFETY: as above.
    let code = unsafe { nvrtc::nvrtcCompileProgram(program, options.len() as i32, options.as_ptr()) };
    let result = outcome(op, variant, target, program, code);
    // SAFETY: the program was created above and is not used after this.
    unsafe { nvrtc::nvrtcDestroyProgram(&mut program) };
    result
}

fn outcome(
    op: &'static str,
    variant: &Variant,
    target: Target,
    program: nvrtc::nvrtcProgram,
    code: nvrtc::nvrtcResult,
) -> Result<Compiled> {
    let mut log_bytes = 0;
    // SAFETY: the program lives; one size is written.
    check(op, "nvrtcGetProgramLogSize", unsafe { nvrtc::nvrtcGetProgramLogSize(program, &mut log_bytes) })?;
    let mut log = vec![0u8; log_bytes];
    // SAFETY: the log has room for as many bytes as were asked for.
    check(op, "nvrtcGetProgramLog", unsafe { nvrtc::nvrtcGetProgramLog(program, log.as_mut_ptr().cast()) })?;
    let log = String::from_utf8_lossy(&log).trim_end_matches('\0').trim().to_owned();
    if code != nvrtc::nvrtcResult::NVRTC_SUCCESS {
        let what = format!(
            "{} does not compile for {} ({code:?}), which is a fault of the engine or of this NVRTC: another release of NVRTC may do, and \
             device = \"cpu\" needs none; it says:\n{log}",
            variant.title(),
            target.architecture()
        );
        return Err(Error::Device { op, what });
    }
    let mut bytes = 0;
    // SAFETY: as above.
    check(op, "nvrtcGetCUBINSize", unsafe { nvrtc::nvrtcGetCUBINSize(program, &mut bytes) })?;
    let mut image = vec![0u8; bytes];
    // SAFETY: as above.
    check(op, "nvrtcGetCUBIN", unsafe { nvrtc::nvrtcGetCUBIN(program, image.as_mut_ptr().cast()) })?;
    Ok(Compiled { image, log })
}

fn check(op: &'static str, call: &'static str, code: nvrtc::nvrtcResult) -> Result<()> {
    if code == nvrtc::nvrtcResult::NVRTC_SUCCESS {
        return Ok(());
    }
    Err(Error::Device { op, what: format!("{call} failed: {code:?}") })
}

/// Where NVRTC may lie when the loader does not know it. The first entry is the user's word.
fn nvrtc_places() -> Vec<PathBuf> {
    let mut places: Vec<PathBuf> = std::env::var_os("PERILUNE_NVRTC").map(PathBuf::from).into_iter().collect();
    let toolkits = ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(std::env::var_os).map(PathBuf::from);
    for toolkit in toolkits.chain([PathBuf::from("/usr/local/cuda")]) {
        places.extend(["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"].map(|name| toolkit.join("lib64").join(name)));
    }
    places
}

/// The version of NVRTC, for those who want to know before a kernel is asked for.
///
/// Errors: [`Error::Device`] that says how to get it.
pub fn nvrtc_version(op: &'static str) -> Result<(i32, i32)> {
    load_nvrtc(op)?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library is loaded; writes two ints to exclusive places.
    check(op, "nvrtcVersion", unsafe { nvrtc::nvrtcVersion(&mut major, &mut minor) })?;
    Ok((major, minor))
}

/// Makes sure that NVRTC is loaded.
///
/// Errors: [`Error::Device`] that says how to get it.
fn load_nvrtc(op: &'static str) -> Result<()> {
    static LOOKED: Once = Once::new();
    LOOKED.call_once(|| {
        for place in nvrtc_places().into_iter().filter(|place| place.exists()) {
            // NVRTC looks for its built-in functions by name alone, so they are loaded first.
            let beside = place.parent().and_then(|folder| std::fs::read_dir(folder).ok()).into_iter().flatten().flatten();
            let is_builtins = |path: &PathBuf| {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                name.starts_with("libnvrtc-builtins.so")
            };
            beside.map(|entry| entry.path()).filter(is_builtins).for_each(|path| {
                super::driver::open_library(&path);
            });
            if super::driver::open_library(&place) {
                break;
            }
        }
    });
    // SAFETY: loads the library by its name, as using it would; a compiler library asks for nothing more.
    if unsafe { nvrtc::is_culib_present() } {
        return Ok(());
    }
    let what = "NVRTC (libnvrtc.so.13), which compiles the kernels, was not found; `pip install nvidia-cuda-nvrtc` brings it: \
                set PERILUNE_NVRTC to the file, or install the CUDA toolkit";
    Err(Error::Device { op, what: what.into() })
}

/// Everything that machine code is made from.
fn cache_key(variant: &Variant, target: Target, nvrtc_version: (i32, i32)) -> String {
    let (name, text) = variant.program.source();
    let headers: String = HEADERS.iter().map(|(name, text)| format!("{name}\n{text}\n")).collect();
    let options = options(variant, target).join(" ");
    format!("driver {}\nnvrtc {}.{}\n{options}\n{name}\n{text}\n{headers}", target.driver_version, nvrtc_version.0, nvrtc_version.1)
}

/// FNV-1a, 64 bits: it names the file, and the file's whole key is compared.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xCBF2_9CE4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01B3))
}

/// `$PERILUNE_CACHE`, or the user's cache folder. None where there is no home.
fn cache_folder() -> Option<PathBuf> {
    let of = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    of("PERILUNE_CACHE")
        .or_else(|| of("XDG_CACHE_HOME").map(|folder| folder.join("perilune")))
        .or_else(|| of("HOME").map(|home| home.join(".cache/perilune")))
        .map(|folder| folder.join("cuda"))
}

/// An entry: the length of the key, the key, the hash of the image, the image.
fn read_cached(place: &Path, key: &str) -> Option<Vec<u8>> {
    let bytes = std::fs::read(place).ok()?;
    let (length, rest) = bytes.split_first_chunk::<8>()?;
    let (found, rest) = rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
    let (sum, image) = rest.split_first_chunk::<8>()?;
    (found == key.as_bytes() && hash(image) == u64::from_le_bytes(*sum)).then(|| image.to_vec())
}

fn write_cached(place: &Path, key: &str, image: &[u8]) -> std::io::Result<()> {
    let folder = place.parent().expect("an entry lies in a folder");
    std::fs::create_dir_all(folder)?;
    let mut bytes = (key.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(key.as_bytes());
    bytes.extend_from_slice(&hash(image).to_le_bytes());
    bytes.extend_from_slice(image);
    // Under a name of this process first, so that no one reads half an entry.
    let unfinished = place.with_extension(format!("{}.tmp", std::process::id()));
    std::fs::write(&unfinished, bytes)?;
    std::fs::rename(&unfinished, place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_entry_is_used_only_if_all_of_it_is_the_same() {
        let place = std::env::temp_dir().join(format!("perilune-cubin-{}", std::process::id())).join("a.cubin");
        assert_eq!(read_cached(&place, "key"), None);
        write_cached(&place, "key", b"machine code").unwrap();
        assert_eq!(read_cached(&place, "key").as_deref(), Some(&b"machine code"[..]));
        assert_eq!(read_cached(&place, "kez"), None);
        let mut bytes = std::fs::read(&place).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        std::fs::write(&place, &bytes).unwrap();
        assert_eq!(read_cached(&place, "key"), None, "a changed byte");
        for length in 0..bytes.len() {
            std::fs::write(&place, &bytes[..length]).unwrap();
            assert_eq!(read_cached(&place, "key"), None, "cut at {length}");
        }
        std::fs::remove_dir_all(place.parent().unwrap()).unwrap();
    }

    #[test]
    fn hopper_has_its_own_instructions() {
        let name = |major, minor| Target { capability: (major, minor), driver_version: 13000 }.architecture();
        assert_eq!([name(8, 0), name(8, 9), name(9, 0), name(12, 0)], ["sm_80", "sm_89", "sm_90a", "sm_120"]);
    }
}
