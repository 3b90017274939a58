//! Where a tile's inputs and results lie in their tensors, and its spectra among others'.

use std::ops::Range;

use realfft::num_complex::Complex;

use super::super::products::Product;
use super::super::tile::{Fourier, Run, Runs, Workspace};
use super::Axis;
use crate::codec;
use crate::memory::AlignedVec;
use crate::parallel::{DisjointSlice, Pool};
use crate::spectral::Real;
use crate::spectral::vector;

/// `positions` of the padded input, from a box's beginning on, as runs of the input.
pub(super) fn input_runs(axis: &Axis, circular: bool, positions: Range<usize>, runs: &mut Vec<Run>) {
    runs.clear();
    let Range { mut start, end } = positions.clone();
    if !circular {
        let inside = start.max(axis.before)..end.min(axis.before + axis.input);
        if !inside.is_empty() {
            let (at, from) = (inside.start - start, inside.start - axis.before);
            runs.push(Run { at, every: 1, from, count: inside.len() });
        }
        return;
    }
    while start < end {
        // Padding is at most the input's size, so that this is not negative.
        let from = (start + axis.input - axis.before) % axis.input;
        let count = (axis.input - from).min(end - start);
        runs.push(Run { at: start - positions.start, every: 1, from, count });
        start += count;
    }
}

/// Results (of the convolution) whose first positions lie in `positions`, which may begin below 0.
pub(super) fn result_runs(axis: &Axis, positions: Range<isize>, runs: &mut Vec<Run>) {
    runs.clear();
    let stride = axis.stride as isize;
    let first = (positions.start.max(0) + stride - 1) / stride;
    let end = ((positions.end + stride - 1) / stride).min(axis.output() as isize);
    if first < end {
        let at = (first * stride - positions.start) as usize;
        runs.push(Run { at, every: axis.stride, from: first as usize, count: (end - first) as usize });
    }
}

/// Spectra by vectors of frequencies: `[group][vector][row][channel][plane][lane]`.
pub(super) struct Spectra<T> {
    pub(super) values: AlignedVec<T>,
    pub(super) vectors: usize,
    pub(super) rows: usize,
    pub(super) channels: usize,
    pub(super) planes: usize,
    pub(super) lanes: usize,
}

impl<T: Real> Spectra<T> {
    pub(super) fn new(frequencies: usize, groups: usize, rows: usize, channels: usize, planes: usize) -> Self {
        let lanes = vector::lanes::<T>(usize::MAX);
        let vectors = frequencies.div_ceil(lanes);
        let values = AlignedVec::new(groups * vectors * rows * channels * planes * lanes);
        Self { values, vectors, rows, channels, planes, lanes }
    }

    /// Numbers of one row's channel for one vector.
    pub(super) fn item(&self) -> usize {
        self.planes * self.lanes
    }

    /// Numbers of a vector.
    pub(super) fn vector(&self) -> usize {
        self.rows * self.channels * self.item()
    }
}

/// Where a thread writes or reads one spectrum.
pub(super) struct Places<'a, T> {
    pub(super) slice: DisjointSlice<'a, T>,
    pub(super) vectors: usize,
    pub(super) vector: usize,
    pub(super) channels: usize,
    pub(super) item: usize,
    pub(super) lanes: usize,
}

impl<'a, T: Real> Places<'a, T> {
    pub(super) fn new(spectra: &'a mut Spectra<T>) -> Self {
        let (vectors, vector, channels) = (spectra.vectors, spectra.vector(), spectra.channels);
        let (item, lanes) = (spectra.item(), spectra.lanes);
        Self { slice: DisjointSlice::new(&mut spectra.values), vectors, vector, channels, item, lanes }
    }

    /// The places of a row's channel, numbered over all groups, in each vector.
    pub(super) fn of(&self, row: usize, channel: usize) -> impl Iterator<Item = Range<usize>> {
        let (group, channel) = (channel / self.channels, channel % self.channels);
        let start = group * self.vectors * self.vector + (row * self.channels + channel) * self.item;
        let (vector, item) = (self.vector, self.item);
        (0..self.vectors).map(move |index| start + index * vector..start + index * vector + item)
    }

    /// Writes a spectrum, with the third plane that a product's second factor has.
    pub(super) fn put(&self, row: usize, channel: usize, spectrum: &[Complex<T>], third: Option<Product>) {
        for (range, numbers) in self.of(row, channel).zip(spectrum.chunks(self.lanes)) {
            // SAFETY: each row's channel has places of its own and one writer.
            #[allow(unsafe_code)]
            let out = unsafe { self.slice.range_mut(range) };
            let (re, rest) = out.split_at_mut(self.lanes);
            let (im, last) = rest.split_at_mut(self.lanes);
            for ((re, im), number) in re.iter_mut().zip(im.iter_mut()).zip(numbers) {
                (*re, *im) = (number.re, number.im);
            }
            match third {
                Some(Product::Plain) => last.iter_mut().zip(im).for_each(|(out, im)| *out = -*im),
                Some(Product::Conjugate) => last.iter_mut().zip(re).for_each(|(out, re)| *out = -*re),
                None => {}
            }
        }
    }

    /// Reads a spectrum of two planes.
    pub(super) fn get(&self, row: usize, channel: usize, spectrum: &mut [Complex<T>]) {
        for (range, numbers) in self.of(row, channel).zip(spectrum.chunks_mut(self.lanes)) {
            // SAFETY: each row's channel has one reader, and nobody writes meanwhile.
            #[allow(unsafe_code)]
            let from = unsafe { self.slice.range_mut(range) };
            let (re, im) = from.split_at(self.lanes);
            for (number, (&re, &im)) in numbers.iter_mut().zip(re.iter().zip(im)) {
                *number = Complex::new(re, im);
            }
        }
    }
}

pub(super) fn real<T: Real>(value: f64) -> T {
    <T as codec::Scalar>::from_f64(value)
}

/// Calls `body` for each of `items` in parallel, with a thread's workspace and room for runs.
pub(super) fn for_items<T: Real>(
    fourier: &Fourier<T>,
    items: usize,
    pool: &dyn Pool,
    body: impl Fn(usize, &mut Workspace<T>, &mut Runs) + Sync,
) {
    pool.for_ranges(items, &|range| {
        let (mut workspace, mut runs) = (fourier.workspace(), Runs::default());
        range.for_each(|item| body(item, &mut workspace, &mut runs));
    });
}
