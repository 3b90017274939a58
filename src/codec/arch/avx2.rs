//! AVX2: 32 bytes to a register, eight floats to a register.

use std::arch::x86_64::*;
use std::ops::Range;

use super::{RANKS, Simd};
use crate::codec::alias::AliasCodes;
use crate::codec::geometry::{CHUNK, LANES, Steps};
use crate::codec::rans::{MODEL_BITS, SLOT_MASK, SlotTable};

/// Evaluates intrinsics.
macro_rules! with_avx2 {
    ($($body:tt)*) => {
        // SAFETY: a value of `Avx2` exists only where the CPU has the instructions; pointers come from references of at
        // least the size that is read or written.
        unsafe { $($body)* }
    };
}

/// Proof that the CPU has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub struct Avx2 {
    /// What brings the lanes into the order in which unpacking within halves leaves them; see [`Avx2::words`].
    order: __m256i,
    ones: __m256i,
    zeros: __m256i,
}

impl Avx2 {
    #[target_feature(enable = "avx2,fma,f16c,popcnt")]
    #[inline]
    pub fn new() -> Self {
        // Opaque, for where the compiler knows an operand it makes two shuffles of one, and blends of and and or.
        Self {
            order: std::hint::black_box(_mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7)),
            ones: std::hint::black_box(_mm256_set1_epi8(1)),
            zeros: std::hint::black_box(_mm256_setzero_si256()),
        }
    }

    /// A bit for each lane.
    #[inline(always)]
    fn bits(self, bytes: &[u8; LANES]) -> __m256i {
        with_avx2! {
            let all = _mm256_set1_epi32(i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
            let byte = _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
            let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
            // The lane's bit alone, then 1 for any.
            _mm256_min_epu8(_mm256_and_si256(_mm256_shuffle_epi8(all, byte), bit), _mm256_set1_epi8(1))
        }
    }

    /// Sixteen-bit words `high · 256 + low`, so arranged that unpacking them to 32 bits within halves leaves lanes in order.
    #[inline(always)]
    fn words(self, low: __m256i, high: __m256i) -> [__m256i; 2] {
        with_avx2! {
            let low = _mm256_permutevar8x32_epi32(low, self.order);
            let high = _mm256_permutevar8x32_epi32(high, self.order);
            [_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)]
        }
    }
}

impl Simd for Avx2 {
    type Bytes = __m256i;
    type Floats = [__m256; 4];

    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        with_avx2!(_mm_prefetch::<_MM_HINT_T0>(address.cast()));
    }

    #[inline(always)]
    fn load(self, bytes: &[u8; LANES]) -> __m256i {
        with_avx2!(_mm256_loadu_si256(bytes.as_ptr().cast()))
    }

    #[inline(always)]
    fn store(self, bytes: __m256i, to: &mut [u8; LANES]) {
        with_avx2!(_mm256_storeu_si256(to.as_mut_ptr().cast(), bytes));
    }

    #[inline(always)]
    fn splat(self, byte: u8) -> __m256i {
        with_avx2!(_mm256_set1_epi8(byte as i8))
    }

    #[inline(always)]
    fn table(self, bytes: &[u8; 16]) -> __m256i {
        with_avx2!(_mm256_broadcastsi128_si256(_mm_loadu_si128(bytes.as_ptr().cast())))
    }

    #[inline(always)]
    fn lookup(self, table: __m256i, index: __m256i) -> __m256i {
        with_avx2!(_mm256_shuffle_epi8(table, index))
    }

    #[inline(always)]
    fn nibbles(self, bytes: &[u8; LANES / 2]) -> __m256i {
        with_avx2! {
            let words = _mm256_cvtepu8_epi16(_mm_loadu_si128(bytes.as_ptr().cast()));
            let both = _mm256_or_si256(words, _mm256_slli_epi16::<4>(words));
            _mm256_and_si256(both, _mm256_set1_epi8(15))
        }
    }

    #[inline(always)]
    fn packed<const WIDTH: usize>(self, bytes: &[u8; LANES]) -> __m256i {
        // Eight symbols are WIDTH bytes. Sixteen go to each half of a register: a shuffle brings each the two bytes that it
        // lies in, a product by a power of two moves it to the top, a shift to the bottom.
        if WIDTH == 1 {
            return self.bits(bytes);
        }
        let Windows { shuffle, factor } = const { Windows::new(WIDTH) };
        let shift = const { 16 - WIDTH as i32 };
        with_avx2! {
            let low = _mm_loadu_si128(bytes.as_ptr().cast());
            let high = _mm_loadu_si128(bytes.as_ptr().add(2 * WIDTH).cast());
            let both = _mm256_set_m128i(high, low);
            let shift = _mm_cvtsi32_si128(shift);
            let factor = _mm256_broadcastsi128_si256(_mm_loadu_si128(factor.as_ptr().cast()));
            let eight = |shuffle: &[u8; 16]| {
                let shuffle = _mm256_broadcastsi128_si256(_mm_loadu_si128(shuffle.as_ptr().cast()));
                _mm256_srl_epi16(_mm256_mullo_epi16(_mm256_shuffle_epi8(both, shuffle), factor), shift)
            };
            _mm256_packus_epi16(eight(&shuffle[0]), eight(&shuffle[1]))
        }
    }

    #[inline(always)]
    fn and(self, a: __m256i, b: __m256i) -> __m256i {
        with_avx2!(_mm256_and_si256(a, b))
    }

    #[inline(always)]
    fn or(self, a: __m256i, b: __m256i) -> __m256i {
        with_avx2!(_mm256_or_si256(a, b))
    }

    #[inline(always)]
    fn add(self, a: __m256i, b: __m256i) -> __m256i {
        with_avx2!(_mm256_add_epi8(a, b))
    }

    #[inline(always)]
    fn add_saturating(self, a: __m256i, b: __m256i) -> __m256i {
        with_avx2!(_mm256_adds_epu8(a, b))
    }

    #[inline(always)]
    fn shift_left<const BITS: i32>(self, a: __m256i) -> __m256i {
        with_avx2!(_mm256_and_si256(_mm256_slli_epi16::<BITS>(a), _mm256_set1_epi8((0xff << BITS) as i8)))
    }

    #[inline(always)]
    fn shift_right<const BITS: i32>(self, a: __m256i) -> __m256i {
        with_avx2!(_mm256_and_si256(_mm256_srli_epi16::<BITS>(a), _mm256_set1_epi8((0xff >> BITS) as i8)))
    }

    #[inline(always)]
    fn change_unless_less(self, a: __m256i, b: __m256i, x: __m256i, change: __m256i) -> __m256i {
        with_avx2!(_mm256_xor_si256(x, _mm256_andnot_si256(_mm256_cmpgt_epi8(b, a), change)))
    }

    #[inline(always)]
    fn multiply_add(self, a: __m256i, b: __m256i, c: __m256i) -> (__m256i, __m256i) {
        with_avx2! {
            // (b, c) · (a, 1); unpacking and packing keep to the halves of a register, so the order comes back.
            let low = _mm256_maddubs_epi16(_mm256_unpacklo_epi8(b, c), _mm256_unpacklo_epi8(a, self.ones));
            let high = _mm256_maddubs_epi16(_mm256_unpackhi_epi8(b, c), _mm256_unpackhi_epi8(a, self.ones));
            let mask = _mm256_set1_epi16(0xff);
            (
                _mm256_packus_epi16(_mm256_and_si256(low, mask), _mm256_and_si256(high, mask)),
                _mm256_packus_epi16(_mm256_srli_epi16::<8>(low), _mm256_srli_epi16::<8>(high)),
            )
        }
    }

    #[inline(always)]
    fn refill(self, low: __m256i, high: __m256i, bytes: &[u8; LANES]) -> (__m256i, __m256i, usize) {
        with_avx2! {
            let short = _mm256_cmpeq_epi8(high, self.zeros);
            let set = _mm256_movemask_epi8(short) as u32;
            // Each eight lanes read on from where those before them stop: at most 24 bytes in.
            let from = |index: u32| bytes.as_ptr().add((set & ((1u32 << (8 * index)) - 1)).count_ones() as usize);
            let rank = |index: u32| RANKS[(set >> (8 * index) & 0xff) as usize].as_ptr();
            // The upper half of a register is loaded by an instruction for floats; that for integers takes two.
            let pair = |low: *const u8, high: *const u8| {
                let low = _mm_castsi128_pd(_mm_loadl_epi64(low.cast()));
                _mm_castpd_si128(_mm_loadh_pd(low, high.cast()))
            };
            let data = _mm256_set_m128i(pair(from(2), from(3)), pair(from(0), from(1)));
            let ranks = _mm256_set_m128i(pair(rank(2), rank(3)), pair(rank(0), rank(1)));
            let second = _mm256_set_epi64x(0x0808_0808_0808_0808, 0, 0x0808_0808_0808_0808, 0);
            let next = _mm256_shuffle_epi8(data, _mm256_or_si256(ranks, second));
            let high = _mm256_or_si256(high, _mm256_and_si256(low, short));
            // Lanes that take none found nothing there: zero.
            (_mm256_or_si256(_mm256_andnot_si256(short, low), next), high, set.count_ones() as usize)
        }
    }

    #[inline(always)]
    fn floats(self, low: __m256i, high: __m256i) -> [__m256; 4] {
        with_avx2! {
            let [a, b] = self.words(low, high);
            let zero = _mm256_setzero_si256();
            [
                _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, a)),
                _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, a)),
                _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, b)),
                _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, b)),
            ]
        }
    }

    #[inline(always)]
    fn halves(self, low: __m256i, high: __m256i) -> [__m256; 4] {
        with_avx2! {
            // Sixteen lanes of words in order.
            let (low, high) = (_mm256_permute4x64_epi64::<0xd8>(low), _mm256_permute4x64_epi64::<0xd8>(high));
            let (a, b) = (_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high));
            [
                _mm256_cvtph_ps(_mm256_castsi256_si128(a)),
                _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(a)),
                _mm256_cvtph_ps(_mm256_castsi256_si128(b)),
                _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(b)),
            ]
        }
    }

    #[inline(always)]
    fn fixed_point(self, low: __m256i, high: __m256i, offset: f32) -> [__m256; 4] {
        with_avx2! {
            // Under the exponent of 2^15, the low sixteen bits of a float count in 1/256.
            let [a, b] = self.words(low, high);
            let exponent = _mm256_set1_epi16(0x4700);
            let offset = _mm256_set1_ps(offset - 32768.0);
            let shifted = |bits: __m256i| _mm256_add_ps(_mm256_castsi256_ps(bits), offset);
            [
                shifted(_mm256_unpacklo_epi16(a, exponent)),
                shifted(_mm256_unpackhi_epi16(a, exponent)),
                shifted(_mm256_unpacklo_epi16(b, exponent)),
                shifted(_mm256_unpackhi_epi16(b, exponent)),
            ]
        }
    }

    #[inline(always)]
    fn zero(self) -> [__m256; 4] {
        with_avx2!([_mm256_setzero_ps(); 4])
    }

    #[inline(always)]
    fn fused_multiply_add(self, x: f32, b: [__m256; 4], sum: [__m256; 4]) -> [__m256; 4] {
        with_avx2! {
            let x = _mm256_set1_ps(x);
            [
                _mm256_fmadd_ps(x, b[0], sum[0]),
                _mm256_fmadd_ps(x, b[1], sum[1]),
                _mm256_fmadd_ps(x, b[2], sum[2]),
                _mm256_fmadd_ps(x, b[3], sum[3]),
            ]
        }
    }

    #[inline(always)]
    fn load_floats(self, from: &[f32; LANES]) -> [__m256; 4] {
        let at = from.as_ptr();
        with_avx2! {
            [
                _mm256_loadu_ps(at),
                _mm256_loadu_ps(at.add(8)),
                _mm256_loadu_ps(at.add(16)),
                _mm256_loadu_ps(at.add(24)),
            ]
        }
    }

    #[inline(always)]
    fn store_pairs(self, even: [__m256; 4], odd: [__m256; 4], to: &mut [u32; LANES]) {
        with_avx2! {
            let half = _mm256_set1_epi32(super::BF16_HALF as i32);
            let upper = _mm256_set1_epi32(super::BF16_UPPER as i32);
            for i in 0..4 {
                let even = _mm256_srli_epi32::<16>(_mm256_add_epi32(_mm256_castps_si256(even[i]), half));
                let odd = _mm256_add_epi32(_mm256_castps_si256(odd[i]), half);
                let pairs = _mm256_or_si256(even, _mm256_and_si256(odd, upper));
                _mm256_storeu_si256(to.as_mut_ptr().add(8 * i).cast(), pairs);
            }
        }
    }

    #[inline(always)]
    fn store_floats(self, floats: [__m256; 4], to: &mut [f32; LANES]) {
        let at = to.as_mut_ptr();
        with_avx2! {
            _mm256_storeu_ps(at, floats[0]);
            _mm256_storeu_ps(at.add(8), floats[1]);
            _mm256_storeu_ps(at.add(16), floats[2]);
            _mm256_storeu_ps(at.add(24), floats[3]);
        }
    }
}

/// How to take symbols of some width apart: for each of two runs of eight, the bytes that each symbol lies in, and the
/// factor that moves it to the top of its word.
struct Windows {
    shuffle: [[u8; 16]; 2],
    factor: [u16; 8],
}

impl Windows {
    const fn new(width: usize) -> Self {
        let mut windows = Self { shuffle: [[0; 16]; 2], factor: [0; 8] };
        let mut lane = 0;
        while lane < 8 {
            let bit = lane * width;
            let mut run = 0;
            while run < 2 {
                let byte = (run * width + bit / 8) as u8;
                windows.shuffle[run][2 * lane] = byte;
                windows.shuffle[run][2 * lane + 1] = byte + 1;
                run += 1;
            }
            windows.factor[lane] = 1 << (16 - width - bit % 8);
            lane += 1;
        }
        windows
    }
}

/// See [`crate::codec::stream::LaneDecoder::steps`]; returns the bytes read as well.
#[target_feature(enable = "avx2,popcnt")]
pub fn rans_steps<const N: usize>(
    states: [&mut [u32; LANES]; N],
    table: &SlotTable,
    words: [&[u8]; N],
    steps: Range<usize>,
    out: &mut [Steps; N],
) -> (usize, [usize; N]) {
    const QUARTERS: usize = LANES / 8;
    let slots = table.slots();
    let mask = _mm256_set1_epi32(SLOT_MASK as i32);
    let bytes = _mm256_set1_epi32(0xff);
    let mut x = [[_mm256_setzero_si256(); QUARTERS]; N];
    for (x, states) in x.iter_mut().zip(&states) {
        for (x, states) in x.iter_mut().zip(states.chunks_exact(8)) {
            // SAFETY: eight u32.
            *x = unsafe { _mm256_loadu_si256(states.as_ptr().cast()) };
        }
    }
    let mut read = [0; N];
    let mut next = steps.start;
    // A step takes at most one word a lane; the last ones of a stream go to the portable decoder.
    while next < steps.end.min(CHUNK) && (0..N).all(|n| read[n] + 2 * LANES <= words[n].len()) {
        for n in 0..N {
            let mut symbols = [_mm256_setzero_si256(); QUARTERS];
            for (quarter, x) in x[n].iter_mut().enumerate() {
                let slot = _mm256_and_si256(*x, mask);
                // SAFETY: twelve bits index a table of 4096.
                let entry = unsafe { _mm256_i32gather_epi32::<4>(slots.as_ptr().cast(), slot) };
                symbols[quarter] = _mm256_and_si256(entry, bytes);
                let frequency = _mm256_srli_epi32::<20>(entry);
                let offset = _mm256_and_si256(_mm256_srli_epi32::<8>(entry), mask);
                let high = _mm256_srli_epi32::<{ MODEL_BITS as i32 }>(*x);
                let state = _mm256_add_epi32(_mm256_mullo_epi32(frequency, high), offset);
                // state < 2^16.
                let short = _mm256_cmpeq_epi32(_mm256_srli_epi32::<16>(state), _mm256_setzero_si256());
                let set = _mm256_movemask_ps(_mm256_castsi256_ps(short)) as usize;
                // SAFETY: 64 bytes were there before the first quarter, and each takes at most 16 of them; a rank row has 8.
                let (word, ranks) = unsafe {
                    (
                        _mm_loadu_si128(words[n].as_ptr().add(read[n]).cast()),
                        _mm_loadl_epi64(RANKS[set].as_ptr().cast()),
                    )
                };
                let word = _mm256_permutevar8x32_epi32(_mm256_cvtepu16_epi32(word), _mm256_cvtepu8_epi32(ranks));
                let refilled = _mm256_or_si256(_mm256_slli_epi32::<16>(state), word);
                *x = _mm256_blendv_epi8(state, refilled, short);
                read[n] += 2 * set.count_ones() as usize;
            }
            // Packing interleaves the halves of registers; the permutation puts the lanes in order.
            let low = _mm256_packus_epi32(symbols[0], symbols[1]);
            let high = _mm256_packus_epi32(symbols[2], symbols[3]);
            let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
            let packed = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
            // SAFETY: 32 bytes.
            unsafe { _mm256_storeu_si256(out[n][next].as_mut_ptr().cast(), packed) };
        }
        next += 1;
    }
    for (x, states) in x.iter().zip(states) {
        for (x, states) in x.iter().zip(states.chunks_exact_mut(8)) {
            // SAFETY: eight u32.
            unsafe { _mm256_storeu_si256(states.as_mut_ptr().cast(), *x) };
        }
    }
    (next, read)
}

/// For each set of eight lanes: those that are in it, in order, as the last of eight.
static LAST: [[u8; 8]; 256] = {
    let mut last = [[0; 8]; 256];
    let mut set = 0;
    while set < 256 {
        let (mut lane, mut place) = (8, 8);
        while lane > 0 {
            lane -= 1;
            if set >> lane & 1 == 1 {
                place -= 1;
                last[set][place] = lane as u8;
            }
        }
        set += 1;
    }
    last
};

/// Encodes a block of 32 lanes, the last step first, into the end of `out`, which has room for a byte a symbol and eight;
/// returns how many bytes that took. See [`crate::codec::alias::AliasEncoder::block`].
#[target_feature(enable = "avx2,popcnt")]
pub fn alias_encode(codes: &AliasCodes, states: &mut [u16; LANES], block: &[u8], out: &mut [u8]) -> usize {
    const HALF: usize = LANES / 2;
    assert!(block.len() + 8 <= out.len());
    // SAFETY: sixteen bytes.
    let table = |bytes: [u8; 16]| _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) });
    let low_bytes = |words: &[u16; 16]| table(words.map(|word| word as u8));
    let (start, frequency) = (low_bytes(&codes.start), low_bytes(&codes.frequency));
    let reciprocal = (low_bytes(&codes.reciprocal), table(codes.reciprocal.map(|word| (word >> 8) as u8)));
    let slots: [_; 16] = std::array::from_fn(|row| table(codes.slots.as_chunks().0[row]));
    let (byte, one) = (_mm256_set1_epi16(0xff), _mm256_set1_epi16(1));
    // Words of the two halves to bytes, and back.
    let pack = |low, high| _mm256_permute4x64_epi64::<0xd8>(_mm256_packus_epi16(low, high));
    let halves = |bytes| [_mm256_castsi256_si128(bytes), _mm256_extracti128_si256::<1>(bytes)];
    // SAFETY: sixteen words each.
    let mut x = [0, HALF].map(|at| unsafe { _mm256_loadu_si256(states[at..at + HALF].as_ptr().cast()) });
    let mut free = out.len();
    for step in block.rchunks_exact(LANES) {
        let (mut place, mut quotient, mut kept) = ([x[0]; 2], [x[0]; 2], [x[0]; 2]);
        let lowest = pack(_mm256_and_si256(x[0], byte), _mm256_and_si256(x[1], byte));
        for half in 0..2 {
            // SAFETY: sixteen bytes.
            let symbol = unsafe { _mm_loadu_si128(step[half * HALF..(half + 1) * HALF].as_ptr().cast()) };
            // The upper byte of a word finds nothing.
            let symbol = _mm256_or_si256(_mm256_cvtepu8_epi16(symbol), _mm256_set1_epi16(i16::MIN));
            let f = _mm256_shuffle_epi8(frequency, symbol);
            let upper = _mm256_slli_epi16::<8>(_mm256_shuffle_epi8(reciprocal.1, symbol));
            let by = _mm256_or_si256(_mm256_shuffle_epi8(reciprocal.0, symbol), upper);
            let high = _mm256_srli_epi16::<8>(x[half]);
            kept[half] = _mm256_cmpgt_epi16(f, high);
            let state = _mm256_blendv_epi8(high, x[half], kept[half]);
            let q = _mm256_mulhi_epu16(state, by);
            let rest = _mm256_sub_epi16(state, _mm256_mullo_epi16(q, f));
            let short = _mm256_cmpgt_epi16(_mm256_add_epi16(rest, one), f);
            quotient[half] = _mm256_slli_epi16::<8>(_mm256_sub_epi16(q, short));
            let rest = _mm256_sub_epi16(rest, _mm256_and_si256(short, f));
            place[half] = _mm256_add_epi16(rest, _mm256_shuffle_epi8(start, symbol));
        }
        let place = pack(place[0], place[1]);
        let mut slot = _mm256_setzero_si256();
        for (row, slots) in slots.iter().enumerate() {
            // Places in other rows saturate, and find nothing.
            let index = _mm256_xor_si256(place, _mm256_set1_epi8((row << 4) as i8));
            let index = _mm256_adds_epu8(index, _mm256_set1_epi8(0x70));
            slot = _mm256_or_si256(slot, _mm256_shuffle_epi8(*slots, index));
        }
        let full = !_mm256_movemask_epi8(_mm256_permute4x64_epi64::<0xd8>(_mm256_packs_epi16(kept[0], kept[1]))) as u32;
        for (half, bytes) in halves(lowest).into_iter().enumerate().rev() {
            for eight in (0..2).rev() {
                let set = (full >> (HALF * half + 8 * eight) & 0xff) as usize;
                // SAFETY: eight bytes; and in `out` at least eight before `free`, as each step takes at most one a lane.
                unsafe {
                    let bytes = if eight == 0 { bytes } else { _mm_srli_si128::<8>(bytes) };
                    let bytes = _mm_shuffle_epi8(bytes, _mm_loadl_epi64(LAST[set].as_ptr().cast()));
                    _mm_storel_epi64(out.as_mut_ptr().add(free - 8).cast(), bytes);
                }
                free -= set.count_ones() as usize;
            }
        }
        let [low, high] = halves(slot);
        x[0] = _mm256_or_si256(quotient[0], _mm256_cvtepu8_epi16(low));
        x[1] = _mm256_or_si256(quotient[1], _mm256_cvtepu8_epi16(high));
    }
    for (x, states) in x.into_iter().zip(states.chunks_exact_mut(HALF)) {
        // SAFETY: sixteen words.
        unsafe { _mm256_storeu_si256(states.as_mut_ptr().cast(), x) };
    }
    out.len() - free
}
