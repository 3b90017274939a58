//! Linear maps that are products of spectra, and how spectra are stored.
//!
//! `circulant.rs` has the block-circulant product and its two companions: `rows.rs` transforms blocks (`transform.rs`, `fft.rs`),
//! `planes.rs` says how their spectra lie, `contract.rs` has the inner loops, `outputs.rs` makes blocks of the sums; `vector` is
//! what all of them are written in. `log8.rs` is the format of a byte for each coefficient. `conv` has the convolution and its
//! two, `tile.rs` the transforms of its tiles, `products.rs` its inner loop. `sparse.rs` has the product with a matrix of a sparse
//! two-dimensional spectrum and its two, `whole.rs` its transforms of whole rows, `terms.rs` its inner loops.

mod circulant;
mod contract;
pub mod conv;
mod fft;
pub mod log8;
mod outputs;
mod planes;
mod products;
mod rows;
pub mod sparse;
mod terms;
mod tile;
mod transform;
pub(crate) mod vector;
mod whole;

pub use circulant::{Circulant, input_gradient, product, spectrum_gradient};
pub use transform::Real;
