//! Splitting work over threads without owning any: the caller brings the pool.

use std::ops::Range;

/// A pool of threads. Operators pass PyTorch's; tests and tools pass [`Serial`] or [`Threads`].
pub trait Pool: Sync {
    /// Calls `body` with ranges that cover `0..items` once, perhaps at the same time.
    fn for_ranges(&self, items: usize, body: &(dyn Fn(Range<usize>) + Sync));
}

/// Everything on the calling thread.
pub struct Serial;

impl Pool for Serial {
    fn for_ranges(&self, items: usize, body: &(dyn Fn(Range<usize>) + Sync)) {
        if items > 0 {
            body(0..items);
        }
    }
}

/// A fixed number of scoped threads, started for each call.
pub struct Threads(pub usize);

impl Pool for Threads {
    fn for_ranges(&self, items: usize, body: &(dyn Fn(Range<usize>) + Sync)) {
        let share = items.div_ceil(self.0.max(1)).max(1);
        std::thread::scope(|scope| {
            for start in (0..items).step_by(share) {
                scope.spawn(move || body(start..(start + share).min(items)));
            }
        });
    }
}

/// A slice that several threads write at once, each to places of its own.
pub struct DisjointSlice<'a, T> {
    start: *mut T,
    len: usize,
    owner: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: the only access is `range_mut`, whose callers promise disjoint ranges.
#[allow(unsafe_code)]
unsafe impl<T: Send> Sync for DisjointSlice<'_, T> {}

impl<'a, T> DisjointSlice<'a, T> {
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), owner: std::marker::PhantomData }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn as_ptr(&self) -> *mut T {
        self.start
    }

    /// The elements in `range`.
    ///
    /// # Safety
    /// No two live results, on any thread, may overlap.
    ///
    /// # Panics
    /// If `range` does not lie inside the slice.
    #[allow(unsafe_code, clippy::mut_from_ref)]
    pub unsafe fn range_mut(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: inside the slice by the assertion, unaliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }

    /// Writes one element.
    ///
    /// # Safety
    /// No other thread may read or write it meanwhile.
    ///
    /// # Panics
    /// If `index` does not lie inside the slice.
    #[allow(unsafe_code)]
    pub unsafe fn set(&self, index: usize, value: T)
    where
        T: Copy,
    {
        assert!(index < self.len);
        // SAFETY: inside the slice by the assertion, unaliased by the caller's promise; what is there needs no drop.
        unsafe { self.start.add(index).write(value) };
    }
}

/// Runs `body` for each item and returns the results in order.
pub fn map<T: Send>(pool: &dyn Pool, items: usize, body: impl Fn(usize) -> T + Sync) -> Vec<T> {
    map_with(pool, items, || (), |(), item| body(item))
}

/// [`map`] with a scratch that the items of a thread share.
pub fn map_with<S, T: Send>(
    pool: &dyn Pool,
    items: usize,
    scratch: impl Fn() -> S + Sync,
    body: impl Fn(&mut S, usize) -> T + Sync,
) -> Vec<T> {
    let mut results: Vec<Option<T>> = (0..items).map(|_| None).collect();
    let slots = DisjointSlice::new(&mut results);
    pool.for_ranges(items, &|range| {
        let mut scratch = scratch();
        for item in range {
            let value = body(&mut scratch, item);
            // SAFETY: a pool visits each item once, so each slot has one writer.
            #[allow(unsafe_code)]
            let slot = unsafe { slots.range_mut(item..item + 1) };
            slot[0] = Some(value);
        }
    });
    // A pool that lost an item has panicked already, and its panic is the one to report.
    results.into_iter().flatten().collect()
}
