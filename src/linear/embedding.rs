//! Rows of a packed weight by index. A tile that holds several of the wanted rows is decoded once.

use super::forward::{check, check_has_scales};
use super::operand::Compute;
use crate::codec::{BLOCK, BlockShape, DenseBlock, LANES, PackedWeight, Scalar, Scales, TileDecoder};
use crate::parallel::{DisjointSlice, Pool, map};
use crate::{Error, Result};

/// The wanted rows as (row, place in `indices`), sorted, cut where the tile changes.
fn by_tile(weight: &PackedWeight, indices: &[i64]) -> Result<Vec<Vec<(usize, usize)>>> {
    let geometry = weight.geometry();
    let rows = if geometry.cols == 0 { 0 } else { geometry.rows };
    let mut wanted = Vec::with_capacity(indices.len());
    for (place, &index) in indices.iter().enumerate() {
        let row = usize::try_from(index).ok().filter(|&row| row < rows);
        let row = row.ok_or_else(|| Error::argument("embedding index", format!("0 to {}", rows as i64 - 1), index))?;
        wanted.push((row, place));
    }
    wanted.sort_unstable();
    let tile = |row: usize| row / geometry.tile_rows;
    Ok(wanted.chunk_by(|a, b| tile(a.0) == tile(b.0)).map(<[_]>::to_vec).collect())
}

/// Decodes one tile. For each block that holds wanted rows, `read` fills `block` once and `visit` is called with it for each
/// of them: (block, its shape, row, place).
fn visit_tile<B>(
    weight: &PackedWeight,
    wanted: &[(usize, usize)],
    mut read: impl FnMut(&TileDecoder, &mut B),
    mut block: B,
    mut visit: impl FnMut(&B, BlockShape, usize, usize),
) -> Result<()> {
    let tile = wanted[0].0 / weight.geometry().tile_rows;
    let mut decoder = weight.tile(tile)?;
    while let Some(shape) = decoder.next_block() {
        let inside = |row: usize| (shape.row..shape.row + shape.lanes).contains(&row);
        let mut here = wanted.iter().filter(|(row, _)| inside(*row)).peekable();
        if here.peek().is_some() {
            read(&decoder, &mut block);
        }
        here.for_each(|&(row, place)| visit(&block, shape, row, place));
    }
    Ok(())
}

/// `out[i] = W[indices[i]]`. A lossless weight whose dtype is `O` comes bit for bit.
pub fn embedding<T: Compute, O: Scalar>(
    weight: &PackedWeight,
    scales: Scales<T>,
    indices: &[i64],
    out: &mut [O],
    pool: &dyn Pool,
) -> Result<()> {
    let cols = weight.geometry().cols;
    weight.check_scales(scales)?;
    check("output elements", out.len(), indices.len(), cols)?;
    let tiles = by_tile(weight, indices)?;
    let out = DisjointSlice::new(out);
    let results = map(pool, tiles.len(), |index| {
        let read = |decoder: &TileDecoder, block: &mut DenseBlock<T, O>| block.read(decoder);
        visit_tile(weight, &tiles[index], read, DenseBlock::new(weight, scales), |block, shape, row, place| {
            let start = place * cols + shape.col;
            // SAFETY: a place is wanted once, so one tile alone writes it.
            #[allow(unsafe_code)]
            let out = unsafe { out.range_mut(start..start + shape.cols) };
            block.write_row(shape, row, out);
        })
    });
    results.into_iter().collect()
}

/// ds of each scale for an embedding: Σ g·r(q) over the rows looked up, into `out` in the scales' order.
pub fn embedding_scale_gradient<T: Compute>(
    weight: &PackedWeight,
    gradient: &[T],
    indices: &[i64],
    out: &mut [T],
    pool: &dyn Pool,
) -> Result<()> {
    let geometry = weight.geometry();
    let grid = weight.header.scale_grid;
    check_has_scales(weight)?;
    check("gradient elements", gradient.len(), indices.len(), geometry.cols)?;
    weight.check_scales(Scales::Real(out))?;
    let tiles = by_tile(weight, indices)?;
    let sums = map(pool, tiles.len(), |index| {
        let mut cells = Vec::new();
        let read = |decoder: &TileDecoder, points: &mut Box<[f32; BLOCK]>| decoder.points(points);
        visit_tile(weight, &tiles[index], read, Box::new([0.0; BLOCK]), |points, shape, row, place| {
            let group = shape.col / grid.group_cols(geometry);
            let gradient = &gradient[place * geometry.cols + shape.col..][..shape.cols];
            let products = gradient.iter().enumerate();
            let sum = products
                .fold(T::default(), |sum, (col, &g)| sum + g * T::from_f32(points[col * LANES + row - shape.row]));
            cells.push((grid.index(row, group, geometry), sum));
        })?;
        Ok(cells)
    });
    out.fill(T::default());
    for cells in sums.into_iter().collect::<Result<Vec<_>>>()? {
        cells.into_iter().for_each(|(scale, sum)| out[scale] += sum);
    }
    Ok(())
}
