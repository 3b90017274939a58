//! Kernels on the host as the driver would run them, and a device's memory there, with no memory after it.
#![allow(dead_code)] // each test file uses its own part

use std::ffi::{CString, c_char};
use std::ops::Range;
use std::sync::Mutex;

use infold::cuda::launch::{Launch, kernels};
use infold::cuda::lay_out;

unsafe extern "C" {
    pub fn infold_emulate(kernel: *const c_char, blocks: u32, threads: u32, shared: u32, parameters: *const u8)
    -> bool;
}

/// Runs a kernel as the driver would.
pub fn emulate<P>(launch: Launch<P>) {
    let Launch { kernel: name, blocks, threads, shared, parameters } = &launch;
    let most = kernels().find(|kernel| kernel.name == *name).map(|kernel| kernel.shared);
    assert!(most.is_some_and(|most| *shared <= most), "{name}");
    // The emulator runs one kernel at a time.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let kernel = CString::new(*name).unwrap();
    let parameters = std::ptr::from_ref(parameters).cast();
    // SAFETY: the parameters point to memory that the tests own, of the sizes that they say.
    assert!(unsafe { infold_emulate(kernel.as_ptr(), *blocks, *threads, *shared, parameters) }, "no kernel {name}");
}

/// Values after which there is no memory: what reads or writes beyond them ends the test.
pub struct Guarded {
    start: *mut libc::c_void,
    bytes: usize,
    pages: usize,
}

impl Guarded {
    const PAGE: usize = 4096;

    pub fn new<T: Copy>(values: &[T]) -> Self {
        let own = Self::of_bytes(size_of_val(values));
        // SAFETY: room for the values.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr().cast(), own.pointer(), own.bytes) };
        own
    }

    /// So many zeros.
    pub fn of_bytes(bytes: usize) -> Self {
        let pages = bytes.next_multiple_of(Self::PAGE);
        // SAFETY: new memory, the last page of which is taken away.
        let start = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let access = libc::PROT_READ | libc::PROT_WRITE;
            let start = libc::mmap(std::ptr::null_mut(), pages + Self::PAGE, access, flags, -1, 0);
            assert_ne!(start, libc::MAP_FAILED);
            assert_eq!(libc::mprotect(start.byte_add(pages), Self::PAGE, libc::PROT_NONE), 0);
            start
        };
        Self { start, bytes, pages }
    }

    pub fn pointer(&self) -> *mut u8 {
        self.start.cast::<u8>().wrapping_add(self.pages - self.bytes)
    }

    pub fn values<T: Copy>(&self) -> Vec<T> {
        let count = self.bytes / size_of::<T>();
        // SAFETY: so many values at most, of types that any bytes are.
        (0..count).map(|index| unsafe { self.pointer().cast::<T>().add(index).read_unaligned() }).collect()
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: what `new` mapped.
        unsafe { libc::munmap(self.start, self.pages + Self::PAGE) };
    }
}

/// The emulator as a device. Its memory holds anything but zeros at first.
pub struct Emulator;

impl lay_out::Device for Emulator {
    type Memory = Guarded;

    fn allocate(&self, bytes: usize) -> infold::Result<Guarded> {
        // Whole words of 16 bytes, as they have to begin at one.
        let memory = Guarded::of_bytes(bytes.next_multiple_of(16));
        // SAFETY: its own memory.
        unsafe { memory.pointer().write_bytes(0xa5, memory.bytes) };
        Ok(memory)
    }

    fn address(&self, memory: &Guarded) -> *mut u8 {
        memory.pointer()
    }

    fn write(&self, memory: &Guarded, at: usize, bytes: &[u8]) -> infold::Result<()> {
        assert!(at + bytes.len() <= memory.bytes);
        // SAFETY: inside the memory.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), memory.pointer().add(at), bytes.len()) };
        Ok(())
    }

    fn read(&self, memory: &Guarded, bytes: Range<usize>) -> infold::Result<Vec<u8>> {
        Ok(memory.values()[bytes].to_vec())
    }

    unsafe fn launch<P>(&self, launch: Launch<P>) -> infold::Result<()> {
        assert_eq!(launch.shared, 0);
        emulate(launch);
        Ok(())
    }
}
