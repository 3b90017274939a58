//! The bytes of a packed weight's tables: header, then one description per plane. `docs/format.md` is the specification.

use super::element::{Dtype, Element};
use super::geometry::{CHUNK, Geometry, LANES};
use super::predict::Predictor;
use super::rans::MODEL_TOTAL;
use super::symbols::{Coding, Model};
use crate::{Error, Result};

/// The version this library writes, and the newest that it reads.
pub const FORMAT_VERSION: u16 = 1;
/// Rows and columns lie below this, so that an escape's position fits in 32 bits and no size computation overflows.
pub const MAX_DIMENSION: usize = 1 << 26;
/// Tiles start at multiples of this many bytes, the unit of the directory's offsets.
pub const TILE_ALIGN: usize = 4;

const MAGIC: [u8; 4] = *b"INFW";
const HEADER_BYTES: usize = 48;
const PLANE_BYTES: usize = 8;
const CHECKSUM_AT: usize = 44;

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
    /// In 1/256 of a step, for each value of the model; empty for none.
    pub centroids: Vec<i8>,
}

impl Plane {
    /// How many different symbols the coding can tell apart.
    pub fn alphabet(&self) -> usize {
        match &self.coding {
            Coding::Constant(_) => 1,
            Coding::Plain { width, .. } => 1 << width,
            Coding::Modelled(model) => model.frequencies.len(),
        }
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
}

impl Header {
    pub fn codec(&self) -> Codec {
        let modelled = |plane: &Plane| matches!(plane.coding, Coding::Modelled(_));
        if self.planes.iter().any(modelled) { Codec::Rans } else { Codec::Raw }
    }

    /// The `tables` tensor.
    pub fn to_bytes(&self) -> Vec<u8> {
        let (scale_kind, group) = self.scale_grid.to_bytes();
        let low_bits = match self.element {
            Element::Bits(_) => 0,
            Element::Level { low_bits } => low_bits as u8,
        };
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
            low_bits,
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
        for plane in &self.planes {
            let (coding, width, flags, symbols, lo) = match &plane.coding {
                Coding::Constant(value) => (0, 0, 0, 0, *value),
                Coding::Plain { lo, width } => (1, *width as u8, 0, 0, *lo),
                Coding::Modelled(model) => (
                    2,
                    0,
                    u8::from(model.escapes) | u8::from(!plane.centroids.is_empty()) << 1,
                    // 256 is written as 0, so that a byte is enough.
                    model.frequencies.len() as u8,
                    model.lo,
                ),
            };
            out.extend([coding, width, flags, symbols]);
            out.extend(lo.to_le_bytes());
            if let Coding::Modelled(model) = &plane.coding {
                out.extend(model.frequencies.iter().flat_map(|f| f.to_le_bytes()));
                out.extend(plane.centroids.iter().map(|&c| c as u8));
            }
        }
        let checksum = crc32fast::hash(&out);
        out[CHECKSUM_AT..HEADER_BYTES].copy_from_slice(&checksum.to_le_bytes());
        out
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

        let layout = match layout {
            0 => Layout::Compact,
            other => return Err(Error::corrupt("layout", 0, other)),
        };
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
            (true, 0) => Element::Bits(dtype),
            (false, 0..=8) => Element::Level { low_bits: u32::from(low_bits) },
            _ => return Err(Error::corrupt("low_bits", "0, or up to 8 for levels", low_bits)),
        };
        for (field, value) in [("rows", rows), ("cols", cols)] {
            if value as usize >= MAX_DIMENSION {
                return Err(Error::corrupt(field, format!("below {MAX_DIMENSION}"), value));
            }
        }
        if tile_rows != LANES && tile_rows != 2 * LANES {
            return Err(Error::corrupt("tile_rows", "32 or 64", tile_rows));
        }
        if usize::from(plane_count) != element.planes() {
            return Err(Error::corrupt("plane_count", element.planes(), plane_count));
        }
        let planes = (0..element.planes()).map(|_| reader.plane()).collect::<Result<Vec<_>>>()?;
        if reader.at != bytes.len() {
            return Err(Error::corrupt("tables", format!("{} bytes", reader.at), bytes.len()));
        }
        if predictor != Predictor::None && matches!(&planes[0].coding, Coding::Modelled(m) if m.escapes) {
            return Err(Error::corrupt("predictor", "none beside escapes", predictor as u8));
        }
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
        };
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

    fn plane(&mut self) -> Result<Plane> {
        let head = self.take::<PLANE_BYTES>()?;
        let [coding, width, flags, symbols, ..] = head;
        let lo = i32::from_le_bytes([head[4], head[5], head[6], head[7]]);
        let mut centroids = Vec::new();
        let coding = match coding {
            0 => Coding::Constant(lo),
            1 if (1..=8).contains(&width) => Coding::Plain { lo, width: u32::from(width) },
            2 if flags <= 3 => {
                let symbols = if symbols == 0 { 256 } else { usize::from(symbols) };
                let frequencies =
                    (0..symbols).map(|_| Ok(u16::from_le_bytes(self.take()?))).collect::<Result<Vec<_>>>()?;
                let sum: u32 = frequencies.iter().map(|&f| u32::from(f)).sum();
                let fits = |&f: &u16| u32::from(f) < MODEL_TOTAL;
                if sum != MODEL_TOTAL || !frequencies.iter().all(fits) {
                    return Err(Error::corrupt("frequencies", "a sum of 4096, each below", sum));
                }
                let model = Model { lo, frequencies, escapes: flags & 1 != 0 };
                if flags & 2 != 0 {
                    centroids =
                        (0..model.values()).map(|_| Ok(i8::from_le_bytes(self.take()?))).collect::<Result<Vec<_>>>()?;
                }
                Coding::Modelled(model)
            }
            _ => return Err(Error::corrupt("plane", "a known coding", format!("{head:?}"))),
        };
        Ok(Plane { coding, centroids })
    }
}
