//! The real Fourier transforms of blocks of `n`.
//!
//! A spectrum is held as two *halves* of [`Transform::half`] numbers: the real parts of frequencies from 0, and the imaginary
//! parts, whose first place, where there is nothing, has the Nyquist frequency of an even block.
//!
//! Two blocks are transformed together, as the real and the imaginary parts of one complex sequence z = a + i·b, of which
//! 2·â_k = ẑ_k + conj(ẑ_(n−k)) and 2i·b̂_k = ẑ_k − conj(ẑ_(n−k)), and a pair for each lane of a vector. Squares of numbers are
//! transposed on the way in and out, so that a block's numbers, and its spectrum's, lie side by side elsewhere. A block's rounding
//! depends on the other of its pair, so who pairs them has to do it in one way.

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use realfft::{ComplexToReal, FftNum, RealFftPlanner, RealToComplex, num_complex};

use super::fft::{Complex, Fft};
use super::vector::{MOST_LANES, Vector, Vectors, load_part};
use crate::{codec, memory};

/// Larger blocks are transformed one by one: pairs of them for all lanes would leave the nearer caches.
const LARGEST_TOGETHER: usize = 512;
/// A float that spectra are computed in.
pub trait Real: codec::Real + FftNum + Vectors + memory::Float {}

impl Real for f32 {}
impl Real for f64 {}

/// Where spectra go. Closures would not be compiled for the instruction set.
pub trait Spectra<V> {
    /// Takes vectors of the halves of a spectrum: of a pair's first or second block.
    fn put(&mut self, pair: usize, which: usize, vector: usize, re: V, im: V);
}

/// Where spectra come from, and their blocks go.
pub trait Blocks<V> {
    /// Vectors of the halves of a spectrum: of a pair's first or second block.
    fn halves(&self, pair: usize, which: usize, vector: usize) -> [V; 2];
    /// Takes a block's numbers from `start` on.
    fn put(&mut self, pair: usize, which: usize, start: usize, numbers: V);
}

/// The transform of one block size.
pub struct Transform<T> {
    n: usize,
    method: Method<T>,
}

enum Method<T> {
    Together(Fft<T>),
    OneByOne { forward: Arc<dyn RealToComplex<T>>, inverse: Arc<dyn ComplexToReal<T>> },
}

/// What [`Transform`] needs to work in, of each thread its own.
pub struct Workspace<T, V> {
    x: Vec<Complex<V>>,
    y: Vec<Complex<V>>,
    complex: Vec<num_complex::Complex<T>>,
    scratch: Vec<num_complex::Complex<T>>,
    real: Vec<T>,
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
        let method = if n <= LARGEST_TOGETHER {
            Method::Together(Fft::new(n))
        } else {
            let mut planner = RealFftPlanner::new();
            Method::OneByOne { forward: planner.plan_fft_forward(n), inverse: planner.plan_fft_inverse(n) }
        };
        Self { n, method }
    }

    pub fn n(&self) -> usize {
        self.n
    }

    /// Numbers in each half of a spectrum.
    pub fn half(&self) -> usize {
        self.n.div_ceil(2)
    }

    #[inline(always)]
    pub fn workspace<V: Vector<T>>(&self) -> Workspace<T, V> {
        let (vectors, numbers, scratch) = match &self.method {
            Method::Together(_) => (self.n + 1, 0, 0),
            Method::OneByOne { forward, inverse } => {
                (0, self.n, forward.get_scratch_len().max(inverse.get_scratch_len()))
            }
        };
        let zero = V::splat(T::default());
        let sequence = vec![Complex { re: zero, im: zero }; vectors];
        let nothing = num_complex::Complex::new(T::default(), T::default());
        Workspace {
            y: sequence.clone(),
            x: sequence,
            complex: vec![nothing; numbers / 2 + 1],
            scratch: vec![nothing; scratch],
            real: vec![T::default(); numbers],
        }
    }

    /// Transforms a pair of blocks for each lane. Blocks may be cut short: the rest is zero. `spectra` get two times each one's,
    /// conjugated if `conjugate` says so.
    #[inline(always)]
    pub fn forward<V: Vector<T>>(
        &self,
        pairs: &[[&[T]; 2]; MOST_LANES],
        conjugate: bool,
        workspace: &mut Workspace<T, V>,
        spectra: &mut impl Spectra<V>,
    ) {
        let (n, half) = (self.n, self.half());
        match &self.method {
            Method::Together(fft) => {
                let Workspace { x, y, .. } = workspace;
                for start in (0..n).step_by(V::LANES) {
                    for which in 0..2 {
                        let mut rows = [V::splat(T::default()); MOST_LANES];
                        for (row, pair) in rows.iter_mut().zip(&pairs[..V::LANES]) {
                            *row = load_part(pair[which].get(start..).unwrap_or_default());
                        }
                        V::transpose(&mut rows);
                        for (z, &row) in x[start..n].iter_mut().zip(&rows[..V::LANES]) {
                            *(if which == 0 { &mut z.re } else { &mut z.im }) = row;
                        }
                    }
                }
                fft.run(x, y);
                let nothing = V::splat(T::default());
                for (vector, start) in (0..half).step_by(V::LANES).enumerate() {
                    for which in 0..2 {
                        let mut halves = [[nothing; MOST_LANES]; 2];
                        let [re, im] = &mut halves;
                        for lane in 0..V::LANES.min(half - start) {
                            let k = start + lane;
                            let mirror = if k > 0 { n - k } else { 0 };
                            let (z, other) = if conjugate { (x[mirror], x[k]) } else { (x[k], x[mirror]) };
                            (re[lane], im[lane]) = if which == 0 {
                                (z.re.add(other.re), z.im.subtract(other.im))
                            } else {
                                (z.im.add(other.im), other.re.subtract(z.re))
                            };
                        }
                        if start == 0 && n.is_multiple_of(2) {
                            let nyquist = if which == 0 { x[half].re } else { x[half].im };
                            im[0] = nyquist.add(nyquist);
                        }
                        V::transpose(re);
                        V::transpose(im);
                        for pair in 0..V::LANES {
                            spectra.put(pair, which, vector, re[pair], im[pair]);
                        }
                    }
                }
            }
            Method::OneByOne { forward, .. } => {
                let Workspace { complex, scratch, real, .. } = workspace;
                for (index, block) in
                    pairs[..V::LANES].as_flattened().iter().enumerate().filter(|(_, block)| !block.is_empty())
                {
                    let (head, tail) = real.split_at_mut(block.len());
                    head.copy_from_slice(block);
                    tail.fill(T::default());
                    // It refuses buffers of another length alone.
                    let done = forward.process_with_scratch(real, complex, scratch);
                    debug_assert!(done.is_ok());
                    complex[0].im = if n.is_multiple_of(2) { complex[n / 2].re } else { T::default() };
                    let sign = if conjugate { -T::one() } else { T::one() };
                    let twice = |k: usize| {
                        let value = complex[k] + complex[k];
                        (value.re, if k > 0 { value.im * sign } else { value.im })
                    };
                    for (vector, start) in (0..half).step_by(V::LANES).enumerate() {
                        let [mut re, mut im] = [[T::default(); MOST_LANES]; 2];
                        for lane in 0..V::LANES.min(half - start) {
                            (re[lane], im[lane]) = twice(start + lane);
                        }
                        spectra.put(index / 2, index % 2, vector, V::load(&re), V::load(&im));
                    }
                }
            }
        }
    }

    /// The blocks, times n, of a pair of spectra for each lane, which count conjugated if `conjugate` says so.
    #[inline(always)]
    pub fn inverse<V: Vector<T>>(&self, conjugate: bool, workspace: &mut Workspace<T, V>, blocks: &mut impl Blocks<V>) {
        let (n, half) = (self.n, self.half());
        match &self.method {
            Method::Together(fft) => {
                let Workspace { x, y, .. } = workspace;
                let nothing = V::splat(T::default());
                for (vector, start) in (0..half).step_by(V::LANES).enumerate() {
                    for (which, y) in y.chunks_exact_mut(half).take(2).enumerate() {
                        let mut halves = [[nothing; MOST_LANES]; 2];
                        let [re, im] = &mut halves;
                        for pair in 0..V::LANES {
                            [re[pair], im[pair]] = blocks.halves(pair, which, vector);
                        }
                        V::transpose(re);
                        V::transpose(im);
                        for ((y, &re), &im) in y[start..].iter_mut().zip(&re[..V::LANES]).zip(&im[..V::LANES]) {
                            *y = Complex { re, im };
                        }
                    }
                }
                // The inverse transform is the forward one of what has its parts exchanged.
                let (a, b) = y.split_at(half);
                x[0] = Complex { re: b[0].re, im: a[0].re };
                if n.is_multiple_of(2) {
                    x[half] = Complex { re: b[0].im, im: a[0].im };
                }
                for k in 1..half {
                    let (a, b) = (a[k], b[k]);
                    let (at, mirror) = if conjugate { (n - k, k) } else { (k, n - k) };
                    x[at] = Complex { re: b.re.add(a.im), im: a.re.subtract(b.im) };
                    x[mirror] = Complex { re: b.re.subtract(a.im), im: a.re.add(b.im) };
                }
                fft.run(x, y);
                for start in (0..n).step_by(V::LANES) {
                    for which in 0..2 {
                        let mut rows = [nothing; MOST_LANES];
                        for (row, z) in rows[..V::LANES].iter_mut().zip(&x[start..n]) {
                            *row = if which == 0 { z.im } else { z.re };
                        }
                        V::transpose(&mut rows);
                        for (pair, &row) in rows[..V::LANES].iter().enumerate() {
                            blocks.put(pair, which, start, row);
                        }
                    }
                }
            }
            Method::OneByOne { inverse, .. } => {
                let Workspace { complex, scratch, real, .. } = workspace;
                let sign = if conjugate { -T::one() } else { T::one() };
                for (pair, which) in (0..2 * V::LANES).map(|index| (index / 2, index % 2)) {
                    for (vector, complex) in complex[..half].chunks_mut(V::LANES).enumerate() {
                        let mut halves = [[T::default(); MOST_LANES]; 2];
                        for (numbers, half) in halves.iter_mut().zip(blocks.halves(pair, which, vector)) {
                            half.store(numbers);
                        }
                        for (lane, value) in complex.iter_mut().enumerate() {
                            *value = num_complex::Complex::new(halves[0][lane], halves[1][lane] * sign);
                        }
                    }
                    let nyquist = complex[0].im * sign;
                    complex[0].im = T::default();
                    if n.is_multiple_of(2) {
                        complex[half] = num_complex::Complex::new(nyquist, T::default());
                    }
                    // It refuses what is not real at frequency 0 and Nyquist, and buffers of another length.
                    let done = inverse.process_with_scratch(complex, real, scratch);
                    debug_assert!(done.is_ok());
                    for (vector, numbers) in real.chunks(V::LANES).enumerate() {
                        blocks.put(pair, which, vector * V::LANES, load_part(numbers));
                    }
                }
            }
        }
    }
}
