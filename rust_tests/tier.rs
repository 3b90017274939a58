//! The disk engine against a plain vector, and what it says when the disk fails.
#![cfg(target_os = "linux")]
#![allow(unsafe_code)] // memory that the engine borrows, and system calls that make it fail

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::env;
use std::fs;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, mpsc};
use std::thread;

use infold::Error;
use infold::tier::{ALIGNMENT, Backend, Counters, Engine, Memory, Options};
use proptest::prelude::*;

/// Page-aligned bytes, shared with the engine.
#[derive(Clone)]
struct Block(Arc<Allocation>);

struct Allocation {
    address: *mut u8,
    layout: Layout,
}

// SAFETY: the tests touch a block only while the engine does not.
unsafe impl Send for Allocation {}
// SAFETY: as above.
unsafe impl Sync for Allocation {}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.address, self.layout) }
    }
}

impl Block {
    fn new(bytes: usize) -> Self {
        let layout = Layout::from_size_align(bytes.max(1), ALIGNMENT).unwrap();
        // SAFETY: the layout is not empty.
        let address = unsafe { alloc_zeroed(layout) };
        assert!(!address.is_null());
        Self(Arc::new(Allocation { address, layout }))
    }

    fn filled(bytes: usize, value: u8) -> Self {
        let block = Self::new(bytes);
        // SAFETY: nobody else knows the block.
        unsafe { block.0.address.write_bytes(value, bytes) };
        block
    }

    /// The first bytes. The engine must be done with them.
    fn bytes(&self, bytes: usize) -> &[u8] {
        assert!(bytes <= self.0.layout.size());
        // SAFETY: initialised, and as the function says.
        unsafe { std::slice::from_raw_parts(self.0.address, bytes) }
    }

    fn lend(&self, start: usize, bytes: usize) -> Box<Loan> {
        assert!(start + bytes <= self.0.layout.size());
        Box::new(Loan { block: self.clone(), start, bytes, dropped: None })
    }
}

struct Loan {
    block: Block,
    start: usize,
    bytes: usize,
    dropped: Option<Arc<AtomicUsize>>,
}

// SAFETY: the block stays; the tests touch it only while the engine does not.
unsafe impl Memory for Loan {
    fn address(&self) -> *mut u8 {
        self.block.0.address.wrapping_add(self.start)
    }

    fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        if let Some(dropped) = &self.dropped {
            dropped.fetch_add(1, SeqCst);
        }
    }
}

fn open(blocks: usize, options: Options) -> Engine {
    Engine::open(&env::temp_dir(), (blocks * ALIGNMENT) as u64, options).unwrap()
}

/// The backends that there are here: emulators have no io_uring.
fn backends() -> Vec<Backend> {
    let uring = Options { backend: Backend::Uring, ..Options::default() };
    let found = Engine::open(&env::temp_dir(), 0, uring).is_ok();
    if found { vec![Backend::Uring, Backend::Threads] } else { vec![Backend::Threads] }
}

fn small(backend: Backend) -> Options {
    Options { depth: 3, chunk: 2 * ALIGNMENT, backend }
}

#[derive(Clone, Debug)]
struct Step {
    write: bool,
    offset: usize,
    blocks: usize,
    value: u8,
    wait: bool,
}

const BLOCKS: usize = 24;

fn step() -> impl Strategy<Value = Step> {
    (any::<bool>(), 0..BLOCKS, 0..12usize, 1..=255u8, prop::bool::weighted(0.2)).prop_map(
        |(write, offset, blocks, value, wait)| Step { write, offset, blocks: blocks.min(BLOCKS - offset), value, wait },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Every read sees what was written before it was asked for, in whatever order its ticket is waited for.
    #[test]
    fn requests_take_effect_in_order(steps in prop::collection::vec(step(), 1..60)) {
        for backend in backends() {
            let engine = open(BLOCKS, small(backend));
            let mut file = vec![0u8; BLOCKS * ALIGNMENT];
            let mut pending = Vec::new();
            let mut expected = Counters::default();
            for step in &steps {
                let (start, bytes) = (step.offset * ALIGNMENT, step.blocks * ALIGNMENT);
                let block = Block::filled(bytes, if step.write { step.value } else { 0xee });
                expected.requests += 1;
                if step.write {
                    file[start..start + bytes].fill(step.value);
                    expected.bytes_written += bytes as u64;
                    pending.push((engine.write(start as u64, block.lend(0, bytes)).unwrap(), None));
                } else {
                    expected.bytes_read += bytes as u64;
                    let ticket = engine.read(start as u64, block.lend(0, bytes)).unwrap();
                    pending.push((ticket, Some((block, file[start..start + bytes].to_vec()))));
                }
                if step.wait {
                    check(&engine, pending.swap_remove(pending.len() / 2));
                }
            }
            pending.into_iter().rev().for_each(|request| check(&engine, request));
            prop_assert_eq!(engine.counters(), expected);
            prop_assert_eq!(engine.tickets(), 0);
        }
    }
}

fn check(engine: &Engine, (ticket, read): (u64, Option<(Block, Vec<u8>)>)) {
    engine.wait(ticket).unwrap();
    if let Some((block, expected)) = read {
        assert!(block.bytes(expected.len()) == expected);
    }
}

/// A buffer is written out and refilled without a wait between: the file has its old content.
#[test]
fn requests_on_the_same_memory_keep_their_order() {
    for backend in backends() {
        let engine = open(2 * BLOCKS, small(backend));
        let bytes = BLOCKS * ALIGNMENT;
        let (buffer, back) = (Block::filled(bytes, 7), Block::filled(bytes, 1));
        let last = [
            engine.write(0, buffer.lend(0, bytes)).unwrap(),
            engine.read(bytes as u64, buffer.lend(0, bytes)).unwrap(),
            engine.read(0, back.lend(0, bytes)).unwrap(),
        ];
        last.into_iter().for_each(|ticket| engine.wait(ticket).unwrap());
        assert!(back.bytes(bytes).iter().all(|&byte| byte == 7));
        assert!(buffer.bytes(bytes).iter().all(|&byte| byte == 0));
    }
}

#[test]
fn a_file_grows() {
    for backend in backends() {
        let engine = open(1, small(backend));
        assert_eq!(engine.reserve(1).unwrap(), ALIGNMENT as u64);
        assert_eq!(engine.reserve(0).unwrap(), 2 * ALIGNMENT as u64);
        assert_eq!(engine.reserve(ALIGNMENT as u64).unwrap(), 2 * ALIGNMENT as u64);
        let (data, back) = (Block::filled(ALIGNMENT, 9), Block::new(ALIGNMENT));
        engine.wait(engine.write(2 * ALIGNMENT as u64, data.lend(0, ALIGNMENT)).unwrap()).unwrap();
        engine.wait(engine.read(2 * ALIGNMENT as u64, back.lend(0, ALIGNMENT)).unwrap()).unwrap();
        assert!(back.bytes(ALIGNMENT).iter().all(|&byte| byte == 9));
    }
}

#[test]
fn a_file_has_no_name() {
    let folder = env::temp_dir().join(format!("infold-test-{}", std::process::id()));
    fs::create_dir(&folder).unwrap();
    let engine = Engine::open(&folder, 1 << 20, Options::default()).unwrap();
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
    drop(engine);
    fs::remove_dir(&folder).unwrap();
}

/// A filesystem in memory has neither a disk nor, in older kernels, transfers past the page cache.
#[test]
fn a_file_in_memory_works_too() {
    let folder = Path::new("/dev/shm");
    if !folder.is_dir() {
        return;
    }
    for backend in backends() {
        let engine = Engine::open(folder, ALIGNMENT as u64, small(backend)).unwrap();
        let (data, back) = (Block::filled(ALIGNMENT, 5), Block::new(ALIGNMENT));
        engine.wait(engine.write(0, data.lend(0, ALIGNMENT)).unwrap()).unwrap();
        engine.wait(engine.read(0, back.lend(0, ALIGNMENT)).unwrap()).unwrap();
        assert!(back.bytes(ALIGNMENT).iter().all(|&byte| byte == 5));
    }
}

#[test]
fn a_short_read_names_the_file_and_the_rest_goes_on() {
    for backend in backends() {
        let engine = open(8, small(backend));
        let block = Block::filled(8 * ALIGNMENT, 3);
        engine.wait(engine.write(0, block.lend(0, 8 * ALIGNMENT)).unwrap()).unwrap();
        for end in [3 * ALIGNMENT, 3 * ALIGNMENT - 100] {
            // SAFETY: the descriptor is open.
            assert_eq!(unsafe { libc::ftruncate(engine.as_raw_fd(), end as libc::off_t) }, 0);
            let ticket = engine.read(ALIGNMENT as u64, block.lend(0, 7 * ALIGNMENT)).unwrap();
            let error = engine.wait(ticket).unwrap_err();
            assert!(matches!(error, Error::Io { .. }), "{error:?}");
            let text = error.to_string();
            let name = env::temp_dir().join("infold-").display().to_string();
            assert!(text.starts_with(&name), "{text}");
            assert!(text.contains(".tier: cannot read 28672 bytes at offset 4096: short read"), "{text}");
        }
        let back = Block::new(2 * ALIGNMENT);
        engine.wait(engine.read(0, back.lend(0, 2 * ALIGNMENT)).unwrap()).unwrap();
        assert!(back.bytes(2 * ALIGNMENT).iter().all(|&byte| byte == 3));
        engine.wait(engine.write(0, block.lend(0, 8 * ALIGNMENT)).unwrap()).unwrap();
        assert_eq!((engine.tickets(), engine.counters().unfinished), (0, 0));
    }
}

#[test]
fn a_failing_write_is_an_error() {
    for backend in backends() {
        let engine = open(1, small(backend));
        let fd = engine.as_raw_fd();
        // SAFETY: both descriptors are open. The engine's becomes one that cannot be written to.
        unsafe {
            let full = libc::open(c"/dev/full".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC);
            assert!(full >= 0 && libc::dup2(full, fd) == fd);
            libc::close(full);
        }
        let data = Block::filled(ALIGNMENT, 1);
        let error = engine.wait(engine.write(0, data.lend(0, ALIGNMENT)).unwrap()).unwrap_err().to_string();
        assert!(error.contains("cannot write 4096 bytes at offset 0: No space left"), "{error}");
    }
}

#[test]
fn a_full_disk_is_an_error_that_leaves_the_file_as_it_was() {
    let huge = 1u64 << 55;
    let error = Engine::open(&env::temp_dir(), huge, Options::default()).err().unwrap();
    assert!(matches!(error, Error::Io { .. }) && error.to_string().contains(&huge.to_string()), "{error}");
    let engine = open(1, Options::default());
    assert!(engine.reserve(huge).unwrap_err().to_string().contains("cannot set aside"));
    assert!(engine.reserve(u64::MAX).unwrap_err().is_argument());
    assert_eq!(engine.reserve(1).unwrap(), ALIGNMENT as u64);
    let error = Engine::open(Path::new("/nowhere"), 1, Options::default()).err().unwrap();
    assert!(error.to_string().starts_with("/nowhere/infold-"), "{error}");
}

#[test]
fn wrong_arguments_are_refused() {
    let engine = open(4, Options::default());
    let block = Block::new(8 * ALIGNMENT);
    let (page, end) = (ALIGNMENT as u64, 4 * ALIGNMENT as u64);
    for (offset, start, bytes, what) in [
        (512, 0, ALIGNMENT, "offset"),
        (0, 512, ALIGNMENT, "memory's address"),
        (0, 0, 100, "memory's bytes"),
        (end, 0, ALIGNMENT, "range"),
        (page, 0, 4 * ALIGNMENT, "range"),
        (u64::MAX - page + 1, 0, ALIGNMENT, "range"),
    ] {
        for error in [
            engine.read(offset, block.lend(start, bytes)).unwrap_err(),
            engine.write(offset, block.lend(start, bytes)).unwrap_err(),
        ] {
            assert!(error.is_argument() && error.to_string().starts_with(what), "{error}");
        }
    }
    let ticket = engine.read(0, block.lend(0, ALIGNMENT)).unwrap();
    engine.wait(ticket).unwrap();
    for unknown in [ticket, ticket + 1] {
        assert!(engine.wait(unknown).unwrap_err().is_argument());
        assert!(engine.is_done(unknown).unwrap_err().is_argument());
    }
    for options in [
        Options { depth: 0, ..Options::default() },
        Options { depth: 1025, ..Options::default() },
        Options { chunk: 1000, ..Options::default() },
        Options { chunk: 0, ..Options::default() },
    ] {
        assert!(Engine::open(&env::temp_dir(), 0, options).err().unwrap().is_argument());
    }
    assert!("disk".parse::<Backend>().unwrap_err().is_argument());
}

#[test]
fn what_is_lent_comes_back_before_the_wait_returns() {
    for backend in backends() {
        let engine = open(BLOCKS, small(backend));
        let (block, dropped) = (Block::new(BLOCKS * ALIGNMENT), Arc::new(AtomicUsize::new(0)));
        for round in 0..2000 {
            let mut loan = block.lend(0, BLOCKS / 4 * ALIGNMENT);
            loan.dropped = Some(dropped.clone());
            let ticket = engine.read(0, loan).unwrap();
            engine.wait(ticket).unwrap();
            assert_eq!(dropped.load(SeqCst), round + 1);
        }
        assert_eq!(engine.tickets(), 0);
    }
}

#[test]
fn dropping_the_engine_lets_go_of_everything() {
    for backend in backends() {
        let blocks = 4096;
        let engine = open(blocks, Options { backend, ..Options::default() });
        let (block, dropped) = (Block::filled(blocks * ALIGNMENT, 1), Arc::new(AtomicUsize::new(0)));
        for request in 0..40 {
            let mut loan = block.lend(0, blocks * ALIGNMENT);
            loan.dropped = Some(dropped.clone());
            if request % 2 == 0 {
                engine.write(0, loan).unwrap()
            } else {
                engine.read(0, loan).unwrap()
            };
        }
        drop(engine);
        assert_eq!(dropped.load(SeqCst), 40);
        // The engine is done with it: nothing is moved any more.
        assert_eq!(Arc::strong_count(&block.0), 1);
    }
}

#[test]
fn a_ticket_is_done_once_a_wait_would_return() {
    let engine = open(BLOCKS, Options::default());
    let block = Block::new(BLOCKS * ALIGNMENT);
    let ticket = engine.read(0, block.lend(0, BLOCKS * ALIGNMENT)).unwrap();
    while !engine.is_done(ticket).unwrap() {
        thread::yield_now();
    }
    engine.wait(ticket).unwrap();
}

#[test]
fn many_threads_share_an_engine() {
    for backend in backends() {
        let engine = open(8 * BLOCKS, small(backend));
        thread::scope(|scope| {
            for part in 0..8u8 {
                let engine = &engine;
                scope.spawn(move || {
                    let bytes = BLOCKS * ALIGNMENT;
                    let offset = u64::from(part) * bytes as u64;
                    for round in 0..20 {
                        let (data, back) = (Block::filled(bytes, part * 20 + round), Block::new(bytes));
                        let write = engine.write(offset, data.lend(0, bytes)).unwrap();
                        engine.wait(engine.read(offset, back.lend(0, bytes)).unwrap()).unwrap();
                        engine.wait(write).unwrap();
                        assert!(back.bytes(bytes) == data.bytes(bytes));
                    }
                });
            }
        });
    }
}

/// Memory whose owner panics when the engine gives it back.
struct Bomb(Block);

// SAFETY: as for `Loan`.
unsafe impl Memory for Bomb {
    fn address(&self) -> *mut u8 {
        self.0.0.address
    }

    fn bytes(&self) -> usize {
        ALIGNMENT
    }
}

impl Drop for Bomb {
    fn drop(&mut self) {
        panic!("boom");
    }
}

#[test]
fn a_panic_in_the_worker_is_an_error_of_every_later_wait() {
    let engine = open(1, Options::default());
    let block = Block::new(ALIGNMENT);
    let bomb = engine.read(0, Box::new(Bomb(Block::new(ALIGNMENT)))).unwrap();
    let error = engine.wait(bomb).unwrap_err().to_string();
    assert!(error.contains("boom"), "{error}");
    let error = engine.read(0, block.lend(0, ALIGNMENT)).unwrap_err().to_string();
    assert!(error.contains("boom"), "{error}");
    assert_eq!(engine.tickets(), 0);
}

/// Where a filter refuses io_uring, as in containers, threads do its work.
#[test]
fn without_io_uring_threads_are_taken() {
    let (sender, receiver) = mpsc::channel();
    // A filter holds for its thread alone.
    thread::spawn(move || {
        let statement = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
        let mut program = [
            statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
            statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, libc::SYS_io_uring_setup as u32),
            statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
            statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
        ];
        let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
        // SAFETY: the program lives through the calls. An emulator refuses them, and has no io_uring to refuse.
        unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter);
        }
        let forced = Engine::open(&env::temp_dir(), 0, Options { backend: Backend::Uring, ..Options::default() });
        let engine = open(1, Options::default());
        let block = Block::new(ALIGNMENT);
        let read = engine.wait(engine.read(0, block.lend(0, ALIGNMENT)).unwrap());
        sender.send((forced.is_ok(), engine.is_uring(), read)).unwrap();
    });
    let (forced, uring, read) = receiver.recv().unwrap();
    assert!(!forced && !uring);
    read.unwrap();
}
