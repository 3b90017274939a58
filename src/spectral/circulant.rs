//! The block-circulant product and its two companions: the partial derivatives of one trilinear form
//! T(g, w, x) = Σ conj(ĝ_p[k])·ŵ_pq[k]·x̂_q[k], so each one's gradients are the other two.
//!
//! Lanes of a vector are numbers of *one* packed spectrum, so that spectra are used as they are stored, whatever the batch:
//! one factor is expanded to two rows, which multiplied by the other, number by number, give the real and the imaginary parts.

use std::ops::Range;
use std::sync::Arc;

use super::kernel::{Factor, contract, lanes};
use super::transform::{Real, Scale, Transform, Workspace};
use crate::memory::AlignedVec;
use crate::parallel::{DisjointSlice, Pool};
use crate::{Error, Result};

/// Rows of x that are transformed and multiplied at a time: their spectra stay in the cache.
const PANEL: usize = 48;
/// Items that are multiplied with all of a thread's rows before the next: their spectra stay in the nearest cache.
const ITEMS: usize = 3;
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

/// The spectra of `rows`' blocks, expanded: `[vector][item][step][part][lane]`, where an item is a row and a step a block,
/// or, for `Outer`, the other way about.
fn expanded<T: Real>(
    transform: &Transform<T>,
    rows: Rows<T>,
    range: Range<usize>,
    how: Expand,
    pool: &dyn Pool,
) -> AlignedVec<T> {
    let n = transform.n();
    let (lanes, width) = vectors(n);
    let count = range.len();
    let total = count * rows.blocks;
    let mut out = AlignedVec::new(2 * width * total);
    let places = DisjointSlice::new(&mut out);
    let [first, second, third] = how.signs::<T>();
    let middle = n / 2;
    for_groups(transform, total, pool, |workspace, start, blocks| {
        // The two rows of one block.
        let mut pair = vec![T::default(); 2 * width];
        let block =
            |index: usize| rows.block(range.start + (start + index) / rows.blocks, (start + index) % rows.blocks);
        transform.forward(Scale::Plain, blocks, block, workspace, |index, re, im| {
            let (one, two) = pair.split_at_mut(width);
            one[..re.len()].copy_from_slice(re);
            one[middle..][..im.len()].iter_mut().zip(im).skip(1).for_each(|(out, &im)| *out = first * im);
            two[..im.len()].iter_mut().zip(im).for_each(|(out, &im)| *out = second * im);
            two[middle..][..re.len()].iter_mut().zip(re).skip(1).for_each(|(out, &re)| *out = third * re);
            // What is alone: frequency 0, and an even block's Nyquist frequency.
            two[0] = T::default();
            if n.is_multiple_of(2) {
                (one[middle], two[middle]) = (T::default(), im[0]);
            }
            let (row, block) = ((start + index) / rows.blocks, (start + index) % rows.blocks);
            let place = match how {
                Expand::Outer => block * count + row,
                _ => row * rows.blocks + block,
            };
            for (vector, (one, two)) in one.chunks_exact(lanes).zip(two.chunks_exact(lanes)).enumerate() {
                let start = (vector * total + place) * 2 * lanes;
                // SAFETY: each block has places of its own.
                #[allow(unsafe_code)]
                let out = unsafe { places.range_mut(start..start + 2 * lanes) };
                out[..lanes].copy_from_slice(one);
                out[lanes..].copy_from_slice(two);
            }
        });
    });
    out
}

/// The packed orthonormal spectra of `rows`' blocks, each in `width` numbers.
fn packed<T: Real>(
    transform: &Transform<T>,
    rows: Rows<T>,
    range: Range<usize>,
    width: usize,
    pool: &dyn Pool,
) -> AlignedVec<T> {
    let n = transform.n();
    let total = range.len() * rows.blocks;
    let mut out = AlignedVec::new(total * width);
    let places = DisjointSlice::new(&mut out);
    for_groups(transform, total, pool, |workspace, start, blocks| {
        let block =
            |index: usize| rows.block(range.start + (start + index) / rows.blocks, (start + index) % rows.blocks);
        transform.forward(Scale::Orthonormal, blocks, block, workspace, |index, re, im| {
            // SAFETY: each block has a place of its own.
            #[allow(unsafe_code)]
            let out = unsafe { places.range_mut((start + index) * width..(start + index) * width + n) };
            join(n, re, im, |place, value| out[place] = value);
        });
    });
    out
}

/// Calls `put(place, number)` with a packed spectrum's numbers.
fn join<T: Real>(n: usize, re: &[T], im: &[T], mut put: impl FnMut(usize, T)) {
    re.iter().enumerate().for_each(|(place, &re)| put(place, re));
    let alone = n % 2;
    im.iter().enumerate().skip(alone).for_each(|(place, &im)| put(n / 2 + place, im));
}

/// The halves of a product's spectrum, of its two rows of sums.
fn fold<T: Real>(n: usize, sums: &[T], width: usize, re: &mut [T], im: &mut [T]) {
    let (one, two) = sums.split_at(width);
    let middle = n / 2;
    re.iter_mut().zip(one).zip(&one[middle..]).for_each(|((out, &a), &b)| *out = a + b);
    im.iter_mut().zip(two).zip(&two[middle..]).for_each(|((out, &a), &b)| *out = a + b);
    if !n.is_multiple_of(2) {
        (re[0], im[0]) = (one[0], T::default());
    }
}

/// Spectra as they are stored, with every block's numbers filling whole vectors.
fn whole_vectors<T: Real>(values: &[T], n: usize, width: usize) -> Option<AlignedVec<T>> {
    (n != width).then(|| {
        let mut out = AlignedVec::new(values.len() / n * width);
        out.chunks_exact_mut(width)
            .zip(values.chunks_exact(n))
            .for_each(|(out, values)| out[..n].copy_from_slice(values));
        out
    })
}

/// One contraction of spectra: for each item of `a` and of `b` two rows of sums of `steps` products.
struct Contraction<'a, T> {
    a: Factor<'a, T>,
    /// As [`expanded`] makes it.
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
                let values = &self.a.values[rows.start * self.a.item + vector * lanes..];
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
    let (_, width) = vectors(n);
    let gradient = Rows { values: gradient, features: shape.out_features, blocks: shape.outputs, n };
    let x = Rows { values: x, features: shape.in_features, blocks: shape.inputs, n };
    let places = DisjointSlice::new(out);
    if shape.is_empty() {
        return;
    }
    for panel in panels(rows) {
        let a = packed(transform, gradient, panel.clone(), width, pool);
        let b = expanded(transform, x, panel.clone(), Expand::Outer, pool);
        let a = Factor { values: &a, items: shape.outputs, item: width, step: shape.outputs * width };
        let sums = Contraction { a, b: &b, items: shape.inputs, steps: panel.len() };
        sums.run(transform, pool, |workspace, outputs, input, sums| {
            let half = transform.half();
            let (re, im) = workspace.halves(half);
            for (output, sums) in outputs.zip(sums.chunks_exact(2 * width)) {
                fold(n, sums, width, re, im);
                let start = (output * shape.inputs + input) * n;
                // SAFETY: each pair of blocks is finished once a panel.
                #[allow(unsafe_code)]
                let out = unsafe { places.range_mut(start..start + n) };
                join(n, re, im, |place, value| out[place] += value);
            }
        });
    }
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
        let (n, transform) = (shape.n(), &*shape.transform);
        if shape.is_empty() {
            match bias {
                Some(bias) => out.chunks_exact_mut(features.max(1)).for_each(|out| out.copy_from_slice(bias)),
                None => out.fill(T::default()),
            }
            return;
        }
        let (_, width) = vectors(n);
        let whole = whole_vectors(values, n, width);
        let values = whole.as_deref().unwrap_or(values);
        let by_row = (shape.inputs * width, shape.outputs);
        let by_column = (width, shape.inputs);
        let ((item, outputs), (step, _)) =
            if matches!(how, Expand::Conjugate) { (by_column, by_row) } else { (by_row, by_column) };
        let places = DisjointSlice::new(out);
        for panel in panels(rows) {
            let b = expanded(transform, input, panel.clone(), how, pool);
            let a = Factor { values, items: outputs, item, step };
            let sums = Contraction { a, b: &b, items: panel.len(), steps: input.blocks };
            sums.run(transform, pool, |workspace, blocks, row, sums| {
                let fill =
                    |index: usize, re: &mut [T], im: &mut [T]| fold(n, &sums[index * 2 * width..], width, re, im);
                transform.inverse(blocks.len(), workspace, fill, |index, values| {
                    let columns = (blocks.start + index) * n..((blocks.start + index + 1) * n).min(features);
                    let start = (panel.start + row) * features;
                    // SAFETY: each block of each row is finished once.
                    #[allow(unsafe_code)]
                    let out = unsafe { places.range_mut(start + columns.start..start + columns.end) };
                    match bias {
                        Some(bias) => {
                            let bias = &bias[columns];
                            out.iter_mut().zip(values).zip(bias).for_each(|((out, &value), &bias)| *out = value + bias);
                        }
                        None => out.copy_from_slice(&values[..out.len()]),
                    }
                });
            });
        }
    }
}
