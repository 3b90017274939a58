//! Linear maps that are products of spectra, and how spectra are stored.
//!
//! `transform.rs` has the real Fourier transform of a block, `circulant.rs` the block-circulant product and its two
//! companions, `kernel.rs` their inner loops, `log8.rs` the format of a byte for each coefficient. `conv.rs` has the
//! convolution and its two, `tile.rs` the transforms of its tiles, `products.rs` its inner loop.

mod circulant;
mod contract;
pub mod conv;
mod fft;
pub mod log8;
mod planes;
mod products;
mod tile;
mod transform;
mod vector;

pub use circulant::{Circulant, input_gradient, product, spectrum_gradient};
pub use transform::Real;
