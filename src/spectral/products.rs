//! Sums of products of complex numbers, frequency by frequency: the inner loop of convolutions. Compiled once per instruction
//! set; each sum is in the order of its steps, whatever else is computed beside it.

use realfft::num_complex::Complex;

use super::Real;
use super::vector::{Kernel, Vector, dispatch, lanes};
use crate::codec::per_isa;

/// Which product: what the third plane of the second factor is, and which planes make the four products of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Product {
    /// a · b; the third plane is −Im b.
    Plain,
    /// conj(a) · b; the third plane is −Re b.
    Conjugate,
}

/// Where the sums go, `values[a_item · i + b_item · j + plane · lanes + lane]`, and whether they continue what is there.
pub struct Sums<'a, T> {
    pub values: &'a mut [T],
    pub a_item: usize,
    pub b_item: usize,
    pub add: bool,
}

/// Some items and where their elements lie: `values[item · i + step · s + lane]`.
#[derive(Clone, Copy)]
pub struct Factor<'a, T> {
    pub values: &'a [T],
    pub items: usize,
    pub item: usize,
    pub step: usize,
}

/// For all items `i` of `a`, of two planes of lanes, and `j` of `b`, of three: Σ_s a[i][s] · b[j][s], or with a's conjugates.
pub fn contract<T: Real>(product: Product, a: Factor<T>, b: Factor<T>, steps: usize, out: Sums<T>) {
    dispatch(lanes::<T>(usize::MAX), Contract { product, a, b, steps, out });
}

struct Contract<'a, T> {
    product: Product,
    a: Factor<'a, T>,
    b: Factor<'a, T>,
    steps: usize,
    out: Sums<'a, T>,
}

impl<T: Real> Kernel<T> for Contract<'_, T> {
    #[inline(always)]
    fn run<V: Vector<T>>(self) {
        let Self { product, a, b, steps, out } = self;
        if V::REGISTERS >= 32 {
            either::<T, V, 4, 2>(product, a, b, steps, out);
        } else {
            either::<T, V, 2, 2>(product, a, b, steps, out);
        }
    }
}

per_isa! {
    /// `out[k] = a[k] · b[k]`.
    pub fn multiply<T: Real>(a: &[Complex<T>], b: &[Complex<T>], out: &mut [Complex<T>]) {
        for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
            *out = Complex::new(a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re);
        }
    }
}

#[inline(always)]
fn either<T: Real, V: Vector<T>, const I: usize, const J: usize>(
    product: Product,
    a: Factor<T>,
    b: Factor<T>,
    steps: usize,
    out: Sums<T>,
) {
    match product {
        Product::Plain => contract_all::<T, V, I, J, false>(a, b, steps, out),
        Product::Conjugate => contract_all::<T, V, I, J, true>(a, b, steps, out),
    }
}

#[inline(always)]
fn contract_all<T: Real, V: Vector<T>, const I: usize, const J: usize, const CONJUGATE: bool>(
    a: Factor<T>,
    b: Factor<T>,
    steps: usize,
    out: Sums<T>,
) {
    let mut column = 0;
    macro_rules! rows {
        ($row:ident, $height:expr, $width:expr) => {
            while a.items - $row >= $height {
                let a = Factor { values: a.values.get($row * a.item..).unwrap_or_default(), ..a };
                let b = Factor { values: b.values.get(column * b.item..).unwrap_or_default(), ..b };
                let values = &mut out.values[$row * out.a_item + column * out.b_item..];
                let out = Sums { values, ..out };
                tile::<T, V, { $height }, { $width }, CONJUGATE>(a, b, steps, out);
                $row += $height;
            }
        };
    }
    macro_rules! columns {
        ($width:expr) => {
            while b.items - column >= $width {
                let mut row = 0;
                rows!(row, I, $width);
                rows!(row, 1, $width);
                column += $width;
            }
        };
    }
    columns!(J);
    columns!(1);
}

#[inline(always)]
fn tile<T: Real, V: Vector<T>, const I: usize, const J: usize, const CONJUGATE: bool>(
    a: Factor<T>,
    b: Factor<T>,
    steps: usize,
    out: Sums<T>,
) {
    let last = |factor: &Factor<T>, items: usize, planes: usize| {
        (items - 1) * factor.item + (steps - 1) * factor.step + planes * V::LANES
    };
    assert!(steps == 0 || (last(&a, I, 2) <= a.values.len() && last(&b, J, 3) <= b.values.len()));
    let place = |i: usize, j: usize, plane: usize| i * out.a_item + j * out.b_item + plane * V::LANES;
    let mut sums = [[[V::splat(T::default()); 2]; J]; I];
    if out.add {
        for (i, sums) in sums.iter_mut().enumerate() {
            for (j, sums) in sums.iter_mut().enumerate() {
                for (plane, sum) in sums.iter_mut().enumerate() {
                    *sum = V::load(&out.values[place(i, j, plane)..]);
                }
            }
        }
    }
    for s in 0..steps {
        let mut right = [[V::splat(T::default()); 3]; J];
        for (j, right) in right.iter_mut().enumerate() {
            for (plane, right) in right.iter_mut().enumerate() {
                // SAFETY: the assertion is of the last of them.
                #[allow(unsafe_code)]
                let vector = unsafe { V::load_at(b.values, j * b.item + s * b.step + plane * V::LANES) };
                *right = vector;
            }
        }
        for (i, sums) in sums.iter_mut().enumerate() {
            let start = i * a.item + s * a.step;
            // SAFETY: as above.
            #[allow(unsafe_code)]
            let (re, im) = unsafe { (V::load_at(a.values, start), V::load_at(a.values, start + V::LANES)) };
            for ([sum_re, sum_im], [b_re, b_im, third]) in sums.iter_mut().zip(&right) {
                let (for_re, for_im) = if CONJUGATE { (*b_im, *third) } else { (*third, *b_re) };
                *sum_re = im.multiply_add(for_re, re.multiply_add(*b_re, *sum_re));
                *sum_im = im.multiply_add(for_im, re.multiply_add(*b_im, *sum_im));
            }
        }
    }
    for (i, sums) in sums.iter().enumerate() {
        for (j, sums) in sums.iter().enumerate() {
            for (plane, sum) in sums.iter().enumerate() {
                sum.store(&mut out.values[place(i, j, plane)..]);
            }
        }
    }
}
