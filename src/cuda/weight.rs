//! A packed weight's form on the GPU: a layout of `cuda/window.cuh`, `cuda/codes.cuh` or `cuda/pairs.cuh` (see [`pairs`]), made
//! of the canonical form and turned back into it, exactly.
//!
//! ```text
//! payload: head (base of the window or 0, columns under one scale, two zeros), a word each
//!          the value of each code, as f32; none in the window
//!          tiles of 16 by 64 weights, those of a stripe of rows side by side
//!          where each row's escapes begin and the last's end, padded to 16 bytes
//!          escapes: column, value before its scale as f32; by row and column
//! tables:  magic, the layout's number and the level of code 0 or the base (a word each), then the header of the canonical form
//! ```
#![allow(unsafe_code)] // the layouts are written once, in C++, for the host and the device

mod choose;
mod fixed;
mod pair_code;
mod pairs;
mod raw;
mod read;

use std::ops::Range;

use super::params::{Escape, Head, Weight};
use crate::codec::{Dtype, Element, Header, Layout, Packed, PackedWeight, Quantizer, encode_as};
use crate::parallel::Pool;
use crate::{Error, Result};
pub(super) use choose::{Counts, EXPONENTS, FARTHEST, LEVELS, WINDOW, choose};
use choose::{LEAST_SHARE, best_run, check, count};
pub(super) use fixed::{escape_starts, front};

/// Rows of a tile.
pub const STRIPE: usize = 16;
pub const TILE_COLS: usize = 64;
const MAGIC: [u8; 4] = *b"INFG";
const TABLES_HEAD: usize = 12;
/// Parts of a payload begin at multiples of a load.
const ALIGN: usize = 16;

/// A layout, by its number, which goes on from the codec's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Lossless bfloat16: signs, mantissas, and four bits of exponent.
    Window = 2,
    /// Levels, in codes of so many bits.
    Codes4 = 3,
    Codes5 = 4,
    Codes8 = 5,
    /// The pair prefix table: lossless bfloat16.
    Pairs = 6,
    /// The same of levels.
    PairsOfLevels = 7,
    /// Lossless weights as they are.
    RawBf16 = 8,
    RawF16 = 9,
    RawF32 = 10,
}

/// Layouts of which a weight has at most one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// A window or codes: as many bits for each weight.
    Fixed,
    /// A pair prefix table.
    Pairs,
    /// Floats as they are, for which there are no kernels.
    Raw,
}

impl Kind {
    const CODES: [Self; 3] = [Self::Codes4, Self::Codes5, Self::Codes8];

    /// Those that have kernels.
    pub const COMPUTED: [Self; 6] =
        [Self::Window, Self::Codes4, Self::Codes5, Self::Codes8, Self::Pairs, Self::PairsOfLevels];
    const RAW: [Self; 3] = [Self::RawBf16, Self::RawF16, Self::RawF32];

    pub fn from_number(number: i64) -> Option<Self> {
        Self::COMPUTED.into_iter().chain(Self::RAW).find(|&kind| kind as i64 == number)
    }

    pub fn family(self) -> Family {
        match self {
            Self::Window | Self::Codes4 | Self::Codes5 | Self::Codes8 => Family::Fixed,
            Self::Pairs | Self::PairsOfLevels => Family::Pairs,
            Self::RawBf16 | Self::RawF16 | Self::RawF32 => Family::Raw,
        }
    }

    /// Whether its values are the dense weight's own bits.
    pub fn is_lossless(self) -> bool {
        matches!(self, Self::Window | Self::Pairs) || self.family() == Family::Raw
    }

    /// Whether it is for a weight of this header.
    fn is_for(self, header: &Header) -> bool {
        let dtype = match self {
            Self::RawF16 => Dtype::F16,
            Self::RawF32 => Dtype::F32,
            _ => Dtype::Bf16,
        };
        if self.is_lossless() {
            return header.quantizer == Quantizer::Lossless && header.dtype == dtype;
        }
        matches!(header.element, Element::Level { .. })
    }

    /// Bits of a weight in its tile.
    pub(super) fn bits(self) -> usize {
        match self {
            Self::Window => 12,
            Self::Codes4 => 4,
            Self::Codes5 => 5,
            Self::Codes8 | Self::Pairs => 8,
            Self::PairsOfLevels => 0,
            Self::RawBf16 | Self::RawF16 => 16,
            Self::RawF32 => 32,
        }
    }

    /// Of a tile.
    pub fn tile_bytes(self) -> usize {
        STRIPE * TILE_COLS * self.bits() / 8
    }

    /// Words between the head and the tiles: the value of each code, or the pairs' table with its values.
    pub fn values(self) -> usize {
        match self {
            Self::Window => 0,
            Self::Codes4 | Self::Codes5 | Self::Codes8 => 1 << self.bits(),
            Self::Pairs => pair_code::ENTRIES,
            Self::PairsOfLevels => 3 * pair_code::ENTRIES,
            Self::RawBf16 | Self::RawF16 | Self::RawF32 => 0,
        }
    }
}

/// Where the parts of a payload lie, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct Parts {
    kind: Kind,
    rows: usize,
    cols: usize,
}

impl Parts {
    pub fn new(kind: Kind, rows: usize, cols: usize) -> Self {
        Self { kind, rows, cols }
    }

    pub(super) fn stripes(self) -> usize {
        self.rows.div_ceil(STRIPE)
    }

    fn stripe_bytes(self) -> usize {
        self.cols.div_ceil(TILE_COLS) * self.kind.tile_bytes()
    }

    fn values(self) -> Range<usize> {
        size_of::<Head>()..size_of::<Head>() + self.kind.values() * size_of::<f32>()
    }

    fn tiles(self, stripe: usize) -> Range<usize> {
        let start = self.values().end + stripe * self.stripe_bytes();
        start..start + self.stripe_bytes()
    }

    /// How many tiles there are.
    pub(super) fn tile_count(self) -> usize {
        self.stripes() * self.cols.div_ceil(TILE_COLS)
    }

    /// Where a row's escapes begin.
    pub(super) fn start(self, row: usize) -> usize {
        self.tiles(self.stripes()).start + row * size_of::<u32>()
    }

    /// The runs of pairs.
    fn directory(self) -> Range<usize> {
        let start = self.start(self.rows + 1);
        let words = match self.kind.family() {
            Family::Fixed | Family::Raw => 0,
            Family::Pairs => self.stripes() * pairs::directory_words(self.cols),
        };
        start..start + words * size_of::<u32>()
    }

    pub(super) fn escapes(self) -> usize {
        self.directory().end.next_multiple_of(ALIGN)
    }

    /// The least that a payload takes.
    pub fn bytes(self) -> usize {
        self.escapes()
    }

    /// What a payload with so many escapes takes.
    pub(super) fn bytes_with(self, escapes: usize) -> usize {
        self.escapes() + escapes * size_of::<Escape>()
    }

    /// The kernels' view of a payload at `payload`, which has at least [`Parts::bytes`], without scales, nor how long it is.
    pub fn weight(self, payload: *const u8) -> Weight {
        // Only the device reads through these.
        let at = |offset: usize| payload.wrapping_add(offset);
        Weight {
            head: payload.cast(),
            values: at(self.values().start).cast(),
            tiles: at(self.tiles(0).start).cast(),
            escape_starts: at(self.start(0)).cast(),
            escapes: at(self.escapes()).cast(),
            scales: std::ptr::null(),
            scales_are_bf16: 0,
            scale_stride: 0,
            rows: self.rows as i32,
            cols: self.cols as i32,
            payload_bytes: self.bytes() as u64,
        }
    }
}

/// What the tables of a device's form say.
#[derive(Debug, Clone)]
pub struct Tables {
    pub kind: Kind,
    /// The level of code 0, or the window's base.
    pub lo: i32,
    /// Of the canonical form.
    pub header: Header,
}

impl Tables {
    /// None if these are the tables of one of the codec's forms.
    pub fn parse(bytes: &[u8]) -> Option<Result<Self>> {
        bytes.starts_with(&MAGIC).then(|| {
            if bytes.len() < TABLES_HEAD {
                return Err(Error::corrupt("device tables", "a layout and a header", format!("{} bytes", bytes.len())));
            }
            let number = i64::from(word(bytes, 4));
            let kind = Kind::from_number(number).ok_or_else(|| Error::corrupt("device layout", "2 to 10", number))?;
            let header = Header::parse(&bytes[TABLES_HEAD..])?;
            if header.layout != Layout::Compact || !kind.is_for(&header) {
                return Err(Error::corrupt("device layout", "one for the weight's format", number));
            }
            Ok(Self { kind, lo: word(bytes, 8) as i32, header })
        })
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let words = [self.kind as u32, self.lo as u32].map(u32::to_le_bytes);
        [&MAGIC[..], words.as_flattened(), &self.header.to_bytes()].concat()
    }
}

/// A weight's payload and tables for the device: in a layout of fixed width, or else by pairs, or else as it is. One that
/// has no layout there is an error.
pub fn to_device(weight: &PackedWeight, pool: &dyn Pool) -> Result<(Vec<u8>, Vec<u8>)> {
    to_device_in(Family::Fixed, weight, pool).or_else(|error| {
        if !error.is_argument() {
            return Err(error);
        }
        pairs::to_device(weight, pool).or_else(|_| raw::to_device(weight, pool)).map_err(|_| error)
    })
}

/// The same in a layout of this family.
pub fn to_device_in(family: Family, weight: &PackedWeight, pool: &dyn Pool) -> Result<(Vec<u8>, Vec<u8>)> {
    match family {
        Family::Fixed => fixed::to_device(weight, pool),
        Family::Pairs => pairs::to_device(weight, pool),
        Family::Raw => raw::to_device(weight, pool),
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let bytes = bytes[at..].first_chunk().copied().unwrap_or_default();
    u32::from_le_bytes(bytes)
}

/// The canonical form again, less its scales.
pub fn from_device(payload: &[u8], tables: &Tables, pool: &dyn Pool) -> Result<Packed> {
    if tables.kind.family() == Family::Raw {
        return raw::from_device(payload, &tables.header, pool);
    }
    let reader = read::Reader::new(payload, tables)?;
    encode_as(tables.header.clone(), &reader, Vec::new(), pool)
}
