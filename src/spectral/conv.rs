//! Convolution (PyTorch's: correlation) as a product of spectra, and its two companions: the partial derivatives of one
//! trilinear form Σ g[o]·w[k]·x[o·stride + k·dilation − padding], so each one's gradients are the other two.
//!
//! Along every dimension the result is computed in tiles (overlap-save): a tile's inputs are transformed, multiplied by the
//! kernel's spectra, which are computed once, and transformed back, and what wraps around is left out. A circular boundary is
//! a tile that is read around it.

use std::ops::Range;
use std::sync::OnceLock;

use realfft::num_complex::Complex;

use super::Real;
use super::products::{Factor, Product, Sums, contract, multiply};
use super::tile::{Fourier, Run, Runs, Twin, Twins, Workspace};
use super::vector;
use crate::memory::AlignedVec;
use crate::parallel::{DisjointSlice, Pool, Serial};
use crate::{Error, Result, codec};

/// Bytes of spectra that a thread has in work at a time: its cache holds them.
const PART_BYTES: usize = 1 << 20;
/// Tiles in work at a time, at least: each use of the kernels' spectra serves them all.
const PART_TILES: usize = 8;
/// With so many parts, each is one thread's from beginning to end; of fewer, all threads share every step.
const PARTS: usize = 8;
/// Bytes of spectra that threads share at a time. More would not be in their caches, fewer would make them wait more often.
const SHARED_BYTES: usize = 32 << 20;
/// The tiles' sizes suit batches of so many. Not the batch itself: a row's bits must not depend on the others.
const NOMINAL_BATCH: f64 = 2.0;
/// Numbers of the kernels' spectra from which on smaller tiles are worth slower transforms.
const MANY_NUMBERS: f64 = (1u64 << 26) as f64;

// What work costs, in units of a transform's step for one number, which is about 0.09 ns. Measured on a Xeon with AVX-512.
/// Copying a number to a transform and from it, in steps.
const COPY: f64 = 6.0;
/// What a transform takes besides.
const TRANSFORM: f64 = 2000.0;
/// One complex product, summed.
const PRODUCT: f64 = 1.5;
/// What is not worth waking another thread for.
const SMALL: f64 = 1.5e6;

/// One dimension.
#[derive(Debug, Clone, Copy)]
pub struct Axis {
    pub input: usize,
    pub kernel: usize,
    pub stride: usize,
    pub dilation: usize,
    /// Padding before and after.
    pub before: usize,
    pub after: usize,
}

impl Axis {
    /// A dimension that is not there.
    const NONE: Self = Self { input: 1, kernel: 1, stride: 1, dilation: 1, before: 0, after: 0 };

    /// From the kernel's first element to its last.
    fn extent(&self) -> usize {
        (self.kernel - 1) * self.dilation + 1
    }

    fn padded(&self) -> usize {
        self.input + self.before + self.after
    }

    /// Elements of the result.
    pub fn output(&self) -> usize {
        (self.padded() - self.extent()) / self.stride + 1
    }

    /// The padded input's elements that are the input, which ends early where the kernel never reaches.
    fn positions(&self, circular: bool) -> Range<usize> {
        let reached = (self.output() - 1) * self.stride + self.extent();
        if circular { 0..reached } else { self.before.min(reached)..(self.before + self.input).min(reached) }
    }
}

/// The shape of a convolution.
#[derive(Debug, Clone)]
pub struct Convolution {
    batch: usize,
    in_channels: usize,
    out_channels: usize,
    groups: usize,
    axes: [Axis; 3],
    circular: bool,
}

/// What is at the borders: zeros, or the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boundary {
    Zeros,
    Circular,
}

impl Convolution {
    /// Of (batch, in_channels, …) to (batch, out_channels, …) with one to three `axes`, whose numbers are below 2³¹.
    pub fn new(
        batch: usize,
        in_channels: usize,
        out_channels: usize,
        groups: usize,
        axes: &[Axis],
        boundary: Boundary,
    ) -> Result<Self> {
        if !(1..=3).contains(&axes.len()) {
            return Err(Error::argument("kernel_size", "1 to 3 dimensions", axes.len()));
        }
        for (what, channels) in [("in_channels", in_channels), ("out_channels", out_channels)] {
            if groups == 0 || channels % groups != 0 {
                return Err(Error::argument("groups", format!("a divisor of {what}, {channels}"), groups));
            }
        }
        let circular = boundary == Boundary::Circular;
        for axis in axes {
            for (what, value) in [("kernel_size", axis.kernel), ("stride", axis.stride), ("dilation", axis.dilation)] {
                if value == 0 {
                    return Err(Error::argument(what, "positive integers", value));
                }
            }
            if circular && axis.before.max(axis.after) > axis.input {
                let expected = format!("at most the input's {} for a circular boundary", axis.input);
                return Err(Error::argument("padding", expected, axis.before.max(axis.after)));
            }
            if axis.extent() > axis.padded() {
                let expected = format!("at most the padded input's {} with its dilation", axis.padded());
                return Err(Error::argument("kernel_size", expected, axis.extent()));
            }
        }
        let mut all = [Axis::NONE; 3];
        all[3 - axes.len()..].copy_from_slice(axes);
        Ok(Self { batch, in_channels, out_channels, groups, axes: all, circular })
    }

    fn ins(&self) -> usize {
        self.in_channels / self.groups
    }

    fn outs(&self) -> usize {
        self.out_channels / self.groups
    }

    fn inputs(&self) -> [usize; 3] {
        self.axes.map(|axis| axis.input)
    }

    fn outputs(&self) -> [usize; 3] {
        self.axes.map(|axis| axis.output())
    }

    fn kernels(&self) -> [usize; 3] {
        self.axes.map(|axis| axis.kernel)
    }

    /// Whether some tensor has no elements.
    fn is_empty(&self) -> bool {
        let [planes, rows, columns] = self.inputs();
        [self.batch, self.in_channels, self.out_channels, planes, rows, columns].contains(&0)
    }
}

/// How a dimension is cut: `count` tiles of `each` of the `total` results, the last perhaps of fewer, by transforms of `n`.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Cut {
    n: usize,
    each: usize,
    count: usize,
    total: usize,
}

impl Cut {
    /// The results of a tile.
    fn results(&self, tile: usize) -> Range<usize> {
        tile * self.each..((tile + 1) * self.each).min(self.total)
    }
}

/// Lengths with factors of 2, 3, 5 and 7 alone, of which each takes fewer steps than all that are longer.
fn lengths(even: bool) -> Vec<usize> {
    const LONGEST: usize = 1 << 34;
    let powers = |from: usize, base: usize| std::iter::successors(Some(from), move |n| Some(n * base));
    let mut all = Vec::new();
    for sevens in powers(1, 7).take_while(|&n| n <= LONGEST) {
        for fives in powers(sevens, 5).take_while(|&n| n <= LONGEST) {
            for odd in powers(fives, 3).take_while(|&n| n <= LONGEST) {
                // Many different factors are slower than few.
                let mixed = usize::from(odd > fives) + usize::from(fives > sevens) + usize::from(sevens > 1);
                for n in powers(odd, 2).take_while(|&n| n <= LONGEST).filter(|n| !even || n % 2 == 0) {
                    all.push((n, steps(n as f64) * (1.0 + 0.05 * mixed as f64)));
                }
            }
        }
    }
    all.sort_by_key(|&(n, _)| n);
    let mut least = f64::INFINITY;
    let mut kept: Vec<usize> = Vec::new();
    for (n, cost) in all.into_iter().rev() {
        if cost < least {
            least = cost;
            kept.push(n);
        }
    }
    kept.reverse();
    kept
}

/// The length from `least` on that takes the fewest steps.
fn favourable(least: usize, even: bool) -> usize {
    static LENGTHS: OnceLock<[Vec<usize>; 2]> = OnceLock::new();
    let lengths = &LENGTHS.get_or_init(|| [false, true].map(lengths))[usize::from(even)];
    let place = lengths.partition_point(|&n| n < least);
    lengths.get(place).copied().unwrap_or_else(|| least.next_power_of_two())
}

/// Steps of a transform of `n` numbers and of the copies to it and from it.
fn steps(n: f64) -> f64 {
    n * (n.log2() + COPY)
}

/// The ways to cut a dimension with `total` results, `stride` apart, of a kernel of `extent`.
fn cuts(extent: usize, stride: usize, total: usize, last: bool) -> Vec<Cut> {
    let mut cuts: Vec<Cut> = Vec::new();
    let mut count = 1;
    while count <= total {
        let each = total.div_ceil(count);
        let n = favourable((each - 1) * stride + extent, last);
        // Room that the length leaves.
        let each = ((n - extent) / stride + 1).min(total);
        let cut = Cut { n, each, count: total.div_ceil(each), total };
        if cuts.last() != Some(&cut) {
            cuts.push(cut);
        }
        count += 1 + count / 5;
    }
    cuts
}

/// What a whole convolution costs, by the counts of its operations.
fn cost(cut: &[Cut; 3], [ins, outs, groups]: [usize; 3], batch: f64) -> f64 {
    // Of what is not done, the numbers may be too large for integers.
    let n: f64 = cut.iter().map(|cut| cut.n as f64).product();
    let tiles = batch * cut.iter().map(|cut| cut.count as f64).product::<f64>();
    let transform = steps(n) + TRANSFORM;
    let kernels = (groups * ins * outs) as f64;
    let work = tiles * ((groups * (ins + outs)) as f64 * transform + kernels * n / 2.0 * PRODUCT) + kernels * transform;
    work * (kernels * n / MANY_NUMBERS).max(1.0)
}

/// Cuts every dimension, one after the other until it gets no better, from the fewest tiles and from many.
fn plan(extents: [usize; 3], strides: [usize; 3], totals: [usize; 3], channels: [usize; 3]) -> [Cut; 3] {
    let ways = [0, 1, 2].map(|axis| cuts(extents[axis], strides[axis], totals[axis], axis == 2));
    let few = [0, 1, 2].map(|axis| ways[axis][0]);
    let many = [0, 1, 2].map(|axis| {
        let fits = ways[axis].iter().rev().find(|cut| cut.n >= 3 * extents[axis] && cut.n >= 8);
        *fits.unwrap_or(&ways[axis][0])
    });
    let improved = [few, many].map(|mut cut| {
        let mut best = cost(&cut, channels, NOMINAL_BATCH);
        for _ in 0..4 {
            let before = cut;
            for axis in [2, 1, 0] {
                for &way in &ways[axis] {
                    let mut other = cut;
                    other[axis] = way;
                    let cost = cost(&other, channels, NOMINAL_BATCH);
                    if cost < best {
                        (best, cut) = (cost, other);
                    }
                }
            }
            if cut == before {
                break;
            }
        }
        (best, cut)
    });
    if improved[0].0 <= improved[1].0 { improved[0].1 } else { improved[1].1 }
}

/// `positions` of the padded input, from a box's beginning on, as runs of the input.
fn input_runs(axis: &Axis, circular: bool, positions: Range<usize>, runs: &mut Vec<Run>) {
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
fn result_runs(axis: &Axis, positions: Range<isize>, runs: &mut Vec<Run>) {
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
struct Spectra<T> {
    values: AlignedVec<T>,
    vectors: usize,
    rows: usize,
    channels: usize,
    planes: usize,
    lanes: usize,
}

impl<T: Real> Spectra<T> {
    fn new(frequencies: usize, groups: usize, rows: usize, channels: usize, planes: usize) -> Self {
        let lanes = vector::lanes::<T>(usize::MAX);
        let vectors = frequencies.div_ceil(lanes);
        let values = AlignedVec::new(groups * vectors * rows * channels * planes * lanes);
        Self { values, vectors, rows, channels, planes, lanes }
    }

    /// Numbers of one row's channel for one vector.
    fn item(&self) -> usize {
        self.planes * self.lanes
    }

    /// Numbers of a vector.
    fn vector(&self) -> usize {
        self.rows * self.channels * self.item()
    }
}

/// Where a thread writes or reads one spectrum.
struct Places<'a, T> {
    slice: DisjointSlice<'a, T>,
    vectors: usize,
    vector: usize,
    channels: usize,
    item: usize,
    lanes: usize,
}

impl<'a, T: Real> Places<'a, T> {
    fn new(spectra: &'a mut Spectra<T>) -> Self {
        let (vectors, vector, channels) = (spectra.vectors, spectra.vector(), spectra.channels);
        let (item, lanes) = (spectra.item(), spectra.lanes);
        Self { slice: DisjointSlice::new(&mut spectra.values), vectors, vector, channels, item, lanes }
    }

    /// The places of a row's channel, numbered over all groups, in each vector.
    fn of(&self, row: usize, channel: usize) -> impl Iterator<Item = Range<usize>> {
        let (group, channel) = (channel / self.channels, channel % self.channels);
        let start = group * self.vectors * self.vector + (row * self.channels + channel) * self.item;
        let (vector, item) = (self.vector, self.item);
        (0..self.vectors).map(move |index| start + index * vector..start + index * vector + item)
    }

    /// Writes a spectrum, with the third plane that a product's second factor has.
    fn put(&self, row: usize, channel: usize, spectrum: &[Complex<T>], third: Option<Product>) {
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
    fn get(&self, row: usize, channel: usize, spectrum: &mut [Complex<T>]) {
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

fn real<T: Real>(value: f64) -> T {
    <T as codec::Scalar>::from_f64(value)
}

/// Calls `body` for each of `items` in parallel, with a thread's workspace and room for runs.
fn for_items<T: Real>(
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

/// The tiles of one pass: a plan and its transform.
struct Pass<T> {
    cut: [Cut; 3],
    fourier: Fourier<T>,
    /// Tiles of one element of the batch.
    tiles: usize,
    total: usize,
    groups: usize,
    /// Bytes of a tile's spectra for one group.
    bytes: usize,
    is_small: bool,
}

/// Some of the tiles, over the batch, for some of the groups.
#[derive(Debug, Clone)]
struct Part {
    groups: Range<usize>,
    tiles: Range<usize>,
}

/// Tensors of so many channels a group times `size`.
#[derive(Clone, Copy)]
struct Tensors<V> {
    values: V,
    channels: usize,
    size: [usize; 3],
}

impl<V> Tensors<V> {
    fn volume(&self) -> usize {
        self.size.iter().product()
    }
}

fn ranges(total: usize, each: usize) -> impl Iterator<Item = Range<usize>> + Clone {
    (0..total).step_by(each).map(move |start| start..(start + each).min(total))
}

impl<T: Real> Pass<T> {
    /// For tiles of results of which a kernel's first elements lie `strides` apart.
    fn new(shape: &Convolution, strides: [usize; 3], totals: [usize; 3]) -> Self {
        let channels = [shape.ins(), shape.outs(), shape.groups];
        let cut = plan(shape.axes.map(|axis| axis.extent()), strides, totals, channels);
        let is_small = cost(&cut, channels, shape.batch as f64) < SMALL;
        let fourier = Fourier::new(cut.map(|cut| cut.n));
        let tiles = cut.iter().map(|cut| cut.count).product();
        let bytes = fourier.frequencies() * 3 * (shape.ins() + shape.outs()) * size_of::<T>();
        Self { cut, fourier, tiles, total: shape.batch * tiles, groups: shape.groups, bytes, is_small }
    }

    /// The pool, or the calling thread alone for little work.
    fn pool<'a>(&self, pool: &'a dyn Pool) -> &'a dyn Pool {
        if self.is_small { &Serial } else { pool }
    }

    /// Tiles whose spectra for `groups` groups fit into so many bytes.
    fn fitting(&self, bytes: usize, groups: usize) -> usize {
        (bytes / (self.bytes * groups)).max(PART_TILES)
    }

    /// Calls `body` with parts that make the whole, each with its own thread or, where they are few, with all.
    fn for_parts(&self, pool: &dyn Pool, body: impl Fn(Part, &dyn Pool) + Sync) {
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
    fn tile(&self, tile: usize) -> (usize, [Range<usize>; 3]) {
        let (batch, tile) = (tile / self.tiles, tile % self.tiles);
        let [_, rows, columns] = self.cut.map(|cut| cut.count);
        let place = [tile / (rows * columns), tile / columns % rows, tile % columns];
        (batch, [0, 1, 2].map(|axis| self.cut[axis].results(place[axis])))
    }

    /// The inverse transform's factor.
    fn scale(&self) -> T {
        real(1.0 / self.cut.iter().map(|cut| cut.n).product::<usize>() as f64)
    }

    /// Room for the spectra of `rows` times `channels` in each group.
    fn room(&self, groups: usize, rows: usize, channels: usize, planes: usize) -> Spectra<T> {
        Spectra::new(self.fourier.frequencies(), groups, rows, channels, planes)
    }

    /// The kernels' spectra, times the inverse transform's factor: rows are a group's outputs, channels its inputs.
    fn kernels(&self, shape: &Convolution, weight: &[T], pool: &dyn Pool) -> Spectra<T> {
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
    fn place<V>(&self, part: &Part, tensors: &Tensors<V>, row: usize, channel: usize) -> ([Range<usize>; 3], usize) {
        let (batch, results) = self.tile(part.tiles.start + row);
        (results, (batch * self.groups + part.groups.start) * tensors.channels + channel)
    }

    /// The spectra of what a part's tiles need of tensors: where it lies, `runs_of` says.
    fn spectra(
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
    fn store(
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
fn for_vectors<T: Real>(out: &mut Spectra<T>, groups: usize, pool: &dyn Pool, body: impl Fn(usize, &mut [T]) + Sync) {
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

/// Where the kernel's elements lie in a box.
fn kernel_runs(shape: &Convolution) -> Runs {
    shape.axes.map(|axis| vec![Run { at: 0, every: axis.dilation, from: 0, count: axis.kernel }])
}

/// Sets `runs` to where the inputs of some results lie.
fn inputs_of(shape: &Convolution, results: &[Range<usize>; 3], runs: &mut Runs) {
    for ((axis, results), runs) in shape.axes.iter().zip(results).zip(runs) {
        let end = (results.end - 1) * axis.stride + axis.extent();
        input_runs(axis, shape.circular, results.start * axis.stride..end, runs);
    }
}

/// Sets `runs` to where some results lie, the first at a box's beginning.
fn results_of(shape: &Convolution, results: &[Range<usize>; 3], runs: &mut Runs) {
    for ((axis, results), runs) in shape.axes.iter().zip(results).zip(runs) {
        runs.clear();
        runs.push(Run { at: 0, every: axis.stride, from: results.start, count: results.len() });
    }
}

/// y = x ⋆ w + b.
pub fn forward<T: Real>(shape: &Convolution, x: &[T], weight: &[T], bias: Option<&[T]>, y: &mut [T], pool: &dyn Pool) {
    let size = shape.outputs();
    if shape.is_empty() {
        for (channel, y) in y.chunks_exact_mut(size.iter().product()).enumerate() {
            y.fill(bias.map_or(T::default(), |bias| bias[channel % shape.out_channels]));
        }
        return;
    }
    let (ins, outs) = (shape.ins(), shape.outs());
    let x = Tensors { values: x, channels: ins, size: shape.inputs() };
    let y = Tensors { values: DisjointSlice::new(y), channels: outs, size };
    let inputs = |results: &[Range<usize>; 3], runs: &mut Runs| inputs_of(shape, results, runs);
    let results = |results: &[Range<usize>; 3], runs: &mut Runs| results_of(shape, results, runs);
    let last = (shape.axes[2].stride, size[2]);
    if let Some(paired) = Paired::new(shape, (Product::Conjugate, outs), last, weight, pool) {
        paired.run(x, &y, bias, inputs, results);
        return;
    }
    let pass = Pass::new(shape, shape.axes.map(|axis| axis.stride), size);
    let pool = pass.pool(pool);
    let kernels = pass.kernels(shape, weight, pool);
    pass.for_parts(pool, |part, pool| {
        let b = pass.spectra(&part, x, Some(Product::Conjugate), inputs, pool);
        let mut sums = pass.room(part.groups.len(), part.tiles.len(), outs, 2);
        let (item, first) = (sums.item(), part.groups.start * kernels.vectors);
        for_vectors(&mut sums, part.groups.len(), pool, |index, sums| {
            let (a, b) = (factor(&kernels, first + index, Side::Rows), factor(&b, index, Side::Rows));
            contract(
                Product::Conjugate,
                a,
                b,
                ins,
                Sums { values: sums, a_item: item, b_item: outs * item, add: false },
            );
        });
        pass.store(&part, sums, &y, bias, results, pool);
    });
}

/// Which of spectra's two indices a factor's items are; the other one is summed over.
#[derive(Clone, Copy)]
enum Side {
    Rows,
    Channels,
}

/// One vector of spectra as a factor. `index` counts groups' vectors.
fn factor<T: Real>(spectra: &Spectra<T>, index: usize, side: Side) -> Factor<'_, T> {
    let values = &spectra.values[index * spectra.vector()..][..spectra.vector()];
    let (row, channel) = (spectra.channels * spectra.item(), spectra.item());
    match side {
        Side::Rows => Factor { values, items: spectra.rows, item: row, step: channel },
        Side::Channels => Factor { values, items: spectra.channels, item: channel, step: row },
    }
}

/// The gradient by x of Σ g·y.
pub fn input_gradient<T: Real>(shape: &Convolution, gradient: &[T], weight: &[T], dx: &mut [T], pool: &dyn Pool) {
    // Around a circular boundary several positions of the padded input are one of the input.
    if shape.circular && !shape.is_empty() {
        let mut padded = shape.clone();
        padded.circular = false;
        for axis in &mut padded.axes {
            (axis.input, axis.before, axis.after) = (axis.positions(true).end, 0, 0);
        }
        let volume: usize = padded.inputs().iter().product();
        let mut out = vec![T::default(); shape.batch * shape.in_channels * volume];
        input_gradient(&padded, gradient, weight, &mut out, pool);
        fold(shape, &out, padded.inputs(), dx, pool);
        return;
    }
    // Where the kernel does not reach.
    dx.fill(T::default());
    let positions = shape.axes.map(|axis| axis.positions(false));
    if shape.is_empty() || positions.iter().any(Range::is_empty) {
        return;
    }
    let (ins, outs) = (shape.ins(), shape.outs());
    let gradient = Tensors { values: gradient, channels: outs, size: shape.outputs() };
    let dx = Tensors { values: DisjointSlice::new(dx), channels: ins, size: shape.inputs() };
    // A tile's box begins where the kernel does that ends at its first position.
    let reach = shape.axes.map(|axis| axis.extent() - 1);
    let needed = |tile: &[Range<usize>; 3], runs: &mut Runs| {
        for (axis, runs) in runs.iter_mut().enumerate() {
            let place = |place: usize| (positions[axis].start + place) as isize;
            let start = place(tile[axis].start) - reach[axis] as isize;
            result_runs(&shape.axes[axis], start..place(tile[axis].end), runs);
        }
    };
    let stored = |tile: &[Range<usize>; 3], runs: &mut Runs| {
        for (axis, runs) in runs.iter_mut().enumerate() {
            let from = positions[axis].start + tile[axis].start - shape.axes[axis].before;
            runs.clear();
            runs.push(Run { at: reach[axis], every: 1, from, count: tile[axis].len() });
        }
    };
    if let Some(paired) = Paired::new(shape, (Product::Plain, ins), (1, positions[2].len()), weight, pool) {
        paired.run(gradient, &dx, None, needed, stored);
        return;
    }
    let pass = Pass::new(shape, [1; 3], positions.clone().map(|positions| positions.len()));
    let pool = pass.pool(pool);
    let kernels = pass.kernels(shape, weight, pool);
    pass.for_parts(pool, |part, pool| {
        let b = pass.spectra(&part, gradient, Some(Product::Plain), needed, pool);
        let mut sums = pass.room(part.groups.len(), part.tiles.len(), ins, 2);
        let (item, first) = (sums.item(), part.groups.start * kernels.vectors);
        for_vectors(&mut sums, part.groups.len(), pool, |index, sums| {
            let (a, b) = (factor(&kernels, first + index, Side::Channels), factor(&b, index, Side::Rows));
            contract(Product::Plain, a, b, outs, Sums { values: sums, a_item: item, b_item: ins * item, add: false });
        });
        pass.store(&part, sums, &dx, None, stored, pool);
    });
}

/// A convolution along the last dimension alone whose every result is of one channel: nothing is summed, so that two tiles at
/// a time are transformed as one complex row, multiplied where they are, and transformed back.
struct Paired<'a, T> {
    cut: Cut,
    twins: Twins<T>,
    batch: usize,
    groups: usize,
    /// Of each result's kernel, times the inverse transform's factor; conjugates for a correlation.
    kernels: AlignedVec<Complex<T>>,
    pool: &'a dyn Pool,
}

impl<'a, T: Real> Paired<'a, T> {
    /// None if it is no such convolution. `channels` are those of a group's results.
    fn new(
        shape: &Convolution,
        (product, channels): (Product, usize),
        (stride, total): (usize, usize),
        weight: &[T],
        pool: &'a dyn Pool,
    ) -> Option<Self> {
        let single = if product == Product::Conjugate { shape.ins() } else { shape.outs() };
        let is_one_dimension = |axis: &Axis| axis.padded() == 1;
        if single != 1 || !shape.axes[..2].iter().all(is_one_dimension) {
            return None;
        }
        let axis = &shape.axes[2];
        let kernels = (shape.groups * channels) as f64;
        let cost = |cut: &Cut, batch: f64| {
            let pairs = batch * cut.count.div_ceil(2) as f64 * shape.groups as f64;
            (pairs * (1 + channels) as f64 + kernels) * (steps(cut.n as f64) + TRANSFORM)
        };
        let by_cost = |a: &Cut, b: &Cut| cost(a, NOMINAL_BATCH).total_cmp(&cost(b, NOMINAL_BATCH));
        let cut = cuts(axis.extent(), stride, total, true).into_iter().min_by(by_cost)?;
        let pool = if cost(&cut, shape.batch as f64) < SMALL { &Serial } else { pool };
        let twins = Twins::new(cut.n);
        let mut kernels = AlignedVec::new(shape.groups * channels * cut.n);
        let places = DisjointSlice::new(&mut kernels);
        let scale = real(1.0 / cut.n as f64);
        let [.., runs] = kernel_runs(shape);
        pool.for_ranges(shape.groups * channels, &|range| {
            let mut workspace = twins.workspace();
            for item in range {
                // SAFETY: each kernel has a place of its own.
                #[allow(unsafe_code)]
                let spectrum = unsafe { places.range_mut(item * cut.n..(item + 1) * cut.n) };
                workspace.put(Twin::First, &weight[item * axis.kernel..][..axis.kernel], &runs);
                twins.forward(&mut workspace, scale, spectrum);
                if product == Product::Conjugate {
                    spectrum.iter_mut().for_each(|number| *number = number.conj());
                }
            }
        });
        Some(Self { cut, twins, batch: shape.batch, groups: shape.groups, kernels, pool })
    }

    fn run(
        &self,
        from: Tensors<&[T]>,
        to: &Tensors<DisjointSlice<T>>,
        bias: Option<&[T]>,
        needed: impl Fn(&[Range<usize>; 3], &mut Runs) + Sync,
        stored: impl Fn(&[Range<usize>; 3], &mut Runs) + Sync,
    ) {
        let Self { cut, twins, kernels, .. } = self;
        let (pairs, zero) = (cut.count.div_ceil(2), Complex::new(T::default(), T::default()));
        let (volume, out_volume) = (from.volume(), to.volume());
        self.pool.for_ranges(self.batch * self.groups * pairs, &|range| {
            let (mut workspace, mut runs) = (twins.workspace(), Runs::default());
            let (mut spectrum, mut product) = (vec![zero; cut.n], vec![zero; cut.n]);
            for item in range {
                let (row, first) = (item / pairs, item % pairs * 2);
                // Of an odd count, the last has no twin.
                let tiles =
                    [(Twin::First, first), (Twin::Second, first + 1)].into_iter().filter(|tile| tile.1 < cut.count);
                for (twin, tile) in tiles.clone() {
                    needed(&[0..1, 0..1, cut.results(tile)], &mut runs);
                    workspace.put(twin, &from.values[row * volume..][..volume], &runs[2]);
                }
                if first + 1 == cut.count {
                    workspace.put(Twin::Second, &[], &[]);
                }
                twins.forward(&mut workspace, T::one(), &mut spectrum);
                for channel in 0..to.channels {
                    let kernel = row % self.groups * to.channels + channel;
                    multiply(&spectrum, &kernels[kernel * cut.n..][..cut.n], &mut product);
                    twins.inverse(&mut product, &mut workspace);
                    let bias = bias.map_or(T::default(), |bias| bias[kernel]);
                    for (twin, tile) in tiles.clone() {
                        stored(&[0..1, 0..1, cut.results(tile)], &mut runs);
                        let run = runs[2][0];
                        let start = (row * to.channels + channel) * out_volume + run.from;
                        // SAFETY: every result belongs to one tile.
                        #[allow(unsafe_code)]
                        let out = unsafe { to.values.range_mut(start..start + run.count) };
                        workspace.get(twin, run, bias, out);
                    }
                }
            }
        });
    }
}

/// Sums what a circular boundary makes one: `padded`, of `size`, to `out`.
fn fold<T: Real>(shape: &Convolution, padded: &[T], size: [usize; 3], out: &mut [T], pool: &dyn Pool) {
    let inputs = shape.inputs();
    let (from, to): (usize, usize) = (size.iter().product(), inputs.iter().product());
    let mut runs = Runs::default();
    for (axis, runs) in runs.iter_mut().enumerate() {
        input_runs(&shape.axes[axis], true, 0..size[axis], runs);
    }
    let places = DisjointSlice::new(out);
    let lines = |runs: &[Run]| -> Vec<(usize, usize)> {
        runs.iter().flat_map(|run| (0..run.count).map(|index| (run.at + index, run.from + index))).collect()
    };
    let (planes, rows) = (lines(&runs[0]), lines(&runs[1]));
    pool.for_ranges(shape.batch * shape.in_channels, &|range| {
        for item in range {
            // SAFETY: each item is visited once.
            #[allow(unsafe_code)]
            let out = unsafe { places.range_mut(item * to..(item + 1) * to) };
            let padded = &padded[item * from..][..from];
            out.fill(T::default());
            for &(plane, to_plane) in &planes {
                for &(row, to_row) in &rows {
                    let padded = &padded[(plane * size[1] + row) * size[2]..][..size[2]];
                    let out = &mut out[(to_plane * inputs[1] + to_row) * inputs[2]..][..inputs[2]];
                    for run in &runs[2] {
                        let padded = &padded[run.at..run.at + run.count];
                        out[run.from..].iter_mut().zip(padded).for_each(|(out, &value)| *out += value);
                    }
                }
            }
        }
    });
}

/// The gradient by w of Σ g·y.
pub fn weight_gradient<T: Real>(shape: &Convolution, gradient: &[T], x: &[T], dw: &mut [T], pool: &dyn Pool) {
    if shape.is_empty() {
        dw.fill(T::default());
        return;
    }
    let (ins, outs) = (shape.ins(), shape.outs());
    let pass = Pass::new(shape, shape.axes.map(|axis| axis.stride), shape.outputs());
    let pool = pass.pool(pool);
    let gradient = Tensors { values: gradient, channels: outs, size: shape.outputs() };
    let x = Tensors { values: x, channels: ins, size: shape.inputs() };
    let places = DisjointSlice::new(dw);
    let (size, scale, runs) = (shape.kernels(), pass.scale(), kernel_runs(shape));
    let (volume, dilation) = (size.iter().product::<usize>(), shape.axes[2].dilation);
    // A sum over the tiles: its order is theirs, whoever does it.
    let part = |groups: Range<usize>, bytes: usize, pool: &dyn Pool| {
        let mut sums = pass.room(groups.len(), outs, ins, 2);
        for tiles in ranges(pass.total, pass.fitting(bytes, groups.len())) {
            let part = Part { groups: groups.clone(), tiles };
            let results = |results: &[Range<usize>; 3], runs: &mut Runs| results_of(shape, results, runs);
            let a = pass.spectra(&part, gradient, None, results, pool);
            let inputs = |results: &[Range<usize>; 3], runs: &mut Runs| inputs_of(shape, results, runs);
            let b = pass.spectra(&part, x, Some(Product::Conjugate), inputs, pool);
            let (item, add) = (sums.item(), part.tiles.start > 0);
            for_vectors(&mut sums, groups.len(), pool, |index, sums| {
                let (a, b) = (factor(&a, index, Side::Channels), factor(&b, index, Side::Channels));
                let out = Sums { values: sums, a_item: ins * item, b_item: item, add };
                contract(Product::Conjugate, a, b, part.tiles.len(), out);
            });
        }
        let sums = Places::new(&mut sums);
        for_items(&pass.fourier, groups.len() * outs * ins, pool, |item, workspace, _| {
            let (output, input) = (item / ins, item % ins);
            sums.get(output % outs, output / outs * ins + input, &mut workspace.spectrum);
            pass.fourier.inverse(&runs, workspace, |plane, line, numbers| {
                let start = (groups.start * outs * ins + item) * volume + (plane * size[1] + line) * size[2];
                // SAFETY: each kernel is visited once.
                #[allow(unsafe_code)]
                let out = unsafe { places.range_mut(start..start + size[2]) };
                let numbers = numbers.iter().step_by(dilation);
                out.iter_mut().zip(numbers).for_each(|(out, &number)| *out = number * scale);
            });
        });
    };
    if shape.groups >= PARTS {
        pool.for_ranges(shape.groups, &|range| range.for_each(|group| part(group..group + 1, PART_BYTES, &Serial)));
    } else {
        part(0..shape.groups, SHARED_BYTES, pool);
    }
}
