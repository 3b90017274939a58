//! Reading a packed weight: any tile, block by block. This is the portable decoder, the oracle for every faster one.

use std::ops::Range;

use super::arch::per_isa;
use super::element::{Dtype, Element, Real, Scalar, Scales, bits_to_f32};
use super::format::{Header, TILE_ALIGN};
use super::geometry::{BLOCK, BlockShape, Geometry, LANES};
use super::predict::{Predictor, Restorer};
use super::rans::{Decoder, SlotTable};
use super::symbols::{Coding, ESCAPE_BYTES};
use crate::parallel::{DisjointSlice, Pool, map};
use crate::{Error, Result};

/// Bytes before a modelled plane's states: its word count, and whether escapes follow.
const STREAM_HEAD: usize = 4;
/// The bit of a stream's head that says that escapes follow the words.
const HAS_ESCAPES: u32 = 1 << 31;
/// The bits of an escape's position that hold the row in its tile.
const ESCAPE_ROW_BITS: u32 = 6;

/// A packed weight, borrowed from its four tensors and ready to decode.
pub struct PackedWeight<'a> {
    pub header: Header,
    payload: &'a [u8],
    directory: &'a [i32],
    /// The decoder's table of each plane that has a model.
    tables: Vec<Option<SlotTable>>,
    /// For levels with centroids: the first level, and r(q) of it and those that follow.
    centroids: (i32, Vec<f32>),
}

impl<'a> PackedWeight<'a> {
    /// Checks what decoding relies on: the header, and that the directory has a row for each tile.
    pub fn new(payload: &'a [u8], directory: &'a [i32], tables: &[u8]) -> Result<Self> {
        let header = Header::parse(tables)?;
        let expected = 2 * header.geometry.tiles();
        if directory.len() != expected {
            return Err(Error::corrupt("directory", format!("{expected} entries"), directory.len()));
        }
        let table = |coding: &Coding| match coding {
            Coding::Modelled(model) => Some(SlotTable::new(&model.frequencies)),
            _ => None,
        };
        Ok(Self {
            tables: header.planes.iter().map(|p| table(&p.coding)).collect(),
            centroids: centroids(&header),
            header,
            payload,
            directory,
        })
    }

    pub fn geometry(&self) -> Geometry {
        self.header.geometry
    }

    /// Verifies every checksum; that of `scales` only where they are given, for training changes them.
    pub fn verify(&self, scales: Option<&[f32]>) -> Result<()> {
        check("directory_checksum", self.header.directory_crc, checksum_words(self.directory))?;
        if let Some(scales) = scales {
            check("scales_checksum", self.header.scales_crc, checksum_scales(scales))?;
        }
        for tile in 0..self.geometry().tiles() {
            let range = self.tile_range(tile)?;
            let expected = self.directory[2 * tile + 1] as u32;
            check("payload_checksum", expected, crc32fast::hash(&self.payload[range]))?;
        }
        Ok(())
    }

    /// Scales side by side in a row of the weight, 1 where all columns share one or there is none.
    pub fn groups(&self) -> usize {
        self.geometry().cols.div_ceil(self.header.scale_grid.group_cols(self.geometry()).max(1))
    }

    /// Checks that there are as many scales as the grid has.
    pub fn check_scales<T: Real>(&self, scales: Scales<T>) -> Result<()> {
        let count = self.header.scale_grid.count(self.geometry());
        if scales.count() == count {
            return Ok(());
        }
        Err(Error::argument("scales", format!("{count} elements"), scales.count()))
    }

    /// Where tile `tile` lies in the payload: from its own offset to the next one's.
    fn tile_range(&self, tile: usize) -> Result<Range<usize>> {
        let offset = |tile: usize| match self.directory.get(2 * tile) {
            Some(&units) => units as u32 as usize * TILE_ALIGN,
            None => self.payload.len(),
        };
        let (start, end) = (offset(tile), offset(tile + 1));
        if start <= end && end <= self.payload.len() {
            Ok(start..end)
        } else {
            let got = format!("{start}..{end}");
            Err(Error::corrupt("directory", format!("within {} bytes", self.payload.len()), got))
        }
    }

    /// A decoder at the start of tile `tile`.
    pub fn tile(&self, tile: usize) -> Result<TileDecoder<'_>> {
        let geometry = self.geometry();
        let mut bytes = Bytes(&self.payload[self.tile_range(tile)?]);
        let streams = self
            .header
            .planes
            .iter()
            .zip(&self.tables)
            .enumerate()
            .map(|(index, (plane, table))| {
                let data = Data::read(&mut bytes, &plane.coding, table.as_ref(), geometry, tile)?;
                let restorer = (index == 0 && self.header.predictor != Predictor::None).then(|| {
                    let rows = geometry.rows_of(tile);
                    Restorer::new(self.header.predictor, plane.alphabet(), rows.start, rows.len())
                });
                Ok(Stream { data, restorer })
            })
            .collect::<Result<_>>()?;
        Ok(TileDecoder {
            weight: self,
            first_row: geometry.rows_of(tile).start,
            streams,
            symbols: [0; BLOCK],
            codes: [0; BLOCK],
        })
    }

    /// The dense weight, row-major, into `out`. A lossless weight whose dtype is `O` comes bit for bit.
    pub fn unpack<S: Real, O: Scalar>(&self, scales: Scales<S>, out: &mut [O], pool: &dyn Pool) -> Result<()> {
        let geometry = self.geometry();
        self.check_scales(scales)?;
        if out.len() != geometry.elements() {
            return Err(Error::argument("output elements", geometry.elements(), out.len()));
        }
        let out = DisjointSlice::new(out);
        let results = map(pool, geometry.tiles(), |tile| {
            let rows = geometry.rows_of(tile);
            let elements = rows.start * geometry.cols..rows.end * geometry.cols;
            // SAFETY: tiles own disjoint rows, and each tile is visited once.
            #[allow(unsafe_code)]
            let out = unsafe { out.range_mut(elements) };
            let mut decoder = self.tile(tile)?;
            for shape in geometry.blocks(tile) {
                decoder.decode(shape);
                for lane in 0..shape.lanes {
                    let row = shape.row + lane;
                    let at = (row - rows.start) * geometry.cols + shape.col;
                    for (col, value) in out[at..at + shape.cols].iter_mut().enumerate() {
                        *value = decoder.value(col, lane, row, shape.col + col, scales);
                    }
                }
            }
            Ok(())
        });
        results.into_iter().collect()
    }
}

/// The reconstruction points of a weight whose levels have centroids.
fn centroids(header: &Header) -> (i32, Vec<f32>) {
    let plane = &header.planes[0];
    match (&plane.coding, header.element) {
        (Coding::Modelled(model), Element::Level { .. }) => {
            let levels = plane.centroids.iter().enumerate();
            let point = |(symbol, &offset): (usize, &i8)| {
                model.lo.wrapping_add(symbol as i32) as f32 + f32::from(offset) / 256.0
            };
            (model.lo, levels.map(point).collect())
        }
        _ => (0, Vec::new()),
    }
}

/// CRC-32 of integers' little-endian bytes.
pub fn checksum_words(words: &[i32]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    words.iter().for_each(|w| hasher.update(&w.to_le_bytes()));
    hasher.finalize()
}

/// CRC-32 of the little-endian bytes of scales as f32.
pub fn checksum_scales(scales: &[f32]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    scales.iter().for_each(|s| hasher.update(&s.to_le_bytes()));
    hasher.finalize()
}

fn check(field: &'static str, expected: u32, found: u32) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Error::corrupt(field, format!("{expected:08x}"), format!("{found:08x}")))
}

/// Decodes one tile's blocks in order.
pub struct TileDecoder<'a> {
    weight: &'a PackedWeight<'a>,
    first_row: usize,
    streams: Vec<Stream<'a>>,
    symbols: [u8; BLOCK],
    /// The current block, `[column][lane]`.
    codes: [u32; BLOCK],
}

impl TileDecoder<'_> {
    /// Decodes the next block, whose shape is `shape`, to codes.
    pub fn decode(&mut self, shape: BlockShape) {
        let element = self.weight.header.element;
        let size = shape.cols * LANES;
        self.codes[..size].fill(0);
        for (plane, stream) in self.streams.iter_mut().enumerate() {
            let lo = stream.symbols(shape, &mut self.symbols);
            element.place(plane, lo, &self.symbols[..size], &mut self.codes[..size]);
            while let Some((index, value)) = stream.escape(shape, self.first_row) {
                // An escape's own symbol was placed; planes have bits apart, so this takes it out and puts the value in.
                let placed = lo.wrapping_add(i32::from(self.symbols[index]));
                self.codes[index] ^= element.bits_of(plane, placed) ^ element.bits_of(plane, value);
            }
        }
    }

    /// The current block before its scales, `[column][lane]`: floats of a lossless weight, reconstruction points r(q) of
    /// levels. Lanes without a row are zero.
    pub fn points<T: Real>(&self, shape: BlockShape, out: &mut [T; BLOCK]) {
        let (lo, centroids) = &self.weight.centroids;
        points(&self.codes[..shape.cols * LANES], self.weight.header.element, *lo, centroids, out);
        if shape.lanes < LANES {
            out.chunks_exact_mut(LANES).for_each(|column| column[shape.lanes..].fill(T::default()));
        }
    }

    /// One weight of the current block, scaled.
    #[inline(always)]
    pub fn value<S: Real, O: Scalar>(
        &self,
        col: usize,
        lane: usize,
        row: usize,
        weight_col: usize,
        scales: Scales<S>,
    ) -> O {
        let header = &self.weight.header;
        let code = self.codes[col * LANES + lane];
        if let Element::Bits(dtype) = header.element {
            return O::from_bits(code, dtype).unwrap_or_else(|| O::from_f32(bits_to_f32(code, dtype)));
        }
        let group = weight_col / header.scale_grid.group_cols(header.geometry).max(1);
        let (lo, centroids) = &self.weight.centroids;
        let point = S::from_f32(level_point(code, *lo, centroids));
        let scale = scales.get(header.scale_grid.index(row, group, header.geometry));
        O::from_real(scale.map_or(point, |scale| scale * point))
    }
}

per_isa! {
    /// What codes stand for: floats, or reconstruction points.
    fn points<T: Real>(codes: &[u32], element: Element, lo: i32, centroids: &[f32], out: &mut [T; BLOCK]) {
        let pairs = out.iter_mut().zip(codes);
        match element {
            Element::Bits(Dtype::Bf16) => pairs.for_each(|(out, &code)| *out = T::from_f32(f32::from_bits(code << 16))),
            Element::Bits(dtype) => pairs.for_each(|(out, &code)| *out = T::from_f32(bits_to_f32(code, dtype))),
            Element::Level { .. } if centroids.is_empty() => {
                pairs.for_each(|(out, &code)| *out = T::from_f32(code as i32 as f32));
            }
            Element::Level { .. } => {
                pairs.for_each(|(out, &code)| *out = T::from_f32(level_point(code, lo, centroids)));
            }
        }
    }
}

/// r(q) of a level.
#[inline(always)]
fn level_point(code: u32, lo: i32, centroids: &[f32]) -> f32 {
    let level = code as i32;
    centroids.get(level.wrapping_sub(lo) as usize).copied().unwrap_or(level as f32)
}

/// A plane of a tile, being read.
struct Stream<'a> {
    data: Data<'a>,
    restorer: Option<Restorer>,
}

enum Data<'a> {
    Constant(i32),
    Plain {
        lo: i32,
        width: u32,
        bytes: Bytes<'a>,
    },
    Modelled {
        lo: i32,
        table: &'a SlotTable,
        decoder: Decoder<'a>,
        /// Escapes not yet reached, in stream order.
        escapes: Bytes<'a>,
    },
}

impl<'a> Data<'a> {
    fn read(
        bytes: &mut Bytes<'a>,
        coding: &Coding,
        table: Option<&'a SlotTable>,
        geometry: Geometry,
        tile: usize,
    ) -> Result<Self> {
        match (coding, table) {
            (Coding::Plain { lo, width }, _) => {
                let size: usize = geometry.blocks(tile).map(|b| b.cols * step_bytes(b.lanes, *width)).sum();
                Ok(Self::Plain { lo: *lo, width: *width, bytes: Bytes(bytes.take(size)?) })
            }
            (Coding::Modelled(model), Some(table)) => {
                let head = bytes.word()?;
                let states = bytes.take(4 * geometry.lanes_of(tile))?;
                let words = bytes.take(2 * (head & !HAS_ESCAPES) as usize)?;
                let escapes = if head & HAS_ESCAPES != 0 {
                    let count = bytes.word()? as usize;
                    bytes.take(count.saturating_mul(ESCAPE_BYTES))?
                } else {
                    &[]
                };
                Ok(Self::Modelled {
                    lo: model.lo,
                    table,
                    decoder: Decoder::new(states, words),
                    escapes: Bytes(escapes),
                })
            }
            (Coding::Constant(value), _) => Ok(Self::Constant(*value)),
            (Coding::Modelled(_), None) => Err(Error::corrupt("plane", "a model", "none")),
        }
    }
}

impl Stream<'_> {
    /// Decodes a block's symbols, `[column][lane]`, and returns the value that symbol 0 stands for.
    fn symbols(&mut self, shape: BlockShape, symbols: &mut [u8; BLOCK]) -> i32 {
        let lo = match &mut self.data {
            Data::Constant(value) => {
                symbols.fill(0);
                return *value;
            }
            Data::Plain { lo, width, bytes } => {
                for step in symbols.chunks_exact_mut(LANES).take(shape.cols) {
                    bytes.unpack_step(*width, &mut step[..shape.lanes]);
                }
                *lo
            }
            Data::Modelled { lo, table, decoder, .. } => {
                decoder.block(table, shape.cols, shape.lanes, symbols);
                *lo
            }
        };
        if let Some(restorer) = &mut self.restorer {
            restorer.restore(shape, symbols);
        }
        lo
    }

    /// The next escape in this block: its place in `[column][lane]` and its value.
    fn escape(&mut self, shape: BlockShape, first_row: usize) -> Option<(usize, i32)> {
        match &mut self.data {
            Data::Modelled { escapes, .. } => escapes.escape_in(shape, first_row),
            _ => None,
        }
    }
}

/// Bytes of a step of plain bits.
pub fn step_bytes(lanes: usize, width: u32) -> usize {
    (lanes * width as usize).div_ceil(8)
}

/// The head of a modelled plane's stream.
pub fn stream_head(words: usize, escapes: bool) -> [u8; STREAM_HEAD] {
    (words as u32 | if escapes { HAS_ESCAPES } else { 0 }).to_le_bytes()
}

/// An escape as stored.
pub fn escape_bytes(col: usize, row_in_tile: usize, value: i32) -> [u8; ESCAPE_BYTES] {
    let position = (col as u32) << ESCAPE_ROW_BITS | row_in_tile as u32;
    let mut bytes = [0; ESCAPE_BYTES];
    bytes[..4].copy_from_slice(&position.to_le_bytes());
    bytes[4..].copy_from_slice(&value.to_le_bytes());
    bytes
}

/// Unread bytes.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, size: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self
            .0
            .split_at_checked(size)
            .ok_or_else(|| Error::corrupt("payload", format!("{size} more bytes in the tile"), self.0.len()))?;
        self.0 = rest;
        Ok(taken)
    }

    fn word(&mut self) -> Result<u32> {
        let bytes = self.take(4)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    /// The next step of plain bits, least significant first. The size was taken whole, so the bytes are there.
    fn unpack_step(&mut self, width: u32, out: &mut [u8]) {
        let (step, rest) = self.0.split_at(step_bytes(out.len(), width));
        if width == 8 {
            out.copy_from_slice(step);
        } else {
            let mask = (1u8 << width) - 1;
            // Eight symbols are `width` bytes. Reading eight of them at once may run on into the next step's.
            for (group, symbols) in out.chunks_mut(8).enumerate() {
                let bytes = &self.0[group * width as usize..];
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
        self.0 = rest;
    }

    /// Takes the next escape if it lies in this block: its place there and its value.
    fn escape_in(&mut self, shape: BlockShape, first_row: usize) -> Option<(usize, i32)> {
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
