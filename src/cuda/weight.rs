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

mod pair_code;
mod pairs;
mod raw;

use std::ops::Range;

use super::params::{Escape, Head, Weight};
use crate::codec::{Assembly, Codes, Dtype, Element, Header, Layout, Packed, PackedWeight, Quantizer, encode_as};
use crate::parallel::{Pool, map};
use crate::{Error, Result};

/// Rows of a tile.
pub const STRIPE: usize = 16;
pub const TILE_COLS: usize = 64;
const MAGIC: [u8; 4] = *b"INFG";
const TABLES_HEAD: usize = 12;
/// Parts of a payload begin at multiples of a load.
const ALIGN: usize = 16;
/// Exponents in the window, of all.
pub(super) const WINDOW: usize = 16;
pub(super) const EXPONENTS: usize = 256;
/// Levels this far out are counted; farther ones have no code.
pub(super) const FARTHEST: i32 = 4096;
pub(super) const LEVELS: usize = 2 * FARTHEST as usize + 1;
/// At least so many weights to one that has no code, and where a wider code has a better share, so many.
const LEAST_SHARE: u64 = 64;
const GOOD_SHARE: u64 = 512;

unsafe extern "C" {
    fn infold_window_encode(
        weights: *const u16,
        rows: i32,
        cols: i32,
        base: u32,
        tiles: *mut u32,
        apart: *mut u32,
    ) -> usize;
    fn infold_window_decode(tiles: *const u32, rows: i32, cols: i32, base: u32, weights: *mut u16);
    fn infold_codes_encode(bits: i32, weights: *const u8, rows: i32, cols: i32, tiles: *mut u32) -> bool;
    fn infold_codes_decode(bits: i32, tiles: *const u32, rows: i32, cols: i32, weights: *mut u8) -> bool;
}

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

/// The first of `width` neighbours in `counts` that together occur most, and how often others do.
fn best_run(counts: &[u64], width: usize) -> (usize, u64) {
    let held = |start: usize| counts[start..start + width].iter().sum::<u64>();
    let start = (0..=counts.len() - width).max_by_key(|&start| held(start)).unwrap_or(0);
    (start, counts.iter().sum::<u64>() - held(start))
}

/// How often each exponent occurs, or each level within [`FARTHEST`], and how often others do.
pub(super) struct Counts {
    pub held: Vec<u64>,
    pub outside: u64,
}

/// Refuses a weight of which no kind has a layout.
pub(super) fn check(header: &Header) -> Result<()> {
    let is_level = matches!(header.element, Element::Level { .. });
    if is_level || (header.quantizer == Quantizer::Lossless && header.dtype == Dtype::Bf16) {
        return Ok(());
    }
    let got = format!("lossless {:?}", header.dtype);
    Err(Error::argument("layout for CUDA", "lossless bfloat16, ecsq, int8 or int4", got))
}

fn count(weight: &PackedWeight, pool: &dyn Pool) -> Result<Counts> {
    let is_level = matches!(weight.header.element, Element::Level { .. });
    let size = if is_level { LEVELS } else { EXPONENTS };
    let place = |code: u32| {
        if is_level { code.wrapping_add(FARTHEST as u32) as usize } else { (code >> 7 & 0xff) as usize }
    };
    let per_tile = map(pool, weight.geometry().tiles(), |tile| -> Result<_> {
        let mut counts = vec![0u64; size + 1];
        for code in weight.tile_codes(tile)? {
            counts[place(code).min(size)] += 1;
        }
        Ok(counts)
    });
    let mut held = vec![0; size + 1];
    for counts in per_tile {
        held.iter_mut().zip(counts?).for_each(|(total, count)| *total += count);
    }
    let outside = held.pop().unwrap_or(0);
    Ok(Counts { held, outside })
}

/// The layout for a weight, and the base of its window or the level of its code 0.
pub(super) fn choose(header: &Header, counts: &Counts) -> Result<(Kind, i32)> {
    let elements = header.geometry.elements() as u64;
    let refused = |outside: u64, codes: &str| {
        let expected = format!("at most one weight in {LEAST_SHARE} outside {codes}");
        Err(Error::argument("layout for CUDA", expected, format!("{outside} of {elements}")))
    };
    if matches!(header.element, Element::Level { .. }) {
        let run = |kind: Kind| {
            let (start, others) = best_run(&counts.held, kind.values());
            (kind, start as i32 - FARTHEST, others + counts.outside)
        };
        let runs = Kind::CODES.map(run);
        let good = runs.iter().find(|(_, _, others)| *others <= elements / GOOD_SHARE);
        let &(kind, lo, others) = good.unwrap_or(&runs[2]);
        return if others > elements / LEAST_SHARE { refused(others, "256 levels") } else { Ok((kind, lo)) };
    }
    let (base, others) = best_run(&counts.held, WINDOW);
    if others > elements / LEAST_SHARE { refused(others, "sixteen exponents") } else { Ok((Kind::Window, base as i32)) }
}

/// What a payload begins with: its head, and the value of each code.
pub(super) fn front(kind: Kind, lo: i32, header: &Header, assembly: &Assembly) -> Vec<u8> {
    let base = if kind == Kind::Window { lo as u32 } else { 0 };
    let group_cols = header.scale_grid.group_cols(header.geometry).max(1) as u32;
    let values = (0..kind.values()).map(|code| assembly.point(lo.wrapping_add(code as i32) as u32).to_bits());
    [base, group_cols, 0, 0].into_iter().chain(values).flat_map(u32::to_le_bytes).collect()
}

/// Where the escapes of rows with so many begin and the last's end, padded.
pub(super) fn escape_starts(parts: Parts, counts: impl Iterator<Item = u32>) -> (Vec<u8>, u32) {
    let mut bytes = Vec::with_capacity(parts.escapes() - parts.start(0));
    let mut start = 0;
    for count in counts {
        bytes.extend(u32::to_le_bytes(start));
        start += count;
    }
    bytes.extend(start.to_le_bytes());
    bytes.resize(parts.escapes() - parts.start(0), 0);
    (bytes, start)
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
        Family::Fixed => {}
        Family::Pairs => return pairs::to_device(weight, pool),
        Family::Raw => return raw::to_device(weight, pool),
    }
    let (header, geometry) = (&weight.header, weight.geometry());
    check(header)?;
    let (kind, lo) = choose(header, &count(weight, pool)?)?;
    let parts = Parts::new(kind, geometry.rows, geometry.cols);
    let canonical = header.origin.as_deref().unwrap_or(header);
    let assembly = Assembly::new(canonical);
    let encoded = map(pool, geometry.tiles(), |tile| -> Result<_> {
        let codes = weight.tile_codes(tile)?;
        let stripes = codes.chunks(STRIPE * geometry.cols);
        Ok(stripes.map(|stripe| encode_stripe(stripe, parts, lo, &assembly)).collect::<Vec<_>>())
    });
    let encoded: Vec<_> = encoded.into_iter().collect::<Result<_>>()?;
    let stripes = || encoded.iter().flatten();

    let rows = || stripes().flat_map(|(_, rows)| rows);
    let mut payload = front(kind, lo, header, &assembly);
    payload.reserve(parts.bytes());
    stripes().flat_map(|(tiles, _)| tiles).for_each(|word| payload.extend(word.to_le_bytes()));
    payload.extend(escape_starts(parts, rows().map(|escapes| escapes.len() as u32)).0);
    for escape in rows().flatten() {
        payload.extend(escape.col.to_le_bytes());
        payload.extend(escape.value.to_bits().to_le_bytes());
    }
    Ok((payload, Tables { kind, lo, header: canonical.clone() }.to_bytes()))
}

/// The tiles of a stripe, and each row's escapes.
fn encode_stripe(codes: &[u32], parts: Parts, lo: i32, assembly: &Assembly) -> (Vec<u32>, Vec<Vec<Escape>>) {
    let Parts { kind, cols, .. } = parts;
    let height = codes.len() / cols;
    let mut tiles = vec![0; parts.stripe_bytes() / size_of::<u32>()];
    let mut escapes = vec![Vec::new(); height];
    let mut list = |row: usize, col: usize| {
        let value = assembly.point(codes[row * cols + col]);
        escapes[row].push(Escape { col: col as u32, value });
    };
    if kind == Kind::Window {
        let bits: Vec<u16> = codes.iter().map(|&code| code as u16).collect();
        let mut apart = vec![0u32; bits.len()];
        // SAFETY: a stripe's rows, room for its tiles, and for a place each weight.
        let count = unsafe {
            let (rows, cols) = (height as i32, cols as i32);
            infold_window_encode(bits.as_ptr(), rows, cols, lo as u32, tiles.as_mut_ptr(), apart.as_mut_ptr())
        };
        apart[..count].iter().for_each(|&place| list(place as usize % STRIPE, place as usize / STRIPE));
    } else {
        let code = |index: usize| {
            let code = (codes[index] as i32).wrapping_sub(lo) as u32 as usize;
            (code < kind.values()).then_some(code as u8)
        };
        let bytes: Vec<u8> = (0..codes.len())
            .map(|index| {
                code(index).unwrap_or_else(|| {
                    list(index / cols, index % cols);
                    0
                })
            })
            .collect();
        // SAFETY: as above.
        unsafe {
            infold_codes_encode(kind.bits() as i32, bytes.as_ptr(), height as i32, cols as i32, tiles.as_mut_ptr());
        }
    }
    escapes.iter_mut().for_each(|row| row.sort_by_key(|escape| escape.col));
    (tiles, escapes)
}

/// A device's payload, read on the host.
struct Reader<'a> {
    payload: &'a [u8],
    parts: Parts,
    tables: &'a Tables,
    assembly: Assembly,
    /// Where the layout is one.
    pairs: Option<pairs::Reading<'a>>,
}

impl<'a> Reader<'a> {
    fn new(payload: &'a [u8], tables: &'a Tables) -> Result<Self> {
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

fn word(bytes: &[u8], at: usize) -> u32 {
    let bytes = bytes[at..].first_chunk().copied().unwrap_or_default();
    u32::from_le_bytes(bytes)
}

/// The canonical form again, less its scales.
pub fn from_device(payload: &[u8], tables: &Tables, pool: &dyn Pool) -> Result<Packed> {
    if tables.kind.family() == Family::Raw {
        return raw::from_device(payload, &tables.header, pool);
    }
    let reader = Reader::new(payload, tables)?;
    encode_as(tables.header.clone(), &reader, Vec::new(), pool)
}
