//! Which kernel computes what, with how many blocks and threads: what the driver launches, and the tests emulate.

use super::params::{WindowEmbedding, WindowLinear, WindowUnpack, WindowWeight};
use super::weight::STRIPE;

/// Rows of x that the fused product takes; more are multiplied by the unpacked weight.
pub const MAX_FUSED_ROWS: usize = 16;

const THREADS: u32 = 256;

/// A kernel's launch.
#[derive(Debug, Clone, Copy)]
pub struct Launch<P> {
    /// The kernel's file and its name there.
    pub module: &'static str,
    pub kernel: &'static str,
    pub blocks: u32,
    pub threads: u32,
    pub parameters: P,
}

impl<P> Launch<P> {
    fn new(module: &'static str, kernel: &'static str, blocks: u32, parameters: P) -> Self {
        Self { module, kernel, blocks, threads: THREADS, parameters }
    }
}

/// A block for each stripe.
fn stripes(weight: &WindowWeight) -> u32 {
    (weight.rows as u32).div_ceil(STRIPE as u32)
}

/// y = x·Wᵀ + bias for at most [`MAX_FUSED_ROWS`] rows of x.
pub fn linear(parameters: WindowLinear) -> Launch<WindowLinear> {
    let kernel = if parameters.batch <= 8 { "infold_linear_window_8" } else { "infold_linear_window_16" };
    Launch::new("linear_window", kernel, stripes(&parameters.weight), parameters)
}

/// The dense weight.
pub fn unpack(parameters: WindowUnpack) -> Launch<WindowUnpack> {
    Launch::new("unpack_window", "infold_unpack_window", stripes(&parameters.weight), parameters)
}

/// The rows that `indices` name.
pub fn embedding(parameters: WindowEmbedding, indices: u32) -> Launch<WindowEmbedding> {
    Launch::new("unpack_window", "infold_embedding_window", indices, parameters)
}
