//! Operations on one file, many in flight: by io_uring, or by threads where the kernel refuses it.
#![allow(unsafe_code)] // the kernel reads and writes memory by address

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::str::FromStr;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use io_uring::{IoUring, Probe, opcode, types};

use super::store::Scratch;
use crate::{Error, Result};

/// Stack of a thread that only waits for the disk.
const STACK: usize = 64 << 10;

/// Who keeps operations in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// io_uring, or threads where the kernel refuses it.
    Auto,
    Uring,
    Threads,
}

impl FromStr for Backend {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "auto" => Ok(Self::Auto),
            "uring" => Ok(Self::Uring),
            "threads" => Ok(Self::Threads),
            other => Err(Error::argument("backend", "auto, uring or threads", other)),
        }
    }
}

/// A transfer between the file and memory, which has to stay until the operation has finished.
#[derive(Clone, Copy)]
pub struct Operation {
    pub write: bool,
    pub memory: *mut u8,
    pub bytes: usize,
    pub offset: u64,
}

// SAFETY: an address; whoever starts the operation answers for what is there.
unsafe impl Send for Operation {}

/// A finished operation's slot and the bytes that it moved.
pub type Finished = (usize, io::Result<usize>);

/// Keeps operations in flight, each in a slot that its owner chose. Its bell rings when one finishes.
pub trait Queue: Send {
    /// Puts an operation in a free slot.
    ///
    /// # Safety
    /// The memory must stay, for a read unshared, until the slot comes back from `take`.
    unsafe fn push(&mut self, slot: usize, operation: Operation) -> io::Result<()>;

    /// Starts what was pushed.
    fn start(&mut self) -> io::Result<()>;

    /// Appends what has finished.
    fn take(&mut self, finished: &mut Vec<Finished>);
}

/// Wakes the one thread that waits for it; a ring while nobody waits is kept.
pub struct Bell(File);

impl Bell {
    pub fn new() -> io::Result<Self> {
        // SAFETY: no memory is handed over.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        Ok(Self(unsafe { File::from_raw_fd(fd) }))
    }

    pub fn ring(&self) {
        // It can fail only by too many rings that nobody has heard, and then it has rung.
        let _ = (&self.0).write_all(&1u64.to_ne_bytes());
    }

    pub fn wait(&self) -> io::Result<()> {
        (&self.0).read_exact(&mut [0; 8])
    }
}

/// The queue that `backend` asks for, with `depth` slots, and whether it is io_uring.
pub fn open(
    backend: Backend,
    depth: usize,
    scratch: &Arc<Scratch>,
    bell: &Arc<Bell>,
) -> io::Result<(Box<dyn Queue>, bool)> {
    let uring = match backend {
        Backend::Threads => None,
        Backend::Uring => Some(Uring::new(depth, scratch, bell)?),
        Backend::Auto => Uring::new(depth, scratch, bell).ok(),
    };
    Ok(match uring {
        Some(uring) => (Box::new(uring), true),
        None => (Box::new(Pool::new(depth, scratch, bell)?), false),
    })
}

struct Uring {
    ring: IoUring,
    scratch: Arc<Scratch>,
    /// The ring signals it: it must outlive the ring.
    _bell: Arc<Bell>,
}

impl Uring {
    fn new(depth: usize, scratch: &Arc<Scratch>, bell: &Arc<Bell>) -> io::Result<Self> {
        let ring = IoUring::new(depth as u32)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        if !probe.is_supported(opcode::Read::CODE) || !probe.is_supported(opcode::Write::CODE) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        ring.submitter().register_eventfd(bell.0.as_raw_fd())?;
        Ok(Self { ring, scratch: scratch.clone(), _bell: bell.clone() })
    }
}

impl Queue for Uring {
    unsafe fn push(&mut self, slot: usize, operation: Operation) -> io::Result<()> {
        let Operation { write, memory, bytes, offset } = operation;
        let fd = types::Fd(self.scratch.file().as_raw_fd());
        let entry = if write {
            opcode::Write::new(fd, memory, bytes as u32).offset(offset).build()
        } else {
            opcode::Read::new(fd, memory, bytes as u32).offset(offset).build()
        };
        // SAFETY: the caller keeps the memory; the file is open as long as this is.
        unsafe { self.ring.submission().push(&entry.user_data(slot as u64)) }.map_err(io::Error::other)
    }

    fn start(&mut self) -> io::Result<()> {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(_) => {}
                // The kernel is short of memory for now.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => thread::yield_now(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn take(&mut self, finished: &mut Vec<Finished>) {
        finished.extend(self.ring.completion().map(|entry| {
            let result = match entry.result() {
                code if code < 0 => Err(io::Error::from_raw_os_error(-code)),
                bytes => Ok(bytes as usize),
            };
            (entry.user_data() as usize, result)
        }));
    }
}

/// One thread for each operation in flight.
struct Pool {
    /// None once the threads are to end.
    jobs: Option<Sender<(usize, Operation)>>,
    finished: Arc<Mutex<Vec<Finished>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    fn new(depth: usize, scratch: &Arc<Scratch>, bell: &Arc<Bell>) -> io::Result<Self> {
        let (jobs, inbox) = mpsc::channel();
        let inbox = Arc::new(Mutex::new(inbox));
        let mut pool = Self { jobs: Some(jobs), finished: Arc::default(), threads: Vec::new() };
        for _ in 0..depth {
            let (inbox, finished) = (inbox.clone(), pool.finished.clone());
            let (scratch, bell) = (scratch.clone(), bell.clone());
            let builder = thread::Builder::new().name("infold-disk".into()).stack_size(STACK);
            pool.threads.push(builder.spawn(move || serve(&inbox, &finished, &scratch, &bell))?);
        }
        Ok(pool)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Queue for Pool {
    unsafe fn push(&mut self, slot: usize, operation: Operation) -> io::Result<()> {
        let jobs = self.jobs.as_ref().ok_or(io::ErrorKind::BrokenPipe)?;
        jobs.send((slot, operation)).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn start(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn take(&mut self, finished: &mut Vec<Finished>) {
        finished.append(&mut self.finished.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

fn serve(inbox: &Mutex<Receiver<(usize, Operation)>>, finished: &Mutex<Vec<Finished>>, scratch: &Scratch, bell: &Bell) {
    loop {
        let job = inbox.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((slot, Operation { write, memory, bytes, offset })) = job else { return };
        // SAFETY: whoever pushed the operation keeps the memory, for a read unshared.
        let result = unsafe {
            if write {
                scratch.file().write_at(std::slice::from_raw_parts(memory, bytes), offset)
            } else {
                scratch.file().read_at(std::slice::from_raw_parts_mut(memory, bytes), offset)
            }
        };
        finished.lock().unwrap_or_else(PoisonError::into_inner).push((slot, result));
        bell.ring();
    }
}
