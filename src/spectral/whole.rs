//! Real Fourier transforms of whole rows, each alone, so that a row's bits do not depend on another's.

use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use realfft::num_complex::Complex;
use realfft::{ComplexToReal, RealFftPlanner, RealToComplex};

use super::Real;

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
    /// The planner of each type keeps what it has planned. `n` is positive.
    pub fn get(n: usize) -> Self {
        static PLANNERS: OnceLock<Mutex<HashMap<TypeId, Box<dyn Any + Send>>>> = OnceLock::new();
        let planners = PLANNERS.get_or_init(Mutex::default);
        let mut planners = planners.lock().unwrap_or_else(PoisonError::into_inner);
        let planner = planners.entry(TypeId::of::<T>()).or_insert_with(|| Box::new(RealFftPlanner::<T>::new()));
        let plan = |planner: &mut RealFftPlanner<T>| (planner.plan_fft_forward(n), planner.plan_fft_inverse(n));
        // The key says what the entry is; another would only cost a plan.
        let (forward, inverse) = planner.downcast_mut().map_or_else(|| plan(&mut RealFftPlanner::new()), plan);
        Self { n, forward, inverse }
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
