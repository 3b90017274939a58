//! The dtypes of activations and gradients, and how each meets a decoded block: float32 and float64 in a product over lanes,
//! bfloat16 in tiles.

use half::bf16;

use super::kernel::BlockProduct;
#[cfg(target_arch = "x86_64")]
use crate::codec::Tiles;
use crate::codec::{
    BLOCK, BlockShape, CHUNK, Chunks, Dtype, Isa, LANES, PackedWeight, Real, TILE_HEIGHT, TileDecoder, bf16_pair,
    per_isa,
};
use crate::memory::Aligned;

/// A dtype of activations and gradients, and how they meet a decoded block.
pub trait Operand: Copy + Default + Send + Sync {
    /// What products are summed in.
    type Sum: Real;
    /// What a thread needs to decode a block for it.
    type Scratch;
    /// What a decoded block is made of, and of how many.
    type Value: Copy + Default;
    const VALUES: usize;
    /// Values that lie one below the other in a gradient's transpose, [`Operand::DEPTH`] of them.
    type Factor: Copy + Default + Send + Sync;
    const DEPTH: usize;

    fn scratch(height: usize) -> Self::Scratch;

    /// Rows of x that are multiplied together, where there are `rows`; x is padded to a multiple of it.
    fn height(rows: usize) -> usize;

    fn widen(self) -> Self::Sum;

    /// Rows of a gradient's transpose under their scales: [`Operand::DEPTH`] of them, one after the other.
    fn factors(rows: &[Self::Sum], scales: [Self::Sum; 2], out: &mut [Self::Factor]);

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

    /// Writes the decoder's current block down.
    fn decode(decoder: &TileDecoder, out: &mut [Self::Value]);

    /// Adds `rows` rows of x times the first `depth` columns of blocks that lie side by side, each of [`Operand::VALUES`], to
    /// `sums`, whose rows begin every `stride` values.
    fn multiply_decoded(
        scratch: &Self::Scratch,
        blocks: &[Self::Value],
        depth: usize,
        x: Chunks<Self>,
        rows: usize,
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
    /// The decoder's current block, `[column][lane]`.
    fn points(decoder: &TileDecoder, out: &mut [Self; BLOCK]);
    /// Adds one row of activations times the current block to `sums` without writing the block down; see
    /// [`TileDecoder::multiply`].
    fn multiply(decoder: &TileDecoder, x: &[Self], sums: &mut [Self]) -> bool;
}

impl<T: Compute> Operand for T {
    type Sum = T;
    /// A decoded block.
    type Scratch = Box<Aligned<[T; BLOCK]>>;
    type Value = T;
    const VALUES: usize = BLOCK;
    type Factor = T;
    const DEPTH: usize = 1;

    fn scratch(_: usize) -> Self::Scratch {
        Box::new(Aligned([T::default(); BLOCK]))
    }

    fn height(_: usize) -> usize {
        1
    }

    fn widen(self) -> T {
        self
    }

    fn factors(rows: &[T], [scale, _]: [T; 2], out: &mut [T]) {
        scale_row(rows, scale, out);
    }

    fn multiply_block(
        decoder: &TileDecoder,
        shape: BlockShape,
        _: bool,
        x: Chunks<T>,
        rows: usize,
        scratch: &mut Self::Scratch,
        sums: &mut [T],
        stride: usize,
    ) {
        let x = x.at(0, shape.col);
        if rows == 1 && T::multiply(decoder, &x.values[..shape.cols], sums) {
            return;
        }
        T::points(decoder, scratch);
        Self::multiply_decoded(scratch, &scratch[..], shape.cols, x, rows, sums, stride);
    }

    fn decode(decoder: &TileDecoder, out: &mut [T]) {
        if let Some(out) = out.first_chunk_mut() {
            T::points(decoder, out);
        }
    }

    fn multiply_decoded(
        _: &Self::Scratch,
        blocks: &[T],
        depth: usize,
        x: Chunks<T>,
        rows: usize,
        sums: &mut [T],
        stride: usize,
    ) {
        for (col, b) in (0..depth).step_by(CHUNK).zip(blocks.chunks(BLOCK)) {
            let (a, depth) = (x.at(0, col).values, (depth - col).min(CHUNK));
            BlockProduct { a, a_stride: CHUNK, depth, b, c: sums, c_stride: stride, rows }.run::<LANES>();
        }
    }

    fn multiply_transposed<const N: usize>(
        decoder: &TileDecoder,
        shape: BlockShape,
        gradient: &[T],
        scratch: &mut Self::Scratch,
        sums: &mut [T],
    ) {
        T::points(decoder, scratch);
        let a = &scratch[..];
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
const TOGETHER: usize = 2;
/// With fewer rows of x, products wait for each other; one block at a time overlaps with the decoding of the next.
const ROWS_TOGETHER: usize = 64;

/// A thread's decoded blocks in bf16, and what multiplies tiles of them.
pub struct Pairs {
    pairs: Box<Aligned<[[u32; BLOCK / 2]; TOGETHER]>>,
    /// How many of the blocks wait for their product.
    kept: usize,
    /// A block's columns, `[column][lane]`, where a backward asked for them.
    columns: Option<Box<Aligned<[bf16; BLOCK]>>>,
    product: PairProduct,
}

/// The product of bf16 matrices, one of them in pairs of rows, on this thread.
struct PairProduct {
    #[cfg(target_arch = "x86_64")]
    tiles: Option<Tiles>,
}

impl PairProduct {
    /// For tiles of `height` rows, where the CPU has them.
    #[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
    fn new(height: usize) -> Self {
        Self {
            // SAFETY: `Isa::get` names only what the CPU has, and a thread has one scratch at a time.
            #[cfg(target_arch = "x86_64")]
            #[allow(unsafe_code)]
            tiles: (Isa::get() == Isa::Amx).then(|| unsafe { Tiles::new(height) }),
        }
    }

    /// Adds the first `depth` columns of a times rows of b, which come in pairs every `b_row` values, to `rows` rows of c,
    /// which begin every `c_row` values. a and c have rows for whole tiles.
    #[allow(clippy::too_many_arguments)] // three matrices
    fn add(&self, a: Chunks<bf16>, b: &[u32], b_row: usize, depth: usize, c: &mut [f32], c_row: usize, rows: usize) {
        #[cfg(target_arch = "x86_64")]
        if let Some(tiles) = &self.tiles {
            return tiles.multiply_add(a, b, b_row, depth, c, c_row, rows);
        }
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
}

impl Operand for bf16 {
    type Sum = f32;
    type Scratch = Pairs;
    type Value = u32;
    const VALUES: usize = BLOCK / 2;
    type Factor = u32;
    const DEPTH: usize = 2;

    fn scratch(height: usize) -> Pairs {
        let pairs = Box::new(Aligned([[0; BLOCK / 2]; TOGETHER]));
        Pairs { pairs, kept: 0, columns: None, product: PairProduct::new(height) }
    }

    fn height(rows: usize) -> usize {
        // As even as it can be.
        rows.div_ceil(rows.div_ceil(TILE_HEIGHT).max(1)).max(1)
    }

    fn widen(self) -> f32 {
        self.to_f32()
    }

    fn factors(rows: &[f32], scales: [f32; 2], out: &mut [u32]) {
        pair_rows(rows, scales, out);
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
        Self::multiply_decoded(scratch, scratch.pairs.as_flattened(), depth, x, rows, sums, stride);
    }

    fn decode(decoder: &TileDecoder, out: &mut [u32]) {
        if let Some(out) = out.first_chunk_mut() {
            decoder.pairs(out);
        }
    }

    fn multiply_decoded(
        scratch: &Pairs,
        blocks: &[u32],
        depth: usize,
        x: Chunks<bf16>,
        rows: usize,
        sums: &mut [f32],
        stride: usize,
    ) {
        scratch.product.add(x, blocks, LANES, depth, sums, stride, rows);
    }

    fn multiply_transposed<const N: usize>(
        decoder: &TileDecoder,
        shape: BlockShape,
        gradient: &[u32],
        scratch: &mut Pairs,
        sums: &mut [f32],
    ) {
        decoder.pairs(&mut scratch.pairs[0]);
        let columns = scratch.columns.get_or_insert_with(|| Box::new(Aligned([bf16::ZERO; BLOCK])));
        split_pairs(&scratch.pairs[0], columns);
        let a = Chunks { values: &columns[..], row: LANES, chunk: 0 };
        for first in (0..N).step_by(LANES) {
            let (b, c) = (&gradient[first..], &mut sums[first..]);
            scratch.product.add(a, b, N, LANES, c, N, shape.cols);
        }
    }
}

per_isa! {
    fn scale_row<T: Real>(row: &[T], scale: T, out: &mut [T]) {
        out.iter_mut().zip(row).for_each(|(out, &value)| *out = value * scale);
    }
}

per_isa! {
    /// Two rows under their scales as pairs of bf16.
    fn pair_rows(rows: &[f32], scales: [f32; 2], out: &mut [u32]) {
        let (first, second) = rows.split_at(out.len());
        for (out, (&first, &second)) in out.iter_mut().zip(first.iter().zip(second)) {
            *out = bf16_pair(first * scales[0], second * scales[1]);
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
    fn points(decoder: &TileDecoder, out: &mut [f32; BLOCK]) {
        decoder.points(out);
    }

    fn multiply(decoder: &TileDecoder, x: &[f32], sums: &mut [f32]) -> bool {
        sums.first_chunk_mut::<LANES>().is_some_and(|sums| decoder.multiply(x, sums))
    }
}

impl Compute for f64 {
    fn points(decoder: &TileDecoder, out: &mut [f64; BLOCK]) {
        let mut points = [0.0; BLOCK];
        decoder.points(&mut points);
        out.iter_mut().zip(points).for_each(|(to, point)| *to = f64::from(point));
    }

    fn multiply(_: &TileDecoder, _: &[f64], _: &mut [f64]) -> bool {
        false
    }
}
