//! Making a packed weight from codes: gather statistics, choose each plane's coding, write the tiles.

use super::decode::{checksum_scales, checksum_words, escape_bytes, step_bytes, stream_head};
use super::element::{Element, Weights};
use super::format::{FORMAT_VERSION, Header, Layout, MAX_DIMENSION, Plane, Quantizer, ScaleGrid, TILE_ALIGN};
use super::geometry::{CHUNK, Geometry, LANES};
use super::predict::Predictor;
use super::rans::Encoder;
use super::symbols::{Coding, Histogram, Model, SYMBOL_TABLE_BITS, model_of_all, plan};
use crate::parallel::{Pool, map};
use crate::{Error, Result};

/// A predictor must save this share of the entropy to be worth its decoding.
const PREDICTOR_GAIN: f64 = 0.995;

/// An owned packed weight.
#[derive(Debug, Clone, PartialEq)]
pub struct Packed {
    pub header: Header,
    pub payload: Vec<u8>,
    pub directory: Vec<i32>,
    pub tables: Vec<u8>,
    /// In the shape of [`ScaleGrid::shape`]. All but a lone one are exact in bf16.
    pub scales: Vec<f32>,
}

impl Packed {
    /// Everything that is stored, scales included.
    pub fn bytes(&self) -> usize {
        let scale_bytes = self.header.scale_grid.bytes_each();
        self.payload.len() + 4 * self.directory.len() + self.tables.len() + scale_bytes * self.scales.len()
    }
}

/// What to encode: one integer code per weight, a row at a time.
pub trait Codes: Sync {
    /// The codes of row `row`.
    fn row(&self, row: usize, out: &mut [u32]);
}

/// What the encoder cannot see from the codes.
pub struct Description {
    pub geometry: Geometry,
    pub element: Element,
    pub quantizer: Quantizer,
    pub scale_grid: ScaleGrid,
    pub scales: Vec<f32>,
    /// For levels whose plane 0 was planned by the quantiser: that plane.
    pub symbols: Option<Plane>,
}

struct Bits<'a> {
    weights: Weights<'a>,
    cols: usize,
}

impl Codes for Bits<'_> {
    fn row(&self, row: usize, out: &mut [u32]) {
        self.weights.bits(row * self.cols, out);
    }
}

/// Checks that `weights` is a `rows` × `cols` matrix that the format can hold.
pub fn check_shape(weights: Weights, rows: usize, cols: usize) -> Result<Geometry> {
    if rows >= MAX_DIMENSION || cols >= MAX_DIMENSION {
        let got = format!("{rows} x {cols}");
        return Err(Error::argument("weight shape", format!("both below {MAX_DIMENSION}"), got));
    }
    if weights.elements() != rows * cols {
        return Err(Error::argument("weight elements", rows * cols, weights.elements()));
    }
    Ok(Geometry::new(rows, cols))
}

/// Packs every bit of a weight. Planes that do not compress are stored plain.
pub fn pack_lossless(weights: Weights, rows: usize, cols: usize, pool: &dyn Pool) -> Result<Packed> {
    let description = Description {
        geometry: check_shape(weights, rows, cols)?,
        element: Element::Bits(weights.dtype()),
        quantizer: Quantizer::Lossless,
        scale_grid: ScaleGrid::None,
        scales: Vec::new(),
        symbols: None,
    };
    encode(&Bits { weights, cols }, weights, description, pool)
}

/// Encodes `codes`, which stand for `weights`.
pub fn encode(codes: &dyn Codes, weights: Weights, description: Description, pool: &dyn Pool) -> Result<Packed> {
    let Description { geometry, element, quantizer, scale_grid, scales, symbols } = description;
    let tile_codes = |tile: usize| {
        let mut out = vec![0; geometry.rows_of(tile).len() * geometry.cols];
        for (row, out) in geometry.rows_of(tile).zip(out.chunks_exact_mut(geometry.cols)) {
            codes.row(row, out);
        }
        out
    };

    let planned = usize::from(symbols.is_some());
    let histograms = byte_histograms(geometry, element, planned, &tile_codes, pool);
    let planes = histograms.iter().enumerate().map(|(index, histogram)| Plane {
        coding: plan(histogram, element.plane_width(planned + index)).coding,
        centroids: Vec::new(),
    });
    let mut planes: Vec<Plane> = symbols.into_iter().chain(planes).collect();
    let predictor = choose_predictor(&mut planes[0], geometry, element, &tile_codes, pool);

    let mut header = Header {
        version: FORMAT_VERSION,
        layout: Layout::Compact,
        dtype: weights.dtype(),
        quantizer,
        predictor,
        geometry,
        scale_grid,
        element,
        planes,
        directory_crc: 0,
        scales_crc: checksum_scales(&scales),
    };
    let tiles = map(pool, geometry.tiles(), |tile| encode_tile(&header, tile, &tile_codes(tile)));
    let mut payload = Vec::with_capacity(tiles.iter().map(Vec::len).sum());
    let mut directory = Vec::with_capacity(2 * tiles.len());
    for tile in tiles {
        let offset = u32::try_from(payload.len() / TILE_ALIGN)
            .map_err(|_| Error::argument("packed size", "at most 16 GiB", payload.len()))?;
        directory.extend([offset as i32, crc32fast::hash(&tile) as i32]);
        payload.extend(tile);
    }
    header.directory_crc = checksum_words(&directory);
    Ok(Packed { tables: header.to_bytes(), header, payload, directory, scales })
}

/// One histogram of byte values for each plane from `first` on.
fn byte_histograms(
    geometry: Geometry,
    element: Element,
    first: usize,
    tile_codes: &(dyn Fn(usize) -> Vec<u32> + Sync),
    pool: &dyn Pool,
) -> Vec<Histogram> {
    let planes = element.planes() - first;
    let per_tile = map(pool, geometry.tiles(), |tile| {
        let mut counts = vec![[0u32; 256]; planes];
        for code in tile_codes(tile) {
            for (plane, counts) in counts.iter_mut().enumerate() {
                counts[element.split(code, first + plane) as usize & 0xff] += 1;
            }
        }
        counts
    });
    let mut total = vec![Histogram { lo: 0, counts: vec![0; 256], outside: 0 }; planes];
    for counts in per_tile {
        for (total, counts) in total.iter_mut().zip(counts) {
            let pairs = total.counts.iter_mut().zip(counts);
            pairs.for_each(|(total, count)| *total += u64::from(count));
        }
    }
    total
}

/// The symbols of a tile's plane 0, row-major, and its escapes as (row, column, value).
fn tile_symbols(
    model: &Model,
    element: Element,
    plane: usize,
    codes: &[u32],
    cols: usize,
) -> (Vec<u8>, Vec<(usize, usize, i32)>) {
    let escape = model.frequencies.len() - 1;
    let mut escapes = Vec::new();
    let symbols = codes.iter().enumerate().map(|(index, &code)| {
        let value = element.split(code, plane);
        let symbol = model.symbol(value).unwrap_or_else(|| {
            escapes.push((index / cols, index % cols, value));
            escape
        });
        symbol as u8
    });
    (symbols.collect(), escapes)
}

/// Measures every predictor on plane 0 and changes its model to the best one's, if that saves anything.
fn choose_predictor(
    plane: &mut Plane,
    geometry: Geometry,
    element: Element,
    tile_codes: &(dyn Fn(usize) -> Vec<u32> + Sync),
    pool: &dyn Pool,
) -> Predictor {
    // The alphabet that residuals are taken in.
    let model = match &plane.coding {
        Coding::Modelled(model) if !model.escapes => model.clone(),
        Coding::Plain { lo, width } => Model { lo: *lo, frequencies: vec![1; 1 << width], escapes: false },
        _ => return Predictor::None,
    };
    let histograms = predictor_histograms(&model, geometry, element, tile_codes, pool);
    let bits: Vec<f64> = histograms.iter().map(Histogram::entropy).collect();
    let best = (0..bits.len()).min_by(|&a, &b| bits[a].total_cmp(&bits[b]));
    // Where the plane was plain, a model comes with it: its table, and states and a head for each tile.
    let stream_bits = (8 * (4 * LANES + 4) * geometry.tiles()) as f64;
    let model_bits = SYMBOL_TABLE_BITS * model.frequencies.len() as f64 + stream_bits;
    let pays = |best: &usize| {
        let saved = (bits[0] - bits[*best]) * geometry.elements() as f64;
        bits[*best] < PREDICTOR_GAIN * bits[0] && saved > model_bits
    };
    let Some(best) = best.filter(pays) else {
        return Predictor::None;
    };
    plane.coding = model_of_all(&histograms[best].counts, model.lo);
    Predictor::ALL[best]
}

/// The histogram of each predictor's residuals, in the order of [`Predictor::ALL`].
fn predictor_histograms(
    model: &Model,
    geometry: Geometry,
    element: Element,
    tile_codes: &(dyn Fn(usize) -> Vec<u32> + Sync),
    pool: &dyn Pool,
) -> Vec<Histogram> {
    let alphabet = model.frequencies.len();
    let per_tile = map(pool, geometry.tiles(), |tile| {
        let (symbols, _) = tile_symbols(model, element, 0, &tile_codes(tile), geometry.cols);
        Predictor::ALL.map(|predictor| {
            let mut counts = [0u32; 256];
            for residual in predictor.residuals(&symbols, geometry.cols, alphabet) {
                counts[usize::from(residual)] += 1;
            }
            counts
        })
    });
    (0..Predictor::ALL.len())
        .map(|predictor| {
            let count = |symbol: usize| per_tile.iter().map(|tile| u64::from(tile[predictor][symbol])).sum();
            Histogram { lo: 0, counts: (0..alphabet).map(count).collect(), outside: 0 }
        })
        .collect()
}

fn encode_tile(header: &Header, tile: usize, codes: &[u32]) -> Vec<u8> {
    let geometry = header.geometry;
    let first_row = geometry.rows_of(tile).start;
    let mut out = Vec::new();
    for (index, plane) in header.planes.iter().enumerate() {
        match &plane.coding {
            Coding::Constant(_) => {}
            Coding::Plain { lo, width } => {
                for shape in geometry.blocks(tile) {
                    for col in shape.col..shape.col + shape.cols {
                        let value = |lane: usize| {
                            let row = shape.row - first_row + lane;
                            let value = header.element.split(codes[row * geometry.cols + col], index);
                            value.wrapping_sub(*lo) as u8
                        };
                        pack_step((0..shape.lanes).map(value), *width, &mut out);
                    }
                }
            }
            Coding::Modelled(model) => {
                let (mut symbols, escapes) = tile_symbols(model, header.element, index, codes, geometry.cols);
                if index == 0 && header.predictor != Predictor::None {
                    symbols = header.predictor.residuals(&symbols, geometry.cols, model.frequencies.len());
                }
                write_model(&mut out, geometry, tile, model, &symbols, escapes);
            }
        }
    }
    out.resize(out.len().next_multiple_of(TILE_ALIGN), 0);
    out
}

/// A modelled plane of a tile: head, lane states, words, escapes in stream order.
fn write_model(
    out: &mut Vec<u8>,
    geometry: Geometry,
    tile: usize,
    model: &Model,
    symbols: &[u8],
    mut escapes: Vec<(usize, usize, i32)>,
) {
    let first_row = geometry.rows_of(tile).start;
    let intervals = model.intervals();
    let mut encoder = Encoder::new(symbols.len() / 2);
    for shape in geometry.blocks(tile).rev() {
        for col in (shape.col..shape.col + shape.cols).rev() {
            let interval = |lane: usize| {
                let symbol = symbols[(shape.row - first_row + lane) * geometry.cols + col];
                (lane, intervals[usize::from(symbol)])
            };
            encoder.step((0..shape.lanes).map(interval));
        }
    }
    let (states, words) = encoder.finish(geometry.lanes_of(tile));
    out.extend(stream_head(words.len() / 2, !escapes.is_empty()));
    out.extend(states);
    out.extend(words);
    if !escapes.is_empty() {
        escapes.sort_by_key(|&(row, col, _)| (col / CHUNK, row / LANES, col, row));
        out.extend((escapes.len() as u32).to_le_bytes());
        out.extend(escapes.into_iter().flat_map(|(row, col, value)| escape_bytes(col, row, value)));
    }
}

/// A step of plain bits, least significant first, padded to a byte.
fn pack_step(values: impl ExactSizeIterator<Item = u8>, width: u32, out: &mut Vec<u8>) {
    let start = out.len();
    out.resize(start + step_bytes(values.len(), width), 0);
    for (lane, value) in values.enumerate() {
        let bit = lane * width as usize;
        let shifted = u16::from(value) << (bit % 8);
        out[start + bit / 8] |= shifted as u8;
        if shifted > 0xff {
            out[start + bit / 8 + 1] |= (shifted >> 8) as u8;
        }
    }
}
