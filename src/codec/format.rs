//! The bytes of a packed weight's tables: header, then one description per plane. `docs/format.md` is the specification.

use super::alias::{ALIAS_CEILING, ALIAS_SYMBOLS, ALIAS_TOTAL};
use super::element::{Dtype, Element};
use super::geometry::{CHUNK, Geometry, LANES, MAX_TILE_ROWS};
use super::predict::Predictor;
use super::rans::MODEL_TOTAL;
use super::symbols::{AliasModel, Coding, Model, PALETTE};
use crate::{Error, Result};

/// The newest version that this library reads.
pub const FORMAT_VERSION: u16 = 3;
/// Rows and columns lie below this, so that an escape's position fits in 32 bits and no size computation overflows.
pub const MAX_DIMENSION: usize = 1 << 26;
/// Tiles start at multiples of this many bytes, the unit of the directory's offsets.
pub const TILE_ALIGN: usize = 4;

const MAGIC: [u8; 4] = *b"INFW";
const HEADER_BYTES: usize = 48;
const PLANE_BYTES: usize = 8;
const CHECKSUM_AT: usize = 44;
const LAYOUT_AT: usize = 7;

/// Whether anything in the payload is entropy-coded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Codec {
    /// Plain bits only.
    Raw = 0,
    /// At least one plane is rANS-coded.
    Rans = 1,
}

/// How a payload is arranged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Layout {
    /// The canonical form, the smallest: what is stored.
    Compact = 0,
    /// Plain bits of a few widths, made from the canonical form: what is fastest to compute on.
    Fast = 1,
}

impl Layout {
    pub fn from_byte(byte: u8) -> Option<Self> {
        [Self::Compact, Self::Fast].into_iter().find(|&layout| layout as u8 == byte)
    }

    /// The version that is written: the oldest that knows all that the layout may have.
    pub fn version(self) -> u16 {
        match self {
            Self::Compact => 2,
            Self::Fast => 3,
        }
    }
}

/// What made the codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Quantizer {
    Lossless = 0,
    Ecsq = 1,
    Int8 = 2,
    Int4 = 3,
}

/// Which elements share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScaleGrid {
    /// No scales: a lossless weight.
    None,
    /// One for the weight.
    Tensor,
    /// One for each row.
    Row,
    /// One for each row and run of so many columns (a multiple of 64).
    Group(usize),
}

impl ScaleGrid {
    /// The shape of the scales of a weight.
    pub fn shape(self, geometry: Geometry) -> Option<(usize, usize)> {
        match self {
            Self::None => None,
            Self::Tensor => Some((1, 1)),
            Self::Row => Some((geometry.rows, 1)),
            Self::Group(size) => Some((geometry.rows, geometry.cols.div_ceil(size))),
        }
    }

    /// How many scales a weight has.
    pub fn count(self, geometry: Geometry) -> usize {
        self.shape(geometry).map_or(0, |(rows, groups)| rows * groups)
    }

    /// Bytes of one scale: f32 where there is one, else bf16, so that scales cost little beside the levels.
    pub fn bytes_each(self) -> usize {
        match self {
            Self::None | Self::Tensor => 4,
            Self::Row | Self::Group(_) => 2,
        }
    }

    /// The position of the scale of `row` and column group `group`.
    pub fn index(self, row: usize, group: usize, geometry: Geometry) -> usize {
        match self {
            Self::None | Self::Tensor => 0,
            Self::Row => row,
            Self::Group(size) => row * geometry.cols.div_ceil(size) + group,
        }
    }

    /// Columns under one scale.
    pub fn group_cols(self, geometry: Geometry) -> usize {
        match self {
            Self::Group(size) => size,
            _ => geometry.cols,
        }
    }

    fn to_bytes(self) -> (u8, u32) {
        match self {
            Self::None => (0, 0),
            Self::Tensor => (1, 0),
            Self::Row => (2, 0),
            Self::Group(size) => (3, size as u32),
        }
    }

    fn from_bytes(kind: u8, size: u32) -> Option<Self> {
        match kind {
            0 => Some(Self::None),
            1 => Some(Self::Tensor),
            2 => Some(Self::Row),
            3 if size > 0 && (size as usize).is_multiple_of(CHUNK) => Some(Self::Group(size as usize)),
            _ => None,
        }
    }
}

/// One plane: its coding and, for levels, how far each symbol's reconstruction lies from its integer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plane {
    pub coding: Coding,
    /// How many streams a tile's blocks take turns in; 1 for a coding without a model.
    pub streams: usize,
    /// In 1/256 of a step, for each value from the first on; empty for none. Of a weight that is not in its canonical form
    /// the origin has them.
    pub centroids: Vec<i8>,
}

impl Plane {
    fn to_bytes(&self, out: &mut Vec<u8>) {
        // 256 is written as 0, so that a byte is enough.
        let (coding, width, symbols) = match &self.coding {
            Coding::Constant(_) => (0, 0, 0),
            Coding::Plain { width, .. } => (1, *width as u8, 0),
            Coding::Palette { .. } => (4, PALETTE.ilog2() as u8, PALETTE as u8),
            Coding::Modelled(model) => (2, self.streams.ilog2() as u8, model.frequencies.len() as u8),
            Coding::Alias(model) => (3, self.streams.ilog2() as u8, model.frequencies.len() as u8),
        };
        let flags = u8::from(self.coding.escapes()) | u8::from(!self.centroids.is_empty()) << 1;
        out.extend([coding, width, flags, symbols]);
        out.extend(self.coding.lo().to_le_bytes());
        match &self.coding {
            Coding::Modelled(model) => out.extend(model.frequencies.iter().flat_map(|f| f.to_le_bytes())),
            Coding::Alias(model) => out.extend(&model.frequencies),
            Coding::Palette { values, .. } => out.extend(values),
            _ => {}
        }
        out.extend(self.centroids.iter().map(|&c| c as u8));
    }
}

/// Everything about a packed weight but its payload, directory and scales.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    pub version: u16,
    pub layout: Layout,
    pub dtype: Dtype,
    pub quantizer: Quantizer,
    pub predictor: Predictor,
    pub geometry: Geometry,
    pub scale_grid: ScaleGrid,
    pub element: Element,
    pub planes: Vec<Plane>,
    /// CRC-32 of the directory's bytes.
    pub directory_crc: u32,
    /// CRC-32 of the scales as f32, as they were packed; training them outdates it.
    pub scales_crc: u32,
    /// Of a weight that is not in its canonical form: the header of that.
    pub origin: Option<Box<Header>>,
}

impl Header {
    pub fn codec(&self) -> Codec {
        if self.planes.iter().any(|plane| plane.coding.is_modelled()) { Codec::Rans } else { Codec::Raw }
    }

    /// The `tables` tensor.
    pub fn to_bytes(&self) -> Vec<u8> {
        let (scale_kind, group) = self.scale_grid.to_bytes();
        let mut out = Vec::with_capacity(HEADER_BYTES + 256);
        out.extend(MAGIC);
        out.extend(self.version.to_le_bytes());
        out.extend([
            self.codec() as u8,
            self.layout as u8,
            self.dtype as u8,
            self.quantizer as u8,
            self.predictor as u8,
            self.planes.len() as u8,
            self.element.low_bits() as u8,
            scale_kind,
        ]);
        out.extend((self.geometry.tile_rows as u16).to_le_bytes());
        for word in [
            self.geometry.rows as u32,
            self.geometry.cols as u32,
            group,
            self.directory_crc,
            self.scales_crc,
            0, // reserved
            0, // reserved
            0, // the checksum's place
        ] {
            out.extend(word.to_le_bytes());
        }
        self.planes.iter().for_each(|plane| plane.to_bytes(&mut out));
        if let Some(origin) = &self.origin {
            out.extend(origin.to_bytes());
        }
        let checksum = crc32fast::hash(&out);
        out[CHECKSUM_AT..HEADER_BYTES].copy_from_slice(&checksum.to_le_bytes());
        out
    }

    /// Whether another header may be of the same weight in another layout.
    fn same_weight(&self, other: &Self) -> bool {
        let of = |header: &Self| {
            let Self { dtype, quantizer, geometry, scale_grid, element, scales_crc, .. } = header;
            (*dtype, *quantizer, *geometry, *scale_grid, element.low_bits(), *scales_crc)
        };
        of(self) == of(other)
    }

    /// Reads a `tables` tensor. Every error names a field; no input panics or allocates more than its own size.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader { bytes, at: 0 };
        let magic = reader.take::<4>()?;
        if magic != MAGIC {
            return Err(Error::corrupt("magic", format!("{MAGIC:?}"), format!("{magic:?}")));
        }
        let version = u16::from_le_bytes(reader.take()?);
        if version == 0 {
            return Err(Error::corrupt("version", "at least 1", version));
        }
        if version > FORMAT_VERSION {
            return Err(Error::Version { found: version, supported: FORMAT_VERSION });
        }
        let [codec, layout, dtype, quantizer, predictor, plane_count, low_bits, scale_kind] = reader.take()?;
        let tile_rows = usize::from(u16::from_le_bytes(reader.take()?));
        let [rows, cols, group, directory_crc, scales_crc, _, _, checksum] = reader.words()?;

        let layout = Layout::from_byte(layout)
            .filter(|&layout| layout == Layout::Compact || version >= 2)
            .ok_or_else(|| Error::corrupt("layout", "0, or from version 2 on 1", layout))?;
        let dtype = Dtype::from_byte(dtype).ok_or_else(|| Error::corrupt("dtype", "0..=2", dtype))?;
        let quantizer = match quantizer {
            0 => Quantizer::Lossless,
            1 => Quantizer::Ecsq,
            2 => Quantizer::Int8,
            3 => Quantizer::Int4,
            other => return Err(Error::corrupt("quantizer", "0..=3", other)),
        };
        let predictor =
            Predictor::from_byte(predictor).ok_or_else(|| Error::corrupt("predictor", "0..=4", predictor))?;
        let scale_grid = ScaleGrid::from_bytes(scale_kind, group)
            .ok_or_else(|| Error::corrupt("scale_grid", "a known grid", scale_kind))?;
        let lossless = quantizer == Quantizer::Lossless;
        if lossless != (scale_grid == ScaleGrid::None) {
            return Err(Error::corrupt("scale_grid", "none, and only for lossless", scale_kind));
        }
        let element = match (lossless, low_bits) {
            (true, 0) if layout == Layout::Fast && dtype == Dtype::Bf16 => Element::SwappedBf16,
            (true, 0) => Element::Bits(dtype),
            (false, 0..=8) => Element::Level { low_bits: u32::from(low_bits) },
            _ => return Err(Error::corrupt("low_bits", "0, or up to 8 for levels", low_bits)),
        };
        for (field, value) in [("rows", rows), ("cols", cols)] {
            if value as usize >= MAX_DIMENSION {
                return Err(Error::corrupt(field, format!("below {MAX_DIMENSION}"), value));
            }
        }
        if tile_rows != LANES && tile_rows != MAX_TILE_ROWS {
            return Err(Error::corrupt("tile_rows", "32 or 64", tile_rows));
        }
        if usize::from(plane_count) != element.planes() {
            return Err(Error::corrupt("plane_count", element.planes(), plane_count));
        }
        let planes = (0..element.planes()).map(|_| reader.plane(version)).collect::<Result<Vec<_>>>()?;
        for (index, plane) in planes.iter().enumerate() {
            if matches!(plane.coding, Coding::Palette { .. }) && (index > 0 || element != Element::SwappedBf16) {
                return Err(Error::corrupt("plane", "a palette of a fast bfloat16's first plane alone", "another"));
            }
        }
        if let (Element::Level { low_bits }, Some(Plane { coding, .. })) = (element, planes.get(1)) {
            // Instruction sets differ in what they make of more bits than a level has.
            let most = 1 << low_bits;
            if !(0..most).contains(&coding.lo()) || coding.values() > most as usize {
                let got = format!("{} from {}", coding.values(), coding.lo());
                return Err(Error::corrupt("low_bits", format!("values below {most}"), got));
            }
        }
        if predictor != Predictor::None && planes[0].coding.escapes() {
            return Err(Error::corrupt("predictor", "none beside escapes", predictor as u8));
        }
        let origin = match layout {
            Layout::Compact if reader.at != bytes.len() => {
                return Err(Error::corrupt("tables", format!("{} bytes", reader.at), bytes.len()));
            }
            Layout::Compact => None,
            Layout::Fast => {
                let origin = bytes.get(reader.at..).unwrap_or_default();
                // A canonical form has none of its own: no recursion without end.
                if origin.get(LAYOUT_AT) != Some(&(Layout::Compact as u8)) {
                    return Err(Error::corrupt("origin", "the tables of a canonical form", "others"));
                }
                Some(Box::new(Self::parse(origin)?))
            }
        };
        let header = Self {
            version,
            layout,
            dtype,
            quantizer,
            predictor,
            geometry: Geometry { rows: rows as usize, cols: cols as usize, tile_rows },
            scale_grid,
            element,
            planes,
            directory_crc,
            scales_crc,
            origin,
        };
        if header.origin.as_ref().is_some_and(|origin| !origin.same_weight(&header)) {
            return Err(Error::corrupt("origin", "the header of the same weight", "another's"));
        }
        if header.codec() as u8 != codec {
            return Err(Error::corrupt("codec", header.codec() as u8, codec));
        }
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&bytes[..CHECKSUM_AT]);
        hasher.update(&[0; HEADER_BYTES - CHECKSUM_AT]);
        hasher.update(&bytes[HEADER_BYTES..]);
        let found = hasher.finalize();
        if found != checksum {
            return Err(Error::corrupt("tables_checksum", checksum, found));
        }
        Ok(header)
    }
}

/// Takes fields off the front of a byte string.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let taken = rest
            .first_chunk::<N>()
            .ok_or_else(|| Error::corrupt("tables", format!("at least {} bytes", self.at + N), self.bytes.len()))?;
        self.at += N;
        Ok(*taken)
    }

    fn words(&mut self) -> Result<[u32; 8]> {
        let mut words = [0; 8];
        for word in &mut words {
            *word = u32::from_le_bytes(self.take()?);
        }
        Ok(words)
    }

    fn bytes(&mut self, count: usize) -> Result<Vec<u8>> {
        (0..count).map(|_| Ok(self.take::<1>()?[0])).collect()
    }

    fn plane(&mut self, version: u16) -> Result<Plane> {
        let head = self.take::<PLANE_BYTES>()?;
        let [coding, width, flags, symbols, ..] = head;
        let lo = i32::from_le_bytes([head[4], head[5], head[6], head[7]]);
        let (escapes, with_centroids) = (flags & 1 != 0, flags & 2 != 0);
        let symbols = if symbols == 0 { 256 } else { usize::from(symbols) };
        let second = version >= 2;
        let mut streams = 1;
        let coding = match coding {
            0 => Coding::Constant(lo),
            1 if (1..=8).contains(&width) && flags <= u8::from(second) => {
                Coding::Plain { lo, width: u32::from(width), escapes }
            }
            2 if flags <= 3 && width <= if second { 2 } else { 0 } => {
                streams = 1 << width;
                let frequencies =
                    (0..symbols).map(|_| Ok(u16::from_le_bytes(self.take()?))).collect::<Result<Vec<_>>>()?;
                let sum: u32 = frequencies.iter().map(|&f| u32::from(f)).sum();
                let fits = |&f: &u16| u32::from(f) < MODEL_TOTAL;
                if sum != MODEL_TOTAL || !frequencies.iter().all(fits) {
                    return Err(Error::corrupt("frequencies", "a sum of 4096, each below", sum));
                }
                Coding::Modelled(Model { lo, frequencies, escapes })
            }
            3 if second && flags <= 3 && width <= 2 && symbols <= ALIAS_SYMBOLS => {
                streams = 1 << width;
                let frequencies = self.bytes(symbols)?;
                let sum: u32 = frequencies.iter().map(|&f| u32::from(f)).sum();
                if sum != ALIAS_TOTAL || frequencies.iter().any(|&f| u16::from(f) > ALIAS_CEILING) {
                    return Err(Error::corrupt("frequencies", "a sum of 256, each at most 127", sum));
                }
                Coding::Alias(AliasModel { lo, frequencies, escapes })
            }
            4 if version >= 3 && flags <= 1 && lo == 0 && (usize::from(width), symbols) == (4, PALETTE) => {
                Coding::Palette { values: self.take()?, escapes }
            }
            _ => return Err(Error::corrupt("plane", "a known coding", format!("{head:?}"))),
        };
        let with_centroids = with_centroids && coding.is_modelled();
        let centroids = self.bytes(if with_centroids { coding.values() } else { 0 })?;
        Ok(Plane { coding, streams, centroids: centroids.into_iter().map(|c| c as i8).collect() })
    }
}
