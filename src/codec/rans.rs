//! Range asymmetric numeral systems (Duda 2013), 32 lanes interleaved into one stream of 16-bit words.
//!
//! A lane's state `x` lies in `[2^16, 2^32)`. With a 12-bit model (frequency `f`, cumulative start `c`), decoding a step is
//!
//! ```text
//! for each lane in order:
//!     slot = x mod 4096          symbol = table[slot]
//!     x    = f · (x div 4096) + slot − c
//!     if x < 2^16: x = x · 2^16 + next word
//! ```
//!
//! and encoding is the same backwards, from the last symbol to the first. Lanes share nothing but the word stream, so a
//! vector unit or a warp runs a whole step at once and hands out words by counting who needs one.

use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use super::arch;
use super::geometry::{LANES, Steps};
use super::stream::LaneDecoder;

/// log2 of the sum of a model's frequencies.
pub const MODEL_BITS: u32 = 12;
/// The sum of a model's frequencies.
pub const MODEL_TOTAL: u32 = 1 << MODEL_BITS;
pub const LOWER: u32 = 1 << 16;
pub const SLOT_MASK: u32 = MODEL_TOTAL - 1;

/// The decoder's view of a model: for each of 4096 slots, frequency, offset in the symbol's interval, and symbol.
pub struct SlotTable(Box<[u32; MODEL_TOTAL as usize]>);

impl SlotTable {
    /// `frequencies` must sum to 4096, each below 4096 (a lone symbol needs no coder).
    pub fn new(frequencies: &[u16]) -> Self {
        let mut slots = Box::new([0; MODEL_TOTAL as usize]);
        let mut start = 0;
        for (symbol, &frequency) in frequencies.iter().enumerate() {
            let frequency = usize::from(frequency);
            for (offset, slot) in slots[start..start + frequency].iter_mut().enumerate() {
                *slot = (frequency as u32) << 20 | (offset as u32) << 8 | symbol as u32;
            }
            start += frequency;
        }
        Self(slots)
    }

    /// Of each slot: frequency (12 bits), offset in the symbol's interval (12 bits), symbol (8 bits).
    pub fn slots(&self) -> &[u32; MODEL_TOTAL as usize] {
        &self.0
    }
}

/// Decodes one tile's stream, a step of up to 32 symbols at a time.
pub struct Decoder<'a> {
    states: [u32; LANES],
    words: &'a [u8],
    read: usize,
}

impl<'a> LaneDecoder<'a> for Decoder<'a> {
    type Table = SlotTable;
    const STATE_BYTES: usize = 4;
    const WORD_BYTES: usize = 2;

    fn new(states: &[u8], words: &'a [u8]) -> Self {
        let mut lanes = [LOWER; LANES];
        for (lane, bytes) in lanes.iter_mut().zip(states.chunks_exact(4)) {
            *lane = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        Self { states: lanes, words, read: 0 }
    }

    fn step(&mut self, table: &SlotTable, out: &mut [u8]) {
        // All of a step's words, so that each lane reads without a check or a branch.
        let mut tail = [0u8; 2 * LANES];
        let rest = &self.words[self.read..];
        let window: &[u8; 2 * LANES] = match rest.first_chunk() {
            Some(window) => window,
            None => {
                tail[..rest.len()].copy_from_slice(rest);
                &tail
            }
        };
        // The same loop, unrolled where all lanes are there.
        let taken = match <&mut [u8; LANES]>::try_from(&mut *out) {
            Ok(full) => advance(&mut self.states, &table.0, window, full),
            Err(_) => advance(&mut self.states, &table.0, window, out),
        };
        self.read = (self.read + 2 * taken).min(self.words.len());
    }

    /// While at least a step's words are left in each stream.
    #[cfg(target_arch = "x86_64")]
    fn steps<const N: usize>(
        table: &SlotTable,
        decoders: &mut [Self; N],
        steps: Range<usize>,
        out: &mut [Steps; N],
    ) -> usize {
        let words = std::array::from_fn(|n| &decoders[n].words[decoders[n].read..]);
        let states = decoders.each_mut().map(|decoder| &mut decoder.states);
        let (next, read) = match arch::Isa::get() {
            // SAFETY: `Isa::get` names only what the CPU has.
            #[allow(unsafe_code)]
            arch::Isa::Avx512 | arch::Isa::Amx => unsafe { arch::avx512::rans_steps(states, table, words, steps, out) },
            // SAFETY: as above.
            #[allow(unsafe_code)]
            arch::Isa::Avx2 => unsafe { arch::avx2::rans_steps(states, table, words, steps, out) },
            _ => (steps.start, [0; N]),
        };
        decoders.iter_mut().zip(read).for_each(|(decoder, read)| decoder.read += read);
        next
    }

    /// Other machines have no decoder beside the portable one: tables of this size need memory lookups, lane by lane.
    #[cfg(not(target_arch = "x86_64"))]
    fn steps<const N: usize>(_: &SlotTable, _: &mut [Self; N], steps: Range<usize>, _: &mut [Steps; N]) -> usize {
        steps.start
    }
}

/// Decodes a symbol of each lane and returns how many words that took.
#[inline(always)]
fn advance(
    states: &mut [u32; LANES],
    table: &[u32; MODEL_TOTAL as usize],
    window: &[u8; 2 * LANES],
    out: &mut [u8],
) -> usize {
    let mut taken = 0;
    for (state, symbol) in states.iter_mut().zip(out) {
        let entry = table[(*state & SLOT_MASK) as usize];
        *symbol = entry as u8;
        // Wrapping: a state from a damaged stream must not panic.
        let next = (entry >> 20).wrapping_mul(*state >> MODEL_BITS).wrapping_add(entry >> 8 & SLOT_MASK);
        let at = 2 * (taken % LANES);
        let word = u32::from(u16::from_le_bytes([window[at], window[at + 1]]));
        let short = next < LOWER;
        // A branch here would be mispredicted every few symbols.
        *state = std::hint::select_unpredictable(short, next << 16 | word, next);
        taken += usize::from(short);
    }
    taken
}

/// Encodes one tile's stream. Symbols go in backwards; see [`Encoder::finish`].
pub struct Encoder {
    states: [u32; LANES],
    /// Words in the order of writing, the reverse of the order of reading.
    words: Vec<u16>,
}

impl Encoder {
    pub fn new(capacity_words: usize) -> Self {
        Self { states: [LOWER; LANES], words: Vec::with_capacity(capacity_words) }
    }

    /// Puts a block's symbols, the last step first, of whose lanes the first `lanes` count, as the (frequency, cumulative
    /// start) that `intervals` has for them. The last block comes first.
    pub fn block(&mut self, intervals: &[(u32, u32)], symbols: &[u8], lanes: usize) {
        symbols.rchunks_exact(LANES).for_each(|step| self.step(intervals, &step[..lanes]));
    }

    fn step(&mut self, intervals: &[(u32, u32)], symbols: &[u8]) {
        for (state, &symbol) in self.states.iter_mut().zip(symbols).rev() {
            let (frequency, start) = intervals[usize::from(symbol)];
            if *state >> 20 >= frequency {
                self.words.push(*state as u16);
                *state >>= 16;
            }
            *state = ((*state / frequency) << MODEL_BITS) + *state % frequency + start;
        }
    }

    /// The states of the first `lanes` lanes, and the words in reading order.
    pub fn finish(mut self, lanes: usize) -> (Vec<u8>, Vec<u8>) {
        self.words.reverse();
        let states = self.states[..lanes].iter().flat_map(|x| x.to_le_bytes());
        let words = self.words.iter().flat_map(|w| w.to_le_bytes());
        (states.collect(), words.collect())
    }
}
