//! Which layout of fixed width holds a weight, by how often its exponents or levels occur.

use super::Kind;
use crate::codec::{Dtype, Element, Header, PackedWeight, Quantizer};
use crate::parallel::{Pool, map};
use crate::{Error, Result};

/// Exponents in the window, of all.
pub const WINDOW: usize = 16;
pub const EXPONENTS: usize = 256;
/// Levels this far out are counted; farther ones have no code.
pub const FARTHEST: i32 = 4096;
pub const LEVELS: usize = 2 * FARTHEST as usize + 1;
/// At least so many weights to one that has no code, and where a wider code has a better share, so many.
pub const LEAST_SHARE: u64 = 64;
const GOOD_SHARE: u64 = 512;

/// The first of `width` neighbours in `counts` that together occur most, and how often others do.
pub fn best_run(counts: &[u64], width: usize) -> (usize, u64) {
    let held = |start: usize| counts[start..start + width].iter().sum::<u64>();
    let start = (0..=counts.len() - width).max_by_key(|&start| held(start)).unwrap_or(0);
    (start, counts.iter().sum::<u64>() - held(start))
}

/// How often each exponent occurs, or each level within [`FARTHEST`], and how often others do.
pub struct Counts {
    pub held: Vec<u64>,
    pub outside: u64,
}

/// Refuses a weight of which no kind has a layout.
pub fn check(header: &Header) -> Result<()> {
    let is_level = matches!(header.element, Element::Level { .. });
    if is_level || (header.quantizer == Quantizer::Lossless && header.dtype == Dtype::Bf16) {
        return Ok(());
    }
    let got = format!("lossless {:?}", header.dtype);
    Err(Error::argument("layout for CUDA", "lossless bfloat16, ecsq, int8 or int4", got))
}

pub fn count(weight: &PackedWeight, pool: &dyn Pool) -> Result<Counts> {
    let is_level = matches!(weight.header.element, Element::Level { .. });
    let size = if is_level { LEVELS } else { EXPONENTS };
    let place = |code: u32| {
        if is_level { code.wrapping_add(FARTHEST as u32) as usize } else { (code >> 7 & 0xff) as usize }
    };
    let per_tile = map(pool, weight.geometry().tiles(), |tile| -> Result<_> {
        let mut counts = vec![0u64; size + 1];
        for code in weight.tile_codes(tile)? {
            counts[place(code).min(size)] += 1;
        }
        Ok(counts)
    });
    let mut held = vec![0; size + 1];
    for counts in per_tile {
        held.iter_mut().zip(counts?).for_each(|(total, count)| *total += count);
    }
    let outside = held.pop().unwrap_or(0);
    Ok(Counts { held, outside })
}

/// The layout for a weight, and the base of its window or the level of its code 0.
pub fn choose(header: &Header, counts: &Counts) -> Result<(Kind, i32)> {
    let elements = header.geometry.elements() as u64;
    let refused = |outside: u64, codes: &str| {
        let expected = format!("at most one weight in {LEAST_SHARE} outside {codes}");
        Err(Error::argument("layout for CUDA", expected, format!("{outside} of {elements}")))
    };
    if matches!(header.element, Element::Level { .. }) {
        let run = |kind: Kind| {
            let (start, others) = best_run(&counts.held, kind.values());
            (kind, start as i32 - FARTHEST, others + counts.outside)
        };
        let runs = Kind::CODES.map(run);
        let good = runs.iter().find(|(_, _, others)| *others <= elements / GOOD_SHARE);
        let &(kind, lo, others) = good.unwrap_or(&runs[2]);
        return if others > elements / LEAST_SHARE { refused(others, "256 levels") } else { Ok((kind, lo)) };
    }
    let (base, others) = best_run(&counts.held, WINDOW);
    if others > elements / LEAST_SHARE { refused(others, "sixteen exponents") } else { Ok((Kind::Window, base as i32)) }
}
