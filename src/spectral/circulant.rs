//! The block-circulant product and its two companions: the partial derivatives of one trilinear form
//! T(g, w, x) = Σ conj(ĝ_p[k])·ŵ_pq[k]·x̂_q[k], so each one's gradients are the other two.
//!
//! Lanes of a vector are numbers of *one* packed spectrum, so that spectra are used as they are stored, whatever the batch:
//! one factor is expanded to two rows, which multiplied by the other, number by number, give the real and the imaginary parts.

use std::ops::Range;
use std::sync::Arc;

use super::kernel::{Factor, contract, lanes};
use super::transform::{Real, Scale, Transform, Workspace, for_common_sizes};
use crate::codec::per_isa;
use crate::memory::{AlignedVec, with_scratch};
use crate::parallel::{DisjointSlice, Pool};
use crate::{Error, Result};

/// Rows of x that are transformed and multiplied at a time: their spectra stay in the cache.
const PANEL: usize = 48;
/// Items that are multiplied with all of a thread's rows before the next: their spectra stay in the nearest cache.
const ITEMS: usize = 3;
/// A weight that is multiplied by no more rows is read as it is stored.
const FEW: usize = 2 * ITEMS;
/// Blocks that are transformed together.
const GROUP: usize = 12;

/// The shape of a block-circulant weight: `outputs` by `inputs` blocks of `n`, cut to `out_features` by `in_features`.
pub struct Circulant<T> {
    pub out_features: usize,
    pub in_features: usize,
    pub outputs: usize,
    pub inputs: usize,
    transform: Arc<Transform<T>>,
}

impl<T: Real> Circulant<T> {
    /// For features of which the last block may be cut short. `n` is positive.
    pub fn new(out_features: usize, in_features: usize, n: usize) -> Result<Self> {
        if n == 0 {
            return Err(Error::argument("block", "a positive size", n));
        }
        let (outputs, inputs) = (out_features.div_ceil(n), in_features.div_ceil(n));
        Ok(Self { out_features, in_features, outputs, inputs, transform: Transform::get(n) })
    }

    pub fn n(&self) -> usize {
        self.transform.n()
    }

    /// Numbers of the packed spectra of all blocks.
    pub fn len(&self) -> usize {
        self.outputs * self.inputs * self.n()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// How a spectrum is expanded to the two rows that its product with a packed spectrum's numbers is made of; the signs of
/// the imaginary parts in the first, and of the imaginary and the real parts in the second.
#[derive(Clone, Copy)]
enum Expand {
    /// w · x.
    Product,
    /// conj(w) · g.
    Conjugate,
    /// g · conj(x), where x is expanded.
    Outer,
}

impl Expand {
    fn signs<T: Real>(self) -> [T; 3] {
        let one = T::one();
        match self {
            Self::Product => [-one, one, one],
            Self::Conjugate => [one, one, -one],
            Self::Outer => [one, -one, one],
        }
    }
}

/// Rows of blocks of `n`, the last of which may be cut short.
#[derive(Clone, Copy)]
struct Rows<'a, T> {
    values: &'a [T],
    features: usize,
    blocks: usize,
    n: usize,
}

impl<'a, T> Rows<'a, T> {
    fn block(&self, row: usize, block: usize) -> &'a [T] {
        let start = (block * self.n).min(self.features);
        let end = ((block + 1) * self.n).min(self.features);
        &self.values[row * self.features + start..row * self.features + end]
    }
}

/// Calls `body(workspace, first block, blocks)` for groups of the blocks of `rows`, in parallel.
fn for_groups<T: Real>(
    transform: &Transform<T>,
    blocks: usize,
    pool: &dyn Pool,
    body: impl Fn(&mut Workspace<T>, usize, usize) + Sync,
) {
    pool.for_ranges(blocks.div_ceil(GROUP), &|groups| {
        let mut workspace = transform.workspace();
        for group in groups {
            let first = group * GROUP;
            body(&mut workspace, first, GROUP.min(blocks - first));
        }
    });
}

per_isa! {
    /// A spectrum's two rows for a product, of its halves. `signs` are [`Expand::signs`].
    fn expand<T: Real>(n: usize, re: &[T], im: &[T], signs: [T; 3], one: &mut [T], two: &mut [T]) {
        for_common_sizes!(n, {
            let (half, middle, odd) = (n.div_ceil(2), n / 2, n % 2);
            let (re, im) = (&re[..half], &im[..half]);
            let (one, two) = (&mut one[..n], &mut two[..n]);
            one[..half].copy_from_slice(re);
            two[..half].iter_mut().zip(im).for_each(|(out, &im)| *out = signs[1] * im);
            one[middle + odd..].iter_mut().zip(&im[odd..]).for_each(|(out, &im)| *out = signs[0] * im);
            two[middle + odd..].iter_mut().zip(&re[odd..]).for_each(|(out, &re)| *out = signs[2] * re);
            // What is alone: frequency 0, and an even block's Nyquist frequency.
            two[0] = T::default();
            if odd == 0 {
                (one[middle], two[middle]) = (T::default(), im[0]);
            }
        });
    }
}

per_isa! {
    /// The halves of a product's spectrum, of its two rows of sums.
    fn fold<T: Real>(n: usize, one: &[T], two: &[T], re: &mut [T], im: &mut [T]) {
        for_common_sizes!(n, {
            let (half, middle) = (n.div_ceil(2), n / 2);
            let sum = |row: &[T], out: &mut [T]| {
                let (low, high) = (&row[..half], &row[middle..][..half]);
                out[..half].iter_mut().zip(low).zip(high).for_each(|((out, &a), &b)| *out = a + b);
            };
            sum(one, re);
            sum(two, im);
            if n % 2 == 1 {
                (re[0], im[0]) = (one[0], T::default());
            }
        });
    }
}

/// Where the vectors of blocks lie: `[vector][place][part][lane]`, with as many parts as a block has rows of numbers.
struct Vectors<'a, T> {
    out: DisjointSlice<'a, T>,
    n: usize,
    places: usize,
}

impl<T: Real> Vectors<'_, T> {
    /// Writes a block's rows. No two blocks may have one place.
    fn put<const PARTS: usize>(&self, place: usize, rows: [&[T]; PARTS]) {
        if lanes(self.n) == 16 {
            self.put_lanes::<16, PARTS>(place, rows)
        } else {
            self.put_lanes::<8, PARTS>(place, rows)
        }
    }

    fn put_lanes<const L: usize, const PARTS: usize>(&self, place: usize, rows: [&[T]; PARTS]) {
        let n = self.n;
        let stride = self.places * PARTS * L;
        for_common_sizes!(n, {
            for (part, row) in rows.into_iter().enumerate() {
                let (whole, rest) = row[..n].as_chunks::<L>();
                let mut start = (place * PARTS + part) * L;
                for values in whole {
                    // SAFETY: each block has a place of its own.
                    #[allow(unsafe_code)]
                    let out = unsafe { self.out.range_mut(start..start + L) };
                    out.copy_from_slice(values);
                    start += stride;
                }
                if !rest.is_empty() {
                    // SAFETY: as above.
                    #[allow(unsafe_code)]
                    let out = unsafe { self.out.range_mut(start..start + rest.len()) };
                    out.copy_from_slice(rest);
                }
            }
        });
    }
}

/// Blocks to transform: those of some rows, and where each one's spectrum goes.
struct Blocks<'a, T, P> {
    rows: Rows<'a, T>,
    range: &'a Range<usize>,
    /// Of a row of `range`, counted from its first, and a block.
    place: P,
}

impl<T: Real, P: Fn(usize, usize) -> usize + Sync> Blocks<'_, T, P> {
    /// Transforms the blocks and writes to `out`, in vectors, the rows of numbers that `write(real, imaginary, rows)` makes of
    /// each spectrum. What is beyond a block in its last vector is left as it is: no lane's sum has to do with another's.
    fn transform<const PARTS: usize>(
        &self,
        transform: &Transform<T>,
        scale: Scale,
        out: &mut [T],
        write: impl Fn(&[T], &[T], &mut [Vec<T>; PARTS]) + Sync,
        pool: &dyn Pool,
    ) {
        let Self { rows, range, place } = self;
        let n = transform.n();
        let places = range.len() * rows.blocks;
        let vectors = Vectors { out: DisjointSlice::new(out), n, places };
        for_groups(transform, places, pool, |workspace, start, blocks| {
            let mut numbers: [Vec<T>; PARTS] = std::array::from_fn(|_| vec![T::default(); n]);
            let place_of = |index: usize| ((start + index) / rows.blocks, (start + index) % rows.blocks);
            let block = |index: usize| rows.block(range.start + place_of(index).0, place_of(index).1);
            transform.forward(scale, blocks, block, workspace, |index, re, im| {
                write(re, im, &mut numbers);
                let (row, block) = place_of(index);
                vectors.put(place(row, block), numbers.each_ref().map(Vec::as_slice));
            });
        });
    }

    /// Expanded, each to two rows.
    fn expand(&self, transform: &Transform<T>, how: Expand, out: &mut [T], pool: &dyn Pool) {
        let write = |re: &[T], im: &[T], [one, two]: &mut [Vec<T>; 2]| {
            expand(transform.n(), re, im, how.signs(), one, two);
        };
        self.transform(transform, Scale::Plain, out, write, pool);
    }

    /// Packed and orthonormal.
    fn pack(&self, transform: &Transform<T>, out: &mut [T], pool: &dyn Pool) {
        let write = |re: &[T], im: &[T], [numbers]: &mut [Vec<T>; 1]| {
            join(transform.n(), re, im, |place, value| numbers[place] = value);
        };
        self.transform(transform, Scale::Orthonormal, out, write, pool);
    }
}

/// Calls `put(place, number)` with a packed spectrum's numbers.
fn join<T: Real>(n: usize, re: &[T], im: &[T], mut put: impl FnMut(usize, T)) {
    re.iter().enumerate().for_each(|(place, &re)| put(place, re));
    im.iter().enumerate().skip(n % 2).for_each(|(place, &im)| put(n / 2 + place, im));
}

/// One contraction of spectra: for each item of `a` and of `b` two rows of sums of `steps` products.
struct Contraction<'a, T> {
    a: Factor<'a, T>,
    /// How far the vectors of one item and step lie apart in `a`.
    vector: usize,
    /// As [`Blocks::expand`] makes it.
    b: &'a [T],
    items: usize,
    steps: usize,
}

impl<T: Real> Contraction<'_, T> {
    /// Calls `finish(workspace, rows, item, sums)` with the two rows of sums of some rows and one item.
    fn run(
        &self,
        transform: &Transform<T>,
        pool: &dyn Pool,
        finish: impl Fn(&mut Workspace<T>, Range<usize>, usize, &[T]) + Sync,
    ) {
        let groups = self.items.div_ceil(ITEMS);
        // Over rows, so that threads share what is expanded and each reads its part of the spectra; where they are few, over
        // items.
        if self.a.items >= 4 * groups {
            pool.for_ranges(self.a.items, &|rows| self.run_part(transform, rows, 0..groups, &finish));
        } else {
            pool.for_ranges(groups, &|groups| self.run_part(transform, 0..self.a.items, groups, &finish));
        }
    }

    fn run_part(
        &self,
        transform: &Transform<T>,
        rows: Range<usize>,
        groups: Range<usize>,
        finish: &impl Fn(&mut Workspace<T>, Range<usize>, usize, &[T]),
    ) {
        let (lanes, width) = vectors(transform.n());
        let mut workspace = transform.workspace();
        let size = rows.len() * 2 * width;
        let mut sums = AlignedVec::new(ITEMS * size);
        for first in groups.map(|group| group * ITEMS) {
            let items = ITEMS.min(self.items - first);
            for vector in 0..width / lanes {
                let values = &self.a.values[rows.start * self.a.item + vector * self.vector..];
                let a = Factor { values, items: rows.len(), ..self.a };
                let item = 2 * lanes * self.steps;
                let b = &self.b[(vector * self.items + first) * item..][..items * item];
                let out = &mut sums[vector * lanes..];
                contract(lanes, a, b, items, self.steps, out, [2 * width, size, width]);
            }
            for (item, sums) in sums.chunks_exact(size).take(items).enumerate() {
                finish(&mut workspace, rows.clone(), first + item, sums);
            }
        }
    }
}

/// Lanes of a vector, and the numbers of whole vectors that hold a block's.
fn vectors(n: usize) -> (usize, usize) {
    let lanes = lanes(n);
    (lanes, n.next_multiple_of(lanes))
}

/// Panels of so many rows.
fn panels(rows: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rows).step_by(PANEL).map(move |start| start..(start + PANEL).min(rows))
}

/// y = x·Wᵀ + b for `rows` rows of x, W given by its packed spectra.
pub fn product<T: Real>(
    shape: &Circulant<T>,
    (x, rows): (&[T], usize),
    spectrum: &[T],
    bias: Option<&[T]>,
    y: &mut [T],
    pool: &dyn Pool,
) {
    let weight = Spectra { shape, values: spectrum };
    let x = Rows { values: x, features: shape.in_features, blocks: shape.inputs, n: shape.n() };
    weight.multiply((x, rows), Expand::Product, (y, shape.out_features), bias, pool);
}

/// dx = g·W for `rows` rows of g.
pub fn input_gradient<T: Real>(
    shape: &Circulant<T>,
    (gradient, rows): (&[T], usize),
    spectrum: &[T],
    dx: &mut [T],
    pool: &dyn Pool,
) {
    let weight = Spectra { shape, values: spectrum };
    let gradient = Rows { values: gradient, features: shape.out_features, blocks: shape.outputs, n: shape.n() };
    weight.multiply((gradient, rows), Expand::Conjugate, (dx, shape.in_features), None, pool);
}

/// The gradient by the packed spectra, of `rows` rows of g and x.
pub fn spectrum_gradient<T: Real>(
    shape: &Circulant<T>,
    gradient: &[T],
    x: &[T],
    rows: usize,
    out: &mut [T],
    pool: &dyn Pool,
) {
    out.fill(T::default());
    let (n, transform) = (shape.n(), &*shape.transform);
    let (lanes, width) = vectors(n);
    let gradient = Rows { values: gradient, features: shape.out_features, blocks: shape.outputs, n };
    let x = Rows { values: x, features: shape.in_features, blocks: shape.inputs, n };
    let places = DisjointSlice::new(out);
    if shape.is_empty() {
        return;
    }
    let most = PANEL.min(rows);
    let (g_row, x_row) = (width * shape.outputs, 2 * width * shape.inputs);
    with_scratch((g_row + x_row) * most, |scratch: &mut [T]| {
        let (a, b) = scratch.split_at_mut(g_row * most);
        for panel in panels(rows) {
            let steps = panel.len();
            let place = |row: usize, block: usize| block * steps + row;
            let (a, b) = (&mut a[..g_row * steps], &mut b[..x_row * steps]);
            Blocks { rows: gradient, range: &panel, place }.pack(transform, a, pool);
            Blocks { rows: x, range: &panel, place }.expand(transform, Expand::Outer, b, pool);
            let a = Factor { values: a, items: shape.outputs, item: steps * lanes, step: lanes };
            let vector = shape.outputs * steps * lanes;
            let sums = Contraction { a, vector, b, items: shape.inputs, steps };
            sums.run(transform, pool, |workspace, outputs, input, sums| {
                let (re, im) = workspace.halves(transform.half());
                for (output, sums) in outputs.zip(sums.chunks_exact(2 * width)) {
                    fold(n, &sums[..width], &sums[width..], re, im);
                    let start = (output * shape.inputs + input) * n;
                    // SAFETY: each pair of blocks is finished once a panel.
                    #[allow(unsafe_code)]
                    let out = unsafe { places.range_mut(start..start + n) };
                    join(n, re, im, |place, value| out[place] += value);
                }
            });
        }
    });
}

/// A weight's packed spectra.
struct Spectra<'a, T> {
    shape: &'a Circulant<T>,
    values: &'a [T],
}

impl<T: Real> Spectra<'_, T> {
    /// Multiplies by the weight, or, for `Conjugate`, by its transpose.
    fn multiply(
        &self,
        (input, rows): (Rows<T>, usize),
        how: Expand,
        (out, features): (&mut [T], usize),
        bias: Option<&[T]>,
        pool: &dyn Pool,
    ) {
        let Self { shape, values } = *self;
        if shape.is_empty() {
            match bias {
                Some(bias) => out.chunks_exact_mut(features.max(1)).for_each(|out| out.copy_from_slice(bias)),
                None => out.fill(T::default()),
            }
            return;
        }
        let (n, transform) = (shape.n(), &*shape.transform);
        let (lanes, width) = vectors(n);
        let (by_row, by_column) = ((shape.inputs * n, shape.outputs), (n, shape.inputs));
        let ((item, outputs), (step, steps)) =
            if matches!(how, Expand::Conjugate) { (by_column, by_row) } else { (by_row, by_column) };
        // As it is stored, what is read together lies so far apart that it evicts itself from the nearest cache: a weight that
        // is read more than a few times is put in order first.
        let reorders = rows > FEW || n != width;
        let ordered = if reorders { width * outputs * steps } else { 0 };
        let row = 2 * width * steps;
        with_scratch(ordered + row * PANEL.min(rows), |scratch: &mut [T]| {
            let (ordered, b) = scratch.split_at_mut(ordered);
            let (a, vector) = if reorders {
                put_in_order(n, values, ordered, |place| place / steps * item + place % steps * step, pool);
                let a = Factor { values: ordered, items: outputs, item: steps * lanes, step: lanes };
                (a, outputs * steps * lanes)
            } else {
                (Factor { values, items: outputs, item, step }, lanes)
            };
            let out = Outputs { values: DisjointSlice::new(out), features, bias };
            for panel in panels(rows) {
                let b = &mut b[..row * panel.len()];
                let place = |row: usize, block: usize| row * steps + block;
                Blocks { rows: input, range: &panel, place }.expand(transform, how, b, pool);
                let sums = Contraction { a, vector, b, items: panel.len(), steps };
                sums.run(transform, pool, |workspace, blocks, row, sums| {
                    let fill = |index: usize, re: &mut [T], im: &mut [T]| {
                        let (one, two) = sums[index * 2 * width..].split_at(width);
                        fold(n, one, two, re, im);
                    };
                    let put = |index: usize, block: &[T]| out.put(panel.start + row, (blocks.start + index) * n, block);
                    transform.inverse(blocks.len(), workspace, fill, put);
                });
            }
        });
    }
}

/// Copies blocks of `n`, place by place, to vectors that lie one after the other.
fn put_in_order<T: Real>(
    n: usize,
    values: &[T],
    out: &mut [T],
    start: impl Fn(usize) -> usize + Sync,
    pool: &dyn Pool,
) {
    let places = out.len() / vectors(n).1;
    let vectors = Vectors { out: DisjointSlice::new(out), n, places };
    pool.for_ranges(places, &|places| {
        for place in places {
            vectors.put(place, [&values[start(place)..start(place) + n]]);
        }
    });
}

/// Rows of a result, and what is added to each.
struct Outputs<'a, T> {
    values: DisjointSlice<'a, T>,
    features: usize,
    bias: Option<&'a [T]>,
}

impl<T: Real> Outputs<'_, T> {
    /// Writes a block, cut to the row's end. Each is finished once.
    fn put(&self, row: usize, column: usize, block: &[T]) {
        let columns = column..(column + block.len()).min(self.features);
        let start = row * self.features;
        // SAFETY: no two blocks overlap.
        #[allow(unsafe_code)]
        let out = unsafe { self.values.range_mut(start + columns.start..start + columns.end) };
        match self.bias {
            Some(bias) => {
                out.iter_mut().zip(block).zip(&bias[columns]).for_each(|((out, &value), &bias)| *out = value + bias);
            }
            None => out.copy_from_slice(&block[..out.len()]),
        }
    }
}
