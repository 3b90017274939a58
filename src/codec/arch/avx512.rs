//! The rANS step on AVX-512: sixteen lanes to a register, the slot table by gather, words handed out by expansion.

use std::arch::x86_64::*;

use crate::codec::geometry::{BLOCK, LANES};
use crate::codec::rans::{LOWER, MODEL_BITS, SLOT_MASK, SlotTable};

/// See [`super::decode_steps`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub fn decode_steps(
    states: &mut [u32; LANES],
    table: &SlotTable,
    words: &[u8],
    steps: usize,
    out: &mut [u8; BLOCK],
) -> (usize, usize) {
    let slots = table.slots();
    let (mask, lower) = (_mm512_set1_epi32(SLOT_MASK as i32), _mm512_set1_epi32(LOWER as i32));
    let (first, second) = states.split_at_mut(LANES / 2);
    // SAFETY: each half is sixteen u32.
    let mut x = unsafe { [_mm512_loadu_epi32(first.as_ptr().cast()), _mm512_loadu_epi32(second.as_ptr().cast())] };
    let mut read = 0;
    let mut done = 0;
    // A step takes at most one word a lane; the last ones of a stream go to the portable decoder.
    while done < steps && read + 2 * LANES <= words.len() {
        for (half, x) in x.iter_mut().enumerate() {
            let slot = _mm512_and_si512(*x, mask);
            // SAFETY: twelve bits index a table of 4096.
            let entry = unsafe { _mm512_i32gather_epi32::<4>(slot, slots.as_ptr().cast()) };
            let symbols = _mm512_cvtepi32_epi8(entry);
            // SAFETY: `done < steps <= 64`, so sixteen bytes from here lie in the block.
            unsafe { _mm_storeu_si128(out.as_mut_ptr().add(done * LANES + half * LANES / 2).cast(), symbols) };
            let frequency = _mm512_srli_epi32::<20>(entry);
            let offset = _mm512_and_si512(_mm512_srli_epi32::<8>(entry), mask);
            let high = _mm512_srli_epi32::<MODEL_BITS>(*x);
            let next = _mm512_add_epi32(_mm512_mullo_epi32(frequency, high), offset);
            let short = _mm512_cmplt_epu32_mask(next, lower);
            // SAFETY: 64 bytes were there before the first half took at most 32 of them.
            let bytes = unsafe { _mm256_loadu_si256(words.as_ptr().add(read).cast()) };
            let word = _mm512_maskz_expand_epi32(short, _mm512_cvtepu16_epi32(bytes));
            *x = _mm512_mask_or_epi32(next, short, _mm512_slli_epi32::<16>(next), word);
            read += 2 * short.count_ones() as usize;
        }
        done += 1;
    }
    // SAFETY: as when loading.
    unsafe {
        _mm512_storeu_epi32(first.as_mut_ptr().cast(), x[0]);
        _mm512_storeu_epi32(second.as_mut_ptr().cast(), x[1]);
    }
    (done, read)
}
