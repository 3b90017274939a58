//! Instruction sets: which one this process runs on, and what the decoders ask of one.
//!
//! The decoders are written once, over [`Simd`]; an ISA file says how its instructions do those few operations. Every
//! decoder has a portable twin, the oracle: same inputs, same bits.
#![allow(unsafe_code)] // vector intrinsics and calls of functions compiled for an instruction set

#[cfg(target_arch = "x86_64")]
pub mod amx;
#[cfg(target_arch = "x86_64")]
pub mod avx2;
#[cfg(target_arch = "x86_64")]
pub mod avx512;
#[cfg(target_arch = "aarch64")]
pub mod neon;

use std::sync::OnceLock;

use super::geometry::{CHUNK, LANES};

/// An instruction set, the later the wider.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    Generic,
    /// 64-bit Arm, always with its vectors.
    Neon,
    /// AVX2, FMA, F16C and POPCNT.
    Avx2,
    /// AVX-512 as of Ice Lake and Zen 4: F, BW, DQ, VL, VBMI and VBMI2, with all of the above.
    Avx512,
    /// Tile products of bf16 as of Sapphire Rapids, with all of the above.
    Amx,
}

impl Isa {
    const ALL: [Self; 5] = [Self::Generic, Self::Neon, Self::Avx2, Self::Avx512, Self::Amx];

    pub fn name(self) -> &'static str {
        match self {
            Self::Generic => "generic",
            Self::Neon => "neon",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Amx => "amx",
        }
    }

    /// The instruction set of this process: the widest that the CPU has, or a narrower one that `INFOLD_ISA` names.
    pub fn get() -> Self {
        static ISA: OnceLock<Isa> = OnceLock::new();
        *ISA.get_or_init(|| {
            let named = std::env::var("INFOLD_ISA").ok();
            let named = Self::ALL.into_iter().find(|isa| Some(isa.name()) == named.as_deref());
            let has = |isa: &Self| *isa == Self::Generic || (*isa == Self::Neon) == (Self::widest() == Self::Neon);
            named.filter(has).map_or(Self::widest(), |named| named.min(Self::widest()))
        })
    }

    #[cfg(target_arch = "x86_64")]
    fn widest() -> Self {
        let avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
            && is_x86_feature_detected!("popcnt");
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vbmi")
            && is_x86_feature_detected!("avx512vbmi2");
        match (avx2, avx512) {
            (true, true) if amx::is_supported() => Self::Amx,
            (true, true) => Self::Avx512,
            (true, false) => Self::Avx2,
            _ => Self::Generic,
        }
    }

    #[cfg(target_arch = "aarch64")]
    fn widest() -> Self {
        Self::Neon
    }

    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    fn widest() -> Self {
        Self::Generic
    }
}

/// What the decoders ask of an instruction set: a few operations on 32 lanes, of bytes or of floats.
///
/// A value of the implementing type is the proof that the CPU has its instructions, so the operations are safe to call. They
/// are inlined into functions that [`per_simd!`] compiles for the instruction set, and slow anywhere else.
pub trait Simd: Copy {
    /// A byte for each lane.
    type Bytes: Copy;
    /// An f32 for each lane.
    type Floats: Copy;

    /// Asks for the memory at an address, which need not be there.
    fn prefetch(self, address: *const u8);
    fn load(self, bytes: &[u8; LANES]) -> Self::Bytes;
    fn store(self, bytes: Self::Bytes, to: &mut [u8; LANES]);
    fn splat(self, byte: u8) -> Self::Bytes;
    /// A table of sixteen bytes for [`Simd::lookup`].
    fn table(self, bytes: &[u8; 16]) -> Self::Bytes;
    /// `table[index]`, where each index is below 16; zero for an index of 128 and above.
    fn lookup(self, table: Self::Bytes, index: Self::Bytes) -> Self::Bytes;
    /// 4-bit symbols, the low half of a byte first.
    fn nibbles(self, bytes: &[u8; LANES / 2]) -> Self::Bytes;
    /// `WIDTH`-bit symbols (1 to 7), least significant first, from the first 4·`WIDTH` bytes.
    fn packed<const WIDTH: usize>(self, bytes: &[u8; LANES]) -> Self::Bytes;

    fn and(self, a: Self::Bytes, b: Self::Bytes) -> Self::Bytes;
    fn or(self, a: Self::Bytes, b: Self::Bytes) -> Self::Bytes;
    /// Modulo 256.
    fn add(self, a: Self::Bytes, b: Self::Bytes) -> Self::Bytes;
    /// At most 255.
    fn add_saturating(self, a: Self::Bytes, b: Self::Bytes) -> Self::Bytes;
    fn shift_left<const BITS: i32>(self, a: Self::Bytes) -> Self::Bytes;
    fn shift_right<const BITS: i32>(self, a: Self::Bytes) -> Self::Bytes;
    /// `a < b ? x : x ^ change`, where a and b are below 128.
    fn change_unless_less(self, a: Self::Bytes, b: Self::Bytes, x: Self::Bytes, change: Self::Bytes) -> Self::Bytes;
    /// The low and the high byte of `a · b + c`, where a is below 128.
    fn multiply_add(self, a: Self::Bytes, b: Self::Bytes, c: Self::Bytes) -> (Self::Bytes, Self::Bytes);
    /// Where `high` is zero: the low byte becomes the high one and the next of `bytes`, in the order of lanes, the low
    /// one. Returns low, high, and how many bytes that took.
    fn refill(self, low: Self::Bytes, high: Self::Bytes, bytes: &[u8; LANES]) -> (Self::Bytes, Self::Bytes, usize);

    /// The floats of bits `high · 2^24 + low · 2^16`.
    fn floats(self, low: Self::Bytes, high: Self::Bytes) -> Self::Floats;
    /// The floats of half-precision bits `high · 2^8 + low`.
    fn halves(self, low: Self::Bytes, high: Self::Bytes) -> Self::Floats;
    /// `high + low / 256 + offset`, exact where the result is.
    fn fixed_point(self, low: Self::Bytes, high: Self::Bytes, offset: f32) -> Self::Floats;
    fn zero(self) -> Self::Floats;
    /// `x · b + sum`, rounded once.
    fn fused_multiply_add(self, x: f32, b: Self::Floats, sum: Self::Floats) -> Self::Floats;
    fn store_floats(self, floats: Self::Floats, to: &mut [f32; LANES]);
    fn load_floats(self, from: &[f32; LANES]) -> Self::Floats;
    /// Rounds to bf16 (ties away from zero): `even` goes to the low halves, `odd` to the high ones. For numbers, not NaNs
    /// of more than bf16's bits.
    fn store_pairs(self, even: Self::Floats, odd: Self::Floats, to: &mut [u32; LANES]);
    /// [`Simd::store_pairs`] of floats whose low and high bytes these are; see [`Simd::floats`].
    #[inline(always)]
    fn store_byte_pairs(self, even: [Self::Bytes; 2], odd: [Self::Bytes; 2], to: &mut [u32; LANES]) {
        self.store_pairs(self.floats(even[0], even[1]), self.floats(odd[0], odd[1]), to);
    }
}

/// Rows of x that a product of tiles takes at most.
pub const TILE_HEIGHT: usize = 16;

/// A matrix in chunks of [`CHUNK`] columns: rows begin every `row` values in a chunk, chunks every `chunk`.
#[derive(Clone, Copy)]
pub struct Chunks<'a, T> {
    pub values: &'a [T],
    pub row: usize,
    pub chunk: usize,
}

impl<'a, T> Chunks<'a, T> {
    /// From row `row` and column `col`, the first of a chunk, on.
    pub fn at(self, row: usize, col: usize) -> Self {
        Self { values: &self.values[row * self.row + col / CHUNK * self.chunk..], ..self }
    }
}

/// Half of the last bit that bf16 keeps of an f32, and the bits that it keeps.
const BF16_HALF: u32 = 1 << 15;
#[cfg(target_arch = "x86_64")]
const BF16_UPPER: u32 = 0xffff_0000;

/// See [`Simd::store_pairs`].
#[inline(always)]
pub fn bf16_pair(even: f32, odd: f32) -> u32 {
    let rounded = |value: f32| value.to_bits().wrapping_add(BF16_HALF) >> 16;
    rounded(odd) << 16 | rounded(even)
}

/// For each set of eight lanes: the rank of each lane that is in it, and 128 for the others.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
static RANKS: [[u8; 8]; 256] = {
    let mut ranks = [[128; 8]; 256];
    let mut set = 0;
    while set < 256 {
        let (mut lane, mut rank) = (0, 0);
        while lane < 8 {
            if set >> lane & 1 == 1 {
                ranks[set][lane] = rank;
                rank += 1;
            }
            lane += 1;
        }
        set += 1;
    }
    ranks
};

/// Compiles a function over [`Simd`] for each instruction set. The result calls the one for this process and returns
/// `Some` of its result, or `None` on a machine without vectors, where the caller's portable code goes on.
macro_rules! per_simd {
    ($(#[$attribute:meta])* $visibility:vis fn $name:ident
        $(<$(const $constant:ident: $constant_type:ty),* $(,)?>)?
        ($simd:ident, $($argument:ident: $type:ty),* $(,)?) -> $result:ty $body:block
    ) => {
        $(#[$attribute])*
        $visibility fn $name $(<$(const $constant: $constant_type),*>)? ($($argument: $type),*) -> Option<$result> {
            #[inline(always)]
            #[allow(dead_code)] // a target without vectors
            fn body<S: $crate::codec::arch::Simd, $($(const $constant: $constant_type),*)?>($simd: S, $($argument: $type),*) -> $result $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c,popcnt")]
            fn avx2 $(<$(const $constant: $constant_type),*>)? ($($argument: $type),*) -> $result {
                body::<_, $($($constant),*)?>($crate::codec::arch::avx2::Avx2::new(), $($argument),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx2,fma,f16c,popcnt")]
            fn avx512 $(<$(const $constant: $constant_type),*>)? ($($argument: $type),*) -> $result {
                body::<_, $($($constant),*)?>($crate::codec::arch::avx512::Avx512::new(), $($argument),*)
            }
            match $crate::codec::Isa::get() {
                // SAFETY: `Isa::get` names only what the CPU has.
                #[cfg(target_arch = "x86_64")]
                #[allow(unsafe_code)]
                $crate::codec::Isa::Avx512 | $crate::codec::Isa::Amx => Some(unsafe { avx512 $(::<$($constant),*>)? ($($argument),*) }),
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                #[allow(unsafe_code)]
                $crate::codec::Isa::Avx2 => Some(unsafe { avx2 $(::<$($constant),*>)? ($($argument),*) }),
                #[cfg(target_arch = "aarch64")]
                $crate::codec::Isa::Neon => Some(body::<_, $($($constant),*)?>($crate::codec::arch::neon::Neon::new(), $($argument),*)),
                _ => None,
            }
        }
    };
}
pub(crate) use per_simd;

/// Compiles a function's body for each instruction set, and calls the one for this process. The body stays portable: the
/// compiler alone makes use of the instructions.
macro_rules! per_isa {
    ($(#[$attribute:meta])* $visibility:vis fn $name:ident $(<$($generic:ident: $bound:path),+>)? ($($argument:ident: $type:ty),* $(,)?) $body:block) => {
        $(#[$attribute])*
        $visibility fn $name $(<$($generic: $bound),+>)? ($($argument: $type),*) {
            #[inline(always)]
            fn portable $(<$($generic: $bound),+>)? ($($argument: $type),*) $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2 $(<$($generic: $bound),+>)? ($($argument: $type),*) {
                portable($($argument),*);
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            fn avx512 $(<$($generic: $bound),+>)? ($($argument: $type),*) {
                portable($($argument),*);
            }
            match $crate::codec::Isa::get() {
                // SAFETY: `Isa::get` names only what the CPU has.
                #[cfg(target_arch = "x86_64")]
                #[allow(unsafe_code)]
                $crate::codec::Isa::Avx512 | $crate::codec::Isa::Amx => unsafe { avx512($($argument),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                #[allow(unsafe_code)]
                $crate::codec::Isa::Avx2 => unsafe { avx2($($argument),*) },
                _ => portable($($argument),*),
            }
        }
    };
}
pub(crate) use per_isa;
