//! Finds the GPUs and CUDA libraries of a machine, without loading those that are missing.

use super::error::CudaError;
use cudarc::driver::result;
use cudarc::driver::sys::CUdevice_attribute as Attribute;

/// The libraries that the CUDA path loads, and whether each is there.
pub fn libraries() -> [(&'static str, bool); 4] {
    // SAFETY: each looks for a shared library and opens it; nothing in it is called.
    unsafe {
        [
            ("libcuda", cudarc::driver::sys::is_culib_present()),
            ("libnvrtc", cudarc::nvrtc::sys::is_culib_present()),
            ("libcublas", cudarc::cublas::sys::is_culib_present()),
            ("libcusolver", cusolver_present()),
        ]
    }
}

/// cudarc has no probe for this one; its loader panics instead.
fn cusolver_present() -> bool {
    let names = cudarc::get_lib_name_candidates("cusolver");
    // SAFETY: opening the library runs its initializers, as using it would.
    names
        .iter()
        .any(|name| unsafe { libloading::Library::new(name) }.is_ok())
}

/// Whether device `ordinal` and all libraries are there; opens nothing.
pub fn check(ordinal: usize) -> Result<(), CudaError> {
    if let Some((library, _)) = libraries().into_iter().find(|(_, there)| !there) {
        return Err(CudaError::Library { library });
    }
    let found = devices().len();
    match ordinal < found {
        true => Ok(()),
        false => Err(CudaError::NoDevice { ordinal, found }),
    }
}

/// A GPU as the driver describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Ordinal, as in `cuda:0`.
    pub ordinal: usize,
    /// Name.
    pub name: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Bytes of memory.
    pub memory: usize,
}

/// Every GPU that the driver shows; empty without a driver. Opens none of them.
pub fn devices() -> Vec<Found> {
    if !libraries()[0].1 || result::init().is_err() {
        return Vec::new();
    }
    let count = result::device::get_count().unwrap_or(0);
    (0..count).filter_map(describe).collect()
}

fn describe(ordinal: i32) -> Option<Found> {
    let device = result::device::get(ordinal).ok()?;
    // SAFETY: the driver just named the device.
    let (memory, attribute) = unsafe {
        let attribute = |which| result::device::get_attribute(device, which).ok();
        (result::device::total_mem(device).ok()?, attribute)
    };
    Some(Found {
        ordinal: ordinal as usize,
        name: result::device::get_name(device).ok()?,
        capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        memory,
    })
}
