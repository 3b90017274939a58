//! The thread that carries requests out: it splits them into chunks and keeps as many of these in flight as the queue has
//! slots, those of the next request behind those of the last, so that the disk never idles. Requests take effect as if one
//! after another: one that touches what an unfinished earlier one moves waits for it.
#![allow(unsafe_code)] // memory is handed to the kernel

use std::any::Any;
use std::collections::VecDeque;
use std::io;
use std::mem;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::ALIGNMENT;
use super::engine::{Memory, Moved, Shared};
use super::queue::{Finished, Operation, Queue};
use super::store::Scratch;
use crate::Error;

/// A request, and how far it is.
pub struct Request {
    ticket: u64,
    write: bool,
    offset: u64,
    memory: Box<dyn Memory>,
    /// Bytes whose transfer has begun.
    begun: usize,
    /// Bytes that have been moved.
    moved: usize,
    in_flight: usize,
    /// Unfinished earlier requests that this one waits for.
    blockers: usize,
    error: Option<Error>,
}

impl Request {
    pub fn new(ticket: u64, write: bool, offset: u64, memory: Box<dyn Memory>) -> Self {
        Self { ticket, write, offset, memory, begun: 0, moved: 0, in_flight: 0, blockers: 0, error: None }
    }

    fn is_begun(&self) -> bool {
        self.begun == self.memory.bytes()
    }

    /// Begins no further chunk.
    fn cut_short(&mut self) {
        self.begun = self.memory.bytes();
    }

    fn in_file(&self) -> Range<u64> {
        self.offset..self.offset + self.memory.bytes() as u64
    }

    fn in_memory(&self) -> Range<u64> {
        let start = self.memory.address() as u64;
        start..start + self.memory.bytes() as u64
    }

    /// Whether the two have to take effect in order: one changes what the other touches, in the file or in memory.
    fn conflicts(&self, other: &Self) -> bool {
        let in_file = overlap(self.in_file(), other.in_file()) && (self.write || other.write);
        let in_memory = overlap(self.in_memory(), other.in_memory()) && !(self.write && other.write);
        in_file || in_memory
    }
}

fn overlap(a: Range<u64>, b: Range<u64>) -> bool {
    a.start.max(b.start) < a.end.min(b.end)
}

/// An operation in flight, for the request of this ticket.
#[derive(Clone, Copy)]
struct Flight {
    ticket: u64,
    operation: Operation,
}

pub struct Worker {
    shared: Arc<Shared>,
    scratch: Arc<Scratch>,
    queue: Box<dyn Queue>,
    chunk: usize,
    /// Unfinished requests, by ticket.
    active: VecDeque<Request>,
    slots: Vec<Option<Flight>>,
    free: Vec<usize>,
}

impl Worker {
    pub fn new(shared: Arc<Shared>, scratch: Arc<Scratch>, queue: Box<dyn Queue>, depth: usize, chunk: usize) -> Self {
        let (slots, free) = (vec![None; depth], (0..depth).rev().collect());
        Self { shared, scratch, queue, chunk, active: VecDeque::new(), slots, free }
    }

    pub fn run(mut self) {
        let why = match catch_unwind(AssertUnwindSafe(|| self.serve())) {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(panic) => message(&*panic),
        };
        self.shared.die(format!("the disk engine ended: {why}"));
        // The kernel may still read and write the memory of these requests.
        mem::forget(self);
    }

    fn serve(&mut self) -> io::Result<()> {
        let mut finished = Vec::new();
        loop {
            let closing = self.admit();
            self.retire();
            if closing && self.active.is_empty() {
                return Ok(());
            }
            self.begin()?;
            self.shared.bell.wait()?;
            self.queue.take(&mut finished);
            for (slot, result) in finished.drain(..) {
                self.land((slot, result))?;
            }
        }
    }

    /// Takes new requests in. Once the engine is being dropped, all are cut short.
    fn admit(&mut self) -> bool {
        let mut state = self.shared.state();
        let (inbox, closing) = (mem::take(&mut state.inbox), state.closing);
        drop(state);
        for mut request in inbox {
            request.blockers = self.active.iter().filter(|earlier| earlier.conflicts(&request)).count();
            self.active.push_back(request);
        }
        if closing {
            self.active.iter_mut().for_each(Request::cut_short);
        }
        closing
    }

    /// Begins chunks, in the order of requests, while there are slots.
    fn begin(&mut self) -> io::Result<()> {
        for request in self.active.iter_mut().filter(|request| request.blockers == 0) {
            while !request.is_begun() {
                let Some(slot) = self.free.pop() else { return self.queue.start() };
                let (begun, rest) = (request.begun, request.memory.bytes() - request.begun);
                let operation = Operation {
                    write: request.write,
                    memory: request.memory.address().wrapping_add(begun),
                    // A last chunk of a few pages would have a slot for as long as the others.
                    bytes: if rest <= self.chunk + self.chunk / 2 { rest } else { self.chunk },
                    offset: request.offset + begun as u64,
                };
                request.begun += operation.bytes;
                request.in_flight += 1;
                self.slots[slot] = Some(Flight { ticket: request.ticket, operation });
                // SAFETY: `active` holds the memory until all of the request's operations have landed, and is never
                // dropped before; `Memory` promises that a read's is unshared.
                unsafe { self.queue.push(slot, operation)? };
            }
        }
        self.queue.start()
    }

    /// Takes note of a finished operation, or goes on with the rest of it.
    fn land(&mut self, (slot, result): Finished) -> io::Result<()> {
        let unknown = || io::Error::other("an operation finished that nobody began");
        let Flight { ticket, operation } = self.slots.get(slot).copied().flatten().ok_or_else(unknown)?;
        let index = self.active.binary_search_by_key(&ticket, |request| request.ticket).map_err(|_| unknown())?;
        let request = &mut self.active[index];
        let (moved, error) = match result {
            Ok(bytes) if bytes == operation.bytes || bytes > 0 && bytes.is_multiple_of(ALIGNMENT) => (bytes, None),
            Ok(bytes) => (0, Some(ended(&operation, bytes))),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => (0, None),
            Err(error) => (0, Some(error)),
        };
        request.moved += moved;
        if error.is_none() && moved < operation.bytes {
            let operation = Operation {
                memory: operation.memory.wrapping_add(moved),
                bytes: operation.bytes - moved,
                offset: operation.offset + moved as u64,
                ..operation
            };
            self.slots[slot] = Some(Flight { ticket, operation });
            // SAFETY: as in `begin`.
            return unsafe { self.queue.push(slot, operation) };
        }
        self.slots[slot] = None;
        self.free.push(slot);
        request.in_flight -= 1;
        if let Some(error) = error {
            request.cut_short();
            let error = failure(&self.scratch, request, error);
            request.error.get_or_insert(error);
        }
        Ok(())
    }

    /// Lets go of requests that have nothing in flight and nothing left to begin, and of what waited for them.
    fn retire(&mut self) {
        let mut index = 0;
        while let Some(request) = self.active.get(index) {
            if !request.is_begun() || request.in_flight > 0 {
                index += 1;
                continue;
            }
            let Some(request) = self.active.remove(index) else { return };
            for later in self.active.range_mut(index..).filter(|later| later.conflicts(&request)) {
                later.blockers -= 1;
            }
            self.end(request);
        }
    }

    fn end(&self, mut request: Request) {
        let (bytes, write) = (request.moved as u64, request.write);
        let moved = if write { Moved { read: 0, written: bytes } } else { Moved { read: bytes, written: 0 } };
        let forgotten = self.scratch.forget(request.offset, request.memory.bytes() as u64, write);
        let error = request.error.take();
        let error = error.or_else(|| Some(failure(&self.scratch, &request, forgotten.err()?)));
        let ticket = request.ticket;
        // Whoever waits may free the memory's other owners next.
        drop(request);
        self.shared.finish(ticket, moved, error.map_or(Ok(()), Err));
    }
}

/// The system's error, with what was asked for.
fn failure(scratch: &Scratch, request: &Request, error: io::Error) -> Error {
    let (action, bytes) = (if request.write { "write" } else { "read" }, request.memory.bytes());
    scratch.error(&format!("{action} {bytes} bytes at offset {}", request.offset), error)
}

/// An operation moved less than asked for.
fn ended(operation: &Operation, bytes: usize) -> io::Error {
    let (kind, what) = if operation.write {
        (io::ErrorKind::WriteZero, "short write: the system took nothing after byte")
    } else {
        (io::ErrorKind::UnexpectedEof, "short read: the file ends at byte")
    };
    io::Error::new(kind, format!("{what} {}", operation.offset + bytes as u64))
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic without a message".into())
}
