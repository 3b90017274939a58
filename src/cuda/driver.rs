//! Launching the embedded kernels through the CUDA driver, whose library is looked up when a GPU is first used.
#![allow(unsafe_code)] // the driver's functions

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{CString, c_void};
use std::sync::Mutex;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::fatbins;
use super::launch::Launch;
use crate::{Error, Result};

/// A stream of the current context, as the driver names it.
#[derive(Debug, Clone, Copy)]
pub struct Stream(pub usize);

/// The embedded modules of each context, by address, in the order of [`fatbins`].
static MODULES: Mutex<Option<HashMap<usize, Vec<usize>>>> = Mutex::new(None);

fn failed(what: &str) -> impl Fn(DriverError) -> Error + '_ {
    move |error| Error::Cuda(format!("{what}: {error}"))
}

/// The module of a file's kernels in the current context. The first call in a context loads all of them: a CUDA graph, which
/// may be recorded later, must not.
fn module(name: &'static str) -> Result<sys::CUmodule> {
    let index = fatbins().iter().position(|fatbin| fatbin.name == name);
    let index = index.ok_or_else(|| Error::Cuda(format!("this library was built without nvcc, and has no {name}")))?;
    // SAFETY: only looks for the library.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::Cuda("the driver's library (libcuda) cannot be found".into()));
    }
    let context = result::ctx::get_current().map_err(failed("the current context"))?;
    let context = context.ok_or_else(|| Error::Cuda("no context is current".into()))? as usize;
    let mut modules = MODULES.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let load_all = || {
        let load = |bytes: &'static [u8]| {
            // SAFETY: a whole fatbin, which lives as long as the library.
            let module = unsafe { result::module::load_data(bytes.as_ptr().cast()) };
            module.map(|module| module as usize).map_err(failed("loading the kernels"))
        };
        fatbins().iter().map(|fatbin| load(fatbin.bytes)).collect::<Result<Vec<_>>>()
    };
    let loaded = match modules.get_or_insert_default().entry(context) {
        Entry::Occupied(loaded) => loaded.into_mut(),
        Entry::Vacant(place) => place.insert(load_all()?),
    };
    Ok(loaded[index] as sys::CUmodule)
}

/// Launches on a stream of the current context, and returns at once.
///
/// # Safety
/// What the parameters point to is in this context's memory, of the sizes that they say, until the kernel has run.
pub unsafe fn launch<P>(launch: &Launch<P>, Stream(stream): Stream) -> Result<()> {
    let Launch { module: file, kernel, blocks, threads, parameters } = launch;
    if *blocks == 0 {
        return Ok(());
    }
    let module = module(file)?;
    let name = CString::new(*kernel).map_err(|error| Error::Cuda(error.to_string()))?;
    // SAFETY: a module that was loaded and is never unloaded.
    let function = unsafe { result::module::get_function(module, name) }.map_err(failed(kernel))?;
    let mut arguments = [std::ptr::from_ref(parameters).cast_mut().cast::<c_void>()];
    // SAFETY: the kernel takes one structure, and the driver copies it; the caller vouches for what it points to.
    let launched = unsafe {
        result::launch_kernel(function, (*blocks, 1, 1), (*threads, 1, 1), 0, stream as sys::CUstream, &mut arguments)
    };
    launched.map_err(failed(kernel))
}
