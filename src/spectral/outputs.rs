//! The results of products: sums of products of spectra, made blocks again.

use std::ops::Range;

use super::planes::{Fold, Planes};
use super::rows::chunks;
use super::transform::{Blocks, Real, Transform, Workspace};
use super::vector::{MOST_LANES, Vector, load_part, store_part};
use crate::parallel::DisjointSlice;

/// Rows of a result, and what is added to each.
pub struct Outputs<'a, T> {
    pub values: DisjointSlice<'a, T>,
    /// Which row the sums' first one is.
    pub first_row: usize,
    pub features: usize,
    pub bias: Option<&'a [T]>,
    /// Whether the spectra are the conjugates of what the sums make.
    pub conjugate: bool,
}

impl<T: Real> Outputs<'_, T> {
    /// Makes blocks of the sums of products of `blocks` and `rows`, which lie block by block and, of each, row by row.
    #[inline(always)]
    pub fn finish<V: Vector<T>>(
        &self,
        transform: &Transform<T>,
        planes: &Planes,
        [blocks, rows]: [Range<usize>; 2],
        sums: &[T],
        workspace: &mut Workspace<T, V>,
    ) {
        let n = transform.n();
        let fold = Fold::<V>::new(transform, planes, (0.25 / n as f64).sqrt(), (0.125 / n as f64).sqrt());
        let in_row = blocks.len().div_ceil(2);
        for range in chunks(&(0..rows.len() * in_row), V::LANES) {
            let mut places = [[None; 2]; MOST_LANES];
            for (index, places) in range.clone().zip(&mut places) {
                let (row, first) = (index / in_row, index % in_row * 2);
                for (which, place) in places.iter_mut().enumerate().take(blocks.len() - first) {
                    let column = (blocks.start + first + which) * n;
                    *place = Some(Place {
                        sums: ((first + which) * rows.len() + row) * planes.spectrum(),
                        row: (self.first_row + rows.start + row) * self.features,
                        columns: (column, (column + n).min(self.features)),
                    });
                }
            }
            let mut finish = Finish { out: self, fold, sums, places };
            transform.inverse(self.conjugate, workspace, &mut finish);
        }
    }
}

/// Sums that become blocks of the result.
struct Finish<'a, T, V> {
    out: &'a Outputs<'a, T>,
    fold: Fold<V>,
    sums: &'a [T],
    places: [[Option<Place>; 2]; MOST_LANES],
}

/// Where a block's sums begin, and what of the result it is.
#[derive(Clone, Copy)]
struct Place {
    sums: usize,
    row: usize,
    columns: (usize, usize),
}

impl<T: Real, V: Vector<T>> Blocks<V> for Finish<'_, T, V> {
    #[inline(always)]
    fn halves(&self, pair: usize, which: usize, vector: usize) -> [V; 2] {
        match self.places[pair][which] {
            Some(place) => self.fold.halves(&self.sums[place.sums..], vector),
            None => [V::splat(T::default()); 2],
        }
    }

    #[inline(always)]
    fn put(&mut self, pair: usize, which: usize, start: usize, numbers: V) {
        let Some(Place { row, columns, .. }) = self.places[pair][which] else { return };
        let start = columns.0 + start;
        let end = (start + V::LANES).min(columns.1);
        if start >= end {
            return;
        }
        let numbers = match self.out.bias {
            Some(bias) => numbers.add(load_part(&bias[start..end])),
            None => numbers,
        };
        // SAFETY: no two blocks overlap.
        #[allow(unsafe_code)]
        let out = unsafe { self.out.values.range_mut(row + start..row + end) };
        store_part(numbers, out);
    }
}
