//! Which kernel computes what, with how many blocks and threads: what the driver launches, and the tests emulate.

use super::params::{Decode, Histogram, LayOut, Linear, Quantise, Unpack, Weight};
use super::weight::{Kind, STRIPE};

/// Rows of x that the fused product takes; more are multiplied by the unpacked weight.
pub const MAX_FUSED_ROWS: usize = 16;

const THREADS: u32 = 256;
/// Where a block fills a table first, about so many blocks share the stripes: two for each of an H200's multiprocessors.
const TABLE_BLOCKS: u32 = 264;

/// The fused products by [`Kind`], for at most 8 and 16 rows of x.
const LINEAR: [[&str; 2]; 4] = [
    ["infold_linear_window_8", "infold_linear_window_16"],
    ["infold_linear_codes4_8", "infold_linear_codes4_16"],
    ["infold_linear_codes5_8", "infold_linear_codes5_16"],
    ["infold_linear_codes8_8", "infold_linear_codes8_16"],
];
const UNPACK: [&str; 4] =
    ["infold_unpack_window", "infold_unpack_codes4", "infold_unpack_codes5", "infold_unpack_codes8"];

/// Decoders of the canonical form by [`Plane::coding`](super::params::Plane), to bfloat16s and to levels.
const DECODE: [[&str; 2]; 3] = [
    ["infold_decode_plain_bf16", "infold_decode_plain_levels"],
    ["infold_decode_rans_bf16", "infold_decode_rans_levels"],
    ["infold_decode_alias_bf16", "infold_decode_alias_levels"],
];
/// Of bfloat16s and of levels.
const HISTOGRAM: [&str; 2] = ["infold_histogram_bf16", "infold_histogram_levels"];
const APART: [&str; 2] = ["infold_apart_bf16", "infold_apart_levels"];
const TILES: [&str; 4] = ["infold_tiles_window", "infold_tiles_codes4", "infold_tiles_codes5", "infold_tiles_codes8"];
/// Of float32 and of bfloat16.
const LARGEST: [&str; 2] = ["infold_largest_f32", "infold_largest_bf16"];
const QUANTISE: [&str; 2] = ["infold_quantise_f32", "infold_quantise_bf16"];
/// So many blocks at most find maxima or levels.
const QUANTISE_BLOCKS: u64 = 4224;
/// Threads of a decoder's block.
const DECODE_THREADS: u32 = 128;
const WARP: u32 = 32;
/// So many blocks at most count, and so many codes at least a thread: a block clears its counts first and adds them to the
/// whole at its end.
const HISTOGRAM_BLOCKS: u64 = 528;
const HISTOGRAM_CODES: u64 = 32;

/// Where a kernel is: its file and its name there, and the dynamic shared memory in bytes that a launch may ask for.
#[derive(Debug, Clone, Copy)]
pub struct Kernel {
    pub file: &'static str,
    pub name: &'static str,
    pub shared: u32,
}

/// Every kernel.
pub fn kernels() -> impl Iterator<Item = Kernel> {
    let linear = LINEAR.into_iter().flatten().map(|name| Kernel { file: "linear", name, shared: 0 });
    let linear = linear.chain(UNPACK.map(|name| Kernel { file: "unpack", name, shared: 0 }));
    let decode = DECODE.into_iter().flatten().map(|name| Kernel { file: "decode", name, shared: 0 });
    let lay_out = HISTOGRAM.into_iter().chain(APART).chain(TILES);
    let lay_out = lay_out.map(|name| Kernel { file: "lay_out", name, shared: 0 });
    let quantise = LARGEST.into_iter().chain(QUANTISE).map(|name| Kernel { file: "quantise", name, shared: 0 });
    linear.chain(decode).chain(lay_out).chain(quantise)
}

/// A kind's place in the lists of kernels.
fn place(kind: Kind) -> usize {
    kind as usize - Kind::Window as usize
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
    Launch { kernel, blocks, threads: THREADS, shared: 0, parameters }
}

/// The dense weight, or `indices` of its rows.
pub fn unpack(kind: Kind, parameters: Unpack, indices: Option<u32>) -> Launch<Unpack> {
    let blocks = indices.unwrap_or(stripes(&parameters.weight));
    Launch { kernel: UNPACK[place(kind)], blocks, threads: THREADS, shared: 0, parameters }
}

/// A plane of the canonical form, into bfloat16s or levels.
pub fn decode(parameters: Decode, tiles: usize, levels: bool) -> Launch<Decode> {
    let kernel = DECODE[parameters.own.coding as usize][usize::from(levels)];
    let warps = tiles as u32 * parameters.workers as u32;
    let blocks = warps.div_ceil(DECODE_THREADS / WARP);
    Launch { kernel, blocks, threads: DECODE_THREADS, shared: 0, parameters }
}

/// How often bfloat16s' bytes or levels occur.
pub fn histogram(parameters: Histogram, levels: bool) -> Launch<Histogram> {
    let blocks = parameters.count.div_ceil(HISTOGRAM_CODES * u64::from(THREADS)).min(HISTOGRAM_BLOCKS) as u32;
    Launch { kernel: HISTOGRAM[usize::from(levels)], blocks, threads: THREADS, shared: 0, parameters }
}

/// What each row lists apart: how many, or their list.
pub fn apart(kind: Kind, parameters: LayOut) -> Launch<LayOut> {
    let blocks = (parameters.rows as u32).div_ceil(THREADS / WARP);
    let kernel = APART[usize::from(kind != Kind::Window)];
    Launch { kernel, blocks, threads: THREADS, shared: 0, parameters }
}

/// The tiles of a layout.
pub fn tiles(kind: Kind, parameters: LayOut, tiles: usize) -> Launch<LayOut> {
    let blocks = (tiles as u32).div_ceil(THREADS / WARP);
    Launch { kernel: TILES[place(kind)], blocks, threads: THREADS, shared: 0, parameters }
}

/// The largest magnitude under each scale, of which there are `parts`.
pub fn largest(parameters: Quantise, parts: usize, bf16: bool) -> Launch<Quantise> {
    by_parts(LARGEST[usize::from(bf16)], parameters, parts)
}

/// The levels of a weight.
pub fn quantise(parameters: Quantise, parts: usize, bf16: bool) -> Launch<Quantise> {
    by_parts(QUANTISE[usize::from(bf16)], parameters, parts)
}

fn by_parts(kernel: &'static str, parameters: Quantise, parts: usize) -> Launch<Quantise> {
    let blocks = (parts as u64).div_ceil(u64::from(THREADS / WARP)).min(QUANTISE_BLOCKS) as u32;
    Launch { kernel, blocks, threads: THREADS, shared: 0, parameters }
}
