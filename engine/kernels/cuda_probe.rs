//! Looks for NVIDIA GPUs through the driver's own library, loaded while the program runs, so that one binary serves
//! machines with and without one. Only asks: makes no context and takes no memory on the device.
//! Source: CUDA driver API, device management and version management.

use cudarc::driver::result::{self, DriverError, device};
use cudarc::driver::sys;

/// A GPU as the driver describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    pub name: String,
    pub memory_bytes: usize,
    /// Major and minor number: 9.0 is a Hopper.
    pub compute_capability: (i32, i32),
}

/// What the driver answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Driver {
    /// Newest CUDA version that the driver runs: major, minor.
    pub cuda: (i32, i32),
    /// At least one.
    pub gpus: Vec<Gpu>,
}

/// Why there is no GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Absence {
    /// The driver's library is not installed.
    NoDriver,
    /// The library is there and gave this error, for example when the container may not use the device.
    Refused { call: &'static str, error: String },
    /// The driver runs and has no device.
    NoDevice,
}

impl Absence {
    /// One line about what was found.
    pub fn reason(&self) -> String {
        match self {
            Self::NoDriver => "no NVIDIA driver (libcuda is not installed)".into(),
            Self::Refused { call, error } => format!("the NVIDIA driver is installed, but {call} failed: {error}"),
            Self::NoDevice => "the NVIDIA driver is installed, but shows no device".into(),
        }
    }

    /// What to do about it.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::NoDriver => {
                "nothing to do without an NVIDIA GPU; with one, install its driver, and in a container start it with --gpus all"
            }
            Self::Refused { .. } => {
                "run nvidia-smi: if it fails too, reload or reinstall the driver; if it works, compare driver and library versions"
            }
            Self::NoDevice => "check CUDA_VISIBLE_DEVICES, and in a container start it with --gpus all",
        }
    }
}

/// Asks the driver for its GPUs. Never panics and never fails: a machine without one is an answer.
pub fn probe() -> Result<Driver, Absence> {
    // SAFETY: loads libcuda by its name and closes it again, so runs its initialisers; a driver's library has no other
    // conditions on being loaded, and nothing of it is kept.
    if !unsafe { sys::is_culib_present() } {
        return Err(Absence::NoDriver);
    }
    // From here on the library is there, and the calls below have been in it since CUDA 3.2: none can be missing.
    if let Err(error) = result::init() {
        return Err(if error.0 == sys::CUresult::CUDA_ERROR_NO_DEVICE { Absence::NoDevice } else { refused("cuInit")(error) });
    }
    let mut version = 0;
    // SAFETY: writes one int to a valid, exclusive place.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(refused("cuDriverGetVersion"))?;
    let count = device::get_count().map_err(refused("cuDeviceGetCount"))?;
    let gpus = (0..count).map(describe).collect::<Result<Vec<_>, _>>()?;
    if gpus.is_empty() {
        return Err(Absence::NoDevice);
    }
    Ok(Driver { cuda: (version / 1000, version % 1000 / 10), gpus })
}

fn describe(ordinal: i32) -> Result<Gpu, Absence> {
    use sys::CUdevice_attribute::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
    };
    let gpu = device::get(ordinal).map_err(refused("cuDeviceGet"))?;
    // SAFETY: `gpu` came from cuDeviceGet in the line above.
    let attribute = |which| unsafe { device::get_attribute(gpu, which) }.map_err(refused("cuDeviceGetAttribute"));
    Ok(Gpu {
        name: device::get_name(gpu).map_err(refused("cuDeviceGetName"))?,
        // SAFETY: as above.
        memory_bytes: unsafe { device::total_mem(gpu) }.map_err(refused("cuDeviceTotalMem"))?,
        compute_capability: (attribute(MAJOR)?, attribute(MINOR)?),
    })
}

fn refused(call: &'static str) -> impl Fn(DriverError) -> Absence {
    // The number, not the driver's text: asking for the text is one more call that can fail.
    move |error| Absence::Refused { call, error: format!("{:?}", error.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn asking_twice_gives_one_answer_with_or_without_a_gpu() {
        let first = probe();
        assert_eq!(first, probe());
        match first {
            Ok(driver) => {
                assert!(driver.cuda.0 >= 11, "{driver:?}");
                assert!(driver.gpus.iter().all(|gpu| !gpu.name.is_empty() && gpu.memory_bytes > 1 << 28), "{driver:?}");
            }
            Err(absence) => assert!(!absence.reason().is_empty() && !absence.remedy().is_empty()),
        }
    }
}
