//! Rows of a packed weight by index. A tile that holds several of the wanted rows is decoded once.

use super::forward::{check, check_has_scales};
use crate::codec::{BLOCK, BlockShape, LANES, PackedWeight, Real, Scalar, Scales, TileDecoder};
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

/// Decodes one tile and calls `visit(decoder, block, row, place)` for each wanted row that a block crosses.
fn visit_tile(
    weight: &PackedWeight,
    wanted: &[(usize, usize)],
    mut visit: impl FnMut(&TileDecoder, BlockShape, usize, usize),
) -> Result<()> {
    let geometry = weight.geometry();
    let tile = wanted[0].0 / geometry.tile_rows;
    let mut decoder = weight.tile(tile)?;
    for shape in geometry.blocks(tile) {
        decoder.decode(shape);
        for &(row, place) in wanted {
            if (shape.row..shape.row + shape.lanes).contains(&row) {
                visit(&decoder, shape, row, place);
            }
        }
    }
    Ok(())
}

/// `out[i] = W[indices[i]]`. A lossless weight whose dtype is `O` comes bit for bit.
pub fn embedding<T: Real, O: Scalar>(
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
        visit_tile(weight, &tiles[index], |decoder, shape, row, place| {
            let start = place * cols + shape.col;
            // SAFETY: a place is wanted once, so one tile alone writes it.
            #[allow(unsafe_code)]
            let out = unsafe { out.range_mut(start..start + shape.cols) };
            for (col, out) in out.iter_mut().enumerate() {
                *out = decoder.value(col, row - shape.row, row, shape.col + col, scales);
            }
        })
    });
    results.into_iter().collect()
}

/// ds of each scale for an embedding: Σ g·r(q) over the rows looked up, into `out` in the scales' order.
pub fn embedding_scale_gradient<T: Real>(
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
        let mut block = [T::default(); BLOCK];
        let mut current = None;
        visit_tile(weight, &tiles[index], |decoder, shape, row, place| {
            if current != Some(shape) {
                decoder.points(shape, &mut block);
                current = Some(shape);
            }
            let group = shape.col / grid.group_cols(geometry);
            let gradient = &gradient[place * geometry.cols + shape.col..][..shape.cols];
            let products = gradient.iter().enumerate();
            let sum = products.fold(T::default(), |sum, (col, &g)| sum + g * block[col * LANES + row - shape.row]);
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
