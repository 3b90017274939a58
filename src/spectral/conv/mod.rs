//! Convolution (PyTorch's: correlation) as a product of spectra, and its two companions: the partial derivatives of one
//! trilinear form Σ g[o]·w[k]·x[o·stride + k·dilation − padding], so each one's gradients are the other two.
//!
//! Along every dimension the result is computed in tiles (overlap-save): a tile's inputs are transformed, multiplied by the
//! kernel's spectra, which are computed once, and transformed back, and what wraps around is left out. A circular boundary is
//! a tile that is read around it. `plan.rs` says how large tiles are, `places.rs` where they lie, `pass.rs` computes them, `paired.rs`
//! where nothing is summed over channels.

mod paired;
mod pass;
mod places;
mod plan;

use std::ops::Range;

use super::products::{Factor, Product, Sums, contract};
use super::tile::{Run, Runs};
use crate::parallel::{DisjointSlice, Pool, Serial};
use crate::spectral::Real;
use crate::{Error, Result};
use paired::Paired;
use pass::{Part, Pass, Tensors, for_vectors, ranges};
use places::{Places, Spectra, for_items, input_runs, result_runs};
use plan::{PART_BYTES, PARTS, SHARED_BYTES};

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
