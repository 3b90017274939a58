//! Quantisers: entropy-coded scalar quantisation (ECSQ) at any rate or error, int8 per row, int4 per group.
//!
//! ECSQ is a uniform step with entropy-coded levels: within 0.25 bit of the rate-distortion bound at high rate (Gish and
//! Pierce 1968), at any fractional rate, with no calibration data.

use std::ops::Range;

use half::bf16;

use super::arch::per_isa;
use super::element::{Element, Weights};
use super::encode::{Codes, Description, Packed, check_shape, encode, pack_lossless};
use super::format::{Quantizer, ScaleGrid};
use super::geometry::Geometry;
use super::symbols::{ALIAS_PREMIUM, Coding, Histogram, Plan, plan, plan_alias, state_bits, streams};
use crate::parallel::{Pool, map};
use crate::{Error, Result};

/// What an ECSQ weight has to meet.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum EcsqTarget {
    /// Bits a weight, everything counted.
    Bits(f64),
    /// Relative Frobenius error.
    Error(f64),
}

/// A quantised weight that saves less than 3% is stored lossless instead.
pub const WORTHWHILE: f64 = 0.97;
/// Levels beyond this are escapes; the histogram holds the rest.
const WINDOW: i32 = 4096;
/// Plain low bits must save this share to be worth a second plane.
const LOW_BITS_GAIN: f64 = 0.995;
/// Below so many elements a level's coder is the smallest, not the fastest: decoding takes less time than the quality is
/// worth that the bits buy.
const ALIAS_FROM: usize = 1 << 20;
/// f32 holds every integer up to here.
pub const MAX_LEVEL: f32 = (1 << 24) as f32;
/// 2^−100: a step of 2^−26 of it is still a normal f32.
const SMALLEST: f32 = 7.888_609e-31;
/// Sums side by side in a row's sum of squares: a device has as many lanes in a warp.
const SQUARE_LANES: usize = 32;
/// Threads take this many shares of the rows.
const SHARES: usize = 16;
/// Errors are summed in 2^−14 of a step, as integers: in any order they have the same sum.
const STEP: f32 = 16384.0;
/// What rounds to a level lies half a step from it; what is cut to the largest level is counted as no farther.
const MOST_ERROR: f32 = STEP / 2.0;
/// The most bits that the square of a scale has as an integer, and those that it and the number of elements have together: 63
/// bits hold a sum of errors of half a step.
const SQUARE_BITS: u32 = 26;
const SUM_BITS: u32 = 49;
/// What a tile costs beside its coder's states, in bits.
const TILE_BITS: f64 = 64.0 + 32.0 + 12.0;
/// Header and plane descriptions, in bits.
const HEADER_BITS: f64 = 8.0 * 64.0;
/// Fixed costs beyond this share of the rate are not charged to it: a tiny weight would pay for its header in quality.
const FIXED_SHARE: f64 = 0.05;
/// The search aims this far below its target and is content within as much again, in bits a weight or octaves of error.
const SLACK: f64 = 0.0015;
const SEARCH_STEPS: usize = 24;
/// Larger weights are searched by a sample of about so many elements first.
const SAMPLE: usize = 1 << 20;

/// Scales, and their squares as integers, by which errors in steps are weighed.
pub struct Steps {
    pub scales: Vec<f32>,
    pub squares: Vec<u32>,
    /// What a square of one stands for.
    unit: f64,
}

impl Steps {
    pub fn new(scales: Vec<f32>, geometry: Geometry) -> Self {
        let bits = SQUARE_BITS.min(SUM_BITS.saturating_sub(geometry.elements().next_power_of_two().ilog2()));
        let largest = f64::from(scales.iter().fold(f32::MIN_POSITIVE, |most, &scale| most.max(scale)));
        let one = f64::from(1 << bits);
        let square = |&scale: &f32| ((f64::from(scale) / largest).powi(2) * one).round_ties_even() as u32;
        let squares = scales.iter().map(square).collect();
        Self { scales, squares, unit: largest * largest / one }
    }
}

/// A weight and the scales that turn it into levels.
struct Levels<'a> {
    weights: Weights<'a>,
    geometry: Geometry,
    grid: ScaleGrid,
    steps: &'a Steps,
    max: f32,
}

impl Levels<'_> {
    /// Calls `visit` with the number of each scale of `row` and the weights under it.
    fn for_groups(&self, row: usize, mut visit: impl FnMut(usize, &[f32])) {
        let mut values = vec![0.0; self.geometry.cols];
        self.weights.values(row * self.geometry.cols, &mut values);
        let size = self.grid.group_cols(self.geometry).max(1);
        for (group, values) in values.chunks(size).enumerate() {
            visit(self.grid.index(row, group, self.geometry), values);
        }
    }
}

/// A value in steps to its level, not further than `max`, which is below 2^31.
#[inline(always)]
fn level_of(steps: f32, max: f32) -> i32 {
    #[allow(clippy::manual_clamp)] // which keeps a NaN
    let level = steps.round_ties_even().max(-max).min(max);
    // SAFETY: between -max and max, which an i32 holds. A checked conversion is not a vector instruction.
    #[allow(unsafe_code)]
    let level = unsafe { level.to_int_unchecked() };
    level
}

per_isa! {
    /// The levels of values under one scale.
    fn to_levels(values: &[f32], scale: f32, max: f32, out: &mut [i32]) {
        for (value, out) in values.iter().zip(out) {
            *out = level_of(value / scale, max);
        }
    }
}

impl Codes for Levels<'_> {
    fn rows(&self, rows: Range<usize>, out: &mut [u32]) {
        let mut levels = vec![0; out.len()];
        let mut rest = &mut levels[..];
        for row in rows {
            self.for_groups(row, |index, values| {
                let (group, after) = std::mem::take(&mut rest).split_at_mut(values.len());
                to_levels(values, self.steps.scales[index], self.max, group);
                rest = after;
            });
        }
        out.iter_mut().zip(levels).for_each(|(out, level)| *out = level as u32);
    }
}

per_isa! {
    /// The same, how far values lie from them in 1/[`STEP`] of a step, and the sum of the squares of how far. Squares of
    /// steps are exact, so that it is all one whether an instruction multiplies and adds at once.
    fn to_errors(values: &[f32], scale: f32, max: f32, levels: &mut [i32], out: &mut [i32], square: &mut f64) {
        let mut squares = [0.0f64; SQUARE_LANES];
        let error = |value: f32, level: &mut i32, square: &mut f64, out: &mut i32| {
            let steps = value / scale;
            *level = level_of(steps, max);
            let error = steps - *level as f32;
            *square += f64::from(error) * f64::from(error);
            *out = level_of(error * STEP, MOST_ERROR);
        };
        let (whole, rest) = values.as_chunks::<SQUARE_LANES>();
        let (levels, rest_levels) = levels.as_chunks_mut::<SQUARE_LANES>();
        let (out, rest_out) = out.as_chunks_mut::<SQUARE_LANES>();
        for ((values, levels), out) in whole.iter().zip(levels).zip(out) {
            for lane in 0..SQUARE_LANES {
                error(values[lane], &mut levels[lane], &mut squares[lane], &mut out[lane]);
            }
        }
        for (((square, &value), level), out) in squares.iter_mut().zip(rest).zip(rest_levels).zip(rest_out) {
            error(value, level, square, out);
        }
        let step = f64::from(scale) * f64::from(scale);
        *square = squares.iter().map(|square| square * step).sum();
    }
}

/// Sums over a weight, or over some of its rows, at given scales.
#[derive(Debug, PartialEq)]
pub struct Sums {
    pub levels: Histogram,
    /// Σ s² of each level, and Σ s²·(w/s − q) in 1/[`STEP`]: their quotient is how far the level's centroid lies from it.
    pub weights: Vec<u64>,
    pub moments: Vec<i64>,
    /// Σ (w − s·q)² of each row.
    pub distortions: Vec<f64>,
}

/// Sums under one scale, of each level: how often it occurs, in units of [`GroupSums::ONE`], and its errors, in one number.
/// Two of each, for elements in turn: a sum that is added to twice in a row waits for itself.
struct GroupSums(Box<[[i64; 2]]>);

impl GroupSums {
    /// More than any sum of errors of at most `LONGEST` elements.
    const ONE: i64 = 1 << 38;
    const LONGEST: usize = 1 << 24;

    fn new() -> Self {
        Self(vec![[0; 2]; Sums::SIZE].into())
    }

    /// Returns how many levels have no place here.
    fn add(&mut self, levels: &[i32], errors: &[i32]) -> u64 {
        let mut outside = 0;
        for (index, (&level, &error)) in levels.iter().zip(errors).enumerate() {
            match self.0.get_mut((level + WINDOW) as u32 as usize) {
                Some(sums) => sums[index % 2] += Self::ONE + i64::from(error),
                None => outside += 1,
            }
        }
        outside
    }

    /// How often the level at a place occurs, and the sum of its errors; both are zero from now on.
    fn take(&mut self, place: usize) -> (u64, i64) {
        let parts = std::mem::take(&mut self.0[place]).map(|sum| {
            let count = (sum + Self::ONE / 2).div_euclid(Self::ONE);
            (count as u64, sum - count * Self::ONE)
        });
        (parts[0].0 + parts[1].0, parts[0].1 + parts[1].1)
    }
}

per_isa! {
    /// The least and the largest of levels, kept within what `range` is at first.
    fn range_of(levels: &[i32], range: &mut (i32, i32)) {
        let (first, last) = *range;
        *range = levels.iter().fold((last, first), |(least, most), &level| {
            let level = level.clamp(first, last);
            (least.min(level), most.max(level))
        });
    }
}

impl Sums {
    const SIZE: usize = 2 * WINDOW as usize + 1;

    fn new() -> Self {
        Self {
            levels: Histogram { lo: -WINDOW, counts: vec![0; Self::SIZE], outside: 0 },
            weights: vec![0; Self::SIZE],
            moments: vec![0; Self::SIZE],
            distortions: Vec::new(),
        }
    }

    fn add(&mut self, other: &Self) {
        fn sum<T: Copy + std::ops::AddAssign>(to: &mut [T], from: &[T]) {
            to.iter_mut().zip(from).for_each(|(to, from)| *to += *from);
        }
        sum(&mut self.levels.counts, &other.levels.counts);
        sum(&mut self.weights, &other.weights);
        sum(&mut self.moments, &other.moments);
        self.levels.outside += other.levels.outside;
        self.distortions.extend(&other.distortions);
    }

    /// Of every `every`th row.
    fn of(levels: &Levels, every: usize, pool: &dyn Pool) -> Self {
        let mut total = Self::new();
        for share in shares(levels.geometry.rows, pool, |rows| {
            let mut sums = Self::new();
            let mut group = GroupSums::new();
            let mut codes = vec![0; levels.geometry.cols];
            let mut errors = codes.clone();
            for row in rows.filter(|row| row.is_multiple_of(every)) {
                let mut distortion = 0.0;
                levels.for_groups(row, |index, values| {
                    let scale = levels.steps.scales[index];
                    let (codes, errors) = (&mut codes[..values.len()], &mut errors[..values.len()]);
                    let mut square = 0.0;
                    to_errors(values, scale, levels.max, codes, errors, &mut square);
                    distortion += square;
                    for (codes, errors) in codes.chunks(GroupSums::LONGEST).zip(errors.chunks(GroupSums::LONGEST)) {
                        sums.add_group(&mut group, levels.steps.squares[index], codes, errors);
                    }
                });
                sums.distortions.push(distortion);
            }
            sums
        }) {
            total.add(&share);
        }
        total
    }

    fn add_group(&mut self, group: &mut GroupSums, square: u32, levels: &[i32], errors: &[i32]) {
        self.levels.outside += group.add(levels, errors);
        let mut range = (-WINDOW, WINDOW);
        range_of(levels, &mut range);
        for level in range.0..=range.1 {
            let place = (level + WINDOW) as usize;
            let (count, errors) = group.take(place);
            self.levels.counts[place] += count;
            self.weights[place] += u64::from(square) * count;
            self.moments[place] += i64::from(square) * errors;
        }
    }

    /// How far each symbol's centroid lies from its integer, in 1/256 of a step, and Σ (w − s·r(q))² with them. `unit` is what
    /// a weight of one stands for.
    fn centroids(&self, unit: f64, coding: &Coding, low_bits: u32) -> (Vec<i8>, f64) {
        let mut distortion = self.distortions.iter().sum();
        if low_bits > 0 || !coding.is_modelled() {
            return (Vec::new(), distortion);
        }
        let centroids = (0..coding.values()).map(|symbol| {
            let level = coding.lo() + symbol as i32;
            let index = (level + WINDOW) as usize;
            let (weight, moment) = (self.weights[index] as f64, self.moments[index] as f64);
            if weight == 0.0 {
                return 0;
            }
            let offset = moment / weight / f64::from(STEP);
            let stored = (256.0 * offset).round().clamp(-128.0, 127.0);
            distortion -= unit * weight * (2.0 * offset - stored / 256.0) * stored / 256.0;
            stored as i8
        });
        (centroids.collect(), distortion)
    }
}

/// The cheapest split of levels into symbols and plain low bits: (low bits, plan, bits for the whole weight).
pub fn plan_levels(levels: &Histogram, geometry: Geometry) -> (u32, Plan, f64) {
    let elements = levels.total() as f64;
    let candidate = |low_bits: u32| {
        let plan = plan(&levels.without_low_bits(low_bits), Some(8));
        let bits = plan.bits + f64::from(low_bits) * elements;
        (low_bits, plan, bits)
    };
    let better = |best: (u32, Plan, f64), other: (u32, Plan, f64)| {
        if other.2 < LOW_BITS_GAIN * best.2 { other } else { best }
    };
    let cheapest = (1..=8).map(candidate).fold(candidate(0), better);
    let premium = if geometry.elements() >= ALIAS_FROM { ALIAS_PREMIUM } else { 0.0 };
    let limit = cheapest.2 * (1.0 + premium);
    let quick = (0..=6).filter_map(|low_bits| {
        let plan = plan_alias(&levels.without_low_bits(low_bits))?;
        let bits = plan.bits + f64::from(low_bits) * elements;
        (bits <= limit && cheapest.1.coding.is_modelled()).then_some((low_bits, plan, bits))
    });
    quick.min_by(|a, b| a.2.total_cmp(&b.2)).unwrap_or(cheapest)
}

/// Runs `body` over a fixed division of `rows` and returns the results in order.
fn shares<T: Send>(rows: usize, pool: &dyn Pool, body: impl Fn(Range<usize>) -> T + Sync) -> Vec<T> {
    let size = rows.div_ceil(SHARES).max(1);
    map(pool, rows.div_ceil(size), |share| body(share * size..((share + 1) * size).min(rows)))
}

per_isa! {
    /// Σ w² and max |w|, the sum in lanes that do not wait for each other.
    fn norms_of(values: &[f32], square: &mut f64, most: &mut f32) {
        let (mut squares, mut largest) = ([0.0f64; SQUARE_LANES], [0.0f32; SQUARE_LANES]);
        for values in values.chunks(SQUARE_LANES) {
            for ((square, largest), &value) in squares.iter_mut().zip(&mut largest).zip(values) {
                *square += f64::from(value) * f64::from(value);
                *largest = largest.max(value.abs());
            }
        }
        *square = squares.iter().sum();
        *most = largest.iter().fold(0.0, |most, &value| most.max(value));
    }
}

/// Per row: Σ w² and max |w|. An element that is not finite is an error.
fn row_norms(weights: Weights, geometry: Geometry, pool: &dyn Pool) -> Result<Vec<(f64, f32)>> {
    let mut norms = Vec::with_capacity(geometry.rows);
    for share in shares(geometry.rows, pool, |rows| {
        let mut values = vec![0.0; geometry.cols];
        rows.map(|row| {
            weights.values(row * geometry.cols, &mut values);
            let (mut square, mut most) = (0.0, 0.0);
            norms_of(&values, &mut square, &mut most);
            if square.is_finite() {
                return Ok((square, most));
            }
            // Squares of f32 do not overflow.
            let col = values.iter().position(|v| !v.is_finite()).unwrap_or(0);
            Err(Error::NotFinite { row, col, value: values[col] })
        })
        .collect::<Result<Vec<_>>>()
    }) {
        norms.extend(share?);
    }
    Ok(norms)
}

/// Whether a weight is zero or so near to it that its steps would leave the normal floats.
fn too_small(norms: &[(f64, f32)]) -> bool {
    norms.iter().all(|&(_, largest)| is_too_small(largest))
}

/// The same of the largest weight.
pub fn is_too_small(largest: f32) -> bool {
    largest < SMALLEST
}

/// A scale that is not zero, exact in bf16 where the grid stores it so, and, for `up`, no smaller than asked.
fn storable(scale: f64, grid: ScaleGrid, up: bool) -> f32 {
    let scale = (scale as f32).max(f32::MIN_POSITIVE);
    if grid == ScaleGrid::Tensor {
        return scale;
    }
    let rounded = bf16::from_f32(scale);
    if up && rounded.to_f32() < scale {
        return bf16::from_bits(rounded.to_bits() + 1).to_f32();
    }
    rounded.to_f32()
}

/// A weight at scales of which `sums` are all; and the bits of its planes.
fn describe(
    (geometry, grid): (Geometry, ScaleGrid),
    steps: &Steps,
    sums: &Sums,
    quantizer: Quantizer,
) -> (Description, f64) {
    let (low_bits, plan, bits) = plan_levels(&sums.levels, geometry);
    let centroids = match quantizer {
        Quantizer::Ecsq => sums.centroids(steps.unit, &plan.coding, low_bits).0,
        _ => Vec::new(),
    };
    let description = Description {
        geometry,
        element: Element::Level { low_bits },
        quantizer,
        scale_grid: grid,
        scales: steps.scales.clone(),
        symbols: Some((plan, centroids)),
    };
    (description, bits)
}

/// Packs to levels at `levels`' scales, of which `sums` are all.
fn pack_levels(levels: &Levels, sums: &Sums, quantizer: Quantizer, pool: &dyn Pool) -> Result<Packed> {
    let (description, _) = describe((levels.geometry, levels.grid), levels.steps, sums, quantizer);
    let packed = encode(levels, levels.weights, description, pool)?;
    let dense = levels.geometry.elements() * levels.weights.dtype().bytes();
    if packed.bytes() as f64 > WORTHWHILE * dense as f64 {
        return pack_lossless(levels.weights, levels.geometry.rows, levels.geometry.cols, pool);
    }
    Ok(packed)
}

/// Symmetric integers of at most `max` with one scale for each cell of `grid`, from the largest weight there.
#[derive(Debug, Clone, Copy)]
pub struct Symmetric {
    pub quantizer: Quantizer,
    pub grid: ScaleGrid,
    pub max: f32,
}

impl Symmetric {
    /// int8, one scale a row.
    pub const INT8: Self = Self { quantizer: Quantizer::Int8, grid: ScaleGrid::Row, max: 127.0 };

    /// int4, one scale for each row and `group` columns (a multiple of 64).
    pub fn int4(group: usize) -> Result<Self> {
        if group == 0 || !group.is_multiple_of(super::geometry::CHUNK) || group >= super::format::MAX_DIMENSION {
            return Err(Error::argument("group_size", "a positive multiple of 64", group));
        }
        Ok(Self { quantizer: Quantizer::Int4, grid: ScaleGrid::Group(group), max: 7.0 })
    }

    /// The scale of weights of which this is the largest magnitude.
    pub fn scale(self, largest: f32) -> f32 {
        storable(f64::from(largest / self.max), self.grid, true)
    }
}

fn pack_symmetric(
    weights: Weights,
    (rows, cols): (usize, usize),
    symmetric: Symmetric,
    pool: &dyn Pool,
) -> Result<Packed> {
    let Symmetric { quantizer, grid, max } = symmetric;
    let geometry = check_shape(weights, rows, cols)?;
    if too_small(&row_norms(weights, geometry, pool)?) {
        return pack_lossless(weights, rows, cols, pool);
    }
    let size = grid.group_cols(geometry).max(1);
    let scales = shares(rows, pool, |rows| {
        let mut values = vec![0.0; cols];
        let mut scales = Vec::new();
        for row in rows {
            weights.values(row * cols, &mut values);
            scales.extend(values.chunks(size).map(|group| {
                let largest = group.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                symmetric.scale(largest)
            }));
        }
        scales
    });
    let levels = Levels { weights, geometry, grid, steps: &Steps::new(scales.concat(), geometry), max };
    pack_levels(&levels, &Sums::of(&levels, 1, pool), quantizer, pool)
}

/// int8, symmetric, one scale a row, entropy-coded.
pub fn pack_int8(weights: Weights, rows: usize, cols: usize, pool: &dyn Pool) -> Result<Packed> {
    pack_symmetric(weights, (rows, cols), Symmetric::INT8, pool)
}

/// int4, symmetric, one scale for each row and `group` columns (a multiple of 64), entropy-coded.
pub fn pack_int4(weights: Weights, rows: usize, cols: usize, group: usize, pool: &dyn Pool) -> Result<Packed> {
    pack_symmetric(weights, (rows, cols), Symmetric::int4(group)?, pool)
}

/// What sums over a weight's levels: the host's threads, or a device.
pub trait Measure {
    /// Over every `every`th row, at these steps.
    fn sums(&self, grid: ScaleGrid, steps: &Steps, every: usize) -> Result<Sums>;
}

/// The host's threads.
pub struct OnHost<'a> {
    pub weights: Weights<'a>,
    pub geometry: Geometry,
    pub pool: &'a dyn Pool,
}

impl Measure for OnHost<'_> {
    fn sums(&self, grid: ScaleGrid, steps: &Steps, every: usize) -> Result<Sums> {
        let Self { weights, geometry, pool } = *self;
        Ok(Sums::of(&Levels { weights, geometry, grid, steps, max: MAX_LEVEL }, every, pool))
    }
}

/// A candidate of the ECSQ search.
pub struct Candidate {
    pub grid: ScaleGrid,
    pub steps: Steps,
    pub sums: Sums,
    /// log₂ of the common factor of the steps.
    log_factor: f64,
    /// Bits a weight that count against the target.
    bits: f64,
    /// Relative Frobenius error.
    error: f64,
}

impl Candidate {
    /// The weight with these scales, where the sums are over all rows; and the bits of its planes.
    pub fn describe(&self, geometry: Geometry) -> (Description, f64) {
        describe((geometry, self.grid), &self.steps, &self.sums, Quantizer::Ecsq)
    }
}

impl EcsqTarget {
    /// Refuses one out of range.
    pub fn check(self) -> Result<()> {
        match self {
            Self::Bits(bits) if !(2.0..=8.0).contains(&bits) => Err(Error::argument("bits", "2 to 8", bits)),
            Self::Error(error) if !(error > 0.0 && error < 1.0) => {
                Err(Error::argument("max_error", "between 0 and 1", error))
            }
            _ => Ok(()),
        }
    }

    /// How far the step is too large, in octaves, seen from a point just inside the target: zero is where to go.
    fn excess(self, candidate: &Candidate) -> f64 {
        match self {
            Self::Bits(bits) => bits - 2.0 * SLACK - candidate.bits,
            Self::Error(error) => (candidate.error.max(f64::MIN_POSITIVE) / error).log2() + 2.0 * SLACK,
        }
    }

    /// Whether a candidate with this excess keeps the target.
    fn met(self, excess: f64) -> bool {
        match self {
            Self::Bits(_) => excess >= -SLACK,
            Self::Error(_) => excess <= SLACK,
        }
    }

    /// What the target leaves to minimise.
    fn cost(self, candidate: &Candidate) -> f64 {
        match self {
            Self::Bits(_) => candidate.error,
            Self::Error(_) => candidate.bits,
        }
    }
}

/// ECSQ: the step, per tensor or per row, that meets the target best.
pub fn pack_ecsq(weights: Weights, rows: usize, cols: usize, target: EcsqTarget, pool: &dyn Pool) -> Result<Packed> {
    target.check()?;
    let geometry = check_shape(weights, rows, cols)?;
    let norms = row_norms(weights, geometry, pool)?;
    if too_small(&norms) {
        return pack_lossless(weights, rows, cols, pool);
    }
    let measure = OnHost { weights, geometry, pool };
    match (Search { geometry, norms: &norms, target, measure: &measure }).best()? {
        Some(best) => {
            let levels = Levels { weights, geometry, grid: best.grid, steps: &best.steps, max: MAX_LEVEL };
            pack_levels(&levels, &best.sums, Quantizer::Ecsq, pool)
        }
        // An error that no step within reach keeps.
        None => pack_lossless(weights, rows, cols, pool),
    }
}

/// The search for ECSQ's scales: a common factor of the rows' (or the weight's) root mean squares, by secants on (log₂ step,
/// bits) or (log₂ step, log₂ error).
pub struct Search<'a, M> {
    pub geometry: Geometry,
    /// Σ w² and max |w| of each row.
    pub norms: &'a [(f64, f32)],
    pub target: EcsqTarget,
    pub measure: &'a M,
}

impl<M: Measure> Search<'_, M> {
    /// The best candidate of both grids, None if no step that was tried keeps the target. Large weights are searched by a
    /// sample of their rows, and the better grid then on all of them.
    pub fn best(&self) -> Result<Option<Candidate>> {
        let grids = [ScaleGrid::Tensor, ScaleGrid::Row];
        let start = self.guess();
        let better = |a: &Candidate, b: &Candidate| self.target.cost(a).total_cmp(&self.target.cost(b));
        let every = self.geometry.elements().div_ceil(SAMPLE).min(self.geometry.rows / SHARES).max(1);
        let mut found = Vec::new();
        for grid in grids {
            found.extend(self.solve(grid, every, start)?);
        }
        found.sort_by(better);
        if every == 1 {
            return Ok(found.into_iter().next());
        }
        // Where the sample kept the target nowhere, all rows may still.
        let starts = found.iter().map(|candidate| (candidate.grid, candidate.log_factor));
        let starts: Vec<_> = starts.chain(grids.map(|grid| (grid, start))).collect();
        let solved = starts.into_iter().map(|(grid, start)| self.solve(grid, 1, start));
        solved.map(Result::transpose).find_map(|found| found).transpose()
    }

    /// A Gaussian at b bits wants a step of about σ · 2^(2.05 − b), and a step of s leaves an error of s / √12.
    fn guess(&self) -> f64 {
        match self.target {
            EcsqTarget::Bits(bits) => 2.05 - bits,
            EcsqTarget::Error(error) => (error * 12f64.sqrt()).log2(),
        }
    }

    /// The common factor of the steps that meets the target best on every `every`th row, from `log_factor` on; None if no
    /// step that was tried keeps it.
    fn solve(&self, grid: ScaleGrid, every: usize, log_factor: f64) -> Result<Option<Candidate>> {
        // The nearest factors with too much of what the step takes away, and with too little.
        let (mut under, mut over) = (f64::NEG_INFINITY, f64::INFINITY);
        let mut at = log_factor;
        let mut last: Option<(f64, f64)> = None;
        let mut slope = 1.0;
        let mut best: Option<Candidate> = None;
        for _ in 0..SEARCH_STEPS {
            let candidate = self.candidate(grid, every, at)?;
            let excess = self.target.excess(&candidate);
            if self.target.met(excess)
                && best.as_ref().is_none_or(|best| self.target.cost(&candidate) < self.target.cost(best))
            {
                best = Some(candidate);
            }
            (under, over) = if excess < 0.0 { (under.max(at), over) } else { (under, over.min(at)) };
            // Weights of few bits change their levels in jumps, and no step is content.
            if excess.abs() <= SLACK || over - under <= SLACK {
                break;
            }
            if let Some((before, then)) = last.filter(|&(before, _)| before != at) {
                // Bits fall by at most one an octave; a flat stretch must not throw the search away.
                slope = ((excess - then) / (at - before)).clamp(0.2, 1.5);
            }
            last = Some((at, excess));
            at += (-excess / slope).clamp(-3.0, 3.0);
            if !(under..over).contains(&at) {
                at = 0.5 * (under + over);
            }
        }
        Ok(best)
    }

    fn candidate(&self, grid: ScaleGrid, every: usize, log_factor: f64) -> Result<Candidate> {
        let Self { geometry, norms, target, measure } = *self;
        let elements = geometry.elements() as f64;
        let factor = log_factor.exp2();
        let scales = match grid {
            ScaleGrid::Tensor => {
                let energy: f64 = norms.iter().map(|(square, _)| square).sum();
                vec![storable(factor * (energy / elements).sqrt(), grid, false)]
            }
            _ => norms
                .iter()
                .map(|(square, _)| storable(factor * (square / geometry.cols as f64).sqrt(), grid, false))
                .collect(),
        };
        let steps = Steps::new(scales, geometry);
        let sums = measure.sums(grid, &steps, every)?;
        let (low_bits, plan, bits) = plan_levels(&sums.levels, geometry);
        // A sample stands for the whole.
        let bits = bits * elements / sums.levels.total().max(1) as f64;
        let (_, distortion) = sums.centroids(steps.unit, &plan.coding, low_bits);
        let energy: f64 = norms.iter().step_by(every).map(|(square, _)| square).sum();
        let state_bits = streams(&plan.coding, geometry, bits) as f64 * state_bits(&plan.coding);
        let per_tile = |tile| TILE_BITS + state_bits * geometry.lanes_of(tile) as f64;
        let tiles: f64 = (0..geometry.tiles()).map(per_tile).sum();
        let scale_bits = 8.0 * (grid.bytes_each() * grid.count(geometry)) as f64;
        let fixed = HEADER_BITS + tiles + scale_bits + 64.0 * f64::from(u8::from(low_bits > 0));
        let allowed = match target {
            EcsqTarget::Bits(target) => FIXED_SHARE * target * elements,
            EcsqTarget::Error(_) => f64::INFINITY,
        };
        Ok(Candidate {
            bits: (bits + fixed.min(allowed)) / elements,
            error: (distortion.max(0.0) / energy.max(f64::MIN_POSITIVE)).sqrt(),
            grid,
            steps,
            sums,
            log_factor,
        })
    }
}
