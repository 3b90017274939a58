//! How many tiles of what size a convolution is computed in: the least work, by the counts of its operations.

use std::ops::Range;
use std::sync::OnceLock;

/// Bytes of spectra that a thread has in work at a time: its cache holds them.
pub(super) const PART_BYTES: usize = 1 << 20;
/// Tiles in work at a time, at least: each use of the kernels' spectra serves them all.
pub(super) const PART_TILES: usize = 8;
/// With so many parts, each is one thread's from beginning to end; of fewer, all threads share every step.
pub(super) const PARTS: usize = 8;
/// Bytes of spectra that threads share at a time. More would not be in their caches, fewer would make them wait more often.
pub(super) const SHARED_BYTES: usize = 32 << 20;
/// The tiles' sizes suit batches of so many. Not the batch itself: a row's bits must not depend on the others.
pub(super) const NOMINAL_BATCH: f64 = 2.0;
/// Numbers of the kernels' spectra from which on smaller tiles are worth slower transforms.
const MANY_NUMBERS: f64 = (1u64 << 26) as f64;

// What work costs, in units of a transform's step for one number, which is about 0.09 ns. Measured on a Xeon with AVX-512.
/// Copying a number to a transform and from it, in steps.
const COPY: f64 = 6.0;
/// What a transform takes besides.
pub(super) const TRANSFORM: f64 = 2000.0;
/// One complex product, summed.
const PRODUCT: f64 = 1.5;
/// What is not worth waking another thread for.
pub(super) const SMALL: f64 = 1.5e6;

/// How a dimension is cut: `count` tiles of `each` of the `total` results, the last perhaps of fewer, by transforms of `n`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Cut {
    pub(super) n: usize,
    pub(super) each: usize,
    pub(super) count: usize,
    pub(super) total: usize,
}

impl Cut {
    /// The results of a tile.
    pub(super) fn results(&self, tile: usize) -> Range<usize> {
        tile * self.each..((tile + 1) * self.each).min(self.total)
    }
}

/// Lengths with factors of 2, 3, 5 and 7 alone, of which each takes fewer steps than all that are longer.
pub(super) fn lengths(even: bool) -> Vec<usize> {
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
pub(super) fn favourable(least: usize, even: bool) -> usize {
    static LENGTHS: OnceLock<[Vec<usize>; 2]> = OnceLock::new();
    let lengths = &LENGTHS.get_or_init(|| [false, true].map(lengths))[usize::from(even)];
    let place = lengths.partition_point(|&n| n < least);
    lengths.get(place).copied().unwrap_or_else(|| least.next_power_of_two())
}

/// Steps of a transform of `n` numbers and of the copies to it and from it.
pub(super) fn steps(n: f64) -> f64 {
    n * (n.log2() + COPY)
}

/// The ways to cut a dimension with `total` results, `stride` apart, of a kernel of `extent`.
pub(super) fn cuts(extent: usize, stride: usize, total: usize, last: bool) -> Vec<Cut> {
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
pub(super) fn cost(cut: &[Cut; 3], [ins, outs, groups]: [usize; 3], batch: f64) -> f64 {
    // Of what is not done, the numbers may be too large for integers.
    let n: f64 = cut.iter().map(|cut| cut.n as f64).product();
    let tiles = batch * cut.iter().map(|cut| cut.count as f64).product::<f64>();
    let transform = steps(n) + TRANSFORM;
    let kernels = (groups * ins * outs) as f64;
    let work = tiles * ((groups * (ins + outs)) as f64 * transform + kernels * n / 2.0 * PRODUCT) + kernels * transform;
    work * (kernels * n / MANY_NUMBERS).max(1.0)
}

/// Cuts every dimension, one after the other until it gets no better, from the fewest tiles and from many.
pub(super) fn plan(extents: [usize; 3], strides: [usize; 3], totals: [usize; 3], channels: [usize; 3]) -> [Cut; 3] {
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
