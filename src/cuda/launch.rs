//! Which kernel computes what, with how many blocks and threads: what the driver launches, and the tests emulate.

use super::params::{Linear, Unpack, Weight};
use super::weight::{Family, Kind, STRIPE};

/// Rows of x that the fused product takes; more are multiplied by the unpacked weight.
pub const MAX_FUSED_ROWS: usize = 16;

const THREADS: u32 = 256;
/// Where a block fills a table first, about so many blocks share the stripes: two for each of an H200's multiprocessors.
const TABLE_BLOCKS: u32 = 264;

/// The fused products by [`Kind`], for at most 8 and 16 rows of x.
const LINEAR: [[&str; 2]; 6] = [
    ["infold_linear_window_8", "infold_linear_window_16"],
    ["infold_linear_codes4_8", "infold_linear_codes4_16"],
    ["infold_linear_codes5_8", "infold_linear_codes5_16"],
    ["infold_linear_codes8_8", "infold_linear_codes8_16"],
    ["infold_linear_pairs_8", "infold_linear_pairs_16"],
    ["infold_linear_pairs_of_levels_8", "infold_linear_pairs_of_levels_16"],
];
const UNPACK: [&str; 6] = [
    "infold_unpack_window",
    "infold_unpack_codes4",
    "infold_unpack_codes5",
    "infold_unpack_codes8",
    "infold_unpack_pairs",
    "infold_unpack_pairs_of_levels",
];
/// Dynamic shared memory of the fused product by pairs: eight warps' runs and the table's copies, as `cuda/pairs_layout.cuh`
/// lays them. Every device since sm_80 has as much for a block.
const PAIRS_SHARED: u32 = 8 * 832 * 4 + 16 * 4096;

/// Where a kernel is: its file and its name there, and the dynamic shared memory in bytes that a launch may ask for.
#[derive(Debug, Clone, Copy)]
pub struct Kernel {
    pub file: &'static str,
    pub name: &'static str,
    pub shared: u32,
}

/// Every kernel.
pub fn kernels() -> impl Iterator<Item = Kernel> {
    let linear = LINEAR.into_iter().zip(Kind::ALL);
    let linear = linear.flat_map(|(names, kind)| names.map(|name| (name, shared(kind))));
    let linear = linear.map(|(name, shared)| Kernel { file: "linear", name, shared });
    linear.chain(UNPACK.map(|name| Kernel { file: "unpack", name, shared: 0 }))
}

/// A kind's place in the lists of kernels.
fn place(kind: Kind) -> usize {
    kind as usize - Kind::Window as usize
}

/// Dynamic shared memory of a kind's fused product.
fn shared(kind: Kind) -> u32 {
    if kind.family() == Family::Pairs { PAIRS_SHARED } else { 0 }
}

/// A kernel's launch.
#[derive(Debug, Clone, Copy)]
pub struct Launch<P> {
    /// One of [`kernels`].
    pub kernel: &'static str,
    pub blocks: u32,
    pub threads: u32,
    /// Bytes of dynamic shared memory, at most the kernel's.
    pub shared: u32,
    pub parameters: P,
}

fn stripes(weight: &Weight) -> u32 {
    (weight.rows as u32).div_ceil(STRIPE as u32)
}

/// y = x·Wᵀ + bias for at most [`MAX_FUSED_ROWS`] rows of x.
pub fn linear(kind: Kind, parameters: Linear) -> Launch<Linear> {
    let [eight, sixteen] = LINEAR[place(kind)];
    let kernel = if parameters.batch <= 8 { eight } else { sixteen };
    let most = if kind == Kind::Window { u32::MAX } else { TABLE_BLOCKS };
    let blocks = stripes(&parameters.weight).min(most);
    Launch { kernel, blocks, threads: THREADS, shared: shared(kind), parameters }
}

/// The dense weight, or `indices` of its rows.
pub fn unpack(kind: Kind, parameters: Unpack, indices: Option<u32>) -> Launch<Unpack> {
    let blocks = indices.unwrap_or(stripes(&parameters.weight));
    Launch { kernel: UNPACK[place(kind)], blocks, threads: THREADS, shared: 0, parameters }
}
