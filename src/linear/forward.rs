//! y = x·Wᵀ + b and its derivative by the scales: both need x times the unscaled weight, tile by tile.

use std::ops::Range;

use super::kernel::BlockProduct;
use crate::codec::{BLOCK, LANES, PackedWeight, Real, Scalar, ScaleGrid};
use crate::parallel::{DisjointSlice, Pool};
use crate::{Error, Result};

/// Rows of x that share one decoding of a tile. Their sums take 4 · 256 bytes for each row of the tile in f32: beyond a few
/// rows that is the O(batch · K) part of the memory, like the converted input.
pub(super) const BATCH: usize = 256;

/// Row-major x: `rows` by the weight's columns.
#[derive(Clone, Copy)]
pub struct Input<'a, T> {
    pub values: &'a [T],
    pub rows: usize,
}

/// A thread's scratch. With the decoder's own 10 KB it is what "never materialised" costs.
struct Scratch<T> {
    block: Box<[T; BLOCK]>,
    /// x · r(q) under one scale, `[row of x][row of the tile]`.
    partial: Vec<T>,
}

/// x times the unscaled weight of one tile: calls `visit(rows of x, column group, products)` with `products[row][lane]`.
fn tile_products<T: Real>(
    weight: &PackedWeight,
    tile: usize,
    input: Input<T>,
    scratch: &mut Scratch<T>,
    mut visit: impl FnMut(Range<usize>, usize, &[T]),
) -> Result<()> {
    let geometry = weight.geometry();
    let first_row = geometry.rows_of(tile).start;
    let group_cols = weight.header.scale_grid.group_cols(geometry);
    let width = geometry.tile_rows;
    for start in (0..input.rows).step_by(BATCH) {
        let rows = start..(start + BATCH).min(input.rows);
        let partial = &mut scratch.partial[..rows.len() * width];
        partial.fill(T::default());
        let mut decoder = weight.tile(tile)?;
        let mut group = 0;
        for shape in geometry.blocks(tile) {
            if shape.col / group_cols != group {
                visit(rows.clone(), group, partial);
                partial.fill(T::default());
                group = shape.col / group_cols;
            }
            decoder.decode(shape);
            decoder.points(shape, &mut scratch.block);
            let product = BlockProduct {
                a: &input.values[rows.start * geometry.cols + shape.col..],
                a_stride: geometry.cols,
                depth: shape.cols,
                b: &scratch.block,
                c: &mut partial[shape.row - first_row..],
                c_stride: width,
                rows: rows.len(),
            };
            product.run::<LANES>();
        }
        visit(rows, group, partial);
    }
    Ok(())
}

/// Runs `body` with a scratch of its own for each range of tiles, and returns the first error.
fn for_tiles<T: Real>(
    weight: &PackedWeight,
    input: Input<T>,
    pool: &dyn Pool,
    body: impl Fn(usize, &mut Scratch<T>) -> Result<()> + Sync,
) -> Result<()> {
    let failure = std::sync::Mutex::new(None);
    pool.for_ranges(weight.geometry().tiles(), &|tiles| {
        let mut scratch = Scratch {
            block: Box::new([T::default(); BLOCK]),
            partial: vec![T::default(); BATCH.min(input.rows) * weight.geometry().tile_rows],
        };
        for tile in tiles {
            if let Err(error) = body(tile, &mut scratch) {
                *failure.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(error);
                return;
            }
        }
    });
    let failure = failure.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    failure.map_or(Ok(()), Err)
}

/// Checks that x has whole rows and the scales the grid's number.
pub(super) fn check<T>(
    weight: &PackedWeight,
    input: usize,
    rows: usize,
    width: usize,
    scales: Option<&[T]>,
) -> Result<()> {
    if input != rows * width {
        return Err(Error::argument("input elements", rows * width, input));
    }
    let count = weight.header.scale_grid.count(weight.geometry());
    match scales {
        Some(scales) if scales.len() != count => {
            Err(Error::argument("scales", format!("{count} elements"), scales.len()))
        }
        _ => Ok(()),
    }
}

/// Refuses the gradient of scales that a lossless weight does not have.
pub(super) fn check_has_scales(weight: &PackedWeight) -> Result<()> {
    match weight.header.scale_grid {
        ScaleGrid::None => Err(Error::argument("scales", "a quantised weight's", "a lossless weight, which has none")),
        _ => Ok(()),
    }
}

/// y = x·Wᵀ + b into `out` (rows of x by rows of W), summed in `T`. `scales` is empty for a lossless weight.
pub fn forward<T: Real, O: Scalar>(
    weight: &PackedWeight,
    scales: &[T],
    input: Input<T>,
    bias: Option<&[T]>,
    out: &mut [O],
    pool: &dyn Pool,
) -> Result<()> {
    let geometry = weight.geometry();
    let grid = weight.header.scale_grid;
    check(weight, input.values.len(), input.rows, geometry.cols, Some(scales))?;
    if out.len() != input.rows * geometry.rows {
        return Err(Error::argument("output elements", input.rows * geometry.rows, out.len()));
    }
    if let Some(bias) = bias.filter(|bias| bias.len() != geometry.rows) {
        return Err(Error::argument("bias elements", geometry.rows, bias.len()));
    }
    let out = DisjointSlice::new(out);
    // No column means no tile and no block: y is the bias, which the loop below would never write.
    if geometry.cols == 0 {
        // SAFETY: the only reference to the output.
        #[allow(unsafe_code)]
        let all = unsafe { out.range_mut(0..input.rows * geometry.rows) };
        for (index, out) in all.iter_mut().enumerate() {
            let bias = bias.map_or(0.0, |bias| bias[index % geometry.rows].to_f64());
            *out = O::from_f64(bias);
        }
        return Ok(());
    }
    for_tiles(weight, input, pool, |tile, scratch| {
        let tile_rows = geometry.rows_of(tile);
        let groups = geometry.cols.div_ceil(grid.group_cols(geometry));
        // Several groups add up here; a single one is final as it comes.
        let mut total = vec![T::default(); if groups > 1 { scratch.partial.len() } else { 0 }];
        tile_products(weight, tile, input, scratch, |rows, group, partial| {
            for (index, row) in rows.enumerate() {
                let line = index * geometry.tile_rows..index * geometry.tile_rows + tile_rows.len();
                let scaled = partial[line.clone()].iter().zip(tile_rows.clone()).map(|(&partial, w_row)| {
                    let scale = scales.get(grid.index(w_row, group, geometry));
                    scale.map_or(partial, |&scale| scale * partial)
                });
                let total = total.get_mut(line).unwrap_or_default();
                if group + 1 < groups {
                    // A batch begins with its first group.
                    if group == 0 {
                        total.fill(T::default());
                    }
                    total.iter_mut().zip(scaled).for_each(|(total, scaled)| *total += scaled);
                    continue;
                }
                let start = row * geometry.rows;
                // SAFETY: this tile alone writes its columns of y.
                #[allow(unsafe_code)]
                let out = unsafe { out.range_mut(start + tile_rows.start..start + tile_rows.end) };
                for (lane, (out, scaled)) in out.iter_mut().zip(scaled).enumerate() {
                    let sum = total.get(lane).map_or(scaled, |&total| total + scaled);
                    *out = O::from_real(bias.map_or(sum, |bias| sum + bias[tile_rows.start + lane]));
                }
            }
        })
    })
}

/// ds of each scale: Σ (gᵀx)·r(q) over the elements that share it, into `out` in the scales' order.
pub fn scale_gradient<T: Real>(
    weight: &PackedWeight,
    gradient: Input<T>,
    input: Input<T>,
    out: &mut [T],
    pool: &dyn Pool,
) -> Result<()> {
    let geometry = weight.geometry();
    let grid = weight.header.scale_grid;
    check_has_scales(weight)?;
    check(weight, input.values.len(), input.rows, geometry.cols, Some(out))?;
    check::<T>(weight, gradient.values.len(), input.rows, geometry.rows, None)?;
    let groups = geometry.cols.div_ceil(grid.group_cols(geometry).max(1));
    // A sum for each row of W and column group; a scale that spans rows adds them up below, in order.
    let mut sums = vec![T::default(); geometry.rows * groups];
    let cells = DisjointSlice::new(&mut sums);
    for_tiles(weight, input, pool, |tile, scratch| {
        let tile_rows = geometry.rows_of(tile);
        // SAFETY: a tile owns the sums of its rows.
        #[allow(unsafe_code)]
        let cells = unsafe { cells.range_mut(tile_rows.start * groups..tile_rows.end * groups) };
        tile_products(weight, tile, input, scratch, |rows, group, partial| {
            for (index, row) in rows.enumerate() {
                let partial = &partial[index * geometry.tile_rows..];
                let gradient = &gradient.values[row * geometry.rows..(row + 1) * geometry.rows];
                for (lane, w_row) in tile_rows.clone().enumerate() {
                    cells[lane * groups + group] += gradient[w_row] * partial[lane];
                }
            }
        })
    })?;
    out.fill(T::default());
    for row in 0..geometry.rows {
        for group in 0..groups {
            out[grid.index(row, group, geometry)] += sums[row * groups + group];
        }
    }
    Ok(())
}
