//! dx = g·W: the same tiles, read the other way.

use super::forward::{Input, check};
use super::kernel::{BlockProduct, Compute};
use crate::Result;
use crate::codec::{BLOCK, CHUNK, Geometry, LANES, PackedWeight, Scalar, Scales};
use crate::parallel::{DisjointSlice, Pool, map};

/// Tiles are summed in so many runs, whatever the threads, and the runs in order: the result does not depend on the
/// thread count, and the extra memory stays at 8 · 64 rows of x.
const RUNS: usize = 8;
/// Rows of g that share one decoding of a tile.
const BATCH: usize = 64;

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
    let tiles_per_run = geometry.tiles().div_ceil(RUNS).max(1);
    let runs = geometry.tiles().div_ceil(tiles_per_run);
    for start in (0..gradient.rows).step_by(BATCH) {
        let rows = (gradient.rows - start).min(BATCH);
        let batch = Input { values: &gradient.values[start * geometry.rows..(start + rows) * geometry.rows], rows };
        let sums = map(pool, runs, |run| {
            let tiles = run * tiles_per_run..((run + 1) * tiles_per_run).min(geometry.tiles());
            let mut sum = vec![T::default(); rows * geometry.cols];
            for tile in tiles {
                add_tile(weight, scales, batch, tile, &mut sum)?;
            }
            Ok(sum)
        })
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
        let out = &mut out[start * geometry.cols..(start + rows) * geometry.cols];
        let out = DisjointSlice::new(out);
        pool.for_ranges(rows * geometry.cols, &|range| {
            // SAFETY: a pool's ranges do not overlap.
            #[allow(unsafe_code)]
            let out = unsafe { out.range_mut(range.clone()) };
            for (out, index) in out.iter_mut().zip(range) {
                let total = sums.iter().fold(T::default(), |total, sum| total + sum[index]);
                *out = O::from_real(total);
            }
        });
    }
    Ok(())
}

/// Adds one tile's part of dx.
fn add_tile<T: Compute>(
    weight: &PackedWeight,
    scales: Scales<T>,
    gradient: Input<T>,
    tile: usize,
    sum: &mut [T],
) -> Result<()> {
    let geometry = weight.geometry();
    let group_cols = weight.header.scale_grid.group_cols(geometry);
    let mut decoder = weight.tile(tile)?;
    let mut points = Box::new([0.0; BLOCK]);
    let mut buffer = vec![T::default(); T::BUFFER];
    let mut transposed = Box::new([T::default(); BLOCK]);
    let mut scaled = vec![T::default(); gradient.rows * LANES];
    // A block's product goes through a full-width strip, for the last chunk of dx may be narrower.
    let mut strip = vec![T::default(); gradient.rows * CHUNK];
    while let Some(shape) = decoder.next_block() {
        decoder.points(&mut points);
        let block = T::of_points(&points, &mut buffer);
        for lane in 0..shape.lanes {
            for col in 0..CHUNK {
                transposed[lane * CHUNK + col] = block[col * LANES + lane];
            }
        }
        let group = shape.col / group_cols;
        for row in 0..gradient.rows {
            for lane in 0..shape.lanes {
                let w_row = shape.row + lane;
                let value = gradient.values[row * geometry.rows + w_row];
                let scale = scales.get(weight.header.scale_grid.index(w_row, group, geometry));
                scaled[row * LANES + lane] = scale.map_or(value, |scale| value * scale);
            }
        }
        strip.fill(T::default());
        let product = BlockProduct {
            a: &scaled,
            a_stride: LANES,
            depth: shape.lanes,
            b: &transposed[..],
            c: &mut strip,
            c_stride: CHUNK,
            rows: gradient.rows,
        };
        product.run::<CHUNK>();
        add_strip(geometry, shape.col, shape.cols, &strip, sum);
    }
    Ok(())
}

fn add_strip<T: Compute>(geometry: Geometry, col: usize, cols: usize, strip: &[T], sum: &mut [T]) {
    for (sum, strip) in sum.chunks_exact_mut(geometry.cols).zip(strip.chunks_exact(CHUNK)) {
        let pairs = sum[col..col + cols].iter_mut().zip(strip);
        pairs.for_each(|(sum, &value)| *sum += value);
    }
}
