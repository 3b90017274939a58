//! AVX-512 (with VBMI and VBMI2): 32 bytes to half a register, sixteen floats to a register.

use std::arch::x86_64::*;
use std::ops::Range;

use super::Simd;
use super::avx2::Avx2;
use crate::codec::alias::AliasCodes;
use crate::codec::geometry::{CHUNK, LANES, Steps};
use crate::codec::rans::{LOWER, MODEL_BITS, SLOT_MASK, SlotTable};

/// Proof that the CPU has what [`super::Isa::Avx512`] lists.
#[derive(Clone, Copy)]
pub struct Avx512(Avx2);

impl Avx512 {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx2,fma,f16c,popcnt")]
    #[inline]
    pub fn new() -> Self {
        Self(Avx2::new())
    }
}

/// Evaluates intrinsics.
macro_rules! with_avx512 {
    ($($body:tt)*) => {
        // SAFETY: a value of `Avx512` exists only where the CPU has the instructions; pointers come from references of at
        // least the size that is read or written.
        unsafe { $($body)* }
    };
}

/// Operations that AVX2 does as well.
macro_rules! as_avx2 {
    ($(fn $name:ident $(<const $constant:ident: $constant_type:ty>)? ($($argument:ident: $type:ty),*) -> $result:ty;)*) => {
        $(
            #[inline(always)]
            fn $name $(<const $constant: $constant_type>)? (self, $($argument: $type),*) -> $result {
                self.0.$name $(::<$constant>)? ($($argument),*)
            }
        )*
    };
}

impl Simd for Avx512 {
    type Bytes = __m256i;
    type Floats = [__m512; 2];

    as_avx2! {
        fn prefetch(address: *const u8) -> ();
        fn load(bytes: &[u8; LANES]) -> __m256i;
        fn store(bytes: __m256i, to: &mut [u8; LANES]) -> ();
        fn splat(byte: u8) -> __m256i;
        fn table(bytes: &[u8; 16]) -> __m256i;
        fn lookup(table: __m256i, index: __m256i) -> __m256i;
        fn nibbles(bytes: &[u8; LANES / 2]) -> __m256i;
        fn and(a: __m256i, b: __m256i) -> __m256i;
        fn or(a: __m256i, b: __m256i) -> __m256i;
        fn add(a: __m256i, b: __m256i) -> __m256i;
        fn add_saturating(a: __m256i, b: __m256i) -> __m256i;
        fn shift_left<const BITS: i32>(a: __m256i) -> __m256i;
        fn shift_right<const BITS: i32>(a: __m256i) -> __m256i;
        fn multiply_add(a: __m256i, b: __m256i, c: __m256i) -> (__m256i, __m256i);
    }

    #[inline(always)]
    fn packed<const WIDTH: usize>(self, bytes: &[u8; LANES]) -> __m256i {
        // Eight symbols are WIDTH bytes: each quarter of a register gets eight of those, and multishift takes each
        // symbol's eight bits from there.
        let (gather, shifts) = const { (quadwords(WIDTH), bit_offsets(WIDTH)) };
        with_avx512! {
            let data = _mm256_loadu_si256(bytes.as_ptr().cast());
            let data = _mm256_permutexvar_epi8(_mm256_loadu_si256(gather.as_ptr().cast()), data);
            let shifted = _mm256_multishift_epi64_epi8(_mm256_set1_epi64x(shifts), data);
            _mm256_and_si256(shifted, _mm256_set1_epi8((u8::MAX >> (8 - WIDTH)) as i8))
        }
    }

    #[inline(always)]
    fn change_unless_less(self, a: __m256i, b: __m256i, x: __m256i, change: __m256i) -> __m256i {
        with_avx512!(_mm256_xor_si256(x, _mm256_maskz_mov_epi8(_mm256_cmpge_epi8_mask(a, b), change)))
    }

    #[inline(always)]
    fn refill(self, low: __m256i, high: __m256i, bytes: &[u8; LANES]) -> (__m256i, __m256i, usize) {
        with_avx512! {
            let short = _mm256_testn_epi8_mask(high, high);
            let next = _mm256_loadu_si256(bytes.as_ptr().cast());
            let refilled = _mm256_mask_expand_epi8(low, short, next);
            (refilled, _mm256_mask_mov_epi8(high, short, low), short.count_ones() as usize)
        }
    }

    #[inline(always)]
    fn floats(self, low: __m256i, high: __m256i) -> [__m512; 2] {
        with_avx512! {
            let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high);
            // Of a pair of words, one register takes the first and the other the second: one shuffle for both.
            let order = _mm512_loadu_si512(const { &pair_order(0, 2) }.as_ptr().cast());
            let pairs = _mm512_permutexvar_epi8(order, both);
            let upper = _mm512_set1_epi32(super::BF16_UPPER as i32);
            [
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)),
                _mm512_castsi512_ps(_mm512_and_si512(pairs, upper)),
            ]
        }
    }

    #[inline(always)]
    fn halves(self, low: __m256i, high: __m256i) -> [__m512; 2] {
        with_avx512! {
            let [a, b] = words(low, high);
            [_mm512_cvtph_ps(a), _mm512_cvtph_ps(b)]
        }
    }

    #[inline(always)]
    fn fixed_point(self, low: __m256i, high: __m256i, offset: f32) -> [__m512; 2] {
        with_avx512! {
            let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high);
            // Under the exponent of 2^15, the low sixteen bits of a float count in 1/256.
            let exponent = _mm512_set1_epi32(0x4700_0000);
            let offset = _mm512_set1_ps(offset - 32768.0);
            let sixteen = |order: &[u8; 64]| {
                let order = _mm512_loadu_si512(order.as_ptr().cast());
                let bits = _mm512_mask_permutexvar_epi8(exponent, 0x3333_3333_3333_3333, order, both);
                _mm512_add_ps(_mm512_castsi512_ps(bits), offset)
            };
            [sixteen(const { &word_order(0, 0) }), sixteen(const { &word_order(0, 16) })]
        }
    }

    #[inline(always)]
    fn zero(self) -> [__m512; 2] {
        with_avx512!([_mm512_setzero_ps(); 2])
    }

    #[inline(always)]
    fn fused_multiply_add(self, x: f32, b: [__m512; 2], sum: [__m512; 2]) -> [__m512; 2] {
        with_avx512! {
            let x = _mm512_set1_ps(x);
            [_mm512_fmadd_ps(x, b[0], sum[0]), _mm512_fmadd_ps(x, b[1], sum[1])]
        }
    }

    #[inline(always)]
    fn load_floats(self, from: &[f32; LANES]) -> [__m512; 2] {
        with_avx512!([_mm512_loadu_ps(from.as_ptr()), _mm512_loadu_ps(from.as_ptr().add(16))])
    }

    #[inline(always)]
    fn store_pairs(self, even: [__m512; 2], odd: [__m512; 2], to: &mut [u32; LANES]) {
        with_avx512! {
            let half = _mm512_set1_epi32(super::BF16_HALF as i32);
            let upper = _mm512_set1_epi32(super::BF16_UPPER as i32);
            for i in 0..2 {
                let even = _mm512_srli_epi32::<16>(_mm512_add_epi32(_mm512_castps_si512(even[i]), half));
                let odd = _mm512_add_epi32(_mm512_castps_si512(odd[i]), half);
                // even | odd & upper
                let pairs = _mm512_ternarylogic_epi32::<0xf8>(even, odd, upper);
                _mm512_storeu_si512(to.as_mut_ptr().add(16 * i).cast(), pairs);
            }
        }
    }

    #[inline(always)]
    fn store_byte_pairs(self, even: [__m256i; 2], odd: [__m256i; 2], to: &mut [u32; LANES]) {
        with_avx512! {
            let pairs = |bytes: [__m256i; 2], order: &[u8; 64]| {
                let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(bytes[0]), bytes[1]);
                _mm512_permutexvar_epi8(_mm512_loadu_si512(order.as_ptr().cast()), both)
            };
            // Words of lanes i and 16 + i, the other way round in the even column: then either half is one instruction.
            let even = pairs(even, const { &pair_order(2, 0) });
            let odd = pairs(odd, const { &pair_order(0, 2) });
            let first = _mm512_shldi_epi32::<16>(odd, even);
            let second = _mm512_mask_mov_epi16(even, 0xaaaa_aaaa, odd);
            _mm512_storeu_si512(to.as_mut_ptr().cast(), first);
            _mm512_storeu_si512(to.as_mut_ptr().add(16).cast(), second);
        }
    }

    #[inline(always)]
    fn store_floats(self, floats: [__m512; 2], to: &mut [f32; LANES]) {
        with_avx512! {
            _mm512_storeu_ps(to.as_mut_ptr(), floats[0]);
            _mm512_storeu_ps(to.as_mut_ptr().add(16), floats[1]);
        }
    }
}

/// Sixteen-bit words `high · 256 + low`, lanes in order.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2")]
#[inline]
fn words(low: __m256i, high: __m256i) -> [__m256i; 2] {
    let (low, high) = (_mm256_permute4x64_epi64::<0xd8>(low), _mm256_permute4x64_epi64::<0xd8>(high));
    [_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)]
}

/// For sixteen 32-bit words, the places of lane `first + i`'s low and high byte, at byte `at` of word i.
const fn word_order(at: usize, first: usize) -> [u8; 64] {
    let mut order = [0; 64];
    let mut lane = 0;
    while lane < 16 {
        order[4 * lane + at] = (first + lane) as u8;
        order[4 * lane + at + 1] = (LANES + first + lane) as u8;
        lane += 1;
    }
    order
}

/// For sixteen pairs of words, the places of lane i's low and high byte, at byte `at` of pair i, and of lane `16 + i`'s, at
/// byte `other`.
const fn pair_order(at: usize, other: usize) -> [u8; 64] {
    let (first, second) = (word_order(at, 0), word_order(other, 16));
    let mut order = [0; 64];
    let mut byte = 0;
    while byte < 64 {
        order[byte] = if byte % 4 / 2 == at / 2 { first[byte] } else { second[byte] };
        byte += 1;
    }
    order
}

/// The byte that goes to each place, so that each quarter holds the `width` bytes of its eight symbols.
const fn quadwords(width: usize) -> [u8; LANES] {
    let mut order = [0; LANES];
    let mut at = 0;
    while at < LANES {
        order[at] = (at / 8 * width + if at % 8 < width { at % 8 } else { 0 }) as u8;
        at += 1;
    }
    order
}

/// The bit at which each of eight symbols begins, a byte each.
const fn bit_offsets(width: usize) -> i64 {
    let (mut offsets, mut lane) = (0, 0);
    while lane < 8 {
        offsets |= ((lane * width) as i64) << (8 * lane);
        lane += 1;
    }
    offsets
}

/// See [`crate::codec::stream::LaneDecoder::steps`]; returns the bytes read as well.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,popcnt")]
pub fn rans_steps<const N: usize>(
    states: [&mut [u32; LANES]; N],
    table: &SlotTable,
    words: [&[u8]; N],
    steps: Range<usize>,
    out: &mut [Steps; N],
) -> (usize, [usize; N]) {
    const HALF: usize = LANES / 2;
    let slots = table.slots();
    let (mask, lower) = (_mm512_set1_epi32(SLOT_MASK as i32), _mm512_set1_epi32(LOWER as i32));
    let mut x = [[_mm512_setzero_si512(); 2]; N];
    for (x, states) in x.iter_mut().zip(&states) {
        for (x, states) in x.iter_mut().zip(states.chunks_exact(HALF)) {
            // SAFETY: sixteen u32.
            *x = unsafe { _mm512_loadu_epi32(states.as_ptr().cast()) };
        }
    }
    let mut read = [0; N];
    let mut next = steps.start;
    // A step takes at most one word a lane; the last ones of a stream go to the portable decoder.
    while next < steps.end.min(CHUNK) && (0..N).all(|n| read[n] + 2 * LANES <= words[n].len()) {
        for n in 0..N {
            for (x, symbols) in x[n].iter_mut().zip(out[n][next].chunks_exact_mut(HALF)) {
                let slot = _mm512_and_si512(*x, mask);
                // SAFETY: twelve bits index a table of 4096.
                let entry = unsafe { _mm512_i32gather_epi32::<4>(slot, slots.as_ptr().cast()) };
                // SAFETY: sixteen bytes.
                unsafe { _mm_storeu_si128(symbols.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(entry)) };
                let frequency = _mm512_srli_epi32::<20>(entry);
                let offset = _mm512_and_si512(_mm512_srli_epi32::<8>(entry), mask);
                let high = _mm512_srli_epi32::<MODEL_BITS>(*x);
                let state = _mm512_add_epi32(_mm512_mullo_epi32(frequency, high), offset);
                let short = _mm512_cmplt_epu32_mask(state, lower);
                // SAFETY: 64 bytes were there before the first half took at most 32 of them.
                let bytes = unsafe { _mm256_loadu_si256(words[n].as_ptr().add(read[n]).cast()) };
                let word = _mm512_maskz_expand_epi32(short, _mm512_cvtepu16_epi32(bytes));
                *x = _mm512_mask_or_epi32(state, short, _mm512_slli_epi32::<16>(state), word);
                read[n] += 2 * short.count_ones() as usize;
            }
        }
        next += 1;
    }
    for (x, states) in x.iter().zip(states) {
        for (x, states) in x.iter().zip(states.chunks_exact_mut(HALF)) {
            // SAFETY: sixteen u32.
            unsafe { _mm512_storeu_epi32(states.as_mut_ptr().cast(), *x) };
        }
    }
    (next, read)
}

/// Encodes a block of 32 lanes, the last step first, into the end of `out`, which has room for a byte a symbol; returns how
/// many bytes that took. See [`crate::codec::alias::AliasEncoder::block`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx2,popcnt")]
pub fn alias_encode(codes: &AliasCodes, states: &mut [u16; LANES], block: &[u8], out: &mut [u8]) -> usize {
    assert!(block.len() <= out.len());
    let words = |words: &[u16; 16]| {
        // SAFETY: sixteen words.
        let half = unsafe { _mm256_loadu_si256(words.as_ptr().cast()) };
        _mm512_broadcast_i64x4(half)
    };
    let (start, frequency, reciprocal) = (words(&codes.start), words(&codes.frequency), words(&codes.reciprocal));
    let (slots, _) = codes.slots.as_chunks::<64>();
    // SAFETY: 64 bytes.
    let slots: [_; 4] = std::array::from_fn(|quarter| unsafe { _mm512_loadu_epi8(slots[quarter].as_ptr().cast()) });
    // SAFETY: 32 words.
    let mut x = unsafe { _mm512_loadu_epi16(states.as_ptr().cast()) };
    let mut free = out.len();
    for step in block.rchunks_exact(LANES) {
        // SAFETY: 32 bytes.
        let symbol = _mm512_cvtepu8_epi16(unsafe { _mm256_loadu_si256(step.as_ptr().cast()) });
        let f = _mm512_permutexvar_epi16(symbol, frequency);
        let high = _mm512_srli_epi16::<8>(x);
        let full = _mm512_cmpge_epu16_mask(high, f);
        let count = full.count_ones();
        free -= count as usize;
        let bytes = _mm256_maskz_compress_epi8(full, _mm512_cvtepi16_epi8(x));
        let present = ((1u64 << count) - 1) as u32;
        // SAFETY: `count` bytes from `free` on, of which a step takes at most one a lane and `out` has as many.
        unsafe { _mm256_mask_storeu_epi8(out.as_mut_ptr().add(free).cast(), present, bytes) };
        x = _mm512_mask_mov_epi16(x, full, high);
        let quotient = _mm512_mulhi_epu16(x, _mm512_permutexvar_epi16(symbol, reciprocal));
        let rest = _mm512_sub_epi16(x, _mm512_mullo_epi16(quotient, f));
        let short = _mm512_cmpge_epu16_mask(rest, f);
        let quotient = _mm512_mask_add_epi16(quotient, short, quotient, _mm512_set1_epi16(1));
        let rest = _mm512_mask_sub_epi16(rest, short, rest, f);
        let place = _mm512_add_epi16(rest, _mm512_permutexvar_epi16(symbol, start));
        // The even bytes of a register: two halves of the table, chosen by the top bit of a place.
        let lower = _mm512_permutex2var_epi8(slots[0], place, slots[1]);
        let upper = _mm512_permutex2var_epi8(slots[2], place, slots[3]);
        let slot = _mm512_mask_mov_epi8(lower, _mm512_movepi8_mask(place), upper);
        let slot = _mm512_and_si512(slot, _mm512_set1_epi16(0xff));
        x = _mm512_or_si512(_mm512_slli_epi16::<8>(quotient), slot);
    }
    // SAFETY: 32 words.
    unsafe { _mm512_storeu_epi16(states.as_mut_ptr().cast(), x) };
    out.len() - free
}
