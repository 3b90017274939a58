//! Launching the embedded kernels through the CUDA driver, whose library is looked up when a GPU is first used.
#![allow(unsafe_code)] // the driver's functions

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{CString, c_void};
use std::sync::{Mutex, OnceLock};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::fatbins;
use super::launch::Launch;
use crate::{Error, Result};

/// A stream, as the driver names it, and the number of its device.
#[derive(Debug, Clone, Copy)]
pub struct Stream {
    pub handle: usize,
    pub device: usize,
}

/// What is loaded in a context: the modules, in the order of [`fatbins`], and kernels that were launched, by address.
#[derive(Default)]
struct Loaded {
    modules: Vec<usize>,
    kernels: HashMap<&'static str, usize>,
}

/// By the context's address.
static LOADED: Mutex<Option<HashMap<usize, Loaded>>> = Mutex::new(None);

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

impl Loaded {
    /// Loads every module: a CUDA graph, which may be recorded later, must not.
    fn new() -> Result<Self> {
        let load = |bytes: &'static [u8]| {
            // SAFETY: a whole fatbin, which lives as long as the library.
            let module = unsafe { result::module::load_data(bytes.as_ptr().cast()) };
            module.map(|module| module as usize).map_err(failed("loading the kernels"))
        };
        let modules = fatbins().iter().map(|fatbin| load(fatbin.bytes)).collect::<Result<_>>()?;
        Ok(Self { modules, kernels: HashMap::new() })
    }

    fn kernel(&mut self, file: &'static str, name: &'static str) -> Result<usize> {
        if let Some(&kernel) = self.kernels.get(name) {
            return Ok(kernel);
        }
        let index = fatbins().iter().position(|fatbin| fatbin.name == file);
        let index =
            index.ok_or_else(|| Error::Cuda(format!("this library was built without nvcc, and has no {name}")))?;
        let text = CString::new(name).map_err(|error| Error::Cuda(error.to_string()))?;
        // SAFETY: a module that was loaded and is never unloaded.
        let kernel = unsafe { result::module::get_function(self.modules[index] as sys::CUmodule, text) };
        let kernel = kernel.map_err(failed(name))? as usize;
        self.kernels.insert(name, kernel);
        Ok(kernel)
    }
}

fn kernel(file: &'static str, name: &'static str, device: usize) -> Result<usize> {
    let context = context(device)?;
    let mut loaded = LOADED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let loaded = match loaded.get_or_insert_default().entry(context) {
        Entry::Occupied(loaded) => loaded.into_mut(),
        Entry::Vacant(place) => place.insert(Loaded::new()?),
    };
    loaded.kernel(file, name)
}

/// Launches on a stream of the current context, and returns at once.
///
/// # Safety
/// What the parameters point to is in this context's memory, of the sizes that they say, until the kernel has run.
pub unsafe fn launch<P>(launch: &Launch<P>, stream: Stream) -> Result<()> {
    let Launch { module: file, kernel: name, blocks, threads, parameters } = launch;
    if *blocks == 0 {
        return Ok(());
    }
    let kernel = kernel(file, name, stream.device)? as sys::CUfunction;
    let mut arguments = [std::ptr::from_ref(parameters).cast_mut().cast::<c_void>()];
    let (blocks, threads) = ((*blocks, 1, 1), (*threads, 1, 1));
    // SAFETY: the kernel takes one structure, and the driver copies it; the caller vouches for what it points to.
    let launched =
        unsafe { result::launch_kernel(kernel, blocks, threads, 0, stream.handle as sys::CUstream, &mut arguments) };
    launched.map_err(failed(name))
}
