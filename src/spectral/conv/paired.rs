//! Convolutions whose channels are not summed: two tiles a transform.

use std::ops::Range;

use realfft::num_complex::Complex;

use super::super::products::{Product, multiply};
use super::super::tile::{Runs, Twin, Twins};
use super::pass::Tensors;
use super::places::real;
use super::plan::{Cut, NOMINAL_BATCH, SMALL, TRANSFORM, cuts, steps};
use super::{Axis, Convolution, kernel_runs};
use crate::memory::AlignedVec;
use crate::parallel::{DisjointSlice, Pool, Serial};
use crate::spectral::Real;

/// A convolution along the last dimension alone whose every result is of one channel: nothing is summed, so that two tiles at
/// a time are transformed as one complex row, multiplied where they are, and transformed back.
pub(super) struct Paired<'a, T> {
    pub(super) cut: Cut,
    pub(super) twins: Twins<T>,
    pub(super) batch: usize,
    pub(super) groups: usize,
    /// Of each result's kernel, times the inverse transform's factor; conjugates for a correlation.
    pub(super) kernels: AlignedVec<Complex<T>>,
    pub(super) pool: &'a dyn Pool,
}

impl<'a, T: Real> Paired<'a, T> {
    /// None if it is no such convolution. `channels` are those of a group's results.
    pub(super) fn new(
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

    pub(super) fn run(
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
