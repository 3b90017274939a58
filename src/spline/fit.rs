//! Control points of many series: each series times the few rows of a fit's matrix.
//!
//! The series are read once, and sums of some series with some rows stay in registers meanwhile. A series' sums are in one
//! order whatever is computed beside it.

use crate::parallel::{DisjointSlice, Pool};
use crate::spectral::Real;
use crate::spectral::vector::{Kernel, MOST_LANES, Vector, dispatch, lanes, load_part};

/// Numbers of the series that a thread takes at a time: enough to be worth its start.
const GRAIN: usize = 1 << 15;

/// `out[series, row] = Σ values[series, point] · matrix[row, point]`, of `points` points.
pub fn control_points<T: Real>(values: &[T], matrix: &[T], points: usize, out: &mut [T], pool: &dyn Pool) {
    if points == 0 || out.is_empty() {
        return out.fill(T::default());
    }
    let (series, rows) = (values.len() / points, matrix.len() / points);
    let grain = GRAIN.div_ceil(points);
    let out = DisjointSlice::new(out);
    pool.for_ranges(series.div_ceil(grain), &|range| {
        let range = range.start * grain..(range.end * grain).min(series);
        // SAFETY: a pool visits each range once.
        #[allow(unsafe_code)]
        let out = unsafe { out.range_mut(range.start * rows..range.end * rows) };
        let values = &values[range.start * points..range.end * points];
        dispatch(lanes::<T>(points), Fit { values, matrix, points, rows, out });
    });
}

struct Fit<'a, T> {
    values: &'a [T],
    matrix: &'a [T],
    points: usize,
    rows: usize,
    out: &'a mut [T],
}

impl<T: Real> Kernel<T> for Fit<'_, T> {
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        if V::REGISTERS >= 32 {
            self.tiles::<V, 3, 8>();
        } else {
            self.tiles::<V, 3, 4>();
        }
    }
}

impl<T: Real> Fit<'_, T> {
    #[inline(always)]
    fn tiles<V: Vector<T>, const SERIES: usize, const ROWS: usize>(mut self) {
        let whole = self.values.len() / (SERIES * self.points) * SERIES;
        for first in (0..whole).step_by(SERIES) {
            self.some_series::<V, SERIES, ROWS>(first);
        }
        for first in whole..self.values.len() / self.points {
            self.some_series::<V, 1, ROWS>(first);
        }
    }

    #[inline(always)]
    fn some_series<V: Vector<T>, const SERIES: usize, const ROWS: usize>(&mut self, first: usize) {
        let mut row = 0;
        while self.rows - row >= ROWS {
            self.tile::<V, SERIES, ROWS>(first, row);
            row += ROWS;
        }
        while row < self.rows {
            self.tile::<V, SERIES, 1>(first, row);
            row += 1;
        }
    }

    /// The sums of `SERIES` series from the first with `ROWS` rows from `row`.
    #[inline(always)]
    fn tile<V: Vector<T>, const SERIES: usize, const ROWS: usize>(&mut self, first: usize, row: usize) {
        let (points, rows) = (self.points, self.rows);
        let (values, matrix) = (&self.values[first * points..], &self.matrix[row * points..]);
        let whole = points - points % V::LANES;
        assert!(values.len() >= SERIES * points && matrix.len() >= ROWS * points);
        let mut sums = [[V::splat(T::default()); SERIES]; ROWS];
        for point in (0..whole).step_by(V::LANES) {
            // SAFETY: inside the last row, as the assertion says.
            #[allow(unsafe_code)]
            let at = |from: &[T], row: usize| unsafe { V::load_at(from, row * points + point) };
            for series in 0..SERIES {
                V::prefetch(values, (SERIES + series) * points + point);
            }
            add_products(&mut sums, |series| at(values, series), |row| at(matrix, row));
        }
        if whole < points {
            let rest = |from: &[T], row: usize| load_part::<T, V>(&from[row * points + whole..(row + 1) * points]);
            add_products(&mut sums, |series| rest(values, series), |row| rest(matrix, row));
        }
        // No loop: sums that are looked up by a variable would lie in memory all along.
        let totals: [[T; ROWS]; SERIES] = std::array::from_fn(|i| std::array::from_fn(|j| total(sums[j][i])));
        for (totals, out) in totals.iter().zip(self.out[first * rows..].chunks_mut(rows)) {
            out[row..row + ROWS].copy_from_slice(totals);
        }
    }
}

#[inline(always)]
fn add_products<T: Real, V: Vector<T>, const SERIES: usize, const ROWS: usize>(
    sums: &mut [[V; SERIES]; ROWS],
    series: impl Fn(usize) -> V,
    row: impl Fn(usize) -> V,
) {
    let series: [V; SERIES] = std::array::from_fn(series);
    for (j, sums) in sums.iter_mut().enumerate() {
        let row = row(j);
        for (sum, series) in sums.iter_mut().zip(&series) {
            *sum = series.multiply_add(row, *sum);
        }
    }
}

#[inline(always)]
fn total<T: Real, V: Vector<T>>(vector: V) -> T {
    let mut lanes = [T::default(); MOST_LANES];
    vector.store(&mut lanes);
    lanes[..V::LANES].iter().fold(T::default(), |total, &lane| total + lane)
}
