//! Instruction sets: which one this process runs on, and the code written for one of them.
//!
//! An ISA file holds what the portable code says, in other words: same inputs, same bits. The portable code is the oracle.
#![allow(unsafe_code)] // vector intrinsics and calls of functions compiled for an instruction set

#[cfg(target_arch = "x86_64")]
mod avx512;

use std::sync::OnceLock;

use super::geometry::{BLOCK, LANES};
use super::rans::SlotTable;

/// An instruction set, the later the wider.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    Generic,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, BW, DQ and VL, with all of the above.
    Avx512,
}

impl Isa {
    const ALL: [Self; 3] = [Self::Generic, Self::Avx2, Self::Avx512];

    pub fn name(self) -> &'static str {
        match self {
            Self::Generic => "generic",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// The instruction set of this process: the widest that the CPU has, or a narrower one that `INFOLD_ISA` names.
    pub fn get() -> Self {
        static ISA: OnceLock<Isa> = OnceLock::new();
        *ISA.get_or_init(|| {
            let named = std::env::var("INFOLD_ISA").ok();
            let named = Self::ALL.into_iter().find(|isa| Some(isa.name()) == named.as_deref());
            named.map_or(Self::widest(), |named| named.min(Self::widest()))
        })
    }

    #[cfg(target_arch = "x86_64")]
    fn widest() -> Self {
        let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        match (avx2, avx512) {
            (true, true) => Self::Avx512,
            (true, false) => Self::Avx2,
            _ => Self::Generic,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn widest() -> Self {
        Self::Generic
    }
}

/// Compiles a function's body for each instruction set, and calls the one for this process. The body stays portable: the
/// compiler alone makes use of the instructions.
macro_rules! per_isa {
    ($(#[$attribute:meta])* $visibility:vis fn $name:ident $(<$generic:ident: $bound:path>)? ($($argument:ident: $type:ty),* $(,)?) $body:block) => {
        $(#[$attribute])*
        $visibility fn $name $(<$generic: $bound>)? ($($argument: $type),*) {
            #[inline(always)]
            fn portable $(<$generic: $bound>)? ($($argument: $type),*) $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2 $(<$generic: $bound>)? ($($argument: $type),*) {
                portable($($argument),*);
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            fn avx512 $(<$generic: $bound>)? ($($argument: $type),*) {
                portable($($argument),*);
            }
            match $crate::codec::Isa::get() {
                // SAFETY: `Isa::get` names only what the CPU has.
                #[cfg(target_arch = "x86_64")]
                #[allow(unsafe_code)]
                $crate::codec::Isa::Avx512 => unsafe { avx512($($argument),*) },
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

/// Decodes the first full steps of a block, all 32 lanes each, where there is a vector decoder and its words are there.
/// Returns the steps decoded and the bytes of `words` that they took; the portable decoder goes on from there.
pub fn decode_steps(
    states: &mut [u32; LANES],
    table: &SlotTable,
    words: &[u8],
    steps: usize,
    out: &mut [u8; BLOCK],
) -> (usize, usize) {
    #[cfg(target_arch = "x86_64")]
    if Isa::get() == Isa::Avx512 {
        // SAFETY: `Isa::get` names only what the CPU has.
        return unsafe { avx512::decode_steps(states, table, words, steps, out) };
    }
    let _ = (states, table, words, steps, out);
    (0, 0)
}
