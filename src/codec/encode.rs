//! Making a packed weight from codes: gather statistics, choose each plane's coding, write the tiles.

use std::ops::Range;

use super::alias::{AliasCodes, AliasDecoder, AliasEncoder};
use super::arch::per_isa;
use super::decode::{PackedWeight, checksum_scales, checksum_words};
use super::element::{Dtype, Element, Weights, swap_bf16};
use super::format::{Header, Layout, MAX_DIMENSION, Plane, Quantizer, ScaleGrid, TILE_ALIGN};
use super::geometry::{BLOCK, Geometry, LANES};
use super::predict::Predictor;
use super::rans::{self, Encoder};
use super::stream::{LaneDecoder, pack_step, sort_escapes, write_coded, write_escapes};
use super::symbols::{
    ALIAS_PREMIUM, Coding, Histogram, Plan, SYMBOL_TABLE_BITS, model_of_all, plan, plan_alias, streams,
};
use crate::parallel::{DisjointSlice, Pool, map, map_with};
use crate::{Error, Result};

/// A predictor must save this share of the entropy to be worth its decoding.
const PREDICTOR_GAIN: f64 = 0.995;
/// Larger weights are looked at by a sample of about so many elements first.
const PREDICTOR_SAMPLE: usize = 1 << 20;

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

/// What to encode: one integer code per weight, some rows at a time.
pub trait Codes: Sync {
    /// The codes of the rows of a tile.
    fn rows(&self, rows: Range<usize>, out: &mut [u32]);
}

/// What the encoder cannot see from the codes.
#[derive(Clone)]
pub struct Description {
    pub geometry: Geometry,
    pub element: Element,
    pub quantizer: Quantizer,
    pub scale_grid: ScaleGrid,
    pub scales: Vec<f32>,
    /// For levels whose plane 0 was planned by the quantiser: that plan, and the centroids.
    pub symbols: Option<(Plan, Vec<i8>)>,
}

struct Bits<'a> {
    weights: Weights<'a>,
    cols: usize,
}

impl Codes for Bits<'_> {
    fn rows(&self, rows: Range<usize>, out: &mut [u32]) {
        self.weights.bits(rows.start * self.cols, out);
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
    let (geometry, element) = (description.geometry, description.element);
    let tile_codes = |tile: usize| codes_of(codes, geometry, tile);
    let planned = usize::from(description.symbols.is_some());
    let histograms = byte_histograms(geometry, element, planned, &tile_codes, pool);
    let scales = description.scales.clone();
    let header = plan_header(description, weights.dtype(), &histograms, &tile_codes, pool);
    encode_as(header, codes, scales, pool)
}

/// Chooses each plane's coding. `histograms` are of the planes that are not planned yet; `tile_codes` gives the codes of a
/// tile, if a predictor may pay.
pub fn plan_header(
    description: Description,
    dtype: Dtype,
    histograms: &[Histogram],
    tile_codes: &(dyn Fn(usize) -> Vec<u32> + Sync),
    pool: &dyn Pool,
) -> Header {
    let Description { geometry, element, quantizer, scale_grid, scales, symbols } = description;
    let planned = usize::from(symbols.is_some());
    let mut plans: Vec<Plan> = (planned..element.planes())
        .zip(histograms)
        .map(|(plane, histogram)| plan(histogram, element.plane_width(plane)))
        .collect();
    let mut allowance = ALIAS_PREMIUM * plans.iter().map(|plan| plan.bits).sum::<f64>();
    for (plan, histogram) in plans.iter_mut().zip(histograms).filter(|(plan, _)| plan.coding.is_modelled()) {
        if let Some(alias) = plan_alias(histogram).filter(|alias| alias.bits <= plan.bits + allowance) {
            allowance -= alias.bits - plan.bits;
            *plan = alias;
        }
    }
    let (symbols, centroids) = symbols.unzip();
    let plans: Vec<Plan> = symbols.into_iter().chain(plans).collect();
    let bits = plans.iter().map(|plan| plan.bits).sum();
    let plane = |plan: Plan| Plane {
        streams: streams(&plan.coding, geometry, bits),
        coding: plan.coding,
        centroids: Vec::new(),
    };
    let mut planes: Vec<Plane> = plans.into_iter().map(plane).collect();
    planes[0].centroids = centroids.unwrap_or_default();
    let predictor = choose_predictor(&mut planes[0], geometry, element, tile_codes, pool);
    Header {
        version: Layout::Compact.version(),
        layout: Layout::Compact,
        dtype,
        quantizer,
        predictor,
        geometry,
        scale_grid,
        element,
        planes,
        directory_crc: 0,
        scales_crc: checksum_scales(&scales),
        origin: None,
    }
}

fn codes_of(codes: &dyn Codes, geometry: Geometry, tile: usize) -> Vec<u32> {
    let rows = geometry.rows_of(tile);
    let mut out = vec![0; rows.len() * geometry.cols];
    codes.rows(rows, &mut out);
    out
}

/// Encodes `codes` as a header says.
pub fn encode_as(header: Header, codes: &dyn Codes, scales: Vec<f32>, pool: &dyn Pool) -> Result<Packed> {
    let geometry = header.geometry;
    let tiles = map(pool, geometry.tiles(), |tile| encode_tile(&header, tile, &codes_of(codes, geometry, tile)));
    join(header, tiles, scales, pool)
}

/// Puts tiles one after another.
fn join(mut header: Header, tiles: Vec<Vec<u8>>, scales: Vec<f32>, pool: &dyn Pool) -> Result<Packed> {
    let mut starts = Vec::with_capacity(tiles.len());
    let mut size = 0;
    for tile in &tiles {
        starts.push(size);
        size += tile.len();
    }
    if u32::try_from(size / TILE_ALIGN).is_err() {
        return Err(Error::argument("packed size", "at most 16 GiB", size));
    }
    let mut payload = vec![0; size];
    let places = DisjointSlice::new(&mut payload);
    let checksums = map(pool, tiles.len(), |tile| {
        let bytes = &tiles[tile];
        // SAFETY: tiles lie one after another.
        #[allow(unsafe_code)]
        let place = unsafe { places.range_mut(starts[tile]..starts[tile] + bytes.len()) };
        place.copy_from_slice(bytes);
        crc32fast::hash(bytes)
    });
    let entries = starts.iter().zip(checksums);
    let directory: Vec<i32> =
        entries.flat_map(|(start, checksum)| [(start / TILE_ALIGN) as u32 as i32, checksum as i32]).collect();
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

/// An escape: column, row in the tile, value.
type Escape = (usize, usize, i32);

/// The symbols of a tile's plane, row-major, and its escapes in stream order.
fn tile_symbols(coding: &Coding, element: Element, plane: usize, codes: &[u32], cols: usize) -> (Vec<u8>, Vec<Escape>) {
    let filler = coding.filler();
    let (lo, values) = (coding.lo(), if coding.is_gapless() { coding.values() } else { 0 });
    let mut escapes = Vec::new();
    let mut symbols = vec![0; codes.len()];
    for (run, (codes, symbols)) in codes.chunks(BLOCK).zip(symbols.chunks_mut(BLOCK)).enumerate() {
        let mut most = 0;
        element.split_all(codes, plane, lo, symbols, &mut most);
        if (most as usize) < values {
            continue;
        }
        for ((index, symbol), &code) in (run * BLOCK..).zip(symbols).zip(codes) {
            let value = element.split(code, plane);
            *symbol = coding.symbol(value).unwrap_or_else(|| {
                escapes.push((index % cols, index / cols, value));
                filler
            });
        }
    }
    sort_escapes(&mut escapes);
    (symbols, escapes)
}

/// Row-major symbols of a tile in stream order, `[block][column][lane of 32]`.
fn to_blocks(geometry: Geometry, tile: usize, symbols: &[u8]) -> Vec<u8> {
    let first_row = geometry.rows_of(tile).start;
    let mut out = vec![0; geometry.blocks(tile).map(|block| block.cols * LANES).sum()];
    let mut rest = &mut out[..];
    for shape in geometry.blocks(tile) {
        let (block, after) = rest.split_at_mut(shape.cols * LANES);
        for lane in 0..shape.lanes {
            let row = &symbols[(shape.row - first_row + lane) * geometry.cols + shape.col..][..shape.cols];
            block.iter_mut().skip(lane).step_by(LANES).zip(row).for_each(|(to, &symbol)| *to = symbol);
        }
        rest = after;
    }
    out
}

/// The inverse of [`to_blocks`].
fn from_blocks(geometry: Geometry, tile: usize, symbols: &[u8]) -> Vec<u8> {
    let rows = geometry.rows_of(tile);
    let mut out = vec![0; rows.len() * geometry.cols];
    let mut rest = symbols;
    for shape in geometry.blocks(tile) {
        let (block, after) = rest.split_at(shape.cols * LANES);
        for lane in 0..shape.lanes {
            let row = &mut out[(shape.row - rows.start + lane) * geometry.cols + shape.col..][..shape.cols];
            row.iter_mut().zip(block.iter().skip(lane).step_by(LANES)).for_each(|(to, &symbol)| *to = symbol);
        }
        rest = after;
    }
    out
}

/// Measures every predictor on plane 0 and changes its model to the best one's, if that saves anything.
fn choose_predictor(
    plane: &mut Plane,
    geometry: Geometry,
    element: Element,
    tile_codes: &(dyn Fn(usize) -> Vec<u32> + Sync),
    pool: &dyn Pool,
) -> Predictor {
    if plane.coding.escapes() || plane.coding.values() < 2 {
        return Predictor::None;
    }
    // The alphabet that residuals are taken in.
    let alphabet = plane.coding.values();
    // Where the plane was plain, a model comes with it: its table, and states and a head for each tile.
    let stream_bits = (8 * (4 * LANES + 4) * geometry.tiles()) as f64;
    let model_bits = SYMBOL_TABLE_BITS * alphabet as f64 + stream_bits;
    // By every `every`th tile: the best predictor and its model, if it pays.
    let best = |every: usize| {
        let histograms = predictor_histograms(&plane.coding, geometry, element, every, tile_codes, pool);
        let bits: Vec<f64> = histograms.iter().map(Histogram::entropy).collect();
        let best = (0..bits.len()).min_by(|&a, &b| bits[a].total_cmp(&bits[b]))?;
        let saved = (bits[0] - bits[best]) * geometry.elements() as f64;
        let pays = bits[best] < PREDICTOR_GAIN * bits[0] && saved > model_bits;
        pays.then(|| (Predictor::ALL[best], model_of_all(&histograms[best].counts, plane.coding.lo())))
    };
    // Hardly any weight has one that pays, and a sample shows it.
    let every = (geometry.elements() / PREDICTOR_SAMPLE).clamp(1, geometry.tiles().max(1));
    let found = best(every).and_then(|found| if every == 1 { Some(found) } else { best(1) });
    let Some((predictor, model)) = found else {
        return Predictor::None;
    };
    plane.coding = model;
    plane.streams = 1;
    predictor
}

/// The histogram of each predictor's residuals in every `every`th tile, in the order of [`Predictor::ALL`].
fn predictor_histograms(
    coding: &Coding,
    geometry: Geometry,
    element: Element,
    every: usize,
    tile_codes: &(dyn Fn(usize) -> Vec<u32> + Sync),
    pool: &dyn Pool,
) -> Vec<Histogram> {
    let alphabet = coding.values();
    let per_tile = map(pool, geometry.tiles().div_ceil(every), |index| {
        let (symbols, _) = tile_symbols(coding, element, 0, &tile_codes(index * every), geometry.cols);
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
    let mut out = Vec::new();
    for (index, plane) in header.planes.iter().enumerate() {
        if let Coding::Constant(_) = plane.coding {
            continue;
        }
        let (mut symbols, escapes) = tile_symbols(&plane.coding, header.element, index, codes, geometry.cols);
        if index == 0 && header.predictor != Predictor::None {
            symbols = header.predictor.residuals(&symbols, geometry.cols, plane.coding.values());
        }
        write_plane(&mut out, plane, geometry, tile, &to_blocks(geometry, tile, &symbols), &escapes);
    }
    out.resize(out.len().next_multiple_of(TILE_ALIGN), 0);
    out
}

/// Writes a tile's plane: `symbols` and `escapes` in stream order.
fn write_plane(out: &mut Vec<u8>, plane: &Plane, geometry: Geometry, tile: usize, symbols: &[u8], escapes: &[Escape]) {
    let lanes = geometry.lanes_of(tile);
    match (&plane.coding, plane.coding.plain_width()) {
        (coding, Some(width)) => {
            let mut blocks = symbols;
            for shape in geometry.blocks(tile) {
                let (block, rest) = blocks.split_at(shape.cols * LANES);
                if width == 8 && shape.lanes == LANES {
                    out.extend_from_slice(block);
                } else if width == 4 && shape.lanes == LANES {
                    out.extend(block.as_chunks::<2>().0.iter().map(|[first, second]| first | second << 4));
                } else {
                    block.chunks_exact(LANES).for_each(|step| pack_step(&step[..shape.lanes], width, out));
                }
                blocks = rest;
            }
            if coding.escapes() {
                write_escapes(out, escapes);
            }
        }
        (Coding::Modelled(model), None) => {
            let intervals = model.intervals();
            let streams = coded_streams(plane.streams, geometry, tile, symbols, |blocks, capacity| {
                let mut encoder = Encoder::new(capacity);
                blocks.for_each(|(lanes, block)| encoder.block(&intervals, block, *lanes));
                encoder.finish(lanes)
            });
            write_coded(out, &streams, rans::Decoder::WORD_BYTES, escapes);
        }
        (Coding::Alias(model), None) => {
            let codes = AliasCodes::new(&model.frequencies);
            let streams = coded_streams(plane.streams, geometry, tile, symbols, |blocks, capacity| {
                let mut encoder = AliasEncoder::new(&codes, capacity);
                blocks.for_each(|(lanes, block)| encoder.block(block, *lanes));
                encoder.finish(lanes)
            });
            write_coded(out, &streams, AliasDecoder::WORD_BYTES, escapes);
        }
        _ => {}
    }
}

/// Calls `encode` for each stream with its blocks (lanes and symbols), the last one first, and how many symbols there are.
fn coded_streams(
    count: usize,
    geometry: Geometry,
    tile: usize,
    symbols: &[u8],
    encode: impl Fn(&mut dyn Iterator<Item = &(usize, &[u8])>, usize) -> (Vec<u8>, Vec<u8>),
) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut start = 0;
    let blocks: Vec<_> = geometry
        .blocks(tile)
        .map(|shape| {
            let block = &symbols[start..start + shape.cols * LANES];
            start += block.len();
            (shape.lanes, block)
        })
        .collect();
    let stream = |stream: usize| {
        let own = || blocks.iter().skip(stream).step_by(count).rev();
        encode(&mut own(), own().map(|(_, block)| block.len()).sum())
    };
    (0..count).map(stream).collect()
}

/// The same weight in another layout, exactly: each plane's values are looked up in the coding that it has there. From the
/// canonical form and back gives the same bytes. The scales stay as they are, and are not in the result.
pub fn lay_out(weight: &PackedWeight, layout: Layout, pool: &dyn Pool) -> Result<Packed> {
    let from = &weight.header;
    let header = match (&from.origin, layout) {
        (Some(origin), Layout::Compact) => (**origin).clone(),
        (None, Layout::Fast) => fast(from),
        _ => from.clone(),
    };
    let scratch = || header.planes.iter().map(|_| (Vec::new(), Vec::new())).collect();
    let tiles =
        map_with(pool, header.geometry.tiles(), scratch, |scratch, tile| move_tile(weight, &header, tile, scratch));
    join(header, tiles.into_iter().collect::<Result<_>>()?, Vec::new(), pool)
}

/// The header of a canonical form's fast twin.
fn fast(canonical: &Header) -> Header {
    let flat = |(index, plane): (usize, &Plane)| {
        let coding = match canonical.predictor {
            // The model is of differences: any value may be as frequent as any other.
            predictor if index == 0 && predictor != Predictor::None => {
                let width = plane.coding.values().next_power_of_two().ilog2();
                Coding::Plain { lo: plane.coding.lo(), width, escapes: false }
            }
            _ if canonical.element != Element::Bits(Dtype::Bf16) => plane.coding.flattened(),
            _ if index == 0 => plane.coding.flattened_with_sign(),
            _ => Coding::Plain { lo: 0, width: 8, escapes: false },
        };
        Plane { coding, streams: 1, centroids: Vec::new() }
    };
    Header {
        version: Layout::Fast.version(),
        layout: Layout::Fast,
        predictor: Predictor::None,
        element: match canonical.element {
            Element::Bits(Dtype::Bf16) => Element::SwappedBf16,
            other => other,
        },
        planes: canonical.planes.iter().enumerate().map(flat).collect(),
        origin: Some(Box::new(canonical.clone())),
        ..canonical.clone()
    }
}

/// `planes` are each plane's symbols and escapes, from the tile before.
fn move_tile(
    weight: &PackedWeight,
    to: &Header,
    tile: usize,
    planes: &mut Vec<(Vec<u8>, Vec<Escape>)>,
) -> Result<Vec<u8>> {
    let geometry = to.geometry;
    for (symbols, escapes) in planes.iter_mut() {
        symbols.clear();
        escapes.clear();
    }
    let is_bytes = to.element.float().is_some();
    let recodings: Vec<_> = to.planes.iter().map(|plane| Recoding::new(&plane.coding, is_bytes)).collect();
    let mut decoder = weight.tile(tile)?;
    let mut unpacked = [0; BLOCK];
    let mut start = 0;
    while let Some(shape) = decoder.next_block() {
        let mut los: Vec<i32> = Vec::with_capacity(planes.len());
        for (index, (symbols, _)) in planes.iter_mut().enumerate() {
            let (lo, from) = decoder.plane(index, &mut unpacked);
            symbols.extend_from_slice(&from[..shape.cols * LANES]);
            los.push(lo);
        }
        if weight.header.element != to.element
            && let [(first, _), (second, _)] = &mut planes[..]
        {
            // From symbols to bytes, which are swapped.
            for (bytes, lo) in [&mut *first, &mut *second].into_iter().zip(&mut los) {
                shift(&mut bytes[start..], *lo as u8, &mut 0);
                *lo = 0;
            }
            swap_bf16(&mut first[start..], &mut second[start..]);
        }
        for (index, (symbols, escapes)) in planes.iter_mut().enumerate() {
            let far = if index == 0 { decoder.far() } else { &[] };
            recodings[index].run(&mut symbols[start..], los[index], far, shape.lanes, |index, value| {
                let row = shape.row - geometry.rows_of(tile).start + index % LANES;
                escapes.push((shape.col + index / LANES, row, value));
            });
        }
        start += shape.cols * LANES;
    }
    let mut out = Vec::with_capacity(2 * start);
    for (index, (plane, (symbols, escapes))) in to.planes.iter().zip(planes).enumerate() {
        if index == 0 && to.predictor != Predictor::None {
            let rows = from_blocks(geometry, tile, symbols);
            let residuals = to.predictor.residuals(&rows, geometry.cols, plane.coding.values());
            *symbols = to_blocks(geometry, tile, &residuals);
        }
        write_plane(&mut out, plane, geometry, tile, symbols, escapes);
    }
    out.resize(out.len().next_multiple_of(TILE_ALIGN), 0);
    Ok(out)
}

per_isa! {
    /// Adds `change` to bytes, modulo 256, and raises `most` to the largest result.
    fn shift(bytes: &mut [u8], change: u8, most: &mut u8) {
        for byte in bytes.iter_mut() {
            *byte = byte.wrapping_add(change);
            *most = (*most).max(*byte);
        }
    }
}

/// What turns a block's symbols of one coding into those of another.
struct Recoding<'a> {
    to: &'a Coding,
    /// Where values are bytes: the symbol of each.
    symbols: Option<[Option<u8>; 256]>,
}

impl<'a> Recoding<'a> {
    fn new(to: &'a Coding, is_bytes: bool) -> Self {
        Self { to, symbols: is_bytes.then(|| std::array::from_fn(|value| to.symbol(value as i32))) }
    }

    /// `lo` is the value of symbol 0 before. `far` lists levels that no symbol says; `escape` takes those, and any other
    /// value, that the new coding has none for.
    fn run(&self, symbols: &mut [u8], lo: i32, far: &[(usize, i32)], lanes: usize, mut escape: impl FnMut(usize, i32)) {
        let change = lo.wrapping_sub(self.to.lo()) as u8;
        let mut most = 0;
        shift(symbols, change, &mut most);
        if far.is_empty() && lanes == LANES && usize::from(most) < self.to.values() && self.to.is_gapless() {
            return;
        }
        shift(symbols, change.wrapping_neg(), &mut most);
        let filler = self.to.filler();
        let mut far = far.iter().peekable();
        for (index, symbol) in symbols.iter_mut().enumerate().filter(|(index, _)| index % LANES < lanes) {
            let (value, found) = if let Some(table) = &self.symbols {
                let value = (lo as u8).wrapping_add(*symbol);
                (i32::from(value), table[usize::from(value)])
            } else {
                let far = far.next_if(|(place, _)| *place == index);
                let value = far.map_or_else(|| lo.wrapping_add(i32::from(*symbol)), |&(_, value)| value);
                (value, self.to.symbol(value))
            };
            *symbol = found.unwrap_or_else(|| {
                escape(index, value);
                filler
            });
        }
    }
}
