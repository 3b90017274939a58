//! Reading a packed weight: any tile, block by block.

use std::marker::PhantomData;
use std::ops::Range;

use super::arch::{bf16_pair, per_isa};
use super::element::{Real, Scalar, Scales};
use super::format::{Header, TILE_ALIGN};
use super::geometry::{BLOCK, BlockShape, Geometry, LANES};
use super::points::{self, Assembly};
use super::stream::{Bytes, Stream, Symbols, Table};
use crate::memory::Aligned;
use crate::parallel::{DisjointSlice, Pool, map};
use crate::{Error, Result};

/// A packed weight, borrowed from its four tensors and ready to decode.
pub struct PackedWeight<'a> {
    pub header: Header,
    payload: &'a [u8],
    directory: &'a [i32],
    /// The decoder's table of each plane's model.
    tables: Vec<Table>,
    assembly: Assembly,
}

impl<'a> PackedWeight<'a> {
    /// Checks what decoding relies on: the header, and that the directory has a row for each tile.
    pub fn new(payload: &'a [u8], directory: &'a [i32], tables: &[u8]) -> Result<Self> {
        let header = Header::parse(tables)?;
        let expected = 2 * header.geometry.tiles();
        if directory.len() != expected {
            return Err(Error::corrupt("directory", format!("{expected} entries"), directory.len()));
        }
        Ok(Self {
            tables: header.planes.iter().map(|plane| Table::new(&plane.coding)).collect(),
            assembly: Assembly::new(&header),
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

    /// A decoder before the first block of tile `tile`.
    pub fn tile(&self, tile: usize) -> Result<TileDecoder<'_>> {
        let range = self.tile_range(tile)?;
        let mut bytes = Bytes::new(&self.payload[range.start..], range.len());
        let planes = self.tables.iter().enumerate();
        let streams = planes.map(|(plane, table)| Stream::open(&mut bytes, &self.header, plane, table, tile));
        let rows = self.geometry().rows_of(tile);
        Ok(TileDecoder {
            weight: self,
            tile,
            streams: streams.collect::<Result<_>>()?,
            shape: BlockShape { row: 0, col: 0, lanes: 0, cols: 0 },
            next: self.geometry().first_block(&rows),
            rows,
            index: 0,
            far: Vec::new(),
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
            let mut block = DenseBlock::new(self, scales);
            while let Some(shape) = decoder.next_block() {
                block.read(&decoder);
                for row in shape.row..shape.row + shape.lanes {
                    let at = (row - rows.start) * geometry.cols + shape.col;
                    block.write_row(shape, row, &mut out[at..at + shape.cols]);
                }
            }
            Ok(())
        });
        results.into_iter().collect()
    }

    /// The codes of tile `tile`, row-major.
    pub(crate) fn tile_codes(&self, tile: usize) -> Result<Vec<u32>> {
        let (rows, cols) = (self.geometry().rows_of(tile), self.geometry().cols);
        let mut out = vec![0; rows.len() * cols];
        let mut decoder = self.tile(tile)?;
        let mut codes = Aligned([0; BLOCK]);
        while let Some(shape) = decoder.next_block() {
            decoder.codes(&mut codes);
            for lane in 0..shape.lanes {
                let at = (shape.row - rows.start + lane) * cols + shape.col;
                fill(&mut out[at..at + shape.cols], &codes[lane..], |code| code);
            }
        }
        Ok(out)
    }
}

/// A decoded block whose rows are written with their scales, in dtype `O`.
pub struct DenseBlock<'a, S, O> {
    weight: &'a PackedWeight<'a>,
    scales: Scales<'a, S>,
    codes: Box<Aligned<[u32; BLOCK]>>,
    points: Box<Aligned<[f32; BLOCK]>>,
    dtype: PhantomData<O>,
}

impl<'a, S: Real, O: Scalar> DenseBlock<'a, S, O> {
    pub fn new(weight: &'a PackedWeight<'a>, scales: Scales<'a, S>) -> Self {
        Self {
            weight,
            scales,
            codes: Box::new(Aligned([0; BLOCK])),
            points: Box::new(Aligned([0.0; BLOCK])),
            dtype: PhantomData,
        }
    }

    /// Makes a float of a code where `O` is a lossless weight's own dtype: a NaN may not pass through another.
    fn bits(&self) -> Option<impl Fn(u32) -> O> {
        self.weight.header.element.float().and_then(O::from_bits)
    }

    /// Decodes the current block.
    pub fn read(&mut self, decoder: &TileDecoder) {
        if self.bits().is_some() {
            decoder.codes(&mut self.codes);
        } else {
            decoder.points(&mut self.points);
        }
    }

    /// Writes the columns of `row` that the block holds.
    pub fn write_row(&self, shape: BlockShape, row: usize, out: &mut [O]) {
        let header = &self.weight.header;
        let lane = row - shape.row;
        let group = shape.col / header.scale_grid.group_cols(header.geometry).max(1);
        let scale = self.scales.get(header.scale_grid.index(row, group, header.geometry));
        match (self.bits(), scale) {
            (Some(from_bits), _) => fill(out, &self.codes[lane..], from_bits),
            (None, Some(scale)) => fill(out, &self.points[lane..], |point| O::from_real(scale * S::from_f32(point))),
            (None, None) => fill(out, &self.points[lane..], O::from_f32),
        }
    }
}

/// Fills a row with what `convert` makes of a lane of a block, whose values lie `LANES` apart.
#[inline(always)]
fn fill<T: Copy, O>(out: &mut [O], lane: &[T], convert: impl Fn(T) -> O) {
    out.iter_mut().zip(lane.iter().step_by(LANES)).for_each(|(out, &value)| *out = convert(value));
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

/// Up to so many escapes in a block are patched into its columns one by one; more, into all of it unpacked.
const FEW: usize = 4;

/// Decodes one tile's blocks in order.
pub struct TileDecoder<'a> {
    weight: &'a PackedWeight<'a>,
    tile: usize,
    streams: Vec<Stream<'a>>,
    rows: Range<usize>,
    /// The current block.
    shape: BlockShape,
    /// The one after it, and that one's index.
    next: Option<BlockShape>,
    index: usize,
    /// See [`TileDecoder::far`].
    far: Vec<(usize, i32)>,
}

impl TileDecoder<'_> {
    /// Goes on to the next block and returns its shape, or None after the last.
    pub fn next_block(&mut self) -> Option<BlockShape> {
        let header = &self.weight.header;
        let geometry = header.geometry;
        let shape = self.next?;
        let first_row = self.rows.start;
        self.far.clear();
        for (plane, stream) in self.streams.iter_mut().enumerate() {
            stream.advance(geometry, self.tile, self.index, shape);
            let apart = plane == 0 && (header.element.float().is_none() || stream.is_in_payload());
            while let Some((index, value)) = stream.escape(shape, first_row) {
                if apart {
                    self.far.push((index, value));
                } else {
                    stream.patch(shape, index, value.wrapping_sub(stream.lo()) as u8);
                }
            }
        }
        self.shape = shape;
        self.next = geometry.next_block(&self.rows, shape);
        self.index += 1;
        Some(shape)
    }

    /// The current block in one plane: the value of symbol 0, and the symbols as bytes, `[column][lane]`, in the payload or
    /// in `buffer`.
    pub fn plane<'b>(&'b self, plane: usize, buffer: &'b mut [u8; BLOCK]) -> (i32, &'b [u8]) {
        let stream = &self.streams[plane];
        let patches = if plane == 0 && self.weight.header.element.float().is_some() { &self.far[..] } else { &[] };
        match stream.symbols() {
            Symbols::Packed { width: 8, bytes, .. } if patches.is_empty() => return (stream.lo(), bytes),
            _ => stream.bytes(self.shape, buffer),
        }
        for &(index, value) in patches {
            buffer[index] = value.wrapping_sub(stream.lo()) as u8;
        }
        (stream.lo(), buffer)
    }

    /// Levels of the current block that their symbols cannot say: place and value in the first plane.
    pub fn far(&self) -> &[(usize, i32)] {
        if self.weight.header.element.float().is_some() { &[] } else { &self.far }
    }

    /// The current block's codes, `[column][lane]`.
    pub fn codes(&self, out: &mut [u32; BLOCK]) {
        let element = self.weight.header.element;
        let size = self.shape.cols * LANES;
        out[..size].fill(0);
        let mut unpacked = [0; BLOCK];
        for plane in 0..self.streams.len() {
            let (lo, symbols) = self.plane(plane, &mut unpacked);
            element.place(plane, lo, &symbols[..size], &mut out[..size]);
        }
        for &(index, value) in self.far() {
            out[index] = self.far_code(index, value);
        }
    }

    /// The current block before its scales, `[column][lane]`: floats of a lossless weight, reconstruction points r(q) of
    /// levels. Lanes without a row are zero.
    pub fn points(&self, out: &mut [f32; BLOCK]) {
        let Self { weight, shape, .. } = self;
        let assembly = &weight.assembly;
        if assembly.is_vector() && points::assemble(assembly, self.two_planes(), shape.cols, out).is_some() {
            for (index, point) in self.far_points() {
                out[index] = point;
            }
        } else {
            let mut codes = [0; BLOCK];
            self.codes(&mut codes);
            convert(assembly, &codes[..shape.cols * LANES], out);
        }
        if shape.lanes < LANES {
            out.chunks_exact_mut(LANES).for_each(|column| column[shape.lanes..].fill(0.0));
        }
    }

    /// What [`TileDecoder::points`] gives, rounded to bf16 in pairs of columns, `[pair][lane]`: the first column of a pair in
    /// the low half. Columns and lanes that are not there are zero.
    pub fn pairs(&self, out: &mut [u32; BLOCK / 2]) {
        let Self { weight, shape, .. } = self;
        let assembly = &weight.assembly;
        let is_vector = assembly.is_vector() && shape.cols.is_multiple_of(2);
        if is_vector && points::assemble_pairs(assembly, self.two_planes(), shape.cols, out).is_some() {
            for (index, point) in self.far_points() {
                let pair = &mut out[index / LANES / 2 * LANES + index % LANES];
                let halves = [bf16_pair(point, 0.0), bf16_pair(0.0, point)];
                *pair = if (index / LANES).is_multiple_of(2) {
                    *pair & !0xffff | halves[0]
                } else {
                    *pair & 0xffff | halves[1]
                };
            }
        } else {
            let mut codes = [0; BLOCK];
            self.codes(&mut codes);
            pair_up(assembly, &codes[..shape.cols * LANES], out);
        }
        out[shape.cols.div_ceil(2) * LANES..].fill(0);
        if shape.lanes < LANES {
            out.chunks_exact_mut(LANES).for_each(|pair| pair[shape.lanes..].fill(0));
        }
    }

    /// Adds x (one value for each column) times the current block to `sums` without writing the block down. Returns whether
    /// it could: if not, [`TileDecoder::points`] and a product of them give the same bits.
    pub fn multiply(&self, x: &[f32], sums: &mut [f32; LANES]) -> bool {
        let assembly = &self.weight.assembly;
        let planes = self.two_planes();
        if !assembly.is_vector() || self.shape.lanes < LANES {
            return false;
        }
        if self.far.is_empty() {
            return points::multiply(assembly, planes, x, sums).is_some();
        }
        // Only damaged escapes are out of order.
        if self.far.len() <= FEW && self.far.is_sorted_by_key(|&(index, _)| index / LANES) {
            return points::multiply_far(assembly, planes, x, self.far_points(), sums).is_some();
        }
        if self.weight.header.element.float().is_none() {
            return false;
        }
        let mut buffer = [0; BLOCK];
        let (_, bytes) = self.plane(0, &mut buffer);
        let first = Symbols::Packed { width: 8, bytes, ahead: 0 };
        points::multiply(assembly, [first, planes[1]], x, sums).is_some()
    }

    /// What is listed apart in the first plane: place and float.
    fn far_points(&self) -> impl Iterator<Item = (usize, f32)> {
        self.far.iter().map(|&(index, value)| (index, self.weight.assembly.point(self.far_code(index, value))))
    }

    fn two_planes(&self) -> [Symbols<'_>; 2] {
        [0, 1].map(|plane| self.streams.get(plane).map_or(Symbols::Zero, Stream::symbols))
    }

    /// The code whose first plane has the value `value`.
    fn far_code(&self, index: usize, value: i32) -> u32 {
        let element = self.weight.header.element;
        let mut code = [0];
        let place = |plane, lo, symbol, code: &mut [u32; 1]| element.place(plane, lo, &[symbol], code);
        place(0, value, 0, &mut code);
        for (plane, stream) in self.streams.iter().enumerate().skip(1) {
            place(plane, stream.lo(), stream.symbols().at(index), &mut code);
        }
        code[0]
    }
}

per_isa! {
    /// What codes stand for, in pairs of columns of which the last may be alone.
    fn pair_up(assembly: &Assembly, codes: &[u32], out: &mut [u32; BLOCK / 2]) {
        for (out, codes) in out.chunks_exact_mut(LANES).zip(codes.chunks(2 * LANES)) {
            let (even, odd) = codes.split_at(LANES);
            for (lane, (out, &even)) in out.iter_mut().zip(even).enumerate() {
                let odd = odd.get(lane).map_or(0.0, |&odd| assembly.point(odd));
                *out = bf16_pair(assembly.point(even), odd);
            }
        }
    }
}

per_isa! {
    /// What codes stand for.
    fn convert(assembly: &Assembly, codes: &[u32], out: &mut [f32; BLOCK]) {
        out.iter_mut().zip(codes).for_each(|(out, &code)| *out = assembly.point(code));
    }
}
