//! rANS for at most sixteen symbols, with no memory lookup: 8-bit probabilities by the alias method (Vose 1991), 16-bit
//! states, bytes as words. Every table fits in a vector register, so a step of 32 lanes is a handful of byte shuffles.
//!
//! The 256 slots are sixteen buckets of sixteen. Bucket b belongs to symbol b up to a threshold, and above it to one other
//! symbol, its alias. A lane's state `x` lies in `[2^8, 2^16)`:
//!
//! ```text
//! for each lane in order:
//!     slot = x mod 256           bucket = slot div 16         within = slot mod 16
//!     symbol = within < threshold[bucket] ? bucket : alias[bucket]
//!     x = frequency[symbol] · (x div 256) + (number of the symbol's slots before this one)
//!     if x < 2^8: x = x · 2^8 + next byte
//! ```

use std::borrow::Cow;
use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use super::arch::{Isa, avx2, avx512};
use super::arch::{Simd, per_simd};
use super::geometry::{CHUNK, LANES, Steps};
use super::stream::LaneDecoder;

/// The sum of a model's frequencies.
pub const ALIAS_TOTAL: u32 = 256;
/// Symbols that a model can tell apart.
pub const ALIAS_SYMBOLS: usize = 16;
/// The largest frequency: products of it and a byte are taken as signed 16-bit numbers.
pub const ALIAS_CEILING: u16 = 127;

/// Bytes of a stream between the ones that are read and the ones that are fetched from memory.
const PREFETCH_BYTES: usize = 512;
/// Bytes that a block may take; reading its last step may touch a step's more.
const WORST_BLOCK: usize = CHUNK * LANES;
const BUCKETS: usize = ALIAS_SYMBOLS;
const BUCKET_SLOTS: u8 = 16;
const LOWER: u16 = 1 << 8;

/// The decoder's view of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AliasTable {
    threshold: [u8; BUCKETS],
    alias: [u8; BUCKETS],
    /// What to add to `within`, below the threshold and above it, for the slot's place among its symbol's, modulo 256.
    own_base: [u8; BUCKETS],
    alias_base: [u8; BUCKETS],
    frequency: [u8; BUCKETS],
}

impl AliasTable {
    /// `frequencies` (at most sixteen) must sum to 256, each at most 127.
    ///
    /// While a bucket is underfull, the first such takes its missing slots from the symbol with the most left, of equals the
    /// first. A symbol's slots are counted in order: so spread, they cost less than runs of them would.
    pub fn new(frequencies: &[u8]) -> Self {
        let mut frequency = [0; BUCKETS];
        frequency[..frequencies.len()].copy_from_slice(frequencies);
        let mut left = frequency;
        let (mut threshold, mut alias) = ([BUCKET_SLOTS; BUCKETS], [0; BUCKETS]);
        while let Some(under) = (0..BUCKETS).find(|&b| threshold[b] == BUCKET_SLOTS && left[b] < BUCKET_SLOTS) {
            let over = (1..BUCKETS).fold(0, |most, b| if left[b] > left[most] { b } else { most });
            (threshold[under], alias[under]) = (left[under], over as u8);
            left[over] = left[over].saturating_sub(BUCKET_SLOTS - left[under]);
            left[under] = BUCKET_SLOTS;
        }
        let (mut own_base, mut alias_base) = ([0; BUCKETS], [0; BUCKETS]);
        let mut counted = [0u8; BUCKETS];
        for bucket in 0..BUCKETS {
            let (threshold, alias) = (threshold[bucket], usize::from(alias[bucket]));
            own_base[bucket] = counted[bucket];
            counted[bucket] = counted[bucket].wrapping_add(threshold);
            alias_base[bucket] = counted[alias].wrapping_sub(threshold);
            counted[alias] = counted[alias].wrapping_add(BUCKET_SLOTS - threshold);
        }
        Self { threshold, alias, own_base, alias_base, frequency }
    }

    /// As those of [`SlotTable`](super::rans::SlotTable).
    pub fn slots(&self) -> Vec<u32> {
        let entry = |slot: u8| {
            let (symbol, place) = self.slot(slot);
            u32::from(self.frequency[usize::from(symbol)]) << 20 | u32::from(place) << 8 | u32::from(symbol)
        };
        (0..=u8::MAX).map(entry).collect()
    }

    /// The symbol of a slot, and the slot's place among the symbol's.
    #[inline(always)]
    fn slot(&self, slot: u8) -> (u8, u8) {
        let (bucket, within) = (slot / BUCKET_SLOTS, slot % BUCKET_SLOTS);
        let index = usize::from(bucket);
        if within < self.threshold[index] {
            (bucket, within.wrapping_add(self.own_base[index]))
        } else {
            (self.alias[index], within.wrapping_add(self.alias_base[index]))
        }
    }
}

/// Decodes one stream of a tile.
pub struct AliasDecoder<'a> {
    /// The states' low and high bytes.
    low: [u8; LANES],
    high: [u8; LANES],
    bytes: &'a [u8],
    read: usize,
}

impl<'a> LaneDecoder<'a> for AliasDecoder<'a> {
    type Table = AliasTable;
    const STATE_BYTES: usize = 2;
    const WORD_BYTES: usize = 1;

    fn new(states: &[u8], bytes: &'a [u8]) -> Self {
        let (mut low, mut high) = ([0; LANES], [LOWER.to_le_bytes()[1]; LANES]);
        for ((low, high), state) in low.iter_mut().zip(&mut high).zip(states.chunks_exact(2)) {
            (*low, *high) = (state[0], state[1]);
        }
        Self { low, high, bytes, read: 0 }
    }

    fn step(&mut self, table: &AliasTable, out: &mut [u8]) {
        let states = self.low.iter_mut().zip(&mut self.high);
        for ((low, high), out) in states.zip(out) {
            let (symbol, offset) = table.slot(*low);
            *out = symbol;
            // Wrapping: a state from a damaged stream must not panic.
            let frequency = u16::from(table.frequency[usize::from(symbol)]);
            let next = (frequency * u16::from(*high)).wrapping_add(u16::from(offset));
            [*low, *high] = next.to_le_bytes();
            if *high == 0 {
                *high = *low;
                *low = self.bytes.get(self.read).copied().unwrap_or(0);
                self.read = (self.read + 1).min(self.bytes.len());
            }
        }
    }

    fn steps<const N: usize>(
        table: &AliasTable,
        decoders: &mut [Self; N],
        steps: Range<usize>,
        out: &mut [Steps; N],
    ) -> usize {
        decode_steps(table, decoders, steps.clone(), out).map_or(steps.start, |()| steps.end)
    }
}

per_simd! {
    /// [`LaneDecoder::steps`], all of them.
    fn decode_steps<const N: usize>(
        simd,
        table: &AliasTable,
        decoders: &mut [AliasDecoder; N],
        steps: Range<usize>,
        out: &mut [Steps; N],
    ) -> () {
        let tables = Tables {
            threshold: simd.table(&table.threshold),
            to_alias: simd.table(&std::array::from_fn(|bucket| bucket as u8 ^ table.alias[bucket])),
            base: simd.table(&table.own_base),
            to_alias_base: simd.table(&std::array::from_fn(|bucket| table.own_base[bucket] ^ table.alias_base[bucket])),
            frequency: simd.table(&table.frequency),
        };
        let mut states = [(simd.splat(0), simd.splat(0)); N];
        for (state, decoder) in states.iter_mut().zip(decoders.iter()) {
            *state = (simd.load(&decoder.low), simd.load(&decoder.high));
        }
        let rests: [_; N] = std::array::from_fn(|n| padded(&decoders[n].bytes[decoders[n].read..]));
        let bytes: [_; N] = std::array::from_fn(|n| rests[n].first_chunk().unwrap_or(&[0; WORST_BLOCK + LANES]));
        let mut read = [0; N];
        let mut step = steps.start;
        while step < steps.end.min(CHUNK) {
            // Unrolled by hand: a loop over the streams would keep their states in memory.
            macro_rules! advance {
                ($($n:literal)*) => {$(
                    // No step begins later than the last of a block of the worst: this checks no bounds.
                    if $n < N
                        && let Some(window) = bytes[$n % N][read[$n % N] % WORST_BLOCK..].first_chunk()
                    {
                        read[$n % N] += tables.advance(simd, &mut states[$n % N], window, &mut out[$n % N][step]);
                    }
                )*};
            }
            advance!(0 1 2 3);
            step += 1;
        }
        for (decoder, read) in decoders.iter_mut().zip(read) {
            decoder.read = (decoder.read + read).min(decoder.bytes.len());
        }
        for ((low, high), decoder) in states.into_iter().zip(decoders) {
            simd.store(low, &mut decoder.low);
            simd.store(high, &mut decoder.high);
        }
    }
}

/// What is left of a stream, with zeros past the end where it may not last for a block.
fn padded(rest: &[u8]) -> Cow<'_, [u8]> {
    if rest.len() >= WORST_BLOCK + LANES {
        return Cow::Borrowed(rest);
    }
    let mut padded = rest.to_vec();
    padded.resize(WORST_BLOCK + LANES, 0);
    Cow::Owned(padded)
}

/// A model's tables in vector registers.
struct Tables<B> {
    threshold: B,
    /// What makes a bucket's number that of its alias, by exclusive or.
    to_alias: B,
    base: B,
    /// The same for the bases.
    to_alias_base: B,
    frequency: B,
}

impl<B: Copy> Tables<B> {
    /// One step of one stream; returns how many bytes it took.
    #[inline(always)]
    fn advance<S: Simd<Bytes = B>>(
        &self,
        simd: S,
        (low, high): &mut (B, B),
        window: &[u8; LANES],
        out: &mut [u8; LANES],
    ) -> usize {
        simd.prefetch(window.as_ptr().wrapping_add(PREFETCH_BYTES));
        let bucket = simd.shift_right::<4>(*low);
        let within = simd.and(*low, simd.splat(15));
        let limit = simd.lookup(self.threshold, bucket);
        let symbol = simd.change_unless_less(within, limit, bucket, simd.lookup(self.to_alias, bucket));
        let (base, change) = (simd.lookup(self.base, bucket), simd.lookup(self.to_alias_base, bucket));
        let base = simd.change_unless_less(within, limit, base, change);
        simd.store(symbol, out);
        let frequency = simd.lookup(self.frequency, symbol);
        let (next_low, next_high) = simd.multiply_add(frequency, *high, simd.add(within, base));
        let taken;
        (*low, *high, taken) = simd.refill(next_low, next_high, window);
        taken
    }
}

/// The encoder's view of a model: the slots of each symbol in order, and what a division by its frequency needs.
pub struct AliasCodes {
    pub slots: [u8; ALIAS_TOTAL as usize],
    /// Where each symbol's slots begin.
    pub start: [u16; BUCKETS],
    pub frequency: [u16; BUCKETS],
    /// (2^16 - 1) / frequency, rounded down: quotients by it are at most one too small.
    pub reciprocal: [u16; BUCKETS],
}

impl AliasCodes {
    pub fn new(frequencies: &[u8]) -> Self {
        let table = AliasTable::new(frequencies);
        let frequency = table.frequency.map(u16::from);
        let reciprocal = frequency.map(|frequency| u16::MAX / frequency.max(1));
        let mut start = [0; BUCKETS];
        for symbol in 1..BUCKETS {
            start[symbol] = start[symbol - 1] + frequency[symbol - 1];
        }
        let mut slots = [0; ALIAS_TOTAL as usize];
        for slot in 0..=u8::MAX {
            let (symbol, place) = table.slot(slot);
            slots[usize::from(start[usize::from(symbol)]) + usize::from(place)] = slot;
        }
        Self { slots, start, frequency, reciprocal }
    }
}

/// Encodes one stream of a tile. Symbols go in backwards; see [`AliasEncoder::finish`].
pub struct AliasEncoder<'a> {
    codes: &'a AliasCodes,
    states: [u16; LANES],
    /// Filled from its end.
    bytes: Vec<u8>,
    free: usize,
}

impl<'a> AliasEncoder<'a> {
    /// For at most `capacity` symbols.
    pub fn new(codes: &'a AliasCodes, capacity: usize) -> Self {
        // Vectors are stored whole.
        let capacity = capacity + size_of::<u64>();
        Self { codes, states: [LOWER; LANES], bytes: vec![0; capacity], free: capacity }
    }

    /// Puts a block's symbols, the last step first, of whose lanes the first `lanes` count. Each must have a frequency, and
    /// the last block comes first.
    pub fn block(&mut self, symbols: &[u8], lanes: usize) {
        #[cfg(target_arch = "x86_64")]
        if lanes == LANES && Isa::get() >= Isa::Avx2 {
            let encode = if Isa::get() == Isa::Avx2 { avx2::alias_encode } else { avx512::alias_encode };
            // SAFETY: `Isa::get` names only what the CPU has.
            #[allow(unsafe_code)]
            let taken = unsafe { encode(self.codes, &mut self.states, symbols, &mut self.bytes[..self.free]) };
            self.free -= taken;
            return;
        }
        for step in symbols.rchunks_exact(LANES) {
            self.step(&step[..lanes]);
        }
    }

    fn step(&mut self, symbols: &[u8]) {
        let AliasCodes { slots, start, frequency, reciprocal } = self.codes;
        let mut emitted = [0; LANES];
        let mut count = 0;
        for (state, &symbol) in self.states.iter_mut().zip(symbols).rev() {
            let symbol = usize::from(symbol) % BUCKETS;
            let frequency = frequency[symbol];
            let x = *state;
            // From the end: bytes are read in the order of lanes.
            emitted[LANES - 1 - count % LANES] = x as u8;
            // A branch here would be mispredicted every few symbols.
            let full = x >> 8 >= frequency;
            count += usize::from(full);
            let x = std::hint::select_unpredictable(full, x >> 8, x);
            let quotient = ((u32::from(x) * u32::from(reciprocal[symbol])) >> 16) as u16;
            let rest = x - quotient * frequency;
            let short = rest >= frequency;
            let (quotient, rest) = (quotient + u16::from(short), rest - if short { frequency } else { 0 });
            let slot = usize::from(start[symbol] + rest) % slots.len();
            *state = quotient << 8 | u16::from(slots[slot]);
        }
        self.bytes[self.free - count..self.free].copy_from_slice(&emitted[LANES - count..]);
        self.free -= count;
    }

    /// The states of the first `lanes` lanes, and the bytes in reading order.
    pub fn finish(mut self, lanes: usize) -> (Vec<u8>, Vec<u8>) {
        self.bytes.drain(..self.free);
        (self.states[..lanes].iter().flat_map(|x| x.to_le_bytes()).collect(), self.bytes)
    }
}
