//! The launches of the block-circulant product: which kernel for how many rows, with how many blocks and how much memory.

use super::launch::{Kernel, Launch};
use super::params::{Circulant, Dtype};

/// Blocks of a power of two whose product is fused for few rows, and the lanes that transform one, as `cuda/fourier.cuh` has
/// them.
const FEW: [(usize, usize, &str); 5] = [
    (16, 4, "infold_circulant_few_16"),
    (32, 4, "infold_circulant_few_32"),
    (64, 8, "infold_circulant_few_64"),
    (128, 8, "infold_circulant_few_128"),
    (256, 16, "infold_circulant_few_256"),
];
/// The same for many rows of bfloat16, and the threads of a block.
const MANY: [(usize, u32, &str); 3] = [
    (32, 512, "infold_circulant_many_32"),
    (64, 512, "infold_circulant_many_64"),
    (128, 256, "infold_circulant_many_128"),
];
const TILES: &str = "infold_circulant_tiles";

/// As `cuda/circulant_few.cu` has them.
const FEW_THREADS: usize = 256;
/// As `cuda/circulant_many.cuh` has them.
const MANY_FEATURES: usize = 4096;
const MANY_ROWS: usize = 16;
/// Shared memory that every block may have since sm_80.
const MOST_SHARED: usize = 163 << 10;
/// A number of a spectrum, of two floats.
const COMPLEX: usize = 8;
/// More rows are many.
const FEW_ROWS: usize = 16;
/// Blocks that run at a time: one on each of an H200's multiprocessors.
const BLOCKS: usize = 132;

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
    /// For `rows` rows of `inputs` blocks of `n`.
    pub fn of(n: usize, inputs: usize, rows: usize, dtype: Dtype) -> Self {
        let fits_few = few_shared(n, inputs).is_some_and(|bytes| bytes <= MOST_SHARED);
        let fits_many = dtype == Dtype::Bf16 && n * inputs <= MANY_FEATURES && MANY.iter().any(|&(size, ..)| size == n);
        match (fits_few, fits_many) {
            (true, false) if rows <= 4 * FEW_ROWS => Self::Few,
            (true, true) if rows <= FEW_ROWS => Self::Few,
            (_, true) => Self::Many,
            _ => Self::Composed,
        }
    }
}

/// Bytes of shared memory of a block for few rows: a scratch for each transform, and a row's spectra.
fn few_shared(n: usize, inputs: usize) -> Option<usize> {
    let &(_, lanes, _) = FEW.iter().find(|(size, ..)| *size == n)?;
    let scratch = FEW_THREADS / lanes * (n / lanes) * (lanes + 1);
    Some((scratch + inputs.next_multiple_of(2) * n / 2) * COMPLEX)
}

/// The same for many rows: spectra of sixteen rows, and two matrices.
fn many_shared(n: usize) -> usize {
    let inputs = MANY_FEATURES / n;
    (n / 2 * (inputs * 16 + 16) + n * n) * size_of::<u32>()
}

pub fn kernels() -> impl Iterator<Item = Kernel> {
    let few = FEW.map(|(_, _, name)| Kernel { file: "circulant_few", name, shared: MOST_SHARED as u32 });
    let many = MANY.map(|(n, _, name)| Kernel { file: "circulant_many", name, shared: many_shared(n) as u32 });
    few.into_iter().chain(many).chain([Kernel { file: "circulant_many", name: TILES, shared: 0 }])
}

/// The product of few rows; for what [`Product::Few`] is for.
pub fn few(parameters: Circulant) -> Launch<Circulant> {
    let (n, inputs) = (parameters.n as usize, parameters.inputs as usize);
    let kernel = FEW.iter().find(|(size, ..)| *size == n).map_or("", |(.., name)| name);
    let blocks = parameters.outputs as u32 * parameters.batch as u32;
    let shared = few_shared(n, inputs).unwrap_or_default() as u32;
    Launch { shared, ..Launch::new(kernel, blocks, parameters) }
}

/// Words of the spectra as [`many`] reads them.
pub fn tile_words(n: usize, inputs: usize, outputs: usize) -> usize {
    n / 2 * outputs.div_ceil(8) * inputs.div_ceil(16) * 32 * 4
}

/// Lays spectra out for [`many`].
pub fn tiles(parameters: Circulant) -> Launch<Circulant> {
    let (n, inputs, outputs) = (parameters.n as usize, parameters.inputs as usize, parameters.outputs as usize);
    let launch = Launch::new(TILES, 0, parameters);
    let threads = tile_words(n, inputs, outputs) / 4;
    Launch { blocks: threads.div_ceil(launch.threads as usize) as u32, ..launch }
}

/// The product of many rows; for what [`Product::Many`] is for. `outputs_each` is set here.
pub fn many(parameters: Circulant) -> Launch<Circulant> {
    let (n, outputs) = (parameters.n as usize, parameters.outputs as usize);
    let (threads, kernel) =
        MANY.iter().find(|(size, ..)| *size == n).map_or((0, ""), |&(_, threads, name)| (threads, name));
    // Few rows are shared by several blocks, each of which transforms them.
    let stripes = (parameters.batch as usize).div_ceil(MANY_ROWS).max(1);
    let splits = outputs.div_ceil(MANY_FEATURES / n).max(BLOCKS / stripes).max(1);
    let each = outputs.div_ceil(splits).next_multiple_of(8);
    let blocks = (stripes * outputs.div_ceil(each)).min(BLOCKS) as u32;
    let parameters = Circulant { outputs_each: each as i32, ..parameters };
    Launch { threads, shared: many_shared(n) as u32, ..Launch::new(kernel, blocks, parameters) }
}
