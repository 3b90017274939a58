//! One pass over tiles: their transforms, the product of spectra, and back.

use std::ops::Range;

use super::super::products::Product;
use super::super::tile::{Fourier, Runs};
use super::places::{Places, Spectra, for_items, real};
use super::plan::{Cut, PART_BYTES, PART_TILES, PARTS, SHARED_BYTES, SMALL, cost, plan};
use super::{Convolution, kernel_runs};
use crate::parallel::{DisjointSlice, Pool, Serial};
use crate::spectral::Real;

/// The tiles of one pass: a plan and its transform.
pub(super) struct Pass<T> {
    pub(super) cut: [Cut; 3],
    pub(super) fourier: Fourier<T>,
    /// Tiles of one element of the batch.
    pub(super) tiles: usize,
    pub(super) total: usize,
    pub(super) groups: usize,
    /// Bytes of a tile's spectra for one group.
    pub(super) bytes: usize,
    pub(super) is_small: bool,
}

/// Some of the tiles, over the batch, for some of the groups.
#[derive(Debug, Clone)]
pub(super) struct Part {
    pub(super) groups: Range<usize>,
    pub(super) tiles: Range<usize>,
}

/// Tensors of so many channels a group times `size`.
#[derive(Clone, Copy)]
pub(super) struct Tensors<V> {
    pub(super) values: V,
    pub(super) channels: usize,
    pub(super) size: [usize; 3],
}

impl<V> Tensors<V> {
    pub(super) fn volume(&self) -> usize {
        self.size.iter().product()
    }
}

pub(super) fn ranges(total: usize, each: usize) -> impl Iterator<Item = Range<usize>> + Clone {
    (0..total).step_by(each).map(move |start| start..(start + each).min(total))
}

impl<T: Real> Pass<T> {
    /// For tiles of results of which a kernel's first elements lie `strides` apart.
    pub(super) fn new(shape: &Convolution, strides: [usize; 3], totals: [usize; 3]) -> Self {
        let channels = [shape.ins(), shape.outs(), shape.groups];
        let cut = plan(shape.axes.map(|axis| axis.extent()), strides, totals, channels);
        let is_small = cost(&cut, channels, shape.batch as f64) < SMALL;
        let fourier = Fourier::new(cut.map(|cut| cut.n));
        let tiles = cut.iter().map(|cut| cut.count).product();
        let bytes = fourier.frequencies() * 3 * (shape.ins() + shape.outs()) * size_of::<T>();
        Self { cut, fourier, tiles, total: shape.batch * tiles, groups: shape.groups, bytes, is_small }
    }

    /// The pool, or the calling thread alone for little work.
    pub(super) fn pool<'a>(&self, pool: &'a dyn Pool) -> &'a dyn Pool {
        if self.is_small { &Serial } else { pool }
    }

    /// Tiles whose spectra for `groups` groups fit into so many bytes.
    pub(super) fn fitting(&self, bytes: usize, groups: usize) -> usize {
        (bytes / (self.bytes * groups)).max(PART_TILES)
    }

    /// Calls `body` with parts that make the whole, each with its own thread or, where they are few, with all.
    pub(super) fn for_parts(&self, pool: &dyn Pool, body: impl Fn(Part, &dyn Pool) + Sync) {
        // Small enough for the threads to have equally many, but not so small that each reads the kernels' spectra anew.
        let share = (self.total * self.groups).div_ceil(2 * PARTS).max(PART_TILES / 2);
        let each = self.fitting(PART_BYTES, 1).min(share);
        let count = self.total.div_ceil(each);
        if count * self.groups >= PARTS {
            pool.for_ranges(count * self.groups, &|range| {
                for part in range {
                    let (group, start) = (part / count, part % count * each);
                    let tiles = start..(start + each).min(self.total);
                    body(Part { groups: group..group + 1, tiles }, &Serial);
                }
            });
        } else {
            for tiles in ranges(self.total, self.fitting(SHARED_BYTES, self.groups)) {
                body(Part { groups: 0..self.groups, tiles }, pool);
            }
        }
    }

    /// The element of the batch, and the results along each dimension, of a tile.
    pub(super) fn tile(&self, tile: usize) -> (usize, [Range<usize>; 3]) {
        let (batch, tile) = (tile / self.tiles, tile % self.tiles);
        let [_, rows, columns] = self.cut.map(|cut| cut.count);
        let place = [tile / (rows * columns), tile / columns % rows, tile % columns];
        (batch, [0, 1, 2].map(|axis| self.cut[axis].results(place[axis])))
    }

    /// The inverse transform's factor.
    pub(super) fn scale(&self) -> T {
        real(1.0 / self.cut.iter().map(|cut| cut.n).product::<usize>() as f64)
    }

    /// Room for the spectra of `rows` times `channels` in each group.
    pub(super) fn room(&self, groups: usize, rows: usize, channels: usize, planes: usize) -> Spectra<T> {
        Spectra::new(self.fourier.frequencies(), groups, rows, channels, planes)
    }

    /// The kernels' spectra, times the inverse transform's factor: rows are a group's outputs, channels its inputs.
    pub(super) fn kernels(&self, shape: &Convolution, weight: &[T], pool: &dyn Pool) -> Spectra<T> {
        let (ins, outs) = (shape.ins(), shape.outs());
        let mut spectra = self.room(shape.groups, outs, ins, 2);
        let places = Places::new(&mut spectra);
        let (size, scale) = (shape.kernels(), self.scale());
        let runs = kernel_runs(shape);
        let volume: usize = size.iter().product();
        for_items(&self.fourier, shape.out_channels * ins, pool, |item, workspace, _| {
            self.fourier.forward(&weight[item * volume..][..volume], size, &runs, scale, workspace);
            let (output, input) = (item / ins, item % ins);
            places.put(output % outs, output / outs * ins + input, &workspace.spectrum, None);
        });
        spectra
    }

    /// The place of each channel of a part's groups, numbered from 0, in tensors: (row, channel) to (tile, tensor).
    pub(super) fn place<V>(
        &self,
        part: &Part,
        tensors: &Tensors<V>,
        row: usize,
        channel: usize,
    ) -> ([Range<usize>; 3], usize) {
        let (batch, results) = self.tile(part.tiles.start + row);
        (results, (batch * self.groups + part.groups.start) * tensors.channels + channel)
    }

    /// The spectra of what a part's tiles need of tensors: where it lies, `runs_of` says.
    pub(super) fn spectra(
        &self,
        part: &Part,
        from: Tensors<&[T]>,
        third: Option<Product>,
        runs_of: impl Fn(&[Range<usize>; 3], &mut Runs) + Sync,
        pool: &dyn Pool,
    ) -> Spectra<T> {
        let planes = if third.is_some() { 3 } else { 2 };
        let mut spectra = self.room(part.groups.len(), part.tiles.len(), from.channels, planes);
        let places = Places::new(&mut spectra);
        let (channels, volume) = (part.groups.len() * from.channels, from.volume());
        for_items(&self.fourier, part.tiles.len() * channels, pool, |item, workspace, runs| {
            let (row, channel) = (item / channels, item % channels);
            let (results, tensor) = self.place(part, &from, row, channel);
            runs_of(&results, runs);
            let values = &from.values[tensor * volume..][..volume];
            self.fourier.forward(values, from.size, runs, T::one(), workspace);
            places.put(row, channel, &workspace.spectrum, third);
        });
        spectra
    }

    /// Transforms a part's sums back into tensors, to where `runs_of` says, and adds each channel's bias.
    pub(super) fn store(
        &self,
        part: &Part,
        mut sums: Spectra<T>,
        to: &Tensors<DisjointSlice<T>>,
        bias: Option<&[T]>,
        runs_of: impl Fn(&[Range<usize>; 3], &mut Runs) + Sync,
        pool: &dyn Pool,
    ) {
        let sums = Places::new(&mut sums);
        let (channels, volume, size) = (part.groups.len() * to.channels, to.volume(), to.size);
        for_items(&self.fourier, part.tiles.len() * channels, pool, |item, workspace, runs| {
            let (row, channel) = (item / channels, item % channels);
            let (results, tensor) = self.place(part, to, row, channel);
            runs_of(&results, runs);
            sums.get(row, channel, &mut workspace.spectrum);
            let bias = bias.map_or(T::default(), |bias| bias[part.groups.start * to.channels + channel]);
            let run = runs[2][0];
            self.fourier.inverse(runs, workspace, |plane, line, numbers| {
                let start = tensor * volume + (plane * size[1] + line) * size[2] + run.from;
                // SAFETY: every result belongs to one tile.
                #[allow(unsafe_code)]
                let out = unsafe { to.values.range_mut(start..start + run.count) };
                let numbers = &numbers[run.at..];
                if run.every == 1 {
                    out.iter_mut().zip(numbers).for_each(|(out, &number)| *out = number + bias);
                } else {
                    let numbers = numbers.iter().step_by(run.every);
                    out.iter_mut().zip(numbers).for_each(|(out, &number)| *out = number + bias);
                }
            });
        });
    }
}

/// Calls `body(vector, sums)` in parallel with each vector's sums, of all groups.
pub(super) fn for_vectors<T: Real>(
    out: &mut Spectra<T>,
    groups: usize,
    pool: &dyn Pool,
    body: impl Fn(usize, &mut [T]) + Sync,
) {
    let (size, count) = (out.vector(), groups * out.vectors);
    let places = DisjointSlice::new(&mut out.values);
    pool.for_ranges(count, &|range| {
        for index in range {
            // SAFETY: each vector is visited once.
            #[allow(unsafe_code)]
            let sums = unsafe { places.range_mut(index * size..(index + 1) * size) };
            body(index, sums);
        }
    });
}
