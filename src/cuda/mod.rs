//! The GPU kernels that the build embedded. A library built without nvcc embeds none and is CPU only.

#[cfg(feature = "torch")]
pub mod driver;
pub mod frequency;
pub mod launch;
pub mod lay_out;
pub mod pack;
pub mod params;
mod prefix;
pub mod weight;

#[allow(unused_imports)] // where no kernel is embedded
use crate::memory::Aligned;

include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

/// One compiled kernel file: every architecture's code in NVIDIA's fatbin container.
#[derive(Debug, Clone, Copy)]
pub struct Fatbin {
    /// The source file's stem.
    pub name: &'static str,
    pub bytes: &'static [u8],
}

/// The embedded kernel files.
pub fn fatbins() -> &'static [Fatbin] {
    FATBINS
}

/// What the kernels were compiled for, as nvcc names it: `sm_80`, …, and `compute_80` for PTX.
pub fn architectures() -> &'static [&'static str] {
    ARCHITECTURES
}
