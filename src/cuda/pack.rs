//! Packing dense weights on the device, straight into its layout: counts, magnitudes, levels and tiles are made there; scales and
//! codings are chosen on the host, by what the codec itself chooses with. The tables hold the canonical form's header, so that
//! [`super::weight::from_device`] gives the bytes that the host would have packed. Its checksum of the directory, which is not
//! made here, is zero until then.
#![allow(unsafe_code)] // launches

use std::collections::{BTreeSet, HashMap};
use std::sync::Mutex;

use super::launch;
use super::lay_out::{Codes, Device, encode, histogram, words};
use super::params::Quantise;
use super::weight::{Counts, EXPONENTS, FARTHEST, LEVELS, Tables, choose};
use crate::Result;
use crate::codec::{
    Description, Dtype, Element, Geometry, Header, Histogram, Quantizer, ScaleGrid, Symmetric, WORTHWHILE,
    is_too_small, plan_header, plan_levels,
};
use crate::parallel::Pool;

/// A weight in the layout of its device.
pub struct Laid<M> {
    pub payload: M,
    pub tables: Vec<u8>,
    pub header: Header,
    pub scales: Vec<f32>,
}

/// A dense weight in a device's memory.
pub struct Dense<M> {
    /// float32, or bfloat16 where that is its dtype.
    pub memory: M,
    pub dtype: Dtype,
    pub rows: usize,
    pub cols: usize,
}

/// The coded bits that a plan foresees are met within this.
const FORESIGHT: f64 = 1.02;
/// Of fewer weights the host, which sees what each choice takes, may store some without loss.
const FEWEST: usize = 1024;

/// Packs bfloat16s without loss; None for a weight that has no layout there.
pub fn lossless<D: Device>(
    device: &D,
    codes: &Codes<D::Memory>,
    geometry: Geometry,
    pool: &dyn Pool,
) -> Result<Option<Laid<D::Memory>>> {
    let counts = histogram(device, codes, geometry.elements())?;
    let of_plane = |counts: &[u64]| Histogram { lo: 0, counts: counts.to_vec(), outside: 0 };
    let histograms: Vec<Histogram> = counts.chunks(EXPONENTS).map(of_plane).collect();
    let description = Description {
        geometry,
        element: Element::Bits(Dtype::Bf16),
        quantizer: Quantizer::Lossless,
        scale_grid: ScaleGrid::None,
        scales: Vec::new(),
        symbols: None,
    };
    let header = plan(device, codes, &description, Dtype::Bf16, &histograms, pool)?;
    let counts = Counts { held: counts[..EXPONENTS].to_vec(), outside: 0 };
    lay_out(device, codes, header, &counts, Vec::new())
}

/// Packs to int8 or int4; None for a weight that the host has to refuse, or to store otherwise.
pub fn symmetric<D: Device>(
    device: &D,
    dense: &Dense<D::Memory>,
    symmetric: Symmetric,
    pool: &dyn Pool,
) -> Result<Option<Laid<D::Memory>>> {
    let geometry = Geometry::new(dense.rows, dense.cols);
    if geometry.elements() < FEWEST {
        return Ok(None);
    }
    let parts = symmetric.grid.count(geometry);
    let is_bf16 = dense.dtype == Dtype::Bf16;
    let largest = device.allocate(parts * size_of::<u32>())?;
    let mut parameters = Quantise {
        weights: device.address(&dense.memory).cast(),
        largest: device.address(&largest).cast(),
        scales: std::ptr::null(),
        levels: std::ptr::null_mut(),
        rows: dense.rows as i32,
        cols: dense.cols as i32,
        group_cols: symmetric.grid.group_cols(geometry) as i32,
        max: symmetric.max,
    };
    // SAFETY: the weight is of this shape, and there is a magnitude for each scale.
    unsafe { device.launch(launch::largest(parameters, parts, is_bf16)) }?;
    let largest = device.read(&largest, 0..parts * size_of::<u32>())?;
    let largest: Vec<f32> = largest.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
    if !largest.iter().all(|largest| largest.is_finite()) || largest.iter().all(|&largest| is_too_small(largest)) {
        return Ok(None);
    }
    let scales: Vec<f32> = largest.into_iter().map(|largest| symmetric.scale(largest)).collect();
    let uploaded = device.upload(&words(scales.iter().map(|scale| scale.to_bits())))?;
    let codes = Codes { memory: device.allocate(geometry.elements() * size_of::<i32>())?, levels: true };
    parameters.scales = device.address(&uploaded).cast();
    parameters.levels = device.address(&codes.memory).cast();
    // SAFETY: as above; a level for each weight, and all scales.
    unsafe { device.launch(launch::quantise(parameters, parts, is_bf16)) }?;

    let mut held = histogram(device, &codes, geometry.elements())?;
    let outside = held.split_off(LEVELS).iter().sum();
    let levels = Histogram { lo: -FARTHEST, counts: held, outside };
    let (low_bits, symbols, bits) = plan_levels(&levels, geometry);
    let mut low = Histogram { lo: 0, counts: vec![0; 1 << u8::BITS], outside: 0 };
    for (level, count) in (-FARTHEST..).zip(&levels.counts) {
        low.counts[level as usize & ((1 << low_bits) - 1)] += count;
    }
    let description = Description {
        geometry,
        element: Element::Level { low_bits },
        quantizer: symmetric.quantizer,
        scale_grid: symmetric.grid,
        scales: scales.clone(),
        symbols: Some((symbols, Vec::new())),
    };
    let histograms = if low_bits > 0 { vec![low] } else { Vec::new() };
    let header = plan(device, &codes, &description, dense.dtype, &histograms, pool)?;
    if most_bytes(&header, bits) > WORTHWHILE * (geometry.elements() * dense.dtype.bytes()) as f64 {
        return Ok(None);
    }
    lay_out(device, &codes, header, &Counts { held: levels.counts, outside }, scales)
}

/// Chooses the codings. What looks at codes, which only a search for predictors does, asks for tiles first and is run again
/// when they have come.
fn plan<D: Device>(
    device: &D,
    codes: &Codes<D::Memory>,
    description: &Description,
    dtype: Dtype,
    histograms: &[Histogram],
    pool: &dyn Pool,
) -> Result<Header> {
    let geometry = description.geometry;
    let mut known = HashMap::new();
    loop {
        let asked = Mutex::new(BTreeSet::new());
        let tile_codes = |tile: usize| -> Vec<u32> {
            known.get(&tile).cloned().unwrap_or_else(|| {
                asked.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).insert(tile);
                Vec::new()
            })
        };
        let header = plan_header(description.clone(), dtype, histograms, &tile_codes, pool);
        let asked = asked.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
        if asked.is_empty() {
            return Ok(header);
        }
        for tile in asked {
            let rows = geometry.rows_of(tile);
            known.insert(tile, codes.read(device, rows.start * geometry.cols..rows.end * geometry.cols)?);
        }
    }
}

/// More than the canonical form takes, if its planes take `bits`.
fn most_bytes(header: &Header, bits: f64) -> f64 {
    let geometry = header.geometry;
    let coded = header.planes.iter().filter(|plane| plane.coding.is_modelled());
    let streams: usize = coded.map(|plane| plane.streams).sum();
    let tile = |tile: usize| 16 + streams * (size_of::<u32>() + size_of::<u32>() * geometry.lanes_of(tile));
    let scales = header.scale_grid.bytes_each() * header.scale_grid.count(geometry);
    let fixed = header.to_bytes().len() + scales + (0..geometry.tiles()).map(tile).sum::<usize>();
    FORESIGHT * bits / 8.0 + fixed as f64
}

fn lay_out<D: Device>(
    device: &D,
    codes: &Codes<D::Memory>,
    header: Header,
    counts: &Counts,
    scales: Vec<f32>,
) -> Result<Option<Laid<D::Memory>>> {
    // One that has no layout is packed on the host, which stores it in its canonical form.
    let Ok((kind, lo)) = choose(&header, counts) else { return Ok(None) };
    let payload = encode(device, codes, &header, (kind, lo))?;
    let tables = Tables { kind, lo, header: header.clone() }.to_bytes();
    Ok(Some(Laid { payload, tables, header, scales }))
}
