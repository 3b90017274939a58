//! A packed weight's form on the GPU: the window layout of `cuda/window.cuh`, made of the canonical form and turned back
//! into it, exactly.
//!
//! ```text
//! payload: base of the window, as four words of which three are zero
//!          tiles of 16 by 64, 1,536 bytes each, those of a stripe of rows side by side
//!          where each stripe's escapes begin and the last's end, padded to 16 bytes
//!          escapes: row in the stripe, bits, column
//! tables:  magic, then the header of the canonical form
//! ```
#![allow(unsafe_code)] // the layout is written once, in C++, for the host and the device

use std::ops::Range;

use half::bf16;

use super::params::{Escape, WindowWeight};
use crate::codec::{Codes, Dtype, Header, Layout, Packed, PackedWeight, Quantizer, Scales, encode_as};
use crate::parallel::{Pool, map};
use crate::{Error, Result};

/// The layout's number, after those of the codec.
pub const LAYOUT: i64 = 2;
/// Rows of a tile.
pub const STRIPE: usize = 16;
const TILE_COLS: usize = 64;
const TILE_BYTES: usize = STRIPE * TILE_COLS * 12 / 8;
const MAGIC: [u8; 4] = *b"INFG";
const HEAD_BYTES: usize = 16;
/// Exponents in the window, of all.
const WINDOW: usize = 16;
const EXPONENTS: usize = 256;
/// At least so many weights to one that is listed apart.
const ESCAPE_LIMIT: usize = 64;

unsafe extern "C" {
    fn infold_window_encode(
        weight: *const u16,
        rows: i32,
        cols: i32,
        base: u32,
        tiles: *mut u32,
        escapes: *mut Escape,
    ) -> usize;
    fn infold_window_decode(tiles: *const u32, rows: i32, cols: i32, base: u32, weight: *mut u16);
}

/// Where the parts of a payload lie, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct Parts {
    rows: usize,
    cols: usize,
}

impl Parts {
    pub fn new(rows: usize, cols: usize) -> Self {
        Self { rows, cols }
    }

    fn stripes(self) -> usize {
        self.rows.div_ceil(STRIPE)
    }

    fn stripe_bytes(self) -> usize {
        self.cols.div_ceil(TILE_COLS) * TILE_BYTES
    }

    fn tiles(self, stripe: usize) -> Range<usize> {
        let start = HEAD_BYTES + stripe * self.stripe_bytes();
        start..start + self.stripe_bytes()
    }

    fn starts(self) -> Range<usize> {
        let start = HEAD_BYTES + self.stripes() * self.stripe_bytes();
        start..start + 4 * (self.stripes() + 1)
    }

    fn escapes(self) -> usize {
        self.starts().end.next_multiple_of(HEAD_BYTES)
    }

    /// The least that a payload takes.
    pub fn bytes(self) -> usize {
        self.escapes()
    }

    /// The kernels' view of a payload at `payload`, which has at least [`Parts::bytes`].
    pub fn weight(self, payload: *const u8) -> WindowWeight {
        // Only the device reads through these.
        let at = |offset: usize| payload.wrapping_add(offset);
        WindowWeight {
            base: payload.cast(),
            tiles: at(self.tiles(0).start).cast(),
            escape_starts: at(self.starts().start).cast(),
            escapes: at(self.escapes()).cast(),
            rows: self.rows as i32,
            cols: self.cols as i32,
        }
    }
}

/// The header of the canonical form, if these are the tables of a device's form.
pub fn header(tables: &[u8]) -> Option<Result<Header>> {
    tables.strip_prefix(&MAGIC).map(Header::parse)
}

/// The rows of a weight's tile.
fn rows_of(weight: &PackedWeight, tile: usize) -> Result<Vec<bf16>> {
    let mut rows = vec![bf16::ZERO; weight.geometry().rows_of(tile).len() * weight.geometry().cols];
    weight.unpack_tile(tile, Scales::Real::<f32>(&[]), &mut rows)?;
    Ok(rows)
}

/// The first of the sixteen exponents that the most weights have, and how many have others.
fn choose_base(counts: &[u64; EXPONENTS]) -> (usize, u64) {
    let held = |base: usize| counts[base..base + WINDOW].iter().sum::<u64>();
    // Of equals the highest, so that what stands in for zeros is small only where it must be.
    let base = (0..=EXPONENTS - WINDOW).max_by_key(|&base| held(base)).unwrap_or(0);
    (base, counts.iter().sum::<u64>() - held(base))
}

/// A lossless bfloat16 weight's payload and tables in the window layout. Any other, and one that the window holds too little
/// of, is an error.
pub fn to_window(weight: &PackedWeight, pool: &dyn Pool) -> Result<(Vec<u8>, Vec<u8>)> {
    let header = &weight.header;
    if header.quantizer != Quantizer::Lossless || header.dtype != Dtype::Bf16 {
        let got = format!("{:?} {:?}", header.quantizer, header.dtype);
        return Err(Error::argument("layout window", "a lossless bfloat16 weight", got));
    }
    let geometry = weight.geometry();
    let per_tile = map(pool, geometry.tiles(), |tile| -> Result<_> {
        let mut counts = [0u64; EXPONENTS];
        for value in rows_of(weight, tile)? {
            counts[usize::from(value.to_bits() >> 7 & 0xff)] += 1;
        }
        Ok(counts)
    });
    let mut counts = [0; EXPONENTS];
    for tile in per_tile {
        counts.iter_mut().zip(tile?).for_each(|(total, count)| *total += count);
    }
    let (base, outside) = choose_base(&counts);
    if outside as usize > geometry.elements() / ESCAPE_LIMIT {
        let got = format!("{outside} of {}", geometry.elements());
        return Err(Error::argument("layout window", "at most one weight in 64 outside sixteen exponents", got));
    }

    let parts = Parts::new(geometry.rows, geometry.cols);
    let encoded = map(pool, geometry.tiles(), |tile| -> Result<_> {
        let rows = rows_of(weight, tile)?;
        Ok(rows.chunks(STRIPE * geometry.cols).map(|stripe| encode_stripe(stripe, parts, base)).collect::<Vec<_>>())
    });
    let encoded: Vec<_> = encoded.into_iter().collect::<Result<_>>()?;
    let mut payload = Vec::with_capacity(parts.bytes() + outside as usize * size_of::<Escape>());
    payload.extend((base as u32).to_le_bytes());
    payload.resize(HEAD_BYTES, 0);
    let stripes = || encoded.iter().flatten();
    stripes().for_each(|(tiles, _)| payload.extend(tiles.iter().flat_map(|word| word.to_le_bytes())));
    let mut count = 0u32;
    for (_, escapes) in stripes() {
        payload.extend(count.to_le_bytes());
        count += escapes.len() as u32;
    }
    payload.extend(count.to_le_bytes());
    payload.resize(parts.escapes(), 0);
    for escape in stripes().flat_map(|(_, escapes)| escapes) {
        payload.extend(escape.row.to_le_bytes());
        payload.extend(escape.bits.to_le_bytes());
        payload.extend(escape.col.to_le_bytes());
    }
    let canonical = header.origin.as_deref().unwrap_or(header);
    Ok((payload, [&MAGIC[..], &canonical.to_bytes()].concat()))
}

fn encode_stripe(rows: &[bf16], parts: Parts, base: usize) -> (Vec<u32>, Vec<Escape>) {
    let mut tiles = vec![0; parts.stripe_bytes() / size_of::<u32>()];
    let mut escapes = vec![Escape::default(); rows.len()];
    let height = rows.len() / parts.cols;
    // SAFETY: a stripe's rows, room for its tiles, and for an escape each weight.
    let count = unsafe {
        infold_window_encode(
            rows.as_ptr().cast(),
            height as i32,
            parts.cols as i32,
            base as u32,
            tiles.as_mut_ptr(),
            escapes.as_mut_ptr(),
        )
    };
    escapes.truncate(count);
    (tiles, escapes)
}

/// A weight's rows from the window layout.
struct Window<'a> {
    payload: &'a [u8],
    parts: Parts,
    base: u32,
}

impl<'a> Window<'a> {
    fn new(payload: &'a [u8], parts: Parts) -> Result<Self> {
        let corrupt = |what: &str, got: usize| Error::corrupt("window payload", what.to_owned(), got);
        if payload.len() < parts.bytes() {
            return Err(corrupt(&format!("at least {} bytes", parts.bytes()), payload.len()));
        }
        let window = Self { payload, parts, base: word(payload, 0) };
        let count = window.start(parts.stripes());
        if window.base as usize > EXPONENTS - WINDOW {
            return Err(corrupt("a base of at most 240", window.base as usize));
        }
        let ordered = (0..parts.stripes()).all(|stripe| window.start(stripe) <= window.start(stripe + 1));
        if !ordered || payload.len() != parts.escapes() + count * size_of::<Escape>() {
            return Err(corrupt("escapes as listed", payload.len()));
        }
        Ok(window)
    }

    fn start(&self, stripe: usize) -> usize {
        word(self.payload, self.parts.starts().start + 4 * stripe) as usize
    }

    fn stripe(&self, stripe: usize) -> Vec<u16> {
        let Parts { rows, cols } = self.parts;
        let height = (rows - stripe * STRIPE).min(STRIPE);
        let tiles = self.payload[self.parts.tiles(stripe)].as_chunks::<4>().0;
        let tiles: Vec<u32> = tiles.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect();
        let mut out = vec![0; height * cols];
        // SAFETY: a stripe's tiles, and room for its rows.
        unsafe { infold_window_decode(tiles.as_ptr(), height as i32, cols as i32, self.base, out.as_mut_ptr()) };
        for index in self.start(stripe)..self.start(stripe + 1) {
            let at = self.parts.escapes() + index * size_of::<Escape>();
            let (head, col) = (word(self.payload, at), word(self.payload, at + 4) as usize);
            let row = (head & 0xffff) as usize;
            // Only a damaged payload lists others.
            if row < height && col < cols {
                out[row * cols + col] = (head >> 16) as u16;
            }
        }
        out
    }
}

impl Codes for Window<'_> {
    fn rows(&self, rows: Range<usize>, out: &mut [u32]) {
        let cols = self.parts.cols;
        for stripe in rows.start / STRIPE..rows.end.div_ceil(STRIPE) {
            let first = stripe * STRIPE - rows.start;
            let values = self.stripe(stripe);
            let out = &mut out[first * cols..first * cols + values.len()];
            out.iter_mut().zip(values).for_each(|(out, value)| *out = u32::from(value));
        }
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let bytes = bytes[at..].first_chunk().copied().unwrap_or_default();
    u32::from_le_bytes(bytes)
}

/// The canonical form again.
pub fn from_window(payload: &[u8], header: Header, pool: &dyn Pool) -> Result<Packed> {
    let geometry = header.geometry;
    if header.layout != Layout::Compact || header.dtype != Dtype::Bf16 || header.quantizer != Quantizer::Lossless {
        return Err(Error::corrupt("window tables", "those of a compact, lossless bfloat16 weight", "others"));
    }
    let window = Window::new(payload, Parts::new(geometry.rows, geometry.cols))?;
    encode_as(header, &window, Vec::new(), pool)
}
