//! One plane of one tile: its stream of symbols, read block by block, and the values that are listed apart.

use std::ops::Range;
use std::slice::from_mut;

use super::alias::{AliasDecoder, AliasTable};
use super::format::{Header, Plane};
use super::geometry::{BLOCK, BlockShape, CHUNK, Geometry, LANES, Steps};
use super::points;
use super::predict::{Predictor, Restorer};
use super::rans::{self, SlotTable};
use super::symbols::{Coding, PALETTE};
use crate::{Error, Result};

/// Bytes of the length of a stream; the first one's also says whether escapes follow.
const HEAD_BYTES: usize = 4;
/// The bit of a plane's first length that says that escapes follow the streams.
const HAS_ESCAPES: u32 = 1 << 31;
/// The bits of an escape's position that hold the row in its tile.
const ESCAPE_ROW_BITS: u32 = 6;
/// Bytes of one escape: its position and its value.
pub const ESCAPE_BYTES: usize = 8;

/// Steps between the one that is read and the one that is fetched from memory: at a few ns a step, the latency of memory.
const PREFETCH_STEPS: usize = 128;

/// A coder of interleaved lanes, seen from its decoder.
pub trait LaneDecoder<'a>: Sized {
    type Table;
    /// Bytes of a lane's state, and of a word of the stream.
    const STATE_BYTES: usize;
    const WORD_BYTES: usize;

    /// The stream is at the front of `words`.
    fn new(states: &[u8], words: &'a [u8]) -> Self;

    /// The next symbol of each of `out`'s lanes (at most 32). Past the end of `words`, they read as zero.
    fn step(&mut self, table: &Self::Table, out: &mut [u8]);

    /// Decodes the first of `steps` of 32 lanes from each of several streams, as many as a vector unit can, and returns
    /// which one comes next. The streams are independent: the more, the less a step waits for the one before.
    fn steps<const N: usize>(
        table: &Self::Table,
        decoders: &mut [Self; N],
        steps: Range<usize>,
        out: &mut [Steps; N],
    ) -> usize;
}

/// The decoder's table of a plane's model.
pub enum Table {
    None,
    Palette([u8; PALETTE]),
    Rans(SlotTable),
    Alias(AliasTable),
}

impl Table {
    pub fn new(coding: &Coding) -> Self {
        match coding {
            Coding::Modelled(model) => Self::Rans(SlotTable::new(&model.frequencies)),
            Coding::Alias(model) => Self::Alias(AliasTable::new(&model.frequencies)),
            Coding::Palette { values, .. } => Self::Palette(*values),
            _ => Self::None,
        }
    }

    /// What a coder's slots stand for: frequency, offset among the symbol's slots, and symbol, in 12, 12 and 8 bits; none
    /// where there is no coder.
    pub fn slots(&self) -> Vec<u32> {
        match self {
            Self::Rans(table) => table.slots().to_vec(),
            Self::Alias(table) => table.slots(),
            _ => Vec::new(),
        }
    }

    fn palette(&self) -> Option<&[u8; PALETTE]> {
        match self {
            Self::Palette(values) => Some(values),
            _ => None,
        }
    }
}

/// The symbols of a block, `[column][lane of 32]`.
#[derive(Clone, Copy)]
pub enum Symbols<'a> {
    /// All zero.
    Zero,
    /// `width` bits each, least significant first; what follows the block is there as well. Eight bits: a byte each. What
    /// will be read soon lies `ahead` bytes on; 0 where everything is in a cache.
    Packed { width: u32, bytes: &'a [u8], ahead: usize },
}

impl Symbols<'_> {
    /// Bits of a symbol; 0 where all are zero.
    pub fn width(self) -> u32 {
        match self {
            Self::Zero => 0,
            Self::Packed { width, .. } => width,
        }
    }

    /// How many bytes on what will be read soon lies.
    pub fn ahead(self) -> usize {
        match self {
            Self::Zero => 0,
            Self::Packed { ahead, .. } => ahead,
        }
    }

    /// The symbol at `index` of a block of 32 lanes.
    pub fn at(self, index: usize) -> u8 {
        match self {
            Self::Zero => 0,
            Self::Packed { width, bytes, .. } => {
                let bit = index * width as usize;
                let word = u16::from_le_bytes([bytes[bit / 8], bytes.get(bit / 8 + 1).copied().unwrap_or(0)]);
                (word >> (bit % 8)) as u8 & (u8::MAX >> (8 - width))
            }
        }
    }
}

/// A plane of a tile, being read.
pub struct Stream<'a> {
    lo: i32,
    /// What symbols in the payload stand for; once they are bytes that can be changed, they are values.
    palette: Option<&'a [u8; PALETTE]>,
    source: Source<'a>,
    restorer: Option<Box<Restorer>>,
    /// Escapes not yet reached, in stream order.
    escapes: Escapes<'a>,
    /// Blocks decoded ahead, one for each stream.
    decoded: Vec<u8>,
    current: Current<'a>,
}

enum Source<'a> {
    Constant,
    /// Plain bits not yet reached, and the rest of the payload after them.
    Plain {
        width: u32,
        bytes: &'a [u8],
        /// Bytes of the plane left, and from its end to its beginning in the next tile, if that is as large.
        left: usize,
        gap: usize,
    },
    Rans {
        table: &'a SlotTable,
        decoders: Vec<rans::Decoder<'a>>,
    },
    Alias {
        table: &'a AliasTable,
        decoders: Vec<AliasDecoder<'a>>,
    },
}

/// Where the current block's symbols lie.
enum Current<'a> {
    Zero,
    Decoded(usize),
    Payload { width: u32, bytes: &'a [u8], ahead: usize },
}

impl<'a> Stream<'a> {
    /// The stream of plane `index` at the front of `bytes`, which it is taken from.
    pub fn open(bytes: &mut Bytes<'a>, header: &Header, index: usize, table: &'a Table, tile: usize) -> Result<Self> {
        let geometry = header.geometry;
        let Plane { coding, streams, .. } = &header.planes[index];
        let mut escapes = Escapes(&[]);
        let source = match (coding.plain_width(), table) {
            (Some(width), _) => {
                let size = plain_bytes(geometry, tile, width);
                let plain = bytes.stream(size)?;
                if coding.escapes() {
                    escapes = bytes.escapes()?;
                }
                Source::Plain { width, bytes: plain, left: size, gap: bytes.size.saturating_sub(size) }
            }
            (None, Table::Rans(table)) => {
                let decoders;
                (decoders, escapes) = bytes.coded(*streams, geometry.lanes_of(tile))?;
                Source::Rans { table, decoders }
            }
            (None, Table::Alias(table)) => {
                let decoders;
                (decoders, escapes) = bytes.coded(*streams, geometry.lanes_of(tile))?;
                Source::Alias { table, decoders }
            }
            _ => Source::Constant,
        };
        let restorer = (index == 0 && header.predictor != Predictor::None).then(|| {
            let rows = geometry.rows_of(tile);
            Box::new(Restorer::new(header.predictor, coding.values(), rows.start, rows.len()))
        });
        Ok(Self {
            lo: coding.lo(),
            palette: table.palette(),
            source,
            restorer,
            escapes,
            decoded: Vec::new(),
            current: Current::Zero,
        })
    }

    /// The value that symbol 0 stands for.
    pub fn lo(&self) -> i32 {
        self.lo
    }

    /// Goes on to block `block` of tile `tile`, the next one, whose shape is `shape`.
    #[inline]
    pub fn advance(&mut self, geometry: Geometry, tile: usize, block: usize, shape: BlockShape) {
        self.current = match &mut self.source {
            Source::Constant => Current::Zero,
            Source::Plain { width, bytes, left, gap } => {
                let packed = *bytes;
                let size = shape.cols * step_bytes(shape.lanes, *width);
                let ahead = PREFETCH_STEPS * step_bytes(LANES, *width);
                let ahead = if *left > ahead { ahead } else { ahead + *gap };
                *bytes = &packed[size..];
                *left -= size;
                Current::Payload { width: *width, bytes: packed, ahead }
            }
            Source::Rans { table, decoders } => {
                let streams = decoders.len();
                decode_ahead(*table, decoders, geometry, tile, block, &mut self.decoded);
                Current::Decoded(block % streams * BLOCK)
            }
            Source::Alias { table, decoders } => {
                let streams = decoders.len();
                decode_ahead(*table, decoders, geometry, tile, block, &mut self.decoded);
                Current::Decoded(block % streams * BLOCK)
            }
        };
        let short = match self.current {
            // Vector units read 32 bytes at every step.
            Current::Payload { width, bytes, .. } => bytes.len() < shape.cols * step_bytes(LANES, width) + LANES,
            _ => false,
        };
        if short || shape.lanes < LANES || self.restorer.is_some() {
            self.unpack(shape);
        }
        if let (Some(restorer), Current::Decoded(start)) = (&mut self.restorer, &self.current)
            && let Some(symbols) = self.decoded[*start..].first_chunk_mut::<BLOCK>()
        {
            restorer.restore(shape, symbols);
        }
    }

    /// Takes the next escape if it lies in the current block: its place there and its value.
    pub fn escape(&mut self, shape: BlockShape, first_row: usize) -> Option<(usize, i32)> {
        self.escapes.take_in(shape, first_row)
    }

    /// Whether the current block's symbols lie in the payload, where they cannot be changed at no cost.
    pub fn is_in_payload(&self) -> bool {
        matches!(self.current, Current::Payload { .. })
    }

    /// Changes a symbol of the current block.
    pub fn patch(&mut self, shape: BlockShape, index: usize, symbol: u8) {
        self.unpack(shape);
        if let Current::Decoded(start) = self.current {
            self.decoded[start + index] = symbol;
        }
    }

    /// The current block.
    pub fn symbols(&self) -> Symbols<'_> {
        match self.current {
            Current::Zero => Symbols::Zero,
            Current::Decoded(start) => Symbols::Packed { width: 8, bytes: &self.decoded[start..], ahead: 0 },
            Current::Payload { width, bytes, ahead } => Symbols::Packed { width, bytes, ahead },
        }
    }

    /// Writes the current block as bytes, so that a symbol's value is the byte more than `lo`.
    pub fn bytes(&self, shape: BlockShape, out: &mut [u8]) {
        match self.current {
            Current::Zero => out.fill(0),
            Current::Decoded(start) => out[..BLOCK].copy_from_slice(&self.decoded[start..start + BLOCK]),
            Current::Payload { width, bytes, .. } => unpack_steps(bytes, width, self.palette, shape, out),
        }
    }

    /// Makes the current block one of bytes that can be changed.
    fn unpack(&mut self, shape: BlockShape) {
        if let Current::Decoded(_) = self.current {
            return;
        }
        let mut decoded = std::mem::take(&mut self.decoded);
        decoded.resize(BLOCK, 0);
        self.bytes(shape, &mut decoded);
        self.decoded = decoded;
        self.current = Current::Decoded(0);
    }
}

/// Decodes the blocks from `block` on, one from each stream, if the first stream's turn has come.
fn decode_ahead<'a, D: LaneDecoder<'a>>(
    table: &D::Table,
    decoders: &mut [D],
    geometry: Geometry,
    tile: usize,
    block: usize,
    out: &mut Vec<u8>,
) {
    if !block.is_multiple_of(decoders.len()) {
        return;
    }
    out.resize(decoders.len() * BLOCK, 0);
    let out = out.as_chunks_mut().0.as_chunks_mut().0;
    let mut done = 0;
    if block + decoders.len() <= geometry.block_count(tile) {
        let shapes = (block..block + decoders.len()).map(|block| geometry.block(tile, block));
        let steps = shapes.map(|shape| if shape.lanes == LANES { shape.cols } else { 0 }).min().unwrap_or(0);
        done = match decoders.len() {
            4 => side_by_side::<D, 4>(table, decoders, 0..steps, out),
            2 => side_by_side::<D, 2>(table, decoders, 0..steps, out),
            _ => 0,
        };
    }
    for (index, (decoder, out)) in decoders.iter_mut().zip(out).enumerate() {
        if block + index >= geometry.block_count(tile) {
            break;
        }
        let shape = geometry.block(tile, block + index);
        let whole = if shape.lanes == LANES { shape.cols } else { done };
        let next = side_by_side::<D, 1>(table, from_mut(decoder), done..whole, from_mut(out));
        for step in &mut out[next..shape.cols] {
            decoder.step(table, &mut step[..shape.lanes]);
        }
    }
}

fn side_by_side<'a, D: LaneDecoder<'a>, const N: usize>(
    table: &D::Table,
    decoders: &mut [D],
    steps: Range<usize>,
    out: &mut [Steps],
) -> usize {
    match (decoders.first_chunk_mut(), out.first_chunk_mut()) {
        (Some(decoders), Some(out)) => D::steps::<N>(table, decoders, steps, out),
        _ => steps.start,
    }
}

/// Bytes of a step of plain bits.
pub fn step_bytes(lanes: usize, width: u32) -> usize {
    (lanes * width as usize).div_ceil(8)
}

/// Bytes of a tile's plain bits.
fn plain_bytes(geometry: Geometry, tile: usize, width: u32) -> usize {
    let rows = geometry.rows_of(tile).len();
    geometry.cols * (rows / LANES * step_bytes(LANES, width) + step_bytes(rows % LANES, width))
}

/// Unpacks a block's plain bits, or what they pick, to `[column][lane of 32]`.
fn unpack_steps(bytes: &[u8], width: u32, palette: Option<&[u8; PALETTE]>, shape: BlockShape, out: &mut [u8]) {
    let roomy = shape.lanes == LANES && bytes.len() >= shape.cols * step_bytes(LANES, width) + LANES;
    if roomy && points::unpack(Symbols::Packed { width, bytes, ahead: 0 }, palette, shape.cols, out).is_some() {
        return;
    }
    let size = step_bytes(shape.lanes, width);
    for (index, out) in out.chunks_exact_mut(LANES).take(shape.cols).enumerate() {
        let out = &mut out[..shape.lanes];
        unpack_step(&bytes[index * size..], width, out);
        if let Some(palette) = palette {
            out.iter_mut().for_each(|symbol| *symbol = palette[usize::from(*symbol) % PALETTE]);
        }
    }
}

/// A step of plain bits, least significant first. What follows it may be read and is ignored.
fn unpack_step(bytes: &[u8], width: u32, out: &mut [u8]) {
    if width == 8 {
        out.copy_from_slice(&bytes[..out.len()]);
        return;
    }
    let mask = (1u8 << width) - 1;
    // Eight symbols are `width` bytes, read as one word.
    for (group, symbols) in out.chunks_mut(8).enumerate() {
        let bytes = &bytes[group * width as usize..];
        let word = bytes.first_chunk().copied().unwrap_or_else(|| {
            let mut end = [0; 8];
            end[..bytes.len()].copy_from_slice(bytes);
            end
        });
        let word = u64::from_le_bytes(word);
        for (lane, symbol) in symbols.iter_mut().enumerate() {
            *symbol = (word >> (lane * width as usize)) as u8 & mask;
        }
    }
}

/// A step of plain bits, least significant first, padded to a byte: the inverse of [`unpack_step`].
pub fn pack_step(values: &[u8], width: u32, out: &mut Vec<u8>) {
    if width == 8 {
        out.extend_from_slice(values);
        return;
    }
    for group in values.chunks(8) {
        let lanes = group.iter().enumerate();
        let word = lanes.fold(0u64, |word, (lane, &value)| word | u64::from(value) << (lane * width as usize));
        out.extend_from_slice(&word.to_le_bytes()[..step_bytes(group.len(), width)]);
    }
}

/// A plane's streams as stored: their lengths, states and words, then the escapes as (column, row in the tile, value).
pub fn write_coded(
    out: &mut Vec<u8>,
    streams: &[(Vec<u8>, Vec<u8>)],
    word_bytes: usize,
    escapes: &[(usize, usize, i32)],
) {
    for (index, (_, words)) in streams.iter().enumerate() {
        let flag = if index == 0 && !escapes.is_empty() { HAS_ESCAPES } else { 0 };
        out.extend(((words.len() / word_bytes) as u32 | flag).to_le_bytes());
    }
    streams.iter().for_each(|(states, _)| out.extend(states));
    streams.iter().for_each(|(_, words)| out.extend(words));
    if !escapes.is_empty() {
        write_escapes(out, escapes);
    }
}

/// The number of escapes, and the escapes.
pub fn write_escapes(out: &mut Vec<u8>, escapes: &[(usize, usize, i32)]) {
    out.extend((escapes.len() as u32).to_le_bytes());
    for &(col, row_in_tile, value) in escapes {
        let position = (col as u32) << ESCAPE_ROW_BITS | row_in_tile as u32;
        out.extend(position.to_le_bytes());
        out.extend(value.to_le_bytes());
    }
}

/// Puts escapes, given as (column, row in the tile, value), in stream order.
pub fn sort_escapes(escapes: &mut [(usize, usize, i32)]) {
    escapes.sort_by_key(|&(col, row, _)| (col / CHUNK, row / LANES, col, row));
}

/// Unread bytes of a tile, from where the payload goes on to its end.
pub struct Bytes<'a> {
    /// What the tile has, and has left.
    size: usize,
    left: usize,
    payload: &'a [u8],
}

impl<'a> Bytes<'a> {
    /// The first `size` bytes of `payload`.
    pub fn new(payload: &'a [u8], size: usize) -> Self {
        Self { size, left: size.min(payload.len()), payload }
    }

    /// Takes the next `size` bytes and returns the payload from them on. A reader may run beyond its stream: then it finds
    /// other numbers there, in the same way whatever the machine.
    fn stream(&mut self, size: usize) -> Result<&'a [u8]> {
        if size > self.left {
            return Err(Error::corrupt("payload", format!("{size} more bytes in the tile"), self.left));
        }
        let from = self.payload;
        self.payload = &from[size..];
        self.left -= size;
        Ok(from)
    }

    fn take(&mut self, size: usize) -> Result<&'a [u8]> {
        Ok(&self.stream(size)?[..size])
    }

    fn word(&mut self) -> Result<u32> {
        let bytes = self.take(HEAD_BYTES)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    fn escapes(&mut self) -> Result<Escapes<'a>> {
        let count = self.word()? as usize;
        Ok(Escapes(self.take(count.saturating_mul(ESCAPE_BYTES))?))
    }

    /// A plane's streams and its escapes.
    fn coded<D: LaneDecoder<'a>>(&mut self, streams: usize, lanes: usize) -> Result<(Vec<D>, Escapes<'a>)> {
        let heads = (0..streams).map(|_| self.word()).collect::<Result<Vec<_>>>()?;
        let states = self.take(streams * D::STATE_BYTES * lanes)?;
        let mut states = states.chunks_exact(D::STATE_BYTES * lanes);
        let decoders = heads.iter().map(|head| {
            let words = self.stream((head & !HAS_ESCAPES) as usize * D::WORD_BYTES)?;
            Ok(D::new(states.next().unwrap_or_default(), words))
        });
        let decoders = decoders.collect::<Result<_>>()?;
        let escapes = if heads[0] & HAS_ESCAPES != 0 { self.escapes()? } else { Escapes(&[]) };
        Ok((decoders, escapes))
    }
}

/// Values listed apart, in stream order.
struct Escapes<'a>(&'a [u8]);

impl Escapes<'_> {
    /// Takes the next one if it lies in this block: its place there and its value.
    fn take_in(&mut self, shape: BlockShape, first_row: usize) -> Option<(usize, i32)> {
        let (escape, rest) = self.0.split_first_chunk::<ESCAPE_BYTES>()?;
        let [p0, p1, p2, p3, v0, v1, v2, v3] = *escape;
        let position = u32::from_le_bytes([p0, p1, p2, p3]);
        let row = first_row + (position & ((1 << ESCAPE_ROW_BITS) - 1)) as usize;
        let col = (position >> ESCAPE_ROW_BITS) as usize;
        let inside = |at: usize, start: usize, len: usize| at.checked_sub(start).filter(|&i| i < len);
        let lane = inside(row, shape.row, shape.lanes)?;
        let col = inside(col, shape.col, shape.cols)?;
        self.0 = rest;
        Some((col * LANES + lane, i32::from_le_bytes([v0, v1, v2, v3])))
    }
}
