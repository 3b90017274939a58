//! How one plane of symbols is coded, and what that costs: a lone value, plain bits, or rANS with a 12-bit model.

use super::rans::MODEL_TOTAL;

/// Bytes of one escape: its position and its value.
pub const ESCAPE_BYTES: usize = 8;
const ESCAPE_BITS: f64 = 8.0 * ESCAPE_BYTES as f64;
/// Bytes that a symbol of a model takes in the tables: its frequency and its centroid.
pub const SYMBOL_TABLE_BITS: f64 = 24.0;
/// Symbols a model can tell apart; an escape, where there is one, is among them.
const MAX_SYMBOLS: usize = 256;
/// rANS must save this share of the plain bits to be worth decoding.
const WORTHWHILE: f64 = 0.97;

/// How often each value of a plane occurs: `counts[i]` for the value `lo + i`, `outside` for all others.
#[derive(Debug, Clone, Default)]
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

    /// The symbol of `value`, or None if it must be escaped.
    pub fn symbol(&self, value: i32) -> Option<usize> {
        let index = usize::try_from(i64::from(value) - i64::from(self.lo)).ok()?;
        (index < self.values() && self.frequencies[index] > 0).then_some(index)
    }

    /// (frequency, cumulative start) of each symbol.
    pub fn intervals(&self) -> Vec<(u32, u32)> {
        let mut start = 0;
        let interval = |&frequency: &u16| {
            let this = (u32::from(frequency), start);
            start += u32::from(frequency);
            this
        };
        self.frequencies.iter().map(interval).collect()
    }
}

/// How a plane is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Coding {
    /// Every element has this value; no stream.
    Constant(i32),
    /// `width` plain bits an element, holding its value less `lo`.
    Plain { lo: i32, width: u32 },
    /// rANS.
    Modelled(Model),
}

/// A coding and its cost in bits, its tables included, its per-tile cost not.
#[derive(Debug, Clone)]
pub struct Plan {
    pub coding: Coding,
    pub bits: f64,
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
            return Plan { coding: Coding::Plain { lo, width }, bits };
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
    Coding::Modelled(Model { lo, frequencies: fit(&counts), escapes: false })
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
    let frequencies = fit(&kept);
    let coded: f64 = kept
        .iter()
        .zip(&frequencies)
        .filter(|&(&count, _)| count > 0)
        .map(|(&count, &f)| count as f64 * (f64::from(MODEL_TOTAL) / f64::from(f)).log2())
        .sum();
    let bits = coded + escaped as f64 * ESCAPE_BITS + SYMBOL_TABLE_BITS * kept.len() as f64;
    Plan {
        coding: Coding::Modelled(Model { lo: histogram.lo + first as i32, frequencies, escapes: escaped > 0 }),
        bits,
    }
}

/// Frequencies of two or more symbols: they sum to 4096, at least 1 where a count is not zero, below 4096, and near the least code length.
fn fit(counts: &[u64]) -> Vec<u16> {
    let total: u64 = counts.iter().sum::<u64>().max(1);
    let ideal = |count: u64| count as f64 * f64::from(MODEL_TOTAL) / total as f64;
    let ceiling = MODEL_TOTAL as u16 - 1;
    let mut frequencies: Vec<u16> =
        counts.iter().map(|&count| (ideal(count) as u16).clamp(u16::from(count > 0), ceiling)).collect();
    let mut sum: i32 = frequencies.iter().map(|&f| i32::from(f)).sum();
    // One slot at a time, to where it saves the most or from where it costs the least.
    let change = |i: usize, f: u16, step: i32| {
        let (old, new) = (f64::from(f), f64::from(i32::from(f) + step));
        counts[i] as f64 * (new / old).log2()
    };
    while sum != MODEL_TOTAL as i32 {
        let step = (MODEL_TOTAL as i32 - sum).signum();
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
