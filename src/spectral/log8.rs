//! log8: a byte for each coefficient, and for each block of 64 a word of 16 bits that says on which curve the bytes lie and how
//! far it reaches. `docs/log8.md` has the format.
//!
//! A block's numbers are its scale times values of a μ-law curve, from one that is nearly linear (numbers of one size) to one
//! whose steps are in proportion (numbers of many sizes). The encoder tries every curve with every scale near the block's
//! largest number, and keeps the pair with the least squared error.

use std::ops::RangeInclusive;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use half::{bf16, f16};

use crate::parallel::{DisjointSlice, Pool};

/// Coefficients under one word. The last block may have fewer.
pub const BLOCK: usize = 64;
/// The curves' μ, chosen by `benchmarks/log8.py --search` on Gaussian, Student-t, lognormal and 1/f coefficients.
pub const MU: [f64; 8] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 256.0];

/// Bits of a word that are the scale's; the curve's are above.
const SCALE_BITS: u32 = 13;
/// Bits of a float32 below those that a scale has: it has no sign, and five bits of mantissa.
const DROPPED: u32 = 31 - SCALE_BITS;
/// Of infinity; stands for the largest float32 instead.
const LARGEST_SCALE: u16 = (f32::INFINITY.to_bits() >> DROPPED) as u16;
/// Blocks whose largest number is below may decode to subnormals: the product of level and scale is rounded once more.
const ROUNDED: f32 = f32::MIN_POSITIVE * (1 << 20) as f32;
/// Scales that are tried, counted from the least that is not below the largest number: one below, where that number is cut
/// to size, and so many above that curves of wide steps can meet the block's few large numbers.
const TRIED: RangeInclusive<i32> = -1..=5;

/// The magnitudes that codes 0 to 127 stand for, in units of the scale.
type Levels = [f32; 128];

/// Intervals of [0, 1) that the encoder looks codes up by: narrower than any step between levels.
const INTERVALS: usize = 1 << 13;

struct Curve {
    mu: f32,
    /// The mean squared error of a number u: `error · (1 + μ·u)²`, if steps are narrow.
    error: f32,
    levels: Levels,
    /// What each byte stands for.
    values: [f32; 256],
    /// The code nearest to each interval's middle. Numbers above 1 lie in intervals twice as wide.
    nearest: [u8; 2 * INTERVALS],
}

impl Curve {
    fn new(mu: f64) -> Self {
        let levels: Levels = std::array::from_fn(|code| ((mu.ln_1p() * code as f64 / 127.0).exp_m1() / mu) as f32);
        // No code is 128.
        let values = std::array::from_fn(|byte| match byte as u8 as i8 {
            i8::MIN => 0.0,
            code => levels[usize::from(code.unsigned_abs())].copysign(f32::from(code)),
        });
        let mut nearest = [127; 2 * INTERVALS];
        let mut code = 0;
        for (interval, nearest) in nearest[..INTERVALS].iter_mut().enumerate() {
            let middle = (interval as f32 + 0.5) / INTERVALS as f32;
            while code < 127 && levels[code + 1] - middle < middle - levels[code] {
                code += 1;
            }
            *nearest = code as u8;
        }
        let error = (mu.ln_1p() / (127.0 * mu)).powi(2) / 12.0;
        Self { mu: mu as f32, error: error as f32, levels, values, nearest }
    }

    /// The code nearest to `u` or one beside it. `u` is positive, and above 1 only if the scale is below the block's largest number.
    #[inline(always)]
    fn near(&self, u: f32) -> usize {
        // The float's own bits: of 1 + u, the first thirteen of the mantissa.
        let interval = ((1.0 + u).to_bits() - 1f32.to_bits()) >> 10;
        usize::from(self.nearest[interval as usize % (2 * INTERVALS)] % 128)
    }
}

fn curves() -> &'static [Curve; 8] {
    static CURVES: OnceLock<[Curve; 8]> = OnceLock::new();
    CURVES.get_or_init(|| MU.map(Curve::new))
}

/// What each byte stands for, in units of the scale, on each curve.
pub fn tables() -> [&'static [f32; 256]; 8] {
    curves().each_ref().map(|curve| &curve.values)
}

/// The scale that a word's 13 bits stand for: the upper bits of a float32, without its sign. None is infinite.
fn scale_of(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits.min(LARGEST_SCALE)) << DROPPED).min(f32::MAX)
}

/// The least scale that is not below a magnitude.
fn scale_above(magnitude: f32) -> i32 {
    magnitude.to_bits().div_ceil(1 << DROPPED) as i32
}

/// The curve (0 to 7) and the scale of a word.
pub fn open(word: i16) -> (usize, f32) {
    let word = word as u16;
    (usize::from(word >> SCALE_BITS), scale_of(word & ((1 << SCALE_BITS) - 1)))
}

/// Words of so many coefficients.
pub fn words(coefficients: usize) -> usize {
    coefficients.div_ceil(BLOCK)
}

/// A type that numbers are decoded to, those that are too large for it to its largest.
pub trait Number: Copy + Send {
    fn of(value: f32) -> Self;
}

impl Number for f32 {
    #[inline(always)]
    fn of(value: f32) -> Self {
        value
    }
}

impl Number for f64 {
    #[inline(always)]
    fn of(value: f32) -> Self {
        value.into()
    }
}

impl Number for f16 {
    #[inline(always)]
    fn of(value: f32) -> Self {
        Self::from_f32(value.clamp(Self::MIN.to_f32(), Self::MAX.to_f32()))
    }
}

impl Number for bf16 {
    #[inline(always)]
    fn of(value: f32) -> Self {
        Self::from_f32(value.clamp(Self::MIN.to_f32(), Self::MAX.to_f32()))
    }
}

/// Fills `out` with the numbers of as many codes. Any bytes are some finite numbers.
///
/// # Panics
/// If the slices do not fit one another.
pub fn decode<T: Number>(codes: &[u8], block_words: &[i16], out: &mut [T], pool: &dyn Pool) {
    assert!(codes.len() == out.len() && block_words.len() == words(codes.len()));
    let count = codes.len();
    let out = DisjointSlice::new(out);
    pool.for_ranges(block_words.len(), &|blocks| {
        for block in blocks {
            let range = block * BLOCK..count.min((block + 1) * BLOCK);
            // SAFETY: a pool visits each block once.
            #[allow(unsafe_code)]
            let out = unsafe { out.range_mut(range.clone()) };
            let (curve, scale) = open(block_words[block]);
            let values = &curves()[curve].values;
            for (out, &code) in out.iter_mut().zip(&codes[range]) {
                *out = T::of(values[usize::from(code)] * scale);
            }
        }
    });
}

/// Fills `codes` and `block_words` with those of `values`, or returns the index of the first that is not finite.
///
/// # Panics
/// If the slices do not fit one another.
pub fn encode(values: &[f32], codes: &mut [u8], block_words: &mut [i16], pool: &dyn Pool) -> Result<(), usize> {
    assert!(codes.len() == values.len() && block_words.len() == words(values.len()));
    let bad = AtomicUsize::new(usize::MAX);
    let blocks = block_words.len();
    let (codes, block_words) = (DisjointSlice::new(codes), DisjointSlice::new(block_words));
    pool.for_ranges(blocks, &|blocks| {
        for block in blocks {
            let range = block * BLOCK..values.len().min((block + 1) * BLOCK);
            // SAFETY: a pool visits each block once.
            #[allow(unsafe_code)]
            let (codes, word) =
                unsafe { (codes.range_mut(range.clone()), &mut block_words.range_mut(block..block + 1)[0]) };
            let values = &values[range.clone()];
            if let Some(index) = values.iter().position(|value| !value.is_finite()) {
                bad.fetch_min(range.start + index, Relaxed);
                continue;
            }
            *word = encode_block(values, codes);
        }
    });
    match bad.into_inner() {
        usize::MAX => Ok(()),
        index => Err(index),
    }
}

/// A block's magnitudes times the power of two that takes the largest to [1, 2): squares are then neither too large nor too small,
/// and nothing is rounded.
struct Block {
    magnitudes: [f32; BLOCK],
    len: usize,
    largest: f32,
    /// The power's two factors: it may be no float32 itself.
    factors: [f32; 2],
}

impl Block {
    fn new(values: &[f32]) -> Self {
        let largest = values.iter().fold(0f32, |largest, value| largest.max(value.abs()));
        // Of a subnormal, the position of its first bit.
        let exponent = match (largest.to_bits() >> 23) as i32 {
            0 => -118 - largest.to_bits().leading_zeros() as i32,
            exponent => exponent - 127,
        };
        let power = |exponent: i32| f32::from_bits(((exponent + 127) as u32) << 23);
        let factors = [power(-exponent / 2), power(-exponent - -exponent / 2)];
        let mut block = Self { magnitudes: [0.0; BLOCK], len: values.len(), largest, factors };
        block.magnitudes.iter_mut().zip(values).for_each(|(out, value)| *out = value.abs() * factors[0] * factors[1]);
        block
    }

    /// A magnitude as the block has it.
    #[inline(always)]
    fn normal(&self, magnitude: f32) -> f32 {
        magnitude * self.factors[0] * self.factors[1]
    }

    /// What codes decode to, as the block has it: numbers and their unit.
    #[inline(always)]
    fn decoded<'a>(&self, curve: &'a Curve, scale: f32, scratch: &'a mut Levels) -> (&'a Levels, f32) {
        if self.largest > ROUNDED {
            return (&curve.levels, self.normal(scale));
        }
        *scratch = curve.levels.map(|level| self.normal(level * scale));
        (scratch, 1.0)
    }

    /// The curves by the error to expect, the least first.
    fn order(&self) -> [usize; 8] {
        let largest = self.normal(self.largest);
        let (mut sum, mut squares) = (0.0, 0.0);
        for magnitude in &self.magnitudes {
            sum += magnitude;
            squares += magnitude * magnitude;
        }
        let (sum, squares) = (sum / largest, squares / (largest * largest));
        let expected = curves()
            .each_ref()
            .map(|curve| curve.error * (self.len as f32 + curve.mu * (2.0 * sum + curve.mu * squares)));
        let mut order = std::array::from_fn(|curve| curve);
        order.sort_unstable_by(|&a, &b| expected[a].total_cmp(&expected[b]));
        order
    }

    /// The squared error with a curve and a scale, or `limit` or more once it exceeds that. Near a boundary between two codes
    /// either counts: their errors are nearly the same.
    fn error(&self, curve: &Curve, scale: f32, limit: f32) -> f32 {
        let mut scratch = [0.0; 128];
        let (decoded, unit) = self.decoded(curve, scale, &mut scratch);
        let per_scale = 1.0 / self.normal(scale);
        // Several sums, so that none waits for the last addition.
        let mut sums = [0f32; 4];
        for magnitudes in self.magnitudes.chunks_exact(16) {
            for magnitudes in magnitudes.chunks_exact(4) {
                for (sum, &magnitude) in sums.iter_mut().zip(magnitudes) {
                    let difference = magnitude - decoded[curve.near(magnitude * per_scale)] * unit;
                    *sum += difference * difference;
                }
            }
            if sums[0] + sums[1] + (sums[2] + sums[3]) >= limit {
                return limit;
            }
        }
        sums[0] + sums[1] + (sums[2] + sums[3])
    }
}

/// Encodes finite numbers and returns their word.
fn encode_block(values: &[f32], codes: &mut [u8]) -> i16 {
    let block = Block::new(values);
    if block.largest == 0.0 {
        codes.fill(0);
        return 0;
    }
    let above = scale_above(block.largest);
    let (mut best, mut least) = ((0, above as u16), f32::INFINITY);
    for index in block.order() {
        let curve = &curves()[index];
        for bits in TRIED.map(|offset| above + offset).filter(|bits| (1..=i32::from(LARGEST_SCALE)).contains(bits)) {
            let scale = scale_of(bits as u16);
            // Only what would be tried for the decoded block too: encoding that again then finds it, and changes nothing.
            let per_scale = 1.0 / block.normal(scale);
            let largest = curve.levels[curve.near(block.normal(block.largest) * per_scale)] * scale;
            if !TRIED.contains(&(bits - scale_above(largest))) {
                continue;
            }
            let error = block.error(curve, scale, least);
            if error < least {
                (best, least) = ((index, bits as u16), error);
            }
        }
    }
    let (index, bits) = best;
    write_codes(&block, values, &curves()[index], scale_of(bits), codes);
    ((index as u16) << SCALE_BITS | bits) as i16
}

/// The codes whose numbers are nearest; of two that are equally near, the one nearer to zero.
fn write_codes(block: &Block, values: &[f32], curve: &Curve, scale: f32, codes: &mut [u8]) {
    let mut scratch = [0.0; 128];
    let (decoded, unit) = block.decoded(curve, scale, &mut scratch);
    let per_scale = 1.0 / block.normal(scale);
    for ((out, &value), &magnitude) in codes.iter_mut().zip(values).zip(&block.magnitudes) {
        let distance = |code: usize| (f64::from(magnitude) - f64::from(decoded[code] * unit)).abs();
        let near = curve.near(magnitude * per_scale);
        let (mut code, mut least) = (near.saturating_sub(1), f64::INFINITY);
        for candidate in near.saturating_sub(1)..=(near + 1).min(127) {
            let distance = distance(candidate);
            if distance < least {
                (code, least) = (candidate, distance);
            }
        }
        let code = code as i8;
        *out = if value < 0.0 { -code } else { code } as u8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What idempotence and the nearest code rest on.
    #[test]
    fn every_level_is_looked_up_as_itself_and_every_number_beside_its_code() {
        for curve in curves() {
            assert!(curve.levels[0] == 0.0 && curve.levels[127] == 1.0);
            for (code, &level) in curve.levels.iter().enumerate() {
                for u in [level * (1.0 - 1e-6), level, level * (1.0 + 1e-6)] {
                    assert_eq!(curve.near(u), code, "mu = {}", curve.mu);
                }
            }
            for step in 0..=70_000 {
                let u = step as f32 / 65_536.0;
                let nearest = (0..128).min_by(|&a, &b| {
                    let distance = |code: usize| (curve.levels[code] - u).abs();
                    distance(a).total_cmp(&distance(b))
                });
                assert!(curve.near(u).abs_diff(nearest.unwrap_or(0)) <= 1, "mu = {}, u = {u}", curve.mu);
            }
        }
    }

    #[test]
    fn scales_are_floats_and_none_is_below_what_it_is_for() {
        for bits in 1..=LARGEST_SCALE {
            let scale = scale_of(bits);
            assert!(scale.is_finite() && scale > scale_of(bits - 1));
            assert_eq!(scale_above(scale), i32::from(bits));
            assert_eq!(scale_above(scale.next_down()), i32::from(bits));
        }
        assert_eq!(scale_of(u16::MAX >> 3), f32::MAX);
        assert_eq!(scale_above(f32::MAX), i32::from(LARGEST_SCALE));
        assert_eq!(scale_above(f32::from_bits(1)), 1);
    }
}
