//! Real Fourier transforms of whole rows, each alone, so that a row's bits do not depend on another's.

use std::sync::Arc;

use realfft::num_complex::Complex;
use realfft::{ComplexToReal, RealToComplex};

use super::Real;
use super::tile::with_planners;

/// The transform of rows of `n`.
pub struct Whole<T> {
    n: usize,
    forward: Arc<dyn RealToComplex<T>>,
    inverse: Arc<dyn ComplexToReal<T>>,
}

/// What a transform works in, of each thread its own.
pub struct Workspace<T> {
    spectrum: Vec<Complex<T>>,
    row: Vec<T>,
    scratch: Vec<Complex<T>>,
}

impl<T: Real> Whole<T> {
    /// `n` is positive.
    pub fn get(n: usize) -> Self {
        with_planners(|planners| {
            let real = &mut planners.real;
            Self { n, forward: real.plan_fft_forward(n), inverse: real.plan_fft_inverse(n) }
        })
    }

    pub fn n(&self) -> usize {
        self.n
    }

    /// Of a row.
    pub fn frequencies(&self) -> usize {
        self.n / 2 + 1
    }

    pub fn workspace(&self) -> Workspace<T> {
        let nothing = Complex::new(T::default(), T::default());
        let scratch = self.forward.get_scratch_len().max(self.inverse.get_scratch_len());
        Workspace {
            spectrum: vec![nothing; self.frequencies()],
            row: vec![T::default(); self.n],
            scratch: vec![nothing; scratch],
        }
    }

    /// Whether a frequency is its own conjugate, and its number real.
    pub fn is_alone(&self, frequency: usize) -> bool {
        frequency == 0 || 2 * frequency == self.n
    }

    /// The spectrum of a row, up to half its frequencies.
    pub fn forward<'a>(&self, row: &[T], workspace: &'a mut Workspace<T>) -> &'a [Complex<T>] {
        let Workspace { spectrum, row: own, scratch } = workspace;
        own.copy_from_slice(row);
        // It refuses buffers of another length alone.
        let done = self.forward.process_with_scratch(own, spectrum, scratch);
        debug_assert!(done.is_ok());
        spectrum
    }

    /// Σ z_k·exp(2πi·k·j/n) over all frequencies, of which `number` says the first half; those that are alone have to be real.
    pub fn inverse<'a>(&self, number: impl FnMut(usize) -> Complex<T>, workspace: &'a mut Workspace<T>) -> &'a [T] {
        let Workspace { spectrum, row, scratch } = workspace;
        spectrum.iter_mut().zip((0..self.frequencies()).map(number)).for_each(|(out, number)| *out = number);
        let done = self.inverse.process_with_scratch(spectrum, row, scratch);
        debug_assert!(done.is_ok());
        row
    }
}
