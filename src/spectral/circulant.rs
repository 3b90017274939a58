//! The block-circulant product and its two companions: the partial derivatives of one trilinear form
//! T(g, w, x) = Σ conj(ĝ_p[k])·ŵ_pq[k]·x̂_q[k], so each one's gradients are the other two.
//!
//! Lanes of a vector are frequencies of *one* spectrum, so that spectra are used in the order in which they are stored, whatever
//! the batch: both factors are laid out in planes (`planes.rs`), the planes multiplied (`contract.rs`), and the sums made blocks
//! again (`outputs.rs`).

use std::ops::Range;
use std::sync::Arc;

use super::contract::{AHEAD, Items, Stored, contract, contract_stored};
use super::outputs::Outputs;
use super::planes::{Fold, PLANES, Planes};
use super::rows::{By, Rows, chunks, forward};
use super::transform::{Real, Transform};
use super::vector::{Kernel, MOST_LANES, Vector, copy_few, dispatch, load_part, store_part};
use crate::memory::{LINE, Scratch};
use crate::parallel::{DisjointSlice, Pool, Serial};
use crate::{Error, Result};

/// Rows that are transformed and multiplied at a time.
const PANEL: usize = 64;
/// A weight that is multiplied by no more rows is read where it is stored.
const FEW: usize = 4;
/// Items of each factor that are multiplied at a time, at most.
const BLOCK: [usize; 2] = [16, 24];
/// Numbers that the first factor's spectra, and the sums, may take so as to stay in the cache. Four items are always taken.
const CACHED: usize = 1 << 17;

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

/// Lays some items' stored spectra of `n` numbers out in planes.
#[inline(always)]
fn order<T: Real, V: Vector<T>>(
    Stored { values, item, step }: Stored<T>,
    n: usize,
    items: Range<usize>,
    steps: usize,
    planes: Planes,
    out: &mut [T],
) {
    let (half, out) = (planes.half, DisjointSlice::new(out));
    for (place, index) in items.enumerate() {
        for at in (0..steps).step_by(planes.together) {
            let start = index * item + at * step;
            for ahead in (0..n).step_by(LINE / size_of::<T>()) {
                V::prefetch(values, start + AHEAD * step + ahead);
            }
            let to = planes.start(place, at);
            if planes.together > 1 {
                let [mut re, mut im] = [[T::default(); MOST_LANES]; 2];
                for side in 0..planes.together.min(steps - at) {
                    let numbers = &values[start + side * step..][..n];
                    copy_few(&numbers[..half], &mut re[side * half..]);
                    copy_few(&numbers[n - half..], &mut im[side * half..]);
                }
                planes.put_whole(&out, to, 0, V::load(&re), V::load(&im));
                continue;
            }
            let numbers = &values[start..start + n];
            // Of an odd block the imaginary parts begin a place early: that of frequency 0 is multiplied by zero.
            let (re, im) = (&numbers[..half], &numbers[n - half..]);
            for (vector, start) in (0..half).step_by(V::LANES).enumerate() {
                planes.put_whole(&out, to, vector, load_part::<T, V>(&re[start..]), load_part::<T, V>(&im[start..]));
            }
        }
    }
}

/// Calls `body(items of a, items of b)` for parts of the table of all pairs, in parallel.
fn for_pairs(rows: usize, columns: usize, pool: &dyn Pool, body: impl Fn(Range<usize>, Range<usize>) + Sync) {
    let parts = |items: usize, part: usize| items.div_ceil(part);
    let scaled = |parts: Range<usize>, part: usize, items: usize| parts.start * part..(parts.end * part).min(items);
    if parts(rows, 4) >= parts(columns, 6) {
        pool.for_ranges(parts(rows, 4), &|range| body(scaled(range, 4, rows), 0..columns));
    } else {
        pool.for_ranges(parts(columns, 6), &|range| body(0..rows, scaled(range, 6, columns)));
    }
}

/// How many of each factor's items are multiplied at a time.
fn block_size(planes: &Planes, items: usize) -> [usize; 2] {
    let cached = (CACHED / (PLANES * planes.vectors * planes.item).max(1)).min(CACHED / planes.spectrum() / BLOCK[1]);
    // A block's rounding depends on its neighbour's, with which it is transformed: parts begin where pairs do.
    [(cached / 4 * 4).clamp(4, BLOCK[0]).min(items), BLOCK[1]]
}

/// A product's part: blocks of the result, in some rows.
struct Multiply<'a, T> {
    transform: &'a Transform<T>,
    weight: Stored<'a, T>,
    range: Range<usize>,
    steps: usize,
    b: Items<'a, T>,
    out: &'a Outputs<'a, T>,
}

impl<T: Real> Kernel<T> for Multiply<'_, T> {
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let Self { transform, weight, range, steps, b, out } = self;
        let [height, width] = block_size(&b.planes, range.len());
        let planes = Planes::new(transform, height, steps);
        let mut workspace = transform.workspace::<V>();
        let mut ordered = Scratch::new(planes.len());
        let mut sums = Scratch::new(height * width.min(b.range.len()) * planes.spectrum());
        for blocks in chunks(&range, height) {
            order::<T, V>(weight, transform.n(), blocks.clone(), steps, planes, &mut ordered);
            let a = Items { values: &ordered, planes, range: 0..blocks.len() };
            for rows in chunks(&b.range, width) {
                let b = Items { range: rows.clone(), ..b };
                contract::<T, V>(&a, &b, &mut sums);
                out.finish::<V>(transform, &planes, [blocks.clone(), rows], &sums, &mut workspace);
            }
        }
    }
}

/// The same, for few rows, which are transformed by each thread.
struct MultiplyFew<'a, T> {
    transform: &'a Transform<T>,
    weight: Stored<'a, T>,
    range: Range<usize>,
    b: Items<'a, T>,
    out: &'a Outputs<'a, T>,
}

impl<T: Real> Kernel<T> for MultiplyFew<'_, T> {
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let Self { transform, weight, range, b, out } = self;
        let mut workspace = transform.workspace::<V>();
        let mut sums = Scratch::new(BLOCK[0] * b.range.len() * b.planes.spectrum());
        for blocks in chunks(&range, BLOCK[0]) {
            contract_stored::<T, V>(weight, blocks.clone(), &b, &mut sums);
            out.finish::<V>(transform, &b.planes, [blocks, b.range.clone()], &sums, &mut workspace);
        }
    }
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
    let n = shape.n();
    let weight = Stored { values: spectrum, item: shape.inputs * n, step: n };
    let x = Rows { values: x, features: shape.in_features, blocks: shape.inputs, n };
    let out =
        Outputs { values: DisjointSlice::new(y), first_row: 0, features: shape.out_features, bias, conjugate: false };
    multiply(shape, weight, (x, rows), shape.outputs, out, pool);
}

/// dx = g·W for `rows` rows of g: conj(ŵ)·ĝ, which is the conjugate of ŵ·conj(ĝ).
pub fn input_gradient<T: Real>(
    shape: &Circulant<T>,
    (gradient, rows): (&[T], usize),
    spectrum: &[T],
    dx: &mut [T],
    pool: &dyn Pool,
) {
    let n = shape.n();
    let weight = Stored { values: spectrum, item: n, step: shape.inputs * n };
    let gradient = Rows { values: gradient, features: shape.out_features, blocks: shape.outputs, n };
    let out = Outputs {
        values: DisjointSlice::new(dx),
        first_row: 0,
        features: shape.in_features,
        bias: None,
        conjugate: true,
    };
    multiply(shape, weight, (gradient, rows), shape.inputs, out, pool);
}

fn multiply<T: Real>(
    shape: &Circulant<T>,
    weight: Stored<T>,
    (input, rows): (Rows<T>, usize),
    blocks: usize,
    mut out: Outputs<T>,
    pool: &dyn Pool,
) {
    let transform = &*shape.transform;
    if shape.is_empty() {
        // SAFETY: nothing else has it.
        #[allow(unsafe_code)]
        let y = unsafe { out.values.range_mut(0..rows * out.features) };
        match out.bias {
            Some(bias) => y.chunks_exact_mut(out.features.max(1)).for_each(|y| y.copy_from_slice(bias)),
            None => y.fill(T::default()),
        }
        return;
    }
    let how = (out.conjugate, By::Row);
    let steps = input.blocks;
    let x_planes = |rows: usize| Planes::new(transform, rows, steps);
    let are_vectors = shape.n().is_multiple_of(2 * x_planes(1).lanes);
    if (1..=FEW).contains(&rows) && are_vectors {
        let planes = x_planes(rows);
        let parts = blocks.div_ceil(BLOCK[0]);
        pool.for_ranges(parts, &|range| {
            let range = range.start * BLOCK[0]..(range.end * BLOCK[0]).min(blocks);
            let mut x = Scratch::new(planes.len());
            forward(transform, input, &(0..rows), how, planes, &mut x, &Serial);
            let b = Items { values: &x, planes, range: 0..rows };
            dispatch(planes.lanes, MultiplyFew { transform, weight, range, b, out: &out });
        });
        return;
    }
    let mut x = Scratch::new(x_planes(PANEL.min(rows)).len());
    for panel in chunks(&(0..rows), PANEL) {
        let planes = x_planes(panel.len());
        let x = &mut x[..planes.len()];
        forward(transform, input, &panel, how, planes, x, pool);
        out.first_row = panel.start;
        for_pairs(blocks, panel.len(), pool, |blocks, rows| {
            let b = Items { values: &*x, planes, range: rows };
            dispatch(planes.lanes, Multiply { transform, weight, range: blocks, steps, b, out: &out });
        });
    }
}

/// A spectrum gradient's part: pairs of blocks.
struct Gradient<'a, T> {
    transform: &'a Transform<T>,
    gradient: Items<'a, T>,
    x: Items<'a, T>,
    inputs: usize,
    out: &'a DisjointSlice<'a, T>,
}

impl<T: Real> Kernel<T> for Gradient<'_, T> {
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let Self { transform, gradient, x, inputs: stride, out } = self;
        let (n, planes) = (transform.n(), x.planes);
        let half = planes.half;
        let fold = Fold::<V>::new(transform, &planes, (0.0625 / n as f64).sqrt(), (0.125 / n as f64).sqrt());
        let [height, width] = block_size(&planes, gradient.range.len());
        let mut sums = Scratch::new(height * width.min(x.range.len()) * planes.spectrum());
        let parts = chunks(&gradient.range, height)
            .flat_map(|outputs| chunks(&x.range, width).map(move |inputs| (outputs.clone(), inputs)));
        for (outputs, inputs) in parts {
            let gradient = Items { range: outputs.clone(), ..gradient };
            let x = Items { range: inputs.clone(), ..x };
            contract::<T, V>(&gradient, &x, &mut sums);
            let pairs = outputs.flat_map(|output| inputs.clone().map(move |input| output * stride + input));
            for (pair, sums) in pairs.zip(sums.chunks_exact(planes.spectrum())) {
                // SAFETY: each pair of blocks is finished once a panel.
                #[allow(unsafe_code)]
                let out = unsafe { out.range_mut(pair * n..(pair + 1) * n) };
                for (vector, start) in (0..half).step_by(V::LANES).enumerate() {
                    let [re, im] = fold.halves(sums, vector);
                    let end = (start + V::LANES).min(half);
                    add(re, &mut out[start..end]);
                    // Of an odd block, what is in the imaginary parts' first place is zero.
                    add(im, &mut out[n - half + start..n - half + end]);
                }
            }
        }
    }
}

#[inline(always)]
fn add<T: Real, V: Vector<T>>(numbers: V, to: &mut [T]) {
    store_part(load_part::<T, V>(to).add(numbers), to);
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
    if shape.is_empty() {
        return;
    }
    let (n, transform) = (shape.n(), &*shape.transform);
    let gradient = Rows { values: gradient, features: shape.out_features, blocks: shape.outputs, n };
    let x = Rows { values: x, features: shape.in_features, blocks: shape.inputs, n };
    let tables = |rows: usize| [shape.outputs, shape.inputs].map(|items| Planes::new(transform, items, rows));
    let out = DisjointSlice::new(out);
    let [mut g_values, mut x_values] = tables(PANEL.min(rows)).map(|planes| Scratch::new(planes.len()));
    for panel in chunks(&(0..rows), PANEL) {
        let [g_planes, x_planes] = tables(panel.len());
        let (g_values, x_values) = (&mut g_values[..g_planes.len()], &mut x_values[..x_planes.len()]);
        forward(transform, gradient, &panel, (false, By::Block), g_planes, g_values, pool);
        forward(transform, x, &panel, (true, By::Block), x_planes, x_values, pool);
        for_pairs(shape.outputs, shape.inputs, pool, |outputs, inputs| {
            let gradient = Items { values: &*g_values, planes: g_planes, range: outputs };
            let x = Items { values: &*x_values, planes: x_planes, range: inputs };
            dispatch(x_planes.lanes, Gradient { transform, gradient, x, inputs: shape.inputs, out: &out });
        });
    }
}
