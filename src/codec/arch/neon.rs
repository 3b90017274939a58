//! NEON: 16 bytes to a register, four floats to a register. Every 64-bit Arm has it.

use std::arch::aarch64::*;
use std::arch::asm;

use super::{RANKS, Simd};
use crate::codec::geometry::LANES;

#[derive(Clone, Copy)]
pub struct Neon;

impl Neon {
    pub fn new() -> Self {
        Self
    }
}

/// Evaluates intrinsics.
macro_rules! with_neon {
    ($($body:tt)*) => {
        // SAFETY: every CPU of this architecture has the instructions; pointers come from references of at least the size
        // that is read or written.
        unsafe { $($body)* }
    };
}

/// An operation on both halves of the lanes.
macro_rules! both {
    ($operation:path, $($argument:expr),*) => {
        with_neon!(uint8x16x2_t($operation($($argument.0),*), $operation($($argument.1),*)))
    };
}

impl Simd for Neon {
    type Bytes = uint8x16x2_t;
    type Floats = [float32x4_t; 8];

    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        with_neon!(asm!("prfm pldl1keep, [{}]", in(reg) address, options(nostack, readonly, preserves_flags)));
    }

    #[inline(always)]
    fn load(self, bytes: &[u8; LANES]) -> uint8x16x2_t {
        with_neon!(vld1q_u8_x2(bytes.as_ptr()))
    }

    #[inline(always)]
    fn store(self, bytes: uint8x16x2_t, to: &mut [u8; LANES]) {
        with_neon!(vst1q_u8_x2(to.as_mut_ptr(), bytes));
    }

    #[inline(always)]
    fn splat(self, byte: u8) -> uint8x16x2_t {
        with_neon!(uint8x16x2_t(vdupq_n_u8(byte), vdupq_n_u8(byte)))
    }

    #[inline(always)]
    fn table(self, bytes: &[u8; 16]) -> uint8x16x2_t {
        with_neon! {
            let table = vld1q_u8(bytes.as_ptr());
            uint8x16x2_t(table, table)
        }
    }

    #[inline(always)]
    fn lookup(self, table: uint8x16x2_t, index: uint8x16x2_t) -> uint8x16x2_t {
        let index = self.and(index, self.splat(0x8f));
        both!(vqtbl1q_u8, table, index)
    }

    #[inline(always)]
    fn nibbles(self, bytes: &[u8; LANES / 2]) -> uint8x16x2_t {
        with_neon! {
            let bytes = vld1q_u8(bytes.as_ptr());
            let (low, high) = (vandq_u8(bytes, vdupq_n_u8(15)), vshrq_n_u8::<4>(bytes));
            uint8x16x2_t(vzip1q_u8(low, high), vzip2q_u8(low, high))
        }
    }

    #[inline(always)]
    fn packed<const WIDTH: usize>(self, bytes: &[u8; LANES]) -> uint8x16x2_t {
        // A lookup brings each symbol the two bytes that it lies in, a shift moves it to the bottom.
        let (places, shifts) = const { windows(WIDTH) };
        with_neon! {
            let data = vld1q_u8_x2(bytes.as_ptr());
            let (shifts, mask) = (vld1q_s16(shifts.as_ptr()), vdupq_n_u8((1 << WIDTH) - 1));
            let eight = |places: &[u8; 16]| {
                let words = vreinterpretq_u16_u8(vqtbl2q_u8(data, vld1q_u8(places.as_ptr())));
                vmovn_u16(vshlq_u16(words, shifts))
            };
            let [a, b, c, d] = [eight(&places[0]), eight(&places[1]), eight(&places[2]), eight(&places[3])];
            uint8x16x2_t(vandq_u8(vcombine_u8(a, b), mask), vandq_u8(vcombine_u8(c, d), mask))
        }
    }

    #[inline(always)]
    fn and(self, a: uint8x16x2_t, b: uint8x16x2_t) -> uint8x16x2_t {
        both!(vandq_u8, a, b)
    }

    #[inline(always)]
    fn or(self, a: uint8x16x2_t, b: uint8x16x2_t) -> uint8x16x2_t {
        both!(vorrq_u8, a, b)
    }

    #[inline(always)]
    fn add(self, a: uint8x16x2_t, b: uint8x16x2_t) -> uint8x16x2_t {
        both!(vaddq_u8, a, b)
    }

    #[inline(always)]
    fn add_saturating(self, a: uint8x16x2_t, b: uint8x16x2_t) -> uint8x16x2_t {
        both!(vqaddq_u8, a, b)
    }

    #[inline(always)]
    fn shift_left<const BITS: i32>(self, a: uint8x16x2_t) -> uint8x16x2_t {
        both!(vshlq_n_u8::<BITS>, a)
    }

    #[inline(always)]
    fn shift_right<const BITS: i32>(self, a: uint8x16x2_t) -> uint8x16x2_t {
        both!(vshrq_n_u8::<BITS>, a)
    }

    #[inline(always)]
    fn change_unless_less(
        self,
        a: uint8x16x2_t,
        b: uint8x16x2_t,
        x: uint8x16x2_t,
        change: uint8x16x2_t,
    ) -> uint8x16x2_t {
        let not_less = both!(vcgeq_u8, a, b);
        let change = both!(vandq_u8, not_less, change);
        both!(veorq_u8, x, change)
    }

    #[inline(always)]
    fn multiply_add(self, a: uint8x16x2_t, b: uint8x16x2_t, c: uint8x16x2_t) -> (uint8x16x2_t, uint8x16x2_t) {
        with_neon! {
            let half = |a: uint8x16_t, b: uint8x16_t, c: uint8x16_t| {
                let low = vaddw_u8(vmull_u8(vget_low_u8(a), vget_low_u8(b)), vget_low_u8(c));
                let high = vaddw_high_u8(vmull_high_u8(a, b), c);
                let (low, high) = (vreinterpretq_u8_u16(low), vreinterpretq_u8_u16(high));
                (vuzp1q_u8(low, high), vuzp2q_u8(low, high))
            };
            let (first, second) = (half(a.0, b.0, c.0), half(a.1, b.1, c.1));
            (uint8x16x2_t(first.0, second.0), uint8x16x2_t(first.1, second.1))
        }
    }

    #[inline(always)]
    fn refill(self, low: uint8x16x2_t, high: uint8x16x2_t, bytes: &[u8; LANES]) -> (uint8x16x2_t, uint8x16x2_t, usize) {
        let short = both!(vceqzq_u8, high);
        let (next, taken) = with_neon! {
            const BITS: [u8; 8] = [1, 2, 4, 8, 16, 32, 64, 128];
            let bits = vld1_u8(BITS.as_ptr());
            let mut taken = 0;
            // Each eight lanes read on from where those before them stop: at most 24 bytes in.
            let mut quarter = |short: uint8x8_t| {
                let set = usize::from(vaddv_u8(vand_u8(short, bits)));
                let next = vtbl1_u8(vld1_u8(bytes.as_ptr().add(taken)), vld1_u8(RANKS[set].as_ptr()));
                taken += set.count_ones() as usize;
                next
            };
            let [a, b] = [quarter(vget_low_u8(short.0)), quarter(vget_high_u8(short.0))];
            let [c, d] = [quarter(vget_low_u8(short.1)), quarter(vget_high_u8(short.1))];
            (uint8x16x2_t(vcombine_u8(a, b), vcombine_u8(c, d)), taken)
        };
        (both!(vbslq_u8, short, next, low), both!(vbslq_u8, short, low, high), taken)
    }

    #[inline(always)]
    fn floats(self, low: uint8x16x2_t, high: uint8x16x2_t) -> [float32x4_t; 8] {
        quarters(low, high, |words| with_neon!(vreinterpretq_f32_u32(vshll_n_u16::<16>(words))))
    }

    #[inline(always)]
    fn halves(self, low: uint8x16x2_t, high: uint8x16x2_t) -> [float32x4_t; 8] {
        quarters(low, high, |words| {
            let floats: float32x4_t;
            with_neon!(
                asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) floats, in(vreg) words, options(pure, nomem, nostack))
            );
            floats
        })
    }

    #[inline(always)]
    fn fixed_point(self, low: uint8x16x2_t, high: uint8x16x2_t, offset: f32) -> [float32x4_t; 8] {
        // Under the exponent of 2^15, the low sixteen bits of a float count in 1/256.
        let (exponent, offset) = with_neon!((vdupq_n_u32(0x4700_0000), vdupq_n_f32(offset - 32768.0)));
        quarters(low, high, |words| {
            with_neon!(vaddq_f32(vreinterpretq_f32_u32(vorrq_u32(vmovl_u16(words), exponent)), offset))
        })
    }

    #[inline(always)]
    fn zero(self) -> [float32x4_t; 8] {
        with_neon!([vdupq_n_f32(0.0); 8])
    }

    #[inline(always)]
    fn fused_multiply_add(self, x: f32, b: [float32x4_t; 8], mut sum: [float32x4_t; 8]) -> [float32x4_t; 8] {
        sum.iter_mut().zip(b).for_each(|(sum, b)| *sum = with_neon!(vfmaq_n_f32(*sum, b, x)));
        sum
    }

    #[inline(always)]
    fn load_floats(self, from: &[f32; LANES]) -> [float32x4_t; 8] {
        with_neon!(std::array::from_fn(|i| vld1q_f32(from[4 * i..].as_ptr())))
    }

    #[inline(always)]
    fn store_pairs(self, even: [float32x4_t; 8], odd: [float32x4_t; 8], to: &mut [u32; LANES]) {
        for (i, to) in to.chunks_exact_mut(4).enumerate() {
            with_neon! {
                let half = vdupq_n_u32(super::BF16_HALF);
                let even = vaddq_u32(vreinterpretq_u32_f32(even[i]), half);
                let odd = vaddq_u32(vreinterpretq_u32_f32(odd[i]), half);
                // The upper half of each even one under that of its odd one.
                vst1q_u32(to.as_mut_ptr(), vsriq_n_u32::<16>(odd, even));
            }
        }
    }

    #[inline(always)]
    fn store_floats(self, floats: [float32x4_t; 8], to: &mut [f32; LANES]) {
        let places = to.chunks_exact_mut(4).zip(floats);
        places.for_each(|(to, floats)| with_neon!(vst1q_f32(to.as_mut_ptr(), floats)));
    }
}

/// Applies `body` to the words `high · 256 + low` of each four lanes.
#[inline(always)]
fn quarters(low: uint8x16x2_t, high: uint8x16x2_t, body: impl Fn(uint16x4_t) -> float32x4_t) -> [float32x4_t; 8] {
    let words = |low: uint8x16_t, high: uint8x16_t| {
        let (first, second) = with_neon!((vzip1q_u8(low, high), vzip2q_u8(low, high)));
        let (first, second) = with_neon!((vreinterpretq_u16_u8(first), vreinterpretq_u16_u8(second)));
        with_neon!([vget_low_u16(first), vget_high_u16(first), vget_low_u16(second), vget_high_u16(second)])
    };
    let ([a, b, c, d], [e, f, g, h]) = (words(low.0, high.0), words(low.1, high.1));
    [body(a), body(b), body(c), body(d), body(e), body(f), body(g), body(h)]
}

/// For four runs of eight symbols, the bytes that each symbol lies in; and the shifts (to the right, so negative) that take
/// it to the bottom of its word.
const fn windows(width: usize) -> ([[u8; 16]; 4], [i16; 8]) {
    let (mut places, mut shifts) = ([[0; 16]; 4], [0; 8]);
    let mut lane = 0;
    while lane < 8 {
        let bit = lane * width;
        let mut run = 0;
        while run < 4 {
            let byte = (run * width + bit / 8) as u8;
            places[run][2 * lane] = byte;
            places[run][2 * lane + 1] = byte + 1;
            run += 1;
        }
        shifts[lane] = -((bit % 8) as i16);
        lane += 1;
    }
    (places, shifts)
}
