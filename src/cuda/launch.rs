//! Which kernel computes what, with how many blocks and threads: what the driver launches, and the tests emulate.

use super::params::{Linear, Unpack, Weight};
use super::weight::{Kind, STRIPE};

/// Rows of x that the fused product takes; more are multiplied by the unpacked weight.
pub const MAX_FUSED_ROWS: usize = 16;

const THREADS: u32 = 256;
/// Where a block fills a table first, about so many blocks share the stripes: two for each of an H200's multiprocessors.
const TABLE_BLOCKS: u32 = 264;

/// Every kernel: its file and its name there.
pub const KERNELS: [(&str, &str); 12] = [
    ("linear", "infold_linear_window_8"),
    ("linear", "infold_linear_window_16"),
    ("linear", "infold_linear_codes4_8"),
    ("linear", "infold_linear_codes4_16"),
    ("linear", "infold_linear_codes5_8"),
    ("linear", "infold_linear_codes5_16"),
    ("linear", "infold_linear_codes8_8"),
    ("linear", "infold_linear_codes8_16"),
    ("unpack", "infold_unpack_window"),
    ("unpack", "infold_unpack_codes4"),
    ("unpack", "infold_unpack_codes5"),
    ("unpack", "infold_unpack_codes8"),
];

/// A kernel's launch.
#[derive(Debug, Clone, Copy)]
pub struct Launch<P> {
    /// One of [`KERNELS`].
    pub kernel: &'static str,
    pub blocks: u32,
    pub threads: u32,
    pub parameters: P,
}

fn stripes(weight: &Weight) -> u32 {
    (weight.rows as u32).div_ceil(STRIPE as u32)
}

/// y = x·Wᵀ + bias for at most [`MAX_FUSED_ROWS`] rows of x.
pub fn linear(kind: Kind, parameters: Linear) -> Launch<Linear> {
    let (kernel, most) = match (kind, parameters.batch <= 8) {
        (Kind::Window, true) => ("infold_linear_window_8", u32::MAX),
        (Kind::Window, false) => ("infold_linear_window_16", u32::MAX),
        (Kind::Codes4, true) => ("infold_linear_codes4_8", TABLE_BLOCKS),
        (Kind::Codes4, false) => ("infold_linear_codes4_16", TABLE_BLOCKS),
        (Kind::Codes5, true) => ("infold_linear_codes5_8", TABLE_BLOCKS),
        (Kind::Codes5, false) => ("infold_linear_codes5_16", TABLE_BLOCKS),
        (Kind::Codes8, true) => ("infold_linear_codes8_8", TABLE_BLOCKS),
        (Kind::Codes8, false) => ("infold_linear_codes8_16", TABLE_BLOCKS),
    };
    let blocks = stripes(&parameters.weight).min(most);
    Launch { kernel, blocks, threads: THREADS, parameters }
}

/// The dense weight, or `indices` of its rows.
pub fn unpack(kind: Kind, parameters: Unpack, indices: Option<u32>) -> Launch<Unpack> {
    let kernel = match kind {
        Kind::Window => "infold_unpack_window",
        Kind::Codes4 => "infold_unpack_codes4",
        Kind::Codes5 => "infold_unpack_codes5",
        Kind::Codes8 => "infold_unpack_codes8",
    };
    let blocks = indices.unwrap_or(stripes(&parameters.weight));
    Launch { kernel, blocks, threads: THREADS, parameters }
}
