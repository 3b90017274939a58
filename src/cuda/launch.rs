//! Which kernel computes what, with how many blocks and threads: what the driver launches, and the tests emulate.

use super::frequency;
use super::params::{Decode, Histogram, Inputs, LayOut, Linear, Measure, Quantise, Unpack, Weight, Wide};
use super::weight::{Family, Kind, STRIPE, TILE_COLS};

const THREADS: u32 = 256;
/// An H200's, each of which is to have as many blocks as it runs at a time.
pub(super) const MULTIPROCESSORS: usize = 132;

/// The products of few columns, by how many each takes at most.
const NARROW: [usize; 4] = [8, 16, 32, 64];
/// Those of many, on Hopper.
const WIDE: [usize; 2] = [64, 128];
/// A launch's sums are those of a block of so many columns on each multiprocessor.
const SUMS_COLUMNS: usize = 256;
/// Beyond so many columns Hopper takes those. More than they have are for the library, which was faster in 21 of 27 cases of 256.
const NARROW_ON_HOPPER: usize = 16;

/// As `cuda/wide.cuh` has them: rows of a block, and tiles on their way.
const WIDE_ROWS: usize = 128;
const WIDE_STAGES: usize = 4;
/// At least so many tiles of a stripe to a block.
const LEAST_TILES: usize = 8;
/// More splits have more sums to add.
const MOST_SPLITS: usize = 16;
/// Bytes of a column in a tile of x.
const COLUMN_BYTES: usize = TILE_COLS * 2;

/// Dynamic shared memory of the fused product by pairs: eight warps' runs and the table's copies, as `cuda/pairs_layout.cuh`
/// lays them. Every device since sm_80 has as much for a block.
const PAIRS_SHARED: u32 = 8 * 832 * 4 + 16 * 4096;

/// A layout's kernels.
struct Kernels {
    /// By [`NARROW`], of which pairs have the first two; and their blocks on a multiprocessor, as `cuda/linear.cu` has them.
    linear: &'static [(&'static str, usize)],
    /// In both directions, by [`WIDE`].
    wide: Option<[Many; 2]>,
    unpack: Option<&'static str>,
    /// What lays weights out.
    tiles: Option<&'static str>,
}

/// The product of many columns, and what makes results of its sums.
struct Many {
    file: &'static str,
    products: [&'static str; WIDE.len()],
    finish: &'static str,
}

macro_rules! narrow {
    ($layout:literal: $($columns:literal x $blocks:literal),*) => {
        &[$((concat!("infold_linear_", $layout, "_", $columns), $blocks)),*]
    };
}

macro_rules! many {
    ($file:literal, $finish:literal, $layout:literal) => {
        Many {
            file: $file,
            products: [concat!("infold_", $file, "_", $layout, "_64"), concat!("infold_", $file, "_", $layout, "_128")],
            finish: concat!("infold_", $finish, "_", $layout),
        }
    };
}

macro_rules! of_fixed_width {
    ($layout:literal, $of_8:literal, $of_16:literal) => {
        Kernels {
            linear: narrow!($layout: 8 x $of_8, 16 x $of_16, 32 x 2, 64 x 1),
            wide: Some([many!("wide", "finish", $layout), many!("backward", "backward_finish", $layout)]),
            unpack: Some(concat!("infold_unpack_", $layout)),
            tiles: Some(concat!("infold_tiles_", $layout)),
        }
    };
}

macro_rules! of_pairs {
    ($layout:literal) => {
        Kernels {
            linear: narrow!($layout: 8 x 2, 16 x 2),
            wide: None,
            unpack: Some(concat!("infold_unpack_", $layout)),
            tiles: None,
        }
    };
}

impl Kind {
    fn kernels(self) -> Kernels {
        match self {
            Self::Window => of_fixed_width!("window", 3, 2),
            Self::Codes4 => of_fixed_width!("codes4", 4, 3),
            Self::Codes5 => of_fixed_width!("codes5", 4, 3),
            Self::Codes8 => of_fixed_width!("codes8", 3, 2),
            Self::Pairs => of_pairs!("pairs"),
            Self::PairsOfLevels => of_pairs!("pairs_of_levels"),
            Self::RawBf16 | Self::RawF16 | Self::RawF32 => {
                Kernels { linear: &[], wide: None, unpack: None, tiles: None }
            }
        }
    }

    /// Dynamic shared memory of the product of few columns.
    fn narrow_shared(self) -> u32 {
        if self.family() == Family::Pairs { PAIRS_SHARED } else { 0 }
    }
}

const INPUTS_ROWS: &str = "infold_inputs_rows";
const INPUTS_TILES: &str = "infold_inputs_tiles";

/// Decoders of the canonical form by [`Plane::coding`](super::params::Plane), to bfloat16s and to levels.
const DECODE: [[&str; 2]; 3] = [
    ["infold_decode_plain_bf16", "infold_decode_plain_levels"],
    ["infold_decode_rans_bf16", "infold_decode_rans_levels"],
    ["infold_decode_alias_bf16", "infold_decode_alias_levels"],
];
/// Of bfloat16s and of levels.
const HISTOGRAM: [&str; 2] = ["infold_histogram_bf16", "infold_histogram_levels"];
const APART: [&str; 2] = ["infold_apart_bf16", "infold_apart_levels"];
/// Of float32 and of bfloat16.
const LARGEST: [&str; 2] = ["infold_largest_f32", "infold_largest_bf16"];
const QUANTISE: [&str; 2] = ["infold_quantise_f32", "infold_quantise_bf16"];
/// So many blocks at most find maxima or levels.
const QUANTISE_BLOCKS: u64 = 4224;
const SQUARE: [&str; 2] = ["infold_square_f32", "infold_square_bf16"];
const MEASURE: [&str; 2] = ["infold_measure_f32", "infold_measure_bf16"];
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
    let plain = |file, name| Kernel { file, name, shared: 0 };
    let of_kind = move |kind: Kind| {
        let Kernels { linear, wide, unpack, tiles } = kind.kernels();
        let narrow = move |&(name, _)| Kernel { shared: kind.narrow_shared(), ..plain("linear", name) };
        let wide = wide.into_iter().flatten().flat_map(move |Many { file, products, finish }| {
            let product = move |(columns, name)| Kernel { shared: wide_shared(kind, columns), ..plain(file, name) };
            WIDE.into_iter().zip(products).map(product).chain([plain(file, finish)])
        });
        let unpack = unpack.map(|name| plain("unpack", name));
        let tiles = tiles.map(|name| plain("lay_out", name));
        linear.iter().map(narrow).chain(wide).chain(unpack).chain(tiles)
    };
    let inputs = [INPUTS_ROWS, INPUTS_TILES].map(|name| plain("inputs", name));
    let decode = DECODE.into_iter().flatten().map(move |name| plain("decode", name));
    let lay_out = HISTOGRAM.into_iter().chain(APART).map(move |name| plain("lay_out", name));
    let quantise = [LARGEST, QUANTISE, SQUARE, MEASURE].into_iter().flatten().map(move |name| plain("quantise", name));
    inputs
        .into_iter()
        .chain(Kind::COMPUTED.into_iter().flat_map(of_kind))
        .chain(decode)
        .chain(lay_out)
        .chain(quantise)
        .chain(frequency::kernels())
}

/// Shared memory of the product of many columns: its tiles of x and of W.
fn wide_shared(kind: Kind, columns: usize) -> u32 {
    let stage = columns * COLUMN_BYTES + WIDE_ROWS / STRIPE * kind.tile_bytes();
    (WIDE_STAGES * stage) as u32
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

impl<P> Launch<P> {
    pub(super) fn new(kernel: &'static str, blocks: u32, parameters: P) -> Self {
        Self { kernel, blocks, threads: THREADS, shared: 0, parameters }
    }
}

fn stripes(weight: &Weight) -> u32 {
    (weight.rows as u32).div_ceil(STRIPE as u32)
}

/// Which of `sizes` is enough for so many columns.
fn place(sizes: &[usize], columns: usize) -> usize {
    sizes.partition_point(|&size| size < columns).min(sizes.len() - 1)
}

/// How a product is computed, by its columns: rows of x times the bfloat16s that each value is the sum of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Product {
    /// One launch of [`linear`].
    Narrow,
    /// Those of [`WidePlan`].
    Wide,
    /// By the library, on the unpacked weight.
    Unpacked,
}

impl Product {
    /// No figure of a GPU has moved these bounds yet.
    pub fn of(kind: Kind, rows: usize, parts: usize, on_hopper: bool) -> Self {
        let Kernels { linear, wide, .. } = kind.kernels();
        let [.., many] = WIDE;
        match rows * parts {
            _ if linear.is_empty() => Self::Unpacked,
            columns if columns <= NARROW_ON_HOPPER => Self::Narrow,
            columns if on_hopper && wide.is_some() && columns <= many => Self::Wide,
            // The kernels of more columns take a value as one.
            columns if !on_hopper && parts == 1 && columns <= NARROW[linear.len() - 1] => Self::Narrow,
            _ => Self::Unpacked,
        }
    }

    /// dx = g·W.
    pub fn of_gradient(kind: Kind, rows: usize, parts: usize, on_hopper: bool) -> Self {
        let [.., many] = WIDE;
        if on_hopper && kind.kernels().wide.is_some() && rows * parts <= many { Self::Wide } else { Self::Unpacked }
    }
}

/// y = x·Wᵀ + bias for what [`Product::Narrow`] is for.
pub fn linear(kind: Kind, parameters: Linear) -> Launch<Linear> {
    let Kernels { linear, .. } = kind.kernels();
    let (place, stripes) =
        (place(&NARROW, (parameters.batch * parameters.parts) as usize), stripes(&parameters.weight));
    let (kernel, at_a_time) = linear.get(place).copied().unwrap_or_default();
    // One that fills a table first takes several stripes.
    let blocks = if kind == Kind::Window { stripes } else { stripes.min((MULTIPROCESSORS * at_a_time) as u32) };
    Launch { shared: kind.narrow_shared(), ..Launch::new(kernel, blocks, parameters) }
}

/// x as rows of bfloat16s.
pub fn input_rows(parameters: Inputs) -> Launch<Inputs> {
    let elements = (parameters.batch * parameters.parts) as usize * parameters.cols as usize;
    Launch::new(INPUTS_ROWS, elements.div_ceil(THREADS as usize) as u32, parameters)
}

/// x as the tiles that the product of many columns reads.
pub fn input_tiles(parameters: Inputs) -> Launch<Inputs> {
    let chunks = input_tiles_bytes(parameters.cols as usize, parameters.columns as usize) / size_of::<u128>();
    Launch::new(INPUTS_TILES, chunks.div_ceil(THREADS as usize) as u32, parameters)
}

/// What x takes as tiles.
pub fn input_tiles_bytes(cols: usize, columns: usize) -> usize {
    cols.div_ceil(TILE_COLS) * columns * COLUMN_BYTES
}

/// W's product, or its transpose's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    Forward,
    Backward,
}

/// How a product of many columns is cut up: so that every multiprocessor has a block, and so that the sums of one launch
/// take at most 18 MB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WidePlan {
    /// Those of the kernel, which are enough.
    pub columns: usize,
    /// Of the sums' terms.
    pub splits: usize,
    /// Of sums, in one launch.
    pub rows: usize,
}

impl WidePlan {
    /// For `rows` of sums, each of so many terms.
    pub fn new(rows: usize, terms: usize, columns: usize) -> Self {
        let columns = WIDE[place(&WIDE, columns)];
        let blocks = rows.div_ceil(WIDE_ROWS).max(1);
        // Two of the smallest fit a multiprocessor.
        let at_a_time = if columns == WIDE[0] { 2 * MULTIPROCESSORS } else { MULTIPROCESSORS };
        let most_blocks = MULTIPROCESSORS * SUMS_COLUMNS / columns;
        let most_splits = (terms.div_ceil(TILE_COLS) / LEAST_TILES).min(most_blocks / blocks).max(1);
        // Rounds of blocks for each part of the terms: the first that is least.
        let time = |splits: usize| (blocks * splits).div_ceil(at_a_time) as f64 / splits as f64;
        let splits = (1..=most_splits.min(MOST_SPLITS)).min_by(|&a, &b| time(a).total_cmp(&time(b))).unwrap_or(1);
        Self { columns, splits, rows: (most_blocks * WIDE_ROWS).min(rows) }
    }

    /// The sums of one launch, in float32.
    pub fn sums(self) -> usize {
        self.splits * self.rows * self.columns
    }

    /// The product of each part of the rows, then what makes results of it. `parameters` say nothing of the plan.
    pub fn launches(
        self,
        kind: Kind,
        direction: Direction,
        parameters: Wide,
    ) -> impl Iterator<Item = [Launch<Wide>; 2]> {
        let Self { columns, splits, rows } = self;
        let Weight { rows: weight_rows, cols: weight_cols, .. } = parameters.weight;
        let all = if direction == Direction::Forward { weight_rows } else { weight_cols } as usize;
        // A layout that has no such kernels launches none.
        let many = kind.kernels().wide.into_iter().flatten().nth(direction as usize);
        let names = many.map(|many| (many.products[place(&WIDE, columns)], many.finish));
        names.into_iter().flat_map(move |(product, finish)| {
            (0..all).step_by(rows.max(1)).map(move |first| {
                let count = rows.min(all - first);
                let parameters = Wide {
                    columns: columns as i32,
                    splits: splits as i32,
                    first_row: first as i32,
                    row_count: count as i32,
                    ..parameters
                };
                let blocks = (count.div_ceil(WIDE_ROWS) * splits) as u32;
                let product = Launch { shared: wide_shared(kind, columns), ..Launch::new(product, blocks, parameters) };
                [product, Launch::new(finish, count.div_ceil(STRIPE) as u32, parameters)]
            })
        })
    }
}

/// The dense weight, or `indices` of its rows.
pub fn unpack(kind: Kind, parameters: Unpack, indices: Option<u32>) -> Launch<Unpack> {
    let blocks = indices.unwrap_or(stripes(&parameters.weight));
    Launch::new(kind.kernels().unpack.unwrap_or_default(), blocks, parameters)
}

/// A plane of the canonical form, into bfloat16s or levels.
pub fn decode(parameters: Decode, tiles: usize, levels: bool) -> Launch<Decode> {
    let kernel = DECODE[parameters.own.coding as usize][usize::from(levels)];
    let warps = tiles as u32 * parameters.workers as u32;
    let blocks = warps.div_ceil(DECODE_THREADS / WARP);
    Launch { threads: DECODE_THREADS, ..Launch::new(kernel, blocks, parameters) }
}

/// How often bfloat16s' bytes or levels occur.
pub fn histogram(parameters: Histogram, levels: bool) -> Launch<Histogram> {
    let blocks = parameters.count.div_ceil(HISTOGRAM_CODES * u64::from(THREADS)).min(HISTOGRAM_BLOCKS) as u32;
    Launch::new(HISTOGRAM[usize::from(levels)], blocks, parameters)
}

/// What each row lists apart: how many, or their list.
pub fn apart(kind: Kind, parameters: LayOut) -> Launch<LayOut> {
    let blocks = (parameters.rows as u32).div_ceil(THREADS / WARP);
    let kernel = APART[usize::from(kind != Kind::Window)];
    Launch::new(kernel, blocks, parameters)
}

/// The tiles of a layout.
pub fn tiles(kind: Kind, parameters: LayOut, tiles: usize) -> Launch<LayOut> {
    let blocks = (tiles as u32).div_ceil(THREADS / WARP);
    Launch::new(kind.kernels().tiles.unwrap_or_default(), blocks, parameters)
}

/// The largest magnitude under each scale, of which there are `parts`.
pub fn largest(parameters: Quantise, parts: usize, bf16: bool) -> Launch<Quantise> {
    by_parts(LARGEST[usize::from(bf16)], parameters, parts, QUANTISE_BLOCKS)
}

/// The levels of a weight.
pub fn quantise(parameters: Quantise, parts: usize, bf16: bool) -> Launch<Quantise> {
    by_parts(QUANTISE[usize::from(bf16)], parameters, parts, QUANTISE_BLOCKS)
}

/// The squares of each row of a weight.
pub fn square(parameters: Measure, bf16: bool) -> Launch<Measure> {
    by_parts(SQUARE[usize::from(bf16)], parameters, measured(parameters), QUANTISE_BLOCKS)
}

/// Sums over the levels of a weight.
pub fn measure(parameters: Measure, bf16: bool) -> Launch<Measure> {
    // A block adds to the whole at its end, as one that counts does.
    by_parts(MEASURE[usize::from(bf16)], parameters, measured(parameters), HISTOGRAM_BLOCKS)
}

fn measured(parameters: Measure) -> usize {
    (parameters.rows as usize).div_ceil(parameters.every as usize)
}

/// A warp for each part, in so many blocks at most.
fn by_parts<P>(kernel: &'static str, parameters: P, parts: usize, most: u64) -> Launch<P> {
    let blocks = (parts as u64).div_ceil(u64::from(THREADS / WARP)).min(most) as u32;
    Launch::new(kernel, blocks, parameters)
}
