//! AVX and AVX-512.

use std::arch::x86_64::*;

use super::{Array, MOST_LANES, Tile, Vector};

macro_rules! intrinsics {
    (
        $name:ident($vector:ty) of $float:ty, $lanes:literal lanes, $registers:literal registers, $transpose:ident,
        $splat:ident, $load:ident, $store:ident, $add:ident, $subtract:ident, $multiply:ident, $multiply_add:ident,
        $subtract_from:ident
    ) => {
        #[derive(Clone, Copy)]
        pub struct $name($vector);

        // SAFETY, of every block: the CPU has the instruction (see the trait), and slices the lanes.
        impl Vector<$float> for $name {
            const LANES: usize = $lanes;
            const REGISTERS: usize = $registers;
            type Lane = Array<$float, 1, $registers, true>;

            #[inline(always)]
            fn splat(value: $float) -> Self {
                Self(unsafe { $splat(value) })
            }

            #[inline(always)]
            fn load(from: &[$float]) -> Self {
                let from = &from[..$lanes];
                Self(unsafe { $load(from.as_ptr()) })
            }

            #[inline(always)]
            unsafe fn load_at(from: &[$float], index: usize) -> Self {
                Self(unsafe { $load(from.as_ptr().add(index)) })
            }

            #[inline(always)]
            fn store(self, to: &mut [$float]) {
                let to = &mut to[..$lanes];
                unsafe { $store(to.as_mut_ptr(), self.0) }
            }

            #[inline(always)]
            unsafe fn store_to(self, to: *mut $float) {
                unsafe { $store(to, self.0) }
            }

            #[inline(always)]
            fn prefetch(from: &[$float], index: usize) {
                unsafe { _mm_prefetch::<_MM_HINT_T0>(from.as_ptr().wrapping_add(index).cast()) };
            }

            #[inline(always)]
            fn add(self, b: Self) -> Self {
                Self(unsafe { $add(self.0, b.0) })
            }

            #[inline(always)]
            fn subtract(self, b: Self) -> Self {
                Self(unsafe { $subtract(self.0, b.0) })
            }

            #[inline(always)]
            fn multiply(self, b: Self) -> Self {
                Self(unsafe { $multiply(self.0, b.0) })
            }

            #[inline(always)]
            fn multiply_add(self, b: Self, sum: Self) -> Self {
                Self(unsafe { $multiply_add(self.0, b.0, sum.0) })
            }

            #[inline(always)]
            fn subtract_from(self, b: Self, sum: Self) -> Self {
                Self(unsafe { $subtract_from(self.0, b.0, sum.0) })
            }

            #[inline(always)]
            fn transpose(rows: &mut Tile<Self>) {
                let mut vectors: [$vector; $lanes] = std::array::from_fn(|row| rows[row].0);
                unsafe { $transpose(&mut vectors) };
                rows.iter_mut().zip(vectors).for_each(|(row, vector)| row.0 = vector);
            }
        }
    };
}

intrinsics!(
    Avx(__m256) of f32, 8 lanes, 16 registers, transpose_avx,
    _mm256_set1_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_add_ps, _mm256_sub_ps, _mm256_mul_ps, _mm256_fmadd_ps,
    _mm256_fnmadd_ps
);
intrinsics!(
    Avx512(__m512) of f32, 16 lanes, 32 registers, transpose_avx512,
    _mm512_set1_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_add_ps, _mm512_sub_ps, _mm512_mul_ps, _mm512_fmadd_ps,
    _mm512_fnmadd_ps
);
intrinsics!(
    AvxDouble(__m256d) of f64, 4 lanes, 16 registers, transpose_avx_double,
    _mm256_set1_pd, _mm256_loadu_pd, _mm256_storeu_pd, _mm256_add_pd, _mm256_sub_pd, _mm256_mul_pd, _mm256_fmadd_pd,
    _mm256_fnmadd_pd
);
intrinsics!(
    Avx512Double(__m512d) of f64, 8 lanes, 32 registers, transpose_avx512_double,
    _mm512_set1_pd, _mm512_loadu_pd, _mm512_storeu_pd, _mm512_add_pd, _mm512_sub_pd, _mm512_mul_pd, _mm512_fmadd_pd,
    _mm512_fnmadd_pd
);

const _: () = assert!(Avx512::LANES <= MOST_LANES);

/// Within each quarter (128 bits), of four rows or two apart: columns become rows.
macro_rules! transpose_within {
    ($rows:ident of f32, $low:ident, $high:ident, $low_pairs:ident, $high_pairs:ident, $cast:ident, $back:ident) => {
        for rows in $rows.as_chunks_mut::<4>().0 {
            let [a, b, c, d] = *rows;
            let [ab, cd] = [$cast($low(a, b)), $cast($low(c, d))];
            let [ab_high, cd_high] = [$cast($high(a, b)), $cast($high(c, d))];
            *rows =
                [$low_pairs(ab, cd), $high_pairs(ab, cd), $low_pairs(ab_high, cd_high), $high_pairs(ab_high, cd_high)]
                    .map(|row| $back(row));
        }
    };
    ($rows:ident of f64, $low:ident, $high:ident) => {
        for rows in $rows.as_chunks_mut::<2>().0 {
            let [a, b] = *rows;
            *rows = [$low(a, b), $high(a, b)];
        }
    };
}

/// Of whole quarters, of which a row has two, in the rows that are `$apart`.
macro_rules! transpose_halves {
    ($rows:ident, $apart:literal, $permute:ident) => {
        for column in 0..$apart {
            let (a, b) = ($rows[column], $rows[column + $apart]);
            $rows[column] = $permute::<0x20>(a, b);
            $rows[column + $apart] = $permute::<0x31>(a, b);
        }
    };
}

/// Of whole quarters, of which a row has four, in the rows that are `$apart`.
macro_rules! transpose_quarters {
    ($rows:ident, $apart:literal, $shuffle:ident) => {
        for column in 0..$apart {
            // Quarters 0 and 2 of two rows, and 1 and 3; then of those.
            let [a, b, c, d] = [0, 1, 2, 3].map(|row| $rows[row * $apart + column]);
            let [even_ab, even_cd] = [$shuffle::<0x88>(a, b), $shuffle::<0x88>(c, d)];
            let [odd_ab, odd_cd] = [$shuffle::<0xdd>(a, b), $shuffle::<0xdd>(c, d)];
            $rows[column] = $shuffle::<0x88>(even_ab, even_cd);
            $rows[column + $apart] = $shuffle::<0x88>(odd_ab, odd_cd);
            $rows[column + 2 * $apart] = $shuffle::<0xdd>(even_ab, even_cd);
            $rows[column + 3 * $apart] = $shuffle::<0xdd>(odd_ab, odd_cd);
        }
    };
}

/// # Safety
/// The CPU has AVX.
#[inline(always)]
unsafe fn transpose_avx(rows: &mut [__m256; 8]) {
    // SAFETY: by the caller's promise.
    unsafe {
        transpose_within!(
            rows of f32,
            _mm256_unpacklo_ps,
            _mm256_unpackhi_ps,
            _mm256_unpacklo_pd,
            _mm256_unpackhi_pd,
            _mm256_castps_pd,
            _mm256_castpd_ps
        );
        transpose_halves!(rows, 4, _mm256_permute2f128_ps);
    }
}

/// # Safety
/// The CPU has AVX.
#[inline(always)]
unsafe fn transpose_avx_double(rows: &mut [__m256d; 4]) {
    // SAFETY: by the caller's promise.
    unsafe {
        transpose_within!(rows of f64, _mm256_unpacklo_pd, _mm256_unpackhi_pd);
        transpose_halves!(rows, 2, _mm256_permute2f128_pd);
    }
}

/// # Safety
/// The CPU has AVX-512.
#[inline(always)]
unsafe fn transpose_avx512(rows: &mut [__m512; 16]) {
    // SAFETY: by the caller's promise.
    unsafe {
        transpose_within!(
            rows of f32,
            _mm512_unpacklo_ps,
            _mm512_unpackhi_ps,
            _mm512_unpacklo_pd,
            _mm512_unpackhi_pd,
            _mm512_castps_pd,
            _mm512_castpd_ps
        );
        transpose_quarters!(rows, 4, _mm512_shuffle_f32x4);
    }
}

/// # Safety
/// The CPU has AVX-512.
#[inline(always)]
unsafe fn transpose_avx512_double(rows: &mut [__m512d; 8]) {
    // SAFETY: by the caller's promise.
    unsafe {
        transpose_within!(rows of f64, _mm512_unpacklo_pd, _mm512_unpackhi_pd);
        transpose_quarters!(rows, 2, _mm512_shuffle_f64x2);
    }
}
