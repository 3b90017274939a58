//! y = x·Wᵀ + b and its derivative by the scales: both need x times the unscaled weight, tile by tile.

use std::borrow::Cow;
use std::ops::Range;

use super::kernel::{BlockProduct, Compute};
use crate::codec::{BLOCK, CHUNK, LANES, MAX_TILE_ROWS, PackedWeight, Scalar, ScaleGrid, Scales};
use crate::parallel::{DisjointSlice, Pool};
use crate::{Error, Result};

/// Bytes of a thread's sums. With the block, the decoder's own 24 KB and the call's 16 KB table that makes 64 KB: what
/// "never materialised" costs.
const SUM_BYTES: usize = 16 << 10;

/// Row-major x: `rows` by the weight's columns.
#[derive(Clone, Copy)]
pub struct Input<'a, T> {
    pub values: &'a [T],
    pub rows: usize,
}

/// x chunk by chunk of 64 columns, all rows of a chunk together: `[chunk][row][column]`. A block's product then reads rows
/// that lie side by side; in x itself they are often a power of two apart and evict each other.
struct Chunked<'a, T: Compute> {
    values: Cow<'a, [T]>,
    rows: usize,
}

impl<'a, T: Compute> Chunked<'a, T> {
    fn new(input: Input<'a, T>, cols: usize, pool: &dyn Pool) -> Self {
        let rows = input.rows;
        if rows <= 1 {
            // One row is in this order already; its last chunk may be short.
            return Self { values: Cow::Borrowed(input.values), rows };
        }
        let mut values = vec![T::default(); cols.next_multiple_of(CHUNK) * rows];
        let chunks = DisjointSlice::new(&mut values);
        pool.for_ranges(cols.div_ceil(CHUNK), &|range| {
            for chunk in range {
                let size = rows * CHUNK;
                // SAFETY: a pool visits each chunk once.
                #[allow(unsafe_code)]
                let out = unsafe { chunks.range_mut(chunk * size..(chunk + 1) * size) };
                let columns = chunk * CHUNK..((chunk + 1) * CHUNK).min(cols);
                for (out, row) in out.chunks_exact_mut(CHUNK).zip(input.values.chunks_exact(cols)) {
                    out[..columns.len()].copy_from_slice(&row[columns.clone()]);
                }
            }
        });
        Self { values: Cow::Owned(values), rows }
    }

    /// The chunk that begins at column `col`, from row `row` on.
    fn at(&self, row: usize, col: usize) -> &[T] {
        &self.values[col * self.rows + row * CHUNK..]
    }
}

/// A thread's scratch.
struct Scratch<T> {
    points: Box<[f32; BLOCK]>,
    block: Vec<T>,
    /// x · r(q) under one scale, `[row of x][row of the tile]`.
    partial: Vec<T>,
    /// Where several scales lie side by side in a row: the scaled sum over those that are done.
    total: Vec<T>,
    /// Rows of x that share one decoding of a tile.
    batch: usize,
}

impl<T: Compute> Scratch<T> {
    fn new(weight: &PackedWeight, rows: usize) -> Self {
        let width = weight.geometry().tile_rows;
        let grouped = weight.groups() > 1;
        let row_bytes = width * size_of::<T>() * if grouped { 2 } else { 1 };
        let batch = (SUM_BYTES / row_bytes).min(rows);
        Self {
            points: Box::new([0.0; BLOCK]),
            block: vec![T::default(); T::BUFFER],
            partial: vec![T::default(); batch * width],
            total: vec![T::default(); if grouped { batch * width } else { 0 }],
            batch,
        }
    }
}

/// x times the unscaled weight of one tile: calls `visit(rows of x, column group, products, total)` with
/// `products[row][lane]`, and a total of the same shape that is the caller's.
fn tile_products<T: Compute>(
    weight: &PackedWeight,
    tile: usize,
    input: &Chunked<T>,
    scratch: &mut Scratch<T>,
    mut visit: impl FnMut(Range<usize>, usize, &[T], &mut [T]),
) -> Result<()> {
    let geometry = weight.geometry();
    let first_row = geometry.rows_of(tile).start;
    let group_cols = weight.header.scale_grid.group_cols(geometry);
    let width = geometry.tile_rows;
    for start in (0..input.rows).step_by(scratch.batch.max(1)) {
        let rows = start..(start + scratch.batch).min(input.rows);
        let partial = &mut scratch.partial[..rows.len() * width];
        partial.fill(T::default());
        let mut decoder = weight.tile(tile)?;
        let mut group = 0;
        while let Some(shape) = decoder.next_block() {
            if shape.col / group_cols != group {
                visit(rows.clone(), group, partial, &mut scratch.total);
                partial.fill(T::default());
                group = shape.col / group_cols;
            }
            let sums = &mut partial[shape.row - first_row..];
            let x = input.at(rows.start, shape.col);
            if rows.len() == 1 && T::multiply(&decoder, &x[..shape.cols], sums) {
                continue;
            }
            decoder.points(&mut scratch.points);
            let product = BlockProduct {
                a: x,
                a_stride: CHUNK,
                depth: shape.cols,
                b: T::of_points(&scratch.points, &mut scratch.block),
                c: sums,
                c_stride: width,
                rows: rows.len(),
            };
            product.run::<LANES>();
        }
        visit(rows, group, partial, &mut scratch.total);
    }
    Ok(())
}

/// Runs `body` with a scratch of its own for each range of tiles, and returns an error if there was one.
fn for_tiles<T: Compute>(
    weight: &PackedWeight,
    rows: usize,
    pool: &dyn Pool,
    body: impl Fn(usize, &mut Scratch<T>) -> Result<()> + Sync,
) -> Result<()> {
    let failure = std::sync::Mutex::new(None);
    pool.for_ranges(weight.geometry().tiles(), &|tiles| {
        let mut scratch = Scratch::new(weight, rows);
        for tile in tiles {
            if let Err(error) = body(tile, &mut scratch) {
                failure.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).get_or_insert(error);
                return;
            }
        }
    });
    let failure = failure.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    failure.map_or(Ok(()), Err)
}

/// Checks that a matrix has `rows` rows of `width`.
pub(super) fn check(what: &'static str, elements: usize, rows: usize, width: usize) -> Result<()> {
    if elements == rows * width { Ok(()) } else { Err(Error::argument(what, rows * width, elements)) }
}

/// Refuses the gradient of scales that a lossless weight does not have.
pub(super) fn check_has_scales(weight: &PackedWeight) -> Result<()> {
    match weight.header.scale_grid {
        ScaleGrid::None => Err(Error::argument("scales", "a quantised weight's", "a lossless weight, which has none")),
        _ => Ok(()),
    }
}

/// y = x·Wᵀ + b into `out` (rows of x by rows of W), summed in `T`. A lossless weight has no scales.
pub fn forward<T: Compute, O: Scalar>(
    weight: &PackedWeight,
    scales: Scales<T>,
    input: Input<T>,
    bias: Option<&[T]>,
    out: &mut [O],
    pool: &dyn Pool,
) -> Result<()> {
    let geometry = weight.geometry();
    let grid = weight.header.scale_grid;
    weight.check_scales(scales)?;
    check("input elements", input.values.len(), input.rows, geometry.cols)?;
    check("output elements", out.len(), input.rows, geometry.rows)?;
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
    let chunked = Chunked::new(input, geometry.cols, pool);
    for_tiles(weight, input.rows, pool, |tile, scratch| {
        let tile_rows = geometry.rows_of(tile);
        let groups = weight.groups();
        tile_products(weight, tile, &chunked, scratch, |rows, group, partial, total| {
            let mut factors = [T::from_f32(1.0); MAX_TILE_ROWS];
            for (factor, row) in factors.iter_mut().zip(tile_rows.clone()) {
                *factor = scales.get(grid.index(row, group, geometry)).unwrap_or(*factor);
            }
            for (index, row) in rows.enumerate() {
                let line = index * geometry.tile_rows..index * geometry.tile_rows + tile_rows.len();
                let scaled = partial[line.clone()].iter().zip(&factors).map(|(&partial, &factor)| factor * partial);
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
pub fn scale_gradient<T: Compute>(
    weight: &PackedWeight,
    gradient: Input<T>,
    input: Input<T>,
    out: &mut [T],
    pool: &dyn Pool,
) -> Result<()> {
    let geometry = weight.geometry();
    let grid = weight.header.scale_grid;
    check_has_scales(weight)?;
    check("input elements", input.values.len(), input.rows, geometry.cols)?;
    check("gradient elements", gradient.values.len(), input.rows, geometry.rows)?;
    weight.check_scales(Scales::Real(out))?;
    let groups = weight.groups();
    // A sum for each row of W and column group; a scale that spans rows adds them up below, in order.
    let mut sums = vec![T::default(); geometry.rows * groups];
    let cells = DisjointSlice::new(&mut sums);
    let chunked = Chunked::new(input, geometry.cols, pool);
    for_tiles(weight, input.rows, pool, |tile, scratch| {
        let tile_rows = geometry.rows_of(tile);
        // SAFETY: a tile owns the sums of its rows.
        #[allow(unsafe_code)]
        let cells = unsafe { cells.range_mut(tile_rows.start * groups..tile_rows.end * groups) };
        tile_products(weight, tile, &chunked, scratch, |rows, group, partial, _| {
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
