//! Neighbour predictors over a tile's symbols. They exist because sources recommend them; on trained weights every one
//! raises the entropy, so the encoder measures them and nearly always records [`Predictor::None`].
//!
//! A symbol is replaced by its difference from the prediction, modulo the alphabet, so the alphabet stays. Neighbours
//! outside the tile count as zero: tiles stay independent.

use super::geometry::{BlockShape, CHUNK, LANES};

/// How a symbol is predicted from its left (`l`), upper (`t`) and upper left (`d`) neighbours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Predictor {
    None = 0,
    /// l
    Left = 1,
    /// t
    Top = 2,
    /// ⌊(l + t) / 2⌋
    Average = 3,
    /// l + t − d
    Planar = 4,
}

impl Predictor {
    pub const ALL: [Self; 5] = [Self::None, Self::Left, Self::Top, Self::Average, Self::Planar];

    pub fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|&p| p as u8 == byte)
    }

    fn predict(self, left: i32, top: i32, diagonal: i32) -> i32 {
        match self {
            Self::None => 0,
            Self::Left => left,
            Self::Top => top,
            Self::Average => (left + top) >> 1,
            Self::Planar => left + top - diagonal,
        }
    }

    /// The residuals of a tile of `rows` × `cols` symbols (row-major, each below `alphabet`).
    pub fn residuals(self, symbols: &[u8], cols: usize, alphabet: usize) -> Vec<u8> {
        let at = |row: Option<usize>, col: Option<usize>| match (row, col) {
            (Some(row), Some(col)) => i32::from(symbols[row * cols + col]),
            _ => 0,
        };
        (0..symbols.len())
            .map(|index| {
                let (row, col) = (index / cols, index % cols);
                let (up, back) = (row.checked_sub(1), col.checked_sub(1));
                let guess = self.predict(at(Some(row), back), at(up, Some(col)), at(up, back));
                (i32::from(symbols[index]) - guess).rem_euclid(alphabet as i32) as u8
            })
            .collect()
    }
}

/// Undoes a predictor block by block, carrying the symbols at the seams.
pub struct Restorer {
    predictor: Predictor,
    alphabet: i32,
    first_row: usize,
    /// Last column of the block before, for each row of the tile; `left[0]` is the row above the tile.
    left: Vec<i32>,
    /// Last row of the group above, for each column of the chunk and the one before it.
    above: [i32; CHUNK + 1],
}

impl Restorer {
    pub fn new(predictor: Predictor, alphabet: usize, first_row: usize, rows: usize) -> Self {
        Self { predictor, alphabet: alphabet as i32, first_row, left: vec![0; rows + 1], above: [0; CHUNK + 1] }
    }

    /// Turns a block's residuals (`[column][lane]`) into symbols. Blocks come in stream order.
    pub fn restore(&mut self, shape: BlockShape, symbols: &mut [u8]) {
        let first = shape.row - self.first_row;
        if first == 0 {
            self.above = [0; CHUNK + 1];
        }
        // The column before the block, upper neighbour first.
        let mut previous = [0; LANES + 1];
        previous[0] = self.above[0];
        previous[1..=shape.lanes].copy_from_slice(&self.left[first + 1..=first + shape.lanes]);
        let mut next_above = [0; CHUNK + 1];
        next_above[0] = previous[shape.lanes];
        for col in 0..shape.cols {
            let mut current = [0; LANES + 1];
            current[0] = self.above[col + 1];
            for lane in 0..shape.lanes {
                let guess = self.predictor.predict(previous[lane + 1], current[lane], previous[lane]);
                let symbol = &mut symbols[col * LANES + lane];
                *symbol = (i32::from(*symbol) + guess).rem_euclid(self.alphabet) as u8;
                current[lane + 1] = i32::from(*symbol);
            }
            next_above[col + 1] = current[shape.lanes];
            previous = current;
        }
        self.left[first + 1..=first + shape.lanes].copy_from_slice(&previous[1..=shape.lanes]);
        self.above = next_above;
    }
}
