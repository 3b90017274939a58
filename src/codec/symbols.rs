//! How one plane of symbols is coded, and what that costs: a lone value, plain bits, or rANS with a 12-bit model or over
//! sixteen classes.

use std::cmp::Reverse;

use super::alias::{ALIAS_CEILING, ALIAS_SYMBOLS, ALIAS_TOTAL};
use super::geometry::Geometry;
use super::rans::MODEL_TOTAL;
use super::stream::ESCAPE_BYTES;

const ESCAPE_BITS: f64 = 8.0 * ESCAPE_BYTES as f64;
/// Bytes that a symbol of a model takes in the tables: its frequency and its centroid.
pub const SYMBOL_TABLE_BITS: f64 = 24.0;
/// Symbols a model can tell apart; an escape, where there is one, is among them.
const MAX_SYMBOLS: usize = 256;
/// rANS must save this share of the plain bits to be worth decoding.
const WORTHWHILE: f64 = 0.97;

/// The coder of sixteen classes is several times faster than that of 12-bit models: it may cost this share of a weight more.
pub const ALIAS_PREMIUM: f64 = 0.015;
/// What short states cost that coder, in bits a symbol.
const ALIAS_LOSS: f64 = 0.005;
/// Streams that a tile's plane may be cut into, and the share of a weight that the states of further ones may cost.
pub const STREAMS: [usize; 3] = [4, 2, 1];
const STREAMS_SHARE: f64 = 0.003;

/// Values of a palette.
pub const PALETTE: usize = 16;

/// How often each value of a plane occurs: `counts[i]` for the value `lo + i`, `outside` for all others.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Histogram {
    pub lo: i32,
    pub counts: Vec<u64>,
    pub outside: u64,
}

impl Histogram {
    pub fn total(&self) -> u64 {
        self.counts.iter().sum::<u64>() + self.outside
    }

    /// Zeroth-order entropy in bits a symbol, values outside counted as one symbol.
    pub fn entropy(&self) -> f64 {
        let total = self.total() as f64;
        let all = self.counts.iter().chain(std::iter::once(&self.outside));
        all.filter(|&&count| count > 0)
            .map(|&count| {
                let p = count as f64 / total;
                -p * p.log2()
            })
            .sum()
    }

    /// The same values without their `bits` low bits.
    pub fn without_low_bits(&self, bits: u32) -> Self {
        let lo = self.lo >> bits;
        let mut counts = vec![0; (self.counts.len() >> bits) + 2];
        for (i, &count) in self.counts.iter().enumerate() {
            counts[(((self.lo + i as i32) >> bits) - lo) as usize] += count;
        }
        Self { lo, counts, outside: self.outside }
    }

    /// First and last index that occur.
    fn support(&self) -> Option<(usize, usize)> {
        let first = self.counts.iter().position(|&count| count > 0)?;
        let last = self.counts.iter().rposition(|&count| count > 0)?;
        Some((first, last))
    }
}

/// A 12-bit model: the frequency of each value from `lo` on, and last, if `escapes`, that of a value listed apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Model {
    pub lo: i32,
    pub frequencies: Vec<u16>,
    pub escapes: bool,
}

impl Model {
    /// The values with a symbol of their own.
    pub fn values(&self) -> usize {
        self.frequencies.len() - usize::from(self.escapes)
    }

    /// (frequency, cumulative start) of each symbol.
    pub fn intervals(&self) -> Vec<(u32, u32)> {
        let mut start = 0;
        let interval = |&frequency: &u16| {
            // Symbols of no frequency are not coded, but in a forged weight nothing keeps them out.
            let this = (u32::from(frequency.max(1)), start);
            start += u32::from(frequency);
            this
        };
        self.frequencies.iter().map(interval).collect()
    }
}

/// A model of at most sixteen values from `lo` on, for the coder of `alias.rs`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AliasModel {
    pub lo: i32,
    pub frequencies: Vec<u8>,
    pub escapes: bool,
}

/// How a plane is stored. `escapes` says that values without a symbol are listed apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Coding {
    /// Every element has this value; no stream.
    Constant(i32),
    /// `width` plain bits an element, holding its value less `lo`.
    Plain { lo: i32, width: u32, escapes: bool },
    /// Four plain bits an element, which pick its value.
    Palette { values: [u8; PALETTE], escapes: bool },
    /// rANS with a 12-bit model.
    Modelled(Model),
    /// rANS with an 8-bit model of at most sixteen symbols.
    Alias(AliasModel),
}

impl Coding {
    /// The value of symbol 0.
    pub fn lo(&self) -> i32 {
        match self {
            Self::Constant(lo) | Self::Plain { lo, .. } => *lo,
            Self::Palette { .. } => 0,
            Self::Modelled(model) => model.lo,
            Self::Alias(model) => model.lo,
        }
    }

    /// How many values from `lo` on may have a symbol.
    pub fn values(&self) -> usize {
        match self {
            Self::Constant(_) => 1,
            Self::Plain { width, .. } => 1 << width,
            Self::Palette { .. } => 1 << u8::BITS,
            Self::Modelled(model) => model.values(),
            Self::Alias(model) => model.frequencies.len(),
        }
    }

    /// Whether some values may be listed apart.
    pub fn escapes(&self) -> bool {
        match self {
            Self::Constant(_) => false,
            Self::Plain { escapes, .. } | Self::Palette { escapes, .. } => *escapes,
            Self::Modelled(model) => model.escapes,
            Self::Alias(model) => model.escapes,
        }
    }

    /// Plain bits an element, None for a coding of others.
    pub fn plain_width(&self) -> Option<u32> {
        match self {
            Self::Plain { width, .. } => Some(*width),
            Self::Palette { .. } => Some(PALETTE.ilog2()),
            _ => None,
        }
    }

    /// Whether this is entropy-coded.
    pub fn is_modelled(&self) -> bool {
        matches!(self, Self::Modelled(_) | Self::Alias(_))
    }

    /// The symbol of `value`, or None if it must be escaped.
    #[inline(always)]
    pub fn symbol(&self, value: i32) -> Option<u8> {
        if let Self::Palette { values, .. } = self {
            return values.iter().position(|&v| i32::from(v) == value).map(|index| index as u8);
        }
        let index = value.wrapping_sub(self.lo()) as u32 as usize;
        let coded = index < self.values()
            && match self {
                Self::Modelled(model) => model.frequencies[index] > 0,
                Self::Alias(model) => model.frequencies[index] > 0,
                _ => true,
            };
        coded.then_some(index as u8)
    }

    /// The symbol that stands where a value is listed apart.
    pub fn filler(&self) -> u8 {
        fn most_frequent<T: Ord + Copy>(frequencies: &[T]) -> u8 {
            (0..frequencies.len()).max_by_key(|&index| frequencies[index]).unwrap_or(0) as u8
        }
        match self {
            Self::Modelled(model) if model.escapes && model.frequencies.last() > Some(&0) => {
                (model.frequencies.len() - 1) as u8
            }
            Self::Modelled(model) => most_frequent(&model.frequencies),
            Self::Alias(model) => most_frequent(&model.frequencies),
            _ => 0,
        }
    }

    /// Whether every value from the first to the last has a symbol.
    pub fn is_gapless(&self) -> bool {
        match self {
            Self::Modelled(model) => model.frequencies.iter().all(|&frequency| frequency > 0),
            Self::Alias(model) => model.frequencies.iter().all(|&frequency| frequency > 0),
            Self::Palette { .. } => false,
            _ => true,
        }
    }

    /// How often each value from `lo` on occurs, as far as the coding says.
    fn counts(&self) -> Vec<u64> {
        match self {
            Self::Modelled(model) => model.frequencies[..model.values()].iter().map(|&f| u64::from(f)).collect(),
            Self::Alias(model) => model.frequencies.iter().map(|&f| u64::from(f)).collect(),
            _ => vec![1; self.values()],
        }
    }

    /// Plain bits, and values listed apart, for a plane that this coding holds: the least size for its frequencies.
    pub fn flattened(&self) -> Self {
        if self.is_modelled() { self.flat(self.lo(), &self.counts()).0 } else { self.clone() }
    }

    /// The same for a plane of exponents in whose lowest bit there is a sign; a palette where that lists less apart, as
    /// where exact zeros lie far from the other exponents.
    pub fn flattened_with_sign(&self) -> Self {
        let lo = self.lo() & !1;
        let mut counts = Vec::new();
        for (index, count) in self.counts().into_iter().enumerate() {
            let pair = (self.lo() + index as i32 - lo) as usize / 2 * 2;
            counts.resize(pair + 2, 0);
            counts[pair] += count;
            counts[pair + 1] += count;
        }
        let (window, bits) = self.flat(lo, &counts);
        let mut order: Vec<usize> = (0..counts.len()).collect();
        order.sort_by_key(|&index| Reverse(counts[index]));
        let Some(most_frequent) = order.first_chunk::<PALETTE>() else { return window };
        let (kept, inside) = (counts.iter().sum(), most_frequent.iter().map(|&index| counts[index]).sum());
        if flat_bits(PALETTE.ilog2(), kept, inside) >= bits {
            return window;
        }
        let values = most_frequent.map(|index| (lo + index as i32) as u8);
        Self::Palette { values, escapes: inside < kept || self.escapes() }
    }

    /// Plain bits for values that occur so often from `lo` on, and their number an element.
    fn flat(&self, lo: i32, counts: &[u64]) -> (Self, f64) {
        let kept: u64 = counts.iter().sum();
        let cost = |width: u32| {
            let (start, inside) = heaviest_window(counts, 1 << width);
            (flat_bits(width, kept, inside), start, width, inside < kept)
        };
        let best = (1..=8).map(cost).min_by(|a, b| a.0.total_cmp(&b.0));
        let (bits, start, width, outside) = best.unwrap_or((8.0, 0, 8, false));
        let escapes = outside || self.escapes();
        let unused = (1 << width) - counts.len().min(1 << width) as i32;
        // What is listed apart may find a place below: of floats, exponents that are too small are the more.
        let below = if escapes { unused.min(lo.max(0)) } else { 0 };
        (Self::Plain { lo: lo + start as i32 - below, width, escapes }, bits)
    }
}

/// Plain bits and those of what is listed apart, an element, where `inside` of `kept` have a symbol. What the model lists
/// apart is less than one of its slots.
fn flat_bits(width: u32, kept: u64, inside: u64) -> f64 {
    f64::from(width) + (kept - inside) as f64 / kept.max(1) as f64 * ESCAPE_BITS
}

/// Where the `size` consecutive counts with the largest sum begin, and that sum.
fn heaviest_window(counts: &[u64], size: usize) -> (usize, u64) {
    let starts = 0..=counts.len().saturating_sub(size);
    let sum = |start: usize| counts[start..(start + size).min(counts.len())].iter().sum();
    // Of equals, the first.
    starts
        .map(|start| (start, sum(start)))
        .reduce(|best, next| if next.1 > best.1 { next } else { best })
        .unwrap_or((0, 0))
}

/// A coding and its cost in bits, its tables included, its per-tile cost not.
#[derive(Debug, Clone)]
pub struct Plan {
    pub coding: Coding,
    pub bits: f64,
}

/// Bits that a lane's coder state takes beyond the information in it.
pub fn state_bits(coding: &Coding) -> f64 {
    match coding {
        Coding::Modelled(_) => 24.0,
        Coding::Alias(_) => 12.0,
        _ => 0.0,
    }
}

/// How many streams a tile's plane is cut into, for a weight of `bits` in all.
pub fn streams(coding: &Coding, geometry: Geometry, bits: f64) -> usize {
    let states: f64 = (0..geometry.tiles()).map(|tile| state_bits(coding) * geometry.lanes_of(tile) as f64).sum();
    let allowed = |&streams: &usize| (streams - 1) as f64 * states <= STREAMS_SHARE * bits;
    if coding.is_modelled() { STREAMS.into_iter().find(allowed).unwrap_or(1) } else { 1 }
}

/// The cheapest coding for a plane. `max_width`, where the plane's values fit in so many bits, allows plain bits.
pub fn plan(histogram: &Histogram, max_width: Option<u32>) -> Plan {
    let Some((first, last)) = histogram.support() else {
        // Nothing inside the window: an empty plane, or one whose every value is an escape.
        return escape_everything(histogram);
    };
    let value = |index: usize| histogram.lo + index as i32;
    if first == last && histogram.outside == 0 {
        return Plan { coding: Coding::Constant(value(first)), bits: 0.0 };
    }
    let modelled = plan_model(histogram, first, last);
    let width = usize::BITS - (last - first).leading_zeros();
    if histogram.outside == 0 && max_width.is_some_and(|max| width <= max) {
        let bits = f64::from(width) * histogram.total() as f64;
        if modelled.bits > WORTHWHILE * bits {
            let lo = value(first);
            return Plan { coding: Coding::Plain { lo, width, escapes: false }, bits };
        }
    }
    modelled
}

fn escape_everything(histogram: &Histogram) -> Plan {
    if histogram.outside == 0 {
        return Plan { coding: Coding::Constant(0), bits: 0.0 };
    }
    // Two symbols, so that the escape's frequency stays below the total.
    let model = Model { lo: histogram.lo, frequencies: vec![1, MODEL_TOTAL as u16 - 1], escapes: true };
    Plan { coding: Coding::Modelled(model), bits: histogram.outside as f64 * ESCAPE_BITS }
}

/// A model in which every symbol of an alphabet has a frequency, for counts that are not of the plane's own values.
pub fn model_of_all(counts: &[u64], lo: i32) -> Coding {
    let counts: Vec<u64> = counts.iter().map(|count| count + 1).collect();
    Coding::Modelled(Model { lo, frequencies: fit(&counts, MODEL_TOTAL, MODEL_TOTAL as u16 - 1), escapes: false })
}

/// Narrows the window from both ends while escaping is cheaper than keeping, then fits the frequencies.
fn plan_model(histogram: &Histogram, mut first: usize, mut last: usize) -> Plan {
    let total = histogram.total() as f64;
    // A symbol that is kept takes a place in the tables and at least 1/4096 of the probability.
    let keeping = SYMBOL_TABLE_BITS - total * (1.0 - 1.0 / f64::from(MODEL_TOTAL)).log2();
    let counts = &histogram.counts;
    let mut escaped = histogram.outside;
    while first < last {
        let end = if counts[first] <= counts[last] { first } else { last };
        let limit = MAX_SYMBOLS - usize::from(escaped > 0);
        if last - first < limit && counts[end] as f64 * ESCAPE_BITS > keeping {
            break;
        }
        escaped += counts[end];
        if end == first {
            first += 1;
        } else {
            last -= 1;
        }
    }
    let mut kept = counts[first..=last].to_vec();
    if escaped > 0 {
        kept.push(escaped);
    }
    let frequencies = fit(&kept, MODEL_TOTAL, MODEL_TOTAL as u16 - 1);
    let bits = code_length(&kept, &frequencies, MODEL_TOTAL)
        + escaped as f64 * ESCAPE_BITS
        + SYMBOL_TABLE_BITS * kept.len() as f64;
    Plan {
        coding: Coding::Modelled(Model { lo: histogram.lo + first as i32, frequencies, escapes: escaped > 0 }),
        bits,
    }
}

/// The best coding over sixteen classes or fewer, if the plane has one: values outside its window are listed apart, under
/// the symbol of the most frequent value.
pub fn plan_alias(histogram: &Histogram) -> Option<Plan> {
    let (first, last) = histogram.support()?;
    let support = &histogram.counts[first..=last];
    let plan = |size: usize| {
        let (start, inside) = heaviest_window(support, size);
        let mut counts = support[start..support.len().min(start + size)].to_vec();
        let outside = histogram.total() - inside;
        // As `Coding::filler` will choose.
        *counts.iter_mut().max()? += outside;
        let frequencies = fit(&counts, ALIAS_TOTAL, ALIAS_CEILING);
        if frequencies.iter().map(|&f| u32::from(f)).sum::<u32>() != ALIAS_TOTAL {
            // Too few symbols to share the total under the ceiling.
            return None;
        }
        let coded = code_length(&counts, &frequencies, ALIAS_TOTAL);
        let bits =
            coded + ALIAS_LOSS * histogram.total() as f64 + outside as f64 * ESCAPE_BITS + 8.0 * counts.len() as f64;
        let frequencies = frequencies.into_iter().map(|f| f as u8).collect();
        let lo = histogram.lo + (first + start) as i32;
        Some(Plan { coding: Coding::Alias(AliasModel { lo, frequencies, escapes: outside > 0 }), bits })
    };
    let sizes = 1..=ALIAS_SYMBOLS.min(support.len());
    sizes.filter_map(plan).min_by(|a, b| a.bits.total_cmp(&b.bits))
}

/// Bits of symbols that occur `counts` times, coded at `frequencies` of `total`.
fn code_length(counts: &[u64], frequencies: &[u16], total: u32) -> f64 {
    let coded = counts.iter().zip(frequencies).filter(|&(&count, _)| count > 0);
    coded.map(|(&count, &f)| count as f64 * (f64::from(total) / f64::from(f)).log2()).sum()
}

/// Frequencies of two or more symbols: they sum to `total` where `ceiling` allows, are at least 1 where a count is not zero,
/// at most `ceiling`, and near the least code length.
fn fit(counts: &[u64], total: u32, ceiling: u16) -> Vec<u16> {
    let sum_of_counts = counts.iter().sum::<u64>().max(1);
    let ideal = |count: u64| count as f64 * f64::from(total) / sum_of_counts as f64;
    let mut frequencies: Vec<u16> =
        counts.iter().map(|&count| (ideal(count) as u16).clamp(u16::from(count > 0), ceiling)).collect();
    let mut sum: i32 = frequencies.iter().map(|&f| i32::from(f)).sum();
    // One slot at a time, to where it saves the most or from where it costs the least.
    let change = |i: usize, f: u16, step: i32| {
        let (old, new) = (f64::from(f), f64::from(i32::from(f) + step));
        counts[i] as f64 * (new / old).log2()
    };
    while sum != total as i32 {
        let step = (total as i32 - sum).signum();
        let allowed = |&(_, &f): &(usize, &u16)| if step > 0 { f > 0 && f < ceiling } else { f > 1 };
        let best = frequencies
            .iter()
            .enumerate()
            .filter(allowed)
            .map(|(i, &f)| (i, change(i, f, step)))
            .max_by(|a, b| a.1.total_cmp(&b.1));
        let Some((best, _)) = best else { break };
        frequencies[best] = (i32::from(frequencies[best]) + step) as u16;
        sum += step;
    }
    frequencies
}
