//! The launches of the block-circulant product: which kernel for how many rows, with how many blocks and how much memory.

use super::launch::{Kernel, Launch, MULTIPROCESSORS};
use super::params::{Circulant, Dtype, Log8Decode};
use crate::Result;

/// Blocks of a power of two whose product is fused for few rows, and the lanes that transform one, as `cuda/fourier.cuh` has
/// them.
const FEW: [(usize, usize, &str); 5] = [
    (16, 4, "infold_circulant_few_16"),
    (32, 4, "infold_circulant_few_32"),
    (64, 8, "infold_circulant_few_64"),
    (128, 8, "infold_circulant_few_128"),
    (256, 16, "infold_circulant_few_256"),
];
/// The same for many rows of bfloat16: the block, the most features, a block's threads.
const MANY: [(usize, usize, u32, &str); 6] = [
    (32, 1024, 256, "infold_circulant_many_32_1024"),
    (64, 1024, 512, "infold_circulant_many_64_1024"),
    (128, 1024, 256, "infold_circulant_many_128_1024"),
    (32, 4096, 256, "infold_circulant_many_32_4096"),
    (64, 4096, 512, "infold_circulant_many_64_4096"),
    (128, 4096, 256, "infold_circulant_many_128_4096"),
];
const TILES: &str = "infold_circulant_tiles";
const DECODE: &str = "infold_log8_decode";

/// As `cuda/circulant_few.cu` has them.
const FEW_THREADS: usize = 256;
/// As `cuda/circulant_many.cuh` has it.
const MANY_ROWS: usize = 16;
/// Shared memory that a block may ask for on every device, beside what its kernel has anyway.
const MOST_SHARED: usize = 95 << 10;
/// A number of a spectrum, of two floats.
const COMPLEX: usize = 8;
/// More rows are many.
const FEW_ROWS: usize = 16;
/// The kernels count rows, and a little beyond them, in 32 bits.
const MOST_ROWS: usize = (i32::MAX - (1 << 16)) as usize;

/// How a product of spectra is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Product {
    /// One launch of [`few`].
    Few,
    /// Those of [`tiles`] and [`many`].
    Many,
    /// By the library's transforms.
    Composed,
}

impl Product {
    /// For `rows` rows of `inputs` blocks of `n`, with the kernels that the device `has`.
    pub fn of(
        n: usize,
        inputs: usize,
        rows: usize,
        dtype: Dtype,
        has: impl Fn(&'static str) -> Result<bool>,
    ) -> Result<Self> {
        let few = few_kernel(n).filter(|_| few_shared(n, inputs).is_some_and(|bytes| bytes <= MOST_SHARED));
        let many = many_kernel(n, inputs).filter(|_| dtype == Dtype::Bf16 && rows <= MOST_ROWS);
        let has_few = few.map_or(Ok(false), &has)?;
        let has_many = many.map_or(Ok(false), |(.., name)| has(name))?;
        Ok(match (has_few, has_many) {
            (true, false) if rows <= 4 * FEW_ROWS => Self::Few,
            (true, true) if rows <= FEW_ROWS => Self::Few,
            (_, true) => Self::Many,
            _ => Self::Composed,
        })
    }
}

/// The kernel for few rows of blocks of `n`.
fn few_kernel(n: usize) -> Option<&'static str> {
    FEW.iter().find(|(size, ..)| *size == n).map(|&(.., name)| name)
}

/// Bytes of shared memory of a block for few rows: a scratch for each transform, and a row's spectra.
fn few_shared(n: usize, inputs: usize) -> Option<usize> {
    let &(_, lanes, _) = FEW.iter().find(|(size, ..)| *size == n)?;
    let scratch = FEW_THREADS / lanes * (n / lanes) * (lanes + 1);
    Some((scratch + inputs.next_multiple_of(2) * n / 2) * COMPLEX)
}

/// The kernel for many rows of so many blocks: its features, threads and name.
fn many_kernel(n: usize, inputs: usize) -> Option<(usize, u32, &'static str)> {
    let kernel = MANY.iter().find(|&&(size, features, ..)| size == n && n * inputs <= features);
    kernel.map(|&(_, features, threads, name)| (features, threads, name))
}

/// Sixteen blocks of x each.
fn input_steps(n: usize, features: usize) -> usize {
    (features / n / 16).max(1)
}

/// Bytes of shared memory of a block for many rows: spectra of sixteen rows, and two matrices.
fn many_shared(n: usize, features: usize) -> usize {
    (n / 2 * (input_steps(n, features) * 256 + 16) + n * n) * size_of::<u32>()
}

pub fn kernels() -> impl Iterator<Item = Kernel> {
    let few = FEW.map(|(_, _, name)| Kernel { file: "circulant_few", name, shared: MOST_SHARED as u32 });
    let many = MANY.map(|(n, features, _, name)| Kernel {
        file: "circulant_many",
        name,
        shared: many_shared(n, features) as u32,
    });
    let others = [("circulant_many", TILES), ("log8", DECODE)].map(|(file, name)| Kernel { file, name, shared: 0 });
    few.into_iter().chain(many).chain(others)
}

/// The product of few rows; for what [`Product::Few`] is for.
pub fn few(parameters: Circulant) -> Launch<Circulant> {
    let (n, inputs) = (parameters.n as usize, parameters.inputs as usize);
    let kernel = few_kernel(n).unwrap_or_default();
    let blocks = parameters.outputs as u32 * parameters.batch as u32;
    let shared = few_shared(n, inputs).unwrap_or_default() as u32;
    Launch { shared, ..Launch::new(kernel, blocks, parameters) }
}

/// Words of the spectra as [`many`] reads them; for what [`Product::Many`] is for, as are the next two.
pub fn tile_words(n: usize, inputs: usize, outputs: usize) -> usize {
    let features = many_kernel(n, inputs).map_or(0, |(features, ..)| features);
    n / 2 * outputs.div_ceil(8) * input_steps(n, features) * 32 * 4
}

/// Lays spectra out, and multiplies. The last two parameters are set here.
pub fn many(parameters: Circulant) -> [Launch<Circulant>; 2] {
    let [n, inputs, outputs] = [parameters.n, parameters.inputs, parameters.outputs].map(|size| size as usize);
    let (features, threads, kernel) = many_kernel(n, inputs).unwrap_or_default();
    let steps = input_steps(n, features);
    // Few rows are shared by several blocks, each of which transforms them.
    let stripes = (parameters.batch as usize).div_ceil(MANY_ROWS).max(1);
    let splits = outputs.div_ceil(16 * steps).max(MULTIPROCESSORS / stripes).max(1);
    let each = outputs.div_ceil(splits).next_multiple_of(8);
    let blocks = (stripes * outputs.div_ceil(each)).min(MULTIPROCESSORS) as u32;
    let parameters = Circulant { input_steps: steps as i32, outputs_each: each as i32, ..parameters };
    let tiles = Launch::new(TILES, 0, parameters);
    let tile_blocks = (tile_words(n, inputs, outputs) / 4).div_ceil(tiles.threads as usize) as u32;
    let shared = many_shared(n, features) as u32;
    [Launch { blocks: tile_blocks, ..tiles }, Launch { threads, shared, ..Launch::new(kernel, blocks, parameters) }]
}

/// Numbers in log8 into a dtype.
pub fn decode(parameters: Log8Decode) -> Launch<Log8Decode> {
    let launch = Launch::new(DECODE, 0, parameters);
    Launch { blocks: parameters.count.div_ceil(launch.threads.into()) as u32, ..launch }
}
