//! The real Fourier transform of a block of `n`, as `n` real numbers.
//!
//! A packed spectrum is [Re₀, Re₁, …, Re_{⌊n/2⌋}, Im₁, …, Im_{⌈n/2⌉−1}]. Within this crate it is also held as two *halves* of
//! [`Transform::half`] numbers: the real parts of frequencies from 0, and the imaginary parts, whose first place, where
//! there is nothing, has the Nyquist frequency of an even block.

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use realfft::num_complex::Complex;
use realfft::{ComplexToReal, FftNum, RealFftPlanner, RealToComplex};

use super::kernel::Matrix;
use super::vector::Vectors;
use crate::codec::{self, per_isa};
use crate::memory;

/// Above this a fast Fourier transform takes less time than a product with the matrix. Measured: `benchmarks/frequency.py`.
const LARGEST_MATRIX: usize = 128;

/// A float that spectra are computed in.
pub trait Real: codec::Real + FftNum + Vectors + memory::Float {}

impl Real for f32 {}
impl Real for f64 {}

/// How a transform is scaled: as the plain sum, or so that it is an orthonormal matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    Plain,
    Orthonormal,
}

/// The transform of one block size.
pub struct Transform<T> {
    n: usize,
    method: Method<T>,
}

#[allow(clippy::large_enum_variant)] // there is one for each block size
enum Method<T> {
    /// Of what is even and what is odd about the block, each a matrix of half the size.
    Matrices {
        plain: Parts<T>,
        orthonormal: Parts<T>,
        inverse: Parts<T>,
    },
    Fast {
        forward: Arc<dyn RealToComplex<T>>,
        inverse: Arc<dyn ComplexToReal<T>>,
    },
}

struct Parts<T> {
    even: Matrix<T>,
    odd: Matrix<T>,
}

/// What [`Transform`] needs to work in, of each thread its own.
pub struct Workspace<T> {
    rows: Vec<T>,
    products: Vec<T>,
    complex: Vec<Complex<T>>,
    real: Vec<T>,
    fast: Vec<Complex<T>>,
}

impl<T: Real> Workspace<T> {
    /// Room for the two halves of one spectrum.
    pub fn halves(&mut self, half: usize) -> (&mut [T], &mut [T]) {
        self.rows.resize((2 * half).max(self.rows.len()), T::default());
        let (re, rest) = self.rows.split_at_mut(half);
        (re, &mut rest[..half])
    }
}

impl<T: Real> Transform<T> {
    /// The transform for blocks of `n`, made once for each `n`.
    pub fn get(n: usize) -> Arc<Self> {
        type Known = Mutex<HashMap<(TypeId, usize), Arc<dyn Any + Send + Sync>>>;
        static KNOWN: std::sync::OnceLock<Known> = std::sync::OnceLock::new();
        let known = KNOWN.get_or_init(Known::default);
        let key = (TypeId::of::<T>(), n);
        let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = known.entry(key).or_insert_with(|| Arc::new(Self::new(n)));
        // The key says what the entry is; a plan of another type is made anew.
        Arc::clone(entry).downcast().unwrap_or_else(|_| Arc::new(Self::new(n)))
    }

    fn new(n: usize) -> Self {
        let half = n.div_ceil(2);
        if n > LARGEST_MATRIX {
            let mut planner = RealFftPlanner::new();
            let method = Method::Fast { forward: planner.plan_fft_forward(n), inverse: planner.plan_fft_inverse(n) };
            return Self { n, method };
        }
        let angle = |j: usize, k: usize| std::f64::consts::TAU * ((j * k % n) as f64) / n as f64;
        let lone = (1.0 / n as f64).sqrt();
        let pair = (2.0 / n as f64).sqrt();
        // The last row of an even matrix is the middle of an even block, or its Nyquist frequency.
        let sign = |k: usize| if k.is_multiple_of(2) { 1.0 } else { -1.0 };
        let nyquist = if n.is_multiple_of(2) { 1.0 } else { 0.0 };
        let forward = |dc: f64, other: f64| Parts {
            even: Matrix::new(half + 1, half, |j, k| {
                let scale = if k == 0 { dc } else { other } * if j == 0 { 0.5 } else { 1.0 };
                scale * if j == half { nyquist * sign(k) } else { angle(j, k).cos() }
            }),
            odd: Matrix::new(half, half, |j, k| match (j, k) {
                (0, 0) => nyquist * dc,
                (0, _) | (_, 0) => 0.0,
                _ => -other * angle(j, k).sin(),
            }),
        };
        let inverse = Parts {
            even: Matrix::new(half + 1, half, |k, m| match k {
                0 => lone,
                k if k == half => nyquist * lone * sign(m),
                k => pair * angle(k, m).cos(),
            }),
            odd: Matrix::new(half, half, |k, m| -pair * angle(k, m).sin()),
        };
        let method = Method::Matrices { plain: forward(1.0, 1.0), orthonormal: forward(lone, pair), inverse };
        Self { n, method }
    }

    pub fn n(&self) -> usize {
        self.n
    }

    /// Numbers in each half of a spectrum.
    pub fn half(&self) -> usize {
        self.n.div_ceil(2)
    }

    pub fn workspace(&self) -> Workspace<T> {
        let fast = match &self.method {
            Method::Fast { forward, inverse } => forward.get_scratch_len().max(inverse.get_scratch_len()),
            Method::Matrices { .. } => 0,
        };
        let zero = Complex::new(T::default(), T::default());
        Workspace {
            rows: Vec::new(),
            products: Vec::new(),
            complex: vec![zero; self.n / 2 + 1],
            real: vec![T::default(); self.n + 1],
            fast: vec![zero; fast],
        }
    }

    /// Transforms `count` blocks, of which `block(i)` may be cut short: the rest is zero. Calls `visit(i, real, imaginary)`
    /// with each one's halves.
    pub fn forward<'a>(
        &self,
        scale: Scale,
        count: usize,
        block: impl Fn(usize) -> &'a [T],
        workspace: &mut Workspace<T>,
        mut visit: impl FnMut(usize, &[T], &[T]),
    ) where
        T: 'a,
    {
        let (n, half, middle) = (self.n, self.half(), self.n / 2);
        let real = &mut workspace.real;
        match &self.method {
            Method::Matrices { plain, orthonormal, .. } => {
                let parts = if scale == Scale::Plain { plain } else { orthonormal };
                // A row: the even part, the middle of an even block, the odd part.
                let (stride, width) = (2 * half + 1, parts.even.width());
                workspace.rows.resize(count * stride, T::default());
                workspace.products.resize(count * 2 * width, T::default());
                for (index, row) in workspace.rows.chunks_exact_mut(stride).enumerate() {
                    padded(block(index), &mut real[..n]);
                    real[n] = real[0];
                    let (even, odd) = row.split_at_mut(half + 1);
                    mirror(real, even, odd);
                }
                parts.even.apply(&workspace.rows, stride, &mut workspace.products, 2 * width, count);
                parts.odd.apply(
                    &workspace.rows[(half + 1).min(count * stride)..],
                    stride,
                    &mut workspace.products[width.min(count * 2 * width)..],
                    2 * width,
                    count,
                );
                for (index, product) in workspace.products.chunks_exact(2 * width).enumerate() {
                    visit(index, &product[..half], &product[width..width + half]);
                }
            }
            Method::Fast { forward, .. } => {
                let (lone, pair) = match scale {
                    Scale::Plain => (1.0, 1.0),
                    Scale::Orthonormal => ((1.0 / n as f64).sqrt(), (2.0 / n as f64).sqrt()),
                };
                let (lone, pair) = (real_of::<T>(lone), real_of::<T>(pair));
                workspace.rows.resize(2 * half, T::default());
                for index in 0..count {
                    padded(block(index), &mut real[..n]);
                    // It refuses buffers of another length alone.
                    let done =
                        forward.process_with_scratch(&mut real[..n], &mut workspace.complex, &mut workspace.fast);
                    debug_assert!(done.is_ok());
                    let (re, im) = workspace.rows.split_at_mut(half);
                    for ((re, im), value) in re.iter_mut().zip(im.iter_mut()).zip(&workspace.complex) {
                        (*re, *im) = (value.re * pair, value.im * pair);
                    }
                    re[0] = workspace.complex[0].re * lone;
                    im[0] = if n.is_multiple_of(2) { workspace.complex[middle].re * lone } else { T::default() };
                    visit(index, re, im);
                }
            }
        }
    }

    /// The inverse of the orthonormal transform for `count` spectra: `fill(i, real, imaginary)` writes each one's halves,
    /// and `visit(i, block)` is called with what they are the spectrum of.
    pub fn inverse(
        &self,
        count: usize,
        workspace: &mut Workspace<T>,
        mut fill: impl FnMut(usize, &mut [T], &mut [T]),
        mut visit: impl FnMut(usize, &[T]),
    ) {
        let (n, half, middle) = (self.n, self.half(), self.n / 2);
        let even_block = n.is_multiple_of(2);
        let real = &mut workspace.real;
        match &self.method {
            Method::Matrices { inverse, .. } => {
                // A row: the real parts, the Nyquist frequency again, the imaginary parts.
                let (stride, width) = (2 * half + 1, inverse.even.width());
                workspace.rows.resize(count * stride, T::default());
                workspace.products.resize(count * 2 * width, T::default());
                for (index, row) in workspace.rows.chunks_exact_mut(stride).enumerate() {
                    let (re, im) = row.split_at_mut(half + 1);
                    fill(index, &mut re[..half], im);
                    re[half] = im[0];
                }
                inverse.even.apply(&workspace.rows, stride, &mut workspace.products, 2 * width, count);
                inverse.odd.apply(
                    &workspace.rows[(half + 1).min(count * stride)..],
                    stride,
                    &mut workspace.products[width.min(count * 2 * width)..],
                    2 * width,
                    count,
                );
                let scales = [real_of((1.0 / n as f64).sqrt()), real_of((2.0 / n as f64).sqrt())];
                let products = workspace.products.chunks_exact(2 * width);
                for (index, (product, row)) in products.zip(workspace.rows.chunks_exact(stride)).enumerate() {
                    unmirror(&product[..half], &product[width..], &row[..=half], scales, real);
                    visit(index, &real[..n]);
                }
            }
            Method::Fast { inverse, .. } => {
                let lone = real_of::<T>((1.0 / n as f64).sqrt());
                let pair = real_of::<T>((0.5 / n as f64).sqrt());
                workspace.rows.resize(2 * half, T::default());
                for index in 0..count {
                    let (re, im) = workspace.rows.split_at_mut(half);
                    fill(index, re, im);
                    for ((value, &re), &im) in workspace.complex.iter_mut().zip(&*re).zip(&*im) {
                        *value = Complex::new(re * pair, im * pair);
                    }
                    workspace.complex[0] = Complex::new(re[0] * lone, T::default());
                    if even_block {
                        workspace.complex[middle] = Complex::new(im[0] * lone, T::default());
                    }
                    // It refuses what is not real at frequency 0 and Nyquist, and buffers of another length.
                    let done =
                        inverse.process_with_scratch(&mut workspace.complex, &mut real[..n], &mut workspace.fast);
                    debug_assert!(done.is_ok());
                    visit(index, &real[..n]);
                }
            }
        }
    }
}

/// Copies a block that may be cut short.
fn padded<T: Real>(values: &[T], to: &mut [T]) {
    let (head, tail) = to.split_at_mut(values.len());
    head.copy_from_slice(values);
    tail.fill(T::default());
}

fn real_of<T: Real>(value: f64) -> T {
    <T as codec::Scalar>::from_f64(value)
}

/// Numbers that are mirrored at a time: the compiler makes vectors of these, but not of an iterator that runs backwards.
const MIRRORED: usize = 8;

/// Runs `$body` with `$n` as a constant where it is one of the common sizes: loops over a block are a few instructions then.
macro_rules! for_common_sizes {
    ($n:ident, $body:block) => {
        for_common_sizes!($n, $body, 16 32 64 128)
    };
    ($n:ident, $body:block, $($size:literal)+) => {
        match $n {
            $($size => {
                let $n: usize = $size;
                $body
            })+
            $n => $body,
        }
    };
}
pub(super) use for_common_sizes;

#[inline(always)]
fn mirrored<T: Copy>(values: &[T; MIRRORED]) -> [T; MIRRORED] {
    std::array::from_fn(|i| values[MIRRORED - 1 - i])
}

per_isa! {
    /// What is even about a block, after which its first number stands again, and its middle; and what is odd about it, in
    /// whose first place is an even block's Nyquist frequency. The first number counts twice.
    fn mirror<T: Real>(block: &[T], even: &mut [T], odd: &mut [T]) {
        let n = block.len() - 1;
        for_common_sizes!(n, {
            let (block, half) = (&block[..n + 1], n.div_ceil(2));
            let (left, right) = (block[..half].as_chunks::<MIRRORED>(), block[n + 1 - half..].as_rchunks::<MIRRORED>());
            let (evens, odds) = (even[..half].as_chunks_mut::<MIRRORED>(), odd[..half].as_chunks_mut::<MIRRORED>());
            for (((even, odd), x), other) in evens.0.iter_mut().zip(odds.0).zip(left.0).zip(right.1.iter().rev()) {
                let other = mirrored(other);
                *even = std::array::from_fn(|i| x[i] + other[i]);
                *odd = std::array::from_fn(|i| x[i] - other[i]);
            }
            for (((even, odd), &x), &other) in evens.1.iter_mut().zip(odds.1).zip(left.1).zip(right.0.iter().rev()) {
                (*even, *odd) = (x + other, x - other);
            }
            even[half] = T::default();
            if n.is_multiple_of(2) {
                (even[half], odd[0]) = (block[half], alternating(&block[..n]));
            }
        });
    }
}

per_isa! {
    /// The block of which `even` and `odd` are the products of real and imaginary parts, and one number after it that means
    /// nothing. `re` has the real parts, and last the Nyquist frequency, for the middle of an even block, whose rows of the transform have `scales`.
    fn unmirror<T: Real>(even: &[T], odd: &[T], re: &[T], scales: [T; 2], block: &mut [T]) {
        let n = block.len() - 1;
        for_common_sizes!(n, {
            let half = n.div_ceil(2);
            let (even, odd) = (even[..half].as_chunks::<MIRRORED>(), odd[..half].as_chunks::<MIRRORED>());
            let (left, right) = block[..n + 1].split_at_mut(n + 1 - half);
            let (left, right) = (left[..half].as_chunks_mut::<MIRRORED>(), right.as_rchunks_mut::<MIRRORED>());
            for (((out, other), u), v) in left.0.iter_mut().zip(right.1.iter_mut().rev()).zip(even.0).zip(odd.0) {
                *out = std::array::from_fn(|i| u[i] + v[i]);
                *other = mirrored(&std::array::from_fn(|i| u[i] - v[i]));
            }
            for (((out, other), &u), &v) in left.1.iter_mut().zip(right.0.iter_mut().rev()).zip(even.1).zip(odd.1) {
                (*out, *other) = (u + v, u - v);
            }
            if n.is_multiple_of(2) {
                let nyquist = if half.is_multiple_of(2) { re[half] } else { -re[half] };
                block[half] = (re[0] + nyquist) * scales[0] - alternating(&re[1..half]) * scales[1];
            }
        });
    }
}

/// x₀ − x₁ + x₂ − …, in sums that do not wait for each other.
#[inline(always)]
fn alternating<T: Real>(values: &[T]) -> T {
    let (whole, rest) = values.as_chunks::<8>();
    let mut sums = [T::default(); 8];
    for values in whole {
        sums.iter_mut().zip(values).for_each(|(sum, &value)| *sum += value);
    }
    sums.iter_mut().zip(rest).for_each(|(sum, &value)| *sum += value);
    (sums[0] - sums[1]) + (sums[2] - sums[3]) + ((sums[4] - sums[5]) + (sums[6] - sums[7]))
}
