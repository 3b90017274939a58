//! The scratch of products: in whole cache lines, and counted for `infold.profile_memory`.
#![allow(unsafe_code)] // an allocator is unsafe by its trait; bytes of one float are those of another

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Bytes of a cache line. A vector that lies across two of them takes two accesses.
pub const LINE: usize = 64;

/// A value that begins a cache line.
#[repr(align(64))]
pub struct Aligned<T>(pub T);

impl<T> Deref for Aligned<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

/// A slice of its own that begins a cache line.
pub struct AlignedVec<T> {
    values: Vec<T>,
    start: usize,
    len: usize,
}

impl<T: Copy + Default> AlignedVec<T> {
    pub fn new(len: usize) -> Self {
        let values = vec![T::default(); len + LINE / size_of::<T>()];
        let start = values.as_ptr().align_offset(LINE).min(values.len() - len);
        Self { values, start, len }
    }
}

impl<T> Deref for AlignedVec<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.values[self.start..self.start + self.len]
    }
}

impl<T> DerefMut for AlignedVec<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.values[self.start..self.start + self.len]
    }
}

/// Bytes that a thread keeps for its next calls, in each of so many buffers.
const KEPT_BYTES: usize = 4 << 20;
const KEPT: usize = 3;

thread_local! {
    static BUFFERS: RefCell<Vec<AlignedVec<f64>>> = const { RefCell::new(Vec::new()) };
}

/// A float: any bytes are one.
pub trait Float: Copy {}
impl Float for f32 {}
impl Float for f64 {}

/// Floats of any value, those that the thread has left from earlier calls where they suffice: fresh pages from the system can take
/// as long as what is computed in them.
pub struct Scratch<T: Float> {
    buffer: AlignedVec<f64>,
    len: usize,
    of: PhantomData<T>,
}

impl<T: Float> Scratch<T> {
    pub fn new(len: usize) -> Self {
        let doubles = (len * size_of::<T>()).div_ceil(size_of::<f64>());
        let kept = BUFFERS.with_borrow_mut(|buffers| {
            let fitting = buffers.iter().enumerate().filter(|(_, buffer)| buffer.len() >= doubles);
            let smallest = fitting.min_by_key(|(_, buffer)| buffer.len())?.0;
            Some(buffers.swap_remove(smallest))
        });
        Self { buffer: kept.unwrap_or_else(|| AlignedVec::new(doubles)), len, of: PhantomData }
    }
}

impl<T: Float> Deref for Scratch<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: any bytes are a float.
        unsafe { &self.buffer.align_to::<T>().1[..self.len] }
    }
}

impl<T: Float> DerefMut for Scratch<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: any bytes are a float.
        unsafe { &mut self.buffer.align_to_mut::<T>().1[..self.len] }
    }
}

impl<T: Float> Drop for Scratch<T> {
    fn drop(&mut self) {
        let buffer = std::mem::replace(&mut self.buffer, AlignedVec { values: Vec::new(), start: 0, len: 0 });
        if size_of_val(&*buffer) > KEPT_BYTES {
            return;
        }
        // A thread that ends has no place for it any more.
        let _ = BUFFERS.try_with(|buffers| {
            let mut buffers = buffers.borrow_mut();
            buffers.push(buffer);
            if buffers.len() > KEPT {
                let smallest =
                    buffers.iter().enumerate().min_by_key(|(_, buffer)| buffer.len()).map(|(index, _)| index);
                smallest.map(|index| buffers.swap_remove(index));
            }
        });
    }
}

/// The system's allocator, counted.
pub struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// Bytes that are allocated now.
pub fn live() -> usize {
    LIVE.load(Relaxed)
}

/// The most bytes that were allocated at a time since [`reset_peak`].
pub fn peak() -> usize {
    PEAK.load(Relaxed)
}

pub fn reset_peak() {
    PEAK.store(live(), Relaxed);
}

fn add(bytes: usize) {
    PEAK.fetch_max(LIVE.fetch_add(bytes, Relaxed) + bytes, Relaxed);
}

fn subtract(bytes: usize) {
    LIVE.fetch_sub(bytes, Relaxed);
}

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        add(layout.size());
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        add(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        add(size);
        subtract(layout.size());
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        subtract(layout.size());
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}
