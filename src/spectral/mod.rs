//! Linear maps that are products of spectra.
//!
//! `transform.rs` has the real Fourier transform of a block, `circulant.rs` the block-circulant product and its two
//! companions, `kernel.rs` their inner loops.

mod circulant;
mod kernel;
mod transform;
mod vector;

pub use circulant::{Circulant, input_gradient, product, spectrum_gradient};
pub use transform::Real;
