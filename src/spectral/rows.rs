//! Rows of blocks, and their transforms to planes: a pair of neighbouring blocks for each lane, of one row or of several.

use std::ops::Range;

use super::planes::Planes;
use super::transform::{Real, Spectra, Transform};
use super::vector::{Kernel, MOST_LANES, Vector, dispatch};
use crate::memory::LINE;
use crate::parallel::{DisjointSlice, Pool};

/// Rows of blocks of `n`, the last of which may be cut short.
#[derive(Clone, Copy)]
pub struct Rows<'a, T> {
    pub values: &'a [T],
    pub features: usize,
    pub blocks: usize,
    pub n: usize,
}

impl<'a, T> Rows<'a, T> {
    #[inline(always)]
    fn block(&self, row: usize, block: usize) -> &'a [T] {
        let start = (block * self.n).min(self.features);
        let end = ((block + 1) * self.n).min(self.features);
        &self.values[row * self.features + start..row * self.features + end]
    }
}

/// What a table's items are, of rows of blocks; its steps are the other.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum By {
    Row,
    Block,
}

/// Transforms of blocks: those of `rows` in `range`, conjugated or not, to `planes`.
struct Forward<'a, T> {
    transform: &'a Transform<T>,
    rows: Rows<'a, T>,
    first_row: usize,
    /// Of the pairs of blocks from `first_row` on, counted row by row.
    range: Range<usize>,
    conjugate: bool,
    by: By,
    planes: Planes,
    out: &'a DisjointSlice<'a, T>,
}

impl<T: Real> Kernel<T> for Forward<'_, T> {
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let Self { transform, rows, first_row, range, conjugate, by, planes, out } = self;
        let mut workspace = transform.workspace::<V>();
        let in_row = rows.blocks.div_ceil(2);
        for range in chunks(&range, V::LANES) {
            let mut pairs = [[&[][..]; 2]; MOST_LANES];
            let mut placed = Placed { planes, starts: [[None; 2]; MOST_LANES], out };
            for ((index, pair), starts) in range.clone().zip(&mut pairs).zip(&mut placed.starts) {
                let (row, first) = (index / in_row, index % in_row * 2);
                for (which, (block, start)) in pair.iter_mut().zip(starts).enumerate().take(rows.blocks - first) {
                    let (item, step) = if by == By::Row { (row, first + which) } else { (first + which, row) };
                    *block = rows.block(first_row + row, first + which);
                    *start = Some(planes.start(item, step));
                }
            }
            // The next blocks, if they are whole.
            let next = (first_row + range.end / in_row) * rows.features + range.end % in_row * 2 * rows.n;
            for index in (0..2 * V::LANES * rows.n).step_by(LINE / size_of::<T>()) {
                V::prefetch(rows.values, next + index);
            }
            transform.forward(&pairs, conjugate, &mut workspace, &mut placed);
        }
    }
}

/// Where the spectra of pairs go, if there are any.
struct Placed<'a, T> {
    planes: Planes,
    starts: [[Option<usize>; 2]; MOST_LANES],
    out: &'a DisjointSlice<'a, T>,
}

impl<T: Real, V: Vector<T>> Spectra<V> for Placed<'_, T> {
    #[inline(always)]
    fn put(&mut self, pair: usize, which: usize, vector: usize, re: V, im: V) {
        if let Some(start) = self.starts[pair][which] {
            self.planes.put(self.out, start, vector, re, im);
        }
    }
}

/// Transforms all blocks of some rows, in parallel.
pub fn forward<T: Real>(
    transform: &Transform<T>,
    rows: Rows<T>,
    panel: &Range<usize>,
    (conjugate, by): (bool, By),
    planes: Planes,
    out: &mut [T],
    pool: &dyn Pool,
) {
    planes.clear(out);
    let out = &DisjointSlice::new(out);
    let pairs = panel.len() * rows.blocks.div_ceil(2);
    pool.for_ranges(pairs.div_ceil(planes.lanes), &|range| {
        let range = range.start * planes.lanes..(range.end * planes.lanes).min(pairs);
        dispatch(planes.lanes, Forward { transform, rows, first_row: panel.start, range, conjugate, by, planes, out });
    });
}

/// Parts of a range, of so many items.
pub fn chunks(range: &Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> + use<> {
    let end = range.end;
    range.clone().step_by(size).map(move |start| start..(start + size).min(end))
}
