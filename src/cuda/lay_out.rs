//! Laying weights out on the device: the canonical form's planes are decoded to codes there, and these are encoded in the
//! layout that the host chooses by how often they occur. What comes out is what [`super::weight::to_device`] makes on the host,
//! byte for byte.
#![allow(unsafe_code)] // launches

use std::ffi::c_void;
use std::ops::Range;

use super::launch::{self, Launch};
use super::params::{Decode, Histogram, LayOut, Plane};
use super::weight::{Counts, EXPONENTS, Kind, LEVELS, Parts, Tables, WINDOW, choose, escape_starts, front};
use crate::Result;
use crate::codec::{self, Assembly, Coding, Dtype, Element, Header, Layout, Predictor, Table};

/// Warps of a tile where there are plain bits, which can be read in any order.
const PLAIN_WORKERS: usize = 4;
/// Counts of bfloat16s: exponents, then signs with mantissas.
const BYTE_COUNTS: usize = 2 * EXPONENTS;

/// A device's memory, and what is launched there, one after another.
pub trait Device {
    type Memory;

    /// Memory that begins at a multiple of 16 bytes, `bytes` long.
    fn allocate(&self, bytes: usize) -> Result<Self::Memory>;
    fn address(&self, memory: &Self::Memory) -> *mut u8;
    /// Copies bytes to `memory` from byte `at` on.
    fn write(&self, memory: &Self::Memory, at: usize, bytes: &[u8]) -> Result<()>;
    /// Bytes of `memory` when all that was launched has run.
    fn read(&self, memory: &Self::Memory, bytes: Range<usize>) -> Result<Vec<u8>>;
    /// # Safety
    /// What the parameters point to is memory of this device, of the sizes that they say.
    unsafe fn launch<P>(&self, launch: Launch<P>) -> Result<()>;

    fn upload(&self, bytes: &[u8]) -> Result<Self::Memory> {
        let memory = self.allocate(bytes.len())?;
        self.write(&memory, 0, bytes)?;
        Ok(memory)
    }
}

/// The payload and the directory of a weight in its canonical form, in a device's memory.
#[derive(Debug, Clone, Copy)]
pub struct Source {
    pub payload: *const u8,
    pub payload_bytes: usize,
    /// Two words for each tile.
    pub directory: *const i32,
}

/// Codes in a device's memory, a row after the other: bits of bfloat16s as u16, or levels as i32.
pub struct Codes<M> {
    pub memory: M,
    pub levels: bool,
}

impl<M> Codes<M> {
    /// Some of the codes, as the codec has them.
    pub fn read<D: Device<Memory = M>>(&self, device: &D, range: Range<usize>) -> Result<Vec<u32>> {
        let size = if self.levels { size_of::<i32>() } else { size_of::<u16>() };
        let bytes = device.read(&self.memory, range.start * size..range.end * size)?;
        Ok(if self.levels {
            bytes.as_chunks().0.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect()
        } else {
            bytes.as_chunks().0.iter().map(|&bytes| u32::from(u16::from_le_bytes(bytes))).collect()
        })
    }
}

fn is_level(header: &Header) -> bool {
    matches!(header.element, Element::Level { .. })
}

/// Whether this is done on the device: not for the fast layout, and not where a predictor makes the rows of a tile wait for
/// one another. Both are laid out on the host.
pub fn takes(header: &Header) -> bool {
    let has_codes = is_level(header) || header.element == Element::Bits(Dtype::Bf16);
    let is_canonical = header.layout == Layout::Compact && header.predictor == Predictor::None;
    has_codes && is_canonical && header.geometry.elements() > 0
}

/// How the kernels see a plane.
fn view(plane: &codec::Plane) -> Plane {
    let coding = &plane.coding;
    let (number, width) = match coding {
        Coding::Modelled(_) => (1, 0),
        Coding::Alias(_) => (2, 0),
        _ => (0, coding.plain_width().unwrap_or(0) as i32),
    };
    let escapes = (number == 0 && coding.escapes()).into();
    Plane { coding: number, width, streams: plane.streams as i32, escapes, lo: coding.lo() }
}

pub(super) fn words(words: impl IntoIterator<Item = u32>) -> Vec<u8> {
    words.into_iter().flat_map(u32::to_le_bytes).collect()
}

/// The codes of a weight that [`takes`] says yes to; None for a damaged one.
///
/// # Safety
/// `source` is in the device's memory, with two words of directory for each tile.
pub unsafe fn decode<D: Device>(device: &D, source: Source, header: &Header) -> Result<Option<Codes<D::Memory>>> {
    let (geometry, levels) = (header.geometry, is_level(header));
    let bytes = if levels { size_of::<i32>() } else { size_of::<u16>() };
    let codes = device.allocate(geometry.elements() * bytes)?;
    let damage = device.upload(&[0; size_of::<u64>()])?;
    let mut before = Plane::default();
    for (index, plane) in header.planes.iter().enumerate() {
        let slots = device.upload(&words(Table::new(&plane.coding).slots()))?;
        let parameters = Decode {
            payload: source.payload,
            payload_bytes: source.payload_bytes as u64,
            directory: source.directory.cast(),
            slots: device.address(&slots).cast(),
            codes: device.address(&codes).cast(),
            damage: device.address(&damage).cast(),
            before,
            own: view(plane),
            plane: index as i32,
            workers: if plane.coding.is_modelled() { plane.streams } else { PLAIN_WORKERS } as i32,
            low_bits: header.element.low_bits() as i32,
            tile_rows: geometry.tile_rows as i32,
            rows: geometry.rows as i32,
            cols: geometry.cols as i32,
        };
        // SAFETY: a code for each weight, a slot for each that a state may name; the rest is the caller's promise.
        unsafe { device.launch(launch::decode(parameters, geometry.tiles(), levels)) }?;
        before = parameters.own;
    }
    let is_whole = device.read(&damage, 0..size_of::<u64>())?.iter().all(|&byte| byte == 0);
    Ok(is_whole.then_some(Codes { memory: codes, levels }))
}

/// How often each byte of bfloat16s occurs, exponents first, or each level within [`super::weight::FARTHEST`] and all others.
pub fn histogram<D: Device>(device: &D, codes: &Codes<D::Memory>, count: usize) -> Result<Vec<u64>> {
    let places = if codes.levels { LEVELS + 1 } else { BYTE_COUNTS };
    let zeros = vec![0; places * size_of::<u64>()];
    let counts = device.upload(&zeros)?;
    let parameters = Histogram {
        codes: device.address(&codes.memory).cast(),
        count: count as u64,
        counts: device.address(&counts).cast(),
    };
    // SAFETY: so many codes, and a count for each place.
    unsafe { device.launch(launch::histogram(parameters, codes.levels)) }?;
    let bytes = device.read(&counts, 0..zeros.len())?;
    Ok(bytes.as_chunks().0.iter().map(|&bytes| u64::from_le_bytes(bytes)).collect())
}

/// The payload for codes in a layout; `header` is that of the canonical form.
pub fn encode<D: Device>(
    device: &D,
    codes: &Codes<D::Memory>,
    header: &Header,
    (kind, lo): (Kind, i32),
) -> Result<D::Memory> {
    let geometry = header.geometry;
    let parts = Parts::new(kind, geometry.rows, geometry.cols);
    let assembly = Assembly::new(header);
    let (first_centroid, centroids) = assembly.centroids();
    let points = device.upload(&words(centroids.iter().map(|point| point.to_bits())))?;
    let row_counts = device.allocate(geometry.rows * size_of::<u32>())?;
    let mut parameters = LayOut {
        codes: device.address(&codes.memory).cast::<c_void>(),
        rows: geometry.rows as i32,
        cols: geometry.cols as i32,
        lo,
        values: if kind == Kind::Window { WINDOW } else { kind.values() } as i32,
        tiles: std::ptr::null_mut(),
        row_counts: device.address(&row_counts).cast(),
        escape_starts: std::ptr::null(),
        escapes: std::ptr::null_mut(),
        centroids: device.address(&points).cast(),
        first_centroid,
        centroid_count: centroids.len() as i32,
    };
    // SAFETY: a code for each weight, and a count for each row.
    unsafe { device.launch(launch::apart(kind, parameters)) }?;
    let counts = device.read(&row_counts, 0..geometry.rows * size_of::<u32>())?;
    let (starts, count) = escape_starts(parts, counts.as_chunks().0.iter().map(|&bytes| u32::from_le_bytes(bytes)));
    let payload = device.allocate(parts.bytes_with(count as usize))?;
    device.write(&payload, 0, &front(kind, lo, header, &assembly))?;
    device.write(&payload, parts.start(0), &starts)?;
    let weight = parts.weight(device.address(&payload));
    parameters.tiles = weight.tiles.cast_mut();
    parameters.escape_starts = weight.escape_starts;
    parameters.escapes = weight.escapes.cast_mut();
    // SAFETY: the payload has room for all tiles, and for as many escapes as were counted.
    unsafe {
        device.launch(launch::tiles(kind, parameters, parts.tile_count()))?;
        if count > 0 {
            device.launch(launch::apart(kind, parameters))?;
        }
    }
    Ok(payload)
}

/// A weight's payload and tables for its device; None for one that only the host can lay out, or say what is wrong with.
///
/// # Safety
/// As for [`decode`].
pub unsafe fn to_device<D: Device>(
    device: &D,
    source: Source,
    header: &Header,
) -> Result<Option<(D::Memory, Vec<u8>)>> {
    if !takes(header) {
        return Ok(None);
    }
    // SAFETY: the caller's promise.
    let Some(codes) = (unsafe { decode(device, source, header) })? else { return Ok(None) };
    let mut held = histogram(device, &codes, header.geometry.elements())?;
    let outside = if codes.levels { held.pop().unwrap_or(0) } else { 0 };
    held.truncate(if codes.levels { LEVELS } else { EXPONENTS });
    // The host may know a layout of another family.
    let Ok((kind, lo)) = choose(header, &Counts { held, outside }) else { return Ok(None) };
    let payload = encode(device, &codes, header, (kind, lo))?;
    Ok(Some((payload, Tables { kind, lo, header: header.clone() }.to_bytes())))
}
