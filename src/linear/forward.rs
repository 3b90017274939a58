//! y = x·Wᵀ + b and its derivative by the scales: both need x times the unscaled weight, tile by tile.

use std::ops::Range;

use super::operand::{Compute, Operand};
use crate::codec::{CHUNK, Chunks, LANES, MAX_TILE_ROWS, PackedWeight, Real, Scalar, ScaleGrid, Scales, per_isa};
use crate::memory::AlignedVec;
use crate::parallel::{DisjointSlice, Pool};
use crate::{Error, Result};

/// Bytes of a thread's sums. With the block, the decoder's own 24 KB and the call's 16 KB table that makes 64 KB: what
/// "never materialised" costs.
const SUM_BYTES: usize = 16 << 10;
/// Where more rows of x than those sums are for would decode a tile again, it is kept decoded if it takes no more than this.
const KEPT_BYTES: usize = 64 << 10;

/// Row-major x: `rows` by the weight's columns.
#[derive(Clone, Copy)]
pub struct Input<'a, T> {
    pub values: &'a [T],
    pub rows: usize,
}

/// x chunk by chunk of 64 columns, all rows of a chunk together: `[chunk][row][column]`, zero where there is none. A block's
/// product then reads rows that lie side by side; in x itself they are often a power of two apart and evict each other.
struct Chunked<'a, T: Operand> {
    /// Where x itself is not in this order.
    copy: Option<AlignedVec<T>>,
    x: &'a [T],
    /// Rows of x, and with the zeros that make tiles whole.
    present: usize,
    rows: usize,
    height: usize,
}

impl<'a, T: Operand> Chunked<'a, T> {
    fn new(input: Input<'a, T>, cols: usize, pool: &dyn Pool) -> Self {
        let height = T::height(input.rows);
        let rows = input.rows.next_multiple_of(height);
        if rows <= 1 && cols.is_multiple_of(CHUNK) {
            // In this order already.
            return Self { copy: None, x: input.values, present: rows, rows, height };
        }
        let mut copy = AlignedVec::new(cols.next_multiple_of(CHUNK) * rows);
        let chunks = DisjointSlice::new(&mut copy);
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
        Self { copy: Some(copy), x: input.values, present: input.rows, rows, height }
    }

    fn chunks(&self) -> Chunks<'_, T> {
        let values = self.copy.as_deref().unwrap_or(self.x);
        Chunks { values, row: CHUNK, chunk: self.rows * CHUNK }
    }
}

/// A thread's scratch.
struct Scratch<T: Operand> {
    block: T::Scratch,
    /// x · r(q) under one scale, `[row of x][row of the tile]`.
    partial: AlignedVec<T::Sum>,
    /// Where several scales lie side by side in a row: the scaled sum over those that are done.
    total: AlignedVec<T::Sum>,
    /// Rows of x that have sums at a time.
    batch: usize,
    /// A tile's decoded blocks, `[group of rows][chunk of columns]`; empty where rows of x do not all share them.
    kept: AlignedVec<T::Value>,
}

impl<T: Operand> Scratch<T> {
    fn new(weight: &PackedWeight, input: &Chunked<T>) -> Self {
        let width = weight.geometry().tile_rows;
        let grouped = weight.groups() > 1;
        let row_bytes = width * size_of::<T::Sum>() * if grouped { 2 } else { 1 };
        let batch = (SUM_BYTES / row_bytes / input.height * input.height).min(input.rows);
        let tile = width / LANES * weight.geometry().cols.div_ceil(CHUNK) * T::VALUES;
        let keeps = batch < input.rows && !grouped && tile * size_of::<T::Value>() <= KEPT_BYTES;
        Self {
            kept: AlignedVec::new(if keeps { tile } else { 0 }),
            block: T::scratch(input.height),
            partial: AlignedVec::new(batch * width),
            total: AlignedVec::new(if grouped { batch * width } else { 0 }),
            batch,
        }
    }
}

/// x times the unscaled weight, tile by tile: calls `visit(tile, rows of x, column group, products, total)` with
/// `products[row][lane]`, and a total of the same shape that is the caller's.
fn tile_products<T: Operand>(
    weight: &PackedWeight,
    input: Input<T>,
    pool: &dyn Pool,
    visit: impl Fn(usize, Range<usize>, usize, &mut [T::Sum], &mut [T::Sum]) + Sync,
) -> Result<()> {
    let input = Chunked::new(input, weight.geometry().cols, pool);
    let failure = std::sync::Mutex::new(None);
    pool.for_ranges(weight.geometry().tiles(), &|tiles| {
        let mut scratch = Scratch::new(weight, &input);
        let mut run = || -> Result<()> {
            if !scratch.kept.is_empty() {
                return tiles
                    .clone()
                    .try_for_each(|tile| kept_tile_product(weight, tile, &input, &mut scratch, &visit));
            }
            // All tiles with the same rows of x, which then stay in the cache.
            for rows in batches(input.rows, scratch.batch) {
                for tile in tiles.clone() {
                    tile_product(weight, tile, &input, rows.clone(), &mut scratch, &visit)?;
                }
            }
            Ok(())
        };
        if let Err(error) = run() {
            failure.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).get_or_insert(error);
        }
    });
    let failure = failure.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    failure.map_or(Ok(()), Err)
}

/// Runs of at most `size` of `rows` rows.
fn batches(rows: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rows).step_by(size.max(1)).map(move |start| start..(start + size).min(rows))
}

/// [`tile_products`] for one tile and all rows of x, the tile decoded once.
fn kept_tile_product<T: Operand>(
    weight: &PackedWeight,
    tile: usize,
    input: &Chunked<T>,
    scratch: &mut Scratch<T>,
    visit: &impl Fn(usize, Range<usize>, usize, &mut [T::Sum], &mut [T::Sum]),
) -> Result<()> {
    let geometry = weight.geometry();
    let first_row = geometry.rows_of(tile).start;
    let Scratch { block, partial, total, batch, kept } = scratch;
    let across = geometry.cols.div_ceil(CHUNK) * T::VALUES;
    let mut decoder = weight.tile(tile)?;
    while let Some(shape) = decoder.next_block() {
        let at = (shape.row - first_row) / LANES * across + shape.col / CHUNK * T::VALUES;
        T::decode(&decoder, &mut kept[at..at + T::VALUES]);
    }
    let groups = geometry.rows_of(tile).len().div_ceil(LANES);
    for rows in batches(input.rows, *batch) {
        let partial = &mut partial[..rows.len() * geometry.tile_rows];
        partial.fill(T::Sum::default());
        for (group, blocks) in kept.chunks(across).take(groups).enumerate() {
            let (x, sums) = (input.chunks().at(rows.start, 0), &mut partial[group * LANES..]);
            T::multiply_decoded(block, blocks, geometry.cols, x, rows.len(), sums, geometry.tile_rows);
        }
        visit(tile, rows.start..rows.end.min(input.present), 0, partial, total);
    }
    Ok(())
}

/// [`tile_products`] for one tile and some rows of x.
fn tile_product<T: Operand>(
    weight: &PackedWeight,
    tile: usize,
    input: &Chunked<T>,
    rows: Range<usize>,
    scratch: &mut Scratch<T>,
    visit: &impl Fn(usize, Range<usize>, usize, &mut [T::Sum], &mut [T::Sum]),
) -> Result<()> {
    let geometry = weight.geometry();
    let first_row = geometry.rows_of(tile).start;
    let group_cols = weight.header.scale_grid.group_cols(geometry);
    let width = geometry.tile_rows;
    let present = rows.start..rows.end.min(input.present);
    let partial = &mut scratch.partial[..rows.len() * width];
    partial.fill(T::Sum::default());
    let x = input.chunks().at(rows.start, 0);
    let mut decoder = weight.tile(tile)?;
    let mut group = 0;
    while let Some(shape) = decoder.next_block() {
        if shape.col / group_cols != group {
            visit(tile, present.clone(), group, partial, &mut scratch.total);
            partial.fill(T::Sum::default());
            group = shape.col / group_cols;
        }
        let end = shape.col + shape.cols;
        let more = geometry.tile_rows == LANES && end < geometry.cols && end / group_cols == group;
        let sums = &mut partial[shape.row - first_row..];
        T::multiply_block(&decoder, shape, more, x, rows.len(), &mut scratch.block, sums, width);
    }
    visit(tile, present, group, partial, &mut scratch.total);
    Ok(())
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

/// y = x·Wᵀ + b into `out` (rows of x by rows of W), summed in `T::Sum`. A lossless weight has no scales.
pub fn forward<T: Operand, O: Scalar>(
    weight: &PackedWeight,
    scales: Scales<T::Sum>,
    input: Input<T>,
    bias: Option<&[T::Sum]>,
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
    let groups = weight.groups();
    tile_products(weight, input, pool, |tile, rows, group, partial, total| {
        let tile_rows = geometry.rows_of(tile);
        let mut factors = [T::Sum::from_f32(1.0); MAX_TILE_ROWS];
        for (factor, row) in factors.iter_mut().zip(tile_rows.clone()) {
            *factor = scales.get(grid.index(row, group, geometry)).unwrap_or(*factor);
        }
        let factors = &factors[..geometry.tile_rows];
        let sums = if groups > 1 {
            // A batch begins with its first group.
            if group == 0 {
                total.fill(T::Sum::default());
            }
            add_scaled(total, partial, factors);
            if group + 1 < groups {
                return;
            }
            total
        } else {
            scale(partial, factors);
            partial
        };
        for (row, sums) in rows.zip(sums.chunks_exact(geometry.tile_rows)) {
            let start = row * geometry.rows;
            // SAFETY: this tile alone writes its columns of y.
            #[allow(unsafe_code)]
            let out = unsafe { out.range_mut(start + tile_rows.start..start + tile_rows.end) };
            finish(&sums[..tile_rows.len()], bias.map(|bias| &bias[tile_rows.clone()]), out);
        }
    })
}

per_isa! {
    /// Each row of sums by the factors.
    fn scale<T: Real>(sums: &mut [T], factors: &[T]) {
        for sums in sums.chunks_exact_mut(factors.len()) {
            sums.iter_mut().zip(factors).for_each(|(sum, &factor)| *sum = factor * *sum);
        }
    }
}

per_isa! {
    /// To each row of totals that of sums by the factors.
    fn add_scaled<T: Real>(totals: &mut [T], sums: &[T], factors: &[T]) {
        for (totals, sums) in totals.chunks_exact_mut(factors.len()).zip(sums.chunks_exact(factors.len())) {
            let scaled = sums.iter().zip(factors).map(|(&sum, &factor)| factor * sum);
            totals.iter_mut().zip(scaled).for_each(|(total, scaled)| *total += scaled);
        }
    }
}

per_isa! {
    /// Writes sums, with the bias where there is one, in the output's dtype.
    fn finish<T: Real, O: Scalar>(sums: &[T], bias: Option<&[T]>, out: &mut [O]) {
        match bias {
            Some(bias) => {
                let sums = sums.iter().zip(bias).map(|(&sum, &bias)| sum + bias);
                out.iter_mut().zip(sums).for_each(|(out, sum)| *out = O::from_real(sum));
            }
            None => out.iter_mut().zip(sums).for_each(|(out, &sum)| *out = O::from_real(sum)),
        }
    }
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
    tile_products(weight, input, pool, |tile, rows, group, partial, _| {
        let tile_rows = geometry.rows_of(tile);
        // SAFETY: a tile owns the sums of its rows.
        #[allow(unsafe_code)]
        let cells = unsafe { cells.range_mut(tile_rows.start * groups..tile_rows.end * groups) };
        for (index, row) in rows.enumerate() {
            let partial = &partial[index * geometry.tile_rows..];
            let gradient = &gradient.values[row * geometry.rows..(row + 1) * geometry.rows];
            for (lane, w_row) in tile_rows.clone().enumerate() {
                cells[lane * groups + group] += gradient[w_row] * partial[lane];
            }
        }
    })?;
    out.fill(T::default());
    for row in 0..geometry.rows {
        for group in 0..groups {
            out[grid.index(row, group, geometry)] += sums[row * groups + group];
        }
    }
    Ok(())
}
