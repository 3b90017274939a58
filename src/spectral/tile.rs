//! The Fourier transform of a box of up to three dimensions: real along the last, complex along the others. Which of the
//! box's numbers are read or written, and where they lie in a tensor, is said by runs along each dimension.

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use realfft::num_complex::Complex;
use realfft::{ComplexToReal, RealFftPlanner, RealToComplex};
use rustfft::{Fft, FftPlanner};

use super::Real;

/// Numbers a side of the squares in which a matrix is transposed.
const SQUARE: usize = 8;

/// Consecutive places of a tensor and, `every` so many, places of a box.
#[derive(Debug, Clone, Copy)]
pub struct Run {
    pub at: usize,
    pub every: usize,
    pub from: usize,
    pub count: usize,
}

/// The runs along each dimension.
pub type Runs = [Vec<Run>; 3];

/// (place in the box, place in the tensor) of each number.
fn pairs(runs: &[Run]) -> impl Iterator<Item = (usize, usize)> {
    runs.iter().flat_map(|run| (0..run.count).map(|index| (run.at + index * run.every, run.from + index)))
}

/// What transforms need to work in, of each thread its own. `spectrum` is what they make and use up.
pub struct Workspace<T> {
    pub spectrum: Vec<Complex<T>>,
    other: Vec<Complex<T>>,
    scratch: Vec<Complex<T>>,
    row: Vec<T>,
}

/// A complex transform and its inverse.
type Pair<T> = [Arc<dyn Fft<T>>; 2];

/// The transform of one size. The last dimension's is even.
pub struct Fourier<T> {
    n: [usize; 3],
    real: Arc<dyn RealToComplex<T>>,
    inverse: Arc<dyn ComplexToReal<T>>,
    /// Along the first two dimensions.
    complex: [Pair<T>; 2],
}

/// Both planners keep the plans that they have made.
pub struct Planners<T: Real> {
    pub real: RealFftPlanner<T>,
    complex: FftPlanner<T>,
}

/// Calls `body` with this type's planners.
pub fn with_planners<T: Real, R>(body: impl FnOnce(&mut Planners<T>) -> R) -> R {
    type Known = Mutex<HashMap<TypeId, Box<dyn Any + Send>>>;
    static KNOWN: OnceLock<Known> = OnceLock::new();
    let make = || Planners::<T> { real: RealFftPlanner::new(), complex: FftPlanner::new() };
    let mut known = KNOWN.get_or_init(Known::default).lock().unwrap_or_else(PoisonError::into_inner);
    match known.entry(TypeId::of::<T>()).or_insert_with(|| Box::new(make())).downcast_mut() {
        Some(planners) => body(planners),
        // Not reached: the key says what the entry is.
        None => body(&mut make()),
    }
}

impl<T: Real> Fourier<T> {
    pub fn new(n: [usize; 3]) -> Self {
        debug_assert!(n[2].is_multiple_of(2));
        with_planners(|planners| {
            let [first, second] = [n[0], n[1]].map(|n| {
                let complex = &mut planners.complex;
                [complex.plan_fft_forward(n), complex.plan_fft_inverse(n)]
            });
            let real = &mut planners.real;
            let (real, inverse) = (real.plan_fft_forward(n[2]), real.plan_fft_inverse(n[2]));
            Self { n, real, inverse, complex: [first, second] }
        })
    }

    /// Frequencies along the last dimension.
    fn half(&self) -> usize {
        self.n[2] / 2 + 1
    }

    /// Numbers of a spectrum.
    pub fn frequencies(&self) -> usize {
        self.n[0] * self.n[1] * self.half()
    }

    pub fn workspace(&self) -> Workspace<T> {
        let zero = Complex::new(T::default(), T::default());
        let of_complex = self.complex.iter().flatten().map(|fft| fft.get_inplace_scratch_len());
        let of_real = [self.real.get_scratch_len(), self.inverse.get_scratch_len()];
        let scratch = of_complex.chain(of_real).max().unwrap_or(0);
        let other = if self.n[0] * self.n[1] > 1 { self.frequencies() } else { 0 };
        Workspace {
            spectrum: vec![zero; self.frequencies()],
            other: vec![zero; other],
            scratch: vec![zero; scratch],
            row: vec![T::default(); self.n[2]],
        }
    }

    /// The spectrum of `scale` times a box that holds `values`, a tensor of `size`, at `runs`, and zeros. Its order is this
    /// type's own: the last dimension first.
    pub fn forward(&self, values: &[T], size: [usize; 3], runs: &Runs, scale: T, workspace: &mut Workspace<T>) {
        let ([planes, rows, _], half) = (self.n, self.half());
        let plane = rows * half;
        let Workspace { spectrum, other, scratch, row } = workspace;
        let zero = Complex::new(T::default(), T::default());
        if planes * rows > 1 {
            spectrum.fill(zero);
            other.fill(zero);
        }
        for (at_plane, from_plane) in pairs(&runs[0]) {
            let start = at_plane * plane;
            for (at_row, from_row) in pairs(&runs[1]) {
                let values = &values[(from_plane * size[1] + from_row) * size[2]..][..size[2]];
                row.fill(T::default());
                spread(values, &runs[2], row);
                if scale != T::one() {
                    row.iter_mut().for_each(|value| *value = *value * scale);
                }
                let out = &mut spectrum[start + at_row * half..][..half];
                // It refuses buffers of another length alone.
                let done = self.real.process_with_scratch(row, out, scratch);
                debug_assert!(done.is_ok());
            }
            if rows > 1 {
                let out = &mut other[start..start + plane];
                transpose(&spectrum[start..start + plane], rows, half, out);
                self.complex[1][0].process_with_scratch(out, scratch);
            }
        }
        if rows > 1 {
            std::mem::swap(spectrum, other);
        }
        if planes > 1 {
            transpose(spectrum, planes, plane, other);
            self.complex[0][0].process_with_scratch(other, scratch);
            std::mem::swap(spectrum, other);
        }
    }

    /// The box of the workspace's spectrum, times its size: calls `visit(plane, row, numbers)` with the rows at `runs`,
    /// which are named by their places in the tensor.
    pub fn inverse(&self, runs: &Runs, workspace: &mut Workspace<T>, mut visit: impl FnMut(usize, usize, &[T])) {
        let ([planes, rows, _], half) = (self.n, self.half());
        let plane = rows * half;
        let Workspace { spectrum, other, scratch, row } = workspace;
        if planes > 1 {
            self.complex[0][1].process_with_scratch(spectrum, scratch);
            transpose(spectrum, plane, planes, other);
            std::mem::swap(spectrum, other);
        }
        for (at_plane, from_plane) in pairs(&runs[0]) {
            let spectrum = &mut spectrum[at_plane * plane..][..plane];
            let spectrum = if rows > 1 {
                self.complex[1][1].process_with_scratch(spectrum, scratch);
                let out = &mut other[..plane];
                transpose(spectrum, half, rows, out);
                out
            } else {
                spectrum
            };
            for (at_row, from_row) in pairs(&runs[1]) {
                let numbers = &mut spectrum[at_row * half..][..half];
                // A real row's have none, but for rounding; the transform refuses others, and buffers of another length.
                (numbers[0].im, numbers[half - 1].im) = (T::default(), T::default());
                let done = self.inverse.process_with_scratch(numbers, row, scratch);
                debug_assert!(done.is_ok());
                visit(from_plane, from_row, row);
            }
        }
    }
}

/// The transform of two rows at a time, as the real and the imaginary parts of one: times a real kernel's spectrum, they
/// stay apart.
pub struct Twins<T> {
    n: usize,
    fft: Pair<T>,
}

/// One of two rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Twin {
    First,
    Second,
}

/// Two rows side by side, and what their transforms need besides.
pub struct TwinRows<T> {
    first: Vec<T>,
    second: Vec<T>,
    scratch: Vec<Complex<T>>,
}

impl<T: Real> TwinRows<T> {
    fn row(&mut self, twin: Twin) -> &mut [T] {
        match twin {
            Twin::First => &mut self.first,
            Twin::Second => &mut self.second,
        }
    }

    /// Makes one of the rows `values` at `runs` and zeros.
    pub fn put(&mut self, twin: Twin, values: &[T], runs: &[Run]) {
        let row = self.row(twin);
        row.fill(T::default());
        spread(values, runs, row);
    }

    /// Adds `bias` to what one of the rows has at `run`.
    pub fn get(&mut self, twin: Twin, run: Run, bias: T, out: &mut [T]) {
        let row = &self.row(twin)[run.at..];
        if run.every == 1 {
            out.iter_mut().zip(row).for_each(|(out, &number)| *out = number + bias);
        } else {
            out.iter_mut().zip(row.iter().step_by(run.every)).for_each(|(out, &number)| *out = number + bias);
        }
    }
}

impl<T: Real> Twins<T> {
    pub fn new(n: usize) -> Self {
        let plan =
            |planners: &mut Planners<T>| [planners.complex.plan_fft_forward(n), planners.complex.plan_fft_inverse(n)];
        Self { n, fft: with_planners(plan) }
    }

    /// Both rows are zero.
    pub fn workspace(&self) -> TwinRows<T> {
        let scratch = self.fft.iter().map(|fft| fft.get_inplace_scratch_len()).max().unwrap_or(0);
        let zero = Complex::new(T::default(), T::default());
        let row = vec![T::default(); self.n];
        TwinRows { first: row.clone(), second: row, scratch: vec![zero; scratch] }
    }

    /// The spectrum of the rows, times `scale`.
    pub fn forward(&self, rows: &mut TwinRows<T>, scale: T, spectrum: &mut [Complex<T>]) {
        for ((out, &re), &im) in spectrum.iter_mut().zip(&rows.first).zip(&rows.second) {
            *out = Complex::new(re * scale, im * scale);
        }
        self.fft[0].process_with_scratch(spectrum, &mut rows.scratch);
    }

    /// The rows of a spectrum, times their length.
    pub fn inverse(&self, spectrum: &mut [Complex<T>], rows: &mut TwinRows<T>) {
        self.fft[1].process_with_scratch(spectrum, &mut rows.scratch);
        for ((number, re), im) in spectrum.iter().zip(&mut rows.first).zip(&mut rows.second) {
            (*re, *im) = (number.re, number.im);
        }
    }
}

/// Writes `values` to a row at `runs`.
fn spread<T: Copy>(values: &[T], runs: &[Run], row: &mut [T]) {
    for run in runs {
        let values = &values[run.from..run.from + run.count];
        if run.every == 1 {
            row[run.at..run.at + run.count].copy_from_slice(values);
        } else {
            row[run.at..].iter_mut().step_by(run.every).zip(values).for_each(|(out, &value)| *out = value);
        }
    }
}

/// Transposes a matrix of `rows` by `columns`.
fn transpose<T: Copy>(from: &[T], rows: usize, columns: usize, to: &mut [T]) {
    for first in (0..rows).step_by(SQUARE) {
        let last = (first + SQUARE).min(rows);
        for (column, to) in to.chunks_exact_mut(rows).enumerate() {
            let from = from[first * columns + column..].iter().step_by(columns);
            to[first..last].iter_mut().zip(from).for_each(|(to, &from)| *to = from);
        }
    }
}
