//! The inner product of activations with one decoded block, compiled once per instruction set.

use half::bf16;

#[cfg(target_arch = "x86_64")]
use crate::codec::Tiles;
use crate::codec::{
    BLOCK, BlockShape, CHUNK, Chunks, Dtype, Isa, LANES, PackedWeight, Real, TILE_HEIGHT, TileDecoder, per_isa,
};
use crate::memory::{Aligned, AlignedVec};

/// A dtype of activations and gradients, and how they meet a decoded block.
pub trait Operand: Copy + Default + Send + Sync {
    /// What products are summed in.
    type Sum: Real;
    /// What a thread needs for that.
    type Scratch;
    /// Values that lie one below the other in a gradient's transpose, [`Operand::DEPTH`] of them.
    type Factor: Copy + Default + Send + Sync;
    const DEPTH: usize;

    fn scratch(height: usize) -> Self::Scratch;

    /// Rows of x that are multiplied together, where there are `rows`; x is padded to a multiple of it.
    fn height(rows: usize) -> usize;

    fn widen(self) -> Self::Sum;

    fn factor(value: impl Fn(usize) -> Self::Sum) -> Self::Factor;

    /// Adds `rows` rows of x times the decoder's current block to `sums`, whose rows begin every `stride` values; or keeps
    /// the block for later where `more` says that the next one goes on in the same rows of the weight.
    #[allow(clippy::too_many_arguments)] // a block, a matrix, sums
    fn multiply_block(
        decoder: &TileDecoder,
        shape: BlockShape,
        more: bool,
        x: Chunks<Self>,
        rows: usize,
        scratch: &mut Self::Scratch,
        sums: &mut [Self::Sum],
        stride: usize,
    );

    /// Adds the transpose of the decoder's current block times gᵀ (`[row of W][row of g, of N]`) to a chunk of dxᵀ (`[column]
    /// [row of g]`). The scratch is one for [`TILE_HEIGHT`] rows.
    fn multiply_transposed<const N: usize>(
        decoder: &TileDecoder,
        shape: BlockShape,
        gradient: &[Self::Factor],
        scratch: &mut Self::Scratch,
        sums: &mut [Self::Sum],
    );
}

/// Activations and the decoded block in one type, in which it is also summed.
pub trait Compute: Real {
    /// A decoded block in this type; `buffer` is where it is written if that is not f32.
    fn of_points<'a>(points: &'a [f32; BLOCK], buffer: &'a mut [Self]) -> &'a [Self];
    /// How large a buffer [`Compute::of_points`] needs.
    const BUFFER: usize;
    /// Adds one row of activations times the current block to `sums` without writing the block down; see
    /// [`TileDecoder::multiply`].
    fn multiply(decoder: &TileDecoder, x: &[Self], sums: &mut [Self]) -> bool;
}

/// A thread's decoded block.
pub struct Block<T> {
    points: Box<Aligned<[f32; BLOCK]>>,
    converted: AlignedVec<T>,
}

impl<T: Compute> Block<T> {
    pub fn new() -> Self {
        Self { points: Box::new(Aligned([0.0; BLOCK])), converted: AlignedVec::new(T::BUFFER) }
    }

    /// The decoder's current block, `[column][lane]`.
    pub fn read(&mut self, decoder: &TileDecoder) -> &[T] {
        decoder.points(&mut self.points);
        T::of_points(&self.points, &mut self.converted)
    }
}

impl<T: Compute> Operand for T {
    type Sum = T;
    type Scratch = Block<T>;
    type Factor = T;
    const DEPTH: usize = 1;

    fn scratch(_: usize) -> Block<T> {
        Block::new()
    }

    fn height(_: usize) -> usize {
        1
    }

    fn widen(self) -> T {
        self
    }

    fn factor(value: impl Fn(usize) -> T) -> T {
        value(0)
    }

    fn multiply_block(
        decoder: &TileDecoder,
        shape: BlockShape,
        _: bool,
        x: Chunks<T>,
        rows: usize,
        scratch: &mut Block<T>,
        sums: &mut [T],
        stride: usize,
    ) {
        let x = x.at(0, shape.col).values;
        if rows == 1 && T::multiply(decoder, &x[..shape.cols], sums) {
            return;
        }
        let b = scratch.read(decoder);
        BlockProduct { a: x, a_stride: CHUNK, depth: shape.cols, b, c: sums, c_stride: stride, rows }.run::<LANES>();
    }

    fn multiply_transposed<const N: usize>(
        decoder: &TileDecoder,
        shape: BlockShape,
        gradient: &[T],
        scratch: &mut Block<T>,
        sums: &mut [T],
    ) {
        let a = scratch.read(decoder);
        let (depth, b, rows) = (shape.lanes, gradient, shape.cols);
        BlockProduct { a, a_stride: LANES, depth, b, c: sums, c_stride: N, rows }.run::<N>();
    }
}

/// Whether bf16 activations are best left in bf16: the CPU multiplies tiles of them, and the weight is of bf16 or levels,
/// so that it loses no more by rounding than a dense weight in bf16 does.
pub fn keeps_bf16(weight: &PackedWeight) -> bool {
    Isa::get() == Isa::Amx && matches!(weight.header.element.float(), None | Some(Dtype::Bf16))
}

/// Decoded blocks that are multiplied together: sums are loaded and stored less often.
const TOGETHER: usize = 4;
/// With fewer rows of x, products wait for each other; one block at a time overlaps with the decoding of the next.
const ROWS_TOGETHER: usize = 64;

/// A thread's decoded blocks in bf16, and what multiplies tiles of them.
pub struct Pairs {
    pairs: Box<Aligned<[[u32; BLOCK / 2]; TOGETHER]>>,
    /// How many of the blocks wait for their product.
    kept: usize,
    /// A block's columns, `[column][lane]`; the backward's.
    columns: Box<Aligned<[bf16; BLOCK]>>,
    height: usize,
    #[cfg(target_arch = "x86_64")]
    tiles: Option<Tiles>,
}

/// Adds the first `depth` columns of a times rows of b, which come in pairs every `b_row` values, to `rows` rows of c.
fn multiply_pairs(a: Chunks<bf16>, b: &[u32], b_row: usize, depth: usize, c: &mut [f32], c_row: usize, rows: usize) {
    for (row, c) in c.chunks_mut(c_row).take(rows).enumerate() {
        for (col, pairs) in (0..depth).step_by(2).zip(b.chunks(b_row)) {
            let a = &a.at(row, col / CHUNK * CHUNK).values[col % CHUNK..];
            let (even, odd) = (a[0].to_f32(), a[1].to_f32());
            for (sum, &pair) in c.iter_mut().zip(&pairs[..LANES]) {
                *sum += even * f32::from_bits(pair << 16) + odd * f32::from_bits(pair & 0xffff_0000);
            }
        }
    }
}

impl Operand for bf16 {
    type Sum = f32;
    type Scratch = Pairs;
    type Factor = u32;
    const DEPTH: usize = 2;

    fn scratch(height: usize) -> Pairs {
        Pairs {
            pairs: Box::new(Aligned([[0; BLOCK / 2]; TOGETHER])),
            kept: 0,
            columns: Box::new(Aligned([bf16::ZERO; BLOCK])),
            height,
            // SAFETY: `Isa::get` names only what the CPU has, and a thread has one scratch at a time.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            tiles: (Isa::get() == Isa::Amx).then(|| unsafe { Tiles::new(height) }),
        }
    }

    fn height(rows: usize) -> usize {
        // As even as it can be.
        rows.div_ceil(rows.div_ceil(TILE_HEIGHT).max(1)).max(1)
    }

    fn widen(self) -> f32 {
        self.to_f32()
    }

    fn factor(value: impl Fn(usize) -> f32) -> u32 {
        let half = |row| u32::from(bf16::from_f32(value(row)).to_bits());
        half(1) << 16 | half(0)
    }

    fn multiply_block(
        decoder: &TileDecoder,
        shape: BlockShape,
        more: bool,
        x: Chunks<bf16>,
        rows: usize,
        scratch: &mut Pairs,
        sums: &mut [f32],
        stride: usize,
    ) {
        decoder.pairs(&mut scratch.pairs[scratch.kept]);
        scratch.kept += 1;
        if more && rows >= ROWS_TOGETHER && scratch.kept < TOGETHER {
            return;
        }
        let before = (scratch.kept - 1) * CHUNK;
        scratch.kept = 0;
        let (x, depth) = (x.at(0, shape.col - before), before + shape.cols);
        let pairs = scratch.pairs.as_flattened();
        #[cfg(target_arch = "x86_64")]
        if let Some(tiles) = &scratch.tiles {
            return tiles.multiply_add(x, pairs, LANES, depth, sums, stride, rows / scratch.height);
        }
        multiply_pairs(x, pairs, LANES, depth, sums, stride, rows);
    }

    fn multiply_transposed<const N: usize>(
        decoder: &TileDecoder,
        shape: BlockShape,
        gradient: &[u32],
        scratch: &mut Pairs,
        sums: &mut [f32],
    ) {
        decoder.pairs(&mut scratch.pairs[0]);
        split_pairs(&scratch.pairs[0], &mut scratch.columns);
        let a = Chunks { values: &scratch.columns[..], row: LANES, chunk: 0 };
        for first in (0..N).step_by(LANES) {
            let (b, c) = (&gradient[first..], &mut sums[first..]);
            #[cfg(target_arch = "x86_64")]
            if let Some(tiles) = &scratch.tiles {
                tiles.multiply_add(a, b, N, LANES, c, N, shape.cols.div_ceil(TILE_HEIGHT));
                continue;
            }
            multiply_pairs(a, b, N, LANES, c, N, shape.cols);
        }
    }
}

per_isa! {
    /// Pairs of columns as columns.
    fn split_pairs(pairs: &[u32; BLOCK / 2], columns: &mut [bf16; BLOCK]) {
        for (pairs, columns) in pairs.chunks_exact(LANES).zip(columns.chunks_exact_mut(2 * LANES)) {
            let (even, odd) = columns.split_at_mut(LANES);
            even.iter_mut().zip(pairs).for_each(|(even, &pair)| *even = bf16::from_bits(pair as u16));
            odd.iter_mut().zip(pairs).for_each(|(odd, &pair)| *odd = bf16::from_bits((pair >> 16) as u16));
        }
    }
}

impl Compute for f32 {
    const BUFFER: usize = 0;

    fn of_points<'a>(points: &'a [f32; BLOCK], _: &'a mut [f32]) -> &'a [f32] {
        points
    }

    fn multiply(decoder: &TileDecoder, x: &[f32], sums: &mut [f32]) -> bool {
        sums.first_chunk_mut::<LANES>().is_some_and(|sums| decoder.multiply(x, sums))
    }
}

impl Compute for f64 {
    const BUFFER: usize = BLOCK;

    fn of_points<'a>(points: &'a [f32; BLOCK], buffer: &'a mut [f64]) -> &'a [f64] {
        buffer.iter_mut().zip(points).for_each(|(to, &point)| *to = f64::from(point));
        buffer
    }

    fn multiply(_: &TileDecoder, _: &[f64], _: &mut [f64]) -> bool {
        false
    }
}

/// `c[m][..N] += Σ_p a[m][p] · b[p][..N]` for rows `m` and `p` below `depth`, with `N` the row length of `b`. The sum over
/// `p` is in order and starts from zero, so a row's result does not depend on the others.
pub struct BlockProduct<'a, T> {
    pub a: &'a [T],
    pub a_stride: usize,
    pub depth: usize,
    /// A block's worth.
    pub b: &'a [T],
    pub c: &'a mut [T],
    pub c_stride: usize,
    pub rows: usize,
}

impl<T: Real> BlockProduct<'_, T> {
    /// Runs the product on the best instruction set.
    pub fn run<const N: usize>(self) {
        let Self { a, a_stride, depth, b, c, c_stride, rows } = self;
        match Isa::get() {
            // SAFETY: `Isa::get` names only what the CPU has.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Isa::Avx512 | Isa::Amx => unsafe { avx512::<T, N>(a, a_stride, depth, b, c, c_stride, rows) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            Isa::Avx2 => unsafe { avx2::<T, N>(a, a_stride, depth, b, c, c_stride, rows) },
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => neon::<T, N>(a, a_stride, depth, b, c, c_stride, rows),
            _ => generic::<T, N>(a, a_stride, depth, b, c, c_stride, rows),
        }
    }
}

/// The product in tiles of `$m` rows by `$strip` columns, whose sums stay in registers. The fields are arguments here: from
/// a struct the compiler could not tell that they do not overlap, and the tiles came out ten times slower.
macro_rules! tiled {
    ($(#[$attribute:meta])* $name:ident, $m:literal x $strip:literal, fused: $fused:literal) => {
        $(#[$attribute])*
        fn $name<T: Real, const N: usize>(
            a: &[T],
            a_stride: usize,
            depth: usize,
            b: &[T],
            c: &mut [T],
            c_stride: usize,
            rows: usize,
        ) {
            let mut row = 0;
            macro_rules! rows_of {
                ($height:expr) => {{
                    let (a, c) = (&a[row * a_stride..], &mut c[row * c_stride..]);
                    tile::<T, N, { if $height <= $m { $height } else { 1 } }, $strip, $fused>(a, a_stride, depth, b, c, c_stride);
                    row += $height;
                }};
            }
            while row < rows {
                // As many rows at a time as registers hold sums of, but no one or two at the end that a better cut avoids:
                // their sums wait for each other.
                match rows - row {
                    left if left >= $m && !(1..=2).contains(&(left - $m)) => rows_of!($m),
                    left if left >= 8 && $m > 8 => rows_of!(8),
                    4.. if $m >= 4 => rows_of!(4),
                    2.. => rows_of!(2),
                    _ => rows_of!(1),
                }
            }
        }
    };
}

tiled!(generic, 4 x 16, fused: false);
tiled!(
    /// In f32, 24 registers of sums, of 32.
    #[cfg(target_arch = "aarch64")]
    neon, 6 x 16, fused: true
);
tiled!(
    /// In f32, twelve registers of sums, two of b, one broadcast.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    avx2, 6 x 16, fused: true
);
tiled!(
    /// In f32, 24 registers of sums, of 32.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx2,fma")]
    avx512, 12 x 32, fused: true
);

/// `M` rows of the product. `FUSED` says whether the target has a fused multiply-add; without one, `mul_add` would be a
/// library call.
#[inline(always)]
fn tile<T: Real, const N: usize, const M: usize, const STRIP: usize, const FUSED: bool>(
    a: &[T],
    a_stride: usize,
    depth: usize,
    b: &[T],
    c: &mut [T],
    c_stride: usize,
) {
    let inputs: [&[T]; M] = std::array::from_fn(|m| &a[m * a_stride..m * a_stride + depth]);
    for strip in (0..N).step_by(STRIP) {
        let mut sums = [[T::default(); STRIP]; M];
        for (p, b) in b.chunks_exact(N).take(depth).enumerate() {
            let b = &b[strip..strip + STRIP];
            for (sums, input) in sums.iter_mut().zip(&inputs) {
                let x = input[p];
                for (sum, &b) in sums.iter_mut().zip(b) {
                    *sum = if FUSED { x.fused_multiply_add(b, *sum) } else { x * b + *sum };
                }
            }
        }
        for (m, sums) in sums.iter().enumerate() {
            let c = &mut c[m * c_stride + strip..m * c_stride + strip + STRIP];
            c.iter_mut().zip(sums).for_each(|(c, &sum)| *c += sum);
        }
    }
}
