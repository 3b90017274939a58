//! The codes of a weight from its form on the device, of any layout that has tiles.

use std::ops::Range;

use super::{EXPONENTS, Family, Kind, Parts, STRIPE, Tables, WINDOW, pairs, word};
use crate::codec::{Assembly, Codes};
use crate::cuda::params::Escape;
use crate::{Error, Result};

unsafe extern "C" {
    fn infold_window_decode(tiles: *const u32, rows: i32, cols: i32, base: u32, weights: *mut u16);
    fn infold_codes_decode(bits: i32, tiles: *const u32, rows: i32, cols: i32, weights: *mut u8) -> bool;
}

/// A device's payload, read on the host.
pub struct Reader<'a> {
    payload: &'a [u8],
    parts: Parts,
    tables: &'a Tables,
    assembly: Assembly,
    /// Where the layout is one.
    pairs: Option<pairs::Reading<'a>>,
}

impl<'a> Reader<'a> {
    pub fn new(payload: &'a [u8], tables: &'a Tables) -> Result<Self> {
        let corrupt = |expected: String, got: usize| Err(Error::corrupt("device payload", expected, got));
        let geometry = tables.header.geometry;
        let parts = Parts::new(tables.kind, geometry.rows, geometry.cols);
        if payload.len() < parts.bytes() {
            return corrupt(format!("at least {} bytes", parts.bytes()), payload.len());
        }
        let mut reader = Self { payload, parts, tables, assembly: Assembly::new(&tables.header), pairs: None };
        if tables.kind == Kind::Window && !(0..=(EXPONENTS - WINDOW) as i32).contains(&tables.lo) {
            return corrupt("a base of at most 240".into(), tables.lo as usize);
        }
        let ordered = (0..parts.rows).all(|row| reader.start(row) <= reader.start(row + 1));
        let escapes = reader.start(parts.rows);
        let fixed = parts.bytes_with(escapes);
        let expected = match tables.kind.family() {
            Family::Fixed | Family::Raw => Some(fixed),
            Family::Pairs => pairs::bytes(payload, parts, escapes),
        };
        if !ordered || Some(payload.len()) != expected {
            return corrupt(format!("{} bytes", expected.unwrap_or(fixed)), payload.len());
        }
        if tables.kind.family() == Family::Pairs {
            reader.pairs = Some(pairs::Reading::new(payload, parts, escapes, |value| reader.code(value)));
        }
        Ok(reader)
    }

    fn start(&self, row: usize) -> usize {
        word(self.payload, self.parts.start(row)) as usize
    }

    /// The codes of a stripe's rows.
    fn stripe(&self, stripe: usize) -> Vec<u32> {
        let Parts { kind, rows, cols } = self.parts;
        let lo = self.tables.lo;
        let first = stripe * STRIPE;
        let height = (rows - first).min(STRIPE);
        let tiles = pairs::numbers(&self.payload[self.parts.tiles(stripe)]);
        let mut out: Vec<u32> = if let Some(pairs) = &self.pairs {
            pairs.stripe(stripe)
        } else if kind == Kind::Window {
            let mut bits = vec![0u16; height * cols];
            // SAFETY: a stripe's tiles, and room for its rows.
            unsafe {
                infold_window_decode(tiles.as_ptr(), height as i32, cols as i32, lo as u32, bits.as_mut_ptr());
            }
            bits.into_iter().map(u32::from).collect()
        } else {
            let mut codes = vec![0u8; height * cols];
            // SAFETY: as above.
            unsafe {
                let bits = kind.bits() as i32;
                infold_codes_decode(bits, tiles.as_ptr(), height as i32, cols as i32, codes.as_mut_ptr());
            }
            codes.into_iter().map(|code| lo.wrapping_add(i32::from(code)) as u32).collect()
        };
        for row in 0..height {
            for index in self.start(first + row)..self.start(first + row + 1) {
                let at = self.parts.escapes() + index * size_of::<Escape>();
                let (col, value) = (word(self.payload, at) as usize, word(self.payload, at + 4));
                // Only a damaged payload lists others.
                if col < cols {
                    out[row * cols + col] = self.code(f32::from_bits(value));
                }
            }
        }
        out
    }

    /// The code of a value that is listed apart.
    fn code(&self, value: f32) -> u32 {
        if self.tables.kind.is_lossless() {
            return value.to_bits() >> 16;
        }
        // A level's value is within half a step of it.
        let near = value.round() as i32;
        let levels = [near, near.saturating_sub(1), near.saturating_add(1)].map(|level| level as u32);
        levels.into_iter().find(|&level| self.assembly.point(level) == value).unwrap_or(near as u32)
    }
}

impl Codes for Reader<'_> {
    fn rows(&self, rows: Range<usize>, out: &mut [u32]) {
        let cols = self.parts.cols;
        for stripe in rows.start / STRIPE..rows.end.div_ceil(STRIPE) {
            let first = stripe * STRIPE - rows.start;
            let codes = self.stripe(stripe);
            out[first * cols..first * cols + codes.len()].copy_from_slice(&codes);
        }
    }
}
