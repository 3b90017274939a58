//! The pair prefix table (`cuda/pairs.cuh`): laying weights out by a code, and reading them.
//!
//! ```text
//! payload: head (the bfloat16 that stands in for what is listed apart, columns under one scale, upper bytes of values)
//!          of levels: for each index of the table its two values, as f32
//!          the table's entries
//!          of bfloat16: tiles of signs and mantissas
//!          where each row's escapes begin and the last's end
//!          for each stripe: its runs, and their end: quad of words, tile; padded to 16 bytes
//!          escapes, as in the other layouts, padded to 16 bytes
//!          words, in quads: of each run where its streams begin, and these
//! ```

use super::pair_code::{Alphabet, Code, ENTRIES};
use super::{ALIGN, Escape, Kind, LEAST_SHARE, Parts, STRIPE, TILE_COLS, Tables, word};
use crate::codec::{Assembly, PackedWeight};
use crate::parallel::{Pool, map};
use crate::{Error, Result};

/// Words of a quad.
const QUAD: usize = ALIGN / size_of::<u32>();

unsafe extern "C" {
    fn infold_pairs_most_runs(across: i32) -> i32;
    fn infold_pairs_most_words(across: i32) -> usize;
    fn infold_pairs_encode(
        symbols: *const u8,
        rests: *const u16,
        across: i32,
        codes: *const u32,
        tiles: *mut u32,
        words: *mut u32,
        directory: *mut u32,
    ) -> usize;
    fn infold_pairs_decode(
        table: *const u32,
        tiles: *const u32,
        words: *const u32,
        quads: usize,
        directory: *const u32,
        across: i32,
        out: *mut u16,
    );
}

/// Words of a stripe's part of the directory.
pub fn directory_words(cols: usize) -> usize {
    // SAFETY: computes with the number alone.
    2 * (unsafe { infold_pairs_most_runs(cols.div_ceil(TILE_COLS) as i32) } as usize + 1)
}

/// A stripe of rows, laid out.
struct Stripe {
    tiles: Vec<u32>,
    words: Vec<u32>,
    directory: Vec<u32>,
    escapes: Vec<Vec<Escape>>,
}

fn encode_stripe(codes: &[u32], parts: Parts, alphabet: &Alphabet, code: &Code, assembly: &Assembly) -> Stripe {
    let cols = parts.cols;
    let across = cols.div_ceil(TILE_COLS);
    let width = across * TILE_COLS;
    let is_bf16 = parts.kind == Kind::Pairs;
    // What is beyond the weight is coded too.
    let mut symbols = vec![alphabet.filler; STRIPE * width];
    let mut rests = vec![0u16; if is_bf16 { STRIPE * width } else { 0 }];
    let mut escapes = vec![Vec::new(); codes.len() / cols];
    for (row, codes) in codes.chunks(cols).enumerate() {
        for (index, pair) in codes.chunks(2).enumerate() {
            let found = |half: usize| match pair.get(half) {
                Some(&code) => alphabet.symbol(code),
                None => Some(alphabet.filler),
            };
            let wanted = [found(0), found(1)];
            let coded = code.coded(wanted);
            for (half, &weight) in pair.iter().enumerate() {
                let (col, at) = (2 * index + half, row * width + 2 * index + half);
                if wanted[half] != Some(coded[half]) {
                    escapes[row].push(Escape { col: col as u32, value: assembly.point(weight) });
                } else if is_bf16 {
                    rests[at] = weight as u16;
                }
            }
            let at = row * width + 2 * index;
            symbols[at..at + 2].copy_from_slice(&coded);
        }
    }
    let mut tiles = vec![0; parts.stripe_bytes() / size_of::<u32>()];
    let mut directory = vec![0; directory_words(cols)];
    let rests = if is_bf16 { rests.as_ptr() } else { std::ptr::null() };
    // SAFETY: sixteen rows of whole tiles, a code for each pair, and room for a stripe's tiles, words and directory.
    let words = unsafe {
        let mut words = vec![0; infold_pairs_most_words(across as i32)];
        let (codes, across) = (code.codes.as_ptr(), across as i32);
        let (tiles, directory) = (tiles.as_mut_ptr(), directory.as_mut_ptr());
        let quads = infold_pairs_encode(symbols.as_ptr(), rests, across, codes, tiles, words.as_mut_ptr(), directory);
        words.truncate(QUAD * quads);
        words
    };
    Stripe { tiles, words, directory, escapes }
}

/// A weight's payload and tables in this layout. One that has none is an error.
pub fn to_device(weight: &PackedWeight, pool: &dyn Pool) -> Result<(Vec<u8>, Vec<u8>)> {
    let (header, geometry) = (&weight.header, weight.geometry());
    let canonical = header.origin.as_deref().unwrap_or(header);
    let assembly = Assembly::new(canonical);
    let alphabet = Alphabet::new(weight, &assembly, pool)?;
    let code = Code::new(&alphabet.count_pairs(weight, pool)?, alphabet.filler);
    let parts = Parts::new(alphabet.kind, geometry.rows, geometry.cols);
    let encoded = map(pool, geometry.tiles(), |tile| -> Result<_> {
        let codes = weight.tile_codes(tile)?;
        let stripes = codes.chunks(STRIPE * geometry.cols);
        Ok(stripes.map(|stripe| encode_stripe(stripe, parts, &alphabet, &code, &assembly)).collect::<Vec<_>>())
    });
    let encoded: Vec<_> = encoded.into_iter().collect::<Result<_>>()?;
    let stripes = || encoded.iter().flatten();
    let rows = || stripes().flat_map(|stripe| &stripe.escapes);
    let elements = geometry.elements() as u64;
    let apart = rows().map(Vec::len).sum::<usize>() as u64;
    if apart > elements / LEAST_SHARE {
        let expected = format!("at most one weight in {LEAST_SHARE} without a code");
        return Err(Error::argument("layout for CUDA", expected, format!("{apart} of {elements}")));
    }

    let mut payload = Vec::with_capacity(parts.bytes());
    let mut write = |words: &mut dyn Iterator<Item = u32>| words.for_each(|word| payload.extend(word.to_le_bytes()));
    let group_cols = header.scale_grid.group_cols(geometry).max(1) as u32;
    let uppers = alphabet.uppers.as_chunks::<4>().0.iter().map(|&bytes| u32::from_le_bytes(bytes));
    write(&mut [u32::from(alphabet.bits[usize::from(alphabet.filler)]), group_cols].into_iter().chain(uppers));
    if parts.kind == Kind::PairsOfLevels {
        let value = |symbol: &u8| assembly.point(alphabet.lo.wrapping_add(i32::from(*symbol)) as u32).to_bits();
        write(&mut code.table.iter().flat_map(|(pair, _)| pair.iter().map(value)));
    }
    write(&mut code.table.iter().map(|&(pair, length)| alphabet.entry(pair, length)));
    write(&mut stripes().flat_map(|stripe| stripe.tiles.iter().copied()));
    let mut start = 0;
    write(&mut rows().map(|escapes| {
        start += escapes.len() as u32;
        start - escapes.len() as u32
    }));
    write(&mut std::iter::once(start));
    let mut first = 0;
    for stripe in stripes() {
        write(&mut stripe.directory.chunks(2).flat_map(|place| [first + place[0], place[1]]));
        first += (stripe.words.len() / QUAD) as u32;
    }
    payload.resize(parts.escapes(), 0);
    for escape in rows().flatten() {
        payload.extend(escape.col.to_le_bytes());
        payload.extend(escape.value.to_bits().to_le_bytes());
    }
    payload.resize(payload.len().next_multiple_of(ALIGN), 0);
    for word in stripes().flat_map(|stripe| &stripe.words) {
        payload.extend(word.to_le_bytes());
    }
    Ok((payload, Tables { kind: parts.kind, lo: alphabet.lo, header: canonical.clone() }.to_bytes()))
}

/// How long a payload is, by its directory, after so many escapes; None where the directory is damaged.
pub fn bytes(payload: &[u8], parts: Parts, escapes: usize) -> Option<usize> {
    let starts = || payload[parts.directory()].chunks(2 * size_of::<u32>()).map(|place| word(place, 0));
    let quads = starts().next_back().unwrap_or(0) as usize;
    starts().is_sorted().then(|| words_start(parts, escapes) + quads * ALIGN)
}

/// Where the words begin, after so many escapes.
fn words_start(parts: Parts, escapes: usize) -> usize {
    (parts.escapes() + escapes * size_of::<Escape>()).next_multiple_of(ALIGN)
}

/// A payload, read on the host.
pub struct Reading<'a> {
    payload: &'a [u8],
    parts: Parts,
    /// For each index of the table the codes of both weights; of levels alone.
    levels: Vec<u32>,
    table: Vec<u32>,
    words: Vec<u32>,
}

impl<'a> Reading<'a> {
    /// Of a payload whose parts are all there; `level` gives the code of a level's value.
    pub fn new(payload: &'a [u8], parts: Parts, escapes: usize, level: impl Fn(f32) -> u32) -> Self {
        let values = numbers(&payload[parts.values()]);
        let (values, table) = values.split_at(values.len() - ENTRIES);
        let levels = values.iter().map(|&bits| level(f32::from_bits(bits))).collect();
        let words = numbers(&payload[words_start(parts, escapes)..]);
        Self { payload, parts, levels, table: table.to_vec(), words }
    }

    /// The codes of a stripe's weights, with what stands in for those that are listed apart.
    pub fn stripe(&self, stripe: usize) -> Vec<u32> {
        let Self { payload, parts, .. } = *self;
        let across = parts.cols.div_ceil(TILE_COLS);
        let width = across * TILE_COLS;
        let tiles = numbers(&payload[parts.tiles(stripe)]);
        let words_each = directory_words(parts.cols);
        let directory = numbers(&payload[parts.directory()]);
        let directory = &directory[stripe * words_each..][..words_each];
        let mut out = vec![0u16; STRIPE * width];
        let is_bf16 = parts.kind == Kind::Pairs;
        let tiles = if is_bf16 { tiles.as_ptr() } else { std::ptr::null() };
        // SAFETY: a table, a stripe's tiles and directory, all words, and room for sixteen rows of whole tiles.
        unsafe {
            let (table, words, directory) = (self.table.as_ptr(), self.words.as_ptr(), directory.as_ptr());
            let quads = self.words.len() / QUAD;
            infold_pairs_decode(table, tiles, words, quads, directory, across as i32, out.as_mut_ptr());
        }
        let code = |(col, &index): (usize, &u16)| match self.levels.get(2 * usize::from(index) + col % 2) {
            Some(&level) if !is_bf16 => level,
            _ => u32::from(index),
        };
        let rows = out.chunks(width).take((parts.rows - stripe * STRIPE).min(STRIPE));
        rows.flat_map(|row| row[..parts.cols].iter().enumerate().map(code)).collect()
    }
}

/// Little-endian words.
pub fn numbers(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks::<4>().0.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect()
}
