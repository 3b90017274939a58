//! dx = g·W: the same tiles, read the other way.
//!
//! A decoded block lies `[column][row of W]`, so dxᵀ = Wᵀ·gᵀ takes it as it is: a block times a few rows of gᵀ, summed
//! into the block's columns of dxᵀ.

use super::forward::{Input, check};
use super::operand::Operand;
use crate::Result;
use crate::codec::{CHUNK, LANES, MAX_TILE_ROWS, PackedWeight, Scalar, Scales, TILE_HEIGHT};
use crate::memory::AlignedVec;
use crate::parallel::{DisjointSlice, Pool, map};

/// Tiles are summed in so many runs, whatever the threads, and the runs in order: the result does not depend on the
/// thread count, and the extra memory stays at 8 · 64 rows of x.
const RUNS: usize = 8;
/// Rows of g that share one decoding of a tile, at most.
const BATCH: usize = 64;

/// Columns that are turned into rows of dx together: a cache line of float32.
const COLUMNS: usize = 16;

/// dx = g·W into `out` (rows of g by columns of W), summed in `T::Sum`. A lossless weight has no scales.
pub fn input_gradient<T: Operand, O: Scalar>(
    weight: &PackedWeight,
    scales: Scales<T::Sum>,
    gradient: Input<T>,
    out: &mut [O],
    pool: &dyn Pool,
) -> Result<()> {
    let geometry = weight.geometry();
    weight.check_scales(scales)?;
    check("gradient elements", gradient.values.len(), gradient.rows, geometry.rows)?;
    check("output elements", out.len(), gradient.rows, geometry.cols)?;
    for start in (0..gradient.rows).step_by(BATCH) {
        let rows = (gradient.rows - start).min(BATCH);
        let batch = Input { values: &gradient.values[start * geometry.rows..(start + rows) * geometry.rows], rows };
        let out = &mut out[start * geometry.cols..(start + rows) * geometry.cols];
        if rows <= BATCH / 2 {
            batch_gradient::<T, O, { BATCH / 2 }>(weight, scales, batch, out, pool)?;
        } else {
            batch_gradient::<T, O, BATCH>(weight, scales, batch, out, pool)?;
        }
    }
    Ok(())
}

/// [`input_gradient`] for at most `N` rows.
fn batch_gradient<T: Operand, O: Scalar, const N: usize>(
    weight: &PackedWeight,
    scales: Scales<T::Sum>,
    gradient: Input<T>,
    out: &mut [O],
    pool: &dyn Pool,
) -> Result<()> {
    let geometry = weight.geometry();
    let tiles_per_run = geometry.tiles().div_ceil(RUNS).max(1);
    let runs = geometry.tiles().div_ceil(tiles_per_run);
    let sums = map(pool, runs, |run| {
        let tiles = run * tiles_per_run..((run + 1) * tiles_per_run).min(geometry.tiles());
        let mut sum = AlignedVec::new(N * geometry.cols.next_multiple_of(CHUNK));
        let mut scratch = Scratch::new();
        for tile in tiles {
            add_tile::<T, N>(weight, scales, gradient, tile, &mut scratch, &mut sum)?;
        }
        Ok(sum)
    })
    .into_iter()
    .collect::<Result<Vec<_>>>()?;
    let out = DisjointSlice::new(out);
    pool.for_ranges(geometry.cols.div_ceil(COLUMNS), &|range| {
        let mut totals = [[T::Sum::default(); N]; COLUMNS];
        for first in range.map(|index| index * COLUMNS) {
            let cols = first..(first + COLUMNS).min(geometry.cols);
            for (col, totals) in cols.clone().zip(&mut totals) {
                totals.fill(T::Sum::default());
                for sum in &sums {
                    let pairs = totals.iter_mut().zip(&sum[col * N..(col + 1) * N]);
                    pairs.for_each(|(total, &part)| *total += part);
                }
            }
            for row in 0..gradient.rows {
                let start = row * geometry.cols;
                // SAFETY: these columns of the row are written here alone.
                #[allow(unsafe_code)]
                let out = unsafe { out.range_mut(start + cols.start..start + cols.end) };
                out.iter_mut().zip(&totals).for_each(|(out, totals)| *out = O::from_real(totals[row]));
            }
        }
    });
    Ok(())
}

/// A thread's scratch.
struct Scratch<T: Operand> {
    block: T::Scratch,
    /// A tile's part of gᵀ, `[row of the tile][row of g]`, and the same under the tile's scales.
    transposed: AlignedVec<T::Sum>,
    scaled: AlignedVec<T::Factor>,
}

impl<T: Operand> Scratch<T> {
    fn new() -> Self {
        Self {
            block: T::scratch(TILE_HEIGHT),
            transposed: AlignedVec::new(MAX_TILE_ROWS * BATCH),
            scaled: AlignedVec::new(MAX_TILE_ROWS / T::DEPTH * BATCH),
        }
    }
}

/// Adds one tile's part of dxᵀ, `[column][row of g, of N]`.
fn add_tile<T: Operand, const N: usize>(
    weight: &PackedWeight,
    scales: Scales<T::Sum>,
    gradient: Input<T>,
    tile: usize,
    scratch: &mut Scratch<T>,
    sum: &mut [T::Sum],
) -> Result<()> {
    let geometry = weight.geometry();
    let grid = weight.header.scale_grid;
    let group_cols = grid.group_cols(geometry);
    let tile_rows = geometry.rows_of(tile);
    // Rows past the last are zero in the weight, but must be numbers here.
    scratch.transposed.fill(T::Sum::default());
    for (row, transposed) in tile_rows.clone().zip(scratch.transposed.chunks_exact_mut(N)) {
        for (index, value) in transposed.iter_mut().take(gradient.rows).enumerate() {
            *value = gradient.values[index * geometry.rows + row].widen();
        }
    }
    let mut decoder = weight.tile(tile)?;
    let mut group = None;
    while let Some(shape) = decoder.next_block() {
        if group != Some(shape.col / group_cols) {
            let this = shape.col / group_cols;
            group = Some(this);
            let scale = |row| {
                let scale = scales.get(grid.index(row, this, geometry)).filter(|_| row < tile_rows.end);
                scale.unwrap_or(T::Sum::from_f32(1.0))
            };
            let rows = scratch.transposed.chunks_exact(T::DEPTH * N).zip(scratch.scaled.chunks_exact_mut(N));
            let all = tile_rows.start..tile_rows.start + tile_rows.len().next_multiple_of(LANES);
            for (row, (values, factors)) in all.step_by(T::DEPTH).zip(rows) {
                T::factors(values, [scale(row), scale(row + T::DEPTH - 1)], factors);
            }
        }
        let gradient = &scratch.scaled[(shape.row - tile_rows.start) / T::DEPTH * N..];
        T::multiply_transposed::<N>(&decoder, shape, gradient, &mut scratch.block, &mut sum[shape.col * N..]);
    }
    Ok(())
}
