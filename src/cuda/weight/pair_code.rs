//! What the pair prefix table codes of a weight, and by which code: exponents or levels, neighbours in a row together.

use half::bf16;

use super::{EXPONENTS, Escape, FARTHEST, Kind, best_run, check, count};
use crate::Result;
use crate::codec::{Assembly, Element, PackedWeight};
use crate::cuda::prefix;
use crate::parallel::{Pool, map};

/// Bits of the longest code; an index of the table has as many.
const LIMIT: usize = 10;
pub const ENTRIES: usize = 1 << LIMIT;
const SYMBOLS: usize = 256;
/// Upper bytes of a bfloat16 that values of levels may have.
const UPPER_BYTES: usize = 8;

unsafe extern "C" {
    fn infold_pairs_exponent_entry(first: u32, second: u32, length: u32) -> u32;
    fn infold_pairs_level_entry(first: u32, second: u32, uppers: u32, length: u32) -> u32;
}

/// What is coded of each weight: an exponent, or the number of its level.
pub struct Alphabet {
    pub kind: Kind,
    /// The level of symbol 0; 0 for exponents.
    pub lo: i32,
    /// The bfloat16 of each symbol: a level's value, or an exponent in place.
    pub bits: [u16; SYMBOLS],
    /// Symbols that may be coded.
    allowed: [bool; SYMBOLS],
    /// What stands in for a weight that is listed apart.
    pub filler: u8,
    /// Upper bytes of levels' values.
    pub uppers: [u8; UPPER_BYTES],
}

impl Alphabet {
    pub fn new(weight: &PackedWeight, assembly: &Assembly, pool: &dyn Pool) -> Result<Self> {
        let header = &weight.header;
        check(header)?;
        let counts = count(weight, pool)?.held;
        if !matches!(header.element, Element::Level { .. }) {
            // Infinities may not stand in: what they add cannot be taken off.
            let filler = (0..EXPONENTS - 1).max_by_key(|&exponent| counts[exponent]).unwrap_or(0) as u8;
            let bits = std::array::from_fn(|exponent| (exponent as u16) << 7);
            let (allowed, uppers) = ([true; SYMBOLS], [0; UPPER_BYTES]);
            return Ok(Self { kind: Kind::Pairs, lo: 0, bits, allowed, filler, uppers });
        }
        let start = best_run(&counts, SYMBOLS).0;
        let lo = start as i32 - FARTHEST;
        let value = |symbol: usize| assembly.point(lo.wrapping_add(symbol as i32) as u32);
        let bits: [u16; SYMBOLS] = std::array::from_fn(|symbol| bf16::from_f32(value(symbol)).to_bits());
        let counts = &counts[start..start + SYMBOLS];
        let mut by_upper = [0u64; 256];
        bits.iter().zip(counts).for_each(|(&bits, &count)| by_upper[usize::from(bits >> 8)] += count);
        let mut order: Vec<u8> = (0..=255).collect();
        order.sort_by_key(|&upper| std::cmp::Reverse(by_upper[usize::from(upper)]));
        let uppers = std::array::from_fn(|place| order[place]);
        let allowed = bits.map(|bits| uppers.contains(&((bits >> 8) as u8)));
        let filler = (0..SYMBOLS).filter(|&symbol| allowed[symbol]).max_by_key(|&symbol| counts[symbol]).unwrap_or(0);
        Ok(Self { kind: Kind::PairsOfLevels, lo, bits, allowed, filler: filler as u8, uppers })
    }

    /// The symbol of a weight's code, if it has one that may be coded.
    pub fn symbol(&self, code: u32) -> Option<u8> {
        let symbol = match self.kind {
            Kind::Pairs => (code >> 7 & 0xff) as usize,
            _ => (code as i32).wrapping_sub(self.lo) as u32 as usize,
        };
        self.allowed.get(symbol).is_some_and(|&allowed| allowed).then_some(symbol as u8)
    }

    /// A pair's entry in the table.
    pub fn entry(&self, [first, second]: [u8; 2], length: usize) -> u32 {
        if self.kind == Kind::Pairs {
            // SAFETY: computes with the numbers alone.
            return unsafe { infold_pairs_exponent_entry(first.into(), second.into(), length as u32) };
        }
        let [first, second] = [first, second].map(|symbol| self.bits[usize::from(symbol)]);
        let upper = |bits: u16| self.uppers.iter().position(|&upper| u16::from(upper) == bits >> 8).unwrap_or(0) as u32;
        // SAFETY: as above.
        unsafe {
            infold_pairs_level_entry(first.into(), second.into(), upper(first) | upper(second) << 4, length as u32)
        }
    }

    /// How often each pair occurs (first · 256 + second), the filler in the place of what may not be coded.
    pub fn count_pairs(&self, weight: &PackedWeight, pool: &dyn Pool) -> Result<Vec<u64>> {
        let (tiles, cols) = (weight.geometry().tiles(), weight.geometry().cols);
        let groups = tiles.min(16);
        let per_group = map(pool, groups, |group| -> Result<_> {
            let mut counts = vec![0u64; SYMBOLS * SYMBOLS];
            for tile in (group..tiles).step_by(groups) {
                for row in weight.tile_codes(tile)?.chunks(cols) {
                    for pair in row.chunks(2) {
                        let symbol = |half: usize| self.symbol(*pair.get(half)?);
                        let [first, second] = [0, 1].map(|half| symbol(half).unwrap_or(self.filler));
                        counts[place_of([first, second])] += 1;
                    }
                }
            }
            Ok(counts)
        });
        let mut total = vec![0; SYMBOLS * SYMBOLS];
        for counts in per_group {
            total.iter_mut().zip(counts?).for_each(|(total, count)| *total += count);
        }
        Ok(total)
    }
}

fn place_of([first, second]: [u8; 2]) -> usize {
    usize::from(first) << 8 | usize::from(second)
}

fn pair_at(place: usize) -> [u8; 2] {
    [(place >> 8) as u8, place as u8]
}

/// The code of pairs.
pub struct Code {
    filler: u8,
    /// Of each pair, the length in the upper half and the bits in the lower; 0 for one without a code.
    pub codes: Vec<u32>,
    /// Of each index of the table, the pair and the length of its code.
    pub table: Vec<([u8; 2], usize)>,
}

impl Code {
    /// The best code for pairs that occur so often: the rarer ones have none where listing them apart costs less.
    pub fn new(counts: &[u64], filler: u8) -> Self {
        let mut order: Vec<usize> = (0..counts.len()).filter(|&place| counts[place] > 0).collect();
        order.sort_by_key(|&place| std::cmp::Reverse(counts[place]));
        let mut by_symbol = [0; SYMBOLS];
        order.iter().for_each(|&place| pair_at(place).iter().for_each(|&s| by_symbol[usize::from(s)] += counts[place]));
        let most = order.len().min(ENTRIES);
        let candidates = (0..=8).map(|eighths| {
            let (coded, rare) = order.split_at(most * eighths / 8);
            let mut counts_then = vec![0; counts.len()];
            coded.iter().for_each(|&place| counts_then[place] = counts[place]);
            // Of a rare pair the filler takes one weight's place, the rarer one's.
            for &place in rare {
                let [first, second] = pair_at(place);
                let keeps_first = by_symbol[usize::from(first)] > by_symbol[usize::from(second)];
                counts_then[place_of(if keeps_first { [first, filler] } else { [filler, second] })] += counts[place];
            }
            Self::of(&counts_then, filler)
        });
        let best = candidates.min_by_key(|code| code.cost(&order, counts));
        best.unwrap_or_else(|| Self::of(counts, filler))
    }

    /// The code of the most frequent pairs; the filler's is always one of them.
    fn of(counts: &[u64], filler: u8) -> Self {
        let both = place_of([filler; 2]);
        let mut chosen: Vec<usize> = (0..counts.len()).filter(|&place| counts[place] > 0 && place != both).collect();
        chosen.sort_by_key(|&place| std::cmp::Reverse(counts[place]));
        chosen.truncate(ENTRIES - 1);
        chosen.insert(chosen.partition_point(|&place| counts[place] >= counts[both]), both);
        let counts: Vec<u64> = chosen.iter().map(|&place| counts[place].max(1)).collect();
        let lengths = prefix::lengths(&counts, LIMIT);
        let mut codes = vec![0; SYMBOLS * SYMBOLS];
        // Where one pair alone has a code, it has the other one's indices too.
        let mut table = vec![([filler; 2], 1); ENTRIES];
        for ((&place, &length), bits) in chosen.iter().zip(&lengths).zip(prefix::codes(&lengths)) {
            codes[place] = (length as u32) << 16 | bits;
            for rest in 0..ENTRIES >> length {
                table[rest << length | bits as usize] = (pair_at(place), length);
            }
        }
        Self { filler, codes, table }
    }

    /// What is coded for a pair, of which symbols may be missing: the filler stands in for what is listed apart.
    pub fn coded(&self, pair: [Option<u8>; 2]) -> [u8; 2] {
        let filled = |keeps: [bool; 2]| -> Option<[u8; 2]> {
            let symbol = |half: usize| if keeps[half] { pair[half] } else { Some(self.filler) };
            let pair = [symbol(0)?, symbol(1)?];
            (self.codes[place_of(pair)] > 0).then_some(pair)
        };
        let choices = [[true, true], [true, false], [false, true]];
        choices.into_iter().find_map(filled).unwrap_or([self.filler; 2])
    }

    /// Bits that the pairs at these places take, with what is listed apart.
    fn cost(&self, places: &[usize], counts: &[u64]) -> u64 {
        let bits = |place: usize| {
            let pair = pair_at(place);
            let coded = self.coded(pair.map(Some));
            let apart = pair.iter().zip(coded).filter(|&(&symbol, coded)| symbol != coded).count();
            let escape = 8 * size_of::<Escape>() * apart;
            counts[place] * (u64::from(self.codes[place_of(coded)] >> 16) + escape as u64)
        };
        places.iter().map(|&place| bits(place)).sum()
    }
}
