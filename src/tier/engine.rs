//! A scratch file and the requests on it. A thread of its own (`worker`) carries them out; here they are checked, handed
//! over, and waited for by their tickets.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use super::ALIGNMENT;
use super::queue::{self, Backend, Bell};
use super::store::Scratch;
use super::worker::{Request, Worker};
use crate::{Error, Result};

/// Most operations in flight.
const MAX_DEPTH: usize = 1024;
/// Most bytes of an operation: its length is a 32-bit number that the kernel rounds down to pages.
const MAX_CHUNK: usize = 1 << 30;

/// Memory that a request fills or writes out.
///
/// # Safety
/// The bytes stay where they are as long as the value lives, wherever it is moved. While a read into them is unfinished,
/// nobody else touches them; while a write of them is, nobody writes to them.
#[allow(unsafe_code)] // a promise that the compiler cannot check
pub unsafe trait Memory: Send {
    fn address(&self) -> *mut u8;
    fn bytes(&self) -> usize;
}

/// How requests are carried out.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Operations in flight, 1 to 1024.
    pub depth: usize,
    /// Bytes of an operation, a multiple of 4096; a request's last may have half as many more.
    pub chunk: usize,
    pub backend: Backend,
}

impl Default for Options {
    fn default() -> Self {
        Self { depth: 32, chunk: 2 << 20, backend: Backend::Auto }
    }
}

/// What was moved since the file was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub bytes_read: u64,
    pub bytes_written: u64,
    pub requests: u64,
    /// Requests that are not finished.
    pub unfinished: u64,
}

/// What the engine and its worker share.
pub struct Shared {
    state: Mutex<State>,
    finished: Condvar,
    pub bell: Arc<Bell>,
}

#[derive(Default)]
pub struct State {
    next_ticket: u64,
    /// Requests that the worker has not seen.
    pub inbox: Vec<Request>,
    /// By ticket: None while unfinished, then how it ended, until somebody has waited for it.
    tickets: HashMap<u64, Option<Result<()>>>,
    pub counters: Counters,
    /// The engine is being dropped.
    pub closing: bool,
    /// Why the worker ended early.
    pub dead: Option<String>,
}

impl Shared {
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes how a request ended.
    pub fn finish(&self, ticket: u64, moved: Moved, result: Result<()>) {
        let mut state = self.state();
        state.counters.bytes_read += moved.read;
        state.counters.bytes_written += moved.written;
        state.counters.unfinished -= 1;
        state.tickets.insert(ticket, Some(result));
        drop(state);
        self.finished.notify_all();
    }

    /// Notes that the worker has ended early; whoever waits hears of it.
    pub fn die(&self, why: String) {
        self.state().dead = Some(why);
        self.finished.notify_all();
    }
}

/// Bytes that a request moved.
#[derive(Clone, Copy, Default)]
pub struct Moved {
    pub read: u64,
    pub written: u64,
}

/// A scratch file, read and written by requests. Dropping it waits for the operations in flight and forgets the rest.
pub struct Engine {
    scratch: Arc<Scratch>,
    shared: Arc<Shared>,
    uring: bool,
    worker: Option<JoinHandle<()>>,
}

impl Engine {
    /// Makes a scratch file of `bytes` (rounded up to whole blocks) in `folder`.
    pub fn open(folder: &Path, bytes: u64, options: Options) -> Result<Self> {
        let Options { depth, chunk, backend } = options;
        if !(1..=MAX_DEPTH).contains(&depth) {
            return Err(Error::argument("depth", format!("1 to {MAX_DEPTH}"), depth));
        }
        if !(ALIGNMENT..=MAX_CHUNK).contains(&chunk) || !chunk.is_multiple_of(ALIGNMENT) {
            return Err(Error::argument("chunk", format!("a multiple of {ALIGNMENT} up to {MAX_CHUNK}"), chunk));
        }
        let scratch = Arc::new(Scratch::create(folder, bytes)?);
        let failed = |source| scratch.error(&format!("start a queue ({backend:?}) for"), source);
        let bell = Arc::new(Bell::new().map_err(failed)?);
        let (queue, uring) = queue::open(backend, depth, &scratch, &bell).map_err(failed)?;
        let shared = Arc::new(Shared { state: Mutex::default(), finished: Condvar::new(), bell });
        let worker = Worker::new(shared.clone(), scratch.clone(), queue, depth, chunk);
        let builder = thread::Builder::new().name("infold-tier".into());
        let worker = builder.spawn(move || worker.run()).map_err(failed)?;
        Ok(Self { scratch, shared, uring, worker: Some(worker) })
    }

    /// Adds `bytes`, rounded up to whole blocks, to the file and returns where they begin.
    pub fn reserve(&self, bytes: u64) -> Result<u64> {
        self.scratch.reserve(bytes)
    }

    /// Begins to fill `memory` from the file and returns a ticket to wait by.
    pub fn read(&self, offset: u64, memory: Box<dyn Memory>) -> Result<u64> {
        self.submit(false, offset, memory)
    }

    /// Begins to write `memory` to the file and returns a ticket to wait by.
    pub fn write(&self, offset: u64, memory: Box<dyn Memory>) -> Result<u64> {
        self.submit(true, offset, memory)
    }

    fn submit(&self, write: bool, offset: u64, memory: Box<dyn Memory>) -> Result<u64> {
        let (bytes, address, end) = (memory.bytes() as u64, memory.address() as u64, self.scratch.bytes());
        let block = ALIGNMENT as u64;
        for (what, value) in [("offset", offset), ("memory's address", address), ("memory's bytes", bytes)] {
            if !value.is_multiple_of(block) {
                return Err(Error::argument(what, format!("a multiple of {block}"), value));
            }
        }
        if offset > end || bytes > end - offset {
            let got = format!("{bytes} bytes at offset {offset}");
            return Err(Error::argument("range", format!("one within the file's {end} bytes"), got));
        }
        let mut state = self.shared.state();
        if let Some(why) = &state.dead {
            return Err(Error::Panic(why.clone()));
        }
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        state.tickets.insert(ticket, None);
        state.counters.requests += 1;
        state.counters.unfinished += 1;
        state.inbox.push(Request::new(ticket, write, offset, memory));
        drop(state);
        self.shared.bell.ring();
        Ok(ticket)
    }

    /// Waits until a request has finished and says how. Its ticket is forgotten.
    pub fn wait(&self, ticket: u64) -> Result<()> {
        let mut state = self.shared.state();
        loop {
            match state.tickets.get(&ticket) {
                None => return Err(unknown(ticket)),
                Some(Some(_)) => return state.tickets.remove(&ticket).flatten().unwrap_or(Ok(())),
                Some(None) => {
                    if let Some(why) = state.dead.clone() {
                        state.tickets.remove(&ticket);
                        return Err(Error::Panic(why));
                    }
                }
            }
            state = self.shared.finished.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether a wait for this request would return at once.
    pub fn is_done(&self, ticket: u64) -> Result<bool> {
        let state = self.shared.state();
        let result = state.tickets.get(&ticket).ok_or_else(|| unknown(ticket))?;
        Ok(result.is_some() || state.dead.is_some())
    }

    /// Tickets that nobody has waited for.
    pub fn tickets(&self) -> usize {
        self.shared.state().tickets.len()
    }

    pub fn counters(&self) -> Counters {
        self.shared.state().counters
    }

    pub fn is_uring(&self) -> bool {
        self.uring
    }

    /// Whether transfers go past the page cache without help.
    pub fn is_direct(&self) -> bool {
        self.scratch.is_direct()
    }
}

impl AsRawFd for Engine {
    fn as_raw_fd(&self) -> RawFd {
        self.scratch.file().as_raw_fd()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shared.state().closing = true;
        self.shared.bell.ring();
        if let Some(worker) = self.worker.take() {
            // It reports its own panics.
            let _ = worker.join();
        }
    }
}

fn unknown(ticket: u64) -> Error {
    Error::argument("ticket", "one that was handed out and not yet waited for", ticket)
}
