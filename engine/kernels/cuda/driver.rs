//! Answers of the CUDA driver as errors of ours. Knows which of them mean that the device is gone for this process.
//! Source: CUDA driver API, CUresult.

use crate::error::{Error, Result};
use cudarc::driver::sys::CUresult;

/// Whether nothing more can be done on the device in this process.
pub(super) fn is_lost(code: CUresult) -> bool {
    use CUresult::*;
    matches!(
        code,
        CUDA_ERROR_ILLEGAL_ADDRESS
            | CUDA_ERROR_LAUNCH_FAILED
            | CUDA_ERROR_LAUNCH_TIMEOUT
            | CUDA_ERROR_ECC_UNCORRECTABLE
            | CUDA_ERROR_NVLINK_UNCORRECTABLE
            | CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUDA_ERROR_MISALIGNED_ADDRESS
            | CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUDA_ERROR_INVALID_PC
            | CUDA_ERROR_ASSERT
            | CUDA_ERROR_CONTEXT_IS_DESTROYED
            | CUDA_ERROR_DEVICE_UNAVAILABLE
            | CUDA_ERROR_DEINITIALIZED
    )
}

/// An error for anything but success. `call` is the driver's function, for the message.
pub(super) fn check(op: &'static str, call: &'static str, code: CUresult) -> Result<()> {
    if code == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(failed(op, call, code)) }
}

/// What to tell about an answer that is not success.
pub(super) fn failed(op: &'static str, call: &'static str, code: CUresult) -> Error {
    let what = if is_lost(code) { lost("the GPU", call, code) } else { format!("{call} failed: {code:?}") };
    Error::Device { op, what }
}

/// What to tell about `device`, which an answer says is gone.
pub(super) fn lost(device: &str, call: &'static str, code: CUresult) -> String {
    format!(
        "{device} was lost ({call}: {code:?}), with all it held; `perilune resume` goes on from the run's last checkpoint in a new process"
    )
}

/// Loads a library from a file and keeps it, so that asking for its name finds it. Whether that went well.
pub(super) fn open_library(path: &std::path::Path) -> bool {
    use std::ffi::{CString, c_char, c_int, c_void};
    unsafe extern "C" {
        fn dlopen(path: *const c_char, flags: c_int) -> *mut c_void;
    }
    /// RTLD_NOW | RTLD_GLOBAL.
    const FLAGS: c_int = 0x102;
    let Ok(path) = CString::new(path.as_os_str().as_encoded_bytes()) else { return false };
    // SAFETY: the path is a C string. Loading runs the library's initialisers; the user, or the place where NVIDIA puts
    // its libraries, vouches for those.
    !unsafe { dlopen(path.as_ptr(), FLAGS) }.is_null()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_say_what_is_left_to_do() {
        assert!(check("test", "cuInit", CUresult::CUDA_SUCCESS).is_ok());
        let lost = check("adamw", "cuLaunchKernel", CUresult::CUDA_ERROR_ILLEGAL_ADDRESS).unwrap_err().to_string();
        assert!(lost.contains("adamw") && lost.contains("lost") && lost.contains("perilune resume"), "{lost}");
        let other = check("adamw", "cuLaunchKernel", CUresult::CUDA_ERROR_INVALID_VALUE).unwrap_err().to_string();
        assert!(other.contains("cuLaunchKernel") && !other.contains("lost"), "{other}");
    }
}
