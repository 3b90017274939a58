//! Where a weight's elements lie in its tiles.
//!
//! A tile is 32 or 64 whole rows. Rows are lanes: a step is one column of up to 32 rows, so a multiply reads the
//! activation as a broadcast and never sums across lanes. A tile is read in blocks, chunk by chunk of 64 columns and,
//! within a chunk, group by group of 32 rows:
//!
//! ```text
//!            chunk 0   chunk 1
//! group 0  [ block 0 | block 2 | …
//! group 1  [ block 1 | block 3 | …
//! ```

use std::ops::Range;

/// Rows that are coded side by side: the interleaved lanes of the entropy coder.
pub const LANES: usize = 32;
/// Columns in a block.
pub const CHUNK: usize = 64;
/// Rows of the tallest tile.
pub const MAX_TILE_ROWS: usize = 2 * LANES;
/// Elements in a full block; a block's scratch is `[column][lane]`.
pub const BLOCK: usize = CHUNK * LANES;
/// The symbols of a block.
pub type Steps = [[u8; LANES]; CHUNK];

/// Fewer columns than this get tiles of two row groups, so that a tile's fixed cost (its coder states) stays below 0.03
/// bits a weight; more columns get one group, so that there are tiles enough for all threads.
const WIDE: usize = 1024;

/// The tiles of a `rows` × `cols` weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    pub rows: usize,
    pub cols: usize,
    /// Rows in a tile, 32 or 64; the last tile may have fewer.
    pub tile_rows: usize,
}

/// One block of a tile: `cols` columns from `col`, `lanes` rows from `row` (both counted from the weight's start).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockShape {
    pub row: usize,
    pub col: usize,
    pub lanes: usize,
    pub cols: usize,
}

impl Geometry {
    /// The geometry that the encoder chooses for a shape.
    pub fn new(rows: usize, cols: usize) -> Self {
        let tile_rows = if cols < WIDE { MAX_TILE_ROWS } else { LANES };
        Self { rows, cols, tile_rows }
    }

    pub fn elements(&self) -> usize {
        self.rows * self.cols
    }

    pub fn tiles(&self) -> usize {
        if self.cols == 0 { 0 } else { self.rows.div_ceil(self.tile_rows) }
    }

    /// The rows of tile `tile`.
    pub fn rows_of(&self, tile: usize) -> Range<usize> {
        let start = tile * self.tile_rows;
        start..(start + self.tile_rows).min(self.rows)
    }

    /// Lanes that carry a coder state in tile `tile`.
    pub fn lanes_of(&self, tile: usize) -> usize {
        self.rows_of(tile).len().min(LANES)
    }

    /// How many blocks tile `tile` has.
    pub fn block_count(&self, tile: usize) -> usize {
        self.cols.div_ceil(CHUNK) * self.rows_of(tile).len().div_ceil(LANES)
    }

    /// Block `index` of tile `tile`, in stream order.
    pub fn block(&self, tile: usize, index: usize) -> BlockShape {
        let rows = self.rows_of(tile);
        let groups = rows.len().div_ceil(LANES);
        self.block_at(&rows, index / groups * CHUNK, rows.start + index % groups * LANES)
    }

    fn block_at(&self, rows: &Range<usize>, col: usize, row: usize) -> BlockShape {
        BlockShape { row, col, lanes: (rows.end - row).min(LANES), cols: (self.cols - col).min(CHUNK) }
    }

    /// The first block of a tile of `rows`, None where there is no column.
    pub fn first_block(&self, rows: &Range<usize>) -> Option<BlockShape> {
        (self.cols > 0 && !rows.is_empty()).then(|| self.block_at(rows, 0, rows.start))
    }

    /// The block after `shape` in a tile of `rows`, None after the last.
    pub fn next_block(&self, rows: &Range<usize>, shape: BlockShape) -> Option<BlockShape> {
        let (same_chunk, next_chunk) = (shape.row + LANES, shape.col + CHUNK);
        if same_chunk < rows.end {
            Some(self.block_at(rows, shape.col, same_chunk))
        } else {
            (next_chunk < self.cols).then(|| self.block_at(rows, next_chunk, rows.start))
        }
    }

    /// The blocks of tile `tile`, in stream order.
    pub fn blocks(self, tile: usize) -> impl DoubleEndedIterator<Item = BlockShape> {
        (0..self.block_count(tile)).map(move |index| self.block(tile, index))
    }
}
