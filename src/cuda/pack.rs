//! Packing dense weights on the device, straight into its layout: counts, magnitudes, levels and tiles are made there; scales and
//! codings are chosen on the host, by what the codec itself chooses with. The tables hold the canonical form's header, so that
//! [`super::weight::from_device`] gives the bytes that the host would have packed. Its checksum of the directory, which is not
//! made here, is zero until then.
#![allow(unsafe_code)] // launches

use std::collections::{BTreeSet, HashMap};
use std::sync::Mutex;

use super::launch;
use super::lay_out::{Codes, Device, encode, histogram, words};
use super::params::{Measure, Quantise};
use super::weight::{Counts, EXPONENTS, FARTHEST, LEVELS, Tables, choose};
use crate::Result;
use crate::codec::{
    self, Description, Dtype, EcsqTarget, Element, Geometry, Header, Histogram, MAX_LEVEL, Quantizer, ScaleGrid,
    Search, Steps, Sums, Symmetric, WORTHWHILE, is_too_small, plan_header, plan_levels,
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
    let group_cols = symmetric.grid.group_cols(geometry);
    let Some(largest) = largest(device, dense, group_cols)? else { return Ok(None) };
    let scales: Vec<f32> = largest.into_iter().map(|largest| symmetric.scale(largest)).collect();
    let codes = quantise(device, dense, group_cols, &scales, symmetric.max)?;
    let mut held = histogram(device, &codes, geometry.elements())?;
    let outside = held.split_off(LEVELS).iter().sum();
    let levels = Histogram { lo: -FARTHEST, counts: held, outside };
    let (low_bits, symbols, bits) = plan_levels(&levels, geometry);
    let description = Description {
        geometry,
        element: Element::Level { low_bits },
        quantizer: symmetric.quantizer,
        scale_grid: symmetric.grid,
        scales,
        symbols: Some((symbols, Vec::new())),
    };
    lay_out_levels(device, &codes, (description, bits), levels, dense.dtype, pool)
}

/// Packs to levels at the scales that the codec's search finds; None as above, and where no step keeps the target.
pub fn ecsq<D: Device>(
    device: &D,
    dense: &Dense<D::Memory>,
    target: EcsqTarget,
    pool: &dyn Pool,
) -> Result<Option<Laid<D::Memory>>> {
    target.check()?;
    let geometry = Geometry::new(dense.rows, dense.cols);
    if geometry.elements() < FEWEST {
        return Ok(None);
    }
    let Some(largest) = largest(device, dense, dense.cols)? else { return Ok(None) };
    let measure = OnDevice { device, dense };
    let norms: Vec<(f64, f32)> = measure.squares()?.into_iter().zip(largest).collect();
    let Some(best) = (Search { geometry, norms: &norms, target, measure: &measure }).best()? else { return Ok(None) };
    let scales = each_row(best.grid, geometry, &best.steps.scales);
    let codes = quantise(device, dense, dense.cols, &scales, MAX_LEVEL)?;
    lay_out_levels(device, &codes, best.describe(geometry), best.sums.levels, dense.dtype, pool)
}

/// The largest magnitude under each scale of so many columns; None where one is not finite or all are next to nothing.
fn largest<D: Device>(device: &D, dense: &Dense<D::Memory>, group_cols: usize) -> Result<Option<Vec<f32>>> {
    let parts = dense.rows * dense.cols.div_ceil(group_cols);
    let largest = device.allocate(parts * size_of::<u32>())?;
    let parameters =
        Quantise { largest: device.address(&largest).cast(), ..dense.to_quantise(device, group_cols, f32::NAN) };
    // SAFETY: the weight is of this shape, and there is a magnitude for each scale.
    unsafe { device.launch(launch::largest(parameters, parts, dense.is_bf16())) }?;
    let largest = device.read(&largest, 0..parts * size_of::<u32>())?;
    let largest: Vec<f32> = largest.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
    let is_packed =
        largest.iter().all(|largest| largest.is_finite()) && !largest.iter().all(|&largest| is_too_small(largest));
    Ok(is_packed.then_some(largest))
}

/// The levels of a weight at scales of so many columns each.
fn quantise<D: Device>(
    device: &D,
    dense: &Dense<D::Memory>,
    group_cols: usize,
    scales: &[f32],
    max: f32,
) -> Result<Codes<D::Memory>> {
    let uploaded = device.upload(&words(scales.iter().map(|scale| scale.to_bits())))?;
    let codes = Codes { memory: device.allocate(dense.rows * dense.cols * size_of::<i32>())?, levels: true };
    let parameters = Quantise {
        scales: device.address(&uploaded).cast(),
        levels: device.address(&codes.memory).cast(),
        ..dense.to_quantise(device, group_cols, max)
    };
    // SAFETY: the weight is of this shape, with a level for each weight, and all scales.
    unsafe { device.launch(launch::quantise(parameters, scales.len(), dense.is_bf16())) }?;
    Ok(codes)
}

impl<M> Dense<M> {
    fn is_bf16(&self) -> bool {
        self.dtype == Dtype::Bf16
    }

    fn to_quantise<D: Device<Memory = M>>(&self, device: &D, group_cols: usize, max: f32) -> Quantise {
        Quantise {
            weights: device.address(&self.memory).cast(),
            largest: std::ptr::null_mut(),
            scales: std::ptr::null(),
            levels: std::ptr::null_mut(),
            rows: self.rows as i32,
            cols: self.cols as i32,
            group_cols: group_cols as i32,
            max,
        }
    }
}

/// What a scale of each row, or one for all, is in each row.
fn each_row<T: Copy>(grid: ScaleGrid, geometry: Geometry, of_scales: &[T]) -> Vec<T> {
    (0..geometry.rows).map(|row| of_scales[grid.index(row, 0, geometry)]).collect()
}

/// A device that sums over a weight's levels.
pub struct OnDevice<'a, D: Device> {
    pub device: &'a D,
    pub dense: &'a Dense<D::Memory>,
}

impl<D: Device> OnDevice<'_, D> {
    fn parameters(&self, distortions: &D::Memory, every: usize) -> Measure {
        Measure {
            weights: self.device.address(&self.dense.memory).cast(),
            scales: std::ptr::null(),
            squares: std::ptr::null(),
            counts: std::ptr::null_mut(),
            level_weights: std::ptr::null_mut(),
            moments: std::ptr::null_mut(),
            distortions: self.device.address(distortions).cast(),
            rows: self.dense.rows as i32,
            cols: self.dense.cols as i32,
            every: every as i32,
            max: MAX_LEVEL,
        }
    }

    fn numbers(&self, memory: &D::Memory, count: usize) -> Result<Vec<f64>> {
        let bytes = self.device.read(memory, 0..count * size_of::<f64>())?;
        Ok(bytes.as_chunks().0.iter().map(|&bytes| f64::from_le_bytes(bytes)).collect())
    }

    /// Σ w² of each row.
    pub fn squares(&self) -> Result<Vec<f64>> {
        let squares = self.device.allocate(self.dense.rows * size_of::<f64>())?;
        // SAFETY: the weight is of this shape, and there is a number for each row.
        unsafe { self.device.launch(launch::square(self.parameters(&squares, 1), self.dense.is_bf16())) }?;
        self.numbers(&squares, self.dense.rows)
    }
}

impl<D: Device> codec::Measure for OnDevice<'_, D> {
    fn sums(&self, grid: ScaleGrid, steps: &Steps, every: usize) -> Result<Sums> {
        let Self { device, dense } = self;
        let geometry = Geometry::new(dense.rows, dense.cols);
        let measured = dense.rows.div_ceil(every);
        let scales = each_row(grid, geometry, &steps.scales).into_iter().map(f32::to_bits);
        let scales = device.upload(&words(scales.chain(each_row(grid, geometry, &steps.squares))))?;
        // Counts and all others, weights, moments.
        let zeros = vec![0; (3 * LEVELS + 1) * size_of::<u64>()];
        let of_levels = device.upload(&zeros)?;
        let distortions = device.allocate(measured * size_of::<f64>())?;
        let (first_scale, first) = (device.address(&scales).cast::<f32>(), device.address(&of_levels).cast::<u64>());
        let parameters = Measure {
            scales: first_scale,
            squares: first_scale.wrapping_add(dense.rows).cast(),
            counts: first,
            level_weights: first.wrapping_add(LEVELS + 1),
            moments: first.wrapping_add(2 * LEVELS + 1).cast(),
            ..self.parameters(&distortions, every)
        };
        // SAFETY: the weight is of this shape, with a scale and its square for each row; there are sums for each level, and one
        // for each row that is measured.
        unsafe { device.launch(launch::measure(parameters, dense.is_bf16())) }?;
        let bytes = device.read(&of_levels, 0..zeros.len())?;
        let mut counts: Vec<u64> = bytes.as_chunks().0.iter().map(|&bytes| u64::from_le_bytes(bytes)).collect();
        let moments = counts.split_off(2 * LEVELS + 1).into_iter().map(u64::cast_signed).collect();
        let weights = counts.split_off(LEVELS + 1);
        let outside = counts.pop().unwrap_or(0);
        let levels = Histogram { lo: -FARTHEST, counts, outside };
        Ok(Sums { levels, weights, moments, distortions: self.numbers(&distortions, measured)? })
    }
}

/// Lays levels out whose first plane, of so many bits, is planned; None for a weight that the host has to store otherwise.
fn lay_out_levels<D: Device>(
    device: &D,
    codes: &Codes<D::Memory>,
    (description, bits): (Description, f64),
    levels: Histogram,
    dtype: Dtype,
    pool: &dyn Pool,
) -> Result<Option<Laid<D::Memory>>> {
    let low_bits = description.element.low_bits();
    let mut low = Histogram { lo: 0, counts: vec![0; 1 << u8::BITS], outside: 0 };
    for (level, count) in (-FARTHEST..).zip(&levels.counts) {
        low.counts[level as usize & ((1 << low_bits) - 1)] += count;
    }
    let histograms = if low_bits > 0 { vec![low] } else { Vec::new() };
    let header = plan(device, codes, &description, dtype, &histograms, pool)?;
    if most_bytes(&header, bits) > WORTHWHILE * (description.geometry.elements() * dtype.bytes()) as f64 {
        return Ok(None);
    }
    let counts = Counts { held: levels.counts, outside: levels.outside };
    lay_out(device, codes, header, &counts, description.scales)
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
