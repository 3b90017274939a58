//! Launching the embedded kernels through the CUDA driver, whose library is looked up when a GPU is first used.
#![allow(unsafe_code)] // the driver's functions

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{CString, c_void};
use std::sync::{Mutex, OnceLock};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::launch::{Kernel, Launch, kernels};
use super::{architectures, fatbins};
use crate::{Error, Result};

/// A stream, as the driver names it, and the number of its device.
#[derive(Debug, Clone, Copy)]
pub struct Stream {
    pub handle: usize,
    pub device: usize,
}

/// The kernels that are loaded in a context, by name: their addresses.
type Kernels = HashMap<&'static str, usize>;

/// By the context's address.
static LOADED: Mutex<Option<HashMap<usize, Kernels>>> = Mutex::new(None);

fn failed(what: &str) -> impl Fn(DriverError) -> Error + '_ {
    move |error| Error::Cuda(format!("{what}: {error}"))
}

/// The current context; on a thread that has none yet, the device's primary one, which is PyTorch's.
fn context(device: usize) -> Result<usize> {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    // SAFETY: only looks for the library.
    if !PRESENT.get_or_init(|| unsafe { sys::is_culib_present() }) {
        return Err(Error::Cuda("the driver's library (libcuda) cannot be found".into()));
    }
    if let Some(context) = result::ctx::get_current().map_err(failed("the current context"))? {
        return Ok(context as usize);
    }
    // SAFETY: a device that a tensor is on; its context is kept for as long as the process lives.
    let retained = unsafe { result::device::get(device as i32).and_then(|device| result::primary_ctx::retain(device)) };
    let context = retained.map_err(failed("the device's context"))?;
    // SAFETY: just retained.
    unsafe { result::ctx::set_current(context) }.map_err(failed("the device's context"))?;
    Ok(context as usize)
}

/// Loads every kernel that the device has shared memory for, its code included: while a CUDA graph is recorded, which may
/// come next, nothing can be loaded.
fn load_all() -> Result<Kernels> {
    let mut modules = HashMap::new();
    for fatbin in fatbins() {
        // SAFETY: a whole fatbin, which lives as long as the library.
        let module = unsafe { result::module::load_data(fatbin.bytes.as_ptr().cast()) };
        modules.insert(fatbin.name, module.map_err(failed("loading the kernels"))?);
    }
    let load = |Kernel { file, name, shared }: Kernel| {
        let module = modules.get(file);
        let module = module.ok_or_else(|| Error::Cuda(format!("this library was built without nvcc: no {name}")))?;
        let text = CString::new(name).map_err(|error| Error::Cuda(error.to_string()))?;
        use sys::CUfunction_attribute_enum as Attribute;
        // SAFETY: a module that was loaded and is never unloaded; asking for a kernel's registers loads its code.
        let kernel = unsafe {
            result::module::get_function(*module, text).and_then(|kernel| {
                result::function::get_function_attribute(kernel, Attribute::CU_FUNC_ATTRIBUTE_NUM_REGS)?;
                let most_shared = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                let fits = result::function::set_function_attribute(kernel, most_shared, shared as i32).is_ok();
                if fits && shared > 0 {
                    // Several such blocks shall fit, at the cache's expense.
                    let share = Attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
                    result::function::set_function_attribute(kernel, share, 100)?;
                }
                Ok(fits.then_some(kernel))
            })
        };
        Ok(kernel.map_err(failed(name))?.map(|kernel| (name, kernel as usize)))
    };
    kernels().filter_map(|kernel| load(kernel).transpose()).collect()
}

/// Calls `body` with the kernels of the current context, which are loaded if they are not there yet.
fn with_kernels<R>(device: usize, body: impl FnOnce(&Kernels) -> Result<R>) -> Result<R> {
    let context = context(device)?;
    let mut loaded = LOADED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    body(match loaded.get_or_insert_default().entry(context) {
        Entry::Occupied(kernels) => kernels.into_mut(),
        Entry::Vacant(place) => place.insert(load_all()?),
    })
}

/// Whether a device runs the kernels that are for Hopper alone, and the library has them.
pub fn is_hopper(device: usize) -> Result<bool> {
    static MAJORS: Mutex<Option<HashMap<usize, i32>>> = Mutex::new(None);
    if !architectures().contains(&"sm_90a") {
        return Ok(false);
    }
    let mut majors = MAJORS.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let major = match majors.get_or_insert_default().entry(device) {
        Entry::Occupied(major) => *major.get(),
        Entry::Vacant(place) => {
            context(device)?;
            let attribute = sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR;
            let found = result::device::get(device as i32);
            // SAFETY: a device that a tensor is on.
            let major = found.and_then(|device| unsafe { result::device::get_attribute(device, attribute) });
            *place.insert(major.map_err(failed("the device's compute capability"))?)
        }
    };
    Ok(major == 9)
}

/// Whether a device has a kernel: one whose shared memory fits there.
pub fn has(device: usize, name: &str) -> Result<bool> {
    with_kernels(device, |kernels| Ok(kernels.contains_key(name)))
}

/// Loads the kernels on a device, if they are not there yet.
pub fn load(device: usize) -> Result<()> {
    with_kernels(device, |_| Ok(()))
}

/// Launches on a stream of the current context, and returns at once.
///
/// # Safety
/// What the parameters point to is in this context's memory, of the sizes that they say, until the kernel has run.
pub unsafe fn launch<P>(launch: &Launch<P>, stream: Stream) -> Result<()> {
    let Launch { kernel: name, blocks, threads, shared, parameters } = launch;
    if *blocks == 0 {
        return Ok(());
    }
    let find = |kernels: &Kernels| kernels.get(name).copied().ok_or_else(|| Error::Cuda(format!("no kernel {name}")));
    let kernel = with_kernels(stream.device, find)? as sys::CUfunction;
    let mut arguments = [std::ptr::from_ref(parameters).cast_mut().cast::<c_void>()];
    let (blocks, threads) = ((*blocks, 1, 1), (*threads, 1, 1));
    // SAFETY: the kernel takes one structure, and the driver copies it; the caller vouches for what it points to.
    let launched = unsafe {
        result::launch_kernel(kernel, blocks, threads, *shared, stream.handle as sys::CUstream, &mut arguments)
    };
    launched.map_err(failed(name))
}
