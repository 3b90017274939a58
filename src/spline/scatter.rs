//! Sums of products of a stream's columns with one another, of which the upper triangle is computed alone.
//!
//! Some rows at a time are centred and laid out in panels of a few columns, so that a sum of two panels' columns reads
//! both from one end to the other and stays in registers meanwhile.

use std::ops::Range;

use crate::parallel::{DisjointSlice, Pool};
use crate::spectral::Real;
use crate::spectral::vector::{Kernel, MOST_LANES, Vector, dispatch, lanes};

/// Rows that are summed in their own type before they are in float64.
const ROWS: usize = 1024;
/// Vectors side by side in a panel.
const VECTORS: usize = 2;

/// Adds Σ (xᵢ − shift)·(xᵢ − shift)ᵀ over `rows` (n, d) to `products` (d, d), and Σ (xᵢ − shift) to `sums` (d).
pub fn add_scatter<T: Real>(rows: &[T], shift: &[T], products: &mut [f64], sums: &mut [f64], pool: &dyn Pool) {
    let columns = shift.len();
    if rows.is_empty() || columns == 0 {
        return;
    }
    let lanes = lanes::<T>(columns);
    let width = VECTORS * lanes;
    let panels = columns.div_ceil(width);
    let length = ROWS.min(rows.len() / columns);
    let mut packed = vec![T::default(); panels * length * width];
    // By rows of the triangle, so that neighbours share a panel.
    let pairs: Vec<(usize, usize)> = (0..panels).flat_map(|i| (i..panels).map(move |j| (i, j))).collect();
    for rows in rows.chunks(length * columns) {
        let length = rows.len() / columns;
        let places = DisjointSlice::new(&mut packed);
        let totals = DisjointSlice::new(sums);
        pool.for_ranges(panels, &|range| {
            for panel in range {
                let here = panel * width..columns.min((panel + 1) * width);
                // SAFETY: a pool visits each panel once.
                #[allow(unsafe_code)]
                let (place, totals) = unsafe {
                    let start = panel * length * width;
                    (places.range_mut(start..start + length * width), totals.range_mut(here.clone()))
                };
                pack(rows, shift, here, width, place, totals);
            }
        });
        let packed = &packed[..panels * length * width];
        let out = DisjointSlice::new(products);
        pool.for_ranges(pairs.len(), &|range| {
            let pairs = &pairs[range];
            dispatch(lanes, Pairs { packed, length, pairs, columns, out: &out });
        });
    }
    for row in 1..columns {
        for column in 0..row {
            products[row * columns + column] = products[column * columns + row];
        }
    }
}

/// Lays the columns `here` of all rows, centred, side by side, with zeros up to `width`.
fn pack<T: Real>(rows: &[T], shift: &[T], here: Range<usize>, width: usize, place: &mut [T], totals: &mut [f64]) {
    let shift_here = &shift[here.clone()];
    let mut sums = [T::default(); VECTORS * MOST_LANES];
    for (row, place) in rows.chunks_exact(shift.len()).zip(place.chunks_exact_mut(width)) {
        let (place, padding) = place.split_at_mut(here.len());
        for (((place, sum), &x), &shift) in place.iter_mut().zip(&mut sums).zip(&row[here.clone()]).zip(shift_here) {
            *place = x - shift;
            *sum += *place;
        }
        padding.fill(T::default());
    }
    for (total, &sum) in totals.iter_mut().zip(&sums) {
        *total += sum.to_f64();
    }
}

/// The products of some pairs of panels.
struct Pairs<'a, T> {
    packed: &'a [T],
    /// Rows of a panel.
    length: usize,
    pairs: &'a [(usize, usize)],
    columns: usize,
    out: &'a DisjointSlice<'a, f64>,
}

impl<T: Real> Kernel<T> for Pairs<'_, T> {
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        if V::REGISTERS >= 32 && V::LANES >= 4 {
            self.sum::<V, 8>();
        } else {
            self.sum::<V, 4>();
        }
    }
}

impl<T: Real> Pairs<'_, T> {
    /// `COLUMNS` of the first panel at a time, a divisor of a panel's width.
    #[inline(always)]
    fn sum<V: Vector<T>, const COLUMNS: usize>(&self) {
        let width = VECTORS * V::LANES;
        for &(i, j) in self.pairs {
            let [left, right] = [i, j].map(|panel| &self.packed[panel * self.length * width..][..self.length * width]);
            let there = j * width..self.columns.min((j + 1) * width);
            for first in (0..width).step_by(COLUMNS) {
                let sums = products::<T, V, COLUMNS>(left, right, first);
                for (row, sums) in (i * width + first..self.columns).zip(&sums) {
                    // SAFETY: a pool visits each pair once, and a pair's rows and columns are its own.
                    #[allow(unsafe_code)]
                    let out = unsafe {
                        let start = row * self.columns;
                        self.out.range_mut(start + there.start..start + there.end)
                    };
                    for (out, &sum) in out.iter_mut().zip(sums) {
                        *out += sum.to_f64();
                    }
                }
            }
        }
    }
}

/// The sums over rows of some columns of the left panel, from `first` on, times all of the right one.
#[inline(always)]
fn products<T: Real, V: Vector<T>, const COLUMNS: usize>(
    left: &[T],
    right: &[T],
    first: usize,
) -> [[T; VECTORS * MOST_LANES]; COLUMNS] {
    let width = VECTORS * V::LANES;
    assert!(left.len() == right.len() && left.len().is_multiple_of(width) && first + COLUMNS <= width);
    let mut sums = [[V::splat(T::default()); VECTORS]; COLUMNS];
    for start in (0..left.len()).step_by(width) {
        // SAFETY: within a row of the panel, as the assertion says.
        #[allow(unsafe_code)]
        let right: [V; VECTORS] = std::array::from_fn(|vector| unsafe { V::load_at(right, start + vector * V::LANES) });
        for (column, sums) in sums.iter_mut().enumerate() {
            // SAFETY: as above.
            #[allow(unsafe_code)]
            let left = V::splat(unsafe { *left.get_unchecked(start + first + column) });
            for (sum, right) in sums.iter_mut().zip(right) {
                *sum = right.multiply_add(left, *sum);
            }
        }
    }
    sums.map(|sums| {
        let mut out = [T::default(); VECTORS * MOST_LANES];
        for (vector, sum) in sums.into_iter().enumerate() {
            sum.store(&mut out[vector * V::LANES..]);
        }
        out
    })
}
