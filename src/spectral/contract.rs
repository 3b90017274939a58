//! The inner loops: sums of products in registers, each in the order of its steps, whatever else is computed beside it.

use std::ops::Range;

use super::Real;
use super::planes::{PLANES, Planes};
use super::vector::Vector;

/// Some items of a table of spectra.
#[derive(Clone)]
pub struct Items<'a, T> {
    pub values: &'a [T],
    pub planes: Planes,
    pub range: Range<usize>,
}

/// `out[i][j][plane][vector][lane] = Σ_s a[i][s] · b[j][s]` for all of both.
#[inline(always)]
pub fn contract<T: Real, V: Vector<T>>(a: &Items<T>, b: &Items<T>, out: &mut [T]) {
    if V::REGISTERS >= 32 { tiles::<T, V, 4, 6>(a, b, out) } else { tiles::<T, V, 3, 4>(a, b, out) }
}

#[inline(always)]
fn tiles<T: Real, V: Vector<T>, const I: usize, const J: usize>(a: &Items<T>, b: &Items<T>, out: &mut [T]) {
    let (rows, columns, steps) = (a.range.len(), b.range.len(), a.planes.steps);
    let vectors = PLANES * a.planes.vectors;
    let strides = [columns * vectors * V::LANES, vectors * V::LANES];
    for vector in 0..vectors {
        let of = |items: &Items<T>, index: usize| {
            vector * items.planes.vector + (items.range.start + index) * items.planes.item
        };
        let mut column = 0;
        macro_rules! rows {
            ($row:ident, $height:expr, $width:expr) => {
                while rows - $row >= $height {
                    let (a, b) = (&a.values[of(a, $row)..], &b.values[of(b, column)..]);
                    let out = &mut out[$row * strides[0] + column * strides[1] + vector * V::LANES..];
                    tile::<T, V, { $height }, { $width }>(a, b, steps, out, strides);
                    $row += $height;
                }
            };
        }
        macro_rules! columns {
            ($width:expr) => {
                while columns - column >= $width {
                    let mut row = 0;
                    rows!(row, I, $width);
                    rows!(row, 1, $width);
                    column += $width;
                }
            };
        }
        columns!(J);
        columns!(4);
        columns!(1);
    }
}

#[inline(always)]
fn tile<T: Real, V: Vector<T>, const I: usize, const J: usize>(
    a: &[T],
    b: &[T],
    steps: usize,
    out: &mut [T],
    strides: [usize; 2],
) {
    let item = steps * V::LANES;
    assert!(I * item <= a.len() && J * item <= b.len());
    let mut sums = [[V::splat(T::default()); J]; I];
    for step in (0..item).step_by(V::LANES) {
        let mut left = [V::splat(T::default()); I];
        for (i, left) in left.iter_mut().enumerate() {
            // SAFETY: the assertion is of the last of them. A check of each took as long as the product.
            #[allow(unsafe_code)]
            let vector = unsafe { V::load_at(a, i * item + step) };
            *left = vector;
        }
        for j in 0..J {
            // SAFETY: as above.
            #[allow(unsafe_code)]
            let right = unsafe { V::load_at(b, j * item + step) };
            for (left, sums) in left.iter().zip(&mut sums) {
                sums[j] = left.multiply_add(right, sums[j]);
            }
        }
    }
    for (i, sums) in sums.iter().enumerate() {
        for (j, sum) in sums.iter().enumerate() {
            sum.store(&mut out[i * strides[0] + j * strides[1]..]);
        }
    }
}

/// Steps that stored spectra are asked for early: they may lie so far apart that the CPU does not see their order.
pub const AHEAD: usize = 8;

/// Packed spectra as they are stored: the numbers of an item's spectra are `item` apart, of a step's `step`.
#[derive(Clone, Copy)]
pub struct Stored<'a, T> {
    pub values: &'a [T],
    pub item: usize,
    pub step: usize,
}

/// What [`contract`] makes, of halves that fill vectors and are read where they are stored: for few items `b`.
#[inline(always)]
pub fn contract_stored<T: Real, V: Vector<T>>(a: Stored<T>, range: Range<usize>, b: &Items<T>, out: &mut [T]) {
    let even = b.planes.vectors.is_multiple_of(2);
    match (V::REGISTERS >= 32, even) {
        (true, true) => stored_tiles::<T, V, 4, 2>(a, range, b, out),
        (true, false) => stored_tiles::<T, V, 8, 1>(a, range, b, out),
        (false, true) => stored_tiles::<T, V, 2, 2>(a, range, b, out),
        (false, false) => stored_tiles::<T, V, 4, 1>(a, range, b, out),
    }
}

#[inline(always)]
fn stored_tiles<T: Real, V: Vector<T>, const I: usize, const W: usize>(
    a: Stored<T>,
    range: Range<usize>,
    b: &Items<T>,
    out: &mut [T],
) {
    let (rows, columns) = (range.len(), b.range.len());
    let spectrum = b.planes.spectrum();
    let mut row = 0;
    macro_rules! rows {
        ($height:expr) => {
            while rows - row >= $height {
                let a = Stored { values: &a.values[(range.start + row) * a.item..], ..a };
                for column in 0..columns {
                    for vector in (0..b.planes.vectors).step_by(W) {
                        let out = &mut out[(row * columns + column) * spectrum + vector * V::LANES..];
                        stored_tile::<T, V, { $height }, W>(a, b, column, vector, out, columns * spectrum);
                    }
                }
                row += $height;
            }
        };
    }
    rows!(I);
    rows!(1);
}

/// `W` vectors of `I` items.
#[inline(always)]
fn stored_tile<T: Real, V: Vector<T>, const I: usize, const W: usize>(
    a: Stored<T>,
    b: &Items<T>,
    column: usize,
    vector: usize,
    out: &mut [T],
    stride: usize,
) {
    let Planes { half, vectors, steps, plane, vector: apart, .. } = b.planes;
    let b = &b.values[vector * apart + (b.range.start + column) * b.planes.item..];
    let first = vector * V::LANES;
    if steps > 0 {
        let last = (I - 1) * a.item + (steps - 1) * a.step + half + first + W * V::LANES;
        assert!(last <= a.values.len() && 2 * plane + (W - 1) * apart + steps * V::LANES <= b.len());
    }
    let mut sums = [[[V::splat(T::default()); PLANES]; I]; W];
    for step in 0..steps {
        for (w, sums) in sums.iter_mut().enumerate() {
            let mut right = [V::splat(T::default()); PLANES];
            for (part, right) in right.iter_mut().enumerate() {
                // SAFETY: the assertion is of the last of them.
                #[allow(unsafe_code)]
                let vector = unsafe { V::load_at(b, part * plane + w * apart + step * V::LANES) };
                *right = vector;
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                let at = i * a.item + step * a.step + first + w * V::LANES;
                V::prefetch(a.values, at + AHEAD * a.step);
                V::prefetch(a.values, at + AHEAD * a.step + half);
                // SAFETY: as above.
                #[allow(unsafe_code)]
                let (re, im) = unsafe { (V::load_at(a.values, at), V::load_at(a.values, at + half)) };
                let left = [re.add(im), re, im];
                for ((sum, left), right) in sums.iter_mut().zip(&left).zip(&right) {
                    *sum = left.multiply_add(*right, *sum);
                }
            }
        }
    }
    for (w, sums) in sums.iter().enumerate() {
        for (i, sums) in sums.iter().enumerate() {
            for (part, sum) in sums.iter().enumerate() {
                sum.store(&mut out[i * stride + (part * vectors + w) * V::LANES..]);
            }
        }
    }
}
