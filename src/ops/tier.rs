//! Weights on disk, on page-aligned uint8 tensors. A store is named by its file's descriptor.
#![allow(unsafe_code)] // the engine reads and writes tensors' memory

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tch::{Device, Kind, Tensor};

use crate::tier::{Engine, Memory, Options};
use crate::{Error, Result};

static STORES: Mutex<BTreeMap<i64, Arc<Engine>>> = Mutex::new(BTreeMap::new());

/// A tensor's bytes.
struct Bytes(Tensor);

// SAFETY: the tensor owns its memory and is checked to be contiguous. As in any operator, PyTorch does not stop a user from
// touching a tensor that an operator works on; that race gives wrong numbers.
unsafe impl Memory for Bytes {
    fn address(&self) -> *mut u8 {
        self.0.data_ptr().cast()
    }

    fn bytes(&self) -> usize {
        self.0.numel()
    }
}

fn bytes_of(tensor: Tensor, what: &'static str) -> Result<Box<dyn Memory>> {
    let (kind, device) = (tensor.f_kind()?, tensor.device());
    if kind == Kind::Uint8 && device == Device::Cpu && tensor.is_contiguous() {
        return Ok(Box::new(Bytes(tensor)));
    }
    let gaps = if tensor.is_contiguous() { "" } else { " with gaps" };
    Err(Error::argument(what, "a contiguous uint8 tensor on the CPU", format!("{kind:?} on {device:?}{gaps}")))
}

fn unsigned<T: TryFrom<i64>>(value: i64, what: &'static str) -> Result<T> {
    T::try_from(value).map_err(|_| Error::argument(what, "at least 0", value))
}

fn stores() -> MutexGuard<'static, BTreeMap<i64, Arc<Engine>>> {
    STORES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The store itself, so that a close elsewhere does not take it away during a call.
fn find(store: i64) -> Result<Arc<Engine>> {
    stores().get(&store).cloned().ok_or_else(|| unknown(store))
}

fn unknown(store: i64) -> Error {
    Error::argument("store", "one that tier_open returned and that is not closed", store)
}

pub fn open(folder: &str, nbytes: i64, depth: i64, backend: &str) -> Result<i64> {
    let options = Options { depth: unsigned(depth, "depth")?, backend: backend.parse()?, ..Options::default() };
    let engine = Engine::open(Path::new(folder), unsigned(nbytes, "nbytes")?, options)?;
    let store = i64::from(engine.as_raw_fd());
    stores().insert(store, Arc::new(engine));
    Ok(store)
}

pub fn reserve(store: i64, nbytes: i64) -> Result<i64> {
    Ok(find(store)?.reserve(unsigned(nbytes, "nbytes")?)? as i64)
}

pub fn read(store: i64, offset: i64, out: Tensor) -> Result<i64> {
    Ok(find(store)?.read(unsigned(offset, "offset")?, bytes_of(out, "out")?)? as i64)
}

pub fn write(store: i64, offset: i64, data: Tensor) -> Result<i64> {
    Ok(find(store)?.write(unsigned(offset, "offset")?, bytes_of(data, "data")?)? as i64)
}

pub fn wait(store: i64, ticket: i64) -> Result<()> {
    find(store)?.wait(unsigned(ticket, "ticket")?)
}

pub fn is_done(store: i64, ticket: i64) -> Result<bool> {
    find(store)?.is_done(unsigned(ticket, "ticket")?)
}

/// Bytes read, bytes written, requests, unfinished requests, 1 for io_uring, 1 for past the page cache.
pub fn stats(store: i64) -> Result<Vec<i64>> {
    let engine = find(store)?;
    let counters = engine.counters();
    let counts = [counters.bytes_read, counters.bytes_written, counters.requests, counters.unfinished];
    let kinds = [engine.is_uring(), engine.is_direct()];
    Ok(counts.map(|count| count as i64).into_iter().chain(kinds.map(i64::from)).collect())
}

/// Closes the store, once calls in other threads have returned.
pub fn close(store: i64) -> Result<()> {
    // Dropped outside the lock: that waits for the disk.
    let engine = stores().remove(&store);
    engine.map(drop).ok_or_else(|| unknown(store))
}
