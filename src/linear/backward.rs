//! dx = g·W: the same tiles, read the other way.
//!
//! A decoded block lies `[column][row of W]`, so dxᵀ = Wᵀ·gᵀ takes it as it is: a block times a few rows of gᵀ, summed
//! into the block's columns of dxᵀ.

use super::forward::{Input, check};
use super::kernel::{BlockProduct, Compute};
use crate::Result;
use crate::codec::{BLOCK, LANES, MAX_TILE_ROWS, PackedWeight, Scalar, Scales};
use crate::parallel::{DisjointSlice, Pool, map};

/// Tiles are summed in so many runs, whatever the threads, and the runs in order: the result does not depend on the
/// thread count, and the extra memory stays at 8 · 64 rows of x.
const RUNS: usize = 8;
/// Rows of g that share one decoding of a tile, at most.
const BATCH: usize = 64;

/// Columns that are turned into rows of dx together: a cache line of float32.
const COLUMNS: usize = 16;

/// dx = g·W into `out` (rows of g by columns of W), summed in `T`. A lossless weight has no scales.
pub fn input_gradient<T: Compute, O: Scalar>(
    weight: &PackedWeight,
    scales: Scales<T>,
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
fn batch_gradient<T: Compute, O: Scalar, const N: usize>(
    weight: &PackedWeight,
    scales: Scales<T>,
    gradient: Input<T>,
    out: &mut [O],
    pool: &dyn Pool,
) -> Result<()> {
    let geometry = weight.geometry();
    let tiles_per_run = geometry.tiles().div_ceil(RUNS).max(1);
    let runs = geometry.tiles().div_ceil(tiles_per_run);
    let sums = map(pool, runs, |run| {
        let tiles = run * tiles_per_run..((run + 1) * tiles_per_run).min(geometry.tiles());
        let mut sum = vec![T::default(); N * geometry.cols];
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
        let mut totals = [[T::default(); N]; COLUMNS];
        for first in range.map(|index| index * COLUMNS) {
            let cols = first..(first + COLUMNS).min(geometry.cols);
            for (col, totals) in cols.clone().zip(&mut totals) {
                totals.fill(T::default());
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
struct Scratch<T> {
    points: Box<[f32; BLOCK]>,
    buffer: Vec<T>,
    /// gᵀ under a tile's scales, `[row of the tile][row of g]`.
    scaled: Vec<T>,
}

impl<T: Compute> Scratch<T> {
    fn new() -> Self {
        let scaled = vec![T::default(); MAX_TILE_ROWS * BATCH];
        Self { points: Box::new([0.0; BLOCK]), buffer: vec![T::default(); T::BUFFER], scaled }
    }
}

/// Adds one tile's part of dxᵀ, `[column][row of g, of N]`.
fn add_tile<T: Compute, const N: usize>(
    weight: &PackedWeight,
    scales: Scales<T>,
    gradient: Input<T>,
    tile: usize,
    scratch: &mut Scratch<T>,
    sum: &mut [T],
) -> Result<()> {
    let geometry = weight.geometry();
    let grid = weight.header.scale_grid;
    let group_cols = grid.group_cols(geometry);
    let tile_rows = geometry.rows_of(tile);
    let mut decoder = weight.tile(tile)?;
    let mut group = None;
    while let Some(shape) = decoder.next_block() {
        if group != Some(shape.col / group_cols) {
            let this = shape.col / group_cols;
            group = Some(this);
            for (row, scaled) in tile_rows.clone().zip(scratch.scaled.chunks_exact_mut(N)) {
                let scale = scales.get(grid.index(row, this, geometry)).unwrap_or(T::from_f32(1.0));
                for (index, scaled) in scaled.iter_mut().take(gradient.rows).enumerate() {
                    *scaled = gradient.values[index * geometry.rows + row] * scale;
                }
            }
        }
        decoder.points(&mut scratch.points);
        let product = BlockProduct {
            a: T::of_points(&scratch.points, &mut scratch.buffer),
            a_stride: LANES,
            depth: shape.lanes,
            b: &scratch.scaled[(shape.row - tile_rows.start) * N..],
            c: &mut sum[shape.col * N..],
            c_stride: N,
            rows: shape.cols,
        };
        product.run::<N>();
    }
    Ok(())
}
