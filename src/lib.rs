//! Infold keeps a model's weights in compact form and computes on them in that form.
//!
//! | module | holds | may know |
//! | --- | --- | --- |
//! | [`codec`] | the packed weight: format, quantisers, entropy coder | nothing above |
//! | [`linear`] | decode-and-multiply on the CPU | `codec` |
//! | [`spectral`] | products of spectra: block-circulant maps | `codec`, for its vectors |
//! | [`spline`] | cubic B-splines | `spectral`, for its vectors |
//! | [`cuda`] | the embedded GPU kernels | nothing above |
//! | [`parallel`] | how these split work over threads | nothing |
//! | [`memory`] | their scratch: in whole cache lines, and counted | nothing |
//! | [`tier`] | weights on disk: a scratch file and what reads and writes it (Linux) | nothing above |
//! | `ops` | PyTorch tensors: check, allocate, run | all of the above |
//! | `bridge` | C++: the operator registration in `csrc/` | `ops` |
//!
//! The last two need the feature `torch`; without it the crate is the codec, its kernels and the disk engine alone.

#![deny(unsafe_code)] // allowed again, with a reason, only where a module says so

pub mod codec;
pub mod cuda;
pub mod error;
pub mod linear;
pub mod memory;
pub mod parallel;
pub mod spectral;
pub mod spline;
#[cfg(target_os = "linux")]
pub mod tier;

#[cfg(feature = "torch")]
mod bridge;
#[cfg(feature = "torch")]
mod ops;

#[cfg(feature = "torch")]
#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;

pub use error::{Error, Result};
