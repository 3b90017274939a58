//! The complex Fourier transform of as many sequences as a vector has lanes: Stockham's algorithm, whose passes sort as they go.
//!
//! A pass of radix r over sequences of r·m, s of them interleaved: for p < m and q < s
//!
//!     y[q + s·(r·p + k)] = ω^(p·k) · Σ_i x[q + s·(p + m·i)] · ρ^(i·k),   ω = e^(−2πi / (r·m)), ρ = e^(−2πi / r)
//!
//! leaves r times as many, of m each. Any size is taken: radices are 4, 2 and odd primes.

use super::Real;
use super::vector::Vector;
use crate::codec;

/// Real and imaginary parts, lane by lane.
#[derive(Clone, Copy)]
pub struct Complex<V> {
    pub re: V,
    pub im: V,
}

/// The transform of one size.
pub struct Fft<T> {
    n: usize,
    passes: Vec<Pass<T>>,
}

struct Pass<T> {
    radix: usize,
    /// m and s.
    count: usize,
    stride: usize,
    /// ω^(p·k) for each p and, of each, k from 1.
    twiddles: Vec<Root<T>>,
    /// ρ^j, of an odd radix.
    roots: Vec<Root<T>>,
}

/// A complex root of unity.
#[derive(Clone, Copy)]
struct Root<T> {
    re: T,
    im: T,
}

impl<T: Real> Root<T> {
    /// e^(−2πi·j / n)
    fn new(j: usize, n: usize) -> Self {
        let (sine, cosine) = (std::f64::consts::TAU * (j % n) as f64 / n as f64).sin_cos();
        Self { re: <T as codec::Scalar>::from_f64(cosine), im: <T as codec::Scalar>::from_f64(-sine) }
    }
}

impl<T: Real> Fft<T> {
    pub fn new(n: usize) -> Self {
        let (mut passes, mut length, mut stride) = (Vec::new(), n, 1);
        while length > 1 {
            let radix =
                [4, 2].into_iter().chain((3..).step_by(2)).find(|&r| length.is_multiple_of(r)).unwrap_or(length);
            let count = length / radix;
            let twiddles = (0..count).flat_map(|p| (1..radix).map(move |k| Root::new(p * k, length))).collect();
            let roots = (0..radix).map(|j| Root::new(j, radix)).collect();
            passes.push(Pass { radix, count, stride, twiddles, roots });
            (length, stride) = (count, stride * radix);
        }
        Self { n, passes }
    }

    /// Transforms the first n of `x`; `y` is of its size. The result is in `x`.
    #[inline(always)]
    pub fn run<V: Vector<T>>(&self, x: &mut Vec<Complex<V>>, y: &mut Vec<Complex<V>>) {
        for pass in &self.passes {
            pass.run(&mut x[..self.n], &mut y[..self.n]);
            std::mem::swap(x, y);
        }
    }
}

impl<V: Copy> Complex<V> {
    #[inline(always)]
    fn plus<T>(self, b: Self) -> Self
    where
        V: Vector<T>,
    {
        Self { re: self.re.add(b.re), im: self.im.add(b.im) }
    }

    #[inline(always)]
    fn minus<T>(self, b: Self) -> Self
    where
        V: Vector<T>,
    {
        Self { re: self.re.subtract(b.re), im: self.im.subtract(b.im) }
    }

    /// a − i·b
    #[inline(always)]
    fn minus_turned<T>(self, b: Self) -> Self
    where
        V: Vector<T>,
    {
        Self { re: self.re.add(b.im), im: self.im.subtract(b.re) }
    }

    /// a + i·b
    #[inline(always)]
    fn plus_turned<T>(self, b: Self) -> Self
    where
        V: Vector<T>,
    {
        Self { re: self.re.subtract(b.im), im: self.im.add(b.re) }
    }

    #[inline(always)]
    fn times<T: Real>(self, root: Root<T>) -> Self
    where
        V: Vector<T>,
    {
        let (re, im) = (V::splat(root.re), V::splat(root.im));
        Self { re: self.im.subtract_from(im, self.re.multiply(re)), im: self.im.multiply_add(re, self.re.multiply(im)) }
    }
}

impl<T: Real> Pass<T> {
    #[inline(always)]
    fn run<V: Vector<T>>(&self, x: &mut [Complex<V>], y: &mut [Complex<V>]) {
        let Self { radix, count, stride, .. } = *self;
        for (p, y) in y.chunks_exact_mut(radix * stride).enumerate() {
            let twiddles = &self.twiddles[p * (radix - 1)..(p + 1) * (radix - 1)];
            // Those of p = 0 are ones.
            match (radix, p > 0) {
                (4, true) => radix_4::<T, V, true>(x, y, p * stride, count * stride, twiddles),
                (4, false) => radix_4::<T, V, false>(x, y, 0, count * stride, twiddles),
                (2, true) => radix_2::<T, V, true>(x, y, p * stride, count * stride, twiddles),
                (2, false) => radix_2::<T, V, false>(x, y, 0, count * stride, twiddles),
                (_, twiddled) => self.radix_odd(x, y, p, twiddled),
            }
        }
    }

    /// By sums and differences of what stands opposite: x_i and x_(r−i).
    #[inline(always)]
    fn radix_odd<V: Vector<T>>(&self, x: &mut [Complex<V>], y: &mut [Complex<V>], p: usize, twiddled: bool) {
        let Self { radix, count, stride, .. } = *self;
        let place = |i: usize, q: usize| q + stride * (p + count * i);
        let pairs = radix / 2;
        for q in 0..stride {
            let first = x[place(0, q)];
            let mut sum = first;
            for i in 1..=pairs {
                let (low, high) = (x[place(i, q)], x[place(radix - i, q)]);
                let both = low.plus(high);
                (x[place(i, q)], x[place(radix - i, q)]) = (both, low.minus(high));
                sum = sum.plus(both);
            }
            y[q] = sum;
            for k in 1..=pairs {
                let zero = V::splat(T::default());
                let (mut even, mut odd) = (first, Complex { re: zero, im: zero });
                let mut j = 0;
                for i in 1..=pairs {
                    j = if j + k < radix { j + k } else { j + k - radix };
                    let root = self.roots[j];
                    let (cosine, sine) = (V::splat(root.re), V::splat(root.im));
                    let (both, difference) = (x[place(i, q)], x[place(radix - i, q)]);
                    even.re = both.re.multiply_add(cosine, even.re);
                    even.im = both.im.multiply_add(cosine, even.im);
                    odd.re = difference.re.multiply_add(sine, odd.re);
                    odd.im = difference.im.multiply_add(sine, odd.im);
                }
                for (k, value) in [(k, even.plus_turned(odd)), (radix - k, even.minus_turned(odd))] {
                    let value = if twiddled { value.times(self.twiddles[p * (radix - 1) + k - 1]) } else { value };
                    y[q + stride * k] = value;
                }
            }
        }
    }
}

#[inline(always)]
fn radix_2<T: Real, V: Vector<T>, const TWIDDLED: bool>(
    x: &[Complex<V>],
    y: &mut [Complex<V>],
    start: usize,
    apart: usize,
    twiddles: &[Root<T>],
) {
    let stride = y.len() / 2;
    let part = |i: usize| &x[start + i * apart..][..stride];
    let (a, b) = (part(0), part(1));
    let (y0, y1) = y.split_at_mut(stride);
    let y1 = &mut y1[..stride];
    for q in 0..stride {
        let difference = a[q].minus(b[q]);
        y0[q] = a[q].plus(b[q]);
        y1[q] = if TWIDDLED { difference.times(twiddles[0]) } else { difference };
    }
}

#[inline(always)]
fn radix_4<T: Real, V: Vector<T>, const TWIDDLED: bool>(
    x: &[Complex<V>],
    y: &mut [Complex<V>],
    start: usize,
    apart: usize,
    twiddles: &[Root<T>],
) {
    let stride = y.len() / 4;
    let part = |i: usize| &x[start + i * apart..][..stride];
    let (a, b, c, d) = (part(0), part(1), part(2), part(3));
    let (y0, y) = y.split_at_mut(stride);
    let (y1, y) = y.split_at_mut(stride);
    let (y2, y) = y.split_at_mut(stride);
    let y3 = &mut y[..stride];
    let twiddles: [Root<T>; 3] = [twiddles[0], twiddles[1], twiddles[2]];
    for q in 0..stride {
        let (even, odd) = (a[q].plus(c[q]), b[q].plus(d[q]));
        let (even_difference, odd_difference) = (a[q].minus(c[q]), b[q].minus(d[q]));
        let mut values = [
            even_difference.minus_turned(odd_difference),
            even.minus(odd),
            even_difference.plus_turned(odd_difference),
        ];
        if TWIDDLED {
            for (value, &twiddle) in values.iter_mut().zip(&twiddles) {
                *value = value.times(twiddle);
            }
        }
        y0[q] = even.plus(odd);
        [y1[q], y2[q], y3[q]] = values;
    }
}
