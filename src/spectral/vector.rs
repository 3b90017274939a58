//! Vectors of floats, so that sums of products stay in registers: of plain arrays the compiler makes vectors only sometimes.
#![allow(unsafe_code)] // intrinsics; each block says why it holds

use super::Real;

/// Some lanes of `T`. Its operations are inlined into functions that are compiled for an instruction set which the process
/// has, as `kernel.rs` sees to.
pub trait Vector<T>: Copy {
    const LANES: usize;
    /// One lane, which rounds as each of these does.
    type Lane: Vector<T>;
    fn zero() -> Self;
    /// The first lanes of a slice.
    fn load(from: &[T]) -> Self;
    /// The lanes from `index` on.
    ///
    /// # Safety
    /// They lie inside the slice.
    unsafe fn load_at(from: &[T], index: usize) -> Self;
    fn splat(value: T) -> Self;
    /// `self · b + sum`, rounded once where the instruction set can.
    fn multiply_add(self, b: Self, sum: Self) -> Self;
    fn store(self, to: &mut [T]);
}

/// For the compiler to make vectors of. `FUSED` says whether the target has a fused multiply-add; without one, `mul_add`
/// would be a library call.
#[derive(Clone, Copy)]
pub struct Array<T, const L: usize, const FUSED: bool>([T; L]);

impl<T: Real, const L: usize, const FUSED: bool> Vector<T> for Array<T, L, FUSED> {
    const LANES: usize = L;
    type Lane = Array<T, 1, FUSED>;

    #[inline(always)]
    fn zero() -> Self {
        Self([T::default(); L])
    }

    #[inline(always)]
    fn load(from: &[T]) -> Self {
        let mut out = Self::zero();
        out.0.copy_from_slice(&from[..L]);
        out
    }

    #[inline(always)]
    unsafe fn load_at(from: &[T], index: usize) -> Self {
        // SAFETY: by the caller's promise.
        Self::load(unsafe { from.get_unchecked(index..index + L) })
    }

    #[inline(always)]
    fn splat(value: T) -> Self {
        Self([value; L])
    }

    #[inline(always)]
    fn multiply_add(self, b: Self, sum: Self) -> Self {
        let mut out = sum;
        for ((out, &a), &b) in out.0.iter_mut().zip(&self.0).zip(&b.0) {
            *out = if FUSED { a.fused_multiply_add(b, *out) } else { a * b + *out };
        }
        out
    }

    #[inline(always)]
    fn store(self, to: &mut [T]) {
        to[..L].copy_from_slice(&self.0);
    }
}

macro_rules! intrinsics {
    ($name:ident, $vector:ty, $lanes:literal, $set1:ident, $load:ident, $fma:ident, $store:ident) => {
        #[derive(Clone, Copy)]
        pub struct $name($vector);

        impl Vector<f32> for $name {
            const LANES: usize = $lanes;
            type Lane = super::Array<f32, 1, true>;

            #[inline(always)]
            fn zero() -> Self {
                Self::splat(0.0)
            }

            #[inline(always)]
            fn load(from: &[f32]) -> Self {
                let from = &from[..$lanes];
                // SAFETY: the lanes are there, and the CPU has the instruction (see the trait).
                Self(unsafe { $load(from.as_ptr()) })
            }

            #[inline(always)]
            unsafe fn load_at(from: &[f32], index: usize) -> Self {
                // SAFETY: by the caller's promise, and the CPU has the instruction.
                Self(unsafe { $load(from.as_ptr().add(index)) })
            }

            #[inline(always)]
            fn splat(value: f32) -> Self {
                // SAFETY: the CPU has the instruction.
                Self(unsafe { $set1(value) })
            }

            #[inline(always)]
            fn multiply_add(self, b: Self, sum: Self) -> Self {
                // SAFETY: the CPU has the instruction.
                Self(unsafe { $fma(self.0, b.0, sum.0) })
            }

            #[inline(always)]
            fn store(self, to: &mut [f32]) {
                let to = &mut to[..$lanes];
                // SAFETY: the lanes are there, and the CPU has the instruction.
                unsafe { $store(to.as_mut_ptr(), self.0) }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m256, __m512, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_storeu_ps, _mm512_fmadd_ps,
        _mm512_loadu_ps, _mm512_set1_ps, _mm512_storeu_ps,
    };

    use super::Vector;

    intrinsics!(Avx, __m256, 8, _mm256_set1_ps, _mm256_loadu_ps, _mm256_fmadd_ps, _mm256_storeu_ps);
    intrinsics!(Avx512, __m512, 16, _mm512_set1_ps, _mm512_loadu_ps, _mm512_fmadd_ps, _mm512_storeu_ps);
}
#[cfg(target_arch = "x86_64")]
pub use x86::{Avx, Avx512};

/// The vectors of a float type on each instruction set.
pub trait Vectors: Sized {
    #[cfg(target_arch = "x86_64")]
    type Avx512: Vector<Self>;
    #[cfg(target_arch = "x86_64")]
    type Avx: Vector<Self>;
    /// Where the compiler makes vectors, with and without fused multiply-adds.
    type Fused: Vector<Self>;
    type Portable: Vector<Self>;
}

impl Vectors for f32 {
    #[cfg(target_arch = "x86_64")]
    type Avx512 = Avx512;
    #[cfg(target_arch = "x86_64")]
    type Avx = Avx;
    type Fused = Array<f32, 8, true>;
    type Portable = Array<f32, 8, false>;
}

impl Vectors for f64 {
    #[cfg(target_arch = "x86_64")]
    type Avx512 = Array<f64, 16, true>;
    #[cfg(target_arch = "x86_64")]
    type Avx = Array<f64, 8, true>;
    type Fused = Array<f64, 8, true>;
    type Portable = Array<f64, 8, false>;
}
